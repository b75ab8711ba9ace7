"""Support and targets of the plan, from lengths, band and dustbin (docs/math.md, section 2).

Every problem has a dustbin's row and column, at the end. Without a dustbin their scores are minus infinity.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention.axes import ALONE, SequenceAxis
from ot_attention.spec import AllColumns, AllRows, Dustbin, Heads, Segments, SinkhornSpec, Size

Lengths = Int[Array, "*batch"]
Mass = Float[Array, "*batch 1"]
_FAR = 2**30  # beyond any position
P, R = ParamSpec("P"), TypeVar("R")
LONGEST_BANDED = 2**24  # residues, for which `divided_product` is exact


def row_windows(
    rows: Int[Array, "*batch rows"], n_q: Lengths, n_k: Lengths, band: int | None
) -> tuple[Int[Array, "*batch rows"], Int[Array, "*batch rows"]]:
    """Return the first and last column (inclusive) in the support of each row; last < first where there is none.

    The support is `|j - c(i)| <= band`, in integers: rounding would move the band's edge (docs/math.md, section 2).
    """
    return windows_of_rows(rows, n_q[..., None], n_k[..., None], band)


def windows_of_rows(
    rows: Int[Array, "..."], n_q: Int[Array, "..."], n_k: Int[Array, "..."], band: int | None
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Return `row_windows` of lengths that fit `rows` by broadcasting: a kernel's lengths are scalars."""
    if band is None:
        first, last = jnp.zeros_like(rows), jnp.broadcast_to(n_k - 1, rows.shape)
    else:
        band = min(band, LONGEST_BANDED)  # a wider band holds everything, and sums would overflow
        ceil_centre, floor_centre = diagonal(rows, n_q, n_k)
        first, last = jnp.maximum(ceil_centre - band, 0), jnp.minimum(floor_centre + band, n_k - 1)
    exists = (rows >= 0) & (rows < n_q)
    return jnp.where(exists, first, 0), jnp.where(exists, last, -1)


def column_windows(
    columns: Int[Array, "*batch columns"], n_q: Lengths, n_k: Lengths, band: int | None
) -> tuple[Int[Array, "*batch columns"], Int[Array, "*batch columns"]]:
    """Return the first and last row (inclusive) in the support of each column; last < first where there is none.

    These are the rows with `j - W <= c(i) <= j + W`, in integers as in `row_windows`.
    """
    n_q, n_k = n_q[..., None], n_k[..., None]

    def rows(column, added):
        """Count rows with c(i) <= column if `added` is n_k, with c(i) < column if it is n_k - 1."""
        # (odd n_q + added) / (2 n_k), rounded down.
        denominator = 2 * jnp.maximum(n_k, 1)
        whole, rest = divided_product(2 * jnp.clip(column, 0, n_k) + 1, n_q, denominator)
        count = whole + (rest + added >= denominator)
        return jnp.where(column < 0, 0, jnp.minimum(count, n_q))

    if band is None:
        first, stop = jnp.zeros_like(columns), jnp.broadcast_to(n_q, columns.shape)
    else:
        band = min(band, LONGEST_BANDED)
        first, stop = rows(columns - band, jnp.maximum(n_k - 1, 0)), rows(columns + band, n_k)
    exists = (columns >= 0) & (columns < n_k)
    return jnp.where(exists, first, 0), jnp.where(exists, stop - 1, -1)


def diagonal(
    rows: Int[Array, "..."], n_q: Int[Array, "..."], n_k: Int[Array, "..."]
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Compute ceiling and floor of the length-scaled diagonal `c(i)` at each row, exactly."""
    # c(i) = (odd n_k - n_q) / (2 n_q) with odd = 2 i + 1; x = odd n_k / (2 n_q) = c(i) + 1/2 is never negative.
    odd, denominator = 2 * jnp.clip(rows, 0, jnp.maximum(n_q - 1, 0)) + 1, 2 * jnp.maximum(n_q, 1)
    whole, rest = divided_product(odd, n_k, denominator)
    # ceil(x - 1/2) and floor(x - 1/2), from x = whole + rest / denominator.
    above, below = 2 * rest > denominator, 2 * rest < denominator
    return whole + above.astype(jnp.int32), whole - below.astype(jnp.int32)


def divided_product(
    x: Int[Array, "..."], y: Int[Array, "..."], denominator: Int[Array, "..."]
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Divide `x y` by `denominator`; return quotient, rounded down, and remainder, both exact.

    No integers are divided, which TPU kernels cannot do, and none has more than 32 bits.

    Args:
        x: int32, 0 to 2^25 + 2^10.
        y: int32, 0 to 2^24.
        denominator: int32, 1 to 2^25, such that the quotient is at most 2^26.
    """
    # Integers wrap around modulo 2^32, so a difference of products is exact if it lies within 2^31, whatever the
    # products are. Let an estimate q' of q = x y / denominator have a relative error of at most e = 2^-19: three
    # roundings to float32, and a division by a device that is off by up to 14 ulps.
    #
    # 1. whole is q', cut off to an integer: |q - whole| < e q + 1. So |rest| < e x y + denominator
    #    <= 2^30 + 2^15 + 2^25 < 2^31: it is exact.
    # 2. |rest| / denominator < e q + 1 <= 2^7 + 1. Its estimate is off by less than (2^7 + 1) e < 2^-11. Rounded down,
    #    that leaves a rest between -2^-11 denominator and (1 + 2^-11) denominator.
    # 3. Such a rest shows whether the quotient is 1 too large or 1 too small.
    divisor = denominator.astype(jnp.float32)
    whole = (x.astype(jnp.float32) * y.astype(jnp.float32) / divisor).astype(jnp.int32)
    rest = x * y - whole * denominator
    more = jnp.floor(rest.astype(jnp.float32) / divisor).astype(jnp.int32)
    whole, rest = whole + more, rest - more * denominator
    off = (rest >= denominator).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
    return whole + off, rest - off * denominator


class Windows(NamedTuple):
    """First and last position (inclusive) of the other side in the support; last < first where there is none."""

    first: Int[Array, "*batch length"]
    last: Int[Array, "*batch length"]


class Layout(NamedTuple):
    """Support of the residues that a band holds, without the dustbin, and how it lies."""

    rows: Windows
    columns: Windows
    n_q: Lengths  # end of the real rows
    n_k: Lengths
    band: int | None  # half-width
    diagonal: int | None  # c(i) - i where it is constant, as within one sequence; None for a slope of n_k / n_q

    @classmethod
    def of(
        cls, n_q: Lengths, n_k: Lengths, rows: Size, columns: Size, band: int | None, segments: Segments | None = None
    ) -> "Layout":
        """Return the layout of whole sequences, of `rows` and `columns` with their padding."""
        of_rows = within_segments(row_windows(positions(n_q, rows), n_q, n_k, band), segments)
        of_columns = within_segments(column_windows(positions(n_q, columns), n_q, n_k, band), segments)
        return cls(of_rows, of_columns, n_q, n_k, band, None if segments is None else 0)


def positions(lengths: Lengths, size: Size, axis: SequenceAxis = ALONE) -> Int[Array, "*batch size"]:
    """Return the positions of this device's residues in whole sequences, for each of some lengths."""
    return jnp.broadcast_to(axis.start(size) + jnp.arange(size, dtype=jnp.int32), (*lengths.shape, size))


def within_segments(windows: tuple[Array, Array], segments: Segments | None) -> Windows:
    """Return the part of windows that lies in the segment of each residue."""
    if segments is None:
        return Windows(*windows)
    first, last = windows
    exists = first <= last
    return Windows(
        jnp.where(exists, jnp.maximum(first, segments[0]), first),
        jnp.where(exists, jnp.minimum(last, segments[1]), last),
    )


def segments_of(ids: Int[Array, "batch share"], axis: SequenceAxis, reach: int | None) -> Segments:
    """Return the first and the last position of the run of equal ids that each position is in.

    Where devices share sequences, both are right within `reach` of the position.
    """
    share = ids.shape[1]
    if axis.is_shared and reach is not None:
        ids = axis.with_neighbours(ids, reach)
    beyond = (ids.shape[1] - share) // 2
    index = positions(ids[:, 0], ids.shape[1]) + (axis.start(share) - beyond)
    differs = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(differs[:, :-1], index, -_FAR), axis=1)
    last = jax.lax.cummin(jnp.where(differs[:, 1:], index, _FAR), axis=1, reverse=True)
    return first[:, beyond : beyond + share], last[:, beyond : beyond + share]


def dense_support(
    n_q: Lengths,
    n_k: Lengths,
    rows: Size,
    columns: Size,
    band: int | None,
    dustbin: Dustbin,
    segments: Segments | None = None,
) -> Bool[Array, "*batch all_rows all_columns"]:
    """Return the support of the augmented problem as a mask, dustbin last."""
    row, column = jnp.arange(rows + 1, dtype=jnp.int32), jnp.arange(columns + 1, dtype=jnp.int32)
    first, last = row_windows(jnp.broadcast_to(row, (*n_q.shape, rows + 1)), n_q, n_k, band)
    if segments is not None:
        starts, ends = (jnp.pad(x, ((0, 0), (0, 1))) for x in segments)
        first, last = within_segments((first, last), (starts, ends))
    residues = (column >= first[..., None]) & (column <= last[..., None])
    real_rows = (row < n_q[..., None]) | (row == rows)
    real_columns = (column < n_k[..., None]) | (column == columns)
    real = real_rows[..., None] & real_columns[..., None, :] & dustbin_exists(n_q, n_k, dustbin)[..., None, None]
    return jnp.where((row == rows)[:, None] | (column == columns), real, residues)


def dustbin_exists(n_q: Lengths, n_k: Lengths, dustbin: Dustbin) -> Bool[Array, "*batch"]:
    """Tell whether the dustbin's row and column are in the support: not where one side has no residues."""
    return (n_q > 0) & (n_k > 0) & (dustbin != "none")


def targets_of(heads: Heads, spec: SinkhornSpec, dtype: jnp.dtype) -> tuple[AllRows, AllColumns]:
    """Return `targets` of the problem of every head."""
    sizes = heads.q.shape[1], heads.k.shape[1], spec.band, spec.dustbin, dtype
    return targets(heads.n_q, heads.n_k, *sizes, heads.weights, spec.is_relaxed, spec.axis)


def targets(
    n_q: Lengths,
    n_k: Lengths,
    rows: Size,
    columns: Size,
    band: int | None,
    dustbin: Dustbin,
    dtype: jnp.dtype,
    weights: tuple[Float[Array, "*batch rows"] | None, Float[Array, "*batch columns"] | None] = (None, None),
    is_relaxed: bool = False,
    axis: SequenceAxis = ALONE,
) -> tuple[Float[Array, "*batch all_rows"], Float[Array, "*batch all_columns"]]:
    """Return the row and column sums that the plan must have (docs/math.md, section 1); 0 without support.

    weights: targets of the residues, in place of 1 and n_q / n_k; nothing at padding matters. Without a dustbin and
        unless relaxed, those of columns are scaled to the sum of the rows', for no plan could have both.
    axis: of devices that share the sequences; targets are then of this device's share, lengths of whole sequences.
    """
    exists = dustbin_exists(n_q, n_k, dustbin)[..., None]

    def supported(windows, size: Size, n):
        index = positions(n_q, size, axis)
        first, last = windows(index, n_q, n_k, band)  # a band narrower than the slope n_k / n_q misses some columns
        return (((first <= last) | exists) & (index < n[..., None])).astype(dtype)

    def given(weights, size: Size, n, number):
        """Return the weights and their sum."""
        if weights is None:
            return 1, number
        weights = jnp.where(positions(n, size, axis) < n[..., None], weights.astype(dtype), 0)
        return weights, axis.sum(weights.sum(-1, keepdims=True))

    a, b = supported(row_windows, rows, n_q), supported(column_windows, columns, n_k)
    lengths = n_q[..., None].astype(dtype), n_k[..., None].astype(dtype)
    row_weights, row_mass = given(weights[0], rows, n_q, lengths[0])
    column_weights, column_mass = given(weights[1], columns, n_k, lengths[1])
    a, b = a * row_weights, b * column_weights
    if dustbin == "none":
        b = b * column_scale(row_mass, column_mass, lengths[0], weights[1] is not None, is_relaxed)
    row_bin, column_bin = dustbin_targets(row_mass, column_mass, dustbin)
    return jnp.concatenate([a, row_bin * exists], -1), jnp.concatenate([b, column_bin * exists], -1)


def dustbin_targets(row_mass: Array, column_mass: Array, dustbin: Dustbin) -> tuple[Array, Array]:
    """Return the targets of the dustbin's row and column, from the sums of the residues' targets."""
    if dustbin == "none":
        return jnp.zeros_like(row_mass), jnp.zeros_like(column_mass)
    if dustbin == "unit":
        return 1 + jnp.maximum(column_mass - row_mass, 0), 1 + jnp.maximum(row_mass - column_mass, 0)
    # The corner can take all the mass that residues match, so that every residue of either side may be a gap.
    return column_mass, row_mass


def column_scale(row_mass: Mass, column_mass: Mass, rows: Mass, is_weighted: bool, is_relaxed: bool) -> Mass:
    """Return the factor of column targets without a dustbin.

    Balanced, both sides then have one sum, that of the rows. Relaxed, weights stay, and otherwise the sum is `rows`.
    """
    if not is_relaxed:
        return divide(row_mass, column_mass)
    return jnp.ones_like(column_mass) if is_weighted else divide(rows, column_mass)


def movement(a: AllRows, f_change: AllRows, g_change: AllColumns, is_relaxed: bool) -> Float[Array, "N"]:
    """Measure a step: the most that it moved a row sum, or where relaxed a potential."""
    if is_relaxed:
        return jnp.maximum(jnp.abs(f_change).max(-1), jnp.abs(g_change).max(-1))
    return (a * jnp.abs(jnp.expm1(-f_change))).max(-1)


def with_dustbin(x: Float[Array, "N length ..."], last: float = 0) -> Float[Array, "N all ..."]:
    """Append one number, the dustbin's entry, to vectors over residues."""
    return jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2), constant_values=last)


def append(x: Float[Array, "N length"], last: Float[Array, "N 1"]) -> Float[Array, "N all"]:
    """Append the dustbin's entries to vectors over residues."""
    # XLA fuses a select with the code that makes its operands; it does not fuse a concatenation.
    return jnp.where(jnp.arange(x.shape[1] + 1) == x.shape[1], last, with_dustbin(x))


def divide(x: Array, y: Array) -> Array:
    """Return x / y, 0 where y is 0."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def zero_padding(x: jax.Array, lengths: Lengths) -> jax.Array:
    """Return `x [*batch, length, ...]` with 0 in place of padding, which may hold NaN."""
    real = jnp.arange(x.shape[lengths.ndim]) < lengths[..., None]
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - real.ndim)), x, jnp.zeros((), x.dtype))


def without_padding(heads: Heads, axis: SequenceAxis = ALONE) -> Heads:
    """Return the inputs with 0 as padding."""
    q, k, v, _, n_q, n_k, *_ = heads
    q, k, v = (zero_padding(x, axis.local(n, x.shape[1])) for x, n in ((q, n_q), (k, n_k), (v, n_k)))
    return heads._replace(q=q, k=k, v=v)


def cleaned(heads: Heads, axis: SequenceAxis = ALONE) -> Heads:
    """Return the inputs with 0 as padding, in the dtype of the potentials."""
    dtype = potential_dtype(*heads[:3])
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, without_padding(heads, axis)
    )


def potential_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return the dtype of potentials and marginals, at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def log(scaling: Array) -> Array:
    """Return the logarithm of a scaling, 0 where it is 0: potentials without support are 0."""
    return jnp.log(jnp.where(scaling == 0, 1, scaling))


def promoting(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function mix dtypes and ranks as JAX does by default, whatever the caller has set for his own code.

    Rules of a `custom_vjp` need it of their own: JAX traces them after the call.
    """

    @functools.wraps(function)
    def promote(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return promote


def platform() -> str:
    """Return the platform that is compiled for, as far as it is known: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
