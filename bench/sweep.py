"""The loss kernel's three settings in ivl.py, BLOCK, WARPS and STAGES: which of them are the fastest on this GPU.

    python -m bench.sweep
    TRITON_INTERPRET=1 python -m bench.sweep --rows 2 --vocab 300        # a rehearsal on a CPU

A step begins at logits and ends at the gradient of z_delta, as in bench/loss.py. All settings take turns in one process.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import ivl
from bench.loss import from_logits, ours
from bench.measure import Result, describe, save, table, timed, times
from data.errors import UsageError
from run.cli import ArgumentParser, positive_int, run_cli

SETTINGS = [
    (1024, 4, 2),
    (1024, 4, 3),
    (1024, 4, 4),
    (2048, 4, 3),
    (2048, 8, 1),
    (2048, 8, 2),
    (2048, 8, 3),
    (2048, 8, 4),
    (4096, 8, 3),
    (4096, 16, 2),
    (4096, 16, 3),
    (8192, 16, 2),
]  # BLOCK, WARPS, STAGES


def sweep(
    step: Callable[[], None], rounds: int, calls: int, device: str
) -> dict[tuple[int, int, int], Result]:
    """A step's time by each of SETTINGS."""
    results = {setting: Result() for setting in SETTINGS}
    usual = ivl.BLOCK, ivl.WARPS, ivl.STAGES
    for number in range(rounds + 1):
        for setting, result in results.items():
            ivl.BLOCK, ivl.WARPS, ivl.STAGES = setting
            try:
                if number == 0:
                    result.first = timed(step, 1, device)  # compiles
                elif not result.failure:
                    result.seconds.append(timed(step, calls, device))
            except Exception as error:  # a setting that this GPU has no room for, say
                result.failure = (
                    f"failed: {(str(error).strip() or repr(error)).splitlines()[0][:100]}"
                )
    ivl.BLOCK, ivl.WARPS, ivl.STAGES = usual
    return results


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows",
        type=positive_int,
        default=8192,
        metavar="N",
        help="supervised tokens (default 8192)",
    )
    parser.add_argument(
        "--vocab",
        type=positive_int,
        nargs="+",
        default=[32000, 128256],
        metavar="V",
        help="vocabularies (default 32000 128256)",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, calls = (torch.bfloat16, 10) if device == "cuda" else (torch.float32, 1)
    probe = torch.zeros(1, dtype=dtype, device=device)
    if not ivl.kernel_runs_on(probe, probe):
        raise UsageError(
            "the kernel runs on a GPU, with Triton, or with TRITON_INTERPRET=1 in the environment: neither is here"
        )
    print(f"{describe(device)}\n")
    numbers = {"device": describe(device), "sizes": {}}
    for V in args.vocab:
        with torch.device(device):
            torch.manual_seed(0)
            step = from_logits(ours, False, args.rows, V, dtype)
        results = sweep(step, args.rounds, calls, device)
        moved = 5 * dtype.itemsize * args.rows * V  # each pair of logits twice, and a gradient
        rows = [["BLOCK, WARPS, STAGES", "ms (range)", "GB/s, 2 passes"]]
        for setting, result in sorted(
            results.items(), key=lambda entry: (entry[1].failure, entry[1].seconds)
        ):
            name = ", ".join(map(str, setting)) + (
                " (in ivl.py)" if setting == (ivl.BLOCK, ivl.WARPS, ivl.STAGES) else ""
            )
            if result.failure:
                rows.append([name, result.failure, ""])
            else:
                rows.append([name, times(result), f"{moved / result.median / 1e9:.0f}"])
        print(f"N = {args.rows}, V = {V}\n\n{table(rows)}\n", flush=True)
        numbers["sizes"][V] = {
            ", ".join(map(str, setting)): vars(result) for setting, result in results.items()
        }
        save(args.json, numbers)


if __name__ == "__main__":
    run_cli(main)
