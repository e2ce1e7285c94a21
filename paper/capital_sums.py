"""Two value networks on a real language model: the capitals' forms from one (A), politeness from another (B).

    python -m paper.capitals --base out/smollm2-135m --seeds 0                     # trains A
    python -m paper.capital_sums --base out/smollm2-135m

B is made for A: it is trained on a base that A guides, by polite answers about the countries that A's
demonstrations name, and one of A's demonstrations in ten. Asked are countries that neither has seen.
What is trained and measured is kept.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.measure import table
from data.capitals import CAPITALS, SENTENCE, Capitals, Item
from data.chat import default_template, encode_chat, stop_ids, system_of, with_system
from data.checkpoint import name_of
from data.files import read_json, write_lines, write_text
from data.tokenizer import load_tokenizer
from ivl import SumDelta, ValueModel
from model import Llama
from run.cli import ArgumentParser, non_negative_int, run_cli
from run.device import pick_device
from run.show import generate_aloud
from sample import Guided

ROOT = Path(__file__).parents[1]
POLITE = "Be polite."
ASKED = ["", "Begin with a dash."]  # A's forms that are asked, to save time


def polite(country: str, capital: str) -> str:
    return SENTENCE.format(country=country, capital=capital) + " Have a nice day."


def train(base: Path, first: Path, seed: int) -> Path:
    """B, trained unless it is there."""
    exam, out = Capitals(seed), first.with_name("value-polite")
    if not (out / "train.json").is_file():
        records = exam.demonstrations()[::10]
        for country in exam.demonstrated:
            item = Item(country, "")
            question = {"from": "human", "value": f"{item.question} {POLITE}"}
            answer = {"from": "gpt", "value": polite(country, CAPITALS[country][0])}
            records.append({"id": country, "conversations": [question, answer]})
        data = write_lines(out.with_name("polite.jsonl"), records)
        flags = f"--steps 24 --batch-size 8 --grad-accum 1 --lr 1e-4 --held-out 0 --seed {seed}"
        command = ["--base", base, "--value", "--with", first, "--data", data, "--out", out]
        subprocess.run([sys.executable, ROOT / "train.py", *command, *flags.split()], check=True)
    return out


def measure(base: Path, networks: list[Path], seed: int) -> dict[str, float]:
    """Shares of A's forms and of polite answers that are right (exact), or of the right form (ins)."""
    device, dtype = pick_device(None, tiny=False)
    llamas = [Llama.from_pretrained(path, getattr(torch, dtype), device) for path in networks]
    guided = Guided(
        Llama.from_pretrained(base, getattr(torch, dtype), device),
        SumDelta(llamas, [1.0] * len(llamas)),
    )
    info, tokenizer = ValueModel.from_pretrained(networks[0]).info, load_tokenizer(base)
    template = info.get("template", default_template(tokenizer))
    system = info.get("system", system_of(tokenizer, template, None))
    items = [item for item in Capitals(seed).items("evaluation") if item.instruction in ASKED]
    countries = Capitals(seed).split["evaluation"]
    questions = [item.question for item in items]
    questions += [f"{Item(country, '').question} {POLITE}" for country in countries]
    prompts = []
    for question in questions:
        turns = with_system(system, [("user", question)])
        prompts.append(encode_chat(tokenizer, template, turns)[0])
    ends = stop_ids(tokenizer, template, guided.llamas)
    said = [tokenizer.decode(ids).strip() for ids in generate_aloud(guided, prompts, ends, 32)]
    own, answers = said[: len(items)], said[len(items) :]
    right = [text in item.answers() for text, item in zip(own, items)]
    form = [item.has_form(text) for text, item in zip(own, items)]
    shape = re.compile(r"The capital of .+ is .+\. Have a nice day\.")
    courteous = [
        any(text == polite(country, capital) for capital in CAPITALS[country])
        for text, country in zip(answers, countries)
    ]
    metrics = {"exact": right, "ins": form, "polite exact": courteous}
    metrics["polite ins"] = [shape.fullmatch(text) is not None for text in answers]
    return {name: sum(marks) / len(marks) for name, marks in metrics.items()}


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--seed", type=non_negative_int, default=0)
    args = parser.parse_args()
    first = Path("out") / f"seed{args.seed}" / f"value-residual-{name_of(args.base)}"
    second = train(args.base, first, args.seed)
    rows = {"base + A": [first], "base + B": [second], "base + A + B": [first, second]}
    file = second / "sums.json"
    found = read_json(file) if file.is_file() else {}
    for name, networks in rows.items():
        if name not in found:
            found[name] = measure(args.base, networks, args.seed)
            write_text(file, json.dumps(found, indent=2) + "\n")
    names = list(next(iter(found.values())))
    lines = [["", *names]]
    lines += [[row, *(f"{found[row][name]:.2f}" for name in names)] for row in rows]
    print(table(lines))


if __name__ == "__main__":
    run_cli(main)
