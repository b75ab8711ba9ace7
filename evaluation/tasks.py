"""Tasks: one object answers everything that depends on what is trained, the objective, the batches and the scores.

`task_of(config)` makes it. train.py and eval.py never look at the kind of task themselves.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from data import pfam, pipeline, sorting
from evaluation import baselines, figures, scoring
from evaluation import sorting as sorting_scores
from evaluation.report import Examples
from models.aligner import AlignerConfig
from models.attention import specs_of
from models.objectives import AlignmentObjective, LossConfig, Objective
from models.sorter import SorterConfig, SortingObjective
from training import sharding
from training.state import Trainer

if TYPE_CHECKING:
    from evaluation.runs import Run

SPLITS = {
    "validation": ("validation",),
    "test_iid": ("test_iid",),
    "test_ood": ("test_ood",),
    "test": ("test_iid", "test_ood"),
}
_ROOT = Path(__file__).parents[1]
_CERTIFIED = 128  # pairs of a split whose plans are certified


@runtime_checkable
class Task(Protocol):
    """A task that models are trained for, as a configuration describes it."""

    config: ConfigDict

    def objective(self) -> Objective:
        """Make the objective. Raises ValueError or TypeError for settings out of range and misspelt keys."""

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        """Open the training batches; this process gets its part of each."""

    def validation(self, trainer: Trainer, mesh: Mesh) -> Callable[[PyTree], dict[str, dict]]:
        """Return a function from parameters to a summary of scores on a fixed sample of the validation split."""

    def evaluate(
        self,
        run: "Run",
        split: str,
        *,
        pictures: Path,
        data_dir: str | None = None,
        limit: int | None = None,
        examples: Examples | None = None,
    ) -> dict:
        """Score a trained model on the splits that `split` names; return the report that eval.py writes as JSON."""


def task_of(config: ConfigDict) -> Task:
    """Make the task that a configuration names: sorting, or else alignment."""
    return SortingTask(config) if config.get("task") == "sorting" else AlignmentTask(config)


class AlignmentTask:
    """Align pairs of rows of Pfam alignments."""

    def __init__(self, config: ConfigDict):
        self.config = config

    def objective(self) -> AlignmentObjective:
        spec, blocks = specs_of(self.config.to_dict())
        return AlignmentObjective(AlignerConfig(**self.config.model), spec, LossConfig(**self.config.loss), blocks)

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        config = self.config
        options = {key: value for key, value in config.data.items() if key != "dir"}
        pipeline_config = pipeline.PipelineConfig(batch_size=config.batch_size, seed=config.seed, **options)
        shard_index, shard_count = sharding.host_shard(mesh)
        families = pfam.open_split(resolve_data_dir(config.data.dir), "train")
        return pipeline.train_iterator(families, pipeline_config, shard_index=shard_index, shard_count=shard_count)

    def validation(self, trainer: Trainer, mesh: Mesh) -> Callable[[PyTree], dict[str, dict]]:
        families = pfam.open_split(resolve_data_dir(self.config.data.dir), "validation")
        model = scoring.pretrained(trainer, mesh)

        def score(params: PyTree) -> dict[str, dict]:
            batches = self._evaluation_batches(families, mesh, self.config.log.eval_pairs)
            return scoring.score_split(model.with_params(params), families, batches)

        return score

    def evaluate(
        self,
        run: "Run",
        split: str,
        *,
        pictures: Path,
        data_dir: str | None = None,
        limit: int | None = None,
        examples: Examples | None = None,
    ) -> dict:
        """Score a model beside the baselines on the same pairs, and draw figures into the folder `pictures`.

        Pairs come from `data_dir` or else from the configuration's folder, at most `limit` from a split.
        """
        shards = resolve_data_dir(data_dir or self.config.data.dir)
        certificates = run.trainer.compiled_evaluation(scoring.certifier(run.trainer), run.mesh)
        model, certify = run.pretrained(), functools.partial(certificates, run.params)
        pictures.mkdir(parents=True, exist_ok=True)
        report: dict = {"step": run.step, "config": self.config.to_dict(), "splits": {}}
        report |= {"certificates": {}, "reliability": {}}
        for name in SPLITS[split]:
            families = pfam.open_split(shards, name)
            batches = functools.partial(self._evaluation_batches, families, run.mesh)
            observer = scoring.Observer(name, pictures, examples)
            summaries = scoring.score_split(model, families, batches(limit), see=observer, progress=name)
            report["splits"][name] = summaries
            report["reliability"][name] = observer.reliability.tenths()
            report["certificates"][name] = scoring.certify_split(certify, batches(min(limit or _CERTIFIED, _CERTIFIED)))
            overall = {who: summary["overall"] for who, summary in summaries.items()}
            others = {who: overall[who] for who in baselines.BASELINES}
            figures.comparison_bars({"model": overall["model"]}, others, pictures / f"{name}.png", title=name)
        return report

    def _evaluation_batches(self, families: pipeline.Families, mesh: Mesh, limit: int | None):
        return pipeline.evaluation_batches(
            families,
            self.config.batch_size,
            self.config.data.buckets,
            limit=limit,
            divisible_by=mesh.shape["data"],
            max_bad=self.config.data.get("max_bad_records", 0),  # older runs have none
        )


class SortingTask:
    """Sort sequences of symbols, the task of arXiv 2002.11296."""

    def __init__(self, config: ConfigDict):
        self.config = config

    def objective(self) -> SortingObjective:
        _, blocks = specs_of(self.config.to_dict())
        if blocks is None:
            raise ValueError("attention.kind='sinkhorn' cannot be causal; sort with sparse_sinkhorn, local or softmax")
        return SortingObjective(SorterConfig(**self.config.model), blocks, self.config.data.symbols)

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        shard_index, shard_count = sharding.host_shard(mesh)
        stream = sorting.SortingStream(self._data(), shard_index=shard_index, shard_count=shard_count)
        return pipeline.BatchIterator(stream)

    def validation(self, trainer: Trainer, mesh: Mesh) -> Callable[[PyTree], dict[str, dict]]:
        write = trainer.compiled_evaluation(sorting_scores.writer(trainer), mesh)

        def score(params: PyTree) -> dict[str, dict]:
            batches = sorting.evaluation_batches(self._data(), "validation", self.config.log.eval_pairs)
            return sorting_scores.score_split(functools.partial(write, params), batches)

        return score

    def evaluate(
        self,
        run: "Run",
        split: str,
        *,
        pictures: Path,
        data_dir: str | None = None,
        limit: int | None = None,
        examples: Examples | None = None,
    ) -> dict:
        """Score exact matches and edit distances, by length.

        Raises ValueError for an option that only alignments have.
        """
        if data_dir or examples:
            raise ValueError("--data and --report need a model that aligns; this one sorts")
        write = functools.partial(
            run.trainer.compiled_evaluation(sorting_scores.writer(run.trainer), run.mesh), run.params
        )
        report: dict = {"step": run.step, "config": self.config.to_dict(), "splits": {}}
        for name in SPLITS[split]:
            batches = list(sorting.evaluation_batches(self._data(), name, limit))
            report["splits"][name] = sorting_scores.score_split(write, tqdm(batches, desc=name, unit=" batches"))
        return report

    def _data(self) -> sorting.SortingConfig:
        return sorting.SortingConfig(batch_size=self.config.batch_size, seed=self.config.seed, **self.config.data)


def resolve_data_dir(directory: str) -> Path:
    """Return the folder as given if it exists, else relative to the repository, which holds the shipped data."""
    path = Path(directory)
    beside = _ROOT / path
    return beside if not path.exists() and beside.exists() else path
