"""data/chat.py: templates and their masks, the forms of data, what is dropped, and batches."""

import json
from pathlib import Path

import pytest
import torch

from data.chat import (
    ChatDataset,
    PairDataset,
    default_template,
    encode_chat,
    end_token,
    hold_out,
    share_preferred,
    stream_batches,
    system_of,
    with_system,
)
from data.checkpoint import own_template
from data.errors import UsageError
from data.records import UnknownForm, Unusable, read_pair, read_turns
from data.tiny_world import World
from data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from tests.helpers import REAL, byte_pairs, needs_real
from tests.make_golden import (
    GOLDEN,
    VENDORS,
    harmless_conversations,
    hash_ids,
    odd_conversations,
    write_vendors_tokenizer,
)
from train import collate, make_parts

CONVERSATION = [
    ("system", "Be brief."),
    ("user", "What is 1 plus 2?"),
    ("assistant", " 3.\nSure "),
    ("user", "Sure?"),
    ("assistant", "Yes, 漢字 👍."),
]


@pytest.fixture(scope="module")
def sentence_piece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(World(0).train_tokenizer())


@pytest.fixture(scope="module")
def tiktoken() -> TiktokenTokenizer:
    return TiktokenTokenizer(byte_pairs())


# ---- templates


def visible(tokenizer, ids: list[int], supervised: list[bool]) -> list[str]:
    """The supervised runs, decoded, with the end token spelled out."""
    runs, run = [], []
    for id, on in zip(ids, supervised):
        if on:
            run.append(id)
        elif run:
            runs, run = runs + [run], []
    return [tokenizer.decode(run[:-1]) + f"<{run[-1]}>" for run in runs + [run] * bool(run)]


@pytest.mark.parametrize(
    "name, template",
    [("sentence_piece", "llama-2"), ("tiktoken", "llama-2"), ("tiktoken", "llama-3")],
)
def test_the_mask_decoded_is_the_assistants_text(name, template, request):
    tokenizer = request.getfixturevalue(name)
    ids, supervised = encode_chat(tokenizer, template, CONVERSATION)
    end, space = end_token(tokenizer, template), " " * (template == "llama-2")
    before = " " * (template == "llama-2" and name == "tiktoken")
    assert visible(tokenizer, ids, supervised) == [
        f"{before}3.\nSure{space}<{end}>",
        f"{before}Yes, 漢字 👍.{space}<{end}>",
    ]


def test_llama2_is_spelled_out(sentence_piece):
    turns = [
        ("user", "Greet Mira."),
        ("assistant", "Hello Mira!"),
        ("user", "Again."),
        ("assistant", "Hello!"),
    ]
    ids, _ = encode_chat(sentence_piece, "llama-2", turns)
    pieces = "".join(sentence_piece.processor.id_to_piece(ids)).replace("\u2581", " ")
    assert (
        pieces
        == "<s> [INST] Greet Mira. [/INST] Hello Mira! </s><s> [INST] Again. [/INST] Hello! </s>"
    )
    prompt, _ = encode_chat(sentence_piece, "llama-2", turns[:1])
    assert ids[: len(prompt)] == prompt


def test_llama3_is_spelled_out(tiktoken):
    names = {id: name for name, id in tiktoken.specials.items()}
    ids, _ = encode_chat(tiktoken, "llama-3", [("user", "Hi"), ("assistant", "Ho"), ("user", "Hm")])
    spelled = "".join(names.get(id) or tiktoken.decode([id]) for id in ids)
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert spelled == (
        "<|begin_of_text|>"
        + turn("user")
        + "Hi<|eot_id|>"
        + turn("assistant")
        + "Ho<|eot_id|>"
        + turn("user")
        + "Hm<|eot_id|>"
        + turn("assistant")
    )
    assert ids.count(tiktoken.bos_id) == 1


@needs_real
@pytest.mark.parametrize("kind", REAL)
def test_with_the_real_tokenizers(kind):
    tokenizer = load_tokenizer(REAL[kind])
    assert default_template(tokenizer) == kind
    turns = [
        ("user", "Name two birds.\n"),
        ("assistant", "A wren,\n  a crow."),
        ("user", "Thanks"),
        ("assistant", "👍"),
    ]
    ids, supervised = encode_chat(tokenizer, kind, turns)
    texts = ["A wren,\n  a crow.", "👍"]
    end, space = end_token(tokenizer, kind), " " * (kind == "llama-2")
    assert visible(tokenizer, ids, supervised) == [f"{text}{space}<{end}>" for text in texts]
    if kind == "llama-2":  # turn by turn is the same as the whole string at once
        whole = [
            token
            for question, answer in [("Name two birds.", texts[0]), ("Thanks", texts[1])]
            for token in tokenizer.encode(
                f"[INST] {question} [/INST] {answer} ", bos=True, eos=True
            )
        ]
        assert ids == whole


@needs_real
@pytest.mark.parametrize("kind", ["llama-2", "llama-3", "zephyr"])
def test_500_conversations_have_the_ids_of_transformers_with_the_vendors_templates(kind):
    golden = json.loads((Path(__file__).parent / "golden/chats.json").read_text())[kind]
    tokenizer = load_tokenizer(REAL.get(kind, REAL["llama-2"]))
    ours = [hash_ids(encode_chat(tokenizer, kind, turns)[0]) for turns in odd_conversations()]
    different = [number for number in range(500) if ours[number] != golden[number]]
    assert not different, (len(different), odd_conversations()[different[0]])


@pytest.mark.parametrize("name", VENDORS)
def test_200_conversations_have_the_ids_of_transformers_with_other_templates(name, tmp_path):
    golden = json.loads((GOLDEN / "chats_of_vendors.json").read_text())[name]
    write_vendors_tokenizer(name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    template = default_template(tokenizer)
    assert template == ("chatml" if name == "qwen2.5" else "mistral") == own_template(tmp_path)
    system = system_of(tokenizer, template, None)
    for turns, theirs in zip(harmless_conversations(), golden, strict=True):
        ids, supervised = encode_chat(tokenizer, template, with_system(system, turns))
        assert hash_ids(ids) == theirs, (turns, tokenizer.decode(ids))
        runs = visible(tokenizer, ids, supervised)
        assert len(runs) == sum(role == "assistant" for role, _ in turns)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("<start_of_turn>user", "none of llama-2, llama-3, chatml, zephyr, mistral"),
        ("{{ '<|user|>' }}...<|end|>", "none of llama-2, llama-3, chatml, zephyr, mistral"),
        ("{{ '<|user|>' + eos_token }}", "zephyr"),
        ("[INST] <<SYS>>", "llama-2"),
        ("[INST]", "mistral"),
        ("", None),
    ],
)
def test_a_checkpoints_own_template_is_named(theirs, ours, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": theirs}))
    own = own_template(tmp_path)
    assert own == ours or (
        own.startswith(ours) and own.endswith(f" (it has {theirs[:1] and mark(theirs)})")
    )


def mark(template: str) -> str:
    return template[template.index("<") : template.index(">") + 1]


def test_llama3_needs_its_special_tokens(sentence_piece):
    with pytest.raises(UsageError, match="llama-3 template .*takes llama-2, zephyr, mistral with"):
        encode_chat(sentence_piece, "llama-3", CONVERSATION)


# ---- records


def sharegpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


KEPT = [("user", "q"), ("assistant", "a")]
PLAIN = (("human", "q"), ("gpt", "a"))


def openai(*contents, **more):
    """Two turns or more, of these contents in turn."""
    return {
        "messages": [
            {"role": ("user", "assistant")[number % 2], "content": content}
            for number, content in enumerate(contents)
        ]
    } | more


RECORDS = {  # a record, what is kept of it, and what is said of the rest; kept: None where it is of no use
    "plain": (sharegpt(*PLAIN), KEPT, ""),
    "messages": (openai("q", "a"), KEPT, ""),
    "conversations of role and content": (
        {"conversations": openai("q", "a")["messages"]},
        KEPT,
        "",
    ),
    "messages of from and value": ({"messages": sharegpt(*PLAIN)["conversations"]}, KEPT, ""),
    "conversation": ({"conversation": sharegpt(*PLAIN)["conversations"]}, KEPT, ""),
    "role and value": (
        {"messages": [{"role": "user", "value": "q"}, {"role": "assistant", "text": "a"}]},
        KEPT,
        "",
    ),
    "other names": (
        sharegpt(
            ("user", "q"),
            ("chatgpt", "a"),
            ("human", "q"),
            ("bard", "a"),
            ("human", "q"),
            ("bing", "a"),
        ),
        KEPT * 3,
        "",
    ),
    "other cases": (
        sharegpt(
            ("Human", "q"),
            ("GPT", "a"),
            ("prompter", "q"),
            (" Assistant", "a"),
            ("USER", "q"),
            ("model", "a"),
            ("user", "q"),
            ("AI", "a"),
        ),
        KEPT * 4,
        "",
    ),
    "system first": (sharegpt(("system", "s"), *PLAIN), [("system", "s"), *KEPT], ""),
    "developer first": (sharegpt(("developer", "s"), *PLAIN), [("system", "s"), *KEPT], ""),
    "a system field": (sharegpt(*PLAIN) | {"system": " s "}, [("system", " s "), *KEPT], ""),
    "a system_prompt field": (openai("q", "a", system_prompt="s"), [("system", "s"), *KEPT], ""),
    "a system field and turn": (
        sharegpt(("system", "t"), *PLAIN) | {"system": "s"},
        [("system", "t"), *KEPT],
        "",
    ),
    "a blank system": (sharegpt(("system", " "), *PLAIN) | {"system": ""}, KEPT, ""),
    "a system field null": (sharegpt(*PLAIN) | {"system": None}, KEPT, ""),
    "weight 0": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "weight": 0},
                *openai("q", "a")["messages"],
            ]
        },
        [("user", "q"), ("context", "x"), *KEPT],
        "",
    ),
    "train false": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "x", "train": False},
                *sharegpt(*PLAIN)["conversations"],
            ]
        },
        [("user", "q"), ("context", "x"), *KEPT],
        "",
    ),
    "loss_weight 0.0, weight of a question": (
        {
            "messages": [
                {"role": "user", "content": "q", "weight": 0},
                {"role": "assistant", "content": "x", "loss_weight": 0.0},
                *openai("q", "a")["messages"],
            ]
        },
        [("user", "q"), ("context", "x"), *KEPT],
        "",
    ),
    "weight 1": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 1},
            ]
        },
        KEPT,
        "",
    ),
    "all of weight 0": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0},
            ]
        },
        None,
        "no answer to learn from, as all have weight 0",
    ),
    "weight a half": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0.5},
            ]
        },
        None,
        "a weight that is neither 0 nor 1",
    ),
    "an object as label": (sharegpt(*PLAIN) | {"label": {"ability_en": ["x"]}}, KEPT, ""),
    "parts": (
        openai(
            [{"type": "text", "text": "q"}],
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        ),
        [("user", "q"), ("assistant", "ab")],
        "",
    ),
    "a picture": (
        openai([{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "q"}], "a"),
        None,
        "a part that is no text (image_url)",
    ),
    "a field of pictures": (
        sharegpt(*PLAIN) | {"image": "x.png"},
        None,
        "'image', which no template here can show",
    ),
    "tools": (
        openai("q", "a", tools=[{"type": "function"}]),
        None,
        "'tools', which no template here can show",
    ),
    "a tool call": (
        {
            "messages": [
                *openai("q", "a")["messages"],
                {"role": "assistant", "content": None, "tool_calls": [{}]},
            ]
        },
        None,
        "a tool call without text",
    ),
    "null": (openai("q", None), None, "a turn without text"),
    "no role": ({"messages": [{"content": "q"}]}, None, "a turn without a role"),
    "turns no list": ({"messages": "q"}, None, "'messages' that is no list"),
    "a turn no object": ({"messages": ["q", 5]}, None, "a turn that is no object"),
    "a tool call with text": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "tool_calls": [{}]},
            ]
        },
        None,
        "a tool call",
    ),
    "a picture in a turn": (
        {
            "messages": [
                {"role": "user", "content": "q", "images": ["x"]},
                {"role": "assistant", "content": "a"},
            ]
        },
        None,
        "'images', which no template here can show",
    ),
    "a record of weight 0": (openai("q", "a", weight=0), None, "weight 0"),
    "not trainable": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "trainable": False},
                *openai("q", "a")["messages"],
            ]
        },
        [("user", "q"), ("context", "x"), *KEPT],
        "",
    ),
    "an empty system and a system_prompt": (
        openai("q", "a", system="", system_prompt="s"),
        [("system", "s"), *KEPT],
        "",
    ),
    "a blank system turn and a field": (
        sharegpt(("system", " "), *PLAIN) | {"system": "s"},
        [("system", "s"), *KEPT],
        "",
    ),
    "a null preference": (openai("q", "a", chosen=None, rejected=None), KEPT, ""),
    "columns": (
        {"instruction": ["q", "q"], "output": ["a", "a"]},
        None,
        "a part that is no text (str)",
    ),
    "dolly": (
        {"instruction": "q", "context": "c", "response": "a"},
        [("user", "q\nc"), ("assistant", "a")],
        "",
    ),
    "choices": (
        {"question": "q", "choices": ["x", "y"], "answer": "a"},
        None,
        "'choices', which no template here can show",
    ),
    "a history that is none": (
        {"instruction": "q", "output": "a", "history": 5},
        None,
        "a history that is no list of questions and answers",
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, KEPT, ""),
    "alpaca with an input": (
        {"instruction": "q", "input": "i", "output": "a"},
        [("user", "q\ni"), ("assistant", "a")],
        "",
    ),
    "alpaca with a history": (
        {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
        [("system", "s"), *KEPT, *KEPT],
        "",
    ),
    "alpaca without an answer": (
        {"instruction": "q", "input": "", "output": ""},
        None,
        "no answered question",
    ),
    "alpaca, a number": ({"instruction": "q", "output": 3}, None, "'output' that is no text"),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, KEPT, ""),
    "prompt and response": ({"prompt": "q", "response": "a"}, KEPT, ""),
    "question and answer": ({"question": "q", "answer": "a"}, KEPT, ""),
    "answer first": (sharegpt(("gpt", "x"), *PLAIN), KEPT, "a leading answer"),
    "question last": (sharegpt(*PLAIN, ("human", "more")), KEPT, "a question without an answer"),
    "answer first, question last": (
        sharegpt(("gpt", "x"), *PLAIN, ("human", "more")),
        KEPT,
        "a leading answer and a question without an answer",
    ),
    "empty later": (
        sharegpt(*PLAIN, ("human", "q2"), ("gpt", " ")),
        KEPT,
        "an empty turn and all after it",
    ),
    "two questions later": (
        sharegpt(*PLAIN, ("human", "q"), ("human", "q"), ("gpt", "a")),
        KEPT,
        "roles that do not alternate",
    ),
    "a system turn later": (
        sharegpt(*PLAIN, ("system", "s"), *PLAIN),
        KEPT,
        "roles that do not alternate",
    ),
    "two answers": (sharegpt(*PLAIN, ("gpt", "a")), KEPT, "roles that do not alternate"),
    "no answer": (sharegpt(("human", "q")), None, "no answered question"),
    "no turns": (sharegpt(), None, "no answered question"),
    "empty answer": (sharegpt(("human", "q"), ("gpt", "")), None, "no answered question"),
    "two questions": (
        sharegpt(("human", "q"), ("human", "q"), ("gpt", "a")),
        None,
        "roles that do not alternate",
    ),
    "odd role": (
        sharegpt(("human", "q"), ("tool", "t"), ("gpt", "a")),
        None,
        "unknown role 'tool'",
    ),
    "half a pair": (sharegpt(("human", "\ud83d"), ("gpt", "a")), None, "half of a surrogate pair"),
    "two halves": (
        json.loads(json.dumps(sharegpt(("human", "👍"), ("gpt", "a")))),
        [("user", "👍"), ("assistant", "a")],
        "",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(case):
    record, kept, left_out = RECORDS[case]
    if kept is None:
        with pytest.raises(Unusable) as caught:
            read_turns(record)
        assert str(caught.value) == left_out
    else:
        assert read_turns(record) == (kept, left_out)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        sharegpt(("human", "q")) | {"chosen": {}, "rejected": {}},
        {"prompt": "q", "completion": "a", "label": True},
        openai("q", "a", label=False),
        {"chosen_response": "a", "rejected_response": "b"},
        openai("q", "a", rejected_response="b"),
        {"prompt": "q", "completion": "a", "label": 0},
    ],
)
def test_preferences_are_refused_by_name(record):
    with pytest.raises(UsageError, match="is a preference"):
        read_turns(record)


ANSWERS = {"chosen": "a", "rejected": "b"}
TURNS = {side: {"from": "gpt", "value": text} for side, text in ANSWERS.items()}
WHOLE = {side: openai("q", text)["messages"] for side, text in ANSWERS.items()}
PAIRS = {  # a record, and the prompt of its pair, which has the answers "a" and "b"; or why it is not used
    "texts": ({"prompt": "q"} | ANSWERS, [("user", "q")]),
    "a question and texts": (
        {"question": "q", "system": "s"} | ANSWERS,
        [("system", "s"), ("user", "q")],
    ),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "else", "history": [["q", "x"]]} | ANSWERS,
        [("user", "q"), ("context", "x"), ("user", "q\ni")],
    ),
    "turns behind turns": (
        {
            "prompt": [{"role": "user", "content": "q"}],
            **{side: [{"role": "assistant", "content": text}] for side, text in ANSWERS.items()},
        },
        [("user", "q")],
    ),
    "a turn each behind a prompt": ({"prompt": "q"} | TURNS, [("user", "q")]),
    "texts behind turns": (
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
        | ANSWERS,
        [("system", "s"), ("user", "q")],
    ),
    "ShareGPT": (sharegpt(("human", "q")) | TURNS, [("user", "q")]),
    "ShareGPT and texts": (
        sharegpt(("system", "s"), ("human", "q")) | ANSWERS,
        [("system", "s"), ("user", "q")],
    ),
    "ShareGPT, earlier answers": (
        sharegpt(*PLAIN, ("human", "q")) | TURNS,
        [("user", "q"), ("context", "a"), ("user", "q")],
    ),
    "messages": ({"messages": [{"role": "user", "content": "q"}]} | ANSWERS, [("user", "q")]),
    "whole conversations": (WHOLE, [("user", "q")]),
    "whole conversations, a prompt and a copy": (
        WHOLE | {"prompt": "q", "messages": WHOLE["chosen"], "score_chosen": 8.5},
        [("user", "q")],
    ),
    "whole conversations that begin with a system turn": (
        {side: [{"role": "system", "content": "s"}, *turns] for side, turns in WHOLE.items()},
        [("system", "s"), ("user", "q")],
    ),
    "an answer first": (sharegpt(("gpt", "x"), ("human", "q")) | TURNS, [("user", "q")]),
    "other prompts": (
        {"chosen": WHOLE["chosen"], "rejected": openai("other", "b")["messages"]},
        "no common prompt",
    ),
    "other lengths": (
        {"chosen": [*WHOLE["chosen"], *WHOLE["chosen"]], "rejected": WHOLE["rejected"]},
        "no common prompt",
    ),
    "equal answers": ({"prompt": "q", "chosen": "a", "rejected": " a\n"}, "equal answers"),
    "an empty answer": ({"prompt": "q", "chosen": "a", "rejected": " "}, "no answered question"),
    "an empty answer later": (
        sharegpt(*PLAIN, ("human", "q")) | ANSWERS | {"rejected": ""},
        "an empty turn and all after it in 'rejected'",
    ),
    "no answer": ({"prompt": "q", "chosen": 5, "rejected": "b"}, "'chosen' that is no answer"),
    "no turn": (sharegpt(("human", "q")) | TURNS | {"rejected": []}, "no answered question"),
    "two turns behind a prompt": (
        {"prompt": "q", "chosen": [TURNS["chosen"]] * 2, "rejected": "b"},
        "roles that do not alternate in 'chosen'",
    ),
    "no prompt": (ANSWERS, "two answers without a prompt"),
    "no prompt, two turns": (TURNS, "two answers without a prompt"),
    "answered already": (sharegpt(*PLAIN) | TURNS, "roles that do not alternate in 'chosen'"),
    "a list of turns that is none": (
        {"conversations": "q"} | ANSWERS,
        "'conversations' that is no list",
    ),
    "a picture": (
        {"prompt": "q", "images": ["x.png"]} | ANSWERS,
        "'images', which no template here can show",
    ),
    "an odd role": (
        sharegpt(("human", "q")) | TURNS | {"chosen": {"from": "tool", "value": "a"}},
        "unknown role 'tool'",
    ),
    "weight 0": ({"prompt": "q", "weight": 0} | ANSWERS, "weight 0"),
    "an answer of weight 0": (
        sharegpt(*PLAIN, ("human", "q"))
        | TURNS
        | {"chosen": {"from": "gpt", "value": "a", "weight": 0}},
        "an answer of weight 0",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case):
    record, expected = PAIRS[case]
    if isinstance(expected, str):
        with pytest.raises(Unusable) as caught:
            read_pair(record)
        assert str(caught.value) == expected
    else:
        both, left_out = read_pair(record)
        assert both == tuple([*expected, ("assistant", text)] for text in "ab")
        assert left_out == ("a leading answer" if case == "an answer first" else "")


@pytest.mark.parametrize(
    "record",
    ["q", {"prompt": "q", "completion": "a"}, openai("q", "a"), {"prompt": "q", "chosen": "a"}],
)
def test_what_is_no_pair_is_no_known_form(record):
    with pytest.raises(UnknownForm, match="'chosen' and 'rejected'"):
        read_pair(record)


@pytest.mark.parametrize("template", ["llama-2", "llama-3"])
def test_of_a_pair_only_the_two_answers_are_learnt(template, sentence_piece, tiktoken, tmp_path):
    tokenizer = sentence_piece if template == "llama-2" else tiktoken
    records = [
        PAIRS["ShareGPT, earlier answers"][0],
        PAIRS["equal answers"][0],
        {"prompt": "q", "chosen": "a", "rejected": "long " * 60},
    ]
    dataset = PairDataset(
        write(tmp_path / "d.json", records, False), tokenizer, template, 64, system="s"
    )
    before = "" if template == "llama-3" or tokenizer.space_in_front else " "
    space = " " * (template == "llama-2")
    shown = [visible(tokenizer, ids, supervised) for ids, supervised in dataset.rows(0)]
    assert shown == [[f"{before}{text}{space}<{end_token(tokenizer, template)}>"] for text in "ab"]
    turns = [("system", "s"), ("user", "q"), ("context", "a"), ("user", "q")]
    assert dataset.rows(0) == [
        encode_chat(tokenizer, template, [*turns, ("assistant", text)]) for text in "ab"
    ]
    assert dataset.rows(1) == []
    assert (
        dataset.report()
        == "d.json: 2 pairs; dropped 1: equal answers; dropped 1: an answer beyond 64 tokens"
    )


def test_batches_of_pairs_are_whole_pairs_and_a_position_goes_on(sentence_piece, tmp_path):
    records = [
        {"prompt": f"q{number}", "chosen": f"a{number} " * (1 + number % 7), "rejected": "b"}
        for number in range(20)
    ]
    dataset = PairDataset(
        write(tmp_path / "d.jsonl", records, True), sentence_piece, "llama-2", 256
    )
    taken = take(stream_batches(dataset, list(range(20)), 5, 0), 8)
    for _, rows in taken:
        parts = make_parts(rows, 2, together=2)
        assert [len(tokens) for tokens, _ in parts] == [6, 4]  # 3 pairs and 2
        for tokens, labels in parts:
            for row in range(0, len(tokens), 2):
                start = int((labels[row] != -100).nonzero()[0])
                assert torch.equal(tokens[row, :start], tokens[row + 1, :start])  # the same prompt
    position, _ = taken[2]
    assert take(stream_batches(dataset, list(range(20)), 5, 0, position), 1)[0] == taken[3]


def test_pairs_of_one_prompt_stay_on_one_side(sentence_piece, tmp_path):
    records = [
        {"prompt": f"q{number // 4}", "chosen": "a", "rejected": f"b{number}"}
        for number in range(200)
    ]
    dataset = PairDataset(write(tmp_path / "d.jsonl", records, True), sentence_piece, "llama-2", 64)
    train, held_out = hold_out(dataset, seed=0)
    assert len(held_out) == 16 and not {index // 4 for index in train} & {
        index // 4 for index in held_out
    }


def test_the_share_of_preferred_answers():
    rows = [([1, 2, 9], [False, True, False]), ([1, 3, 9], [False, True, False])] * 2 + [
        ([1, 3], [False, True]),
        ([1, 2, 2], [False, True, True]),
    ]
    seen = []

    def score(pairs):
        seen.extend(pairs)
        return [(float(-sum(continuation)), True) for _, continuation in pairs]

    assert share_preferred(score, rows) == pytest.approx(1)
    assert seen[:2] == [([1], [2]), ([1], [3])] and seen[4:] == [([1], [3]), ([1], [2, 2])]
    assert share_preferred(score, [rows[1], rows[0], *rows[2:4]]) == 0.5


@pytest.mark.parametrize("template", ["llama-2", "llama-3"])
def test_what_has_no_weight_and_a_system_turn_are_in_the_prompt_and_not_learnt(
    template, sentence_piece, tiktoken, tmp_path
):
    tokenizer = sentence_piece if template == "llama-2" else tiktoken
    record = {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Greet Mira."},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "Hello!"},
        ],
    }
    dataset = ChatDataset(
        write(tmp_path / "d.json", [record], False), tokenizer, template, 256, system="Not this."
    )
    [(ids, supervised)] = dataset.rows(0)
    turns = [
        ("system", "Be brief."),
        ("user", "Greet Mira."),
        ("assistant", "No."),
        ("user", "Again."),
        ("assistant", "Hello!"),
    ]
    as_if_learnt, all_answers = encode_chat(tokenizer, template, turns)
    assert ids == as_if_learnt and sum(supervised) < sum(all_answers)
    before = "" if template == "llama-3" or tokenizer.space_in_front else " "
    space = " " * (template == "llama-2")
    assert visible(tokenizer, ids, supervised) == [
        f"{before}Hello!{space}<{end_token(tokenizer, template)}>"
    ]
    without = ChatDataset(
        write(tmp_path / "e.json", [openai("q", "a")], False),
        tokenizer,
        template,
        256,
        system="Be brief.",
    )
    assert without.rows(0) == [encode_chat(tokenizer, template, [("system", "Be brief."), *KEPT])]


# ---- files


def write(path: Path, records: list, lines: bool) -> Path:
    path.write_text(
        "\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records),
        encoding="utf-8",
    )
    return path


def numbered(count: int, length=lambda number: 1) -> list:
    return [
        sharegpt(("human", f"q{number}"), ("gpt", " ".join([f"a{number}"] * length(number))))
        for number in range(count)
    ]


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_both_file_forms_and_the_count_of_what_is_dropped(lines, tmp_path, sentence_piece):
    records = [
        numbered(3)[0],
        RECORDS["no answer"][0],
        numbered(3)[1],
        RECORDS["odd role"][0],
        RECORDS["no turns"][0],
        RECORDS["answer first"][0],
    ]
    dataset = ChatDataset(
        write(tmp_path / "any.name", records, lines), sentence_piece, "llama-2", 64
    )
    assert [dataset.turns(index)[0][1] for index in range(len(dataset))] == ["q0", "q1", "q"]
    assert dataset.unused == {"no answered question": 2, "unknown role 'tool'": 1}
    assert (
        "3 conversations; dropped 2: no answered question; dropped 1: unknown role 'tool'; "
        "shortened 1 by a leading answer"
    ) in dataset.report()


def test_long_conversations_keep_whole_exchanges(tmp_path, sentence_piece):
    exchange = [("human", "Greet Mira."), ("gpt", "Hello Mira!")]
    one = len(
        encode_chat(
            sentence_piece, "llama-2", [("user", "Greet Mira."), ("assistant", "Hello Mira!")]
        )[0]
    )
    path = write(
        tmp_path / "x.jsonl",
        [sharegpt(*exchange * 3), sharegpt(("human", "Greet Mira. " * 9), ("gpt", "No"))],
        True,
    )
    dataset = ChatDataset(path, sentence_piece, "llama-2", 2 * one + 1)
    [(ids, supervised)] = dataset.rows(0)
    assert len(ids) == 2 * one and supervised[-1]
    assert dataset.rows(1) == []
    assert (
        "shortened 1 by what is beyond" in dataset.report()
        and "dropped 1: no exchange within" in dataset.report()
    )


def test_an_absent_file_and_a_folder_are_named(tmp_path, sentence_piece):
    for path, message in [(tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(UsageError, match=message):
            ChatDataset(path, sentence_piece, "llama-2", 64)


# ---- batches


@pytest.fixture
def dataset(tmp_path, sentence_piece) -> ChatDataset:
    return ChatDataset(
        write(tmp_path / "d.jsonl", numbered(200, lambda n: 1 + n * 7 % 23), True),
        sentence_piece,
        "llama-2",
        256,
    )


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_an_epoch_has_every_sample_once_and_differs_from_the_next(dataset):
    whole = range(len(dataset))
    batches = take(stream_batches(dataset, list(whole), 4, seed=3), 100)
    epochs = [
        [tuple(ids) for (epoch, _, _), samples in batches if epoch == wanted for ids, _ in samples]
        for wanted in (0, 1)
    ]
    everything = sorted(tuple(dataset.rows(index)[0][0]) for index in whole)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    assert batches == take(stream_batches(dataset, list(whole), 4, seed=3), 100)
    assert batches != take(stream_batches(dataset, list(whole), 4, seed=4), 100)


def test_the_stream_goes_on_from_any_position(dataset):
    whole = list(range(len(dataset)))
    batches = take(stream_batches(dataset, whole, 4, seed=0), 120)
    for cut in [0, 1, 31, 32, 33, 49, 50, 51, 99]:
        position = batches[cut][0]
        assert (
            take(stream_batches(dataset, whole, 4, 0, position), 10) == batches[cut + 1 : cut + 11]
        )


def test_bucketing_saves_padding(dataset):
    def waste(batches):
        return 1 - sum(len(ids) for batch in batches for ids, _ in batch) / sum(
            len(b) * max(len(i) for i, _ in b) for b in batches
        )

    bucketed = [
        samples for _, samples in take(stream_batches(dataset, list(range(200)), 8, seed=0), 25)
    ]
    plain = [[dataset.rows(i)[0] for i in range(first, first + 8)] for first in range(0, 200, 8)]
    assert waste(bucketed) < 0.1 < waste(plain)


def test_collated_labels_are_shifted_and_masked(sentence_piece):
    samples = [
        encode_chat(sentence_piece, "llama-2", [("user", "q"), ("assistant", answer)])
        for answer in ["a", "a long answer"]
    ]
    tokens, labels = collate(samples)
    for row, (ids, supervised) in enumerate(samples):
        assert tokens[row, : len(ids) - 1].tolist() == ids[:-1]
        expected = [id if on else -100 for id, on in zip(ids[1:], supervised[1:])]
        assert labels[row].tolist() == expected + [-100] * (labels.shape[1] - len(expected))


def test_every_conversation_too_long_is_an_error(tmp_path, sentence_piece):
    dataset = ChatDataset(
        write(tmp_path / "d.json", numbered(5), False), sentence_piece, "llama-2", 8
    )
    with pytest.raises(UsageError, match="every conversation is longer than --max-length 8"):
        next(stream_batches(dataset, list(range(5)), 2, seed=0))


def test_held_out_conversations_are_not_trained_on(dataset, tmp_path, sentence_piece):
    train_on, held_out = hold_out(dataset, seed=0)
    assert len(held_out) == 16 and not set(train_on) & set(held_out) and len(train_on) == 184
    assert hold_out(dataset, 0, 0) == (list(range(200)), [])
    assert len(hold_out(dataset, 0, 50)[1]) == 50
    few = ChatDataset(
        write(tmp_path / "few.json", numbered(16), False), sentence_piece, "llama-2", 64
    )
    assert [len(hold_out(few, seed)[1]) for seed in range(4)] == [
        1,
        1,
        1,
        1,
    ]  # a tenth at most, one at least
    with pytest.raises(UsageError, match="16 usable conversations"):
        hold_out(few, 0, 16)
    pieces = [
        record | {"id": f"c{number // 3}_{number % 3}"}
        for number, record in enumerate(numbered(90))
    ]
    whole = ChatDataset(
        write(tmp_path / "pieces.json", pieces, False), sentence_piece, "llama-2", 64
    )
    for seed in range(5):
        train_on, held_out = hold_out(whole, seed)
        assert 0 < len(held_out) <= 9 and not {index // 3 for index in held_out} & {
            index // 3 for index in train_on
        }
    mixed = [
        record | {"id": f"c{number // 2}_{number % 2}" if number < 100 else f"train_{number}"}
        for number, record in enumerate(numbered(200))
    ]
    both = ChatDataset(write(tmp_path / "mixed.json", mixed, False), sentence_piece, "llama-2", 64)
    same = [record | {"id": f"c{number // 2}"} for number, record in enumerate(numbered(90))]
    same = ChatDataset(write(tmp_path / "same.json", same, False), sentence_piece, "llama-2", 64)
    for seed in range(5):
        train_on, held_out = hold_out(both, seed)
        assert len(held_out) == 16 and not {index // 2 for index in held_out if index < 100} & {
            index // 2 for index in train_on if index < 100
        }
        train_on, held_out = hold_out(same, seed)
        assert not {index // 2 for index in held_out} & {index // 2 for index in train_on}
    named = [record | {"id": f"train_{number}"} for number, record in enumerate(numbered(90))]
    dataset = ChatDataset(
        write(tmp_path / "named.json", named, False), sentence_piece, "llama-2", 64
    )
    assert len(hold_out(dataset, 0)[1]) == 9
