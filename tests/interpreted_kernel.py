"""The Triton kernels of ivl.py, on a GPU or run on the CPU by Triton's interpreter, against the plain formulas in float64.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_kernel.py
    python -m pytest tests/interpreted_kernel.py                         # on a GPU

Whether kernels are interpreted is fixed when Triton is imported, so test_loss.py runs this file in a process of its own.
"""

import os

import pytest
import torch
from torch import Tensor

import fast.loss
from ivl import SCHEMES, KernelLoss, ValueModel, ivl_loss, kernel_loss, kernel_runs_on
from tests.helpers import small, value_network

# Half a unit in the last place, and for bfloat16 a whole one: the interpreter cuts bits off where a GPU rounds.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SMALLEST = {
    torch.float32: 1e-37,
    torch.float16: 2**-25,
    torch.bfloat16: 1e-37,
}  # below it nothing is left


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


def assert_exact(z_base: Tensor, z_delta: Tensor, labels: Tensor, l1: float) -> None:
    """kernel_loss: loss, metrics and gradient are those of float64, but for the rounding of one number."""
    assert kernel_runs_on(z_base, z_delta)
    before = [z_base.clone(), z_delta.clone()]
    ours, exact = z_delta.detach().requires_grad_(), z_delta.detach().double().requires_grad_()
    loss, metrics = kernel_loss(z_base, ours, labels, l1)
    assert not kernel_runs_on(z_base.double(), exact)
    exact_loss, exact_metrics = ivl_loss(z_base.double(), exact, labels, l1)
    (3 * loss).backward(), (3 * exact_loss).backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == z_delta.dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=1e-6)
    assert metrics.keys() == exact_metrics.keys()
    for name in metrics:
        torch.testing.assert_close(
            metrics[name].double(), exact_metrics[name].double(), rtol=2e-6, atol=1e-6, msg=name
        )
    # Rounded once, when it is written; each of its two terms has been rounded in fp32 before they may cancel.
    norms = (
        3 * l1 / (max(1, int((labels != -100).sum())) * z_delta.shape[1])
    )  # what the norm adds or takes away
    dtype, terms = z_delta.dtype, exact.grad.abs() + norms
    allowed = ROUNDING[dtype] * exact.grad.abs() + 4e-6 * terms + SMALLEST[dtype]
    known = (0 <= labels) & (labels < z_delta.shape[1])
    allowed[known, labels[known]] += 1e-6  # p - 1 has only the digits that p has
    assert ((ours.grad.double() - exact.grad).abs() <= allowed).all()
    assert torch.equal(before[0], z_base) and torch.equal(before[1], z_delta)  # pure


def logits(N: int, V: int, dtype: torch.dtype, seed: int, size: float = 3.0) -> Tensor:
    return (
        size * torch.randn(N, V, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    ).to(DEVICE, dtype)


def targets(N: int, V: int) -> Tensor:
    """Random labels with an ignored row; the last column and the first are among them."""
    labels = torch.randint(
        V, (N,), generator=torch.Generator("cpu").manual_seed(2), device="cpu"
    ).to(DEVICE)
    labels[:3] = torch.tensor([V - 1, -100, 0])
    return labels


SIZES = [(2, 2), (7, 7), (1024, 1024), (2048, 2048), (5000, 5000), (300, 5000), (5000, 300)]
WIDE = [  # each in one dtype: the interpreter takes seconds
    (32016, 32000, torch.float16),
    (32000, 32016, torch.float32),
    (128256, 128256, torch.bfloat16),
]


@pytest.mark.parametrize(
    "Vb, Vv, dtype", [(*size, dtype) for size in SIZES for dtype in ROUNDING] + WIDE
)
def test_random_rows(Vb, Vv, dtype):
    assert_exact(logits(5, Vb, dtype, 0), logits(5, Vv, dtype, 1), targets(5, min(Vb, Vv)), 0.7)


def test_a_label_that_only_the_base_knows():
    assert_exact(
        logits(4, 32016, torch.float32, 0),
        logits(4, 32000, torch.float32, 1),
        torch.tensor([32015, 32000, 31999, -100]),
        0.5,
    )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("labels", [[-100, -100, -100, -100], [-100, -100, 2500, -100]])
def test_all_rows_ignored_and_one_supervised(labels, dtype):
    assert_exact(logits(4, 3000, dtype, 0), logits(4, 3000, dtype, 1), torch.tensor(labels), 1.0)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_no_effect_at_all_has_the_norms_gradient_0(dtype):
    z_delta = torch.zeros(4, 3000, dtype=dtype)
    assert_exact(logits(4, 3000, dtype, 0), z_delta, targets(4, 3000), 1.0)
    z_delta[:, ::2] = -0.0
    assert_exact(logits(4, 3000, dtype, 0), z_delta, targets(4, 3000), 1.0)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("label, right", [(3, True), (4, False), (2500, False), (2, False)])
def test_of_equal_logits_the_first_is_the_arg_max(label, right, dtype):
    z_base, z_delta = torch.zeros(1, 3000, dtype=dtype), torch.zeros(1, 3000, dtype=dtype)
    z_base[0, [3, 4, 2500]] = 8.0
    z_delta[0, 7] = 8.0
    assert_exact(z_base, z_delta, torch.tensor([label]), 0.1)
    _, metrics = kernel_loss(z_base, z_delta, torch.tensor([label]))
    assert metrics["acc"].item() == metrics["base_acc"].item() == right


@pytest.mark.parametrize(
    "dtype, huge", [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)]
)
def test_huge_logits(dtype, huge):
    """Sums that overflow in a naive exp, a label far below and one far above everything, and logits of -inf (masked tokens)."""
    z_base, z_delta = [
        (logits(4, 3000, torch.float32, seed) * 64).round().div(64).to(dtype) for seed in (0, 1)
    ]  # fp32 adds them exactly
    z_base[0, 2100], z_base[1, 9], z_delta[2] = huge, -huge, z_delta[2] - 500
    z_base[3, 1500:1600] = -torch.inf
    assert_exact(z_base, z_delta, torch.tensor([2100, 8, 7, 1400]), 0.1)
    loss, metrics = kernel_loss(z_base[:1], z_delta[:1], torch.tensor([5]))
    assert loss.item() == pytest.approx(huge, rel=0.01) and metrics[
        "base_ce"
    ].item() == pytest.approx(huge, rel=0.01)


def test_the_norms_gradient_survives_where_fp16_cannot_hold_it_alone():
    """lambda / (N V) is 1.6e-8 here, nothing in fp16; beside the softmax's own gradient it is rounded once."""
    z_base, z_delta, labels = (
        torch.zeros(2, 32000, dtype=torch.float16),
        logits(2, 32000, torch.float16, 1),
        torch.tensor([5, 6]),
    )
    assert_exact(z_base, z_delta, labels, 1e-3)
    found = []
    for loss_of, z in ((kernel_loss, z_delta), (ivl_loss, z_delta.double())):
        loss_of(z_base.to(z.dtype), z.requires_grad_(), labels, 1e-3)[0].backward()
        found.append(z.grad.half())
    assert (
        found[0] == found[1]
    ).double().mean() > 0.99  # without the norm a quarter would be rounded elsewhere


def test_rows_that_lie_apart_in_memory_and_columns_that_do():
    wide = logits(4, 2 * 700, torch.float32, 0)
    assert_exact(wide[:, :700], wide[:, 700:], targets(4, 700), 0.3)
    assert_exact(
        wide[:, ::2], wide[:, 1::2], targets(4, 700), 0.3
    )  # no unit stride: taken as a copy
    assert_exact(
        wide[:1, :700].expand(4, 700), wide[:, 700:], targets(4, 700), 0.3
    )  # a stride of 0


def test_rows_more_than_2_to_the_31_numbers_apart():
    """The memory between the rows is never touched, so it is only address space."""
    V, stride = 300, 2**30 + 16
    near = [logits(3, V, torch.float16, seed) for seed in (0, 1)]
    apart = [torch.empty_strided((3, V), (stride, 1), dtype=torch.float16).copy_(z) for z in near]
    results = []
    for z_base, z_delta in (near, apart):
        z_delta.requires_grad_()
        ce, norm, metrics = KernelLoss.apply(
            z_base, z_delta, torch.tensor([3, -100, 7]), torch.tensor(2)
        )
        (gradient,) = torch.autograd.grad(ce + 0.5 * norm, z_delta)
        assert gradient.is_contiguous() and gradient[2].any()
        results.append([ce.detach(), norm.detach(), metrics, gradient])
    assert apart[1].stride() == (stride, 1) and all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_as_many_backward_passes_as_one_likes(dtype):
    z_delta = logits(5, 3000, dtype, 1).requires_grad_()
    loss, _ = kernel_loss(logits(5, 3000, dtype, 0), z_delta, targets(5, 3000), 0.5)
    first, again, last = [
        torch.autograd.grad(loss, z_delta, retain_graph=keep)[0] for keep in (True, True, False)
    ]
    assert first.any() and torch.equal(first, again) and torch.equal(first, last)


def test_either_term_can_be_differentiated_by_itself():
    """What autograd makes of a term that is not used is a gradient of 0 for it."""
    z_base, labels, found = logits(5, 300, torch.float32, 0), targets(5, 300), []
    z_delta = logits(5, 300, torch.float32, 1).requires_grad_()
    ce, norm, _ = KernelLoss.apply(z_base, z_delta, labels, torch.tensor(4))
    for term in (ce, norm, 2 * ce - 3 * norm):
        found.append(torch.autograd.grad(term, z_delta, retain_graph=True)[0])
    torch.testing.assert_close(2 * found[0] - 3 * found[1], found[2])
    torch.testing.assert_close(
        found[1], z_delta.detach().sign() * (labels != -100)[:, None] / (4 * 300)
    )


@pytest.mark.parametrize("label", [-5, 300, 2**40])
@pytest.mark.parametrize("Vv", [300, 310])
def test_a_label_that_the_base_has_not(label, Vv):
    """Memory beyond the logits is not read, and neither its row's loss nor its gradient is mistaken for a number."""
    z_base, z_delta = (
        logits(2, 300, torch.float32, 0),
        logits(2, Vv, torch.float32, 1).requires_grad_(),
    )
    z_delta.data[1, 3] = 100.0
    loss, metrics = kernel_loss(z_base, z_delta, torch.tensor([label, 3]), 0.1)
    loss.backward()
    assert loss.isnan() and metrics["l1"].isfinite() and metrics["acc"] == 0.5
    assert z_delta.grad[0].isnan().all() and z_delta.grad[1].isfinite().all()


def test_numbers_at_the_end_of_their_range():
    """A row of the smallest numbers is uniform; and without lambda an infinite norm is not in the loss."""
    smallest = torch.full((1, 40), torch.finfo(torch.float32).min)
    loss, _ = kernel_loss(smallest, torch.zeros(1, 40), torch.tensor([3]))
    torch.testing.assert_close(loss, torch.tensor(40.0).log())
    masked = torch.zeros(1, 40)
    masked[0, 7] = -float("inf")
    loss, _ = kernel_loss(torch.zeros(1, 40), masked, torch.tensor([3]))
    torch.testing.assert_close(loss, torch.tensor(39.0).log())


def test_without_a_gradient_nothing_is_kept():
    with torch.no_grad():
        loss, metrics = kernel_loss(
            logits(2, 50, torch.float32, 0),
            logits(2, 50, torch.float32, 1).requires_grad_(),
            torch.tensor([3, 4]),
        )
    assert not loss.requires_grad and not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_chunked_through_the_kernel(l1):
    h_base, h_value = logits(14, 16, torch.float32, 0, 1.0), logits(14, 16, torch.float32, 1, 1.0)
    W_base, W_value = logits(303, 16, torch.float32, 2, 1.0), logits(300, 16, torch.float32, 3, 1.0)
    labels = targets(14, 300).clamp(min=0)  # all of them supervised
    results = []
    for dtype in (
        torch.float32,
        torch.float64,
    ):  # by the kernel, and by the formulas without chunks
        h, W = (
            h_value.detach().to(dtype).requires_grad_(),
            W_value.detach().to(dtype).requires_grad_(),
        )
        if dtype == torch.float32:
            loss, metrics = fast.loss.value_loss_from_hidden(
                h_base, W_base, h, W, labels, l1, chunk=4
            )
        else:
            loss, metrics = ivl_loss(h_base.double() @ W_base.double().T, h @ W.T, labels, l1)
        loss.backward()
        results.append(
            [each.detach().double() for each in (loss, h.grad, W.grad, *metrics.values())]
        )
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_every_scheme_through_the_kernel(scheme):
    tokens = torch.randint(
        50, (2, 9), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    ).to(DEVICE)
    labels = tokens.roll(-1, 1).masked_fill(torch.arange(9) < 3, -100)
    results = []
    for loss, dtype in ((fast.loss.value_loss, torch.float32), (ValueModel.loss, torch.float64)):
        base, value = small(vocab_size=53).to(dtype), value_network(scheme).to(dtype)
        loss(value, base, tokens, labels, 0.1)[0].backward()
        results.append([parameter.grad.double() for parameter in value.parameters()])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)
