"""What is wrong with a checkpoint folder, said in one line. model.py loads; this refuses and explains.

    python -c "from data.checkpoint import read_config; print(read_config('out/seed0/tiny-s'))"

`read_config` and `check_weights` refuse what must not be loaded; `explain_mismatch` is called where
loading has failed, and finds the tensor. All of them raise UsageError.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.chat import TEMPLATES
from data.errors import OtherArchitecture, UsageError
from data.files import base_folder, check_regular, digest, hub_hint, read_json, refuse_foreign
from data.records import is_unicode
from data.tokenizer import read_chat_template

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------------------
# Folders


def refuse_absent(path: Path) -> None:
    """UsageError unless it is a folder that can hold a checkpoint."""
    if not path.is_dir():
        raise UsageError(
            f"{path}: a file; name the folder that a checkpoint is in"
            if path.exists()
            else f"{path}: no such folder{hub_hint(path)}"
        )
    if hub_hint(path):
        raise UsageError(f"{path}: no checkpoint itself{hub_hint(path)}")


def name_of(path: Path) -> str:
    """What a checkpoint is called: its folder's name, or of a snapshot in Hugging Face's cache the model's."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


CHAT_MARKS = {  # what a template of each kind has, and what of that would make it another
    "llama-3": ("<|start_header_id|>", None),
    "llama-2": ("<<SYS>>", None),
    "mistral": ("[INST]", "<<SYS>>"),
    "chatml": ("<|im_start|>", None),
    "zephyr": ("<|user|>", "<|end|>"),  # Phi-3's turns end with that
}


def own_template(path: Path) -> str | None:
    """Which chat template a checkpoint's own chat_template looks like, or that it is none of ours; None where it has none."""
    text = read_chat_template(path)
    for name, (mark, unless) in CHAT_MARKS.items():
        if mark in text and (unless is None or unless not in text):
            return name
    if not text.strip():
        return None
    mark = re.search(r"<[^<>\s'{}]+>", text)
    return f"none of {', '.join(TEMPLATES)}" + (f" (it has {mark[0]})" if mark else "")


# ---------------------------------------------------------------------------------------------------------
# config.json

FAMILIES = {  # what transformers takes for a field that is not there, where it differs from a Llama
    "llama": {},
    "mistral": dict(
        num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072, eos_token_id=2
    ),
    "qwen2": dict(num_key_value_heads=32, max_position_embeddings=32768, bos_token_id=None),
    "qwen3": dict(
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, bos_token_id=None
    ),
}
UNSUPPORTED = {  # fields that change what a model computes, and the values that do not
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
}
KINDS = {  # of a field: what it must be
    "size": "a positive whole number of sensible size",
    "number": "a positive number",
    "ids": "a token id or a list of them",
    "switch": "true or false",
}
NEEDED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
]
FIELDS = dict.fromkeys(NEEDED, "size") | {  # what is read of a config.json
    "num_key_value_heads": "size",
    "head_dim": "size",
    "max_position_embeddings": "size",
    "rms_norm_eps": "number",
    "rope_theta": "number",
    "bos_token_id": "ids",
    "eos_token_id": "ids",
    "tie_word_embeddings": "switch",
    "attention_bias": "switch",
    "use_sliding_window": "switch",
}
MOST_LAYERS = 1000  # a network is built before its weights are looked at
ROPE = {
    "default": [],
    "linear": ["factor"],
    "dynamic": [],  # dynamic: as default up to max_position_embeddings
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def read_config(path: str | Path, hidden_act: str = "silu") -> dict:
    """The dict of a folder's config.json, if it describes a model that model.py can build.

    What the file leaves out is filled in as transformers does it. `sliding_window` is a number only
    where attention has a window, and `max_position_embeddings` then does not exceed it. hidden_act is
    the activation that MLP computes with (model.py, HIDDEN_ACT).
    """
    path = base_folder(Path(path))
    file = path / "config.json"
    if not file.exists():
        refuse_absent(path)
        refuse_other_weights(path)
        raise UsageError(f"{file}: not there; a checkpoint in the Hugging Face layout has one")
    raw = read_json(file)
    try:
        check_architecture(raw, hidden_act)
        raw = FAMILIES[raw["model_type"]] | raw
        check_numbers(raw)
        raw |= settle_rope(raw)
        raw |= settle_attention(raw)
    except UsageError as error:
        raise type(error)(f"{file}: {error}") from None
    if (path / "generation_config.json").is_file():
        raw["eos_token_id"] = more_ends(path / "generation_config.json", raw)
    return raw


def more_ends(file: Path, raw: dict) -> int | list[int] | None:
    """The tokens that end a text: config.json's, and those that generation_config.json names."""
    ends = []
    for ids in (raw.get("eos_token_id"), read_json(file).get("eos_token_id")):
        if ids is not None and not fits(ids, "ids"):
            raise UsageError(f"{file}: eos_token_id must be {KINDS['ids']}, not {ids!r}")
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    ends = list(dict.fromkeys(ends))
    return ends[0] if len(ends) == 1 else ends or None


def check_architecture(raw: dict, hidden_act: str) -> None:
    """A language model of a family that model.py builds, and not quantised."""
    for name in ["quantization_config", "compression_config"]:
        if raw.get(name) is not None:
            method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            raise UsageError(
                f"{name}: quantised weights ({method or 'of no named method'}) are not supported; "
                "take the checkpoint that they were made from"
            )
    for name in ["vision_config", "audio_config"]:
        if raw.get(name) is not None:
            raise UsageError(
                f"{name}: model_type {raw.get('model_type')!r} reads more than texts; "
                "take a language model"
            )
    if reason := why_foreign(raw, hidden_act):
        names = raw.get("architectures")
        if not isinstance(names, list) or not names:
            continues_texts = not raw.get("is_encoder_decoder")
        else:
            continues_texts = any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names)
        if not continues_texts:
            raise UsageError(
                f"{reason}, and this is no causal language model, which a base must be"
            )
        raise OtherArchitecture(
            f"{reason}; with transformers installed, sample.py takes it as a base"
        )


def why_foreign(raw: dict, hidden_act: str = "silu") -> str | None:
    """Why model.py cannot compute what a config.json describes; None where it can."""
    if raw.get("model_type") not in list(FAMILIES):
        return f"model_type is {raw.get('model_type')!r}; model.py reads {', '.join(FAMILIES)}"
    for name, supported in UNSUPPORTED.items():
        if raw.get(name) not in supported:
            return f"{name} {raw[name]!r} is not supported"
    its_own = raw.get("hidden_act") or "silu"  # what transformers takes where nothing is said
    if its_own != hidden_act:
        return f"hidden_act {its_own!r} is not supported, since MLP computes with {hidden_act!r}"
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    if isinstance(rope, dict):
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            return "rotary embeddings with a partial_rotary_factor are not supported"
        rope_type = rope.get("rope_type") or rope.get("type") or "default"  # 4.30 wrote "type"
        if not isinstance(rope_type, str) or rope_type not in ROPE:
            return f"rope_type {rope_type!r} is not supported ({', '.join(ROPE)} are)"
    return None


def fits(value, kind: str) -> bool:
    """Whether a value out of somebody's JSON is of one of KINDS."""
    if kind == "size":
        return type(value) is int and 0 < value <= 2**24
    if kind == "number":
        return type(value) in (int, float) and 0 < value < 1e30
    if kind == "switch":
        return type(value) is bool
    ids = value if isinstance(value, list) else [value]
    return all(type(id) is int and 0 <= id < 2**24 for id in ids)


def check_numbers(raw: dict) -> None:
    """Every field of FIELDS by itself, and heads that divide what they share."""
    for name, kind in FIELDS.items():
        if name in NEEDED and name not in raw:
            raise UsageError(f"{name} is missing")
        may_be_null = name not in NEEDED and kind != "number"
        if name not in raw or may_be_null and raw[name] is None:
            continue
        if not fits(raw[name], kind) or name == "num_hidden_layers" and raw[name] > MOST_LAYERS:
            raise UsageError(f"{name} must be {KINDS[kind]}, not {raw[name]!r}")
    heads, width = raw["num_attention_heads"], raw.get("head_dim")
    if width is None:
        if raw["hidden_size"] % heads:
            raise UsageError(
                f"hidden_size {raw['hidden_size']} is no multiple of num_attention_heads {heads}, "
                "and there is no head_dim"
            )
        width = raw["hidden_size"] // heads
    if width % 2:
        raise UsageError(f"head_dim {width} is odd; rotary embeddings turn pairs")
    kv_heads = raw.get("num_key_value_heads")
    if kv_heads is not None and heads % kv_heads:
        raise UsageError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )


def settle_rope(raw: dict) -> dict:
    """The rotary settings as rope_parameters alone; UsageError where two spellings disagree.

    transformers 5 obeys rope_scaling then, and drops all of rope_parameters, theta too. Of type and rope_type the second counts.
    """
    theta = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    found = []
    for name in ["rope_scaling", "rope_parameters"]:
        if raw.get(name) is not None and not isinstance(raw[name], dict):
            raise UsageError(f"{name} must be an object, not {raw[name]!r}")
        if raw.get(name):
            rope = {key: value for key, value in raw[name].items() if value is not None}
            found.append(theta | {"rope_type": rope.pop("type", "default")} | rope)
    if not found:
        return {}
    other, rope = found[0], found[-1]
    for key in sorted(other.keys() | rope.keys()):
        if other.get(key) != rope.get(key):
            raise UsageError(
                f"rope_scaling and rope_parameters disagree on {key} ({other.get(key)!r}, {rope.get(key)!r}); "
                "take one of the two out"
            )
    if not fits(rope.get("rope_theta", 1.0), "number"):
        raise UsageError(f"rope_theta must be a positive number, not {rope['rope_theta']!r}")
    for name in ROPE[rope["rope_type"]]:
        if not fits(rope.get(name), "number"):
            raise UsageError(
                f"rope_type {rope['rope_type']} needs a positive {name}, not {rope.get(name)!r}"
            )
    if rope["rope_type"] == "dynamic" and not fits(rope.get("factor", 1.0), "number"):
        raise UsageError(f"rope_type dynamic needs a positive factor, not {rope['factor']!r}")
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UsageError("rope_type llama3 needs high_freq_factor above low_freq_factor")
    return {"rope_scaling": None, "rope_parameters": rope}


def settle_attention(raw: dict) -> dict:
    """attention_bias and sliding_window as the family reads them, and max_position_embeddings within the window.

    A Mistral's window is in all layers. A Qwen's is in those of layer_types, or from max_window_layers on, where
    use_sliding_window says so; to be exact up to its length it makes no difference in which.
    """
    family, window, longest = raw["model_type"], None, raw.get("max_position_embeddings") or 2048
    if family == "mistral":
        window = raw["sliding_window"]
    elif family != "llama" and raw.get("use_sliding_window"):
        kinds, first = raw.get("layer_types"), raw.get("max_window_layers", 28)
        if isinstance(kinds, list):
            slides = "sliding_attention" in kinds
        else:
            slides = type(first) is not int or first < raw["num_hidden_layers"]
        window = raw.get("sliding_window", 4096) if slides else None
    if window is not None and not fits(window, "size"):
        raise UsageError(f"sliding_window must be a positive whole number, not {window!r}")
    bias = raw.get("attention_bias") is True and family in ("llama", "qwen3")
    return {
        "attention_bias": bias,
        "sliding_window": window,
        "max_position_embeddings": min(window or longest, longest),
    }


# ---------------------------------------------------------------------------------------------------------
# Weights

# Rotary frequencies, cosines and sines, which some conversions store and we compute.
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.\w+|rope\.freqs|rope_freqs(\.weight)?|freqs_cis|inv_freq|cos_cached|sin_cached)$"
)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_weights(path: Path, tied: bool, dtype: torch.dtype | None) -> list[Path]:
    """The safetensors files of a checkpoint, of which no more than the headers has been read.

    Refuses pickles, shards and index that disagree, quantised weights, mixed dtypes unless one is
    asked for, and an lm_head that differs from the embedding it is said to be tied to.
    """
    shards = find_shards(path)
    dtypes: set[str] = set()
    files: dict[str, Path] = {}  # of each tensor
    for file, promised in shards.items():
        with opened(file) as shard:
            names = {name for name in shard.keys() if not COMPUTED.search(name)}
            if promised is not None and names != promised:
                odd = min(names ^ promised)
                raise UsageError(
                    f"{file}: {odd} is {'not there' if odd in promised else 'not in the index'}"
                )
            for name in sorted(names):
                kind = shard.get_slice(name).get_dtype()
                if kind not in DTYPES:
                    raise UsageError(
                        f"{file}: {name} is {kind}; quantised weights are not supported"
                    )
                dtypes.add(DTYPES.get(kind, kind))
                files[name] = file
    if dtype is None and len(dtypes) > 1:
        raise UsageError(
            f"{path}: its tensors mix {' and '.join(sorted(dtypes))}; choose one with --dtype"
        )
    if tied and EMBEDDING in files and HEAD in files:
        with opened(files[EMBEDDING]) as one, opened(files[HEAD]) as other:
            same = torch.equal(one.get_tensor(EMBEDDING), other.get_tensor(HEAD))
        if not same:
            raise UsageError(
                f"{path}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
            )
    return list(shards)


def find_shards(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the tensor names that the index promises (None: no index)."""
    path = base_folder(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    present = set(path.glob("model-*-of-*.safetensors"))
    if not index.exists():
        if present:
            raise UsageError(
                f"{index}: not there, but {min(present).name} is; the shards need their index"
            )
        if not single.exists():
            refuse_other_weights(path)
            raise UsageError(f"{single}: not there, nor an index of shards")
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: no weight_map of tensor names to files")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in (".", ".."):
            raise UsageError(f"{index}: {file!r} is no name of a file beside it")
        names = shards.setdefault(path / file, set())
        if not COMPUTED.search(name):
            names.add(name)
    extra = (present | ({single} if single.exists() else set())) - shards.keys()
    missing = [file for file in sorted(shards) if not file.exists()]
    if missing and extra:
        raise UsageError(
            f"{index}: names {len(missing)} files that are not there, {missing[0].name} first, and not {min(extra).name}, "
            "which is: the index of another save?"
        )
    if missing:
        raise UsageError(f"{missing[0]}: not there, but {index.name} names it")
    if extra:
        raise UsageError(f"{min(extra)}: a file of weights that the index beside it does not name")
    return shards


OTHER_WEIGHTS = [  # what is not read, by the first file's name, and the way out
    (
        "pytorch_model*.bin",
        "only {}, which can run code when read; convert it once: "
        "LlamaForCausalLM.from_pretrained(path).save_pretrained(path) in transformers",
    ),
    (
        "adapter_*",
        "a LoRA adapter without an adapter_config.json and adapter_model.safetensors; merge it into its base "
        "once: merge_and_unload() in peft",
    ),
    (
        "model.*.safetensors*",
        "{} is a variant by its name, which is not read; rename it, and its index, without the "
        "variant: model.safetensors",
    ),
    ("*.gguf", "weights as GGUF ({}); convert them to safetensors in the Hugging Face layout"),
    (
        "*.pth",
        "weights as Meta's own pickles ({}); convert them to safetensors in the Hugging Face layout",
    ),
    ("*.pt", "weights as pickles ({}); convert them to safetensors in the Hugging Face layout"),
    ("*.bin", "weights as pickles ({}); convert them to safetensors in the Hugging Face layout"),
]


def refuse_other_weights(path: Path) -> None:
    """UsageError if there are weights of a kind that is not read."""
    for pattern, says in OTHER_WEIGHTS:
        if found := sorted(path.glob(pattern)):
            raise UsageError(f"{path}: {says.format(found[0].name)}")


# A LoRA adapter, in the folder of a whole model or in one of its own

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PLAIN = {  # fields that the names of its tensors do not show, and the values with which they are W + scale B A
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change W
}


def tie_stored(tensors: dict[str, torch.Tensor]) -> None:
    """A tied checkpoint stores one of the two, under either name: give it both."""
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if name in tensors:
            tensors.setdefault(other, tensors[name])


def merge_adapter(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add the adapter in a folder to the weights that it belongs to, as peft does."""
    file, weights = [path / name for name in ADAPTER]
    config = read_json(file)
    for name, allowed in PLAIN.items():
        if config.get(name) not in allowed:
            raise UsageError(
                f"{file}: {name} {config.get(name)!r} is more than W + scale B A; merge it once: merge_and_unload() in peft"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not fits(rank, "size") or not fits(alpha, "number"):
        raise UsageError(f"{file}: r {rank!r} and lora_alpha {alpha!r} must be positive numbers")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    with opened(weights) as shard:
        names = sorted(shard.keys())
        for name in names:
            one = re.fullmatch(
                r"base_model\.model\.(model\.layers\..+_proj)\.lora_([AB])\.weight", name
            )
            weight = tensors.get(f"{one[1]}.weight") if one else None
            if weight is None or name.replace("lora_A", "lora_B") not in names:
                raise UsageError(
                    f"{weights}: {name} belongs to none of the weights in {base_folder(path)}"
                )
            if one[2] == "B":
                A = shard.get_tensor(name.replace("lora_B", "lora_A")).float()  # (rank, inputs)
                B = shard.get_tensor(name).float().to(weight.device)  # (outputs, rank)
                if A.shape != (rank, weight.shape[1]) or B.shape != (len(weight), rank):
                    raise UsageError(
                        f"{weights}: {name} is {tuple(B.shape)}, for a weight of {tuple(weight.shape)} and r {rank}"
                    )
                tensors[f"{one[1]}.weight"] = weight + (scale * (B @ A.to(weight.device))).to(
                    weight.dtype
                )


def explain_mismatch(path: Path, shapes: dict[str, tuple], tied: bool) -> None:
    """Find the tensor for which a network of these shapes could not be loaded from a folder."""
    stored = {}  # of each tensor, its file and shape
    for file in find_shards(path):
        with opened(file) as shard:
            names = sorted(name for name in shard.keys() if not COMPUTED.search(name))
            refuse_prefixes(file, names, shapes)
            for name in names:
                stored[name] = file, tuple(shard.get_slice(name).get_shape())
    wanted, there = count_layers(shapes), count_layers(stored)
    if there and wanted != there:
        raise UsageError(
            f"{path / 'config.json'}: num_hidden_layers is {wanted}, but the weights are of {there} layers"
        )
    for name, (file, shape) in stored.items():
        if name not in shapes:
            raise UsageError(f"{file}: unexpected tensor {name}{family_hint(name)}")
        if shape != shapes[name]:
            raise UsageError(f"{file}: {name} is {shape}, config.json asks for {shapes[name]}")
    found = set(stored)
    if tied and found & {EMBEDDING, HEAD}:
        found |= {EMBEDDING, HEAD}
    missing = sorted(shapes.keys() - found)
    if missing:
        hint = family_hint(missing[0]) if all(map(family_hint, missing)) else ""
        raise UsageError(
            f"{path}: {missing[0]} is in none of its files ({len(missing)} of {len(shapes)} missing)"
            f"{hint}"
        )


def count_layers(names: Iterable[str]) -> int:
    """The layers that tensors of these names are of."""
    found = [re.match(r"model\.layers\.(\d{1,6})\.", name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def family_hint(name: str) -> str:
    """What to look at where a tensor that only some families have is left over or missing."""
    if re.search(r"\.[qkvo]_proj\.bias$|\.[qk]_norm\.weight$", name):
        return "; do model_type and attention_bias in config.json fit these weights?"
    return ""


WRAPPERS = {
    "_orig_mod.": "a model that torch.compile wrapped",
    "module.": "a model that DataParallel wrapped",
    "_fsdp_wrapped_module.": "a model that FSDP wrapped",
    "base_model.model.": "a model that peft wrapped",
    "_forward_module.": "a model that Lightning wrapped",
}


def refuse_prefixes(file: Path, names: list[str], shapes: dict[str, tuple]) -> None:
    """UsageError if every name is one of ours behind a prefix, which something around the model has left, or without its own."""
    if not names or names[0] in shapes:
        return
    if all(f"model.{name}" in shapes for name in names):
        raise UsageError(
            f"{file}: the weights of the trunk alone, without lm_head and `model.` in front of their names, as AutoModel "
            "saves them; save the causal language model, by AutoModelForCausalLM"
        )
    prefixes = {
        name.removesuffix(ours) for name in names[:1] for ours in shapes if name.endswith(ours)
    }
    for prefix in sorted(prefixes, key=len):
        if all(name.removeprefix(prefix) in shapes for name in names if name.startswith(prefix)):
            wrapper = next(
                (says for known, says in WRAPPERS.items() if known in prefix),
                "a wrapper around the model",
            )
            raise UsageError(
                f"{file}: its tensors are named {prefix}..., as by {wrapper}; save the model inside of it, or rename them"
            )


def digest_checkpoint(path: Path) -> str:
    """A hash of config, weights and tokenizer, by which another checkpoint in the same place is noticed."""
    beside = ("config.json", "tokenizer.model", "original/tokenizer.model", "tokenizer.json")
    files = [path / name for name in (*beside, *ADAPTER) if (path / name).is_file()]
    files = sorted(find_shards(path)) + files
    return hashlib.blake2b("".join(map(digest, files)).encode(), digest_size=16).hexdigest()


def stamp(path: Path) -> str:
    """A hash of the names, sizes and times of a folder's weights, by which weights trained anew are noticed without reading them."""
    files = sorted(find_shards(path)) + [path / name for name in ADAPTER if (path / name).is_file()]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()


@contextmanager
def opened(file: Path) -> Iterator:
    try:
        with safe_open(check_regular(file), framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as start:
            refuse_foreign(file, start.read(64))
        raise UsageError(f"{file}: truncated or not safetensors ({error})") from None


# ---------------------------------------------------------------------------------------------------------
# ivl.json


def read_value_info(path: str | Path, schemes: tuple[str, ...]) -> dict:
    """What ivl.json says of the value network in a folder."""
    path = Path(path)
    file = path / "ivl.json"
    if not file.exists():
        refuse_absent(path)
        raise UsageError(f"{path}: no ivl.json, so this is no value network; train.py writes one")
    info = read_json(file)
    if isinstance(info.get("scheme"), str) and info["scheme"] not in schemes:
        raise UsageError(
            f"{file}: scheme {info.get('scheme')!r} is not supported ({', '.join(schemes)} are)"
        )
    tokenizer = info.get("tokenizer")
    bases = info.get("bases")
    right = {
        "scheme": isinstance(info.get("scheme"), str),
        "template": info.get("template") in TEMPLATES,
        "seed": type(info.get("seed")) is int,
        "bases": isinstance(bases, list) and len(bases) > 0 and all(map(is_a_path, bases)),
        "tokenizer": isinstance(tokenizer, dict)
        and fits(tokenizer.get("size"), "size")
        and isinstance(tokenizer.get("fingerprint"), str),
        "system": isinstance(info.get("system", ""), str) and is_unicode(info.get("system", "")),
        "probe_width": info.get("scheme") != "probe" or fits(info.get("probe_width"), "size"),
        "plugged": isinstance(info.get("plugged", []), list)
        and all(map(is_a_path, info.get("plugged", []))),
    }
    for name, is_right in right.items():
        if not is_right:
            found = json.dumps(info[name])[:60] if name in info else "missing"
            raise UsageError(
                f"{file}: not the JSON that train.py writes: its field {name} is {found}"
            )
    return info


def is_a_path(value) -> bool:
    return (
        isinstance(value, str) and is_unicode(value) and "\0" not in value and 0 < len(value) < 4096
    )
