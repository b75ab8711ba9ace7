"""A task that models are trained for: what train.py and eval.py need of it, and what all tasks share."""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from data import files, pipeline
from data.settings import Section
from data.variants import EVALUATION_SETS
from evaluation.report import Examples
from models.attention import AttentionConfig, SparseConfig
from models.objectives import Objective
from training import sharding
from training.nonfinite_guard import NonFinitePolicy
from training.settings import CheckpointConfig, LogConfig, RunConfig
from training.state import OptimizerConfig, Trainer

if TYPE_CHECKING:
    from evaluation.runs import Run

SPLITS = {**{name: (name,) for name in EVALUATION_SETS}, "test": ("test_iid", "test_ood")}
Validation = Callable[[PyTree, Callable[[], None]], dict[str, dict[str, dict]]]
MOST_AT_ONCE = 128  # examples of a batch of evaluation
_ROOT = Path(__file__).parents[1]

OF_ALL_TASKS = (
    RunConfig,
    AttentionConfig,
    SparseConfig,
    OptimizerConfig,
    sharding.MeshConfig,
    NonFinitePolicy,
    CheckpointConfig,
    LogConfig,
)


class Task(abc.ABC):
    """A task that models are trained for, as a configuration describes it."""

    sections: ClassVar[tuple[type[Section], ...]]  # of the configuration
    purpose: ClassVar[str]  # for messages: "a model was trained to ..."
    splits: ClassVar[tuple[str, ...]]  # that can be scored

    def __init__(self, config: ConfigDict):
        self.config = config

    @abc.abstractmethod
    def objective(self) -> Objective:
        """Make the objective. Raises ValueError or TypeError for settings out of range and misspelt keys."""

    def check_mesh(self) -> None:
        """Raise ValueError if `mesh.sequence` asks to cut what this task cannot cut."""
        if (shares := self.config.mesh.sequence) > 1:
            raise ValueError(
                f"mesh.sequence={shares}: allowed is 1 for a model that is trained to {self.purpose}; devices share "
                "sequences of task=masked_residues only"
            )

    @abc.abstractmethod
    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        """Open the training batches; this process gets its part of each."""

    def abstract_batch(self, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, on a mesh, of what the update reads of a batch whose sequences are padded to a length.

        Raises ValueError if batches have no such length.
        """
        raise ValueError(f"a model that is trained to {self.purpose} has no data.buckets; give one that aligns")

    @abc.abstractmethod
    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        """Return a function from parameters to tables of scores, by split of `log.eval_splits`, on a fixed sample.

        It calls its second argument, which may raise, after each example or before each batch. Raises ValueError or
        OSError for a split that there is not.
        """

    def _eval_splits(self) -> tuple[str, ...]:
        """Return `log.eval_splits`. Raises ValueError if the task has no such split."""
        wanted = tuple(self.config.log.eval_splits)
        if not set(wanted) <= set(self.splits):
            allowed = f"allowed are {', '.join(self.splits)} for a model that is trained to {self.purpose}"
            raise ValueError(f"log.eval_splits={wanted}: {allowed}")
        return wanted

    @abc.abstractmethod
    def _scorer(self, run: "Run", options: "Options") -> Callable[[str], dict[str, Any]]:
        """Return a function from the name of a split to its entries in the tables of the report."""

    def evaluate(self, run: "Run", split: str, **options: Any) -> dict:
        """Score a trained model on the splits that `split` names; return the report that eval.py writes as JSON.

        Further arguments are the fields of `Options`. Raises ValueError for those that only alignments have.
        """
        names = [name for name in SPLITS[split] if name in self.splits]
        if not names:
            allowed = f"allowed are {', '.join(self.splits)} for a model that was trained to {self.purpose}"
            raise ValueError(f"--split={split}: {allowed}")
        score = self._scorer(run, Options(**options))
        report: dict = {"step": run.step, "config": self.config.to_dict()}
        for name in names:
            for table, entry in score(name).items():
                report.setdefault(table, {})[name] = entry
        return report


class Options(NamedTuple):
    """Options of `Task.evaluate`."""

    pictures: Path  # folder of the figures
    data_dir: str | None = None  # in place of the configuration's
    limit: int | None = None  # pairs of a split
    examples: Examples | None = None  # collected for the page


def limit_of(config: ConfigDict) -> int | None:
    """Return the number of pairs to validate on; None for all."""
    return None if config.log.eval_pairs == -1 else config.log.eval_pairs


def evaluated_at_once(batch_size: int, devices: int) -> int:
    """Return the batch size of evaluations: with a larger one of training, most of a batch would be padding."""
    return min(batch_size, MOST_AT_ONCE // devices * devices or devices)


def resolve_data_dir(directory: str) -> Path:
    """Return the folder as given if it exists, else relative to the repository, which holds the shipped data.

    `~` is the home folder. Raises ValueError if there is none.
    """
    try:
        path = Path(files.expanded(directory))
    except ValueError as error:
        raise ValueError(f"data.dir={error}") from error
    beside = _ROOT / path
    return beside if not path.exists() and beside.exists() else path
