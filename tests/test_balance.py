"""Balanced scores against plain half steps in float64, automatic differentiation, and attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, balance, sinkhorn_attention, transport_plan

TAUS = [(1.0, 1.0), (0.9, 0.6), (0.3, 1.0), (1.0, 0.0), (0.0, 1.0)]


def normal(seed, *shape, sd=1.0):
    return sd * jax.random.normal(jax.random.key(seed), shape)


def half_step(scores, target, tau, axis):
    """Define a half step, on dense scores with minus infinity outside the support."""
    supported = target > 0
    total = jax.nn.logsumexp(jnp.where(jnp.expand_dims(supported, axis), scores, 0), axis)
    return tau * jnp.where(supported, jnp.log(jnp.where(supported, target, 1)) - total, 0)


def definition(scores, a, b, spec, unrolled=False):
    """Make T steps without gradient, unless unrolled, and R with it; return plan, f and g."""
    f, g = jnp.zeros_like(a), jnp.zeros_like(b)
    for number in range(spec.base_steps + spec.tail_steps):
        if number == spec.base_steps and not unrolled:
            f, g = jax.lax.stop_gradient((f, g))
        f = half_step(scores + g[..., None, :], a, spec.tau_a, -1)
        g = half_step(scores + f[..., :, None], b, spec.tau_b, -2)
    return jnp.exp(scores + f[..., :, None] + g[..., None, :]), f, g


def problem(scores, row_weights, column_weights, score, spec, n_rows, n_columns):
    """Define scores and targets `[rows + 1, columns + 1]` of one matrix, without any of the code under test."""
    rows, columns = scores.shape
    real_rows, real_columns = jnp.arange(rows) < n_rows, jnp.arange(columns) < n_columns
    scores = jnp.where(real_rows[:, None] & real_columns, scores, -jnp.inf)
    finite = jnp.isfinite(scores)
    if spec.dustbin == "none":
        real_rows, real_columns = finite.any(1), finite.any(0)
    a = jnp.where(real_rows, 1.0 if row_weights is None else row_weights, 0)
    b = jnp.where(real_columns, 1.0 if column_weights is None else column_weights, 0)
    if spec.dustbin == "none":
        if spec.tau_a == spec.tau_b == 1:
            b *= a.sum() / b.sum()
        elif column_weights is None:
            b *= real_rows.sum() / real_columns.sum()
        return scores, a, b
    bins = {
        "full": (b.sum(), a.sum()),
        "unit": (1 + jnp.maximum(b.sum() - a.sum(), 0), 1 + jnp.maximum(a.sum() - b.sum(), 0)),
    }[spec.dustbin]
    column, row = jnp.where(real_rows, score, -jnp.inf), jnp.where(real_columns, score, -jnp.inf)
    scores = jnp.block([[scores, column[:, None]], [row[None], jnp.zeros((1, 1))]])
    return scores, jnp.append(a, bins[0]), jnp.append(b, bins[1])


def assert_as_defined(spec, *, unrolled=False, weighted=True, masked=True, sd=1.0, rtol=1e-11):
    """Compare plan, f, g and all gradients with the definition, for two matrices of different lengths."""
    shape, lengths = (2, 5, 7), ([5, 4], [7, 5])
    scores = normal(0, *shape, sd=sd)
    if masked:
        scores = scores.at[:, 1, 2].set(-jnp.inf).at[0, 3].set(-jnp.inf)
    given = [scores, None, None, None]
    if weighted:
        given[1:3] = jnp.exp(0.3 * normal(1, 2, 5)), jnp.exp(0.3 * normal(2, 2, 7))
    if spec.dustbin != "none":
        given[3] = normal(3, 2)

    def actual(scores, row_weights, column_weights, score):
        plan, info = balance(
            scores, spec, *lengths, row_weights=row_weights, column_weights=column_weights, dustbin_score=score
        )
        return plan, info.f, info.g

    def expected(*given):
        one = functools.partial(definition, spec=spec.settled(), unrolled=unrolled)
        each = [
            one(*problem(*(x if x is None else x[i] for x in given), spec, lengths[0][i], lengths[1][i]))
            for i in range(2)
        ]
        return tuple(map(jnp.stack, zip(*each, strict=True)))

    at = [i for i, x in enumerate(given) if x is not None]

    def of_given(function):
        return lambda *x: function(*(dict(zip(at, x, strict=True)).get(i) for i in range(4)))

    arrays = [given[i] for i in at]

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, *arrays):
        found, back = jax.vjp(of_given(function), *arrays)
        return *found, *back(tuple(normal(4 + i, *x.shape) for i, x in enumerate(found)))

    for x, y in zip(with_gradients(actual, *arrays), with_gradients(expected, *arrays), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, jnp.nan_to_num(y), rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("dustbin", "taus"), [*zip(["none", "unit", "full", "none", "full"], TAUS, strict=True)], ids=str
)
def test_tail_is_that_of_plain_half_steps(dustbin, taus):
    assert_as_defined(SinkhornSpec(base_steps=6, tail_steps=3, dustbin=dustbin, tau_a=taus[0], tau_b=taus[1]))


@pytest.mark.usefixtures("float64")
def test_more_ways_of_the_tail():
    assert_as_defined(SinkhornSpec(base_steps=1, tail_steps=1), weighted=False, masked=False)
    assert_as_defined(SinkhornSpec(base_steps=8, tail_steps=2), sd=30.0, rtol=1e-9)
    assert_as_defined(SinkhornSpec(base_steps=0, tail_steps=2), sd=200.0, rtol=1e-9)  # the tail in the log domain
    assert_as_defined(SinkhornSpec(base_steps=3, tail_steps=1, tau_a=0.7, tau_b=0.9), sd=30.0, rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dustbin", ["full"])
def test_unrolled_is_automatic_differentiation(dustbin):
    assert_as_defined(SinkhornSpec(base_steps=4, tail_steps=1, dustbin=dustbin, gradient="unrolled"), unrolled=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("dustbin", "taus", "solver"),
    [("none", (1, 1), "newton"), ("full", (1, 1), "sinkhorn"), ("none", (0.9, 0.6), "newton")],
)
def test_implicit_is_the_gradient_of_the_converged_plan(dustbin, taus, solver):
    """Automatic differentiation through 300 steps; of f and g only what the gauge leaves."""
    spec = SinkhornSpec(gradient="implicit", solver=solver, dustbin=dustbin, cg_steps=20, tau_a=taus[0], tau_b=taus[1])
    spec = spec if solver == "newton" else SinkhornSpec(**{**vars(spec), "base_steps": 300})
    scores, weights = normal(0, 3, 5, 7), (jnp.exp(0.3 * normal(1, 3, 5)), jnp.exp(0.3 * normal(2, 3, 7)))
    score = None if dustbin == "none" else normal(3, 3)
    direction = normal(4, 3, 6, 8)[:, : 5 + (dustbin != "none"), : 7 + (dustbin != "none")]

    def loss(scores, weights, score, spec):
        plan, info = balance(scores, spec, None, None, *weights, score)
        return (plan * direction).sum() + ((info.f[:, :, None] + info.g[:, None]) * direction**2).sum()

    slow = SinkhornSpec(**{**vars(spec), "solver": "sinkhorn", "base_steps": 300, "gradient": "unrolled"})
    by = jax.jit(jax.grad(loss, (0, 1, 2) if score is not None else (0, 1)), static_argnums=3)
    actual, wanted = (by(scores, weights, score, x) for x in (spec, slow))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7), actual, wanted)


def heads(length_q=9, length_k=11):
    q, k, v = normal(0, 2, length_q, 3, 4), normal(1, 2, length_k, 3, 4), normal(2, 2, length_k, 3, 5)
    return q, k, v, jnp.array([length_q, length_q - 3]), jnp.array([length_k - 2, length_k])


@pytest.mark.parametrize(("dustbin", "taus"), [("none", (1.0, 1.0)), ("full", (0.9, 0.6))], ids=str)
def test_equals_attention_where_scores_are_products(dustbin, taus):
    q, k, v, n_q, n_k = heads()
    score = None if dustbin == "none" else jnp.array([0.5, -1.0, 0.0])
    spec = SinkhornSpec(band=None, epsilon=0.5, base_steps=5, dustbin=dustbin, tau_a=taus[0], tau_b=taus[1])
    lengths = n_q[:, None], n_k[:, None]

    def of_scores(q, k, v):
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / (q.shape[-1] ** 0.5 * spec.epsilon)
        plan, info = balance(scores, spec, *lengths, dustbin_score=score)
        return jnp.einsum("bhij,bjhd->bihd", plan[:, :, : q.shape[1], : k.shape[1]], v), (plan, info)

    out, back, (plan, info) = jax.vjp(of_scores, q, k, v, has_aux=True)
    wanted, wanted_back, wanted_info = jax.vjp(
        lambda *x: sinkhorn_attention(*x, spec, n_q, n_k, score), q, k, v, has_aux=True
    )
    everything = (out, plan, *info, *back(jnp.sin(out)))
    wanted_plan = transport_plan(q, k, spec, n_q, n_k, score)
    for x, y in zip(everything, (wanted, wanted_plan, *wanted_info, *wanted_back(jnp.sin(wanted))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_free_columns_are_softmax():
    scores = normal(0, 3, 6, 5, sd=4.0).at[0, 2, 3].set(-jnp.inf)
    spec = SinkhornSpec(tau_b=0.0)
    plan, back = jax.vjp(lambda s: balance(s, spec)[0], scores)
    wanted, wanted_back = jax.vjp(lambda s: jax.nn.softmax(s, -1), scores)
    np.testing.assert_allclose(plan, wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(*(f(normal(1, 3, 6, 5))[0] for f in (back, wanted_back)), rtol=1e-5, atol=1e-6)
    assert (balance(scores, spec)[1].steps == 0).all()


@pytest.mark.parametrize(("gradient", "dustbin"), [("tail", "none"), ("implicit", "full"), ("unrolled", "none")])
def test_padding_and_empty_rows_reach_nothing(gradient, dustbin):
    scores = normal(0, 3, 6, 7).at[:, 2].set(-jnp.inf).at[2].set(-jnp.inf)
    padded = scores.at[:, 4:].set(jnp.nan).at[:, :, 5:].set(jnp.inf)
    spec = SinkhornSpec(gradient=gradient, dustbin=dustbin, base_steps=5)
    score = None if dustbin == "none" else 0.3
    weights = {"row_weights": jnp.arange(1.0, 7).at[4:].set(jnp.nan), "column_weights": jnp.arange(1.0, 8)}

    def results(scores, **lengths):
        plan, info = balance(scores, spec, **lengths, dustbin_score=score)
        return plan, info

    cut = scores[:, :4, :5]
    plan, info = results(padded, row_lengths=4, column_lengths=5)
    wanted, _ = results(cut)
    np.testing.assert_allclose(plan[:, :4, :5], wanted[:, :4, :5], rtol=1e-6, atol=1e-7)
    assert (plan[:, 4:6] == 0).all() and (plan[:, :, 5:7] == 0).all()
    assert all(np.isfinite(x).all() for x in info)
    if dustbin == "none":  # the empty row does not count
        assert (plan[:2, 2] == 0).all() and (plan[2] == 0).all() and (info.f[:2, 2] == 0).all()
        np.testing.assert_allclose(plan[:2].sum((1, 2)), 3, rtol=1e-5)
    else:  # it is a gap
        np.testing.assert_allclose(plan[:, 2, -1], plan[:, 2].sum(-1), rtol=1e-6)

    def loss(scores):
        plan, info = balance(scores, spec, 4, 5, **weights, dustbin_score=score)
        return (plan * jnp.sin(jnp.arange(plan.size).reshape(plan.shape))).sum() + info.f.sum()

    gradient = jax.grad(loss)(padded)
    assert np.isfinite(gradient).all() and (gradient[:, 4:] == 0).all() and (gradient[:, :, 5:] == 0).all()
    assert (gradient[:, 2] == 0).all() and (gradient[2] == 0).all() and (gradient[0, 0, :5] != 0).all()


def test_hard_matrices_do_not_change_easy_ones():
    """Scores of sd 8, 60 and 1000, rows 200 nats apart, and NaN, among matrices of sd 1: all are the definition's."""
    easy = normal(0, 40, 6, 6)
    far = normal(1, 1, 6, 6) + jnp.array([0, 200, -300, 0, 0, 50.0])[:, None]
    hard = jnp.concatenate([normal(2, 3, 6, 6, sd=8.0), normal(3, 2, 6, 6, sd=60.0), normal(4, 1, 6, 6, sd=1e3), far])
    spec = SinkhornSpec(base_steps=20, tail_steps=2)
    direction = normal(5, 48, 6, 6)

    def values(scores, direction, function):
        plan, back = jax.vjp(function, scores)
        return plan, back(direction)[0]

    def ours(scores):
        return balance(scores, spec)[0]

    with jax.enable_x64(True):
        ones = jnp.ones((47, 6), "float64")
        scores = jnp.concatenate([easy, hard]).astype("float64")
        wanted = values(scores, direction[:47].astype("float64"), lambda s: definition(s, ones, ones, spec)[0])
        wanted = [np.asarray(x) for x in wanted]
    found = jax.jit(functools.partial(values, function=ours))(
        jnp.concatenate([easy, hard, jnp.full((1, 6, 6), jnp.nan)]), direction
    )
    alone = jax.jit(functools.partial(values, function=ours))(easy, direction[:40])
    for x, y, z, tolerance in zip(found, wanted, alone, (2e-6, 1e-5), strict=True):
        np.testing.assert_allclose(x[:40], y[:40], atol=tolerance)
        np.testing.assert_allclose(x[:40], z, atol=tolerance)
        # Rounding a potential of 1,000 changes a plan by 6e-5.
        np.testing.assert_allclose(x[40:47], y[40:], atol=3e-4)
        assert np.isnan(x[47]).any()


def test_many_small_matrices_become_doubly_stochastic():
    scores = normal(0, 4096, 4, 4, sd=2.0)
    plan, info = jax.jit(balance, static_argnums=1)(scores, SinkhornSpec(base_steps=200, tolerance=1e-5))
    np.testing.assert_allclose(plan.sum(1), 1, atol=2e-5)
    settled = info.steps < 200
    np.testing.assert_allclose(plan[settled].sum(2), 1, atol=2e-5)
    np.testing.assert_allclose(info.residual, jnp.abs(plan.sum(2) - 1).max(-1), atol=1e-6)
    assert settled.mean() > 0.99 and info.steps.min() < 8 and info.steps.shape == (4096,)


@pytest.mark.parametrize("taus", TAUS[:2], ids=str)
def test_tolerance_ends_each_matrix_where_attention_ends(taus):
    q, k, v, *_ = heads(8, 8)
    q = q * jnp.array([0.2, 1.0, 3.0])[:, None]
    spec = SinkhornSpec(band=None, base_steps=50, tolerance=1e-3, tau_a=taus[0], tau_b=taus[1])
    plan, info = balance(jnp.einsum("bihd,bjhd->bhij", q, k) / 2, spec)
    _, wanted = sinkhorn_attention(q, k, v, spec, implementation="reference")
    np.testing.assert_array_equal(info.steps, wanted.steps)
    np.testing.assert_allclose(plan, transport_plan(q, k, spec), rtol=1e-4, atol=1e-6)
    assert len(np.unique(info.steps)) > 1
    sharp, _ = balance(60 * plan, SinkhornSpec(base_steps=50, tolerance=1e-3))
    assert np.isfinite(sharp).all()


@pytest.mark.parametrize("gradient", ["tail"])
def test_vmap_and_leading_axes_are_one_batch(gradient):
    scores, weights = normal(0, 2, 3, 4, 5).at[1, 2].mul(30), jnp.exp(normal(1, 3, 4))
    spec = SinkhornSpec(gradient=gradient, base_steps=6)

    def loss(scores, weights):
        plan, info = balance(scores, spec, row_weights=weights)
        return (plan * jnp.cos(jnp.arange(20.0).reshape(4, 5))).sum(), (plan, info)

    def of_all(scores, weights):
        return loss(scores, weights)[0].sum()

    together = jax.value_and_grad(of_all, (0, 1))(scores, weights)
    mapped = jax.vmap(jax.vmap(jax.value_and_grad(loss, (0, 1), has_aux=True)), (0, None))(scores, weights)
    (values, (plan, info)), (by_scores, by_weights) = mapped
    np.testing.assert_allclose(values.sum(), together[0], rtol=1e-5)
    np.testing.assert_allclose(by_scores, together[1][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_weights.sum(0), together[1][1], rtol=1e-4, atol=1e-6)
    # The map inside the derivative must not mix the ways that its members go.
    inside = jax.grad(lambda s: jax.vmap(jax.vmap(lambda s, w: loss(s, w)[0]), (0, None))(s, weights).sum())(scores)
    np.testing.assert_allclose(inside, by_scores, rtol=1e-4, atol=1e-6)
    for x, y in zip((plan, *info), (lambda p, i: (p, *i))(*balance(scores, spec, row_weights=weights)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_log_domain_tail_under_vmap_has_finite_gradients():
    scores = normal(0, 4, 5, 5, sd=300.0).at[0].set(0)
    spec = SinkhornSpec(base_steps=0)
    direction = normal(1, 5, 5)
    gradient = jax.grad(lambda s: (jax.vmap(lambda s: balance(s, spec)[0])(s) * direction).sum())(scores)
    wanted = jax.grad(lambda s: (balance(s, spec)[0] * direction).sum())(scores)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gradient", ["tail", "implicit", "unrolled"])
def test_forward_mode_and_second_derivatives(gradient):
    spec = SinkhornSpec(gradient=gradient, base_steps=60 if gradient == "implicit" else 3, cg_steps=12)
    scores, change, direction = normal(0, 2, 3, 4), normal(1, 2, 3, 4), normal(2, 2, 3, 4)

    def loss(scores):
        return (jnp.sin(3 * balance(scores, spec)[0]) * direction).sum()

    slope = jax.grad(loss)
    np.testing.assert_allclose(jax.jvp(loss, (scores,), (change,))[1], (slope(scores) * change).sum(), rtol=1e-9)
    over = jax.jvp(slope, (scores,), (change,))[1]
    np.testing.assert_allclose(over, jax.grad(lambda s: (slope(s) * change).sum())(scores), rtol=1e-8, atol=1e-10)
    if gradient != "tail":  # whose base potentials finite differences move
        step = 1e-5
        finite = (slope(scores + step * change) - slope(scores - step * change)) / (2 * step)
        np.testing.assert_allclose(over, finite, rtol=1e-6, atol=1e-7)


def test_bfloat16_is_computed_in_float32():
    scores = normal(0, 3, 6, 6).astype("bfloat16")
    spec = SinkhornSpec()
    plan, info = balance(scores, spec)
    assert plan.dtype == info.f.dtype == jnp.float32
    np.testing.assert_array_equal(plan, balance(scores.astype("float32"), spec)[0])
    assert jax.grad(lambda s: balance(s, spec)[0][0, 0, 0])(scores).dtype == jnp.bfloat16
    listed, _ = balance(np.asarray(scores, np.float32), spec, row_lengths=np.uint8(6), column_weights=[1.0] * 6)
    np.testing.assert_allclose(listed, plan, rtol=1e-6)


def test_nothing_depends_on_what_callers_set():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        scores = normal(0, 2, 4, 5).at[0, 1].set(-jnp.inf).at[1, 3].set(jnp.float32(500))
        value = jax.value_and_grad(lambda s: (balance(s, SinkhornSpec(dustbin="unit"), 3, 5, dustbin_score=1)[0]).max())
        assert all(np.isfinite(x).all() for x in value(scores))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": np.zeros(4, np.float32)}, "scores has shape"),
        ({"scores": np.zeros((2, 0, 4), np.float32)}, "scores has shape"),
        ({"scores": np.zeros((2, 3, 4), np.int32)}, "scores has dtype int32"),
        ({"spec": "tail"}, "spec='tail' must be"),
        ({"row_lengths": [1, 2, 3]}, "row_lengths has shape"),
        ({"row_lengths": [1, 4]}, "row_lengths=.* must lie between 0 and the padded length 3"),
        ({"column_lengths": [1.0, 2.0]}, "column_lengths has .*dtype"),
        ({"row_weights": np.ones(4)}, "row_weights has shape"),
        ({"column_weights": np.zeros(4)}, "column_weights holds 0"),
        ({"dustbin_score": 1.0}, "dustbin_score is given"),
        ({"spec": SinkhornSpec(dustbin="full")}, "dustbin_score is missing"),
        ({"spec": SinkhornSpec(dustbin="full"), "dustbin_score": np.ones(3)}, "dustbin_score has shape"),
        ({"spec": SinkhornSpec(dustbin="full"), "dustbin_score": True}, "dustbin_score has dtype"),
    ],
)
def test_wrong_arguments_are_named(changes, told):
    given = {"scores": np.zeros((2, 3, 4), np.float32), "spec": SinkhornSpec()} | changes
    with pytest.raises(ValueError, match=told) as raised:
        balance(**given)
    assert not isinstance(raised.value, UnsupportedError)


def test_wrong_weights_inside_jit_are_nan():
    plan, _ = jax.jit(lambda w: balance(jnp.zeros((2, 3, 3)), SinkhornSpec(), row_weights=w))(
        jnp.array([[1.0, 2, 3], [1, 0, 3]])
    )
    assert np.isfinite(plan[0]).all() and np.isnan(plan[1]).all()


@pytest.mark.parametrize(("base_steps", "tail_steps"), [(20, 1), (0, 2)])
def test_entries_that_float32_loses_are_found_in_the_log_domain(base_steps, tail_steps):
    """All but one column are e^-300 of the first, so that one kernel has sums of 0; an easy matrix stands beside."""
    scores = normal(0, 2, 4, 4).astype(jnp.float32)
    scores = scores.at[0].add(jnp.array([0.0, -300, -310, -290]))
    weights = normal(1, 2, 4, 4).astype(jnp.float32)
    spec = SinkhornSpec(base_steps=base_steps, tail_steps=tail_steps)

    def results(dtype, gradient):
        of = dataclasses.replace(spec, gradient=gradient)

        def loss(scores):
            plan, info = balance(scores, of)
            return (plan * weights).sum(), (plan, info.f, info.g)

        return jax.value_and_grad(loss, has_aux=True)(scores.astype(dtype))

    found = results("float32", "tail")
    with jax.enable_x64(True):
        exact = results("float64", "tail")  # which holds e^-300
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(abs(y).max()))
