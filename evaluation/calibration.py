"""Fit what an aligner says about its own alignments, on validation pairs: after training, before its weights are used.

The temperature of the posterior makes confidence mean what it says: among residue pairs of confidence .8, 80 % are
right (temperature scaling, Guo et al. 2017, arXiv 1706.04599). The probability of homology is a logistic regression on
the log-odds of alignment and the logarithm of the number of places where an alignment could be, from as many unrelated
pairs as related ones (Platt scaling). So a probability is for a pair that was as likely homologous as not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Float64, PyTree

from alignment.inference import Pretrained
from data.batches import unbatch
from data.transforms import Pair
from data.variants import NEGATIVES
from evaluation.alignment import AlignmentTask
from evaluation.runs import Run

SPLITS = ("validation", "validation_flanked")
_TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4)
_LEAST = 1e-3  # probability that a confidence is taken for at least, so that one sure error does not decide


def fitted(run: Run, data_dir: str, limit: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Fit the temperature on validation pairs with and without flanks, then homology; return parameters and a report.

    Raises ValueError if the model has no pair HMM, or the data no validation pairs.
    """
    model = run.pretrained()
    if not model.has_pair_hmm:
        raise ValueError("a model of transport plans has nothing to calibrate: give one of task pair_hmm")
    plain, flanked = (_pairs(run, data_dir, split, limit)[0] for split in SPLITS)
    pairs = plain + flanked
    losses = {t: _loss(_with(model, temperature=t), pairs) for t in _TEMPERATURES}
    best = min(losses, key=losses.__getitem__)
    model = _with(model, temperature=best)
    _, unrelated = _pairs(run, data_dir, NEGATIVES, limit)
    homology = _logistic(_features(model, pairs), _features(model, unrelated))
    told = [
        "temperature "
        + ", ".join(f"{t:g} {loss:.4f}" for t, loss in losses.items())
        + f" nats a residue pair: {best:g}",
        f"homology {homology[0]:.3f} log-odds {homology[1]:+.3f} log(lengths) {homology[2]:+.3f}",
    ]
    return _with(model, temperature=best, homology=homology).params, told


def _pairs(run: Run, data_dir: str, split: str, limit: int | None) -> tuple[list[Pair], list[Pair]]:
    """Return the related pairs of a split, and the unrelated ones if it has any."""
    _, batches = cast(AlignmentTask, run.task).open(data_dir, split, run.mesh)
    sets = [[pair for batch in some for _, pair in unbatch(batch)] for some in batches(limit)]
    return sets[0], sets[1] if len(sets) > 1 else []


def _with(model: Pretrained, **values: Any) -> Pretrained:
    """Replace numbers of the calibration; compiled programs stay."""
    changed = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    params: PyTree = {**model.params, "calibration": {**model.params["calibration"], **changed}}
    return dataclasses.replace(model, params=params)


def _loss(model: Pretrained, pairs: Sequence[Pair]) -> float:
    """Return the mean log-loss of the confidence of decoded residue pairs, in nats."""
    found = model.align([(pair.x, pair.y) for pair in pairs])
    confidence = np.concatenate([of.confidence for of in found])
    right = np.concatenate(
        [pair.target[of.pairs[:, 0]] == of.pairs[:, 1] for of, pair in zip(found, pairs, strict=True)]
    )
    sure = np.clip(confidence, _LEAST, 1 - _LEAST)
    return float(-np.where(right, np.log(sure), np.log(1 - sure)).mean())


def _features(model: Pretrained, pairs: Sequence[Pair]) -> Float64[np.ndarray, "pairs 3"]:
    found = model.align([(pair.x, pair.y) for pair in pairs])
    return np.array([(of.log_odds, np.log(len(p.x) * len(p.y)), 1) for of, p in zip(found, pairs, strict=True)])


def _logistic(
    related: Float64[np.ndarray, "related 3"], unrelated: Float64[np.ndarray, "unrelated 3"]
) -> Float64[np.ndarray, "3"]:
    """Fit weights of a logistic regression in which both kinds count alike, with a little shrinkage."""

    def loss(w):
        parts = np.logaddexp(0, -related @ w).mean() + np.logaddexp(0, unrelated @ w).mean()
        return parts + 1e-4 * (w[:2] ** 2).sum()

    return scipy.optimize.minimize(loss, np.array([0.1, -0.1, 0.0]), method="BFGS").x
