"""Linear systems with a plan's marginals, for Newton steps and implicit gradients (docs/math.md, sections 5 and 6).

In a narrow band without a dustbin mass moves W columns a step, so that smooth errors last about (L / W)^2 steps. A
coarse-grid correction (Nicolaides 1987, deflation) takes them, in a basis of hat functions every W / 2 on the diagonal.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from ot_attention.axes import ALONE, SequenceAxis
from ot_attention.spec import AllColumns, AllRows, Lengths, Size
from ot_attention.support import divide

# A hat reaches W / 2 to either side, the band reaches W, and hats are W / 2 apart: the plan connects a hat with this
# many hats on each side.
_NEIGHBOURS = 3
_COLOURS = 2 * _NEIGHBOURS + 1
_MOST_HATS = 126  # longer sequences have wider hats, so that cost stays linear in the length
_LARGEST_CHANGE = 2.0  # of a potential in one Newton step
Basis = tuple[Float[Array, "N all_rows m"], Float[Array, "N all_columns m"]]


class Plan(NamedTuple):
    """Products with a plan over the augmented support, its marginals and dustbin, and the coarse basis."""

    times: Callable[[Array], Array]  # [N, all_columns] or [N, all_columns, m] -> the same of all_rows
    transpose_times: Callable[[Array], Array]  # [N, all_rows] -> [N, all_columns]
    row_sums: AllRows
    column_sums: AllColumns
    row_diagonal: AllRows  # the sums, divided by tau_a and tau_b
    column_diagonal: AllColumns
    bin_column: AllRows  # the plan's last column and row
    bin_row: AllColumns
    coarse_basis: Basis | None  # none where rows and columns have no order
    has_gauge: bool  # whether (f + c, g - c) has the same plan for any c: not where marginals are relaxed
    axis: SequenceAxis = ALONE  # of devices that share the rows and columns


def coarse_basis(
    n_q: Lengths,
    n_k: Lengths,
    rows: Size,
    columns: Size,
    band: int | None,
    dtype: jnp.dtype,
    axis: SequenceAxis = ALONE,
) -> Basis:
    """Return hat functions of the position along the diagonal that sum to 1, 0 at the dustbin.

    Their number m is a multiple of `_COLOURS`.
    """
    all_columns = columns * axis.size
    if band is None:
        width, number = jax.core.max_dim(all_columns, 2) / 2, 4
    else:
        width = max(band, 2) / 2
        # The largest number serves a length that is a symbol of `jax.export`.
        number = _MOST_HATS if is_symbolic_dim(columns) else min(int(all_columns / width) + 2, _MOST_HATS)
    number += -number % _COLOURS
    spacing = jnp.maximum(width, n_k[:, None] / (number - 1))

    def at(length, scaled):
        index = (axis.start(length) + jnp.arange(length)).astype(dtype)
        position = jnp.where(index < scaled, (index + 0.5) * n_k[:, None] / jnp.maximum(scaled, 1), jnp.inf)
        heights = 1 - jnp.abs((position / spacing)[:, :, None] - jnp.arange(number, dtype=dtype))
        return jnp.pad(jnp.maximum(heights, 0), ((0, 0), (0, 1), (0, 0)))

    return at(rows, n_q[:, None]), at(columns, n_k[:, None])


def solve(plan: Plan, f_bar: AllRows, g_bar: AllColumns, steps: int) -> tuple[AllRows, AllColumns]:
    """Solve the system for x and y by `steps` conjugate gradient steps; differentiable any number of times.

    With a gauge (x + c, y - c) is a solution too for any c: returned is the one whose x has the mean 0, weighted with
    a. Solutions then exist only if f_bar and g_bar have equal sums, as the cotangents of functions of f_i + g_j have; a
    difference is subtracted from f_bar in proportion to a. Both together make the solution a symmetric function of the
    right side.
    """
    a, b = plan.row_diagonal, plan.column_diagonal
    if plan.has_gauge:  # the sums of a converged plan do not change with the scores
        a, b = jax.lax.stop_gradient((a, b))

    def product(solution):
        x, y = solution
        return a * x + plan.times(y), plan.transpose_times(x) + b * y

    def solution(_, right_side):
        x, y = _conjugate_gradients(plan, *right_side, steps)
        return _centred(a, b, x, y, plan.axis) if plan.has_gauge else (x, y)

    # Derivatives are further systems of the same matrix: steps of conjugate gradients have useless ones.
    return jax.lax.custom_linear_solve(product, (f_bar, g_bar), solution, symmetric=True)


def _centred(a: AllRows, b: AllColumns, x: AllRows, y: AllColumns, axis: SequenceAxis) -> tuple[AllRows, AllColumns]:
    """Return the solution whose x has the mean 0, weighted with a."""
    centre = divide(axis.total(a * x), axis.total(a))
    return jnp.where(a > 0, x - centre, 0), jnp.where(b > 0, y + centre, 0)


def _conjugate_gradients(plan: Plan, f_bar: AllRows, g_bar: AllColumns, steps: int) -> tuple[AllRows, AllColumns]:
    a, b, total = plan.row_diagonal, plan.column_diagonal, plan.axis.total
    # Potentials without support are constants: their cotangents must not count in the sums.
    f_bar, g_bar = jnp.where(a > 0, f_bar, 0), jnp.where(b > 0, g_bar, 0)
    precondition = _preconditioner(plan)

    def without_constant(r):
        return r if not plan.has_gauge else r - a * divide(total(r), total(a))

    def step(_, carry):
        x, r, p, rz = carry
        product = a * p - plan.times(divide(plan.transpose_times(p), b))
        curvature = total(p * product)
        # A curvature below rounding would make alpha a quotient of two rounding errors.
        alpha = jnp.where(curvature > 8 * jnp.finfo(r.dtype).eps * total(p * (a * p)), divide(rz, curvature), 0)
        x, r = x + alpha * p, without_constant(r - alpha * product)
        z = precondition(r)
        rz, old = total(r * z), rz
        return x, r, z + jnp.where(alpha > 0, divide(rz, old), 0) * p, rz

    r = without_constant(f_bar - plan.times(divide(g_bar, b)))
    z = precondition(r)
    x, *_ = jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(r), r, z, total(r * z)))
    return x, divide(g_bar - plan.transpose_times(x), b)


def newton_correction(plan: Plan, a: AllRows, steps: int) -> AllColumns:
    """Return the change of g in a Newton step towards row sums a. Assumes that the last half step was to g."""
    x, y = _conjugate_gradients(plan, a - plan.row_sums, jnp.zeros_like(plan.column_sums), steps)
    if plan.has_gauge:
        x, y = _centred(a, plan.column_sums, x, y, plan.axis)
    largest = plan.axis.max(jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.abs(y).max(-1, keepdims=True)))
    correction = y * _LARGEST_CHANGE / jnp.maximum(largest, _LARGEST_CHANGE)
    return jnp.where(jnp.isfinite(largest), correction, 0)


def _preconditioner(plan: Plan) -> Callable[[Array], Array]:
    """Return the preconditioner `diag(1/a) + Z C^-1 Z^T` (docs/math.md, section 5)."""
    if plan.coarse_basis is None:
        return lambda r: divide(r, plan.row_diagonal)
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, 1))) for x in plan.coarse_basis)
    a, (row_basis, column_basis) = plan.row_diagonal, (x.at[:, -1, -1].set(1) for x in padded)
    inverse = _coarse_inverse(plan, row_basis, column_basis)

    def precondition(r):
        met = plan.axis.sum(jnp.einsum("nim,ni->nm", row_basis, plan.axis.once(r)))
        coarse = jnp.einsum("nmk,nk->nm", inverse, met)
        return divide(r, a) + jnp.where(a > 0, jnp.einsum("nim,nm->ni", row_basis, coarse), 0)

    return precondition


def _coarse_inverse(plan: Plan, row_basis, column_basis) -> Float[Array, "N m+1 m+1"]:
    """Return the inverse of the Schur complement in the basis, 0 where it is not finite."""
    a_mass, b_mass = (
        plan.axis.sum(jnp.einsum("nim,ni,nik->nmk", basis, plan.axis.once(diagonal), basis))
        for basis, diagonal in ((row_basis, plan.row_diagonal), (column_basis, plan.column_diagonal))
    )
    coarse_plan = _coarse_plan(plan)
    schur = a_mass - coarse_plan @ _inverse(b_mass) @ coarse_plan.swapaxes(1, 2)
    if plan.has_gauge:
        # The constant is in the kernel of the exact system: any positive weight there leaves solutions unchanged.
        diagonal = jnp.diagonal(a_mass, axis1=1, axis2=2)
        schur += divide(diagonal[:, :, None] * diagonal[:, None], diagonal.sum(-1)[:, None, None])
    inverse = _inverse(schur)
    return jnp.where(jnp.isfinite(inverse).all((1, 2), keepdims=True), inverse, 0)


def _coarse_plan(plan: Plan) -> Float[Array, "N m+1 m+1"]:
    """Return `Z^T P Z` with the dustbin's row and column last.

    It takes one product of P with `_COLOURS` columns: hats that no hat meets both through the plan share one.
    """
    row_basis, column_basis = plan.coarse_basis
    number = row_basis.shape[-1]
    colours = column_basis.reshape(*column_basis.shape[:2], -1, _COLOURS).sum(2)
    met = plan.axis.sum(jnp.einsum("nim,nik->nmk", row_basis, plan.times(colours)))
    index = jnp.arange(number)
    are_near = jnp.abs(index[:, None] - index) <= _NEIGHBOURS
    residues = jnp.where(are_near, jnp.tile(met, (1, 1, number // _COLOURS)), 0)
    bin_column = plan.axis.sum(jnp.einsum("nim,ni->nm", row_basis, plan.bin_column))[..., None]
    bin_row = plan.axis.sum(jnp.einsum("njm,nj->nm", column_basis, plan.bin_row))[:, None]
    upper = jnp.concatenate([residues, bin_column], -1)
    return jnp.concatenate([upper, jnp.concatenate([bin_row, plan.bin_row[:, -1:, None]], -1)], 1)


def _inverse(x: Float[Array, "N m m"]) -> Float[Array, "N m m"]:
    """Invert a symmetric positive semidefinite matrix; basis functions without support map to 0."""
    diagonal = jnp.diagonal(x, axis1=1, axis2=2)
    ridge = 8 * jnp.finfo(x.dtype).eps * diagonal + (diagonal == 0)
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    factor = jnp.linalg.cholesky(x + ridge[..., None] * eye)
    half = jax.lax.linalg.triangular_solve(factor, jnp.broadcast_to(eye, x.shape), left_side=True, lower=True)
    return half.swapaxes(1, 2) @ half
