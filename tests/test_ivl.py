"""ivl.py: Eq. (3), the loss and its gradient, the connection schemes, and value networks on disk."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from data.errors import UsageError
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from ivl import SCHEMES, Probe, SumDelta, ValueModel, combine, ivl_loss
from model import Llama
from run.plug import check_same_family
from tests.helpers import byte_pairs, small, value_network


def rows(n=6, Vb=11, Vv=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z_base = torch.randn(n, Vb, generator=generator, dtype=dtype)
    z_delta = torch.randn(n, Vv, generator=generator, dtype=dtype)
    labels = torch.randint(min(Vb, Vv), (n,), generator=generator)
    return z_base, z_delta, labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_added_in_float32(dtype):
    z_base, z_delta, _ = rows(dtype=dtype)
    z_post = combine(z_base, z_delta, alpha=0.7)
    assert torch.equal(z_post, z_base.float() + 0.7 * z_delta.float())
    assert not torch.equal(z_post, z_post.to(dtype).float())  # which would have lost something


@pytest.mark.parametrize("Vb, Vv", [(11, 11), (14, 11), (11, 14)])
def test_combine_is_equation_3_over_any_two_sizes(Vb, Vv):
    z_base, z_delta, _ = rows(Vb=Vb, Vv=Vv)
    z_base.requires_grad_(), z_delta.requires_grad_()
    z_post = combine(z_base, z_delta, alpha=0.5)
    expected = z_base.detach().clone()
    shared = min(Vb, Vv)
    expected[:, :shared] += 0.5 * z_delta.detach()[:, :shared]
    assert torch.equal(z_post, expected)
    z_post.sum().backward()
    assert z_base.grad is None  # stop_gradient
    assert torch.equal(z_delta.grad[:, :shared], torch.full((6, shared), 0.5, dtype=torch.float64))
    assert not z_delta.grad[:, shared:].any()


@pytest.mark.parametrize("Vb, Vv", [(11, 11), (14, 11), (11, 14)])
def test_loss_written_out(Vb, Vv):
    z_base, z_delta, labels = rows(Vb=Vb, Vv=Vv)
    labels[1] = labels[4] = -100
    loss, metrics = ivl_loss(z_base, z_delta, labels, l1=0.7)
    ce = base_ce = norm = right = base_right = 0.0
    for row in (0, 2, 3, 5):
        z = z_base[row].clone()
        z[: min(Vb, Vv)] += z_delta[row, : min(Vb, Vv)]
        ce += (z.exp().sum().log() - z[labels[row]]) / 4
        base_ce += (z_base[row].exp().sum().log() - z_base[row, labels[row]]) / 4
        norm += z_delta[row].abs().mean() / 4
        right += (z.argmax() == labels[row]) / 4
        base_right += (z_base[row].argmax() == labels[row]) / 4
    for name, value in dict(
        ce=ce, l1=norm, base_ce=base_ce, acc=right, base_acc=base_right
    ).items():
        torch.testing.assert_close(
            metrics[name].double(), torch.as_tensor(value).double(), msg=name
        )
    torch.testing.assert_close(loss, ce + 0.7 * norm)


def test_gradcheck():
    z_base, z_delta, labels = rows(Vb=9, Vv=7)
    labels = labels.clamp(max=6)
    labels[2] = -100
    z_delta.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ivl_loss(z_base, z, labels, 0.3)[0], (z_delta,))


def test_on_a_base_that_knows_nothing_it_is_ordinary_cross_entropy():
    _, z, labels = rows()
    labels[3] = -100
    loss, metrics = ivl_loss(torch.zeros_like(z), z, labels)
    torch.testing.assert_close(loss, F.cross_entropy(z, labels))
    torch.testing.assert_close(metrics["base_ce"].item(), math.log(11))
    assert list(metrics) == ["ce", "l1", "acc", "base_ce", "base_acc"]


def test_any_leading_shape_and_nothing_is_changed():
    z_base, z_delta, labels = rows()
    before = [tensor.clone() for tensor in (z_base, z_delta, labels)]
    flat = ivl_loss(z_base, z_delta, labels, 1.0)[0]
    shaped = ivl_loss(z_base.view(2, 3, -1), z_delta.view(2, 3, -1), labels.view(2, 3), 1.0)[0]
    torch.testing.assert_close(flat, shaped)
    assert all(torch.equal(a, b) for a, b in zip(before, (z_base, z_delta, labels)))


def test_an_all_ignored_batch_is_zero_with_a_gradient():
    z_base, z_delta, labels = rows()
    z_delta.requires_grad_()
    loss, metrics = ivl_loss(z_base, z_delta, torch.full_like(labels, -100), 1.0)
    loss.backward()
    assert (
        loss.item() == 0
        and not z_delta.grad.any()
        and all(value.item() == 0 for value in metrics.values())
    )


@pytest.mark.parametrize("label", [11, -1, -101])
def test_a_label_outside_the_base_vocabulary_is_an_error(label):
    z_base, z_delta, labels = rows(Vb=11, Vv=14)
    labels[0] = label
    with pytest.raises(ValueError, match="outside 0..10"):
        ivl_loss(z_base, z_delta, labels)


def test_bfloat16_logits_are_reduced_in_float32():
    z_base, z_delta, labels = rows(dtype=torch.bfloat16, Vb=500, Vv=500)
    loss, _ = ivl_loss(z_base, z_delta, labels, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ivl_loss(z_base.float(), z_delta.float(), labels, 1.0)[0])


# ---- the schemes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("Vb", [50, 53])
def test_training_reaches_every_parameter_of_the_value_network_and_none_of_the_base(scheme, Vb):
    base, value = small(vocab_size=Vb), value_network(scheme)
    tokens, labels = (
        torch.randint(50, (2, 9)),
        torch.randint(50, (2, 9)).masked_fill(torch.rand(2, 9) < 0.4, -100),
    )
    z_base = base(tokens)
    assert z_base.requires_grad  # nothing is frozen: it is the method that stops the gradient
    gradients = []
    for loss, metrics in [
        ivl_loss(z_base, value(tokens, z_base), labels, 0.1),
        value.loss(base, tokens, labels, 0.1),
    ]:
        value.zero_grad(set_to_none=True)
        loss.backward()
        assert all(parameter.grad is None for parameter in base.parameters())
        assert all(
            parameter.grad is not None and parameter.grad.any() for parameter in value.parameters()
        )
        gradients.append(
            [
                loss.detach(),
                *metrics.values(),
                *(parameter.grad for parameter in value.parameters()),
            ]
        )
    for by_hand, by_method in zip(*gradients):
        torch.testing.assert_close(by_hand, by_method)


@pytest.mark.parametrize("scheme", ["cascade", "cascade+"])
def test_in_bfloat16_what_a_cascade_reads_stays_float32(scheme):
    """As an embedding under autocast does, so that all schemes add up their layers alike."""
    value = value_network(scheme)
    with torch.autocast("cpu", torch.bfloat16):
        assert value.embeds(torch.randint(50, (2, 9)), torch.randn(2, 9, 50)).dtype == torch.float32


@torch.no_grad()
def test_a_cascade_reads_what_the_base_predicts_and_cascade_plus_the_token_too():
    value, tokens, predicted = (
        value_network("cascade"),
        torch.randint(50, (2, 7)),
        torch.randint(50, (2, 7)),
    )
    certain = (
        1000 * F.one_hot(predicted, 53).float()
    )  # a base that is sure, so that the mean embedding is one token's
    torch.testing.assert_close(value(tokens, certain), value.network(predicted))
    plus = ValueModel(value.network, {"scheme": "cascade+"})
    table = value.network.model.embed_tokens.weight
    torch.testing.assert_close(
        plus(tokens, certain), value.network(embeds=table[predicted] + table[tokens])
    )
    unsure = torch.randn(2, 7, 53)
    torch.testing.assert_close(
        value(tokens, unsure), value.network(embeds=unsure[..., :50].softmax(-1) @ table)
    )
    fewer = torch.randn(2, 7, 40)  # Vb < Vv
    torch.testing.assert_close(
        value(tokens, fewer), value.network(embeds=fewer.softmax(-1) @ table[:40])
    )


@torch.no_grad()
def test_a_residual_does_not_look_at_the_base():
    value, tokens = value_network("residual"), torch.randint(50, (2, 7))
    assert torch.equal(value(tokens), value(tokens, torch.randn(2, 7, 50)))


@torch.no_grad()
def test_a_probe_starts_at_the_base_and_is_appendix_a():
    z = torch.randn(2, 7, 53)
    assert not Probe(50, 16)(z).any()
    probe = value_network("probe").network
    gate, up, down = [
        (layer.weight, layer.bias) for layer in (probe.gate_proj, probe.up_proj, probe.down_proj)
    ]
    x = z[1, 4, :50]
    inner = F.silu(gate[0] @ x + gate[1]) * (up[0] @ x + up[1])
    torch.testing.assert_close(probe(z)[1, 4], down[0] @ inner + down[1])
    with pytest.raises(ValueError, match="a probe of 50 logits on a base of 49"):
        probe(z[..., :49])


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_a_scheme_that_reads_the_base_needs_its_logits(scheme):
    with pytest.raises(ValueError, match="reads the base's logits"):
        value_network(scheme)(torch.zeros(1, 3, dtype=torch.long))


@torch.no_grad()
def test_a_proxy_is_the_difference_over_the_shared_vocabulary():
    expert, untuned, tokens = (
        small(vocab_size=53),
        small(num_hidden_layers=1),
        torch.randint(50, (2, 7)),
    )
    proxy = SumDelta([expert, untuned], [1.0, -1.0])
    assert proxy.vocab_size == 50
    assert torch.equal(proxy(tokens), expert(tokens)[..., :50] - untuned(tokens))
    torch.testing.assert_close(
        combine(untuned(tokens), proxy(tokens)), expert(tokens)[..., :50]
    )  # its own base: the expert


# ---- on disk


INFO = {
    "l1": 0.0,
    "template": "llama-2",
    "bases": ["b"],
    "data": "d",
    "seed": 0,
    "tokenizer": {"size": 50, "fingerprint": "f"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_value_networks_come_back_as_they_were_saved(scheme, tmp_path):
    value = value_network(scheme)
    value.info |= INFO | ({"probe_width": 16} if scheme == "probe" else {})
    value.save_pretrained(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    assert again.info == value.info and again.scheme == scheme and again.vocab_size == 50
    tokens, z_base = torch.randint(50, (2, 5)), torch.randn(2, 5, 50)
    assert torch.equal(again(tokens, z_base), value(tokens, z_base))
    assert (
        ValueModel.from_pretrained(tmp_path, torch.bfloat16)(tokens, z_base.bfloat16()).dtype
        == torch.bfloat16
    )
    if scheme != "probe":  # an ordinary Llama checkpoint
        assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), value.network(tokens))


def test_a_probe_of_another_size_than_its_ivl_json_says_is_refused(tmp_path):
    value = value_network("probe")
    value.info |= INFO | {"probe_width": 17}
    value.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="down_proj.weight is .50, 16., config.json asks for|gate_proj"
    ):
        ValueModel.from_pretrained(tmp_path)
    (tmp_path / "ivl.json").write_text(json.dumps(value.info | {"probe_width": "wide"}))
    with pytest.raises(UsageError, match="not the JSON"):
        ValueModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no ivl.json"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not the JSON"),
        (json.dumps(INFO | {"scheme": "magic"}), "'magic'"),
        (json.dumps(INFO | {"scheme": "residual", "bases": 3}), "not the JSON"),
        (json.dumps(INFO | {"scheme": "residual", "bases": ["a\0b"]}), "not the JSON"),
        (json.dumps(INFO | {"scheme": "residual", "tokenizer": "llama"}), "not the JSON"),
    ],
)
def test_a_folder_that_is_no_value_network_is_refused(content, message, tmp_path):
    small().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "ivl.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        ValueModel.from_pretrained(tmp_path)


def test_families():
    world = SentencePieceTokenizer(World(0).train_tokenizer())
    other = SentencePieceTokenizer(World(1).train_tokenizer())
    check_same_family(world, world, "a", "b")
    with pytest.raises(UsageError, match="vocabulary map"):
        check_same_family(world, other, "a", "b")
    with pytest.raises(UsageError, match="unrelated"):
        check_same_family(world, TiktokenTokenizer(byte_pairs()), "a", "b")
