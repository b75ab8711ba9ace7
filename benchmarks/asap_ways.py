"""Compare ways to the outputs of a model's Sinkhorn layers: fitted maps (ASAP), full and truncated Sinkhorn.

scripts/compile_asap.py is the command line. A way is a function of a layer's inputs and values; it returns the outputs
and the potentials, like `sinkhorn_attention`.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from benchmarks import harness
from data import pipeline
from evaluation import runs, scoring
from models.attention import Asap, SinkhornSpec
from ot_attention import SinkhornInfo, asap, sinkhorn_attention
from ot_attention.asap import Deviation, Sample

_COMPARED = 4  # samples of a padded length, batches of one side, whose plans are compared entry by entry

_deviation = jax.jit(asap.deviation, static_argnames="spec")
Way = Callable[[Sample, Float[Array, "batch columns heads value"]], tuple]


class Given(NamedTuple):
    """One input of a layer, and the teacher's potentials: what the layer's own Sinkhorn steps find."""

    sample: Sample
    v: Float[Array, "batch columns heads value"]
    teacher: SinkhornInfo


class Layer(NamedTuple):
    """A layer and its inputs by padded length."""

    spec: SinkhornSpec
    inputs: dict[int, list[Given]]

    def samples(self) -> list[Sample]:
        return [given.sample for inputs in self.inputs.values() for given in inputs]


def attended(run: runs.Run, batches: Iterable[pipeline.Batch], progress: str) -> dict[str, Layer]:
    """Collect the inputs and the teacher's potentials of every layer; x and y of a batch are two samples."""
    layers = {name: Layer(of.spec, {}) for name, of in run.trainer.model(run.params).layers().items()}

    @jax.jit
    def inputs(params, *pair):
        given = run.trainer.model(params).attention_inputs(*pair)
        return {name: [(x.q, x.k, x.v, *x.lengths, x.dustbin_score) for x in of] for name, of in given.items()}

    for batch in tqdm(list(batches), desc=progress, unit=" batches", disable=None):
        pair = (jnp.asarray(batch[name]) for name in ("x", "y", "x_length", "y_length"))
        for name, of in inputs(run.params, *pair).items():
            for q, k, v, *rest in of:
                sample = Sample(q, k, *rest, f=jnp.zeros((0, 0, 0)))
                _, info = _attend(sample, v, layers[name].spec)
                layers[name].inputs.setdefault(q.shape[1], []).append(Given(sample._replace(f=info.f), v, info))
    return layers


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _attend(sample: Sample, v, spec: SinkhornSpec, implementation: Any = None) -> tuple:
    return sinkhorn_attention(sample.q, sample.k, v, spec, *sample[2:5], implementation)


@functools.partial(jax.jit, static_argnames="spec")
def apply(sample: Sample, v, of: Asap, spec: SinkhornSpec) -> tuple:
    """Take the way of a fitted map."""
    return asap.apply(of, sample.q, sample.k, v, spec, *sample[2:5])


def ways(spec: SinkhornSpec, of: Asap, steps: Iterable[int]) -> dict[str, Way]:
    """Make all ways to the outputs of a layer: the map `of`, Sinkhorn as trained, and with few steps."""
    zero = Asap.create(jnp.zeros_like(of.directions[:, :0]), ())
    truncated = {k: dataclasses.replace(spec, base_steps=k - 1, tail_steps=1, solver="sinkhorn") for k in steps}
    return {
        "teacher": functools.partial(_attend, spec=spec),
        "log domain": functools.partial(_attend, spec=spec, implementation="reference"),
        "asap": functools.partial(apply, of=of, spec=spec),
        "zero": functools.partial(apply, of=zero, spec=spec),
        **{f"sinkhorn {k}": functools.partial(_attend, spec=of) for k, of in truncated.items()},
    }


def compare(layer: Layer, ways: Mapping[str, Way], rounds: int) -> dict[str, dict]:
    """Measure the time and the deviation from the teacher of every way, at the most frequent padded length."""
    inputs = max(layer.inputs.values(), key=len)
    sample, v, _ = inputs[0]
    found: dict[str, dict] = {}
    for name, seconds in harness.clock(
        {of: functools.partial(way, sample, v) for of, way in ways.items()}, rounds
    ).items():
        # Other work on the machine cannot make the least time less.
        times = {"ms": 1e3 * statistics.median(seconds), "least_ms": 1e3 * min(seconds)}
        found[name] = {"shape": list(sample.q.shape), **times, "deviation": spread(layer.spec, inputs, ways[name])}
    return found


def spread(spec: SinkhornSpec, inputs: list[Given], way: Way) -> dict[str, dict]:
    """Summarise the deviations of some inputs: median and worst over pairs and heads, and medians of every head."""
    found = []
    for sample, v, teacher in inputs[:_COMPARED]:
        real = np.asarray(sample.q_lengths) > 0  # not a pair that fills up a batch
        q, k, *rest = sample[:-1]
        off = _deviation(q, k, spec, *rest, teacher=teacher[:2], student=way(sample, v)[1][:2])
        found.append([np.asarray(x)[real] for x in off])
    return {
        name: {"median": float(np.median(x)), "worst": float(x.max()), "heads": np.median(x, axis=0).tolist()}
        for name, x in zip(Deviation._fields, map(np.concatenate, zip(*found, strict=True)), strict=True)
    }


def metrics(
    run: runs.Run, maps: Mapping[str, Asap], families: pipeline.Families, batches: list, steps: Iterable[int]
) -> dict:
    """Score the model as trained, with maps, and with truncated steps, on the same pairs."""
    compared = {"teacher": run, "asap": runs.with_maps(run, maps)}
    for k in steps:
        config = run.config.copy_and_resolve_references()
        config.attention.update(base_steps=k - 1, tail_steps=1, solver="sinkhorn")
        compared[f"sinkhorn {k}"] = run._replace(config=config, trainer=runs.make_trainer(config))
    scored = {}
    for name, of in tqdm(compared.items(), desc="scoring", unit=" models", disable=None):
        scores = scoring.score_split(of.pretrained(), families, batches)
        scored[name] = {who: scores[who]["overall"] for who in ("model", "transport") if who in scores}
    return scored
