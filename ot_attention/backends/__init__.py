"""Protocols of what a backend of `sinkhorn_attention` brings; `registry` lists the backends there are.

A backend brings either a `Band`, above which `ot_attention.sinkhorn` loops, or its own `attend`, where a whole solve
stays on the chip.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from ot_attention.spec import Heads, SinkhornSpec

Attended = tuple[
    Float[Array, "heads rows value"],
    Float[Array, "heads all_rows"],
    Float[Array, "heads all_columns"],
    Float[Array, "heads"],
]


class Backend(Protocol):
    """Solver of the problem of every head; a module may be one."""

    @property
    def platform(self) -> str | None:
        """Platform whose calls prefer this backend ("gpu", "tpu"), None if it runs on any."""

    def attend(self, heads: Heads, spec: SinkhornSpec, /) -> Attended:
        """Return the output, f, g (dustbin last, 0 without one) and the residual, differentiable as the spec says.

        Padding of q, k and v may hold anything, and their dtypes may differ.
        """

    def unsupported_reason(self, heads: Heads, spec: SinkhornSpec, /) -> str | None:
        """Return why the backend cannot do this and what to change, or None."""


@runtime_checkable
class Band(Protocol):
    """Cells of the support, dustbin excepted, and products with matrices over them.

    "Tiles" are scores, and after `exp` a matrix K that is 0 outside the support. Only the band looks inside them.
    """

    @classmethod
    def scores(cls, q, k, n_q, n_k, band: int | None, scale: float, /) -> "tuple[Band, Any]":
        """Return the band and the scores `scale q_i . k_j` in it."""

    def row_windows(self) -> tuple[Int[Array, "N rows"], Int[Array, "N rows"]]:
        """Return the first and last column (inclusive) in the support of each row."""

    @staticmethod
    def heads_at_once(number: int, rows: int, columns: int, band: int | None, itemsize: int, /) -> int:
        """Return how many of `number` heads to work on at a time: a divisor of `number`."""

    def shift(self, tiles, row: Float[Array, "N all_rows"], column: Float[Array, "N all_columns"], /) -> Any:
        """Return `S + f_i + g_j`."""

    def exp(self, tiles, /) -> Any:
        """Return `exp(S)`."""

    def scale_by(self, tiles, row: Float[Array, "N rows"], column: Float[Array, "N columns"], /) -> Any:
        """Return `u_i K_ij v_j`."""

    def modulate(self, tiles, /, *fields: tuple[Float[Array, "N rows _"], Float[Array, "N columns _"]]) -> Any:
        """Return `K_ij` times the sum of fields `x_i . y_j`."""

    def minus(self, tiles, others, /) -> Any:
        """Return the difference of two matrices."""

    def times(self, tiles, x: Float[Array, "N columns ..."], /) -> Float[Array, "N rows ..."]:
        """Return `K x`, for a vector or several columns at once."""

    def transpose_times(self, tiles, x: Float[Array, "N rows ..."], /) -> Float[Array, "N columns ..."]:
        """Return `K^T x`."""

    def apply(self, tiles, u: Float[Array, "N rows"], v: Float[Array, "N columns"], values, /) -> Array:
        """Return `diag(u) K diag(v) values`."""

    def row_max(self, tiles, /) -> Float[Array, "N rows"]:
        """Return the largest score of each row, minus infinity without any."""

    def column_max(self, tiles, /) -> Float[Array, "N columns"]:
        """Return the largest score of each column."""


@runtime_checkable
class RemakingBand(Band, Protocol):
    """Band whose products make entries anew, so that new potentials cost nothing; it makes a whole step in one call."""

    def scale_once(
        self, tiles, a: Float[Array, "N rows"], bin_column: Float[Array, "N rows"] | None, /
    ) -> tuple[Float[Array, "N rows"], Float[Array, "N columns"]]:
        """Return the scalings `u = a / (K 1 + bin_column)`, and `K^T u`."""
