"""ivl.py: Eq. (3), the loss and its gradient, and value networks on disk."""

import json

import pytest
import torch
import torch.nn.functional as F

from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer
from ivl import ValueModel, check_same_family, combine, ivl_loss, supervised_logits
from model import CheckpointError
from tests.test_model import small
from tests.test_tokenizer import byte_pairs


def rows(n=6, Vb=11, Vv=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z_base = torch.randn(n, Vb, generator=generator, dtype=dtype)
    z_delta = torch.randn(n, Vv, generator=generator, dtype=dtype)
    labels = torch.randint(min(Vb, Vv), (n,), generator=generator)
    return z_base, z_delta, labels


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
        z[:min(Vb, Vv)] += z_delta[row, :min(Vb, Vv)]
        ce += (z.exp().sum().log() - z[labels[row]]) / 4
        base_ce += (z_base[row].exp().sum().log() - z_base[row, labels[row]]) / 4
        norm += z_delta[row].abs().mean() / 4
        right += (z.argmax() == labels[row]) / 4
        base_right += (z_base[row].argmax() == labels[row]) / 4
    for name, value in dict(ce=ce, l1=norm, base_ce=base_ce, acc=right, base_acc=base_right).items():
        torch.testing.assert_close(metrics[name].double(), torch.as_tensor(value).double(), msg=name)
    torch.testing.assert_close(loss, ce + 0.7 * norm)


@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(with_base):
    z_base, z_delta, labels = rows(Vb=9, Vv=7)
    labels = labels.clamp(max=6)
    labels[2] = -100
    z_delta.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ivl_loss(z_base if with_base else None, z, labels, 0.3)[0], (z_delta,))


def test_without_a_base_it_is_ordinary_cross_entropy_and_as_with_a_base_of_zeros():
    _, z, labels = rows()
    loss, metrics = ivl_loss(None, z, labels)
    torch.testing.assert_close(loss, F.cross_entropy(z, labels))
    torch.testing.assert_close(loss, ivl_loss(torch.zeros_like(z), z, labels)[0])
    assert set(metrics) == {"ce", "l1", "acc"}


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
    assert loss.item() == 0 and not z_delta.grad.any() and all(value.item() == 0 for value in metrics.values())


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


def test_value_training_reaches_no_parameter_of_the_base():
    base, value = small(), small(num_hidden_layers=1)
    tokens, supervised = torch.randint(50, (2, 9)), torch.rand(2, 9) > 0.4
    z_base, z_delta = supervised_logits(base, tokens, supervised), supervised_logits(value, tokens, supervised)
    loss, _ = ivl_loss(z_base, z_delta, torch.randint(50, (int(supervised.sum()),)), 0.1)
    loss.backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in value.parameters())
    torch.testing.assert_close(z_base, base(tokens)[supervised])


# ---- on disk


INFO = {"l1": 0.0, "template": "llama-2", "bases": ["b"], "data": "d", "seed": 0,
        "tokenizer": {"size": 50, "fingerprint": "f"}}


def test_a_value_network_is_a_llama_checkpoint_with_an_ivl_json(tmp_path):
    value = ValueModel(small(), INFO)
    value.save_pretrained(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    assert again.info == {"scheme": "residual"} | INFO
    tokens = torch.randint(50, (2, 5))
    assert torch.equal(again(tokens), value(tokens))
    from model import Llama
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), value(tokens))


@pytest.mark.parametrize("content, message", [(None, "no ivl.json"), ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "not the JSON"),
                                              (json.dumps(INFO | {"scheme": "magic"}), "'magic'"), (json.dumps(INFO | {"scheme": "residual", "bases": 3}), "not the JSON"),
                                              (json.dumps(INFO | {"scheme": "residual", "bases": ["a\0b"]}), "not the JSON"),
                                              (json.dumps(INFO | {"scheme": "residual", "tokenizer": "llama"}), "not the JSON")])
def test_a_folder_that_is_no_value_network_is_refused(content, message, tmp_path):
    small().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "ivl.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        ValueModel.from_pretrained(tmp_path)


def test_families():
    world = SentencePieceTokenizer(World(0).train_tokenizer())
    other = SentencePieceTokenizer(World(1).train_tokenizer())
    check_same_family(world, world, "a", "b")
    with pytest.raises(CheckpointError, match="vocab_map.py"):
        check_same_family(world, other, "a", "b")
    with pytest.raises(CheckpointError, match="unrelated"):
        check_same_family(world, TiktokenTokenizer(byte_pairs()), "a", "b")
