"""The pair HMM with two affine gap states in NumPy and float64: the oracle of models/pair_hmm.py.

Once row by row, by logarithms and without bands, and once by writing down every alignment of a tiny pair.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from models.pair_hmm import Mode

STATES = (0, 1)


class Costs(NamedTuple):
    """Costs of gaps of one pair, in nats."""

    opening: Float[np.ndarray, "2"] = np.array([4.0, 6.5])
    extension: Float[np.ndarray, "2"] = np.array([0.5, 0.05])
    terminal: Float[np.ndarray, ""] = np.array(3.0)
    empty: Float[np.ndarray, ""] = np.array(5.0)
    x_offset: Float[np.ndarray, " rows"] | None = None  # 0 if there is none
    y_offset: Float[np.ndarray, " columns"] | None = None

    def offsets(self, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
        given = self.x_offset, self.y_offset
        return tuple(np.zeros(n) if of is None else of for of, n in zip(given, shape, strict=True))

    def gap(self, length: np.ndarray) -> np.ndarray:
        """Log-weight of a gap, summed over its states; 0 where there is none."""
        states = [-o - (length - 1) * e for o, e in zip(self.opening, self.extension, strict=True)]
        return np.where(length > 0, np.logaddexp(*states), 0.0)

    def overhang(self, length: np.ndarray, mode: Mode) -> np.ndarray:
        if mode == "global":
            return self.gap(length)
        return np.where(length > 0, -self.terminal if mode == "glocal" else 0.0, 0.0)

    def none(self, rows: int, columns: int, mode: Mode) -> float:
        """Log-weight of the empty alignment."""
        if mode == "global":
            return float(self.gap(np.array(rows)) + self.gap(np.array(columns)))
        return float({"glocal": 0.0, "local": 4 * self.terminal}[mode] - self.empty)


class Found(NamedTuple):
    log_partition: float
    posterior: Float64[np.ndarray, "rows columns"]


def forward_backward(weight: Float[np.ndarray, "rows columns"], costs: Costs, mode: Mode = "glocal") -> Found:
    """Sum over all alignments, and compute the probability of each match; minus infinity is no match."""
    weight = weight.astype(np.float64)
    match, total = _forward(weight, costs, mode)
    return Found(total, np.exp(match + _backward(weight, costs, mode) - total))


def log_partition(weight: Float[np.ndarray, "rows columns"], costs: Costs, mode: Mode = "glocal") -> float:
    return _forward(weight.astype(np.float64), costs, mode)[1]


def _forward(weight: Float64[np.ndarray, "rows columns"], costs: Costs, mode: Mode) -> tuple[np.ndarray, float]:
    """Log-weights of the alignments up to each match, and of all."""
    rows, columns = weight.shape
    x_offset, y_offset = costs.offsets(weight.shape)
    j = np.arange(columns)
    matches = np.empty((rows, columns))
    nothing = np.full(columns, -np.inf)
    before, any_state, x_gaps = nothing, nothing, [nothing, nothing]  # of the row above
    for i in range(rows):
        start = costs.overhang(i, mode) + costs.overhang(j, mode)
        match = weight[i] + np.logaddexp(start, _after_one(any_state))
        x_gaps = [np.logaddexp(before - costs.opening[s] - x_offset[i], x_gaps[s] - costs.extension[s]) for s in STATES]
        y_gaps = []
        for s in STATES:
            opened = _after_one(match) - costs.opening[s] - y_offset
            grown = costs.extension[s] * j
            y_gaps.append(np.logaddexp.accumulate(opened + grown) - grown)
        before = np.logaddexp.reduce([match, *y_gaps])  # what a gap in x may follow
        any_state = np.logaddexp.reduce([before, *x_gaps])
        matches[i] = match
    ended = np.logaddexp.reduce(matches + _ends(weight.shape, costs, mode), axis=None)
    return matches, float(np.logaddexp(ended, costs.none(rows, columns, mode)))


def _backward(weight: Float64[np.ndarray, "rows columns"], costs: Costs, mode: Mode) -> np.ndarray:
    """Log-weights of what follows each match."""
    rows, columns = weight.shape
    x_offset, y_offset = costs.offsets(weight.shape)
    ends = _ends(weight.shape, costs, mode)
    j = np.arange(columns)
    after = np.empty((rows, columns))
    nothing = np.full(columns, -np.inf)
    matched_below, x_below = nothing, [nothing, nothing]  # of the row below
    for i in reversed(range(rows)):
        matched = np.append(matched_below[1:], -np.inf)
        x_gaps = [np.logaddexp(matched, x_below[s] - costs.extension[s]) for s in STATES]
        x_opened = nothing
        if i + 1 < rows:
            opened = [x_below[s] - costs.opening[s] - x_offset[i + 1] for s in STATES]
            x_opened = np.logaddexp.reduce(opened)
        or_x = np.logaddexp(matched, x_opened)
        following = [np.logaddexp(ends[i], or_x)]
        for s in STATES:
            grown = costs.extension[s] * (columns - 1 - j)
            y_gap = np.logaddexp.accumulate((or_x + grown)[::-1])[::-1] - grown
            following.append(np.append(y_gap[1:] - costs.opening[s] - y_offset[1:], -np.inf))
        after[i] = np.logaddexp.reduce(following)
        matched_below, x_below = weight[i] + after[i], x_gaps
    return after


def _after_one(row: np.ndarray) -> np.ndarray:
    return np.append(-np.inf, row[:-1])


def _ends(shape: tuple[int, int], costs: Costs, mode: Mode) -> np.ndarray:
    """Log-weights of the overhangs behind each match."""
    x, y = (costs.overhang(n - 1 - np.arange(n), mode) for n in shape)
    return x[:, None] + y


Alignment = tuple[tuple[int, int], ...]


def every_alignment(rows: int, columns: int) -> Iterator[Alignment]:
    """Every set of pairs that rise in both sequences."""

    def go(i: int, j: int) -> Iterator[Alignment]:
        yield ()
        for a in range(i, rows):
            for b in range(j, columns):
                yield from (((a, b), *rest) for rest in go(a + 1, b + 1))

    return go(0, 0)


def log_weight_of(
    alignment: Alignment, weight: Float[np.ndarray, "rows columns"], costs: Costs, mode: Mode = "glocal"
) -> float:
    """Weigh one alignment by the words of models/pair_hmm.py."""
    rows, columns = weight.shape
    if not alignment:
        return costs.none(rows, columns, mode)
    total = sum(float(weight[pair]) for pair in alignment)
    for before, after in itertools.pairwise(alignment):
        for side, offset in enumerate(costs.offsets(weight.shape)):
            length = after[side] - before[side] - 1
            if length:
                total += float(costs.gap(length)) - offset[before[side] + 1]
    first, last = alignment[0], alignment[-1]
    overhangs = (*first, rows - 1 - last[0], columns - 1 - last[1])
    return total + sum(float(costs.overhang(length, mode)) for length in overhangs)
