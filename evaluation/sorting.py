"""Score a model that sorts: exact matches and edit distances, by length."""

from collections.abc import Callable, Iterable

import numpy as np
from Bio.Align import PairwiseAligner
from jaxtyping import Bool, Float64, Int32

from data.sorting import SortingBatch
from evaluation import metrics
from training.state import Trainer

_BIN = 5  # lengths


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
