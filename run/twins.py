"""Which twin runs: the plain way of the scripts, or the fast one of fast/. Chosen here and nowhere else.

    python train.py --fast        python sample.py --plain        python sample.py --compile

Tiny networks take the plain way, on any device: what a student edits is what runs. Checkpoints take the fast one. --plain, --fast and, where decoding, --compile
decide otherwise. What was chosen is printed, with the reason. Where fast/ has been deleted, everything is plain.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.errors import UsageError
from data.tokenizer import Tokenizer
from ivl import ValueModel, triton
from model import Llama
from sample import Guided
from train import Settings, language_loss
from vocab_map import align_all

TINY_VOCABULARY = (
    10_000  # tokens; the tiny world's tokenizers have about 1000, real ones at least 32000
)
HAS_FAST = (Path(__file__).parents[1] / "fast").is_dir()


def takes_fast(what: str, args, tiny: bool, hindrance: str = "") -> bool:
    """Whether the fast twin of something runs; says so. A hindrance is why it cannot, if it cannot."""
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


def choose_loss(settings: Settings, args, teacher: Llama | None) -> Callable:
    """The loss of a value network on a base, with what belongs to it filled in, or that of a network by itself."""
    hindrance = "pairs have no fast twin" if settings.loss == "pairwise" else ""
    if settings.l1_over == "all":
        hindrance = "the norm over all positions takes all logits"
    of_value, of_teacher, by_itself = ValueModel.loss, ValueModel.teacher_loss, language_loss
    if takes_fast("loss", args, args.tiny, hindrance):
        from fast import loss

        of_value, of_teacher, by_itself = loss.value_loss, loss.teacher_loss, loss.language_loss
    if settings.job != "value":
        return by_itself
    if settings.loss == "pairwise":
        return partial(ValueModel.pair_loss, beta=settings.beta)
    if settings.loss == "kl":
        return partial(of_teacher, teacher=teacher, temperature=settings.temperature)
    if settings.l1_over == "all":
        return partial(ValueModel.loss, l1=settings.l1, over="all")
    return partial(of_value, l1=settings.l1)


def choose_guided(args, tiny: bool, device: str, processes: int = 1) -> type[Guided]:
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
