"""train.py in two processes: DistributedDataParallel and --shard, killed and resumed, against one process."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    ENVIRONMENT,
    ROOT,
    fresh,
    meeting,
    refused,
    succeed,
    together,
    weights,
    worked,
)


def kill_two(folder: Path, work: Path, *arguments) -> None:
    """Start two processes as torchrun does, and kill both when they have written their first checkpoint."""
    pair = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT | environment,
        )
        for environment in meeting(2)
    ]
    while not list(work.glob("step-*")):
        assert all(process.poll() is None for process in pair), "ended before its first checkpoint"
        time.sleep(0.01)
    for process in pair:
        process.kill()
        process.wait()


def assert_close(one: Path, other: Path, tolerance: float = 3e-6) -> None:
    """The same weights but for fp32 rounding, where training has moved them by more than 100 times as much."""
    for name, tensor in (ours := weights(one)).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=tolerance, msg=name)
    assert (one / "tokenizer.model").read_bytes() == (other / "tokenizer.model").read_bytes()
    assert ours.keys() == weights(other).keys()


def test_the_gradients_of_every_scheme():
    done = together(ROOT, "-m tests.several_gradients")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("same") == 7 * 2 * 2 * 2
    )  # schemes, full, pairs and teacher, checkpointing, plain and fast, DDP and --shard


@pytest.mark.parametrize(
    "shard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "shard"]
)
def test_killed_and_resumed_in_two_processes_is_one_process(
    shard, home, checkpoint, chats, tmp_path
):
    """A batch of 5 in parts of 1: the processes have 3 and 2 of them."""
    command = [
        ROOT / "train.py",
        *(
            f"--base {checkpoint} --value --data {chats} --dtype float32 --steps 20 "
            "--batch-size 5 --grad-accum 5 --lr 2e-3 --save-every 5"
        ).split(),
    ]
    alone, out = tmp_path / "alone", tmp_path / "together"
    worked(tmp_path, "train.py", *command[1:], "--out", alone)
    moved = max(
        (tensor - weights(checkpoint)[name]).abs().max() for name, tensor in weights(alone).items()
    )
    assert moved > 1e-2
    both = [*command, "--out", out, *["--shard"] * shard]
    kill_two(tmp_path, tmp_path / "together.training", *both)
    kept = max((tmp_path / "together.training").glob("step-*"))
    # The files of several processes are those of one.
    shutil.copytree(tmp_path / "together.training", tmp_path / "finished alone.training")
    output = worked(
        tmp_path, "train.py", *command[1:], "--resume", "--out", tmp_path / "finished alone"
    )
    assert f"resumed at step {kept.name[5:]}" in output
    assert_close(tmp_path / "finished alone", alone, 1e-4)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    done = fresh(tmp_path, torchrun, *both, "--resume")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count(f"resumed at step {kept.name[5:]}")
        == done.stdout.count("base+value")
        == 1
    )  # one of them talks
    assert_close(out, alone, 1e-4)
    assert not list(tmp_path.glob("*.training"))
    output = worked(
        tmp_path, f"sample.py --base {checkpoint} --value {out} --prompt", "Greet number 3."
    )
    assert output.strip()


@pytest.mark.slow
def test_pretraining_in_two_processes(home, tmp_path):
    """From fresh weights, on rows of text, with the tiny world's evaluation at the end; tied embeddings, sharded."""
    command = [ROOT / "train.py", *"--base tiny-s --steps 6 --batch-size 6".split()]
    done = together(tmp_path, *command, "--shard")
    assert done.returncode == 0, done.stderr
    succeed(tmp_path, *command, "--out", "alone")
    assert_close(tmp_path / "out/seed0/tiny-s", tmp_path / "alone", 1e-4)


def test_mistakes_are_told_once(checkpoint, chats, tmp_path):
    command = (
        f"train.py --base {checkpoint} --value --data {chats} --steps 3 --out {tmp_path}/run"
    ).split()
    assert "torchrun" in refused(tmp_path, *command, "--shard")
    done = together(tmp_path, ROOT / command[0], *command[1:], "--max-length", "4")
    assert (
        done.returncode
        and done.stderr.count("train.py: ") == 1
        and "every conversation" in done.stderr
    )
    assert "Traceback" not in done.stderr.split("train.py: ")[1].splitlines()[0]
    assert not (tmp_path / "run.training").exists()
