"""TPU kernel for one head: all Sinkhorn steps, the output and the residual (docs/math.md, section 3).

A step is one sweep over the tiles of `K = exp(S + g - row maximum)`: the row sums of a group of rows give
`u = 1 / (K v)`, and u gives the group's share of the column sums `K^T u`. K stays in VMEM for all steps where it fits
(`Scratch.tiles`); otherwise each step makes it anew, one group at a time (`Scratch.strip`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ot_attention.backends import tpu_tiles
from ot_attention.backends.tpu_tiles import TILE, Group, Head, Ref, dot, flat, iota, log, ratio, shifted, upright
from ot_attention.spec import SinkhornSpec

# Scalings are absorbed into the potentials before they leave this range.
_SCALING_RANGE = 1e10


class Inputs(NamedTuple):
    """Arrays that the kernel reads."""

    q: Ref  # [width, rows]
    k: Ref  # [width, columns]
    v: Ref  # [value, columns]
    b: Ref  # [1, all columns], targets of columns


class Outputs(NamedTuple):
    """Arrays that the kernel writes."""

    out: Ref  # [value, rows]
    f_tail: Ref  # [1, R * all rows], f of every tail step
    g_tail: Ref  # [1, (R + 1) * all columns], g of the last base step and of every tail step
    residual: Ref  # [1, 128], alike in all lanes


class Scratch(NamedTuple):
    """Arrays that the kernel keeps in VMEM."""

    strip: Ref  # the tiles of one group
    top: Ref  # [1, rows], row maxima taken off before exp
    f: Ref  # [1, all rows]
    g: Ref  # [1, all columns]; scalings not yet absorbed are in `weight`
    weight: Ref  # [1, all columns], v; during a step in the log domain, column maxima
    mass: Ref  # [1, all columns], column sums
    tiles: Ref | None = None  # K for all groups; None makes it anew in every step


class _Range(NamedTuple):
    """Smallest and largest scaling of a step."""

    low: Array
    high: Array

    def including(self, scaling, exists) -> "_Range":
        low = jnp.minimum(self.low, jnp.where(exists, scaling, 1).min())
        return _Range(low, jnp.maximum(self.high, scaling.max()))


class _Progress(NamedTuple):
    step: Array  # steps done
    fine: Array  # whether the last one kept all scalings in range; if not, it changed nothing


def forward_kernel(integers, scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch, *, sizes, spec, dtype):
    head = Head(integers, scalars, inputs.q, inputs.k, sizes, spec, dtype)
    for x in (*outputs[:3], scratch.f, scratch.g):
        x[...] = jnp.zeros_like(x)
    start, end = jnp.array(0, jnp.int32), spec.base_steps + spec.tail_steps
    if scratch.tiles is not None and scratch.tiles.dtype != dtype:
        # Rounded tiles serve the base steps only: the backward pass is exact for the tail's potentials.
        start = _Iteration(head, spec, inputs.b, outputs, scratch).run(start, spec.base_steps)
        scratch = scratch._replace(tiles=None)
    _Iteration(head, spec, inputs.b, outputs, scratch).run(start, end)
    _finish(head, spec, inputs, outputs)


class _Iteration:
    """Sinkhorn steps of one head. They leave f and g of every tail step in the outputs."""

    def __init__(self, head: Head, spec: SinkhornSpec, b: Ref, outputs: Outputs, scratch: Scratch):
        self.head, self.spec, self.b, self.scratch = head, spec, b, scratch
        self.f_tail, self.g_tail = outputs.f_tail, outputs.g_tail
        self.strip, self.top, self.f, self.g, self.weight, self.mass, _ = scratch
        self.holds_tiles = scratch.tiles is not None

    def run(self, step, end: int):
        """Make all steps before `end`. Returns the number of steps done."""
        return jax.lax.while_loop(lambda step: step < end, functools.partial(self._absorb, end=end), step)

    def _absorb(self, step, end: int):
        """Make K from the g reached, scale it while scalings stay in range, and absorb them into g."""
        if self.holds_tiles:
            self.head.each_group(self._make_tiles)
        self.weight[...] = jnp.where(self.b[...] > 0, jnp.ones_like(self.weight), 0)
        progress = _Progress(step, jnp.array(True))
        if self.holds_tiles:
            progress = jax.lax.while_loop(lambda x: (x.step < end) & x.fine, self._sweep, progress)
        else:  # the next K is made from the potentials reached anyway
            progress = self._sweep(progress)
        self.g[...] += log(self.weight[...])
        return jax.lax.cond(progress.fine, lambda step: step, self._log_step, progress.step)

    def _record(self, step) -> None:
        """Write f of tail steps, and g of the last base step too; base steps overwrite each other."""
        for x, tail, earlier in ((self.f, self.f_tail, 1), (self.g, self.g_tail, 0)):
            slot, length = jnp.maximum(step - self.spec.base_steps - earlier, 0), x.shape[1]
            tail[:, pl.ds(pl.multiple_of(slot * length, TILE), length)] = x[...]

    def _gather(self, group: Group):
        """Put the group's `S + g` into the strip. Returns the row maxima, `[128, 1]`."""
        head, queries = self.head, self.head.queries(group)

        def put(n, columns, highest):
            s = head.scores(group, queries, n, columns) + self.g[:, columns]
            self.strip[n] = s
            return jnp.maximum(highest, s)

        lowest = jnp.full((TILE, TILE), -jnp.inf, head.dtype)
        highest = _row_max(head.fold_tiles(group, put, lowest))
        self.top[:, group.rows] = flat(highest)
        return highest

    def _make_tiles(self, group: Group) -> None:
        highest, (tiles, start) = self._gather(group), tpu_tiles.tiles_of(self.scratch, group)

        def scale(n, _):
            tiles[start + n] = jnp.exp(self.strip[n] - highest).astype(tiles.dtype)

        self.head.each_tile(group, scale)

    def _sweep(self, progress: _Progress) -> _Progress:
        """Make one step, `u = 1 / (K v)` and `v = b / (K^T u)`, unless a scaling would leave its range."""
        head, b, dtype = self.head, self.b, self.head.dtype
        recorded = progress.step + 1 >= self.spec.base_steps
        self.mass[...] = jnp.zeros_like(self.mass)
        reached = _Range(jnp.ones((), dtype), jnp.zeros((), dtype))
        reached = head.fold_groups(functools.partial(self._scale_group, recorded=recorded), reached)
        if head.dustbin:
            reached = self._scale_bin_row(reached)
        new = ratio(b[...], self.mass[...])
        reached = reached.including(new, b[...] > 0)
        fine = (reached.low > 1 / _SCALING_RANGE) & (reached.high < _SCALING_RANGE)

        @pl.when(fine)
        def _():
            self.weight[...] = new

        @pl.when(fine & recorded)
        def _():
            before = self.g[...]
            self.g[...] = before + log(new)
            self._record(progress.step + 1)
            self.g[...] = before

        return _Progress(progress.step + fine.astype(jnp.int32), fine)

    def _scale_group(self, group: Group, reached: _Range, recorded) -> _Range:
        """Compute u of the group's rows, and add their share to the column sums."""
        head, (tiles, start) = self.head, tpu_tiles.tiles_of(self.scratch, group)
        if not self.holds_tiles:
            self._make_tiles(group)

        def tile(n):
            return tiles[start + n].astype(head.dtype)

        total = head.row_sums(group, lambda n, columns: tile(n) * self.weight[:, columns])
        u = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # the target of a row with support is 1

        def add(n, columns):
            self.mass[:, columns] += (tile(n) * u).sum(0, keepdims=True)

        head.each_tile(group, add)

        @pl.when(recorded)
        def _():
            scaling = flat(u)
            self.f[:, group.rows] = jnp.where(scaling > 0, log(scaling) - self.top[:, group.rows], 0)

        return reached.including(u, u > 0)

    def _scale_bin_row(self, reached: _Range) -> _Range:
        head = self.head
        row = head.bin_row(self.b[...]) + self.g[...]
        top = _row_max(row)
        row = jnp.exp(row - top)
        u = ratio(head.a_bin, (row * self.weight[...]).sum(1, keepdims=True))
        self.mass[...] += row * u
        self._write_bin(jnp.where(head.a_bin > 0, log(u) - top, 0))
        return reached.including(u, u > 0)

    def _write_bin(self, f_bin) -> None:
        """Write f of the dustbin, the first lane of its tile."""
        self.f[:, self.head.sizes.rows :] = jnp.where(iota(1, (1, TILE)) == 0, f_bin, 0).astype(self.head.dtype)

    def _log_step(self, step):
        """Make one step in the log domain, for scores so large that scalings leave their range at once."""
        b, weight, mass = self.b, self.weight, self.mass
        self.head.each_group(self._log_rows)
        weight[...] = jnp.full_like(weight, -jnp.inf)
        self._each_tile_with_f(self._raise_column_maxima)
        if self.head.dustbin:
            bin_row = self._log_bin_row()
            weight[...] = jnp.maximum(weight[...], bin_row)
        weight[...] = jnp.where(b[...] > 0, weight[...], 0)
        mass[...] = jnp.zeros_like(mass)
        self._each_tile_with_f(self._add_column_sums)
        if self.head.dustbin:
            mass[...] += jnp.exp(bin_row - weight[...])
        self.g[...] = jnp.where(b[...] > 0, log(ratio(b[...], mass[...])) - weight[...], 0)
        self._record(step + 1)
        return step + 1

    def _log_rows(self, group: Group) -> None:
        """Compute f of the group's rows, `-LSE_j(S + g)`."""
        highest = self._gather(group)
        total = flat(self.head.row_sums(group, lambda n, _: jnp.exp(self.strip[n] - highest)))
        self.f[:, group.rows] = jnp.where(total > 0, -log(total) - self.top[:, group.rows], 0)

    def _log_bin_row(self):
        """Compute f of the dustbin's row; returns the row's `S + f`."""
        head, row = self.head, self.head.bin_row(self.b[...])
        highest = _row_max(row + self.g[...])
        f_bin = -log(jnp.exp(row + self.g[...] - highest).sum(1, keepdims=True)) - highest
        f_bin = jnp.where(head.a_bin > 0, f_bin + log(head.a_bin), 0)
        self._write_bin(f_bin)
        return row + f_bin

    def _each_tile_with_f(self, body) -> None:
        """Run `body(columns, S + f)` for the tiles of all groups."""

        def of_group(group):
            queries, f = self.head.queries(group), upright(self.f[:, group.rows])
            scores = functools.partial(self.head.scores, group, queries)
            self.head.each_tile(group, lambda n, columns: body(columns, scores(n, columns) + f))

        self.head.each_group(of_group)

    def _raise_column_maxima(self, columns, s) -> None:
        self.weight[:, columns] = jnp.maximum(self.weight[:, columns], s.max(0, keepdims=True))

    def _add_column_sums(self, columns, s) -> None:
        self.mass[:, columns] += jnp.exp(s - self.weight[:, columns]).sum(0, keepdims=True)


def _finish(head: Head, spec: SinkhornSpec, inputs: Inputs, outputs: Outputs) -> None:
    """Write the output `P v` and the largest deviation of a row sum, both of the last tail step's plan."""
    sizes, (out, f_tail, g_tail, residual) = head.sizes, outputs
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
        off = jnp.where(supported, jnp.abs(flat(total.sum(1, keepdims=True)) - 1), 0)
        return jnp.maximum(largest, off.max(1, keepdims=True))

    largest = head.fold_groups(finish_group, jnp.zeros((1, 1), head.dtype))
    if head.dustbin:
        f_bin = f_tail[:, last_f + sizes.rows :][:, :1]
        row = jnp.exp(head.bin_row(inputs.b[...]) + f_bin + g_tail[:, last_g:])
        largest = jnp.maximum(largest, jnp.abs(row.sum(1, keepdims=True) - head.a_bin))
    residual[...] = largest * jnp.ones_like(residual)


def _row_max(x):
    """Maximum of each row, `[rows, 1]`; 0 where it is minus infinity."""
    highest = x.max(1, keepdims=True)
    return jnp.where(highest > -jnp.inf, highest, 0)
