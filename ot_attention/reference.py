"""Backend `reference`: the definition, dense, for any float dtype. Never optimised; all others are tested against it.

Newton steps and implicit gradients share `implicit` with the other backends; tests check it by dense linear algebra.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ot_attention import implicit, support
from ot_attention.backends import Attended
from ot_attention.spec import AllColumns, AllRows, Heads, SinkhornSpec

platform = None  # any


def solve(
    heads: Heads, spec: SinkhornSpec
) -> tuple[Float[Array, "N all_rows all_columns"], AllRows, AllColumns, Float[Array, "N"]]:
    """Return plan, log-potentials f and g, and residual of the augmented problem (docs/math.md, section 3)."""
    q, k, _, dustbin_score, n_q, n_k = heads
    rows, columns = q.shape[1], k.shape[1]
    mask = support.dense_support(n_q, n_k, rows, columns, spec.band, spec.dustbin)
    a, b = support.targets(n_q, n_k, rows, columns, spec.band, spec.dustbin, q.dtype)

    scores = jnp.einsum("hid,hjd->hij", q, k, precision="highest") / (math.sqrt(q.shape[-1]) * spec.epsilon)
    scores = jnp.pad(scores, ((0, 0), (0, 1), (0, 1)))
    bin_scores = jnp.broadcast_to(dustbin_score[:, None, None], scores.shape)
    row, column = jnp.arange(rows + 1)[:, None], jnp.arange(columns + 1)
    scores = jnp.where((row == rows) ^ (column == columns), bin_scores, scores)  # the corner stays 0
    scores = jnp.where(mask, scores, -jnp.inf)

    # Only "unrolled" differentiates the base steps, and "implicit" none at all.
    base_scores = scores if spec.gradient == "unrolled" else jax.lax.stop_gradient(scores)
    tail_scores = base_scores if spec.gradient == "implicit" else scores

    def step(scores, potentials, _=None):
        _, g = potentials
        f = log_scaling(scores + g[:, None, :], a, axis=-1)
        return (f, log_scaling(scores + f[:, :, None], b, axis=-2)), None

    potentials = support.varying_like(q, (jnp.zeros_like(a), jnp.zeros_like(b)))
    basis = implicit.coarse_basis(n_q, n_k, rows, columns, spec.band, q.dtype)
    potentials, _ = jax.lax.scan(functools.partial(step, base_scores), potentials, length=spec.base_steps)
    if spec.solver == "newton":
        for _ in range(spec.newton_steps):
            f, g = potentials
            system = _system(jnp.exp(base_scores + f[:, :, None] + g[:, None, :]), basis)
            corrected = f, g + implicit.newton_correction(system, a, spec.cg_steps)
            potentials, _ = step(base_scores, corrected)
    (f, g), _ = jax.lax.scan(functools.partial(step, tail_scores), potentials, length=spec.tail_steps)
    if spec.gradient == "implicit":
        f, g = _converged(scores, f, g, basis, spec.cg_steps)
    plan = jnp.exp(scores + f[:, :, None] + g[:, None, :])
    deviation = jnp.where(a > 0, jnp.abs(plan.sum(-1) - a), 0)
    return plan, f, g, jax.lax.stop_gradient(deviation.max(-1))


def attend(heads: Heads, spec: SinkhornSpec) -> Attended:
    """Return output, f, g and residual."""
    heads = support.cleaned(heads)
    plan, f, g, residual = solve(heads, spec)
    out = jnp.einsum("hij,hjd->hid", plan[:, :-1, :-1], heads.v, precision="highest")
    return support.zero_padding(out, heads.n_q), f, g, residual


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> None:
    """Return None: nothing is unsupported."""
    del heads, spec


def _system(plan: Float[Array, "N rows columns"], basis) -> implicit.Plan:
    products = "hij,hj...->hi...", "hij,hi->hj"
    times, transpose_times = (functools.partial(jnp.einsum, x, plan, precision="highest") for x in products)
    return implicit.Plan(times, transpose_times, plan.sum(-1), plan.sum(-2), plan[:, :, -1], plan[:, -1], basis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _converged(scores, f, g, basis, cg_steps):
    """Return f and g, with the derivatives of converged potentials (docs/math.md, section 5)."""
    return f, g


def _converged_jvp(cg_steps, primals, tangents):
    scores, _, _, basis = primals
    f, g = _converged(*primals, cg_steps)  # so that this rule can be differentiated again
    plan = jnp.exp(scores + f[:, :, None] + g[:, None, :])
    change = -plan * tangents[0]
    return (f, g), implicit.solve(_system(plan, basis), change.sum(-1), change.sum(-2), cg_steps)


_converged.defjvp(support.promoting(_converged_jvp))


def log_scaling(scores: Float[Array, "*N rows columns"], target: Float[Array, "*N n"], axis: int):
    """Return `log target - logsumexp(scores)` along an axis, 0 (with gradient 0) where there is no support."""
    supported = target > 0
    top = jax.lax.stop_gradient(jnp.where(supported, scores.max(axis), 0))
    total = jnp.sum(jnp.exp(scores - jnp.expand_dims(top, axis)), axis)
    safe_target, safe_total = jnp.where(supported, target, 1), jnp.where(supported, total, 1)
    return jnp.where(supported, jnp.log(safe_target) - top - jnp.log(safe_total), 0)
