"""The pair HMM that orders a plan: how likely it makes a reference alignment, differentiably.

A plan knows no order and no gaps. Here its values are the weights of matches, `sharpness log P + match` nats each,
and a gap costs `opening` nats; `models/decode.py` aligns by the same model and explains its numbers. The weight of all
alignments together is summed row by row, and its derivative by a match's weight is the posterior of that match.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class GapModel(nnx.Module):
    """The three numbers, learned; sharpness and opening stay above 0.

    They start where the plan of BLOSUM62 alone aligns best (docs/aligner.md).
    """

    def __init__(self):
        self.log_sharpness = nnx.Param(jnp.log(0.9))
        self.match = nnx.Param(jnp.asarray(5.2))
        self.log_opening = nnx.Param(jnp.log(4.5))

    def __call__(self) -> Float[Array, "3"]:
        """sharpness, match, opening."""
        return jnp.stack([jnp.exp(self.log_sharpness[...]), self.match[...], jnp.exp(self.log_opening[...])])


def negative_log_likelihood(
    log_plan: Float[Array, "batch x_length y_length"],
    target: Int[Array, "batch x_length"],
    x_lengths: Int[Array, "batch"],
    y_lengths: Int[Array, "batch"],
    gaps: Float[Array, "3"],
) -> Float[Array, "batch"]:
    """Nats of the reference alignment of each pair; of those of its matches that the plan's band holds.

    `log_plan` is minus infinity outside the band, and may be anything beyond the lengths.
    """
    sharpness, match, opening = gaps
    inside = jnp.isfinite(log_plan)
    log_weight = jnp.where(inside, sharpness * jnp.where(inside, log_plan, 0) + match, -jnp.inf)
    column = jnp.maximum(target, 0)[..., None]
    found = jnp.take_along_axis(log_weight, column, axis=2)[..., 0]
    aligned = (target >= 0) & jnp.isfinite(found)
    matches = jnp.where(aligned, jnp.where(aligned, found, 0), 0).sum(1)
    openings = _openings(jnp.where(aligned, target, -1), x_lengths, y_lengths)
    return log_partition(log_weight, x_lengths, y_lengths, opening) - matches + opening * openings


def log_partition(
    log_weight: Float[Array, "batch x_length y_length"],
    x_lengths: Int[Array, "batch"],
    y_lengths: Int[Array, "batch"],
    opening: Float[Array, ""],
) -> Float[Array, "batch"]:
    """Logarithm of the summed weights of all alignments of each pair."""
    batch, _, columns = log_weight.shape
    opened = jnp.exp(-opening)
    real = jnp.arange(columns + 1) <= y_lengths[:, None]

    def step(state: _Row, row):
        log_w, i = row
        x_alone = opened * (state.matched + state.y_alone) + state.x_alone
        total = state.matched + state.x_alone + state.y_alone
        matched = jnp.pad(jnp.exp(log_w) * total[:, :-1], ((0, 0), (1, 0)))
        new = _finished(matched, x_alone, state.log_scale, opened, real)
        return jax.tree.map(
            lambda a, b: jnp.where((i < x_lengths).reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state
        ), ()

    start = jnp.zeros((batch, columns + 1)).at[:, 0].set(1.0)
    first = _finished(start, jnp.zeros_like(start), jnp.zeros(batch), opened, real)
    rows = log_weight.swapaxes(0, 1), jnp.arange(log_weight.shape[1])
    last, _ = jax.lax.scan(step, first, rows)
    total = last.matched + last.x_alone + last.y_alone
    end = jnp.take_along_axis(total, y_lengths[:, None], axis=1)[:, 0]
    return jnp.log(jnp.maximum(end, 1e-37)) + last.log_scale


class _Row(NamedTuple):
    """Weights of all that ends in a row of nodes, by how it ends, divided by a factor of the row."""

    matched: Float[Array, "batch nodes"]
    x_alone: Float[Array, "batch nodes"]
    y_alone: Float[Array, "batch nodes"]
    log_scale: Float[Array, "batch"]


def _finished(matched, x_alone, log_scale, opened, real) -> _Row:
    """A row with its gaps of y, scaled."""
    y_alone = opened * jnp.pad(jnp.cumsum(matched, axis=1)[:, :-1], ((0, 0), (1, 0)))
    # Nodes beyond the end lead nowhere; they must not set the scale.
    matched, x_alone, y_alone = (jnp.where(real, state, 0) for state in (matched, x_alone, y_alone))
    factor = jax.lax.stop_gradient((matched + x_alone + y_alone).max(axis=1, keepdims=True))
    factor = jnp.where(factor > 0, factor, 1)
    return _Row(matched / factor, x_alone / factor, y_alone / factor, log_scale + jnp.log(factor[:, 0]))


def _openings(
    target: Int[Array, "batch x_length"], x_lengths: Int[Array, "batch"], y_lengths: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Gaps of the alignment: runs of unaligned residues of x, and of y, between two matches or at an end."""
    length = target.shape[1]
    aligned, row = target >= 0, jnp.arange(length)
    # The last match before each row; node 0 is one.
    last_row = jax.lax.cummax(jnp.where(aligned, row, -1), axis=1)
    last_row = jnp.pad(last_row[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    last_column = jnp.pad(
        jax.lax.cummax(jnp.where(aligned, target, -1), axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1
    )
    between = (aligned & (row - last_row > 1)).sum(1) + (aligned & (target - last_column > 1)).sum(1)
    end_row = jnp.where(aligned, row, -1).max(1)
    at_end = (x_lengths - end_row > 1).astype(jnp.int32) + (y_lengths - target.max(1) > 1)
    return (between + at_end).astype(jnp.float32)
