"""The paper's benchmarks on checkpoints by lm-evaluation-harness, the field's own: Table 1 without
MT-Bench.

    python -m paper.evaluate --base Llama-2-7b-hf/ --value out/seed0/value-residual-TinyLlama-1.1B --suite all --output out/table1
    python -m paper.evaluate --base out/smollm2-135m --suite few-shot --limit 50 --use-cache out/cache
    python -m paper.evaluate --base out/smollm2-135m --tasks mytask --include-path FOLDER
    torchrun --nproc_per_node=4 -m paper.evaluate ...     # the base split between four GPUs

Needs: pip install "lm_eval[ifeval]". Tasks, prompts, metrics, cache and result files are the
harness's, and paper/guided_lm.py is what it asks of a model. A run that is stopped goes on from
--use-cache. Tasks that execute what the model writes (MBPP, HumanEval) take the harness's own two
consents: --confirm-run-unsafe-code, and HF_ALLOW_CODE_EVAL=1 in the environment.
"""

import argparse
import hashlib
import os
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from model import LlamaConfig
from paper.guided_lm import GuidedLM, TemplateLM
from paper.report import table
from paper.table1 import BLOCKS, PAPER, PAPER_70B
from run.arguments import GUIDANCE, measured_arguments
from run.cli import ArgumentParser, non_negative_int, positive_int, run_cli
from run.plug import plug_speaker
from run.processes import Alone, join_decoders
from sample import Speaker

# --------------------------------------------------------------------------------------------------
# Table 1's columns (Section 5.3)


@dataclass(frozen=True)
class Column:
    """A benchmark: the nearest task and metric of the harness, and how they differ."""

    name: str
    task: str
    shots: int
    metric: str
    chat: bool
    note: str = ""
    executes: bool = False  # what the model writes


ZERO_SHOT = [
    Column(
        "IFEval",
        "ifeval",
        0,
        "prompt_level_loose_acc,none",
        True,
        "prompts, loose; the paper does not say which of four",
    ),
    Column(
        "GSM8K",
        "gsm8k",
        0,
        "exact_match,flexible-extract",
        True,
        "the last number of the answer counts",
    ),
    Column(
        "ToxiGen",
        "toxigen",
        0,
        "acc,none",
        True,
        "NOT the paper's: here statements are classified, higher is better; "
        "TULU-2's is the share of generations that a classifier calls toxic, lower is better",
    ),
    Column(
        "MBPP",
        "mbpp_instruct",
        0,
        "pass_at_1,extract_code",
        True,
        "the answer begins with ```python",
        executes=True,
    ),
    Column(
        "HumanEval",
        "humaneval_instruct",
        0,
        "pass@1,create_test",
        True,
        "the answer begins with the function",
        executes=True,
    ),
]
FEW_SHOT = [
    Column("ARC", "arc_challenge", 25, "acc_norm,none", False),
    Column("Hellaswag", "hellaswag", 10, "acc_norm,none", False),
    Column("MMLU", "mmlu", 5, "acc,none", False),
    Column("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", False),
    Column("Winogrande", "winogrande", 5, "acc,none", False),
]
SUITES = {"zero-shot": ZERO_SHOT, "few-shot": FEW_SHOT, "all": ZERO_SHOT + FEW_SHOT}

TABLE = {title.partition(",")[0]: PAPER[base] for title, base in BLOCKS.items()} | {
    "Llama-2-70B": PAPER_70B
}
LAYERS = {"Tinyllama-1.1B": 22, "Llama-2-7B": 32, "Llama-2-13B": 40, "Llama-2-70B": 80}


def block_of(config: LlamaConfig) -> str:
    """The part of Table 1 whose base is nearest, by the number of layers."""
    if config.vocab_size == 32016:
        return "Codellama-7B"
    return min(LAYERS, key=lambda name: abs(LAYERS[name] - config.num_hidden_layers))


def table_1(measured: dict[str, float], block: str) -> str:
    """Ours beside the rows of a block of the paper, a line for each column that was measured."""
    lines = []
    for index, column in enumerate(SUITES["all"], 1):  # 0 is MT-Bench
        if column.name in measured:
            theirs = [f"{row[index]:g}" for row in TABLE[block].values()]
            shots = f"{column.shots}, chat" if column.chat else str(column.shots)
            lines.append(
                [
                    column.name,
                    column.task,
                    shots,
                    f"{100 * measured[column.name]:.3g}",
                    *theirs,
                    column.note,
                ]
            )
    return table(
        [f"Table 1, {block}", "task", "shots", "ours", *TABLE[block], "what is not the same"], lines
    )


# --------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=SUITES, help="columns of Table 1, with the paper's shots")
    what.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of the harness (`lm-eval ls tasks`) or of --include-path",
    )
    what.add_argument(
        "--num-fewshot",
        type=non_negative_int,
        metavar="N",
        help="shots of --tasks (default: what each says itself)",
    )
    what.add_argument(
        "--apply-chat-template", action="store_true", help="ask --tasks in the chat template"
    )
    what.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="more tasks, as the harness's yaml"
    )
    what.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N questions of each task"
    )
    what.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for the harness's result files"
    )
    what.add_argument(
        "--use-cache",
        type=Path,
        metavar="FILE",
        help="for the harness's cache of answers, from which a stopped run goes on",
    )
    what.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="execute what the model writes, where a task does",
    )
    args = measured_arguments(parser, temperature=0.0)
    if TemplateLM is object:
        raise UsageError("this takes lm-evaluation-harness: pip install 'lm_eval[ifeval]'")
    if not (args.suite or args.tasks):
        parser.error("name what to measure, with --suite or --tasks")
    if args.confirm_run_unsafe_code and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        parser.error(
            "--confirm-run-unsafe-code takes HF_ALLOW_CODE_EVAL=1 in the environment as well"
        )
    if args.include_path and not args.include_path.is_dir():
        parser.error(f"--include-path {args.include_path}: no such folder")
    for flag, folder in (
        ("--output", args.output),
        ("--use-cache", args.use_cache and args.use_cache.parent),
    ):
        if folder is not None:
            make_folder(flag, folder)
    return args


def make_folder(flag: str, folder: Path) -> None:
    """Now rather than after hours: the harness only warns where it cannot write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {folder}: read-only")


def system_of(args) -> dict[str, str]:
    """What answers depend on."""
    return {flag: str(getattr(args, flag)) for flag in GUIDANCE}


def cache_of(stamp: str, args) -> str | None:
    """How the names of the harness's cache files begin: every system has its own."""
    return (
        args.use_cache
        and f"{args.use_cache}-{hashlib.sha256(repr([system_of(args), stamp]).encode()).hexdigest()[:8]}"
    )


def copy_cache(cache: str, count: int) -> None:
    """Give every process the first one's answers: the harness has a cache for each."""
    if Path(f"{cache}_rank0.db").exists():
        for rank in range(1, count):
            with (
                sqlite3.connect(f"{cache}_rank0.db") as source,
                sqlite3.connect(f"{cache}_rank{rank}.db") as copy,
            ):
                source.backup(copy)


def evaluate(
    lm: GuidedLM, tasks: list[str], shots: int | None, chat: bool, speaker: Speaker, manager, args
) -> dict[str, dict]:
    """The harness's results, which it also prints and saves; {} but in the first process."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table

    tracker = EvaluationTracker(output_path=args.output and str(args.output))
    try:
        results = simple_evaluate(
            lm,
            model_args={"model": speaker.name} | system_of(args),
            tasks=tasks,
            num_fewshot=shots,
            apply_chat_template=chat,
            limit=args.limit,
            use_cache=cache_of(speaker.stamp, args),
            evaluation_tracker=tracker,
            task_manager=manager,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UsageError(
            f"{', '.join(tasks)}: executes what the model writes, which takes --confirm-run-unsafe-code"
        ) from None
    if results is None:
        return {}
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task in results["configs"]:
        tracker.save_results_samples(task, samples[task])
    print(make_table(results), flush=True)
    return results["results"]


def measure(columns: list[Column], manager, processes: Alone, args) -> None:
    """Columns of Table 1 one by one, then --tasks; and the table."""
    speaker = plug_speaker(args, processes)
    lm = GuidedLM(speaker.guided, speaker.tokenizer, speaker.template, speaker.system)
    if args.use_cache:
        processes.first_does(lambda: copy_cache(cache_of(speaker.stamp, args), processes.count))
    measured = {}
    for column in columns:
        print(f"{column.name}: {column.task}, shots: {column.shots}", flush=True)
        results = evaluate(lm, [column.task], column.shots, column.chat, speaker, manager, args)
        if results and column.metric not in results[column.task]:
            print(
                f"{column.task}: left out of the table below; this version of the harness does not report {column.metric}, "
                f"but {', '.join(results[column.task])}",
                file=sys.stderr,
            )
        elif results:
            measured[column.name] = results[column.task][column.metric]
    if args.tasks:
        evaluate(lm, args.tasks, args.num_fewshot, args.apply_chat_template, speaker, manager, args)
    if measured:
        print(table_1(measured, block_of(speaker.guided.base.config)))


def main():
    args = arguments()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=args.include_path and str(args.include_path))
    columns = SUITES.get(args.suite, [])
    if left_out := [
        column.name for column in columns if column.executes and not args.confirm_run_unsafe_code
    ]:
        print(
            f"{', '.join(left_out)}: left out; they execute what the model writes, which takes --confirm-run-unsafe-code"
        )
        columns = [column for column in columns if column.name not in left_out]
    for task in args.tasks:
        if task not in manager.all_tasks:
            raise UsageError(
                f"--tasks {task}: no such task; `lm-eval ls tasks` lists the harness's, --include-path FOLDER adds others"
            )
    with join_decoders(args.device) as processes:
        measure(columns, manager, processes, args)


if __name__ == "__main__":
    run_cli(main)
