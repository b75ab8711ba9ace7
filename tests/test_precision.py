"""Errors of float32 and bfloat16 in relation to the dense reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, sinkhorn_attention
from tests.support.conformance import (
    CASES,
    DUSTBINS,
    EPS,
    IMPLEMENTATIONS,
    INTERPRETED,
    Case,
    attend_and_pull_back,
    error,
    few_steps,
    inputs,
)

pytestmark = pytest.mark.usefixtures("float64", "kernels_are_interpreted")


@pytest.mark.parametrize("dustbin", DUSTBINS)
@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param("xla", CASES[1], id=f"xla-{CASES[1].name}"),
        *(
            pytest.param(name, CASES[i], id=f"{name}-{CASES[i].name}", marks=pytest.mark.slow)
            for name, i in (("xla", 0), ("xla", 5), ("pallas_tpu", 5))
        ),
    ],
)
def test_float32_error_is_that_of_the_dense_reference(implementation, dustbin, case):
    """At most 2 x the dense reference's own float32 error, plus a few units in the last place."""
    spec = case.spec(dustbin=dustbin, **few_steps(implementation))
    exact = attend_and_pull_back("reference", spec, *inputs(case, dustbin))
    dense, actual = (
        attend_and_pull_back(name, spec, *inputs(case, dustbin, "float32"), optimised=True)
        for name in ("reference", implementation)
    )
    for name in exact.keys() - {"residual"}:
        assert error(actual[name], exact[name]) <= 2 * error(dense[name], exact[name]) + 32 * EPS["float32"], name


@pytest.mark.parametrize(
    "implementation", [pytest.param(x, marks=pytest.mark.slow if x in INTERPRETED else ()) for x in IMPLEMENTATIONS]
)
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


@pytest.mark.parametrize("base_steps", [0, 1])
def test_a_relaxed_tail_whose_scalings_leave_the_range_at_once_has_its_own_potentials(base_steps):
    """Scores of sd 300: a kernel begins from other potentials than those of the last step, and no step fits."""
    case = Case("sd 300", 24, 24, None, sd=300.0)
    spec = case.spec(dustbin="none", base_steps=base_steps, tail_steps=3, tau_a=0.9, tau_b=0.8)
    given = inputs(case, "none")
    exact, actual = (attend_and_pull_back(name, spec, *given, optimised=True) for name in ("reference", "xla"))
    for name in ("out", "f", "g", "dq", "dk", "dv"):
        assert error(actual[name], exact[name]) < 1e-9, name


SETTINGS = [("tail", "sinkhorn"), ("implicit", "sinkhorn"), ("implicit", "newton")]


@pytest.mark.parametrize(
    ("dustbin", "settings"),
    [
        pytest.param(
            dustbin, settings, id=", ".join((dustbin, *settings)), marks=() if n == m == 0 else pytest.mark.slow
        )
        for n, dustbin in enumerate(DUSTBINS)
        for m, settings in enumerate(SETTINGS)
    ],
)
def test_gradients_at_any_temperature_are_as_exact_as_the_reference(dustbin, settings):
    """Epsilon from 1e-3 to 1e3: potentials up to thousands, and gradients that are small differences of large sums.

    At most 2 x the dense reference's own float32 error. At rounding level that is chance: a few units in the last
    place of the sums that cancel are allowed, which are of the size of the scores' slope times keys and queries.
    """
    gradient, solver = settings
    rows, columns, width = 20, 18, 4
    lengths = jnp.array([rows]), jnp.array([columns - 3])
    for epsilon in (1e-3, 1e-2, 0.1, 1.0, 1e3):
        spec = SinkhornSpec(band=6, epsilon=epsilon, base_steps=20, dustbin=dustbin, gradient=gradient, solver=solver)
        errors: dict[str, list] = {}  # of the reference in float32, of xla, and the largest value; by problem
        for seed in range(3):
            rng = np.random.default_rng(seed)
            q, k, v = (rng.normal(size=(1, n, 1, width)).astype(np.float32) for n in (rows, columns, columns))
            cotangent, results = rng.normal(size=q.shape), []
            for implementation, dtype in (("reference", "float64"), ("reference", "float32"), ("xla", "float32")):
                score = None if dustbin == "none" else jnp.array([0.5], dtype)
                arrays = [x.astype(dtype) for x in (q, k, v)]
                results.append(attend_and_pull_back(implementation, spec, arrays, lengths, score, cotangent))
            exact, *rounded = (jax.device_get(x) for x in results)
            for name in exact.keys() - {"residual"}:
                of = *(np.abs(x[name] - exact[name]).max() for x in rounded), np.abs(exact[name]).max()
                errors.setdefault(name, []).append(of)
        slope = 1 / (epsilon * width**0.5)
        scales = {"dq": 30 * slope, "dk": 30 * slope, "dv": 10.0, "dscore": max(30.0, 10 * slope), "out": 1.0}
        for name, of in errors.items():
            own, found, size = np.mean(of, axis=0)
            if own > 0.1 * size > 0:  # the reference has no digit left, as after Newton steps at 1e-3
                continue
            assert found <= 2 * own + 8 * EPS["float32"] * max(scales.get(name, slope), size), (epsilon, name)
