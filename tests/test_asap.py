"""ot_attention/asap.py: one-dimensional duals, the map and its fit, and plans, against SciPy and dense NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.optimize import linprog
from scipy.special import logsumexp

from ot_attention import SinkhornSpec, asap, sinkhorn_attention, support, transport_plan
from ot_attention.asap import Asap, Sample

BATCH, HEADS, WIDTH = 3, 2, 8
LENGTHS = np.array([40, 33, 7], np.int32), np.array([31, 36, 20], np.int32)
CASES = [(None, "none"), (12, "none"), (12, "full"), (None, "unit")]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compilation():
        yield


def problem(seed: int = 0, dustbin: str = "none", scale: float = 1.0, rows: int = 40, columns: int = 36):
    """q, k, v, lengths and dustbin score, with NaN as padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(BATCH, n, HEADS, WIDTH)).astype(np.float32) for n in (rows, columns, columns))
    for x, n in ((q, LENGTHS[0]), (k, LENGTHS[1]), (v, LENGTHS[1])):
        x[np.arange(x.shape[1]) >= n[:, None]] = np.nan
    score = None if dustbin == "none" else jnp.asarray([0.5, -0.3], jnp.float32)
    return q * scale, k, v, *map(jnp.asarray, LENGTHS), score


def weighted(features=("kantorovich", "squares", "position", "mass"), seed: int = 1, two_sided: bool = True) -> Asap:
    """A map with some weights."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(HEADS, 3, WIDTH)) / WIDTH**0.5
    empty = Asap.create(jnp.asarray(directions, jnp.float32), features, two_sided)
    return dataclasses.replace(empty, weights=jnp.asarray(0.2 * rng.normal(size=empty.weights.shape), jnp.float32))


# ---- one-dimensional transport ----


def transport_cost(x, y, a, b) -> float:
    """By linear programming."""
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
        f = asap._uniform(x, y, *counts, *asap._uniform_staircase(*counts, 50))
        masses = ((jnp.arange(50) < n).astype(jnp.float32) for n in (n_x, n_y))
        np.testing.assert_allclose(f[:n_x], asap.kantorovich(x, y, *masses)[0][:n_x], atol=1e-4)


# ---- plans ----


def dense(of: Asap, spec: SinkhornSpec, q, k, v, q_lengths, k_lengths, score, n: int, h: int):
    """Plan, f and g of one head by the definition, in float64."""
    n_q, n_k = int(q_lengths[n]), int(k_lengths[n])
    q, k = (x[n, :m, h].astype(float) for x, m in ((q, n_q), (k, n_k)))
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
    out, info = jax.jit(asap.apply, static_argnums=4)(of, q, k, v, spec, *rest)
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
