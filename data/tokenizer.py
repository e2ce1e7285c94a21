"""Tokenizers of the Llama family: SentencePiece (Llama-2, TinyLlama), tiktoken BPE (Llama-3), and tokenizer.json of both forms.

    python -c "from data.tokenizer import load_tokenizer; print(load_tokenizer('out/seed0/tiny-s').encode('Hello!'))"

Text is never searched for special tokens: "</s>" in a user's message is four harmless characters here. A tokenizer.json
may have added tokens that are not special (Qwen3's <think>): they are pieces of text like any other, and are matched.
"""

import base64
import codecs
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

from data.errors import UsageError
from data.files import base_folder, hub_hint, read_bytes, read_json


def fingerprint(tokenizer: "Tokenizer", n: int) -> str:
    """A hash over the bytes of the first n tokens (all of them if there are fewer), each with its length."""
    digest = hashlib.sha256()
    for id in range(min(n, tokenizer.vocab_size)):
        token = tokenizer.token_bytes(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def decode(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """The text of some tokens, without the space in front if encode adds one; bytes that are no UTF-8 become U+FFFD."""
    text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
    return text.removeprefix(" ") if tokenizer.space_in_front else text


class SentencePieceTokenizer:
    """A SentencePiece model. Its pieces mark a space as U+2581; Llama-2's puts a space in front of every text."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"
    byte_level = False
    default_system = chat_template = ""

    def __init__(self, model: bytes):
        self.model = model
        if b"\x18\x04" in model:  # the field of a piece that says it is user-defined
            model = without_user_defined(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("no <s> or no </s> among its pieces")
        marked = "".join(self.processor.encode("a", out_type=str))
        if marked.endswith("\u2581"):
            raise ValueError("it marks spaces at the end of words, which is not supported")
        self.space_in_front = marked.startswith("\u2581")
        self.end_of_turn_id, self.unknown_id = self.eos_id, self.processor.unk_id()
        self._bytes = [self._piece_bytes(id) for id in range(self.vocab_size)]
        controls = filter(self.processor.is_control, range(self.vocab_size))
        self.specials = {  # that a chat template could use, as Mistral's [INST]
            self.processor.id_to_piece(id): id
            for id in controls
            if id not in (self.bos_id, self.eos_id)
        }

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

    def is_byte(self, id: int) -> bool:
        """Whether a token stands for a single byte and is no piece of text."""
        return self.processor.is_byte(id)

    def merge_rank(self, id: int) -> float | None:
        """How early a token is made of two others in byte-pair encoding; None where it never is."""
        model = self.processor
        never = (
            model.is_byte(id) or model.is_control(id) or model.is_unknown(id) or model.is_unused(id)
        )
        return None if never else -model.get_score(id)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for control tokens."""
        return self._bytes[id]

    fingerprint, decode = fingerprint, decode


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
        if (
            kind
            and model[slice(*kind)] == b"\x04"
            and model[slice(*parts[1])].decode().replace("\u2581", " ").strip()
        ):
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
    file_name = "tokenizer.model"
    byte_level = True
    space_in_front = False
    unknown_id = None
    default_system = chat_template = ""
    # Which pieces a text falls into before byte pairs are merged; part of Llama-3's definition.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Offsets behind the last ordinary token. The rest of the 256 are reserved.
    special_offsets = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
    }

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
        self.encoding = tiktoken.Encoding(
            "llama-3", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.vocab_size = len(ranks) + 256
        self.bos_id, self.eos_id = (
            self.specials["<|begin_of_text|>"],
            self.specials["<|end_of_text|>"],
        )
        self.end_of_turn_id = self.specials["<|eot_id|>"]
        self._bytes = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [id for part in cut_long_runs(text) for id in self.encoding.encode_ordinary(part)]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def is_byte(self, id: int) -> bool:
        return len(self.token_bytes(id)) == 1

    def merge_rank(self, id: int) -> float | None:
        return id if self.token_bytes(id) else None

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for special tokens."""
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"token {id} of a vocabulary of {self.vocab_size}")
        return self._bytes[id] if id < len(self._bytes) else b""

    fingerprint, decode = fingerprint, decode


LONGEST_RUN = 25_000  # as in Meta's own tokenizer


def cut_long_runs(text: str) -> list[str]:
    """Cut text so that no run of spaces or of anything else is so long that tiktoken's pattern overflows its stack."""
    parts, start = [], 0
    if len(text) > LONGEST_RUN:
        for match in re.finditer(rf"\s{{{LONGEST_RUN}}}|\S{{{LONGEST_RUN}}}", text):
            parts.append(text[start : match.end()])
            start = match.end()
    return parts + [text[start:]]


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's library `tokenizers`: a byte-level BPE, or one of pieces with byte fallback.

    The first is Llama-3's and SmolLM2's form, the second Llama-2's. Which tokens begin and end a text stands in files
    beside it: `config` is what those say (read_token_config).
    """

    kind = "json"
    file_name = "tokenizer.json"

    def __init__(self, model: bytes, config: dict | None = None):
        self.model = model
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(model.removeprefix(codecs.BOM_UTF8))
        except Exception:  # the library raises no narrower class
            refuse_other_models(json.loads(model))
            raise
        if not isinstance(self.backend.model, tokenizers.models.BPE):
            raise ValueError("it is no byte-pair encoding")
        self.backend.encode_special_tokens = True  # special tokens are not looked for in a text
        self.backend.no_truncation()
        self.backend.no_padding()
        parts = (self.backend.pre_tokenizer, self.backend.decoder)
        self.byte_level = any(b'"ByteLevel"' in part.__getstate__() for part in parts if part)
        if not self.byte_level and not self.backend.model.byte_fallback:
            raise ValueError("neither a byte-level BPE nor one with byte fallback")
        added = self.backend.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in added.items() if token.content.strip()}
        pieces = pieces_of(self.backend)  # of each id; "" where no token has it
        self.vocab_size = len(pieces)
        self._bytes = [self._piece_bytes(piece) for piece in pieces]
        for id, token in added.items():  # special ones stand for no text, others for their own
            text = token.content if self.byte_level else token.content.replace("\u2581", " ")
            self._bytes[id] = b"" if token.special else text.encode()
        unknown = None if self.byte_level else self.backend.model.unk_token
        self.unknown_id = None if unknown is None else self.backend.token_to_id(unknown)
        if self.unknown_id is not None:
            self._bytes[self.unknown_id] = " \u2047 ".encode()  # as SentencePiece decodes it
        config = config or {}
        self.bos_id, self.eos_id = self._id_of(config, "bos"), self._id_of(config, "eos")
        if self.eos_id is None:
            raise ValueError(
                "nothing beside it says which token ends a text: no eos_token in tokenizer_config.json, no eos_token_id in "
                "generation_config.json or config.json"
            )
        self.end_of_turn_id = next(
            (self.specials[name] for name in ("<|eot_id|>", "<|im_end|>") if name in self.specials),
            self.eos_id,
        )
        # What begins or ends a text or a turn is never looked for, even where the file says it is not special.
        never = (self.bos_id, self.eos_id, self.end_of_turn_id)
        marks = [name for name, id in self.specials.items() if id in never or name in TURN_MARKS]
        self.backend.add_special_tokens(marks)
        for id in (self.bos_id, self.eos_id):
            if id is not None and id >= self.vocab_size:
                raise ValueError(
                    f"the files beside it name token {id}, and it has {self.vocab_size}"
                )
        self.default_system, self.chat_template = (
            config.get("default_system", ""),
            config.get("chat_template", ""),
        )
        self.space_in_front = self.token_bytes(self.encode("a")[0]).startswith(b" ")

    def ends(self) -> dict:
        """What tokenizer_config.json would say of the tokens that begin and end a text."""
        return {
            name: None if id is None else self.backend.id_to_token(id)
            for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
        }

    def _id_of(self, config: dict, side: str) -> int | None:
        """The token that begins (bos) or ends (eos) a text: by its name, or else by its id."""
        id = self.backend.token_to_id(config[side]) if side in config else None
        return config.get(f"{side}_id") if id is None else id

    def _piece_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            if piece.isascii():  # what can be seen stands for itself
                return piece.encode()
            try:
                return piece.translate(BYTE_LEVEL).encode("latin-1")
            except UnicodeEncodeError:  # not spelled in the characters that stand for bytes
                return piece.encode()
        if is_byte_piece(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    @functools.cached_property
    def _ranks(self) -> dict[int, int]:
        """Of each token that is made of two others, the first rank; only vocabulary maps ask for it."""
        ranks: dict[int, int] = {}
        for rank, pair in enumerate(json.loads(self.model)["model"]["merges"]):
            first, second = pair.split(" ") if isinstance(pair, str) else pair
            ranks.setdefault(self.backend.token_to_id(first + second), rank)
        return ranks

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids; with no token that begins a text, bos adds none."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * (bos and self.bos_id is not None) + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self.backend.encode_batch(texts, add_special_tokens=False)]

    def is_byte(self, id: int) -> bool:
        if self.byte_level:
            return len(self._bytes[id]) == 1
        return is_byte_piece(self.backend.id_to_token(id) or "")

    def merge_rank(self, id: int) -> float | None:
        """For a single character, which is made of nothing, the last rank."""
        if not self._bytes[id] or id == self.unknown_id or self.is_byte(id) and not self.byte_level:
            return None
        return self._ranks.get(id, len(self._ranks))

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for special tokens."""
        return self._bytes[id]

    fingerprint, decode = fingerprint, decode


TURN_MARKS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # llama-3
    *("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),  # chatml, mistral
    *("<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>"),  # Gemma, DeepSeek
)


def pieces_of(backend: tokenizers.Tokenizer) -> list[str]:
    """The piece of each id up to the largest one; "" where no token has it."""
    pieces = list(map(backend.id_to_token, range(backend.get_vocab_size())))
    if None in pieces:  # the ids have holes, and go on behind them
        ids = backend.get_vocab().values()
        pieces = list(map(backend.id_to_token, range(max(ids) + 1)))
        pieces = [piece or "" for piece in pieces]
    return pieces


def is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None


def refuse_other_models(raw) -> None:
    """ValueError where a tokenizer.json that the library does not read is visibly of another kind."""
    model = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("it is no byte-pair encoding")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError("its model has no vocab, or no merges")


def byte_characters() -> dict[str, int]:
    """The character that a byte-level BPE writes for each byte, as GPT-2 does: itself if it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }


BYTE_OF = byte_characters()
# For str.translate; what stands for no byte goes where latin-1 ends.
BYTE_LEVEL = dict.fromkeys(range(256), "\uffff") | {
    ord(character): chr(byte) for character, byte in BYTE_OF.items()
}


def read_token_config(folder: Path) -> dict:
    """What the files beside a tokenizer.json say of its first and last token, by name (bos, eos) or id (bos_id, eos_id).

    And `default_system`, the system prompt that the checkpoint's own chat_template puts where there is none.
    """
    raw = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    }
    found = {}
    for side in ("bos", "eos"):
        named = raw["tokenizer_config.json"].get(f"{side}_token")
        if isinstance(named, dict):  # an added token with its properties
            named = named.get("content")
        if isinstance(named, str):
            found[side] = named
        for file in ("generation_config.json", "config.json"):
            id = raw[file].get(f"{side}_token_id")
            id = id[0] if isinstance(id, list) and id else id
            if type(id) is int and id >= 0:
                found.setdefault(f"{side}_id", id)
    found["chat_template"] = read_chat_template(folder)
    default = re.search(
        r"<\|im_start\|>system(?:\n|\\n)([^<{+]+)<\|im_end\|>", found["chat_template"]
    )
    return found | ({"default_system": default[1].replace("\\'", "'")} if default else {})


def read_chat_template(folder: Path) -> str:
    """A checkpoint's own chat_template, from where transformers keeps it; of several, all of them one after the other."""
    if (folder / "chat_template.jinja").exists():
        return read_bytes(folder / "chat_template.jinja").decode(errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = (
            read_json(folder / name).get("chat_template") if (folder / name).exists() else None
        )
        if isinstance(template, list):  # of objects of name and template
            template = "".join(
                str(each.get("template")) for each in template if isinstance(each, dict)
            )
        if isinstance(template, str):
            return template
    return ""


Tokenizer = SentencePieceTokenizer | TiktokenTokenizer | JsonTokenizer

# Where two files of one folder are compared.
SAMPLE_TEXTS = [
    "Hello, world!",
    " two  spaces\n\n\tand a tab",
    "naïve café 漢字 👍 1234567890",
    "def f(x):\n    return x ** 2",
    "I'll DON'T <s> [INST]",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file, or the one in a checkpoint folder; the kinds are told apart by content.

    A folder has tokenizer.model, original/tokenizer.model (Meta's) or tokenizer.json. Of two that agree, the one with
    more tokens is taken; of two that do not, tokenizer.model, and it is said. Raises UsageError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists() and hub_hint(path):
            raise UsageError(f"{path}: No such file or directory{hub_hint(path)}")
        return read_tokenizer(path)
    found = [
        path / name
        for name in ["tokenizer.model", "original/tokenizer.model", "tokenizer.json"]
        if (path / name).exists()
    ]
    if not found and base_folder(path) != path:  # a LoRA adapter's base
        return load_tokenizer(base_folder(path))
    if not found:
        raise UsageError(
            f"{path}: no tokenizer.model, no original/tokenizer.model, and no tokenizer.json{hub_hint(path)}"
        )
    first = read_tokenizer(found[0])
    first.chat_template = read_chat_template(path)
    if found[-1].name != "tokenizer.json" or len(found) == 1:
        return first
    second = read_tokenizer(found[-1])
    if all(first.encode(text) == second.encode(text) for text in SAMPLE_TEXTS):
        return second if second.vocab_size > first.vocab_size else first
    print(
        f"{path}: its {found[0].name} and its tokenizer.json cut texts differently; the first is used",
        file=sys.stderr,
    )
    return first


def read_tokenizer(file: Path) -> Tokenizer:
    model = read_bytes(file)
    is_json = model.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
    try:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
            return TiktokenTokenizer(model)
        if is_json:
            return JsonTokenizer(model, read_token_config(file.parent))
        return SentencePieceTokenizer(model)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"{file}: neither a SentencePiece nor a tiktoken model nor a tokenizer.json that can be used: {error}"
        ) from None
    except (
        Exception
    ) as error:  # the library raises no narrower class; protobuf that is none raises several
        said = f"{type(error).__name__}: {error}" if is_json else f"it begins with {model[:12]!r}"
        raise UsageError(
            f"{file}: neither a SentencePiece nor a tiktoken model nor a tokenizer.json, or a damaged one ({said})"
        ) from None


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """How ivl.json and vocabulary maps name a tokenizer."""
    return {
        "size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint(tokenizer.vocab_size),
    }


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
