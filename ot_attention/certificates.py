"""Bounds on the distance of a plan and its gradient from convergence (docs/math.md, section 7). They run in XLA.

Balanced potentials have a gauge, and their distances are oscillations, `osc(x) = max x - min x`. Relaxed ones (a tau
below 1; docs/math.md, section 13) have none: theirs are largest absolute values, and no bound is infinite.
"""

import functools
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ot_attention import axes, derivatives, sinkhorn, support
from ot_attention.api import Checked, only_xla
from ot_attention.problem import Problem
from ot_attention.spec import Heads, Implementation, LengthsLike, ScoreLike, SinkhornSpec, WeightsLike
from ot_attention.support import cleaned


class Bias(NamedTuple):
    """Bounds for every batch element and head; infinite where nothing is known, which is never so of relaxed ones.

    rate: factor by which a step (both halves) decreases oscillations of distances, from the base steps' end to the
        fixed point. Relaxed, it is at most `tau_a * tau_b`, by which a step decreases constants.
    potentials: `osc(g_0 - g)` and `osc(f_0 - f)`, with f_0 and g_0 after the base steps, f and g the fixed point.
        Relaxed, `max |g_0 - g|` and `max |f_0 - f|`; where a tau is 0, of any step, for the first one is exact.
    plan: relative error of any entry of the plan after the tail steps, `|P_ij / P*_ij - 1|`.
    gradient: error of `gradient="tail"`, `sum_ij |dS_ij - dS*_ij|` for a cotangent G of the plan, in units of
        `max G - min G` (over the support; the dustbin's G is 0 in attention) times the plan's mass `sum_j b_j`.
        Relaxed, in units of `sqrt(sum P G^2 sum P)` with the plan P after the tail steps, the dustbin included: at most
        `max |G|` times its mass, which is not fixed, so that constant cotangents count. Infinite for other gradients.
    """

    rate: Float[Array, "batch heads"]
    potentials: Float[Array, "batch heads"]
    plan: Float[Array, "batch heads"]
    gradient: Float[Array, "batch heads"]


# So that exported functions that return it can be written to files.
jax.export.register_namedtuple_serialization(Bias, serialized_name="ot_attention.certificates.Bias")


@support.promoting
def contraction(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    implementation: Implementation | None = None,
    row_weights: WeightsLike | None = None,
    column_weights: WeightsLike | None = None,
) -> Float[Array, "batch heads"]:
    """Bound the rate of a step (both halves) from any potentials.

    Balanced, it is Birkhoff and Hopf's bound `tanh(Delta / 4)^2` on the oscillation of changes, and 1 unless every row
    meets every column. The cost is then rows^2 x columns, and nothing otherwise; memory is one head's rows x
    min(columns, 2 W + 1). Relaxed, it is `tau_a * tau_b`, on the largest absolute change, whatever the band and at no
    cost. No norm has less: a step multiplies a change that is constant by just that. Oscillations alone decrease by
    Birkhoff and Hopf's factor too, which `Bias.rate` takes into account.

    Weights do not matter. Runs in XLA: any other named implementation is refused. Raises errors as
    `sinkhorn_attention` does.
    """
    only_xla(implementation, "certificates")
    given = q_lengths, k_lengths, dustbin_score, (row_weights, column_weights)
    return Checked.create(q, k, None, spec, *given).of_every_head(_step_rates)


def _step_rates(heads: Heads, spec: SinkhornSpec) -> Float[Array, "N"]:
    def rates(heads: Heads) -> Float[Array, "N"]:
        if not spec.is_relaxed:
            return _half_step_rates(heads, spec) ** 2
        rate = spec.tau_a * spec.tau_b
        return jnp.full(heads.n_q.shape, rate, support.potential_dtype(*heads[:3]))

    return derivatives.none(rates, heads, "certificates")


@support.promoting
def posterior_bias(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    implementation: Implementation | None = None,
    row_weights: WeightsLike | None = None,
    column_weights: WeightsLike | None = None,
) -> Bias:
    """Solve the problem and bound its distance from convergence, from what the tail steps change.

    Balanced, the distance is at most `osc(g_1 - g_0) / (1 - rate)`, where the rate is below 1. Relaxed, the fixed point
    lies between `g_0 + min(g_1 - g_0) / (1 - tau_a tau_b)` and `g_0 + max(g_1 - g_0) / (1 - tau_a tau_b)`.

    The cost is the solve, two passes over the band, and that of a balanced `contraction`. Weights are as in
    `sinkhorn_attention`. Runs in XLA: any other named implementation is refused. Raises errors as `sinkhorn_attention`
    does.
    """
    only_xla(implementation, "certificates")
    given = q_lengths, k_lengths, dustbin_score, (row_weights, column_weights)
    return Checked.create(q, k, None, spec, *given).of_every_head(_posterior_bias)


def _posterior_bias(heads: Heads, spec: SinkhornSpec) -> Bias:
    nearby, bias = (_relaxed_nearby, _relaxed_bias) if spec.is_relaxed else (_nearby, _bias)

    def bounds(heads: Heads) -> Bias:
        changes, overlaps = sinkhorn.by_group(functools.partial(nearby, spec=spec), cleaned(heads), spec)
        return bias(changes, overlaps, _half_step_rates(heads, spec), spec)

    return derivatives.none(bounds, heads, "certificates")


def _half_step_rates(heads: Heads, spec: SinkhornSpec) -> Float[Array, "N"]:
    return jax.lax.map(functools.partial(_half_step_rate, spec=spec), cleaned(heads))


def _half_step_rate(head: Heads, spec: SinkhornSpec) -> Float[Array, ""]:
    """Bound the contraction of a half step of one head; 1 if a row does not meet a column."""
    if spec.band is not None:
        head = head._replace(k=head.k[: 2 * spec.band + 1])  # no later column meets all rows
    rows, columns = head.q.shape[0], head.k.shape[0]
    first, last = support.row_windows(jnp.arange(rows, dtype=jnp.int32), head.n_q, head.n_k, spec.band)
    exists = jnp.arange(rows) < head.n_q
    complete = jnp.all(~exists | ((first == 0) & (last == head.n_k - 1)))

    def half_step():
        scores = jnp.matmul(head.q, head.k.T, precision="highest") / (spec.epsilon * head.q.shape[-1] ** 0.5)
        bin_column = head.dustbin_score if spec.dustbin != "none" else scores[:, 0]  # without one, a column once more
        scores = jnp.concatenate([scores, jnp.broadcast_to(bin_column, rows)[:, None]], 1)
        is_column = (jnp.arange(columns + 1) < head.n_k) | (jnp.arange(columns + 1) == columns)

        def oscillation(row):
            """Return the largest oscillation of a row's difference to any other row."""
            highest = jnp.where(is_column, scores - row, -jnp.inf).max(-1)
            lowest = jnp.where(is_column, scores - row, jnp.inf).min(-1)
            return jnp.where(exists, highest - lowest, 0).max()

        none = axes.varying_like(scores, jnp.zeros((), scores.dtype))
        diameter = jax.lax.fori_loop(0, head.n_q, lambda i, d: jnp.maximum(d, oscillation(scores[i])), none)
        if spec.dustbin != "none":
            bin_row = jnp.full(columns + 1, head.dustbin_score).at[-1].set(0)
            diameter = jnp.maximum(diameter, oscillation(bin_row))
        return jnp.tanh(diameter / 4)

    empty = (head.n_q == 0) | (head.n_k == 0)
    return jax.lax.cond(complete & ~empty, half_step, lambda: jnp.where(empty, 0.0, 1.0).astype(head.q.dtype))


def _nearby(heads: Heads, spec: SinkhornSpec) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return changes of f and g in the first tail step, and the overlaps of rows and of columns after it."""
    solved, problem = sinkhorn.forward(heads, spec), Problem.create(heads, spec)
    f, g = solved.f[:, 1], solved.g[:, 0]  # f is the half step from g, so that row sums are met
    rounding = 16 * jnp.finfo(f.dtype).eps * (1 + jnp.abs(f).max(-1) + jnp.abs(g).max(-1))
    changes = _oscillation(f - solved.f[:, 0], problem.a), _oscillation(solved.g[:, 1] - g, problem.b)
    return tuple(x + rounding for x in changes), _overlaps(problem, f, g, solved.g[:, 1])


def _overlaps(problem: Problem, f, g, next_g) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Return `sum_j min_i P_ij / r_i` over columns that meet every row, and `sum_i min_j P_ij / c_j` the other way.

    The first is of the plan of f and g, the second of f and next_g, each the result of a half step; r are the row sums
    of the first, c the column sums of the second. 1 for empty problems, and where a half step is always to 0.
    """
    a, b, scores = problem.a, problem.b, problem.scores
    rows, columns = ((x > 0).astype(f.dtype) for x in (a, b))
    exists = scores.shift(jnp.zeros_like(a), jnp.zeros_like(b)).map(
        lambda entries: jnp.isfinite(entries).astype(f.dtype)
    )
    meet_rows = (exists.transpose_times(rows) == rows.sum(-1, keepdims=True)) & (b > 0)
    meet_columns = (exists.times(columns) == columns.sum(-1, keepdims=True)) & (a > 0)
    tau_a, tau_b, is_empty = problem.spec.tau_a, problem.spec.tau_b, a.sum(-1) == 0

    def overlap(meets, least):
        return jnp.where(is_empty, 1, jnp.where(meets, jnp.exp(-least), 0).sum(-1))

    # A balanced half step from the same potentials gives f / tau_a, and sums a.
    of_rows, of_columns = jnp.ones_like(a[:, 0]), jnp.ones_like(a[:, 0])
    if tau_a:
        of_rows = overlap(meet_rows, scores.shift(f / tau_a - support.log(a), g).map(_negative).column_max())
    if tau_b:
        of_columns = overlap(meet_columns, scores.shift(f, next_g / tau_b - support.log(b)).map(_negative).row_max())
    return of_rows, of_columns


def _bias(changes: tuple[Array, ...], overlaps: tuple[Array, ...], everywhere, spec: SinkhornSpec) -> Bias:
    """Return the bounds, from the changes of f and g in one step.

    All iterates and the fixed point lie within a distance d of g_0 if `d >= change + rate(d) d`: a step then maps the
    ball into itself.
    """
    f_change, change = changes

    def half_rates(distance):
        return tuple(jnp.minimum(1 - jnp.exp(-distance) * overlap, everywhere) for overlap in overlaps)

    def rate(distance):
        to_f, to_g = half_rates(distance)
        return to_f * to_g

    distance = 1.001 * jax.lax.fori_loop(0, 200, lambda _, d: change / (1 - rate(d)), change)
    known = distance * (1 - rate(distance)) >= change
    distance = jnp.where(known, distance, 0)
    to_f, to_g = half_rates(distance)
    step = to_f * to_g
    plan = jnp.expm1(to_f * step ** (spec.tail_steps - 1) * distance)
    gradient = _tail_bias(distance, to_f, to_g, spec.tail_steps) if spec.gradient == "tail" else jnp.inf
    potentials = jnp.maximum(distance, f_change + to_f * distance)  # f_0 is a half step before g_0, f_1 one after
    bounds = (jnp.where(known, x, jnp.inf) for x in (potentials, plan, gradient))
    return Bias(jnp.where(known, step, 1), *bounds)


def _tail_bias(distance, to_f, to_g, tail_steps: int):
    """Bound the tail gradient's error in the sum norm, for a cotangent G between -1/2 and 1/2 and a plan of mass 1.

    In docs/math.md, section 4, gbar_r and fbar_r are measures that shares of columns and rows carry to and fro; each
    subtracts a field of its own norm. The matrices of step r differ from the fixed point's by factors of at most
    `1 + off`, and the converged gradient has infinitely many steps. Measures of sum 0 contract as potentials do.
    """
    rate = to_f * to_g

    def off(r):
        """Bound the relative errors of `exp(S + f_r + g_r)` and `exp(S + f_r + g_{r-1})`."""
        return jnp.expm1(to_f * rate ** (r - 1) * distance), jnp.expm1(rate ** (r - 1) * distance)

    plan, _ = off(tail_steps)
    bias = g_error = plan / 2
    g_norm, f_norm, f_error = 0.5, 1.0, plan / 2 + (plan / 2 + g_error)
    for r in range(tail_steps, 0, -1):
        with_g, with_f = off(r)
        if r < tail_steps:
            f_norm, f_error = to_g * g_norm, with_g * g_norm + to_g * g_error
        bias += with_g * g_norm + g_error + with_f * f_norm + f_error
        g_norm, g_error = to_f * f_norm, with_f * f_norm + to_f * f_error
    return bias + g_norm * (1 + to_g) / (1 - rate)


def _relaxed_nearby(heads: Heads, spec: SinkhornSpec) -> tuple[tuple, tuple[Array, ...]]:
    """Return what `_nearby` does: least and largest changes of f in the first tail step, of g in each; rounding."""
    solved, problem = sinkhorn.forward(heads, spec), Problem.create(heads, spec)
    f, g = solved.f, solved.g
    rounding = 16 * jnp.finfo(f.dtype).eps * (1 + jnp.abs(f).max((1, 2)) + jnp.abs(g).max((1, 2)))
    changes = _range(f[:, 1] - f[:, 0], problem.a), _range(g[:, 1:] - g[:, :-1], problem.b[:, None])
    return (*changes, rounding), _overlaps(problem, f[:, 1], g[:, 0], g[:, 1])


def _relaxed_bias(changes: tuple, overlaps: tuple[Array, ...], everywhere, spec: SinkhornSpec) -> Bias:
    """Return the bounds, from the changes in the tail steps (docs/math.md, section 7).

    A step is monotone, and multiplies constants by `tau_a tau_b`, which bounds distances by the least and the largest
    change. Oscillations decrease faster where shares of rows, and of columns, overlap.
    """
    tau_a, tau_b, (of_f, of_g, rounding) = spec.tau_a, spec.tau_b, changes
    slowest = tau_a * tau_b
    least, most = of_g[0] - rounding[:, None], of_g[1] + rounding[:, None]

    def mixing(distance):
        """Return how much of a measure of sum 0 the shares of rows, and of columns, leave (Dobrushin 1956)."""
        distances = distance, tau_a * distance
        left = (1 - jnp.exp(-d) * x for d, x in zip(distances, overlaps, strict=True))
        return tuple(jnp.clip(x, 0, everywhere) for x in left)

    def nearer(_, distance):
        """Return the oscillation that all later steps add up to, at the rate within this one."""
        to_f, to_g = mixing(distance)
        return (most - least)[:, 0] / (1 - slowest + slowest * (1 - to_f * to_g))

    mixed = mixing(jax.lax.fori_loop(0, 50, nearer, (most - least)[:, 0] / (1 - slowest)))
    left = mixed[0] * mixed[1]
    oscillations = (most - least) / (1 - slowest + slowest * (1 - left))[:, None]  # of distances of g_r
    lowest, highest = -most / (1 - slowest), -least / (1 - slowest)  # of g_r less the fixed point

    # log P - log P* is the distance of f_R plus that of g_R, of which -tau_b is a mean of the former.
    swing = tau_b * tau_a * mixed[0] * oscillations[:, -1] + 2 * rounding
    low = -(1 - tau_b) * tau_a * highest[:, -1] - swing
    high = -(1 - tau_b) * tau_a * lowest[:, -1] + swing
    plan = jnp.maximum(jnp.expm1(high), -jnp.expm1(low))

    potentials = 2 * rounding
    if slowest:
        ends = lowest[:, 0], highest[:, 0], tau_a * lowest[:, 0] + of_f[0], tau_a * highest[:, 0] + of_f[1]
        potentials += functools.reduce(jnp.maximum, map(jnp.abs, ends))  # of g_0, and of f_0 with another sign
    gradient = jnp.full_like(plan, jnp.inf)
    if spec.gradient == "tail":
        of_plan = jnp.maximum(jnp.expm1(-low), -jnp.expm1(-high))  # |P* / P - 1|
        gradient = _relaxed_tail_bias(plan, of_plan, oscillations, mixed, rounding, spec)
    return Bias(slowest * left, potentials, plan, gradient)


def _relaxed_tail_bias(plan, of_plan, oscillations, mixed, rounding, spec: SinkhornSpec):
    """Bound the tail gradient's error in the sum norm, for a cotangent G and a plan with `sum P G^2 = sum P = 1`.

    Its parts are those of docs/math.md, section 7: of the tail's few steps, of the plan, of the shares in each step.
    Far from convergence the gradients themselves are smaller. Potentials off by an oscillation d move shares by at
    most `2 tanh(d / 4)` in all.
    """
    tau_a, tau_b = spec.tau_a, spec.tau_b

    def moved(oscillation):
        return 2 * jnp.tanh((oscillation + rounding) / 4)

    cut = _cut_bias(mixed[0] * mixed[1], spec)
    bias = (1 + of_plan) * (cut + (1 + cut) * plan)
    both = 2.0 + of_plan  # at most that much are P * G and the converged gradient
    norm, g_error = 1.0, jnp.zeros_like(plan)  # of gbar_r, and of fbar_r at r = R
    for r in range(spec.tail_steps, 0, -1):
        distance = oscillations[:, r - 1]
        f_error = tau_b * (moved(tau_a * mixed[0] * distance) * norm + g_error)
        both += tau_b * norm
        norm *= 1 if r == spec.tail_steps else tau_b
        g_error = tau_a * (moved(distance) * norm + f_error)
        norm *= tau_a
        bias, both = bias + f_error + g_error, both + norm
    return jnp.minimum(bias, both)


def _cut_bias(mixed: Float[Array, "N"], spec: SinkhornSpec) -> Float[Array, "N"]:
    """Bound what the converged gradient has beyond the tail's R steps, for `sum P G^2 = sum P = 1`.

    It is the most that any singular value of the plan makes of G: 1, or one whose square is at most `mixed`.
    """
    tau_a, tau_b, tail_steps, number = spec.tau_a, spec.tau_b, spec.tail_steps, 2048
    x = jnp.linspace(0, 1, number + 1, dtype=mixed.dtype)
    left = jnp.sqrt((1 - tau_a * (2 - tau_a) * x) * (1 - tau_b * (2 - tau_b) * x))
    rate = tau_a * tau_b
    beyond = rate**tail_steps * x ** (tail_steps - 0.5) * left / (1 - rate + rate * (1 - x))
    is_possible = (x <= mixed[:, None] + 1 / number) | (x == 1)
    return (1 + 2 * tail_steps / number) * jnp.where(is_possible, beyond, 0).max(-1)  # a little, for between the points


def _range(x: Float[Array, "N ... length"], target: Float[Array, "N ... length"]) -> tuple[Array, Array]:
    """Return the least and the largest entries that have a target, 0 where there are none."""
    there = jnp.broadcast_to(target > 0, x.shape)
    least, most = jnp.where(there, x, jnp.inf).min(-1), jnp.where(there, x, -jnp.inf).max(-1)
    return jnp.where(there.any(-1), least, 0), jnp.where(there.any(-1), most, 0)


def _oscillation(x: Float[Array, "N length"], target: Float[Array, "N length"]) -> Float[Array, "N"]:
    least, most = _range(x, target)
    return most - least


def _negative(scores: Array) -> Array:
    """Negate scores in the support, so that a maximum finds the least score."""
    return jnp.where(jnp.isfinite(scores), -scores, -jnp.inf)
