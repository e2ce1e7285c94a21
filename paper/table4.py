"""Table 4 (Appendix D): proxy tuning, which subtracts a small untuned model from a small tuned one,
against ours.

python -m paper.table4
"""

import sys

from paper.networks import VALUE, L, M, S
from paper.report import OURS, Claim, Results, between, run, stand_ins_table, table
from run.cli import run_cli

TITLE = "Table 4: comparison with proxy tuning"
VALUED = {base: f"{base} + {VALUE}" for base in (M, L)}
PROXY = {base: f"{base} + proxy-{S}" for base in (M, L)}
SYSTEMS = [*VALUED.values(), *PROXY.values()]
PAPER = {
    "MT-Bench": (4.62, 4.65),
    "ARC": (42.7, 40),
    "Hellaswag": (55, 50.4),
    "MMLU": (43.2, 44.4),
    "TruthfulQA": (31.1, 33.4),
    "Winogrande": (66.2, 66.7),
}
# How much worse still counts as comparable: two standard errors of a difference over three seeds,
# of questions asked once.
COMPARABLE = 0.05
CLAIMS = [
    Claim(
        "Appendix D",
        "A value network is comparable to proxy tuning.",
        f"`exact` on tiny-m, ours less proxy tuning, plus {100 * COMPARABLE:g}",
        between(VALUED[M], PROXY[M], "exact", COMPARABLE),
    ),
    Claim(
        "Appendix D",
        "The same, in few-shot questions.",
        f"`2-shot` on tiny-m, ours less proxy tuning, plus {100 * COMPARABLE:g}",
        between(VALUED[M], PROXY[M], "2-shot", COMPARABLE),
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
    systems = {}
    for base in (M, L):
        systems |= {f"{base} + value": VALUED[base], f"{base} + proxy": PROXY[base]}
    lines = stand_ins_table(results, systems, PAPER)
    passes = [f"{results(system, 'passes')[0]:.0f}" for system in systems.values()]
    lines.append(["forward passes a token", *passes])
    return f"""The expert is tiny-s after full fine-tuning, the anti-expert tiny-s before it. In brackets: the paper's 7B+1.1B (value) and
7B+1.1B+1.1B (proxy).

{table(lines)}"""


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
