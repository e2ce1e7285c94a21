"""bench/gpu.py: runs that are cut off, and, marked slow, the whole rehearsal."""

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import ivl
from bench import gpu
from bench.gpu import REHEARSAL, TITLE, Step, measure_all, steps_for
from run import cli
from tests.helpers import ENVIRONMENT, ROOT, python

# ---- runs that are cut off

HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
pathlib.Path('{folder}/child').write_text(str(child.pid))
print('I hang', flush=True)
time.sleep(60)
"""


def toy_steps(folder, limit: float) -> list[Step]:
    """One step that is quick, one that hangs, and another quick one; `folder` has to be on PYTHONPATH."""
    (folder / "quick.py").write_text("print('I was quick')")
    (folder / "hangs.py").write_text(HANGS.format(folder=folder))
    return [Step("first", "quick", 20), Step("second", "hangs", limit), Step("third", "quick", 20)]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_over_its_limit_does_not_take_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "GPU.md"
    outcomes = measure_all(toy_steps(tmp_path, 3), TITLE, out)
    assert [outcome.status for outcome in outcomes.values()] == [
        "done",
        "cut off after 3 s",
        "done",
    ]
    text = out.read_text()
    assert text.startswith(TITLE) and text.count("I was quick") == 2
    assert "## second: cut off after 3 s\n\n```\nI hang\n```" in text
    assert not is_alive(int((tmp_path / "child").read_text()))  # nor what the step had started


def test_when_the_time_is_up_the_rest_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcomes = measure_all(toy_steps(tmp_path, 20), TITLE, tmp_path / "GPU.md", total=4)
    assert (
        outcomes["second"].status.startswith("cut off after")
        and outcomes["third"].status == "not begun: the time was up"
    )
    assert "| third  | not begun: the time was up |" in (tmp_path / "GPU.md").read_text()


STOPPED = """
from bench import gpu
from bench.gpu import Step
gpu.steps_for = lambda *_: {steps}
gpu.run_cli(gpu.main)
"""


def test_a_run_that_is_killed_leaves_a_report(tmp_path):
    out = tmp_path / "GPU.md"
    script = STOPPED.format(steps=toy_steps(tmp_path, 60))
    run = subprocess.Popen(
        [sys.executable, "-c", script, "--out", out],
        cwd=ROOT,
        env=ENVIRONMENT
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    at_once = out.read_text()  # what kill -9 would leave
    run.send_signal(signal.SIGTERM)
    errors = run.communicate(timeout=30)[1]
    for text, status in (
        (at_once, "begun, and nothing was heard of it since"),
        (out.read_text(), "stopped by a signal"),
    ):
        assert text.startswith(REHEARSAL) and "I was quick" in text
        assert (
            "| first  | done" in text
            and f"| second | {status}" in text
            and "| third  | not begun" in text
        )
    assert "I hang" in out.read_text()
    assert run.returncode == 130 and errors.endswith("stopped\n") and errors.count("\n") == 1
    assert not is_alive(int((tmp_path / "child").read_text()))


# ---- what is run, and where it is written


def test_steps_on_a_gpu_are_of_full_size_and_each_has_a_limit():
    steps = {step.name: step for step in steps_for(rehearsal=False)}
    assert list(steps) == [step.name for step in steps_for(rehearsal=True)]
    assert all(0 < step.limit < gpu.TOTAL for step in steps.values()) and gpu.TOTAL == 540
    assert not any(step.interpreted for step in steps.values())
    assert "--rows 8192 --vocab 32000 128256" in steps["loss"].command
    assert "-k" not in steps["kernel"].command
    assert "--pair TinyLlama Llama-2-7B" in steps["decode"].command


@pytest.mark.parametrize("rehearsal", [True, False])
def test_every_step_is_a_command_that_its_script_takes(rehearsal, monkeypatch):
    class Parsed(Exception):
        """The flags were accepted."""

    def parse(parser, *arguments):
        argparse.ArgumentParser.parse_args(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(cli.ArgumentParser, "parse_args", parse)
    for step in steps_for(rehearsal):
        module, *flags = shlex.split(step.command)
        if module != "pytest":
            monkeypatch.setattr("sys.argv", [module, *flags])
            with pytest.raises(Parsed):
                importlib.import_module(module).main()


def test_a_rehearsal_does_not_replace_what_a_gpu_has_measured(tmp_path, monkeypatch, capsys):
    measured = tmp_path / "GPU.md"
    measured.write_text(f"{TITLE}\n\nan H100\n")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(measured)])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "measure_all", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        gpu.run_cli(gpu.main)
    assert ended.value.code == 2 and "exists, and is no" in capsys.readouterr().err
    assert measured.read_text() == f"{TITLE}\n\nan H100\n"


def test_a_report_names_no_folder_of_this_machine():
    text = gpu.without_paths(f"  File {str(ROOT)!r}/x.py: {ROOT}/ivl.py, {sys.prefix}/lib/torch")
    assert "ivl.py, PYTHON/lib/torch" in text and str(ROOT) + "/ivl" not in text


def test_a_rehearsal_of_one_step(tmp_path):
    out = tmp_path / "rehearsal.md"
    output = python(f"-m bench.gpu --only twins --out {out}", CUDA_VISIBLE_DEVICES="")
    text = out.read_text()
    assert text.startswith(REHEARSAL) and "twins: done" in output
    assert "they are CUDA graphs, which take a GPU" in text and "\nspeculation, " in text
    assert "## twins: done" in text and "## kernel" not in text


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    out = tmp_path / "rehearsal.md"
    python(f"-m bench.gpu --out {out}", CUDA_VISIBLE_DEVICES="")
    text = out.read_text()
    steps = [step.name for step in steps_for(rehearsal=True)]
    assert [name for name in steps if f"## {name}: done" in text] == steps and "failed" not in text
    assert f"({ivl.BLOCK}, {ivl.WARPS}, {ivl.STAGES})" in text and "3 passed" in text
