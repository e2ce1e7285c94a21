"""Vocabulary maps: how long Algorithm 1 takes beside the loop that it is on paper, and what decoding through a map costs.

    python -m bench.vocab_map --base-tokenizer A --value-tokenizer B --texts FILE    # on real tokenizers and texts
    python -m bench.vocab_map                                                        # on those of the tiny world
    python -m bench.vocab_map --decode out/seed0       # decoding, with networks that `python -m paper --seeds 1` makes

Four contenders: the loop with each cell's distance by the editdistance package, as the authors have it (where it is
installed), the loop as it is, which remembers each pair's distance, and fast/alignment.py, one text at a time and all at once.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import torch

import vocab_map
from bench.measure import Result, compare, describe, ratio, save, table, times
from data.chat import encode_chat
from data.errors import UsageError
from data.records import read_texts
from data.tiny_world import TEMPLATE, World, prompt_text, world_of
from data.tokenizer import Tokenizer, load_tokenizer
from fast.alignment import align_all
from ivl import ValueModel
from model import Llama
from run.cli import ArgumentParser, positive_int, run_cli
from run.plug import guide_mapped
from sample import Guided, MappedGuided, generate

SIZES = {
    200: (64, 64),
    2000: (4, 32),
}  # value tokens in a text; how many such texts for the slow loops, and for the fast path
EDITDISTANCE, REMEMBERING = "loop, editdistance in each cell", "loop, distances remembered"
ONE_AT_A_TIME, ALL_AT_ONCE = "fast, one at a time", "fast, all at once"
CONTENDERS = [EDITDISTANCE, REMEMBERING, ONE_AT_A_TIME, ALL_AT_ONCE]
FAMILIES = {
    "no map": "tiny-l",
    "pieces, other tokens": "tiny-b-l",
    "pieces, shorter tokens": "tiny-c-l",
    "paper, other tokens": "tiny-b-l",
    "paper, shorter tokens": "tiny-c-l",
}

# ---------------------------------------------------------------------------------------------------------
# Algorithm 1


def corpus(tokenizers: list[str], texts: Path | None) -> tuple[Tokenizer, Tokenizer, list[str]]:
    """Tokenizers of base and value network, and texts in both."""
    if texts:
        base, value = map(load_tokenizer, tokenizers)
        return base, value, read_texts(texts)
    world = World(0)
    documents = world.documents(random.Random("bench"))
    return (
        world.tokenizer_for("tiny-b-m"),
        world.tokenizer_for("tiny-m"),
        [next(documents) for _ in range(6000)],
    )


def joined(texts: list[str], tokenizer: Tokenizer, size: int) -> list[list[str]]:
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


def by_editdistance(a: bytes, b: bytes) -> float:
    """vocab_map.piece_cost as the authors have it: computed anew for each cell."""
    import editdistance

    distance = editdistance.eval(a, b)
    return distance * 0.1 if a in b or b in a else float(distance)


def texts_of(how: str, size: int) -> int:
    return SIZES[size][not how.startswith("loop")]


def aligning(how: str, size: int, source: tuple[list[str], Path | None]) -> Callable[[], None]:
    """A step that aligns texts of a size: as many as texts_of says."""
    base, value, texts = corpus(*source)
    texts = joined(texts, value, size)[: texts_of(how, size)]
    if len(texts) < texts_of(how, size):
        raise ValueError(f"too few texts for {texts_of(how, size)} of {size} tokens")
    pieces = pieces_of(base, texts), pieces_of(value, texts)

    def remembering():
        vocab_map.piece_cost.cache_clear()  # of this step's pairs alone
        vocab_map.align_all(*pieces)

    def one_at_a_time():
        for base_pieces, value_pieces in zip(*pieces):
            align_all([base_pieces], [value_pieces])

    if how == EDITDISTANCE:
        by_editdistance(b"", b"")  # not installed?
        vocab_map.piece_cost = by_editdistance  # in this process alone
        return lambda: vocab_map.align_all(*pieces) and None
    if how == REMEMBERING:
        return remembering
    if how == ONE_AT_A_TIME:
        return one_at_a_time
    return lambda: align_all(*pieces) and None


def pieces_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[bytes]]:
    """Each text's tokens as Algorithm 1 compares them."""
    names = vocab_map.without_mark(tokenizer)
    return [[names[id] for id in tokenizer.encode(text, bos=True)] for text in texts]


def show_alignment(results: dict[str, Result], size: int) -> str:
    rows = [
        [
            "",
            "ms a text (range)",
            "times faster than editdistance",
            "than the remembering loop",
            "MB more at the peak",
        ]
    ]
    slow, loop = results[EDITDISTANCE], results[REMEMBERING]
    for name, result in results.items():
        result.seconds = [seconds / texts_of(name, size) for seconds in result.seconds]
    for name, result in results.items():
        if result.failure:
            rows.append([name, result.failure, "", "", ""])
            continue
        faster = ["" if rival.failure else ratio(result, rival) for rival in (slow, loop)]
        rows.append([name, times(result), *faster, f"{result.growth / 1e6:.0f}"])
    return table(rows)


def counting(how: str, source: tuple[list[str], Path | None]) -> Callable[[], None]:
    """A step that makes a map from all texts, tokenizing included."""
    base, value, texts = corpus(*source)
    return lambda: vocab_map.build(base, value, how, texts, align_all) and None


# ---------------------------------------------------------------------------------------------------------
# Decoding


def decoding(name: str, home: Path, batch: int) -> tuple[Guided, list[list[int]]]:
    """A base with the value network from tiny-m in it, and prompts."""
    folders = home / FAMILIES[name], home / "value-residual-tiny-m"
    base, value, world = (
        Llama.from_pretrained(folders[0]),
        ValueModel.from_pretrained(folders[1]),
        world_of(folders[0]),
    )
    base_tokenizer, tokenizer = map(load_tokenizer, folders)
    how = name.partition(",")[0]
    items = world.fact_items("development")[:batch]
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    if how == "no map":
        return Guided(base, value), prompts
    texts = read_texts(home / "demonstrations.jsonl") if how == "paper" else None
    return guide_mapped(
        base, value, vocab_map.build(base_tokenizer, tokenizer, how, texts, align_all)
    ), prompts


def decode(name: str, home: Path, batch: int, tokens: int) -> Callable[[], None]:
    """A step that answers `batch` questions at a time, always with `tokens` tokens."""
    torch.set_num_threads(1)
    guided, prompts = decoding(name, home, batch)
    return lambda: generate(guided, prompts, max_new_tokens=tokens, stop_ids=set()) and None


def show_decoding(results: dict[str, Result], passes: dict[str, float], tokens: int) -> str:
    rows = [["", "ms a step (range)", "times longer than without", "base passes a token"]]
    for result in results.values():
        result.seconds = [seconds / tokens for seconds in result.seconds]
    for name, result in results.items():
        if result.failure:
            rows.append([name, result.failure, "", ""])
            continue
        rows.append(
            [
                name,
                times(result),
                ratio(results["no map"], result) if name != "no map" else "",
                f"{passes[name]:.2f}",
            ]
        )
    return table(rows)


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-tokenizer", metavar="A", help="a file or a checkpoint folder")
    parser.add_argument("--value-tokenizer", metavar="B", help="another")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts as vocab_map.py takes them"
    )
    parser.add_argument(
        "--decode",
        type=Path,
        metavar="HOME",
        help="time decoding instead, with the networks in this folder",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    real = [args.base_tokenizer, args.value_tokenizer, args.texts]
    if any(real) and not all(real):
        parser.error("--base-tokenizer, --value-tokenizer and --texts go together")
    numbers = {"device": describe("cpu")}
    print(f"{describe('cpu')}\n")
    if args.decode:
        if missing := [
            name
            for name in [*FAMILIES.values(), "value-residual-tiny-m"]
            if not (args.decode / name).is_dir()
        ]:
            raise UsageError(
                f"{args.decode / missing[0]}: not there; `python -m paper --seeds 1` makes it"
            )
        tokens = 16
        for batch in (1, 32):
            passes = {}
            for name in FAMILIES:
                guided, prompts = decoding(name, args.decode, batch)
                generate(guided, prompts, max_new_tokens=tokens, stop_ids=set())
                passes[name] = (
                    guided.base_tokens_read / guided.value_tokens_asked
                    if isinstance(guided, MappedGuided)
                    else 1.0
                )
            step = functools.partial(
                functools.partial, decode, home=args.decode, batch=batch, tokens=tokens
            )
            results = compare({name: step(name) for name in FAMILIES}, "cpu", args.rounds, 4)
            print(
                f"Decoding {tokens} tokens of {batch} answers at a time, one thread\n\n"
                f"{show_decoding(results, passes, tokens)}\n",
                flush=True,
            )
            numbers[f"batch {batch}"] = {
                name: vars(result) | {"base passes": passes[name]}
                for name, result in results.items()
            }
    else:
        source = (real[:2], args.texts)
        for size, counts in SIZES.items():
            results = compare(
                {how: functools.partial(aligning, how, size, source) for how in CONTENDERS},
                "cpu",
                args.rounds,
                1,
            )
            print(
                f"Aligning texts of about {size} tokens, {counts[0]} by the loops and {counts[1]} by the fast path\n\n"
                f"{show_alignment(results, size)}\n",
                flush=True,
            )
            numbers[f"{size} tokens"] = {name: vars(result) for name, result in results.items()}
        results = compare(
            {
                how: functools.partial(counting, how, source)
                for how in ("paper", "offsets", "pieces")
            },
            "cpu",
            1,
            1,
        )
        rows = [["", "seconds", "again", "MB more at the peak"]]
        for how, result in results.items():
            rows.append(
                [
                    f"--how {how}",
                    f"{result.first:.1f}",
                    f"{result.median:.1f}",
                    f"{result.growth / 1e6:.0f}",
                ]
            )
        print(
            f"Making a map from {args.texts or 'the texts of a tiny world'}, all of it\n\n{table(rows)}\n"
        )
        numbers["whole"] = {name: vars(result) for name, result in results.items()}
    save(args.json, numbers)


if __name__ == "__main__":
    run_cli(main)
