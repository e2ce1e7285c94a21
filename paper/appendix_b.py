"""Appendix B: how many of a text's value tokens a vocabulary map finds, as the overlap that the
paper measures.

    python -m paper.appendix_b     # the tiny families; for other tokenizers vocab_map.py has --eval

The first half of the texts is counted in, the second half held out.
"""

import numpy as np

from data.tiny_world import World
from fast.alignment import align_all
from paper.report import add_seeds, percent, table
from run.cli import ArgumentParser, run_cli
from vocab_map import HOWS, build, overlap

PAIRS = {
    "tiny-b / tiny": ("tiny-b-m", "tiny-m"),
    "tiny-c / tiny": ("tiny-c-m", "tiny-m"),
    "tiny / tiny-b": ("tiny-m", "tiny-b-m"),
    "tiny / tiny-c": ("tiny-m", "tiny-c-m"),
}
ROWS = [*HOWS[1:], "first piece", HOWS[0]]  # by how much they find


def section(seeds: int) -> str:
    """The overlap of each pair of tokenizers, by each way to make a map."""
    found = {(pair, row): [] for pair in PAIRS for row in ROWS}  # (seeds, 2) each
    for world in map(World, range(seeds)):
        texts = [
            "\n".join(turn["value"] for turn in record["conversations"])
            for record in world.demonstrations()
        ]
        halves = texts[: len(texts) // 2], texts[len(texts) // 2 :]
        tokenizers = {name: world.tokenizer_for(name) for pair in PAIRS.values() for name in pair}
        for pair, names in PAIRS.items():
            base, value = (tokenizers[name] for name in names)
            maps = {how: build(base, value, how, halves[0], align_all).value_tokens for how in HOWS}
            maps["first piece"] = [pieces[:1] for pieces in maps["pieces"]]
            for row in ROWS:
                shares = [overlap(half, base, value, maps[row]) for half in halves]
                found[pair, row].append(shares)
    lines = [["base / value tokenizer; counted in, held out", *ROWS]]
    for pair in PAIRS:
        cells = [", ".join(map(percent, np.array(found[pair, row]).T)) for row in ROWS]
        lines.append([pair, *cells])
    return f"""## Appendix B: overlap of vocabulary maps

`python -m paper.appendix_b --seeds {seeds}`

How many percent of a text's value tokens come out of its base tokens through a map: the intersection of both multisets over
the number of value tokens. Maps are counted in one half of the demonstrations; the second number is of the other half.
`pieces` gives all value tokens of a base token's bytes, the others one. No map finds a value token that is longer than a
base token; decoding spells such a token, which this measure does not see. The paper reports 42 for Llama-3 / Llama-2 on its
own texts, and does not say how it counts.

{table(lines)}
"""


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_seeds(parser)
    print(section(parser.parse_args().seeds))


if __name__ == "__main__":
    run_cli(main)
