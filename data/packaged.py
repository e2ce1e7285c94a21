"""What data/smollm2.py and data/gemma.py share: a GGUF file out of a pip package becomes a Hugging Face folder.

python -m data.smollm2 out/smollm2-135m        python -m data.gemma out/gemma-3-270m
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data.errors import UsageError
from data.files import replacing
from data.tokenizer import load_tokenizer

# For a look at what the conversion does to a text; written for this purpose.
TEXT = """The library on the corner opens at nine. In winter its windows are lit before the street is awake, and the first readers are
already waiting: a retired engineer who follows the chess column, two students with an examination on Friday, and a
woman who is learning Portuguese because her granddaughter lives in Lisbon. Nobody speaks much. At eleven the sun reaches
the map of the world above the stairs, and for half an hour the Pacific Ocean is the brightest thing in the room."""

CONTROL, USER_DEFINED = 3, 4  # GGUF's kinds of token: without text, and found before all others


def find_package(name: str, install: str) -> Path:
    """Where a package lies. It is found, not imported; UsageError, with the command, if it or gguf is absent."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UsageError(f"this takes packages: {install}")
    return Path(package.origin).parent


def read_gguf(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The fields of a GGUF file, and its tensors in float32, by GGUF's names."""
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return fields, tensors


def hugging_face_name(name: str, of_layer: dict[str, str], outside: dict[str, str]) -> str:
    """The name of a tensor that GGUF calls blk.3.attn_q.weight, say."""
    if name in outside:
        return outside[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{of_layer[part]}.weight"


def config_from(fields: dict, fixed: dict, names: str) -> dict:
    """config.json: what is the same in the whole family, and GGUF's fields by lines of our name and theirs."""
    config = dict(fixed)
    for line in names.splitlines():
        ours, theirs = line.split()
        config[ours] = fields[theirs]
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # it was a float32
    return config


def write_folder(
    out: Path, config: dict, tokenizer: Tokenizer, about: dict, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the files of a checkpoint, all at once, its weights in bfloat16."""
    with replacing(out) as folder:
        folder.mkdir(parents=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in (("config", config), ("tokenizer_config", about)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        halved = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: is there already; delete it, or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)


def compare(file: Path, out: Path, text_cross_entropy: Callable, bos: bool = False) -> None:
    """What bfloat16 cost beyond GGUF's rounding: the cross-entropy on TEXT, by `text_cross_entropy` (run/show.py) and
    by transformers' own reading of the GGUF file."""

    def show(what: str, nats: float) -> None:
        print(f"{what}: {nats:.4f} nats a token (perplexity {math.exp(nats):.2f})", flush=True)

    ids = load_tokenizer(out).encode(TEXT, bos=bos)
    print(f"cross-entropy of a text of {len(ids)} tokens")
    for dtype in ("float32", "bfloat16"):
        show(f"bfloat16 weights computed in {dtype}", text_cross_entropy(out, ids, dtype))
    try:
        import accelerate  # noqa: F401 - transformers wants it for GGUF
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("(transformers and accelerate, if installed, would read the GGUF file here)")
        return
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        loss = theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    show("transformers' own reading of the GGUF file, in float32", loss.item())
