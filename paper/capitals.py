"""The paper's claim on a real language model: capitals of countries that no demonstration mentions,
in the form asked for.

    python -m data.smollm2 out/smollm2-135m
    python -m paper.capitals --base out/smollm2-135m                           # seeds 0, 1, 2
    python -m paper.capitals --base out/smollm2-135m --seeds 0 --l1 0 0.1 1    # the norm

A seed decides which countries are demonstrated and which are asked, and the order of training. What
is trained and measured is kept.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.measure import table
from data.capitals import Capitals
from data.chat import default_template, system_of
from data.checkpoint import name_of
from data.files import read_json, write_text
from data.records import read_texts
from data.tokenizer import load_tokenizer
from fast.alignment import align_all
from ivl import ValueModel
from model import Llama
from run.bases import FORMS, asking, load_base, template_of, with_ends
from run.cli import ArgumentParser, non_negative_float, non_negative_int, run_cli
from run.device import pick_device
from run.plug import guide_mapped
from run.processes import Alone
from run.show import examine
from sample import Guided, Speaker
from vocab_map import build

ROOT = Path(__file__).parents[1]
METRICS = ("exact", "know", "ins")


def train(base: Path, seed: int, l1: float) -> Path:
    """The value network of a seed and a lambda, trained unless it is there."""
    name = f"value-residual-{name_of(base)}" + (f"-l1-{l1:g}" if l1 else "")
    out = Path("out") / f"seed{seed}" / name
    if not (out / "train.json").is_file():
        flags = f"--value --data capitals --seed {seed} --l1 {l1}".split()
        subprocess.run([sys.executable, ROOT / "train.py", "--base", base, *flags], check=True)
    return out


def measure(
    base: Path, value: Path, seed: int, dtype: str, device: str
) -> dict[str, dict[str, float]]:
    """The metrics of all three systems on a seed's evaluation countries."""
    file = value / "evaluation.json"
    if file.is_file():
        return read_json(file)
    network = ValueModel.from_pretrained(value, getattr(torch, dtype), device)
    llama = Llama.from_pretrained(base, getattr(torch, dtype), device)
    tokenizer = load_tokenizer(value)
    template = network.info.get("template", default_template(tokenizer))
    system = network.info.get("system", "")
    systems = {
        "base": Guided(llama),
        "base + value": Guided(llama, network),
        "value network alone": Guided(network.network),
    }
    found = {
        name: examine(guided, Capitals(seed), tokenizer, template, "evaluation", system)
        for name, guided in systems.items()
    }
    write_text(file, json.dumps(found, indent=2) + "\n")
    return found


def plugged(
    row: str, form: str, plug: Path, base: Llama, value: Path, network: ValueModel
) -> Speaker:
    """A base of another family, in the folder `plug`: alone, or with a value network through a map of a kind."""
    its_own, values = load_tokenizer(plug), load_tokenizer(value)
    template = network.info.get("template", default_template(values))
    asked_in = template_of(form, plug, its_own, template)
    if row == "alone":
        asked_in = asked_in or default_template(its_own)
        guided = Guided(base, readable=its_own.vocab_size)
        return Speaker(row, guided, its_own, asked_in, system_of(its_own, asked_in, None))
    texts = read_texts(value.parent / "capitals.jsonl") if row == "paper" else None
    vocab_map = build(its_own, values, row, texts, align_all)
    ask = None if form == "value" else asking(vocab_map, template, asked_in, None)
    if row == "pieces":
        vocab_map = with_ends(vocab_map, template)
    guided = guide_mapped(base, network, vocab_map, ask=ask, line_ends=asked_in == "qa")
    return Speaker(row, guided, values, template, network.info.get("system", ""))


def measure_plugged(args, value: Path, seed: int, dtype: str, device: str) -> dict[str, dict]:
    """The metrics of a base of another family, alone and with the value network, in each row asked for.

    What was measured is kept beside the value network. s is seconds, base/value base tokens a value token.
    """
    plug, form = args.plug_into, args.base_prompt
    file = value / f"{args.split}-{name_of(plug)}.json"
    kept = read_json(file) if file.is_file() else {}
    names = {f"{name_of(plug)}, {row}, asked in {form}": row for row in args.rows}
    if missing := [name for name in names if name not in kept]:
        base = load_base(plug, dtype, device, Alone())
        network = ValueModel.from_pretrained(value, getattr(torch, dtype), device)
    for name in missing:
        speaker = plugged(names[name], form, plug, base, value, network)
        what = speaker.guided, Capitals(seed), speaker.tokenizer, speaker.template
        started = time.monotonic()
        kept[name] = examine(*what, args.split, speaker.system)
        kept[name]["s"] = time.monotonic() - started
        if names[name] != "alone":
            read, asked = speaker.guided.base_tokens_read, speaker.guided.value_tokens_asked
            kept[name]["base/value"] = read / asked
        write_text(file, json.dumps(kept, indent=2) + "\n")
        print(f"seed {seed}, {args.split}, {name}: {kept[name]}", flush=True)
    return {name: kept[name] for name in names}


def show(title: str, found: list[dict[str, dict[str, float]]]) -> None:
    """A table of means, and ranges where there are several seeds."""
    rows = [[title, *METRICS]]
    for system in found[0]:
        rows.append([system])
        for metric in METRICS:
            values = [each[system][metric] for each in found]
            spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
            rows[-1].append(f"{sum(values) / len(values):.2f}{spread}")
    print(f"\n{table(rows)}", flush=True)


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--l1", type=non_negative_float, nargs="+", default=[0.0], help="lambda, the norm's weight"
    )
    parser.add_argument(
        "--plug-into",
        type=Path,
        metavar="FOLDER",
        help="a base of another family, out/gemma-3-270m for instance, for the same value networks",
    )
    parser.add_argument("--base-prompt", choices=FORMS, default="qa", help="how that one is asked")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=["alone", "pieces", "paper"],
        default=["alone", "pieces", "paper"],
        help="that base alone, and with the value network by either kind of map (default: all)",
    )
    parser.add_argument(
        "--split", choices=["development", "evaluation"], default="evaluation", help="of that base"
    )
    args = parser.parse_args()
    device, dtype = pick_device(None, tiny=False)
    for l1 in args.l1:
        values = {seed: train(args.base, seed, l1) for seed in args.seeds}
        if args.plug_into:
            found = [
                measure_plugged(args, value, seed, dtype, device) for seed, value in values.items()
            ]
        else:
            found = [
                measure(args.base, value, seed, dtype, device) for seed, value in values.items()
            ]
        show(f"seeds {', '.join(map(str, args.seeds))}, lambda {l1:g}", found)


if __name__ == "__main__":
    run_cli(main)
