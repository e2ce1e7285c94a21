"""What several test files use: running the scripts, and small tokenizers, networks and guided systems."""

import atexit
import base64
import contextlib
import functools
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tiny_world import World
from data.tokenizer import BYTE_OF, JsonTokenizer, TiktokenTokenizer
from ivl import Probe, SumDelta, ValueModel
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


def words(first="", *rest) -> list[str]:
    """The words of a command; its first string may hold several, as "train.py --steps 3" does."""
    begun = first.split() if isinstance(first, str) else [str(first)]
    return begun + list(map(str, rest))


@functools.cache
def forks() -> subprocess.Popen:
    """The process of tests/forks.py that belongs to this one, and ends with it."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/forks.py"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def run(
    folder: Path, *command, input="", ranks=1, seconds=1800.0, **environment
) -> subprocess.CompletedProcess:
    """Run `python COMMAND...` in a folder, forked from a process that has imported torch already.

    A script of ours is named from the root of the repository. With `ranks`, as so many processes as
    torchrun would start. After these seconds it is killed, and its status is -SIGALRM. What has to
    be a new Python (other signals, limits) is started by the test itself.
    """
    command = words(*command)
    if command[0].endswith(".py"):
        command[0] = str(ROOT / command[0])
    environments = [ENVIRONMENT | environment]
    if ranks > 1:
        environments = [environments[0] | rank for rank in meeting(ranks)]
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch) / name for name in ("stdin", "stdout", "stderr")]
        for file in streams:
            file.write_text(input if file.name == "stdin" else "", encoding="utf-8")
        order = {
            "command": command,
            "folder": str(folder),
            "streams": list(map(str, streams)),
            "seconds": seconds,
            "environments": environments,
        }
        print(json.dumps(order), file=forks().stdin, flush=True)
        status = int(forks().stdout.readline())
        said = [file.read_text(encoding="utf-8") for file in streams[1:]]
    return subprocess.CompletedProcess(command, status, *said)


def meeting(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells its processes by their environment, for each of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def succeed(*arguments, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(folder: Path, *command, input: str = "") -> tuple[int, str, str]:
    """Status, output and errors of a script of ours that is run in this process."""
    import sample
    import train
    import vocab_map
    from data import capitals, chat, gemma, smollm2, tiny_world
    from paper import continued, evaluate, mt_bench, own_answers

    before, argv, stdin = os.getcwd(), sys.argv, sys.stdin
    output, errors, status = io.StringIO(), io.StringIO(), 0
    os.chdir(folder)
    sys.argv, sys.stdin = words(*command), io.StringIO(input)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            run_cli(
                {
                    "train.py": train.main,
                    "sample.py": sample.main,
                    "vocab_map.py": vocab_map.main,
                    "continued.py": continued.main,
                    "own_answers.py": own_answers.main,
                    "chat.py": chat.main,
                    "tiny_world.py": tiny_world.main,
                    "gemma.py": gemma.main,
                    "smollm2.py": smollm2.main,
                    "capitals.py": capitals.main,
                    "mt_bench.py": mt_bench.main,
                    "evaluate.py": evaluate.main,
                }[sys.argv[0]]
            )
    except SystemExit as ended:
        status = ended.code
    finally:
        os.chdir(before)
        sys.argv, sys.stdin = argv, stdin
    return status, output.getvalue(), errors.getvalue()


def worked(*arguments, **options) -> str:
    """The output of a script of ours that is run in this process; it must succeed."""
    status, output, errors = inside(*arguments, **options)
    assert status == 0, errors
    return output


def refused(folder: Path, *command) -> str:
    """The one line that a user's mistake gets, with status 2; a traceback, or anything more, fails the test."""
    status, _, errors = inside(folder, *command)
    script = words(*command)[0]
    assert status == 2 and errors.count("\n") == 1 and errors.startswith(f"{script}: "), errors
    return errors.strip()


def python(*command, **environment) -> str:
    """Output of `python COMMAND...` in the root of the repository; it must succeed."""
    return succeed(ROOT, *command, **environment)


def fresh(folder: Path, *command, env=None, **options) -> subprocess.CompletedProcess:
    """Run `python COMMAND...` as a new Python, for what forks cannot show.

    Its options are subprocess.run's; `env` is added to what is there.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {})
    command = [sys.executable, *words(*command)]
    return subprocess.run(command, cwd=folder, env=env, **streams | options)


def interpreted(*command) -> str:
    """Output of a new Python whose Triton interprets kernels: that is fixed when it is imported."""
    done = fresh(ROOT, *command, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def together(folder: Path, *command, **options) -> subprocess.CompletedProcess:
    """Run `python COMMAND...` in two processes."""
    return run(folder, *command, ranks=2, PYTHONPATH=str(ROOT), **options)


# ---- what the fixture `home` has trained

SHORT = ["--steps", "60", "--batch-size", "16"]
VALUE = Path("out/seed0/value-residual-tiny-s")


def ask(home: Path, *arguments, **options) -> str:
    command = f"sample.py --value {VALUE} --max-new-tokens 12"
    return worked(home, command, *words(*arguments), **options)


def shorten_the_exam(patch) -> None:
    """The tiny world's examination with fewer questions."""
    facts, sums = World.fact_items, World.sum_items
    patch.setattr(
        World, "fact_items", lambda world, split, count=None, times=1: facts(world, split, 12)
    )
    patch.setattr(World, "sum_items", lambda world, split, times=1: sums(world, split)[:4])


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
    if plug == "proxy":
        return Guided(small(**base_changes), proxy())
    return Guided(small(**base_changes), value_network(plug))


def proxy() -> SumDelta:
    """Proxy tuning by two small networks of different sizes."""
    return SumDelta(
        [small(num_hidden_layers=1), small(num_hidden_layers=1, intermediate_size=64)], [1.0, -1.0]
    )


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
