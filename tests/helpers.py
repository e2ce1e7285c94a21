"""What several test files use: running the scripts, and small tokenizers, networks and guided systems."""

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import BYTE_OF, JsonTokenizer, TiktokenTokenizer
from ivl import Probe, ProxyDelta, ValueModel
from model import Llama, LlamaConfig
from run.cli import run_cli
from run.folder import Run
from sample import Guided

# ---- where things are

ROOT = Path(__file__).parents[1]
PAPER = ROOT.parent / "shared" / "paper.txt"
SHARED = ROOT.parent / "shared" / "data"
REAL = {"llama-2": SHARED / "llama2-tokenizer.model", "llama-3": SHARED / "llama3-tokenizer.model"}

needs_real = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real tokenizers are not beside the repository"
)

# ---- running scripts

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments, input: str | None = None) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` in a folder of its own."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, ROOT / script, *rest],
        cwd=folder,
        env=ENVIRONMENT,
        input=input,
        capture_output=True,
        text=True,
        timeout=900,
    )


def succeed(*arguments, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(folder: Path, script: str, *arguments, input: str = "") -> tuple[int, str, str]:
    """Status, output and errors of a script run in this process, since importing torch is most of what it does."""
    import sample
    import train
    import vocab_map
    from beyond import attribution
    from data import capitals, chat, gemma, smollm2, tiny_world
    from paper import continued, evaluate, mt_bench

    before, argv, stdin = os.getcwd(), sys.argv, sys.stdin
    output, errors, status = io.StringIO(), io.StringIO(), 0
    os.chdir(folder)
    sys.argv, sys.stdin = [script, *map(str, arguments)], io.StringIO(input)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            run_cli(
                {
                    "train.py": train.main,
                    "sample.py": sample.main,
                    "vocab_map.py": vocab_map.main,
                    "attribution.py": attribution.main,
                    "continued.py": continued.main,
                    "chat.py": chat.main,
                    "tiny_world.py": tiny_world.main,
                    "gemma.py": gemma.main,
                    "smollm2.py": smollm2.main,
                    "capitals.py": capitals.main,
                    "mt_bench.py": mt_bench.main,
                    "evaluate.py": evaluate.main,
                }[script]
            )
    except SystemExit as ended:
        status = ended.code
    finally:
        os.chdir(before)
        sys.argv, sys.stdin = argv, stdin
    return status, output.getvalue(), errors.getvalue()


def refused(folder: Path, script: str, *arguments) -> str:
    """The one line that a user's mistake gets, with status 2; a traceback, or anything more, fails the test."""
    status, _, errors = inside(folder, script, *arguments)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith(f"{script}: "), errors
    return errors.strip()


def python(*arguments, timeout: int = 600, **environment) -> str:
    """Output of `python ...` in the repository's folder; it must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def together(folder: Path, *arguments, input: str | None = None) -> subprocess.CompletedProcess:
    """Run `python ...` in two processes."""
    return subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        input=input,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )


# ---- what the fixture `home` has trained

SHORT = ["--steps", "60", "--batch-size", "16"]
VALUE = Path("out/seed0/value-residual-tiny-s")


def ask(home: Path, *arguments, **options) -> str:
    status, output, errors = inside(
        home, "sample.py", "--value", VALUE, "--max-new-tokens", "12", *arguments, **options
    )
    assert status == 0, errors
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def stop_at(folder: Path, step: int, *command) -> None:
    """Run train.py in this process, stopped behind a step as by Ctrl-C; it must have a checkpoint by then."""

    def report(self, done: int, *rest):
        if done + 1 == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", report)
        assert inside(folder, *command)[0] == 130
    assert list(folder.glob("*.training/step-*/state.json"))


def in_two_shards(folder: Path) -> None:
    """Turn a checkpoint's model.safetensors into two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in weight_map if weight_map[name] == file}, folder / file
        )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def assert_identical(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# ---- tokenizers


def byte_pairs(*merges: bytes) -> bytes:
    """A small tokenizer.model in Llama-3's format: all bytes, then these merges."""
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def json_byte_pairs(config: dict) -> JsonTokenizer:
    """All bytes and "he", "ll", "hell" as a byte-level tokenizer.json, and 256 special tokens from 259 on; config says which begin and end."""
    lines, character = (
        TiktokenTokenizer(byte_pairs(b"he", b"ll", b"hell")),
        {byte: name for name, byte in BYTE_OF.items()},
    )
    pieces = ["".join(character[byte] for byte in lines.token_bytes(id)) for id in range(259)]
    raw = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 259 + n,
                "content": f"<|{n}|>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for n in range(256)
        ],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": ["h e", "l l", "he ll"],
        },
    }
    return JsonTokenizer(json.dumps(raw).encode(), config)


# ---- networks


def small(**changes) -> Llama:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Llama(LlamaConfig(**settings | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def value_network(scheme: str) -> ValueModel:
    """A small value network with random weights, V = 50."""
    if scheme != "probe":
        return ValueModel(small(num_hidden_layers=1), {"scheme": scheme})
    torch.manual_seed(3)
    probe = Probe(50, 16)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return ValueModel(probe, {"scheme": scheme})


# ---- guided systems, and what they say


def plugged(plug: str, **base_changes) -> Guided:
    """A base guided by each thing that can guide it."""
    proxy = ProxyDelta(small(num_hidden_layers=1), small(num_hidden_layers=1, intermediate_size=64))
    return Guided(small(**base_changes), proxy if plug == "proxy" else value_network(plug))


def pair(**value_changes) -> Guided:
    return Guided(small(), ValueModel(small(num_hidden_layers=1, **value_changes)))


def random_prompts(count: int, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 50, (length,), generator=generator).tolist() for length in lengths]


def assert_same_or_tied(guided: Guided, prompts, ours, theirs) -> None:
    """Equal token for token; a first difference is forgiven where the top two logits are within 1e-4, once in 200."""
    ties = 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a != b:
            same = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
            top = guided.logits(torch.tensor([prompt + a[:same]]))[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4, (prompt, a, b)
            ties += 1
    print(f"{ties} near-ties in {len(prompts)}")
    assert ties <= max(1, len(prompts) // 200)
