"""From a transport plan to a hard alignment: the monotone alignment of maximum expected accuracy (MEA).

MEA maximises the sum of P_ij over aligned pairs (i, j) that rise in both sequences, at no cost for gaps (Holmes and
Durbin 1998, doi:10.1089/cmb.1998.5.493). The table's row i + 1 needs only row i:

    T[i+1, j+1] = max(T[i, j+1], T[i+1, j], T[i, j] + P_ij)

so rows are computed for the whole batch at once, and the maximum over T[i+1, j] is a running maximum along the row.
"""

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

NO_MATCH = -1


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
