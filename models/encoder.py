"""The encoder of a sequence: residual dilated convolutions, with self-attention between them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from data import vocab
from data.settings import Choice, Integer, Number, Section
from models import attention
from models import mesh as mesh_axes
from models.attention import BlockSpec, Features, Implementation, Lengths, Noise, Segments, SinkhornSpec
from models.mesh import DATA, MODEL, SEQUENCE


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

    def reaches(self, spec: SinkhornSpec | BlockSpec) -> Iterator[tuple[int | None, str]]:
        """Yield how many places each kind of block sees to one side, None for all, and the setting that says so."""
        widest = 2 ** (min(self.dilations, self.depth) - 1)
        yield _reach(self.kernel, widest), f"model.kernel={self.kernel} with model.dilations={self.dilations}"
        if self.has_attention:
            if isinstance(spec, BlockSpec):
                yield None, f"attention.kind={spec.kind!r}"
            else:
                yield spec.band, f"attention.band={-1 if spec.band is None else spec.band}"


class ConvolutionBlock(nnx.Module):
    """Residual dilated convolution, followed by a linear layer at every position."""

    def __init__(self, config: EncoderConfig, dilation: int, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mix = nnx.Conv(width, width, (config.kernel,), kernel_dilation=(dilation,), dtype=dtype, rngs=rngs)
        spread = nnx.initializers.variance_scaling(config.residual_scale**2, "fan_in", "truncated_normal")
        self.out = nnx.Linear(width, width, dtype=dtype, kernel_init=spread, rngs=rngs)

    def __call__(self, h: Features, real: Float[Array, "batch length 1"], segments: Segments = None) -> Features:
        mix = _mixed if mesh_axes.shares() == 1 else _mixed_in_shares
        return h + self.out(nnx.gelu(mix(self.mix, self.norm(h) * real, segments)))


def _mixed(layer: nnx.Conv, h: Features, segments: Segments) -> Features:
    return layer(h) if segments is None else convolved(layer, h, segments)


def _mixed_in_shares(layer: nnx.Conv, h: Features, segments: Segments) -> Features:
    """Apply a convolution where devices share the length: each computes its places, and some of its neighbours'.

    XLA would cut the convolution itself, but its gradient of a kernel whose outputs are cut as well is wrong.
    """
    mesh, graph, params = mesh_axes.current(), *nnx.split(layer)
    assert mesh is not None
    (dilation,) = cast(Sequence[int], layer.kernel_dilation)
    reach = _reach(layer.kernel_size[0], dilation)
    channels = MODEL if mesh.shape[MODEL] > 1 and layer.out_features % mesh.shape[MODEL] == 0 else None
    by_channel = jax.tree.map(lambda x: P(*(None,) * (x.ndim - 1), channels), params)

    def of_share(params, h, segments):
        seen, around = jax.tree.map(lambda x: attention.with_neighbours(x, reach), (h, segments))
        return _mixed(nnx.merge(graph, params), seen, around)[:, reach : reach + h.shape[1]]

    by_place, cut = P(DATA, SEQUENCE), P(DATA, SEQUENCE, channels)
    return jax.shard_map(of_share, in_specs=(by_channel, by_place, by_place), out_specs=cut)(params, h, segments)


def _reach(kernel: int, dilation: int) -> int:
    """Return how many places to one side a convolution sees."""
    return -(-(kernel - 1) * dilation // 2)


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
