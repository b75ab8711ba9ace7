"""The pair HMM with affine gaps (Durbin et al. 1998, chapter 4), forward and backward, for training and for alignment.

A monotone alignment weighs the product of its matches' weights and of `exp(-opening)` for each gap; residues of a gap
cost nothing more. Where residues of both sequences are unaligned, those of y come first: each alignment counts once.

Matches are possible in windows only: `width` columns from `first` on in each row. First columns never fall from one
row to the next. So no alignment that has left a window to its left matches anything again, and to the right of a
window all nodes of a row weigh the same: one node stands for them, and work and memory are rows x width.

Weights are held as logarithms. Prefixes of one row may differ by hundreds of nats, as where a domain occurs twice, and
float32 would lose those that match late. Sums along a row are exponentials nevertheless, in blocks of columns that are
too short to differ much, multiplied by a triangular matrix: that is four times faster than `jax.lax.cumlogsumexp`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NOTHING = -1e30  # logarithm of 0: finite, so that differences and derivatives are
# Within a block weights differ by less than this and that: `exp` stays in float32 from -147 to +83 nats.
_BLOCK, _ROOM = 16, 60.0
_SMALLEST = 1e-37


class Prefixes(NamedTuple):
    """Log-weights of all that comes before each pair, and of all alignments.

    before: less `scale` of the row. Scales are integers: their sums are exact, however long the sequences are.
    total: less `total_scale`.
    """

    before: Float[Array, "batch rows width"]
    scale: Float[Array, "batch rows"]
    total: Float[Array, " batch"]
    total_scale: Float[Array, " batch"]


class _Node(NamedTuple):
    """Log-weights of all that leads to the nodes of a row's window and to one node right of it."""

    open: Float[Array, "batch nodes"]  # the last step is a match or a residue of y alone
    x_alone: Float[Array, "batch nodes"]  # the last step is a residue of x alone


def posterior(
    log_weight: Float[Array, "batch rows width"],
    first: Int[Array, "batch rows"] | None,
    x_lengths: Int[Array, " batch"],
    y_lengths: Int[Array, " batch"],
    opening: Float[Array, ""],
    columns: int,
) -> Float[Array, "batch rows width"]:
    """Compute the probability that each pair of residues is aligned.

    Args:
      log_weight: of matches in nats, `NOTHING` for none and beyond the lengths.
      first: column of the first one in each row, as `rising` makes them; None if each row holds all columns.
      columns: padded length of y.
    """
    windows = _first(first, log_weight)
    forwards = log_weight, windows, *_ends(x_lengths, y_lengths)
    backwards = _turned(log_weight, windows, x_lengths, y_lengths, columns)
    weight, windows, start, end = (jnp.concatenate(pair) for pair in zip(forwards, backwards, strict=True))
    both = forward(weight, None if first is None else windows, start, end, opening)
    before, after = (Prefixes(*part) for part in zip(*(jnp.split(x, 2) for x in both), strict=True))
    return joined(log_weight, before, after)


def rising(first: Int[Array, "batch rows"], y_lengths: Int[Array, " batch"]) -> Int[Array, "batch rows"]:
    """Make first columns that never fall and lie within y, from windows that hold nothing where they do not."""
    return jax.lax.cummax(jnp.minimum(first, jnp.maximum(y_lengths - 1, 0)[:, None]), axis=1)


def suffixes(
    log_weight: Float[Array, "batch rows columns"],
    x_lengths: Int[Array, " batch"],
    y_lengths: Int[Array, " batch"],
    opening: Float[Array, ""],
) -> Prefixes:
    """Compute log-weights of all that comes after each pair, from windows of all columns; in reverse order."""
    turned, _, start, end = _turned(log_weight, _first(None, log_weight), x_lengths, y_lengths, log_weight.shape[2])
    return forward(turned, None, start, end, opening)


def joined(
    log_weight: Float[Array, "batch rows width"], before: Prefixes, after: Prefixes
) -> Float[Array, "batch rows width"]:
    """Compute the posterior from prefixes and suffixes."""
    scale = before.scale + after.scale[:, ::-1] - before.total_scale[:, None] - before.total[:, None]
    return jnp.exp(jnp.minimum(before.before + log_weight + after.before[:, ::-1, ::-1] + scale[:, :, None], 0))


def forward(
    log_weight: Float[Array, "batch rows width"],
    first: Int[Array, "batch rows"] | None,
    start: Int[Array, "batch 2"],
    end: Int[Array, "batch 2"],
    opening: Float[Array, ""],
) -> Prefixes:
    """Sum the weights of all alignments between the nodes `start` and `end`, row by row.

    A node (i, j) lies before row i and column j. `start` must not lie right of its row's window.
    """
    batch, rows, width = log_weight.shape
    nodes = jnp.arange(width + 2)
    # One row more, without matches: its nodes are what follows the last.
    log_weight = jnp.pad(log_weight, ((0, 0), (0, 1), (0, 0)), constant_values=NOTHING)
    windows = _first(None, log_weight) if first is None else jnp.pad(first, ((0, 0), (0, 1)), mode="edge")
    barrier = jax.lax.optimization_barrier  # or XLA computes again, for every use, what is cheap but for its number

    def step(carry, row):
        node, scale = carry
        i, weight, begin, by = row
        if first is not None:
            node = barrier(_Node(*(shifted(x, by) for x in node)))
        place, starts, here = begin[:, None] + nodes, start[:, :1] == i, start[:, 1:]
        opened = jnp.where(place == here, 0, jnp.where(place > here, -opening, NOTHING))
        node = barrier(_Node(jnp.where(starts, opened, node.open), jnp.where(starts, NOTHING, node.x_alone)))
        every = barrier(_log_add(*node))
        top = jax.lax.stop_gradient(jnp.round(every.max(axis=1, keepdims=True)))
        top = jnp.where(top > NOTHING / 2, top, 0)
        at_end = jnp.clip(end[:, 1] - begin, 0, width + 1)[:, None]
        at_end = jnp.take_along_axis(every, at_end, axis=1, mode="promise_in_bounds") - top
        before, scale = (every - top)[:, :width], scale + top[:, 0]
        x_alone = _log_add(node.open - top - opening, node.x_alone - top)
        node = _Node(_matched_then_gap(before + weight, opening), x_alone)
        return (node, scale), (before, scale, at_end[:, 0])

    nothing = jnp.full((batch, width + 2), NOTHING)
    by = jnp.diff(windows, axis=1, prepend=windows[:, :1])
    per_row = jnp.arange(rows + 1), log_weight.swapaxes(0, 1), windows.T, by.T
    _, (before, scale, at_end) = jax.lax.scan(step, (_Node(nothing, nothing), jnp.zeros(batch)), per_row)
    total, total_scale = (jnp.take_along_axis(x, end[None, :, 0], axis=0)[0] for x in (at_end, scale))
    return Prefixes(before[:rows].swapaxes(0, 1), scale[:rows].T, total, total_scale)


def shifted(state: Array, by: Int[Array, " batch"]) -> Array:
    """Move windows `by` nodes to the right; their last node stands for all that follow."""
    last = state.shape[1] - 1
    return jnp.take_along_axis(
        state, jnp.minimum(jnp.arange(last + 1) + by[:, None], last), axis=1, mode="promise_in_bounds"
    )


def _matched_then_gap(log_match: Float[Array, "batch width"], opening) -> Float[Array, "batch width+2"]:
    """Log-weight of all that ends with a match at each node, or with residues of y alone after a match to its left."""
    batch, width = log_match.shape
    blocks = -(-(width + 2) // _BLOCK)
    matched = jnp.pad(log_match, ((0, 0), (1, blocks * _BLOCK - width - 1)), constant_values=NOTHING)
    barrier = jax.lax.optimization_barrier
    matched = barrier(matched.reshape(-1, _BLOCK).T)  # blocks side by side: sums and maxima of whole vectors
    top = jax.lax.stop_gradient(jnp.maximum(matched.max(axis=0), NOTHING))
    weight = barrier(jnp.exp(matched - top + _ROOM))
    ones = jnp.ones((_BLOCK, _BLOCK))
    within = jnp.concatenate([jnp.eye(_BLOCK) + jnp.exp(-opening) * jnp.tril(ones, -1), ones[:1]])
    sums = jnp.matmul(within, weight, precision="highest")
    of_block = (top - _ROOM + jnp.log(jnp.maximum(sums[_BLOCK], _SMALLEST))).reshape(batch, blocks)
    left = jax.lax.associative_scan(_log_add, of_block[:, :-1], axis=1)
    left = jnp.pad(left, ((0, 0), (1, 0)), constant_values=NOTHING).reshape(-1) - opening
    scale = jax.lax.stop_gradient(jnp.maximum(top, left))
    own, others, scale = barrier((jnp.exp(top - scale), jnp.exp(left - scale + _ROOM), scale))
    total = barrier(scale - _ROOM + jnp.log(jnp.maximum(sums[:_BLOCK] * own + others, _SMALLEST)))
    return total.T.reshape(batch, -1)[:, : width + 2]


def _log_add(a: Array, b: Array) -> Array:
    """Compute logaddexp without care for infinities and for digits below float32's of 1: twice as fast as jnp's."""
    return jnp.maximum(a, b) + jnp.log(1 + jnp.exp(-jnp.abs(a - b)))


def _first(first: Array | None, log_weight: Array) -> Int[Array, "batch rows"]:
    return jnp.zeros(log_weight.shape[:2], jnp.int32) if first is None else first


def _ends(x_lengths, y_lengths):
    end = jnp.stack([x_lengths, y_lengths], 1)
    return jnp.zeros_like(end), end


def _turned(log_weight, first, x_lengths, y_lengths, columns: int):
    """Weights, windows, start and end of the same pairs with rows and columns in reverse order."""
    _, end = _ends(x_lengths, y_lengths)
    size = jnp.array([log_weight.shape[1], columns])
    turned_first = columns - log_weight.shape[2] - first[:, ::-1]
    return log_weight[:, ::-1, ::-1], turned_first, size - end, jnp.broadcast_to(size, end.shape)
