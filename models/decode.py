"""From a transport plan to a hard alignment: the monotone alignment of maximum expected accuracy (MEA).

MEA maximises the sum of P_ij over aligned pairs (i, j) that rise in both sequences, at no cost for gaps (Holmes and
Durbin 1998, doi:10.1089/cmb.1998.5.493). The table's row i + 1 needs only row i:

    T[i+1, j+1] = max(T[i, j+1], T[i+1, j], T[i, j] + P_ij)

so rows are computed for the whole batch at once, and the maximum over T[i+1, j] is a running maximum along the row.

A transport plan knows no order and no gaps. `align` therefore takes its values for the weights of matches in a pair
HMM with affine gaps (Durbin et al. 1998, chapter 4) and finds the MEA of that model's posterior: of all monotone
alignments, each weighted by the product of its matches' and gaps' weights, the share that contains a pair.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32

NO_MATCH = -1
_LARGEST = 1e250  # of a row's weights: leaves room for 1,280 nats less, and for a row's sum


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Log-weights of the pair HMM, in nats: `sharpness * log P + match` for a match, `-opening` for a gap.

    Each residue of a gap thereby costs half a `match`: written so, prefixes of one row weigh nearly the same, and none
    underflows. The values were chosen on validation families (docs/aligner.md).
    """

    sharpness: float = 1.0
    match: float = 3.3
    opening: float = 4.4

    def __post_init__(self):
        if self.sharpness <= 0 or self.opening < 0:
            raise ValueError(f"{self}: sharpness must be above 0, opening at least 0")


def align(
    plan: Float[np.ndarray, "x_length y_length"], gaps: Gaps = Gaps()
) -> tuple[Int32[np.ndarray, "aligned 2"], Float32[np.ndarray, " aligned"]]:
    """Aligned pairs (i, j) in order and their posteriors, from one plan over residues (no dustbin, no padding).

    Raises:
      ValueError: a value is negative, NaN or infinite.
    """
    x_length, y_length = plan.shape
    return mea(posterior(plan[None], np.array([x_length]), np.array([y_length]), gaps)[0])


def align_batch(
    plans: Float[np.ndarray, "batch x_padded y_padded"],
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
    gaps: Gaps = Gaps(),
) -> tuple[Int32[np.ndarray, "batch x_padded"], Float32[np.ndarray, "batch x_padded"]]:
    """The column matched with each row, or -1, and the posterior there, or 0. Otherwise as `mea_batch`."""
    return mea_batch(posterior(plans, x_lengths, y_lengths, gaps), x_lengths, y_lengths)


def posterior(
    plans: Float[np.ndarray, "batch x_padded y_padded"],
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
    gaps: Gaps = Gaps(),
) -> Float64[np.ndarray, "batch x_padded y_padded"]:
    """For every pair of residues the probability that it is aligned; 0 beyond the lengths.

    Raises:
      ValueError: a length does not fit the padded plan; a value within the lengths is negative, NaN or infinite.
    """
    weights = math.exp(gaps.match) * _residues_only(plans, x_lengths, y_lengths).astype(np.float64) ** gaps.sharpness
    batch, rows, columns = weights.shape
    before, log_before, log_total = _forward(
        weights, np.zeros((batch, 2), int), np.stack([x_lengths, y_lengths], 1), gaps
    )
    # Backwards, x and y change places: of neighbouring gaps, that in x comes first either way.
    turned = weights[:, ::-1, ::-1].swapaxes(1, 2)
    starts = np.stack([columns - y_lengths, rows - x_lengths], 1)
    after, log_after, _ = _forward(turned, starts, np.full((batch, 2), (columns, rows)), gaps)
    after, log_after = after.swapaxes(1, 2)[:, ::-1, ::-1], log_after[:, ::-1]
    with np.errstate(divide="ignore"):
        logs = np.log(before) + np.log(weights) + np.log(after)
    scale = log_before[:, :, None] + log_after[:, None, :] - log_total[:, None, None]
    return np.exp(np.minimum(logs + scale, 0))


def _forward(
    weights: Float64[np.ndarray, "batch rows columns"],
    start: Int[np.ndarray, "batch 2"],
    end: Int[np.ndarray, "batch 2"],
    gaps: Gaps,
) -> tuple[Float64[np.ndarray, "batch rows columns"], Float64[np.ndarray, "batch rows"], Float64[np.ndarray, " batch"]]:
    """Weight of all alignments of what comes before each pair, divided by a factor a row; its logarithm; and the
    logarithm of the weight of all that lead from node `start` to node `end`.
    """
    batch, rows, columns = weights.shape
    opened = math.exp(-gaps.opening)
    before, log_scale, log_total = np.empty_like(weights), np.empty((batch, rows)), np.full(batch, -np.inf)
    matched, x_alone = np.zeros((2, batch, columns + 1))
    y_alone, scale = np.zeros((batch, columns + 1)), np.zeros(batch)
    for i in range(rows + 1):
        # A gap in y may follow one in x, not the other way round: their order means nothing and counts once.
        x_alone = opened * (matched + y_alone) + x_alone
        if i:
            matched[:, 0], matched[:, 1:] = 0, before[:, i - 1] * weights[:, i - 1]
        here = np.flatnonzero(start[:, 0] == i)
        matched[here, start[here, 1]] = 1
        y_alone[:, 1:] = opened * np.cumsum(matched[:, :-1], axis=1)
        total = matched + x_alone + y_alone
        largest = total.max(axis=1)
        factor = np.where(largest > 0, largest / _LARGEST, 1)
        matched, x_alone, y_alone, total = (state / factor[:, None] for state in (matched, x_alone, y_alone, total))
        scale = scale + np.log(factor)
        there = np.flatnonzero(end[:, 0] == i)
        with np.errstate(divide="ignore"):
            log_total[there] = np.log(total[there, end[there, 1]]) + scale[there]
        if i < rows:
            before[:, i], log_scale[:, i] = total[:, :-1], scale
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
    batch, rows, columns = plans.shape
    best = np.zeros((batch, columns + 1))
    # Per row and column: the column at which the best path enters the row, and whether it does so by a match.
    enters = np.empty((rows, batch, columns + 1), np.int32)
    matches = np.zeros((rows, batch, columns + 1), bool)
    for i in range(rows):
        best, enters[i], matches[i, :, 1:] = _next_row(best, plans[:, i])

    match = np.full((batch, rows), NO_MATCH, np.int32)
    examples, column = np.arange(batch), np.full(batch, columns)
    for i in reversed(range(rows)):
        column = enters[i, examples, column]
        matched = matches[i, examples, column]
        match[:, i] = np.where(matched, column - 1, NO_MATCH)
        column = column - matched
    confidence = np.take_along_axis(plans, np.maximum(match, 0)[..., None], axis=2)[..., 0]
    return match, np.where(match != NO_MATCH, confidence, 0).astype(np.float32)


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
