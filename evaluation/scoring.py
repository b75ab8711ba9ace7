"""Score a model and the baselines on pairs of a split."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alignment import decoding
from data import pipeline, vocab
from evaluation import baselines, figures, metrics
from evaluation.report import Example, Examples
from models import objectives
from models.attention import Certificate
from training.state import Trainer

_MASK_EVERY = 7  # residues; masked reconstruction asks for every seventh one
_PICTURES = 3  # plans drawn for every split, of different families

Predict = Callable[[pipeline.Batch], dict[str, np.ndarray]]


class Observer:
    """What is kept of the pairs of a split beside their scores: plans of the first families, reliability, examples."""

    def __init__(self, split: str, pictures: Path, examples: Examples | None):
        self.reliability = metrics.Reliability()
        self._split, self._pictures, self._examples = split, pictures, examples
        self._drawn: set[str] = set()

    def __call__(self, example: Example) -> None:
        decoded = np.flatnonzero(example.match != decoding.NO_MATCH)
        match = example.match[decoded]
        self.reliability.add(example.posterior[decoded, match], match == example.pair.target[decoded])
        if self._examples:
            self._examples.see(self._split, example)
        if len(self._drawn) < _PICTURES and example.family.accession not in self._drawn:
            self._drawn.add(example.family.accession)
            draw_plan(self._pictures, self._split, example)


def score_split(
    predict: Predict,
    families: pipeline.Families,
    batches: Iterable[pipeline.Batch],
    *,
    see: Callable[[Example], None] = lambda example: None,
    progress: str = "",
) -> dict[str, dict]:
    """Summary of the model and of every baseline on evaluation pairs of a split, the families'.

    The plan of a model with a gap model is the posterior that its pair HMM makes of what was transported, and is what
    is decoded; `transport` then is the transport plan by itself, with the same decoded alignment. see: is given every
    pair.
    """
    scores: dict[str, list[metrics.PairScores]] = {who: [] for who in ("model", "transport", *baselines.BASELINES)}
    for batch in tqdm(list(batches), desc=progress, unit=" batches", disable=not progress):
        result = predict(batch)
        plans, gaps = result.pop("plan"), result.pop("gaps", None)
        lengths = batch["x_length"], batch["y_length"]
        posterior, match = decoding.decode_dense(plans, *lengths, gaps)
        for n, (identity, pair) in enumerate(pipeline.unbatch(batch)):
            family = families[identity[0]]
            plan, found = plans[n, : len(pair.x), : len(pair.y)], match[n, : len(pair.x)]
            of_pair = posterior[n, : len(pair.x), : len(pair.y)]
            score = metrics.score_plan(family.accession, pair, of_pair, found)
            if gaps is not None:
                scores["transport"].append(metrics.score_plan(family.accession, pair, plan, found))
            scores["model"].append(score.with_reconstruction({k: v[n] for k, v in result.items()}))
            for who, baseline in baselines.BASELINES.items():
                prediction = baseline(pair)
                scores[who].append(metrics.score_prediction(family.accession, pair, *prediction))
            see(Example(family, identity[1:], pair, plan, of_pair, found, score, scores["nw_blosum62"][-1]))
    return {who: metrics.summarise(of_pairs) for who, of_pairs in scores.items() if of_pairs}


def predictor(trainer: Trainer) -> Callable:
    """`(params, batch) -> plan, gap model if any, reconstruction sums`, with x as it is and with residues masked."""

    def predict(params, batch):
        model = trainer.model(params)
        x = batch["x"]
        position = jnp.arange(x.shape[1]) + batch["id"].sum(-1, keepdims=True)
        masked = (position % _MASK_EVERY == 0) & (x != vocab.PAD)
        whole = objectives.sums(model, batch | {"x_seen": x, "query_mask": x != vocab.PAD})
        hidden = objectives.sums(model, batch | {"x_seen": jnp.where(masked, vocab.MASK, x), "query_mask": masked})
        gaps = {"gaps": model.gaps()} if model.config.gap_model else {}
        return gaps | {
            "plan": model.plan(x, batch["y"], batch["x_length"], batch["y_length"]),
            "reconstruction_nats": whole["reconstruction"],
            "reconstruction_residues": whole["reconstruction/count"],
            "masked_nats": hidden["reconstruction"],
            "masked_residues": hidden["reconstruction/count"],
        }

    return predict


def certify_split(certify: Callable, batches: Iterable[pipeline.Batch]) -> dict[str, dict]:
    """For every layer and certificate the median and the worst over pairs and heads (None: infinite), and the share
    that is finite.
    """
    found: dict[str, list[Certificate]] = {}
    for batch in batches:
        for layer, certificate in certify(batch).items():
            real = np.resize(batch["id"][:, 0] >= 0, len(certificate.residual))  # self-attention has x, then y
            found.setdefault(layer, []).append(Certificate(*(x[real] for x in certificate)))
    return {layer: _spread(jax.tree.map(lambda *x: np.concatenate(x), *of)) for layer, of in found.items()}


def _spread(certificate: Certificate) -> dict[str, dict]:
    def number(x):
        return float(x) if np.isfinite(x) else None

    return {
        name: {"median": number(np.median(x)), "worst": number(x.max()), "finite": float(np.isfinite(x).mean())}
        for name, x in certificate._asdict().items()
    }


def certifier(trainer: Trainer) -> Callable:
    """`(params, batch) -> certificates` of every layer."""
    return lambda params, batch: trainer.model(params).certificates(
        batch["x"], batch["y"], batch["x_length"], batch["y_length"]
    )


def draw_plan(directory: Path, split: str, example: Example) -> None:
    family, (row_x, row_y) = example.family.accession, example.rows
    name = re.sub(r"[^\w-]", "_", family)  # it comes from the data, and must not lead out of the folder
    path = directory / f"plan_{split}_{name}_{row_x}_{row_y}.png"
    title = f"{family} ({split}), rows {row_x} and {row_y}"
    figures.plan_heatmap(example.posterior, path, target=example.pair.target, match=example.match, title=title)
