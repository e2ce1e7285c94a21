"""bench/gpu.py: goals judged, runs that are cut off, and, marked slow, the whole rehearsal."""

import signal
import subprocess
import sys
import time

import pytest

import ivl
from bench import gpu
from bench.decode import ALONE, BOTH
from bench.goals import goals_for, judge
from bench.gpu import ON_A_GPU, REHEARSAL, TITLE, TOY, Step, measure_all, steps_for
from tests.helpers import ENVIRONMENT, ROOT, python

# ---- goals


def result(*seconds: float, failure: str = "", peak: float = 0) -> dict:
    return {"failure": failure, "seconds": list(seconds), "peak": peak}


def made_up(slower: float = 1.0) -> dict[str, dict]:
    """The numbers of a GPU that copies 3e12 bytes a second and reaches every goal; `slower` than it by so much."""
    sizes = []
    for V in ON_A_GPU.vocabs:
        ours = 10 * 8192 * V / 3e12 / 0.85 * slower  # 85% of the copy
        losses = {
            "eager": result(6 / slower * ours),
            "torch.compile": result(1.2 / slower * ours),
            "Liger, no norm": result(1.1 / slower * ours),
            "ivl_loss": result(ours),
        }
        sizes.append({"rows": 8192, "vocab": V, "from_logits": losses})
    decode = {"copy_bandwidth": 3e12}
    for count, longer in ((128, 1.0), (1024, 1.04 * slower)):
        decode[f"TinyLlama on Llama-2-7B, {count} tokens, batch 1"] = {
            ALONE: result(0.0055 * longer),
            BOTH: result(0.0065 * slower * longer),
        }
    return {
        "kernel": {"passed": 73, "failed": 1} if slower > 1 else {"passed": 73},
        "twins": {
            "captured steps, residual": {"differing": 0},
            "compiled steps, residual": {"differing": 0},
            "speculation, 50%": {"differing": 2 if slower > 1 else 0},
        },
        "loss": {"copy_bandwidth": 3e12, "sizes": sizes},
        "train": {"pairs": {"TinyLlama on TinyLlama": {"ours": result(1.0, peak=22e9 * slower)}}},
        "decode": decode,
    }


def verdicts(numbers: dict) -> dict[str, tuple[str, str]]:
    return {goal.name: judge(goal, numbers) for goal in goals_for(ON_A_GPU)}


def test_goals_that_are_met():
    found = verdicts(made_up())
    assert len(found) == 14 and {verdict for _, verdict in found.values()} == {"met"}
    assert found["V = 128256: kernel, of a copy's bytes/s, at 10 bytes a pair"][0] == "85.0%"
    assert found["V = 32000: kernel, times as fast as eager"][0] == "6.00"
    assert (
        found["TinyLlama + Llama-2-7B, times as long as Llama-2-7B alone, at worst"][0] == "1.182"
    )
    # 7B: 6.607e9 weights, 1.1B: 1.034e9; each two bytes
    assert (
        0.75
        < float(found["TinyLlama + Llama-2-7B, of a copy's bytes/s, at worst"][0].rstrip("%")) / 100
        < 0.79
    )


def test_goals_that_are_missed_say_by_how_much():
    found = verdicts(made_up(slower=1.5))
    assert all(verdict.startswith("**missed") for _, verdict in found.values())
    assert found["V = 32000: kernel, times as fast as eager"] == ("4.00", "**missed by 20.0%**")
    assert found["training TinyLlama on TinyLlama, GB at the peak"] == (
        "33.00",
        "**missed by 37.5%**",
    )
    assert found["answers that captured or compiled steps or speculation change"] == (
        "2",
        "**missed**",
    )


def test_a_goal_is_met_on_the_right_side_of_its_number():
    numbers, name = made_up(), "TinyLlama + Llama-2-7B, longer a token at 1024 tokens than at 128"
    for at_1024, met in ((1.049, True), (1.051, False)):
        numbers["decode"]["TinyLlama on Llama-2-7B, 128 tokens, batch 1"][BOTH]["seconds"] = [1.0]
        numbers["decode"]["TinyLlama on Llama-2-7B, 1024 tokens, batch 1"][BOTH]["seconds"] = [
            at_1024
        ]
        assert (verdicts(numbers)[name][1] == "met") == met
    even = made_up()  # as fast as a peer is not faster
    losses = even["loss"]["sizes"][0]["from_logits"]
    losses["Liger, no norm"]["seconds"] = losses["ivl_loss"]["seconds"]
    assert verdicts(even)["V = 32000: kernel, times as fast as Liger, no norm"] == (
        "1.00",
        "**missed by 0.0%**",
    )


def test_what_was_not_measured_is_not_judged():
    assert {verdict for _, verdict in verdicts(dict.fromkeys(made_up(), {})).values()} == {
        "not measured",
        "not measured (the tests did not come to their end)",
        "not measured (captured steps not compared)",
    }
    numbers = made_up()
    numbers["loss"]["sizes"] = numbers["loss"]["sizes"][:1]  # cut off behind the first vocabulary
    numbers["loss"]["sizes"][0]["from_logits"]["Liger, no norm"] = result(
        failure="not installed (liger_kernel)"
    )
    found = verdicts(numbers)
    liger = found["V = 32000: kernel, times as fast as Liger, no norm"]
    assert liger == ("", "not measured (Liger, no norm: not installed (liger_kernel))")
    assert [name for name, (_, verdict) in found.items() if verdict == "not measured"] == [
        name for name in found if name.startswith("V = 128256")
    ]
    del numbers["decode"]["TinyLlama on Llama-2-7B, 1024 tokens, batch 1"]
    assert sum(verdict == "not measured" for _, verdict in verdicts(numbers).values()) == 4 + 3


@pytest.mark.parametrize(
    "output, counts",
    [
        ("73 passed in 9.1s", {"passed": 73}),
        ("1 error in 2s", {"error": 1}),
        ("Killed", {}),
        ("= 2 failed, 71 passed, 1 warning in 3s =", {"failed": 2, "passed": 71}),
    ],
)
def test_the_tests_of_the_kernel_are_counted(output, counts):
    assert gpu.count_tests(output) == counts


# ---- runs that are cut off

HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
pathlib.Path('{folder}/child').write_text(str(child.pid))
print('I hang', flush=True)
time.sleep(60)
"""


def toy_steps(folder, limit: float) -> list[Step]:
    """Steps whose module runs what it is given, and takes --json: one that is quick, one that hangs, and another."""
    (folder / "quick.py").write_text(
        "import json, sys\nopen(sys.argv[-1], 'w').write('{}')\nprint('I was quick')\n"
    )
    (folder / "hangs.py").write_text(HANGS.format(folder=folder))
    here = {"PYTHONPATH": str(folder)}
    return [
        Step("first", ["quick"], 20, here),
        Step("second", ["hangs"], limit, here),
        Step("third", ["quick"], 20, here),
    ]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_over_its_limit_does_not_take_the_rest(tmp_path):
    out = tmp_path / "GPU.md"
    outcomes = measure_all(toy_steps(tmp_path, 3), goals_for(TOY), TITLE, out)
    assert [outcome.status for outcome in outcomes.values()] == [
        "done",
        "cut off after 3 s",
        "done",
    ]
    text = out.read_text()
    assert text.startswith(TITLE) and text.count("I was quick") == 2
    assert "## second: cut off after 3 s\n\n```\nI hang\n```" in text
    assert not is_alive(int((tmp_path / "child").read_text()))  # nor what the step had started


def test_when_the_time_is_up_the_rest_is_not_begun(tmp_path):
    outcomes = measure_all(
        toy_steps(tmp_path, 20), goals_for(TOY), TITLE, tmp_path / "GPU.md", total=4
    )
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
        env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""},
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
    steps = {step.name: step for step in steps_for(ON_A_GPU, rehearsal=False)}
    assert list(steps) == [step.name for step in steps_for(TOY, rehearsal=True)]
    assert all(0 < step.limit < gpu.TOTAL for step in steps.values()) and gpu.TOTAL == 540
    assert not any(step.environment for step in steps.values())  # nothing is interpreted
    assert (
        "8192" in steps["loss"].command
        and "128256" in steps["loss"].command
        and "-k" not in steps["kernel"].command
    )
    assert [steps["decode"].command[at] for at in (-5, -6)] == ["Llama-2-7B", "TinyLlama"]


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
    output = python("-m", "bench.gpu", "--only", "twins", "--out", out, CUDA_VISIBLE_DEVICES="")
    text = out.read_text()
    assert text.startswith(REHEARSAL) and "twins: done" in output
    assert "both are CUDA graphs, and there is no CUDA device" in text and "| speculation" in text
    assert "## twins: done" in text and "## kernel" not in text


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    out = tmp_path / "rehearsal.md"
    python("-m", "bench.gpu", "--out", out, CUDA_VISIBLE_DEVICES="")
    text = out.read_text()
    steps = [step.name for step in steps_for(TOY, rehearsal=True)]
    assert [
        name for name in steps if f"## {name}: done" in text
    ] == steps and "failed" not in text.partition("## Steps")[2]
    assert f"{ivl.BLOCK}, {ivl.WARPS}, {ivl.STAGES} (in ivl.py)" in text and "3 passed" in text
    goals = text.partition("## Goals")[2].partition("## Steps")[0]
    assert (
        goals.count("rehearsed") == 8 and goals.count("not measured") == 2
    )  # captured steps and Liger take a GPU
    assert " met" not in goals and "missed" not in goals
