"""How the scripts of bench/ measure: every contender in a process of its own, all of them timed in turn.

A process of its own has a peak memory of its own and nothing left over from a rival (but it inherits its parent's, so
the parent must stay small). Taking turns, each round gives a
pair of times to compare even where the machine's speed drifts.
"""

import contextlib
import functools
import json
import multiprocessing
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

from data.files import write_text


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
    """Measure contenders, functions (of a module, so that they can be pickled) that prepare and return a step to time.

    In each round every contender in turn makes `calls` calls, on a GPU after one more that is not counted.
    """
    context = multiprocessing.get_context("spawn")
    results, workers = {name: Result() for name in contenders}, {}
    for name, build in contenders.items():
        pipe, far_end = context.Pipe()
        process = context.Process(target=serve, args=(far_end, build, device), daemon=True)
        process.start()
        far_end.close()
        workers[name] = pipe, process
    for name, result in results.items():  # they prepare all at the same time
        result.failure, _ = ask(workers[name][0], None)
    for name, result in results.items():
        if not result.failure:
            result.failure, result.first = ask(workers[name][0], 1)
        progress(f"{name}: {result.failure or 'ready'}")
    for number in range(rounds):
        for name, result in results.items():
            if not result.failure:
                result.failure, seconds = ask(workers[name][0], calls)
                result.seconds.append(seconds)
        progress(f"round {number + 1} of {rounds}")
    for name, (pipe, process) in workers.items():
        if not results[name].failure:
            results[name].failure, answer = ask(pipe, 0)
            results[name].peak, results[name].growth = answer or (0, 0)
        pipe.close()
        process.join()
    progress("")
    return results


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def ask(pipe, calls: int | None) -> tuple[str, object]:
    """A worker's answer to `calls` (None: its first word), as (why it failed, or "", the answer)."""
    try:
        if calls is not None:
            pipe.send(calls)
        return pipe.recv()
    except (EOFError, OSError):
        return "its process was killed, most likely for lack of memory", None


def serve(pipe, build: Callable, device: str) -> None:
    """The worker: the first call, then what it is asked for. 0 calls: (peak, growth), and the end."""
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
        pipe.send((f"failed: {(str(error).strip() or repr(error)).splitlines()[0][:100]}", None))


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
    """Bytes per second of a large copy, each byte counted once read and once written: the best of 20."""
    size = 2**28 if device == "cpu" else 2**30
    result = compare({"copy": functools.partial(copy, size, threads)}, device, 20, 1)["copy"]
    return 2 * size / min(result.seconds)


def copy(size: int, threads: int | None) -> Callable[[], None]:
    torch.set_num_threads(threads or torch.get_num_threads())
    source, target = [torch.rand(size // 4) for _ in range(2)]
    return lambda: target.copy_(source)


def describe(device: str) -> str:
    """The machine and the versions, for the head of a table."""
    if device == "cpu":
        name = platform.processor() or platform.machine()
        with contextlib.suppress(OSError, StopIteration):
            name = next(
                line.split(":", 1)[1].strip()
                for line in open("/proc/cpuinfo")
                if line.startswith("model name")
            )
        name += f", {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def save(path: Path | None, numbers: dict) -> None:
    """Write the numbers of --json, if it was given: behind each table, so that a run that is cut off leaves what it has."""
    if path:
        write_text(path, json.dumps(numbers, indent=2) + "\n")


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the heads, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def times(result: Result) -> str:
    """Median milliseconds, and the fastest and slowest round."""
    low, middle, high = [
        1000 * value for value in (min(result.seconds), result.median, max(result.seconds))
    ]
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def ratio(result: Result, other: Result) -> str:
    """How many times faster than another: the median over rounds, and the extremes."""
    return share(other.seconds, result.seconds)


def share(ours: list[float], theirs: list[float]) -> str:
    """One time over another, round by round: the median and the extremes."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
