"""Bounds against true errors on many random problems: never below them, and not vacuous."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, transport_plan
from ot_attention.certificates import contraction, posterior_bias
from ot_attention.support import dense_support, targets
from tests.support.dense import multipliers

PROBLEMS, ROWS, COLUMNS, WIDTH = 100, 18, 15, 4
compiled_bias, compiled_contraction = (jax.jit(x, static_argnums=2) for x in (posterior_bias, contraction))
EPS = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problems(seed: int, dtype="float64"):
    """q and k with scores of many scales, lengths from 0 on, and the dustbin's score."""
    rng = np.random.default_rng(seed)
    sd = 10 ** rng.uniform(-1.5, 0.6, (PROBLEMS, 1, 1, 1))
    q = rng.normal(size=(PROBLEMS, ROWS, 1, WIDTH)) * sd
    k = rng.normal(size=(PROBLEMS, COLUMNS, 1, WIDTH))
    lengths = tuple(jnp.asarray(rng.integers(0, size + 1, PROBLEMS)) for size in (ROWS, COLUMNS))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), lengths, jnp.asarray([rng.normal()], dtype)


def dense(q, k, lengths, score, band, dustbin, weights=(None, None), is_relaxed=False):
    """Scores, minus infinity outside the support, and targets of every problem, dustbin last."""
    size = ROWS, COLUMNS, band, dustbin
    a, b = targets(*lengths, *size, q.dtype, weights, is_relaxed)
    scores = jnp.einsum("nihd,njhd->nij", q, k) / WIDTH**0.5
    scores = jnp.pad(scores, ((0, 0), (0, 1), (0, 1)), constant_values=0 if score is None else score[0])
    scores = scores.at[:, -1, -1].set(0)
    return jnp.where(dense_support(*lengths, *size), scores, -jnp.inf), a, b


def iterate(scores, a, b, g, steps, taus=(1.0, 1.0)):
    """f and g after so many steps, plainly."""

    def half(scores, target, axis, tau):
        top = jax.lax.stop_gradient(jnp.where(target > 0, scores.max(axis), 0))
        total = jnp.exp(scores - jnp.expand_dims(top, axis)).sum(axis)
        target, total = (jnp.where(target > 0, x, 1) for x in (target, total))
        return tau * (jnp.log(target) - jnp.log(total) - top)

    def step(carry, _):
        f = half(scores + carry[1], a, 1, taus[0])
        return (f, half(scores + f[:, None], b, 0, taus[1])), None

    return jax.lax.scan(step, (jnp.zeros_like(a), g), length=steps)[0]


def exact_gradient(plan, cotangent):
    of_log_plan = plan * cotangent
    x, y = multipliers(plan, of_log_plan.sum(1), of_log_plan.sum(0))
    return of_log_plan - plan * (x[:, None] + y)


def plan_of(scores, f, g):
    return jnp.exp(scores + f[:, None] + g)


@functools.partial(jax.jit, static_argnames=("base_steps", "tail_steps"))
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None, None))
def surrogate(scores, a, b, cotangent, base_steps, tail_steps):
    """Potentials after the base steps, the plan, and the scores' gradient with those potentials held."""
    f, g = iterate(scores, a, b, jnp.zeros_like(b), base_steps)

    def value(scores):
        plan = plan_of(scores, *iterate(scores, a, b, g, tail_steps))
        return (plan * cotangent).sum(), plan

    (_, plan), gradient = jax.value_and_grad(value, has_aux=True)(scores)
    return f, g, plan, gradient


@functools.partial(jax.jit)
@jax.vmap
def converged(scores, a, b, f_and_g):
    f, g = iterate(scores, a, b, f_and_g, 5000)
    return f, g, plan_of(scores, f, g)


def osc(x) -> float:
    return float(np.ptp(x)) if len(x) else 0.0


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("band", "dustbin", "steps"),
    [
        (None, "none", (1, 1)),
        pytest.param(None, "unit", (4, 2), marks=pytest.mark.slow),
        (None, "full", (8, 3)),
        (4, "none", (20, 2)),
        pytest.param(4, "unit", (12, 1), marks=pytest.mark.slow),
        (4, "full", (3, 2)),
    ],
)
def test_bounds_are_never_below_true_errors(band, dustbin, steps, dtype):
    q, k, lengths, score = problems(sum(steps), dtype)
    score = None if dustbin == "none" else score
    spec = SinkhornSpec(band=band, dustbin=dustbin, base_steps=steps[0], tail_steps=steps[1])
    bias = jax.tree.map(lambda x: np.asarray(x[:, 0]), compiled_bias(q, k, spec, *lengths, score))
    everywhere = np.asarray(compiled_contraction(q, k, spec, *lengths, score)[:, 0])

    q, k, score = (x if x is None else x.astype("float64") for x in (q, k, score))
    scores, a, b = dense(q, k, lengths, score, band, dustbin)
    cotangent = np.random.default_rng(1).normal(size=scores.shape)
    f_0, g_0, plan, gradient = jax.device_get(surrogate(scores, a, b, cotangent, *steps))
    f, g, limit = jax.device_get(converged(scores, a, b, g_0))
    later = jax.device_get(surrogate(scores, a, b, cotangent, steps[0] + 1, steps[1])[1])
    scores, a, b = jax.device_get((scores, a, b))
    slack = []
    for n in range(PROBLEMS):
        rows, columns, there = np.array(a[n] > 0), np.array(b[n] > 0), np.isfinite(scores[n])
        true = osc((g_0[n] - g[n])[columns])
        rounding = 1e-15 * float(np.abs(g[n]).max())  # where targets cannot all be met, constants grow without end
        assert osc((later[n] - g[n])[columns]) <= everywhere[n] * true + 1e-12 + rounding
        if not np.isfinite(bias.potentials[n]):
            assert bias.rate[n] == 1
            continue
        assert true <= bias.potentials[n] + rounding
        assert osc((f_0[n] - f[n])[rows]) <= bias.potentials[n] + rounding
        p, exact = np.array(plan[n])[there], np.array(limit[n])[there]
        assert np.abs(p / exact - 1).max(initial=0) <= bias.plan[n] + EPS[dtype]
        if rows.any():
            of_limit = exact_gradient(np.array(limit[n])[rows][:, columns], cotangent[n][rows][:, columns])
            deviation = np.abs(np.array(gradient[n])[rows][:, columns] - of_limit).sum()
            largest = np.ptp(cotangent[n][there]) * float(b[n].sum())
            assert deviation <= bias.gradient[n] * largest + EPS[dtype]
            slack.append(bias.potentials[n] / true if true > 1e-4 else np.nan)
    assert len(slack) > PROBLEMS / 2  # bounds that are infinite say nothing
    assert np.nanmedian(slack) < 10


def test_contraction_is_that_of_birkhoff_and_hopf():
    q, k, lengths, score = problems(0)
    full, banded = (SinkhornSpec(band=band, dustbin="unit") for band in (None, 9))
    scores, a, b = dense(q, k, lengths, score, None, "unit")
    rates, in_band = (contraction(q, k, spec, *lengths, score)[:, 0] for spec in (full, banded))
    for n in range(PROBLEMS):
        block = np.array(scores[n])[np.array(a[n] > 0)][:, np.array(b[n] > 0)]
        quotients = block[:, None, :, None] + block[None, :, None] - block[:, None, None] - block[None, :, :, None]
        np.testing.assert_allclose(rates[n], np.tanh(quotients.max(initial=0) / 4) ** 2, rtol=1e-12)
        rows, columns = (int(length[n]) for length in lengths)
        centre = (np.arange(rows) + 0.5) * columns / max(rows, 1) - 0.5
        complete = (np.abs(np.arange(columns) - centre[:, None]) <= 9).all()
        assert in_band[n] == (rates[n] if complete else 1)


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), {"solver": "newton", "gradient": "implicit"}]
)
def test_bounds_of_a_long_band_hold(settings):
    """Long enough for several tiles."""
    q, k = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(2, 1, 500, 2, 8)))
    score, lengths = jnp.array([0.0, 1.0]), (jnp.array([500]), jnp.array([431]))
    spec = SinkhornSpec(band=20, dustbin="full", base_steps=3, **settings)
    bias = jax.jit(lambda *x: posterior_bias(*x, spec, *lengths, score))(q, k)
    limit = SinkhornSpec(band=20, dustbin="full", base_steps=300)
    plan, exact = (np.asarray(transport_plan(q, k, x, *lengths, score)) for x in (spec, limit))
    true = np.abs(np.where(exact > 0, plan / np.where(exact > 0, exact, 1) - 1, 0)).max((2, 3))
    assert (true <= bias.plan).all()
    assert bias.plan[0, 0] < 0.1  # the other head, with less in its dustbin, has a bound only once it is converged
    assert np.isfinite(bias.plan[0, 1]) == (spec.solver == "newton")
    assert np.isinf(bias.gradient).all() == (spec.gradient == "implicit")
    assert (contraction(q, k, spec, *lengths, score) == 1).all()


# Relaxed marginals: tau_a, tau_b, band, dustbin, base and tail steps, whether weights are given, dtype.
RELAXED = [
    (0.5, 0.5, None, "none", (5, 2), False, "float64"),
    (1.0, 0.5, 4, "none", (10, 2), True, "float64"),
    (0.9, 0.9, 2, "none", (20, 2), False, "float64"),
    (0.1, 0.95, None, "full", (3, 1), True, "float64"),
    (0.95, 0.95, 4, "full", (20, 2), False, "float64"),
    (0.7, 0.8, 2, "unit", (6, 1), True, "float64"),
    (0.95, 0.8, 4, "unit", (20, 2), False, "float32"),
    (0.3, 1.0, None, "unit", (1, 1), False, "float32"),
    (1.0, 0.0, 2, "none", (20, 2), True, "float64"),
    (0.0, 1.0, None, "full", (20, 2), False, "float32"),
]


@functools.partial(jax.jit, static_argnames="steps")
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None, None))
def relaxed_potentials(scores, a, b, g, taus, steps):
    return iterate(scores, a, b, g, steps, taus)


@functools.partial(jax.jit, static_argnames="tail_steps")
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, 0, 0, 0, None))
def relaxed_errors(scores, a, b, taus, g_0, limit, cotangents, tail_steps):
    """Errors of the plan's entries, and of the gradient for given cotangents and for the worst that signs can be."""
    there, exact = jnp.isfinite(scores), plan_of(scores, *limit)
    rows, columns = (jnp.where(x > 0, x, 1) for x in (exact.sum(1), exact.sum(0)))

    def of_limit(cotangent):
        """[diag(rows / tau_a), P; P^T, diag(columns / tau_b)] (x, y) = sums of P G, its lines times tau / sums."""
        shares = taus[0] * exact / rows[:, None], taus[1] * exact.T / columns[:, None]
        system = jnp.block([[jnp.eye(len(rows)), shares[0]], [shares[1], jnp.eye(len(columns))]])
        sums = (shares[0] * cotangent).sum(1), (shares[1] * cotangent.T).sum(1)
        x, y = jnp.split(jnp.linalg.solve(system, jnp.concatenate(sums)), [len(rows)])
        return exact * (cotangent - x[:, None] - y)

    plan, tail = jax.vjp(lambda s: plan_of(s, *iterate(s, a, b, g_0, tail_steps, taus)), scores)

    def difference(cotangent):
        cotangent = jnp.where(there, cotangent, 0)
        return jnp.where(there, tail(cotangent)[0] - of_limit(cotangent), 0)

    def error(cotangent):
        unit = jnp.sqrt((plan * cotangent**2).sum() * plan.sum())
        return jnp.abs(difference(cotangent)).sum() / jnp.where(unit > 0, unit, 1)

    def improve(cotangent, _):
        better = jnp.sign(adjoint(jnp.sign(difference(cotangent)))[0])
        return better, error(better)

    _, adjoint = jax.vjp(difference, cotangents[0])
    _, found = jax.lax.scan(improve, jnp.sign(cotangents[0]), length=8)
    errors = jnp.concatenate([jax.vmap(error)(cotangents), found])
    return jnp.where(there, jnp.abs(plan / jnp.where(there, exact, 1) - 1), 0).max(), errors


@pytest.mark.parametrize("case", RELAXED, ids=lambda case: "-".join(map(str, case)))
def test_relaxed_bounds_are_never_below_true_errors(case):
    """1,000 problems in all, of scores of sd 1 and 3, in every band, with the worst cotangents that could be found."""
    tau_a, tau_b, band, dustbin, steps, has_weights, dtype = case
    rng = np.random.default_rng(RELAXED.index(case))
    q, k = rng.normal(size=(PROBLEMS, ROWS, 1, WIDTH)), rng.normal(size=(PROBLEMS, COLUMNS, 1, WIDTH))
    q[1::2] *= 3
    q, k, sizes = jnp.asarray(q, dtype), jnp.asarray(k, dtype), (ROWS, COLUMNS)
    lengths = tuple(jnp.asarray(rng.integers(0, size + 1, PROBLEMS)) for size in sizes)
    weights = tuple(jnp.asarray(np.exp(rng.normal(size=(PROBLEMS, size))), dtype) for size in sizes)
    weights = weights if has_weights else (None, None)
    score = None if dustbin == "none" else jnp.asarray([rng.normal()], dtype)
    spec = SinkhornSpec(band=band, dustbin=dustbin, base_steps=steps[0], tail_steps=steps[1], tau_a=tau_a, tau_b=tau_b)
    given = q, k, spec, *lengths, score, None, *weights
    bias = jax.tree.map(lambda x: np.asarray(x[:, 0], "float64"), compiled_bias(*given))
    rate = np.asarray(compiled_contraction(*given)[:, 0], "float64")

    q, k, score, *weights = (x if x is None else x.astype("float64") for x in (q, k, score, *weights))
    scores, a, b = dense(q, k, lengths, score, band, dustbin, tuple(weights), True)
    taus = jnp.array([tau_a, tau_b])
    f_0, g_0 = relaxed_potentials(scores, a, b, jnp.zeros_like(b), taus, steps[0])
    _, g_1 = relaxed_potentials(scores, a, b, g_0, taus, 1)
    f, g = relaxed_potentials(scores, a, b, g_0, taus, 500)
    cotangents = jnp.stack([jnp.asarray(rng.normal(size=scores.shape)), jnp.ones_like(scores)], 1)
    plan, gradients = relaxed_errors(scores, a, b, taus, g_0, (f, g), cotangents, steps[1])
    before, after = jnp.abs(g_0 - g).max(-1), jnp.abs(g_1 - g).max(-1)
    potentials = jnp.maximum(before, jnp.abs(f_0 - f).max(-1))

    # float32 rounds potentials of up to 20 or so, many times.
    allowed = 1e-13 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(rate, tau_a * tau_b, rtol=1e-6)
    assert (after <= rate * before + allowed).all()
    spreads = (
        np.array([osc(x[there]) for x, there in zip(np.array(z - g), np.array(b > 0), strict=True)]) for z in (g_0, g_1)
    )
    spread, next_spread = spreads
    assert (next_spread <= bias.rate * spread + allowed).all()
    errors = {"potentials": potentials, "plan": plan, "gradient": gradients.max(1)}
    for name, true in errors.items():
        true, bound = np.asarray(true), getattr(bias, name)
        assert (true <= bound + (1e-13 if dtype == "float64" else 0)).all(), name
        assert np.isfinite(bound).all()
        if tau_a * tau_b == 0:
            assert bound.max() < (1e-12 if dtype == "float64" else 1e-3)
            continue
        large = true > (1e-10 if dtype == "float64" else 1e-3)
        assert np.median(bound[large] / true[large]) < 10, name


def test_certificates_are_of_the_weighted_problem():
    q, k, lengths, score = problems(3)
    rng = np.random.default_rng(0)
    weights = tuple(jnp.asarray(np.exp(rng.normal(size=(PROBLEMS, size)))) for size in (ROWS, COLUMNS))
    spec, converged = (SinkhornSpec(dustbin="full", base_steps=steps) for steps in (2, 1000))
    bias = posterior_bias(q, k, spec, *lengths, score, row_weights=weights[0], column_weights=weights[1])
    plan, exact = (transport_plan(q, k, x, *lengths, score, *weights) for x in (spec, converged))
    true = np.abs(np.where(exact > 0, plan / np.where(exact > 0, exact, 1) - 1, 0)).max((2, 3))
    assert (true <= bias.plan + 1e-12).all()
    finite = np.isfinite(bias.plan) & (true > 1e-10)
    assert finite.sum() > PROBLEMS / 2 and np.median((bias.plan / true)[finite]) < 10
    rate, without = (contraction(q, k, spec, *lengths, score, None, *x) for x in (weights, (None, None)))
    np.testing.assert_array_equal(rate, without)


@pytest.mark.parametrize("certificate", [contraction, posterior_bias])
def test_another_implementation_than_xla_is_refused(certificate):
    x = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(UnsupportedError, match="'pallas_gpu' cannot do this: certificates run in XLA; use "):
        certificate(x, x, SinkhornSpec(), implementation="pallas_gpu")
    with pytest.raises(ValueError, match="implementation='triton' must be None or one of reference, xla"):
        certificate(x, x, SinkhornSpec(), implementation="triton")
