"""Find and load what a command names, and check that it fits together.

python sample.py --base tiny-l --value out/seed0/value-residual-tiny-s
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data.chat import TEMPLATES, default_template, system_of
from data.checkpoint import is_a_path, name_of, own_template, read_value_info, stamp
from data.errors import UsageError
from data.files import digest, read_json
from data.tiny_world import TINY_SIZES, World, world_of
from data.tokenizer import Tokenizer, describe_tokenizer, is_same_family, load_tokenizer
from ivl import SCHEMES, SumDelta, ValueModel
from model import Llama
from run.bases import asking, choose_form, is_foreign, load_base, template_of, with_ends
from run.device import pick_device
from run.processes import Alone
from run.twins import TINY_VOCABULARY, choose_guided
from sample import Guided, MappedGuided, Speaker
from vocab_map import VocabMap, build

# ---------------------------------------------------------------------------------------------------------
# Names


def find_tiny(name: str, homes: list[Path]) -> Path | None:
    """Where the tiny base of this name is or, if it is in none of `homes`, would be; None for the path of a checkpoint."""
    if name in TINY_SIZES:
        return next((home / name for home in homes if (home / name).is_dir()), homes[-1] / name)
    if name.startswith(("tiny-", "tiny_")) and not Path(name).exists():
        raise UsageError(f"{name}: no such tiny model; there are {', '.join(TINY_SIZES)}")
    return None


def newest_value(base: str | None) -> Path | None:
    """The newest value network under out/. With a base, one of its kind: tiny ones go with tiny ones."""
    found = sorted(Path("out").glob("**/ivl.json"), key=lambda path: -path.stat().st_mtime)
    found = [path for path in found if not any(part.endswith(".training") for part in path.parts)]
    if base is None:
        return found[0].parent if found else None
    tiny = find_tiny(base, [Path("out")]) is not None
    tiny = tiny or load_tokenizer(base).vocab_size <= TINY_VOCABULARY
    for path in found:
        size = read_value_info(path.parent, SCHEMES)["tokenizer"]["size"]
        if (size <= TINY_VOCABULARY) == tiny:
            return path.parent
    return None


def find_base(name: str, value: Path | None, info: dict) -> Path:
    """The folder of a base, as asked for: near the value network and its own base, or in out/seed0."""
    homes = [Path("out/seed0")] if value is None else [value.parent, Path(info["bases"][0]).parent]
    path = find_tiny(name, homes)
    if path is None:
        return Path(name)
    if not path.is_dir():
        world = value and world_of(value)
        command = f"python train.py --base {name} --seed {world.seed if world else 0}"
        raise UsageError(f"{path}: not there yet; `{command}` makes it, in a few minutes")
    return path


def refuse_value_network(flag: str, path: Path) -> None:
    if (path / "ivl.json").exists():
        raise UsageError(f"{flag} {path}: a value network, which is no base; --value takes one")


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def check_recorded(tokenizer: Tokenizer, info: dict, value: Path) -> None:
    """UsageError if the tokenizer beside a value network is not the one it was trained with."""
    if describe_tokenizer(tokenizer) != info["tokenizer"]:
        raise UsageError(f"{value}: its tokenizer is not the one that its ivl.json records")


def check_same_family(
    base_tokenizer: Tokenizer, value_tokenizer: Tokenizer, base: str, value: str
) -> None:
    """UsageError unless one vocabulary extends the other."""
    if not is_same_family(base_tokenizer, value_tokenizer):
        raise UsageError(
            f"{base} and {value} have unrelated vocabularies ({base_tokenizer.vocab_size} and "
            f"{value_tokenizer.vocab_size} tokens), so they cannot be trained together; plugging one into "
            "the other while decoding takes a vocabulary map, which sample.py makes"
        )


def choose_map(args, base: Tokenizer, value: Tokenizer, scheme: str) -> VocabMap:
    """The vocabulary map that was asked for, or one made from the two tokenizers."""
    if scheme != "residual":
        raise UsageError(
            f"a value network of scheme {scheme} reads the base's logits over its own vocabulary, so it has no use "
            "for a base with another tokenizer; a residual one has"
        )
    if args.vocab_map:
        return VocabMap.load(args.vocab_map, base, value)
    print(
        "the base has another tokenizer than the value network: made a vocabulary map from the two (vocab_map.py)",
        flush=True,
    )
    return build(base, value)


# ---------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class Plugged:
    """What a command of sample.py asks for, loaded."""

    guided: Speaker  # the base with something plugged in
    alone: Speaker  # the same base by itself; that is all there is where there is no value network
    on_its_own: (
        Callable[[], Speaker] | None
    )  # what is plugged in, in the base it was trained on, where that is another
    guide: str  # what guides, in words; "" is nothing
    world: World | None
    guide_paths: list[Path]  # the folders of the value networks, or of the expert
    base_path: Path
    own_path: Path  # the base that the value network was trained on, or the anti-expert
    processes: Alone

    @property
    def speakers(self) -> list[Speaker]:
        """The base alone and, if something guides it, the base guided."""
        return [self.alone, self.guided] if self.guide else [self.alone]


def plug_in(args, processes: Alone = Alone()) -> Plugged:
    """Load and check everything that guided decoding needs; several processes divide the base between them.

    UsageError where things do not fit, or where there is nothing to ask: no --prompt, no chat, no tiny world.
    """
    if args.web and processes.count > 1:
        raise UsageError("--web is a page of one process; leave it out, or start without torchrun")
    guide = find_guide(args)
    if guide is None:
        return plug_nothing_in(args, processes)
    value_path, info, own_path = guide
    value_paths = [value_path, *map(Path, (args.value or [])[1:])]
    base_path = find_base(args.base, value_path, info) if args.base else own_path
    refuse_value_network("--base", base_path)
    # the tokenizers of the base and of what z_delta is made of
    plugs = [value_path, own_path] if args.expert else value_paths
    base_tokenizer, *tokenizers = [load_tokenizer(path) for path in [base_path, *plugs]]
    if not args.expert:
        check_recorded(tokenizers[0], info, value_path)
    if len(value_paths) > 1:
        check_sum(value_paths, tokenizers, info, args)
    for path, other in zip(plugs[1:], tokenizers[1:]):
        check_same_family(tokenizers[0], other, str(value_path), str(path))
    tokenizer = min(tokenizers, key=lambda each: each.vocab_size)  # what all of them can read
    vocab_map = None
    if args.vocab_map or not is_same_family(base_tokenizer, tokenizer):
        vocab_map = choose_map(args, base_tokenizer, tokenizer, info["scheme"])
    else:
        both = tokenizer, base_tokenizer
        tokenizer = base_tokenizer = min(both, key=lambda each: each.vocab_size)
    world = world_of(base_path)
    refuse_no_question(args, world)
    # the networks
    device, dtype = pick_device(args.dtype, world is not None, args.device)
    device = processes.own(device)
    if vocab_map is not None and args.compile:
        raise UsageError(
            "--compile: steps through a vocabulary map are not captured, so there is nothing to compile"
        )
    if vocab_map is None and args.base_prompt:
        raise UsageError(
            f"--base-prompt: {base_path} and {value_path} read the same tokens, so also the same prompt"
        )
    kind = (
        choose_guided(args, world is not None, device, processes.count, is_foreign(base_path))
        if vocab_map is None
        else None
    )
    system = info.get("system", "") if args.system is None else args.system
    template = alone_template = info["template"]
    alone_system, ask = system, None
    if vocab_map is not None:
        form = choose_form(args, base_path, world is not None)
        asked_in = template_of(form, base_path, base_tokenizer, template)
        alone_template = asked_in or default_template(base_tokenizer)
        if form != "value":
            alone_system = system_of(base_tokenizer, alone_template, args.system)
            ask = asking(vocab_map, template, alone_template, args.system)
        if vocab_map.how == "pieces":
            vocab_map = with_ends(vocab_map, template)
    print(
        f"base {base_path}, {describe_guide(args, value_path, own_path, info)}, template {template}"
        + (f", system prompt {system[:60]!r}" if system else "")
    )
    load = partial(Llama.from_pretrained, dtype=getattr(torch, dtype), device=device)
    if args.expert:
        value = SumDelta(list(map(load, plugs)), [1.0, -1.0])
    elif len(value_paths) > 1:
        names = [path.name for path in value_paths]
        if len(set(names)) < len(names):
            names = list(map(str, value_paths))
        value = SumDelta(list(map(load, value_paths)), args.weights, names)
    elif args.scheme:
        value = ValueModel(load(value_path), info)
    else:
        value = ValueModel.from_pretrained(value_path, getattr(torch, dtype), device)
    base = load_base(base_path, dtype, device, processes)
    if args.expert or args.scheme:  # what our own training has not made
        flag = "--expert" if args.expert else "--value"
        say_other_template(f"{flag} {value_path}", value_path, template, "asked")
    if info["scheme"] == "probe" and base.config.vocab_size < value.vocab_size:
        raise UsageError(
            f"{base_path}: {base.config.vocab_size} logits, and the probe reads {value.vocab_size}"
        )
    plug = "proxy" if args.expert else " + ".join(["value"] * len(value_paths))
    guide_words = "the value networks" if len(value_paths) > 1 else "the value network"
    if vocab_map is None:
        guided = kind(base, value, args.alpha, tokenizer.vocab_size)
    else:
        guided = guide_mapped(base, value, vocab_map, args.alpha, ask, asked_in == "qa")
    kind = kind or Guided
    alone = kind(base, readable=base_tokenizer.vocab_size if vocab_map else guided.readable)

    def on_its_own() -> Speaker:
        own = kind(load(own_path), value, args.alpha, tokenizer.vocab_size)
        return Speaker(f"{name_of(own_path)} + {plug}", own, tokenizer, template, system)

    is_other = own_path.resolve() != base_path.resolve() and own_path.is_dir()
    return Plugged(
        guided=Speaker(f"{name_of(base_path)} + {plug}", guided, tokenizer, template, system),
        alone=Speaker(
            f"{name_of(base_path)} alone", alone, base_tokenizer, alone_template, alone_system
        ),
        on_its_own=on_its_own if is_other else None,
        guide="proxy tuning" if args.expert else guide_words,
        world=world,
        guide_paths=value_paths,
        base_path=base_path,
        own_path=own_path,
        processes=processes,
    )


def refuse_no_question(args, world: World | None) -> None:
    if not (world or args.chat or args.prompt or args.web or args.brings_questions):
        raise UsageError(
            "this base is not from the tiny world, which brings its own questions; ask with --prompt or --chat"
        )


def plug_speaker(args, processes: Alone = Alone()) -> Speaker:
    """For scripts that bring their questions: the guided base or, without --value and --expert, the base alone."""
    if args.value or args.expert:
        plugged = plug_in(args, processes)
        folders = [plugged.base_path, *plugged.guide_paths]
        if args.expert:
            folders.append(plugged.own_path)
        stamps = [stamp(folder) for folder in folders]
        if args.vocab_map:
            stamps.append(digest(args.vocab_map))
        return replace(plugged.guided, stamp=" ".join(stamps))
    if not args.base:
        raise UsageError(
            "name what is measured: --base for a base alone, --value or --expert for what guides it"
        )
    return load_alone(args, processes)


def plug_nothing_in(args, processes: Alone) -> Plugged:
    """A base that answers by itself, as nothing was named or found that guides it."""
    if args.explains:
        raise UsageError(
            f"--base {args.base}: no value network was named with --value, and none of its kind is under "
            "out/; without one there is nothing to explain, draft or show beside it"
        )
    path = find_base(args.base, None, {})
    world = world_of(path)
    refuse_no_question(args, world)
    print(
        f"no value network of the kind of {path} under out/, and none named: the base answers alone"
    )
    alone = load_alone(args, processes)
    return Plugged(alone, alone, None, "", world, [path], path, path, processes)


def load_alone(args, processes: Alone) -> Speaker:
    """The base that --base names, by itself."""
    path = find_base(args.base, None, {})
    refuse_value_network("--base", path)
    tokenizer, tiny = load_tokenizer(path), world_of(path) is not None
    device, dtype = pick_device(args.dtype, tiny, args.device)
    device = processes.own(device)
    foreign = is_foreign(path)
    template = args.template or default_template(tokenizer)
    if not args.template and (foreign or args.base_prompt):
        form = choose_form(args, path, tiny)
        template = template_of(form, path, tokenizer, template) or template
    print(f"base {path} alone, template {template}")
    guided = choose_guided(args, tiny, device, processes.count, foreign)
    base = load_base(path, dtype, device, processes)
    say_other_template(f"--base {path}", path, template, "asked")
    return Speaker(
        f"{name_of(path)} alone",
        guided(base, readable=tokenizer.vocab_size),
        tokenizer,
        template,
        system_of(tokenizer, template, args.system),
        stamp=stamp(path),
    )


def find_guide(args) -> tuple[Path, dict, Path] | None:
    """The folder of the value network or expert, what is known of it, and the base it was trained on.

    None where none is named and none found, and there is a base.
    """
    if args.expert:
        path, info = Path(args.expert), read_expert(args)
    else:
        path = newest_value(args.base) if args.value is None else Path(args.value[0])
        if path is None and args.base:
            return None
        if path is None:
            raise UsageError(
                "no value network under out/ yet; `python train.py` trains one, in two to five minutes"
            )
        info = plain_info(args) if args.scheme else read_value_info(path, SCHEMES)
    if args.anti_expert:
        return path, info, find_base(args.anti_expert, path, info)
    # the base that it records; beside it if out/ was moved as a whole
    recorded = Path(info["bases"][0])
    beside = path.parent / recorded.name
    return path, info, beside if beside.is_dir() and not recorded.is_dir() else recorded


def plain_info(args) -> dict:
    """What an ivl.json would say of a plain Llama folder that was trained as a value network elsewhere, as the command has it."""
    path = Path(args.value[0])
    if (path / "ivl.json").exists():
        raise UsageError(
            f"--value {path}: it has an ivl.json, which says its scheme and template; leave out --scheme"
        )
    tokenizer = load_tokenizer(path)
    template = args.template or default_template(tokenizer)
    print(
        f"--value {path}: no ivl.json, so of how it was trained nothing is known but what the command says; of its tokenizer, "
        "only whether it fits the base's",
        flush=True,
    )
    return {
        "scheme": args.scheme,
        "template": template,
        "bases": [args.base],
        "tokenizer": describe_tokenizer(tokenizer),
        "system": system_of(tokenizer, template, None),
    }


def read_expert(args) -> dict:
    """What a value network's ivl.json would say of proxy tuning, with the anti-expert in place of its base."""
    expert = Path(args.expert)
    if (expert / "ivl.json").exists():
        raise UsageError(f"--expert {expert}: a value network, which is plugged in with --value")
    record = read_json(expert / "train.json") if (expert / "train.json").is_file() else {}
    untuned = [args.anti_expert] if args.anti_expert else record.get("bases")
    if not isinstance(untuned, list) or not untuned or not is_a_path(untuned[0]):
        raise UsageError(
            f"--expert {expert}: it does not record what it was tuned from; name that with --anti-expert"
        )
    template = args.template or record.get("template") or default_template(load_tokenizer(expert))
    if template not in TEMPLATES:
        raise UsageError(
            f"{expert}/train.json: template {template!r} is not supported; choose one with --template"
        )
    system = record.get("system")
    return {
        "bases": untuned,
        "template": template,
        "scheme": "residual",
        "system": system_of(
            load_tokenizer(expert), template, system if isinstance(system, str) else None
        ),
    }


def say_other_template(name: str, path: Path, template: str, use: str) -> None:
    """A line where a checkpoint's own chat_template is visibly another than the one it is used with."""
    own = own_template(path)
    if own not in (None, template):
        print(
            f"{name}: its own chat_template looks like {own}, and it is {use} in {template}",
            file=sys.stderr,
        )


def describe_guide(args, value: Path, own: Path, info: dict) -> str:
    if args.expert:
        return f"proxy tuning by {value} less {own}"
    if len(args.value or []) > 1:
        summands = [f"{weight:g} x {path}" for weight, path in zip(args.weights, args.value)]
        return f"value networks {' + '.join(summands)}"
    newest = "; the newest, --value names another" if args.value is None else ""
    made_for = " ".join(info.get("plugged", []))
    if made_for:
        newest += f"; made for a base guided by {made_for}: --value {made_for} {value} adds them"
    return f"value network {value} ({info['scheme']}{newest})"


def check_sum(paths: list[Path], tokenizers: list[Tokenizer], info: dict, args) -> None:
    """UsageError unless the z_deltas of these value networks can be added up, and they read one prompt."""
    for path, tokenizer in zip(paths[1:], tokenizers[1:]):
        other = read_value_info(path, SCHEMES)
        check_recorded(tokenizer, other, path)
        if not is_same_family(tokenizers[0], tokenizer):
            raise UsageError(
                f"--value: {paths[0]} and {path} have unrelated vocabularies ({tokenizers[0].vocab_size} and "
                f"{tokenizer.vocab_size} tokens), so their z_deltas cannot be added"
            )
        for network, scheme in ((paths[0], info["scheme"]), (path, other["scheme"])):
            if scheme != "residual":
                raise UsageError(
                    f"--value: {network} is a {scheme}, which reads the base's logits; only residual value "
                    "networks can be added"
                )
        if other["template"] != info["template"]:
            raise UsageError(
                f"--value: {paths[0]} was trained in template {info['template']}, {path} in "
                f"{other['template']}; they cannot read the same prompt"
            )
        if args.system is None and other.get("system", "") != info.get("system", ""):
            raise UsageError(
                f"--value: {paths[0]} and {path} were trained with different system prompts; "
                "--system TEXT says which"
            )


def guide_mapped(
    base: Llama,
    value: ValueModel,
    vocab_map: VocabMap,
    alpha: float = 1.0,
    ask: Callable[[list[int]], list[int]] | None = None,
    line_ends: bool = False,
) -> MappedGuided:
    """By Eq. (5) through maps of the paper's kind; by hypotheses and spelled paths through the one that needs no data."""
    if vocab_map.how != "pieces":
        return MappedGuided(base, value, vocab_map, alpha, ask)
    try:
        from beyond.hypotheses import Hypotheses
    except ImportError:
        raise UsageError(
            "decoding through a map made from the tokenizers alone takes beyond/hypotheses.py, which is not there; "
            "vocab_map.py --how paper makes a map that needs no more than sample.py"
        ) from None
    return Hypotheses(base, value, vocab_map, alpha, ask, line_ends)
