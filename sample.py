"""Decoding: a base alone, or a base guided by a value network.

    python sample.py                                   # the newest value network, on questions it never saw
    python sample.py --base tiny-l                     # the same value network plugged into a bigger base
    python sample.py --prompt "Greet Fufa. Say it twice."
    python sample.py --base tiny-l --expert out/seed0/full-tiny-s    # proxy tuning: tuned minus untuned in its place
    python sample.py --chat
    python sample.py --explain                         # who decided on each token, the base or the value network
    python sample.py --base tiny-l --speculate 4       # a small base drafts for the big one

In this order: Guided (a step, captured on a GPU), generate, score, Speculative, what is printed, and the command line.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import TEMPLATES, Turn, default_template, encode_chat, end_token, is_unicode
from data.cli import (ArgumentParser, UsageError, any_float, non_negative_float, non_negative_int, number, pick_device,
                      positive_float, positive_int, run_cli)
from data.tiny_world import TEMPLATE, TINY_SIZES, World, evaluate, print_metrics, prompt_text, world_of
from data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from ivl import (Attribution, ProxyDelta, ValueModel, attribute, check_recorded, check_same_family, combine, is_same_family,
                 read_info)
from model import KVCache, Llama, read_json
from vocab_map import MARGIN, Mapped, VocabMap, build

# ---------------------------------------------------------------------------------------------------------
# Guided decoding


class Guided:
    """A base with or without a value network or proxy, and the KV caches of all of them. Eq. (3) at each step.

    On a GPU a step of a few tokens that comes again is captured as a CUDA graph, base and value network in one, and replayed.
    After a step, z_base and z_delta (B, T, Vb and Vv) are what z_post was made of; they and z_post last until the next.
    """

    def __init__(self, base: Llama, value: ValueModel | ProxyDelta | None = None, vocab_map: VocabMap | None = None,
                 alpha: float = 1.0):
        self.base, self.value, self.alpha = base, value, alpha
        self.llamas = [base] if value is None else [base, *value.llamas]
        # Tokens from here on are never said: some network cannot read them, or the tokenizer has no text for them.
        self.readable = min([base.config.vocab_size] + ([] if value is None else [value.vocab_size]))
        self.mapped = None
        if vocab_map is not None:  # all tokens here are the value network's, and the base has its own inside `mapped`
            if isinstance(value, ValueModel) and value.scheme != "residual":
                raise ValueError(f"scheme {value.scheme} reads the base's logits over its own vocabulary, and here are others")
            self.mapped, self.llamas = Mapped(base, vocab_map), value.llamas
            self.readable = min(value.vocab_size, vocab_map.value_tokenizer.vocab_size)
        self.captures = base.device.type == "cuda" and self.mapped is None
        self.caches: list[KVCache] = []
        self.graphs: dict[tuple, Graph | None] = {}  # of steps by B, T, window and what else goes into them; None: seen once

    def allocate(self, batch: int, capacity: int) -> None:
        """Begin anew, with empty caches for `capacity` positions of `batch` rows."""
        if self.captures:  # graphs go with the memory that they were captured on: keep it where it is large enough
            capacity = window(capacity)
            if self.caches and self.caches[0].capacity >= capacity and len(self.caches[0].lengths) == batch:
                for cache in self.caches:
                    cache.set_lengths([0] * batch)
                    cache.keys.zero_(), cache.values.zero_()  # a mask does not keep out what is no number
                return
        self.graphs = {}
        self.caches = [KVCache(llama, batch, capacity) for llama in self.llamas]

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], max_new_tokens: int, greedy: bool = True) -> Tensor:
        """Fill fresh caches with all but the last token of each prompt; return those last tokens (B, 1)."""
        if self.mapped:
            self.mapped.start(prompts)
            self.margin, self.begun = 0.0 if greedy else MARGIN, False
        lengths = [len(prompt) - 1 for prompt in prompts]
        self.allocate(len(prompts), max(lengths) + max_new_tokens)
        if any(lengths):
            padded = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
            for row, prompt in enumerate(prompts):
                padded[row, :len(prompt) - 1] = torch.tensor(prompt[:-1])
            padded = padded.to(self.base.device)
            if self.value is not None and self.value.is_cascade:  # it reads the base's logits of the prompt
                self.value.hidden(padded, self.base(padded, self.caches[0]), self.caches[1:])
            else:
                for llama, cache in zip(self.llamas, self.caches):
                    llama.model(padded, cache)  # the trunk alone: nobody needs these logits
            for cache in self.caches:
                cache.set_lengths(lengths)
        return torch.tensor([prompt[-1:] for prompt in prompts], device=self.base.device)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Continue each row by tokens (B, T) -> z_post (B, T, Vb). The first step may be a whole prompt."""
        if not self.caches:
            self.allocate(len(tokens), min(llama.config.max_position_embeddings for llama in self.llamas))
        if self.mapped:
            return self._mapped_step(tokens)
        if self.captures and tokens.shape[1] <= LONGEST_CAPTURED:
            return self._captured_step(tokens)
        return self._combined(tokens, self.caches)

    def logits(self, tokens: Tensor) -> Tensor:
        """z_post (B, T, Vb) of whole sequences tokens (B, T), without caches and without a vocabulary map."""
        if self.mapped:
            raise ValueError("through a vocabulary map there are only steps")
        return self._combined(tokens, None)

    def _combined(self, tokens: Tensor, caches: list[KVCache] | None) -> Tensor:
        self.z_base = self.base(tokens, caches and caches[0])  # (B, T, Vb)
        self.z_delta = None if self.value is None else self.value(tokens, self.z_base, caches and caches[1:])  # (B, T, Vv)
        return self.post(self.z_base, self.z_delta)

    def post(self, z_base: Tensor, z_delta: Tensor | None) -> Tensor:
        """z_post (..., Vb), with -inf for what is never said."""
        z = z_base if z_delta is None else combine(z_base, z_delta, self.alpha)  # Eq. (3)
        if self.readable < z.shape[-1]:
            z[..., self.readable:] = -torch.inf
        return z

    def _captured_step(self, tokens: Tensor) -> Tensor:
        """_combined as a CUDA graph: no Python, and no word between host and device, until it is done."""
        B, T = tokens.shape
        key = B, T, min(window(self.caches[0].used + T), self.caches[0].capacity), self.alpha, self.readable
        if key not in self.graphs:  # a shape that comes once is not worth it
            self.graphs[key] = None
            return self._combined(tokens, self.caches)
        if self.graphs[key] is None:
            self.graphs[key] = self._capture(tokens, key[2])
        graph = self.graphs[key]
        for cache in self.caches:
            cache.check_room(T)
        graph.tokens.copy_(tokens)
        graph.replay()
        for cache in self.caches:  # the graph has moved the lengths on the device
            cache.used += T
        self.z_base, self.z_delta = graph.z_base, graph.z_delta
        return graph.z_post

    def _capture(self, tokens: Tensor, window: int) -> "Graph":
        """A graph of the step for tokens of this shape, with caches read up to `window` positions."""
        tokens = tokens.clone()  # the graph reads this memory each time
        for cache in self.caches:
            cache.window = window
        self._combined(tokens, self.caches)  # once in earnest, so that what the GPU needs for it is loaded
        for cache in self.caches:
            cache.advance(-tokens.shape[1])
        replay, z_post = capture(lambda: self._combined(tokens, self.caches))
        for cache in self.caches:  # capturing has told the host of a step that did not happen
            cache.used -= tokens.shape[1]
            cache.window = None
        return Graph(tokens, self.z_base, self.z_delta, z_post, replay)

    def _mapped_step(self, tokens: Tensor) -> Tensor:
        """step with a vocabulary map: tokens (B, 1) and z_post (B, 1, Vv) are the value network's, and z_base is log P."""
        if self.begun:  # the base has read the whole prompt before
            self.mapped.push(tokens[:, 0].tolist())
        self.begun = True
        self.z_delta = self.value(tokens, None, self.caches)[:, -1:].float()  # (B, 1, Vv)
        self.z_base = self.mapped.log_p(self.alpha * self.z_delta[:, 0], self.margin)[:, None]  # (B, 1, Vv)
        return self.post(self.z_base, self.z_delta)

    def attribute(self, token: int) -> Attribution:
        """Who decided on `token`, which was picked after the last step in the first row: the base or what guides it."""
        return attribute(self.z_base[0, -1, :self.readable], self.z_delta[0, -1], token, self.alpha)

    def select(self, rows: Tensor) -> None:
        self.graphs = {}
        for cache in self.caches:
            cache.select(rows)
        if self.mapped:
            self.mapped.select(rows)


LONGEST_CAPTURED = 32  # tokens of a step: longer ones, whole prompts, keep a GPU busy as they are


def window(length: int) -> int:
    """How many positions a captured step reads of its caches: the next power of two, and at least 256."""
    return max(256, 1 << (length - 1).bit_length())


@dataclass
class Graph:
    """A captured step: it reads `tokens` and writes the others, at the same addresses each time."""

    tokens: Tensor
    z_base: Tensor
    z_delta: Tensor | None
    z_post: Tensor
    replay: Callable[[], None]


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `step` would do on the GPU, without doing it; return what replays it, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


@torch.inference_mode()
def generate(guided: Guided, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, stop_ids: set[int] | None = None,
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Continue token prompts; return only the new tokens of each, a stop token included where one came.

    temperature 0 is greedy. Each prompt has a random stream of its own, so a sampled answer does not depend on the
    prompts beside it. stop_ids default to the base's eos. on_token(prompt, token) is called as tokens come.
    """
    check_prompts(prompts)
    stop_ids = guided_stop_ids(guided) if stop_ids is None else stop_ids
    noise = torch.stack([uniform(seed, row, max_new_tokens) for row in range(len(prompts))]).to(guided.base.device)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    alive = [True] * len(prompts)
    tokens = guided.start(prompts, max_new_tokens, greedy=temperature == 0)  # (B, 1)
    for index in range(max_new_tokens):
        logits = guided.step(tokens)[:, -1]  # (B, Vb)
        tokens = pick(logits, noise[:, index], temperature, top_p)[:, None]  # (B, 1)
        for prompt, token in zip(running, tokens[:, 0].tolist()):
            if alive[prompt]:
                outputs[prompt].append(token)
                alive[prompt] = token not in stop_ids
                if on_token:
                    on_token(prompt, token)
        still = [row for row, prompt in enumerate(running) if alive[prompt]]
        if not still:
            break
        if len(still) <= len(running) // 2:  # shrink the batch now and then rather than carry finished rows along
            rows = torch.tensor(still, device=tokens.device)
            guided.select(rows)
            tokens, noise, running = tokens[rows], noise[rows], [running[row] for row in still]
    return outputs


def check_prompts(prompts: list[list[int]]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")


def guided_stop_ids(guided: Guided) -> set[int]:
    """The end of a text for the base or, through a vocabulary map, for the value network."""
    eos = guided.mapped.map.value_tokenizer.eos_id if guided.mapped else guided.base.config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def uniform(seed: int, number: int, *shape: int) -> Tensor:
    """Numbers from [0, 1), the random stream of prompt `number`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def pick(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens (B,) from logits (B, V): the arg-max, or by noise (B,) uniform in [0, 1) from the nucleus top_p."""
    return logits.argmax(-1) if temperature == 0 else draw(probabilities(logits, temperature, top_p), noise)


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """How likely each token is to be picked: (B, V) from logits (B, V); all of it on the arg-max at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.float() - logits.max(-1, keepdim=True).values.float()  # so that no temperature overflows
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1)  # (B, V); smaller numbers are 0 in float32
    if top_p < 1:
        largest, tokens = p.sort(-1, descending=True)
        before = largest.cumsum(-1) - largest
        p = p.scatter(-1, tokens, largest.masked_fill(before >= top_p, 0))  # it stays if those before do not reach top_p
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p: Tensor, noise: Tensor) -> Tensor:
    """Tokens (B,): where noise (B,) falls in the cumulative sum of p (B, V), which need not sum to 1."""
    total = p.cumsum(-1)
    below = (total <= noise[:, None] * total[:, -1:]) & (total < total[:, -1:])
    tokens = below.sum(-1, keepdim=True)  # (B, 1)
    # Rounding must not choose what has no share.
    return torch.where(p.gather(-1, tokens) > 0, tokens, p.argmax(-1, keepdim=True))[:, 0]


@torch.inference_mode()
def score(guided: Guided, pairs: list[tuple[list[int], list[int]]], batch_size: int = 256
          ) -> list[tuple[float, bool]]:
    """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding would say it.

    A context that comes several times in a batch, as in multiple choice, is computed once.
    """
    results = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first:first + batch_size]
        contexts = list(dict.fromkeys(tuple(context) for context, _ in batch))
        longest = max(len(continuation) for _, continuation in batch)
        last = guided.start([list(context) for context in contexts], longest)  # (contexts, 1)
        rows = torch.tensor([contexts.index(tuple(context)) for context, _ in batch], device=last.device)  # (B,)
        guided.select(rows)
        padded = torch.zeros(len(batch), longest, dtype=torch.long)  # the last token of a continuation predicts nothing
        for row, (_, continuation) in enumerate(batch):
            padded[row, 1:len(continuation)] = torch.tensor(continuation[:-1])
        padded = padded.to(last.device)
        padded[:, :1] = last[rows]
        if guided.mapped:  # it takes one token at a time; what stands behind a short continuation counts nowhere
            z = torch.cat([guided.step(column) for column in padded.split(1, dim=1)], dim=1)
        else:
            z = guided.step(padded)
        log_p = F.log_softmax(z.float(), dim=-1)  # (B, longest, Vb)
        for row, (_, continuation) in enumerate(batch):
            wanted = torch.tensor(continuation, device=last.device)[:, None]
            here = log_p[row, :len(continuation)]
            results.append((here.gather(-1, wanted).sum().item(), bool((here.argmax(-1) == wanted[:, 0]).all())))
    return results


# ---------------------------------------------------------------------------------------------------------
# Speculative decoding: guidance by a value network makes a small base draft what a big one will say


class Speculative:
    """A guided base whose tokens are drafted `ahead` (K) at a time, by a small base with the same value network.

    In the residual scheme z_delta depends on the text alone. What drafting computed of it serves the big base too:
    it reads K tokens in one pass, and the value network none again. Of the drafted tokens those before the first rejected one
    stand, and one is drawn in that one's place. Text comes out as `guided` would write it: greedy, the same
    tokens; sampled, from the same distribution (Leviathan et al. 2023; Chen et al. 2023).

    ValueError for a scheme that reads the base's logits, for a vocabulary map, and for a draft of too few tokens.
    """

    def __init__(self, guided: Guided, draft: Llama, ahead: int):
        if guided.mapped:
            raise ValueError("through a vocabulary map, tokens are not the base's, so it cannot verify several in one pass")
        scheme = getattr(guided.value, "scheme", "residual")
        if scheme != "residual":
            raise ValueError(f"a {scheme} reads the base's logits, so what it says beside the drafting base is not what it says "
                             "beside the big one, and nothing of drafting could be used again; a residual one can speculate")
        self.guided, self.ahead = guided, ahead
        self.drafting, self.verifying = Guided(draft, guided.value, alpha=guided.alpha), Guided(guided.base)
        if self.drafting.readable < guided.readable:
            raise ValueError(f"the drafting base reads {self.drafting.readable} tokens, and the other one {guided.readable}")
        self.drafting.readable = guided.readable
        self.tried, self.accepted = [0] * ahead, [0] * ahead  # drafted tokens that came to a verdict, by position
        self.rounds = 0

    @property
    def base(self) -> Llama:
        return self.guided.base

    @property
    def llamas(self) -> list[Llama]:
        return [*self.guided.llamas, self.drafting.base]

    @property
    def acceptance(self) -> list[float]:
        """The share of drafted tokens that stood, of those that came to a verdict, for each position of a round."""
        return [ours / tried if tried else 0.0 for ours, tried in zip(self.accepted, self.tried)]

    def start(self, prompt: list[int], max_new_tokens: int) -> Tensor:
        self.drafting.start([prompt], max_new_tokens)
        return self.verifying.start([prompt], max_new_tokens)  # (1, 1)

    def round(self, last: Tensor, noise: Tensor, ahead: int, temperature: float, top_p: float) -> list[int]:
        """The next 1 to K tokens behind `last` (1, 1), with noise (2, K + 1) to draft by and to judge by; K is `ahead`."""
        length, V = self.verifying.caches[0].used, self.guided.readable
        tokens, z_delta, q = [last], [], []
        for k in range(ahead):
            z = self.drafting.step(tokens[-1])[:, -1, :V]  # (1, V)
            q.append(probabilities(z, temperature, top_p))
            if self.guided.value is not None:
                z_delta.append(self.drafting.z_delta.clone())  # the next step may write over it
            tokens.append(draw(q[-1], noise[0, k:k + 1])[:, None])
        z_base = self.verifying.step(torch.cat(tokens[:-1], dim=1))  # (1, K, Vb), one pass
        z = self.guided.post(z_base, torch.cat(z_delta, dim=1) if z_delta else None)[0, :, :V]  # (K, V), Eq. (3)
        p, q, drafted = probabilities(z, temperature, top_p), torch.cat(q), torch.cat(tokens[1:])  # (K, V), (K, V), (K, 1)
        stands = noise[1, :ahead, None] * q.gather(-1, drafted) < p.gather(-1, drafted)  # with probability min(1, p / q)
        count = stands.cumprod(0).sum()  # those before the first that does not stand
        row = count.clamp(max=ahead - 1)
        rest = (p[row] - q[row]).clamp(min=0)  # what the draft offered too rarely
        rest = torch.where(rest.sum() > 0, rest, p[row])  # p = q but for rounding
        instead = draw(rest[None], noise[1, -1:])
        count, *said = torch.cat((count[None], drafted[:, 0], instead)).tolist()  # the only word from device to host
        self.rounds += 1
        for k in range(min(count + 1, ahead)):
            self.tried[k] += 1
            self.accepted[k] += k < count
        for cache in [*self.drafting.caches, *self.verifying.caches]:
            cache.crop(length + min(count + 1, ahead))
        return said[:count] + said[-1:] * (count < ahead)


@torch.inference_mode()
def speculate(speculative: Speculative, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
              top_p: float = 1.0, seed: int = 0, stop_ids: set[int] | None = None,
              on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """generate by speculation, one prompt after the other."""
    check_prompts(prompts)
    stop_ids = guided_stop_ids(speculative.guided) if stop_ids is None else stop_ids
    outputs: list[list[int]] = [[] for _ in prompts]
    for row, (prompt, output) in enumerate(zip(prompts, outputs)):
        noise = uniform(seed, row, max_new_tokens, 2, speculative.ahead + 1).to(speculative.base.device)
        last = speculative.start(prompt, max_new_tokens)  # (1, 1)
        while (left := max_new_tokens - len(output)) and not (output and output[-1] in stop_ids):
            for token in speculative.round(last, noise[len(output)], min(speculative.ahead, left), temperature, top_p):
                output.append(token)
                if on_token:
                    on_token(row, token)
                if token in stop_ids:
                    break
            last = torch.tensor([output[-1:]], device=last.device)
    return outputs


class Passes(NamedTuple):
    """Seconds that parts of decoding take."""

    read: float  # a prompt, by base and value network
    read_to_speculate: float  # and by the drafting base
    plain: float  # a guided token
    drafted: float  # a drafted one
    verified: float  # the big base's pass over K tokens


@torch.inference_mode()
def measure_passes(speculative: Speculative, prompt: list[int], repeats: int = 15) -> Passes:
    """Medians, each part by itself, of a prompt and what is right behind it."""
    ahead, guided = speculative.ahead, speculative.guided
    seconds = Passes([], [], [], [], [])

    def take(taken: list[float], part: Callable[[], Tensor]) -> None:
        started = time.perf_counter()
        part().max().item()  # waits for a GPU
        taken.append(time.perf_counter() - started)

    for _ in range(repeats + 2):  # the first two warm up
        take(seconds.read, lambda: guided.start([prompt], ahead + 1))
        take(seconds.read_to_speculate, lambda: speculative.start(prompt, ahead + 1))
        last = torch.tensor([prompt[-1:]], device=speculative.base.device)
        noise = torch.zeros(1, device=last.device)
        for taken, system, tokens in ((seconds.plain, guided, last), (seconds.drafted, speculative.drafting, last),
                                      (seconds.verified, speculative.verifying, last.expand(1, ahead))):
            take(taken, lambda: draw(probabilities(system.step(tokens)[:, -1], 0.0, 1.0), noise))
    return Passes(*(sorted(taken[2:])[repeats // 2] for taken in seconds))


def predicted_speed_up(lengths: list[int], acceptance: list[float], passes: Passes) -> float:
    """How many times as fast speculation should write answers of these lengths as plain guided decoding does."""
    round_seconds = len(acceptance) * passes.drafted + passes.verified
    plain = sum(passes.read + length * passes.plain for length in lengths)
    return plain / sum(passes.read_to_speculate + expected_rounds(length, acceptance) * round_seconds for length in lengths)


def expected_rounds(length: int, acceptance: list[float]) -> float:
    """Rounds that an answer of `length` tokens takes, where the draft for position k of a round stands with acceptance[k].

    A round brings j tokens when j - 1 stand and the next does not, or all K: 1 + a_1 + a_1 a_2 + ... in the mean,
    less what it drafts beyond the answer's end.
    """
    reaches = [math.prod(acceptance[:k]) for k in range(len(acceptance))] + [0.0]  # that it brings more than k tokens
    rounds = [0.0]  # for 0, 1, ... tokens
    for n in range(1, length + 1):
        rounds.append(1 + sum((reaches[j - 1] - reaches[j]) * rounds[n - j] for j in range(1, min(n, len(acceptance) + 1))))
    return rounds[length]


# ---------------------------------------------------------------------------------------------------------
# Attribution: what the base would have said, and what the value network made of it


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token for a person to read, with its spaces made visible."""
    text = tokenizer.token_bytes(token).decode("utf-8", "replace")
    if not text:
        return "[end]" if token in (tokenizer.eos_id, tokenizer.end_of_turn_id) else f"[{token}]"
    return "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_attributions(tokenizer: Tokenizer, records: list[Attribution]) -> None:
    """A line for each token, those at which the value network decided with a mark."""
    def moved(each: list[tuple[int, float, float, float]]) -> str:
        return ", ".join(f"{token_name(tokenizer, id)} {after - before:+.2f}" for id, before, after, _ in each[:2])

    rows = [["", "said", "base alone", "decided", "p base", "p both", "z_delta", "|z_delta|", "raised", "lowered"]]
    for each in records:
        rows.append(["*" * (each.decided == "value"), token_name(tokenizer, each.token), token_name(tokenizer, each.base_token),
                     each.decided, f"{each.p_base:.3f}", f"{each.p_post:.3f}", f"{each.z_delta:+.1f}", f"{each.size:.1f}",
                     moved(each.raised), moved(each.lowered)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"    {count_decisions(records)}")


def count_decisions(records: list[Attribution]) -> str:
    base, value, chance = [sum(each.decided == who for each in records) for who in ("base", "value", "chance")]
    return (f"of {len(records)} tokens the base agreed with {base}, the value network overruled it at {value}"
            + f", chance chose {chance}" * bool(chance))


# ---------------------------------------------------------------------------------------------------------
# The tiny world


def examine(guided: Guided, world: World, tokenizer: Tokenizer, split: str = "development") -> dict[str, float]:
    """The tiny world's metrics (data/tiny_world.py, evaluate) of a base or a guided base."""
    return evaluate(world, tokenizer, lambda prompts: generate(guided, prompts, max_new_tokens=48),
                    lambda pairs: score(guided, pairs), split)


def show_world(world: World, systems: dict[str, tuple[Guided, Tokenizer]], count: int = 6) -> None:
    """Questions of the development split with every system's answer, then the metrics of all of them.

    Of two systems, the first questions as they come; of three, such as only the last answers rightly.
    """
    items = world.fact_items("development")
    answers = {}
    for name, (guided, tokenizer) in systems.items():
        prompts = [encode_chat(tokenizer, TEMPLATE, [("user", prompt_text(item))])[0] for item in items]
        answers[name] = [tokenizer.decode(ids).strip() for ids in generate(guided, prompts, max_new_tokens=48)]
    shown = range(len(items))
    if len(systems) > 2:
        *others, last = systems
        shown = [index for index in shown if answers[last][index] == items[index].answer
                 and all(answers[other][index] != items[index].answer for other in others)]
        print(f"{len(shown)} of {len(items)} questions only {last} answers rightly; {min(count, len(shown))} of them:")
    print()
    width = max(map(len, systems)) + 2
    for index in shown[:count]:
        print(prompt_text(items[index]))
        for name in systems:
            print(f"    {name:{width}}{answers[name][index]}")
        print(f"    {'truth':{width}}{items[index].answer}\n")
    print("On development people, whom no demonstration mentions (288 questions: about +-.03):")
    print_metrics({name: examine(guided, world, tokenizer) for name, (guided, tokenizer) in systems.items()})


# ---------------------------------------------------------------------------------------------------------
# Command line


def tiny_folder(name: str, homes: list[Path]) -> Path | None:
    """Where the tiny base of this name is or, if it is in none of `homes`, would be; None for the path of a checkpoint."""
    if name.removesuffix("-continued") in TINY_SIZES:
        return next((home / name for home in homes if (home / name).is_dir()), homes[-1] / name)
    if name.startswith("tiny-") and not Path(name).exists():
        raise UsageError(f"{name}: no such tiny model; there are {', '.join(TINY_SIZES)}, and tiny-s-continued and so on")
    return None


def newest_value() -> Path:
    found = sorted(Path("out").glob("**/ivl.json"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if not any(part.endswith(".training") for part in path.parts)]
    if not found:
        raise UsageError("no value network under out/ yet; `python train.py` trains one, in about 2 minutes on two cores")
    return found[-1].parent


def find_base(name: str | None, value: Path, info: dict) -> Path:
    """The folder of the base to guide: as asked, or the one that the value network was trained on."""
    if name is None:
        recorded = Path(info["bases"][0])
        beside = value.parent / recorded.name  # out/ may have been moved as a whole
        return beside if beside.is_dir() and not recorded.is_dir() else recorded
    path = tiny_folder(name, [value.parent, Path(info["bases"][0]).parent])
    if path is not None and not path.is_dir():
        world = world_of(value)
        command = f"python train.py --base {name.removesuffix('-continued')}" + " --continue" * name.endswith("-continued")
        raise UsageError(f"{path}: not there yet; `{command} --seed {world.seed if world else 0}` makes it, in a few minutes")
    return path or Path(name)


def room_for_answer(guided: Guided | Speculative, prompt: list[int], args: argparse.Namespace) -> int:
    """How many tokens an answer may have: as many as asked for, or as the checkpoints have positions for."""
    room = min(llama.config.max_position_embeddings for llama in [guided.base, *guided.llamas]) - len(prompt)
    if room < 1:
        raise UsageError(f"the conversation is {len(prompt)} tokens long, and the checkpoint ends at {room + len(prompt)}")
    return min(args.max_new_tokens, room)


def options_for(tokenizer: Tokenizer, template: str, args: argparse.Namespace) -> dict:
    """How `generate` is to answer a chat."""
    return dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                stop_ids={end_token(tokenizer, template), tokenizer.eos_id})


def answer(guided: Guided | Speculative, tokenizer: Tokenizer, template: str, turns: list[Turn], args: argparse.Namespace,
           show: bool = False) -> str:
    """The assistant's next turn; with `show` it is printed as it comes."""
    prompt, _ = encode_chat(tokenizer, template, turns)
    decoder = StreamDecoder(tokenizer)
    started = time.monotonic()
    on_token = (lambda _, token: print(decoder.push(token), end="", flush=True)) if show else None
    say = speculate if isinstance(guided, Speculative) else generate
    ids = say(guided, [prompt], max_new_tokens=room_for_answer(guided, prompt, args), on_token=on_token,
              **options_for(tokenizer, template, args))[0]
    if show:
        print(decoder.finish())
        print(f"    {len(ids)} tokens, {len(ids) / (time.monotonic() - started):.1f} tokens/s", file=sys.stderr)
    return tokenizer.decode(ids).strip()


def explained(guided: Guided, tokenizer: Tokenizer, template: str, text: str, args: argparse.Namespace) -> list[Attribution]:
    """The guided answer to one question, token by token."""
    prompt, _ = encode_chat(tokenizer, template, [("user", text)])
    records: list[Attribution] = []
    generate(guided, [prompt], max_new_tokens=room_for_answer(guided, prompt, args),
             on_token=lambda _, token: records.append(guided.attribute(token)), **options_for(tokenizer, template, args))
    return records


def show_speculation(speculative: Speculative, name: str, draft: str, tokenizer: Tokenizer, template: str, texts: list[str],
                     args: argparse.Namespace) -> None:
    """Answer plainly and by speculation, say how both went, and whether it paid."""
    guided, seconds, answers = speculative.guided, [0.0, 0.0], [[], []]
    prompts = [encode_chat(tokenizer, template, [("user", text)])[0] for text in texts]
    passes = measure_passes(speculative, prompts[0])  # a warm-up, too
    options = options_for(tokenizer, template, args)
    for text, prompt in zip(texts, prompts):
        room = room_for_answer(speculative, prompt, args)
        for way, (say, system) in enumerate([(generate, guided), (speculate, speculative)]):
            started = time.perf_counter()
            answers[way].append(say(system, [prompt], max_new_tokens=room, **options)[0])
            seconds[way] += time.perf_counter() - started
        if args.prompt:
            print(f"\n{text}\n    {tokenizer.decode(answers[1][-1]).strip()}")
    plain_tokens, tokens = [sum(map(len, each)) for each in answers]
    predicted = predicted_speed_up([len(each) for each in answers[1]], speculative.acceptance, passes)
    measured = seconds[0] / plain_tokens / (seconds[1] / tokens)
    print(f"\n{name}, {speculative.ahead} tokens at a time drafted by {draft} with the same z_delta: {len(texts)} answers, "
          f"{tokens} tokens")
    if args.temperature == 0:
        gaps = [gap_at_difference(guided, *each) for each in zip(prompts, *answers) if each[1] != each[2]]
        print("    " + (f"{len(gaps)} answers differ from those without, first where the two best logits are at most "
                        f"{max(gaps):.1e} apart" if gaps else "the same tokens as without"))
    print("    drafted tokens accepted, by position: " + " ".join(
        f"{share:.2f}" if tried else "-" for share, tried in zip(speculative.acceptance, speculative.tried))
          + f"; {tokens / speculative.rounds:.2f} tokens a round")
    print(f"    milliseconds: {1000 * passes.plain:.2f} for a guided token, {1000 * passes.drafted:.2f} to draft one, "
          f"{1000 * passes.verified:.2f} to verify {speculative.ahead}")
    print(f"    speed-up: predicted {predicted:.2f}, measured {measured:.2f}" + ": it does not pay here" * (measured <= 1))


@torch.inference_mode()
def gap_at_difference(guided: Guided, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far the two best logits are apart where two greedy answers part: rounding alone can decide a near-tie."""
    same = next(index for index in range(max(len(one), len(other))) if one[index:index + 1] != other[index:index + 1])
    first, second = guided.logits(torch.tensor([prompt + one[:same]], device=guided.base.device))[0, -1].float().topk(2).values
    return (first - second).item()


def chat(guided: Guided | Speculative, tokenizer: Tokenizer, template: str, args: argparse.Namespace) -> None:
    turns: list[Turn] = []
    if sys.stdin is None:
        raise UsageError("--chat reads questions from standard input, which is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print("An empty line begins a new conversation, the end of input (Ctrl-D) leaves.")
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            return print()
        if not question:
            turns = []
            continue
        try:
            said = answer(guided, tokenizer, template, turns + [("user", question)], args, show=True)
        except UsageError as error:
            print(f"({error}; an empty line begins a new one)")
            continue
        turns += [("user", question), ("assistant", said)]


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """The flags that say what guides what, and how it speaks."""
    parser.add_argument("--value", metavar="FOLDER", help="a value network (default: the newest under out/)")
    parser.add_argument("--base", metavar="B", help="a checkpoint folder or a tiny name (default: the one it was trained on)")
    parser.add_argument("--expert", metavar="FOLDER", help="proxy tuning instead: a small model after post-training")
    parser.add_argument("--anti-expert", metavar="FOLDER",
                        help="the same model before it (default: what the expert's train.json names)")
    parser.add_argument("--template", choices=TEMPLATES, help="chat template of the expert (a value network records its own)")
    parser.add_argument("--alpha", type=any_float, default=1.0, help="weight of z_delta; 0 is the base alone (default 1)")
    parser.add_argument("--vocab-map", metavar="FILE", help="a map between base and value network of different tokenizers, by "
                        "vocab_map.py (default: made on the spot, from the tokenizers alone)")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="questions to answer (default: some of the tiny world's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="N", help="per answer (default 256)")
    parser.add_argument("--temperature", type=non_negative_float, default=0.0,
                        help="0 is greedy (default)")
    parser.add_argument("--top-p", type=positive_float, default=1.0,
                        help="sample from the likeliest tokens that make up this share")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and computation")


def parse_guidance(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of which those that add_guidance added fit together."""
    args = parser.parse_args()
    if args.expert and args.value:
        parser.error("--expert and --value are two ways to guide; choose one")
    if not args.expert and (args.anti_expert or args.template):
        parser.error("--anti-expert and --template go with --expert")
    if args.top_p > 1:
        parser.error("--top-p is a share, at most 1")
    for text in args.prompt or []:
        if not is_unicode(text):
            parser.error("--prompt is not UTF-8")
    return args


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_guidance(parser)
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--explain", action="store_true", help="say of each token who decided, the base or the value network")
    few = number(int, 0, f"whole number from 1 to {LONGEST_CAPTURED}", LONGEST_CAPTURED + 1)
    parser.add_argument("--speculate", type=few, metavar="K", help="let a small base with the same value network draft K tokens, "
                        "which the base verifies in one pass; what is said stays the same")
    parser.add_argument("--draft", metavar="B", help="that small base (default: the one the value network was trained on)")
    args = parse_guidance(parser)
    if args.chat and args.prompt:
        parser.error("--chat and --prompt are two ways to ask; choose one")
    if args.explain and (args.chat or args.speculate):
        parser.error("--explain goes with --prompt or the tiny world's questions, one token at a time")
    if args.draft and not args.speculate:
        parser.error("--draft goes with --speculate")
    return args


def read_expert(args: argparse.Namespace) -> dict:
    """What a value network's ivl.json would say of proxy tuning, with the anti-expert in place of its base."""
    expert = Path(args.expert)
    if (expert / "ivl.json").exists():
        raise UsageError(f"--expert {expert}: a value network, which is plugged in with --value")
    record = read_json(expert / "train.json") if (expert / "train.json").is_file() else {}
    untuned = [args.anti_expert] if args.anti_expert else record.get("bases")
    if not isinstance(untuned, list) or not untuned or not isinstance(untuned[0], str):
        raise UsageError(f"--expert {expert}: it does not record what it was tuned from; name that with --anti-expert")
    template = args.template or record.get("template") or default_template(load_tokenizer(expert))
    if template not in TEMPLATES:
        raise UsageError(f"{expert}/train.json: template {template!r} is not supported; choose one with --template")
    return {"bases": untuned, "template": template}


def choose_map(args: argparse.Namespace, base: Tokenizer, value: Tokenizer, info: dict) -> VocabMap | None:
    """The vocabulary map that was asked for, or one made from the tokenizers where they are unrelated."""
    if not args.vocab_map and is_same_family(base, value):
        return None
    scheme = info.get("scheme", "residual")
    if scheme != "residual":
        raise UsageError(f"a value network of scheme {scheme} reads the base's logits over its own vocabulary, so it has no use "
                         "for a base with another tokenizer; a residual one has")
    if args.vocab_map:
        return VocabMap.load(args.vocab_map, base, value)
    print("the base has another tokenizer than the value network: made a vocabulary map from the two (vocab_map.py)", flush=True)
    return build(base, value)


@dataclass
class Plugged:
    """What a command line asks for, loaded: a base with something plugged in, and the base alone."""

    guided: Guided
    tokenizer: Tokenizer  # of its tokens: what all networks can read or, through a vocabulary map, the value network's
    alone: Guided
    base_tokenizer: Tokenizer
    template: str
    alone_template: str
    base_path: Path
    own_path: Path  # the base that the value network was trained on, or the anti-expert
    name: str  # of the base with what is plugged in
    world: World | None


def plug_in(args: argparse.Namespace, chats: bool = False) -> Plugged:
    """Load and check everything that guided decoding needs. UsageError or CheckpointError where things do not fit, or
    where there is nothing to ask: no --prompt, no chat, and no tiny world."""
    if args.expert:
        value_path, info = Path(args.expert), read_expert(args)
    else:
        value_path = newest_value() if args.value is None else Path(args.value)
        info = read_info(value_path)
    own_path = find_base(None, value_path, info)
    base_path = find_base(args.base, value_path, info) if args.base else own_path
    refuse_value_network("--base", base_path)
    plugs = [value_path, own_path] if args.expert else [value_path]  # what z_delta is made of
    tokenizers = [load_tokenizer(path) for path in [base_path, *plugs]]
    if not args.expert:
        check_recorded(tokenizers[1], info, str(value_path))
    for path, other in zip(plugs, tokenizers[1:]):
        check_same_family(tokenizers[1], other, str(value_path), str(path))
    tokenizer = min(tokenizers[1:], key=lambda each: each.vocab_size)  # what all can read
    vocab_map = choose_map(args, tokenizers[0], tokenizer, info)
    if vocab_map is None:
        tokenizer = min(tokenizer, tokenizers[0], key=lambda each: each.vocab_size)
    world = world_of(base_path)
    if not (world or chats or args.prompt):
        raise UsageError("this base is not from the tiny world, which brings its own questions; ask with --prompt or --chat")
    device, dtype = pick_device(args.dtype, tiny=world is not None)
    print(f"base {base_path}, " + (f"proxy tuning by {value_path} less {own_path}" if args.expert else
                                   f"value network {value_path} ({info['scheme']})"))
    if args.expert:
        value = ProxyDelta(*(Llama.from_pretrained(path, getattr(torch, dtype), device) for path in plugs))
    else:
        value = ValueModel.from_pretrained(value_path, getattr(torch, dtype), device)
    guided = guide(base_path, value, tokenizer, args.alpha, vocab_map)
    alone, own = Guided(guided.base), tokenizers[0] if vocab_map else tokenizer
    alone.readable = min(alone.readable, own.vocab_size) if vocab_map else guided.readable
    template = info["template"]
    alone_template = template if template == "llama-2" or own.kind == "tiktoken" else default_template(own)
    return Plugged(guided, tokenizer, alone, own, template, alone_template, base_path, own_path,
                   f"{base_path.name} + {'proxy' if args.expert else 'value'}", world)


def refuse_value_network(flag: str, path: Path) -> None:
    if (path / "ivl.json").exists():
        raise UsageError(f"{flag} {path}: a value network, which is no base")


def guide(path: Path, value: ValueModel | ProxyDelta, tokenizer: Tokenizer, alpha: float, vocab_map: VocabMap | None = None
          ) -> Guided:
    """The base in a folder with something plugged in, in its dtype and on its device."""
    base = Llama.from_pretrained(path, next(value.parameters()).dtype, value.device)
    if isinstance(value, ValueModel) and value.scheme == "probe" and base.config.vocab_size < value.vocab_size:
        raise UsageError(f"{path}: {base.config.vocab_size} logits, and the probe reads {value.vocab_size}")
    guided = Guided(base, value, vocab_map, alpha)
    guided.readable = min(guided.readable, tokenizer.vocab_size)
    return guided


def plug_in_draft(plugged: Plugged, args: argparse.Namespace) -> tuple[Speculative, str]:
    """The base with something plugged in, and a small one to draft for it; the small one's name."""
    path = plugged.own_path if args.draft is None else find_base(args.draft, plugged.own_path, {"bases": [str(plugged.own_path)]})
    refuse_value_network("--draft", path)
    if plugged.guided.mapped is None and not is_same_family(plugged.tokenizer, load_tokenizer(path)):
        raise UsageError(f"--draft {path}: it has another tokenizer than {plugged.base_path}, for which it would have to draft")
    draft = Llama.from_pretrained(path, plugged.guided.base.dtype, plugged.guided.base.device)
    try:
        return Speculative(plugged.guided, draft, args.speculate), path.name
    except ValueError as error:
        raise UsageError(f"--speculate: {error}") from None


def main():
    args = parse_arguments()
    plugged = plug_in(args, chats=args.chat)
    guided, tokenizer, template, name = plugged.guided, plugged.tokenizer, plugged.template, plugged.name
    texts = args.prompt or (plugged.world and [prompt_text(item) for item in plugged.world.fact_items("development")])
    if args.speculate:
        speculative, draft = plug_in_draft(plugged, args)
        if not args.chat:
            return show_speculation(speculative, name, draft, tokenizer, template, texts if args.prompt else texts[:48], args)
    if args.chat:
        return chat(speculative if args.speculate else guided, tokenizer, template, args)
    if args.explain:
        for text in texts if args.prompt else texts[:3]:
            records = explained(guided, tokenizer, template, text, args)
            print(f"\n{text}\n{tokenizer.decode([each.token for each in records]).strip()}")
            print_attributions(tokenizer, records)
        return
    alone, own = f"{plugged.base_path.name} alone", plugged.own_path
    if args.prompt:
        for text in args.prompt:
            by_alone = answer(plugged.alone, plugged.base_tokenizer, plugged.alone_template, [("user", text)], args)
            print(f"\n{text}\n    {alone:{len(name) + 2}}{by_alone}", flush=True)
            print(f"    {name:{len(name) + 2}}{answer(guided, tokenizer, template, [('user', text)], args)}")
        return
    systems = {alone: (plugged.alone, plugged.base_tokenizer)}
    if own.resolve() != plugged.base_path.resolve() and own.is_dir():  # show what the bigger base adds
        systems[f"{own.name} + {name.split()[-1]}"] = guide(own, guided.value, tokenizer, args.alpha), tokenizer
    show_world(plugged.world, systems | {name: (guided, tokenizer)})


if __name__ == "__main__":
    run_cli(main)
