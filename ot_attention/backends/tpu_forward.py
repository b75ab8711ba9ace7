"""TPU kernel for one head: all Sinkhorn steps, the output and the residual (docs/math.md, section 3)."""

import jax.numpy as jnp

from ot_attention.backends.tpu_steps import Inputs, Iteration, Outputs, Scratch
from ot_attention.backends.tpu_tiles import TILE, Head, dot, flat, shifted, upright
from ot_attention.spec import SinkhornSpec


def forward_kernel(integers, scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch, *, sizes, spec, dtype):
    head = Head(integers, scalars, inputs.q, inputs.k, sizes, spec, dtype)
    for x in (*outputs[:3], scratch.f, scratch.g, *([] if outputs.steps is None else [outputs.steps])):
        x[...] = jnp.zeros_like(x)
    start, end = jnp.array(0, jnp.int32), spec.base_steps + spec.tail_steps
    if scratch.tiles is not None and scratch.tiles.dtype != dtype:
        # Rounded tiles serve the base steps only: the backward pass is exact for the tail's potentials.
        start = Iteration(head, spec, inputs, outputs, scratch).run(start, spec.base_steps)
        scratch = scratch._replace(tiles=None)
    Iteration(head, spec, inputs, outputs, scratch).run(start, end)
    _finish(head, spec, inputs, outputs)


def _finish(head: Head, spec: SinkhornSpec, inputs: Inputs, outputs: Outputs) -> None:
    """Write the output `P v` and the largest deviation of a row sum, both of the last tail step's plan."""
    sizes, (out, f_tail, g_tail, residual, _) = head.sizes, outputs
    last_f, last_g = (spec.tail_steps - 1) * sizes.all_rows, spec.tail_steps * sizes.all_columns

    def finish_group(group, largest):
        queries, f = head.queries(group), upright(f_tail[:, shifted(group.rows, last_f)])

        def plan(n, columns):
            return jnp.exp(head.scores(group, queries, n, columns) + f + g_tail[:, shifted(columns, last_g)])

        def carry_values(n, columns, carry):
            total, values = carry
            tile, v = plan(n, columns), head.columns_of(inputs.v, columns)
            return total + tile, values + dot(v, tile, (1, 1)).astype(head.dtype)

        start = head.zeros(), jnp.zeros((out.shape[0], TILE), head.dtype)
        total, values = head.fold_tiles(group, carry_values, start, dustbin=False)
        if head.dustbin:
            total += plan(group.number, head.bin_columns)
        supported = head.supported(group)
        out[:, group.rows] = jnp.where(supported, values, 0).astype(out.dtype)
        target = 1 if inputs.a is None else inputs.a[:, group.rows]
        off = jnp.where(supported, jnp.abs(flat(total.sum(1, keepdims=True)) - target), 0)
        return jnp.maximum(largest, off.max(1, keepdims=True))

    largest = head.fold_groups(finish_group, jnp.zeros((1, 1), head.dtype))
    if head.dustbin:
        f_bin = f_tail[:, last_f + sizes.rows :][:, :1]
        row = jnp.exp(head.bin_row(inputs.b[...]) + f_bin + g_tail[:, last_g:])
        largest = jnp.maximum(largest, jnp.abs(row.sum(1, keepdims=True) - head.a_bin))
    residual[...] = largest * jnp.ones_like(residual)
