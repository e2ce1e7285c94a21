"""Decoding through another tokenizer: what a base says of the next VALUE token, where tokens are several of each other's.

    python sample.py --base tiny-b-m        # a base with a byte-level tokenizer, guided by tiny-s's value network

The paper's Eq. (5) adds up logits of base tokens with one target, and has the base read a text cut in
ways it has never seen (sample.py, MappedGuided). Here the base's probabilities are taken apart instead:

* A base token may be several value tokens long. So a context may be behind what was written: `pending`
  are the value tokens since then. The base tokens that begin with them are one range once tokens are
  sorted by their pieces; their mass, by the piece that follows, is P(v). When the pending ones are a whole
  base token, the base can also have read it; both ways are kept, as hypotheses.
* A value token may be several base tokens long, a path. No mass would ever reach it, so its path is
  spelled out, base token by base token, wherever z_delta leaves it a chance to win.
* Their ends may cross, as in "There" + "se" and "Ther" + "ese". A context that no base token fits any more
  is read on by parts of what is pending, long and likely parts first, while they may yet be likelier
  than all other contexts.

Each text is decoded by itself, in `Text.log_p` and `Text.push`, as if it were alone: generators that YIELD
what they want the base to read. `together` gathers the wishes of all texts into one base pass.
tests/test_mapped.py holds P against brute force over all ways to cut a text.
"""

import copy
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivl import ValueModel
from model import KVCache, Llama
from sample import MappedGuided
from vocab_map import Speller, VocabMap

FLOOR = 1e-12  # the least P(v): what the base rules out can still be said if z_delta outbids log(1e-12) = -27.6
# contexts of one text, and as many within a value token: when greedy, and when sampling
HYPOTHESES = {False: 4, True: 8}
EXPANSIONS = 8  # base tokens read for paths in one step
PARTS = {False: 8, True: 32}  # the same for parts
DESPERATE = 64  # the same where nothing fits
BYTE = 4.0  # nats that a byte costs, about: a part is read sooner the less it leaves of the text
# nats below the best within which a hypothesis, and a path, is worth a pass: when greedy, and when sampling
UNLIKELY = {False: 7.0, True: 10.0}
MARGIN = {False: 0.0, True: 5.0}

Tokens = tuple[int, ...]


@dataclass
class Context:
    """Base tokens that were read, their keys and values (layers, K, L, F), and what the base says comes next."""

    tokens: list[int]
    keys: Tensor
    values: Tensor
    log_p: Tensor  # (Vb,) over the tokens that have pieces
    weight: float = 0.0  # log of how likely the text was cut in this way, up to a constant
    pending: Tokens = ()  # value tokens written since


@dataclass
class Crossing:
    """A context behind which a base token may come that ends within a value token."""

    context: Context
    text: bytes  # written since
    since: Tokens  # the value tokens of this text, from where both sides began a token
    # log of how likely any base token is that its text begins with, or that begins with it
    bound: float = -torch.inf


Wish = tuple[Context, list[int]]  # a context, and base tokens to read behind it


def together(generators: list[Generator], read: Callable[[list[Wish]], list[Context]]) -> list:
    """Run generators side by side; each yields a list of wishes, and is sent their contexts. Returns what they return."""
    results = [None] * len(generators)
    answers: dict[int, list[Context] | None] = dict.fromkeys(range(len(generators)))
    while answers:
        # what each of those still running wants
        wishes = {}
        for number, answer in answers.items():
            try:
                wishes[number] = generators[number].send(answer)
            except StopIteration as end:
                results[number] = end.value
        # one pass for all of them
        contexts = iter(read([wish for some in wishes.values() for wish in some]) if wishes else [])
        answers = {number: [next(contexts) for _ in some] for number, some in wishes.items()}
    return results


# ---------------------------------------------------------------------------------------------------------
# What is the same for all texts


class Tables:
    """A vocabulary map as tensors."""

    def __init__(self, vocab_map: VocabMap, base: Llama, Vv: int):
        device, self.Vv = base.device, Vv
        # base tokens sorted by their pieces, of which those that begin alike stand together
        order = sorted(
            (pieces, token) for token, pieces in enumerate(vocab_map.value_tokens) if pieces
        )
        self.pieces = [pieces for pieces, _ in order]
        self.tokens = torch.tensor([token for _, token in order], device=device)  # (n,)
        self.lengths = torch.tensor(
            [len(pieces) for pieces in self.pieces], device=device
        )  # (n,), in pieces
        self.flat = torch.tensor(
            [piece for pieces in self.pieces for piece in pieces], device=device
        )
        self.starts = (
            self.lengths.cumsum(0) - self.lengths
        )  # (n,), where each one's pieces begin in `flat`
        self.first = torch.zeros(base.config.vocab_size, dtype=torch.long, device=device)  # (Vb,)
        self.first[self.tokens] = self.flat[self.starts]  # 0 for tokens without pieces
        # the same tokens by their bytes, for ends that cross
        value = vocab_map.value_tokenizer
        self.speller = Speller(value)
        self.text_of = [value.token_bytes(id) for id in range(value.vocab_size)]
        self.by_text: dict[bytes, list[int]] = {}
        for token, pieces in enumerate(vocab_map.value_tokens):
            text = b"".join(self.text_of[piece] for piece in pieces)
            self.by_text.setdefault(text, []).append(token)
        self.texts = sorted(self.by_text)
        self.longest = len(max(self.texts, key=len))
        self.tokens_by_text = torch.tensor(
            [token for text in self.texts for token in self.by_text[text]], device=device
        )  # (n,), in the order of `texts`
        sizes = [len(self.by_text[text]) for text in self.texts]
        self.text_starts = [0, *itertools.accumulate(sizes)]  # where each text's tokens begin
        first, behind = (bisect_left(self.texts, text) for text in (b"\n", b"\x0b"))
        self.line_ends = self.tokens_by_text[self.text_starts[first] : self.text_starts[behind]]
        # special tokens, and rows beyond the tokenizer's, say nothing
        self.silent = torch.ones(base.config.vocab_size, dtype=torch.bool, device=device)
        self.silent[self.tokens] = False
        self.first_piece = [pieces[0] if pieces else None for pieces in vocab_map.value_tokens]
        # value tokens that take several base tokens
        spelled = [
            (value, path) for value, path in enumerate(vocab_map.base_tokens) if len(path) > 1
        ]
        self.path_of = dict(spelled)
        self.path_value = torch.tensor(
            [value for value, _ in spelled], dtype=torch.long, device=device
        )  # (paths,)
        self.path_length = torch.tensor(
            [len(path) for _, path in spelled], device=device
        )  # (paths,)
        longest = max((len(path) for _, path in spelled), default=1)
        padded = [path + (-1,) * (longest - len(path)) for _, path in spelled]
        self.paths = torch.tensor(padded, dtype=torch.long, device=device).view(
            -1, longest
        )  # (paths, longest)

    def range_of(self, pending: Tokens) -> slice:
        """Where the base tokens that begin with these pieces stand in sorted order."""
        if not pending:
            return slice(0, len(self.pieces))
        behind = (*pending[:-1], pending[-1] + 1)
        return slice(bisect_left(self.pieces, pending), bisect_left(self.pieces, behind))

    def is_own_cut(self, values: Tokens) -> bool:
        """Whether the value network's own tokenizer cuts a text like this; only in such a one ends cross."""
        said = [value for value in values if self.text_of[value]]
        return self.speller(b"".join(map(self.text_of.__getitem__, said))) == said

    def longer_than(self, text: bytes) -> Tensor:
        """The base tokens that begin with these bytes and are longer."""
        first = bisect_right(self.texts, text)
        behind = bisect_right(self.texts, text + b"\xff" * self.longest)
        return self.tokens_by_text[self.text_starts[first] : self.text_starts[behind]]


# ---------------------------------------------------------------------------------------------------------
# One text


class Text:
    """The hypotheses of one text, those likeliest so far first."""

    def __init__(
        self,
        tables: Tables,
        vocab_map: VocabMap,
        written: list[int],
        asked: list[int],
        sampling: bool,
        line_ends: bool,
    ):
        self.tables, self.map, self.written = tables, vocab_map, list(written)  # in value tokens
        self.asked = asked  # base tokens in front of it
        self.sampling, self.line_ends = sampling, line_ends  # as Hypotheses says
        self.has_words = False  # a letter or a digit was written
        self.contexts: list[Context] = []
        self.crossings: list[Crossing] = []
        self.log_scale = 0.0  # what was taken off the weights, which are relative to the best
        # of this step: contexts read along paths, by their base tokens, and what each path's value token weighs
        self.found: dict[Tokens, Context] = {}
        self.path_weight: dict[int, float] = {}

    def log_p(self, z_delta: Tensor) -> Generator[list[Wish], list[Context], Tensor]:
        """log P of the next value token, (Vv,), floored; z_delta (Vv,), times alpha, tells which paths have a chance."""
        P = self.mass()  # (Vv,)
        total = P.sum().clamp(min=1e-30)
        P = P / total
        self.found, self.path_weight = {}, {}
        exact = next((context for context in self.contexts if not context.pending), None)
        if exact is not None and len(self.tables.paths):
            yield from self.spell_paths(P, exact, total.log().item(), z_delta)
        if self.line_ends:
            [end] = self.map.value_tokens[self.map.base_tokenizer.eos_id]
            P[end] = (P[end] + self.ends_of_lines() / total) * self.has_words
        return P.clamp(min=FLOOR).log()

    def mass(self) -> Tensor:
        """P (Vv,) up to a factor: base tokens that go on beyond what is pending, by the piece they go on with."""
        tables = self.tables
        P = torch.zeros(tables.Vv, device=tables.flat.device)
        for context in self.contexts:
            if not context.pending:
                P.index_add_(0, tables.first, (context.log_p + context.weight).exp())
                continue
            here, depth = tables.range_of(context.pending), len(context.pending)
            longer = tables.lengths[here] > depth
            p = (context.log_p[tables.tokens[here]] + context.weight).exp() * longer
            at = (tables.starts[here] + depth).clamp(max=len(tables.flat) - 1)
            P.index_add_(0, tables.flat[at], p)
        return P

    def ends_of_lines(self) -> Tensor:
        """The mass of base tokens that begin with a new line, which may be the end of an answer or go on with it."""
        lines = self.tables.line_ends
        exact = [context for context in self.contexts if not context.pending]
        masses = [(context.log_p[lines] + context.weight).exp().sum() for context in exact]
        return sum(masses, torch.zeros((), device=lines.device))

    def log_probability(self) -> float:
        """log of how likely the base finds what was written behind the prompt, cut in the ways that were kept.

        nan where nothing fitted, and the text was read again.
        """
        scores = []
        for context in self.contexts:
            _, log_p, longer = self.weights(context, context.pending)
            weight = (
                torch.tensor(context.weight) if not context.pending else log_p[longer].logsumexp(0)
            )
            scores.append(weight.double())
        return self.log_scale + torch.stack(scores).logsumexp(0).item()

    def spell_paths(
        self, P: Tensor, exact: Context, log_total: float, z_delta: Tensor
    ) -> Generator[list[Wish], list[Context], None]:
        """Raise P (Vv,) of value tokens that take several base tokens, those first that may yet win.

        What has been read of a path, with z_delta, bounds what its token can reach. While a bound beats
        the best so far, the base reads one token more of that path.
        """
        tables, paths = self.tables, self.tables.paths
        scored = (exact.log_p + (exact.weight - log_total))[
            paths[:, 0]
        ]  # (paths,), log p of the part that is read
        depth = torch.ones_like(scored, dtype=torch.long)  # (paths,), how long that part is
        z = z_delta[tables.path_value]  # (paths,)
        best = (P.clamp(min=FLOOR).log() + z_delta).max()
        self.found[()] = exact
        for _ in range(EXPANSIONS):
            # the path that could reach most, if the rest of it were certain
            complete = depth == tables.path_length
            best = torch.maximum(best, torch.where(complete, scored + z, -torch.inf).max())
            bound, path = torch.where(complete, -torch.inf, scored + z).max(-1)
            if bound <= best - MARGIN[self.sampling]:
                break
            # the base reads one token more of it
            prefix = tuple(paths[path, : depth[path]].tolist())
            [child] = yield [(self.found[prefix[:-1]], [prefix[-1]])]
            child.weight = scored[path].item() + log_total
            self.found[prefix] = child
            # which serves all paths that begin in this way
            begins = (paths[:, : len(prefix)] == torch.tensor(prefix, device=paths.device)).all(-1)
            same = begins & (depth == len(prefix)) & (tables.path_length > len(prefix))  # (paths,)
            scored[same] += child.log_p[paths[same, len(prefix)]]
            depth[same] += 1
        for path in torch.nonzero(depth == tables.path_length)[:, 0].tolist():
            value, p = int(tables.path_value[path]), scored[path].exp()
            self.path_weight[value] = scored[path].item() + log_total
            if self.sampling:  # the same text must not count twice: its mass is also where its first base token begins
                shorter = tables.first_piece[paths[path, 0]]
                P[shorter] = (P[shorter] - p).clamp(min=0.0)
            P[value] = torch.maximum(P[value], p)

    def push(self, value: int) -> Generator[list[Wish], list[Context], int]:
        """Take the value token that the text goes on with into its contexts; returns how many base tokens were read."""
        self.written.append(value)
        said = self.tables.text_of[value].decode(errors="replace")
        self.has_words = self.has_words or any(map(str.isalnum, said))
        waiting, options = (
            [],
            [],
        )  # contexts that wait for more pieces, and base tokens that could be read now
        for context in self.contexts:
            waiting += self.still_pending(context, value)
            options += self.whole_tokens(context, value)
        if value in self.path_weight:
            options.append(self.rest_of_path(value))
        count = yield from self.read_crossings(value, waiting, options)
        # the likeliest of both kinds
        scores = [score for score, _ in waiting] + [score for score, _, _ in options]
        scores.sort(reverse=True)
        most, unlikely = HYPOTHESES[self.sampling], UNLIKELY[self.sampling]
        least = max(scores[:most][-1], scores[0] - unlikely) if scores else 0.0
        kept = [(score, context) for score, context in waiting if score >= least]
        wanted = [option for option in options if option[0] >= least]
        pending: Tokens = ()
        if (
            not kept and not wanted
        ):  # no base token fits what was written: read it again as the base would cut it
            context, tokens, pending = self.read_again()
            wanted = [(0.0, context, tokens)]
            self.log_scale = torch.nan  # how likely that is has not been asked
        if wanted:
            children = yield [(context, tokens) for _, context, tokens in wanted]
            kept += [
                (score, replace(child, weight=score, pending=pending))
                for (score, _, _), child in zip(wanted, children)
            ]
        kept.sort(key=lambda each: -each[0])
        top = kept[0][0]
        self.log_scale += top
        self.contexts = [
            replace(context, weight=context.weight - top) for _, context in kept[:most]
        ]
        self.crossings = [
            replace(each, context=replace(each.context, weight=each.context.weight - top))
            for each in self.crossings
        ]
        return count + sum(len(tokens) for _, _, tokens in wanted)

    def read_crossings(
        self, value: int, waiting: list, options: list
    ) -> Generator[list[Wish], list[Context], int]:
        """Read on what nothing fits any more, and add it to what fits; returns how many base tokens were read.

        What was read bounds how likely it is. While a bound beats all that fits, the base reads one part more.
        """
        tables, text, unlikely = self.tables, self.tables.text_of[value], UNLIKELY[self.sampling]
        read = {tuple(context.tokens): context for context in self.found.values()}
        # where to go on from, by base tokens, so that no way to cut the text counts twice
        behind = {tuple(each.context.tokens): each for each in self.crossings}
        for each in self.contexts:
            written = b"".join(map(tables.text_of.__getitem__, each.pending))
            behind.setdefault(tuple(each.tokens), Crossing(each, written, each.pending))
        taken = {(*context.tokens, *tokens) for _, context, tokens in options} | behind.keys()
        best = max((each[0] for each in waiting + options), default=-torch.inf)
        nothing_fits = best == -torch.inf
        self.crossings, parts = [], []
        for each in behind.values():
            each = Crossing(each.context, each.text + text, (*each.since, value))
            its_parts = self.first_parts(each, taken) if tables.is_own_cut(each.since) else []
            goes_on = self.keep(each, its_parts)
            if nothing_fits or not goes_on:
                parts += its_parts
        count, later = 0, []
        limit = DESPERATE if nothing_fits else PARTS[self.sampling]
        while parts:
            part = max(parts, key=lambda each: each[0] - BYTE * len(each[3]))
            parts.remove(part)
            score, token, crossing, rest = part
            if score < best - unlikely:
                continue
            if not rest and text:  # it fits, and is read with what else does
                options.append((score, crossing.context, [token]))
                best = max(best, score)
                continue
            if score <= best or count == limit:
                later.append(part)
                continue
            context = read.get((*crossing.context.tokens, token))
            if context is None:
                [context] = yield [(crossing.context, [token])]
                count += 1
            crossing = Crossing(replace(context, weight=score, pending=()), rest, crossing.since)
            if rest:
                its_parts = self.first_parts(crossing, taken)
                self.keep(crossing, its_parts)
                parts += its_parts
            else:
                options += self.whole_tokens(crossing.context, value)
                best = max(best, *(each[0] for each in options))
        # what is not worth a pass yet, but may be when the text is longer
        known = {tuple(each.context.tokens) for each in self.crossings}
        for score, _, crossing, rest in later:
            tokens, longer = tuple(crossing.context.tokens), tables.longer_than(rest)
            if text and len(longer) and tokens not in known:
                known.add(tokens)
                self.crossings.append(replace(crossing, bound=score))
        self.crossings = [each for each in self.crossings if each.bound >= best - unlikely]
        self.crossings.sort(key=lambda each: -each.bound)
        del self.crossings[HYPOTHESES[self.sampling] :]
        return count

    def keep(self, crossing: Crossing, parts: list) -> bool:
        """Keep a crossing if base tokens go on behind its text; whether they do. It may also be cut into parts later."""
        longer = self.tables.longer_than(crossing.text)
        is_special = not self.tables.text_of[
            crossing.since[-1]
        ]  # beyond which no base token goes on
        if is_special or not len(longer):
            return False
        scores = crossing.context.log_p[longer] + crossing.context.weight
        ways = torch.cat([scores, scores.new_tensor([score for score, *_ in parts])])
        self.crossings.append(replace(crossing, bound=ways.logsumexp(0).item()))
        return True

    def first_parts(
        self, crossing: Crossing, taken: set
    ) -> list[tuple[float, int, Crossing, bytes]]:
        """Base tokens that a text begins with: how likely at best, behind what, and what is then left of it."""
        context, text, found = crossing.context, crossing.text, []
        for end in range(1, len(text) + 1):
            for token in self.tables.by_text.get(text[:end], []):
                if (*context.tokens, token) not in taken:
                    found.append((token, text[end:]))
        scores = context.log_p[[token for token, _ in found]] + context.weight
        both = zip(scores.tolist(), found)
        return [(score, token, crossing, rest) for score, (token, rest) in both]

    def weights(self, context: Context, pending: Tokens) -> tuple[slice, Tensor, Tensor]:
        """Base tokens that begin with these pieces: where, how likely, and whether they are longer."""
        here = self.tables.range_of(pending)
        return (
            here,
            context.log_p[self.tables.tokens[here]] + context.weight,
            self.tables.lengths[here] > len(pending),
        )

    def still_pending(self, context: Context, value: int) -> list[tuple[float, Context]]:
        """The context as it is, if some base token goes on beyond what is now pending; the log of what can still come."""
        pending = (*context.pending, value)
        _, log_p, longer = self.weights(context, pending)
        if not longer.any():
            return []
        return [(log_p[longer].logsumexp(0).item(), replace(context, pending=pending))]

    def whole_tokens(self, context: Context, value: int) -> list[tuple[float, Context, list[int]]]:
        """Base tokens whose pieces are exactly what is now pending."""
        here, log_p, longer = self.weights(context, (*context.pending, value))
        found = []
        for at in torch.nonzero(~longer)[:, 0].tolist():
            found.append((log_p[at].item(), context, [int(self.tables.tokens[here.start + at])]))
        return found

    def rest_of_path(self, value: int) -> tuple[float, Context, list[int]]:
        """The path of a value token that was spelled out, behind what of it has been read."""
        path = self.tables.path_of[value]
        begins = [prefix for prefix in self.found if prefix == path[: len(prefix)] != path]
        read = max(begins, key=len)  # all of it may have been read, for a longer path
        return self.path_weight[value], self.found[read], list(path[len(read) :])

    def read_again(self) -> tuple[Context, list[int], Tokens]:
        """The text so far as the base's tokenizer cuts it: a context cropped to what stays the same, the tokens behind it
        (at least one), and value tokens that end in half a character."""
        tokens, withheld = self.map.in_base_tokens(self.written)
        tokens, context = self.asked + tokens, self.contexts[0]
        same = 0
        while (
            same < min(len(tokens) - 1, len(context.tokens))
            and tokens[same] == context.tokens[same]
        ):
            same += 1
        cropped = replace(
            context,
            tokens=tokens[:same],
            keys=context.keys[:, :, :same],
            values=context.values[:, :, :same],
        )
        return cropped, tokens[same:], tuple(withheld)


# ---------------------------------------------------------------------------------------------------------
# All texts


class Hypotheses(MappedGuided):
    """MappedGuided by hypotheses and spelled paths instead of Eq. (5).

    With `sampling` it reads more than greedy needs. `line_ends` is for a base asked in qa, where an answer ends at a new
    line, and yet may have several lines: the mass of base tokens that begin with one counts for both, and z_delta decides.
    Then nothing ends an answer before its first letter or digit.
    """

    def __init__(
        self,
        base: Llama,
        value: ValueModel,
        vocab_map: VocabMap,
        alpha: float = 1.0,
        ask: Callable[[list[int]], list[int]] | None = None,
        line_ends: bool = False,
    ):
        super().__init__(base, value, vocab_map, alpha, ask)
        self.line_ends = line_ends
        self.tables = Tables(vocab_map, base, value.vocab_size)

    def begin(self, prompts: list[list[int]]) -> None:
        self.base_tokens_read = self.value_tokens_asked = 0
        self.is_new = True
        self.texts = [
            Text(self.tables, self.map, *self.split(prompt), self.sampling, self.line_ends)
            for prompt in prompts
        ]
        empty = KVCache(self.base, 1, 0)
        nothing = Context([], empty.keys[:, 0], empty.values[:, 0], torch.empty(0))
        asked = [text.asked + self.map.in_base_tokens(text.written)[0] for text in self.texts]
        contexts = self.read_base([(nothing, tokens) for tokens in asked])
        for text, context in zip(self.texts, contexts):
            text.contexts = [context]

    def base_logits(self, z_delta: Tensor) -> Tensor:
        wanted = [text.log_p(row.float()) for text, row in zip(self.texts, z_delta)]
        return torch.stack(together(wanted, self.read_counted))

    def push(self, tokens: list[int]) -> None:
        self.base_tokens_read += sum(
            together([text.push(token) for text, token in zip(self.texts, tokens)], self.read_base)
        )

    def read_counted(self, wishes: list[Wish]) -> list[Context]:
        self.base_tokens_read += len(wishes)  # of one token each
        return self.read_base(wishes)

    def read_base(self, wishes: list[Wish]) -> list[Context]:
        """One base pass: each context continued by some tokens."""
        parents = [parent for parent, _ in wishes]
        rows, T = len(wishes), max(len(tokens) for _, tokens in wishes)
        # the contexts side by side, each padded to the longest
        cache = KVCache(self.base, rows, max(len(parent.tokens) for parent in parents) + T)
        padded = torch.zeros(rows, T, dtype=torch.long)
        for row, (parent, tokens) in enumerate(wishes):
            length = len(parent.tokens)
            cache.keys[:, row, :, :length] = parent.keys
            cache.values[:, row, :, :length] = parent.values
            cache.lengths[row] = length
            padded[row, : len(tokens)] = torch.tensor(tokens)
        cache.look()
        hidden = self.base.model(padded.to(self.base.device), cache)  # (rows, T, D)
        last = torch.stack(
            [hidden[row, len(tokens) - 1] for row, (_, tokens) in enumerate(wishes)]
        )  # (rows, D)
        logits = self.base.lm_head(last).float()  # (rows, Vb)
        log_p = logits.masked_fill(self.tables.silent, -torch.inf).log_softmax(-1)
        # and apart again
        children = []
        for row, (parent, tokens) in enumerate(wishes):
            whole = parent.tokens + tokens
            children.append(
                Context(
                    whole,
                    cache.keys[:, row, :, : len(whole)],
                    cache.values[:, row, :, : len(whole)],
                    log_p[row],
                )
            )
        return children

    def select(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.select(rows)
        self.texts = [self.fork(self.texts[row]) for row in rows.tolist()]

    @staticmethod
    def fork(text: Text) -> Text:
        other = copy.copy(text)
        other.written = list(text.written)
        return other
