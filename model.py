"""Llama from scratch: configuration, layers, KV cache, and Hugging Face checkpoints in and out.

Mistral, Qwen2 and Qwen3 share its skeleton and are read too; their `if`s stand where they differ.

    python -c "from model import Llama; print(Llama.from_pretrained('out/seed0/tiny-s'))"

Submodules carry the names of Hugging Face checkpoints, so a state dict loads without renaming, and
what we save is read by transformers, vLLM and lm-eval as it is.

Shapes stand at the end of the lines that change them, in one alphabet for the whole repository (the
F with a dot is torch.nn.functional): B batch, T time (positions of this call), S positions in the
cache, D model width, H query heads, K key-value heads, F head width, V vocabulary (Vb the base's,
Vv the value network's, Vt a teacher's), N rows of a loss, P pairs (of answers, or of tokens in a
vocabulary map).
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from data.checkpoint import (
    ADAPTER,
    COMPUTED,
    check_weights,
    explain_mismatch,
    merge_adapter,
    tie_stored,
)
from data.checkpoint import read_config as read_config_json
from data.errors import UsageError

# --------------------------------------------------------------------------------------------------
# Configuration

# MLP's activation, by its name in torch.nn.functional. config.json records it, and a checkpoint
# that was trained with another is refused.
HIDDEN_ACT = "silu"


@dataclass
class LlamaConfig:
    """The architecture, in Hugging Face's own field names.

    data/checkpoint.py refuses impossible ones.
    """

    vocab_size: int  # V, the rows of lm_head; a tokenizer may know fewer tokens
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # K; fewer than H is grouped-query attention
    head_dim: int | None = None  # F; D / H unless the checkpoint says otherwise
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = None  # one or several, which end an answer
    model_type: str = "llama"  # or mistral, qwen2 (biases on q, k, v), qwen3 (norms on the heads)
    attention_bias: bool = False  # of a Llama or Qwen3: on q, k, v and o
    sliding_window: int | None = None  # attention is full up to here, and longer texts are refused

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """Read the dict of a config.json, in the spelling of transformers 4 or 5."""
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        # transformers 5 keeps theta and the scaling together, as rope_parameters.
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        if "rope_theta" in rope:
            fields["rope_theta"] = rope.pop("rope_theta")
        if "type" in rope:  # transformers 4.30
            rope.setdefault("rope_type", rope.pop("type"))
        # dynamic is as default up to max_position_embeddings, and nothing here goes beyond.
        fields["rope_scaling"] = (
            rope if rope.get("rope_type", "default") not in ("default", "dynamic") else None
        )
        return cls(**fields)

    def to_dict(self) -> dict:
        """The dict that save_pretrained writes, in transformers 4's spelling, which 5 reads too."""
        fixed = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "hidden_act": HIDDEN_ACT,
            "mlp_bias": False,
        }
        if self.sliding_window and self.model_type.startswith("qwen"):
            fixed |= {"use_sliding_window": True, "max_window_layers": 0}  # in every layer
        return fixed | asdict(self)


def read_config(path: str | Path) -> LlamaConfig:
    """The architecture of a checkpoint folder; UsageError where config.json is of another model."""
    return LlamaConfig.from_dict(read_config_json(path, HIDDEN_ACT))


# --------------------------------------------------------------------------------------------------
# Layers


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of head dimensions: (F/2,), float32, on the CPU."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = config.rope_theta ** (-even / config.head_dim)  # (F/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # llama3: waves that fit often into the original context stay, the long ones are slowed by
    # `factor`, and those between the two thresholds are blended.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def cos_and_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., F) by which `rotate` turns what stands at positions (...)."""
    angles = positions[..., None] * frequencies  # (..., F/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., F)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + F/2) of x (..., F) by the angles of cos_and_sin.

    Hugging Face weights are already permuted for this "rotate-half" pairing.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps): one kernel on a GPU, in fp32 within it."""
        weight = self.weight.to(x.dtype)  # under autocast the heads of q and k come in bfloat16
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.norms_heads = config.model_type == "qwen3"
        bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        bias = config.attention_bias
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        if self.norms_heads:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: "KVCache | None",
        layer: int,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); queries and keys are turned by cos and sin (1 or B, 1, T, F).

        mask (B, 1, T, S) says which keys each token may see; None: causal, or of a single token all
        that is stored.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, F)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, F)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, F)
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, F)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            enable_gqa=self.heads != self.kv_heads,
        )  # (B, H, T, F)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activation = getattr(F, HIDDEN_ACT)  # silu, which makes this SwiGLU
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_arguments)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything before lm_head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.window = config.sliding_window
        # A plain attribute, not a buffer: Module.to(bfloat16) would round a buffer, and far
        # positions with it.
        self.frequencies = rope_frequencies(config)
        # True saves memory in training: layers forget what they computed, and compute it again for
        # gradients.
        self.gradient_checkpointing = False

    def forward(
        self,
        tokens: Tensor | None = None,
        cache: "KVCache | None" = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T), or embeds (B, T, D) in their place -> hidden states (B, T, D)."""
        x = self.embed_tokens(tokens) if embeds is None else embeds  # (B, T, D)
        T = x.shape[1]
        length = T if cache is None else cache.used + T
        if self.window and length > self.window:
            raise UsageError(f"{length} tokens: this model's sliding_window is {self.window}")
        if cache is None:
            positions, mask = torch.arange(T, device=x.device)[None], None  # (1, T)
        else:
            positions, mask = cache.begin(T)  # (B, T), (B, 1, T, S)
        self.frequencies = self.frequencies.to(x.device)
        # (1 or B, 1, T, F) each, the same for all heads
        cos, sin = cos_and_sin(positions[:, None], self.frequencies)
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, cos, sin, mask, cache, index, use_reentrant=False
                )  # (B, T, D)
            else:
                x = layer(x, cos, sin, mask, cache, index)  # (B, T, D)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)


class Llama(nn.Module):
    """The Llama language model. Fresh weights unless it comes from from_pretrained."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # 0.02 everywhere, smaller where a layer writes into the residual stream, so that depth does
        # not add up.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.num_hidden_layers) if writes else 0.02
                nn.init.normal_(parameter, std=std)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor | None = None,
        cache: "KVCache | None" = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) of token ids, or embeds (B, T, D) -> logits (B, T, V): Eq. (1), of a base.

        With a cache the tokens continue each row at its own length, and the cache grows by T.
        """
        return self.lm_head(self.model(tokens, cache, embeds))

    def hidden_and_head(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> hidden states (B, T, D) and lm_head's weight (V, D), for fast/loss.py, which makes the logits itself."""
        return self.model(tokens), self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> "Llama":
        """Load config.json and safetensors from a folder; the weights keep their dtype unless one is given.

        Raises UsageError, naming the file or tensor, when anything is absent, left over or
        misshapen.
        """
        config = read_config(path)
        with without_weights():  # those that it would draw are about to be replaced
            llama = cls(config)
        load_weights(llama, Path(path), config.tie_word_embeddings, dtype, device)
        llama.tie()
        return llama.eval()

    def refuse_unsaved(self) -> None:
        """UsageError where from_pretrained would make another network of what save_pretrained writes."""
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied != self.config.tie_word_embeddings:
            raise UsageError(
                f"not saved: the config says tie_word_embeddings {self.config.tie_word_embeddings}, "
                f"but lm_head is {'tied' if tied else 'not tied'} to the embedding; change the config too"
            )
        with without_weights():
            said = {name: tensor.shape for name, tensor in Llama(self.config).state_dict().items()}
        found = {name: tensor.shape for name, tensor in self.state_dict().items()}
        odd = sorted(name for name, _ in said.items() ^ found.items())
        if odd:
            raise UsageError(
                f"not saved: {odd[0]} is {tuple(found.get(odd[0], ())) or 'absent'}, and by the config "
                f"{tuple(said.get(odd[0], ())) or 'absent'}; what loads it would make another network"
            )

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into a folder that need not exist yet.

        Raises UsageError, and writes nothing, where the config does not describe the weights.
        """
        self.refuse_unsaved()
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class SkipInit(TorchFunctionMode):
    """Within it torch.nn.init does nothing. On the meta device it would import torch's compiler, which takes long."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return options.get("tensor")
        return function(*arguments, **options)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Networks made within it have shapes, and neither memory nor random numbers for weights."""
    with torch.device("meta"), SkipInit():
        yield


def load_weights(
    network: nn.Module, path: Path, tied: bool, dtype: torch.dtype | None, device: str
) -> None:
    """Give a network, made on the meta device, exactly the weights in a folder's safetensors."""
    tensors = {}
    for file in check_weights(path, tied, dtype):
        with safe_open(file, framework="pt", device=str(device)) as shard:
            for name in shard.keys():
                if not COMPUTED.search(name):
                    # a copy: what safetensors hands out is the file itself, and changes with it
                    tensors[name] = shard.get_tensor(name).to(dtype=dtype, copy=True)
    if (path / ADAPTER[0]).exists():  # LoRA's
        merge_adapter(path, tensors)
    if tied:
        tie_stored(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError:
        explain_mismatch(path, shapes, tied)
        raise


# --------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of what was read, preallocated for `capacity` positions of `batch` rows.

    Rows may differ in length. Prompts of different length are fed padded on the right and then
    cropped to their true lengths; what comes next overwrites the padding.
    """

    def __init__(self, llama: Llama, batch: int, capacity: int):
        config = llama.config
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        # (layers, B, K, capacity, F)
        self.keys = torch.zeros(shape, dtype=llama.dtype, device=llama.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=llama.device)  # (B,)
        # What the host knows without asking the device: the longest row's length, and whether all
        # are as long.
        self.used, self.level = 0, True

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Before a pass over T tokens: their positions (B, T), and the mask (B, 1, T, S)."""
        if self.used + T > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} positions is full")
        self.place(T, self.used + T)
        if self.used == 0 or (self.level and T == 1):
            # No mask: of an empty cache plain causal is right, since padding comes last; with rows
            # of one length a single token sees all that is stored.
            return self.positions, None
        return self.positions, self.seen()[:, None]

    def place(self, T: int, stored: int) -> None:
        """Where in the cache T tokens go, and how many positions are read of it: S."""
        device = self.lengths.device
        self.stored = stored
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)

    def seen(self) -> Tensor:
        """Which of the stored keys each of the placed tokens may see: (B, T, S)."""
        return torch.arange(self.stored, device=self.lengths.device) <= self.positions[:, :, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, F) behind each row's length; return the layer's (B, K, S, F)."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, capacity, F)
        keys[self.rows, :, self.positions] = k.transpose(1, 2)  # at (B, T): (B, T, K, F)
        values[self.rows, :, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self.stored], values[:, :, : self.stored]

    def advance(self, T: int) -> None:
        self.lengths += T
        self.used += T

    def crop(self, lengths: Tensor | int) -> None:
        """Forget what lies beyond `lengths` (B,), or one for all: padding, or rejected drafts."""
        self.lengths.clamp_(max=lengths)
        if self.level and isinstance(lengths, int):  # nobody need ask the device
            self.used = min(self.used, lengths)
        else:
            self.look()

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by `rows (B',)`, in that order; a row named twice is forked."""
        self.keys, self.values, self.lengths = (
            self.keys[:, rows],
            self.values[:, rows],
            self.lengths[rows],
        )
        self.look()

    def look(self) -> None:
        shortest, self.used = torch.stack(self.lengths.aminmax()).tolist()
        self.level = shortest == self.used
