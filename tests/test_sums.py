"""Sums of value networks: one class adds them, sample.py takes several, and each token has one that decided."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from beyond.attribution import attribute, count_decisions
from beyond.speculation import Speculative, speculate
from ivl import SumDelta, ValueModel, combine
from sample import Guided, generate
from tests.helpers import VALUE, byte_pairs, proxy, random_prompts, refused, small, worked

SECOND = Path("out/seed0/second")


def networks():
    """Two value networks of one family, the second with fewer tokens."""
    return [small(num_hidden_layers=1), small(num_hidden_layers=1, vocab_size=48)]


@torch.no_grad()
def test_a_sum_is_the_weighted_sum_over_the_shared_vocabulary():
    a, b = networks()
    total, tokens = SumDelta([a, b], [1.0, 0.5]), torch.randint(48, (2, 7))
    assert total.vocab_size == 48
    assert torch.equal(total(tokens), a(tokens)[..., :48] + 0.5 * b(tokens))
    assert torch.equal(total.parts[1], 0.5 * b(tokens))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_one_with_weight_1_is_that_network_bit_for_bit(dtype):
    a = networks()[0].to(dtype)
    base, tokens = small().to(dtype), torch.randint(50, (2, 7))
    one, alone = Guided(base, SumDelta([a], [1.0])), Guided(base, ValueModel(a))
    assert torch.equal(one.logits(tokens), alone.logits(tokens))
    options = dict(max_new_tokens=12, stop_ids={2}, temperature=1.0, seed=3)
    prompts = random_prompts(20)
    assert generate(one, prompts, **options) == generate(alone, prompts, **options)


@torch.no_grad()
def test_proxy_tuning_is_what_it_was_bit_for_bit():
    total, tokens = proxy(), torch.randint(50, (2, 7))
    expert, anti_expert = total.llamas
    z_base = torch.randn(2, 7, 53)
    assert torch.equal(
        combine(z_base, total(tokens), 0.7),
        combine(z_base, expert(tokens) - anti_expert(tokens), 0.7),
    )


def test_a_sum_drafts_and_says_the_same():
    guided = Guided(small(), SumDelta(networks(), [1.0, 0.5]))
    options = dict(max_new_tokens=16, stop_ids={2})
    prompts = [[min(token, 47) for token in prompt] for prompt in random_prompts(20)]
    said = speculate(Speculative(guided, 3), prompts, **options)
    assert said == generate(guided, prompts, **options)


def test_who_decided_is_who_pushed_most_over_the_base():
    z_base = torch.tensor([2.0, 0.0, 0.0, 0.0])
    parts = {"forms": torch.tensor([0.0, 3.0, 0.0]), "sums": torch.tensor([1.0, 1.5, 0.0])}
    z_delta = parts["forms"] + parts["sums"]
    found = attribute(z_base, z_delta, token=1, parts=parts)
    assert found.decided == "value" and found.by == "forms"
    assert found.pushes == pytest.approx({"forms": 3.0, "sums": 0.5})
    assert found.classes == "value n0"
    assert attribute(z_base, z_delta, token=0, parts=parts).by == ""  # the base's own
    said = count_decisions([found, found], "the value networks")
    assert said.endswith("the value networks overruled it at 2 (forms at 2)")
    # a network with fewer tokens than the base pushes none of those
    wide = attribute(torch.zeros(4).index_fill(0, torch.tensor(3), 1.0), z_delta, 1, parts=parts)
    assert wide.pushes == pytest.approx({"forms": 3.0, "sums": 1.5})


# ---- commands


@pytest.fixture
def two(home, tmp_path) -> Path:
    """A folder with the value network of `home` under two names."""
    shutil.copytree(home / "out", tmp_path / "out")
    shutil.copytree(tmp_path / VALUE, tmp_path / SECOND)
    return tmp_path


def test_sample_adds_value_networks(two):
    asked = "--max-new-tokens 12 --prompt"
    one = worked(two, "sample.py --value", VALUE, *asked.split(), "Greet Mira.")
    both = worked(
        two, "sample.py --value", VALUE, SECOND, *f"--alpha 1 0 {asked}".split(), "Greet Mira."
    )
    assert f"value networks 1 x {VALUE} + 0 x {SECOND}" in both
    assert one.splitlines()[-1].split("value", 1)[1].strip() == (
        both.splitlines()[-1].split("value + value", 1)[1].strip()
    )
    explained = worked(
        two, "sample.py --explain --value", VALUE, SECOND, *asked.split(), "Greet Mira."
    )
    assert f"({VALUE.name} at " in explained or f"{SECOND.name} at " in explained
    page = two / "page.html"
    worked(two, "sample.py --max-new-tokens 12 --explain --page page.html --value", VALUE, SECOND)
    assert f'<span class="key value n0">{VALUE.name}</span>' in page.read_text()


def change(folder: Path, **changes) -> None:
    file = folder / "ivl.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_added_is_refused_in_one_line(two):
    both = f"sample.py --prompt Hello --value {VALUE} {SECOND}"
    assert "3 weights, and 2 to weigh" in refused(two, f"{both} --alpha 1 1 1")
    assert "2 weights, and 1 to weigh" in refused(two, f"sample.py --value {VALUE} --alpha 1 1")
    assert "no ivl.json" in refused(two, f"sample.py --value {VALUE} out/seed0/tiny-s")
    for scheme in ("cascade", "cascade+"):
        change(two / SECOND, scheme=scheme)
        assert f"{SECOND} is a {scheme}" in refused(two, both)
    change(two / SECOND, scheme="probe", probe_width=16)
    assert f"{SECOND} is a probe" in refused(two, both)
    change(two / SECOND, scheme="residual", template="chatml")
    assert "cannot read the same prompt" in refused(two, both)
    change(two / SECOND, template="llama-2", system="Be brief.")
    assert "different system prompts" in refused(two, both)
    (two / SECOND / "tokenizer.model").write_bytes(byte_pairs())
    assert "its tokenizer is not the one" in refused(two, both)


def test_value_networks_of_two_families_are_not_added(two):
    from data.tokenizer import describe_tokenizer, load_tokenizer

    (two / SECOND / "tokenizer.model").write_bytes(byte_pairs())
    change(two / SECOND, tokenizer=describe_tokenizer(load_tokenizer(two / SECOND)), system="")
    said = refused(two, f"sample.py --prompt Hello --value {VALUE} {SECOND}")
    assert "have unrelated vocabularies" in said and "cannot be added" in said
