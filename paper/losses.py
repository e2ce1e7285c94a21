"""Section 3.1's other losses: value networks trained by pairs and by a teacher on tiny-s, and plugged into bigger bases.

    python -m paper.losses                     # three seeds, as committed in paper/LOSSES.md

The paper names these losses and shows no results of them, so the claims are ours. What is trained is kept.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.chat import collate, encode_chat
from data.files import write_text
from data.tiny_world import TEMPLATE, World, pair_accuracy, prompt_text
from ivl import distillation_loss
from model import Llama
from paper.measure import load
from paper.networks import (
    DISTILLED,
    NORM,
    PAIRS,
    PAIRS_AFTER,
    PAIRS_AFTER_NORM,
    VALUE,
    Kept,
    L,
    M,
    S,
)
from paper.report import (
    OURS,
    Claim,
    Results,
    between,
    between_on,
    machine,
    parse_arguments,
    percent,
    results_of,
    section_text,
    table,
    today,
)
from run.cli import run_cli
from sample import score

TITLE = "Section 3.1: other losses"
BASES = [S, M, L]
TEACHER = "full-tiny-l"
VALUES = {
    "demonstrations": VALUE,
    "a teacher's probabilities": DISTILLED,
    "pairs alone": PAIRS,
    "pairs after demonstrations": PAIRS_AFTER,
    "demonstrations with the norm (lambda 1)": NORM,
    "pairs after the norm": PAIRS_AFTER_NORM,
}
SYSTEMS = [TEACHER, *BASES, *(f"{base} + {value}" for base in BASES for value in VALUES.values())]
METRICS = ["exact", "know", "ins", "arith", "fk", "pair"]
PREFERRED = 0.9  # of held-out pairs


CLAIMS = [
    Claim(
        OURS,
        "A distilled value network comes nearer to its teacher on bigger bases than one of demonstrations does.",
        "100 times the nats to the teacher, mean over tiny-m and tiny-l, demonstrations less distilled",
        between_on([M, L], VALUE, DISTILLED, "kl"),
    ),
    Claim(
        OURS,
        "It answers tiny-m's questions at least as well.",
        "`exact` on tiny-m, distilled less demonstrations",
        between(f"{M} + {DISTILLED}", f"{M} + {VALUE}", "exact"),
        "Within the spread, and not better: the teacher is a fine-tuned tiny-l, which itself has less `exact` than tiny-l guided by "
        "demonstrations.",
    ),
    Claim(
        OURS,
        "Distillation transfers: on tiny-l it brings the base nearer to the teacher.",
        "100 times the nats to the teacher, tiny-l alone less tiny-l + distilled",
        between(L, f"{L} + {DISTILLED}", "kl"),
    ),
    Claim(
        OURS,
        "Pairs transfer: on tiny-l the chosen answer of 9 held-out pairs in 10 is the likelier one.",
        f"`pair` on tiny-l, trained by pairs alone on tiny-s, less {100 * PREFERRED:g}",
        lambda results: results(f"{L} + {PAIRS}", "pair") - PREFERRED,
    ),
    Claim(
        OURS,
        "Pairs raise instruction following where the norm had lost it.",
        "`ins` on tiny-l, pairs after the norm less the norm alone",
        between(f"{L} + {PAIRS_AFTER_NORM}", f"{L} + {NORM}", "ins"),
        "`pair` rises, `ins` falls: which of two answers is better is learnt, at the cost of what the norm had left of manner.",
    ),
    Claim(
        OURS,
        "After demonstrations without the norm, too.",
        "`ins` on tiny-l, pairs after demonstrations less demonstrations alone",
        between(f"{L} + {PAIRS_AFTER}", f"{L} + {VALUE}", "ins"),
        "The same: demonstrations left hardly a pair wrong, so there was little to gain.",
    ),
]


@torch.inference_mode()
def measure_more(system: str, kept: Kept) -> dict[str, float]:
    """`pair`, and `kl`: nats from the teacher's next-token probabilities to the system's, over the right answers' tokens."""
    guided, tokenizer = load(system, kept, "cpu")
    teacher, world = Llama.from_pretrained(kept.home / TEACHER), World(kept.seed)
    rows = [
        encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item)), ("assistant", item.answer)])
        for item in world.fact_items("evaluation")
    ]
    tokens, labels = collate(rows)
    guided.logits(tokens)
    z_delta = torch.zeros_like(guided.z_base) if guided.z_delta is None else guided.z_delta
    _, metrics = distillation_loss(guided.z_base, z_delta, teacher(tokens), labels)
    return {
        "kl": metrics["kl"].item(),
        "pair": pair_accuracy(world, tokenizer, partial(score, guided), "evaluation"),
    }


def nats(values: np.ndarray) -> str:
    spread = f" ±{values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def text(results: Results) -> str:
    tables = []
    for base in BASES:
        systems = {"(the base alone)": base} | {
            name: f"{base} + {value}" for name, value in VALUES.items()
        }
        if base == L:
            systems["(the teacher)"] = TEACHER
        rows = [
            [
                name,
                *(percent(results(system, metric)) for metric in METRICS),
                nats(results(system, "kl")),
            ]
            for name, system in systems.items()
        ]
        tables.append(
            f"**On {base}**\n\n"
            + table(
                ["trained by", *(f"`{metric}`" for metric in METRICS), "nats to the teacher"], rows
            )
        )
    return "\n\n".join(tables)


def results_and_more(args) -> Results:
    """What paper/measure.py measures, and measure_more's metrics."""
    usual = results_of([sys.modules[__name__]], args.seeds, args.processes)
    more = {
        system: [measure_more(system, Kept(seed)) for seed in range(args.seeds)]
        for system in SYSTEMS
    }

    def results(system: str, metric: str) -> np.ndarray:
        if metric in ("kl", "pair"):
            return np.array([metrics[metric] for metrics in more[system]])
        return usual(system, metric)

    return results


def page(results: Results, seeds: int) -> str:
    return f"""# Other losses, in miniature

Made on {today()}, on {machine()}. Seeds: {", ".join(map(str, range(seeds)))}. Percentages, mean and standard
deviation over the seeds, on evaluation people, by whom nothing was chosen. The paper names these losses (Section 3.1, its third
advantage) and shows nothing of them, so the claims are ours; the rule for verdicts is [RESULTS.md](RESULTS.md)'s.

All value networks were trained on tiny-s, by the losses in `ivl.py`: {", ".join(VALUES)}. The teacher is tiny-l after full
fine-tuning. `exact`, `know`, `ins`, `arith` and `fk` are those of RESULTS.md; `pair` is the share of {len(World(0).pair_items("evaluation"))} held-out pairs of which the
answer in the form asked for is likelier than the same in another form; nats to the teacher are KL(p_teacher || p_post) over the tokens
of the right answers.

{section_text(sys.modules[__name__], results, seeds)}
On SmolLM2-135M (seed 0's development countries, `python train.py --base out/smollm2-135m --value
out/seed0/value-residual-smollm2-135m --loss pairwise --data capitals`: 150 pairs, 24 steps, once) base + value goes from `exact` .65, `know` .65,
`ins` .98 after demonstrations to .49, .59, .83 after pairs: of the pairs nearly all were right from the first step on, so there, too, there was little to
gain and some manner to lose.
"""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    torch.set_num_threads(1)
    results = results_and_more(args)
    args.results.mkdir(parents=True, exist_ok=True)
    write_text(args.results / "LOSSES.md", page(results, args.seeds))
    print(
        f"{section_text(sys.modules[__name__], results, args.seeds)}\nsaved {args.results / 'LOSSES.md'}"
    )


if __name__ == "__main__":
    run_cli(main)
