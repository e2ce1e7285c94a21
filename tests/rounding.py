"""What rounding alone changes: the README's commands again, under all that one machine can vary.

    python -m tests.rounding                              # all: 9 core-minutes a seed and variation
    python -m tests.rounding --seeds 0 --only avx2 rows   # some
    python -m tests.rounding --jobs 2                     # two processes at a time

Processors add the parts of a sum in different orders, and each order is rounded in its own way.
After thousands of steps the networks differ visibly. A claim on a page should hold under every
rounding. Networks are kept in out/rounding/NAME/out/seedS, so a run that is stopped goes on; delete
that folder after a change of the code.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data.files import read_json, write_text
from run.cli import clock

ROOT = Path(__file__).parents[1]
HOME = Path("out/rounding")

# What each variation sets. Without a setting, a processor uses the widest instructions that it has.
VARIATIONS = {
    "default": {  # no vector instructions in PyTorch's own loops
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {},
    "threads": {"OMP_NUM_THREADS": "2"},
    "rows": {},  # the rows of each batch in the opposite order
}
ROUNDINGS = ["default", "avx2", "avx512"]  # what processors differ in

# train.py, with the rows of each batch in the opposite order
OPPOSITE = """
import train
from run.cli import run_cli

accumulate_gradient = train.accumulate_gradient

def opposite(objective, base, parts, *rest):
    parts = [(tokens.flip(0), labels.flip(0)) for tokens, labels in parts]
    return accumulate_gradient(objective, base, parts, *rest)

train.accumulate_gradient = opposite
run_cli(train.main)
"""

COMMANDS = [
    "train.py --seed {seed} --resume",
    "train.py --base tiny-l --seed {seed} --resume",
    "sample.py --base tiny-l --value out/seed{seed}/value-residual-tiny-s",
]
SYSTEMS = {  # and what of them is printed
    "tiny-s alone": ["know", "fk"],
    "tiny-s in full": ["exact", "know", "ins", "arith", "fk"],
    "tiny-s + value": ["exact", "know", "ins", "arith", "fk"],
    "tiny-l alone": ["know", "fk"],
    "tiny-l + value": ["exact", "know", "ins", "arith", "fk"],
}
LESS = " less "
GAINS = [  # a system, and the one it should be better than, by at least so much in these metrics
    ("tiny-l + value", "tiny-s + value", 0.15, ["exact", "know", "fk"]),
    ("tiny-s + value", "tiny-s in full", 0.0, ["exact"]),
]
RARE = "where tiny-s alone has no fk, all"


def run(command: str, folder: Path, variation: str, house: Path = ROOT) -> str:
    """What a command of the scripts in `house` prints, run in a folder; SystemExit if it fails."""
    script, *arguments = command.split()
    opposite = variation == "rows" and script == "train.py"
    start = ["-c", OPPOSITE] if opposite else [str(house / script)]
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(house)}
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env=os.environ | one_thread | VARIATIONS[variation],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {command}: {done.stderr}")
    return done.stdout


def read_table(output: str, first: str) -> dict[str, dict[str, float | None]]:
    """The last table in `output` whose first column is `first`: row -> column -> value."""
    lines = output.splitlines()
    start = max(number for number, line in enumerate(lines) if line.split()[:1] == [first])
    columns, table = lines[start].split(), {}
    for line in lines[start + 1 :]:
        name, *values = line.rsplit(maxsplit=len(columns)) or [""]
        if len(values) < len(columns) or any(value.isalpha() for value in values):
            break  # behind the table
        table[name.strip()] = {
            column: None if value == "-" else float(value) for column, value in zip(columns, values)
        }
    return table


def train_and_look(variation: str, seed: int, say) -> None:
    """Run COMMANDS, and keep what the last one printed."""
    folder = HOME / variation
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        looked = folder / f"looked-{seed}.txt"
        if not looked.is_file():
            output = run(command.format(seed=seed), folder, variation)
            if command == COMMANDS[-1]:
                write_text(looked, output)
        say(f"{variation}: {command.format(seed=seed)}")


def measured(variation: str, seed: int) -> dict[str, float]:
    """Every number of a variation and seed, by a name such as "tiny-l + value, exact"."""
    folder = HOME / variation
    trained = read_json(folder / f"out/seed{seed}/value-residual-tiny-s/metrics.json")
    full = read_json(folder / f"out/seed{seed}/full-tiny-s/metrics.json")
    looked = (folder / f"looked-{seed}.txt").read_text(encoding="utf-8")
    systems = read_table(looked, "exact")
    systems |= {"tiny-s alone": trained["base"], "tiny-s in full": full["full"]}
    numbers = {
        f"{system}, {metric}": systems[system][metric]
        for system, metrics in SYSTEMS.items()
        for metric in metrics
    }
    for better, worse, _, metrics in GAINS:
        for metric in metrics:
            gain = systems[better][metric] - systems[worse][metric]
            numbers[f"{better}{LESS}{worse}, {metric}"] = gain
    return numbers | by_frequency(looked)


def by_frequency(looked: str) -> dict[str, float | None]:
    """The numbers of the table by frequency in what `sample.py --base tiny-l` printed."""
    numbers = {}
    for row, shares in read_table(looked, "often").items():
        for group, share in shares.items():
            if row != "questions" and (group != "all" or row.startswith("where")):
                numbers[f"{row}, {group}"] = share
    return numbers


def print_spreads(found: dict[tuple[str, int], dict[str, float]], variations, seeds) -> None:
    """A line a number and seed: it under each variation, and the largest less the smallest."""
    print(f"\n{'':52}" + "".join(f"{variation:>9}" for variation in variations) + "   spread")
    for name in next(iter(found.values())):
        for seed in seeds:
            values = [found[variation, seed][name] for variation in variations]
            if None in values:
                continue
            print(
                f"{name + f', seed {seed}':52}" + "".join(f"{value:9.3f}" for value in values),
                end="",
            )
            print(f"{max(values) - min(values):9.3f}")


def print_ranges(found: dict[tuple[str, int], dict[str, float]]) -> None:
    """Over all variations and seeds: the mean of each number, its smallest and its largest."""
    print(f"\n{f'over all {len(found)}':52}     mean   lowest  highest")
    for name in next(iter(found.values())):
        values = [numbers[name] for numbers in found.values() if numbers[name] is not None]
        mean = sum(values) / len(values)
        print(f"{name:52}{mean:9.3f}{min(values):9.3f}{max(values):9.3f}")


def print_claims(found: dict[tuple[str, int], dict[str, float]], variations, seeds) -> None:
    """What should hold under every variation and seed, and whether it does."""
    claims = [(RARE, 0.5)]
    for better, worse, least, metrics in GAINS:
        claims += [(f"{better}{LESS}{worse}, {metric}", least) for metric in metrics]
    print()
    for name, least in claims:
        lowest = min(numbers[name] for numbers in found.values())
        print(f"{name}: lowest {lowest:.3f}, {least:.2f} is asked for: {verdict(lowest >= least)}")
    for name in ("tiny-s alone, fk", "tiny-l alone, fk"):
        spreads = []
        for seed in seeds:
            values = [found[variation, seed][name] for variation in variations]
            spreads.append(max(values) - min(values))
        print(
            f"{name}: moves by {max(spreads):.3f} at most, 0.10 is asked for: "
            f"{verdict(max(spreads) <= 0.10)}"
        )


def verdict(holds: bool) -> str:
    return "holds in all" if holds else "DOES NOT HOLD IN ALL"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    args = parser.parse_args()
    if "avx512" in args.only and torch.backends.cpu.get_cpu_capability() != "AVX512":
        print("avx512 is left out: this processor does not have it")
        args.only.remove("avx512")
    started, done = time.monotonic(), 0
    count = len(args.only) * len(args.seeds) * len(COMMANDS)

    def say(what: str) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * (count - done)
        print(f"[{done}/{count}] {what}; {clock(left)} left", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        chains = [
            pool.submit(train_and_look, variation, seed, say)
            for seed in args.seeds
            for variation in args.only
        ]
        for chain in chains:
            chain.result()
    found = {
        (variation, seed): measured(variation, seed)
        for variation in args.only
        for seed in args.seeds
    }
    print_spreads(found, args.only, args.seeds)
    print_ranges(found)
    print_claims(found, args.only, args.seeds)


if __name__ == "__main__":
    main()
