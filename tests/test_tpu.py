"""What runs on a TPU is compiled for real ones, which needs libtpu and no TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention

ROOT = Path(__file__).parents[1]
COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from ot_attention import SinkhornSpec, sinkhorn_attention

chip = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices[0]
on_chip = jax.sharding.SingleDeviceSharding(chip)

def temporaries(batch, length, heads, width, band, dustbin):
    spec = SinkhornSpec(band=band, dustbin=dustbin)

    def loss(q, k, v, score, lengths):
        score = None if dustbin == "none" else score
        out, info = sinkhorn_attention(q, k, v, spec, *lengths, score, "pallas_tpu")
        return (out ** 2).sum() + info.f.sum()

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    x = shape(batch, length, heads, width)
    arguments = x, x, x, shape(heads), (shape(batch, dtype=jnp.int32),) * 2
    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes

for shape in {shapes}:
    print(*shape, temporaries(*shape), flush=True)
"""
TRAIN_STEP = """
import re
from jax.experimental import topologies
import eval as evaluation
from configs import {config}
from models import sharding, state

devices = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices
config = {config}.get_config()
config.model.implementation = "pallas_tpu"
trainer = evaluation.make_trainer(config)
mesh = sharding.make_mesh(sharding.MeshConfig(*{mesh}), config.batch_size, devices)
batch = state.abstract_batch(config.batch_size, {bucket}, mesh)
compiled = trainer.compiled_update(mesh).lower(trainer.abstract_state(mesh), batch).compile()
text = compiled.as_text()
exchanges = re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?[(]", text)
print(text.count("tpu_custom_call"), compiled.memory_analysis().peak_memory_in_bytes, len(exchanges))
"""
# Self-attention and plan of the configurations at their longest bucket, and the longest that the paper names.
CONFIGURED = [(4, 384, 4, 32, 64, "none"), (4, 384, 4, 32, 64, "full"), (4, 384, 1, 64, 64, "full")]
LONG = [(1, 8192, 2, 64, 512, "none"), (1, 8192, 2, 64, 128, "none")]


def compile_for(topology: str, shapes: list[tuple]) -> dict[tuple, int]:
    """Bytes of temporary memory of the compiled gradient for each shape."""
    lines = run(COMPILE.format(topology=topology, shapes=shapes)).splitlines()
    return {shape: int(line.split()[-1]) for shape, line in zip(shapes, lines, strict=True)}


def run(program: str) -> str:
    """What a program prints that compiles for TPUs, in a process of its own."""
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


@pytest.mark.parametrize("topology", ["v6e:2x4", "v5e:2x4", "v5p:2x2x1"])
def test_kernels_compile_for_the_chip(topology):
    assert compile_for(topology, CONFIGURED).keys() == set(CONFIGURED)


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_a_training_step_compiles_for_eight_chips(mesh):
    program = TRAIN_STEP.format(topology="v6e:2x4", config="r2_dustbin", mesh=mesh, bucket=128)
    kernels, peak, exchanges = map(int, run(program).split()[-3:])
    assert kernels >= 6  # two self-attentions and the plan, forward and backward
    assert peak < 32e9
    assert exchanges == 0, "sums over devices are all that training needs: see the table in models/sharding.py"


def test_memory_of_long_sequences_is_flat_in_the_band():
    wide, narrow = compile_for("v6e:2x4", LONG).values()
    assert wide == narrow


def test_without_a_tpu_the_kernels_are_refused():
    x = np.zeros((1, 8, 1, 4), np.float32)
    with pytest.raises(UnsupportedError, match="there is no TPU here; use "):
        sinkhorn_attention(x, x, x, SinkhornSpec(), implementation="pallas_tpu")
