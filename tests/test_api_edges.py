"""The edge of the public functions: dtypes, settings of JAX, meshes of explicit axes, export and transformations."""

import dataclasses
import functools
import importlib.util
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ot_attention import SinkhornSpec, UnsupportedError, asap, plans, sinkhorn_attention, sparse, transport_plan
from ot_attention.api import as_lengths
from ot_attention.certificates import contraction, posterior_bias
from ot_attention.sparse import SparseSpec
from tests.support.conformance import IMPLEMENTATIONS, INTERPRETED, PLAIN_ONLY
from tests.support.processes import finish, start

ROWS, HEADS = 12, 2
SPEC = SinkhornSpec(band=4, base_steps=2, tail_steps=1)
BINNED = dataclasses.replace(SPEC, dustbin="full")
LENGTHS = np.array([12, 7], np.int32)


def arrays(batch: int = 2, rows: int = ROWS, heads: int = HEADS, dtype="float32", seed: int = 0) -> list[np.ndarray]:
    """q, k and v."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, rows, heads, width)).astype(dtype) for width in (4, 4, 3)]


def assert_same(actual, expected, tolerance: float = 0.0) -> None:
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in leaves:
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=tolerance, atol=tolerance)


def fitted_map() -> asap.Asap:
    q, k, _ = map(jnp.asarray, arrays())
    given = asap.Sample(q, k, LENGTHS, LENGTHS, None, jnp.zeros((2, HEADS, ROWS)))
    return asap.Asap.create(asap.directions("random", [given], 3), ("kantorovich", "squares", "position", "mass"))


# Every public function that takes lengths.
WITH_LENGTHS = {
    "attention": lambda q, k, v, *n: sinkhorn_attention(q, k, v, SPEC, *n, implementation="xla"),
    "reference": lambda q, k, v, *n: sinkhorn_attention(q, k, v, SPEC, *n, implementation="reference"),
    "plan": lambda q, k, v, *n: transport_plan(q, k, SPEC, *n),
    "contraction": lambda q, k, v, *n: contraction(q, k, SPEC, *n),
    "bias": lambda q, k, v, *n: posterior_bias(q, k, SPEC, *n),
    "asap": lambda q, k, v, *n: asap.apply(fitted_map(), q, k, v, SPEC, *n),
    "sorted blocks": lambda q, k, v, n, _: sparse.sparse_sinkhorn_attention(
        q, q, v, jnp.ones((2, HEADS, 3, 3)), SparseSpec(block=4, steps=2), n
    ),
    "local": lambda q, k, v, n, _: sparse.local_attention(q, k, v, SparseSpec(block=4), n),
    "softmax": lambda q, k, v, n, _: sparse.softmax_attention(q, k, v, causal=False, lengths=n),
    "pooled": lambda q, k, v, n, _: sparse.pooled(jnp.asarray(q[:, :, 0]), SparseSpec(block=4), n),
    "log plan": lambda q, k, v, *n: plans.log_plan(
        jnp.asarray(q[:, :, 0]),
        jnp.asarray(k[:, :, 0]),
        plans.Potentials(*jnp.zeros((2, 2, 12), "float32")),
        n,
        SPEC,
    ),
}


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_lengths_of_8_bits_give_the_results_of_int32(name):
    """The padded length, 300, does not fit into 8 bits, traced or not."""
    q, k, v = (np.concatenate([x] * 25, 1) for x in arrays()) if name in ("attention", "pooled") else arrays()
    n = np.array([127, 5]) if q.shape[1] == 300 else LENGTHS
    function = jax.jit(functools.partial(WITH_LENGTHS[name], q, k, v))
    expected = function(*[n.astype("int32")] * 2)
    assert_same(function(*[n.astype("uint8")] * 2), expected)
    if name not in ("contraction", "bias", "asap"):  # slow without compilation
        assert_same(WITH_LENGTHS[name](q, k, v, n.astype("uint8"), n.astype("uint64")), expected, 1e-5)


@pytest.mark.usefixtures("float64")
def test_lengths_keep_their_values_and_are_clipped_after_they_do():
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        n = np.array([127, 5], dtype)
        for longest, expected in ((300, [127, 5]), (70_000, [127, 5]), (100, [100, 5])):
            found = jax.jit(as_lengths, static_argnums=(0, 2, 3))("n", n, longest, 2)
            assert found.dtype == "int32" and found.tolist() == expected
    found = jax.jit(as_lengths, static_argnums=(0, 2, 3))("n", np.array([2**32 - 1, 2**63], "uint64"), 300, 2)
    assert found.tolist() == [300, 300]


def test_lengths_and_scores_may_be_lists_and_numbers():
    q, k, v = arrays()
    attend = functools.partial(sinkhorn_attention, q, k, v, BINNED)
    expected = attend(LENGTHS, LENGTHS, np.ones(HEADS, "float32"))
    for n in (LENGTHS.tolist(), (np.int8(12), 7), [jnp.int16(12), np.int64(7)], LENGTHS.astype("int64")):
        assert_same(attend(n, n, [1, 1]), expected)
    for score in (np.ones(HEADS), np.ones(HEADS, int), (1, 1.0), 1.0, 1, jnp.ones(HEADS, "bfloat16")):
        assert_same(attend(LENGTHS, LENGTHS, score), expected)
    assert_same(attend(12, np.int8(12), 1), attend(None, None, jnp.ones(HEADS)))
    lists = (x.tolist() for x in (q, k, v))
    assert_same(sinkhorn_attention(*lists, BINNED, LENGTHS, LENGTHS, 1.0), expected)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"q_lengths": np.array([True, True])}, "q_lengths has shape .* bool"),
        ({"q_lengths": [True, False]}, "q_lengths has shape .* bool"),
        ({"q_lengths": [12.0, 7.0]}, "q_lengths .* float"),
        ({"q_lengths": [[1], [2, 3]]}, "q_lengths is no array"),
        ({"q_lengths": [2**40, 1]}, "q_lengths=.* must lie between"),
        ({"q_lengths": np.array([2**32 + 1, 1])}, "q_lengths=.* must lie between"),
        ({"q_lengths": [2**70, 1]}, "q_lengths"),
        ({"q_lengths": [None, 1]}, "q_lengths"),
        ({"dustbin_score": [True, True]}, "dustbin_score must be"),
        ({"dustbin_score": ["a", "b"]}, "dustbin_score must be"),
        ({"dustbin_score": np.ones(HEADS, "float16")}, "dustbin_score must be"),
        ({"dustbin_score": [1.0] * 3}, "dustbin_score must be"),
        ({"q": None}, "q has"),
        ({"k": "k"}, "k has"),
        ({"v": [[1.0], [2.0, 3.0]]}, "v is no array"),
        ({"q": np.ones((2, ROWS, HEADS, 4), np.float16)}, "q has dtype float16"),
        ({"k": np.ones((2, ROWS, HEADS, 4), jnp.float8_e4m3fn)}, "k has dtype float8"),
        ({"v": np.ones((2, ROWS, HEADS, 4), int).tolist()}, "v has dtype int"),
    ],
)
def test_what_is_no_number_of_the_kind_is_named(changes, names):
    q, k, v = arrays()
    good = {"q": q, "k": k, "v": v, "spec": BINNED, "dustbin_score": 0.0}
    with pytest.raises(ValueError, match=names):
        sinkhorn_attention(**good | changes)


@pytest.mark.parametrize("spec", [SinkhornSpec, SparseSpec])
def test_numbers_of_any_library_make_equal_specs_with_one_hash(spec):
    floats = (np.float32, np.float64, jnp.bfloat16, jnp.asarray, np.asarray)
    integers = (np.int64, np.uint8, np.asarray, jnp.asarray)
    for field in dataclasses.fields(spec):
        plain = getattr(spec(), field.name)
        value = 3 if field.name == "sortcut" else plain
        kinds = {bool: (np.bool_,), int: integers, float: floats, str: (np.str_,)}[type(value)]
        for kind in kinds:
            made, expected = spec(**{field.name: kind(value)}), spec(**{field.name: value})
            assert made == expected and hash(made) == hash(expected)
            assert type(getattr(made, field.name)) is type(value) or field.name in ("dustbin", "gradient", "solver")
    assert spec(**{"epsilon" if spec is SinkhornSpec else "temperature": Fraction(3, 4)}) is not None


@pytest.mark.parametrize(
    ("spec", "bad"),
    [
        *(
            (SinkhornSpec, {name: x})
            for name in ("base_steps", "tail_steps", "band", "newton_steps", "cg_steps")
            for x in (20.0, np.float32(20), True, np.bool_(True), np.array([2]), "2", 2**40)
        ),
        *(
            (SinkhornSpec, {"epsilon": x})
            for x in (np.nan, np.inf, np.float32(0), True, "1", None, np.ones(1), 10**400)
        ),
        *((SinkhornSpec, {name: x}) for name in ("dustbin", "gradient", "solver") for x in (None, ["none"], 1)),
        *((SparseSpec, {name: x}) for name in ("block", "steps", "sortcut") for x in (2.0, True, "2", [2])),
        *((SparseSpec, {"temperature": x}) for x in (np.nan, -1, True, None, np.ones(1))),
        *((SparseSpec, {name: x}) for name in ("causal", "mixture") for x in (1, None, "yes", np.ones(1, bool))),
    ],
)
def test_what_is_no_setting_is_named(spec, bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "="):
        spec(**bad)


def test_options_of_asap_are_checked_alike():
    q, k, v = map(jnp.asarray, arrays())
    given = asap.Sample(q, k, LENGTHS.astype("uint8"), [12, 7], None, sinkhorn_attention(q, k, v, SPEC)[1].f)
    made = asap.Asap.create(np.asarray(asap.directions("random", [given], np.int64(3))), ["squares"], np.bool_(True))
    assert made.features == ("squares",) and made.two_sided is True
    of_numpy = asap.fit(made, [given], SPEC, ridge=np.float32(0.5), newton_steps=np.int8(1))
    same = asap.fit(made, [given._replace(q_lengths=LENGTHS, k_lengths=LENGTHS)], SPEC, ridge=0.5, newton_steps=1)
    assert_same(of_numpy, same)
    for bad in ({"ridge": -1.0}, {"ridge": np.nan}, {"newton_steps": 1.0}, {"newton_steps": True}):
        with pytest.raises(ValueError, match=next(iter(bad)) + "="):
            asap.fit(made, [given], SPEC, **bad)
    with pytest.raises(ValueError, match=r"number=3\.0"):
        asap.directions("random", [given], 3.0)


def test_a_band_wider_than_any_sequence_is_full_support():
    given = arrays()
    wide, full = (dataclasses.replace(SPEC, band=band) for band in (2**30, None))
    for name in ("xla", "reference"):
        assert_same(*(sinkhorn_attention(*given, spec, implementation=name) for spec in (wide, full)), 1e-6)


# A learned temperature

LEARNED = [("tail", "sinkhorn"), ("implicit", "newton"), ("unrolled", "sinkhorn")]


def loss_of(implementation: str | None, *, dtype: str, **settings):
    """Function of epsilon (and q), and q."""
    (q, k, v), score = arrays(dtype=dtype), jnp.array([0.5, -1.0], dtype)
    q[1, 7:], k[1, 7:] = np.nan, np.inf  # padding must not reach the gradient
    with jax.debug_nans(False):
        q, k, v = map(jnp.asarray, (q, k, v))

    def loss(epsilon, q=q):
        spec = dataclasses.replace(BINNED, **settings, epsilon=epsilon)
        out, info = sinkhorn_attention(q, k, v, spec, LENGTHS, LENGTHS, score, implementation)
        return (out**2).sum() + jnp.cos(info.f + info.g).sum()  # alone they have a gauge

    return loss, q


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("gradient", "solver"), [pytest.param(*LEARNED[1], marks=pytest.mark.slow), LEARNED[2]])
def test_the_gradient_of_a_temperature_equals_finite_differences(gradient, solver):
    steps = {"base_steps": 60 if gradient == "implicit" else 3, "cg_steps": 30}
    loss, _ = loss_of("reference", dtype="float64", gradient=gradient, solver=solver, **steps)
    slope = (loss(0.7 + 1e-6) - loss(0.7 - 1e-6)) / 2e-6
    assert float(jax.jit(jax.grad(loss))(0.7)) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.usefixtures("float64", "kernels_are_interpreted")
@pytest.mark.parametrize(("gradient", "solver"), LEARNED)
@pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=pytest.mark.slow if "pallas" in name else ()) for name in IMPLEMENTATIONS],
)
def test_the_gradient_of_a_temperature_follows_from_the_queries(implementation, gradient, solver):
    """Scores depend on `q / epsilon` alone, in every gradient mode; the spec of a number is compared with."""
    settings = {"gradient": gradient, "solver": solver}
    if (implementation in PLAIN_ONLY and gradient != "tail") or (
        implementation != "reference" and gradient == "unrolled"
    ):
        pytest.skip("refused")
    loss, q = loss_of(implementation, dtype="float64", **settings)
    dq = jax.jit(jax.grad(lambda q: loss(0.7, q)))(q)
    expected = -(jnp.nan_to_num(q) * dq).sum() / 0.7
    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.float64(0.7))
    assert float(value) == pytest.approx(float(jax.jit(lambda: loss(0.7))()), rel=1e-9)
    assert float(slope) == pytest.approx(float(expected), rel=1e-8)


def test_temperatures_of_every_kind_of_trace():
    loss, _ = loss_of(None, dtype="float32")
    values = np.array([0.5, 0.7, 2.0], "float32")
    run = jax.jit(jax.value_and_grad(loss))
    expected = [run(x) for x in values]
    assert_same(jax.jit(jax.vmap(run))(values), [np.stack(x) for x in zip(*expected, strict=True)], 1e-4)
    of_bfloat16 = jax.jit(jax.grad(loss))(jnp.bfloat16(0.5))
    assert of_bfloat16.dtype == jnp.bfloat16
    assert float(of_bfloat16) == pytest.approx(float(expected[0][1]), rel=1e-2)
    assert_same(jax.jit(loss)(1), loss(1.0), 1e-6)  # an integer that is traced


def test_plans_certificates_and_sorting_take_a_learned_temperature():
    q, k, v = map(jnp.asarray, arrays())
    one = lambda e: dataclasses.replace(SPEC, epsilon=e)  # noqa: E731
    potentials = plans.Potentials(jnp.zeros((2, ROWS)), jnp.zeros((2, ROWS)))
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(2, HEADS, 3, 3)), jnp.float32)
    functions = [
        lambda e: transport_plan(q, k, one(e), LENGTHS, LENGTHS),
        lambda e: posterior_bias(q, k, one(e), LENGTHS, LENGTHS),
        lambda e: contraction(q, k, dataclasses.replace(one(e), band=None), LENGTHS, LENGTHS),
        lambda e: plans.log_plan(q[:, :, 0], k[:, :, 0], potentials, (LENGTHS, LENGTHS), one(e)),
        lambda e: plans.banded_plan(q[:, :, 0], k[:, :, 0], potentials, (LENGTHS, LENGTHS), one(e)),
        lambda e: sparse.sparse_sinkhorn_attention(
            q, k, v, scores, SparseSpec(block=4, steps=2, temperature=e), LENGTHS
        ),
    ]
    for function in functions:
        assert_same(jax.jit(function)(0.7), function(0.7), 1e-5)
    slope = jax.grad(lambda e: (functions[0](e) ** 2).sum())(0.7)
    assert np.isfinite(slope) and slope != 0


def test_temperatures_that_cannot_be_are_refused_or_nan():
    q, k, v = arrays()
    loss, _ = loss_of("xla", dtype="float32")
    for bad in (0.0, -1.0, np.inf, np.nan):
        assert np.isnan(jax.jit(loss)(bad))
    for bad in (np.ones(HEADS), np.ones(1), True, 1j):
        with pytest.raises(ValueError, match="epsilon is traced with shape"):
            jax.jit(loss)(bad)
    for function in (
        lambda spec: asap.apply(fitted_map(), q, k, v, spec),
        lambda spec: asap.fit(fitted_map(), [asap.Sample(q, k, LENGTHS, LENGTHS, None, np.zeros((2, 2, 12)))], spec),
    ):
        with pytest.raises(UnsupportedError, match="use a number"):
            jax.jit(lambda e, function=function: function(dataclasses.replace(SPEC, epsilon=e)))(1.0)


# Settings of JAX

SETTINGS = [
    {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
    {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
    {"jax_debug_nans": True},
]


@pytest.fixture(
    params=[pytest.param(SETTINGS[0], marks=pytest.mark.slow), *SETTINGS[1:]], ids=["strict", "strict, 64 bits", "NaN"]
)
def setting(request, monkeypatch):
    before = {name: getattr(jax.config, name) for name in request.param}
    for name, value in request.param.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("implementation", "gradient", "solver", "dustbin"),
    [
        ("xla", "tail", "sinkhorn", "unit"),
        ("xla", "implicit", "newton", "full"),
        ("xla", "tail", "newton", "none"),
        ("reference", "tail", "sinkhorn", "full"),
        ("reference", "implicit", "newton", "unit"),
        ("reference", "unrolled", "sinkhorn", "none"),
    ],
)
def test_attention_is_the_same_under_the_settings(setting, implementation, gradient, solver, dustbin):
    spec = dataclasses.replace(SPEC, gradient=gradient, solver=solver, dustbin=dustbin)
    score = None if dustbin == "none" else jnp.zeros(HEADS)

    @jax.jit
    def run(q, k, v, score):
        out, info = sinkhorn_attention(q, k, v, spec, LENGTHS, LENGTHS, score, implementation)
        return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(info.f), out

    q, k, v = map(jnp.asarray, arrays())
    (_, out), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k.astype("bfloat16"), v, score)
    assert out.dtype == jnp.float32 and [x.dtype for x in gradients] == ["float32", "bfloat16", "float32"]
    assert all(np.isfinite(np.asarray(x, float)).all() for x in (out, *gradients))


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_every_function_runs_under_the_settings(setting, name):
    given = [jnp.asarray(x) for x in arrays()]
    results = jax.tree.leaves(WITH_LENGTHS[name](*given, LENGTHS, LENGTHS))
    assert all(x.dtype in ("float32", "int32", "bool") for x in results)


def test_no_false_alarm_of_nan_from_padding(setting):
    """Eager calls check what every operation makes."""
    loss, _ = loss_of("xla", dtype="float32")
    assert np.isfinite(jax.value_and_grad(loss)(jnp.float32(0.7))).all()


def test_nothing_moves_between_host_and_device_inside_jit():
    q, k, v = map(jnp.asarray, arrays())
    n = jnp.asarray(LENGTHS)
    run = jax.jit(lambda *x: sinkhorn_attention(*x, SPEC, n, n)[0])
    compiled = run.lower(q, k, v).compile()
    with jax.transfer_guard("disallow"):
        assert compiled(q, k, v).shape == v.shape


@pytest.mark.slow
def test_attention_without_compilation():
    given = arrays(1)
    with jax.disable_jit():
        out = sinkhorn_attention(*given, SPEC, implementation="xla")
    assert_same(out, sinkhorn_attention(*given, SPEC, implementation="xla"), 1e-5)


# Export with symbols for sizes


def exported(sizes: str, constraints=(), **settings):
    """Run attention and its gradients as they come back from bytes, and as they are."""
    implementation = settings.pop("implementation", None)
    spec = dataclasses.replace(SPEC, **settings)
    b, rows, columns, h = export.symbolic_shape(sizes, constraints=constraints)

    def loss(q, k, v, *lengths):
        score = None if spec.dustbin == "none" else jnp.ones(q.shape[2], q.dtype)
        out, info = sinkhorn_attention(q, k, v, spec, *lengths, score, implementation)
        return (out**2).sum() + info.f.sum(), (out, info)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    given = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((b, rows, h, 4), (b, columns, h, 4), (b, columns, h, 3))]
    lengths = [jax.ShapeDtypeStruct((b,), jnp.int32)] * 2
    made = export.export(run)(*given, *lengths)
    if importlib.util.find_spec("flatbuffers"):  # JAX needs it to write and read what it exports
        made = export.deserialize(made.serialize())
    return made.call, run


def assert_called_alike(functions, *sizes: tuple[int, int, int, int]) -> None:
    actual, expected = functions
    for b, rows, columns, h in sizes:
        q, _, _ = arrays(b, rows, h)
        _, k, v = arrays(b, columns, h, seed=1)
        rng = np.random.default_rng(2)
        lengths = [rng.integers(1, n + 1, b).astype("int32") for n in (rows, columns)]
        assert_same(actual(q, k, v, *lengths), expected(q, k, v, *lengths), 2e-4)


CONVERGING = {"solver": "newton", "gradient": "implicit"}
SHORT = {"constraints": ["l <= 16777216", "m <= 16777216"]}


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        pytest.param("b, 12, 12, 2", {"dustbin": "full"} | CONVERGING, marks=pytest.mark.slow),
        ("b, 12, 12, h", {"implementation": "reference"}),
        ("b, l, m, h", SHORT | {"dustbin": "unit"}),
        pytest.param("2, l, m, 2", SHORT | CONVERGING, marks=pytest.mark.slow),
        pytest.param("b, l, l, h", {"band": None, "implementation": "reference"} | CONVERGING, marks=pytest.mark.slow),
    ],
)
def test_symbols_may_stand_for_sizes_in_export(sizes, settings):
    fixed = [int(x) if x.strip().isdigit() else None for x in sizes.split(",")]
    tried = [(3, 12, 12, 2), (2, 200, 200 if "l, l" in sizes else 150, 1)]
    called = {tuple(a or b for a, b in zip(fixed, of, strict=True)) for of in tried}
    assert_called_alike(exported(sizes, **settings), *called)


def test_memory_of_a_batch_that_is_a_symbol_is_one_groups():
    """A band of 200 heads would take 20 MB at a time, several times."""
    call, _ = exported("b, 256, 256, 2", band=16)
    shapes = [jax.ShapeDtypeStruct((100, 256, 2, width), jnp.float32) for width in (4, 4, 3)]
    lengths = [jax.ShapeDtypeStruct((100,), jnp.int32)] * 2
    analysis = jax.jit(call).lower(*shapes, *lengths).compile().memory_analysis()
    arrays_of_all = 200 * 256 * 4 * 4
    assert analysis.temp_size_in_bytes < 20 * arrays_of_all + 8e6


def test_symbols_that_could_be_too_long_and_kernels_are_refused():
    with pytest.raises(UnsupportedError, match="l <= 16777216"):
        exported("2, l, 12, 2")
    for name in INTERPRETED:
        with pytest.raises(UnsupportedError, match="symbols"):
            exported("b, 12, 12, 2", implementation=name)


# Meshes of explicit axes

ON_A_MESH = """
import os, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ot_attention import SinkhornSpec, UnsupportedError, asap, sinkhorn_attention, transport_plan
from ot_attention.api import as_lengths
from ot_attention.certificates import contraction, posterior_bias
from tests import test_api_edges as edges

q, k, v = edges.arrays(4)
n, score = np.array([12, 7, 3, 12]), np.array([.5, -1.], "float32")

def attend(q, k, v, **settings):
    spec = SinkhornSpec(**dict(band=4, base_steps=2, dustbin="full") | settings)
    return sinkhorn_attention(q, k, v, spec, n, n, score)

def loss(q, k, v):
    out, info = attend(q, k, v)
    return (out ** 2).sum() + info.f.sum()

pull_back = jax.grad(loss, (0, 1, 2))
spec = SinkhornSpec(band=4, base_steps=2)
fitted = edges.fitted_map()
WHOLE = bool(os.environ.get("WHOLE"))
functions = dict(
    forward=attend,
    backward=jax.jit(pull_back),
    converged=jax.jit(jax.grad(lambda *x: (attend(*x, solver="newton", gradient="implicit")[0] ** 2).sum())),
    plan=lambda q, k, v: transport_plan(q, k, spec, n, n),
    bias=lambda q, k, v: (posterior_bias(q, k, spec, n, n), contraction(q, k, spec, n, n)),
    asap=lambda q, k, v: asap.apply(fitted, q, k, v, spec, n, n),
    temperature=jax.jit(lambda *x: jax.grad(lambda e: (attend(*x, epsilon=e)[0] ** 2).sum())(.7)),
)
functions = functions if WHOLE else {name: functions[name] for name in ("forward", "backward", "asap")}
expected = {name: function(q, k, v) for name, function in functions.items()}
mesh = jax.make_mesh((2, 2), ("d", "m"))
assert mesh.axis_types == (AxisType.Explicit,) * 2

def on(mesh, spec, *arrays):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]

def check(cut, names):
    given = on(mesh, cut, q, k, v)
    for name in names:
        edges.assert_same(functions[name](*given), expected[name], 1e-4)
    edges.assert_same(jax.jit(attend)(*given), expected["forward"], 1e-4)
    (out, info), (dq, *_) = attend(*given), functions["backward"](*given)
    like_q = jax.typeof(given[0]).sharding.spec
    assert jax.typeof(out).sharding.spec == jax.typeof(dq).sharding.spec == like_q
    assert all(jax.typeof(x).sharding.spec[:2] == (like_q[0], like_q[2]) for x in info)

check(P("d", None, "m"), functions)
for cut in (P("d"), P(("d", "m")), P()) if WHOLE else [P(("d", "m"))]:
    check(cut, ["backward"])
with jax.set_mesh(mesh):
    edges.assert_same(pull_back(*on(mesh, P("d"), q, k, v)), expected["backward"], 1e-4)
some, = on(mesh, P("d"), q)
edges.assert_same(attend(some, k, v), expected["forward"], 1e-4)  # k and v on one device
stacked = on(mesh, P("d", None, None, "m"), *(np.stack([x, x]) for x in (q, k, v)))
edges.assert_same(np.asarray(jax.vmap(attend)(*stacked)[0])[1], expected["forward"][0], 1e-4)
mixed = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Explicit))
edges.assert_same(jax.jit(attend)(*on(mixed, P("d", None, "m"), q, k, v)), expected["forward"], 1e-4)
by_hand = jax.shard_map(
    lambda *x: sinkhorn_attention(*x, spec)[0], mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
)
edges.assert_same(
    jax.jit(by_hand)(*on(mesh, P("d", None, "m"), q, k, v)), sinkhorn_attention(q, k, v, spec)[0], 1e-4
)
told = []
for bad, cut in ((0, P(None, "d")), (1, P(None, None, None, "m")), (2, P("m")), (2, P("d", "m"))):
    given = on(mesh, P("d"), q, k, v)
    given[bad], = on(mesh, cut, np.ones((4, 12, 2, 4), "float32"))
    try:
        attend(*given)
    except UnsupportedError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.mark.parametrize("whole", ["", pytest.param("yes", marks=pytest.mark.slow)])
def test_arrays_on_a_mesh_of_explicit_axes(whole, monkeypatch):
    monkeypatch.setenv("WHOLE", whole)
    (printed,) = finish(start("-c", ON_A_MESH, devices=4))
    told = json.loads(printed.splitlines()[-1])
    assert [x.split()[0] for x in told] == ["q", "k", "v", "v"]
    assert all("use jax.sharding.reshard" in x for x in told)


# Transformations

TRANSFORMED = [pytest.param(name, marks=pytest.mark.slow if name in INTERPRETED else ()) for name in IMPLEMENTATIONS]
TOGETHER = [[True] * 7, [True, False] * 3 + [True]]
ALONE = [[place == one for place in range(7)] for one in range(7)]


@pytest.mark.usefixtures("kernels_are_interpreted")
@pytest.mark.parametrize(
    ("implementation", "masks"),
    [
        *((name, TOGETHER[:1]) for name in IMPLEMENTATIONS[:2]),
        *(pytest.param(name, TOGETHER, marks=pytest.mark.slow) for name in INTERPRETED),
        pytest.param("xla", [TOGETHER[1], *ALONE], marks=pytest.mark.slow),
    ],
)
def test_every_argument_alone_and_all_together_may_be_mapped(implementation, masks):
    def loss(q, k, v, n_q, n_k, score, epsilon):
        spec = dataclasses.replace(BINNED, epsilon=epsilon, base_steps=1)
        out, info = sinkhorn_attention(q, k, v, spec, n_q, n_k, score, implementation)
        return (out**2).sum() + info.f.sum()

    first, second = (
        [*map(jnp.asarray, arrays(seed=seed)), jnp.array(n), jnp.array(n[::-1]), jnp.array([s, 0.3]), jnp.float32(s)]
        for seed, n, s in ((0, [12, 7], 0.5), (1, [3, 12], 1.5))
    )
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 5, 6)))
    alone = run(*first)
    for mapped in masks:
        given = [jnp.stack([x, y]) if m else x for x, y, m in zip(first, second, mapped, strict=True)]
        results = jax.jit(jax.vmap(run, [0 if m else None for m in mapped]))(*given)
        assert_same(jax.tree.map(lambda x: x[0], results), alone, 2e-4)
        other = run(*(y if m else x for x, y, m in zip(first, second, mapped, strict=True)))
        assert_same(jax.tree.map(lambda x: x[1], results), other, 2e-4)


@pytest.mark.usefixtures("kernels_are_interpreted")
@pytest.mark.parametrize("implementation", TRANSFORMED)
def test_checkpoint_and_nested_maps(implementation):
    def loss(q, k, v, n):
        return (sinkhorn_attention(q, k, v, SPEC, n, n, implementation=implementation)[0] ** 2).sum()

    given = *map(jnp.asarray, arrays()), jnp.asarray(LENGTHS)
    pull_back = jax.jit(jax.grad(loss, (0, 1, 2)))
    expected = pull_back(*given)
    if implementation != "pallas_tpu":  # JAX refuses the effects of its interpreter there, see below
        assert_same(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*given), expected, 1e-5)
    q, *rest = given
    nested = jax.vmap(jax.vmap(pull_back, (0, None, None, None)), (None, None, None, 0))
    results = jax.jit(nested)(jnp.stack([q, 2 * q]), *rest[:2], jnp.stack([rest[2], rest[2][::-1]]))
    assert_same(jax.tree.map(lambda x: x[0, 0], results), expected, 2e-4)
    assert_same(jax.tree.map(lambda x: x[1, 1], results), pull_back(2 * q, *rest[:2], rest[2][::-1]), 2e-4)


def test_checkpoint_takes_the_kernels_of_a_tpu():
    """They are traced and not run, once more for the backward pass."""

    def loss(q, k, v):
        return (sinkhorn_attention(q, k, v, SPEC, implementation="pallas_tpu")[0] ** 2).sum()

    given = [*map(jnp.asarray, arrays())]
    texts = (str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*given)) for f in (loss, jax.checkpoint(loss)))
    kept, made_again = (text.count("name=forward_kernel") for text in texts)
    assert kept == 1 and made_again == 2
