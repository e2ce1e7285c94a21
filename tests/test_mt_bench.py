"""paper/mt_bench.py: answers in FastChat's form, question by question."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paper.mt_bench import TEMPERATURES
from tests.helpers import ENVIRONMENT, ROOT, inside, together, worked

NAMES = ["Mira", "Fufa", "Pefu", "Boli", "Gana"]


@pytest.fixture
def asked(home, tmp_path) -> list:
    """Ten two-turn questions of all categories in a file, and the command that has them answered."""
    categories = [*TEMPERATURES, "something else", "math"]
    questions = [
        {
            "question_id": 81 + number,
            "category": category,
            "turns": [f"Greet {NAMES[number % 5]}.", f"Say it twice: é{number}."],
        }
        for number, category in enumerate(categories)
    ]
    (tmp_path / "question.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    return [
        "mt_bench.py",
        "--questions",
        "question.jsonl",
        "--out",
        "tiny-s.jsonl",
        "--max-new-tokens",
        12,
        "--base",
        home / "out/seed0/tiny-s",
        "--value",
        home / "out/seed0/value-residual-tiny-s",
    ]


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "tiny-s.jsonl").read_text().splitlines()]


def texts(folder: Path) -> dict[int, list[str]]:
    return {record["question_id"]: record["choices"][0]["turns"] for record in answers(folder)}


def test_every_question_is_answered_once_in_fastchats_form(asked, tmp_path):
    output = worked(tmp_path, *asked)
    assert "gen_judgment.py --model-list tiny-s" in output and "(10/10)" in output
    for record in answers(tmp_path):
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= record.keys()
        assert record["model_id"] == "tiny-s" and len(record["choices"][0]["turns"]) == 2
    assert [record["question_id"] for record in answers(tmp_path)] == list(range(81, 91))
    assert not (tmp_path / "tiny-s.jsonl.lock").exists()
    judge = pytest.importorskip("fastchat.llm_judge.common", reason="fschat is not installed")
    (tmp_path / "answers").mkdir()
    (tmp_path / "tiny-s.jsonl").rename(tmp_path / "answers/tiny-s.jsonl")
    questions = judge.load_questions(str(tmp_path / "question.jsonl"), None, None)
    judge.check_data(
        questions, judge.load_model_answers(str(tmp_path / "answers")), {}, ["tiny-s"], {}
    )


@pytest.mark.slow
def test_two_processes_answer_as_one(asked, tmp_path):
    """Greedy and sampled, by the base divided between them; the first alone writes."""
    worked(tmp_path, *asked)
    alone = texts(tmp_path)
    (tmp_path / "tiny-s.jsonl").unlink()
    done = together(tmp_path, "-m", "paper.mt_bench", *asked[1:])
    assert done.returncode == 0, done.stderr
    assert (
        texts(tmp_path) == alone
        and len(answers(tmp_path)) == 10
        and done.stdout.count("(10/10)") == 1
    )


def test_a_run_that_was_cut_off_within_a_line_goes_on_and_says_the_same(asked, tmp_path):
    inside(tmp_path, *asked)
    whole, content = texts(tmp_path), (tmp_path / "tiny-s.jsonl").read_bytes()
    (tmp_path / "tiny-s.jsonl").write_bytes(
        content[: len(content) // 2] + "é".encode()[:1]
    )  # in the middle of a letter
    output = worked(tmp_path, *asked)
    assert "answered already" in output
    assert texts(tmp_path) == whole and len(answers(tmp_path)) == 10


@pytest.mark.slow
def test_a_killed_run_goes_on_with_no_question_twice_and_none_lost(asked, tmp_path):
    command = [sys.executable, ROOT / "paper/mt_bench.py", *asked[1:]]
    for rounds in range(40):
        process = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        )
        lines = (tmp_path / "tiny-s.jsonl").read_bytes().count(b"\n") if rounds else 0
        while process.poll() is None and (
            not (tmp_path / "tiny-s.jsonl").exists()
            or (tmp_path / "tiny-s.jsonl").read_bytes().count(b"\n") < lines + 2
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    assert rounds > 1
    assert [record["question_id"] for record in answers(tmp_path)] == list(range(81, 91))


def test_a_base_alone_is_asked_too_and_the_answers_of_another_model_are_not_mixed_in(
    asked, tmp_path
):
    alone = asked[:-2]
    worked(tmp_path, *alone)
    assert inside(tmp_path, *asked)[0] == 2
    status, _, errors = inside(tmp_path, *alone, "--seed", 1)
    assert status == 2 and "was answered with another seed" in errors


def test_answers_of_weights_trained_anew_in_the_same_folder_are_not_mixed_in(asked, tmp_path):
    shutil.copytree(asked[-3], tmp_path / "base")
    command = [*asked[:-4], "--base", "base"]
    worked(tmp_path, *command)
    (tmp_path / "base/model.safetensors").write_bytes(
        (asked[-3] / "model.safetensors").read_bytes()
    )
    status, _, errors = inside(tmp_path, *command)
    assert status == 2 and "was answered with another weights" in errors


def test_a_turn_without_room_has_an_empty_answer_and_is_counted(asked, tmp_path):
    question = {"question_id": 1, "category": "math", "turns": ["Greet Mira.", "word " * 300]}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    output = worked(tmp_path, *asked)
    assert "1 turns have an empty answer" in output
    assert texts(tmp_path)[1][1] == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question_id": 1}\n', "is no question of MT-Bench"),
        ('{"question_id": 1, "turns": []}\n', "is no question of MT-Bench"),
        ('{"question_id": 1, "turns": ["a"]}\n' * 2, "question 1 comes twice"),
        ("", "an empty file"),
    ],
)
def test_other_files_of_questions_are_refused(content, words, asked, tmp_path):
    (tmp_path / "question.jsonl").write_text(content)
    status, _, errors = inside(tmp_path, *asked)
    assert status == 2 and words in errors and errors.count("\n") == 1


def test_nothing_named_is_one_line(asked, tmp_path):
    status, _, errors = inside(tmp_path, *asked[:-4])
    assert status == 2 and "name what is measured" in errors


@pytest.mark.slow
def test_smollm2_answers_in_fastchats_form(asked, smollm2, tmp_path):
    output = worked(tmp_path, *asked[:-4], "--base", smollm2)
    assert "template chatml" in output and "(10/10)" in output
    assert all(turn for turns in texts(tmp_path).values() for turn in turns)
