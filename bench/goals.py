"""What the measurements on a GPU should come out as, read from the numbers that the scripts of bench/ write with --json.

python -m bench.gpu        # measures, and prints each goal and how far off it is
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.decode import ALONE, BOTH, SHAPES, bytes_a_step


@dataclass(frozen=True)
class Sizes:
    """What is measured; steps and goals are made of it."""

    rows: int  # supervised tokens, N
    vocabs: tuple[int, ...]
    trained: str  # shape of a value network in training, and of its base
    part: int  # tokens in a training step
    value: str  # while decoding: the value network,
    base: str  # a base,
    bigger: str  # and a bigger one
    tokens: tuple[int, ...]  # new ones, of which the first number is measured first


@dataclass(frozen=True)
class Goal:
    name: str
    sense: str  # "at least", "at most", "over" or "under"
    wanted: float
    form: str  # how its number is written
    read: Callable[
        [dict[str, dict]], float
    ]  # of every step's numbers; KeyError or NotMeasured where there are none


class NotMeasured(Exception):
    """Why a number is not there."""


def goals_for(sizes: Sizes) -> list[Goal]:
    goals = [
        Goal("tests of the kernel against float64 that fail", "at most", 0, "{:.0f}", failed_tests),
        Goal(
            "answers that captured or compiled steps or speculation change",
            "at most",
            0,
            "{:.0f}",
            changed_answers,
        ),
    ]
    for V in sizes.vocabs:
        goals.append(
            Goal(
                f"V = {V}: kernel, of a copy's bytes/s, at 10 bytes a pair",
                "at least",
                0.8,
                "{:.1%}",
                functools.partial(share_of_copy, V=V),
            )
        )
        for peer, sense, wanted in [
            ("eager", "at least", 5),
            ("torch.compile", "over", 1),
            ("Liger, no norm", "over", 1),
        ]:
            goals.append(
                Goal(
                    f"V = {V}: kernel, times as fast as {peer}",
                    sense,
                    wanted,
                    "{:.2f}",
                    functools.partial(faster_than, V=V, peer=peer),
                )
            )
    pair, few, many = f"{sizes.value} + {sizes.base}", min(sizes.tokens), max(sizes.tokens)
    for name, sense, wanted, form, read in [
        (
            f"training {sizes.trained} on {sizes.trained}, GB at the peak",
            "under",
            24,
            "{:.2f}",
            training_peak,
        ),
        (
            f"{pair}, times as long as {sizes.base} alone, at worst",
            "at most",
            1.25,
            "{:.3f}",
            times_the_base,
        ),
        (f"{pair}, of a copy's bytes/s, at worst", "at least", 0.7, "{:.1%}", share_of_roof),
        (
            f"{pair}, longer a token at {many} tokens than at {few}",
            "at most",
            0.05,
            "{:.1%}",
            slow_down,
        ),
    ]:
        goals.append(Goal(name, sense, wanted, form, functools.partial(read, sizes=sizes)))
    return goals


def failed_tests(numbers: dict) -> float:
    counts = numbers["kernel"]
    if not counts:
        raise NotMeasured("the tests did not come to their end")
    return sum(count for word, count in counts.items() if word != "passed")


def changed_answers(numbers: dict) -> float:
    compared = numbers["twins"]
    for kind in ("captured steps", "compiled steps", "speculation"):
        if not any(name.startswith(kind) for name in compared):
            raise NotMeasured(f"{kind} not compared")
    return sum(row["differing"] for row in compared.values())


def seconds(results: dict, name: str) -> list[float]:
    """A contender's seconds in each round: of a call in bench.loss and bench.train, of a token in bench.decode."""
    if results[name]["failure"]:
        raise NotMeasured(f"{name}: {results[name]['failure']}")
    return results[name]["seconds"]


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of times taken side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def losses(numbers: dict, V: int) -> dict:
    """What bench.loss found at a vocabulary; {} if it did not come to it."""
    for size in numbers["loss"]["sizes"]:
        if size["vocab"] == V:
            return size
    return {}


def share_of_copy(numbers: dict, V: int) -> float:
    size = losses(numbers, V)
    moved = 10 * size["rows"] * V  # bytes, in bfloat16: each pair of logits twice, and a gradient
    return (
        moved
        / statistics.median(seconds(size["from_logits"], "ivl_loss"))
        / numbers["loss"]["copy_bandwidth"]
    )


def faster_than(numbers: dict, V: int, peer: str) -> float:
    results = losses(numbers, V)["from_logits"]
    return median_ratio(seconds(results, peer), seconds(results, "ivl_loss"))


def training_peak(numbers: dict, sizes: Sizes) -> float:
    results = numbers["train"]["pairs"][f"{sizes.trained} on {sizes.trained}"]
    seconds(results, "ours")  # that there is something
    return results["ours"]["peak"] / 1e9


def decoded(numbers: dict, sizes: Sizes) -> dict[int, dict]:
    """What was measured of the pair, by the number of tokens; KeyError if that of one number is not there."""
    return {
        count: numbers["decode"][f"{sizes.value} on {sizes.base}, {count} tokens, batch 1"]
        for count in sizes.tokens
    }


def times_the_base(numbers: dict, sizes: Sizes) -> float:
    return max(
        median_ratio(seconds(results, BOTH), seconds(results, ALONE))
        for results in decoded(numbers, sizes).values()
    )


def share_of_roof(numbers: dict, sizes: Sizes) -> float:
    shares = []
    for count, results in decoded(numbers, sizes).items():
        moved = sum(
            bytes_a_step(SHAPES[name], 1, count, 2) for name in (sizes.value, sizes.base)
        )  # bfloat16
        shares.append(
            moved / statistics.median(seconds(results, BOTH)) / numbers["decode"]["copy_bandwidth"]
        )
    return min(shares)


def slow_down(numbers: dict, sizes: Sizes) -> float:
    results = decoded(numbers, sizes)
    short, long = [
        statistics.median(seconds(results[count], BOTH))
        for count in (min(sizes.tokens), max(sizes.tokens))
    ]
    return long / short - 1


def judge(goal: Goal, numbers: dict[str, dict]) -> tuple[str, str]:
    """What was measured of a goal, and how far off it is."""
    try:
        value = goal.read(numbers)
    except NotMeasured as reason:
        return "", f"not measured ({reason})"
    except KeyError:
        return "", "not measured"
    met = {
        "at least": value >= goal.wanted,
        "at most": value <= goal.wanted,
        "over": value > goal.wanted,
        "under": value < goal.wanted,
    }[goal.sense]
    off = f" by {abs(value / goal.wanted - 1):.1%}" if goal.wanted else ""
    return goal.form.format(value), "met" if met else f"**missed{off}**"
