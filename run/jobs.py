"""What a command of train.py asks for: which networks, from where, on what, and to where.

python train.py --base tiny-m --value        # tiny-m, full-tiny-m for comparison, the value network
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch.nn as nn

from data.capitals import CAPITALS_PAIRS, CAPITALS_REWARDS, CAPITALS_TRAINING, Capitals
from data.chat import (
    ChatDataset,
    PairDataset,
    default_template,
    hold_out,
    mean_supervised,
    stream_batches,
    system_of,
)
from data.checkpoint import digest_checkpoint, name_of, read_value_info
from data.errors import UsageError
from data.files import digest, hub_hint
from data.questions import QuestionDataset
from data.tiny_world import TEMPLATE, TINY_SIZES, World, print_metrics, world_of
from data.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer
from ivl import SCHEMES, Probe
from model import Llama, LlamaConfig, read_config, without_weights
from run.cli import watch
from run.device import pick_device
from run.folder import Run, is_finished, read_metrics
from run.plug import (
    check_recorded,
    check_same_family,
    find_tiny,
    newest_value,
    refuse_value_network,
    say_other_template,
)
from run.processes import Alone
from run.show import HeldOutPairs, HeldOutQuestions, examine
from run.twins import faster_loss
from sample import Guided
from train import (
    PROBE_WIDTH,
    TINY_PAIRS,
    TINY_PAIRS_LATER,
    TINY_POST_TRAINING,
    TINY_PRETRAINING,
    TINY_REWARDS,
    Job,
    Settings,
    is_scratch,
    table5,
)

TINY_LIMIT = 256  # tokens that a tiny network is made for
TINY_CONVERSATION = 28  # tokens of a demonstration in a batch, padding included

# --------------------------------------------------------------------------------------------------
# Which jobs


def complete(args, processes: Alone) -> None:
    """What follows from the flags: the device, where tiny things live, the folders of the bases."""
    args.home = Path("out") / f"seed{args.seed}"
    args.tiny = all(name in TINY_SIZES or world_of(name) is not None for name in args.base)
    args.device, args.dtype = pick_device(args.dtype, args.tiny, args.device)
    args.device = processes.own(args.device)
    if args.gradient_checkpointing is None:  # the capitals' conversations are short
        args.gradient_checkpointing = not args.tiny and args.data != "capitals"
    args.bases = [folder_of(name, args) for name in args.base]
    args.begun, args.costs = 0, training_costs(args)


def refuse_missing(args) -> None:
    """UsageError, before anything is trained, for what is named and is not there, or does not fit."""
    first = args.bases[0]
    made = [full_folder(args).resolve()] if compares_with_full(args) else []
    named = ("base", args.base), ("value", [args.value]), ("teacher", [args.teacher])
    for flag, names in (*named, ("with", args.plugged)):
        for name in filter(None, names):
            is_tiny = is_scratch(name) or find_tiny(name, [args.home]) is not None
            if not is_tiny and Path(name).resolve() not in made and not Path(name).is_dir():
                raise UsageError(f"--{flag} {name}: no such folder{hub_hint(Path(name))}")
            if first.is_dir() and not is_tiny and Path(name).is_dir():
                check_same_family(load_tokenizer(first), load_tokenizer(name), str(first), name)
    if args.data not in (None, "capitals") and not Path(args.data).exists():
        raise UsageError(f"--data {args.data}: no such file")


def folder_of(name: str, args) -> Path:
    """Where a network is: a tiny one under out/seedN, any other at its path."""
    return find_tiny(name, [args.home]) or with_a_name(name)


def bases_to_pretrain(args) -> list[tuple[str, Path]]:
    """Names and folders of the tiny bases to make first.

    What is asked for, or needed and missing.
    """
    if args.job == "pretrain":
        for name in args.base:
            if find_tiny(name, [args.home]) is None:
                raise UsageError(
                    f"--base {name} alone: nothing to train on a checkpoint; add --value or --full, "
                    "and --data"
                )
        return [(name, args.out or args.home / name) for name in args.base]
    names = dict.fromkeys([*args.base, args.teacher, args.value])  # each once
    needed = [(name, args.home / name) for name in names if name in TINY_SIZES]
    missing = [(name, path) for name, path in needed if not is_finished(path)]
    if missing or compares_with_full(args):
        refuse_missing(args)
    return missing


def compares_with_full(args) -> bool:
    """Whether a value network's table has full fine-tuning in it."""
    if args.job != "value" or args.data or args.no_full:
        return False
    return args.loss not in ("pairwise", "reward")


def training_costs(args) -> list[float]:
    """About how many tokens each network of the command is trained on, in turn, for the time left.

    Finished ones are left out. A value network's tokens count for a third more: the base reads
    them.
    """
    post = float(TINY_POST_TRAINING["steps"] * TINY_POST_TRAINING["batch_size"] * TINY_CONVERSATION)
    bases = bases_to_pretrain(args)
    costs = [float(TINY_SIZES[name][1]) for name, out in bases if not is_finished(out)]
    if args.job not in ("pretrain", "value"):
        costs.append(post)
    if args.job == "value":
        if compares_with_full(args) and not is_finished(full_folder(args)):
            costs.append(post)
        costs.append(post * 4 / 3)
    return costs


def pretraining_job(name: str, out: Path, args, processes: Alone) -> Job | None:
    """A tiny base, from nothing; None if it is finished."""
    _, tokens, lr = TINY_SIZES[name]
    flags = args.flags if args.job == "pretrain" else {}
    chosen = TINY_PRETRAINING | dict(lr=lr) | flags
    chosen.setdefault("steps", max(1, tokens // (chosen["batch_size"] * chosen["max_length"])))
    world = World(args.seed)
    return pretraining(
        f"scratch:{name}",
        world,
        out,
        args,
        chosen,
        processes,
        tokenizer=lambda: world.tokenizer_for(name),
        build=lambda tokenizer: Llama(tiny_config(name, tokenizer)),
    )


def full_job(args, processes: Alone) -> Job | None:
    """Full fine-tuning of the first base, as asked for or as usual; None if it is finished."""
    bases = args.bases[:1]
    start, out = str(bases[0]), full_folder(args)
    if args.job == "full":
        return post_training(
            args, processes, bases, "", start, args.out or out, args.data, args.flags, {}
        )
    return post_training(args, processes, bases, "", start, out, None, {}, {}, keep=True)


def full_folder(args) -> Path:
    return args.home / f"full-{name_of(args.bases[0])}"


def value_job(args, processes: Alone) -> Job | None:
    """A value network on all bases; None if it is finished."""
    if args.teacher:
        args.teacher = str(folder_of(args.teacher, args))
        refuse_value_network("--teacher", Path(args.teacher))
    start = args.value
    if start and not is_scratch(start):
        start = str(folder_of(start, args))
    recorded = {}  # what is known of a value network that is trained further
    if start and (Path(start) / "ivl.json").is_file():
        recorded = read_value_info(start, SCHEMES)
    scheme, start = choose_scheme(args, args.bases, start, recorded)
    plugged = [str(folder_of(name, args)) for name in args.plugged]
    out = args.out or args.home / value_name(scheme, args, args.bases, start)
    loss = ("l1", "l1_over", "loss", "beta", "temperature", "teacher", "answers", "answer_length")
    flags = args.flags | {name: getattr(args, name) for name in loss} | {"plugged": tuple(plugged)}
    job = post_training(args, processes, args.bases, scheme, start, out, args.data, flags, recorded)
    if job is not None and compares_with_full(args):
        job.full_metrics = {"full": read_metrics(full_folder(args), "full")["full"]}
    return job


def pretraining(
    start: str,
    world: World,
    out: Path,
    args,
    chosen: dict,
    processes: Alone,
    tokenizer: Callable[[], Tokenizer],
    build: Callable[[Tokenizer], Llama],
    documents: Callable[[], Iterator[str]] = lambda: None,
) -> Job | None:
    """Pretraining on the tiny world's text, or on other `documents`; None if it is finished."""
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
        data=world.name,
        data_hash="",
        template="",
        seed=args.seed,
        dtype=args.dtype,
        **chosen,
    )
    run = Run(out, settings, args.resume, args.save_every, processes)
    if run.finished:
        print(f"{out}: finished already")
        return None
    tokenizer = tokenizer()

    def batches(position: list[int] | None) -> Iterator:
        sizes = settings.steps, settings.batch_size, settings.max_length
        return world.batches(tokenizer, *sizes, position, documents())

    return make_job(args, run, tokenizer, partial(build, tokenizer), batches, world)


def post_training(
    args,
    processes: Alone,
    bases: list[Path],
    scheme: str,
    start: str,
    out: Path,
    data: str | None,
    flags: dict,
    recorded: dict,
    keep: bool = False,
) -> Job | None:
    """A value network on frozen bases or, with no scheme, full fine-tuning of a copy of the first.

    None if it is finished. What a value network `recorded` that is trained further, it keeps.
    `keep` is content with a finished run of these settings.
    """
    for base in bases:
        refuse_value_network("--base", base)
    loss, plugged = flags.get("loss", "ce"), list(map(Path, flags.get("plugged", [])))
    width = args.probe_width if scheme == "probe" else 0
    frozen = bases + ([Path(flags["teacher"])] if flags.get("teacher") else []) + plugged
    build, longest, tokenizer = choose_network(start, frozen, scheme, width, recorded)
    template, system = None, None  # those of what is plugged in already
    for path in plugged:
        template, system = read_plugged(path, scheme, args.template or template)
    data, exam, usual = choose_data(args, bases, data, loss, bool(recorded))
    max_length = flags.get("max_length", min(4096, longest))  # Table 5
    if max_length > longest:
        raise UsageError(f"--max-length {max_length}: the checkpoint was made for {longest} tokens")
    usual_template = TEMPLATE if isinstance(exam, World) else default_template(tokenizer)
    template = args.template or recorded.get("template") or template or usual_template
    system = recorded.get("system", system) if args.system is None else args.system
    system = system_of(tokenizer, template, system)
    kind = {"pairwise": PairDataset, "reward": QuestionDataset}.get(loss, ChatDataset)
    dataset = kind(data, tokenizer, template, max_length, system, args.reasoning)
    dataset.room = flags.get("answer_length", 0)
    train_on, held_out = list(range(len(dataset))), []
    if exam is None:
        train_on, held_out = hold_out(dataset, args.seed, args.held_out)
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
        held_out=len(held_out),
        system=system,
        reasoning=args.reasoning,
        max_length=max_length,
        **with_usual(build, usual, flags, len(train_on)),
    )
    resume = args.resume or keep and (out / "train.json").exists()
    run = Run(out, settings, resume, args.save_every, processes)
    if run.finished:
        if not keep:
            print(f"{out}: finished already")
            print_metrics(read_metrics(out))
        return None

    say_other_template(str(bases[0]), bases[0], template, "trained")
    batches = partial(stream_batches, dataset, train_on, settings.batch_size, settings.seed)
    held = {"pairwise": HeldOutPairs, "reward": HeldOutQuestions}
    if loss in held and exam is None:
        exam = held[loss](dataset, held_out)
    job = make_job(args, run, tokenizer, build, batches, exam, dataset, train_on, held_out)
    job.shows_alone = scheme not in ("", "probe") and isinstance(exam, Capitals)
    return job


def make_job(
    args,
    run: Run,
    tokenizer: Tokenizer,
    build: Callable[[], nn.Module],
    batches: Callable,
    exam: World | Capitals | HeldOutPairs | HeldOutQuestions | None,
    dataset: ChatDataset | None = None,
    train_on: Sequence[int] = (),
    held_out: Sequence[int] = (),
) -> Job:
    settings = run.settings
    args.begun += 1
    args.next = next_command(run, isinstance(exam, World))
    run.later = sum(args.costs[args.begun :])
    place = f"{args.begun} of {len(args.costs)}: " if len(args.costs) > 1 else ""

    def prepare(network: nn.Module) -> None:
        for part in network.modules():
            if hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = args.gradient_checkpointing
        print(place, end="")
        announce(run, network, dataset, held_out)
        if settings.l1:
            weigh_the_norm(settings, dataset, train_on)

    def ask(guided: Guided) -> dict[str, float | None]:
        if run.processes.rank:  # the first process measures
            return {}
        template, pairs = settings.template or TEMPLATE, settings.loss == "pairwise"
        return examine(guided, exam, tokenizer, template, system=settings.system, pairs=pairs)

    return Job(
        settings=settings,
        run=run,
        tokenizer=tokenizer,
        device=args.device,
        build=build,
        batches=batches,
        faster=partial(faster_loss, args=args),
        examine=None if exam is None else ask,
        prepare=prepare,
        info=value_info(settings, tokenizer),
        dataset=dataset,
        held_out=held_out,
        watch=watch,
    )


def read_plugged(path: Path, scheme: str, template: str | None) -> tuple[str, str]:
    """Template and system prompt of a value network that guides the bases already."""
    info = read_value_info(path, SCHEMES)
    if scheme != "residual" or info["scheme"] != "residual":
        raise UsageError(
            f"--with {path}: only residual value networks can be added; its scheme is {info['scheme']}, and "
            f"that of the new one {scheme}"
        )
    if template not in (None, info["template"]):
        raise UsageError(
            f"--with {path}: it was trained in template {info['template']}, and not in {template}"
        )
    return info["template"], info.get("system", "")


def choose_data(
    args, bases: list[Path], data: str | None, loss: str, further: bool
) -> tuple[str, World | Capitals | None, dict | None]:
    """The file to train on, the exam that goes with it, and what is usual; None: Table 5's."""
    usual = None
    if all(world_of(path) for path in bases):
        usual = TINY_REWARDS if loss == "reward" else TINY_POST_TRAINING
        if loss == "pairwise":
            usual = TINY_PAIRS_LATER if further else TINY_PAIRS
    if data == "capitals":
        exam = Capitals(args.seed)
        name, records, usual = "capitals", exam.demonstrations(), CAPITALS_TRAINING
        if loss == "pairwise":
            name, records, usual = "capital-pairs", exam.preferences(), CAPITALS_PAIRS
        if loss == "reward":
            name, records, usual = "capital-questions", exam.questions(), CAPITALS_REWARDS
        return str(exam.write(records, args.home / f"{name}.jsonl")), exam, usual
    if data is not None:
        return data, None, usual
    world = common_world(bases)
    name, records = "demonstrations", world.demonstrations()
    if loss == "pairwise":
        name, records = "preferences", world.preferences()
    if loss == "reward":
        name, records = "questions", world.questions()
    file = Path("out") / f"seed{world.seed}" / f"{name}.jsonl"
    return str(world.write_demonstrations(file, records)), world, usual


def with_usual(
    build: Callable[[], nn.Module], usual: dict | None, flags: dict, conversations: int
) -> dict:
    """What was asked for, over what is usual; epochs become steps.

    `usual` None is Table 5's, by the network's size.
    """
    with without_weights():
        parameters = sum(parameter.numel() for parameter in build().parameters())
    chosen = (usual or table5(parameters)) | flags
    chosen.pop("max_length", None)
    epochs = chosen.pop("epochs", None)
    if epochs and "steps" not in flags:
        chosen["steps"] = max(1, round(epochs * math.ceil(conversations / chosen["batch_size"])))
    return chosen


# --------------------------------------------------------------------------------------------------
# What is said of a job


def value_info(settings: Settings, tokenizer: Tokenizer) -> dict:
    """What ivl.json will say."""
    info = {
        "scheme": settings.scheme,
        "l1": settings.l1,
        "template": settings.template,
        "bases": settings.bases,
        "data": settings.data,
        "seed": settings.seed,
        "steps": settings.steps,
        "tokenizer": describe_tokenizer(tokenizer),
    }
    if settings.probe_width:
        info["probe_width"] = settings.probe_width
    if settings.system:
        info["system"] = settings.system
    if settings.loss == "pairwise":
        info |= {"loss": "pairwise", "beta": settings.beta}
    if settings.loss == "kl":
        info |= {
            "loss": "kl",
            "teacher": settings.teacher,
            "temperature": settings.temperature,
        }
    if settings.loss == "reward":
        info |= {"loss": "reward", "beta": settings.beta, "answers": settings.answers}
    if settings.plugged:
        info["plugged"] = settings.plugged
    return info


def announce(
    run: Run, network: nn.Module, dataset: ChatDataset | None, held_out: Sequence[int]
) -> None:
    """Say what is trained, of what size, from what, on what."""
    settings = run.settings
    parameters = sum(parameter.numel() for parameter in network.parameters())
    size = f"{parameters / 1e6:.2f}M parameters"
    if settings.job == "pretrain":
        tokens = settings.steps * settings.batch_size * settings.max_length
        says = f"pretraining {run.out.name}, {size}, on {tokens:,} tokens of {settings.data}"
    else:
        what = f"a value network ({settings.scheme})" if settings.scheme else "in full"
        says = f"training {what}, {size}, from {settings.start}, "
        says += f"on {dataset.report(held_out)}, template {settings.template}"
    if settings.system:
        says += f", system prompt {settings.system[:60]!r}"
    if settings.loss == "pairwise":
        says += f", beta {settings.beta:g}"
    if settings.loss == "kl":
        says += f", teacher {settings.teacher}, temperature {settings.temperature:g}"
    if settings.loss == "reward":
        says += f", {settings.answers} sampled answers to each, beta {settings.beta:g}"
    if settings.plugged:
        says += f", on a base guided by {' and '.join(settings.plugged)}"
    print(f"{says} -> {run.out}", flush=True)


def next_command(run: Run, tiny: bool) -> str:
    """What there is to do when this network is done."""
    settings, out = run.settings, run.out
    seed = f" --seed {settings.seed}" if settings.seed else ""
    if settings.job == "pretrain":
        value = newest_value(out.name) if out.name in TINY_SIZES else None
        if value is not None and value.parent == out.parent:
            return f"python sample.py --base {out.name}"
        name = out.name if out.name in TINY_SIZES else out
        return f"python train.py --base {name} --value{seed}"
    base = Path(settings.bases[0])
    command = "python sample.py"
    if settings.job == "full":
        command += f" --expert {out}"
    elif out.parts[0] != "out":  # elsewhere than where the newest is looked for
        command += f" --value {out}"
    if not tiny:
        return f"{command} --base {base} --chat"
    bigger = f"{base.name[:-1]}l"
    if bigger == base.name or bigger not in TINY_SIZES:
        return command
    command += f" --base {bigger}"
    if is_finished(base.parent / bigger):
        return command
    return f"python train.py --base {bigger}{seed} && {command}"


def weigh_the_norm(settings: Settings, dataset: ChatDataset, train_on: Sequence[int]) -> None:
    """Print which lambda of the paper this one weighs like, measured on the first conversations.

    The paper's norm is a mean over all positions of rows padded to max_length. It stands beside a
    cross-entropy that is a mean over supervised positions, as ours does. So what counts is the
    share that these have of the positions that the norm is a mean of.
    """
    rows = []
    for index in train_on[:1000]:
        rows += dataset.rows(index)
    if not rows:
        return
    text = sum(len(ids) - 1 for ids, _ in rows) / len(rows)  # positions of a row
    supervised = mean_supervised(rows)
    # rows of a batch are of like length, so "all" has hardly any padding
    averaged = text if settings.l1_over == "all" else supervised
    theirs = settings.l1 * settings.max_length / averaged
    print(
        f"norm: lambda {settings.l1:g} over {settings.l1_over} positions weighs like the paper's "
        f"lambda {theirs:.3g}, which is over rows padded to {settings.max_length} tokens; here "
        f"{text:.1f} of them are text and {supervised:.1f} supervised",
        flush=True,
    )


# --------------------------------------------------------------------------------------------------
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
    start: str, bases: list[Path], scheme: str, probe_width: int, recorded: dict
) -> tuple[Callable[[], nn.Module], int, Tokenizer]:
    """How to build the network to train, the most tokens a conversation may have, and the tokenizer.

    `start` is a folder, or scratch (the first base's architecture) or scratch:NAME (a tiny one's).
    `recorded` is what its ivl.json says, if it has one.
    """
    configs = {str(path): read_config(path) for path in bases}
    tokenizers = [load_tokenizer(path) for path in bases]
    _, _, size = start.partition(":")
    own_tokenizer = tokenizers[0] if is_scratch(start) else load_tokenizer(start)
    if recorded:
        check_recorded(own_tokenizer, recorded, Path(start))
    for other, path in zip(tokenizers, bases):
        check_same_family(other, own_tokenizer, str(path), start)
    # what all of them can read
    tokenizer = min([own_tokenizer, *tokenizers], key=lambda each: each.vocab_size)
    if scheme == "probe":
        build = partial(Probe, tokenizer.vocab_size, probe_width)
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
        build = partial(Llama, config)
        configs = {start: config} | configs
    for path, config in configs.items():
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                f"{path}: {config.vocab_size} rows in lm_head, but its tokenizer has {tokenizer.vocab_size} tokens"
            )
    return build, min(config.max_position_embeddings for config in configs.values()), tokenizer


def choose_scheme(args, bases: list[Path], start: str, info: dict) -> tuple[str, str]:
    """The scheme, and where the value network's first weights come from.

    What is trained further keeps its scheme, which `info` says.
    """
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
    """value-residual-tiny-s: the scheme, the first weights, and what differs from the default."""
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
    if args.plugged:
        parts += ["with", *(name_of(Path(path)) for path in args.plugged)]
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


def with_a_name(path: str) -> Path:
    """Its last part names the run, so "." and ".." are spelled out."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
