"""The training loss, and the metrics that need no decoding (docs/math.md, section 8), as sums over a batch."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from data import vocab
from data.settings import Number, Section
from models.aligner import Aligner, AlignerConfig
from models.attention import BlockSpec, SinkhornSpec

LEAST_PROBABILITY = 1e-6  # floor of the sparse cross-entropy metric: 13.8 nats

Batch = dict[str, Array]  # the first axis of every array counts the examples
Totals = dict[str, Float[Array, ""]]  # sum of metric `<name>`, and the number of its terms as `<name>/count`


@runtime_checkable
class Objective(Protocol):
    """Make a model and compute its loss: `AlignmentObjective`, and those of `models.sorter` and `models.masked`."""

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...  # untrained
    def augment(self, batch: Batch, key: PRNGKeyArray) -> Batch: ...  # adds everything random: masks, noise
    def totals(self, model: Any, batch: Batch) -> Totals: ...  # sums of the metrics over a batch or a part of it
    def counts(self, batch: Batch) -> Totals: ...  # of the terms that `value` divides by, without the model
    def value(self, totals: Totals) -> Float[Array, ""]: ...  # the loss
    def residues(self, batch: Batch) -> Int[Array, ""]: ...  # of a batch, the measure of its work


@dataclasses.dataclass(frozen=True)
class LossConfig(Section):
    """`config.loss`: weights of the two terms, and the share of x that is masked in training.

    With `mask_rate` above 0 only masked residues are reconstructed: an unmasked residue could be routed to an identical
    one of y without any alignment.
    """

    name: ClassVar[str] = "loss"

    reconstruction: Annotated[float, Number()] = 1.0
    sparse_ce: Annotated[float, Number()] = 0.0
    mask_rate: Annotated[float, Number(0.0, 1.0, open_most=True)] = 0.15

    def __post_init__(self):
        super().__post_init__()
        if not (self.reconstruction or self.sparse_ce):
            raise ValueError("loss.reconstruction=0.0, loss.sparse_ce=0.0: one must be above 0")


@dataclasses.dataclass(frozen=True)
class AlignmentObjective:
    """Objective of an aligner. encoder: Kind of its self-attention, if not Sinkhorn of `spec`."""

    model: AlignerConfig
    spec: SinkhornSpec
    loss: LossConfig
    encoder: BlockSpec | None = None

    def make(self, rngs: nnx.Rngs) -> Aligner:
        return Aligner(self.model, self.spec, encoder=self.encoder, rngs=rngs)

    def augment(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Mask residues of x, and add random keys if the encoder takes noise."""
        x_seen, query_mask = queries(batch["x"], key, self.loss.mask_rate)
        noise_key = jax.random.fold_in(key, 1)  # the noise must be independent of the mask
        noise = {"noise": jax.random.split(noise_key, len(x_seen))} if self.encoder else {}
        return batch | {"x_seen": x_seen, "query_mask": query_mask} | noise

    def totals(self, model: Aligner, batch: Batch) -> Totals:
        return {name: value.sum() for name, value in sums(model, batch).items()}

    def counts(self, batch: Batch) -> Totals:
        return {
            "reconstruction/count": _known(batch).sum().astype(jnp.float32),
            "sparse_ce/count": (batch["target"] >= 0).sum().astype(jnp.float32),
        }

    def value(self, totals: Totals) -> Float[Array, ""]:
        aligned = jnp.maximum(totals["sparse_ce/count"], 1)
        loss = self.loss.reconstruction * _mean(totals, "reconstruction")
        loss += self.loss.sparse_ce * (totals["sparse_ce_unfloored"] / aligned)
        return loss

    def residues(self, batch: Batch) -> Int[Array, ""]:
        return (batch["x_length"] + batch["y_length"]).sum()


def queries(
    x: Int[Array, "batch length"], key: PRNGKeyArray, mask_rate: float
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Return x with masked residues, and the mask of the residues to reconstruct."""
    if not mask_rate:
        return x, x != vocab.PAD
    query_mask = (jax.random.uniform(key, x.shape) < mask_rate) & (x != vocab.PAD)
    return jnp.where(query_mask, vocab.MASK, x), query_mask


def sums(model: Aligner, batch: Batch) -> dict[str, Float[Array, "batch"]]:
    """Sum each metric over the residues of every pair; count the residues as `<name>/count`.

    The batch of the pipeline is extended by `x_seen`, the x that queries are computed from, and `query_mask`, and in
    training perhaps by `noise`.
    """
    x_seen, y, target, *lengths = (batch[name] for name in ("x_seen", "y", "target", "x_length", "y_length"))
    transported, logits = model(x_seen, y, target, *lengths, noise=batch.get("noise"))
    nats = -jax.nn.log_softmax(logits)
    nats = jnp.take_along_axis(nats, jnp.clip(batch["x"] - 1, 0, len(vocab.RESIDUES) - 1)[..., None], -1)[..., 0]
    aligned, log_target = target >= 0, transported.log_target
    error = jnp.abs(transported.barycenter - target)
    per_residue = {
        "reconstruction": (nats, _known(batch)),
        "sparse_ce": (-jnp.maximum(log_target, math.log(LEAST_PROBABILITY)), aligned),
        # The floor has no gradient just where one is needed most; outside the band there is none.
        "sparse_ce_unfloored": (-log_target, aligned & jnp.isfinite(log_target)),
        "barycenter_mae": (error, aligned),
        "barycenter_within_1": (error <= 1, aligned),
    }
    result = {"residual": transported.residual, "residual/count": jnp.ones_like(transported.residual)}
    for name, (value, where) in per_residue.items():
        result[name] = jnp.where(where, value, 0).sum(-1)
        result[f"{name}/count"] = where.sum(-1).astype(jnp.float32)
    return result


def means(totals: Totals) -> Totals:
    """Compute the metrics of a batch. The perplexity is the exponential of its mean, which is in nats."""
    names = [name for name in totals if f"{name}/count" in totals and name != "sparse_ce_unfloored"]
    found = {name: _mean(totals, name) for name in names}
    return found | {name: jnp.exp(found[name]) for name in names if name == "perplexity"}


def _mean(totals: Totals, name: str) -> Float[Array, ""]:
    return totals[name] / jnp.maximum(totals[f"{name}/count"], 1)


def _known(batch: Batch) -> Bool[Array, "batch length"]:
    """Mark the residues to reconstruct that are one of the twenty."""
    return batch["query_mask"] & (batch["x"] > 0) & (batch["x"] <= len(vocab.RESIDUES))
