"""Pretrain a tiny base, fine-tune a base in full, or train a value network on a frozen base.

    python train.py                                        # the same as: python train.py --base --value
    python train.py --base tiny-l                          # pretrain a bigger base, to plug the value network into
    python train.py --base --value --scheme cascade+       # another way to connect the two (Section 4.1)
    python train.py --base tiny-s tiny-m --value           # a curriculum of bases (Table 2)
    python train.py --base PATH --value --data chats.json  # on a real checkpoint in the Hugging Face layout
    torchrun --nproc_per_node=8 train.py --base PATH --value --data chats.json  # on eight GPUs; --shard divides the weights

All three are one loop, `fit`. They differ in what is fed, and in whether a frozen base's logits are added.
A run works in OUT.training, which holds its settings and its newest checkpoint; when it has ended, the finished
folder appears as OUT by one rename.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from data.chat import TEMPLATES, ChatDataset, chat_batches, collate, default_template, hold_out
from data.cli import (ArgumentParser, UsageError, clock, non_negative_float, non_negative_int, number, pick_device,
                      positive_float, positive_int, run_cli)
from data.tiny_world import MARKERS, PIECES, TEMPLATE, TINY_SIZES, World, add_pieces, print_metrics, world_of
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from ivl import SCHEMES, Probe, ValueModel, check_same_family, describe_tokenizer, ivl_loss_from_hidden, read_info
from model import Llama, LlamaConfig, read_config, read_json
from sample import Guided, examine, tiny_folder

# ---------------------------------------------------------------------------------------------------------
# Sizes and settings


@dataclass(frozen=True)
class Settings:
    """How one network is trained. Saved with the run; a resumed run must have the same."""

    job: str  # "pretrain", "full" or "value"
    bases: list[str]  # the frozen bases, the steps split evenly between them; [] for pretraining
    start: str  # where the trained network's first weights come from
    scheme: str  # of a value network, else ""
    probe_width: int  # of scheme probe, else 0
    data: str  # "tiny-world 0", its seed included, or a data file
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


PRETRAINING_LENGTH, TINY_LIMIT = 64, 256  # tokens a row; tokens that a tiny network is made for
TINY = dict(floor=0.1, betas=(0.9, 0.98), grad_accum=1)
TINY_POST = TINY | dict(steps=500, batch_size=32, lr=1e-3)
TINY_CONTINUED = TINY | dict(batch_size=32, lr=2e-3, weight_decay=0.05, steps=390)  # 0.8M tokens
PROBE_WIDTH = 256  # 0.8M weights on 1024 logits, 25M on 32000


def table5(parameters: int) -> dict:
    """Table 5, whose columns are the trained network's size; 3B stands between them. One conversation at a time."""
    column = dict(batch_size=32, lr=1e-4) if parameters < 3e9 else dict(batch_size=16, lr=1e-5)
    return column | dict(epochs=3, grad_accum=column["batch_size"])


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
    Checkpoints and OUT appear by one atomic rename each, so a reader never meets half of one.
    """

    def __init__(self, out: Path, settings: Settings, resume: bool):
        self.out, self.settings = out, settings
        if out.exists() and not self.finished and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: exists, and is no run of train.py; choose another --out")
        self.work = out.with_name(out.name + ".training")
        saved = self.work / "settings.json"
        for path in (out, self.work):
            if path.is_symlink():
                raise UsageError(f"{path}: a symbolic link; give the folder itself as --out")
        ours = re.compile(r"lock|settings\.(json|new)|step-\d+|step\.tmp|final\.tmp")
        if self.work.exists() and (not all(ours.fullmatch(path.name) for path in self.work.iterdir())
                                   or self.checkpoints() and not saved.exists() and not self.finished):
            raise UsageError(f"{self.work}: exists, and is no run of train.py; choose another --out")
        if self.finished:
            check_same_settings(out / "train.json", settings, resume)
            shutil.rmtree(self.work, ignore_errors=True)  # a kill between the last rename and the removal left it
            return
        self.has_settings = saved.exists() and (resume or bool(self.checkpoints()))  # no checkpoint: nothing to lose
        if self.has_settings:
            check_same_settings(saved, settings, resume)

    @property
    def finished(self) -> bool:
        return (self.out / "train.json").is_file()

    def checkpoints(self) -> list[Path]:
        """Oldest first; more than one only if a kill came between the rename and the removal."""
        return sorted(self.work.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def begin(self) -> None:
        """Take the folder, once everything else is known to be in order; a start that fails leaves nothing behind."""
        first_does(self.take)

    def take(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.work / "lock", "w")  # held until this process ends, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.work}: another process is training there") from None
        if not self.has_settings:
            (self.work / "settings.new").write_text(json.dumps(vars(self.settings), indent=2) + "\n")
            (self.work / "settings.new").rename(self.work / "settings.json")
        for path in [*self.work.glob("*.tmp"), *self.checkpoints()[:-1]]:  # what a kill left behind
            shutil.rmtree(path)

    def save(self, network: Llama | ValueModel, optimizer: torch.optim.AdamW, state: dict) -> None:
        """Publish a checkpoint, then drop the older ones."""
        tensors = {}
        for name, parameter in network.named_parameters():
            tensors[f"weight.{name}"] = whole(parameter)
            for moment in ("exp_avg", "exp_avg_sq") if parameter in optimizer.state else ():
                tensors[f"{moment}.{name}"] = whole(optimizer.state[parameter][moment])
        first_does(lambda: self.write_checkpoint(tensors, state))

    def write_checkpoint(self, tensors: dict[str, Tensor], state: dict) -> None:
        temporary, older = self.work / "step.tmp", self.checkpoints()
        temporary.mkdir()
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state) + "\n")
        temporary.rename(self.work / f"step-{state['step']}")
        for path in older:
            shutil.rmtree(path)

    def restore(self, network: Llama | ValueModel, optimizer: torch.optim.AdamW) -> dict:
        """Put the newest checkpoint back, if there is one, and return how far it came: step and position in the data."""
        if not (found := self.checkpoints()):
            return {"step": 0, "position": None}
        try:
            state = read_json(found[-1] / "state.json")
            tensors = load_file(found[-1] / "state.safetensors", device="cpu" if is_sharded(network) else str(network.device))
            if not 0 < state["step"] < self.settings.steps or not all(type(each) is int for each in state["position"]):
                raise ValueError("not of this run")
            for name, parameter in network.named_parameters():
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    if kind == "weight" or f"exp_avg.{name}" in tensors:
                        tensors[f"{kind}.{name}"].view_as(parameter)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{found[-1]}: unreadable ({error}); delete it to start over") from None
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(divided_like(tensors[f"weight.{name}"], parameter))
                if f"exp_avg.{name}" in tensors:
                    optimizer.state[parameter] = {"step": torch.tensor(float(state["step"]), device=parameter.device)} | {
                        moment: divided_like(tensors[f"{moment}.{name}"], parameter) for moment in ("exp_avg", "exp_avg_sq")}
        print(f"resumed at step {state['step']}")
        return state

    def publish(self, network: Llama | ValueModel, tokenizer: Tokenizer, start: str, metrics: dict) -> None:
        """Write the finished folder and rename it to OUT."""
        first_does(lambda: self.write_final(network, tokenizer, start, metrics))
        print(f"saved {self.out}")

    def write_final(self, network: Llama | ValueModel, tokenizer: Tokenizer, start: str, metrics: dict) -> None:
        final = self.work / "final.tmp"
        network.save_pretrained(final)
        (final / "tokenizer.model").write_bytes(tokenizer.model)
        for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:  # for other programs
            if not is_scratch(start) and (Path(start) / name).is_file() and load_tokenizer(start).model == tokenizer.model:
                shutil.copy(Path(start) / name, final)
        (final / "train.json").write_text(json.dumps(vars(self.settings), indent=2) + "\n")
        (final / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        final.rename(self.out)
        shutil.rmtree(self.work)


def check_same_settings(file: Path, settings: Settings, resume: bool) -> None:
    """Refuse to touch the run whose settings are in `file`, unless it is to be resumed and has the same."""
    state, advice = (("finished", "choose another --out or --seed") if file.name == "train.json"
                     else ("unfinished", "go on with --resume"))
    if not resume:
        raise UsageError(f"{file.parent}: a run is there already, {state}; {advice}, or delete the folder")
    found = read_json(file)
    wanted = json.loads(json.dumps(vars(settings)))
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise UsageError(f"{file.parent}: a run with other settings is there: {name} was {found.get(name)!r}, now "
                             f"{wanted.get(name)!r}; choose another --out, or delete the folder"
                             + ", or leave the comparison out with --no-full" * (settings.job == "full"))


# ---------------------------------------------------------------------------------------------------------
# Several processes, one for each GPU
#
# Every process reads the same batches and computes its own share of their parts. With DistributedDataParallel each
# holds the whole network, and gradients are averaged; with --shard (fully_shard, FSDP2) each holds a slice of every
# weight, gradient and moment, and of the frozen base's weights, and a layer is put together just before it computes.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes() -> None:
    """Under torchrun: meet the other processes, take a GPU of one's own, and leave the talking to the first."""
    if "LOCAL_RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=12))
    if rank():
        sys.stdout = open(os.devnull, "w")


def first_does(action: Callable[[], None]) -> None:
    """The first process acts, the others wait; if it fails, all fail."""
    if processes() == 1:
        return action()
    dist.barrier()  # nobody is still looking at the files
    failure = [None]
    if rank() == 0:
        try:
            action()
        except (UsageError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise UsageError(failure[0])


def share_out(network: Llama | ValueModel, l1: float, shard: bool, dtype: str) -> nn.Module:
    """The Objective of a network, set up for as many processes as there are."""
    objective = Objective(network, l1)
    if shard:
        halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return divide(objective, mp_policy=halved if dtype == "bfloat16" else MixedPrecisionPolicy())
    if processes() > 1:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    return objective


def divide(module: nn.Module, **policy) -> nn.Module:
    """Shard a module in place, layer by layer; the embedding, the head and the rest belong to the module itself."""
    for layers in [each for each in module.modules() if isinstance(each, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, **policy)
    fully_shard(module, reshard_after_forward=False, **policy)  # the loss reads lm_head's weight after the forward pass
    if isinstance(module, Llama):
        register_fsdp_forward_method(module, "hidden_and_head")
    return module


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the slices of all processes; all of them have to ask."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's slice of a whole tensor, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def undivided(network: Llama | ValueModel) -> Llama | ValueModel:
    """The network as a single process has it: itself, or put together in every process from all slices."""
    if not is_sharded(network):
        return network
    inner = network.network if isinstance(network, ValueModel) else network
    with torch.device("meta"):
        plain = Llama(inner.config) if isinstance(inner, Llama) else Probe(inner.vocab_size, inner.gate_proj.out_features)
    plain.load_state_dict({name: whole(tensor) for name, tensor in inner.state_dict().items()}, assign=True)
    if isinstance(plain, Llama):
        plain.tie()
    return ValueModel(plain, network.info) if isinstance(network, ValueModel) else plain


# ---------------------------------------------------------------------------------------------------------
# The loop


class Objective(nn.Module):
    """The loss of a network as a module's forward pass, which is where both ways to use several processes step in."""

    def __init__(self, network: Llama | ValueModel, l1: float):
        super().__init__()
        self.network, self.l1 = network, l1

    def forward(self, base: Llama | None, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ivl_loss returns, of a value network on a base or of an ordinary model alone; tokens and labels (B, T)."""
        if isinstance(self.network, ValueModel):
            return self.network.loss(base, tokens, labels, self.l1)
        return ivl_loss_from_hidden(None, None, *self.network.hidden_and_head(tokens), labels)


def fit(run: Run, network: Llama | ValueModel, bases: list[Llama], batches: Callable, args: argparse.Namespace) -> nn.Module:
    """Train `network` for settings.steps steps: a value network on frozen bases, or an ordinary model without.

    batches(position, parts) yields, from a position on (None: the start), the position behind each step and the step's
    parts: pairs of tokens (B, T) and labels (B, T), shifted, -100 where not supervised. Returns the Objective.
    """
    settings = run.settings
    for base in bases:
        base.requires_grad_(False)
    for llama in network.llamas if isinstance(network, ValueModel) else [network]:
        llama.model.gradient_checkpointing = args.gradient_checkpointing
    objective = share_out(network, settings.l1, args.shard, settings.dtype)
    matrices = [parameter for parameter in network.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() < 2]  # norms are not decayed
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], betas=settings.betas, fused=True)
    if run.has_settings:
        run.begin()  # before a checkpoint is read that another process may be replacing
    state = run.restore(network, optimizer)
    stream = batches(state["position"], settings.grad_accum * processes())
    stream = itertools.chain([next(stream)], stream)  # the first batch shows that the data can be used
    if not run.has_settings:
        run.begin()
    started, first, reported, tokens_seen = time.monotonic(), state["step"], 0.0, 0
    for step, (position, parts) in zip(range(first, settings.steps), stream):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        base = bases[step * len(bases) // settings.steps] if bases else None  # several: a curriculum
        metrics = accumulate_gradient(objective, base, parts, settings.dtype)
        norm = whole(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        if not (math.isfinite(metrics["loss"]) and torch.isfinite(norm)):
            kept = run.checkpoints()
            raise UsageError(f"step {step + 1}: the loss is {metrics['loss']}, its gradient's norm {norm.item()}; stopped. "
                             + (f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was written yet")
                             + "; a smaller --lr may do, in another --out")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += sum(tokens.numel() for tokens, _ in parts)  # padding included
        last = step + 1 == settings.steps
        if (step + 1) % args.save_every == 0 and not last:
            run.save(network, optimizer, {"step": step + 1, "position": position})
        elapsed = time.monotonic() - started
        if elapsed - reported > 2 or last or step == first:
            reported = elapsed
            left = elapsed / (step + 1 - first) * (settings.steps - step - 1)
            shown = {"loss": "loss"} | ({"ce": "ce", "l1": "|z_delta|", "base_ce": "base ce"} if bases else {})
            print(f"step {step + 1:5d}/{settings.steps}  " + "  ".join(f"{shown[key]} {metrics[key]:.3f}" for key in shown)
                  + f"  {tokens_seen / elapsed / 1000:.1f}k tokens/s  {clock(left)} left", flush=True)
    return objective


def compute_loss(objective: nn.Module, base: Llama | None, tokens: Tensor, labels: Tensor, dtype: str
                 ) -> tuple[Tensor, dict[str, Tensor]]:
    """The Objective of tokens (B, T) and labels (B, T), moved to the device and computed in dtype."""
    device = next(objective.parameters()).device
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return objective(base, tokens.to(device), labels.to(device))


def accumulate_gradient(objective: nn.Module, base: Llama | None, parts: list[tuple[Tensor, Tensor]], dtype: str
                        ) -> dict[str, float]:
    """Leave in .grad the gradient of the mean over all supervised tokens of a step, however it is split in parts.

    Process r of K takes parts r, r + K, r + 2K, ..., made up with parts of no supervised token so that all have the same number.
    """
    total = sum(int((labels != -100).sum()) for _, labels in parts)
    blank = parts[0][0], torch.full_like(parts[0][1], -100)
    mine = (parts + [blank] * (-len(parts) % processes()))[rank()::processes()]
    sums: dict[str, float] = {}
    for done, (tokens, labels) in enumerate(mine, 1):
        share = int((labels != -100).sum()) / total
        unfinished = done < len(mine) and isinstance(objective, DistributedDataParallel)
        with objective.no_sync() if unfinished else contextlib.nullcontext():  # gradients are averaged once a step
            loss, metrics = compute_loss(objective, base, tokens, labels, dtype)
            (loss * (share * processes())).backward()  # the others' mean over all processes takes processes() back
        for name, value in (metrics | {"loss": loss}).items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
    if processes() > 1:
        summed = torch.tensor(list(sums.values()), dtype=torch.float64, device=loss.device)
        dist.all_reduce(summed)
        sums = dict(zip(sums, summed.tolist()))
    return sums


@torch.no_grad()
def held_out_ce(objective: nn.Module, base: Llama | None, dataset: ChatDataset, indices: list[int], dtype: str) -> float | None:
    """Mean cross-entropy in nats over the supervised tokens of some conversations; None when none of them fits."""
    total, count = 0.0, 0
    for sample in filter(None, map(dataset.sample, indices)):
        tokens, labels = collate([sample])
        here = int((labels != -100).sum())
        total += compute_loss(objective, base, tokens, labels, dtype)[1]["ce"].item() * here
        count += here
    return total / count if count else None


# ---------------------------------------------------------------------------------------------------------
# Jobs


def tiny_config(name: str, tokenizer: Tokenizer) -> LlamaConfig:
    (width, layers, heads, kv_heads, hidden), _, _ = TINY_SIZES[name]
    return LlamaConfig(tokenizer.vocab_size, width, hidden, layers, heads, kv_heads, max_position_embeddings=TINY_LIMIT,
                       tie_word_embeddings=True, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def fresh(build: Callable[[], nn.Module], args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    return build().to(args.device)


def find_base(name: str, args: argparse.Namespace) -> Path:
    """The folder of a base; a tiny one that is not there yet is pretrained first, and kept."""
    path = tiny_folder(name, [args.home])
    if path is None:
        return with_a_name(name)
    if not (path / "train.json").is_file():
        if name in TINY_SIZES:
            pretrain(name, path, args, {})
        else:
            continue_pretraining(find_base(name.removesuffix("-continued"), args), path, args, {})
    return path


def with_a_name(path: str) -> Path:
    """Its last part names the run, so "." and ".." are spelled out."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()


def pretrain(name: str, out: Path, args: argparse.Namespace, flags: dict) -> None:
    """Train a tiny base from nothing on the tiny world's text."""
    _, tokens, lr = TINY_SIZES[name]
    chosen = TINY | dict(lr=lr, batch_size=32, max_length=PRETRAINING_LENGTH, weight_decay=0.05) | flags
    chosen.setdefault("steps", max(1, tokens // (chosen["batch_size"] * chosen["max_length"])))
    world = World(args.seed)
    run = pretraining_run(f"scratch:{name}", world, out, args, chosen)
    if not run.finished:
        tokenizer = world.tokenizer_for(name)
        run_pretraining(run, fresh(lambda: Llama(tiny_config(name, tokenizer)), args), tokenizer, world, args, False)


def continue_pretraining(start: Path, out: Path, args: argparse.Namespace, flags: dict) -> None:
    """Train a tiny base further, on text about new people, its vocabulary extended as CodeLlama's extends Llama-2's."""
    world, tokenizer = common_world([start]), load_tokenizer(start)
    if tokenizer.vocab_size != PIECES:
        raise UsageError(f"--continue {start}: continued already")
    run = pretraining_run(str(start), world, out, args, TINY_CONTINUED | dict(max_length=PRETRAINING_LENGTH) | flags)
    if not run.finished:
        torch.manual_seed(args.seed)
        network = widen(Llama.from_pretrained(start, torch.float32, args.device), len(MARKERS))
        tokenizer = SentencePieceTokenizer(add_pieces(tokenizer.model, MARKERS))
        run_pretraining(run, network, tokenizer, world, args, True)


def widen(base: Llama, rows: int) -> Llama:
    """A copy of a base with `rows` more tokens, whose embeddings begin at the mean of all others."""
    wider = Llama(dataclasses.replace(base.config, vocab_size=base.config.vocab_size + rows)).to(base.device)
    weights = base.state_dict()
    for name, tensor in wider.state_dict().items():  # these share memory with the parameters
        old = weights[name]
        tensor[:len(old)] = old
        tensor[len(old):] = old.mean(0) if len(tensor) > len(old) else 0
    return wider


def pretraining_run(start: str, world: World, out: Path, args: argparse.Namespace, chosen: dict) -> Run:
    if chosen["max_length"] > TINY_LIMIT:
        raise UsageError(f"--max-length {chosen['max_length']}: a tiny network is made for {TINY_LIMIT} tokens")
    settings = Settings(job="pretrain", bases=[], start=start, scheme="", probe_width=0, data=f"tiny-world {world.seed}",
                        data_bytes=0, template="", seed=args.seed, dtype=args.dtype, **chosen)
    run = Run(out, settings, args.resume)
    if run.finished:
        print(f"{out}: finished already")
    return run


def run_pretraining(run: Run, network: Llama, tokenizer: Tokenizer, world: World, args: argparse.Namespace, continued: bool
                    ) -> None:
    settings = run.settings
    print(f"pretraining {run.out.name}, {millions(network)}, on {settings.steps * settings.batch_size * settings.max_length:,} "
          f"tokens of tiny world {world.seed} -> {run.out}", flush=True)
    fit(run, network, [], lambda position, parts: world.batches(tokenizer, settings.steps, settings.batch_size, parts,
                                                                settings.max_length, position, continued), args)
    network = undivided(network)
    metrics = {"base": examine(Guided(network), world, tokenizer)} if rank() == 0 else {}
    run.publish(network, tokenizer, settings.start, metrics)


def choose_network(start: str, bases: list[Path], scheme: str, probe_width: int
                   ) -> tuple[Callable[[], nn.Module], int, Tokenizer]:
    """How to build the network to train, the most tokens a conversation may have, and the tokenizer.

    `start` is a folder, or scratch (the first base's architecture) or scratch:NAME (a tiny one's).
    """
    configs, tokenizers = [read_config(path) for path in bases], [load_tokenizer(path) for path in bases]
    _, _, size = start.partition(":")
    own_tokenizer = tokenizers[0] if is_scratch(start) else load_tokenizer(start)
    for other, path in zip(tokenizers, bases):
        check_same_family(other, own_tokenizer, str(path), start)
    tokenizer = min([own_tokenizer, *tokenizers], key=lambda each: each.vocab_size)  # what all of them can read
    if scheme == "probe":
        build = functools.partial(Probe, tokenizer.vocab_size, probe_width)
    else:
        if not is_scratch(start):
            config = read_config(start)
        elif size and size not in TINY_SIZES:
            raise UsageError(f"--value {start}: scratch, or scratch: and one of {', '.join(TINY_SIZES)}")
        else:
            config = tiny_config(size, tokenizers[0]) if size else configs[0]
        build = functools.partial(Llama, config)
        configs, bases = [config, *configs], [start, *bases]
    for config, path in zip(configs, bases):
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(f"{path}: {config.vocab_size} rows in lm_head, but its tokenizer has {tokenizer.vocab_size} tokens")
    return build, min(config.max_position_embeddings for config in configs), tokenizer


def is_scratch(start: str) -> bool:
    return start.partition(":")[0] == "scratch"


def post_training_flags(build: Callable[[], nn.Module], tiny: bool, flags: dict, conversations: int) -> dict:
    """What was asked for over what is usual for this network, with epochs turned into steps."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    chosen = (TINY_POST if tiny else table5(parameters)) | flags
    epochs = chosen.pop("epochs", None)
    if epochs and "steps" not in flags:
        chosen["steps"] = max(1, round(epochs * math.ceil(conversations / chosen["batch_size"])))
    return chosen


def post_train(scheme: str, bases: list[Path], start: str, out: Path, args: argparse.Namespace, data: str | None, flags: dict,
               full: Path | None = None, keep: bool = False) -> None:
    """Train a value network on the frozen bases or, with no scheme, fine-tune a copy of the first in full; then measure.

    `full` is a finished full fine-tuning to stand in the table; `keep` is content with a finished run of these settings.
    """
    width = args.probe_width if scheme == "probe" else 0
    build, longest, tokenizer = choose_network(start, bases, scheme, width)
    tiny, world = all(world_of(path) for path in bases), None
    if data is None:
        world = common_world(bases)
        data = str(world.write_demonstrations(Path("out") / f"seed{world.seed}" / "demonstrations.jsonl"))
    max_length = flags.get("max_length", min(4096, longest))  # Table 5
    if max_length > longest:
        raise UsageError(f"--max-length {max_length}: the checkpoint was made for {longest} tokens")
    template = args.template or (TEMPLATE if world else default_template(tokenizer))
    dataset = ChatDataset(data, tokenizer, template, max_length)
    train_on, held_out = (list(range(len(dataset))), []) if world else hold_out(dataset, args.seed)
    chosen = post_training_flags(build, tiny, flags, len(train_on)) | dict(max_length=max_length)
    settings = Settings(job="value" if scheme else "full", bases=[str(path) for path in bases], start=start, scheme=scheme,
                        probe_width=width, template=template, seed=args.seed,
                        data=f"tiny-world {world.seed}" if world else data, data_bytes=dataset.path.stat().st_size,
                        dtype=args.dtype, **chosen)
    run = Run(out, settings, args.resume or keep and (out / "train.json").exists())
    if run.finished:
        if not keep:
            print(f"{out}: finished already")
            print_metrics(read_metrics(out))
        return
    full_metrics = {"full": read_metrics(full, "full")["full"]} if full else {}

    if is_scratch(start):
        network = fresh(build, args)
    elif scheme == "probe":
        network = ValueModel.from_pretrained(start, torch.float32, args.device).network
    else:
        network = Llama.from_pretrained(start, torch.float32, args.device)
    if scheme:
        network = ValueModel(network, {
            "scheme": scheme, "l1": settings.l1, "template": template, "bases": settings.bases, "data": settings.data,
            "seed": args.seed, "steps": settings.steps, "tokenizer": describe_tokenizer(tokenizer)}
            | ({"probe_width": width} if width else {}))
    frozen = {path: load_frozen(path, args) for path in bases}
    what = f"a value network ({scheme})" if scheme else "in full"
    print(f"training {what}, {millions(network)}, from {start}, on {dataset.report()} -> {out}", flush=True)
    objective = fit(run, network, [frozen[path] for path in bases] if scheme else [], lambda position, parts: chat_batches(
        dataset, train_on, settings.batch_size, parts, settings.seed, position), args)
    network = undivided(network)
    if not world:
        print(dataset.report())  # by now it is known what was too long

    def measure(path: Path | None, trained: bool) -> dict[str, float | None]:
        """Of the base in `path` with or without the value network, or of the fine-tuned model alone (no path)."""
        if world:
            base = undivided(frozen[path]) if path else network
            guided = Guided(base, network if path and trained else None)
            return examine(guided, world, tokenizer) if rank() == 0 else {}
        what, base = (objective, frozen.get(path)) if trained else (Objective(frozen[path], 0.0), None)
        return {"ce": held_out_ce(what, base, dataset, held_out, args.dtype)}

    metrics = {"base": measure(bases[0], False)}
    if not scheme:
        metrics["full"] = measure(None, True)
    else:
        metrics |= full_metrics | {"base+value": measure(bases[0], True)}
        for path in bases[1:]:  # a curriculum's later bases, under their own names
            metrics |= {path.name: measure(path, False), f"{path.name}+value": measure(path, True)}
    run.publish(network, tokenizer, start, metrics)
    if rank() == 0:
        print_metrics(metrics)


def load_frozen(path: Path, args: argparse.Namespace) -> Llama:
    """A base; with --shard it goes from the file into the slices layer by layer, and is never whole on a GPU."""
    base = Llama.from_pretrained(path, getattr(torch, args.dtype), "cpu" if args.shard else args.device)
    return divide(base.requires_grad_(False)) if args.shard else base


def read_metrics(folder: Path, system: str = "base") -> dict[str, dict[str, float | None]]:
    """What a finished folder's metrics.json says: system -> metric -> value."""
    systems = read_json(folder / "metrics.json")
    names = [list(metrics) if isinstance(metrics, dict) else [] for metrics in systems.values()]
    if system not in systems or not names[0] or any(each != names[0] for each in names) or not all(
            value is None or isinstance(value, (int, float)) for metrics in systems.values() for value in metrics.values()):
        raise UsageError(f"{folder}/metrics.json: not what train.py writes there; delete the folder and train again")
    return systems


def common_world(bases: list[Path]) -> World:
    """The tiny world that all bases come from."""
    worlds = [world_of(path) for path in bases]
    for world, path in zip(worlds, bases):
        if world is None:
            raise UsageError(f"{path}: no tiny base, so it takes --data FILE with conversations to train on")
        if world.seed != worlds[0].seed:
            raise UsageError(f"{path}: from tiny world {world.seed}, {bases[0]} from {worlds[0].seed}")
    return worlds[0]


def millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}M parameters"


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], epilog="With no flags: --base --value.")
    what = parser.add_argument_group("what to train")
    what.add_argument("--base", nargs="*", metavar="B", help="frozen bases in turn: tiny-s, tiny-m, tiny-l or checkpoint "
                      "folders (default tiny-s); alone: pretrain these tiny bases")
    what.add_argument("--value", nargs="?", const="", metavar="V", help="train a value network; it starts as a copy of the "
                      "first base, or from a folder, a tiny name, scratch, or scratch:tiny-m")
    what.add_argument("--full", action="store_true", help="fine-tune the base itself instead, in full")
    what.add_argument("--no-full", action="store_true", help="leave full fine-tuning out of the tiny world's table")
    what.add_argument("--scheme", choices=SCHEMES, help="how base and value network connect (default residual)")
    what.add_argument("--probe-width", type=positive_int, metavar="N",
                      help=f"inner width of --scheme probe (default {PROBE_WIDTH})")
    what.add_argument("--continue", action="store_true", dest="continued", help="pretrain tiny bases further, on new people "
                      "and with 16 more tokens, as CodeLlama continues Llama-2")
    what.add_argument("--l1", type=non_negative_float, default=0.0, metavar="LAMBDA",
                      help="weight of the norm of z_delta (default 0; 1.0 in the paper's norm rows)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", help="conversations, .json or .jsonl (default: the tiny world's)")
    data.add_argument("--template", choices=TEMPLATES, help="chat template (default: from the tokenizer's kind)")
    data.add_argument("--max-length", type=positive_int, metavar="N", help="tokens per conversation (default at most 4096)")
    how = parser.add_argument_group("how to train (defaults: Table 5's for a checkpoint, our own for tiny ones)")
    how.add_argument("--lr", type=positive_float, help="peak learning rate")
    how.add_argument("--epochs", type=number(float, 0, "positive number up to 10000", 10_001), help="passes over the data")
    how.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    how.add_argument("--batch-size", type=positive_int, metavar="N", help="conversations or rows per step, all parts together")
    how.add_argument("--grad-accum", type=positive_int, metavar="N", help="split a step's batch into N parts to save memory")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the computation; trained weights stay float32")
    how.add_argument("--seed", type=non_negative_int, default=0, help="of everything random (default 0)")
    how.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="compute layers twice instead of "
                     "keeping what they computed: less memory, a third more time (default: for checkpoints yes, tiny ones no)")
    how.add_argument("--shard", action="store_true", help="with torchrun: divide weights, gradients and moments, also the "
                     "bases', between the processes (FSDP2), instead of keeping them whole in each (DDP)")
    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", metavar="FOLDER", help="the finished folder (default under out/seedN)")
    where.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the same run")
    where.add_argument("--save-every", type=positive_int, default=200, metavar="N", help="steps between checkpoints (200)")
    args = parser.parse_args()
    if args.base is None and args.value is None and not args.full:
        args.value = ""
    args.job = "full" if args.full else "pretrain" if args.value is None else "value"
    if args.full and args.value is not None:
        parser.error("--full fine-tunes the base, --value a value network on it; choose one")
    if args.epochs and args.steps:
        parser.error("--epochs and --steps say the same thing; choose one")
    value_only = ["l1", "no_full", "scheme", "probe_width"]
    unused = {"full": value_only + ["continued"], "pretrain": value_only + ["data", "template", "epochs"],
              "value": ["continued"]}[args.job]
    if given := [name for name in unused if getattr(args, name)]:
        doing = {"full": "fine-tuning in full", "pretrain": "pretraining a base", "value": "training a value network"}
        parser.error(f"--{given[0].replace('_', '-').replace('continued', 'continue')} means nothing when {doing[args.job]}")
    return args


def main():
    args = parse_arguments()
    names = args.base or ["tiny-s"]
    join_processes()
    tiny = all(is_tiny(name) for name in names)
    args.device, args.dtype = pick_device(args.dtype, tiny)
    if args.device == "cuda" and dist.is_initialized():
        args.device = f"cuda:{torch.cuda.current_device()}"  # safetensors takes plain "cuda" for the first one
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = not tiny
    if args.shard and not dist.is_initialized():
        raise UsageError("--shard divides the weights between processes; start them with torchrun --nproc_per_node=N")
    args.home = Path("out") / f"seed{args.seed}"  # where tiny things live
    out = None if args.out is None else with_a_name(args.out)
    if len(names) > 1 and args.job == "pretrain" and out:
        raise UsageError("--out names one folder, and there are several bases to pretrain")
    if len(names) > 1 and args.job == "full":
        raise UsageError("--full fine-tunes one base")
    flags = {name: getattr(args, name) for name in ["lr", "epochs", "steps", "batch_size", "grad_accum", "max_length"]
             if getattr(args, name) is not None}
    if args.job == "pretrain":
        pretrain_all(names, out, args, flags)
    else:
        bases = [find_base(name, args) for name in names]
        for path in bases:
            if (path / "ivl.json").exists():
                raise UsageError(f"--base {path}: a value network, which is no base; --value trains one further")
        full = args.home / f"full-{bases[0].name}"
        if args.job == "full":
            post_train("", bases, str(bases[0]), out or full, args, args.data, flags)
        else:
            scheme, start = choose_scheme(args, bases)
            compare = not args.data and not args.no_full
            if compare:
                post_train("", bases[:1], str(bases[0]), full, args, None, {}, keep=True)
            post_train(scheme, bases, start, out or args.home / value_name(scheme, args, bases, start), args, args.data,
                       flags | {"l1": args.l1}, full if compare else None)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{sum(each.ru_utime + each.ru_stime for each in usage):.0f} core-seconds")
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # DTensor's caches keep gloo's threads, and one that is still busy when Python ends would abort it


def is_tiny(name: str) -> bool:
    return name.removesuffix("-continued") in TINY_SIZES or world_of(name) is not None


def pretrain_all(names: list[str], out: Path | None, args: argparse.Namespace, flags: dict) -> None:
    for name in names:
        if not is_tiny(name) or name not in TINY_SIZES and not args.continued:
            tiny_folder(name, [args.home])  # refuses an unknown tiny name
            raise UsageError(f"--base {name} alone: nothing to train on a checkpoint; add --value or --full, and --data")
    for name in names:
        if args.continued:
            start = find_base(name, args)
            continue_pretraining(start, out or args.home / f"{start.name}-continued", args, flags)
        else:
            pretrain(name, out or args.home / name, args, flags)


def choose_scheme(args: argparse.Namespace, bases: list[Path]) -> tuple[str, str]:
    """The scheme, and where the value network's first weights come from; what is trained further keeps its scheme."""
    start = args.value if not args.value or is_scratch(args.value) else str(find_base(args.value, args))
    info = read_info(Path(start)) if start and (Path(start) / "ivl.json").is_file() else {}
    scheme = args.scheme or info.get("scheme", "residual")
    if scheme != info.get("scheme", scheme):
        raise UsageError(f"--scheme {scheme}: {start} was trained as {info['scheme']}, and is trained further as that")
    if scheme == "probe" and start and not info:
        raise UsageError(f"--scheme probe: there is nothing in {start} for a probe to start from; --value takes no name here")
    if args.probe_width and (scheme != "probe" or info):
        raise UsageError("--probe-width means nothing but for a new --scheme probe")
    args.probe_width = info.get("probe_width") or args.probe_width or PROBE_WIDTH
    return scheme, start or ("scratch" if scheme == "probe" else str(bases[0]))


def value_name(scheme: str, args: argparse.Namespace, bases: list[Path], start: str) -> str:
    """value-residual-tiny-s: the scheme and the first weights; what differs from the default is added."""
    parts = ["value", scheme]
    if scheme == "probe" and is_scratch(start):
        parts += [*(path.name for path in bases)] + [f"width-{args.probe_width}"] * (args.probe_width != PROBE_WIDTH)
    else:
        parts += [Path(start).name.replace(":", "-")]
        if [start] != [str(path) for path in bases]:
            parts += ["on", *(path.name for path in bases)]
    return "-".join(parts + [f"l1-{args.l1:g}"] * bool(args.l1))


if __name__ == "__main__":
    run_cli(main)
