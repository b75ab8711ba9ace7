"""models/decoding.py against a plain table of the best alignments."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoding, pair_hmm
from models.decoding import NO_MATCH

decoded = jax.jit(decoding.decode, static_argnames="shape")


def best_accuracy(values: np.ndarray, threshold: float, inside: np.ndarray | None = None) -> float:
    """Largest sum over monotone alignments of values less the threshold, from a table row by row.

    Cells that are not `inside` are 0: paths do not leave the band.
    """
    rows, columns = values.shape
    table = np.zeros((rows + 1, columns + 1))
    for i, j in itertools.product(range(rows), range(columns)):
        if inside is not None and not inside[i, j]:
            continue
        table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], table[i, j] + values[i, j] - threshold)
    return table[rows, columns]


def padded(values: list[np.ndarray], shape: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Values of a batch by antidiagonals, and lengths."""
    batch = np.zeros((len(values), *shape), np.float32)
    for of, one in zip(batch, values, strict=True):
        of[: one.shape[0], : one.shape[1]] = one
    lengths = (jnp.asarray([one.shape[side] for one in values]) for side in (0, 1))
    return pair_hmm.skewed(jnp.asarray(batch), 0.0), *lengths


def decode(values: list[np.ndarray], shape: tuple[int, int], threshold: np.ndarray | float = 0.0) -> decoding.Decoded:
    lanes, *lengths = padded(values, shape)
    thresholds = np.atleast_1d(np.float32(threshold))
    return jax.device_get(decoded(lanes, None, *lengths, shape=shape, threshold=thresholds))


def check(found: decoding.Decoded, values: list[np.ndarray], threshold: float, inside=None) -> None:
    """Compare a batch with the table, and demand that nothing is said beyond the lengths.

    Where cells are not `inside` a band, an alignment may be as good as without the band.
    """
    for n, one in enumerate(values):
        rows, columns = one.shape
        pairs = [(i, int(j)) for i, j in enumerate(found.match[n]) if j != NO_MATCH]
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs)), pairs
        assert all(i < rows and 0 <= j < columns for i, j in pairs)
        confidence = [one[pair] for pair in pairs]
        assert all(value > threshold for value in confidence)
        accuracy, most = sum(confidence) - threshold * len(pairs), best_accuracy(one, threshold)
        least = most if inside is None else best_accuracy(one, threshold, inside[n])
        assert least - 1e-5 <= accuracy <= most + 1e-5
        expected = np.zeros(found.confidence.shape[1], np.float32)
        for pair in pairs:
            expected[pair[0]] = one[pair]
        np.testing.assert_array_equal(found.confidence[n], expected)
        for alone, mass in ((found.x_alone[n], one.sum(1)), (found.y_alone[n], one.sum(0))):
            np.testing.assert_allclose(alone[: len(mass)], np.clip(1 - mass, 0, 1), atol=1e-5)
            assert not alone[len(mass) :].any()


def random_values(seed: int, count: int, shape: tuple[int, int], levels: int | None = None) -> list[np.ndarray]:
    """Values of pairs of random lengths, also of whole and of single ones; with ties if they are on few levels."""
    rng = np.random.default_rng(seed)
    sizes = [shape, (1, 1), (1, shape[1]), (shape[0], 1), *rng.integers(1, np.add(shape, 1), (count - 4, 2)).tolist()]
    if levels:
        return [(rng.integers(0, levels + 1, size) / levels).astype(np.float32) for size in sizes]
    return [(rng.random(size) ** 3 * (rng.random(size) < 0.7)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("levels", [None, 2])
def test_the_accuracy_is_the_largest_that_there_is(threshold, levels):
    values = random_values(0, 40, (9, 12), levels)
    check(decode(values, (9, 12), threshold), values, threshold)
    values = random_values(1, 12, (12, 9), levels)
    check(decode(values, (12, 9), threshold), values, threshold)


def test_each_pair_has_a_threshold_of_its_own():
    values, thresholds = random_values(5, 8, (9, 12)), np.linspace(0, 0.7, 8, dtype=np.float32)
    together = decode(values, (9, 12), thresholds)
    for n, threshold in enumerate(thresholds):
        alone = decode(values, (9, 12), threshold)
        np.testing.assert_array_equal(together.match[n], alone.match[n])
        np.testing.assert_array_equal(together.confidence[n], alone.confidence[n])
    assert (together.match != decode(values, (9, 12), 0.0).match).any()


def posteriors(seed: int, count: int, shape: tuple[int, int]) -> list[np.ndarray]:
    """Return the posteriors of random alignments near a diagonal, some sharp, some vague; sums are at most 1."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, np.add(shape, 1), (count, 2)).tolist()
    found = []
    for rows, columns in sizes:
        distance = np.arange(rows)[:, None] - np.arange(columns) - rng.integers(-1, 2)
        weight = np.exp(-np.abs(distance) * rng.uniform(0.2, 3)) * rng.random((rows, columns))
        found.append((weight / max(weight.sum(0).max(), weight.sum(1).max()) * rng.uniform(0.3, 1)).astype(np.float32))
    return found


def test_the_best_threshold_has_the_largest_expected_f1(monkeypatch):
    """Try all thresholds of a fine grid; the F1 that is estimated from rows alone may be a little too high."""
    monkeypatch.setattr(decoding, "LEAST_THRESHOLD", 0.0)
    shape = 9, 12
    values = posteriors(6, 30, shape)

    def expected_f1(found: decoding.Decoded) -> np.ndarray:
        count = (found.match != NO_MATCH).sum(1) + [one.sum() for one in values]
        return 2 * found.confidence.sum(1) / count

    best = np.max([expected_f1(decode(values, shape, t)) for t in np.linspace(0, 0.6, 61, dtype=np.float32)], axis=0)
    threshold = decoding.best_threshold(padded(values, shape)[0], None, shape[0])
    f1 = expected_f1(decode(values, shape, threshold))
    assert best.min() < 0.3 and best.max() > 0.7
    np.testing.assert_allclose(f1, best, atol=0.01)
    assert (expected_f1(decode(values, shape, 0.15)) < best - 0.01).any()


def test_no_threshold_is_below_the_least_one():
    vague = [np.full((4, 5), 0.05, np.float32), np.eye(4, 5, dtype=np.float32)]
    np.testing.assert_allclose(
        decoding.best_threshold(padded(vague, (4, 5))[0], None, 4), [decoding.LEAST_THRESHOLD, 0.5], rtol=1e-6
    )


def test_values_at_the_threshold_are_no_matches():
    (found,) = decode([np.full((3, 3), 0.25, np.float32)], (3, 3), 0.25).match
    assert found.tolist() == [NO_MATCH] * 3
    (found,) = decode([np.full((3, 3), 0.25, np.float32)], (3, 3), 0.125).match
    assert found.tolist() == [0, 1, 2]


def test_nothing_is_matched_where_nothing_is_likely():
    found = decode([np.zeros((4, 5), np.float32), np.zeros((1, 1), np.float32)], (4, 5))
    assert (found.match == NO_MATCH).all() and not found.confidence.any()
    assert found.x_alone.tolist() == [[1] * 4, [1, 0, 0, 0]] and found.y_alone.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]


def test_one_residue_with_one():
    for value, match in ((0.9, 0), (0.1, NO_MATCH)):
        found = decode([np.array([[value]], np.float32)], (1, 1), 0.15)
        assert found.match.tolist() == [[match]]
        assert float(found.x_alone[0, 0]) == pytest.approx(1 - value)


def test_many_small_values_beat_one_large_one():
    values = np.zeros((4, 5), np.float32)
    values[0, 4] = 0.9
    values[range(4), range(4)] = 0.3
    assert decode([values], (4, 5)).match[0].tolist() == [0, 1, 2, 3]
    assert decode([values], (4, 5), 0.2).match[0].tolist() == [4, -1, -1, -1]


def test_a_place_of_a_batch_without_a_pair_is_empty():
    found = jax.device_get(decoded(jnp.zeros((8, 2, 4)), None, jnp.array([0, 0]), jnp.array([0, 0]), shape=(4, 5)))
    assert (found.match == NO_MATCH).all()
    assert not any(of.any() for of in found[1:])


@pytest.mark.parametrize("lanes", [4, 9, 14])
def test_a_band_decodes_as_all_pairs_that_are_0_beside_it(lanes):
    """The band leaves the straight diagonal; pairs of two lengths share a batch."""
    shape, threshold = (14, 18), 0.15
    values = random_values(2, 6, shape)
    diagonals = np.arange(sum(shape) - 1)
    first, held, inside_band, cells = [], [], [], []
    for one in values:
        rows, columns = one.shape
        bend, end = min(6, columns - 1), (rows - 1, columns - 1)
        centre = np.floor(np.interp(diagonals, [0, bend, sum(end)], [0, 0, end[0]]) + 0.5).astype(int)
        start = np.clip(centre - lanes // 2, 0, max(0, rows - lanes))
        i = start[:, None] + np.arange(lanes)
        j = diagonals[:, None] - i
        inside = (i < rows) & (j >= 0) & (j < columns)
        held.append(np.where(inside, one[np.clip(i, 0, rows - 1), np.clip(j, 0, columns - 1)], 0))
        restricted = np.zeros_like(one)
        restricted[i[inside], j[inside]] = one[i[inside], j[inside]]
        inside_band.append(restricted)
        cells.append(np.zeros(one.shape, bool))
        cells[-1][i[inside], j[inside]] = True
        first.append(start)
    lengths = (jnp.asarray([one.shape[side] for one in values]) for side in (0, 1))
    found = decoded(
        jnp.asarray(np.stack(held, 1), jnp.float32),
        jnp.asarray(np.stack(first, 1)),
        *lengths,
        shape=shape,
        threshold=np.float32([threshold]),
    )
    check(jax.device_get(found), inside_band, threshold, cells)
    np.testing.assert_allclose(
        decoding.best_threshold(jnp.asarray(np.stack(held, 1), jnp.float32), jnp.asarray(np.stack(first, 1)), shape[0]),
        decoding.best_threshold(padded(inside_band, shape)[0], None, shape[0]),
        rtol=1e-5,
    )


def test_a_band_is_decoded_on_a_gpu_too_and_holds_nothing_of_the_size_of_both_lengths():
    """Compare the shapes of the lowered program."""
    length, lanes = 4096, 128
    program = jax.jit(functools.partial(decoding.decode, shape=(length, length), threshold=0.15))
    shapes = ((2 * length - 1, 1, lanes), jnp.float32), ((2 * length - 1, 1), jnp.int32), ((1,), jnp.int32)
    values, first, lengths = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    text = program.trace(values, first, lengths, lengths).lower(lowering_platforms=("cuda",)).as_text()
    sizes = [math.prod(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)]
    assert 2 * length * lanes * 0.9 < max(sizes) <= 4 * 2 * length * lanes  # indices have up to three columns


def test_large_sums_of_a_band_are_made_small_and_differ_as_before():
    best, small = jnp.array([[4000.0, 3999.25, 0.0, 3998.5]]), jnp.array([[7.5, 7.0, 0.0, 6.0]])
    kept, before = decoding._kept_small(best, best - 0.5)
    np.testing.assert_array_equal(kept, [[4000 - 16, 3999.25 - 16, 0, 3998.5 - 16]])
    np.testing.assert_array_equal(before, [[3999.5 - 16, 3998.75 - 16, 0, 3998 - 16]])
    for of in decoding._kept_small(small, small):
        np.testing.assert_array_equal(of, small)
