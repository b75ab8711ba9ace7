"""Decode posteriors and plans: the monotone alignment of maximum expected accuracy (MEA), see docs/math.md, section 9.

MEA maximises the sum of `P_ij - threshold` over aligned pairs (i, j) that rise in both sequences, at no cost for gaps
(Holmes and Durbin 1998, doi:10.1089/cmb.1998.5.493). Pairs less likely than the threshold are thereby left out. A
threshold for each pair of sequences maximises the expected F1 (`best_threshold`).

    T[i, j] = max(T[i-1, j], T[i, j-1], T[i-1, j-1] + P_ij - threshold)

Values are held by antidiagonals and lanes, as models/pair_hmm.py describes. All is computed on the device that holds
them; a host fetches a few numbers for each residue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from models import pair_hmm
from models.pair_hmm import First, LaneWeights, Lengths

NO_MATCH = -1
LEAST_THRESHOLD = 0.1  # of a posterior; chosen on validation pairs
_ABOVE, _LEFT, _MATCHED = 0, 1, 2  # where the best path comes from


class Decoded(NamedTuple):
    """Hard alignments of a batch, residue by residue; NO_MATCH or 0 beyond the lengths."""

    match: Int[Array, "batch rows"]  # position in y that each residue of x is aligned with, or NO_MATCH
    confidence: Float[Array, "batch rows"]  # value of the plan or posterior there, or 0
    x_alone: Float[Array, "batch rows"]  # 1 minus the sum of the row, or 0
    y_alone: Float[Array, "batch columns"]


def decode(
    values: LaneWeights,
    first: First | None,
    x_lengths: Lengths,
    y_lengths: Lengths,
    shape: tuple[int, int],
    threshold: Float[Array, " #batch"] | float = 0.0,
) -> Decoded:
    """Align by the MEA of posteriors or plans, and compute how likely each residue is aligned with none.

    `values` and `first` are as in `pair_hmm.Problem`, and the last residues of both sequences lie in the band. `shape`
    holds the padded lengths of x and y. `threshold` is one number, or one for each pair of sequences.
    """
    rows, columns = shape
    row, confidence = _trace(_choices(values, first, threshold), values, first, x_lengths, y_lengths)
    place = jnp.where(row >= 0, row, rows)  # beyond the end: dropped
    batch = jnp.arange(values.shape[1])
    column = jnp.arange(len(row))[:, None] - row
    match = jnp.full((len(batch), rows), NO_MATCH).at[batch, place].set(column, mode="drop")
    confidences = jnp.zeros((len(batch), rows)).at[batch, place].set(confidence, mode="drop")
    sums = _sums(values, first, rows, columns)
    alone = (
        jnp.where(jnp.arange(mass.shape[1]) < lengths[:, None], jnp.clip(1 - mass, 0, 1), 0)
        for mass, lengths in zip(sums, (x_lengths, y_lengths), strict=True)
    )
    return Decoded(match, confidences, *alone)


def best_threshold(posterior: LaneWeights, first: First | None, rows: int) -> Float[Array, " batch"]:
    """Compute the threshold of each pair that maximises the expected F1 of its residue pairs, at least LEAST_THRESHOLD.

    A set A of residue pairs has the expected F1 `2 sum_A P / (|A| + sum P)`, where the sum of all P is the expected
    number of aligned residue pairs. The best A is the MEA whose threshold is half of the best F1 (Lipton et al. 2014,
    doi:10.1007/978-3-662-44851-9_15). That F1 is found here among sets of the likeliest partners of rows, not all of
    which are monotone, so that it is a little too high where little is certain.

    `rows` is the padded length of x, `posterior` and `first` are as in `decode`.
    """
    likeliest = jnp.sort(_likeliest(posterior, first, rows), axis=1, descending=True)
    expected = posterior.sum((0, 2))[:, None]
    f1 = 2 * jnp.cumsum(likeliest, axis=1) / (jnp.arange(1, rows + 1) + expected)
    return jnp.maximum(LEAST_THRESHOLD, f1.max(axis=1) / 2)


def _choices(
    values: LaneWeights, first: First | None, threshold: Float[Array, " #batch"] | float
) -> UInt8[Array, "diagonals batch lanes"]:
    """Compute where the best path to each cell comes from."""
    moves, threshold = pair_hmm.moves(first), jnp.reshape(threshold, (-1, 1))

    def step(carry, inputs):
        best, before = carry
        value, moves = inputs
        above, before = pair_hmm.above(best, moves), pair_hmm.above(before, moves)
        left = pair_hmm.same(best, moves)
        unmatched, matched = jnp.maximum(above, left), before + value - threshold
        choice = jnp.where(matched > unmatched, _MATCHED, jnp.where(left > above, _LEFT, _ABOVE))
        best = jnp.maximum(unmatched, matched)
        return (best, left) if first is None else _kept_small(best, left), choice.astype(jnp.uint8)

    nothing = jnp.zeros(values.shape[1:])
    return jax.lax.scan(step, (nothing, nothing), (values, moves))[1]


def _kept_small(best: Float[Array, "batch lanes"], before: Float[Array, "batch lanes"]) -> tuple[Array, Array]:
    """Take a constant off the sums of a band where they are large: float32 would lose what long sequences add.

    Neighbours on an antidiagonal differ by at most 1, the largest value of a pair, so that all within the sequences
    stay above 0, the sum of what nothing leads to.
    """
    unit = 2.0 * (1 << best.shape[1].bit_length())
    excess = jnp.where(best.max(axis=1, keepdims=True) >= 2 * unit, unit, 0)
    return jnp.maximum(best - excess, 0), jnp.maximum(before - excess, 0)


def _trace(choices, values, first, x_lengths, y_lengths) -> tuple[Int[Array, "diagonals batch"], Array]:
    """Follow the best path from the ends of both sequences back; return its matched row on each antidiagonal, or -1."""
    lanes = values.shape[2]
    batch = jnp.arange(values.shape[1])

    def step(carry, inputs):
        i, j = carry
        d, choices, values, first = inputs
        lane = i - (0 if first is None else first)
        here = (i + j == d) & (i >= 0) & (j >= 0)
        within = (lane >= 0) & (lane < lanes)
        lane = jnp.clip(lane, 0, lanes - 1)
        choice = choices[batch, lane]
        matched = here & within & (choice == _MATCHED)
        # Beside the band nothing can be matched: the path has ended.
        up = here & (matched | (choice == _ABOVE) | ~within)
        back = here & (matched | (choice == _LEFT) | ~within)
        out = jnp.where(matched, i, -1), jnp.where(matched, values[batch, lane], 0)
        return (i - up, j - back), out

    d = jnp.arange(len(values))
    ends = x_lengths.astype(jnp.int32) - 1, y_lengths.astype(jnp.int32) - 1
    return jax.lax.scan(step, ends, (d, choices, values, first), reverse=True)[1]


def _sums(values: LaneWeights, first: First | None, rows: int, columns: int) -> tuple[Array, Array]:
    """Sum over the columns of each row, and over the rows of each column."""
    if first is None:
        return values.sum(0), pair_hmm.unskewed(values, columns).sum(1)
    pair, row = _pair_and_row(values, first)
    column = jnp.arange(len(values))[:, None, None] - row
    places = (row, rows), (jnp.where(column >= 0, column, columns), columns)
    x, y = (jnp.zeros((values.shape[1], length)).at[pair, place].add(values, mode="drop") for place, length in places)
    return x, y


def _likeliest(values: LaneWeights, first: First | None, rows: int) -> Float[Array, "batch rows"]:
    """Compute the largest value of each row."""
    if first is None:
        return values.max(0)
    return jnp.zeros((values.shape[1], rows)).at[_pair_and_row(values, first)].max(values, mode="drop")


def _pair_and_row(values: LaneWeights, first: First) -> tuple[Int[Array, "batch 1"], Int[Array, "... batch lanes"]]:
    """Return the place of each value in arrays of the rows of a batch."""
    _, batch, lanes = values.shape
    return jnp.arange(batch)[:, None], first[:, :, None] + jnp.arange(lanes)
