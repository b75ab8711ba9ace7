"""Score a model that predicts masked residues: perplexity and accuracy, by length, beside the training composition."""

import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int64

from data import vocab
from data.masked import SequenceBatch
from evaluation import metrics
from models.masked import is_known, scores
from training.state import Trainer

_EVERY = 7  # residues of a sequence, of which one is masked: 14 %, nearly as in training
_EDGES = (64, 128, 256, 512, 1024)  # last lengths of bins
_NAMES = (
    f"-{_EDGES[0]}",
    *(f"{a + 1}-{b}" for a, b in itertools.pairwise(_EDGES)),
    f"{_EDGES[-1] + 1}-",
)
BASELINE = "unigram"


def score_split(
    predict: Callable[[SequenceBatch], dict], batches: Iterable[SequenceBatch], residues: Int64[np.ndarray, " tokens"]
) -> dict[str, dict]:
    """Average over the masked residues of a split with bootstrap 95 % intervals over sequences, overall and by length.

    `residues` counts each token in the training split: the baseline predicts this composition everywhere. Raises
    ValueError if there is no sequence.
    """
    found, lengths, counted = [], [], []
    for batch in batches:
        real = batch["id"] >= 0
        sums = predict(batch)
        found.append({name: np.asarray(x, np.float64)[real] for name, x in sums.items() if name != "residues"})
        counted.append(np.asarray(sums["residues"], np.int64)[real])
        lengths.append(batch["length"][real])
    if not sum(map(len, lengths)):
        raise ValueError("there is no sequence to score")
    model = {name: np.concatenate([of[name] for of in found]) for name in ("nats", "right", "count")}
    bins = np.array(_NAMES)[np.searchsorted(_EDGES, np.concatenate(lengths))]
    return {"model": _summary(model, bins), BASELINE: _summary(_unigram(np.concatenate(counted), residues), bins)}


def predictor(trainer: Trainer) -> Callable:
    """Return a function from parameters and a batch to sums over the masked residues of each sequence."""

    def predict(params, batch):
        x, length = batch["x"], batch["length"]
        chosen = masked(x, batch["id"])
        seen = jnp.where(chosen, vocab.MASK, x)
        nats, right = scores(trainer.model(params)(seen, length), x)
        sums = {"nats": nats, "right": right, "count": jnp.ones_like(nats)}
        kinds = jax.nn.one_hot(jnp.where(chosen, x, vocab.PAD), vocab.SIZE).sum(1)
        return {name: jnp.where(chosen, values, 0).sum(-1) for name, values in sums.items()} | {"residues": kinds}

    return predict


def masked(x: Array, number: Array) -> Array:
    """Choose every seventh residue to predict, from a place on that depends on the number of the sequence."""
    place = jnp.arange(x.shape[1]) + number[:, None]
    return is_known(x) & (place % _EVERY == 0)


def _unigram(
    counted: Int64[np.ndarray, "sequences tokens"], residues: Int64[np.ndarray, " tokens"]
) -> dict[str, Float64[np.ndarray, " sequences"]]:
    """Return the sums of the baseline, from the numbers of masked residues of each kind."""
    twenty = slice(1, len(vocab.RESIDUES) + 1)
    counted, kinds = counted[:, twenty].astype(np.float64), residues[twenty] + 1  # one more: no kind is impossible
    return {
        "nats": counted @ -np.log(kinds / kinds.sum()),
        "right": counted[:, kinds.argmax()],
        "count": counted.sum(axis=1),
    }


def _summary(sums: dict[str, Float64[np.ndarray, " sequences"]], bins: np.ndarray) -> dict:
    ratios = {"cross_entropy": np.stack([sums["nats"], sums["count"]])}
    ratios |= {"accuracy": np.stack([sums["right"], sums["count"]])}
    result = metrics.by_bin(ratios, np.arange(len(bins)), bins, _NAMES)
    for of in (result["overall"], *result["bins"].values()):
        if nats := of.get("cross_entropy"):
            of["perplexity"] = {key: None if x is None else float(np.exp(x)) for key, x in nats.items()}
    return result
