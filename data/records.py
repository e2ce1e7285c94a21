"""What the records of a data file mean: conversations as other programs write them, or plain texts.

    python -m data.chat FILE --tokenizer out/seed0/tiny-s      # what comes of a file

data/README.md has every form, and what is dropped or refused, in one table. One rule for all of it:
a record of a known form that cannot be used is dropped and counted by reason; a file of which no
record has a known form is refused.
"""

import json
import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.errors import UsageError
from data.files import json_fault, open_text

Turn = tuple[str, str]  # (role, text), role one of "system", "user", "assistant", and CONTEXT
LEADING = "a leading answer"
CONTEXT = "context"  # the role of an assistant's turn that is in the prompt and not learnt
ANSWERED = ("assistant", CONTEXT)

# --------------------------------------------------------------------------------------------------
# The forms. A field that is null is absent, everywhere: `datasets` writes all columns into every
# record.

LISTS = ("conversations", "conversation", "messages")  # where turns are
OTHER_LISTS = ("contents", "data")  # where they may be: Gemini's, UltraChat's
ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content", "text", "parts")
ROLES = {
    name: role
    for role, names in {
        "system": "system developer",
        "user": "human user prompter customer",
        "assistant": "gpt chatgpt bing bard assistant model ai bot claude gemini",
    }.items()
    for name in names.split()
}
EXCHANGES = [  # a question and its answer
    tuple(pair.split())
    for pair in """instruction output
instruction response
prompt completion
prompt response
question answer
question response
query response
problem solution
inputs targets
input output
human assistant
user assistant""".splitlines()
]
SYSTEM = "system system_prompt system_message systemInstruction system_instruction".split()
# What no template here shows, of a record or a turn; and what belongs to a question beside its own
# text.
UNSEEN = "tools functions image images image_path video videos audio audios".split()
UNSEEN_BESIDE = "options choices documents".split()
# What an assistant thought before it answered: fields of its turn, or types of a part.
THOUGHTS = "reasoning_content thinking reasoning".split()
EARLIER = "the reasoning of earlier answers, which the template leaves out"
WEIGHTS = "weight loss_weight train loss trainable".split()  # of a turn or a record
SIDES = ("chosen", "rejected")
VERDICTS = [  # two answers, and a number that is below 0 where the first is the better one
    ("response1", "response2", "overall_preference"),  # HelpSteer3
    ("response_1", "response_2", "preference_strength"),  # HelpSteer2
    ("conversation_a", "conversation_b", "winner"),  # Chatbot Arena
]


class UnknownForm(ValueError):
    """A record of no form that we know."""


class Unusable(ValueError):
    """Why a record of a known form cannot be used."""


def present(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def first_of(fields: dict, names):
    return next((fields[name] for name in names if name in fields), None)


# --------------------------------------------------------------------------------------------------
# One record


def read_turns(record, reasoning: str = "") -> tuple[list[Turn], str]:
    """The turns of one record, and what was left out of it: an optional system turn, then whole
    exchanges.

    Of reasoning "keep" writes it in front of the last answer as <think>...</think>, as Qwen3's
    template does, "drop" leaves it out, and "" makes a record that has any Unusable. Raises
    Unusable, UnknownForm, and UsageError for what is no demonstration at all.
    """
    if isinstance(record, dict):
        refuse_preferences(present(record))
    return keep_exchanges(*all_turns(record, reasoning))


def all_turns(record, reasoning: str) -> tuple[list[Turn], list[str]]:
    """All turns of a record, as they stand in it, and what was left out of them."""
    if not isinstance(record, dict):
        raise UnknownForm("no object in it")
    record = present(record)
    _, found = find_turns(record)
    refuse_unseen(record, UNSEEN)
    if weight_of(record) == 0:
        raise Unusable("weight 0")
    turns = [read_turn(turn) for turn in found]
    thoughts = [thought_of(turn) for turn in found]
    left_out = []
    if any(thoughts):
        if not reasoning:
            raise Unusable(
                "reasoning, which is written in chatml with a tokenizer that has <think> (--reasoning drop trains on the "
                "answers alone)"
            )
        if reasoning == "drop":
            left_out = ["its reasoning"]
        elif any(thoughts[:-1]):
            left_out = [EARLIER]
        if reasoning == "keep" and thoughts[-1]:
            role, text = turns[-1]
            turns[-1] = (role, f"<think>\n{thoughts[-1]}\n</think>\n\n{text.lstrip(chr(10))}")
    if not turns or turns[0][0] != "system" or not turns[0][1].strip():
        texts = [text_of(record[name], "a system prompt") for name in SYSTEM if name in record]
        turns = [("system", text) for text in texts if text.strip()][:1] + turns
    return turns, left_out


def thought_of(turn: dict) -> str:
    """The reasoning in a turn, as a field or as parts of its content; "" where there is none."""
    content = first_of(present(turn), TEXT_KEYS)
    parts = [part for part in content if is_thought(part)] if isinstance(content, list) else []
    found = [part.get("thinking") or part.get("text") or part.get("reasoning") for part in parts]
    found += [turn.get(name) for name in THOUGHTS]
    text = next((text for text in found if isinstance(text, str) and text.strip()), "")
    return text.strip("\n") if is_unicode(text) else ""


def is_thought(part) -> bool:
    """A part of type thinking, or one that Gemini marks as a thought."""
    return isinstance(part, dict) and (part.get("type") in THOUGHTS or part.get("thought") is True)


def find_turns(record: dict) -> tuple[str, list]:
    """What the form of a record is called, and its turns, not yet read."""
    for key in LISTS:
        if key in record:
            return key, list_turns(record[key], key)
    for pair in EXCHANGES:
        if record.keys() >= set(pair):
            refuse_unseen(record, UNSEEN_BESIDE)
            return " and ".join(pair), one_exchange(record, *pair)
    for key in OTHER_LISTS:
        value = record.get(key)
        if isinstance(value, list) and value and (is_turn(value[0]) or type(value[0]) is str):
            return key, list_turns(value, key)
    for key in ("text", "chosen"):  # chosen: of pairs whose rejected side was taken out
        if found := conversation_of(record.get(key)):
            return f"{key}, a whole conversation,", found
    if "message_tree_id" in record or record.keys() >= {"message_id", "role"}:
        raise UsageError(
            "is of a tree of messages, as OASST's are; make conversations of it first, from the root to one answer, as "
            "Open-Assistant's oasst_dataset.py does"
        )
    for key, value in record.items():
        if isinstance(value, list) and value and is_turn(value[0]):
            raise UnknownForm(
                f"its turns under {str(key)!r}, a name that is not known; `jq -c '.messages = .[{json.dumps(key)}]' FILE` "
                "gives them one that is"
            )
    raise UnknownForm(
        "neither 'conversations' nor 'messages' in it, nor a question and its answer under names that are known"
    )


def form_of(record: dict) -> str:
    """What the form of a record is called: "messages of role/content", for instance."""
    record = present(record)
    if find_answers(record) is not None:
        return "two answers"
    form, turns = find_turns(record)
    turn = turns[0] if turns and isinstance(turns[0], dict) else {}
    used = [next((key for key in keys if key in turn), "?") for keys in (ROLE_KEYS, TEXT_KEYS)]
    return f"{form} of {'/'.join(used)}" if form in LISTS + OTHER_LISTS else form


# How the chat templates that are in use frame a turn, and alpaca's prompt.
FRAMES = re.compile(
    r"\[/?INST\]|<<SYS>>|<\|im_start\|>|<\|start_header_id\|>|<\|(user|assistant|system)\|>|<start_of_turn>"
    r"|### Instruction:|Below is an instruction that describes a task"
)


def is_turn(value) -> bool:
    return isinstance(value, dict) and any(value.get(key) is not None for key in ROLE_KEYS)


def list_turns(value, key: str) -> list:
    """The turns under a key: objects, exchanges, or texts that alternate; all of it may be a string
    of JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if not isinstance(value, list):
        raise Unusable(f"'{key}' that is no list")
    if all(isinstance(turn, str) for turn in value):
        return [
            {"role": ("user", "assistant")[at % 2], "content": value[at]}
            for at in range(len(value))
        ]
    turns = []
    for turn in value:
        is_exchange = isinstance(turn, dict) and not is_turn(turn)
        pairs = [pair for pair in EXCHANGES if is_exchange and present(turn).keys() >= set(pair)]
        turns += one_exchange(present(turn), *pairs[0]) if pairs else [turn]
    return turns


def conversation_of(value) -> list | None:
    """The turns of a list of them, of a single one, or of a transcript as HH-RLHF's and guanaco's;
    None for other texts.
    """
    if isinstance(value, list) and value and is_turn(value[0]):
        return value
    if is_turn(value):
        return [value]
    if not isinstance(value, str) or not re.match(r"\s*(### )?Human: ", value):
        return None
    text = value.strip()
    mark = r"\s*### (Human|Assistant):" if text.startswith("#") else r"(?:^|\n\n)(Human|Assistant):"
    _, *parts = re.split(mark, text)
    if "Assistant" not in parts[::2]:
        return None
    turns = [{"role": role, "content": said.strip()} for role, said in zip(parts[::2], parts[1::2])]
    return turns if parts[-1].strip() else turns[:-1]  # a prompt may end with "Assistant:"


def one_exchange(record: dict, question: str, answer: str) -> list:
    """A question, or the turns that lead to it, and its answer; alpaca's input and history, and
    other names of them.
    """
    asked = conversation_of(record[question])
    if asked is None:
        texts = [text_of(record[question], repr(question))] + [
            text_of(record.get(name) or "", repr(name))
            for name in ("context", "input")
            if name != question
        ]
        history = record.get("history") or []
        asked = []
        for exchange in history if isinstance(history, list) else [history]:
            if not isinstance(exchange, list) or len(exchange) != 2:
                raise Unusable("a history that is no list of questions and answers")
            asked += list_turns([text_of(text, "a history") for text in exchange], "history")
        asked.append({"role": "user", "content": "\n".join(text for text in texts if text)})
    if not isinstance(record[answer], str) and (answered := conversation_of(record[answer])):
        return asked + answered
    thoughts = {name: record[name] for name in THOUGHTS if name in record}
    answered = {"role": "assistant", "content": text_of(record[answer], repr(answer))}
    return [*asked, answered | thoughts]


def refuse_unseen(fields: dict, names: list[str]) -> None:
    for name in names:
        if fields.get(name) not in (None, "", [], {}, "[]"):
            raise Unusable(f"'{name}', which no template here can show")


def refuse_preferences(record: dict) -> None:
    if find_answers(record) or any(
        str(name).startswith(("rejected", "non_preferred")) for name in record
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


def read_turn(turn) -> Turn:
    if not isinstance(turn, dict):
        raise Unusable("a turn that is no object")
    turn = present(turn)
    role, content = first_of(turn, ROLE_KEYS), first_of(turn, TEXT_KEYS)
    if not isinstance(role, str):
        raise Unusable("a turn without a role")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise Unusable(f"unknown role {role[:40]!r}")
    refuse_unseen(turn, UNSEEN)
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
    if isinstance(content, dict):  # Gemini's systemInstruction
        content = first_of(content, TEXT_KEYS)
    if isinstance(content, list):
        content = "".join(part_text(part) for part in content if not is_thought(part))
    if not isinstance(content, str):
        raise Unusable(f"{what} that is no text")
    if not is_unicode(content):
        raise Unusable("half of a surrogate pair")
    return content


def part_text(part) -> str:
    kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise Unusable(f"a part that is no text ({str(kind)[:40]})")
    return part["text"]


def keep_exchanges(turns: list[Turn], notes: Sequence[str] = ()) -> tuple[list[Turn], str]:
    """An optional system turn and whole exchanges: of anything else, what stands before it."""
    system = [turn for turn in turns[:1] if turn[0] == "system" and turn[1].strip()]
    while turns and turns[0][0] == "system" and (not turns[0][1].strip() or turns[0] in system):
        turns = turns[1:]
    left_out = []
    if (
        turns and turns[0][0] in ANSWERED
    ):  # ShareGPT was cut into pieces that may begin with an answer
        turns, left_out = turns[1:], [LEADING]
    exchanges: list[Turn] = []
    for question, answer in zip(turns[::2], turns[1::2]):
        if question[0] != "user" or answer[0] not in ANSWERED:
            left_out.append("roles that do not alternate")
            break
        if not question[1].strip() or not answer[1].strip():
            left_out.append("an empty turn and all after it")
            break
        exchanges += [question, answer]
    else:
        if len(turns) % 2:
            is_question = turns[-1][0] == "user"
            left_out.append(
                "a question without an answer" if is_question else "roles that do not alternate"
            )
    if not exchanges:
        odd = "roles that do not alternate"
        raise Unusable(odd if odd in left_out else "no answered question")
    if all(role != "assistant" for role, _ in exchanges):
        raise Unusable("no answer to learn from, as all have weight 0")
    return system + exchanges, " and ".join([*left_out, *notes])


# --------------------------------------------------------------------------------------------------
# One record of two answers


def read_pair(record, reasoning: str = "") -> tuple[tuple[list[Turn], list[Turn]], str]:
    """The turns with the chosen answer, those with the rejected one, and what was left out of both.

    Nothing but the last turns differ, and nothing but they is learnt: earlier answers are context.
    """
    record = present(record) if isinstance(record, dict) else {}
    answers = find_answers(record)
    if answers is None:
        raise UnknownForm(
            "no object with 'chosen' and 'rejected' in it, two answers as --loss pairwise takes them"
        )
    both = []
    for side, answer in zip(SIDES, answers):
        found, notes = all_turns(with_answer(record, answer, side), reasoning)
        turns, left_out = keep_exchanges(found)
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
    return (chosen, rejected), " and ".join(filter(None, [left_out, *notes]))


def find_answers(record: dict) -> tuple | None:
    """The better and the worse answer of a record; of a ranked list of them, the best and the
    worst.
    """
    for names in (SIDES, ("chosen_response", "rejected_response")):
        if record.keys() >= set(names):
            return record[names[0]], record[names[1]]
    for first, second, verdict in VERDICTS:
        if record.keys() >= {first, second, verdict}:
            better = {"model_a": -1, "model_b": 1}.get(str(record[verdict]), record[verdict])
            if type(better) not in (int, float) or better == 0:
                raise Unusable("two answers of which neither is better")
            return (record[first], record[second])[:: -1 if better > 0 else 1]
    ranked = record.get("completions")  # NeMo's
    if isinstance(ranked, list) and ranked:
        ranks = [each.get("rank") if isinstance(each, dict) else None for each in ranked]
        if any(type(rank) not in (int, float) for rank in ranks):
            return None
        ranked = sorted(ranked, key=lambda each: each["rank"])
        if ranked[0]["rank"] == ranked[-1]["rank"]:
            raise Unusable("two answers of which neither is better")
        return ranked[0].get("completion"), ranked[-1].get("completion")
    return None


def with_answer(record: dict, answer, side: str) -> dict:
    """The demonstration that a record is with one of its answers in the usual place.

    An answer is a text, a turn, turns behind a prompt, or a whole conversation, which then says
    all.
    """
    places = {
        *SIDES,
        "completions",
        "chosen_response",
        "rejected_response",
        *(name for names in VERDICTS for name in names),
    }
    places |= {name for _, name in EXCHANGES}
    rest = {name: value for name, value in record.items() if name not in places}
    alone = {name: value for name, value in rest.items() if name not in LISTS}
    if not isinstance(answer, (str, list, dict)):
        raise Unusable(f"'{side}' that is no answer")
    turns = conversation_of(answer)
    if turns and read_turn(turns[0])[0] not in ANSWERED:
        return alone | {"messages": turns}
    for name in ("prompt", "context"):  # turns, Hugging Face's; HelpSteer3's and NeMo's
        if isinstance(rest.get(name), list):
            return alone | {"prompt": rest[name], "completion": answer}
    for key in LISTS:
        if key in rest:
            return rest | {
                key: [
                    *list_turns(rest[key], key),
                    *(turns or [{"role": "assistant", "content": answer}]),
                ]
            }
    for question, place in EXCHANGES:
        if question in rest:
            return rest | {place: answer}
    raise Unusable("two answers without a prompt")


def is_unicode(text: str) -> bool:
    """JSON, and a command line, can spell half a surrogate pair, which is no character and has no
    UTF-8.
    """
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


# --------------------------------------------------------------------------------------------------
# All records of a file

NO_RECORDS = {
    ".txt": "plain text, by its name; conversations come as .json or .jsonl",
    ".csv": "a table; conversations come as .json or .jsonl, plain texts as .txt or .jsonl",
    ".tsv": "a table; conversations come as .json or .jsonl, plain texts as .txt or .jsonl",
}


class Records:
    """The records of a .json or .jsonl file, by keys that iterating yields.

    A file that begins with "[" is JSON and read whole; any other is JSON lines, whose keys are byte
    offsets.
    """

    def __init__(self, path: str | Path):
        self.path, self.whole = Path(path), None
        for ending, says in NO_RECORDS.items():
            if self.path.name.lower().removesuffix(".gz").endswith(ending):
                raise UsageError(f"{path}: {says}")
        self.file = open_text(path)
        weakref.finalize(self, self.file.close)
        start = self.file.read(4096).removeprefix(b"\xef\xbb\xbf")
        while not start.strip() and (more := self.file.read(2**20)):
            start = more
        if not start.strip():
            raise UsageError(f"{path}: {'nothing but white space' if start else 'an empty file'}")
        if start.lstrip().startswith(b"["):
            is_turns = b'"role"' in start or b'"from"' in start and b'"conversations"' not in start
            makes = "{messages: .}" if is_turns else ".[]"
            self.whole = self.read_whole(
                f"several arrays after each other; `jq -c '{makes}' FILE` makes lines of them"
            )

    def read_whole(self, several: str):
        """The file as one JSON text; UsageError where it is none, or several."""
        self.file.seek(0)
        try:
            return json.loads(self.file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            is_several = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
            raise UsageError(
                f"{self.path}: {several if is_several else json_fault(error)}"
            ) from None

    def __iter__(self) -> Iterator[tuple[int, str, object]]:
        """Key, place in words, and record; every one is read, so that a broken line is not met
        after a day.
        """
        if self.whole is not None:
            for number, record in enumerate(self.whole):
                yield number, f"record {number + 1}", record
            return
        size, reported, offset = self.file.seek(0, 2), time.monotonic(), 0
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    self.refuse_line(line, number, error)
                yield offset, f"line {number}", record
            offset += len(line)
            self.file.seek(offset)  # somebody may have asked for a record
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                print(f"reading {self.path}: {100 * offset // size}%", file=sys.stderr)

    def refuse_line(self, line: bytes, number: int, error: ValueError | RecursionError) -> None:
        """Say what is wrong with a line that is not JSON."""
        is_whole = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if number == 1 and line.lstrip(b"\xef\xbb\xbf ").startswith(b"{") and not is_whole:
            self.refuse_spread()
        raise UsageError(
            f"{self.path}: line {number} is {json_fault(error, one_line=True)}"
        ) from None

    def refuse_spread(self) -> None:
        """UsageError if the file is JSON, but not one record a line."""
        several = (
            "objects over several lines, one after the other; `jq -c . FILE` makes each a line"
        )
        try:
            whole = self.read_whole(several)
        except UsageError as error:
            if several in str(error):
                raise
            return  # the line itself is at fault
        refuse_wrapping(self.path, whole)
        raise UsageError(
            f"{self.path}: one object over several lines; `jq -c . FILE` makes it a line"
        )

    def __getitem__(self, key: int):
        if self.whole is not None:
            return self.whole[key]
        self.file.seek(key)
        try:
            return json.loads(self.file.readline().decode("utf-8-sig"))
        except ValueError:
            raise UsageError(f"{self.path}: has changed since it was opened") from None

    def usable(
        self, read: Callable, unused: Counter, what: str = "conversation"
    ) -> Iterator[tuple[int, dict, object]]:
        """The records that can be used: key, record, and what `read` makes of it.

        The others are counted in `unused` by reason. UsageError where nothing can be used.
        """
        used, stranger = 0, None  # the first record of no known form, its place and fault
        for key, where, record in self:
            try:
                found = read(record)
            except Unusable as error:
                unused[str(error)] += 1
                continue
            except UnknownForm as error:
                unused["no known form"] += 1
                stranger = stranger or (record, f"{where} has {error}")
                continue
            except UsageError as error:
                raise UsageError(f"{self.path}: {where} {error}") from None
            used += 1
            yield key, record, found
        if used:
            return
        if stranger and len(unused) == 1:
            if unused.total() == 1:
                refuse_wrapping(self.path, stranger[0])
            raise UsageError(
                f"{self.path}: no record of a known form; {stranger[1]} (data/README.md has the forms)"
            )
        reasons = ", ".join(f"{count} with {reason}" for reason, count in unused.most_common(5))
        raise UsageError(
            f"{self.path}: no usable {what} ({reasons or 'an empty list'}); data/README.md has the forms"
        )


def refuse_wrapping(path: Path, record) -> None:
    """UsageError if the one record of a file is an object around a list, or a table, of records."""
    if not isinstance(record, dict):
        return
    for name, value in record.items():
        if name in LISTS or not isinstance(value, list) or not value:
            continue
        if is_turn(value[0]):
            return
        if isinstance(value[0], dict):
            raise UsageError(
                f"{path}: one object around the list of records; `jq -c '.[{json.dumps(name)}][]' FILE` makes "
                "lines of it"
            )
    if record and all(isinstance(value, dict) for value in record.values()):
        raise UsageError(
            f"{path}: one object around the records; `jq -c '.[]' FILE` makes lines of it, if it is by records"
        )


# --------------------------------------------------------------------------------------------------
# Plain texts, for vocab_map.py

LONGEST_TEXT = 2_000  # characters; Algorithm 1 takes time and memory in the square of a text


def read_texts(file: Path) -> list[str]:
    """The texts of a .txt, cut at blank lines, or of the records of a .json or .jsonl: `text`, or
    all turns of a conversation.
    """
    notes = []
    if file.name.lower().removesuffix(".gz").endswith(".txt"):
        try:
            with open_text(file) as text:
                texts = re.split(r"\n\s*\n", text.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: {json_fault(error)}") from None
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise UsageError(f"{file}: no text in it")
    else:
        unused = Counter()
        texts = [text for _, _, text in Records(file).usable(record_text, unused)]
        notes = [f"dropped {count}: {reason}" for reason, count in unused.items()]
    if long := sum(len(text) > LONGEST_TEXT for text in texts):
        notes.append(f"cut {long} of more than {LONGEST_TEXT} characters into pieces")
    if notes:
        print("; ".join([f"{file.name}: {len(texts)} texts", *notes]), file=sys.stderr)
    pieces = []
    for text in texts:
        for start in range(0, len(text), LONGEST_TEXT):
            pieces.append(text[start : start + LONGEST_TEXT])
    return [piece for piece in pieces if piece.strip()]


def record_text(record) -> str:
    fields = present(record) if isinstance(record, dict) else {}
    if "text" in fields and not any(key in fields for key in LISTS):
        text = text_of(record["text"], "'text'")
        if not text.strip():
            raise Unusable("no text")
        return text
    return "\n".join(text for _, text in read_turns(record, "drop")[0])
