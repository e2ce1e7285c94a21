"""Every flag of the scripts, and what does not fit together.

python train.py --help        python sample.py --help        python vocab_map.py --help
"""

import argparse
from pathlib import Path

import sample
import train
import vocab_map
from data.chat import TEMPLATES
from data.files import check_output
from ivl import SCHEMES
from run.bases import FORMS
from run.cli import (
    DEVICES,
    ArgumentParser,
    any_float,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
)
from run.jobs import with_a_name
from vocab_map import HOWS

PAGE_TITLE = b"Where did post-training speak?"  # by which a page of --explain is known
MOST_AHEAD = 32  # tokens to draft at a time; as many as fast/graphs.py captures in one step
LLAMA_SCHEMES = [scheme for scheme in SCHEMES if scheme != "probe"]
epochs = number(float, 0, "positive number up to 10000", 10_001)
answers = number(int, 1, "whole number from 2 to 1000", 1001)
port = number(int, -1, "port from 0 to 65535", 2**16)
few = number(int, 0, f"whole number from 1 to {MOST_AHEAD}", MOST_AHEAD + 1)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="default: cuda, if there is one, or else cpu; mps is untested",
    )


def add_twins(parser: argparse.ArgumentParser, compiles: bool = False) -> None:
    group = parser.add_mutually_exclusive_group()
    parser.set_defaults(compile=False)
    group.add_argument(
        "--plain", action="store_true", help="run what the scripts say, also for checkpoints"
    )
    group.add_argument(
        "--fast", action="store_true", help="run the twins in fast/, also for tiny networks"
    )
    if compiles:
        group.add_argument(
            "--compile",
            action="store_true",
            help="that, and compile layers on a GPU: faster tokens, up to a minute later",
        )


# --------------------------------------------------------------------------------------------------
# train.py

VALUE_ONLY = [
    "l1",
    "l1_over",
    "no_full",
    "scheme",
    "probe_width",
    "loss",
    "beta",
    "teacher",
    "temperature",
    "answers",
    "answer_length",
    "with",
]
MEANS_NOTHING = {  # flags that a job has no use for
    "full": VALUE_ONLY,
    "pretrain": [*VALUE_ONLY, "data", "template", "epochs", "system", "reasoning"],
    "value": [],
}
DOING = {
    "full": "fine-tuning in full",
    "pretrain": "pretraining a base",
    "value": "training a value network",
}


def train_arguments() -> argparse.Namespace:
    """The flags of train.py; besides `job`, and `flags`, the settings that were given."""
    parser = ArgumentParser(
        description=train.__doc__.partition("\n")[0], epilog="With no flags: --base --value."
    )
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--base",
        nargs="*",
        metavar="B",
        help="frozen bases in turn: tiny-s, tiny-m, tiny-l or checkpoint "
        "folders (default tiny-s); alone: pretrain these tiny bases",
    )
    job = what.add_mutually_exclusive_group()
    job.add_argument(
        "--value",
        nargs="?",
        const="",
        metavar="V",
        help="train a value network; it starts as a copy of the "
        "first base, or from a folder, a tiny name, scratch, or scratch:tiny-m",
    )
    job.add_argument(
        "--full", action="store_true", help="fine-tune the base itself instead, in full"
    )
    what.add_argument(
        "--no-full",
        action="store_true",
        help="leave full fine-tuning out of the tiny world's table",
    )
    what.add_argument(
        "--scheme", choices=SCHEMES, help="how base and value network connect (default residual)"
    )
    what.add_argument(
        "--probe-width",
        type=positive_int,
        metavar="N",
        help=f"inner width of --scheme probe (default {train.PROBE_WIDTH})",
    )
    what.add_argument(
        "--l1",
        type=non_negative_float,
        default=0.0,
        metavar="LAMBDA",
        help="weight of the norm of z_delta "
        "(default 0). The paper's norm rows have 1.0, as a mean over all positions, prompt and padding included; "
        "ours is over the supervised ones, so 1 presses harder here, and what it weighs beside the paper's is printed",
    )
    what.add_argument(
        "--l1-over",
        choices=["supervised", "all"],
        help="positions that the norm is a mean of (default supervised), or all "
        "of a batch, padded to its longest row; with --grad-accum parts are weighed by their supervised positions",
    )
    what.add_argument(
        "--loss",
        choices=["ce", "pairwise", "kl", "reward"],
        help="cross-entropy of demonstrations (default), DPO's loss of pairs "
        "of answers, distillation from --teacher (Section 3.1), or rewards of sampled answers",
    )
    what.add_argument(
        "--beta",
        type=positive_float,
        help="of --loss pairwise, DPO's: a higher one keeps z_post nearer to z_base (default 0.1); "
        "of --loss reward, weight of KL(p_post || p_base) (default 0)",
    )
    what.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="of --loss kl: a checkpoint of the same vocabulary, after post-training",
    )
    what.add_argument(
        "--temperature",
        type=positive_float,
        help="of --loss kl: what logits are divided by (default 1)",
    )
    what.add_argument(
        "--answers",
        type=answers,
        metavar="G",
        help="of --loss reward: answers to sample to each question (default 8)",
    )
    what.add_argument(
        "--answer-length",
        type=positive_int,
        metavar="N",
        help="of --loss reward: tokens that an answer may have (default 48)",
    )
    what.add_argument(
        "--with",
        nargs="+",
        default=[],
        metavar="A",
        help="value networks that guide the bases already: the new one is made for them, and added to them with "
        "sample.py --value A NEW",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="FILE",
        help="conversations, .json or .jsonl, in one of the forms in data/README.md, or `capitals` "
        "(data/capitals.py); default: the tiny world's",
    )
    data.add_argument(
        "--template", choices=TEMPLATES, help="chat template (default: from the tokenizer's kind)"
    )
    data.add_argument(
        "--system",
        metavar="TEXT",
        help="a system prompt for conversations that have none; recorded (default: what the "
        "checkpoint's own chatml template says)",
    )
    data.add_argument(
        "--reasoning",
        choices=["drop"],
        default="",
        help="leave out what was thought before an answer (default: it is learnt in chatml with a tokenizer that has "
        "<think>; elsewhere records that have it are dropped)",
    )
    data.add_argument(
        "--held-out",
        type=non_negative_int,
        metavar="N",
        help="conversations to measure on and not to train on "
        "(default 1%%, at least 16, at most a tenth)",
    )
    data.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="tokens per conversation (default at most 4096)",
    )
    how = parser.add_argument_group(
        "how to train (defaults: Table 5's for a checkpoint, our own for tiny ones)"
    )
    how.add_argument("--lr", type=positive_float, help="peak learning rate")
    length = how.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=epochs,
        help="passes over the data",
    )
    length.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    how.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="conversations, pairs or rows of text per step, all parts together",
    )
    how.add_argument(
        "--grad-accum",
        type=positive_int,
        metavar="N",
        help="split a step's batch into N parts to save memory",
    )
    how.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the computation; trained weights stay float32",
    )
    how.add_argument(
        "--seed", type=non_negative_int, default=0, help="of everything random (default 0)"
    )
    how.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute layers twice instead of "
        "keeping what they computed: less memory, a third more time (default: for checkpoints yes, tiny ones no)",
    )
    how.add_argument(
        "--shard",
        action="store_true",
        help="with torchrun: divide weights, gradients and moments, also the "
        "bases', between the processes (FSDP2), instead of keeping them whole in each (DDP)",
    )
    add_device(how)
    add_twins(how)
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out", metavar="FOLDER", help="the finished folder (default under out/seedN)"
    )
    where.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the same run"
    )
    where.add_argument(
        "--save-every",
        type=positive_int,
        default=200,
        metavar="N",
        help="steps between checkpoints (200)",
    )
    args = parser.parse_args()

    if args.value is None and args.base is None and not args.full:
        args.value = ""
    args.job = "full" if args.full else "pretrain" if args.value is None else "value"
    args.base = args.base or ["tiny-s"]
    for name in MEANS_NOTHING[args.job]:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} means nothing when {DOING[args.job]}")
    if bool(args.teacher) != (args.loss == "kl"):
        parser.error("--loss kl and --teacher FOLDER go together")
    for name, *losses in (
        ("beta", "pairwise", "reward"),
        ("temperature", "kl"),
        ("l1", "ce"),
        ("answers", "reward"),
        ("answer_length", "reward"),
    ):
        if getattr(args, name) and (args.loss or "ce") not in losses:
            parser.error(f"--{name.replace('_', '-')} goes with --loss {' or '.join(losses)}")
    args.plugged = getattr(args, "with")
    if args.shard and (args.plugged or args.loss == "reward"):
        parser.error("--shard goes neither with --with nor with --loss reward")
    if args.l1_over and not args.l1:
        parser.error("--l1-over goes with --l1")
    args.loss, args.l1_over, args.teacher = (
        args.loss or "ce",
        args.l1_over or "supervised",
        args.teacher or "",
    )
    args.beta = args.beta or (0.1 if args.loss == "pairwise" else 0.0)
    args.answers = args.answers or (8 if args.loss == "reward" else 0)
    args.answer_length = args.answer_length or (48 if args.loss == "reward" else 0)
    args.temperature = (args.temperature or 1.0) if args.loss == "kl" else 0.0
    if args.held_out is not None and args.data in (None, "capitals"):
        parser.error(
            "--held-out goes with --data FILE; the tiny world and the capitals have questions of their own to measure by"
        )
    args.out = None if args.out is None else with_a_name(args.out)
    if len(args.base) > 1 and args.job == "pretrain" and args.out:
        parser.error("--out names one folder, and there are several bases to pretrain")
    if len(args.base) > 1 and args.job == "full":
        parser.error("--full fine-tunes one base")
    settings = ["lr", "epochs", "steps", "batch_size", "grad_accum", "max_length"]
    args.flags = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    return args


# --------------------------------------------------------------------------------------------------
# sample.py


GUIDANCE = (
    "base",
    "value",
    "expert",
    "anti_expert",
    "scheme",
    "template",
    "system",
    "alpha",
    "vocab_map",
    "dtype",
)  # what answers depend on


def add_guidance(parser: argparse.ArgumentParser, unguided: str = "the newest under out/") -> None:
    """The flags that say what guides what; `unguided` is what is taken where nothing is named."""
    guide = parser.add_mutually_exclusive_group()
    guide.add_argument(
        "--value",
        nargs="+",
        metavar="FOLDER",
        help=f"a value network, or several, whose z_deltas are added up (default: {unguided})",
    )
    guide.add_argument(
        "--expert", metavar="FOLDER", help="proxy tuning instead: a small model after post-training"
    )
    parser.add_argument(
        "--base",
        metavar="B",
        help="a checkpoint folder or a tiny name (default: the one that the value network was "
        "trained on)",
    )
    parser.add_argument(
        "--anti-expert",
        metavar="FOLDER",
        help="the expert before post-training (default: what its train.json names)",
    )
    parser.add_argument(
        "--scheme",
        choices=LLAMA_SCHEMES,
        help="take --value FOLDER, a plain Llama without ivl.json that was trained as "
        "a value network elsewhere, as one of this scheme",
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="chat template of an expert, of a base that is measured alone, or with "
        "--scheme (a value network of ours records its own)",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="a system prompt (default: what the value network was trained with)",
    )
    parser.add_argument(
        "--alpha",
        type=any_float,
        nargs="+",
        default=[1.0],
        help="weight of z_delta, or one for each --value; 0 is the base alone (default 1)",
    )
    parser.add_argument(
        "--vocab-map",
        metavar="FILE",
        help="a map between base and value network of different tokenizers, by "
        "vocab_map.py (default: made on the spot, from the tokenizers alone)",
    )
    parser.add_argument(
        "--base-prompt",
        choices=FORMS,
        help="how a base with another tokenizer reads a conversation: in its own chat template, in "
        "the value network's, or as Question: ..., Answer: ... (default: by what its folder has)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and computation"
    )
    add_device(parser)
    add_twins(parser, compiles=True)
    parser.set_defaults(chat=False, web=False, prompt=None, brings_questions=False, explains=True)


def add_asking(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The flags that say what is asked, and how answers are picked.

    Returns the group of ways to ask.
    """
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="questions to answer (default: some of the tiny world's)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="per answer (default 256)",
    )
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.0, help="0 is greedy (default)"
    )
    parser.add_argument(
        "--top-p",
        type=positive_float,
        default=1.0,
        help="sample from the likeliest tokens of this share",
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of sampling")
    return ask


def parse_guidance(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of which those that add_guidance and add_asking added fit together."""
    args = parser.parse_args()
    if args.anti_expert and not args.expert:
        parser.error("--anti-expert goes with --expert")
    if args.scheme and not (args.value and args.base):
        parser.error(
            "--scheme says what --value FOLDER is that has no ivl.json; name the base too, with --base"
        )
    values = args.value or []
    if len(args.alpha) not in (1, max(1, len(values))):
        parser.error(
            f"--alpha: {len(args.alpha)} weights, and {max(1, len(values))} to weigh; give one, or one for each --value"
        )
    if args.scheme and len(values) > 1:
        parser.error("--scheme says what one --value FOLDER is")
    # one weight is of the sum
    args.weights = args.alpha if len(args.alpha) > 1 else [1.0] * len(values)
    args.alpha = args.alpha[0] if len(args.alpha) == 1 else 1.0
    if args.template and args.value and not args.scheme:
        parser.error("--template goes with --expert or --scheme; a value network records its own")
    if args.template and not (args.expert or args.scheme or args.brings_questions):
        parser.error("--template goes with --expert or --scheme")
    if getattr(args, "top_p", 1) > 1:
        parser.error("--top-p is a share, at most 1")
    return args


def measured_arguments(parser: argparse.ArgumentParser, temperature: float) -> argparse.Namespace:
    """The flags of a script that brings its questions: a guided base, or with --base and no more the base alone.

    `temperature` is above 0 where answers may be sampled, which a vocabulary map has to know.
    """
    add_guidance(parser, unguided="none, the base alone")
    parser.set_defaults(brings_questions=True, temperature=temperature)
    return parse_guidance(parser)


def sample_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=sample.__doc__.partition("\n")[0])
    add_guidance(parser)
    ask = add_asking(parser)
    ask.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument(
        "--web",
        action="store_true",
        help="a page to ask on, at 127.0.0.1, that says who decided on each token",
    )
    parser.add_argument(
        "--port",
        type=port,
        metavar="N",
        help="of that page (default 8000; 0 is any that is free)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say of each token who decided, the base or the value network",
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="of --explain: write an HTML page, too"
    )
    parser.add_argument(
        "--screenshot",
        type=Path,
        metavar="PNG",
        help="a picture of the page of --explain or --web; needs Chromium",
    )
    parser.add_argument(
        "--height", type=positive_int, default=760, metavar="PIXELS", help="of it (default 760)"
    )
    parser.add_argument(
        "--speculate",
        type=few,
        metavar="K",
        help="let the value network draft K tokens by itself, which the base verifies in one pass; "
        "what is said stays the same",
    )
    parser.add_argument(
        "--draft",
        metavar="B",
        help="a small base that drafts with it (default: none, z_delta alone)",
    )
    args = parse_guidance(parser)
    if args.explain and (args.chat or args.speculate):
        parser.error(
            "--explain goes with --prompt or the tiny world's questions, one token at a time"
        )
    if args.web and (args.explain or args.speculate):
        parser.error(
            "--web says of each token who decided, one token at a time; leave out --explain and --speculate"
        )
    if args.web and (args.chat or args.prompt and not args.screenshot):
        parser.error("--web is asked on its page; leave out --chat and --prompt")
    if args.page and not args.explain:
        parser.error("--page goes with --explain")
    if args.screenshot and not (args.web or args.page):
        parser.error("--screenshot goes with --web, or with --explain --page FILE")
    if args.page:
        check_output("--page", args.page, "page of this kind", lambda start: PAGE_TITLE in start)
    if args.screenshot:
        is_png = lambda start: start.startswith(b"\x89PNG")  # noqa: E731
        check_output("--screenshot", args.screenshot, "picture", is_png)
    if args.port is not None and not args.web:
        parser.error("--port goes with --web")
    args.port = 8000 if args.port is None else args.port
    args.explains = bool(args.explain or args.web or args.speculate)  # what takes a value network
    if args.draft and not args.speculate:
        parser.error("--draft goes with --speculate")
    return args


# --------------------------------------------------------------------------------------------------
# vocab_map.py


def vocab_map_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=vocab_map.__doc__.partition("\n")[0])
    parser.add_argument(
        "--base-tokenizer",
        required=True,
        metavar="A",
        help="the base's, a file or a checkpoint folder",
    )
    parser.add_argument("--value-tokenizer", required=True, metavar="B", help="the value network's")
    parser.add_argument(
        "--how",
        choices=HOWS,
        default="pieces",
        help="from the tokenizers alone (pieces, the default), or "
        "counted in texts: Algorithm 1 (paper), its counts alone (dtw), or by shared bytes (offsets)",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="what to count in: .txt, or .jsonl with text or conversations (data/README.md)",
    )
    parser.add_argument(
        "--eval", type=Path, metavar="FILE", help="held-out texts to report the overlap on"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the map, map.safetensors for instance",
    )
    add_twins(parser)
    args = parser.parse_args()
    if args.how != "pieces" and not args.texts:
        parser.error(f"--how {args.how} counts in texts; name some with --texts")
    check_output("--out", args.out, "vocabulary map", lambda start: b'"pieces.tokens"' in start)
    return args
