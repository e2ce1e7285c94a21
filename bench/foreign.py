"""How fast a base of another family writes: alone, beside transformers' own generate, and guided through
each kind of map.

    python -m bench.foreign --base out/gemma-3-270m --value out/seed0/value-residual-smollm2-135m

The value network is one that was trained for the capitals (paper/capitals.py). All contenders answer
the same questions, one at a time, in one process and with one thread, and take turns. The base alone
writes as many tokens as --tokens says, and so does the value network alone: guidance runs both. Guided,
the base answers up to the end of its turn.
"""

import functools
import time
from pathlib import Path

import torch

from bench.measure import bench_parser, describe, progress, share, table
from data.capitals import Capitals
from data.chat import stop_ids
from data.tokenizer import load_tokenizer
from ivl import ValueModel
from paper.capitals import plugged
from run.bases import load_base
from run.cli import positive_int, run_cli
from run.processes import Alone
from sample import Guided, MappedGuided, Speaker, generate

THEIRS, OURS = "transformers' generate, alone", "beyond/foreign.py, alone"
VALUE = "the value network, alone"
PAPER, PIECES = "guided, the paper's map", "guided, pieces"


def write(speaker: Speaker, prompts: list[list[int]], tokens: int) -> tuple[int, int]:
    """Answer prompts one at a time; returns how many tokens were written, and base tokens read for that."""
    is_guided = isinstance(speaker.guided, MappedGuided)
    ends = stop_ids(speaker.tokenizer, speaker.template, speaker.guided.llamas)
    written = read = 0
    for prompt in prompts:
        options = dict(max_new_tokens=tokens, stop_ids=ends if is_guided else set())
        count = len(generate(speaker.guided, [prompt], **options)[0])
        written += count
        read += speaker.guided.base_tokens_read if is_guided else count
    return written, read


def write_theirs(model, prompts: list[list[int]], tokens: int) -> tuple[int, int]:
    """The same by transformers, with its cache."""
    for prompt in prompts:
        model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return tokens * len(prompts), tokens * len(prompts)


def main():
    parser = bench_parser(__doc__, rounds=5)
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--value", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tokens", type=positive_int, default=24, help="new tokens (default 24)")
    parser.add_argument("--questions", type=positive_int, default=4, help="(default 4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    # the contenders: each one answers all questions, and says how many tokens it wrote
    dtype = getattr(torch, args.dtype)
    base = load_base(args.base, args.dtype, "cpu", Alone())
    network = ValueModel.from_pretrained(args.value, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype)
    questions = [item.question for item in Capitals(0).items("development")[: args.questions]]
    speakers = {
        name: plugged(row, "qa", args.base, base, args.value, network)
        for name, row in ((OURS, "alone"), (PAPER, "paper"), (PIECES, "pieces"))
    }
    vocabulary, pieces = load_tokenizer(args.value), speakers[PIECES]
    alone = Guided(network.llamas[0], readable=vocabulary.vocab_size)
    speakers[VALUE] = Speaker(VALUE, alone, vocabulary, pieces.template, pieces.system)
    prompts = {
        name: [speaker.encode([("user", question)]) for question in questions]
        for name, speaker in speakers.items()
    }
    contenders = {THEIRS: lambda: write_theirs(theirs, prompts[OURS], args.tokens)}
    for name, speaker in speakers.items():
        contenders[name] = functools.partial(write, speaker, prompts[name], args.tokens)
    # each in turn; the first round warms up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}  # a token
    per_read: dict[str, list[float]] = {
        name: [] for name in contenders
    }  # a token that the base read
    for turn in range(args.rounds + 1):
        for name, answer in contenders.items():
            progress(f"round {turn} of {args.rounds}, {name}")
            started = time.perf_counter()
            written, read = answer()
            if turn:
                seconds[name].append((time.perf_counter() - started) / written)
                per_read[name].append((time.perf_counter() - started) / read)
    progress("")
    rows = [["", "tokens a second", "base tokens a token", "base tokens a second, beside theirs"]]
    for name, taken in seconds.items():
        rate, reads = len(taken) / sum(taken), sum(taken) / sum(per_read[name])
        beside = share(per_read[THEIRS], per_read[name])
        rows.append([name, f"{rate:.2f}", f"{reads:.2f}", beside])
    print(f"{describe('cpu')}, {args.dtype}\n\n{table(rows)}\n")
    print(f"pieces beside the paper's map: {share(seconds[PAPER], seconds[PIECES])} of its speed")
    both = [theirs + value for theirs, value in zip(seconds[THEIRS], seconds[VALUE])]
    print(
        f"guided, pieces, takes {share(seconds[PIECES], both)} of the time of generate + value network"
    )


if __name__ == "__main__":
    run_cli(main)
