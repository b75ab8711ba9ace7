"""The TPU's kernels, interpreted: tiles of the support, and a chip whose memory is scarce."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, support
from ot_attention.api import by_head
from ot_attention.backends import tpu
from ot_attention.backends.tpu_tiles import HeadTables, Sizes
from ot_attention.spec import Heads
from tests.support.conformance import (
    CASES,
    Case,
    assert_same_as_reference,
    error,
    inputs,
)

pytestmark = pytest.mark.usefixtures("float64", "kernels_are_interpreted")
RELAXED = Case("relaxed", 60, 150, 10, (60, 31), (150, 40), base_steps=2)  # two tiles of columns


@pytest.fixture
def small_memory(monkeypatch, forget_programs):
    """Function that makes kernels believe in a chip of so many MiB."""

    def believe(mib: float) -> None:
        monkeypatch.setattr(tpu, "vmem_capacity", lambda: int(mib * 2**20))
        forget_programs()

    return believe


@pytest.mark.parametrize(
    "case", [pytest.param(CASES[n], id=CASES[n].name, marks=() if n == 7 else pytest.mark.slow) for n in (4, 7, 11, 12)]
)
def test_a_band_that_does_not_fit_on_the_chip_is_made_anew_in_every_step(case, small_memory):
    dustbin = case.dustbins[-1]
    case = dataclasses.replace(case, base_steps=min(case.base_steps, 3))
    arguments = inputs(case, dustbin)
    spec = case.spec(dustbin=dustbin)
    heads = heads_of(arguments)
    sizes = Sizes.create(heads, spec)
    without_tiles = tpu._Blocks.backward(heads, spec, sizes).bytes(1) / 2**20
    small_memory(without_tiles + 0.01)
    assert tpu._memory(tpu._Blocks.backward(heads, spec, sizes), sizes, (jnp.float64,)).holding is None
    assert_same_as_reference("pallas_tpu", case, dustbin)


def heads_of(arguments, dtype=None) -> Heads:
    (q, k, v), (n_q, n_k), score, _ = arguments
    q, k, v = (x.astype(dtype or x.dtype) for x in (q, k, v))
    return by_head(q, k, v, jnp.zeros(2) if score is None else score, n_q, n_k)


def test_rounded_tiles_cost_no_more_than_rounded_queries_and_keys(small_memory):
    """The error budget of bfloat16 tiles: where float32's do not fit, and for bfloat16 queries and keys only."""
    case = CASES[5]
    spec = case.spec(dustbin="full", base_steps=5)
    arrays, lengths, score, cotangent = inputs(case, "full")
    rounded = [x.astype("bfloat16") for x in arrays]
    heads = heads_of((rounded, lengths, score, cotangent))
    sizes = Sizes.create(heads, spec)
    blocks = tpu._Blocks.forward(heads, spec, sizes)
    small_memory((blocks.bytes(1) + 3 * sizes.tiles * 128 * 128) / 2**20)  # 2 bytes a score, not 4
    assert tpu._memory(blocks, sizes, tpu._tile_dtypes(heads)).holding == jnp.bfloat16
    assert tpu._tile_dtypes(heads_of((arrays, lengths, score, cotangent), "float32")) == (jnp.float32,)

    def potentials(name, arrays):
        run = jax.jit(lambda *x: sinkhorn_attention(*x, spec, *lengths, score, name)[1])
        return run(*arrays)

    exact, of_rounded = potentials("reference", arrays), potentials("reference", [x.astype("float64") for x in rounded])
    ours = potentials("pallas_tpu", rounded)
    for name in ("f", "g"):
        of_inputs = np.abs(getattr(of_rounded, name) - getattr(exact, name)).max()
        of_tiles = np.abs(getattr(ours, name) - getattr(of_rounded, name)).max()
        assert 1e-6 < of_tiles < of_inputs, name  # rounding leaves a trace, or nothing was rounded


@pytest.mark.parametrize("dustbin", ["none", "full"])
def test_tiles_of_any_lengths_fit_the_memory_that_is_laid_out(dustbin):
    rng, number_of = np.random.default_rng(0), 500
    for rows, columns, band in ((1500, 1500, 1), (1500, 1400, 0), (384, 384, 64), (700, 1900, 30), (1900, 300, 200)):
        n_q, n_k = (rng.integers(0, n + 1, number_of).astype(np.int32) for n in (rows, columns))
        n_q[:20], n_k[:10] = rows, columns
        q, k = (np.zeros((number_of, n, 1)) for n in (rows, columns))
        sizes = Sizes.create(Heads(q, k, k, None, n_q, n_k), spec := SinkhornSpec(band=band, dustbin=dustbin))
        row = np.minimum(np.arange(sizes.rows, dtype=np.int32), n_q[:, None] - 1)

        @jax.jit
        def told_and_windows(q, k, n_q, n_k, row, sizes=sizes, spec=spec):
            heads = Heads(q, k, k, jnp.zeros(number_of), n_q, n_k)
            return HeadTables.create(heads, spec, sizes).integers, support.row_windows(row, n_q, n_k, spec.band)

        told, windows = jax.device_get(told_and_windows(q, k, n_q, n_k, row))
        told = told.reshape(number_of, -1)[:, 2:].reshape(number_of, sizes.groups, 4)
        first, number, inner, inner_end = np.moveaxis(told, -1, 0)
        visited = np.where(np.arange(sizes.groups) * 128 < n_q[:, None], number + (dustbin != "none"), 0)
        assert visited.sum(1).max() <= sizes.tiles
        assert (first >= 0).all() and (first + number <= sizes.chunks).all()
        lower, upper = (x.reshape(number_of, sizes.groups, 128) for x in windows)
        real = (np.arange(sizes.groups) * 128 < n_q[:, None]) & (n_k[:, None] > 0)
        met = real[..., None] & (lower <= upper)
        assert (~met | ((lower >= 128 * first[..., None]) & (upper < 128 * (first + number)[..., None]))).all()
        unmasked = real & (inner < inner_end) & (inner < first + number)
        every = (lower.max(-1) <= 128 * inner) & (upper.min(-1) >= 128 * inner_end - 1)
        assert every[unmasked].all()


@pytest.mark.parametrize(
    ("tau_a", "tau_b", "dustbin", "sd"),
    [
        pytest.param(0.3, 1, "unit", 1, marks=pytest.mark.slow),
        (1, 0, "none", 1),
        pytest.param(0, 1, "full", 1, marks=pytest.mark.slow),
        (0.9, 0.6, "full", 100),  # so sharp that scalings leave their range: these take steps in the log domain
        pytest.param(0.3, 1, "none", 100, marks=pytest.mark.slow),
        pytest.param(1, 0, "full", 100, marks=pytest.mark.slow),
        pytest.param(0, 1, "unit", 100, marks=pytest.mark.slow),
    ],
)
def test_relaxed_sums_are_those_of_the_reference(tau_a, tau_b, dustbin, sd):
    case = dataclasses.replace(RELAXED, sd=sd)
    assert_same_as_reference("pallas_tpu", case, dustbin, tau_a=tau_a, tau_b=tau_b)


def test_relaxed_sums_too_small_for_float32_are_made_in_the_log_domain():
    """A share of the logarithm of a sum is in range, though the sum is not: 0 would pass for 1."""
    case = dataclasses.replace(RELAXED, sd=100, tail_steps=1)
    (arrays, lengths, *_), spec = inputs(case, "none", "float32"), case.spec(tau_b=0.1)

    def columns(name, *arrays):
        return jax.jit(lambda *x: sinkhorn_attention(*x, spec, *lengths, implementation=name)[1].g)(*arrays)

    exact = columns("reference", *(x.astype("float64") for x in arrays))
    assert error(columns("pallas_tpu", *arrays), exact) < 1e-5


@pytest.mark.slow
def test_a_relaxed_band_that_does_not_fit_on_the_chip_is_made_anew_in_every_step(small_memory):
    case = dataclasses.replace(RELAXED, rows=150, q_lengths=(150, 97))  # two groups of rows
    heads, spec = heads_of(inputs(case, "none")), case.spec(tau_a=0.9, tau_b=0.6)
    sizes = Sizes.create(heads, spec)
    small_memory(tpu._Blocks.backward(heads, spec, sizes).bytes(1) / 2**20 + 0.01)
    assert_same_as_reference("pallas_tpu", case, "none", tau_a=0.9, tau_b=0.6)


@pytest.mark.parametrize(
    ("weighted", "dustbin", "sd", "settings"),
    [
        (True, "none", 1, {"tolerance": 0.1}),
        # All in the log domain.
        pytest.param(False, "none", 100, {"tolerance": 1e-4, "tau_b": 0.1}, marks=pytest.mark.slow),
        pytest.param(False, "full", 60, {"tolerance": 0.3}, marks=pytest.mark.slow),
        pytest.param(True, "unit", 60, {"tolerance": 0.3, "tau_a": 0.9, "tau_b": 0.6}, marks=pytest.mark.slow),
        pytest.param(True, "full", 100, {"tau_a": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_weights_and_early_ends_are_those_of_the_reference(weighted, dustbin, sd, settings):
    case = dataclasses.replace(RELAXED, sd=sd, base_steps=12)
    assert_same_as_reference("pallas_tpu", case, dustbin, weighted=weighted, **settings)


def test_sequences_that_do_not_fit_on_the_chip_are_refused():
    x = jax.ShapeDtypeStruct((1, 40000, 1, 128), jnp.float32)
    with pytest.raises(UnsupportedError, match="take 111 MiB of VMEM, which has 56 for them; use shorter"):
        jax.eval_shape(lambda x: sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu"), x)
    x = jax.ShapeDtypeStruct((512, 4096, 8, 8), jnp.float32)
    with pytest.raises(UnsupportedError, match="4096 heads of 32 groups of rows take 2112 KiB of scalar memory"):
        jax.eval_shape(lambda x: sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu"), x)
