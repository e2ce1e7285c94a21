"""Section 4.2.1: lambda, the weight of the norm of z_delta, against transfer; and alpha, the weight
of z_delta itself.

python -m paper.norm
"""

import sys

from data.chat import ChatDataset, mean_supervised
from data.tiny_world import TEMPLATE
from data.tokenizer import load_tokenizer
from paper.networks import NORM, NORMS, VALUE, Kept, L, M, S
from paper.report import Claim, Results, bases_table, between, run, table, verdict
from run.cli import run_cli
from run.jobs import TINY_LIMIT

TITLE = "Section 4.2.1: the norm constraint"
PICTURE = "norm.png"
BASES = [S, M, L]
LAMBDAS = {0.0: VALUE, **{l1: f"{VALUE}-l1-{l1:g}" for l1 in NORMS}}
ALPHAS = [0.5, 0.75, 1.0, 1.5]


def weighted(base: str, alpha: float) -> str:
    return f"{base} + {VALUE}" if alpha == 1 else f"{base} + {VALUE} x {alpha:g}"


def gain(value: str, base: str, metric: str):
    """What a value network with the norm has over the one without."""
    return between(f"{base} + {value}", f"{base} + {VALUE}", metric)


def cost(value: str):
    """What instruction following it costs on tiny-l."""
    return between(f"{L} + {VALUE}", f"{L} + {value}", "ins")


def farther(value: str):
    """How much more knowledge it keeps on tiny-l than on tiny-s."""
    return lambda results: gain(value, L, "2-shot")(results) - gain(value, S, "2-shot")(results)


# What the paper says of the norm: a gap, by the value network that was trained with it.
CONCLUSIONS = {
    "more knowledge kept (`2-shot` on tiny-l)": lambda value: gain(value, L, "2-shot"),
    "more reasoning kept (`arith` on tiny-l)": lambda value: gain(value, L, "arith"),
    "less instruction following (`ins` on tiny-l)": cost,
    "more so on farther bases (`2-shot`, tiny-l less tiny-s)": farther,
    "better generalisation (`exact` on tiny-l)": lambda value: gain(value, L, "exact"),
}
METRICS = ["exact", "ins", "2-shot"]
SYSTEMS = [
    *BASES,
    *(f"{base} + {value}" for base in BASES for value in LAMBDAS.values()),
    *(weighted(base, alpha) for base in BASES for alpha in ALPHAS),
]
CLAIMS = [  # table1.py has those of knowledge, reasoning and instruction following
    Claim(
        "Section 4.2.1",
        "The norm improves generalisation to other bases.",
        "`exact` on tiny-l, lambda 1 less lambda 0",
        gain(NORM, L, "exact"),
        "The norm keeps knowledge and loses form; `exact` counts both.",
    ),
]


def supervised_positions() -> float:
    """How many positions of a demonstration are supervised, on average (seed 0)."""
    home = Kept(0).home
    dataset = ChatDataset(
        home / "demonstrations.jsonl", load_tokenizer(home / S), TEMPLATE, TINY_LIMIT
    )
    return mean_supervised([row for index in range(len(dataset)) for row in dataset.rows(index)])


def text(results: Results) -> str:
    supervised = supervised_positions()
    ends = [S, L]  # of what the claims compare
    lambdas = {
        f"lambda {l1:g}": [f"{base} + {value}" for base in ends] for l1, value in LAMBDAS.items()
    }
    judged = [["", *CONCLUSIONS]]
    for l1 in NORMS:
        gaps = [conclusion(LAMBDAS[l1])(results) for conclusion in CONCLUSIONS.values()]
        name = f"lambda {l1:g}, the paper's {l1 * TINY_LIMIT / supervised:.2g}"
        judged.append([name, *(f"{100 * gap.mean():+.1f}, {verdict(gap)}" for gap in gaps)])
    return f"""![lambda and alpha against transfer]({PICTURE})

Table 5's lambda is 1.0, as in every `norm` row on this page. The norm is a mean over the vocabulary, so each logit of a
small vocabulary feels more of it: lambda 1 over our 1024 logits is 31 times lambda 1 over Llama-2's 32000.

The paper also averages over all positions of padded rows; we average over the supervised ones. Padded to {TINY_LIMIT} tokens,
these demonstrations would have {supervised:.1f} supervised positions each. So beside a supervised position lambda 1 here weighs
like the paper's {TINY_LIMIT / supervised:.0f}, and the paper's 1 like {supervised / TINY_LIMIT:.2f} here. `train.py` prints the equivalent for every run. (`--l1-over all`
averages over all positions of a batch, without long padding.)

{bases_table(results, ends, lambdas, METRICS)}

The paper's conclusions about the norm at each strength. The first row weighs what the paper's norm weighs:

{table(judged)}

A bigger base knows more, and the norm leaves it that. The price is form. Where every base knew nearly all facts, in an
earlier world, no claim about the norm held.

The right half of the picture is ours, not the paper's: z_base + alpha * z_delta, with lambda 0."""


def draw(axes, results: Results) -> None:
    def line(axis, places, systems: list[str], metric: str, look: str, label: str = "") -> None:
        axis.plot(places, [results(each, metric).mean() for each in systems], look, label=label)

    for metric, style in [("exact", "-"), ("2-shot", "--"), ("ins", ":")]:
        for base, colour in zip(BASES, ["C0", "C1", "C2"]):
            normed = [f"{base} + {value}" for value in LAMBDAS.values()]
            scaled = [weighted(base, alpha) for alpha in ALPHAS]
            look = colour + style
            line(axes[0], range(len(LAMBDAS)), normed, metric, look, f"{base}, {metric}")
            line(axes[1], ALPHAS, scaled, metric, look)
    names = [f"{l1:g}" for l1 in LAMBDAS]
    axes[0].set(xticks=range(len(LAMBDAS)), xticklabels=names, xlabel="lambda")
    axes[1].set(xlabel="alpha")
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(2.25, 0.5))


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
