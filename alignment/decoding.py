"""From a transport plan to a hard alignment: the monotone alignment of maximum expected accuracy (MEA).

MEA maximises the sum of P_ij over aligned pairs (i, j) that rise in both sequences, at no cost for gaps (Holmes and
Durbin 1998, doi:10.1089/cmb.1998.5.493). The table's row i + 1 needs only row i:

    T[i+1, j+1] = max(T[i, j+1], T[i+1, j], T[i, j] + P_ij)

so rows are computed for the whole batch at once, and the maximum over T[i+1, j] is a running maximum along the row.

A transport plan knows no order and no gaps. `posterior` therefore takes its values for the weights of matches in a pair
HMM (models/pair_hmm.py). What is aligned is the MEA of that.

Plans are held by windows, `values[n, i, c]` is P_ij for j = first[n, i] + c, as models/pair_hmm.py describes. All is
computed where the plan is; a few numbers for each residue are what a host has to fetch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from models import pair_hmm

NO_MATCH = -1
_MATCHED, _ENTERED = 1, 2  # bits of a cell of the MEA's table


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Log-weights of the pair HMM, in nats: `sharpness * log P + match` for a match, `-opening` for a gap.

    Each residue of a gap thereby costs half a `match`. The values were chosen on validation families
    (docs/aligner.md).
    """

    sharpness: float = 1.0
    match: float = 3.3
    opening: float = 4.4

    def __post_init__(self):
        if self.sharpness <= 0 or self.opening < 0:
            raise ValueError(f"{self}: sharpness must be above 0, opening at least 0")

    def numbers(self) -> Float32[np.ndarray, "3"]:
        """Return sharpness, match and opening in one array."""
        return np.array([self.sharpness, self.match, self.opening], np.float32)


class Decoded(NamedTuple):
    """Hard alignments of a batch, residue by residue; NO_MATCH or 0 beyond the lengths."""

    match: Int[Array, "batch rows"]  # column of y that each row of x is aligned with, or NO_MATCH
    confidence: Float[Array, "batch rows"]  # the plan's value there, or 0
    x_alone: Float[Array, "batch rows"]  # 1 minus the sum of the row, or 0
    y_alone: Float[Array, "batch columns"]


def posterior(
    plans: Float[Array, "batch rows width"],
    first: Int[Array, "batch rows"] | None,
    x_lengths: Int[Array, " batch"],
    y_lengths: Int[Array, " batch"],
    gaps: Float[Array, "3"],
    columns: int,
) -> Float[Array, "batch rows width"]:
    """Compute the probability that each pair of residues is aligned, in the plans' windows.

    Args:
      plans: 0 beyond the lengths.
      first: as `pair_hmm.rising` makes them, or None if each row holds all columns.
      gaps: sharpness, match and opening.
      columns: padded length of y.
    """
    sharpness, match, opening = gaps
    possible = plans > 0
    log_weight = sharpness * jnp.log(jnp.where(possible, plans, 1)) + match
    log_weight = jnp.where(possible, log_weight, pair_hmm.LOG_ZERO)
    return pair_hmm.posterior(log_weight, first, x_lengths, y_lengths, opening, columns)


def mea(
    plans: Float[Array, "batch rows width"],
    first: Int[Array, "batch rows"] | None,
    y_lengths: Int[Array, " batch"],
) -> Int[Array, "batch rows"]:
    """Find the column matched with each row, or NO_MATCH. Cells where the plan is 0 are never matched.

    The table holds integers, each row from its window's first node on: float32 would round sums of long alignments and
    thereby lose small values, and it would decide ties by chance.
    """
    batch, rows, width = plans.shape
    windows = jnp.zeros((batch, rows), jnp.int32) if first is None else first
    # A power of two: equal sums stay equal. No sum, of as many matches as fit the window, reaches 2^30.
    _, exponent = jnp.frexp(plans.max(axis=(1, 2), keepdims=True))
    gains = jnp.round(jnp.ldexp(plans, 30 - min(rows, width).bit_length() - exponent)).astype(jnp.int32)

    def next_row(best, row):
        gain, possible, by = row
        best = best if first is None else pair_hmm.shifted(best, by)
        best = best - best[:, :1]
        matched = possible & (best[:, :-1] + gain >= best[:, 1:])
        entry = jnp.where(matched, best[:, :-1] + gain, best[:, 1:])
        # Left of the window nothing is gained, hence nothing is higher than the window's first node, which is 0.
        best = jax.lax.associative_scan(jnp.maximum, entry, axis=1)
        bits = matched * _MATCHED + (entry == best) * _ENTERED
        return jnp.pad(best, ((0, 0), (1, 0))), bits.astype(jnp.uint8)

    by = jnp.diff(windows, axis=1, prepend=windows[:, :1])
    per_row = gains.swapaxes(0, 1), (plans > 0).swapaxes(0, 1), by.T
    _, bits = jax.lax.scan(next_row, jnp.zeros((batch, width + 1), jnp.int32), per_row)
    return _trace(bits, windows, y_lengths)


def _trace(
    bits: UInt8[Array, "rows batch width"], first: Int[Array, "batch rows"], y_lengths: Int[Array, " batch"]
) -> Int[Array, "batch rows"]:
    """Follow the best path from the ends of both sequences back."""
    place = jnp.arange(bits.shape[2])

    def row_above(column, row):
        bits, first = row
        # The path enters the row at the last such cell that is not right of where it leaves it; left of the window it
        # comes from above.
        entered = (bits & _ENTERED > 0) & (place < (column - first)[:, None])
        cell = jnp.where(entered, 2 * place + (bits & _MATCHED), -1).max(axis=1)
        matched = (cell >= 0) & (cell % 2 == _MATCHED)
        column = jnp.where(cell >= 0, first + cell // 2 + 1 - matched, column)
        return column, jnp.where(matched, column, NO_MATCH)

    _, match = jax.lax.scan(row_above, y_lengths.astype(jnp.int32), (bits, first.T), reverse=True)
    return match.T


def decoded(
    plans: Float[Array, "batch rows width"],
    first: Int[Array, "batch rows"],
    x_lengths: Int[Array, " batch"],
    y_lengths: Int[Array, " batch"],
    columns: int,
) -> Decoded:
    """Align by the MEA of plans or posteriors, and sum up what each residue has beside its match."""
    match = mea(plans, first, y_lengths)
    held = jnp.where(match == NO_MATCH, 0, match - first)
    confidence = jnp.where(match == NO_MATCH, 0, jnp.take_along_axis(plans, held[:, :, None], axis=2)[:, :, 0])
    place = first[:, :, None] + jnp.arange(plans.shape[2])
    y_mass = jax.vmap(lambda values, place: jnp.zeros(columns).at[place].add(values, mode="drop"))(plans, place)
    alone = (
        jnp.where(jnp.arange(mass.shape[1]) < lengths[:, None], jnp.clip(1 - mass, 0, 1), 0)
        for mass, lengths in ((plans.sum(axis=2), x_lengths), (y_mass, y_lengths))
    )
    return Decoded(match, confidence, *alone)


def decode_dense(
    plans: Float[np.ndarray, "batch x_padded y_padded"],
    x_lengths: Int[np.ndarray, " batch"],
    y_lengths: Int[np.ndarray, " batch"],
    gaps: Float[np.ndarray, "3"] | None,
) -> tuple[Float32[np.ndarray, "batch x_padded y_padded"], Int32[np.ndarray, "batch x_padded"]]:
    """Compute posteriors of dense plans and the columns that they match with each row; without `gaps` of the plans.

    Whatever lies beyond the lengths (padding, dustbin) is ignored.

    Raises:
      ValueError: a length does not fit the padded plan; a value within the lengths is negative, NaN or infinite.
    """
    plans = _residues_only(plans, x_lengths, y_lengths)
    return jax.device_get(_dense(plans, x_lengths, y_lengths, gaps))


@jax.jit
def _dense(plans, x_lengths, y_lengths, gaps):
    if gaps is not None:
        plans = posterior(plans, None, x_lengths, y_lengths, gaps, plans.shape[2])
    return plans, mea(plans, None, y_lengths)


def _residues_only(plans: np.ndarray, x_lengths: np.ndarray, y_lengths: np.ndarray) -> np.ndarray:
    for name, lengths, padded in (("x_lengths", x_lengths, plans.shape[1]), ("y_lengths", y_lengths, plans.shape[2])):
        if lengths.size and (lengths.min() < 0 or lengths.max() > padded):
            raise ValueError(f"{name}: {lengths.min()}..{lengths.max()} were given, the plan allows 0..{padded}")
    real_rows = np.arange(plans.shape[1]) < x_lengths[:, None]
    real_columns = np.arange(plans.shape[2]) < y_lengths[:, None]
    plans = np.where(real_rows[:, :, None] & real_columns[:, None, :], plans, 0).astype(np.float32)
    if not (np.isfinite(plans).all() and (plans >= 0).all()):
        raise ValueError("plans: a value is negative, NaN or infinite; a transport plan is finite and not negative")
    return plans
