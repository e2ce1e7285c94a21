"""Pretrain a tiny base, fine-tune a base in full, or train a value network on a frozen base.

    python train.py                                        # the same as: --base --value
    python train.py --base tiny-l                          # pretrain a bigger base, to plug into
    python train.py --base --value --scheme cascade+       # another way to connect (Section 4.1)
    python train.py --base tiny-s tiny-m --value           # a curriculum of bases (Table 2)
    python train.py --base --value --loss pairwise         # pairs instead of demonstrations (3.1)
    python train.py --base --value V --loss reward         # sampled answers, and what each earns
    python train.py --base --value --with A                # made for a base that A guides already
    python train.py --base PATH --value --data chats.json  # on a checkpoint of Hugging Face's kind
    torchrun --nproc_per_node=8 train.py --base PATH --value --data chats.json  # on eight GPUs

All three are one loop, `fit`. They differ in the first weights, in the loss, and in whether there
is a frozen base. Begin at the end, with `train_value`.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.chat import ChatDataset, Sample, stop_ids, with_mask
from data.tiny_world import print_metrics
from data.tokenizer import Tokenizer
from ivl import Loss, PluggedBase, Probe, SumDelta, ValueModel, at_least_float
from model import Llama
from sample import Guided, generate

# Tokens (B, T) and labels (B, T), as `collate` makes them; of sampled answers also rewards (Q, G).
Part = tuple[Tensor, ...]
Questions = list[tuple[list[int], int]]  # of each the prompt, and its number in the data

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """How one network is trained. Saved with the run; a resumed run must have the same."""

    job: str  # "pretrain", "full" or "value"
    bases: list[str]  # the frozen bases, the steps split evenly between them; [] for pretraining
    start: str  # where the trained network's first weights come from
    scheme: str  # of a value network, else ""
    probe_width: int  # of scheme probe, else 0
    data: str  # "tiny-world 0" or "capitals 0", its seed included, or a data file
    data_hash: str  # of its content, so that another file under the same name is noticed
    template: str
    seed: int
    dtype: str
    steps: int
    batch_size: int  # conversations, pairs (two rows each), questions or rows of text of a step
    grad_accum: int  # parts of it in each process, to save memory; the gradient is the same
    max_length: int
    lr: float
    warmup: float = 0.04  # Table 5's warm-up ratio
    floor: float = 0.0  # the share of lr at which the cosine ends
    weight_decay: float = 0.01  # the authors' scripts
    betas: tuple[float, float] = (0.9, 0.999)
    l1: float = 0.0  # lambda of Section 4.2.1
    l1_over: str = "supervised"  # the positions that the norm is a mean of, or "all" in a batch
    # or "pairwise", with a beta; "kl", with a teacher and a temperature (3.1); "reward"
    loss: str = "ce"
    beta: float = 0.0
    teacher: str = ""
    temperature: float = 0.0
    base_hashes: tuple[str, ...] = ()  # of the bases' weights, and the teacher's
    held_out: int = 0  # conversations that are measured on and not trained on
    system: str = ""  # a system prompt for conversations that have none
    reasoning: str = ""  # "drop": what was thought before an answer is left out of the data
    answers: int = 0  # of loss "reward": answers to a question, and the tokens one may have
    answer_length: int = 0
    plugged: tuple[str, ...] = ()  # value networks that guide the bases already


PRETRAINING_LENGTH = 64  # tokens a row
TINY = dict(floor=0.1, betas=(0.9, 0.98), grad_accum=1)
TINY_PRETRAINING = TINY | dict(batch_size=16, max_length=PRETRAINING_LENGTH, weight_decay=0.05)
TINY_POST_TRAINING = TINY | dict(steps=500, batch_size=32, lr=1e-3)
TINY_PAIRS = TINY | dict(steps=400, batch_size=16, lr=5e-4)
# of a value network: as much as above would undo what it knows
TINY_PAIRS_LATER = TINY_PAIRS | dict(steps=200, lr=1e-4)
TINY_REWARDS = TINY | dict(steps=100, batch_size=16, lr=3e-4)
PROBE_WIDTH = 256  # 0.8M weights on 1024 logits, 25M on 32000


def table5(parameters: int) -> dict:
    """Table 5, whose two columns are the trained network's size, 1.1B and 7B.

    One conversation a part.
    """
    if parameters < 3e9:
        return dict(epochs=3, batch_size=32, grad_accum=32, lr=1e-4)
    return dict(epochs=3, batch_size=16, grad_accum=16, lr=1e-5)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine from lr down to floor * lr; step counts from 0."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return settings.lr * (settings.floor + (1 - settings.floor) * cosine)


# --------------------------------------------------------------------------------------------------
# The loop


class OneProcess:
    """What the loop asks of processes that train together. Here is one; run/processes.py has more."""

    rank, count, shard = 0, 1, False

    def share_out(self, objective: "Objective", dtype: str) -> nn.Module:
        """The objective, with its weights where the processes keep them."""
        return objective

    def divide_base(self, base: Llama) -> Llama:
        """A frozen base, where the processes keep it."""
        return base

    def mine(self, parts: list[Part]) -> list[Part]:
        """The parts of a step that this process computes."""
        return parts

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """Numbers summed over processes."""
        return numbers

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may hold a slice."""
        return tensor.detach()

    def undivided(self, network: nn.Module) -> nn.Module:
        """The network as a single process has it."""
        return network


class Run(Protocol):
    """Where a network lives while it is trained: a folder with checkpoints and a log.

    run/folder.py has the one there is. It says more of each.
    """

    settings: Settings
    processes: OneProcess
    save_every: int  # steps between checkpoints
    begin: Callable  # network, optimizer, batches -> the first step to do, the batches from there
    check_finite: Callable  # step, metrics, norm: UsageError where one of them is no number
    save: Callable  # network, optimizer, state: write a checkpoint
    report: Callable  # step, metrics, tokens: say how it goes
    check_weights: Callable  # network: UsageError where a weight is no number
    publish: Callable  # network, tokenizer, metrics: write the finished folder


class Objective(nn.Module):
    """A network and its loss as one module: its forward pass is where several processes step in."""

    def __init__(self, network: nn.Module, loss: Callable):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, base: Llama | PluggedBase | None, *part: Tensor) -> Loss:
        return self.loss(self.network, base, *part)


def fit(
    network: nn.Module,
    loss: Callable,
    bases: list[Llama | PluggedBase],
    batches: Callable,
    run: Run,
    answer: Callable | None = None,
) -> nn.Module:
    """Train a network for settings.steps steps: a value network on frozen bases, or one without.

    loss(network, base, tokens (B, T), labels (B, T)) is what is minimised; base is None where there
    is none. batches(position) begins at a position in the data (None: the start), and yields for
    each step the position behind it, where a stopped run goes on, and rows. With answer(network,
    base, position, questions) it yields Questions, of which that makes parts. Returns the
    Objective.
    """
    settings, processes = run.settings, run.processes
    objective = processes.share_out(Objective(network, loss), settings.dtype)
    counts = {"pairwise": count_answer_pairs, "reward": count_answers}
    count = counts.get(settings.loss, count_supervised)
    optimizer = make_optimizer(network, settings)
    first, stream = run.begin(network, optimizer, batches)  # step 0, or where a stopped run goes on
    for step, (position, rows) in zip(range(first, settings.steps), stream):
        # several bases are a curriculum: as many steps on each, in their order (Table 2)
        base = bases[step * len(bases) // settings.steps] if bases else None
        if answer is None:
            together = 2 if settings.loss == "pairwise" else 1
            parts = make_parts(rows, settings.grad_accum * processes.count, together)
        else:  # rewards are of answers that the guided base gives as it is now
            parts = answer(network, base, position, rows)
        # Dropout drops here and nowhere else; a resumed run drops what it would have dropped
        objective.train()
        torch.manual_seed(settings.seed * settings.steps + step)
        # the learning rate of this step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        # the gradient of the whole batch, clipped to norm 1
        metrics = accumulate_gradient(objective, base, parts, settings.dtype, processes, count)
        norm = processes.whole(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        # what is no number must not reach the weights
        run.check_finite(step, metrics, norm.item())
        # one step of AdamW
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # a checkpoint now and then, and a line about how it goes
        if (step + 1) % run.save_every == 0 and step + 1 < settings.steps:
            run.save(network, optimizer, {"step": step + 1, "position": position})
        run.report(step, metrics, sum(tokens.numel() for tokens, *_ in parts))
    run.check_weights(network)
    return objective.eval()


def make_parts(rows: list[Sample], count: int, together: int = 1) -> list[Part]:
    """Rows in `count` parts; so many stay together in one, such as the two rows of a pair."""
    size = together * -(-len(rows) // (together * count))
    return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]


def collate(rows: list[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) padded on the right, and labels (B, T): token t + 1, or -100.

    A row is token ids, and for each whether it is supervised: text is, and of conversations only
    answers and their ends (data/chat.py, with_mask).
    """
    length = max(len(ids) for ids, _ in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for row, (ids, supervised) in enumerate(rows):
        ids, supervised = torch.tensor(ids), torch.tensor(supervised)
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, : len(ids) - 1] = ids[1:].masked_fill(~supervised[1:], -100)  # shift, and mask
    return tokens, labels


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; the weights of norms, which are vectors, do not decay."""
    matrices = [weight for weight in network.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in network.parameters() if weight.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def count_supervised(labels: Tensor) -> int:
    return int((labels != -100).sum())


def count_answer_pairs(labels: Tensor) -> int:
    """Pairs in rows chosen, rejected, chosen, ... One without a label only pads: not counted."""
    return int((labels[::2] != -100).any(1).sum())


def count_answers(labels: Tensor) -> int:
    return int((labels != -100).any(1).sum())


def accumulate_gradient(
    objective: nn.Module,
    base: Llama | None,
    parts: list[Part],
    dtype: str,
    processes: OneProcess = OneProcess(),
    count: Callable = count_supervised,
) -> dict[str, float]:
    """Leave in .grad the gradient of the mean over all that a step's loss counts.

    That mean does not depend on how the step is split into parts. `count` says how much of a part's
    labels counts: supervised tokens, pairs or answers. (A norm over "all" positions is split
    otherwise: of each part it weighs as much as its supervised tokens.) Returns the means of the
    metrics, and of the loss.
    """
    total = sum(count(part[1]) for part in parts)
    sums: dict[str, Tensor] = defaultdict(float)
    for part in processes.mine(parts):
        share = count(part[1]) / total
        loss, metrics = compute_loss(objective, base, part, dtype)
        # Several processes end with the mean of their gradients, where the sum is meant.
        (loss * share * processes.count).backward()
        for name, value in (metrics | {"loss": loss}).items():
            sums[name] += value.detach().float() * share
    # numbers are asked for once a step, since a GPU waits for each answer
    return processes.sum({name: total.item() for name, total in sums.items()})


def compute_loss(objective: nn.Module, base: Llama | None, part: Part, dtype: str) -> Loss:
    """The Objective of a part, moved to the device, computed in dtype."""
    device = next(objective.parameters()).device
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return objective(base, *(tensor.to(device) for tensor in part))


def sample_answers(
    job: "Job",
    network: ValueModel,
    base: Llama | PluggedBase,
    position: list[int],
    asked: Questions,
) -> list[Part]:
    """Parts to train on: G sampled answers to each question, by the guided base as it is now.

    What is drawn depends on the seed and the position in the data, so a resumed run draws the same.
    Several processes draw all answers in each, and share out the parts.
    """
    settings, tokenizer = job.settings, job.tokenizer
    G, guided = settings.answers, guide(base, network)
    prompts = []
    for prompt, _ in asked:
        prompts += [prompt] * G
    answers = generate(
        guided,
        prompts,
        max_new_tokens=settings.answer_length,
        stop_ids=stop_ids(tokenizer, settings.template, guided.llamas),
        temperature=1.0,
        seed=random.Random(f"answers {settings.seed} {position}").randrange(2**32),
    )
    # as rows whose answers are supervised, and a reward for each
    rows, rewards = [], []
    for number, (prompt, answer) in enumerate(zip(prompts, answers)):
        rows.append(with_mask([(prompt, "user"), (answer, "assistant")]))
        rewards.append(job.dataset.reward(asked[number // G][1], answer))
    parts = make_parts(rows, settings.grad_accum * job.run.processes.count, G)
    earned = torch.tensor(rewards).view(-1, G).split(len(parts[0][0]) // G)  # (Q, G) of each part
    return [(*part, its_rewards) for part, its_rewards in zip(parts, earned)]


# --------------------------------------------------------------------------------------------------
# Three jobs


@dataclass
class Job:
    """One network to train, as a command asks for it. run/jobs.py makes it."""

    settings: Settings
    run: Run
    tokenizer: Tokenizer
    device: str
    build: Callable[[], Llama | Probe]  # makes the network with fresh weights
    batches: Callable  # of the data, as fit wants them
    faster: Callable  # a loss -> the same loss from fast/, where run/twins.py chooses that
    examine: Callable | None  # guided -> metrics, by an exam; None: by held-out conversations
    prepare: Callable  # of the network: gradient checkpointing, and a line about what is trained
    dataset: ChatDataset | None = None
    held_out: Sequence[int] = ()  # conversations of it to measure on, and not to train on
    info: dict = field(default_factory=dict)  # what ivl.json will say of a value network
    full_metrics: dict = field(default_factory=dict)  # of a full fine-tuning, to stand beside
    watch: Callable = lambda items, what: items  # goes through them and says how far it is
    shows_alone: bool = False  # whether a value network is also measured without a base

    def publish(self, network: nn.Module, metrics: dict) -> None:
        """Write the finished folder. By now it is known which conversations were too long."""
        if self.dataset is not None and self.settings.data == str(self.dataset.path):
            print(self.dataset.report(self.held_out))
        self.run.publish(self.run.processes.undivided(network), self.tokenizer, metrics)


def pretrain(job: Job) -> None:
    """A tiny base from nothing, on the tiny world's text, each token of which is supervised."""
    network = first_weights(job)
    fit(network, job.faster(language_loss), [], job.batches, job.run)
    metrics = {"base": job.examine(Guided(job.run.processes.undivided(network)))}
    job.publish(network, metrics)


def fine_tune(job: Job) -> None:
    """A copy of the base, all of its weights, on demonstrations: "Full" in the paper."""
    base = load_frozen(job, job.settings.bases[0])
    network = first_weights(job)  # the base's own
    objective = fit(network, job.faster(language_loss), [], job.batches, job.run)
    metrics = {"base": measure(job, None, base), "full": measure(job, objective, None)}
    job.publish(network, metrics)
    print_metrics(metrics)


def train_value(job: Job) -> None:
    """A value network on demonstrations, for frozen bases: inverse value learning (Section 3.1)."""
    bases = {path: load_frozen(job, path) for path in job.settings.bases}
    if job.settings.plugged:  # value networks that guide the bases already
        plugged = [load_frozen(job, path) for path in job.settings.plugged]
        bases = {path: PluggedBase(base, plugged) for path, base in bases.items()}
    # It starts as a copy of the first base, or as --value says. So z_post = 2 z_base, and the first
    # loss is worse than the base's own: 5.2 nats a token, and 3.2 (tiny-s, seed 0). With a head of
    # zeros, z_delta = 0, it starts at 3.2 and ends worse: exact .34, and .44 from a copy.
    network = ValueModel(first_weights(job), job.info)
    loss = job.faster(value_loss(job))  # Eq. (4), if no other is named
    frozen = [bases[path] for path in job.settings.bases]  # a curriculum may name one twice
    answer = partial(sample_answers, job) if job.settings.loss == "reward" else None
    objective = fit(network, loss, frozen, job.batches, job.run, answer)
    # how the first base does by itself, fine-tuned in full, and guided
    base = bases.pop(job.settings.bases[0])
    metrics = {"base": measure(job, None, base)} | job.full_metrics
    metrics["base+value"] = measure(job, objective, base)
    if job.shows_alone:  # as a fine-tuned model would stand, without a base
        metrics["value alone"] = measure(job, objective, None)
    # then a curriculum's later bases
    for path, base in bases.items():
        name = path if Path(path).name in metrics else Path(path).name
        metrics |= {name: measure(job, None, base), f"{name}+value": measure(job, objective, base)}
    job.publish(network, metrics)
    print_metrics(metrics)


def first_weights(job: Job) -> Llama | Probe:
    """What training starts from: a checkpoint's weights or, for scratch, fresh ones."""
    start, device = job.settings.start, job.device
    if is_scratch(start):
        torch.manual_seed(job.settings.seed)
        network = job.build().to(device)
    elif job.settings.scheme == "probe":
        network = ValueModel.from_pretrained(start, torch.float32, device).network
    else:
        network = Llama.from_pretrained(start, torch.float32, device)
    job.prepare(network)
    return network


def is_scratch(start: str) -> bool:
    """Whether a start is scratch or scratch:NAME, and no folder."""
    return start.partition(":")[0] == "scratch"


def load_frozen(job: Job, path: str | Path) -> Llama:
    """A base or a teacher, which stays as it is. Its weights have no gradient."""
    device = "cpu" if job.run.processes.shard else job.device  # divided, it is never whole on a GPU
    base = Llama.from_pretrained(path, getattr(torch, job.settings.dtype), device)
    return job.run.processes.divide_base(base.requires_grad_(False))


def guide(base: Llama | PluggedBase, value: ValueModel | None) -> Guided:
    """A base, guided by a value network and by those that are plugged in already."""
    if not isinstance(base, PluggedBase):
        return Guided(base, value)
    llamas = [*base.values, *([] if value is None else value.llamas)]
    return Guided(base.base, SumDelta(llamas, [1.0] * len(llamas)))


def value_loss(job: Job) -> Callable:
    """What a value network minimises: loss(network, base, tokens, labels)."""
    settings = job.settings
    if settings.loss == "pairwise":
        return partial(ValueModel.pair_loss, beta=settings.beta)
    if settings.loss == "kl":
        teacher = load_frozen(job, settings.teacher)
        return partial(ValueModel.teacher_loss, teacher=teacher, temperature=settings.temperature)
    if settings.loss == "reward":
        return partial(ValueModel.reward_loss, beta=settings.beta)
    return partial(ValueModel.loss, l1=settings.l1, over=settings.l1_over)  # Eq. (4)


def language_loss(network: Llama, base: None, tokens: Tensor, labels: Tensor) -> Loss:
    """Ordinary training of a network by itself: the mean cross-entropy over supervised labels.

    tokens and labels are (B, T). There is no base; ValueModel.loss has one in this place.
    """
    z = network(tokens)  # (B, T, V)
    total = F.cross_entropy(at_least_float(z).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = total / (labels != -100).sum().clamp(min=1)
    return loss, {"ce": loss.detach()}


def measure(job: Job, objective: nn.Module | None, base: Llama | None) -> dict[str, float | None]:
    """A base alone (no objective), what was trained alone (no base), or a base guided by it.

    By the exam, if there is one; else by the cross-entropy of held-out conversations.
    """
    if job.examine is None:
        if objective is None:
            objective, base = Objective(base, language_loss), None
        return {"ce": held_out_ce(objective, base, job)}
    undivided = job.run.processes.undivided
    trained = None if objective is None else undivided(trained_network(objective))
    if base is not None:
        return job.examine(guide(undivided(base), trained))
    return job.examine(Guided(trained.network if isinstance(trained, ValueModel) else trained))


def trained_network(objective: nn.Module) -> Llama | ValueModel:
    """The network in an Objective, which several processes may have wrapped."""
    return getattr(objective, "module", objective).network


@torch.no_grad()
def held_out_ce(objective: nn.Module, base: Llama | None, job: Job) -> float | None:
    """Mean cross-entropy in nats over the supervised tokens of held-out conversations.

    None when none of them fits.
    """
    total, count = 0.0, 0
    for index in job.watch(job.held_out, "examining: held-out conversations"):
        rows = job.dataset.rows(index)
        if not rows:
            continue
        part = collate(rows)
        _, metrics = compute_loss(objective, base, part, job.settings.dtype)
        total += metrics["ce"].item() * count_supervised(part[1])
        count += count_supervised(part[1])
    return total / count if count else None


def main():
    from run.arguments import train_arguments  # here and not at the top: run/ imports this file
    from run.jobs import (
        bases_to_pretrain,
        compares_with_full,
        complete,
        full_job,
        pretraining_job,
        value_job,
    )
    from run.processes import join_processes

    args = train_arguments()
    with join_processes(args) as processes:
        complete(args, processes)
        for name, out in bases_to_pretrain(args):
            if job := pretraining_job(name, out, args, processes):
                pretrain(job)
        if args.job == "full" or compares_with_full(args):
            if job := full_job(args, processes):
                fine_tune(job)
        if args.job == "value":
            if job := value_job(args, processes):
                train_value(job)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
