"""Sums of value networks: one for forms (A), one for sums of numbers (B), and both at once.

    python -m paper.sums                        # three seeds; paper.rewards writes the page of both

B is trained on the base alone, or made for A: on a base that A guides already (train.py --with).
"""

import sys
from pathlib import Path

import numpy as np

from paper.networks import (
    ALL_ON_TOP,
    FORMS,
    NEVER,
    ON_TOP,
    OWN_ON_TOP,
    QUIET,
    SECOND,
    SHOWN,
    SUMS,
    THIRD,
    VALUE,
    L,
    S,
)
from paper.own_answers import COUNT
from paper.report import (
    OURS,
    Claim,
    Results,
    between,
    parse_arguments,
    percent,
    results_of,
    section_text,
    table,
)
from run.cli import run_cli

TITLE = "Sums of value networks"
BASES = [S, L]
# of two not made for each other: the largest product of `ins` and `arith` on seed 0's development
# people, of the sixteen pairs of .25, .5, .75 and 1 (tiny-s: .46 and .28)
WEIGHTS = "{} x 0.5 + {}"
VALUES = {
    "A: forms": FORMS,
    "B: sums": SUMS,
    "A + B, not made for A": f"{FORMS} + {SUMS}",
    "half of each": f"{FORMS} x 0.5 + {SUMS} x 0.5",
    "weights chosen on development people": WEIGHTS.format(FORMS, SUMS),
    "A + B, made for A": f"{FORMS} + {ON_TOP}",
    **{f"the same, `--l1 {l1:g}`": f"{FORMS} + {name}" for l1, name in QUIET.items()},
    **{f"also shown {share}% of A's data": f"{FORMS} + {name}" for share, name in SHOWN.items()},
    "also shown what base + A answers about others": f"{FORMS} + {OWN_ON_TOP}",
    "made for A, all demonstrations": f"{FORMS} + {ALL_ON_TOP}",
    "four forms": NEVER,
    "four forms + sums": f"{NEVER} + {SECOND}",
    "four forms + sums + two forms": f"{NEVER} + {SECOND} + {THIRD}",
    "one network, all demonstrations": VALUE,
}
SYSTEMS = [f"{base} + {value}" for base in BASES for value in VALUES.values()]
METRICS = ["exact", "ins", "arith"]


def on(base: str, network: str) -> str:
    """A and another network on a base."""
    return f"{base} + {FORMS} + {network}"


def kept(network: str) -> list:
    """A + this network has A's form and B's skill: three gaps, each of which has to be above 0."""
    return [
        between(on(S, network), f"{S} + {FORMS}", "ins", 0.05),
        between(on(L, network), f"{L} + {FORMS}", "ins", 0.10),
        between(on(S, network), f"{S} + {VALUE}", "arith", -0.20),
    ]


def least(network: str):
    """The least of the three gaps on each seed."""
    return lambda results: np.min([gap(results) for gap in kept(network)], axis=0)


BOTH = (
    "the smallest of three gaps: `ins` - A's `ins` + 5 on tiny-s; `ins` - A's `ins` + 10 on tiny-l; `arith` - "
    "one network's `arith` - 20 on tiny-s"
)
CLAIMS = [
    Claim(
        OURS,
        "Networks not made for each other speak over each other.",
        "`arith` on tiny-s, B less A + B",
        between(f"{S} + {SUMS}", on(S, SUMS), "arith"),
    ),
    Claim(
        OURS,
        "Made for A, B adds its skill.",
        "`arith` on tiny-s, A + B made for A less not",
        between(on(S, ON_TOP), on(S, SUMS), "arith"),
    ),
    Claim(
        OURS,
        "Shown sums alone, it spoils A's form.",
        "`ins` on tiny-s, A less A + B",
        between(f"{S} + {FORMS}", on(S, ON_TOP), "ins"),
    ),
    Claim(
        OURS,
        "The norm keeps more of A's form.",
        f"`ins` on tiny-s, A + B with `--l1 {max(QUIET):g}` less without",
        between(on(S, QUIET[max(QUIET)]), on(S, ON_TOP), "ins"),
    ),
    *(
        Claim(OURS, f"Shown {data}, A + B has both.", measured, least(network))
        for data, measured, network in (
            ("1% of A's data", BOTH, SHOWN[1]),
            ("5% of it", "the same", SHOWN[5]),
            ("what base + A answers about others", "the same", OWN_ON_TOP),
        )
    ),
    Claim(
        OURS,
        "A third network adds two forms: both together come within .05 of one network.",
        "`ins` on tiny-s, three networks less one from all demonstrations, plus 5",
        between(f"{S} + {NEVER} + {SECOND} + {THIRD}", f"{S} + {VALUE}", "ins", 0.05),
    ),
    Claim(
        OURS,
        "And keeps the second's skill.",
        "`arith` on tiny-s, three networks less the first two, plus 5",
        between(f"{S} + {NEVER} + {SECOND} + {THIRD}", f"{S} + {NEVER} + {SECOND}", "arith", 0.05),
    ),
    Claim(
        OURS,
        "Two networks learn sums better than one.",
        "`arith` on tiny-s from all demonstrations, two less one",
        between(on(S, ALL_ON_TOP), f"{S} + {VALUE}", "arith"),
    ),
]


def text(results: Results) -> str:
    lines = [["", *(f"{base[5:]} `{metric}`" for base in BASES for metric in METRICS)]]
    for name, value in VALUES.items():
        cells = [
            percent(results(f"{base} + {value}", metric)) for base in BASES for metric in METRICS
        ]
        lines.append([name, *cells])
    return f"""{table(lines)}

Both networks began as copies of the base, and each learnt to turn its whole z_base into an answer. Added up, they do it
twice, and no weights bring B's sums back without losing the form. Made for A, B learns only what A lacks. The norm costs B
its skill, and does not reliably keep A's form. A few answers in A's form nearly do. They need not be A's data: base and A
answer {COUNT} other questions themselves, about people whom no demonstration mentions. Six in ten of these answers are
wrong, and they keep the form as well.

"Four forms" learnt all demonstrations but those of the two forms. On top of it come sums, and on top of both the two forms,
each time with such answers. So a third network adds what it was made for, and costs the others a little."""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    results = results_of([sys.modules[__name__]], args.seeds, args.processes)
    print(section_text(sys.modules[__name__], results, args.seeds))


if __name__ == "__main__":
    run_cli(main)
