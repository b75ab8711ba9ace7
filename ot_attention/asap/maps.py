"""The map of ASAP, linear for each head, from cheap features of the rows to the log-potential f; attention by it.

Features and targets are taken relative to their mean over a problem's residues: potentials have a gauge, with a dustbin
too. The dustbin's row has features of its own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ot_attention import problem as problems
from ot_attention import sinkhorn, support
from ot_attention.api import Checked
from ot_attention.asap.transport import uniform, uniform_staircase
from ot_attention.problem import Problem, column_potentials, row_potentials
from ot_attention.spec import (
    AllRows,
    Heads,
    LengthsLike,
    ScoreLike,
    SinkhornInfo,
    SinkhornSpec,
    UnsupportedError,
    choice,
    flag,
    integer,
)

# docs/math.md, section 10. "mass" costs one product more.
Feature = Literal["kantorovich", "squares", "position", "mass"]
Direction = Literal["random", "principal", "keys"]

einsum = functools.partial(jnp.einsum, precision="highest")  # float32 products stay float32 on every device


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["directions", "weights"], meta_fields=["features", "two_sided"]
)
@dataclasses.dataclass(frozen=True)
class Asap:
    """The map of one layer. Made by `create`, filled in by `fit`.

    two_sided: whether a half step renews f from g, so that row sums are exact; else f stays as predicted, and column
    sums are exact. Raises ValueError for unknown features.
    """

    directions: Float[Array, "*heads projections width"]
    weights: Float[Array, "*heads design"]
    features: tuple[str, ...] = ("kantorovich",)
    two_sided: bool = True

    def __post_init__(self):
        object.__setattr__(self, "features", tuple(self.features))
        flag("two_sided", self.two_sided)
        if wrong := [name for name in self.features if name not in get_args(Feature)]:
            raise ValueError(f"features={wrong} must be among {', '.join(get_args(Feature))}")

    @classmethod
    def create(
        cls,
        directions: Float[Array | np.ndarray, "heads projections width"],
        features: Sequence[str] = ("kantorovich",),
        two_sided: bool | np.bool_ = True,
    ) -> "Asap":
        """Create the map to f = 0, from which one step starts at the columns."""
        directions = jnp.asarray(directions)
        heads, projections, _ = directions.shape
        empty = cls(
            directions, jnp.zeros((heads, 0)), tuple(features), flag("two_sided", two_sided)
        )  # checks the features' names
        return dataclasses.replace(empty, weights=jnp.zeros((heads, design_size(features, projections))))

    def check(self, checked: Checked) -> None:
        """Raise ValueError unless the map is of such a layer."""
        number, _, width = self.directions.shape
        if (number, width) != (given := checked.q.shape[2:]):
            raise ValueError(f"asap is a map of {number} heads of width {width}; q has {given[0]} of {given[1]}")

    def in_dtype_of(self, heads: Heads) -> "Asap":
        return jax.tree.map(lambda x: x.astype(heads.q.dtype), self)


def check_fixed(spec: SinkhornSpec) -> None:
    """Raise UnsupportedError for a traced temperature, and for relaxed marginals."""
    if isinstance(spec.epsilon, jax.core.Tracer):
        raise UnsupportedError("spec.epsilon is traced, but a map of ASAP is for one temperature; use a number")
    if spec.is_relaxed:
        raise UnsupportedError(
            f"a map of ASAP cannot do tau_a={spec.tau_a:g}, tau_b={spec.tau_b:g}: its half steps meet the sums; use 1"
        )


class Sample(NamedTuple):
    """Inputs of a frozen layer, and its potentials."""

    q: Float[Array | np.ndarray, "batch rows heads width"]
    k: Float[Array | np.ndarray, "batch columns heads width"]
    q_lengths: LengthsLike
    k_lengths: LengthsLike
    dustbin_score: ScoreLike | None
    f: Float[Array, "batch heads all_rows"]


def design_size(features: Sequence[str], projections: int) -> int:
    """Return the number of weights of a head: features of residues, then of the dustbin's row."""
    sizes = {"kantorovich": projections, "squares": projections, "position": 3, "mass": 1}
    return sum(sizes[name] for name in features) + 3 + ("mass" in features)


def directions(
    kind: str, samples: Sequence[Sample], number: ArrayLike, seed: int = 0
) -> Float[Array, "heads projections width"]:
    """Return unit vectors to project q and k on.

    kind: "random"; "principal", the axes along which queries and keys vary most; "keys", the same of keys alone.
    Raises ValueError for an unknown kind, and for more axes than there are.
    """
    heads, width = np.shape(samples[0].q)[2:]
    choice("kind", kind, get_args(Direction))
    number = integer("number", number, 0)
    if kind != "random" and number > width:
        raise ValueError(f"number={number} must be from 0 to {width}, the width of q and k; 'random' may be more")
    if kind == "random":
        vectors = np.random.default_rng(seed).normal(size=(heads, number, width))
        return jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), jnp.float32)
    sides = [(np.asarray(x.k, float), x.k_lengths) for x in samples]
    if kind == "principal":
        sides += [(np.asarray(x.q, float), x.q_lengths) for x in samples]
    rows = np.concatenate([x[np.arange(x.shape[1]) < np.asarray(n)[:, None]] for x, n in sides])
    rows -= rows.mean(0)
    _, axes = np.linalg.eigh(np.einsum("nhd,nhe->hde", rows, rows))
    return jnp.asarray(axes.swapaxes(1, 2)[:, ::-1][:, :number], jnp.float32)


def design(asap: Asap, heads: Heads, problem: Problem, first_f=None) -> Float[Array, "N all_rows design"]:
    """Compute the features of every row: of residues relative to their mean, then of the dustbin's row.

    first_f: Sinkhorn's first f, `log a - LSE_j(S)`; computed if None, and not read without the feature "mass".
    """
    if "mass" in asap.features and first_f is None:
        first_f = row_potentials(problem, jnp.zeros_like(problem.b))
    real = problem.a[:, :-1, None] > 0
    nothing = jnp.zeros((*heads.q.shape[:2], 0), heads.q.dtype)
    features = (_features(name, asap, heads, problem, first_f) for name in asap.features)
    of_residues = jnp.concatenate([nothing, *features], -1)
    of_residues = jnp.where(real, of_residues - _mean(of_residues, real)[:, None], 0)
    logs = (jnp.log(jnp.maximum(n, 1).astype(of_residues.dtype)) for n in (heads.n_q, heads.n_k))
    of_bin = [jnp.ones_like(problem.a[:, -1]), *logs]
    if "mass" in asap.features:
        of_bin.append(relative(first_f, problem)[:, -1])
    last = jnp.where(problem.a[:, -1:] > 0, jnp.stack(of_bin, -1), 0)[:, None]
    first = jnp.pad(of_residues, ((0, 0), (0, 0), (0, last.shape[-1])))
    return jnp.concatenate([first, jnp.pad(last, ((0, 0), (0, 0), (of_residues.shape[-1], 0)))], 1)


def relative(f: AllRows, problem: Problem) -> AllRows:
    """Take a potential, the dustbin's too, relative to its mean over residues; 0 where there is no row."""
    mean = _mean(f[:, :-1], problem.a[:, :-1] > 0)
    return jnp.where(problem.a > 0, f - mean[:, None], 0)


def _mean(x: Float[Array, "N rows ..."], real) -> Float[Array, "N ..."]:
    return support.divide(jnp.where(real, x, 0).sum(1), real.sum(1).astype(x.dtype))


def _features(name: str, asap: Asap, heads: Heads, problem: Problem, first_f) -> Float[Array, "N rows _"]:
    """Compute one feature of residues; at padding it may be anything."""
    n_q, n_k, rows = heads.n_q, heads.n_k, heads.q.shape[1]
    if name == "mass":
        return first_f[:, :-1, None]
    if name == "position":
        place = (jnp.arange(rows) + 0.5) / jnp.maximum(n_q, 1)[:, None].astype(heads.q.dtype)
        first, last = problem.scores.band.row_windows()
        columns = last - first + 1
        return jnp.stack([place, place**2, jnp.log(jnp.maximum(columns, 1).astype(place.dtype))], -1)
    x, y = (einsum("nld,nmd->nml", z, asap.directions) for z in (heads.q, heads.k))
    if name == "squares":
        return (x * x).swapaxes(1, 2)

    def of_head(x, y, n_x, n_y):
        stairs = uniform_staircase(n_x, n_y, rows)
        return jax.vmap(lambda x, y: uniform(x, y, n_x, n_y, *stairs))(x, y)

    return jax.vmap(of_head)(x, y, n_q, n_k).swapaxes(1, 2)


@support.promoting
def apply(
    asap: Asap,
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    v: Float[ArrayLike, "batch columns heads value"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
) -> tuple[Float[Array, "batch rows heads value"], SinkhornInfo]:
    """Return what `sinkhorn_attention` returns, by two half steps from the predicted f (docs/math.md, section 10).

    `spec` gives epsilon, band and dustbin; its steps and gradient belong to the teacher and are not read. The residual
    is of the sums that are not exact: of columns, or of rows if the map is one-sided. Runs on the XLA backend on every
    device; no other implementation is offered. Differentiable by JAX, which keeps the band for it. Raises ValueError as
    `sinkhorn_attention` does, and for a map of other heads or widths.
    """
    check_fixed(spec)
    checked = Checked.create(q, k, v, spec, q_lengths, k_lengths, dustbin_score)
    asap.check(checked)
    out, info = checked.of_every_head(_apply, layers=asap)
    return out.swapaxes(1, 2).astype(checked.v.dtype), info


def _apply(heads: Heads, spec: SinkhornSpec, asap: Asap) -> tuple[Array, SinkhornInfo]:
    heads = support.cleaned(heads)
    arguments = heads, asap.in_dtype_of(heads)
    out, f, g, residual = sinkhorn.by_group(functools.partial(_attend, spec=spec), arguments, spec)
    if spec.dustbin == "none":
        f, g = f[..., :-1], g[..., :-1]
    return out, SinkhornInfo(f, g, residual, jnp.zeros_like(heads.n_q))


def _attend(arguments: tuple[Heads, Asap], spec: SinkhornSpec) -> tuple[Array, Array, Array, Array]:
    """Return output, f, g and residual of a group of heads. `K = exp(S)` is made once and scaled."""
    heads, asap = arguments
    problem = Problem.create(heads, spec)
    a, b, scores = problem.a, problem.b, problem.scores
    one_row, one_column = jnp.ones_like(a), jnp.ones_like(b)
    top = problems.row_tops(problem, heads, jnp.zeros_like(b))
    kernel = scores.shift(-top, jnp.zeros_like(b)).exp()
    first_f = support.log(support.divide(a, kernel.times(one_column))) - top if "mass" in asap.features else None
    predicted = einsum("nif,nf->ni", design(asap, heads, problem, first_f), asap.weights)
    start = jnp.where(a > 0, predicted + top, -jnp.inf)
    u = jnp.exp(start - jnp.maximum(start.max(-1, keepdims=True), jnp.finfo(start.dtype).min))
    v = support.divide(b, kernel.transpose_times(u))
    if asap.two_sided:
        u = support.divide(a, kernel.times(v))

    def scaled():
        f, g = jnp.where(a > 0, support.log(u) - top, 0), support.log(v)
        out = u[:, :-1, None] * kernel.band.times(kernel.tiles, v[:, :-1, None] * heads.v)
        off = v * kernel.transpose_times(u) - b if asap.two_sided else u * kernel.times(v) - a
        return out, f, g, jnp.abs(off).max(-1)

    def in_logarithms():
        g = column_potentials(problem, predicted)
        f = row_potentials(problem, g) if asap.two_sided else predicted
        plan = scores.shift(f, g).exp()
        off = plan.transpose_times(one_row) - b if asap.two_sided else plan.times(one_column) - a
        return plan.band.times(plan.tiles, heads.v), f, g, jnp.abs(off).max(-1)

    return jax.lax.cond(problems.in_range(u, a) & problems.in_range(v, b), scaled, in_logarithms)
