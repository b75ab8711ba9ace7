import functools
import math

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


def enumerated_posterior(plan: np.ndarray, gaps: decode.Gaps) -> np.ndarray:
    """Shares of all alignments, each written down once: of neighbouring gaps that in y, x's residues alone, first."""
    rows, columns = plan.shape
    total, containing = 0.0, np.zeros(plan.shape)

    def go(i: int, j: int, last: str, log_weight: float, pairs: tuple) -> None:
        nonlocal total
        if (i, j) == (rows, columns):
            total += math.exp(log_weight)
            for pair in pairs:
                containing[pair] += math.exp(log_weight)
        if i < rows and j < columns and plan[i, j]:
            matched = gaps.sharpness * math.log(plan[i, j]) + gaps.match
            go(i + 1, j + 1, "match", log_weight + matched, (*pairs, (i, j)))
        if i < rows:
            go(i + 1, j, "x", log_weight - (last != "x") * gaps.opening, pairs)
        if j < columns and last != "x":
            go(i, j + 1, "y", log_weight - (last != "y") * gaps.opening, pairs)

    go(0, 0, "", 0.0, ())
    return containing / total


def test_posterior_is_the_share_of_all_alignments():
    rng = np.random.default_rng(2)
    for _ in range(20):
        plan = sparse_plan(rng, *rng.integers(1, 6, 2))
        gaps = decode.Gaps(*rng.uniform((0.3, -1, 0), (1.5, 4, 5)).tolist())
        expected = enumerated_posterior(plan, gaps)
        found = decode.posterior(plan[None], np.array([plan.shape[0]]), np.array([plan.shape[1]]), gaps)[0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_posterior_of_a_batch_is_that_of_each_and_ignores_padding():
    rng = np.random.default_rng(3)
    lengths = np.array([[7, 1, 4, 0], [5, 9, 9, 3]])
    plans = np.full((4, 8, 9), np.nan, np.float32)
    small = [sparse_plan(rng, rows, columns) for rows, columns in lengths.T]
    for plan, one in zip(plans, small, strict=True):
        plan[: one.shape[0], : one.shape[1]] = one
    found = decode.posterior(plans, *lengths)
    match, confidence = decode.mea_batch(found, *lengths)
    for n, one in enumerate(small):
        alone = decode.posterior(one[None], *(np.array([size]) for size in one.shape))[0]
        np.testing.assert_allclose(found[n, : one.shape[0], : one.shape[1]], alone, atol=1e-12)
        pairs, values = decode.mea(alone)
        rows = np.flatnonzero(match[n] != decode.NO_MATCH)
        np.testing.assert_array_equal(np.stack([rows, match[n, rows]], 1), pairs)
        np.testing.assert_allclose(confidence[n, rows], values, rtol=1e-5)
    assert not found[:, 7:].any() and not found[1, 1:].any()


def test_posterior_neither_over_nor_underflows():
    """Of long sequences of which hardly anything matches, and of long ones that match all along."""
    lengths = np.array([700]), np.array([600])
    noise = np.random.default_rng(4).random((1, 700, 600)) ** 30
    rows = decode.posterior(noise, *lengths).sum(axis=2)
    assert rows.max() <= 1 + 1e-9
    alike = decode.posterior(np.eye(700)[None, :, :600], *lengths)
    np.testing.assert_allclose(alike[0, range(600), range(600)], 1, atol=1e-3)


def test_affine_gaps_join_what_accuracy_alone_would_scatter():
    """Two residues of y that both resemble x's: plain MEA takes each at the larger value, across two gaps."""
    plan = np.full((6, 8), 1e-3, np.float32)
    plan[range(3), range(3)] = plan[range(3, 6), range(5, 8)] = 0.9
    plan[2, 2], plan[2, 3], plan[2, 4] = 0.4, 0.01, 0.45
    np.testing.assert_array_equal(decode.mea(plan)[0][:, 1], [0, 1, 4, 5, 6, 7])
    plan[2, 3] = 0.46  # alone between two gaps
    np.testing.assert_array_equal(decode.mea(plan)[0][:, 1], [0, 1, 3, 5, 6, 7])
    lengths = (np.array([size]) for size in plan.shape)
    ordered = decode.posterior(plan[None], *lengths, decode.Gaps(1.0, 3.3, 4.4))[0]
    np.testing.assert_array_equal(decode.mea(ordered)[0][:, 1], [0, 1, 4, 5, 6, 7])


@pytest.mark.parametrize("bad", [{"sharpness": 0.0}, {"opening": -0.1}])
def test_gaps_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="sharpness must be above 0, opening at least 0"):
        decode.Gaps(**bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_a_value_that_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        decode.mea(np.array([[0.5, bad]], np.float32))


def test_lengths_beyond_the_padding_are_refused():
    with pytest.raises(ValueError, match=r"y_lengths: 4\.\.4 were given, the plan allows 0\.\.3"):
        decode.mea_batch(np.zeros((1, 2, 3), np.float32), np.array([2]), np.array([4]))


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
    windows = decode.Windows(first, width, columns)
    expected = decode.posterior(whole, x_lengths, y_lengths)
    found = decode.posterior_in_windows(held, windows, x_lengths, y_lengths)
    spread = np.stack([windows.spread(i, found[:, i]) for i in range(rows)], 1)
    np.testing.assert_allclose(spread, expected, rtol=1e-9)
    for plan, dense in ((held, whole), (found, spread)):
        for one, other in zip(
            decode.mea_in_windows(plan, windows), decode.mea_batch(dense, x_lengths, y_lengths), strict=True
        ):
            np.testing.assert_array_equal(one, other)
