"""A model that predicts masked residues of a sequence, to train the aligner's encoder without alignments.

Masking follows BERT (Devlin et al., 2019).
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from data import vocab
from data.settings import Number, Section
from models.attention import BlockSpec, Lengths, Noise, Segments, SinkhornSpec
from models.encoder import Encoder, EncoderConfig
from models.objectives import Batch, Totals

_MASKED, _REPLACED = 0.8, 0.1  # shares of the chosen residues; the others stay as they are
_TWENTY = len(vocab.RESIDUES)

Tokens = Int[Array, "batch length"]
Chosen = Bool[Array, "batch length"]  # residues to predict


@dataclasses.dataclass(frozen=True)
class MaskedLossConfig(Section):
    """`config.loss` of masked residues."""

    name: ClassVar[str] = "loss"

    # share of the residues to predict
    mask_rate: Annotated[float, Number(0.0, 1.0, open_least=True, open_most=True)] = 0.15


class MaskedResidues(nnx.Module):
    """The encoder of `models.aligner.Aligner`, by the same name, and a linear layer to the twenty residues."""

    def __init__(self, config: EncoderConfig, spec: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, spec, rngs=rngs)
        self.residues = nnx.Linear(config.width, _TWENTY, rngs=rngs)

    def __call__(
        self, seen: Tokens, length: Lengths, noise: Noise = None, segments: Segments = None
    ) -> Float[Array, "batch length residues"]:
        """Compute log-probabilities of the twenty residues at every place."""
        return jax.nn.log_softmax(self.residues(self.encoder(seen, length, noise, segments)))


@dataclasses.dataclass(frozen=True)
class MaskedObjective:
    """Objective of masked residues (a `models.objectives.Objective`). attention: Of the encoder."""

    model: EncoderConfig
    attention: SinkhornSpec | BlockSpec
    loss: MaskedLossConfig

    def make(self, rngs: nnx.Rngs) -> MaskedResidues:
        return MaskedResidues(self.model, self.attention, rngs=rngs)

    def augment(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Choose residues to predict, and hide most of them from the encoder."""
        return augmented(batch, key, self.loss.mask_rate, self.attention)

    def totals(self, model: MaskedResidues, batch: Batch) -> Totals:
        predicted = model(batch["seen"], batch["length"], batch.get("noise"), batch.get("segments"))
        nats, right = scores(predicted, batch["x"])
        terms = {"cross_entropy": nats, "perplexity": nats, "accuracy": right}
        sums = {name: jnp.where(batch["chosen"], x, 0).sum() for name, x in terms.items()}
        return sums | {f"{name}/count": batch["chosen"].sum().astype(jnp.float32) for name in terms}

    def counts(self, batch: Batch) -> Totals:
        return {"cross_entropy/count": batch["chosen"].sum().astype(jnp.float32)}

    def value(self, totals: Totals) -> Float[Array, ""]:
        return totals["cross_entropy"] / jnp.maximum(totals["cross_entropy/count"], 1)

    def residues(self, batch: Batch) -> Int[Array, ""]:
        return (batch["x"] != vocab.PAD).sum()


def augmented(batch: Batch, key: PRNGKeyArray, mask_rate: float, attention: SinkhornSpec | BlockSpec) -> Batch:
    """Add what the encoder sees of `x`, the residues to predict, and random keys if its attention takes noise."""
    seen, chosen = hidden(batch["x"], key, mask_rate)
    noise_key = jax.random.fold_in(key, 1)  # the noise must be independent of the mask
    noise = {"noise": jax.random.split(noise_key, len(seen))} if isinstance(attention, BlockSpec) else {}
    return batch | {"seen": seen, "chosen": chosen} | noise


def is_known(x: Tokens) -> Chosen:
    """Mark the residues that are one of the twenty."""
    return (x > vocab.PAD) & (x <= _TWENTY)


def hidden(x: Tokens, key: PRNGKeyArray, rate: float) -> tuple[Tokens, Chosen]:
    """Return what the encoder sees, and the residues to predict: the share `rate` of the known ones.

    Of these, 80 % become the mask, 10 % a random residue, and 10 % stay, so that the encoder describes every residue.
    """
    which, how, what = jax.random.split(key, 3)
    chosen = is_known(x) & (jax.random.uniform(which, x.shape) < rate)
    draw = jax.random.uniform(how, x.shape)
    replaced = jnp.where(draw < _MASKED + _REPLACED, jax.random.randint(what, x.shape, 1, _TWENTY + 1, x.dtype), x)
    return jnp.where(chosen, jnp.where(draw < _MASKED, vocab.MASK, replaced), x), chosen


def scores(
    predicted: Float[Array, "batch length residues"], x: Tokens
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """Return the nats of each residue, and 1 where it is the likeliest; without meaning where it is not known."""
    residue = jnp.clip(x - 1, 0, _TWENTY - 1)
    nats = -jnp.take_along_axis(predicted, residue[..., None], -1)[..., 0]
    return nats, (predicted.argmax(-1) == residue).astype(nats.dtype)
