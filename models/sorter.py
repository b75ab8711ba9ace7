"""A small Transformer that sorts a sequence, to compare kinds of self-attention (arXiv 2002.11296).

The configuration chooses the self-attention of encoder and decoder; attention from decoder to encoder is dense.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data.settings import Integer, Section
from models import attention
from models.attention import BlockSpec, Lengths, Noise
from models.objectives import Batch, Totals

Tokens = Int[Array, "batch places"]
Logits = Float[Array, "batch places tokens"]  # of the token that follows


@dataclasses.dataclass(frozen=True)
class SorterConfig(Section):
    """`config.model` of the sorting task. depth: Layers of the encoder, and of the decoder. Widths are in channels."""

    name: ClassVar[str] = "model"

    width: Annotated[int, Integer(1, attention.MOST_WIDTH)] = 64
    heads: Annotated[int, Integer(1, attention.MOST_HEADS)] = 4
    depth: Annotated[int, Integer(1, 1000)] = 2
    hidden: Annotated[int, Integer(1, attention.MOST_WIDTH)] = 256

    def __post_init__(self):
        super().__post_init__()
        attention.check_heads(self.width, self.heads)


class Layer(nnx.Module):
    """Residual self-attention, attention to the encoder in the decoder only, and a two-layer perceptron."""

    def __init__(self, config: SorterConfig, spec: BlockSpec, *, sees_encoder: bool, rngs: nnx.Rngs):
        width = config.width
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = attention.BlockSelfAttention(width, config.heads, spec, dtype=jnp.dtype("float32"), rngs=rngs)
        if sees_encoder:
            self.cross_norm = nnx.LayerNorm(width, rngs=rngs)
            self.cross = nnx.MultiHeadAttention(config.heads, width, decode=False, use_bias=False, rngs=rngs)
        self.hidden_norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden_in = nnx.Linear(width, config.hidden, rngs=rngs)
        self.hidden_out = nnx.Linear(config.hidden, width, rngs=rngs)

    def __call__(self, h, length, noise, encoded=None):
        h += self.attention(self.norm(h), length, noise)
        if encoded is not None:
            real = (jnp.arange(encoded.shape[1]) < length[:, None])[:, None, None]
            # An empty example attends to its padding: softmax over nothing is NaN.
            h += self.cross(self.cross_norm(h), encoded, mask=real | (length == 0)[:, None, None, None])
        return h + self.hidden_out(nnx.gelu(self.hidden_in(self.hidden_norm(h))))


class Sorter(nnx.Module):
    """Encoder and decoder. The largest token begins and ends sequences."""

    def __init__(self, config: SorterConfig, spec: BlockSpec, symbols: int, *, rngs: nnx.Rngs):
        causal = dataclasses.replace(spec, sparse=dataclasses.replace(spec.sparse, causal=True, sortcut=None))
        self.end = symbols + 1
        self.embed = nnx.Embed(symbols + 2, config.width, rngs=rngs)
        self.encoder = nnx.List([Layer(config, spec, sees_encoder=False, rngs=rngs) for _ in range(config.depth)])
        self.decoder = nnx.List([Layer(config, causal, sees_encoder=True, rngs=rngs) for _ in range(config.depth)])
        self.encoder_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.out = nnx.Linear(config.width, symbols + 2, rngs=rngs)

    def __call__(self, x: Tokens, y: Tokens, length: Lengths, noise: Noise = None) -> Logits:
        """Compute logits of the token that follows each token of y."""
        return self.decode(y, self.encode(x, length, noise), length, noise)

    def encode(self, x, length, noise=None) -> Float[Array, "batch places width"]:
        h = self.embed(x)
        for number, layer in enumerate(self.encoder):
            h = layer(h, length, attention.of_layer(noise, number))
        return self.encoder_norm(h)

    def decode(self, y, encoded, length, noise=None) -> Logits:
        h = self.embed(y)
        for number, layer in enumerate(self.decoder, start=len(self.encoder)):
            h = layer(h, length, attention.of_layer(noise, number), encoded)
        return self.out(self.norm(h))

    def write(self, x: Tokens, length: Lengths) -> Tokens:
        """Write the likeliest tokens one after another (greedy); 0 after the first end and from `length` on."""
        encoded = self.encode(x, length)

        def place(written, n):
            y = jnp.concatenate([jnp.full_like(written[:, :1], self.end), written[:, :-1]], 1)
            token = self.decode(y, encoded, length)[:, n].argmax(-1)
            going = (n == 0) | (written[:, n - 1] != self.end) & (written[:, n - 1] != 0)
            token = jnp.where(going & (n < length), token, 0)
            return written.at[:, n].set(token.astype(written.dtype)), None

        written, _ = jax.lax.scan(place, jnp.zeros_like(x), jnp.arange(x.shape[1]))
        return written


@dataclasses.dataclass(frozen=True)
class SortingObjective:
    """Objective of a sorter (a `models.objectives.Objective`)."""

    model: SorterConfig
    attention: BlockSpec
    symbols: int

    def make(self, rngs: nnx.Rngs) -> Sorter:
        return Sorter(self.model, self.attention, self.symbols, rngs=rngs)

    def augment(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        return batch | {"noise": jax.random.split(key, len(batch["x"]))}

    def totals(self, model: Sorter, batch: Batch) -> Totals:
        logits = model(batch["x"], batch["y"], batch["length"], batch["noise"])
        real = batch["target"] > 0
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][..., None], -1)[..., 0]
        right = logits.argmax(-1) == batch["target"]
        sums = {name: jnp.where(real, x, 0).sum() for name, x in (("cross_entropy", nats), ("accuracy", right))}
        return sums | {f"{name}/count": real.sum().astype(jnp.float32) for name in sums}

    def counts(self, batch: Batch) -> Totals:
        return {"cross_entropy/count": (batch["target"] > 0).sum().astype(jnp.float32)}

    def value(self, totals: Totals) -> Float[Array, ""]:
        return totals["cross_entropy"] / jnp.maximum(totals["cross_entropy/count"], 1)

    def residues(self, batch: Batch) -> Int[Array, ""]:
        return batch["length"].sum()
