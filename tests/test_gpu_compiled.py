"""The GPU's kernels compiled for an H100, where jax's CUDA plugin is installed. No card is needed."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILE = """
import jax
from jax.experimental import topologies
from tests.support import gpu_programs
from ot_attention import SinkhornSpec

devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", target_config=gpu_programs.H100, topology="1x1x1"
).devices
mesh = jax.sharding.Mesh(devices, ("data",))

def bytes_a_row(batch, length, heads, width, band, dustbin, dtype, **settings):
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P())),
        gpu_programs.arguments(batch, length, heads, width, dustbin, dtype),
    )
    with jax.set_mesh(mesh):
        run = gpu_programs.forward_and_backward(SinkhornSpec(band=band, dustbin=dustbin, **settings))
        compiled = jax.jit(run).lower(*given).compile()
    assert compiled.as_text().count(gpu_programs.KERNEL) >= 8
    return compiled.memory_analysis().temp_size_in_bytes / (batch * length * heads)

for shape in {shapes}:
    print(bytes_a_row(*shape), flush=True)
"""


TRAIN_STEP = """
import jax
from jax.experimental import topologies
from tests.support import gpu_programs
from evaluation import runs
from configs import r2_dustbin
from training import sharding, state

devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", target_config=gpu_programs.H100, topology="{devices}x1x1"
).devices
config = r2_dustbin.get_config()
config.model.implementation = "pallas_gpu"
trainer = runs.make_trainer(config)
mesh = sharding.make_mesh(sharding.MeshConfig(), config.batch_size, devices)
batch = state.abstract_batch(config.batch_size, 128, mesh)
compiled = trainer.compiled_update(mesh).lower(trainer.abstract_state(mesh), batch).compile()
print(compiled.as_text().count(gpu_programs.KERNEL), compiled.memory_analysis().temp_size_in_bytes)
"""


CONFIGURED = [(64, 384, 4, 32, 64, "full", "float32"), (32, 384, 1, 64, 64, "none", "bfloat16")]
LONG = [(1, 8192, 2, 64, band, "full", "bfloat16") for band in (128, 512)] + [
    (1, 8192, 2, 128, None, "none", "float32")
]


def compiled(program: str) -> list[str]:
    """Return the output of a program that compiles for an H100, in its own process. No card or driver is needed."""
    if not any(
        importlib.metadata.packages_distributions().get(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
    ):
        pytest.skip("jax's CUDA plugin is not installed (docs/gpu.md)")
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command, environment = [sys.executable, "-c", program], os.environ | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_kernels_compile_for_an_h100_and_leave_nothing_of_the_bands_size_in_memory():
    shapes = CONFIGURED + LONG
    found = dict(zip(shapes, map(float, compiled(COMPILE.format(shapes=shapes))), strict=True))
    # The narrower band makes steps in strips, whose column sums are a few numbers a row.
    assert found[LONG[0]] == pytest.approx(found[LONG[1]], rel=1e-3), "memory grows with the band"
    assert all(size < 12 * 4 * shape[3] for shape, size in found.items()), found  # arrays of a head's width, float32


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_training_step_compiles_for_h100s(devices):
    kernels, temporary = map(int, compiled(TRAIN_STEP.format(devices=devices))[-1].split())
    assert kernels >= 16
    assert temporary < 10e9
