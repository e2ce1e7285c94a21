"""Measure systems on the evaluation people, one after the other, and keep the metrics.

python -m paper.measure --seed 0 tiny-l "tiny-l + value-residual-tiny-s" "tiny-l + proxy-tiny-s"
"""

from functools import partial

import torch

from data.errors import UsageError
from data.records import read_texts
from data.tiny_world import evaluate, few_shot, world_of
from data.tokenizer import Tokenizer, load_tokenizer
from fast.alignment import align_all
from ivl import SumDelta, ValueModel
from model import Llama
from paper.networks import Kept, networks_of, parts_of
from run.cli import ArgumentParser, non_negative_int, run_cli
from run.device import pick_device
from run.plug import guide_mapped
from sample import Guided, MappedGuided, generate, score
from vocab_map import build

# Each question is asked in two forms (through a map, which is slow, in one). Asked once, a seed's
# share has a sampling error of 3 points.
TIMES = 2


def load(system: str, kept: Kept, device: str) -> tuple[Guided, Tokenizer]:
    """The system and its tokenizer; with a vocabulary map, the value network's."""
    _, plugs, how = parts_of(system)
    folders = [kept.home / network for network in networks_of(system)]
    llamas = partial(Llama.from_pretrained, dtype=torch.float32, device=device)
    base_network, value, alpha = llamas(folders[0]), None, 1.0
    if len(plugs) == 1:
        [(plug, alpha)] = plugs.items()
        if plug.startswith("proxy-"):
            value = SumDelta(list(map(llamas, folders[1:])), [1.0, -1.0])
        else:
            value = ValueModel.from_pretrained(folders[1], torch.float32, device)
    elif plugs:
        value = SumDelta(list(map(llamas, folders[1:])), list(plugs.values()))
    tokenizers = [load_tokenizer(folder) for folder in folders]
    if how:  # counted, if at all, in what the value network learnt from
        texts = read_texts(kept.home / "demonstrations.jsonl")
        vocab_map = build(*tokenizers, how, texts, align_all)
        return guide_mapped(base_network, value, vocab_map, alpha), tokenizers[1]
    tokenizer = min(tokenizers, key=lambda each: each.vocab_size)
    return Guided(base_network, value, alpha, tokenizer.vocab_size), tokenizer


def measure(system: str, kept: Kept, device: str) -> dict[str, float]:
    """data/tiny_world.py's metrics, `2-shot`, and `new exact` and `new 2-shot` on new people.

    Through a vocabulary map only the tiny world's metrics, and the base's passes a token.
    """
    guided, tokenizer = load(system, kept, device)
    world = world_of(kept.home / networks_of(system)[0])
    passes = []

    def answer(prompts):
        answers = generate(guided, prompts, max_new_tokens=48, stop_ids={tokenizer.eos_id})
        if is_mapped:
            passes.append(guided.base_tokens_read / guided.value_tokens_asked)
        return answers

    asked = world, tokenizer, answer, partial(score, guided)
    is_mapped = isinstance(guided, MappedGuided)
    metrics = evaluate(*asked, "evaluation", times=1 if is_mapped else TIMES, by_form=True)
    if is_mapped:
        return metrics | {"base passes": passes[0]}
    few = partial(few_shot, world, tokenizer, partial(score, guided))
    return metrics | {
        "2-shot": few("evaluation"),
        "new exact": evaluate(*asked, "new evaluation")["exact"],
        "new 2-shot": few("new evaluation"),
        "passes": len(guided.llamas),
    }


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("systems", nargs="+", metavar="SYSTEM")
    args = parser.parse_args()
    device, _ = pick_device(None, tiny=True)
    kept = Kept(args.seed)
    for system in args.systems:
        for network in networks_of(system):
            if not kept.made(network):
                raise UsageError(f"{system}: {kept.home / network} is not there")
        if kept.measured(system) is None:
            kept.keep(system, measure(system, kept, device))
        found = [f"{name} {value:.3f}" for name, value in kept.measured(system).items()]
        print(f"{system}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    run_cli(main)
