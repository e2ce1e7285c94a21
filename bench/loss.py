"""The loss at full size: its time and memory, beside other ways to compute it and beside a copy's
bytes per second.

    python -m bench.loss                              # the usual sizes, on a GPU if there is one
    python -m bench.loss --rows 512 --vocab 32000     # others
    python -m bench.loss --only settings              # the kernel with other BLOCK, WARPS, STAGES

Two tables for each vocabulary. The first starts from logits and ends with the gradient of z_delta.
It is limited by memory: for each pair of logits the kernel reads both twice and writes a gradient
once (10 bytes in bf16), and any program has to move each at least once (6 bytes). The second starts
from hidden states and includes both heads. There it shows that fast/loss.py never holds all logits.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ivl
from bench.measure import (
    Result,
    bench_parser,
    compare,
    copy_bandwidth,
    describe,
    device_here,
    results_table,
    share,
    times,
)
from data.errors import UsageError
from fast.loss import faster_ivl_loss, value_loss_from_hidden
from run.cli import positive_int, run_cli

L1 = 1.0  # lambda of Table 5
# BLOCK, WARPS, STAGES of the kernel in ivl.py
SETTINGS = [(1024, 4, 2), (1024, 4, 4), (2048, 4, 3), (2048, 8, 3), (4096, 8, 3), (4096, 16, 3)]


def eager(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    """Eq. (4) with the norm, as one writes it down, without metrics."""
    z_delta = z_delta.float()
    return F.cross_entropy(z_base.float() + z_delta, labels) + L1 * z_delta.abs().mean()


def liger(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's cross-entropy of the summed logits: without the norm, so it computes less."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(z_base + z_delta, labels)


def ours(z_base: Tensor, z_delta: Tensor, labels: Tensor) -> Tensor:
    return faster_ivl_loss(z_base, z_delta, labels, L1)[0]


def from_logits(loss: Callable, compiled: bool, N: int, V: int, dtype: torch.dtype) -> Callable:
    """A step from logits (N, V) to z_delta's gradient."""
    z_base = torch.randn(N, V, dtype=dtype)
    z_delta = torch.randn(N, V, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (N,))
    if compiled:
        loss = torch.compile(loss)

    def step():
        z_delta.grad = None
        loss(z_base, z_delta, labels).backward()

    return step


def with_settings(settings: tuple[int, int, int], **sizes) -> Callable:
    """The kernel's step, from logits, with other settings."""
    ivl.BLOCK, ivl.WARPS, ivl.STAGES = settings  # in this process alone
    return from_logits(ours, False, **sizes)


def from_hidden(loss: Callable | None, N: int, V: int, D: int, dtype: torch.dtype) -> Callable:
    """A step from hidden states (N, D) to the value network's gradients, hidden and head.

    `loss` None is fast/loss.py.
    """
    h_base = torch.randn(N, D, dtype=dtype)
    h_value = torch.randn(N, D, dtype=dtype).requires_grad_()
    W_base, W_value = [(torch.randn(V, D) / D**0.5).to(dtype) for _ in range(2)]
    W_value.requires_grad_()
    labels = torch.randint(V, (N,))

    def step():
        h_value.grad = W_value.grad = None
        if loss is None:
            value_loss_from_hidden(h_base, W_base, h_value, W_value, labels, L1)[0].backward()
        else:
            loss(h_base @ W_base.T, h_value @ W_value.T, labels).backward()

    return step


def show(results: dict[str, Result], size: int, bandwidth: float, from_logits: bool) -> str:
    """A table; `size` is the bytes of one tensor of logits."""
    heads = ["ms (range)", "times faster than eager", "MB at the peak", "first call, s"]
    heads += ["of copy, 2 passes", "of copy, floor"] * from_logits
    eager = results.get("eager", Result()).seconds

    def cells(name: str, result: Result) -> list[str]:
        moved = [f"{passes * size / result.median / bandwidth:.0%}" for passes in (5, 3)]
        memory, first = f"{result.growth / 1e6:.0f}", f"{result.first:.1f}"
        faster = share(eager, result.seconds)
        return [times(result), faster, memory, first, *moved * from_logits]

    return results_table(results, heads, cells)


def main():
    parser = bench_parser(__doc__, rounds=7)
    parser.add_argument(
        "--vocab", type=positive_int, nargs="+", default=[32000, 128256], metavar="V"
    )
    parser.add_argument(
        "--rows",
        type=positive_int,
        metavar="N",
        help="supervised tokens (default 8192; on a CPU as many as fill 262 MB with logits)",
    )
    parser.add_argument("--hidden", type=positive_int, metavar="D", help="(default 2048, CPU 256)")
    parser.add_argument(
        "--only", choices=["logits", "hidden", "settings"], help="one of the tables"
    )
    args = parser.parse_args()
    device = device_here()
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    probe = torch.zeros(1, dtype=dtype, device=device)
    if args.only == "settings" and not ivl.kernel_runs_on(probe, probe):
        raise UsageError(
            "the kernel takes a GPU with Triton, or TRITON_INTERPRET=1: neither is here"
        )
    D = args.hidden or (2048 if on_gpu else 256)
    bandwidth = copy_bandwidth(device)
    print(f"{describe(device)}; a copy moves {bandwidth / 1e9:.1f} GB/s\n")
    for V in args.vocab:
        N = args.rows or (8192 if on_gpu else 2048 * 32000 // V)
        size = f"N = {N}, V = {V}, {str(dtype).removeprefix('torch.')}, lambda = {L1}"
        logits = functools.partial(functools.partial, from_logits, N=N, V=V, dtype=dtype)
        hidden = functools.partial(functools.partial, from_hidden, N=N, V=V, D=D, dtype=dtype)
        kernel = functools.partial(functools.partial, with_settings, N=N, V=V, dtype=dtype)
        starts = {
            "logits": {"eager": logits(eager, False), "torch.compile": logits(eager, True)},
            "hidden": {
                "eager": hidden(eager),
                "ivl_loss": hidden(ours),
                "value_loss_from_hidden": hidden(None),
            },
            "settings": {str(settings): kernel(settings) for settings in SETTINGS},
        }
        if on_gpu:
            starts["logits"]["Liger, no norm"] = logits(liger, False)
        starts["logits"]["ivl_loss"] = logits(ours, False)
        for start in [args.only] if args.only else ["logits", "hidden"]:
            results = compare(starts[start], device, args.rounds, 10 if on_gpu else 1)
            heading = f"From hidden states, D = {D}" if start == "hidden" else "From logits"
            shown = show(results, N * V * dtype.itemsize, bandwidth, start != "hidden")
            print(f"{heading}: {size}\n\n{shown}\n", flush=True)


if __name__ == "__main__":
    run_cli(main)
