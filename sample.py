"""Decoding: a base alone, or a base guided by a value network.

    python sample.py                            # the newest value network, on questions it never saw
    python sample.py --base tiny-l              # the same value network plugged into a bigger base
    python sample.py --prompt "Greet Ruja. Say it twice."
    python sample.py --base tiny-l --expert out/seed0/full-tiny-s    # proxy tuning in its place
    python sample.py --chat

In this order: one guided step, how a token is picked, whole answers and how likely given ones are,
answers to what is asked in words; last, a step through a vocabulary map.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import encode_chat, stop_ids, with_system
from data.errors import UsageError
from data.records import Turn
from data.tokenizer import Tokenizer
from ivl import SumDelta, ValueModel, combine
from model import KVCache, Llama
from vocab_map import VocabMap

# --------------------------------------------------------------------------------------------------
# One step (Section 4.2)


class Guided:
    """A base, what guides it if anything, and the KV caches of all networks. Eq. (3) at each step.

    After a step, z_base (B, T, Vb) and z_delta (B, T, Vv) are what z_post was made of.
    """

    sampling = False  # whether all probabilities are wanted, or only which is the largest

    def __init__(
        self,
        base: Llama,
        value: ValueModel | SumDelta | None = None,
        alpha: float = 1.0,
        readable: int | None = None,
    ):
        self.base, self.value, self.alpha = base, value, alpha
        for network in (base, value):
            if network is not None:
                network.eval()  # Dropout and its like are for training
        self.llamas = [base] if value is None else [base, *value.llamas]
        # Tokens from `readable` on are never said: some network cannot read them, or the tokenizer
        # has no text for them.
        self.readable = min(base.config.vocab_size, readable or base.config.vocab_size)
        if value is not None:
            self.readable = min(self.readable, value.vocab_size)
        self.caches: list[KVCache] = []  # one for each of llamas

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], max_new_tokens: int) -> Tensor:
        """Fill fresh caches with all but the last token of each prompt.

        Return those last tokens (B, 1).
        """
        longest = max(map(len, prompts)) - 1
        self.allocate(len(prompts), longest + max_new_tokens)
        if longest > 0:
            self.read(pad([prompt[:-1] for prompt in prompts]).to(self.base.device))
            lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.base.device)
            for cache in self.caches:
                cache.crop(lengths)  # forget the padding
        return torch.tensor([prompt[-1:] for prompt in prompts], device=self.base.device)

    def allocate(self, batch: int, capacity: int) -> None:
        """Empty caches for `capacity` positions of `batch` rows."""
        self.caches = [KVCache(llama, batch, capacity) for llama in self.llamas]

    def read(self, tokens: Tensor) -> None:
        """Take tokens (B, T) into the caches.

        Their logits are not needed, except the base's by a cascade, which reads them.
        """
        if self.value is not None and self.value.scheme.startswith("cascade"):
            self.value(tokens, self.base(tokens, self.caches[0]), self.caches[1:])
        else:
            for llama, cache in zip(self.llamas, self.caches):
                llama.model(tokens, cache)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Continue each row by tokens (B, T) -> z_post (B, T, Vb).

        The first step may be a whole prompt.
        """
        if not self.caches:
            self.allocate(
                len(tokens), min(llama.config.max_position_embeddings for llama in self.llamas)
            )
        return self.logits(tokens, self.caches)

    def logits(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """z_post (B, T, Vb) of tokens (B, T): whole rows, or with caches what continues them."""
        base_cache, *value_caches = caches or [None]
        self.z_base = self.base(tokens, base_cache)  # (B, T, Vb), Eq. (1)
        self.z_delta = None
        if self.value is not None:
            self.z_delta = self.value(tokens, self.z_base, value_caches)  # (B, T, Vv), Eq. (2)
        return self.post(self.z_base, self.z_delta)

    def post(self, z_base: Tensor, z_delta: Tensor | None) -> Tensor:
        """z_post (..., Vb), with -inf for what is never said."""
        z_post = z_base if z_delta is None else combine(z_base, z_delta, self.alpha)  # Eq. (3)
        return F.pad(
            z_post[..., : self.readable], (0, z_post.shape[-1] - self.readable), value=-torch.inf
        )

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by `rows` (B',), in that order; a row named twice is forked."""
        for cache in self.caches:
            cache.select(rows)


def pad(rows: list[list[int]]) -> Tensor:
    """Rows of tokens as (B, T), padded on the right with 0."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(padded, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded


def refuse_nan(guided: Guided, logits: Tensor) -> None:
    """UsageError that names the network whose logits are no numbers, if `logits` (..., V) are none."""
    if logits.max(-1).values.isfinite().all():
        return
    named = "base" if not guided.z_base.max(-1).values.isfinite().all() else "value network"
    dtype = str(guided.base.dtype).removeprefix("torch.")
    raise UsageError(
        f"the {named}'s logits are no numbers (nan or inf) in {dtype}: it has "
        "damaged weights, or ones too large for this dtype; --dtype float32 may do"
    )


# --------------------------------------------------------------------------------------------------
# How a token is picked


def pick(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens (B,) from logits (B, V): the arg-max, or one drawn from the nucleus top_p.

    noise (B,) is uniform in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_p), noise)


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """How likely each token is to be picked, (B, V), from logits (B, V).

    At temperature 0 all of it is on the arg-max.
    """
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(
            -1, logits.argmax(-1, keepdim=True), 1.0
        )
    # less the largest, so that no temperature overflows; divided by what float32 rounds to 0, it
    # would be 0 / 0
    logits = logits.float() - logits.max(-1, keepdim=True).values.float()
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1)  # (B, V)
    if top_p < 1:
        # The thousand largest nearly always reach top_p, and are found far sooner than all are
        # sorted.
        largest = p.topk(min(1000, p.shape[-1])).values  # (B, 1000)
        if (sum_up(largest)[:, -1] < top_p).any():
            largest = p.sort(-1, descending=True).values  # (B, V)
        # A token stays if those before it do not reach top_p.
        stays = sum_up(largest) - largest < top_p
        least = largest.masked_fill(~stays, 1).amin(-1, keepdim=True)  # (B, 1)
        # Of those as likely as the last that stays, the first ones do.
        places = (stays & (largest == least)).sum(-1, keepdim=True)  # (B, 1)
        ties = p == least  # (B, V)
        p = p * ((p > least) | ties & (ties.cumsum(-1) <= places))
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p: Tensor, noise: Tensor) -> Tensor:
    """Tokens (B,): where noise (B,) falls in the cumulative sum of p (B, V).

    p need not sum to 1.
    """
    total = sum_up(p)
    below = (total <= noise[:, None] * total[:, -1:]) & (total < total[:, -1:])
    tokens = below.sum(-1, keepdim=True)  # (B, 1)
    # Rounding must not choose what has no share.
    return torch.where(p.gather(-1, tokens) > 0, tokens, p.argmax(-1, keepdim=True))[:, 0]


def sum_up(p: Tensor) -> Tensor:
    """Cumulative sums (B, V), so exact that processes that decode together agree."""
    return p.cumsum(-1, dtype=torch.float32 if p.device.type == "mps" else torch.float64)


def uniform(seed: int, number: int, *shape: int) -> Tensor:
    """Numbers from [0, 1), the random stream of prompt `number`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


# --------------------------------------------------------------------------------------------------
# Whole answers, and how likely given ones are


@torch.inference_mode()
def generate(
    guided: Guided,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue token prompts; return the new tokens of each, with a stop token where one came.

    temperature 0 is greedy. Each prompt has a random stream of its own, by its place in the list,
    so a sampled answer does not depend on what is beside it. on_token(prompt, token) is called as
    tokens come; True ends.
    """
    check_prompts(prompts)
    noise = torch.stack([uniform(seed, number, max_new_tokens) for number in range(len(prompts))])
    noise = noise.to(guided.base.device)  # (B, max_new_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    ended = [False] * len(prompts)
    guided.sampling = temperature > 0
    tokens = guided.start(prompts, max_new_tokens)  # (B, 1)
    for index in range(max_new_tokens):
        # one token for every row
        logits = guided.step(tokens)[:, -1]  # (B, V)
        refuse_nan(guided, logits)
        tokens = pick(logits, noise[:, index], temperature, top_p)[:, None]  # (B, 1)
        # keep those of texts that have not ended
        for prompt, token in zip(running, tokens[:, 0].tolist()):
            if not ended[prompt]:
                outputs[prompt].append(token)
                is_enough = on_token is not None and on_token(prompt, token) is True
                ended[prompt] = is_enough or token in stop_ids
        # shrink the batch now and then rather than carry ended rows along
        still = [row for row, prompt in enumerate(running) if not ended[prompt]]
        if not still:
            break
        if len(still) <= len(running) // 2:
            rows = torch.tensor(still, device=tokens.device)
            guided.select(rows)
            tokens, noise, running = tokens[rows], noise[rows], [running[row] for row in still]
    return outputs


def check_prompts(prompts: list[list[int]]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")


@torch.inference_mode()
def score(
    guided: Guided, pairs: list[tuple[list[int], list[int]]], batch_size: int = 256
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) its log-likelihood in nats, and whether it is what greedy says.

    A context that comes several times in a batch, as in multiple choice, is computed once.
    """
    if not all(context and continuation for context, continuation in pairs):
        raise ValueError("score needs at least one token in each context and in each continuation")
    results = []
    guided.sampling = True
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        # each context once, then a row for each pair
        contexts = list(dict.fromkeys(tuple(context) for context, _ in batch))
        longest = max(len(continuation) for _, continuation in batch)
        last = guided.start([list(context) for context in contexts], longest)  # (contexts, 1)
        rows = [contexts.index(tuple(context)) for context, _ in batch]
        rows = torch.tensor(rows, device=last.device)  # (B,)
        guided.select(rows)
        # all continuations in one step, less their last tokens, which predict nothing
        behind = pad([[0, *continuation[:-1]] for _, continuation in batch])  # (B, longest)
        behind = behind.to(last.device)
        behind[:, :1] = last[rows]
        logits = guided.step(behind)  # (B, longest, V)
        refuse_nan(guided, logits)
        log_p = F.log_softmax(logits.float(), dim=-1)
        for row, (_, continuation) in enumerate(batch):
            wanted = torch.tensor(continuation, device=last.device)[:, None]
            here = log_p[row, : len(continuation)]
            is_greedy = bool((here.argmax(-1) == wanted[:, 0]).all())
            results.append((here.gather(-1, wanted).sum().item(), is_greedy))
    return results


# --------------------------------------------------------------------------------------------------
# Asked in words


@dataclass
class Speaker:
    """A guided base with its tokenizer and its chat template, which can be asked in words."""

    name: str
    guided: Guided
    tokenizer: Tokenizer
    template: str
    system: str = ""  # a system prompt
    generate: Callable = generate
    stamp: str = ""  # of its checkpoints, by which kept answers of others are noticed

    def encode(self, turns: list[Turn]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's next turn begins."""
        return encode_chat(self.tokenizer, self.template, with_system(self.system, turns))[0]

    @property
    def longest(self) -> int:
        """How many positions all of its checkpoints have."""
        llamas = [self.guided.base, *self.guided.llamas]
        return min(llama.config.max_position_embeddings for llama in llamas)

    def prepare(self, turns: list[Turn], args) -> tuple[list[int], dict]:
        """The prompt that asks for the assistant's next turn, and how `generate` is to answer it.

        args has max_new_tokens, temperature, top_p and seed. UsageError where no answer fits.
        """
        prompt = self.encode(turns)
        room = self.longest - len(prompt)
        if room <= 0:
            raise UsageError(
                f"the conversation is {len(prompt)} tokens long, and the checkpoint ends at "
                f"{self.longest}"
            )
        options = dict(
            max_new_tokens=min(args.max_new_tokens, room),
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            stop_ids=stop_ids(self.tokenizer, self.template, self.guided.llamas),
        )
        return prompt, options

    def answer(self, turns: list[Turn], args, on_token: Callable | None = None) -> str:
        """The assistant's next turn."""
        prompt, options = self.prepare(turns, args)
        ids = self.generate(self.guided, [prompt], on_token=on_token, **options)[0]
        return self.tokenizer.decode(ids).strip()


# --------------------------------------------------------------------------------------------------
# The same through a vocabulary map (Section 4.2.2)


class MappedGuided(Guided):
    """A base guided by a value network with another tokenizer, whose tokens all of these are.

    The base reads the same text in its own tokens; Eq. (5) makes its logits (B, Vb) ones over the
    value network's vocabulary (B, Vv). beyond/hypotheses.py does better where a token of one is
    several of the other.
    """

    def __init__(
        self,
        base: Llama,
        value: ValueModel,
        vocab_map: VocabMap,
        alpha: float = 1.0,
        ask: Callable[[list[int]], list[int]] | None = None,
    ):
        if value.scheme != "residual":
            raise ValueError(
                f"scheme {value.scheme} reads the base's logits over its own vocabulary, and here are "
                "others"
            )
        super().__init__(base, value, alpha)
        self.map = vocab_map
        self.llamas = value.llamas  # the base has a cache of its own, in its own tokens
        self.readable = min(value.vocab_size, vocab_map.value_tokenizer.vocab_size)
        self.never = torch.tensor(vocab_map.unsayable(), dtype=torch.long, device=base.device)
        self.ask = ask  # a prompt -> how the base is asked, in its tokens, if that is another text
        self.texts: list[list[int]] = []  # each row's value tokens so far, behind what `ask` gave
        self.base_tokens_read = self.value_tokens_asked = 0  # behind prompts

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], max_new_tokens: int) -> Tensor:
        self.begin(prompts)
        return super().start(prompts, max_new_tokens)

    def begin(self, prompts: list[list[int]]) -> None:
        """Let the base read whole prompts."""
        self.base_tokens_read = self.value_tokens_asked = 0
        self.is_new = True  # the next step's token is a prompt's last, which the base has read
        self.texts, self.asked = map(list, zip(*map(self.split, prompts)))
        # of each row, what is in the base's cache
        self.base_tokens: list[list[int]] = [[] for _ in prompts]
        self.base_cache = KVCache(self.base, len(prompts), 0)
        self.read_texts()

    def split(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Value tokens that the base reads through the map, and base tokens in front of them."""
        return (list(prompt), []) if self.ask is None else ([], self.ask(prompt))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> z_post (B, T, Vv).

        After it z_base, too, is over the value network's vocabulary.
        """
        if not self.caches:
            self.begin(tokens[:, :1].tolist())
            self.allocate(
                len(tokens), min(llama.config.max_position_embeddings for llama in self.llamas)
            )
        return torch.cat([self.one_step(column) for column in tokens.split(1, dim=1)], dim=1)

    def one_step(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1) -> z_post (B, 1, Vv)."""
        if not self.is_new:
            self.push(tokens[:, 0].tolist())
        self.is_new = False
        self.value_tokens_asked += len(tokens)
        self.z_delta = self.value(tokens, None, self.caches).float()  # (B, 1, Vv)
        z_base = self.base_logits(self.alpha * self.z_delta[:, 0])  # (B, Vv)
        self.z_base = z_base.index_fill(1, self.never, -torch.inf)[:, None]  # (B, 1, Vv)
        return self.post(self.z_base, self.z_delta)

    def push(self, tokens: list[int]) -> None:
        """Take the value token that each row goes on with."""
        for text, token in zip(self.texts, tokens):
            text.append(token)
        self.base_tokens_read += self.read_texts()

    def base_logits(self, z_delta: Tensor) -> Tensor:
        """What the base says of the next value token, (B, Vv).

        Here without a look at z_delta (B, Vv). beyond/hypotheses.py looks.
        """
        return self.map.map_logits(self.z_next, self.value.vocab_size)

    def read_texts(self) -> int:
        """Let the base read what is new in each row, in its own tokens.

        Returns how many those are.
        """
        # What the tokenizer cuts as before is in the cache. The last token is read again for its
        # logits.
        rows, kept = [], []
        for text, asked, known in zip(self.texts, self.asked, self.base_tokens):
            tokens = asked + self.map.in_base_tokens(text)[0]
            same = 0
            while same < min(len(tokens) - 1, len(known)) and tokens[same] == known[same]:
                same += 1
            rows.append(tokens)
            kept.append(same)
        # One pass over what is new, padded; a larger cache, if it takes one, begins anew.
        longest_new = max(len(tokens) - same for tokens, same in zip(rows, kept))
        if max(kept) + longest_new > self.base_cache.capacity:
            kept = [0] * len(rows)
            self.base_cache = KVCache(self.base, len(rows), 2 * max(map(len, rows)) + 64)
        self.base_cache.crop(torch.tensor(kept, device=self.base.device))
        new = [tokens[same:] for tokens, same in zip(rows, kept)]
        hidden = self.base.model(pad(new).to(self.base.device), self.base_cache)  # (B, T, D)
        self.base_cache.crop(
            torch.tensor([len(tokens) for tokens in rows], device=self.base.device)
        )
        ends = [len(tokens) - 1 for tokens in new]
        last = hidden[torch.arange(len(new)), ends]  # (B, D)
        self.z_next = self.base.lm_head(last).float()  # (B, Vb), behind each row's text
        self.base_tokens = rows
        return sum(map(len, new))

    def logits(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        raise ValueError("through a vocabulary map there are only steps")

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.texts = [list(self.texts[row]) for row in rows.tolist()]
        self.asked = [self.asked[row] for row in rows.tolist()]
        self.base_tokens = [self.base_tokens[row] for row in rows.tolist()]
        self.base_cache.select(rows)
        self.z_next = self.z_next[rows]


# --------------------------------------------------------------------------------------------------


def main():
    from run.arguments import sample_arguments  # here and not at the top: run/ imports this file
    from run.plug import plug_in
    from run.processes import join_decoders
    from run.show import (
        show_answers,
        show_chat,
        show_explained,
        show_playground,
        show_speculation,
        show_world,
    )

    args = sample_arguments()
    with join_decoders(args.device) as processes:
        plugged = plug_in(args, processes)
        if args.chat:
            show_chat(plugged, args)
        elif args.web:
            show_playground(plugged, args)
        elif args.explain:
            show_explained(plugged, args)
        elif args.speculate:
            show_speculation(plugged, args)
        elif args.prompt:
            show_answers(plugged, args)
        else:
            show_world(plugged)


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
