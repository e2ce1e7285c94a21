"""Algorithm 1's alignment, fast: the same paths as vocab_map.align_all, which is a loop.

    python vocab_map.py --fast --base-tokenizer A --value-tokenizer B --how paper --texts FILE --out map.safetensors

The library rapidfuzz measures the distance of two pieces, once a text. A text's table is filled
by anti-diagonals, whose cells do not need each other, and many texts stand side by side. Costs are
added in the loop's order, in float64: ties fall the same way, as tests/test_vocab_map.py says.
"""

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

WIDTH = 2**13  # cells on a long anti-diagonal of a batch: few enough for the cache


def align_all(base: list[list[bytes]], value: list[list[bytes]]) -> list[list[tuple[int, int]]]:
    """A path for each text: pairs (index into base, index into value), from (0, 0) to both ends."""
    order = sorted(range(len(base)), key=lambda text: (len(value[text]), len(base[text])))
    paths = {}
    # The longest texts first, with as many of like length as fill an anti-diagonal.
    while order:
        size = max(1, WIDTH // len(value[order[-1]]))
        batch, order = order[-size:], order[:-size]
        batch_paths = align_batch([base[text] for text in batch], [value[text] for text in batch])
        paths.update(zip(batch, batch_paths))
    return [paths[text] for text in range(len(base))]


def align_batch(base: list[list[bytes]], value: list[list[bytes]]) -> list[list[tuple[int, int]]]:
    """The paths of B texts at once."""
    is_diagonal, is_up = warp(*cost_table(base, value))  # (diagonals, rows, B)
    paths = []
    for text in range(len(base)):
        last = len(value[text]) - 1, len(base[text]) - 1
        paths.append(walk_back(is_diagonal[:, :, text], is_up[:, :, text], *last))
    return paths


# --------------------------------------------------------------------------------------------------
# Line 6: what it costs to align two pieces


def cost_table(
    base: list[list[bytes]], value: list[list[bytes]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The costs of each text's distinct pairs of pieces, text after text, and where to find them.

    Value piece i and base piece j of a text cost costs[row[i, text] + column[j, text]]. Beyond the
    end of a shorter text that is some other pair's cost; no way leads back from there.
    """
    row = np.zeros((max(map(len, value)), len(value)), dtype=np.intp)  # (rows, B)
    column = np.zeros((max(map(len, base)), len(base)), dtype=np.intp)  # (columns, B)
    tables, start = [], 0
    for text in range(len(base)):
        value_pieces, value_index = distinct(value[text])
        base_pieces, base_index = distinct(base[text])
        row[: len(value_index), text] = start + value_index * len(base_pieces)
        column[: len(base_index), text] = base_index
        tables.append(piece_costs(value_pieces, base_pieces).ravel())
        start += len(tables[-1])
    return row, column, np.concatenate(tables)


def distinct(pieces: list[bytes]) -> tuple[list[bytes], np.ndarray]:
    """The pieces without repetition, and where among them each one of the text is: (pieces,)."""
    place: dict[bytes, int] = {}
    index = [place.setdefault(piece, len(place)) for piece in pieces]
    return list(place), np.array(index)


def piece_costs(value: list[bytes], base: list[bytes]) -> np.ndarray:
    """vocab_map.piece_cost of each value piece with each base piece: (value, base)."""
    costs = cdist(value, base, scorer=Levenshtein.distance, dtype=np.float64)
    longer_by = np.abs(np.subtract.outer(list(map(len, value)), list(map(len, base))))
    # Where one contains the other, the distance is what it is longer by; few pairs are to be tried.
    for i, j in np.argwhere(costs == longer_by).tolist():
        if value[i] in base[j] or base[j] in value[i]:
            costs[i, j] *= 0.1
    return costs


# --------------------------------------------------------------------------------------------------
# Line 7: dynamic time warping


def warp(row: np.ndarray, column: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Does the cheapest way into a cell come diagonally? If not, from above? (diagonals, rows, B).

    The cell of value piece i and base piece j is in row i, on anti-diagonal i + j.
    """
    rows, B = row.shape
    columns = len(column)
    backwards = column[::-1].copy()  # along an anti-diagonal j falls as i grows
    is_diagonal = np.empty((rows + columns - 1, rows, B), dtype=bool)
    is_up = np.empty_like(is_diagonal)
    # Totals of three anti-diagonals. Row i stands at i + 1; outside of the table all is infinite.
    now, before, earlier = [np.full((rows + 1, B), np.inf) for _ in range(3)]
    for diagonal in range(rows + columns - 1):
        # Only these rows have a cell here: above them j is too large, below them it is negative.
        first, end = max(0, diagonal - columns + 1), min(diagonal + 1, rows)
        # What each cell costs by itself. Base piece diagonal - i stands at i + shift of backwards.
        shift = columns - 1 - diagonal
        cost = costs[row[first:end] + backwards[first + shift : end + shift]]  # (cells, B)
        # Three ways lead into a cell, all from anti-diagonals that are done.
        corner, up, left = earlier[first:end], before[first:end], before[first + 1 : end + 1]
        # The cheapest; of equals the diagonal one, then that from above, as in the loop.
        best = np.minimum(up, left)
        is_diagonal[diagonal, first:end] = corner <= best
        is_up[diagonal, first:end] = up <= left
        best = np.minimum(corner, best)
        if diagonal == 0:
            best[:] = 0.0  # nothing comes before the first cell
        now[first + 1 : end + 1] = cost + best
        # The next overwrites the oldest, of which nothing remains where it will be read.
        now, before, earlier = earlier, now, before
    return is_diagonal, is_up


def walk_back(
    is_diagonal: np.ndarray, is_up: np.ndarray, row: int, column: int
) -> list[tuple[int, int]]:
    """One text's path into its last cell, by warp's answers (diagonals, rows)."""
    path = [(column, row)]
    while row > 0 or column > 0:
        cell = row + column, row
        if is_diagonal[cell]:
            row, column = row - 1, column - 1
        elif is_up[cell]:
            row -= 1
        else:
            column -= 1
        path.append((column, row))
    return path[::-1]
