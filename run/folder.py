"""The folder of a run: OUT, the finished one, and OUT.training, where the run lives until then.

    python train.py --resume        # go on where a run was stopped, or killed

OUT.training holds a lock, settings.json, log.jsonl and one step-N folder, the newest checkpoint:
state.safetensors, state.json. log.jsonl has a line a step; OUT keeps it, and run/curves.py draws it.
Checkpoints and OUT appear by one atomic rename each, so a reader never meets half of one.
"""

import itertools
import json
import math
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import torch.nn as nn
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UsageError
from data.files import check_regular, read_json, replacing, write_text
from data.tokenizer import Tokenizer, load_tokenizer
from ivl import ValueModel
from model import Llama
from run.cli import clock, rate, show_progress
from run.processes import Alone
from train import Settings, learning_rate

COLUMNS = {  # what is shown of a step: a metric's title, and what it is
    "ce": ("ce", "cross-entropy of base and value network together"),
    "l1": ("|z_delta|", "mean size of the value network's logits"),
    "base_ce": ("base ce", "cross-entropy of the base alone"),
    "acc": ("accuracy", "share of pairs whose chosen answer is ahead"),
    "margin": ("margin", "distance by which it is ahead"),
    "kl": ("kl", "divergence from the teacher"),
    "base_kl": ("base kl", "base's own divergence"),
    "reward": ("reward", "mean reward of sampled answers"),
    "dead": ("dead", "share of questions whose answers all earn the same"),
    "length": ("length", "tokens of an answer"),
    "drift": ("drift", "divergence from the base, summed over an answer"),
}

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
BESIDE = {"ce": "base_ce", "acc": "margin"}  # shown only beside these


def is_finished(out: Path) -> bool:
    """Whether a folder is that of a finished run."""
    return (out / "train.json").is_file()


class Run:
    """What train.fit asks of the place where a network is trained: checkpoints, and a line now and then."""

    def __init__(
        self, out: Path, settings: Settings, resume: bool, save_every: int, processes: Alone
    ):
        self.out, self.settings = out, settings
        self.save_every, self.processes = save_every, processes
        self.finished = is_finished(out)
        self.work = out.with_name(out.name + ".training")
        self.log = self.work / "log.jsonl"
        self.later = 0.0  # how many tokens the command trains on when this network is done, about
        saved = self.work / "settings.json"
        if any(map(os.path.lexists, (out, self.work))):
            self.refuse_foreign(saved)
        if self.finished:
            check_same_settings(out / "train.json", settings, resume)
            # a kill between the last rename and the removal left it
            shutil.rmtree(self.work, ignore_errors=True)
            return
        # without a checkpoint there is nothing to lose
        self.has_settings = saved.exists() and (resume or bool(self.checkpoints()))
        if self.has_settings:
            check_same_settings(saved, settings, resume)

    def refuse_foreign(self, saved: Path) -> None:
        """UsageError where something is in either place that train.py did not write."""
        if (
            self.out.exists()
            and not self.finished
            and (not self.out.is_dir() or any(self.out.iterdir()))
        ):
            raise UsageError(f"{self.out}: exists, and is no run of train.py; choose another --out")
        for path in (self.out, self.work):
            if path.is_symlink():
                raise UsageError(f"{path}: a symbolic link; give the folder itself as --out")
        ours = re.compile(
            r"lock|settings\.json|log\.jsonl|step-\d{1,12}|[\w.-]+\.tmp|settings\.new"
        )
        if self.work.exists():
            if not self.work.is_dir():
                raise UsageError(
                    f"{self.work}: exists, and is no run of train.py; choose another --out"
                )
            odd = [
                path.name
                for path in self.work.iterdir()
                if not ours.fullmatch(path.name) or path.is_symlink()
            ]
            orphaned = self.checkpoints() and not saved.exists() and not self.finished
            if odd or orphaned:
                what = f"has {min(odd)} in it" if odd else "has checkpoints without settings"
                raise UsageError(
                    f"{self.work}: exists, and is no run of train.py, as it {what}; choose another --out"
                )

    def checkpoints(self) -> list[Path]:
        """Oldest first; more than one only if a kill came between the rename and the removal."""
        found = [
            path
            for path in self.work.glob("step-*")
            if re.fullmatch(r"step-\d{1,12}", path.name) and path.is_dir()
        ]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    # -- while it trains

    def begin(
        self, network: Llama | ValueModel, optimizer: torch.optim.AdamW, batches: Callable
    ) -> tuple[int, Iterator]:
        """Take the folder and put its newest checkpoint back: the first step to do, and the batches from there on.

        A start that fails leaves nothing behind.
        """
        network.refuse_unsaved()  # rather now than when it is trained
        if self.has_settings:  # before a checkpoint is read that another process may be replacing
            self.processes.first_does(self.take)
        state = self.restore(network, optimizer)
        stream = batches(state["position"])
        stream = itertools.chain(
            [next(stream)], stream
        )  # the first batch shows that the data can be used
        if not self.has_settings:
            self.processes.first_does(self.take)
        self.first = state["step"]
        self.started = self.stepped = time.monotonic()
        self.reported, self.tokens, self.unreported = 0.0, 0, []
        return state["step"], stream

    def cut_log(self) -> None:
        """Keep of the log what came before the first step to do."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        write_text(self.log, "".join(f"{line}\n" for line in lines[: self.first]))

    def take(self) -> None:
        made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.work / "lock")  # held until this process ends, however it ends
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UsageError(f"{self.work}: another process is training there") from None
        weakref.finalize(self, leave, self.work, made, self.lock)
        for path in [
            *self.work.glob("*.tmp"),
            *self.work.glob("settings.new"),
        ]:  # what a kill left behind
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not self.has_settings:
            write_text(
                self.work / "settings.json", json.dumps(vars(self.settings), indent=2) + "\n"
            )

    def check_finite(self, step: int, metrics: dict[str, float], norm: float) -> None:
        """Stop before a step whose loss or gradient is no number."""
        if math.isfinite(metrics["loss"]) and math.isfinite(norm):
            return
        if not math.isfinite(metrics.get("base_ce", 0.0)):
            raise UsageError(
                f"step {step + 1}: the base's own cross-entropy is {metrics['base_ce']}: it has damaged weights, or ones too "
                f"large for {self.settings.dtype}, or a label is outside its vocabulary; stopped. Another --dtype may do"
            )
        if step == 0:
            raise UsageError(
                f"step 1: the loss is {metrics['loss']}, its gradient's norm {norm}, before anything was learnt: the network "
                f"that training starts from, {self.settings.start}, has damaged weights, or ones too large for "
                f"{self.settings.dtype}; stopped"
            )
        raise UsageError(
            f"step {step + 1}: the loss is {metrics['loss']}, its gradient's norm {norm}; stopped. {self.newest()}; "
            "a smaller --lr may do, in another --out"
        )

    def check_weights(self, network: nn.Module) -> None:
        """Stop where the last update has made a weight no number: nothing of it is saved."""
        for name, parameter in network.named_parameters():
            if not self.processes.whole(parameter).isfinite().all():
                raise UsageError(
                    f"the last update made {name} no number; stopped, and saved nothing of it. {self.newest()}; a smaller "
                    "--lr may do, in another --out"
                )

    def newest(self) -> str:
        kept = self.checkpoints()
        return (
            f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was written yet"
        )

    def report(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """A line in the log and, every two seconds, one to read, of means over the steps since."""
        self.tokens += tokens  # padding included
        self.unreported.append(metrics)
        now, done = time.monotonic(), step + 1
        record = {"step": done, **metrics, "lr": learning_rate(self.settings, step)}
        record["tokens/s"] = round(tokens / max(now - self.stepped, 1e-9), 1)
        self.stepped = now
        if self.processes.rank == 0:
            if step == self.first:  # not before a step has worked
                self.cut_log()
            with self.log.open("a") as log:
                log.write(json.dumps(record) + "\n")
        elapsed, last = now - self.started, done == self.settings.steps
        if elapsed - self.reported < 2 and not last and step > self.first:
            return
        mean = {
            name: sum(each[name] for each in self.unreported) / len(self.unreported)
            for name in metrics
        }
        self.reported, self.unreported = elapsed, []
        shown = [name for name in COLUMNS if name in mean and BESIDE.get(name, name) in mean]
        if step == self.first:
            explained = [f"{COLUMNS[name][0]}, the {COLUMNS[name][1]}" for name in shown]
            what = "; ".join(["loss, what training makes smaller", *explained])
            print(f"means since the line before, in nats a token: {what}")
        texts = [f"{COLUMNS[name][0]} {mean[name]:.3f}" for name in shown]
        left = elapsed / (done - self.first) * (self.settings.steps - done)
        eta = f"{clock(left)} left"
        if self.later:
            eta += f", of all about {clock(left + self.later * elapsed / self.tokens)}"
        texts = [f"loss {mean['loss']:.3f}", *texts, f"{rate(self.tokens / elapsed)} tokens/s"]
        line = "  ".join([f"step {done:5d}/{self.settings.steps}", eta, *texts])
        show_progress(line, keep=last or step == self.first)

    # -- checkpoints

    def save(self, network: Llama | ValueModel, optimizer: torch.optim.AdamW, state: dict) -> None:
        """Publish a checkpoint, read it back, then drop the older ones."""
        self.check_weights(network)
        tensors = {}
        for name, parameter in network.named_parameters():
            tensors[f"weight.{name}"] = self.processes.whole(parameter)
            for moment in MOMENTS:
                if parameter in optimizer.state:
                    tensors[f"{moment}.{name}"] = self.processes.whole(
                        optimizer.state[parameter][moment]
                    )
        self.processes.first_does(lambda: self.write_checkpoint(tensors, state))

    def write_checkpoint(self, tensors: dict[str, Tensor], state: dict) -> None:
        older, new = self.checkpoints(), self.work / f"step-{state['step']}"
        with replacing(new, self.work / "step.tmp") as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps(state) + "\n")
            with safe_open(temporary / "state.safetensors", framework="pt") as written:
                for name, tensor in tensors.items():
                    if not torch.equal(written.get_tensor(name), tensor.cpu()):
                        raise UsageError(
                            f"{new}: {name} reads otherwise than it was written; is the disk damaged?"
                        )
        for path in older:
            shutil.rmtree(path)

    def restore(self, network: Llama | ValueModel, optimizer: torch.optim.AdamW) -> dict:
        """Put the newest checkpoint back, if there is one, and return how far it came: step and position in the data."""
        found = self.checkpoints()
        if not found:
            return {"step": 0, "position": None}
        device = "cpu" if self.processes.shard else str(network.device)
        try:
            state = read_json(found[-1] / "state.json")
            tensors = load_file(check_regular(found[-1] / "state.safetensors"), device=device)
            self.check_state(found[-1], state, tensors, network)
        except (OSError, ValueError, SafetensorError) as error:
            instead = f"go on from {found[-2].name}" if len(found) > 1 else "start over"
            raise UsageError(
                f"{found[-1]}: a damaged checkpoint ({error}); delete it to {instead}"
            ) from None
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(self.processes.slice_of(tensors[f"weight.{name}"], parameter))
                if f"exp_avg.{name}" in tensors:
                    step = torch.tensor(float(state["step"]), device=parameter.device)
                    optimizer.state[parameter] = {"step": step}
                    for moment in MOMENTS:
                        whole = tensors[f"{moment}.{name}"]
                        optimizer.state[parameter][moment] = self.processes.slice_of(
                            whole, parameter
                        )
        print(f"resumed at step {state['step']}")
        return state

    def check_state(
        self, folder: Path, state: dict, tensors: dict[str, Tensor], network: Llama | ValueModel
    ) -> None:
        """ValueError unless this is a checkpoint of this network, on its way through these settings."""
        step, position = state.get("step"), state.get("position")
        if type(step) is not int or not 0 < step < self.settings.steps:
            raise ValueError(f"state.json: step is {step!r}, of {self.settings.steps}")
        if folder.name != f"step-{step}":
            raise ValueError(
                f"state.json: step is {step}, which is not what the folder's name says"
            )
        length = 1 if self.settings.job == "pretrain" else 3
        if (
            not isinstance(position, list)
            or len(position) != length
            or not all(type(each) is int and 0 <= each < 2**53 for each in position)
        ):
            raise ValueError(
                f"state.json: position is {str(position)[:60]}, not {length} whole numbers"
            )
        for name, parameter in network.named_parameters():
            kinds = ("weight", *MOMENTS) if parameter.requires_grad else ("weight",)
            for kind in kinds:
                tensor = tensors.get(f"{kind}.{name}")
                if tensor is None:
                    raise ValueError(f"state.safetensors: {kind}.{name} is not there")
                if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                    raise ValueError(
                        f"state.safetensors: {kind}.{name} is {tuple(tensor.shape)} of {tensor.dtype}, not "
                        f"{tuple(parameter.shape)} of {parameter.dtype}"
                    )
                if not tensor.isfinite().all():
                    raise ValueError(f"state.safetensors: {kind}.{name} has what is no number")

    # -- the end

    def publish(self, network: Llama | ValueModel, tokenizer: Tokenizer, metrics: dict) -> None:
        """Write the finished folder and rename it to OUT."""
        self.processes.first_does(lambda: self.write_final(network, tokenizer, metrics))
        print(f"saved {self.out}")
        alone = metrics.get("base", {}).get("ce")
        guided = metrics.get("base+value", {}).get("ce")
        if None not in (alone, guided) and guided > alone:
            print(
                "on held-out conversations the guided base is worse than the base alone (cross-entropy "
                f"{guided:.3f}, {alone:.3f}); a lower --lr than {self.settings.lr:g} or fewer --steps "
                "may help"
            )

    def write_final(self, network: Llama | ValueModel, tokenizer: Tokenizer, metrics: dict) -> None:
        if any(
            not math.isfinite(value or 0)
            for of_system in metrics.values()
            for value in of_system.values()
        ):
            raise UsageError(
                f"{self.out}: not saved, as what it was measured by is no number: {metrics}"
            )
        sources = [
            Path(path)
            for path in (self.settings.start, *self.settings.bases)
            if Path(path).is_dir()
        ]
        source = next(
            (path for path in sources if load_tokenizer(path).model == tokenizer.model), None
        )
        with replacing(self.out, self.work / "final.tmp") as final:
            network.save_pretrained(final)
            (final / tokenizer.file_name).write_bytes(tokenizer.model)
            for name in [
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "generation_config.json",
                "chat_template.jinja",
            ]:  # also for other programs
                if source and (source / name).is_file():
                    shutil.copy(source / name, final)
            if (
                tokenizer.kind == "json" and not (final / "tokenizer_config.json").exists()
            ):  # what config.json alone said
                (final / "tokenizer_config.json").write_text(json.dumps(tokenizer.ends()) + "\n")
            shutil.copy(self.log, final)
            (final / "train.json").write_text(json.dumps(vars(self.settings), indent=2) + "\n")
            (final / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        self.lock.release()
        shutil.rmtree(self.work)


def leave(work: Path, made: list[Path], lock: FileLock) -> None:
    """When a run is over, or has failed: without a checkpoint nothing of it stays, nor empty folders made for it."""
    if not lock.is_locked:
        return
    if not list(work.glob("step-*")):
        shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    lock.release()


CHANGED = {
    "data_hash": "its data file has changed",
    "base_hashes": "a base has changed, or a teacher: other weights are in its folder",
}


def check_same_settings(file: Path, settings: Settings, resume: bool) -> None:
    """Refuse to touch the run whose settings are in `file`, unless it is to be resumed and has the same."""
    state, advice = "unfinished", "go on with --resume"
    if file.name == "train.json":
        state, advice = "finished", "choose another --out or --seed"
    if not resume:
        raise UsageError(
            f"{file.parent}: a run is there already, {state}; {advice}, or delete the folder"
        )
    found = read_json(file)
    wanted = json.loads(json.dumps(vars(settings)))
    # a setting that a run lacks was at its default, if it has one
    defaults = {each.name: each.default for each in fields(Settings) if each.default is not MISSING}
    for name in sorted((wanted.keys() ^ found.keys()) - defaults.keys()):
        raise UsageError(
            f"{file}: damaged, or a run with other settings than this version has: {name} is "
            f"{'there' if name in found else 'not there'}; choose another --out, or delete the folder"
        )
    found = json.loads(json.dumps(defaults)) | found
    name = next((name for name in wanted if wanted[name] != found[name]), None)
    if name is None:
        return
    if name == "steps" and state == "finished" and settings.job == "value":
        raise UsageError(
            f"{file.parent}: this run is finished, after {found[name]} steps; to train its network further give "
            f"--value {file.parent} and another folder, --out NEW: it starts from these weights"
        )
    if name in CHANGED:
        what = f"a run is there, and {CHANGED[name]}"
    else:
        what = (
            f"a run with other settings is there: {name} was {found[name]!r}, now {wanted[name]!r}"
        )
    leave_out = ", or leave the comparison out with --no-full" if settings.job == "full" else ""
    raise UsageError(
        f"{file.parent}: {what}; choose another --out, or delete the folder{leave_out}"
    )


def read_metrics(folder: Path, system: str = "base") -> dict[str, dict[str, float | None]]:
    """What a finished folder's metrics.json says: system -> metric -> value."""
    systems = read_json(folder / "metrics.json")
    names = [list(metrics) if isinstance(metrics, dict) else [] for metrics in systems.values()]
    if (
        system not in systems
        or not names[0]
        or any(each != names[0] for each in names)
        or not all(
            value is None or isinstance(value, (int, float))
            for metrics in systems.values()
            for value in metrics.values()
        )
    ):
        raise UsageError(
            f"{folder}/metrics.json: not what train.py writes there; delete the folder and train again"
        )
    return systems
