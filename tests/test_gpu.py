"""The GPU's kernels without a GPU: lowered for one always, compiled for an H100 where jax's CUDA plugin is installed.

Their numbers are tested by interpretation in test_conformance.py; on a machine with a card by the last test here.
"""

import math
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r2_dustbin
from evaluation import runs
from ot_attention import SinkhornSpec, UnsupportedError, api, sinkhorn_attention, steps, support
from ot_attention.backends import gpu, gpu_kernels, registry
from ot_attention.backends.xla import Band
from ot_attention.problem import Problem
from ot_attention.spec import Heads
from tests.support import conformance
from tests.support.gpu_programs import KERNEL, arguments, forward_and_backward
from training import sharding, state

ROOT = Path(__file__).parents[1]


@pytest.fixture
def h100():
    """Trace and lower for an H100, as far as JAX goes without its compiler."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1), ("data", "model"), abstract_device=device)):
        yield


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("width", "dustbin", "dtype", "settings"),
    [
        (32, "full", "float32", {}),
        (64, "none", "bfloat16", {}),
        (128, "unit", "bfloat16", {"gradient": "implicit", "solver": "newton"}),
        (20, "none", "float32", {"tail_steps": 5}),
    ],
)
def test_forward_and_backward_lower_for_a_gpu_and_hold_nothing_of_the_bands_size(h100, width, dustbin, dtype, settings):
    length, band = 2048, 512
    spec = SinkhornSpec(band=band, dustbin=dustbin, **settings)
    text = lowered(forward_and_backward(spec), *arguments(1, length, 2, width, dustbin, dtype))
    assert text.count(KERNEL) >= 8
    for name in ("band_matrix", "band_maximum"):
        assert f'name = "{name}"' in text, name
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)}
    largest = max(shapes, key=math.prod)
    assert math.prod(largest) <= 2 * (length + 64) * 128 < 2 * length * band, largest


def test_a_training_step_lowers_for_a_gpu(h100):
    config = r2_dustbin.get_config()
    config.model.implementation = "pallas_gpu"
    trainer = runs.make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1), config.batch_size, jax.devices()[:1])
    given = trainer.abstract_state(mesh), state.abstract_batch(config.batch_size, 128, mesh)
    text = lowered(trainer.update, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given))
    assert text.count(KERNEL) >= 16  # of self-attention and of the plan, forward and backward


def test_what_a_gpu_is_chosen_and_refused_for(h100):
    def choice(dtype="float32", width=8, implementation=None, **changes):
        x = jax.ShapeDtypeStruct((1, 8, width), dtype)
        return registry.choose(implementation, Heads(x, x, x, None, None, None), SinkhornSpec(**changes))

    assert choice() == choice(solver="newton", gradient="implicit") == choice("bfloat16", 256) == "pallas_gpu"
    assert choice(width=257) == "xla"
    assert choice(gradient="unrolled") == "reference"
    with pytest.raises(UnsupportedError, match="heads of width 257 do not fit its tiles; use at most 256"):
        choice(width=257, implementation="pallas_gpu")
    with pytest.raises(UnsupportedError, match="gradient='unrolled' keeps every step; use "):
        choice(gradient="unrolled", implementation="pallas_gpu")
    with jax.enable_x64(True):
        assert choice("float64") == "xla"
        with pytest.raises(UnsupportedError, match="its kernels compute in float32; use float32 or bfloat16"):
            choice("float64", implementation="pallas_gpu")
    x = jax.ShapeDtypeStruct((65536, 1, 1, 8), jnp.float32)
    with pytest.raises(UnsupportedError, match="65536 heads are more than a grid has"):
        jax.eval_shape(lambda x: sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_gpu"), x)


def test_other_gpus_than_nvidias_are_refused(h100, monkeypatch):
    client = types.SimpleNamespace(platform_version="PJRT C API\nrocm 60300")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(client=client)])
    x = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
    assert "instructions of NVIDIA GPUs" in gpu.unsupported_reason(Heads(x, x, x, None, None, None), SinkhornSpec())


def test_without_a_gpu_it_is_refused():
    x = np.zeros((1, 8, 1, 8), np.float32)
    with pytest.raises(UnsupportedError, match="there is no GPU here; use implementation='xla' or None"):
        sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_gpu")


@pytest.mark.parametrize("by_rows", [True, False])
def test_products_with_bfloat16_lose_no_more_than_float32_would(by_rows, monkeypatch, forget_programs):
    """Weights are not rounded to bfloat16, which would cost 2^-9."""
    monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
    rng = np.random.default_rng(0)
    q, k, x = (jnp.asarray(rng.normal(size=(1, 90, 32)), jnp.bfloat16) for _ in range(3))
    n = jnp.array([90])
    band, scores = gpu.Band.scores(q, k, support.Layout.of(n, n, 90, 90, 12), 0.2)
    product = (band.times if by_rows else band.transpose_times)(band.exp(scores), x)
    q, k, x = (np.asarray(y, np.float64)[0] for y in (q, k, x))
    weights = np.where(np.abs(np.subtract.outer(range(90), range(90))) <= 12, np.exp(0.2 * q @ k.T), 0)
    exact = (weights if by_rows else weights.T) @ x
    assert product.dtype == jnp.float32
    assert np.abs(np.asarray(product)[0] - exact).max() < 2.0**-15 * np.abs(exact).max()


@pytest.mark.parametrize("band", [0, 3, 40, None])
def test_blocks_visit_all_that_they_meet_and_little_else(band):
    rng = np.random.default_rng(0)
    number, rows, columns, block = 200, 150, 230, 32
    n_q, n_k = (rng.integers(0, size + 1, number).astype(np.int32) for size in (rows, columns))
    n_q[:2], n_k[1:3] = rows, columns
    windows = []
    for function, length in ((support.row_windows, rows), (support.column_windows, columns)):
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (number, length))
        windows.append(jax.device_get(jax.jit(function, static_argnums=3)(index, n_q, n_k, band)))
    (first, last), (first_row, last_row) = windows
    cells = (first[..., None] <= np.arange(columns)) & (np.arange(columns) <= last[..., None])
    np.testing.assert_array_equal(
        cells, (first_row[:, None] <= np.arange(rows)[:, None]) & (np.arange(rows)[:, None] <= last_row[:, None])
    )
    for seen, window, n in ((cells, (first, last), n_q), (cells.swapaxes(1, 2), (first_row, last_row), n_k)):
        reach = jax.jit(gpu._reach, static_argnums=3)(*window, n, block)
        check_visits(seen, *map(np.asarray, reach), block, exactly=band != 0)


def check_visits(cells, start, stop, inner_start, inner_stop, block: int, exactly: bool) -> None:
    """exactly: unless there are rows in between whose window is empty."""
    assert (start >= 0).all() and (start <= stop).all() and (stop <= cells.shape[2]).all()
    for n, b in np.ndindex(start.shape):
        of_block = cells[n, b * block : (b + 1) * block]
        met, met_by_all = np.flatnonzero(of_block.any(0)), np.flatnonzero(of_block.all(0))
        inner = np.arange(inner_start[n, b], inner_stop[n, b])
        if len(met):
            assert start[n, b] <= met[0] and met[-1] < stop[n, b]
            assert not exactly or (start[n, b], stop[n, b]) == (met[0], met[-1] + 1)
        if len(of_block) == block:
            assert set(inner) <= set(met_by_all) and (not exactly or set(inner) == set(met_by_all))
        else:
            assert inner.size == 0  # a block that runs past the end is masked everywhere


@pytest.mark.parametrize(("rows", "columns", "band"), [(300, 200, 20), (130, 300, 70), (90, 100, None), (40, 200, 0)])
def test_one_sweep_makes_a_whole_step(rows, columns, band, monkeypatch, forget_programs):
    """Strips of any lengths hold what their rows meet, and masks are where they are needed."""
    monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
    rng = np.random.default_rng(0)
    number, width = 12, 4
    n_q, n_k = (rng.integers(1, size + 1, number).astype(np.int32) for size in (rows, columns))
    n_q[:2], n_k[1:3], n_q[3] = rows, columns, 0
    q, k, f, g, bins = (
        rng.normal(size=(number, *shape)).astype(np.float32)
        for shape in ((rows, width), (columns, width), (rows + 1,), (columns + 1,), (rows,))
    )
    bins, mass = np.abs(bins), np.broadcast_to(np.arange(rows) < n_q[:, None], (number, rows))

    def step(q, k, f, g, n_q, n_k, bins):
        band_, scores = gpu.Band.scores(q, k, support.Layout.of(n_q, n_k, rows, columns, band), 0.5)
        assert band_.cut is not None
        terms = band_.exp(band_.shift(scores, f, g))
        return band_.scale_once(terms, jnp.asarray(mass), bins), band_.scale_once(terms, jnp.asarray(mass), None)

    found = jax.device_get(jax.jit(step)(q, k, f, g, n_q, n_k, bins))
    inside = support.dense_support(jnp.asarray(n_q), jnp.asarray(n_k), rows, columns, band, "none")[:, :-1, :-1]
    scores = 0.5 * np.einsum("nid,njd->nij", q, k) + f[:, :-1, None] + g[:, None, :-1]
    entries = np.where(inside, np.exp(scores), 0)
    for (u, sums), added in zip(found, (bins, 0), strict=True):
        total = entries.sum(2) + added
        expected = np.where(mass & (total > 0), 1 / np.where(total > 0, total, 1), 0)
        np.testing.assert_allclose(u, expected, rtol=2e-6)
        np.testing.assert_allclose(sums, np.einsum("nij,ni->nj", entries, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("band", [12, 130])
def test_wide_heads_of_float32_have_blocks_of_their_own(band, monkeypatch, forget_programs):
    """Smaller blocks, no strips; with the wider band tiles inside the support are visited in a loop of their own."""
    monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
    rng, length = np.random.default_rng(0), 300
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 130)), jnp.float32) for _ in range(3))
    spec = SinkhornSpec(band=band, base_steps=2, dustbin="full")

    def run(implementation):
        def loss(q, k, v):
            out, info = sinkhorn_attention(
                q, k, v, spec, jnp.array([length]), jnp.array([length - 40]), jnp.zeros(1), implementation
            )
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum() + info.g.sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for found, expected in zip(run("pallas_gpu"), run("xla"), strict=True):
        assert conformance.error(found, expected) < 1e-5


def test_steps_that_lose_digits_are_made_with_care_instead(monkeypatch, forget_programs):
    """A column that underflows in the first step is noticed; then, or always if told to, steps are made by scaling."""
    monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
    case, spec = conformance.CASES[11], SinkhornSpec(band=8, base_steps=3)
    arrays, lengths, *_ = conformance.inputs(case, "none", "float32")
    q = jnp.zeros_like(arrays[0]).at[..., 1].set(5.0)

    def with_column_at(score):
        """Scores near 0, but for those of one column."""
        return q, (0.1 * arrays[1]).at[:, 5, :, 1].set(score * 8**0.5 / 5.0), arrays[2]

    @jax.jit
    def absorbed(*arrays):
        heads = support.cleaned(api.by_head(*arrays, jnp.zeros(2), *lengths))
        return steps.by_absorption(heads, Problem.create(heads, spec, gpu.Band))[1]

    assert absorbed(*arrays) and absorbed(*with_column_at(-50.0))
    assert not absorbed(*with_column_at(-70.0)) and not absorbed(*with_column_at(-200.0))
    monkeypatch.setattr(steps, "_LARGEST_MOVE", 0.0)
    forget_programs()
    out, info = jax.jit(lambda *x: sinkhorn_attention(*x, spec, *lengths, implementation="pallas_gpu"))(*arrays)
    expected, expected_info = sinkhorn_attention(*arrays, spec, *lengths, implementation="xla")
    assert conformance.error(out, expected) < 1e-5
    assert conformance.error(info.f, expected_info.f) < 1e-5 and conformance.error(info.g, expected_info.g) < 1e-5


@pytest.mark.parametrize("number", [5, 11], ids=lambda n: conformance.CASES[n].name)
def test_fewer_checks_on_a_gpu_change_no_step(number, monkeypatch, forget_programs):
    """Scalings of one case leave their range in mid-run, several times."""
    case = conformance.CASES[number]
    arrays, lengths, *_ = conformance.inputs(case, "none", "float32")
    spec = case.spec(base_steps=11)  # 13 steps: two times seven, the last for nothing

    def run():
        attend = jax.jit(lambda *x: sinkhorn_attention(*x, spec, *lengths, implementation="xla"))
        out, info = attend(*arrays)
        return {"out": out, "f": info.f, "g": info.g, "residual": info.residual}

    expected = run()
    monkeypatch.setattr(support, "platform", lambda: "gpu")
    monkeypatch.setattr(Band, "heads_at_once", lambda *_: 4)
    forget_programs()
    actual = run()
    for name, value in expected.items():
        assert conformance.error(actual[name], value) < 1e-6, name


def test_a_gpu_checks_seldom_and_takes_many_heads_at_once(h100):
    def attend(q):
        return sinkhorn_attention(q, q, q, SinkhornSpec(band=64), implementation="xla")[0]

    x = jax.ShapeDtypeStruct((256, 384, 4, 32), jnp.float32)
    on_gpu = jax.make_jaxpr(attend)(x)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        elsewhere = jax.make_jaxpr(attend)(x)
    assert "length=11" in str(on_gpu) and "length=11" not in str(elsewhere)
    assert Band.heads_at_once(1024, 384, 384, 64, 4) == 512  # of 295 KB, in 256 MiB


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here (JAX_PLATFORMS=cuda,cpu on one)")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "dustbin"),
    [pytest.param(c, d, id=f"{c.name}, {d}") for c in conformance.CASES for d in c.dustbins],
)
@pytest.mark.parametrize("settings", [{}, conformance.CONVERGING], ids=["plain", "converging"])
def test_a_card_has_the_numbers_of_the_reference(case, dustbin, settings, dtype):
    found = conformance.against_reference("pallas_gpu", case, dustbin, dtype, **settings)
    assert {name: error for name, (error, allowed) in found.items() if not error <= allowed} == {}
