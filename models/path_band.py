"""The pair HMM of long sequences, in a band that follows the best path. Memory grows with the sum of both lengths.

Three passes go over the scores `q_i . k_j`, none of which keeps them:

1. All pairs, a few rows at a time: the sums along rows and columns by which scores are normalised.
2. All pairs again: blocks of `size` x `size` residues. A block weighs as much as its best run of `size` pairs along a
   diagonal. The pair HMM of blocks, with gaps as long as blocks, finds the best path of blocks.
3. A band of lanes around this path: the weights of `pair_hmm.Problem`, a tile of antidiagonals at a time.

So an alignment is found wherever it lies, also where it leaves the diagonal by most of the length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import decoding, pair_hmm
from models.pair_hmm import LOG_ZERO, First, Gaps, LaneWeights, Lengths, Problem

_ROWS = 64  # that are computed at once
_TILE = 128  # antidiagonals that are computed at once
_BLOCK, _MOST_BLOCKS = 16, 1024  # residues of a block at least; blocks of a sequence at most

Vectors = Float[Array, "batch length channels"]


class Sides(NamedTuple):
    """Vectors whose products are scores in nats, and true lengths."""

    q: Vectors
    k: Vectors
    x_lengths: Lengths
    y_lengths: Lengths


def problem(sides: Sides, gaps: Gaps, match: Float[Array, ""], relaxation: float, lanes: int) -> Problem:
    """Make the problem of a band of `lanes` around the best path; `relaxation` is tau of the scores' half step."""
    f, g = half_step(sides, relaxation)
    one = jnp.ones_like
    # Two more channels add the potentials.
    q = jnp.concatenate([sides.q, (f + match)[..., None], one(f)[..., None]], -1)
    k = jnp.concatenate([sides.k, one(g)[..., None], g[..., None]], -1)
    normalised = sides._replace(q=q, k=k)
    first = around(best_blocks(normalised, gaps), sides.x_lengths, sides.y_lengths, lanes, _shape(sides))
    return Problem(lane_weights(normalised, first, lanes), first, sides.x_lengths, sides.y_lengths)


def half_step(sides: Sides, relaxation: float) -> tuple[Float[Array, "batch x_length"], Float[Array, "batch y_length"]]:
    """Compute the potentials of `pair_aligner`'s half step a few rows at a time."""
    q, k, x_lengths, y_lengths = sides
    x_inside, y_inside = _inside(q, x_lengths), _inside(k, y_lengths)

    def step(total, some):
        q, inside = some  # [batch, rows, ...]
        scores = jnp.where(y_inside[:, None], _products(q, k), LOG_ZERO)
        row = jax.nn.logsumexp(scores, axis=2)
        column = jax.nn.logsumexp(jnp.where(inside[:, :, None], scores, LOG_ZERO), axis=1)
        return jnp.logaddexp(total, column), row

    start = jnp.full(k.shape[:2], LOG_ZERO)
    columns, rows = jax.lax.scan(step, start, (_in_rows(q, _ROWS), _in_rows(x_inside, _ROWS)))
    rows = rows.swapaxes(0, 1).reshape(len(q), -1)[:, : q.shape[1]]
    sums = (rows, x_inside, y_lengths), (columns, y_inside, x_lengths)
    f, g = (jnp.where(inside, jnp.log(jnp.maximum(n, 1.0))[:, None] - total, 0) for total, inside, n in sums)
    return relaxation * f, relaxation * g


class Blocks(NamedTuple):
    """The best path of blocks: the block of y that each block of x is aligned with, or -1."""

    match: Int[Array, "batch blocks"]
    size: int


def best_blocks(sides: Sides, gaps: Gaps) -> Blocks:
    """Align blocks of residues by the pair HMM."""
    q, k, x_lengths, y_lengths = sides
    size = _BLOCK
    while max(q.shape[1], k.shape[1]) > size * _MOST_BLOCKS:
        size *= 2
    columns = -(-k.shape[1] // size)
    k = jnp.pad(k, ((0, 0), (0, columns * size - k.shape[1]), (0, 0)))
    y_inside = _inside(k, y_lengths)

    def run(some):
        """Return the best run of each block of a row of blocks, from sums along diagonals, some rows at a time."""
        q, inside = some
        rows = min(size, _ROWS)

        def add(runs, some):
            number, q, inside = some
            scores = jnp.where(inside[:, :, None] & y_inside[:, None], _products(q, k), 0)
            # Row t is shifted t places to the left, so that diagonals become columns.
            wide = jnp.pad(scores, ((0, 0), (0, 0), (0, rows))).reshape(len(q), -1)
            diagonals = jnp.pad(wide, ((0, 0), (0, rows))).reshape(len(q), rows, -1).sum(1)
            # These rows follow others of the block.
            ahead = jnp.pad(diagonals, ((0, 0), (0, size)))
            return runs + jax.lax.dynamic_slice_in_dim(ahead, number * rows, columns * size, axis=1), None

        parts = jnp.arange(size // rows), _in_rows(q, rows), _in_rows(inside, rows)
        runs, _ = jax.lax.scan(add, jnp.zeros((len(q), columns * size)), parts)
        return runs.reshape(len(q), columns, size).max(2)

    blocks = jax.lax.map(run, (_in_rows(q, size), _in_rows(_inside(q, x_lengths), size))).swapaxes(0, 1)
    opening, extension = gaps.opening + (size - 1) * gaps.extension, size * gaps.extension
    lengths = -(-x_lengths // size), -(-y_lengths // size)
    coarse = pair_hmm.of_all_pairs(blocks, *lengths)
    _, posterior = pair_hmm.posterior(coarse, Gaps(opening, extension, gaps.terminal, gaps.empty))
    return Blocks(decoding.decode(posterior, None, *lengths, blocks.shape[1:]).match, size)


def around(blocks: Blocks, x_lengths: Lengths, y_lengths: Lengths, lanes: int, shape: tuple[int, int]) -> First:
    """Compute the row of the first lane on each antidiagonal, so that the lanes lie around the path of the blocks.

    Between aligned blocks the path is straight. It leaves the first and the last of them along the diagonal until one
    sequence ends.
    """
    match, size = blocks
    block = jnp.arange(match.shape[1])
    first, last = jnp.argmax(match >= 0, 1), match.shape[1] - 1 - jnp.argmax(match[:, ::-1] >= 0, 1)

    def path(match, first, last, x_length, y_length):
        row_end, column_end = x_length - 1, y_length - 1
        found = match[first] >= 0
        row, column = jnp.minimum(block * size + size // 2, row_end), jnp.minimum(match * size + size // 2, column_end)
        head = jnp.minimum(row[first], column[first])
        tail = jnp.minimum(row_end - row[last], column_end - column[last])
        ends = (row[first] - head, column[first] - head), (row[last] + tail, column[last] + tail)
        # Blocks that are not aligned repeat the one before, and those before the first repeat the beginning.
        rows, columns = (
            jnp.where(jnp.arange(len(match)) < first, ends[0][n], x[jax.lax.cummax(jnp.where(match >= 0, block, 0))])
            for n, x in enumerate((row, column))
        )
        anchors = [
            jnp.concatenate([jnp.array([0, ends[0][n]]), x, jnp.array([ends[1][n], end])])
            for n, (x, end) in enumerate(((rows, row_end), (columns, column_end)))
        ]
        if_none = [
            jnp.minimum(jnp.arange(len(x)), 1) * end for x, end in zip(anchors, (row_end, column_end), strict=True)
        ]
        rows, columns = (jnp.where(found, x, none) for x, none in zip(anchors, if_none, strict=True))
        place = jnp.interp(jnp.arange(sum(shape) - 1, dtype=jnp.float32), (rows + columns) * 1.0, rows * 1.0)
        start = jnp.floor(place + 0.5).astype(jnp.int32)
        # Rounding may make steps of 2, which become two steps of 1: lanes that left them out would drift off the path.
        d = jnp.arange(len(start))
        start = jax.lax.cummin(jax.lax.cummax(start) - d) + d
        return jnp.clip(start - lanes // 2, 0, jnp.maximum(x_length - lanes, 0))

    return jax.vmap(path)(match, first, last, x_lengths, y_lengths).T


def lane_weights(sides: Sides, first: First, lanes: int) -> LaneWeights:
    """Compute the products of all pairs in the lanes, a tile of antidiagonals at a time."""
    q, k, x_lengths, y_lengths = sides
    tiles = -(-len(first) // _TILE)
    first = jnp.pad(first, ((0, tiles * _TILE - len(first)), (0, 0)), mode="edge")
    rows, columns = _TILE + lanes, 2 * _TILE + lanes
    q = jnp.pad(q, ((0, 0), (0, rows), (0, 0)))
    k = jnp.pad(k, ((0, 0), (columns, columns), (0, 0)))

    def tile(number):
        d = number * _TILE + jnp.arange(_TILE)
        firsts = jax.lax.dynamic_slice_in_dim(first, number * _TILE, _TILE)  # [tile, batch]

        def of_pair(q, k, firsts, x_length, y_length):
            row = firsts[0]
            column = d[0] - row - _TILE - lanes + 1  # of the first column that a lane may have
            products = _products(
                jax.lax.dynamic_slice_in_dim(q, row, rows)[None],
                jax.lax.dynamic_slice_in_dim(k, column + columns, columns)[None],
            )[0]
            i = firsts[:, None] + jnp.arange(lanes)
            j = d[:, None] - i
            inside = (i < x_length) & (j >= 0) & (j < y_length)
            found = products.reshape(-1)[(i - row) * columns + jnp.clip(j - column, 0, columns - 1)]
            return jnp.where(inside, found, LOG_ZERO)

        return jax.vmap(of_pair, in_axes=(0, 0, 1, 0, 0), out_axes=1)(q, k, firsts, x_lengths, y_lengths)

    found = jax.lax.map(tile, jnp.arange(tiles))
    return found.reshape(-1, *found.shape[2:])[: sum(_shape(sides)) - 1]


def _shape(sides: Sides) -> tuple[int, int]:
    return sides.q.shape[1], sides.k.shape[1]


def _inside(vectors: Vectors, lengths: Lengths):
    return jnp.arange(vectors.shape[1]) < lengths[:, None]


def _products(
    q: Float[Array, "batch rows channels"], k: Float[Array, "batch columns channels"]
) -> Float[Array, "batch rows columns"]:
    return jnp.einsum("bip,bjp->bij", q, k, precision="highest")


def _in_rows(x: Array, count: int) -> Array:
    """Cut the second axis into parts of `count` rows, which become the first axis."""
    parts = -(-x.shape[1] // count)
    x = jnp.pad(x, ((0, 0), (0, parts * count - x.shape[1]), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(x.shape[0], parts, count, *x.shape[2:]).swapaxes(0, 1)
