"""Protocols of what a backend of `sinkhorn_attention` brings; `registry` lists the backends there are.

A backend brings either a `Band`, above which `ot_attention.sinkhorn` loops, or its own `attend`, where a whole solve
stays on the chip.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from ot_attention.axes import SequenceAxis
from ot_attention.spec import AllColumns, AllRows, Columns, Heads, Implementation, Rows, SinkhornSpec, Size
from ot_attention.support import Layout

Attended = tuple[Float[Array, "N rows value"], AllRows, AllColumns, Float[Array, "N"], Int[Array, "N"]]


class Backend(Protocol):
    """Solver of the problem of every head; a module may be one."""

    @property
    def platform(self) -> str | None: ...  # whose calls prefer this backend ("gpu", "tpu"); None if it runs on any

    def attend(self, heads: Heads, spec: SinkhornSpec, /) -> Attended:
        """Return output, f, g (dustbin last, 0 without one), residual and base steps made, differentiable as specified.

        Padding of q, k and v may hold anything, and their dtypes may differ.
        """

    # Why the backend cannot do this and what to change, or None.
    def unsupported_reason(self, heads: Heads, spec: SinkhornSpec, /) -> str | None: ...


@runtime_checkable
class Band(Protocol):
    """Cells of the support, dustbin excepted, and products with matrices over them.

    "Tiles" are scores S, and after `exp` a matrix K that is 0 outside the support. Only the band looks inside them.
    """

    @staticmethod
    def implementation() -> Implementation: ...  # whose band this is
    def sequence_axis(self) -> SequenceAxis: ...  # of the devices that share its sequences
    # The band, and the scores `scale q_i . k_j` in it, from q `[N, rows, width]` and k `[N, columns, width]`.
    # Outside the support they are anything until `shift`, minus infinity after it.
    @classmethod
    def scores(cls, q, k, layout: Layout, scale: float, /) -> "tuple[Band, Any]": ...
    # First and last column (inclusive) in the support of each row.
    def row_windows(self) -> tuple[Int[Array, "N rows"], Int[Array, "N rows"]]: ...
    # How many of `number` heads to work on at a time: a divisor of `number`.
    @staticmethod
    def heads_at_once(number: Size, rows: Size, columns: Size, band: int | None, itemsize: int, /) -> int: ...
    def shift(self, tiles, row: AllRows, column: AllColumns, /) -> Any: ...  # S + f_i + g_j
    def exp(self, tiles, /) -> Any: ...
    # K_ij times the sum of fields x_i . y_j
    def modulate(self, tiles, /, *fields: tuple[Float[Array, "N rows _"], Float[Array, "N columns _"]]) -> Any: ...
    def minus(self, tiles, others, /) -> Any: ...
    # K x and K^T x; the first for several columns at once too
    def times(self, tiles, x: Float[Array, "N columns ..."], /) -> Float[Array, "N rows ..."]: ...
    def transpose_times(self, tiles, x: Float[Array, "N rows ..."], /) -> Float[Array, "N columns ..."]: ...
    def apply(self, tiles, u: Rows, v: Columns, values, /) -> Array: ...  # diag(u) K diag(v) values
    # Largest score of each row and column, minus infinity without any.
    def row_max(self, tiles, /) -> Rows: ...
    def column_max(self, tiles, /) -> Columns: ...


@runtime_checkable
class RemakingBand(Band, Protocol):
    """Band whose products make entries anew, so that new potentials cost nothing; it makes a whole step in one call.

    Its products are kernels, which JAX cannot differentiate.
    """

    # Scalings u = a / (K 1 + bin_column), and K^T u.
    def scale_once(self, tiles, a: Rows, bin_column: Rows | None, /) -> tuple[Rows, Columns]: ...
