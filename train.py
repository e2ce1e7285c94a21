"""Pretrain a tiny base, fine-tune a base in full, or train a value network on a frozen base.

    python train.py                                        # the same as: python train.py --base --value
    python train.py --base tiny-l                          # pretrain a bigger base, to plug the value network into
    python train.py --base PATH --value --data chats.json  # on a real checkpoint in the Hugging Face layout

All three are one loop, `fit`. They differ in what is fed, and in whether a frozen base speaks along.
A run works in OUT.training, which holds its settings and its newest checkpoint; when it has ended, the finished
folder appears as OUT by one rename.
"""

import argparse
import fcntl
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.chat import TEMPLATES, ChatDataset, chat_batches, collate, default_template, hold_out
from data.tiny_world import TINY_SIZES, World
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from ivl import ValueModel, check_same_family, describe_tokenizer, ivl_loss, supervised_logits
from model import Llama, LlamaConfig, read_config
from sample import (ArgumentParser, Guided, UsageError, clock, examine, pick_device, positive_float, positive_int,
                    print_metrics, run_cli, world_of)

# ---------------------------------------------------------------------------------------------------------
# Sizes and settings


@dataclass(frozen=True)
class Settings:
    """How one network is trained. Saved with the run; a resumed run must have the same."""

    job: str  # "pretrain", "full" or "value"
    bases: list[str]  # the frozen bases, the steps split evenly between them; [] for pretraining
    start: str  # where the trained network's first weights come from
    data: str  # "tiny-world", or a data file
    data_bytes: int  # its size, so that another file under the same name is noticed
    template: str
    seed: int
    dtype: str
    steps: int
    batch_size: int  # samples that make one step, over all its parts
    grad_accum: int  # parts that a step's batch is split into, to save memory; the gradient is the same
    max_length: int
    lr: float
    warmup: float = 0.04  # Table 5's warm-up ratio
    floor: float = 0.0  # the share of lr at which the cosine ends
    weight_decay: float = 0.01  # the authors' scripts
    betas: tuple[float, float] = (0.9, 0.999)
    l1: float = 0.0  # lambda of Section 4.2.1


PRETRAINING_LENGTH = 64  # tokens a row
TINY = dict(floor=0.1, betas=(0.9, 0.98))
TINY_POST = TINY | dict(steps=500, batch_size=32, lr=1e-3)


def table5(parameters: int) -> dict:
    """Table 5, whose columns are the trained network's size; 3B stands between them."""
    return dict(epochs=3, batch_size=32, lr=1e-4) if parameters < 3e9 else dict(epochs=3, batch_size=16, lr=1e-5)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine from lr down to floor * lr; step counts from 0."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * done)) / 2)


# ---------------------------------------------------------------------------------------------------------
# The folder of a run


class Run:
    """OUT, the finished folder, and OUT.training, where the run lives until then.

    OUT.training holds a lock, settings.json and one step-N folder, the newest checkpoint: state.safetensors, state.json.
    Whatever appears does so by one atomic rename, so a reader never meets half of anything.
    """

    def __init__(self, out: Path, settings: Settings, resume: bool):
        self.out, self.work, self.settings = out, out.with_name(out.name + ".training"), settings
        if self.out.exists() and not self.finished and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UsageError(f"{out}: exists, and is no run of train.py; choose another --out")
        if self.work.exists() and not (self.work / "lock").exists() and any(self.work.iterdir()):
            raise UsageError(f"{self.work}: exists, and is no run of train.py; choose another --out")
        if self.finished:
            check_same_settings(out / "train.json", settings, resume)
            shutil.rmtree(self.work, ignore_errors=True)  # a kill between the last rename and this line left it
            return
        saved = self.work / "settings.json"
        self.going_on = saved.exists() and (resume or self.checkpoints())  # without a checkpoint there is nothing to lose
        if self.going_on:
            check_same_settings(saved, settings, resume)

    def begin(self) -> None:
        """Take the folder, once everything else is known to be in order; a start that fails leaves nothing behind."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.work / "lock", "w")  # held until this process ends, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.work}: another process is training there") from None
        if not self.going_on:
            (self.work / "settings.new").write_text(json.dumps(vars(self.settings), indent=2) + "\n")
            (self.work / "settings.new").rename(self.work / "settings.json")
        for path in self.work.glob("*.tmp"):  # what a kill left half-written
            shutil.rmtree(path)

    @property
    def finished(self) -> bool:
        return (self.out / "train.json").is_file()

    def checkpoints(self) -> list[Path]:
        """Oldest first; more than one only if a kill came between the rename and the removal."""
        return sorted(self.work.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, network: Llama, optimizer: torch.optim.AdamW, state: dict) -> None:
        """Publish a checkpoint, then drop the older ones."""
        tensors = {}
        for name, parameter in network.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq") if parameter in optimizer.state else ():
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        temporary, older = self.work / "step.tmp", self.checkpoints()
        temporary.mkdir()
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state) + "\n")
        temporary.rename(self.work / f"step-{state['step']}")
        for path in older:
            shutil.rmtree(path)

    def restore(self, network: Llama, optimizer: torch.optim.AdamW) -> dict | None:
        """Put the newest checkpoint back and return its state; None if there is none yet."""
        if not (found := self.checkpoints()):
            return None
        for path in found[:-1]:
            shutil.rmtree(path)
        try:
            state = json.loads((found[-1] / "state.json").read_text())
            tensors = load_file(found[-1] / "state.safetensors", device=str(network.device))
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(f"{found[-1]}: unreadable ({error}); delete it to start over") from None
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
                    steps = torch.tensor(float(state["step"]), device=parameter.device)
                    optimizer.state[parameter] = {"step": steps} | moments
        return state

    def publish(self, network: Llama, tokenizer: Tokenizer, info: dict | None, metrics: dict | None) -> None:
        """Write the finished folder and rename it to OUT. With `info`, it is a value network's."""
        final = self.work / "final.tmp"
        (ValueModel(network, info) if info else network).save_pretrained(final)
        (final / "tokenizer.model").write_bytes(tokenizer.model)
        (final / "train.json").write_text(json.dumps(vars(self.settings), indent=2) + "\n")
        if metrics:
            (final / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        final.rename(self.out)
        shutil.rmtree(self.work)
        print(f"saved {self.out}")


def check_same_settings(file: Path, settings: Settings, resume: bool) -> None:
    """Refuse to touch the run whose settings are in `file`, unless it is to be resumed and has the same."""
    state, advice = (("finished", "choose another --out or --seed") if file.name == "train.json"
                     else ("unfinished", "go on with --resume"))
    if not resume:
        raise UsageError(f"{file.parent}: a run is there already, {state}; {advice}, or delete the folder")
    try:
        found = dict(json.loads(file.read_text()))
    except ValueError:
        raise UsageError(f"{file}: not what train.py writes there") from None
    wanted = json.loads(json.dumps(vars(settings)))
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise UsageError(f"{file.parent}: --resume with other settings: {name} was {found.get(name)!r}, "
                             f"now {wanted.get(name)!r}")


# ---------------------------------------------------------------------------------------------------------
# The loop


def fit(run: Run, network: Llama, bases: list[Llama], batches: Callable, save_every: int) -> None:
    """Train `network` for settings.steps steps. With frozen bases it is a value network; without, an ordinary model.

    batches(position) yields, from a position on (None: the start), the position behind each step and the step's parts:
    pairs of tokens (B, T) and labels (B, T), shifted, -100 where not supervised.
    """
    settings = run.settings
    device, dtype = network.device, getattr(torch, settings.dtype)
    for base in bases:
        base.requires_grad_(False)
    matrices = [parameter for parameter in network.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() < 2]  # norms are not decayed
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], betas=settings.betas, fused=True)
    state = run.restore(network, optimizer) or {"step": 0, "position": None}
    if state["step"]:
        print(f"resumed at step {state['step']}")
    stream = batches(state["position"])
    upcoming = next(stream)  # shows that the data can be used
    run.begin()
    started, first, reported, tokens_seen = time.monotonic(), state["step"], 0.0, 0
    for step in range(state["step"], settings.steps):
        position, parts = upcoming if step == first else next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        base = bases[step * len(bases) // settings.steps] if bases else None  # several: a curriculum
        metrics = accumulate_gradient(network, base, parts, settings.l1, device, dtype)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if not (math.isfinite(metrics["loss"]) and torch.isfinite(norm)):
            kept = run.checkpoints()
            raise UsageError(f"step {step + 1}: the loss is {metrics['loss']}, its gradient's norm {norm.item()}; stopped. "
                             + (f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was written yet")
                             + "; try a smaller --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += sum(tokens.numel() for tokens, _ in parts)
        state = {"step": step + 1, "position": position}
        last = step + 1 == settings.steps
        if (step + 1) % save_every == 0 and not last:
            run.save(network, optimizer, state)
        elapsed = time.monotonic() - started
        if elapsed - reported > 2 or last or step == first:
            reported = elapsed
            left = elapsed / (step + 1 - first) * (settings.steps - step - 1)
            shown = [("loss", "loss")] + [("ce", "ce"), ("l1", "|z_delta|"), ("base_ce", "base ce")] * bool(bases)
            print(f"step {step + 1:5d}/{settings.steps}  " + "  ".join(f"{label} {metrics[key]:.3f}" for key, label in shown)
                  + f"  {tokens_seen / elapsed / 1000:.1f}k tokens/s  {clock(left)} left", flush=True)


def accumulate_gradient(network: Llama, base: Llama | None, parts: list[tuple[Tensor, Tensor]], l1: float,
                        device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Leave in .grad the gradient of the mean over all supervised tokens of a step, however it is split in parts."""
    total = sum(int((labels != -100).sum()) for _, labels in parts)
    sums: dict[str, float] = {}
    for tokens, labels in parts:
        tokens, labels = tokens.to(device), labels.to(device)
        supervised = labels != -100  # (B, T)
        share = int(supervised.sum()) / total
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                z_base = None if base is None else supervised_logits(base, tokens, supervised)  # (N, Vb)
            z_delta = supervised_logits(network, tokens, supervised)  # (N, Vv)
        loss, metrics = ivl_loss(z_base, z_delta, labels[supervised], l1)
        (loss * share).backward()
        for name, value in (metrics | {"loss": loss}).items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
    return sums


@torch.no_grad()
def held_out_ce(network: Llama, base: Llama | None, dataset: ChatDataset, indices: list[int]) -> float | None:
    """Mean cross-entropy in nats over the supervised tokens of some conversations; None when none of them fits."""
    total, count = 0.0, 0
    for sample in filter(None, map(dataset.sample, indices)):
        tokens, labels = (tensor.to(network.device) for tensor in collate([sample]))
        supervised = labels != -100
        z_base = None if base is None else supervised_logits(base, tokens, supervised)
        _, metrics = ivl_loss(z_base, supervised_logits(network, tokens, supervised), labels[supervised])
        total, count = total + metrics["ce"].item() * int(supervised.sum()), count + int(supervised.sum())
    return total / count if count else None


# ---------------------------------------------------------------------------------------------------------
# Jobs


@dataclass
class Workplace:
    """What every job of this process shares."""

    home: Path  # where tiny things live: out/seed0
    seed: int
    resume: bool
    save_every: int
    device: str
    dtype: str


def ensure_base(name: str, place: Workplace) -> Path:
    """The folder of a base; a tiny one that is not there yet is pretrained first, and kept."""
    if name in TINY_SIZES:
        if not (place.home / name / "train.json").is_file():
            pretrain(name, place.home / name, place)
        return place.home / name
    if name.startswith("tiny-") and not Path(name).exists():
        raise UsageError(f"{name}: no such tiny model; there are {', '.join(TINY_SIZES)}")
    return Path(name)


def tiny_config(name: str, tokenizer: Tokenizer) -> LlamaConfig:
    (width, layers, heads, kv_heads, hidden), _, _ = TINY_SIZES[name]
    return LlamaConfig(tokenizer.vocab_size, width, hidden, layers, heads, kv_heads, max_position_embeddings=256,
                       tie_word_embeddings=True, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def fresh(config: LlamaConfig, place: Workplace) -> Llama:
    torch.manual_seed(place.seed)
    return Llama(config).to(place.device)


def pretrain(name: str, out: Path, place: Workplace, flags: dict | None = None) -> None:
    """Train a tiny base from nothing on the tiny world's text."""
    _, tokens, lr = TINY_SIZES[name]
    chosen = TINY | dict(lr=lr, batch_size=32, max_length=PRETRAINING_LENGTH, grad_accum=1, weight_decay=0.05) | (flags or {})
    chosen.setdefault("steps", tokens // (chosen["batch_size"] * chosen["max_length"]))
    settings = Settings(job="pretrain", bases=[], start=f"scratch:{name}", data="tiny-world", data_bytes=0, template="",
                        seed=place.seed, dtype=place.dtype, **chosen)
    run = Run(out, settings, place.resume)
    if run.finished:
        return print(f"{out}: finished already")
    world = World(place.seed)
    tokenizer = SentencePieceTokenizer(world.train_tokenizer())
    network = fresh(tiny_config(name, tokenizer), place)
    print(f"pretraining {name}, {count_parameters(network)}, on {settings.steps * settings.batch_size * settings.max_length:,} "
          f"tokens of tiny world {place.seed} -> {out}", flush=True)
    fit(run, network, [], lambda position: world.batches(tokenizer, settings.steps, settings.batch_size, settings.grad_accum,
                                                         settings.max_length, position), place.save_every)
    run.publish(network, tokenizer, None, {"base": examine(Guided(network), world, tokenizer)})


def choose_network(start: str, bases: list[Path]) -> tuple[LlamaConfig, list[LlamaConfig], Tokenizer]:
    """The configuration of the network to train, those of the bases, and the tokenizer that all of them can read.

    `start` is a folder, or scratch (the first base's architecture) or scratch:NAME (a tiny one's).
    """
    configs, tokenizers = [read_config(path) for path in bases], [load_tokenizer(path) for path in bases]
    scratch, _, size = start.partition(":")
    if scratch != "scratch":
        tokenizer, config = load_tokenizer(start), read_config(start)
    elif size and size not in TINY_SIZES:
        raise UsageError(f"--value {start}: scratch, or scratch: and one of {', '.join(TINY_SIZES)}")
    else:
        tokenizer, config = tokenizers[0], tiny_config(size, tokenizers[0]) if size else configs[0]
    for other, path in zip(tokenizers, bases):
        check_same_family(other, tokenizer, str(path), start)
    tokenizer = min([tokenizer, *tokenizers], key=lambda each: each.vocab_size)
    for each, path in zip([config, *configs], [start, *bases]):
        if tokenizer.vocab_size > each.vocab_size:
            raise UsageError(f"{path}: {each.vocab_size} rows in lm_head, but its tokenizer has {tokenizer.vocab_size} tokens")
    return config, configs, tokenizer


def post_train(job: str, bases: list[Path], start: str, out: Path, place: Workplace, data: str | None,
               template: str | None, flags: dict, full: Path | None = None) -> None:
    """Fine-tune a copy of the first base in full, or train a value network on the frozen bases; then measure.

    `start` is as in choose_network; `full` is a finished full fine-tuning to stand in the table.
    """
    config, configs, tokenizer = choose_network(start, bases)
    world = None if data else common_world(bases)
    if world:
        data = str(world.write_demonstrations(place.home / "demonstrations.jsonl"))
    template = template or default_template(tokenizer)
    longest = min(each.max_position_embeddings for each in [config, *configs])
    max_length = flags.pop("max_length", min(4096, longest))  # Table 5
    if max_length > longest:
        raise UsageError(f"--max-length {max_length}: the checkpoint was made for {longest} tokens")
    dataset = ChatDataset(data, tokenizer, template, max_length)
    train_on, held_out = (list(range(len(dataset))), []) if world else hold_out(dataset, place.seed)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Llama(config).parameters())
    chosen = dict(grad_accum=1) | (TINY_POST if world else table5(parameters)) | flags
    epochs = chosen.pop("epochs", None)
    if epochs and "steps" not in flags:
        chosen["steps"] = max(1, round(epochs * math.ceil(len(train_on) / chosen["batch_size"])))
    settings = Settings(job=job, bases=[str(path) for path in bases], start=start, data="tiny-world" if world else data,
                        data_bytes=dataset.path.stat().st_size, template=template, seed=place.seed, dtype=place.dtype,
                        max_length=max_length, **chosen)
    run = Run(out, settings, place.resume)
    if run.finished:
        print(f"{out}: finished already")
        return print_metrics(json.loads((out / "metrics.json").read_text()))

    network = (fresh(config, place) if start.startswith("scratch")
               else Llama.from_pretrained(start, torch.float32, place.device))
    frozen = [Llama.from_pretrained(path, getattr(torch, place.dtype), place.device) for path in bases]
    what = "a value network" if job == "value" else "in full"
    print(f"training {what}, {count_parameters(network)}, from {start}, on {dataset.report()} -> {out}", flush=True)
    fit(run, network, frozen if job == "value" else [], lambda position: chat_batches(
        dataset, train_on, settings.batch_size, settings.grad_accum, settings.seed, position), place.save_every)
    print(dataset.report())
    name, base = ("base+value", frozen[0]) if job == "value" else ("full", None)
    if world:
        metrics = measure_in_world(world, tokenizer, dict(zip([path.name for path in bases], frozen)), network, name, full)
    else:
        metrics = {"base": {"ce": held_out_ce(frozen[0], None, dataset, held_out)},
                   name: {"ce": held_out_ce(network, base, dataset, held_out)}}
    info = {"scheme": "residual", "l1": settings.l1, "template": template, "bases": settings.bases,
            "data": settings.data, "seed": place.seed, "steps": settings.steps, "tokenizer": describe_tokenizer(tokenizer)}
    run.publish(network, tokenizer, info if job == "value" else None, metrics)
    print_metrics(metrics)


def measure_in_world(world: World, tokenizer: Tokenizer, bases: dict[str, Llama], network: Llama, name: str,
                     full: Path | None) -> dict[str, dict[str, float]]:
    """Development metrics of base, full and base+value; of a curriculum's later bases under their own names."""
    first, *later = bases
    metrics = {"base": examine(Guided(bases[first]), world, tokenizer)}
    if name == "full":
        return metrics | {"full": examine(Guided(network), world, tokenizer)}
    if full:
        metrics["full"] = json.loads((full / "metrics.json").read_text())["full"]
    value = ValueModel(network)
    metrics["base+value"] = examine(Guided(bases[first], value), world, tokenizer)
    for other in later:
        metrics[other] = examine(Guided(bases[other]), world, tokenizer)
        metrics[f"{other}+value"] = examine(Guided(bases[other], value), world, tokenizer)
    return metrics


def common_world(bases: list[Path]) -> World:
    """The tiny world that all bases come from."""
    worlds = [world_of(path) for path in bases]
    for world, path in zip(worlds, bases):
        if world is None:
            raise UsageError(f"{path}: no tiny base, so it takes --data FILE with conversations to train on")
        if world.seed != worlds[0].seed:
            raise UsageError(f"{path}: from tiny world {world.seed}, {bases[0]} from {worlds[0].seed}")
    return worlds[0]


def count_parameters(network: Llama) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}M parameters"


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], epilog="With no flags: --base --value.")
    what = parser.add_argument_group("what to train")
    what.add_argument("--base", nargs="*", metavar="B", help="frozen bases in turn: tiny-s, tiny-m, tiny-l or checkpoint folders "
                      "(default tiny-s); alone: pretrain these tiny bases")
    what.add_argument("--value", nargs="?", const="", metavar="V", help="train a value network; it starts as a copy of the first "
                      "base, or from a folder, a tiny name, scratch, or scratch:tiny-m")
    what.add_argument("--full", action="store_true", help="fine-tune the base itself instead, in full")
    what.add_argument("--no-full", action="store_true", help="leave full fine-tuning out of the tiny world's table")
    what.add_argument("--scheme", choices=["residual"], default="residual", help="how base and value network connect")
    what.add_argument("--l1", type=lambda text: positive_float(text, zero=True), default=0.0, metavar="LAMBDA",
                      help="weight of the norm of z_delta (default 0; 1.0 in the paper's norm rows)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", help="conversations, .json or .jsonl (default for tiny bases: the tiny world's)")
    data.add_argument("--template", choices=TEMPLATES, help="chat template (default: from the tokenizer's kind)")
    data.add_argument("--max-length", type=positive_int, metavar="N", help="tokens per conversation (default 4096 or the checkpoint's)")
    how = parser.add_argument_group("how to train (defaults: Table 5's for a checkpoint, our own for tiny ones)")
    how.add_argument("--lr", type=positive_float, help="peak learning rate")
    how.add_argument("--epochs", type=positive_float, help="passes over the data")
    how.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    how.add_argument("--batch-size", type=positive_int, metavar="N", help="conversations (pretraining: rows) per step, all parts together")
    how.add_argument("--grad-accum", type=positive_int, metavar="N", help="split each step's batch into N parts to save memory")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the computation; trained weights stay float32")
    how.add_argument("--seed", type=lambda text: positive_int(text, zero=True), default=0, help="of everything random")
    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", metavar="FOLDER", help="the finished folder (default under out/seedN)")
    where.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the same run")
    where.add_argument("--save-every", type=positive_int, default=200, metavar="N", help="steps between checkpoints (default 200)")
    args = parser.parse_args()
    if args.base is None and args.value is None and not args.full:
        args.value = ""
    if args.full and args.value is not None:
        parser.error("--full fine-tunes the base, --value a value network on it; choose one")
    if args.epochs and args.steps:
        parser.error("--epochs and --steps say the same thing; choose one")
    return args


def main():
    args = parse_arguments()
    names = args.base or ["tiny-s"]
    device, dtype = pick_device(args.dtype, tiny=all(name in TINY_SIZES or world_of(name) for name in names))
    place = Workplace(Path("out") / f"seed{args.seed}", args.seed, args.resume, args.save_every, device, dtype)
    flags = {name: getattr(args, name) for name in ["lr", "epochs", "steps", "batch_size", "grad_accum", "max_length"]
             if getattr(args, name) is not None}
    if args.value is None and not args.full:
        for name in names:
            if name not in TINY_SIZES and not name.startswith("tiny-"):
                raise UsageError(f"--base {name} alone: nothing to train on a checkpoint; add --value or --full, and --data")
        if "epochs" in flags or args.data:
            raise UsageError("pretraining a tiny base takes --steps, and makes its own data")
        if args.out and len(names) > 1:
            raise UsageError("--out names one folder, and there are several bases to pretrain")
        for name in names:
            if name not in TINY_SIZES:
                ensure_base(name, place)
            pretrain(name, Path(args.out) if args.out else place.home / name, place, flags)
    else:
        bases = [ensure_base(name, place) for name in names]
        if args.full:
            if len(bases) > 1:
                raise UsageError("--full fine-tunes one base")
            out = Path(args.out) if args.out else place.home / f"full-{bases[0].name}"
            post_train("full", bases, str(bases[0]), out, place, args.data, args.template, flags)
        else:
            train_value(args, bases, place, flags)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(each.ru_utime + each.ru_stime for each in usage):.0f} core-seconds")


def train_value(args: argparse.Namespace, bases: list[Path], place: Workplace, flags: dict) -> None:
    start = str(bases[0]) if args.value == "" else args.value
    if not start.startswith("scratch"):
        start = str(ensure_base(start, place))
    # value-residual-tiny-s: scheme, then the first weights; what differs from the default is added.
    parts = ["value", args.scheme, Path(start).name.replace(":", "-")]
    if [start] != [str(path) for path in bases]:
        parts += ["on", *(path.name for path in bases)]
    if args.l1:
        parts += [f"l1-{args.l1:g}"]
    out = Path(args.out) if args.out else place.home / "-".join(parts)
    full = None
    if not args.data and not args.no_full and world_of(bases[0]):
        full = bases[0].parent / f"full-{bases[0].name}"
        if not (full / "train.json").is_file():
            post_train("full", bases[:1], str(bases[0]), full, place, None, None, {})
    post_train("value", bases, start, out, place, args.data, args.template, flags | {"l1": args.l1}, full)


if __name__ == "__main__":
    run_cli(main)
