"""sample.py: decoding with caches, in batches, greedy and sampled."""

import shutil

import pytest
import torch

from beyond.speculation import Speculative, speculate
from data.chat import stop_ids
from data.errors import UsageError
from data.tokenizer import TiktokenTokenizer
from ivl import SCHEMES
from model import Llama
from run.cli import clock
from sample import Guided, generate, pick, score
from tests.helpers import ask, assert_same_or_tied, byte_pairs, pair, plugged, random_prompts, small

PLUGS = [*SCHEMES, "proxy"]


@torch.no_grad()
def greedy_without_cache(guided: Guided, prompt: list[int], count: int, stop: int) -> list[int]:
    new: list[int] = []
    while len(new) < count and new[-1:] != [stop]:
        new.append(guided.logits(torch.tensor([prompt + new]))[0, -1].argmax().item())
    return new


def test_batched_is_one_at_a_time_over_200_prompts():
    guided, prompts = pair(), random_prompts(200)
    batched = generate(guided, prompts, max_new_tokens=10, stop_ids={2})
    single = [generate(guided, [prompt], max_new_tokens=10, stop_ids={2})[0] for prompt in prompts]
    assert len(set(map(len, batched))) > 1  # some stop early, so the batch shrinks on its way
    assert_same_or_tied(guided, prompts, batched, single)


@pytest.mark.parametrize("plug", ["none", *PLUGS])
@pytest.mark.parametrize("Vb", [50, 53])
def test_cached_is_uncached(plug, Vb):
    guided = Guided(small(vocab_size=Vb)) if plug == "none" else plugged(plug, vocab_size=Vb)
    prompts = random_prompts(20)
    expected = [greedy_without_cache(guided, prompt, 12, stop=2) for prompt in prompts]
    assert_same_or_tied(
        guided, prompts, generate(guided, prompts, max_new_tokens=12, stop_ids={2}), expected
    )


def test_tokens_that_a_network_cannot_read_are_never_said():
    base = small(vocab_size=53)
    base.lm_head.weight.data[50:] *= 100  # the extra rows would win often
    guided, prompts = Guided(base, pair().value), random_prompts(20)
    assert (
        max(max(ids) for ids in generate(Guided(base), prompts, max_new_tokens=12, stop_ids={2}))
        >= 50
    )
    assert max(max(ids) for ids in generate(guided, prompts, max_new_tokens=12, stop_ids={2})) < 50


@pytest.mark.parametrize("plug", PLUGS)
def test_step_takes_several_tokens(plug):
    guided = plugged(plug)
    prompts = [[5, 6, 7], [8]]
    last = guided.start(prompts, 4)
    assert last.tolist() == [[7], [8]]
    with torch.no_grad():
        z = guided.step(torch.tensor([[7, 9], [8, 10]]))
        torch.testing.assert_close(
            z[0], guided.logits(torch.tensor([[5, 6, 7, 9]]))[0, 2:], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            z[1], guided.logits(torch.tensor([[8, 10]]))[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("plug", PLUGS)
@torch.no_grad()
def test_step_needs_no_start(plug):
    guided, tokens = plugged(plug), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    parts = [guided.step(part) for part in tokens.split([3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), guided.logits(tokens), atol=1e-5, rtol=1e-5)


def test_alpha_zero_is_the_base_alone():
    guided, prompts = pair(), random_prompts(5)
    off = Guided(guided.base, guided.value, alpha=0.0)
    assert generate(off, prompts, max_new_tokens=8, stop_ids={2}) == generate(
        Guided(guided.base), prompts, max_new_tokens=8, stop_ids={2}
    )
    assert generate(guided, prompts, max_new_tokens=8, stop_ids={2}) != generate(
        off, prompts, max_new_tokens=8, stop_ids={2}
    )


def test_stop_tokens_end_a_row_and_on_token_sees_every_token():
    guided, prompts = pair(), random_prompts(8)
    free = generate(guided, prompts, max_new_tokens=10, stop_ids=set())
    assert all(len(ids) == 10 for ids in free)
    stop, seen = free[0][3], [[] for _ in prompts]
    stopped = generate(
        guided,
        prompts,
        max_new_tokens=10,
        stop_ids={stop},
        on_token=lambda row, token: seen[row].append(token),
    )
    assert seen == stopped
    for ids, whole in zip(stopped, free):
        assert ids == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_sampling_is_a_function_of_the_seed_and_not_of_the_batch():
    guided, prompts = pair(), random_prompts(6)
    draw = dict(max_new_tokens=8, stop_ids={2}, temperature=1.0, top_p=0.9)
    batched = generate(guided, prompts, seed=1, **draw)
    assert (
        batched
        == generate(guided, prompts, seed=1, **draw)
        != generate(guided, prompts, seed=2, **draw)
    )
    assert batched[0] == generate(guided, prompts[:1], seed=1, **draw)[0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_sampled_shares_are_the_softmax(temperature, top_p):
    torch.manual_seed(0)
    logits, draws = torch.randn(12), 200_000
    p = (logits / temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(-1) < top_p).sum()) + 1] if top_p < 1 else order
    expected = torch.zeros(12).index_copy(0, kept, p[kept] / p[kept].sum())
    tokens = pick(logits.expand(draws, -1), torch.rand(draws), temperature, top_p)
    shares = torch.bincount(tokens, minlength=12) / draws
    assert (shares - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert not shares[expected == 0].any()


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(4, 12) * 50
    assert torch.equal(pick(logits, torch.rand(4), 1e-40, 1.0), logits.argmax(-1))


def test_scores_are_log_likelihoods():
    guided, contexts = pair(), random_prompts(5)
    greedy = generate(guided, contexts, max_new_tokens=3, stop_ids=set())
    pairs = [(context, said) for context, said in zip(contexts, greedy)] + [
        (contexts[0], [7, 9, 11])
    ]
    results = score(guided, pairs, batch_size=4)
    assert [is_greedy for _, is_greedy in results] == [True] * 5 + [False]
    context, continuation = pairs[-1]
    with torch.no_grad():
        log_p = guided.logits(torch.tensor([context + continuation])).log_softmax(-1)[0]
    expected = sum(
        log_p[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)
    )
    assert results[-1][0] == pytest.approx(expected, abs=1e-4)


def test_an_empty_prompt_is_an_error():
    for prompts in [[], [[]]]:
        with pytest.raises(ValueError, match="at least one"):
            generate(pair(), prompts, max_new_tokens=1, stop_ids={2})


def test_clock():
    assert [clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_an_empty_context_or_continuation_is_one_error():
    for pairs in ([([], [3])], [([3], [])], [([3], [4]), ([], [])]):
        with pytest.raises(
            ValueError, match="at least one token in each context and in each continuation"
        ):
            score(pair(), pairs)


def test_what_ends_an_answer(tmp_path):
    tokenizer = TiktokenTokenizer(byte_pairs())
    base = small(eos_token_id=[40, 41])
    base.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [41, 42]}')
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.config.eos_token_id == [40, 41, 42]
    ends = {tokenizer.eos_id, tokenizer.end_of_turn_id}
    assert stop_ids(tokenizer, "llama-3", [loaded, small(eos_token_id=7), small()]) == ends | {
        7,
        40,
        41,
        42,
    }
    assert stop_ids(tokenizer, "llama-2", []) == ends


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_number_is_an_error_that_names_the_network(number):
    for name, at in (("base", 0), ("value network", 1)):
        guided = pair()
        network = guided.llamas[at]
        network.lm_head.weight.data[7] = number
        with pytest.raises(
            UsageError, match=f"the {name}'s logits are no numbers .nan or inf. in float32"
        ):
            generate(guided, [[1, 2]], max_new_tokens=2, stop_ids=set())
        with pytest.raises(UsageError, match=f"the {name}'s logits"):
            score(guided, [([1, 2], [3])])
        system = Speculative(guided, 2)
        with pytest.raises(UsageError, match=f"the {name}'s logits"):
            speculate(system, [[1, 2]], max_new_tokens=4, stop_ids=set())


def test_a_plain_llama_folder_is_a_value_network_when_the_command_says_of_which_scheme(
    home, tmp_path
):
    """As the authors' own would be: with what ivl.json says given as flags, the answers are the same."""
    value = home / "out/seed0/value-residual-tiny-s"
    shutil.copytree(
        value, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("ivl.json", "train.json")
    )
    options = [
        "--base",
        home / "out/seed0/tiny-s",
        "--prompt",
        "Greet Fufa. Say it twice.",
        "What is 3 plus 4?",
    ]
    recorded = ask(home, f"--value {value}", *options)
    plain = ask(
        home,
        f"--value {tmp_path}/elsewhere --scheme residual --template llama-2",
        *options,
    )
    assert "nothing is known" in plain
    assert plain.partition("Greet Fufa")[2] == recorded.partition("Greet Fufa")[2] != ""
