"""vocab_map.py: Algorithm 1 fast and as a loop, its normalisation, the data-free map, and maps on disk."""

import json
import random

import numpy as np
import pytest
import sentencepiece

from data.errors import UsageError
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from fast import alignment
from fast.alignment import align_all
from tests.helpers import (
    REAL,
    SHARED,
    byte_pairs,
    inside,
    json_byte_pairs,
    needs_real,
    python,
    worked,
)
from tests.make_golden import GOLDEN, HARD_STRINGS
from vocab_map import (
    HOWS,
    Speller,
    VocabMap,
    align_by_loop,
    build,
    count_pairs,
    levenshtein,
    normalise,
    overlap,
    piece_cost,
    pieces_of,
    share_bytes,
    spell_out,
    strongest,
)

HARD = [
    "漢字かな交じり文、한국어와 العربية",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷, e\u0301 n\u0303 a\u030a\u0301",
    "def f(x):\n\treturn  x ** 2  # ``` \\n\n\n",
    "   three spaces,\ttabs\t\tand " + "=" * 150 + " " * 140 + "end",
    "0123456789 3.14159 1,000,000",
    "a",
    " ",
    "naïve café — “quotes” …",
]


@pytest.fixture(scope="module")
def pair() -> tuple[TiktokenTokenizer, SentencePieceTokenizer]:
    """Two small tokenizers that cut differently; the first has tokens longer than 64 bytes, and some that are no UTF-8."""
    merges = [
        b"he",
        b"ll",
        b"hell",
        b" w",
        b"\xe6\xbc",
        b" l",
        b" li",
        b"ve",
        b"in",
        b" t",
        b" th",
        b" the",
        b"\xf0\x9f",
        *(b"=" * n for n in (2, 4, 8, 16, 32, 64, 128)),
        *(b" " * n for n in (2, 4, 8, 16, 32, 64, 128)),
    ]
    return TiktokenTokenizer(byte_pairs(*merges)), SentencePieceTokenizer(
        World(0).train_tokenizer()
    )


@pytest.fixture(scope="module")
def real() -> dict:
    return {kind: load_tokenizer(path) for kind, path in REAL.items()}


def gsm8k(first: int, last: int) -> list[str]:
    lines = (SHARED / "gsm8k-train.jsonl").read_text(encoding="utf-8").splitlines()[first:last]
    return ["{question}\n{answer}".format(**json.loads(line)) for line in lines]


# ---- Algorithm 1


def all_pieces(tokenizer) -> list[bytes]:
    """The piece of every token of a tokenizer."""
    return pieces_of(tokenizer, [range(tokenizer.vocab_size)])[0]


def test_piece_cost_by_hand():
    assert piece_cost(b"kitten", b"sitting") == 3.0
    assert piece_cost(b"the", b"there") == 2 * 0.1  # contained
    assert (
        piece_cost(b"", b"abc") == 3 * 0.1 and piece_cost(b"", b"") == 0.0
    )  # contained in anything
    assert piece_cost(b"ace", b"abcde") == 2.0  # its letters come in this order, but not together


def test_the_loop_by_hand():
    assert align_by_loop([b"new", b"york"], [b"ne", b"w", b"york"]) == [(0, 0), (0, 1), (1, 2)]
    assert align_by_loop([b"a"], [b"a", b"b", b"c"]) == [(0, 0), (0, 1), (0, 2)]
    # Everything costs the same: the diagonal comes first, and what is left over stands at the beginning.
    assert align_by_loop([b"x"] * 2, [b"x"] * 2) == [(0, 0), (1, 1)]
    assert align_by_loop([b"x"] * 2, [b"x"] * 3) == [(0, 0), (0, 1), (1, 2)]
    assert align_by_loop([b"x"] * 3, [b"x"] * 2) == [(0, 0), (1, 0), (2, 1)]


def assert_same_paths(
    base, value, texts: list[str], ids: list[tuple[list[int], list[int]]] = ()
) -> None:
    base_ids = [base.encode(text, bos=True) for text in texts] + [each for each, _ in ids]
    value_ids = [value.encode(text, bos=True) for text in texts] + [each for _, each in ids]
    base_names, value_names = all_pieces(base), all_pieces(value)
    base_pieces = [[base_names[id] for id in text] for text in base_ids]
    value_pieces = [[value_names[id] for id in text] for text in value_ids]
    for b, v, path in zip(
        base_pieces, value_pieces, align_all(base_pieces, value_pieces), strict=True
    ):
        assert path == align_by_loop(b, v)


@pytest.mark.parametrize("turned", [False, True])
def test_fast_is_the_loop_on_hard_texts(pair, turned):
    assert_same_paths(*(pair[::-1] if turned else pair), HARD)


@pytest.mark.parametrize("turned", [False, True])
def test_fast_is_the_loop_on_random_tokens(pair, turned):
    """Sequences that are no tokenisation of any text, of very different lengths, with pieces that are no UTF-8."""
    base, value = pair[::-1] if turned else pair
    rng = random.Random(0)
    ids = [
        (
            [rng.randrange(base.vocab_size) for _ in range(rng.choice([1, 2, 9, 30]))],
            [rng.randrange(value.vocab_size) for _ in range(rng.choice([1, 3, 8, 40]))],
        )
        for _ in range(60)
    ]
    few = [
        ([rng.randrange(97, 100) for _ in range(12)], [rng.randrange(97, 100) for _ in range(9)])
        for _ in range(20)
    ]  # full of ties
    assert_same_paths(base, value, [], ids + few)


@needs_real
@pytest.mark.parametrize("base, value", [("llama-3", "llama-2"), ("llama-2", "llama-3")])
def test_fast_is_the_loop_with_real_tokenizers(real, base, value):
    assert_same_paths(real[base], real[value], gsm8k(0, 20) + HARD)


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize("base, value", [("llama-3", "llama-2"), ("llama-2", "llama-3")])
def test_fast_is_the_loop_on_200_texts(real, base, value):
    assert_same_paths(real[base], real[value], gsm8k(0, 200) + ["\n\n".join(gsm8k(0, 10))])


def test_fast_distances_are_those_of_the_loop(pair):
    """Pieces that are no UTF-8 and pieces longer than a machine word among them."""
    rng = random.Random(0)
    names = all_pieces(pair[0]) + all_pieces(pair[1])
    some = [name for name in names if len(name) > 40] + rng.sample(names, 120)
    costs = alignment.piece_costs(some, some)
    for i, a in enumerate(some):
        for j, b in enumerate(some):
            assert costs[i, j] == piece_cost(a, b)
    assert levenshtein(b"kitten", b"sitting") == 3


def test_a_batch_does_not_change_a_path(pair, monkeypatch):
    pieces = []
    for tokenizer in pair:
        names = all_pieces(tokenizer)
        pieces.append([[names[id] for id in tokenizer.encode(text, bos=True)] for text in HARD])
    together = align_all(*pieces)
    monkeypatch.setattr(alignment, "WIDTH", 1)
    assert together == align_all(*pieces)


def test_the_normalisation_is_that_of_a_dense_matrix():
    rng = np.random.default_rng(0)
    C = rng.integers(0, 4, (7, 5)).astype(float)
    C[:, 4] = rng.integers(1, 4, 7)  # a column without an empty cell
    C[3] = C[:, 2] = 0  # an unseen row and an unseen column
    C[3, 4], C[3, 0] = 2, 0
    M = np.where(C > 0, C - C.mean(1, keepdims=True), 0)
    extent = M.max(0) - M.min(0)
    M = np.where(C > 0, (M - M.min(0)) / np.where(extent == 0, 1, extent), 0)
    pairs = np.argwhere(C > 0)
    assert np.allclose(normalise(pairs, C[C > 0], 7, 5), M[C > 0])


def test_the_strongest_pair_of_each_row():
    target, weight = strongest(
        np.array([[0, 3], [0, 1], [2, 0], [2, 2]]), np.array([0.5, 0.5, 0.2, 0.9]), 4
    )
    assert target.tolist() == [1, -1, 2, -1] and np.allclose(weight, [0.5, 0, 0.9, 0])


def test_tokens_that_share_a_byte(pair):
    base, value = pair
    text = "hell the漢"
    b, v = base.encode(text, bos=True), value.encode(text, bos=True)
    path = share_bytes(base, b, value, v)
    assert path[0] == (0, 0) and path[-1] == (len(b) - 1, len(v) - 1)
    spans = []
    for tokenizer, ids in ((base, b), (value, v)):
        ends = np.cumsum([len(tokenizer.token_bytes(id)) for id in ids]) - tokenizer.space_in_front
        spans.append(list(zip([0, *ends], ends)))
    expected = {
        (i, j)
        for i, (a, z) in enumerate(spans[0])
        for j, (c, y) in enumerate(spans[1])
        if max(a, c) < min(z, y)
    }
    assert set(path[1:]) == expected and len(path) == len(set(path))


def test_beginnings_make_a_pair_where_both_tokenizers_have_one():
    begins, plain = (
        json_byte_pairs({"bos_id": 259, "eos_id": 260}),
        json_byte_pairs({"eos_id": 260}),
    )
    for base, value, both in (
        (begins, begins, True),
        (begins, plain, False),
        (plain, begins, False),
        (plain, plain, False),
    ):
        b, v = base.encode("ab", bos=True), value.encode("ab", bos=True)
        counted = [(b[i], v[j]) for i, j in share_bytes(base, b, value, v)]
        assert counted == [(259, 259)] * both + [(97, 97), (98, 98)]
        assert share_bytes(base, [], value, []) == []


# ---- the data-free map


@pytest.mark.parametrize("turned", [False, True])
def test_every_token_is_spelled_with_its_own_bytes(pair, turned):
    source, target = pair[::-1] if turned else pair
    for id, spelled in enumerate(spell_out(source, target)):
        if source.token_bytes(id) and spelled:
            assert b"".join(map(target.token_bytes, spelled)) == source.token_bytes(id)
    assert spell_out(source, target)[source.eos_id] == (target.eos_id,)


def test_spelling_agrees_with_encode(pair):
    for tokenizer in pair:
        speller = Speller(tokenizer)
        for text in HARD + ["The pet of Fufa is a rabbit.", "hello  world"]:
            space = " " if tokenizer.space_in_front else ""
            assert speller((space + text).encode()) == tokenizer.encode(text)


@pytest.mark.parametrize("which", [0, 1])
def test_a_tokenizer_spells_itself(pair, which):
    tokenizer = pair[which]
    for id, spelled in enumerate(spell_out(tokenizer, tokenizer)):
        assert spelled in ((id,), ())
        assert spelled or not tokenizer.token_bytes(id) or tokenizer.processor.is_unknown(id)
    assert overlap(HARD, tokenizer, tokenizer, spell_out(tokenizer, tokenizer)) == 1.0


@needs_real
def test_overlap_on_held_out_texts(real):
    base, value, texts, held_out = real["llama-3"], real["llama-2"], gsm8k(0, 200), gsm8k(200, 400)
    found = {
        how: overlap(held_out, base, value, build(base, value, how, texts, align_all).value_tokens)
        for how in ("paper", "dtw", "offsets")
    }
    pieces = spell_out(base, value)
    assert 0.60 <= found["paper"] <= 0.70 and found["dtw"] >= 0.70 and found["offsets"] >= 0.70
    assert overlap(held_out, base, value, [each[:1] for each in pieces]) >= 0.78
    assert overlap(held_out, base, value, pieces) >= 0.98


# ---- on disk, and the command


@pytest.mark.parametrize("how", HOWS)
def test_a_map_survives_its_file(pair, how, tmp_path):
    made = build(*pair, how, ["the hell they live in", "hello world", *HARD])
    made.save(tmp_path / "map.safetensors")
    found = VocabMap.load(tmp_path / "map.safetensors", *pair)
    assert (found.how, found.value_tokens, found.base_tokens) == (
        made.how,
        made.value_tokens,
        made.base_tokens,
    )
    assert np.array_equal(found.weight, made.weight) and bool(found.base_tokens) == (
        how == "pieces"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "map.safetensors"]


def test_maps_that_are_refused(pair, tmp_path):
    file = tmp_path / "map.safetensors"
    made = build(*pair)
    made.save(file)
    with pytest.raises(UsageError, match="another tokenizer of the base"):
        VocabMap.load(file, *pair[::-1])
    raw = file.read_bytes()
    for damaged in (
        raw[: len(raw) // 2],
        b"",
        b"{}",
        raw.replace(b"pieces.lengths", b"pieces.lengthz"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged"):
            VocabMap.load(file, *pair)
    with pytest.raises(UsageError, match="No such file"):
        VocabMap.load(tmp_path / "absent", *pair)
    made.value_tokens = made.value_tokens[:-1]
    made.save(file)
    with pytest.raises(UsageError, match="not the shape"):
        VocabMap.load(file, *pair)


def test_a_tokenizer_that_cannot_spell_every_byte_is_refused(pair):
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text"] * 50),
        model_writer=written,
        model_type="bpe",
        vocab_size=24,
        minloglevel=2,
    )
    with pytest.raises(UsageError, match="without a token for the byte 0"):
        build(pair[0], SentencePieceTokenizer(written.getvalue()))


@pytest.fixture
def command(pair, tmp_path) -> list:
    for name, tokenizer in zip("ab", pair):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(tokenizer.model)
    return (
        "vocab_map.py --base-tokenizer a --value-tokenizer b/tokenizer.model --out map.safetensors"
    ).split()


def test_the_command(command, tmp_path):
    (tmp_path / "texts.txt").write_text("the hell\nthey live in\n\n\nhello  world\n")
    records = [
        {"text": "hello the world"},
        {"question": "live?", "answer": "the hell"},
        {
            "messages": [
                {"role": "user", "content": "hell?"},
                {"role": "assistant", "content": "the end"},
            ]
        },
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for how in HOWS:
        status, output, errors = inside(
            tmp_path, *command, "--how", how, "--texts", "texts.txt", "--eval", "held.jsonl"
        )
        assert status == 0, errors
        last = output.splitlines()[-1].split()
        assert (
            last[:2] == ["overlap:", "texts"] and last[3] == "held-out" and 0 < float(last[4]) <= 1
        )
        assert how == "pieces" or "2 of 2 texts" in errors
    output = worked(tmp_path, *command)
    assert output.endswith("overlap: texts - held-out -\n")


@pytest.mark.parametrize(
    "arguments, content, said",
    [
        (["--how", "paper"], None, "name some with --texts"),
        ("--how dtw --texts t.txt".split(), None, "No such file"),
        ("--how dtw --texts t.txt".split(), b" \n\n ", "no text"),
        ("--how dtw --texts t.txt".split(), b"a\xff", "not UTF-8"),
        (["--eval", "t.jsonl"], b"{", "line 1 is not JSON"),
        (["--eval", "t.jsonl"], b'{"text": 3}', "'text' that is no text"),
        (["--eval", "t.csv"], b"a,b", ".txt or .jsonl"),
        (["--out", "nowhere/map"], None, "no folder nowhere"),
        (["--base-tokenizer", "none"], None, "none: No such file"),
    ],
)
def test_bad_input_is_told_in_one_line(command, tmp_path, arguments, content, said):
    if content is not None:
        (tmp_path / arguments[-1]).write_bytes(content)
    status, _, errors = inside(tmp_path, *command, *arguments)
    assert status == 2 and errors.count("\n") == 1 and said in errors, errors
    assert not (tmp_path / "map.safetensors").exists()


# ---- what the bench measures


@pytest.mark.slow
def test_the_bench_prints_its_tables():
    output = python("-m bench.vocab_map --rounds 1")
    assert (
        output.count("| fast/alignment.py ") == 2
        and "| --how offsets " in output
        and "failed" not in output
    )


def test_texts_that_a_tokenizer_changes_are_left_out_of_offsets_and_counted(tmp_path, capsys):
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the hell they live in", "hello world"] * 30),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc",
    )  # merges spaces
    merging, exact = (
        SentencePieceTokenizer(written.getvalue()),
        TiktokenTokenizer(byte_pairs(b"he", b"th")),
    )
    pairs, counts = count_pairs(
        ["hello world", "two  spaces", "a\u2581mark", "the hell"], exact, merging, "offsets"
    )
    assert "left out 2 of 4 texts" in capsys.readouterr().err
    alone, their_counts = count_pairs(["hello world", "the hell"], exact, merging, "offsets")
    assert pairs.tolist() == alone.tolist() and counts.tolist() == their_counts.tolist()
    with pytest.raises(UsageError, match="changes the bytes of every text"):
        count_pairs(["two  spaces"], exact, merging, "offsets")


@pytest.mark.parametrize("name", ["json-bytes", "json-pieces"])
def test_maps_through_tokenizer_json_spell_the_same_bytes(name):
    ours, other = load_tokenizer(GOLDEN / name), TiktokenTokenizer(byte_pairs(b"he", b"th", b"the"))
    for base, value in ((ours, ours), (ours, other), (other, ours)):
        spelled = build(base, value).value_tokens
        for id in range(base.vocab_size):
            if base.token_bytes(id) and id != base.unknown_id:
                assert b"".join(map(value.token_bytes, spelled[id])) == base.token_bytes(id)
        for text in HARD_STRINGS[:20]:
            mapped = [token for id in base.encode(text) for token in spelled[id]]
            assert b"".join(map(value.token_bytes, mapped)) == b"".join(
                map(base.token_bytes, base.encode(text))
            )
    same = build(ours, ours)
    text = "Hello, world! The cat."
    assert [token for id in ours.encode(text) for token in same.value_tokens[id]] == ours.encode(
        text
    )
    for how in HOWS[1:]:
        assert build(other, ours, how, ["the hell", "they live"]).how == how
