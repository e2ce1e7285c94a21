"""What people's files mean: checkpoints and data in the shape of public ones, beside the libraries
that made them.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from data.chat import ChatDataset, PairDataset, hold_out
from data.errors import UsageError
from data.records import Unusable, read_pair, read_turns
from data.tiny_world import World
from data.tokenizer import BYTE_OF, JsonTokenizer, SentencePieceTokenizer
from model import Llama
from sample import probabilities
from tests.helpers import small

TOKENS = torch.arange(40)[None] % 50


def logits_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return Llama.from_pretrained(folder)(TOKENS)


def theirs_of(folder) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def edit(file, **fields):
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


# ---- rotary settings

LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SETTLED = {  # what stands in config.json beside the rest
    "type and rope_type": {"rope_scaling": {"type": "default", "rope_type": "llama3"} | LLAMA3},
    "rope_type and type": {
        "rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}
    },
    "type alone": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "both dictionaries, which agree": {
        "rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 500.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
    "an empty dictionary and one": {
        "rope_scaling": {},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
    "theta beside the scaling": {
        "rope_theta": 700.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "two thetas": {
        "rope_theta": 700.0,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
}


@pytest.mark.parametrize("case", SETTLED)
def test_rotary_settings_are_read_as_transformers_reads_them(case, tmp_path):
    small().save_pretrained(tmp_path)
    plain = logits_of(tmp_path)
    edit(tmp_path / "config.json", **{"rope_theta": None, "rope_scaling": None} | SETTLED[case])
    ours = logits_of(tmp_path)
    assert (ours - plain).abs().max() > 0.01  # the settings count
    assert torch.allclose(ours, theirs_of(tmp_path), atol=1e-4)


@pytest.mark.parametrize(
    "scaling, parameters, theta",
    [
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 1e6}, None),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}, 1e4),
        ({"rope_type": "default"}, {"rope_type": "default", "rope_theta": 5e5}, 1e4),
    ],
)
def test_two_dictionaries_that_disagree_are_refused(scaling, parameters, theta, tmp_path):
    small().save_pretrained(tmp_path)
    edit(
        tmp_path / "config.json",
        rope_scaling=scaling,
        rope_parameters=parameters,
        rope_theta=theta,
    )
    with pytest.raises(UsageError, match="rope_scaling and rope_parameters disagree on"):
        Llama.from_pretrained(tmp_path)


# ---- weights


def adapter(folder, base, **changes) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter as peft does, without it, and give the weights of the base with it
    merged.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"}
    config |= {"base_model_name_or_path": str(base), "target_modules": ["q_proj", "up_proj"]}
    config |= changes
    scale = config["lora_alpha"] / (math.sqrt(4) if config.get("use_rslora") else 4)
    merged, tensors = load_file(base / "model.safetensors"), {}
    for layer in range(2):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            weight = merged[f"model.layers.{layer}.{name}.weight"]
            A, B = torch.randn(4, weight.shape[1]), torch.randn(len(weight), 4)
            weight += scale * B @ A
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


@pytest.mark.parametrize("place", ["beside", "alone", "alone, a sibling by name"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
def test_an_adapter_is_merged(place, changes, tmp_path):
    base = tmp_path / "base"
    small().save_pretrained(base)
    plain = logits_of(base)
    folder = base if place == "beside" else tmp_path / "adapter"
    merged = adapter(folder, base, **changes)
    if place == "alone, a sibling by name":
        edit(folder / "adapter_config.json", base_model_name_or_path="base")
    network = Llama.from_pretrained(folder)
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, merged[name], atol=1e-5), name
    assert (logits_of(folder) - plain).abs().max() > 0.01


@pytest.mark.parametrize("place", ["beside", "alone"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_merged_as_peft_does(place, rslora, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tmp_path / "base"
    small().save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_rslora=rslora, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    folder = base if place == "beside" else tmp_path / "adapter"
    model.save_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(logits_of(folder), model(TOKENS).logits, atol=2e-4)
        merged = model.merge_and_unload()
        assert torch.allclose(logits_of(folder), merged(TOKENS).logits, atol=2e-4)
    assert torch.allclose(
        logits_of(folder), theirs_of(folder), atol=2e-4
    )  # transformers merges too


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 8}, "r 8"),
        ({"base_model_name_or_path": "org/no-such-model"}, "its base is no folder here"),
        ({"base_model_name_or_path": None}, "its base is no folder here"),
    ],
)
def test_an_adapter_that_is_more_than_that_is_refused(changes, words, tmp_path):
    small().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base")
    edit(tmp_path / "adapter/adapter_config.json", **changes)
    with pytest.raises(UsageError, match=words):
        Llama.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight", "model.norm.weight"]
)
def test_an_adapter_of_other_tensors_is_refused(name, tmp_path):
    small().save_pretrained(tmp_path)
    adapter(tmp_path, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(4, 32)}, file)
    with pytest.raises(UsageError, match=name):
        Llama.from_pretrained(tmp_path)


def test_a_tied_checkpoint_may_store_its_one_matrix_under_either_name(tmp_path):
    network = small(tie_word_embeddings=True)
    network.save_pretrained(tmp_path)
    plain = logits_of(tmp_path)
    save_model(network, tmp_path / "model.safetensors")  # drops the name that it meets first
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(tmp_path), plain)
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.allclose(plain, theirs_of(tmp_path), atol=1e-4)


def test_weights_do_not_change_when_their_file_is_overwritten(tmp_path):
    small().save_pretrained(tmp_path)
    network = Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        before = network(TOKENS)
        file = tmp_path / "model.safetensors"
        with open(file, "r+b") as there:
            there.seek(4096)
            there.write(b"\0" * (file.stat().st_size - 4096))
        assert torch.equal(network(TOKENS), before)


# ---- what is held out


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(World(0).train_tokenizer())


def dataset_of(records: list, tokenizer, folder, kind=ChatDataset) -> ChatDataset:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return kind(file, tokenizer, "llama-2", 128)


def exchange(number: int, **more) -> dict:
    return {"question": f"q{number}", "answer": f"a{number}"} | more


def shuffled(records: list) -> list:
    return [records[int(at)] for at in torch.randperm(len(records), generator=torch.manual_seed(0))]


MIXTURES = {  # records of 20 sources, 50 of each
    "numbered in order": [exchange(n, id=f"source{n // 50}_{n % 50}") for n in range(1000)],
    "numbered, shuffled": shuffled(
        [exchange(n, id=f"source{n // 50}_{n % 50}") for n in range(1000)]
    ),
    "numbered through": [exchange(n, id=f"source{n // 50}_{n}") for n in range(1000)],
    "one id each": [exchange(n, id=f"source{n // 50}") for n in range(1000)],
    "small, shuffled": shuffled([exchange(n, id=f"source{n // 10}_{n % 10}") for n in range(1000)]),
    "small, some of each": [exchange(n, id=f"source{n // 10}_{7 * n}") for n in range(1000)],
}


@pytest.mark.parametrize("case", MIXTURES)
def test_no_source_is_held_out_whole(case, tokenizer, tmp_path):
    records = MIXTURES[case]
    dataset = dataset_of(records, tokenizer, tmp_path)
    for seed in range(3):
        train_on, held_out = hold_out(dataset, seed)
        assert len(held_out) == 16
        source = [record["id"].partition("_")[0] for record in records]
        assert {source[index] for index in held_out} <= {source[index] for index in train_on}
        assert "pieces" not in dataset.report(held_out)


@pytest.mark.parametrize("step", [1, 2, 17])  # by pieces, or by turns, as Vicuna cut ShareGPT
def test_pieces_of_a_conversation_stay_together_and_it_is_said(step, tokenizer, tmp_path):
    records = [exchange(n, id=f"c{n // 4}_{n % 4 * step}") for n in range(400)]
    dataset = dataset_of(records, tokenizer, tmp_path)
    train_on, held_out = hold_out(dataset, 0)
    assert not {index // 4 for index in held_out} & {index // 4 for index in train_on}
    assert "16 of those held out are pieces or copies of 4 conversations" in dataset.report(
        held_out
    )


def test_copies_stay_together_and_are_counted(tokenizer, tmp_path):
    records = [exchange(n % 100, id=f"x{n}") for n in range(300)]
    dataset = dataset_of(records, tokenizer, tmp_path)
    for seed in range(3):
        train_on, held_out = hold_out(dataset, seed)
        assert not {index % 100 for index in held_out} & {index % 100 for index in train_on}
    assert "200 are copies of others" in dataset.report()


def test_copies_of_a_piece_and_pairs(tokenizer, tmp_path):
    records = [exchange(n, id=f"c{n // 2}_{n % 2}") for n in range(200)]
    records += [exchange(n, id=f"other{n}") for n in range(0, 200, 2)]
    dataset = dataset_of(records, tokenizer, tmp_path)
    train_on, held_out = hold_out(dataset, 0)
    content = [record["question"] for record in records]
    assert not {content[index] for index in held_out} & {content[index] for index in train_on}
    pairs = [{"prompt": f"q{n % 50}", "chosen": "a", "rejected": f"b{n % 100}"} for n in range(200)]
    dataset = dataset_of(pairs, tokenizer, tmp_path, PairDataset)
    train_on, held_out = hold_out(dataset, 0)
    assert not {index % 50 for index in held_out} & {index % 50 for index in train_on}
    assert "100 are copies of others" in dataset.report()


def test_a_file_of_one_conversation_many_times_can_be_trained_on(tokenizer, tmp_path):
    dataset = dataset_of([exchange(0)] * 40, tokenizer, tmp_path)
    assert [len(part) for part in hold_out(dataset, 0)] == [36, 4]


# ---- reasoning

THOUGHTS = {  # what an assistant's turn is, its text "a", its thought "x\ny"
    "reasoning_content": {"content": "a", "reasoning_content": "x\ny"},
    "thinking, in lines": {"content": "\n\na", "thinking": "\nx\ny\n"},
    "a part": {
        "content": [{"type": "thinking", "thinking": "x\ny"}, {"type": "text", "text": "a"}]
    },
    "Gemini's": {"parts": [{"text": "x\ny", "thought": True}, {"text": "a"}]},
    "null beside": {"content": "a", "reasoning_content": "x\ny", "thinking": None},
}


def asked_twice(turn: dict, earlier: dict) -> dict:
    user = {"role": "user", "content": "q"}
    return {"messages": [user, earlier | {"role": "model"}, user, turn | {"role": "model"}]}


@pytest.mark.parametrize("case", THOUGHTS)
def test_reasoning_stands_before_the_last_answer_alone(case):
    record = asked_twice(THOUGHTS[case], {"content": "b"})
    kept, left_out = read_turns(record, "keep")
    assert kept[-1] == ("assistant", "<think>\nx\ny\n</think>\n\na") and not left_out
    kept, left_out = read_turns(record, "drop")
    assert kept[-1][1].strip() == "a" and left_out == "its reasoning"
    with pytest.raises(Unusable, match="--reasoning drop"):
        read_turns(record)
    kept, left_out = read_turns(asked_twice({"content": "b"}, THOUGHTS[case]), "keep")
    assert kept[1][1].strip() == "a" and kept[-1][1] == "b" and "earlier answers" in left_out


def test_of_pairs_both_sides_may_have_reasoning():
    sides = {
        side: {"role": "assistant", "content": side, "reasoning_content": "x"}
        for side in ("chosen", "rejected")
    }
    (chosen, rejected), _ = read_pair({"prompt": "q"} | sides, "keep")
    assert chosen[-1][1] == "<think>\nx\n</think>\n\nchosen"
    assert rejected[-1][1] == "<think>\nx\n</think>\n\nrejected"
    both, left_out = read_pair({"prompt": "q"} | sides, "drop")
    assert [turns[-1][1] for turns in both] == ["chosen", "rejected"]
    assert left_out == "its reasoning"


def with_thinking() -> JsonTokenizer:
    """All bytes as a tokenizer.json, with chatml's tokens, and <think> as Qwen3 has it: not special."""
    added = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokens = [
        {"id": 256 + at, "content": text, "special": at < 2, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for at, text in enumerate(added)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "vocab": BYTE_OF, "merges": []}
    raw = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": level, "decoder": level}
    return JsonTokenizer(json.dumps(raw | {"model": model}).encode(), {"eos": "<|im_end|>"})


def test_in_chatml_reasoning_is_learnt_between_its_tokens(tmp_path):
    tokenizer = with_thinking()
    file = tmp_path / "thoughts.jsonl"
    file.write_text(json.dumps(asked_twice(THOUGHTS["reasoning_content"], {"content": "b"})))
    ((ids, supervised),) = ChatDataset(file, tokenizer, "chatml", 512).rows(0)
    learnt = [id for id, on in zip(ids, supervised) if on]
    think, end, over = (tokenizer.specials[name] for name in ("<think>", "</think>", "<|im_end|>"))
    expected = [*tokenizer.encode("b"), over, think, *tokenizer.encode("\nx\ny\n"), end]
    assert learnt == [*expected, *tokenizer.encode("\n\na"), over]
    dropped = ChatDataset(file, tokenizer, "chatml", 512, reasoning="drop")
    ((ids, supervised),) = dropped.rows(0)
    assert think not in ids and "shortened 1 by its reasoning" in dropped.report()
    with pytest.raises(UsageError, match="--reasoning drop"):
        ChatDataset(file, tokenizer, "zephyr", 512)


# ---- sampling


@pytest.mark.parametrize("V", [5, 1000, 1001, 6000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nucleus_is_that_of_sorting_all(V, dtype):
    for scale in (0.0, 0.1, 1.0, 10.0):
        for top_p in (1e-6, 0.5, 0.9, 0.999, 0.9999999):
            logits = (torch.randn(3, V, generator=torch.manual_seed(V)) * scale).to(dtype)
            p = logits.float().softmax(-1)
            largest, tokens = torch.sort(p, dim=-1, descending=True, stable=True)
            before = largest.cumsum(-1, dtype=torch.float64) - largest
            expected = p.scatter(-1, tokens, largest.masked_fill(before >= top_p, 0))
            found = probabilities(logits, 1.0, top_p)
            assert torch.equal(found > 0, expected > 0)
            assert torch.allclose(found, expected / expected.sum(-1, keepdim=True))


def test_a_copy_of_a_folder_with_an_adapter_is_noticed(tmp_path):
    from data.checkpoint import digest_checkpoint, stamp

    small().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "adapter", tmp_path / "base")
    before = digest_checkpoint(tmp_path / "adapter"), stamp(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    edit(tmp_path / "other/adapter_config.json", lora_alpha=7)
    after = digest_checkpoint(tmp_path / "other"), stamp(tmp_path / "other")
    assert before[0] != after[0] and before[1] != after[1]
