"""Load trained models from the folder of a run or from a file of weights, with trainer and mesh."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from alignment import asap_maps
from alignment.inference import Pretrained
from evaluation import scoring
from evaluation.alignment import AlignmentTask
from evaluation.task import Task
from evaluation.tasks import checked, task_of
from models import weights
from models.attention import Asap
from training import sharding
from training.checkpoints import Checkpoints, DamagedCheckpointError
from training.run_folder import read_config
from training.state import OptimizerConfig, Trainer


class Run(NamedTuple):
    """A trained model."""

    config: ConfigDict
    trainer: Trainer
    mesh: Mesh
    params: PyTree  # moving average over the steps
    step: int

    @property
    def task(self) -> Task:
        """The task that the model was trained for."""
        return task_of(self.config)

    def pretrained(self) -> Pretrained:
        """Return the aligner for use. Raises ValueError if the run does not align."""
        check_aligns(self)
        return scoring.pretrained(self.trainer, self.mesh, self.params)


def load_run(workdir: Path, step: int | None = None) -> Run:
    """Load a checkpoint of a run, by default the newest. Raises ValueError or OSError that says what is wrong."""
    config = read_config(workdir)
    config, trainer, mesh = described(config, workdir / "config.json")
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        try:
            state, _ = checkpoints.restore(trainer.abstract_state(mesh), step)
        except DamagedCheckpointError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            told = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{workdir} holds a checkpoint that does not fit its config.json ({told}): bring back the config.json "
                "of the run, which is config/metadata in the checkpoint"
            ) from error
    return Run(config, trainer, mesh, state.ema, int(state.step))


def load_weights(path: Path) -> Run:
    """Load a file of `scripts/export_weights.py`."""
    values, step = weights.read_config(path)
    config, trainer, mesh = described(ConfigDict(values), path)
    return Run(config, trainer, mesh, weights.load(path, trainer.abstract_state(mesh).params), step)


def with_asap(run: Run, path: Path) -> Run:
    """Replace layers by the maps of a file of scripts/compile_asap.py. Raises ValueError if they are of another run."""
    check_aligns(run)
    return with_maps(run, asap_maps.load(path, run.params))


def with_maps(run: Run, maps: Mapping[str, Asap]) -> Run:
    """Replace layers by maps that were fitted to them."""
    graph = asap_maps.into(run.trainer.graph, run.params, maps)
    return run._replace(trainer=dataclasses.replace(run.trainer, graph=graph))


def make_trainer(config: ConfigDict) -> Trainer:
    """Make the trainer that a configuration describes; a misspelt key fails here."""
    settings = OptimizerConfig.of(config.optimizer.to_dict())
    return Trainer.create(task_of(config).objective(), settings, total_steps=config.total_steps, seed=config.seed)


def described(config: ConfigDict, path: Path) -> tuple[ConfigDict, Trainer, Mesh]:
    """Complete a stored configuration, and make its trainer and local mesh. Raises ValueError naming the file."""
    try:
        if missing := {"model", "attention"} - set(config):  # other sections may be of a later version, with defaults
            raise ValueError(f"the sections {', '.join(sorted(missing))} are missing")
        config = checked(config)
        return config, make_trainer(config), local_mesh(config.batch_size)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a model of this version: {error}") from error


def check_aligns(run: Run) -> None:
    """Raise ValueError unless the model aligns."""
    if not isinstance(run.task, AlignmentTask):
        told = f"the model was trained to {run.task.purpose}, and has no plan"
        raise ValueError(f"{told}: give one that was trained on alignments")


def local_mesh(batch_size: int) -> Mesh:
    """Return a mesh of the largest number of this machine's devices that share a batch evenly."""
    data = max(n for n in range(1, len(jax.devices()) + 1) if batch_size % n == 0)
    return sharding.make_mesh(sharding.MeshConfig(data), batch_size)
