"""Forward and backward on a TPU, one head at a time, in tiles of 128 x 128 scores.

Sequences lie along lanes, `[width, length]`, which is how XLA stores heads narrower than 128: nothing is copied to get
there, and no array but q, k, v, the output and a few vectors is in main memory. A group of 128 rows meets the tiles
from its first row's first column to its last row's last; those and no others are visited, so neither padding nor what
the band leaves out costs anything, and only tiles on an edge of the band are masked. The dustbin is one column more, in
a last tile of its own.

A step is one sweep: a tile's row sums give u = 1 / (K v), and u its share of the column sums. The tiles are made once
and stay in VMEM for all steps where they fit (see `_holding`); otherwise they are made anew from q and k in every step.
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
from ot_attention.spec import Heads, SinkhornSpec, UnsupportedError

_TILE = 128
# The tiles are made anew from the potentials before the scalings leave this range.
_SCALING_RANGE = 1e10
_MIB = 2**20
# Of one core. Elsewhere, and where it is not known what is compiled for, the smallest of those supported is assumed.
_VMEM = dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), 128 * _MIB)
_LEAST_VMEM = 64 * _MIB
_RESERVED_VMEM = 8 * _MIB  # for what the compiler keeps there
_SMEM_BYTES = 512 * 2**10  # of 1 MiB


class _Sizes(NamedTuple):
    """Of one head's problem, in tiles."""

    groups: int  # of rows
    chunks: int  # of columns
    tiles: int  # at most so many meet the band, with those of the dustbin

    @property
    def rows(self) -> int:
        return self.groups * _TILE

    @property
    def columns(self) -> int:
        return self.chunks * _TILE

    @property
    def all_rows(self) -> int:
        """With one tile more, whose first entry is the dustbin."""
        return self.rows + _TILE

    @property
    def all_columns(self) -> int:
        return self.columns + _TILE

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec) -> "_Sizes":
        groups, chunks = (-(-x.shape[1] // _TILE) for x in (heads.q, heads.k))
        tiles = groups * chunks
        if spec.band is not None:
            # A group's rows span their share of the columns and 2 W more; at either end it touches part of a tile.
            tiles = min(tiles, math.floor(chunks + groups * ((2 * spec.band + _TILE - 1) / _TILE + 1)))
        return cls(groups, chunks, tiles + (groups if spec.dustbin != "none" else 0))


class _Problem(NamedTuple):
    """What the kernels are told about every head, beside q, k and v."""

    whole: Array  # int32, for each head its lengths and for each group the four numbers of `_Group`
    scalars: Array  # for each head the dustbin's score and the target of its row
    b: Array  # [N, 1, all columns], targets of columns

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec, sizes: _Sizes) -> "_Problem":
        n_q, n_k, dtype = heads.n_q, heads.n_k, _dtype(heads)
        start = jnp.broadcast_to(jnp.arange(0, sizes.rows, _TILE, dtype=jnp.int32), (len(n_q), sizes.groups))
        end = jnp.minimum(start + _TILE, n_q[:, None])
        # Windows move forwards: the first row's bound all others' from below, the last row's from above.
        least_first, least_last = support.row_windows(start, n_q, n_k, spec.band)
        largest_first, largest_last = support.row_windows(end - 1, n_q, n_k, spec.band)
        some = (start < n_q[:, None]) & (n_k[:, None] > 0)
        first = jnp.where(some, least_first // _TILE, 0)
        number = jnp.where(some, jnp.maximum(largest_last // _TILE + 1 - first, 0), 0)
        # Tiles without an edge: every row exists, and has every column.
        inner, inner_end = -(-largest_first // _TILE), (least_last + 1) // _TILE
        inner_end = jnp.where(start + _TILE <= n_q[:, None], inner_end, inner)
        groups = jnp.stack([first, number, inner, inner_end], -1)
        whole = jnp.concatenate([jnp.stack([n_q, n_k], -1), groups.reshape(len(n_q), -1)], -1).reshape(-1)
        a, b = support.targets(n_q, n_k, heads.q.shape[1], heads.k.shape[1], spec.band, spec.dustbin, dtype)
        scalars = jnp.stack([heads.dustbin_score.astype(dtype), a[:, -1]], -1).reshape(-1)
        return cls(whole, scalars, _with_dustbin(b, sizes.columns))


class _Group(NamedTuple):
    """128 rows: which, where their tiles begin among all, and the tiles that they meet."""

    rows: pl.Slice
    base: Array
    first: Array
    number: Array
    inner: Array  # first tile without an edge
    inner_end: Array


class _Head:
    """One head inside a kernel: its rows and tiles, and scores made from them."""

    def __init__(self, whole, scalars, q, k, sizes: _Sizes, spec: SinkhornSpec, dtype):
        self.q, self.k, self.sizes, self.dtype = q, k, sizes, dtype
        self.dustbin, self.band = spec.dustbin != "none", spec.band
        self.scale = 1 / (math.sqrt(q.shape[0]) * spec.epsilon)
        start = pl.program_id(0) * (2 + 4 * sizes.groups)
        self.n_q, self.n_k = whole[start], whole[start + 1]
        self._of_group = lambda group: [whole[start + 2 + 4 * group + i] for i in range(4)]
        self.score, self.a_bin = (jnp.full((1, 1), scalars[2 * pl.program_id(0) + i]) for i in range(2))
        self.bin_columns = pl.ds(sizes.columns, _TILE)

    def groups(self, body, carry):
        """Runs `body(group, carry)` for every group that has rows; there are none where y has no columns."""

        def step(number, carry):
            base, carry = carry
            group = _Group(pl.ds(pl.multiple_of(number * _TILE, _TILE), _TILE), base, *self._of_group(number))
            return base + group.number + self.dustbin, body(group, carry)

        end = jnp.where(self.n_k > 0, jax.lax.div(self.n_q + _TILE - 1, jnp.int32(_TILE)), 0)
        return jax.lax.fori_loop(0, end, step, (jnp.array(0, jnp.int32), carry))[1]

    def tiles(self, group: _Group, body, carry, dustbin: bool = True):
        """Runs `body(n, columns, carry)` for the group's tiles, n counting from 0, the dustbin's last."""
        with_bin = self.dustbin and dustbin

        def step(n, carry):
            chunk = group.first + n
            if with_bin:
                chunk = jnp.where(n < group.number, chunk, self.sizes.chunks)
            return body(n, pl.ds(pl.multiple_of(chunk * _TILE, _TILE), _TILE), carry)

        return jax.lax.fori_loop(0, group.number + with_bin, step, carry)

    def scores(self, group: _Group, queries, n, columns):
        """A tile, minus infinity outside the support; `queries` are the group's, `[128, width]`."""

        def residues():
            # The last tile of y may be followed by the dustbin's, where there are no keys.
            start = pl.multiple_of(jnp.minimum(columns.start, self.sizes.columns - _TILE), _TILE)
            s = self.scale * _dot(queries, self.k[:, pl.ds(start, _TILE)], (1, 0)).astype(self.dtype)
            inner = (columns.start >= group.inner * _TILE) & (columns.start < group.inner_end * _TILE)
            return jax.lax.cond(inner, lambda: s, lambda: self._masked(group, s, columns))

        def bin_column():
            row, lane = group.rows.start + _iota(0), _iota(1)
            return jnp.where((row < self.n_q) & (lane == 0), self.score, -jnp.inf)

        return jax.lax.cond(n < group.number, residues, bin_column) if self.dustbin else residues()

    def _masked(self, group: _Group, s, columns):
        first, last = self._windows(group.rows.start + _iota(0, (_TILE, 1)))
        column = columns.start + _iota(1)
        return jnp.where((column >= first) & (column <= last), s, -jnp.inf)

    def _windows(self, row):
        """`support.row_windows` without a division of integers, which the chip has not."""
        exists = row < self.n_q
        if self.band is None:
            first, last = jnp.zeros_like(row), jnp.full_like(row, self.n_k - 1)
        else:
            # c(i) + 1/2 = odd n_k / (2 n_q). An estimate in floats is off by one at most; products wrap around, but
            # what is left over is small and exact.
            odd, denominator = 2 * row + 1, 2 * self.n_q
            estimate = odd.astype(jnp.float32) * self.n_k.astype(jnp.float32) / denominator.astype(jnp.float32)
            whole = estimate.astype(jnp.int32)
            rest = odd * self.n_k - whole * denominator
            off = (rest >= denominator).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
            whole, twice_rest = whole + off, 2 * (rest - off * denominator)
            first = jnp.maximum(whole + (twice_rest > denominator).astype(jnp.int32) - self.band, 0)
            last = jnp.minimum(whole - (twice_rest < denominator).astype(jnp.int32) + self.band, self.n_k - 1)
        return jnp.where(exists, first, 0), jnp.where(exists, last, -1)

    def supported(self, group: _Group):
        """Which of the group's rows have any score, `[1, 128]`."""
        row = group.rows.start + _iota(1, (1, _TILE))
        first, last = self._windows(row)
        return ((first <= last) | self.dustbin) & (row < self.n_q)

    def bin_row(self, b):
        """Scores of the dustbin's row, `[1, all columns]`; its corner is 0."""
        column = _iota(1, (1, self.sizes.all_columns))
        score = jnp.where(column < self.sizes.columns, self.score, 0)
        return jnp.where((b > 0) & (self.a_bin > 0), score, -jnp.inf)

    def rows_of(self, ref, group: _Group):
        """The group's part of `[width, rows]`, 0 beyond the true length, whatever stands there."""
        return _where(group.rows.start + _iota(1, (1, _TILE)) < self.n_q, ref[:, group.rows])

    def columns_of(self, ref, columns):
        """A tile's part of `[width, columns]`."""
        return _where(columns.start + _iota(1, (1, _TILE)) < self.n_k, ref[:, columns])

    def zeros(self):
        return jnp.zeros((_TILE, _TILE), self.dtype)


def _forward_kernel(whole, scalars, q, k, v, b, out, f_tail, g_tail, residual, *scratch, sizes, spec, holding, dtype):
    strip, top, f, g, weight, mass, *tiles = scratch
    head = _Head(whole, scalars, q, k, sizes, spec, dtype)
    steps = spec.base_steps + spec.tail_steps
    zero, bins = jnp.zeros((1, 1), dtype), head.bin_columns
    for x in (out, f_tail, g_tail, f, g):
        x[...] = jnp.zeros_like(x)

    def record(step):
        """f of every tail step, g of the last base step too; what base steps leave is overwritten."""
        f_slot, g_slot = (jnp.maximum(step - spec.base_steps - n, 0) for n in (1, 0))
        f_tail[:, pl.ds(pl.multiple_of(f_slot * sizes.all_rows, _TILE), sizes.all_rows)] = f[...]
        g_tail[:, pl.ds(pl.multiple_of(g_slot * sizes.all_columns, _TILE), sizes.all_columns)] = g[...]

    def gather(group):
        """The scores of a group plus g into the strip; returns the largest of every row."""
        queries = q[:, group.rows].T

        def put(n, columns, highest):
            s = head.scores(group, queries, n, columns) + g[:, columns]
            strip[n] = s
            return jnp.maximum(highest, s)

        highest = head.tiles(group, put, jnp.full((_TILE, _TILE), -jnp.inf, dtype)).max(1, keepdims=True)
        highest = jnp.where(highest > -jnp.inf, highest, 0)
        top[:, group.rows] = _flat(highest)
        return highest

    def make(group, held):
        """The group's part of the kernel `exp(S + g - top)`."""
        highest = gather(group)

        def scale(n, _, carry):
            tile = jnp.exp(strip[n] - highest)
            if held:
                tiles[0][group.base + n] = tile.astype(holding)
            else:
                strip[n] = tile
            return carry

        head.tiles(group, scale, 0)

    def sweep(carry, held):
        """A step: u from the rows of the kernel, and of its columns what the tiles of these rows hold."""
        step, _ = carry
        recorded = step + 1 >= spec.base_steps
        mass[...] = jnp.zeros_like(mass)

        def body(group, carry):
            low, high = carry
            if not held:
                make(group, held)
            tile = (lambda n: tiles[0][group.base + n].astype(dtype)) if held else (lambda n: strip[n])
            total = head.tiles(group, lambda n, columns, sum: sum + tile(n) * weight[:, columns], head.zeros())
            total = total.sum(1, keepdims=True)
            u = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)  # the target of a row with support is 1

            def add(n, columns, carry):
                mass[:, columns] += (tile(n) * u).sum(0, keepdims=True)
                return carry

            head.tiles(group, add, 0)

            @pl.when(recorded)
            def _():
                scaling = _flat(u)
                f[:, group.rows] = jnp.where(scaling > 0, _log(scaling) - top[:, group.rows], 0)

            return jnp.minimum(low, jnp.where(u > 0, u, 1).min()), jnp.maximum(high, u.max())

        low, high = head.groups(body, (jnp.ones((), dtype), jnp.zeros((), dtype)))
        if head.dustbin:
            row = head.bin_row(b[...]) + g[...]
            top_bin = _finite(row.max(1, keepdims=True))
            row = jnp.exp(row - top_bin)
            u_bin = _ratio(head.a_bin, (row * weight[...]).sum(1, keepdims=True))
            mass[...] += row * u_bin
            f[:, sizes.rows :] = _lanes(jnp.where(head.a_bin > 0, _log(u_bin) - top_bin, 0), dtype)
            low, high = jnp.minimum(low, jnp.where(u_bin > 0, u_bin, 1).min()), jnp.maximum(high, u_bin.max())
        new = _ratio(b[...], mass[...])
        low, high = jnp.minimum(low, jnp.where(b[...] > 0, new, 1).min()), jnp.maximum(high, new.max())
        fine = (low > 1 / _SCALING_RANGE) & (high < _SCALING_RANGE)

        @pl.when(fine)
        def _():
            weight[...] = new

        @pl.when(fine & recorded)
        def _():
            before = g[...]
            g[...] = before + _log(new)
            record(step + 1)
            g[...] = before

        return step + fine.astype(jnp.int32), fine

    def log_step(step):
        """One step in the log domain, for scores whose rows and columns have nothing in common."""

        def of_rows(group, carry):
            highest = gather(group)
            total = head.tiles(group, lambda n, _, sum: sum + jnp.exp(strip[n] - highest), head.zeros())
            total = _flat(total.sum(1, keepdims=True))
            f[:, group.rows] = jnp.where(total > 0, -_log(total) - top[:, group.rows], 0)
            return carry

        def of_columns(body):
            """Runs `body(columns, S + f)` for all tiles."""

            def of_group(group, carry):
                queries, of_rows = q[:, group.rows].T, _upright(f[:, group.rows])

                def of_tile(n, columns, carry):
                    body(columns, head.scores(group, queries, n, columns) + of_rows)
                    return carry

                return head.tiles(group, of_tile, carry)

            head.groups(of_group, 0)

        def raise_top(columns, s):
            weight[:, columns] = jnp.maximum(weight[:, columns], s.max(0, keepdims=True))

        def add_mass(columns, s):
            mass[:, columns] += jnp.exp(s - weight[:, columns]).sum(0, keepdims=True)

        head.groups(of_rows, 0)
        weight[...] = jnp.full_like(weight, -jnp.inf)
        of_columns(raise_top)
        if head.dustbin:
            row = head.bin_row(b[...])
            highest = _finite((row + g[...]).max(1, keepdims=True))
            f_bin = -_log(jnp.exp(row + g[...] - highest).sum(1, keepdims=True)) - highest
            f_bin = jnp.where(head.a_bin > 0, f_bin + _log(head.a_bin), 0)
            f[:, sizes.rows :] = _lanes(f_bin, dtype)
            weight[...] = jnp.maximum(weight[...], row + f_bin)
        weight[...] = jnp.where(b[...] > 0, weight[...], 0)
        mass[...] = jnp.zeros_like(mass)
        of_columns(add_mass)
        if head.dustbin:
            mass[...] += jnp.exp(row + f_bin - weight[...])
        g[...] = jnp.where(b[...] > 0, _log(_ratio(b[...], mass[...])) - weight[...], 0)
        record(step + 1)
        return step + 1

    def renew(step, end, held):
        if held:
            head.groups(lambda group, carry: make(group, held) or carry, 0)
        weight[...] = jnp.where(b[...] > 0, jnp.ones_like(weight), 0)
        going = step, jnp.array(True)
        if held:
            step, fine = jax.lax.while_loop(lambda c: (c[0] < end) & c[1], functools.partial(sweep, held=held), going)
        else:
            step, fine = sweep(going, held)
        g[...] += _log(weight[...])
        return jax.lax.cond(fine, lambda step: step, log_step, step)

    def iterate(start, end, held):
        return jax.lax.while_loop(lambda step: step < end, functools.partial(renew, end=end, held=held), start)

    # Rounded tiles serve the base steps only: the tail's potentials are what the backward is exact for.
    rounded = holding is not None and jnp.dtype(holding) != dtype
    step = iterate(jnp.array(0, jnp.int32), spec.base_steps if rounded else steps, holding is not None)
    if rounded:
        iterate(step, steps, False)

    last_f, last_g = (spec.tail_steps - 1) * sizes.all_rows, spec.tail_steps * sizes.all_columns

    def finish(group, largest):
        queries, of_rows = q[:, group.rows].T, _upright(f_tail[:, _shifted(group.rows, last_f)])

        def plan(n, columns):
            return jnp.exp(head.scores(group, queries, n, columns) + of_rows + g_tail[:, _shifted(columns, last_g)])

        def carry_values(n, columns, carry):
            total, values = carry
            tile = plan(n, columns)
            return total + tile, values + _dot(head.columns_of(v, columns), tile, (1, 1)).astype(dtype)

        start = head.zeros(), jnp.zeros((v.shape[0], _TILE), dtype)
        total, values = head.tiles(group, carry_values, start, dustbin=False)
        if head.dustbin:
            total += plan(group.number, bins)
        supported = head.supported(group)
        out[:, group.rows] = jnp.where(supported, values, 0).astype(out.dtype)
        off = jnp.where(supported, jnp.abs(_flat(total.sum(1, keepdims=True)) - 1), 0)
        return jnp.maximum(largest, off.max(1, keepdims=True))

    largest = head.groups(finish, zero)
    if head.dustbin:
        f_bin = f_tail[:, last_f + sizes.rows :][:, :1]
        row = jnp.exp(head.bin_row(b[...]) + f_bin + g_tail[:, last_g:])
        largest = jnp.maximum(largest, jnp.abs(row.sum(1, keepdims=True) - head.a_bin))
    residual[...] = largest * jnp.ones_like(residual)


def _backward_kernel(
    whole, scalars, q, k, v, b, f, g, d_out, d_f, d_g, dq, dk, dv, d_score, *scratch, sizes, spec, holding, dtype
):
    """Contract, section 3. Every factor is made from the scores, with its own potentials: none can overflow."""
    strip, f_bar, g_bar, next_g_bar, x_rows, y_columns, dk_sum, dv_sum, *tiles = scratch
    head = _Head(whole, scalars, q, k, sizes, spec, dtype)
    tail, zero, bins = spec.tail_steps, jnp.zeros((1, 1), dtype), head.bin_columns
    for x in (dq, dk_sum, dv_sum, f_bar, x_rows):
        x[...] = jnp.zeros_like(x)

    def of_rows(r, group):
        return _upright(f[:, _shifted(group.rows, (r - 1) * sizes.all_rows)])

    def of_columns(s, columns):
        return g[:, _shifted(columns, s * sizes.all_columns)]

    def bin_row(r, s):
        """`exp(S + f_r + g_s)` of the dustbin's row."""
        f_bin = f[:, r * sizes.all_rows - _TILE : r * sizes.all_rows][:, :1]
        return jnp.exp(head.bin_row(b[...]) + f_bin + g[:, s * sizes.all_columns : (s + 1) * sizes.all_columns])

    def make(group):
        """The group's scores into the strip, or into the tiles that all passes read."""
        queries = q[:, group.rows].T

        def put(n, columns, carry):
            if holding is None:
                strip[n] = head.scores(group, queries, n, columns)
            else:
                tiles[0][group.base + n] = head.scores(group, queries, n, columns)
            return carry

        head.tiles(group, put, 0)

    def scores(group, n):
        return strip[n] if holding is None else tiles[0][group.base + n]

    def each(body, carry):
        """Runs `body(group, carry)` for every group, whose scores are there."""

        def with_scores(group, carry):
            if holding is None:
                make(group)
            return body(group, carry)

        return head.groups(with_scores, carry)

    if holding is not None:
        head.groups(lambda group, carry: make(group) or carry, 0)

    # ---- the plan, what it carries back, and sums over rows and columns of P * G ----
    g_bar[...] = jnp.where(b[...] > 0, d_g[...], 0)

    def begin(group, carry):
        d_rows, from_rows = head.rows_of(d_out, group), of_rows(tail, group)
        upright = d_rows.T

        def weigh(n, columns, total):
            plan = jnp.exp(scores(group, n) + from_rows + of_columns(tail, columns))
            dv_sum[:, columns] += _dot(d_rows, plan, (1, 0)).astype(dtype)
            weighted = plan * _dot(upright, head.columns_of(v, columns), (1, 0)).astype(dtype)
            g_bar[:, columns] += weighted.sum(0, keepdims=True)
            return total + weighted

        total = head.tiles(group, weigh, head.zeros(), dustbin=False)
        f_bar[:, group.rows] = d_f[:, group.rows] + _flat(total.sum(1, keepdims=True))
        return carry

    each(begin, 0)
    f_bar_bin = d_f[:, sizes.rows :][:, :1]

    # ---- the tail, last step first ----
    score_bar, bins_x = zero, {}
    for r in range(tail, 0, -1):
        slot = r - 1
        y = _ratio(g_bar[...], b[...], b[...] > 0)
        y_columns[:, slot * sizes.all_columns : (slot + 1) * sizes.all_columns] = y
        next_g_bar[...] = jnp.zeros_like(next_g_bar)

        def step(group, carry, r=r, slot=slot):
            from_rows = of_rows(r, group)

            def times_y(n, columns, total):
                factor = jnp.exp(scores(group, n) + from_rows + of_columns(r, columns))
                return total + factor * y_columns[:, _shifted(columns, slot * sizes.all_columns)]

            total = head.tiles(group, times_y, head.zeros()).sum(1, keepdims=True)
            x = jnp.where(head.supported(group), f_bar[:, group.rows] - _flat(total), 0)
            x_rows[:, _shifted(group.rows, slot * sizes.rows)] = x
            f_bar[:, group.rows] = jnp.zeros_like(x)
            x = _upright(x)

            def times_x(n, columns, carry):
                factor = jnp.exp(scores(group, n) + from_rows + of_columns(r - 1, columns))
                next_g_bar[:, columns] -= (factor * x).sum(0, keepdims=True)
                return carry

            return head.tiles(group, times_x, carry)

        each(step, 0)
        if head.dustbin:
            here, earlier = bin_row(r, r), bin_row(r, r - 1)
            f_bar_bin = f_bar_bin - (here * y).sum(1, keepdims=True)
            bins_x[r] = _ratio(f_bar_bin, head.a_bin, head.a_bin > 0)
            next_g_bar[...] -= earlier * bins_x[r]
            of_score = here * y + earlier * bins_x[r]
            residues = _iota(1, of_score.shape) < sizes.columns  # the corner's score is fixed
            score_bar -= jnp.where(residues, of_score, 0).sum(1, keepdims=True)
            f_bar_bin = zero
        g_bar[...] = next_g_bar[...]

    # ---- scores, queries and keys ----
    def finish(group, score_bar):
        d_rows, q_rows = head.rows_of(d_out, group), head.rows_of(q, group)
        upright = d_rows.T
        from_rows = {r: of_rows(r, group) for r in range(1, tail + 1)}
        x = [_upright(x_rows[:, _shifted(group.rows, slot * sizes.rows)]) for slot in range(tail)]

        def d_scores(n, columns):
            """Without the plan's own part, `P * G`."""
            s, total = scores(group, n), head.zeros()
            for r in range(tail, 0, -1):
                y = y_columns[:, _shifted(columns, (r - 1) * sizes.all_columns)]
                total -= jnp.exp(s + from_rows[r] + of_columns(r, columns)) * y
                total -= jnp.exp(s + from_rows[r] + of_columns(r - 1, columns)) * x[r - 1]
            return total

        def pull_back(n, columns, total):
            plan = jnp.exp(scores(group, n) + from_rows[tail] + of_columns(tail, columns))
            d = d_scores(n, columns) + plan * _dot(upright, head.columns_of(v, columns), (1, 0)).astype(dtype)
            d *= head.scale
            dk_sum[:, columns] += _dot(q_rows, d, (1, 0)).astype(dtype)
            return total + _dot(head.columns_of(k, columns), d, (1, 1)).astype(dtype)

        total = head.tiles(group, pull_back, jnp.zeros((q.shape[0], _TILE), dtype), dustbin=False)
        dq[:, group.rows] = total.astype(dq.dtype)
        if head.dustbin:
            score_bar += d_scores(group.number, bins).sum(1, keepdims=True).sum(0, keepdims=True)
        return score_bar

    d_score[...] = each(finish, score_bar) * jnp.ones_like(d_score)
    dk[...], dv[...] = dk_sum[...].astype(dk.dtype), dv_sum[...].astype(dv.dtype)


def _dot(x, y, contract: tuple[int, int]):
    """A product that is as exact as its less exact factor; bfloat16 takes one pass of the matrix unit, float32 six."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    if jnp.bfloat16 in (x.dtype, y.dtype):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x, y, dimensions, precision="highest", preferred_element_type=x.dtype)


def _iota(axis: int, shape: tuple[int, int] = (_TILE, _TILE)):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _shifted(part: pl.Slice, by: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(part.start + by, _TILE), _TILE)


def _upright(x):
    """`[1, 128]` to `[128, 1]`."""
    return jnp.where(_iota(0) == _iota(1), jnp.broadcast_to(x, (_TILE, _TILE)), 0).sum(1, keepdims=True)


def _flat(x):
    """`[128, 1]` to `[1, 128]`."""
    return jnp.where(_iota(0) == _iota(1), jnp.broadcast_to(x, (_TILE, _TILE)), 0).sum(0, keepdims=True)


def _lanes(x, dtype):
    """`[1, 1]` as the first of 128 lanes."""
    return jnp.where(_iota(1, (1, _TILE)) == 0, x, 0).astype(dtype)


def _where(condition, x):
    return jnp.where(condition, x, jnp.zeros_like(x))


def _finite(x):
    return jnp.where(x > -jnp.inf, x, 0)


def _ratio(x, y, where=None):
    """x / y where x is above 0 (or `where`), else 0; far out of range where y is 0 and x is not."""
    return jnp.where(x > 0 if where is None else where, x / jnp.maximum(y, 1e-30), 0)


def _log(x):
    """0 where x is 0: potentials without support are 0."""
    return jnp.log(jnp.where(x > 0, x, 1))


class _Blocks(NamedTuple):
    """Shapes of one head's arrays in VMEM, and those of the kernel's own."""

    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    scratch: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def forward(cls, heads: Heads, spec: SinkhornSpec, sizes: _Sizes) -> "_Blocks":
        dtype, tail = _dtype(heads), spec.tail_steps
        q, k, v = _sequences(heads, sizes)
        row, column = _vector(sizes.rows, dtype), _vector(sizes.all_columns, dtype)
        all_f, all_g = _vector(tail * sizes.all_rows, dtype), _vector((tail + 1) * sizes.all_columns, dtype)
        out = jax.ShapeDtypeStruct((v.shape[0], sizes.rows), v.dtype)
        scratch = _strip(sizes, dtype), row, _vector(sizes.all_rows, dtype), column, column, column
        return cls((q, k, v, column), (out, all_f, all_g, _vector(_TILE, dtype)), scratch)

    @classmethod
    def backward(cls, heads: Heads, spec: SinkhornSpec, sizes: _Sizes) -> "_Blocks":
        dtype, tail = _dtype(heads), spec.tail_steps
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


def _dtype(heads: Heads):
    """Of potentials and sums."""
    return jnp.promote_types(jnp.result_type(heads.q, heads.k, heads.v), jnp.float32)


def _sequences(heads: Heads, sizes: _Sizes):
    lengths = sizes.rows, sizes.columns, sizes.columns
    return (jax.ShapeDtypeStruct((x.shape[2], n), x.dtype) for x, n in zip(heads[:3], lengths, strict=True))


def _vector(length: int, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), dtype)


def _strip(sizes: _Sizes, dtype) -> jax.ShapeDtypeStruct:
    """The tiles of one group, at most."""
    return jax.ShapeDtypeStruct((sizes.chunks + 1, _TILE, _TILE), dtype)


def _vmem_bytes(x: jax.ShapeDtypeStruct) -> int:
    *outer, rows, lanes = x.shape
    sublanes = 32 // x.dtype.itemsize
    return math.prod(outer) * -(-rows // sublanes) * sublanes * -(-lanes // _TILE) * _TILE * x.dtype.itemsize


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


def _memory(blocks: _Blocks, sizes: _Sizes, dtypes: tuple) -> _Memory | None:
    """The first of the ways to work that fits, None if none does.

    dtypes: of tiles, in order of preference. Two buffers load the next head while this one is worked on.
    """
    for holding in (*dtypes, None):
        held = 0 if holding is None else sizes.tiles * _TILE * _TILE * jnp.dtype(holding).itemsize
        for buffers in (2, 1):
            if blocks.bytes(buffers) + held <= _vmem_capacity():
                return _Memory(holding, buffers)
    return None


def _tile_dtypes(heads: Heads) -> tuple:
    """What tiles of the forward may be rounded to: to bfloat16 if q and k are.

    Rounding q and k has moved scores by 2^-9 times their size; rounding exp(S) moves them by at most 2^-9, in the base
    steps alone.
    """
    dtype = _dtype(heads)
    return (dtype, jnp.bfloat16) if heads.q.dtype == heads.k.dtype == jnp.bfloat16 else (dtype,)


def refusal(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Why the kernels cannot do this and what to change, or None."""
    if spec.solver == "newton":
        return "its kernels make plain steps only; use solver='sinkhorn' or implementation='xla'"
    if spec.gradient == "implicit":
        return "its kernels have the tail's gradient only; use gradient='tail' or implementation='xla'"
    sizes = _Sizes.create(heads, spec)
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


def _call(kernel, heads: Heads, spec: SinkhornSpec, sizes: _Sizes, blocks: _Blocks, dtypes, problem, inputs, shapes):
    """Runs a kernel for every head; `shapes` are those of the outputs, whose last tile may be cut short."""
    memory, dtype = _memory(blocks, sizes, dtypes), _dtype(heads)
    axes = jax.typeof(heads.q).manual_axis_type  # under shard_map, those that the heads vary over

    def of_head(block):
        return pl.BlockSpec((None, *block.shape), lambda n, *_: (n, 0, 0), pipeline_mode=pl.Buffered(memory.buffers))

    scratch = [pltpu.VMEM(x.shape, x.dtype) for x in blocks.scratch]
    if memory.holding is not None:
        scratch.append(pltpu.VMEM((sizes.tiles, _TILE, _TILE), memory.holding))
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
    sizes = _Sizes.create(heads, spec)
    blocks = _Blocks.forward(heads, spec, sizes)
    problem = _Problem.create(heads, spec, sizes)
    inputs = *(x.swapaxes(1, 2) for x in heads[:3]), problem.b
    shapes = (heads.v.shape[2], rows), *(x.shape for x in blocks.outputs[1:])
    out, f, g, residual = _call(
        _forward_kernel, heads, spec, sizes, blocks, _tile_dtypes(heads), problem, inputs, shapes
    )
    last_f, last_g = _last(f, sizes.all_rows, rows), _last(g, sizes.all_columns, columns)
    return (out.swapaxes(1, 2), last_f, last_g, residual[:, 0, 0]), (heads, f, g)


def _attend_bwd(spec, kept, cotangents):
    heads, f, g = kept
    d_out, d_f, d_g, _ = cotangents
    sizes = _Sizes.create(heads, spec)
    blocks = _Blocks.backward(heads, spec, sizes)
    problem = _Problem.create(heads, spec, sizes)
    d_f, d_g = _with_dustbin(d_f, sizes.rows), _with_dustbin(d_g, sizes.columns)
    inputs = *(x.swapaxes(1, 2) for x in heads[:3]), problem.b, f, g, d_out.swapaxes(1, 2), d_f, d_g
    shapes = *(x.shape[1:] for x in inputs[:3]), (1, _TILE)
    *gradients, d_score = _call(_backward_kernel, heads, spec, sizes, blocks, (_dtype(heads),), problem, inputs, shapes)
    dq, dk, dv = (x.swapaxes(1, 2) for x in gradients)
    return (Heads(dq, dk, dv, d_score[:, 0, 0].astype(heads.dustbin_score.dtype), None, None),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _with_dustbin(x: Array, length: int) -> Array:
    """`[N, n + 1]`, the dustbin last, as `[N, 1, length + 128]`, the dustbin at `length`."""
    x = jnp.concatenate([jnp.pad(x[:, :-1], ((0, 0), (0, length - x.shape[1] + 1))), x[:, -1:]], 1)
    return jnp.pad(x, ((0, 0), (0, _TILE - 1)))[:, None]


def _last(x: Array, all_of_one: int, length: int) -> Array:
    """Of vectors one after the other, `[N, 1, ...]`, the last as `[N, length + 1]`, the dustbin last."""
    x = x[:, 0, -all_of_one:]
    return jnp.concatenate([x[:, :length], x[:, -_TILE][:, None]], 1)
