"""Any causal language model that transformers can read (Gemma, Phi, OLMo, ...) as a base to decode with.

    pip install transformers
    python sample.py --base out/gemma-3-270m --value out/seed0/value-residual-smollm2-135m --prompt "What is the capital of Spain?"

Decoding asks little of a base: the logits of tokens that continue what a KVCache holds. The caches of
transformers cannot be cropped, selected and forked row by row. But its attention is a function that can be
replaced, and ours, `attend`, keeps keys and values in a KVCache. So Guided, MappedGuided and Hypotheses take
a Foreign where they take a Llama. A model that does something else besides, with states that are no keys and
values for instance, is found when it is loaded: its logits then differ from those by transformers' own attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.checkpoint import find_shards
from data.errors import UsageError
from model import KVCache, LlamaConfig

ATTENTION = "ivl"  # the name by which transformers finds `attend` and `may_see`


@dataclass
class MaySee:
    """Which keys a query may see, by windows and the like: (row, head, query, key) -> bool.

    transformers asks for a mask once a pass and kind of layer, and passes it on to the layers. This is what it
    gets, so that the first of them, in `attend`, applies the rule to positions that only the KVCache knows.
    """

    rule: Callable
    seen: Tensor | None = None  # (1 or B, 1, T, S)


def may_see(*sizes, mask_function: Callable, **others) -> MaySee:
    return MaySee(mask_function)


def attend(
    layer: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaySee,
    scaling: float | None = None,
    softcap: float | None = None,
    kv_cache: KVCache | None = None,
    **others,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it: q (B, H, T, F), k and v (B, K, T, F) -> (B, T, H, F)."""
    if others.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    B, H, T, _ = q.shape
    positions = torch.arange(T, device=q.device)[None]  # (1, T)
    if kv_cache is not None:
        positions = kv_cache.positions  # (B, T)
        k, v = kv_cache.append(layer.layer_idx, k, v)  # (B, K, S, F)
    if mask.seen is None:
        rows = torch.arange(B, device=q.device)[:, None, None, None]
        keys = torch.arange(k.shape[2], device=q.device)
        mask.seen = mask.rule(rows, rows[:1] * 0, positions[:, None, :, None], keys)
    if softcap is None:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.seen, scale=scaling, enable_gqa=H != k.shape[1]
        )  # (B, H, T, F)
    else:  # Gemma 2's
        k, v = [x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v)]  # (B, H, S, F)
        scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)  # (B, H, T, S)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask.seen, -torch.inf)
        y = scores.float().softmax(-1).to(v.dtype) @ v  # (B, H, T, F)
    return y.transpose(1, 2).contiguous(), None


class Foreign(nn.Module):
    """A model of transformers, with the members of model.Llama that decoding uses."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.raw = raw = network.config.get_text_config()
        heads = raw.num_attention_heads
        ends = getattr(network.generation_config, "eos_token_id", None)
        self.config = LlamaConfig(
            vocab_size=network.get_output_embeddings().weight.shape[0],
            hidden_size=raw.hidden_size,
            intermediate_size=0,  # of no use to who decodes
            num_hidden_layers=raw.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(raw, "num_key_value_heads", None) or heads,
            head_dim=getattr(raw, "head_dim", None) or raw.hidden_size // heads,
            max_position_embeddings=raw.max_position_embeddings,
            bos_token_id=raw.bos_token_id,
            eos_token_id=raw.eos_token_id if ends is None else ends,
        )

    def model(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D); with a cache they continue each row at its own length."""
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        if cache is not None:
            positions, _ = cache.begin(T)  # (B, T)
        hidden = self.network.get_decoder()(
            tokens, position_ids=positions, use_cache=False, kv_cache=cache
        ).last_hidden_state  # (B, T, D)
        if cache is not None:
            cache.advance(T)
        return hidden

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        logits, raw = self.network.get_output_embeddings()(hidden), self.raw
        if scale := getattr(raw, "logit_scale", None):  # Cohere's
            logits = logits * scale
        if scaling := getattr(raw, "logits_scaling", None):  # Granite's
            logits = logits / scaling
        if softcap := getattr(raw, "final_logit_softcapping", None):  # Gemma 2's
            logits = softcap * torch.tanh(logits / softcap)
        return logits

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V): Eq. (1)."""
        return self.lm_head(self.model(tokens, cache))

    @property
    def dtype(self) -> torch.dtype:
        return self.network.get_output_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.network.get_output_embeddings().weight.device

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> "Foreign":
        """A checkpoint's folder, of safetensors. No code that comes with it is run.

        Raises UsageError where transformers is absent, does not know the architecture or finds other tensors
        than it expects, and where the model computes something that is not foreseen here.
        """
        try:
            import transformers
        except ImportError:
            raise UsageError(
                f"{path}: this base takes transformers: pip install transformers"
            ) from None
        if (Path(path) / "adapter_config.json").exists():
            raise UsageError(
                f"{path}: a LoRA adapter; merge it into its base: merge_and_unload() in peft"
            )
        find_shards(Path(path))  # which refuses pickles
        transformers.AttentionInterface.register(ATTENTION, attend)
        transformers.AttentionMaskInterface.register(ATTENTION, may_see)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            network, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype or "auto",
                attn_implementation=ATTENTION,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            if error.args == (ATTENTION,):
                said = "its attention cannot be replaced"
            version = transformers.__version__
            raise UsageError(f"{path}: transformers {version} does not load it: {said}") from None
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loaded[kind]:
                name = sorted(map(str, loaded[kind]))[0]
                raise UsageError(f"{path}: {kind.replace('_keys', ' tensor')} {name}")
        kind = type(network).__name__
        try:
            base = cls(network.to(device))
            difference = base.difference()
        except (
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ) as error:
            said = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"{path}: {kind} is built in a way that is not supported: {said}"
            ) from None
        if not difference <= (1e-3 if base.dtype == torch.float32 else 0.1):
            raise UsageError(
                f"{path}: {kind} computes something that is not supported: logits differ by {difference:.2g} "
                "of the largest from those by transformers' own attention"
            )
        return base

    @torch.inference_mode()
    def difference(self, T: int = 24) -> float:
        """How far logits are from those by transformers' own attention, as a share of the largest.

        Of a whole text, and of two rows that go on behind a KVCache, each at its own length.
        """
        tokens = torch.arange(2 * T, device=self.device).view(2, T) * 7919 % self.config.vocab_size
        self.network.set_attn_implementation("eager")
        theirs = self.network(tokens, use_cache=False).logits  # (2, T, V)
        self.network.set_attn_implementation(ATTENTION)
        cache, half = KVCache(self, 2, 2 * T), T // 2
        self(tokens[:, :half], cache)
        cache.crop(torch.tensor([half, half - 5], device=self.device))
        rest = torch.stack([tokens[0, half:-5], tokens[1, half - 5 : -10]])  # (2, T / 2 - 5)
        ours = torch.cat([*self(tokens), *self(rest, cache)])
        theirs = torch.cat([*theirs, theirs[0, half:-5], theirs[1, half - 5 : -10]])
        worst = (
            (ours - theirs).abs().amax(-1).mean()
        )  # of each position; rounding may flip an expert
        return (worst / theirs.abs().max()).item()
