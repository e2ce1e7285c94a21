"""The two losses of ivl.py beside cross-entropy (Section 3.1): pairs of answers, and a teacher; and the norm over all positions."""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fast.loss
from ivl import SCHEMES, ValueModel, combine, distillation_loss, ivl_loss, pairwise_loss
from tests.helpers import small, value_network
from train import Objective, accumulate_gradient, count_answer_pairs, count_supervised

SIZES = [(11, 11), (14, 11), (11, 14)]


def pairs(Vb=11, Vv=11, dtype=torch.float64):
    """Three pairs, T = 5: answers of different lengths at different places."""
    generator = torch.Generator().manual_seed(0)
    z_base = torch.randn(6, 5, Vb, generator=generator, dtype=dtype)
    z_delta = torch.randn(6, 5, Vv, generator=generator, dtype=dtype)
    labels = torch.randint(min(Vb, Vv), (6, 5), generator=generator)
    for row, (start, stop) in enumerate([(2, 4), (2, 5), (0, 5), (0, 1), (4, 5), (4, 5)]):
        labels[row, :start] = labels[row, stop:] = -100
    return z_base, z_delta, labels


# ---- pairs


@pytest.mark.parametrize("Vb, Vv", SIZES)
def test_pairwise_loss_written_out(Vb, Vv):
    """Token by token, as beta times the sum of z_delta(y) - log of the mean of exp z_delta under the base."""
    z_base, z_delta, labels = pairs(Vb, Vv)
    loss, metrics = pairwise_loss(z_base, z_delta, labels, beta=0.3)
    rewards = []
    for row in range(6):
        reward = 0.0
        for t in range(5):
            if labels[row, t] != -100:
                delta = torch.zeros(Vb, dtype=torch.float64)
                delta[: min(Vb, Vv)] = z_delta[row, t, : min(Vb, Vv)]
                p_base = z_base[row, t].exp() / z_base[row, t].exp().sum()
                reward += 0.3 * (delta[labels[row, t]] - (p_base * delta.exp()).sum().log()).item()
        rewards.append(reward)
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3], rewards[4] - rewards[5]]
    assert loss.item() == pytest.approx(
        sum(math.log(1 + math.exp(-margin)) for margin in margins) / 3
    )
    assert metrics["margin"].item() == pytest.approx(sum(margins) / 3)
    assert metrics["acc"].item() == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert 0 < metrics["acc"] < 1 and list(metrics) == ["acc", "margin"]


def test_what_is_learnt_is_a_reward_up_to_a_constant_of_each_state():
    z_base, z_delta, labels = pairs()
    constant = torch.randn(6, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(
        pairwise_loss(z_base, z_delta + constant, labels)[0],
        pairwise_loss(z_base, z_delta, labels)[0],
    )
    loss, metrics = pairwise_loss(z_base, 0 * z_delta + constant, labels)  # no preference
    assert loss.item() == pytest.approx(math.log(2)) and metrics["margin"].item() == pytest.approx(
        0, abs=1e-12
    )


def test_a_step_along_the_gradient_raises_the_chosen_answer_over_the_rejected():
    z_base, z_delta, labels = pairs()
    z_base.requires_grad_(), z_delta.requires_grad_()
    loss, before = pairwise_loss(z_base, z_delta, labels)
    loss.backward()
    _, after = pairwise_loss(z_base, z_delta - 5 * z_delta.grad, labels)
    assert after["margin"] > before["margin"] and not loss.detach().isnan()
    assert z_base.grad is None and not z_delta.grad[labels == -100].any()


def test_pairwise_loss_is_that_of_trl():
    trl = pytest.importorskip("trl")
    compute = getattr(trl.DPOTrainer, "_compute_loss", None)
    if compute is None:
        pytest.skip("this TRL computes its loss elsewhere")
    z_base, z_delta, labels = pairs()
    interleaved = [0, 2, 4, 1, 3, 5]  # TRL's rows are all chosen ones, then all rejected ones
    supervised, wanted = labels[interleaved] != -100, labels[interleaved].clamp(min=0)

    def log_probabilities(z):
        return (
            torch.log_softmax(z[interleaved], -1).gather(-1, wanted[..., None])[..., 0] * supervised
        )  # (2P, T)

    reference = log_probabilities(z_base).sum(1)
    nothing = torch.zeros(6, 5)
    outputs = SimpleNamespace(
        log_probs=log_probabilities(z_base + z_delta),
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing > 0,
    )
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=same,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    ids = F.pad(wanted, (1, 0))
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        completion_mask=F.pad(supervised, (1, 0)).long(),
        ref_chosen_logps=reference[:3],
        ref_rejected_logps=reference[3:],
    )
    theirs = compute(trainer, lambda **_: outputs, inputs, False)
    loss, metrics = pairwise_loss(z_base, z_delta, labels, 0.1)
    torch.testing.assert_close(loss, theirs)
    assert metrics["margin"].item() == pytest.approx(
        trainer._metrics["train"]["rewards/margins"][0]
    )
    assert metrics["acc"].item() == pytest.approx(
        trainer._metrics["train"]["rewards/accuracies"][0]
    )


# ---- a teacher


@pytest.mark.parametrize("Vt", [9, 11, 16])
@pytest.mark.parametrize("Vb, Vv", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_that_of_torch(Vb, Vv, Vt, temperature):
    z_base, z_delta, labels = pairs(Vb, Vv)
    z_teacher = torch.randn(
        6, 5, Vt, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    loss, metrics = distillation_loss(z_base, z_delta, z_teacher, labels, temperature)
    rows, both = labels != -100, min(Vb, Vt)
    torch.testing.assert_close(
        metrics["ce"], F.cross_entropy(combine(z_base, z_delta)[rows], labels[rows])
    )
    teacher = torch.log_softmax(z_teacher[rows][:, :both] / temperature, -1)
    for z, name in ((combine(z_base, z_delta), ""), (z_base, "base_")):
        ours = torch.log_softmax(z[rows][:, :both] / temperature, -1)
        kl = F.kl_div(ours, teacher, reduction="batchmean", log_target=True)
        torch.testing.assert_close(metrics[f"{name}kl"], kl)
        if not name:
            torch.testing.assert_close(loss, temperature**2 * kl)


def test_distillation_written_out():
    """Two tokens: p_teacher is (3/4, 1/4), p_post (1/2, 1/2)."""
    z_teacher = torch.tensor([[math.log(3.0), 0.0]])
    loss, metrics = distillation_loss(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), z_teacher, torch.tensor([0])
    )
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    zero, _ = distillation_loss(torch.zeros(1, 2), z_teacher, z_teacher, torch.tensor([0]), 3.0)
    assert zero.item() == pytest.approx(0, abs=1e-6)


# ---- both


def of_pairs(z_base, z_delta, labels):
    return pairwise_loss(z_base, z_delta, labels, 0.7)


def of_a_teacher(z_base, z_delta, labels):
    z_teacher = torch.randn(
        *labels.shape, 12, generator=torch.Generator().manual_seed(1), dtype=z_base.dtype
    )
    return distillation_loss(z_base, z_delta, z_teacher, labels, 1.5)


def over_all(z_base, z_delta, labels):
    return ivl_loss(z_base, z_delta, labels, 0.3, over="all")


LOSSES = [of_pairs, of_a_teacher, over_all]


@pytest.mark.parametrize("Vb, Vv", SIZES)
@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradcheck(loss_of, Vb, Vv):
    z_base, z_delta, labels = pairs(Vb, Vv)
    z_delta = z_delta.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(z_base, z, labels)[0], (z_delta,))


@pytest.mark.parametrize("loss_of", LOSSES[:2])
def test_without_labels_it_is_zero_with_a_gradient(loss_of):
    z_base, z_delta, labels = pairs()
    z_delta.requires_grad_()
    loss, metrics = loss_of(z_base, z_delta, torch.full_like(labels, -100))
    loss.backward()
    assert (
        loss.item() == 0
        and not z_delta.grad.any()
        and all(value.item() == 0 for value in metrics.values())
    )


def test_a_pair_without_labels_counts_nothing():
    z_base, z_delta, labels = pairs()
    labels[2:4] = -100
    kept = [0, 1, 4, 5]
    loss, metrics = of_pairs(z_base, z_delta, labels)
    without, expected = of_pairs(z_base[kept], z_delta[kept], labels[kept])
    torch.testing.assert_close(loss, without)
    assert metrics == expected and count_answer_pairs(labels) == 2


@pytest.mark.parametrize("loss_of", LOSSES)
def test_bfloat16_is_reduced_in_float32(loss_of):
    z_base, z_delta, labels = pairs(dtype=torch.bfloat16)
    loss, _ = loss_of(z_base, z_delta, labels)
    assert loss.dtype == torch.float32


def networks(scheme: str, double: bool = False):
    base, teacher, value = (
        small(vocab_size=53),
        small(vocab_size=51, num_hidden_layers=1, hidden_size=16),
        value_network(scheme),
    )
    return [network.double() if double else network for network in (base, teacher, value)]


def batch():
    """Six rows of 12, with answers of 10, 6, 12, 1, 3 and 9 tokens."""
    tokens, labels = [
        torch.randint(50, (6, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ]
    for row, start in enumerate([2, 6, 0, 11, 9, 3]):
        labels[row, :start] = -100
    return tokens, labels


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_the_fast_distillation_is_the_plain_one(scheme, ignored, monkeypatch):
    monkeypatch.setattr(fast.loss, "CHUNK_ON_CPU", 0)  # chunks of 64 rows, the fewest
    base, teacher, value = networks(scheme, double=True)
    tokens, labels = [
        torch.randint(50, (5, 50), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ]
    labels[:, :15] = -100
    labels = labels if ignored == "some" else torch.full_like(labels, -100)
    results = []
    for loss_of in (ValueModel.teacher_loss, fast.loss.teacher_loss):
        value.zero_grad(set_to_none=True)
        loss, metrics = loss_of(value, base, tokens, labels, teacher, 1.5)
        loss.backward()
        results.append(
            {"loss": loss.detach()}
            | metrics
            | {name: weight.grad for name, weight in value.named_parameters()}
        )
    assert list(results[0]) == list(results[1])
    for name, number in results[0].items():
        torch.testing.assert_close(results[1][name].double(), number.double(), msg=name)
        assert bool(number.any()) == (ignored == "some"), name
    assert all(weight.grad is None for frozen in (base, teacher) for weight in frozen.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["pairwise", "kl"])
def test_gradient_accumulation_in_three_parts_is_one_part(kind, scheme):
    base, teacher, value = networks(scheme)
    loss = (
        partial(ValueModel.pair_loss, beta=0.5)
        if kind == "pairwise"
        else partial(ValueModel.teacher_loss, teacher=teacher)
    )
    tokens, labels = batch()
    results = []
    for parts in [
        [(tokens, labels)],
        list(zip(tokens.split(2), labels.split(2))),
        [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])],
    ]:
        value.zero_grad(set_to_none=True)
        count = count_answer_pairs if kind == "pairwise" else count_supervised
        metrics = accumulate_gradient(Objective(value, loss), base, parts, "float32", count=count)
        results.append((metrics, [parameter.grad for parameter in value.parameters()]))
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
        for whole, split in zip(results[0][1], gradients):
            torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for frozen in (base, teacher) for weight in frozen.parameters())


# ---- the norm over all positions


def test_the_norm_over_all_positions_is_a_mean_over_every_row():
    z_base, z_delta, labels = pairs()
    plain, supervised = ivl_loss(z_base, z_delta, labels, 0.3)
    loss, metrics = ivl_loss(z_base, z_delta, labels, 0.3, over="all")
    torch.testing.assert_close(metrics["l1"], z_delta.abs().mean())
    torch.testing.assert_close(loss, metrics["ce"] + 0.3 * z_delta.abs().mean())
    assert supervised["l1"] != metrics["l1"] and {**supervised, "l1": 0} == {**metrics, "l1": 0}
