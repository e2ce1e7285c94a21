"""How the commands of bench/ measure: every contender in a process of its own, all of them timed in
turn.

In a process of its own a contender has a peak memory of its own, and nothing is left over from a
rival. (It inherits its parent's peak, so the parent must stay small.) Since they take turns, a pair
of times of one round can be compared, even where the machine's speed drifts.
"""

import contextlib
import functools
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from run.cli import ArgumentParser, positive_int


@dataclass
class Result:
    """What was measured of one contender; `failure` says why there is nothing."""

    failure: str = ""
    first: float = 0.0  # seconds of the first call, which compiles and warms up
    seconds: list[float] = field(default_factory=list)  # of one call, for every round
    peak: int = 0  # bytes at the highest
    growth: int = 0  # bytes of that which calls added to what was there before the first

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(
    contenders: dict[str, Callable], device: str, rounds: int, calls: int
) -> dict[str, Result]:
    """Measure contenders: functions of a module (they are pickled) that return a step to time.

    In each round every contender in turn makes `calls` calls, on a GPU after one more that is not
    counted.
    """
    context = multiprocessing.get_context("spawn")
    results, workers = {name: Result() for name in contenders}, {}
    for name, build in contenders.items():  # they prepare all at the same time
        pipe, far_end = context.Pipe()
        process = context.Process(target=serve, args=(far_end, build, device), daemon=True)
        process.start()
        far_end.close()
        workers[name] = pipe, process

    def ask(name: str, calls: int | None):
        """A worker's answer to `calls` (None: only that it is ready); None if it has failed."""
        if results[name].failure:
            return None
        try:
            if calls is not None:
                workers[name][0].send(calls)
            results[name].failure, answer = workers[name][0].recv()
        except (EOFError, OSError):
            results[name].failure, answer = "its process was killed, for lack of memory?", None
        return answer

    for name in contenders:
        ask(name, None)
    for name, result in results.items():
        result.first = ask(name, 1)
        progress(f"{name}: {result.failure or 'ready'}")
    for number in range(rounds):
        for name, result in results.items():
            result.seconds.append(ask(name, calls))
        progress(f"round {number + 1} of {rounds}")
    for name, result in results.items():
        result.peak, result.growth = ask(name, 0) or (0, 0)
        if result.failure:
            result.first, result.seconds = 0.0, []
        workers[name][0].close()
        workers[name][1].join()
    progress("")
    return results


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def why(error: Exception) -> str:
    """The first line of what an error says."""
    return f"failed: {(str(error).strip() or repr(error)).splitlines()[0][:100]}"


def serve(pipe, build: Callable, device: str) -> None:
    """The worker: answers (why it failed, or ""; seconds). 0 calls: (peak, growth), the end."""
    try:
        with torch.device(device):
            torch.manual_seed(0)
            step = build()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        before, is_first = memory(device), True
        pipe.send(("", None))  # ready
        while calls := pipe.recv():
            if device != "cpu" and not is_first:
                step()
            pipe.send(("", timed(step, calls, device)))
            is_first = False
            if device != "cpu":
                torch.cuda.empty_cache()  # for the others
        pipe.send(("", (memory(device), memory(device) - before)))
    except ImportError as error:
        pipe.send((f"not installed ({error.name})", None))
    except torch.OutOfMemoryError:
        pipe.send(("out of memory", None))
    except Exception as error:  # whatever it is, the others are still to be measured
        traceback.print_exc()
        pipe.send((why(error), None))


def timed(step: Callable[[], None], calls: int, device: str) -> float:
    """Seconds of one call, the mean of several; on a GPU by its own clock."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - started) / calls
    start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def memory(device: str) -> int:
    """The most bytes that were in use at once so far: of the GPU's tensors, or of this process."""
    if device == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated()  # since the worker's inputs were ready


def copy_bandwidth(device: str, threads: int | None = None) -> float:
    """Bytes per second of a large copy, counting reads and writes: the best of 20."""
    size = 2**28 if device == "cpu" else 2**30
    result = compare({"copy": functools.partial(copy, size, threads)}, device, 20, 1)["copy"]
    return 2 * size / min(result.seconds)


def copy(size: int, threads: int | None) -> Callable[[], None]:
    torch.set_num_threads(threads or torch.get_num_threads())
    source, target = [torch.rand(size // 4) for _ in range(2)]
    return lambda: target.copy_(source)


# --------------------------------------------------------------------------------------------------
# What a command asks and prints


def bench_parser(doc: str, rounds: int) -> ArgumentParser:
    parser = ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--rounds", type=positive_int, default=rounds, help=f"(default {rounds})")
    return parser


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    """The processor or the GPU, and the versions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        name = name.partition(":")[2].strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{name}, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def describe(device: str) -> str:
    """For the head of a table."""
    threads = f", threads: {torch.get_num_threads()}" if device == "cpu" else ""
    return machine(device) + threads


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the heads, as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def results_table(
    results: dict[str, Result], heads: list[str], cells: Callable[[str, Result], list[str]]
) -> str:
    """A row for each contender: the cells of its result, or why there is none."""
    rows = [["", *heads]]
    for name, result in results.items():
        failed = [result.failure] + [""] * (len(heads) - 1)
        rows.append([name, *(failed if result.failure else cells(name, result))])
    return table(rows)


def times(result: Result) -> str:
    """Median milliseconds, and the fastest and slowest round."""
    low, middle, high = min(result.seconds), result.median, max(result.seconds)
    return f"{1000 * middle:.4g} ({1000 * low:.4g} to {1000 * high:.4g})"


def share(ours: list[float], theirs: list[float]) -> str:
    """One time over another, round by round: median and extremes; "" if one is missing."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return (
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
    )
