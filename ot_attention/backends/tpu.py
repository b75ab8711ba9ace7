"""Sinkhorn attention on a TPU, one head at a time: the use of VMEM, and the `custom_vjp` of the two kernels.

Sequences lie along lanes, `[width, length]`: XLA stores heads narrower than 128 in that way, so nothing is copied. Main
memory holds q, k, v, the output and a few vectors. `K = exp(S)` is made once and stays in VMEM for all steps where it
fits; otherwise it is made anew from q and k in every step.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ot_attention import derivatives, support
from ot_attention.backends import tpu_backward, tpu_band, tpu_forward, tpu_steps
from ot_attention.backends.loop import Loop
from ot_attention.backends.tpu_tiles import RESERVED_VMEM, TILE, HeadTables, Sizes, vmem_capacity, with_dustbin
from ot_attention.spec import Heads, SinkhornSpec
from ot_attention.support import potential_dtype, promoting

platform = "tpu"  # see `backends.Backend`
_MIB = 2**20
_SMEM_BYTES = 512 * 2**10  # of 1 MiB


class _Blocks(NamedTuple):
    """Shapes in VMEM: a kernel's `Inputs` and `Outputs` for one head, and its `Scratch` without tiles."""

    inputs: NamedTuple
    outputs: NamedTuple
    scratch: NamedTuple

    @classmethod
    def forward(cls, heads: Heads, spec: SinkhornSpec, sizes: Sizes) -> "_Blocks":
        dtype, tail = potential_dtype(*heads[:3]), spec.tail_steps
        lengths = sizes.rows, sizes.columns, sizes.columns
        q, k, v = (jax.ShapeDtypeStruct((x.shape[2], n), x.dtype) for x, n in zip(heads[:3], lengths, strict=True))
        row, all_rows, column = (_vector(n, dtype) for n in (sizes.rows, sizes.all_rows, sizes.all_columns))
        out = jax.ShapeDtypeStruct((v.shape[0], sizes.rows), v.dtype)
        f_tail, g_tail = _vector(tail * sizes.all_rows, dtype), _vector((tail + 1) * sizes.all_columns, dtype)
        outputs = tpu_steps.Outputs(out, f_tail, g_tail, residual=_vector(TILE, dtype))
        if spec.tolerance:
            outputs = outputs._replace(steps=_vector(TILE, jnp.dtype(jnp.int32)))
        strip = jax.ShapeDtypeStruct((sizes.chunks + 1, TILE, TILE), dtype)  # one group's tiles, the dustbin's too
        scratch = tpu_steps.Scratch(strip, top=row, f=all_rows, g=column, weight=column, mass=column)
        if spec.tolerance:
            scratch = scratch._replace(earlier_f=all_rows)
        return cls(tpu_steps.Inputs(q, k, v, column, _if_weighted(row, heads.row_weights)), outputs, scratch)

    @classmethod
    def backward(cls, heads: Heads, spec: SinkhornSpec, sizes: Sizes) -> "_Blocks":
        dtype, tail = potential_dtype(*heads[:3]), spec.tail_steps
        (q, k, v, column, a), (out, f_tail, g_tail, lane, _), forward_scratch = cls.forward(heads, spec, sizes)
        strip, row, all_rows, *_ = forward_scratch
        inputs = tpu_backward.Inputs(q, k, v, column, f_tail, g_tail, d_out=out, d_f=all_rows, d_g=column, a=a)
        x_rows, y_columns = _vector(tail * sizes.rows, dtype), _vector(tail * sizes.all_columns, dtype)
        dk_sum, dv_sum = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v))
        scratch = tpu_backward.Scratch(strip, row, column, column, x_rows, y_columns, dk_sum, dv_sum)
        of_targets = (_if_weighted(x, *heads.weights) for x in (all_rows, column))
        return cls(inputs, tpu_backward.Outputs(q, k, v, lane, *of_targets), scratch)

    def bytes(self, buffers: int) -> int:
        once, more = (sum(map(_vmem_bytes, jax.tree.leaves(x))) for x in (self.scratch, (self.inputs, self.outputs)))
        return once + buffers * more


def _vector(length: int, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), dtype)


def _if_weighted(block: jax.ShapeDtypeStruct, *weights: Array | None) -> jax.ShapeDtypeStruct | None:
    """Return the block if any weights are given: without, kernels have no room for it."""
    return None if all(x is None for x in weights) else block


def _vmem_bytes(x: jax.ShapeDtypeStruct) -> int:
    *outer, rows, lanes = x.shape
    sublanes = 32 // x.dtype.itemsize
    return math.prod(outer) * -(-rows // sublanes) * sublanes * -(-lanes // TILE) * TILE * x.dtype.itemsize


class _Memory(NamedTuple):
    """A way to use VMEM."""

    holding: jnp.dtype | None  # dtype of the tiles that stay there; None makes them anew in every step
    buffers: int  # 2 load the next head during the work on this one


def _memory(blocks: _Blocks, sizes: Sizes, dtypes: tuple) -> _Memory | None:
    """Return the first way that fits into VMEM, or None; `dtypes` are the tiles' in order of preference."""
    for holding in (*dtypes, None):
        held = 0 if holding is None else sizes.tiles * TILE * TILE * jnp.dtype(holding).itemsize
        for buffers in (2, 1):
            if blocks.bytes(buffers) + held <= vmem_capacity():
                return _Memory(holding, buffers)
    return None


def _tile_dtypes(heads: Heads) -> tuple:
    """Return the dtypes that the forward's tiles may have: bfloat16 too if q and k have it.

    Rounding q and k has moved scores by 2^-9 times their size. Rounding exp(S) moves them by at most 2^-9, in the base
    steps alone.
    """
    dtype = potential_dtype(*heads[:3])
    return (dtype, jnp.bfloat16) if heads.q.dtype == heads.k.dtype == jnp.bfloat16 else (dtype,)


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Return why the kernels cannot do this and what to change, or None."""
    if spec.solver == "newton":
        return "its kernels make plain steps only; use solver='sinkhorn' or implementation='xla'"
    if spec.gradient == "implicit":
        return "its kernels have the tail's gradient only; use gradient='tail' or implementation='xla'"
    if is_by_products(heads, spec):
        return tpu_band.unsupported_reason(heads, spec)
    sizes = Sizes.create(heads, spec)
    for blocks in (_Blocks.forward(heads, spec, sizes), _Blocks.backward(heads, spec, sizes)):
        if _memory(blocks, sizes, ()) is None:
            return (
                f"one head's q, k, v and gradients take {blocks.bytes(1) / _MIB:.0f} MiB of VMEM, which has "
                f"{vmem_capacity() / _MIB:.0f} for them; use shorter sequences, narrower heads or implementation='xla'"
            )
    tables = 4 * len(heads.n_q) * (4 + 4 * sizes.groups)
    if tables > _SMEM_BYTES:
        return (
            f"{len(heads.n_q)} heads of {sizes.groups} groups of rows take {tables / 2**10:.0f} KiB of scalar memory, "
            f"which has {_SMEM_BYTES / 2**10:.0f} for them; use a smaller batch on each chip or implementation='xla'"
        )
    return None


def is_by_products(heads: Heads, spec: SinkhornSpec) -> bool:
    """Tell whether steps are made of products: devices exchange between them, or windows say what is in the support."""
    return spec.axis.is_shared or heads.segments is not None


def _call(kernel, blocks: _Blocks, tile_dtypes: tuple, lengths: tuple, heads: Heads, spec: SinkhornSpec, more=()):
    """Run a kernel for every head.

    The first outputs are sequences of the given `lengths`: their last tile is cut short. `more` are the backward
    kernel's inputs after q, k, v and b, without a.
    """
    sizes, dtype = Sizes.create(heads, spec), potential_dtype(*heads[:3])
    memory, tables = _memory(blocks, sizes, tile_dtypes), HeadTables.create(heads, spec, sizes)
    assert memory is not None, "`unsupported_reason` comes first"
    inputs = blocks.inputs._make([*(x.swapaxes(1, 2) for x in heads[:3]), tables.b, *more, tables.a])
    axes = jax.typeof(heads.q).manual_axis_type  # under shard_map, the axes that the heads vary over

    def of_head(block):
        return pl.BlockSpec((None, *block.shape), lambda n, *_: (n, 0, 0), pipeline_mode=pl.Buffered(memory.buffers))

    def of_all_heads(block, length: int | None):
        if block is None:
            return None
        shape = len(heads.n_q), block.shape[0], length or block.shape[1]
        return jax.ShapeDtypeStruct(shape, block.dtype, manual_axis_type=axes)

    scratch = blocks.scratch
    if memory.holding is not None:
        scratch = scratch._replace(tiles=jax.ShapeDtypeStruct((sizes.tiles, TILE, TILE), memory.holding))
    call = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, spec=spec, dtype=dtype),
        out_shape=(
            blocks.outputs._make(itertools.starmap(of_all_heads, itertools.zip_longest(blocks.outputs, lengths))),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(heads.n_q),),
            in_specs=(jax.tree.map(of_head, blocks.inputs),),
            out_specs=(jax.tree.map(of_head, blocks.outputs),),
            scratch_shapes=(jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), scratch),),
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_capacity() + RESERVED_VMEM, dimension_semantics=("parallel",)
        ),
        name=kernel.__name__,
    )
    return call(tables.integers, tables.scalars, inputs)[0]


def attend(heads: Heads, spec: SinkhornSpec):
    """Return output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual and steps of every head.

    Padding of q, k and v may hold anything. Their dtypes may differ; the output has the dtype of v.
    """
    if is_by_products(heads, spec):
        return Loop(tpu_band.Band, one_dtype=False).attend(heads, spec)
    return _attend(derivatives.only_reverse(heads, "pallas_tpu"), spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(heads: Heads, spec: SinkhornSpec):
    return _attend_fwd(heads, spec)[0]


def _attend_fwd(heads: Heads, spec: SinkhornSpec):
    heads = derivatives.only_first(heads, "pallas_tpu")
    rows, columns, sizes = heads.q.shape[1], heads.k.shape[1], Sizes.create(heads, spec)
    blocks = _Blocks.forward(heads, spec, sizes)
    out, f, g, residual, steps = _call(tpu_forward.forward_kernel, blocks, _tile_dtypes(heads), (rows,), heads, spec)
    last_f, last_g = _last(f, sizes, sizes.all_rows, rows), _last(g, sizes, sizes.all_columns, columns)
    made = jnp.full_like(heads.n_q, spec.base_steps) if steps is None else steps[:, 0, 0]
    return (out.swapaxes(1, 2), last_f, last_g, residual[:, 0, 0], made), (heads, f, g)


def _attend_bwd(spec, kept, cotangents):
    (heads, f, g), (d_out, d_f, d_g) = kept, derivatives.only_first(cotangents[:3], "pallas_tpu")
    sizes, dtype = Sizes.create(heads, spec), potential_dtype(*heads[:3])
    blocks, lengths = _Blocks.backward(heads, spec, sizes), (heads.q.shape[1], heads.k.shape[1], heads.k.shape[1])
    d_f = with_dustbin(d_f, sizes.rows, sizes.all_rows)
    d_g = with_dustbin(d_g, sizes.columns, sizes.all_columns)
    more = f, g, d_out.swapaxes(1, 2), d_f, d_g
    *gradients, d_score, d_a, d_b = _call(tpu_backward.backward_kernel, blocks, (dtype,), lengths, heads, spec, more)
    dq, dk, dv = (x.swapaxes(1, 2) for x in gradients)
    of_weights = _of_weights(heads, spec, sizes, d_a, d_b)
    return (Heads(dq, dk, dv, d_score[:, 0, 0].astype(heads.dustbin_score.dtype), None, None, *of_weights),)


def _of_weights(heads: Heads, spec: SinkhornSpec, sizes: Sizes, d_a, d_b) -> tuple[Array | None, ...]:
    """Return gradients of the weights, None for those not given, from the kernel's of the targets."""
    if d_a is None:
        return None, None

    def targets(row_weights, column_weights):
        given = heads._replace(row_weights=row_weights, column_weights=column_weights)
        return support.targets_of(given, spec, d_a.dtype)

    _, pull_back = jax.vjp(targets, *heads.weights)
    of_rows = _last(d_a, sizes, sizes.all_rows, heads.q.shape[1])
    return pull_back((of_rows, _last(d_b, sizes, sizes.all_columns, heads.k.shape[1])))


_attend.defvjp(promoting(_attend_fwd), promoting(_attend_bwd))


def _last(x: Array, sizes: Sizes, all_of_one: int, length: int) -> Array:
    """Take the last of several vectors in a row, `[N, 1, ...]`, as `[N, length + 1]`: the dustbin last, or 0."""
    x = x[:, 0, -all_of_one:]
    dustbin = x[:, -TILE][:, None] if sizes.dustbin else jnp.zeros_like(x[:, :1])
    return jnp.concatenate([x[:, :length], dustbin], 1)
