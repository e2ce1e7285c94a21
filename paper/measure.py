"""Measure systems on the evaluation people, one after the other, and keep the metrics.

python -m paper.measure --seed 0 tiny-l "tiny-l + value-residual-tiny-s" "tiny-l + proxy-tiny-s"
"""

import torch

from data.errors import UsageError
from data.records import read_texts
from data.tiny_world import evaluate, few_shot, world_of
from data.tokenizer import Tokenizer, load_tokenizer
from fast.alignment import align_all
from ivl import ProxyDelta, ValueModel
from model import Llama
from paper.networks import Kept, networks_of, parts_of
from run.cli import ArgumentParser, non_negative_int, pick_device, run_cli
from run.plug import guide_mapped
from sample import Guided, MappedGuided, generate, score
from vocab_map import build

TIMES = 2  # each question in two forms: asked once, a seed's share has a sampling error of 3 points (through a map, once: slow)


def load(system: str, kept: Kept, device: str) -> tuple[Guided, Tokenizer]:
    """The system, and the tokenizer that all its networks can read; with a vocabulary map, the value network's."""
    base, plug, alpha, how = parts_of(system)
    folders = [kept.home / network for network in networks_of(system)]
    base_network, value = Llama.from_pretrained(folders[0], torch.float32, device), None
    if plug.startswith("proxy-"):
        value = ProxyDelta(
            *(Llama.from_pretrained(folder, torch.float32, device) for folder in folders[1:])
        )
    elif plug:
        value = ValueModel.from_pretrained(folders[1], torch.float32, device)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    if how:  # counted, if at all, in what the value network learnt from
        vocab_map = build(
            *tokenizers, how, read_texts(kept.home / "demonstrations.jsonl"), align_all
        )
        return guide_mapped(base_network, value, vocab_map, alpha), tokenizers[1]
    tokenizer = min(tokenizers, key=lambda each: each.vocab_size)
    return Guided(base_network, value, alpha, tokenizer.vocab_size), tokenizer


def measure(system: str, kept: Kept, device: str) -> dict[str, float]:
    """data/tiny_world.py's metrics and `2-shot`; `new exact` and `new 2-shot` on people of whom only continual pretraining tells.

    Through a vocabulary map the tiny world's metrics alone, each question asked once, and the base's passes a token.
    """
    guided, tokenizer = load(system, kept, device)
    world = world_of(kept.home / networks_of(system)[0])
    is_mapped, base_passes = isinstance(guided, MappedGuided), []

    def answer(prompts):
        answers = generate(guided, prompts, max_new_tokens=48, stop_ids={tokenizer.eos_id})
        if is_mapped:
            base_passes.append(guided.base_tokens_read / guided.value_tokens_asked)
        return answers

    def likelihood(pairs):
        return score(guided, pairs)

    metrics = evaluate(
        world, tokenizer, answer, likelihood, "evaluation", times=1 if is_mapped else TIMES
    )
    if is_mapped:
        return metrics | {"base passes": base_passes[0]}
    new = evaluate(world, tokenizer, answer, likelihood, "new evaluation")
    return metrics | {
        "2-shot": few_shot(world, tokenizer, likelihood, "evaluation"),
        "new exact": new["exact"],
        "new 2-shot": few_shot(world, tokenizer, likelihood, "new evaluation"),
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
        if (metrics := kept.measured(system)) is None:
            kept.keep(system, metrics := measure(system, kept, device))
        print(
            f"{system}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()),
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)
