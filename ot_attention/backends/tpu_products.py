"""TPU kernels of products with a matrix that is made tile by tile and never stored, for sequences of any length.

The kernels of `tpu_steps` make all steps of a head at once, and know its support from lengths and band. Where devices
share sequences, they must exchange between two half steps, and where segments cut the band, windows say what is in the
support. So these kernels are products like those of `gpu_kernels`, with the same arguments.

A program owns 128 positions of one side and visits the tiles of the other side that they meet. The other side of a head
is in VMEM as a whole, lengths along lanes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ot_attention.backends.gpu_kernels import Field, Matrix, Reach, Side
from ot_attention.backends.tpu_tiles import RESERVED_VMEM, TILE, dot, flat, iota, upright, vmem_capacity


class _Arrays(NamedTuple):
    """Vectors of one side, `[N, width, length]`."""

    x: Any
    shift: Any
    fields: tuple[Any, ...]


class _Operands(NamedTuple):
    """Arrays that a kernel reads: of the own side the program's 128 positions, of the other side all."""

    own: _Arrays
    windows: tuple[Any, Any]  # of the own side
    other: _Arrays
    vector: Any  # of the other side, or a matrix; None for sums and maxima


def block_for(dtype: jnp.dtype, width: int) -> int:
    """Return how many positions a program owns."""
    del dtype, width
    return TILE


def pad_width(x: Float[Array, "N length width"]) -> Float[Array, "N length width"]:
    """Return vectors as they are: any width is a number of sublanes."""
    return x


def product(
    own: Side, other: Side, reach: Reach, fields: tuple[Field, ...], vector: Array | None, matrix: Matrix
) -> Array:
    """Multiply K by a vector `[N, other]` or a matrix `[N, other, m]`, or sum its rows, `K 1`, if `vector` is None."""
    kind = "sum" if vector is None else "vector" if vector.ndim == 2 else "matrix"
    return _call(kind, own, other, reach, fields, vector, matrix)


def maximum(own: Side, other: Side, reach: Reach, matrix: Matrix) -> Float[Array, "N own"]:
    """Find the largest `S + f + g` of every position of the own side, minus infinity where it meets nothing."""
    return _call("maximum", own, other, reach, (), None, matrix)


def vmem_bytes(other: int, widths: int, itemsize: int) -> int:
    """Return what the other side's arrays take of VMEM, `widths` wide together; the next head's are loaded ahead."""
    return 2 * itemsize * widths * _padded(other)


def _call(kind: str, own: Side, other: Side, reach: Reach, fields, vector, matrix: Matrix) -> Array:
    (number, length, _), dtype = own.x.shape, own.shift.dtype
    # Windows as floats, which hold positions exactly and which the chip can transpose.
    windows = (_along_lanes(x.astype(dtype), fill) for x, fill in ((own.first, 0), (own.last, -1)))
    x_fields, y_fields = ([_along_lanes(field[side]) for field in fields] for side in (0, 1))
    operands = _Operands(
        _Arrays(_along_lanes(own.x), _along_lanes(own.shift[:, :length]), tuple(x_fields)),
        (next(windows), next(windows)),
        _Arrays(_along_lanes(other.x), _along_lanes(other.shift[:, : other.x.shape[1]]), tuple(y_fields)),
        None if vector is None else _along_lanes(vector),
    )
    blocks = _padded(length) // TILE
    tiles = jnp.stack([reach.start // TILE, -(-reach.stop // TILE)], -1).reshape(-1)
    width = operands.vector.shape[1] if kind == "matrix" else 1

    def of_block(x) -> pl.BlockSpec:
        return pl.BlockSpec((None, x.shape[1], TILE), lambda n, b, *_: (n, 0, b))

    def of_head(x) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda n, *_: (n, 0, 0))

    specs = _Operands(*jax.tree.map(of_block, operands[:2]), *jax.tree.map(of_head, operands[2:]))
    made = jax.ShapeDtypeStruct(
        (number, width, blocks * TILE), dtype, manual_axis_type=jax.typeof(own.x).manual_axis_type
    )
    out = pl.pallas_call(
        functools.partial(_kernel, kind=kind, matrix=matrix, blocks=blocks),
        out_shape=made,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(number, blocks), in_specs=(specs,), out_specs=of_block(made)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_capacity() + RESERVED_VMEM
        ),
        name=f"band_{kind}",
    )(tiles, operands)
    return out.swapaxes(1, 2)[:, :length] if kind == "matrix" else out[:, 0, :length]


def _padded(length: int) -> int:
    return -(-length // TILE) * TILE


def _along_lanes(x: Array, fill: int = 0) -> Array:
    """Return `[N, length]` or `[N, length, width]` as `[N, width, length]`, padded to whole tiles."""
    x = x[:, None] if x.ndim == 2 else x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, _padded(x.shape[2]) - x.shape[2])), constant_values=fill)


def _kernel(tiles, operands: _Operands, out, *, kind: str, matrix: Matrix, blocks: int):
    (own, own_shift, own_fields), windows, (other, other_shift, other_fields), vector = operands
    place, dtype = 2 * (pl.program_id(0) * blocks + pl.program_id(1)), out.dtype
    queries, transposed = own[...].T, [x[...].T for x in own_fields]
    shift, first, last = (upright(x[...]) for x in (own_shift, *windows))

    def visit(tile, total):
        at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        scores = matrix.scale * dot(queries, other[:, at], (1, 0)).astype(dtype) + shift + other_shift[:, at]
        position = tile * TILE + iota(1)
        scores = jnp.where((first <= position) & (position <= last), scores, -jnp.inf)
        if kind == "maximum":
            return jnp.maximum(total, scores)
        weights = jnp.exp(scores)
        if transposed:
            pairs = zip(transposed, other_fields, strict=True)
            weights *= functools.reduce(jnp.add, (dot(x, y[:, at], (1, 0)).astype(dtype) for x, y in pairs))
        if kind == "matrix":
            return total + dot(vector[:, at], weights, (1, 1)).astype(dtype)
        return total + (weights * vector[:, at] if kind == "vector" else weights)

    shape = out.shape if kind == "matrix" else (TILE, TILE)
    total = jnp.full(shape, -jnp.inf if kind == "maximum" else 0, dtype)
    total = jax.lax.fori_loop(tiles[place], tiles[place + 1], visit, total)
    if kind == "maximum":
        total = flat(total.max(1, keepdims=True))
    elif kind != "matrix":
        total = flat(total.sum(1, keepdims=True))
    out[...] = total
