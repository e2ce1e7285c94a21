"""Inverse value learning: the value network, Eq. (3), and the loss.

    python -c "from ivl import ValueModel; print(ValueModel.from_pretrained('out/seed0/value-residual-tiny-s').info)"

A frozen base computes z_base, the logits of the next token. The value network computes z_delta, how post-training
changes them. Only the value network learns; afterwards it is plugged into other bases as it is.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data.chat import TEMPLATES, is_unicode
from data.tokenizer import Tokenizer
from model import CheckpointError, KVCache, Llama, read_json, read_tensors

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain formulas do all of it
    triton = None

SCHEMES = ("residual", "cascade", "cascade+", "probe")

# ---------------------------------------------------------------------------------------------------------
# Eq. (3) and Eq. (4)


def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """Eq. (3): stop_gradient(z_base) + alpha * z_delta, for z_base (..., Vb) and z_delta (..., Vv) -> (..., Vb).

    alpha is ours: 1 in the paper, 0 is the base alone. Where one vocabulary extends the other, z_delta is 0 on the
    tokens that it lacks, and what it has beyond Vb is dropped.
    """
    Vb, Vv = z_base.shape[-1], z_delta.shape[-1]
    if Vv > Vb:
        z_delta = z_delta[..., :Vb]
    elif Vv < Vb:
        z_delta = F.pad(z_delta, (0, Vb - Vv))
    return z_base.detach() + (z_delta if alpha == 1 else alpha * z_delta)


def ivl_loss(z_base: Tensor | None, z_delta: Tensor, labels: Tensor, l1: float = 0.0
             ) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (4) with the norm of Section 4.2.1: CE(z_base + z_delta, labels) + l1 * mean |z_delta|.

    z_base (..., Vb), z_delta (..., Vv), labels (...) already shifted: row t's label is token t + 1. Rows whose label
    is -100 count in neither term; any other label outside the vocabulary raises ValueError. With z_base None, as if
    it were 0, this is ordinary training of the network behind z_delta.

    Both terms are means over the supervised rows, the norm also over the vocabulary. The paper writes a sum, but
    its lambda of 1.0 (Table 5) goes with a mean. Its authors take that over all positions, prompt and padding
    included; we take it where the value network is used.

    Returns the loss and {ce, l1, acc} and, with a base, {base_ce, base_acc}: what the base alone would get. All are
    0-dimensional tensors, 0 when no row is supervised. On a GPU one Triton kernel does it all (below), and then the
    loss can be differentiated once.
    """
    Vb = z_delta.shape[-1] if z_base is None else z_base.shape[-1]
    z_base = None if z_base is None else z_base.detach().reshape(-1, Vb)  # (N, Vb)
    z_delta, labels = z_delta.reshape(-1, z_delta.shape[-1]), labels.reshape(-1)  # (N, Vv), (N,)
    count = check_labels(labels, Vb)
    if kernel_runs_on(z_base, z_delta):
        loss, stats = KernelLoss.apply(z_base, z_delta, labels, count, l1)
    else:
        if (labels == -100).any():
            rows = labels != -100
            z_base, z_delta, labels = None if z_base is None else z_base[rows], z_delta[rows], labels[rows]
        loss, stats = plain_loss(z_base, z_delta, labels, count, l1)
    return loss, name_metrics(stats, z_base is not None)


def plain_loss(z_base: Tensor | None, z_delta: Tensor, labels: Tensor, count: int, l1: float) -> tuple[Tensor, Tensor]:
    """What ivl_loss promises, of supervised rows alone, as formulas; sums are divided by `count`.

    Returns the loss and the stats (5,): ce, l1, acc, and base_ce, base_acc (0 without a base).
    """
    z_delta = at_least_float(z_delta)  # (N, Vv)
    z_base = None if z_base is None else at_least_float(z_base)  # (N, Vb)
    z_post = z_delta if z_base is None else combine(z_base, z_delta)  # (N, Vb)
    ce = F.cross_entropy(z_post, labels, reduction="sum") / count
    norm = z_delta.abs().mean(-1).sum() / count
    stats = ce.new_zeros(5)
    # max, and not argmax, which does the same but is three times as slow on a CPU.
    stats[:3] = torch.stack([ce.detach(), norm.detach(), (z_post.max(-1).indices == labels).sum() / count])
    if z_base is not None:
        stats[3] = F.cross_entropy(z_base, labels, reduction="sum") / count
        stats[4] = (z_base.max(-1).indices == labels).sum() / count
    # Without l1 the norm stays out of the graph; it would cost a pass over z_delta for a gradient of 0.
    return ce + l1 * norm if l1 else ce, stats


def check_labels(labels: Tensor, Vb: int) -> int:
    """How many labels (N,) are supervised, at least 1, to divide by; ValueError if one is outside the vocabulary."""
    labels = labels[labels != -100]
    if len(labels) and not 0 <= labels.min() <= labels.max() < Vb:
        raise ValueError(f"a label outside 0..{Vb - 1}, the vocabulary of the base")
    return max(len(labels), 1)


def name_metrics(stats: Tensor, has_base: bool) -> dict[str, Tensor]:
    return dict(zip(["ce", "l1", "acc", "base_ce", "base_acc"][:5 if has_base else 3], stats))


def at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------
# The same loss as one Triton kernel
#
# A GPU spends the loss on waiting for memory: eager PyTorch moves 66 to 78 bytes per pair of bf16 logits (z_base,
# z_delta), the kernel 10: it reads every pair twice (4 + 4 bytes) and writes a gradient (2). Where a row is still in
# the cache when it is read again, 6 go through memory.
#
# How to read Triton: the body runs once for every "program", here one per row, all at the same time. A variable is a
# number, or a block of BLOCK numbers that the threads of a program hold between them. A pointer plus a block of
# offsets is a block of addresses; `mask` says which of them exist, `other` what to read for those that don't.

if triton is not None:

    @triton.jit
    def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
        """x *= factor, where x has `size` numbers and factor one; where factor is 1, no memory is touched."""
        f = tl.load(factor)
        if f != 1.0:
            offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            tl.store(x + offsets, value * f, mask=offsets < size)  # rounded to x's dtype

    @triton.jit
    def loss_kernel(z_base, z_delta, labels, gradient, stats, base_stride, delta_stride, gradient_stride, Vb, Vv,
                    ce_scale, l1_scale, HAS_BASE: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
                    STAGES: tl.constexpr):
        """One row: its five stats and, in a second pass, the gradient for z_delta (which may be written over z_delta).

        The first five are pointers; strides are in numbers from one row to the next. ce_scale is 1 / (rows supervised),
        l1_scale is lambda / (rows supervised * Vv).
        """
        row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 soon: 16745 rows of 128256 logits
        z_base += row * base_stride
        z_delta += row * delta_stride
        gradient += row * gradient_stride
        stats += row * 5
        columns = tl.arange(0, BLOCK)
        blocks = tl.cdiv(tl.maximum(Vb, Vv), BLOCK)
        label = tl.load(labels + row)

        if label == -100:  # counts in nothing
            for block in range(blocks if HAS_GRADIENT else 0):
                column = block * BLOCK + columns
                tl.store(gradient + column, tl.zeros([BLOCK], tl.float32), mask=column < Vv)
            tl.store(stats + columns, tl.zeros([BLOCK], tl.float32), mask=columns < 5)
            return

        # The label's own logits, read before anything may be written over them. They win if nothing beats them.
        base_label = tl.load(z_base + label).to(tl.float32) if HAS_BASE else 0.0
        post_label = base_label + tl.load(z_delta + label, mask=label < Vv, other=0.0).to(tl.float32)

        # First pass. log(sum(exp(z))) without overflow: `top` is the largest z so far, and `total` sums exp(z - top), so
        # it shrinks by exp(old top - new top) whenever top grows. Every lane of a block sums its own columns, and the
        # lanes are added up at the end. -3e38 and not -inf: -inf - -inf is no number.
        post_top, post_total, post_beaten = -3e38, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        base_top, base_total, base_beaten = -3e38, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        size = tl.zeros([BLOCK], tl.float32)  # of |z_delta|
        for block in tl.range(0, blocks, num_stages=STAGES):
            column = block * BLOCK + columns
            delta = tl.load(z_delta + column, mask=column < Vv, other=0.0).to(tl.float32)  # 0 beyond Vv, Eq. (3)
            if HAS_BASE:
                base = tl.load(z_base + column, mask=column < Vb, other=-float("inf")).to(tl.float32)
            else:
                base = tl.where(column < Vb, 0.0, -float("inf"))
            post = base + delta  # Eq. (3); -inf beyond Vb, so that exp makes it 0
            size += tl.abs(delta)

            new_top = tl.maximum(post_top, tl.max(post, 0))
            post_total = post_total * tl.exp(post_top - new_top) + tl.exp(post - new_top)
            post_top = new_top
            post_beaten |= ((post > post_label) | ((post == post_label) & (column < label))).to(tl.int32)
            if HAS_BASE:
                new_top = tl.maximum(base_top, tl.max(base, 0))
                base_total = base_total * tl.exp(base_top - new_top) + tl.exp(base - new_top)
                base_top = new_top
                base_beaten |= ((base > base_label) | ((base == base_label) & (column < label))).to(tl.int32)
        post_log = tl.log(tl.sum(post_total, 0))  # kept apart from `top`, beside which it would lose its last digits
        tl.store(stats, post_top - post_label + post_log)  # the cross-entropy
        tl.store(stats + 1, tl.sum(size, 0))
        tl.store(stats + 2, 1.0 - tl.max(post_beaten, 0))
        if HAS_BASE:
            tl.store(stats + 3, base_top - base_label + tl.log(tl.sum(base_total, 0)))
            tl.store(stats + 4, 1.0 - tl.max(base_beaten, 0))

        # Second pass, backwards: what was read last is likeliest to be in the cache still.
        if HAS_GRADIENT:
            for step in tl.range(0, blocks, num_stages=STAGES):
                column = (blocks - 1 - step) * BLOCK + columns
                delta = tl.load(z_delta + column, mask=column < Vv, other=0.0).to(tl.float32)
                if HAS_BASE:
                    base = tl.load(z_base + column, mask=column < Vb, other=-float("inf")).to(tl.float32)
                else:
                    base = tl.where(column < Vb, 0.0, -float("inf"))
                p_post = tl.exp(base + delta - post_top - post_log)
                slope = (p_post - (column == label).to(tl.float32)) * ce_scale
                sign = (delta > 0).to(tl.float32) - (delta < 0).to(tl.float32)  # 0 at 0, as in PyTorch
                # Both terms are added in fp32 and rounded once: l1_scale alone is nothing in fp16.
                tl.store(gradient + column, slope + sign * l1_scale, mask=column < Vv)


# Columns at a time; threads / 32 of a program, so that each thread has 8 columns, 16 bytes of bf16; and blocks under way
# at once: while one is added up, the next two are already being fetched.
BLOCK, WARPS, STAGES = 2048, 8, 3


def kernel_runs_on(z_base: Tensor | None, z_delta: Tensor) -> bool:
    """On CUDA tensors, and on CPU tensors where the process was started with TRITON_INTERPRET=1."""
    dtypes = {z_delta.dtype} if z_base is None else {z_delta.dtype, z_base.dtype}
    return (triton is not None and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
            and (z_delta.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"))


def run_loss_kernel(z_base: Tensor | None, z_delta: Tensor, labels: Tensor, count: int, l1: float, gradient: Tensor | None
                    ) -> tuple[Tensor, Tensor]:
    """plain_loss by the kernel, of z_base (N, Vb), z_delta (N, Vv), labels (N,) with -100 allowed.

    The gradient of the loss goes into `gradient` (N, Vv), which may be z_delta itself; None: no second pass.
    """
    N, Vv = z_delta.shape
    Vb = Vv if z_base is None else z_base.shape[1]
    z_base, z_delta = [z if z is None or z.stride(1) == 1 else z.contiguous() for z in (z_base, z_delta)]
    stats = torch.zeros(N, 5, device=z_delta.device)
    block = min(BLOCK, triton.next_power_of_2(max(Vb, Vv, 8)))  # stats has 5 columns
    with torch.cuda.device_of(z_delta):
        loss_kernel[(N,)](
            z_delta if z_base is None else z_base, z_delta, labels.contiguous(), z_delta if gradient is None else gradient, stats,
            0 if z_base is None else z_base.stride(0), z_delta.stride(0), 0 if gradient is None else gradient.stride(0),
            Vb, Vv, 1 / count, l1 / (count * Vv), HAS_BASE=z_base is not None, HAS_GRADIENT=gradient is not None,
            BLOCK=block, STAGES=STAGES, num_warps=WARPS)
    stats = stats.sum(0) / stats.new_tensor([count, count * Vv, count, count, count])  # (5,)
    return stats[0] + l1 * stats[1], stats


DIFFERENTIATED = "this loss was differentiated once and its gradient is used up; compute the loss again"


class KernelLoss(torch.autograd.Function):
    """run_loss_kernel for autograd. The forward pass has made the gradient already; backward only scales it."""

    @staticmethod
    def forward(ctx, z_base, z_delta, labels, count, l1):
        ctx.gradient = torch.empty_like(z_delta, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        loss, stats = run_loss_kernel(z_base, z_delta, labels, count, l1, ctx.gradient)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, d_loss, _):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(DIFFERENTIATED)
        if gradient.numel():
            with torch.cuda.device_of(gradient):
                scale_kernel[(triton.cdiv(gradient.numel(), BLOCK),)](gradient, d_loss, gradient.numel(), BLOCK=BLOCK)
        return None, gradient, None, None, None


# ---------------------------------------------------------------------------------------------------------
# The loss without ever holding all logits


def ivl_loss_from_hidden(h_base: Tensor | None, W_base: Tensor | None, h_value: Tensor, W_value: Tensor, labels: Tensor,
                         l1: float = 0.0, chunk: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """ivl_loss of h_base @ W_base^T and h_value @ W_value^T, a few rows at a time, with the gradients made on the way.

    h_base (..., Db), W_base (Vb, Db), h_value (..., Dv), W_value (Vv, Dv), labels (...) as ivl_loss takes them; no base
    at all if the first two are None. Only supervised rows are computed, `chunk` at a time: the logits of
    one chunk are all that memory ever holds. Under autocast the products are taken in its dtype, sums stay in fp32.
    The loss can be differentiated once.
    """
    rows = labels != -100
    labels = labels[rows]  # (N,)
    count = check_labels(labels, len(W_value if W_base is None else W_base))
    if W_base is not None:
        h_base, W_base = h_base[rows].detach(), W_base.detach()  # (N, Db), (Vb, Db)
    if chunk is None:
        chunk = max(64, (CHUNK_ON_CPU if h_value.device.type == "cpu" else CHUNK) // len(W_value))
    loss, stats = ChunkedLoss.apply(h_base, W_base, h_value[rows], W_value, labels, count, l1, chunk, torch.is_grad_enabled())
    return loss, name_metrics(stats, W_base is not None)


# Logits of a chunk. On a GPU each chunk costs a pass over the head's gradient, so it has many rows: 2097 of 32000
# logits, 128 MB in bf16. On a CPU it has as few as keep the matrix products fast, but never under 64.
CHUNK, CHUNK_ON_CPU = 2**26, 2_400_000


class ChunkedLoss(torch.autograd.Function):
    """Both heads, the loss, and the way back through the value network's head, for one chunk of rows after another."""

    @staticmethod
    def forward(ctx, h_base, W_base, h_value, W_value, labels, count, l1, chunk, with_gradient):
        dtype, device = h_value.dtype, h_value.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        d_hidden = torch.zeros_like(h_value) if with_gradient and ctx.needs_input_grad[2] else None
        d_head = at_least_float(torch.zeros_like(W_value)) if with_gradient and ctx.needs_input_grad[3] else None
        W = W_value.to(dtype)  # (Vv, Dv)
        loss, stats = at_least_float(h_value.new_zeros(())), at_least_float(h_value.new_zeros(5))
        with torch.autocast(device, enabled=False):
            for here in (slice(first, first + chunk) for first in range(0, len(labels), chunk)):
                h = h_value[here].to(dtype)  # (C, Dv), C = chunk
                z_delta = h @ W.T  # (C, Vv)
                z_base = None if W_base is None else h_base[here].to(W_base.dtype) @ W_base.T  # (C, Vb)
                loss_here, stats_here, d_delta = loss_and_gradient(z_base, z_delta, labels[here], count, l1, with_gradient)
                loss, stats = loss + loss_here, stats + stats_here
                if d_hidden is not None:
                    d_hidden[here] = d_delta @ W
                if d_head is not None:
                    if d_head.dtype == dtype:
                        d_head.addmm_(d_delta.T, h)
                    else:  # products in bf16, their sum in fp32
                        d_head += d_delta.T @ h
        ctx.gradients = d_hidden, d_head
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, d_loss, _):
        if ctx.gradients is None:
            raise RuntimeError(DIFFERENTIATED)
        (d_hidden, d_head), ctx.gradients = ctx.gradients, None
        scaled = [None if each is None else each.mul_(d_loss) for each in (d_hidden, d_head)]
        return None, None, *scaled, *[None] * 5


def loss_and_gradient(z_base: Tensor | None, z_delta: Tensor, labels: Tensor, count: int, l1: float, with_gradient: bool
                      ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, stats, and the loss's gradient (N, Vv) for z_delta, by the kernel written over z_delta itself."""
    if kernel_runs_on(z_base, z_delta):
        gradient = z_delta if with_gradient else None
        return *run_loss_kernel(z_base, z_delta, labels, count, l1, gradient), gradient
    with torch.set_grad_enabled(with_gradient):
        z_delta = z_delta.detach().requires_grad_(with_gradient)
        loss, stats = plain_loss(z_base, z_delta, labels, count, l1)
        gradient = torch.autograd.grad(loss, z_delta)[0] if with_gradient else None
    return loss.detach(), stats, gradient


# ---------------------------------------------------------------------------------------------------------
# Attribution (Section 3.1, advantage 1): is it pre-training or post-training that says a token?


@dataclass
class Attribution:
    """Who decided on a token. Shares p are before top_p and at temperature 1; z_delta is in nats, times alpha."""

    token: int
    decided: str  # "base": it would have said the same. "value": it would not. "chance": sampling chose neither's first
    base_token: int  # the base's own first choice
    p_base: float  # how likely the base alone finds the token that was said
    p_post: float  # and with z_delta
    z_delta: float  # of that token
    size: float  # mean |z_delta|
    kl: float  # KL(p_post || p_base) in nats: how far z_delta has moved the base at this token
    pushed: int  # the token with the largest z_delta, likely or not
    raised: list[tuple[int, float, float, float]]  # tokens that gained most: token, p_base, p_post, z_delta
    lowered: list[tuple[int, float, float, float]]  # that lost most


def attribute(z_base: Tensor, z_delta: Tensor, token: int, alpha: float = 1.0, count: int = 4) -> Attribution:
    """Who decided on `token`, which was picked by z_base (Vb,) and z_delta (Vv,); `count` raised and lowered ones at most."""
    z_post = combine(z_base, z_delta, alpha).float()  # (Vb,), rounded as in decoding, where half precision can make ties
    z_base = z_base.float()  # (Vb,)
    z_delta = combine(torch.zeros_like(z_base), z_delta.float(), alpha)  # (Vb,)
    log_base, log_post = z_base.log_softmax(-1), z_post.log_softmax(-1)
    p_base, p_post = log_base.exp(), log_post.exp()
    first, first_post = int(p_base.argmax()), int(p_post.argmax())
    gain = p_post - p_base
    most, least = [(sign * gain).topk(min(count, len(gain))).indices.tolist() for sign in (1, -1)]
    raised, lowered = [[(id, *(each[id].item() for each in (p_base, p_post, z_delta))) for id in ids if gain[id].abs() > 0.0005]
                       for ids in ([id for id in most if gain[id] > 0], [id for id in least if gain[id] < 0])]
    kl = torch.where(p_post > 0, p_post * (log_post - log_base), 0.0).sum().clamp(min=0).item()
    return Attribution(token, "base" if token == first else "value" if token == first_post else "chance", first,
                       p_base[token].item(), p_post[token].item(), z_delta[token].item(), z_delta.abs().mean().item(), kl,
                       int(z_delta.argmax()), raised, lowered)


# ---------------------------------------------------------------------------------------------------------
# What can be plugged into a base


class Probe(nn.Module):
    """Appendix A.1: Llama's MLP, with biases, from the base's logits to z_delta; it never sees the text.

    The printed formula misplaces a bracket: down(silu(gate(x)) * up(x)) is meant. It starts at z_delta = 0. The paper
    does not give the inner width; as wide as Llama-2's vocabulary of 32000 it would have 3 billion weights.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.gate_proj = nn.Linear(vocab_size, width)
        self.up_proj = nn.Linear(vocab_size, width)
        self.down_proj = nn.Linear(width, vocab_size)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, base_logits: Tensor) -> Tensor:
        """base_logits (..., Vb) -> z_delta (..., Vv). Base columns beyond Vv are not read; ValueError if there are fewer."""
        if base_logits.shape[-1] < self.vocab_size:
            raise ValueError(f"a probe of {self.vocab_size} logits on a base of {base_logits.shape[-1]}")
        x = base_logits[..., :self.vocab_size].detach()
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    @property
    def device(self) -> torch.device:
        return self.down_proj.weight.device


class ValueModel(nn.Module):
    """A value network: a Llama or, in one scheme, a probe, whose output is read as z_delta.

    The schemes differ in what the network reads (Section 4.1, Figure 3a, Appendix A):
    residual   the text, so z_delta does not depend on the base
    cascade    at each position, what the base predicts there: the mean of the embeddings by the base's probabilities
    cascade+   that plus the embedding of the token at the position
    probe      the base's logits at the position, and nothing before it

    `info` is what ivl.json holds: scheme, l1, template, bases, data, seed, the tokenizer's size and fingerprint.
    `llamas` are the networks that need a KV cache while decoding.
    """

    def __init__(self, network: Llama | Probe, info: dict | None = None):
        super().__init__()
        self.network = network
        self.info = {"scheme": "residual"} | (info or {})
        self.scheme = self.info["scheme"]
        self.is_cascade = self.scheme in ("cascade", "cascade+")
        self.llamas = [network] if isinstance(network, Llama) else []

    @property
    def vocab_size(self) -> int:
        """Vv, the number of logits."""
        return self.network.config.vocab_size if self.llamas else self.network.vocab_size

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward(self, tokens: Tensor, base_logits: Tensor | None = None, cache: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T), and the base's logits (B, T, Vb) unless the scheme is residual -> z_delta (B, T, Vv).

        `cache` holds a KVCache for each of `llamas`.
        """
        if base_logits is None and self.scheme != "residual":
            raise ValueError(f"scheme {self.scheme} reads the base's logits")
        if self.scheme == "probe":
            return self.network(base_logits)
        return self.network.lm_head(self.hidden(tokens, base_logits, cache))

    def hidden(self, tokens: Tensor, base_logits: Tensor | None = None, cache: list[KVCache] | None = None) -> Tensor:
        """forward without lm_head: (B, T, D)."""
        own_cache = cache[0] if cache else None
        if not self.is_cascade:
            return self.network.model(tokens, own_cache)
        table = self.network.model.embed_tokens.weight  # (Vv, D)
        known = min(len(table), base_logits.shape[-1])  # base tokens that the table lacks are left out of the softmax
        p_base = F.softmax(base_logits.detach()[..., :known].float(), dim=-1)  # (B, T, known)
        embeds = p_base.to(table.dtype) @ table[:known]  # (B, T, D), p_base W_e of Section 4.1
        if self.scheme == "cascade+":
            embeds = embeds + self.network.model.embed_tokens(tokens)
        return self.network.model(cache=own_cache, embeds=embeds)

    def loss(self, base: Llama, tokens: Tensor, labels: Tensor, l1: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. (4) of tokens (B, T) and labels (B, T) on a frozen base: what ivl_loss returns. Only supervised rows get logits.

        The residual scheme never holds them all. The others read the base's, a cascade those of every position.
        """
        supervised = labels != -100  # (B, T), N of them
        if self.is_cascade:
            with torch.no_grad():
                everywhere = base(tokens)  # (B, T, Vb)
            z_base = everywhere[supervised]  # (N, Vb)
            z_delta = self.network.lm_head(self.hidden(tokens, everywhere)[supervised])  # (N, Vv)
            return ivl_loss(z_base, z_delta, labels[supervised], l1)
        with torch.no_grad():
            h_base, W_base = base.hidden_and_head(tokens)  # (B, T, Db), (Vb, Db)
        if self.scheme == "probe":
            z_base = F.linear(h_base[supervised], W_base)  # (N, Vb)
            return ivl_loss(z_base, self.network(z_base), labels[supervised], l1)
        return ivl_loss_from_hidden(h_base, W_base, *self.network.hidden_and_head(tokens), labels, l1)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> "ValueModel":
        """Load a folder that save_pretrained wrote; raises CheckpointError when it is no value network."""
        path = Path(path)
        info = read_info(path)
        if info["scheme"] != "probe":
            return cls(Llama.from_pretrained(path, dtype, device), info)
        with torch.device("meta"):
            probe = Probe(info["tokenizer"]["size"], info["probe_width"])
        shapes = {name: tuple(tensor.shape) for name, tensor in probe.state_dict().items()}
        probe.load_state_dict(read_tensors(path, shapes, False, dtype, device), assign=True)
        return cls(probe, info)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ivl.json beside an ordinary Llama checkpoint or, for a probe, a model.safetensors alone."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self.llamas:
            self.network.save_pretrained(path)
        else:
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.network.state_dict().items()}
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "ivl.json").write_text(json.dumps(self.info, indent=2) + "\n")


class ProxyDelta(nn.Module):
    """Proxy tuning (Section 2, Table 4): z_delta = z_expert - z_anti_expert, of a small model tuned and untuned.

    Nothing is trained for it, and it costs one more forward pass a token than a value network.
    It has what decoding uses of a ValueModel.
    """

    is_cascade = False

    def __init__(self, expert: Llama, anti_expert: Llama):
        super().__init__()
        self.expert, self.anti_expert = expert, anti_expert
        self.llamas = [expert, anti_expert]
        self.vocab_size = min(llama.config.vocab_size for llama in self.llamas)  # Vv: what both know

    @property
    def device(self) -> torch.device:
        return self.expert.device

    def forward(self, tokens: Tensor, base_logits: Tensor | None = None, cache: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T) -> z_delta (B, T, Vv)."""
        z_expert, z_anti_expert = [llama(tokens, own_cache)[..., :self.vocab_size]
                                   for llama, own_cache in zip(self.llamas, cache or [None, None])]
        return z_expert - z_anti_expert


def read_info(path: Path) -> dict:
    """What ivl.json says of the value network in a folder."""
    file = path / "ivl.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not file.is_file():
        raise CheckpointError(f"{path}: no ivl.json, so this is no value network; train.py writes one")
    info = read_json(file)
    try:
        if info["scheme"] not in SCHEMES:
            raise CheckpointError(f"{file}: scheme {info['scheme']!r} is not supported ({', '.join(SCHEMES)} are)")
        fits = (info["template"] in TEMPLATES and type(info["seed"]) is int
                and isinstance(info["bases"], list) and info["bases"]
                and all(is_unicode(base) and "\0" not in base for base in info["bases"])
                and info["tokenizer"].keys() >= {"size", "fingerprint"}
                and (info["scheme"] != "probe" or is_size(info["probe_width"]) and is_size(info["tokenizer"]["size"])))
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{file}: not the JSON that train.py writes") from None
    return info


def is_size(value) -> bool:
    return type(value) is int and 0 < value <= 2**24


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """How ivl.json names a tokenizer."""
    return {"size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint(tokenizer.vocab_size)}


def check_recorded(tokenizer: Tokenizer, info: dict, value: str) -> None:
    """Raise CheckpointError if the tokenizer beside a value network is not the one it was trained with."""
    if describe_tokenizer(tokenizer) != info["tokenizer"]:
        raise CheckpointError(f"{value}: its tokenizer.model is not the one that its ivl.json records")


def is_same_family(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether one vocabulary extends the other, as CodeLlama's 32016 extends Llama-2's 32000."""
    n = min(one.vocab_size, other.vocab_size)
    return one.fingerprint(n) == other.fingerprint(n)


def check_same_family(base_tokenizer: Tokenizer, value_tokenizer: Tokenizer, base: str, value: str) -> None:
    """Raise CheckpointError unless one vocabulary extends the other."""
    if not is_same_family(base_tokenizer, value_tokenizer):
        raise CheckpointError(f"{base} and {value} have unrelated vocabularies ({base_tokenizer.vocab_size} and "
                              f"{value_tokenizer.vocab_size} tokens), so they cannot be trained together; plugging one into "
                              "the other while decoding takes a vocabulary map, which sample.py makes")
