"""Sinkhorn steps of one head on a TPU.

A step is one sweep over the tiles of `K = exp(S + g - row maximum)`: the row sums of a group of rows give
`u = a / (K v)`, and u gives the group's share of the column sums `K^T u`. K stays in VMEM for all steps where it fits
(`Scratch.tiles`); otherwise each step makes it anew, one group at a time (`Scratch.strip`).

Relaxed scalings are `exp(tau (log a - log K v + absorbed) - absorbed)`, absorbed being what K has of that side. A side
whose tau is 0 has potentials 0, and no sums are made for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ot_attention.backends import tpu_tiles
from ot_attention.backends.tpu_tiles import TILE, Group, Head, Ref, flat, iota, log, ratio, times, upright
from ot_attention.spec import SinkhornSpec

# Scalings are absorbed into the potentials before they leave this range.
_SCALING_RANGE = 1e10
# A relaxed scaling may be in range while its sum is not: below this one, entries that float32 flushes to 0 could count.
_LEAST_SUM = 1e-25
# Relaxed rows keep e^(1 - tau_a) of their maximum, up to this power of e: so scalings begin near 1.
_LARGEST_KEPT = 20.0


class Inputs(NamedTuple):
    """Arrays that the kernel reads."""

    q: Ref  # [width, rows]
    k: Ref  # [width, columns]
    v: Ref  # [value, columns]
    b: Ref  # [1, all columns], targets of columns
    a: Ref | None = None  # [1, rows], targets of rows, if they are weighted


class Outputs(NamedTuple):
    """Arrays that the kernel writes."""

    out: Ref  # [value, rows]
    f_tail: Ref  # [1, R * all rows], f of every tail step
    g_tail: Ref  # [1, (R + 1) * all columns], g of the last base step and of every tail step
    residual: Ref  # [1, 128], alike in all lanes
    steps: Ref | None = None  # [1, 128], base steps made, alike in all lanes; only with a tolerance


class Scratch(NamedTuple):
    """Arrays that the kernel keeps in VMEM."""

    strip: Ref  # the tiles of one group
    top: Ref  # [1, rows], taken off before exp: row maxima, but for what relaxed rows keep
    f: Ref  # [1, all rows]
    g: Ref  # [1, all columns]; scalings not yet absorbed are in `weight`
    weight: Ref  # [1, all columns], v; during a step in the log domain, column maxima
    mass: Ref  # [1, all columns], column sums
    earlier_f: Ref | None = None  # [1, all rows], f of the step before; only with a tolerance
    tiles: Ref | None = None  # K for all groups; None makes it anew in every step


class _Range(NamedTuple):
    """Smallest and largest scaling of a step."""

    low: Array
    high: Array

    def including(self, scaling, exists) -> "_Range":
        low = jnp.minimum(self.low, jnp.where(exists, scaling, 1).min())
        return _Range(low, jnp.maximum(self.high, scaling.max()))


class _Progress(NamedTuple):
    step: Array  # steps done, or left out where base steps ended early
    fine: Array  # whether the last one kept all scalings in range; if not, it changed nothing


class Iteration:
    """Sinkhorn steps of one head. They leave f and g of every tail step in the outputs."""

    def __init__(self, head: Head, spec: SinkhornSpec, inputs: Inputs, outputs: Outputs, scratch: Scratch):
        self.head, self.spec, self.scratch, self.a, self.b = head, spec, scratch, inputs.a, inputs.b
        self.f_tail, self.g_tail, self.steps = outputs.f_tail, outputs.g_tail, outputs.steps
        self.strip, self.top, self.f, self.g, self.weight, self.mass, self.earlier_f, _ = scratch
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
        top, (tiles, start) = self._gather(group), tpu_tiles.tiles_of(self.scratch, group)
        if self.spec.tau_a < 1:
            top = self._without_kept(top)
            self.top[:, group.rows] = flat(top)

        def scale(n, _):
            tiles[start + n] = jnp.exp(self.strip[n] - top).astype(tiles.dtype)

        self.head.each_tile(group, scale)

    def _without_kept(self, highest):
        """Return what is taken off relaxed rows, from their maxima."""
        return highest - jnp.clip((1 - self.spec.tau_a) * highest, -_LARGEST_KEPT, _LARGEST_KEPT)

    def _sweep(self, progress: _Progress) -> _Progress:
        """Make one step, `u = a / (K v)` and `v = b / (K^T u)`, unless a scaling would leave its range."""
        head, b, dtype, spec = self.head, self.b, self.head.dtype, self.spec
        # Where a step may be the last base step, all are recorded.
        recorded = jnp.array(True) if spec.tolerance else progress.step + 1 >= spec.base_steps
        if self.earlier_f is not None:
            self.earlier_f[...] = self.f[...]
        self.mass[...] = jnp.zeros_like(self.mass)
        reached = _Range(jnp.ones((), dtype), jnp.zeros((), dtype))
        reached = head.fold_groups(functools.partial(self._scale_group, recorded=recorded), reached)
        if head.dustbin:
            reached = self._scale_bin_row(reached)
        new = self._column_scaling()
        reached = reached.including(new, b[...] > 0)
        fine = (reached.low > 1 / _SCALING_RANGE) & (reached.high < _SCALING_RANGE)
        if 0 < spec.tau_b < 1:
            fine &= jnp.where(b[...] > 0, self.mass[...], 1).min() > _LEAST_SUM
        done = progress.step + 1
        if spec.tolerance:
            done = self._done(progress.step, log(new) - log(self.weight[...]), fine)

        @pl.when(fine)
        def _():
            self.weight[...] = new

        @pl.when(fine & recorded)
        def _():
            before = self.g[...]
            self.g[...] = before + log(new)
            self._record(progress.step + 1)
            self.g[...] = before

        return _Progress(jnp.where(fine, done, progress.step), fine)

    def _column_scaling(self):
        """Compute v of the half step to g, from the column sums of `exp(S + f + g)`; 0 where there is no target."""
        b, tau = self.b[...], self.spec.tau_b
        if tau == 0:
            return self.weight[...]
        if tau == 1:
            return ratio(b, self.mass[...])
        return jnp.where(b > 0, jnp.exp(tau * log(ratio(b, self.mass[...])) - (1 - tau) * self.g[...]), 0)

    def _done(self, step, g_change, fine):
        """Count a base step, if it is fine, and return the number of steps done: all base steps if it settles the head.

        It does if it moved no row sum, or where relaxed no potential, by more than the tolerance. The first step begins
        nowhere, and settles nothing.
        """
        spec, moved = self.spec, self._movement(g_change)
        is_base = step < spec.base_steps

        @pl.when(fine & is_base)
        def _():
            self.steps[...] += 1

        @pl.when(~fine)
        def _():
            self.f[...] = self.earlier_f[...]

        settles = is_base & (step > 0) & (moved <= spec.tolerance)
        return jnp.where(settles, spec.base_steps, step + 1)

    def _movement(self, g_change):
        """Measure a step as `Problem.movement` does: the most that it moved a row sum, or where relaxed a potential."""
        rows, change = self.head.sizes.rows, self.f[...] - self.earlier_f[...]
        if self.spec.is_relaxed:
            return jnp.maximum(jnp.abs(change).max(), jnp.abs(g_change).max())
        moved = jnp.abs(jnp.exp(-change) - 1)  # kernels have no expm1, and potentials are rounded by as much
        largest = (moved[:, :rows] if self.a is None else self.a[...] * moved[:, :rows]).max()
        if self.head.dustbin:
            largest = jnp.maximum(largest, (self.head.a_bin * moved[:, rows:]).max())
        return largest

    def _scale_group(self, group: Group, reached: _Range, recorded) -> _Range:
        """Compute u of the group's rows, and add their share to the column sums."""
        head, (tiles, start), tau = self.head, tpu_tiles.tiles_of(self.scratch, group), self.spec.tau_a
        if not self.holds_tiles:
            self._make_tiles(group)

        def tile(n):
            return tiles[start + n].astype(head.dtype)

        if tau > 0:
            total = head.row_sums(group, lambda n, columns: tile(n) * self.weight[:, columns])
            exists = total > 0
            # Without weights, the target of a row with support is 1.
            target = 1 if self.a is None else upright(self.a[:, group.rows])
            u = jnp.where(exists, target / jnp.where(exists, total, 1), 0)
            if tau < 1:
                u = jnp.where(exists, jnp.exp(tau * log(u) + (1 - tau) * upright(self.top[:, group.rows])), 0)
        else:
            exists = head.supported(group)
            scaling = jnp.where(exists, jnp.exp(self.top[:, group.rows]), 0)
            u = upright(scaling)

        def add(n, columns):
            self.mass[:, columns] += (tile(n) * u).sum(0, keepdims=True)

        if self.spec.tau_b > 0:
            head.each_tile(group, add)

        if tau > 0:

            @pl.when(recorded)
            def _():
                scaling = flat(u)
                self.f[:, group.rows] = jnp.where(scaling > 0, log(scaling) - self.top[:, group.rows], 0)

        return reached.including(u if tau > 0 else scaling, exists)

    def _scale_bin_row(self, reached: _Range) -> _Range:
        head = self.head
        row, tau = head.bin_row(self.b[...]) + self.g[...], self.spec.tau_a
        top = _row_max(row)
        if tau < 1:
            top = self._without_kept(top)
        row = jnp.exp(row - top)
        if tau > 0:
            u = ratio(head.a_bin, (row * self.weight[...]).sum(1, keepdims=True))
            if tau < 1:
                u = jnp.where(head.a_bin > 0, jnp.exp(tau * log(u) + (1 - tau) * top), 0)
            self._write_bin(jnp.where(head.a_bin > 0, log(u) - top, 0))
        else:
            u = jnp.where(head.a_bin > 0, jnp.exp(top), 0)
        self.mass[...] += row * u
        return reached.including(u, head.a_bin > 0)

    def _write_bin(self, f_bin) -> None:
        """Write f of the dustbin, the first lane of its tile."""
        self.f[:, self.head.sizes.rows :] = jnp.where(iota(1, (1, TILE)) == 0, f_bin, 0).astype(self.head.dtype)

    def _log_step(self, step):
        """Make one step in the log domain, for scores so large that scalings leave their range at once."""
        b, weight, mass, tau = self.b, self.weight, self.mass, self.spec.tau_b
        if self.earlier_f is not None:
            self.earlier_f[...] = self.f[...]
        if self.spec.tau_a > 0:
            self.head.each_group(self._log_rows)
        bin_row = self._log_bin_row() if self.head.dustbin else None
        done, before = step + 1, self.g[...] if self.spec.tolerance else None
        if tau > 0:
            self._log_column_sums(bin_row)
            self.g[...] = jnp.where(b[...] > 0, times(tau, log(ratio(b[...], mass[...])) - weight[...]), 0)
        if self.spec.tolerance:
            done = self._done(step, self.g[...] - before, jnp.array(True))
        self._record(step + 1)
        return done

    def _log_column_sums(self, bin_row) -> None:
        """Compute the largest entry of each column of `S + f` (`weight`), and sums of exp without it (`mass`)."""
        weight, mass = self.weight, self.mass
        weight[...] = jnp.full_like(weight, -jnp.inf)
        self._each_tile_with_f(self._raise_column_maxima)
        if bin_row is not None:
            weight[...] = jnp.maximum(weight[...], bin_row)
        weight[...] = jnp.where(self.b[...] > 0, weight[...], 0)
        mass[...] = jnp.zeros_like(mass)
        self._each_tile_with_f(self._add_column_sums)
        if bin_row is not None:
            mass[...] += jnp.exp(bin_row - weight[...])

    def _log_rows(self, group: Group) -> None:
        """Compute f of the group's rows, `tau_a (log a - LSE_j(S + g))`."""
        highest = self._gather(group)
        total = flat(self.head.row_sums(group, lambda n, _: jnp.exp(self.strip[n] - highest)))
        f = -log(total) - self.top[:, group.rows]
        if self.a is not None:
            f += log(self.a[:, group.rows])
        self.f[:, group.rows] = jnp.where(total > 0, times(self.spec.tau_a, f), 0)

    def _log_bin_row(self):
        """Compute f of the dustbin's row; returns the row's `S + f`."""
        head, row = self.head, self.head.bin_row(self.b[...])
        if self.spec.tau_a == 0:
            return row
        highest = _row_max(row + self.g[...])
        f_bin = -log(jnp.exp(row + self.g[...] - highest).sum(1, keepdims=True)) - highest
        f_bin = jnp.where(head.a_bin > 0, times(self.spec.tau_a, f_bin + log(head.a_bin)), 0)
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


def _row_max(x):
    """Maximum of each row, `[rows, 1]`; 0 where it is minus infinity."""
    highest = x.max(1, keepdims=True)
    return jnp.where(highest > -jnp.inf, highest, 0)
