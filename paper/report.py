"""What the scripts of paper/ share: tables, claims, the one rule for verdicts, and what each does
when it is run.
"""

import argparse
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
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


def metric_table(results: Results, label: str, rows: dict[str, str], metrics: list[str]) -> str:
    """Rows of label -> system, with a column for each metric."""
    lines = [[label, *(f"`{metric}`" for metric in metrics)]]
    for name, system in rows.items():
        lines.append([name, *(percent(results(system, metric)) for metric in metrics)])
    return table(lines)


def claims_text(claims: list[Claim], results: Results) -> str:
    all_ours = all(claim.section == OURS for claim in claims)  # said once, above them
    lines = []
    for claim in claims:
        gaps = claim.gap(results)
        ours = verdict(gaps)
        numbers = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
        section = "" if all_ours else f" ({claim.section})"
        line = f"- **{ours[0].upper() + ours[1:]}**: {claim.says}{section}  \n"
        line += f"  {claim.measured}: {numbers}; mean {100 * gaps.mean():+.1f}."
        if ours in ("undecided", "does not hold") and claim.note:
            line += f" {claim.note}"
        lines.append(line)
    return "\n".join(lines)


def section_text(script: ModuleType, results: Results, seeds: int) -> str:
    ours = all(claim.section == OURS for claim in script.CLAIMS)
    head = "What we claim" if ours else "What the paper concludes"
    return (
        f"## {script.TITLE}\n\n`python -m paper.{Path(script.__file__).stem} --seeds {seeds}`\n\n"
        f"{script.text(results).strip()}\n\n"
        f"{head}, and whether it shows here:\n\n{claims_text(script.CLAIMS, results)}\n"
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
    folder.mkdir(parents=True, exist_ok=True)
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
