"""Vocabulary maps: how much faster fast/alignment.py runs Algorithm 1 than a plain loop, and what
decoding through a map costs.

python -m bench.vocab_map --base-tokenizer A --value-tokenizer B --texts FILE    # on real
tokenizers and texts python -m bench.vocab_map
# on those of the tiny world python -m bench.vocab_map --decode out/seed0       # decoding, with
networks that `python -m paper --seeds 1` makes
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import torch

import vocab_map
from bench.measure import Result, bench_parser, compare, describe, results_table, share, times
from data.chat import encode_chat
from data.errors import UsageError
from data.records import read_texts
from data.tiny_world import TEMPLATE, World, prompt_text, world_of
from data.tokenizer import Tokenizer, load_tokenizer
from fast.alignment import align_all
from ivl import ValueModel
from model import Llama
from run.cli import run_cli
from run.plug import guide_mapped
from sample import Guided, MappedGuided, generate

# value tokens in a text: how many such texts the loop aligns, and fast/alignment.py
SIZES = {200: (64, 64), 2000: (4, 32)}
LOOP, FAST = "vocab_map.py, the loop", "fast/alignment.py"
# how a base is guided by the value network of tiny-m
FAMILIES = {
    "no map": "tiny-m",
    "pieces, other tokens": "tiny-b-m",
    "pieces, shorter tokens": "tiny-c-m",
    "paper, other tokens": "tiny-b-m",
    "paper, shorter tokens": "tiny-c-m",
}
VALUE = "value-residual-tiny-m"
TOKENS = 16  # to decode

# --------------------------------------------------------------------------------------------------
# Algorithm 1


def corpus(tokenizers: list[str], texts: Path | None) -> tuple[Tokenizer, Tokenizer, list[str]]:
    """Tokenizers of base and value network, and texts for both."""
    if texts:
        return *map(load_tokenizer, tokenizers), read_texts(texts)
    world = World(0)
    documents = world.documents(random.Random("bench"))
    texts = [next(documents) for _ in range(6000)]
    return world.tokenizer_for("tiny-b-m"), world.tokenizer_for("tiny-m"), texts


def joined(texts: list[str], tokenizer: Tokenizer, size: int) -> list[str]:
    """Texts joined by blank lines until each has `size` tokens, and cut there."""
    parts, together, length = [], [], 0
    for text in texts:
        parts.append(text)
        length += len(tokenizer.encode(text))
        if length >= size:
            long = "\n\n".join(parts)
            together.append(long[: len(long) * size // length])
            parts, length = [], 0
    return together


def aligning(how: str, size: int, source: tuple[list[str], Path | None]) -> Callable[[], None]:
    """A step that aligns as many texts of a size as SIZES says."""
    base, value, texts = corpus(*source)
    count = SIZES[size][how == FAST]
    texts = joined(texts, value, size)[:count]
    if len(texts) < count:
        raise ValueError(f"too few texts for {count} of {size} tokens")
    pieces = []
    for tokenizer in (base, value):  # each text's tokens as Algorithm 1 compares them
        ids = [tokenizer.encode(text, bos=True) for text in texts]
        pieces.append(vocab_map.pieces_of(tokenizer, ids))

    def step():
        vocab_map.piece_cost.cache_clear()  # each step meets its pairs of tokens anew
        (align_all if how == FAST else vocab_map.align_all)(*pieces)

    return step


def counting(how: str, source: tuple[list[str], Path | None]) -> Callable[[], None]:
    """A step that makes a map from all texts, tokenizing included."""
    base, value, texts = corpus(*source)
    return lambda: vocab_map.build(base, value, how, texts, align_all) and None


def bench_alignment(source: tuple[list[str], Path | None], rounds: int) -> None:
    for size, counts in SIZES.items():
        steps = {how: functools.partial(aligning, how, size, source) for how in (LOOP, FAST)}
        results = compare(steps, "cpu", rounds, 1)
        for how, result in results.items():
            result.seconds = [seconds / counts[how == FAST] for seconds in result.seconds]

        def cells(how: str, result: Result) -> list[str]:
            faster = share(results[LOOP].seconds, result.seconds)
            return [times(result), faster, f"{result.growth / 1e6:.0f}"]

        heads = ["ms a text (range)", "times as fast as the loop"]
        print(
            f"Aligning texts of about {size} tokens, {counts[0]} by the loop and {counts[1]} by fast/alignment.py\n\n"
            f"{results_table(results, [*heads, 'MB more at the peak'], cells)}\n",
            flush=True,
        )
    hows = {
        f"--how {how}": functools.partial(counting, how, source)
        for how in ("paper", "offsets", "pieces")
    }
    results = compare(hows, "cpu", 1, 1)

    def cells(how: str, result: Result) -> list[str]:
        return [f"{result.median:.1f}", f"{result.growth / 1e6:.0f}"]

    shown = results_table(results, ["seconds", "MB more at the peak"], cells)
    print(f"Making a map from {source[1] or 'the texts of a tiny world'}, all of it\n\n{shown}\n")


# --------------------------------------------------------------------------------------------------
# Decoding


def decoding(name: str, home: Path, batch: int) -> tuple[Guided, Callable[[], None]]:
    """A base guided by VALUE, and a step that answers `batch` questions with 16 tokens each."""
    torch.set_num_threads(1)
    folders = home / FAMILIES[name], home / VALUE
    base, value = Llama.from_pretrained(folders[0]), ValueModel.from_pretrained(folders[1])
    tokenizers = [load_tokenizer(folder) for folder in folders]
    items = world_of(folders[0]).fact_items("development")[:batch]
    turns = [[("user", prompt_text(item))] for item in items]
    prompts = [encode_chat(tokenizers[1], TEMPLATE, turn)[0] for turn in turns]
    how = name.partition(",")[0]
    if how == "no map":
        guided = Guided(base, value)
    else:
        texts = read_texts(home / "demonstrations.jsonl") if how == "paper" else None
        guided = guide_mapped(base, value, vocab_map.build(*tokenizers, how, texts, align_all))
    options = dict(max_new_tokens=TOKENS, stop_ids=set())
    return guided, lambda: generate(guided, prompts, **options) and None


def decode(name: str, home: Path, batch: int) -> Callable[[], None]:
    return decoding(name, home, batch)[1]


def bench_decoding(home: Path, rounds: int) -> None:
    for name in [*FAMILIES.values(), VALUE]:
        if not (home / name).is_dir():
            raise UsageError(f"{home / name}: not there; `python -m paper --seeds 1` makes it")
    for batch in (1, 32):
        passes = dict.fromkeys(FAMILIES, 1.0)
        for name in FAMILIES:
            guided, step = decoding(name, home, batch)
            step()
            if isinstance(guided, MappedGuided):
                passes[name] = guided.base_tokens_read / guided.value_tokens_asked
        steps = {name: functools.partial(decode, name, home, batch) for name in FAMILIES}
        results = compare(steps, "cpu", rounds, 4)
        for result in results.values():
            result.seconds = [seconds / TOKENS for seconds in result.seconds]

        def cells(name: str, result: Result) -> list[str]:
            longer = share(result.seconds, results["no map"].seconds) if name != "no map" else ""
            return [times(result), longer, f"{passes[name]:.2f}"]

        heads = ["ms a step (range)", "times as long as without a map", "base passes a token"]
        print(
            f"Decoding {TOKENS} tokens of {batch} answers at a time, one thread\n\n"
            f"{results_table(results, heads, cells)}\n",
            flush=True,
        )


def main():
    parser = bench_parser(__doc__, rounds=3)
    parser.add_argument("--base-tokenizer", metavar="A", help="a file or a checkpoint folder")
    parser.add_argument("--value-tokenizer", metavar="B", help="another")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="as vocab_map.py takes them")
    parser.add_argument(
        "--decode", type=Path, metavar="HOME", help="time decoding, with this folder's networks"
    )
    args = parser.parse_args()
    real = [args.base_tokenizer, args.value_tokenizer, args.texts]
    if any(real) and not all(real):
        parser.error("--base-tokenizer, --value-tokenizer and --texts go together")
    print(f"{describe('cpu')}\n")
    if args.decode:
        bench_decoding(args.decode, args.rounds)
    else:
        bench_alignment((real[:2], args.texts), args.rounds)


if __name__ == "__main__":
    run_cli(main)
