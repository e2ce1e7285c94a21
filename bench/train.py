"""A whole step of value training, tokens per second and peak memory: ours of fast/loss.py, against ValueModel.loss.

    python -m bench.train

Shapes are the true ones of TinyLlama and Llama-2-7B on a GPU, and small ones on a CPU; weights are random. A step is one
part of 4096 tokens (on a CPU 1024), every one supervised: the frozen base, the value network forward and back, gradient
clipping and AdamW. On a GPU bases are bfloat16, the value network computes in it, and its weights are float32.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from bench.measure import Result, compare, describe, ratio, save, table, times
from data.errors import UsageError
from fast.loss import value_loss
from ivl import ValueModel
from model import Llama, LlamaConfig
from run.cli import ArgumentParser, positive_int, run_cli
from train import Objective, accumulate_gradient

SHAPES = {  # as in the checkpoints' config.json: V, D, the MLP's width, layers, heads, heads of keys and values
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
    rows = [
        [
            "",
            "tokens/s",
            "ms (range)",
            "times faster than plain",
            "GB at the peak",
            "of it before the first step",
        ]
    ]
    plain = next(iter(results.values()))
    for name, result in results.items():
        if result.failure:
            rows.append([name, result.failure, "", "", "", ""])
        else:
            rows.append(
                [
                    name,
                    f"{tokens / result.median:.0f}",
                    times(result),
                    "" if plain.failure else ratio(result, plain),
                    f"{result.peak / 1e9:.2f}",
                    f"{(result.peak - result.growth) / 1e9:.2f}",
                ]
            )
    return table(rows)


def main():
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=positive_int, help="in a step; None: 4096, on a CPU 1024")
    parser.add_argument(
        "--pair", nargs=2, metavar="SHAPE", help=f"value network and base, of {', '.join(SHAPES)}"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="steps of each, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    for name in args.pair or []:
        if name not in SHAPES:
            raise UsageError(f"--pair {name}: no such shape; there are {', '.join(SHAPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, dtype = (
        args.tokens or (4096 if device == "cuda" else 1024),
        "bfloat16" if device == "cuda" else "float32",
    )
    print(f"{describe(device)}, {dtype}, {tokens} tokens a step\n")
    numbers = {"device": describe(device), "tokens": tokens, "pairs": {}}
    pairs = (
        [("TinyLlama", "TinyLlama"), ("TinyLlama", "Llama-2-7B")]
        if device == "cuda"
        else [("20M", "20M")]
    )
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
        numbers["pairs"][f"{value} on {base}"] = {
            name: vars(result) for name, result in results.items()
        }
        save(args.json, numbers)


if __name__ == "__main__":
    run_cli(main)
