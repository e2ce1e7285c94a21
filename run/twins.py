"""Some functions of the scripts have a faster version in fast/. Which one runs is chosen here, and printed.

    python train.py --fast        python sample.py --plain        python sample.py --compile

Tiny networks take the plain way, on any device: what a student edits is what runs. Checkpoints take
the fast one. --plain, --fast and, where decoding, --compile decide otherwise. Where fast/ has been
deleted, everything is plain.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.errors import UsageError
from data.tokenizer import Tokenizer
from ivl import ValueModel, triton
from sample import Guided
from train import language_loss
from vocab_map import align_all

TINY_VOCABULARY = (
    10_000  # tokens; the tiny world's tokenizers have about 1000, real ones at least 32000
)
HAS_FAST = (Path(__file__).parents[1] / "fast").is_dir()


def takes_fast(what: str, args, tiny: bool, hindrance: str = "") -> bool:
    """Whether the faster version of something runs; says so. A hindrance is why it cannot."""
    if not HAS_FAST:
        hindrance = "there is no folder fast/"
    asked = "--compile" if args.compile else "--fast" if args.fast else ""
    if asked and hindrance:
        raise UsageError(f"{asked}: {hindrance}")
    if args.plain or asked:
        fast, reason = bool(asked), "as asked"
    elif tiny:
        fast, reason = False, "as always for tiny networks; --fast changes that"
    elif hindrance:
        fast, reason = False, hindrance
    else:
        fast, reason = True, "as always for checkpoints; --plain changes that"
    print(f"{what}: {'fast' if fast else 'plain'} ({reason})", flush=True)
    return fast


def faster_loss(loss: Callable, args) -> Callable:
    """The same loss from fast/loss.py, where that is to run.

    `loss` is train.language_loss, or one of ValueModel's with its settings filled in.
    """
    plain = loss.func if isinstance(loss, partial) else loss
    settings = dict(loss.keywords) if isinstance(loss, partial) else {}
    hindrance = ""
    if plain in (ValueModel.pair_loss, ValueModel.reward_loss):
        hindrance = "there is no faster one for pairs or rewards"
    elif getattr(args, "plugged", None):
        hindrance = "there is no faster one for a base that is guided already"
    elif settings.pop("over", "supervised") == "all":
        hindrance = "the norm over all positions takes all logits"
    if not takes_fast("loss", args, args.tiny, hindrance):
        return loss
    import fast.loss

    faster = {
        ValueModel.loss: fast.loss.value_loss,
        ValueModel.teacher_loss: fast.loss.teacher_loss,
        language_loss: fast.loss.language_loss,
    }
    return partial(faster[plain], **settings)


def choose_guided(
    args, tiny: bool, device: str, processes: int = 1, foreign: bool = False
) -> type[Guided]:
    """The class that takes guided steps."""
    hindrance = (
        ""
        if device.startswith("cuda")
        else "a captured step is a CUDA graph, and there is no CUDA device"
    )
    if processes > 1:
        hindrance = (
            f"a captured step is a CUDA graph of one process, and {processes} share this base"
        )
    if foreign:
        hindrance = (
            "a captured step is a CUDA graph of our own layers, and transformers has this base's"
        )
    if not takes_fast("decoding", args, tiny, hindrance):
        return Guided
    from fast.graphs import CapturedGuided, CompiledGuided

    if not args.compile:
        return CapturedGuided
    if triton is None:
        raise UsageError("--compile: torch.compile takes Triton on a GPU, and it is not installed")
    print(
        "compiling: the first answer waits for it, up to a minute; where this was done before, less",
        flush=True,
    )
    return CompiledGuided


def choose_alignment(args, base: Tokenizer, value: Tokenizer) -> Callable:
    """Algorithm 1's paths."""
    if takes_fast("alignment", args, max(base.vocab_size, value.vocab_size) <= TINY_VOCABULARY):
        from fast import alignment

        return alignment.align_all
    return align_all
