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
    """Summarise the model on sequences of a split."""
    scores = []
    for batch in batches:
        written, real = write(batch), batch["id"] >= 0
        of_batch = exact(written, batch), edit_distances(written, batch), batch["length"] - 1
        scores.append([x[real] for x in of_batch])
    return {"model": _summary(*(np.concatenate(x) for x in zip(*scores, strict=True)))}


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


def _summary(
    exact_match: Bool[np.ndarray, " n"], edit_distance: Float64[np.ndarray, " n"], length: Int32[np.ndarray, " n"]
) -> dict:
    """Average over sequences with bootstrap 95 % intervals, overall and by length, as `metrics.summarise` does."""
    low, ones = (length - 1) // _BIN * _BIN + 1, np.ones(len(length))
    ratios = {"exact_match": np.stack([exact_match, ones]), "edit_distance": np.stack([edit_distance, ones])}

    def group(members):
        return metrics.intervals({name: of[:, members] for name, of in ratios.items()}, np.arange(members.sum()))

    bins = {f"{start}-{start + _BIN - 1}": group(low == start) for start in np.unique(low)}
    return {"overall": group(np.ones(len(length), bool)), "bins": bins, "pairs": len(length)}
