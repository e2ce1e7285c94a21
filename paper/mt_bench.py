"""MT-Bench: answers to its two-turn questions, in the form that FastChat's judge reads.

    python -m paper.mt_bench --questions question.jsonl --out model_answer/guided.jsonl --base B --value V
    torchrun --nproc_per_node=4 -m paper.mt_bench ...     # the base split between four GPUs

question.jsonl is FastChat's (fastchat/llm_judge/data/mt_bench). The name of the file is the name of
the model. A run that was stopped goes on when the same command is given again, with the question it
was at. Judging takes FastChat and a key for GPT-4; the commands are printed at the end.
"""

import contextlib
import hashlib
import json
import os
import time
from argparse import Namespace
from pathlib import Path

from filelock import FileLock, Timeout

from data.errors import UsageError
from data.files import check_output, digest, replacing
from data.records import Records, Turn, is_unicode
from run.arguments import GUIDANCE, measured_arguments
from run.cli import ArgumentParser, clock, non_negative_int, positive_int, run_cli
from run.plug import plug_speaker
from run.processes import Alone, join_decoders
from sample import Speaker

TEMPERATURES = {  # FastChat's, by a question's category; 0.7 for others
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
SETTINGS = (*GUIDANCE, "max_new_tokens", "seed")

# --------------------------------------------------------------------------------------------------
# Questions and answers as FastChat writes them


def read_questions(path: Path) -> dict[int, dict]:
    """The questions by their ids."""
    questions = {}
    for _, place, question in Records(path):
        if (
            not isinstance(question, dict)
            or type(question.get("question_id")) is not int
            or not is_texts(question.get("turns"))
        ):
            raise UsageError(
                f"{path}: {place} is no question of MT-Bench, which has a question_id and turns"
            )
        if question["question_id"] in questions:
            raise UsageError(f"{path}: {place}: question {question['question_id']} comes twice")
        questions[question["question_id"]] = question
    return questions


def is_texts(turns) -> bool:
    return (
        isinstance(turns, list)
        and len(turns) > 0
        and all(isinstance(turn, str) and is_unicode(turn) for turn in turns)
    )


def read_answers(path: Path) -> dict[int, dict]:
    """The answers so far, by question; a last line that was cut off is dropped."""
    if not path.exists():
        return {}
    whole, newline, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        with replacing(path) as temporary:
            temporary.write_bytes(whole + newline)
    answers = {}
    for _, place, record in Records(path) if whole else []:
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise UsageError(
                f"--out {path}: {place} was not written by this command; choose another name"
            )
        answers[record.get("question_id")] = record
    return answers


# --------------------------------------------------------------------------------------------------
# Answering


def answer_turns(speaker: Speaker, question: dict, args) -> tuple[list[str], int]:
    """The answers to a question's turns, in order, and how many turns had no room."""
    asking = Namespace(
        temperature=TEMPERATURES.get(question.get("category"), 0.7),
        top_p=1.0,
        seed=args.seed + question["question_id"],
        max_new_tokens=args.max_new_tokens,
    )
    said: list[Turn] = []
    no_room = 0
    for text in question["turns"]:
        said.append(("user", text))
        has_room = len(speaker.encode(said)) < speaker.longest
        no_room += not has_room
        said.append(("assistant", speaker.answer(said, asking) if has_room else ""))
    return [text for role, text in said if role == "assistant"], no_room


def answer_all(
    speaker: Speaker, questions: dict[int, dict], args, settings: dict, processes: Alone
) -> None:
    """Answer what has no answer yet. The first process writes each answer as soon as it is there."""
    done = read_answers(args.out)
    for record in done.values():
        if record["settings"] != settings:
            other = [name for name in settings if record["settings"].get(name) != settings[name]]
            raise UsageError(
                f"--out {args.out}: question {record['question_id']} was answered with another {', '.join(sorted(other))}; "
                "choose another name"
            )
    waiting = [question for number, question in questions.items() if number not in done]
    if done:
        print(f"{args.out}: {len(done)} of {len(questions)} questions are answered already")
    started, no_room = time.monotonic(), 0
    for count, question in enumerate(waiting, 1):
        turns, without = answer_turns(speaker, question, args)
        no_room += without
        record = {
            "question_id": question["question_id"],
            "answer_id": answer_id(settings, question),
            "model_id": args.out.stem,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "settings": settings,
        }
        with open(os.devnull if processes.rank else args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        left = (time.monotonic() - started) / count * (len(waiting) - count)
        print(
            f"question {question['question_id']} ({len(done) + count}/{len(questions)})  {clock(left)} left",
            flush=True,
        )
    if no_room:
        print(f"{no_room} turns have an empty answer: with what was said before they are too long")


def answer_id(settings: dict, question: dict) -> str:
    """A name for an answer. FastChat's are random; this one is the same in every run."""
    what = json.dumps([settings, question["question_id"]], sort_keys=True)
    return hashlib.blake2b(what.encode(), digest_size=11).hexdigest()


def write_answers(questions: dict[int, dict], args, processes: Alone) -> None:
    """Answer into --out, which nobody else may be writing."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(
        "--out",
        args.out,
        "file of answers",
        lambda start: start.startswith(b'{"question_id"') or not start,
    )
    lock = contextlib.nullcontext() if processes.rank else FileLock(f"{args.out}.lock", timeout=0)
    try:
        with lock:
            speaker = plug_speaker(args, processes)
            settings = {name: getattr(args, name) for name in SETTINGS} | {
                "questions": digest(args.questions),
                "weights": speaker.stamp,
            }
            answer_all(speaker, questions, args, settings, processes)
    except Timeout:
        raise UsageError(f"--out {args.out}: another process is writing it") from None
    if processes.rank == 0:
        Path(f"{args.out}.lock").unlink(missing_ok=True)


def say_how_to_judge(path: Path) -> None:
    print(f"""{path}: complete. To have it judged, in FastChat's folder fastchat/llm_judge:
    mkdir -p data/mt_bench/model_answer && cp {path.resolve()} data/mt_bench/model_answer/
    OPENAI_API_KEY=... python gen_judgment.py --model-list {path.stem} --judge-model gpt-4
    python show_result.py --model-list {path.stem}""")


# --------------------------------------------------------------------------------------------------


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--questions", type=Path, required=True, help="FastChat's question.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="model_answer/NAME.jsonl")
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024, help="(default 1024)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of sampling")
    args = measured_arguments(parser, temperature=0.7)
    questions = read_questions(args.questions)
    with join_decoders(args.device) as processes:
        write_answers(questions, args, processes)
        if processes.rank == 0:
            say_how_to_judge(args.out)


if __name__ == "__main__":
    run_cli(main)
