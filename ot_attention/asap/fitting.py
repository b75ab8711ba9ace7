"""Fit ASAP's map to the potentials of a frozen layer, and measure how far a plan is from the layer's."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ot_attention import sinkhorn, support
from ot_attention.api import Checked
from ot_attention.asap.maps import Asap, Sample, check_fixed, design, einsum, relative
from ot_attention.kernel import Kernel
from ot_attention.problem import Problem, column_potentials
from ot_attention.spec import AllRows, Heads, LengthsLike, ScoreLike, SinkhornSpec, integer, not_negative


class Deviation(NamedTuple):
    """Distances of a plan P from a teacher's T. `divergence` and `variation` are relative to T's mass."""

    f: Float[Array, "batch heads"]  # root mean square over rows, in nats, relative to the mean over residues
    rows: Float[Array, "batch heads"]  # largest absolute deviation of a row sum from its target
    columns: Float[Array, "batch heads"]  # largest absolute deviation of a column sum from its target
    divergence: Float[Array, "batch heads"]  # sum T log(T / P) - T + P
    variation: Float[Array, "batch heads"]  # sum |T - P| / 2


@support.promoting
def fit(
    asap: Asap, samples: Sequence[Sample], spec: SinkhornSpec, *, ridge: ArrayLike = 1e-3, newton_steps: ArrayLike = 0
) -> Asap:
    """Return the map with weights that predict the teacher's f. Runs on the XLA backend on every device.

    Ridge regression on f comes first. Newton steps then decrease KL(teacher's plan, one-sided plan), which is convex in
    the weights. The one-sided plan is made of the predicted f and one half step for g (docs/math.md, section 10).

    asap gives the features and directions; its weights are not read. `spec` is the layer's. `ridge` is for features
    scaled to a mean square of 1. A Newton step costs a product over the band for every feature.
    Raises ValueError: no samples, ridge below 0, newton_steps below 0, and as `apply` does.
    """
    check_fixed(spec)
    if not samples:
        raise ValueError("0 samples: give at least one")
    ridge, newton_steps = not_negative("ridge", ridge), integer("newton_steps", newton_steps, 0)
    samples = [jax.tree.map(jnp.asarray, sample, is_leaf=lambda x: isinstance(x, list)) for sample in samples]
    gram, moment = _summed(_moments, asap, samples, spec)
    best = _solved(gram, moment, ridge)
    weights, step, lowest = best, np.zeros_like(best), np.full(len(best), np.inf)
    for _ in range(newton_steps and newton_steps + 1):
        value, gradient, hessian = _summed(_divergence, _with_weights(asap, weights), samples, spec)
        better = value < lowest
        best, lowest = np.where(better[:, None], weights, best), np.where(better, value, lowest)
        step = np.where(better[:, None], -_solved(hessian, gradient, ridge), step / 2)
        weights = best + step
    return _with_weights(asap, best)


def _with_weights(asap: Asap, weights: np.ndarray) -> Asap:
    return dataclasses.replace(asap, weights=jnp.asarray(weights, jnp.float32))


def _solved(matrix: np.ndarray, vector: np.ndarray, ridge: float) -> np.ndarray:
    """Compute `(M + ridge diag M)^-1 v` of every head; 0 for features that are 0 in all samples."""
    scale = np.sqrt(np.maximum(np.einsum("hii->hi", matrix), 0))
    scale = np.where(scale > 1e-6 * scale.max(-1, keepdims=True), scale, np.inf)
    eye = np.eye(matrix.shape[-1])
    scaled = matrix / (scale[:, :, None] * scale[:, None]) + (ridge + 1e-12) * eye + np.isinf(scale)[:, None] * eye
    return np.linalg.solve(scaled, (vector / scale)[..., None])[..., 0] / scale


def _summed(function, asap: Asap, samples: Sequence[Sample], spec: SinkhornSpec) -> list[np.ndarray]:
    """Sum a function's results for every head over samples and their problems, in float64."""
    parts = (_of_sample(asap, sample, function, spec) for sample in samples)
    return [np.sum([np.asarray(x, np.float64).sum(0) for x in of], 0) for of in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnames=("function", "spec"))
def _of_sample(asap: Asap, sample: Sample, function, spec: SinkhornSpec):
    checked = Checked.create(sample.q, sample.k, None, spec, *sample[2:5])
    asap.check(checked)
    return checked.of_every_head(_grouped, function, layers=asap, examples=sample.f)


def _grouped(heads: Heads, spec: SinkhornSpec, asap: Asap, f: AllRows, function):
    heads = support.cleaned(heads)
    arguments = heads, asap.in_dtype_of(heads), by_problem(f, spec)
    return sinkhorn.by_group(functools.partial(function, spec=spec), arguments, spec)


def _moments(arguments: tuple[Heads, Asap, Array], spec: SinkhornSpec) -> tuple[Array, Array]:
    """Compute `X^T X` and `X^T f` of the design X."""
    heads, asap, f = arguments
    problem = Problem.create(heads, spec)
    x = design(asap, heads, problem)
    return einsum("nif,nig->nfg", x, x), einsum("nif,ni->nf", x, relative(f, problem))


def _divergence(arguments: tuple[Heads, Asap, Array], spec: SinkhornSpec) -> tuple[Array, Array, Array]:
    """Compute KL(teacher's plan, one-sided plan), gradient and Hessian in the weights (docs/math.md, section 10)."""
    heads, asap, teacher_f = arguments
    problem = Problem.create(heads, spec)
    b, one_column = problem.b, jnp.ones_like(problem.b)
    x = design(asap, heads, problem)
    f = einsum("nif,nf->ni", x, asap.weights)
    g, teacher_g = column_potentials(problem, f), column_potentials(problem, teacher_f)
    plan, teacher = problem.scores.shift(f, g).exp(), problem.scores.shift(teacher_f, teacher_g).exp()
    row_sums, column_means = plan.times(one_column), jax.vmap(plan.transpose_times, -1, -1)(x)
    return (
        compare(teacher, f - teacher_f, g - teacher_g)[0],
        einsum("nif,ni->nf", x, row_sums - teacher.times(one_column)),
        einsum("nif,ni,nig->nfg", x, row_sums, x)
        - einsum("njf,nj,njg->nfg", column_means, support.divide(jnp.ones_like(b), b), column_means),
    )


@support.promoting
def deviation(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    *,
    teacher: tuple[Float[Array, "batch heads all_rows"], Float[Array, "batch heads all_columns"]],
    student: tuple[Float[Array, "batch heads all_rows"], Float[Array, "batch heads all_columns"]],
) -> Deviation:
    """Measure how far the plan with the student's (f, g) is from the teacher's, entry by entry over the band.

    Raises as `sinkhorn_attention` does.
    """
    checked = Checked.create(q, k, None, spec, q_lengths, k_lengths, dustbin_score)
    return checked.of_every_head(_deviation, examples=(*teacher, *student))


def by_problem(potential: Float[Array, "N length"], spec: SinkhornSpec) -> Float[Array, "N all"]:
    """Append the dustbin's entry if there is none."""
    return support.with_dustbin(potential) if spec.dustbin == "none" else potential


def _deviation(heads: Heads, spec: SinkhornSpec, potentials: tuple[Array, ...]) -> Deviation:
    arguments = support.cleaned(heads), *(by_problem(x, spec) for x in potentials)
    return sinkhorn.by_group(functools.partial(_deviation_of_group, spec=spec), arguments, spec)


def _deviation_of_group(arguments, spec: SinkhornSpec) -> Deviation:
    heads, teacher_f, teacher_g, f, g = arguments
    problem = Problem.create(heads, spec)
    plan, teacher = problem.scores.shift(f, g).exp(), problem.scores.shift(teacher_f, teacher_g).exp()
    one_row, one_column = jnp.ones_like(f), jnp.ones_like(g)
    off = relative(f, problem) - relative(teacher_f, problem)
    rows = (problem.a > 0).sum(-1).astype(f.dtype)
    mass = teacher.times(one_column).sum(-1)
    return Deviation(
        jnp.sqrt(support.divide((off * off).sum(-1), rows)),
        jnp.abs(plan.times(one_column) - problem.a).max(-1),
        jnp.abs(plan.transpose_times(one_row) - problem.b).max(-1),
        *(support.divide(x, mass) for x in compare(teacher, f - teacher_f, g - teacher_g)),
    )


def compare(teacher: Kernel, f, g) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Compute `sum T log(T / P) - T + P` and `sum |T - P| / 2` for `P = T exp(f + g)`.

    Entry by entry, so that no term of the divergence is below 0.
    """
    change = teacher.map(jnp.zeros_like).shift(f, g)
    ones = jnp.ones_like(g)

    def total(function):
        return teacher.multiplied(change.map(function)).times(ones).sum(-1)

    return total(lambda d: jnp.expm1(d) - d), total(lambda d: jnp.abs(jnp.expm1(d)) / 2)
