"""A whole step of value training, its tokens per second and peak memory: by fast/loss.py ("ours")
and by ValueModel.loss.

    python -m bench.train

On a GPU the networks have the shapes of TinyLlama and Llama-2-7B, on a CPU small ones; weights are
random. A step reads 4096 tokens (on a CPU 1024), all of them supervised: the frozen base, the value
network forward and back, gradient clipping and AdamW. On a GPU bases are bfloat16, and the value
network computes in bfloat16 with float32 weights.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from bench.measure import (
    Result,
    bench_parser,
    compare,
    describe,
    device_here,
    results_table,
    share,
    times,
)
from fast.loss import value_loss
from ivl import ValueModel
from model import Llama, LlamaConfig
from run.cli import positive_int, run_cli
from train import Objective, accumulate_gradient

# as in the checkpoints' config.json: V, D, the MLP's width, layers, heads, key-value heads
SHAPES = {
    "TinyLlama": LlamaConfig(32000, 2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    "Llama-2-7B": LlamaConfig(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "20M": LlamaConfig(
        32000, 256, 688, 4, 4, 4, max_position_embeddings=1024
    ),  # D = 256, most of it embedding and head
}


def training(
    loss: Callable, value: str, base: str, checkpointing: bool, tokens: int, dtype: str
) -> Callable[[], None]:
    """A step of training a value network of one shape on a base of another."""
    network = ValueModel(Llama(SHAPES[value]))
    network.network.model.gradient_checkpointing = checkpointing
    torch.set_default_dtype(getattr(torch, dtype))
    frozen = Llama(SHAPES[base]).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    objective = Objective(network, functools.partial(loss, l1=1.0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    T = min(tokens, *(SHAPES[name].max_position_embeddings for name in (value, base)))
    text = torch.randint(32000, (tokens // T, T + 1), device="cpu")  # as the loader gives them
    part = text[:, :-1], text[:, 1:]

    def step():
        accumulate_gradient(objective, frozen, [part], dtype)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def show(results: dict[str, Result], tokens: int) -> str:
    heads = ["tokens/s", "ms (range)", "times faster than plain"]
    heads += ["GB at the peak", "of it before the first step"]

    def cells(name: str, result: Result) -> list[str]:
        memory = [f"{size / 1e9:.2f}" for size in (result.peak, result.peak - result.growth)]
        faster = share(results["plain"].seconds, result.seconds)
        return [f"{tokens / result.median:.0f}", times(result), faster, *memory]

    return results_table(results, heads, cells)


def main():
    parser = bench_parser(__doc__, rounds=5)
    parser.add_argument("--tokens", type=positive_int, help="in a step (default 4096, CPU 1024)")
    parser.add_argument("--pair", nargs=2, choices=SHAPES, help="value network and base")
    args = parser.parse_args()
    device = device_here()
    tokens, dtype, pairs = 1024, "float32", [("20M", "20M")]
    if device == "cuda":
        tokens, dtype = 4096, "bfloat16"
        pairs = [("TinyLlama", "TinyLlama"), ("TinyLlama", "Llama-2-7B")]
    tokens = args.tokens or tokens
    print(f"{describe(device)}, {dtype}, {tokens} tokens a step\n")
    for value, base in [args.pair] if args.pair else pairs:
        step = functools.partial(
            functools.partial, training, value=value, base=base, tokens=tokens, dtype=dtype
        )
        contenders = {
            "plain": step(loss=ValueModel.loss, checkpointing=True),
            "ours": step(loss=value_loss, checkpointing=True),
            "ours, no gradient checkpointing": step(loss=value_loss, checkpointing=False),
        }
        results = compare(contenders, device, args.rounds, 1)
        print(f"A {value} value network on a {base} base\n\n{show(results, tokens)}\n", flush=True)


if __name__ == "__main__":
    run_cli(main)
