"""Tasks: one object answers everything that depends on what is trained, the objective, the batches and the scores.

`task_of(config)` makes it. train.py and eval.py never look at the kind of task themselves.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from data import files, masked, pfam, pipeline, sequences, sorting
from data.settings import Folder, Section
from evaluation import baselines, figures, scoring
from evaluation import masked as masked_scores
from evaluation import sorting as sorting_scores
from evaluation.report import Examples
from models.aligner import AlignerConfig
from models.attention import AttentionConfig, SparseConfig, specs_of
from models.encoder import EncoderConfig
from models.masked import MaskedLossConfig, MaskedObjective
from models.objectives import AlignmentObjective, LossConfig, Objective
from models.sorter import SorterConfig, SortingObjective
from training import sharding
from training.nonfinite_guard import NonFinitePolicy
from training.settings import CheckpointConfig, LogConfig, RunConfig
from training.state import OptimizerConfig, Trainer

if TYPE_CHECKING:
    from evaluation.runs import Run

SPLITS = {**{name: (name,) for name in ("validation", "test_iid", "test_ood")}, "test": ("test_iid", "test_ood")}
Validation = Callable[[PyTree, Callable[[], None]], dict[str, dict]]
_ROOT = Path(__file__).parents[1]
_CERTIFIED = 128  # pairs of a split whose plans are certified, and most examples of a batch


_OF_ALL_TASKS = (
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
    splits: ClassVar[tuple[str, ...]] = tuple(SPLITS)  # that can be scored

    def __init__(self, config: ConfigDict):
        self.config = config

    @abc.abstractmethod
    def objective(self) -> Objective:
        """Make the objective. Raises ValueError or TypeError for settings out of range and misspelt keys."""

    @abc.abstractmethod
    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        """Open the training batches; this process gets its part of each."""

    @abc.abstractmethod
    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        """Return a function from parameters to a summary of scores on a fixed sample of the validation split.

        It calls its second argument, which may raise, after each example or before each batch.
        """

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


def task_of(config: ConfigDict) -> Task:
    """Make the task that a configuration names: sorting, masked residues, or else alignment."""
    return _kind_of(config)(config)


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Add to the settings of a configuration the default of every key that is missing; values are not checked."""
    result = dict(settings)
    for section in _kind_of(settings).sections:
        if not section.name:
            result = section.defaults() | result
        elif isinstance(given := settings.get(section.name, {}), dict):
            result[section.name] = section.defaults() | given
    return result


def checked(config: ConfigDict) -> ConfigDict:
    """Return a configuration with every key, in plain values.

    Raises ValueError that names the key if there is no such key, or if its value is not allowed.
    """
    settings = completed(config.to_dict())
    sections = {section.name: section for section in _kind_of(settings).sections}
    run = sections.pop("").of({key: value for key, value in settings.items() if key not in sections})
    result = {key: getattr(run, key) for key in run.defaults()}
    for name, section in sections.items():
        own, shared = settings[name], {} if name != "data" else {key: result[key] for key in ("batch_size", "seed")}
        read = section.of(own | shared if isinstance(own, dict) else own)
        result[name] = {key: getattr(read, key) for key in section.defaults()}
    return ConfigDict(result)


def _kind_of(settings: Any) -> "type[Task]":
    kinds = {"sorting": SortingTask, "masked_residues": MaskedResiduesTask}
    return kinds.get(str(settings.get("task")), AlignmentTask)  # another name is refused by RunConfig


@dataclasses.dataclass(frozen=True)
class DataConfig(pipeline.PipelineConfig):
    """`config.data` of an aligner: a folder, and the settings of the batches."""

    dir: Annotated[str, Folder()] = "data/default"


class AlignmentTask(Task):
    """Align pairs of rows of Pfam alignments; score beside the baselines on the same pairs."""

    sections = (*_OF_ALL_TASKS, DataConfig, AlignerConfig, LossConfig)
    purpose = "align"

    def objective(self) -> AlignmentObjective:
        spec, blocks = specs_of(self.config.to_dict())
        return AlignmentObjective(
            AlignerConfig.of(self.config.model.to_dict()), spec, LossConfig.of(self.config.loss.to_dict()), blocks
        )

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        directory = resolve_data_dir(self.config.data.dir)
        config = DataConfig.of({**self.config.data, "batch_size": self.config.batch_size, "seed": self.config.seed})
        shard_index, shard_count = sharding.host_shard(mesh)
        families = pfam.open_split(directory, "train")
        return pipeline.train_iterator(families, config, shard_index=shard_index, shard_count=shard_count)

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        families = pfam.open_split(resolve_data_dir(self.config.data.dir), "validation")
        model = scoring.pretrained(trainer, mesh)
        batches = functools.partial(self._evaluation_batches, families, mesh, _limit(self.config))

        def score(params: PyTree, after_each: Callable[[], None]) -> dict[str, dict]:
            trained = dataclasses.replace(model, params=params)
            return scoring.score_split(trained, families, batches(), see=lambda example: after_each())

        return score

    def _scorer(self, run: "Run", options: Options) -> Callable[[str], dict[str, Any]]:
        pictures, limit = options.pictures, options.limit
        shards = resolve_data_dir(options.data_dir or self.config.data.dir)
        certificates = run.trainer.compiled_evaluation(scoring.certifier(run.trainer), run.mesh)
        model, certify = run.pretrained(), functools.partial(certificates, run.params)
        pictures.mkdir(parents=True, exist_ok=True)

        def score(name: str) -> dict[str, Any]:
            families = pfam.open_split(shards, name)
            batches = functools.partial(self._evaluation_batches, families, run.mesh)
            observer = scoring.Observer(name, pictures, options.examples)
            summaries = scoring.score_split(model, families, batches(limit), see=observer, progress=name)
            others = {who: summaries[who]["overall"] for who in baselines.BASELINES}
            certified = scoring.certify_split(certify, batches(min(limit or _CERTIFIED, _CERTIFIED)))
            first = {"model": summaries["model"]["overall"]}
            figures.comparison_bars(first, others, pictures / f"{name}.png", title=name)
            return {"splits": summaries, "certificates": certified, "reliability": observer.reliability.tenths()}

        return score

    def _evaluation_batches(self, families: pipeline.Families, mesh: Mesh, limit: int | None):
        data, devices = self.config.data, mesh.shape["data"]
        size = _evaluated_at_once(self.config.batch_size, devices)
        max_bad = data.get("max_bad_records", 0)  # older runs have none
        return pipeline.evaluation_batches(
            families, size, data.buckets, limit=limit, divisible_by=devices, max_bad=max_bad
        )


class SortingTask(Task):
    """Sort sequences of symbols, the task of arXiv 2002.11296; score exact matches and edit distances, by length."""

    sections = (*_OF_ALL_TASKS, sorting.SortingConfig, SorterConfig)
    purpose = "sort"

    def objective(self) -> SortingObjective:
        _, blocks = specs_of(self.config.to_dict())
        if blocks is None:
            raise ValueError("attention.kind='sinkhorn' cannot be causal; sort with sparse_sinkhorn, local or softmax")
        return SortingObjective(SorterConfig.of(self.config.model.to_dict()), blocks, self.config.data.symbols)

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        index, count = sharding.host_shard(mesh)
        return pipeline.BatchIterator(sorting.SortingStream(self._data(), shard_index=index, shard_count=count))

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        write = trainer.compiled_evaluation(sorting_scores.writer(trainer), mesh)
        limit = _limit(self.config)
        batches = functools.partial(sorting.evaluation_batches, self._evaluated(mesh), "validation", limit)

        def score(params: PyTree, after_each: Callable[[], None]) -> dict[str, dict]:
            def write_one(batch):
                after_each()
                return write(params, batch)

            return sorting_scores.score_split(write_one, batches())

        return score

    def _scorer(self, run: "Run", options: Options) -> Callable[[str], dict[str, Any]]:
        if options.data_dir or options.examples:
            raise ValueError("--data and --report need a model that aligns; this one sorts")
        write = run.trainer.compiled_evaluation(sorting_scores.writer(run.trainer), run.mesh)

        def score(name: str) -> dict[str, Any]:
            batches = list(sorting.evaluation_batches(self._evaluated(run.mesh), name, options.limit))
            batches = tqdm(batches, name, unit=" batches", disable=None)  # None: unless stderr is a terminal
            return {"splits": sorting_scores.score_split(functools.partial(write, run.params), batches)}

        return score

    def _data(self) -> sorting.SortingConfig:
        shared = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        return sorting.SortingConfig.of({**self.config.data, **shared})

    def _evaluated(self, mesh: Mesh) -> sorting.SortingConfig:
        size = _evaluated_at_once(self.config.batch_size, mesh.shape["data"])
        return dataclasses.replace(self._data(), batch_size=size)


class MaskedResiduesTask(Task):
    """Predict masked residues of single sequences, which trains the encoder of an aligner; score perplexities."""

    sections = (*_OF_ALL_TASKS, masked.SequenceConfig, EncoderConfig, MaskedLossConfig)
    purpose = "predict masked residues"
    splits = ("validation", "test_ood")

    def objective(self) -> MaskedObjective:
        spec, blocks = specs_of(self.config.to_dict())
        model, loss = EncoderConfig.of(self.config.model.to_dict()), MaskedLossConfig.of(self.config.loss.to_dict())
        return MaskedObjective(model, blocks or spec, loss)

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        index, count = sharding.host_shard(mesh)
        shared = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        config = masked.SequenceConfig.of({**self.config.data, **shared})
        stream = masked.SequenceStream(self._open("train"), config, shard_index=index, shard_count=count)
        return pipeline.BatchIterator(stream)

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        score = self._score_split(trainer, mesh, self._open("train").residues)
        source, limit = self._open("validation"), _limit(self.config)
        return lambda params, after_each: score(params, self._evaluated(source, mesh, limit, after_each))

    def _scorer(self, run: "Run", options: Options) -> Callable[[str], dict[str, Any]]:
        if options.examples:
            raise ValueError(f"--report needs a model that aligns; this one was trained to {self.purpose}")
        # The baseline predicts what the model was trained on, or could have been.
        score = self._score_split(run.trainer, run.mesh, self._open("train", options.data_dir).residues)
        options.pictures.mkdir(parents=True, exist_ok=True)

        def score_one(name: str) -> dict[str, Any]:
            source = self._open(name, options.data_dir)
            batches = tqdm(self._evaluated(source, run.mesh, options.limit), name, unit=" batches", disable=None)
            found = score(run.params, iter(batches))
            model, others = ({who: of["overall"]} for who, of in found.items())
            figures.comparison_bars(model, others, options.pictures / f"{name}.png", title=name)
            return {"splits": found}

        return score_one

    def _open(self, split: str, data_dir: str | None = None) -> sequences.SequenceSource:
        return sequences.open_sequences(resolve_data_dir(data_dir or self.config.data.dir), split)

    def _score_split(self, trainer: Trainer, mesh: Mesh, residues: np.ndarray) -> Callable[..., dict[str, dict]]:
        predict = trainer.compiled_evaluation(masked_scores.predictor(trainer), mesh)
        return lambda params, batches: masked_scores.score_split(functools.partial(predict, params), batches, residues)

    def _evaluated(
        self, source: sequences.SequenceSource, mesh: Mesh, limit: int | None, before_each: Callable = lambda: None
    ) -> Iterator[masked.SequenceBatch]:
        devices = mesh.shape["data"]
        size = _evaluated_at_once(self.config.batch_size, devices)
        options: dict = {"limit": limit, "divisible_by": devices}
        for batch in masked.evaluation_batches(source, size, self.config.data.buckets, **options):
            before_each()
            yield batch


def _limit(config: ConfigDict) -> int | None:
    """Return the number of pairs to validate on; None for all."""
    return None if config.log.eval_pairs == -1 else config.log.eval_pairs


def _evaluated_at_once(batch_size: int, devices: int) -> int:
    """Return the batch size of evaluations: with a larger one of training, most of a batch would be padding."""
    return min(batch_size, _CERTIFIED // devices * devices or devices)


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
