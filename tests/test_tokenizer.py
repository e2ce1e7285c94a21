"""data/tokenizer.py: both kinds against transformers' own ids, bytes, fingerprints and streaming."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers

from data.errors import UsageError
from data.tiny_world import World
from data.tokenizer import (
    SentencePieceTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    is_same_family,
    load_tokenizer,
)
from tests.helpers import REAL, SHARED, byte_pairs, json_byte_pairs, needs_real
from tests.make_golden import GOLDEN
from vocab_map import count_pairs


@pytest.fixture(scope="module")
def sentence_piece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(World(0).train_tokenizer())


@pytest.fixture(scope="module")
def tiktoken() -> TiktokenTokenizer:
    return TiktokenTokenizer(byte_pairs(b"he", b"ll", b"hell", b" w", "é".encode()))


@needs_real
@pytest.mark.parametrize("kind", REAL)
def test_ids_are_those_of_transformers(kind):
    tokenizer = load_tokenizer(REAL[kind])
    cases = json.loads((GOLDEN / f"token_ids_{kind}.json").read_text())
    assert len(cases) >= 40
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@needs_real
@pytest.mark.parametrize("kind", REAL)
def test_every_line_of_real_text_round_trips(kind):
    tokenizer = load_tokenizer(REAL[kind])
    lines = (SHARED / "gsm8k-train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 7000
    assert [line for line in lines if tokenizer.decode(tokenizer.encode(line)) != line] == []


@needs_real
def test_the_real_tokenizers_are_what_they_should_be():
    llama2, llama3 = load_tokenizer(REAL["llama-2"]), load_tokenizer(REAL["llama-3"])
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id) == (32000, 1, 2)
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (128256, 128000, 128001)
    assert llama3.end_of_turn_id == 128009
    assert (
        llama2.token_bytes(13) == b"\n"
        and llama2.token_bytes(2) == b""
        and llama2.token_bytes(3 + 0xE2) == b"\xe2"
    )
    assert llama3.token_bytes(128009) == llama3.token_bytes(128255) == b""
    assert (
        len(llama3.encode("a" * 300_000)) > 1 and len(llama3.encode(" " * 300_000)) > 1
    )  # no overflow in tiktoken


def test_special_tokens_in_text_are_text(sentence_piece, tiktoken):
    assert sentence_piece.eos_id not in sentence_piece.encode("</s> <s>")
    assert max(tiktoken.encode("<|eot_id|>")) < 256 + 5


def test_bos_and_eos_are_added_when_asked(sentence_piece, tiktoken):
    for tokenizer in [sentence_piece, tiktoken]:
        ids = tokenizer.encode("hello")
        assert tokenizer.encode("hello", bos=True, eos=True) == [
            tokenizer.bos_id,
            *ids,
            tokenizer.eos_id,
        ]


@pytest.mark.parametrize("name", ["sentence_piece", "tiktoken"])
def test_bytes_of_tokens_are_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    text = "hello wörld é 漢字 👍\n\tend  "
    joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert joined.decode() == " " * tokenizer.space_in_front + text
    every_byte = {bytes([byte]) for byte in range(256)}
    assert every_byte <= {tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)}


def test_sentence_piece_decodes_like_its_library(sentence_piece):
    for text in ["Greet Mira.", "  two  spaces ", "漢字", "a\nb", ""]:
        ids = sentence_piece.encode(text)
        assert sentence_piece.decode(ids) == sentence_piece.processor.decode(ids) == text


@pytest.mark.parametrize("name", ["sentence_piece", "tiktoken"])
def test_streaming_never_shows_half_a_character(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in ["naïve 漢字 👩‍👩‍👧‍👦 done", " leading space", "é"]:
        decoder = StreamDecoder(tokenizer)
        shown = [decoder.push(id) for id in tokenizer.encode(text)]
        assert "".join(shown) + decoder.finish() == text
        assert not any("\ufffd" in part for part in shown)
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push(id) for id in tokenizer.encode("漢")[:-1]]
    assert (
        "".join(pushed).strip() == "" and decoder.finish() == "\ufffd"
    )  # cut off in mid-character


def test_fingerprints_tell_families_apart(sentence_piece, tiktoken):
    n = sentence_piece.vocab_size
    assert SentencePieceTokenizer(World(0).train_tokenizer()).fingerprint(
        n
    ) == sentence_piece.fingerprint(n)
    assert SentencePieceTokenizer(World(1).train_tokenizer()).fingerprint(
        n
    ) != sentence_piece.fingerprint(n)
    longer = TiktokenTokenizer(byte_pairs(b"he", b"ll", b"hell", b" w", "é".encode(), b"lo"))
    assert longer.fingerprint(261) == tiktoken.fingerprint(261) and longer.fingerprint(
        262
    ) != tiktoken.fingerprint(262)


def test_a_folder_or_a_file_under_any_name(sentence_piece, tiktoken, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(tiktoken.model)
    assert load_tokenizer(tmp_path).kind == "tiktoken"
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece.model)
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    (tmp_path / "other.bin").write_bytes(tiktoken.model)
    assert load_tokenizer(tmp_path / "other.bin").kind == "tiktoken"


def without_bos() -> bytes:
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9),
        model_writer=written,
        model_type="bpe",
        vocab_size=10,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


BAD = {
    "empty": b"",
    "text": b"hello world\n",
    "zeros": bytes(100),
    "json": b'{"model": {}}',
    "no base64": b"a 0\nb 1\n",
    "ranks with a hole": byte_pairs() + b"aGU= 300\n",
    "a byte missing": b"".join(byte_pairs().splitlines(True)[:-1]),
    "a line cut": byte_pairs()[:-3],
    "no bos": without_bos(),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tokenizer_is_refused_with_the_reason(case, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(BAD[case])
    with pytest.raises(
        UsageError, match="neither a SentencePiece nor a tiktoken model|an empty file"
    ) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value) and "\n" not in str(caught.value)


def test_an_absent_tokenizer_is_named(tmp_path):
    for path, message in [(tmp_path, "no tokenizer.model"), (tmp_path / "x.model", "No such file")]:
        with pytest.raises(UsageError, match=message):
            load_tokenizer(path)


# ---- what is no property of the kind


def trained(**options) -> SentencePieceTokenizer:
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the hell they live in", "hello world", "a b  c"] * 30),
        model_writer=written,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(written.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_whether_a_space_is_put_in_front_is_asked_of_the_model(prefix):
    tokenizer = trained(add_dummy_prefix=prefix)
    assert tokenizer.space_in_front is prefix
    for text in ["hello world", "the hell", " two  spaces "]:
        assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert StreamDecoder(tokenizer).push(tokenizer.encode("hello")[0])[:1] == "h"


def test_user_defined_pieces_are_never_matched_in_a_text():
    tokenizer = trained(
        user_defined_symbols=["<PRE>", "hell", "  "], remove_extra_whitespaces=False
    )
    ids = {piece: tokenizer.processor.piece_to_id(piece) for piece in ["<PRE>", "hell"]}
    for text in ["<PRE>", "a <PRE>b", "the hell", "hello <PRE> <PRE>"]:
        assert not set(tokenizer.encode(text)) & set(ids.values())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(ids["<PRE>"]) == b"<PRE>"  # a model may say it
    assert (
        sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).encode("a <PRE>b")[2]
        == ids["<PRE>"]
    )  # what is mended


def test_spaces_at_the_end_of_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="marks spaces at the end of words"):
        trained(treat_whitespace_as_suffix=True)


# ---- tokenizer.json (tests/golden/json-*, by an independent program)


@pytest.fixture(params=["json-bytes", "json-pieces"])
def json_folder(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_tokenizer_json_has_the_ids_of_transformers_and_gives_texts_back(json_folder):
    tokenizer = load_tokenizer(json_folder)
    for case in json.loads((json_folder / "token_ids.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert (
            b"".join(map(tokenizer.token_bytes, case["ids"]))
            == b" " * (tokenizer.space_in_front and case["text"] != "") + case["text"].encode()
        )
    assert tokenizer.encode_batch(["a b", "<s>"]) == [
        tokenizer.encode("a b"),
        tokenizer.encode("<s>"),
    ]
    ends = tokenizer.encode("a", bos=True, eos=True)
    assert (
        ends[0] == tokenizer.bos_id
        and ends[-1] == tokenizer.eos_id
        and tokenizer.token_bytes(ends[-1]) == b""
    )


def test_special_tokens_are_not_matched_in_a_text_and_other_added_tokens_are(json_folder):
    tokenizer = load_tokenizer(json_folder)
    raw = json.loads((json_folder / "tokenizer.json").read_text())
    added = {token["content"]: token["special"] for token in raw["added_tokens"]}
    assert tokenizer.specials.keys() == {name for name in added if name.strip()}
    for name, id in tokenizer.specials.items():
        ids = tokenizer.encode(f"a {name}{name} b")
        assert ids.count(id) == (0 if added[name] else 2)
        assert tokenizer.token_bytes(id) == (
            b"" if added[name] and id != tokenizer.unknown_id else tokenizer.token_bytes(id)
        )
        assert tokenizer.decode(ids) == f"a {name}{name} b"


def with_added(folder, *contents: str, normalizer: dict | None = None) -> None:
    """Give the byte-level golden tokenizer more added tokens that are not special, and a normalizer."""
    shutil.copytree(GOLDEN / "json-bytes", folder, dirs_exist_ok=True)
    raw = json.loads((folder / "tokenizer.json").read_text())
    like = raw["added_tokens"][0] | {"special": False}
    raw["added_tokens"] += [
        like | {"id": 510 + number, "content": content} for number, content in enumerate(contents)
    ]
    raw["normalizer"] = normalizer
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_reasoning_marks_are_single_tokens_as_the_library_has_them(tmp_path):
    with_added(tmp_path, "<think>", "</think>", "<tool_call>")
    tokenizer = load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    text = "<think>\nIs 7 blue? <|im_end|> </think>\n\nNo.<tool_call>{}"
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert [id for id in ids if id >= 510] == [502, 503, 504] or ids[0] == 502
    assert tokenizer.decode(ids) == text and tokenizer.specials["<|im_end|>"] not in ids
    shown = StreamDecoder(tokenizer)
    assert "".join(map(shown.push, ids)) + shown.finish() == text


def test_what_ends_a_turn_is_no_part_of_a_text_even_where_the_file_calls_it_not_special(tmp_path):
    with_added(tmp_path, "<think>")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a <|im_start|>system\n<think> <|im_end|>")
    marks = {tokenizer.specials[name] for name in ("<|im_start|>", "<|im_end|>")}
    assert not marks & set(ids) and tokenizer.specials["<think>"] in ids


def test_a_tokenizer_that_changes_the_text_gives_back_what_it_made_of_it(
    tmp_path, tiktoken, capsys
):
    """NFC, Qwen's: an e and its accent become one character, for encode, decode and a stream alike."""
    with_added(tmp_path, normalizer={"type": "NFC"})
    tokenizer = load_tokenizer(tmp_path)
    text, changed = "cafe\u0301 \ufb01 \u2126", "caf\u00e9 \ufb01 \u03a9"
    assert tokenizer.encode(text) == tokenizer.encode(changed)
    assert tokenizer.decode(tokenizer.encode(text)) == changed
    shown = StreamDecoder(tokenizer)
    assert "".join(map(shown.push, tokenizer.encode(text))) + shown.finish() == changed
    count_pairs([text, changed], tokenizer, tiktoken, "offsets")  # which compares the two's bytes
    assert "left out 1 of 2 texts" in capsys.readouterr().err


def test_ids_with_holes_are_tokens_of_no_text(tmp_path):
    with_added(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    raw["model"]["vocab"][last] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 601 and tokenizer.token_bytes(550) == b""
    assert tokenizer.token_bytes(600) != b""


def test_beginning_and_end_come_from_the_files_beside_it(json_folder):
    (json_folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="nothing beside it says which token ends a text"):
        load_tokenizer(json_folder)
    (json_folder / "config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(json_folder).eos_id == 2 and load_tokenizer(json_folder).bos_id is None
    (json_folder / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [0, 2]}'
    )
    tokenizer = load_tokenizer(json_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0) and tokenizer.encode("a", bos=True)[
        0
    ] == 1


def test_the_default_system_prompt_is_the_templates(json_folder):
    raw = json.loads((json_folder / "tokenizer_config.json").read_text())
    for template in [
        "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}",
        "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}",
    ]:
        (json_folder / "tokenizer_config.json").write_text(
            json.dumps(raw | {"chat_template": template})
        )
        assert load_tokenizer(json_folder).default_system == "Be brief."


def test_two_files_in_a_folder(tmp_path, capsys):
    model = trained(add_dummy_prefix=False)
    shutil.copytree(GOLDEN / "json-pieces", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(model.model)
    assert (
        load_tokenizer(tmp_path).kind == "sentencepiece"
        and "cut texts differently; the first is used" in capsys.readouterr().err
    )
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer(tmp_path).kind == "json"


def test_the_same_vocabulary_in_both_forms_is_one_family():
    """A byte-level vocabulary as tiktoken's lines and as tokenizer.json."""
    lines, other = (
        TiktokenTokenizer(byte_pairs(b"he", b"ll", b"hell")),
        json_byte_pairs({"eos_id": 260}),
    )
    assert is_same_family(lines, other) and other.encode("hello") == lines.encode("hello")
    assert other.fingerprint(515) == lines.fingerprint(515)


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"model": {"type": "Unigram", "vocab": []}}', "no byte-pair encoding"),
        (b'{"model": 3}', "no byte-pair encoding"),
        (
            b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "neither a byte-level BPE nor one with byte fallback",
        ),
        (b"{", "Expecting property name"),
        (b'{"model": {"type": "BPE"}}', "no vocab, or no merges"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(content, said, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=f"tokenizer.json: neither.*{said}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
