"""Do captured steps, compiled steps and speculation give the same answers as the plain way of
decoding, on this device?

    python -m bench.twins

Weights are random, in float32, so that near-ties are rare. An answer counts as differing if it
leaves the plain answer at a token where the two best logits are at least 1e-4 apart.
tests/test_decoding.py tests the same on a CPU with recorded operations; CUDA graphs can only be
tried on a GPU.
"""

import copy

import torch

from bench.decode import SHAPES, guided_on
from bench.measure import describe, device_here
from beyond.speculation import Speculative, gap_at_difference, speculate
from fast.graphs import CapturedGuided, CompiledGuided
from ivl import SumDelta, ValueModel
from model import Llama
from run.cli import ArgumentParser, positive_int, run_cli
from sample import Guided, generate

NEAR_TIE = 1e-4  # between two logits
LONGEST_PROMPT = 40


def network(shape: str, device: str) -> Llama:
    """Random weights as large as trained ones, or it would only repeat its last token."""
    with torch.device(device):
        made = Llama(SHAPES[shape]).requires_grad_(False)
    for matrix in made.parameters():
        if matrix.dim() > 1:
            matrix.normal_(std=1.7 / matrix.shape[1] ** 0.5)
    return made


def perturbed(base: Llama) -> Llama:
    """A draft network: nearly the base, but not the same."""
    draft = copy.deepcopy(base)
    for matrix in draft.parameters():
        if matrix.dim() > 1:
            matrix += 0.03 * matrix.std() * torch.randn_like(matrix)
    return draft


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens."""
    lengths = torch.randint(1, LONGEST_PROMPT + 1, (count,)).tolist()
    return [torch.randint(3, vocab_size, (length,)).tolist() for length in lengths]


def compare(
    what: str, guided: Guided, prompts: list, plain: list[list[int]], others: list[list[int]]
) -> None:
    """Print how many answers differ from the plain ones."""
    gaps = [
        gap_at_difference(guided, prompt, one, other)
        for prompt, one, other in zip(prompts, plain, others)
        if one != other
    ]
    ties = sum(gap < NEAR_TIE for gap in gaps)
    of = f"{len(prompts)} answers, {sum(map(len, plain))} tokens"
    print(f"{what}: {len(gaps) - ties} of {of} differ; {ties} more at a near-tie", flush=True)


@torch.inference_mode()
def compare_all(value: str, base: str, count: int, tokens: int, device: str) -> None:
    big, small = network(base, device), network(value, device)
    prompts = random_prompts(count, SHAPES[base].vocab_size)
    options = dict(max_new_tokens=tokens, stop_ids=set())
    # captured and compiled steps, one text and several at a time
    plugs = {
        "no value network": None,
        "residual": ValueModel(small),
        "cascade+": ValueModel(small, {"scheme": "cascade+"}),
        "proxy tuning": SumDelta([small, network(value, device)], [1.0, -1.0]),
    }
    for name, plug in plugs.items() if device == "cuda" else ():
        plain, ways = Guided(big, plug), {"captured": CapturedGuided(big, plug)}
        if name == "residual":  # a minute of compiling
            ways["compiled"] = CompiledGuided(big, plug)
        for asked in (prompts[:1], prompts):
            expected = generate(plain, asked, **options)
            for how, guided in ways.items():
                what = f"{how} steps, {name}, {len(asked)} at a time"
                compare(what, plain, asked, expected, generate(guided, asked, **options))
    # speculation, by the steps that checkpoints take on this device, one text after the other and all at once
    plain, guided = Guided(big, plugs["residual"]), guided_on(device)(big, plugs["residual"])
    expected = [generate(plain, [prompt], **options)[0] for prompt in prompts]
    for draft, name in ((None, "z_delta alone"), (perturbed(big), "a base like it")):
        for batches in ([[prompt] for prompt in prompts], [prompts]):
            system = Speculative(guided, 4, draft)
            answers = [each for batch in batches for each in speculate(system, batch, **options)]
            share = system.accepted / system.tried
            what = f"speculation, {share:.0%} of {name} accepted, {len(batches[0])} at a time"
            compare(what, plain, prompts, expected, answers)


def main():
    device = device_here()
    on_gpu = device == "cuda"
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pair", nargs=2, choices=SHAPES, help="value network and base")
    parser.add_argument("--prompts", type=positive_int, default=8, help="(default 8)")
    parser.add_argument("--tokens", type=positive_int, default=300 if on_gpu else 30)
    parser.set_defaults(pair=("23M", "110M") if on_gpu else ("tiny-s", "tiny-l"))
    args = parser.parse_args()
    value, base = args.pair
    print(f"{describe(device)}, float32, a {value} value network on a {base} base\n")
    if not on_gpu:
        print("captured and compiled steps: not here; they are CUDA graphs, which take a GPU\n")
    torch.manual_seed(0)
    compare_all(value, base, args.prompts, args.tokens, device)


if __name__ == "__main__":
    run_cli(main)
