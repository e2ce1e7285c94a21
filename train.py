"""Pretrain a tiny base, fine-tune a base in full, or train a value network on a frozen base.

    python train.py                                        # the same as: python train.py --base --value
    python train.py --base tiny-l                          # pretrain a bigger base, to plug the value network into
    python train.py --base --value --scheme cascade+       # another way to connect the two (Section 4.1)
    python train.py --base tiny-s tiny-m --value           # a curriculum of bases (Table 2)
    python train.py --base --value --loss pairwise         # pairs of answers instead of demonstrations (Section 3.1)
    python train.py --base PATH --value --data chats.json  # on a real checkpoint in the Hugging Face layout
    torchrun --nproc_per_node=8 train.py --base PATH --value --data chats.json  # on eight GPUs; --shard divides the weights

All three are one loop, `fit`. They differ in what is fed, and in whether a frozen base's logits are
added. Where a run lives while it is not finished, run/folder.py knows.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.chat import ChatDataset, collate
from data.tiny_world import print_metrics
from ivl import ValueModel, at_least_float
from model import Llama
from sample import Guided

Part = tuple[Tensor, Tensor]  # tokens (B, T), and labels (B, T), shifted, -100 where not supervised

# ---------------------------------------------------------------------------------------------------------
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
    batch_size: int  # conversations, pairs (two rows each) or rows of text that make one step, over all its parts
    grad_accum: int  # parts that a step's batch is split into, in each process, to save memory; the gradient is the same
    max_length: int
    lr: float
    warmup: float = 0.04  # Table 5's warm-up ratio
    floor: float = 0.0  # the share of lr at which the cosine ends
    weight_decay: float = 0.01  # the authors' scripts
    betas: tuple[float, float] = (0.9, 0.999)
    l1: float = 0.0  # lambda of Section 4.2.1
    l1_over: str = "supervised"  # the positions that the norm is a mean of, or "all" in a batch
    loss: str = "ce"  # or "pairwise", with its beta, or "kl", with a teacher and a temperature (Section 3.1)
    beta: float = 0.0
    teacher: str = ""
    temperature: float = 0.0
    base_hashes: tuple[str, ...] = ()  # of the bases' weights, and the teacher's
    held_out: int = 0  # conversations that are measured on and not trained on
    system: str = ""  # a system prompt for conversations that have none


PRETRAINING_LENGTH = 64  # tokens a row
TINY = dict(floor=0.1, betas=(0.9, 0.98), grad_accum=1)
TINY_PRETRAINING = TINY | dict(batch_size=16, max_length=PRETRAINING_LENGTH, weight_decay=0.05)
TINY_POST_TRAINING = TINY | dict(steps=500, batch_size=32, lr=1e-3)
TINY_PAIRS = TINY | dict(steps=400, batch_size=16, lr=5e-4)
TINY_PAIRS_LATER = TINY_PAIRS | dict(
    steps=200, lr=1e-4
)  # of a value network: as much as above would undo what it knows
PROBE_WIDTH = 256  # 0.8M weights on 1024 logits, 25M on 32000


def table5(parameters: int) -> dict:
    """Table 5, whose two columns are the trained network's size, 1.1B and 7B. One conversation a part."""
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


# ---------------------------------------------------------------------------------------------------------
# The loop


def language_loss(
    network: Llama, base: None, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ordinary training of a network by itself: the mean cross-entropy of tokens (B, T) over supervised labels (B, T).

    base is there because ValueModel.loss stands in the same place where a value network is trained.
    """
    z = network(tokens)  # (B, T, V)
    total = F.cross_entropy(at_least_float(z).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = total / (labels != -100).sum().clamp(min=1)
    return loss, {"ce": loss.detach()}


class Objective(nn.Module):
    """A network, and its loss as a forward pass, which is where several processes can step in."""

    def __init__(self, network: Llama | ValueModel, loss: Callable):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(
        self, base: Llama | None, tokens: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.network, base, tokens, labels)


class OneProcess:
    """What the loop asks of the processes that train together: here, of one. run/processes.py has several."""

    rank, count = 0, 1

    def share_out(self, objective: Objective, dtype: str) -> nn.Module:
        """The objective, with its weights where the processes keep them."""
        return objective

    def mine(self, parts: list[Part]) -> list[Part]:
        """The parts of a step that this process computes."""
        return parts

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """Numbers summed over processes."""
        return numbers

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may hold a slice."""
        return tensor.detach()


def fit(
    network: Llama | ValueModel, loss: Callable, bases: list[Llama], batches: Callable, run
) -> nn.Module:
    """Train a network for settings.steps steps: a value network on frozen bases, or an ordinary model without.

    batches(position, parts) begins at a position in the data (None: the start), and yields for each step the position
    behind it, where a stopped run goes on, and a list of so many parts. `run` is where it lives (run/folder.py, Run):
    settings, processes, checkpoints. Returns the Objective.
    """
    settings, processes = run.settings, run.processes
    network.refuse_unsaved()  # rather now than when it is trained
    objective = processes.share_out(Objective(network, loss), settings.dtype)
    count = count_pairs if settings.loss == "pairwise" else count_supervised
    optimizer = make_optimizer(network, settings)
    first, stream = run.begin(
        network, optimizer, batches
    )  # at step 0, or where a stopped run goes on
    for step, (position, parts) in zip(range(first, settings.steps), stream):
        # Dropout drops here and nowhere else, and a resumed run drops what it would have dropped
        objective.train()
        torch.manual_seed(settings.seed * settings.steps + step)
        # the learning rate of this step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        # several bases are a curriculum: as many steps on each, in their order (Table 2)
        base = bases[step * len(bases) // settings.steps] if bases else None
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
        run.report(step, metrics, sum(tokens.numel() for tokens, _ in parts))
    run.check_weights(network)
    return objective.eval()


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; the weights of norms, which are vectors, do not decay."""
    matrices = [parameter for parameter in network.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def count_supervised(labels: Tensor) -> int:
    return int((labels != -100).sum())


def count_pairs(labels: Tensor) -> int:
    """Of rows chosen, rejected, chosen, ...; pairs without a label, which pad the parts of several processes, are not counted."""
    return int((labels[::2] != -100).any(1).sum())


def accumulate_gradient(
    objective: nn.Module,
    base: Llama | None,
    parts: list[Part],
    dtype: str,
    processes: OneProcess = OneProcess(),
    count: Callable = count_supervised,
) -> dict[str, float]:
    """Leave in .grad the gradient of the mean over all that a step's loss counts, however it is split in parts.

    `count` says how much that is of a part's labels: supervised tokens, or pairs. (A norm over "all" positions is split
    otherwise: of each part it weighs as much as its supervised tokens.) Returns the means of the metrics, and of the loss.
    """
    total = sum(count(labels) for _, labels in parts)
    sums: dict[str, Tensor] = defaultdict(float)
    for tokens, labels in processes.mine(parts):
        share = count(labels) / total
        loss, metrics = compute_loss(objective, base, tokens, labels, dtype)
        # Several processes end with the mean of their gradients, where the sum is meant.
        (loss * share * processes.count).backward()
        for name, value in (metrics | {"loss": loss}).items():
            sums[name] += value.detach().float() * share
    return processes.sum(
        {name: total.item() for name, total in sums.items()}
    )  # once a step: a GPU waits for each answer


def compute_loss(
    objective: nn.Module, base: Llama | None, tokens: Tensor, labels: Tensor, dtype: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Objective of tokens (B, T) and labels (B, T), moved to the device and computed in dtype."""
    device = next(objective.parameters()).device
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return objective(base, tokens.to(device), labels.to(device))


@torch.no_grad()
def held_out_ce(
    objective: nn.Module, base: Llama | None, dataset: ChatDataset, indices: list[int], dtype: str
) -> float | None:
    """Mean cross-entropy in nats over the supervised tokens of some conversations; None when none of them fits."""
    total, count = 0.0, 0
    for index in indices:
        rows = dataset.rows(index)
        if not rows:
            continue
        tokens, labels = collate(rows)
        _, metrics = compute_loss(objective, base, tokens, labels, dtype)
        total += metrics["ce"].item() * count_supervised(labels)
        count += count_supervised(labels)
    return total / count if count else None


# ---------------------------------------------------------------------------------------------------------
# Three jobs. A `job` (run/jobs.py) is what a command asks for: settings, data, where weights come from and go.


def pretrain(job) -> None:
    """A tiny base from nothing, on the tiny world's text, each token of which is supervised."""
    network = job.first_weights()
    fit(network, job.loss, [], job.batches, job.run)
    job.publish(network, {"base": job.examine(Guided(job.undivided(network)))})


def fine_tune(job) -> None:
    """A copy of the base, all of its weights, on demonstrations: "Full" in the paper."""
    base = job.load_frozen(job.bases[0])
    network = job.first_weights()
    objective = fit(network, job.loss, [], job.batches, job.run)
    metrics = {"base": measure(job, None, base), "full": measure(job, objective, None)}
    job.publish(network, metrics)
    print_metrics(metrics)


def train_value(job) -> None:
    """A value network on demonstrations, for frozen bases."""
    bases = {path: job.load_frozen(path) for path in job.bases}
    network = ValueModel(job.first_weights(), job.value_info())
    objective = fit(network, job.loss, [bases[path] for path in job.bases], job.batches, job.run)
    # how the first base does by itself, fine-tuned in full, and guided; then a curriculum's later bases
    base = bases.pop(job.bases[0])
    metrics = (
        {"base": measure(job, None, base)}
        | job.full_metrics
        | {"base+value": measure(job, objective, base)}
    )
    if job.shows_alone:  # as a fine-tuned model would stand, without a base
        metrics["value alone"] = job.examine(Guided(job.processes.undivided(job.network)))
    for path, base in bases.items():
        name = str(path) if path.name in metrics else path.name
        metrics |= {name: measure(job, None, base), f"{name}+value": measure(job, objective, base)}
    job.publish(network, metrics)
    print_metrics(metrics)


def measure(job, objective: nn.Module | None, base: Llama | None) -> dict[str, float | None]:
    """A base alone (no objective), what was trained alone (no base), or a base guided by what was trained.

    With an exam: by what job.network says, if there is an objective, which is not called. Without: by the objective's
    cross-entropy on held-out conversations.
    """
    if not job.exam:
        if objective is None:
            objective, base = Objective(base, language_loss), None
        return {"ce": held_out_ce(objective, base, job.dataset, job.held_out, job.settings.dtype)}
    trained = None if objective is None else job.undivided(job.network)
    if base is None:
        return job.examine(Guided(trained))
    return job.examine(Guided(job.undivided(base), trained))


def main():
    from run.arguments import train_arguments  # here and not at the top: run/ imports this file
    from run.jobs import jobs_for
    from run.processes import join_processes

    args = train_arguments()
    with join_processes(args) as processes:
        for job in jobs_for(args, processes):
            if job.settings.job == "pretrain":
                pretrain(job)
            elif job.settings.job == "full":
                fine_tune(job)
            else:
                train_value(job)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
