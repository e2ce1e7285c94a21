"""Decoding through a vocabulary map, against brute force and against no map."""

import copy
import json
import random
import re
from pydoc_data.topics import topics

import pytest
import torch

from beyond import hypotheses
from beyond.hypotheses import FLOOR, Context, Hypotheses
from data.chat import default_template
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from ivl import ValueModel
from model import Llama
from run.bases import load_base, with_ends
from run.processes import Alone
from sample import Guided, MappedGuided, generate, score
from tests.helpers import (
    ROOT,
    SHARED,
    byte_pairs,
    json_byte_pairs,
    refused,
    run,
    small,
    succeed,
    worked,
)
from vocab_map import HOWS, VocabMap, build

# Few tokens, so that brute force is possible: the base's are sometimes longer than the value network's, sometimes shorter.
LONG = TiktokenTokenizer(byte_pairs(b"ab", b"abc", b"bc", b"abca", b" a", b" ab"))
SHORT = TiktokenTokenizer(byte_pairs(b"ab", b"ca"))


def bases(tokenizer, seeds=3, scale=6.0) -> list[Llama]:
    """Random bases with opinions: their logits are spread."""
    made = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        llama = small(vocab_size=tokenizer.vocab_size)
        llama.lm_head.weight.data = (
            scale * torch.randn_like(llama.lm_head.weight) / llama.config.hidden_size**0.5
        )
        made.append(llama.requires_grad_(False))
    return made


def mapped_by(
    vocab: VocabMap, base: Llama, sampling: bool = False, kind: type[Hypotheses] = Hypotheses
) -> Hypotheses:
    """A base behind a map; the value network is not asked."""
    value = ValueModel(small(vocab_size=vocab.value_tokenizer.vocab_size))
    mapped = kind(base, value, vocab)
    mapped.sampling = sampling
    return mapped


def brute_force(
    base: Llama, vocab: VocabMap, prompt: list[int], written: list[int], Vv: int
) -> torch.Tensor:
    """P(v | written) over all ways in which the base's tokens can cover what is written and one value token more."""
    table: dict[tuple[int, ...], torch.Tensor] = {}

    def log_p(tokens):
        if tokens not in table:
            z = base(torch.tensor([prompt + list(tokens)]))[0, -1].double()
            z[
                [
                    token
                    for token in range(len(z))
                    if token >= len(vocab.value_tokens) or not vocab.value_tokens[token]
                ]
            ] = -torch.inf
            table[tokens] = z.log_softmax(-1)
        return table[tokens]

    P = torch.zeros(Vv, dtype=torch.float64)

    def cover(tokens, rest, weight):
        for token, p in enumerate((log_p(tokens) + weight).tolist()):
            if p == -float("inf"):
                continue
            pieces = vocab.value_tokens[token]
            if pieces[: len(rest)] == rest and len(pieces) > len(rest):
                P[pieces[len(rest)]] += torch.tensor(p, dtype=torch.float64).exp()
            elif rest[: len(pieces)] == pieces:
                cover((*tokens, token), rest[len(pieces) :], p)

    cover((), tuple(written), 0.0)
    return P / P.sum()


@torch.no_grad()
def all_ways(base: Llama, vocab: VocabMap, prompt: list[int], text: bytes) -> dict:
    """log p of each way in which base tokens cover a text, the last one perhaps going on behind it."""
    value = vocab.value_tokenizer
    spelled = [b"".join(map(value.token_bytes, pieces)) for pieces in vocab.value_tokens]
    silent = [token for token, pieces in enumerate(vocab.value_tokens) if not pieces]
    ways = {}

    def cover(tokens, rest, weight):
        if not rest:
            ways[tokens] = weight
            return
        z = base(torch.tensor([prompt + list(tokens)]))[0, -1, : len(spelled)].double()
        z[silent] = -torch.inf
        for token, p in enumerate((z.log_softmax(-1) + weight).tolist()):
            if spelled[token].startswith(rest):
                ways[(*tokens, token)] = p
            elif spelled[token] and rest.startswith(spelled[token]):
                cover((*tokens, token), rest[len(spelled[token]) :], p)

    cover((), text, 0.0)
    return ways


@torch.no_grad()
@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "abcab", "abcabc", " abca"])
def test_the_mass_of_hypotheses_is_brute_force(text, monkeypatch):
    """With as many hypotheses as there are, no paths and no ends that cross, P is exact: all the base's ways to cut the text."""
    monkeypatch.setattr(hypotheses, "HYPOTHESES", {False: 100, True: 100})
    monkeypatch.setattr(hypotheses, "UNLIKELY", {False: 1000.0, True: 1000.0})
    monkeypatch.setattr(hypotheses, "EXPANSIONS", 0)
    monkeypatch.setattr(hypotheses, "PARTS", {False: 0, True: 0})
    vocab = build(LONG, SHORT)
    vocab.base_tokens = []
    for base in bases(LONG):
        mapped = mapped_by(vocab, base)
        mapped.begin([SHORT.encode("xyz ", bos=True)])
        written = SHORT.encode(text)
        for value in written:
            mapped.base_logits(torch.zeros(1, SHORT.vocab_size))
            mapped.push([value])
        found = mapped.base_logits(torch.zeros(1, SHORT.vocab_size))[0].exp().double()
        exact = brute_force(base, vocab, LONG.encode("xyz ", bos=True), written, SHORT.vocab_size)
        torch.testing.assert_close(found, exact.clamp(min=FLOOR), rtol=1e-3, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("base_tokenizer, value_tokenizer", [(LONG, SHORT), (SHORT, LONG)])
def test_P_is_a_distribution(base_tokenizer, value_tokenizer, monkeypatch):
    """It sums to 1 where no path is needed, and never to more (with MARGIN, so that no text counts twice)."""
    monkeypatch.setattr(hypotheses, "MARGIN", {False: 0.0, True: 100.0})
    vocab = build(base_tokenizer, value_tokenizer)
    needs_paths = any(len(path) > 1 for path in vocab.base_tokens)
    for base in bases(base_tokenizer, seeds=5):
        mapped = mapped_by(vocab, base, sampling=True)
        mapped.begin([value_tokenizer.encode(text, bos=True) for text in ("x", "some abc", "é 漢")])
        for step, value in enumerate(value_tokenizer.encode("abcab ca abca")):
            z_delta = torch.randn(
                3, value_tokenizer.vocab_size, generator=torch.Generator().manual_seed(step)
            )
            total = mapped.base_logits(3 * z_delta).exp().sum(-1)
            assert (total < 1 + 1e-4).all()
            if not needs_paths:
                assert (total > 1 - 1e-4).all()
            mapped.push([value] * 3)


@torch.no_grad()
def test_a_path_is_the_product_of_its_tokens():
    """Value tokens abc and abca take base tokens ab + c and ab + ca: without a path nothing would ever reach them."""
    vocab = build(SHORT, LONG)
    token = {LONG.token_bytes(id): id for id in range(LONG.vocab_size)}
    assert vocab.base_tokens[token[b"abc"]] == tuple(SHORT.encode("ab") + SHORT.encode("c"))
    for base in bases(SHORT):
        mapped = mapped_by(vocab, base)
        prompt = SHORT.encode("xyz", bos=True)
        mapped.begin([LONG.encode("xyz", bos=True)])
        z_delta = torch.zeros(1, LONG.vocab_size)
        z_delta[0, [token[b"abc"], token[b"abca"]]] = 40.0
        P = mapped.base_logits(z_delta)[0].exp()
        ab, c, ca = [SHORT.encode(text)[0] for text in ("ab", "c", "ca")]
        silent = list(range(256 + 2, SHORT.vocab_size))
        silent = [
            id for id in silent if id not in (SHORT.bos_id, SHORT.eos_id, SHORT.end_of_turn_id)
        ]

        def p(tokens):
            z = base(torch.tensor([tokens]))[0, -1]
            z[silent] = -torch.inf
            return z.softmax(-1)

        first, then = p(prompt), p(prompt + [ab])
        assert P[token[b"abc"]].item() == pytest.approx((first[ab] * then[c]).item(), rel=1e-3)
        assert P[token[b"abca"]].item() == pytest.approx((first[ab] * then[ca]).item(), rel=1e-3)
        mapped.push([token[b"abca"]])
        exact = next(context for context in mapped.texts[0].contexts if not context.pending)
        assert exact.tokens == prompt + [ab, ca]
        torch.testing.assert_close(exact.log_p.exp(), p(prompt + [ab, ca]), rtol=1e-4, atol=1e-6)


def pair_for(base_tokenizer, value_tokenizer, seed=0) -> tuple[Llama, ValueModel]:
    base = bases(base_tokenizer, seeds=1)[0]
    value = bases(value_tokenizer, seeds=seed + 2)[-1]
    value.config.eos_token_id = value_tokenizer.eos_id
    base.config.eos_token_id = base_tokenizer.eos_id
    return base, ValueModel(value, {"scheme": "residual"})


@pytest.mark.parametrize(
    "tokenizer",
    [LONG, SentencePieceTokenizer(World(0).train_tokenizer())],
    ids=["bytes", "sentencepiece"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_map_between_a_tokenizer_and_itself_is_no_map(tokenizer, temperature):
    base, value = pair_for(tokenizer, tokenizer)
    prompts = [
        tokenizer.encode(text, bos=True)
        for text in ("x", "some abc", "What is the pet of Fufa?", "é 漢字 👍")
    ]
    plain = Guided(base, value, readable=tokenizer.vocab_size)
    known = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn_id)
    silent = [
        id
        for id in range(tokenizer.vocab_size)
        if not tokenizer.token_bytes(id) and id not in known
    ]
    silent += [0] * (tokenizer.kind == "sentencepiece")  # the unknown token has no pieces
    base.register_forward_hook(
        lambda _, inputs, z: z.index_fill(-1, torch.tensor(silent), -torch.inf) if silent else z
    )
    mapped = Hypotheses(base, value, build(tokenizer, tokenizer))
    value.register_forward_hook(
        lambda _, inputs, z: z.index_fill(-1, torch.tensor(silent), -99.0) if silent else z
    )
    options = dict(max_new_tokens=20, stop_ids={tokenizer.eos_id}, temperature=temperature, seed=5)
    assert generate(mapped, prompts, **options) == generate(plain, prompts, **options)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "base_tokenizer, value_tokenizer",
    [(LONG, SHORT), (SHORT, LONG), (LONG, SentencePieceTokenizer(World(0).train_tokenizer()))],
)
def test_batched_is_single_and_any_text_comes_through(how, base_tokenizer, value_tokenizer):
    """Random networks write whatever they like, half characters included; rows of a batch do not touch each other."""
    base, value = pair_for(base_tokenizer, value_tokenizer)
    prompts = [
        value_tokenizer.encode(text, bos=True)
        for text in ("abc", "é", "漢字 👩‍👩‍👧 e\u0301", "a longer text abca b c")
    ]
    vocab = build(base_tokenizer, value_tokenizer, how, ["abcab ca abca", "é 漢字 abc"])
    for temperature in (0.0, 1.0):
        guided = (
            Hypotheses(base, value, vocab) if how == "pieces" else MappedGuided(base, value, vocab)
        )
        options = dict(max_new_tokens=12, temperature=temperature, stop_ids=set())
        together = generate(guided, prompts, **options)
        assert all(len(answer) == 12 for answer in together)
        if temperature == 0:  # sampling has a stream of its own for each prompt, by its number
            assert together == [generate(guided, [prompt], **options)[0] for prompt in prompts]
        if how == "pieces":
            assert all(
                context.weight == context.weight
                for text in guided.texts
                for context in text.contexts
            )


@torch.no_grad()
def test_equation_5_as_printed():
    """Logits add up, weighted; nothing reaches a column: 0; the base reads the text in its own cut, half a character withheld."""
    base, value = pair_for(LONG, SHORT)
    vocab = build(LONG, SHORT, "paper", ["abcab ca abca", "é abc"])
    guided = MappedGuided(base, value, vocab)
    W = torch.zeros(LONG.vocab_size, SHORT.vocab_size)
    for token, pieces in enumerate(vocab.value_tokens):
        for piece in pieces:
            W[token, piece] = float(vocab.weight[token])
    assert (W.sum(0) == 0).any() and ((W > 0).sum(0) > 1).any() and ((W > 0) & (W < 1)).any()
    never = torch.tensor(vocab.unsayable())
    [last] = guided.start([SHORT.encode("abc é", bos=True)], 4).tolist()
    for text, token in (
        ("abc é", last[0]),
        ("abc éa", SHORT.encode("a")[0]),
        ("abc éab", SHORT.encode("b")[0]),
    ):
        z_post = guided.step(torch.tensor([[token]]))
        z = base(torch.tensor([LONG.encode(text, bos=True)]))[0, -1]
        expected = (z @ W).index_fill(0, never, -torch.inf)
        torch.testing.assert_close(guided.z_base[0, 0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(z_post, guided.z_base + guided.z_delta, rtol=1e-4, atol=1e-4)
    half = "é".encode()[:1]
    guided.begin([SHORT.encode("abc", bos=True)])
    guided.push([half[0]])
    assert guided.base_tokens == [LONG.encode("abc", bos=True)]


def mapped_pair(how: str) -> Guided:
    base, value = pair_for(LONG, SHORT)
    vocab = build(LONG, SHORT, how, ["abcab ca abca", "é abc"])
    return Hypotheses(base, value, vocab) if how == "pieces" else MappedGuided(base, value, vocab)


@pytest.mark.parametrize("how", ["pieces", "paper"])
def test_step_needs_no_start_and_takes_several_tokens(how):
    """The first tokens are then a whole text; what comes out is what start and single steps give."""
    tokens = torch.tensor(
        [
            SHORT.encode("ab ca b", bos=True),
            SHORT.encode("xyzw ab", bos=True)[: len(SHORT.encode("ab ca b", bos=True))],
        ]
    )
    started, fresh = mapped_pair(how), mapped_pair(how)
    last = started.start([row[:1] for row in tokens.tolist()], tokens.shape[1])
    expected = [started.step(last)] + [
        started.step(tokens[:, at : at + 1]) for at in range(1, tokens.shape[1])
    ]
    torch.testing.assert_close(fresh.step(tokens), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


def test_the_end_of_a_turn_is_the_bases_end_of_a_turn():
    """In a prompt of several turns, too, whatever the kinds of the two tokenizers."""
    pieces = SentencePieceTokenizer(World(0).train_tokenizer())
    for value, base in ((SHORT, pieces), (SHORT, LONG), (pieces, LONG)):
        vocab = build(base, value)
        prompt = [value.bos_id, *value.encode("abc"), value.end_of_turn_id, *value.encode("ab")]
        expected = [
            base.bos_id,
            *base.encode("abc"),
            vocab.in_base_tokens([value.end_of_turn_id])[0][0],
            *base.encode("ab"),
        ]
        assert vocab.in_base_tokens(prompt) == (expected, [])
        assert expected[1 + len(base.encode("abc"))] in (base.end_of_turn_id, base.eos_id)
    assert build(LONG, SHORT).in_base_tokens([SHORT.end_of_turn_id])[0] == [LONG.end_of_turn_id]


def test_a_token_that_begins_and_ends_texts_is_read_as_either():
    """As in base models of SmolLM2, whose one special token does both."""
    value = json_byte_pairs({"bos_id": 259, "eos_id": 259})
    for base, begin in ((SHORT, [SHORT.bos_id]), (json_byte_pairs({"eos_id": 260}), [])):
        ids = [259, *value.encode("abc"), 259]
        assert build(base, value).in_base_tokens(ids) == (
            [*begin, *base.encode("abc"), base.eos_id],
            [],
        )


def test_scores_through_a_map_are_those_of_single_steps():
    base, value = pair_for(LONG, SHORT)
    guided = Hypotheses(base, value, build(LONG, SHORT))
    context, continuations = (
        SHORT.encode("xyz", bos=True),
        [SHORT.encode(text) for text in ("abc", "a", "b abc")],
    )
    together = score(guided, [(context, continuation) for continuation in continuations])
    for continuation, (found, _) in zip(continuations, together):
        assert found == pytest.approx(score(guided, [(context, continuation)])[0][0], abs=1e-3)


def test_cascades_are_refused_with_the_reason():
    base, value = pair_for(LONG, SHORT)
    for scheme in ("cascade", "cascade+"):
        with pytest.raises(ValueError, match="reads the base's logits"):
            MappedGuided(
                base,
                ValueModel(copy.deepcopy(value.network), {"scheme": scheme}),
                build(LONG, SHORT),
            )


def test_sample_with_a_foreign_base(home, tmp_path):
    """A base of a family with other tokens, barely trained, guided by the value network of the first family."""
    succeed(home, "train.py --base tiny-b-s --steps 8 --batch-size 4")
    out = succeed(
        home,
        "sample.py --base tiny-b-s --prompt",
        "Greet Fufa. 漢字 👍",
        "--max-new-tokens",
        "8",
        "--value",
        "out/seed0/value-residual-tiny-s",
    )
    assert "another tokenizer" in out and "tiny-b-s + value" in out
    files = (
        f"--base-tokenizer {home}/out/seed0/tiny-b-s --value-tokenizer "
        f"{home}/out/seed0/tiny-s --out {tmp_path}/map"
    ).split()
    worked(tmp_path, "vocab_map.py", *files)
    command = (
        "sample.py --base tiny-b-s --value out/seed0/value-residual-tiny-s "
        "--max-new-tokens 8 --vocab-map"
    ).split()
    same = run(home, *command, tmp_path / "map", "--prompt", "Greet Fufa. 漢字 👍")
    assert same.returncode == 0 and same.stdout.splitlines()[-2:] == out.splitlines()[-2:]
    (tmp_path / "half").write_bytes((tmp_path / "map").read_bytes()[:1000])
    assert "damaged" in refused(home, *command, tmp_path / "half")
    assert "nothing to compile" in refused(
        home,
        "sample.py --base tiny-b-s --value out/seed0/value-residual-tiny-s --compile",
    )
    assert "another tokenizer of the base" in refused(
        home,
        f"sample.py --value out/seed0/value-residual-tiny-s --vocab-map {tmp_path}/map",
    )
    assert "cannot be trained together" in refused(
        home, "train.py --base tiny-b-s --value tiny-s --no-full"
    )
    assert "cannot be trained together" in refused(
        home, "train.py --base tiny-b-s --value out/seed0/value-residual-tiny-s"
    )
    assert not (home / "out/seed0/full-tiny-b-s").exists()  # nothing was fine-tuned before


# ---- ends that cross

CROSSED = TiktokenTokenizer(byte_pairs(b"ab", b"abc", b"de", b" a", b"  "))
CROSSING = TiktokenTokenizer(byte_pairs(b"ab", b"de", b"cde", b" a"))
ODD = TiktokenTokenizer(byte_pairs(b"bc", b"de"))
EVEN = TiktokenTokenizer(byte_pairs(b"ab", b"cd", b"ef"))
BYTES = TiktokenTokenizer(byte_pairs())


class Told(Hypotheses):
    """A base that is nearly sure of one text, in its own tokens, and of nothing else."""

    def read_base(self, wishes):
        children = []
        for parent, tokens in wishes:
            whole = parent.tokens + tokens
            z = torch.zeros(len(self.tables.silent))
            if whole == self.own[: len(whole)] and len(whole) < len(self.own):
                z[self.own[len(whole)]] = 14.0
            log_p = z.masked_fill(self.tables.silent, -torch.inf).log_softmax(-1)
            children.append(Context(whole, parent.keys, parent.values, log_p))
        return children


def both_ways(text: str, base=CROSSED, value=CROSSING) -> tuple[float, float, int]:
    """log p of a text and its end through the map, and in the base's own tokens, and how many those are."""
    told = mapped_by(build(base, value), bases(base, 1)[0], kind=Told)
    told.own = base.encode("x" + text, bos=True) + [base.end_of_turn_id]
    told.begin([value.encode("x", bos=True)])
    for token in [*value.encode(text), value.end_of_turn_id]:
        told.base_logits(torch.zeros(1, value.vocab_size))
        told.push([token])
    behind = range(2, len(told.own))
    steps = [([], told.own[:at]) for at in behind]
    nothing = Context([], None, None, None)
    contexts = told.read_base([(nothing, tokens) for _, tokens in steps])
    own = sum(context.log_p[told.own[at]].item() for at, context in zip(behind, contexts))
    return told.texts[0].log_probability(), own, len(behind)


@torch.no_grad()
@pytest.mark.parametrize("is_generous", [False, True])
@pytest.mark.parametrize(
    "pair", ["LONG SHORT", "SHORT LONG", "CROSSED CROSSING", "ODD EVEN", "BYTES LONG"]
)
def test_no_way_to_cut_a_text_counts_twice(pair, is_generous, monkeypatch):
    """Each hypothesis weighs what the base says of its tokens, and all together no more than all ways there are."""
    if is_generous:
        monkeypatch.setattr(hypotheses, "EXPANSIONS", 100)
        for name in ("HYPOTHESES", "PARTS", "UNLIKELY"):
            monkeypatch.setattr(hypotheses, name, {False: 1000, True: 1000})
    base_tokenizer, value_tokenizer = [globals()[name] for name in pair.split()]
    vocab, rng = build(base_tokenizer, value_tokenizer), random.Random(0)
    prompt = base_tokenizer.encode("xyz", bos=True)
    for base in bases(base_tokenizer, seeds=2):
        for text in ["".join(rng.choices("abcdef ", k=5)) for _ in range(6)] + ["cabcb", "  a ca"]:
            mapped = mapped_by(vocab, base)
            mapped.begin([value_tokenizer.encode("xyz", bos=True)])
            for value in value_tokenizer.encode(text):
                wanted = value_tokenizer.token_bytes(value)
                z_delta = [
                    40.0 * len(text) * text.startswith(wanted) for text in mapped.tables.text_of
                ]
                mapped.base_logits(torch.tensor([z_delta]))
                mapped.push([value])
            found, ways = mapped.texts[0], all_ways(base, vocab, prompt, text.encode())
            tokens = [tuple(context.tokens[len(prompt) :]) for context in found.contexts]
            assert len(set(tokens)) == len(tokens)
            for context, way in zip(found.contexts, tokens):
                if not context.pending:
                    assert found.log_scale + context.weight == pytest.approx(ways[way], abs=1e-3)
            total = torch.tensor(list(ways.values())).logsumexp(0).item()
            assert found.log_probability() < total + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("text", [" abcde", " abcdeabcde", "  abcde ab", " abcde  a", "zabcdez"])
def test_a_text_is_as_likely_through_the_map_where_ends_cross(text, monkeypatch):
    """ab + cde in the value network's tokens, abc + de in the base's; two spaces and a word; an end of turn right behind it."""
    assert [CROSSING.token_bytes(id) for id in CROSSING.encode("abcde")] == [b"ab", b"cde"]
    assert [CROSSED.token_bytes(id) for id in CROSSED.encode("abcde")] == [b"abc", b"de"]
    found, own, count = both_ways(text)
    assert abs(found - own) < 1e-3 * count
    monkeypatch.setattr(hypotheses, "PARTS", {False: 0, True: 0})
    monkeypatch.setattr(hypotheses, "DESPERATE", 0)
    assert not both_ways(text)[0] > own - 5


@torch.no_grad()
@pytest.mark.parametrize("text", ["abcdef", "abcdefabcdef", " abcdef abcd", "abcde"])
def test_ends_may_cross_over_several_value_tokens(text):
    """ab + cd + ef in the value network's tokens; a + bc + de + f, and no end in common within, in the base's."""
    assert [ODD.token_bytes(id) for id in ODD.encode("abcdef")] == [b"a", b"bc", b"de", b"f"]
    assert [EVEN.token_bytes(id) for id in EVEN.encode("abcdef")] == [b"ab", b"cd", b"ef"]
    found, own, count = both_ways(text, ODD, EVEN)
    assert abs(found - own) < 1e-3 * count


# ---- real texts, in real tokens


def real_texts() -> list[str]:
    """100 questions and answers of GSM8K, and 100 paragraphs that come with every Python, all of them short and whole.

    Where a text breaks off, its end is so unlikely that a cut in odd tokens, behind which it is not, weighs most.
    """
    if not (SHARED / "gsm8k-train.jsonl").is_file():
        pytest.skip("GSM8K is not beside the repository")
    rng = random.Random(0)
    lines = map(json.loads, (SHARED / "gsm8k-train.jsonl").read_text().splitlines())
    problems = [text for line in lines for text in line.values() if len(text) < 200]
    paragraphs = [text.strip() for text in "\n\n".join(topics.values()).split("\n\n")]
    prose = [text for text in paragraphs if re.fullmatch(r"[A-Z][a-z]+ [^|*{}]{60,200}[.]", text)]
    return rng.sample(problems, 100) + rng.sample(prose, 100)


@torch.inference_mode()
def compare_texts(mapped: Hypotheses, texts: list[str], end: int) -> list[tuple[float, float]]:
    """Of each text and its end, a value token, in nats a token: log p through the map less log p in the base's own
    tokens; and less the log p of all ways that were kept and the base's own, each read by the base in one pass."""
    base, value = mapped.map.base_tokenizer, mapped.map.value_tokenizer
    rows = [[*value.encode(text), end] for text in texts]
    if value.space_in_front:  # which is part of the text to the base
        texts = [f" {text}" for text in texts]
    mapped.begin([value.encode("", bos=True)] * len(texts))
    all_texts = mapped.texts
    for at in range(max(map(len, rows))):
        going_on = [number for number, row in enumerate(rows) if at < len(row)]
        mapped.texts = [all_texts[number] for number in going_on]
        mapped.base_logits(torch.zeros(len(going_on), value.vocab_size))
        mapped.push([rows[number][at] for number in going_on])
    ends = [token for token, pieces in enumerate(mapped.map.value_tokens) if pieces == (end,)]
    first = len(base.encode("", bos=True))

    def one_pass(ids: list[int]) -> float:
        z = mapped.base(torch.tensor([ids[:-1]]))[0, first - 1 :].float()  # (T, Vb)
        log_p = z.masked_fill(mapped.tables.silent, -torch.inf).log_softmax(-1).double()
        return log_p.gather(1, torch.tensor(ids[first:])[:, None]).sum().item()

    differences = []
    for text, found in zip(texts, all_texts):
        ids = base.encode(text, bos=True)
        ways = {(*ids, token): one_pass([*ids, token]) for token in ends}
        own = torch.tensor(list(ways.values())).logsumexp(0).item()
        for context in found.contexts:
            if tuple(context.tokens) not in ways:
                ways[tuple(context.tokens)] = one_pass(context.tokens)
        every = torch.tensor(list(ways.values())).logsumexp(0).item()
        count, log_p = len(ids) + 1 - first, found.log_probability()
        differences.append(((log_p - own) / count, (log_p - every) / count))
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("base", ["gemma-3-270m", "tiny-b-s"])
def test_199_of_200_texts_are_as_likely_through_the_map_as_the_base_finds_them(base, request):
    """Of Gemma for SmolLM2's tokens, and of a tiny base for tiny-s's.

    A base may cut a word otherwise than its tokenizer does ("Mus" + "cov" + "ies"), and a text is as likely as all ways to
    cut it together. So none may be less likely than in the base's own tokens, and what is more has to be those other ways.
    """
    if base == "tiny-b-s":
        home = request.getfixturevalue("home")
        succeed(home, "train.py --base tiny-b-s")
        folders = home / "out/seed0/tiny-b-s", home / "out/seed0/tiny-s"
    else:
        folders = ROOT / "out/gemma-3-270m", ROOT / "out/smollm2-135m"
        if not all(folder.is_dir() for folder in folders):
            pytest.skip("data.gemma and data.smollm2 make the folders that this reads")
    texts = real_texts()
    tokenizers = [load_tokenizer(folder) for folder in folders]
    vocab = with_ends(build(*tokenizers), default_template(tokenizers[1]))
    [end] = vocab.value_tokens[tokenizers[0].eos_id]
    mapped = mapped_by(vocab, load_base(folders[0], "float32", "cpu", Alone()), sampling=True)
    differences = []
    for first in range(0, 200, 20):
        differences += compare_texts(mapped, texts[first : first + 20], end)
    for text, (own, every) in zip(texts, differences):
        if not (own > -1e-3 and abs(every) < 1e-3):
            print(
                f"{own:.4f} nats a token more than in own tokens, {every:.4f} more than all ways: {text!r}"
            )
    alike = sum(abs(own) < 1e-3 for own, _ in differences)
    print(f"{alike} of 200 texts are as likely as in the base's own tokens alone")
    assert sum(own > -1e-3 for own, _ in differences) >= 199
    assert sum(abs(every) < 1e-3 for _, every in differences) >= 199
