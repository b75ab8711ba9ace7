"""ot_attention/support.py: the band's integers are exact, against Python's integers, up to 2^24 residues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Literal

from ot_attention import support
from ot_attention.backends import xla

LONGEST = support.LONGEST_BANDED
SEAMS = (1, 2, 3, 46_276, 46_277, 65_535, 65_536, 65_537, 2**20 + 1, LONGEST - 1, LONGEST)
LENGTHS = np.array([(n_q, n_k) for n_q in SEAMS for n_k in SEAMS], np.int32)
EDGE, RANDOM = 40, 60  # places at either end of each sequence, and between them


def places(lengths, seed: int = 0) -> np.ndarray:
    """Return `[N, places]` at the beginning, around the end and anywhere in sequences."""
    lengths, edge = np.asarray(lengths, np.int64)[:, None], np.arange(EDGE)[None]
    between = np.random.default_rng(seed).integers(0, lengths, (len(lengths), RANDOM))
    return np.concatenate([edge - 2 + 0 * lengths, lengths + 10 - edge, between], 1).astype(np.int32)


def windows(i: int, n_q: int, n_k: int, band: int | None) -> tuple[int, int]:
    """Return the first and last j with `|(2 j + 1) n_q - (2 i + 1) n_k| <= 2 n_q W`, from Python's integers."""
    if not 0 <= i < n_q:
        return 0, -1
    if band is None:
        return 0, n_k - 1
    # j >= c - W and j <= c + W, where c = ((2 i + 1) n_k - n_q) / (2 n_q)
    doubled = (2 * i + 1) * n_k - n_q
    return max(0, -(-doubled // (2 * n_q)) - band), min(n_k - 1, doubled // (2 * n_q) + band)


def row_stop(column: int, n_q: int, n_k: int) -> int:
    """Return the number of rows with c(i) <= column."""
    # (2 i + 1) n_k <= (2 column + 1) n_q
    return 0 if column < 0 else min(n_q, ((2 * column + 1) * n_q // n_k + 1) // 2)


def row_start(column: int, n_q: int, n_k: int) -> int:
    """Return the number of rows with c(i) < column."""
    return 0 if column < 0 else min(n_q, (((2 * column + 1) * n_q - 1) // n_k + 1) // 2)


BANDS = [0, 1, 64, 40_001, 2**31 - 1, None]


@pytest.mark.parametrize("band", BANDS)
def test_windows_of_rows_are_exact_for_any_lengths(band):
    n_q, n_k = LENGTHS.T
    rows = places(n_q)
    found = jax.device_get(jax.jit(support.row_windows, static_argnums=3)(rows, n_q, n_k, band))
    for n, lengths in enumerate(LENGTHS.tolist()):
        expected = [windows(i, *lengths, band) for i in rows[n].tolist()]
        np.testing.assert_array_equal(np.stack([x[n] for x in found], 1), expected, err_msg=f"{lengths}")


@pytest.mark.parametrize("band", BANDS)
def test_windows_of_columns_are_exact_for_any_lengths(band):
    n_q, n_k = LENGTHS.T
    columns = places(n_k)
    found = jax.device_get(jax.jit(support.column_windows, static_argnums=3)(columns, n_q, n_k, band))

    def expected(j: int, n_q: int, n_k: int) -> tuple[int, int]:
        if not 0 <= j < n_k:
            return 0, -1
        if band is None:
            return 0, n_q - 1
        return row_start(j - band, n_q, n_k), row_stop(j + band, n_q, n_k) - 1

    for n, lengths in enumerate(LENGTHS.tolist()):
        of_pair = [expected(j, *lengths) for j in columns[n].tolist()]
        np.testing.assert_array_equal(np.stack([x[n] for x in found], 1), of_pair, err_msg=f"{lengths}")


def test_rows_and_columns_tell_the_same_cells():
    """A cell is in its row's window if and only if it is in its column's: at both edges of a band and beside them."""
    n_q, n_k = LENGTHS.T

    @functools.partial(jax.jit, static_argnums=3)
    def both(rows, n_q, n_k, band):
        first, last = support.row_windows(rows, n_q, n_k, band)
        columns = jnp.concatenate([first - 1, first, last, last + 1], 1)
        of_row = (jnp.tile(first, 4) <= columns) & (columns <= jnp.tile(last, 4))
        first, last = support.column_windows(columns, n_q, n_k, band)
        row = jnp.tile(rows, 4)
        return of_row, (first <= row) & (row <= last)

    for band in (0, 3, 1000):
        of_row, of_column = jax.device_get(both(places(n_q), n_q, n_k, band))
        assert of_row.any() and not of_row.all()
        np.testing.assert_array_equal(of_row, of_column)


def test_blocks_begin_at_the_row_that_their_position_demands():
    blocks = np.arange(-(-LONGEST // 128) + 1, dtype=np.int32) * 128
    rng = np.random.default_rng(0)
    for n_q, n_k in LENGTHS.tolist():
        longer = max(n_q, n_k)
        number = -(-longer // 128)
        edges = np.concatenate([np.arange(min(number, 20) + 1), number - np.arange(min(number, 20))])
        at = blocks[np.concatenate([edges, rng.integers(0, number + 1, 20)])]
        found = jax.device_get(_first_row_at(at, np.array([[n_q]], np.int32), np.array([[n_k]], np.int32)))[0]
        # (2 i + 1) longer >= 2 position n_q
        expected = [max(0, -(-(2 * p * n_q - longer) // (2 * longer))) for p in at.tolist()]
        np.testing.assert_array_equal(found, expected, err_msg=f"{n_q}, {n_k}")


_first_row_at = jax.jit(xla.first_row_at)


def test_kernels_find_the_same_windows():
    """The function that the TPU's kernels call, inside a kernel, whose lengths are scalars."""
    band = 64

    def kernel(n_q, n_k, rows, first, last):
        at = pl.program_id(0)
        first[...], last[...] = support.windows_of_rows(rows[...], n_q[at], n_k[at], band)

    n_q, n_k = LENGTHS.T
    rows = places(n_q)
    block, every = pl.BlockSpec((1, rows.shape[1]), lambda n: (n, 0)), pl.BlockSpec(n_q.shape, lambda n: (0,))
    shape = jax.ShapeDtypeStruct(rows.shape, jnp.int32)
    call = pl.pallas_call(
        kernel,
        (shape, shape),
        grid=(len(n_q),),
        in_specs=[every, every, block],
        out_specs=(block, block),
        interpret=True,
    )
    expected = jax.jit(support.row_windows, static_argnums=3)(rows, n_q, n_k, band)
    for found, wanted in zip(jax.jit(call)(n_q, n_k, rows), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def arguments_of_division() -> np.ndarray:
    """Return x, y, denominator: random, and such that x y is next to a multiple of the denominator."""
    rng = np.random.default_rng(0)
    n_q, n_k = (np.exp(rng.uniform(0, np.log(LONGEST + 1), 20_000)).astype(np.int64) for _ in range(2))
    n_q[:2000], n_k[1000:3000] = LONGEST, LONGEST
    odd = 2 * rng.integers(0, n_q) + 1
    odd[::3] = 2 * n_q[::3] - 1
    near = odd * n_k // (2 * n_q) * (2 * n_q) // n_k + rng.integers(-1, 2, len(odd))  # x y next to a multiple
    odd[1::3] = np.clip(near, 0, 2 * n_q - 1)[1::3]
    return np.stack([odd, n_k, 2 * n_q]).astype(np.int32)


@pytest.mark.parametrize("ulps", [-14, 0, 14])
def test_division_is_exact_on_devices_whose_floats_are_not(ulps):
    """All float divisions are off by so many units in the last place; integers are divided nowhere."""
    given = arguments_of_division()
    closed = jax.make_jaxpr(support.divided_product)(*given)

    @jax.jit
    def run(*given):
        known = dict(zip(closed.jaxpr.invars, given, strict=True))
        for equation in closed.jaxpr.eqns:
            assert equation.primitive.name not in ("rem", "pjit", "jit")
            inputs = [x.val if isinstance(x, Literal) else known[x] for x in equation.invars]
            (out,) = equation.outvars
            known[out] = equation.primitive.bind(*inputs, **equation.params)
            if equation.primitive.name == "div":
                assert out.aval.dtype == jnp.float32
                known[out] *= np.float32(1 + ulps * 2.0**-23)
        return [known[x] for x in closed.jaxpr.outvars]

    whole, rest = jax.device_get(run(*given))
    x, y, denominator = given.astype(np.int64)
    np.testing.assert_array_equal(whole, x * y // denominator)
    np.testing.assert_array_equal(rest, x * y % denominator)
