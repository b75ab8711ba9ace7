"""The training loss and the metrics that need no decoding (contract, section 8), as sums over a batch."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from data import vocab
from models import pair_hmm
from models.aligner import Aligner, AlignerConfig
from models.attention import BlockSpec, SinkhornSpec

LEAST_PROBABILITY = 1e-6  # the floor of the sparse CE metric: 13.8 nats


@runtime_checkable
class Objective(Protocol):
    """What is trained: `AlignmentObjective`, `models.sorter.SortingObjective`; every array of a batch has it leading.

    Sums over a batch go by metric, `<name>` and how many under `<name>/count`.
    """

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model before training."""

    def augment(self, batch: dict[str, Array], key: PRNGKeyArray) -> dict[str, Array]:
        """The batch with whatever is random in it."""

    def totals(self, model: Any, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Sums over (a part of) a batch."""

    def counts(self, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Those of the counts that `value` divides by, known without the model."""

    def value(self, totals: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
        """The loss."""

    def residues(self, batch: dict[str, Array]) -> Int[Array, ""]:
        """How much work a batch is."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`config.loss`: weights of the three terms, and the share of x that is masked while training.

    With `mask_rate` above 0 only masked residues are reconstructed: an unmasked one can be routed to an identical
    residue of y without any alignment.
    """

    reconstruction: float = 1.0
    sparse_ce: float = 0.0
    alignment: float = 0.0
    mask_rate: float = 0.15

    def __post_init__(self):
        terms = self.reconstruction, self.sparse_ce, self.alignment
        if min(terms) < 0 or not any(terms):
            raise ValueError(
                f"loss.reconstruction={self.reconstruction}, loss.sparse_ce={self.sparse_ce} and "
                f"loss.alignment={self.alignment} must not be negative, nor all 0"
            )
        if not 0 <= self.mask_rate < 1:
            raise ValueError(f"loss.mask_rate={self.mask_rate} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class AlignmentObjective:
    """What is trained: an aligner (an `Objective`). encoder: of its self-attention, if another than `spec`."""

    model: AlignerConfig
    spec: SinkhornSpec
    loss: LossConfig
    encoder: BlockSpec | None = None

    def __post_init__(self):
        if self.loss.alignment and not self.model.gap_model:
            raise ValueError(f"loss.alignment={self.loss.alignment} needs model.gap_model=True")

    def make(self, rngs: nnx.Rngs) -> Aligner:
        return Aligner(self.model, self.spec, encoder=self.encoder, rngs=rngs)

    def augment(self, batch: dict[str, Array], key: PRNGKeyArray) -> dict[str, Array]:
        """With what is masked, and random keys if the encoder takes noise."""
        x_seen, query_mask = queries(batch["x"], key, self.loss.mask_rate)
        noise_key = jax.random.fold_in(key, 1)  # what is masked must not say what the noise is
        noise = {"noise": jax.random.split(noise_key, len(x_seen))} if self.encoder else {}
        return batch | {"x_seen": x_seen, "query_mask": query_mask} | noise

    def totals(self, model: Aligner, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        return totals(model, batch)

    def counts(self, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        return counts(batch)

    def value(self, totals: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
        return weighted_loss(totals, self.loss)

    def residues(self, batch: dict[str, Array]) -> Int[Array, ""]:
        return (batch["x_length"] + batch["y_length"]).sum()


def queries(
    x: Int[Array, "batch length"], key: PRNGKeyArray, mask_rate: float
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """x as the plan may see it, and the residues that reconstruction asks for."""
    if not mask_rate:
        return x, x != vocab.PAD
    query_mask = (jax.random.uniform(key, x.shape) < mask_rate) & (x != vocab.PAD)
    return jnp.where(query_mask, vocab.MASK, x), query_mask


def sums(model: Aligner, batch: dict[str, Array]) -> dict[str, Float[Array, "batch"]]:
    """Sums over the residues of every pair, and under `<name>/count` how many; their quotients are the metrics.

    `batch` holds, beside what the pipeline gives, `x_seen` (what queries are computed from) and `query_mask`, and while
    training perhaps `noise`.
    """
    x_seen, y, target, *lengths = (batch[name] for name in ("x_seen", "y", "target", "x_length", "y_length"))
    transported, logits = model(x_seen, y, target, *lengths, noise=batch.get("noise"))
    nats = -jax.nn.log_softmax(logits)
    nats = jnp.take_along_axis(nats, jnp.clip(batch["x"] - 1, 0, len(vocab.RESIDUES) - 1)[..., None], -1)[..., 0]
    aligned, log_target = batch["target"] >= 0, transported.log_target
    error = jnp.abs(transported.barycenter - batch["target"])
    per_residue = {
        "reconstruction": (nats, _known(batch)),
        "sparse_ce": (-jnp.maximum(log_target, math.log(LEAST_PROBABILITY)), aligned),
        # The floor has no gradient just where one is needed most; outside the band there is none to be had.
        "sparse_ce_unfloored": (-log_target, aligned & jnp.isfinite(log_target)),
        "barycenter_mae": (error, aligned),
        "barycenter_within_1": (error <= 1, aligned),
    }
    if transported.log_plan is not None:
        nll = pair_hmm.negative_log_likelihood(
            transported.log_plan, batch["target"], batch["x_length"], batch["y_length"], model.gaps()
        )
        # A pair's likelihood is of all its residues together; each aligned one bears the same part of it.
        share = nll / jnp.maximum(aligned.sum(-1), 1)
        per_residue["alignment"] = (jnp.broadcast_to(share[:, None], aligned.shape), aligned)
    result = {"residual": transported.residual, "residual/count": jnp.ones_like(transported.residual)}
    for name, (value, where) in per_residue.items():
        result[name] = jnp.where(where, value, 0).sum(-1)
        result[f"{name}/count"] = where.sum(-1).astype(jnp.float32)
    return result


def totals(model: Aligner, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """`sums` over the whole batch."""
    return {name: value.sum() for name, value in sums(model, batch).items()}


def counts(batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """The counts that `weighted_loss` divides by, known without the model."""
    return {
        "reconstruction/count": _known(batch).sum().astype(jnp.float32),
        "sparse_ce/count": (batch["target"] >= 0).sum().astype(jnp.float32),
    }


def means(totals: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """The metrics of a batch."""
    names = [name for name in totals if f"{name}/count" in totals and name != "sparse_ce_unfloored"]
    return {name: _quotient(totals, name) for name in names}


def weighted_loss(totals: dict[str, Float[Array, ""]], config: LossConfig) -> Float[Array, ""]:
    """The weighted loss."""
    cross_entropy = totals["sparse_ce_unfloored"] / jnp.maximum(totals["sparse_ce/count"], 1)
    loss = config.reconstruction * _quotient(totals, "reconstruction") + config.sparse_ce * cross_entropy
    if config.alignment:
        loss += config.alignment * totals["alignment"] / jnp.maximum(totals["sparse_ce/count"], 1)
    return loss


def _quotient(totals: dict[str, Float[Array, ""]], name: str) -> Float[Array, ""]:
    return totals[name] / jnp.maximum(totals[f"{name}/count"], 1)


def _known(batch: dict[str, Array]) -> Bool[Array, "batch length"]:
    """Residues whose reconstruction counts: asked for, and one of the twenty."""
    return batch["query_mask"] & (batch["x"] > 0) & (batch["x"] <= len(vocab.RESIDUES))
