"""Estimate of the memory that a run takes, from shapes alone, before anything is compiled."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from data.memory import available
from models.mesh import DATA, MODEL, SEQUENCE
from training import sharding
from training.state import Trainer

# XLA computes cheap results again in place of keeping them: it takes .64 to .93 of the bytes that JAX hands from the
# forward to the backward pass (docs/reliability.md). The estimate must not be above.
_TAKEN = 0.6
_WORKER = 100 * 2**20  # bytes of a process that makes batches: it imports what train.py imports
_ADVICE = {  # what to do where most of the memory is for this
    "model": "lower model.width{width} or model.depth{depth}",
    "batch": "lower batch_size{batch_size}, {longest} or model.width{width}, or raise optimizer.accumulate{accumulate}",
    "ahead": "lower data.prefetch{prefetch}, data.workers{workers}, batch_size{batch_size} or {longest}",
    "workers": "lower data.workers{workers}",
}


class Estimate(NamedTuple):
    """Least bytes that a run takes; the first two on each device."""

    model: int  # parameters, average, moments and gradient
    batch: int  # kept between the forward and the backward pass of a part of a batch
    ahead: int  # batches made ahead
    workers: int  # processes that make them


def estimate(trainer: Trainer, mesh: Mesh, batch: Mapping[str, np.ndarray], config: ConfigDict) -> Estimate:
    """Estimate the memory of a run. `batch` has the shapes of this process's part of its largest batch."""
    state = trainer.abstract_state(mesh)
    groups = mesh.shape[DATA] // sharding.host_shard(mesh)[1]
    rows, shares = len(batch["id"]) // (groups * trainer.settings.accumulate), mesh.shape[SEQUENCE]
    # Each device keeps what a sequence of the length of its share needs.
    part = {
        name: jax.ShapeDtypeStruct((rows, *(places // shares for places in x.shape[1:])), x.dtype)
        for name, x in batch.items()
        if name != "id"
    }
    gradient = state.params  # as large
    data = config.data
    return Estimate(
        model=sum(map(_bytes_on_a_device, jax.tree.leaves((state, gradient)))),
        batch=int(_TAKEN * _kept(trainer, state.params, part)) // mesh.shape[MODEL],
        ahead=data.prefetch * max(data.workers, 1) * sum(x.nbytes for x in batch.values()),
        workers=data.workers * _WORKER,
    )


def check(trainer: Trainer, mesh: Mesh, batch: Mapping[str, np.ndarray], config: ConfigDict) -> None:
    """Raise ValueError if the machine or its accelerator has too little memory for a run."""
    judge(estimate(trainer, mesh, batch, config), list(mesh.local_mesh.devices.flat), config)


def judge(needed: Estimate, devices: Sequence[Any], config: ConfigDict) -> None:
    """Raise ValueError if this machine, or one of these devices of this process, has less than a run needs."""
    on_host = needed.ahead + needed.workers
    if devices[0].platform == "cpu":
        _refuse_above(available(), "free", on_host + len(devices) * (needed.model + needed.batch), needed, config)
        return
    _refuse_above(available(), "free", on_host, needed._replace(model=0, batch=0), config)
    limits = ((device.memory_stats() or {}).get("bytes_limit") for device in devices)
    for limit in filter(None, limits):
        on_device = needed._replace(ahead=0, workers=0)
        _refuse_above(limit, "what each device has", needed.model + needed.batch, on_device, config)


def _refuse_above(limit: int, of_what: str, total: int, needed: Estimate, config: ConfigDict) -> None:
    if total <= limit:
        return
    data, model = config.data.to_dict(), config.model
    key, most_residues = ("buckets", data["buckets"][-1]) if "buckets" in data else ("longest", data["longest"])
    longest = f"data.{key}{_given(most_residues)}"
    given = {"width": model.width, "depth": model.depth, "batch_size": config.batch_size}
    given |= {"accumulate": config.optimizer.accumulate, "prefetch": data["prefetch"], "workers": data["workers"]}
    most = max(needed._fields, key=lambda name: getattr(needed, name))
    advice = _ADVICE[most].format(longest=longest, **{name: _given(value) for name, value in given.items()})
    raise ValueError(
        f"this run needs at least {_in_words(total)} of memory, {_in_words(limit)} are {of_what}: {advice}"
    )


def _kept(trainer: Trainer, params: PyTree, batch: Mapping[str, Any]) -> int:
    """Count the bytes that JAX keeps from the forward to the backward pass, beside the parameters."""

    def backward(params: PyTree, batch: dict) -> PyTree:
        batch = trainer.objective.augment(batch, jax.random.key(0))

        def loss(params):
            totals = trainer.objective.totals(trainer.model(params), batch)
            return trainer.objective.value(totals | trainer.objective.counts(batch))

        return jax.vjp(loss, params)[1]

    parameters = sum(map(_bytes, jax.tree.leaves(params)))
    return max(sum(map(_bytes, jax.tree.leaves(jax.eval_shape(backward, params, batch)))) - parameters, 0)


def _bytes(x: Any, shape: Iterable[int] | None = None) -> int:
    return math.prod(x.shape if shape is None else shape) * x.dtype.itemsize


def _bytes_on_a_device(x: Any) -> int:
    return _bytes(x, x.sharding.shard_shape(x.shape))


def _given(value: Any) -> str:
    return f" ({value})"


def _in_words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
