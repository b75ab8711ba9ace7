"""One suite for every implementation: each is compared with the dense reference in float64.

Another implementation joins by its name in IMPLEMENTATIONS; what it cannot do it must refuse with UnsupportedError.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, support, transport_plan
from ot_attention.api import by_head
from ot_attention.backends import gpu_kernels, tpu
from ot_attention.backends.tpu_tiles import HeadTables, Sizes
from ot_attention.spec import Heads

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_gpu"]
INTERPRETED = ["pallas_tpu", "pallas_gpu"]
# Of the cases that compile for seconds each when interpreted, those that are in the quick suite.
QUICK_ON_GPU = ["ragged", "length 1 against many", "blocks, x longer", "empty problem", "sharp"]
PLAIN_ONLY = ["pallas_tpu"]  # neither Newton steps nor implicit gradients
DUSTBINS = ["none", "unit", "full"]
# Interpreted kernels run once: compiling them takes longer.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def few_steps(name: str) -> dict[str, int]:
    """Interpreted kernels take a second for every few steps."""
    return {"base_steps": 3} if name in INTERPRETED else {}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, true lengths (None: the padded ones) and scores of standard deviation `sd`."""

    name: str
    rows: int
    columns: int
    band: int | None
    q_lengths: tuple[int, ...] = ()
    k_lengths: tuple[int, ...] = ()
    sd: float = 1.0
    base_steps: int = 20
    tail_steps: int = 2
    width: int = 8
    dustbins: tuple[str, ...] = ("none", "full")

    def spec(self, **changes) -> SinkhornSpec:
        return SinkhornSpec(
            **{"band": self.band, "base_steps": self.base_steps, "tail_steps": self.tail_steps} | changes
        )


CASES = [
    Case("square", 40, 40, 8, dustbins=tuple(DUSTBINS)),
    Case("ragged", 48, 40, 6, (48, 31), (40, 17), dustbins=("unit",)),
    Case("full support", 24, 40, None, (24, 5), (40, 33)),
    Case("length 1", 1, 1, 64),
    Case("length 1 against many", 16, 300, 8, (1, 16), (300, 1)),
    Case("blocks", 400, 400, 16, (400, 213), (400, 251)),
    Case("blocks, x longer", 500, 300, 20, (500, 499), (300, 7), dustbins=("unit",)),
    Case("blocks, y longer", 300, 500, 16, (3, 300), (500, 477), dustbins=("full",)),
    Case("wide blocks", 700, 700, 70, (700, 650), (690, 700), dustbins=("none",)),
    Case("empty problem", 40, 40, 8, (0, 40), (40, 0)),
    Case("empty rows", 60, 60, 0, (60, 60), (30, 41)),
    Case("sharp", 64, 64, 8, sd=30.0, base_steps=5),
    Case("no base steps", 64, 64, 8, sd=30.0, base_steps=0, tail_steps=1),
    Case("long tail", 40, 36, 8, base_steps=3, tail_steps=5),
]


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)  # for all threads: interpreted kernels have their own
    yield
    jax.config.update("jax_enable_x64", False)


def small_memory(monkeypatch, mib: float) -> None:
    """Kernels believe in a chip of so little memory."""
    monkeypatch.setattr(tpu, "_vmem_capacity", lambda: int(mib * 2**20))


@pytest.fixture(autouse=True)
def kernels_are_interpreted(request, capfd, monkeypatch):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") == "pallas_gpu":  # TPUs' interpreter would take these too
        monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def inputs(case: Case, dustbin: str, dtype="float64", seed=0):
    """q, k, v with NaN and inf as padding, lengths, dustbin score, cotangent; batch of 2, 2 heads."""
    rng = np.random.default_rng(seed)
    n_q, n_k = (
        np.array(n or (size, size)) for n, size in ((case.q_lengths, case.rows), (case.k_lengths, case.columns))
    )
    q = rng.normal(size=(2, case.rows, 2, case.width)) * case.sd
    k, v = (rng.normal(size=(2, case.columns, 2, width)) for width in (case.width, 5))
    cotangent = rng.normal(size=(2, case.rows, 2, 5))
    for b in range(2):
        q[b, n_q[b] :], k[b, n_k[b] :], v[b, n_k[b] :] = np.nan, np.inf, np.nan
        cotangent[b, n_q[b] :] = np.nan  # what comes back through padding must not matter either
    score = None if dustbin == "none" else jnp.array([0.5, -1.0], dtype)
    return [jnp.asarray(x, dtype) for x in (q, k, v)], (jnp.asarray(n_q), jnp.asarray(n_k)), score, cotangent


def attend_and_pull_back(implementation, spec, arrays, lengths, score, cotangent):
    """Output, potentials, residual, and gradients of q, k, v and the dustbin score, also through the potentials."""

    def run(q, k, v, score):
        out, info = sinkhorn_attention(q, k, v, spec, *lengths, score, implementation)
        return (out, info.f, info.g), info.residual

    interpreted = implementation in INTERPRETED and (implementation != "pallas_gpu" or gpu_kernels.INTERPRET)

    @functools.partial(jax.jit, compiler_options=QUICK if interpreted else None)
    def run_and_pull_back(*arrays):
        (out, f, g), pull_back, residual = jax.vjp(run, *arrays, has_aux=True)
        of_f = jnp.cos(jnp.arange(f.size)).reshape(f.shape).astype(f.dtype)
        gradients = pull_back((jnp.asarray(cotangent, out.dtype), of_f, jnp.full_like(g, 0.1)))
        return {"out": out, "f": f, "g": g, "residual": residual} | {
            name: x for name, x in zip(("dq", "dk", "dv", "dscore"), gradients, strict=True) if x is not None
        }

    return run_and_pull_back(*arrays, score)


def error(actual, expected, least_scale=1.0) -> float:
    """Largest deviation, relative to the largest value or to `least_scale`: residuals are near 0."""
    scale = max(least_scale, float(np.abs(expected).max(initial=0)))
    return float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected)).max(initial=0)) / scale


def against_reference(
    implementation: str, case: Case, dustbin: str, dtype: str, **settings
) -> dict[str, tuple[float, float]]:
    """For every result the error against the reference in float64, computed on the CPU, and the error allowed.

    Allowed is twice the larger of the errors of the dense reference and of "xla" in the same dtype. Needs no x64 mode:
    it is switched on for the reference alone, and in this thread alone.
    """
    spec, (arrays, *rest) = case.spec(dustbin=dustbin, **settings), inputs(case, dustbin, dtype)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        given = [np.asarray(x, np.float64) for x in arrays], *jax.device_get(rest)
        exact = jax.device_get(attend_and_pull_back("reference", spec, *given))
    others = [attend_and_pull_back(name, spec, arrays, *rest) for name in ("reference", "xla")]
    actual = attend_and_pull_back(implementation, spec, arrays, *rest)
    found = {}
    for name in exact.keys() - {"residual"}:
        allowed = 2 * max(error(other[name], exact[name]) for other in others) + 32 * EPS["float32"]
        found[name] = error(actual[name], exact[name]), allowed
    return found


def cases(name: str) -> list:
    """All cases with all dustbins that they are for; interpreted kernels have one of each in the quick suite."""
    quick = name not in INTERPRETED

    def in_quick_suite(number: int, case: Case, dustbin: str) -> bool:
        here = quick or dustbin == case.dustbins[number % len(case.dustbins)]
        return here and (name != "pallas_gpu" or case.name in QUICK_ON_GPU)

    return [
        pytest.param(
            *(name, case, dustbin),
            id=f"{name}-{case.name}, {dustbin}",
            marks=() if in_quick_suite(number, case, dustbin) else pytest.mark.slow,
        )
        for number, case in enumerate(CASES)
        for dustbin in case.dustbins
    ]


def assert_same_as_reference(implementation, spec, *arguments, tolerance=1e-10):
    expected, actual = (attend_and_pull_back(name, spec, *arguments) for name in ("reference", implementation))
    for name, value in expected.items():
        assert np.isfinite(value).all(), name
        assert error(actual[name], value) < tolerance, name


@pytest.mark.parametrize(
    ("implementation", "case", "dustbin"), [c for name in IMPLEMENTATIONS[1:] for c in cases(name)]
)
def test_same_numbers_as_the_reference_in_float64(implementation, case, dustbin):
    if case.base_steps > 3:
        case = dataclasses.replace(case, **few_steps(implementation))
    assert_same_as_reference(implementation, case.spec(dustbin=dustbin), *inputs(case, dustbin))


@pytest.mark.parametrize("number", [4, 7, 11, 12], ids=lambda n: CASES[n].name)
def test_a_band_that_does_not_fit_on_the_chip_is_made_anew_in_every_step(number, monkeypatch):
    case, dustbin = CASES[number], CASES[number].dustbins[-1]
    case = dataclasses.replace(case, base_steps=min(case.base_steps, 3))
    arguments = inputs(case, dustbin)
    spec = case.spec(dustbin=dustbin)
    heads = heads_of(arguments)
    sizes = Sizes.create(heads, spec)
    without_tiles = tpu._Blocks.backward(heads, spec, sizes).bytes(1) / 2**20
    small_memory(monkeypatch, without_tiles + 0.01)
    assert tpu._memory(tpu._Blocks.backward(heads, spec, sizes), sizes, (jnp.float64,)).holding is None
    assert_same_as_reference("pallas_tpu", spec, *arguments)


def heads_of(arguments, dtype=None) -> Heads:
    (q, k, v), (n_q, n_k), score, _ = arguments
    q, k, v = (x.astype(dtype or x.dtype) for x in (q, k, v))
    return by_head(q, k, v, jnp.zeros(2) if score is None else score, n_q, n_k)


def test_rounded_tiles_cost_no_more_than_rounded_queries_and_keys(monkeypatch):
    """The error budget of bfloat16 tiles: where float32's do not fit, and for bfloat16 queries and keys only."""
    case = CASES[5]
    spec = case.spec(dustbin="full", base_steps=5)
    arrays, lengths, score, cotangent = inputs(case, "full")
    rounded = [x.astype("bfloat16") for x in arrays]
    heads = heads_of((rounded, lengths, score, cotangent))
    sizes = Sizes.create(heads, spec)
    blocks = tpu._Blocks.forward(heads, spec, sizes)
    small_memory(monkeypatch, (blocks.bytes(1) + 3 * sizes.tiles * 128 * 128) / 2**20)  # 2 bytes a score, not 4
    assert tpu._memory(blocks, sizes, tpu._tile_dtypes(heads)).holding == jnp.bfloat16
    assert tpu._tile_dtypes(heads_of((arrays, lengths, score, cotangent), "float32")) == (jnp.float32,)

    def potentials(name, arrays):
        run = jax.jit(lambda *x: sinkhorn_attention(*x, spec, *lengths, score, name)[1], compiler_options=QUICK)
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


CONVERGING = {"base_steps": 5, "solver": "newton", "gradient": "implicit"}
SETTINGS = [pytest.param(name, few_steps(name), id=name) for name in IMPLEMENTATIONS] + [
    pytest.param(name, CONVERGING, id=f"{name}, converging") for name in IMPLEMENTATIONS if name not in PLAIN_ONLY
]


@pytest.mark.parametrize(
    ("implementation", "case", "dustbin"),
    [
        pytest.param(
            *(name, case, case.dustbins[0]),
            id=f"{name}-{case.name}, {case.dustbins[0]}",
            marks=pytest.mark.slow if case.name != "ragged" and (name in INTERPRETED or n % 2) else (),
        )
        for name in IMPLEMENTATIONS[1:]
        if name not in PLAIN_ONLY
        for n, case in enumerate(CASES)
    ],
)
def test_newton_and_implicit_gradient_are_those_of_the_reference(implementation, case, dustbin):
    """Both go through the same linear solver; products and everything around it are the implementation's own."""
    arguments = case.spec(dustbin=dustbin, **CONVERGING), *inputs(case, dustbin)
    assert_same_as_reference(implementation, *arguments, tolerance=1e-8)


@pytest.mark.parametrize(
    ("implementation", "seed"),
    [
        pytest.param(name, seed, marks=pytest.mark.slow if seed > (name == "xla") or name == "pallas_gpu" else ())
        for name in IMPLEMENTATIONS[1:]
        for seed in range(4)
    ],
)
def test_random_shapes_lengths_and_bands(implementation, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 400, 2).tolist()
    lengths = [tuple(rng.integers(0, size + 1, 2).tolist()) for size in (rows, columns)]
    case = Case("random", rows, columns, int(rng.integers(0, 40)), *lengths, rng.uniform(0.1, 5))
    case = dataclasses.replace(case, **few_steps(implementation))
    dustbin = DUSTBINS[seed % 3]
    arguments = case.spec(dustbin=dustbin), *inputs(case, dustbin, seed=seed)
    assert_same_as_reference(implementation, *arguments)


@pytest.mark.parametrize("dustbin", DUSTBINS)
@pytest.mark.parametrize(
    ("implementation", "case"),
    [pytest.param("xla", CASES[i], id=f"xla-{CASES[i].name}") for i in (0, 1, 5)]
    + [pytest.param("pallas_tpu", CASES[5], id="pallas_tpu-blocks", marks=pytest.mark.slow)],
)
def test_float32_error_is_that_of_the_dense_reference(implementation, dustbin, case):
    """At most 2 x the dense reference's own float32 error, plus a few units in the last place."""
    spec = case.spec(dustbin=dustbin, **few_steps(implementation))
    exact = attend_and_pull_back("reference", spec, *inputs(case, dustbin))
    dense, actual = (
        attend_and_pull_back(name, spec, *inputs(case, dustbin, "float32")) for name in ("reference", implementation)
    )
    for name in exact.keys() - {"residual"}:
        assert error(actual[name], exact[name]) <= 2 * error(dense[name], exact[name]) + 32 * EPS["float32"], name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_are_computed_in_float32(implementation):
    case, spec = CASES[1], CASES[1].spec(dustbin="full", **few_steps(implementation))
    arrays, lengths, score, cotangent = inputs(case, "full", "bfloat16")
    actual = attend_and_pull_back(implementation, spec, arrays, lengths, score, cotangent)
    assert actual["out"].dtype == actual["dq"].dtype == jnp.bfloat16
    assert actual["f"].dtype == jnp.float32
    exact = attend_and_pull_back("reference", spec, [x.astype("float64") for x in arrays], lengths, score, cotangent)
    for name in ("f", "g"):
        assert error(actual[name], exact[name]) < 64 * EPS["float32"], name
    for name in ("out", "dq", "dk", "dv"):
        assert error(actual[name], exact[name]) < 2.0**-7, name


def test_tail_gradient_equals_finite_differences_of_the_surrogate():
    """Independent of automatic differentiation: the potentials after T steps are frozen by hand."""
    case = Case("small", 7, 6, 3)
    arrays, lengths, score, cotangent = inputs(case, "full")
    q, k, v = arrays
    base = case.spec(dustbin="full", base_steps=19, tail_steps=1)
    _, info = sinkhorn_attention(q, k, v, base, *lengths, score, "reference")

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

    dq, dscore = jax.grad(loss, (0, 1))(q, score)
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
    [pytest.param(*s.values, id=s.id, marks=pytest.mark.slow if s.values[0] in INTERPRETED else ()) for s in SETTINGS],
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
    [s for s in SETTINGS if "pallas_gpu" not in s.values],  # its interpreter cannot: it is lowered in test_gpu.py
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


def test_sharp_scores_in_float32_stay_exact():
    """Scores of sd 30 and epsilon 0.05: scalings leave float32's range and are folded into the potentials."""
    for case, epsilon in ((Case("sd 30", 256, 256, 16, sd=30.0), 1.0), (Case("epsilon", 256, 250, 16, sd=1.5), 0.05)):
        arrays, lengths, score, _ = inputs(case, "full")
        spec = case.spec(dustbin="full", epsilon=epsilon)
        exact, _ = sinkhorn_attention(*arrays, spec, *lengths, score, "reference")
        single = [[x.astype("float32") for x in arrays], score.astype("float32")]
        dense, banded = (
            sinkhorn_attention(*single[0], spec, *lengths, single[1], name)[0] for name in ("reference", "xla")
        )
        assert error(banded, exact) <= 2 * error(dense, exact) + 32 * EPS["float32"]


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
    """Of the compiled gradient."""
    run = jax.grad(lambda x: sinkhorn_attention(x, x, x, spec, implementation="xla")[0].sum())
    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("settings", [{}, CONVERGING], ids=["plain", "converging"])
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


def test_sequences_that_do_not_fit_on_the_chip_are_refused():
    x = jax.ShapeDtypeStruct((1, 40000, 1, 128), jnp.float32)
    with pytest.raises(UnsupportedError, match="take 111 MiB of VMEM, which has 56 for them; use shorter"):
        jax.eval_shape(lambda x: sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu"), x)
    x = jax.ShapeDtypeStruct((512, 4096, 8, 8), jnp.float32)
    with pytest.raises(UnsupportedError, match="4096 heads of 32 groups of rows take 2112 KiB of scalar memory"):
        jax.eval_shape(lambda x: sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu"), x)


def test_unrolled_gradient_is_that_of_all_steps():
    arrays, lengths, _, cotangent = inputs(CASES[0], "none")

    def gradient(**changes):
        spec = CASES[0].spec(**changes)
        return jax.grad(lambda q: (sinkhorn_attention(q, *arrays[1:], spec, *lengths)[0] * cotangent).sum())(arrays[0])

    unrolled = gradient(base_steps=4, tail_steps=2, gradient="unrolled")
    assert error(unrolled, gradient(base_steps=0, tail_steps=6)) < 1e-12
    assert error(unrolled, gradient(base_steps=4, tail_steps=2)) > 1e-3
