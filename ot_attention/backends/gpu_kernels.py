"""Kernels of `pallas_gpu`: products and maxima of a matrix that is made tile by tile and never stored.

An entry is `exp(S_ij + f_i + g_j)` times a field of low rank. A program owns a block of rows of one head and visits the
columns that the block meets, or the other way round for products with the transpose. Nothing is exchanged between
programs, so the same call gives the same bits. Tiles inside the support need no mask: where rows meet many columns,
tiles at one edge, tiles inside and tiles at the other edge have three loops of the same body.

Microseconds of a call for 262,144 rows on an H200 (heads of 64 in bfloat16, 2,048 residues; float32: heads of 32,
384 residues, W = 64), by `scripts/tune_gpu.py`. In brackets other numbers of stages; after a semicolon blocks of 128.
"gradient" is a product with a matrix and fields.

| | W = 64 | W = 128 | W = 256 | full | float32 |
|---|---|---|---|---|---|
| stages taken | 2 | 2 | 2 | 3 | 1; matrix 2 |
| sum | 62 (63, 64) | 75 (80) | 100 (101; 127-172) | 270 (296; 315-438) | 89 (109, 110) |
| vector | 67 (68, 64) | 81 (85) | 110 (110; 134-185) | 291 (315; 333-448) | 96 (112, 111) |
| matrix | 90 (92, 97) | 135 (128, 142) | 180 (187; 198-205) | 547 (547; 487-545) | 158 (161, 161) |
| gradient | 164 (187, 167) | 238 (233, 239) | 337 (341; 425-446) | 1005 (1044; 1168-1323) | 263 (275, 270) |

In one loop instead of three, sum and vector take 80 and 89 at W = 128; in three loops at W = 64, 103 and 88 in an
earlier version.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

INTERPRET = False  # set by tests: interpret the kernels, in any dtype, on any device

_WIDE = 128  # from this width on heads are wide
_LEAST_WIDTH = 16  # of a matrix product
_LOG2_E = math.log2(math.e)


class Side(NamedTuple):
    """Vectors, potentials and support of the rows, or of the columns.

    first, last: positions of the other side in the support, inclusive; last < first where there are none.
    """

    x: Float[Array, "N length width"]  # scores are products of these
    shift: Float[Array, "N all"]  # added to scores; may be longer, nothing beyond the length is read
    first: Int[Array, "N length"]
    last: Int[Array, "N length"]


class Reach(NamedTuple):
    """Part of the other side that each block meets, and the part that all its positions meet. Ends are exclusive."""

    start: Int[Array, "N blocks"]
    stop: Int[Array, "N blocks"]
    inner_start: Int[Array, "N blocks"]
    inner_stop: Int[Array, "N blocks"]


# Entries are multiplied by the sum of fields `x_i . y_j`.
Field = tuple[Float[Array, "N own _"], Float[Array, "N other _"]]


class Tiling(NamedTuple):
    """Settings of a kernel that change its speed, not its results."""

    tile: int  # positions of the other side that a program visits at a time
    warps: int  # of a program
    stages: int  # tiles in flight; 1 loads none ahead
    split: bool  # whether tiles inside the support have a loop of their own, without masks


class _Operands(NamedTuple):
    own: Side
    other: Side
    reach: Reach
    fields: tuple[Field, ...]
    vector: Array | None  # [N, other], or a matrix [N, other, m]; None for sums and maxima


class Matrix(NamedTuple):
    """Static properties of the matrix K."""

    by_rows: bool  # whether rows are the own side
    scale: float  # of the scores, `S_ij = scale x_i . x_j`
    reach: int  # most columns that a row meets
    block: int  # positions that a program owns


def product(
    own: Side, other: Side, reach: Reach, fields: tuple[Field, ...], vector: Array | None, matrix: Matrix
) -> Array:
    """Multiply K by a vector `[N, other]` or a matrix `[N, other, m]`, or sum its rows, `K 1`, if `vector` is None."""
    if vector is None or vector.ndim == 2:
        return _call("sum" if vector is None else "vector", _Operands(own, other, reach, fields, vector), matrix)
    out = _call("matrix", _Operands(own, other, reach, fields, pad_width(vector)), matrix)
    return out[..., : vector.shape[2]]


def maximum(own: Side, other: Side, reach: Reach, matrix: Matrix) -> Float[Array, "N own"]:
    """Find the largest `S + f + g` of every position of the own side, minus infinity where it meets nothing."""
    return _call("maximum", _Operands(own, other, reach, (), None), matrix)


def block_for(dtype: jnp.dtype, width: int) -> int:
    """Choose how many positions a program owns. Wide heads of float32 leave registers for few."""
    return 32 if dtype == jnp.float32 and width >= _WIDE else 64


def tiling_for(kind: str, dtype: jnp.dtype, width: int, reach: int) -> Tiling:
    """Choose the fastest tiling measured for rows of this reach (table above); `width` is the widest operand's."""
    split = reach >= 256
    if width >= _WIDE:
        few = dtype == jnp.float32  # registers, and shared memory for the parts of products
        return Tiling(32 if few else 64, warps=8 if few else 4, stages=1, split=split)
    if dtype == jnp.float32:
        return Tiling(64, warps=4, stages=2 if kind == "matrix" else 1, split=split)
    return Tiling(64, warps=4, stages=3 if reach > 1024 else 2, split=split)


def padded_width(width: int) -> int:
    """Return the next width that a tile can have, a power of 2."""
    return max(_LEAST_WIDTH, 1 << (width - 1).bit_length())


def pad_width(x: Float[Array, "N length width"]) -> Float[Array, "N length padded"]:
    width = padded_width(x.shape[2])
    return x if width == x.shape[2] else jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2])))


def _call(kind, operands: _Operands, matrix: Matrix) -> Array:
    x, fields = operands.own.x, operands.fields
    operands = operands._replace(fields=tuple((pad_width(x), pad_width(y)) for x, y in fields))
    widths = [y.shape[2] for y in (x, operands.vector, *(y for y, _ in fields)) if y is not None and y.ndim == 3]
    tiling = tiling_for(kind, x.dtype, padded_width(max(widths)), matrix.reach)
    return _run(operands, kind, matrix, tiling, INTERPRET)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # traced and lowered once for all calls alike
def _run(operands: _Operands, kind: str, matrix: Matrix, tiling: Tiling, interpret: bool) -> Array:
    own, block = operands.own, matrix.block
    (number, length, _), vector = own.x.shape, operands.vector
    width = vector.shape[2:] if kind == "matrix" and vector is not None else ()
    blocks = pl.cdiv(length, block)
    out = pl.pallas_call(
        functools.partial(_kernel, kind=kind, matrix=matrix, tiling=tiling),
        out_shape=jax.ShapeDtypeStruct(
            (number, blocks * block, *width),  # whole blocks: a store beyond the end would not be caught
            own.shift.dtype,
            manual_axis_type=jax.typeof(own.x).manual_axis_type,  # axes that heads vary over in shard_map
        ),
        grid=(blocks, number),
        in_specs=(jax.tree.map(whole_head, operands),),
        out_specs=pl.BlockSpec((None, block, *width), lambda b, n: (n, b, *(0,) * len(width))),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=f"band_{kind}",
    )(operands)
    return out[:, :length]


def whole_head(x) -> pl.BlockSpec:
    """Give a program all of its head's part of an operand `[N, ...]`; the second axis of the grid counts heads."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda _, n: (n, *(0,) * (len(x.shape) - 1)))


def _kernel(operands: _Operands, out, *, kind: str, matrix: Matrix, tiling: Tiling):
    own_side, other_side, reach, fields, vector = operands
    block, tile, dtype = pl.program_id(0), tiling.tile, own_side.shift.dtype
    by_rows, scale, _, size = matrix
    met = Reach(*(x[block] for x in reach))
    own_at = Place.at(block * size, size, own_side.x.shape[0])
    own = Part(own_at.load(own_side.x), own_at.load(own_side.shift), tuple(own_at.load(x) for x, _ in fields))
    axes = Axes.of(kind == "matrix")

    def visit(number, total, is_inner: bool):
        at = Place.at(met.start + number * tile, tile, None if is_inner else met.stop)
        other = Part(at.load(other_side.x), at.load(other_side.shift), tuple(at.load(y) for _, y in fields))
        scores = axes.scores(own, other, scale, own_first=by_rows)
        inside = None if is_inner else axes.inside((own_side, own_at), (other_side, at))
        if kind == "maximum":
            return jnp.maximum(total, scores if inside is None else jnp.where(inside, scores, -jnp.inf))
        weights = exp2(scores) if inside is None else jnp.where(inside, exp2(scores), 0)
        if fields:
            products = (axes.dot(x, y, dtype) for x, y in zip(own.fields, other.fields, strict=True))
            weights = weights * functools.reduce(jnp.add, products)
        if kind == "vector":
            weights = weights * axes.of_other(at.load(vector))
        return total + (_times(weights, at.load(vector)) if kind == "matrix" else weights)

    # Except in products with a matrix, sums across threads are made once, at the end.
    shape = (size, vector.shape[1]) if kind == "matrix" and vector is not None else (tile, size)
    total = jnp.full(shape, -jnp.inf if kind == "maximum" else 0, dtype)
    for first, last, is_inner in _tiles(met, tiling):
        total = jax.lax.fori_loop(first, last, functools.partial(visit, is_inner=is_inner), total)
    if kind == "maximum":
        out[...] = total.max(0) / _LOG2_E
    else:
        out[...] = total if kind == "matrix" else total.sum(0)


class Axes(NamedTuple):
    """Axes of a tile along which the own and the other side's positions lie.

    Tensor cores leave a thread with 2 places along the first axis and 16 along the second. For vectors the second is
    the own side's, which is loaded once. A product with a matrix sums over the second axis: the other side's.
    """

    own: int
    other: int

    @classmethod
    def of(cls, is_matrix: bool) -> "Axes":
        return cls(0, 1) if is_matrix else cls(1, 0)

    def of_own(self, x: Array) -> Array:
        return jnp.expand_dims(x, self.other)

    def of_other(self, x: Array) -> Array:
        return jnp.expand_dims(x, self.own)

    def dot(self, own: Array, other: Array, dtype) -> Array:
        """Compute `own_i . other_j`, in the tile's order."""
        return _dot(*((own, other) if self.own == 0 else (other, own)), (1, 1), dtype)

    def inside(self, own: "tuple[Side, Place]", other: "tuple[Side, Place]") -> Array:
        """Mask the cells of a tile that are in the support, by the windows of the side along the first axis."""
        (side, at), (_, across) = (own, other) if self.own == 0 else (other, own)
        first, last = at.load(side.first, 1), at.load(side.last, 0)  # positions that do not exist meet nothing
        return (first[:, None] <= across.position[None, :]) & (across.position[None, :] <= last[:, None])

    def scores(self, own: "Part", other: "Part", scale: float, *, own_first: bool) -> Array:
        """Compute `(S + f_i + g_j) / ln 2`. The row's shift is added first by rows and by columns: both see one K."""
        shifts = self.of_own(own.shift * _LOG2_E), self.of_other(other.shift * _LOG2_E)
        first, second = shifts if own_first else shifts[::-1]
        return self.dot(own.x, other.x, own.shift.dtype) * (scale * _LOG2_E) + first + second


def _tiles(met: Reach, tiling: Tiling) -> list[tuple[Any, Any, bool]]:
    """Return ranges of tiles, counted from `start`, and whether they lie inside the support: edge, inside, edge."""
    div, rest = functools.partial(jax.lax.div, y=jnp.int32(tiling.tile)), tiling.tile - 1
    number = div(jnp.maximum(met.stop - met.start, 0) + rest)
    if not tiling.split:
        return [(jnp.int32(0), number, False)]
    first = jnp.minimum(div(jnp.maximum(met.inner_start - met.start, 0) + rest), number)
    last = jnp.maximum(jnp.minimum(div(jnp.maximum(met.inner_stop - met.start, 0)), number), first)
    return [(jnp.int32(0), first, False), (first, last, True), (last, number, False)]


class Place(NamedTuple):
    """Consecutive positions of one side, with a mask if some may not exist."""

    where: Any  # a slice of references, or positions, which may be negative where they do not exist
    position: Int[Array, "size"]
    exists: Array | None

    @classmethod
    def at(cls, first, size: int, stop) -> "Place":
        """Place `size` positions from `first` on. They exist before `stop`, or all of them if it is None."""
        position = first + jnp.arange(size, dtype=jnp.int32)
        return cls(pl.ds(first, size), position, None if stop is None else position < stop)

    def load(self, ref, fill=0):
        """Load a part of a vector, or of the rows of a matrix, with `fill` where nothing exists."""
        where, exists = self.where, self.exists
        if len(ref.shape) == 2:
            exists = None if exists is None else exists[:, None]
            if not isinstance(where, pl.Slice):
                where = where[:, None], jnp.arange(ref.shape[1], dtype=jnp.int32)[None, :]
        masked = {} if exists is None else {"mask": exists, "other": jnp.array(fill, ref.dtype)}
        return plgpu.load(ref.at[where], **masked)


class Part(NamedTuple):
    """Vectors, potentials and field columns of one side at a place."""

    x: Array
    shift: Array
    fields: tuple[Array, ...] = ()


def exp2(x: Array) -> Array:
    """Compute 2 to the power of x, by the one instruction that GPUs have for it (relative error 2^-22)."""
    return jnp.exp2(x) if INTERPRET else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


def reciprocal(x: Array) -> Array:
    """Compute 1 / x, by one instruction (relative error 2^-23)."""
    return 1 / x if INTERPRET else _instruction("rcp.approx.ftz.f32 $0, $1;", x)


def _instruction(text: str, x: Array) -> Array:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    (result,) = plgpu.elementwise_inline_asm(text, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=like)
    return result


def _times(weights, matrix) -> Array:
    """Return `weights @ matrix`. For bfloat16, two bfloat16 parts hold 16 bits of the weights.

    The first part is cut off, not rounded: rounding would occupy the unit that makes exp.
    """
    if matrix.dtype != jnp.bfloat16:
        return _dot(weights, matrix, (1, 0), weights.dtype)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = jax.lax.bitcast_convert_type(bits, weights.dtype)
    parts = (_dot(part.astype(jnp.bfloat16), matrix, (1, 0), weights.dtype) for part in (high, weights - high))
    return functools.reduce(jnp.add, parts)


def _dot(x, y, contract: tuple[int, int], dtype) -> Array:
    """Multiply matrices and add up in `dtype`. Products of bfloat16 are exact.

    float32 becomes three TF32 products, which keep 21 bits of each factor and run on tensor cores.
    """
    if x.dtype != y.dtype:
        x, y = x.astype(dtype), y.astype(dtype)
    precision: Any = jax.lax.Precision.HIGHEST if INTERPRET else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    if x.dtype == jnp.bfloat16:
        precision = None
    return jax.lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=dtype
    )
