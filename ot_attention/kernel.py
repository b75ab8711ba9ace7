"""Matrices over the augmented support, as the band's tiles and the dustbin's vectors, and their products."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ot_attention import support
from ot_attention.axes import SequenceAxis
from ot_attention.backends import Band, RemakingBand
from ot_attention.spec import AllColumns, AllRows, Columns, Rows


class DustbinEntries(NamedTuple):
    """Last column and row of a kernel, and the entry where they meet."""

    column: Rows
    row: Columns
    corner: Float[Array, "N 1"]


class Kernel(NamedTuple):
    """Scores, `exp` of scores or a plan: 0 (scores: anything, minus infinity once shifted) outside the support.

    Vectors always have an entry for the dustbin, also where there is none.
    """

    band: Band
    tiles: PyTree[Array]  # only the band looks inside
    bin: DustbinEntries | None

    @property
    def axis(self) -> SequenceAxis:
        return self.band.sequence_axis()

    def shift(self, f: AllRows, g: AllColumns) -> "Kernel":
        """Return `S + f_i + g_j`."""
        return self._remade(self.band.shift(self.tiles, f, g), lambda entry, f, g: entry + f + g, *_at_bin(f, g))

    def map(self, function: Callable[[Array], Array]) -> "Kernel":
        """Apply a function to every entry, also outside the support. For bands whose tiles are arrays."""
        return self._remade(function(self.tiles), function)

    def exp(self) -> "Kernel":
        return self._remade(self.band.exp(self.tiles), jnp.exp)

    def modulate(self, *fields: tuple[Float[Array, "N all_rows _"], Float[Array, "N all_columns _"]]) -> "Kernel":
        """Return `K_ij` times the sum of fields `x_i . y_j`, each of low rank."""
        tiles = self.band.modulate(self.tiles, *((x[:, :-1], y[:, :-1]) for x, y in fields))
        x, y = (jnp.concatenate(side, -1) for side in zip(*fields, strict=True))
        return self._remade(tiles, lambda entry, x, y: entry * (x * y).sum(-1), *_at_bin(x, y))

    def minus(self, other: "Kernel") -> "Kernel":
        return self._remade(self.band.minus(self.tiles, other.tiles), jnp.subtract, other.bin)

    def multiplied(self, other: "Kernel") -> "Kernel":
        """Multiply entry by entry; 0 where this kernel is 0."""

        def product(x, y):
            return jnp.where(x == 0, 0, x * y)

        return self._remade(product(self.tiles, other.tiles), product, other.bin)

    def times(self, x: Float[Array, "N all_columns ..."]) -> Float[Array, "N all_rows ..."]:
        """Return `K x`, for a vector or several columns at once."""
        residues = self.band.times(self.tiles, x[:, :-1])
        if self.bin is None:
            return support.with_dustbin(residues)
        column, row, corner = (z.reshape(z.shape + (1,) * (x.ndim - 2)) for z in self.bin)
        dustbin = self.axis.sum((row * x[:, :-1]).sum(1, keepdims=True)) + corner * x[:, -1:]
        return jnp.concatenate([residues + column * x[:, -1:], dustbin], 1)

    def transpose_times(self, x: AllRows) -> AllColumns:
        """Return `K^T x`."""
        residues = self.band.transpose_times(self.tiles, x[:, :-1])
        if self.bin is None:
            return support.with_dustbin(residues)
        column, row, corner = self.bin
        dustbin = self.axis.sum((column * x[:, :-1]).sum(1, keepdims=True)) + corner * x[:, -1:]
        return jnp.concatenate([residues + row * x[:, -1:], dustbin], 1)

    def scale_once(self, a: AllRows, b: AllColumns) -> tuple[AllRows, AllColumns]:
        """Compute the scalings of one step, `u = a / (K 1)` and `v = b / (K^T u)`, for a band that remakes entries."""
        band = cast(RemakingBand, self.band)
        if self.bin is None:
            u, sums = band.scale_once(self.tiles, a[:, :-1], None)
            return support.with_dustbin(u), support.divide(b, support.with_dustbin(sums))
        column, row, corner = self.bin
        u_bin = support.divide(a[:, -1:], self.axis.sum(row.sum(1, keepdims=True)) + corner)
        u, sums = band.scale_once(self.tiles, a[:, :-1], column)
        bin_sum = self.axis.sum((column * u).sum(1, keepdims=True)) + corner * u_bin
        return support.append(u, u_bin), support.divide(b, support.append(sums + row * u_bin, bin_sum))

    def row_max(self) -> AllRows:
        residues = self.band.row_max(self.tiles)
        if self.bin is None:
            return support.with_dustbin(residues, -jnp.inf)
        column, row, corner = self.bin
        highest = self.axis.max(row.max(-1, keepdims=True))
        return jnp.concatenate([jnp.maximum(residues, column), jnp.maximum(highest, corner)], 1)

    def column_max(self) -> AllColumns:
        residues = self.band.column_max(self.tiles)
        if self.bin is None:
            return support.with_dustbin(residues, -jnp.inf)
        column, row, corner = self.bin
        highest = self.axis.max(column.max(-1, keepdims=True))
        return jnp.concatenate([jnp.maximum(residues, row), jnp.maximum(highest, corner)], 1)

    def _remade(self, tiles: PyTree[Array], function: Callable[..., Array], *others) -> "Kernel":
        """Return a kernel of new tiles; the dustbin's entries, if any, are mapped together with the others'."""
        return Kernel(self.band, tiles, self.bin and DustbinEntries(*map(function, self.bin, *others)))


def _at_bin(x: Float[Array, "N all_rows ..."], y: Float[Array, "N all_columns ..."]):
    """Return the entries of x and of y that meet in the dustbin's column, its row and its corner."""
    x_bin, y_bin = x[:, -1:], y[:, -1:]
    return (x[:, :-1], x_bin, x_bin), (y_bin, y[:, :-1], y_bin)
