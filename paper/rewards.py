"""Rewards in place of demonstrations: a form that few examples began is finished by rewards.

    python -m paper.rewards                     # three seeds, as committed in paper/REWARDS.md

The paper has no rewards, so the claims are ours. Networks are trained on tiny-s, and plugged into
tiny-l as well. Trained networks are kept.
"""

import sys
from pathlib import Path

import numpy as np

from data.files import write_text
from paper import sums
from paper.networks import (
    FEW,
    MORE,
    NEVER,
    NEVER_REWARDED,
    OTHER_FORMS,
    RARE,
    RARE_FORMS,
    REWARDED,
    SLOWER,
    START,
    SUMS_REWARDED,
    VALUE,
    WITH_KL,
    Kept,
    L,
    S,
    networks_of,
)
from paper.report import (
    OURS,
    Claim,
    Results,
    between,
    made_on,
    parse_arguments,
    percent,
    results_of,
    section_text,
    table,
)
from run.cli import run_cli

TITLE = "Rewards"
BASES = [S, L]
VALUES = {
    f"start: {FEW} examples of two forms": START,
    "then rewards": REWARDED,
    "then rewards, half of them for the two forms": RARE,
    "the same, `--lr 1e-4`": SLOWER,
    "the same, `--beta 0.01`": WITH_KL,
    "then demonstrations, as long": MORE,
    "all demonstrations": VALUE,
    "start: no example": NEVER,
    "then rewards, never earned": NEVER_REWARDED,
    "all demonstrations, then rewards on sums": SUMS_REWARDED,
}
SYSTEMS = [f"{base} + {value}" for base in BASES for value in VALUES.values()]
METRICS = {S: ["exact", "ins", "arith", "fk"], L: ["exact", "ins"]}


def rare(results: Results, system: str) -> np.ndarray:
    """`ins` of the two forms, the mean."""
    return np.mean([results(system, f"ins {form}") for form in RARE_FORMS], axis=0)


def most_lost(results: Results, base: str, value: str) -> np.ndarray:
    """How much `ins` the other form lost that lost most since the start."""
    gaps = [
        results(f"{base} + {START}", f"ins {form}") - results(f"{base} + {value}", f"ins {form}")
        for form in OTHER_FORMS
    ]
    return np.max(gaps, axis=0)


CLAIMS = [
    Claim(
        OURS,
        "Rewards finish a form that few examples began.",
        "`ins` on tiny-s, rewards less start",
        between(f"{S} + {REWARDED}", f"{S} + {START}", "ins"),
    ),
    Claim(
        OURS,
        "As many core-seconds of demonstrations do less.",
        "`ins` on tiny-s, rewards less demonstrations",
        between(f"{S} + {REWARDED}", f"{S} + {MORE}", "ins"),
    ),
    Claim(
        OURS,
        "Demonstrations cost more knowledge.",
        "`fk` on tiny-s, rewards less demonstrations",
        between(f"{S} + {REWARDED}", f"{S} + {MORE}", "fk"),
    ),
    Claim(
        OURS,
        "Rewards transfer: tiny-l comes within .05 of all demonstrations.",
        "`exact` on tiny-l, rewards less all demonstrations, plus 5",
        between(f"{L} + {REWARDED}", f"{L} + {VALUE}", "exact", 0.05),
    ),
    Claim(
        OURS,
        "What is never sampled is not learnt.",
        "5 - the gain of the two forms on tiny-s, if there was no example",
        lambda results: (
            0.05 - rare(results, f"{S} + {NEVER_REWARDED}") + rare(results, f"{S} + {NEVER}")
        ),
    ),
    Claim(
        OURS,
        "Rewards on sums help with new sums.",
        "`arith` on tiny-s, with them less without",
        between(f"{S} + {SUMS_REWARDED}", f"{S} + {VALUE}", "arith"),
    ),
    Claim(
        OURS,
        "On tiny-l no other form loses more than .10.",
        '10 - "lost"',
        lambda results: 0.10 - most_lost(results, L, REWARDED),
    ),
    Claim(
        OURS,
        "It loses more if half of the questions ask for the two forms.",
        '"lost" on tiny-l, half less all alike',
        lambda results: most_lost(results, L, RARE) - most_lost(results, L, REWARDED),
    ),
    Claim(
        OURS,
        "In that case a third of the learning rate helps.",
        '"lost" on tiny-l, the usual learning rate less a third of it',
        lambda results: most_lost(results, L, RARE) - most_lost(results, L, SLOWER),
    ),
    Claim(
        OURS,
        "In that case the KL to the base helps.",
        '"lost" on tiny-l, without less with it',
        lambda results: most_lost(results, L, RARE) - most_lost(results, L, WITH_KL),
    ),
]


def text(results: Results) -> str:
    heads = [f"{base[5:]} `{metric}`" for base in BASES for metric in METRICS[base]]
    lines = [["", *heads, "l two forms", "l lost"]]
    for name, value in VALUES.items():
        cells = [
            percent(results(f"{base} + {value}", metric))
            for base in BASES
            for metric in METRICS[base]
        ]
        forms, lost = rare(results, f"{L} + {value}"), most_lost(results, L, value)
        lines.append([name, *cells, percent(forms), percent(lost)])
    return f"""{table(lines)}

Of "then rewards" and "half of them for the two forms" we chose the first, after seeing both rows."""


def core_minutes(seeds: int) -> float:
    """What training the networks of both scripts took, without the bases."""
    systems = [*SYSTEMS, *sums.SYSTEMS]
    networks = {name for system in systems for name in networks_of(system)} - {S, L}
    ledgers = [Kept(seed).ledger for seed in range(seeds)]
    seconds = sum(ledger[name]["core_seconds"] for ledger in ledgers for name in networks)
    return seconds / 60


def page(results: Results, seeds: int) -> str:
    return f"""# Rewards, and sums of value networks

The paper has neither; *Universal Reasoner* (UniR, arXiv 2505.19075) has both, for a module on a frozen backbone. Here the
module is a value network. A sum of z_deltas is a z_delta.

```
python train.py --base --value out/seed0/value-residual-tiny-s --loss reward --out out/seed0/rewarded
python train.py --base --value --with A --data FILE --out B        # B is made for a base that A guides
python sample.py --value A B --alpha 1 0.5
```

The guided base answers each question eight times. A right answer earns 1, and becomes likelier where others are wrong.
[data/README.md](../data/README.md) has the form of questions.

{made_on()}
The networks of this page take about {round(core_minutes(seeds), -1):.0f} core-minutes, besides the bases. s is tiny-s, l tiny-l. "Two forms": `ins` of
{" and ".join(f'"{form}"' for form in RARE_FORMS)} "Lost": of the four other forms, the largest fall of `ins` since the first row.
Questions are about evaluation people, by whom one choice was made, named below. [RESULTS.md](RESULTS.md) explains metrics
and verdicts.

{section_text(sys.modules[__name__], results, seeds)}
{section_text(sums, results, seeds)}"""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    results = results_of([sys.modules[__name__], sums], args.seeds, args.processes)
    write_text(args.results / "REWARDS.md", page(results, args.seeds))
    for script in (sys.modules[__name__], sums):
        print(section_text(script, results, args.seeds))
    print(f"saved {args.results / 'REWARDS.md'}")


if __name__ == "__main__":
    run_cli(main)
