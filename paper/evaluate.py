"""The paper's benchmarks on checkpoints by lm-evaluation-harness, the field's own: Table 1 without MT-Bench.

    python -m paper.evaluate --base Llama-2-7b-hf/ --value out/seed0/value-residual-TinyLlama-1.1B --suite all --output out/evaluation
    python -m paper.evaluate --base out/smollm2-135m --suite few-shot --limit 50 --use-cache out/cache
    python -m paper.evaluate --base out/smollm2-135m --tasks mytask --include-path FOLDER
    torchrun --nproc_per_node=4 -m paper.evaluate ...                     # the base divided between four GPUs

Needs: pip install lm_eval. Tasks, prompts, metrics, cache and result files are the harness's; here is only what it asks of a model.
A run that is stopped goes on from --use-cache. Tasks that execute what the model writes (MBPP, HumanEval) take the harness's own
two consents: --confirm-run-unsafe-code, and HF_ALLOW_CODE_EVAL=1 in the environment.
"""

import argparse
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from data.chat import encode_chat, end_token, stop_ids, with_system
from data.errors import UsageError
from data.records import Turn
from data.tokenizer import StreamDecoder, Tokenizer
from model import LlamaConfig
from paper.report import table
from paper.table1 import BLOCKS, PAPER, PAPER_70B
from run.arguments import measured_arguments
from run.cli import ArgumentParser, non_negative_int, positive_int, run_cli
from run.plug import plug_speaker
from run.processes import Alone, join_decoders
from sample import Guided, generate, score

try:  # everything below is read without the harness; only running takes it
    from lm_eval.api.model import TemplateLM
except ImportError:
    TemplateLM = object

ALIKE = 0.8  # the shortest prompt of a batch over the longest, at least: padding is computed, too

# ---------------------------------------------------------------------------------------------------------
# What the harness asks of a model


class ChatText(str):
    """A conversation as the harness shows and caches it. `turns` are what is encoded: no text is read for special tokens."""

    turns: list[Turn]


class GuidedLM(TemplateLM):
    """A guided base for lm-evaluation-harness. How a text falls into context and continuation is left to its TemplateLM.

    Under torchrun every process computes the same, so each says that it is the only one.
    """

    batch_sizes: dict = {}  # which the harness would record

    def __init__(self, guided: Guided, tokenizer: Tokenizer, template: str = "llama-2", system: str = ""):
        super().__init__()
        self.guided, self.tokenizer, self.template, self.system = guided, tokenizer, template, system
        self.llamas = list(dict.fromkeys([guided.base, *guided.llamas]))
        self.max_length = min(llama.config.max_position_embeddings for llama in self.llamas)
        self.room = room_for_batches(guided.base.device)
        # A tokenizer.json says itself whether a text begins with BOS; the other two kinds always do.
        self.adds_bos = tokenizer.kind != "json" or tokenizer.backend.encode("a").ids[:1] == [tokenizer.bos_id]

    # ---- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.template}-{self.tokenizer.fingerprint(self.tokenizer.vocab_size)[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the result files record."""
        return self.template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> ChatText:
        turns = with_system(self.system, [(message["role"], message["content"]) for message in chat_history])
        text = ChatText(self.spell(self.chat_ids(turns)))
        text.turns = turns
        return text

    def chat_ids(self, turns: list[Turn]) -> list[int]:
        """data.chat.encode_chat's tokens of a conversation; an assistant's turn at its end is one that goes on."""
        ids, _ = encode_chat(self.tokenizer, self.template, turns)
        if turns[-1][0] != "assistant":
            return ids
        while ids.pop() != end_token(self.tokenizer, self.template):  # and what stands behind it
            pass
        return ids[:-1] if self.template == "llama-2" else ids  # a space, which ends an answer there

    def spell(self, ids: list[int]) -> str:
        """Tokens as text, with special ones by name."""
        names = {id: name for name, id in self.tokenizer.specials.items()}
        if not names:  # SentencePiece
            names = {self.tokenizer.bos_id: "<s>", self.tokenizer.eos_id: "</s>"}
        return b"".join(self.tokenizer.token_bytes(id) or names.get(id, "").encode() for id in ids).decode(errors="replace")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if isinstance(string, ChatText):
            return self.chat_ids(string.turns)
        return self.tokenizer.encode(string, bos=self.adds_bos if add_special_tokens is None else add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, ChatText):
            return super()._encode_pair(context, continuation)
        begun = context.turns[-1][1] if context.turns[-1][0] == "assistant" else None
        turns = [*(context.turns if begun is None else context.turns[:-1]), ("assistant", (begun or "") + continuation)]
        ids = self.chat_ids(context.turns)
        return ids, self.chat_ids(turns)[len(ids):]

    # ---- how much at a time

    def fits(self, rows: int, longest: int, predicted: int) -> bool:
        """Whether a batch with logits of `predicted` positions a row does. A cascade asks for those of all."""
        configs = [llama.config for llama in self.llamas]
        cached = sum(2 * each.num_hidden_layers * each.num_key_value_heads * each.head_dim for each in configs) * self.guided.base.dtype.itemsize
        logits = 16 * max(each.vocab_size for each in configs)  # z_base, z_delta, z_post, and log p in float32
        if self.guided.value is not None and self.guided.value.scheme.startswith("cascade"):
            predicted = longest
        return rows * (2 * longest * cached + predicted * logits) <= self.room  # twice: rows of one context are forked

    def bar(self, total: int, what: str, hidden: bool):
        from tqdm import tqdm  # the harness brings it
        return tqdm(total=total, desc=what, disable=hidden)

    # ---- how likely given continuations are

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(text or None, context, continuation) each -> log-likelihood in nats, and whether greedy decoding says it."""
        pairs = [self.cut(context, continuation) for _, context, continuation in requests]
        results: list = [None] * len(pairs)
        with self.bar(len(pairs), "log-likelihoods", disable_tqdm) as bar:
            for batch in self.batches(pairs):
                for number, result in zip(batch, score(self.guided, [pairs[number] for number in batch], len(batch))):
                    results[number] = result
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(batch))
        return results

    def cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Less of the context where both are too long, from the left. The last token is not read, so there is room for one more."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UsageError(f"a text of {len(continuation)} tokens is to be scored at once, and the checkpoint ends at {self.max_length}")
        return context[-room:], continuation

    def batches(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
        """Numbers of pairs, long contexts first; a context that comes again is in one batch, unless that would not fit."""
        order = sorted(range(len(pairs)), key=lambda number: (-len(pairs[number][0]), pairs[number][0], -len(pairs[number][1])))
        batch, longest, predicted = [], 0, 0
        for context, group in groupby(order, key=lambda number: pairs[number][0]):
            group = list(group)
            most = len(pairs[group[0]][1])
            fits = self.fits(len(batch) + len(group), longest + max(predicted, most), max(predicted, most))
            if batch and not (fits and len(context) >= ALIKE * longest):
                yield batch
                batch, longest, predicted = [], 0, 0
            longest, predicted = max(longest, len(context)), max(predicted, most)
            for number in group:
                if batch and not self.fits(len(batch) + 1, longest + predicted, predicted):
                    yield batch
                    batch, predicted = [], len(pairs[number][1])
                batch.append(number)
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as the harness cuts them: each token once, with as much before it as there is room for.

        Its rule puts prefix_token_id in front of what tok_encode says, so a tokenizer's own BOS is scored, too.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        totals = []
        for first in range(0, len(requests), 64):  # so that a run that is stopped has some in the cache
            texts = [request.args[0] for request in requests[first:first + 64]]
            windows = []
            for text in texts:
                cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
                windows.append([(None, *make_disjoint_window(window)) for window in cut])
            scores = iter(self._loglikelihood_tokens([window for each in windows for window in each], disable_tqdm))
            for text, each in zip(texts, windows):
                totals.append(sum(next(scores)[0] for _ in each))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # ---- answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Each request is a context and its settings; what is alike in settings is answered together, long contexts first."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        answers: list = [None] * len(requests)
        with self.bar(len(requests), "answers", disable_tqdm) as bar:
            for numbers in alike.values():
                until, options = self.options(requests[numbers[0]].args[1])
                longest = self.max_length - options["max_new_tokens"]
                prompts = {number: self.tok_encode(requests[number].args[0])[-longest:] for number in numbers}
                numbers.sort(key=lambda number: -len(prompts[number]))
                while numbers:
                    count, positions = 1, len(prompts[numbers[0]]) + options["max_new_tokens"]
                    while (count < len(numbers) and len(prompts[numbers[count]]) >= ALIKE * len(prompts[numbers[0]])
                           and self.fits(count + 1, positions, 1)):
                        count += 1
                    batch, numbers = numbers[:count], numbers[count:]
                    options["seed"] = len(numbers)  # another one in each batch
                    for number, text in zip(batch, self.answer([prompts[number] for number in batch], until, options)):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(count)
        return answers

    def options(self, settings: dict) -> tuple[list[str], dict]:
        """Stop strings, and what `generate` is told, of a request's settings; the harness's own defaults."""
        from lm_eval.models.utils import normalize_gen_kwargs
        settings = normalize_gen_kwargs(settings, 256)
        until, count = settings["until"], settings["max_gen_toks"]
        options = dict(max_new_tokens=count, temperature=settings.get("temperature", 0.0), top_p=settings.get("top_p", 1.0))
        if not settings["do_sample"]:
            options["temperature"] = 0.0
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := settings.keys() - known:
            raise UsageError(f"a task asks for {', '.join(sorted(unknown))} in generation; here are {', '.join(sorted(known))}")
        if count >= self.max_length:
            raise UsageError(f"a task asks for answers of {count} tokens, and the checkpoint ends at {self.max_length}; its max_gen_toks must be less")
        named = {self.tokenizer.specials[stop] for stop in until if stop in self.tokenizer.specials}
        options["stop_ids"] = stop_ids(self.tokenizer, self.template, self.llamas) | named
        return [stop for stop in until if stop], options

    def answer(self, prompts: list[list[int]], until: list[str], options: dict) -> list[str]:
        """Answers up to the first stop string, which may begin and end within tokens."""
        decoders, said = [StreamDecoder(self.tokenizer) for _ in prompts], [""] * len(prompts)

        def has_stop(row: int, token: int) -> bool:
            new = decoders[row].push(token)
            said[row] += new
            return any(stop in said[row][-len(stop) - len(new):] for stop in until)

        texts = [self.tokenizer.decode(ids) for ids in generate(self.guided, prompts, on_token=has_stop, **options)]
        for stop in until:
            texts = [text.partition(stop)[0] for text in texts]
        return texts


def room_for_batches(device: torch.device) -> float:
    """Bytes for caches and logits: half of what a GPU has free, 1 GB on a CPU. The first process decides for all."""
    room = [torch.cuda.mem_get_info()[0] / 2 if device.type == "cuda" else 1e9]
    if dist.is_initialized():
        dist.broadcast_object_list(room)
    return room[0]


# ---------------------------------------------------------------------------------------------------------
# Table 1's columns (Section 5.3)


@dataclass(frozen=True)
class Column:
    """A benchmark: the harness's task and metric that come nearest, the paper's shots, whether in a chat, and what is not the same."""

    name: str
    task: str
    shots: int
    metric: str
    chat: bool
    note: str = ""
    executes: bool = False  # what the model writes


ZERO_SHOT = [
    Column("IFEval", "ifeval", 0, "prompt_level_loose_acc,none", True, "prompts, loose; the paper does not say which of four"),
    Column("GSM8K", "gsm8k", 0, "exact_match,flexible-extract", True, "the last number of the answer counts"),
    Column("ToxiGen", "toxigen", 0, "acc,none", True, "NOT the paper's: here statements are classified, higher is better; TULU-2's is the share "
           "of generations that a classifier calls toxic, lower is better"),
    Column("MBPP", "mbpp_instruct", 0, "pass_at_1,extract_code", True, "the answer begins with ```python", executes=True),
    Column("HumanEval", "humaneval_instruct", 0, "pass@1,create_test", True, "the answer begins with the function's head", executes=True)]
FEW_SHOT = [
    Column("ARC", "arc_challenge", 25, "acc_norm,none", False),
    Column("Hellaswag", "hellaswag", 10, "acc_norm,none", False),
    Column("MMLU", "mmlu", 5, "acc,none", False),
    Column("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", False),
    Column("Winogrande", "winogrande", 5, "acc,none", False)]
SUITES = {"zero-shot": ZERO_SHOT, "few-shot": FEW_SHOT, "all": ZERO_SHOT + FEW_SHOT}

TABLE = {title.partition(",")[0]: PAPER[base] for title, base in BLOCKS.items()} | {"Llama-2-70B": PAPER_70B}
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
            lines.append([column.name, column.task, shots, f"{100 * measured[column.name]:.3g}", *theirs, column.note])
    return table([f"Table 1, {block}", "task", "shots", "ours", *TABLE[block], "what is not the same"], lines)


# ---------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=SUITES, help="columns of Table 1, with the paper's shots")
    what.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of the harness (`lm-eval ls tasks`) or of --include-path")
    what.add_argument("--num-fewshot", type=non_negative_int, metavar="N", help="shots of --tasks (default: what each says itself)")
    what.add_argument("--apply-chat-template", action="store_true", help="ask --tasks in the chat template")
    what.add_argument("--include-path", type=Path, metavar="FOLDER", help="more tasks, as the harness's yaml")
    what.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions of each task")
    what.add_argument("--output", type=Path, metavar="FOLDER", help="for the harness's result files")
    what.add_argument("--use-cache", type=Path, metavar="FILE", help="for the harness's cache of answers, from which a stopped run goes on")
    what.add_argument("--confirm-run-unsafe-code", action="store_true", help="execute what the model writes, where a task does")
    args = measured_arguments(parser, temperature=0.0)
    if TemplateLM is object:
        raise UsageError("this takes lm-evaluation-harness: pip install lm_eval")
    if not (args.suite or args.tasks):
        parser.error("name what to measure, with --suite or --tasks")
    if args.confirm_run_unsafe_code and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        parser.error("--confirm-run-unsafe-code takes HF_ALLOW_CODE_EVAL=1 in the environment as well")
    if args.include_path and not args.include_path.is_dir():
        parser.error(f"--include-path {args.include_path}: no such folder")
    for flag, folder in (("--output", args.output), ("--use-cache", args.use_cache and args.use_cache.parent)):
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
    return {flag: str(getattr(args, flag)) for flag in ("base", "value", "scheme", "expert", "anti_expert", "vocab_map", "alpha", "template",
                                                        "system", "dtype")}


def cache_of(args) -> str | None:
    """The beginning of the names of the harness's cache files; another system's answers are never taken for this one's."""
    return args.use_cache and f"{args.use_cache}-{hashlib.sha256(repr(system_of(args)).encode()).hexdigest()[:8]}"


def copy_cache(cache: str, count: int) -> None:
    """The harness keeps one for each of several processes, which have to find the same in it, wherever they were stopped."""
    if Path(f"{cache}_rank0.db").exists():
        for rank in range(1, count):
            with sqlite3.connect(f"{cache}_rank0.db") as source, sqlite3.connect(f"{cache}_rank{rank}.db") as copy:
                source.backup(copy)


def evaluate(lm: GuidedLM, tasks: list[str], shots: int | None, chat: bool, name: str, manager, args) -> dict[str, dict]:
    """The harness's results of some tasks, which it also prints and saves; empty where this is not the first of several processes."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table
    tracker = EvaluationTracker(output_path=args.output and str(args.output))
    try:
        results = simple_evaluate(lm, model_args={"model": name} | system_of(args), tasks=tasks, num_fewshot=shots, apply_chat_template=chat,
                                  limit=args.limit, use_cache=cache_of(args), evaluation_tracker=tracker, task_manager=manager,
                                  confirm_run_unsafe_code=args.confirm_run_unsafe_code)
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UsageError(f"{', '.join(tasks)}: executes what the model writes; if that may be, --confirm-run-unsafe-code") from None
    if results is None:
        return {}
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task in results["configs"]:
        tracker.save_results_samples(task, samples[task])
    print(make_table(results), flush=True)
    return results["results"]


def main():
    args = arguments()
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=args.include_path and str(args.include_path))
    columns = SUITES.get(args.suite, [])
    if left_out := [column.name for column in columns if column.executes and not args.confirm_run_unsafe_code]:
        print(f"{', '.join(left_out)}: left out; they execute what the model writes, which takes --confirm-run-unsafe-code")
        columns = [column for column in columns if column.name not in left_out]
    for task in args.tasks:
        if task not in manager.all_tasks:
            raise UsageError(f"--tasks {task}: no such task; `lm-eval ls tasks` lists the harness's, and --include-path FOLDER adds others")
    with join_decoders() as processes:
        measure(columns, manager, processes, args)


def measure(columns: list[Column], manager, processes: Alone, args) -> None:
    speaker = plug_speaker(args, processes)
    lm = GuidedLM(speaker.guided, speaker.tokenizer, speaker.template, speaker.system)
    if args.use_cache:
        processes.first_does(lambda: copy_cache(cache_of(args), processes.count))
    measured = {}
    for column in columns:
        print(f"{column.name}: {column.task}, shots: {column.shots}", flush=True)
        results = evaluate(lm, [column.task], column.shots, column.chat, speaker.name, manager, args)
        if results and column.metric not in results[column.task]:
            raise UsageError(f"{column.task}: this version of the harness reports {', '.join(results[column.task])}, and no {column.metric}")
        if results:
            measured[column.name] = results[column.task][column.metric]
    if args.tasks:
        evaluate(lm, args.tasks, args.num_fewshot, args.apply_chat_template, speaker.name, manager, args)
    if measured:
        print(table_1(measured, block_of(speaker.guided.base.config)))


if __name__ == "__main__":
    run_cli(main)
