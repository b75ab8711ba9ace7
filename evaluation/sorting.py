"""The task of sorting sequences of symbols: exact matches and edit distances, by length."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from Bio.Align import PairwiseAligner
from jax.sharding import Mesh
from jaxtyping import Bool, Float64, Int32, PyTree
from tqdm import tqdm

from data import pipeline, sorting
from data.sorting import SortingBatch
from evaluation import metrics
from evaluation.task import OF_ALL_TASKS, Options, Task, Validation, evaluated_at_once, limit_of
from models.attention import specs_of
from models.sorter import SorterConfig, SortingObjective
from training import sharding
from training.state import Trainer

if TYPE_CHECKING:
    from evaluation.runs import Run

_BIN = 5  # lengths


class SortingTask(Task):
    """Sort sequences of symbols, the task of arXiv 2002.11296; score exact matches and edit distances, by length."""

    sections = (*OF_ALL_TASKS, sorting.SortingConfig, SorterConfig)
    purpose = "sort"
    splits = tuple(sorting.EVALUATION_SPLITS)

    def objective(self) -> SortingObjective:
        _, blocks = specs_of(self.config.to_dict())
        if blocks is None:
            raise ValueError("attention.kind='sinkhorn' cannot be causal; sort with sparse_sinkhorn, local or softmax")
        return SortingObjective(SorterConfig.of(self.config.model.to_dict()), blocks, self.config.data.symbols)

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        index, count = sharding.host_shard(mesh)
        return pipeline.BatchIterator(sorting.SortingStream(self._data(), shard_index=index, shard_count=count))

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        splits, write = self._eval_splits(), trainer.compiled_evaluation(writer(trainer), mesh)
        batches = functools.partial(sorting.evaluation_batches, self._evaluated(mesh), limit=limit_of(self.config))

        def score(params: PyTree, after_each: Callable[[], None]) -> dict[str, dict[str, dict]]:
            def write_one(batch):
                after_each()
                return write(params, batch)

            return {name: score_split(write_one, batches(name)) for name in splits}

        return score

    def _scorer(self, run: "Run", options: Options) -> Callable[[str], dict[str, Any]]:
        if options.data_dir or options.examples:
            raise ValueError("--data and --report need a model that aligns; this one sorts")
        write = run.trainer.compiled_evaluation(writer(run.trainer), run.mesh)

        def score(name: str) -> dict[str, Any]:
            batches = list(sorting.evaluation_batches(self._evaluated(run.mesh), name, options.limit))
            batches = tqdm(batches, name, unit=" batches", disable=None)  # None: unless stderr is a terminal
            return {"splits": score_split(functools.partial(write, run.params), batches)}

        return score

    def _data(self) -> sorting.SortingConfig:
        shared = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        return sorting.SortingConfig.of({**self.config.data, **shared})

    def _evaluated(self, mesh: Mesh) -> sorting.SortingConfig:
        size = evaluated_at_once(self.config.batch_size, mesh.shape["data"])
        return dataclasses.replace(self._data(), batch_size=size)


def score_split(write: Callable, batches: Iterable[SortingBatch]) -> dict[str, dict]:
    """Average over sequences of a split with bootstrap 95 % intervals, overall and by length.

    Each sequence is a family of its own. Raises ValueError if there is none.
    """
    scores = []
    for batch in batches:
        written, real = write(batch), batch["id"] >= 0
        of_batch = exact(written, batch), edit_distances(written, batch), batch["length"] - 1
        scores.append([x[real] for x in of_batch])
    if not sum(len(of[0]) for of in scores):
        raise ValueError("there is no sequence to score")
    right, distance, length = (np.concatenate(x) for x in zip(*scores, strict=True))
    ones, first = np.ones(len(length)), (length - 1) // _BIN * _BIN + 1
    ratios = {"exact_match": np.stack([right, ones]), "edit_distance": np.stack([distance, ones])}
    names = {start: f"{start}-{start + _BIN - 1}" for start in np.unique(first).tolist()}
    bins = np.array([names[start] for start in first.tolist()])
    return {"model": metrics.by_bin(ratios, np.arange(len(length)), bins, names.values())}


def writer(trainer: Trainer) -> Callable:
    """Return a function from parameters and a batch to the tokens that the model writes."""
    return lambda params, batch: trainer.model(params).write(batch["x"], batch["length"])


def exact(written: Int32[np.ndarray, "batch places"], batch: SortingBatch) -> Bool[np.ndarray, " batch"]:
    """Return whether each sequence is wholly right, END included; `written` has 0 after the first END."""
    return (written == batch["target"]).all(axis=1)


def edit_distances(written: Int32[np.ndarray, "batch places"], batch: SortingBatch) -> Float64[np.ndarray, " batch"]:
    """Compute Levenshtein distances from the sorted sequences, as shares of their lengths without END."""
    aligner = PairwiseAligner(match_score=0, mismatch_score=-1, gap_score=-1)
    end = batch["target"].max()

    def symbols(tokens):
        return "".join(map(chr, tokens[(tokens > 0) & (tokens < end)]))

    distances = []
    for out, target in zip(map(symbols, written), map(symbols, batch["target"]), strict=True):
        distance = -aligner.score(out, target) if out and target else max(len(out), len(target))
        distances.append(distance / max(len(target), 1))
    return np.array(distances)
