"""Every implementation against the dense reference in float64, on the cases of tests/support/conformance.py."""

import dataclasses

import numpy as np
import pytest

from ot_attention import UnsupportedError
from tests.support.conformance import (
    CASES,
    CONVERGING,
    DUSTBINS,
    IMPLEMENTATIONS,
    INTERPRETED,
    PLAIN_ONLY,
    Case,
    assert_same_as_reference,
    few_steps,
)

pytestmark = pytest.mark.usefixtures("float64", "kernels_are_interpreted")

# Of the kernels that compile for 10 seconds each when interpreted, the cases in the quick suite.
QUICK = {"pallas_tpu": ["ragged", "empty problem"], "pallas_gpu": ["blocks, x longer"]}


def cases(name: str) -> list:
    """All cases with all dustbins that they are for; the quick suite has one dustbin of each."""

    def in_quick_suite(number: int, case: Case, dustbin: str) -> bool:
        return dustbin == case.dustbins[number % len(case.dustbins)] and case.name in QUICK.get(name, [case.name])

    return [
        pytest.param(
            *(name, case, dustbin),
            id=f"{name}-{case.name}, {dustbin}",
            marks=() if in_quick_suite(number, case, dustbin) else pytest.mark.slow,
        )
        for number, case in enumerate(CASES)
        for dustbin in case.dustbins
    ]


@pytest.mark.parametrize(
    ("implementation", "case", "dustbin"), [c for name in IMPLEMENTATIONS[1:] for c in cases(name)]
)
def test_same_numbers_as_the_reference_in_float64(implementation, case, dustbin):
    if case.base_steps > 3:
        case = dataclasses.replace(case, **few_steps(implementation))
    assert_same_as_reference(implementation, case, dustbin)


@pytest.mark.parametrize(
    ("implementation", "case", "dustbin"),
    [
        pytest.param(
            *(name, case, case.dustbins[0]),
            id=f"{name}-{case.name}, {case.dustbins[0]}",
            marks=() if (name, case.name) == ("xla", "blocks, x longer") else pytest.mark.slow,
        )
        for name in IMPLEMENTATIONS[1:]
        if name not in PLAIN_ONLY
        for case in CASES
    ],
)
def test_newton_and_implicit_gradient_are_those_of_the_reference(implementation, case, dustbin):
    """Both go through the same linear solver; products and everything around it are the implementation's own."""
    assert_same_as_reference(implementation, case, dustbin, within=1e-8, **CONVERGING)


RELAXED = [
    ("ragged", "unit", {"tau_a": 0.9, "tau_b": 0.6}),
    ("blocks", "full", {"tau_a": 0.3, "tau_b": 1.0, "tolerance": 1e-3}),
    ("square", "none", {"tolerance": 1e-2, "base_steps": 20}),
    ("square", "full", {"tau_a": 1.0, "tau_b": 0.0}),
    ("empty rows", "none", {"tau_a": 0.0, "tau_b": 1.0}),
    ("sharp", "none", {"tau_a": 0.5, "tau_b": 0.95}),
    ("blocks, x longer", "unit", {"tau_a": 0.95, "tau_b": 0.95, **CONVERGING}),
    ("full support", "none", {**CONVERGING}),
]


def relaxed_cases() -> list:
    """All with and without weights; the quick suite has weights, and one case of interpreted kernels."""

    def is_quick(implementation: str, n: int, weighted: bool) -> bool:
        return weighted and (implementation == "xla" or (implementation == "pallas_gpu" and n == 0))

    return [
        pytest.param(
            *(implementation, *case, weighted),
            id=f"{implementation}-{case[0]}, {case[1]}, {', '.join(case[2])}{', weights' * weighted}",
            marks=() if is_quick(implementation, n, weighted) else pytest.mark.slow,
        )
        for implementation in IMPLEMENTATIONS[1:]
        for n, case in enumerate(RELAXED)
        for weighted in (True, False)
    ]


@pytest.mark.parametrize(("implementation", "name", "dustbin", "changes", "weighted"), relaxed_cases())
def test_relaxed_marginals_weights_and_early_ends_are_those_of_the_reference(
    implementation, name, dustbin, changes, weighted
):
    if implementation in INTERPRETED:
        changes = {"base_steps": 3, **changes}
    (case,) = (case for case in CASES if case.name == name)
    within = 1e-8 if "gradient" in changes else 1e-10
    try:
        assert_same_as_reference(implementation, case, dustbin, within=within, weighted=weighted, **changes)
    except UnsupportedError as error:
        assert implementation == "pallas_tpu" and "use" in str(error)
        pytest.skip(f"refused by name: {error}")


@pytest.mark.parametrize(
    ("implementation", "seed"),
    [
        pytest.param(name, seed, marks=() if name == "xla" and seed < 2 else pytest.mark.slow)
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
    assert_same_as_reference(implementation, case, dustbin, seed)
