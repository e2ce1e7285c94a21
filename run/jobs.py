"""What a command of train.py asks for: which networks, one after the other, from where, on what, and to where.

python train.py --base tiny-m --value        # tiny-m if it is not there, full-tiny-m for comparison, the value network
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

from data.capitals import CAPITALS_PAIRS, CAPITALS_TRAINING, Capitals
from data.chat import (
    ChatDataset,
    PairDataset,
    chat_batches,
    default_template,
    hold_out,
    mean_supervised,
    system_of,
)
from data.checkpoint import digest_checkpoint, name_of, read_value_info
from data.errors import UsageError
from data.files import digest
from data.tiny_world import TEMPLATE, TINY_SIZES, World, print_metrics, world_of
from data.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer
from ivl import SCHEMES, Probe, ValueModel
from model import Llama, LlamaConfig, read_config
from run.cli import pick_device
from run.folder import Run, read_metrics
from run.plug import (
    check_recorded,
    check_same_family,
    find_tiny,
    refuse_value_network,
    say_other_template,
)
from run.processes import Alone, load_frozen
from run.show import HeldOutPairs, examine
from run.twins import choose_loss
from sample import Guided
from train import (
    PROBE_WIDTH,
    TINY_PAIRS,
    TINY_PAIRS_LATER,
    TINY_POST_TRAINING,
    TINY_PRETRAINING,
    Settings,
    table5,
)

TINY_LIMIT = 256  # tokens that a tiny network is made for


class Job:
    """One network to train: its settings, and all that train.py's three jobs ask for by name.

    `build` makes a network with fresh weights. `full_metrics` are those of a full fine-tuning to stand in
    a value network's table. `exam` asks what was learnt: the tiny world, the capitals, held-out pairs, or nothing but
    held-out conversations. `documents` replace the tiny world's pretraining text.
    """

    def __init__(
        self,
        run: Run,
        args,
        tokenizer: Tokenizer,
        build: Callable[[], nn.Module],
        exam: World | Capitals | HeldOutPairs | None,
        dataset: ChatDataset | None = None,
        split: tuple[list[int], list[int]] = ((), ()),
        full_metrics: dict | None = None,
        documents: Callable[[], Iterator[str]] | None = None,
    ):
        self.run, self.settings, self.args, self.processes = run, run.settings, args, run.processes
        self.tokenizer, self.build, self.exam, self.dataset = tokenizer, build, exam, dataset
        self.train_on, self.held_out = split
        self.full_metrics, self.documents = full_metrics or {}, documents
        self.bases = [Path(path) for path in self.settings.bases]
        teacher = self.load_frozen(Path(self.settings.teacher)) if self.settings.teacher else None
        self.loss = choose_loss(self.settings, args, teacher)

    def first_weights(self) -> Llama | Probe:
        """The network to train, as it is before the first step."""
        start = self.settings.start
        if is_scratch(start):
            torch.manual_seed(self.settings.seed)
            self.network = self.build().to(self.args.device)
        elif self.settings.scheme == "probe":
            self.network = ValueModel.from_pretrained(
                start, torch.float32, self.args.device
            ).network
        else:
            self.network = Llama.from_pretrained(start, torch.float32, self.args.device)
        for part in self.network.modules():
            if hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = self.args.gradient_checkpointing
        self.announce()
        return self.network

    @property
    def shows_alone(self) -> bool:
        """Whether the table has a line for the value network by itself."""
        return isinstance(self.exam, Capitals) and isinstance(self.network, Llama)

    def announce(self) -> None:
        settings = self.settings
        size = f"{sum(parameter.numel() for parameter in self.network.parameters()) / 1e6:.2f}M parameters"
        if settings.job == "pretrain":
            tokens = settings.steps * settings.batch_size * settings.max_length
            says = (
                f"pretraining {self.run.out.name}, {size}, on {tokens:,} tokens of {settings.data}"
            )
        else:
            what = f"a value network ({settings.scheme})" if settings.scheme else "in full"
            says = f"training {what}, {size}, from {settings.start}, on {self.dataset.report(self.held_out)}, "
            says += f"template {settings.template}" + (
                f", system prompt {settings.system[:60]!r}" if settings.system else ""
            )
            if settings.loss == "pairwise":
                says += f", beta {settings.beta:g}"
            if settings.loss == "kl":
                says += f", teacher {settings.teacher}, temperature {settings.temperature:g}"
        print(f"{says} -> {self.run.out}", flush=True)
        if settings.l1:
            self.weigh_the_norm()

    def weigh_the_norm(self, most: int = 1000) -> None:
        """Print what lambda weighs beside the paper's, whose norm is a mean over all positions of rows padded to max_length.

        Both stand beside a cross-entropy that is a mean over supervised positions, so what counts is the share that
        these have of the positions that the norm is a mean of; measured on the first conversations.
        """
        settings = self.settings
        rows = [row for index in self.train_on[:most] for row in self.dataset.rows(index)]
        if not rows:
            return
        text = sum(len(ids) - 1 for ids, _ in rows) / len(rows)  # positions of a row
        supervised = mean_supervised(rows)
        averaged = (
            text if settings.l1_over == "all" else supervised
        )  # rows of a batch are of like length: hardly any padding
        print(
            f"norm: lambda {settings.l1:g} over {settings.l1_over} positions weighs like the paper's lambda "
            f"{settings.l1 * settings.max_length / averaged:.3g}, which is over rows padded to {settings.max_length} tokens; here "
            f"{text:.1f} of them are text and {supervised:.1f} supervised",
            flush=True,
        )

    def value_info(self) -> dict:
        """What ivl.json will say."""
        settings = self.settings
        info = {
            "scheme": settings.scheme,
            "l1": settings.l1,
            "template": settings.template,
            "bases": settings.bases,
            "data": settings.data,
            "seed": settings.seed,
            "steps": settings.steps,
            "tokenizer": describe_tokenizer(self.tokenizer),
        }
        if settings.probe_width:
            info["probe_width"] = settings.probe_width
        if settings.system:
            info["system"] = settings.system
        if settings.loss == "pairwise":
            info |= {"loss": "pairwise", "beta": settings.beta}
        if settings.loss == "kl":
            info |= {"loss": "kl", "teacher": settings.teacher, "temperature": settings.temperature}
        return info

    def load_frozen(self, path: Path) -> Llama:
        return load_frozen(self.processes, path, self.args)

    def batches(self, position: list[int] | None, parts: int) -> Iterator:
        """What fit asks for: the position behind each step, and the step's parts."""
        settings = self.settings
        if settings.job == "pretrain":
            documents = self.documents() if self.documents else None
            return self.exam.batches(
                self.tokenizer,
                settings.steps,
                settings.batch_size,
                parts,
                settings.max_length,
                position,
                documents,
            )
        return chat_batches(
            self.dataset, self.train_on, settings.batch_size, parts, settings.seed, position
        )

    def undivided(self, network: Llama | ValueModel | Probe) -> Llama | ValueModel:
        """The network as one process has it; a value network's as one."""
        whole = self.processes.undivided(network)
        if network is self.network and self.settings.job == "value":
            return ValueModel(whole, self.value_info())
        return whole

    def examine(self, guided: Guided) -> dict[str, float]:
        """The examination's metrics; the first process measures."""
        if self.processes.rank:
            return {}
        return examine(
            guided,
            self.exam,
            self.tokenizer,
            self.settings.template or TEMPLATE,
            system=self.settings.system,
            pairs=self.settings.loss == "pairwise",
        )

    def publish(self, network: Llama | ValueModel, metrics: dict) -> None:
        base, trained = metrics["base"].get("ce"), metrics.get("base+value", {}).get("ce")
        if base is not None and trained is not None and trained > base:
            print(
                f"on held-out conversations the guided base is worse than the base alone (cross-entropy {trained:.3f}, "
                f"{base:.3f}); a lower --lr than {self.settings.lr:g} or fewer --steps may help"
            )
        if self.dataset and not isinstance(self.exam, (World, Capitals)):
            print(self.dataset.report(self.held_out))  # by now it is known what was too long
        self.run.publish(self.processes.undivided(network), self.tokenizer, metrics)


# ---------------------------------------------------------------------------------------------------------
# Which jobs


def jobs_for(args, processes: Alone) -> Iterator[Job]:
    """The jobs of a command; what is finished already is left out. Each is looked at when the one before is done."""
    complete(args, processes)
    if args.job == "pretrain":
        for name in args.base:
            if name not in TINY_SIZES:
                find_tiny(name, [args.home])  # refuses an unknown tiny name
                raise UsageError(
                    f"--base {name} alone: nothing to train on a checkpoint; add --value or --full, and --data"
                )
        for name in args.base:
            yield from pretraining(name, args.out or args.home / name, args, args.flags, processes)
        return
    bases = []
    for name in args.base:
        bases.append((yield from pretrained_first(name, args, processes)))
        refuse_value_network("--base", bases[-1])
    full = args.home / f"full-{name_of(bases[0])}"
    if args.job == "full":
        yield from post_training(
            "", bases, str(bases[0]), args.out or full, args, args.data, args.flags, processes
        )
        return
    if args.teacher:
        args.teacher = str((yield from pretrained_first(args.teacher, args, processes)))
        refuse_value_network("--teacher", Path(args.teacher))
    start = args.value
    if start and not is_scratch(start):
        start = str((yield from pretrained_first(start, args, processes)))
    scheme, start = choose_scheme(args, bases, start)
    compare = not args.data and not args.no_full and args.loss != "pairwise"
    if compare:
        yield from post_training(
            "", bases[:1], str(bases[0]), full, args, None, {}, processes, keep=True
        )
    out = args.out or args.home / value_name(scheme, args, bases, start)
    how = dict(
        l1=args.l1,
        l1_over=args.l1_over,
        loss=args.loss,
        beta=args.beta,
        temperature=args.temperature,
        teacher=args.teacher,
    )
    yield from post_training(
        scheme,
        bases,
        start,
        out,
        args,
        args.data,
        args.flags | how,
        processes,
        full if compare else None,
    )


def complete(args, processes: Alone) -> None:
    """What follows from the flags for the networks that they name."""
    args.home = Path("out") / f"seed{args.seed}"  # where tiny things live
    args.tiny = all(name in TINY_SIZES or world_of(name) is not None for name in args.base)
    args.device, args.dtype = pick_device(args.dtype, args.tiny, args.device)
    args.device = processes.own(args.device)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = (
            not args.tiny and args.data != "capitals"
        )  # its conversations are short


def pretrained_first(name: str, args, processes: Alone) -> Iterator[Job]:
    """The folder of a network, as the generator's value; a tiny one that is not there yet is pretrained, and kept."""
    path = find_tiny(name, [args.home])
    if path is None:
        return with_a_name(name)
    if not (path / "train.json").is_file():
        yield from pretraining(name, path, args, {}, processes)
    return path


def pretraining(name: str, out: Path, args, flags: dict, processes: Alone) -> Iterator[Job]:
    """A tiny base, from nothing."""
    _, tokens, lr = TINY_SIZES[name]
    chosen = TINY_PRETRAINING | dict(lr=lr) | flags
    chosen.setdefault("steps", max(1, tokens // (chosen["batch_size"] * chosen["max_length"])))
    world = World(args.seed)
    run = pretraining_run(f"scratch:{name}", world, out, args, chosen, processes)
    if run.finished:
        print(f"{out}: finished already")
    else:
        tokenizer = world.tokenizer_for(name)
        yield Job(run, args, tokenizer, lambda: Llama(tiny_config(name, tokenizer)), world)


def pretraining_run(
    start: str, world: World, out: Path, args, chosen: dict, processes: Alone
) -> Run:
    if chosen["max_length"] > TINY_LIMIT:
        raise UsageError(
            f"--max-length {chosen['max_length']}: a tiny network is made for {TINY_LIMIT} tokens"
        )
    settings = Settings(
        job="pretrain",
        bases=[],
        start=start,
        scheme="",
        probe_width=0,
        data=f"tiny-world {world.seed}",
        data_hash="",
        template="",
        seed=args.seed,
        dtype=args.dtype,
        **chosen,
    )
    return Run(out, settings, args.resume, args.save_every, processes)


def post_training(
    scheme: str,
    bases: list[Path],
    start: str,
    out: Path,
    args,
    data: str | None,
    flags: dict,
    processes: Alone,
    full: Path | None = None,
    keep: bool = False,
) -> Iterator[Job]:
    """A value network on frozen bases or, with no scheme, full fine-tuning of a copy of the first.

    `full` is a finished full fine-tuning for the table; `keep` is content with a finished run of these settings.
    """
    width = args.probe_width if scheme == "probe" else 0
    frozen = bases + ([Path(flags["teacher"])] if flags.get("teacher") else [])
    build, longest, tokenizer = choose_network(start, frozen, scheme, width)
    tiny, world, pairs = (
        all(world_of(path) for path in bases),
        None,
        flags.get("loss") == "pairwise",
    )
    if data is None:
        world = common_world(bases)
        name, records = (
            ("preferences", world.preferences())
            if pairs
            else ("demonstrations", world.demonstrations())
        )
        data = str(
            world.write_demonstrations(Path("out") / f"seed{world.seed}" / f"{name}.jsonl", records)
        )
    exam, usual = world, TINY_POST_TRAINING if tiny else None
    if data == "capitals":
        exam, usual = Capitals(args.seed), CAPITALS_PAIRS if pairs else CAPITALS_TRAINING
        name, records = (
            ("capital-pairs", exam.preferences()) if pairs else ("capitals", exam.demonstrations())
        )
        data = str(exam.write(records, args.home / f"{name}.jsonl"))
    max_length = flags.get("max_length", min(4096, longest))  # Table 5
    if max_length > longest:
        raise UsageError(f"--max-length {max_length}: the checkpoint was made for {longest} tokens")
    recorded = (
        read_value_info(start, SCHEMES) if (Path(start) / "ivl.json").is_file() else {}
    )  # what is trained further keeps its own
    if pairs and tiny:
        usual = TINY_PAIRS_LATER if recorded else TINY_PAIRS
    template = (
        args.template
        or recorded.get("template")
        or (TEMPLATE if world else default_template(tokenizer))
    )
    system = system_of(
        tokenizer, template, recorded.get("system") if args.system is None else args.system
    )
    say_other_template(str(bases[0]), bases[0], template, "trained")
    dataset = (PairDataset if pairs else ChatDataset)(data, tokenizer, template, max_length, system)
    split = (list(range(len(dataset))), []) if exam else hold_out(dataset, args.seed, args.held_out)
    chosen = with_usual(build, usual, flags, len(split[0])) | dict(max_length=max_length)
    settings = Settings(
        job="value" if scheme else "full",
        bases=[str(path) for path in bases],
        start=start,
        scheme=scheme,
        probe_width=width,
        template=template,
        seed=args.seed,
        data=exam.name if exam else data,
        data_hash=digest(dataset.path),
        dtype=args.dtype,
        base_hashes=tuple(map(digest_checkpoint, frozen)),
        held_out=len(split[1]),
        system=system,
        **chosen,
    )
    run = Run(
        out,
        settings,
        args.resume or keep and (out / "train.json").exists(),
        args.save_every,
        processes,
    )
    if not run.finished:
        full_metrics = {"full": read_metrics(full, "full")["full"]} if full else {}
        if pairs and not exam:
            exam = HeldOutPairs(dataset, split[1])
        yield Job(run, args, tokenizer, build, exam, dataset, split, full_metrics)
    elif not keep:
        print(f"{out}: finished already")
        print_metrics(read_metrics(out))


def with_usual(
    build: Callable[[], nn.Module], usual: dict | None, flags: dict, conversations: int
) -> dict:
    """What was asked for over what is usual (None: Table 5's, by the network's size), with epochs turned into steps."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    chosen = (usual or table5(parameters)) | flags
    epochs = chosen.pop("epochs", None)
    if epochs and "steps" not in flags:
        chosen["steps"] = max(1, round(epochs * math.ceil(conversations / chosen["batch_size"])))
    return chosen


# ---------------------------------------------------------------------------------------------------------
# Which networks


def tiny_config(name: str, tokenizer: Tokenizer) -> LlamaConfig:
    (width, layers, heads, kv_heads, hidden), _, _ = TINY_SIZES[name]
    return LlamaConfig(
        tokenizer.vocab_size,
        width,
        hidden,
        layers,
        heads,
        kv_heads,
        max_position_embeddings=TINY_LIMIT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def choose_network(
    start: str, bases: list[Path], scheme: str, probe_width: int
) -> tuple[Callable[[], nn.Module], int, Tokenizer]:
    """How to build the network to train, the most tokens a conversation may have, and the tokenizer.

    `start` is a folder, or scratch (the first base's architecture) or scratch:NAME (a tiny one's).
    """
    configs = {str(path): read_config(path) for path in bases}
    tokenizers = [load_tokenizer(path) for path in bases]
    _, _, size = start.partition(":")
    own_tokenizer = tokenizers[0] if is_scratch(start) else load_tokenizer(start)
    if (Path(start) / "ivl.json").is_file():
        check_recorded(own_tokenizer, read_value_info(start, SCHEMES), Path(start))
    for other, path in zip(tokenizers, bases):
        check_same_family(other, own_tokenizer, str(path), start)
    tokenizer = min(
        [own_tokenizer, *tokenizers], key=lambda each: each.vocab_size
    )  # what all of them can read
    if scheme == "probe":
        build = functools.partial(Probe, tokenizer.vocab_size, probe_width)
    else:
        if not is_scratch(start):
            config = read_config(start)
        elif not size:
            config = configs[str(bases[0])]
        elif size in TINY_SIZES:
            config = tiny_config(size, tokenizers[0])
        else:
            raise UsageError(
                f"--value {start}: scratch, or scratch: and one of {', '.join(TINY_SIZES)}"
            )
        build = functools.partial(Llama, config)
        configs = {start: config} | configs
    for path, config in configs.items():
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"{path}: {config.vocab_size} rows in lm_head, but its tokenizer has {tokenizer.vocab_size} tokens"
            )
    return build, min(config.max_position_embeddings for config in configs.values()), tokenizer


def choose_scheme(args, bases: list[Path], start: str) -> tuple[str, str]:
    """The scheme, and where the value network's first weights come from; what is trained further keeps its scheme."""
    info = {}
    if start and (Path(start) / "ivl.json").is_file():
        info = read_value_info(start, SCHEMES)
    scheme = args.scheme or info.get("scheme", "residual")
    if scheme != info.get("scheme", scheme):
        raise UsageError(
            f"--scheme {scheme}: {start} was trained as {info['scheme']}, and is trained further as that"
        )
    if scheme == "probe" and start and not info:
        raise UsageError(
            f"--scheme probe: there is nothing in {start} for a probe to start from; --value takes no name here"
        )
    if args.probe_width and (scheme != "probe" or info):
        raise UsageError("--probe-width means nothing but for a new --scheme probe")
    args.probe_width = info.get("probe_width") or args.probe_width or PROBE_WIDTH
    return scheme, start or ("scratch" if scheme == "probe" else str(bases[0]))


def value_name(scheme: str, args, bases: list[Path], start: str) -> str:
    """value-residual-tiny-s: the scheme and the first weights; what differs from the default is added."""
    parts = ["value", scheme]
    if scheme == "probe" and is_scratch(start):
        parts += [name_of(path) for path in bases]
        if args.probe_width != PROBE_WIDTH:
            parts.append(f"width-{args.probe_width}")
    else:
        parts.append(name_of(Path(start)).replace(":", "-").replace(f"value-{scheme}-", "further-"))
        if [start] != [str(path) for path in bases]:
            parts += ["on", *map(name_of, bases)]
    if args.l1:
        parts.append(f"l1-{args.l1:g}" + ("-over-all" if args.l1_over == "all" else ""))
    if args.loss != "ce":
        parts += [args.loss, name_of(Path(args.teacher))] if args.teacher else [args.loss]
        parts += [f"beta-{args.beta:g}"] if args.beta not in (0, 0.1) else []
        parts += [f"temperature-{args.temperature:g}"] if args.temperature not in (0, 1) else []
    return "-".join(parts)


def common_world(bases: list[Path]) -> World:
    """The tiny world that all bases come from."""
    worlds = [world_of(path) for path in bases]
    for world, path in zip(worlds, bases):
        if world is None:
            raise UsageError(
                f"{path}: no tiny base, so it takes --data FILE with conversations to train on"
            )
        if world.seed != worlds[0].seed:
            raise UsageError(
                f"{path}: from tiny world {world.seed}, {bases[0]} from {worlds[0].seed}"
            )
    return worlds[0]


def is_scratch(start: str) -> bool:
    return start.partition(":")[0] == "scratch"


def with_a_name(path: str) -> Path:
    """Its last part names the run, so "." and ".." are spelled out."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
