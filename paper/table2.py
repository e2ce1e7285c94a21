"""Table 2 (Section 6): a value network plain, with the norm, and trained on two bases in turn, on a
third base.

python -m paper.table2
"""

import sys

from paper.networks import CURRICULUM, NORM, VALUE, L
from paper.report import STAND_INS, Claim, Results, between, run, stand_ins_table, table
from run.cli import run_cli

TITLE = "Table 2: curriculum against norm"
ROWS = {
    "1.1B": f"{L} + {VALUE}",
    "1.1B norm": f"{L} + {NORM}",
    "1.1B curriculum": f"{L} + {CURRICULUM}",
}
PLAIN, NORMED, CURRICULAR = ROWS.values()
SYSTEMS = list(ROWS.values())
NO_STAND_IN = ("", "new exact")
PAPER = {  # 1.1B, norm, curriculum on Llama-2-70B
    "MT-Bench": (4.92, 5.37, 5.14),
    "IFEval": (16.6, 16.8, 15.7),
    "GSM8K": (12.4, 24.9, 15.8),
    "ToxiGen": (42.1, 70, 40.9),
    "MBPP": (27.9, 37.8, 31.7),
    "HumanEval": (20.4, 28.6, 25.5),
    "ARC": (52.6, 62.8, 57.7),
    "Hellaswag": (60.5, 66.7, 64.3),
    "MMLU": (68.4, 67.9, 68.4),
    "TruthfulQA": (31.6, 37.1, 36.2),
    "Winogrande": (77.3, 82.9, 73.2),
}
CLAIMS = [
    Claim(
        "Section 6",
        "A curriculum over several bases mitigates overfitting to the small one, as a regulariser does.",
        "`2-shot` on tiny-l, curriculum less plain",
        between(CURRICULAR, PLAIN, "2-shot"),
        "Half of the steps are on a tiny-m that is only twice as big.",
    ),
    Claim(
        "Section 6",
        "The same, in open-ended answers (MT-Bench 4.92 to 5.14).",
        "`exact` on tiny-l, curriculum less plain",
        between(CURRICULAR, PLAIN, "exact"),
        "The curriculum's other base, tiny-m, is much like the first: it has read the same kind of text.",
    ),
    Claim(
        "Section 6",
        "The norm keeps more than the curriculum does, at less cost.",
        "`2-shot` on tiny-l, norm less curriculum",
        between(NORMED, CURRICULAR, "2-shot"),
    ),
]


def text(results: Results) -> str:
    # nothing stands for ToxiGen, and tiny-l never read of the new people
    paper = {name: theirs for name, theirs in PAPER.items() if STAND_INS[name] not in NO_STAND_IN}
    lines = stand_ins_table(results, ROWS, paper)
    return f"""The paper's curriculum went from 1.1B over 7B to 13B, on the way to 70B. Ours goes from tiny-s to tiny-m, and is plugged
into tiny-l. As in the paper, all three take the same number of steps. In brackets: the paper's numbers on 70B. Nothing
stands for its ToxiGen, MBPP and HumanEval.

{table(lines)}"""


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
