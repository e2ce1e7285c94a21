"""How long commands take beside `python -c "import torch"`, as whole processes, in pairs.

    python -m bench.startup out/seed0

A busy machine stretches the time of both. The second ratio is of the time that processor cores worked.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import bench_parser, describe, progress, share, table
from data.errors import UsageError
from run.cli import run_cli

ROOT = Path(__file__).parents[1]
TORCH = ["-c", "import torch"]


def commands(home: Path) -> dict[str, list[str]]:
    base, value = [str(home / name) for name in ("tiny-s", "value-residual-tiny-s")]
    sample = ["sample.py", "--base", base, "--value", value]
    chat = ["-m", "data.chat", str(home / "demonstrations.jsonl"), "--tokenizer", base]
    return {
        "sample.py --prompt": [*sample, "--prompt", "Greet Ruja."],
        "sample.py --help": ["sample.py", "--help"],
        "data.chat FILE": chat,
        "data.chat --help": ["-m", "data.chat", "--help"],
        "data.chat, a flag refused": [*chat, "--show", "0"],
        "run.curves --help": ["-m", "run.curves", "--help"],
    }


def taken(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a whole process, and those that cores worked for it."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode != (2 if "0" in arguments else 0):
        raise UsageError(f"{' '.join(arguments)} failed: {done.stderr.strip()[-300:]}")
    worked = after.children_user + after.children_system
    return seconds, worked - before.children_user - before.children_system


def main():
    parser = bench_parser(__doc__, rounds=9)
    parser.add_argument("home", type=Path, help="a folder with tiny-s and its value network")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    home = args.home.resolve()
    print(f"{describe('cpu')}\n")
    rows = [["", "of the time of `import torch` (range)", "of its core-seconds (range)"]]
    for name, arguments in commands(home).items():
        ours, theirs = [], []
        for number in range(args.rounds):
            ours.append(taken(arguments))
            theirs.append(taken(TORCH))
            progress(f"{name}: pair {number + 1} of {args.rounds}")
        ratios = [share(*both) for both in zip(zip(*ours), zip(*theirs))]
        rows.append([name, *ratios])
    progress("")
    print(table(rows))


if __name__ == "__main__":
    run_cli(main)
