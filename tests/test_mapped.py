"""Decoding through a vocabulary map, against brute force and against no map."""

import copy

import pytest
import torch

import vocab_map
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from ivl import ValueModel
from model import Llama
from sample import Guided, generate, score
from tests.test_model import small
from tests.test_tokenizer import byte_pairs
from tests.test_train import inside, refused, run, succeed
from vocab_map import FLOOR, Mapped, VocabMap, build

# Few tokens, so that brute force is possible: the base's are sometimes longer than the value network's, sometimes shorter.
LONG = TiktokenTokenizer(byte_pairs(b"ab", b"abc", b"bc", b"abca", b" a", b" ab"))
SHORT = TiktokenTokenizer(byte_pairs(b"ab", b"ca"))


def bases(tokenizer, seeds=3, scale=6.0) -> list[Llama]:
    """Random bases with opinions: their logits are spread."""
    made = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        llama = small(vocab_size=tokenizer.vocab_size)
        llama.lm_head.weight.data = scale * torch.randn_like(llama.lm_head.weight) / llama.config.hidden_size**0.5
        made.append(llama.requires_grad_(False))
    return made


def brute_force(base: Llama, vocab: VocabMap, prompt: list[int], written: list[int], Vv: int) -> torch.Tensor:
    """P(v | written) over all ways in which the base's tokens can cover what is written and one value token more."""
    table: dict[tuple[int, ...], torch.Tensor] = {}

    def log_p(tokens):
        if tokens not in table:
            z = base(torch.tensor([prompt + list(tokens)]))[0, -1].double()
            z[[token for token in range(len(z)) if token >= len(vocab.pieces) or not vocab.pieces[token]]] = -torch.inf
            table[tokens] = z.log_softmax(-1)
        return table[tokens]

    P = torch.zeros(Vv, dtype=torch.float64)

    def cover(tokens, rest, weight):
        for token, p in enumerate((log_p(tokens) + weight).tolist()):
            if p == -float("inf"):
                continue
            pieces = vocab.pieces[token]
            if pieces[:len(rest)] == rest and len(pieces) > len(rest):
                P[pieces[len(rest)]] += torch.tensor(p, dtype=torch.float64).exp()
            elif rest[:len(pieces)] == pieces:
                cover((*tokens, token), rest[len(pieces):], p)

    cover((), tuple(written), 0.0)
    return P / P.sum()


@torch.no_grad()
@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "abcab", "abcabc", " abca"])
def test_the_mass_of_hypotheses_is_brute_force(text, monkeypatch):
    """With as many hypotheses as there are, and no paths, P is the exact marginal over the base's ways to cut the text."""
    monkeypatch.setattr(vocab_map, "HYPOTHESES", 100)
    vocab = build(LONG, SHORT)
    vocab.paths = []
    for base in bases(LONG):
        mapped = Mapped(base, vocab)
        mapped.start([SHORT.encode("xyz ", bos=True)])
        written = SHORT.encode(text)
        for value in written:
            mapped.log_p(torch.zeros(1, SHORT.vocab_size), 0.0)
            mapped.push([value])
        found = mapped.log_p(torch.zeros(1, SHORT.vocab_size), 0.0)[0].exp().double()
        exact = brute_force(base, vocab, LONG.encode("xyz ", bos=True), written, SHORT.vocab_size)
        torch.testing.assert_close(found, exact.clamp(min=FLOOR), rtol=1e-3, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("base_tokenizer, value_tokenizer", [(LONG, SHORT), (SHORT, LONG)])
def test_P_is_a_distribution(base_tokenizer, value_tokenizer):
    """It sums to 1 where no path is needed, and never to more (with MARGIN, so that no text counts twice)."""
    vocab = build(base_tokenizer, value_tokenizer)
    needs_paths = any(len(path) > 1 for path in vocab.paths)
    for base in bases(base_tokenizer, seeds=5):
        mapped = Mapped(base, vocab)
        mapped.start([value_tokenizer.encode(text, bos=True) for text in ("x", "some abc", "é 漢")])
        for step, value in enumerate(value_tokenizer.encode("abcab ca abca")):
            z_delta = torch.randn(3, value_tokenizer.vocab_size, generator=torch.Generator().manual_seed(step))
            total = mapped.log_p(3 * z_delta, 100.0).exp().sum(-1)
            assert (total < 1 + 1e-4).all()
            if not needs_paths:
                assert (total > 1 - 1e-4).all()
            mapped.push([value] * 3)


@torch.no_grad()
def test_a_path_is_the_product_of_its_tokens():
    """Value tokens abc and abca take base tokens ab + c and ab + ca: without a path nothing would ever reach them."""
    vocab = build(SHORT, LONG)
    token = {LONG.token_bytes(id): id for id in range(LONG.vocab_size)}
    assert vocab.paths[token[b"abc"]] == tuple(SHORT.encode("ab") + SHORT.encode("c"))
    for base in bases(SHORT):
        mapped = Mapped(base, vocab)
        prompt = SHORT.encode("xyz", bos=True)
        mapped.start([LONG.encode("xyz", bos=True)])
        z_delta = torch.zeros(1, LONG.vocab_size)
        z_delta[0, [token[b"abc"], token[b"abca"]]] = 40.0
        P = mapped.log_p(z_delta, 0.0)[0].exp()
        ab, c, ca = [SHORT.encode(text)[0] for text in ("ab", "c", "ca")]
        silent = list(range(256 + 2, SHORT.vocab_size))
        silent = [id for id in silent if id not in (SHORT.bos_id, SHORT.eos_id, SHORT.end_of_turn_id)]

        def p(tokens):
            z = base(torch.tensor([tokens]))[0, -1]
            z[silent] = -torch.inf
            return z.softmax(-1)

        first, then = p(prompt), p(prompt + [ab])
        assert P[token[b"abc"]].item() == pytest.approx((first[ab] * then[c]).item(), rel=1e-3)
        assert P[token[b"abca"]].item() == pytest.approx((first[ab] * then[ca]).item(), rel=1e-3)
        mapped.push([token[b"abca"]])
        exact = next(context for context in mapped.texts[0] if not context.pending)
        assert exact.tokens == prompt + [ab, ca]
        torch.testing.assert_close(exact.logits, base(torch.tensor([prompt + [ab, ca]]))[0, -1], rtol=1e-4, atol=1e-4)


def pair_for(base_tokenizer, value_tokenizer, seed=0) -> tuple[Llama, ValueModel]:
    base = bases(base_tokenizer, seeds=1)[0]
    value = bases(value_tokenizer, seeds=seed + 2)[-1]
    value.config.eos_token_id = value_tokenizer.eos_id
    base.config.eos_token_id = base_tokenizer.eos_id
    return base, ValueModel(value, {"scheme": "residual"})


@pytest.mark.parametrize("tokenizer", [LONG, SentencePieceTokenizer(World(0).train_tokenizer())], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_map_between_a_tokenizer_and_itself_is_no_map(tokenizer, temperature):
    base, value = pair_for(tokenizer, tokenizer)
    prompts = [tokenizer.encode(text, bos=True) for text in ("x", "some abc", "What is the pet of Fufa?", "é 漢字 👍")]
    plain = Guided(base, value)
    plain.readable = tokenizer.vocab_size
    known = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn_id)
    silent = [id for id in range(tokenizer.vocab_size) if not tokenizer.token_bytes(id) and id not in known]
    silent += [0] * (tokenizer.kind == "sentencepiece")  # the unknown token has no pieces
    base.register_forward_hook(lambda _, inputs, z: z.index_fill(-1, torch.tensor(silent), -torch.inf) if silent else z)
    mapped = Guided(base, value, build(tokenizer, tokenizer))
    value.register_forward_hook(lambda _, inputs, z: z.index_fill(-1, torch.tensor(silent), -99.0) if silent else z)
    options = dict(max_new_tokens=20, temperature=temperature, seed=5)
    assert generate(mapped, prompts, **options) == generate(plain, prompts, **options)


@pytest.mark.parametrize("how", vocab_map.HOWS)
@pytest.mark.parametrize("base_tokenizer, value_tokenizer", [(LONG, SHORT), (SHORT, LONG), (LONG, SentencePieceTokenizer(World(0).train_tokenizer()))])
def test_batched_is_single_and_any_text_comes_through(how, base_tokenizer, value_tokenizer):
    """Random networks write whatever they like, half characters included; rows of a batch do not touch each other."""
    base, value = pair_for(base_tokenizer, value_tokenizer)
    prompts = [value_tokenizer.encode(text, bos=True) for text in ("abc", "é", "漢字 👩‍👩‍👧 e\u0301", "a longer text abca b c")]
    guided = Guided(base, value, build(base_tokenizer, value_tokenizer, how, ["abcab ca abca", "é 漢字 abc"]))
    for temperature in (0.0, 1.0):
        options = dict(max_new_tokens=12, temperature=temperature, stop_ids=set())
        together = generate(guided, prompts, **options)
        assert all(len(answer) == 12 for answer in together)
        if temperature == 0:  # sampling has a stream of its own for each prompt, by its number
            assert together == [generate(guided, [prompt], **options)[0] for prompt in prompts]
    contexts = [context for contexts in guided.mapped.texts for context in contexts]
    assert all(torch.isfinite(context.logits).all() and context.weight == context.weight for context in contexts)


@torch.no_grad()
def test_equation_5_as_printed():
    """Logits add up, weighted; nothing reaches a column: 0; the base reads the text in its own cut, half a character withheld."""
    base, value = pair_for(LONG, SHORT)
    vocab = build(LONG, SHORT, "paper", ["abcab ca abca", "é abc"])
    mapped = Mapped(base, vocab)
    mapped.start([SHORT.encode("abc é", bos=True)])
    never = [id for id in range(SHORT.vocab_size) if not SHORT.token_bytes(id) and id not in (SHORT.bos_id, SHORT.eos_id, SHORT.end_of_turn_id)]
    W = torch.zeros(LONG.vocab_size, SHORT.vocab_size)
    for token, pieces in enumerate(vocab.pieces):
        for piece in pieces:
            W[token, piece] = float(vocab.weight[token])
    assert (W.sum(0) == 0).any() and ((W > 0).sum(0) > 1).any() and ((W > 0) & (W < 1)).any()
    for text in ("abc é", "abc éa", "abc éab"):
        z = base(torch.tensor([LONG.encode(text, bos=True)]))[0, -1]
        expected = (z @ W).index_fill(0, torch.tensor(never), -torch.inf)
        torch.testing.assert_close(mapped.log_p(torch.zeros(1, SHORT.vocab_size), 0.0)[0], expected, rtol=1e-4, atol=1e-4)
        mapped.push([SHORT.encode("a" if text == "abc é" else "b")[0]])
    half = "é".encode()[:1]
    mapped.start([SHORT.encode("abc", bos=True)])
    mapped.push([half[0]])
    assert mapped.texts[0][0].tokens == LONG.encode("abc", bos=True)


def test_scores_through_a_map_are_those_of_single_steps():
    base, value = pair_for(LONG, SHORT)
    guided = Guided(base, value, build(LONG, SHORT))
    context, continuations = SHORT.encode("xyz", bos=True), [SHORT.encode(text) for text in ("abc", "a", "b abc")]
    together = score(guided, [(context, continuation) for continuation in continuations])
    for continuation, (found, _) in zip(continuations, together):
        assert found == pytest.approx(score(guided, [(context, continuation)])[0][0], abs=1e-3)


def test_cascades_are_refused_with_the_reason():
    base, value = pair_for(LONG, SHORT)
    for scheme in ("cascade", "cascade+"):
        with pytest.raises(ValueError, match="reads the base's logits"):
            Guided(base, ValueModel(copy.deepcopy(value.network), {"scheme": scheme}), build(LONG, SHORT))


def test_sample_with_a_foreign_base(home, tmp_path):
    """A base of the family with longer tokens, barely trained, guided by the value network of the first family."""
    succeed(home, "train.py", "--base", "tiny-b-s", "--steps", "8", "--batch-size", "4")
    out = succeed(home, "sample.py", "--base", "tiny-b-s", "--prompt", "Greet Fufa. 漢字 👍", "--max-new-tokens", "8",
                  "--value", "out/seed0/value-residual-tiny-s")
    assert "another tokenizer" in out and "tiny-b-s + value" in out
    files = ["--base-tokenizer", home / "out/seed0/tiny-b-s", "--value-tokenizer", home / "out/seed0/tiny-s", "--out", tmp_path / "map"]
    assert inside(tmp_path, "vocab_map.py", *files)[0] == 0
    command = ["sample.py", "--base", "tiny-b-s", "--value", "out/seed0/value-residual-tiny-s", "--max-new-tokens", "8", "--vocab-map"]
    same = run(home, *command, tmp_path / "map", "--prompt", "Greet Fufa. 漢字 👍")
    assert same.returncode == 0 and same.stdout.splitlines()[-2:] == out.splitlines()[-2:]
    (tmp_path / "half").write_bytes((tmp_path / "map").read_bytes()[:1000])
    assert "damaged" in refused(home, *command, tmp_path / "half")
    assert "another tokenizer of the base" in refused(home, "sample.py", "--value", "out/seed0/value-residual-tiny-s", "--vocab-map", tmp_path / "map")
    assert "cannot be trained together" in refused(home, "train.py", "--base", "tiny-b-s", "--value", "tiny-s", "--no-full")
