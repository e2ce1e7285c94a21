"""Appendix B: how many of a text's value tokens a vocabulary map finds, as the overlap that the paper measures.

    python -m paper.appendix_b                # the tiny families
    python -m paper.appendix_b --base-tokenizer A --value-tokenizer B --texts FILE --lines 200   # real tokenizers

The first half of the texts (or the first `--lines` of them) is counted in, the second half (the next `--lines`) held out.
"""

from pathlib import Path

import numpy as np

from data.errors import UsageError
from data.records import read_texts
from data.tiny_world import World
from data.tokenizer import Tokenizer, load_tokenizer
from fast.alignment import align_all
from paper.report import percent, table
from run.cli import ArgumentParser, number, positive_int, run_cli
from vocab_map import HOWS, build, overlap

PAIRS = {
    "tiny-b / tiny": ("tiny-b-m", "tiny-m"),
    "tiny-c / tiny": ("tiny-c-m", "tiny-m"),
    "tiny / tiny-b": ("tiny-m", "tiny-b-m"),
    "tiny / tiny-c": ("tiny-m", "tiny-c-m"),
}
ROWS = [*HOWS[1:], "first piece", HOWS[0]]  # by how much they find


def overlaps(
    base: Tokenizer, value: Tokenizer, counted: list[str], held_out: list[str]
) -> dict[str, tuple[float, float]]:
    """For each of ROWS the overlap on texts counted in, and on held-out ones."""
    spelled = {how: build(base, value, how, counted, align_all).pieces for how in HOWS}
    spelled["first piece"] = [each[:1] for each in spelled["pieces"]]
    return {
        row: (
            overlap(counted, base, value, spelled[row]),
            overlap(held_out, base, value, spelled[row]),
        )
        for row in ROWS
    }


def overlap_table(pairs: dict[str, list[dict[str, tuple[float, float]]]]) -> str:
    """Pairs of tokenizers and, for each seed, what overlaps found."""
    rows = [
        [
            pair,
            *(
                ", ".join(percent(np.array(side)) for side in zip(*(found[row] for found in seeds)))
                for row in ROWS
            ),
        ]
        for pair, seeds in pairs.items()
    ]
    return table(["base / value tokenizer; counted in, held out", *ROWS], rows)


def section(seeds: int) -> str:
    """The table of the tiny families."""
    found = {pair: [] for pair in PAIRS}
    for world in map(World, range(seeds)):
        texts = [
            "\n".join(turn["value"] for turn in record["conversations"])
            for record in world.demonstrations()
        ]
        half = len(texts) // 2
        tokenizers = {name: world.tokenizer_for(name) for pair in PAIRS.values() for name in pair}
        for pair, (base, value) in PAIRS.items():
            found[pair].append(
                overlaps(tokenizers[base], tokenizers[value], texts[:half], texts[half:])
            )
    return f"""## Appendix B: overlap of vocabulary maps

`python -m paper.appendix_b --seeds {seeds}`

How many of a text's value tokens come out of its base tokens through a map: the intersection of both multisets over the
number of value tokens, in percent. Counted in one half of the demonstrations, held out on the other. `paper`, `dtw`,
`offsets` and `first piece` give one value token for each base token, `pieces` all of its bytes' tokens. No base token's bytes
give a value token that is longer than it; decoding spells such tokens out, base token by base token, which this measure does not see.
The paper reports 42 for Llama-3 / Llama-2 and its own training texts, and does not say how it counts.

{overlap_table(found)}
"""


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--seeds",
        type=number(int, 0, "whole number from 1 to 100", 101),
        default=3,
        metavar="N",
        help="tiny worlds 0 to N-1 (default 3)",
    )
    parser.add_argument(
        "--base-tokenizer", metavar="A", help="a real tokenizer, a file or a checkpoint folder"
    )
    parser.add_argument(
        "--value-tokenizer", metavar="B", help="another; both directions are measured"
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts as vocab_map.py takes them"
    )
    parser.add_argument(
        "--lines",
        type=positive_int,
        metavar="N",
        help="texts to count in, and to hold out (default: half each)",
    )
    args = parser.parse_args()
    real = [args.base_tokenizer, args.value_tokenizer, args.texts]
    if not any(real):
        return print(section(args.seeds))
    if not all(real):
        parser.error("--base-tokenizer, --value-tokenizer and --texts go together")
    tokenizers, texts = [load_tokenizer(path) for path in real[:2]], read_texts(args.texts)
    lines = args.lines or len(texts) // 2
    if not lines or 2 * lines > len(texts):
        raise UsageError(f"{args.texts}: {len(texts)} texts, which is not twice {max(lines, 1)}")
    names = [Path(path).name for path in real[:2]]
    print(
        overlap_table(
            {
                " / ".join(names[::step]): [
                    overlaps(*tokenizers[::step], texts[:lines], texts[lines : 2 * lines])
                ]
                for step in (1, -1)
            }
        )
    )


if __name__ == "__main__":
    run_cli(main)
