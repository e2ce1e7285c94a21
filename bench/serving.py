"""A guided base in vLLM (beyond/serving.py): are its texts ours, how fast is it, does it last?

    python -m bench.serving exact --base out/smollm2-135m --value V    # greedy texts, 1, 8 and 32 at a time
    python -m bench.serving speed --base out/smollm2-135m --value V --at-once 8    # beside the floor

All in float32 and without compiling. The floor is the time of the base and of the value network, each
alone in vLLM, added up, in core-seconds. Questions are about capitals, half of them behind a text of some length.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.measure import describe, share, table
from beyond.serving import register
from beyond.serving_settings import Settings, settle
from data.capitals import Capitals
from data.chat import encode_chat, with_system
from data.packaged import TEXT
from ivl import ValueModel
from model import Llama
from run.cli import ArgumentParser, positive_int, run_cli
from sample import Guided, generate

NEW, LONGEST = 24, 1024  # new tokens, and positions, at most
TIE = 1e-4  # between the two largest logits; rounding may decide then
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def questions(count: int) -> list[str]:
    rng = random.Random("serving")
    items = [item for split in ("development", "evaluation") for item in Capitals(0).items(split)]
    texts = [
        TEXT[: rng.randrange(40, len(TEXT))] + "\n\n" if rng.random() < 0.5 else "" for _ in items
    ]
    return [text + item.question for text, item in zip(texts, rng.sample(items, len(items)))][
        :count
    ]


def prompts_of(settings: Settings, count: int) -> list[list[int]]:
    turns = [with_system(settings.system, [("user", text)]) for text in questions(count)]
    return [encode_chat(settings.tokenizer, settings.template, each)[0] for each in turns]


def guided_by_us(settings: Settings) -> Guided:
    load = partial(Llama.from_pretrained, dtype=torch.float32)
    value = ValueModel.from_pretrained(settings.values[0], torch.float32)
    return Guided(load(settings.base), value, settings.alphas[0], settings.tokenizer.vocab_size)


def engine(options: dict, at_once: int):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is in this process
    from vllm import LLM

    register()
    rest = dict(dtype="float32", seed=0, enforce_eager=True, max_num_seqs=at_once)
    return LLM(**options | rest | {"max_model_len": LONGEST})


def written(
    options: dict, prompts: list[list[int]], at_once: int, ends: list[int]
) -> list[list[int]]:
    """What vLLM writes behind token prompts."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW, stop_token_ids=ends)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine(options, at_once).generate(asked, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def elsewhere(function: Callable, *arguments):
    """A function's result, computed in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alone(folder: Path) -> dict:
    return {"model": str(folder)}


# --------------------------------------------------------------------------------------------------
# The three commands


def exact(args) -> None:
    settings = settle(args.base, [args.value], [1.0])
    prompts = prompts_of(settings, args.count)
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, up to {NEW} new ones")
    for alpha, sizes in ((1.0, (1, 8, 32)), (0.5, (32,))):
        settings.alphas = [alpha]
        guided = guided_by_us(settings)
        ours = []
        for first in range(0, len(prompts), 32):
            batch = prompts[first : first + 32]
            ours += generate(guided, batch, max_new_tokens=NEW, stop_ids=set(settings.ends))
        for at_once in sizes:
            theirs = elsewhere(written, settings.engine(), prompts, at_once, settings.ends)
            show_equal(
                f"alpha {alpha:g}, {at_once} at a time, as generate", guided, prompts, ours, theirs
            )
    settings.alphas = [0.0]
    ours = elsewhere(written, alone(args.base), prompts, 32, settings.ends)
    theirs = elsewhere(written, settings.engine(), prompts, 32, settings.ends)
    show_equal(
        "alpha 0, 32 at a time, as the base alone in vLLM",
        guided_by_us(settings),
        prompts,
        ours,
        theirs,
    )


def show_equal(what: str, guided: Guided, prompts, ours, theirs) -> None:
    """How many texts are equal, token for token, and how many differ first at a tie."""
    ties = 0
    for prompt, a, b in zip(prompts, ours, theirs):
        if a != b:
            same = next(at for at in range(max(len(a), len(b))) if a[at : at + 1] != b[at : at + 1])
            top = guided.logits(torch.tensor([prompt + a[:same]]))[0, -1].topk(2).values
            ties += (top[0] - top[1]).item() < TIE
    equal = sum(a == b for a, b in zip(ours, theirs))
    print(f"{what}: {equal} of {len(ours)} texts equal, {ties} more differ at a tie", flush=True)


def in_vllm(options: dict, prompts: list[list[int]]) -> Callable[[], None]:
    from vllm import SamplingParams

    llm = engine(options, len(prompts))
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return lambda: llm.generate(asked, greedy, use_tqdm=False)


def by_generate(settings: Settings, prompts: list[list[int]]) -> Callable[[], None]:
    guided = guided_by_us(settings)
    return lambda: generate(guided, prompts, max_new_tokens=NEW, stop_ids=set())


step: Callable[[], None]  # of a worker process


def prepare(build: Callable[[], Callable[[], None]]) -> None:
    global step
    step = build()
    step()  # warms up


def take() -> tuple[float, float]:
    """Seconds of a step, and those that cores worked for it, whatever else the machine does."""
    started, worked = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - started, time.process_time() - worked


def speed(args) -> None:
    """Prompts of one token, so that what is timed is decoding."""
    settings = settle(args.base, [args.value], [1.0])
    prompts = [prompt[-1:] for prompt in prompts_of(settings, args.at_once)]
    base, value, both = "base alone in vLLM", "value network alone in vLLM", "guided in vLLM"
    contenders = {
        base: partial(in_vllm, alone(args.base), prompts),
        value: partial(in_vllm, alone(args.value), prompts),
        both: partial(in_vllm, settings.engine(), prompts),
        "guided by generate": partial(by_generate, settings, prompts),
    }
    print(f"{describe('cpu')}; {args.at_once} texts of {NEW} tokens at a time\n", flush=True)
    spawn = get_context("spawn")
    workers = {
        name: ProcessPoolExecutor(1, spawn, initializer=prepare, initargs=(build,))
        for name, build in contenders.items()
    }
    taken = {name: [] for name in contenders}
    for _ in range(args.rounds + 1):  # the first waits until all are ready
        for name, worker in workers.items():
            taken[name].append(worker.submit(take).result())
    for worker in workers.values():
        worker.shutdown()
    tokens = args.at_once * NEW
    rows = [["", "tokens a second", "tokens a core-second (range)", "of the floor (range)"]]
    for name, rounds in taken.items():
        seconds, worked = zip(*rounds[1:])
        rates = sorted(tokens / each for each in worked)
        floors = [one[1] + other[1] for one, other in zip(taken[base][1:], taken[value][1:])]
        middle = f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"
        of_floor = share(floors, worked) if name not in (base, value) else ""
        rows.append([name, f"{tokens / statistics.median(seconds):.1f}", middle, of_floor])
    print(table(rows))


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["exact", "speed"])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--value", type=Path, required=True)
    parser.add_argument("--count", type=positive_int, default=200, help="prompts (default 200)")
    parser.add_argument("--at-once", type=positive_int, default=8, help="of speed (default 8)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of speed (default 3)")
    args = parser.parse_args()
    (exact if args.what == "exact" else speed)(args)


if __name__ == "__main__":
    run_cli(main)
