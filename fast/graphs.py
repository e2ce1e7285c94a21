"""A guided step as one CUDA graph: no Python, and no word between host and device, until it is done.

    python sample.py --base PATH --value PATH --chat                  # on a GPU, where checkpoints take it by themselves
    python sample.py --base PATH --value PATH --chat --compile        # and with fewer, larger operations in it

`CapturedGuided` replaces sample.Guided, and answers the same, says tests/test_decoding.py: on a CPU
it records a step's operations and replays them on the same memory, as a CUDA graph does.
`CompiledGuided` takes the same place.

A small model's step keeps a GPU busy for less time than Python takes to ask for it. So the
operations of a step, base and value network in one, are recorded once and then replayed. A replay
reads and writes the same memory each time, hence three things: caches that stay where they are, a
step that finds its place in them by `lengths` on the device alone, and as many stored positions
read as the graph was made for.

What is left is a layer's thirty or so operations, most of which take a GPU longer to begin than to
do. torch.compile joins them to a dozen, and takes a while to tune each, the first time on a
machine.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Block, KVCache, Llama
from sample import Guided

LONGEST_CAPTURED = (
    33  # tokens of a step, as 32 drafts behind one; longer ones keep a GPU busy as they are
)


def window_for(length: int) -> int:
    """How many positions a captured step reads of its caches.

    The next power of two, and at least 256.
    """
    return max(256, 1 << (length - 1).bit_length())


class WindowCache(KVCache):
    """A KVCache that, with a `window`, reads that many positions whatever is stored."""

    window: int | None = None

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        if self.window is None:
            return super().begin(T)
        self.place(T, self.window)
        mask = torch.where(self.seen(), 0.0, -torch.inf).to(
            self.keys.dtype
        )  # what attention adds, made once for all layers
        return self.positions, mask[:, None]


@dataclass
class Graph:
    """A captured step: it reads `tokens` and writes the others, at the same addresses each time."""

    tokens: Tensor
    z_base: Tensor
    z_delta: Tensor | None
    z_post: Tensor
    parts: list[Tensor]  # of a sum of value networks
    replay: Callable[[], None]


class CapturedGuided(Guided):
    """Guided, whose steps of a few tokens are captured when their shape comes again, and replayed.

    z_post, z_base and z_delta of a step last until the next one.
    """

    spare = 0  # positions of a cache beyond the largest window

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.graphs: dict[
            tuple, Graph | None
        ] = {}  # by all that goes into a step but its tokens; None: seen once

    def allocate(self, batch: int, capacity: int) -> None:
        """Graphs go with the memory that they were captured on.

        Keep it where it is large enough.
        """
        capacity = window_for(capacity)
        if (
            self.caches
            and self.caches[0].capacity >= capacity
            and len(self.caches[0].lengths) == batch
        ):
            for cache in self.caches:
                cache.crop(0)
                cache.keys.zero_()  # an old nan or inf would pass the mask: 0 * nan is nan
                cache.values.zero_()
            return
        self.graphs = {}
        self.caches = [WindowCache(llama, batch, capacity + self.spare) for llama in self.llamas]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        if not self.caches or T > LONGEST_CAPTURED:
            return super().step(tokens)
        used, capacity = self.caches[0].used, self.caches[0].capacity - self.spare
        if used + T > capacity:
            raise ValueError(f"KV cache of {capacity} positions is full")
        key = B, T, window_for(used + T), self.alpha, self.readable
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
        if graph.parts:
            self.value.parts = graph.parts
        return graph.z_post

    def logits_to_capture(self, tokens: Tensor) -> Tensor:
        """logits, of base and value network side by side where the one reads nothing of the other."""
        if self.value is None or self.value.scheme != "residual":
            return self.logits(tokens, self.caches)
        base_cache, *value_caches = self.caches
        self.z_base, self.z_delta = side_by_side(
            lambda: self.base(tokens, base_cache),  # (B, T, Vb), Eq. (1)
            lambda: self.value(tokens, None, value_caches),
        )  # (B, T, Vv), Eq. (2)
        return self.post(self.z_base, self.z_delta)

    def capture_step(self, tokens: Tensor, window: int) -> Graph:
        """A graph of the step for tokens of this shape, with caches read up to `window` positions."""
        tokens = tokens.clone()  # the graph reads this memory each time
        T = tokens.shape[1]
        for cache in self.caches:
            cache.window = window
        try:
            self.logits_to_capture(
                tokens
            )  # a warm-up: what a GPU loads or compiles for it cannot be captured
            for cache in self.caches:
                cache.advance(-T)  # take it back
            replay, z_post = capture(lambda: self.logits_to_capture(tokens))
            for cache in self.caches:  # capturing has told the host of a step that did not happen
                cache.used -= T
        finally:
            for cache in self.caches:
                cache.window = None
        parts = getattr(self.value, "parts", [])
        return Graph(tokens, self.z_base, self.z_delta, z_post, parts, replay)

    def select(self, rows: Tensor) -> None:
        self.graphs = {}  # rows go to other memory
        super().select(rows)


def side_by_side(one: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What both return; on a GPU in two streams, so that each fills what the other leaves idle."""
    if not torch.cuda.is_available():
        return one(), other()
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        theirs = other()
    ours = one()
    main.wait_stream(side)
    return ours, theirs


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `step` would do on the GPU, without doing it.

    Return what replays it, and where its result will be.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


# --------------------------------------------------------------------------------------------------
# Fewer operations


class CompiledGuided(CapturedGuided):
    """CapturedGuided, whose captured steps of one token run compiled layers."""

    spare = 1  # a window is always a part of its cache: all of one would be compiled anew

    def logits_to_capture(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 1:
            return super().logits_to_capture(tokens)
        with compiled_layers(self.llamas):
            return super().logits_to_capture(tokens)


@functools.cache
def compiled_block() -> Callable:
    """Block.forward, compiled when it is called: once for all layers of a network, and for caches of any length.

    By the first option products of a matrix and a vector become sums, which Inductor tunes; by the
    second that vector is computed before them, and not anew for every row of the matrix.
    """
    return torch.compile(
        Block.forward,
        dynamic=True,
        options={"coordinate_descent_tuning": True, "realize_opcount_threshold": 4},
    )


@dataclass
class LayerCache:
    """One layer's part of a cache, sliced outside the compiled layer, which would copy a slice, write to it, and copy it back.

    A list of one tensor, so that KVCache.append serves with layer 0.
    """

    keys: list[Tensor]  # one tensor (B, K, capacity, F)
    values: list[Tensor]  # one
    rows: Tensor
    positions: Tensor
    stored: int

    append = KVCache.append


def forward_compiled(
    layer: Block, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache, index: int
) -> Tensor:
    own = LayerCache(
        [cache.keys[index]], [cache.values[index]], cache.rows, cache.positions, cache.stored
    )
    return compiled_block()(layer, x, cos, sin, mask, own, 0)


@contextlib.contextmanager
def compiled_layers(llamas: list[Llama]) -> Iterator[None]:
    """Within it, the layers of these networks run compiled."""
    layers = [layer for llama in llamas for layer in llama.model.layers]
    for layer in layers:
        layer.forward = functools.partial(forward_compiled, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
