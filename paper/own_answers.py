"""Train a value network for a base and others, with answers that those write themselves.

python -m paper.own_answers --base tiny-s --value --held-out 0 --data out/seed0/sums-own.jsonl \
    --out out/seed0/value-sums-on-forms-own --with out/seed0/value-forms-tiny-s

So none of the others' data is needed: the questions are about people whom no demonstration
mentions, and who are in no examination. The flags are train.py's; the file of --data, one of
paper.networks.OWN, is written first.
"""

import itertools
import random
import sys
from pathlib import Path

import train
from data.chat import encode_chat, stop_ids
from data.errors import UsageError
from data.files import write_lines
from data.tiny_world import ATTRIBUTES, TEMPLATE, fact_item, prompt_text, sum_item, world_of
from data.tokenizer import load_tokenizer
from ivl import SumDelta
from model import Llama
from paper.networks import OWN
from run.cli import run_cli
from sample import Guided, generate

COUNT = 238  # questions: as many as 5% of the first network's demonstrations


def write(file: Path, guides: list[str]) -> None:
    """The demonstrations of the new network, and questions about others as the old ones answer them."""
    if file.stem not in OWN:
        raise UsageError(f"--data {file}: no such questions; there are {', '.join(OWN)}")
    base, world = file.parent / "tiny-s", world_of(file.parent / "tiny-s")
    if world is None:
        raise UsageError(f"{base}: not there yet; python train.py makes it")
    is_new, forms, sums = OWN[file.stem]
    tokenizer, rng = load_tokenizer(base), random.Random(f"own questions of world {world.seed}")
    told_of = world.demonstrated + world.split["development"] + world.split["evaluation"]
    others = [person for person in world.people if person not in told_of]
    items = []
    for _ in range(COUNT):
        if sums and rng.random() < sums:
            numbers = rng.choice(rng.choice(world.demonstrated_sums))
            items.append(sum_item(numbers, rng.choice(forms)))
            continue
        key = rng.choice(list(ATTRIBUTES))
        question = rng.choice(ATTRIBUTES[key].questions)
        items.append(fact_item(rng.choice(others), key, question, rng.choice(forms)))
    prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
    value = SumDelta(list(map(Llama.from_pretrained, guides)), [1.0] * len(guides))
    guided = Guided(Llama.from_pretrained(base), value)
    ends = stop_ids(tokenizer, TEMPLATE, guided.llamas)
    records, wrong = list(filter(is_new, world.demonstrations())), 0
    for item, ids in zip(items, generate(guided, prompts, max_new_tokens=48, stop_ids=ends)):
        said = tokenizer.decode(ids).strip()
        wrong += said != item.answer
        question = {"from": "human", "value": prompt_text(item)}
        records.append({"conversations": [question, {"from": "gpt", "value": said}]})
    print(f"{file}: {COUNT} answers of base and value networks, {wrong} of them wrong")
    write_lines(file, records)


def main():
    flags = sys.argv[1:]
    if not {"--data", "--with"} <= set(flags[:-1]):
        raise UsageError("--data FILE and --with FOLDER say what is trained, and for what")
    behind = flags[flags.index("--with") + 1 :]
    guides = list(itertools.takewhile(lambda flag: not flag.startswith("--"), behind))
    write(Path(flags[flags.index("--data") + 1]), guides)
    train.main()


if __name__ == "__main__":
    run_cli(main)
