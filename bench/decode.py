"""Table 3: what guidance costs while decoding, beside the base alone and beside transformers; and what speculation gives back.

    python -m bench.decode                           # 128, 512 and 1024 new tokens, one text and eight at a time
    python -m bench.decode --pair SmolLM2-135M SmolLM2-135M --dtype bfloat16    # beside llama.cpp, too, on the model's own GGUF file
    python -m bench.decode --speculate out/seed0     # tiny-s drafts for tiny-l: as trained, and as costly as a big base

Shapes are the true ones of TinyLlama and Llama-2-7B and 13B on a GPU, in bfloat16; on a CPU, with one thread, those of tiny-s
and tiny-l, and at 128 tokens a pair of 23M and 110M parameters. On a GPU our steps are those of
`sample.py --compile`. Weights are random. Every contender writes as many tokens as asked for, greedily; transformers guides by a
second model in a LogitsProcessor, with a cache of its own.
"""

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.measure import (
    Result,
    compare,
    copy_bandwidth,
    describe,
    progress,
    ratio,
    save,
    share,
    table,
    times,
)
from bench.train import SHAPES as TRAINED_SHAPES
from beyond.speculation import Passes, Speculative, measure_passes, predicted_speed_up, speculate
from data.chat import encode_chat
from data.errors import UsageError
from data.smollm2 import find_gguf
from data.tiny_world import PIECES, TEMPLATE, TINY_SIZES, prompt_text, world_of
from data.tokenizer import load_tokenizer
from fast.graphs import CompiledGuided
from ivl import ProxyDelta, ValueModel
from model import Llama, LlamaConfig
from run.arguments import few
from run.cli import ArgumentParser, positive_int, run_cli
from sample import Guided, generate

PROMPT = 32  # tokens before the first new one


def tiny_shape(name: str) -> LlamaConfig:
    width, layers, heads, kv_heads, hidden = TINY_SIZES[name][0]
    return LlamaConfig(PIECES, width, hidden, layers, heads, kv_heads, tie_word_embeddings=True)


SHAPES = TRAINED_SHAPES | {
    "Llama-2-13B": LlamaConfig(32000, 5120, 13824, 40, 40, 40, max_position_embeddings=4096),
    "tiny-s": tiny_shape("tiny-s"),
    "tiny-l": tiny_shape("tiny-l"),
    "23M": LlamaConfig(32000, 384, 1024, 6, 6, 6, tie_word_embeddings=True),
    "SmolLM2-135M": LlamaConfig(
        49152, 576, 1536, 30, 9, 3, rope_theta=100_000.0, tie_word_embeddings=True
    ),
    "110M": LlamaConfig(32000, 768, 2048, 12, 12, 12, tie_word_embeddings=True),
}
PAIRS = {
    "cuda": [("TinyLlama", "Llama-2-7B"), ("TinyLlama", "Llama-2-13B")],
    "cpu": [("tiny-s", "tiny-l"), ("23M", "110M")],
}
ALONE, VALUE, BOTH, PROXY = "base alone", "value network alone", "value + base", "proxy tuning"
THEIRS, THEIR_BOTH = "transformers, base alone", "transformers, two models"
FOUR_BITS = (
    "llama.cpp, base alone, 4 bits"  # of SmolLM2-135M, the one GGUF file that pip can install
)
CONTENDERS = {
    ALONE: "b",
    VALUE: "v",
    BOTH: "bv",
    PROXY: "bvv",
    THEIRS: "b",
    THEIR_BOTH: "bv",
    FOUR_BITS: "",
}  # of base and value network


def networks_of(name: str, value: str, base: str) -> list[str]:
    """The shapes of a contender's networks."""
    return [{"b": base, "v": value}[each] for each in CONTENDERS[name]]


def weights_of(config: LlamaConfig) -> int:
    """How many numbers a step reads: all but the embedding, of which it takes a row, unless that is lm_head, too."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Llama(config).parameters())
    return count if config.tie_word_embeddings else count - config.vocab_size * config.hidden_size


# ---------------------------------------------------------------------------------------------------------
# The contenders


def decoding(
    name: str, value: str, base: str, batch: int, tokens: int, dtype: str
) -> Callable[[], None]:
    """A step that writes `tokens` new tokens of `batch` texts."""
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    prompts = torch.randint(3, 1000, (batch, PROMPT), device="cpu").tolist()
    if name in (THEIRS, THEIR_BOTH):
        return transformers_decoding(name, value, base, prompts, tokens)
    if name == FOUR_BITS:
        return llama_cpp_decoding(prompts, tokens)
    llamas = [
        Llama(SHAPES[shape]).requires_grad_(False) for shape in networks_of(name, value, base)
    ]
    plug = None
    if name == PROXY:
        plug = ProxyDelta(*llamas[1:])
    elif name == BOTH:
        plug = ValueModel(llamas[1])
    guided = guided_on(llamas[0].device.type)(llamas[0], plug)
    return lambda: generate(guided, prompts, max_new_tokens=tokens, stop_ids=set()) and None


def guided_on(device: str) -> type[Guided]:
    """What takes the steps: on a GPU the fastest way, sample.py's --compile."""
    return CompiledGuided if device == "cuda" else Guided


def transformers_decoding(
    name: str, value: str, base: str, prompts: list[list[int]], tokens: int
) -> Callable[[], None]:
    import transformers

    def model(shape: str):
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape].to_dict()))
        made.generation_config.eos_token_id = None
        return made.eval().requires_grad_(False)

    class AddDelta(transformers.LogitsProcessor):
        """Eq. (3): a second model, with a cache of its own, as one plugs it into transformers."""

        def __init__(self, network):
            self.network, self.cache = network, None

        def __call__(self, input_ids, scores):
            out = self.network(
                input_ids if self.cache is None else input_ids[:, -1:],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self.cache = out.past_key_values
            return scores + out.logits[:, -1]

    base, value = model(base), model(value) if name == THEIR_BOTH else None
    inputs = torch.tensor(prompts)
    options = dict(
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )

    @torch.inference_mode()
    def step():
        base.generate(inputs, **options, logits_processor=[AddDelta(value)] if value else [])

    return step


def llama_cpp_decoding(prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    """One text after the other, by llama.cpp's bindings (pip install llama-cpp-python), from the file that data/smollm2.py reads."""
    import llama_cpp

    network = llama_cpp.Llama(
        str(find_gguf()), n_ctx=PROMPT + tokens, n_threads=1, n_threads_batch=1, verbose=False
    )

    def step():
        for prompt in prompts:
            network.reset()
            for _ in itertools.islice(network.generate(prompt, temp=0.0), tokens):
                pass

    return step


# ---------------------------------------------------------------------------------------------------------
# Table 3


def bytes_a_step(config: LlamaConfig, batch: int, tokens: int, width: int) -> float:
    """What a step must read of a network at the least: its weights once, and the keys and values so far, halfway on."""
    stored = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * (PROMPT + tokens / 2)
    )
    return width * (weights_of(config) + batch * stored)


def fitting(
    value: str, base: str, device: str, contenders: Iterable[str] = CONTENDERS
) -> list[str]:
    """Those of the contenders that fit into the memory together, the first ones first."""
    room = (
        0.85 * torch.cuda.mem_get_info()[1] / 2 if device == "cuda" else float("inf")
    )  # numbers of two bytes
    names = []
    for name in contenders:
        room -= sum(weights_of(SHAPES[network]) for network in networks_of(name, value, base))
        if room > 0:
            names.append(name)
    return names


def usual_dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def measure(
    value: str,
    base: str,
    batch: int,
    tokens: int,
    device: str,
    rounds: int,
    contenders: list[str],
    dtype: str | None = None,
) -> dict[str, Result]:
    """Each contender writes `tokens` tokens in every round; seconds are those of one token of all texts."""
    dtype = dtype or usual_dtype(device)
    step = functools.partial(
        functools.partial, decoding, value=value, base=base, batch=batch, tokens=tokens, dtype=dtype
    )
    results = compare({name: step(name=name) for name in contenders}, device, rounds, 1)
    for result in results.values():
        result.seconds = [] if result.failure else [seconds / tokens for seconds in result.seconds]
    return results


def show(
    results: dict[str, Result],
    value: str,
    base: str,
    batch: int,
    tokens: int,
    dtype: str,
    bandwidth: float,
) -> str:
    rows = [
        [
            "",
            "tokens/s",
            "ms a token (range)",
            "times the base alone",
            "of a copy's bytes/s",
            "GB at the peak",
        ]
    ]
    width = getattr(torch, dtype).itemsize
    reads = {name: bytes_a_step(SHAPES[name], batch, tokens, width) for name in (value, base)}
    for name, result in results.items():
        if result.failure:
            rows.append([name, result.failure, "", "", "", ""])
            continue
        moved = sum(reads[network] for network in networks_of(name, value, base))
        longer = ""
        if name != ALONE and ALONE in results and not results[ALONE].failure:
            longer = ratio(results[ALONE], result)
        rows.append(
            [
                name,
                f"{batch / result.median:.0f}",
                times(result),
                longer,
                f"{100 * moved / result.median / bandwidth:.0f}%" if moved else "",
                f"{result.peak / 1e9:.2f}",
            ]
        )
    return f"{table(rows)}\n\n{conclusions(results)}".rstrip()


def conclusions(results: dict[str, Result]) -> str:
    def taken(name: str) -> list[float]:
        return [] if name not in results or results[name].failure else results[name].seconds

    lines, together = [], [sum(pair) for pair in zip(taken(ALONE), taken(VALUE))]
    if together and taken(BOTH):
        lines.append(
            f"value + base takes {share(taken(BOTH), together)} of the sum of what the two take alone"
        )
    for ours, theirs in ((ALONE, THEIRS), (BOTH, THEIR_BOTH), (ALONE, FOUR_BITS)):
        if taken(ours) and taken(theirs):
            lines.append(
                f"{theirs}, takes {share(taken(theirs), taken(ours))} times as long as {ours} here"
            )
    return "\n".join(f"- {line}" for line in lines)


# ---------------------------------------------------------------------------------------------------------
# Speculation, with trained networks


def deepen(base: Llama, layers: int) -> Llama:
    """The same function at the cost of more layers: those added write nothing into the residual stream."""
    deep = Llama(LlamaConfig(**vars(base.config) | {"num_hidden_layers": layers})).to(
        base.device, base.dtype
    )
    with torch.no_grad():
        for layer in deep.model.layers[base.config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    kept = deep.state_dict() | base.state_dict()
    deep.load_state_dict(kept)
    return deep.requires_grad_(False)


def speculation(home: Path, layers: int, ahead: list[int], rounds: int, device: str) -> dict:
    """Answers to the tiny world's development questions, plainly and by speculation in turn; what came out of each K."""
    draft, base = [
        Llama.from_pretrained(home / name, torch.float32, device) for name in ("tiny-s", "tiny-l")
    ]
    value = ValueModel.from_pretrained(home / "value-residual-tiny-s", torch.float32, device)
    tokenizer = load_tokenizer(home / "tiny-s")
    items = world_of(home / "tiny-s").fact_items("development")[:48]
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    kind = guided_on(device)
    guided = kind(deepen(base, layers) if layers else base, value)
    options = dict(max_new_tokens=48, stop_ids={tokenizer.eos_id})

    def timed(say, system) -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        answers = [say(system, [prompt], **options)[0] for prompt in prompts]
        return time.perf_counter() - started, answers

    systems = {K: Speculative(guided, draft, K) for K in ahead}
    unguided = kind(guided.base)
    alone = {"big": Speculative(unguided, draft, 1), "small": Speculative(kind(draft), draft, 1)}
    found = {
        "answers": len(prompts),
        "differing": 0,
        "plain": [],
        "unguided": [],
        "big": [],
        "small": [],
        "K": {},
    }
    passes, taken = {K: [] for K in ahead}, {K: [] for K in ahead}
    for turn in range(rounds):
        for name, each in alone.items():  # what a token of either base takes
            found[name].append(measure_passes(each, prompts[0]).plain)
        seconds, plain = timed(generate, guided)
        found["plain"].append(seconds)
        started = time.perf_counter()
        for prompt, answer in zip(
            prompts, plain
        ):  # the base alone, as many tokens whatever they are
            generate(unguided, [prompt], max_new_tokens=len(answer), stop_ids=set())
        found["unguided"].append(time.perf_counter() - started)
        for K, system in systems.items():
            passes[K].append(measure_passes(system, prompts[0]))
            seconds, answers = timed(speculate, system)
            taken[K].append(seconds)
            found["differing"] += sum(ours != theirs for ours, theirs in zip(answers, plain))
            progress(f"round {turn + 1} of {rounds}, K = {K}")
    progress("")
    lengths = [len(answer) for answer in plain]
    found |= {"tokens": sum(lengths), "compared": len(prompts) * rounds * len(ahead)}
    for K, system in systems.items():
        usual = Passes(*map(statistics.median, zip(*passes[K])))
        found["K"][K] = {
            "acceptance": system.acceptance,
            "tokens a round": rounds * sum(lengths) / system.rounds,
            "passes": usual._asdict(),
            "predicted": predicted_speed_up(lengths, system.acceptance, usual),
            "seconds": taken[K],
        }
    return found


def show_speculation(found: dict) -> str:
    rows = [
        [
            "K",
            "accepted, by position",
            "tokens a round",
            "ms: guided, to draft, to verify K",
            "predicted speed-up",
            "measured (range)",
        ]
    ]
    for K, each in found["K"].items():
        accepted = " ".join(f"{share:.2f}" for share in each["acceptance"])
        milliseconds = ", ".join(
            f"{1000 * each['passes'][part]:.2f}" for part in ("plain", "drafted", "verified")
        )
        rows.append(
            [
                str(K),
                accepted,
                f"{each['tokens a round']:.2f}",
                milliseconds,
                f"{each['predicted']:.2f}",
                share(found["plain"], each["seconds"]),
            ]
        )
    speed_up, K = max(
        (statistics.median(a / b for a, b in zip(found["plain"], each["seconds"])), K)
        for K, each in found["K"].items()
    )
    lines = [
        f"{found['answers']} answers, {found['tokens']} tokens; {found['differing']} of {found['compared']} differ from "
        "those without speculation",
        f"a token of this base takes {share(found['big'], found['small'])} times what one of tiny-s takes",
        f"guided without speculation takes {share(found['plain'], found['unguided'])} times as long as the base alone",
        f"at K = {K} it pays: {speed_up:.2f} times as fast, and it takes "
        f"{share(found['K'][K]['seconds'], found['unguided'])} times as long as the base alone"
        if speed_up > 1
        else f"it does not pay: at best, K = {K}, {speed_up:.2f} times as fast",
    ]
    return "\n".join([table(rows), "", *(f"- {line}" for line in lines)])


# ---------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    shapes = parser.add_argument_group("Table 3")
    shapes.add_argument(
        "--tokens",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="new tokens (default 128 512 1024)",
    )
    shapes.add_argument(
        "--batch", type=positive_int, nargs="+", metavar="B", help="texts at a time (default 1 8)"
    )
    shapes.add_argument(
        "--pair", nargs=2, metavar="SHAPE", help=f"value network and base, of {', '.join(SHAPES)}"
    )
    shapes.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="(default bfloat16 on a GPU, float32 on a CPU)",
    )
    shapes.add_argument(
        "--only",
        nargs="+",
        choices=list(CONTENDERS),
        metavar="NAME",
        help=f"of the contenders {'; '.join(CONTENDERS)}",
    )
    trained = parser.add_argument_group("speculation")
    trained.add_argument(
        "--speculate",
        type=Path,
        metavar="HOME",
        help="measure this instead, with the networks in this folder",
    )
    trained.add_argument(
        "--ahead",
        type=few,
        nargs="+",
        metavar="K",
        help="tokens to draft at a time (default 1 2 3 4 6 8)",
    )
    trained.add_argument(
        "--layers", type=positive_int, metavar="N", help="of the deepened tiny-l (default 28)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.speculate is None:
        unused = ("ahead", "layers")
        reason = "goes with --speculate"
    else:
        unused = ("tokens", "batch", "pair", "dtype", "only")
        reason = "does not go with --speculate, whose answers come one by one and end by themselves"
    for name in unused:
        if getattr(args, name) is not None:
            parser.error(f"--{name} {reason}")
    args.batch = args.batch or [1, 8]
    args.ahead = args.ahead or [1, 2, 3, 4, 6, 8]
    args.layers = args.layers or 28
    least = tiny_shape("tiny-l").num_hidden_layers
    if args.layers < least:
        parser.error(f"--layers {args.layers}: tiny-l has {least} to begin with")
    return args


def bench_speculation(args: argparse.Namespace, device: str) -> None:
    folders = [args.speculate / name for name in ("tiny-s", "tiny-l", "value-residual-tiny-s")]
    for folder in folders:
        if not (folder / "train.json").is_file():
            raise UsageError(
                f"{folder}: not there; `python train.py` and `python train.py --base tiny-l` make it"
            )
    print(f"{describe(device)}, float32\n")
    numbers = {"device": describe(device)}
    for what, layers in (
        ("as it was trained", 0),
        (f"deepened to {args.layers} layers", args.layers),
    ):
        numbers[what] = speculation(args.speculate, layers, args.ahead, args.rounds, device)
        print(
            f"tiny-l {what}, guided by the value network of tiny-s; tiny-s drafts\n\n"
            f"{show_speculation(numbers[what])}\n",
            flush=True,
        )
        save(args.json, numbers)


def bench_table_3(args: argparse.Namespace, device: str) -> None:
    pairs = [args.pair] if args.pair else PAIRS[device]
    for name in args.pair or []:
        if name not in SHAPES:
            raise UsageError(f"--pair {name}: no such shape; there are {', '.join(SHAPES)}")
    bandwidth = copy_bandwidth(device, threads=1)
    dtype = args.dtype or usual_dtype(device)
    print(f"{describe(device)}, {dtype}; a copy moves {bandwidth / 1e9:.4g} GB/s\n")
    numbers = {"device": describe(device), "copy_bandwidth": bandwidth}
    for value, base in pairs:
        wanted = args.only or [
            name for name in CONTENDERS if name != FOUR_BITS or base == "SmolLM2-135M"
        ]
        contenders = fitting(value, base, device, wanted)
        left_out = [name for name in wanted if name not in contenders]
        if left_out:
            print(f"{value} and {base}: no room beside the others for {', '.join(left_out)}\n")
        for tokens in args.tokens or ([128] if base == "110M" else [128, 512, 1024]):
            for batch in args.batch:
                results = measure(
                    value, base, batch, tokens, device, args.rounds, contenders, dtype
                )
                print(
                    f"A {value} value network on a {base} base: {tokens} new tokens, {batch} at a time\n\n"
                    f"{show(results, value, base, batch, tokens, dtype, bandwidth)}\n",
                    flush=True,
                )
                about = f"{value} on {base}, {tokens} tokens, batch {batch}"
                numbers[about] = {name: vars(each) for name, each in results.items()}
                save(args.json, numbers)


def main():
    args = arguments()
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            "measures in processes of its own, each with a whole base; start it without torchrun"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    bench = bench_table_3 if args.speculate is None else bench_speculation
    bench(args, device)


if __name__ == "__main__":
    run_cli(main)
