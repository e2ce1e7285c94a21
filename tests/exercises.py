"""The exercises of EXERCISES.md, done: each edit in a copy of the code, its commands on seeds 0, 1 and 2, and what came out.

    python -m tests.exercises --home out              # all of them, about 25 minutes; out/ has seeds 0, 1 and 2
    python -m tests.exercises --home out --only 3 5   # some

`out/` is what `python train.py --seed S` and `python train.py --base tiny-l --seed S` leave there.
tests/test_house.py checks that the edits still fit the code.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = "train.py --base --value --no-full --seed {seed} --out out/seed{seed}/mine"
LOOK = "sample.py --value out/seed{seed}/mine"


@dataclass
class Exercise:
    """An edit, as what stands in a file and what stands there afterwards, and the commands that show it."""

    file: str
    before: str
    after: str
    commands: list[str]
    counts: list[str]  # metrics to count, of the last command's last line
    also: list[tuple[str, str]] = field(default_factory=list)  # further edits of the file
    fresh: bool = False  # without out/


EXERCISES = {
    "1": Exercise(
        "",
        "",
        "",
        [
            f"sample.py --value out/seed{{seed}}/value-residual-tiny-s --alpha {alpha}"
            for alpha in (0.5, 0.75, 1, 3)
        ],
        ["exact", "fk"],
    ),
    "2": Exercise(
        "sample.py",
        "            self.z_delta = self.value(tokens, self.z_base, value_caches)  # (B, T, Vv), Eq. (2)\n",
        "            self.z_delta = self.value(tokens, self.z_base, value_caches)  # (B, T, Vv), Eq. (2)\n"
        "            self.said += tokens.shape[1]\n"
        "            if self.said > 3:\n"
        "                self.z_delta = 0 * self.z_delta\n",
        ["sample.py --value out/seed{seed}/value-residual-tiny-s"],
        ["exact", "ins"],
        [
            (
                "        longest = max(map(len, prompts)) - 1\n",
                "        self.said = 0\n        longest = max(map(len, prompts)) - 1\n",
            )
        ],
    ),
    "3": Exercise(
        "ivl.py",
        "            z_base = base(tokens)  # (B, T, Vb), Eq. (1)",
        "            z_base = 0 * base(tokens)  # (B, T, Vb), Eq. (1)",
        [TRAIN, LOOK, LOOK + " --base tiny-l"],
        ["exact"],
    ),
    "4": Exercise(
        "ivl.py",
        "        return ivl_loss(z_base, z_delta, labels, l1, over)  # Eq. (4)",
        "        loss, metrics = ivl_loss(z_base, z_delta, labels)\n"
        "        return loss + l1 * z_delta[labels != -100].square().mean(), metrics",
        [TRAIN + " --l1 0.3", LOOK + " --base tiny-l"],
        ["exact", "fk"],
    ),
    "4, without the edit": Exercise(
        "", "", "", [TRAIN + " --l1 0.3", LOOK + " --base tiny-l"], ["exact", "fk"]
    ),
    "5": Exercise(
        "train.py",
        "    settings, processes = run.settings, run.processes\n",
        "    settings, processes = run.settings, run.processes\n    for name, parameter in network.named_parameters():\n"
        '        parameter.requires_grad_("layers.2." in name)\n',
        [TRAIN, LOOK],
        ["exact", "ins", "arith"],
    ),
    "6": Exercise(
        "data/chat.py",
        '        supervised += [role == "assistant"] * len(tokens)\n',
        "        supervised += [True] * len(tokens)\n",
        [TRAIN, LOOK],
        ["exact"],
    ),
    "7": Exercise(
        "data/tiny_world.py",
        '    "Begin with a dash.": "- {all}",\n',
        '    "Begin with a dash.": "- {all}",\n    "One word, twice.": "{one}. {one}.",\n',
        ["rm out/seed{seed}/demonstrations.jsonl", TRAIN, LOOK, LOOK + " --base tiny-l"],
        ["ins"],
    ),
    "8": Exercise(
        "model.py",
        "    angles = positions[..., None] * frequencies  #",
        "    angles = 0 * positions[..., None] * frequencies  #",
        ["train.py --no-full --seed {seed}"],
        ["exact", "fk"],
        fresh=True,
    ),
}


def edited(exercise: Exercise, house: Path) -> None:
    if exercise.file:
        text = (house / exercise.file).read_text(encoding="utf-8")
        for before, after in [(exercise.before, exercise.after), *exercise.also]:
            assert text.count(before) == 1, f"{exercise.file}: {before!r}"
            text = text.replace(before, after)
        (house / exercise.file).write_text(text, encoding="utf-8")


def metrics_of(output: str) -> dict[str, float]:
    """The last line of the last table in what a command printed."""
    lines = [line for line in output.splitlines() if "core-seconds" not in line]
    names = next(line.split() for line in reversed(lines) if line.split()[:1] == ["exact"])
    values = lines[-1].split()[-len(names) :]
    return dict(zip(names, map(float, values)))


def do(name: str, exercise: Exercise, home: Path, work: Path) -> None:
    """Print, for each of its commands that ends in a table, the metrics to count on each seed."""
    house = work / f"exercise-{name}"
    ignore = shutil.ignore_patterns("out", ".git", "venv", ".venv", "__pycache__")
    shutil.copytree(ROOT, house, ignore=ignore)
    edited(exercise, house)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(3):
        if not exercise.fresh:
            shutil.copytree(home / f"seed{seed}", house / f"out/seed{seed}")
        for command in exercise.commands:
            arguments = command.format(seed=seed).split()
            if arguments[0] == "rm":
                (house / arguments[1]).unlink()
                continue
            done = subprocess.run(
                [sys.executable, *arguments], cwd=house, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            found.setdefault(command, []).append(metrics_of(done.stdout))
    for command, seeds in found.items():
        shown = [
            f"{metric} {' '.join(f'{each[metric]:.3f}' for each in seeds)}"
            for metric in exercise.counts
        ]
        print(f"{name}: {command}: {', '.join(shown)}", flush=True)
    shutil.rmtree(house)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--home", type=Path, default=Path("out"), help="where seeds 0, 1 and 2 are (default out)"
    )
    parser.add_argument("--only", nargs="+", metavar="N", help="numbers of exercises")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/exercises"),
        help="where copies are made (default out/exercises)",
    )
    args = parser.parse_args()
    for name, exercise in EXERCISES.items():
        if not args.only or name.partition(",")[0] in args.only:
            do(name, exercise, args.home.resolve(), args.work)


if __name__ == "__main__":
    main()
