"""Conversations as token ids with a label mask, and data sets of them as batches.

    python -m data.chat out/seed0/demonstrations.jsonl --tokenizer out/seed0/tiny-s      # what training will see
    python -m data.chat out/seed0/preferences.jsonl --tokenizer out/seed0/tiny-s --pairs # of pairs of answers

A conversation becomes token ids turn by turn, so the mask is right by construction: the model is supervised on
the assistant's tokens and the token that ends its turn, and on nothing else.
"""

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import UsageError
from data.records import CONTEXT, Records, Turn, Usable, read_pair, read_turns
from data.tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # the label of a position that is not supervised

# ---------------------------------------------------------------------------------------------------------
# Templates

TEMPLATES = ("llama-2", "llama-3", "chatml", "zephyr")
NEEDED = {
    "llama-3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}  # special tokens; the last one ends a turn


def default_template(tokenizer: Tokenizer) -> str:
    """By the special tokens that the tokenizer has; where it has those of several, by its checkpoint's own chat_template."""
    able = [name for name in NEEDED if can_speak(tokenizer, name)]
    told = [
        name
        for name in able
        if NEEDED[name][1] in tokenizer.chat_template or NEEDED[name][0] in tokenizer.chat_template
    ]
    return (told or able or ["llama-2"])[0]


def can_speak(tokenizer: Tokenizer, template: str) -> bool:
    """Whether a tokenizer has the special tokens of a template."""
    return all(special in tokenizer.specials for special in NEEDED.get(template, []))


def system_of(tokenizer: Tokenizer, template: str, given: str | None) -> str:
    """The system prompt: what was given, "" included, or else what the checkpoint's own chatml template puts there."""
    return given if given is not None else tokenizer.default_system if template == "chatml" else ""


def with_system(system: str, turns: list[Turn]) -> list[Turn]:
    """A system prompt, if there is one, in front of turns that have none of their own."""
    return [("system", system), *turns] if system and turns[0][0] != "system" else turns


def end_token(tokenizer: Tokenizer, template: str) -> int:
    """The token that ends the assistant's turn."""
    return (
        tokenizer.specials[NEEDED[template][-1]]
        if can_speak(tokenizer, template) and template in NEEDED
        else tokenizer.eos_id
    )


def stop_ids(tokenizer: Tokenizer, template: str, llamas: list) -> set[int]:
    """Tokens that end an answer: the template's, the tokenizer's, and what the checkpoints of these networks name."""
    ids = {end_token(tokenizer, template), tokenizer.eos_id, tokenizer.end_of_turn_id}
    for llama in llamas:
        named = llama.config.eos_token_id
        ids |= set(named if isinstance(named, list) else [] if named is None else [named])
    return ids


def encode_chat(
    tokenizer: Tokenizer, template: str, turns: list[Turn]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is supervised. After a user's turn the assistant is next.

    llama-2    <s>[INST] question [/INST] answer </s>, again for each exchange; one <s> and one </s> per exchange
    llama-3    <|begin_of_text|>, then <|start_header_id|>role<|end_header_id|>, blank line, text<|eot_id|> per turn
    chatml     <|im_start|>role, new line, text<|im_end|>, new line, per turn (SmolLM2, Yi, Hermes, Qwen)
    zephyr     <|role|>, new line, text</s>, new line, per turn, the first in plain text (TinyLlama-Chat)

    A system turn may come first. Texts are stripped as the vendors do it, in the last two not at all.
    """
    return with_mask(segments_of(tokenizer, template, turns))


Segment = tuple[
    list[int], str
]  # tokens, and whose they are: "assistant" what is learnt, CONTEXT an answer that is not


def with_mask(segments: Iterable[Segment]) -> tuple[list[int], list[bool]]:
    ids, supervised = [], []
    for tokens, role in segments:
        ids += tokens
        supervised += [role == "assistant"] * len(tokens)
    return ids, supervised


def segments_of(tokenizer: Tokenizer, template: str, turns: list[Turn]) -> Iterator[Segment]:
    if not can_speak(tokenizer, template):
        raise UsageError(
            f"the {template} template needs the special tokens {', '.join(NEEDED[template])}, which this tokenizer lacks; use "
            "another --template, llama-2 for instance"
        )
    kinds = {
        "llama-2": llama2_segments,
        "llama-3": llama3_segments,
        "chatml": chatml_segments,
        "zephyr": zephyr_segments,
    }
    return kinds[template](tokenizer, turns)


def llama2_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    # After "[/INST]" SentencePiece writes the answer's space by itself; a byte-level tokenizer has to be told.
    space = "" if tokenizer.space_in_front else " "
    system = ""
    for role, text in turns:
        if role == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif role == "user":  # stripped together with the system prompt in front of it
            yield tokenizer.encode(f"[INST] {(system + text).strip()} [/INST]", bos=True), "user"
            system = ""
        else:
            yield tokenizer.encode(f"{space}{text.strip()} ", eos=True), role


def llama3_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    def header(name: str) -> Segment:
        start, end = (
            tokenizer.specials["<|start_header_id|>"],
            tokenizer.specials["<|end_header_id|>"],
        )
        return [start, *tokenizer.encode(name), end, *tokenizer.encode("\n\n")], "header"

    yield [tokenizer.specials["<|begin_of_text|>"]], "header"
    for role, text in turns:
        yield header("assistant" if role == CONTEXT else role)
        yield tokenizer.encode(text.strip()) + [tokenizer.end_of_turn_id], role
    if turns[-1][0] == "user":
        yield header("assistant")


def chatml_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
    for role, text in turns:
        header, body = split_text(
            tokenizer, "assistant\n" if role == CONTEXT else f"{role}\n", text
        )
        yield [start, *header], "header"
        yield [*body, end], role
        yield tokenizer.encode("\n"), "header"
    if turns[-1][0] == "user":
        yield [start, *tokenizer.encode("assistant\n")], "header"


def zephyr_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    line = ""  # the end of the turn before
    for role, text in turns:
        name = "assistant" if role == CONTEXT else role
        header, body = split_text(tokenizer, f"{line}<|{name}|>\n", text)
        yield header, "header"
        yield [*body, tokenizer.eos_id], role
        line = "\n"
    yield tokenizer.encode(f"{line}<|assistant|>\n" if turns[-1][0] == "user" else line), "header"


def split_text(tokenizer: Tokenizer, header: str, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a header and a text in one piece, as the vendors have it, cut where they are no longer the header's own.

    A text that begins with white space may swallow the header's line feed into a token of its own: that is then the text's.
    """
    alone, whole = tokenizer.encode(header), tokenizer.encode(header + text)
    same = next(
        (at for at, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole))
    )
    return whole[:same], whole[same:]


# ---------------------------------------------------------------------------------------------------------
# A data set

Sample = tuple[list[int], list[bool]]  # token ids, and for each whether it is supervised


class ChatDataset:
    """The conversations of a .json or .jsonl file (data/records.py), tokenised when they are asked for.

    Every record is checked before training starts. `system` is put in front of conversations that have
    no system turn of their own.
    """

    what, read, row_count = (
        "conversation",
        staticmethod(read_turns),
        1,
    )  # a record's name, what reads it, its rows in a batch

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        template: str,
        max_length: int,
        system: str = "",
    ):
        self.path, self.tokenizer, self.template, self.max_length = (
            Path(path),
            tokenizer,
            template,
            max_length,
        )
        self.system = system
        self.shortened: Counter[str] = (
            Counter()
        )  # what was left out -> records that are used without it
        self.too_long: set[int] = (
            set()
        )  # of the records tokenised so far: not one exchange fits max_length
        self.truncated: set[int] = (
            set()
        )  # of the records tokenised so far: only the first exchanges fit
        self.records = Records(path)
        usable = Usable(self.records, self.read, self.what)
        keys, wholes = [], []
        for key, record, (turns, left_out) in usable:
            keys.append(key)
            wholes.append(self.whole_of(record, key, turns))
            if left_out:
                self.shortened[left_out] += 1
        self.keys = np.array(keys, dtype=np.int64)
        self.wholes = np.array(
            wholes, dtype=np.int64
        )  # of each record, the conversation that it is a piece of
        self.unused = usable.unused  # reason -> records that were dropped

    def __len__(self) -> int:
        return len(self.keys)

    def turns(self, index: int) -> list[Turn]:
        turns, _ = read_turns(self.records[int(self.keys[index])])
        return with_system(self.system, turns)

    def rows(self, index: int) -> list[Sample]:
        """What a record is in a batch: token ids and mask; of a long conversation, the first exchanges that fit; nothing when none does."""
        segments = list(segments_of(self.tokenizer, self.template, self.turns(index)))
        behind = list(
            itertools.accumulate(len(tokens) for tokens, _ in segments)
        )  # how long it is with each segment
        if behind[-1] <= self.max_length:
            return [with_mask(segments)]
        # an exchange ends with its answer
        ends = [
            at + 1
            for at, (_, role) in enumerate(segments)
            if role in ("assistant", CONTEXT) and behind[at] <= self.max_length
        ]
        kept = segments[: ends[-1]] if ends else []
        if all(role != "assistant" for _, role in kept):
            self.too_long.add(index)
            return []
        self.truncated.add(index)
        return [with_mask(kept)]

    def report(self, held_out: int = 0) -> str:
        """How many conversations there are, and what was left out so far, by reason."""
        too_long = f"{'an answer beyond' if self.row_count > 1 else 'no exchange within'} {self.max_length} tokens"
        dropped = [*self.unused.items(), (too_long, len(self.too_long))]
        shortened = [
            *self.shortened.items(),
            (f"what is beyond {self.max_length} tokens", len(self.truncated)),
        ]
        split = f" ({len(self) - held_out} to train on, {held_out} held out)" if held_out else ""
        return (
            f"{self.path.name}: {len(self)} {self.what}s{split}"
            + "".join(f"; dropped {count}: {reason}" for reason, count in dropped if count)
            + "".join(f"; shortened {count} by {what}" for what, count in shortened if count)
        )

    def whole_of(self, record: dict, key: int, turns: list[Turn]) -> int:
        """A number for the conversation that a record is a piece of: by the same id, and ShareGPT's ids X_0 and X_1 are pieces of X."""
        id = record.get("conversation_id", record.get("id"))
        piece = re.fullmatch(r"(.+)_\d+", id) if isinstance(id, str) else None
        return number_of(
            f"piece {piece[1]}"
            if piece
            else f"piece {id}"
            if type(id) in (str, int)
            else f"record {key}"
        )


class PairDataset(ChatDataset):
    """Pairs of a chosen and a rejected answer to the same prompt, in the same way: two rows each, the last answer supervised."""

    what, read, row_count = "pair", staticmethod(read_pair), 2

    def turns(self, index: int) -> tuple[list[Turn], list[Turn]]:
        """The conversations with the chosen answer and with the rejected one."""
        (chosen, rejected), _ = read_pair(self.records[int(self.keys[index])])
        return with_system(self.system, chosen), with_system(self.system, rejected)

    def rows(self, index: int) -> list[Sample]:
        """Chosen and rejected, or none when one of them is too long: nothing of a pair can be cut off."""
        both = [encode_chat(self.tokenizer, self.template, turns) for turns in self.turns(index)]
        if max(len(ids) for ids, _ in both) > self.max_length:
            self.too_long.add(index)
            return []
        return both

    def whole_of(self, record: dict, key: int, turns: tuple[list[Turn], list[Turn]]) -> int:
        """Several pairs of one prompt stay on one side of a split."""
        return number_of(f"prompt {turns[0][:-1]}")


def mean_supervised(rows: list[Sample]) -> float:
    """How many labels of a row are supervised, on average; the first token of a row is no label."""
    return sum(sum(mask[1:]) for _, mask in rows) / len(rows)


def number_of(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=7).digest(), "big"
    )


Score = Callable[[list[tuple[list[int], list[int]]]], list[tuple[float, bool]]]
# (context, continuation) pairs -> (log-likelihood of the continuation, is each of its tokens the arg-max)


def share_preferred(score: Score, rows: list[Sample]) -> float:
    """The share of pairs, rows chosen, rejected, chosen, ..., whose chosen answer is likelier than the rejected one."""
    starts = [supervised.index(True) for _, supervised in rows]
    stops = [len(supervised) - supervised[::-1].index(True) for _, supervised in rows]
    found = score(
        [(ids[:start], ids[start:stop]) for (ids, _), start, stop in zip(rows, starts, stops)]
    )
    right = [chosen > rejected for (chosen, _), (rejected, _) in zip(found[::2], found[1::2])]
    return sum(right) / len(right)


# ---------------------------------------------------------------------------------------------------------
# Batches

Position = tuple[int, int, int]  # epoch, window, batch within the window
WINDOW = 32  # batches; samples are sorted by length within a window of the shuffled order


def stream_batches(
    dataset: ChatDataset,
    indices: list[int],
    batch_size: int,
    seed: int,
    position: Position = (0, 0, 0),
) -> Iterator[tuple[Position, list[Sample]]]:
    """Endless batches of records' rows, of like length, each with the position behind it, from which to go on.

    The order is a function of seed and epoch: shuffled, then sorted by length within windows, whose batches are
    shuffled again. So padding is small, and no length is seen before another.
    """
    epoch, window, skip = position
    width = WINDOW * batch_size
    while True:
        order = random.Random(f"order {seed} {epoch}").sample(indices, len(indices))
        found = window > 0
        if window and (window - 1) * width >= len(order):
            raise UsageError(
                f"{dataset.path}: a position beyond its data, window {window} of an epoch"
            )
        for start in range(window * width, len(order), width):
            records = [
                rows for index in order[start : start + width] if (rows := dataset.rows(index))
            ]
            records.sort(key=lambda rows: max(len(ids) for ids, _ in rows))
            if skip > -(-len(records) // batch_size):
                raise UsageError(
                    f"{dataset.path}: a position beyond its data, batch {skip} of a window"
                )
            batches = [
                sum(records[first : first + batch_size], [])
                for first in range(0, len(records), batch_size)
            ]
            random.Random(f"window {seed} {epoch} {window}").shuffle(batches)
            found = found or bool(batches)
            for number, batch in enumerate(batches[skip:], skip + 1):
                yield (epoch, window, number), batch
            window, skip = window + 1, 0
        if not found:
            raise UsageError(
                f"{dataset.path}: every {dataset.what} is longer than --max-length {dataset.max_length}"
            )
        epoch, window = epoch + 1, 0


def chat_batches(
    dataset: ChatDataset,
    indices: list[int],
    batch_size: int,
    parts: int,
    seed: int,
    position: list[int] | None,
) -> Iterator[tuple[list[int], list[tuple[Tensor, Tensor]]]]:
    """stream_batches as tensors, each batch in some parts: the position behind it, and (tokens, labels) per part."""
    for behind, samples in stream_batches(
        dataset, indices, batch_size, seed, tuple(position or (0, 0, 0))
    ):
        size = dataset.row_count * -(
            -len(samples) // (dataset.row_count * parts)
        )  # a pair is not divided
        yield (
            list(behind),
            [collate(samples[first : first + size]) for first in range(0, len(samples), size)],
        )


def hold_out(
    dataset: ChatDataset, seed: int, count: int | None = None
) -> tuple[list[int], list[int]]:
    """Indices to train on, and of some conversations to measure on: `count`, or 1%, at least 16, at most a tenth.

    Pieces of one conversation stay on one side. But ids that more than a tenth of the records share (and more
    than 16), such as train_0, train_1, ..., are taken to number records.
    """
    total = len(dataset)
    if count is None:
        count = max(1, min(max(16, total // 100), total // 10))
    if total <= count:
        raise UsageError(
            f"{dataset.path}: {total} usable {dataset.what}s, and {count} of them to hold out; --held-out N changes that"
        )
    order = random.Random(f"held out {seed}").sample(range(total), total)
    wholes = dataset.wholes.tolist()
    sizes, most = Counter(wholes), max(16, total // 10)
    wholes = [
        whole if sizes[whole] <= most and len(sizes) > 1 else -1 - index
        for index, whole in enumerate(wholes)
    ]
    sizes = Counter(wholes)
    chosen: set[int] = set()
    left = count
    for index in order:
        if wholes[index] not in chosen and sizes[wholes[index]] <= left:
            chosen.add(wholes[index])
            left -= sizes[wholes[index]]
    if count and not chosen:  # every conversation has more pieces than that
        chosen.add(min(wholes, key=lambda whole: (sizes[whole], whole)))
    return [index for index in range(total) if wholes[index] not in chosen], [
        index for index in range(total) if wholes[index] in chosen
    ]


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) padded on the right, and labels (B, T) already shifted: row t's label is token t + 1, or -100."""
    length = max(len(ids) for ids, _ in samples) - 1
    tokens = torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE)
    for row, (ids, supervised) in enumerate(samples):
        row_ids = torch.tensor(ids)
        tokens[row, : len(ids) - 1] = row_ids[:-1]
        labels[row, : len(ids) - 1] = row_ids[1:].masked_fill(~torch.tensor(supervised[1:]), IGNORE)
    return tokens, labels


def main():
    from run.cli import ArgumentParser, positive_int

    parser = ArgumentParser(
        description="Show the first conversations of a data file as training sees them."
    )
    parser.add_argument("data", help="a .json or .jsonl file")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="a tokenizer.model or tokenizer.json, or a folder that has one",
    )
    parser.add_argument("--template", choices=TEMPLATES, help="default: from the tokenizer's kind")
    parser.add_argument(
        "--system", metavar="TEXT", help="a system prompt for conversations that have none"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=4096,
        help="tokens per conversation (default 4096)",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="chosen and rejected answers, as --loss pairwise takes them",
    )
    parser.add_argument("--show", type=positive_int, default=3, help="how many (default 3)")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    template = args.template or default_template(tokenizer)
    system = system_of(tokenizer, template, args.system)
    dataset = (PairDataset if args.pairs else ChatDataset)(
        args.data, tokenizer, template, args.max_length, system
    )
    print(f"template {template}" + (f", system prompt {system!r}" if system else ""))
    for ids, supervised in itertools.chain(*map(dataset.rows, range(min(args.show, len(dataset))))):
        print(f"-- {len(ids)} tokens, {sum(supervised)} supervised, in capitals here")
        for id, is_supervised in zip(ids, supervised):
            text = tokenizer.token_bytes(id).decode("utf-8", "replace")
            print(text.upper() if is_supervised else text, end="")
        print()
    print(dataset.report())


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
