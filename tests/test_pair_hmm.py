"""models/pair_hmm.py: likelihoods against every alignment written down, and against the decoder."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import decoding
from models import pair_hmm
from tests.support import decode_oracle

GAPS = np.array([0.7, 1.2, 0.9], np.float32)  # an opening so low is the cost of gaps at the ends too
X_LENGTHS, Y_LENGTHS = np.array([4, 3, 5]), np.array([5, 4, 2])


def random_plans(seed: int = 0) -> np.ndarray:
    """Positive within the lengths but for a few cells; NaN beyond."""
    rng = np.random.default_rng(seed)
    plans = rng.random((3, 5, 6)).astype(np.float32)
    plans[rng.random(plans.shape) < 0.1] = 0
    for plan, rows, columns in zip(plans, X_LENGTHS, Y_LENGTHS, strict=True):
        plan[rows:], plan[:, columns:] = np.nan, np.nan
    return plans


def alignments(rows: int, columns: int):
    """Every set of pairs that rise in both sequences."""

    def go(i: int, j: int):
        yield ()
        for a in range(i, rows):
            for b in range(j, columns):
                yield from (((a, b), *rest) for rest in go(a + 1, b + 1))

    return go(0, 0)


def log_weight_of(pairs, plan: np.ndarray, rows: int, columns: int) -> float:
    if any(not plan[pair] for pair in pairs):
        return -math.inf
    nodes = [(-1, -1), *pairs, (rows, columns)]
    gaps = sum((b[k] - a[k] > 1) for a, b in itertools.pairwise(nodes) for k in (0, 1))
    return sum(GAPS[0] * math.log(plan[pair]) + GAPS[1] for pair in pairs) - GAPS[2] * gaps


@jax.jit
def likelihood(plans, target):
    lengths = jnp.asarray(X_LENGTHS), jnp.asarray(Y_LENGTHS)
    return pair_hmm.negative_log_likelihood(jnp.log(plans), target, *lengths, jnp.asarray(GAPS))


def test_the_likelihood_is_the_share_of_all_alignments():
    plans, rng = random_plans(), np.random.default_rng(1)
    every = [list(alignments(*sizes)) for sizes in zip(X_LENGTHS.tolist(), Y_LENGTHS.tolist(), strict=True)]
    weights = [
        [log_weight_of(pairs, plan, rows, columns) for pairs in of]
        for of, plan, rows, columns in zip(every, plans, X_LENGTHS, Y_LENGTHS, strict=True)
    ]
    for _ in range(30):
        target, expected = np.full((3, 5), -1, np.int32), []
        for n, (of, log_weight) in enumerate(zip(every, weights, strict=True)):
            chosen = rng.choice(np.flatnonzero(np.isfinite(log_weight)))
            for i, j in of[chosen]:
                target[n, i] = j
            expected.append(np.logaddexp.reduce(log_weight) - log_weight[chosen])
        np.testing.assert_allclose(likelihood(plans, target), expected, rtol=1e-4, atol=1e-4)


def test_its_derivative_is_the_posterior_of_the_decoder():
    """The derivative by log P is sharpness times (posterior - reference); also on long sequences that hardly match."""
    rng = np.random.default_rng(2)
    plans = np.stack([rng.random((200, 150)) ** 20, rng.random((200, 150))]).astype(np.float32)
    plans[1, np.arange(150), np.arange(150)] = 20
    lengths = np.array([200, 160]), np.array([150, 150])
    target = np.full((2, 200), -1, np.int32)
    arguments = *map(jnp.asarray, (target, *lengths)), jnp.asarray(GAPS)
    gradient = jax.grad(lambda log_plan: pair_hmm.negative_log_likelihood(log_plan, *arguments).sum())(jnp.log(plans))
    expected = decode_oracle.posterior(plans, *lengths, decoding.Gaps(*GAPS.tolist()))
    np.testing.assert_allclose(np.asarray(gradient) / GAPS[0], expected, atol=2e-4)
    assert expected[1].max() > 0.9


def test_derivatives_of_uneven_pairs_are_finite():
    """Long x and short y, all matches profitable: what could follow a poor beginning weighs exp(90)."""
    log_plan = jnp.full((1, 300, 60), 0.5)
    target, lengths = jnp.full((1, 300), -1, jnp.int32), (jnp.array([290]), jnp.array([60]))
    of_plan, of_gaps = jax.grad(
        lambda *at: pair_hmm.negative_log_likelihood(at[0], target, *lengths, at[1]).sum(), (0, 1)
    )(log_plan, jnp.asarray(GAPS))
    assert np.isfinite(of_plan).all() and np.isfinite(of_gaps).all()
    expected = decode_oracle.posterior(np.exp(log_plan), np.array([290]), np.array([60]), decoding.Gaps(*GAPS.tolist()))
    np.testing.assert_allclose(of_plan / GAPS[0], expected, atol=1e-4)


def test_derivatives_by_the_gap_model_are_those_of_finite_differences():
    plans = jnp.asarray(random_plans())
    target = jnp.full((3, 5), -1, jnp.int32).at[:, 0].set(1)
    lengths = jnp.asarray(X_LENGTHS), jnp.asarray(Y_LENGTHS)

    def nll(gaps):
        return pair_hmm.negative_log_likelihood(jnp.log(plans), target, *lengths, gaps).sum()

    found, nll = jax.jit(jax.grad(nll))(jnp.asarray(GAPS)), jax.jit(nll)
    for n, derivative in enumerate(found.tolist()):
        step = jnp.zeros(3).at[n].set(1e-2)
        assert derivative == pytest.approx(float(nll(GAPS + step) - nll(GAPS - step)) / 2e-2, abs=2e-3)


def test_a_reference_pair_outside_the_band_does_not_count():
    plans = random_plans()
    plans[0, 1, 2] = 0
    target = np.full((3, 5), -1, np.int32)
    target[0, 0] = 0
    without = likelihood(plans, target)
    target[0, 1] = 2
    assert np.isfinite(likelihood(plans, target)).all()
    np.testing.assert_array_equal(likelihood(plans, target), without)


def test_gap_model_starts_as_numbers_that_the_decoder_takes():
    sharpness, match, opening = pair_hmm.GapModel()().tolist()
    assert decoding.Gaps(sharpness, match, opening).opening == pytest.approx(4.5)
