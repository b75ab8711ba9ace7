"""Backend `xla`: the band in blocks, for any device.

The longer of the two sequences is cut into blocks of `block` positions. A block holds the rows whose length-scaled
diagonal falls into it, at most `block` of them, and the `block + 2 W` columns that their windows can reach. Short
sequences, of which blocks would cover nearly all, have one block.

Vectors over rows or columns stay flat, `[N, L]`; `N` counts batch elements and heads.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int, Shaped

from ot_attention import support
from ot_attention.axes import ALONE, SequenceAxis
from ot_attention.spec import AllColumns, AllRows, Columns, Implementation, Rows, Size
from ot_attention.support import Layout

_MIB = 2**20
# Tiles at a time. 4 MiB fit a CPU's cache. On a GPU a product over the tiles must outlast its launch, some 10
# microseconds, and fill the machine: an H100 reads 256 MiB in 80 microseconds (by arithmetic, not measured).
_GROUP_BYTES = {"cpu": 4 * _MIB, "gpu": 256 * _MIB}
_MOST_HEADS = 64  # at a time, of a number that is a symbol
_PRECISION = "highest"  # float32 products stay float32 on devices that would round them to bfloat16
Tiles = Float[Array, "N blocks block reach"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "last", "row_start", "column_start", "places"],
    meta_fields=["rows", "columns", "block", "reach"],
)
class Band:
    """Cells of the support, and their places in tiles `[N, blocks, block, reach]` of consecutive rows and columns."""

    def __init__(self, first, last, row_start, column_start, places, rows, columns, block, reach):
        self.first, self.last = first, last  # [N, Lq], windows of all rows
        self.row_start = row_start  # [N, blocks + 1], of each tile and past the last; a tile may run past its last row
        self.column_start = column_start  # [N, blocks]; a tile may run past the last column
        self.places = places  # [N, 1, block] and [N, 1, reach], of rows and columns in a tile
        self.rows, self.columns, self.block, self.reach = rows, columns, block, reach

    @staticmethod
    def implementation() -> Implementation:
        return "xla"

    def sequence_axis(self) -> SequenceAxis:
        return ALONE

    @classmethod
    def create(cls, layout: Layout, rows: Size, columns: Size, block: int | None = None) -> "Band":
        (first, last), _, n_q, n_k, band, diagonal = layout
        cut = None if diagonal is None else rows  # the longer of the two, unless they are parts of one sequence
        block, reach, blocks = block_shape(rows, columns, band, block, cut)
        # Zeros from lengths, for `vmap` over a mesh of explicit axes: JAX refuses constants within a `cond` there.
        none = (n_q - n_q)[:, None]
        places = tuple(none[:, None] + jnp.arange(size, dtype=jnp.int32) for size in (block, reach))
        if blocks == 1:
            row_start = jnp.concatenate([none, none + rows], 1)
            return cls(first, last, row_start, none, places, rows, columns, block, reach)
        number = jnp.arange(blocks + 1, dtype=jnp.int32)
        if diagonal is not None and band is not None:
            row_start = none + jnp.minimum(number * block, rows)
            column_start = jnp.maximum(row_start[:, :-1] + (diagonal - band), 0)
            return cls(first, last, row_start, column_start, places, rows, columns, block, reach)
        row_start = jnp.minimum(first_row_at(number * block, n_q[:, None], n_k[:, None]), rows)
        column_start = jnp.take_along_axis(first, jnp.minimum(row_start[:, :-1], rows - 1), axis=1)
        return cls(first, last, row_start, column_start, places, rows, columns, block, reach)

    @classmethod
    def scores(cls, q, k, layout: Layout, scale: float):
        created = cls.create(layout, q.shape[1], k.shape[1])
        return created, created.outer(q * scale, k)

    @staticmethod
    def heads_at_once(number: Size, rows: Size, columns: Size, band: int | None, itemsize: int) -> int:
        """Return the largest known divisor of `number` heads whose tiles fit `_GROUP_BYTES`, at least 1.

        Sizes may be symbols of `jax.export`: heads of an unknown size are taken one at a time.
        """
        block, width, blocks = block_shape(rows, columns, band)
        size_of_one = block * width * blocks * itemsize
        if is_symbolic_dim(size_of_one):
            return 1
        at_most = max(1, _GROUP_BYTES.get(support.platform(), 4 * _MIB) // size_of_one)
        at_most = min(at_most, _MOST_HEADS if is_symbolic_dim(number) else number)
        return max(size for size in range(1, at_most + 1) if number % size == 0)

    def row_windows(self) -> tuple[Int[Array, "N rows"], Int[Array, "N rows"]]:
        return self.first, self.last

    @property
    def _whole(self) -> bool:
        return self.column_start.shape[1] == 1

    def take_rows(self, x: Shaped[Array, "N rows ..."]) -> Shaped[Array, "N blocks block ..."]:
        """Put rows in tile order; a place without a row of its own repeats another tile's row, or is 0."""
        return x[:, None] if self._whole else _windows(x, self.row_start[:, :-1], self.block)

    def take_columns(self, x: Float[Array, "N columns ..."]) -> Float[Array, "N blocks reach ..."]:
        return x[:, None] if self._whole else _windows(x, self.column_start, self.reach)

    def put_rows(self, tiles: Float[Array, "N blocks block ..."], method: str = "add", none: float = 0.0):
        """Put rows in their own order, to `[N, rows, ...]`; places without a row of their own must be `none`."""
        if self._whole:
            return tiles[:, 0]
        return _over_windows(method, tiles, self.row_start[:, :-1], self.rows, none)

    def _over_columns(self, method: str, tiles: Float[Array, "N blocks reach ..."], none: float):
        """Reduce the entries of several blocks for the same column, to `[N, columns, ...]`."""
        if self._whole:
            return tiles[:, 0]
        return _over_windows(method, tiles, self.column_start, self.columns, none)

    def outer(self, x: Float[Array, "N rows width"], y: Float[Array, "N columns width"]) -> Tiles:
        """Return `x_i . y_j` for every cell of the tiles, in the support or not."""
        return jnp.einsum("nbid,nbjd->nbij", self.take_rows(x), self.take_columns(y), precision=_PRECISION)

    def mask(self, tiles: Tiles, fill: float) -> Tiles:
        first, last = (self.take_rows(x)[..., None] for x in (self.first, self.last))
        place, other_place = self.places
        column = (self.column_start[:, :, None] + other_place)[:, :, None]
        rows = (self.row_start[:, 1:] - self.row_start[:, :-1])[:, :, None, None]
        in_block = place[..., None] < rows
        return jnp.where((column >= first) & (column <= last) & in_block, tiles, fill)

    def exp(self, tiles):
        return jnp.exp(tiles)

    def modulate(self, tiles, *fields: tuple[Float[Array, "N rows _"], Float[Array, "N columns _"]]):
        return tiles * self.outer(*(jnp.concatenate(side, -1) for side in zip(*fields, strict=True)))

    def minus(self, tiles, others):
        return tiles - others

    def shift(self, tiles, row: AllRows, column: AllColumns):
        # XLA makes sum, mask and `exp` in one pass over the products.
        shifted = tiles + self.take_rows(row[:, :-1])[..., None] + self.take_columns(column[:, :-1])[:, :, None, :]
        return self.mask(shifted, -jnp.inf)

    def times(self, tiles, x: Float[Array, "N columns ..."]) -> Float[Array, "N rows ..."]:
        return self.put_rows(jnp.einsum("nbij,nbj...->nbi...", tiles, self.take_columns(x), precision=_PRECISION))

    def apply(self, tiles, u: Rows, v: Columns, values) -> Array:
        return u[..., None] * self.times(tiles, v[..., None] * values)

    def transpose_times(self, tiles, x: Float[Array, "N rows ..."]) -> Float[Array, "N columns ..."]:
        # Cells outside the support must be 0: slots without a row hold another row's x.
        products = jnp.einsum("nbij,nbi...->nbj...", tiles, self.take_rows(x), precision=_PRECISION)
        return self._over_columns("add", products, 0.0)

    def row_max(self, tiles) -> Rows:
        return self.put_rows(tiles.max(-1), "max", -jnp.inf)

    def column_max(self, tiles) -> Columns:
        return self._over_columns("max", tiles.max(-2), -jnp.inf)


def block_shape(
    rows: Size, columns: Size, band: int | None, block: int | None = None, cut: Size | None = None
) -> tuple[Size, Size, Size]:
    """Return the rows and columns of a tile, and the number of tiles. cut: the length that is cut into blocks."""
    if band is None:
        return rows, columns, 1
    if block is None:  # larger ones copy columns less often, but reach further outside a narrow band
        block = 64 if band < 128 else 128
    if is_symbolic_dim(rows) or is_symbolic_dim(columns):
        return block, block + 2 * band, -(-jax.core.max_dim(rows, columns) // block)
    width, blocks = block + 2 * band, math.ceil((cut or max(rows, columns)) / block)
    # With so little outside the band, moving rows and columns in and out of tiles costs more than it saves.
    if blocks * block * width > 0.75 * rows * columns:
        return rows, columns, 1
    return block, width, blocks


def first_row_at(position: Int[Array, "blocks"], n_q, n_k) -> Int[Array, "N blocks"]:
    """Return the least row i with `(i + 1/2) longer / n_q >= position`, along the longer sequence; n are `[N, 1]`."""
    longer = jnp.maximum(jnp.maximum(n_q, n_k), 1)
    # i >= y - 1/2 with y = position n_q / longer = whole + rest / longer
    whole, rest = support.divided_product(position, n_q, longer)
    return whole + (2 * rest > longer)


def _windows(x: Shaped[Array, "N length ..."], start: Int[Array, "N blocks"], width: Size) -> Shaped[Array, "..."]:
    """Return `x[n, start : start + width]` for every block, 0 past the end."""
    # Windows are copied as a whole, entries by their index one by one.
    padded = jnp.pad(x, ((0, 0), (0, width)) + ((0, 0),) * (x.ndim - 2))
    one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width)
    return jax.vmap(jax.vmap(one, (None, 0)))(padded, start)


def _over_windows(method: str, tiles: Float[Array, "N blocks width ..."], start, length: Size, none: float):
    """Reduce what `_windows` takes apart, from `none`, to `[N, length, ...]`."""
    number, _, width, *rest = tiles.shape
    dimensions = jax.lax.ScatterDimensionNumbers(tuple(range(1, tiles.ndim - 1)), (), (0,))
    scatter = functools.partial(getattr(jax.lax, f"scatter_{method}"), dimension_numbers=dimensions)
    of_one = functools.partial(scatter, mode="promise_in_bounds")
    padded = jnp.full((number, length + width, *rest), none, tiles.dtype)
    return jax.vmap(of_one)(padded, start[..., None], tiles)[:, :length]
