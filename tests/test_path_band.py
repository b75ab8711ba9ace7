"""models/path_band.py: the band finds the best path wherever it leads, and is the dense problem around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoding, pair_aligner, pair_hmm, path_band
from models.pair_hmm import Gaps, Problem
from models.path_band import Sides

MATCH, RELAXATION = jnp.array(-0.1), 0.5


def gaps_of(sides: Sides) -> Gaps:
    empty = jnp.full(len(sides.q), 6.0)
    return Gaps(jnp.array([4.0, 6.5]), jnp.array([0.5, 0.05]), jnp.array(3.0), empty)


def sides_of(lengths: list[tuple[int, int]], shape: tuple[int, int], copies, channels: int = 6, seed: int = 0) -> Sides:
    """Random vectors; each (start in x, start in y, length) of `copies` is alike in both sequences."""
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(len(lengths), n, channels)) for n in shape)
    for n, of_pair in enumerate(copies):
        for i, j, length in of_pair:
            k[n, j : j + length] = 1.6 * q[n, i : i + length]
    of_sides = (jnp.asarray([pair[side] for pair in lengths]) for side in (0, 1))
    return Sides(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), *of_sides)


def dense(sides: Sides) -> Problem:
    """The problem of all pairs, as the aligner makes it."""
    scores = jnp.einsum("bip,bjp->bij", sides.q, sides.k, precision="highest")
    f, g = (
        pair_aligner._half_step(scores, axis, lengths) for axis, lengths in ((2, sides.y_lengths), (1, sides.x_lengths))
    )
    return pair_hmm.of_all_pairs(scores + f + g + MATCH, sides.x_lengths, sides.y_lengths)


@functools.partial(jax.jit, static_argnames="lanes")
def align(sides: Sides, lanes: int | None):
    """Problem, log-odds, posterior and alignment in a band, or of all pairs."""
    problem = dense(sides) if lanes is None else path_band.problem(sides, gaps_of(sides), MATCH, RELAXATION, lanes)
    odds, posterior = pair_hmm.posterior(problem, gaps_of(sides))
    shape = sides.q.shape[1], sides.k.shape[1]
    found = decoding.decode(posterior, problem.first, sides.x_lengths, sides.y_lengths, shape, 0.15)
    return problem, odds, posterior, found


@pytest.fixture(scope="module")
def small() -> Sides:
    lengths = [(190, 250), (200, 255), (150, 40), (9, 260), (1, 1)]
    copies = [[(50, 100, 100)], [(0, 0, 60), (80, 150, 90)], [(90, 2, 35)], [(1, 200, 8)], []]
    return sides_of(lengths, (200, 260), copies)


def test_the_band_aligns_as_all_pairs_do(small):
    _, odds, _, found = align(small, 64)
    _, of_all, _, expected = align(small, None)
    np.testing.assert_allclose(odds[:3], of_all[:3], rtol=2e-3, atol=0.05)
    for n in range(3):
        aligned = np.asarray(expected.match[n]) >= 0
        assert aligned.sum() > 30
        assert (np.asarray(found.match[n]) == np.asarray(expected.match[n]))[aligned].mean() > 0.98
    assert np.isfinite(odds).all()


def test_each_lane_holds_the_weight_of_its_pair(small):
    problem, *_ = align(small, 64)
    weights, first = np.asarray(problem.log_weight), np.asarray(problem.first)
    expected = np.asarray(pair_hmm.unskewed(dense(small).log_weight, small.k.shape[1]))
    assert set(np.diff(first, axis=0).ravel().tolist()) <= {0, 1} and (first >= 0).all()
    diagonals, batch, lanes = weights.shape
    assert diagonals == sum(small.q.shape[1:2] + small.k.shape[1:2]) - 1
    seen = 0
    for n in range(batch):
        rows, columns = int(small.x_lengths[n]), int(small.y_lengths[n])
        i = first[:, n, None] + np.arange(lanes)
        j = np.arange(diagonals)[:, None] - i
        inside = (i < rows) & (j >= 0) & (j < columns)
        np.testing.assert_allclose(weights[:, n][inside], expected[n][i[inside], j[inside]], rtol=1e-4, atol=1e-4)
        assert (weights[:, n][~inside] == pair_hmm.LOG_ZERO).all()
        seen += inside.sum()
    assert seen > 20_000


def test_potentials_are_those_of_the_dense_half_step(small):
    f, g = jax.jit(path_band.half_step, static_argnums=1)(small, RELAXATION)
    scores = jnp.einsum("bip,bjp->bij", small.q, small.k, precision="highest")
    expected = pair_aligner._half_step(scores, 2, small.y_lengths)[:, :, 0]
    inside = np.arange(200) < np.asarray(small.x_lengths)[:, None]
    np.testing.assert_allclose(np.asarray(f)[inside], np.asarray(expected)[inside], atol=1e-4)
    expected = pair_aligner._half_step(scores, 1, small.x_lengths)[:, 0]
    inside = np.arange(260) < np.asarray(small.y_lengths)[:, None]
    np.testing.assert_allclose(np.asarray(g)[inside], np.asarray(expected)[inside], atol=1e-4)
    assert not np.asarray(g)[~inside].any()


@pytest.mark.parametrize(
    ("lengths", "copies"),
    [
        ((1500, 1400), [(60, 700, 600)]),  # 640 columns right of the diagonal
        ((1300, 1500), [(700, 40, 400)]),  # 660 left of it
        ((1450, 1500), [(0, 0, 250), (300, 900, 500)]),  # a gap of 550 between two parts
    ],
    ids=["right", "left", "long gap"],
)
def test_an_alignment_far_off_the_diagonal_is_found(lengths, copies):
    """Sequences of more than 1,024 residues, which users get aligned in such a band."""
    shape = 1500, 1500
    _, _, posterior, found = align(sides_of([lengths], shape, [copies], seed=1), 256)
    match = np.asarray(found.match[0])
    for i, j, length in copies:
        assert (match[i + 5 : i + length - 5] == np.arange(j + 5, j + length - 5)).all(), (i, j)
    assert float(posterior.max()) > 0.95


def test_a_band_as_wide_as_the_shorter_side_is_the_whole_problem():
    """Lanes are rows: none is left out, and no lane is beyond them on another antidiagonal."""
    sides = sides_of([(60, 200), (45, 180)], (60, 200), [[(5, 120, 50)], [(0, 30, 40)]], seed=2)
    problem, odds, posterior, found = align(sides, 64)
    assert not np.asarray(problem.first).any()
    _, of_all, expected, of_all_found = align(sides, None)
    np.testing.assert_allclose(odds, of_all, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(posterior[:, :, :60], expected, atol=1e-3)
    np.testing.assert_array_equal(found.match, of_all_found.match)


def test_other_pairs_of_the_batch_change_nothing(small):
    *_, together = align(small, 64)
    one = jax.tree.map(lambda of: of[1:2], small)
    *_, alone = align(one, 64)
    np.testing.assert_array_equal(alone.match[0], together.match[1])
    np.testing.assert_allclose(alone.confidence[0], together.confidence[1], atol=1e-5)


def test_memory_of_long_pairs_grows_with_the_sum_of_their_lengths():
    """Nothing is run, XLA analyses: all pairs of 10,000 residues would take 400 MB for one number each."""

    def needed(length: int) -> int:
        vectors, lengths = jax.ShapeDtypeStruct((1, length, 87), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        given = Sides(vectors, vectors, lengths, lengths)
        analysis = align.lower(given, 256).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    long, half = needed(10_000), needed(5_000)
    assert long < 250e6, f"{long:,} bytes"
    assert long < 2.4 * half, f"{long:,} bytes for 10,000 residues, {half:,} for 5,000"


def test_blocks_are_the_same_however_many_rows_are_summed_at_a_time(small, monkeypatch):
    """Blocks of long sequences have more rows than are computed at once."""
    found = []
    for rows in (64, 4):
        monkeypatch.setattr(path_band, "_ROWS", rows)
        found.append(jax.jit(lambda sides: path_band.best_blocks(sides, gaps_of(sides)).match)(small))
    assert (np.asarray(found[0]) >= 0).sum() > 10
    np.testing.assert_array_equal(*found)
