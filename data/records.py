"""What the records of a data file mean: conversations as other programs write them, or plain texts.

    python -m data.chat FILE --tokenizer out/seed0/tiny-s      # what comes of a file

data/README.md has every form, and what is dropped or refused, in one table. One rule for all of it: a record of a
known form that cannot be used is dropped and counted by reason; a file of which no record has a known form is refused.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data.errors import UsageError
from data.files import json_fault, open_text

Turn = tuple[str, str]  # (role, text), role one of "system", "user", "assistant", and CONTEXT
LEADING = "a leading answer"
CONTEXT = "context"  # the role of an assistant's turn that is in the prompt, and that nothing is learnt from

# ---------------------------------------------------------------------------------------------------------
# One record

LISTS = ("conversations", "conversation", "messages")  # where the turns are
ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content", "text")
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "claude": "assistant",
    "gemini": "assistant",
}
ONE_EXCHANGE = [
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
]
SYSTEM = ("system", "system_prompt", "system_message")  # beside the turns
# What no template here shows, of a record or a turn; and what belongs to a question beside its own text.
UNSEEN = (
    "tools",
    "functions",
    "image",
    "images",
    "image_path",
    "video",
    "videos",
    "audio",
    "audios",
)
UNSEEN_BESIDE = ("options", "choices", "documents")
WEIGHTS = (
    "weight",
    "loss_weight",
    "train",
    "loss",
    "trainable",
)  # of a turn or a record: OpenAI's, and others'


class UnknownForm(ValueError):
    """A record of no form that we know."""


class Unusable(ValueError):
    """Why a record of a known form cannot be used."""


def read_turns(record) -> tuple[list[Turn], str]:
    """The turns of one record, and what was left out of it: an optional system turn, then whole exchanges.

    Raises Unusable, UnknownForm, and UsageError for what is no demonstration at all.
    """
    if isinstance(record, dict):
        refuse_preferences(record)
    return keep_exchanges(find_turns(record))


def find_turns(record) -> list[Turn]:
    """All turns of a record, as they stand in it."""
    if not isinstance(record, dict):
        raise UnknownForm("no object in it")
    key = next((key for key in LISTS if key in record), None)
    pair = next((pair for pair in ONE_EXCHANGE if record.keys() >= set(pair)), None)
    if key is None and pair is None:
        raise UnknownForm(
            "neither 'conversations' nor 'messages' in it, nor a question and its answer under names that are known"
        )
    refuse_unseen(record, UNSEEN if key else UNSEEN + UNSEEN_BESIDE)
    if weight_of(record) == 0:
        raise Unusable("weight 0")
    if key is None:
        turns = one_exchange(record, *pair)
    elif isinstance(record[key], list):
        turns = [read_turn(turn) for turn in record[key]]
    else:
        raise Unusable(f"'{key}' that is no list")
    if turns and turns[0][0] == "system" and turns[0][1].strip():
        return turns
    texts = [text_of(record.get(name) or "", "a system prompt") for name in SYSTEM]
    return next(([("system", text), *turns] for text in texts if text.strip()), turns)


def refuse_unseen(fields: dict, names: tuple[str, ...]) -> None:
    for name in names:
        if fields.get(name) not in (None, "", [], {}, "[]"):
            raise Unusable(f"'{name}', which no template here can show")


def refuse_preferences(record: dict) -> None:
    if any(
        str(name).startswith(("rejected", "non_preferred")) and value is not None
        for name, value in record.items()
    ):
        raise UsageError(
            "is a preference, chosen and rejected, and --loss ce and kl take demonstrations; train with --loss pairwise, "
            "or keep the chosen answers alone, as conversations"
        )
    label, completed = record.get("label"), {"prompt", "completion"} <= record.keys()
    if isinstance(label, bool) or completed and label in (0, 1, "true", "false", "True", "False"):
        raise UsageError(
            "is a preference, a boolean label as in KTO's data, and training takes demonstrations; keep the "
            "records whose label is true, without the label"
        )


def one_exchange(record: dict, question: str, answer: str) -> list[Turn]:
    """Alpaca's instruction, input and output, with a history of earlier exchanges; other names of a question and its answer."""
    asked = [text_of(record[question], repr(question))] + [
        text_of(record.get(name) or "", repr(name)) for name in ("context", "input")
    ]
    turns: list[Turn] = []
    history = record.get("history") or []
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Unusable("a history that is no list of questions and answers")
        turns += zip(("user", "assistant"), [text_of(text, "a history") for text in exchange])
    return [
        *turns,
        ("user", "\n".join(text for text in asked if text)),
        ("assistant", text_of(record[answer], repr(answer))),
    ]


def read_turn(turn) -> Turn:
    if not isinstance(turn, dict):
        raise Unusable("a turn that is no object")
    role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    if not isinstance(role, str):
        raise Unusable("a turn without a role")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise Unusable(f"unknown role {role[:40]!r}")
    refuse_unseen(turn, UNSEEN)
    content = next((turn[key] for key in TEXT_KEYS if key in turn), None)
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("a tool call" if content else "a tool call without text")
    if content is None:
        raise Unusable("a turn without text")
    text = text_of(content, "a turn")
    return (CONTEXT if known == "assistant" and weight_of(turn) == 0 else known), text


def weight_of(fields: dict) -> int:
    """0 for what is not to be learnt, else 1."""
    weights = [fields[name] for name in WEIGHTS if fields.get(name) is not None]
    if any(not isinstance(weight, (int, float)) or weight not in (0, 1) for weight in weights):
        raise Unusable("a weight that is neither 0 nor 1")
    return int(0 not in weights)


def text_of(content, what: str) -> str:
    """A text, or the texts of a list of parts joined."""
    text = content
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Unusable(f"a part that is no text ({str(kind)[:40]})")
        text = "".join(part["text"] for part in content)
    if not isinstance(text, str):
        raise Unusable(f"{what} that is no text")
    if not is_unicode(text):
        raise Unusable("half of a surrogate pair")
    return text


def keep_exchanges(turns: list[Turn]) -> tuple[list[Turn], str]:
    """An optional system turn and whole exchanges: of what comes otherwise, what stands before it."""
    system = [turn for turn in turns[:1] if turn[0] == "system" and turn[1].strip()]
    while turns and turns[0][0] == "system" and (not turns[0][1].strip() or turns[0] in system):
        turns = turns[1:]
    left_out = []
    if turns and turns[0][0] in (
        "assistant",
        CONTEXT,
    ):  # ShareGPT was cut into pieces that may begin with an answer
        turns, left_out = turns[1:], [LEADING]
    exchanges: list[Turn] = []
    for question, answer in zip(turns[::2], turns[1::2]):
        if question[0] != "user" or answer[0] not in ("assistant", CONTEXT):
            left_out.append("roles that do not alternate")
            break
        if not question[1].strip() or not answer[1].strip():
            left_out.append("an empty turn and all after it")
            break
        exchanges += [question, answer]
    else:
        if len(turns) % 2:
            left_out.append(
                "a question without an answer"
                if turns[-1][0] == "user"
                else "roles that do not alternate"
            )
    if not exchanges:
        raise Unusable(
            "roles that do not alternate"
            if "roles that do not alternate" in left_out
            else "no answered question"
        )
    if all(role != "assistant" for role, _ in exchanges):
        raise Unusable("no answer to learn from, as all have weight 0")
    return system + exchanges, " and ".join(left_out)


# ---------------------------------------------------------------------------------------------------------
# One record of two answers

SIDES = ("chosen", "rejected")


def read_pair(record) -> tuple[tuple[list[Turn], list[Turn]], str]:
    """The turns with the chosen answer, those with the rejected one, and what was left out of both.

    Nothing but the last turns differ, and nothing but they is learnt: earlier answers are context.
    """
    if not isinstance(record, dict) or not record.keys() >= set(SIDES):
        raise UnknownForm(
            "no object with 'chosen' and 'rejected' in it, two answers as --loss pairwise takes them"
        )
    both = []
    for side in SIDES:
        turns, left_out = keep_exchanges(find_turns(with_answer(record, side)))
        if left_out not in ("", LEADING):
            raise Unusable(f"{left_out} in '{side}'")
        prompt = [(CONTEXT if role == "assistant" else role, text) for role, text in turns[:-1]]
        both.append([*prompt, turns[-1]])
    chosen, rejected = both
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("no common prompt")
    if CONTEXT in (chosen[-1][0], rejected[-1][0]):
        raise Unusable("an answer of weight 0")
    if chosen[-1][1].strip() == rejected[-1][1].strip():
        raise Unusable("equal answers")
    return (chosen, rejected), left_out


def with_answer(record: dict, side: str) -> dict:
    """The demonstration that a record is with one of its answers in the usual place.

    An answer is a text, a turn, turns behind a prompt, or a whole conversation, which then says all.
    """
    answer = record[side]
    rest = {name: value for name, value in record.items() if name not in SIDES}
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, (str, list)):
        raise Unusable(f"'{side}' that is no answer")
    if (
        isinstance(answer, list)
        and answer
        and read_turn(answer[0])[0] not in ("assistant", CONTEXT)
    ):
        return {name: value for name, value in rest.items() if name not in LISTS} | {
            "messages": answer
        }
    if isinstance(rest.get("prompt"), list):  # turns, Hugging Face's
        rest = {name: value for name, value in rest.items() if name not in LISTS} | {
            "messages": rest["prompt"]
        }
    key = next((key for key in LISTS if key in rest), None)
    if key is not None:
        if not isinstance(rest[key], list):
            raise Unusable(f"'{key}' that is no list")
        turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return rest | {key: [*rest[key], *turns]}
    if isinstance(answer, list):
        if len(answer) != 1:
            raise Unusable(f"'{side}' that is not one answer")
        answer = read_turn(answer[0])[1]
    place = next((pair for pair in ONE_EXCHANGE if pair[0] in rest), None)
    if place is None:
        raise Unusable("two answers without a prompt")
    others = {name for _, name in ONE_EXCHANGE}
    return {name: value for name, value in rest.items() if name not in others} | {place[1]: answer}


def is_unicode(text: str) -> bool:
    """JSON, and a command line, can spell half a surrogate pair, which is no character and has no UTF-8."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


# ---------------------------------------------------------------------------------------------------------
# All records of a file


class Records:
    """The records of a .json or .jsonl file, by keys that iterating yields.

    A file that begins with "[" is JSON and read whole; any other is JSON lines, whose keys are byte offsets.
    """

    def __init__(self, path: str | Path):
        self.path, self.whole = Path(path), None
        if is_plain_text(self.path):
            raise UsageError(
                f"{path}: plain text, by its name; conversations come as .json or .jsonl"
            )
        if self.path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
            raise UsageError(
                f"{path}: a table; conversations come as .json or .jsonl, plain texts as .txt or .jsonl"
            )
        self.file = open_text(path)
        start = self.file.read(4096).removeprefix(b"\xef\xbb\xbf")
        while not start.strip() and (more := self.file.read(2**20)):
            start = more
        if not start.strip():
            raise UsageError(f"{path}: {'nothing but white space' if start else 'an empty file'}")
        self.file.seek(0)
        if start.lstrip().startswith(b"["):
            try:
                self.whole = json.loads(self.file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                    makes = (
                        "{messages: .}"
                        if b'"role"' in start
                        or b'"from"' in start
                        and b'"conversations"' not in start
                        else ".[]"
                    )
                    raise UsageError(
                        f"{path}: several arrays after each other; `jq -c '{makes}' FILE` makes lines of them"
                    ) from None
                raise UsageError(f"{path}: {json_fault(error)}") from None

    def __iter__(self) -> Iterator[tuple[int, str, object]]:
        """Key, place in words, and record; every one is read, so that a broken line is not met after a day."""
        if self.whole is not None:
            for number, record in enumerate(self.whole):
                yield number, f"record {number + 1}", record
            return
        size, reported, offset = self.file.seek(0, 2), time.monotonic(), 0
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield offset, f"line {number}", self.parse(line, number)
            offset += len(line)
            self.file.seek(offset)  # somebody may have asked for a record
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                print(f"reading {self.path}: {100 * offset // size}%", file=sys.stderr)

    def parse(self, line: bytes, number: int):
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            is_whole = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
            if number == 1 and line.lstrip(b"\xef\xbb\xbf ").startswith(b"{") and not is_whole:
                self.refuse_spread()
            raise UsageError(
                f"{self.path}: line {number} is {json_fault(error, one_line=True)}"
            ) from None

    def refuse_spread(self) -> None:
        """UsageError if the file is JSON, but not one record a line."""
        self.file.seek(0)
        try:
            whole = json.loads(self.file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                raise UsageError(
                    f"{self.path}: objects over several lines, one after the other; `jq -c . FILE` "
                    "makes each a line"
                ) from None
            return
        refuse_wrapping(self.path, whole)
        raise UsageError(
            f"{self.path}: one object over several lines; `jq -c . FILE` makes it a line"
        )

    def __getitem__(self, key: int):
        if self.whole is not None:
            return self.whole[key]
        self.file.seek(key)
        line = self.file.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except ValueError:
            raise UsageError(f"{self.path}: has changed since it was opened") from None


def refuse_wrapping(path: Path, record) -> None:
    """UsageError if a record is itself an object around a list, or a table, of records."""
    if not isinstance(record, dict):
        return
    for name, value in record.items():
        if name not in LISTS and isinstance(value, list) and value and isinstance(value[0], dict):
            raise UsageError(
                f"{path}: one object around the list of records; `jq -c '.[{json.dumps(name)}][]' FILE` makes "
                "lines of it"
            )
    if record and all(isinstance(value, dict) for value in record.values()):
        raise UsageError(
            f"{path}: one object around the records; `jq -c '.[]' FILE` makes lines of it, if it is by records"
        )


def is_plain_text(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


class Usable:
    """Which records of a file can be used: iterating yields the key of each, and what `read` makes of it.

    `unused` counts the others by reason. Raises UsageError where nothing can be used.
    """

    def __init__(self, records: Records, read: Callable, what: str = "conversation"):
        self.records, self.read, self.what, self.unused = records, read, what, Counter()

    def __iter__(self) -> Iterator[tuple[int, object, object]]:
        """Key, record, and what was read."""
        used, stranger = 0, None  # the first record of no known form, its place and fault
        for key, where, record in self.records:
            try:
                found = self.read(record)
            except Unusable as error:
                self.unused[str(error)] += 1
                continue
            except UnknownForm as error:
                self.unused["no known form"] += 1
                stranger = stranger or (record, f"{where} has {error}")
                continue
            except UsageError as error:
                raise UsageError(f"{self.records.path}: {where} {error}") from None
            used += 1
            yield key, record, found
        if used:
            return
        if stranger and len(self.unused) == 1:
            refuse_wrapping(self.records.path, stranger[0])
            raise UsageError(
                f"{self.records.path}: no record of a known form; {stranger[1]} (data/README.md has the forms)"
            )
        reasons = ", ".join(
            f"{count} with {reason}" for reason, count in self.unused.most_common(5)
        )
        raise UsageError(
            f"{self.records.path}: no usable {self.what} ({reasons or 'an empty list'})"
        )


# ---------------------------------------------------------------------------------------------------------
# Plain texts, for vocab_map.py

LONGEST_TEXT = 2_000  # characters; Algorithm 1 takes time and memory in the square of a text


def read_texts(file: Path) -> list[str]:
    """The texts of a .txt, cut at blank lines, or of the records of a .json or .jsonl: `text`, or all turns of a conversation."""
    unused: Counter[str] = Counter()
    if is_plain_text(file):
        try:
            texts = re.split(r"\n\s*\n", open_text(file).read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: {json_fault(error)}") from None
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise UsageError(f"{file}: no text in it")
    else:
        usable = Usable(Records(file), record_text)
        texts, unused = [text for _, _, text in usable], usable.unused
    long = sum(len(text) > LONGEST_TEXT for text in texts)
    notes = [f"dropped {count}: {reason}" for reason, count in unused.items()]
    notes += [f"cut {long} of more than {LONGEST_TEXT} characters into pieces"] * bool(long)
    if notes:
        print("; ".join([f"{file.name}: {len(texts)} texts", *notes]), file=sys.stderr)
    pieces = [
        text[start : start + LONGEST_TEXT]
        for text in texts
        for start in range(0, len(text), LONGEST_TEXT)
    ]
    return [piece for piece in pieces if piece.strip()]


def record_text(record) -> str:
    if isinstance(record, dict) and "text" in record and not any(key in record for key in LISTS):
        text = text_of(record["text"], "'text'")
        if not text.strip():
            raise Unusable("no text")
        return text
    return "\n".join(text for _, text in read_turns(record)[0])
