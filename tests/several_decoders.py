"""A base divided between two processes against the same base in one; test_tensor_parallel.py starts it with torchrun.

torchrun --nproc_per_node=2 -m tests.several_decoders tokens FOLDER...    # of networks, each a base
torchrun --nproc_per_node=2 -m tests.several_decoders few FOLDER...       # the same with fewer plugs
torchrun --nproc_per_node=2 -m tests.several_decoders memory FOLDER       # or without torchrun: whole
"""

import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from beyond.speculation import Speculative, speculate
from model import Llama
from run.processes import Alone, join_decoders
from run.tensor_parallel import load_divided
from sample import Guided, generate, score
from tests.helpers import proxy, random_prompts, small, value_network

PROMPTS = random_prompts(20)
GREEDY = dict(max_new_tokens=16, stop_ids={2})
SAMPLED = GREEDY | dict(temperature=1.0, top_p=0.9, seed=4)
PLUGS = {
    "alone": lambda: None,
    "residual": lambda: value_network("residual"),
    "cascade+": lambda: value_network("cascade+"),
    "probe": lambda: value_network("probe"),
    "proxy": proxy,
}


def compare_tokens(folder: Path, plugs: list[str]) -> None:
    """Greedy and sampled tokens, scores and speculation are those of the whole base, and logits the same bits in every process."""
    whole, divided = Llama.from_pretrained(folder), load_divided(folder, None, "cpu")
    tied = divided.lm_head.weight is divided.model.embed_tokens.weight
    assert tied == whole.config.tie_word_embeddings
    draft = small(num_hidden_layers=1, vocab_size=whole.config.vocab_size)
    for name in plugs:
        alone, together = Guided(whole, PLUGS[name]()), Guided(divided, PLUGS[name]())
        for options in (GREEDY, SAMPLED):
            assert generate(alone, PROMPTS, **options) == generate(together, PROMPTS, **options), (
                name
            )
        pairs = list(zip(PROMPTS, PROMPTS[1:]))
        for (ours, greedy), (theirs, other) in zip(
            score(together, pairs), score(alone, pairs), strict=True
        ):
            assert abs(ours - theirs) < 1e-3 and greedy == other, name
        if name in ("residual", "proxy"):
            for drafting in (None, draft):
                said = speculate(Speculative(together, 3, drafting), PROMPTS[:4], **GREEDY)
                assert said == generate(together, PROMPTS[:4], **GREEDY), name
        tokens = torch.tensor([PROMPTS[0]])
        ours, theirs = together.logits(tokens), alone.logits(tokens)
        assert ours.shape == theirs.shape
        print(
            f"{name}: logits at most {(ours - theirs).abs().nan_to_num().max():.1e} apart",
            flush=True,
        )
        of_all = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, ours.contiguous())
        assert all(torch.equal(ours, other) for other in of_all), name
    print(f"same: {folder.name}, {'tied' if tied else 'untied'}")


def peak_memory() -> int:
    """Bytes that this process had in memory at most so far; resource.getrusage would begin with its parent's."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure_memory(folder: Path, processes: Alone) -> None:
    """Bytes of the weights here, and by how many more this process's memory peaked while they were loaded and one token was read."""
    Guided(small()).step(torch.tensor([[1]]))
    with torch.device("meta"):
        small()  # what torch imports for the first network of a process is not this one's
    before = peak_memory()
    base = (
        Llama.from_pretrained(folder) if processes.count == 1 else load_divided(folder, None, "cpu")
    )
    loaded = peak_memory()
    guided = Guided(base)
    guided.step(guided.start([[1, 2, 3, 4]], 4))
    held = sum(parameter.nbytes for parameter in base.parameters())  # tied ones once
    print(f"bytes {held} {loaded - before} {peak_memory() - before}", flush=True)


def main():
    with join_decoders() as processes:
        if sys.argv[1] == "memory":
            measure_memory(Path(sys.argv[2]), processes)
        else:
            for folder in map(Path, sys.argv[2:]):
                compare_tokens(
                    folder,
                    ["alone", "residual", "cascade+"] if sys.argv[1] == "few" else list(PLUGS),
                )


if __name__ == "__main__":
    main()
