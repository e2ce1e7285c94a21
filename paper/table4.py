"""Table 4 (Appendix D): proxy tuning, which subtracts a small untuned model from a small tuned one, against ours.

python -m paper.table4
"""

import sys

from paper.networks import VALUE, L, M, S
from paper.report import OURS, STAND_INS, Claim, Results, between, percent, run, table
from run.cli import run_cli

TITLE = "Table 4: comparison with proxy tuning"
VALUED, PROXY = ({base: f"{base} + {plug}" for base in (M, L)} for plug in (VALUE, f"proxy-{S}"))
SYSTEMS = [*VALUED.values(), *PROXY.values()]
PAPER = {
    "MT-Bench": (4.62, 4.65),
    "ARC": (42.7, 40),
    "Hellaswag": (55, 50.4),
    "MMLU": (43.2, 44.4),
    "TruthfulQA": (31.1, 33.4),
    "Winogrande": (66.2, 66.7),
}
COMPARABLE = 0.05  # how much worse may still be called comparable: two standard errors of a difference, over three seeds, of questions asked once
CLAIMS = [
    Claim(
        "Appendix D",
        "A value network is comparable to proxy tuning.",
        f"`exact` on tiny-m, ours less proxy tuning, plus {100 * COMPARABLE:g}",
        lambda results: results(VALUED[M], "exact") - results(PROXY[M], "exact") + COMPARABLE,
    ),
    Claim(
        "Appendix D",
        "The same, in few-shot questions.",
        f"`2-shot` on tiny-m, ours less proxy tuning, plus {100 * COMPARABLE:g}",
        lambda results: results(VALUED[M], "2-shot") - results(PROXY[M], "2-shot") + COMPARABLE,
    ),
    Claim(
        OURS,
        "It is not only comparable but better.",
        "`exact` on tiny-m, ours less proxy tuning",
        between(VALUED[M], PROXY[M], "exact"),
    ),
    Claim(
        OURS,
        "The same on the biggest base.",
        "`exact` on tiny-l, ours less proxy tuning",
        between(VALUED[L], PROXY[L], "exact"),
    ),
]


def text(results: Results) -> str:
    systems = {
        f"{base} + {plug}": by_base[base]
        for base in (M, L)
        for plug, by_base in [("value", VALUED), ("proxy", PROXY)]
    }
    rows = [
        [
            column,
            *(f"{value:g}" for value in theirs),
            f"`{STAND_INS[column]}`",
            *(percent(results(system, STAND_INS[column])) for system in systems.values()),
        ]
        for column, theirs in PAPER.items()
    ]
    rows.append(
        [
            "forward passes a token",
            "2",
            "3",
            "",
            *(f"{results(system, 'passes')[0]:.0f}" for system in systems.values()),
        ]
    )
    return (
        table(["", "paper: 7B+1.1B", "paper: 7B+1.1B+1.1B", "ours", *systems], rows)
        + "\n\nThe expert is tiny-s after full fine-tuning, the anti-expert tiny-s before it."
    )


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
