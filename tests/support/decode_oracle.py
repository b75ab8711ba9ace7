"""The decoder in NumPy and float64, row by row: the oracle of alignment/decoding.py and models/pair_hmm.py.

Rows are spread to all columns of the plan, so that nothing here depends on how windows lie.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32

from alignment.decoding import NO_MATCH, Gaps

_USUAL = Gaps()
_LARGEST = 1e250  # of a row's weights: leaves room for 1,280 nats less, and for a row's sum


def posterior(
    plans: Float[np.ndarray, "batch x_padded y_padded"],
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
    gaps: Gaps = _USUAL,
) -> Float64[np.ndarray, "batch x_padded y_padded"]:
    """For every pair of residues the probability that it is aligned; 0 beyond the lengths.

    Raises:
      ValueError: a length does not fit the padded plan; a value within the lengths is negative, NaN or infinite.
    """
    plans = _residues_only(plans, x_lengths, y_lengths)
    return posterior_in_windows(plans, Windows.whole(plans.shape), x_lengths, y_lengths, gaps)


def posterior_in_windows(
    plans: Float[np.ndarray, "batch rows width"],
    windows: "Windows",
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
    gaps: Gaps = _USUAL,
) -> Float64[np.ndarray, "batch rows width"]:
    """`posterior` of plans held by windows, in the same windows; the plans are 0 beyond the lengths."""
    weights = math.exp(gaps.match) * plans.astype(np.float64) ** gaps.sharpness
    batch, rows, _ = weights.shape
    origin, lengths, size = np.zeros((batch, 2), int), np.stack([x_lengths, y_lengths], 1), (rows, windows.columns)
    before, log_before, log_total = _forward(weights, windows, origin, lengths, gaps)
    after, log_after, _ = _forward(
        weights[:, ::-1, ::-1], windows.turned(), size - lengths, np.full((batch, 2), size), gaps
    )
    after, log_after = after[:, ::-1, ::-1], log_after[:, ::-1]
    with np.errstate(divide="ignore"):
        logs = np.log(before) + np.log(weights) + np.log(after)
    scale = log_before + log_after - log_total[:, None]
    return np.exp(np.minimum(logs + scale[:, :, None], 0))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of plans: `width` from `first` on in each row. Only there can residues be matched.

    first: at least 0, rises from row to row or stays; windows may reach beyond the `columns`, where plans are 0.
    """

    first: Int[np.ndarray, "batch rows"]
    width: int
    columns: int

    @classmethod
    def whole(cls, shape: tuple[int, int, int]) -> "Windows":
        """All columns of plans of this shape."""
        return cls(np.zeros(shape[:2], int), shape[2], shape[2])

    def turned(self) -> "Windows":
        """Return the windows of the plans with rows and columns in reverse order."""
        return Windows(self.columns - self.width - self.first[:, ::-1], self.width, self.columns)

    def spread(self, row: int, held: np.ndarray) -> Float[np.ndarray, "batch columns"]:
        """A whole row from what its windows hold."""
        if self.width == self.columns and not self.first[:, row].any():
            return held
        whole = np.zeros((len(held), self.columns + 2 * self.width), held.dtype)
        np.put_along_axis(whole, self._place(row), held, axis=1)
        return whole[:, self.width : self.width + self.columns]

    def cut(self, row: int, whole: np.ndarray) -> np.ndarray:
        """Cut out what the windows hold of a whole row; anything beyond its ends."""
        if self.width == self.columns and not self.first[:, row].any():
            return whole
        place = np.clip(self._place(row) - self.width, 0, self.columns - 1)
        return np.take_along_axis(whole, place, axis=1)

    def _place(self, row: int) -> Int[np.ndarray, "batch width"]:
        return self.first[:, row, None] + np.arange(self.width, 2 * self.width)


def _forward(
    weights: Float64[np.ndarray, "batch rows width"],
    windows: Windows,
    start: Int[np.ndarray, "batch 2"],
    end: Int[np.ndarray, "batch 2"],
    gaps: Gaps,
) -> tuple[Float64[np.ndarray, "batch rows width"], Float64[np.ndarray, "batch rows"], Float64[np.ndarray, " batch"]]:
    """Compute scaled prefix weights, the log scale of each row, and the log partition function.

    A prefix weight sums over all alignments of the residues before a pair. The partition function sums over all paths
    from node `start` to node `end`.
    """
    batch, rows, _ = weights.shape
    opened, overhang = math.exp(-gaps.opening), math.exp(-gaps.terminal)
    before, log_scale, log_total = np.empty_like(weights), np.empty((batch, rows)), np.full(batch, -np.inf)
    matched, x_alone = np.zeros((2, batch, windows.columns + 1))
    y_alone, scale = np.zeros((batch, windows.columns + 1)), np.zeros(batch)
    for i in range(rows + 1):
        # A gap in x may follow one in y, not the other way round: their order means nothing and counts once.
        at_start = start[:, :1] == i - 1
        x_alone = np.where(at_start, overhang, opened) * (matched + y_alone) + x_alone
        if i:
            matched[:, 0], matched[:, 1:] = 0, windows.spread(i - 1, before[:, i - 1] * weights[:, i - 1])
        here = np.flatnonzero(start[:, 0] == i)
        matched[here, start[here, 1]] = 1
        y_alone[:, 1:] = np.where(start[:, :1] == i, overhang, opened) * np.cumsum(matched[:, :-1], axis=1)
        total = matched + x_alone + y_alone
        largest = total.max(axis=1)
        factor = np.where(largest > 0, largest / _LARGEST, 1)
        matched, x_alone, y_alone, total = (state / factor[:, None] for state in (matched, x_alone, y_alone, total))
        scale = scale + np.log(factor)
        # Every alignment ends with a match, or at its start, and an overhang of either sequence behind it.
        overhangs = (np.arange(windows.columns + 1) < end[:, 1:]) + (i < end[:, :1]).astype(int)
        inside = (np.arange(windows.columns + 1) <= end[:, 1:]) & (i <= end[:, :1])
        with np.errstate(divide="ignore"):
            ended = np.log((inside * matched * overhang**overhangs).sum(axis=1))
        log_total = np.logaddexp(log_total, ended + scale)
        if i < rows:
            before[:, i], log_scale[:, i] = windows.cut(i, total[:, :-1]), scale
    return before, log_scale, log_total


def mea(
    plan: Float[np.ndarray, "x_length y_length"],
) -> tuple[Int32[np.ndarray, "aligned 2"], Float32[np.ndarray, " aligned"]]:
    """Aligned pairs (i, j) in order and their plan values, from one plan over residues (no dustbin, no padding).

    Raises:
      ValueError: a value is negative, NaN or infinite.
    """
    x_length, y_length = plan.shape
    match, confidence = mea_batch(plan[None], np.array([x_length]), np.array([y_length]))
    rows = np.flatnonzero(match[0] != NO_MATCH)
    return np.stack([rows, match[0, rows]], axis=1).astype(np.int32), confidence[0, rows]


def mea_batch(
    plans: Float[np.ndarray, "batch x_padded y_padded"],
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
) -> tuple[Int32[np.ndarray, "batch x_padded"], Float32[np.ndarray, "batch x_padded"]]:
    """The column matched with each row, or -1, and the plan's value there, or 0.

    Whatever lies beyond the lengths (padding, dustbin) is ignored. Cells where the plan is 0, as outside the band,
    are never matched.

    Raises:
      ValueError: a length does not fit the padded plan; a value within the lengths is negative, NaN or infinite.
    """
    plans = _residues_only(plans, x_lengths, y_lengths)
    return mea_in_windows(plans, Windows.whole(plans.shape))


def mea_in_windows(
    plans: Float[np.ndarray, "batch rows width"], windows: Windows
) -> tuple[Int32[np.ndarray, "batch rows"], Float32[np.ndarray, "batch rows"]]:
    """`mea_batch` of plans held by windows; the plans are 0 beyond the lengths."""
    batch, rows, width = plans.shape
    best = np.zeros((batch, windows.columns + 1))
    # By the column of a window: the column at which the best path enters the row, and whether it does so by a match.
    enters = np.empty((rows, batch, width), np.int32)
    matches = np.zeros((rows, batch, width), bool)
    for i in range(rows):
        best, entered, matched = _next_row(best, windows.spread(i, plans[:, i]))
        enters[i], matches[i] = windows.cut(i, entered[:, 1:]), windows.cut(i, matched)

    match = np.full((batch, rows), NO_MATCH, np.int32)
    confidence = np.zeros((batch, rows), np.float32)
    examples, column = np.arange(batch), np.full(batch, windows.columns)
    for i in reversed(range(rows)):
        # Right of its window a row gains nothing more, nor do those above it; left of it the path comes from above.
        held = np.minimum(column - windows.first[:, i], width) - 1
        inside, held = held >= 0, np.maximum(held, 0)
        column = np.where(inside, enters[i, examples, held], column)
        held = column - windows.first[:, i] - 1
        matched = inside & (held >= 0) & matches[i, examples, np.maximum(held, 0)]
        column = column - matched
        match[:, i] = np.where(matched, column, NO_MATCH)
        confidence[:, i] = np.where(matched, plans[examples, i, np.maximum(held, 0)], 0)
    return match, confidence


def _next_row(best: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    paired = best[:, :-1] + gain
    matched = (gain > 0) & (paired >= best[:, 1:])
    entry = best.copy()
    np.copyto(entry[:, 1:], paired, where=matched)
    row = np.maximum.accumulate(entry, axis=1)
    here = np.where(entry == row, np.arange(entry.shape[1], dtype=np.int32), np.int32(0))
    return row, np.maximum.accumulate(here, axis=1), matched


def _residues_only(plans: np.ndarray, x_lengths: np.ndarray, y_lengths: np.ndarray) -> np.ndarray:
    for name, lengths, padded in (("x_lengths", x_lengths, plans.shape[1]), ("y_lengths", y_lengths, plans.shape[2])):
        if lengths.size and (lengths.min() < 0 or lengths.max() > padded):
            raise ValueError(f"{name}: {lengths.min()}..{lengths.max()} were given, the plan allows 0..{padded}")
    real_rows = np.arange(plans.shape[1]) < x_lengths[:, None]
    real_columns = np.arange(plans.shape[2]) < y_lengths[:, None]
    plans = np.where(real_rows[:, :, None] & real_columns[:, None, :], plans, 0)
    if not (np.isfinite(plans).all() and (plans >= 0).all()):
        raise ValueError("plans: a value is negative, NaN or infinite; a transport plan is finite and not negative")
    return plans
