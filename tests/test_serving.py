"""beyond/serving.py: what vLLM is told and what is refused; with vLLM (slow), the texts of a guided base."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from beyond import serving
from beyond.serving_settings import check_vllm, fitting_jinja, jinja, jinja_ids, settle
from data.chat import encode_chat, with_system
from data.errors import UsageError
from data.tokenizer import TiktokenTokenizer, describe_tokenizer, load_tokenizer
from ivl import SumDelta, combine
from model import Llama, LlamaConfig
from sample import Guided, generate
from tests.helpers import ROOT, run
from tests.make_golden import GOLDEN, harmless_conversations, write_vendors_tokenizer

# ---- folders

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
)
SMALLER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "qwen3": {},
    "mistral": dict(sliding_window=16),
    "gemma3_text": dict(sliding_window=16, layer_types=WINDOWS),
}


def write_tokenizer(folder) -> None:
    """A small byte-level one, for chatml."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "json-bytes" / "tokenizer.json", folder)
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends | kind))


def scatter(network: nn.Module, seed: int) -> None:
    """Weights far from the initialisation, so that no part can hide."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)


def write_llama(folder, seed=0, **changes):
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    ends = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    network = Llama(LlamaConfig(**dict(vocab_size=tokenizer.vocab_size) | SHAPE | ends | changes))
    scatter(network, seed)
    network.save_pretrained(folder)
    return folder


def write_value(folder, seed=1, **changes):
    write_llama(folder, seed, **changes)
    info = dict(scheme="residual", template="chatml", seed=0, bases=["x"], system="Be brief.")
    info["tokenizer"] = describe_tokenizer(load_tokenizer(folder))
    (folder / "ivl.json").write_text(json.dumps(info))
    return folder


def write_foreign(folder, kind: str):
    """A base that transformers writes."""
    transformers = pytest.importorskip("transformers")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=0)
    settings = SHAPE | ids | FAMILIES[kind] | {"vocab_size": tokenizer.vocab_size}
    network = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings)
    )
    scatter(network, 0)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    return write_value(tmp_path_factory.mktemp("value"), **SMALLER)


# ---- Eq. (3)


class Head(nn.Module):
    """What compute_logits asks of a network: one weight as its head."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, width).bfloat16())

    def compute_logits(self, hidden):
        return hidden @ self.weight.T


def test_logits_are_eq_3_in_float32_over_vocabularies_that_are_padded_otherwise():
    torch.manual_seed(0)
    guided = serving.GuidedForCausalLM.__new__(serving.GuidedForCausalLM)
    nn.Module.__init__(guided)
    guided.base, guided.values = Head(40, 8), nn.ModuleList([Head(36, 4), Head(44, 6)])
    guided.widths = [8, 4, 6]
    guided.settings = types.SimpleNamespace(ivl_alphas=[1.0, -0.5], ivl_readable=35)
    hidden = torch.randn(5, 18).bfloat16()
    parts = hidden.split(guided.widths, -1)
    z_base, z_one, z_other = [
        head.compute_logits(part) for head, part in zip([guided.base, *guided.values], parts)
    ]
    expected = combine(combine(z_base, z_one.float()), z_other.float(), -0.5)[:, :35]
    found = guided.compute_logits(hidden)
    assert found.shape == (5, 40) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, :35], expected.float())
    assert (found[:, 35:] == -torch.inf).all()


# ---- chat templates


class Rendered:
    """A folder's tokenizer as transformers has it, of jinja2 and tokenizers alone."""

    def __init__(self, folder):
        import tokenizers

        config = json.loads((folder / "tokenizer_config.json").read_text())
        ends = {name: config.get(name) for name in ("bos_token", "eos_token")}
        self.ends = {
            name: end["content"] if isinstance(end, dict) else end for name, end in ends.items()
        }
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def apply_chat_template(self, messages, chat_template, return_dict):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(chat_template).render(messages=messages, **self.ends)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def write_case(case: str, folder) -> None:
    """A small tokenizer that speaks a template."""
    if case in ("mistral-v1", "mistral-v3", "mistral-tekken"):
        write_vendors_tokenizer(case, folder)
        return
    name = "json-pieces" if case in ("llama-2", "zephyr") else "json-bytes"
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    if case == "llama-3":
        raw = json.loads((folder / "tokenizer.json").read_text())
        names = ["begin_of_text", "start_header_id", "end_header_id", "eot_id"]
        first = max(raw["model"]["vocab"].values()) + 10
        raw["added_tokens"] += [
            raw["added_tokens"][0] | {"id": first + number, "content": f"<|{name}|>"}
            for number, name in enumerate(names)
        ]
        pattern = {"Regex": TiktokenTokenizer.pattern}  # which keeps the blank line apart
        cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps = [cut, spelled | {"use_regex": False}]
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (folder / "tokenizer.json").write_text(json.dumps(raw))


CASES = ["llama-2", "llama-3", "chatml", "zephyr", "mistral-v1", "mistral-v3", "mistral-tekken"]


@pytest.mark.parametrize("system", ["", 'Say "no" to {{ this }}.\nÉ 👍'])
@pytest.mark.parametrize("case", CASES)
def test_100_conversations_in_jinja_have_our_ids(case, system, tmp_path):
    write_case(case, tmp_path)
    tokenizer, theirs = load_tokenizer(tmp_path), Rendered(tmp_path)
    template = "mistral" if case.startswith("mistral") else case
    settings = types.SimpleNamespace(
        tokenizer=tokenizer, tokenizer_folder=tmp_path, template=template, system=system
    )
    text = fitting_jinja(settings, theirs)
    specials = ["<s>", "</s>", "<|"]  # which transformers finds in what people write
    harmless = [
        turns
        for turns in harmless_conversations()
        if not any(mark in str(turns) for mark in specials)
    ]
    assert len(harmless) >= 100
    for turns in harmless[:100]:
        asked = turns[:-1]
        ours = encode_chat(tokenizer, template, with_system(system, asked))[0]
        assert jinja_ids(theirs, text, asked) == ours, asked


def test_a_role_that_data_has_not_is_refused(tmp_path):
    write_case("chatml", tmp_path)
    text = jinja("chatml", "")
    with pytest.raises(Exception, match="raise_exception"):  # vLLM answers 400
        jinja_ids(Rendered(tmp_path), text, [("user", "Hi"), ("tool", "4")])


# ---- what is refused


def refusal(folder, *values, alphas=None) -> str:
    with pytest.raises(UsageError) as refused:
        settle(folder, list(values), alphas or [1.0] * len(values))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_is_refused_before_vllm_starts(base, value, tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent", value)
    assert "a value network, which is no base" in refusal(value, value)
    assert "2 numbers for 1 folders" in refusal(base, value, alphas=[1.0, 2.0])
    assert "no finite number" in refusal(base, value, alphas=[float("nan")])
    other = write_value(tmp_path / "other")
    info = json.loads((other / "ivl.json").read_text())
    for scheme in ("cascade", "cascade+", "probe"):
        more = {"scheme": scheme, "probe_width": 4}
        (other / "ivl.json").write_text(json.dumps(info | more))
        assert f"a {scheme} reads the base's logits" in refusal(base, other)
    (other / "ivl.json").write_text(
        json.dumps(info | {"tokenizer": {"size": 1, "fingerprint": "x"}})
    )
    assert "not the one that its ivl.json records" in refusal(base, other)
    shutil.copytree(GOLDEN / "json-pieces", other, dirs_exist_ok=True)
    assert "unrelated vocabularies" in refusal(base, other)
    seeing = shutil.copytree(base, tmp_path / "seeing")
    config = json.loads((seeing / "config.json").read_text())
    for change in ({"vision_config": {}}, {"architectures": ["Gemma3ForConditionalGeneration"]}):
        (seeing / "config.json").write_text(json.dumps(config | change))
        assert "no language model that reads texts alone" in refusal(seeing, value)


def test_settings_are_those_of_all_networks(base, value, tmp_path):
    short = write_value(tmp_path, max_position_embeddings=128, vocab_size=510)
    plain = shutil.copytree(base, tmp_path / "plain")  # no ivl.json, as in proxy tuning
    settings = settle(base, [short, value, plain], [1.0, 0.5, -1.0])
    assert (settings.longest, settings.readable) == (128, settings.tokenizer.vocab_size)
    assert settings.template == "chatml" and settings.system == "Be brief."
    assert settings.ends == [settings.tokenizer.eos_id]
    engine = settings.engine()
    assert engine["hf_overrides"]["ivl_alphas"] == [1.0, 0.5, -1.0]
    assert engine["tokenizer"] == str(short) and engine["max_model_len"] == 128


def test_vllm_absent_or_too_old_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="this takes vLLM: pip install vllm"):
        check_vllm(["LlamaForCausalLM"])
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.version", types.SimpleNamespace(__version__="0.9.2"))
    with pytest.raises(UsageError, match="vLLM 0.9.2 is too old"):
        check_vllm(["LlamaForCausalLM"])


def test_the_command_ends_in_one_line(base, tmp_path):
    done = run(ROOT, "-m beyond.serving --base", base, "--value", tmp_path / "absent")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "absent: no such folder" in done.stderr and "Traceback" not in done.stderr
    done = run(ROOT, "-m beyond.serving --base", base)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--value" in done.stderr


# ---- with vLLM: texts

NEW = 16


def some_prompts(settings, count: int = 16) -> list[list[int]]:
    """Longer than the windows of the bases that have one."""
    rng = random.Random(0)
    return [
        [rng.randrange(3, settings.readable) for _ in range(rng.randint(1, 60))]
        for _ in range(count)
    ]


def in_vllm(settings, prompts, **options) -> tuple[list[list[int]], dict[str, float]]:
    """Greedy texts behind token prompts, and vLLM's counters."""
    vllm = pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    serving.register()
    eager = dict(dtype="float32", seed=0, enforce_eager=True, disable_log_stats=False)
    llm = vllm.LLM(**settings.engine() | eager | options)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, stop_token_ids=settings.ends)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    texts = [list(out.outputs[0].token_ids) for out in llm.generate(asked, greedy, use_tqdm=False)]
    counted = {it.name: it.value for it in llm.get_metrics() if hasattr(it, "value")}
    del llm
    cleanup_dist_env_and_memory()
    return texts, counted


@pytest.fixture(autouse=True)
def vllm_environment(monkeypatch):
    """The model in this process, on one thread, with little room for keys and values."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


def in_ours(settings, prompts) -> list[list[int]]:
    """The same by generate. transformers computes bases that have a window, to beyond its length."""
    kind = json.loads((settings.base / "config.json").read_text())["model_type"]
    if kind in FAMILIES:
        from beyond.foreign import Foreign

        base = Foreign.from_pretrained(settings.base, torch.float32)
    else:
        base = Llama.from_pretrained(settings.base, torch.float32)
    llamas = [Llama.from_pretrained(path, torch.float32) for path in settings.values]
    guide = SumDelta(llamas, settings.alphas)
    guided = Guided(base, guide, readable=settings.readable)
    return generate(guided, prompts, max_new_tokens=NEW, stop_ids=set(settings.ends))


def assert_same(settings, **options) -> dict[str, float]:
    prompts = some_prompts(settings)
    theirs, counted = in_vllm(settings, prompts, **options)
    assert theirs == in_ours(settings, prompts)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(
    "shape",
    [{}, SMALLER, SMALLER | {"num_key_value_heads": 2}, dict(vocab_size=520)],
    ids=["the base's shape", "smaller", "as many keys, fewer heads", "a padded vocabulary"],
)
def test_texts_are_those_of_generate(shape, alpha, base, tmp_path):
    assert_same(settle(base, [write_value(tmp_path / "value", **shape)], [alpha]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_bases_of_other_families(kind, value, tmp_path):
    """A window of the base is not the value network's, nor are its two kinds of layers."""
    assert_same(settle(write_foreign(tmp_path / kind, kind), [value], [1.0]))


@pytest.mark.slow
def test_tied_heads_and_tokens_that_the_value_network_has_no_row_for(value, tmp_path):
    base = write_llama(tmp_path / "base", tie_word_embeddings=True, vocab_size=530)
    settings = settle(base, [value], [1.0])
    assert_same(settings)
    in_vllm(settings, [[525, 5, 6]])  # does not end the engine


@pytest.mark.slow
def test_sums_and_proxy_tuning(base, value, tmp_path):
    other = write_value(tmp_path / "other", seed=5)
    assert_same(settle(base, [value, other], [1.0, 0.5]))
    tuned, untuned = [write_llama(tmp_path / f"{seed}", seed, **SMALLER) for seed in (7, 8)]
    assert_same(settle(base, [tuned, untuned], [1.0, -1.0]))


@pytest.mark.slow
def test_compiled_networks_of_one_shape_do_not_take_each_others_code(base, tmp_path, monkeypatch):
    """The code names layers. A second start reads what the first one has kept."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    values = [write_value(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    for _ in range(2):
        assert_same(settle(base, values, [1.0, -0.5]), enforce_eager=False)


@pytest.mark.slow
def test_texts_that_are_thrown_out_and_read_again(base, value):
    """Little room for keys and values, prompts read in pieces, beginnings that are shared."""
    settings = settle(base, [value], [1.0])
    prompts = [some_prompts(settings)[0] * 8 + prompt for prompt in some_prompts(settings, 32)]
    prompts = [prompt[: 200 - NEW] for prompt in prompts]
    room = dict(block_size=32, num_gpu_blocks_override=14, max_num_batched_tokens=48)
    theirs, counted = in_vllm(settings, prompts, max_num_seqs=16, **room)
    assert theirs == in_ours(settings, prompts)
    assert counted["vllm:num_preemptions"] > 0, counted
    assert counted["vllm:prefix_cache_hits"] > 0, counted


# ---- with vLLM: a quantised base


def quantise(base, folder) -> None:
    """The base's linear layers in 8 bits, in the form of compressed-tensors, its head as it was."""
    shutil.copytree(base, folder)
    tensors, found = load_file(base / "model.safetensors"), {}
    for name, weight in tensors.items():
        if "proj" not in name:
            found[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127  # (out, 1)
        found[name] = (weight / scale).round().to(torch.int8)
        found[name + "_scale"] = scale
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    about = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = about | {"config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_a_quantised_base_does_not_quantise_the_value_network(base, value, tmp_path):
    """First tokens are the arg-max of what the quantised base says alone in vLLM, and z_delta."""
    quantise(base, tmp_path / "eight")
    settings = settle(tmp_path / "eight", [value], [1.0])
    prompts = some_prompts(settings, 32)
    said, _ = in_vllm(settings, prompts)
    log_p = log_p_in_vllm(tmp_path / "eight", prompts)  # (32, V)
    assert (log_p - log_p_in_vllm(base, prompts)).abs().max() > 0.01
    network = Llama.from_pretrained(value, torch.float32)
    with torch.inference_mode():
        z_delta = torch.stack([network(torch.tensor([prompt]))[0, -1] for prompt in prompts])
    post = combine(log_p, z_delta)[:, : settings.readable]
    assert [text[0] for text in said] == post.argmax(-1).tolist()


def log_p_in_vllm(folder, prompts) -> torch.Tensor:
    """What a base alone says behind prompts, (prompts, V)."""
    vllm = pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_logprobs=-1, seed=0)
    all_of_them = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    rows = [it.outputs[0].logprobs[0] for it in llm.generate(asked, all_of_them, use_tqdm=False)]
    del llm
    cleanup_dist_env_and_memory()
    return torch.tensor([[row[id].logprob for id in range(len(row))] for row in rows])


# ---- with vLLM: the server


def post(port: int, path: str, body) -> tuple[int, dict]:
    """Status and JSON that the server answers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextlib.contextmanager
def served(base, value, *flags):
    """A port at which the command serves."""
    pytest.importorskip("vllm")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["--base", base, "--value", value, "--port", port, "--dtype", "float32", *flags]
    words = [sys.executable, "-m", "beyond.serving", *map(str, command), "--enforce-eager"]
    server = subprocess.Popen(words, cwd=ROOT)
    try:
        while True:
            assert server.poll() is None
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_server_says_what_we_say(processes, value, tmp_path):
    """Conversations in the value network's template, with its system prompt; two processes divide heads."""
    base = write_llama(tmp_path / "b", num_attention_heads=8, num_key_value_heads=4)
    value = write_value(tmp_path / "v", hidden_size=128, num_attention_heads=4)
    settings = settle(base, [value], [1.0])
    asked = ["Hello", "the sky", "is\nit 7?", "blue. É"]
    prompts = [
        encode_chat(settings.tokenizer, "chatml", [("system", "Be brief."), ("user", text)])[0]
        for text in asked
    ]
    with served(base, value, "--tensor-parallel-size", processes) as port:
        for text, ids in zip(asked, in_ours(settings, prompts)):
            turn = {"role": "user", "content": text}
            more = {"max_tokens": NEW, "temperature": 0, "return_token_ids": True}
            status, found = post(port, "/v1/chat/completions", {"messages": [turn]} | more)
            assert status == 200 and found["choices"][0]["token_ids"] == ids
            assert found["model"] == "b+v"
        long = {"messages": [{"role": "user", "content": "sky " * 300}]}
        assert post(port, "/v1/chat/completions", long)[0] == 400
        assert post(port, "/v1/chat/completions", b"{")[0] == 400
        tool = {"messages": [{"role": "tool", "content": "4", "tool_call_id": "x"}]}
        assert post(port, "/v1/chat/completions", tool)[0] == 400
        assert post(port, "/v1/completions", {"prompt": "Hello", "max_tokens": 1})[0] == 200


@pytest.mark.slow
def test_flags_that_do_not_go_with_a_guided_base(base, value, monkeypatch):
    pytest.importorskip("vllm")
    speculative = json.dumps({"method": "ngram", "num_speculative_tokens": 2})
    for flags, message in (
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size does not go with"),
        (["--speculative-config", speculative], "--speculative-config does not go with"),
        (["--model", "x"], "--model does not go with"),
        (["--max-model-len", "257"], "--max-model-len 257: the networks end at 256"),
        (["--no-such-flag"], "--no-such-flag"),
    ):
        words = ["serving.py", "--base", base, "--value", value, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(UsageError, match=message):
            serving.main()


HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answers": """output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.slow
def test_the_harness_finds_the_same_through_the_server(base, value, tmp_path):
    """lm_eval's local-completions beside paper/guided_lm.py: 100 items with choices, 50 answers."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    pytest.importorskip("tenacity")  # of lm_eval[api]
    from paper.guided_lm import GuidedLM

    rng = random.Random(0)
    words = ["the", "sky", "is", "blue", "Hello", "7", "naïve", "Straße", "and"]
    for (name, body), count in zip(TASKS.items(), (100, 50)):
        rows = [
            {
                "question": " ".join(rng.choices(words, k=rng.randint(2, 12))),
                "choices": [" ".join(rng.choices(words, k=2)) for _ in range(4)],
                "label": rng.randrange(4),
            }
            for _ in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(HEAD.format(name=name, folder=tmp_path) + body)

    def scored(model, **options) -> tuple[dict, list]:
        manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
        )
        answers = {
            name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in TASKS
        }
        metrics = {name: found["results"][name] for name in TASKS}
        return metrics, answers

    settings = settle(base, [value], [1.0])
    llama, network = [Llama.from_pretrained(path, torch.float32) for path in (base, value)]
    guided = Guided(llama, SumDelta([network], [1.0]), readable=settings.readable)
    ours, our_answers = scored(GuidedLM(guided, settings.tokenizer, "chatml"))
    with served(base, value) as port:
        options = dict(model=settings.name, tokenizer=str(value), num_concurrent=4, max_length=256)
        options["base_url"] = f"http://127.0.0.1:{port}/v1/completions"
        theirs, their_answers = scored("local-completions", model_args=options)
    assert ours == theirs
    # Random weights write broken UTF-8, too; behind that vLLM's text may differ from tokenizers' own.
    for one, other in zip(our_answers["answers"], their_answers["answers"], strict=True):
        assert one[0].partition("\ufffd")[0] == other[0].partition("\ufffd")[0]
    for one, other in zip(our_answers["choices"], their_answers["choices"], strict=True):
        for (log_p, greedy), (their_log_p, their_greedy) in zip(one, other, strict=True):
            assert log_p == pytest.approx(their_log_p, abs=1e-3) and greedy == their_greedy
