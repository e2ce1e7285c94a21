"""What the scripts of paper/ share: tables, claims, the one rule for verdicts, and what each does
when it is run.
"""

import argparse
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType

import numpy as np

from bench.measure import device_here, machine, table
from data.errors import UsageError
from data.files import replacing
from paper.networks import Kept, jobs_for, make
from run.cli import ArgumentParser, number, positive_int

Results = Callable[[str, str], np.ndarray]  # system, metric -> its value on each seed
OURS = "not in the paper"


@dataclass(frozen=True)
class Claim:
    """A conclusion of the paper, and the gap that has to be above 0 for it to show here."""

    section: str  # where the paper says so; OURS if it does not
    says: str
    measured: str  # the gap in words
    gap: Callable[[Results], np.ndarray]  # (seeds,)
    note: str = ""  # printed where it does not show


def between(
    better: str, worse: str, metric: str, plus: float = 0.0
) -> Callable[[Results], np.ndarray]:
    """The gap of one system to another; `plus` is how much worse still counts as a match."""
    return lambda results: results(better, metric) - results(worse, metric) + plus


def between_on(
    bases: list[str], better: str, worse: str, metric: str
) -> Callable[[Results], np.ndarray]:
    """The gap of one value network to another in a metric, the mean over bases."""
    gaps = [between(f"{base} + {better}", f"{base} + {worse}", metric) for base in bases]
    return lambda results: np.mean([gap(results) for gap in gaps], axis=0)


# Which tiny metric stands in for which column of the paper.
STAND_INS = {
    "MT-Bench": "exact",
    "IFEval": "ins",
    "GSM8K": "arith",
    "ToxiGen": "",
    "MBPP": "new exact",
    "HumanEval": "new exact",
    "ARC": "2-shot",
    "Hellaswag": "2-shot",
    "MMLU": "2-shot",
    "TruthfulQA": "mc",
    "Winogrande": "2-shot",
}


def verdict(gaps: np.ndarray) -> str:
    """The rule: two standard errors on both sides of the mean over seeds. One seed has none.

    "holds": all of the interval is above zero. "does not hold": all of it is below. "undecided":
    zero lies in it.
    """
    if len(gaps) < 2:
        return "no verdict on one seed"
    mean, reach = gaps.mean(), 2 * gaps.std(ddof=1) / len(gaps) ** 0.5
    if mean - reach > 0:
        return "holds"
    return "does not hold" if mean + reach < 0 else "undecided"


def percent(values: np.ndarray) -> str:
    """Mean and, over several seeds, standard deviation, in percent as in the paper."""
    spread = f"±{100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


def metric_table(results: Results, rows: dict[str, str], metrics: list[str]) -> str:
    """Rows of label -> system, with a column for each metric."""
    lines = [["", *(f"`{metric}`" for metric in metrics)]]
    for name, system in rows.items():
        lines.append([name, *(percent(results(system, metric)) for metric in metrics)])
    return table(lines)


def bases_table(
    results: Results, bases: list[str], rows: dict[str, list[str]], metrics: list[str]
) -> str:
    """Rows of label -> its system on each base, with a column for each metric on each base."""
    lines = [["", *(f"`{metric}` {base}" for metric in metrics for base in bases)]]
    for name, systems in rows.items():
        cells = [percent(results(system, metric)) for metric in metrics for system in systems]
        lines.append([name, *cells])
    return table(lines)


def with_theirs(ours: np.ndarray, theirs: list[float]) -> str:
    """Ours, then the paper's numbers in brackets."""
    numbers = ", ".join(f"{number:g}" for number in theirs)
    return percent(ours) + (f" ({numbers})" if theirs else "")


def stand_ins_table(
    results: Results, systems: dict[str, str], paper: dict[str, tuple]
) -> list[list[str]]:
    """A row for each metric that stands for columns of the paper; its numbers are of the first
    systems.
    """
    lines = [["", *systems]]
    for metric, columns in groupby(sorted(paper, key=stand_in_order), STAND_INS.get):
        columns = list(columns)
        cells = []
        for index, system in enumerate(systems.values()):
            theirs = [paper[column][index] for column in columns if index < len(paper[column])]
            cells.append(with_theirs(results(system, metric), theirs))
        lines.append([f"`{metric}` ({', '.join(columns)})", *cells])
    return lines


def stand_in_order(column: str) -> int:
    """Columns of the paper with the same stand-in come together, in the order of STAND_INS."""
    return list(STAND_INS.values()).index(STAND_INS[column])


def claim_text(claim: Claim, results: Results) -> str:
    """The verdict; then the mean gap, and the gap on each seed in brackets."""
    gaps = claim.gap(results)
    ours = verdict(gaps)
    numbers = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    text = f"- **{ours[0].upper() + ours[1:]}**: {claim.says}  \n"
    text += f"  {claim.measured}: {100 * gaps.mean():+.1f} ({numbers})."
    if ours in ("undecided", "does not hold") and claim.note:
        text += f" {claim.note}"
    return text


def claims_text(claims: list[Claim], results: Results) -> str:
    """A list for each section of the paper, and one for what the paper does not say."""
    parts = []
    for section, of_it in groupby(claims, lambda claim: claim.section):
        head = "Not in the paper" if section == OURS else f"The paper concludes ({section})"
        lines = [claim_text(claim, results) for claim in of_it]
        parts.append(f"{head}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def section_text(script: ModuleType, results: Results, seeds: int) -> str:
    return (
        f"## {script.TITLE}\n\n`python -m paper.{Path(script.__file__).stem} --seeds {seeds}`\n\n"
        f"{script.text(results).strip()}\n\n{claims_text(script.CLAIMS, results)}\n"
    )


def bars(axis, places: list[float], values: list[np.ndarray], width: float, **style) -> None:
    """Bars of means over seeds, with their standard deviations."""
    spread = [each.std(ddof=1) if len(each) > 1 else 0 for each in values]
    axis.bar(places, [each.mean() for each in values], width, yerr=spread, **style)


def draw(script: ModuleType, results: Results, folder: Path) -> None:
    """A script's picture, if it has one and matplotlib is installed."""
    if not hasattr(script, "draw"):
        return
    try:
        import matplotlib
    except ImportError:
        return print(f"{script.PICTURE} is not drawn: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    script.draw(axes, results)
    options = dict(format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    with replacing(folder / script.PICTURE) as temporary:
        figure.savefig(temporary, **options)
    pyplot.close(figure)
    print(f"saved {folder / script.PICTURE}")


def results_of(scripts: list[ModuleType], seeds: int, processes: int) -> Results:
    """Make what is not there yet, then look results up."""
    systems = list(dict.fromkeys(system for script in scripts for system in script.SYSTEMS))
    make([job for seed in range(seeds) for job in jobs_for(systems, seed)], processes)
    kept = [Kept(seed) for seed in range(seeds)]
    found = {system: [each.measured(system) for each in kept] for system in systems}
    return lambda system, metric: np.array(
        [metrics[metric] for metrics in found[system]], dtype=float
    )


def parse_arguments(description: str, results: Path) -> argparse.Namespace:
    parser = ArgumentParser(description=description)
    add_seeds(parser)
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="networks to train at a time, one thread each (default: one for each core)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results,
        metavar="FOLDER",
        help=f"where pictures go, and the results of all scripts together (default {results.name})",
    )
    args = parser.parse_args()
    if args.results.exists() and not args.results.is_dir():
        raise UsageError(f"--results {args.results}: not a folder")
    args.results.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
    return args


def add_seeds(parser: argparse.ArgumentParser) -> None:
    seeds = number(int, 0, "whole number from 1 to 100", 101)
    parser.add_argument(
        "--seeds", type=seeds, default=3, metavar="N", help="worlds 0 to N-1 (default 3)"
    )


def run(script: ModuleType) -> None:
    """What one script does: make what it needs, print its section, save its picture."""
    args = parse_arguments(script.__doc__.split("\n\n")[0], Path("out"))
    results = results_of([script], args.seeds, args.processes)
    print(section_text(script, results, args.seeds))
    draw(script, results, args.results)


def made_on() -> str:
    """For the head of a page."""
    return f"Made on {datetime.date.today()}, on {machine(device_here())}."
