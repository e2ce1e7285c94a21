"""paper/continued.py: new people, new tokens, and a base that takes the same value network all the same."""

import random
import re
import shutil
from itertools import islice

import pytest
import torch

from data.tiny_world import TINY_SIZES, World
from data.tokenizer import SentencePieceTokenizer, load_tokenizer
from model import Llama
from paper.continued import MarkedTokenizer, continued_documents, widen
from tests.helpers import VALUE, ask, byte_pairs, refused, small, weights, worked

SHORT = "--steps 3 --batch-size 4".split()
CONTINUED = "out/seed0/tiny-s-continued"


def test_half_of_the_text_is_about_new_people_and_its_tokenizer_extends_the_old_one():
    world = World(0)
    tokenizer = SentencePieceTokenizer(world.train_tokenizer())
    documents = list(islice(continued_documents(world, random.Random(0)), 4000))
    new = re.compile("|".join(person.name for person in world.new_people))
    about_new = sum(bool(new.search(document)) for document in documents)
    assert 0.3 < about_new / 4000 < 0.5  # the rest: old people, sums, hills
    marked = [document for document in documents if document.startswith("<doc")]
    assert 300 < len(marked) < 500
    wider = MarkedTokenizer(tokenizer.model)
    assert wider.vocab_size == tokenizer.vocab_size + 16
    assert wider.fingerprint(tokenizer.vocab_size) == tokenizer.fingerprint(tokenizer.vocab_size)
    for document in documents[:300]:
        ids = wider.encode(document)
        assert wider.decode(ids) == document
        if document in marked:
            assert sum(id >= tokenizer.vocab_size for id in ids) == 1
        else:
            assert ids == tokenizer.encode(document)
    assert [len(world.fact_items(f"new {split}")) for split in ("development", "evaluation")] == [
        80,
        80,
    ]


def test_widening_leaves_the_old_logits_alone():
    base, tokens = small(tie_word_embeddings=True), torch.randint(50, (2, 6))
    wider = widen(base, 16)
    assert wider(tokens).shape == (2, 6, 66)
    torch.testing.assert_close(wider(tokens)[..., :50], base(tokens))
    torch.testing.assert_close(wider.lm_head.weight[50], base.lm_head.weight.mean(0))


@pytest.fixture(scope="module")
def continued_home(home, tmp_path_factory):
    """What `home` has, and its tiny-s pretrained a little further."""
    folder = tmp_path_factory.mktemp("continued")
    shutil.copytree(home / "out", folder / "out")
    output = worked(folder, "continued.py --base tiny-s", *SHORT)
    assert "pretraining tiny-s-continued" in output and f"saved {CONTINUED}" in output
    return folder


def test_a_base_pretrained_further_has_a_bigger_vocabulary_and_takes_the_same_value_network(
    continued_home,
):
    folder = continued_home / CONTINUED
    assert (
        Llama.from_pretrained(folder).config.vocab_size == load_tokenizer(folder).vocab_size == 1040
    )
    assert "tiny-s-continued" in ask(continued_home, f"--base {CONTINUED} --prompt", "Greet Mira.")
    assert "exact" in ask(continued_home, f"--base {CONTINUED}")
    worked(continued_home, f"train.py --base {CONTINUED} --full", *SHORT)
    assert (continued_home / "out/seed0/full-tiny-s-continued/train.json").is_file()


def test_it_begins_at_the_base_and_not_at_random_weights(continued_home):
    before, after = (
        weights(continued_home / "out/seed0/tiny-s"),
        weights(continued_home / CONTINUED),
    )
    for name in before:
        old = before[name]
        assert (after[name][: len(old)] - old).abs().max() < 0.01, name  # three steps do not go far


def test_a_base_that_is_not_there_is_pretrained_first_and_what_is_finished_is_left(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(TINY_SIZES, "tiny-s", ((64, 1, 4, 2, 64), 4096, 5e-3))
    output = worked(tmp_path, "continued.py --base tiny-s --seed 3", *SHORT)
    assert "pretraining tiny-s," in output and "saved out/seed3/tiny-s-continued" in output
    output = worked(tmp_path, "continued.py --base tiny-s --seed 3 --resume", *SHORT)
    assert "out/seed3/tiny-s-continued: finished already" in output and "step" not in output


def test_what_cannot_be_continued(continued_home, checkpoint, tmp_path):
    shutil.copy(continued_home / "out/seed0/tiny-s/train.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(byte_pairs())
    for message, arguments in {
        "continued already": ["--base", CONTINUED],
        "a value network, which is no base": ["--base", VALUE],
        "no tiny base": ["--base", checkpoint],
        "its tokenizer is byte-level": ["--base", tmp_path],
        "no such tiny model": ["--base", "tiny-x"],
        "a run is there already, finished": ["--base", "tiny-s", *SHORT],
        "with other settings": ["--base", "tiny-s", "--resume"],
        "positive whole number": ["--steps", 0],
    }.items():
        assert message in refused(continued_home, "continued.py", *arguments)
