"""Bands of sequences that devices share, for any backend that brings a band.

A device holds its rows and, of the columns, those within W of them: its own and, in each product anew, what its two
neighbours send. Per half step these are two messages of W numbers a head, and of W vectors for products with q, k, v.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention import support
from ot_attention.axes import SequenceAxis
from ot_attention.backends import Band, RemakingBand
from ot_attention.spec import AllColumns, AllRows, Columns, Heads, Implementation, Rows
from ot_attention.support import Layout, Windows


def scores(kind: type[Band], heads: Heads, axis: SequenceAxis, reach: int, scale: float) -> tuple["SharedBand", Any]:
    """Return the band of this device's rows, of a kind that knows whole sequences, and the scores in it."""
    keys = axis.with_neighbours(heads.k, reach)
    inner, tiles = kind.scores(heads.q, keys, _layout(heads, axis, reach), scale)
    shared = SharedRemakingBand if isinstance(inner, RemakingBand) else SharedBand
    return shared(inner, axis, reach), tiles


def _layout(heads: Heads, axis: SequenceAxis, reach: int) -> Layout:
    """Return the support of this device's rows; position 0 of the columns is `reach` before its first row."""
    n, share, segments = heads.n_q, heads.q.shape[1], heads.segments
    start = axis.start(share)
    first_column = start - reach
    of_columns = None
    if segments is not None:
        of_columns = axis.with_neighbours(segments[0], reach), axis.with_neighbours(segments[1], reach)
    index = support.positions(n, share + 2 * reach) + first_column
    rows = support.within_segments(support.row_windows(support.positions(n, share, axis), n, n, reach), segments)
    columns = support.within_segments(support.column_windows(index, n, n, reach), of_columns)
    n_columns = jnp.clip(n - first_column, 0, share + 2 * reach)
    within = _within(rows, first_column, share + 2 * reach), _within(columns, start, share)
    return Layout(*within, axis.local(n, share), n_columns, reach, reach)


def _within(windows: Windows, start, length: int) -> Windows:
    """Return windows in positions from `start` on, without what lies outside of `length`.

    Windows that lie outside as a whole become empty ones at the near end, so that windows still never move back.
    """
    return Windows(jnp.clip(windows.first - start, 0, length), jnp.clip(windows.last - start, -1, length - 1))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=["axis", "reach"])
class SharedBand:
    """Band whose products exchange with the neighbours what lies within `reach` of a share's ends."""

    def __init__(self, inner: Band, axis: SequenceAxis, reach: int):
        self.inner, self.axis, self.reach = inner, axis, reach

    def implementation(self) -> Implementation:
        return self.inner.implementation()

    def sequence_axis(self) -> SequenceAxis:
        return self.axis

    def row_windows(self) -> tuple[Int[Array, "N rows"], Int[Array, "N rows"]]:
        return self.inner.row_windows()

    def shift(self, tiles, row: AllRows, column: AllColumns) -> Any:
        longer = jnp.concatenate([self._longer(column[:, :-1]), column[:, -1:]], 1)
        return self.inner.shift(tiles, row, longer)

    def exp(self, tiles) -> Any:
        return self.inner.exp(tiles)

    def modulate(self, tiles, *fields: tuple[Float[Array, "N rows _"], Float[Array, "N columns _"]]) -> Any:
        return self.inner.modulate(tiles, *((x, self._longer(y)) for x, y in fields))

    def minus(self, tiles, others) -> Any:
        return self.inner.minus(tiles, others)

    def times(self, tiles, x: Float[Array, "N columns ..."]) -> Float[Array, "N rows ..."]:
        return self.inner.times(tiles, self._longer(x))

    def transpose_times(self, tiles, x: Float[Array, "N rows ..."]) -> Float[Array, "N columns ..."]:
        return self._added(self.inner.transpose_times(tiles, x))

    def apply(self, tiles, u: Rows, v: Columns, values) -> Array:
        return self.inner.apply(tiles, u, self._longer(v), self._longer(values))

    def row_max(self, tiles) -> Rows:
        return self.inner.row_max(tiles)

    def column_max(self, tiles) -> Columns:
        return self.axis.to_neighbours(self.inner.column_max(tiles), self.reach, jnp.maximum, -jnp.inf)

    def _longer(self, x: Float[Array, "N columns ..."]) -> Float[Array, "N longer ..."]:
        return self.axis.with_neighbours(x, self.reach)

    def _added(self, x: Float[Array, "N longer ..."]) -> Float[Array, "N columns ..."]:
        return self.axis.to_neighbours(x, self.reach, jnp.add, 0.0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=["axis", "reach"])
class SharedRemakingBand(SharedBand):
    """Shared band that makes its entries anew."""

    inner: RemakingBand

    def scale_once(self, tiles, a: Rows, bin_column: Rows | None) -> tuple[Rows, Columns]:
        u, sums = self.inner.scale_once(tiles, a, bin_column)
        return u, self._added(sums)
