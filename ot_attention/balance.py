"""Plans of given scores, for many matrices at once: doubly stochastic mixing, routing, matching."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer, Num

from ot_attention import dense, support
from ot_attention.api import DTYPES, as_array, as_lengths, as_weights
from ot_attention.spec import SinkhornInfo, SinkhornSpec, nan_unless


@support.promoting
def balance(
    scores: Float[ArrayLike, "... rows columns"],
    spec: SinkhornSpec,
    row_lengths: Integer[ArrayLike, "..."] | None = None,
    column_lengths: Integer[ArrayLike, "..."] | None = None,
    row_weights: Num[ArrayLike, "... rows"] | None = None,
    column_weights: Num[ArrayLike, "... columns"] | None = None,
    dustbin_score: Num[ArrayLike, "..."] | None = None,
) -> tuple[Float[Array, "... plan_rows plan_columns"], SinkhornInfo]:
    """Return the transport plans of given scores, and potentials, residual and steps (docs/math.md, sections 1 to 6).

    Scores are logarithms of weights, already divided by the temperature: `spec.epsilon` is not applied. Their support
    is where they are above minus infinity, within the lengths; `spec.band` is not applied either. Rows and columns
    without support have sums, plan and gradients 0, and do not count. NaN and plus infinity in the support make their
    own matrix NaN; anything may stand behind the lengths. The plan is `exp(scores + f + g)`, float32, or float64 for
    float64 scores, with one more row and column for the dustbin.

    The solver, the relaxation and the gradients of plan, f and g by scores, weights and dustbin score are the spec's.
    Forward mode and second derivatives work with each.

    All leading axes are a batch: thousands of small matrices in one call are faster than under `jax.vmap`. Each takes
    its own number of steps under `spec.tolerance`, and its own care where its scores are sharp.

    row_lengths, column_lengths: numbers of rows and columns that are not padding; they fit the leading axes.
    row_weights, column_weights: sums that rows and columns must have, positive; they fit the leading axes and the
        rows or columns. By default rows have 1, and columns rows / columns or, with a dustbin, 1. Without a dustbin and
        unless relaxed, weights of columns are scaled to the sum of the rows'.
    dustbin_score: required if and only if `spec.dustbin` is not "none"; it fits the leading axes.

    Raises ValueError for shapes, dtypes, lengths or weights that do not fit, naming the argument. Inside `jit` lengths
    are clipped, and weights that are not finite and above 0 make their matrix NaN.
    """
    array = _scores(scores)
    if not isinstance(spec, SinkhornSpec):
        raise ValueError(f"spec={spec!r} must be a SinkhornSpec")
    *leading, rows, columns = array.shape
    n_rows = _lengths("row_lengths", row_lengths, leading, rows)
    n_columns = _lengths("column_lengths", column_lengths, leading, columns)
    weights = (
        _weights("row_weights", row_weights, leading, rows, n_rows),
        _weights("column_weights", column_weights, leading, columns, n_columns),
    )
    score = _dustbin_score(dustbin_score, spec, leading)
    spec = dataclasses.replace(spec.settled(), epsilon=1.0)
    plan, info = _balanced(array.reshape(-1, rows, columns), n_rows, n_columns, weights, score, spec)
    return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), (plan, info))


# Compiled also because what is masked must not alarm `jax_debug_nans`, which looks at results outside `jit`.
@functools.partial(jax.jit, static_argnames="spec")
def _balanced(scores, n_rows, n_columns, weights, score, spec: SinkhornSpec) -> tuple[Array, SinkhornInfo]:
    problem = _problem(scores, n_rows, n_columns, weights, score, spec)
    plan, f, g, residual, steps = dense.solve(problem, spec)
    return plan, SinkhornInfo(f, g, residual, steps)


def _problem(scores, n_rows, n_columns, weights, score, spec: SinkhornSpec) -> tuple[Array, Array, Array]:
    """Return scores, minus infinity outside the support, and targets, all with the dustbin last if there is one."""
    dtype = support.potential_dtype(scores)
    rows, columns = (jnp.arange(n) < m[:, None] for n, m in zip(scores.shape[1:], (n_rows, n_columns), strict=True))
    scores = jnp.where(rows[:, :, None] & columns[:, None], scores.astype(dtype), -jnp.inf)
    for given, real in zip(weights, (rows, columns), strict=True):
        if given is not None:
            right = (~real | ((given > 0) & (given < jnp.inf))).all(-1)
            scores += nan_unless(right, dtype)[:, None, None]
    exists = support.dustbin_exists(n_rows, n_columns, spec.dustbin)[:, None]
    is_supported = scores != -jnp.inf  # so is NaN
    supported = rows & (is_supported.any(2) | exists), columns & (is_supported.any(1) | exists)
    a, b = (
        jnp.where(real, 1 if given is None else given.astype(dtype), jnp.zeros((), dtype))
        for real, given in zip(supported, weights, strict=True)
    )
    row_mass, column_mass = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    if spec.dustbin == "none":
        number = supported[0].sum(-1, keepdims=True).astype(dtype)
        return (
            scores,
            a,
            b * support.column_scale(row_mass, column_mass, number, weights[1] is not None, spec.is_relaxed),
        )
    row_bin, column_bin = support.dustbin_targets(row_mass, column_mass, spec.dustbin)
    a, b = jnp.concatenate([a, row_bin * exists], -1), jnp.concatenate([b, column_bin * exists], -1)
    bins = jnp.where(exists, score[:, None].astype(dtype), -jnp.inf)
    column, row = (jnp.where(real, bins, -jnp.inf) for real in (rows, columns))
    corner = jnp.where(exists, jnp.zeros((), dtype), -jnp.inf)
    scores = jnp.concatenate([scores, column[:, :, None]], 2)
    return jnp.concatenate([scores, jnp.concatenate([row, corner], -1)[:, None]], 1), a, b


def _scores(x: Any) -> Float[Array, "... rows columns"]:
    x = as_array("scores", x)
    if len(x.shape) < 2 or 0 in x.shape:
        raise ValueError(f"scores has shape {x.shape}; it must be [..., rows, columns], none of them 0")
    if x.dtype not in DTYPES:
        raise ValueError(f"scores has dtype {x.dtype}; it must be one of {', '.join(DTYPES)}")
    return jnp.asarray(x)


def _fitting(name: str, x: Any, leading: list, *length: int) -> Any:
    """Return an argument `[N, *length]`, from one that fits the leading axes. Raises ValueError."""
    x, shape = as_array(name, x), (*leading, *length)
    try:
        fits = np.broadcast_shapes(x.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has shape {x.shape}, which does not fit {shape}: the leading axes of scores{length}")
    library = np if isinstance(x, np.ndarray) else jnp
    return library.broadcast_to(x, shape).reshape(-1, *length)


def _lengths(name: str, lengths: Any, leading: list, longest: int) -> Int[Array, "N"]:
    number = int(np.prod(leading))
    return as_lengths(name, None if lengths is None else _fitting(name, lengths, leading), longest, number)


def _weights(
    name: str, weights: Any, leading: list, length: int, n: Int[Array, "N"]
) -> Float[Array, "N length"] | None:
    if weights is None:
        return None
    weights = _fitting(name, weights, leading, length)
    return as_weights(name, weights, weights.shape, n)


def _dustbin_score(score: Any, spec: SinkhornSpec, leading: list) -> Float[Array, "N"] | None:
    if (score is None) != (spec.dustbin == "none"):
        given = "missing" if score is None else "given"
        raise ValueError(f"dustbin_score is {given}, but spec.dustbin={spec.dustbin!r}: give a score or use 'none'")
    if score is None:
        return None
    score = _fitting("dustbin_score", score, leading)
    is_integer = jnp.issubdtype(score.dtype, jnp.integer)
    if score.dtype not in DTYPES and not is_integer:
        raise ValueError(f"dustbin_score has dtype {score.dtype}; it must be one of {', '.join(DTYPES)}")
    return jnp.asarray(score, jnp.float32 if is_integer else None)
