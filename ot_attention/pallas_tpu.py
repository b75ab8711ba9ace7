"""Forward and backward on a TPU: one head's band is computed once into VMEM and stays there for all steps.

Rows are cut into blocks of at most 128 whose diagonal lies within 128 positions of the longer sequence; a block's
columns start at a multiple of 128. Vectors over columns lie along lanes. Vectors over rows are columns of a tile while
they are used, and lie along lanes, `[blocks, 128]`, where they are kept. A step is one sweep: a tile's row sums give
u = a / (K v), and u its share of the column sums, so that K is read once. Blocks without rows are skipped.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ot_attention import support
from ot_attention.banded_xla import first_row_at
from ot_attention.spec import Heads, SinkhornSpec, UnsupportedError

_BLOCK = 128
# The band is made anew from the potentials before the scalings leave this range.
_SCALING_RANGE = 1e10
_VMEM_BYTES = 110 * 2**20
_TILE_BYTES = 48 * 2**20  # of that, for the band: the rest holds q, k, v, gradients, each twice
_PRECISION = "highest"


class _Sizes(NamedTuple):
    """Of one head's problem; columns and reach are multiples of 128."""

    rows: int
    columns: int
    blocks: int
    reach: int

    @property
    def slots(self) -> tuple[int, int]:
        return self.blocks, _BLOCK

    @classmethod
    def create(cls, rows: int, columns: int, band: int | None) -> "_Sizes":
        padded = -(-columns // _BLOCK) * _BLOCK
        longest = rows if band is None else max(rows, columns)
        reach = padded if band is None else min(-(-(2 * _BLOCK + 2 * band) // _BLOCK) * _BLOCK, padded)
        return cls(max(-(-rows // 8) * 8, _BLOCK), padded, -(-longest // _BLOCK), reach)


class _Problem(NamedTuple):
    """What the kernels are told about every head, beside q, k and v."""

    start: Array  # [N, blocks] int32, first of the 128 rows that a block reads; its own are among them
    some: Array  # [N, blocks] int32, whether it has any
    column: Array  # [N, blocks] int32, first column of each block's reach
    scalars: Array  # [N, 3], dustbin score and targets of the dustbin's row and column
    first: Array  # [N, blocks, 128], window of each row
    last: Array
    a: Array  # [N, blocks, 128]
    b: Array  # [N, 1, columns]
    rows: Array  # [N, blocks, 128] int32, which row it is; the dustbin's where there is none

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec, sizes: _Sizes) -> "_Problem":
        q, k, _, score, n_q, n_k = heads
        dtype = q.dtype
        position = _BLOCK * jnp.arange(sizes.blocks + 1, dtype=jnp.int32)
        if spec.band is None:
            start = jnp.broadcast_to(position, (*n_q.shape, sizes.blocks + 1))
        else:
            start = first_row_at(position, n_q[:, None], n_k[:, None])
        own, end = jnp.minimum(start[:, :-1], n_q[:, None]), jnp.minimum(start[:, 1:], n_q[:, None])
        start = jnp.minimum(own, sizes.rows - _BLOCK)
        rows = start[..., None] + jnp.arange(_BLOCK, dtype=jnp.int32)
        exists = (rows >= own[..., None]) & (rows < end[..., None])
        first, last = support.row_windows(rows.reshape(len(n_q), -1), n_q, n_k, spec.band)
        first, last = (
            jnp.where(exists, x.reshape(rows.shape), fill) for x, fill in ((first, sizes.columns), (last, -1))
        )
        column = jnp.where(own < end, first.min(-1), 0) // _BLOCK * _BLOCK
        a, b = support.targets(n_q, n_k, q.shape[1], k.shape[1], spec.band, spec.dustbin, dtype)
        scalars = jnp.stack([score, a[:, -1], b[:, -1]], -1)
        rows = jnp.where(exists, rows, q.shape[1])
        a = jnp.where(exists, jnp.take_along_axis(a, rows.reshape(len(n_q), -1), 1).reshape(rows.shape), 0)
        b = jnp.pad(b[:, None, :-1], ((0, 0), (0, 0), (0, sizes.columns - k.shape[1])))
        column = jnp.minimum(column, sizes.columns - sizes.reach)
        return cls(
            start, (own < end).astype(jnp.int32), column, scalars, first.astype(dtype), last.astype(dtype), a, b, rows
        )

    def to_slots(self, f: Array) -> Array:
        """A vector over all rows, `[N, rows + 1]`, as `[N, blocks, 128]`, 0 where there is no row."""
        slots = jnp.take_along_axis(f, self.rows.reshape(len(f), -1), 1).reshape(self.rows.shape)
        return jnp.where(self.a > 0, slots, 0)

    def to_rows(self, slots: Array, number: int) -> Array:
        """The reverse, `[N, blocks, 128]` to `[N, number]`."""
        put = jax.vmap(lambda x, index: jnp.zeros(number + 1, x.dtype).at[index].set(x))
        return put(slots.reshape(len(slots), -1), self.rows.reshape(len(slots), -1))[:, :-1]


class _Head:
    """One head inside a kernel: its references, its blocks, and scores made from them."""

    def __init__(self, start, some, column, scalars, q, k, first, last, a, b, sizes: _Sizes, spec: SinkhornSpec):
        self.start, self.some, self.column = start, some, column
        self.q, self.k, self.first, self.last, self.a, self.b = q, k, first, last, a, b
        self.sizes, self.dustbin = sizes, spec.dustbin != "none"
        self.scale = 1 / (math.sqrt(q.shape[-1]) * spec.epsilon)
        self.score, self.a_bin, self.b_bin = (jnp.full((1, 1), scalars[pl.program_id(0), i]) for i in range(3))

    def each(self, body, carry=0):
        """Runs `body(block, rows, columns, carry)` for every block that has rows."""
        head = pl.program_id(0)

        def step(block, carry):
            rows = pl.ds(self.start[head, block], _BLOCK)
            columns = pl.ds(pl.multiple_of(self.column[head, block], _BLOCK), self.sizes.reach)
            return jax.lax.cond(
                self.some[head, block] > 0, lambda c: body(pl.ds(block, 1), rows, columns, c), lambda c: c, carry
            )

        return jax.lax.fori_loop(0, self.sizes.blocks, step, carry)

    def scores(self, block, rows, columns):
        """`[128, reach]`, minus infinity outside the support."""
        s = self.scale * _dot(self.q[rows, :], self.k[columns, :], (1, 1))
        column = columns.start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        first, last = (_upright(x[block, :]).astype(jnp.int32) for x in (self.first, self.last))
        return jnp.where((column >= first) & (column <= last), s, -jnp.inf)

    def there(self, x, target):
        """x where a row or column has support."""
        return jnp.where(target > 0, x, 0)


def _forward_kernel(start, some, column, scalars, q, k, v, first, last, a, b, *rest, sizes: _Sizes, spec: SinkhornSpec):
    out, f_tail, g_tail, bins, tiles, top, f, g, weight, mass = rest
    head = _Head(start, some, column, scalars, q, k, first, last, a, b, sizes, spec)
    steps, dtype = spec.base_steps + spec.tail_steps, q.dtype
    one = jnp.ones((1, 1), dtype)
    for x in (out, f_tail, g_tail, bins, top, f, g):
        x[...] = jnp.zeros_like(x)

    def record(step, g, f_bin, g_bin):
        """The potentials after so many steps; those of base steps overwrite each other."""
        slot = pl.ds(jnp.maximum(step - spec.base_steps, 0), 1)
        f_tail[slot, :, :] = f[...][None]
        g_tail[slot, :] = g
        bins[slot, :] = _lanes(f_bin, g_bin)

    def gap(block, g_bin):
        """The dustbin's column of the kernel."""
        return head.there(jnp.exp(head.score + g_bin - _upright(top[block, :])), _upright(a[block, :]))

    def make_tiles(g_bin):
        def body(block, rows, columns, carry):
            s = head.scores(block, rows, columns) + g[:, columns]
            highest = s.max(1, keepdims=True)
            if head.dustbin:
                highest = jnp.maximum(highest, head.score + g_bin)
            highest = head.there(highest, _upright(a[block, :]))
            top[block, :] = _flat(highest)
            tiles[block, :, :] = jnp.exp(s - highest)[None]
            return carry

        head.each(body)

    def sweep(g_bin, carry):
        """A step: u from the rows of the kernel, and of its columns what the tiles of these rows hold."""
        step, _, weight_bin = carry
        recorded = step + 1 >= spec.base_steps
        mass[...] = jnp.zeros_like(mass)

        def body(block, rows, columns, carry):
            mass_bin, low, high = carry
            tile, target = tiles[block, :, :][0], _upright(a[block, :])
            total = (tile * weight[:, columns]).sum(1, keepdims=True)
            if head.dustbin:
                total += gap(block, g_bin) * weight_bin
            u = _ratio(target, total)
            mass[:, columns] += (tile * u).sum(0, keepdims=True)
            if head.dustbin:
                mass_bin += _sum(gap(block, g_bin) * u)

            @pl.when(recorded)
            def _():
                f[block, :] = head.there(_log(_flat(u)) - top[block, :], a[block, :])

            return mass_bin, jnp.minimum(low, jnp.where(target > 0, u, 1).min()), jnp.maximum(high, u.max())

        mass_bin, low, high = head.each(body, (0 * one, jnp.ones((), dtype), jnp.zeros((), dtype)))
        u_bin, top_bin, new_bin = one, 0 * one, weight_bin
        if head.dustbin:
            top_bin = jnp.maximum(head.score + jnp.where(b[...] > 0, g[...], -jnp.inf).max(1, keepdims=True), g_bin)
            row, corner = head.there(jnp.exp(head.score + g[...] - top_bin), b[...]), jnp.exp(g_bin - top_bin)
            u_bin = _ratio(head.a_bin, _sum(row * weight[...]) + corner * weight_bin)
            mass[...] += row * u_bin
            new_bin = _ratio(head.b_bin, mass_bin + corner * u_bin)
        new = _ratio(b[...], mass[...])
        low = jnp.minimum(jnp.minimum(low, jnp.where(b[...] > 0, new, 1).min()), jnp.minimum(u_bin, new_bin).min())
        high = jnp.maximum(jnp.maximum(high, new.max()), jnp.maximum(u_bin, new_bin).max())
        # An empty problem has targets 0 and scalings 0: nothing to go wrong.
        fine = ((low > 1 / _SCALING_RANGE) | (head.a_bin.max() == 0) & head.dustbin) & (high < _SCALING_RANGE)

        @pl.when(fine)
        def _():
            weight[...] = new

        @pl.when(fine & recorded)
        def _():
            record(step + 1, g[...] + _log(new), _log(u_bin) - top_bin, g_bin + _log(new_bin))

        return step + fine.astype(jnp.int32), fine, jnp.where(fine, new_bin, weight_bin)

    def log_step(step, g_bin):
        """One step in the log domain, for scores whose rows and columns have nothing in common."""

        def rows_body(block, rows, columns, carry):
            total = tiles[block, :, :][0].sum(1, keepdims=True)
            if head.dustbin:
                total += gap(block, g_bin)
            f[block, :] = head.there(_log(_flat(_ratio(_upright(a[block, :]), total))) - top[block, :], a[block, :])
            return carry

        def highest_body(block, rows, columns, highest_bin):
            s = head.scores(block, rows, columns) + _upright(f[block, :])
            weight[:, columns] = jnp.maximum(weight[:, columns], s.max(0, keepdims=True))
            return jnp.maximum(highest_bin, jnp.where(a[block, :] > 0, f[block, :], -jnp.inf).max(1, keepdims=True))

        def mass_body(block, rows, columns, mass_bin):
            s = head.scores(block, rows, columns) + _upright(f[block, :])
            mass[:, columns] += jnp.exp(s - weight[:, columns]).sum(0, keepdims=True)
            return mass_bin + _sum(head.there(jnp.exp(head.score + f[block, :] - highest_bin), a[block, :]))

        make_tiles(g_bin)
        head.each(rows_body)
        f_bin = 0 * one
        if head.dustbin:
            z = jnp.where(b[...] > 0, head.score + g[...], -jnp.inf)
            high = jnp.maximum(z.max(1, keepdims=True), g_bin)
            f_bin = _log(_ratio(head.a_bin, _sum(jnp.exp(z - high)) + jnp.exp(g_bin - high))) - high
        weight[...] = jnp.full_like(weight, -jnp.inf)
        highest_bin = head.each(highest_body, -jnp.inf * one)
        highest_bin = jnp.maximum(head.score + highest_bin, f_bin) if head.dustbin else 0 * one
        if head.dustbin:
            weight[...] = jnp.maximum(weight[...], head.score + f_bin)
        weight[...] = head.there(weight[...], b[...])
        mass[...] = jnp.zeros_like(mass)
        mass_bin = head.each(mass_body, 0 * one)
        if head.dustbin:
            mass[...] += jnp.exp(head.score + f_bin - weight[...])
            g_bin = _log(_ratio(head.b_bin, mass_bin + jnp.exp(f_bin - highest_bin))) - highest_bin
        g[...] = head.there(_log(_ratio(b[...], mass[...])) - weight[...], b[...])
        record(step + 1, g[...], f_bin, g_bin)
        return step + 1, g_bin

    def renew(carry):
        step, g_bin = carry
        make_tiles(g_bin)
        weight[...] = head.there(jnp.ones_like(weight), b[...])
        going = step, jnp.array(True), one
        step, fine, weight_bin = jax.lax.while_loop(
            lambda c: (c[0] < steps) & c[1], functools.partial(sweep, g_bin), going
        )
        g[...] += _log(weight[...])
        g_bin += _log(weight_bin)
        return jax.lax.cond(fine, lambda step, g_bin: (step, g_bin), log_step, step, g_bin)

    jax.lax.while_loop(lambda c: c[0] < steps, renew, (jnp.array(0, jnp.int32), 0 * one))
    f_bin, g_bin = (bins[spec.tail_steps :, i : i + 1] for i in range(2))

    def finish(block, rows, columns, residual):
        f = _upright(f_tail[spec.tail_steps, block, :])
        plan = jnp.exp(head.scores(block, rows, columns) + f + g_tail[spec.tail_steps :, columns])
        total, target = plan.sum(1, keepdims=True), _upright(a[block, :])
        # Rows of another block, which this one reads too, stay as they are.
        out[rows, :] = jnp.where(target > 0, _dot(plan, v[columns, :], (1, 0)), out[rows, :])
        if head.dustbin:
            total += head.there(jnp.exp(head.score + f + g_bin), target)
        return jnp.maximum(residual, jnp.abs(total - target).max(0, keepdims=True))

    residual = head.each(finish, 0 * one)
    if head.dustbin:
        row = head.there(jnp.exp(head.score + f_bin + g_tail[spec.tail_steps :, :]), b[...])
        total = jnp.where(head.a_bin > 0, _sum(row) + jnp.exp(f_bin + g_bin), 0)
        residual = jnp.maximum(residual, jnp.abs(total - head.a_bin))
    bins[spec.tail_steps :, :] = _lanes(f_bin, g_bin, residual)


def _backward_kernel(
    start, some, column, scalars, q, k, v, first, last, a, b, f, g, bins, d_out, d_f, d_g, d_bins, *rest, sizes, spec
):
    """Contract, section 3. Scores stay in VMEM, and each factor is made from them: none can overflow."""
    dq, dk, dv, d_score, tiles, f_bar, g_bar, next_g_bar, x_rows, y_columns = rest
    head = _Head(start, some, column, scalars, q, k, first, last, a, b, sizes, spec)
    tail = spec.tail_steps
    for x in (dq, dk, dv, f_bar, x_rows):
        x[...] = jnp.zeros_like(x)
    f_bins, g_bins = ([bins[r : r + 1, i : i + 1] for r in range(tail + 1)] for i in range(2))

    def factor(block, columns, r, s):
        """`exp(S + f_r + g_s)`."""
        return jnp.exp(tiles[block, :, :][0] + _upright(f[r, block, :]) + g[s : s + 1, columns])

    def bin_column(block, r, s):
        return head.there(jnp.exp(head.score + f[r, block, :] + g_bins[s]), a[block, :])

    def bin_row(r, s):
        return head.there(jnp.exp(head.score + f_bins[r] + g[s : s + 1, :]), b[...])

    def corner(r, s):
        return jnp.where(head.a_bin > 0, jnp.exp(f_bins[r] + g_bins[s]), 0)

    # ---- the plan, what it carries back, and sums over rows and columns of P * G ----
    g_bar[...] = d_g[...]

    def begin(block, rows, columns, carry):
        tiles[block, :, :] = head.scores(block, rows, columns)[None]
        plan, target = factor(block, columns, tail, tail), _upright(a[block, :])
        d_rows = jnp.where(target > 0, d_out[rows, :], 0)
        dv[columns, :] += _dot(plan, d_rows, (0, 0))
        weighted = plan * _dot(d_rows, v[columns, :], (1, 1))
        f_bar[block, :] = d_f[block, :] + _flat(weighted.sum(1, keepdims=True))
        g_bar[:, columns] += weighted.sum(0, keepdims=True)
        return carry

    head.each(begin)
    f_bar_bin, g_bar_bin = d_bins[:, 0:1], d_bins[:, 1:2]

    # ---- the tail, last step first ----
    score_bar, bins_x, bins_y = jnp.zeros((1, 1), q.dtype), {}, {}
    for r in range(tail, 0, -1):
        y_columns[r - 1 : r, :] = _quotient(g_bar[...], b[...])
        bins_y[r] = _quotient(g_bar_bin, head.b_bin)
        if head.dustbin:
            f_bar_bin = f_bar_bin - _sum(bin_row(r, r) * y_columns[r - 1 : r, :]) - corner(r, r) * bins_y[r]
            bins_x[r] = _quotient(f_bar_bin, head.a_bin)
        next_g_bar[...] = jnp.zeros_like(next_g_bar)

        def step(block, rows, columns, next_bin, r=r):
            of_rows = (factor(block, columns, r, r) * y_columns[r - 1 : r, columns]).sum(1, keepdims=True)
            bar = f_bar[block, :] - _flat(of_rows)
            if head.dustbin:
                bar -= bin_column(block, r, r) * bins_y[r]
            x = _quotient(bar, a[block, :])
            x_rows[r - 1, block, :] = x
            next_g_bar[:, columns] -= (factor(block, columns, r, r - 1) * _upright(x)).sum(0, keepdims=True)
            if head.dustbin:
                next_bin -= _sum(bin_column(block, r, r - 1) * x)
            f_bar[block, :] = jnp.zeros_like(x)
            return next_bin

        g_bar_bin = head.each(step, jnp.zeros((1, 1), q.dtype))
        g_bar[...] = next_g_bar[...]
        if head.dustbin:
            g_bar[...] -= bin_row(r, r - 1) * bins_x[r]
            g_bar_bin -= corner(r, r - 1) * bins_x[r]
            f_bar_bin = jnp.zeros_like(f_bar_bin)
            score_bar -= _sum(bin_row(r, r) * y_columns[r - 1 : r, :] + bin_row(r, r - 1) * bins_x[r])

    # ---- scores, queries and keys ----
    def finish(block, rows, columns, score_bar):
        target = _upright(a[block, :])
        d_rows = jnp.where(target > 0, d_out[rows, :], 0)
        d_scores = factor(block, columns, tail, tail) * _dot(d_rows, v[columns, :], (1, 1))
        for r in range(tail, 0, -1):
            d_scores -= factor(block, columns, r, r) * y_columns[r - 1 : r, columns]
            d_scores -= factor(block, columns, r, r - 1) * _upright(x_rows[r - 1, block, :])
            if head.dustbin:
                of_column = bin_column(block, r, r) * bins_y[r] + bin_column(block, r, r - 1) * x_rows[r - 1, block, :]
                score_bar -= _sum(of_column)
        d_scores *= head.scale
        dq[rows, :] = jnp.where(target > 0, _dot(d_scores, k[columns, :], (1, 0)), dq[rows, :])
        dk[columns, :] += _dot(d_scores, q[rows, :], (0, 0))
        return score_bar

    d_score[...] = _lanes(head.each(finish, score_bar))


def _quotient(x, y):
    """x / y, 0 where y is 0."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def _lanes(*values):
    """`[1, 1]` values side by side, `[1, 128]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, _BLOCK), 1)
    return sum(jnp.where(lane == i, x, 0) for i, x in enumerate(values))


def _dot(x, y, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=_PRECISION, preferred_element_type=x.dtype)


def _upright(x):
    """`[1, 128]` to `[128, 1]`."""
    return jnp.where(_eye(), jnp.broadcast_to(x, (_BLOCK, _BLOCK)), 0).sum(1, keepdims=True)


def _flat(x):
    """`[128, 1]` to `[1, 128]`."""
    return jnp.where(_eye(), jnp.broadcast_to(x, (_BLOCK, _BLOCK)), 0).sum(0, keepdims=True)


def _eye():
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), axis) for axis in range(2))
    return row == column


def _sum(x):
    return x.sum(1, keepdims=True).sum(0, keepdims=True)


def _ratio(x, y):
    """x / y; 0 where x is 0, and far out of range where y is 0 and x is not."""
    return jnp.where(x > 0, x / jnp.maximum(y, 1e-30), 0)


def _log(x):
    """0 where x is 0: potentials without support are 0."""
    return jnp.log(jnp.where(x > 0, x, 1))


def _call(kernel, heads: Heads, spec: SinkhornSpec, problem: _Problem, sizes: _Sizes, inputs, outputs, scratch):
    """Runs a kernel for every head: its inputs and outputs are whole arrays of that head, in VMEM."""
    number, dtype = len(heads.n_q), heads.q.dtype
    axes = jax.typeof(heads.q).manual_axis_type  # under shard_map, those that the heads vary over

    def block(shape):
        return pl.BlockSpec((None, *shape), lambda n, *_: (n, *(0 for _ in shape)))

    call = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, spec=spec),
        out_shape=[jax.ShapeDtypeStruct((number, *shape), dtype, manual_axis_type=axes) for shape in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(number,),
            in_specs=[block(x.shape[1:]) for x in inputs],
            out_specs=[block(shape) for shape in outputs],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
        name=kernel.__name__.strip("_"),
    )
    try:
        return call(problem.start, problem.some, problem.column, problem.scalars, *inputs)
    except ValueError as error:
        if "interpret mode" not in str(error):
            raise
        raise UnsupportedError(
            "implementation 'pallas_tpu' cannot do this: there is no TPU here; use implementation='xla' or None"
        ) from error


def refusal(spec: SinkhornSpec, rows: int, columns: int, dtype) -> str | None:
    """Why the kernels cannot do this and what to change, or None."""
    if spec.solver == "newton":
        return "its kernels make plain steps only; use solver='sinkhorn' or implementation='xla'"
    if spec.gradient == "implicit":
        return "its kernels have the tail's gradient only; use gradient='tail' or implementation='xla'"
    sizes = _Sizes.create(rows, columns, spec.band)
    held = sizes.blocks * _BLOCK * sizes.reach * jnp.dtype(dtype).itemsize
    if held <= _TILE_BYTES:
        return None
    return (
        f"the band of one head takes {held / 2**20:.0f} MiB, and {_TILE_BYTES / 2**20:.0f} fit into VMEM; "
        "use a smaller spec.band or implementation='xla'"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(heads: Heads, spec: SinkhornSpec):
    """Output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual `[N]` of every head."""
    return _attend_fwd(heads, spec)[0]


def _attend_fwd(heads: Heads, spec: SinkhornSpec):
    q, k, v = heads.q, heads.k, heads.v
    sizes, problem, inputs = _prepare(heads, spec)
    kept = spec.tail_steps + 1
    out, f, g, bins = _call(
        _forward_kernel,
        heads,
        spec,
        problem,
        sizes,
        inputs=inputs,
        outputs=((sizes.rows, v.shape[2]), (kept, *sizes.slots), (kept, sizes.columns), (kept, _BLOCK)),
        scratch=((*sizes.slots, sizes.reach), *2 * (sizes.slots,), *3 * ((1, sizes.columns),)),
    )
    out, last = out[:, : q.shape[1]], spec.tail_steps
    all_f = jnp.concatenate([problem.to_rows(f[:, last], q.shape[1]), bins[:, last, :1]], -1)
    all_g = jnp.concatenate([g[:, last, : k.shape[1]], bins[:, last, 1:2]], -1)
    return (out, all_f, all_g, bins[:, last, 2]), (heads, f, g, bins)


def _attend_bwd(spec, kept, cotangents):
    heads, f, g, bins = kept
    d_out, d_f, d_g, _ = cotangents
    rows, columns = heads.q.shape[1], heads.k.shape[1]
    sizes, problem, inputs = _prepare(heads, spec)
    d_bins = jnp.pad(jnp.stack([d_f[:, -1], d_g[:, -1]], -1)[:, None], ((0, 0), (0, 0), (0, _BLOCK - 2)))
    d_g = jnp.pad(d_g[:, None, :-1], ((0, 0), (0, 0), (0, sizes.columns - columns)))
    dq, dk, dv, d_score = _call(
        _backward_kernel,
        heads,
        spec,
        problem,
        sizes,
        inputs=(*inputs, f, g, bins, _padded(d_out, sizes.rows), problem.to_slots(d_f), d_g, d_bins),
        outputs=(*(x.shape[1:] for x in inputs[:3]), (1, _BLOCK)),
        scratch=(
            (*sizes.slots, sizes.reach),
            sizes.slots,
            *2 * ((1, sizes.columns),),
            (spec.tail_steps, *sizes.slots),
            (spec.tail_steps, sizes.columns),
        ),
    )
    gradients = dq[:, :rows], dk[:, :columns], dv[:, :columns], d_score[:, 0, 0]
    return (Heads(*gradients, None, None),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _prepare(heads: Heads, spec: SinkhornSpec) -> tuple[_Sizes, _Problem, tuple]:
    """What both kernels start from."""
    q, k, v = heads.q, heads.k, heads.v
    sizes = _Sizes.create(q.shape[1], k.shape[1], spec.band)
    problem = _Problem.create(heads, spec, sizes)
    arrays = _padded(q, sizes.rows), _padded(k, sizes.columns), _padded(v, sizes.columns)
    return sizes, problem, (*arrays, problem.first, problem.last, problem.a, problem.b)


def _padded(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))
