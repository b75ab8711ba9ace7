import functools

import numpy as np
import pytest

from models import decode


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
        pairs, confidence = decode.mea(plan)
        assert (np.diff(pairs, axis=0) > 0).all()
        assert (plan[pairs[:, 0], pairs[:, 1]] > 0).all()
        np.testing.assert_array_equal(confidence, plan[pairs[:, 0], pairs[:, 1]])
        assert confidence.sum() == pytest.approx(best_accuracy(plan), abs=1e-5)


def test_brute_force_oracle_by_hand():
    assert best_accuracy(np.array([[0.6, 0.5], [0.5, 0.0]])) == pytest.approx(0.6)
    assert best_accuracy(np.array([[0.4, 0.5], [0.5, 0.4]])) == pytest.approx(0.8)


def test_mea_crosses_for_no_sum_of_crossing_pairs():
    pairs, _ = decode.mea(np.array([[0, 0.9], [0.8, 0]], np.float32))
    np.testing.assert_array_equal(pairs, [[0, 1]])


def test_a_plan_of_zeros_matches_nothing():
    pairs, confidence = decode.mea(np.zeros((3, 4), np.float32))
    assert pairs.shape == (0, 2) and confidence.shape == (0,)


def test_many_small_values_beat_one_large_one():
    plan = np.zeros((4, 5), np.float32)
    plan[0, 4] = 0.9
    plan[range(4), range(4)] = 0.3
    np.testing.assert_array_equal(decode.mea(plan)[0][:, 1], [0, 1, 2, 3])


def test_batch_equals_one_by_one_and_ignores_padding():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 13, (2, 9))
    plans = np.full((9, 12, 14), np.nan, np.float32)
    small = [sparse_plan(rng, rows, columns) for rows, columns in lengths.T]
    for plan, one in zip(plans, small, strict=True):
        plan[: one.shape[0], : one.shape[1]] = one
    match, confidence = decode.mea_batch(plans, *lengths)
    for k, one in enumerate(small):
        pairs, values = decode.mea(one)
        rows = np.flatnonzero(match[k] != decode.NO_MATCH)
        np.testing.assert_array_equal(np.stack([rows, match[k, rows]], 1), pairs)
        np.testing.assert_array_equal(confidence[k, rows], values)
        assert np.count_nonzero(confidence[k]) == len(values)


def test_small_values_still_decide_at_the_end_of_a_long_alignment():
    """A sum of 300 swallows 5e-6 in float32: the table has to be float64."""
    plan = np.zeros((302, 302), np.float32)
    plan[range(300), range(300)] = 1
    plan[300:, 300:] = [[1e-6, 5e-6], [0, 1e-6]]
    pairs, _ = decode.mea(plan)
    np.testing.assert_array_equal(pairs[300:], [[300, 301]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_a_value_that_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        decode.mea(np.array([[0.5, bad]], np.float32))


def test_lengths_beyond_the_padding_are_refused():
    with pytest.raises(ValueError, match=r"y_lengths: 4\.\.4 were given, the plan allows 0\.\.3"):
        decode.mea_batch(np.zeros((1, 2, 3), np.float32), np.array([2]), np.array([4]))
