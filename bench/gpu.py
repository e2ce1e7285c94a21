"""What one GPU can check in nine minutes: is the kernel right, do the fast ways give the plain
answers, and how fast is it all?

    python -m bench.gpu                       # writes bench/GPU.md; on a CPU a rehearsal, toy-sized
    python -m bench.gpu --only kernel loss    # some of the steps

Steps are commands of bench/ and tests/, each with a time limit; what matters most comes first. The
report is written before and after each of them, so a run that is stopped still says what was
measured and what was not. Other libraries (transformers, Liger-Kernel) are left out, and named,
where they are not installed. It uses one GPU, and does not measure the losses of pairs and of a
teacher.
"""

import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import ivl
from bench.decode import ALONE, BOTH, THEIR_BOTH, THEIRS, VALUE
from bench.measure import describe, device_here, table
from data.files import check_output, write_text
from run.cli import ArgumentParser, clock, run_cli

ROOT = Path(__file__).parents[1]
TOTAL = 9 * 60  # seconds for everything
TITLE, REHEARSAL = "# What ran on a GPU", "# A rehearsal without a GPU"
LONGEST_OUTPUT = 20_000  # characters of a step's output that the report keeps, the last ones


# --------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class Step:
    name: str
    command: str  # behind python -m
    limit: float  # seconds
    interpreted: bool = False  # Triton's kernel, where there is no GPU


@dataclass
class Outcome:
    status: str = "not begun"
    seconds: float = 0.0
    output: str = ""


def steps_for(rehearsal: bool) -> list[Step]:
    """What matters most comes first."""
    kernel = "pytest tests/interpreted_kernel.py -p no:cacheprovider -p no:benchmark"
    if rehearsal:
        kernel += " -n 0 -k 'random_rows and 7-7'"
        twins, pair, bigger, short, long = "--tokens 8", "tiny-s tiny-l", "tiny-s tiny-l", 2, 8
        rows, trained, few, many = "--rows 4 --vocab 100", "20M 20M --tokens 32", 1, 1
    else:
        kernel += " -n 4"
        twins, short, long = "--tokens 128 --prompts 4", 128, 1024
        pair, bigger = "TinyLlama Llama-2-7B", "TinyLlama Llama-2-13B"
        rows, trained = "--rows 8192 --vocab 32000 128256", "TinyLlama TinyLlama --tokens 4096"
        few, many = 2, 5  # rounds
    decode = "bench.decode --batch 1 --rounds 1 --pair"
    ours, theirs = f"'{ALONE}' '{VALUE}' '{BOTH}'", f"'{ALONE}' '{BOTH}' '{THEIRS}' '{THEIR_BOTH}'"
    return [
        Step("kernel", kernel, 100, rehearsal),
        Step("twins", f"bench.twins {twins}", 110),
        Step("decode", f"{decode} {pair} --tokens {short} {long} --only {ours}", 270),
        Step("bigger", f"{decode} {bigger} --tokens {short} --only '{BOTH}'", 90),
        Step("loss", f"bench.loss --only logits {rows} --rounds {many}", 140),
        Step("train", f"bench.train --pair {trained} --rounds {few}", 90),
        Step("transformers", f"{decode} {pair} --tokens {short} --only {theirs}", 90),
        Step("settings", f"bench.loss --only settings {rows} --rounds {few}", 60, rehearsal),
    ]


def run_step(step: Step, outcome: Outcome, limit: float, folder: Path) -> None:
    """Run a command for at most `limit` seconds; if it is stopped, keep what there is of it."""
    log = folder / f"{step.name}.log"
    command = [sys.executable, "-m", *shlex.split(step.command)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    if step.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    outcome.status, started = "stopped by a signal", time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
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


def without_paths(output: str) -> str:
    """A report is for others: no folder of this machine."""
    names = {
        f"{ROOT}{os.sep}": "",
        sys.prefix: "PYTHON",
        sys.base_prefix: "PYTHON",
        tempfile.gettempdir(): "TMP",
        f"{Path.home()}{os.sep}": f"HOME{os.sep}",  # a home of / is no part of other paths
    }
    for folder in sorted(names, key=len, reverse=True):  # the environment may lie in ROOT
        output = output.replace(folder, names[folder])
    return output


# --------------------------------------------------------------------------------------------------
# The report, and the run


def report(head: str, outcomes: dict[str, Outcome]) -> str:
    """How each step ended, and what it printed, as Markdown."""
    ends = [[name, each.status, f"{each.seconds:.0f}"] for name, each in outcomes.items()]
    parts = [head, table([["step", "", "seconds"], *ends])]
    for name, outcome in outcomes.items():
        if output := outcome.output[-LONGEST_OUTPUT:].strip():
            parts += [f"## {name}: {outcome.status}", f"```\n{output}\n```"]
    return "\n\n".join(parts) + "\n"


def measure_all(
    steps: list[Step], head: str, out: Path, total: float = TOTAL
) -> dict[str, Outcome]:
    """Run the steps in turn within `total` seconds, and keep the report in `out` up to date."""
    started, outcomes = time.monotonic(), {step.name: Outcome() for step in steps}

    def save() -> None:
        write_text(out, report(head, outcomes))

    with tempfile.TemporaryDirectory() as folder:
        try:
            for step in steps:
                outcome, left = outcomes[step.name], total - (time.monotonic() - started)
                if left < 1:
                    outcome.status = "not begun: the time was up"
                    continue
                limit = min(step.limit, left)
                print(f"{step.name}: at most {clock(limit)}; {clock(left)} are left", flush=True)
                outcome.status = "begun, and nothing was heard of it since"
                save()
                run_step(step, outcome, limit, Path(folder))
                print(f"{outcome.output.strip()}\n{step.name}: {outcome.status}\n", flush=True)
                save()
        finally:
            save()
    return outcomes


def card() -> str:
    found = torch.cuda.get_device_properties(0)
    memory = f"{found.total_memory / 1e9:.0f} GB, sm_{found.major}{found.minor}"
    return f"{memory}, CUDA {torch.version.cuda}"


def main():
    device = device_here()
    rehearsal = device == "cpu"
    steps = steps_for(rehearsal)
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [step.name for step in steps]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="%(choices)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the report (default bench/GPU.md; of some steps, and of a rehearsal, a file in out/)",
    )
    args = parser.parse_args()
    whole = ROOT / ("out/rehearsal.md" if rehearsal else "bench/GPU.md")
    out = args.out or (ROOT / "out/some-steps.md" if args.only else whole)
    (ROOT / "out").mkdir(exist_ok=True)
    # a rehearsal does not replace what a GPU has measured
    titles = [REHEARSAL] if rehearsal else [REHEARSAL, TITLE]
    check_output(
        "--out",
        out,
        " and no ".join(titles),
        lambda start: start.startswith(tuple(map(str.encode, titles))),
    )
    triton = f"Triton {ivl.triton.__version__}" if ivl.triton else "no Triton"
    head = f"`python -m bench.gpu`, {datetime.date.today()}: {describe(device)}, {triton}"
    head += f", BLOCK, WARPS, STAGES = {ivl.BLOCK}, {ivl.WARPS}, {ivl.STAGES}"
    if rehearsal:
        head = f"""{REHEARSAL}\n\n{head}\n
There is no CUDA device here. Every step ran at toy sizes on the CPU, to show that it runs: no number below says anything
of a GPU."""
    else:
        head = f"{TITLE}\n\n{head}, {card()}"
    print(head, flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    steps = [step for step in steps if not args.only or step.name in args.only]
    outcomes = measure_all(steps, head, out)
    print(f"All of it is in {out}")
    if any(outcome.status != "done" for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
