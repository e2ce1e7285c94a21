"""Plugging a value network into a base with another tokenizer.

    python vocab_map.py --base-tokenizer A --value-tokenizer B --out map.safetensors            # from the tokenizers alone
    python vocab_map.py --base-tokenizer A --value-tokenizer B --how paper --texts FILE --out map.safetensors

1. Algorithm 1 (Appendix B): count which base tokens stand where which value tokens stand, in texts tokenised twice.
2. The data-free map: which value tokens a base token's own bytes fall into.
3. Decoding with either.
"""

import codecs
import dataclasses
import functools
import json
import os
import re
import sys
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.chat import is_unicode, read_turns
from data.cli import ArgumentParser, run_cli
from data.tokenizer import DataError, Tokenizer, load_tokenizer
from ivl import describe_tokenizer
from model import CheckpointError, KVCache, Llama

# ---------------------------------------------------------------------------------------------------------
# 1. Algorithm 1, line by line
#
# Both tokenisations of a text are sequences of pieces. Pieces are compared as bytes, without the space in front.


def without_mark(tokenizer: Tokenizer) -> list[bytes]:
    """Line 5: the bytes of every token without the space that marks the beginning of a word; b"" for special tokens."""
    return [tokenizer.token_bytes(id).removeprefix(b" ") for id in range(tokenizer.vocab_size)]


@functools.cache
def piece_cost(a: bytes, b: bytes) -> float:
    """Line 6: Levenshtein's distance, a tenth of it where one piece contains the other."""
    return levenshtein(a, b) * 0.1 if a in b or b in a else float(levenshtein(a, b))


def levenshtein(a: bytes, b: bytes) -> int:
    distances = list(range(len(b) + 1))  # from what has been read of a, to each beginning of b
    for i, byte in enumerate(a, 1):
        before, distances[0] = distances[0], i
        for j, other in enumerate(b, 1):
            before, distances[j] = distances[j], min(distances[j] + 1, distances[j - 1] + 1, before + (byte != other))
    return distances[-1]


def align_by_loop(base: list[bytes], value: list[bytes]) -> list[tuple[int, int]]:
    """Lines 6 and 7: dynamic time warping. Pairs (index into base, index into value), from (0, 0) to both ends.

    total[i][j] is the cheapest way to have aligned value[:i + 1] with base[:j + 1]. On the way back a tie goes to the
    diagonal, then up (one value piece back), then left.
    """
    total = np.full((len(value) + 1, len(base) + 1), np.inf)
    total[0, 0] = 0.0
    for i, piece in enumerate(value, 1):
        for j, other in enumerate(base, 1):
            total[i, j] = piece_cost(piece, other) + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    i, j, path = len(value), len(base), []
    while (i, j) != (1, 1):
        path.append((j - 1, i - 1))
        best = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        if total[i - 1, j - 1] == best:
            i, j = i - 1, j - 1
        elif total[i - 1, j] == best:
            i -= 1
        else:
            j -= 1
    return [(0, 0), *reversed(path)]


# ---------------------------------------------------------------------------------------------------------
# The same paths, fast: every distance once per pair of pieces, all pairs at once; time warping by anti-diagonals, many
# texts at once. The numbers are the loop's own, float64 in the same order, so ties fall the same way.

WIDTH = 2**14  # numbers in a long anti-diagonal of all texts of a batch: few enough for the cache, and many for one call


class PieceCosts:
    """piece_cost of pairs of tokens, each pair of pieces computed once and kept."""

    UNKNOWN, CONTAINS = 2**16 - 1, 2**15  # a code is a distance, with this bit where one contains the other

    def __init__(self, base: Tokenizer, value: Tokenizer):
        index: dict[bytes, int] = {}  # of every distinct piece of both
        self.piece_of = [np.array([index.setdefault(piece, len(index)) for piece in without_mark(tokenizer)])
                         for tokenizer in (value, base)]  # of each token: (Vv,), (Vb,)
        self.names = list(index)
        self.lengths = np.array(list(map(len, self.names)))
        longest = max(1, self.lengths.max())
        padded = b"".join(name.ljust(longest, b"\0") for name in self.names)
        self.bytes = np.frombuffer(padded, dtype=np.uint8).reshape(-1, longest)
        code = np.arange(2**16)
        self.cost = np.where(code & self.CONTAINS, (code & ~self.CONTAINS) * 0.1, code.astype(np.float64))
        self.forget()

    def forget(self) -> None:
        """Begin with no pair computed."""
        self.table = np.full((256, 256), self.UNKNOWN, dtype=np.uint16)  # value pieces seen so far by base pieces
        self.places = [np.full(len(self.names), -1) for _ in range(2)]  # where a piece stands in the table
        self.used = [0, 0]

    def of_texts(self, values: list[np.ndarray], bases: list[np.ndarray]
                 ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """For token ids (n,) and (m,) of some texts: costs (K,), and for each text indices (n,), (m,) whose sum finds one."""
        rows, columns, row_index, column_index, offset = [], [], [], [], 0
        for value_ids, base_ids in zip(values, bases):
            (v, at_v), (b, at_b) = [np.unique(piece_of[ids], return_inverse=True)
                                    for ids, piece_of in zip((value_ids, base_ids), self.piece_of)]
            rows.append(np.repeat(v, len(b)))
            columns.append(np.tile(b, len(v)))
            row_index.append(offset + at_v * len(b))
            column_index.append(at_b)
            offset += len(v) * len(b)
        pieces = np.concatenate(rows), np.concatenate(columns)
        places = self.place(0, pieces[0]), self.place(1, pieces[1])
        codes = self.table[places]
        if len(unknown := np.flatnonzero(codes == self.UNKNOWN)):
            keys = np.sort(pieces[0][unknown] * len(self.names) + pieces[1][unknown])
            keys = keys[np.diff(keys, prepend=-1) > 0]  # each pair once; np.unique takes ten times as long
            for some in np.array_split(keys, len(keys) // 2**17 + 1):
                a, b = np.divmod(some, len(self.names))
                self.table[self.places[0][a], self.places[1][b]] = self.measure(a, b)
            codes = self.table[places]
        return self.cost[codes], row_index, column_index

    def place(self, axis: int, pieces: np.ndarray) -> np.ndarray:
        """Where pieces stand in the table, which grows by what it has not seen."""
        place, wanted = self.places[axis], np.zeros(len(self.names), dtype=bool)
        wanted[pieces] = True
        new = np.flatnonzero(wanted & (place < 0))
        place[new] = self.used[axis] + np.arange(len(new))
        self.used[axis] += len(new)
        if self.used[axis] > self.table.shape[axis]:
            shape = list(self.table.shape)
            shape[axis] = max(shape[axis] * 5 // 4, self.used[axis])
            larger = np.full(shape, self.UNKNOWN, dtype=np.uint16)
            larger[:self.table.shape[0], :self.table.shape[1]] = self.table
            self.table = larger
        return place[pieces]

    def measure(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Codes (K,) of pairs of pieces a (K,), b (K,)."""
        shorter = self.lengths[a] <= self.lengths[b]
        pattern, text = np.where(shorter, a, b), np.where(shorter, b, a)
        height, length = self.lengths[pattern], self.lengths[text]
        distance = np.where(height == 0, length, 0)
        for word, low, high in ((np.uint8, 1, 8), (np.uint64, 9, 64)):
            if len(group := np.flatnonzero((low <= height) & (height <= high))):
                distance[group] = self.bit_parallel(pattern[group], text[group], word)
        for pair in np.flatnonzero(height > 64):  # rare enough for the loop
            distance[pair] = levenshtein(self.names[pattern[pair]], self.names[text[pair]])
        contains = distance == length - height  # the pattern's bytes come in the text in this order; all together?
        for pair in np.flatnonzero(contains & (height > 1) & (distance > 0)):
            contains[pair] = self.names[pattern[pair]] in self.names[text[pair]]
        return (distance + contains * self.CONTAINS).astype(np.uint16)

    def bit_parallel(self, pattern: np.ndarray, text: np.ndarray, word: type) -> np.ndarray:
        """Levenshtein's distance (K,) of pieces pattern (K,) to pieces text (K,), by Myers' algorithm (1999; in Hyyro's form).

        A column of the usual table is two words with a bit for each byte of the pattern: where the distance goes up by one
        from row to row, and where down. One byte of all texts is read at a time, the longest texts first, so that the
        unfinished ones stand together.
        """
        order = np.argsort(-self.lengths[text], kind="stable")
        pattern, text = pattern[order], text[order]
        length, one = self.lengths[text], word(1)
        distinct, which = np.unique(pattern, return_inverse=True)
        masks = np.zeros((len(distinct), 256), dtype=word)  # for each byte, the places where the pattern has it
        for row, piece in enumerate(distinct):
            for place, byte in enumerate(self.names[piece]):
                masks[row, byte] |= word(1 << place)
        last = (self.lengths[pattern] - 1).astype(word)
        up, down, distance = np.full_like(last, ~word(0)), np.zeros_like(last), self.lengths[pattern].astype(np.int16)
        for column in range(length[0]):
            K = int(np.searchsorted(-length, -column))  # texts longer than that
            P, N = up[:K], down[:K]
            equal = masks[which[:K], self.bytes[text[:K], column]]
            diagonal = (((equal & P) + P) ^ P) | equal | N
            right, left = N | ~(diagonal | P), diagonal & P
            distance[:K] += ((right >> last[:K]) & one).astype(np.int16) - ((left >> last[:K]) & one).astype(np.int16)
            right, left = (right << one) | one, left << one
            up[:K], down[:K] = left | ~(diagonal | right), right & diagonal
        found = np.empty(len(order), dtype=np.int64)
        found[order] = distance
        return found


def align(base_ids: list[list[int]], value_ids: list[list[int]], costs: PieceCosts) -> list[np.ndarray]:
    """align_by_loop of several texts, given as token ids: for each a path (P, 2) of indices into base and value ids."""
    bases, values = [[np.asarray(ids) for ids in texts] for texts in (base_ids, value_ids)]
    order = sorted(range(len(bases)), key=lambda text: (len(values[text]), len(bases[text])))
    paths: list[np.ndarray] = [np.empty((0, 2))] * len(order)
    while order:  # the longest first, with as many of like length as make a diagonal of WIDTH cells
        size = max(1, WIDTH // len(values[order[-1]]))
        batch, order = order[-size:], order[:-size]
        for text, path in zip(batch, warp([values[text] for text in batch], [bases[text] for text in batch], costs)):
            paths[text] = path
    return paths


def warp(values: list[np.ndarray], bases: list[np.ndarray], costs: PieceCosts) -> list[np.ndarray]:
    """Dynamic time warping of a batch of B texts: the cells (i, j) of one anti-diagonal i + j after the other."""
    table, rows, columns = costs.of_texts(values, bases)
    B, n, m = len(values), max(map(len, values)), max(map(len, bases))
    row, column = np.zeros((n, B), dtype=np.int64), np.zeros((m, B), dtype=np.int64)
    for text in range(B):
        row[:len(rows[text]), text], column[:len(columns[text]), text] = rows[text], columns[text]
    column = column[::-1].copy()  # base tokens from the last to the first, as i grows along an anti-diagonal
    low = np.maximum(0, np.arange(n + m - 1) - m + 1)  # anti-diagonal d has the rows low[d] to high[d] - 1,
    high = np.minimum(np.arange(n + m - 1), n - 1) + 1
    start = np.concatenate([[0], np.cumsum(high - low)[:-1]]) - low  # and its cell in row i is the (start[d] + i)th of all
    is_diagonal, is_up = [np.empty((n * m, B), dtype=bool) for _ in range(2)]
    # Row i of the table stands at i + 1: what lies outside it is infinitely expensive.
    now, before, earlier = [np.full((n + 1, B), np.inf) for _ in range(3)]
    index, cheapest, cost = np.empty((n, B), dtype=np.int64), np.empty((n, B)), np.empty((n, B))
    for d, (first, end, cell) in enumerate(zip(low.tolist(), high.tolist(), (start + low).tolist())):
        earlier, before, now = before, now, earlier
        size = end - first
        diagonal, up, left = earlier[first:end], before[first:end], before[first + 1:end + 1]
        best = np.minimum(up, left, out=cheapest[:size])
        np.less_equal(diagonal, best, out=is_diagonal[cell:cell + size])
        np.less_equal(up, left, out=is_up[cell:cell + size])
        np.minimum(best, diagonal, out=best)
        if d == 0:
            best[:] = 0.0
        shift = m - 1 - d + first
        np.add(row[first:end], column[shift:shift + size], out=index[:size])
        table.take(index[:size], mode="clip", out=cost[:size])
        np.add(cost[:size], best, out=now[first + 1:end + 1])
    i, j, text = np.array([len(each) - 1 for each in values]), np.array([len(each) - 1 for each in bases]), np.arange(B)
    steps = [(j, i)]
    while i.any() or j.any():
        inside, cell = (i > 0) | (j > 0), start[i + j] + i
        both, one_up = is_diagonal[cell, text], is_up[cell, text]
        i, j = i - (inside & (both | one_up)), j - (inside & (both | ~one_up))
        steps.append((j, i))
    backwards = np.array(steps)  # (steps, 2, B); a path that has arrived stays at (0, 0)
    lengths = 1 + backwards.any(1).sum(0)  # (B,)
    return [backwards[:length, :, text][::-1] for text, length in enumerate(lengths)]


def count_pairs(texts: list[str], base: Tokenizer, value: Tokenizer, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Lines 2 to 10: the pairs (P, 2) of a base token's id and a value token's that stand aligned, and how often (P,).

    By dynamic time warping or, with how "offsets", wherever the two tokens share a byte of the text.
    """
    costs = None if how == "offsets" else PieceCosts(base, value)
    keys, counts = np.empty(0, dtype=np.int64), np.empty(0)  # base id * Vv + value id: the count matrix, sparse
    tokens, started, reported = 0, time.monotonic(), 0.0
    for first in range(0, len(texts), 256):
        some = texts[first:first + 256]
        base_ids, value_ids = [[tokenizer.encode(text, bos=True) for text in some] for tokenizer in (base, value)]
        paths = align(base_ids, value_ids, costs) if costs else [
            share_bytes(base, b, value, v) for b, v in zip(base_ids, value_ids)]
        pairs = [np.asarray(b)[path[:, 0]] * value.vocab_size + np.asarray(v)[path[:, 1]]
                 for b, v, path in zip(base_ids, value_ids, paths)]
        keys, where = np.unique(np.concatenate([keys, *pairs]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, np.ones(len(where) - len(counts))]))
        tokens += sum(map(len, base_ids))
        elapsed, done = time.monotonic() - started, min(first + 256, len(texts))
        if elapsed - reported > 2 or done == len(texts):
            reported = elapsed
            print(f"aligned {done} of {len(texts)} texts  {tokens / elapsed / 1000:.1f}k base tokens/s  "
                  f"{elapsed / done * (len(texts) - done):.0f} s left", file=sys.stderr, flush=True)
    return np.stack([keys // value.vocab_size, keys % value.vocab_size], axis=1), counts


def share_bytes(base: Tokenizer, base_ids: list[int], value: Tokenizer, value_ids: list[int]) -> np.ndarray:
    """Pairs (P, 2) of indices of tokens that cover a byte together; the two BOS make a pair, too."""
    owner = []  # for each byte of the text, the index of its token
    for tokenizer, ids in ((base, base_ids), (value, value_ids)):
        lengths = [len(tokenizer.token_bytes(id)) for id in ids]
        owner.append(np.repeat(np.arange(len(ids)), lengths)[int(tokenizer.space_in_front):])  # less the space put in front
    return np.concatenate([[[0, 0]], np.unique(np.stack(owner, axis=1), axis=0)])


def normalise(pairs: np.ndarray, counts: np.ndarray, Vb: int, Vv: int) -> np.ndarray:
    """Line 12, as the authors compute it: weights (P,) in 0..1 of the pairs (P, 2) and their counts (P,), never dense.

    From each count its row's mean over ALL columns is taken, and then each COLUMN is stretched to 0..1 (its lowest is 0,
    for it has empty cells). So the most frequent partner of a rare value token gets 1, however rarely they met.
    """
    rows, columns = pairs.T
    centred = counts - np.bincount(rows, counts, Vb)[rows] / Vv
    low, high, filled = np.full(Vv, np.inf), np.full(Vv, -np.inf), np.bincount(columns, minlength=Vv)
    np.minimum.at(low, columns, centred)
    np.maximum.at(high, columns, centred)
    low, high = [np.where(filled < Vb, extreme(bound, 0.0), bound) for extreme, bound in ((np.minimum, low), (np.maximum, high))]
    extent = np.where(high - low == 0, 1.0, high - low)
    return (centred - low[columns]) / extent[columns]


def strongest(pairs: np.ndarray, weights: np.ndarray, Vb: int) -> tuple[np.ndarray, np.ndarray]:
    """For each base token its heaviest pair (the lowest value id of equals): targets (Vb,), -1 where unseen; weights (Vb,)."""
    order = np.lexsort((pairs[:, 1], -weights, pairs[:, 0]))
    rows, first = np.unique(pairs[order, 0], return_index=True)
    target, weight = np.full(Vb, -1), np.zeros(Vb, dtype=np.float32)
    target[rows], weight[rows] = pairs[order[first], 1], weights[order[first]]
    return target, weight


# ---------------------------------------------------------------------------------------------------------
# 2. The map without data


class Speller:
    """Which tokens a tokenizer has for any bytes, also such as are no text: the merges that its encode would make."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.rank: dict[bytes, tuple[float, int]] = {}  # of a token's bytes: how early it is merged, and its id
        self.single: dict[int, int] = {}  # tokens of one byte, for what has none
        for id in range(tokenizer.vocab_size):
            if tokenizer.kind == "tiktoken":
                rank = id
            elif tokenizer.processor.is_byte(id):
                self.single[tokenizer.token_bytes(id)[0]] = id
                continue
            else:
                rank = -tokenizer.processor.get_score(id)
                if tokenizer.processor.is_unknown(id):
                    continue
            if token := tokenizer.token_bytes(id):
                self.rank[token] = rank, id
                if tokenizer.kind == "tiktoken" and len(token) == 1:
                    self.single[token[0]] = id
        if missing := set(range(256)) - self.single.keys():
            raise DataError(f"a tokenizer without a token for the byte {min(missing)}; it cannot spell every text")

    def __call__(self, piece: bytes) -> list[int]:
        if self.tokenizer.kind == "sentencepiece":
            return self.merge(characters(piece))
        try:
            return self.tokenizer.encode(piece.decode())  # cut into words first
        except UnicodeDecodeError:
            return self.merge([piece[at:at + 1] for at in range(len(piece))])

    def merge(self, parts: list[bytes]) -> list[int]:
        """Byte-pair encoding: while two neighbours together are a token, join those that rank first, from the left."""
        while True:
            ranks = [self.rank.get(a + b, (np.inf, 0))[0] for a, b in zip(parts, parts[1:])]
            if not ranks or (best := min(ranks)) == np.inf:
                break
            at = ranks.index(best)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [id for part in parts
                for id in ([self.rank[part][1]] if part in self.rank else [self.single[byte] for byte in part])]


def characters(piece: bytes) -> list[bytes]:
    """The characters of a piece of text; bytes that are none stand alone."""
    text = piece.decode(errors="surrogateescape")
    return [character.encode(errors="surrogateescape") for character in text]


def spell_out(source: Tokenizer, target: Tokenizer) -> list[tuple[int, ...]]:
    """For every token of one tokenizer the tokens that the other has for its bytes; () for special ones.

    Beginning and end of a text are mapped by hand: they have no bytes.
    """
    speller = Speller(target)
    spelled: list[tuple[int, ...]] = []
    for id in range(source.vocab_size):
        piece = source.token_bytes(id)
        if source.kind == "sentencepiece" and source.processor.is_byte(id):
            spelled.append((speller.single[piece[0]],))  # a byte remains a byte, though there may be a piece of it, too
        elif not piece or source.kind == "sentencepiece" and source.processor.is_unknown(id):
            spelled.append(())
        else:
            spelled.append(tuple(speller(piece)))
    spelled[source.bos_id] = (target.bos_id,)
    spelled[source.end_of_turn_id] = (target.end_of_turn_id,)
    spelled[source.eos_id] = (target.eos_id,)
    return spelled


def overlap(texts: list[str], base: Tokenizer, value: Tokenizer, spelled: list[tuple[int, ...]]) -> float:
    """How much of a text's value tokens its base tokens give through a map, as a mean over texts.

    Both are multisets: the size of their intersection over the number of value tokens. BOS counts on neither side. The
    paper reports 0.42 for its map, on its training texts, and does not define it.
    """
    shares = []
    for text in texts:
        golden = Counter(value.encode(text))
        mapped = Counter(token for id in base.encode(text) for token in spelled[id])
        shares.append((golden & mapped).total() / golden.total())
    return sum(shares) / len(shares)


# ---------------------------------------------------------------------------------------------------------
# A map, and its file

HOWS = ("pieces", "paper", "dtw", "offsets")


@dataclass
class VocabMap:
    """A map from a base's tokens to a value network's: made by build, kept in a file.

    `pieces[t]` are the value tokens of base token t: all of them in the data-free map, at most one in the others, none
    where nothing is known or for special tokens. `weight[t]` is Eq. (5)'s, 1 but for how "paper". `paths[v]` are the
    base tokens of value token v's own bytes, in the data-free map alone.
    """

    how: str
    base: dict  # the tokenizers as describe_tokenizer names them: size and fingerprint
    value: dict
    pieces: list[tuple[int, ...]]
    weight: np.ndarray  # (Vb,)
    paths: list[tuple[int, ...]]
    base_tokenizer: Tokenizer
    value_tokenizer: Tokenizer

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that load reads, in its place all at once."""
        tensors = {"weight": torch.from_numpy(self.weight.astype(np.float32))}
        for name, lists in (("pieces", self.pieces), ("paths", self.paths)):
            tensors[f"{name}.tokens"] = torch.tensor([token for each in lists for token in each], dtype=torch.int32)
            tensors[f"{name}.lengths"] = torch.tensor(list(map(len, lists)), dtype=torch.int32)
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        save_file(tensors, temporary, metadata={"how": self.how, "base": json.dumps(self.base), "value": json.dumps(self.value)})
        temporary.rename(path)

    @classmethod
    def load(cls, path: str | Path, base: Tokenizer, value: Tokenizer) -> "VocabMap":
        """Raises CheckpointError for a file that is none, or is damaged, or was made for other tokenizers."""
        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
            found = cls(about["how"], json.loads(about["base"]), json.loads(about["value"]),
                        unpack(tensors, "pieces"), tensors["weight"].numpy(), unpack(tensors, "paths"), base, value)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: no vocabulary map, or a damaged one ({error})") from None
        for side, recorded, tokenizer in (("base", found.base, base), ("value network", found.value, value)):
            if recorded != describe_tokenizer(tokenizer):
                raise CheckpointError(f"{path}: made for another tokenizer of the {side}; vocab_map.py makes one for this pair")
        fits = (found.how in HOWS and len(found.pieces) == len(found.weight) == base.vocab_size
                and len(found.paths) in (0, value.vocab_size)
                and all(0 <= token < value.vocab_size for each in found.pieces for token in each)
                and all(0 <= token < base.vocab_size for each in found.paths for token in each))
        if not fits:
            raise CheckpointError(f"{path}: not the shape of a vocabulary map of {base.vocab_size} by {value.vocab_size} tokens")
        return found


def unpack(tensors: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
    tokens, ends = tensors[f"{name}.tokens"].tolist(), tensors[f"{name}.lengths"].cumsum(0).tolist()
    if (ends[-1] if ends else 0) != len(tokens):
        raise ValueError(f"{name} of other lengths than recorded")
    return [tuple(tokens[start:end]) for start, end in zip([0, *ends], ends)]


def build(base: Tokenizer, value: Tokenizer, how: str = "pieces", texts: list[str] | None = None) -> VocabMap:
    """A map by one of HOWS; all but "pieces" need texts. Raises DataError where a tokenizer cannot spell every byte."""
    about = how, describe_tokenizer(base), describe_tokenizer(value)
    if how == "pieces":
        pieces = spell_out(base, value)
        return VocabMap(*about, pieces, np.ones(base.vocab_size, dtype=np.float32), spell_out(value, base), base, value)
    if not texts:
        raise DataError(f"--how {how} counts in texts, and there are none")
    pairs, counts = count_pairs(texts, base, value, how)
    weights = normalise(pairs, counts, base.vocab_size, value.vocab_size) if how == "paper" else counts
    target, weight = strongest(pairs, weights, base.vocab_size)
    if how != "paper":
        weight = (target >= 0).astype(np.float32)
    return VocabMap(*about, [(token,) if token >= 0 else () for token in target.tolist()], weight, [], base, value)


def read_texts(file: Path) -> list[str]:
    """The texts of a .txt (cut at blank lines), or of JSON lines with text, question and answer, or a conversation each."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8") from None
    if file.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        texts = [record_text(line, f"{file}: line {number}") for number, line in lines if line.strip()]
    elif file.suffix == ".txt":
        texts = re.split(r"\n\s*\n", content)
    else:
        raise DataError(f"{file}: texts come as .txt or .jsonl")
    if not (texts := [text for text in texts if text.strip()]):
        raise DataError(f"{file}: no text in it")
    return texts


def record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    fields = record if isinstance(record, dict) else {}
    for names in (["text"], ["question", "answer"]):
        if all(isinstance(fields.get(name), str) for name in names):
            text = "\n".join(fields[name] for name in names)
            return text if is_unicode(text) else ""
    try:
        return "\n".join(text for _, text in read_turns(record)[0])
    except ValueError:
        raise DataError(f"{where} has neither 'text', nor 'question' and 'answer', nor a conversation") from None


# ---------------------------------------------------------------------------------------------------------
# 3. Decoding: what a base says of the next VALUE token
#
# The value network's tokens are what is written. Follow one: Mapped.log_p tells how likely the base finds each to come
# next, Guided adds z_delta, generate picks one, and Mapped.push takes it into the contexts. With P(v) for that:
#
# * A base token may be several value tokens long. So a context may be behind what was written: `pending` are the value
#   tokens since then. The base tokens that begin with them are one range once tokens are sorted by their pieces;
#   their mass, by the piece that follows, is P(v). When the pending ones are a whole base token, the base can also have
#   read it; both ways are kept, as hypotheses.
# * A value token may be several base tokens long, a path. No mass would ever reach it, so its path is spelled out, base
#   token by base token, wherever z_delta leaves it a chance to win.

FLOOR = 1e-12  # the least P(v): what the base rules out can still be said if z_delta outbids log(1e-12) = -27.6
HYPOTHESES, EXPANSIONS = 3, 8  # contexts of one text; base tokens read for paths in one step
MARGIN = 5.0  # nats below the best within which a path is worth reading when sampling; 0 when greedy


@dataclass
class Context:
    """Base tokens that were read, their keys and values (layers, K, L, F), and what the base says comes next."""

    tokens: list[int]
    keys: Tensor
    values: Tensor
    logits: Tensor  # (Vb,)
    log_p: Tensor  # (Vb,) over the tokens that have pieces
    weight: float = 0.0  # log of how likely the text was cut in this way, up to a constant
    pending: tuple[int, ...] = ()  # value tokens written since


class Mapped:
    """A frozen base behind a vocabulary map, reading one text for each row of a batch."""

    def __init__(self, base: Llama, vocab_map: VocabMap):
        self.base, self.map = base, vocab_map
        self.passes = self.steps = 0  # base tokens read behind prompts; value tokens asked for
        device, pieces = base.device, vocab_map.pieces
        order = sorted((each, token) for token, each in enumerate(pieces) if each)
        self.sorted_pieces = [each for each, _ in order]
        self.sorted_tokens = torch.tensor([token for _, token in order], device=device)
        self.lengths = torch.tensor([len(each) for each, _ in order], device=device)
        self.flat = torch.tensor([piece for each, _ in order for piece in each], device=device)
        self.weights = torch.from_numpy(vocab_map.weight).to(device)[self.sorted_tokens]
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.silent = torch.ones(base.config.vocab_size, dtype=torch.bool, device=device)
        self.silent[self.sorted_tokens] = False  # special tokens, and rows beyond the tokenizer's
        value = vocab_map.value_tokenizer
        known = {value.bos_id, value.eos_id, value.end_of_turn_id}
        self.never = torch.tensor([id for id in range(value.vocab_size) if not value.token_bytes(id) and id not in known],
                                  dtype=torch.long, device=device)  # special tokens that no base has
        spelled = [(value, path) for value, path in enumerate(vocab_map.paths) if len(path) > 1]
        self.path_value = torch.tensor([value for value, _ in spelled], dtype=torch.long, device=device)  # (n,)
        self.path_length = torch.tensor([len(path) for _, path in spelled], device=device)
        longest = max((len(path) for _, path in spelled), default=1)
        self.paths = torch.tensor([path + (-1,) * (longest - len(path)) for _, path in spelled], device=device).view(-1, longest)
        self.texts: list[list[Context]] = []  # the hypotheses of each text, those likeliest so far first
        # Of each text: base tokens up to its last special one, and the value tokens since.
        self.written: list[tuple[list[int], list[int]]] = []
        self.found: list[dict[tuple[int, ...], Context]] = []  # of each text: contexts read along paths in this step
        self.path_log_p: dict[tuple[int, int], float] = {}  # of (text, value token): what its path weighs in this step

    # -- the base

    def read(self, parents: list[Context], tokens: list[list[int]]) -> list[Context]:
        """One base pass: each parent continued by some tokens."""
        N, T, longest = len(parents), max(map(len, tokens)), max(len(parent.tokens) for parent in parents)
        cache = KVCache(self.base, N, longest + T)
        padded = torch.zeros(N, T, dtype=torch.long)
        for row, (parent, more) in enumerate(zip(parents, tokens)):
            cache.keys[:, row, :, :len(parent.tokens)], cache.values[:, row, :, :len(parent.tokens)] = parent.keys, parent.values
            padded[row, :len(more)] = torch.tensor(more)
        cache.set_lengths([len(parent.tokens) for parent in parents])
        last = torch.tensor([len(more) - 1 for more in tokens], device=self.base.device)
        hidden = self.base.model(padded.to(self.base.device), cache)  # (N, T, D)
        logits = self.base.lm_head(hidden[torch.arange(N, device=last.device), last]).float()  # (N, Vb)
        log_p = logits.masked_fill(self.silent, -torch.inf).log_softmax(-1)
        return [Context(parent.tokens + more, cache.keys[:, row, :, :len(parent.tokens + more)],
                        cache.values[:, row, :, :len(parent.tokens + more)], logits[row], log_p[row])
                for row, (parent, more) in enumerate(zip(parents, tokens))]

    def start(self, prompts: list[list[int]]) -> None:
        """Read prompts, given as value tokens, in the base's own tokens."""
        cache = KVCache(self.base, 1, 0)
        nothing = Context([], cache.keys[:, 0], cache.values[:, 0], torch.empty(0), torch.empty(0))
        self.written = [self.split(prompt) for prompt in prompts]
        tokens = [self.in_base_tokens(*each)[0] for each in self.written]
        self.texts = [[context] for context in self.read([nothing] * len(prompts), tokens)]
        self.passes = self.steps = 0

    def split(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Base tokens up to the last special token of a prompt, and the value tokens behind it."""
        base, value = self.map.base_tokenizer, self.map.value_tokenizer
        by_hand = {value.bos_id: [base.bos_id], value.eos_id: [base.eos_id]}
        tokens, behind = [], []
        for id in prompt:
            if value.token_bytes(id):
                behind.append(id)
            else:
                tokens, behind = self.in_base_tokens(tokens, behind)[0] + by_hand.get(id, []), []
        return tokens, behind

    def in_base_tokens(self, tokens: list[int], behind: list[int]) -> tuple[list[int], tuple[int, ...]]:
        """Base tokens, and those of the text of value tokens behind them; what ends in half a character is withheld."""
        value, base = self.map.value_tokenizer, self.map.base_tokenizer
        text = b"".join(map(value.token_bytes, behind))
        whole, withheld = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        whole.decode(text)
        half = len(whole.getstate()[0])  # bytes
        while half > 0:
            withheld += 1
            half -= len(value.token_bytes(behind[-withheld]))
        behind, pending = behind[:len(behind) - withheld], tuple(behind[len(behind) - withheld:])
        text = value.decode(behind)  # without the space that the value network's tokenizer puts in front
        return tokens + (base.encode(text) if text else []), pending

    def select(self, rows: Tensor) -> None:
        self.texts, self.written = [[each[row] for row in rows.tolist()] for each in (self.texts, self.written)]

    # -- one step

    @torch.no_grad()
    def log_p(self, z_delta: Tensor, margin: float) -> Tensor:
        """log P of the next value token, (B, Vv), floored; z_delta (B, Vv) tells which paths have a chance."""
        self.steps += len(self.texts)
        if self.map.how != "pieces":
            z = torch.stack([self.equation_5(contexts[0].logits, z_delta.shape[-1]) for contexts in self.texts])
            return z.index_fill(1, self.never, -torch.inf)
        P = torch.stack([self.mass(contexts, z_delta.shape[-1]) for contexts in self.texts])  # (B, Vv)
        total = P.sum(-1).clamp(min=1e-30)
        P /= total[:, None]
        self.found, self.path_log_p = [{} for _ in self.texts], {}
        if len(self.path_value):
            self.spell_paths(P, total.log().tolist(), z_delta.float(), margin)
        return P.clamp(min=FLOOR).log().index_fill(1, self.never, -torch.inf)

    def equation_5(self, z_base: Tensor, Vv: int) -> Tensor:
        """Eq. (5): z_base W, (Vv,), of the logits as lm_head gives them. Those of base tokens with one target ADD, and
        a value token that nothing reaches gets 0."""
        z = torch.zeros(Vv, device=z_base.device)
        return z.index_add(0, self.flat, z_base[self.sorted_tokens] * self.weights)

    def range_of(self, pending: tuple[int, ...]) -> tuple[int, int]:
        """Where the base tokens that begin with these pieces stand in sorted order."""
        if not pending:
            return 0, len(self.sorted_pieces)
        behind = pending[:-1] + (pending[-1] + 1,)
        return bisect_left(self.sorted_pieces, pending), bisect_left(self.sorted_pieces, behind)

    def mass(self, contexts: list[Context], Vv: int) -> Tensor:
        """P (Vv,) up to a factor: base tokens that go on beyond what is pending, by the piece they go on with."""
        P = torch.zeros(Vv, device=self.base.device)
        for context in contexts:
            low, high = self.range_of(context.pending)
            longer = self.lengths[low:high] > len(context.pending)
            p = (context.log_p[self.sorted_tokens[low:high]] + context.weight).exp() * longer
            following = self.flat[(self.starts[low:high] + len(context.pending)).clamp(max=len(self.flat) - 1)]
            P.index_add_(0, following, p)
        return P

    def spell_paths(self, P: Tensor, log_totals: list[float], z_delta: Tensor, margin: float) -> None:
        """Raise P (B, Vv) of value tokens that take several base tokens, those first that may yet win.

        What has been read of a path, with z_delta, bounds what its token can reach. While a bound beats the best so
        far, the base reads one token more of that path; one pass serves all texts.
        """
        exact = [next((context for context in contexts if not context.pending), None) for contexts in self.texts]
        texts = [text for text, context in enumerate(exact) if context is not None]
        if not texts:
            return
        rows = torch.tensor(texts, device=P.device)
        first = torch.stack([exact[text].log_p + (exact[text].weight - log_totals[text]) for text in texts])  # (E, Vb)
        scored = first[:, self.paths[:, 0]]  # (E, n), log p of the part of each path that is read
        depth = torch.ones_like(scored, dtype=torch.long)
        z = z_delta[rows][:, self.path_value]  # (E, n)
        best = (P[rows].clamp(min=FLOOR).log() + z_delta[rows]).amax(-1)  # (E,)
        for text in texts:
            self.found[text][()] = exact[text]
        for _ in range(EXPANSIONS):
            complete = depth == self.path_length
            best = torch.maximum(best, torch.where(complete, scored + z, -torch.inf).amax(-1))
            bound, path = torch.where(complete, -torch.inf, scored + z).max(-1)  # (E,)
            ahead = [row for row, wins in enumerate((bound > best - margin).tolist()) if wins]
            if not ahead:
                break
            prefixes = [tuple(self.paths[path[row], :depth[row, path[row]]].tolist()) for row in ahead]
            children = self.read([self.found[texts[row]][prefix[:-1]] for row, prefix in zip(ahead, prefixes)],
                                 [[prefix[-1]] for prefix in prefixes])
            self.passes += len(children)
            for row, prefix, child in zip(ahead, prefixes, children):
                self.found[texts[row]][prefix] = child
                same = ((self.paths[:, :len(prefix)] == torch.tensor(prefix, device=P.device)).all(-1)
                        & (depth[row] == len(prefix)) & (self.path_length > len(prefix)))  # (n,)
                child.weight = scored[row, path[row]].item() + log_totals[texts[row]]
                scored[row, same] += child.log_p[self.paths[same, len(prefix)]]
                depth[row, same] += 1
        for row, text in enumerate(texts):
            for at in torch.nonzero(depth[row] == self.path_length)[:, 0].tolist():
                p, value = scored[row, at].exp(), int(self.path_value[at])
                self.path_log_p[text, value] = scored[row, at].item() + log_totals[text]
                if margin:  # when sampling, the same text must not count twice
                    self.take_from_prefix(P[text], tuple(self.map.paths[value]), p)
                P[text, value] = torch.maximum(P[text, value], p)

    def take_from_prefix(self, P: Tensor, path: tuple[int, ...], p: Tensor) -> None:
        """The mass of a path is also in the value token that its first base token begins with: take it out there."""
        shorter = self.map.pieces[path[0]][0]
        P[shorter] = (P[shorter] - p).clamp(min=0.0)

    # -- after one step

    @torch.no_grad()
    def push(self, tokens: list[int]) -> None:
        """Take the value token that each text goes on with into its contexts."""
        kept: list[list[tuple[float, Context]]] = []  # of each text, with the log of what can still come of it
        wanted: list[tuple[int, Context, tuple[int, ...], float]] = []  # text, parent, base tokens to read, weight then
        withheld: dict[int, tuple[int, ...]] = {}  # of texts that are read again: value tokens of half a character
        for text, (contexts, value) in enumerate(zip(self.texts, tokens)):
            before, behind = self.written[text]
            self.written[text] = before, behind + [value]
            kept.append([])
            if self.map.how != "pieces":
                continue
            options = []
            for context in contexts:
                pending = context.pending + (value,)
                low, high = self.range_of(pending)
                longer = self.lengths[low:high] > len(pending)
                log_p = context.log_p[self.sorted_tokens[low:high]] + context.weight
                if longer.any():
                    kept[text].append((log_p[longer].logsumexp(0).item(), dataclasses.replace(context, pending=pending)))
                options += [(log_p[at].item(), context, (int(self.sorted_tokens[low + at]),))
                            for at in torch.nonzero(~longer)[:, 0].tolist()]
            if (text, value) in self.path_log_p:
                path = self.map.paths[value]
                read = max((prefix for prefix in self.found[text] if prefix == path[:len(prefix)]), key=len)
                options.append((self.path_log_p[text, value], self.found[text][read], path[len(read):]))
            # The likeliest of both kinds; what is unlikely by e^-30 beside the best is not worth a pass.
            scores = sorted([score for score, _ in kept[text]] + [score for score, *_ in options], reverse=True)[:HYPOTHESES]
            least = max(scores[-1], scores[0] - 30) if scores else 0.0
            kept[text] = [each for each in kept[text] if each[0] >= least]
            wanted += [(text, parent, path, score) for score, parent, path in options if score >= least]
        for text, contexts in enumerate(kept):
            if not contexts and not any(each[0] == text for each in wanted):
                parent, path, withheld[text] = self.read_again(text)
                wanted.append((text, parent, path, 0.0))
        if wanted:
            children = self.read([parent for _, parent, _, _ in wanted], [list(path) for _, _, path, _ in wanted])
            self.passes += sum(len(path) for _, _, path, _ in wanted)
            for (text, _, _, weight), child in zip(wanted, children):
                kept[text].append((weight, dataclasses.replace(child, weight=weight, pending=withheld.get(text, ()))))
        self.texts = []
        for contexts in kept:
            contexts.sort(key=lambda each: -each[0])
            top = contexts[0][0]
            self.texts.append([dataclasses.replace(each, weight=each.weight - top) for _, each in contexts[:HYPOTHESES]])

    def read_again(self, text: int) -> tuple[Context, tuple[int, ...], tuple[int, ...]]:
        """The text so far as the base's tokenizer cuts it: a context cropped to what stays the same, the tokens behind it
        (at least one), and value tokens that end in half a character."""
        (tokens, pending), context = self.in_base_tokens(*self.written[text]), self.texts[text][0]
        same = 0
        while same < min(len(tokens) - 1, len(context.tokens)) and tokens[same] == context.tokens[same]:
            same += 1
        cropped = dataclasses.replace(context, tokens=tokens[:same], keys=context.keys[:, :, :same],
                                      values=context.values[:, :, :same])
        return cropped, tuple(tokens[same:]), pending


# ---------------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-tokenizer", required=True, metavar="A", help="the base's, a file or a checkpoint folder")
    parser.add_argument("--value-tokenizer", required=True, metavar="B", help="the value network's")
    parser.add_argument("--how", choices=HOWS, default="pieces", help="from the tokenizers alone (pieces, the default), or "
                        "counted in texts: Algorithm 1 (paper), its counts alone (dtw), or by shared bytes (offsets)")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="what to count in: .txt, or .jsonl with text, question and "
                        "answer, or conversations")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="held-out texts to report the overlap on")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the map, map.safetensors for instance")
    args = parser.parse_args()
    base, value = load_tokenizer(args.base_tokenizer), load_tokenizer(args.value_tokenizer)
    texts, held_out = [read_texts(file) if file else [] for file in (args.texts, args.eval)]
    if args.how != "pieces" and not texts:
        parser.error(f"--how {args.how} counts in texts; name some with --texts")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    started = time.monotonic()
    vocab_map = build(base, value, args.how, texts)
    print(f"made in {time.monotonic() - started:.1f} s", flush=True)
    reached = {token for each in vocab_map.pieces for token in each}
    print(f"{sum(map(bool, vocab_map.pieces))} of {base.vocab_size} base tokens are mapped, "
          f"to {len(reached)} of {value.vocab_size} value tokens")
    if vocab_map.paths:
        print(f"{sum(len(path) > 1 for path in vocab_map.paths)} value tokens take several base tokens")
    vocab_map.save(args.out)
    print(f"saved {args.out}")
    if args.how == "pieces":
        print("first piece alone: " + show_overlap(texts, held_out, base, value, [each[:1] for each in vocab_map.pieces]))
    print("overlap: " + show_overlap(texts, held_out, base, value, vocab_map.pieces))


def show_overlap(texts: list[str], held_out: list[str], base: Tokenizer, value: Tokenizer, pieces: list[tuple[int, ...]]) -> str:
    shown = [f"{overlap(some, base, value, pieces):.3f}" if some else "-" for some in (texts, held_out)]
    return f"texts {shown[0]} held-out {shown[1]}"


if __name__ == "__main__":
    run_cli(main)
