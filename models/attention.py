"""Multi-head attention by optimal transport: the only module of the models that knows `ot_attention`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from models import mesh as mesh_axes
from ot_attention import SinkhornInfo, SinkhornSpec, asap, sinkhorn_attention, sparse, support, transport_plan
from ot_attention.asap import Asap
from ot_attention.certificates import contraction, posterior_bias
from ot_attention.sparse import SparseSpec
from ot_attention.spec import Implementation

_PLAN_ROWS = 32  # of a banded plan made at a time
_BLOCK_KINDS = "sparse_sinkhorn", "local", "softmax"
_ROTARY_BASE = 1000.0  # slowest angle turns once in about 6,000 residues, longer than nearly all domains


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Self-attention by softmax: over a sorted block and the own one (arXiv 2002.11296), over the own one alone, or
    over all residues.
    """

    kind: str
    sparse: SparseSpec

    def __post_init__(self):
        if self.kind not in _BLOCK_KINDS:
            allowed = ", ".join(("sinkhorn", *_BLOCK_KINDS))
            raise ValueError(f"attention.kind={self.kind!r} must be one of {allowed}")


def specs_of(config: Mapping[str, Any]) -> tuple[SinkhornSpec, BlockSpec | None]:
    """Of a run's `attention` and `sparse`: of plans, and of the self-attention if it is of another kind.

    Raises ValueError or TypeError: values out of range, misspelt keys.
    """
    values = dict(config["attention"])
    kind = values.pop("kind", "sinkhorn")  # runs of earlier versions know no other
    if values.get("band") == -1:  # a flag cannot say None
        values["band"] = None
    if kind == "sinkhorn":
        return SinkhornSpec(**values), None
    sparse_values = dict(config["sparse"])
    sparse_values["sortcut"] = sparse_values["sortcut"] or None
    return SinkhornSpec(**values), BlockSpec(kind, SparseSpec(**sparse_values))


class _Heads(nnx.Module):
    """Projections of self-attention, with rotary positions."""

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if width % heads or (width // heads) % 2:
            raise ValueError(f"model.heads={heads} must divide model.width={width} into even head widths")
        # Heads are an axis of the kernels, so that devices can share them.
        each = heads, width // heads
        self.project = nnx.LinearGeneral(width, (3, *each), use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.LinearGeneral(each, width, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs)

    def _project(self, h):
        q, k, v = (x[:, :, 0] for x in jnp.split(self.project(h), 3, axis=2))
        position = jnp.arange(h.shape[1], dtype=jnp.float32)[None]
        return rotate(q, position), rotate(k, position), v


class SelfAttention(_Heads):
    """Banded Sinkhorn self-attention with rotary positions."""

    def __init__(
        self, width: int, heads: int, spec: SinkhornSpec, implementation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, heads, dtype=dtype, rngs=rngs)
        self.spec = spec
        self.implementation: str | Compiled = implementation
        self.dustbin = Dustbin(heads, spec)

    def __call__(
        self, h: Float[Array, "batch length width"], lengths: Int[Array, "batch"]
    ) -> Float[Array, "batch length width"]:
        out, _ = _attend(*self.inputs(h, lengths), self.implementation)
        return self.out(out)

    def inputs(self, h: Float[Array, "batch length width"], lengths: Int[Array, "batch"]) -> "Inputs":
        """What a call with the same arguments attends to."""
        q, k, v = self._project(h)
        return Inputs(q, k, v, self.spec, (lengths, lengths), self.dustbin.score)


class BlockSelfAttention(_Heads):
    """Self-attention of a `BlockSpec` with rotary positions.

    The sort network scores place i for block j by a product of what it knows of each, normalised sums of residues.
    """

    def __init__(self, width: int, heads: int, spec: BlockSpec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, heads, dtype=dtype, rngs=rngs)
        self.spec = spec
        if spec.kind == "sparse_sinkhorn":
            each = heads, width // heads
            self.sort_norm = nnx.LayerNorm(width, rngs=rngs)
            self.sort_place = nnx.LinearGeneral(width, each, rngs=rngs)
            self.sort_block = nnx.LinearGeneral(width, each, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "batch length width"],
        lengths: Int[Array, "batch"],
        noise: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """noise: random keys of the examples while training."""
        q, k, v = self._project(h)
        kind, spec = self.spec.kind, self.spec.sparse
        if kind == "softmax":
            return self.out(sparse.softmax_attention(q, k, v, causal=spec.causal, lengths=lengths))
        if kind == "local":
            return self.out(sparse.local_attention(q, k, v, spec, lengths))
        scores = self._sort_scores(h, lengths)
        return self.out(sparse.sparse_sinkhorn_attention(q, k, v, scores, spec, lengths, noise))

    def _sort_scores(self, h, lengths) -> Float[Array, "batch heads places blocks"]:
        places, blocks = map(self.sort_norm, sparse.pooled(h.astype(jnp.float32), self.spec.sparse, lengths))
        places, blocks = self.sort_place(places), self.sort_block(blocks)
        return jnp.einsum("bihd,bjhd->bhij", places, blocks) / math.sqrt(places.shape[-1])


def self_attention(
    width: int, heads: int, spec: SinkhornSpec | BlockSpec, implementation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> SelfAttention | BlockSelfAttention:
    """What the spec describes."""
    if isinstance(spec, BlockSpec):
        return BlockSelfAttention(width, heads, spec, dtype=dtype, rngs=rngs)
    return SelfAttention(width, heads, spec, implementation, dtype=dtype, rngs=rngs)


def of_layer(noise: Key[Array, "batch"] | None, layer: int) -> Key[Array, "batch"] | None:
    """Random keys for one of the layers that share some."""
    return None if noise is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(noise)


class Inputs(NamedTuple):
    """Of one attention: queries, keys and values, and the problem that they pose."""

    q: Float[Array, "batch rows heads width"]
    k: Float[Array, "batch columns heads width"]
    v: Float[Array, "batch columns heads value"]
    spec: SinkhornSpec
    lengths: tuple[Int[Array, "batch"], Int[Array, "batch"]]
    dustbin_score: Float[Array, "heads"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Stands where a layer's implementation stands: its plans come from a map fitted to it, not from steps.

    Hashable by identity, so that it is part of a model's structure and not of its parameters.
    """

    map: Asap


def _attend(q, k, v, spec: SinkhornSpec, lengths, dustbin_score, implementation: str | Compiled):
    """`sinkhorn_attention` or its compiled map, on a mesh of each device's examples and, where they can be shared
    evenly, heads.

    XLA cannot cut a kernel, and would have to guess how to cut the loops.
    """
    compiled = implementation.map if isinstance(implementation, Compiled) else None
    # "auto" of config.model stands for None.
    name = None if compiled or implementation == "auto" else cast(Implementation, implementation)

    def attend(q, k, v, lengths, score, compiled):
        if compiled:
            return asap.apply(compiled, q, k, v, spec, *lengths, score)
        return sinkhorn_attention(q, k, v, spec, *lengths, score, name)

    if mesh := mesh_axes.current():
        heads = None if q.shape[2] % mesh.shape[mesh_axes.MODEL] else mesh_axes.MODEL
        by_length, by_head = P(mesh_axes.DATA, None, heads), P(mesh_axes.DATA, heads)
        attend = jax.shard_map(
            attend,
            in_specs=(by_length, by_length, by_length, P(mesh_axes.DATA), P(heads), P(heads)),
            out_specs=(by_length, by_head),
        )
    return attend(q, k, v, lengths, dustbin_score, compiled)


class Dustbin(nnx.Module):
    """A learned dustbin score for every head; none where the spec has no dustbin."""

    def __init__(self, heads: int, spec: SinkhornSpec):
        self._score = None if spec.dustbin == "none" else nnx.Param(jnp.zeros(heads))

    @property
    def score(self) -> Float[Array, "heads"] | None:
        return None if self._score is None else self._score[...]


def rotate(x: Float[Array, "batch length heads width"], position: Float[Array, "_ length"]):
    """Rotary positions: products of rotated vectors depend on the difference of their positions (in residues)."""
    half = x.shape[-1] // 2
    angle = position[:, :, None, None] * _ROTARY_BASE ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Transported(NamedTuple):
    """What one plan brings from y to x."""

    values: Float[Array, "batch x_length value"]  # sum_j P_ij v_j; small where x_i is mostly gap
    mass: Float[Array, "batch x_length"]  # sum_j P_ij over residues of y
    barycenter: Float[Array, "batch x_length"]  # sum_j P_ij j / mass, in residues
    log_target: Float[Array, "batch x_length"]  # log P_i,t(i); minus infinity outside the band and without a target
    residual: Float[Array, "batch"]
    log_plan: Float[Array, "batch x_length y_length"] | None = None  # where asked for; minus infinity outside the band


def transport(
    q: Float[Array, "batch x_length width"],
    k: Float[Array, "batch y_length width"],
    values: Float[Array, "batch y_length value"],
    target: Int[Array, "batch x_length"],
    spec: SinkhornSpec,
    lengths: tuple[Int[Array, "batch"], Int[Array, "batch"]],
    dustbin_score: Float[Array, "1"] | None,
    implementation: str | Compiled,
    *,
    dense: bool = False,
) -> Transported:
    """Sends values of y to x along one head's plan; nothing of the plan's size is made, unless it is asked for.

    Positions travel as two more values, and the plan at the reference alignment comes from the potentials.
    """
    position = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=values.dtype), k.shape[:2])
    carried = jnp.concatenate([values, jnp.ones_like(position)[..., None], position[..., None]], -1)
    heads = q[:, :, None], k[:, :, None], carried[:, :, None]
    out, info = _attend(*heads, spec, lengths, dustbin_score, implementation)
    values, mass, moment = out[:, :, 0, :-2], out[:, :, 0, -2], out[:, :, 0, -1]
    barycenter = moment / jnp.where(mass > 0, mass, 1)
    at_target = _log_plan_at(q, k, info, target, spec, lengths)
    log_plan = _log_plan(q, k, info, spec, lengths) if dense else None
    return Transported(values, mass, barycenter, at_target, info.residual[:, 0], log_plan)


class BandedPlan(NamedTuple):
    """A plan by the windows of its band: `values[n, i, c]` is P_ij for j = first[n, i] + c, 0 where there is none."""

    values: Float[Array, "batch x_length window"]
    first: Int[Array, "batch x_length"]


def banded_plan(q, k, spec: SinkhornSpec, lengths, dustbin_score, implementation: str | Compiled) -> BandedPlan:
    """The plan over residues from q to k `[batch, length, width]`; nothing larger than a few of its rows is dense."""
    info = _potentials(q, k, spec, lengths, dustbin_score, implementation)
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    first, last = support.row_windows(rows, lengths[0].astype(jnp.int32), lengths[1].astype(jnp.int32), spec.band)
    columns = k.shape[1]
    window = jnp.arange(columns if spec.band is None else min(2 * spec.band + 1, columns))
    g = info.g[:, 0, None, :columns]

    def some_rows(of_rows):
        q, f, first, last = of_rows
        log_plan = jnp.einsum("bid,bjd->bij", q, k) / (math.sqrt(q.shape[-1]) * spec.epsilon) + g
        place = first[..., None] + window
        log_plan = jnp.take_along_axis(log_plan, jnp.minimum(place, columns - 1), axis=2) + f[..., None]
        return jnp.where(place <= last[..., None], jnp.exp(log_plan), 0)

    step = math.gcd(q.shape[1], _PLAN_ROWS)
    parts = tuple(
        x.reshape(len(q), -1, step, *x.shape[2:]).swapaxes(0, 1) for x in (q, info.f[:, 0, : q.shape[1]], first, last)
    )
    values = jax.lax.map(some_rows, parts).swapaxes(0, 1)
    return BandedPlan(values.reshape(len(q), q.shape[1], -1), first)


def _potentials(q, k, spec: SinkhornSpec, lengths, dustbin_score, implementation: str | Compiled) -> SinkhornInfo:
    nothing = jnp.zeros((*k.shape[:2], 1, 1), k.dtype)
    return _attend(q[:, :, None], k[:, :, None], nothing, spec, lengths, dustbin_score, implementation)[1]


def _log_plan(q, k, info: SinkhornInfo, spec: SinkhornSpec, lengths) -> Float[Array, "batch x_length y_length"]:
    """`log P_ij = S + f + g`, minus infinity outside the support."""
    scores = jnp.einsum("bid,bjd->bij", q.astype(jnp.float32), k.astype(jnp.float32))
    f, g = info.f[:, 0, : q.shape[1], None], info.g[:, 0, None, : k.shape[1]]
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    first, last = support.row_windows(rows, lengths[0], lengths[1], spec.band)
    columns = jnp.arange(k.shape[1])
    inside = (first[..., None] <= columns) & (columns <= last[..., None])
    inside &= (rows < lengths[0][:, None])[..., None]
    log_plan = jnp.where(inside, scores / (math.sqrt(q.shape[-1]) * spec.epsilon) + f + g, 0)
    return jnp.where(inside, log_plan, -jnp.inf)


def _log_plan_at(q, k, info: SinkhornInfo, target, spec: SinkhornSpec, lengths) -> Float[Array, "batch x_length"]:
    """`log P_i,t(i)`, minus infinity outside the support."""
    column = jnp.maximum(target, 0)
    k_target = jnp.take_along_axis(k, column[..., None], axis=1)
    score = (q.astype(jnp.float32) * k_target.astype(jnp.float32)).sum(-1) / (math.sqrt(q.shape[-1]) * spec.epsilon)
    f, g = info.f[:, 0, : q.shape[1]], jnp.take_along_axis(info.g[:, 0], column, axis=1)
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), target.shape)
    first, last = support.row_windows(rows, lengths[0], lengths[1], spec.band)
    inside = (target >= 0) & (first <= column) & (column <= last)
    return jnp.where(inside, jnp.where(inside, score + f + g, 0), -jnp.inf)


class Certificate(NamedTuple):
    """How near to convergence plans are: `ot_attention.certificates`, whose bounds are infinite where none is known."""

    residual: Float[Array, "batch heads"]
    contraction: Float[Array, "batch heads"]
    rate: Float[Array, "batch heads"]
    potentials: Float[Array, "batch heads"]
    plan: Float[Array, "batch heads"]
    gradient: Float[Array, "batch heads"]


def certify(given: Inputs) -> Certificate:
    """Of the plans of Sinkhorn's steps."""
    arguments = given.q, given.k, given.spec, *given.lengths, given.dustbin_score
    _, info = _attend(given.q, given.k, given.k, *given[3:], "auto")
    return Certificate(info.residual, contraction(*arguments), *posterior_bias(*arguments))


def plan(
    q, k, spec: SinkhornSpec, lengths, dustbin_score, implementation: str | Compiled
) -> Float[Array, "batch x_length y_length"]:
    """The plan over residues, dense, for decoding and pictures."""
    if isinstance(implementation, Compiled):
        info = _potentials(q, k, spec, lengths, dustbin_score, implementation)
        return jnp.exp(_log_plan(q, k, info, spec, lengths))
    dense = transport_plan(q[:, :, None], k[:, :, None], spec, *lengths, dustbin_score)
    return dense[:, 0, : q.shape[1], : k.shape[1]]
