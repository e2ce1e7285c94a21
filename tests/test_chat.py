"""data/chat.py: templates and their masks, the forms of data, what is dropped, and batches."""

import json
from pathlib import Path

import pytest

from data.chat import (ChatDataset, collate, default_template, encode_chat, end_token, hold_out, read_turns,
                       stream_batches)
from data.errors import UsageError
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from tests.helpers import REAL, byte_pairs, needs_real

CONVERSATION = [("system", "Be brief."), ("user", "What is 1 plus 2?"), ("assistant", " 3.\nSure "),
                ("user", "Sure?"), ("assistant", "Yes, 漢字 👍.")]


@pytest.fixture(scope="module")
def sentence_piece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(World(0).train_tokenizer())


@pytest.fixture(scope="module")
def tiktoken() -> TiktokenTokenizer:
    return TiktokenTokenizer(byte_pairs())


# ---- templates


def visible(tokenizer, ids: list[int], supervised: list[bool]) -> list[str]:
    """The supervised runs, decoded, with the end token spelled out."""
    runs, run = [], []
    for id, on in zip(ids, supervised):
        if on:
            run.append(id)
        elif run:
            runs, run = runs + [run], []
    return [tokenizer.decode(run[:-1]) + f"<{run[-1]}>" for run in runs + [run] * bool(run)]


@pytest.mark.parametrize("name, template", [("sentence_piece", "llama-2"), ("tiktoken", "llama-2"), ("tiktoken", "llama-3")])
def test_the_mask_decoded_is_the_assistants_text(name, template, request):
    tokenizer = request.getfixturevalue(name)
    ids, supervised = encode_chat(tokenizer, template, CONVERSATION)
    end, space = end_token(tokenizer, template), " " * (template == "llama-2")
    before = " " * (template == "llama-2" and name == "tiktoken")
    assert visible(tokenizer, ids, supervised) == [f"{before}3.\nSure{space}<{end}>", f"{before}Yes, 漢字 👍.{space}<{end}>"]


def test_llama2_is_spelled_out(sentence_piece):
    turns = [("user", "Greet Mira."), ("assistant", "Hello Mira!"), ("user", "Again."), ("assistant", "Hello!")]
    ids, _ = encode_chat(sentence_piece, "llama-2", turns)
    pieces = "".join(sentence_piece.processor.id_to_piece(ids)).replace("\u2581", " ")
    assert pieces == "<s> [INST] Greet Mira. [/INST] Hello Mira! </s><s> [INST] Again. [/INST] Hello! </s>"
    prompt, _ = encode_chat(sentence_piece, "llama-2", turns[:1])
    assert ids[:len(prompt)] == prompt


def test_llama3_is_spelled_out(tiktoken):
    names = {id: name for name, id in tiktoken.specials.items()}
    ids, _ = encode_chat(tiktoken, "llama-3", [("user", "Hi"), ("assistant", "Ho"), ("user", "Hm")])
    spelled = "".join(names.get(id) or tiktoken.decode([id]) for id in ids)
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert spelled == ("<|begin_of_text|>" + turn("user") + "Hi<|eot_id|>" + turn("assistant") + "Ho<|eot_id|>"
                       + turn("user") + "Hm<|eot_id|>" + turn("assistant"))
    assert ids.count(tiktoken.bos_id) == 1


@needs_real
@pytest.mark.parametrize("kind", REAL)
def test_with_the_real_tokenizers(kind):
    tokenizer = load_tokenizer(REAL[kind])
    assert default_template(tokenizer) == kind
    turns = [("user", "Name two birds.\n"), ("assistant", "A wren,\n  a crow."), ("user", "Thanks"), ("assistant", "👍")]
    ids, supervised = encode_chat(tokenizer, kind, turns)
    texts = ["A wren,\n  a crow.", "👍"]
    end, space = end_token(tokenizer, kind), " " * (kind == "llama-2")
    assert visible(tokenizer, ids, supervised) == [f"{text}{space}<{end}>" for text in texts]
    if kind == "llama-2":  # turn by turn is the same as the whole string at once
        whole = [token for question, answer in [("Name two birds.", texts[0]), ("Thanks", texts[1])]
                 for token in tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)]
        assert ids == whole


def test_llama3_needs_its_special_tokens(sentence_piece):
    with pytest.raises(UsageError, match="llama-3 template"):
        encode_chat(sentence_piece, "llama-3", CONVERSATION)


# ---- records


def sharegpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


KEPT = [("user", "q"), ("assistant", "a")]
RECORDS = {  # a record, what is kept of it, and what is said of the rest
    "plain": (sharegpt(("human", "q"), ("gpt", "a")), KEPT, ""),
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, KEPT, ""),
    "other names": (sharegpt(("user", "q"), ("chatgpt", "a"), ("human", "q"), ("bard", "a"), ("human", "q"), ("bing", "a")),
                    KEPT * 3, ""),
    "system first": (sharegpt(("system", "s"), ("human", "q"), ("gpt", "a")), [("system", "s"), *KEPT], ""),
    "answer first": (sharegpt(("gpt", "x"), ("human", "q"), ("gpt", "a")), KEPT, "a leading answer"),
    "question last": (sharegpt(("human", "q"), ("gpt", "a"), ("human", "more")), KEPT, "a question without an answer"),
    "answer first, question last": (sharegpt(("gpt", "x"), ("human", "q"), ("gpt", "a"), ("human", "more")), KEPT,
                                    "a leading answer and a question without an answer"),
    "empty later": (sharegpt(("human", "q"), ("gpt", "a"), ("human", "q2"), ("gpt", " ")), KEPT, "an empty turn and all after it"),
    "no answer": (sharegpt(("human", "q")), [], "no answered question"),
    "no turns": (sharegpt(), [], "no answered question"),
    "empty answer": (sharegpt(("human", "q"), ("gpt", "")), [], "no answered question"),
    "two questions": (sharegpt(("human", "q"), ("human", "q"), ("gpt", "a")), [], "roles that do not alternate"),
    "odd role": (sharegpt(("human", "q"), ("tool", "t"), ("gpt", "a")), [], "unknown role 'tool'"),
    "half a pair": (sharegpt(("human", "\ud83d"), ("gpt", "a")), [], "half of a surrogate pair"),
    "two halves": (json.loads(json.dumps(sharegpt(("human", "👍"), ("gpt", "a")))), [("user", "👍"), ("assistant", "a")], ""),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(case):
    record, kept, left_out = RECORDS[case]
    assert read_turns(record) == (kept, left_out)


# ---- files


def write(path: Path, records: list, lines: bool) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records), encoding="utf-8")
    return path


def numbered(count: int, length=lambda number: 1) -> list:
    return [sharegpt(("human", f"q{number}"), ("gpt", " ".join([f"a{number}"] * length(number)))) for number in range(count)]


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_both_file_forms_and_the_count_of_what_is_dropped(lines, tmp_path, sentence_piece):
    records = [numbered(3)[0], RECORDS["no answer"][0], numbered(3)[1], RECORDS["odd role"][0], RECORDS["no turns"][0],
               RECORDS["answer first"][0]]
    dataset = ChatDataset(write(tmp_path / "any.name", records, lines), sentence_piece, "llama-2", 64)
    assert [dataset.turns(index)[0][1] for index in range(len(dataset))] == ["q0", "q1", "q"]
    assert dataset.unused == {"no answered question": 2, "unknown role 'tool'": 1}
    assert ("3 conversations; dropped 2: no answered question; dropped 1: unknown role 'tool'; "
            "shortened 1 by a leading answer") in dataset.report()


def test_long_conversations_keep_whole_exchanges(tmp_path, sentence_piece):
    exchange = [("human", "Greet Mira."), ("gpt", "Hello Mira!")]
    one = len(encode_chat(sentence_piece, "llama-2", [("user", "Greet Mira."), ("assistant", "Hello Mira!")])[0])
    path = write(tmp_path / "x.jsonl", [sharegpt(*exchange * 3), sharegpt(("human", "Greet Mira. " * 9), ("gpt", "No"))], True)
    dataset = ChatDataset(path, sentence_piece, "llama-2", 2 * one + 1)
    ids, supervised = dataset.sample(0)
    assert len(ids) == 2 * one and supervised[-1]
    assert dataset.sample(1) is None
    assert "shortened 1 by what is beyond" in dataset.report() and "dropped 1: no exchange within" in dataset.report()


BAD = {
    "empty": (b"", "no usable conversation"), "blank": (b"\n \n", "no usable conversation"),
    "no records": (b"[]", "no usable conversation"), "no json": (b"hello\n", "line 1 is not JSON"),
    "second line": (json.dumps(RECORDS["plain"][0]).encode() + b"\n{\n", "line 2 is not JSON"),
    "array cut": (b'[{"conversations": []}', "not JSON"),
    "no utf-8": (b'{"conversations": [{"from": "human", "value": "\xff"}]}\n', "line 1 is not UTF-8"),
    "array no utf-8": (b'["\xff"]', "not UTF-8"),
    "wrong keys": (b'{"text": "hello"}\n', "neither 'conversations' nor 'messages'"),
    "a number": (b"3\n", "neither 'conversations' nor 'messages'"), "an array of numbers": (b"[1, 2]", "record 1"),
    "turns no list": (b'{"messages": "hello"}\n', "'messages' that is no list"),
    "turn without text": (b'{"messages": [{"role": "user"}]}\n', "without 'role' and 'content'"),
    "text a number": (b'{"messages": [{"role": "user", "content": 3}]}\n', "no text"),
    "text null": (b'{"conversations": [{"from": "human", "value": null}]}\n', "no text"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "q"}]}\n', "no usable conversation"),
    "deep": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_the_reason(case, tmp_path, sentence_piece):
    content, message = BAD[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        ChatDataset(tmp_path / "data.jsonl", sentence_piece, "llama-2", 64)
    assert message in str(caught.value) and "data.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_an_absent_file_and_a_folder_are_named(tmp_path, sentence_piece):
    for path, message in [(tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(UsageError, match=message):
            ChatDataset(path, sentence_piece, "llama-2", 64)


# ---- batches


@pytest.fixture
def dataset(tmp_path, sentence_piece) -> ChatDataset:
    return ChatDataset(write(tmp_path / "d.jsonl", numbered(200, lambda n: 1 + n * 7 % 23), True), sentence_piece, "llama-2", 256)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_an_epoch_has_every_sample_once_and_differs_from_the_next(dataset):
    whole = range(len(dataset))
    batches = take(stream_batches(dataset, list(whole), 4, seed=3), 100)
    epochs = [[tuple(ids) for (epoch, _, _), samples in batches if epoch == wanted for ids, _ in samples] for wanted in (0, 1)]
    everything = sorted(tuple(dataset.sample(index)[0]) for index in whole)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    assert batches == take(stream_batches(dataset, list(whole), 4, seed=3), 100)
    assert batches != take(stream_batches(dataset, list(whole), 4, seed=4), 100)


def test_the_stream_goes_on_from_any_position(dataset):
    whole = list(range(len(dataset)))
    batches = take(stream_batches(dataset, whole, 4, seed=0), 120)
    for cut in [0, 1, 31, 32, 33, 49, 50, 51, 99]:
        position = batches[cut][0]
        assert take(stream_batches(dataset, whole, 4, 0, position), 10) == batches[cut + 1:cut + 11]


def test_bucketing_saves_padding(dataset):
    def waste(batches):
        return 1 - sum(len(ids) for batch in batches for ids, _ in batch) / sum(len(b) * max(len(i) for i, _ in b) for b in batches)

    bucketed = [samples for _, samples in take(stream_batches(dataset, list(range(200)), 8, seed=0), 25)]
    plain = [[dataset.sample(i) for i in range(first, first + 8)] for first in range(0, 200, 8)]
    assert waste(bucketed) < 0.1 < waste(plain)


def test_collated_labels_are_shifted_and_masked(sentence_piece):
    samples = [encode_chat(sentence_piece, "llama-2", [("user", "q"), ("assistant", answer)]) for answer in ["a", "a long answer"]]
    tokens, labels = collate(samples)
    for row, (ids, supervised) in enumerate(samples):
        assert tokens[row, :len(ids) - 1].tolist() == ids[:-1]
        expected = [id if on else -100 for id, on in zip(ids[1:], supervised[1:])]
        assert labels[row].tolist() == expected + [-100] * (labels.shape[1] - len(expected))


def test_every_conversation_too_long_is_an_error(tmp_path, sentence_piece):
    dataset = ChatDataset(write(tmp_path / "d.json", numbered(5), False), sentence_piece, "llama-2", 8)
    with pytest.raises(UsageError, match="every conversation is longer than --max-length 8"):
        next(stream_batches(dataset, list(range(5)), 2, seed=0))


def test_held_out_conversations_are_not_trained_on(dataset, tmp_path, sentence_piece):
    train_on, held_out = hold_out(dataset, seed=0)
    assert len(held_out) == 16 and not set(train_on) & set(held_out) and len(train_on) == 184
    few = ChatDataset(write(tmp_path / "few.json", numbered(16), False), sentence_piece, "llama-2", 64)
    with pytest.raises(UsageError, match="16 usable conversations"):
        hold_out(few, seed=0)
