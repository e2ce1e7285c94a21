"""Draw what training runs logged: loss, the base's own cross-entropy and |z_delta|, against steps.

    python -m run.curves out/seed0/value-residual-tiny-s out/seed0/full-tiny-s
    python -m run.curves out/seed0/value-residual-tiny-s --out curves.csv       # the numbers

A folder is a finished run or one that still trains (OUT.training). Without matplotlib the numbers are
written in place of the picture. Each point is a mean over so many steps that a run has at most 200 points.
"""

import csv
import json
from pathlib import Path

from data.errors import UsageError
from run.cli import ArgumentParser, run_cli

POINTS = 200
DRAWN = {"loss": "loss", "base_ce": "cross-entropy of the base alone", "l1": "mean |z_delta|"}


def read_log(folder: Path) -> list[dict]:
    """The steps of a run, each a dict of numbers; of one that still trains the last line may be half there."""
    places = [folder / "log.jsonl", folder.with_name(f"{folder.name}.training") / "log.jsonl"]
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        raise UsageError(f"{folder}: no log.jsonl there, so it is no run of train.py that logged")
    steps = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            steps.append({"step": int(record["step"]), **record})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UsageError(f"{file}, line {number}: no step of a run") from None
    return steps


def curve(steps: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and means of a metric over equal stretches of them; nothing where the run has no such metric."""
    steps = [step for step in steps if name in step]
    size = -(-len(steps) // POINTS)
    stretches = [steps[first : first + size] for first in range(0, len(steps), size or 1)]
    x = [sum(step["step"] for step in stretch) / len(stretch) for stretch in stretches]
    y = [sum(step[name] for step in stretch) / len(stretch) for stretch in stretches]
    return x, y


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(4.5 * len(DRAWN), 3.2))
    for axis, (name, title) in zip(axes, DRAWN.items()):
        for run, steps in runs.items():
            x, y = curve(steps, name)
            if x:
                axis.plot(x, y, label=run, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def write_csv(runs: dict[str, list[dict]], out: Path) -> None:
    """A row for each step of each run, as it was logged."""
    names = list(dict.fromkeys(name for steps in runs.values() for step in steps for name in step))
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *names])
        writer.writeheader()
        for run, steps in runs.items():
            writer.writerows({"run": run, **step} for step in steps)


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a picture by its ending, or .csv (default out/curves.png; without matplotlib out/curves.csv)",
    )
    args = parser.parse_args()
    runs = {str(folder): read_log(folder) for folder in args.folders}
    try:
        import matplotlib  # noqa: F401

        default = Path("out/curves.png")
    except ImportError:
        default = Path("out/curves.csv")
        if args.out and args.out.suffix != ".csv":
            raise UsageError(f"--out {args.out}: a picture takes matplotlib; name a .csv") from None
    out = args.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    (write_csv if out.suffix == ".csv" else draw)(runs, out)
    print(f"{sum(map(len, runs.values())):,} steps of {len(runs)} runs -> {out}")


if __name__ == "__main__":
    run_cli(main)
