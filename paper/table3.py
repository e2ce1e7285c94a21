"""Table 3 (Appendix D): what a value network costs while decoding. The paper's times, ours beside them.

    python -m paper.table3

On a GPU of 80 GB or more with the paper's own shapes, and random weights; on a CPU with shapes of 23M and 110M parameters
in their place. bench/decode.py measures, and has rivals and more batch sizes.
"""

import torch

from bench.decode import ALONE, BOTH, VALUE, measure
from bench.measure import Result, describe, share, table
from run.cli import ArgumentParser, positive_int, run_cli

LENGTHS = (128, 512, 1024)  # new tokens
PAPER = {  # seconds, and GB at the peak, of each length; bfloat16, flash-attention 2, an H800, one text
    "1.1B": ((1.99, 2.09), (6.99, 2.09), (13.36, 2.10)),
    "7B": ((2.87, 12.65), (10.98, 12.84), (22.06, 13.09)),
    "1.1B + 7B": ((5.13, 14.79), (20.83, 15.33), (49.74, 15.91)),
    "13B": ((3.48, 24.51), (12.98, 24.79), (26.09, 25.18)),
    "1.1B + 13B": ((5.73, 26.66), (26.10, 27.30), (61.61, 28.14)),
}
NAMES = {
    "TinyLlama": "1.1B",
    "Llama-2-7B": "7B",
    "Llama-2-13B": "13B",
    "23M": "1.1B",
    "110M": "7B",
}  # whose place each takes


def paper_rows(value: str, base: str) -> list[list[str]]:
    """The paper's seconds, and how many times the base alone they are."""
    small, big = NAMES[value], NAMES[base]
    rows = [
        [
            f"the paper's {name}",
            *(f"{seconds:.2f} s, {peak:.2f} GB" for seconds, peak in PAPER[name]),
        ]
        for name in (small, big, f"{small} + {big}")
    ]
    ratios = [both / alone for (both, _), (alone, _) in zip(PAPER[f"{small} + {big}"], PAPER[big])]
    return rows + [[f"{small} + {big} over {big}", *(f"{ratio:.2f}" for ratio in ratios)]]


def our_rows(measured: list[dict[str, Result]], value: str, base: str) -> list[list[str]]:
    """Ours, of the lengths that were measured, in order."""
    names = {VALUE: f"our {value}", ALONE: f"our {base}", BOTH: f"our {value} + {base}"}
    rows = [[label] for label in [*names.values(), f"{value} + {base} over {base} (range)"]]
    for tokens, results in zip(LENGTHS, measured):
        for row, name in zip(rows, names):
            each = results[name]
            row.append(each.failure or f"{tokens * each.median:.2f} s, {each.peak / 1e9:.2f} GB")
        failed = results[ALONE].failure or results[BOTH].failure
        rows[-1].append("" if failed else share(results[BOTH].seconds, results[ALONE].seconds))
    return rows


def slowdown(measured: list[dict[str, Result]]) -> str:
    """Tokens per second of value + base at the greatest length, over those at the least."""
    first, last = measured[0][BOTH], measured[-1][BOTH]
    if first.failure or last.failure:
        return ""
    theirs = LENGTHS[-1] * PAPER["1.1B + 7B"][0][0] / (LENGTHS[0] * PAPER["1.1B + 7B"][-1][0])
    ours = first.median / last.median
    return (
        f"From {LENGTHS[0]} to {LENGTHS[-1]} tokens, value + base keeps {100 * ours:.0f}% of its tokens per second; the "
        f"paper's 1.1B + 7B keeps {100 * theirs:.0f}%, since its decoding has no KV cache."
    )


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="(default 3; the paper has 5)"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # as the contenders do
    print(f"{describe(device)}\n")
    for value, base in (
        [("TinyLlama", "Llama-2-7B"), ("TinyLlama", "Llama-2-13B")]
        if device == "cuda"
        else [("23M", "110M")]
    ):
        measured = [
            measure(value, base, 1, tokens, device, args.rounds, [VALUE, ALONE, BOTH])
            for tokens in LENGTHS
        ]
        rows = [
            ["new tokens", *map(str, LENGTHS)],
            *paper_rows(value, base),
            *our_rows(measured, value, base),
        ]
        print(f"{table(rows)}\n\n{slowdown(measured)}\n", flush=True)


if __name__ == "__main__":
    run_cli(main)
