"""Training steps on several devices, and programs in processes of their own."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from configs import base as base_config
from configs import pretrain
from data import pfam, pipeline
from evaluation import runs, tasks
from tests.support import tiny
from training import sharding

# Heads, widths and the batch can be shared by 2, 4 and 8 devices.
SHARED = {"model__attention_every": 1, "model__heads": 4, "attention__band": 8, "attention__base_steps": 2}
EIGHT = SHARED | {"batch_size": 8, "data__buckets": (64,), "optimizer__warmup_steps": 0}
PLACES = 432  # of sequences that devices share; no other size of their program is as large
PATIENCE = 900  # seconds, on a machine with much other work


def config(base=None, **overrides):
    """The tiny configuration with what these tests change."""
    if base is None:
        base = base_config.get_config()
        base.attention.dustbin = "full"
    known = {name: value for name, value in tiny.OVERRIDES.items() if _has(base, name)}  # of this task
    changes = known | {name.replace("__", "."): value for name, value in overrides.items()}
    with base.ignore_type():
        base.update_from_flattened_dict(changes)
    return base


def _has(config, name: str) -> bool:
    section, _, key = name.rpartition(".")
    return key in (config[section] if section else config)


def stream(shard_index: int = 0, shard_count: int = 1) -> pipeline.PairStream:
    families = pfam.open_split(tiny.ROOT / "data/default", "train")
    settings = pipeline.PipelineConfig(batch_size=8, buckets=(64,))
    return pipeline.PairStream(families, settings, shard_index=shard_index, shard_count=shard_count)


def steps(mesh_of: tuple[int, int], base=None):
    """Initial values, and losses and gradient norms of three steps; trainer, mesh and last state."""
    trainer = runs.make_trainer(config(base, **EIGHT))
    mesh = sharding.make_mesh(sharding.MeshConfig(*mesh_of), 8)
    state, update, batches = trainer.initial_state(mesh), trainer.compiled_update(mesh), stream()
    initial, measured = jax.device_get(jax.tree.leaves(state)), []
    for step in range(3):
        batch = {name: x for name, x in batches[step].items() if name != "id"}
        state, metrics = jax.block_until_ready(update(state, sharding.from_hosts(batch, mesh)))
        measured.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return initial, measured, trainer, mesh, state


def sequence_config(**changes):
    """A configuration whose attention and convolutions reach beyond a share of PLACES places."""
    settings = config(pretrain.get_config(), batch_size=2, data__buckets=(PLACES,), log__wandb="disabled")
    options = {
        "model.width": 16, "model.depth": 2, "model.kernel": 5, "model.heads": 2, "model.attention_every": 2,
        "attention.band": 20, "attention.base_steps": 3, "attention.tail_steps": 2, "optimizer.warmup_steps": 0,
    }  # fmt: skip
    with settings.ignore_type():
        settings.update_from_flattened_dict(options | changes)
    return tasks.checked(settings)


def sequence_batch(join: bool) -> dict[str, np.ndarray]:
    """Two rows, one of which ends early, perhaps of several sequences."""
    rng = np.random.default_rng(0)
    x, length = rng.integers(1, 21, (2, PLACES)).astype(np.int32), np.array([PLACES, PLACES - 100], np.int32)
    ends = [17, 54, 60, 200, 301, 350] if join else []  # shares of eight devices end at 54, 108, ...
    segments = np.tile(1 + np.searchsorted(ends, np.arange(PLACES), side="right"), (2, 1)).astype(np.int32)
    for end in ends:
        x[:, end] = segments[:, end] = 0
    x[1, length[1] :] = segments[1, length[1] :] = 0
    made = {"x": x, "length": length, "id": np.arange(2, dtype=np.int32)}
    return made | {"segments": segments} if join else made


def start(*arguments: object, devices: int = 1, **environment: str) -> subprocess.Popen:
    """A Python program in a process of its own."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{tiny.ROOT}:{tiny.ROOT / 'tests'}",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | settings | environment, text=True, **pipes)


def finish(*processes: subprocess.Popen, patience: float = PATIENCE) -> list[str]:
    """Return the output of the processes; fail if one fails or takes too long."""
    deadline = time.monotonic() + patience
    try:
        ended = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    lines = [printed.splitlines(keepends=True) for printed, _ in ended]
    return ["".join(line for line in of_one if not line.startswith("[Gloo]")) for of_one in lines]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
