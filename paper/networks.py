"""What paper/ trains and measures: made when it is not there, and kept under out/seedN.

Every network is trained by a command that anybody can type, in a process of its own with one
thread. A system is a base, alone or with something plugged in; each is measured once, on the
evaluation people. A system has a name such as "tiny-l", "tiny-l + value-residual-tiny-s", "tiny-l +
value-residual-tiny-s x 0.5" (alpha), "tiny-l + value-forms + value-sums x 0.5" (a sum), "tiny-l +
proxy-tiny-s" (proxy tuning) or "tiny-b-l + value-residual-tiny-m via pieces" (a vocabulary map of
that kind).
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from data import tiny_world
from data.errors import UsageError
from data.files import read_json, write_text
from data.tiny_world import World, prompt_text
from run.cli import clock

ROOT = Path(__file__).parents[1]
TRAIN, CONTINUE = (str(ROOT / "train.py"),), ("-m", "paper.continued")


@dataclass(frozen=True)
class Network:
    """The command that makes a network's folder under out/seedN."""

    flags: str
    needs: tuple[str, ...] = ()  # networks that must be there before
    seconds: int = 25  # about, on one core; for the ETA alone
    program: tuple[str, ...] = TRAIN  # what takes the flags


VALUE, S, M, L = "value-residual-tiny-s", "tiny-s", "tiny-m", "tiny-l"
CONTINUED, INFINITY = "tiny-m-continued", "value-infinity-tiny-s"
CURRICULUM = f"{VALUE}-on-tiny-s-tiny-m"
# lambda. 1.0 is Table 5's, and the "norm" of every table. 0.04 weighs beside a supervised position
# what 1.0 does in the paper.
NORMS = [0.04, 0.3, 1.0]
NORM = f"{VALUE}-l1-1"
ON_M = "value-residual-tiny-m"
CURRICULUM_M = f"{ON_M}-on-tiny-s-tiny-m"
# by the losses of paper/losses.py
DISTILLED, PAIRS = "value-distilled-tiny-s", "value-pairs-tiny-s"
PAIRS_AFTER = "value-pairs-after-demonstrations-tiny-s"
PAIRS_AFTER_NORM = "value-pairs-after-norm-tiny-s"
# bases with other tokenizers; the value network of their own is made on the -m of the family
FOREIGN = ["tiny-b-l", "tiny-c-m"]

# by the rewards of paper/rewards.py, and for the sums of paper/sums.py
START, MORE, NEVER = "value-few-tiny-s", "value-few-more-tiny-s", "value-none-tiny-s"
REWARDED, RARE, WITH_KL = "value-rewarded-tiny-s", "value-rewarded-rare", "value-rewarded-kl"
SLOWER, NEVER_REWARDED = "value-rewarded-slower", "value-none-rewarded"
SUMS_REWARDED = "value-sums-rewarded"
FORMS, SUMS, ON_TOP = "value-forms-tiny-s", "value-sums-tiny-s", "value-sums-on-forms"
SHOWN = {percent: f"{ON_TOP}-shown-{percent}" for percent in (1, 5, 20)}
QUIET = {l1: f"{ON_TOP}-l1-{l1:g}" for l1 in (0.3, 1.0, 3.0)}  # with the norm, and sums alone
ALL_ON_TOP, OWN_ON_TOP = f"{ON_TOP}-shown-all", f"{ON_TOP}-own"
SECOND, THIRD = "value-sums-on-none-own", "value-rare-on-two-own"  # on NEVER, and on both
OWN_ANSWERS = ("-m", "paper.own_answers")
RARE_FORMS = ("Be polite.", "Begin with a dash.")
OTHER_FORMS = tuple(form for form in tiny_world.FORMS if form not in RARE_FORMS)
FEW = 40  # demonstrations of the rare forms


def asks(record: dict, *endings: str) -> bool:
    return record["conversations"][0]["value"].endswith(endings)


def is_sum(record: dict) -> bool:
    return " plus " in record["conversations"][0]["value"]


def few_of_the_rare(world: World, count: int = FEW) -> list[dict]:
    """Demonstrations, `count` of them in the rare forms."""
    records, left = [], count
    for record in world.demonstrations():
        left -= asks(record, *RARE_FORMS)
        if left >= 0 or not asks(record, *RARE_FORMS):
            records.append(record)
    return records


def forms_only(world: World) -> list[dict]:
    return [record for record in world.demonstrations() if not is_sum(record)]


def sums_and(world: World, percent: int) -> list[dict]:
    """The sums of the demonstrations, and so many percent of the others."""
    forms, sums = forms_only(world), list(filter(is_sum, world.demonstrations()))
    kept = random.Random(f"{percent}% of world {world.seed}").sample(
        forms, len(forms) * percent // 100
    )
    return sums + kept


def is_rare(record: dict) -> bool:
    return asks(record, *RARE_FORMS)


def is_other_sum(record: dict) -> bool:
    return is_sum(record) and not is_rare(record)


def questions(world: World, rare: float, sums: float = 0.0, count: int = 2000) -> list[dict]:
    """Questions about demonstrated people or sums, and greetings; a share `rare` in the rare forms."""
    rng, records = random.Random(f"questions of world {world.seed}"), []
    for _ in range(count):
        form = rng.choice(RARE_FORMS if rng.random() < rare else tiny_world.FORMS)
        shares = (0.0, 1.0) if rng.random() < sums else (0.7, 0.7)
        item = world.demonstrated_item(rng, *shares, world.demonstrated_sums)(form)
        records.append({"prompt": prompt_text(item), "answer": item.answer})
    return records


DATA = {  # files that networks are trained on, besides those that train.py writes itself
    "infinity": World.infinity,
    "few": few_of_the_rare,
    "none": partial(few_of_the_rare, count=0),
    "forms": forms_only,
    **{f"sums-{percent}": partial(sums_and, percent=percent) for percent in (0, *SHOWN)},
    "questions-rare": partial(questions, rare=0.5),
    "questions-mixed": partial(questions, rare=0.0),
    "questions-sums": partial(questions, rare=0.0, sums=1.0),
}


def by_rewards(name: str, start: str, data: str, more: str = "", seconds: int = 45) -> Network:
    """A value network that goes on from another by rewards."""
    flags = f"--loss reward --data {{home}}/questions-{data}.jsonl --held-out 0 {more}"
    return Network(f"{FURTHER}/{start} {flags} --out {{home}}/{name}", (start,), seconds)


def on_top(name: str, data: str, more: str = "") -> Network:
    """A value network that is made for the one of forms."""
    flags = f"{ON_DATA} {{home}}/{data}.jsonl --with {{home}}/{FORMS} {more}"
    return Network(f"{flags} --out {{home}}/{name}", (FORMS,), 33)


# What paper/own_answers.py writes: which demonstrations, and in which forms and with how many sums
# the others ask that base and value networks answer themselves.
OWN = {
    "sums-own": (is_sum, tiny_world.FORMS, 0.0),
    "sums-own-other": (is_other_sum, OTHER_FORMS, 0.0),
    "rare-own": (is_rare, OTHER_FORMS, 0.2),
}


def with_own_answers(name: str, data: str, *guides: str) -> Network:
    """A value network made for others, of whose data it is shown none."""
    plugged = " ".join(f"{{home}}/{guide}" for guide in guides)
    flags = f"{ON_DATA} {{home}}/{data}.jsonl --out {{home}}/{name} --with {plugged}"
    return Network(flags, guides, 40, OWN_ANSWERS)


ON_S = "--base tiny-s --value --no-full"
ON_DATA, FURTHER = "--base tiny-s --value --held-out 0 --data", "--base tiny-s --value {home}"
ON_INFINITY = "--base tiny-s --value --data {home}/infinity.jsonl --steps 1000 --out {home}/"
NETWORKS = {  # bases first, since the others wait for them
    "tiny-b-l": Network("--base tiny-b-l", (), 315),
    L: Network("--base tiny-l", (), 300),
    "tiny-c-m": Network("--base tiny-c-m", (), 200),
    M: Network("--base tiny-m", (), 150),
    "tiny-b-m": Network("--base tiny-b-m", (), 155),
    S: Network("--base tiny-s", (), 80),
    CONTINUED: Network("--base tiny-m", (M,), 45, CONTINUE),
    INFINITY: Network(ON_INFINITY + INFINITY, (S,), 70),
    f"{INFINITY}-l1-1": Network(ON_INFINITY + f"{INFINITY}-l1-1 --l1 1", (S,), 70),
    "full-tiny-l": Network("--base tiny-l --full", (L,), 45),
    "full-tiny-m": Network("--base tiny-m --full", (M,)),
    "full-tiny-m-continued": Network("--base {home}/tiny-m-continued --full", (CONTINUED,)),
    "full-tiny-s": Network("--base tiny-s --full", (S,), 18),
    VALUE: Network(ON_S, (S,)),
    **{f"{VALUE}-l1-{l1:g}": Network(f"{ON_S} --l1 {l1:g}", (S,)) for l1 in NORMS},
    CURRICULUM: Network("--base tiny-s tiny-m --value --no-full", (S, M), 28),
    ON_M: Network("--base tiny-m --value --no-full", (M,), 35),
    f"{ON_M}-l1-1": Network("--base tiny-m --value --no-full --l1 1", (M,), 35),
    CURRICULUM_M: Network("--base tiny-s tiny-m --value tiny-m --no-full", (S, M), 32),
    "value-residual-tiny-m-on-tiny-s": Network(
        "--base tiny-s --value tiny-m --no-full", (S, M), 30
    ),
    "value-residual-scratch-on-tiny-s": Network("--base tiny-s --value scratch --no-full", (S,)),
    "value-residual-scratch-tiny-m-on-tiny-s": Network(
        "--base tiny-s --value scratch:tiny-m --no-full", (S,), 30
    ),
    "value-cascade-tiny-s": Network(f"{ON_S} --scheme cascade", (S,)),
    "value-cascade+-tiny-s": Network(f"{ON_S} --scheme cascade+", (S,)),
    **{f"full-{base}": Network(f"--base {base} --full", (base,), 45) for base in FOREIGN},
    **{
        f"value-residual-{base[:-1]}m": Network(
            f"--base {base[:-1]}m --value --no-full", (f"{base[:-1]}m",), 35
        )
        for base in FOREIGN
    },
    DISTILLED: Network(
        f"{ON_S} --loss kl --teacher {{home}}/full-tiny-l --out {{home}}/{DISTILLED}",
        (S, "full-tiny-l"),
        50,
    ),
    PAIRS: Network(f"--base tiny-s --value --loss pairwise --out {{home}}/{PAIRS}", (S,), 30),
    PAIRS_AFTER: Network(
        f"--base tiny-s --value {{home}}/{VALUE} --loss pairwise --out {{home}}/{PAIRS_AFTER}",
        (VALUE,),
        15,
    ),
    PAIRS_AFTER_NORM: Network(
        f"--base tiny-s --value {{home}}/{NORM} --loss pairwise --out {{home}}/{PAIRS_AFTER_NORM}",
        (NORM,),
        15,
    ),
    START: Network(f"{ON_DATA} {{home}}/few.jsonl --out {{home}}/{START}", (S,), 28),
    MORE: Network(
        f"{FURTHER}/{START} --data {{home}}/few.jsonl --held-out 0 --steps 800 --lr 3e-4 "
        f"--out {{home}}/{MORE}",
        (START,),
        40,
    ),
    REWARDED: by_rewards(REWARDED, START, "mixed"),
    RARE: by_rewards(RARE, START, "rare"),
    SLOWER: by_rewards(SLOWER, START, "rare", "--lr 1e-4"),
    WITH_KL: by_rewards(WITH_KL, START, "rare", "--beta 0.01"),
    NEVER: Network(f"{ON_DATA} {{home}}/none.jsonl --out {{home}}/{NEVER}", (S,), 28),
    NEVER_REWARDED: by_rewards(NEVER_REWARDED, NEVER, "rare", "--steps 60", 30),
    SUMS_REWARDED: by_rewards(SUMS_REWARDED, VALUE, "sums", "", 55),
    FORMS: Network(f"{ON_DATA} {{home}}/forms.jsonl --out {{home}}/{FORMS}", (S,), 28),
    SUMS: Network(f"{ON_DATA} {{home}}/sums-0.jsonl --out {{home}}/{SUMS}", (S,), 28),
    ON_TOP: on_top(ON_TOP, "sums-0"),
    **{name: on_top(name, f"sums-{share}") for share, name in SHOWN.items()},
    **{name: on_top(name, "sums-0", f"--l1 {l1:g}") for l1, name in QUIET.items()},
    ALL_ON_TOP: Network(
        f"{ON_S} --with {{home}}/{FORMS} --out {{home}}/{ALL_ON_TOP}", (FORMS,), 33
    ),
    OWN_ON_TOP: with_own_answers(OWN_ON_TOP, "sums-own", FORMS),
    SECOND: with_own_answers(SECOND, "sums-own-other", NEVER),
    THIRD: with_own_answers(THIRD, "rare-own", NEVER, SECOND),
    **{
        f"value-probe-{base}": Network(f"--base {base} --value --no-full --scheme probe", (base,))
        for base in (S, M, L)
    },
}


def parts_of(system: str) -> tuple[str, dict[str, float], str]:
    """Base, what is plugged in with its weight, and how the vocabulary map is made ("" for none)."""
    system, _, how = system.partition(" via ")
    base, *plugs = system.split(" + ")
    weights = {}
    for plug in plugs:
        name, _, weight = plug.partition(" x ")
        weights[name] = float(weight or 1)
    return base, weights, how


def networks_of(system: str) -> list[str]:
    """The folders that a system is made of."""
    base, plugs, _ = parts_of(system)
    networks = [base]
    for plug in plugs:
        small = plug.removeprefix("proxy-")
        networks += [plug] if small == plug else [f"full-{small}", small]
    return networks


def command_of(network: str, home: Path) -> list[str]:
    """What makes a network, less the seed."""
    found = NETWORKS[network]
    return [*found.program, *found.flags.format(home=home).split()]


def with_needs(networks: Iterable[str]) -> list[str]:
    """These networks and all that they need, in the order of NETWORKS."""
    wanted = set(networks)
    for name in reversed(NETWORKS):  # needs stand before what needs them
        if name in wanted:
            wanted.update(NETWORKS[name].needs)
    return [name for name in NETWORKS if name in wanted]


# --------------------------------------------------------------------------------------------------
# What is kept


class Kept:
    """out/seedN/measured: a file a system, and networks.json with the networks made.

    Both record the time of the train.json of their networks, so a network trained anew is measured
    anew. Neither knows of the code: after a change of it (of the tiny world, say) begin with a
    fresh out/.
    """

    def __init__(self, seed: int):
        self.seed, self.home = seed, Path("out") / f"seed{seed}"
        self.folder = self.home / "measured"
        self.file = self.folder / "networks.json"
        self.ledger = self.read()

    def read(self) -> dict:
        return read_json(self.file) if self.file.is_file() else {}

    def made(self, network: str) -> int | None:
        """When a network was finished, in nanoseconds; None if it is not there."""
        file = self.home / network / "train.json"
        return file.stat().st_mtime_ns if file.is_file() else None

    def has(self, network: str) -> bool:
        return network in self.ledger and self.ledger[network]["made"] == self.made(network)

    def vouch(self, network: str, core_seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock"):  # two commands may make networks of one seed
            self.ledger = self.read()
            self.ledger[network] = {
                "made": self.made(network),
                "core_seconds": round(core_seconds, 1),
            }
            write(self.file, self.ledger)

    def measured(self, system: str) -> dict[str, float] | None:
        """The metrics of a system; None if they are not there, or its networks are newer."""
        file = self.folder / f"{system}.json"
        record = read_json(file) if file.is_file() else {}
        current = {network: self.made(network) for network in networks_of(system)}
        return record["metrics"] if record.get("networks") == current else None

    def keep(self, system: str, metrics: dict[str, float]) -> None:
        networks = {network: self.made(network) for network in networks_of(system)}
        write(self.folder / f"{system}.json", {"networks": networks, "metrics": metrics})


def write(file: Path, record: dict) -> None:
    """Whole or not at all, however this process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# Making what is not there


@dataclass
class Job:
    """One process: a network to train, or the systems of one base to measure."""

    what: str
    kept: Kept
    command: list[str]
    seconds: float  # expected, on one core
    needs: list[str]

    @property
    def log(self) -> Path:
        return self.kept.folder / "logs" / f"{self.what}.log"

    def start(self) -> subprocess.Popen:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.log, "w") as log:
            return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)


def jobs_for(systems: Iterable[str], seed: int) -> list[Job]:
    """What is still to be done before every system is measured."""
    kept = Kept(seed)
    missing = [system for system in systems if kept.measured(system) is None]
    needed = with_needs(network for system in missing for network in networks_of(system))
    todo = [name for name in needed if not kept.has(name)]
    jobs = []
    for name in todo:
        command = [sys.executable, *command_of(name, kept.home), "--seed", str(seed), "--resume"]
        seconds = 4 if kept.made(name) else NETWORKS[name].seconds
        needs = [need for need in NETWORKS[name].needs if need in todo]
        jobs.append(Job(name, kept, command, seconds, needs))
        for data, records in DATA.items():
            if f"{{home}}/{data}.jsonl" in NETWORKS[name].flags:
                world = World(seed)
                world.write_demonstrations(kept.home / f"{data}.jsonl", records(world))
    bases = Counter(parts_of(system)[0] for system in missing)
    for base, count in bases.most_common():  # the longest first
        here = [system for system in missing if parts_of(system)[0] == base]
        needs = {network for system in here for network in networks_of(system) if network in todo}
        command = [sys.executable, "-m", "paper.measure", "--seed", str(seed), *here]
        jobs.append(Job(f"measuring {base}", kept, command, 4 + 3 * count, list(needs)))
    return jobs


def make(jobs: list[Job], processes: int) -> None:
    """Run `processes` jobs at a time, each after its needs; UsageError if one fails."""
    waiting, running, done = list(jobs), {}, []
    started, cores = time.monotonic(), 0.0
    try:
        while waiting or running:
            unmade = {(job.kept.seed, job.what) for job in waiting}
            unmade |= {(job.kept.seed, job.what) for job, _ in running.values()}
            for job in list(waiting):
                if len(running) == processes:
                    break
                if not any((job.kept.seed, need) in unmade for need in job.needs):
                    waiting.remove(job)
                    process = job.start()
                    running[process.pid] = job, process
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            job, process = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            name = f"seed {job.kept.seed}, {job.what}"
            if process.returncode:
                said = job.log.read_text(errors="replace").strip().splitlines() or ["no word"]
                if "another process is training there" not in said[-1]:
                    raise UsageError(f"{name}: {said[-1]} (all of it in {job.log})")
                time.sleep(2)  # most likely left over from a run that was killed: wait for it
                waiting.insert(0, job)
                continue
            spent = usage.ru_utime + usage.ru_stime
            if job.what in NETWORKS:
                job.kept.vouch(job.what, spent)
            done.append(job.seconds)
            cores += spent
            left = [job.seconds for job in [*waiting, *(job for job, _ in running.values())]]
            elapsed = time.monotonic() - started
            pace = elapsed * processes / sum(done) if len(done) > 2 else 1.0
            eta = max([sum(left) / processes, *left]) * pace
            progress = f"[{len(done)}/{len(jobs)}] {name}, {spent:.0f} core-seconds"
            print(f"{progress}; {clock(eta)} left", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
    if jobs:
        elapsed = clock(time.monotonic() - started)
        print(f"{elapsed} with {processes} processes, {cores / 60:.1f} core-minutes\n", flush=True)
