"""Decoding: a base alone, or a base guided by a value network.

    python sample.py                                   # the newest value network, on questions it never saw
    python sample.py --base tiny-l                     # the same value network plugged into a bigger base
    python sample.py --prompt "Greet Fufa. Say it twice."
    python sample.py --base tiny-l --expert out/seed0/full-tiny-s    # proxy tuning: tuned minus untuned in its place
    python sample.py --chat
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from data.chat import TEMPLATES, Turn, default_template, encode_chat, end_token, is_unicode
from data.tiny_world import TEMPLATE, TINY_SIZES, World, evaluate, prompt_text
from data.tokenizer import DataError, StreamDecoder, Tokenizer, load_tokenizer
from ivl import ProxyDelta, ValueModel, check_recorded, check_same_family, combine, is_same_family, read_info
from model import CheckpointError, KVCache, Llama, read_json
from vocab_map import MARGIN, Mapped, VocabMap, build

# ---------------------------------------------------------------------------------------------------------
# Guided decoding


class Guided:
    """A base with or without a value network or proxy, and the KV caches of all of them. Eq. (3) at each step."""

    def __init__(self, base: Llama, value: ValueModel | ProxyDelta | None = None, vocab_map: VocabMap | None = None,
                 alpha: float = 1.0):
        self.base, self.value, self.alpha = base, value, alpha
        self.llamas = [base] if value is None else [base, *value.llamas]
        # Tokens from here on are never said: some network cannot read them, or the tokenizer has no text for them.
        self.readable = min([base.config.vocab_size] + ([] if value is None else [value.vocab_size]))
        self.mapped = None
        if vocab_map is not None:  # all tokens here are the value network's, and the base has its own inside `mapped`
            if isinstance(value, ValueModel) and value.scheme != "residual":
                raise ValueError(f"scheme {value.scheme} reads the base's logits over its own vocabulary, and here are others")
            self.mapped, self.llamas = Mapped(base, vocab_map), value.llamas
            self.readable = min(value.vocab_size, vocab_map.value_tokenizer.vocab_size)
        self.caches: list[KVCache] = []

    def allocate(self, batch: int, capacity: int) -> None:
        """Begin anew, with empty caches for `capacity` positions of `batch` rows."""
        self.caches = [KVCache(llama, batch, capacity) for llama in self.llamas]

    def start(self, prompts: list[list[int]], max_new_tokens: int, greedy: bool = True) -> Tensor:
        """Fill fresh caches with all but the last token of each prompt; return those last tokens (B, 1)."""
        if self.mapped:
            self.mapped.start(prompts)
            self.margin, self.begun = 0.0 if greedy else MARGIN, False
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.base.device)  # (B,)
        self.allocate(len(prompts), int(lengths.max()) + max_new_tokens)
        if lengths.any():
            padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
            for row, prompt in enumerate(prompts):
                padded[row, :len(prompt) - 1] = torch.tensor(prompt[:-1])
            padded = padded.to(self.base.device)
            if self.value is not None and self.value.is_cascade:  # it reads the base's logits of the prompt
                self.value.hidden(padded, self.base(padded, self.caches[0]), self.caches[1:])
            else:
                for llama, cache in zip(self.llamas, self.caches):
                    llama.model(padded, cache)  # the trunk alone: nobody needs these logits
            for cache in self.caches:
                cache.crop(lengths)
        return torch.tensor([prompt[-1:] for prompt in prompts], device=self.base.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Continue each row by tokens (B, T) -> z_post (B, T, Vb). The first step may be a whole prompt."""
        if not self.caches:
            self.allocate(len(tokens), min(llama.config.max_position_embeddings for llama in self.llamas))
        if self.mapped:
            return self._mapped_step(tokens)
        return self._combined(tokens, self.caches)

    def logits(self, tokens: Tensor) -> Tensor:
        """z_post (B, T, Vb) of whole sequences tokens (B, T), without caches and without a vocabulary map."""
        if self.mapped:
            raise ValueError("through a vocabulary map there are only steps")
        return self._combined(tokens, None)

    def _mapped_step(self, tokens: Tensor) -> Tensor:
        """step with a vocabulary map: tokens (B, 1) and z_post (B, 1, Vv) are the value network's."""
        if self.begun:  # the base has read the whole prompt before
            self.mapped.push(tokens[:, 0].tolist())
        self.begun = True
        z_delta = self.alpha * self.value(tokens, None, self.caches)[:, -1].float()  # (B, Vv)
        z = self.mapped.log_p(z_delta, self.margin) + z_delta
        z[:, self.readable:] = -torch.inf
        return z[:, None]

    def _combined(self, tokens: Tensor, caches: list[KVCache] | None) -> Tensor:
        z = self.base(tokens, caches and caches[0])  # (B, T, Vb)
        if self.value is not None:
            z = combine(z, self.value(tokens, z, caches and caches[1:]), self.alpha)  # Eq. (3)
        return z if self.readable == z.shape[-1] else z.index_fill(
            -1, torch.arange(self.readable, z.shape[-1], device=z.device), -torch.inf)

    def select(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.select(rows)
        if self.mapped:
            self.mapped.select(rows)


@torch.inference_mode()
def generate(guided: Guided, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, stop_ids: set[int] | None = None,
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Continue token prompts; return only the new tokens of each, a stop token included where one came.

    temperature 0 is greedy. Each prompt has a random stream of its own, so a sampled answer does not depend on the
    prompts beside it. stop_ids default to the base's eos. on_token(prompt, token) is called as tokens come.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    if stop_ids is None:
        eos = guided.mapped.map.value_tokenizer.eos_id if guided.mapped else guided.base.config.eos_token_id
        stop_ids = set(eos) if isinstance(eos, list) else {eos}
    noise = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
                         for number in range(len(prompts))]).to(guided.base.device)  # (B, max_new_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    alive = [True] * len(prompts)
    tokens = guided.start(prompts, max_new_tokens, greedy=temperature == 0)  # (B, 1)
    for index in range(max_new_tokens):
        logits = guided.step(tokens)[:, -1]  # (B, Vb)
        tokens = pick(logits, noise[:, index], temperature, top_p)[:, None]  # (B, 1)
        for prompt, token in zip(running, tokens[:, 0].tolist()):
            if alive[prompt]:
                outputs[prompt].append(token)
                alive[prompt] = token not in stop_ids
                if on_token:
                    on_token(prompt, token)
        still = [row for row, prompt in enumerate(running) if alive[prompt]]
        if not still:
            break
        if len(still) <= len(running) // 2:  # shrink the batch now and then rather than carry finished rows along
            rows = torch.tensor(still, device=tokens.device)
            guided.select(rows)
            tokens, noise, running = tokens[rows], noise[rows], [running[row] for row in still]
    return outputs


def pick(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens (B,) from logits (B, V): the arg-max, or by noise (B,) uniform in [0, 1) from the nucleus top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.max(-1, keepdim=True).values.float()  # so that no temperature overflows
    p, tokens = F.softmax(logits / temperature, dim=-1).sort(-1, descending=True)  # (B, V)
    total = p.cumsum(-1)
    p = p.masked_fill(total - p >= top_p, 0)  # a token stays if those before it do not reach top_p
    total = p.cumsum(-1)
    chosen = (total <= noise[:, None] * total[:, -1:]).sum(-1)  # where the noise falls in the cumulative sum
    chosen = torch.minimum(chosen, (p > 0).sum(-1) - 1)  # rounding must not choose what has no share
    return tokens.gather(-1, chosen[:, None])[:, 0]


@torch.inference_mode()
def score(guided: Guided, pairs: list[tuple[list[int], list[int]]], batch_size: int = 256
          ) -> list[tuple[float, bool]]:
    """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding would say it.

    A context that comes several times in a batch, as in multiple choice, is computed once.
    """
    results = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first:first + batch_size]
        contexts = list(dict.fromkeys(tuple(context) for context, _ in batch))
        longest = max(len(continuation) for _, continuation in batch)
        last = guided.start([list(context) for context in contexts], longest)  # (contexts, 1)
        rows = torch.tensor([contexts.index(tuple(context)) for context, _ in batch], device=last.device)  # (B,)
        guided.select(rows)
        padded = torch.zeros(len(batch), longest, dtype=torch.long)  # the last token of a continuation predicts nothing
        for row, (_, continuation) in enumerate(batch):
            padded[row, 1:len(continuation)] = torch.tensor(continuation[:-1])
        padded = padded.to(last.device)
        padded[:, :1] = last[rows]
        if guided.mapped:  # it takes one token at a time; what stands behind a short continuation counts nowhere
            z = torch.cat([guided.step(column) for column in padded.split(1, dim=1)], dim=1)
        else:
            z = guided.step(padded)
        log_p = F.log_softmax(z.float(), dim=-1)  # (B, longest, Vb)
        for row, (_, continuation) in enumerate(batch):
            wanted = torch.tensor(continuation, device=last.device)[:, None]
            here = log_p[row, :len(continuation)]
            results.append((here.gather(-1, wanted).sum().item(), bool((here.argmax(-1) == wanted[:, 0]).all())))
    return results


# ---------------------------------------------------------------------------------------------------------
# The tiny world


def world_of(path: str | Path) -> World | None:
    """The tiny world that a finished folder of train.py comes from; None for anything else."""
    try:
        record = read_json(Path(path) / "train.json")
    except (OSError, CheckpointError):
        return None
    # The world's own seed, which is not the run's when --seed differs from that of the base.
    named = re.fullmatch(r"tiny-world (\d{1,10})", str(record.get("data")))
    return World(int(named[1])) if named else None


def examine(guided: Guided, world: World, tokenizer: Tokenizer, split: str = "development") -> dict[str, float]:
    """The tiny world's metrics (data/tiny_world.py, evaluate) of a base or a guided base."""
    return evaluate(world, tokenizer, lambda prompts: generate(guided, prompts, max_new_tokens=48),
                    lambda pairs: score(guided, pairs), split)


def print_metrics(systems: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(systems.values())))
    width = max(map(len, systems)) + 2
    print(" " * width + "".join(f"{name:>8}" for name in names))
    for system, metrics in systems.items():
        shown = ["-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in names]
        print(f"{system:{width}}" + "".join(f"{text:>8}" for text in shown))


def show_world(world: World, systems: dict[str, tuple[Guided, Tokenizer]], count: int = 6) -> None:
    """Questions of the development split with every system's answer, then the metrics of all of them.

    Of two systems, the first questions as they come; of three, such as only the last answers rightly.
    """
    items = world.fact_items("development")
    answers = {}
    for name, (guided, tokenizer) in systems.items():
        prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
        answers[name] = [tokenizer.decode(ids).strip() for ids in generate(guided, prompts, max_new_tokens=48)]
    shown = range(len(items))
    if len(systems) > 2:
        *others, last = systems
        shown = [index for index in shown if answers[last][index] == items[index].answer
                 and all(answers[other][index] != items[index].answer for other in others)]
        print(f"{len(shown)} of {len(items)} questions only {last} answers rightly; {min(count, len(shown))} of them:")
    print()
    width = max(map(len, systems)) + 2
    for index in shown[:count]:
        print(prompt_text(items[index]))
        for name in systems:
            print(f"    {name:{width}}{answers[name][index]}")
        print(f"    {'truth':{width}}{items[index].answer}\n")
    print("On development people, whom no demonstration mentions (288 questions: about +-.03):")
    print_metrics({name: examine(guided, world, tokenizer) for name, (guided, tokenizer) in systems.items()})


# ---------------------------------------------------------------------------------------------------------
# Command line, shared with train.py


class UsageError(ValueError):
    """Something that a user asked for and cannot have; the message says what to do instead."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a mistake is told in one line."""

    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def run_cli(main: Callable[[], None]) -> None:
    """Run a script; a user's mistake is one line on stderr and status 2, a bug of ours keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # the name of a file may be no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        return main()
    except (UsageError, CheckpointError, DataError, SafetensorError) as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except torch.OutOfMemoryError:
        message = "the device is out of memory; --grad-accum, --max-length and --dtype save some"
    except KeyboardInterrupt:
        message, status = "stopped", 130
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # most likely the first process says the same, and torchrun ends the others when one has ended
    print(f"{Path(sys.argv[0]).name}: {message}".replace("\n", "\\n"), file=sys.stderr)
    sys.exit(status)


def number(kind: type, lowest: float, phrase: str, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number between these bounds; the phrase tells a user what it should be."""
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
positive_float, non_negative_float = number(float, 0, "positive number"), number(float, -1e-300, "number from 0 on")
any_float = number(float, -math.inf, "finite number")


def pick_device(dtype: str | None, tiny: bool) -> tuple[str, str]:
    """The device, and the dtype asked for or else its default; both are printed with the reason.

    Tiny networks get one thread on a CPU: the numbers are then the same on any number of cores. Two threads are
    1.4 to 1.6 times as fast on a quiet machine, and many times slower on a busy one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = torch.cuda.get_device_name() if device == "cuda" else "no CUDA device here"
    fast = device == "cuda" and not tiny and torch.cuda.is_bf16_supported(including_emulation=False)
    default = "bfloat16" if fast else "float32"
    threads = ""
    if device == "cpu":
        if tiny and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        threads = f", threads {torch.get_num_threads()} (set OMP_NUM_THREADS to change it)"
    print(f"device {device} ({reason}), dtype {dtype or default} ({'as asked' if dtype else 'the default there'}){threads}")
    return device, dtype or default


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------------------------------------------------
# Command line of this script


def tiny_folder(name: str, homes: list[Path]) -> Path | None:
    """Where the tiny base of this name is or, if it is in none of `homes`, would be; None for the path of a checkpoint."""
    if name.removesuffix("-continued") in TINY_SIZES:
        return next((home / name for home in homes if (home / name).is_dir()), homes[-1] / name)
    if name.startswith("tiny-") and not Path(name).exists():
        raise UsageError(f"{name}: no such tiny model; there are {', '.join(TINY_SIZES)}, and tiny-s-continued and so on")
    return None


def newest_value() -> Path:
    found = sorted(Path("out").glob("**/ivl.json"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if not any(part.endswith(".training") for part in path.parts)]
    if not found:
        raise UsageError("no value network under out/ yet; `python train.py` trains one, in about 2 minutes on two cores")
    return found[-1].parent


def find_base(name: str | None, value: Path, info: dict) -> Path:
    """The folder of the base to guide: as asked, or the one that the value network was trained on."""
    if name is None:
        recorded = Path(info["bases"][0])
        beside = value.parent / recorded.name  # out/ may have been moved as a whole
        return beside if beside.is_dir() and not recorded.is_dir() else recorded
    path = tiny_folder(name, [value.parent, Path(info["bases"][0]).parent])
    if path is not None and not path.is_dir():
        world = world_of(value)
        command = f"python train.py --base {name.removesuffix('-continued')}" + " --continue" * name.endswith("-continued")
        raise UsageError(f"{path}: not there yet; `{command} --seed {world.seed if world else 0}` makes it, in a few minutes")
    return path or Path(name)


def answer(guided: Guided, tokenizer: Tokenizer, template: str, turns: list[Turn], args: argparse.Namespace,
           show: bool = False) -> str:
    """The assistant's next turn; with `show` it is printed as it comes."""
    prompt, _ = encode_chat(tokenizer, template, turns)
    room = min(llama.config.max_position_embeddings for llama in [guided.base, *guided.llamas]) - len(prompt)
    if room < 1:
        raise UsageError(f"the conversation is {len(prompt)} tokens long, and the checkpoint ends at {room + len(prompt)}")
    decoder = StreamDecoder(tokenizer)
    end = end_token(tokenizer, template)
    started = time.monotonic()
    on_token = (lambda _, token: print(decoder.push(token), end="", flush=True)) if show else None
    ids = generate(guided, [prompt], max_new_tokens=min(args.max_new_tokens, room), temperature=args.temperature,
                   top_p=args.top_p, seed=args.seed, stop_ids={end, tokenizer.eos_id}, on_token=on_token)[0]
    if show:
        print(decoder.finish())
        print(f"    {len(ids)} tokens, {len(ids) / (time.monotonic() - started):.1f} tokens/s", file=sys.stderr)
    return tokenizer.decode(ids).strip()


def chat(guided: Guided, tokenizer: Tokenizer, template: str, args: argparse.Namespace) -> None:
    turns: list[Turn] = []
    if sys.stdin is None:
        raise UsageError("--chat reads questions from standard input, which is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print("An empty line begins a new conversation, the end of input (Ctrl-D) leaves.")
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            return print()
        if not question:
            turns = []
            continue
        try:
            said = answer(guided, tokenizer, template, turns + [("user", question)], args, show=True)
        except UsageError as error:
            print(f"({error}; an empty line begins a new one)")
            continue
        turns += [("user", question), ("assistant", said)]


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--value", metavar="FOLDER", help="a value network (default: the newest under out/)")
    parser.add_argument("--base", metavar="B", help="a checkpoint folder or a tiny name (default: the one it was trained on)")
    parser.add_argument("--expert", metavar="FOLDER", help="proxy tuning instead: a small model after post-training")
    parser.add_argument("--anti-expert", metavar="FOLDER",
                        help="the same model before it (default: what the expert's train.json names)")
    parser.add_argument("--template", choices=TEMPLATES, help="chat template of the expert (a value network records its own)")
    parser.add_argument("--alpha", type=any_float, default=1.0, help="weight of z_delta; 0 is the base alone (default 1)")
    parser.add_argument("--vocab-map", metavar="FILE", help="a map between base and value network of different tokenizers, by "
                        "vocab_map.py (default: made on the spot, from the tokenizers alone)")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="questions to answer, each by the base alone and guided")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="N", help="per answer (default 256)")
    parser.add_argument("--temperature", type=non_negative_float, default=0.0,
                        help="0 is greedy (default)")
    parser.add_argument("--top-p", type=positive_float, default=1.0,
                        help="sample from the likeliest tokens that make up this share")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and computation")
    args = parser.parse_args()
    if args.chat and args.prompt:
        parser.error("--chat and --prompt are two ways to ask; choose one")
    if args.expert and args.value:
        parser.error("--expert and --value are two ways to guide; choose one")
    if not args.expert and (args.anti_expert or args.template):
        parser.error("--anti-expert and --template go with --expert")
    if args.top_p > 1:
        parser.error("--top-p is a share, at most 1")
    for text in args.prompt or []:
        if not is_unicode(text):
            parser.error("--prompt is not UTF-8")
    return args


def read_expert(args: argparse.Namespace) -> dict:
    """What a value network's ivl.json would say of proxy tuning, with the anti-expert in place of its base."""
    expert = Path(args.expert)
    if (expert / "ivl.json").exists():
        raise UsageError(f"--expert {expert}: a value network, which is plugged in with --value")
    record = read_json(expert / "train.json") if (expert / "train.json").is_file() else {}
    untuned = [args.anti_expert] if args.anti_expert else record.get("bases")
    if not isinstance(untuned, list) or not untuned or not isinstance(untuned[0], str):
        raise UsageError(f"--expert {expert}: it does not record what it was tuned from; name that with --anti-expert")
    template = args.template or record.get("template") or default_template(load_tokenizer(expert))
    if template not in TEMPLATES:
        raise UsageError(f"{expert}/train.json: template {template!r} is not supported; choose one with --template")
    return {"bases": untuned, "template": template}


def choose_map(args: argparse.Namespace, base: Tokenizer, value: Tokenizer, info: dict) -> VocabMap | None:
    """The vocabulary map that was asked for, or one made from the tokenizers where they are unrelated."""
    if not args.vocab_map and is_same_family(base, value):
        return None
    scheme = info.get("scheme", "residual")
    if scheme != "residual":
        raise UsageError(f"a value network of scheme {scheme} reads the base's logits over its own vocabulary, so it has no use "
                         "for a base with another tokenizer; a residual one has")
    if args.vocab_map:
        return VocabMap.load(args.vocab_map, base, value)
    print("the base has another tokenizer than the value network: made a vocabulary map from the two (vocab_map.py)", flush=True)
    return build(base, value)


def main():
    args = parse_arguments()
    if args.expert:
        value_path, info = Path(args.expert), read_expert(args)
    else:
        value_path = newest_value() if args.value is None else Path(args.value)
        info = read_info(value_path)
    own_path = find_base(None, value_path, info)
    base_path = find_base(args.base, value_path, info) if args.base else own_path
    if (base_path / "ivl.json").exists():
        raise UsageError(f"--base {base_path}: a value network, which is no base")
    plugs = [value_path, own_path] if args.expert else [value_path]  # what z_delta is made of
    tokenizers = [load_tokenizer(path) for path in [base_path, *plugs]]
    if not args.expert:
        check_recorded(tokenizers[1], info, str(value_path))
    for path, other in zip(plugs, tokenizers[1:]):
        check_same_family(tokenizers[1], other, str(value_path), str(path))
    tokenizer = min(tokenizers[1:], key=lambda each: each.vocab_size)  # what all can read
    vocab_map = choose_map(args, tokenizers[0], tokenizer, info)
    if vocab_map is None:
        tokenizer = min(tokenizer, tokenizers[0], key=lambda each: each.vocab_size)
    world = world_of(base_path)
    if not (world or args.chat or args.prompt):
        raise UsageError("this base is not from the tiny world, which brings its own questions; ask with --prompt or --chat")
    device, dtype = pick_device(args.dtype, tiny=world is not None)
    dtype = getattr(torch, dtype)
    print(f"base {base_path}, " + (f"proxy tuning by {value_path} less {own_path}" if args.expert else
                                   f"value network {value_path} ({info['scheme']})"))

    def guide(path: Path, value: ValueModel | ProxyDelta, vocab_map: VocabMap | None = None) -> Guided:
        base = Llama.from_pretrained(path, dtype, device)
        if isinstance(value, ValueModel) and value.scheme == "probe" and base.config.vocab_size < value.vocab_size:
            raise UsageError(f"{path}: {base.config.vocab_size} logits, and the probe reads {value.vocab_size}")
        guided = Guided(base, value, vocab_map, args.alpha)
        guided.readable = min(guided.readable, tokenizer.vocab_size)
        return guided

    if args.expert:
        value = ProxyDelta(*(Llama.from_pretrained(path, dtype, device) for path in plugs))
    else:
        value = ValueModel.from_pretrained(value_path, dtype, device)
    guided = guide(base_path, value, vocab_map)
    name, template = base_path.name, info["template"]
    if args.chat:
        return chat(guided, tokenizer, template, args)
    alone, own = Guided(guided.base), tokenizers[0] if vocab_map else tokenizer
    alone.readable = min(alone.readable, own.vocab_size) if vocab_map else guided.readable
    plug = "proxy" if args.expert else "value"
    systems = {f"{name} alone": (alone, own), f"{name} + {plug}": (guided, tokenizer)}
    if args.prompt:
        for text in args.prompt:
            print(f"\n{text}")
            for label, (system, reads) in systems.items():
                fitting = template if template == "llama-2" or reads.kind == "tiktoken" else default_template(reads)
                print(f"    {label:{len(name) + 10}}{answer(system, reads, fitting, [('user', text)], args)}")
        return
    if own_path.resolve() != base_path.resolve() and own_path.is_dir():  # show what the bigger base adds
        systems = {f"{name} alone": (alone, own), f"{own_path.name} + {plug}": (guide(own_path, value), tokenizer),
                   f"{name} + {plug}": (guided, tokenizer)}
    show_world(world, systems)


if __name__ == "__main__":
    run_cli(main)
