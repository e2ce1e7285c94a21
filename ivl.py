"""Inverse value learning: Eq. (3), the losses, and what can make a z_delta; at the end, a kernel.

    python train.py          # trains a value network on a frozen base by ivl_loss

A frozen base computes z_base, the logits of the next token. The value network computes z_delta, how
post-training changes them. Only the value network learns. Afterwards it is plugged into other bases
as it is. Read `combine`, `ivl_loss` and `ValueModel` first. The other losses and the Triton kernel
can wait.
"""

import json
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data.checkpoint import read_value_info
from data.errors import UsageError
from model import KVCache, Llama, load_weights, without_weights

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain formulas do all of it
    triton = None

SCHEMES = ("residual", "cascade", "cascade+", "probe")
Loss = tuple[Tensor, dict[str, Tensor]]  # a number to differentiate, and metrics to print

# --------------------------------------------------------------------------------------------------
# Eq. (3), Eq. (4), and three more losses


def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """Eq. (3): stop_gradient(z_base) + alpha * z_delta, for (..., Vb) and (..., Vv) -> (..., Vb).

    alpha is ours: 1 in the paper, 0 is the base alone. Where one vocabulary extends the other,
    z_delta is 0 on the tokens that it lacks, and what it has beyond Vb is dropped. (So the loss has
    it. While decoding, such tokens are never said, as one network cannot read them: Guided.post.)
    Logits of half precision are added in float32.
    """
    Vb, Vv = z_base.shape[-1], z_delta.shape[-1]
    if Vv > Vb:
        z_delta = z_delta[..., :Vb]
    elif Vv < Vb:
        z_delta = F.pad(z_delta, (0, Vb - Vv))
    return at_least_float(z_base.detach()) + alpha * at_least_float(z_delta)


def ivl_loss(
    z_base: Tensor, z_delta: Tensor, labels: Tensor, l1: float = 0.0, over: str = "supervised"
) -> Loss:
    """Eq. (4) with the norm of Section 4.2.1: CE(z_base + z_delta, labels) + l1 * mean |z_delta|.

    z_base (..., Vb), z_delta (..., Vv), labels (...) already shifted: row t's label is token t + 1.
    Rows whose label is -100 do not count. Any other label outside 0..Vb-1 is a ValueError.

    Both terms are means over the supervised rows, the norm also over the vocabulary. The paper
    writes the norm as a sum, but its lambda of 1.0 (Table 5) goes with a mean: its authors average
    over all positions, prompt and padding included. We average over the supervised positions,
    where the value network is used. With `over` "all" it is every row that is given.

    Returns the loss and {ce, l1, acc, base_ce, base_acc}, the last two being what the base alone
    would get: 0-dimensional tensors, 0 when no row is supervised. `kernel_loss` at the end of this
    file computes the same on a GPU.
    """
    supervised = labels != -100  # (...), N of them
    count = supervised.sum().clamp(min=1)  # a tensor: asking a GPU for its number makes it wait
    norm_of_all = at_least_float(z_delta).abs().mean() if over == "all" else None
    z_base = at_least_float(z_base.detach()[supervised])  # (N, Vb)
    z_delta = at_least_float(z_delta[supervised])  # (N, Vv)
    labels = labels[supervised]  # (N,)
    if ((labels < 0) | (labels >= z_base.shape[-1])).any():
        raise ValueError(f"a label outside 0..{z_base.shape[-1] - 1}, the vocabulary of the base")

    z_post = combine(z_base, z_delta)  # (N, Vb), Eq. (3)
    ce = F.cross_entropy(z_post, labels, reduction="sum") / count  # Eq. (4)
    norm = z_delta.abs().mean(-1).sum() / count if norm_of_all is None else norm_of_all
    # What to print. Of equal logits max takes the first, as argmax does, and is faster on a CPU.
    metrics = {
        "ce": ce.detach(),
        "l1": norm.detach(),
        "acc": (z_post.max(-1).indices == labels).sum() / count,
        "base_ce": F.cross_entropy(z_base, labels, reduction="sum") / count,
        "base_acc": (z_base.max(-1).indices == labels).sum() / count,
    }
    return (ce + l1 * norm if l1 else ce), metrics  # without lambda the norm needs no gradient


def pairwise_loss(z_base: Tensor, z_delta: Tensor, labels: Tensor, beta: float = 0.1) -> Loss:
    """Section 3.1's "pairwise optimization", as DPO: mean of -log sigmoid(r(chosen) - r(rejected)).

    z_base (2P, T, Vb), z_delta (2P, T, Vv), labels (2P, T) as in ivl_loss: P pairs, whose answers
    stand chosen, rejected, chosen, ... An answer's reward r is beta * (log p_post - log p_base),
    summed over its tokens, not averaged. DPO's policy is z_post. Its reference, for which DPO keeps
    a second model, is z_base, which is computed anyway. For a token y after a text s

        log p_post(y) - log p_base(y) = z_delta(y) - V(s),
        V(s) = log of the mean of exp z_delta under p_base.

    So z_delta is an action value Q(s, y); subtracting the state value V(s) leaves an advantage.
    beta times the sum of an answer's advantages is its implicit reward (Rafailov et al., 2024,
    which Section 2 cites).

    Returns the loss and {acc, margin}: the share of pairs whose chosen answer has the greater
    reward, and by how much on average. A pair whose chosen answer has no label is left out: such
    pairs only pad the parts of several processes.
    """
    supervised = labels != -100  # (2P, T), N of them
    z_base = at_least_float(z_base.detach()[supervised])  # (N, Vb)
    z_delta = at_least_float(z_delta[supervised])  # (N, Vv)
    z_post = combine(z_base, z_delta)  # (N, Vb), Eq. (3)
    # log p_post - log p_base of each token; a cross-entropy is -log p
    log_ratio = F.cross_entropy(z_base, labels[supervised], reduction="none")  # (N,)
    log_ratio = log_ratio - F.cross_entropy(z_post, labels[supervised], reduction="none")
    row = supervised.nonzero()[:, 0]  # (N,)
    reward = beta * log_ratio.new_zeros(len(labels)).index_add(0, row, log_ratio)  # (2P,)
    margin = reward[::2] - reward[1::2]  # (P,)
    margin = margin[supervised[::2].any(1)]
    count = max(1, len(margin))
    metrics = {"acc": (margin > 0).sum() / count, "margin": margin.detach().sum() / count}
    return -F.logsigmoid(margin).sum() / count, metrics


def distillation_loss(
    z_base: Tensor, z_delta: Tensor, z_teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Loss:
    """Section 3.1's "KL-based teacher-student distillation": mean of KL(p_teacher || p_post).

    z_base (..., Vb), z_delta (..., Vv), z_teacher (..., Vt). labels (...) only say which rows
    count: those that are not -100. Logits are divided by the temperature, and the loss multiplied
    by its square, which keeps the gradient's size. One vocabulary extends the other; tokens that
    base or teacher lacks are left out of both softmaxes.

    Returns the loss and {kl, base_kl, ce}: the KL at this temperature in nats, without that square;
    the same for z_base alone; and the cross-entropy of the labels at temperature 1, as in ivl_loss.
    """
    supervised = labels != -100  # (...), N of them
    count = max(1, int(supervised.sum()))
    z_base = at_least_float(z_base.detach()[supervised])  # (N, Vb)
    z_teacher = at_least_float(z_teacher.detach()[supervised])  # (N, Vt)
    z_post = combine(z_base, at_least_float(z_delta[supervised]))  # (N, Vb), Eq. (3)
    V = min(z_base.shape[-1], z_teacher.shape[-1])  # tokens that both have

    def log_p(z: Tensor) -> Tensor:
        return F.log_softmax(z[:, :V] / temperature, dim=-1)  # (N, V)

    log_teacher = log_p(z_teacher)
    p_teacher = log_teacher.exp()
    kl = (p_teacher * (log_teacher - log_p(z_post))).sum() / count
    base_kl = (p_teacher * (log_teacher - log_p(z_base))).sum() / count
    ce = F.cross_entropy(z_post.detach(), labels[supervised], reduction="sum") / count
    return temperature**2 * kl, {"kl": kl.detach(), "base_kl": base_kl, "ce": ce}


def reward_loss(
    z_base: Tensor, z_delta: Tensor, labels: Tensor, rewards: Tensor, beta: float = 0.0
) -> Loss:
    """Rewards in place of demonstrations: mean over answers of -advantage * log p_post(answer).

    z_base (Q * G, T, Vb), z_delta (Q * G, T, Vv), labels (Q * G, T) as in ivl_loss: G answers to
    each of Q questions, just sampled from z_post at temperature 1; rewards (Q, G). The advantage is
    an answer's reward less the mean of its group, the G answers to its question; log p is a sum
    over its tokens. One step a batch of samples, so there is no ratio of policies, and no clipping.
    In expectation the gradient is that of -reward times (G - 1) / G: the mean has the answer in it.

    GRPO divides advantages by their group's spread, and an answer's loss by its length. Both bias
    (Liu et al., 2025, "Understanding R1-Zero-Like Training"): the first favours questions that are
    nearly always or nearly never answered rightly, the second long wrong answers. We do neither.

    beta weighs KL(p_post || p_base), exact at each sampled token, and summed over an answer. z_base
    is here anyway: the reference costs no extra pass.

    Returns the loss and {reward, dead, length, drift}: the mean reward, the share of groups whose
    answers all earn the same, which teach nothing, an answer's tokens, and that KL in nats.
    """
    supervised = labels != -100  # (Q * G, T), N of them
    count = supervised.any(1).sum().clamp(min=1)  # answers
    z_base = at_least_float(z_base.detach()[supervised])  # (N, Vb)
    z_post = combine(z_base, z_delta[supervised])  # (N, Vb), Eq. (3)
    log_p = -F.cross_entropy(z_post, labels[supervised], reduction="none")  # (N,)
    advantages = rewards - rewards.mean(1, keepdim=True)  # (Q, G)
    row = supervised.nonzero()[:, 0]  # (N,)
    loss = -(advantages.flatten()[row] * log_p).sum() / count
    log_post, log_base = z_post.log_softmax(-1), z_base.log_softmax(-1)
    drift = (log_post.exp() * (log_post - log_base)).sum() / count
    metrics = {
        "reward": rewards.mean(),
        "dead": (rewards == rewards[:, :1]).all(1).float().mean(),
        "length": supervised.sum() / count,
        "drift": drift.detach(),
    }
    return (loss + beta * drift if beta else loss), metrics


def at_least_float(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32, in which sums are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# What can make a z_delta


class ValueModel(nn.Module):
    """A value network: a Llama or, in one scheme, a probe, whose output is read as z_delta.

    The schemes differ in what the network reads (Section 4.1, Figure 3a, Appendix A):
    residual   the text, so z_delta does not depend on the base
    cascade    at each position the base's prediction: the mean embedding by its probabilities
    cascade+   that plus the embedding of the token at the position
    probe      the base's logits at the position, and nothing before it

    `info` is what ivl.json holds: scheme, l1, template, bases, data, seed, steps, the tokenizer's
    size and fingerprint; where there is one, a probe's width, a system prompt, another loss, the
    value networks that were plugged in already.
    `llamas` need a KV cache while decoding.
    """

    def __init__(self, network: "Llama | Probe", info: dict | None = None):
        super().__init__()
        self.network = network
        self.info = {"scheme": "residual"} | (info or {})
        self.scheme = self.info["scheme"]
        self.llamas = [network] if isinstance(network, Llama) else []

    @property
    def vocab_size(self) -> int:
        """Vv, the number of logits."""
        return self.network.config.vocab_size if self.llamas else self.network.vocab_size

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward(
        self, tokens: Tensor, base_logits: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Eq. (2): tokens (B, T), and unless residual the base's logits (B, T, Vb) -> (B, T, Vv).

        `caches` holds a KVCache for each of `llamas`.
        """
        own_cache = caches[0] if caches else None
        if self.scheme == "residual":
            return self.network(tokens, own_cache)
        if base_logits is None:
            raise ValueError(f"scheme {self.scheme} reads the base's logits")
        if self.scheme == "probe":
            return self.network(base_logits)
        return self.network(cache=own_cache, embeds=self.embeds(tokens, base_logits))

    def embeds(self, tokens: Tensor, base_logits: Tensor) -> Tensor:
        """What a cascade reads, p_base W_e of Section 4.1; in cascade+ also h_embed. -> (..., D)

        base_logits are (..., Vb). W_e is the value network's own embedding. Base tokens that it
        lacks are left out of the softmax.
        """
        table = self.network.model.embed_tokens.weight  # (Vv, D)
        known = min(len(table), base_logits.shape[-1])
        p_base = F.softmax(base_logits.detach()[..., :known].float(), dim=-1)  # (..., known)
        embeds = p_base.to(table.dtype) @ table[:known]  # (..., D)
        embeds = embeds.to(table.dtype)  # autocast leaves bf16, in which all layers would go on
        if self.scheme == "cascade+":
            embeds = embeds + self.network.model.embed_tokens(tokens)
        return embeds

    def loss(
        self, base: Llama, tokens: Tensor, labels: Tensor, l1: float = 0.0, over: str = "supervised"
    ) -> Loss:
        """What ivl_loss returns, of tokens (B, T) and labels (B, T) on a frozen base."""
        with torch.no_grad():
            z_base = base(tokens)  # (B, T, Vb), Eq. (1)
        z_delta = self(tokens, z_base)  # (B, T, Vv), Eq. (2)
        return ivl_loss(z_base, z_delta, labels, l1, over)  # Eq. (4)

    def pair_loss(self, base: Llama, tokens: Tensor, labels: Tensor, beta: float = 0.1) -> Loss:
        """What pairwise_loss returns, of tokens and labels (2P, T), rows chosen, rejected, ...

        z_base is DPO's reference, also where training goes on from a value network.
        """
        with torch.no_grad():
            z_base = base(tokens)  # (2P, T, Vb)
        return pairwise_loss(z_base, self(tokens, z_base), labels, beta)

    def teacher_loss(
        self, base: Llama, tokens: Tensor, labels: Tensor, teacher: Llama, temperature: float = 1.0
    ) -> Loss:
        """What distillation_loss returns, of tokens and labels (B, T), with a teacher's logits."""
        with torch.no_grad():
            z_base, z_teacher = base(tokens), teacher(tokens)  # (B, T, Vb), (B, T, Vt)
        return distillation_loss(z_base, self(tokens, z_base), z_teacher, labels, temperature)

    def reward_loss(
        self, base: Llama, tokens: Tensor, labels: Tensor, rewards: Tensor, beta: float = 0.0
    ) -> Loss:
        """What the function reward_loss returns, of tokens and labels (Q * G, T) and rewards (Q, G)."""
        with torch.no_grad():
            z_base = base(tokens)  # (Q * G, T, Vb)
        return reward_loss(z_base, self(tokens, z_base), labels, rewards, beta)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> "ValueModel":
        """Load a folder that save_pretrained wrote; UsageError when it is no value network."""
        info = read_value_info(path, SCHEMES)
        if info["scheme"] != "probe":
            return cls(Llama.from_pretrained(path, dtype, device), info).eval()
        with without_weights():
            probe = Probe(info["tokenizer"]["size"], info["probe_width"])
        load_weights(probe, Path(path), False, dtype, device)
        return cls(probe, info).eval()

    def refuse_unsaved(self) -> None:
        """UsageError where save_pretrained would leave a weight out: it writes `network` alone."""
        for name in self.state_dict():
            if not name.startswith("network."):
                raise UsageError(f"not saved: {name} is in ValueModel, not in its network")
        if self.llamas:
            self.network.refuse_unsaved()

    def save_pretrained(self, path: str | Path) -> None:
        """Write an ordinary checkpoint (of a probe, model.safetensors alone), and ivl.json."""
        self.refuse_unsaved()
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self.llamas:
            self.network.save_pretrained(path)
        else:
            weights = self.network.state_dict()
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "ivl.json").write_text(json.dumps(self.info, indent=2) + "\n")


class Probe(nn.Module):
    """Appendix A.1: Llama's MLP, with biases, from the base's logits to z_delta.

    It never sees the text. The printed formula misplaces a bracket: down(silu(gate(x)) * up(x)) is
    meant. It starts at z_delta = 0. The paper does not give the inner width; as wide as Llama-2's
    vocabulary of 32000 it would have 3 billion weights.
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
        """base_logits (..., Vb) -> z_delta (..., Vv). Columns beyond Vv are not read.

        ValueError if Vb < Vv.
        """
        Vb = base_logits.shape[-1]
        if Vb < self.vocab_size:
            raise ValueError(f"a probe of {self.vocab_size} logits on a base of {Vb}")
        x = base_logits[..., : self.vocab_size].detach()
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    @property
    def device(self) -> torch.device:
        return self.down_proj.weight.device


class SumDelta(nn.Module):
    """A weighted sum of z_deltas: several value networks at once, or proxy tuning.

    Each is the logits of a Llama that reads the text alone, so they can be added up. Value networks
    should be made for each other (train.py --with). Proxy tuning (Section 2,
    Table 4) has weights 1 and -1: an expert and an anti-expert, one small model, tuned and untuned.
    It takes a model that was post-trained already. Each summand costs a forward pass a token.

    It has what decoding uses of a ValueModel; `names` of value networks say who decided on a token.
    """

    scheme = "residual"  # it reads the text alone

    def __init__(self, llamas: list[Llama], weights: list[float], names: list[str] = ()):
        super().__init__()
        self.llamas, self.weights, self.names = nn.ModuleList(llamas), weights, list(names)
        self.vocab_size = min(llama.config.vocab_size for llama in llamas)  # Vv: of all

    @property
    def device(self) -> torch.device:
        return self.llamas[0].device

    def forward(
        self, tokens: Tensor, base_logits: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """tokens (B, T) -> z_delta (B, T, Vv). `parts` keeps the summands, (B, T, Vv) each."""
        self.parts = []
        for llama, weight, cache in zip(
            self.llamas, self.weights, caches or [None] * len(self.llamas)
        ):
            z = llama(tokens, cache)[..., : self.vocab_size]
            self.parts.append(weight * at_least_float(z))
        return sum(self.parts[1:], self.parts[0])


class PluggedBase(nn.Module):
    """A frozen base with value networks plugged in already: z_base plus their z_deltas.

    A value network that is trained on it is made for those, and adds up with them.
    """

    def __init__(self, base: Llama, values: list[Llama]):
        super().__init__()
        self.base, self.values = base, nn.ModuleList(values)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, Vb)."""
        z = self.base(tokens)  # (B, T, Vb)
        for value in self.values:
            z = combine(z, value(tokens))
        return z


# --------------------------------------------------------------------------------------------------
# The same loss as a Triton kernel
#
# A GPU spends the loss on waiting for memory: eager PyTorch moves 66 to 78 bytes per pair of bf16
# logits (z_base, z_delta), the kernel 10. It reads every pair on the way forward and again on the
# way back (4 + 4 bytes), and writes a gradient (2).
#
# How to read Triton: the body runs once for every "program", here one per row, all at the same
# time. A variable is a number, or a block of BLOCK numbers that the threads of a program hold
# between them. A pointer plus a block of offsets is a block of addresses; `mask` says which of them
# exist, `other` what to read for those that don't.

STATS = 7  # numbers that the way forward keeps of a row: the five metrics, top and log of z_post

if triton is not None:

    @triton.jit
    def add_exp(top, total, z):
        """(top, total) with one more z, in each lane of a block.

        top is the largest z that the lane has seen, total the sum of exp(z - top), whose logarithm
        never overflows. If z is the new top, the total shrinks by exp(old top - z).
        """
        smaller = tl.exp(-tl.abs(z - top))
        return tl.maximum(top, z), tl.where(z > top, total * smaller + 1.0, total + smaller)

    @triton.jit
    def add_lanes(top, total):
        """The lanes put together: the largest z of all, and log(sum(exp(z))) less that.

        The two are not added up, as the logarithm would lose its digits.
        """
        highest = tl.max(top, 0)
        return highest, tl.log(tl.sum(total * tl.exp(top - highest), 0))

    @triton.jit
    def forward_kernel(
        z_base,
        z_delta,
        labels,
        stats,
        base_stride,
        delta_stride,
        Vb,
        Vv,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """One row's metrics, not yet divided, and what the way back needs of its softmax.

        The first four are pointers; a stride is how many numbers there are from one row to the
        next.
        """
        row = tl.program_id(0).to(tl.int64)  # 16745 rows of 128256 logits pass 2^31
        z_base += row * base_stride
        z_delta += row * delta_stride
        stats += row * 7
        columns = tl.arange(0, BLOCK)
        label = tl.load(labels + row)
        if label == -100:  # counts in nothing
            tl.store(stats + columns, tl.zeros([BLOCK], tl.float32), mask=columns < 7)
            return

        # The label's own logits. They win if all others are smaller, or as large and behind. A
        # label that the base has not makes loss and gradient of its row no number.
        known = (0 <= label) & (label < Vb)
        base_label = tl.load(z_base + label, mask=known, other=float("nan")).to(tl.float32)
        delta_label = tl.load(z_delta + label, mask=known & (label < Vv), other=0.0).to(tl.float32)
        post_label = base_label + delta_label

        # Every lane of a block adds up its own columns. The lanes are added up at the end. The
        # lowest number and not -inf: -inf - -inf is no number.
        lowest = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        nothing = tl.zeros([BLOCK], tl.float32)
        post_top, post_total, post_beaten = lowest, nothing, tl.zeros([BLOCK], tl.int32)
        base_top, base_total, base_beaten = lowest, nothing, tl.zeros([BLOCK], tl.int32)
        size = tl.zeros([BLOCK], tl.float32)  # of |z_delta|
        for block in tl.range(0, tl.cdiv(tl.maximum(Vb, Vv), BLOCK), num_stages=STAGES):
            column = block * BLOCK + columns
            # 0 beyond Vv, Eq. (3)
            delta = tl.load(z_delta + column, mask=column < Vv, other=0.0).to(tl.float32)
            base = tl.load(z_base + column, mask=column < Vb, other=-float("inf")).to(tl.float32)
            post = base + delta  # Eq. (3); -inf beyond Vb, so that exp makes it 0
            size += tl.abs(delta)

            post_top, post_total = add_exp(post_top, post_total, post)
            # "not less" and not "greater": what is no number beats the label, and then acc is 0
            post_loses = (post < post_label) | ((post == post_label) & (column >= label))
            post_beaten |= 1 - post_loses.to(tl.int32)
            base_top, base_total = add_exp(base_top, base_total, base)
            base_loses = (base < base_label) | ((base == base_label) & (column >= label))
            base_beaten |= 1 - base_loses.to(tl.int32)
        post_top, post_log = add_lanes(post_top, post_total)
        base_top, base_log = add_lanes(base_top, base_total)
        tl.store(stats, post_top - post_label + post_log)  # the cross-entropy, Eq. (4)
        tl.store(stats + 1, tl.sum(size, 0) / Vv)
        tl.store(stats + 2, 1.0 - tl.max(post_beaten, 0))
        tl.store(stats + 3, base_top - base_label + base_log)
        tl.store(stats + 4, 1.0 - tl.max(base_beaten, 0))
        tl.store(stats + 5, post_top)
        tl.store(stats + 6, tl.where(known, post_log, float("nan")))

    @triton.jit
    def backward_kernel(
        z_base,
        z_delta,
        labels,
        stats,
        gradient,
        d_ce,
        d_norm,
        base_stride,
        delta_stride,
        Vb,
        Vv,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """One row's gradient for z_delta: softmax(z_post) less the label, and the sign of z_delta.

        d_ce and d_norm point at one number each: the gradients of a row's cross-entropy and of one
        |z_delta|.
        """
        row = tl.program_id(0).to(tl.int64)
        z_base += row * base_stride
        z_delta += row * delta_stride
        gradient += row * Vv
        columns = tl.arange(0, BLOCK)
        label = tl.load(labels + row)
        if label == -100:
            for block in range(tl.cdiv(Vv, BLOCK)):
                column = block * BLOCK + columns
                tl.store(gradient + column, tl.zeros([BLOCK], tl.float32), mask=column < Vv)
            return

        post_top, post_log = tl.load(stats + row * 7 + 5), tl.load(stats + row * 7 + 6)
        ce_scale, norm_scale = tl.load(d_ce), tl.load(d_norm)
        for block in tl.range(0, tl.cdiv(Vv, BLOCK), num_stages=STAGES):
            column = block * BLOCK + columns
            delta = tl.load(z_delta + column, mask=column < Vv, other=0.0).to(tl.float32)
            base = tl.load(z_base + column, mask=column < Vb, other=-float("inf")).to(tl.float32)
            p_post = tl.exp(base + delta - post_top - post_log)
            slope = (p_post - (column == label).to(tl.float32)) * ce_scale
            sign = (delta > 0).to(tl.float32) - (delta < 0).to(tl.float32)  # 0 at 0, as in PyTorch
            # Both terms are added in fp32 and rounded once: norm_scale alone is nothing in fp16.
            tl.store(gradient + column, slope + sign * norm_scale, mask=column < Vv)


# Columns at a time; threads / 32 of a program, so that each thread has 8 columns, 16 bytes of bf16;
# and blocks under way at once: while one is added up, the next three are already being fetched.
# `python -m bench.loss --only settings` tries others.
BLOCK, WARPS, STAGES = 1024, 4, 4


def kernel_runs_on(z_base: Tensor, z_delta: Tensor) -> bool:
    """On CUDA tensors, and on CPU tensors where the process was started with TRITON_INTERPRET=1."""
    dtypes = {z_delta.dtype, z_base.dtype}
    return (
        triton is not None
        and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
        and (z_delta.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    )


def kernel_loss(z_base: Tensor, z_delta: Tensor, labels: Tensor, l1: float = 0.0) -> Loss:
    """ivl_loss by the kernel, with the norm over supervised rows. A wrong label makes the loss NaN.

    fast/loss.py takes it where `kernel_runs_on` says so; tests/interpreted_kernel.py compares them.
    """
    z_base = z_base.detach().flatten(0, -2)  # (N, Vb)
    z_delta = z_delta.flatten(0, -2)  # (N, Vv)
    labels = labels.flatten().contiguous()  # (N,)
    count = (labels != -100).sum().clamp(min=1)
    ce, norm, stats = KernelLoss.apply(z_base, z_delta, labels, count)
    metrics = dict(zip(["ce", "l1", "acc", "base_ce", "base_acc"], stats))
    return (ce + l1 * norm if l1 else ce), metrics


class KernelLoss(torch.autograd.Function):
    """Both kernels for autograd."""

    @staticmethod
    def forward(
        ctx, z_base: Tensor, z_delta: Tensor, labels: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if z_base.stride(1) != 1:
            z_base = z_base.contiguous()
        if z_delta.stride(1) != 1:
            z_delta = z_delta.contiguous()
        (N, Vb), Vv = z_base.shape, z_delta.shape[1]
        stats = torch.empty(N, STATS, device=z_delta.device)  # (N, 7)
        ctx.block = min(BLOCK, triton.next_power_of_2(max(Vb, Vv, 8)))  # stats has 7 columns
        with torch.cuda.device_of(z_delta):
            sizes = z_base.stride(0), z_delta.stride(0), Vb, Vv
            launch = dict(BLOCK=ctx.block, STAGES=STAGES, num_warps=WARPS)
            forward_kernel[(N,)](z_base, z_delta, labels, stats, *sizes, **launch)
        ctx.save_for_backward(z_base, z_delta, labels, stats, count)
        metrics = stats[:, :5].sum(0) / count  # (5,)
        ctx.mark_non_differentiable(metrics)
        return metrics[0].clone(), metrics[1].clone(), metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_ce: Tensor, d_norm: Tensor, _) -> tuple[None, Tensor, None, None]:
        z_base, z_delta, labels, stats, count = ctx.saved_tensors
        (N, Vb), Vv = z_base.shape, z_delta.shape[1]
        gradient = torch.empty(N, Vv, dtype=z_delta.dtype, device=z_delta.device)
        with torch.cuda.device_of(z_delta):
            tensors = z_base, z_delta, labels, stats, gradient, d_ce / count, d_norm / (count * Vv)
            sizes = z_base.stride(0), z_delta.stride(0), Vb, Vv
            launch = dict(BLOCK=ctx.block, STAGES=STAGES, num_warps=WARPS)
            backward_kernel[(N,)](*tensors, *sizes, **launch)
        return None, gradient, None, None
