"""The two TPU kernels, for one head: all steps and the output, and the tail's gradient (contract, sections 2 and 3).

A step is one sweep: a tile's row sums give u = 1 / (K v), and u its share of the column sums. `holding` is the dtype of
the tiles that stay in VMEM for all steps; None makes them anew from q and k in every step, a group at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ot_attention.backends.tpu_tiles import TILE, Head, dot, finite, flat, iota, lanes, log, ratio, shifted, upright

# The tiles are made anew from the potentials before the scalings leave this range.
_SCALING_RANGE = 1e10


def forward_kernel(whole, scalars, q, k, v, b, out, f_tail, g_tail, residual, *scratch, sizes, spec, holding, dtype):
    strip, top, f, g, weight, mass, *tiles = scratch
    head = Head(whole, scalars, q, k, sizes, spec, dtype)
    steps = spec.base_steps + spec.tail_steps
    zero, bins = jnp.zeros((1, 1), dtype), head.bin_columns
    for x in (out, f_tail, g_tail, f, g):
        x[...] = jnp.zeros_like(x)

    def record(step):
        """f of every tail step, g of the last base step too; what base steps leave is overwritten."""
        f_slot, g_slot = (jnp.maximum(step - spec.base_steps - n, 0) for n in (1, 0))
        f_tail[:, pl.ds(pl.multiple_of(f_slot * sizes.all_rows, TILE), sizes.all_rows)] = f[...]
        g_tail[:, pl.ds(pl.multiple_of(g_slot * sizes.all_columns, TILE), sizes.all_columns)] = g[...]

    def gather(group):
        """The scores of a group plus g into the strip; returns the largest of every row."""
        queries = q[:, group.rows].T

        def put(n, columns, highest):
            s = head.scores(group, queries, n, columns) + g[:, columns]
            strip[n] = s
            return jnp.maximum(highest, s)

        highest = head.tiles(group, put, jnp.full((TILE, TILE), -jnp.inf, dtype)).max(1, keepdims=True)
        highest = jnp.where(highest > -jnp.inf, highest, 0)
        top[:, group.rows] = flat(highest)
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
                scaling = flat(u)
                f[:, group.rows] = jnp.where(scaling > 0, log(scaling) - top[:, group.rows], 0)

            return jnp.minimum(low, jnp.where(u > 0, u, 1).min()), jnp.maximum(high, u.max())

        low, high = head.groups(body, (jnp.ones((), dtype), jnp.zeros((), dtype)))
        if head.dustbin:
            row = head.bin_row(b[...]) + g[...]
            top_bin = finite(row.max(1, keepdims=True))
            row = jnp.exp(row - top_bin)
            u_bin = ratio(head.a_bin, (row * weight[...]).sum(1, keepdims=True))
            mass[...] += row * u_bin
            f[:, sizes.rows :] = lanes(jnp.where(head.a_bin > 0, log(u_bin) - top_bin, 0), dtype)
            low, high = jnp.minimum(low, jnp.where(u_bin > 0, u_bin, 1).min()), jnp.maximum(high, u_bin.max())
        new = ratio(b[...], mass[...])
        low, high = jnp.minimum(low, jnp.where(b[...] > 0, new, 1).min()), jnp.maximum(high, new.max())
        fine = (low > 1 / _SCALING_RANGE) & (high < _SCALING_RANGE)

        @pl.when(fine)
        def _():
            weight[...] = new

        @pl.when(fine & recorded)
        def _():
            before = g[...]
            g[...] = before + log(new)
            record(step + 1)
            g[...] = before

        return step + fine.astype(jnp.int32), fine

    def log_step(step):
        """One step in the log domain, for scores whose rows and columns have nothing in common."""

        def of_rows(group, carry):
            highest = gather(group)
            total = head.tiles(group, lambda n, _, sum: sum + jnp.exp(strip[n] - highest), head.zeros())
            total = flat(total.sum(1, keepdims=True))
            f[:, group.rows] = jnp.where(total > 0, -log(total) - top[:, group.rows], 0)
            return carry

        def of_columns(body):
            """Runs `body(columns, S + f)` for all tiles."""

            def of_group(group, carry):
                queries, of_rows = q[:, group.rows].T, upright(f[:, group.rows])

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
            highest = finite((row + g[...]).max(1, keepdims=True))
            f_bin = -log(jnp.exp(row + g[...] - highest).sum(1, keepdims=True)) - highest
            f_bin = jnp.where(head.a_bin > 0, f_bin + log(head.a_bin), 0)
            f[:, sizes.rows :] = lanes(f_bin, dtype)
            weight[...] = jnp.maximum(weight[...], row + f_bin)
        weight[...] = jnp.where(b[...] > 0, weight[...], 0)
        mass[...] = jnp.zeros_like(mass)
        of_columns(add_mass)
        if head.dustbin:
            mass[...] += jnp.exp(row + f_bin - weight[...])
        g[...] = jnp.where(b[...] > 0, log(ratio(b[...], mass[...])) - weight[...], 0)
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
        g[...] += log(weight[...])
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
        queries, of_rows = q[:, group.rows].T, upright(f_tail[:, shifted(group.rows, last_f)])

        def plan(n, columns):
            return jnp.exp(head.scores(group, queries, n, columns) + of_rows + g_tail[:, shifted(columns, last_g)])

        def carry_values(n, columns, carry):
            total, values = carry
            tile = plan(n, columns)
            return total + tile, values + dot(head.columns_of(v, columns), tile, (1, 1)).astype(dtype)

        start = head.zeros(), jnp.zeros((v.shape[0], TILE), dtype)
        total, values = head.tiles(group, carry_values, start, dustbin=False)
        if head.dustbin:
            total += plan(group.number, bins)
        supported = head.supported(group)
        out[:, group.rows] = jnp.where(supported, values, 0).astype(out.dtype)
        off = jnp.where(supported, jnp.abs(flat(total.sum(1, keepdims=True)) - 1), 0)
        return jnp.maximum(largest, off.max(1, keepdims=True))

    largest = head.groups(finish, zero)
    if head.dustbin:
        f_bin = f_tail[:, last_f + sizes.rows :][:, :1]
        row = jnp.exp(head.bin_row(b[...]) + f_bin + g_tail[:, last_g:])
        largest = jnp.maximum(largest, jnp.abs(row.sum(1, keepdims=True) - head.a_bin))
    residual[...] = largest * jnp.ones_like(residual)


def backward_kernel(
    whole, scalars, q, k, v, b, f, g, d_out, d_f, d_g, dq, dk, dv, d_score, *scratch, sizes, spec, holding, dtype
):
    """Contract, section 3. Every factor is made from the scores, with its own potentials: none can overflow."""
    strip, f_bar, g_bar, next_g_bar, x_rows, y_columns, dk_sum, dv_sum, *tiles = scratch
    head = Head(whole, scalars, q, k, sizes, spec, dtype)
    tail, zero, bins = spec.tail_steps, jnp.zeros((1, 1), dtype), head.bin_columns
    for x in (dq, dk_sum, dv_sum, f_bar, x_rows):
        x[...] = jnp.zeros_like(x)

    def of_rows(r, group):
        return upright(f[:, shifted(group.rows, (r - 1) * sizes.all_rows)])

    def of_columns(s, columns):
        return g[:, shifted(columns, s * sizes.all_columns)]

    def bin_row(r, s):
        """`exp(S + f_r + g_s)` of the dustbin's row."""
        f_bin = f[:, r * sizes.all_rows - TILE : r * sizes.all_rows][:, :1]
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
        transposed = d_rows.T

        def weigh(n, columns, total):
            plan = jnp.exp(scores(group, n) + from_rows + of_columns(tail, columns))
            dv_sum[:, columns] += dot(d_rows, plan, (1, 0)).astype(dtype)
            weighted = plan * dot(transposed, head.columns_of(v, columns), (1, 0)).astype(dtype)
            g_bar[:, columns] += weighted.sum(0, keepdims=True)
            return total + weighted

        total = head.tiles(group, weigh, head.zeros(), dustbin=False)
        f_bar[:, group.rows] = d_f[:, group.rows] + flat(total.sum(1, keepdims=True))
        return carry

    each(begin, 0)
    f_bar_bin = d_f[:, sizes.rows :][:, :1] if head.dustbin else zero

    # ---- the tail, last step first ----
    score_bar, bins_x = zero, {}
    for r in range(tail, 0, -1):
        slot = r - 1
        y = ratio(g_bar[...], b[...], b[...] > 0)
        y_columns[:, slot * sizes.all_columns : (slot + 1) * sizes.all_columns] = y
        next_g_bar[...] = jnp.zeros_like(next_g_bar)

        def step(group, carry, r=r, slot=slot):
            from_rows = of_rows(r, group)

            def times_y(n, columns, total):
                factor = jnp.exp(scores(group, n) + from_rows + of_columns(r, columns))
                return total + factor * y_columns[:, shifted(columns, slot * sizes.all_columns)]

            total = head.tiles(group, times_y, head.zeros()).sum(1, keepdims=True)
            x = jnp.where(head.supported(group), f_bar[:, group.rows] - flat(total), 0)
            x_rows[:, shifted(group.rows, slot * sizes.rows)] = x
            f_bar[:, group.rows] = jnp.zeros_like(x)
            x = upright(x)

            def times_x(n, columns, carry):
                factor = jnp.exp(scores(group, n) + from_rows + of_columns(r - 1, columns))
                next_g_bar[:, columns] -= (factor * x).sum(0, keepdims=True)
                return carry

            return head.tiles(group, times_x, carry)

        each(step, 0)
        if head.dustbin:
            here, earlier = bin_row(r, r), bin_row(r, r - 1)
            f_bar_bin = f_bar_bin - (here * y).sum(1, keepdims=True)
            bins_x[r] = ratio(f_bar_bin, head.a_bin, head.a_bin > 0)
            next_g_bar[...] -= earlier * bins_x[r]
            of_score = here * y + earlier * bins_x[r]
            residues = iota(1, of_score.shape) < sizes.columns  # the corner's score is fixed
            score_bar -= jnp.where(residues, of_score, 0).sum(1, keepdims=True)
            f_bar_bin = zero
        g_bar[...] = next_g_bar[...]

    # ---- scores, queries and keys ----
    def finish(group, score_bar):
        d_rows, q_rows = head.rows_of(d_out, group), head.rows_of(q, group)
        transposed = d_rows.T
        from_rows = {r: of_rows(r, group) for r in range(1, tail + 1)}
        x = [upright(x_rows[:, shifted(group.rows, slot * sizes.rows)]) for slot in range(tail)]

        def d_scores(n, columns):
            """Without the plan's own part, `P * G`."""
            s, total = scores(group, n), head.zeros()
            for r in range(tail, 0, -1):
                y = y_columns[:, shifted(columns, (r - 1) * sizes.all_columns)]
                total -= jnp.exp(s + from_rows[r] + of_columns(r, columns)) * y
                total -= jnp.exp(s + from_rows[r] + of_columns(r - 1, columns)) * x[r - 1]
            return total

        def pull_back(n, columns, total):
            plan = jnp.exp(scores(group, n) + from_rows[tail] + of_columns(tail, columns))
            d = d_scores(n, columns) + plan * dot(transposed, head.columns_of(v, columns), (1, 0)).astype(dtype)
            d *= head.scale
            dk_sum[:, columns] += dot(q_rows, d, (1, 0)).astype(dtype)
            return total + dot(head.columns_of(k, columns), d, (1, 1)).astype(dtype)

        total = head.tiles(group, pull_back, jnp.zeros((q.shape[0], TILE), dtype), dustbin=False)
        dq[:, group.rows] = total.astype(dq.dtype)
        if head.dustbin:
            score_bar += d_scores(group.number, bins).sum(1, keepdims=True).sum(0, keepdims=True)
        return score_bar

    d_score[...] = each(finish, score_bar) * jnp.ones_like(d_score)
    dk[...], dv[...] = dk_sum[...].astype(dk.dtype), dv_sum[...].astype(dv.dtype)
