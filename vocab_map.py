"""Plugging a value network into a base with another tokenizer: the map between their vocabularies.

    python vocab_map.py --base-tokenizer A --value-tokenizer B --out M             # needs no text
    python vocab_map.py --base-tokenizer A --value-tokenizer B --out M --how paper --texts FILE

1. Algorithm 1 (Appendix B): in texts tokenised twice, count which base tokens stand where which
   value tokens stand.
2. Eq. (5), a map's file, and the base's tokens for a text in value tokens.
3. The map that needs no data: which value tokens a base token's own bytes fall into.
"""

import codecs
import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UsageError
from data.files import check_regular, replacing
from data.records import read_texts
from data.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer

# From the tokenizers alone; by Algorithm 1; by its counts without line 12; by shared bytes.
HOWS = ("pieces", "paper", "dtw", "offsets")

# --------------------------------------------------------------------------------------------------
# 1. Algorithm 1
#
# Lines 1 to 4 tokenise each text twice, 5 makes pieces of the tokens, 6 and 7 find the cheapest
# alignment of the two sequences of pieces, 8 to 11 count which tokens stand aligned, in a matrix C,
# 12 normalises C. Pieces are compared as bytes, without the space in front.


def pieces_of(tokenizer: Tokenizer, texts: list[list[int]]) -> list[list[bytes]]:
    """Line 5: the bytes of each token, without the space that marks a word's beginning.

    b"" for special tokens.
    """
    pieces = []
    for ids in texts:
        pieces.append([tokenizer.token_bytes(id).removeprefix(b" ") for id in ids])
    return pieces


@functools.cache
def piece_cost(a: bytes, b: bytes) -> float:
    """Line 6: Levenshtein's distance, a tenth of it where one piece contains the other."""
    distance = levenshtein(a, b)
    return distance * 0.1 if a in b or b in a else float(distance)


def levenshtein(a: bytes, b: bytes) -> int:
    distances = list(range(len(b) + 1))  # from what has been read of a, to each beginning of b
    for i, byte in enumerate(a, 1):
        corner, distances[0] = distances[0], i
        for j, other in enumerate(b, 1):
            cheapest = min(distances[j] + 1, distances[j - 1] + 1, corner + (byte != other))
            corner, distances[j] = distances[j], cheapest
    return distances[-1]


def align_by_loop(base: list[bytes], value: list[bytes]) -> list[tuple[int, int]]:
    """Lines 6 and 7: dynamic time warping. Pairs (index into base, into value), first to last.

    total[i][j] is the cheapest way to have aligned the first i value pieces with the first j base
    pieces. On the way back a tie goes to the diagonal, then up (one value piece back), then left.
    """
    total = np.full((len(value) + 1, len(base) + 1), np.inf)
    total[0, 0] = 0.0
    for i, value_piece in enumerate(value, 1):
        for j, base_piece in enumerate(base, 1):
            before = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            total[i, j] = piece_cost(value_piece, base_piece) + before
    i, j = len(value), len(base)
    path = []
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


def align_all(base: list[list[bytes]], value: list[list[bytes]]) -> list[list[tuple[int, int]]]:
    """align_by_loop of each text; fast/alignment.py does many at once."""
    return [align_by_loop(*pieces) for pieces in zip(base, value)]


def count_pairs(
    texts: list[str], base: Tokenizer, value: Tokenizer, how: str, align: Callable = align_all
) -> tuple[np.ndarray, np.ndarray]:
    """Lines 1 to 11: which base and value tokens stand aligned, (P, 2), and how often, (P,).

    By dynamic time warping or, with how "offsets", wherever the two tokens share a byte of the
    text.
    """
    counts: Counter[tuple[int, int]] = Counter()  # the matrix C, sparse
    left_out = 0
    for batch in with_progress(texts):
        # lines 3 and 4: tokenise twice
        base_ids = [base.encode(text, bos=True) for text in batch]
        value_ids = [value.encode(text, bos=True) for text in batch]
        # lines 5 to 7: the path of each text
        if how == "offsets":
            paths = [share_bytes(base, b, value, v) for b, v in zip(base_ids, value_ids)]
        else:
            paths = align(pieces_of(base, base_ids), pieces_of(value, value_ids))
        # lines 8 to 10: count the pairs on it
        for b, v, path in zip(base_ids, value_ids, paths):
            left_out += not path
            for at_base, at_value in path:
                counts[b[at_base], v[at_value]] += 1
    if left_out:
        print(
            f"left out {left_out} of {len(texts)} texts, whose bytes a tokenizer changes",
            file=sys.stderr,
        )
    if not counts:
        raise UsageError(
            "a tokenizer changes the bytes of every text, so there is nothing to count; --how paper "
            "or dtw can"
        )
    pairs = sorted(counts)
    return np.array(pairs), np.array([counts[pair] for pair in pairs], dtype=float)


def with_progress(texts: list[str], size: int = 256) -> Iterator[list[str]]:
    """The texts in batches; says every two seconds, and at the end, how far it is."""
    started, reported = time.monotonic(), 0.0
    for first in range(0, len(texts), size):
        yield texts[first : first + size]
        elapsed, done = time.monotonic() - started, min(first + size, len(texts))
        if elapsed - reported > 2 or done == len(texts):
            reported = elapsed
            left = elapsed / done * (len(texts) - done)
            print(f"aligned {done} of {len(texts)} texts, {left:.0f} s left", file=sys.stderr)


def share_bytes(
    base: Tokenizer, base_ids: list[int], value: Tokenizer, value_ids: list[int]
) -> list[tuple[int, int]]:
    """Pairs of indices of tokens that cover a byte together; the two BOS make a pair, too.

    Empty where the two do not spell the same bytes, since a tokenizer has changed the text (merged
    spaces, say).
    """
    owners, texts = [], []
    for tokenizer, ids in ((base, base_ids), (value, value_ids)):
        front = int(tokenizer.space_in_front)  # the space that it put in front is not the text's
        owner = []  # of each byte, its token's index
        for index, id in enumerate(ids):
            owner += [index] * len(tokenizer.token_bytes(id))
        owners.append(owner[front:])
        texts.append(b"".join(map(tokenizer.token_bytes, ids))[front:])
    if texts[0] != texts[1]:
        return []
    pairs = list(dict.fromkeys(zip(*owners)))
    have_bos = base_ids[:1] == [base.bos_id] and value_ids[:1] == [value.bos_id]
    if have_bos:  # some tokenizers have none
        pairs.insert(0, (0, 0))
    return pairs


def normalise(pairs: np.ndarray, counts: np.ndarray, Vb: int, Vv: int) -> np.ndarray:
    """Line 12, as the authors compute it: weights (P,) in 0..1 of pairs (P, 2) and counts (P,).

    From each count its row's mean over ALL columns is taken, and then each COLUMN is stretched to
    0..1. So the most frequent partner of a rare value token gets 1, however rarely they met.
    """
    rows, columns = pairs.T
    row_means = np.bincount(rows, counts, Vb) / Vv  # (Vb,)
    centred = counts - row_means[rows]
    low, high = np.full(Vv, np.inf), np.full(Vv, -np.inf)
    np.minimum.at(low, columns, centred)
    np.maximum.at(high, columns, centred)
    # Empty cells of C are left as 0, as in the authors' code: a column that has one has a 0 in it.
    has_empty = np.bincount(columns, minlength=Vv) < Vb
    low[has_empty] = np.minimum(low[has_empty], 0.0)
    high[has_empty] = np.maximum(high[has_empty], 0.0)
    extent = high - low
    extent[extent == 0] = 1.0
    return (centred - low[columns]) / extent[columns]


def strongest(pairs: np.ndarray, weights: np.ndarray, Vb: int) -> tuple[np.ndarray, np.ndarray]:
    """For each base token its heaviest pair: value tokens (Vb,), -1 where unseen, weights (Vb,).

    Of equals the lowest value token.
    """
    order = np.lexsort((pairs[:, 1], -weights, pairs[:, 0]))
    rows, first = np.unique(pairs[order, 0], return_index=True)
    target, weight = np.full(Vb, -1), np.zeros(Vb, dtype=np.float32)
    target[rows] = pairs[order[first], 1]
    weight[rows] = weights[order[first]]
    return target, weight


# --------------------------------------------------------------------------------------------------
# 2. A map, Eq. (5), and its file


@dataclass
class VocabMap:
    """A map from a base's tokens to a value network's: made by build, kept in a file.

    `value_tokens[t]` are the value tokens of base token t: all of them in the data-free map, at
    most one in the others, none where nothing is known or for special tokens that by_hand does not
    name. `weight[t]` is Eq. (5)'s, 1 unless how is "paper". `base_tokens[v]` are the base tokens of
    value token v's own bytes, in the data-free map alone.
    """

    how: str
    base: dict  # the tokenizers as describe_tokenizer names them: size and fingerprint
    value: dict
    value_tokens: list[tuple[int, ...]]
    weight: np.ndarray  # (Vb,)
    base_tokens: list[tuple[int, ...]]
    base_tokenizer: Tokenizer
    value_tokenizer: Tokenizer

    def map_logits(self, z_base: Tensor, Vv: int) -> Tensor:
        """Eq. (5): z_base W, (..., Vb) -> (..., Vv), of the logits as lm_head gives them.

        The logits of base tokens that share a target ADD, and a value token that nothing reaches
        gets 0.
        """
        source, target = self.entries.to(z_base.device)  # of W's entries: (P,), (P,)
        weight = torch.from_numpy(self.weight).to(z_base.device)[source]  # (P,)
        z = torch.zeros(*z_base.shape[:-1], Vv, device=z_base.device)
        return z.index_add(-1, target, z_base[..., source] * weight)

    @functools.cached_property
    def entries(self) -> Tensor:
        """Base token and value token of each entry of W, (2, P): of several pieces the first."""
        found = [(token, of[0]) for token, of in enumerate(self.value_tokens) if of]
        return torch.tensor(found, dtype=torch.long).view(-1, 2).T

    def unsayable(self) -> list[int]:
        """Special value tokens for which by_hand knows none of the base's."""
        value = self.value_tokenizer
        known = by_hand(value, self.base_tokenizer)
        special = [id for id in range(value.vocab_size) if not value.token_bytes(id)]
        return [id for id in special if id not in known]

    def in_base_tokens(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The base's own tokens of a text in value tokens.

        And the last value tokens, where they are half a character.
        """
        special = by_hand(self.value_tokenizer, self.base_tokenizer)
        tokens: list[int] = []
        behind: list[int] = []  # value tokens since the last special one
        for at, id in enumerate(ids):
            if self.value_tokenizer.token_bytes(id):
                behind.append(id)
                continue
            tokens += self.encode_again(behind)[0]
            # with some tokenizers BOS is the token that ends a text, too
            if at == 0 and id == self.value_tokenizer.bos_id:
                tokens += self.base_tokenizer.encode("", bos=True)
            elif id in special:
                tokens.append(special[id])
            behind = []
        more, withheld = self.encode_again(behind)
        return tokens + more, withheld

    def encode_again(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """in_base_tokens of value tokens that have bytes."""
        text = b"".join(map(self.value_tokenizer.token_bytes, ids))
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(text)
        half = len(decoder.getstate()[0])  # bytes at the end that are no whole character yet
        whole = len(ids)
        while half > 0:
            whole -= 1
            half -= len(self.value_tokenizer.token_bytes(ids[whole]))
        # without the space that its tokenizer puts in front
        text = self.value_tokenizer.decode(ids[:whole])
        return self.base_tokenizer.encode(text) if text else [], ids[whole:]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that load reads, in its place all at once."""
        tensors = {"weight": torch.from_numpy(self.weight.astype(np.float32))}
        tensors |= pack("pieces", self.value_tokens) | pack("paths", self.base_tokens)
        about = {"how": self.how, "base": json.dumps(self.base), "value": json.dumps(self.value)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=about)

    @classmethod
    def load(cls, path: str | Path, base: Tokenizer, value: Tokenizer) -> "VocabMap":
        """UsageError for a file that is no map, or is damaged, or was made for other tokenizers."""
        try:
            with safe_open(check_regular(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            made = cls(
                about["how"],
                json.loads(about["base"]),
                json.loads(about["value"]),
                unpack(tensors, "pieces"),
                tensors["weight"].numpy(),
                unpack(tensors, "paths"),
                base,
                value,
            )
        except UsageError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{path}: no vocabulary map, or a damaged one ({error})") from None
        other = f"{path}: made for another tokenizer of the"
        if made.base != describe_tokenizer(base):
            raise UsageError(f"{other} base; vocab_map.py makes one for this pair")
        if made.value != describe_tokenizer(value):
            raise UsageError(f"{other} value network; vocab_map.py makes one for this pair")
        if not made.is_sound():
            raise UsageError(
                f"{path}: not the shape, or the numbers, of a vocabulary map of {base.vocab_size} by "
                f"{value.vocab_size} tokens"
            )
        return made

    def is_sound(self) -> bool:
        """Whether sizes, weights and token ids can be right for the two tokenizers."""
        Vb, Vv = self.base_tokenizer.vocab_size, self.value_tokenizer.vocab_size
        sizes = len(self.value_tokens) == len(self.weight) == Vb
        sizes = sizes and len(self.base_tokens) in (0, Vv)
        ids = are_below(Vv, self.value_tokens) and are_below(Vb, self.base_tokens)
        return self.how in HOWS and sizes and ids and bool(np.isfinite(self.weight).all())


def are_below(size: int, lists: list[tuple[int, ...]]) -> bool:
    """Whether all ids in some lists are ones of a vocabulary of this size."""
    return all(0 <= id < size for id in itertools.chain.from_iterable(lists))


def pack(name: str, lists: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Lists of ids as one list of tokens and one of lengths; unpack takes them apart."""
    tokens = list(itertools.chain.from_iterable(lists))
    return {
        f"{name}.tokens": torch.tensor(tokens, dtype=torch.int32),
        f"{name}.lengths": torch.tensor([len(ids) for ids in lists], dtype=torch.int32),
    }


def unpack(tensors: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
    """What save has written as one list of tokens and one of lengths."""
    tokens = iter(tensors[f"{name}.tokens"].tolist())
    lengths = tensors[f"{name}.lengths"].tolist()
    if sum(lengths) != len(tensors[f"{name}.tokens"]):
        raise ValueError(f"{name} of other lengths than recorded")
    return [tuple(itertools.islice(tokens, length)) for length in lengths]


def by_hand(source: Tokenizer, target: Tokenizer) -> dict[int, int]:
    """Tokens without bytes that mean the same in both tokenizers."""
    pairs = {
        source.bos_id: target.bos_id,
        source.end_of_turn_id: target.end_of_turn_id,
        source.eos_id: target.eos_id,
    }
    return {id: other for id, other in pairs.items() if None not in (id, other)}


def build(
    base: Tokenizer,
    value: Tokenizer,
    how: str = "pieces",
    texts: list[str] | None = None,
    align: Callable = align_all,
) -> VocabMap:
    """A map by one of HOWS; all but "pieces" need texts.

    UsageError where a tokenizer cannot spell every byte.
    """
    about = how, describe_tokenizer(base), describe_tokenizer(value)
    if how == "pieces":
        weight = np.ones(base.vocab_size, dtype=np.float32)
        spelled, spelled_back = spell_out(base, value), spell_out(value, base)
        return VocabMap(*about, spelled, weight, spelled_back, base, value)
    if not texts:
        raise UsageError(f"--how {how} counts in texts, and there are none")
    pairs, weights = count_pairs(texts, base, value, how, align)
    if how == "paper":
        weights = normalise(pairs, weights, base.vocab_size, value.vocab_size)
    target, weight = strongest(pairs, weights, base.vocab_size)
    if how != "paper":
        weight = (target >= 0).astype(np.float32)
    value_tokens = [(token,) if token >= 0 else () for token in target.tolist()]
    return VocabMap(*about, value_tokens, weight, [], base, value)


def overlap(
    texts: list[str], base: Tokenizer, value: Tokenizer, spelled: list[tuple[int, ...]]
) -> float:
    """How much of a text's value tokens its base tokens give through a map, as a mean over texts.

    Both are multisets: the size of their intersection over the number of value tokens. BOS counts
    on neither side. The paper reports 0.42 for its map, on its training texts, and does not define
    it.
    """
    shares = []
    for text in texts:
        golden = Counter(value.encode(text))
        mapped = Counter(itertools.chain.from_iterable(spelled[id] for id in base.encode(text)))
        shares.append((golden & mapped).total() / golden.total())
    return sum(shares) / len(shares)


# --------------------------------------------------------------------------------------------------
# 3. The map that needs no data


class Speller:
    """Which tokens a tokenizer has for any bytes, also such as are no text.

    They are joined by the merges that its encode would make.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # of a token's bytes: how early it is merged, and its id
        self.rank: dict[bytes, tuple[float, int]] = {}
        # tokens of one byte, for bytes that are part of no longer token
        self.single: dict[int, int] = {}
        for id in range(tokenizer.vocab_size):
            token, rank = tokenizer.token_bytes(id), tokenizer.merge_rank(id)
            if tokenizer.is_byte(id):
                self.single[token[0]] = id
            if rank is not None:
                self.rank[token] = rank, id
        # SmolLM2 lacks some control characters, say
        self.missing = set(range(256)) - self.single.keys()
        printable = self.missing & set(range(32, 127))
        if printable:
            raise UsageError(
                f"a tokenizer without a token for the byte {min(self.missing)}; it cannot spell "
                "every text"
            )

    def __call__(self, piece: bytes) -> list[int]:
        """The tokens of a piece; none where it has no token for one of the bytes."""
        if self.missing & set(piece):
            return []
        if not self.tokenizer.byte_level:
            # The characters of a piece; bytes that are none stand alone.
            text = piece.decode(errors="surrogateescape")
            return self.merge([character.encode(errors="surrogateescape") for character in text])
        try:
            return self.tokenizer.encode(piece.decode())  # cut into words first
        except UnicodeDecodeError:
            return self.merge([bytes([byte]) for byte in piece])

    def merge(self, parts: list[bytes]) -> list[int]:
        """Byte-pair encoding.

        While two neighbours together are a token, join those that rank first, from the left.
        """
        while len(parts) > 1:
            ranks = [self.rank.get(a + b, (np.inf, 0))[0] for a, b in zip(parts, parts[1:])]
            best = min(ranks)
            if best == np.inf:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids = []
        for part in parts:
            if part in self.rank:
                ids.append(self.rank[part][1])
            else:
                ids += [self.single[byte] for byte in part]
        return ids


def spell_out(source: Tokenizer, target: Tokenizer) -> list[tuple[int, ...]]:
    """For every token of a tokenizer the tokens that the other has for its bytes; () if special.

    Beginning and end of a text, and of a turn, are mapped by hand: they have no bytes.
    """
    speller = Speller(target)
    spelled: list[tuple[int, ...]] = []
    for id in range(source.vocab_size):
        piece = source.token_bytes(id)
        if not source.byte_level and source.is_byte(id) and piece[0] in speller.single:
            # a byte remains a byte, though there may be a longer token for it, too
            spelled.append((speller.single[piece[0]],))
        elif not piece or id == source.unknown_id:
            spelled.append(())
        else:
            spelled.append(tuple(speller(piece)))
    for id, other in by_hand(source, target).items():
        spelled[id] = (other,)
    return spelled


# --------------------------------------------------------------------------------------------------


def main():
    from run.arguments import vocab_map_arguments  # here and not at the top: run/ imports this file
    from run.twins import choose_alignment

    args = vocab_map_arguments()
    base, value = load_tokenizer(args.base_tokenizer), load_tokenizer(args.value_tokenizer)
    texts, held_out = [read_texts(file) if file else [] for file in (args.texts, args.eval)]
    started = time.monotonic()
    align = choose_alignment(args, base, value) if args.how in ("paper", "dtw") else align_all
    vocab_map = build(base, value, args.how, texts, align)
    print(f"made in {time.monotonic() - started:.1f} s", flush=True)
    reached = set(itertools.chain.from_iterable(vocab_map.value_tokens))
    print(
        f"{sum(map(bool, vocab_map.value_tokens))} of {base.vocab_size} base tokens are mapped, "
        f"to {len(reached)} of {value.vocab_size} value tokens"
    )
    if vocab_map.base_tokens:
        several = sum(len(tokens) > 1 for tokens in vocab_map.base_tokens)
        print(f"{several} value tokens take several base tokens")
    vocab_map.save(args.out)
    print(f"saved {args.out}")
    ways = {"overlap": vocab_map.value_tokens}
    if args.how == "pieces":
        ways = {"first piece alone": [tokens[:1] for tokens in vocab_map.value_tokens]} | ways
    for name, spelled in ways.items():
        shown = ["-", "-"]
        for place, some in enumerate((texts, held_out)):
            if some:
                shown[place] = f"{overlap(some, base, value, spelled):.3f}"
        print(f"{name}: texts {shown[0]} held-out {shown[1]}")


if __name__ == "__main__":
    from run.cli import run_cli

    run_cli(main)
