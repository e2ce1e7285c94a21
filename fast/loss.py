"""The losses of training without ever holding all logits: a few rows at a time, for the supervised rows alone.

    python train.py --fast        # on tiny networks, too; checkpoints take it by themselves

`value_loss` replaces ValueModel.loss in ivl.py, `teacher_loss` ValueModel.teacher_loss,
`language_loss` the one in train.py. They give the same loss, metrics and gradients, says
tests/test_loss.py. The first two call ivl_loss and distillation_loss for each chunk of rows, so
what you change in those formulas changes here too; on a GPU the kernel of ivl.py takes ivl_loss's
place. Pairs have no faster version: the loss of a pair is no mean over its rows.

4096 tokens of two networks with 32000 logits are 1 GB in fp32, and the plain loss makes five or
more tensors of that size on its way. Here one chunk's logits are made, the loss is taken and
differentiated, and they are forgotten. What remains is the gradient for the hidden states and for
the head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl import (
    Loss,
    ValueModel,
    at_least_float,
    distillation_loss,
    ivl_loss,
    kernel_loss,
    kernel_runs_on,
)
from model import Llama

# Logits of a chunk. On a GPU each chunk costs a pass over the head's gradient, so it has many rows:
# 2097 of 32000 logits, 128 MB in bf16. On a CPU it has as few as keep the matrix products fast, but
# never under 64.
CHUNK, CHUNK_ON_CPU = 2**26, 2_400_000


def value_loss(
    value: ValueModel, base: Llama, tokens: Tensor, labels: Tensor, l1: float = 0.0
) -> Loss:
    """ValueModel.loss."""
    supervised = labels != -100  # (B, T), N of them
    labels = labels[supervised]  # (N,)

    def loss_of(z_base: Tensor, z_delta: Tensor, rows: slice) -> Loss:
        return faster_ivl_loss(z_base, z_delta, labels[rows], l1)

    return of_supervised(value, base, tokens, supervised, loss_of)


def faster_ivl_loss(z_base: Tensor, z_delta: Tensor, labels: Tensor, l1: float = 0.0) -> Loss:
    """ivl_loss, by the Triton kernel where that runs."""
    loss = kernel_loss if kernel_runs_on(z_base, z_delta) else ivl_loss
    return loss(z_base, z_delta, labels, l1)


def teacher_loss(
    value: ValueModel,
    base: Llama,
    tokens: Tensor,
    labels: Tensor,
    teacher: Llama,
    temperature: float = 1.0,
) -> Loss:
    """ValueModel.teacher_loss."""
    supervised = labels != -100  # (B, T), N of them
    labels = labels[supervised]  # (N,)
    with torch.no_grad():
        h_teacher, W_teacher = teacher.hidden_and_head(tokens)  # (B, T, Dt), (Vt, Dt)
        h_teacher = h_teacher[supervised]  # (N, Dt)

    def loss_of(z_base: Tensor, z_delta: Tensor, rows: slice) -> Loss:
        z_teacher = h_teacher[rows].to(W_teacher.dtype) @ W_teacher.T.detach()
        return distillation_loss(z_base, z_delta, z_teacher, labels[rows], temperature)

    return of_supervised(value, base, tokens, supervised, loss_of)


def of_supervised(
    value: ValueModel,
    base: Llama,
    tokens: Tensor,
    supervised: Tensor,
    loss_of: Callable[[Tensor, Tensor, slice], Loss],
) -> Loss:
    """The mean over supervised rows that loss_of(z_base, z_delta, which rows) gives.

    A cascade reads the base's logits of every position, so those it must hold.
    """
    everything = slice(None)
    if value.scheme.startswith("cascade"):
        with torch.no_grad():
            everywhere = base(tokens)  # (B, T, Vb)
        hidden = value.network.model(embeds=value.embeds(tokens, everywhere))  # (B, T, Dv)
        z_base = everywhere[supervised]  # (N, Vb)
        return loss_of(z_base, value.network.lm_head(hidden[supervised]), everything)
    with torch.no_grad():
        h_base, W_base = base.hidden_and_head(tokens)  # (B, T, Db), (Vb, Db)
        h_base = h_base[supervised]  # (N, Db)
    if value.scheme == "probe":
        z_base = F.linear(h_base, W_base)  # (N, Vb)
        return loss_of(z_base, value.network(z_base), everything)
    h_value, W_value = value.network.hidden_and_head(tokens)  # (B, T, Dv), (Vv, Dv)
    return with_base(h_base, W_base, h_value[supervised], W_value, loss_of)


def with_base(
    h_base: Tensor,
    W_base: Tensor,
    h_value: Tensor,
    W_value: Tensor,
    loss_of: Callable[[Tensor, Tensor, slice], Loss],
    chunk: int | None = None,
) -> Loss:
    """in_chunks of the value network's head, beside the base's logits of the same rows, (N, Db) and (Vb, Db)."""
    h_base, W_base = h_base.detach(), W_base.detach()  # Eq. (3): stop_gradient
    return in_chunks(
        lambda z_delta, rows: loss_of(h_base[rows].to(W_base.dtype) @ W_base.T, z_delta, rows),
        h_value,
        W_value,
        chunk,
    )


def value_loss_from_hidden(
    h_base: Tensor,
    W_base: Tensor,
    h_value: Tensor,
    W_value: Tensor,
    labels: Tensor,
    l1: float = 0.0,
    chunk: int | None = None,
) -> Loss:
    """ivl_loss of h_base @ W_base^T and h_value @ W_value^T.

    (N, Db), (Vb, Db), (N, Dv), (Vv, Dv), labels (N,).
    """

    def loss_of(z_base: Tensor, z_delta: Tensor, rows: slice) -> Loss:
        return faster_ivl_loss(z_base, z_delta, labels[rows], l1)

    return with_base(h_base, W_base, h_value, W_value, loss_of, chunk)


def language_loss(network: Llama, base: None, tokens: Tensor, labels: Tensor) -> Loss:
    """train.language_loss: ordinary training of a network by itself."""
    supervised = labels != -100
    hidden, W = network.hidden_and_head(tokens)  # (B, T, D), (V, D)
    labels = labels[supervised]  # (N,)

    def loss_of(z: Tensor, rows: slice) -> Loss:
        ce = F.cross_entropy(at_least_float(z), labels[rows], reduction="sum") / max(1, len(z))
        return ce, {"ce": ce.detach()}

    return in_chunks(loss_of, hidden[supervised], W)


def in_chunks(
    loss_of: Callable[[Tensor, slice], Loss], hidden: Tensor, W: Tensor, chunk: int | None = None
) -> Loss:
    """The mean over rows that loss_of(logits of some rows, which rows) gives, for hidden (N, D) and a head W (V, D).

    Under autocast products are taken in its dtype, sums stay in fp32. Can be differentiated once.
    """
    if chunk is None:
        chunk = max(64, (CHUNK_ON_CPU if hidden.device.type == "cpu" else CHUNK) // len(W))
    names: list[str] = []
    loss, metrics = ChunkedLoss.apply(loss_of, hidden, W, chunk, names, torch.is_grad_enabled())
    return loss, dict(zip(names, metrics))


class ChunkedLoss(torch.autograd.Function):
    """A head, the loss, and the way back through the head, for one chunk of rows after another."""

    @staticmethod
    def forward(ctx, loss_of, hidden, W, chunk, names, with_gradient):
        dtype, device, N = hidden.dtype, hidden.device.type, max(1, len(hidden))
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wants_hidden, wants_head = [
            with_gradient and wanted for wanted in ctx.needs_input_grad[1:3]
        ]
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_head = at_least_float(torch.zeros_like(W)) if wants_head else None
        total = metrics = 0.0
        W = W.to(dtype)
        with torch.autocast(device, enabled=False):
            for first in range(0, N, chunk):
                rows = slice(first, first + chunk)
                h = hidden[rows].to(dtype)  # (C, D)
                # the chunk's logits, its share of the loss, and their gradient
                with torch.set_grad_enabled(with_gradient):
                    z = (h @ W.T).detach().requires_grad_(with_gradient)  # (C, V)
                    loss, found = loss_of(z, rows)
                    loss = loss * (len(h) / N)
                    d_z = torch.autograd.grad(loss, z)[0] if with_gradient else None  # (C, V)
                total = total + loss.detach()
                metrics = metrics + torch.stack(list(found.values())) * (len(h) / N)
                # and on through the head
                if d_hidden is not None:
                    d_hidden[rows] = d_z @ W
                if d_head is not None:
                    d_head += d_z.T @ h  # products in bf16, their sum in fp32
        names += found
        ctx.gradients = d_hidden, d_head
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    def backward(ctx, d_loss, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss was differentiated once and its gradient is used up; compute the loss again"
            )
        (d_hidden, d_head), ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(d_loss) for gradient in (d_hidden, d_head)
        ]
        return None, *scaled, None, None, None
