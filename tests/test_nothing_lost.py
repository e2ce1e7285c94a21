"""Full disks, closed outputs, damaged checkpoints: what is told in one line, and what must still be there afterwards.

Kills are in tests/test_train.py; random damage to every file is tests/fuzz.py.
"""

import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import fuzz
from tests.helpers import (
    ROOT,
    VALUE,
    assert_identical,
    fresh,
    refused,
    run,
    stop_at,
    succeed,
)


def check_full_disks(folder: Path, base: Path, chats: Path, disks: int, seed: int) -> None:
    """Runs that resume where files may not grow beyond a limit: each says so in one line, loses no checkpoint, and goes on later."""
    command = (
        f"train.py --base {base} --value --data {chats} --dtype float32 --steps 20 "
        "--batch-size 8 --save-every 5"
    ).split()
    succeed(folder, *command, "--out", folder / "straight")
    stopped, rng = folder / "stopped.training", random.Random(seed)
    stop_at(folder, 8, *command, "--out", folder / "stopped")  # behind its checkpoint of step 5
    largest = (stopped / "step-5/state.safetensors").stat().st_size
    for number in range(disks):
        out = folder / f"full-{number}"
        shutil.copytree(stopped, folder / f"full-{number}.training")
        limit = rng.choice([rng.randrange(2000), rng.randrange(largest + 2000)])

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = fresh(
            folder, ROOT / command[0], *command[1:], "--out", out, "--resume", preexec_fn=limited
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "large" in done.stderr, (
            limit,
            done.stderr,
        )
        left = sorted(path.name for path in folder.glob(f"full-{number}*/*"))
        assert [name for name in left if name not in ("lock", "log.jsonl", "settings.json")] in (
            ["step-5"],
            ["step-15"],
        ), left
        succeed(folder, *command, "--out", out, "--resume")
        assert_identical(folder / "straight", out)


def test_a_full_disk_loses_no_checkpoint(checkpoint, chats, tmp_path):
    check_full_disks(tmp_path, checkpoint, chats, disks=1, seed=0)


@pytest.mark.slow
def test_twenty_full_disks(checkpoint, chats, tmp_path):
    check_full_disks(tmp_path, checkpoint, chats, disks=20, seed=1)


@pytest.mark.parametrize(
    "command",
    [
        "-m vocab_map --base-tokenizer checkpoint --value-tokenizer checkpoint --out m".split(),
        "-m sample --explain --value V --prompt Hi --max-new-tokens 1 --page p.html".split(),
    ],
)
def test_a_full_disk_leaves_no_half_output(command, checkpoint, home, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = fresh(
        tmp_path,
        *[home / VALUE if part == "V" else part for part in command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "large" in done.stderr, (
        done.stderr
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_full_and_closed_outputs_and_a_lonely_rank_end_in_one_line(checkpoint, home, tmp_path):
    command = f"-m vocab_map --base-tokenizer {checkpoint} --value-tokenizer {checkpoint} --out m"
    with open("/dev/full", "w") as full:
        done = fresh(tmp_path, command, stdout=full)
    assert done.returncode == 2 and done.stderr == "vocab_map.py: No space left on device\n"
    closed = fresh(tmp_path, command, preexec_fn=lambda: os.close(1))
    assert closed.returncode == 0 and not closed.stderr
    lonely = run(tmp_path, "train.py", LOCAL_RANK="0")
    assert (
        lonely.returncode == 2
        and lonely.stderr.count("\n") == 1
        and "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in lonely.stderr
    )


def test_damaged_checkpoints_say_which_part_and_offer_the_older_one(checkpoint, chats, tmp_path):
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --steps 20 --batch-size "
        f"8 --save-every 5 --out {tmp_path}/run"
    ).split()
    stop_at(tmp_path, 8, *command)
    work, kept = tmp_path / "run.training", tmp_path / "kept"
    shutil.copytree(work, kept)
    name = "exp_avg.network.model.norm.weight"
    tensors = load_file(kept / "step-5/state.safetensors")
    states = {
        "step is 6": {"step": 6},
        "step is '5'": {"step": "5"},
        "step is None": {"step": None},
        "step is 20, of 20": {"step": 20},
        "position is [0, 0], not 3": {"position": [0, 0]},
        "position is [0, 0, -1]": {"position": [0, 0, -1]},
        "position is [0, 0, 1.5]": {"position": [0, 0, 1.5]},
        "position is {}": {"position": {}},
    }
    damaged = {
        f"{name} is not there": None,
        f"{name} is (1,) of torch.float32": torch.ones(1),
        f"{name} is (32,) of torch.float16": torch.ones(32).half(),
        f"{name} has what is no number": torch.full((32,), float("nan")),
    }
    for says, change in (states | damaged).items():
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        if isinstance(change, dict):
            state = json.loads((work / "step-5/state.json").read_text()) | change
            (work / "step-5/state.json").write_text(json.dumps(state))
        else:
            changed = {
                key: tensor
                for key, tensor in (tensors | {name: change}).items()
                if tensor is not None
            }
            save_file(changed, work / "step-5/state.safetensors")
        message = refused(tmp_path, *command, "--resume")
        assert says in message and "delete it to start over" in message, message
    shutil.copytree(kept / "step-5", work / "step-3")
    assert "delete it to go on from step-3" in refused(tmp_path, *command, "--resume")
    settings = json.loads((kept / "settings.json").read_text())
    for change, says in (
        ({"lr": "fast"}, "lr was 'fast', now"),
        ({"lr": None}, "lr was None"),
        ({"base_hashes": ["x"]}, "a base has changed"),
        ({"held_out": 1}, "held_out was 1"),
        ({"colour": 1}, "colour is there"),
    ):
        (work / "settings.json").write_text(json.dumps(settings | change))
        assert says in refused(tmp_path, *command, "--resume")
    settings.pop("lr")
    (work / "settings.json").write_text(json.dumps(settings))
    assert "lr is not there" in refused(tmp_path, *command, "--resume")


def test_a_failed_start_leaves_nothing_behind(checkpoint, chats, tmp_path):
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --steps 5 --batch-size "
        f"4 --out {tmp_path}/new/run"
    ).split()
    before = sorted(tmp_path.rglob("*"))
    assert "stopped" in refused(tmp_path, *command, "--lr", "1e38")
    assert sorted(tmp_path.rglob("*")) == before


# ---- random damage


@pytest.fixture(scope="module")
def damaged_house(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    fuzz.build(folder)
    return folder


def test_100_mutations(damaged_house):
    assert fuzz.fuzz(damaged_house, seed=0, count=100) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_1000_mutations(damaged_house, seed):
    assert fuzz.fuzz(damaged_house, seed, count=1000) == []


@pytest.mark.parametrize("lr", ["1e38", "3e38"])
def test_nothing_with_a_number_that_is_none_is_published(lr, checkpoint, chats, tmp_path):
    """The update of the last step, behind which no loss would show it."""
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --steps 1 --batch-size "
        f"4 --out {tmp_path}/new/run"
    ).split()
    before = sorted(tmp_path.rglob("*"))
    assert "no number" in refused(tmp_path, *command, "--lr", lr)
    assert sorted(tmp_path.rglob("*")) == before
