"""Conversations as token ids with a label mask, and data sets of them as batches.

    python -m data.chat out/seed0/demonstrations.jsonl --tokenizer out/seed0/tiny-s      # what training will see
    python -m data.chat out/seed0/preferences.jsonl --tokenizer out/seed0/tiny-s --pairs # of pairs of answers

A conversation becomes token ids turn by turn, so the mask is right by construction: the model is supervised on
the assistant's tokens and the token that ends its turn, and on nothing else.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from data.errors import UsageError
from data.records import (
    ANSWERED,
    CONTEXT,
    FRAMES,
    Records,
    Turn,
    form_of,
    read_pair,
    read_turns,
)
from data.tokenizer import Tokenizer, load_tokenizer

# ---------------------------------------------------------------------------------------------------------
# Templates

TEMPLATES = ("llama-2", "llama-3", "chatml", "zephyr", "mistral")
NEEDED = {
    "llama-3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}  # special tokens; the last one ends a turn


def default_template(tokenizer: Tokenizer) -> str:
    """By the special tokens that the tokenizer has; where it has those of several, by its checkpoint's own chat_template.

    A Mistral's [INST] is plain text in its first tokenizers; there its chat_template tells it from Llama-2's.
    """
    own = tokenizer.chat_template
    if "[INST]" in tokenizer.specials or ("[INST]" in own and "<<SYS>>" not in own):
        return "mistral"
    able = [name for name in NEEDED if can_speak(tokenizer, name)]
    told = [name for name in able if NEEDED[name][1] in own or NEEDED[name][0] in own]
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


def end_tokens(tokenizer: Tokenizer, template: str) -> set[int]:
    """All tokens that end the assistant's turn: one, and in qa also those that begin with a new line."""
    if template != "qa":
        return {end_token(tokenizer, template)}
    lines = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id)[:1] == b"\n"]
    return {tokenizer.eos_id, *lines}


def end_token(tokenizer: Tokenizer, template: str) -> int:
    """The token that ends the assistant's turn."""
    *_, mark = NEEDED.get(template, [""])
    return tokenizer.specials.get(mark, tokenizer.eos_id)


def stop_ids(tokenizer: Tokenizer, template: str, llamas: list) -> set[int]:
    """Tokens that end an answer: the template's, the tokenizer's, and what the checkpoints of these networks name."""
    ids = end_tokens(tokenizer, template) | {tokenizer.eos_id, tokenizer.end_of_turn_id}
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
    mistral    <s> once, then [INST] question [/INST] answer</s> for each exchange; where [INST] is a token of the
               tokenizer (from v3 on), [INST] question[/INST] answer</s>, and without spaces if it is byte-level
    qa         Question: text, new line, Answer: text, empty line; for a base without turns, and not to train in

    A system turn may come first; mistral has it before the first question, with a blank line between them.
    Texts are stripped as the vendors do it, in chatml and zephyr not at all, in mistral the answers alone.
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
            f"the {template} template needs the special tokens {', '.join(NEEDED[template])}, which this tokenizer lacks; "
            f"--template takes {', '.join(name for name in TEMPLATES if can_speak(tokenizer, name))} with it"
        )
    kinds = {
        "llama-2": llama2_segments,
        "llama-3": llama3_segments,
        "chatml": chatml_segments,
        "zephyr": zephyr_segments,
        "mistral": mistral_segments,
        "qa": qa_segments,
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


def mistral_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    start, end = (tokenizer.specials.get(name) for name in ("[INST]", "[/INST]"))
    # A space follows each mark, but for byte-level tokenizers that have [INST] as a token. Most others
    # write it in front of a text by themselves; not where the text has one (Metaspace), so it is told.
    if tokenizer.space_in_front:
        space = " " if tokenizer.encode(" a") == tokenizer.encode("a") else ""
    else:
        space = " " if start is None else ""
    system = ""
    for role, text in turns:
        if role == "system":
            system = f"{text}\n\n"
        elif role == "user" and start is not None:
            yield [*begin, start, *tokenizer.encode(space + system + text), end], role
        elif role == "user":
            yield [*begin, *tokenizer.encode(f"[INST] {system + text} [/INST]")], role
        else:
            yield tokenizer.encode(space + text.strip(), eos=True), role
        if role == "user":
            begin, system = [], ""


def qa_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[Segment]:
    asked = ""  # of an exchange, all up to its answer
    for number, (role, text) in enumerate(turns):
        if role == "system":
            asked = f"{text.strip()}\n\n"
        elif role == "user":
            asked += f"Question: {text.strip()}\nAnswer:"
            yield tokenizer.encode(asked, bos=number <= 1), "user"
            asked = ""
        else:
            yield tokenizer.encode(f" {text.strip()}\n\n"), role


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
# Conversations read back
#
# A base with another tokenizer may be asked in a form of its own. What it is asked comes as the value network's tokens.

# A turn in each template, special tokens between two "\0". Groups: the role and the text, or texts of these ROLES.
TURN = {
    "llama-2": r"\[INST\] (?:<<SYS>>\n(.*?)\n<</SYS>>\n\n)?(.*?) \[/INST\](?: ?(.*?) ?\0[^\0]*\0)?",
    "llama-3": r"\0<\|start_header_id\|>\0(\w+)\0<\|end_header_id\|>\0\n\n(.*?)(?:\0<\|eot_id\|>\0|$)",
    "chatml": r"\0<\|im_start\|>\0(\w+)\n(.*?)(?:\0<\|im_end\|>\0|$)",
    "zephyr": r"<\|(system|user|assistant)\|>\n(.*?)(?:\0[^\0]*\0|$)",
    "mistral": r"\0?\[INST\]\0? ?(.*?) ?\0?\[/INST\]\0?(?: ?(.*?)\0[^\0]*\0)?",
}
ROLES = {"llama-2": ("system", "user", "assistant"), "mistral": ("user", "assistant")}


def read_chat(tokenizer: Tokenizer, template: str, ids: list[int]) -> list[Turn]:
    """The turns that encode_chat made these ids of; none where it did not make them."""
    names = {id: name for name, id in tokenizer.specials.items()}
    text, plain = "", []
    for id in [*ids, None]:
        if id is not None and tokenizer.token_bytes(id):
            plain.append(id)
            continue
        text += tokenizer.decode(plain)
        if id is not None and id != tokenizer.bos_id or id in names:
            text += f"\0{names.get(id, id)}\0"
        plain = []
    turns = []
    for groups in re.findall(TURN.get(template, "$^"), text, re.DOTALL):
        said = zip(ROLES[template], groups) if template in ROLES else [groups]
        turns += [(role, text) for role, text in said if text]
    return turns


# ---------------------------------------------------------------------------------------------------------
# A data set

Sample = tuple[list[int], list[bool]]  # token ids, and for each whether it is supervised


@dataclass(eq=False)
class ChatDataset:
    """The conversations of a .json or .jsonl file (data/records.py), tokenised when they are asked
    for.

    Every record is checked before training starts. `system` is put in front of conversations that
    have no system turn of their own.
    """

    path: str | Path
    tokenizer: Tokenizer
    template: str
    max_length: int
    system: str = ""
    reasoning: str = ""  # "drop": trained on the answers alone

    # what a record is, what reads it, and its rows in a batch
    what, read, row_count = "conversation", staticmethod(read_turns), 1

    def __post_init__(self):
        self.path = Path(self.path)
        self.records = Records(self.path)
        if self.template == "chatml" and "<think>" in self.tokenizer.specials:
            self.reasoning = self.reasoning or "keep"
        self.read = partial(type(self).read, reasoning=self.reasoning)
        self.unused: Counter[str] = Counter()  # reason -> records that were dropped
        self.shortened: Counter[str] = Counter()  # what was left out -> records used without it
        # of the records tokenised so far: not one exchange fits max_length, or only the first ones
        self.too_long: set[int] = set()
        self.truncated: set[int] = set()
        self.templated, self.copies = 0, 0  # records in a template already; that came before
        self.ids, self.prompts = [], []  # by which the pieces of a conversation are told
        keys, seen = [], set()
        usable = self.records.usable(self.read, self.unused, self.what)
        for key, record, (turns, left_out) in usable:
            keys.append(key)
            text = str(turns)
            self.ids.append((record.get("conversation_id"), record.get("id")))
            self.prompts.append(hash(str(self.prompt(turns))))
            self.copies += hash(text) in seen
            seen.add(hash(text))
            self.templated += FRAMES.search(text) is not None
            if left_out:
                self.shortened[left_out] += 1
        self.keys = np.array(keys, dtype=np.int64)

    @cached_property
    def wholes(self) -> np.ndarray:
        """For each record the number of the one that stands for its conversation (find_wholes)."""
        return find_wholes(self.ids, self.prompts)

    def prompt(self, turns: list[Turn]):
        """What records have in common that stay on one side of a split: all turns of a
        conversation.
        """
        return turns

    def __len__(self) -> int:
        return len(self.keys)

    def turns(self, index: int) -> list[Turn]:
        turns, _ = self.read(self.records[int(self.keys[index])])
        return with_system(self.system, turns)

    def rows(self, index: int) -> list[Sample]:
        """What a record is in a batch: token ids and mask; of a long conversation, the first
        exchanges that fit; nothing when none does.
        """
        segments = list(segments_of(self.tokenizer, self.template, self.turns(index)))
        length, kept = 0, 0  # an exchange ends with its answer
        for at, (tokens, role) in enumerate(segments, 1):
            length += len(tokens)
            if role in ANSWERED and length <= self.max_length:
                kept = at
        if length > self.max_length:
            segments = segments[:kept]
            if all(role != "assistant" for _, role in segments):
                self.too_long.add(index)
                return []
            self.truncated.add(index)
        return [with_mask(segments)]

    def report(self, held_out: list[int] | None = None) -> str:
        """How many conversations there are, and what was left out so far, by reason."""
        too_long = "an answer beyond" if self.row_count > 1 else "no exchange within"
        limit = f"{self.max_length} tokens"
        dropped = self.unused | Counter({f"{too_long} {limit}": len(self.too_long)})
        shortened = self.shortened | Counter({f"what is beyond {limit}": len(self.truncated)})
        notes = [f"{self.path.name}: {len(self)} {self.what}s"]
        if held_out:
            notes[0] += f" ({len(self) - len(held_out)} to train on, {len(held_out)} held out)"
            wholes = Counter(self.wholes[held_out].tolist()).values()
            if together := [size for size in wholes if size > 1]:
                notes.append(
                    f"{sum(together)} of those held out are pieces or copies of {len(together)} {self.what}s"
                )
        notes += [f"dropped {count}: {reason}" for reason, count in dropped.items() if count]
        notes += [f"shortened {count} by {what}" for what, count in shortened.items() if count]
        if self.copies:
            notes.append(f"{self.copies} are copies of others")
        if self.templated:
            notes.append(
                f"{self.templated} have the marks of a chat template in their texts ([INST], <|im_start|> or such), which "
                f"the template {self.template} frames once more; take them out if they are not meant"
            )
        return "; ".join(notes)


class PairDataset(ChatDataset):
    """Pairs of a chosen and a rejected answer to the same prompt, in the same way: two rows each,
    the last answer supervised.
    """

    what, read, row_count = "pair", staticmethod(read_pair), 2

    def prompt(self, turns: tuple[list[Turn], list[Turn]]):
        """Several pairs of one prompt stay on one side."""
        return turns[0][:-1]

    def turns(self, index: int) -> tuple[list[Turn], list[Turn]]:
        """The conversations with the chosen answer and with the rejected one."""
        (chosen, rejected), _ = self.read(self.records[int(self.keys[index])])
        return with_system(self.system, chosen), with_system(self.system, rejected)

    def rows(self, index: int) -> list[Sample]:
        """Chosen and rejected, or none when one of them is too long: nothing of a pair can be cut
        off.
        """
        both = [encode_chat(self.tokenizer, self.template, turns) for turns in self.turns(index)]
        if max(len(ids) for ids, _ in both) > self.max_length:
            self.too_long.add(index)
            return []
        return both


PIECES = 16  # a conversation has few pieces; a source has many records


def name_of_whole(conversation_id, id) -> tuple[str, int | None]:
    """What names the conversation that a record is a piece of, and its number there: by ShareGPT's
    ids X_0, X_1 and so on.
    """
    if type(conversation_id) in (str, int):
        return f"conversation {conversation_id}", None
    piece = re.fullmatch(r"(.+)_(\d{1,9})", id) if isinstance(id, str) else None
    if piece:
        return f"pieces of {piece[1]}", int(piece[2])
    return (f"id {id}" if type(id) in (str, int) else ""), None


def find_wholes(ids: list[tuple], prompts: list[int]) -> np.ndarray:
    """For each record the number of a record that stands for its conversation: of the same name, or
    with the same content. `ids` are its conversation_id and id, `prompts` hashes of its content.

    Pieces of a conversation follow each other, are numbered from 0 on, and are few. Mixtures of
    data number the records of a source in the same way, or give all of them one id: those are many,
    or do not follow each other.
    """
    names = [name_of_whole(*pair) for pair in ids]
    sizes = Counter(name for name, _ in names)
    most = max(PIECES, len(names) // 10)
    wholes, of_name, of_prompt = list(range(len(names))), {}, {}
    last = ("", None)
    for at, (name, number) in enumerate(names):
        if number is None:
            is_named = name and sizes[name] <= (most if name.startswith("conv") else PIECES)
        else:
            # a run from 0 on that goes on; what stands alone elsewhere keeps apart
            goes_on = last[0] == name and name in of_name and number > last[1]
            is_named = sizes[name] <= PIECES and (goes_on or number == 0)
        if is_named:
            wholes[at] = of_name.setdefault(name, at)
        last = (name, number)
        wholes[at] = of_prompt.setdefault(prompts[at], wholes[at])
    return np.array(wholes, dtype=np.int64)


def mean_supervised(rows: list[Sample]) -> float:
    """How many labels of a row are supervised, on average; the first token of a row is no label."""
    return sum(sum(mask[1:]) for _, mask in rows) / len(rows)


Score = Callable[[list[tuple[list[int], list[int]]]], list[tuple[float, bool]]]
# (context, continuation) pairs -> (log-likelihood of the continuation, is each of its tokens the
# arg-max)


def share_preferred(score: Score, rows: list[Sample]) -> float:
    """The share of pairs, rows chosen, rejected, chosen, ..., whose chosen answer is likelier than
    the rejected one.
    """
    starts = [supervised.index(True) for _, supervised in rows]
    stops = [len(supervised) - supervised[::-1].index(True) for _, supervised in rows]
    found = score(
        [(ids[:start], ids[start:stop]) for (ids, _), start, stop in zip(rows, starts, stops)]
    )
    right = [chosen > rejected for (chosen, _), (rejected, _) in zip(found[::2], found[1::2])]
    return sum(right) / len(right)


# --------------------------------------------------------------------------------------------------
# Batches

Position = list[int]  # epoch, window, batch within the window
WINDOW = 32  # batches; samples are sorted by length within a window of the shuffled order


def stream_batches(
    dataset: ChatDataset,
    indices: list[int],
    batch_size: int,
    seed: int,
    position: Position | None = None,
) -> Iterator[tuple[Position, list[Sample]]]:
    """Endless batches of records' rows, of like length, each with the position behind it, from
    which to go on (None: the start).

    The order is a function of seed and epoch: shuffled, then sorted by length within windows, whose
    batches are shuffled again. So padding is small, and no length is seen before another.
    """
    epoch, window, skip = position or (0, 0, 0)
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
                yield [epoch, window, number], batch
            window, skip = window + 1, 0
        if not found:
            raise UsageError(
                f"{dataset.path}: every {dataset.what} is longer than --max-length {dataset.max_length}"
            )
        epoch, window = epoch + 1, 0


def hold_out(
    dataset: ChatDataset, seed: int, count: int | None = None
) -> tuple[list[int], list[int]]:
    """Indices to train on, and of some conversations to measure on: `count`, or 1%, at least 16, at
    most a tenth.

    Pieces and copies of one conversation stay on one side (find_wholes).
    """
    total = len(dataset)
    if count is None:
        count = max(1, min(max(16, total // 100), total // 10))
    if total <= count:
        raise UsageError(
            f"{dataset.path}: {total} usable {dataset.what}s, and {count} of them to hold out; --held-out N changes that"
        )
    wholes = dataset.wholes.tolist()
    if len(set(wholes)) == 1:
        wholes = range(total)
    sizes = Counter(wholes)
    chosen: set[int] = set()
    left = count
    for index in random.Random(f"held out {seed}").sample(range(total), total):
        if wholes[index] not in chosen and sizes[wholes[index]] <= left:
            chosen.add(wholes[index])
            left -= sizes[wholes[index]]
    if count and not chosen:  # every conversation has more pieces than that
        chosen.add(min(wholes, key=lambda whole: (sizes[whole], whole)))
    held_out = [index for index in range(total) if wholes[index] in chosen]
    return sorted(set(range(total)) - set(held_out)), held_out


def main():
    from run.cli import ArgumentParser, positive_int

    parser = ArgumentParser(
        description="Show the first conversations of a data file as training sees them; data/README.md lists the forms."
    )
    add = parser.add_argument
    add("data", help="a .json or .jsonl file")
    add("--tokenizer", required=True, help="a tokenizer.model or tokenizer.json, or its folder")
    add("--template", choices=TEMPLATES, help="default: from the tokenizer's kind")
    add("--system", metavar="TEXT", help="a system prompt for conversations that have none")
    add("--reasoning", choices=["drop"], default="", help="leave out what was thought")
    add("--max-length", type=positive_int, default=4096, help="in tokens (default 4096)")
    add("--pairs", action="store_true", help="two answers each, as --loss pairwise takes them")
    add("--show", type=positive_int, default=3, help="how many (default 3)")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    template = args.template or default_template(tokenizer)
    system = system_of(tokenizer, template, args.system)
    kind = PairDataset if args.pairs else ChatDataset
    dataset = kind(args.data, tokenizer, template, args.max_length, system, args.reasoning)
    print(f"template {template}" + (f", system prompt {system!r}" if system else ""))
    for index in range(min(args.show, len(dataset))):
        for ids, supervised in dataset.rows(index):
            print(f"-- {len(ids)} tokens, {sum(supervised)} supervised, in capitals here")
            for id, is_supervised in zip(ids, supervised):
                text = tokenizer.token_bytes(id).decode("utf-8", "replace")
                print(text.upper() if is_supervised else text, end="")
            print()
    forms = Counter(form_of(dataset.records[int(key)]) for key in dataset.keys)
    print("; ".join(f"{form}, {count} records" for form, count in forms.most_common()))
    print(dataset.report())


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
