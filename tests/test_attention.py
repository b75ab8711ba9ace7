"""The public functions: gradients, plans, transformations, memory and messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, transport_plan
from tests.support.conformance import (
    CASES,
    CONVERGING,
    DUSTBINS,
    IMPLEMENTATIONS,
    PLAIN_ONLY,
    Case,
    error,
    few_steps,
    inputs,
)

pytestmark = pytest.mark.usefixtures("float64", "kernels_are_interpreted")

SETTINGS = [pytest.param(name, few_steps(name), id=name) for name in IMPLEMENTATIONS] + [
    pytest.param(name, CONVERGING, id=f"{name}, converging") for name in IMPLEMENTATIONS if name not in PLAIN_ONLY
]


def test_tail_gradient_equals_finite_differences_of_the_surrogate():
    """Independent of automatic differentiation: the potentials after T steps are frozen by hand."""
    case = Case("small", 7, 6, 3)
    arrays, lengths, score, cotangent = inputs(case, "full")
    q, k, v = arrays
    base = case.spec(dustbin="full", base_steps=19, tail_steps=1)
    _, info = jax.jit(lambda q: sinkhorn_attention(q, k, v, base, *lengths, score, "reference"))(q)

    def surrogate(q, score):
        """Two plain steps from the frozen g, written out for one head at a time."""
        total = 0.0
        for b, h in np.ndindex(2, 2):
            s = np.zeros((8, 7))
            s[:7, :6] = q[b, :, h] @ np.asarray(k)[b, :, h].T / np.sqrt(8)
            s[:7, 6] = s[7, :6] = score[h]
            i, j = np.arange(7)[:, None], np.arange(6)
            s[:7, :6][np.abs(j - ((i + 0.5) * 6 / 7 - 0.5)) > 3] = -np.inf
            a, c = np.array([1.0] * 7 + [6]), np.array([1.0] * 6 + [7])
            g = np.asarray(info.g)[b, h]
            for _ in range(2):
                f = np.log(a) - np.log(np.exp(s + g).sum(1))
                g = np.log(c) - np.log(np.exp(s + f[:, None]).sum(0))
            out = np.exp(s + f[:, None] + g)[:7, :6] @ np.asarray(v)[b, :, h]
            total += (out * cotangent[b, :, h]).sum()
        return total

    spec = case.spec(dustbin="full", base_steps=20, tail_steps=2)

    def loss(q, score):
        return (sinkhorn_attention(q, k, v, spec, *lengths, score, "xla")[0] * cotangent).sum()

    dq, dscore = jax.jit(jax.grad(loss, (0, 1)))(q, score)
    q, score, step = np.asarray(q), np.asarray(score), 1e-6
    direction = np.random.default_rng(1).normal(size=q.shape)
    slope = (surrogate(q + step * direction, score) - surrogate(q - step * direction, score)) / (2 * step)
    assert slope == pytest.approx(float((dq * direction).sum()), rel=1e-6)
    slope = (surrogate(q, score + step) - surrogate(q, score - step)) / (2 * step)
    assert slope == pytest.approx(float(dscore.sum()), rel=1e-6)


@pytest.mark.parametrize("dustbin", DUSTBINS)
def test_plan_has_the_contracts_marginals_and_support(dustbin):
    n_q, n_k, band = 30, 24, 8
    case = Case("marginals", n_q, n_k, band, base_steps=3000)
    arrays, lengths, score, _ = inputs(case, dustbin)
    plan = np.asarray(transport_plan(*arrays[:2], case.spec(dustbin=dustbin), *lengths, score))
    extra = dustbin != "none"
    assert plan.shape == (2, 2, n_q + extra, n_k + extra)
    rows, columns = np.ones(n_q), np.full(n_k, 1.0 if extra else n_q / n_k)
    bins = {"none": ([], []), "unit": ([1], [1 + n_q - n_k]), "full": ([n_k], [n_q])}[dustbin]
    assert np.allclose(plan.sum(-1), [*rows, *bins[0]], atol=1e-6)
    assert np.allclose(plan.sum(-2), [*columns, *bins[1]], atol=1e-12)
    i, j = np.arange(n_q)[:, None], np.arange(n_k)
    inside = np.abs(j - ((i + 0.5) * n_k / n_q - 0.5)) <= band
    assert ((plan[..., :n_q, :n_k] > 0) == inside).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_output_is_the_plan_times_the_values(implementation):
    arrays, lengths, score, _ = inputs(CASES[1], "full")
    spec = CASES[1].spec(dustbin="full", **few_steps(implementation))
    out, info = sinkhorn_attention(*arrays, spec, *lengths, score, implementation)
    plan = transport_plan(*arrays[:2], spec, *lengths, score)
    values = jnp.where(jnp.arange(40)[:, None, None] < lengths[1][:, None, None, None], arrays[2], 0)
    assert np.allclose(out, jnp.einsum("bhij,bjhd->bihd", plan[:, :, :-1, :-1], values), atol=1e-12)
    row_sums, target = plan.sum(-1), np.ones((2, 1, 49))
    target[0, :, -1], target[1, :, -1], target[1, :, 31:-1] = 40, 17, 0
    assert np.allclose(info.residual, np.abs(row_sums - target).max(-1), atol=1e-12)


@pytest.mark.parametrize(
    ("implementation", "settings"),
    [
        pytest.param(*s.values, id=s.id, marks=() if s.id in ("reference", "xla") else pytest.mark.slow)
        for s in SETTINGS
    ],
)
def test_jit_vmap_and_repetition_change_nothing(implementation, settings):
    arrays, lengths, score, _ = inputs(CASES[1], "unit")
    spec = CASES[1].spec(dustbin="unit", **settings)

    def loss(arrays, lengths):
        out, info = sinkhorn_attention(*arrays, spec, *lengths, score, implementation)
        return (out**2).sum() + info.f.sum()

    run = jax.value_and_grad(loss)
    compiled = jax.jit(run)
    eager, again, once_more = run(arrays, lengths), compiled(arrays, lengths), compiled(arrays, lengths)
    jax.tree.map(np.testing.assert_array_equal, again, once_more)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), eager, again)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (arrays, lengths))
    values, gradients = jax.jit(jax.vmap(run))(*stacked)
    np.testing.assert_allclose(values, [eager[0]] * 2, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9, atol=1e-12), gradients, eager[1])


@pytest.mark.parametrize(
    ("implementation", "settings"),
    [
        pytest.param(*s.values, id=s.id, marks=() if "xla" in s.values else pytest.mark.slow)
        for s in SETTINGS
        if "pallas_gpu" not in s.values  # its interpreter cannot: it is lowered in test_gpu.py
    ],
)
def test_shard_map_over_the_batch(implementation, settings):
    arrays, lengths, score, _ = inputs(CASES[0], "full")
    spec, mesh = CASES[0].spec(dustbin="full", **settings), jax.sharding.Mesh(jax.devices()[:1], ("data",))
    data, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def run(arrays, lengths, score):
        return sinkhorn_attention(*arrays, spec, *lengths, score, implementation)[0]

    def loss(run):
        return jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), allow_int=True))(arrays, lengths, score)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(data, data, whole), out_specs=data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), loss(sharded), loss(run))


def test_only_the_band_is_computed_and_nothing_of_its_size_is_kept():
    length, band = 2048, 64
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def attend(q, k, v):
        return sinkhorn_attention(q, k, v, SinkhornSpec(band=band), implementation="xla")[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], shape, shape, shape))
    assert max(x.size for x in kept) <= 2 * length * 16
    text = jax.jit(jax.grad(lambda *x: attend(*x).sum())).lower(shape, shape, shape).as_text()
    assert f"{length}x{length}" not in text


def temporary_bytes(shape: tuple[int, ...], spec: SinkhornSpec) -> int:
    """Return the temporary memory of the compiled gradient."""
    run = jax.grad(lambda x: sinkhorn_attention(x, x, x, spec, implementation="xla")[0].sum())
    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(CONVERGING, marks=pytest.mark.slow)], ids=["plain", "converging"]
)
def test_memory_grows_linearly_with_length(settings):
    spec = SinkhornSpec(band=64, **settings)
    assert temporary_bytes((1, 16384, 2, 16), spec) < 2.1 * temporary_bytes((1, 8192, 2, 16), spec)


def test_memory_holds_the_band_of_one_head_whatever_their_number():
    spec, length, width = SinkhornSpec(band=256), 2048, 16
    one, many = (temporary_bytes((batch, length, 2, width), spec) for batch in (1, 8))
    band, arrays = 4 * length * (2 * 256 + 64), 4 * length * width
    assert one > band
    assert many - one < 14 * 12 * arrays < 14 * band  # of 14 more heads: q, k, v, output, gradients, potentials


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"q": np.zeros((2, 5, 4))}, "q has shape"),
        ({"q": np.zeros((2, 5, 3, 4), np.int32)}, "q has dtype"),
        ({"k": np.zeros((2, 5, 2, 4))}, "k has shape"),
        ({"v": np.zeros((2, 6, 3, 4))}, "v has shape"),
        ({"q_lengths": np.array([6, 1])}, "q_lengths"),
        ({"k_lengths": np.array([-1, 1])}, "k_lengths"),
        ({"q_lengths": np.array([1.0, 1.0])}, "q_lengths"),
        ({"q_lengths": np.array([1])}, "q_lengths"),
        ({"dustbin_score": np.zeros(3)}, "dustbin_score is given"),
        ({"spec": SinkhornSpec(dustbin="full")}, "dustbin_score is missing"),
        ({"spec": SinkhornSpec(dustbin="full"), "dustbin_score": np.zeros(2)}, "dustbin_score must be"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_bad_arguments_are_named(changes, names):
    good = dict.fromkeys(("q", "k", "v"), np.zeros((2, 5, 3, 4))) | {"spec": SinkhornSpec()}
    with pytest.raises(ValueError, match=names):
        sinkhorn_attention(**good | changes)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"tail_steps": 0},
        {"base_steps": -1},
        {"band": -1},
        {"band": 2.5},
        {"dustbin": "some"},
        {"gradient": "exact"},
        {"solver": "adam"},
        {"cg_steps": 0},
    ],
)
def test_bad_specs_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SinkhornSpec(**bad)


@pytest.mark.parametrize(
    ("implementation", "changes"),
    [
        ("pallas_tpu", {"solver": "newton"}),
        ("pallas_tpu", {"gradient": "implicit"}),
        ("xla", {"gradient": "unrolled"}),
        ("reference", {"gradient": "unrolled", "solver": "newton"}),
    ],
)
def test_what_is_not_there_is_refused(implementation, changes):
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(UnsupportedError, match="use "):
        sinkhorn_attention(x, x, x, SinkhornSpec(**changes), implementation=implementation)


def test_unrolled_gradient_is_that_of_all_steps():
    arrays, lengths, _, cotangent = inputs(CASES[0], "none")

    def gradient(**changes):
        spec = CASES[0].spec(**changes)

        def loss(q):
            return (sinkhorn_attention(q, *arrays[1:], spec, *lengths)[0] * cotangent).sum()

        return jax.jit(jax.grad(loss))(arrays[0])

    unrolled = gradient(base_steps=4, tail_steps=2, gradient="unrolled")
    assert error(unrolled, gradient(base_steps=0, tail_steps=6)) < 1e-12
    assert error(unrolled, gradient(base_steps=4, tail_steps=2)) > 1e-3
