"""A guided step as one CUDA graph: no Python, and no word between host and device, until it is done.

    python sample.py --base PATH --value PATH --chat        # on a GPU, where checkpoints take it by themselves

`CapturedGuided` replaces sample.Guided, and answers the same, says tests/test_decoding.py: on a CPU it
records a step's operations and replays them on the same memory, as a CUDA graph does.

A small model's step keeps a GPU busy for less time than Python takes to ask for it. So the operations of
a step, base and value network in one, are recorded once and then replayed. A replay reads and writes the
same memory each time, hence three things: caches that stay where they are, a step that finds its place in
them by `lengths` on the device alone, and as many stored positions read as the graph was made for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import KVCache
from sample import Guided

LONGEST_CAPTURED = 32  # tokens of a step: longer ones, whole prompts, keep a GPU busy as they are


def window_for(length: int) -> int:
    """How many positions a captured step reads of its caches: the next power of two, and at least 256."""
    return max(256, 1 << (length - 1).bit_length())


class WindowCache(KVCache):
    """A KVCache that, with a `window`, reads that many positions whatever is stored."""

    window: int | None = None

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        if self.window is None:
            return super().begin(T)
        device, self.stored = self.lengths.device, self.window  # S
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = torch.arange(self.stored, device=device) <= self.positions[:, :, None]  # (B, T, S)
        return self.positions, mask[:, None]


@dataclass
class Graph:
    """A captured step: it reads `tokens` and writes the others, at the same addresses each time."""

    tokens: Tensor
    z_base: Tensor
    z_delta: Tensor | None
    z_post: Tensor
    replay: Callable[[], None]


class CapturedGuided(Guided):
    """Guided, whose steps of a few tokens are captured when their shape comes again, and replayed.

    z_post, z_base and z_delta of a step last until the next one.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.graphs: dict[tuple, Graph | None] = {}  # by all that goes into a step but its tokens; None: seen once

    def allocate(self, batch: int, capacity: int) -> None:
        """Graphs go with the memory that they were captured on: keep it where it is large enough."""
        capacity = window_for(capacity)
        if self.caches and self.caches[0].capacity >= capacity and len(self.caches[0].lengths) == batch:
            for cache in self.caches:
                cache.crop(0)
                cache.look()
                cache.keys.zero_(), cache.values.zero_()  # a mask does not keep out what is no number
            return
        self.graphs = {}
        self.caches = [WindowCache(llama, batch, capacity) for llama in self.llamas]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        if not self.caches or T > LONGEST_CAPTURED:
            return super().step(tokens)
        used, capacity = self.caches[0].used, self.caches[0].capacity
        if used + T > capacity:
            raise ValueError(f"KV cache of {capacity} positions is full")
        key = B, T, min(window_for(used + T), capacity), self.alpha, self.readable
        if key not in self.graphs:  # a shape that comes once is not worth it
            self.graphs[key] = None
            return super().step(tokens)
        if self.graphs[key] is None:
            self.graphs[key] = self.capture_step(tokens, key[2])
        graph = self.graphs[key]
        graph.tokens.copy_(tokens)
        graph.replay()
        for cache in self.caches:  # the graph has moved the lengths on the device
            cache.used += T
        self.z_base, self.z_delta = graph.z_base, graph.z_delta
        return graph.z_post

    def capture_step(self, tokens: Tensor, window: int) -> Graph:
        """A graph of the step for tokens of this shape, with caches read up to `window` positions."""
        tokens = tokens.clone()  # the graph reads this memory each time
        T = tokens.shape[1]
        for cache in self.caches:
            cache.window = window
        self.logits(tokens, self.caches)  # once in earnest, so that what the GPU needs for it is loaded
        for cache in self.caches:
            cache.advance(-T)
        replay, z_post = capture(lambda: self.logits(tokens, self.caches))
        for cache in self.caches:  # capturing has told the host of a step that did not happen
            cache.used -= T
            cache.window = None
        return Graph(tokens, self.z_base, self.z_delta, z_post, replay)

    def select(self, rows: Tensor) -> None:
        self.graphs = {}  # rows go to other memory
        super().select(rows)


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `step` would do on the GPU, without doing it; return what replays it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result
