"""Llama from scratch: configuration, layers, KV cache, and Hugging Face checkpoints in and out.

    python -c "from model import Llama; print(Llama.from_pretrained('out/seed0/tiny-s'))"

Submodules carry the names of Hugging Face checkpoints, so a state dict loads without renaming, and
what we save is read by transformers, vLLM and lm-eval as it is.

Shapes stand at the end of the lines that change them, in one alphabet for the whole repository:
B batch, T time (positions of this call), S positions in the cache, D model width, H query heads,
K key-value heads, F head width, V vocabulary (Vb the base's, Vv the value network's), N rows of a loss.
"""

import json
import math
import re
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message says which file, what is wrong, and what to do."""

    exit_status = 2


# ---------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class LlamaConfig:
    """The architecture, in Hugging Face's own field names. Impossible numbers raise CheckpointError."""

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
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        positive_integers = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                             "num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
        positive_integers += ["head_dim"] if self.head_dim is not None else []
        for name in positive_integers:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= (10_000 if name == "num_hidden_layers" else 2**24):
                raise CheckpointError(f"{name} must be a positive whole number of sensible size, not {value!r}")
        for name in ["rms_norm_eps", "rope_theta"]:
            if not is_positive(getattr(self, name)):
                raise CheckpointError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        for name in ["bos_token_id", "eos_token_id"]:
            value = getattr(self, name)
            ids = value if type(value) is list else [] if value is None else [value]
            if not all(type(id) is int and id >= 0 for id in ids):
                raise CheckpointError(f"{name} must be a token id or a list of them, not {value!r}")
        if type(self.tie_word_embeddings) is not bool:
            raise CheckpointError(f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise CheckpointError(f"hidden_size {self.hidden_size} is no multiple of "
                                      f"num_attention_heads {self.num_attention_heads}, and there is no head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                                  f"num_key_value_heads {self.num_key_value_heads}")
        self.rope_scaling = check_rope_scaling(self.rope_scaling)

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """Read the dict of a config.json, in the spelling of transformers 4 or 5; refuse what is not Llama."""
        if raw.get("model_type") != "llama":
            raise CheckpointError(f"model_type is {raw.get('model_type')!r}; only 'llama' is supported")
        unsupported = {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
                       "quantization_config": (None,), "partial_rotary_factor": (None, 1.0)}
        for name, supported in unsupported.items():
            if raw.get(name) not in supported:
                raise CheckpointError(f"{name} {raw[name]!r} is not supported")
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        for name, field in cls.__dataclass_fields__.items():
            if field.default is MISSING and name not in fields:
                raise CheckpointError(f"{name} is missing")
        if raw.get("rope_parameters") is not None:  # transformers 5 keeps theta and the scaling together
            rope = raw["rope_parameters"]
            if not isinstance(rope, dict):
                raise CheckpointError(f"rope_parameters must be an object, not {rope!r}")
            if rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise CheckpointError("rope_parameters with a partial_rotary_factor is not supported")
            fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        return cls(**fields)

    def to_dict(self) -> dict:
        """The dict that save_pretrained writes: the spelling of transformers 4, which transformers 5 reads too."""
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                 "attention_bias": False, "mlp_bias": False}
        return fixed | asdict(self)


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def check_rope_scaling(scaling: dict | None) -> dict | None:
    """Return the scaling with its type under the name rope_type, None for the default; refuse all others by name."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise CheckpointError(f"rope_scaling must be an object, not {scaling!r}")
    rope_type = scaling.get("rope_type", scaling.get("type"))  # "type" is how transformers 4.30 spelled it
    if rope_type == "default" or not scaling:
        return None
    needed = {"linear": ["factor"],
              "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
    if not isinstance(rope_type, str) or rope_type not in needed:
        raise CheckpointError(f"rope_type {rope_type!r} is not supported (default, linear and llama3 are)")
    for name in needed[rope_type]:
        if not is_positive(scaling.get(name)):
            raise CheckpointError(f"rope_type {rope_type} needs a positive {name}, not {scaling.get(name)!r}")
    if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise CheckpointError("rope_type llama3 needs high_freq_factor above low_freq_factor")
    return {"rope_type": rope_type} | {name: scaling[name] for name in needed[rope_type]}


# ---------------------------------------------------------------------------------------------------------
# Layers


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of head dimensions: (F/2,), float32, on the CPU."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = config.rope_theta ** (-half / config.head_dim)  # (F/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # llama3: waves that fit often into the original context stay, the long ones are slowed by `factor`,
    # and those between the two thresholds are blended.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def cos_and_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., F) by which `rotate` turns what stands at positions (...); sin's first half has its sign changed."""
    angles = positions[..., None] * frequencies  # (..., F/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + F/2) of x (..., F) by the angles of cos_and_sin.

    Hugging Face weights are already permuted for this "rotate-half" pairing.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps): one kernel on a GPU, in fp32 within it whatever x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (config.num_attention_heads, config.num_key_value_heads,
                                                    config.head_dim)
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "KVCache | None",
                layer: int) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, F)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, F)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, F)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, F)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.heads != self.kv_heads)  # (B, H, T, F)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


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
    """Everything before lm_head. Called by itself, it gives hidden states, so a loss need never hold all logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A plain attribute, not a buffer: Module.to(bfloat16) would round a buffer, and far positions with it.
        self.frequencies = rope_frequencies(config)
        self.gradient_checkpointing = False  # True: layers forget what they computed, and compute it again for gradients

    def forward(self, tokens: Tensor | None = None, cache: "KVCache | None" = None, embeds: Tensor | None = None
                ) -> Tensor:
        """tokens (B, T), or embeds (B, T, D) in their place -> hidden states (B, T, D)."""
        x = self.embed_tokens(tokens) if embeds is None else embeds  # (B, T, D)
        T = x.shape[1]
        if cache is None:
            self.frequencies = self.frequencies.to(x.device)
            (cos, sin), mask = cos_and_sin(torch.arange(T, device=x.device), self.frequencies), None  # (T, F)
        else:
            cos, sin, mask = cache.begin(T)
        if cache is not None and cache.weights and not torch.is_grad_enabled():
            x = self.decode(x, cos, sin, mask, cache)
        else:
            forgetful = self.gradient_checkpointing and torch.is_grad_enabled()
            for index, layer in enumerate(self.layers):
                arguments = x, cos, sin, mask, cache, index
                x = checkpoint(layer, *arguments, use_reentrant=False) if forgetful else layer(*arguments)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "KVCache") -> Tensor:
        """The layers once more, x (B, T, D) -> (B, T, D): the same operations without modules around them.

        A pass of a small network over a few tokens takes as long as its Python, and here there is half as much of it.
        Who changes Attention.forward or MLP.forward changes this, too. A layer with a part of another class, a bias or a
        hook is called as it is (cache.weights is None then).
        """
        B, T, D = x.shape
        K, width = cache.keys.shape[2], cache.keys.shape[4]
        x = x.reshape(B * T, D)
        cos, sin = cos.view(-1, T, 1, width), sin.view(-1, T, 1, width)  # (1 or B, T, 1, F)
        for layer, (norm, q_proj, k_proj, v_proj, o_proj, second_norm, gate, up, down) in enumerate(cache.weights):
            h = F.rms_norm(x, (D,), norm, self.norm.eps)  # (B T, D)
            heads = torch.cat((F.linear(h, q_proj), F.linear(h, k_proj)), dim=-1).view(B, T, -1, width)  # (B, T, H + K, F)
            heads = rotate(heads, cos, sin).transpose(1, 2)  # (B, H + K, T, F)
            v = F.linear(h, v_proj).view(B, T, K, width).transpose(1, 2)  # (B, K, T, F)
            keys, values = cache.append(layer, heads[:, -K:], v)  # (B, K, S, F)
            q = heads[:, :-K]  # (B, H, T, F)
            if T == 1:
                q = q.view(B, K, -1, width)  # heads that share keys stand in for positions, so that no key is copied for them
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None and T > 1,
                                               enable_gqa=q.shape[1] != K)  # (B, H, T, F)
            y = y.reshape(B, -1, T, width).transpose(1, 2).reshape(B * T, -1)  # (B T, H F)
            x = x + F.linear(y, o_proj)
            h = F.rms_norm(x, (D,), second_norm, self.norm.eps)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        return x.view(B, T, D)


class Llama(nn.Module):
    """The Llama language model. Fresh weights unless it comes from from_pretrained."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # 0.02 everywhere, smaller where a layer writes into the residual stream, so that depth does not add up.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if writes else 0.02)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor | None = None, cache: "KVCache | None" = None, embeds: Tensor | None = None
                ) -> Tensor:
        """tokens (B, T) of token ids, or embeds (B, T, D) -> logits (B, T, V).

        With a cache the tokens continue each row at its own length, and the cache grows by T.
        """
        return self.lm_head(self.model(tokens, cache, embeds))

    def hidden_and_head(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> hidden states (B, T, D) and lm_head's weight (V, D), for a loss that makes the logits itself."""
        return self.model(tokens), self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> "Llama":
        """Load config.json and safetensors from a folder; the weights keep their dtype unless one is given.

        Raises CheckpointError, naming the file or tensor, when anything is absent, left over or misshapen.
        """
        path = Path(path)
        config = read_config(path)
        with torch.device("meta"):  # no memory and no random numbers are spent on weights about to be replaced
            model = cls(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(read_tensors(path, shapes, config.tie_word_embeddings, dtype, device), assign=True)
        model.tie()
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into a folder that need not exist yet."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Keys and values of past positions, preallocated for `capacity` positions of `batch` rows.

    `lengths (B,)` lives on the device, and rows may differ: prompts of different length are fed padded on the
    right and then set to their true lengths; the next tokens overwrite the padding.

    A pass reads what is stored, up to the longest row, which the host knows as `used`, so nothing asks the device.
    With a `window` it reads that many positions whatever is stored, and finds its place by `lengths` alone: then
    it is the same operations on the same memory each time, which a GPU can record once and replay.
    """

    def __init__(self, model: Llama, batch: int, capacity: int):
        config = model.config
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)  # (layers, B, K, capacity, F)
        self.values = torch.zeros_like(self.keys)
        self.layers = self.by_layer()
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)  # (B,)
        cos, sin = cos_and_sin(torch.arange(capacity, device=model.device), model.model.frequencies.to(model.device))
        self.cos, self.sin = cos.to(model.dtype), sin.to(model.dtype)  # (capacity, F)
        self.weights = weights_of(model.model.layers)
        self.window: int | None = None
        self.set_lengths([0] * batch)

    def by_layer(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (B, K, capacity, F), in the same memory."""
        return [(self.keys[layer], self.values[layer]) for layer in range(len(self.keys))]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many positions of each row are stored."""
        self.lengths.copy_(torch.tensor(lengths))
        self.used, self.level = max(lengths), min(lengths) == max(lengths)  # level: all rows are equally long

    def check_room(self, T: int) -> None:
        if self.used + T > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} positions is full")

    def begin(self, T: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Before a pass over T tokens: cos and sin of their positions, (T, F) or (B, 1, T, F), and which stored keys each
        may see, (B, 1, T, S); None for all of them or, in an empty cache, plain causal."""
        self.check_room(T)
        device, end = self.lengths.device, self.used + T
        self.stored = end if self.window is None else self.window
        self.in_step = self.level and self.window is None
        if self.in_step and (T == 1 or self.used == 0):
            return self.cos[self.used:end], self.sin[self.used:end], None
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = torch.arange(self.stored, device=device) <= self.positions[:, :, None]  # (B, T, S)
        return self.cos[self.positions][:, None], self.sin[self.positions][:, None], mask[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, F) of this pass behind each row's length; return what it reads (B, K, S, F)."""
        keys, values = self.layers[layer]
        for store, new in ((keys, k), (values, v)):
            if self.in_step:
                store[:, :, self.used:self.stored] = new
            else:
                store.transpose(1, 2)[self.rows, self.positions] = new.transpose(1, 2)
        return keys[:, :, :self.stored], values[:, :, :self.stored]

    def advance(self, steps: int) -> None:
        self.lengths += steps
        self.used += steps

    def crop(self, lengths: Tensor | int) -> None:
        """Forget what lies beyond `lengths` (B,), or one length for all rows: padding, or rejected drafts."""
        if isinstance(lengths, int) and self.level:  # the host need not ask
            self.lengths.clamp_(max=lengths)
            self.used = min(self.used, lengths)
        else:
            self.set_lengths(torch.minimum(self.lengths, torch.as_tensor(lengths, device=self.lengths.device)).tolist())

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by `rows (B',)`, in that order; a row named twice is forked."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.layers = self.by_layer()
        self.lengths = self.lengths[rows]
        self.set_lengths(self.lengths.tolist())


def weights_of(layers: nn.ModuleList) -> list[tuple] | None:
    """What Trunk.decode reads of each layer; None if some layer is not as it stands above: sharded, or changed by you."""
    found = []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                 layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        usual = [Block, Attention, MLP, RMSNorm, *[nn.Linear] * 4, RMSNorm, *[nn.Linear] * 3]
        changed = [type(each) for each in (layer, attention, mlp, *parts)] != usual
        if changed or any(getattr(part, "bias", None) is not None or part._forward_hooks for part in parts):
            return None
        found.append(tuple(part.weight for part in parts))
    return found


# ---------------------------------------------------------------------------------------------------------
# Reading checkpoints


def read_json(file: Path) -> dict:
    """The JSON object in a file; CheckpointError if there is none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise CheckpointError(f"{file}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return raw


def read_config(path: str | Path) -> LlamaConfig:
    path = Path(path)
    file = path / "config.json"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not file.is_file():
        raise CheckpointError(f"{file}: not there; a checkpoint in the Hugging Face layout has one")
    raw = read_json(file)
    try:
        return LlamaConfig.from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def find_shards(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint, each with the tensor names that the index promises (None: no index)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    present = set(path.glob("model-*-of-*.safetensors"))
    if not index.exists():
        if present:
            raise CheckpointError(f"{index}: not there, but {min(present).name} is; the shards need their index")
        if not single.is_file():
            if any(path.glob("pytorch_model*.bin")):
                raise CheckpointError(f"{path}: only pytorch_model.bin, which can run code when read; convert it once: "
                                      "LlamaForCausalLM.from_pretrained(path).save_pretrained(path) in transformers")
            raise CheckpointError(f"{single}: not there, nor an index of shards")
        return {single: None}
    weight_map, shards = read_json(index).get("weight_map"), {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is no name of a file beside it")
        shards.setdefault(path / file, set()).add(name)
    extra = (present | ({single} if single.exists() else set())) - shards.keys()
    if extra:
        raise CheckpointError(f"{min(extra)}: a file of weights that the index beside it does not name")
    for file in sorted(shards):
        if not file.is_file():
            raise CheckpointError(f"{file}: not there, but {index.name} names it")
    return shards


# Early Llama-2 conversions also stored the rotary frequencies, which we compute.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_tensors(path: Path, shapes: dict[str, tuple], tied: bool, dtype: torch.dtype | None, device: str
                 ) -> dict[str, Tensor]:
    """Read exactly the tensors named in `shapes`, checking names both ways and each shape before its data are read."""
    tensors: dict[str, Tensor] = {}
    for file, promised in find_shards(path).items():
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                names = set(shard.keys())
                if promised is not None and names != promised:
                    odd = min(names ^ promised)
                    raise CheckpointError(f"{file}: {odd} is {'not there' if odd in promised else 'not in the index'}")
                for name in sorted(name for name in names if not COMPUTED.fullmatch(name)):
                    if name not in shapes:
                        raise CheckpointError(f"{file}: unexpected tensor {name}")
                    shape = tuple(shard.get_slice(name).get_shape())
                    if shape != shapes[name]:
                        raise CheckpointError(f"{file}: {name} is {shape}, config.json asks for {shapes[name]}")
                    tensor = shard.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise CheckpointError(f"{file}: {name} is {tensor.dtype}; quantised weights are not supported")
                    tensors[name] = tensor if dtype is None else tensor.to(dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or not safetensors ({error})") from None
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if tied and embedding in tensors:
        if head in tensors and not torch.equal(tensors[head], tensors[embedding]):
            raise CheckpointError(f"{path}: tie_word_embeddings is true, but {head} differs from {embedding}")
        tensors[head] = tensors[embedding]
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is in none of its files ({len(missing)} of {len(shapes)} missing)")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise CheckpointError(f"{path}: its tensors mix {' and '.join(dtypes)}; choose one with --dtype")
    return tensors
