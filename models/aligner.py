"""The siamese aligner: one encoder for both sequences, a transport plan from x to y, a head that reads only that."""

import dataclasses
from collections.abc import Iterator
from typing import cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from data import vocab
from models import attention, ordering, refinement
from models.attention import BlockSpec, Implementation, SinkhornSpec

# BLOSUM62 is in half bits: ln 2 / 2 nats each turn its scores into log-odds.
_PRIOR_WEIGHT = 0.3466


# Far beyond use: a damaged or hostile configuration is refused before it takes all memory, or for ever.
_MOST = {
    "width": 1 << 16,
    "depth": 1000,
    "kernel": 1001,
    "dilations": 30,
    "heads": 1 << 12,
    "plan_width": 1 << 14,
    "value_width": 1 << 14,
}


@dataclasses.dataclass(frozen=True)
class AlignerConfig:
    """`config.model`. Widths are in channels.

    depth: residual convolution blocks, their dilation doubling from 1 and starting again after `dilations`.
    attention_every: a self-attention block follows every so many convolution blocks; 0 for none.
    plan_width: of the queries and keys of the plan.
    plan_gain: of their projection before training; below 1 what is learned starts small beside a prior.
    positions: half of them is rotated by length-scaled positions, a pull to the diagonal.
    substitution_prior: adds BLOSUM62 with a learned weight to the plan's scores.
    refinement: residual convolution blocks that weigh the votes of a first plan for a second one; 0 for no second plan.
    gap_model: learns the pair HMM that plans are aligned by (loss.alignment); else decode.Gaps() is taken.
    implementation: of the attention: "auto", "reference", "xla" or "pallas_tpu".
    dtype: of the encoder's arithmetic, "float32" or "bfloat16"; parameters and the plan stay float32.
    """

    width: int = 128
    depth: int = 6
    kernel: int = 5
    dilations: int = 4
    heads: int = 4
    attention_every: int = 3
    plan_width: int = 64
    plan_gain: float = 1.0
    value_width: int = 64
    positions: bool = True
    substitution_prior: bool = False
    refinement: int = 0
    gap_model: bool = False
    implementation: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        for field, most in _MOST.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"model.{field}={value!r} must be an integer from 1 to {most}")
        if type(self.refinement) is not int or not 0 <= self.refinement <= _MOST["depth"]:
            raise ValueError(
                f"model.refinement={self.refinement!r} must not be negative, nor above {_MOST['depth']}; 0 is no "
                "second plan"
            )
        if self.plan_gain <= 0:
            raise ValueError(f"model.plan_gain={self.plan_gain} must be above 0, or nothing is learned")
        if self.plan_width % 4:
            raise ValueError(f"model.plan_width={self.plan_width} must be a multiple of 4: half of it is rotated")
        if self.implementation not in ("auto", *get_args(Implementation)):
            allowed = ", ".join(("auto", *get_args(Implementation)))
            raise ValueError(f"model.implementation={self.implementation!r} must be one of {allowed}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")


class ConvolutionBlock(nnx.Module):
    """Residual: a dilated convolution, then one layer at every position."""

    def __init__(self, config: AlignerConfig, dilation: int, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mix = nnx.Conv(width, width, (config.kernel,), kernel_dilation=(dilation,), dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "batch length width"], real: Float[Array, "batch length 1"]):
        return h + self.out(nnx.gelu(self.mix(self.norm(h) * real)))


class AttentionBlock(nnx.Module):
    """Residual: self-attention."""

    def __init__(self, config: AlignerConfig, spec: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = attention.self_attention(
            config.width, config.heads, spec, config.implementation, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        h: Float[Array, "batch length width"],
        lengths: Int[Array, "batch"],
        noise: Key[Array, "batch"] | None = None,
    ):
        extra = {} if self.transports else {"noise": noise}
        return h + self.attention(self.norm(h), lengths, **extra)

    @property
    def transports(self) -> bool:
        """Whether it is Sinkhorn self-attention."""
        return isinstance(self.attention, attention.SelfAttention)

    def inputs(self, h: Float[Array, "batch length width"], lengths: Int[Array, "batch"]) -> attention.Inputs:
        """Of Sinkhorn self-attention."""
        return cast(attention.SelfAttention, self.attention).inputs(self.norm(h), lengths)


class Encoder(nnx.Module):
    """Tokens of one sequence to features; padding does not change them."""

    def __init__(self, config: AlignerConfig, spec: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab.SIZE, config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        blocks: list[nnx.Module] = []
        for i in range(config.depth):
            blocks.append(ConvolutionBlock(config, 2 ** (i % config.dilations), rngs=rngs))
            if config.attention_every and (i + 1) % config.attention_every == 0:
                blocks.append(AttentionBlock(config, spec, rngs=rngs))
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        lengths: Int[Array, "batch"],
        noise: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        *_, h = self._features(tokens, lengths, noise)
        return self.norm(h.astype(jnp.float32))

    def attention_inputs(
        self, tokens: Int[Array, "batch length"], lengths: Int[Array, "batch"]
    ) -> list[attention.Inputs]:
        """Of every Sinkhorn self-attention."""
        features = zip(self.blocks, self._features(tokens, lengths), strict=False)
        return [
            block.inputs(h, lengths) for block, h in features if isinstance(block, AttentionBlock) and block.transports
        ]

    def _features(self, tokens, lengths, noise=None) -> Iterator[Float[Array, "batch length width"]]:
        """What goes into each block, and what comes out of the last."""
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        h = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            yield h
            if isinstance(block, ConvolutionBlock):
                h = block(h, real[..., None].astype(h.dtype))
            else:
                h = block(h, lengths, attention.of_layer(noise, number))
        yield h


class Aligner(nnx.Module):
    """Aligns x with y by a plan from x to y, and predicts x's residues from what the plan brings of y.

    Queries and keys come from the same projection, so that before any training alike residues in alike surroundings
    score high. Half of each is rotated by the position, x's scaled to y's length: a learned pull to the diagonal.

    spec: of the plan, and of the encoder's self-attention unless `encoder` says otherwise.
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
        if config.gap_model:
            self.gaps = ordering.GapModel()
        if config.substitution_prior:
            self.prior_weight = nnx.Param(jnp.asarray(_PRIOR_WEIGHT))

    def __call__(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        target: Int[Array, "batch x_length"],
        x_length: Int[Array, "batch"],
        y_length: Int[Array, "batch"],
        noise: Key[Array, "batch"] | None = None,
    ) -> tuple[attention.Transported, Float[Array, "batch x_length 20"]]:
        """What the plan transports, and logits of x's residues made from that alone.

        x may hold MASK: the plan then cannot route a masked residue to an identical one. `target` only selects which
        of the plan's values are reported. noise: random keys of the examples while training (attention.BlockSpec).
        """
        q, k, h_y = self._queries_and_keys(x, y, x_length, y_length, noise)
        values = self.value_projection(h_y)
        lengths = x_length, y_length
        transported = attention.transport(
            q,
            k,
            values,
            target,
            self.spec,
            lengths,
            self.dustbin.score,
            self.implementation,
            dense=self.config.gap_model,
        )
        return transported, self.decoder_out(nnx.gelu(self.decoder_in(transported.values)))

    def plan(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        x_length: Int[Array, "batch"],
        y_length: Int[Array, "batch"],
    ) -> Float[Array, "batch x_length y_length"]:
        """The plan over residues, dense."""
        q, k, _ = self._queries_and_keys(x, y, x_length, y_length)
        return attention.plan(q, k, self.spec, (x_length, y_length), self.dustbin.score, self.implementation)

    def banded_plan(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        x_length: Int[Array, "batch"],
        y_length: Int[Array, "batch"],
    ) -> attention.BandedPlan:
        """The plan over residues by the windows of its band."""
        q, k, _ = self._queries_and_keys(x, y, x_length, y_length)
        return attention.banded_plan(q, k, self.spec, (x_length, y_length), self.dustbin.score, self.implementation)

    def certificates(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        x_length: Int[Array, "batch"],
        y_length: Int[Array, "batch"],
    ) -> dict[str, attention.Certificate]:
        """Of every layer in `attention_inputs`, for x and y one after the other."""
        return {
            layer: jax.tree.map(lambda *of: jnp.concatenate(of), *map(attention.certify, inputs))
            for layer, inputs in self.attention_inputs(x, y, x_length, y_length).items()
        }

    def attention_inputs(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        x_length: Int[Array, "batch"],
        y_length: Int[Array, "batch"],
    ) -> dict[str, list[attention.Inputs]]:
        """Of every self-attention, for x and for y, and of the plan, by the names of `layers`."""
        blocks = zip(
            self.encoder.attention_inputs(x, x_length), self.encoder.attention_inputs(y, y_length), strict=True
        )
        q, k, _ = self._queries_and_keys(x, y, x_length, y_length)
        q, k, lengths = q[:, :, None], k[:, :, None], (x_length, y_length)
        plan = [attention.Inputs(q, k, k, self.spec, lengths, self.dustbin.score)]
        return dict(zip(self.layers(), [*map(list, blocks), plan], strict=True))

    def layers(self) -> "dict[str, nnx.Module]":
        """What holds the `implementation` of each attention, by name; not of the first plan that `refinement` makes."""
        blocks = [
            block.attention for block in self.encoder.blocks if isinstance(block, AttentionBlock) and block.transports
        ]
        return {f"self-attention {i + 1}": block for i, block in enumerate(blocks)} | {"plan": self}

    def _queries_and_keys(self, x, y, x_length, y_length, noise=None):
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
        return q, k, h_y

    def _encode(self, x, y, x_length, y_length, noise=None):
        """Both sequences in one pass where they are padded alike, as training batches are."""
        noises = None if noise is None else jax.vmap(lambda key: jax.random.split(key))(noise)
        if x.shape != y.shape:
            of_x, of_y = (None, None) if noises is None else (noises[:, 0], noises[:, 1])
            return self.encoder(x, x_length, of_x), self.encoder(y, y_length, of_y)
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
        """The scores of q and k, with the votes of their plan."""
        columns = refinement.waves(jnp.arange(k.shape[1])[None])
        values = self.value_projection(h_y)
        values = jnp.concatenate([values, jnp.broadcast_to(columns, (*values.shape[:2], columns.shape[-1]))], -1)
        nowhere = jnp.full(q.shape[:2], -1, jnp.int32)
        lengths = x_length, y_length
        first = attention.transport(
            q, k, values, nowhere, self.spec, lengths, self.dustbin.score, self.config.implementation
        )
        real = (jnp.arange(q.shape[1]) < x_length[:, None])[..., None].astype(q.dtype)
        q_votes, k_votes = self.votes(first.values, first.mass, h_x, h_y, real)
        return _joined((q, k), (q_votes, k_votes))

    def _with_prior(self, q, k, x, y):
        """Extra channels whose product is the weighted BLOSUM62 score, so that attention itself needs no new input."""
        blosum = jnp.asarray(vocab.blosum62(), q.dtype)
        prior = self.prior_weight[...] * self.spec.epsilon * blosum[x]
        return _joined((q, k), (prior, jax.nn.one_hot(y, vocab.SIZE)))


def _joined(scored, added):
    """Queries and keys whose scores are those of `scored` plus the plain products of `added`.

    Undoes the division of scores by sqrt(width) for what is added, and keeps it for the rest.
    """
    (q, k), (q_added, k_added) = scored, added
    width = q.shape[-1] + q_added.shape[-1]
    q = jnp.concatenate([q * (width / q.shape[-1]) ** 0.5, q_added * width**0.5], -1)
    return q, jnp.concatenate([k, k_added], -1)
