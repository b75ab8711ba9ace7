"""Exact potentials of one-dimensional optimal transport: the features of ASAP (docs/math.md, section 10)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention import support

_TIE = 1e-6  # of the total mass; partial sums of masses that differ by less are taken as equal
_KEY_BITS = 24  # as many as float32 holds


def kantorovich(
    x: Float[Array, "n_x"], y: Float[Array, "n_y"], a: Float[Array, "n_x"], b: Float[Array, "n_y"]
) -> tuple[Float[Array, "n_x"], Float[Array, "n_y"]]:
    """Compute exact optimal duals of transport on the line, cost `(x_i - y_j)^2`, in O(n log n).

    `f_i + g_j <= (x_i - y_j)^2`, and `sum a f + sum b g` is the optimal cost. Duals are not unique where partial sums
    of a and b meet: returned is the mean of the row-first and the column-first staircase. Points of mass 0 are padding,
    whatever their values, and have potential 0. Points closer than 2^-24 of the range (or n / 2^32, if that is more)
    may be taken in another order. Masses a and b are scaled to a sum of 1.
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
    """Return the order of the values and the sorted values. Padding is last and repeats the largest value.

    Value and place share one integer: XLA's CPU backend sorts integers 7 times as fast as floats with their places.
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
    """Find the points of the other side in which the mass up to each point ends, and in which the next mass begins."""
    ends = jnp.searchsorted(others, sums - _TIE, side="left"), jnp.searchsorted(others, sums + _TIE, side="right")
    before, after = (jnp.clip(x, 0, number - 1).astype(jnp.int32) for x in ends)
    return before, after


def _along_staircase(x: Float[Array, "n"], y: Float[Array, "m"], before, after) -> Float[Array, "n"]:
    """Compute potentials of sorted x, 0 at the first. From x to x' at y the cost rises by (x' - x)(x' + x - 2 y)."""
    rise = (x[1:] - x[:-1]) * (x[1:] + x[:-1] - y[before[:-1]] - y[after[:-1]])
    return jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(rise)])


def uniform(x: Float[Array, "n"], y: Float[Array, "m"], n_x, n_y, before, after) -> Float[Array, "n"]:
    """Compute f of `kantorovich` for the first n_x and n_y points, all of one mass, from `uniform_staircase`."""
    order, x = _sorted(x, jnp.arange(x.shape[0]) < n_x)
    _, y = _sorted(y, jnp.arange(y.shape[0]) < n_y)
    return _unsorted(_along_staircase(x, y, before, after), order)


def uniform_staircase(n_x, n_y, length: int) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """Compute `_where_met` for uniform masses, in integers: the numbers of points decide it."""
    unit, last = jnp.maximum(n_x, 1), jnp.maximum(n_y - 1, 0)
    points = jnp.minimum(jnp.arange(1, length + 1, dtype=jnp.int32), unit)  # padding repeats the last
    after, rest = support.divided_product(points, n_y, unit)
    return jnp.clip(after + (rest > 0) - 1, 0, last), jnp.clip(after, 0, last)
