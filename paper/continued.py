"""Pretrain a tiny base further, as CodeLlama continues Llama-2 (Table 1).

    python -m paper.continued --base tiny-m                # makes out/seed0/tiny-m-continued
    python sample.py --base out/seed0/tiny-m-continued     # a value network plugged into it

A third of the text is about new people, whom no other base has read of, a third about the old ones,
the rest sums and unrelated sentences; the vocabulary grows by 16 tokens. A value network of the
family, which has seen neither, is plugged in as it is.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from data.errors import UsageError
from data.tiny_world import PIECES, World, world_of
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from model import Llama
from run.arguments import add_device, add_twins
from run.cli import ArgumentParser, non_negative_int, positive_int, run_cli
from run.jobs import bases_to_pretrain, complete, pretraining, pretraining_job, with_a_name
from run.plug import refuse_value_network
from run.processes import Alone, join_processes
from sample import Guided
from train import TINY_PRETRAINING, Job, first_weights, fit, language_loss, pretrain

SETTINGS = TINY_PRETRAINING | dict(lr=2e-3, steps=780)  # 0.8M tokens
# As CodeLlama's vocabulary extends Llama-2's by 16, so does this one: some documents begin with one
# of these. A value network of the family has never seen them, and z_delta is 0 there.
MARKERS = [f"<doc{number}>" for number in range(16)]

# ---------------------------------------------------------------------------------------------------------
# What is new: text, tokens, and their weights


def continued_documents(world: World, rng: random.Random) -> Iterator[str]:
    """Endless documents: half of them drawn for new people, a tenth with a marker in front.

    The other half is more of the old text, without which the old people would be forgotten. In both
    a third tells of nobody.
    """
    for document in world.documents(rng):
        if rng.random() < 0.5:
            person = rng.choice(world.new_people)
            document = world.add_noise(world.sentences(rng, person), rng)
        if rng.random() < 0.1:
            document = f"{rng.choice(MARKERS)} {document}"
        yield document


def add_pieces(model: bytes, pieces: list[str]) -> bytes:
    """A SentencePiece model with user-defined pieces behind its own.

    A tokenizer.model is a protocol buffer, whose field 1, one message per piece (text, score,
    type), is repeated; such fields may stand anywhere in the file, so what is appended is read as
    more pieces.
    """
    for piece in pieces:
        text = piece.encode()
        message = bytes([0x0A, len(text)]) + text  # field 1: the text
        message += bytes([0x15, 0, 0, 0, 0])  # field 2: the score, 0.0
        message += bytes([0x18, 4])  # field 3: the type, user-defined
        model += bytes([0x0A, len(message)]) + message
    return model


class MarkedTokenizer(SentencePieceTokenizer):
    """A tokenizer with the markers; only this class looks for one in front of a document."""

    def __init__(self, model: bytes):
        super().__init__(add_pieces(model, MARKERS))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        marker, _, rest = text.partition(" ")
        if marker not in MARKERS:
            return super().encode(text, bos, eos)
        ids = [
            self.processor.piece_to_id("\u2581"),
            self.processor.piece_to_id(marker),
            *super().encode(rest),
        ]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def widen(base: Llama, rows: int) -> Llama:
    """A copy of a base with `rows` more tokens, whose embeddings begin at the mean of all others."""
    config = dataclasses.replace(base.config, vocab_size=base.config.vocab_size + rows)
    wider = Llama(config).to(base.device)
    weights = base.state_dict()
    for name, tensor in wider.state_dict().items():  # these share memory with the parameters
        old = weights[name]
        tensor[: len(old)] = old
        if len(tensor) > len(old):
            tensor[len(old) :] = old.mean(0)
    return wider


# ---------------------------------------------------------------------------------------------------------
# The job


def continued_job(args: argparse.Namespace, processes: Alone) -> Job | None:
    """A pretraining on other documents; None if it is finished."""
    [start] = args.bases
    world, tokenizer = check_start(start)

    def documents() -> Iterator[str]:
        rng = random.Random(f"continued pretraining of world {world.seed}")
        return continued_documents(world, rng)

    return pretraining(
        str(start),
        world,
        args.out or args.home / f"{start.name}-continued",
        args,
        SETTINGS | args.flags,
        processes,
        tokenizer=lambda: MarkedTokenizer(tokenizer.model),
        build=lambda _: None,  # it starts from a base's weights
        documents=documents,
    )


def pretrain_further(job: Job) -> None:
    """train.pretrain, but from a base's weights, widened."""
    network = widen(first_weights(job), len(MARKERS))
    fit(network, job.faster(language_loss), [], job.batches, job.run)
    job.publish(network, {"base": job.examine(Guided(network))})


def check_start(start: Path) -> tuple[World, Tokenizer]:
    """The world and the tokenizer of a base that can be pretrained further."""
    refuse_value_network("--base", start)
    world = world_of(start)
    if world is None:
        raise UsageError(
            f"--base {start}: no tiny base, and the text to go on with is the tiny world's"
        )
    tokenizer = load_tokenizer(start)
    if tokenizer.kind != "sentencepiece":
        raise UsageError(
            f"--base {start}: its tokenizer is byte-level; only SentencePiece's take more pieces"
        )
    if tokenizer.vocab_size != PIECES:
        raise UsageError(f"--base {start}: continued already")
    return world, tokenizer


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--base",
        nargs=1,
        default=["tiny-m"],
        metavar="B",
        help="tiny-s, tiny-m, tiny-l or the folder of one (default tiny-m)",
    )
    parser.add_argument(
        "--steps", type=positive_int, metavar="N", help=f"(default {SETTINGS['steps']})"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help=f"rows per step (default {SETTINGS['batch_size']})",
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="of everything random (default 0)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="(default B-continued, under out/seedN)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the same run"
    )
    add_device(parser)
    add_twins(parser)
    # what train.py has flags for, and a job asks for
    parser.set_defaults(job="continue", teacher="", value=None, plugged=[], data=None, dtype=None)
    parser.set_defaults(gradient_checkpointing=False, shard=False, save_every=200)
    args = parser.parse_args()
    args.out = None if args.out is None else with_a_name(args.out)
    settings = ("steps", "batch_size")
    args.flags = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    return args


def main():
    args = arguments()
    with join_processes(args) as processes:
        complete(args, processes)
        for name, out in bases_to_pretrain(args):
            if job := pretraining_job(name, out, args, processes):
                pretrain(job)
        if job := continued_job(args, processes):
            pretrain_further(job)


if __name__ == "__main__":
    run_cli(main)
