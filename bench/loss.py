"""The loss at full size: how long it takes and how much memory it needs, beside its peers and its physical floor.

    python -m bench.loss                               # the sizes in bench/RESULTS.md, on a GPU if there is one
    python -m bench.loss --rows 512 --vocab 32000      # others

Two tables for each vocabulary. The first begins at logits and ends at the gradient of z_delta. Its floor is memory: per
pair of logits, the kernel moves both twice and a gradient once (10 bytes in bf16), and no program less than each once (6).
The second begins at hidden states and includes both heads, where never holding all logits (fast/loss.py) shows.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Result, compare, copy_bandwidth, describe, ratio, save, table, times
from fast.loss import faster_ivl_loss, value_loss_from_hidden
from run.cli import ArgumentParser, positive_int, run_cli

L1 = 1.0  # lambda of Table 5


def eager(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    """Eq. (4) with the norm as one writes it down; it counts nothing besides."""
    z_delta = z_delta.float()
    return F.cross_entropy(z_base.float() + z_delta, labels) + L1 * z_delta.abs().mean()


def liger(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's cross-entropy on the summed logits. It has no norm, so this computes less than the others."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(z_base + z_delta, labels)


def ours(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    return faster_ivl_loss(z_base, z_delta, labels, L1)[0]


def from_logits(
    loss: Callable, compiled: bool, N: int, V: int, dtype: torch.dtype
) -> Callable[[], None]:
    """A step from logits (N, V) to z_delta's gradient."""
    z_base, z_delta = (
        torch.randn(N, V, dtype=dtype),
        torch.randn(N, V, dtype=dtype).requires_grad_(),
    )
    labels = torch.randint(V, (N,))
    if compiled:
        loss = torch.compile(loss)

    def step():
        z_delta.grad = None
        loss(z_base, z_delta, labels).backward()

    return step


def from_hidden(
    loss: Callable, chunked: bool, N: int, V: int, D: int, dtype: torch.dtype
) -> Callable[[], None]:
    """A step from hidden states (N, D) to the gradients of the value network's hidden states and head."""
    h_base, h_value = (
        torch.randn(N, D, dtype=dtype),
        torch.randn(N, D, dtype=dtype).requires_grad_(),
    )
    W_base, W_value = [(torch.randn(V, D) / D**0.5).to(dtype) for _ in range(2)]
    W_value.requires_grad_()
    labels = torch.randint(V, (N,))

    def step():
        h_value.grad = W_value.grad = None
        if chunked:
            value_loss_from_hidden(h_base, W_base, h_value, W_value, labels, L1)[0].backward()
        else:
            loss(h_base @ W_base.T, h_value @ W_value.T, labels).backward()

    return step


def show(results: dict[str, Result], size: int, bandwidth: float, from_logits: bool) -> str:
    """A table; `size` is the bytes of one tensor of logits. Shares of the copy bandwidth only where memory is the limit."""
    heads = ["", "ms (range)", "times faster than eager", "MB at the peak", "first call, s"]
    heads += ["of copy, 2 passes", "of copy, floor"] * from_logits
    rows = [heads]
    for name, result in results.items():
        if result.failure:
            rows.append([name, result.failure] + [""] * (len(heads) - 2))
            continue
        faster = "" if results["eager"].failure else ratio(result, results["eager"])
        row = [name, times(result), faster, f"{result.growth / 1e6:.0f}", f"{result.first:.1f}"]
        if from_logits:
            row += [
                f"{times_moved * size / result.median / bandwidth:.0%}" for times_moved in (5, 3)
            ]
        rows.append(row)
    return table(rows)


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--vocab",
        type=positive_int,
        nargs="+",
        metavar="V",
        help="vocabularies (default 32000 128256)",
    )
    parser.add_argument(
        "--rows",
        type=positive_int,
        metavar="N",
        help="supervised tokens (default 8192; on a CPU as many as fill 262 MB with logits)",
    )
    parser.add_argument(
        "--hidden",
        type=positive_int,
        metavar="D",
        help="width of the networks (default 2048, on a CPU 256)",
    )
    parser.add_argument("--only", choices=["logits", "hidden"], help="one of the two tables")
    parser.add_argument("--rounds", type=positive_int, default=7, help="(default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    D, calls = args.hidden or (2048 if device == "cuda" else 256), 10 if device == "cuda" else 1
    bandwidth = copy_bandwidth(device)
    print(f"{describe(device)}; a copy moves {bandwidth / 1e9:.1f} GB/s\n")
    numbers = {"device": describe(device), "copy_bandwidth": bandwidth, "sizes": []}
    for V in args.vocab or [32000, 128256]:
        N = args.rows or (8192 if device == "cuda" else 2048 * 32000 // V)
        size = f"N = {N}, V = {V}, {str(dtype).removeprefix('torch.')}, lambda = {L1}"
        logits = functools.partial(functools.partial, from_logits, N=N, V=V, dtype=dtype)
        hidden = functools.partial(functools.partial, from_hidden, N=N, V=V, D=D, dtype=dtype)
        contenders = {
            "logits": {"eager": logits(eager, False), "torch.compile": logits(eager, True)}
            | ({"Liger, no norm": logits(liger, False)} if device == "cuda" else {})
            | {"ivl_loss": logits(ours, False)},
            "hidden": {
                "eager": hidden(eager, False),
                "ivl_loss": hidden(ours, False),
                "value_loss_from_hidden": hidden(None, True),
            },
        }
        numbers["sizes"].append({"rows": N, "vocab": V, "hidden": D})
        for start in [args.only] if args.only else contenders:
            results = compare(contenders[start], device, args.rounds, calls)
            heading = {"logits": "From logits", "hidden": f"From hidden states, D = {D}"}[start]
            print(
                f"{heading}: {size}\n\n{show(results, N * V * dtype.itemsize, bandwidth, start == 'logits')}\n",
                flush=True,
            )
            numbers["sizes"][-1][f"from_{start}"] = {
                name: vars(each) for name, each in results.items()
            }
            save(args.json, numbers)


if __name__ == "__main__":
    run_cli(main)
