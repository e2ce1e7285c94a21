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
from torch import Tensor

from data.chat import TEMPLATES, is_unicode
from data.tokenizer import Tokenizer
from model import CheckpointError, KVCache, Llama, read_json

SCHEMES = ("residual",)

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
# The value network


class ValueModel(nn.Module):
    """A Llama whose logits are read as z_delta (Section 4.1, the residual scheme).

    `info` is what ivl.json holds: scheme, l1, template, bases, data, seed, and the tokenizer's size and fingerprint.
    """

    def __init__(self, llama: Llama, info: dict | None = None):
        super().__init__()
        self.llama = llama
        self.info = {"scheme": "residual"} | (info or {})
        self.scheme = self.info["scheme"]

    def forward(self, tokens: Tensor, base_logits: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> z_delta (B, T, Vv). The residual scheme never looks at the base's logits."""
        return self.llama(tokens, cache)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> "ValueModel":
        """Load a folder that save_pretrained wrote; raises CheckpointError when it is no value network."""
        info = read_info(Path(path))
        if info["scheme"] not in SCHEMES:
            raise CheckpointError(f"{path}/ivl.json: scheme {info['scheme']!r} is not supported")
        return cls(Llama.from_pretrained(path, dtype, device), info)

    def save_pretrained(self, path: str | Path) -> None:
        """Write an ordinary Llama checkpoint and ivl.json."""
        self.llama.save_pretrained(path)
        (Path(path) / "ivl.json").write_text(json.dumps(self.info, indent=2) + "\n")


def read_info(path: Path) -> dict:
    """What ivl.json says of the value network in a folder."""
    file = path / "ivl.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not file.is_file():
        raise CheckpointError(f"{path}: no ivl.json, so this is no value network; train.py writes one")
    info = read_json(file)
    try:
        fits = (isinstance(info["scheme"], str) and info["template"] in TEMPLATES and type(info["seed"]) is int
                and isinstance(info["bases"], list) and info["bases"]
                and all(is_unicode(base) and "\0" not in base for base in info["bases"])
                and info["tokenizer"].keys() >= {"size", "fingerprint"})
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{file}: not the JSON that train.py writes") from None
    return info


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
