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


def dense(q, k, lengths, score, band, dustbin):
    """Scores, minus infinity outside the support, and targets of every problem, dustbin last."""
    size = ROWS, COLUMNS, band, dustbin
    a, b = targets(*lengths, *size, q.dtype)
    scores = jnp.einsum("nihd,njhd->nij", q, k) / WIDTH**0.5
    scores = jnp.pad(scores, ((0, 0), (0, 1), (0, 1)), constant_values=0 if score is None else score[0])
    scores = scores.at[:, -1, -1].set(0)
    return jnp.where(dense_support(*lengths, *size), scores, -jnp.inf), a, b


def iterate(scores, a, b, g, steps):
    """f and g after so many steps, plainly."""

    def half(scores, target, axis):
        top = jax.lax.stop_gradient(jnp.where(target > 0, scores.max(axis), 0))
        total = jnp.exp(scores - jnp.expand_dims(top, axis)).sum(axis)
        target, total = (jnp.where(target > 0, x, 1) for x in (target, total))
        return jnp.log(target) - jnp.log(total) - top

    def step(carry, _):
        f = half(scores + carry[1], a, 1)
        return (f, half(scores + f[:, None], b, 0)), None

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


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("band", "dustbin", "steps"),
    [
        (None, "none", (1, 1)),
        (None, "unit", (4, 2)),
        (None, "full", (8, 3)),
        (4, "none", (20, 2)),
        (4, "unit", (12, 1)),
        (4, "full", (3, 2)),
    ],
)
def test_bounds_are_never_below_true_errors(band, dustbin, steps, dtype):
    q, k, lengths, score = problems(sum(steps), dtype)
    score = None if dustbin == "none" else score
    spec = SinkhornSpec(band=band, dustbin=dustbin, base_steps=steps[0], tail_steps=steps[1])
    bias = jax.tree.map(lambda x: np.asarray(x[:, 0]), posterior_bias(q, k, spec, *lengths, score))
    everywhere = np.asarray(contraction(q, k, spec, *lengths, score)[:, 0])

    q, k, score = (x if x is None else x.astype("float64") for x in (q, k, score))
    scores, a, b = dense(q, k, lengths, score, band, dustbin)
    cotangent = np.random.default_rng(1).normal(size=scores.shape)
    f_0, g_0, plan, gradient = surrogate(scores, a, b, cotangent, *steps)
    f, g, limit = converged(scores, a, b, g_0)
    later = surrogate(scores, a, b, cotangent, steps[0] + 1, steps[1])[1]
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


@pytest.mark.parametrize("settings", [{}, {"solver": "newton", "gradient": "implicit"}])
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


@pytest.mark.parametrize("certificate", [contraction, posterior_bias])
def test_another_implementation_than_xla_is_refused(certificate):
    x = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(UnsupportedError, match="'pallas_gpu' cannot do this: certificates run in XLA; use "):
        certificate(x, x, SinkhornSpec(), implementation="pallas_gpu")
    with pytest.raises(ValueError, match="implementation='triton' must be None or one of reference, xla"):
        certificate(x, x, SinkhornSpec(), implementation="triton")
