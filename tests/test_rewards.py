"""Rewards in place of demonstrations (ivl.reward_loss, data/questions.py), and networks made for others (train.py --with)."""

import importlib.util
import itertools
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.capitals import Capitals
from data.questions import Question, last_number, read_question
from data.tiny_world import World, greeting_item, prompt_text
from ivl import PluggedBase, ValueModel, combine, reward_loss
from sample import Guided
from tests.exercises import EXERCISES, edited
from tests.helpers import (
    ROOT,
    VALUE,
    refused,
    small,
    stop_at,
    together,
    weights,
    worked,
)
from train import count_answers, guide

# ---- the loss


def test_reward_loss_by_hand():
    """Two questions with two answers each, of one or two of three tokens; z_base is 0, so p_post is softmax(z_delta)."""
    z_delta = torch.zeros(4, 2, 3, dtype=torch.float64)
    z_delta[0, 0, 1] = math.log(2)  # p = 1/4, 1/2, 1/4
    z_delta[1, 1, 0] = math.log(3)  # p = 3/5, 1/5, 1/5
    labels = torch.tensor([[1, -100], [2, 0], [-100, 2], [0, 1]])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    loss, metrics = reward_loss(0 * z_delta, z_delta, labels, rewards)
    # advantages 1/2, -1/2 and 0, 0; log p of the answers log 1/2, log 1/3 + log 3/5
    expected = -(0.5 * math.log(1 / 2) - 0.5 * (math.log(1 / 3) + math.log(3 / 5))) / 4
    assert loss.item() == pytest.approx(expected)
    # KL from 1/3 each: of two of the six tokens it is not 0
    one = 0.25 * math.log(0.75) * 2 + 0.5 * math.log(1.5)
    other = 0.6 * math.log(1.8) + 0.2 * math.log(0.6) * 2
    assert metrics["drift"].item() == pytest.approx((one + other) / 4)
    assert metrics["reward"] == 0.75 and metrics["dead"] == 0.5 and metrics["length"] == 6 / 4
    with_kl, _ = reward_loss(0 * z_delta, z_delta, labels, rewards, beta=0.3)
    assert with_kl.item() == pytest.approx(expected + 0.3 * (one + other) / 4)


def random_answers(Vb: int = 5, Vv: int = 4):
    generator = torch.Generator().manual_seed(0)
    z_base, z_delta = (
        torch.randn(6, 3, V, generator=generator, dtype=torch.float64) for V in (Vb, Vv)
    )
    labels = torch.randint(4, (6, 3), generator=generator)
    labels[0, 0] = labels[3, 2] = labels[4, 1:] = -100
    rewards = torch.tensor([[1, 0, 0], [0.5, 1, 0]], dtype=torch.float64)
    return z_base, z_delta, labels, rewards


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradcheck_and_no_gradient_for_the_base(beta):
    z_base, z_delta, labels, rewards = random_answers()
    z_base.requires_grad_(), z_delta.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: reward_loss(z_base, z, labels, rewards, beta)[0], z_delta
    )
    reward_loss(z_base, z_delta, labels, rewards, beta)[0].backward()
    assert z_base.grad is None and not z_delta.grad[labels == -100].any()


def test_a_group_that_earns_the_same_teaches_nothing():
    z_base, z_delta, labels, rewards = random_answers()
    z_delta.requires_grad_()
    rewards[0] = 1.0
    loss, metrics = reward_loss(z_base, z_delta, labels, rewards)
    loss.backward()
    assert not z_delta.grad[:3].any() and z_delta.grad[3:].any() and metrics["dead"] == 0.5


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """Against all answers of length 2 of a network of 4 tokens: every pair of answers as a group, by its probability."""
    base, value = (
        small(vocab_size=4).double(),
        ValueModel(small(vocab_size=4, hidden_size=16).double()),
    )
    answers = torch.tensor(list(itertools.product(range(4), repeat=2)))  # (16, 2)
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.cat([torch.full((16, 1), 3), answers[:, :1]], dim=1)  # behind the prompt "3"
    with torch.no_grad():
        z_base = base(tokens)
    z_post = combine(z_base, value(tokens))
    log_p = z_post.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(1)  # (16,)
    p = log_p.exp()
    assert p.sum().item() == pytest.approx(1)
    exact = torch.autograd.grad(-(p * rewards).sum(), list(value.parameters()))
    # all pairs: the loss is linear in rewards, so a pair's probability can weigh its own
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)))  # (256, 2)
    weight = 256 * (p[pairs[:, 0]] * p[pairs[:, 1]]).detach()  # the loss is a mean over 256 groups
    rows = pairs.flatten()
    loss, _ = value.reward_loss(base, tokens[rows], answers[rows], rewards[pairs] * weight[:, None])
    found = torch.autograd.grad(loss, list(value.parameters()))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs / 2, rtol=0, atol=1e-6)  # (G - 1) / G, G = 2
    assert max(gradient.abs().max() for gradient in exact) > 1e-3
    # the KL at sampled tokens is in expectation that of whole answers
    drift = 0.0
    for row in range(16):
        _, metrics = value.reward_loss(base, tokens[[row]], answers[[row]], torch.zeros(1, 1))
        drift += p[row].item() * metrics["drift"].item()
    log_base = z_base.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(1)
    assert drift == pytest.approx((p * (log_p - log_base)).sum().item(), abs=1e-6)


def test_the_exercise_that_writes_the_gradient_gives_the_same(tmp_path):
    """EXERCISES.md, 9, done in a copy of ivl.py."""
    shutil.copy(ROOT / "ivl.py", tmp_path / "mine.py")
    edited(replace(EXERCISES["9"], file="mine.py"), tmp_path)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    z_base, z_delta, labels, rewards = random_answers()
    z_delta.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(z_base, z_delta, labels, rewards)[0], z_delta)[0]
        for loss in (reward_loss, mine.reward_loss)
    ]
    torch.testing.assert_close(*gradients)


def test_answers_are_counted_and_those_that_only_pad_are_not():
    assert count_answers(torch.tensor([[1, -100], [-100, -100], [3, 4]])) == 2


# ---- what earns a reward


@pytest.mark.parametrize(
    "check, right, said, reward",
    [
        ("exact", "Hello Mira!", " Hello  Mira!\n", 1),
        ("exact", "Hello Mira!", "Hello Mira! Hello Mira!", 0),
        ("contains", "Paris", "It is Paris.", 1),
        ("contains", "Paris", "It is paris.", 0),
        ("number", "so 5 + 7 = 12. #### 12", "First 5, then 12.", 1),
        ("number", "#### 1,234", "That makes $1234.00", 1),
        ("number", "12", "12 or 13", 0),
        ("number", "-3", "no number", 0),
    ],
)
def test_rewards(check, right, said, reward):
    assert Question([("user", "q")], [right], check).reward(said) == reward
    assert Question([("user", "q")], ["0", right], check).reward(said) == reward


def test_the_last_number():
    assert [last_number(text) for text in ("a", "1 2.5", "-1,000 x", "7.")] == [None, 2.5, -1000, 7]


def test_the_worlds_and_the_capitals_ask_what_demonstrations_show():
    for exam, demonstrations in (
        (World(0), World(0).demonstrations()),
        (Capitals(0), Capitals(0).demonstrations()),
    ):
        records = list(exam.questions())
        for record, shown in zip(records[:200], demonstrations):
            question, left_out = read_question(record)
            human, gpt = shown["conversations"]
            assert question.turns == [("user", human["value"])] and not left_out
            assert question.reward(gpt["value"]) == 1 and question.reward("something else") == 0
    assert any(len(read_question(record)[0].answers) > 1 for record in records)  # two spellings


# ---- the command

REWARDS = f"train.py --base --value {VALUE} --loss reward --answers 4 --batch-size 4 --steps 6 --save-every 2"


@pytest.fixture
def house(home, tmp_path, short_exam) -> Path:
    shutil.copytree(home / "out", tmp_path / "out")
    return tmp_path


def assert_identical(one: Path, other: Path) -> None:
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_rewards_train_and_resume(house):
    """A run that is stopped in the middle draws the same answers when it goes on, and ends the same."""
    output = worked(house, REWARDS, "--out", "straight")
    assert "mean reward of sampled answers" in output and "4 sampled answers to each" in output
    stop_at(house, 5, *REWARDS.split(), "--out", "stopped")
    assert "resumed at step 4" in worked(house, REWARDS, "--out", "stopped", "--resume")
    assert_identical(house / "straight", house / "stopped")
    info = json.loads((house / "straight/ivl.json").read_text())
    assert (info["loss"], info["answers"]) == ("reward", 4)
    lines = (house / "straight/log.jsonl").read_text().splitlines()
    assert {"reward", "dead", "length", "drift"} <= json.loads(lines[0]).keys() and len(lines) == 6


def test_two_processes_give_what_one_gives(house):
    command = [*REWARDS.split(), "--grad-accum", "3"]
    worked(house, *command, "--out", "alone")
    done = together(house, *command, "--out", "together")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(house / "alone").items():
        torch.testing.assert_close(tensor, weights(house / "together")[name], rtol=0, atol=1e-4)


def test_peoples_own_questions(house):
    rng, world = random.Random(0), World(0)
    items = [greeting_item(rng.choice(world.people), "") for _ in range(40)]
    records = [{"prompt": prompt_text(item), "answer": ["no", item.answer]} for item in items]
    records += [
        {"prompt": "", "answer": "x"},
        {"prompt": "q", "answer": "none", "reward": "number"},
    ]
    (house / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = worked(house, REWARDS, "--data", "q.jsonl", "--out", "own")
    assert "dropped 1: a prompt that is no text" in output
    assert "dropped 1: a reward by number, and an answer without one" in output
    metrics = json.loads((house / "own/metrics.json").read_text())
    assert set(metrics["base"]) == {"reward"} and 0 <= metrics["base+value"]["reward"] <= 1
    (house / "q.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    said = refused(house, REWARDS, "--data", "q.jsonl", "--out", "other")
    assert "no object with 'prompt' and 'answer'" in said
    (house / "q.jsonl").write_text('{"prompt": "x", "answer": "y", "reward": "eval"}\n')
    said = refused(house, REWARDS, "--data", "q.jsonl", "--out", "other")
    assert "a reward that is none of exact, contains, number" in said


def test_flags_that_do_not_fit_are_refused(house):
    train = "train.py --base --value"
    assert "--answers goes with --loss reward" in refused(house, train, "--answers", "4")
    assert "from 2 to 1000" in refused(house, train, "--loss", "reward", "--answers", "1")
    assert "--beta goes with --loss pairwise or reward" in refused(house, train, "--beta", "1")
    assert "--shard goes neither" in refused(house, train, "--loss", "reward", "--shard")
    assert "--with means nothing" in refused(house, "train.py --base --full --with", VALUE)


# ---- a network that is made for another


@torch.no_grad()
def test_a_base_with_a_network_plugged_in_is_their_sum():
    base, a, b = (
        small(vocab_size=53),
        small(num_hidden_layers=1),
        small(num_hidden_layers=1, vocab_size=48),
    )
    tokens = torch.randint(48, (2, 7))
    plugged = PluggedBase(base, [a])
    expected = base(tokens)
    expected[..., :50] += a(tokens)
    torch.testing.assert_close(plugged(tokens), expected)
    # what is measured is what is trained: on top of it, and without it
    new = ValueModel(b)
    torch.testing.assert_close(
        guide(plugged, new).logits(tokens)[..., :48], combine(plugged(tokens), b(tokens))[..., :48]
    )
    torch.testing.assert_close(guide(plugged, None).logits(tokens)[..., :50], expected[..., :50])
    assert isinstance(guide(base, new), Guided) and guide(base, new).value is new


def test_with_trains_on_top_and_resumes(house):
    command = f"train.py --base --value --with {VALUE} --steps 6 --save-every 2 --no-full".split()
    assert f"on a base guided by {VALUE}" in worked(house, *command, "--out", "straight")
    stop_at(house, 5, *command, "--out", "stopped")
    assert "resumed at step 4" in worked(house, *command, "--out", "stopped", "--resume")
    assert_identical(house / "straight", house / "stopped")
    assert json.loads((house / "straight/ivl.json").read_text())["plugged"] == [str(VALUE)]
    # the frozen base is guided, so it stands in the table as that
    metrics = json.loads((house / "straight/metrics.json").read_text())
    before = json.loads((house / VALUE / "metrics.json").read_text())
    assert metrics["base"] == before["base+value"]
    asked = "--max-new-tokens 12 --prompt Hello".split()
    said = worked(house, "sample.py --value straight", *asked)
    assert f"--value {VALUE} straight adds them" in said
    assert "value + value" in worked(house, f"sample.py --value {VALUE} straight", *asked)
    # a third on top of two; by rewards, too
    both = f"{REWARDS.replace(str(VALUE), 'straight')} --with {VALUE} straight --out third"
    assert f"guided by {VALUE} and straight" in worked(house, both)


def test_only_residual_networks_of_one_template_are_plugged_in(house):
    train = "train.py --base --value --no-full --out x --with"
    assert "no ivl.json" in refused(house, train, "out/seed0/tiny-s")
    assert "that of the new one cascade" in refused(house, train, VALUE, "--scheme", "cascade")
    file = house / VALUE / "ivl.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"scheme": "cascade"}))
    assert "its scheme is cascade" in refused(house, train, VALUE)
    file.write_text(json.dumps(info | {"template": "zephyr"}))
    said = refused(house, train, VALUE, "--template", "llama-2")
    assert "in template zephyr, and not in llama-2" in said
