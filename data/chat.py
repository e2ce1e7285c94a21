"""Conversations as token ids with a label mask, and data sets of them as batches.

    python -m data.chat out/seed0/demonstrations.jsonl --tokenizer out/seed0/tiny-s      # what training will see

A conversation becomes token ids turn by turn, so the mask is right by construction: the model is supervised on
the assistant's tokens and the token that ends its turn, and on nothing else.
"""

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import UsageError
from data.tokenizer import Tokenizer, load_tokenizer

Turn = tuple[str, str]  # (role, text), role one of "system", "user", "assistant"

IGNORE = -100  # the label of a position that is not supervised

# ---------------------------------------------------------------------------------------------------------
# Templates

TEMPLATES = ("llama-2", "llama-3")


def default_template(tokenizer: Tokenizer) -> str:
    return "llama-3" if tokenizer.kind == "tiktoken" else "llama-2"


def end_token(tokenizer: Tokenizer, template: str) -> int:
    """The token that ends the assistant's turn, and with it a generation."""
    return tokenizer.eos_id if template == "llama-2" else tokenizer.end_of_turn_id


def encode_chat(tokenizer: Tokenizer, template: str, turns: list[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is supervised. After a user's turn the assistant is next.

    llama-2    <s>[INST] question [/INST] answer </s>, again for each exchange; one <s> and one </s> per exchange
    llama-3    <|begin_of_text|>, then <|start_header_id|>role<|end_header_id|>, blank line, text<|eot_id|> per turn

    A system turn may come first. Texts are stripped, as both vendors do.
    """
    segments = {"llama-2": llama2_segments, "llama-3": llama3_segments}[template](tokenizer, turns)
    ids, supervised = [], []
    for tokens, is_answer in segments:
        ids += tokens
        supervised += [is_answer] * len(tokens)
    return ids, supervised


def llama2_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[tuple[list[int], bool]]:
    # After "[/INST]" SentencePiece writes the answer's space by itself; a byte-level tokenizer has to be told.
    space = "" if tokenizer.space_in_front else " "
    system = ""
    for role, text in turns:
        if role == "system":
            system = f"<<SYS>>\n{text.strip()}\n<</SYS>>\n\n"
        elif role == "user":
            yield tokenizer.encode(f"[INST] {system}{text.strip()} [/INST]", bos=True), False
            system = ""
        else:
            yield tokenizer.encode(f"{space}{text.strip()} ", eos=True), True


def llama3_segments(tokenizer: Tokenizer, turns: list[Turn]) -> Iterator[tuple[list[int], bool]]:
    if tokenizer.kind != "tiktoken":
        raise UsageError("the llama-3 template needs the special tokens of a tiktoken tokenizer; use --template llama-2")

    def header(role: str) -> list[int]:
        start, end = tokenizer.specials["<|start_header_id|>"], tokenizer.specials["<|end_header_id|>"]
        return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

    yield [tokenizer.bos_id], False
    for role, text in turns:
        yield header(role), False
        yield tokenizer.encode(text.strip()) + [tokenizer.end_of_turn_id], role == "assistant"
    if turns[-1][0] == "user":
        yield header("assistant"), False


# ---------------------------------------------------------------------------------------------------------
# Records of a data file


FORMS = [("conversations", "from", "value"), ("messages", "role", "content")]  # ShareGPT and Infinity-Instruct; OpenAI
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "assistant": "assistant"}


def read_turns(record) -> tuple[list[Turn], str]:
    """The turns of one record, none if it is of no use, and what was left out, if anything was.

    What remains is an optional system turn, then whole exchanges of user and assistant. A record of another form than
    FORMS raises ValueError.
    """
    for key, role_key, text_key in FORMS:
        if isinstance(record, dict) and key in record:
            break
    else:
        raise ValueError("neither 'conversations' nor 'messages' in it")
    if not isinstance(record[key], list):
        raise ValueError(f"'{key}' that is no list")
    turns: list[Turn] = []
    for turn in record[key]:
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise ValueError(f"a turn without '{role_key}' and '{text_key}'")
        role, text = turn[role_key], turn[text_key]
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"a '{role_key}' or '{text_key}' that is no text")
        if role not in ROLES:
            return [], f"unknown role {role[:40]!r}"
        if not is_unicode(text):
            return [], "half of a surrogate pair"
        turns.append((ROLES[role], text))
    left_out = []
    system = [turn for turn in turns[:1] if turn[0] == "system"]
    turns = turns[len(system):]
    if turns and turns[0][0] == "assistant":  # ShareGPT was cut into pieces that may begin with an answer
        turns, left_out = turns[1:], ["a leading answer"]
    exchanges: list[Turn] = []
    for question, answer in zip(turns[::2], turns[1::2]):
        if (question[0], answer[0]) != ("user", "assistant"):
            return [], "roles that do not alternate"
        if not question[1].strip() or not answer[1].strip():
            left_out.append("an empty turn and all after it")
            break
        exchanges += [question, answer]
    if not exchanges:
        return [], "no answered question"
    if len(turns) % 2:
        left_out.append("a question without an answer")
    return system + exchanges, " and ".join(left_out)


def is_unicode(text: str) -> bool:
    """JSON, and a command line, can spell half a surrogate pair, which is no character and has no UTF-8."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def read_texts(file: Path) -> list[str]:
    """The texts of a .txt (cut at blank lines), or of JSON lines with text, question and answer, or a conversation each."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8") from None
    if file.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        texts = [record_text(line, f"{file}: line {number}") for number, line in lines if line.strip()]
    elif file.suffix == ".txt":
        texts = re.split(r"\n\s*\n", content)
    else:
        raise UsageError(f"{file}: texts come as .txt or .jsonl")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"{file}: no text in it")
    return texts


def record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error})") from None
    fields = record if isinstance(record, dict) else {}
    for names in (["text"], ["question", "answer"]):
        if all(isinstance(fields.get(name), str) for name in names):
            text = "\n".join(fields[name] for name in names)
            return text if is_unicode(text) else ""
    try:
        return "\n".join(text for _, text in read_turns(record)[0])
    except ValueError:
        raise UsageError(f"{where} has neither 'text', nor 'question' and 'answer', nor a conversation") from None


class ChatDataset:
    """The conversations of a .json or .jsonl file, tokenised when they are asked for.

    A file that begins with "[" is JSON and read whole; any other is JSON lines, of which only the byte offsets are
    kept. Every record is checked before training starts, so that a broken line is not met after a day.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, template: str, max_length: int):
        self.path, self.tokenizer, self.template, self.max_length = Path(path), tokenizer, template, max_length
        self.unused: Counter[str] = Counter()  # reason -> records that were dropped when the file was read
        self.shortened: Counter[str] = Counter()  # what was left out -> records that are used without it
        self.too_long: set[int] = set()  # of the records tokenised so far: not one exchange fits max_length
        self.truncated: set[int] = set()  # of the records tokenised so far: only the first exchanges fit
        self.records: list | None = None
        self.offsets = np.zeros(0, dtype=np.int64)  # of the usable lines, or indices of the usable records
        if self.path.exists() and not self.path.is_dir() and not self.path.is_file():
            raise UsageError(f"{self.path}: no regular file; its lines are read more than once")
        try:
            with open(self.path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from None
        if not len(self.offsets):
            reasons = ", ".join(f"{count} with {reason}" for reason, count in self.unused.most_common(5))
            raise UsageError(f"{self.path}: no usable conversation ({reasons or 'nor any other'})")

    def _read(self, file) -> None:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        usable = []
        if start.startswith(b"["):
            try:
                self.records = json.loads(file.read().decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise UsageError(f"{self.path}: not UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{self.path}: not JSON ({error})") from None
            usable = [number for number, record in enumerate(self.records) if self._is_usable(record, f"record {number + 1}")]
        else:
            offset, reported, size = 0, time.monotonic(), self.path.stat().st_size
            for number, line in enumerate(file, 1):
                if line.strip() and self._is_usable(self._parse(line, number), f"line {number}"):
                    usable.append(offset)
                offset += len(line)
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    print(f"reading {self.path}: {100 * offset // size}%", file=sys.stderr)
        self.offsets = np.array(usable, dtype=np.int64)

    def _parse(self, line: bytes, number: int):
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{self.path}: line {number} is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.path}: line {number} is not JSON ({error})") from None

    def _is_usable(self, record, where: str) -> bool:
        try:
            turns, left_out = read_turns(record)
        except ValueError as error:
            raise UsageError(f"{self.path}: {where} has {error}") from None
        if left_out:
            (self.shortened if turns else self.unused)[left_out] += 1
        return bool(turns)

    def __len__(self) -> int:
        return len(self.offsets)

    def turns(self, index: int) -> list[Turn]:
        if self.records is not None:
            return read_turns(self.records[self.offsets[index]])[0]
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return read_turns(json.loads(file.readline().decode("utf-8-sig")))[0]

    def sample(self, index: int) -> tuple[list[int], list[bool]] | None:
        """Token ids and mask of one conversation; of a long one, the first exchanges that fit; None when none does."""
        ids, supervised = encode_chat(self.tokenizer, self.template, self.turns(index))
        if len(ids) <= self.max_length:
            return ids, supervised
        # An exchange ends where the mask falls, behind the token that ends the answer.
        ends = [at + 1 for at in range(self.max_length) if supervised[at] and not supervised[at + 1]]
        if not ends:
            self.too_long.add(index)
            return None
        self.truncated.add(index)
        return ids[:ends[-1]], supervised[:ends[-1]]

    def report(self) -> str:
        """What was left out so far, by reason."""
        dropped = [*self.unused.items(), (f"no exchange within {self.max_length} tokens", len(self.too_long))]
        shortened = [*self.shortened.items(), (f"what is beyond {self.max_length} tokens", len(self.truncated))]
        return (f"{self.path.name}: {len(self)} conversations"
                + "".join(f"; dropped {count}: {reason}" for reason, count in dropped if count)
                + "".join(f"; shortened {count} by {what}" for what, count in shortened if count))


# ---------------------------------------------------------------------------------------------------------
# Batches

Sample = tuple[list[int], list[bool]]
Position = tuple[int, int, int]  # epoch, window, batch within the window
WINDOW = 32  # batches; samples are sorted by length within a window of the shuffled order


def stream_batches(dataset: ChatDataset, indices: list[int], batch_size: int, seed: int,
                   position: Position = (0, 0, 0)) -> Iterator[tuple[Position, list[Sample]]]:
    """Endless batches of samples of like length, each with the position behind it, from which to go on.

    The order is a function of seed and epoch: shuffled, then sorted by length within windows, whose batches are
    shuffled again. So padding is small, and no length is seen before another.
    """
    epoch, window, skip = position
    width = WINDOW * batch_size
    while True:
        order = random.Random(f"order {seed} {epoch}").sample(indices, len(indices))
        found = window > 0
        for start in range(window * width, len(order), width):
            samples = [sample for index in order[start:start + width] if (sample := dataset.sample(index))]
            samples.sort(key=lambda sample: len(sample[0]))
            batches = [samples[first:first + batch_size] for first in range(0, len(samples), batch_size)]
            random.Random(f"window {seed} {epoch} {window}").shuffle(batches)
            found = found or bool(batches)
            for number, batch in enumerate(batches[skip:], skip + 1):
                yield (epoch, window, number), batch
            window, skip = window + 1, 0
        if not found:
            raise UsageError(f"{dataset.path}: every conversation is longer than --max-length {dataset.max_length}")
        epoch, window = epoch + 1, 0


def chat_batches(dataset: ChatDataset, indices: list[int], batch_size: int, parts: int, seed: int,
                 position: list[int] | None) -> Iterator[tuple[list[int], list[tuple[Tensor, Tensor]]]]:
    """stream_batches as tensors, each batch in some parts: the position behind it, and (tokens, labels) per part."""
    for behind, samples in stream_batches(dataset, indices, batch_size, seed, tuple(position or (0, 0, 0))):
        size = -(-len(samples) // parts)
        yield list(behind), [collate(samples[first:first + size]) for first in range(0, len(samples), size)]


def hold_out(dataset: ChatDataset, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and 1% of the conversations, at least 16, to measure on."""
    held = max(16, len(dataset) // 100)
    if len(dataset) <= held:
        raise UsageError(f"{dataset.path}: {len(dataset)} usable conversations; 16 are held out, so it takes 17")
    order = random.Random(f"held out {seed}").sample(range(len(dataset)), len(dataset))
    return sorted(order[held:]), sorted(order[:held])


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) padded on the right, and labels (B, T) already shifted: row t's label is token t + 1, or -100."""
    length = max(len(ids) for ids, _ in samples) - 1
    tokens = torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE)
    for row, (ids, supervised) in enumerate(samples):
        row_ids = torch.tensor(ids)
        tokens[row, :len(ids) - 1] = row_ids[:-1]
        labels[row, :len(ids) - 1] = row_ids[1:].masked_fill(~torch.tensor(supervised[1:]), IGNORE)
    return tokens, labels


def main():
    from run.cli import ArgumentParser, positive_int
    parser = ArgumentParser(description="Show the first conversations of a data file as training sees them.")
    parser.add_argument("data", help="a .json or .jsonl file")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.model, or a folder that has one")
    parser.add_argument("--template", choices=TEMPLATES, help="default: from the tokenizer's kind")
    parser.add_argument("--max-length", type=positive_int, default=4096, help="tokens per conversation (default 4096)")
    parser.add_argument("--show", type=positive_int, default=3, help="how many (default 3)")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    dataset = ChatDataset(args.data, tokenizer, args.template or default_template(tokenizer), args.max_length)
    for index in range(min(args.show, len(dataset))):
        ids, supervised = dataset.sample(index) or ([], [])
        print(f"-- {len(ids)} tokens, {sum(supervised)} supervised, in capitals here")
        for id, is_supervised in zip(ids, supervised):
            text = tokenizer.token_bytes(id).decode("utf-8", "replace")
            print(text.upper() if is_supervised else text, end="")
        print()
    print(dataset.report())


if __name__ == "__main__":
    from run.cli import run_cli
    run_cli(main)
