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

_LARGEST = 1e25  # of a row's weights: leaves float32 room for as much as 145 nats less, and for a row's sum


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


@jax.custom_vjp
def log_partition(
    log_weight: Float[Array, "batch x_length y_length"],
    x_lengths: Int[Array, "batch"],
    y_lengths: Int[Array, "batch"],
    opening: Float[Array, ""],
) -> Float[Array, "batch"]:
    """Logarithm of the summed weights of all alignments of each pair.

    Its derivatives are sums of weights, too: automatic ones would be products of those before a pair, that may
    underflow, with those after it, that may overflow.
    """
    start, end = _ends(x_lengths, y_lengths)
    return _sweep(log_weight, start, end, opening)[2]


def _ends(x_lengths, y_lengths):
    end = jnp.stack([x_lengths, y_lengths], 1)
    return jnp.zeros_like(end), end


def _partition_forward(log_weight, x_lengths, y_lengths, opening):
    start, end = _ends(x_lengths, y_lengths)
    swept, (_, _, slope) = jax.jvp(lambda o: _sweep(log_weight, start, end, o), (opening,), (jnp.ones_like(opening),))
    return swept[2], (log_weight, end, opening, swept, slope)


def _partition_backward(residuals, cotangent):
    log_weight, end, opening, (before, log_before, log_total), slope = residuals
    # As in the decoder: backwards, x and y change places.
    size = jnp.array([log_weight.shape[1:]])
    turned = log_weight[:, ::-1, ::-1].swapaxes(1, 2)
    start = (size - end)[:, ::-1]
    after, log_after, _ = _sweep(turned, start, jnp.broadcast_to(size[:, ::-1], start.shape), opening)
    after, log_after = after.swapaxes(1, 2)[:, ::-1, ::-1], log_after[:, ::-1]
    scale = log_before[:, :, None] + log_after[:, None, :] - log_total[:, None, None]
    posterior = jnp.exp(jnp.minimum(jnp.log(before) + log_weight + jnp.log(after) + scale, 0))
    return posterior * cotangent[:, None, None], None, None, (slope * cotangent).sum()


log_partition.defvjp(_partition_forward, _partition_backward)


class _Row(NamedTuple):
    """Weights of all that ends in a row of nodes, by how it ends, divided by a factor of the row."""

    matched: Float[Array, "batch nodes"]
    x_alone: Float[Array, "batch nodes"]
    y_alone: Float[Array, "batch nodes"]
    log_scale: Float[Array, "batch"]
    log_total: Float[Array, "batch"]


def _sweep(
    log_weight: Float[Array, "batch rows columns"],
    start: Int[Array, "batch 2"],
    end: Int[Array, "batch 2"],
    opening: Float[Array, ""],
) -> tuple[Float[Array, "batch rows columns"], Float[Array, "batch rows"], Float[Array, "batch"]]:
    """Weight of all alignments of what comes before each pair, divided by a factor a row; its logarithm; and the
    logarithm of the weight of all that lead from node `start` to node `end`.
    """
    batch, rows, columns = log_weight.shape
    nodes, opened = jnp.arange(columns + 1), jnp.exp(-opening)

    def step(state: _Row, row):
        i, log_w = row
        x_alone = opened * (state.matched + state.y_alone) + state.x_alone
        total = state.matched + state.x_alone + state.y_alone
        matched = jnp.pad(jnp.exp(log_w) * total[:, :-1], ((0, 0), (1, 0)))
        matched = jnp.where((start[:, :1] == i) & (start[:, 1:] == nodes), 1.0, matched)
        y_alone = opened * jnp.pad(jnp.cumsum(matched, axis=1)[:, :-1], ((0, 0), (1, 0)))
        # Nodes beyond the end lead nowhere; they must not set the scale.
        matched, x_alone, y_alone = (jnp.where(nodes <= end[:, 1:], x, 0) for x in (matched, x_alone, y_alone))
        factor = jax.lax.stop_gradient((matched + x_alone + y_alone).max(axis=1, keepdims=True)) / _LARGEST
        factor = jnp.where(factor > 0, factor, 1)
        matched, x_alone, y_alone = (x / factor for x in (matched, x_alone, y_alone))
        log_scale, total = state.log_scale + jnp.log(factor[:, 0]), matched + x_alone + y_alone
        at_end = jnp.take_along_axis(total, end[:, 1:], axis=1)[:, 0]
        log_total = jnp.where(end[:, 0] == i, jnp.log(jnp.maximum(at_end, 1e-37)) + log_scale, state.log_total)
        return _Row(matched, x_alone, y_alone, log_scale, log_total), (total[:, :-1], log_scale)

    nothing, zero = jnp.zeros((batch, columns + 1)), jnp.zeros(batch)
    before_first = jnp.full((1, batch, columns), -jnp.inf)
    per_row = jnp.arange(rows + 1), jnp.concatenate([before_first, log_weight.swapaxes(0, 1)])
    last, (before, log_scale) = jax.lax.scan(step, _Row(nothing, nothing, nothing, zero, zero), per_row)
    return before[:rows].swapaxes(0, 1), log_scale[:rows].T, last.log_total


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
