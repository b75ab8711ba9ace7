"""Forward and backward on a TPU, one head at a time: what is kept in VMEM, and the kernels' `custom_vjp`.

Sequences lie along lanes, `[width, length]`, which is how XLA stores heads narrower than 128: nothing is copied to get
there, and no array but q, k, v, the output and a few vectors is in main memory. The kernel `exp(S)` is made once and
stays in VMEM for all steps where it fits; otherwise it is made anew from q and k in every step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ot_attention.backends.tpu_kernels import backward_kernel, forward_kernel
from ot_attention.backends.tpu_tiles import TILE, Problem, Sizes, compute_dtype, with_dustbin
from ot_attention.spec import Heads, SinkhornSpec, UnsupportedError

platform = "tpu"  # see `backends.Backend`
_MIB = 2**20
# Of one core. Elsewhere, and where it is not known what is compiled for, the smallest of those supported is assumed.
_VMEM = dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), 128 * _MIB)
_LEAST_VMEM = 64 * _MIB
_RESERVED_VMEM = 8 * _MIB  # for what the compiler keeps there
_SMEM_BYTES = 512 * 2**10  # of 1 MiB


class _Blocks(NamedTuple):
    """Shapes of one head's arrays in VMEM, and those of the kernel's own."""

    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    scratch: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def forward(cls, heads: Heads, spec: SinkhornSpec, sizes: Sizes) -> "_Blocks":
        dtype, tail = compute_dtype(heads), spec.tail_steps
        q, k, v = _sequences(heads, sizes)
        row, column = _vector(sizes.rows, dtype), _vector(sizes.all_columns, dtype)
        all_f, all_g = _vector(tail * sizes.all_rows, dtype), _vector((tail + 1) * sizes.all_columns, dtype)
        out = jax.ShapeDtypeStruct((v.shape[0], sizes.rows), v.dtype)
        scratch = _strip(sizes, dtype), row, _vector(sizes.all_rows, dtype), column, column, column
        return cls((q, k, v, column), (out, all_f, all_g, _vector(TILE, dtype)), scratch)

    @classmethod
    def backward(cls, heads: Heads, spec: SinkhornSpec, sizes: Sizes) -> "_Blocks":
        dtype, tail = compute_dtype(heads), spec.tail_steps
        forward = cls.forward(heads, spec, sizes)
        q, k, v, column = forward.inputs
        out, all_f, all_g, lane = forward.outputs
        scratch = (
            *(_strip(sizes, dtype), _vector(sizes.rows, dtype), column, column),
            *(_vector(tail * sizes.rows, dtype), _vector(tail * sizes.all_columns, dtype)),
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v)),
        )
        inputs = q, k, v, column, all_f, all_g, out, _vector(sizes.all_rows, dtype), column
        return cls(inputs, (q, k, v, lane), scratch)

    def bytes(self, buffers: int) -> int:
        return buffers * sum(map(_vmem_bytes, self.inputs + self.outputs)) + sum(map(_vmem_bytes, self.scratch))


def _sequences(heads: Heads, sizes: Sizes):
    lengths = sizes.rows, sizes.columns, sizes.columns
    return (jax.ShapeDtypeStruct((x.shape[2], n), x.dtype) for x, n in zip(heads[:3], lengths, strict=True))


def _vector(length: int, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), dtype)


def _strip(sizes: Sizes, dtype) -> jax.ShapeDtypeStruct:
    """The tiles of one group, at most."""
    return jax.ShapeDtypeStruct((sizes.chunks + 1, TILE, TILE), dtype)


def _vmem_bytes(x: jax.ShapeDtypeStruct) -> int:
    *outer, rows, lanes = x.shape
    sublanes = 32 // x.dtype.itemsize
    return math.prod(outer) * -(-rows // sublanes) * sublanes * -(-lanes // TILE) * TILE * x.dtype.itemsize


def _vmem_capacity() -> int:
    """Of the chip that is compiled for, as far as it is known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return (_VMEM.get(device.device_kind, _LEAST_VMEM) if device else _LEAST_VMEM) - _RESERVED_VMEM


class _Memory(NamedTuple):
    """What a kernel keeps in VMEM: the tiles' dtype (None: tiles are made anew), and blocks of how many heads."""

    holding: jnp.dtype | None
    buffers: int


def _memory(blocks: _Blocks, sizes: Sizes, dtypes: tuple) -> _Memory | None:
    """The first of the ways to work that fits, None if none does.

    dtypes: of tiles, in order of preference. Two buffers load the next head while this one is worked on.
    """
    for holding in (*dtypes, None):
        held = 0 if holding is None else sizes.tiles * TILE * TILE * jnp.dtype(holding).itemsize
        for buffers in (2, 1):
            if blocks.bytes(buffers) + held <= _vmem_capacity():
                return _Memory(holding, buffers)
    return None


def _tile_dtypes(heads: Heads) -> tuple:
    """What tiles of the forward may be rounded to: to bfloat16 if q and k are.

    Rounding q and k has moved scores by 2^-9 times their size; rounding exp(S) moves them by at most 2^-9, in the base
    steps alone.
    """
    dtype = compute_dtype(heads)
    return (dtype, jnp.bfloat16) if heads.q.dtype == heads.k.dtype == jnp.bfloat16 else (dtype,)


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Why the kernels cannot do this and what to change, or None."""
    if spec.solver == "newton":
        return "its kernels make plain steps only; use solver='sinkhorn' or implementation='xla'"
    if spec.gradient == "implicit":
        return "its kernels have the tail's gradient only; use gradient='tail' or implementation='xla'"
    sizes = Sizes.create(heads, spec)
    for blocks in (_Blocks.forward(heads, spec, sizes), _Blocks.backward(heads, spec, sizes)):
        if _memory(blocks, sizes, ()) is None:
            return (
                f"one head's q, k, v and gradients take {blocks.bytes(1) / _MIB:.0f} MiB of VMEM, which has "
                f"{_vmem_capacity() / _MIB:.0f} for them; use shorter sequences, narrower heads or implementation='xla'"
            )
    told = 4 * len(heads.n_q) * (4 + 4 * sizes.groups)
    if told > _SMEM_BYTES:
        return (
            f"{len(heads.n_q)} heads of {sizes.groups} groups of rows take {told / 2**10:.0f} KiB of scalar memory, "
            f"which has {_SMEM_BYTES / 2**10:.0f} for them; use a smaller batch on each chip or implementation='xla'"
        )
    return None


def _call(kernel, heads: Heads, spec: SinkhornSpec, sizes: Sizes, blocks: _Blocks, dtypes, problem, inputs, shapes):
    """Runs a kernel for every head; `shapes` are those of the outputs, whose last tile may be cut short."""
    memory, dtype = _memory(blocks, sizes, dtypes), compute_dtype(heads)
    assert memory is not None, "`unsupported_reason` comes first"
    axes = jax.typeof(heads.q).manual_axis_type  # under shard_map, those that the heads vary over

    def of_head(block):
        return pl.BlockSpec((None, *block.shape), lambda n, *_: (n, 0, 0), pipeline_mode=pl.Buffered(memory.buffers))

    scratch = [pltpu.VMEM(x.shape, x.dtype) for x in blocks.scratch]
    if memory.holding is not None:
        scratch.append(pltpu.VMEM((sizes.tiles, TILE, TILE), memory.holding))
    call = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, spec=spec, holding=memory.holding, dtype=dtype),
        out_shape=[
            jax.ShapeDtypeStruct((len(heads.n_q), *shape), block.dtype, manual_axis_type=axes)
            for shape, block in zip(shapes, blocks.outputs, strict=True)
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(heads.n_q),),
            in_specs=[of_head(x) for x in blocks.inputs],
            out_specs=[of_head(x) for x in blocks.outputs],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_vmem_capacity() + _RESERVED_VMEM, dimension_semantics=("parallel",)
        ),
        name=kernel.__name__.strip("_"),
    )
    try:
        return call(problem.whole, problem.scalars, *inputs)
    except ValueError as error:
        if "interpret mode" not in str(error):
            raise
        raise UnsupportedError(
            "implementation 'pallas_tpu' cannot do this: there is no TPU here; use implementation='xla' or None"
        ) from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(heads: Heads, spec: SinkhornSpec):
    """Output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual `[N]` of every head.

    Padding of q, k and v may hold anything, and their dtypes may differ; the output has that of v.
    """
    return _attend_fwd(heads, spec)[0]


def _attend_fwd(heads: Heads, spec: SinkhornSpec):
    rows, columns = heads.q.shape[1], heads.k.shape[1]
    sizes = Sizes.create(heads, spec)
    blocks = _Blocks.forward(heads, spec, sizes)
    problem = Problem.create(heads, spec, sizes)
    inputs = *(x.swapaxes(1, 2) for x in heads[:3]), problem.b
    shapes = (heads.v.shape[2], rows), *(x.shape for x in blocks.outputs[1:])
    out, f, g, residual = _call(
        forward_kernel, heads, spec, sizes, blocks, _tile_dtypes(heads), problem, inputs, shapes
    )
    last_f, last_g = _last(f, sizes, sizes.all_rows, rows), _last(g, sizes, sizes.all_columns, columns)
    return (out.swapaxes(1, 2), last_f, last_g, residual[:, 0, 0]), (heads, f, g)


def _attend_bwd(spec, kept, cotangents):
    heads, f, g = kept
    d_out, d_f, d_g, _ = cotangents
    sizes = Sizes.create(heads, spec)
    blocks = _Blocks.backward(heads, spec, sizes)
    problem = Problem.create(heads, spec, sizes)
    d_f = with_dustbin(d_f, sizes.rows, sizes.all_rows)
    d_g = with_dustbin(d_g, sizes.columns, sizes.all_columns)
    inputs = *(x.swapaxes(1, 2) for x in heads[:3]), problem.b, f, g, d_out.swapaxes(1, 2), d_f, d_g
    shapes = *(x.shape[1:] for x in inputs[:3]), (1, TILE)
    *gradients, d_score = _call(
        backward_kernel, heads, spec, sizes, blocks, (compute_dtype(heads),), problem, inputs, shapes
    )
    dq, dk, dv = (x.swapaxes(1, 2) for x in gradients)
    return (Heads(dq, dk, dv, d_score[:, 0, 0].astype(heads.dustbin_score.dtype), None, None),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _last(x: Array, sizes: Sizes, all_of_one: int, length: int) -> Array:
    """Of vectors one after the other, `[N, 1, ...]`, the last as `[N, length + 1]`, the dustbin last, 0 without one."""
    x = x[:, 0, -all_of_one:]
    dustbin = x[:, -TILE][:, None] if sizes.dustbin else jnp.zeros_like(x[:, :1])
    return jnp.concatenate([x[:, :length], dustbin], 1)
