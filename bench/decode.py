"""Table 3: what guidance costs while decoding, beside the base alone and transformers, and what
speculation wins back.

    python -m bench.decode             # 128, 512 and 1024 new tokens, one text and eight at a time
    python -m bench.decode --pair SmolLM2-135M SmolLM2-135M --dtype bfloat16    # llama.cpp, too
    python -m bench.decode --speculate out/seed0    # z_delta drafts for tiny-l

On a GPU the networks have the shapes of TinyLlama and Llama-2-7B and 13B, in bfloat16, and steps
are those of `sample.py --compile`. On a CPU, with one thread, they have the shapes of tiny-s and
tiny-l, and at 128 tokens also of a 23M and a 110M network. Weights are random. Every contender
writes as many tokens as asked for, greedily. transformers is guided by a second model, with a cache
of its own, in a LogitsProcessor.
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
    bench_parser,
    compare,
    copy_bandwidth,
    describe,
    device_here,
    progress,
    results_table,
    share,
    table,
    times,
)
from bench.train import SHAPES as TRAINED_SHAPES
from beyond.speculation import Speculative, speculate
from data.chat import encode_chat
from data.errors import UsageError
from data.smollm2 import find_gguf
from data.tiny_world import PIECES, TEMPLATE, TINY_SIZES, prompt_text, world_of
from data.tokenizer import load_tokenizer
from fast.graphs import CompiledGuided
from ivl import SumDelta, ValueModel
from model import Llama, LlamaConfig, without_weights
from run.arguments import few
from run.cli import positive_int, run_cli
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
FOUR_BITS = "llama.cpp, base alone, 4 bits"  # of SmolLM2-135M, whose GGUF file pip can install
# of which networks: b for the base, v for the value network
CONTENDERS = {
    ALONE: "b",
    VALUE: "v",
    BOTH: "bv",
    PROXY: "bvv",
    THEIRS: "b",
    THEIR_BOTH: "bv",
    FOUR_BITS: "",
}


def networks_of(name: str, value: str, base: str) -> list[str]:
    """The shapes of a contender's networks."""
    return [base if letter == "b" else value for letter in CONTENDERS[name]]


def weights_of(config: LlamaConfig) -> int:
    """How many weights a step reads: of an embedding that is not lm_head too, only a row."""
    with without_weights():
        count = sum(parameter.numel() for parameter in Llama(config).parameters())
    return count if config.tie_word_embeddings else count - config.vocab_size * config.hidden_size


# --------------------------------------------------------------------------------------------------
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
    shapes = [SHAPES[shape] for shape in networks_of(name, value, base)]
    llama, *others = [Llama(shape).requires_grad_(False) for shape in shapes]
    plug = None
    if others:
        plug = SumDelta(others, [1.0, -1.0]) if name == PROXY else ValueModel(*others)
    guided = guided_on(llama.device.type)(llama, plug)
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
    """By llama.cpp's bindings (pip install llama-cpp-python), one text after the other."""
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


# --------------------------------------------------------------------------------------------------
# Table 3


def bytes_a_step(config: LlamaConfig, batch: int, tokens: int, width: int) -> float:
    """The least a step must read of a network: its weights, and half of all keys and values."""
    positions = batch * (PROMPT + tokens / 2)
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return width * (weights_of(config) + positions * kept)


def fitting(
    value: str, base: str, device: str, contenders: Iterable[str] = CONTENDERS
) -> list[str]:
    """The contenders that fit into the memory together; the first ones go first."""
    room = 0.85 * torch.cuda.mem_get_info()[1] / 2 if device == "cuda" else float("inf")
    names = []
    for name in contenders:  # room is counted in weights of two bytes
        room -= sum(weights_of(SHAPES[network]) for network in networks_of(name, value, base))
        if room > 0:
            names.append(name)
    return names


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
    """Each contender writes `tokens` tokens a round; seconds are of one token of all texts."""
    sizes = dict(value=value, base=base, batch=batch, tokens=tokens)
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    steps = {name: functools.partial(decoding, name, dtype=dtype, **sizes) for name in contenders}
    results = compare(steps, device, rounds, 1)
    for result in results.values():
        result.seconds = [seconds / tokens for seconds in result.seconds]
    return results


def show(
    results: dict[str, Result],
    value: str,
    base: str,
    batch: int,
    tokens: int,
    width: int,
    bandwidth: float,
) -> str:
    """The table of a pair; `width`: bytes of a weight, `bandwidth`: a copy's bytes per second."""
    heads = ["tokens/s", "ms a token (range)", "times the base alone", "of a copy's bytes/s"]
    alone = results.get(ALONE, Result()).seconds
    reads = {name: bytes_a_step(SHAPES[name], batch, tokens, width) for name in (value, base)}

    def cells(name: str, result: Result) -> list[str]:
        moved = sum(reads[network] for network in networks_of(name, value, base))
        longer = share(result.seconds, alone) if name != ALONE else ""
        of_copy = f"{moved / result.median / bandwidth:.0%}" if moved else ""
        peak = f"{result.peak / 1e9:.2f}"
        return [f"{batch / result.median:.0f}", times(result), longer, of_copy, peak]

    shown = results_table(results, [*heads, "GB at the peak"], cells)
    return f"{shown}\n\n{conclusions(results)}".rstrip()


def conclusions(results: dict[str, Result]) -> str:
    taken = {name: result.seconds for name, result in results.items()}
    together = [sum(pair) for pair in zip(taken.get(ALONE, []), taken.get(VALUE, []))]
    lines = []
    if of_sum := share(taken.get(BOTH, []), together):
        lines.append(f"- {BOTH} takes {of_sum} of the sum of what the two take alone")
    for ours, theirs in ((ALONE, THEIRS), (BOTH, THEIR_BOTH), (ALONE, FOUR_BITS)):
        if longer := share(taken.get(theirs, []), taken.get(ours, [])):
            lines.append(f"- {theirs}, takes {longer} times as long as {ours} here")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Speculation, with trained networks


def deepen(base: Llama, layers: int) -> Llama:
    """The same function at the cost of more layers: the new ones add nothing to the residual."""
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


DRAFTS = {"z_delta": "z_delta alone", "both": "tiny-s with z_delta"}


def speculation(home: Path, layers: int, ahead: list[int], rounds: int, device: str) -> dict:
    """Seconds of answers, plainly and by speculation in turn, of each K and draft."""
    small, base = [
        Llama.from_pretrained(home / name, torch.float32, device) for name in ("tiny-s", "tiny-l")
    ]
    value = ValueModel.from_pretrained(home / "value-residual-tiny-s", torch.float32, device)
    tokenizer = load_tokenizer(home / "tiny-s")
    items = world_of(home / "tiny-s").fact_items("development")[:48]
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    kind = guided_on(device)
    guided = kind(deepen(base, layers) if layers else base, value)

    def timed(say, system, lengths: list[int] | None = None) -> tuple[float, list[list[int]]]:
        """With lengths, answers of so many tokens, whatever they are."""
        started, answers = time.perf_counter(), []
        for number, prompt in enumerate(prompts):
            length = 48 if lengths is None else lengths[number]
            stop_ids = {tokenizer.eos_id} if lengths is None else set()
            answers += say(system, [prompt], max_new_tokens=length, stop_ids=stop_ids)
        return time.perf_counter() - started, answers

    systems = {}
    for K in ahead:
        systems[K, "z_delta"] = Speculative(guided, K)
        systems[K, "both"] = Speculative(guided, K, small)
    _, plain = timed(generate, guided)
    lengths = [len(answer) for answer in plain]
    for system in systems.values():  # a warm-up
        speculate(system, prompts[:2], max_new_tokens=8, stop_ids=set())
        system.rounds = system.tried = system.accepted = 0
    seconds = {name: [] for name in ("guided", "alone", "small", *systems)}
    differing = 0
    for turn in range(rounds):
        seconds["guided"].append(timed(generate, guided)[0])
        seconds["alone"].append(timed(generate, kind(guided.base), lengths)[0])
        seconds["small"].append(timed(generate, kind(small), lengths)[0])
        for key, system in systems.items():
            taken, answers = timed(speculate, system)
            seconds[key].append(taken)
            differing += sum(ours != theirs for ours, theirs in zip(answers, plain))
            progress(f"round {turn + 1} of {rounds}, K = {key[0]}, {DRAFTS[key[1]]}")
    progress("")
    drafts = [
        {
            "K": K,
            "draft": draft,
            "accepted": system.accepted / system.tried,
            "tokens a round": rounds * sum(lengths) / system.rounds,
            "seconds": seconds[K, draft],
        }
        for (K, draft), system in systems.items()
    ]
    return {
        "answers": len(prompts),
        "tokens": sum(lengths),
        "differing": differing,
        "compared": len(prompts) * rounds * len(systems),
        "guided": seconds["guided"],
        "alone": seconds["alone"],
        "small": seconds["small"],
        "drafts": drafts,
    }


def show_speculation(found: dict) -> str:
    rows = [
        [
            "K",
            "drafted by",
            "accepted",
            "tokens a round",
            "times as fast as guided plainly",
            "of the base alone's time (range)",
        ]
    ]
    for each in found["drafts"]:
        rows.append(
            [
                str(each["K"]),
                DRAFTS[each["draft"]],
                f"{each['accepted']:.3f}",
                f"{each['tokens a round']:.2f}",
                share(found["guided"], each["seconds"]),
                share(each["seconds"], found["alone"]),
            ]
        )
    lines = [
        f"{found['answers']} answers, {found['tokens']} tokens; {found['differing']} of {found['compared']} differ from "
        "those without speculation",
        f"this base alone takes {share(found['alone'], found['small'])} times as long as tiny-s alone",
        f"guided without speculation takes {share(found['guided'], found['alone'])} times as long as the base alone",
    ]
    for draft, name in DRAFTS.items():
        ours = [each for each in found["drafts"] if each["draft"] == draft]
        best = min(ours, key=lambda each: statistics.median(each["seconds"]))
        speed_up = statistics.median(a / b for a, b in zip(found["guided"], best["seconds"]))
        verdict = "it pays" if speed_up > 1 else "it does not pay"
        lines.append(
            f"drafted by {name}, {verdict}: at best, K = {best['K']}, {speed_up:.2f} times as fast, "
            f"and {share(best['seconds'], found['alone'])} times the time of the base alone"
        )
    return "\n".join([table(rows), "", *(f"- {line}" for line in lines)])


# --------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = bench_parser(__doc__, rounds=3)
    shapes = parser.add_argument_group("Table 3")
    shapes.add_argument(
        "--tokens", type=positive_int, nargs="+", help="new tokens (default 128 512 1024)"
    )
    shapes.add_argument("--batch", type=positive_int, nargs="+", help="texts at a time (1 8)")
    shapes.add_argument("--pair", nargs=2, choices=SHAPES, help="value network and base")
    shapes.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="(default bfloat16, on a CPU float32)"
    )
    shapes.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help="%(choices)s")
    trained = parser.add_argument_group("speculation")
    trained.add_argument(
        "--speculate", type=Path, metavar="HOME", help="measure it with the networks in this folder"
    )
    trained.add_argument(
        "--ahead", type=few, nargs="+", metavar="K", help="tokens drafted at a time (2 4 6 8 12)"
    )
    trained.add_argument(
        "--layers", type=positive_int, metavar="N", help="of the deepened tiny-l (default 28)"
    )
    args = parser.parse_args()
    unused, reason = ("ahead", "layers"), "goes with --speculate"
    if args.speculate is not None:
        unused = ("tokens", "batch", "pair", "dtype", "only")
        reason = "does not go with --speculate, whose answers come one by one and end by themselves"
    for name in unused:
        if getattr(args, name) is not None:
            parser.error(f"--{name} {reason}")
    args.batch = args.batch or [1, 8]
    args.ahead = args.ahead or [2, 4, 6, 8, 12]
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
    for what, layers in (
        ("as it was trained", 0),
        (f"deepened to {args.layers} layers", args.layers),
    ):
        found = speculation(args.speculate, layers, args.ahead, args.rounds, device)
        print(
            f"tiny-l {what}, guided by the value network of tiny-s\n\n{show_speculation(found)}\n",
            flush=True,
        )


def bench_table_3(args: argparse.Namespace, device: str) -> None:
    bandwidth = copy_bandwidth(device, threads=1)
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    width = getattr(torch, dtype).itemsize
    print(f"{describe(device)}, {dtype}; a copy moves {bandwidth / 1e9:.4g} GB/s\n")
    for value, base in [args.pair] if args.pair else PAIRS[device]:
        wanted = args.only or list(CONTENDERS)
        if base != "SmolLM2-135M":
            wanted = [name for name in wanted if name != FOUR_BITS]
        contenders = fitting(value, base, device, wanted)
        if left_out := [name for name in wanted if name not in contenders]:
            print(f"{value} and {base}: no room beside the others for {', '.join(left_out)}\n")
        lengths = args.tokens or ([128] if base == "110M" else [128, 512, 1024])
        for tokens, batch in itertools.product(lengths, args.batch):
            results = measure(value, base, batch, tokens, device, args.rounds, contenders, dtype)
            print(
                f"A {value} value network on a {base} base: {tokens} new tokens, {batch} at a time"
                f"\n\n{show(results, value, base, batch, tokens, width, bandwidth)}\n",
                flush=True,
            )


def main():
    args = arguments()
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            "measures in processes of its own, each with a whole base; start it without torchrun"
        )
    torch.set_num_threads(1)
    bench = bench_table_3 if args.speculate is None else bench_speculation
    bench(args, device_here())


if __name__ == "__main__":
    run_cli(main)
