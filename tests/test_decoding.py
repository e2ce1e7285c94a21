"""sample.py: captured steps, speculation and attribution."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beyond.attribution import attribute, attribute_last
from beyond.speculation import Speculative, gap_at_difference, speculate
from data.errors import UsageError
from fast import graphs
from fast.graphs import CapturedGuided, CompiledGuided
from ivl import ValueModel, combine
from model import Block, KVCache, Llama
from run import twins
from sample import Guided, draw, generate, probabilities
from tests.helpers import (
    VALUE,
    ask,
    assert_same_or_tied,
    pair,
    plugged,
    random_prompts,
    refused,
    small,
    value_network,
)

# ---- what is read is what runs


@torch.inference_mode()
def test_a_layer_that_you_changed_is_called():
    """A student's LoRA, say: whatever stands in a layer's place is not passed over."""
    model, tokens = small(), torch.tensor([[5]])
    before = model(tokens, KVCache(model, 1, 4))

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, inputs, out: 2 * out)
    assert (model(tokens, KVCache(model, 1, 4)) - before).abs().max() > 0.01
    hook.remove()
    projection = model.model.layers[1].self_attn.v_proj
    projection.__class__ = Twice
    changed = model(tokens, KVCache(model, 1, 4))
    torch.testing.assert_close(changed, model(tokens))
    assert (changed - before).abs().max() > 0.01


# ---- captured steps: on a CPU the operations are recorded and replayed on the same memory, as a CUDA graph does it


class Recorder(TorchDispatchMode):
    """Records every operation with its tensors; like a capturing GPU it leaves undone what would change a tensor.

    Asking a tensor for its value fails, as it does while a GPU captures.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, (
            "a captured step asked the device for a value"
        )
        changes = any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in function._schema.arguments
        )
        result = arguments[0] if changes else function(*arguments, **keywords)
        self.operations.append((function, arguments, keywords, None if changes else result))
        return result

    def replay(self):
        for function, arguments, keywords, result in self.operations:
            fresh = function(*arguments, **keywords)
            if result is None:
                continue
            for old, new in zip(tensors_of(result), tensors_of(fresh)):
                if (
                    old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):  # not a view of what is there
                    old.copy_(new)


def tensors_of(result) -> list[torch.Tensor]:
    """What an operation returned, without the numbers that some return, too."""
    several = result if isinstance(result, (tuple, list)) else [result]
    return [each for each in several if isinstance(each, torch.Tensor)]


def record(step):
    with Recorder() as recorder:
        result = step()
    return recorder.replay, result


@pytest.fixture
def captured(monkeypatch):
    """Makes guided systems that capture their steps, with the recorder in place of a CUDA graph."""
    monkeypatch.setattr(graphs, "capture", record)
    monkeypatch.setattr(
        graphs, "window_for", lambda length: max(8, 1 << (length - 1).bit_length())
    )  # several of them, soon

    return CapturedGuided


FAMILIES = {  # as a base; its window is longer than any text here
    "mistral": dict(model_type="mistral", sliding_window=2048),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=12, attention_bias=True),
}


@pytest.mark.parametrize("plug", ["none", "residual", "cascade+", "probe", "proxy", *FAMILIES])
def test_captured_is_eager(plug, captured):
    if plug == "none":
        eager = Guided(small(vocab_size=53))
    elif plug in FAMILIES:
        eager = plugged("residual", vocab_size=53, **FAMILIES[plug])
    else:
        eager = plugged(plug, vocab_size=53)
    guided = captured(eager.base, eager.value)
    for prompts in (
        random_prompts(4),
        random_prompts(8),
        random_prompts(9)[8:],
    ):  # ragged, and one alone
        expected = generate(eager, prompts, max_new_tokens=24, stop_ids=set())
        assert_same_or_tied(
            eager, prompts, generate(guided, prompts, max_new_tokens=24, stop_ids=set()), expected
        )
        assert {key[2] for key, graph in guided.graphs.items() if graph} > {32}  # several windows


def test_a_graph_serves_the_next_text_and_goes_with_its_memory(captured, monkeypatch):
    recorded = []
    monkeypatch.setattr(graphs, "capture", lambda step: recorded.append(1) or record(step))
    eager, prompts = pair(), random_prompts(6)
    guided = captured(eager.base, eager.value)
    options = dict(max_new_tokens=20, stop_ids={2})
    for prompt in sorted(prompts, key=len, reverse=True):  # one after the other, in the same memory
        assert generate(guided, [prompt], **options) == generate(eager, [prompt], **options)
    assert 1 <= len(recorded) == len(list(filter(None, guided.graphs.values()))) <= 4
    assert generate(guided, prompts, **options) == generate(
        eager, prompts, **options
    )  # rows end, and the batch shrinks
    assert generate(guided, prompts[:1], **options) == generate(eager, prompts[:1], **options)


def test_a_captured_step_leaves_what_it_was_made_of(captured):
    eager = pair()
    guided = captured(eager.base, eager.value)
    guided.start([[5, 6, 7]], 6)
    with torch.inference_mode():
        for token in (8, 9, 10, 11):
            z_post = guided.step(torch.tensor([[token]]))
            assert torch.equal(z_post, combine(guided.z_base, guided.z_delta))
            assert [cache.used for cache in guided.caches] == guided.caches[0].lengths.tolist() * 2
        assert any(guided.graphs.values())
        guided.step(torch.tensor([[12]]))
        with pytest.raises(
            ValueError, match="of 8 positions is full"
        ):  # not written beyond its memory
            for token in range(4):
                guided.step(torch.tensor([[token]]))


@pytest.mark.parametrize("plug", ["residual", "cascade+", "probe", "proxy"])
@torch.inference_mode()
def test_plain_and_captured_steps_in_bfloat16_add_in_float32(plug, captured):
    plain = plugged(plug)
    base, value = plain.base.bfloat16(), plain.value.bfloat16()
    said = []
    for guided in (Guided(base, value, 0.7), captured(base, value, 0.7)):
        guided.start([[5, 6, 7]], 6)
        for token in (8, 9, 10):
            said.append(guided.step(torch.tensor([[token]])).clone())
            assert guided.z_base.dtype is torch.bfloat16
            assert torch.equal(said[-1], guided.z_base.float() + 0.7 * guided.z_delta.float())
    assert any(guided.graphs.values())
    assert torch.equal(torch.cat(said[:3]), torch.cat(said[3:]))


def test_on_a_gpu_checkpoints_are_captured_and_compiled_if_asked_for(monkeypatch):
    args = SimpleNamespace(plain=False, fast=False, compile=False)
    assert twins.choose_guided(args, tiny=False, device="cuda") is CapturedGuided
    args.compile = True
    monkeypatch.setattr(twins, "triton", "is there")
    assert twins.choose_guided(args, tiny=True, device="cuda") is CompiledGuided
    monkeypatch.setattr(twins, "triton", None)
    with pytest.raises(UsageError, match="takes Triton"):
        twins.choose_guided(args, tiny=False, device="cuda")


def test_a_capture_that_is_stopped_leaves_nothing_behind(captured, monkeypatch):
    """Ctrl-C during a minute of compiling, say."""
    eager, prompt = pair(), random_prompts(8)[3]
    guided, options = captured(eager.base, eager.value), dict(max_new_tokens=20, stop_ids=set())

    def stopped(step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "capture", stopped)
        with pytest.raises(KeyboardInterrupt):
            generate(guided, [prompt], **options)
    assert all(cache.window is None for cache in guided.caches)
    assert generate(guided, [prompt], **options) == generate(eager, [prompt], **options)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager(backend, captured, monkeypatch):
    """A step of one token with compiled layers, not recorded: of a compiled kernel the recorder sees no operations.

    Without Inductor it is what torch.compile records of a layer, and how often it does.
    """
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    if backend == "eager":
        compiled = torch.compile(Block.forward, dynamic=True, backend=counting)
        monkeypatch.setattr(graphs, "compiled_block", lambda: compiled)
    eager = pair(vocab_size=53)
    guided = CompiledGuided(eager.base, eager.value)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        for cache in guided.caches:
            cache.window = graphs.window_for(cache.used + 1)
        z_post = guided.logits_to_capture(tokens)
        for cache in guided.caches:
            cache.window = None
        return z_post

    guided.step = torch.inference_mode()(step)
    for prompts in random_prompts(4)[:1], random_prompts(8):
        expected = generate(eager, prompts, max_new_tokens=24, stop_ids=set())
        assert_same_or_tied(
            eager, prompts, generate(guided, prompts, max_new_tokens=24, stop_ids=set()), expected
        )
    assert all(
        "forward" not in vars(layer) for llama in guided.llamas for layer in llama.model.layers
    )
    assert (
        backend == "inductor" or len(made) == 2
    )  # of one row, and of several: for all layers of both networks, and all windows


# ---- speculation


def deeper(base: Llama, seed: int = 1, scale: float = 0.02) -> Llama:
    """A base that is close to another one, but not the same."""
    other = small()
    other.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def like_the_base(alpha: float = 1.0) -> Guided:
    """A base and a value network that is close to it, as at the beginning of training."""
    return Guided(small(), ValueModel(deeper(small(), scale=0.05)), alpha)


def drafting_by(draft: str, guided: Guided) -> Llama | None:
    return {"z_delta": None, "a small base": deeper(guided.base)}[draft]


def one_by_one(system: Speculative, prompts, **options) -> list[list[int]]:
    return [speculate(system, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("draft", ["z_delta", "a small base"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "ahead, count", [(4, 40)] + [pytest.param(K, 200, marks=pytest.mark.slow) for K in (1, 4, 7)]
)
def test_greedy_speculation_is_plain_greedy(ahead, count, alpha, draft):
    """One text after the other, and all at once, where rows accept different numbers."""
    guided, prompts = like_the_base(alpha), random_prompts(count)
    options = dict(max_new_tokens=20, stop_ids={2})
    plain = generate(guided, prompts, **options)
    for say in (one_by_one, speculate):
        system = Speculative(guided, ahead, drafting_by(draft, guided))
        seen = [[] for _ in prompts]
        if say is speculate:
            options["on_token"] = lambda row, token: seen[row].append(token)
        said = say(system, prompts, **options)
        assert_same_or_tied(guided, prompts, plain, said)
        assert say is one_by_one or seen == said
        assert 0.3 < system.accepted / system.tried < 0.98  # both verdicts came often
        assert system.rounds < sum(map(len, said)) / 1.3
    assert len(set(map(len, plain))) > 1  # some stop early


def test_a_speculated_round_whose_drafts_all_stand_brings_one_more_token():
    guided, prompts = like_the_base(), random_prompts(8)
    for draft, most in ((guided.base, 4), (deeper(guided.base, scale=3.0), 1)):
        system = Speculative(guided, 3, draft)
        one_by_one(system, prompts, max_new_tokens=16, stop_ids=set())
        share = system.accepted / system.tried
        assert share == 1 if most == 4 else share < 0.3
        assert (system.rounds == 8 * 16 / 4) == (most == 4)


@pytest.mark.parametrize("guide", ["proxy", "nothing", "wider base", "wider value network"])
@pytest.mark.parametrize("draft", ["z_delta", "a small base"])
def test_greedy_speculation_of_other_systems(guide, draft):
    prompts, options = random_prompts(20), dict(max_new_tokens=12, stop_ids={2})
    guided = {
        "proxy": lambda: plugged("proxy"),
        "nothing": lambda: Guided(small()),
        "wider base": lambda: Guided(small(vocab_size=53), pair().value),
        "wider value network": lambda: pair(vocab_size=53),
    }[guide]()
    if guide == "nothing" and draft == "z_delta":
        with pytest.raises(ValueError, match="it takes another base to draft"):
            Speculative(guided, 3)
        return
    system = Speculative(guided, 3, None if draft == "z_delta" else deeper(small()))
    expected = generate(guided, prompts, **options)
    assert_same_or_tied(guided, prompts, speculate(system, prompts, **options), expected)
    assert_same_or_tied(guided, prompts, one_by_one(system, prompts, **options), expected)
    assert 0 < system.accepted < system.tried


def test_speculation_ends_where_it_is_told_to():
    guided, prompts = like_the_base(), random_prompts(6)
    system, said = Speculative(guided, 4), []
    options = dict(max_new_tokens=12, stop_ids=set())
    expected = [answer[:5] for answer in generate(guided, prompts, **options)]

    def enough(row: int, token: int) -> bool:
        said.append(row)
        return said.count(row) == 5

    assert speculate(system, prompts, **options, on_token=enough) == expected
    assert speculate(system, prompts, max_new_tokens=5, stop_ids=set()) == expected


@pytest.mark.parametrize("draft", ["z_delta", "a small base"])
def test_captured_speculation_is_speculation(captured, draft):
    plain, prompts = like_the_base(), random_prompts(12)
    options = dict(max_new_tokens=16, stop_ids={2})
    expected = generate(plain, prompts, **options)
    fast = captured(plain.base, plain.value)
    system = Speculative(fast, 3, drafting_by(draft, plain))
    for say in (one_by_one, speculate):
        assert_same_or_tied(plain, prompts, say(system, prompts, **options), expected)
        if say is one_by_one:
            of_length = [
                {key[1] for key, graph in each.graphs.items() if graph}
                for each in (system.verifying, system.drafting)
            ]
            assert of_length[0] >= {4} and of_length[1] == {1}


def test_where_two_greedy_answers_part():
    guided = pair()
    said = generate(guided, [[5, 6]], max_new_tokens=4, stop_ids=set())[0]
    best = guided.logits(torch.tensor([[5, 6] + said[:2]]))[0, -1].topk(2).values
    assert gap_at_difference(guided, [5, 6], said, said[:2] + [0]) == pytest.approx(
        (best[0] - best[1]).item()
    )
    assert gap_at_difference(guided, [5, 6], said, said[:2]) == pytest.approx(
        (best[0] - best[1]).item()
    )


def critical(freedom: int) -> float:
    """What a chi-square statistic exceeds once in a thousand (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom of draws against a distribution; what is too rare is taken together."""
    expected = p.double() * counts.sum()
    assert counts[p == 0].sum() == 0
    often = expected >= 10
    counts = torch.cat((counts[often].double(), counts[~often].sum()[None].double()))
    expected = torch.cat((expected[often], expected[~often].sum()[None].clamp(min=1e-9)))
    if expected[-1] < 1:
        counts, expected = counts[:-1], expected[:-1]
    return ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1


DRAWS = 100_000
PROMPTS = [[5], [2, 0, 5]]  # of different lengths


@functools.cache
def sampling(temperature: float, top_p: float) -> tuple[Guided, Llama, list[torch.Tensor]]:
    """A system over 6 tokens, a draft, and how likely plain sampling makes each two tokens behind each prompt: (36,)."""
    shape = dict(
        vocab_size=6,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base, value = small(**shape), ValueModel(small(**shape | {"hidden_size": 8}))
    base.lm_head.weight.data *= 2
    draft = small(**shape)
    draft.lm_head.weight.data = base.lm_head.weight.data + 0.3 * torch.randn(
        6, 16, generator=torch.Generator().manual_seed(2)
    )
    guided, likely = Guided(base, value), []
    with torch.inference_mode():
        for prompt in PROMPTS:
            z = guided.logits(torch.tensor([[*prompt, token] for token in range(6)]))[:, -2:]
            p = probabilities(z, temperature, top_p)  # (6, 2, 6)
            likely.append((p[0, 0][:, None] * p[:, 1]).flatten())
    return guided, draft, likely


def test_the_chi_square_test_catches_a_two_percent_error():
    """As many fair draws pass; those of which 2% go wrong, to any one pair at all, do not."""
    p = sampling(0.8, 0.95)[2][0]
    generator = torch.Generator().manual_seed(0)
    for wrong in [None, *p.nonzero()[:, 0].tolist()]:
        source = (
            p
            if wrong is None
            else 0.98 * p + 0.02 * torch.nn.functional.one_hot(torch.tensor(wrong), 36)
        )
        counts = torch.bincount(
            torch.multinomial(source, DRAWS, replacement=True, generator=generator), minlength=36
        )
        statistic, freedom = chi_square(counts, p)
        assert (statistic > critical(freedom)) == (wrong is not None), wrong


@pytest.mark.parametrize("draft", ["z_delta", "a small base"])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize(
    "temperature, top_p, draws, say",
    [
        (0.8, 0.95, 10_000, speculate),
        (0.8, 0.95, 200, one_by_one),
        pytest.param(0.8, 0.95, DRAWS, speculate, marks=pytest.mark.slow),
        pytest.param(1.0, 1.0, DRAWS, speculate, marks=pytest.mark.slow),
        pytest.param(1.0, 1.0, 10_000, one_by_one, marks=pytest.mark.slow),
    ],
)
def test_sampled_speculation_has_the_distribution_of_plain_sampling(
    temperature, top_p, draws, say, ahead, draft
):
    """Of two tokens, enumerated: one text after the other, and texts of different lengths at a time."""
    guided, small_base, likely = sampling(temperature, top_p)
    system = Speculative(guided, ahead, None if draft == "z_delta" else small_base)
    options = dict(max_new_tokens=2, temperature=temperature, top_p=top_p, stop_ids=set())
    prompts = PROMPTS * draws
    if say is speculate:
        said = speculate(system, prompts, **options)
    else:
        said = [
            speculate(system, [prompt], **options, seed=seed)[0]
            for seed, prompt in enumerate(prompts)
        ]
    assert 0.1 < system.accepted / system.tried < 0.9
    for number, p in enumerate(likely):
        pairs = torch.tensor(said[number :: len(PROMPTS)])
        counts = torch.bincount(6 * pairs[:, 0] + pairs[:, 1], minlength=36)
        statistic, freedom = chi_square(counts, p)
        print(
            f"chi-square {statistic:.1f} with {freedom} degrees of freedom; {critical(freedom):.1f} would fail"
        )
        assert statistic < critical(freedom) and freedom >= 5


def test_a_sampled_speculated_answer_does_not_depend_on_what_is_beside_it():
    system, prompts = Speculative(like_the_base(), 4), random_prompts(12)
    options = dict(max_new_tokens=16, stop_ids={2}, temperature=1.0, seed=3)
    together = speculate(system, prompts, **options)
    assert len(set(map(len, together))) > 1
    for count in (1, 5):
        assert speculate(system, prompts[:count], **options) == together[:count]


def test_a_drawn_token_has_a_share_whatever_the_noise():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for noise, token in [(0.0, 1), (0.29, 1), (0.31, 3), (1 - 2**-24, 3), (1.0, 3)]:
        assert draw(p, torch.tensor([noise])).item() == token


def test_what_cannot_be_speculated_is_refused_with_the_reason(home):
    base = small()
    for scheme in ("cascade", "cascade+", "probe"):
        with pytest.raises(
            ValueError,
            match=f"a {scheme.replace('+', '.')} reads the base's logits, so it can say nothing",
        ):
            Speculative(Guided(base, value_network(scheme)), 2)
    with pytest.raises(ValueError, match="the drafting base reads 40 tokens, and the other one 50"):
        Speculative(pair(), 2, small(vocab_size=40))
    value = ["--value", VALUE]
    assert "from 1 to 32" in refused(home, "sample.py", *value, "--speculate", "0")
    assert "from 1 to 32" in refused(home, "sample.py", *value, "--speculate", "33")
    assert "--draft goes with --speculate" in refused(
        home, "sample.py", *value, "--draft", "tiny-s"
    )
    assert "--explain goes with" in refused(
        home, "sample.py", *value, "--explain", "--speculate", "2"
    )
    assert "not there yet" in refused(
        home, "sample.py", *value, "--speculate", "2", "--draft", "tiny-m"
    )
    assert "which is no base" in refused(
        home, "sample.py", *value, "--speculate", "2", "--draft", VALUE
    )


def test_sample_speculates_and_says_whether_it_paid(home):
    asked = ["--prompt", "Greet Mira.", "What is 3 plus 4?"]
    for draft, name in ([], "z_delta alone"), (["--draft", "tiny-s"], "tiny-s with z_delta"):
        shown = ask(home, "--speculate", "3", *draft, *asked)
        assert shown.count("\n    ") >= 5 and "the same tokens as without" in shown
        assert f"3 tokens at a time drafted by {name}: 2 answers" in shown
        *_, accepted, paid = shown.splitlines()
        measured = float(paid.split("measured: ")[1].split(":")[0])
        assert measured > 0.05 and ("does not pay" in paid) == (measured <= 1)
        stood, of, *_ = map(int, re.findall(r"\d+", accepted))
        assert 0 < stood <= of and (stood == of) == bool(draft)  # there the base drafts for itself
    talked = ask(home, "--speculate", "2", "--chat", input="Greet Mira.\n")
    assert talked.count("you> ") == 2


# ---- attribution


def test_attribution_by_hand():
    z_base, z_delta = torch.tensor([2.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 6.0, -2.0])
    each = attribute(z_base, z_delta, token=1, alpha=0.5, count=2)
    p_base = z_base.softmax(-1)
    p_post = torch.tensor([2.0, 3.0, -2.0, 0.0]).softmax(-1)
    assert (each.token, each.decided, each.base_token, each.pushed) == (1, "value", 0, 1)
    assert (each.p_base, each.p_post, each.z_delta) == pytest.approx(
        (p_base[1].item(), p_post[1].item(), 3.0)
    )
    assert each.size == pytest.approx((3.0 + 1.0) / 4)
    assert each.kl == pytest.approx((p_post * (p_post / p_base).log()).sum().item(), rel=1e-5)
    assert [id for id, *_ in each.raised] == [1] and [id for id, *_ in each.lowered] == [0, 3]
    assert each.raised[0][1:] == pytest.approx((each.p_base, each.p_post, 3.0))
    assert attribute(z_base, z_delta, token=0, alpha=0.1).decided == "base"
    assert attribute(z_base, z_delta, token=3).decided == "chance"


@pytest.mark.parametrize("plug", ["residual", "cascade+", "probe", "proxy"])
def test_attribution_is_of_the_step_that_was_taken(plug):
    """Whatever guides: the shares are those of logits computed without caches, and greedy tokens are the likeliest."""
    guided, records = plugged(plug, vocab_size=53), []
    said = generate(
        guided,
        [[5, 9, 11]],
        max_new_tokens=6,
        stop_ids=set(),
        on_token=lambda _, token: records.append(attribute_last(guided, token)),
    )[0]
    assert [each.token for each in records] == said and {each.decided for each in records} <= {
        "base",
        "value",
    }
    with torch.inference_mode():
        for position, each in enumerate(records):
            tokens = torch.tensor([[5, 9, 11] + said[:position]])
            p_post = guided.logits(tokens)[0, -1].softmax(-1)
            z_base = guided.base(tokens)[0, -1, : guided.readable]
            assert each.p_post == pytest.approx(p_post.max().item(), abs=1e-4)
            assert each.p_base == pytest.approx(z_base.softmax(-1)[each.token].item(), abs=1e-4)
            assert (each.decided == "base") == (z_base.argmax() == each.token)


def test_sample_explains(home):
    shown = ask(home, "--explain --prompt", "Greet Mira.")
    head, *rows, count = [line for line in shown.splitlines() if line.startswith("    ")]
    assert (
        head.split()
        == "said base alone decided p base p both z_delta |z_delta| more probable less probable".split()
    )
    agreed, overruled = (
        sum(" base " in row for row in rows),
        sum(row.startswith("    * ") for row in rows),
    )
    assert (
        count.strip()
        == f"of {len(rows)} tokens the base agreed with {agreed}, the value network overruled it at {overruled}"
    )
    assert ask(home, "--explain").count("tokens the base agreed with") == 3
    assert "chance chose" in ask(home, "--explain --temperature 3 --prompt", "Greet Mira.")
