"""Plans from queries, keys and log-potentials, `log P_ij = S_ij + f_i + g_j`: dense, at chosen columns, or by windows.

Scores are products in the dtype and at the precision in which the potentials were solved for.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention import support
from ot_attention.api import as_lengths
from ot_attention.spec import LengthsLike, Rows, SinkhornSpec

_ROWS = 32  # of a banded plan, made at a time

Queries = Float[Array, "N rows width"]
Keys = Float[Array, "N columns width"]
Lengths = tuple[LengthsLike, LengthsLike]


class Potentials(NamedTuple):
    """Log-potentials of rows and columns; entries beyond the length, as the dustbin's, are ignored."""

    f: Float[Array, "N _"]
    g: Float[Array, "N _"]


class BandedPlan(NamedTuple):
    """Plan by the windows of its band: `values[n, i, c]` is P_ij for j = first[n, i] + c, 0 outside the support."""

    values: Float[Array, "N rows window"]
    first: Int[Array, "N rows"]


def _windows(q: Queries, k: Keys, lengths: Lengths, spec: SinkhornSpec):
    """Return the first and the last column in the support of each row, `[N, rows]`."""
    number, rows, _ = q.shape
    n_q, n_k = (as_lengths("lengths", n, x.shape[1], number) for n, x in zip(lengths, (q, k), strict=True))
    index = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (number, rows))
    return support.row_windows(index, n_q, n_k, spec.band)


def _within(windows, columns: Int[Array, "#N #rows _"]) -> Bool[Array, "N rows _"]:
    first, last = windows
    return (first[..., None] <= columns) & (columns <= last[..., None])


def _scores(q: Queries, k: Keys, spec: SinkhornSpec):
    q, k = (x.astype(support.potential_dtype(q, k)) for x in (q, k))
    return _divided(jnp.einsum("nid,njd->nij", q, k, precision="highest"), q, spec)


def _divided(products: Array, q: Queries, spec: SinkhornSpec):
    """Return scores of products; a learned temperature gets the products' dtype."""
    epsilon = spec.epsilon if isinstance(spec.epsilon, float) else spec.epsilon.astype(products.dtype)
    return products / (math.sqrt(q.shape[-1]) * epsilon)


@support.promoting
def log_plan(
    q: Queries, k: Keys, potentials: Potentials, lengths: Lengths, spec: SinkhornSpec
) -> Float[Array, "N rows columns"]:
    """Return `log P_ij`, dense, minus infinity outside the support."""
    f, g = potentials.f[:, : q.shape[1], None], potentials.g[:, None, : k.shape[1]]
    inside = _within(_windows(q, k, lengths, spec), jnp.arange(k.shape[1])[None, None])
    # The inner `where` keeps gradients finite.
    return jnp.where(inside, jnp.where(inside, _scores(q, k, spec) + f + g, 0), -jnp.inf)


@support.promoting
def log_plan_at(
    target: Int[Array, "N rows"], q: Queries, k: Keys, potentials: Potentials, lengths: Lengths, spec: SinkhornSpec
) -> Rows:
    """Return `log P_i,target(i)`, minus infinity outside the support and for negative targets."""
    column = jnp.maximum(target, 0)
    windows = _windows(q, k, lengths, spec)
    q, k = (x.astype(support.potential_dtype(q, k)) for x in (q, jnp.take_along_axis(k, column[..., None], axis=1)))
    score = _divided((q * k).sum(-1), q, spec)
    f, g = potentials.f[:, : q.shape[1]], jnp.take_along_axis(potentials.g, column, axis=1)
    inside = (target >= 0) & _within(windows, column[..., None])[..., 0]
    return jnp.where(inside, jnp.where(inside, score + f + g, 0), -jnp.inf)


@support.promoting
def banded_plan(q: Queries, k: Keys, potentials: Potentials, lengths: Lengths, spec: SinkhornSpec) -> BandedPlan:
    """Return the plan by windows of `2 band + 1` columns; only a few rows at a time are dense."""
    rows, columns = q.shape[1], k.shape[1]
    windows = _windows(q, k, lengths, spec)
    window = jnp.arange(columns if spec.band is None else min(2 * spec.band + 1, columns))

    def some_rows(part):
        q, f, windows = part
        place = windows[0][..., None] + window
        log_plan = _scores(q, k, spec) + potentials.g[:, None, :columns]
        log_plan = jnp.take_along_axis(log_plan, jnp.minimum(place, columns - 1), axis=2) + f[..., None]
        return jnp.where(_within(windows, place), jnp.exp(log_plan), 0)

    step = math.gcd(rows, _ROWS)
    given = q, potentials.f[:, :rows], windows
    parts = jax.tree.map(lambda x: x.reshape(len(q), -1, step, *x.shape[2:]).swapaxes(0, 1), given)
    values = jax.lax.map(some_rows, parts).swapaxes(0, 1)
    return BandedPlan(values.reshape(len(q), rows, -1), windows[0])
