"""TPU kernel for one head: the tail's gradient (docs/math.md, section 4).

Each factor `exp(S + f_r + g_s)` is made from the scores with its own potentials, so that none can overflow. In the
factor of its own half step a relaxed potential is divided by tau: by a or b, the factor then holds shares of 1.

Scores are made once where they fit into VMEM (`Scratch.tiles`), otherwise once a pass, one group at a time
(`Scratch.strip`).
"""

from typing import NamedTuple

import jax.numpy as jnp

from ot_attention.backends import tpu_tiles
from ot_attention.backends.tpu_tiles import (
    TILE,
    Group,
    Head,
    Ref,
    dot,
    flat,
    iota,
    over,
    ratio,
    shifted,
    times,
    upright,
)
from ot_attention.spec import SinkhornSpec


class Inputs(NamedTuple):
    """Arrays that the kernel reads."""

    q: Ref  # [width, rows]
    k: Ref  # [width, columns]
    v: Ref  # [value, columns]
    b: Ref  # [1, all columns], targets of columns
    f: Ref  # [1, R * all rows], f of every tail step
    g: Ref  # [1, (R + 1) * all columns], g of the last base step and of every tail step
    d_out: Ref  # [value, rows]
    d_f: Ref  # [1, all rows]
    d_g: Ref  # [1, all columns]
    a: Ref | None = None  # [1, rows], targets of rows, if they are weighted


class Outputs(NamedTuple):
    """Arrays that the kernel writes."""

    dq: Ref  # [width, rows]
    dk: Ref  # [width, columns]
    dv: Ref  # [value, columns]
    d_score: Ref  # [1, 128], alike in all lanes
    d_a: Ref | None = None  # [1, all rows], of the targets of rows; both only if there are weights
    d_b: Ref | None = None  # [1, all columns]


class Scratch(NamedTuple):
    """Arrays that the kernel keeps in VMEM. A bar marks the cotangent of a potential."""

    strip: Ref  # the tiles of one group
    f_bar: Ref  # [1, rows]
    g_bar: Ref  # [1, all columns]
    next_g_bar: Ref  # [1, all columns]
    x_rows: Ref  # [1, R * rows], tau_a f_bar / a of every tail step
    y_columns: Ref  # [1, R * all columns], tau_b g_bar / b of every tail step
    dk_sum: Ref  # [width, columns]
    dv_sum: Ref  # [value, columns]
    tiles: Ref | None = None  # the scores of all groups; None makes them anew in every pass


def backward_kernel(integers, scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch, *, sizes, spec, dtype):
    head, zero = Head(integers, scalars, inputs.q, inputs.k, sizes, spec, dtype), jnp.zeros((1, 1), dtype)
    for x in (outputs.dq, scratch.dk_sum, scratch.dv_sum, scratch.f_bar, scratch.x_rows):
        x[...] = jnp.zeros_like(x)
    for x in (outputs.d_a, outputs.d_b):
        if x is not None:
            x[...] = jnp.zeros_like(x)
    gradient = _Gradient(head, spec, inputs, outputs, scratch)
    gradient.start()
    score_bar, f_bar_bin = zero, inputs.d_f[:, sizes.rows :][:, :1] if head.dustbin else zero
    for r in range(spec.tail_steps, 0, -1):
        score_bar = gradient.pull_back_step(r, f_bar_bin, score_bar)
        f_bar_bin = zero  # only the last step's f is handed out
    gradient.write(score_bar)


class _Gradient:
    """The backward pass of one head: the plan's cotangent, the tail steps, then queries and keys."""

    def __init__(self, head: Head, spec: SinkhornSpec, inputs: Inputs, outputs: Outputs, scratch: Scratch):
        self.head, self.tail, self.inputs, self.outputs, self.scratch = head, spec.tail_steps, inputs, outputs, scratch
        self.tau_a, self.tau_b = spec.tau_a, spec.tau_b
        if scratch.tiles is not None:
            head.each_group(self._make_scores)

    def _make_scores(self, group: Group) -> None:
        queries, (tiles, start) = self.head.queries(group), tpu_tiles.tiles_of(self.scratch, group)

        def put(n, columns):
            tiles[start + n] = self.head.scores(group, queries, n, columns)

        self.head.each_tile(group, put)

    def _scores(self, group: Group, n):
        tiles, start = tpu_tiles.tiles_of(self.scratch, group)
        return tiles[start + n]

    def _fold_groups(self, body, carry):
        """Run `carry = body(group, carry)` for every group, whose scores are there."""

        def with_scores(group, carry):
            if self.scratch.tiles is None:
                self._make_scores(group)
            return body(group, carry)

        return self.head.fold_groups(with_scores, carry)

    def _f(self, r: int, group: Group):
        return upright(self.inputs.f[:, shifted(group.rows, (r - 1) * self.head.sizes.all_rows)])

    def _g(self, s: int, columns, tau: float = 1):
        return over(self.inputs.g[:, shifted(columns, s * self.head.sizes.all_columns)], tau)

    def _bin_row(self, r: int, s: int, taus: tuple[float, float]):
        """Compute `exp(S + f_r / tau + g_s / tau)` of the dustbin's row."""
        inputs, sizes = self.inputs, self.head.sizes
        f_bin = inputs.f[:, r * sizes.all_rows - TILE : r * sizes.all_rows][:, :1]
        g = inputs.g[:, s * sizes.all_columns : (s + 1) * sizes.all_columns]
        return jnp.exp(self.head.bin_row(inputs.b[...]) + over(f_bin, taus[0]) + over(g, taus[1]))

    def start(self) -> None:
        """Compute dv, and the cotangents of the last f and g: row and column sums of P * G, with `G = d_out v^T`."""
        head, inputs, scratch = self.head, self.inputs, self.scratch
        scratch.g_bar[...] = jnp.where(inputs.b[...] > 0, inputs.d_g[...], 0)

        def of_group(group, carry):
            d_rows, f = head.rows_of(inputs.d_out, group), self._f(self.tail, group)
            transposed = d_rows.T

            def weighted_plan(n, columns):
                plan = jnp.exp(self._scores(group, n) + f + self._g(self.tail, columns))
                scratch.dv_sum[:, columns] += dot(d_rows, plan, (1, 0)).astype(head.dtype)
                weighted = plan * dot(transposed, head.columns_of(inputs.v, columns), (1, 0)).astype(head.dtype)
                scratch.g_bar[:, columns] += weighted.sum(0, keepdims=True)
                return weighted

            total = head.row_sums(group, weighted_plan, dustbin=False)
            scratch.f_bar[:, group.rows] = inputs.d_f[:, group.rows] + flat(total)
            return carry

        self._fold_groups(of_group, 0)

    def pull_back_step(self, r: int, f_bar_bin, score_bar):
        """Pull cotangents back through tail step r: from (f_r, g_r) to g_{r-1}. Returns the dustbin score's."""
        head, scratch, b = self.head, self.scratch, self.inputs.b
        f_bar, g_bar, next_g_bar = scratch.f_bar, scratch.g_bar, scratch.next_g_bar
        x_start, y_start = (r - 1) * head.sizes.rows, (r - 1) * head.sizes.all_columns
        y = times(self.tau_b, ratio(g_bar[...], b[...], b[...] > 0))
        scratch.y_columns[:, y_start : y_start + head.sizes.all_columns] = y
        next_g_bar[...] = jnp.zeros_like(next_g_bar)

        def of_group(group, carry):
            f = self._f(r, group)

            def times_y(n, columns):
                factor = jnp.exp(self._scores(group, n) + f + self._g(r, columns, self.tau_b))
                return factor * scratch.y_columns[:, shifted(columns, y_start)]

            x = f_bar[:, group.rows]
            if self.tau_b > 0:
                x -= flat(head.row_sums(group, times_y))
            x = jnp.where(head.supported(group), x, 0)
            if self.inputs.a is not None:
                a = self.inputs.a[:, group.rows]
                x = ratio(x, a, a > 0)
            x = times(self.tau_a, x)
            scratch.x_rows[:, shifted(group.rows, x_start)] = x
            f_bar[:, group.rows] = jnp.zeros_like(x)
            if self.tau_a == 0 or r == 1:  # nothing needs the cotangent of the last base step's g
                return carry
            x, f_over_tau = upright(x), over(f, self.tau_a)

            def times_x(n, columns):
                factor = jnp.exp(self._scores(group, n) + f_over_tau + self._g(r - 1, columns))
                next_g_bar[:, columns] -= (factor * x).sum(0, keepdims=True)

            head.each_tile(group, times_x)
            return carry

        self._fold_groups(of_group, 0)
        if head.dustbin:
            score_bar = self._pull_back_bin_row(r, y, f_bar_bin, score_bar)
        g_bar[...] = next_g_bar[...]
        return score_bar

    def _pull_back_bin_row(self, r: int, y, f_bar_bin, score_bar):
        head, terms = self.head, []
        if self.tau_b > 0:
            terms.append(self._bin_row(r, r, (1, self.tau_b)) * y)
            f_bar_bin = f_bar_bin - terms[0].sum(1, keepdims=True)
        if self.tau_a > 0:
            x = times(self.tau_a, ratio(f_bar_bin, head.a_bin, head.a_bin > 0))
            terms.append(self._bin_row(r, r - 1, (self.tau_a, 1)) * x)
            self.scratch.next_g_bar[...] -= terms[-1]
            if self.outputs.d_a is not None:
                self.outputs.d_a[:, head.sizes.rows :] += jnp.where(iota(1, (1, TILE)) == 0, x, 0)
        residues = iota(1, (1, head.sizes.all_columns)) < head.sizes.columns  # the corner's score is fixed
        for term in terms:
            score_bar -= jnp.where(residues, term, 0).sum(1, keepdims=True)
        return score_bar

    def write(self, score_bar) -> None:
        """Write the gradients of q, k, v and the dustbin score, and of the targets if they are weights."""
        head, dtype, inputs, dk_sum = self.head, self.head.dtype, self.inputs, self.scratch.dk_sum
        outputs = self.outputs

        def of_group(group, score_bar):
            d_rows, q_rows = head.rows_of(inputs.d_out, group), head.rows_of(inputs.q, group)
            transposed, f = d_rows.T, [self._f(r, group) for r in range(1, self.tail + 1)]
            d_tail = self._tail_cotangent(group, f)

            def pull_back(n, columns, total):
                plan = jnp.exp(self._scores(group, n) + f[-1] + self._g(self.tail, columns))
                d_plan = dot(transposed, head.columns_of(inputs.v, columns), (1, 0)).astype(dtype)
                d = (d_tail(n, columns) + plan * d_plan) * head.scale
                dk_sum[:, columns] += dot(q_rows, d, (1, 0)).astype(dtype)
                return total + dot(head.columns_of(inputs.k, columns), d, (1, 1)).astype(dtype)

            total = head.fold_tiles(group, pull_back, jnp.zeros((inputs.q.shape[0], TILE), dtype), dustbin=False)
            outputs.dq[:, group.rows] = total.astype(outputs.dq.dtype)
            if head.dustbin:
                score_bar += d_tail(group.number, head.bin_columns).sum(1, keepdims=True).sum(0, keepdims=True)
            return score_bar

        outputs.d_score[...] = self._fold_groups(of_group, score_bar) * jnp.ones_like(outputs.d_score)
        outputs.dk[...] = dk_sum[...].astype(outputs.dk.dtype)
        outputs.dv[...] = self.scratch.dv_sum[...].astype(outputs.dv.dtype)
        if outputs.d_a is not None and outputs.d_b is not None:
            # Half steps see log a and log b only: x and y are the cotangents of these, divided by a and b.
            rows, columns = head.sizes.rows, head.sizes.all_columns
            for slot in range(self.tail):
                outputs.d_a[:, :rows] += self.scratch.x_rows[:, slot * rows : (slot + 1) * rows]
                outputs.d_b[...] += self.scratch.y_columns[:, slot * columns : (slot + 1) * columns]

    def _tail_cotangent(self, group: Group, f: list):
        """Return the function of a tile that computes the scores' cotangent without the plan's own part, `P * G`."""
        sizes, scratch = self.head.sizes, self.scratch
        x = [upright(scratch.x_rows[:, shifted(group.rows, slot * sizes.rows)]) for slot in range(self.tail)]
        f_over_tau = [over(of_step, self.tau_a) for of_step in f] if self.tau_a > 0 else []

        def d_tail(n, columns):
            s, total = self._scores(group, n), self.head.zeros()
            for slot in reversed(range(self.tail)):
                if self.tau_b > 0:
                    y = scratch.y_columns[:, shifted(columns, slot * sizes.all_columns)]
                    total -= jnp.exp(s + f[slot] + self._g(slot + 1, columns, self.tau_b)) * y
                if self.tau_a > 0:
                    total -= jnp.exp(s + f_over_tau[slot] + self._g(slot, columns)) * x[slot]
            return total

        return d_tail
