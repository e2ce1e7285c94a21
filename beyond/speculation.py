"""Speculative decoding (Section 3.1, limitations): the value network drafts, and the base verifies.

    python sample.py --base tiny-l --speculate 4

What z_delta says by itself is mostly what base and value network say together. So the value network
writes some tokens alone. Then the base reads them in one pass. z_delta is known by then, and Eq. (3) says
what should have come in each place. So each pass of the base brings several tokens, and the value network
reads no token twice. A small base can help to draft (`--draft`): its drafts stand more often, and each
costs a pass of it, too.

The text is what sample.generate writes, says tests/test_decoding.py. Greedy: the same tokens. Sampled:
tokens of the same distribution (Leviathan et al. 2023; Chen et al. 2023).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl import SumDelta, ValueModel
from model import KVCache, Llama, LlamaConfig
from sample import (
    Guided,
    MappedGuided,
    check_prompts,
    draw,
    pad,
    pick,
    probabilities,
    refuse_nan,
    uniform,
)

# By what z_delta is multiplied where it drafts alone, whatever alpha is. z_post is sharper than it by about this much:
# the base, of which the value network began as a copy, says much the same. Of tokens sampled at temperature 1 from tiny-l
# and its value network .867 stand with 1, .917 with 2, .920 with 3 or 4. Greedily it changes nothing.
SHARPER = 2.0


class Silent(Llama):
    """A base that says nothing, z_base = 0: what guides it speaks alone."""

    def __init__(self, value: ValueModel | SumDelta):
        super().__init__(LlamaConfig(value.vocab_size, 2, 2, 0, 1, tie_word_embeddings=True))
        self.to(value.device, value.llamas[0].dtype).requires_grad_(False)

    def forward(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Zeros (B, T, Vv)."""
        cache.advance(tokens.shape[1])
        zeros = torch.zeros(self.config.vocab_size, dtype=self.dtype, device=self.device)
        return zeros.expand(*tokens.shape, -1)


class Speculative:
    """A guided base whose tokens are drafted `ahead` at a time by its value network and perhaps a small base.

    Of the drafted tokens those before the first rejected one stand. One more is drawn behind them.

    ValueError for a scheme that reads the base's logits, for a vocabulary map, for a draft of too few
    tokens, and where nothing can draft.
    """

    def __init__(self, guided: Guided, ahead: int, draft: Llama | None = None):
        if isinstance(guided, MappedGuided):
            raise ValueError(
                "through a vocabulary map, tokens are not the base's, so it cannot verify several in one pass"
            )
        scheme = getattr(guided.value, "scheme", "residual")
        if scheme != "residual":
            raise ValueError(
                f"a {scheme} reads the base's logits, so it can say nothing before the base has read the "
                "text; a residual one can"
            )
        if guided.value is None and draft is None:
            raise ValueError("no value network guides this base, so it takes another base to draft")
        self.guided, self.ahead = guided, ahead
        kind = type(guided)  # plain or fast
        if draft is None:
            self.drafting = kind(Silent(guided.value), guided.value, SHARPER, guided.readable)
        else:
            self.drafting = kind(draft, guided.value, guided.alpha, guided.readable)
        if self.drafting.readable < guided.readable:
            raise ValueError(
                f"the drafting base reads {self.drafting.readable} tokens, and the other one {guided.readable}"
            )
        self.verifying = kind(guided.base)
        # How it went: rounds of a text, drafted tokens that came to a verdict, and those that stood.
        self.rounds = self.tried = self.accepted = 0

    @property
    def base(self) -> Llama:
        return self.guided.base

    @property
    def llamas(self) -> list[Llama]:
        return [*self.guided.llamas, self.drafting.base]

    def start(self, prompts: list[list[int]], max_new_tokens: int) -> Tensor:
        """Draft from all but the last token of each prompt; return those last tokens (B, 1)."""
        self.unread = [prompt[:-1] for prompt in prompts]  # by the base
        room = max_new_tokens + self.ahead + 1  # for a text that has ended beside others, too
        self.verifying.allocate(len(prompts), max(map(len, self.unread)) + room)
        return self.drafting.start(prompts, room)

    def read(self, tokens: Tensor) -> Tensor:
        """The base reads tokens (B, T) -> z_base (B, T, Vb). The first time it reads the prompts in the same pass."""
        if not self.unread:
            return self.verifying.step(tokens)
        rows = [prompt + row for prompt, row in zip(self.unread, tokens.tolist())]
        hidden = self.base.model(pad(rows).to(tokens.device), self.verifying.caches[0])  # (B, S, D)
        lengths = torch.tensor([len(prompt) for prompt in self.unread], device=tokens.device)
        places = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (B, T)
        self.unread = []
        return self.base.lm_head(hidden.take_along_dim(places[:, :, None], 1))

    def round(
        self,
        last: Tensor,
        noise: Tensor,
        ahead: int,
        stop_ids: set[int],
        temperature: float,
        top_p: float,
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """Of each row behind `last` (B, 1): the tokens drafted, how many of them stand, and the token behind those.

        noise (B, ahead + 1, 3) in each place is what to draft by, to judge by, and to draw another by.
        """
        V = self.guided.readable
        # draft, up to an end of text in every row
        tokens, z_draft, z_delta = [last], [], []
        drafted: list[list[int]] = [[] for _ in last]
        ended = [False for _ in last]
        while len(z_draft) < ahead and not all(ended):
            z = self.drafting.step(tokens[-1])[..., :V].clone()  # (B, 1, V)
            chosen = pick(z[:, 0], noise[:, len(z_draft), 0], temperature, top_p)  # (B,)
            z_draft.append(z)
            tokens.append(chosen[:, None])
            if self.guided.value is not None:
                z_delta.append(self.drafting.z_delta.clone())  # the next step may write over it
            for row, token in enumerate(chosen.tolist()):
                drafted[row].append(token)
                ended[row] = ended[row] or token in stop_ids
        N = len(z_draft)
        z_draft = torch.cat(z_draft, 1)  # (B, N, V)
        refuse_nan(self.drafting, z_draft)
        q = probabilities(z_draft, temperature, top_p)  # (B, N, V)
        # the base reads all of it in one pass; z_delta is known but behind the last
        z_base = self.guided.z_base = self.read(torch.cat(tokens, 1))  # (B, N + 1, Vb)
        z_delta = torch.cat(z_delta, 1) if z_delta else None  # (B, N, Vv)
        z_post = self.guided.post(z_base[:, :N], z_delta)  # (B, N, Vb), Eq. (3)
        refuse_nan(self.guided, z_post)
        p = probabilities(z_post[..., :V], temperature, top_p)  # (B, N, V)
        # a drafted token stands with probability min(1, p / q), and those behind the first that does not are lost
        places = torch.cat(tokens[1:], 1)[..., None]  # (B, N, 1)
        stands = noise[:, :N, 1] * q.gather(-1, places)[..., 0] < p.gather(-1, places)[..., 0]
        counts = stands.cumprod(1).sum(1)  # (B,)
        # where all stand, z_delta behind the last takes a pass with which the next round would begin
        stood = counts.tolist()
        if any(count == N and not end for count, end in zip(stood, ended)):
            self.drafting.step(tokens[-1])
            z_post = self.guided.post(z_base[:, N:], self.drafting.z_delta)  # (B, 1, Vb), Eq. (3)
            p = torch.cat((p, probabilities(z_post[..., :V], temperature, top_p)), 1)
            q = F.pad(q, (0, 0, 0, 1))  # where nothing was drafted
        # in place of the first that does not stand comes a token that the draft offered too rarely
        place = counts.clamp(max=p.shape[1] - 1)[:, None, None].expand(-1, 1, V)
        p, q = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]  # (B, V)
        rest = (p - q).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q but for rounding
        behind = draw(rest, noise[:, :, 2].gather(1, counts[:, None])[:, 0])  # (B,)
        return drafted, stood, behind.tolist()

    def keep(self, lengths: list[int]) -> None:
        """Forget in all caches what each row has beyond its length."""
        for cache in [*self.drafting.caches, *self.verifying.caches]:
            if len(set(lengths)) == 1:
                cache.crop(lengths[0])
            else:
                cache.crop(torch.tensor(lengths, device=cache.lengths.device))

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by `rows` (B',), in that order."""
        self.drafting.select(rows)
        self.verifying.select(rows)


@torch.inference_mode()
def speculate(
    speculative: Speculative,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """sample.generate by speculation."""
    check_prompts(prompts)
    longest = max_new_tokens + speculative.ahead + 1
    noise = torch.stack([uniform(seed, number, longest, 3) for number in range(len(prompts))])
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    ended = [False] * len(prompts)
    last = speculative.start(prompts, max_new_tokens)  # (B, 1)
    while True:
        # a round for every row, which drafts as many as the emptiest has room for
        written = torch.tensor([len(outputs[prompt]) for prompt in running])  # (B,)
        room = max(max_new_tokens - len(outputs[prompt]) for prompt in running if not ended[prompt])
        ahead = min(speculative.ahead, room)
        places = written[:, None] + torch.arange(ahead + 1)  # (B, ahead + 1)
        now = noise.take_along_dim(places[..., None], 1).to(last.device)  # (B, ahead + 1, 3)
        said = speculative.round(last, now, ahead, stop_ids, temperature, top_p)
        # each row's tokens, up to its end
        for prompt, drafted, stood, behind in zip(running, *said):
            speculative.rounds += not ended[prompt]
            for place, token in enumerate([*drafted[:stood], behind]):
                if ended[prompt]:
                    break
                outputs[prompt].append(token)
                speculative.tried += place < len(drafted)
                speculative.accepted += place < stood
                is_enough = on_token is not None and on_token(prompt, token) is True
                is_full = len(outputs[prompt]) == max_new_tokens
                ended[prompt] = is_enough or is_full or token in stop_ids
        still = [row for row, prompt in enumerate(running) if not ended[prompt]]
        if not still:
            break
        # forget what was rejected; shrink the batch now and then
        speculative.keep([len(prompts[prompt]) + len(outputs[prompt]) - 1 for prompt in running])
        if len(still) <= len(running) // 2:
            rows = torch.tensor(still, device=last.device)
            speculative.select(rows)
            noise, running = noise[still], [running[row] for row in still]
        last = torch.tensor([outputs[prompt][-1:] for prompt in running], device=last.device)
    return outputs


@torch.inference_mode()
def gap_at_difference(guided: Guided, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far the two best logits are apart where two greedy answers part: rounding alone can decide a near-tie."""
    same = 0
    while one[same : same + 1] == other[same : same + 1]:
        same += 1
    z = guided.logits(torch.tensor([prompt + one[:same]], device=guided.base.device))[0, -1]
    first, second = z.float().topk(2).values
    return (first - second).item()
