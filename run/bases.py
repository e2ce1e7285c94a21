"""The base that is decoded with: what computes it, and in which form it is asked.

python sample.py --base out/gemma-3-270m --value out/seed0/value-residual-smollm2-135m --base-prompt qa
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data.chat import (
    TEMPLATES,
    can_speak,
    encode_chat,
    end_token,
    read_chat,
    system_of,
    with_system,
)
from data.checkpoint import own_template, why_foreign
from data.errors import OtherArchitecture, UsageError
from data.files import base_folder, read_json
from data.tokenizer import Tokenizer
from model import Llama, read_config
from run.processes import Alone
from run.tensor_parallel import load_divided
from vocab_map import VocabMap

FORMS = ("own", "value", "qa")


def is_foreign(path: Path) -> bool:
    """Whether transformers computes a base, since model.py does not; UsageError where neither does."""
    try:
        read_config(path)
    except OtherArchitecture:
        return True
    return False


def load_base(path: Path, dtype: str, device: str, processes: Alone) -> Llama:
    """A base to decode with: whole, or divided between several processes; by transformers where it must be."""
    load = Llama.from_pretrained if processes.count == 1 else load_divided
    if is_foreign(path):
        reason = why_foreign(read_json(base_folder(path) / "config.json"))
        try:
            from beyond.foreign import Foreign
        except ImportError:
            raise UsageError(
                f"{path}: {reason}; beyond/foreign.py, which has transformers compute it, is not there"
            ) from None
        if importlib.util.find_spec("transformers") is None:
            raise UsageError(
                f"{path}: {reason}; this base takes transformers: pip install transformers"
            )
        if processes.count > 1:
            raise UsageError(f"{path}: {reason}; such a base is not divided between processes")
        print(f"{path}: {reason}; transformers computes it (beyond/foreign.py)", flush=True)
        load = Foreign.from_pretrained
    return load(path, getattr(torch, dtype), device)


def choose_form(args, path: Path, tiny: bool) -> str:
    """How a base with another tokenizer reads a conversation, one of FORMS; says so."""
    own = own_template(path)
    if args.base_prompt:
        form, reason = args.base_prompt, "as asked"
    elif tiny:
        form, reason = "value", "as always in the tiny world"
    elif own in TEMPLATES:
        form, reason = "own", "it has a chat_template"
    else:
        form, reason = "qa", f"its chat_template is {own}" if own else "it has no chat_template"
    print(f"the base is asked in form {form} ({reason}; --base-prompt takes {', '.join(FORMS)})")
    return form


def template_of(form: str, path: Path, tokenizer: Tokenizer, value_template: str) -> str | None:
    """The template of a form for a base's own tokens; None where it lacks the tokens of the value network's."""
    if form == "value":
        return value_template if can_speak(tokenizer, value_template) else None
    if form == "qa":
        return "qa"
    own = own_template(path)
    if own not in TEMPLATES:
        raise UsageError(
            f"--base-prompt own: the chat_template of {path} is {own or 'not there'}; qa asks without one"
        )
    return own


def asking(
    vocab_map: VocabMap, value_template: str, base_template: str, given: str | None
) -> Callable[[list[int]], list[int]]:
    """From a prompt in the value network's tokens and template to the base's.

    The value network's own system prompt is none of the base's; one that was given is. What is no
    conversation, a text of a task for instance, goes through the map as it is.
    """
    base, value = vocab_map.base_tokenizer, vocab_map.value_tokenizer

    def ask(prompt: list[int]) -> list[int]:
        turns = read_chat(value, value_template, prompt)
        if not turns:
            return vocab_map.in_base_tokens(prompt)[0]
        if given is None:
            turns = [turn for turn in turns if turn[0] != "system"]
        turns = with_system(system_of(base, base_template, given), turns)
        return encode_chat(base, base_template, turns)[0]

    return ask


def with_ends(vocab_map: VocabMap, value_template: str) -> VocabMap:
    """A map in which the base's end of a text or of a turn ends the value network's turn, and says nothing else."""
    base, value = vocab_map.base_tokenizer, vocab_map.value_tokenizer
    pieces = list(vocab_map.value_tokens)
    for token in {base.eos_id, base.end_of_turn_id}:
        pieces[token] = (end_token(value, value_template),)
    return replace(vocab_map, value_tokens=pieces)
