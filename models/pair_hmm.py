"""The pair HMM with affine gaps (Durbin et al. 1998, chapter 4), for training and for alignment.

A transport plan P has no order and no gaps. The HMM turns it into a distribution over monotone alignments: a match of
residues i and j weighs `sharpness log P_ij + match` nats, and a gap of any length costs `opening` nats. At the ends of
a sequence it may cost less (docs/math.md, section 9). The weight of an alignment is the product of its matches and
gaps. Where residues of both sequences are unaligned, the residues of y come first, so that each alignment counts once.

Matches are possible in windows only: `width` columns of each row, from its column `first` on. First columns never fall
from one row to the next. An alignment that has left a window to the left therefore matches nothing again, and to the
right of a window all nodes of a row weigh the same. One node stands for them, and work and memory are rows x width.

Weights are logarithms: weights of one row may differ by hundreds of nats, where a domain occurs twice for example, and
float32 would lose those that match late. Sums along a row still add exponentials, in blocks of columns that are too
short to differ much, by a product with a triangular matrix: four times faster than `jax.lax.cumlogsumexp`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

LOG_ZERO = -1e30  # logarithm of 0: finite, so that differences and derivatives are finite
# `exp` of float32 reaches from -147 nats to 83 nats below and above the largest weight of a block, less this room.
_BLOCK, _ROOM = 16, 60.0
_SMALLEST = 1e-37

Lengths = Int[Array, " batch"]
Weights = Float[Array, "batch rows width"]
Firsts = Int[Array, "batch rows"]
Target = Int[Array, "batch x_length"]
AllPairs = Float[Array, "batch x_length y_length"]
Scalar = Float[Array, ""]


class GapModel(nnx.Module):
    """Learned sharpness, match and opening; sharpness and opening stay above 0.

    They start where the plan of BLOSUM62 alone aligns best (docs/aligner.md).
    """

    def __init__(self):
        self.log_sharpness = nnx.Param(jnp.log(0.9))
        self.match = nnx.Param(jnp.asarray(5.2))
        self.log_opening = nnx.Param(jnp.log(4.5))

    def __call__(self) -> Float[Array, "3"]:
        """Return sharpness, match and opening; the last two are in nats."""
        return jnp.stack([jnp.exp(self.log_sharpness[...]), self.match[...], jnp.exp(self.log_opening[...])])


class Prefixes(NamedTuple):
    """Log-weights of everything that precedes each pair, and of all alignments.

    before: Less `scale` of the row. Scales are integers, so that their sums are exact at any length.
    total: Less `total_scale`.
    """

    before: Weights
    scale: Float[Array, "batch rows"]
    total: Float[Array, " batch"]
    total_scale: Float[Array, " batch"]


class _Paths(NamedTuple):
    """All alignments between two nodes. A node (i, j) lies before row i and column j."""

    log_weight: Weights
    first: Firsts | None  # None: each row holds all columns
    start: Int[Array, "batch 2"]
    end: Int[Array, "batch 2"]

    @classmethod
    def of_pairs(cls, log_weight, first, *lengths) -> "_Paths":
        end = jnp.stack(lengths, 1)
        return cls(log_weight, first, jnp.zeros_like(end), end)

    def reversed(self, columns: int) -> "_Paths":
        """Return the same alignments with rows and columns in reverse order; `columns` is the padded length of y."""
        log_weight, first, start, end = self
        _, rows, width = log_weight.shape
        size = jnp.array([rows, columns])
        first = None if first is None else columns - width - first[:, ::-1]
        return _Paths(log_weight[:, ::-1, ::-1], first, size - end, size - start)


class _States(NamedTuple):
    """Log-weights that lead to the nodes of a row's window and to one node right of it, by the state of the HMM."""

    match_or_y: Float[Array, "batch nodes"]  # the last step is a match or an unaligned residue of y
    x: Float[Array, "batch nodes"]  # the last step is an unaligned residue of x


def negative_log_likelihood(
    log_plan: AllPairs, target: Target, x_lengths: Lengths, y_lengths: Lengths, gaps: Float[Array, "3"]
) -> Float[Array, " batch"]:
    """Compute the nats of each reference alignment, of which only matches within the plan's band count.

    `log_plan` is minus infinity outside the band, and anything beyond the lengths. `target` is the column that each row
    is aligned to, negative for none. `gaps` are sharpness, match and opening, as `GapModel` returns them.
    """
    sharpness, match, opening = gaps
    inside = jnp.isfinite(log_plan)
    inside &= (jnp.arange(log_plan.shape[1]) < x_lengths[:, None])[:, :, None]
    inside &= (jnp.arange(log_plan.shape[2]) < y_lengths[:, None])[:, None, :]
    log_weight = jnp.where(inside, sharpness * jnp.where(inside, log_plan, 0) + match, LOG_ZERO)
    at_target = jnp.take_along_axis(log_weight, jnp.maximum(target, 0)[..., None], axis=2)[..., 0]
    aligned = (target >= 0) & (at_target > LOG_ZERO / 2)
    matches = jnp.where(aligned, at_target, 0).sum(1)
    openings = _gap_count(jnp.where(aligned, target, -1), x_lengths, y_lengths)
    return log_partition(log_weight, x_lengths, y_lengths, opening) - matches + opening * openings


@jax.custom_vjp
def log_partition(
    log_weight: AllPairs, x_lengths: Lengths, y_lengths: Lengths, opening: Scalar
) -> Float[Array, " batch"]:
    """Compute the logarithm of the summed weights of all alignments of each pair.

    Arguments are as in `posterior`; a gap at an end costs `opening` too. The derivative by the weight of a match is its
    posterior, which the forward and the backward pass compute; automatic differentiation would keep every step of every
    row.
    """
    prefixes = _forward_pass(_Paths.of_pairs(log_weight, None, x_lengths, y_lengths), opening, opening)
    return prefixes.total + prefixes.total_scale


def _partition_forward(log_weight, x_lengths, y_lengths, opening):
    paths = _Paths.of_pairs(log_weight, None, x_lengths, y_lengths)
    prefixes, slopes = jax.jvp(lambda o: _forward_pass(paths, o, o), (opening,), (jnp.ones_like(opening),))
    return prefixes.total + prefixes.total_scale, (paths, opening, prefixes, slopes.total)


def _partition_backward(residuals, cotangent):
    paths, opening, prefixes, slope = residuals
    suffixes = _forward_pass(paths.reversed(paths.log_weight.shape[2]), opening, opening)
    match = _match_posterior(paths.log_weight, prefixes, suffixes)
    return match * cotangent[:, None, None], None, None, (slope * cotangent).sum()


log_partition.defvjp(_partition_forward, _partition_backward)


def posterior(
    log_weight: Weights,
    first: Firsts | None,
    x_lengths: Lengths,
    y_lengths: Lengths,
    gap_costs: tuple[Scalar, Scalar],
    columns: int,
) -> Weights:
    """Compute the probability that each pair of residues is aligned (forward-backward algorithm).

    `log_weight` holds weights of matches in nats, `LOG_ZERO` for none and beyond the lengths; `first` the first column
    of each row's window, as `rising` makes them, or None if each row holds all columns. `gap_costs` are the nats of a
    gap between matches, and of a gap at an end. `columns` is the padded length of y.
    """
    paths = _Paths.of_pairs(log_weight, first, x_lengths, y_lengths)
    both_ways = jax.tree.map(lambda *pair: jnp.concatenate(pair), paths, paths.reversed(columns))
    prefixes, suffixes = zip(*(jnp.split(x, 2) for x in _forward_pass(both_ways, *gap_costs)), strict=True)
    return _match_posterior(log_weight, Prefixes(*prefixes), Prefixes(*suffixes))


def rising(first: Firsts, y_lengths: Lengths) -> Firsts:
    """Make first columns that never fall and lie within y, from windows that hold nothing where they do not."""
    return jax.lax.cummax(jnp.minimum(first, jnp.maximum(y_lengths - 1, 0)[:, None]), axis=1)


def shifted(nodes: Array, by: Lengths) -> Array:
    """Move windows `by` nodes to the right; the last node of a window stands for all nodes that follow."""
    last = nodes.shape[1] - 1
    place = jnp.minimum(jnp.arange(last + 1) + by[:, None], last)
    return jnp.take_along_axis(nodes, place, axis=1, mode="promise_in_bounds")


def _match_posterior(log_weight: Weights, before: Prefixes, after: Prefixes) -> Weights:
    """Compute the posterior from prefixes, and from suffixes in reverse order."""
    scale = before.scale + after.scale[:, ::-1] - before.total_scale[:, None] - before.total[:, None]
    return jnp.exp(jnp.minimum(before.before + log_weight + after.before[:, ::-1, ::-1] + scale[:, :, None], 0))


def _forward_pass(paths: _Paths, opening: Scalar, terminal: Scalar) -> Prefixes:
    """Sum the weights of all alignments row by row. The start must not lie right of its row's window.

    A gap costs `opening` nats between two matches, `terminal` before the first and after the last.
    """
    batch, rows, width = paths.log_weight.shape
    # One row more, without matches: its nodes follow the last row.
    log_weight = jnp.pad(paths.log_weight, ((0, 0), (0, 1), (0, 0)), constant_values=LOG_ZERO)
    first = jnp.zeros((batch, rows), jnp.int32) if paths.first is None else paths.first
    first = jnp.pad(first, ((0, 0), (0, 1)), mode="edge")
    barrier = jax.lax.optimization_barrier  # or XLA recomputes, for every use, what is cheap but used often

    def step(carry, row):
        states, scale = carry
        i, weight, begin, by = row
        if paths.first is not None:
            states = barrier(_States(*(shifted(x, by) for x in states)))
        states = barrier(_entered(states, paths.start, i, begin, terminal))
        every = barrier(_log_add(*states))
        top = jax.lax.stop_gradient(jnp.round(every.max(axis=1, keepdims=True)))
        top = jnp.where(top > LOG_ZERO / 2, top, 0)
        before, scale = (every - top)[:, :width], scale + top[:, 0]
        first_gap = jnp.where(paths.start[:, :1] == i, terminal, opening)
        x = _log_add(states.match_or_y - top - first_gap, states.x - top)
        matched = before + weight
        y_overhangs = begin[:, None] + jnp.arange(1, width + 1) < paths.end[:, 1:]
        overhangs = y_overhangs.astype(matched.dtype) + (i + 1 < paths.end[:, :1])
        last = jax.nn.logsumexp(matched - terminal * overhangs, axis=1)
        states = _States(_match_then_gap(matched, opening), x)
        return (states, scale), (before, scale, last)

    nothing = jnp.full((batch, width + 2), LOG_ZERO)
    by = jnp.diff(first, axis=1, prepend=first[:, :1])
    per_row = jnp.arange(rows + 1), log_weight.swapaxes(0, 1), first.T, by.T
    _, (before, scale, last) = jax.lax.scan(step, (_States(nothing, nothing), jnp.zeros(batch)), per_row)
    # An alignment ends with its last match and the overhangs behind it, or has no match at all.
    no_match = -terminal * (paths.end > paths.start).sum(axis=1)
    total_scale = jax.lax.stop_gradient(jnp.maximum((scale + jnp.round(last)).max(axis=0), 0))
    total = jax.nn.logsumexp(jnp.concatenate([scale - total_scale + last, (no_match - total_scale)[None]]), axis=0)
    return Prefixes(before[:rows].swapaxes(0, 1), scale[:rows].T, total, total_scale)


def _entered(states: _States, start, row: Int[Array, ""], begin: Lengths, terminal) -> _States:
    """Enter alignments at their start, and at the nodes right of it by a gap, where they start in this row."""
    place, here = begin[:, None] + jnp.arange(states.x.shape[1]), start[:, 1:]
    entering = jnp.where(place == here, 0, jnp.where(place > here, -terminal, LOG_ZERO))
    starts = start[:, :1] == row
    return _States(jnp.where(starts, entering, states.match_or_y), jnp.where(starts, LOG_ZERO, states.x))


def _match_then_gap(log_match: Float[Array, "batch width"], opening) -> Float[Array, "batch width+2"]:
    """Sum what ends at each node with a match, or with unaligned residues of y after a match to the left."""
    batch, width = log_match.shape
    blocks = -(-(width + 2) // _BLOCK)
    matched = jnp.pad(log_match, ((0, 0), (1, blocks * _BLOCK - width - 1)), constant_values=LOG_ZERO)
    barrier = jax.lax.optimization_barrier
    matched = barrier(matched.reshape(-1, _BLOCK).T)  # blocks side by side: sums and maxima of whole vectors
    top = jax.lax.stop_gradient(jnp.maximum(matched.max(axis=0), LOG_ZERO))
    weight = barrier(jnp.exp(matched - top + _ROOM))
    ones = jnp.ones((_BLOCK, _BLOCK))
    within = jnp.concatenate([jnp.eye(_BLOCK) + jnp.exp(-opening) * jnp.tril(ones, -1), ones[:1]])
    sums = jnp.matmul(within, weight, precision="highest")
    of_block = (top - _ROOM + jnp.log(jnp.maximum(sums[_BLOCK], _SMALLEST))).reshape(batch, blocks)
    left = jax.lax.associative_scan(_log_add, of_block[:, :-1], axis=1)
    left = jnp.pad(left, ((0, 0), (1, 0)), constant_values=LOG_ZERO).reshape(-1) - opening
    scale = jax.lax.stop_gradient(jnp.maximum(top, left))
    own, others, scale = barrier((jnp.exp(top - scale), jnp.exp(left - scale + _ROOM), scale))
    total = barrier(scale - _ROOM + jnp.log(jnp.maximum(sums[:_BLOCK] * own + others, _SMALLEST)))
    return total.T.reshape(batch, -1)[:, : width + 2]


def _log_add(a: Array, b: Array) -> Array:
    """Compute logaddexp of finite numbers to float32's digits of 1: twice as fast as `jnp.logaddexp`."""
    return jnp.maximum(a, b) + jnp.log(1 + jnp.exp(-jnp.abs(a - b)))


def _gap_count(target: Target, x_lengths: Lengths, y_lengths: Lengths) -> Float[Array, " batch"]:
    """Count runs of unaligned residues of x, and of y, between two matches or at an end."""
    aligned, row = target >= 0, jnp.arange(target.shape[1])
    rows, columns = jnp.where(aligned, row, -1), jnp.where(aligned, target, -1)
    last_row, last_column = (  # of the matches before each row; -1 stands for the beginning
        jnp.pad(jax.lax.cummax(x, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1) for x in (rows, columns)
    )
    between = (aligned & (row - last_row > 1)).sum(1) + (aligned & (target - last_column > 1)).sum(1)
    at_end = (x_lengths - rows.max(1) > 1).astype(jnp.int32) + (y_lengths - columns.max(1) > 1)
    return (between + at_end).astype(jnp.float32)
