"""The task of predicting masked residues: perplexity and accuracy, by length, beside the training composition."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float64, Int64
from tqdm import tqdm

from data import masked as batching
from data import pipeline, sequences, vocab
from data.masked import SequenceBatch
from evaluation import figures, metrics
from evaluation.task import OF_ALL_TASKS, Options, Task, Validation, evaluated_at_once, limit_of, resolve_data_dir
from models.attention import check_segments_stay_apart, specs_of
from models.encoder import EncoderConfig
from models.masked import MaskedLossConfig, MaskedObjective, is_known, scores
from training import sharding
from training.state import Trainer

if TYPE_CHECKING:
    from evaluation.runs import Run

_EVERY = 7  # residues of a sequence, of which one is masked: 14 %, nearly as in training
_EDGES = (64, 128, 256, 512, 1024)  # last lengths of bins
_NAMES = (
    f"-{_EDGES[0]}",
    *(f"{a + 1}-{b}" for a, b in itertools.pairwise(_EDGES)),
    f"{_EDGES[-1] + 1}-",
)
BASELINE = "unigram"
_CUT_ATTENTION = "allowed are attention.kind=sinkhorn with attention.band=0 or more, and model.attention_every=0"


class MaskedResiduesTask(Task):
    """Predict masked residues of single sequences, which trains the encoder of an aligner; score perplexities."""

    sections = (*OF_ALL_TASKS, batching.SequenceConfig, EncoderConfig, MaskedLossConfig)
    purpose = "predict masked residues"
    splits = ("validation", "test_ood")

    def objective(self) -> MaskedObjective:
        spec, blocks = specs_of(self.config.to_dict())
        model, loss = EncoderConfig.of(self.config.model.to_dict()), MaskedLossConfig.of(self.config.loss.to_dict())
        if self.config.data.join and model.has_attention:
            check_segments_stay_apart(blocks or spec)
        return MaskedObjective(model, blocks or spec, loss)

    def check_mesh(self) -> None:
        """Raise ValueError unless the devices of `mesh.sequence` can share sequences of every bucket."""
        shares, buckets = self.config.mesh.sequence, self.config.data.buckets
        if shares == 1:
            return
        if uneven := [length for length in buckets if length % shares]:
            raise ValueError(f"data.buckets={uneven[0]}: with mesh.sequence={shares} allowed are multiples of {shares}")
        objective = self.objective()
        for needed, why in objective.model.reaches(objective.attention):
            if needed is None:
                raise ValueError(f"mesh.sequence={shares}: {why}, which needs whole sequences; {_CUT_ATTENTION}")
            if needed > (share := min(buckets) // shares):
                raise ValueError(
                    f"mesh.sequence={shares} leaves {share} places of data.buckets={min(buckets)} to a device: {why} "
                    f"needs at least {needed}; allowed are fewer devices or longer buckets"
                )

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        index, count = sharding.host_shard(mesh)
        shared = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        config = batching.SequenceConfig.of({**self.config.data, **shared})
        stream = batching.training_stream(self._open("train"), config, shard_index=index, shard_count=count)
        return pipeline.BatchIterator(stream)

    def abstract_batch(self, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        x = jax.ShapeDtypeStruct((self.config.batch_size, length), jnp.int32)
        batch = {"x": x, "length": jax.ShapeDtypeStruct(x.shape[:1], x.dtype)}
        return sharding.abstract(batch | ({"segments": x} if self.config.data.join else {}), x.shape[0], mesh)

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        score = self._score_split(trainer, mesh, self._open("train").residues)
        sources, limit = {name: self._open(name) for name in self._eval_splits()}, limit_of(self.config)
        return lambda params, after_each: {
            name: score(params, self._evaluated(source, mesh, limit, after_each)) for name, source in sources.items()
        }

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
        predict = trainer.compiled_evaluation(predictor(trainer), mesh)
        return lambda params, batches: score_split(functools.partial(predict, params), batches, residues)

    def _evaluated(
        self, source: sequences.SequenceSource, mesh: Mesh, limit: int | None, before_each: Callable = lambda: None
    ) -> Iterator[SequenceBatch]:
        devices = mesh.shape["data"]
        size = evaluated_at_once(self.config.batch_size, devices)
        options: dict = {"limit": limit, "divisible_by": devices}
        for batch in batching.evaluation_batches(source, size, self.config.data.buckets, **options):
            before_each()
            yield batch


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
