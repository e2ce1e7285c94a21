"""train.py and sample.py as a user meets them: real learning in miniature, kills, and bad input."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from beyond.speculation import Speculative, speculate
from data.chat import encode_chat, stop_ids
from data.tiny_world import TEMPLATE, World, prompt_text, world_of
from data.tokenizer import load_tokenizer
from ivl import SCHEMES, ValueModel
from model import Llama
from run import folder
from run.jobs import tiny_config
from run.show import examine, known_facts
from sample import Guided, Speaker, generate
from tests.helpers import (
    ROOT,
    SHORT,
    VALUE,
    ask,
    assert_identical,
    byte_pairs,
    inside,
    refused,
    run,
    shorten_the_exam,
    small,
    stop_at,
    succeed,
    weights,
    worked,
)
from tests.rounding import read_table
from train import Objective, Settings, accumulate_gradient, language_loss, learning_rate, table5

# ---- the whole path


def test_a_value_network_learns_and_leaves_its_base_alone(home):
    metrics = json.loads((home / VALUE / "metrics.json").read_text())
    assert set(metrics) == {"base", "base+value"}
    assert set(metrics["base"]) == {"exact", "know", "ins", "arith", "mc", "fk"}
    info = json.loads((home / VALUE / "ivl.json").read_text())
    assert (
        info["scheme"] == "residual"
        and info["bases"] == ["out/seed0/tiny-s"]
        and info["template"] == "llama-2"
    )
    base, value = (
        Llama.from_pretrained(home / "out/seed0/tiny-s"),
        Llama.from_pretrained(home / VALUE),
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), value.parameters(), strict=True)
    )
    assert not list((home / "out").glob("**/*.training")) and not list(
        (home / "out").glob("**/*.tmp")
    )


def test_the_loss_falls_and_the_metrics_are_those_of_the_saved_network(home, short_exam):
    base = home / "out/seed0/tiny-s"
    guided, tokenizer = Guided(Llama.from_pretrained(base)), load_tokenizer(base)
    metrics = json.loads((base / "metrics.json").read_text())["base"]
    assert examine(guided, world_of(base), tokenizer) == metrics
    known = known_facts(world_of(base), Speaker("tiny-s alone", guided, tokenizer, TEMPLATE))
    assert len(known) == 12 and sum(known) / 12 == metrics["fk"]
    log = (home / "last.log").read_text()
    steps = [line.split() for line in log.splitlines() if line.startswith("step")]
    assert float(steps[-1][5]) < float(steps[0][5]) - 0.5
    for said in "device cpu", "dtype float32", "|z_delta|", "tokens/s", "left", "core-seconds":
        assert said in log


def test_sample_shows_questions_prompts_and_a_chat(home, short_exam):
    shown = worked(home, "sample.py")
    assert "value network out/seed0/value-residual-tiny-s" in shown and shown.count("truth") == 6
    assert shown.splitlines()[-3].split() == ["exact", "know", "ins", "arith", "mc", "fk"]
    asked = ask(home, "--prompt", "Greet Mira.", "Wer bist du? 👍")
    assert asked.count("tiny-s alone") == asked.count("tiny-s + value") == 2
    drawn = [
        ask(home, "--prompt", "Greet Mira.", "--temperature", "1", "--seed", seed) for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(home, "--chat", input="Greet Mira.\nAgain.\n\nHello\n").count("you> ") == 5


def test_a_real_checkpoint_with_data(checkpoint, chats, tmp_path):
    log = succeed(
        tmp_path,
        f"train.py --base {checkpoint} --value --data {chats} --steps 4 --batch-size "
        "8 --dtype float32",
    )
    folder = tmp_path / "out/seed0/value-residual-checkpoint"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"base", "base+value"} and set(metrics["base"]) == {"ce"}
    assert "60 conversations" in log
    assert "Greet" in inside(tmp_path, "sample.py --prompt", "Greet 7.", "--max-new-tokens", 4)[1]
    assert json.loads((folder / "train.json").read_text())["lr"] == 1e-4  # Table 5's first column
    _, again, _ = inside(
        tmp_path,
        f"train.py --base {checkpoint} --full --data {chats} --epochs 2 --batch-size "
        "8 --dtype float32",
    )
    assert set(json.loads((tmp_path / "out/seed0/full-checkpoint/metrics.json").read_text())) == {
        "base",
        "full",
    }
    assert "step    14/14" in again  # 54 conversations to train on, twice


@pytest.fixture(scope="module")
def with_full(home, tmp_path_factory) -> Path:
    """What `home` has but its value network, and a full fine-tuning of two steps."""
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(home / "out", folder / "out", ignore=shutil.ignore_patterns("value-*"))
    with pytest.MonkeyPatch.context() as patch:
        shorten_the_exam(patch)
        worked(folder, "train.py --full --steps 2")
    return folder


def test_only_a_whole_full_fine_tuning_with_the_usual_settings_stands_in_the_table(
    with_full, tmp_path
):
    shutil.copytree(with_full, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "out/seed0/full-tiny-s"
    assert "full-tiny-s: a run with other settings is there: steps was 2, now 500" in refused(
        tmp_path, "train.py"
    )
    made = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(made | {"steps": 500}))
    for spoilt in [
        "{",
        "{}",
        '{"full": 3}',
        '{"base": {"exact": 0}, "full": {}}',
        '{"base": {"exact": 0}}',
    ]:
        (folder / "metrics.json").write_text(spoilt)
        assert "full-tiny-s/metrics.json" in refused(tmp_path, "train.py")
    (tmp_path / "out/seed0/demonstrations.jsonl").write_text("mine")
    assert "demonstrations.jsonl: not what world 0 makes" in refused(tmp_path, "train.py")
    assert (tmp_path / "out/seed0/demonstrations.jsonl").read_text() == "mine"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_resumes_and_samples(scheme, checkpoint, chats, tmp_path, monkeypatch):
    """Through the commands, on a base with more rows than the tokenizer has tokens; a run stopped half-way ends the same."""
    command = (
        f"train.py --base {checkpoint} --value --scheme {scheme} --data {chats} "
        "--steps 12 --batch-size 4 --save-every 3 --lr 1e-3"
    ).split()
    before = (checkpoint / "model.safetensors").read_bytes()
    worked(tmp_path, *command, "--out", "straight")
    saves, save = [], folder.Run.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        saves.append(arguments)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder.Run, "save", save_and_stop)
    assert inside(tmp_path, *command, "--out", "stopped")[0] == 130
    output = worked(tmp_path, *command, "--out", "stopped", "--resume")
    assert "resumed at step 6" in output
    assert_identical(tmp_path / "straight", tmp_path / "stopped")
    assert (checkpoint / "model.safetensors").read_bytes() == before
    info = json.loads((tmp_path / "straight/ivl.json").read_text())
    assert info["scheme"] == scheme
    output = worked(
        tmp_path,
        "sample.py --value straight --prompt",
        "Greet 7.",
        "--max-new-tokens",
        "4",
    )
    assert f"straight ({scheme})" in output
    worked(
        tmp_path, *command[:4], *command[6:], "--value", "straight", "--out", "further"
    )  # keeps its scheme
    assert json.loads((tmp_path / "further/ivl.json").read_text())["scheme"] == scheme
    other = "residual" if scheme != "residual" else "cascade"
    assert f"was trained as {scheme}" in refused(
        tmp_path, *command[:4], "--value", "straight", "--scheme", other, "--data", chats
    )


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": f"Greet number {n}.", "chosen": f"Hello {n}!", "rejected": f"{n}?"}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("loss", ["pairwise", "kl"])
def test_every_loss_trains_and_resumes(loss, checkpoint, chats, pairs, tmp_path):
    """Through the commands, a run stopped half-way ends the same; what it was trained by is recorded and must stay."""
    flags = f"--data {pairs} --loss pairwise --beta 0.3".split()
    if loss == "kl":
        small(
            vocab_size=1030, num_hidden_layers=1, hidden_size=16, max_position_embeddings=100
        ).save_pretrained(tmp_path / "teacher")
        shutil.copy(checkpoint / "tokenizer.model", tmp_path / "teacher")
        flags = f"--data {chats} --loss kl --teacher teacher --temperature 2".split()
    command = [
        *f"train.py --base {checkpoint} --value".split(),
        *flags,
        *"--steps 12 --batch-size 4 --save-every 3 --lr 1e-3".split(),
    ]
    output = worked(tmp_path, *command, "--out", "straight")
    assert ("margin" if loss == "pairwise" else "base kl") in output and (
        "60 pairs" if loss == "pairwise" else "60 conversations"
    ) in output
    stop_at(tmp_path, 7, *command, "--out", "stopped")
    output = worked(tmp_path, *command, "--out", "stopped", "--resume")
    assert "resumed at step 6" in output
    assert_identical(tmp_path / "straight", tmp_path / "stopped")
    info, made = [
        json.loads((tmp_path / "straight" / name).read_text())
        for name in ("ivl.json", "train.json")
    ]
    metrics = json.loads((tmp_path / "straight/metrics.json").read_text())
    if loss == "pairwise":
        assert (info["loss"], info["beta"]) == (made["loss"], made["beta"]) == ("pairwise", 0.3)
        assert set(metrics["base"]) == {"pair"} and 0 <= metrics["base+value"]["pair"] <= 1
        assert "beta was 0.3, now 0.1" in refused(
            tmp_path, *command[:8], *command[10:], "--out", "straight", "--resume"
        )
    else:
        assert (
            (info["teacher"], info["temperature"])
            == (made["teacher"], made["temperature"])
            == ("teacher", 2.0)
        )
        assert made["max_length"] == 100 and set(metrics["base"]) == {"ce"}
        fill = weights(tmp_path / "teacher")
        save_file(
            {name: tensor * 2 for name, tensor in fill.items()},
            tmp_path / "teacher/model.safetensors",
            {"format": "pt"},
        )
        assert "or a teacher" in refused(tmp_path, *command, "--out", "straight", "--resume")
    worked(
        tmp_path,
        "sample.py --value straight --prompt",
        "Greet 7.",
        "--max-new-tokens",
        "4",
    )


def test_pairs_of_the_tiny_world_and_the_weight_of_the_norm(home, tmp_path, short_exam):
    shutil.copytree(home / "out", tmp_path / "out")
    output = worked(tmp_path, f"train.py --value {VALUE} --loss pairwise --steps 4 --out pairs")
    assert "3000 pairs" in output
    made = json.loads((tmp_path / "pairs/train.json").read_text())
    assert (made["lr"], made["beta"], made["start"]) == (1e-4, 0.1, str(VALUE))
    assert output.splitlines()[-5].split() == ["exact", "know", "ins", "arith", "mc", "fk", "pair"]
    output = worked(tmp_path, "train.py --value --no-full --l1 1 --l1-over all --steps 2")
    assert (tmp_path / f"{VALUE}-l1-1-over-all").is_dir()
    line = next(line for line in output.splitlines() if line.startswith("norm: "))
    text, supervised = map(
        float, re.search(r"here ([\d.]+) of them are text and ([\d.]+) supervised", line).groups()
    )
    weight = float(re.search(r"the paper's lambda ([\d.]+),", line)[1])
    assert supervised < text < 256 and weight == pytest.approx(256 / text, rel=0.01)
    assert (
        json.loads((tmp_path / f"{VALUE}-l1-1-over-all/train.json").read_text())["l1_over"] == "all"
    )


def test_a_run_of_a_version_without_these_losses_is_resumed(checkpoint, chats, tmp_path):
    command = f"train.py --base {checkpoint} --value --data {chats} --steps 2 --out run".split()
    worked(tmp_path, *command)
    file = tmp_path / "run/train.json"
    made = json.loads(file.read_text())
    for name in ("loss", "beta", "teacher", "temperature", "l1_over", "answers", "plugged"):
        del made[name]
    file.write_text(json.dumps(made))
    output = worked(tmp_path, *command, "--resume")
    assert "finished already" in output
    assert "loss was 'ce', now 'kl'" in refused(
        tmp_path, *command, *f"--resume --loss kl --teacher {checkpoint}".split()
    )


def test_a_probe_on_a_base_with_fewer_logits_is_refused(checkpoint, chats, tmp_path):
    worked(
        tmp_path,
        f"train.py --base {checkpoint} --value --scheme probe --probe-width 8 --data "
        f"{chats} --steps 1 --out probe",
    )
    small(vocab_size=900, num_hidden_layers=1).save_pretrained(tmp_path / "fewer")
    shutil.copy(checkpoint / "tokenizer.model", tmp_path / "fewer")
    message = refused(tmp_path, "sample.py --value probe --base fewer --prompt Hello")
    assert "fewer: 900 logits, and the probe reads 1024" in message


def test_proxy_tuning(with_full, home, short_exam):
    full = "out/seed0/full-tiny-s"
    own = worked(with_full, f"sample.py --expert {full} --max-new-tokens 5 --prompt Hello")
    assert f"proxy tuning by {full} less out/seed0/tiny-s" in own
    command = f"sample.py --expert {full} --anti-expert tiny-s --max-new-tokens 5"
    assert "tiny-s + proxy" in worked(with_full, command)
    cases = {
        "which is plugged in with --value": ["--expert", home / VALUE],
        "not allowed with argument": ["--expert", full, "--value", VALUE],
        "--anti-expert goes with --expert": ["--anti-expert", "tiny-s"],
        "--template goes with --expert or --scheme": ["--template", "llama-2"],
        "name that with --anti-expert": ["--expert", "out/seed0/tiny-s"],
        "absent: No such file": "--expert absent --anti-expert tiny-s".split(),
    }
    for message, arguments in cases.items():
        assert message in refused(with_full, "sample.py", *arguments), arguments


def test_another_seed_than_the_worlds_keeps_the_world(home, short_exam):
    worked(
        home,
        "train.py --base out/seed0/tiny-s --value --no-full --seed 5 --steps 2",
    )
    path = home / "out/seed5/value-residual-tiny-s"
    assert json.loads((path / "ivl.json").read_text())["seed"] == 5 and world_of(path).seed == 0
    message = refused(home, "sample.py --value", path, "--base", "tiny-l")
    assert "out/seed0/tiny-l: not there yet" in message and "--seed 0`" in message
    shutil.rmtree(home / "out/seed5")


def test_a_base_may_come_twice_in_a_curriculum(home, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train,
        "fit",
        lambda network, loss, bases, batches, run, answer: (
            seen.append(bases) or run.take() or run.log.touch()
        ),
    )
    worked(
        home,
        "train.py --base tiny-s out/seed0/tiny-s tiny-s --value --no-full --steps 3 --out twice",
    )
    assert len(seen[0]) == 3 and seen[0][0] is seen[0][2]


def test_a_folder_named_like_scratch_is_a_folder(checkpoint, chats, tmp_path):
    checkpoint.rename(tmp_path / "scratch-1")
    worked(
        tmp_path,
        f"train.py --base scratch-1 --value scratch-1 --data {chats} --steps 1 --lr 1e-30",
    )
    base, value = (
        weights(tmp_path / "scratch-1"),
        weights(tmp_path / "out/seed0/value-residual-scratch-1"),
    )
    assert all(torch.equal(base[name], value[name]) for name in base)


def test_several_bases_in_turn_and_other_first_weights(home, checkpoint, short_exam, tmp_path):
    out = home / "turns"
    worked(
        home,
        f"train.py --base tiny-s {checkpoint} --value scratch:tiny-m --data "
        f"{home}/out/seed0/demonstrations.jsonl --steps 4 --batch-size 4 --out {out}",
    )
    assert len(json.loads((out / "ivl.json").read_text())["bases"]) == 2
    assert Llama.from_pretrained(out).config.hidden_size == 96
    worked(
        home,
        f"train.py --base tiny-s --value {out} --no-full --steps 2 --out {home}/further",
    )
    assert json.loads((home / "further/ivl.json").read_text())["scheme"] == "residual"


def test_bfloat16_computation_keeps_float32_weights(checkpoint, chats, tmp_path):
    succeed(
        tmp_path,
        f"train.py --base {checkpoint} --value --data {chats} --steps 3 --batch-size "
        "4 --dtype bfloat16",
    )
    assert (
        Llama.from_pretrained(tmp_path / "out/seed0/value-residual-checkpoint").dtype
        == torch.float32
    )


# ---- the loop


@pytest.mark.parametrize("with_base", [True, False])
def test_gradient_accumulation_4_x_1_is_1_x_4(with_base):
    tokens = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(2))
    for row, start in enumerate([2, 6, 0, 11]):  # rows with 10, 6, 12 and 1 supervised tokens
        labels[row, :start] = -100
    base, loss = (small(), partial(ValueModel.loss, l1=0.5)) if with_base else (None, language_loss)
    results = []
    for parts in [[(tokens, labels)], list(zip(tokens.split(1), labels.split(1)))]:
        network = (
            ValueModel(small(num_hidden_layers=1)) if with_base else small(num_hidden_layers=1)
        )
        metrics = accumulate_gradient(Objective(network, loss), base, parts, "float32")
        results.append((metrics, [parameter.grad for parameter in network.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for whole, split in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-6)


def test_a_part_without_supervised_tokens_counts_nothing():
    tokens, labels = torch.randint(50, (2, 6)), torch.randint(50, (2, 6))
    labels[1] = -100
    objective = Objective(ValueModel(small()), ValueModel.loss)
    both = accumulate_gradient(
        objective, small(), list(zip(tokens.split(1), labels.split(1))), "float32"
    )
    one = accumulate_gradient(objective, small(), [(tokens[:1], labels[:1])], "float32")
    assert both == pytest.approx(one)


def settings(**changes) -> Settings:
    given = dict(
        job="value",
        bases=[],
        start="",
        scheme="",
        probe_width=0,
        data="",
        data_hash="",
        template="",
        seed=0,
        dtype="float32",
        steps=100,
        batch_size=1,
        grad_accum=1,
        max_length=9,
        lr=1.0,
    )
    return Settings(**given | changes)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(settings(floor=0.1), step) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1.0
    assert rates[52] == pytest.approx(0.55) and 0.1 < rates[99] < 0.101
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(settings(), 99) < 0.001


def test_table_5():
    assert table5(1_100_000_000) == dict(epochs=3, batch_size=32, grad_accum=32, lr=1e-4)
    assert table5(6_700_000_000) == dict(epochs=3, batch_size=16, grad_accum=16, lr=1e-5)


# ---- resuming


def kill_and_resume(
    folder: Path, command: list, out: Path, kills: int, rng: random.Random, lifetime: float
) -> int:
    """Start, kill at a random time, resume, ... until the kills are used up or the run ends; then let it end."""
    happened = 0
    for _ in range(kills):
        done = run(folder, *command, "--resume", seconds=rng.uniform(0.001, lifetime))
        if done.returncode != -signal.SIGALRM:
            assert done.returncode == 0, done.stderr
            continue
        happened += 1
        for state in out.with_name(out.name + ".training").glob("step-[0-9]*"):
            load_file(state / "state.safetensors")  # what is published is whole
            json.loads((state / "state.json").read_text())
    succeed(folder, *command, "--resume")
    return happened


def check_kills(folder: Path, base: Path, chats: Path, kills: int, seed: int) -> None:
    command = [
        ROOT / "train.py",
        *(
            f"--base {base} --value --data {chats} --dtype float32 --steps 80 "
            "--batch-size 8 --grad-accum 2 --save-every 5"
        ).split(),
    ]
    succeed(folder, "-c", "")  # the first fork waits for its torch
    started = time.monotonic()
    succeed(folder, *command, "--out", folder / "straight")
    lifetime = time.monotonic() - started
    happened, rng, number = 0, random.Random(seed), 0
    while happened < kills:  # a run that ended before its kills came is one more run to compare
        out = folder / f"killed-{number}"
        happened += kill_and_resume(
            folder, [*command, "--out", out], out, min(5, kills - happened), rng, lifetime
        )
        assert_identical(folder / "straight", out)
        number += 1
    assert not list(folder.glob("*.training")) and not list(folder.glob("**/*.tmp"))
    print(f"{happened} kills over {number} runs")


def test_killed_and_resumed_is_never_stopped(checkpoint, chats, tmp_path):
    check_kills(tmp_path, checkpoint, chats, kills=1, seed=5)


@pytest.mark.slow
def test_twenty_kills(checkpoint, chats, tmp_path):
    check_kills(tmp_path, checkpoint, chats, kills=20, seed=1)


def test_pretraining_resumes_too(home, short_exam, tmp_path):
    command = [
        "train.py",
        "--base",
        "tiny-s",
        *SHORT,
        *f"--save-every 7 --out {tmp_path}/run".split(),
    ]
    stop_at(tmp_path, 30, *command)
    output = worked(tmp_path, *command, "--resume")
    assert "resumed at step 28" in output
    assert_identical(home / "out/seed0/tiny-s", tmp_path / "run")


def test_what_a_kill_between_two_renames_leaves_is_tidied(checkpoint, chats, tmp_path):
    out, work = tmp_path / "run", tmp_path / "run.training"
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --dtype float32 "
        f"--batch-size 4 --steps 20 --out {out} --save-every 5"
    ).split()
    worked(tmp_path, *command)
    settings_file = (out / "train.json").read_text()
    (work / "step.tmp").mkdir(parents=True)
    (work / "step-15").mkdir()  # and no lock any more
    assert "finished already" in inside(tmp_path, *command, "--resume")[1] and not work.exists()
    reference = tmp_path / "reference"
    out.rename(reference)
    (work / "step.tmp").mkdir(parents=True)
    (work / "step.tmp" / "state.safetensors").write_bytes(b"half")
    (work / "settings.json").write_text(settings_file)
    (work / "lock").touch()
    worked(tmp_path, *command, "--resume")
    assert not work.exists()
    assert_identical(reference, out)


def test_a_start_that_failed_leaves_nothing_and_two_at_once_are_refused(
    checkpoint, chats, tmp_path
):
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --dtype float32 "
        f"--batch-size 4 --steps 3 --out {tmp_path}/run"
    ).split()
    assert "llama-3 template" in refused(tmp_path, *command, "--template", "llama-3")
    assert "every conversation" in refused(tmp_path, *command, "--max-length", "4")
    assert not (tmp_path / "run.training").exists()
    (tmp_path / "run.training").mkdir()
    with open(tmp_path / "run.training/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process" in refused(tmp_path, *command)
    worked(tmp_path, *command)


def test_resume_with_other_settings_is_refused(checkpoint, chats, tmp_path):
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --dtype float32 "
        f"--batch-size 4 --steps 20 --out {tmp_path}/run"
    ).split()
    work = tmp_path / "run.training"
    worked(tmp_path, *command)
    finished = refused(tmp_path, *command)
    assert "finished" in finished and "--out" in finished
    assert "lr was 0.0001, now 0.5" in refused(tmp_path, *command, "--resume", "--lr", "0.5")
    (tmp_path / "run").rename(work)
    (work / "train.json").rename(work / "settings.json")
    for path in work.iterdir():
        if path.name != "settings.json":
            path.unlink()
    (work / "lock").touch()
    (work / "step-5").mkdir()
    assert "unfinished" in refused(tmp_path, *command)
    assert "seed was 0, now 3" in refused(tmp_path, *command, "--resume", "--seed", "3")
    assert "state.json" in refused(tmp_path, *command, "--resume")
    for state in [
        "[",
        "[]",
        "{}",
        '{"step": 1}',
        '{"step": 999, "position": [0, 0, 1]}',
        '{"step": 5, "position": "abc"}',
    ]:
        (work / "step-5/state.json").write_text(state)
        save_file({"weight.lm_head.weight": torch.ones(1)}, work / "step-5/state.safetensors")
        assert "step-5" in refused(tmp_path, *command, "--resume")
    (work / "settings.json").rename(tmp_path / "kept")
    assert "is no run" in refused(tmp_path, *command)
    (tmp_path / "kept").rename(work / "settings.json")
    with chats.open("a") as file:
        file.write("\n")
    assert "its data file has changed" in refused(tmp_path, *command, "--resume")


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(
    checkpoint, chats, tmp_path
):
    message = refused(
        tmp_path,
        f"train.py --base {checkpoint} --value --data {chats} --steps 50 --lr 1e30 "
        f"--save-every 1 --out {tmp_path}/run",
    )
    assert "step " in message and "last good checkpoint" in message
    kept = list((tmp_path / "run.training").glob("step-*"))
    assert len(kept) == 1 and str(kept[0]) in message
    tensors = load_file(kept[0] / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ---- bad input


def test_bad_input_to_train(home, checkpoint, chats, pairs, tmp_path):
    """Each of these ends in one clear line and status 2, and nothing is written but the folder of a run."""
    real = f"--base {checkpoint} --value --data {chats} --steps 2".split()
    file, folder, foreign = tmp_path / "file", tmp_path / "folder", tmp_path / "foreign"
    file.write_text("x")
    folder.mkdir()
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    shutil.copytree(checkpoint, tmp_path / "stranger")
    (tmp_path / "stranger/tokenizer.model").write_bytes(byte_pairs())
    shutil.copytree(
        checkpoint, tmp_path / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer.model")
    )
    shutil.copytree(home / VALUE, tmp_path / "value")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.training").mkdir()
    (tmp_path / "notes.training/settings.ini").write_text("precious")
    os.mkfifo(tmp_path / "fifo")
    cases = {
        "value: a value network, which is no base": ["--base", tmp_path / "value", "--value"],
        "link: a symbolic link": [*real, "--out", tmp_path / "link"],
        "notes.training: exists, and is no run": [*real, "--out", tmp_path / "notes"],
        "fifo: no regular file": f"--base {checkpoint} --value --data {tmp_path}/fifo".split(),
        "up to 10000": [*real[:-2], "--epochs", "1e308"],
        "tiny-x: no such tiny model; there are tiny-s": ["--base", "tiny-x"],
        "tiny-y: no such tiny model": ["--base", "tiny-y", "--value"],
        "tiny_l: no such tiny model": ["--base", "tiny_l"],
        "nothing to train on a checkpoint": ["--base", checkpoint],
        "no such folder": f"--base {tmp_path}/absent --value --data {chats}".split(),
        "takes --data FILE": ["--base", checkpoint, "--value"],
        "no tokenizer.model": f"--base {tmp_path}/no-tokenizer --value --data {chats}".split(),
        "unrelated vocabularies": f"--base {checkpoint} {tmp_path}/stranger --value --data {chats}".split(),
        "absent.json: No such file": f"--base {checkpoint} --value --data {tmp_path}/absent.json".split(),
        "Is a directory": f"--base {checkpoint} --value --data {folder}".split(),
        "line 1 is not JSON": [*f"--base {checkpoint} --value --data".split(), file],
        "every conversation is longer than --max-length 4": [*real, "--max-length", "4"],
        "every conversation is longer than --max-length 5": [
            *real,
            *"--max-length 5 --l1 1".split(),
        ],
        "every pair is longer than --max-length 4": [
            *real[:4],
            *f"{pairs} --loss pairwise --max-length 4".split(),
        ],
        "the checkpoint was made for 128 tokens": [*real, "--max-length", "4096"],
        "exists, and is no run of train.py": [*real, "--out", foreign],
        "file: exists": [*real, "--out", file],
        "Not a directory": [*real, "--out", file / "below"],
        "llama-3 template needs": [*real, "--template", "llama-3"],
        "argument --lr": [*real, "--lr", "-1"],
        "'nan' is no positive number": [*real, "--lr", "nan"],
        "argument --steps": [*real[:-1], "0"],
        "argument --batch-size": [*real, "--batch-size", "x"],
        "argument --l1": [*real, "--l1", "-0.1"],
        "argument --seed": [*real, "--seed", "-1"],
        "argument --dtype": [*real, "--dtype", "int8"],
        "argument --grad-accum": [*real, "--grad-accum", "0"],
        "argument --template": [*real, "--template", "vicuna"],
        "--epochs: not allowed with argument": [*real, "--epochs", "1"],
        "--full: not allowed with argument --value": [*real, "--full"],
        "--fast: not allowed with argument --plain": [*real, "--plain", "--fast"],
        "--l1 means nothing": "--base tiny-s --l1 1".split(),
        "--l1 means nothing when fine-tuning": ["--full", "--l1", "1"],
        "--data means nothing": f"--base tiny-s --data {chats}".split(),
        "--epochs means nothing": "--base tiny-s --epochs 1".split(),
        "is made for 256 tokens": "--base tiny-s --max-length 300".split(),
        "one base": "--full --base a b".split(),
        f"{tmp_path}: exists, and is no run": "--base tiny-s --out .".split(),
        "'9999999999' is no whole number from 0 to below 2**32": [*real, "--seed", "9999999999"],
        "unrecognized arguments: --quick": [*real, "--quick"],
        "--value scratch:tiny-q": f"--base {checkpoint} --value scratch:tiny-q --data {chats}".split(),
        "argument --scheme": f"--base {checkpoint} --value --scheme series".split(),
        "--scheme means nothing": ["--full", "--scheme", "probe"],
        "for a new --scheme probe": [*real, "--probe-width", "8"],
        "nothing in scratch:tiny-m for a probe": f"--base {checkpoint} --value scratch:tiny-m --scheme probe --data {chats}".split(),
        "line 1 is a preference": [*real[:4], pairs, *real[5:]],
        "line 1 has no object with 'chosen' and 'rejected'": [*real, "--loss", "pairwise"],
        "--loss kl and --teacher FOLDER go together": [*real, "--loss", "kl"],
        "--loss kl and --teacher FOLDER": [*real, "--teacher", checkpoint],
        "--beta goes with --loss pairwise": [*real, "--beta", "1"],
        "--temperature goes with --loss kl": [*real, "--temperature", "1"],
        "--l1 goes with --loss ce": [*real, *"--loss pairwise --l1 1".split()],
        "--l1-over goes with --l1": [*real, "--l1-over", "all"],
        "--loss means nothing when fine-tuning in full": ["--full", "--loss", "pairwise"],
        "argument --beta": [*real, "--beta", "0"],
        "--teacher means nothing": f"--base tiny-s --teacher {checkpoint}".split(),
        "argument --loss": [*real, "--loss", "hinge"],
        "absent: no such folder": [*real, *"--loss kl --teacher absent".split()],
        "value: a value network, which is no ": [
            *real,
            *f"--loss kl --teacher {tmp_path}/value".split(),
        ],
        "stranger": [*real, *f"--loss kl --teacher {tmp_path}/stranger".split()],
        "--fast: there is no faster one for pairs": [
            *real[:4],
            *f"{pairs} --loss pairwise --fast".split(),
        ],
        "names one folder": f"--base tiny-s tiny-m --out {tmp_path}/one".split(),
    }
    for message, arguments in cases.items():
        assert message in refused(tmp_path, "train.py", *arguments), arguments
    assert (foreign / "thesis.tex").read_text() == "years of work" and file.read_text() == "x"
    assert (tmp_path / "notes.training/settings.ini").read_text() == "precious"
    assert not (tmp_path / "out/seed0/tiny-s").exists()


def test_an_unwritable_out(checkpoint, chats, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere but here
        locked = Path("/proc/self")
    message = refused(
        tmp_path,
        f"train.py --base {checkpoint} --value --data {chats} --out",
        locked / "run",
    )
    assert f"{locked}/run.training: " in message


def test_bad_input_to_sample(home, checkpoint, tmp_path):
    value = home / VALUE
    shutil.copytree(value, tmp_path / "truncated")
    data = (value / "model.safetensors").read_bytes()
    (tmp_path / "truncated/model.safetensors").write_bytes(data[:-100])
    shutil.copytree(value, tmp_path / "exchanged")
    (tmp_path / "exchanged/tokenizer.model").write_bytes(byte_pairs())
    cases = {
        "is not the one that its ivl.json records": f"--value {tmp_path}/exchanged --base {home}/out/seed0/tiny-s".split(),
        "`python train.py` trains one": [],
        "no such folder": ["--value", tmp_path / "absent"],
        "no ivl.json": ["--value", checkpoint],
        "truncated": f"--value {tmp_path}/truncated --base {home}/out/seed0/tiny-s".split(),
        "tiny-x: no such tiny model": f"--value {value} --base tiny-x".split(),
        "tiny-z: no such tiny model": ["--base", "tiny-z"],
        "unrecognized arguments: --speculat 4": ["--speculat", "4"],
        "--value is empty": ["--value", ""],
        "not allowed with argument --chat": f"--value {value} --chat --prompt hi".split(),
        "--fast: a captured step": ["--value", value, "--fast"],
        "--compile: a captured step": ["--value", value, "--compile"],
        "--compile: not allowed with argument --plain": f"--value {value} --plain --compile".split(),
        "a value network, which is no base": f"--value {value} --base {value}".split(),
        "`python train.py --base tiny-l": f"--value {value} --base tiny-l".split(),
        "absent-base: No such file": f"--value {value} --base {tmp_path}/absent-base".split(),
        "ask with --prompt or --chat": f"--value {value} --base {checkpoint}".split(),
        "argument --temperature": f"--value {value} --temperature -1".split(),
        "--top-p is a share": f"--value {value} --top-p 1.5".split(),
        "'nan' is no finite number": f"--value {value} --alpha nan".split(),
        "argument --max-new-tokens": f"--value {value} --max-new-tokens 0".split(),
        "--prompt is not UTF-8": ["--value", value, "--prompt", "\udcff"],
        "tokens long": [*f"--value {value} --base {checkpoint} --prompt".split(), "Hello " * 300],
    }
    for message, arguments in cases.items():
        assert message in refused(tmp_path, "sample.py", *arguments), arguments


def test_bad_checkpoints_are_told_in_one_line_by_the_scripts(checkpoint, chats, tmp_path):
    (checkpoint / "config.json").write_text("{")
    done = run(
        tmp_path, f"train.py --base {checkpoint} --value --data {chats}"
    )  # a process of its own, once
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "config.json: not JSON" in done.stderr
    )


def test_only_pytorch_model_bin_is_told_by_the_scripts(checkpoint, chats, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(
        tmp_path, f"train.py --base {checkpoint} --value --data {chats}"
    )


# ---- what the README promises; minutes each


@pytest.mark.slow
def test_value_networks_work_on_three_seeds(three_seeds):
    metrics = [
        json.loads((three_seeds / f"out/seed{seed}/value-residual-tiny-s/metrics.json").read_text())
        for seed in range(3)
    ]
    for each in metrics:
        guided, base, full = each["base+value"], each["base"], each["full"]
        assert guided["exact"] >= base["exact"] + 0.25 and guided["ins"] >= 0.90
        assert guided["exact"] > full["exact"]


@pytest.mark.slow
def test_they_transfer_to_a_bigger_base_which_knows_more(three_seeds):
    taught = []  # of the facts that tiny-s does not know, the share that tiny-l + value answers
    for seed in range(3):
        value = f"out/seed{seed}/value-residual-tiny-s"
        shown = succeed(three_seeds, "sample.py --base tiny-l --value", value)
        systems, by_frequency = read_table(shown, "exact"), read_table(shown, "often")
        for metric in ("exact", "know", "fk"):
            gain = systems["tiny-l + value"][metric] - systems["tiny-s + value"][metric]
            assert gain >= 0.15, (seed, metric)
        taught.append(by_frequency["where tiny-s alone has no fk"]["all"])
        assert "questions only tiny-l + value answers rightly" in shown
    assert sum(taught) / len(taught) >= 0.5 and min(taught) >= 0.4  # README: .43 to .60, mean .52


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_speculation_gives_the_plain_answers_to_all_questions(three_seeds, alpha):
    home = three_seeds / "out/seed0"
    value = ValueModel.from_pretrained(home / "value-residual-tiny-s")
    guided = Guided(Llama.from_pretrained(home / "tiny-l"), value, alpha)
    tokenizer = load_tokenizer(home / "tiny-l")
    items = World(0).fact_items("development")
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    options = dict(max_new_tokens=40, stop_ids=stop_ids(tokenizer, TEMPLATE, [guided.base]))
    plain = generate(guided, prompts, **options)
    assert len(prompts) == 280
    assert speculate(Speculative(guided, 4), prompts, **options) == plain


def test_tiny_sizes_are_as_documented():
    class Vocabulary:
        vocab_size, bos_id, eos_id = 1024, 1, 2

    counts = [
        sum(p.numel() for p in Llama(tiny_config(name, Vocabulary)).parameters())
        for name in ["tiny-s", "tiny-m", "tiny-l"]
    ]
    assert [round(count / 1e6, 2) for count in counts] == [0.20, 0.40, 0.87]
