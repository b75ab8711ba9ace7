"""Bounds on the distance of a plan and its gradient from convergence (docs/math.md, section 7). They run in XLA."""

import functools
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ot_attention import derivatives, sinkhorn, support
from ot_attention.api import Checked, only_xla
from ot_attention.problem import Problem
from ot_attention.spec import Heads, Implementation, LengthsLike, ScoreLike, SinkhornSpec
from ot_attention.support import cleaned


class Bias(NamedTuple):
    """Bounds for every batch element and head; infinite where nothing is known.

    rate: factor by which a step (both halves) decreases distances, from the base steps' end to the fixed point.
    potentials: `osc(g_0 - g)` and `osc(f_0 - f)`, with f_0 and g_0 after the base steps, f and g the fixed point.
    plan: relative error of any entry of the plan after the tail steps, `|P_ij / P*_ij - 1|`.
    gradient: error of `gradient="tail"`, `sum_ij |dS_ij - dS*_ij|` for a cotangent G of the plan, in units of
        `max G - min G` (over the support; the dustbin's G is 0 in attention) times the plan's mass `sum_j b_j`.
        Infinite for other gradients.
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
) -> Float[Array, "batch heads"]:
    """Return Birkhoff and Hopf's bound `tanh(Delta / 4)^2` on the rate of a step from any potentials.

    It is 1 unless every row meets every column. The cost is then rows^2 x columns, and nothing otherwise; memory is
    one head's rows x min(columns, 2 W + 1). Runs in XLA: any other named implementation is refused. Raises errors as
    `sinkhorn_attention` does.
    """
    only_xla(implementation, "certificates")
    rates = Checked.create(q, k, None, spec, q_lengths, k_lengths, dustbin_score).of_every_head(_rates)
    return rates**2


def _rates(heads: Heads, spec: SinkhornSpec) -> Float[Array, "N"]:
    return derivatives.none(functools.partial(_half_step_rates, spec=spec), heads, "certificates")


@support.promoting
def posterior_bias(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    implementation: Implementation | None = None,
) -> Bias:
    """Solve the problem and bound its distance from convergence, `osc(g_1 - g_0) / (1 - rate)`.

    The cost is the solve, two passes over the band, and `contraction`. Runs in XLA: any other named implementation is
    refused. Raises errors as `sinkhorn_attention` does.
    """
    only_xla(implementation, "certificates")
    return Checked.create(q, k, None, spec, q_lengths, k_lengths, dustbin_score).of_every_head(_posterior_bias)


def _posterior_bias(heads: Heads, spec: SinkhornSpec) -> Bias:
    def bounds(heads: Heads) -> Bias:
        changes, overlaps = sinkhorn.by_group(functools.partial(_nearby, spec=spec), cleaned(heads), spec)
        return _bias(changes, overlaps, _half_step_rates(heads, spec), spec)

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

        none = support.varying_like(scores, jnp.zeros((), scores.dtype))
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
    overlaps = _overlaps(problem, f, g, solved.g[:, 1])
    empty = problem.a.sum(-1) == 0
    return tuple(x + rounding for x in changes), tuple(jnp.where(empty, 1, x) for x in overlaps)


def _overlaps(problem: Problem, f, g, next_g) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Return `sum_j min_i P_ij / a_i` over columns that meet every row, and `sum_i min_j P_ij / b_j` the other way.

    The first is of the plan of f and g, the second of f and next_g.
    """
    a, b, scores = problem.a, problem.b, problem.scores
    rows, columns = ((x > 0).astype(f.dtype) for x in (a, b))
    exists = scores.shift(jnp.zeros_like(a), jnp.zeros_like(b)).map(
        lambda entries: jnp.isfinite(entries).astype(f.dtype)
    )
    meet_rows = (exists.transpose_times(rows) == rows.sum(-1, keepdims=True)) & (b > 0)
    meet_columns = (exists.times(columns) == columns.sum(-1, keepdims=True)) & (a > 0)
    in_columns = jnp.exp(-scores.shift(f - support.log(a), g).map(_negative).column_max())
    in_rows = jnp.exp(-scores.shift(f, next_g - support.log(b)).map(_negative).row_max())
    return jnp.where(meet_rows, in_columns, 0).sum(-1), jnp.where(meet_columns, in_rows, 0).sum(-1)


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


def _oscillation(x: Float[Array, "N length"], target: Float[Array, "N length"]) -> Float[Array, "N"]:
    there = target > 0
    change = jnp.where(there, x, -jnp.inf).max(-1) - jnp.where(there, x, jnp.inf).min(-1)
    return jnp.where(there.any(-1), change, 0)


def _negative(scores: Array) -> Array:
    """Negate scores in the support, so that a maximum finds the least score."""
    return jnp.where(jnp.isfinite(scores), -scores, -jnp.inf)
