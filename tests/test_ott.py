"""Relaxation and gradients against ott-jax, a solver by others, at full support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, balance, sinkhorn_attention

pytest.importorskip("ott", reason="ott-jax is not installed (requirements-dev.txt)")
pytestmark = pytest.mark.usefixtures("float64")

TAUS = [(1.0, 1.0), (0.9, 0.6), (0.3, 1.0), (0.5, 0.5)]
EPSILON = 0.7


def ott(cost, a, b, taus, *, recentred=False):
    """Solve a problem by ott-jax to convergence: plan, and potentials divided by epsilon."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    problem = linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=EPSILON), a, b, tau_a=taus[0], tau_b=taus[1])
    # Plain alternating updates, of g first; momentum 1 is none.
    solver = sinkhorn.Sinkhorn(threshold=1e-13, max_iterations=3000, recenter_potentials=recentred)
    solved = solver(problem)
    return solved.matrix, solved.f / EPSILON, solved.g / EPSILON


def given():
    """Draw a cost and weights; those of columns have another sum than those of rows."""
    cost, a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(6, 8), (6,), (8,)]))
    return cost, jnp.exp(0.4 * a), 1.5 * jnp.exp(0.4 * b)


def spec(taus, **changes):
    return SinkhornSpec(base_steps=600, tau_a=taus[0], tau_b=taus[1], gradient="implicit", cg_steps=16, **changes)


@pytest.mark.parametrize("taus", TAUS, ids=str)
def test_relaxed_plans_and_potentials_are_those_of_ott(taus):
    cost, a, b = given()
    if taus == (1.0, 1.0):
        b *= a.sum() / b.sum()  # ott-jax leaves that to its user
    plan, info = balance(-cost / EPSILON, spec(taus), row_weights=a, column_weights=b)
    wanted, f, g = ott(cost, a, b, taus)
    np.testing.assert_allclose(plan, wanted, rtol=1e-9)
    shift = (info.f - f).mean() if taus == (1.0, 1.0) else 0  # the gauge; relaxed potentials have none
    np.testing.assert_allclose(info.f - shift, f, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(info.g + shift, g, rtol=1e-9, atol=1e-9)
    if max(taus) < 1:  # its acceleration goes to the same fixed point
        np.testing.assert_allclose(ott(cost, a, b, taus, recentred=True)[0], wanted, rtol=1e-9)


@pytest.mark.parametrize("taus", [TAUS[1], TAUS[3]], ids=str)
def test_attention_is_that_of_ott(taus):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, n, 2, 4)) for i, n in enumerate((6, 8, 8)))
    _, a, b = given()
    settings = spec(taus, band=None, epsilon=EPSILON)
    out, _ = sinkhorn_attention(q, k, v, settings, row_weights=a[None], column_weights=b[None])
    cost = -jnp.einsum("ihd,jhd->hij", q[0], k[0]) / 2
    plan = jnp.stack([ott(cost[head], a, b, taus)[0] for head in range(2)])
    np.testing.assert_allclose(out[0], jnp.einsum("hij,jhd->ihd", plan, v[0]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("taus", TAUS[:2], ids=str)
def test_gradients_of_the_plan_are_those_of_otts_implicit_differentiation(taus):
    cost, a, b = given()
    b *= a.sum() / b.sum()
    direction = jax.random.normal(jax.random.key(3), cost.shape)

    def ours(cost, a, b):
        plan, _ = balance(-cost / EPSILON, spec(taus), row_weights=a, column_weights=b)
        return (plan * direction).sum()

    def theirs(cost, a, b):
        return (ott(cost, a, b * (a.sum() / b.sum() if taus == (1.0, 1.0) else 1), taus)[0] * direction).sum()

    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(cost, a, b) for f in (ours, theirs))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
