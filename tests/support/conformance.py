"""Cases of attention, and the comparison of an implementation with the dense reference in float64.

Another implementation joins by its name in IMPLEMENTATIONS; what it cannot do it must refuse with UnsupportedError.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ot_attention import SinkhornSpec, sinkhorn_attention

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_gpu"]
INTERPRETED = ["pallas_tpu", "pallas_gpu"]
PLAIN_ONLY = ["pallas_tpu"]  # neither Newton steps nor implicit gradients
DUSTBINS = ["none", "unit", "full"]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
CONVERGING = {"base_steps": 5, "solver": "newton", "gradient": "implicit"}
# What users run: the suite otherwise compiles without optimisation (tests/conftest.py).
_OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


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


def weights(case: Case, seed=0):
    """Weights of rows and of columns, with NaN as padding."""
    rng, (_, lengths, *_) = np.random.default_rng(seed), inputs(case, "none")
    drawn = [rng.uniform(0.5, 2, (2, size)) for size in (case.rows, case.columns)]
    for x, n in zip(drawn, lengths, strict=True):
        x[np.arange(x.shape[1]) >= np.asarray(n)[:, None]] = np.nan
    return tuple(map(jnp.asarray, drawn))


def attend_and_pull_back(
    implementation, spec, arrays, lengths, score, cotangent, *, weights=(None, None), optimised=False
):
    """Output, potentials, residual, steps, and gradients of q, k, v, the dustbin score and weights.

    Gradients are also through the potentials.
    """
    # Tests change what kernels are traced to: only programs without kernels are kept.
    program = _program.__wrapped__ if implementation in INTERPRETED else _program
    return program(implementation, spec, optimised)(tuple(arrays), (score, *weights), lengths, cotangent)


@functools.cache
def _program(implementation: str, spec: SinkhornSpec, optimised: bool):
    """Make the program of `attend_and_pull_back`, compiled once for all lengths of a shape and dtype."""

    def run(q, k, v, score, row_weights, column_weights, lengths):
        out, info = sinkhorn_attention(
            q, k, v, spec, *lengths, score, implementation, row_weights=row_weights, column_weights=column_weights
        )
        return (out, info.f, info.g), {"residual": info.residual, "steps": info.steps}

    @functools.partial(jax.jit, compiler_options=_OPTIMISED if optimised else None)
    def run_and_pull_back(arrays, more, lengths, cotangent):
        (out, f, g), pull_back, others = jax.vjp(lambda *x: run(*x, lengths), *arrays, *more, has_aux=True)
        of_f = jnp.cos(jnp.arange(f.size)).reshape(f.shape).astype(f.dtype)
        gradients = pull_back((jnp.asarray(cotangent, out.dtype), of_f, jnp.full_like(g, 0.1)))
        names = "dq", "dk", "dv", "dscore", "dweights of rows", "dweights of columns"
        return {"out": out, "f": f, "g": g, **others} | {
            name: x for name, x in zip(names, gradients, strict=True) if x is not None
        }

    return run_and_pull_back


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
    for name in exact.keys() - {"residual", "steps"}:
        allowed = 2 * max(error(other[name], exact[name]) for other in others) + 32 * EPS["float32"]
        found[name] = error(actual[name], exact[name]), allowed
    return found


def assert_same_as_reference(
    implementation, case: Case, dustbin: str, seed=0, within=1e-10, weighted=False, **changes
) -> None:
    """Compare all results on a case; the reference's are kept for the next implementation."""
    spec = case.spec(dustbin=dustbin, **changes)
    given = {"weights": weights(case, seed)} if weighted else {}
    actual = attend_and_pull_back(implementation, spec, *inputs(case, dustbin, seed=seed), **given)
    for name, value in _exact(case, spec, dustbin, seed, weighted).items():
        assert np.isfinite(value).all(), name
        assert error(actual[name], value) < within, name


@functools.cache
def _exact(case: Case, spec: SinkhornSpec, dustbin: str, seed: int, weighted: bool) -> dict[str, np.ndarray]:
    given = {"weights": weights(case, seed)} if weighted else {}
    return jax.device_get(attend_and_pull_back("reference", spec, *inputs(case, dustbin, seed=seed), **given))
