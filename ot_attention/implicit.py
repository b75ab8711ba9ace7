"""Linear systems with a plan's marginals: Newton steps to a converged plan, and the exact gradient there.

With row and column sums a and b of a plan P both solve (contract, section 4)

    diag(a) x + P y = f_bar        P^T x + diag(b) y = g_bar

by conjugate gradients on the rows, `(diag(a) - P diag(1/b) P^T) x = f_bar - P (g_bar / b)`. They need products with P
and P^T only, which every implementation brings. In a narrow band without a dustbin mass moves W columns a step, so
smooth errors last about (L / W)^2 steps; a second level of hat functions every W / 2 along the diagonal takes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_attention.support import divide

# Hats that a hat can meet through the plan: theirs reach W / 2 to either side, the band W, their distance is W / 2.
_NEIGHBOURS = 3
_COLOURS = 2 * _NEIGHBOURS + 1
_MOST_HATS = 126  # beyond, the hats are spaced wider, and cost stays linear in the length
_LARGEST_CHANGE = 2.0  # of a potential in one Newton step


class Plan(NamedTuple):
    """Products with a plan over the augmented support, its marginals and dustbin, and hats over rows and columns."""

    times: Callable[[Array], Array]  # [N, all_columns] or [N, all_columns, m] -> the same of all_rows
    transpose_times: Callable[[Array], Array]  # [N, all_rows] -> [N, all_columns]
    row_sums: Float[Array, "N all_rows"]
    column_sums: Float[Array, "N all_columns"]
    bin_column: Float[Array, "N all_rows"]  # the plan's last column and row
    bin_row: Float[Array, "N all_columns"]
    hats: tuple[Float[Array, "N all_rows m"], Float[Array, "N all_columns m"]]


def hats(
    n_q: Int[Array, "N"], n_k: Int[Array, "N"], rows: int, columns: int, band: int | None, dtype: jnp.dtype
) -> tuple[Float[Array, "N all_rows m"], Float[Array, "N all_columns m"]]:
    """Piecewise linear functions of the position along the diagonal that sum to 1; m is a multiple of _COLOURS.

    The dustbin's entries are 0.
    """
    width = max(columns if band is None else band, 2) / 2
    number = min(int(columns / width) + 2, _MOST_HATS)
    number += -number % _COLOURS
    spacing = jnp.maximum(width, n_k[:, None] / (number - 1))

    def at(length, scaled):
        index = jnp.arange(length, dtype=dtype)
        position = jnp.where(index < scaled, (index + 0.5) * n_k[:, None] / jnp.maximum(scaled, 1), jnp.inf)
        heights = 1 - jnp.abs((position / spacing)[:, :, None] - jnp.arange(number, dtype=dtype))
        return jnp.pad(jnp.maximum(heights, 0), ((0, 0), (0, 1), (0, 0)))

    return at(rows, n_q[:, None]), at(columns, n_k[:, None])


def solve(
    plan: Plan, f_bar: Float[Array, "N all_rows"], g_bar: Float[Array, "N all_columns"], steps: int
) -> tuple[Float[Array, "N all_rows"], Float[Array, "N all_columns"]]:
    """x and y of the system above after so many steps of conjugate gradients.

    (x + c, y - c) is as good for any c. The system has a solution only if f_bar and g_bar have equal sums, as they have
    for anything that depends on f_i + g_j alone; what they differ by is taken off f_bar in proportion to a.
    """
    a, b = plan.row_sums, plan.column_sums
    # Potentials without support are constants: what is asked of them must not count in the sums.
    f_bar, g_bar = jnp.where(a > 0, f_bar, 0), jnp.where(b > 0, g_bar, 0)
    precondition = _preconditioner(plan)

    def without_constant(r):
        return r - a * divide(r.sum(-1, keepdims=True), a.sum(-1, keepdims=True))

    def step(_, carry):
        x, r, p, rz = carry
        product = a * p - plan.times(divide(plan.transpose_times(p), b))
        curvature = _dot(p, product)
        # Below rounding there is nothing left to gain, and a quotient of two roundings would do harm.
        alpha = jnp.where(curvature > 8 * jnp.finfo(r.dtype).eps * _dot(p, a * p), divide(rz, curvature), 0)
        x, r = x + alpha * p, without_constant(r - alpha * product)
        z = precondition(r)
        rz, old = _dot(r, z), rz
        return x, r, z + jnp.where(alpha > 0, divide(rz, old), 0) * p, rz

    r = without_constant(f_bar - plan.times(divide(g_bar, b)))
    z = precondition(r)
    x, *_ = jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(r), r, z, _dot(r, z)))
    return x, divide(g_bar - plan.transpose_times(x), b)


def newton_correction(plan: Plan, a: Float[Array, "N all_rows"], steps: int) -> Float[Array, "N all_columns"]:
    """What a Newton step towards row sums a adds to g, for a plan whose column sums are met already."""
    x, y = solve(plan, a - plan.row_sums, jnp.zeros_like(plan.column_sums), steps)
    centre = divide(_dot(a, x), a.sum(-1, keepdims=True))
    x, y = jnp.where(a > 0, x - centre, 0), jnp.where(plan.column_sums > 0, y + centre, 0)
    largest = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.abs(y).max(-1, keepdims=True))
    correction = y * _LARGEST_CHANGE / jnp.maximum(largest, _LARGEST_CHANGE)
    return jnp.where(jnp.isfinite(largest), correction, 0)


def _preconditioner(plan: Plan) -> Callable[[Array], Array]:
    """`diag(1/a) + Z C^-1 Z^T`, Z the hats over rows and the dustbin's row.

    C is the Schur complement of the whole system seen through hats on both sides. That takes one product of P with a
    few columns: hats that are too far apart to meet share one.
    """
    a, b, (row_hats, column_hats) = plan.row_sums, plan.column_sums, plan.hats
    number = row_hats.shape[-1]
    colours = column_hats.reshape(*column_hats.shape[:2], -1, _COLOURS).sum(2)
    seen = plan.times(colours)
    met = jnp.tile(jnp.einsum("nim,nik->nmk", row_hats, seen), (1, 1, number // _COLOURS))
    index = jnp.arange(number)
    met = jnp.where(jnp.abs(index[:, None] - index) <= _NEIGHBOURS, met, 0)
    of_column = jnp.einsum("nim,ni->nm", row_hats, plan.bin_column)
    of_row = jnp.einsum("njm,nj->nm", column_hats, plan.bin_row)
    corner = plan.bin_row[:, -1:, None]
    met = jnp.concatenate([met, of_column[..., None]], -1)
    coarse = jnp.concatenate([met, jnp.concatenate([of_row[:, None], corner], -1)], 1)
    row_hats, column_hats = (_with_dustbin_hat(x) for x in (row_hats, column_hats))
    row_mass, column_mass = (jnp.einsum("nim,ni,nik->nmk", x, s, x) for x, s in ((row_hats, a), (column_hats, b)))
    schur = row_mass - coarse @ _inverse(column_mass) @ coarse.swapaxes(1, 2)
    # The constant is in the kernel of the exact system; any positive weight there leaves solutions as they are.
    diagonal = jnp.diagonal(row_mass, axis1=1, axis2=2)
    inverse = _inverse(schur + divide(diagonal[:, :, None] * diagonal[:, None], diagonal.sum(-1)[:, None, None]))
    inverse = jnp.where(jnp.isfinite(inverse).all((1, 2), keepdims=True), inverse, 0)

    def precondition(r):
        coarse = jnp.einsum("nmk,nk->nm", inverse, jnp.einsum("nim,ni->nm", row_hats, r))
        return divide(r, a) + jnp.where(a > 0, jnp.einsum("nim,nm->ni", row_hats, coarse), 0)

    return precondition


def _inverse(x: Float[Array, "N m m"]) -> Float[Array, "N m m"]:
    """Of a symmetric matrix; hats that nothing lies under (diagonal 0) are left alone."""
    diagonal = jnp.diagonal(x, axis1=1, axis2=2)
    ridge = 8 * jnp.finfo(x.dtype).eps * diagonal + (diagonal == 0)
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    factor = jnp.linalg.cholesky(x + ridge[..., None] * eye)
    half = jax.lax.linalg.triangular_solve(factor, jnp.broadcast_to(eye, x.shape), left_side=True, lower=True)
    return half.swapaxes(1, 2) @ half


def _dot(x: Float[Array, "N length"], y: Float[Array, "N length"]) -> Float[Array, "N 1"]:
    return (x * y).sum(-1, keepdims=True)


def _with_dustbin_hat(hats: Float[Array, "N all m"]) -> Float[Array, "N all m+1"]:
    """One more hat, over the dustbin alone."""
    return jnp.pad(hats, ((0, 0), (0, 0), (0, 1))).at[:, -1, -1].set(1)
