"""A matrix over the augmented support, the band's tiles and the dustbin's vectors, and its products."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ot_attention import support
from ot_attention.banded_xla import Band


class Dustbin(NamedTuple):
    """The last column and row of a kernel, and where they meet."""

    column: Float[Array, "N rows"]
    row: Float[Array, "N columns"]
    corner: Float[Array, "N 1"]


class Kernel(NamedTuple):
    """Scores, `exp` of scores or a plan: 0 (as scores minus infinity) outside the support.

    Vectors always have an entry for the dustbin. Without one, it costs nothing but that entry.
    """

    band: Band
    tiles: Float[Array, "N blocks block reach"]
    bin: Dustbin | None

    def shift(self, f: Float[Array, "N all_rows"], g: Float[Array, "N all_columns"]) -> "Kernel":
        """`S + f_i + g_j`."""
        tiles = self.band.shift(self.tiles, f[:, :-1], g[:, :-1])
        if self.bin is None:
            return Kernel(self.band, tiles, None)
        column, row, corner = self.bin
        f_bin, g_bin = f[:, -1:], g[:, -1:]
        shifted = Dustbin(column + f[:, :-1] + g_bin, row + f_bin + g[:, :-1], corner + f_bin + g_bin)
        return Kernel(self.band, tiles, shifted)

    def map(self, function: Callable[[Array], Array]) -> "Kernel":
        """A function of every entry, also of those outside the support."""
        return Kernel(self.band, function(self.tiles), self.bin and Dustbin(*map(function, self.bin)))

    def exp(self) -> "Kernel":
        return self.map(jnp.exp)

    def scale(self, u: Float[Array, "N all_rows"], v: Float[Array, "N all_columns"]) -> "Kernel":
        """`u_i K v_j`."""
        tiles = self.band.scale(self.tiles, u[:, :-1], v[:, :-1])
        if self.bin is None:
            return Kernel(self.band, tiles, None)
        column, row, corner = self.bin
        u_bin, v_bin = u[:, -1:], v[:, -1:]
        return Kernel(
            self.band, tiles, Dustbin(column * u[:, :-1] * v_bin, row * u_bin * v[:, :-1], corner * u_bin * v_bin)
        )

    def modulate(self, x: Float[Array, "N all_rows m"], y: Float[Array, "N all_columns m"]) -> "Kernel":
        """`K_ij (x_i . y_j)`, the plan times a field of low rank."""
        tiles = self.tiles * self.band.outer(x[:, :-1], y[:, :-1])
        if self.bin is None:
            return Kernel(self.band, tiles, None)
        column, row, corner = self.bin
        x_bin, y_bin = x[:, -1:], y[:, -1:]
        fields = (x[:, :-1] * y_bin).sum(-1), (x_bin * y[:, :-1]).sum(-1), (x_bin * y_bin).sum(-1)
        return Kernel(self.band, tiles, Dustbin(column * fields[0], row * fields[1], corner * fields[2]))

    def minus(self, other: "Kernel") -> "Kernel":
        tiles = self.tiles - other.tiles
        if self.bin is None or other.bin is None:
            return Kernel(self.band, tiles, None)
        return Kernel(self.band, tiles, Dustbin(*map(jnp.subtract, self.bin, other.bin)))

    def multiplied(self, other: "Kernel") -> "Kernel":
        """Entry by entry; 0 where this is 0."""

        def product(x, y):
            return jnp.where(x == 0, 0, x * y)

        tiles = product(self.tiles, other.tiles)
        if self.bin is None or other.bin is None:
            return Kernel(self.band, tiles, None)
        return Kernel(self.band, tiles, Dustbin(*map(product, self.bin, other.bin)))

    def times(self, x: Float[Array, "N all_columns ..."]) -> Float[Array, "N all_rows ..."]:
        """`K x`, for a vector or for several columns at once."""
        residues = self.band.times(self.tiles, x[:, :-1])
        if self.bin is None:
            return support.with_dustbin(residues)
        column, row, corner = (z.reshape(z.shape + (1,) * (x.ndim - 2)) for z in self.bin)
        dustbin = (row * x[:, :-1]).sum(1, keepdims=True) + corner * x[:, -1:]
        return jnp.concatenate([residues + column * x[:, -1:], dustbin], 1)

    def transpose_times(self, x: Float[Array, "N all_rows"]) -> Float[Array, "N all_columns"]:
        """`K^T x`."""
        residues = self.band.transpose_times(self.tiles, x[:, :-1])
        if self.bin is None:
            return support.with_dustbin(residues)
        column, row, corner = self.bin
        dustbin = (column * x[:, :-1]).sum(1, keepdims=True) + corner * x[:, -1:]
        return jnp.concatenate([residues + row * x[:, -1:], dustbin], 1)

    def row_max(self) -> Float[Array, "N all_rows"]:
        residues = self.band.row_max(self.tiles)
        if self.bin is None:
            return support.with_dustbin(residues, -jnp.inf)
        column, row, corner = self.bin
        return jnp.concatenate([jnp.maximum(residues, column), jnp.maximum(row.max(-1, keepdims=True), corner)], 1)

    def column_max(self) -> Float[Array, "N all_columns"]:
        residues = self.band.column_max(self.tiles)
        if self.bin is None:
            return support.with_dustbin(residues, -jnp.inf)
        column, row, corner = self.bin
        return jnp.concatenate([jnp.maximum(residues, row), jnp.maximum(column.max(-1, keepdims=True), corner)], 1)
