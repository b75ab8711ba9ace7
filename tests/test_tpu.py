"""Compile the TPU's programs for real chips, which needs libtpu and no TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import r2_dustbin
from evaluation import runs
from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention
from training import sharding, state

ROOT = Path(__file__).parents[1]
COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from ot_attention import SinkhornSpec, sinkhorn_attention

chip = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices[0]
mesh = jax.sharding.Mesh([chip], ("data",))  # tells the kernels which chip it is

def bytes_a_row(batch, length, heads, width, band, dustbin, dtype, weighted=False, **settings):
    spec = SinkhornSpec(band=band, dustbin=dustbin, **settings)

    def forward_and_backward(q, k, v, score, weights, lengths, *cotangents):
        def attend(q, k, v, score, *weights):
            score = None if dustbin == "none" else score
            out, info = sinkhorn_attention(q, k, v, spec, *lengths, score, "pallas_tpu", *weights)
            return (out, info.f, info.g), info.steps

        results, pull_back, steps = jax.vjp(attend, q, k, v, score, *weights, has_aux=True)
        return results, steps, pull_back(cotangents)

    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    x, potential = shape(batch, length, heads, width, dtype=dtype), shape(batch, heads, length + (dustbin != "none"))
    lengths, weights = (shape(batch, dtype="int32"),) * 2, (shape(batch, length),) * 2 * weighted
    with jax.set_mesh(mesh):
        given = x, x, x, shape(heads), weights, lengths, x, potential, potential
        lowered = jax.jit(forward_and_backward).lower(*given)
        compiled = lowered.compile()
    assert compiled.as_text().count("tpu_custom_call") == 2
    return compiled.memory_analysis().temp_size_in_bytes / (batch * length * heads)

for shape, settings in {problems}:
    print(bytes_a_row(*shape, **settings), flush=True)
"""
TRAIN_STEP = """
import re
from jax.experimental import topologies
from evaluation import runs
from configs import {config}
from training import sharding, state

devices = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices
config = {config}.get_config()
config.model.implementation = "pallas_tpu"
trainer = runs.make_trainer(config)
mesh = sharding.make_mesh(sharding.MeshConfig(*{mesh}), config.batch_size, devices)
batch = state.abstract_batch(config.batch_size, {bucket}, mesh)
compiled = trainer.compiled_update(mesh).lower(trainer.abstract_state(mesh), batch).compile()
text = compiled.as_text()
exchanges = re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?[(]", text)
print(text.count("tpu_custom_call"), compiled.memory_analysis().peak_memory_in_bytes, len(exchanges))
"""
# Self-attention and plan of the configurations at their longest bucket, and the longest that the paper names.
CONFIGURED = [(64, 384, 4, 32, 64, "full", "float32"), (32, 384, 1, 64, 64, "none", "float32")]
LONG = [(1, 8192, 2, 64, 512, "none", "float32"), (1, 8192, 2, 64, 512, "full", "bfloat16")]
NARROW = [(1, 8192, 2, 64, 128, "none", "float32")]


RELAXED = [
    {"tau_a": 0.9, "tau_b": 0.6, "tolerance": 1e-4, "weighted": True},
    {"tolerance": 1e-4},
    {"tau_a": 1.0, "tau_b": 0.0},
    {"tau_a": 0.0, "tau_b": 1.0},
]


def bytes_a_row(topology: str, problems: list[tuple[tuple, dict]]) -> list[float]:
    """Temporary memory of forward and backward a row and head, for shapes and settings; all of them compile."""
    return [float(line) for line in run(COMPILE.format(topology=topology, problems=problems)).splitlines()]


def run(program: str) -> str:
    """Return the output of a program that compiles for TPUs, in a process of its own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (requirements-tpu.txt)")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    command, environment = [sys.executable, "-c", program], os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "topology", ["v6e:2x4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:2x4", "v5p:2x2x1"))]
)
def test_kernels_compile_for_the_chip_and_leave_nothing_but_vectors_in_main_memory(topology):
    """Three potentials a row and three a column, a target, and what the cotangents are padded to: 64 bytes.

    jax 0.12 needs one vector more for bfloat16 with a dustbin.
    """
    shapes = CONFIGURED + LONG + (NARROW if topology == "v6e:2x4" else [])
    found = dict(zip(shapes, bytes_a_row(topology, [(shape, {}) for shape in shapes]), strict=True))
    assert max(found.values()) <= 68, found
    assert all(found[narrow] == found[LONG[0]] for narrow in NARROW if narrow in found), "memory grows with the band"


@pytest.mark.slow
def test_relaxed_and_weighted_problems_compile_for_the_chip():
    shape = (8, 256, 4, 32, 64, "full", "float32")
    weighted, *relaxed, balanced = bytes_a_row("v6e:2x4", [(shape, settings) for settings in (*RELAXED, {})])
    assert max(relaxed) <= balanced + 8, "only steps are counted, 128 lanes a head"
    assert weighted < 4 * (2 * 64 + 1), "weights and their gradients are vectors, smaller than the band"


@pytest.mark.slow
def test_a_training_step_lowers_for_a_tpu():
    config = r2_dustbin.get_config()
    config.model.implementation = "pallas_tpu"
    trainer = runs.make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1), config.batch_size, jax.devices()[:1])
    given = trainer.abstract_state(mesh), state.abstract_batch(config.batch_size, 128, mesh)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    chip = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1), ("data", "model"), abstract_device=chip)):
        text = jax.jit(trainer.update).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 6  # two self-attentions and the plan, forward and backward


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_a_training_step_compiles_for_eight_chips(mesh):
    program = TRAIN_STEP.format(topology="v6e:2x4", config="r2_dustbin", mesh=mesh, bucket=128)
    kernels, peak, exchanges = map(int, run(program).split()[-3:])
    assert kernels >= 6  # two self-attentions and the plan, forward and backward
    assert peak < 32e9
    assert exchanges == 0, "sums over devices are all that training needs: see the table in models/sharding.py"


def test_without_a_tpu_the_kernels_are_refused():
    x = np.zeros((1, 8, 1, 4), np.float32)
    with pytest.raises(UnsupportedError, match="there is no TPU here; use "):
        sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu")
