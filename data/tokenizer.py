"""Tokenizers of the Llama family: SentencePiece (Llama-2, TinyLlama, CodeLlama) and tiktoken BPE (Llama-3).

    python -c "from data.tokenizer import load_tokenizer; print(load_tokenizer('out/seed0/tiny-s').encode('Hello!'))"

Text is never searched for special tokens: "</s>" in a user's message is four harmless characters here.
"""

import base64
import codecs
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tiktoken

from data.errors import UsageError
from data.files import hub_hint, read_bytes


def fingerprint(tokenizer: "Tokenizer", n: int) -> str:
    """A hash over the bytes of the first n tokens (all of them if there are fewer), each with its length."""
    digest = hashlib.sha256()
    for id in range(min(n, tokenizer.vocab_size)):
        token = tokenizer.token_bytes(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


class SentencePieceTokenizer:
    """A SentencePiece model. Its pieces mark a space as U+2581; Llama-2's puts a space in front of every text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=without_user_defined(model))
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("no <s> or no </s> among its pieces")
        marked = "".join(self.processor.encode("a", out_type=str))
        if marked.endswith("\u2581"):
            raise ValueError("it marks spaces at the end of words, which is not supported")
        self.space_in_front = marked.startswith("\u2581")
        self.end_of_turn_id = self.eos_id
        self._bytes = [self._piece_bytes(id) for id in range(self.vocab_size)]

    def _piece_bytes(self, id: int) -> bytes:
        if self.processor.is_control(id):
            return b""
        if self.processor.is_unknown(id):
            return " \u2047 ".encode()  # as SentencePiece decodes it
        piece = self.processor.id_to_piece(id)
        if self.processor.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace("\u2581", " ").encode()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.processor.encode(text) + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=1)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for control tokens."""
        return self._bytes[id]

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without the space in front if encode adds one; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.space_in_front else text

    fingerprint = fingerprint


def without_user_defined(model: bytes) -> bytes:
    """The model with its user-defined pieces made unused ones, but for runs of white space.

    SentencePiece matches user-defined pieces, such as CodeLlama's <PRE>, wherever they stand in a text; here text is
    never searched for them. A model is a protobuf message: its field 1, once for each piece, is a message of
    piece (field 1), score (2) and type (3), of which 4 is user-defined and 5 unused.
    """
    changed = bytearray(model)
    for field, start, end in fields_of(model, 0, len(model)):
        if field != 1:
            continue
        parts = {number: (first, last) for number, first, last in fields_of(model, start, end)}
        kind = parts.get(3)
        if kind and model[slice(*kind)] == b"\x04" and model[slice(*parts[1])].decode().replace("\u2581", " ").strip():
            changed[kind[0]] = 5
    return bytes(changed)


def fields_of(message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a protobuf message: number, and where the content begins and ends."""
    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    while at < end:
        tag, start = varint(at)
        if tag & 7 == 2:  # a length, and as many bytes
            length, start = varint(start)
            at = start + length
        elif tag & 7 == 0:
            at = varint(start)[1]
        else:
            at = start + {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, start, at


class TiktokenTokenizer:
    """Byte-level BPE in the file format of Llama-3: a line per token, base64 bytes and rank; 256 specials follow."""

    kind = "tiktoken"
    space_in_front = False
    # Which pieces a text falls into before byte pairs are merged; part of Llama-3's definition.
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    # Offsets behind the last ordinary token. The rest of the 256 are reserved.
    special_offsets = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                       "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10}

    def __init__(self, model: bytes):
        self.model = model
        ranks = {}
        for number, line in enumerate(model.splitlines(), 1):
            fields = re.fullmatch(rb"([A-Za-z0-9+/]+=*) (\d{1,9})\s*", line)
            if not fields:
                raise ValueError(f"line {number} is not a token in base64 and its rank")
            try:
                ranks[base64.b64decode(fields[1], validate=True)] = int(fields[2])
            except ValueError:
                raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks are not 0, 1, 2, ... once each")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"it has no token for the byte {missing[0]}")
        self.specials = {name: len(ranks) + offset for name, offset in self.special_offsets.items()}
        self.encoding = tiktoken.Encoding("llama-3", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = len(ranks) + 256
        self.bos_id, self.eos_id = self.specials["<|begin_of_text|>"], self.specials["<|end_of_text|>"]
        self.end_of_turn_id = self.specials["<|eot_id|>"]
        self._bytes = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [id for part in cut_long_runs(text) for id in self.encoding.encode_ordinary(part)]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for special tokens."""
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"token {id} of a vocabulary of {self.vocab_size}")
        return self._bytes[id] if id < len(self._bytes) else b""

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    fingerprint = fingerprint


LONGEST_RUN = 25_000  # as in Meta's own tokenizer


def cut_long_runs(text: str) -> list[str]:
    """Cut text so that no run of spaces or of anything else is so long that tiktoken's pattern overflows its stack."""
    parts, start = [], 0
    if len(text) > LONGEST_RUN:
        for match in re.finditer(rf"\s{{{LONGEST_RUN}}}|\S{{{LONGEST_RUN}}}", text):
            parts.append(text[start:match.end()])
            start = match.end()
    return parts + [text[start:]]


Tokenizer = SentencePieceTokenizer | TiktokenTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.model, or the one in a checkpoint folder (Meta's keep it in original/).

    The two kinds are told apart by content. Raises UsageError when the file is absent or of neither kind.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [path / name for name in ["tokenizer.model", "original/tokenizer.model"] if (path / name).exists()]
        if not found:
            raise UsageError(f"{path}: no tokenizer.model and no original/tokenizer.model (a tokenizer.json alone is not read)"
                             f"{hub_hint(path)}")
        file = found[0]
    elif not path.exists() and hub_hint(path):
        raise UsageError(f"{path}: No such file or directory{hub_hint(path)}")
    model = read_bytes(file)
    try:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
            return TiktokenTokenizer(model)
        return SentencePieceTokenizer(model)
    except (IndexError, KeyError, RuntimeError, UnicodeDecodeError):  # what reading a protobuf message that is none raises
        kind = "it is JSON; a tokenizer.json is not read" if model.lstrip()[:1] == b"{" else f"it begins with {model[:12]!r}"
        raise UsageError(f"{file}: neither a SentencePiece nor a tiktoken model, or a damaged one ({kind})") from None
    except ValueError as error:
        raise UsageError(f"{file}: neither a SentencePiece nor a tiktoken model that can be used: {error}") from None


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """How ivl.json and vocabulary maps name a tokenizer."""
    return {"size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint(tokenizer.vocab_size)}


def is_same_family(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether one vocabulary extends the other, as CodeLlama's 32016 extends Llama-2's 32000."""
    n = min(one.vocab_size, other.vocab_size)
    return one.fingerprint(n) == other.fingerprint(n)


class StreamDecoder:
    """Decode token by token for a person who watches; an incomplete character is withheld until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.started = not tokenizer.space_in_front

    def push(self, id: int) -> str:
        """The text that this token completes, often just its own."""
        return self._strip(self.decoder.decode(self.tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """What was withheld and can now never be completed."""
        return self._strip(self.decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if text and not self.started:
            self.started, text = True, text.removeprefix(" ")
        return text
