"""Inverse value learning: the value network, Eq. (3), and the loss.

    python -c "from ivl import ValueModel; print(ValueModel.from_pretrained('out/seed0/value-residual-tiny-s').info)"

A frozen base computes z_base, the logits of the next token. The value network computes z_delta, how post-training
changes them. Only the value network learns; afterwards it is plugged into other bases as it is.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data.chat import TEMPLATES, is_unicode
from data.tokenizer import Tokenizer
from model import CheckpointError, KVCache, Llama, read_json, read_tensors

SCHEMES = ("residual", "cascade", "cascade+", "probe")

# ---------------------------------------------------------------------------------------------------------
# Eq. (3) and Eq. (4)


def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """Eq. (3): stop_gradient(z_base) + alpha * z_delta, for z_base (..., Vb) and z_delta (..., Vv) -> (..., Vb).

    alpha is ours: 1 in the paper, 0 is the base alone. Where one vocabulary extends the other, z_delta is 0 on the
    tokens that it lacks, and what it has beyond Vb is dropped.
    """
    Vb, Vv = z_base.shape[-1], z_delta.shape[-1]
    z_delta = alpha * z_delta[..., :Vb]
    if Vv < Vb:
        z_delta = F.pad(z_delta, (0, Vb - Vv))
    return z_base.detach() + z_delta


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
    0-dimensional tensors, 0 when no row is supervised.
    """
    supervised = labels != -100
    labels = labels[supervised]  # (N,)
    z_delta = at_least_float(z_delta[supervised])  # (N, Vv)
    z_base = None if z_base is None else at_least_float(z_base[supervised])  # (N, Vb)
    z_post = z_delta if z_base is None else combine(z_base, z_delta)  # (N, Vb)
    if len(labels) and not 0 <= labels.min() <= labels.max() < z_post.shape[-1]:
        raise ValueError(f"a label outside 0..{z_post.shape[-1] - 1}, the vocabulary of the base")
    count = max(len(labels), 1)
    ce = F.cross_entropy(z_post, labels, reduction="sum") / count
    norm = z_delta.abs().mean(-1).sum() / count
    metrics = {"ce": ce, "l1": norm, "acc": (z_post.argmax(-1) == labels).sum() / count}
    if z_base is not None:
        metrics["base_ce"] = F.cross_entropy(z_base, labels, reduction="sum") / count
        metrics["base_acc"] = (z_base.argmax(-1) == labels).sum() / count
    # Without l1 the norm stays out of the graph; it would cost a pass over z_delta for a gradient of 0.
    return ce + l1 * norm if l1 else ce, {name: value.detach() for name, value in metrics.items()}


def at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def supervised_logits(model: Llama, tokens: Tensor, supervised: Tensor) -> Tensor:
    """Logits (N, V) of the N supervised positions of tokens (B, T) alone; a prompt's logits are never computed."""
    return model.lm_head(model.model(tokens)[supervised])


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

    def supervised(self, base: Llama, tokens: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
        """z_base (N, Vb) and z_delta (N, Vv) of the N supervised positions of tokens (B, T); z_base without gradient.

        Only a cascade needs the base's logits everywhere.
        """
        with torch.no_grad():
            everywhere = base(tokens) if self.is_cascade else None  # (B, T, Vb)
            z_base = supervised_logits(base, tokens, supervised) if everywhere is None else everywhere[supervised]
        if self.scheme == "probe":
            return z_base, self.network(z_base)
        return z_base, self.network.lm_head(self.hidden(tokens, everywhere)[supervised])

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


def check_same_family(base_tokenizer: Tokenizer, value_tokenizer: Tokenizer, base: str, value: str) -> None:
    """Raise CheckpointError unless one vocabulary extends the other, as CodeLlama's 32016 extends Llama-2's 32000."""
    n = min(base_tokenizer.vocab_size, value_tokenizer.vocab_size)
    if base_tokenizer.fingerprint(n) != value_tokenizer.fingerprint(n):
        raise CheckpointError(f"{base} and {value} have unrelated vocabularies ({base_tokenizer.vocab_size} and "
                              f"{value_tokenizer.vocab_size} tokens, different within the first {n}); plugging one into "
                              "the other takes a vocabulary map (vocab_map.py, not written yet)")
