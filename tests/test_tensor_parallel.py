"""A base divided between two processes: what it says, what it takes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from bench.decode import SHAPES
from data.checkpoint import HEAD
from data.errors import UsageError
from model import Llama, read_config
from run.tensor_parallel import check_divisible, load_divided, read_slice
from tests.helpers import (
    ROOT,
    VALUE,
    in_two_shards,
    inside,
    python,
    random_prompts,
    small,
    succeed,
    together,
    weights,
    worked,
)

KINDS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "odd": dict(vocab_size=51),
    "odd-tied": dict(vocab_size=51, tie_word_embeddings=True, head_dim=12),
    "qwen2": dict(model_type="qwen2"),
    "qwen3-bias": dict(model_type="qwen3", head_dim=12, attention_bias=True),
}


def saved(folder: Path, name: str) -> Path:
    small(**KINDS[name]).save_pretrained(folder / name)
    return folder / name


@pytest.fixture
def world_of_one(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- the same tokens


def test_two_processes_say_what_one_says(tmp_path):
    """20 prompts, in fp32; an odd vocabulary, tied embeddings, two shards; biases and norms on heads."""
    in_two_shards(saved(tmp_path, "odd-tied"))
    folders = [tmp_path / "odd-tied", saved(tmp_path, "qwen3-bias")]
    done = together(tmp_path, "-m tests.several_decoders few", *folders)
    assert done.returncode == 0, done.stderr
    assert "same: odd-tied, tied" in done.stdout and "same: qwen3-bias, untied" in done.stdout
    assert done.stdout.count("cascade+: logits") == 2


@pytest.mark.slow
def test_two_processes_say_what_one_says_with_every_plug(tmp_path):
    folders = [saved(tmp_path, name) for name in KINDS]
    done = together(tmp_path, "-m tests.several_decoders tokens", *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same: ") == done.stdout.count("probe: logits") == len(KINDS)


@pytest.mark.slow
def test_the_commands_say_the_same_in_two_processes(home, tmp_path):
    """Questions, the tiny world's table, speculation and attribution; a bigger base, and one with another tokenizer."""
    shutil.copytree(home / "out", tmp_path / "out")
    succeed(tmp_path, "train.py --base tiny-m tiny-b-s --steps 20 --batch-size 8")
    asked = ["--prompt", "Hello there", "Who are you?", "--max-new-tokens", 12]
    commands = [
        ["--base", "tiny-m"],
        ["--base", "tiny-m", *asked, "--temperature", 1],
        ["--base", "tiny-m", *asked, "--explain"],
        ["--base", "tiny-m", *asked, "--speculate", 3],
        ["--base", "tiny-b-s", *asked, "--temperature", 1],
    ]
    for command in commands:
        command = ["--value", VALUE, *command]
        done = together(tmp_path, ROOT / "sample.py", *command)
        assert done.returncode == 0, done.stderr
        status, output, _ = inside(tmp_path, "sample.py", *command)
        assert status == 0 and said(output) == said(done.stdout), command


def said(output: str) -> list[str]:
    """What was printed, less its speed."""
    return [
        line
        for line in output.splitlines()
        if not line.strip().startswith(("milliseconds", "speed-up"))
    ]


@pytest.mark.slow
def test_a_chat_is_typed_in_the_first_process(home):
    typed = "Hello\nWho are you?\n\nBye\n"
    command = f"--value {VALUE} --chat --max-new-tokens 12".split()
    done = together(home, ROOT / "sample.py", *command, input=typed)
    assert done.returncode == 0, done.stderr
    output = worked(home, "sample.py", *command, input=typed)
    assert output == done.stdout and done.stdout.count("you> ") == 5
    assert done.stderr.count("tokens/s") == 3


# ---- what it takes


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a process's own peak is asked of Linux"
)
def test_each_of_two_processes_needs_half_the_memory(tmp_path):
    """Parameters, and what the process grows by while it loads them and reads; at 110M shapes."""
    torch.manual_seed(0)
    Llama(SHAPES["110M"]).save_pretrained(tmp_path / "110M")
    whole = python(f"-m tests.several_decoders memory {tmp_path}/110M")
    done = together(tmp_path, f"-m tests.several_decoders memory {tmp_path}/110M")
    assert done.returncode == 0, done.stderr
    held, _, peak = numbers(whole)
    held_of_two, _, peak_of_two = numbers(done.stdout)
    print(f"parameters {held_of_two / held:.3f}, peak {peak_of_two / peak:.3f}")
    assert held_of_two < 0.51 * held and peak_of_two < 0.6 * peak
    assert peak > 0.9 * held  # the whole one is read to its end


def numbers(output: str) -> list[int]:
    return [int(number) for number in output.split("bytes ")[1].split()]


def test_every_row_of_the_vocabulary_is_in_one_process_and_a_row_of_zeros_in_each(tmp_path):
    head = weights(saved(tmp_path, "untied"))[HEAD]  # (50, D)
    for count, rows in ((2, 25), (3, 17), (8, 7), (40, 2)):  # of 40, the last 15 have none
        with safe_open(tmp_path / "untied" / "model.safetensors", framework="pt") as file:
            parts = [
                read_slice(file.get_slice(HEAD), HEAD, (rows + 1, head.shape[1]), rank, None, "cpu")
                for rank in range(count)
            ]
        assert torch.equal(torch.cat([part[:-1] for part in parts])[:50], head)
        assert not any(part[-1].any() for part in parts)


# ---- what is refused


@pytest.mark.parametrize(
    "changes, count, name",
    [
        (dict(num_attention_heads=6, num_key_value_heads=6), 4, "num_attention_heads, 6"),
        ({}, 4, "num_key_value_heads, 2"),
        (dict(intermediate_size=49), 2, "intermediate_size, 49"),
    ],
)
def test_heads_that_do_not_divide_are_refused(changes, count, name, tmp_path):
    small(**{"hidden_size": 48} | changes).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=f"its {name}, cannot be divided between {count} processes"
    ):
        check_divisible(tmp_path, read_config(tmp_path), count)


def test_what_the_model_refuses_is_refused_of_slices_too(world_of_one, tmp_path):
    folder = saved(tmp_path, "untied")
    tokens = torch.tensor([random_prompts(1)[0]])
    assert torch.equal(
        load_divided(folder, None, "cpu")(tokens), Llama.from_pretrained(folder)(tokens)
    )
    for field, value in (
        ("intermediate_size", 40),
        ("vocab_size", 48),
        ("num_hidden_layers", 3),
        ("tie_word_embeddings", True),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(UsageError) as ours:
            load_divided(folder, None, "cpu")
        with pytest.raises(UsageError) as models:
            Llama.from_pretrained(folder)
        assert str(ours.value) == str(models.value)
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_told_once(home, checkpoint, tmp_path):
    asked = f"--value {home}/{VALUE} --prompt Hello".split()
    for command, message in (
        (["--value", VALUE, "--web"], "--web is a page of one process"),
        ([*asked, "--fast"], "2 share this base"),
        ([*asked, "--base", checkpoint], "num_key_value_heads, 1, cannot be divided between 2"),
    ):
        done = together(home, ROOT / "sample.py", *command)
        assert (
            done.returncode and done.stderr.count("sample.py: ") == 1 and message in done.stderr
        ), done.stderr
