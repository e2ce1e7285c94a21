"""What is wrong with a checkpoint folder, said in one line. model.py loads; this refuses and explains.

    python -c "from data.checkpoint import read_config; print(read_config('out/seed0/tiny-s'))"

`read_config` and `check_weights` refuse what must not be loaded; `explain_mismatch` is called where
loading has failed, and finds the tensor. All of them raise UsageError.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.chat import TEMPLATES, is_unicode
from data.errors import UsageError, read_json

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------------------
# config.json

UNSUPPORTED = {  # fields that change what a Llama computes, and the values that do not
    "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"),
    "quantization_config": (None,), "partial_rotary_factor": (None, 1.0)}
NEEDED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
OPTIONAL = ["num_key_value_heads", "head_dim", "max_position_embeddings"]
ROPE = {"default": [], "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}


def read_config(path: str | Path) -> dict:
    """The dict of a folder's config.json, if it describes a Llama that model.py can build."""
    path = Path(path)
    file = path / "config.json"
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder")
    if not file.is_file():
        raise UsageError(f"{file}: not there; a checkpoint in the Hugging Face layout has one")
    raw = read_json(file)
    try:
        check_architecture(raw)
        check_numbers(raw)
        check_heads(raw)
        check_rope(raw)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return raw


def check_architecture(raw: dict) -> None:
    if raw.get("model_type") != "llama":
        raise UsageError(f"model_type is {raw.get('model_type')!r}; only 'llama' is supported")
    for name, supported in UNSUPPORTED.items():
        if raw.get(name) not in supported:
            raise UsageError(f"{name} {raw[name]!r} is not supported")
    for name in NEEDED:
        if name not in raw:
            raise UsageError(f"{name} is missing")


def check_numbers(raw: dict) -> None:
    """Sizes, ids and switches, each by itself."""
    sizes = NEEDED + [name for name in OPTIONAL if raw.get(name) is not None]
    for name in sizes:
        largest = 10_000 if name == "num_hidden_layers" else 2**24
        if type(raw[name]) is not int or not 0 < raw[name] <= largest:
            raise UsageError(f"{name} must be a positive whole number of sensible size, not {raw[name]!r}")
    for name in ["rms_norm_eps", "rope_theta"]:
        if name in raw and not is_positive(raw[name]):
            raise UsageError(f"{name} must be a positive number, not {raw[name]!r}")
    for name in ["bos_token_id", "eos_token_id"]:
        value = raw.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(id) is int and id >= 0 for id in ids):
            raise UsageError(f"{name} must be a token id or a list of them, not {value!r}")
    if type(raw.get("tie_word_embeddings", False)) is not bool:
        raise UsageError(f"tie_word_embeddings must be true or false, not {raw['tie_word_embeddings']!r}")


def check_heads(raw: dict) -> None:
    """Heads that divide what they share."""
    heads, width, kv_heads = raw["num_attention_heads"], raw.get("head_dim"), raw.get("num_key_value_heads")
    if width is None:
        if raw["hidden_size"] % heads:
            raise UsageError(f"hidden_size {raw['hidden_size']} is no multiple of num_attention_heads {heads}, "
                             "and there is no head_dim")
        width = raw["hidden_size"] // heads
    if width % 2:
        raise UsageError(f"head_dim {width} is odd; rotary embeddings turn pairs")
    if kv_heads is not None and heads % kv_heads:
        raise UsageError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")


def check_rope(raw: dict) -> None:
    """The scaling of rotary embeddings, in either spelling."""
    spelling = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    rope = raw.get(spelling)
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise UsageError(f"{spelling} must be an object, not {rope!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{spelling} with a partial_rotary_factor is not supported")
    if not is_positive(rope.get("rope_theta", 1.0)):
        raise UsageError(f"rope_theta must be a positive number, not {rope['rope_theta']!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # transformers 4.30 wrote "type"
    if not isinstance(rope_type, str) or rope_type not in ROPE:
        raise UsageError(f"rope_type {rope_type!r} is not supported (default, linear and llama3 are)")
    for name in ROPE[rope_type]:
        if not is_positive(rope.get(name)):
            raise UsageError(f"rope_type {rope_type} needs a positive {name}, not {rope.get(name)!r}")
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UsageError("rope_type llama3 needs high_freq_factor above low_freq_factor")


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


# ---------------------------------------------------------------------------------------------------------
# Weights

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
            names = set(shard.keys())
            if promised is not None and names != promised:
                odd = min(names ^ promised)
                raise UsageError(f"{file}: {odd} is {'not there' if odd in promised else 'not in the index'}")
            for name in sorted(names):
                kind = shard.get_slice(name).get_dtype()
                if kind not in DTYPES and not is_computed(name):
                    raise UsageError(f"{file}: {name} is {kind}; quantised weights are not supported")
                dtypes.add(DTYPES.get(kind, kind))
                files[name] = file
    if dtype is None and len(dtypes) > 1:
        raise UsageError(f"{path}: its tensors mix {' and '.join(sorted(dtypes))}; choose one with --dtype")
    if tied and EMBEDDING in files and HEAD in files:
        if not torch.equal(*(read_tensor(files[name], name) for name in (EMBEDDING, HEAD))):
            raise UsageError(f"{path}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
    return list(shards)


def find_shards(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the tensor names that the index promises (None: no index)."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    present = set(path.glob("model-*-of-*.safetensors"))
    if not index.exists():
        if present:
            raise UsageError(f"{index}: not there, but {min(present).name} is; the shards need their index")
        if not single.is_file():
            if any(path.glob("pytorch_model*.bin")):
                raise UsageError(f"{path}: only pytorch_model.bin, which can run code when read; convert it once: "
                                 "LlamaForCausalLM.from_pretrained(path).save_pretrained(path) in transformers")
            raise UsageError(f"{single}: not there, nor an index of shards")
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: no weight_map of tensor names to files")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UsageError(f"{index}: {file!r} is no name of a file beside it")
        shards.setdefault(path / file, set()).add(name)
    extra = (present | ({single} if single.exists() else set())) - shards.keys()
    if extra:
        raise UsageError(f"{min(extra)}: a file of weights that the index beside it does not name")
    for file in sorted(shards):
        if not file.is_file():
            raise UsageError(f"{file}: not there, but {index.name} names it")
    return shards


def explain_mismatch(path: Path, shapes: dict[str, tuple], tied: bool) -> None:
    """Find the tensor for which a network of these shapes could not be loaded from a folder."""
    found = set()
    for file in find_shards(path):
        with opened(file) as shard:
            for name in sorted(name for name in shard.keys() if not is_computed(name)):
                if name not in shapes:
                    raise UsageError(f"{file}: unexpected tensor {name}")
                shape = tuple(shard.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise UsageError(f"{file}: {name} is {shape}, config.json asks for {shapes[name]}")
                found.add(name)
    if tied and EMBEDDING in found:
        found.add(HEAD)
    missing = sorted(shapes.keys() - found)
    if missing:
        raise UsageError(f"{path}: {missing[0]} is in none of its files ({len(missing)} of {len(shapes)} missing)")


def is_computed(name: str) -> bool:
    """Early Llama-2 conversions also stored the rotary frequencies, which we compute."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


@contextmanager
def opened(file: Path) -> Iterator:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise UsageError(f"{file}: truncated or not safetensors ({error})") from None


def read_tensor(file: Path, name: str) -> torch.Tensor:
    with opened(file) as shard:
        return shard.get_tensor(name)


# ---------------------------------------------------------------------------------------------------------
# ivl.json


def read_value_info(path: str | Path, schemes: tuple[str, ...]) -> dict:
    """What ivl.json says of the value network in a folder."""
    path = Path(path)
    file = path / "ivl.json"
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder")
    if not file.is_file():
        raise UsageError(f"{path}: no ivl.json, so this is no value network; train.py writes one")
    info = read_json(file)
    try:
        if info["scheme"] not in schemes:
            raise UsageError(f"{file}: scheme {info['scheme']!r} is not supported ({', '.join(schemes)} are)")
        fits = (info["template"] in TEMPLATES and type(info["seed"]) is int
                and isinstance(info["bases"], list) and info["bases"]
                and all(is_unicode(base) and "\0" not in base for base in info["bases"])
                and info["tokenizer"].keys() >= {"size", "fingerprint"})
        if info["scheme"] == "probe":
            fits = fits and is_size(info["probe_width"]) and is_size(info["tokenizer"]["size"])
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(f"{file}: not the JSON that train.py writes")
    return info


def is_size(value) -> bool:
    return type(value) is int and 0 < value <= 2**24
