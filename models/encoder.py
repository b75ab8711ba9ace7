"""The encoder of a sequence: residual dilated convolutions, with self-attention between them."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from data import vocab
from data.settings import Choice, Integer, Number, Section
from models import attention
from models.attention import BlockSpec, Features, Implementation, Lengths, Noise, Segments, SinkhornSpec


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Section):
    """`config.model` of an encoder, which configs/base.py describes. Widths are in channels."""

    name: ClassVar[str] = "model"

    # The most is far beyond use: a damaged or hostile configuration must not take all memory or time.
    width: Annotated[int, Integer(1, attention.MOST_WIDTH)] = 128
    depth: Annotated[int, Integer(1, 1000)] = 6
    kernel: Annotated[int, Integer(1, 1001)] = 5
    dilations: Annotated[int, Integer(1, 30)] = 4
    heads: Annotated[int, Integer(1, attention.MOST_HEADS)] = 4
    attention_every: Annotated[int, Integer()] = 3
    implementation: Annotated[str, Choice(("auto", *get_args(Implementation)))] = "auto"
    dtype: Annotated[str, Choice(("float32", "bfloat16"))] = "float32"
    residual_scale: Annotated[float, Number(open_least=True)] = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.has_attention:
            attention.check_heads(self.width, self.heads)

    @property
    def has_attention(self) -> bool:
        return 0 < self.attention_every <= self.depth


class ConvolutionBlock(nnx.Module):
    """Residual dilated convolution, followed by a linear layer at every position."""

    def __init__(self, config: EncoderConfig, dilation: int, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mix = nnx.Conv(width, width, (config.kernel,), kernel_dilation=(dilation,), dtype=dtype, rngs=rngs)
        spread = nnx.initializers.variance_scaling(config.residual_scale**2, "fan_in", "truncated_normal")
        self.out = nnx.Linear(width, width, dtype=dtype, kernel_init=spread, rngs=rngs)

    def __call__(self, h: Features, real: Float[Array, "batch length 1"], segments: Segments = None) -> Features:
        seen = self.norm(h) * real
        mixed = self.mix(seen) if segments is None else convolved(self.mix, seen, segments)
        return h + self.out(nnx.gelu(mixed))


class AttentionBlock(nnx.Module):
    """Residual self-attention."""

    def __init__(self, config: EncoderConfig, spec: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        of_both: dict = {"width": config.width, "heads": config.heads, "dtype": dtype, "rngs": rngs}
        self.attention: attention.SelfAttention | attention.BlockSelfAttention
        if isinstance(spec, BlockSpec):
            self.attention = attention.BlockSelfAttention(spec=spec, **of_both)
        else:
            self.attention = attention.SelfAttention(spec=spec, implementation=config.implementation, **of_both)

    def __call__(self, h: Features, lengths: Lengths, noise: Noise = None, segments: Segments = None) -> Features:
        return h + self.attention(self.norm(h), lengths, noise, segments)


def convolved(layer: nnx.Conv, h: Features, segments: Int[Array, "batch length"]) -> Features:
    """Compute a layer's convolution with zeros in place of features of other segments.

    Each tap is a product of its own, moved afterwards: no copy of the features a tap waits for the backward pass. The
    moves are slices, so that devices which share the length exchange neighbouring places alone.
    """
    kernel, dtype = layer.kernel[...], layer.dtype or h.dtype
    (dilation,) = layer.kernel_dilation
    sums = jnp.promote_types(jnp.float32, dtype)
    assert layer.bias is not None  # of a `ConvolutionBlock`
    result = layer.bias[...].astype(sums)
    for tap, matrix in enumerate(kernel.astype(dtype)):
        by = tap * dilation - (len(kernel) - 1) * dilation // 2
        product = jnp.einsum("blc,cd->bld", h.astype(dtype), matrix, preferred_element_type=sums)
        same = _moved(segments, by, -1) == segments
        result += jnp.where(same[..., None], _moved(product, by, 0), 0)
    return result.astype(dtype)


def _moved(x: Array, by: int, outside: int) -> Array:
    """Return an array whose place i holds the place i + by of x, or `outside`."""
    length = x.shape[1]
    widths = ((0, 0), (max(-by, 0), max(by, 0)), *((0, 0),) * (x.ndim - 2))
    return jax.lax.slice_in_dim(jnp.pad(x, widths, constant_values=outside), max(by, 0), max(by, 0) + length, axis=1)


def transports(block: nnx.Module) -> bool:
    """Tell whether the block is Sinkhorn self-attention."""
    return isinstance(block, AttentionBlock) and isinstance(block.attention, attention.SelfAttention)


class Encoder(nnx.Module):
    """Encoder from the tokens of a sequence to features, which do not depend on padding.

    Rows may hold several sequences: `segments` numbers them, 0 where there is none, and features of a sequence depend
    on nothing else in its row.
    """

    def __init__(self, config: EncoderConfig, spec: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab.SIZE, config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        blocks: list[Any] = []
        for i in range(config.depth):
            blocks.append(ConvolutionBlock(config, 2 ** (i % config.dilations), rngs=rngs))
            if config.attention_every and (i + 1) % config.attention_every == 0:
                blocks.append(AttentionBlock(config, spec, rngs=rngs))
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        lengths: Lengths,
        noise: Noise = None,
        segments: Segments = None,
    ) -> Features:
        *_, h = self._features(tokens, lengths, noise, segments)
        return self.norm(h.astype(jnp.float32))

    def attention_inputs(self, tokens: Int[Array, "batch length"], lengths: Lengths) -> list[attention.Inputs]:
        """Return the arguments of every Sinkhorn self-attention."""
        features = zip(self.blocks, self._features(tokens, lengths), strict=False)
        return [block.attention.inputs(block.norm(h), lengths) for block, h in features if transports(block)]

    def _features(self, tokens, lengths, noise=None, segments=None) -> Iterator[Features]:
        """Yield the input of each block, and the output of the last."""
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        h = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            yield h
            if isinstance(block, ConvolutionBlock):
                h = block(h, real[..., None].astype(h.dtype), segments)
            else:
                h = block(h, lengths, attention.of_layer(noise, number), segments)
        yield h
