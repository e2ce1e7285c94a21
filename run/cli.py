"""What every script's command line shares: flags, mistakes told in one line, and time in words.

from run.cli import ArgumentParser, run_cli
"""

import argparse
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from data.errors import UsageError
from data.records import is_unicode

CLEAR = "\r\x1b[K"  # to the line's beginning, and away with what stands there


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a mistake is told in one line, flags are written out, and every argument has to be text."""

    def parse_args(self, *arguments, **options):
        self.allow_abbrev = False
        flag = "an argument"
        for argument in sys.argv[1:]:
            flag = argument if argument.startswith("-") else flag
            if not is_unicode(argument):
                self.error(f"{flag} is not UTF-8")
            if not argument and flag not in ("--prompt", "--system"):
                self.error(f"{flag} is empty")
        return super().parse_args(*arguments, **options)

    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def run_cli(main: Callable[[], None]) -> None:
    """Run a script.

    A user's mistake is one line on stderr and status 2, a bug of ours keeps its traceback.
    """
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # the name of a file may be no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        main()
        sys.stdout.flush()
        return
    except SafetensorError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        message = (
            f"{error.filename}: {error.strerror}"
            if error.filename
            else error.strerror or str(error)
        )
    except MemoryError:
        message = "out of memory"
    except RuntimeError as error:
        message = out_of_memory(error)
        if not message:
            raise
    except KeyboardInterrupt:
        message, status = "stopped", 130
    except UsageError as error:
        message = str(error)
    drop_output()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(
            5
        )  # most likely the first process says the same, and torchrun ends the others when one has ended
    if len(message) > 1000:  # somebody's file may have much in it
        message = f"{message[:800]} ... {message[-150:]}"
    if sys.stderr is not None:
        begin = CLEAR if sys.stderr.isatty() else ""  # a line about how it went may stand there
        message = f"{Path(sys.argv[0]).name}: {message}".replace("\n", "\\n")
        print(begin + message, file=sys.stderr)
    sys.exit(status)


def out_of_memory(error: RuntimeError) -> str:
    """What to say of an error for lack of memory; "" for another one.

    torch's own is known by its name: where torch is not needed it is not imported, for it takes long.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return "the device is out of memory; --grad-accum, --max-length and --dtype save some"
    if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
        return ""
    wanted = re.search(r"allocate (\d+) bytes", str(error))
    return "out of memory" + (f": {int(wanted[1]) / 1e9:.1f} GB more were wanted" if wanted else "")


def drop_output() -> None:
    """Write out what was printed.

    What cannot be written, as to a full disk, is dropped, or Python would complain again.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number(
    kind: type, lowest: float, phrase: str, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type.

    A number between these bounds; the phrase tells a user what it should be.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest < value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is no {phrase}")
        return value

    return parse


positive_int = number(int, 0, "positive whole number below 2**32", 2**32)
non_negative_int = number(int, -1, "whole number from 0 to below 2**32", 2**32)
positive_float, non_negative_float = (
    number(float, 0, "positive number"),
    number(float, -1e-300, "number from 0 on"),
)
any_float = number(float, -math.inf, "finite number")


DEVICES = ["cpu", "cuda", "mps"]


def show_progress(text: str, keep: bool = False) -> None:
    """A line about how it goes.

    On a terminal the next one is written over it, unless it is to be kept.
    """
    if not sys.stdout.isatty():
        print(text, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    print(f"{CLEAR}{text[:width]}", end="\n" if keep else "\r", flush=True)


def watch(items: Sequence, what: str) -> Iterator:
    """The items in turn, and now and then a line about how many are done and the time left."""
    started = shown = time.monotonic()
    for done, item in enumerate(items):
        if done and time.monotonic() - shown > seconds_between():
            shown = time.monotonic()
            left = (shown - started) / done * (len(items) - done)
            show_progress(f"{what}: {done} of {len(items)}, {clock(left)} left")
        yield item
    clear_progress()


def seconds_between() -> int:
    """How long to wait for the next line while measuring: in a file each line stays."""
    return 2 if sys.stdout.isatty() else 20


def clear_progress() -> None:
    if sys.stdout.isatty():
        print(CLEAR, end="", flush=True)


def rate(per_second: float) -> str:
    """A number a second with two or three digits: 3.8, 38, 1.2k, 3.4M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if per_second >= 0.9995 * size:
            return f"{per_second / size:.{1 if per_second < 99.5 * size else 0}f}{letter}"
    return f"{per_second:.{1 if per_second < 9.95 else 0}f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{seconds:02d}"
    )
