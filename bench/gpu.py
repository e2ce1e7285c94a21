"""What one GPU can check in nine minutes: is the kernel right, are the fast ways the plain ones, and how fast is it all.

    python -m bench.gpu                          # writes bench/GPU.md; on a CPU a rehearsal at toy sizes, which measures nothing
    python -m bench.gpu --only kernel sweep      # some of the steps

Steps are commands of bench/ and tests/ with a time limit each, what matters most first. The report is written before and
after every one of them, so whatever stops a run, it says what was measured and what was not. Peers that are not installed
(transformers, Liger-Kernel) are left out and named. Several GPUs, and the losses of pairs and of a teacher, are not in it.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import ivl
from bench.decode import ALONE, BOTH, THEIR_BOTH, THEIRS, VALUE
from bench.goals import Goal, Sizes, goals_for, judge
from bench.measure import describe, table
from data.files import check_output, write_text
from run.cli import ArgumentParser, clock, run_cli

ROOT = Path(__file__).parents[1]
TOTAL = 9 * 60  # seconds for everything
TITLE, REHEARSAL = "# What ran on a GPU", "# A rehearsal without a GPU"
LONGEST_OUTPUT = 20_000  # characters of a step's output that the report keeps, the last ones


ON_A_GPU = Sizes(
    8192, (32000, 128256), "TinyLlama", 4096, "TinyLlama", "Llama-2-7B", "Llama-2-13B", (128, 1024)
)
TOY = Sizes(4, (100,), "20M", 32, "tiny-s", "tiny-l", "tiny-l", (2, 8))

# ---------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]  # behind python -m; what takes --json gets it
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    status: str = "not begun"
    seconds: float = 0.0
    output: str = ""
    numbers: dict = field(default_factory=dict)  # what the step measured, as its --json has it


def steps_for(sizes: Sizes, rehearsal: bool) -> list[Step]:
    """What matters most first."""
    rows, vocabs = str(sizes.rows), list(map(str, sizes.vocabs))
    few, many = ("1", "1") if rehearsal else ("2", "5")  # rounds
    interpreted = {"TRITON_INTERPRET": "1"} if rehearsal else {}
    tests = [
        "pytest",
        "tests/interpreted_kernel.py",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-n",
        "0" if rehearsal else "4",
    ]
    decode = ["bench.decode", "--batch", "1", "--rounds", "1", "--tokens"]
    tokens = list(map(str, sizes.tokens))
    return [
        Step(
            "kernel", tests + (["-k", "random_rows and 7-7"] if rehearsal else []), 100, interpreted
        ),
        Step(
            "twins",
            ["bench.twins"]
            + (
                ["--tokens", "8", "--prompts", "2"]
                if rehearsal
                else ["--tokens", "128", "--prompts", "4"]
            ),
            110,
        ),
        Step(
            "decode",
            [*decode, *tokens, "--pair", sizes.value, sizes.base, "--only", ALONE, VALUE, BOTH],
            270,
        ),
        Step(
            "bigger", [*decode, tokens[0], "--pair", sizes.value, sizes.bigger, "--only", BOTH], 90
        ),
        Step(
            "loss",
            [
                "bench.loss",
                "--only",
                "logits",
                "--rows",
                rows,
                "--vocab",
                *vocabs,
                "--rounds",
                many,
            ],
            140,
        ),
        Step(
            "train",
            [
                "bench.train",
                "--pair",
                sizes.trained,
                sizes.trained,
                "--tokens",
                str(sizes.part),
                "--rounds",
                few,
            ],
            90,
        ),
        Step(
            "transformers",
            [
                *decode,
                tokens[0],
                "--pair",
                sizes.value,
                sizes.base,
                "--only",
                ALONE,
                BOTH,
                THEIRS,
                THEIR_BOTH,
            ],
            90,
        ),
        Step(
            "sweep",
            ["bench.sweep", "--rows", rows, "--vocab", *vocabs, "--rounds", few],
            60,
            interpreted,
        ),
    ]


def run_step(step: Step, outcome: Outcome, limit: float, folder: Path) -> None:
    """Run a command for at most `limit` seconds; the outcome has what there is of it, also if this is stopped."""
    started, log, numbers = (
        time.monotonic(),
        folder / f"{step.name}.log",
        folder / f"{step.name}.json",
    )
    command = [sys.executable, "-m", *step.command] + (
        [] if step.command[0] == "pytest" else ["--json", str(numbers)]
    )
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    outcome.status = "stopped by a signal"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | step.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            outcome.status = "done" if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            outcome.status = f"cut off after {limit:.0f} s"
        finally:
            if process.poll() is None:  # with the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            outcome.seconds = time.monotonic() - started
            outcome.output = without_paths(log.read_text(encoding="utf-8", errors="replace"))
            outcome.numbers = (
                json.loads(numbers.read_text()) if numbers.exists() else count_tests(outcome.output)
            )


def without_paths(output: str) -> str:
    """A report is for others: no folder of this machine."""
    names = {
        f"{ROOT}{os.sep}": "",
        sys.prefix: "PYTHON",
        sys.base_prefix: "PYTHON",
        tempfile.gettempdir(): "TMP",
        f"{Path.home()}{os.sep}": f"HOME{os.sep}",
    }  # a home of / is no part of other paths
    for folder, name in names.items():
        output = output.replace(folder, name)
    return output


def count_tests(output: str) -> dict[str, int]:
    """{"passed": 70, "failed": 3} of pytest's last line; {} of other output."""
    return {
        word: int(count)
        for count, word in re.findall(r"\b(\d+) (passed|failed|errors?)\b", output[-300:])
    }


# ---------------------------------------------------------------------------------------------------------
# The report, and the run


def report(head: str, goals: list[Goal], outcomes: dict[str, Outcome]) -> str:
    """Goals, steps, and what each step printed, as Markdown; a rehearsal's goals are read and not judged."""
    numbers = {name: outcome.numbers for name, outcome in outcomes.items()}
    aims = [["goal", "wanted", "measured", ""]]
    for goal in goals:
        measured, verdict = judge(goal, numbers)
        if measured and head.startswith(REHEARSAL):
            verdict = "rehearsed"
        aims.append([goal.name, f"{goal.sense} {goal.form.format(goal.wanted)}", measured, verdict])
    done = [["step", "", "seconds"]] + [
        [name, each.status, f"{each.seconds:.0f}"] for name, each in outcomes.items()
    ]
    parts = [head, "## Goals", table(aims), "## Steps", table(done)]
    for name, outcome in outcomes.items():
        if outcome.output.strip():
            parts += [
                f"## {name}: {outcome.status}",
                f"```\n{outcome.output[-LONGEST_OUTPUT:].strip()}\n```",
            ]
    return "\n\n".join(parts) + "\n"


def measure_all(
    steps: list[Step], goals: list[Goal], head: str, out: Path, total: float = TOTAL
) -> dict[str, Outcome]:
    """Run the steps one after the other within `total` seconds, and keep the report in `out` up to date."""
    started, outcomes = time.monotonic(), {step.name: Outcome() for step in steps}

    def save() -> None:
        write_text(out, report(head, goals, outcomes))

    with tempfile.TemporaryDirectory() as folder:
        try:
            for step in steps:
                outcome, left = outcomes[step.name], total - (time.monotonic() - started)
                if left < 1:
                    outcome.status = "not begun: the time was up"
                    continue
                print(
                    f"{step.name}: at most {clock(min(step.limit, left))}, of {clock(left)} that are left for all",
                    flush=True,
                )
                outcome.status = "begun, and nothing was heard of it since"
                save()
                run_step(step, outcome, min(step.limit, left), Path(folder))
                print(f"{outcome.output.strip()}\n{step.name}: {outcome.status}\n", flush=True)
                save()
        finally:
            save()
    return outcomes


def card_and_driver() -> str:
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    card = torch.cuda.get_device_properties(0)
    return f"{card.total_memory / 1e9:.0f} GB, sm_{card.major}{card.minor}, driver {driver}, CUDA {torch.version.cuda}"


def main():
    rehearsal = not torch.cuda.is_available()
    sizes = TOY if rehearsal else ON_A_GPU
    steps = steps_for(sizes, rehearsal)
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [step.name for step in steps]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STEP", help=f"some of {', '.join(names)}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the report (default bench/GPU.md; of some steps, and of a rehearsal, a file in out/)",
    )
    args = parser.parse_args()
    out = args.out
    if out is None:
        out = ROOT / (
            "out/rehearsal.md"
            if rehearsal
            else "out/some-steps.md"
            if args.only
            else "bench/GPU.md"
        )
        out.parent.mkdir(exist_ok=True)
    titles = (
        [REHEARSAL] if rehearsal else [REHEARSAL, TITLE]
    )  # a rehearsal does not replace what a GPU has measured
    check_output(
        "--out",
        out,
        " and no ".join(titles),
        lambda start: start.startswith(tuple(map(str.encode, titles))),
    )
    triton = f"Triton {ivl.triton.__version__}" if ivl.triton else "no Triton"
    made = (
        f"`python -m bench.gpu`, {datetime.date.today()}: {describe('cpu' if rehearsal else 'cuda')}, {triton}, "
        f"BLOCK, WARPS, STAGES = {ivl.BLOCK}, {ivl.WARPS}, {ivl.STAGES}"
    )
    if rehearsal:
        head = (
            f"{REHEARSAL}\n\n{made}\n\nThere is no CUDA device here. Every step ran at toy sizes on the CPU, to show that it "
            "runs: no number below says anything of a GPU, and no goal is met or missed."
        )
    else:
        head = f"{TITLE}\n\n{made}, {card_and_driver()}"
    print(head, flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    steps = [step for step in steps if not args.only or step.name in args.only]
    outcomes = measure_all(steps, goals_for(sizes), head, out)
    print(
        f"{out.read_text(encoding='utf-8').partition('## Steps')[0].removeprefix(head).strip()}\n\nAll of it is in {out}"
    )
    if any(outcome.status != "done" for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
