"""Section 3.1's other losses: value networks trained on tiny-s by pairs and by a teacher, plugged
into bigger bases.

    python -m paper.losses                     # three seeds, as committed in paper/LOSSES.md

The paper names these losses and shows no results of them, so the claims are ours. Trained networks
are kept.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.chat import encode_chat
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
    made_on,
    parse_arguments,
    percent,
    results_of,
    section_text,
    table,
)
from run.cli import run_cli
from sample import score
from train import collate

TITLE = "Section 3.1: other losses"
BASES = [S, L]  # tables are of these; claims are also about tiny-m
TEACHER = "full-tiny-l"
VALUES = {
    "demonstrations": VALUE,
    "a teacher's probabilities": DISTILLED,
    "pairs alone": PAIRS,
    "pairs after demonstrations": PAIRS_AFTER,
    "the norm": NORM,
    "pairs after the norm": PAIRS_AFTER_NORM,
}
SYSTEMS = [
    TEACHER,
    *BASES,
    *(f"{base} + {value}" for base in (S, M, L) for value in VALUES.values()),
]
METRICS = ["exact", "ins", "fk", "pair"]
PREFERRED = 0.9  # of held-out pairs


CLAIMS = [
    Claim(
        OURS,
        "On bigger bases a distilled value network comes nearer to the teacher than one of demonstrations.",
        "100 times the nats, mean of tiny-m and tiny-l, demonstrations less distilled",
        between_on([M, L], VALUE, DISTILLED, "kl"),
    ),
    Claim(
        OURS,
        "It answers tiny-m's questions at least as well.",
        "`exact` on tiny-m, distilled less demonstrations",
        between(f"{M} + {DISTILLED}", f"{M} + {VALUE}", "exact"),
        "The teacher itself has less `exact` than tiny-l with the value network of demonstrations.",
    ),
    Claim(
        OURS,
        "Distillation brings tiny-l nearer to the teacher.",
        "100 times the nats, tiny-l alone less distilled",
        between(L, f"{L} + {DISTILLED}", "kl"),
    ),
    Claim(
        OURS,
        "Pairs transfer: on tiny-l the chosen answer of 9 held-out pairs in 10 is the likelier one.",
        f"`pair` on tiny-l, pairs alone, less {100 * PREFERRED:g}",
        lambda results: results(f"{L} + {PAIRS}", "pair") - PREFERRED,
    ),
    Claim(
        OURS,
        "Pairs raise instruction following where the norm had lost it.",
        "`ins` on tiny-l, pairs after the norm less the norm",
        between(f"{L} + {PAIRS_AFTER_NORM}", f"{L} + {NORM}", "ins"),
        "The network learns which of two answers is better, and loses some of the form it had.",
    ),
    Claim(
        OURS,
        "After demonstrations without the norm, too.",
        "`ins` on tiny-l, pairs after demonstrations less demonstrations",
        between(f"{L} + {PAIRS_AFTER}", f"{L} + {VALUE}", "ins"),
        "Nearly all pairs are right before, so there is little to gain.",
    ),
]


@torch.inference_mode()
def measure_more(system: str, kept: Kept) -> dict[str, float]:
    """`pair`; and `kl`, nats from the teacher to the system over the right answers' tokens."""
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
    pair = pair_accuracy(world, tokenizer, partial(score, guided), "evaluation")
    return {"kl": metrics["kl"].item(), "pair": pair}


def text(results: Results) -> str:
    parts = []
    for base in BASES:
        systems = {"(the base alone)": base}
        systems |= {name: f"{base} + {value}" for name, value in VALUES.items()}
        if base == L:
            systems["(the teacher)"] = TEACHER
        lines = [["trained by", *(f"`{metric}`" for metric in METRICS), "nats"]]
        for name, system in systems.items():
            nats = results(system, "kl")
            spread = f"±{nats.std(ddof=1):.2f}" if len(nats) > 1 else ""
            cells = [percent(results(system, metric)) for metric in METRICS]
            lines.append([name, *cells, f"{nats.mean():.2f}{spread}"])
        parts.append(f"**On {base}**\n\n{table(lines)}")
    return "\n\n".join(parts)


def results_and_more(args) -> Results:
    """What paper/measure.py measures, and measure_more's metrics."""
    usual = results_of([sys.modules[__name__]], args.seeds, args.processes)
    seeds = [Kept(seed) for seed in range(args.seeds)]
    more = {system: [measure_more(system, kept) for kept in seeds] for system in SYSTEMS}

    def results(system: str, metric: str) -> np.ndarray:
        if metric in ("kl", "pair"):
            return np.array([metrics[metric] for metrics in more[system]])
        return usual(system, metric)

    return results


def page(results: Results, seeds: int) -> str:
    return f"""# Other losses, in miniature

The paper names losses other than the cross-entropy and gives no settings or results (Section 3.1, third advantage).
`ivl.py` has two:

- `--loss pairwise` learns from pairs: one question with a chosen and a rejected answer. It is DPO's loss; the policy is
  z_post, the reference is z_base, even where training starts from a value network.
- `--loss kl --teacher FOLDER` learns the next-token probabilities of a teacher, any model with the same vocabulary.

```
python train.py --base --value out/seed0/value-residual-tiny-s --loss pairwise --out out/seed0/pairs
python train.py --base tiny-l --full
python train.py --base --value --loss kl --teacher out/seed0/full-tiny-l --out out/seed0/distilled
```

[data/README.md](../data/README.md) describes files of pairs. Table 5's learning rate is high for pairs of a checkpoint;
begin with `--loss pairwise --data pairs.jsonl --lr 5e-6 --epochs 1` (not run here).

{made_on()}
[RESULTS.md](RESULTS.md) explains metrics and verdicts. Value networks were trained on tiny-s; "the norm" is
demonstrations with lambda 1. The teacher is tiny-l after full fine-tuning. `pair`: of {len(World(0).pair_items("evaluation"))} held-out pairs, those whose
chosen answer is likelier; the rejected one says the same in another form than the one asked for. "nats":
KL(p_teacher || p_post) over the tokens of the right answers.

{section_text(sys.modules[__name__], results, seeds)}"""


def main():
    args = parse_arguments(__doc__.split("\n\n")[0], Path(__file__).parent)
    torch.set_num_threads(1)
    results = results_and_more(args)
    write_text(args.results / "LOSSES.md", page(results, args.seeds))
    print(section_text(sys.modules[__name__], results, args.seeds))
    print(f"saved {args.results / 'LOSSES.md'}")


if __name__ == "__main__":
    run_cli(main)
