"""Figure 4 (Section 6): a value network plugged into bases with another tokenizer, through the
paper's map and better ones.

python -m paper.fig4
"""

import sys

import numpy as np

from paper.networks import CURRICULUM_M, FOREIGN, ON_M
from paper.report import OURS, Claim, Results, bars, bases_table, run
from run.cli import run_cli

TITLE = "Figure 4: another vocabulary"
PICTURE = "fig4.png"
VALUES = {"plain": ON_M, "norm": f"{ON_M}-l1-1", "curriculum": CURRICULUM_M}  # all from tiny-m
METRICS = ["exact", "ins"]
FULL = {base: f"full-{base}" for base in FOREIGN}
SAME = {base: f"{base} + value-residual-{base[:-1]}m" for base in FOREIGN}
COMPARED = [
    ("plain", "dtw"),
    ("plain", "offsets"),
    *((name, how) for how in ("paper", "pieces") for name in VALUES),
]
MAPPED = {
    (base, name, how): f"{base} + {VALUES[name]} via {how}"
    for base in FOREIGN
    for name, how in COMPARED
}
SYSTEMS = [*FOREIGN, *FULL.values(), *SAME.values(), *MAPPED.values()]
ALL_OF_IT = 0.95  # of what the same-vocabulary value network reaches


def mean(results: Results, systems: dict[str, str], metric: str) -> np.ndarray:
    """On each seed, the mean over both bases."""
    return np.mean([results(system, metric) for system in systems.values()], axis=0)


def mapped(results: Results, name: str, how: str, metric: str) -> np.ndarray:
    return mean(results, {base: MAPPED[base, name, how] for base in FOREIGN}, metric)


def mapped_curriculum(results: Results, metric: str) -> np.ndarray:
    return mapped(results, "curriculum", "paper", metric)


CLAIMS = [
    Claim(
        "Section 6",
        "Through the paper's map, the value network taught by a curriculum does best.",
        "`exact` via paper, mean over both bases, curriculum less the better of plain and norm",
        lambda results: (
            mapped_curriculum(results, "exact")
            - np.maximum(*(mapped(results, name, "paper", "exact") for name in ("plain", "norm")))
        ),
        "The paper's curriculum is of three bases up to 13B.",
    ),
    Claim(
        "Section 6",
        "With it the transferred model has grasped basic conversational abilities.",
        "`ins`, mean over both bases, curriculum via paper less half of the own family's",
        lambda results: mapped_curriculum(results, "ins") - 0.5 * mean(results, SAME, "ins"),
        "About half of the forms come out, and half is what the claim asks for.",
    ),
    Claim(
        "Section 6",
        "It underperforms a value network of the base's own vocabulary.",
        "`exact`, mean over both bases, own family less curriculum via paper",
        lambda results: mean(results, SAME, "exact") - mapped_curriculum(results, "exact"),
    ),
    Claim(
        "Section 6",
        "It underperforms full fine-tuning.",
        "`exact`, mean over both bases, full less curriculum via paper",
        lambda results: mean(results, FULL, "exact") - mapped_curriculum(results, "exact"),
    ),
    *(
        Claim(
            OURS,
            f"Through pieces a foreign value network keeps its effect: {base}, `{metric}`.",
            f"plain via pieces less {ALL_OF_IT:g} of the own family's",
            lambda results, base=base, metric=metric: (
                results(MAPPED[base, "plain", "pieces"], metric)
                - ALL_OF_IT * results(SAME[base], metric)
            ),
        )
        for base in FOREIGN
        for metric in ("exact", "ins")
    ),
]


def text(results: Results) -> str:
    rows = {
        "base alone": list(FOREIGN),
        "full fine-tuning": list(FULL.values()),
        "value network of its own family": list(SAME.values()),
    }
    for name, how in COMPARED:
        rows[f"{name} via {how}"] = [MAPPED[base, name, how] for base in FOREIGN]
    passes = []
    for base in FOREIGN:
        read = [results(MAPPED[base, name, "pieces"], "base passes").mean() for name in VALUES]
        passes.append(f"{base} {', '.join(f'{mean:.2f}' for mean in read)}")
    return f"""![Figure 4]({PICTURE})

The tokens of tiny-b-l are about as long as the value network's and cut elsewhere; those of tiny-c-m are shorter. Rows with
"via" are value networks from tiny-m: plain, with the norm, or taught by a curriculum of tiny-s and tiny-m. `paper` is
Algorithm 1 with Eq. (5). `dtw` has its counts without the normalisation, `offsets` counts shared bytes, both also with Eq.
(5). All three count in the demonstrations. `pieces` needs no text: it sums over the base's ways to write the value
network's tokens.

{bases_table(results, list(FOREIGN), rows, METRICS)}

Base passes a token via pieces (plain, norm, curriculum): {"; ".join(passes)}.

The paper only draws the figure. Its authors' notebooks have the numbers (MT-Bench, on Llama-3-8B): full fine-tuning 7.23,
the curriculum through the map 3.85, a value network of Llama-3.2-1B 4.79, and with the norm 5.16."""


def draw(axes, results: Results) -> None:
    for axis, base in zip(axes, FOREIGN):
        systems = {"full": (FULL[base], "tab:blue"), "same\nvocabulary": (SAME[base], "tab:green")}
        for how, colour in (("pieces", "purple"), ("paper", "tab:grey")):
            systems |= {f"{how}\n{name}": (MAPPED[base, name, how], colour) for name in VALUES}
        for place, (system, colour) in enumerate(systems.values()):
            bars(axis, [place], [results(system, "exact")], 0.7, color=colour)
        axis.set(xticks=range(len(systems)), title=f"exact on {base}, evaluation people")
        axis.set_xticklabels(systems, fontsize=7)


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
