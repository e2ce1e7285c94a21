"""Whether the fast ways of decoding say what the plain one says, on this device: captured and compiled steps, and speculation.

    python -m bench.twins

Weights are random, in float32, with which near-ties are rare: an answer counts as another one if it parts from the plain
answer where the two best logits are at least 1e-4 apart. tests/test_decoding.py asks the same of a CPU, where it replays
recorded operations; a CUDA graph is for a GPU to try.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from bench.decode import SHAPES, guided_on
from bench.measure import describe, save, table
from beyond.speculation import Speculative, gap_at_difference, speculate
from fast.graphs import CapturedGuided, CompiledGuided
from ivl import ProxyDelta, ValueModel
from model import Llama
from run.cli import ArgumentParser, positive_int, run_cli
from sample import Guided, generate

NEAR_TIE = 1e-4  # between two logits
LONGEST_PROMPT = 40


def network(shape: str, device: str) -> Llama:
    """Random weights as large as trained ones: with the first ones of training a network would repeat its last token."""
    with torch.device(device):
        made = Llama(SHAPES[shape]).requires_grad_(False)
    for matrix in made.parameters():
        if matrix.dim() > 1:
            matrix.normal_(std=1.7 / matrix.shape[1] ** 0.5)
    return made


def perturbed(base: Llama) -> Llama:
    """A draft that is close to a base, and is not the same."""
    draft = copy.deepcopy(base)
    for matrix in draft.parameters():
        if matrix.dim() > 1:
            matrix += 0.03 * matrix.std() * torch.randn_like(matrix)
    return draft


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens."""
    lengths = torch.randint(1, LONGEST_PROMPT + 1, (count,)).tolist()
    return [torch.randint(3, vocab_size, (length,)).tolist() for length in lengths]


def compared(
    guided: Guided, prompts: list[list[int]], plain: list[list[int]], others: list[list[int]]
) -> dict:
    """How many answers are others than the plain ones, and how many of those at a near-tie."""
    gaps = [
        gap_at_difference(guided, prompt, one, other)
        for prompt, one, other in zip(prompts, plain, others)
        if one != other
    ]
    ties = sum(gap < NEAR_TIE for gap in gaps)
    return {
        "answers": len(prompts),
        "tokens": sum(map(len, plain)),
        "differing": len(gaps) - ties,
        "near-ties": ties,
    }


@torch.inference_mode()
def compare_all(
    value: str, base: str, count: int, tokens: int, device: str, found: Callable[[str, dict], None]
) -> None:
    """Tell `found` of every comparison as it is made."""
    big, small = network(base, device), network(value, device)
    prompts = random_prompts(count, SHAPES[base].vocab_size)
    options = dict(max_new_tokens=tokens, stop_ids=set())
    # captured and compiled steps, one text and several at a time
    plugs = {
        "no value network": None,
        "residual": ValueModel(small),
        "cascade+": ValueModel(small, {"scheme": "cascade+"}),
        "proxy tuning": ProxyDelta(small, network(value, device)),
    }
    for name, plug in plugs.items() if device == "cuda" else ():
        plain, ways = Guided(big, plug), {"captured": CapturedGuided(big, plug)}
        if name == "residual":  # a minute of compiling
            ways["compiled"] = CompiledGuided(big, plug)
        for asked in (prompts[:1], prompts):
            expected = generate(plain, asked, **options)
            for how, guided in ways.items():
                answers = generate(guided, asked, **options)
                found(
                    f"{how} steps, {name}, {len(asked)} at a time",
                    compared(plain, asked, expected, answers),
                )
    # speculation, by the steps that checkpoints take on this device
    plain = Guided(big, plugs["residual"])
    answers = [generate(plain, [prompt], **options)[0] for prompt in prompts]
    system = Speculative(guided_on(device)(big, plugs["residual"]), perturbed(big), 4)
    drafted = speculate(system, prompts, **options)
    accepted = sum(system.accepted) / sum(system.tried)
    found(
        f"speculation, {accepted:.0%} of the draft accepted",
        compared(plain, prompts, answers, drafted),
    )


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--pair",
        nargs=2,
        choices=list(SHAPES),
        metavar="SHAPE",
        help=f"value network and base, of {', '.join(SHAPES)}",
    )
    parser.add_argument("--prompts", type=positive_int, default=8, metavar="N", help="(default 8)")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="new tokens of each (default 300, on a CPU 30)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value, base = args.pair or (("23M", "110M") if device == "cuda" else ("tiny-s", "tiny-l"))
    print(f"{describe(device)}, float32, a {value} value network on a {base} base\n")
    if device == "cpu":
        print(
            "captured and compiled steps: not here; both are CUDA graphs, and there is no CUDA device\n"
        )
    rows = {}

    def found(name: str, numbers: dict) -> None:
        rows[name] = numbers
        save(args.json, rows)

    torch.manual_seed(0)
    compare_all(
        value, base, args.prompts, args.tokens or (300 if device == "cuda" else 30), device, found
    )
    heads = ["", "answers", "tokens", "differing", "near-ties"]
    print(
        table(
            [heads]
            + [[name] + [str(row[head]) for head in heads[1:]] for name, row in rows.items()]
        )
    )


if __name__ == "__main__":
    run_cli(main)
