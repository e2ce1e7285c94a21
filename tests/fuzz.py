"""Random damage to every file that the product reads, and random flags: is the promise kept?

    python -m tests.fuzz                          # 1000 mutations of seed 0, counted by file
    python -m tests.fuzz --seed 1 --only flags    # some
The promise: an answer, or one clear line on stderr and status 2; no traceback, no hang, and no file
lost, changed or left behind. Each mutation runs in a process forked from one that has imported
everything, in a fresh copy of a small house.
"""

import argparse
import gc
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

import sample
import train
import vocab_map
from data import chat
from data.tiny_world import World
from data.tokenizer import describe_tokenizer, load_tokenizer
from ivl import ValueModel
from run.cli import run_cli
from tests.helpers import byte_pairs, in_two_shards, small, stop_at, worked

LONGEST = 20  # seconds of its own time that a command may take, however busy the machine is
WAITING = 600  # seconds after which one that waits for something is given up
MAINS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "vocab_map.py": vocab_map.main,
    "chat.py": chat.main,
}
TRAIN = (
    "train.py --base base --value --data chats.jsonl --steps 6 --batch-size 2 "
    "--max-length 64 --out run"
).split()
SAMPLE = [*"sample.py --value value --prompt".split(), "Greet Mira.", "--max-new-tokens", "2"]
EXPERT = "sample.py --expert expert --base base --prompt Hi --max-new-tokens 2".split()
MAP = (
    "vocab_map.py --base-tokenizer base --value-tokenizer bytes --how paper "
    "--texts texts.txt --out new.map"
).split()
FAMILIES = {  # a file, and commands that read it
    "base/config.json": [TRAIN, SAMPLE],
    "base/generation_config.json": [SAMPLE],
    "base/model.safetensors": [TRAIN, SAMPLE],
    "shards/model.safetensors.index.json": [[*SAMPLE, "--base", "shards"]],
    "shards/model-00001-of-00002.safetensors": [[*SAMPLE, "--base", "shards"]],
    "base/tokenizer.model": [SAMPLE, TRAIN],
    "bytes/tokenizer.model": [MAP],
    "value/ivl.json": [SAMPLE, [*TRAIN[:4], "value", *TRAIN[4:]]],
    "value/model.safetensors": [SAMPLE, [*SAMPLE, "--explain"]],
    "value/tokenizer.model": [SAMPLE],
    "probe/ivl.json": [["sample.py", "--value", "probe", *SAMPLE[3:]]],
    "chats.jsonl": [TRAIN, "chat.py chats.jsonl --tokenizer base".split()],
    "chats.json": ["chat.py chats.json --tokenizer bytes".split()],
    "chats.jsonl.gz": ["chat.py chats.jsonl.gz --tokenizer base --template llama-2".split()],
    "forms.jsonl": ["chat.py forms.jsonl --tokenizer base".split()],
    "pairs.jsonl": ["chat.py pairs.jsonl --tokenizer base --pairs".split()],
    "lora/adapter_config.json": [[*SAMPLE, "--base", "lora"]],
    "lora/adapter_model.safetensors": [[*SAMPLE, "--base", "lora"]],
    "texts.txt": [MAP],
    "texts.jsonl": [[*MAP[:-3], "texts.jsonl", "--eval", "texts.jsonl", *MAP[-2:]]],
    "map.safetensors": [[*SAMPLE, "--vocab-map", "map.safetensors"]],
    "expert/train.json": [EXPERT],
    "expert/tokenizer_config.json": [EXPERT],
    "stopped.training/settings.json": [],
    "stopped.training/step-4/state.json": [],
    "stopped.training/step-4/state.safetensors": [],
}
RESUME = [*TRAIN[:-1], "stopped", "--resume"]


def build(folder: Path) -> None:
    tokenizer = World(0).train_tokenizer()
    network = small(
        vocab_size=1024, num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=128
    )
    for name, model in (
        ("base", tokenizer),
        ("bytes", byte_pairs(b"he", b"th")),
        ("value", tokenizer),
        ("expert", tokenizer),
        ("shards", tokenizer),
    ):
        network.save_pretrained(folder / name)
        (folder / name / "tokenizer.model").write_bytes(model)
    info = {
        "scheme": "residual",
        "l1": 0.0,
        "template": "llama-2",
        "bases": ["base"],
        "data": "x",
        "seed": 0,
        "system": "Be brief.",
        "tokenizer": describe_tokenizer(load_tokenizer(folder / "base")),
    }
    ValueModel(network, info).save_pretrained(folder / "value")
    (folder / "base/generation_config.json").write_text(
        '{"eos_token_id": [2, 5], "temperature": 0.6}'
    )
    (folder / "expert/train.json").write_text(
        json.dumps({"bases": ["base"], "template": "llama-2", "data": "chats"})
    )
    (folder / "expert/tokenizer_config.json").write_text(
        json.dumps({"chat_template": "[INST]", "bos_token": "<s>"})
    )
    in_two_shards(folder / "shards")
    lines = "".join(
        json.dumps(
            {
                "id": f"c_{n}",
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": f"Greet {n}. 👍"},
                    {"from": "gpt", "value": f"Hello {n}!"},
                ],
            }
        )
        + "\n"
        for n in range(20)
    )
    (folder / "chats.jsonl").write_text(lines)
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "chats.json").write_text(
        json.dumps(
            [
                {"instruction": "q", "input": "i", "output": "a"},
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": "q"}]},
                        {"role": "assistant", "content": "a", "weight": 1},
                    ]
                },
            ]
            * 3
        )
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parts = [{"role": turn["role"], "parts": [{"text": turn["content"]}]} for turn in turns]
    for name, records in (
        (
            "forms.jsonl",
            [
                {"messages": None, "conversation": [{"input": "q", "output": "a"}], "id": "c_0"},
                {"messages": json.dumps(turns), "id": "c_1"},
                {"systemInstruction": parts[0], "contents": parts},
                {"data": ["q", "a", "r", "b"]},
                {"prompt": turns[:1], "completion": turns[1:]},
                {"text": "\n\nHuman: q\n\nAssistant: a"},
            ],
        ),
        (
            "pairs.jsonl",
            [
                {"context": turns[:1], "response1": "a", "response2": "b", "overall_preference": 1},
                {
                    "context": turns[:1],
                    "completions": [{"rank": n, "completion": turns[1:]} for n in range(2)],
                },
                {"conversation_a": turns, "conversation_b": turns * 2, "winner": "model_a"},
                {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
            ],
        ),
    ):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records * 3))
    (folder / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    outputs, inputs = network.model.layers[0].mlp.up_proj.weight.shape
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{prefix}A.weight": torch.ones(2, inputs), f"{prefix}B.weight": torch.ones(outputs, 2)},
        folder / "lora/adapter_model.safetensors",
    )
    (folder / "texts.txt").write_text("the hell\nthey live in\n\n\nhello  world\n")
    (folder / "texts.jsonl").write_text(
        '{"text": "hello there"}\n{"question": "q", "answer": "the"}\n'
    )
    for command in (
        [*MAP[:-1], "map.safetensors", "--value-tokenizer", "base"],
        ["train.py", *TRAIN[1:-1], *"probe --scheme probe --probe-width 4".split()],
    ):
        worked(folder, *command)
    stop_at(folder, 5, *TRAIN[:-1], "stopped", "--save-every", "4")


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "llama-2",
    "\ud800",
    "a\0b",
    "../..",
    "/dev/zero",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [2, 2],
    {"a": 1},
    [0] * 5000,
]


def damage_json(rng: random.Random, value):
    """One value somewhere in it replaced, taken out, doubled or wrapped."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key, value = (
            rng.choice(list(value) if isinstance(value, dict) else range(len(value))),
            value.copy(),
        )
        value[key] = damage_json(rng, value[key])
        if rng.random() < 0.15:
            del value[key]
        return value
    return rng.choice([*ODD, [value], {"x": value}])


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 8, 100])
    return rng.choice(
        [
            content[:at],
            content[at:],
            content[:at] + rng.randbytes(length) + content[at + length :],
            content[:at] + content[at + length :],
            content[:at] + rng.randbytes(length) + content[at:],
            content + content,
            b"",
            b"\0" * 100,
            rng.randbytes(300),
            b"version https://git-lfs.github.com/spec/v1\n",
            content.replace(b"\n", b""),
            content.replace(b"0", b"9" * 5000, 1),
            b"\xff\xfe" + content,
            content.upper(),
            b"[" * 3_000 + content,
        ]
    )


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Its header, or numbers in it."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.3 and len(data) > 400:
        at = rng.randrange(len(data) // 4 - 50) * 4
        return (
            content[: 8 + size]
            + data[:at]
            + rng.choice([b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]) * 40
            + data[at + 160 :]
        )
    name = rng.choice(list(header))
    renamed = {
        rng.choice(["_orig_mod." + key, key + "x"]) if key == name else key: value
        for key, value in header.items()
    }
    changed = damage_json(rng, header) if rng.random() < 0.5 else renamed
    text = json.dumps(changed).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def damage_file(rng: random.Random, file: Path) -> None:
    content, kind = file.read_bytes(), rng.random()
    if kind < 0.1:  # another thing in its place
        file.unlink()
        rng.choice(
            [
                lambda: None,
                file.mkdir,
                lambda: os.mkfifo(file),
                lambda: file.write_bytes(b"the hell\n"),
                *[lambda to=to: file.symlink_to(to) for to in ("/dev/zero", file.name, "nothing")],
            ]
        )()
    elif kind < 0.4 or file.suffix not in (".json", ".jsonl", ".safetensors"):
        file.write_bytes(damage_bytes(rng, content))
    elif file.suffix == ".safetensors":
        file.write_bytes(damage_safetensors(rng, content))
    elif file.suffix == ".json":
        file.write_text(json.dumps(damage_json(rng, json.loads(content))))
    else:
        records = [json.loads(line) for line in content.splitlines()]
        records[rng.randrange(len(records))] = damage_json(rng, rng.choice(records))
        file.write_text("".join(json.dumps(record) + "\n" for record in records))


FLAGS = """--base --value --full --no-full --scheme --probe-width --l1 --data --template --system --held-out --max-length --lr --epochs
--steps --batch-size --grad-accum --dtype --seed --shard --plain --fast --out --resume --save-every --expert --anti-expert --alpha --vocab-map
--prompt --max-new-tokens --temperature --top-p --explain --speculate --draft --chat --how --texts --eval --base-tokenizer
--value-tokenizer --show --tokenizer --height --wrong""".split()
VALUES = """-1 0 1 2 nan inf 1e999 -1e-300 99999999999999999999 x 👍 /dev/null /dev/full . .. / base value chats.jsonl texts.txt
map.safetensors nowhere/x base/config.json llama-3 paper probe float16 scratch scratch:tiny-x tiny-q org/model -- -""".split()
VALUES += ["", " ", "x" * 300, "x" * 5000, "\udcff", "a\nb"]


def damage_flags(rng: random.Random) -> list[str]:
    command = list(
        rng.choice([TRAIN, SAMPLE, EXPERT, MAP, "chat.py chats.jsonl --tokenizer base".split()])
    )
    if rng.random() < 0.5:
        command[rng.randrange(1, len(command))] = rng.choice(VALUES)
    if rng.random() < 0.8:
        command += [rng.choice(FLAGS), *[rng.choice(VALUES)] * (rng.random() < 0.7)]
    return command


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else path.is_dir()
        for path in folder.rglob("*")
    }


def run_forked(folder: Path, command: list[str]) -> tuple[int | None, str]:
    """Status (None: too slow) and what was said on stderr."""
    errors = folder.parent / "stderr"
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(
                resource.RLIMIT_AS, (12 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1])
            )
            resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST + 1))  # then SIGXCPU
            os.chdir(folder)
            for number, file, flags in (
                (0, os.devnull, 0),
                (1, os.devnull, os.O_WRONLY),
                (2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            ):
                os.dup2(os.open(file, flags), number)
            sys.argv, sys.stdin, sys.stdout, sys.stderr, status = (
                command,
                open(0),
                open(1, "w"),
                open(2, "w"),
                0,
            )
            try:
                run_cli(MAINS[command[0]])
            except SystemExit as ended:
                status = ended.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            gc.collect()  # what a failed run leaves is removed when nobody holds it any more
            sys.stderr.flush()
            os._exit(status)
        finally:
            os._exit(99)
    deadline = time.monotonic() + WAITING
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
            return None, ""
        if ended:
            return os.waitstatus_to_exitcode(status), errors.read_text(errors="replace")
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


def fault(status: int | None, said: str, before: dict, after: dict, command: list[str]) -> str:
    """What is wrong with how a command ended; "" if nothing is."""
    if status not in (0, 2) or "Traceback" in said:
        return (
            f"a hang ({LONGEST} s at work, or {WAITING} s waiting)"
            if status is None
            else f"status {status}: {said[-300:]}"
        )
    if status == 2 and (
        said.count("\n") != 1 or not said.startswith(f"{command[0]}: ") or len(said) > 2000
    ):
        return f"not one short line: {said[-300:]}"
    # a run that goes on, and then finds a loss or a weight that is no number, has logged its steps
    has_logged = "the loss is" in said or "the last update made" in said
    ours = ("stopped.training/lock", *["stopped.training/log.jsonl"] * has_logged)
    if status == 0:  # what it may write
        ours = (
            "run",
            "stopped",
            "new.map",
            "out",
            *[value for value in command if value.strip("./")],
        )
    changed = {
        name
        for name in before.keys() | after.keys()
        if before.get(name, "absent") != after.get(name, "absent")
    }
    lost = sorted(name for name in changed if not name.startswith(ours))
    return f"changed, lost or left: {lost[:3]}" if lost else ""


def fuzz(house: Path, seed: int, count: int, only: str = "") -> list[str]:
    """Faults among `count` mutations, which go through the families in turn."""
    families = [name for name in [*FAMILIES, "flags"] if only in name]
    tally, faults, started = Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "house"
        for number in range(count):
            family = families[number % len(families)]
            rng = random.Random(f"{seed} {number} {family}")
            shutil.copytree(house, folder, symlinks=True)
            command = (
                damage_flags(rng) if family == "flags" else rng.choice(FAMILIES[family] or [RESUME])
            )
            if family != "flags":
                damage_file(rng, folder / family)
            before = contents(folder)
            status, said = run_forked(folder, command)
            tally[family, status] += 1
            if found := fault(status, said, before, contents(folder), command):
                faults.append(
                    f"seed {seed}, {number}, {family}: {' '.join(command)[:300]!a}: {found}"
                )
                print(faults[-1])
            shutil.rmtree(folder)
            if number % 100 == 99:
                left = (time.monotonic() - started) / (number + 1) * (count - number - 1)
                print(
                    f"{number + 1} of {count}, {len(faults)} faults, {left:.0f} s left", flush=True
                )
    for family in families:
        print(f"{family:45} answered {tally[family, 0]:4}  refused {tally[family, 2]:4}")
    print(f"{len(faults)} faults in {count} mutations of seed {seed}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("--seed", 0), ("--count", 1000)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only", default="", help="families whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        build(Path(home))
        sys.exit(bool(fuzz(Path(home), args.seed, args.count, args.only)))
