"""Sequences that devices share have the numbers of whole ones, and only neighbours exchange; segments keep apart."""

import functools
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, transport_plan
from tests.support import sequence_axis
from tests.support.processes import finish, start

QUICK = list(sequence_axis.CASES)[:9]
SLOW = list(sequence_axis.CASES)[9:]
# Sums are added up in another order. In float32, the largest errors were 2e-6, in bfloat16 one rounding of an output.
WITHIN = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.0**-7}
ONE = functools.partial(jax.make_mesh, (1,), ("chips",), axis_types=(AxisType.Auto,))
X = np.random.default_rng(0).normal(size=(2, 40, 2, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def quick() -> dict:
    return measured(QUICK)


@pytest.fixture(scope="module")
def slow() -> dict:
    return measured(SLOW)


def measured(names: list[str]) -> dict:
    [printed] = finish(start("-m", "tests.support.sequence_axis", *names, devices=8))
    return {found["case"]: found["errors"] for found in map(json.loads, printed.splitlines())}


@pytest.mark.parametrize("name", QUICK)
def test_shared_sequences_have_the_numbers_of_whole_ones(name, quick):
    check(name, quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_shared_sequences_have_the_numbers_of_whole_ones_in_more_cases(name, slow):
    check(name, slow[name])


def check(name: str, errors: dict) -> None:
    dtype = sequence_axis.CASES[name].dtype
    assert {"out", "f", "g", "residual", "dq", "dk", "dv"} <= errors.keys()
    assert errors["steps"] == 0
    assert {of: error for of, error in errors.items() if not error <= WITHIN[dtype]} == {}


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from ot_attention import SinkhornSpec, sinkhorn_attention

mesh = jax.make_mesh((8,), ("chips",), axis_types=(AxisType.Auto,))
spec, by_place = SinkhornSpec(band=32, dustbin="full"), P(None, "chips")

def attend(q, k, v, score):
    return sinkhorn_attention(q, k, v, spec, dustbin_score=score, implementation="xla", sequence_axis="chips")[0]

shared = jax.shard_map(attend, mesh=mesh, in_specs=(by_place,) * 3 + (P(),), out_specs=by_place)
x, score = jax.ShapeDtypeStruct((1, 1024, 3, 16), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
print(jax.jit(shared).lower(x, x, x, score).compile().as_text())
"""


def test_neighbours_exchange_two_messages_of_the_bands_width_a_half_step(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    [text] = finish(start(tmp_path / "program.py", devices=8))
    exchanged = re.compile(r"= (\w+\[[\d,]*\])\S* (all-\w+|collective-\w+|reduce-scatter|ragged\S*)\(")
    by_computation = [exchanged.findall(part) for part in re.split(r"\n\}", text)]
    everything = Counter(found for part in by_computation for found in part)
    # Messages of three heads: W potentials, or W keys and values; and single numbers over all devices.
    allowed = {
        "collective-permute": {"f32[3,32]", "f32[3,32,16]"},
        "all-reduce": {"f32[3,1]", "f32[3]", "s32[]", "s32[1]"},
    }
    assert {found for found in everything if found[0] not in allowed.get(found[1], set())} == set()
    assert everything["f32[3,32,16]", "collective-permute"] == 4  # keys and values, once
    # A loop over steps by scaling: row sums and column sums, the dustbin's two, and whether all devices can go on.
    step = Counter({("f32[3,32]", "collective-permute"): 4, ("f32[3,1]", "all-reduce"): 2, ("s32[]", "all-reduce"): 1})
    assert step in [Counter(part) for part in by_computation]


def test_the_example_of_the_documents_is_the_same_on_four_devices(tmp_path):
    page = (Path(__file__).parents[1] / "docs/attention.md").read_text()
    [code] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "sequence_axis" in code]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    code = code.replace("256 * jax.device_count()", "512")
    (tmp_path / "example.py").write_text(f"{code}\nprint(value, abs(gradient).sum())")
    program = tmp_path / "example.py"
    found = [list(map(float, text.split())) for text in finish(*(start(program, devices=n) for n in (1, 4)))]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def shared(spec, *more, length=None, **options):
    """Call the attention of one device, as if it shared the sequence."""
    options = {"sequence_axis": "chips"} | options

    def attend(x):
        return sinkhorn_attention(x, x[:, :length], x[:, :length], spec, *more, **options)[0]

    return jax.shard_map(attend, mesh=ONE(), in_specs=P(None, "chips"), out_specs=P(None, "chips"), check_vma=False)(X)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: shared(SinkhornSpec(band=None)), ValueError, "spec.band=None reaches beyond the neighbours"),
        (lambda: shared(SinkhornSpec(band=41)), ValueError, "at most one share, 40"),
        (lambda: shared(SinkhornSpec(band=8), sequence_axis="rows"), ValueError, "here are: chips"),
        (lambda: shared(SinkhornSpec(band=8), length=30), ValueError, "q has length 40, k must have it, not 30"),
        (
            lambda: shared(SinkhornSpec(band=8), np.array([40, 3]), np.array([40, 4])),
            ValueError,
            "k_lengths must be q_lengths, or left out",
        ),
        (
            lambda: shared(SinkhornSpec(band=8), implementation="reference"),
            UnsupportedError,
            "'reference' cannot do this: it is dense",
        ),
        (
            lambda: shared(SinkhornSpec(band=8, gradient="implicit"), implementation="pallas_tpu"),
            UnsupportedError,
            "its kernels have the tail's gradient only",
        ),
        (
            lambda: sinkhorn_attention(X, X, X, SinkhornSpec(), sequence_axis="chips"),
            ValueError,
            "must be an axis of a mesh inside jax.shard_map; here are: none",
        ),
        (
            lambda: sinkhorn_attention(X, X, X, SinkhornSpec(), segment_ids=np.zeros((2, 39), int)),
            ValueError,
            r"segment_ids has shape \(2, 39\) and dtype int64; it must be \(2, 40\) integers",
        ),
        (
            lambda: attend_segments(SinkhornSpec(dustbin="full"), dustbin_score=0.0),
            UnsupportedError,
            "segment_ids cannot be kept apart with spec.dustbin='full'",
        ),
        (
            lambda: attend_segments(SinkhornSpec(), row_weights=np.ones((2, 40))),
            UnsupportedError,
            "weights that are balanced",
        ),
        (lambda: attend_segments(SinkhornSpec(gradient="implicit")), UnsupportedError, "use tau_a or tau_b below 1"),
    ],
)
def test_what_cannot_be_shared_or_kept_apart_is_refused_by_name(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_lengths_that_differ_where_jax_traces_them_make_an_example_nan():
    attend = jax.jit(lambda n, m: sinkhorn_attention(X, X, X, SinkhornSpec(), n, m, segment_ids=SEGMENTS)[0])
    out = attend(jnp.array([40, 30]), jnp.array([40, 31]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).any()


SEGMENTS = np.repeat([[3, 1, 3, 2]], [7, 1, 22, 10], axis=1).repeat(2, axis=0)
PARTS = ((0, 7), (7, 8), (8, 30), (30, 40))


def attend_segments(spec, **options):
    return sinkhorn_attention(X, X, X, spec, segment_ids=SEGMENTS, **options)


def output_and_gradient(implementation, band, first=0, end=40, ids=None):
    """Output of a part of the rows, and the gradient of the sum of its squares."""
    spec = SinkhornSpec(band=band, base_steps=3, tau_a=0.9, tau_b=0.8)

    def loss(x):
        x = x[:, first:end]
        out, _ = sinkhorn_attention(x, x, x, spec, implementation=implementation, segment_ids=ids)
        return (out**2).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(X))
    return out, gradient[:, first:end]


@pytest.mark.parametrize("band", [4, None])
def test_each_segment_is_a_sequence_of_its_own(band):
    out, gradient = output_and_gradient("reference", band, ids=SEGMENTS)
    for first, end in PARTS:
        expected = output_and_gradient("reference", band, first, end)
        np.testing.assert_allclose(out[:, first:end], expected[0], atol=2e-6)
        np.testing.assert_allclose(gradient[:, first:end], expected[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("implementation", "band"),
    [
        ("xla", 4),
        ("xla", 13),
        ("xla", None),
        ("pallas_gpu", 13),
        pytest.param("pallas_tpu", 13, marks=pytest.mark.slow),
    ],
)
def test_all_implementations_keep_segments_apart(implementation, band, kernels_are_interpreted):
    expected = output_and_gradient("reference", band, ids=SEGMENTS)
    for found, exact in zip(output_and_gradient(implementation, band, ids=SEGMENTS), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=2e-5)


def test_plans_of_segments_have_blocks():
    plan = transport_plan(X, X, SinkhornSpec(band=None), segment_ids=SEGMENTS)
    same = np.zeros((40, 40), bool)
    for first, end in PARTS:
        same[first:end, first:end] = True
    assert ((np.asarray(plan) > 0) == same).all()
    np.testing.assert_allclose(plan.sum(-2), 1, atol=1e-5)
