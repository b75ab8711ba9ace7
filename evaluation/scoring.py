"""Score an aligner and the baselines on pairs of a split."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

from alignment.inference import Pretrained
from data import vocab
from data.batches import Batch, unbatch
from data.index import Families
from data.transforms import NO_TARGET
from evaluation import baselines, figures, metrics
from evaluation.report import Example, Examples
from models import decoding, objectives
from models.aligner import Aligner
from models.mesh import DATA
from training.state import Trainer

_MASK_EVERY = 7  # residues
_PICTURES = 3  # plans drawn for every split, of different families


class Observer:
    """Collector of the plans to draw, the reliability and the examples of a split, pair by pair."""

    def __init__(self, split: str, pictures: Path, examples: Examples | None):
        self.reliability = metrics.Reliability()
        self._split, self._pictures, self._examples = split, pictures, examples
        self._drawn: set[str] = set()

    def __call__(self, example: Example) -> None:
        decoded, family = np.flatnonzero(example.match != decoding.NO_MATCH), example.family.accession
        match = example.match[decoded]
        self.reliability.add(example.posterior[decoded, match], match == example.pair.target[decoded])
        if self._examples:
            self._examples.see(self._split, example)
        if len(self._drawn) < _PICTURES and family not in self._drawn:
            self._drawn.add(family)
            draw_plan(self._pictures, self._split, example)


def pretrained(trainer: Trainer, mesh: Mesh, params: PyTree = None) -> Pretrained:
    """Return the trained aligner on a mesh: what scripts/align.py runs, on all devices and in all processes."""
    spec = getattr(trainer.objective, "spec", None)  # of plans; a pair HMM has none
    on_mesh = functools.partial(trainer.compiled_evaluation, mesh=mesh)
    return Pretrained(trainer.graph, params, spec and spec.band, on_mesh, mesh.shape[DATA])


def score_split(
    model: Pretrained,
    families: Families,
    batches: Iterable[Batch],
    *,
    see: Callable[[Example], None] = lambda example: None,
    progress: str = "",
) -> dict[str, dict]:
    """Summarise the predictions of a model and of every baseline on evaluation pairs of a split.

    A model is scored by what its alignments are decoded from: the posterior of its pair HMM, or its transport plan. The
    ids in `batches` refer to `families`. `see` is called with every pair. `progress` names the progress bar, which is
    shown on a terminal, and not if the name is empty. Raises ValueError if there is no pair.
    """
    scores: dict[str, list[metrics.PairScores]] = {who: [] for who in ("model", *baselines.BASELINES)}
    pairs = [of_one for batch in batches for of_one in unbatch(batch)]
    if not pairs:
        raise ValueError("there is no pair to score")
    measure = nothing if model.has_pair_hmm else reconstruction
    predictions = model.predict([(pair.x, pair.y) for _, pair in pairs], measure=measure)
    for n, found in tqdm(
        predictions, desc=progress, unit=" pairs", total=len(pairs), disable=None if progress else True
    ):
        (index, i, _, j), pair = pairs[n]
        family, plan, posterior = families[index], found.plan.dense(), found.posterior.dense()
        score = metrics.score_plan(family.accession, pair, posterior, found.match)
        scores["model"].append(dataclasses.replace(score, **found.measured))
        for who, baseline in baselines.BASELINES.items():
            scores[who].append(metrics.score_prediction(family.accession, pair, *baseline(pair)))
        told = scores["nw_blosum62"][-1], model.plan_label, found.probability
        see(Example(family, (i, j), pair, plan, posterior, found.match, score, *told))
    return {who: metrics.summarise(of_pairs) for who, of_pairs in scores.items() if of_pairs}


def score_negatives(
    model: Pretrained,
    families: Families,
    related: Iterable[Batch],
    unrelated: Iterable[Batch],
    *,
    done: Callable[[int], object] = lambda count: None,
    progress: str = "",
) -> dict[str, dict]:
    """Summarise how well a model and Needleman-Wunsch tell evaluation pairs of a split from unrelated pairs.

    A pair's score is its probability of homology. A model of plans has none: its score is the sum of the confidences of
    the decoded residue pairs over the length of the shorter sequence. The score of Needleman-Wunsch is its alignment
    score over the same. Diagonals have no score. `done` is called with the number of pairs of each finished batch.
    Raises ValueError if there is no pair.
    """
    positives, negatives = ([of_one for batch in of for of_one in unbatch(batch)] for of in (related, unrelated))
    if not (positives and negatives):
        raise ValueError("there is no pair to score")
    pairs = [pair for _, pair in (*negatives, *positives)]
    shorter = np.array([min(len(pair.x), len(pair.y)) for pair in pairs], np.float64)
    with tqdm(desc=progress, unit=" pairs", total=len(pairs), disable=None if progress else True) as bar:
        found = model.align([(pair.x, pair.y) for pair in pairs], done=lambda count: (bar.update(count), done(count)))
    confidence = [of.confidence.sum(dtype=np.float64) for of in found] / shorter
    homology = [of.probability for of in found] if model.has_pair_hmm else confidence
    by_nw = [(score, (of.match != NO_TARGET).sum()) for of, score in map(baselines.nw_with_score, pairs)]
    aligned = {
        "model": [(score, len(of.pairs)) for score, of in zip(homology, found, strict=True)],
        "nw_blosum62": [(score / length, count) for (score, count), length in zip(by_nw, shorter, strict=True)],
    }
    names, count = [families[x_family].accession for (x_family, *_), _ in negatives], len(negatives)
    summaries = {}
    for who, of_pairs in aligned.items():
        score, decoded = np.array(of_pairs, np.float64).T
        told = score[:count], score[count:], decoded[:count], shorter[:count]
        summaries[who] = metrics.summarise_negatives(names, *told)
    return summaries


def nothing(model: nnx.Module, batch: dict[str, Array]) -> dict[str, Float[Array, " batch"]]:
    """Measure nothing."""
    return {}


def reconstruction(model: Aligner, batch: dict[str, Array]) -> dict[str, Float[Array, " batch"]]:
    """Compute the reconstruction sums of `PairScores`: with x as it is, and with every seventh residue masked."""
    x = batch["x"]
    # Masks begin at a place that differs from pair to pair and does not depend on padding.
    position = jnp.arange(x.shape[1]) + (batch["x_length"] + batch["y_length"])[:, None]
    masked = (position % _MASK_EVERY == 0) & (x != vocab.PAD)
    batch = batch | {"target": jnp.full_like(x, NO_TARGET)}
    whole = objectives.sums(model, batch | {"x_seen": x, "query_mask": x != vocab.PAD})
    hidden = objectives.sums(model, batch | {"x_seen": jnp.where(masked, vocab.MASK, x), "query_mask": masked})
    return {
        "reconstruction_nats": whole["reconstruction"],
        "reconstruction_residues": whole["reconstruction/count"],
        "masked_nats": hidden["reconstruction"],
        "masked_residues": hidden["reconstruction/count"],
    }


def certify_split(certify: Callable, batches: Iterable[Batch]) -> dict[str, dict]:
    """Summarise each layer's certificates: median and worst of pairs and heads, None if infinite, and finite share."""

    def number(x):
        return float(x) if np.isfinite(x) else None

    def spread(x: np.ndarray) -> dict[str, float | None]:
        return {"median": number(np.median(x)), "worst": number(x.max()), "finite": float(np.isfinite(x).mean())}

    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for batch in batches:
        for layer, certificate in certify(batch).items():
            real = np.resize(batch["id"][:, 0] >= 0, len(certificate.residual))  # self-attention has x, then y
            for name, x in certificate._asdict().items():
                found.setdefault(layer, {}).setdefault(name, []).append(x[real])
    return {layer: {name: spread(np.concatenate(x)) for name, x in of.items()} for layer, of in found.items()}


def certifier(trainer: Trainer) -> Callable:
    """Return a function from parameters and a batch to the certificates of every layer."""
    names = "x", "y", "x_length", "y_length"
    return lambda params, batch: trainer.model(params).certificates(*(batch[name] for name in names))


def draw_plan(directory: Path, split: str, example: Example) -> None:
    """Draw the posterior of a pair with both alignments into the folder."""
    family, (row_x, row_y) = example.family.accession, example.rows
    name = re.sub(r"[^\w-]", "_", family)  # it comes from the data, and must not lead out of the folder
    path = directory / f"plan_{split}_{name}_{row_x}_{row_y}.png"
    title = f"{family} ({split}), rows {row_x} and {row_y}"
    figures.plan_heatmap(example.posterior, path, target=example.pair.target, match=example.match, title=title)
