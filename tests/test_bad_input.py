"""Bad and odd input through the command lines: a line a case, with the status and the words that must occur.

Status 2 is one line on stderr and nothing changed in the folder; status 0 is an answer with these words in it.
"""

import codecs
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import describe_tokenizer, load_tokenizer
from ivl import ValueModel
from tests.helpers import inside, small, worked

CHAT = "chat.py FILE --tokenizer base".split()
TRAIN = (
    "train.py --base base --value --data chats.jsonl --steps 1 --batch-size 2 --max-length 64"
).split()
SAMPLE = [
    *"sample.py --value value --prompt".split(),
    "Greet Mira.",
    *"--max-new-tokens 2 --dtype float32".split(),
]
PLAIN = (
    "sample.py --value value --base base --scheme residual --template llama-2 "
    "--prompt Hi --max-new-tokens 2 --dtype float32"
).split()
PAGE = "sample.py --explain --value value --prompt Hi --max-new-tokens 2 --page p.html".split()
MAP = "vocab_map.py --base-tokenizer base --value-tokenizer base --out new.map".split()


@pytest.fixture(scope="session")
def house(home, tmp_path_factory) -> Path:
    """A folder with a small checkpoint, a value network on it, data, texts and a vocabulary map."""
    folder = tmp_path_factory.mktemp("house")
    network = small(
        vocab_size=1024, num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=128
    )
    network.save_pretrained(folder / "base")
    tokenizer = home / "out/seed0/tiny-s/tokenizer.model"
    info = {
        "scheme": "residual",
        "l1": 0.0,
        "template": "llama-2",
        "bases": ["base"],
        "data": "chats.jsonl",
        "seed": 0,
        "tokenizer": describe_tokenizer(load_tokenizer(tokenizer)),
    }
    ValueModel(network, info).save_pretrained(folder / "value")
    for name in ("base", "value"):
        shutil.copy(tokenizer, folder / name)
    (folder / "chats.jsonl").write_bytes(lines([record(number) for number in range(20)]))
    (folder / "texts.txt").write_text("the hell\nthey live in\n\n\nhello  world\n")
    worked(folder, *MAP[:-1], *"map.safetensors --how dtw --texts texts.txt".split())
    return folder


def record(number: int = 0, **more) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": f"Greet number {number}."},
            {"from": "gpt", "value": f"Hello {number}!"},
        ]
    } | more


def lines(records: list) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in records).encode()


def turns(*contents) -> list[dict]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def thought(question: str, answer: str, **more) -> list[dict]:
    asked, answered = turns(question, answer)
    return [asked, answered | more]


ONE, TWO = lines([record()]), lines([record(0), record(1)])
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"
ARRAY = json.dumps([record(0), record(1)]).encode()

DATA = {  # a data file's name and content, the status of data.chat, and what it says
    "empty": ("d.jsonl", b"", 2, "an empty file"),
    "a mark alone": ("d.json", codecs.BOM_UTF8, 2, "an empty file"),
    "blank": ("d.jsonl", b" \n\n", 2, "nothing but white space"),
    "an empty list": ("d.json", b"[]", 2, "an empty list"),
    "with a mark": ("d.jsonl", codecs.BOM_UTF8 + TWO, 0, "2 conversations"),
    "windows lines": ("d.jsonl", TWO.replace(b"\n", b"\r\n"), 0, "2 conversations"),
    "no last line feed": ("d.jsonl", TWO.strip(), 0, "2 conversations"),
    "lines named json": ("d.json", TWO, 0, "2 conversations"),
    "an array named jsonl": ("d.jsonl", ARRAY, 0, "2 conversations"),
    "an indented array": (
        "d.json",
        json.dumps([record(0), record(1)], indent=4).encode(),
        0,
        "2 conversations",
    ),
    "gzip": ("d.jsonl.gz", gzip.compress(TWO), 0, "2 conversations"),
    "gzip, unnamed": ("d.json", gzip.compress(ARRAY), 0, "2 conversations"),
    "gzip cut": ("d.jsonl.gz", gzip.compress(TWO)[:-9], 2, "damaged or truncated gzip"),
    "gzip of nothing": ("d.jsonl.gz", gzip.compress(b""), 2, "an empty file"),
    "gzip, broken inside": (
        "d.jsonl.gz",
        gzip.compress(TWO)[:20] + b"xxxxxx" + gzip.compress(TWO)[26:],
        2,
        "gzip",
    ),
    "utf-16": ("d.jsonl", TWO.decode().encode("utf-16"), 0, "2 conversations"),
    "utf-16, big end": (
        "d.json",
        codecs.BOM_UTF16_BE + ARRAY.decode().encode("utf-16-be"),
        0,
        "2 conversations",
    ),
    "utf-16 in gzip": (
        "d.jsonl.gz",
        gzip.compress(TWO.decode().encode("utf-16")),
        0,
        "2 conversations",
    ),
    "utf-16 cut": ("d.jsonl", TWO.decode().encode("utf-16")[:-1], 2, "not UTF-16"),
    "latin-1": ("d.jsonl", '{"messages": "é"}'.encode("latin-1"), 2, "line 1 is not UTF-8"),
    "an array in latin-1": ("d.json", b'["\xff"]', 2, "not UTF-8"),
    "a number as text": (
        "d.jsonl",
        lines([{"messages": [{"role": "user", "content": 3}]}]),
        2,
        "1 with a turn that is no text",
    ),
    "git-lfs": ("d.jsonl", LFS, 2, "`git lfs pull`"),
    "parquet": ("d.parquet", b"PAR1\x15\x04", 2, "parquet"),
    "arrow": ("d.arrow", b"ARROW1\0\0", 2, "an Arrow file"),
    "zip": ("d.zip", b"PK\x03\x04rest", 2, "a zip archive"),
    "zstd": ("d.jsonl.zst", b"\x28\xb5\x2f\xfdrest", 2, "zstd"),
    "bzip2": ("d.jsonl.bz2", b"BZh91AY", 2, "bzip2"),
    "xz": ("d.jsonl.xz", b"\xfd7zXZ\0rest", 2, "xz"),
    "a web page": ("d.json", b"<!DOCTYPE html>\n<html>", 2, "a web page"),
    "a table": ("d.csv", b"question,answer\n1,2\n", 2, "a table"),
    "plain text": ("d.txt", b"hello\n", 2, "plain text"),
    "plain text in gzip": ("d.txt.gz", gzip.compress(b"hello\n"), 2, "plain text"),
    "two arrays": ("d.json", ARRAY + b"\n" + ARRAY, 2, "several arrays after each other"),
    "an array and a line": ("d.json", ARRAY + ONE, 2, "several arrays after each other"),
    "an array cut": ("d.json", ARRAY[:-5], 2, "not JSON"),
    "an array with a comma": ("d.json", ARRAY[:-1] + b",]", 2, "not JSON"),
    "an object around": (
        "d.json",
        b'{"version": 1, "data": ' + ARRAY + b"}",
        2,
        "one object around the list of records; `jq -c '.[\"data\"][]'",
    ),
    "an object around, indented": (
        "d.json",
        json.dumps({"rows": [record()]}, indent=1).encode(),
        2,
        "`jq -c '.[\"rows\"][]'",
    ),
    "an object of objects": (
        "d.json",
        json.dumps({"0": record(0), "1": record(1)}).encode(),
        2,
        "one object around the records",
    ),
    "a record over lines": (
        "d.json",
        json.dumps(record(), indent=1).encode(),
        2,
        "one object over several lines",
    ),
    "records over lines": (
        "d.jsonl",
        (json.dumps(record(), indent=1) + "\n").encode() * 2,
        2,
        "objects over several lines, one after the other",
    ),
    "a broken second line": ("d.jsonl", ONE + b'{"a": \n', 2, "line 2 is not JSON"),
    "two records on a line": (
        "d.jsonl",
        ONE.strip() + b" " + ONE,
        2,
        "line 1 is not JSON (more behind its end, at column",
    ),
    "python's quotes": ("d.jsonl", ONE + str(record()).encode(), 2, "line 2 is not JSON"),
    "a number of 5000 digits": (
        "d.jsonl",
        ONE + b"9" * 5000,
        2,
        "line 2 is not JSON that can be read: a number of thousands of digits",
    ),
    "deep": ("d.jsonl", ONE + b"[" * 100_000, 2, "nested too deeply"),
    "deep array": ("d.json", b"[" * 100_000, 2, "nested too deeply"),
    "an unknown form": (
        "d.jsonl",
        b'{"hello": 1}\n',
        2,
        "no record of a known form; line 1 has neither",
    ),
    "an unknown form among others": (
        "d.jsonl",
        b'{"hello": 1}\n' + ONE,
        0,
        "1 conversations; dropped 1: no known form",
    ),
    "texts": ("d.jsonl", b'{"text": "hello"}\n', 2, "no record of a known form"),
    "strings": ("d.json", b'["a", "b"]', 2, "record 1 has no object"),
    "nothing": ("d.json", b"null", 2, "line 1 has no object"),
    "lists of turns": (
        "d.jsonl",
        json.dumps(record()["conversations"]).encode() + b"\n" + ONE,
        2,
        "several arrays",
    ),
    "preferences": (
        "d.jsonl",
        ONE + lines([{"prompt": "q", "chosen": "a", "rejected": "b"}]),
        2,
        "line 2 is a preference",
    ),
    "preferences of turns": (
        "d.json",
        json.dumps([record(chosen={}, rejected={})]).encode(),
        2,
        "record 1 is a preference",
    ),
    "a boolean label": (
        "d.jsonl",
        lines([{"prompt": "q", "completion": "a", "label": False}]),
        2,
        "a boolean label",
    ),
    "an object as label": (
        "d.jsonl",
        lines([record(label={"ability": "x"})]),
        0,
        "1 conversations",
    ),
    "all unusable": (
        "d.jsonl",
        lines([{"messages": []}, {"messages": [{"role": "tool", "content": "x"}]}]),
        2,
        "no usable conversation (1 with no answered question, 1 with unknown role 'tool')",
    ),
    "some unusable": (
        "d.jsonl",
        ONE + lines([{"messages": 5}]),
        0,
        "dropped 1: 'messages' that is no list",
    ),
    "a picture": (
        "d.jsonl",
        ONE + lines([record(images=["x.png"])]),
        0,
        "dropped 1: 'images', which no template here can show",
    ),
    "shortened": (
        "d.jsonl",
        lines(
            [{"conversations": record()["conversations"] + [{"from": "system", "value": "x"}] * 2}]
        ),
        0,
        "shortened 1 by roles that do not alternate",
    ),
    "alpaca": (
        "d.json",
        json.dumps([{"instruction": "q", "input": "", "output": "a"}]).encode(),
        0,
        "[INST] q [/INST]",
    ),
    "a system field": (
        "d.jsonl",
        lines([record(system="Be brief.")]),
        0,
        "<<SYS>>\nBe brief.\n<</SYS>>",
    ),
    "weight 0": (
        "d.jsonl",
        lines(
            [
                {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "no", "weight": 0},
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "yes"},
                    ]
                }
            ]
        ),
        0,
        " no  [INST]",
    ),
    "null columns": (
        "d.jsonl",
        lines(
            [
                {"conversations": None, "messages": turns("q", "a"), "system": None},
                {"messages": None, "instruction": "q", "input": None, "output": "b", "label": None},
                {
                    "conversations": [
                        turn | {"from": None, "value": None} for turn in turns("q", "c")
                    ]
                },
                {"messages": [turn | {"images": None, "weight": None} for turn in turns("q", "d")]},
            ]
        ),
        0,
        "d.jsonl: 4 conversations\n",
    ),
    "all columns null": (
        "d.jsonl",
        lines([{"messages": None, "text": None}]),
        2,
        "no record of a known form",
    ),
    "null parts": (
        "d.jsonl",
        lines([{"messages": turns([{"type": None, "text": "q", "image_url": None}], "a")}]),
        0,
        "d.jsonl: 1 conversations\n",
    ),
    "an unknown list": (
        "d.jsonl",
        lines([{"dialog": turns("q", "a")}] * 2),
        2,
        "line 1 has its turns under 'dialog', a name that is not known; `jq -c '.messages",
    ),
    "an unknown list alone": (
        "d.jsonl",
        lines([{"id": 1, "dialog": turns("q", "a")}]),
        2,
        "line 1 has its turns under 'dialog'",
    ),
    "lists of other things": (
        "d.jsonl",
        lines([{"answers": [{"text": "a"}], "context": "c"}] * 2),
        2,
        "line 1 has neither 'conversations' nor 'messages'",
    ),
    "an array of an unknown list": (
        "d.json",
        json.dumps([{"answers": [{"text": "a"}]}] * 2).encode(),
        2,
        "record 1 has neither",
    ),
    "an input that is a list": (
        "d.jsonl",
        lines([{"input": turns("q"), "output": "a"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "lists of turns, prompt and completion": (
        "d.jsonl",
        lines([{"prompt": turns("q"), "completion": turns("q", "a")[1:]}]),
        0,
        "[INST] q [/INST] A",
    ),
    "exchanges as turns": (
        "d.jsonl",
        lines([{"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}]),
        0,
        "[INST] r [/INST] B",
    ),
    "exchanges of other names": (
        "d.jsonl",
        lines([{"conversation": [{"human": "q", "assistant": "a"}]}]),
        0,
        "conversation of role/content, 1 records",
    ),
    "texts that alternate": (
        "d.jsonl",
        lines([{"id": "0", "data": ["q", "a", "r", "b"]}]),
        0,
        "[INST] r [/INST] B",
    ),
    "texts that alternate, with a question last": (
        "d.jsonl",
        lines([{"conversations": ["q", "a", "r"]}]),
        0,
        "shortened 1 by a question without an answer",
    ),
    "an exchange with a field named data": (
        "d.jsonl",
        lines([{"prompt": "q", "completion": "a", "data": ["x", "y"], "contents": "z"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "data that is no list of turns": (
        "d.jsonl",
        lines([{"data": [1, 2]}] * 2),
        2,
        "line 1 has neither",
    ),
    "a list as a string": (
        "d.jsonl",
        lines([{"messages": json.dumps(turns("q", "a"))}]),
        0,
        "[INST] q [/INST] A",
    ),
    "a list as a string of Python": (
        "d.jsonl",
        ONE + lines([{"messages": str(turns("q", "a"))}]),
        0,
        "dropped 1: 'messages' that is no list",
    ),
    "input and output": (
        "d.jsonl",
        lines([{"input": "q", "output": "a"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "problem and solution": (
        "d.jsonl",
        lines([{"problem": "q", "solution": "a", "source": "x"}]),
        0,
        "problem and solution, 1 records",
    ),
    "inputs and targets": (
        "d.jsonl",
        lines([{"inputs": "q", "targets": "a"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "Gemini": (
        "d.jsonl",
        lines(
            [
                {
                    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
                    "contents": [
                        {"role": "user", "parts": [{"text": "q"}]},
                        {"role": "model", "parts": [{"text": "a"}, {"text": "b"}]},
                    ],
                }
            ]
        ),
        0,
        "<<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST] AB",
    ),
    "Gemini with a picture": (
        "d.jsonl",
        ONE
        + lines(
            [
                {
                    "contents": [
                        {"role": "user", "parts": [{"inlineData": {"data": "x"}}]},
                        {"role": "model", "parts": [{"text": "a"}]},
                    ]
                }
            ]
        ),
        0,
        "dropped 1: a part that is no text",
    ),
    "a transcript": (
        "d.jsonl",
        lines([{"text": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"}]),
        0,
        "[INST] r [/INST] B",
    ),
    "the chosen transcript alone": (
        "d.jsonl",
        lines([{"chosen": "\n\nHuman: q\n\nAssistant: a"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "a transcript of guanaco": (
        "d.jsonl",
        lines([{"text": "### Human: q### Assistant: a### Human: r### Assistant: b"}]),
        0,
        "[INST] r [/INST] B",
    ),
    "a transcript as a prompt": (
        "d.jsonl",
        lines([{"prompt": "\n\nHuman: q\n\nAssistant:", "response": "a"}]),
        0,
        "[INST] q [/INST] A",
    ),
    "a tree of messages": (
        "d.jsonl",
        lines([{"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "rank": 0}]),
        2,
        "line 1 is of a tree of messages, as OASST's are",
    ),
    "a tree of messages, whole": (
        "d.jsonl",
        lines(
            [{"message_tree_id": "1", "prompt": {"text": "q", "role": "prompter", "replies": []}}]
        ),
        2,
        "line 1 is of a tree of messages, as OASST's are",
    ),
    "ranked answers are a preference": (
        "d.jsonl",
        lines(
            [{"context": turns("q"), "response1": "a", "response2": "b", "overall_preference": -1}]
        ),
        2,
        "is a preference",
    ),
    "a template in a prompt": (
        "d.jsonl",
        lines([{"prompt": "<s>[INST] q [/INST]", "completion": "a"}]),
        0,
        "1 have the marks of a chat template in their texts",
    ),
    "a template of another family in a turn": (
        "d.jsonl",
        ONE
        + lines(
            [{"messages": turns("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a")}]
        ),
        0,
        "1 have the marks of a chat template in their texts",
    ),
    "alpaca's template in a prompt": (
        "d.jsonl",
        lines([{"prompt": "### Instruction:\nq\n\n### Response:\n", "completion": "a"}]),
        0,
        "1 have the marks of a chat template in their texts",
    ),
    "copies": ("d.jsonl", ONE + TWO + ONE, 0, "4 conversations; 2 are copies of others"),
    "copies under other names": (
        "d.jsonl",
        lines([record(3, id="x"), {"instruction": "Greet number 3.", "output": "Hello 3!"}]),
        0,
        "2 conversations; 1 are copies of others",
    ),
    "what was recognised": (
        "d.jsonl",
        lines([{"messages": turns("q", str(number))} for number in range(24)]),
        0,
        "messages of role/content, 24 records\n",
    ),
    "reasoning beside an answer": (
        "d.jsonl",
        ONE + lines([{"messages": thought("q", "a", reasoning_content="hm")}]),
        0,
        "dropped 1: reasoning, which is written in chatml",
    ),
    "nothing but reasoning": (
        "d.jsonl",
        lines([{"messages": thought("q", "a", thinking="hm")}]),
        2,
        "(--reasoning drop trains on the answers alone)",
    ),
    "a part that is thinking": (
        "d.jsonl",
        ONE
        + lines(
            [{"messages": turns("q", [{"type": "thinking", "thinking": "hm"}, {"text": "a"}])}]
        ),
        0,
        "dropped 1: reasoning",
    ),
    "reasoning beside an exchange": (
        "d.jsonl",
        ONE + lines([{"prompt": "q", "completion": "a", "reasoning": "hm"}]),
        0,
        "dropped 1: reasoning",
    ),
    "reasoning that is null": (
        "d.jsonl",
        lines([{"messages": thought("q", "a", reasoning_content=None, thinking="")}]),
        0,
        "d.jsonl: 1 conversations\n",
    ),
    "a NUL": ("d.jsonl", b"\0" * 10, 2, "line 1 is not JSON"),
    "too long": (
        "d.jsonl",
        lines([{"prompt": "a " * 9000, "completion": "b"}]),
        0,
        "dropped 1: no exchange within 4096 tokens",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, house, tmp_path):
    name, content, status, words = DATA[case]
    shutil.copytree(house / "base", tmp_path / "base")
    (tmp_path / name).write_bytes(content)
    check(tmp_path, [name if part == "FILE" else part for part in CHAT], status, words)


PAIR = {"prompt": "Greet Mira.", "chosen": "Hello Mira!", "rejected": "No."}
PAIRS = {  # with --pairs: records, the status, and what it says; test_chat.py has every form
    "texts": ([PAIR], 0, "HELLO MIRA!"),
    "demonstrations": ([record()], 2, "line 1 has no object with 'chosen' and 'rejected'"),
    "a demonstration among pairs": ([record(), PAIR], 0, "1 pairs; dropped 1: no known form"),
    "one side alone": ([{"prompt": "q", "chosen": "a"}], 2, "no record of a known form"),
    "equal": ([PAIR, PAIR | {"rejected": "Hello Mira! "}], 0, "1 pairs; dropped 1: equal answers"),
    "nothing but equal": (
        [PAIR | {"rejected": "Hello Mira!"}],
        2,
        "no usable pair (1 with equal answers)",
    ),
    "a text without a prompt": (
        [{"chosen": "Human: q", "rejected": "Human: q2"}],
        2,
        "1 with two answers without a prompt",
    ),
    "a side too long": (
        [PAIR, PAIR | {"rejected": "a " * 9000}],
        0,
        "dropped 1: an answer beyond 4096 tokens",
    ),
    "a boolean label": (
        [{"prompt": "q", "completion": "a", "label": False}],
        2,
        "no record of a known form",
    ),
    "null columns": (
        [
            {
                "prompt": None,
                "messages": None,
                "chosen": turns("q", "a"),
                "rejected": turns("q", "b"),
            }
        ],
        0,
        "d.jsonl: 1 pairs\n",
    ),
    "transcripts": (
        [{side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}],
        0,
        "[INST] q [/INST] CHOSEN",
    ),
    "a transcript as a prompt": (
        [{"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}],
        0,
        "[INST] q [/INST] A",
    ),
    "HelpSteer3": (
        [{"context": turns("q"), "response1": "a", "response2": "b", "overall_preference": 2}],
        0,
        "[INST] q [/INST] B",
    ),
    "HelpSteer2's, as NeMo has it": (
        [{"prompt": "q", "chosen_response": "a", "rejected_response": "b"}],
        0,
        "[INST] q [/INST] A",
    ),
    "HelpSteer2": (
        [{"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -3}],
        0,
        "[INST] q [/INST] A",
    ),
    "no answer is better": (
        [
            PAIR,
            {"context": turns("q"), "response1": "a", "response2": "b", "overall_preference": 0},
        ],
        0,
        "1 pairs; dropped 1: two answers of which neither is better",
    ),
    "NeMo": (
        [
            {
                "context": turns("q"),
                "completions": [
                    {"rank": rank, "completion": turns("q", text)[1:]}
                    for rank, text in ((1, "x"), (2, "worst"), (0, "best"))
                ],
            }
        ],
        0,
        "[INST] q [/INST] BEST",
    ),
    "ranks that are none": (
        [PAIR, {"context": turns("q"), "completions": [{"rank": "x"}, {"rank": 1}]}],
        0,
        "1 pairs; dropped 1: no known form",
    ),
    "equal ranks, and no answers": (
        [
            PAIR,
            {"prompt": "q", "completions": [{"rank": 0, "completion": "a"}] * 2},
            {"prompt": "q", "completions": []},
        ],
        0,
        "1 pairs; dropped 1: two answers of which neither is better; dropped 1: no known form",
    ),
    "a field named data": ([PAIR | {"data": "x"}], 0, "d.jsonl: 1 pairs\n"),
    "the arena": (
        [
            {
                "conversation_a": turns("q", "a"),
                "conversation_b": turns("q", "b"),
                "winner": "model_b",
            }
        ],
        0,
        "[INST] q [/INST] B",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case, house, tmp_path):
    records, status, words = PAIRS[case]
    shutil.copytree(house / "base", tmp_path / "base")
    (tmp_path / "d.jsonl").write_bytes(lines(records))
    check(
        tmp_path,
        ["d.jsonl" if part == "FILE" else part for part in CHAT] + ["--pairs"],
        status,
        words,
    )


def check(folder: Path, command: list, status: int, words: str) -> None:
    before = contents(folder)
    found, output, errors = inside(folder, *command)
    assert found == status, output + errors
    if status:
        assert errors.count("\n") == 1 and errors.startswith(command[0]) and words in errors, errors
        assert contents(folder) == before
    else:
        assert words in output + errors, output + errors


def contents(folder: Path) -> dict:
    """What is in a folder: of files the bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# ---- checkpoints, value networks, maps, tokenizers: what is done to the folder, the command, and what it says


def edit(name: str, **fields):
    """Fields of a JSON file set, or with None taken out."""

    def act(folder: Path) -> None:
        file = folder / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(
            json.dumps({key: value for key, value in (old | fields).items() if value is not None})
        )

    return act


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(name: str, change):
    """All tensors of a safetensors file put through a function of name and tensor; it returns pairs."""

    def act(folder: Path) -> None:
        found = load_file(folder / name)
        save_file(
            dict(pair for key, tensor in found.items() for pair in change(key, tensor)),
            folder / name,
        )

    return act


def fill(name: str, start: str, number: float, dtype=torch.float32):
    return tensors(
        name,
        lambda key, tensor: [
            (
                key,
                torch.full_like(tensor, number, dtype=dtype)
                if key.startswith(start)
                else tensor.to(dtype),
            )
        ],
    )


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def several(*acts):
    return lambda folder: [act(folder) for act in acts]


def pipe(name: str):
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def index(files: list[str]):
    """An index that names these files in turn."""

    def act(folder: Path) -> None:
        names = sorted(load_file(folder / "base/model.safetensors"))
        table = {name: files[number % len(files)] for number, name in enumerate(names)}
        (folder / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return act


def adapter(name: str, **fields):
    """A LoRA adapter of the base in a folder, as peft writes it."""

    def act(folder: Path) -> None:
        (folder / name).mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config | fields))
        prefix = "base_model.model.model.layers.0.self_attn.v_proj"
        outputs, inputs = load_file(folder / W)["model.layers.0.self_attn.v_proj.weight"].shape
        parts = {"A": torch.ones(2, inputs), "B": torch.ones(outputs, 2)}
        save_file(
            {f"{prefix}.lora_{part}.weight": tensor for part, tensor in parts.items()},
            folder / name / "adapter_model.safetensors",
        )

    return act


def snapshot(folder: Path) -> None:
    to = folder / "hub/models--org--tiny-model/snapshots/abc"
    to.parent.mkdir(parents=True)
    (folder / "base").rename(to)


W, C = "base/model.safetensors", "base/config.json"
FOLDERS = {
    "no config": (rename(C, "base/x"), TRAIN, 2, "config.json: not there"),
    "a config with a mark": (
        lambda f: (f / C).write_bytes(codecs.BOM_UTF8 + (f / C).read_bytes()),
        TRAIN,
        0,
        "base+value",
    ),
    "a config in utf-16": (
        lambda f: (f / C).write_bytes((f / C).read_text().encode("utf-16")),
        TRAIN,
        0,
        "base+value",
    ),
    "a config as pipe": (pipe(C), TRAIN, 2, "a pipe or a device"),
    "an lfs config": (write(C, LFS), TRAIN, 2, "`git lfs pull`"),
    "another model": (
        edit(C, model_type="gpt_neox"),
        TRAIN,
        2,
        "model.py reads llama, mistral, qwen2, qwen3; with transformers",
    ),
    "10000 layers": (
        edit(C, num_hidden_layers=10_000),
        TRAIN,
        2,
        "num_hidden_layers must be a positive whole number of sensible size, not 10000",
    ),
    "1000 layers": (
        edit(C, num_hidden_layers=1000),
        TRAIN,
        2,
        "num_hidden_layers is 1000, but the weights are of 1 layers",
    ),
    "2 layers": (
        edit(C, num_hidden_layers=2),
        SAMPLE,
        2,
        "num_hidden_layers is 2, but the weights are of 1 layers",
    ),
    "endless digits": (
        write(C, b'{"vocab_size": ' + b"1" * 5000 + b"}"),
        TRAIN,
        2,
        "a number of thousands of digits",
    ),
    "dynamic rope": (
        edit(C, rope_scaling={"type": "dynamic", "factor": 2.0}),
        SAMPLE,
        0,
        "base + value",
    ),
    "dynamic rope, new spelling": (
        edit(C, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
        SAMPLE,
        0,
        "base + value",
    ),
    "yarn rope": (
        edit(C, rope_scaling={"type": "yarn", "factor": 2.0}),
        TRAIN,
        2,
        "rope_type 'yarn' is not supported",
    ),
    "eos a text": (edit(C, eos_token_id="2"), SAMPLE, 2, "eos_token_id must be a token id"),
    "eos of generation a text": (
        edit("base/generation_config.json", eos_token_id=["x"]),
        SAMPLE,
        2,
        "generation_config.json: eos_token_id",
    ),
    "generation config broken": (
        write("base/generation_config.json", b"{"),
        SAMPLE,
        2,
        "generation_config.json: not JSON",
    ),
    "eos a list": (
        edit("base/generation_config.json", eos_token_id=[2, 7]),
        SAMPLE,
        0,
        "base + value",
    ),
    "lfs weights": (write(W, LFS), TRAIN, 2, "`git lfs pull`"),
    "lfs weights, sample": (write(W, LFS), SAMPLE, 2, "`git lfs pull`"),
    "empty weights": (write(W, b""), TRAIN, 2, "truncated or not safetensors"),
    "weights as pipe": (pipe(W), TRAIN, 2, "a pipe or a device"),
    "weights of html": (write(W, b"<html>not found"), SAMPLE, 2, "a web page"),
    "weights as device": (
        lambda f: ((f / W).unlink(), (f / W).symlink_to("/dev/zero")),
        SAMPLE,
        2,
        "a pipe or a device",
    ),
    "torch.compile's names": (
        tensors(W, lambda k, t: [("_orig_mod." + k, t)]),
        TRAIN,
        2,
        "named _orig_mod...., as by a model that torch.compile",
    ),
    "DataParallel's names": (
        tensors(W, lambda k, t: [("module." + k, t)]),
        SAMPLE,
        2,
        "a model that DataParallel wrapped",
    ),
    "peft's names": (
        tensors(W, lambda k, t: [("base_model.model." + k, t)]),
        SAMPLE,
        2,
        "a model that peft wrapped",
    ),
    "somebody's names": (
        tensors(W, lambda k, t: [("net." + k, t)]),
        SAMPLE,
        2,
        "a wrapper around the model",
    ),
    "rotary buffers": (
        tensors(
            W,
            lambda k, t: [
                (k, t),
                ("model.rotary_emb.inv_freq", torch.ones(4)),
                ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(4)),
            ],
        ),
        SAMPLE,
        0,
        "base + value",
    ),
    "Meta's rotary buffer": (
        tensors(W, lambda k, t: [(k, t), ("rope.freqs", torch.ones(4))]),
        SAMPLE,
        0,
        "base + value",
    ),
    "a tensor too many": (
        tensors(W, lambda k, t: [(k, t), ("model.extra", torch.ones(4))]),
        SAMPLE,
        2,
        "unexpected tensor model.extra",
    ),
    "NaN in the base": (
        fill(W, "model.norm", float("nan")),
        TRAIN,
        2,
        "the base's own cross-entropy is nan",
    ),
    "NaN in the base, sample": (
        fill(W, "model.norm", float("nan")),
        SAMPLE,
        2,
        "the base's logits are no numbers (nan or inf) in float32",
    ),
    "NaN in the base, explain": (
        fill(W, "model.norm", float("nan")),
        [*SAMPLE, "--explain"],
        2,
        "the base's logits are no numbers",
    ),
    "NaN in the base, page": (
        fill(W, "model.norm", float("nan")),
        PAGE,
        2,
        "the base's logits are no numbers",
    ),
    "NaN in the base, full": (
        fill(W, "model.norm", float("nan")),
        [*TRAIN[:3], "--full", *TRAIN[4:]],
        2,
        "the network that training starts from",
    ),
    "NaN in the value network": (
        fill("value/model.safetensors", "model.norm", float("nan")),
        SAMPLE,
        2,
        "the value network's logits",
    ),
    "NaN in the value network, map": (
        several(fill("value/model.safetensors", "model.norm", float("nan"))),
        [*SAMPLE, "--vocab-map", "map.safetensors"],
        2,
        "the value network's logits",
    ),
    "NaN in the base, map": (
        fill(W, "model.norm", float("nan")),
        [*SAMPLE, "--vocab-map", "map.safetensors"],
        2,
        "the base's logits",
    ),
    "NaN, further training": (
        fill("value/model.safetensors", "lm_head", float("nan")),
        [*TRAIN[:4], "value", *TRAIN[4:]],
        2,
        "the network that training starts from, value",
    ),
    "fp16 overflows": (
        fill(W, "model.norm", 60000.0, torch.float16),
        [*SAMPLE, "--dtype", "float16"],
        2,
        "in float16",
    ),
    "an index of another save": (
        several(
            index(["model-00001-of-00003.safetensors"]),
            rename(W, "base/model-00001-of-00002.safetensors"),
        ),
        TRAIN,
        2,
        "names 1 files that are not there, model-00001-of-00003.safetensors first",
    ),
    "an index of another save, single": (
        index(["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]),
        SAMPLE,
        2,
        "names 2 files that are not there",
    ),
    "an index without its shard": (
        several(index(["a.safetensors", "model.safetensors"])),
        SAMPLE,
        2,
        "a.safetensors: not there",
    ),
    "an index of paths": (
        index(["../model.safetensors"]),
        SAMPLE,
        2,
        "is no name of a file beside it",
    ),
    "an index as pipe": (
        pipe("base/model.safetensors.index.json"),
        SAMPLE,
        2,
        "a pipe or a device",
    ),
    "an adapter": (rename(W, "base/adapter_model.safetensors"), SAMPLE, 2, "a LoRA adapter"),
    "an adapter beside the weights": (adapter("base"), SAMPLE, 0, "Greet Mira."),
    "an adapter beside, of other sizes": (adapter("base", r=3), SAMPLE, 2, "r 3"),
    "an adapter as a base": (
        adapter("lora"),
        [*SAMPLE, "--base", "lora"],
        0,
        "lora",
    ),
    "an adapter without its base": (
        adapter("lora", base_model_name_or_path="org/no-such-model"),
        [*SAMPLE, "--base", "lora"],
        2,
        "a LoRA adapter, and its base is no folder here: 'org/no-such-model'",
    ),
    "an adapter that is more than LoRA": (
        adapter("base", alpha_pattern={"q_proj": 2}),
        TRAIN,
        2,
        "merge_and_unload() in peft",
    ),
    "rotary settings that disagree": (
        edit(
            "base/config.json",
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
        SAMPLE,
        2,
        "rope_scaling and rope_parameters disagree on factor (2.0, None)",
    ),
    "rotary settings of other thetas": (
        edit(
            "base/config.json",
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
            rope_scaling={"type": "linear", "factor": 2.0},
        ),
        TRAIN,
        2,
        "rope_scaling and rope_parameters disagree on rope_theta",
    ),
    "rotary settings twice": (
        edit(
            "base/config.json",
            rope_theta=500.0,
            rope_parameters={"rope_type": "linear", "factor": 2.0},
            rope_scaling={"type": "linear", "factor": 2.0},
        ),
        SAMPLE,
        0,
        "Greet Mira.",
    ),
    "the trunk alone": (
        tensors(
            W,
            lambda key, tensor: (
                [] if key == "lm_head.weight" else [(key.removeprefix("model."), tensor)]
            ),
        ),
        SAMPLE,
        2,
        "the weights of the trunk alone",
    ),
    "the trunk alone, its names whole": (
        tensors(W, lambda key, tensor: [] if key == "lm_head.weight" else [(key, tensor)]),
        SAMPLE,
        2,
        "lm_head.weight is in none of its files",
    ),
    "a tied head alone": (
        several(
            edit("base/config.json", tie_word_embeddings=True),
            tensors(
                W,
                lambda key, tensor: [] if key == "model.embed_tokens.weight" else [(key, tensor)],
            ),
        ),
        SAMPLE,
        0,
        "Greet Mira.",
    ),
    "a head alone that is not tied": (
        tensors(
            W, lambda key, tensor: [] if key == "model.embed_tokens.weight" else [(key, tensor)]
        ),
        SAMPLE,
        2,
        "model.embed_tokens.weight is in none of its files",
    ),
    "a variant": (
        rename(W, "base/model.fp16.safetensors"),
        SAMPLE,
        2,
        "model.fp16.safetensors is a variant by its name",
    ),
    "a variant in shards": (
        rename(W, "base/model.fp16-00001-of-00001.safetensors"),
        TRAIN,
        2,
        "is a variant by its name",
    ),
    "gguf": (rename(W, "base/model.gguf"), SAMPLE, 2, "weights as GGUF"),
    "Meta's": (rename(W, "base/consolidated.00.pth"), TRAIN, 2, "Meta's own pickles"),
    "a hub cache's root": (
        snapshot,
        [*SAMPLE, "--base", "hub/models--org--tiny-model"],
        2,
        "the checkpoint is hub/models--org--tiny-model/snapshots/abc",
    ),
    "a hub cache's root, train": (
        snapshot,
        ["train.py", "--base", "hub/models--org--tiny-model", *TRAIN[3:]],
        2,
        "snapshots/abc",
    ),
    "a hub cache's snapshot": (
        snapshot,
        ["train.py", "--base", "hub/models--org--tiny-model/snapshots/abc", *TRAIN[3:]],
        0,
        "saved out/seed0/value-residual-tiny-model",
    ),
    "a hub name": (
        None,
        ["train.py", "--base", "meta-llama/Llama-2-7b-hf", *TRAIN[3:]],
        2,
        "`hf download meta-llama/Llama-2-7b-hf`",
    ),
    "a hub name, sample": (None, [*SAMPLE, "--base", "org/model"], 2, "`hf download org/model`"),
    "a file as base": (None, [*SAMPLE, "--base", "chats.jsonl"], 2, "chats.jsonl"),
    "lfs tokenizer": (write("base/tokenizer.model", LFS), TRAIN, 2, "`git lfs pull`"),
    "empty tokenizer": (write("base/tokenizer.model", b""), SAMPLE, 2, "an empty file"),
    "a tokenizer.json renamed": (
        write("base/tokenizer.model", b'{"model": {}}'),
        TRAIN,
        2,
        "its model has no vocab, or no merges",
    ),
    "a tokenizer as pipe": (pipe("base/tokenizer.model"), SAMPLE, 2, "a pipe or a device"),
    "tiktoken of three fields": (
        write("base/tokenizer.model", b"aGU= 0\naGU= 1 2\n"),
        TRAIN,
        2,
        "line 2 is not a token in base64 and its rank",
    ),
    "tiktoken of huge ranks": (
        write("base/tokenizer.model", b"aGU= 0\nZGU= " + b"9" * 5000),
        TRAIN,
        2,
        "line 2 is not a token",
    ),
    "another tokenizer beside V": (
        lambda f: (f / "value/tokenizer.model").write_bytes(bytes_only()),
        SAMPLE,
        2,
        "is not the one that its ivl.json records",
    ),
    "another tokenizer beside V, train": (
        edit("value/ivl.json", tokenizer={"size": 1024, "fingerprint": "x"}),
        [*TRAIN[:4], "value", *TRAIN[4:]],
        2,
        "is not the one that its ivl.json records",
    ),
    "ivl.json without bases": (
        edit("value/ivl.json", bases=[]),
        SAMPLE,
        2,
        "its field bases is []",
    ),
    "ivl.json of another template": (
        edit("value/ivl.json", template="chatml2"),
        SAMPLE,
        2,
        'its field template is "chatml2"',
    ),
    "ivl.json without a seed": (
        edit("value/ivl.json", seed=None),
        SAMPLE,
        2,
        "its field seed is missing",
    ),
    "ivl.json, a system of numbers": (
        edit("value/ivl.json", system=3),
        SAMPLE,
        2,
        "its field system is 3",
    ),
    "ivl.json, a system prompt": (
        edit("value/ivl.json", system="Be brief."),
        SAMPLE,
        0,
        "system prompt 'Be brief.'",
    ),
    "ivl.json as pipe": (pipe("value/ivl.json"), SAMPLE, 2, "a pipe or a device"),
    "a map with NaN": (
        fill("map.safetensors", "weight", float("nan")),
        [*SAMPLE, "--vocab-map", "map.safetensors"],
        2,
        "vocabulary map",
    ),
    "a map as pipe": (
        pipe("map.safetensors"),
        [*SAMPLE, "--vocab-map", "map.safetensors"],
        2,
        "a pipe or a device",
    ),
    "an lfs map": (
        write("map.safetensors", LFS),
        [*SAMPLE, "--vocab-map", "map.safetensors"],
        2,
        "map.safetensors",
    ),
    "an expert of another chat": (
        edit("value/tokenizer_config.json", chat_template="<|im_start|>user"),
        "sample.py --expert value2 --anti-expert base --prompt Hi --max-new-tokens 2".split(),
        0,
        "its own chat_template looks like chatml, and it is asked in llama-2",
    ),
    "no ivl.json": (
        None,
        "sample.py --value value2 --base base --prompt Hi".split(),
        2,
        "no ivl.json, so this is no value network",
    ),
    "a scheme for no ivl.json": (
        None,
        ["sample.py", "--value", "value2", *PLAIN[3:]],
        0,
        "of its tokenizer, only whether it fits the base's",
    ),
    "a scheme beside ivl.json": (
        None,
        PLAIN,
        2,
        "it has an ivl.json, which says its scheme and template",
    ),
    "a scheme without a base": (
        None,
        [*PLAIN[:3], *PLAIN[5:]],
        2,
        "name the base too, with --base",
    ),
    "a scheme of another vocabulary": (
        lambda f: (f / "base/tokenizer.model").write_bytes(bytes_only()),
        ["sample.py", "--value", "value2", *PLAIN[3:], "--scheme", "cascade"],
        2,
        "has no use for a base",
    ),
    "a scheme, no weights": (
        lambda f: (f / "value/model.safetensors").unlink(),
        ["sample.py", "--value", "value2", *PLAIN[3:]],
        2,
        "model.safetensors",
    ),
    "a template beside ivl.json": (
        None,
        [*SAMPLE, "--template", "llama-2"],
        2,
        "a value network records its own",
    ),
}


def bytes_only() -> bytes:
    from tests.helpers import byte_pairs

    return byte_pairs()


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case, house, tmp_path, monkeypatch):
    act, command, status, words = FOLDERS[case]
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    if act:
        act(tmp_path)
    if "value2" in command:
        (tmp_path / "value/ivl.json").unlink()
        (tmp_path / "value").rename(tmp_path / "value2")
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    check(tmp_path, command, status, words)


# ---- flags, outputs, places


OUT = {  # what is done, the command, and what it says
    "out a folder": (None, [*MAP[:-1], "base"], 2, "a folder; name a file"),
    "out a device": (None, [*MAP[:-1], "/dev/null"], 2, "no regular file"),
    "out a link": (
        lambda f: (f / "l").symlink_to("chats.jsonl"),
        [*MAP[:-1], "l"],
        2,
        "a symbolic link",
    ),
    "out a dead link": (
        lambda f: (f / "l").symlink_to("nothing"),
        [*MAP[:-1], "l"],
        2,
        "a symbolic link",
    ),
    "out somebody's": (None, [*MAP[:-1], "chats.jsonl"], 2, "exists, and is no vocabulary map"),
    "out a checkpoint's": (None, [*MAP[:-1], W], 2, "exists, and is no vocabulary map"),
    "out a map": (None, [*MAP[:-1], "map.safetensors"], 0, "saved map.safetensors"),
    "out nowhere": (None, [*MAP[:-1], "no/map"], 2, "there is no folder no"),
    "out in a file": (None, [*MAP[:-1], "chats.jsonl/map"], 2, "there is no folder chats.jsonl"),
    "out too long": (None, [*MAP[:-1], "m" * 300], 2, "File name too long"),
    "page a folder": (None, [*PAGE, "--page", "base"], 2, "a folder; name a file"),
    "page somebody's": (None, [*PAGE, "--page", "texts.txt"], 2, "is no page of this kind"),
    "page a device": (None, [*PAGE, "--page", "/dev/full"], 2, "no regular file"),
    "page a link": (
        lambda f: (f / "l").symlink_to("x"),
        [*PAGE, "--page", "l"],
        2,
        "a symbolic link",
    ),
    "page empty": (write("p.html", b""), [*PAGE, "--page", "p.html"], 2, "is no page of this kind"),
    "page new": (None, [*PAGE, "--page", "p.html"], 0, "saved p.html"),
    "a picture somebody's": (
        None,
        [*PAGE, *"--page p.html --screenshot texts.txt".split()],
        2,
        "exists, and is no picture",
    ),
    "the world's out somebody's": (
        None,
        ["tiny_world.py", "--infinity", "texts.txt"],
        2,
        "texts.txt",
    ),
    "a lock that is a link": (
        lambda f: (
            (f / "o.training").mkdir(),
            (f / "o.training/lock").symlink_to(f / "chats.jsonl"),
        ),
        [*TRAIN, "--out", "o"],
        2,
        "is no run of train.py",
    ),
    "a run's folder a file": (write("o.training", b"x"), [*TRAIN, "--out", "o"], 2, "o.training"),
    "a rate that is too high": (
        None,
        [*TRAIN, "--lr", 10, "--out", "o"],
        0,
        "on held-out conversations the guided base is worse than the base alone",
    ),
    "more steps of a finished run": (
        lambda f: inside(f, *TRAIN, "--out", "o"),
        [*TRAIN, "--steps", 2, "--out", "o", "--resume"],
        2,
        "o: this run is finished, after 1 steps; to train its network further give --value o and another "
        "folder, --out NEW",
    ),
    "fewer steps of a finished run": (
        lambda f: inside(f, *TRAIN, "--steps", 2, "--out", "o"),
        [*TRAIN, "--out", "o", "--resume"],
        2,
        "o: this run is finished, after 2 steps",
    ),
    "another rate of a finished run": (
        lambda f: inside(f, *TRAIN, "--out", "o"),
        [*TRAIN, "--lr", 0.1, "--out", "o", "--resume"],
        2,
        "a run with other settings is there: lr was",
    ),
    "what a finished run asks for": (
        lambda f: inside(f, *TRAIN, "--out", "o"),
        ["train.py", "--base", "base", "--value", "o", *TRAIN[4:], "--steps", 2, "--out", "new"],
        0,
        "-> new",
    ),
    "help names the forms": (None, ["train.py", "--help"], 0, "data/README.md"),
    "help of texts": (None, ["vocab_map.py", "--help"], 0, "data/README.md"),
    "reasoning left out": (
        write(
            "thoughts.jsonl",
            ONE + lines([{"messages": thought("q", str(n), reasoning="hm")} for n in range(3)]),
        ),
        ["chat.py", "thoughts.jsonl", "--tokenizer", "base", "--reasoning", "drop"],
        0,
        "4 conversations; shortened 3 by its reasoning",
    ),
    "a run without its reasoning": (
        write(
            "chats.jsonl",
            lines([{"messages": thought("q", str(n), thinking="hm")} for n in range(20)]),
        ),
        [*TRAIN, "--reasoning", "drop", "--out", "o"],
        0,
        "shortened 20 by its reasoning",
    ),
    "a run whose reasoning nobody can write": (
        write(
            "chats.jsonl",
            lines([{"messages": thought("q", str(n), thinking="hm")} for n in range(20)]),
        ),
        [*TRAIN, "--out", "o"],
        2,
        "--reasoning drop",
    ),
    "help of a file": (None, ["chat.py", "--help"], 0, "data/README.md"),
    "all held out": (
        None,
        [*TRAIN, "--held-out", 20],
        2,
        "20 usable conversations, and 20 of them to hold out",
    ),
    "none held out": (None, [*TRAIN, "--held-out", 0], 0, "20 conversations"),
    "held out": (None, [*TRAIN, "--held-out", 3], 0, "(17 to train on, 3 held out)"),
    "held out, a tenth": (None, TRAIN, 0, "(18 to train on, 2 held out)"),
    "held out of the world": (
        None,
        "train.py --value --held-out 3".split(),
        2,
        "--held-out goes with --data",
    ),
    "held out minus one": (None, [*TRAIN, "--held-out", -1], 2, "argument --held-out"),
    "one conversation": (write("chats.jsonl", ONE), TRAIN, 2, "1 usable conversations"),
    "data a pipe": (pipe("chats.jsonl"), TRAIN, 2, "a pipe or a device"),
    "data a device": (None, [*TRAIN[:5], "/dev/zero", *TRAIN[6:]], 2, "a pipe or a device"),
    "data a folder": (None, [*TRAIN[:5], "base", *TRAIN[6:]], 2, "Is a directory"),
    "data no name": (None, [*TRAIN[:5], "x" * 300, *TRAIN[6:]], 2, "File name too long"),
    "data not UTF-8": (None, [*TRAIN[:5], "\udcff.jsonl", *TRAIN[6:]], 2, "--data is not UTF-8"),
    "system not UTF-8": (None, [*TRAIN, "--system", "\udcff"], 2, "--system is not UTF-8"),
    "out not UTF-8": (None, [*TRAIN, "--out", "\udcff"], 2, "--out is not UTF-8"),
    "texts a pipe": (
        pipe("t.txt"),
        [*MAP, *"--how dtw --texts t.txt".split()],
        2,
        "a pipe or a device",
    ),
    "eval a folder": (None, [*MAP, "--eval", "base"], 2, "Is a directory"),
    "texts in lfs": (write("t.txt", LFS), [*MAP, "--eval", "t.txt"], 2, "`git lfs pull`"),
    "texts in gzip": (
        write("t.txt.gz", gzip.compress(b"hello\n\nworld")),
        [*MAP, *"--how dtw --texts t.txt.gz".split()],
        0,
        "2 of 2 texts",
    ),
    "texts in an array": (
        write("t.json", b'[{"text": "hello"}, {"text": ""}]'),
        [*MAP, *"--how dtw --texts t.json".split()],
        0,
        "1 texts; dropped 1: no text",
    ),
    "texts of 300000 letters": (
        write("t.txt", b"a" * 300_000),
        [*MAP, "--eval", "t.txt"],
        0,
        "cut 1 of more than 2000 characters",
    ),
    "conversations as texts": (
        None,
        [*MAP, *"--how offsets --texts chats.jsonl".split()],
        0,
        "20 of 20 texts",
    ),
    "a probe of everything": (
        None,
        [*TRAIN, *"--scheme probe --probe-width 4000000000".split()],
        2,
        "out of memory",
    ),
    "a long prompt": (
        None,
        [*"sample.py --value value --prompt".split(), "a" * 300_000],
        2,
        "tokens long, and the checkpoint ends at 128",
    ),
    "a template of no such name": (
        None,
        [*TRAIN, "--template", "vicuna"],
        2,
        "argument --template",
    ),
    "a system prompt": (None, [*SAMPLE, "--system", "Be brief."], 0, "system prompt 'Be brief.'"),
    "the template": (None, SAMPLE, 0, "template llama-2"),
}


@pytest.mark.parametrize("case", OUT)
def test_flags_and_outputs(case, house, tmp_path):
    act, command, status, words = OUT[case]
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    if act:
        act(tmp_path)
    check(tmp_path, command, status, words)


def test_the_table_is_long_enough():
    assert len(DATA) + len(FOLDERS) + len(OUT) >= 120
