"""model.py: parity with transformers, the KV cache, and checkpoints that must be refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import UsageError
from model import KVCache, Llama, LlamaConfig, read_config
from tests.helpers import small
from tests.make_golden import GOLDEN, SMALLER, STYLES, seeded, tokens_for


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- parity


@pytest.mark.parametrize("style", STYLES)
def test_logits_are_those_of_transformers(style):
    model = Llama.from_pretrained(GOLDEN / style)
    golden = load_file(GOLDEN / style / "golden_logits.safetensors")["logits"]
    with torch.no_grad():
        logits = model(tokens_for(model.config.vocab_size))
    assert relative_error(logits[:, ::10], golden) < 1e-4


def in_old_spelling(config: dict) -> dict:
    """A config.json of transformers 5 as transformers 4 would have written it."""
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    return config | {
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


@pytest.mark.parametrize("style", ["codellama", "llama-3.2", "linear"])
def test_both_spellings_of_the_config_mean_the_same(style, tmp_path):
    raw = json.loads((GOLDEN / style / "config.json").read_text())
    assert "rope_parameters" in raw
    old = in_old_spelling(json.loads(json.dumps(raw)))
    assert "rope_parameters" not in old
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(raw)
    with_type = old | {
        "rope_scaling": old["rope_scaling"]
        and {
            ("type" if key == "rope_type" else key): value
            for key, value in old["rope_scaling"].items()
        }
    }
    assert LlamaConfig.from_dict(with_type) == LlamaConfig.from_dict(raw)


def cached_logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Logits through a cache, of tokens in parts."""
    cache = KVCache(model, *tokens.shape)
    return torch.cat([model(part, cache) for part in tokens.split([40, 1, 1, 60, 48], dim=1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_logits_through_a_cache_are_those_of_transformers(style):
    model = Llama.from_pretrained(GOLDEN / style)
    golden = load_file(GOLDEN / style / "golden_logits.safetensors")["logits"]
    logits = cached_logits(model, tokens_for(model.config.vocab_size))
    assert relative_error(logits[:, ::10], golden) < 1e-4


# More of the families than there are golden files of, where transformers is installed.
FAMILIES = {
    "llama with biases, grouped": SMALLER | dict(attention_bias=True),
    "llama with biases, tied": SMALLER | dict(attention_bias=True, tie_word_embeddings=True),
    "mistral without a window": SMALLER | dict(model_type="mistral", sliding_window=None),
    "mistral, a longer window": SMALLER | dict(model_type="mistral", sliding_window=200),
    "mistral, a window as long": SMALLER | dict(model_type="mistral", sliding_window=150),
    "mistral, wide heads": SMALLER | dict(model_type="mistral", head_dim=12),
    "qwen2, plain heads": SMALLER | dict(model_type="qwen2", num_key_value_heads=4),
    "qwen2, grouped, tied": SMALLER | dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2, a window in every layer": SMALLER
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=150, max_window_layers=0),
    "qwen2, a window in one layer": SMALLER
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=150, max_window_layers=1),
    "qwen2, a window in no layer": SMALLER
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=2),
    "qwen3, plain heads": SMALLER | dict(model_type="qwen3", num_key_value_heads=4, head_dim=4),
    "qwen3, grouped, wide heads": SMALLER | dict(model_type="qwen3", head_dim=12),
    "qwen3, tied, wide heads": SMALLER
    | dict(model_type="qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3 with biases": SMALLER | dict(model_type="qwen3", head_dim=12, attention_bias=True),
}
ALL = STYLES | FAMILIES


@torch.no_grad()
@pytest.mark.parametrize("style", ALL)
def test_transformers_loads_what_we_save(style, tmp_path):
    transformers = pytest.importorskip("transformers")
    seeded(ALL[style]).save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert raw["model_type"] == ALL[style].get("model_type", "llama")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ["missing_keys", "unexpected_keys", "mismatched_keys"])
    assert type(theirs).__name__ == raw["architectures"][0]
    tokens = tokens_for(model.config.vocab_size)
    assert relative_error(model(tokens), theirs.eval()(tokens).logits) < 1e-4
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "theirs")


@torch.no_grad()
@pytest.mark.parametrize("style", FAMILIES)
def test_we_read_what_transformers_saves_cached_and_uncached(style, tmp_path):
    pytest.importorskip("transformers")
    theirs = seeded(FAMILIES[style])
    theirs.save_pretrained(tmp_path)
    model, tokens = Llama.from_pretrained(tmp_path), tokens_for(96)
    wanted = theirs(tokens).logits
    assert relative_error(model(tokens), wanted) < 1e-4
    assert relative_error(cached_logits(model, tokens), wanted) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("style", FAMILIES)
def test_bfloat16_rounds_no_more_than_transformers_does(style, tmp_path):
    """The mean distance of logits in bfloat16 from those in float32, ours and theirs."""
    pytest.importorskip("transformers")
    theirs, tokens = seeded(FAMILIES[style]), tokens_for(96)
    theirs.save_pretrained(tmp_path)
    exact = theirs(tokens).logits
    spread = (theirs.bfloat16()(tokens).logits.float() - exact).abs().mean()
    model = Llama.from_pretrained(tmp_path, torch.bfloat16)
    for logits in (model(tokens), cached_logits(model, tokens)):
        assert (logits.float() - exact).abs().mean() < 1.25 * spread


# What stands in a config.json, and what it means: absent fields are as transformers fills them in.
MEANINGS = {
    "mistral": (dict(model_type="mistral"), dict(sliding_window=4096, num_key_value_heads=8)),
    "mistral v0.3": (dict(model_type="mistral", sliding_window=None), dict(sliding_window=None)),
    "qwen2": (dict(model_type="qwen2", sliding_window=64), dict(sliding_window=None)),
    "qwen2, a window": (
        dict(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=1),
        dict(sliding_window=64, max_position_embeddings=64),
    ),
    "qwen2, layer types": (
        dict(
            model_type="qwen2",
            sliding_window=64,
            use_sliding_window=True,
            layer_types=["full_attention"] * 2,
        ),
        dict(sliding_window=None, max_position_embeddings=32768),
    ),
    "qwen3": (dict(model_type="qwen3"), dict(head_dim=128)),
    "mistral has no biases": (
        dict(model_type="mistral", attention_bias=True),
        dict(attention_bias=False),
    ),
    "llama has no window": (dict(model_type="llama", sliding_window=64), dict(sliding_window=None)),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_what_a_config_leaves_out_is_as_transformers_fills_it_in(case, tmp_path):
    settings, meant = MEANINGS[case]
    sizes = dict(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=32 if "qwen" in case else 8,
    )
    (tmp_path / "config.json").write_text(json.dumps(sizes | settings))
    config = vars(read_config(tmp_path))
    assert {name: config[name] for name in meant} == meant


@torch.no_grad()
def test_no_text_is_longer_than_the_window():
    model, tokens = small(model_type="mistral", sliding_window=16), torch.randint(50, (2, 17))
    model(tokens[:, :16])
    with pytest.raises(UsageError, match="17 tokens: this model's sliding_window is 16"):
        model(tokens)
    cache = KVCache(model, 2, 17)
    model(tokens[:, :16], cache)
    with pytest.raises(UsageError, match="17 tokens: this model's sliding_window is 16"):
        model(tokens[:, 16:], cache)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shards", ["one", "many"])
def test_we_load_what_transformers_saves(style, shards, tmp_path):
    pytest.importorskip("transformers")
    theirs = seeded(STYLES[style] | dict(vocab_size=77))
    theirs.save_pretrained(tmp_path, max_shard_size="7KB" if shards == "many" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "many")
    tokens = tokens_for(77)
    with torch.no_grad():
        assert relative_error(Llama.from_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-4


def test_sharded_and_single_file_are_the_same(tmp_path):
    sharded = Llama.from_pretrained(GOLDEN / "codellama")
    sharded.save_pretrained(tmp_path)
    single = Llama.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sharded.state_dict().values(), single.state_dict().values(), strict=True)
    )


def test_bfloat16_stays_and_a_wanted_dtype_is_had(tmp_path):
    small().to(torch.bfloat16).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Llama.from_pretrained(tmp_path, torch.float32).dtype == torch.float32


def test_casting_a_model_does_not_round_its_rotary_angles():
    model = small()
    exact = model.model.frequencies.clone()
    assert torch.equal(model.to(torch.bfloat16).model.frequencies, exact)


def test_a_tied_head_stays_tied(tmp_path):
    small(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = Llama.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = load_file(tmp_path / "model.safetensors")  # some programs write the head all the same
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    model = Llama.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stored_rotary_frequencies_are_skipped(tmp_path):
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        tmp_path / "model.safetensors",
    )
    Llama.from_pretrained(tmp_path)


def test_embeddings_can_stand_in_for_tokens():
    model, tokens = small(), torch.randint(50, (2, 7))
    assert torch.equal(model(tokens), model(embeds=model.model.embed_tokens(tokens)))


# ---- cache


@torch.no_grad()
def test_cached_is_uncached():
    model, tokens = small(), torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    cache = KVCache(model, 3, 20)
    parts = [model(part, cache) for part in tokens.split([9, 1, 1, 5, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_different_length_do_not_see_padding_or_rejected_tokens():
    model, tokens = small(), torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([3, 8, 5])
    cache = KVCache(model, 3, 24)
    model(tokens[:, :8], cache)
    cache.crop(lengths)
    assert cache.lengths.tolist() == [3, 8, 5] and cache.used == 8
    drafted = torch.randint(50, (3, 4))
    model(drafted, cache)  # four drafted tokens, of which 2, 0 and 4 are accepted
    cache.crop(lengths + torch.tensor([2, 0, 4]))
    last = model(tokens[:, 15:], cache)[:, -1]
    for row, (length, kept) in enumerate([(3, 2), (8, 0), (5, 4)]):
        alone = torch.cat((tokens[row, :length], drafted[row, :kept], tokens[row, 15:]))
        torch.testing.assert_close(last[row], model(alone[None])[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_can_be_reordered_and_forked():
    model, tokens = small(), torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model, 3, 8)
    model(tokens, cache)
    cache.select(torch.tensor([2, 0, 2]))
    following = torch.tensor([[1], [2], [3]])
    expected = model(torch.cat((tokens[[2, 0, 2]], following), 1))[:, -1:]
    torch.testing.assert_close(model(following, cache), expected, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    model = small()
    with pytest.raises(ValueError, match="full"):
        model(torch.zeros(1, 5, dtype=torch.long), KVCache(model, 1, 4))


# ---- checkpoints that must be refused


def edit_config(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in raw.items() if value != "absent"})
        )

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def truncate(name, keep):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def only_pytorch_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM, Q_BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
SINGLE = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: not there"),
    "config no JSON": (write("config.json", "{"), "config.json: not JSON"),
    "config no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
        "config.json: not JSON",
    ),
    "config too deep": (write("config.json", "[" * 100_000), "not JSON"),
    "huge layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "huge width": (edit_config(hidden_size=10**30), "hidden_size"),
    "huge eps": (edit_config(rms_norm_eps=10**400), "rms_norm_eps"),
    "eos": (edit_config(eos_token_id=[[2]]), "eos_token_id"),
    "bos": (edit_config(bos_token_id="1"), "bos_token_id"),
    "rope type a list": (edit_config(rope_scaling={"rope_type": ["llama3"]}), "rope_type"),
    "a folder": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors").mkdir(),
        ),
        "Is a directory",
    ),
    "config a list": (write("config.json", "[]"), "not a JSON object"),
    "another architecture": (
        edit_config(model_type="gpt_neox"),
        "'gpt_neox'; model.py reads llama, mistral, qwen2, qwen3; with transformers",
    ),
    "no architecture": (edit_config(model_type="absent"), "model_type is None"),
    "a field missing": (edit_config(hidden_size="absent"), "hidden_size is missing"),
    "negative": (edit_config(hidden_size=-32), "hidden_size must be a positive whole number"),
    "zero layers": (edit_config(num_hidden_layers=0), "num_hidden_layers"),
    "a fraction": (edit_config(vocab_size=50.5), "vocab_size"),
    "text for a number": (edit_config(num_attention_heads="4"), "num_attention_heads"),
    "true for a number": (edit_config(num_hidden_layers=True), "num_hidden_layers"),
    "heads do not divide": (edit_config(num_attention_heads=5, head_dim="absent"), "no multiple"),
    "groups do not divide": (edit_config(num_key_value_heads=3), "no multiple"),
    "odd head": (edit_config(head_dim=7), "odd"),
    "eps": (edit_config(rms_norm_eps=0), "rms_norm_eps"),
    "theta": (edit_config(rope_theta=-1), "rope_theta"),
    "tie": (edit_config(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "yarn": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    "scaling no object": (edit_config(rope_scaling=4), "rope_scaling"),
    "llama3 without factor": (edit_config(rope_scaling={"rope_type": "llama3"}), "factor"),
    "bias": (edit_config(attention_bias=True), "k_proj.bias is in none of its files"),
    "bias no switch": (edit_config(attention_bias="yes"), "attention_bias must be true or false"),
    "mlp bias": (edit_config(mlp_bias=True), "mlp_bias"),
    "activation": (edit_config(hidden_act="gelu"), "'gelu'"),
    "quantised": (edit_config(quantization_config={"bits": 4}), "quantised weights"),
    "gptq": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "(gptq)"),
    "awq": (edit_config(quantization_config={"quant_method": "awq"}), "(awq)"),
    "fp8": (edit_config(quantization_config={"quant_method": "fp8"}), "(fp8)"),
    "bitsandbytes": (
        edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised weights (bitsandbytes) are not supported; take the checkpoint",
    ),
    "qwen2 with a llama's tensors": (
        edit_config(model_type="qwen2"),
        "k_proj.bias is in none of its files (6 of 27 missing); do model_type and attention_bias",
    ),
    "qwen3 with a llama's tensors": (
        edit_config(model_type="qwen3"),
        "k_norm.weight is in none of its files (4 of 25 missing); do model_type",
    ),
    "llama with a qwen2's tensors": (
        edit_tensors(lambda tensors: tensors.update({Q_BIAS: torch.ones(32)})),
        f"unexpected tensor {Q_BIAS}; do model_type",
    ),
    "vision": (
        edit_config(model_type="qwen2_5_vl", vision_config={"depth": 32}),
        "vision_config: model_type 'qwen2_5_vl' reads more than texts",
    ),
    "encoder": (
        edit_config(model_type="bert", architectures=["BertForMaskedLM"]),
        "this is no causal language model",
    ),
    "encoder and decoder": (
        edit_config(model_type="t5", architectures="absent", is_encoder_decoder=True),
        "this is no causal language model",
    ),
    "experts": (edit_config(num_local_experts=8), "num_local_experts 8 is not supported; with tr"),
    "soft caps": (edit_config(final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not"),
    "partial rotary": (
        edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor are not supported; with transformers",
    ),
    "window": (
        edit_config(model_type="mistral", sliding_window="long"),
        "sliding_window must be a positive whole number",
    ),
    "truncated": (truncate("model.safetensors", 0.7), "model.safetensors: truncated"),
    "header truncated": (truncate("model.safetensors", 0.001), "model.safetensors: truncated"),
    "empty": (write("model.safetensors", ""), "model.safetensors: truncated"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors: not there",
    ),
    "only pytorch_model.bin": (only_pytorch_bin, "convert it"),
    "extra shard": (
        lambda folder: shutil.copy(
            folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"
        ),
        "index",
    ),
    "tensor missing": (edit_tensors(lambda tensors: tensors.pop(NORM)), NORM),
    "tensor unexpected": (
        edit_tensors(lambda tensors: tensors.update(odd=torch.ones(2))),
        "unexpected tensor odd",
    ),
    "wrong shape": (edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(31)})), "(31,)"),
    "mixed dtypes": (
        edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(32).half()})),
        "mix",
    ),
    "whole numbers": (
        edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)})),
        "quantised",
    ),
    "tied but different": (edit_config(tie_word_embeddings=True), "differs"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_bad_checkpoint_is_refused_with_the_reason(case, tmp_path):
    folder = tmp_path / "checkpoint"
    small().save_pretrained(folder)
    spoil, message = SINGLE[case]
    spoil(folder)
    with pytest.raises(UsageError) as caught:
        Llama.from_pretrained(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


INDEX = "model.safetensors.index.json"


def edit_index(change):
    def edit(folder):
        raw = json.loads((folder / INDEX).read_text())
        change(raw)
        (folder / INDEX).write_text(json.dumps(raw))

    return edit


SHARDED = {
    "shard missing": (
        lambda folder: (folder / "model-00002-of-00006.safetensors").unlink(),
        "model-00002-of-00006",
    ),
    "shard truncated": (
        truncate("model-00003-of-00006.safetensors", 0.5),
        "model-00003-of-00006.safetensors: truncated",
    ),
    "shard empty": (
        write("model-00003-of-00006.safetensors", ""),
        "model-00003-of-00006.safetensors: truncated",
    ),
    "shard extra": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00006.safetensors", folder / "model-00007-of-00007.safetensors"
        ),
        "model-00007-of-00007",
    ),
    "single file beside": (write("model.safetensors", ""), "model.safetensors: a file of weights"),
    "index no JSON": (write(INDEX, "{"), "not JSON"),
    "index to elsewhere": (
        edit_index(lambda raw: raw["weight_map"].update({NORM: "../other/model.safetensors"})),
        "'../other/",
    ),
    "index to a number": (
        edit_index(lambda raw: raw["weight_map"].update({NORM: 3})),
        "3 is no name",
    ),
    "index of names": (edit_index(lambda raw: raw.update(weight_map=["a"])), "no weight_map"),
    "index empty": (write(INDEX, "{}"), "no weight_map"),
    "index without a tensor": (
        edit_index(lambda raw: raw["weight_map"].pop(NORM)),
        f"{NORM} is not in the index",
    ),
    "index with another": (
        edit_index(lambda raw: raw["weight_map"].update(odd="model-00001-of-00006.safetensors")),
        "odd is not there",
    ),
}


@pytest.mark.parametrize("case", SHARDED)
def test_a_bad_sharded_checkpoint_is_refused_with_the_reason(case, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "codellama", folder)
    spoil, message = SHARDED[case]
    spoil(folder)
    with pytest.raises(UsageError) as caught:
        Llama.from_pretrained(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


PUBLISHED = {  # billions of parameters, of the shapes that the README's memory table names
    1.10: dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    6.74: dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    13.02: dict(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    ),
    1.24: dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    8.03: dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


@pytest.mark.parametrize("billions", PUBLISHED)
def test_sizes_are_the_published_ones(billions):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**PUBLISHED[billions]))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions
