"""Backend `pallas_gpu`: a band whose matrix is never stored.

`xla.Band` holds the tiles of K and streams them from memory for every product. Here K exists only as q, k, the
potentials and fields of low rank. Every product makes it anew, tile by tile, in `gpu_kernels`, by one matrix product on
tensor cores and one exp a cell. Where the band is narrow, `gpu_sweep` makes K once for both half steps.

Compiler: Pallas Triton. It alone lowers through `pl.pallas_call` on jax 0.10 to 0.12, and all of them interpret it on
a CPU. jax 0.11 deprecates it in favour of Mosaic GPU (from 0.12 on), whose asynchronous copies and specialised warps
could help in narrow bands, where programs wait more than they compute (not measured; docs/gpu.md). Only `gpu_kernels`
and `gpu_sweep` would change.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention import axes, support
from ot_attention.axes import ALONE, SequenceAxis
from ot_attention.backends import gpu_kernels, gpu_sweep
from ot_attention.backends.gpu_kernels import Field, Matrix, Reach, Side
from ot_attention.backends.gpu_sweep import Strips
from ot_attention.spec import AllColumns, AllRows, Columns, Heads, Implementation, Lengths, Rows, SinkhornSpec, Size
from ot_attention.support import Layout

_MOST_WIDTH = 256
_MOST_HEADS = 65535  # blocks along the second axis of a grid


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Return why the kernels cannot do this and what to change, or None."""
    del spec  # all settings are supported
    if gpu_kernels.INTERPRET:
        return None
    if support.platform() != "gpu":
        return "there is no GPU here; use implementation='xla' or None"
    if jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower():
        return "its kernels hold instructions of NVIDIA GPUs; use implementation='xla' or None"
    if jnp.result_type(*heads[:3]) == jnp.float64:
        return "its kernels compute in float32; use float32 or bfloat16, or implementation='xla'"
    width = max(heads.q.shape[2], heads.v.shape[2])
    if width > _MOST_WIDTH:
        return f"heads of width {width} do not fit its tiles; use at most {_MOST_WIDTH} or implementation='xla'"
    if (number := heads.q.shape[0]) > _MOST_HEADS:
        return f"{number} heads are more than a grid has; use a batch of at most {_MOST_HEADS} heads in all"
    return None


class Scores(NamedTuple):
    """Scores `scale q_i . k_j + f_i + g_j`. Potentials keep their dustbin entry: to cut it off would copy them."""

    q: Float[Array, "N rows width"]
    k: Float[Array, "N columns width"]
    f: AllRows
    g: AllColumns


# Sum of matrices `exp(scores)`, each times the sum of its fields `x_i . y_j` if there are any.
Terms = tuple[tuple[Scores, tuple[Field, ...]], ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["windows", "reach", "strips"],
    meta_fields=["cut", "scale", "most", "block"],
)
class Band:
    """Cells of the support. Its tiles are `Scores`, and after `exp` a sum of `Terms`: nothing of the band's size."""

    kernels: Any = gpu_kernels  # the module that makes products and maxima

    def __init__(self, windows, reach: tuple[Reach, Reach], strips: Strips | None, cut, scale, most: int, block: int):
        self.windows = windows  # first and last of every row, and of every column
        self.reach = reach  # of blocks of rows, and of columns
        self.strips, self.cut = strips, cut  # None where a strip's columns do not fit into registers
        self.scale, self.most, self.block = scale, most, block  # as in gpu_kernels.Matrix

    @staticmethod
    def implementation() -> Implementation:
        return "pallas_gpu"

    def sequence_axis(self) -> SequenceAxis:
        return ALONE

    @classmethod
    def scores(cls, q, k, layout: Layout, scale: float) -> tuple["Band", Scores]:
        of_rows, of_columns, n_q, n_k, band, diagonal = layout
        (number, rows, _), columns = q.shape, k.shape[1]
        q, k = (x.astype(jnp.result_type(q, k)) for x in (q, k))
        q, k = map(cls.kernels.pad_width, (q, k))
        block = cls.kernels.block_for(q.dtype, q.shape[2])
        reach = _reach(*of_rows, n_q, block), _reach(*of_columns, n_k, block)
        most = columns if band is None else min(columns, 2 * band + 1)
        # Strips know their tiles from the lengths: not where segments or neighbours' shares decide them.
        cut = gpu_sweep.cut_for(columns, band) if block == gpu_sweep.ROWS and diagonal is None else None
        strips = cut and gpu_sweep.strips(n_q, n_k, rows, columns, cut)
        zeros = [jnp.zeros((number, length + 1), support.potential_dtype(q)) for length in (rows, columns)]
        scores = Scores(q, k, *axes.varying_like(q, zeros))
        return cls((of_rows, of_columns), reach, strips, cut, scale, most, block), scores

    def row_windows(self) -> tuple[Int[Array, "N rows"], Int[Array, "N rows"]]:
        return self.windows[0]

    @staticmethod
    def heads_at_once(number: Size, rows: Size, columns: Size, band: int | None, itemsize: int) -> int:
        del rows, columns, band, itemsize
        return number  # nothing is stored that grows with the band

    def shift(self, scores: Scores, row: AllRows, column: AllColumns) -> Scores:
        return scores._replace(f=scores.f + row, g=scores.g + column)

    def exp(self, scores: Scores) -> Terms:
        return ((scores, ()),)

    def modulate(self, terms: Terms, *fields: Field) -> Terms:
        assert not any(present for _, present in terms), "a term cannot hold a product of fields"
        return tuple((scores, fields) for scores, _ in terms)

    def minus(self, terms: Terms, others: Terms) -> Terms:
        negative = ((scores, tuple((-x, y) for x, y in fields)) for scores, fields in others if fields)
        return (*terms, *negative)

    def times(self, terms: Terms, x: Float[Array, "N columns ..."]) -> Float[Array, "N rows ..."]:
        return self._product(terms, x, by_rows=True)

    def transpose_times(self, terms: Terms, x: Float[Array, "N rows ..."]) -> Float[Array, "N columns ..."]:
        return self._product(terms, x, by_rows=False)

    def apply(self, terms: Terms, u: Rows, v: Columns, values) -> Array:
        # The scalings become potentials, so that values may stay bfloat16.
        f, g = (support.with_dustbin(support.log(x)) for x in (u, v))
        shifted = ((self.shift(scores, f, g), fields) for scores, fields in terms)
        return self.times(tuple(shifted), values)

    def scale_once(self, terms: Terms, a: Rows, bin_column: Rows | None) -> tuple[Rows, Columns]:
        """Return scalings `u = a / (K 1 + bin_column)` of rows, and `K^T u`; K is `exp` of scores, without fields.

        a: targets of residues' rows, 1 where a row has support, else 0.
        """
        ((scores, _),) = terms
        if self.cut is not None and self.strips is not None:
            rows, columns = self._sides(scores)
            u, sums = gpu_sweep.scale_once(rows, columns, self.strips, bin_column, scale=self.scale, cut=self.cut)
            return jnp.where(a > 0, u, 0), sums
        sums = self._product(terms, None, by_rows=True)
        u = support.divide(a, sums if bin_column is None else sums + bin_column)
        # This is cheaper than a product of every entry with u.
        scaled = scores._replace(f=scores.f + support.with_dustbin(support.log(u)))
        return u, self._product(self.exp(scaled), None, by_rows=False)

    def row_max(self, scores: Scores) -> Rows:
        return self.kernels.maximum(*self._seen_from(scores, by_rows=True))

    def column_max(self, scores: Scores) -> Columns:
        return self.kernels.maximum(*self._seen_from(scores, by_rows=False))

    def _product(self, terms: Terms, x: Array | None, by_rows: bool) -> Array:
        """Multiply by x from the right, from the left if not by_rows; None sums the rows of K, or its columns."""

        def of_term(scores: Scores, fields: tuple[Field, ...]) -> Array:
            own, other, reach, matrix = self._seen_from(scores, by_rows)
            fields = fields if by_rows else tuple((y, x) for x, y in fields)
            return self.kernels.product(own, other, reach, fields, x, matrix)

        return functools.reduce(jnp.add, (of_term(*term) for term in terms))

    def _seen_from(self, scores: Scores, by_rows: bool) -> tuple[Side, Side, Reach, Matrix]:
        own, sides = 0 if by_rows else 1, self._sides(scores)
        return sides[own], sides[1 - own], self.reach[own], Matrix(by_rows, self.scale, self.most, self.block)

    def _sides(self, scores: Scores) -> tuple[Side, Side]:
        return Side(scores.q, scores.f, *self.windows[0]), Side(scores.k, scores.g, *self.windows[1])


def _reach(first: Int[Array, "N length"], last: Int[Array, "N length"], n: Lengths, block: int) -> Reach:
    """Return the parts of the other side that blocks of positions meet, from the positions' windows.

    Windows never move back from one real position to the next. A block that holds padding has no common part.
    """
    at = jnp.arange(0, first.shape[1], block)
    end = jnp.minimum(at + block, n[:, None])  # of the real positions of a block
    of_last = jnp.maximum(end - 1, 0)
    start, until = first[:, ::block], jnp.take_along_axis(last, of_last, axis=1) + 1
    stop = jnp.where(end > at, jnp.maximum(until, start), start)
    common = jnp.take_along_axis(first, of_last, axis=1), last[:, ::block] + 1
    return Reach(start, stop, *(jnp.where(end == at + block, x, start) for x in common))
