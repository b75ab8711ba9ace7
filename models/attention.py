"""Multi-head attention by optimal transport: the only module of the models that imports `ot_attention`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from data.settings import Choice, Integer, Number, Section, Switch
from models import mesh as mesh_axes
from ot_attention import SinkhornInfo, SinkhornSpec, asap, plans, sinkhorn_attention, sparse
from ot_attention.asap import Asap
from ot_attention.axes import SequenceAxis
from ot_attention.certificates import contraction, posterior_bias
from ot_attention.plans import BandedPlan, Potentials
from ot_attention.sparse import SparseSpec
from ot_attention.spec import Dustbin, Gradient, Implementation, Solver

_BLOCK_KINDS = "sparse_sinkhorn", "local", "softmax"
MOST_WIDTH, MOST_HEADS = 1 << 16, 1 << 12
_ROTARY_BASE = 1000.0  # slowest angle turns once in about 6,000 residues, longer than nearly all domains
_ROTARY_BLOCK = 1024  # places whose angles float32 holds to 3e-5

Lengths = Int[Array, "batch"]
Features = Float[Array, "batch length width"]
Noise = Key[Array, "batch"] | None  # random keys of the examples in training, for a `BlockSpec`
Segments = Int[Array, "batch length"] | None  # numbers of the sequences in a row, 0 between them; None for one a row


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Self-attention by softmax over a sorted and the own block (arXiv 2002.11296), the own block, or all residues."""

    kind: str
    sparse: SparseSpec

    def __post_init__(self):
        if self.kind not in _BLOCK_KINDS:
            raise ValueError(f"attention.kind={self.kind!r} must be one of sinkhorn, {', '.join(_BLOCK_KINDS)}")


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Section):
    """`config.attention`, which configs/base.py describes: a `SinkhornSpec`, and the kind of the self-attention."""

    name: ClassVar[str] = "attention"

    kind: Annotated[str, Choice(("sinkhorn", *_BLOCK_KINDS))] = "sinkhorn"
    epsilon: Annotated[float, Number(open_least=True)] = 1.0
    base_steps: Annotated[int, Integer(0, 1 << 20)] = 20
    tail_steps: Annotated[int, Integer(1, 1000)] = 2
    band: Annotated[int, Integer(or_all=True)] = 64
    dustbin: Annotated[str, Choice(get_args(Dustbin))] = "none"
    gradient: Annotated[str, Choice(get_args(Gradient))] = "tail"
    solver: Annotated[str, Choice(get_args(Solver))] = "sinkhorn"
    newton_steps: Annotated[int, Integer(1, 1000)] = 2
    cg_steps: Annotated[int, Integer(1, 1 << 20)] = 8
    tau_a: Annotated[float, Number(most=1.0)] = 1.0
    tau_b: Annotated[float, Number(most=1.0)] = 1.0
    tolerance: Annotated[float, Number()] = 0.0

    def __post_init__(self):
        super().__post_init__()
        try:
            self.spec()
        except ValueError as error:  # about fields that do not fit together
            raise ValueError(f"attention.{error}") from error

    def spec(self) -> SinkhornSpec:
        values = {name: value for name, value in vars(self).items() if name != "kind"}
        return SinkhornSpec(**values | {"band": None if self.band == -1 else self.band})


@dataclasses.dataclass(frozen=True)
class SparseConfig(Section):
    """`config.sparse`, which configs/base.py describes: a `SparseSpec`."""

    name: ClassVar[str] = "sparse"

    block: Annotated[int, Integer(1, 1 << 24)] = 32
    steps: Annotated[int, Integer(1, 1 << 20)] = 7
    temperature: Annotated[float, Number(open_least=True)] = 0.75
    sortcut: Annotated[int, Integer(0, 1 << 24)] = 0
    mixture: Annotated[bool, Switch()] = False

    def spec(self) -> SparseSpec:
        return SparseSpec(**vars(self) | {"sortcut": self.sortcut or None})


def specs_of(config: Mapping[str, Any]) -> tuple[SinkhornSpec, BlockSpec | None]:
    """Return the settings of plans, and of the self-attention if it is of another kind, from a run's configuration.

    Raises ValueError: values out of range, misspelt keys.
    """
    settings = AttentionConfig.of(config["attention"])
    if settings.kind == "sinkhorn":
        return settings.spec(), None
    return settings.spec(), BlockSpec(settings.kind, SparseConfig.of(config["sparse"]).spec())


def check_segments_stay_apart(spec: SinkhornSpec | BlockSpec) -> None:
    """Raise ValueError if the attention would mix sequences that share a row."""
    if isinstance(spec, BlockSpec):
        raise ValueError(
            f"attention.kind={spec.kind!r} would mix the sequences of a row; set attention.kind=sinkhorn, "
            "data.join=False or model.attention_every=0"
        )
    if spec.dustbin != "none":
        raise ValueError(
            f"attention.dustbin={spec.dustbin!r} would couple the sequences of a row; set attention.dustbin=none, "
            "data.join=False or model.attention_every=0"
        )


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless heads of even width fit."""
    if width % heads or (width // heads) % 2:
        raise ValueError(
            f"model.heads={heads}: allowed are divisors of model.width={width} that leave even head widths"
        )


class _Heads(nnx.Module):
    """Projections of self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        check_heads(width, heads)
        # Heads are an axis of the kernels, so that devices can share them.
        each = heads, width // heads
        self.project = nnx.LinearGeneral(width, (3, *each), use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.LinearGeneral(each, width, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs)

    def _project(self, h):
        q, k, v = (x[:, :, 0] for x in jnp.split(self.project(h), 3, axis=2))
        turn = angles_of_places(h.shape[1], q.shape[-1] // 2)
        return turned(q, turn), turned(k, turn), v


class SelfAttention(_Heads):
    """Banded Sinkhorn self-attention with rotary positions."""

    def __init__(
        self, width: int, heads: int, spec: SinkhornSpec, implementation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, heads, dtype=dtype, rngs=rngs)
        self.spec = spec
        self.implementation: str | AsapPotentials = implementation
        self.dustbin = DustbinScore(heads, spec)

    def __call__(self, h: Features, lengths: Lengths, noise: Noise = None, segments: Segments = None) -> Features:
        """Return the attention's output; `noise` is for attention of other kinds."""
        out, _ = _attend(*self.inputs(h, lengths, segments), self.implementation)
        return self.out(out)

    def inputs(self, h: Features, lengths: Lengths, segments: Segments = None) -> "Inputs":
        """Return the arguments of the attention that a call makes."""
        q, k, v = self._project(h)
        return Inputs(q, k, v, self.spec, (lengths, lengths), self.dustbin.score, segments)


class BlockSelfAttention(_Heads):
    """Self-attention of a `BlockSpec` with rotary positions.

    The sort network scores block j for place i by a product of projections of their pooled, normalised residues.
    """

    def __init__(self, width: int, heads: int, spec: BlockSpec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, heads, dtype=dtype, rngs=rngs)
        self.spec = spec
        if spec.kind == "sparse_sinkhorn":
            each = heads, width // heads
            self.sort_norm = nnx.LayerNorm(width, rngs=rngs)
            self.sort_place = nnx.LinearGeneral(width, each, rngs=rngs)
            self.sort_block = nnx.LinearGeneral(width, each, rngs=rngs)

    def __call__(self, h: Features, lengths: Lengths, noise: Noise = None, segments: Segments = None) -> Features:
        if segments is not None:
            check_segments_stay_apart(self.spec)
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
        return jnp.einsum("bihd,bjhd->bhij", places, blocks, precision="highest") / math.sqrt(places.shape[-1])


def of_layer(noise: Noise, layer: int) -> Noise:
    """Derive the random keys of one layer from keys that layers share."""
    return None if noise is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(noise)


class Inputs(NamedTuple):
    """Arguments of one attention call; the plan of an aligner has one head."""

    q: Float[Array, "batch rows heads width"]
    k: Float[Array, "batch columns heads width"]
    v: Float[Array, "batch columns heads value"]
    spec: SinkhornSpec
    lengths: tuple[Lengths, Lengths]
    dustbin_score: Float[Array, "heads"] | None
    segments: Segments = None  # of rows and columns alike


@dataclasses.dataclass(frozen=True, eq=False)
class AsapPotentials:
    """Replacement for `implementation`: potentials come from a fitted ASAP map.

    Hashable by identity, so that it is part of a model's structure and not of its parameters.
    """

    map: Asap


def _attend(q, k, v, spec: SinkhornSpec, lengths, dustbin_score, segments, implementation: str | AsapPotentials):
    """Attend by `sinkhorn_attention` or `asap.apply`; on a mesh each device takes its examples, places and even heads.

    XLA cannot cut a kernel, and would have to guess how to cut the loops. Where devices share the places there is no
    info: its potentials have an entry of the dustbin a device.
    """
    fitted = implementation.map if isinstance(implementation, AsapPotentials) else None
    if fitted and segments is not None:
        raise ValueError("segments: an ASAP map is of one sequence a row; leave out the map, or the segments")
    # "auto" of config.model stands for None.
    name = None if fitted or implementation == "auto" else cast(Implementation, implementation)

    places = mesh_axes.SEQUENCE if mesh_axes.shares() > 1 else None

    def attend(q, k, v, lengths, score, segments, fitted):
        if fitted:
            return asap.apply(fitted, q, k, v, spec, *lengths, score)
        options: dict = {"implementation": name, "sequence_axis": places, "segment_ids": segments}
        out, info = sinkhorn_attention(q, k, v, spec, *lengths, dustbin_score=score, **options)
        return out, None if places else info

    if mesh := mesh_axes.current():
        heads = None if q.shape[2] % mesh.shape[mesh_axes.MODEL] else mesh_axes.MODEL
        by_length, by_example = P(mesh_axes.DATA, places, heads), P(mesh_axes.DATA)
        attend = jax.shard_map(
            attend,
            in_specs=(*(by_length,) * 3, by_example, P(heads), P(mesh_axes.DATA, places), P(heads)),
            out_specs=(by_length, P(mesh_axes.DATA, heads)),
        )
    return attend(q, k, v, lengths, dustbin_score, segments, fitted)


def with_neighbours(x: Array, reach: int) -> Array:
    """Add the nearest `reach` places of both neighbours to a device's share `[batch, places, ...]`; zeros at the ends.

    For functions that `jax.shard_map` calls. A share must hold at least `reach` places.
    """
    return SequenceAxis(mesh_axes.SEQUENCE).with_neighbours(x, reach)


class DustbinScore(nnx.Module):
    """Learned dustbin score of every head; None where the spec has no dustbin."""

    def __init__(self, heads: int, spec: SinkhornSpec):
        self._score = None if spec.dustbin == "none" else nnx.Param(jnp.zeros(heads))

    @property
    def score(self) -> Float[Array, "heads"] | None:
        return None if self._score is None else self._score[...]


def rotate(x: Float[Array, "batch length heads width"], position: Float[Array, "_ length"]):
    """Turn vectors by rotary positions in residues: their products depend on the difference of positions."""
    return turned(x, angles(position, x.shape[-1] // 2))


class Turn(NamedTuple):
    """Sines and cosines of the angles by which vectors are turned, in float32."""

    sin: Float[Array, "_ length 1 half"]
    cos: Float[Array, "_ length 1 half"]


def angles(position: Float[Array, "_ length"], half: int) -> Turn:
    """Return the angles of positions, whose products float32 rounds: by 3e-5 at 1,000, by .004 at 100,000."""
    angle = position[:, :, None, None] * _ROTARY_BASE ** (-jnp.arange(half) / half)
    return Turn(jnp.sin(angle), jnp.cos(angle))


def angles_of_places(length: int, half: int) -> Turn:
    """Return the angles of positions 0, 1, ... as exactly at 100,000 as in the first 1,024, whose angles are `angles`.

    The angle of the first place of each 1,024 is computed in float64, beside the program; sines and cosines of sums do
    the rest. So a row of many sequences needs no positions of its own for each of them.
    """
    blocks = -(-length // _ROTARY_BLOCK)
    near = angles(jnp.arange(min(length, _ROTARY_BLOCK), dtype=jnp.float32)[None], half)
    if blocks == 1:
        return near
    far = np.arange(blocks)[:, None] * _ROTARY_BLOCK * np.float64(_ROTARY_BASE) ** (-np.arange(half) / half)
    sin, cos = (jnp.asarray(f(far), near.sin.dtype)[:, None, None] for f in (np.sin, np.cos))
    parts = sin * near.cos + cos * near.sin, cos * near.cos - sin * near.sin
    return Turn(*(x.reshape(1, -1, *x.shape[2:])[:, :length] for x in parts))


def turned(x: Float[Array, "batch length heads width"], turn: Turn) -> Float[Array, "batch length heads width"]:
    """Turn vectors, the first half of their channels against the second."""
    sin, cos = (part.astype(x.dtype) for part in turn)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Transported(NamedTuple):
    """Results of sending values of y to x along one plan."""

    values: Float[Array, "batch x_length value"]  # sum_j P_ij v_j; small where x_i is mostly gap
    mass: Float[Array, "batch x_length"]  # sum_j P_ij over residues of y
    barycenter: Float[Array, "batch x_length"]  # sum_j P_ij j / mass, in residues
    log_target: Float[Array, "batch x_length"]  # log P_i,t(i); minus infinity outside the band and without a target
    residual: Float[Array, "batch"]


def transport(given: Inputs, target: Int[Array, "batch x_length"], implementation: str | AsapPotentials) -> Transported:
    """Send values of y to x along one head's plan, without an array of the plan's size.

    Positions travel as two more values, and the plan at `target`, a column of y or -1, comes from the potentials.
    """
    one = jnp.ones_like(given.v[..., :1])
    position = one * jnp.arange(one.shape[1])[:, None, None]
    carried = jnp.concatenate([given.v, one, position], -1)
    out, info = _attend(*given._replace(v=carried), implementation)
    values, mass, moment = out[:, :, 0, :-2], out[:, :, 0, -2], out[:, :, 0, -1]
    barycenter = moment / jnp.where(mass > 0, mass, 1)
    solved = _solved(given, info)
    return Transported(values, mass, barycenter, plans.log_plan_at(target, *solved), info.residual[:, 0])


def banded_plan(given: Inputs, implementation: str | AsapPotentials) -> BandedPlan:
    """Return one head's plan over residues by the windows of its band; values are not read."""
    _, info = _attend(*given._replace(v=jnp.zeros((*given.k.shape[:3], 1), given.k.dtype)), implementation)
    return plans.banded_plan(*_solved(given, info))


def by_antidiagonals(plan: BandedPlan, columns: int) -> Float[Array, "diagonals batch rows"]:
    """Return a plan by antidiagonals i + j = d, whose lanes are the rows; 0 outside the windows."""
    values, first = plan
    rows = jnp.arange(values.shape[1])
    column = jnp.arange(len(rows) + columns - 1)[:, None] - rows  # [diagonals, rows]

    def of_pair(values, first):
        place = column - first
        inside = (place >= 0) & (place < values.shape[1])
        return jnp.where(inside, values[rows, jnp.clip(place, 0, values.shape[1] - 1)], 0)

    return jax.vmap(of_pair, out_axes=1)(values, first)


def _solved(given: Inputs, info: SinkhornInfo) -> tuple:
    """Return the arguments that functions of `ot_attention.plans` take of one head."""
    return given.q[:, :, 0], given.k[:, :, 0], Potentials(info.f[:, 0], info.g[:, 0]), given.lengths, given.spec


class Certificate(NamedTuple):
    """Distances of plans from convergence, see `ot_attention.certificates`; bounds are infinite if unknown."""

    residual: Float[Array, "batch heads"]
    contraction: Float[Array, "batch heads"]
    rate: Float[Array, "batch heads"]
    potentials: Float[Array, "batch heads"]
    plan: Float[Array, "batch heads"]
    gradient: Float[Array, "batch heads"]


def certify(given: Inputs) -> Certificate:
    """Certify the plans of Sinkhorn's steps: the residual of the chosen implementation, and bounds computed in XLA."""
    arguments = given.q, given.k, given.spec, *given.lengths, given.dustbin_score
    _, info = _attend(given.q, given.k, given.k, *given[3:], "auto")
    return Certificate(info.residual, contraction(*arguments), *posterior_bias(*arguments))
