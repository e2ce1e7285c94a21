"""Section 4.2.1: lambda, the weight of the norm of z_delta, against transfer; and alpha, the weight of z_delta itself.

    python -m paper.norm
"""

import sys

from paper.networks import NORM, NORMS, VALUE, L, M, S
from paper.report import Claim, Results, between, percent, run, table
from run.cli import run_cli

TITLE = "Section 4.2.1: the norm constraint"
PICTURE = "norm.png"
BASES = [S, M, L]
LAMBDAS = {0.0: VALUE, **{l1: f"{VALUE}-l1-{l1:g}" for l1 in NORMS}}
ALPHAS = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def weighted(base: str, alpha: float) -> str:
    return f"{base} + {VALUE}" + f" x {alpha:g}" * (alpha != 1)


METRICS = ["exact", "ins", "2-shot"]
SYSTEMS = [*BASES, *(f"{base} + {value}" for base in BASES for value in LAMBDAS.values()),
           *(weighted(base, alpha) for base in BASES for alpha in ALPHAS)]
CLAIMS = [
    Claim("Sections 4.2.1, 5.4", "The norm keeps more of a stronger base's knowledge.",
          "`2-shot` on tiny-l, lambda 1 less lambda 0", between(f"{L} + {NORM}", f"{L} + {VALUE}", "2-shot")),
    Claim("Section 5.4", "It costs a little instruction following there.",
          "`ins` on tiny-l, lambda 0 less lambda 1", between(f"{L} + {VALUE}", f"{L} + {NORM}", "ins")),
    Claim("Section 4.2.1", "It improves generalisation to other bases.",
          "`exact` on tiny-l, lambda 1 less lambda 0", between(f"{L} + {NORM}", f"{L} + {VALUE}", "exact"),
          "On tiny-s and tiny-m it does, as the table shows; on tiny-l what is kept of knowledge is lost in manner. None of the "
          "smaller lambdas is better there."),
]


def text(results: Results) -> str:
    header = ["", *(f"`{metric}` {base}" for metric in METRICS for base in BASES)]

    def row(name, system_on):
        return [name, *(percent(results(system_on(base), metric)) for metric in METRICS for base in BASES)]

    lambdas = [row(f"lambda {l1:g}", lambda base, value=value: f"{base} + {value}") for l1, value in LAMBDAS.items()]
    alphas = [row("alpha 0 (base alone)", lambda base: base)]
    alphas += [row(f"alpha {alpha:g}", lambda base, alpha=alpha: weighted(base, alpha)) for alpha in ALPHAS]
    return f"""![lambda and alpha against transfer]({PICTURE})

Table 5's lambda is 1.0, and so is that of every `norm` row in these tables. The norm is a mean over the vocabulary, so
each logit feels more of it in a small one: lambda 1 over our 1024 logits is 31 times lambda 1 over Llama-2's 32000.

What lambda weighs beside a supervised position depends on what the norm is averaged over, too: in the paper all positions of rows padded
to their longest, here the supervised ones, 10.2 of 256 in these demonstrations. So lambda 1 presses like the paper's lambda 25, and the
paper's 1 like 0.04 here. At that strength, the row of 0.03, nothing changes beyond the spread, neither knowledge nor manner: the four
conclusions about the norm are judged by a much stronger one (`train.py` prints the equivalent of every run; `--l1-over all` averages as the
paper does).

{table(header, lambdas)}

alpha is ours, not the paper's: z_base + alpha * z_delta, with the value network of lambda 0.

{table(header, alphas)}"""


def draw(pyplot, results: Results):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for metric, style in [("exact", "-"), ("2-shot", "--"), ("ins", ":")]:
        for base, colour in zip(BASES, ["tab:blue", "tab:orange", "tab:green"]):
            axes[0].plot(range(len(LAMBDAS)), [results(f"{base} + {value}", metric).mean() for value in LAMBDAS.values()], style,
                         color=colour, label=f"{base}, {metric}")
            axes[1].plot(ALPHAS, [results(weighted(base, alpha), metric).mean() for alpha in ALPHAS], style, color=colour)
    axes[0].set(xticks=range(len(LAMBDAS)), xticklabels=[f"{l1:g}" for l1 in LAMBDAS], xlabel="lambda")
    axes[1].set(xlabel="alpha")
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(2.25, 0.5))
    return figure


if __name__ == "__main__":
    run_cli(lambda: run(sys.modules[__name__]))
