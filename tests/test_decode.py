"""alignment/decoding.py and models/pair_hmm.py against a float64 oracle, and the oracle against all alignments."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import decoding
from models import pair_hmm
from tests.support import decode_oracle as oracle


def best_accuracy(plan: np.ndarray) -> float:
    """The largest sum over monotone alignments, by trying every choice for each cell."""

    @functools.cache
    def best(i: int, j: int) -> float:
        if i == plan.shape[0] or j == plan.shape[1]:
            return 0.0
        return max(best(i + 1, j), best(i, j + 1), float(plan[i, j]) + best(i + 1, j + 1))

    return best(0, 0)


def sparse_plan(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.random((rows, columns)) ** 3 * (rng.random((rows, columns)) < 0.6)).astype(np.float32)


def test_mea_is_optimal_monotone_and_stays_inside_the_band():
    rng = np.random.default_rng(0)
    for _ in range(200):
        plan = sparse_plan(rng, *rng.integers(1, 8, 2))
        pairs, confidence = oracle.mea(plan)
        assert (np.diff(pairs, axis=0) > 0).all()
        assert (plan[pairs[:, 0], pairs[:, 1]] > 0).all()
        np.testing.assert_array_equal(confidence, plan[pairs[:, 0], pairs[:, 1]])
        assert confidence.sum() == pytest.approx(best_accuracy(plan), abs=1e-5)


def test_brute_force_oracle_by_hand():
    assert best_accuracy(np.array([[0.6, 0.5], [0.5, 0.0]])) == pytest.approx(0.6)
    assert best_accuracy(np.array([[0.4, 0.5], [0.5, 0.4]])) == pytest.approx(0.8)


def test_mea_crosses_for_no_sum_of_crossing_pairs():
    pairs, _ = oracle.mea(np.array([[0, 0.9], [0.8, 0]], np.float32))
    np.testing.assert_array_equal(pairs, [[0, 1]])


def test_a_plan_of_zeros_matches_nothing():
    pairs, confidence = oracle.mea(np.zeros((3, 4), np.float32))
    assert pairs.shape == (0, 2) and confidence.shape == (0,)


def test_many_small_values_beat_one_large_one():
    plan = np.zeros((4, 5), np.float32)
    plan[0, 4] = 0.9
    plan[range(4), range(4)] = 0.3
    np.testing.assert_array_equal(oracle.mea(plan)[0][:, 1], [0, 1, 2, 3])


def test_batch_equals_one_by_one_and_ignores_padding():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 13, (2, 9))
    plans = np.full((9, 12, 14), np.nan, np.float32)
    small = [sparse_plan(rng, rows, columns) for rows, columns in lengths.T]
    for plan, one in zip(plans, small, strict=True):
        plan[: one.shape[0], : one.shape[1]] = one
    match, confidence = oracle.mea_batch(plans, *lengths)
    for k, one in enumerate(small):
        pairs, values = oracle.mea(one)
        rows = np.flatnonzero(match[k] != decoding.NO_MATCH)
        np.testing.assert_array_equal(np.stack([rows, match[k, rows]], 1), pairs)
        np.testing.assert_array_equal(confidence[k, rows], values)
        assert np.count_nonzero(confidence[k]) == len(values)


def test_small_values_still_decide_at_the_end_of_a_long_alignment():
    """A sum of 300 swallows 5e-6 in float32: the table has to be float64."""
    plan = np.zeros((302, 302), np.float32)
    plan[range(300), range(300)] = 1
    plan[300:, 300:] = [[1e-6, 5e-6], [0, 1e-6]]
    pairs, _ = oracle.mea(plan)
    np.testing.assert_array_equal(pairs[300:], [[300, 301]])


def enumerated_posterior(plan: np.ndarray, gaps: decoding.Gaps) -> np.ndarray:
    """Shares of all alignments, each written down once: of neighbouring gaps that in y, x's residues alone, first."""
    rows, columns = plan.shape
    total, containing = 0.0, np.zeros(plan.shape)

    def opening(pairs: tuple) -> float:
        return gaps.opening if pairs else gaps.terminal

    def go(i: int, j: int, last: str, log_weight: float, pairs: tuple) -> None:
        nonlocal total
        if (i, j) == (rows, columns):
            if pairs:  # gaps behind the last match are overhangs
                overhangs = (pairs[-1][0] + 1 < rows) + (pairs[-1][1] + 1 < columns)
                log_weight += overhangs * (gaps.opening - gaps.terminal)
            total += math.exp(log_weight)
            for pair in pairs:
                containing[pair] += math.exp(log_weight)
        if i < rows and j < columns and plan[i, j]:
            matched = gaps.sharpness * math.log(plan[i, j]) + gaps.match
            go(i + 1, j + 1, "match", log_weight + matched, (*pairs, (i, j)))
        if i < rows:
            go(i + 1, j, "x", log_weight - (last != "x") * opening(pairs), pairs)
        if j < columns and last != "x":
            go(i, j + 1, "y", log_weight - (last != "y") * opening(pairs), pairs)

    go(0, 0, "", 0.0, ())
    return containing / total


def test_posterior_is_the_share_of_all_alignments():
    rng = np.random.default_rng(2)
    for _ in range(20):
        plan = sparse_plan(rng, *rng.integers(1, 6, 2))
        gaps = decoding.Gaps(*rng.uniform((0.3, -1, 0), (1.5, 4, 5)).tolist())
        expected = enumerated_posterior(plan, gaps)
        found = oracle.posterior(plan[None], np.array([plan.shape[0]]), np.array([plan.shape[1]]), gaps)[0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_posterior_of_a_batch_is_that_of_each_and_ignores_padding():
    rng = np.random.default_rng(3)
    lengths = np.array([[7, 1, 4, 0], [5, 9, 9, 3]])
    plans = np.full((4, 8, 9), np.nan, np.float32)
    small = [sparse_plan(rng, rows, columns) for rows, columns in lengths.T]
    for plan, one in zip(plans, small, strict=True):
        plan[: one.shape[0], : one.shape[1]] = one
    found = oracle.posterior(plans, *lengths)
    match, confidence = oracle.mea_batch(found, *lengths)
    for n, one in enumerate(small):
        alone = oracle.posterior(one[None], *(np.array([size]) for size in one.shape))[0]
        np.testing.assert_allclose(found[n, : one.shape[0], : one.shape[1]], alone, atol=1e-12)
        pairs, values = oracle.mea(alone)
        rows = np.flatnonzero(match[n] != decoding.NO_MATCH)
        np.testing.assert_array_equal(np.stack([rows, match[n, rows]], 1), pairs)
        np.testing.assert_allclose(confidence[n, rows], values, rtol=1e-5)
    assert not found[:, 7:].any() and not found[1, 1:].any()


def test_posterior_neither_over_nor_underflows():
    """Long sequences that hardly match, and long ones that match all along."""
    lengths = np.array([700]), np.array([600])
    noise = np.random.default_rng(4).random((1, 700, 600)) ** 30
    rows = oracle.posterior(noise, *lengths).sum(axis=2)
    assert rows.max() <= 1 + 1e-9
    alike = oracle.posterior(np.eye(700)[None, :, :600], *lengths)
    diagonal = alike[0, range(600), range(600)]
    np.testing.assert_allclose(diagonal[1:-1], 1, atol=1e-3)
    assert diagonal.min() > 0.98  # an overhang costs little


def test_affine_gaps_join_what_accuracy_alone_would_scatter():
    """Two residues of y that both resemble x's: plain MEA takes each at the larger value, across two gaps."""
    plan = np.full((6, 8), 1e-3, np.float32)
    plan[range(3), range(3)] = plan[range(3, 6), range(5, 8)] = 0.9
    plan[2, 2], plan[2, 3], plan[2, 4] = 0.4, 0.01, 0.45
    np.testing.assert_array_equal(oracle.mea(plan)[0][:, 1], [0, 1, 4, 5, 6, 7])
    plan[2, 3] = 0.46  # alone between two gaps
    np.testing.assert_array_equal(oracle.mea(plan)[0][:, 1], [0, 1, 3, 5, 6, 7])
    lengths = (np.array([size]) for size in plan.shape)
    ordered = oracle.posterior(plan[None], *lengths, decoding.Gaps(1.0, 3.3, 4.4))[0]
    np.testing.assert_array_equal(oracle.mea(ordered)[0][:, 1], [0, 1, 4, 5, 6, 7])


@pytest.mark.parametrize("bad", [{"sharpness": 0.0}, {"opening": -0.1}])
def test_gaps_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="sharpness must be above 0, opening at least 0"):
        decoding.Gaps(**bad)


@pytest.mark.parametrize("seed", range(8))
def test_windows_give_what_the_whole_plan_gives(seed):
    """Rows of unequal lengths, windows that jump, overlap or part, and run beyond the end of the plan."""
    rng = np.random.default_rng(seed)
    batch, rows, columns, width = 3, 9, 14, int(rng.integers(1, 7))
    first = np.sort(rng.integers(0, columns, (batch, rows)), axis=1)
    x_lengths, y_lengths = rng.integers(1, rows + 1, batch), rng.integers(1, columns + 1, batch)
    place = first[..., None] + np.arange(width)
    inside = (place >= 0) & (place < y_lengths[:, None, None]) & (np.arange(rows) < x_lengths[:, None])[..., None]
    held = np.where(inside, rng.random((batch, rows, width)), 0)
    whole = np.zeros((batch, rows, columns + 2 * width))
    np.put_along_axis(whole, place + width, held, axis=2)
    whole = whole[:, :, width:-width]
    windows = oracle.Windows(first, width, columns)
    expected = oracle.posterior(whole, x_lengths, y_lengths)
    found = oracle.posterior_in_windows(held, windows, x_lengths, y_lengths)
    spread = np.stack([windows.spread(i, found[:, i]) for i in range(rows)], 1)
    np.testing.assert_allclose(spread, expected, rtol=1e-9)
    for plan, dense in ((held, whole), (found, spread)):
        for one, other in zip(
            oracle.mea_in_windows(plan, windows), oracle.mea_batch(dense, x_lengths, y_lengths), strict=True
        ):
            np.testing.assert_array_equal(one, other)


USUAL = decoding.Gaps()


class Windowed(NamedTuple):
    """Plans in windows, as a model makes them."""

    plans: np.ndarray
    first: np.ndarray
    x_lengths: np.ndarray
    y_lengths: np.ndarray
    columns: int

    def part(self, n: int) -> "Windowed":
        """One pair; y is not padded, or the oracle's ties would depend on the padding."""
        one = slice(n, n + 1)
        return Windowed(self.plans[one], self.first[one], self.x_lengths[one], self.y_lengths[one], self.y_lengths[n])

    def windows(self) -> oracle.Windows:
        return oracle.Windows(self.first, self.plans.shape[2], int(self.columns))


def random_windows(seed: int, width: int, draw: Callable) -> Windowed:
    """Rows of unequal lengths, windows that jump, overlap or part, and run beyond the end of the plan."""
    rng = np.random.default_rng(seed)
    batch, rows, columns = 16, 24, 40
    x_lengths, y_lengths = rng.integers(1, rows + 1, batch), rng.integers(1, columns + 1, batch)
    first = np.sort(rng.integers(0, columns, (batch, rows)) // rng.integers(1, 4, (batch, 1)), axis=1)
    first = np.minimum(first, y_lengths[:, None] - 1).astype(np.int32)
    place = first[..., None] + np.arange(width)
    inside = (place < y_lengths[:, None, None]) & (np.arange(rows) < x_lengths[:, None])[..., None]
    return Windowed(
        np.where(inside, draw(rng, place.shape), 0).astype(np.float32), first, x_lengths, y_lengths, columns
    )


def found_posterior(of: Windowed, gaps: decoding.Gaps = USUAL) -> np.ndarray:
    return np.asarray(jax.jit(decoding.posterior, static_argnums=5)(*of[:4], gaps.numbers(), of.columns))


def exact_posterior(of: Windowed, gaps: decoding.Gaps = USUAL) -> np.ndarray:
    return oracle.posterior_in_windows(of.plans, of.windows(), of.x_lengths, of.y_lengths, gaps)


DRAWS = {
    "uniform": lambda rng, shape: rng.random(shape),
    "extreme": lambda rng, shape: rng.choice([0, 1e-30, 1e-12, 1], shape),
    "over many orders": lambda rng, shape: 10.0 ** rng.uniform(-30, 0, shape),
}


@pytest.mark.parametrize("width", [1, 5, 19, 40])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_posterior_is_that_of_the_oracle(width, draw):
    of = random_windows(width, width, draw)
    np.testing.assert_allclose(found_posterior(of), exact_posterior(of), atol=3e-5)
    gaps = decoding.Gaps(0.7, 5.2, 0.0)
    np.testing.assert_allclose(found_posterior(of, gaps), exact_posterior(of, gaps), atol=3e-5)


@pytest.mark.parametrize("width", [1, 5, 19, 40])
@pytest.mark.parametrize("levels", [2, 64])
def test_alignments_are_those_of_the_oracle_ties_included(width, levels):
    """Values are multiples of a half or of 1/64: sums are exact, and often equal."""
    of = random_windows(width, width, lambda rng, shape: rng.integers(0, levels + 1, shape) / levels)
    found = jax.device_get(jax.jit(decoding.decode, static_argnums=4)(*of))
    for n, (x_length, y_length) in enumerate(zip(of.x_lengths, of.y_lengths, strict=True)):
        part = of.part(n)
        match, confidence = oracle.mea_in_windows(part.plans, part.windows())
        np.testing.assert_array_equal(found.match[n], match[0])
        np.testing.assert_array_equal(found.confidence[n], confidence[0])
        dense = np.zeros((x_length, of.columns + width))
        np.put_along_axis(dense, of.first[n, :x_length, None] + np.arange(width), of.plans[n, :x_length], axis=1)
        x_alone, y_alone = (np.clip(1 - dense.sum(axis), 0, 1) for axis in (1, 0))
        np.testing.assert_allclose(found.x_alone[n, :x_length], x_alone, atol=1e-6)
        np.testing.assert_allclose(found.y_alone[n, :y_length], y_alone[:y_length], atol=1e-6)
        assert not found.x_alone[n, x_length:].any() and not found.y_alone[n, y_length:].any()


def whole(plan: np.ndarray) -> Windowed:
    """One dense plan, as windows that hold all columns."""
    rows, columns = plan.shape
    return Windowed(plan[None], np.zeros((1, rows), np.int32), np.array([rows]), np.array([columns]), columns)


def decoded_match(of: Windowed) -> np.ndarray:
    return np.asarray(jax.jit(decoding.mea)(of.plans, of.first, of.y_lengths))[0]


@pytest.mark.parametrize(("copy", "match"), [(100, 5.2), (14, 8.0)], ids=["far apart", "in one block of columns"])
def test_a_domain_that_occurs_twice_is_matched_with_either(copy, match):
    """Prefixes that match the first copy weigh exp(500) or exp(100) times those that will match the second."""
    rest = 20
    plan = np.full((2 * copy + rest, copy + rest), 1e-4, np.float32)
    for start in (0, copy):
        plan[range(start, start + copy), range(copy)] = 1
    plan[range(2 * copy, 2 * copy + rest), range(copy, copy + rest)] = 1
    of, gaps = whole(plan), decoding.Gaps(1.0, match, 4.4)
    posterior = found_posterior(of, gaps)
    np.testing.assert_allclose(posterior, exact_posterior(of, gaps), atol=5e-4)
    middle = copy // 2
    # The second copy leaves its gap at the end of x, which costs less.
    assert 0.1 < posterior[0, middle, middle] < posterior[0, copy + middle, middle] < 0.9


def test_small_values_decide_at_the_end_of_a_long_alignment_on_a_device_too():
    """A sum of 300 swallows 5e-6 in float32: the table has to hold integers."""
    plan = np.zeros((302, 302), np.float32)
    plan[range(300), range(300)] = 1
    plan[300:, 300:] = [[1e-6, 5e-6], [0, 1e-6]]
    np.testing.assert_array_equal(decoded_match(whole(plan))[298:], [298, 299, 301, decoding.NO_MATCH])


def test_a_long_pair_keeps_its_digits():
    """4,000 residues in a band of 33: the weight of all is exp(15,000), of which float32 holds no decimal."""
    rng, length, width = np.random.default_rng(6), 4000, 33
    first = np.clip(np.arange(length) - width // 2, 0, length - width)[None].astype(np.int32)
    plans = (rng.random((1, length, width)) ** 8).astype(np.float32)
    of = Windowed(plans, first, np.array([length]), np.array([length]), length)
    expected = exact_posterior(of)
    found = found_posterior(of)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    match, _ = oracle.mea_in_windows(expected, of.windows())
    assert (np.asarray(jax.jit(decoding.mea)(found, first, of.y_lengths)) == match).mean() > 0.995


def test_windows_of_padding_and_beyond_y_are_moved_to_where_they_may_lie():
    first = jnp.array([[0, 3, 7, 9, 0, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(pair_hmm.rising(first, jnp.array([6, 0])), [[0, 3, 5, 5, 5, 5], [0] * 6])


def test_decoding_lowers_for_a_gpu_and_holds_nothing_of_the_size_of_both_lengths():
    length, width = 4096, 129

    def whole(plans, first, lengths, gaps):
        posterior = decoding.posterior(plans, first, lengths, lengths, gaps, length)
        return decoding.decode(posterior, first, lengths, lengths, length)

    shapes = ((1, length, width), jnp.float32), ((1, length), jnp.int32), ((1,), jnp.int32), ((3,), jnp.float32)
    given = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    text = jax.jit(whole).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    sizes = [math.prod(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)]
    assert max(sizes) <= 2 * (length + 1) * (width + 2)
