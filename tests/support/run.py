"""Small runs, and what is compared of them."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from evaluation import runs
from tests.support import processes as several
from tests.support import tiny
from training import run_folder
from training.checkpoints import Checkpoints

CONFIG = f"--config={tiny.ROOT / 'configs/r2_dustbin.py'}"
RATES = {"residues_per_second", "examples_per_second", "data_share"}
SMALL = {"data__buckets": (64,), "log__eval_every": 0, "checkpoint__keep": 3, "checkpoint__every": 2, "total_steps": 7}
PATIENCE = 900  # seconds, on a machine with much other work


def config(**overrides):
    base = several.config(**SMALL | overrides)
    base.attention.dustbin = "full"
    return base


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def rows(folder: Path) -> list[dict]:
    """The logged metrics without the rates."""
    return [{k: v for k, v in row.items() if k not in RATES} for row in run_folder.read_metrics(folder)]


def restored(folder: Path, step: int | None = None):
    settings = tiny.config_of(folder)
    trainer, mesh = runs.make_trainer(settings), runs.local_mesh(settings.batch_size)
    checkpoints = Checkpoints(folder, read_only=True)
    with contextlib.closing(checkpoints):
        return checkpoints.restore(trainer.abstract_state(mesh), step)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compare to the last bit: parameters, average, optimiser, step, place in the data, metrics."""
    assert rows(folder) == rows(expected)
    (state, position), (wanted, wanted_position) = restored(folder), restored(expected)
    assert position == wanted_position
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def program(folder: Path, *, limit: int | None = None, **overrides) -> subprocess.Popen:
    """The real train.py. limit: of any file that it writes, in bytes."""
    limited = ["prlimit", f"--fsize={limit}"] if limit else []
    command = [*limited, sys.executable, str(tiny.ROOT / "train.py"), CONFIG, f"--workdir={folder}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if limit:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *tiny.flags(**SMALL | overrides)], env=environment, text=True, **pipes)


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(bytes(data))
