"""Train a value network for a base and another, with answers that those two write themselves.

python -m paper.own_answers --base tiny-s --value --with out/seed0/value-forms-tiny-s --data \
    out/seed0/sums-own.jsonl --held-out 0 --out out/seed0/value-sums-on-forms-own

So none of the first network's data is needed: the questions are about people whom no demonstration
mentions, and who are in no examination. The flags are train.py's; the file of --data is written first.
"""

import random
import sys
from pathlib import Path

import train
from data.chat import encode_chat, stop_ids
from data.files import write_lines
from data.tiny_world import ATTRIBUTES, TEMPLATE, fact_item, prompt_text, world_of
from data.tiny_world import FORMS as ALL_FORMS
from data.tokenizer import load_tokenizer
from ivl import ValueModel
from model import Llama
from paper.networks import FORMS, sums_and
from run.cli import run_cli
from sample import Guided, generate

COUNT = 238  # questions: as many as 5% of the first network's demonstrations


def write(file: Path) -> None:
    """The sums of the demonstrations, and questions about others as base and value network answer them."""
    base, world = file.parent / "tiny-s", world_of(file.parent / "tiny-s")
    tokenizer, rng = load_tokenizer(base), random.Random(f"own questions of world {world.seed}")
    told_of = world.demonstrated + world.split["development"] + world.split["evaluation"]
    others = [person for person in world.people if person not in told_of]
    items = []
    for _ in range(COUNT):
        key = rng.choice(list(ATTRIBUTES))
        question = rng.choice(ATTRIBUTES[key].questions)
        items.append(fact_item(rng.choice(others), key, question, rng.choice(ALL_FORMS)))
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    guided = Guided(Llama.from_pretrained(base), ValueModel.from_pretrained(file.parent / FORMS))
    ends = stop_ids(tokenizer, TEMPLATE, guided.llamas)
    records, wrong = sums_and(world, 0), 0
    for item, ids in zip(items, generate(guided, prompts, max_new_tokens=48, stop_ids=ends)):
        said = tokenizer.decode(ids).strip()
        wrong += said != item.answer
        question = {"from": "human", "value": prompt_text(item)}
        records.append({"conversations": [question, {"from": "gpt", "value": said}]})
    print(f"{file}: {COUNT} answers of base and value network, {wrong} of them wrong")
    write_lines(file, records)


def main():
    write(Path(sys.argv[sys.argv.index("--data") + 1]))
    train.main()


if __name__ == "__main__":
    run_cli(main)
