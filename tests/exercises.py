"""The exercises of EXERCISES.md, done: each edit in a copy of the code, and what comes out.

    python -m tests.exercises                                       # all, about 25 core-minutes
    python -m tests.exercises --only 3 --seeds 0 --roundings avx2   # some

They start from the networks that `python -m tests.rounding --only default avx2 avx512` leaves in
out/rounding. What was done is kept in out/exercises, so a run that is stopped goes on; delete that
folder after a change of the code. tests/test_house.py checks that the edits still fit the code.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from data.files import read_json, write_text
from data.tiny_world import World
from paper.networks import DATA
from tests.rounding import HOME, RARE, ROOT, ROUNDINGS, by_frequency, measured, read_table, run

WORK = Path("out/exercises")
TRAIN = "train.py --base --value --no-full --seed {seed} --out out/seed{seed}/mine"
LOOK = "sample.py --value out/seed{seed}/mine --base tiny-l"
TRAIN_ON = (  # out/seedN/DATA.jsonl
    "train.py --base --value --held-out 0 --seed {{seed}} --data out/seed{{seed}}/{data}.jsonl "
    "--out out/seed{{seed}}/{out}"
)
BOTH = "sample.py --value out/seed{seed}/A out/seed{seed}/B --alpha"
LOOK_AT_THE_FIRST = "sample.py --value out/seed{seed}/value-residual-tiny-s"
ROWS = {
    "base": "tiny-s alone",
    "base+value": "tiny-s + value",
}  # sample.py's names for train.py's rows


@dataclass
class Exercise:
    """An edit: what stands in a file, what stands there afterwards, and commands that show it."""

    file: str
    before: str
    after: str
    commands: dict[
        str, str
    ]  # commands after one another; those with a name end in a table to count
    signs: list[tuple[str, str]]  # two numbers each, the first of which should be the greater
    also: list[tuple[str, str]] = field(default_factory=list)  # further edits of the file


# a line of Guided.logits
DELTA = (
    "            self.z_delta = self.value(tokens, self.z_base, value_caches)"
    "  # (B, T, Vv), Eq. (2)\n"
)

# Numbers are named "COMMAND: SYSTEM, METRIC"; "plain" is what the code gives before the edit.
EXERCISES = {
    "1": Exercise(
        "",
        "",
        "",
        {f"alpha {alpha}": f"{LOOK_AT_THE_FIRST} --alpha {alpha}" for alpha in (0.5, 3)},
        [
            ("plain: tiny-s + value, exact", "alpha 0.5: tiny-s + value, exact"),
            ("plain: tiny-s + value, ins", "alpha 0.5: tiny-s + value, ins"),
            ("alpha 0.5: tiny-s + value, fk", "plain: tiny-s + value, fk"),
            ("plain: tiny-s + value, fk", "alpha 3: tiny-s + value, fk"),
        ],
    ),
    "2": Exercise(
        "sample.py",
        DELTA,
        DELTA + "            self.said += tokens.shape[1]\n"
        "            if self.said > 3:\n"
        "                self.z_delta = 0 * self.z_delta\n",
        {"look": LOOK_AT_THE_FIRST},
        [
            ("plain: tiny-s + value, exact", "look: tiny-s + value, exact"),
            ("plain: tiny-s + value, ins", "look: tiny-s + value, ins"),
        ],
        [
            (
                "        longest = max(map(len, prompts)) - 1\n",
                "        self.said = 0\n        longest = max(map(len, prompts)) - 1\n",
            )
        ],
    ),
    "3, without the edit": Exercise(
        "",
        "",
        "",
        {"": f"{TRAIN} --l1 0.3", "look": LOOK},
        [("look: tiny-l + value, know", "plain: tiny-l + value, know")],
    ),
    "3": Exercise(
        "ivl.py",
        "            z_base = base(tokens)  # (B, T, Vb), Eq. (1)",
        "            z_base = 0 * base(tokens)  # (B, T, Vb), Eq. (1)",
        {"": f"{TRAIN} --l1 0.3", "look": LOOK},
        [
            (f"without the edit: tiny-l + value, {metric}", f"look: tiny-l + value, {metric}")
            for metric in ("exact", "fk")
        ]
        + [(f"without the edit: {RARE}", f"look: {RARE}")],
    ),
    "4": Exercise(
        "train.py",
        "    settings, processes = run.settings, run.processes\n",
        "    settings, processes = run.settings, run.processes\n"
        "    for name, parameter in network.named_parameters():\n"
        '        parameter.requires_grad_("layers.2." in name)\n',
        {"train": TRAIN},
        [
            ("plain: tiny-s + value, exact", "train: tiny-s + value, exact"),
            ("plain: tiny-s + value, ins", "train: tiny-s + value, ins"),
            ("train: tiny-s + value, ins", "train: tiny-s alone, ins"),
        ],
    ),
    "5": Exercise(
        "data/tiny_world.py",
        '    "Begin with a dash.": "- {all}",\n',
        '    "Begin with a dash.": "- {all}",\n    "One word, twice.": "{one}. {one}.",\n',
        {"train": TRAIN},
        [("train: tiny-s + value, ins", "train: tiny-s alone, ins")],
    ),
    "9": Exercise(
        "ivl.py",
        "    loss = -(advantages.flatten()[row] * log_p).sum() / count\n",
        "    loss = -(advantages.flatten()[row] * log_p).sum() / count\n"
        "    one_hot = F.one_hot(labels[supervised], z_post.shape[-1])\n"
        "    gradient = advantages.flatten()[row, None] * (z_post.softmax(-1) - one_hot) / count\n"
        "    loss = (gradient.detach() * z_post).sum()\n",
        {
            "train": "train.py --base --value out/seed{seed}/value-residual-tiny-s --loss reward "
            "--seed {seed} --out out/seed{seed}/mine"
        },
        [("train: tiny-s + value, ins", "train: tiny-s alone, ins")],
    ),
    "10": Exercise(
        "",
        "",
        "",
        {
            "": TRAIN_ON.format(data="forms", out="A"),
            " ": TRAIN_ON.format(data="sums-0", out="B"),
            "half": f"{BOTH} 0.5 0.5",
            "whole": f"{BOTH} 1 1",
        },
        [
            ("whole: tiny-s + value + value, ins", "half: tiny-s + value + value, ins"),
            ("half: tiny-s + value + value, arith", "whole: tiny-s + value + value, arith"),
        ],
    ),
}


def edited(exercise: Exercise, house: Path) -> None:
    if exercise.file:
        text = (house / exercise.file).read_text(encoding="utf-8")
        for before, after in [(exercise.before, exercise.after), *exercise.also]:
            assert text.count(before) == 1, f"{exercise.file}: {before!r}"
            text = text.replace(before, after)
        (house / exercise.file).write_text(text, encoding="utf-8")


def do(name: str, rounding: str, seed: int) -> dict[str, float]:
    """Every number of an exercise on one seed's networks, and those from before the edit."""
    exercise, kept = EXERCISES[name], WORK / f"{name}-{rounding}-{seed}.json"
    if not kept.is_file():
        house = WORK / f"house-{name}"
        shutil.rmtree(house, ignore_errors=True)
        ignore = shutil.ignore_patterns("out", ".*", "venv", "__pycache__", "demonstrations.jsonl")
        shutil.copytree(ROOT, house, ignore=ignore)
        shutil.copytree(
            HOME / rounding / f"out/seed{seed}", house / f"out/seed{seed}", ignore=ignore
        )
        edited(exercise, house)
        world = World(seed)
        for data in ("forms", "sums-0"):  # of exercise 10
            world.write_demonstrations(house / f"out/seed{seed}/{data}.jsonl", DATA[data](world))
        numbers = {}
        for label, command in exercise.commands.items():
            output = run(command.format(seed=seed), house, rounding, house.resolve())
            if label.strip():
                for row, metrics in read_table(output, "exact").items():
                    for metric, value in metrics.items():
                        numbers[f"{label}: {ROWS.get(row, row)}, {metric}"] = value
                if "--base tiny-l" in command:
                    for share, value in by_frequency(output).items():
                        numbers[f"{label}: {share}"] = value
        shutil.rmtree(house)
        write_text(kept, json.dumps(numbers, indent=2) + "\n")
    before = {f"plain: {key}": value for key, value in measured(rounding, seed).items()}
    if f"{name}, without the edit" in EXERCISES:
        without = do(f"{name}, without the edit", rounding, seed)
        before |= {key.replace("look:", "without the edit:"): without[key] for key in without}
    return before | read_json(kept)


def show(name: str, found: list[dict[str, float]]) -> None:
    """The range of each number, and whether each conclusion has the same sign everywhere."""
    signs = EXERCISES[name].signs
    for number in dict.fromkeys(number for pair in signs for number in pair):
        values = [numbers[number] for numbers in found]
        print(f"{name}: {number}: {min(values):.3f} to {max(values):.3f}")
    for greater, less in signs:
        gaps = [numbers[greater] - numbers[less] for numbers in found]
        verdict = "in all" if min(gaps) > 0 else f"NOT IN {sum(gap <= 0 for gap in gaps)}"
        print(
            f"{name}: {greater} above {less}: {verdict} of {len(gaps)}, by {min(gaps):.3f} or more"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=EXERCISES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for name in args.only or EXERCISES:
        found = []
        for rounding in args.roundings:
            for seed in args.seeds:
                found.append(do(name, rounding, seed))
                print(f"{name}: {rounding}, seed {seed}: done", flush=True)
        show(name, found)


if __name__ == "__main__":
    main()
