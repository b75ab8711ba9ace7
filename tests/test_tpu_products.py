"""The TPU's products of a matrix that is never stored, interpreted, beside dense products."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, support
from ot_attention.api import by_head
from ot_attention.axes import ALONE
from ot_attention.backends import registry, tpu_band
from ot_attention.kernel import Kernel
from tests.support import conformance, sequence_axis
from tests.support.processes import finish, start
from tests.test_tpu import run

pytestmark = pytest.mark.usefixtures("kernels_are_interpreted")
ROWS = 200


def matrices(dtype: str):
    """A kernel by the band, and the same matrix dense; 2 heads, 200 and 150 residues, the first in two segments."""
    rng, n = np.random.default_rng(0), jnp.array([ROWS, 150])
    q, k = (jnp.asarray(rng.normal(size=(2, ROWS, 16)), dtype) for _ in range(2))
    f, g = (jnp.asarray(rng.normal(size=(2, ROWS + 1)), "float32") for _ in range(2))
    ids = jnp.asarray(np.stack([np.arange(ROWS) >= 70, np.zeros(ROWS)]), jnp.int32)
    segments = support.segments_of(ids, ALONE, 40)
    layout = support.Layout.of(n, n, ROWS, ROWS, 40, segments)
    band, scores = tpu_band.Band.scores(q, k, layout, 0.25)
    place = np.arange(ROWS)
    inside = (abs(place[:, None] - place) <= 40) & (place[:, None] < n[:, None, None]) & (place < n[:, None, None])
    inside &= np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None]
    q, k, f, g = (np.asarray(x, np.float64) for x in (q, k, f, g))
    dense = 0.25 * q @ k.swapaxes(1, 2) + f[:, :-1, None] + g[:, None, :-1]
    shifted = Kernel(band, scores, None).shift(jnp.asarray(f, "float32"), jnp.asarray(g, "float32"))
    return shifted, np.where(inside, dense, -np.inf)


def test_products_and_maxima_are_those_of_the_dense_matrix():
    shifted, scores = matrices("float32")
    rng, plan = np.random.default_rng(1), np.exp(scores)
    vector, values = (rng.normal(size=(2, ROWS, *shape)).astype(np.float32) for shape in ((), (5,)))
    x, y = (rng.normal(size=(2, ROWS, 3)).astype(np.float32) for _ in range(2))
    band, terms = shifted.band, shifted.exp().tiles
    field = plan * (x @ y.swapaxes(1, 2))
    expected = {
        "vector": (band.times(terms, vector), np.einsum("nij,nj->ni", plan, vector)),
        "vector from the left": (band.transpose_times(terms, vector), np.einsum("nij,ni->nj", plan, vector)),
        "matrix": (band.times(band.modulate(terms, (x, y)), values), field @ values),
        "matrix from the left": (band.transpose_times(terms, values), plan.swapaxes(1, 2) @ values),
        "sums": (band.scale_once(terms, jnp.ones((2, ROWS)), None)[1], (plan / _or_one(plan.sum(-1))).sum(1)),
        "row maxima": (band.row_max(shifted.tiles), scores.max(-1)),
        "column maxima": (band.column_max(shifted.tiles), scores.max(-2)),
    }
    for name, (found, exact) in expected.items():
        finite = np.isfinite(exact)
        assert (np.isfinite(np.asarray(found)) == finite).all(), name
        assert conformance.error(np.asarray(found)[finite], exact[finite]) < 5e-6, name


def _or_one(sums):
    return np.where(sums == 0, 1, sums)[..., None]


def test_products_with_bfloat16_add_up_in_float32():
    shifted, scores = matrices("bfloat16")
    sums = jax.jit(lambda: shifted.exp().times(jnp.ones((2, ROWS + 1))))()
    assert sums.dtype == jnp.float32
    assert conformance.error(sums[:, :-1], np.exp(scores).sum(-1)) < 5e-6


def test_products_are_chosen_by_name_only(monkeypatch):
    monkeypatch.setattr(support, "platform", lambda: "tpu")
    x, ids = jnp.zeros((1, 40, 1, 8)), jnp.zeros((1, 40), jnp.int32)
    n = jnp.array([40])
    plain = by_head(x, x, x, jnp.zeros(1), n, n)
    cut = plain._replace(segments=support.segments_of(ids, ALONE, 8))
    spec = SinkhornSpec(band=8)
    assert registry.choose(None, plain, spec) == registry.choose("pallas_tpu", cut, spec) == "pallas_tpu"
    assert registry.choose(None, cut, spec) == "xla"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels of a GPU, segments", "kernels of a GPU, full dustbin"])
def test_shared_sequences_have_the_numbers_of_whole_ones(name, tmp_path):
    """The GPU's cases by the TPU's kernels, on simulated devices."""
    program = f"""
import dataclasses, json, jax
from jax.experimental.pallas import tpu as pltpu
from tests.support.sequence_axis import CASES, errors
jax.config.update("jax_enable_x64", True)
with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    print(json.dumps(errors(dataclasses.replace(CASES[{name!r}], implementation="pallas_tpu"))))
"""
    (tmp_path / "program.py").write_text(program)
    [printed] = finish(start(tmp_path / "program.py", devices=sequence_axis.CASES[name].devices))
    assert max(json.loads(printed).values()) < 1e-10


SHARED_ON_TPU = """
import re
import jax, numpy as np
from jax import P
from jax.experimental import topologies
from ot_attention import SinkhornSpec, sinkhorn_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
mesh, by_place = jax.sharding.Mesh(np.array(devices), ("chips",)), P(None, "chips")
spec = SinkhornSpec(band=128, tau_a=0.9, tau_b=0.9)

def forward_and_backward(q, k, v, ids, cotangent):
    def attend(q, k, v, ids):
        options = {"implementation": "pallas_tpu", "sequence_axis": "chips", "segment_ids": ids}
        return sinkhorn_attention(q, k, v, spec, **options)[0]

    shared = jax.shard_map(attend, mesh=mesh, in_specs=(by_place,) * 4, out_specs=by_place)
    out, pull_back = jax.vjp(lambda *x: shared(*x, ids), q, k, v)
    return out, pull_back(cotangent)

def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, by_place))

x = shape(1, 8192, 2, 64)
with jax.set_mesh(mesh):
    compiled = jax.jit(forward_and_backward).lower(x, x, x, shape(1, 8192, dtype="int32"), x).compile()
text = compiled.as_text()
gathers = re.findall(r" (?:all-gather|all-to-all)(?:-start)?[(]", text)
print(text.count("tpu_custom_call"), len(gathers), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_shared_sequences_compile_for_eight_chips():
    kernels, gathers, temporary = map(int, run(SHARED_ON_TPU).split()[-3:])
    assert kernels >= 10 and gathers == 0
    assert temporary < 1024 * 2 * 16000, "11 KB a row and head were measured, most of it lanes of narrow arrays"
