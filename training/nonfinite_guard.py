"""Decide what happens to a training step whose loss or gradient is NaN or infinite."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import jax
from jax.experimental import multihost_utils

from data import files
from data.settings import Choice, Integer, Section
from training.processes import is_first_process, warn


class NonFiniteError(Exception):
    """Loss or gradient is NaN or infinite, and the run must stop."""


@dataclasses.dataclass(frozen=True)
class NonFinitePolicy(Section):
    """`config.train`, which configs/base.py describes. A file names a batch of non-finite loss in any case."""

    name: ClassVar[str] = "train"

    on_nonfinite: Annotated[str, Choice(("stop", "skip", "rollback"))] = "stop"
    max_nonfinite: Annotated[int, Integer()] = 10


class TrainedStep(NamedTuple):
    """A step that was started, and not checked yet."""

    number: int
    batch: int  # number of the step's batch: the step's own number unless batches were left out
    metrics: dict[str, jax.Array]  # as `Trainer.update` returns them
    ids: jax.Array  # of the examples of the whole batch


class Verdict(enum.Enum):
    """Treatment of a checked step."""

    KEEP = enum.auto()
    SKIP = enum.auto()  # its update was left out already, see `Trainer.update`
    ROLL_BACK = enum.auto()  # to the last checkpoint


def guard(policy: NonFinitePolicy, step: TrainedStep, values: dict[str, float], count: int, workdir: Path) -> Verdict:
    """Return what to do with a non-finite step of these metrics, warn about it, and write its batch to a file.

    It is the `count`-th of its run. Raises NonFiniteError if the policy ends the run.
    """
    path = workdir / f"nonfinite_{step.batch}.json"
    ids = multihost_utils.process_allgather(step.ids, tiled=True).tolist()
    if is_first_process():
        written = {"step": step.number, "batch": step.batch, "metrics": values, "ids": ids}
        files.write(path, json.dumps(written) + "\n")
    told = (
        f"step {step.number}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The batch (family, row "
        f"of x, row of y in the train split) is in {path}"
    )
    if policy.on_nonfinite == "stop" or count > policy.max_nonfinite:
        before = f", the last of {count} such steps" if count > 1 else ""
        raise NonFiniteError(
            f"{told}{before}. Checkpoints hold earlier steps only: start again to resume from the last one; if it "
            "comes back, lower optimizer.learning_rate in another workdir, or give train.on_nonfinite=skip or rollback,"
            " and train.max_nonfinite"
        )
    so_far = f"{count} of at most {policy.max_nonfinite}"
    if policy.on_nonfinite == "rollback":
        warn(f"{told}. Back to the last checkpoint, and on with batch {step.batch + 1} ({so_far})")
        return Verdict.ROLL_BACK
    warn(f"{told}. Its update is left out ({so_far})")
    return Verdict.SKIP
