"""ot_attention/asap/: one-dimensional duals, the map and its fit, and plans, against SciPy and dense NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import logsumexp

from ot_attention import SinkhornSpec, asap, sinkhorn_attention, support, transport_plan
from ot_attention.asap import Asap, Sample, transport

BATCH, HEADS, WIDTH = 3, 2, 8
LENGTHS = np.array([40, 33, 7], np.int32), np.array([31, 36, 20], np.int32)
CASES = [(None, "none"), (12, "none"), (12, "full"), (None, "unit")]


def problem(seed: int = 0, dustbin: str = "none", scale: float = 1.0, rows: int = 40, columns: int = 36):
    """q, k, v, lengths and dustbin score, with NaN as padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(BATCH, n, HEADS, WIDTH)).astype(np.float32) for n in (rows, columns, columns))
    for x, n in ((q, LENGTHS[0]), (k, LENGTHS[1]), (v, LENGTHS[1])):
        x[np.arange(x.shape[1]) >= n[:, None]] = np.nan
    score = None if dustbin == "none" else jnp.asarray([0.5, -0.3], jnp.float32)
    return *map(jnp.asarray, (q * scale, k, v)), *map(jnp.asarray, LENGTHS), score


def weighted(features=("kantorovich", "squares", "position", "mass"), seed: int = 1, two_sided: bool = True) -> Asap:
    """A map with some weights."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(HEADS, 3, WIDTH)) / WIDTH**0.5
    empty = Asap.create(jnp.asarray(directions, jnp.float32), features, two_sided)
    return dataclasses.replace(empty, weights=jnp.asarray(0.2 * rng.normal(size=empty.weights.shape), jnp.float32))


# ---- one-dimensional transport ----


def transport_cost(x, y, a, b) -> float:
    """Solve the transport problem by linear programming."""
    n, m = len(x), len(y)
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    cost = ((x[:, None] - y) ** 2).ravel()
    solved = linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]))
    assert solved.success
    return solved.fun


MASSES = {
    "random": lambda rng, n: rng.dirichlet(np.ones(n)),
    "uniform": lambda rng, n: np.full(n, 1 / n),
    "ties": lambda rng, n: np.full(n, 1 / n) if n % 2 else np.repeat([0.5 / n, 1.5 / n], n // 2),
}


@pytest.mark.parametrize("masses", MASSES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (9, 9), (12, 8), (8, 20), (24, 36)])
def test_duals_are_feasible_and_worth_the_optimum_of_the_linear_program(masses, n, m):
    rng = np.random.default_rng(n * m)
    for _ in range(3):
        x, y, a, b = rng.normal(size=n), rng.normal(size=m) + 1, MASSES[masses](rng, n), MASSES[masses](rng, m)
        given = (np.concatenate([z, extra]).astype(np.float32) for z, extra in _padded(x, y, a, b))
        f, g = (np.asarray(z, float) for z in _kantorovich(*given))
        assert not f[n:].any() and not g[m:].any()
        cost = (x[:, None] - y) ** 2
        assert (f[:n, None] + g[:m] - cost).max() < 2e-5 * cost.max()
        np.testing.assert_allclose(a @ f[:n] + b @ g[:m], transport_cost(x, y, a, b), rtol=1e-4, atol=1e-5)


_kantorovich = jax.jit(asap.kantorovich)


def _padded(x, y, a, b):
    """To one length, with nonsense of mass 0."""
    nonsense, nothing = np.array([np.nan, np.inf, -1e9] * 20), np.zeros(60)
    return [(z, more[len(z) :]) for z, more in ((x, nonsense), (y, nonsense), (a, nothing), (b, nothing))]


def test_duals_between_equal_numbers_are_the_mean_of_both_staircases():
    """Where all partial sums meet, each staircase has an end of the range that complementary slackness leaves."""
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.normal(size=(2, 7)), axis=1)
    f, _ = asap.kantorovich(*(jnp.asarray(z, jnp.float32) for z in (x, y, np.ones(7), np.ones(7))))
    rise = [(x[1:] - x[:-1]) * (x[1:] + x[:-1] - 2 * y_met) for y_met in (y[:-1], y[1:])]
    np.testing.assert_allclose(np.diff(f), (rise[0] + rise[1]) / 2, atol=1e-5)


def test_uniform_masses_need_no_search():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(z, jnp.float32) for z in rng.normal(size=(2, 50)))
    for n_x, n_y in ((50, 50), (50, 20), (7, 45), (30, 40)):
        counts = jnp.array(n_x), jnp.array(n_y)
        f = transport.uniform(x, y, *counts, *transport.uniform_staircase(*counts, 50))
        masses = ((jnp.arange(50) < n).astype(jnp.float32) for n in (n_x, n_y))
        np.testing.assert_allclose(f[:n_x], asap.kantorovich(x, y, *masses)[0][:n_x], atol=1e-4)


# ---- plans ----

apply = jax.jit(asap.apply, static_argnums=4)
attend = jax.jit(sinkhorn_attention, static_argnums=3)
deviation = jax.jit(asap.deviation, static_argnums=2)


def dense(of: Asap, spec: SinkhornSpec, q, k, v, q_lengths, k_lengths, score, n: int, h: int):
    """Plan, f and g of one head by the definition, in float64."""
    n_q, n_k = int(q_lengths[n]), int(k_lengths[n])
    q, k = (np.asarray(x[n, :m, h], float) for x, m in ((q, n_q), (k, n_k)))
    mask, a, b = _support(n_q, n_k, spec)
    scores = np.zeros((n_q + 1, n_k + 1))
    scores[:-1, :-1] = q @ k.T / WIDTH**0.5 / spec.epsilon
    if score is not None:
        scores[-1, :-1] = scores[:-1, -1] = score[h]
    scores = np.where(mask, scores, -np.inf)
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)

    def half_step(log_target, scores, axis):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.isfinite(log_target), log_target - logsumexp(scores, axis), 0)

    first = half_step(log_a, scores, 1)
    columns, place = [], (np.arange(n_q) + 0.5) / n_q
    directions = np.asarray(of.directions[h], float)
    for name in of.features:
        if name == "kantorovich":
            columns += [_kantorovich_by_program(q @ d, k @ d) for d in directions]
        elif name == "squares":
            columns += [(q @ d) ** 2 for d in directions]
        elif name == "position":
            columns += [place, place**2, np.log(np.maximum(mask[:-1, :-1].sum(1), 1))]
        else:
            columns += [first[:-1]]
    weights, there = np.asarray(of.weights[h], float), a[:-1] > 0
    f = sum(w * (x - x[there].mean()) for w, x in zip(weights, columns, strict=False)) * there
    of_bin = [1, np.log(n_q), np.log(n_k), first[-1] - first[:-1][there].mean()]
    f = np.append(f, weights[len(columns) :] @ of_bin[: len(weights) - len(columns)] if a[-1] > 0 else 0)
    g = half_step(log_b, scores + f[:, None], 0)
    if of.two_sided:
        f = half_step(log_a, scores + g, 1)
    return np.exp(scores + f[:, None] + g), f, g


def _support(n_q: int, n_k: int, spec: SinkhornSpec):
    lengths = jnp.array(n_q), jnp.array(n_k)
    shape = n_q, n_k, spec.band, spec.dustbin
    targets = support.targets(*lengths, *shape, jnp.dtype("float32"))
    return np.asarray(support.dense_support(*lengths, *shape)), *map(np.asarray, targets)


def _kantorovich_by_program(x, y):
    """The mean of two staircases walked cell by cell, in exact arithmetic."""
    order, y = np.argsort(x), np.sort(y)
    x, found = x[order], []
    for row_first in (True, False):
        f, j = np.zeros(len(x)), 0
        for i in range(len(x) - 1):
            while (j + 1) * len(x) < (i + 1) * len(y) or ((j + 1) * len(x) == (i + 1) * len(y) and not row_first):
                j += 1
            f[i + 1] = f[i] + (x[i + 1] - y[j]) ** 2 - (x[i] - y[j]) ** 2
        found.append(f)
    result = np.zeros(len(x))
    result[order] = np.mean(found, axis=0)
    return result


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("band", "dustbin"), CASES)
@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["plain", "in_logarithms"])
def test_plans_are_those_of_the_definition(band, dustbin, two_sided, scale):
    spec = SinkhornSpec(band=band, dustbin=dustbin, epsilon=0.8)
    of, arguments = weighted(two_sided=two_sided), problem(dustbin=dustbin, scale=scale)
    if scale > 1:
        of = dataclasses.replace(of, weights=of.weights / scale**2)  # the features grow as the square
    q, k, v, *rest = arguments
    out, info = apply(of, q, k, v, spec, *rest)
    bin_place = dustbin != "none"
    for n in range(BATCH):
        n_q, n_k = (int(x[n]) for x in LENGTHS)
        for h in range(HEADS):
            plan, f, g = dense(of, spec, *arguments, n, h)
            f_gauge = np.asarray(info.f[n, h, :n_q])[f[:-1] != 0].mean() - f[:-1][f[:-1] != 0].mean()
            rows = np.append(np.arange(n_q), q.shape[1])[: n_q + bin_place]
            columns = np.append(np.arange(n_k), k.shape[1])[: n_k + bin_place]
            there = f[: len(rows)] != 0
            tolerance = {"rtol": 2e-4, "atol": 1e-4 * scale}
            np.testing.assert_allclose(info.f[n, h][rows][there] - f_gauge, f[: len(rows)][there], **tolerance)
            there = g[: len(columns)] != 0
            np.testing.assert_allclose(info.g[n, h][columns][there] + f_gauge, g[: len(columns)][there], **tolerance)
            expected = plan[:-1, :-1] @ v[n, :n_k, h]
            np.testing.assert_allclose(out[n, :n_q, h], expected, rtol=1e-3, atol=2e-5 * scale)
            off = plan.sum(0) - _support(n_q, n_k, spec)[2] if two_sided else plan.sum(1) - _support(n_q, n_k, spec)[1]
            np.testing.assert_allclose(info.residual[n, h], np.abs(off).max(), rtol=2e-3, atol=1e-4)
        assert not np.asarray(out[n, n_q:]).any()


def test_it_works_on_float64_and_under_vmap():
    spec, arguments = SinkhornSpec(band=12, dustbin="full"), problem(dustbin="full")
    q, k, v, *rest = arguments
    together, _ = apply(weighted(), q, k, v, spec, *rest)

    def one(q, k, v, n_q, n_k):
        return apply(weighted(), q[None], k[None], v[None], spec, n_q[None], n_k[None], rest[2])[0][0]

    np.testing.assert_allclose(jax.jit(jax.vmap(one))(q, k, v, *rest[:2]), together, rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        out, _ = apply(weighted(), *(jnp.asarray(x, "float64") for x in (q, k, v)), spec, *rest)
        assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, together, rtol=1e-3, atol=1e-4)


# ---- fitting ----


def sample(spec: SinkhornSpec, seed: int, f=None, shift: float = 0.0) -> Sample:
    """Make a sample with potentials of Sinkhorn's steps, or given ones, moved by a constant."""
    q, k, v, *rest = problem(seed, spec.dustbin)
    info = attend(q, k, v, spec, *rest)[1]
    return Sample(q, k, *rest, (info.f if f is None else f(q, k, v, *rest)) + shift)


MANY = SinkhornSpec(band=12, dustbin="full", base_steps=60)


@pytest.mark.parametrize(("band", "dustbin"), CASES)
def test_a_linear_map_is_recovered_whatever_the_gauge(band, dustbin):
    spec, of = SinkhornSpec(band=band, dustbin=dustbin), weighted(two_sided=False)

    def predicted(*arguments):
        return apply(of, *arguments[:3], spec, *arguments[3:])[1].f

    samples = [sample(spec, seed, predicted, shift=3.0 * seed) for seed in range(4)]
    fitted = asap.fit(dataclasses.replace(of, weights=0 * of.weights), samples, spec, ridge=0.0)
    for given in samples:
        info = apply(fitted, given.q, given.k, given.k, spec, *given[2:5])[1]
        for n, h in np.ndindex(BATCH, HEADS):
            rows = np.append(np.arange(LENGTHS[0][n]), given.q.shape[1])[: LENGTHS[0][n] + (dustbin != "none")]
            off = info.f[n, h][rows] - given.f[n, h][rows]
            assert np.ptp(np.asarray(off)) < 5e-3 * np.ptp(np.asarray(given.f[n, h][rows])) + 1e-3
    if dustbin == "none":  # without, the dustbin's weights are nowhere
        assert not np.asarray(fitted.weights)[:, -4:].any()


def test_newton_steps_reach_the_least_divergence():
    spec, samples = MANY, [sample(MANY, 0)]
    of = weighted(("kantorovich", "mass"), two_sided=False)

    def divergence(of: Asap) -> np.ndarray:
        """Summed over problems, by head."""
        total = 0
        for given in samples:
            f, g, *_ = apply(of, given.q, given.k, given.k, spec, *given[2:5])[1]
            teacher = attend(given.q, given.k, given.k, spec, *given[2:5])[1]
            compared = deviation(given.q, given.k, spec, *given[2:5], teacher=teacher[:2], student=(f, g))
            masses = transport_plan(given.q, given.k, spec, *given[2:5]).sum((2, 3))
            total += np.asarray(compared.divergence * masses, float).sum(0)
        return total

    ridge, refined = (asap.fit(of, samples, spec, newton_steps=steps) for steps in (0, 4))
    least = divergence(refined)
    assert (least < divergence(ridge)).all()
    rng = np.random.default_rng(0)
    for _ in range(3):
        away = refined.weights * (1 + 0.05 * jnp.asarray(rng.normal(size=refined.weights.shape), jnp.float32))
        assert (divergence(dataclasses.replace(refined, weights=away)) > least).all()


def test_deviations_are_those_of_dense_plans():
    spec, of = SinkhornSpec(band=12, dustbin="full"), weighted()
    q, k, v, *rest = problem(dustbin="full")
    teacher, student = attend(q, k, v, spec, *rest)[1], apply(of, q, k, v, spec, *rest)[1]
    found = deviation(q, k, spec, *rest, teacher=teacher[:2], student=student[:2])
    plans = np.asarray(transport_plan(q, k, spec, *rest), float)
    for n, h in np.ndindex(BATCH, HEADS):
        n_q, n_k = (int(x[n]) for x in LENGTHS)
        keep = np.ix_([*range(n_q), q.shape[1]], [*range(n_k), k.shape[1]])
        a_teacher, (plan, f, _) = plans[n, h][keep], dense(of, spec, q, k, v, *rest, n, h)
        _, a, b = _support(n_q, n_k, spec)
        there = a_teacher > 0
        kl = (a_teacher[there] * np.log(a_teacher[there] / plan[there])).sum() - a_teacher.sum() + plan.sum()
        np.testing.assert_allclose(found.divergence[n, h], kl / a_teacher.sum(), rtol=1e-3)
        np.testing.assert_allclose(
            found.variation[n, h], np.abs(plan - a_teacher).sum() / 2 / a_teacher.sum(), rtol=1e-3
        )
        np.testing.assert_allclose(found.columns[n, h], np.abs(plan.sum(0) - b).max(), rtol=1e-3)
        np.testing.assert_allclose(found.rows[n, h], np.abs(plan.sum(1) - a).max(), atol=1e-4)
        off = f - np.asarray(teacher.f[n, h], float)[[*range(n_q), q.shape[1]]]
        np.testing.assert_allclose(found.f[n, h], np.sqrt(np.mean((off - off[:-1].mean()) ** 2)), rtol=1e-3)


@pytest.mark.parametrize("kind", ["principal", "keys"])
def test_axes_are_those_of_the_largest_variance(kind):
    rng = np.random.default_rng(0)
    spread = np.linspace(1, 3, WIDTH)
    q, k = rng.normal(size=(2, 4, 300, 1, WIDTH)) * spread
    k = k[..., ::-1] if kind == "keys" else k  # q's order must not matter then
    lengths = jnp.full(4, 300)
    given = Sample(*(jnp.asarray(x, jnp.float32) for x in (q, k)), lengths, lengths, None, jnp.zeros((4, 1, 300)))
    axes = np.abs(np.asarray(asap.directions(kind, [given], 2)[0]))
    expected = [0, 1] if kind == "keys" else [WIDTH - 1, WIDTH - 2]
    assert axes.argmax(1).tolist() == expected and axes.max(1).min() > 0.9


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: weighted(("mass", "charm")), "features=.'charm'. must be among kantorovich, squares"),
        (lambda: asap.directions("best", [sample(MANY, 0)], 2), "kind='best' must be one of random"),
        (lambda: asap.directions("keys", [sample(MANY, 0)], 9), "number=9 must be from 0 to 8"),
        (lambda: asap.fit(weighted(), [], MANY), "0 samples"),
        (lambda: apply(weighted(), *(x[:, :, :1] for x in problem()[:3]), SinkhornSpec()), "width 8; q has 1"),
        (lambda: apply(weighted(), *problem()[:3], MANY), "dustbin_score is missing"),
    ],
)
def test_mistakes_are_told(call, told):
    with pytest.raises(ValueError, match=told):
        call()
