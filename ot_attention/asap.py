"""A frozen Sinkhorn layer without its loop: row potentials are predicted, two half steps make the plan of them.

ASAP (arXiv 2605.12879): train with Sinkhorn, freeze, and per head `fit` a linear map from cheap features of the rows to
the log-potential f. `apply` then does `g = log b - LSE_i(S + f)`, `f = log a - LSE_j(S + g)`, the entropic c-transform
on both sides, so that row sums are exact and column sums nearly so. This is one Sinkhorn step, columns first, from a
learned start: what it has to beat is Sinkhorn stopped after as much time (docs/asap.md).

The paper's features are exact potentials of one-dimensional optimal transport between q and k along directions. They
cost a sort of every projection of both sides, whatever the band.

Potentials have a gauge, with a dustbin too: `f + c`, `g - c` is the same plan. Features and targets are taken relative
to their mean over a problem's residues, and so are errors. The dustbin's row has columns of its own in the map.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ot_attention import sinkhorn, support
from ot_attention.api import by_head, checked, cleaned
from ot_attention.kernel import Kernel
from ot_attention.sinkhorn import Problem, column_potentials, row_potentials
from ot_attention.spec import Heads, SinkhornInfo, SinkhornSpec

# kantorovich: f of one-dimensional transport along every direction, squared cost. squares: of the projections; with
# them the potentials of the cost -xy, which is that of scores, are in reach. position: place along the sequence, its
# square, and log of the number of columns in the band. mass: Sinkhorn's own first f, a product more.
Feature = Literal["kantorovich", "squares", "position", "mass"]
Direction = Literal["random", "principal", "keys"]

_TIE = 1e-6  # of the total mass; sums of masses that differ by less are taken as equal
_KEY_BITS = 24  # what float32 holds


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["directions", "weights"], meta_fields=["features", "two_sided"]
)
@dataclasses.dataclass(frozen=True)
class Asap:
    """The map of one layer. Made by `create`, filled in by `fit`.

    two_sided: whether f is made anew from g; else the predicted one stays, and column sums are exact instead.

    Raises ValueError for unknown features.
    """

    directions: Float[Array, "*heads projections width"]
    weights: Float[Array, "*heads design"]
    features: tuple[str, ...] = ("kantorovich",)
    two_sided: bool = True

    def __post_init__(self):
        if wrong := [name for name in self.features if name not in get_args(Feature)]:
            raise ValueError(f"features={wrong} must be among {', '.join(get_args(Feature))}")

    @classmethod
    def create(
        cls,
        directions: Float[Array, "heads projections width"],
        features: Sequence[str] = ("kantorovich",),
        two_sided: bool = True,
    ) -> "Asap":
        """The map to f = 0, from which one step starts at the columns."""
        heads, projections, _ = directions.shape
        empty = cls(directions, jnp.zeros((heads, 0)), tuple(features), two_sided)
        return dataclasses.replace(empty, weights=jnp.zeros((heads, design_size(features, projections))))


class Sample(NamedTuple):
    """Inputs of a frozen layer, and its potentials."""

    q: Float[Array, "batch rows heads width"]
    k: Float[Array, "batch columns heads width"]
    q_lengths: Int[Array, "batch"]
    k_lengths: Int[Array, "batch"]
    dustbin_score: Float[Array, "heads"] | None
    f: Float[Array, "batch heads all_rows"]


class Deviation(NamedTuple):
    """How far a plan P is from a teacher's T. `divergence` and `variation` are a unit of T's mass."""

    f: Float[Array, "batch heads"]  # root mean square over rows, in nats, relative to the mean over them
    rows: Float[Array, "batch heads"]  # largest absolute deviation of a row sum from its target, and so on
    columns: Float[Array, "batch heads"]
    divergence: Float[Array, "batch heads"]  # sum T log(T / P) - T + P
    variation: Float[Array, "batch heads"]  # sum |T - P| / 2


def design_size(features: Sequence[str], projections: int) -> int:
    """Number of weights of a head: features of residues, then of the dustbin's row."""
    sizes = {"kantorovich": projections, "squares": projections, "position": 3, "mass": 1}
    return sum(sizes[name] for name in features) + 3 + ("mass" in features)


# ---- one-dimensional transport ----


def kantorovich(
    x: Float[Array, "n_x"], y: Float[Array, "n_y"], a: Float[Array, "n_x"], b: Float[Array, "n_y"]
) -> tuple[Float[Array, "n_x"], Float[Array, "n_y"]]:
    """Exact optimal duals of transport on the line, cost `(x_i - y_j)^2`; masses a and b are scaled to a sum of 1.

    `f_i + g_j <= (x_i - y_j)^2`, and `sum a f + sum b g` is the optimal cost. Where partial sums of a and b meet, duals
    are not unique: it is the mean of the staircases that go on to the next row and to the next column first. Points of
    mass 0 are padding, whatever their values, and have potential 0. Points closer than the 2^24th part of the range (or
    n / 2^32, if that is more) may be taken in another order. O(n log n).
    """
    x_order, x = _sorted(x, a > 0)
    y_order, y = _sorted(y, b > 0)
    x_sums, y_sums = (jnp.cumsum(mass[order]) for mass, order in ((a, x_order), (b, y_order)))
    x_sums, y_sums = x_sums / x_sums[-1], y_sums / y_sums[-1]
    f = _along_staircase(x, y, *_where_met(x_sums, y_sums, (b > 0).sum()))
    g = _along_staircase(y, x, *_where_met(y_sums, x_sums, (a > 0).sum())) + (x[0] - y[0]) ** 2
    f, g = (_unsorted(z, order) for z, order in ((f, x_order), (g, y_order)))
    return jnp.where(a > 0, f, 0), jnp.where(b > 0, g, 0)


def _sorted(x: Float[Array, "n"], exists) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
    """Order of the values, and the values in it; what does not exist is last and repeats the largest.

    Value and place share one integer: XLA's CPU backend sorts those 7 times as fast as floats with their places.
    """
    place_bits = max(1, (x.shape[0] - 1).bit_length())
    value_bits = min(_KEY_BITS, 32 - place_bits)
    low, high = jnp.where(exists, x, jnp.inf).min(), jnp.where(exists, x, -jnp.inf).max()
    share = support.divide(jnp.where(exists, x - low, 0), high - low)
    key = jnp.where(exists, share * (2.0**value_bits - 2), 2.0**value_bits - 1).astype(jnp.uint32)
    packed = (key << place_bits) | jnp.arange(x.shape[0], dtype=jnp.uint32)
    order = (jax.lax.sort(packed, is_stable=False) & (2**place_bits - 1)).astype(jnp.int32)
    return order, jnp.where(jnp.arange(x.shape[0]) < exists.sum(), x[order], high)


def _unsorted(x: Float[Array, "n"], order: Int[Array, "n"]) -> Float[Array, "n"]:
    return jnp.zeros_like(x).at[order].set(x, unique_indices=True)


def _where_met(sums: Float[Array, "n"], others: Float[Array, "m"], number) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The other side's point in which the mass up to each point ends, and the one where it goes on."""
    ends = jnp.searchsorted(others, sums - _TIE, side="left"), jnp.searchsorted(others, sums + _TIE, side="right")
    before, after = (jnp.clip(x, 0, number - 1).astype(jnp.int32) for x in ends)
    return before, after


def _along_staircase(x: Float[Array, "n"], y: Float[Array, "m"], before, after) -> Float[Array, "n"]:
    """Potentials of sorted x, 0 at the first. From x to x' at y the cost rises by (x' - x)(x' + x - 2 y)."""
    rise = (x[1:] - x[:-1]) * (x[1:] + x[:-1] - y[before[:-1]] - y[after[:-1]])
    return jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(rise)])


def _uniform(x: Float[Array, "n"], y: Float[Array, "m"], n_x, n_y, before, after) -> Float[Array, "n"]:
    """f of `kantorovich` for the first n_x and n_y points, all of one mass: the staircase is known from the numbers."""
    order, x = _sorted(x, jnp.arange(x.shape[0]) < n_x)
    _, y = _sorted(y, jnp.arange(y.shape[0]) < n_y)
    return _unsorted(_along_staircase(x, y, before, after), order)


def _uniform_staircase(n_x, n_y, length: int) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """`_where_met` for uniform masses, in integers."""
    mass = jnp.arange(1, length + 1, dtype=jnp.uint32) * n_y.astype(jnp.uint32)
    unit, last = jnp.maximum(n_x, 1).astype(jnp.uint32), jnp.maximum(n_y - 1, 0)
    before, after = (mass + unit - 1) // unit - 1, mass // unit
    return jnp.clip(before.astype(jnp.int32), 0, last), jnp.clip(after.astype(jnp.int32), 0, last)


# ---- the map ----


def directions(
    kind: str, samples: Sequence[Sample], number: int, seed: int = 0
) -> Float[Array, "heads projections width"]:
    """Unit vectors to project q and k on: "random", or the axes along which queries and keys, or keys alone, vary most.

    Raises ValueError for an unknown kind, and for more axes than there are.
    """
    heads, width = samples[0].q.shape[2:]
    if kind not in get_args(Direction):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(Direction))}")
    if number < 0 or (kind != "random" and number > width):
        raise ValueError(f"number={number} must be from 0 to {width}, the width of q and k; 'random' may be more")
    if kind == "random":
        vectors = np.random.default_rng(seed).normal(size=(heads, number, width))
        return jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), jnp.float32)
    sides = [(x.k, x.k_lengths) for x in samples]
    if kind == "principal":
        sides += [(x.q, x.q_lengths) for x in samples]
    rows = np.concatenate([np.asarray(x, float)[np.arange(x.shape[1]) < np.asarray(n)[:, None]] for x, n in sides])
    rows -= rows.mean(0)
    _, axes = np.linalg.eigh(np.einsum("nhd,nhe->hde", rows, rows))
    return jnp.asarray(axes.swapaxes(1, 2)[:, ::-1][:, :number], jnp.float32)


def _design(asap: Asap, heads: Heads, problem: Problem, first_f) -> Float[Array, "N all_rows design"]:
    """Features of every row: of residues relative to their mean, then those of the dustbin's row."""
    real = problem.a[:, :-1, None] > 0
    nothing = jnp.zeros((*heads.q.shape[:2], 0), heads.q.dtype)
    made = [_features(name, asap, heads, problem, first_f) for name in asap.features]
    columns = _centred(jnp.concatenate([nothing, *made], -1), real)

    logs = (jnp.log(jnp.maximum(n, 1).astype(columns.dtype)) for n in (heads.n_q, heads.n_k))
    of_bin = [jnp.ones_like(problem.a[:, -1]), *logs]
    if "mass" in asap.features:
        of_bin.append(_relative(first_f, problem)[:, -1])
    last = jnp.where(problem.a[:, -1:] > 0, jnp.stack(of_bin, -1), 0)[:, None]
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, last.shape[-1])))
    return jnp.concatenate([columns, jnp.pad(last, ((0, 0), (0, 0), (columns.shape[-1] - last.shape[-1], 0)))], 1)


def _centred(x: Float[Array, "N rows features"], real) -> Float[Array, "N rows features"]:
    """Relative to the mean over real rows, 0 elsewhere."""
    mean = support.divide(jnp.where(real, x, 0).sum(1), real.sum(1).astype(x.dtype))
    return jnp.where(real, x - mean[:, None], 0)


def _relative(f: Float[Array, "N all_rows"], problem: Problem) -> Float[Array, "N all_rows"]:
    """A potential without its gauge: relative to the mean over residues, the dustbin's too; 0 where there is no row."""
    residues = problem.a[:, :-1] > 0
    mean = support.divide(jnp.where(residues, f[:, :-1], 0).sum(1), residues.sum(1).astype(f.dtype))
    return jnp.where(problem.a > 0, f - mean[:, None], 0)


def _features(name: str, asap: Asap, heads: Heads, problem: Problem, first_f) -> Float[Array, "N rows _"]:
    """Those of residues; what is said of padding does not matter."""
    n_q, n_k, rows = heads.n_q, heads.n_k, heads.q.shape[1]
    if name == "mass":
        return first_f[:, :-1, None]
    if name == "position":
        place = (jnp.arange(rows) + 0.5) / jnp.maximum(n_q, 1)[:, None].astype(heads.q.dtype)
        first, last = problem.scores.band.row_windows()
        columns = last - first + 1
        return jnp.stack([place, place**2, jnp.log(jnp.maximum(columns, 1).astype(place.dtype))], -1)
    x, y = (jnp.einsum("nld,nmd->nml", z, asap.directions, precision="highest") for z in (heads.q, heads.k))
    if name == "squares":
        return (x * x).swapaxes(1, 2)

    def of_head(x, y, n_x, n_y):
        stairs = _uniform_staircase(n_x, n_y, rows)
        return jax.vmap(lambda x, y: _uniform(x, y, n_x, n_y, *stairs))(x, y)

    return jax.vmap(of_head)(x, y, n_q, n_k).swapaxes(1, 2)


# ---- the plan ----


@checked
def apply(
    asap: Asap,
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch columns heads width"],
    v: Float[Array, "batch columns heads value"],
    spec: SinkhornSpec,
    q_lengths: Int[Array, "batch"] | None = None,
    k_lengths: Int[Array, "batch"] | None = None,
    dustbin_score: Float[Array, "heads"] | None = None,
) -> tuple[Float[Array, "batch rows heads value"], SinkhornInfo]:
    """What `sinkhorn_attention` returns, with two half steps after the predicted potentials in place of its steps.

    `spec` gives epsilon, band and dustbin; its steps and gradient are those of the teacher. The residual is of row or
    of column sums, whichever are not exact. Differentiable by JAX, at the price of keeping the band.

    Raises:
        ValueError: as `sinkhorn_attention` does; a map of other heads or widths.
    """
    heads = cleaned(by_head(q, k, v, dustbin_score, q_lengths, k_lengths))
    group = functools.partial(_attend, spec=spec)
    solved = sinkhorn.by_group(group, (heads, _tiled(asap, q, heads)), spec)
    out, f, g, residual = (x.reshape(q.shape[0], -1, *x.shape[1:]) for x in solved)
    if spec.dustbin == "none":
        f, g = f[..., :-1], g[..., :-1]
    return out.swapaxes(1, 2).astype(v.dtype), SinkhornInfo(f, g, residual)


def _attend(arguments: tuple[Heads, Asap], spec: SinkhornSpec) -> tuple[Array, Array, Array, Array]:
    """Output, f, g and residual. K = exp(S) is made once and scaled, as in `sinkhorn.forward`."""
    heads, asap = arguments
    problem = Problem.create(heads, spec)
    a, b, scores = problem.a, problem.b, problem.scores
    one_row, one_column = jnp.ones_like(a), jnp.ones_like(b)
    top = sinkhorn.row_tops(problem, heads, jnp.zeros_like(b))
    kernel = scores.shift(-top, jnp.zeros_like(b)).exp()
    first_f = sinkhorn.log(support.divide(a, kernel.times(one_column))) - top if "mass" in asap.features else None
    predicted = jnp.einsum("nif,nf->ni", _design(asap, heads, problem, first_f), asap.weights, precision="highest")
    start = jnp.where(a > 0, predicted + top, -jnp.inf)
    u = jnp.exp(start - jnp.maximum(start.max(-1, keepdims=True), jnp.finfo(start.dtype).min))
    v = support.divide(b, kernel.transpose_times(u))
    if asap.two_sided:
        u = support.divide(a, kernel.times(v))

    def scaled():
        f, g = jnp.where(a > 0, sinkhorn.log(u) - top, 0), sinkhorn.log(v)
        out = u[:, :-1, None] * kernel.band.times(kernel.tiles, v[:, :-1, None] * heads.v)
        off = v * kernel.transpose_times(u) - b if asap.two_sided else u * kernel.times(v) - a
        return out, f, g, jnp.abs(off).max(-1)

    def in_logarithms():
        g = column_potentials(problem, predicted)
        f = row_potentials(problem, g) if asap.two_sided else predicted
        plan = scores.shift(f, g).exp()
        off = plan.transpose_times(one_row) - b if asap.two_sided else plan.times(one_column) - a
        return plan.band.times(plan.tiles, heads.v), f, g, jnp.abs(off).max(-1)

    return jax.lax.cond(sinkhorn.in_range(u, a) & sinkhorn.in_range(v, b), scaled, in_logarithms)


def _tiled(asap: Asap, q, heads: Heads) -> Asap:
    """The map of every head of the batch. Raises ValueError if it is of another layer."""
    of_map, of_layer = (asap.directions.shape[0], asap.directions.shape[2]), q.shape[2:]
    if of_map != of_layer:
        raise ValueError(
            f"asap is a map of {of_map[0]} heads of width {of_map[1]}; q has {of_layer[0]} of {of_layer[1]}"
        )
    tiled = jax.tree.map(lambda x: jnp.tile(x, (q.shape[0],) + (1,) * (x.ndim - 1)).astype(heads.q.dtype), asap)
    return support.varying_like(heads.q, tiled)


# ---- fitting ----


def fit(
    asap: Asap, samples: Sequence[Sample], spec: SinkhornSpec, *, ridge: float = 1e-3, newton_steps: int = 0
) -> Asap:
    """The map with weights by ridge regression on the teacher's f, features scaled to a mean square of 1.

    newton_steps: then so many Newton steps on the divergence of the teacher's plan from that of the predicted f, before
    f is made anew. It is convex in f, and so in the weights; its second derivative takes a product for every feature.

    Raises ValueError: no samples, ridge below 0, newton_steps below 0, and as `apply` does.
    """
    if not samples or ridge < 0 or newton_steps < 0:
        raise ValueError(
            f"{len(samples)} samples, ridge={ridge}, newton_steps={newton_steps}: one at least, none below 0"
        )
    gram, moment = _summed(_moments, asap, samples, spec)
    best = _solved(gram, moment, ridge)
    if not newton_steps:
        return dataclasses.replace(asap, weights=jnp.asarray(best, jnp.float32))
    weights, step, lowest = best, np.zeros_like(best), np.full(len(best), np.inf)
    for _ in range(newton_steps + 1):
        refined = dataclasses.replace(asap, weights=jnp.asarray(weights, jnp.float32))
        value, gradient, curvature = _summed(_divergence, refined, samples, spec)
        better = value < lowest
        best, lowest = np.where(better[:, None], weights, best), np.where(better, value, lowest)
        step = np.where(better[:, None], -_solved(curvature, gradient, ridge), step / 2)
        weights = best + step
    return dataclasses.replace(asap, weights=jnp.asarray(best, jnp.float32))


def _solved(matrix: np.ndarray, vector: np.ndarray, ridge: float) -> np.ndarray:
    """`(M + ridge diag M)^-1 v` of every head; 0 for features that are nowhere."""
    scale = np.sqrt(np.maximum(np.einsum("hii->hi", matrix), 0))
    scale = np.where(scale > 1e-6 * scale.max(-1, keepdims=True), scale, np.inf)
    eye = np.eye(matrix.shape[-1])
    scaled = matrix / (scale[:, :, None] * scale[:, None]) + (ridge + 1e-12) * eye + np.isinf(scale)[:, None] * eye
    return np.linalg.solve(scaled, (vector / scale)[..., None])[..., 0] / scale


def _summed(function, asap: Asap, samples: Sequence[Sample], spec: SinkhornSpec) -> list[np.ndarray]:
    """Sums over samples and their problems of what a function says of every head, in float64."""
    parts = (_of_sample(asap, sample, function, spec) for sample in samples)
    return [np.sum([np.asarray(x, np.float64).sum(0) for x in of], 0) for of in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnames=("function", "spec"))
def _of_sample(asap: Asap, sample: Sample, function, spec: SinkhornSpec):
    return _with_potentials(*sample[:2], spec, *sample[2:5], function=function, asap=asap, f=sample.f)


@checked
def _with_potentials(q, k, spec, q_lengths, k_lengths, dustbin_score, *, function, asap, f):
    heads = cleaned(by_head(q, k, k, dustbin_score, q_lengths, k_lengths))
    arguments = heads, _tiled(asap, q, heads), _flat(f, spec)
    found = sinkhorn.by_group(functools.partial(function, spec=spec), arguments, spec)
    return [x.reshape(q.shape[0], -1, *x.shape[1:]) for x in found]


def _flat(potential: Float[Array, "batch heads length"], spec: SinkhornSpec) -> Float[Array, "N all"]:
    """As implementations hold it, with an entry for the dustbin."""
    flat = potential.reshape(-1, potential.shape[-1])
    return support.with_dustbin(flat) if spec.dustbin == "none" else flat


def _moments(arguments: tuple[Heads, Asap, Array], spec: SinkhornSpec) -> tuple[Array, Array]:
    """`X^T X` and `X^T f` of the design X."""
    heads, asap, f = arguments
    problem = Problem.create(heads, spec)
    design = _design_in_logarithms(asap, heads, problem)
    products = functools.partial(jnp.einsum, precision="highest")
    return products("nif,nig->nfg", design, design), products("nif,ni->nf", design, _relative(f, problem))


def _design_in_logarithms(asap: Asap, heads: Heads, problem: Problem):
    first_f = row_potentials(problem, jnp.zeros_like(problem.b)) if "mass" in asap.features else None
    return _design(asap, heads, problem, first_f)


def _divergence(arguments: tuple[Heads, Asap, Array], spec: SinkhornSpec) -> tuple[Array, Array, Array]:
    """Of the teacher's plan from the one-sided plan: value, gradient and second derivative in the weights.

    With g the c-transform of f it is, but for a constant, the dual objective `sum_j b_j LSE_i(S + f) - sum_i r_i f_i`,
    r the teacher's row sums: its gradient in f are the plan's row sums minus those, and it is convex.
    """
    heads, asap, teacher_f = arguments
    problem = Problem.create(heads, spec)
    b, one_column = problem.b, jnp.ones_like(problem.b)
    design = _design_in_logarithms(asap, heads, problem)
    f = jnp.einsum("nif,nf->ni", design, asap.weights, precision="highest")
    g, teacher_g = column_potentials(problem, f), column_potentials(problem, teacher_f)
    plan, teacher = problem.scores.shift(f, g).exp(), problem.scores.shift(teacher_f, teacher_g).exp()
    row_sums = plan.times(one_column)
    brought = jax.vmap(plan.transpose_times, -1, -1)(design)
    products = functools.partial(jnp.einsum, precision="highest")
    return (
        _compared(teacher, f - teacher_f, g - teacher_g)[0],
        products("nif,ni->nf", design, row_sums - teacher.times(one_column)),
        products("nif,ni,nig->nfg", design, row_sums, design)
        - products("njf,nj,njg->nfg", brought, support.divide(jnp.ones_like(b), b), brought),
    )


# ---- reporting ----


@checked
def deviation(
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: Int[Array, "batch"] | None = None,
    k_lengths: Int[Array, "batch"] | None = None,
    dustbin_score: Float[Array, "heads"] | None = None,
    *,
    teacher: tuple[Float[Array, "batch heads all_rows"], Float[Array, "batch heads all_columns"]],
    student: tuple[Float[Array, "batch heads all_rows"], Float[Array, "batch heads all_columns"]],
) -> Deviation:
    """Of the plan with the student's (f, g) from the one with the teacher's, entry by entry over the band."""
    heads = cleaned(by_head(q, k, k, dustbin_score, q_lengths, k_lengths))
    potentials = [_flat(x, spec) for x in (*teacher, *student)]
    found = sinkhorn.by_group(functools.partial(_deviation, spec=spec), (heads, *potentials), spec)
    return Deviation(*(x.reshape(q.shape[0], -1) for x in found))


def _deviation(arguments, spec: SinkhornSpec) -> Deviation:
    heads, teacher_f, teacher_g, f, g = arguments
    problem = Problem.create(heads, spec)
    plan, teacher = problem.scores.shift(f, g).exp(), problem.scores.shift(teacher_f, teacher_g).exp()
    one_row, one_column = jnp.ones_like(f), jnp.ones_like(g)
    off = _relative(f, problem) - _relative(teacher_f, problem)
    rows = (problem.a > 0).sum(-1).astype(f.dtype)
    mass = teacher.times(one_column).sum(-1)
    return Deviation(
        jnp.sqrt(support.divide((off * off).sum(-1), rows)),
        jnp.abs(plan.times(one_column) - problem.a).max(-1),
        jnp.abs(plan.transpose_times(one_row) - problem.b).max(-1),
        *(support.divide(x, mass) for x in _compared(teacher, f - teacher_f, g - teacher_g)),
    )


def _compared(teacher: Kernel, f, g) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """`sum T log(T / P) - T + P` and `sum |T - P| / 2` for P = T exp(f + g); each entry of the first is at least 0."""
    change = teacher.map(jnp.zeros_like).shift(f, g)
    ones = jnp.ones_like(g)

    def total(function):
        return teacher.multiplied(change.map(function)).times(ones).sum(-1)

    return total(lambda d: jnp.expm1(d) - d), total(lambda d: jnp.abs(jnp.expm1(d)) / 2)
