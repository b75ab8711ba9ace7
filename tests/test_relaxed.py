"""Relaxed marginals, weights and the early end of the base steps, against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, transport_plan
from ot_attention.support import dense_support

LENGTHS = (jnp.array([24, 17]), jnp.array([24, 21]))
TAUS = [(1.0, 1.0), (0.9, 0.6), (0.3, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]


def draw(seed=0, length=24, heads=2, width=6, sd=2.0):
    """Return q, k, v, dustbin score, and weights of rows and of columns."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, width))) for _ in range(3))
    weights = (jnp.asarray(rng.uniform(0.5, 2, (2, length))) for _ in range(2))
    return q * sd, k, v, jnp.asarray([0.5, -1.0]), *weights


def defined(q, k, v, score, row_weights, column_weights, spec, lengths=LENGTHS, base_steps=None):
    """Compute output and plan half step by half step, in the words of docs/math.md, one problem at a time."""

    def one_head(q, k, v, score, row_weights, column_weights, n_q, n_k):
        rows, columns = len(q), len(k)
        s = jnp.full((rows + 1, columns + 1), -jnp.inf)
        s = s.at[:-1, :-1].set(q @ k.T / (q.shape[1] ** 0.5 * spec.epsilon))
        if spec.dustbin != "none":
            s = s.at[:, -1].set(score).at[-1].set(score).at[-1, -1].set(0)
        inside = dense_support(n_q, n_k, rows, columns, spec.band, spec.dustbin)
        s = jnp.where(inside, s, -jnp.inf)
        a = jnp.where(jnp.arange(rows) < n_q, row_weights, 0)
        b = jnp.where(jnp.arange(columns) < n_k, column_weights, 0)
        if spec.dustbin == "none":
            b = b * a.sum() / b.sum() if not spec.is_relaxed else b
            bins = 1.0, 1.0  # no row or column meets them
        elif spec.dustbin == "unit":
            bins = 1 + jnp.maximum(b.sum() - a.sum(), 0), 1 + jnp.maximum(a.sum() - b.sum(), 0)
        else:
            bins = b.sum(), a.sum()
        a, b = jnp.append(a, bins[0]), jnp.append(b, bins[1])
        there = inside.any(1), inside.any(0)
        log_a, log_b = (jnp.log(jnp.where(t, x, 1)) for x, t in zip((a, b), there, strict=True))

        def half_step(s, log_target, tau, axis, there):
            safe = jnp.where(jnp.expand_dims(there, axis), s, 0)  # rows without support have no logarithm
            return jnp.where(there, tau * (log_target - logsumexp(safe, axis)), 0)

        f, g = jnp.zeros(rows + 1), jnp.zeros(columns + 1)
        base = spec.base_steps if base_steps is None else base_steps
        for step in range(base + spec.tail_steps):
            if step == base and spec.gradient != "unrolled":
                g = jax.lax.stop_gradient(g)
            f = half_step(s + g, log_a, spec.tau_a, 1, there[0])
            g = half_step(s + f[:, None], log_b, spec.tau_b, 0, there[1])
        plan = jnp.exp(s + f[:, None] + g)
        return plan[:-1, :-1] @ v, plan

    of_heads = jax.vmap(one_head, (1, 1, 1, 0, None, None, None, None))
    return jax.vmap(of_heads, (0, 0, 0, None, 0, 0, 0, 0))(q, k, v, score, row_weights, column_weights, *lengths)


def loss_of(out, plan):
    """Reduce output and plan to a number that depends on all of both."""
    weights = jnp.cos(jnp.arange(plan.size)).reshape(plan.shape)
    return jnp.sin(out).sum() + (weights * plan).sum()


def attended(q, k, v, score, row_weights, column_weights, spec, implementation):
    """Return output and plan: the plan from the potentials, so that gradients go through these too."""
    score = None if spec.dustbin == "none" else score
    weights = {"row_weights": row_weights, "column_weights": column_weights}
    out, info = sinkhorn_attention(q, k, v, spec, *LENGTHS, score, implementation, **weights)
    if spec.dustbin == "none":
        f, g = (jnp.pad(x, ((0, 0), (0, 0), (0, 1))) for x in (info.f, info.g))
    else:
        f, g = info.f, info.g
    s = jnp.einsum("bihd,bjhd->bhij", q, k) / (q.shape[-1] ** 0.5 * spec.epsilon)
    s = jnp.pad(s, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=-jnp.inf)
    if spec.dustbin != "none":
        bins = score[:, None]
        s = s.at[:, :, :, -1].set(bins).at[:, :, -1].set(bins).at[:, :, -1, -1].set(0)
    inside = dense_support(*LENGTHS, q.shape[1], k.shape[1], spec.band, spec.dustbin)[:, None]
    exponent = jnp.where(inside, s + f[..., None] + g[:, :, None], 0)
    return out.swapaxes(1, 2), jnp.where(inside, jnp.exp(exponent), 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("taus", "dustbin"), [*zip(TAUS, ["full", "none", "unit"] * 2, strict=True), ((0.9, 0.6), "full")], ids=str
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_values_and_tail_gradients_are_those_of_the_definition(implementation, taus, dustbin):
    arrays = draw()
    spec = SinkhornSpec(band=6, base_steps=4, tail_steps=3, dustbin=dustbin, tau_a=taus[0], tau_b=taus[1])

    def ours(*arrays):
        out, plan = attended(*arrays, spec, implementation)
        real = jnp.arange(out.shape[2]) < LENGTHS[0][:, None]
        return loss_of(jnp.where(real[:, None, :, None], out, 0), plan), plan

    def theirs(*arrays):
        out, plan = defined(*arrays, spec)
        return loss_of(out, plan), plan

    given = tuple(range(6)) if dustbin != "none" else (0, 1, 2, 4, 5)
    expected, (actual, plan) = jax.jit(theirs)(*arrays)[1], jax.jit(ours)(*arrays)
    np.testing.assert_allclose(plan, expected, atol=1e-12)
    assert jnp.isfinite(actual)
    gradients = (jax.jit(jax.grad(f, given, has_aux=True))(*arrays)[0] for f in (ours, theirs))
    for x, y in zip(*gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-11 * float(jnp.abs(y).max() + 1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("taus", "dustbin"), [((0.9, 0.6), "none"), ((1.0, 0.5), "full"), ((1.0, 1.0), "full")], ids=str
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_implicit_gradients_are_those_of_the_converged_plan(implementation, taus, dustbin):
    arrays = draw(1, sd=1.0)
    taus = {"tau_a": taus[0], "tau_b": taus[1]}
    steps = 40 if taus["tau_a"] * taus["tau_b"] < 1 else 400
    spec = SinkhornSpec(
        band=9, base_steps=12, solver="newton", dustbin=dustbin, gradient="implicit", cg_steps=40, **taus
    )
    unrolled = SinkhornSpec(band=9, base_steps=0, tail_steps=steps, dustbin=dustbin, gradient="unrolled", **taus)

    def loss(function, *arrays):
        out, _ = function(*arrays)
        return jnp.sin(jnp.where(jnp.arange(24)[:, None] < LENGTHS[0][:, None, None, None], out, 0)).sum()

    ours = functools.partial(attended, spec=spec, implementation=implementation)
    theirs = functools.partial(attended, spec=unrolled, implementation="reference")
    given = tuple(range(6)) if dustbin != "none" else (0, 1, 2, 4, 5)
    gradients = (jax.jit(jax.grad(functools.partial(loss, f), given))(*arrays) for f in (ours, theirs))
    for x, y in zip(*gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-7 * float(jnp.abs(y).max() + 1))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("band", [None, 5], ids=["full", "band"])
def test_the_end_is_softmax_attention(implementation, band):
    """Its errors in float32 are as small as those of softmax itself, forward and backward."""
    q, k, v, *_ = (x.astype(jnp.float32) for x in draw())
    spec = SinkhornSpec(band=band, tau_a=1, tau_b=0)
    inside = dense_support(*LENGTHS, 24, 24, band, "none")[:, :-1, :-1]

    def softmax(q, k, v):
        s = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(s, where=inside[:, None], axis=-1)
        return jnp.einsum("bhij,bjhd->bihd", jnp.where(inside[:, None], weights, 0), v, precision="highest")

    def ours(q, k, v):
        return sinkhorn_attention(q, k, v, spec, *LENGTHS, implementation=implementation)[0]

    with jax.enable_x64(True):
        exact = jax.vjp(softmax, *(x.astype(jnp.float64) for x in (q, k, v)))
        exact = exact[0], *exact[1](jnp.cos(exact[0]))
    for function in (softmax, ours):
        out, pull_back = jax.vjp(function, q, k, v)
        for x, y in zip((out, *pull_back(jnp.cos(out))), exact, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6 * float(abs(y).max()))
    _, info = sinkhorn_attention(q, k, v, spec, *LENGTHS, implementation=implementation)
    assert (info.steps == 0).all() and (info.residual < 1e-5).all() and (info.g == 0).all()


@pytest.mark.parametrize("taus", [(1.0, 1.0), (0.8, 0.8)], ids=str)
def test_tolerance_ends_the_base_steps_of_each_head(taus):
    q, k, v, score, *_ = (x.astype(jnp.float32) for x in draw(length=60))
    q = q * jnp.array([0.2, 2.0])[:, None]  # the second head takes longer
    settings = {"band": 20, "dustbin": "full", "base_steps": 100, "tau_a": taus[0], "tau_b": taus[1]}
    attend = functools.partial(sinkhorn_attention, q, k, v, dustbin_score=score)
    exact, all_steps = attend(SinkhornSpec(**settings))
    assert (all_steps.steps == 100).all()
    for implementation in ("reference", "xla"):
        out, info = attend(SinkhornSpec(**settings, tolerance=1e-4), implementation=implementation)
        assert (info.steps[:, 0] < info.steps[:, 1]).all() and (info.steps[:, 1] < 60).all() and (info.steps > 1).all()
        np.testing.assert_allclose(out, exact, atol=3e-4)
        # One that ends later is closer.
        closer, later = attend(SinkhornSpec(**settings, tolerance=1e-6), implementation=implementation)
        assert (later.steps > info.steps).all()
        assert float(jnp.abs(closer - exact).max()) < float(jnp.abs(out - exact).max())
    # A head ends its steps by itself, whatever the other heads do.
    alone = (x[:1, :, :1] for x in (q, k, v))
    spec = SinkhornSpec(**settings, tolerance=1e-4)
    _, info_alone = sinkhorn_attention(*alone, spec, dustbin_score=score[:1])
    assert info_alone.steps[0, 0] == attend(spec)[1].steps[0, 0]


def test_newton_steps_converge_relaxed_problems():
    q, k, v, *_ = (x.astype(jnp.float32) for x in draw(length=80))
    settings = {"band": 8, "tau_a": 0.99, "tau_b": 0.99}
    exact, _ = sinkhorn_attention(q, k, v, SinkhornSpec(**settings, base_steps=1500))
    plain, _ = sinkhorn_attention(q, k, v, SinkhornSpec(**settings, base_steps=26))
    newton, info = sinkhorn_attention(q, k, v, SinkhornSpec(**settings, base_steps=10, solver="newton"))
    errors = [float(jnp.abs(x - exact).max()) for x in (newton, plain)]
    assert errors[0] < 0.02 * errors[1] and (info.steps == 12).all()


def test_weights_of_one_change_nothing_and_scale_does_not_matter():
    q, k, v, score, row_weights, column_weights = (x.astype(jnp.float32) for x in draw())
    for spec in (SinkhornSpec(band=6), SinkhornSpec(band=6, dustbin="full"), SinkhornSpec(band=6, tau_a=0.5)):
        given = q, k, v, spec, *LENGTHS, None if spec.dustbin == "none" else score
        ones = jnp.ones((2, 24))
        columns = ones if spec.dustbin != "none" else ones * (LENGTHS[0] / LENGTHS[1])[:, None]
        out, plain = sinkhorn_attention(*given, row_weights=ones, column_weights=columns), sinkhorn_attention(*given)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), out, plain)
    given = q, k, v, SinkhornSpec(band=6), *LENGTHS
    scaled = sinkhorn_attention(*given, row_weights=row_weights, column_weights=7 * column_weights)
    out = sinkhorn_attention(*given, row_weights=row_weights, column_weights=column_weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), scaled, out)


def test_plans_have_the_sums_asked_for():
    q, k, _, _, row_weights, column_weights = (x.astype(jnp.float32) for x in draw(sd=0.5))
    spec = SinkhornSpec(band=None, base_steps=200)
    plan = transport_plan(q, k, spec, row_weights=row_weights, column_weights=column_weights)
    np.testing.assert_allclose(plan.sum(-1), jnp.broadcast_to(row_weights[:, None], plan.shape[:3]), rtol=1e-4)
    wanted = column_weights * (row_weights.sum(1) / column_weights.sum(1))[:, None]
    np.testing.assert_allclose(plan.sum(-2), jnp.broadcast_to(wanted[:, None], plan.shape[:3]), rtol=1e-5)


def test_jit_vmap_bfloat16_and_integers():
    q, k, v, _, row_weights, column_weights = (x.astype(jnp.float32) for x in draw())
    spec = SinkhornSpec(band=6, tau_a=0.9, tau_b=0.8, tolerance=1e-3)

    def attend(q, k, v, row_weights, column_weights):
        weights = {"row_weights": row_weights, "column_weights": column_weights}
        return sinkhorn_attention(q, k, v, spec, **weights)[0]

    given = q, k, v, row_weights, column_weights
    expected = attend(*given)
    np.testing.assert_allclose(jax.jit(attend)(*given), expected, atol=1e-5)
    mapped = jax.vmap(lambda *x: attend(*(y[None] for y in x))[0])(*given)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    half = attend(*(x.astype(jnp.bfloat16) for x in given))
    assert half.dtype == jnp.bfloat16 and float(jnp.abs(half - expected).max()) < 0.1
    whole = np.ones((2, 24), np.int64)
    np.testing.assert_allclose(attend(q, k, v, whole, whole.tolist()), attend(q, k, v, whole * 1.0, whole * 1.0))


def test_wrong_weights_are_refused_by_name_or_make_nan():
    q, k, v, _, row_weights, column_weights = (x.astype(jnp.float32) for x in draw())
    spec = SinkhornSpec(band=6)
    for bad in (row_weights.at[1, 3].set(0), row_weights.at[0, 0].set(jnp.nan), -row_weights, row_weights[:, :-1], "x"):
        with pytest.raises(ValueError, match="row_weights"):
            sinkhorn_attention(q, k, v, spec, row_weights=bad)
    padded = column_weights.at[1, 21:].set(-jnp.inf)  # padding may hold anything
    out, _ = sinkhorn_attention(q, k, v, spec, *LENGTHS, column_weights=padded)
    same, _ = sinkhorn_attention(q, k, v, spec, *LENGTHS, column_weights=column_weights)
    np.testing.assert_array_equal(out, same)
    traced = jax.jit(lambda w: sinkhorn_attention(q, k, v, spec, row_weights=w)[0])
    good, bad = traced(row_weights.at[1, 3].set(0))
    assert jnp.isfinite(traced(row_weights)).all() and jnp.isfinite(good).all() and jnp.isnan(bad).all()


@pytest.mark.parametrize("changes", [{"tau_a": -0.1}, {"tau_b": 1.5}, {"tau_a": None}, {"tolerance": -1}])
def test_numbers_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SinkhornSpec(**changes)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gradient", ["tail", "implicit"])
def test_second_derivatives_through_weights_and_relaxation(gradient):
    """Forward over reverse and reverse over reverse, against finite differences of a converged relaxed plan."""
    q, k, v, _, row_weights, column_weights = draw(length=12, sd=1.0)
    q, k, v = (x[:1, :, :1] for x in (q, k, v))
    steps = {"base_steps": 60, "cg_steps": 30} if gradient == "implicit" else {"base_steps": 0, "tail_steps": 4}
    spec = SinkhornSpec(band=4, tau_a=0.8, tau_b=0.7, gradient=gradient, **steps)

    def loss(t, implementation):
        weights = {
            "row_weights": row_weights[:1] * jnp.exp(t * jnp.arange(12) / 12),
            "column_weights": column_weights[:1],
        }
        out, _ = sinkhorn_attention(q * (1 + t), k, v, spec, implementation=implementation, **weights)
        return jnp.sin(out).sum()

    first = jax.jit(jax.grad(functools.partial(loss, implementation="xla")))
    found = jax.jit(lambda t: (jax.jvp(first, (t,), (1.0,))[1], jax.grad(first)(t)))(0.1)
    expected = (first(0.1 + 1e-5) - first(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(found, [expected] * 2, rtol=2e-6)


def test_asap_refuses_relaxed_marginals():
    from ot_attention import asap

    with pytest.raises(UnsupportedError, match="tau_a"):
        asap.maps.check_fixed(SinkhornSpec(tau_a=0.5))


def test_relaxed_sums_too_small_for_float32_are_made_in_the_log_domain():
    """A share of the logarithm of a sum is in range, though the sum is not: 0 would pass for 1."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, n, 2, 8)) for n in (60, 150))
    spec = SinkhornSpec(band=8, base_steps=2, tail_steps=1, tau_b=0.1)

    def columns(implementation, dtype):
        arrays = (jnp.asarray(x, dtype) for x in (100 * q, k, k))
        return sinkhorn_attention(*arrays, spec, implementation=implementation)[1].g

    with jax.enable_x64(True):
        exact = np.asarray(columns("reference", "float64"))
    assert abs(columns("xla", "float32") - exact).max() < 1e-5 * abs(exact).max()
