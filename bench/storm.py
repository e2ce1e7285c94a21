"""A guided base served by vLLM (beyond/serving.py), and many users: is each answer ours, does memory stay?

    python -m bench.storm --base out/smollm2-135m --value V

A storm is 500 questions at random times within --seconds, and there are --times of them. Of the questions 15% are
cancelled, 10% are too long, and one is no JSON. Answers are compared with those of generate. aiohttp and psutil come
with vLLM.
"""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from bench.measure import describe
from bench.serving import LONGEST, NEW, guided_by_us, prompts_of, questions
from beyond.serving_settings import check_vllm, settle
from data.errors import UsageError
from run.cli import ArgumentParser, positive_int, run_cli
from sample import generate

ROOT = Path(__file__).parents[1]


def megabytes(process) -> float:
    """Of a process (psutil's) and those that it started."""
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().uss for member in family) / 1e6


async def ask(session, question: str) -> tuple[int, str]:
    """The server's status and answer."""
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": NEW, "temperature": 0}
    async with session.post("/v1/chat/completions", json=body) as reply:
        found = await reply.json()
    return reply.status, found["choices"][0]["message"]["content"] if reply.status == 200 else ""


async def one(session, delay: float, kind: str, question: str, expected: str) -> str:
    """What became of a request."""
    await asyncio.sleep(delay)
    if kind == "no JSON":
        async with session.post("/v1/chat/completions", data="{") as reply:
            return f"no JSON, status {reply.status}"
    try:
        if kind == "cancelled":
            await asyncio.wait_for(ask(session, question), random.random())
            return "answered before it could be cancelled"
        status, answer = await ask(session, question * (1000 if kind == "too long" else 1))
    except asyncio.TimeoutError:
        return "cancelled"
    if status != 200:
        return f"{kind}, status {status}"
    return (
        "equal to generate's" if answer.strip() == expected else f"OTHER: {answer!r}, {expected!r}"
    )


async def storm(address: str, server, asked: dict[str, str], args) -> None:
    import aiohttp

    rng = random.Random("storm")
    kinds = ["no JSON"]
    kinds += ["cancelled"] * (15 * args.count // 100) + ["too long"] * (args.count // 10)
    kinds += ["answered"] * (args.count - len(kinds))
    rng.shuffle(kinds)
    # a connection for each, as of so many users
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    limits = dict(timeout=aiohttp.ClientTimeout(None), connector=connector)
    async with aiohttp.ClientSession(address, **limits) as session:
        sizes = []
        for _ in range(args.times):
            requests = [
                one(session, rng.uniform(0, args.seconds), kind, *rng.choice(list(asked.items())))
                for kind in kinds
            ]
            counts = Counter(await asyncio.gather(*requests))
            await asyncio.sleep(2)
            sizes.append(megabytes(server))
            told = ", ".join(f"{count} {what}" for what, count in counts.most_common())
            print(f"{told}; memory {sizes[-1]:.0f} MB", flush=True)
        async with session.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
    left = [
        line for line in lines if line.startswith(("vllm:num_requests_r", "vllm:num_requests_w"))
    ]
    print(f"left in the server: {sum(float(line.split()[-1]) for line in left):g}")
    print(
        f"memory grew after the first by {', '.join(f'{b / a - 1:+.1%}' for a, b in pairwise(sizes))}"
    )


def wait_until_ready(address: str, server: subprocess.Popen) -> None:
    import urllib.request

    while True:
        try:
            return urllib.request.urlopen(f"{address}/health").close()
        except OSError:
            time.sleep(1)
        if server.poll() is not None:
            raise UsageError("the server has ended")


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--value", type=Path, required=True)
    parser.add_argument("--count", type=positive_int, default=500, help="requests (default 500)")
    parser.add_argument("--seconds", type=positive_int, default=60, help="in which they come")
    parser.add_argument("--times", type=positive_int, default=3, help="storms (default 3)")
    parser.add_argument("--port", type=positive_int, default=8000)
    args = parser.parse_args()
    settings = settle(args.base, [args.value], [1.0])
    check_vllm(settings.architectures)
    import psutil

    guided, prompts, texts = guided_by_us(settings), prompts_of(settings, 64), questions(64)
    written = []
    for first in range(0, 64, 32):
        batch = prompts[first : first + 32]
        written += generate(guided, batch, max_new_tokens=NEW, stop_ids=set(settings.ends))
    asked = {text: settings.tokenizer.decode(ids).strip() for text, ids in zip(texts, written)}
    command = [sys.executable, "-m", "beyond.serving", "--base", args.base, "--value", args.value]
    command += ["--port", args.port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", LONGEST, "--disable-uvicorn-access-log"]
    server = subprocess.Popen(list(map(str, command)), cwd=ROOT)
    address = f"http://127.0.0.1:{args.port}"
    try:
        wait_until_ready(address, server)
        print(describe("cpu"))
        asyncio.run(storm(address, psutil.Process(server.pid), asked, args))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    run_cli(main)
