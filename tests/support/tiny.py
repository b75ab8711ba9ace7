"""A configuration that trains in seconds on the data that ship, and a run of it that several test modules read."""

import atexit
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from benchmarks.gpu_stages import TINY
from evaluation import runs

ROOT = Path(__file__).parents[2]
STEPS = 6
# 320 holds every evaluation pair but a few, so that nearly all is one compiled shape.
OVERRIDES = TINY | {
    "model.value_width": 8,
    "data.buckets": (320,),
    "batch_size": 4,
    "total_steps": STEPS,
    "checkpoint.every": 3,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": STEPS,
    "log.every": 1,
    "log.eval_every": 3,
    "log.eval_pairs": 4,
    "log.wandb": "disabled",
}


def flags(**overrides: object) -> list[str]:
    """The overrides as train.py's options; `a__b` stands for a.b."""
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"--config.{name}={value}" for name, value in (OVERRIDES | changes).items()]


def program(*arguments: object) -> subprocess.CompletedProcess:
    """Runs a command line as a user does, from another folder than the repository's."""
    command = [sys.executable, str(ROOT / str(arguments[0])), *map(str, arguments[1:])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=300)


@functools.cache
def trained() -> Path:
    """Return this process's copy of a run that the command line trains once in a session; do not change it."""
    shared = Path(os.environ["OT_TEST_FOLDER"])
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not (shared / "trained").exists():
            workdir = shared / "being_trained" / "tiny"
            done = program("train.py", f"--config={ROOT / 'configs/r2_dustbin.py'}", f"--workdir={workdir}", *flags())
            assert done.returncode == 0, done.stderr
            workdir.parent.rename(shared / "trained")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return shutil.copytree(shared / "trained" / "tiny", Path(folder.name) / "tiny")


def evaluated(workdir: Path, split: str, *, step: int | None = None, **options: object) -> dict:
    """The report of a run, figures drawn into its folder."""
    run = runs.load_run(workdir, step)
    return run.task.evaluate(run, split, pictures=workdir / "figures", **options)


def config_of(workdir: Path, **overrides: object) -> ConfigDict:
    """The run's configuration with changes; `a__b` stands for a.b."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    with config.ignore_type():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config
