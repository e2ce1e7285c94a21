"""Runs commands for the tests, 2 core-seconds cheaper each than a new Python that imports torch.

tests/helpers.py starts this file once. It imports torch and nothing of ours. Then it reads an order
a line: a folder, what stands behind `python` (a script, -m and a module, or -c and a program), files
for stdin, stdout and stderr, how many seconds it may take, and one environment for each process
that is wanted. It forks them, waits for them, and answers with their exit status.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import traceback

import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401 - the first optimizer imports it
import torch.distributed.tensor  # noqa: F401

with contextlib.suppress(ImportError):
    import triton.language  # noqa: F401


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        children, status = set(), 0
        for environment in order.pop("environments"):
            child = os.fork()
            if child == 0:
                become(environment, **order)
            children.add(child)
        while children:
            child, ended = os.wait()
            children.remove(child)
            if ended and not status:  # as under torchrun, the others end with the first that fails
                status = os.waitstatus_to_exitcode(ended)
                for other in children:
                    os.kill(other, signal.SIGTERM)
        print(status, flush=True)


def become(
    environment: dict, command: list[str], folder: str, streams: list[str], seconds: float
) -> None:
    """Be the process that `python COMMAND...` would be, to its end; SIGALRM kills what takes longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    status = 0
    try:
        start(command)
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(command: list[str]) -> None:
    kind, *rest = command
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(kind)), command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve()
