"""The siamese aligner: one encoder for both sequences, a plan from x to y, and a head that sees y through the plan."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from data import vocab
from data.settings import Integer, Number, Switch
from models import attention, refinement
from models.attention import BlockSpec, Lengths, Noise, SinkhornSpec
from models.encoder import ConvolutionBlock, Encoder, EncoderConfig, transports

_PRIOR_WEIGHT = 0.3466  # ln 2 / 2: BLOSUM62 is in half bits, the weight turns its scores into log-odds in nats

X, Y = Int[Array, "batch x_length"], Int[Array, "batch y_length"]  # tokens
Target = Int[Array, "batch x_length"]  # columns of y, or -1


@dataclasses.dataclass(frozen=True)
class AlignerConfig(EncoderConfig):
    """`config.model` of an aligner, which configs/base.py describes. Widths are in channels."""

    plan_width: Annotated[int, Integer(1, 1 << 14)] = 64
    plan_gain: Annotated[float, Number(open_least=True, hint=", or nothing is learned")] = 1.0
    value_width: Annotated[int, Integer(1, 1 << 14)] = 64
    positions: Annotated[bool, Switch()] = True
    substitution_prior: Annotated[bool, Switch()] = False
    refinement: Annotated[int, Integer(0, 1000)] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.plan_width % 4:
            given = self.given("plan_width", self.plan_width)
            raise ValueError(f"{given}: allowed is a multiple of 4, as half of it is rotated")


class Aligner(nnx.Module):
    """Aligner of x with y by a transport plan, which predicts x's residues from the features of y that the plan sends.

    Queries and keys share one projection, so that untrained models already give similar residues in similar context
    high scores. Half of each is rotated by its position, x's positions scaled to y's length: a pull to the diagonal.

    spec: Problem of the plan, and of the encoder's self-attention unless `encoder` replaces it.
    """

    def __init__(self, config: AlignerConfig, spec: SinkhornSpec, *, encoder: BlockSpec | None = None, rngs: nnx.Rngs):
        self.config, self.spec = config, spec
        self.implementation: str | attention.AsapPotentials = config.implementation  # of the plan
        self.encoder = Encoder(config, encoder or spec, rngs=rngs)
        spread = nnx.initializers.variance_scaling(config.plan_gain**2, "fan_in", "truncated_normal")
        self.plan_projection = nnx.Linear(config.width, config.plan_width, kernel_init=spread, rngs=rngs)
        self.value_projection = nnx.Linear(config.width, config.value_width, rngs=rngs)
        self.dustbin = attention.DustbinScore(1, spec)
        self.decoder_in = nnx.Linear(config.value_width, config.width, rngs=rngs)
        self.decoder_out = nnx.Linear(config.width, len(vocab.RESIDUES), rngs=rngs)
        if config.refinement:
            blocks = [ConvolutionBlock(config, 2**i, rngs=rngs) for i in range(config.refinement)]
            self.votes = refinement.Votes(config.width, config.value_width, config.plan_width // 2, blocks, rngs=rngs)
        if config.substitution_prior:
            self.prior_weight = nnx.Param(jnp.asarray(_PRIOR_WEIGHT))

    def __call__(
        self, x: X, y: Y, target: Target, x_length: Lengths, y_length: Lengths, noise: Noise = None
    ) -> tuple[attention.Transported, Float[Array, "batch x_length 20"]]:
        """Transport y's features to x, and compute logits of x's residues from them alone.

        x may hold MASK: the plan then cannot route a masked residue to an identical one. `target` only selects the
        entries of the plan that are reported.
        """
        given = self._plan_inputs(x, y, x_length, y_length, noise)
        transported = attention.transport(given, target, self.implementation)
        return transported, self.decoder_out(nnx.gelu(self.decoder_in(transported.values)))

    def banded_plan(self, x: X, y: Y, x_length: Lengths, y_length: Lengths) -> attention.BandedPlan:
        """Compute the plan over residues in the windows of its band."""
        return attention.banded_plan(self._plan_inputs(x, y, x_length, y_length), self.implementation)

    def certificates(self, x: X, y: Y, x_length: Lengths, y_length: Lengths) -> dict[str, attention.Certificate]:
        """Certify every layer of `attention_inputs`, for x and then for y."""
        return {
            layer: jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(attention.certify, inputs))
            for layer, inputs in self.attention_inputs(x, y, x_length, y_length).items()
        }

    def attention_inputs(self, x: X, y: Y, x_length: Lengths, y_length: Lengths) -> dict[str, list[attention.Inputs]]:
        """Return the arguments of every self-attention, for x and for y, and of the plan, by the names of `layers`."""
        of_x, of_y = self.encoder.attention_inputs(x, x_length), self.encoder.attention_inputs(y, y_length)
        plan = self._plan_inputs(x, y, x_length, y_length)
        given = [*map(list, zip(of_x, of_y, strict=True)), [plan._replace(v=plan.k)]]
        return dict(zip(self.layers(), given, strict=True))

    def layers(self) -> "dict[str, nnx.Module]":
        """Return the module that holds the `implementation` of each attention, except of `refinement`'s first plan."""
        blocks = [block.attention for block in self.encoder.blocks if transports(block)]
        return {f"self-attention {i + 1}": block for i, block in enumerate(blocks)} | {"plan": self}

    def _plan_inputs(self, x, y, x_length, y_length, noise=None) -> attention.Inputs:
        h_x, h_y = self._encode(x, y, x_length, y_length, noise)
        q, k = self.plan_projection(h_x), self.plan_projection(h_y)
        if self.config.positions:
            rows, columns = (jnp.arange(tokens.shape[1], dtype=jnp.float32)[None] for tokens in (x, y))
            scale = (y_length / jnp.maximum(x_length, 1))[:, None]
            q, k = self._positioned(q, (rows + 0.5) * scale - 0.5), self._positioned(k, columns)
        if self.config.substitution_prior:
            q, k = self._with_prior(q, k, x, y)
        if self.config.refinement:
            q, k = self._refined(q, k, h_x, h_y, x_length, y_length)
        return self._inputs(q, k, self.value_projection(h_y), x_length, y_length)

    def _inputs(self, q, k, v, *lengths) -> attention.Inputs:
        q, k, v = (z[:, :, None] for z in (q, k, v))
        return attention.Inputs(q, k, v, self.spec, lengths, self.dustbin.score)

    def _encode(self, x, y, x_length, y_length, noise=None):
        """Encode both sequences in one call if they are padded alike, as in training."""
        noises = None if noise is None else jax.vmap(lambda key: jax.random.split(key))(noise)
        if x.shape != y.shape:
            x_noise, y_noise = (None, None) if noises is None else (noises[:, 0], noises[:, 1])
            return self.encoder(x, x_length, x_noise), self.encoder(y, y_length, y_noise)
        # Pair by pair, not x after y: where devices share a batch, each keeps its pairs.
        both = self.encoder(
            jnp.stack([x, y], 1).reshape(-1, x.shape[1]),
            jnp.stack([x_length, y_length], 1).reshape(-1),
            None if noises is None else noises.reshape(-1),
        ).reshape(*x.shape[:1], 2, x.shape[1], -1)
        return both[:, 0], both[:, 1]

    def _positioned(self, z, position):
        still, turned = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([still, attention.rotate(turned[:, :, None], position)[:, :, 0]], -1)

    def _refined(self, q, k, h_x, h_y, x_length, y_length):
        """Add the votes of a first plan to the scores of queries and keys."""
        columns = refinement.waves(jnp.arange(k.shape[1])[None])
        values = self.value_projection(h_y)
        values = jnp.concatenate([values, jnp.broadcast_to(columns, (*values.shape[:2], columns.shape[-1]))], -1)
        nowhere = jnp.full(q.shape[:2], -1, jnp.int32)
        first = attention.transport(self._inputs(q, k, values, x_length, y_length), nowhere, self.config.implementation)
        real = (jnp.arange(q.shape[1]) < x_length[:, None])[..., None].astype(q.dtype)
        q_votes, k_votes = self.votes(first.values, first.mass, h_x, h_y, real)
        return _joined((q, k), (q_votes, k_votes))

    def _with_prior(self, q, k, x, y):
        """Add channels whose product is the weighted BLOSUM62 score, so that attention itself needs no new input."""
        blosum = jnp.asarray(vocab.blosum62(), q.dtype)
        prior = self.prior_weight[...] * self.spec.epsilon * blosum[x]
        return _joined((q, k), (prior, jax.nn.one_hot(y, vocab.SIZE)))


def _joined(scored, added):
    """Extend queries and keys so that the products of `added` are added to the scores of `scored`.

    Scores are products divided by sqrt(width); the division is undone for `added`.
    """
    (q, k), (q_added, k_added) = scored, added
    width = q.shape[-1] + q_added.shape[-1]
    q = jnp.concatenate([q * (width / q.shape[-1]) ** 0.5, q_added * width**0.5], -1)
    return q, jnp.concatenate([k, k_added], -1)
