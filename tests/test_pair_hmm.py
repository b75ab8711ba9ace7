"""models/pair_hmm.py against every alignment written down, and against a float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from data.transforms import pair
from data.vocab import blosum62
from evaluation.alignment import open_families
from models import pair_hmm
from models.pair_hmm import LOG_ZERO, MODES, Gaps, Problem
from tests.support import pair_hmm_oracle as oracle
from tests.support.pair_hmm_oracle import Costs

SIZES = ((4, 3), (3, 5), (1, 1), (5, 4), (1, 6))
PADDED = (6, 7)
CHEAP = Costs(np.array([2.0, 3.0]), np.array([0.5, 0.05]), np.array(1.3), np.array(0.8))  # so that all alignments count


def with_offsets(costs: Costs, sizes: tuple[int, int], rng: np.random.Generator) -> Costs:
    return costs._replace(x_offset=rng.normal(size=sizes[0]), y_offset=rng.normal(size=sizes[1]))


def gaps_of(costs: list[Costs], shape: tuple[int, int]) -> Gaps:
    """Costs of a batch of pairs, which differ by their offsets; 7 where there is no residue."""
    ours = costs[0]
    sides = []
    for side, length in enumerate(shape):
        offsets = [of[4 + side] for of in costs]
        padded = [np.pad(of, (0, length - len(of)), constant_values=7.0) for of in offsets if of is not None]
        sides.append(jnp.asarray(np.stack(padded), jnp.float32) if padded else None)
    empty = jnp.asarray([of.empty for of in costs], jnp.float32)
    return Gaps(*(jnp.asarray(cost, jnp.float32) for cost in ours[:3]), empty, *sides)


def padded(weights: list[np.ndarray], shape: tuple[int, int], fill: float = np.nan) -> tuple[jax.Array, ...]:
    """Weights of a batch, and true lengths."""
    batch = np.full((len(weights), *shape), fill, np.float32)
    for of, weight in zip(batch, weights, strict=True):
        of[: weight.shape[0], : weight.shape[1]] = weight
    return jnp.asarray(batch), *(jnp.asarray([weight.shape[side] for weight in weights]) for side in (0, 1))


@functools.partial(jax.jit, static_argnames="mode")
def everything(weight, x_lengths, y_lengths, gaps, mode="glocal"):
    """Log-partition, its derivative, log-odds and posterior of all pairs of residues."""

    def total(weight):
        found = pair_hmm.log_partition(pair_hmm.of_all_pairs(weight, x_lengths, y_lengths), gaps, mode)
        return found.sum(), found

    gradient, found = jax.grad(total, has_aux=True)(weight)
    odds, lanes = pair_hmm.posterior(pair_hmm.of_all_pairs(weight, x_lengths, y_lengths), gaps, mode)
    return found, gradient, odds, pair_hmm.unskewed(lanes, weight.shape[2])


def compare(weights: list[np.ndarray], costs: list[Costs], shape: tuple[int, int], mode="glocal", atol=1e-5):
    """Compare all that is computed of a batch with the float64 oracle; return the oracle's posteriors."""
    found, gradient, odds, posterior = jax.device_get(everything(*padded(weights, shape), gaps_of(costs, shape), mode))
    expected = []
    for n, (weight, cost) in enumerate(zip(weights, costs, strict=True)):
        of = oracle.forward_backward(weight, cost, mode)
        empty = oracle.log_weight_of((), weight, cost, mode)
        inside = np.s_[n, : weight.shape[0], : weight.shape[1]]
        np.testing.assert_allclose(found[n], of.log_partition, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(odds[n], of.log_partition - empty, rtol=1e-6, atol=2e-5)
        for values in posterior, gradient:
            np.testing.assert_allclose(values[inside], of.posterior, atol=atol)
            assert values[n].sum() == pytest.approx(values[inside].sum(), rel=1e-6)  # nothing beyond the lengths
        expected.append(of.posterior)
    return expected


def tiny_batch(seed: int = 0) -> tuple[list[np.ndarray], list[Costs]]:
    rng = np.random.default_rng(seed)
    weights = [2 * rng.normal(size=sizes) for sizes in SIZES]
    return weights, [with_offsets(CHEAP, sizes, rng) for sizes in SIZES]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "no offsets"])
def test_sums_and_posteriors_are_those_of_every_alignment(mode, offsets):
    weights, costs = tiny_batch()
    costs = costs if offsets else [CHEAP] * len(weights)
    posteriors = compare(weights, costs, PADDED, mode)
    found = everything(*padded(weights, PADDED), gaps_of(costs, PADDED), mode)[0]
    for n, (weight, cost) in enumerate(zip(weights, costs, strict=True)):
        every = list(oracle.every_alignment(*weight.shape))
        logs = np.array([oracle.log_weight_of(one, weight, cost, mode) for one in every])
        total = np.logaddexp.reduce(logs)
        expected = np.zeros(weight.shape)
        for one, log in zip(every, logs, strict=True):
            for match in one:
                expected[match] += np.exp(log - total)
        assert float(found[n]) == pytest.approx(total, abs=1e-5)
        np.testing.assert_allclose(posteriors[n], expected, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "no offsets"])
def test_an_alignment_weighs_what_its_matches_and_gaps_do(mode, offsets):
    rng, sizes = np.random.default_rng(1), (4, 5)
    weight = rng.normal(size=sizes)
    costs = with_offsets(CHEAP, sizes, rng) if offsets else CHEAP
    every = list(oracle.every_alignment(*sizes))
    target = np.full((len(every), PADDED[0]), -1, np.int32)
    for of, one in zip(target, every, strict=True):
        for i, j in one:
            of[i] = j
    given = padded([weight] * len(every), PADDED)
    gaps = gaps_of([costs] * len(every), PADDED)
    found = jax.jit(pair_hmm.log_weight_of, static_argnames="mode")(given[0], target, *given[1:], gaps, mode=mode)
    np.testing.assert_allclose(found, [oracle.log_weight_of(one, weight, costs, mode) for one in every], atol=1e-5)
    # Their shares of the sum over all are 1 together, the empty alignment's among them.
    likelihood = jax.jit(pair_hmm.negative_log_likelihood, static_argnames="mode")
    nats = likelihood(given[0], target, *given[1:], gaps, mode=mode)
    assert float(np.exp(-nats).sum()) == pytest.approx(1, abs=1e-4)
    empty = jax.jit(pair_hmm.log_empty, static_argnames="mode")(*given[1:], gaps, mode=mode)
    assert every[0] == () and float(empty[0]) == float(found[0])


def real_weights(count: int, longest: int) -> list[np.ndarray]:
    """BLOSUM62 scores in nats of pairs that ship, lowered so that unrelated residues do not match."""
    found = []
    for family in open_families("data/default", "validation"):
        for i, j in family.pairs.tolist():
            of = pair(family.alignment, i, j)
            if max(len(of.x), len(of.y)) <= longest:
                found.append(0.35 * blosum62()[np.ix_(of.x, of.y)] - 0.1)
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("mode", MODES)
def test_random_and_real_pairs_are_aligned_as_in_float64(mode):
    rng, shape = np.random.default_rng(2), (150, 160)
    weights = [3 * rng.normal(size=sizes) - 2 for sizes in ((150, 160), (97, 31), (20, 160))] + real_weights(3, 150)
    costs = [with_offsets(Costs(), weight.shape, rng) for weight in weights]
    posteriors = compare(weights, costs, shape, mode, atol=3e-5)
    assert max(of.max() for of in posteriors[3:]) > 0.9


def two_domains() -> np.ndarray:
    """x = S junk L, y = L S: S or L can be aligned, and both weigh 240 nats. S has 160 before L begins."""
    short, long, junk = 60, 100, 120
    weight = np.random.default_rng(3).normal(size=(short + junk + long, long + short)) - 3
    weight[range(short), range(long, long + short)] = 240 / short
    weight[range(short + junk, short + junk + long), range(long)] = 240 / long
    return weight


@pytest.mark.parametrize("mode", MODES)
def test_a_strong_domain_hides_no_later_one(mode):
    weight = two_domains()
    (posterior,) = compare([weight], [Costs()], weight.shape, mode, atol=2e-4)
    assert posterior[30, 130] > 0.01 and posterior[230, 50] > 0.01


def test_sums_of_thousands_of_nats_keep_their_digits():
    """Every match is profitable, also where lengths differ: what follows a cell weighs up to exp(2,000)."""
    rng = np.random.default_rng(4)
    weights = [7 + 0.5 * rng.normal(size=sizes) for sizes in ((280, 60), (60, 290))]
    # Just below half between powers of two: without an exponent of the sums' own, 280 such factors overflow.
    weights.append(7.26 + 0.005 * rng.normal(size=(280, 290)))
    costs = [with_offsets(Costs(), weight.shape, rng) for weight in weights]
    posteriors = compare(weights, costs, (280, 290), atol=2e-3)
    assert all(posterior.sum() > 0.9 * min(posterior.shape) for posterior in posteriors)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_by_costs_are_finite_differences_of_float64(mode):
    weights, costs = tiny_batch(5)
    given, gaps = padded(weights, PADDED), gaps_of(costs, PADDED)

    def total(gaps):
        return pair_hmm.log_partition(pair_hmm.of_all_pairs(*given), gaps, mode).sum()

    found = jax.device_get(jax.jit(jax.grad(total))(gaps))

    def difference(changed) -> float:
        """Divide the difference of the batch's sums, between costs that are higher and lower by 1e-5."""
        ends = (
            sum(oracle.log_partition(w, changed(c, sign * 1e-5), mode) for w, c in zip(weights, costs, strict=True))
            for sign in (1, -1)
        )
        return float(np.subtract(*ends) / 2e-5)

    for name, state in itertools.product(("opening", "extension"), (0, 1)):

        def changed(of, step, name=name, state=state):
            return of._replace(**{name: getattr(of, name) + step * np.eye(2)[state]})

        assert getattr(found, name)[state] == pytest.approx(difference(changed), abs=1e-4), (name, state)
    of_terminal = difference(lambda of, step: of._replace(terminal=of.terminal + step))
    assert float(found.terminal) == pytest.approx(of_terminal, abs=1e-4)
    of_empty = difference(lambda of, step: of._replace(empty=of.empty + step))
    assert float(found.empty.sum()) == pytest.approx(of_empty, abs=1e-4)
    assert (mode == "global") == (not of_terminal) == (not of_empty)
    for name, side in (("x_offset", 0), ("y_offset", 1)):
        for n, (weight, cost) in enumerate(zip(weights, costs, strict=True)):
            expected = np.zeros(PADDED[side])
            for place, unit in enumerate(np.eye(weight.shape[side])):
                ends = [
                    oracle.log_partition(weight, cost._replace(**{name: getattr(cost, name) + step * unit}), mode)
                    for step in (1e-5, -1e-5)
                ]
                expected[place] = np.subtract(*ends) / 2e-5
            np.testing.assert_allclose(getattr(found, name)[n], expected, atol=1e-4)
        assert np.abs(getattr(found, name)).max() > 1e-2


def test_the_likelihood_of_a_negative_pair_is_that_of_the_empty_alignment():
    weights, costs = tiny_batch(6)
    given, gaps = padded(weights, PADDED), gaps_of(costs, PADDED)
    target = jnp.full((len(weights), PADDED[0]), -1)
    gradient = jax.jit(
        jax.grad(lambda w: pair_hmm.negative_log_likelihood(w, target, *given[1:], gaps).sum()),
    )(given[0])
    nats = jax.jit(pair_hmm.negative_log_likelihood)(given[0], target, *given[1:], gaps)
    odds = jax.jit(lambda *of: pair_hmm.log_odds(pair_hmm.of_all_pairs(*of), gaps))(*given)
    np.testing.assert_allclose(nats, odds, atol=1e-5)
    assert (np.asarray(odds) > 0).all()
    _, of_sum, *_ = everything(*given, gaps)
    np.testing.assert_allclose(gradient, of_sum, atol=1e-6)  # nothing but the sum pushes matches down


def test_the_derivative_of_the_likelihood_is_posterior_minus_reference():
    weights, costs = tiny_batch(7)
    given, gaps = padded(weights, PADDED), gaps_of(costs, PADDED)
    target = np.full((len(weights), PADDED[0]), -1)
    target[:, 0] = 0
    target[1, 2] = 4
    gradient = jax.jit(
        jax.grad(lambda w: pair_hmm.negative_log_likelihood(w, jnp.asarray(target), *given[1:], gaps).sum())
    )(given[0])
    reference = target[:, :, None] == np.arange(PADDED[1])
    *_, posterior = everything(*given, gaps)
    np.testing.assert_allclose(gradient, posterior - reference, atol=1e-5)


def test_a_temperature_divides_all_nats():
    (weight,), temperature = [np.random.default_rng(8).normal(size=(5, 6)) * 3], 1.7
    weight[2, 3] = -np.inf
    costs = with_offsets(CHEAP, weight.shape, np.random.default_rng(9))
    cooler = Costs(*(cost / temperature for cost in costs))
    given, gaps = padded([np.maximum(weight, LOG_ZERO)], PADDED), gaps_of([costs], PADDED)

    @jax.jit
    def posterior(given, gaps, temperature):
        return pair_hmm.posterior(*pair_hmm.tempered(pair_hmm.of_all_pairs(*given), gaps, temperature))

    odds, lanes = posterior(given, gaps, jnp.asarray(temperature))
    of = oracle.forward_backward(weight / temperature, cooler)
    assert float(odds[0]) == pytest.approx(of.log_partition - oracle.log_weight_of((), weight, cooler), abs=1e-5)
    np.testing.assert_allclose(pair_hmm.unskewed(lanes, PADDED[1])[0, :5, :6], of.posterior, atol=1e-5)
    assert of.posterior[2, 3] == 0


def in_a_band(weight: np.ndarray, path: list[tuple[int, int]], lanes: int) -> tuple[Problem, np.ndarray]:
    """Problem of a band around a path, and the weights of all pairs that lie in it."""
    rows, columns = weight.shape
    diagonals = np.arange(rows + columns - 1)
    row, place = np.array([i for i, _ in path]), np.array([i + j for i, j in path])
    centre = np.floor(np.interp(diagonals, place, row) + 0.5).astype(np.int32)
    first = np.clip(centre - lanes // 2, 0, max(0, rows - lanes))
    assert set(np.diff(first).tolist()) <= {0, 1}
    i = first[:, None] + np.arange(lanes)
    j = diagonals[:, None] - i
    inside = (i < rows) & (j >= 0) & (j < columns)
    found = np.where(inside, weight[np.clip(i, 0, rows - 1), np.clip(j, 0, columns - 1)], LOG_ZERO)
    restricted = np.full(weight.shape, -np.inf)
    restricted[i[inside], j[inside]] = weight[i[inside], j[inside]]
    lengths = jnp.array([rows]), jnp.array([columns])
    return Problem(jnp.asarray(found[:, None], jnp.float32), jnp.asarray(first[:, None]), *lengths), restricted


def spread(lanes: np.ndarray, first: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Values of all pairs from those in a band."""
    i = first[:, None] + np.arange(lanes.shape[1])
    j = np.arange(len(lanes))[:, None] - i
    inside = (i < shape[0]) & (j >= 0) & (j < shape[1])
    dense = np.zeros(shape)
    dense[i[inside], j[inside]] = lanes[inside]
    assert not lanes[~inside].any()
    return dense


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lanes", [12, 25, 40])
def test_a_band_is_the_whole_problem_without_the_pairs_beside_it(lanes, mode):
    rng = np.random.default_rng(10)
    weight = rng.normal(size=(37, 48)) - 1
    weight[range(5, 30), range(16, 41)] += 4
    problem, restricted = in_a_band(weight, [(0, 0), (0, 9), (36, 45), (36, 47)], lanes)
    costs = with_offsets(Costs(), weight.shape, rng)
    gaps = gaps_of([costs], weight.shape)
    of = oracle.forward_backward(restricted, costs, mode)
    odds, posterior = jax.jit(pair_hmm.posterior, static_argnums=2)(problem, gaps, mode)
    empty = oracle.log_weight_of((), weight, costs, mode)
    assert float(odds[0]) == pytest.approx(of.log_partition - empty, abs=1e-4)
    found = spread(np.asarray(posterior)[:, 0], np.asarray(problem.first)[:, 0], weight.shape)
    np.testing.assert_allclose(found, of.posterior, atol=1e-5)
    by_derivative = jax.jit(
        jax.grad(lambda w: pair_hmm.log_partition(problem._replace(log_weight=w), gaps, mode).sum())
    )(problem.log_weight)
    np.testing.assert_allclose(by_derivative, posterior, atol=1e-5)


def test_a_long_pair_in_a_narrow_band_keeps_its_digits():
    """The weight of all is above exp(3,000), of whose logarithm float32 holds three decimals."""
    length = 1100
    weight = 6 * np.random.default_rng(11).random((length, length)) - 0.5
    problem, restricted = in_a_band(weight, [(0, 0), (length - 1, length - 1)], 33)
    of = oracle.forward_backward(restricted, Costs())
    assert of.log_partition > 3000
    _, posterior = jax.jit(pair_hmm.posterior)(problem, gaps_of([Costs()], weight.shape))
    found = spread(np.asarray(posterior)[:, 0], np.asarray(problem.first)[:, 0], weight.shape)
    np.testing.assert_allclose(found, of.posterior, atol=1e-3)


def test_padding_and_other_pairs_change_nothing():
    rng = np.random.default_rng(12)
    weights = [2 * rng.normal(size=sizes) - 1 for sizes in ((17, 23), (30, 12), (9, 33))]
    costs = [with_offsets(Costs(), weight.shape, rng) for weight in weights]
    together = everything(*padded(weights, (30, 33)), gaps_of(costs, (30, 33)))
    for n, (weight, cost) in enumerate(zip(weights, costs, strict=True)):
        rows, columns = weight.shape
        for shape in (weight.shape, (rows + 5, columns + 2)):
            alone = everything(*padded([weight], shape), gaps_of([cost], shape))
            for one, of_all in zip(alone, together, strict=True):
                np.testing.assert_allclose(
                    one[0][:rows, :columns] if one.ndim > 1 else one[0],
                    of_all[n][:rows, :columns] if one.ndim > 1 else of_all[n],
                    rtol=2e-6,
                    atol=1e-9,
                )


def test_a_batch_place_without_a_pair_is_finite():
    """Batches are filled up with pairs of length 0, whose sums must not turn derivatives into NaN."""
    weight, lengths = jnp.full((2, 5, 6), jnp.nan), (jnp.array([0, 0]), jnp.array([0, 0]))
    gaps = gaps_of([with_offsets(CHEAP, (5, 6), np.random.default_rng(0))] * 2, (5, 6))
    for mode in MODES:
        found, gradient, odds, posterior = everything(weight, *lengths, gaps, mode)
        assert not any(np.asarray(of).any() for of in (found, gradient, odds, posterior))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4)])
def test_antidiagonals_hold_each_pair_once(shape):
    rows, columns = shape
    pairs = jnp.asarray(np.random.default_rng(13).normal(size=(3, *shape)), jnp.float32)
    lanes = np.asarray(pair_hmm.skewed(pairs, -7.0))
    assert lanes.shape == (rows + columns - 1, 3, rows)
    for i, j in itertools.product(range(rows), range(columns)):
        np.testing.assert_array_equal(lanes[i + j, :, i], pairs[:, i, j])
    assert (lanes == -7).sum() == lanes.size - pairs.size
    np.testing.assert_array_equal(pair_hmm.unskewed(jnp.asarray(lanes), columns), pairs)


def test_shapes_are_checked_in_tests():
    weight, lengths = jnp.zeros((2, 5, 6)), jnp.array([5, 5])
    with pytest.raises(TypeCheckError):
        pair_hmm.of_all_pairs(weight, lengths[:1], lengths)
    with pytest.raises(TypeCheckError):
        pair_hmm.skewed(weight[0], 0.0)
