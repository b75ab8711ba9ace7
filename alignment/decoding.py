"""Decode transport plans: the monotone alignment of maximum expected accuracy (MEA), see docs/math.md, section 9.

MEA maximises the sum of P_ij over aligned pairs (i, j) that rise in both sequences, at no cost for gaps (Holmes and
Durbin 1998, doi:10.1089/cmb.1998.5.493). Row i + 1 of its table needs only row i:

    T[i+1, j+1] = max(T[i, j+1], T[i+1, j], T[i, j] + P_ij)

Rows are therefore computed for the whole batch at once. The maximum over T[i+1, j] is a running maximum along the row.

A transport plan has no order and no gap costs. `posterior` takes its values as match weights of a pair HMM
(models/pair_hmm.py); the MEA alignment of the HMM's posterior is then the result.

Plans are held by windows: `values[n, i, c]` is P_ij for j = first[n, i] + c, as models/pair_hmm.py describes. All is
computed on the device that holds the plan; a host fetches a few numbers for each residue.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from models import pair_hmm

NO_MATCH = -1
USUAL_LENGTH = 256  # residues; few pairs of training are longer
TERMINAL = 2.0  # nats of a gap at an end, at most; chosen on validation families
_MATCHED, _ENTERED = 1, 2  # bits of a cell of the MEA's table

Plans = Float[Array, "batch rows width"]
First = Int[Array, "batch rows"]
Lengths = Int[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Log-weights of the pair HMM, in nats: `sharpness * log P + match` for a match, `-opening` for a gap.

    Each residue of a gap thereby costs half a `match`. The defaults were chosen on validation families.
    """

    sharpness: float = 1.0
    match: float = 3.3
    opening: float = 4.4

    def __post_init__(self):
        if self.sharpness <= 0 or self.opening < 0:
            raise ValueError(f"{self}: sharpness must be above 0, opening at least 0")

    @property
    def terminal(self) -> float:
        """Cost of a gap at an end, in nats."""
        return min(self.opening, TERMINAL)

    def numbers(self) -> Float32[np.ndarray, "3"]:
        """Return sharpness, match and opening in one array."""
        return np.array([self.sharpness, self.match, self.opening], np.float32)


class Decoded(NamedTuple):
    """Hard alignments of a batch, residue by residue; NO_MATCH or 0 beyond the lengths."""

    match: Int[Array, "batch rows"]  # position in y that each residue of x is aligned with, or NO_MATCH
    confidence: Float[Array, "batch rows"]  # value of the plan or posterior there, or 0
    x_alone: Float[Array, "batch rows"]  # 1 minus the sum of the row, or 0
    y_alone: Float[Array, "batch columns"]


def density_correction(
    plans: Plans, x_lengths: Lengths, y_lengths: Lengths, band: int | None
) -> Float[Array, " batch"]:
    """Compute the factor that rescales plans of long or wide-band pairs to the density of training.

    The gap model was learned at that density; for usual pairs the factor is 1. Let `exp(S)` sum to K over a row and the
    plan to m over the residues in it. If all n rows and columns are alike, a full dustbin of score s balances at
    `r = (1 - m) / m = e^s sqrt(n / K)`, and an entry of the plan is `exp(S) m / K`. The entry shrinks with K, which
    grows with the band, and with n. The factor undoes both, with r from the sums of the plan. `band` is the half-width
    in training, in residues; without one the factor is 1.
    """
    if band is None:
        return jnp.ones(len(plans))
    x_lengths, y_lengths = jnp.maximum(x_lengths, 1), jnp.maximum(y_lengths, 1)
    columns = jnp.maximum(1, jnp.minimum(plans.shape[2], y_lengths) / (2 * band + 1))
    rows = jnp.maximum(1, x_lengths / USUAL_LENGTH)
    mass = plans.sum(axis=(1, 2))
    x_share, y_share = (jnp.clip(mass / n, 1e-6, 1) for n in (x_lengths, y_lengths))
    r = jnp.sqrt((1 - x_share) * (1 - y_share)) / x_share
    return columns * (1 + r) / (1 + r * jnp.sqrt(columns / rows))


def posterior(
    plans: Plans, first: First, x_lengths: Lengths, y_lengths: Lengths, gaps: Float[Array, "3"], columns: int
) -> Plans:
    """Compute the probability that each pair of residues is aligned, in the windows of the plans.

    Plans are 0 beyond the lengths. `first` comes from `pair_hmm.rising`, `gaps` from `Gaps.numbers`. `columns` is the
    padded length of y.
    """
    sharpness, match, opening = gaps
    possible = plans > 0
    log_weight = sharpness * jnp.log(jnp.where(possible, plans, 1)) + match
    log_weight = jnp.where(possible, log_weight, pair_hmm.LOG_ZERO)
    costs = opening, jnp.minimum(opening, TERMINAL)
    return pair_hmm.posterior(log_weight, first, x_lengths, y_lengths, costs, columns)


def mea(plans: Plans, first: First, y_lengths: Lengths) -> Int[Array, "batch rows"]:
    """Find the column matched with each row, or NO_MATCH. Entries of 0 are never matched.

    The table holds integers, each row relative to its window's first node. float32 would round the sums of long
    alignments, lose small values and decide ties by chance.
    """
    batch, rows, width = plans.shape
    # A power of two: equal sums stay equal. No sum, of as many matches as fit the window, reaches 2^30.
    _, exponent = jnp.frexp(plans.max(axis=(1, 2), keepdims=True))
    gains = jnp.round(jnp.ldexp(plans, 30 - min(rows, width).bit_length() - exponent)).astype(jnp.int32)

    def next_row(best, row):
        gain, possible, by = row
        best = pair_hmm.shifted(best, by)
        best = best - best[:, :1]
        matched = possible & (best[:, :-1] + gain >= best[:, 1:])
        entry = jnp.where(matched, best[:, :-1] + gain, best[:, 1:])
        # The window's first node is 0, and no node left of it is higher: nothing can be matched there.
        best = jax.lax.associative_scan(jnp.maximum, entry, axis=1)
        bits = matched * _MATCHED + (entry == best) * _ENTERED
        return jnp.pad(best, ((0, 0), (1, 0))), bits.astype(jnp.uint8)

    by = jnp.diff(first, axis=1, prepend=first[:, :1])
    per_row = gains.swapaxes(0, 1), (plans > 0).swapaxes(0, 1), by.T
    _, bits = jax.lax.scan(next_row, jnp.zeros((batch, width + 1), jnp.int32), per_row)
    return _trace(bits, first, y_lengths)


def _trace(bits: UInt8[Array, "rows batch width"], first: First, y_lengths: Lengths) -> Int[Array, "batch rows"]:
    """Follow the best path from the ends of both sequences back."""
    place = jnp.arange(bits.shape[2])

    def row_above(column, row):
        bits, first = row
        # The path enters the row at the last entry node that is not right of the node where it leaves the row. If the
        # window holds none, the path comes from above.
        entered = (bits & _ENTERED > 0) & (place < (column - first)[:, None])
        cell = jnp.where(entered, 2 * place + (bits & _MATCHED), -1).max(axis=1)
        matched = (cell >= 0) & (cell % 2 == _MATCHED)
        column = jnp.where(cell >= 0, first + cell // 2 + 1 - matched, column)
        return column, jnp.where(matched, column, NO_MATCH)

    _, match = jax.lax.scan(row_above, y_lengths.astype(jnp.int32), (bits, first.T), reverse=True)
    return match.T


def decode(plans: Plans, first: First, x_lengths: Lengths, y_lengths: Lengths, columns: int) -> Decoded:
    """Align by the MEA of plans or posteriors, and compute how likely each residue is aligned with none."""
    match = mea(plans, first, y_lengths)
    matched = jnp.where(match == NO_MATCH, 0, match - first)
    confidence = jnp.where(match == NO_MATCH, 0, jnp.take_along_axis(plans, matched[:, :, None], axis=2)[:, :, 0])
    place = first[:, :, None] + jnp.arange(plans.shape[2])
    y_mass = jax.vmap(lambda values, place: jnp.zeros(columns).at[place].add(values, mode="drop"))(plans, place)
    alone = (
        jnp.where(jnp.arange(mass.shape[1]) < lengths[:, None], jnp.clip(1 - mass, 0, 1), 0)
        for mass, lengths in ((plans.sum(axis=2), x_lengths), (y_mass, y_lengths))
    )
    return Decoded(match, confidence, *alone)
