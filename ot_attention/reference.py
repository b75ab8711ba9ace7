"""Backend `reference`: the definition, dense, for any float dtype. Never optimised; all others are tested against it.

Newton steps and implicit gradients share `implicit` with the other backends; tests check it by dense linear algebra.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention import axes, implicit, support
from ot_attention.backends import Attended
from ot_attention.spec import AllColumns, AllRows, Heads, SinkhornSpec

Matrices = Float[Array, "N all_rows all_columns"]
Potentials = tuple[AllRows, AllColumns]
# Plan, f, g, residual, and base steps made.
Solved = tuple[Matrices, AllRows, AllColumns, Float[Array, "N"], Int[Array, "N"]]
platform = None  # any


def solve(heads: Heads, spec: SinkhornSpec) -> Solved:
    """Return plan, log-potentials f and g, residual and base steps made of the augmented problem (docs/math.md, 3)."""
    q, k, _, dustbin_score, n_q, n_k, *_ = heads
    rows, columns = q.shape[1], k.shape[1]
    mask = support.dense_support(n_q, n_k, rows, columns, spec.band, spec.dustbin, heads.segments)
    a, b = support.targets_of(heads, spec, q.dtype)

    scores = jnp.einsum("hid,hjd->hij", q, k, precision="highest") / (math.sqrt(q.shape[-1]) * spec.epsilon)
    scores = jnp.pad(scores, ((0, 0), (0, 1), (0, 1)))
    bin_scores = jnp.broadcast_to(dustbin_score[:, None, None], scores.shape)
    row, column = jnp.arange(rows + 1)[:, None], jnp.arange(columns + 1)
    scores = jnp.where((row == rows) ^ (column == columns), bin_scores, scores)  # the corner stays 0
    scores = jnp.where(mask, scores, -jnp.inf)
    basis = implicit.coarse_basis(n_q, n_k, rows, columns, spec.band, q.dtype)
    return balance(scores, a, b, spec, basis)


def balance(scores: Matrices, a: AllRows, b: AllColumns, spec: SinkhornSpec, basis: implicit.Basis | None) -> Solved:
    """Return plan, log-potentials f and g, residual and base steps made, for given scores and targets."""
    # Only "unrolled" differentiates the base steps, and "implicit" none at all.
    constants = (scores, a, b) if spec.gradient == "unrolled" else jax.lax.stop_gradient((scores, a, b))
    tail = constants if spec.gradient == "implicit" else (scores, a, b)

    def base_step(carry, _):
        """Make a step of the heads that are not settled, which a step after the first may settle."""
        potentials, made, settled = carry
        stepped = step(constants, potentials[1], spec)
        changes = (x - y for x, y in zip(stepped, potentials, strict=True))
        moved = support.movement(constants[1], *changes, spec.is_relaxed)
        potentials = tuple(jnp.where(settled[:, None], x, y) for x, y in zip(potentials, stepped, strict=True))
        settles = (moved <= spec.tolerance) & (made > 0) & (spec.tolerance > 0)
        return (potentials, made + ~settled, settled | settles), None

    none_made = jnp.zeros(scores.shape[0], jnp.int32)
    start = (jnp.zeros_like(a), jnp.zeros_like(b)), none_made, none_made > 0
    (potentials, made, _), _ = jax.lax.scan(base_step, axes.varying_like(scores, start), length=spec.base_steps)
    if spec.solver == "newton":
        potentials, made = newton_steps(constants, potentials, basis, spec), made + spec.newton_steps
    tail_step = functools.partial(step, tail, spec=spec)
    (f, g), _ = jax.lax.scan(lambda carry, _: (tail_step(carry[1]), None), potentials, length=spec.tail_steps)
    if spec.gradient == "implicit":
        f, g = converged((scores, support.log(a), support.log(b)), f, g, basis, spec)
    plan = jnp.exp(scores + f[:, :, None] + g[:, None, :])
    return plan, f, g, residual(plan, a), made


def step(problem: tuple[Matrices, AllRows, AllColumns], g: AllColumns, spec: SinkhornSpec) -> Potentials:
    """Make a step in the log domain. problem: scores, a and b."""
    scores, a, b = problem
    f = spec.tau_a * log_scaling(scores + g[:, None, :], a, axis=-1)
    return f, spec.tau_b * log_scaling(scores + f[:, :, None], b, axis=-2)


def newton_steps(
    problem: tuple[Matrices, AllRows, AllColumns],
    potentials: Potentials,
    basis: implicit.Basis | None,
    spec: SinkhornSpec,
) -> Potentials:
    """Make all Newton steps, each followed by a plain one. problem: scores, a and b."""
    scores, a, _ = problem
    for _ in range(spec.newton_steps):
        f, g = potentials
        system = _system(jnp.exp(scores + f[:, :, None] + g[:, None, :]), basis, spec)
        wanted = a if spec.tau_a == 1 else a * jnp.exp((1 - 1 / spec.tau_a) * f)
        system = system._replace(row_diagonal=system.row_sums + (1 / spec.tau_a - 1) * wanted)
        potentials = step(problem, g + implicit.newton_correction(system, wanted, spec.cg_steps), spec)
    return potentials


def residual(plan: Matrices, a: AllRows) -> Float[Array, "N"]:
    """Return the largest deviation of a row sum from its target."""
    deviation = jnp.where(a > 0, jnp.abs(plan.sum(-1) - a), 0)
    return jax.lax.stop_gradient(deviation.max(-1))


def attend(heads: Heads, spec: SinkhornSpec) -> Attended:
    """Return output, f, g, residual and base steps made."""
    heads = support.cleaned(heads)
    plan, f, g, deviation, made = solve(heads, spec)
    out = jnp.einsum("hij,hjd->hid", plan[:, :-1, :-1], heads.v, precision="highest")
    return support.zero_padding(out, heads.n_q), f, g, deviation, made


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Return why it cannot do this and what to change, or None."""
    del heads
    if spec.axis.is_shared:
        return "it is dense, and one device has the whole sequence; use implementation='xla' or no sequence_axis"
    return None


def _system(plan: Float[Array, "N rows columns"], basis, spec: SinkhornSpec) -> implicit.Plan:
    products = "hij,hj...->hi...", "hij,hi->hj"
    times, transpose_times = (functools.partial(jnp.einsum, x, plan, precision="highest") for x in products)
    sums = plan.sum(-1), plan.sum(-2)
    diagonals, bins = (sums[0] / spec.tau_a, sums[1] / spec.tau_b), (plan[:, :, -1], plan[:, -1])
    return implicit.Plan(times, transpose_times, *sums, *diagonals, *bins, basis, not spec.is_relaxed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def converged(problem, f, g, basis, spec: SinkhornSpec):
    """Return f and g, with the derivatives of converged potentials (docs/math.md, section 5).

    problem: scores, log a and log b.
    """
    return f, g


def _converged_jvp(spec, primals, tangents):
    (scores, _, _), _, _, basis = primals
    f, g = converged(*primals, spec)  # so that this rule can be differentiated again
    plan = jnp.exp(scores + f[:, :, None] + g[:, None, :])
    change, of_a, of_b = tangents[0]
    change, system = -plan * change, _system(plan, basis, spec)
    right_side = change.sum(-1) + system.row_sums * of_a, change.sum(-2) + system.column_sums * of_b
    return (f, g), implicit.solve(system, *right_side, spec.cg_steps)


converged.defjvp(support.promoting(_converged_jvp))


def log_scaling(scores: Float[Array, "*N rows columns"], target: Float[Array, "*N n"], axis: int):
    """Return `log target - logsumexp(scores)` along an axis, 0 (with gradient 0) where there is no support."""
    supported = target > 0
    top = jax.lax.stop_gradient(jnp.where(supported, scores.max(axis), 0))
    total = jnp.sum(jnp.exp(scores - jnp.expand_dims(top, axis)), axis)
    safe_target, safe_total = jnp.where(supported, target, 1), jnp.where(supported, total, 1)
    return jnp.where(supported, jnp.log(safe_target) - top - jnp.log(safe_total), 0)
