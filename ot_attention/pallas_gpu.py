"""The band on a GPU: a matrix that is never stored, for the loop of `sinkhorn`.

`banded_xla.Band` holds the tiles of K and streams them from memory for every product. Here K exists only as q, k, the
potentials and fields of low rank, and every product makes it anew, tile by tile, in `gpu_kernels`: one matrix product
on tensor cores and one exp a cell, and q, k and vectors in memory. So Newton steps, implicit gradients and every
dustbin come from `sinkhorn`, and this module has no loop of its own.

Compiler: Pallas Triton. Of those that there are it alone lowers through `pl.pallas_call` on jax 0.10 to 0.12, and is
interpreted on a CPU by all of them (Mosaic GPU from 0.12 on). jax 0.11 deprecates it in favour of Mosaic GPU, whose
asynchronous copies and specialised warps an H100 may reward: to be decided by measuring, for no GPU was at hand
(docs/gpu.md). Nothing but `gpu_kernels` would change.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention import gpu_kernels, support
from ot_attention.gpu_kernels import Field, Side, Windows
from ot_attention.spec import Heads

_MOST_WIDTH = 256
_MOST_HEADS = 65535  # blocks along the second axis of a grid


def refusal(heads: Heads) -> str | None:
    """Why the kernels cannot do this and what to change, or None."""
    if gpu_kernels.INTERPRET:
        return None
    if support.platform() != "gpu":
        return "there is no GPU here; use implementation='xla' or None"
    if jnp.result_type(*heads[:3]) == jnp.float64:
        return "its kernels compute in float32; use float32 or bfloat16, or implementation='xla'"
    width = max(heads.q.shape[2], heads.v.shape[2])
    if width > _MOST_WIDTH:
        return f"heads of width {width} do not fit its tiles; use at most {_MOST_WIDTH} or implementation='xla'"
    if (number := heads.q.shape[0]) > _MOST_HEADS:
        return f"{number} heads are more than a grid has; use a batch of at most {_MOST_HEADS} heads in all"
    return None


class Scores(NamedTuple):
    """`scale q_i . k_j + f_i + g_j`."""

    q: Float[Array, "N rows width"]
    k: Float[Array, "N columns width"]
    f: Float[Array, "N rows"]
    g: Float[Array, "N columns"]


class Term(NamedTuple):
    """`exp` of scores times the sum of fields, if there are any: pairs x and y of `x_i . y_j`."""

    scores: Scores
    fields: tuple[Field, ...]


Terms = tuple[Term, ...]  # their sum


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "last", "of_rows", "of_columns"],
    meta_fields=["scale"],
)
class Band:
    """Which cells exist. What it calls tiles are `Scores`, and after `exp` a sum of `Terms`: nothing of their size."""

    def __init__(self, first, last, of_rows, of_columns, scale):
        self.first, self.last = first, last  # [N, rows], windows of all rows
        self.of_rows, self.of_columns = of_rows, of_columns  # starts and stops of what a block meets, [N, blocks]
        self.scale = scale

    @classmethod
    def scores(
        cls,
        q: Float[Array, "N rows width"],
        k: Float[Array, "N columns width"],
        n_q: Int[Array, "N"],
        n_k: Int[Array, "N"],
        band: int | None,
        scale: float,
    ) -> tuple["Band", Scores]:
        """`scale q_i . k_j` and the band that they lie in."""
        (number, rows, _), columns = q.shape, k.shape[1]
        index = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (number, rows))
        first, last = support.row_windows(index, n_q, n_k, band)
        q, k = (x.astype(jnp.result_type(q, k)) for x in (q, k))
        block = gpu_kernels.block_size(q.dtype)
        ends = _met_by_rows(first, last, n_q, block), _met_by_columns(first, last, n_q, columns, block)
        q, k = map(gpu_kernels.pad_width, (q, k))
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        zeros = support.varying_like(q, [jnp.zeros(x.shape[:2], dtype) for x in (q, k)])
        return cls(first, last, *ends, scale), Scores(q, k, *zeros)

    @staticmethod
    def heads_at_once(number: int, rows: int, columns: int, band: int | None, itemsize: int) -> int:
        """All: nothing is stored that grows with the band."""
        del rows, columns, band, itemsize
        return number

    def shift(self, scores: Scores, row: Float[Array, "N rows"], column: Float[Array, "N columns"]) -> Scores:
        return scores._replace(f=scores.f + row, g=scores.g + column)

    def exp(self, scores: Scores) -> Terms:
        return (Term(scores, ()),)

    def scale_by(self, terms: Terms, row: Float[Array, "N rows"], column: Float[Array, "N columns"]) -> Terms:
        return self.modulate(terms, (row[..., None], column[..., None]))

    def modulate(self, terms: Terms, *fields: Field) -> Terms:
        """Times the sum of fields, once."""
        assert not any(term.fields for term in terms), "a product of fields has no place in a term"
        return tuple(Term(scores, fields) for scores, _ in terms)

    def minus(self, terms: Terms, others: Terms) -> Terms:
        negative = (Term(scores, tuple((-x, y) for x, y in fields)) for scores, fields in others if fields)
        return (*terms, *negative)

    def times(self, terms: Terms, x: Float[Array, "N columns ..."]) -> Float[Array, "N rows ..."]:
        """`K x`, for a vector or for several columns at once."""
        return functools.reduce(jnp.add, (self._product(term, x, by_rows=True) for term in terms))

    def transpose_times(self, terms: Terms, x: Float[Array, "N rows ..."]) -> Float[Array, "N columns ..."]:
        """`K^T x`."""
        return functools.reduce(jnp.add, (self._product(term, x, by_rows=False) for term in terms))

    def apply(self, terms: Terms, u: Float[Array, "N rows"], v: Float[Array, "N columns"], values) -> Array:
        """`u_i K v_j values`: the scalings become potentials, so that values may stay bfloat16."""
        shifted = (Term(self.shift(scores, _log(u), _log(v)), fields) for scores, fields in terms)
        return self.times(tuple(shifted), values)

    def row_max(self, scores: Scores) -> Float[Array, "N rows"]:
        return gpu_kernels.maximum(*self._sides(scores, by_rows=True), by_rows=True, scale=self.scale)

    def column_max(self, scores: Scores) -> Float[Array, "N columns"]:
        return gpu_kernels.maximum(*self._sides(scores, by_rows=False), by_rows=False, scale=self.scale)

    def _product(self, term: Term, x: Array, by_rows: bool) -> Array:
        fields = term.fields if by_rows else tuple((y, x) for x, y in term.fields)
        sides = self._sides(term.scores, by_rows)
        return gpu_kernels.product(*sides, fields, x, by_rows=by_rows, scale=self.scale)

    def _sides(self, scores: Scores, by_rows: bool) -> tuple[Side, Side, Windows]:
        rows, columns = Side(scores.q, scores.f), Side(scores.k, scores.g)
        if by_rows:
            return rows, columns, Windows(self.first, self.last, *self.of_rows)
        return columns, rows, Windows(self.first, self.last, *self.of_columns)


def _met_by_rows(first, last, n_q, block: int) -> tuple[Array, Array]:
    """The part of the columns that blocks of rows meet. Windows never move back from one real row to the next."""
    at = jnp.arange(0, first.shape[1], block)
    end = jnp.minimum(at + block, n_q[:, None])  # of the real rows of a block
    start, until = first[:, ::block], jnp.take_along_axis(last, jnp.maximum(end - 1, 0), axis=1) + 1
    return start, jnp.where(end > at, jnp.maximum(until, start), start)


def _met_by_columns(first, last, n_q, columns: int, block: int) -> tuple[Array, Array]:
    """The part of the rows that blocks of columns meet."""
    real = jnp.arange(first.shape[1]) < n_q[:, None]
    first, last = (jnp.where(real, x, jnp.iinfo(jnp.int32).max) for x in (first, last))
    at = jnp.arange(0, columns, block, dtype=jnp.int32)
    search = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"), (0, None))
    start, stop = search(last, at), search(first, at + block)  # rows that end before, rows that begin before the end
    return start.astype(jnp.int32), jnp.maximum(start, stop).astype(jnp.int32)


def _log(scaling: Array) -> Array:
    """Of what is scaled by 0 nothing is in the support."""
    return jnp.log(jnp.where(scaling == 0, 1, scaling))
