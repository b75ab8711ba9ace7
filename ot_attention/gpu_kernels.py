"""The one kernel of `pallas_gpu`: products with, and maxima of, a matrix that is made tile by tile and never stored.

An entry is `exp(S_ij + f_i + g_j)` times a field of low rank. A program owns a block of rows of one head and goes over
the columns that they meet; for products with the transpose it owns columns and goes over rows. Nothing is exchanged
between programs, so the same call gives the same bits.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

INTERPRET = False  # set by tests: kernels are interpreted, in any dtype, on any device

_STAGES = 2
_LEAST_WIDTH = 16  # of a matrix product
_MOST_VECTORS = 8  # fields of at most so many columns are added up column by column


class Side(NamedTuple):
    """What belongs to the rows, or to the columns: vectors that scores are made of, and what is added to scores."""

    x: Float[Array, "N length width"]
    shift: Float[Array, "N length"]


class Windows(NamedTuple):
    """Which cells exist: each row's first and last column, and what each block meets of the other side."""

    first: Int[Array, "N rows"]
    last: Int[Array, "N rows"]
    start: Int[Array, "N blocks"]
    stop: Int[Array, "N blocks"]


# Entries are multiplied by the sum of fields `x_i . y_j`.
Field = tuple[Float[Array, "N own _"], Float[Array, "N other _"]]


class _Operands(NamedTuple):
    own: Side
    other: Side
    windows: Windows
    fields: tuple[Field, ...]  # those of few columns lie the other way, [N, rank, length]
    vector: Array | None  # [N, other], or a matrix [N, other, m]; None for the maximum


class _Static(NamedTuple):
    by_rows: bool
    scale: float
    few: tuple[bool, ...]  # which fields have few columns
    block: int  # positions that a program owns
    tile: int  # and takes from the other side at a time


def product(
    own: Side, other: Side, windows: Windows, fields: tuple[Field, ...], vector: Array, *, by_rows: bool, scale: float
) -> Array:
    """`K x` for a vector `[N, other]` or a matrix `[N, other, m]`; K has a row for every position of the own side.

    windows: those of rows, and what each block of `block_size` positions of the own side meets.
    scale: of the scores, `S_ij = scale x_i . x_j`.
    """
    width = vector.shape[2:]
    vector = pad_width(vector) if width else vector
    out = _call(_Operands(own, other, windows, fields, vector), by_rows, scale, INTERPRET)
    return out[..., : width[0]] if width else out


def maximum(own: Side, other: Side, windows: Windows, *, by_rows: bool, scale: float) -> Float[Array, "N own"]:
    """The largest `S + f + g` of every position of the own side, minus infinity where it meets nothing."""
    return _call(_Operands(own, other, windows, (), None), by_rows, scale, INTERPRET)


def block_size(dtype: jnp.dtype) -> int:
    """Positions that a program owns, and those that it takes from the other side at a time.

    Products of float32 are made by multiply and add: larger tiles of them do not fit the registers.
    """
    return 64 if dtype == jnp.bfloat16 else 32


def padded_width(width: int) -> int:
    """The next that a tile can have: a power of 2."""
    return max(_LEAST_WIDTH, 1 << (width - 1).bit_length())


def pad_width(x: Float[Array, "N length width"]) -> Float[Array, "N length padded"]:
    width = padded_width(x.shape[2])
    return x if width == x.shape[2] else jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2])))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # traced and lowered once for all calls alike
def _call(operands: _Operands, by_rows: bool, scale: float, interpret: bool) -> Array:
    own, vector = operands.own, operands.vector
    number, length, _ = own.x.shape
    few = tuple(x.shape[2] <= _MOST_VECTORS for x, _ in operands.fields)
    operands = operands._replace(fields=tuple(map(_laid_out, operands.fields, few)))
    block, width = block_size(own.x.dtype), () if vector is None else vector.shape[2:]
    blocks = pl.cdiv(length, block)
    out = pl.pallas_call(
        functools.partial(_kernel, static=_Static(by_rows, scale, few, block, block)),
        out_shape=jax.ShapeDtypeStruct(
            (number, blocks * block, *width),  # whole blocks: a store beyond the end would not be caught
            own.shift.dtype,
            manual_axis_type=jax.typeof(own.x).manual_axis_type,  # under shard_map, those that the heads vary over
        ),
        grid=(blocks, number),
        in_specs=(jax.tree.map(_of_head, operands),),
        out_specs=pl.BlockSpec((None, block, *width), lambda b, n: (n, b, *(0,) * len(width))),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(operands), num_stages=_STAGES),
        interpret=interpret,
        name="band_maximum" if vector is None else "band_product",
    )(operands)
    return out[:, :length]


def _warps(operands: _Operands) -> int:
    """Twice as many where four have too few registers: ptxas counts none spilled."""
    wide = operands.own.x.dtype == jnp.float32 and operands.own.x.shape[2] >= 128
    return 8 if operands.fields or wide else 4


def _laid_out(field: Field, few: bool) -> Field:
    x, y = field
    return (x.swapaxes(1, 2), y.swapaxes(1, 2)) if few else (pad_width(x), pad_width(y))


def _of_head(x) -> pl.BlockSpec:
    return pl.BlockSpec((None, *x.shape[1:]), lambda _, n: (n, *(0,) * (len(x.shape) - 1)))


def _kernel(operands: _Operands, out, *, static: _Static):
    own_side, other_side, windows, fields, vector = operands
    block = pl.program_id(0)
    start, stop = windows.start[block], windows.stop[block]
    own_at = _Place.at(block * static.block, static.block, own_side.shift.shape[0])
    own = _Part.load(own_side, tuple(x for x, _ in fields), own_at, static)
    is_maximum, shape = vector is None, (static.block, *(() if vector is None else vector.shape[1:]))

    def visit(number, total):
        at = _Place.at(start + number * static.tile, static.tile, stop)
        other = _Part.load(other_side, tuple(y for _, y in fields), at, static)
        scores = _scores(own, other, static)
        inside = _inside(windows, own_at, at, static)
        if is_maximum:
            return jnp.maximum(total, jnp.where(inside, scores, -jnp.inf).max(1))
        weights = jnp.where(inside, jnp.exp(scores), 0)
        if fields:
            pairs = zip(own.fields, other.fields, static.few, strict=True)
            weights = weights * _sum(_field(*pair, weights.dtype) for pair in pairs)
        return total + _times(weights, at.load(vector))

    tiles = jax.lax.div(jnp.maximum(stop - start, 0) + static.tile - 1, jnp.int32(static.tile))
    total = jax.lax.fori_loop(0, tiles, visit, jnp.full(shape, -jnp.inf if is_maximum else 0, out.dtype))
    out[...] = total


class _Place(NamedTuple):
    """Consecutive positions of one side, some of which may not exist."""

    where: Any  # a slice of references
    position: Int[Array, "size"]
    exists: Array

    @classmethod
    def at(cls, first, size: int, stop) -> "_Place":
        position = first + jnp.arange(size, dtype=jnp.int32)
        return cls(pl.ds(first, size), position, position < stop)

    def load(self, ref, fill=0):
        """Of a vector, or of the rows of a matrix."""
        mask = self.exists if len(ref.shape) == 1 else self.exists[:, None]
        return plgpu.load(ref.at[self.where], mask=mask, other=jnp.array(fill, ref.dtype))

    def load_vectors(self, ref) -> list[Array]:
        """Of the columns of a matrix."""
        zero = jnp.array(0, ref.dtype)
        return [plgpu.load(ref.at[jnp.int32(r), self.where], mask=self.exists, other=zero) for r in range(ref.shape[0])]


class _Part(NamedTuple):
    """A part of one side; of fields with few columns, a list of these."""

    x: Array
    shift: Array
    fields: tuple

    @classmethod
    def load(cls, side: Side, fields: tuple, at: _Place, static: _Static) -> "_Part":
        loaded = (at.load_vectors(x) if few else at.load(x) for x, few in zip(fields, static.few, strict=True))
        return cls(at.load(side.x), at.load(side.shift), tuple(loaded))


def _scores(own: _Part, other: _Part, static: _Static) -> Array:
    """`S + f_i + g_j`, the row's added first whichever side it is, so that products with K and K^T see one K."""
    shifts = own.shift[:, None], other.shift[None, :]
    first, second = shifts if static.by_rows else shifts[::-1]
    return _dot(own.x, other.x, (1, 1), own.shift.dtype) * static.scale + first + second


def _inside(windows: Windows, own: _Place, other: _Place, static: _Static) -> Array:
    """Which cells of a tile are in the support."""
    rows, columns = (own, other) if static.by_rows else (other, own)
    first, last = rows.load(windows.first, 1), rows.load(windows.last, 0)  # positions that do not exist meet nothing
    if static.by_rows:
        first, last, column = first[:, None], last[:, None], columns.position[None, :]
    else:
        first, last, column = first[None, :], last[None, :], columns.position[:, None]
    return (first <= column) & (column <= last)


def _field(x, y, few: bool, dtype) -> Array:
    """`x_i . y_j`."""
    if few:
        return _sum(a[:, None] * b[None, :] for a, b in zip(x, y, strict=True))
    return _dot(x, y, (1, 1), dtype)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _times(weights, vector) -> Array:
    """`weights @ vector`. For bfloat16, weights are split into two such parts, which hold 16 bits of them."""
    if vector.ndim == 1:
        return (weights * vector[None, :]).sum(1)
    if vector.dtype != jnp.bfloat16:
        return _dot(weights, vector, (1, 0), weights.dtype)
    high = weights.astype(jnp.bfloat16)
    low = (weights - high.astype(weights.dtype)).astype(jnp.bfloat16)
    return _dot(high, vector, (1, 0), weights.dtype) + _dot(low, vector, (1, 0), weights.dtype)


def _dot(x, y, contract: tuple[int, int], dtype) -> Array:
    """A product of matrices, added up in `dtype`; float32 is not rounded, products of bfloat16 are exact."""
    if x.dtype != y.dtype:
        x, y = x.astype(dtype), y.astype(dtype)
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=dtype
    )
