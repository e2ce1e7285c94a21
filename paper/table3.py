"""Table 3 (Appendix D): what a value network costs while decoding. The paper's times, ours beside
them.

    python -m paper.table3

On a GPU of 80 GB or more the networks have the paper's shapes, on a CPU 23M and 110M parameters;
weights are random. bench/decode.py measures, and can compare with other libraries and several texts
at a time.
"""

import torch

from bench.decode import ALONE, BOTH, VALUE, measure
from bench.measure import Result, bench_parser, describe, device_here, share, table
from run.cli import run_cli

LENGTHS = (128, 512, 1024)  # new tokens
# seconds, and GB at the peak, of each length; bfloat16, flash-attention 2, an H800, one text
PAPER = {
    "1.1B": ((1.99, 2.09), (6.99, 2.09), (13.36, 2.10)),
    "7B": ((2.87, 12.65), (10.98, 12.84), (22.06, 13.09)),
    "1.1B + 7B": ((5.13, 14.79), (20.83, 15.33), (49.74, 15.91)),
    "13B": ((3.48, 24.51), (12.98, 24.79), (26.09, 25.18)),
    "1.1B + 13B": ((5.73, 26.66), (26.10, 27.30), (61.61, 28.14)),
}
# whose place each takes
NAMES = {
    "TinyLlama": "1.1B",
    "Llama-2-7B": "7B",
    "Llama-2-13B": "13B",
    "23M": "1.1B",
    "110M": "7B",
}


def paper_rows(value: str, base: str) -> list[list[str]]:
    """The paper's seconds, and how many times the base alone they are."""
    small, big = NAMES[value], NAMES[base]
    both = f"{small} + {big}"
    rows = []
    for name in (small, big, both):
        cells = [f"{seconds:.2f} s, {peak:.2f} GB" for seconds, peak in PAPER[name]]
        rows.append([f"the paper's {name}", *cells])
    ratios = [ours[0] / alone[0] for ours, alone in zip(PAPER[both], PAPER[big])]
    return [*rows, [f"{both} over {big}", *(f"{ratio:.2f}" for ratio in ratios)]]


def our_rows(measured: list[dict[str, Result]], value: str, base: str) -> list[list[str]]:
    """Ours, of the lengths that were measured, in order."""
    names = {VALUE: f"our {value}", ALONE: f"our {base}", BOTH: f"our {value} + {base}"}
    rows = []
    for name, label in names.items():
        rows.append([label])
        for tokens, results in zip(LENGTHS, measured):
            each = results[name]
            taken = each.failure or f"{tokens * each.median:.2f} s, {each.peak / 1e9:.2f} GB"
            rows[-1].append(taken)
    ratios = [share(results[BOTH].seconds, results[ALONE].seconds) for results in measured]
    return [*rows, [f"{value} + {base} over {base} (range)", *ratios]]


def slowdown(measured: list[dict[str, Result]]) -> str:
    """Tokens per second of value + base at the greatest length, over those at the least."""
    first, last = measured[0][BOTH], measured[-1][BOTH]
    if first.failure or last.failure:
        return ""
    theirs = LENGTHS[-1] * PAPER["1.1B + 7B"][0][0] / (LENGTHS[0] * PAPER["1.1B + 7B"][-1][0])
    return (
        f"From {LENGTHS[0]} to {LENGTHS[-1]} tokens, value + base keeps {first.median / last.median:.0%} of its tokens per "
        f"second; the paper's 1.1B + 7B keeps {theirs:.0%}, since its decoding has no KV cache."
    )


def main():
    parser = bench_parser(__doc__, rounds=3)
    args = parser.parse_args()
    device = device_here()
    pairs = [("23M", "110M")]
    if device == "cuda":
        pairs = [("TinyLlama", "Llama-2-7B"), ("TinyLlama", "Llama-2-13B")]
    torch.set_num_threads(1)  # as the contenders do
    print(f"{describe(device)}\n")
    contenders = [VALUE, ALONE, BOTH]
    for value, base in pairs:
        measured = [
            measure(value, base, 1, tokens, device, args.rounds, contenders) for tokens in LENGTHS
        ]
        rows = [["new tokens", *map(str, LENGTHS)], *paper_rows(value, base)]
        rows += our_rows(measured, value, base)
        print(f"{table(rows)}\n\n{slowdown(measured)}\n", flush=True)


if __name__ == "__main__":
    run_cli(main)
