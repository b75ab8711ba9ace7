"""The augmented problem of a group of heads over a band: scores, targets, half steps and the linear system."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ot_attention import implicit, support
from ot_attention.axes import SequenceAxis
from ot_attention.backends import Band, shared
from ot_attention.backends.xla import Band as XlaBand
from ot_attention.kernel import DustbinEntries, Kernel
from ot_attention.spec import AllColumns, AllRows, Heads, Lengths, SinkhornSpec
from ot_attention.support import Layout

# Scalings beyond it are absorbed into the potentials. A row's largest kernel entry is 1, or at least e^-16 where the
# row maximum is skipped: entries too small for float32 hold under 1e-10 of a row or column.
_SCALING_RANGE = 1e10
# Relaxed scalings of smaller sums would be in range, and wrong: float32 has lost entries of these sums.
_LEAST_SUM = 1e-25
# `exp(S)` needs no row maximum below this score.
_LARGEST_PLAIN_SCORE = 16.0


class Problem(NamedTuple):
    """Scores of a group of heads, and the targets of row and column sums."""

    scores: Kernel
    a: AllRows
    b: AllColumns
    spec: SinkhornSpec
    lengths: tuple[Lengths, Lengths]

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec, band: type[Band] = XlaBand) -> "Problem":
        bin_score, n_q, n_k, dtype = heads.dustbin_score, heads.n_q, heads.n_k, support.potential_dtype(*heads[:3])
        a, b = support.targets_of(heads, spec, dtype)
        dustbin = None
        if spec.dustbin != "none":
            exists = support.dustbin_exists(n_q, n_k, spec.dustbin)[:, None]
            bin_score = bin_score.astype(dtype)[:, None]
            column, row = (jnp.where(exists & (x[:, :-1] > 0), bin_score, -jnp.inf) for x in (a, b))
            dustbin = DustbinEntries(column, row, corner=jnp.where(exists, jnp.zeros_like(bin_score), -jnp.inf))
        created, tiles = _scores(heads, spec, band)
        return cls(Kernel(created, tiles, dustbin), a, b, spec, (n_q, n_k))

    @property
    def axis(self) -> SequenceAxis:
        return self.spec.axis

    def row_scaling(self, sums: AllRows, absorbed: AllRows) -> AllRows:
        """Compute `u = exp(f - absorbed)` of the half step to f, from the row sums of `exp(S + absorbed + g)`."""
        return scaling_of(self.a, sums, self.spec.tau_a, absorbed)

    def column_scaling(self, sums: AllColumns, absorbed: AllColumns) -> AllColumns:
        """Compute `v = exp(g - absorbed)` of the half step to g, from the column sums of `exp(S + f + absorbed)`."""
        return scaling_of(self.b, sums, self.spec.tau_b, absorbed)

    def row_sums(self, f: AllRows) -> AllRows:
        """Return the row sums that the plan has after the half step to f: a, unless relaxed."""
        return _met(self.a, f, self.spec.tau_a)

    def column_sums(self, g: AllColumns) -> AllColumns:
        """Return the column sums that the plan has after the half step to g: b, unless relaxed."""
        return _met(self.b, g, self.spec.tau_b)

    def movement(self, f_change: AllRows, g_change: AllColumns) -> Float[Array, "N"]:
        """Measure a step: the most that it moved a row sum, or where relaxed a potential."""
        return self.axis.max(support.movement(self.a, f_change, g_change, self.spec.is_relaxed))

    def newton_system(self, kernel: Kernel, u: AllRows, v: AllColumns, f: AllRows) -> implicit.Plan:
        """Return the linear system of a Newton step: the Hessian of the dual at f, which need not be converged."""
        system = self.linear_system(kernel, u, v)
        if self.spec.tau_a == 1:
            return system
        return system._replace(row_diagonal=system.row_sums + (1 / self.spec.tau_a - 1) * self.row_sums(f))

    def linear_system(self, kernel: Kernel, u: AllRows, v: AllColumns) -> implicit.Plan:
        """Return the linear system of implicit gradients at the plan `diag(u) K diag(v)`; g is the last half step."""
        bin_column, bin_row = jnp.zeros_like(self.a), jnp.zeros_like(self.b)
        if kernel.bin is not None:
            column, row, corner = kernel.bin
            bin_column = u * jnp.concatenate([column, corner], -1) * v[:, -1:]
            bin_row = u[:, -1:] * jnp.concatenate([row, corner], -1) * v
        sizes, spec = (self.a.shape[1] - 1, self.b.shape[1] - 1), self.spec
        row_sums = u * kernel.times(v)
        column_sums = self.b if spec.tau_b == 1 else v * kernel.transpose_times(u)
        return implicit.Plan(
            times=lambda x: _scaled(u, kernel.times(_scaled(v, x))),
            transpose_times=lambda x: v * kernel.transpose_times(u * x),
            row_sums=row_sums,
            column_sums=column_sums,
            row_diagonal=row_sums / spec.tau_a,
            column_diagonal=column_sums / spec.tau_b,
            bin_column=bin_column,
            bin_row=bin_row,
            coarse_basis=implicit.coarse_basis(*self.lengths, *sizes, spec.band, self.a.dtype, spec.axis),
            has_gauge=not spec.is_relaxed,
            axis=spec.axis,
        )


def _scores(heads: Heads, spec: SinkhornSpec, band: type[Band]):
    """Return a band of the support, and the scores in it."""
    scale = score_scale(heads, spec)
    if spec.axis.is_shared and spec.band is not None:
        return shared.scores(band, heads, spec.axis, spec.band, scale)
    q, k, n_q, n_k = heads.q, heads.k, heads.n_q, heads.n_k
    return band.scores(q, k, Layout.of(n_q, n_k, q.shape[1], k.shape[1], spec.band, heads.segments), scale)


def score_scale(heads: Heads, spec: SinkhornSpec) -> float:
    return 1 / (math.sqrt(heads.q.shape[-1]) * spec.epsilon)


def row_tops(problem: Problem, heads: Heads, g: AllColumns, plain: Bool[Array, ""] | bool = True) -> AllRows:
    """Return the row maxima to subtract from `S + g` before exp; zeros if g = 0 and scores are below 16.

    plain: whether g is 0.
    """
    f, a = jnp.zeros_like(problem.a), problem.a
    plain &= _largest_score(heads, problem.spec) < _LARGEST_PLAIN_SCORE
    return jax.lax.cond(
        problem.axis.agreed(plain), lambda: f, lambda: jnp.where(a > 0, problem.scores.shift(f, g).row_max(), 0)
    )


def _largest_score(heads: Heads, spec: SinkhornSpec) -> Float[Array, ""]:
    """Bound the absolute scores by the Cauchy-Schwarz inequality."""
    q, k = (x.astype(support.potential_dtype(*heads[:3])) for x in heads[:2])
    longest_q, longest_k = (jnp.sqrt((x * x).sum(-1).max()) for x in (q, k))
    return jnp.maximum(longest_q * longest_k * score_scale(heads, spec), jnp.abs(heads.dustbin_score).max())


def row_potentials(problem: Problem, g: AllColumns) -> AllRows:
    """Compute the half step `f = tau_a (log a - LSE_j(S + g))` in the log domain."""
    a, b = problem.a, problem.b
    shifted = problem.scores.shift(jnp.zeros_like(a), g)
    top = jnp.where(a > 0, jax.lax.stop_gradient(shifted).row_max(), 0)
    sums = shifted.shift(-top, jnp.zeros_like(b)).exp().times(jnp.ones_like(b))
    return problem.spec.tau_a * (support.log(support.divide(a, sums)) - top)


def column_potentials(problem: Problem, f: AllRows) -> AllColumns:
    """Compute the half step `g = tau_b (log b - LSE_i(S + f))` in the log domain."""
    a, b = problem.a, problem.b
    shifted = problem.scores.shift(f, jnp.zeros_like(b))
    top = jnp.where(b > 0, jax.lax.stop_gradient(shifted).column_max(), 0)
    sums = shifted.shift(jnp.zeros_like(a), -top).exp().transpose_times(jnp.ones_like(a))
    return problem.spec.tau_b * (support.log(support.divide(b, sums)) - top)


def in_range(scaling: Array, target: Array) -> Bool[Array, ""]:
    """Tell whether all scalings that have a target can go on without absorption."""
    return jnp.all(fit(scaling, target))


def fit(scaling: Array, target: Array) -> Bool[Array, "..."]:
    """Tell which scalings can go on without absorption; those without a target can."""
    return ((scaling > 1 / _SCALING_RANGE) & (scaling < _SCALING_RANGE)) | (target == 0)


def scaling_of(target: Array, sums: Array, tau: float, absorbed: Array) -> Array:
    """Compute `exp(tau (log target - log sums + absorbed) - absorbed)`, 0 where there is no target or no sum."""
    scaling = support.divide(target, sums)
    if tau == 1:
        return scaling
    relaxed = jnp.exp(tau * support.log(scaling) - (1 - tau) * absorbed)
    return jnp.where((target > 0) & ((sums > _LEAST_SUM) | (tau == 0)), relaxed, 0)


def _met(target: Array, potential: Array, tau: float) -> Array:
    """Compute the sums that a half step of this result leaves, `target exp((1 - 1 / tau) potential)`."""
    return target if tau == 1 else target * jnp.exp((1 - 1 / tau) * potential)


def _scaled(scaling: Array, x: Array) -> Array:
    """Return `diag(scaling) x` for a vector or several columns."""
    return scaling.reshape(scaling.shape + (1,) * (x.ndim - 2)) * x
