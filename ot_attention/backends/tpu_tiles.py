"""One head's problem in tiles of 128 x 128 scores, as the TPU kernels see it.

Rows are taken in groups of 128. A group visits only the tiles between the first column of its first row and the last
column of its last row, so padding and columns outside the band cost nothing. Only tiles on an edge of the band are
masked. The dustbin is one more column, in a last tile of its own.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ot_attention import support
from ot_attention.spec import Heads, SinkhornSpec

TILE = 128
_MIB = 2**20
# VMEM of one core. For other chips, and where the chip is not known, the smallest supported VMEM is assumed.
_VMEM = dict.fromkeys(("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e"), 128 * _MIB)
_LEAST_VMEM = 64 * _MIB
RESERVED_VMEM = 8 * _MIB  # for the compiler's own use
Ref = Any  # a reference to VMEM inside a kernel; outside, its `jax.ShapeDtypeStruct`


def vmem_capacity() -> int:
    """Return the bytes for kernels on the chip that is compiled for, as far as it is known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return (_VMEM.get(device.device_kind, _LEAST_VMEM) if device else _LEAST_VMEM) - RESERVED_VMEM


class Sizes(NamedTuple):
    """Sizes of one head's problem, padded to whole tiles."""

    groups: int  # of 128 rows
    chunks: int  # of 128 columns
    tiles: int  # bound on the tiles that all groups visit, the dustbin's included
    dustbin: bool
    rows: int
    columns: int
    all_rows: int  # with one more tile, whose first entry is the dustbin, if there is one
    all_columns: int

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec) -> "Sizes":
        groups, chunks = (-(-x.shape[1] // TILE) for x in (heads.q, heads.k))
        tiles, dustbin = groups * chunks, spec.dustbin != "none"
        if spec.band is not None:
            # A group's rows span their share of the columns and 2 W more; at either end it touches part of a tile.
            tiles = min(tiles, math.floor(chunks + groups * ((2 * spec.band + TILE - 1) / TILE + 1)))
        lengths = (TILE * n for n in (groups, chunks, groups + dustbin, chunks + dustbin))
        return cls(groups, chunks, tiles + dustbin * groups, dustbin, *lengths)


class HeadTables(NamedTuple):
    """Tables of all heads that the kernels read, beside q, k and v."""

    integers: Array  # int32; for each head n_q, n_k, then for each group `first`, `number`, `inner`, `inner_end`
    scalars: Array  # for each head the dustbin's score and the target of its row
    b: Array  # [N, 1, all columns], targets of columns
    a: Array | None  # [N, 1, rows], targets of rows, if there are weights: otherwise 1 where there is support

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec, sizes: Sizes) -> "HeadTables":
        n_q, n_k, dtype = heads.n_q, heads.n_k, support.potential_dtype(*heads[:3])
        start = jnp.broadcast_to(jnp.arange(0, sizes.rows, TILE, dtype=jnp.int32), (len(n_q), sizes.groups))
        end = jnp.minimum(start + TILE, n_q[:, None])
        # Windows move forward with the row: no window starts before the first row's or ends after the last row's.
        least_first, least_last = support.row_windows(start, n_q, n_k, spec.band)
        largest_first, largest_last = support.row_windows(end - 1, n_q, n_k, spec.band)
        exists = (start < n_q[:, None]) & (n_k[:, None] > 0)
        first = jnp.where(exists, least_first // TILE, 0)
        number = jnp.where(exists, jnp.maximum(largest_last // TILE + 1 - first, 0), 0)
        # Tiles without an edge of the support: every row exists, and its window holds every column.
        inner, inner_end = -(-largest_first // TILE), (least_last + 1) // TILE
        inner_end = jnp.where(start + TILE <= n_q[:, None], inner_end, inner)
        groups = jnp.stack([first, number, inner, inner_end], -1)
        integers = jnp.concatenate([jnp.stack([n_q, n_k], -1), groups.reshape(len(n_q), -1)], -1).reshape(-1)
        a, b = support.targets_of(heads, spec, dtype)
        scalars = jnp.stack([heads.dustbin_score.astype(dtype), a[:, -1]], -1).reshape(-1)
        of_rows = None if heads.row_weights is None else with_dustbin(a, sizes.rows, sizes.rows)
        return cls(integers, scalars, with_dustbin(b, sizes.columns, sizes.all_columns), of_rows)


class Group(NamedTuple):
    """A group of 128 rows and the tiles that it visits."""

    rows: pl.Slice
    base: Array  # place of the group's first tile among the tiles of all groups
    first: Array  # chunk of columns of the first tile
    number: Array  # of tiles, without the dustbin's
    inner: Array  # chunk of the first tile without an edge of the support
    inner_end: Array


class Head:
    """One head inside a kernel: loops over its groups and tiles, scores, and masked slices."""

    def __init__(self, integers: Ref, scalars: Ref, q: Ref, k: Ref, sizes: Sizes, spec: SinkhornSpec, dtype):
        self.q, self.k, self.sizes, self.dtype = q, k, sizes, dtype
        self.dustbin, self.band = spec.dustbin != "none", spec.band
        self.scale = 1 / (math.sqrt(q.shape[0]) * spec.epsilon)
        start = pl.program_id(0) * (2 + 4 * sizes.groups)
        self.n_q, self.n_k = integers[start], integers[start + 1]
        self._of_group = lambda group: [integers[start + 2 + 4 * group + i] for i in range(4)]
        self.score, self.a_bin = (jnp.full((1, 1), scalars[2 * pl.program_id(0) + i]) for i in range(2))
        self.bin_columns = pl.ds(sizes.columns, TILE)

    def fold_groups(self, body, carry):
        """Run `carry = body(group, carry)` for every group that has rows, unless there are no columns."""

        def step(number, carry):
            base, carry = carry
            group = Group(pl.ds(pl.multiple_of(number * TILE, TILE), TILE), base, *self._of_group(number))
            return base + group.number + self.dustbin, body(group, carry)

        end = jnp.where(self.n_k > 0, jax.lax.div(self.n_q + TILE - 1, jnp.int32(TILE)), 0)
        return jax.lax.fori_loop(0, end, step, (jnp.array(0, jnp.int32), carry))[1]

    def each_group(self, body):
        """Run `body(group)` for every group that has rows."""
        self.fold_groups(lambda group, carry: body(group) or carry, 0)

    def fold_tiles(self, group: Group, body, carry, dustbin: bool = True):
        """Run `carry = body(n, columns, carry)` for the group's tiles n = 0, 1, ...; the dustbin's is the last."""
        with_bin = self.dustbin and dustbin

        def step(n, carry):
            chunk = group.first + n
            if with_bin:
                chunk = jnp.where(n < group.number, chunk, self.sizes.chunks)
            return body(n, pl.ds(pl.multiple_of(chunk * TILE, TILE), TILE), carry)

        return jax.lax.fori_loop(0, group.number + with_bin, step, carry)

    def each_tile(self, group: Group, body):
        """Run `body(n, columns)` for the group's tiles, the dustbin's included."""
        self.fold_tiles(group, lambda n, columns, carry: body(n, columns) or carry, 0)

    def row_sums(self, group: Group, tile, dustbin: bool = True):
        """Sum `tile(n, columns)` over the columns of the group's tiles, `[128, 1]`."""

        total = self.fold_tiles(group, lambda n, at, total: total + tile(n, at), self.zeros(), dustbin)
        return total.sum(1, keepdims=True)

    def queries(self, group: Group):
        """Return the group's queries, `[128, width]`."""
        return self.q[:, group.rows].T

    def scores(self, group: Group, queries, n, columns):
        """Compute the group's n-th tile of scores, minus infinity outside the support."""

        def residues():
            # The dustbin's tile lies past the last key: clipped, so that this branch stays in bounds for it too.
            start = pl.multiple_of(jnp.minimum(columns.start, self.sizes.columns - TILE), TILE)
            s = self.scale * dot(queries, self.k[:, pl.ds(start, TILE)], (1, 0)).astype(self.dtype)
            inner = (columns.start >= group.inner * TILE) & (columns.start < group.inner_end * TILE)
            return jax.lax.cond(inner, lambda: s, lambda: masked(s))

        def masked(s):
            first, last = self._windows(group.rows.start + iota(0, (TILE, 1)))
            column = columns.start + iota(1)
            return jnp.where((column >= first) & (column <= last), s, -jnp.inf)

        def bin_column():
            row, lane = group.rows.start + iota(0), iota(1)
            return jnp.where((row < self.n_q) & (lane == 0), self.score, -jnp.inf)

        return jax.lax.cond(n < group.number, residues, bin_column) if self.dustbin else residues()

    def _windows(self, row):
        return support.windows_of_rows(row, self.n_q, self.n_k, self.band)

    def supported(self, group: Group):
        """Mark the group's rows that have any support, `[1, 128]`."""
        row = group.rows.start + iota(1, (1, TILE))
        first, last = self._windows(row)
        return ((first <= last) | self.dustbin) & (row < self.n_q)

    def bin_row(self, b):
        """Return the scores of the dustbin's row, `[1, all columns]`; its corner is 0."""
        column = iota(1, (1, self.sizes.all_columns))
        score = jnp.where(column < self.sizes.columns, self.score, 0)
        return jnp.where((b > 0) & (self.a_bin > 0), score, -jnp.inf)

    def rows_of(self, ref, group: Group):
        """Read the group's slice of `[width, rows]`, with 0 as padding, whatever stands there."""
        return jnp.where(group.rows.start + iota(1, (1, TILE)) < self.n_q, ref[:, group.rows], 0)

    def columns_of(self, ref, columns):
        """Read a tile's slice of `[width, columns]`, with 0 as padding."""
        return jnp.where(columns.start + iota(1, (1, TILE)) < self.n_k, ref[:, columns], 0)

    def zeros(self):
        return jnp.zeros((TILE, TILE), self.dtype)


def tiles_of(scratch, group: Group) -> tuple[Ref, Array | int]:
    """Return the array that holds the group's tiles, and the place of the first one."""
    return (scratch.strip, 0) if scratch.tiles is None else (scratch.tiles, group.base)


def with_dustbin(x: Array, length: int, padded: int) -> Array:
    """Pad `[N, n + 1]`, the dustbin last, to `[N, 1, padded]`, the dustbin at `length` if that is within."""
    x = jnp.concatenate([jnp.pad(x[:, :-1], ((0, 0), (0, length - x.shape[1] + 1))), x[:, -1:]], 1)
    return jnp.pad(x, ((0, 0), (0, TILE - 1)))[:, None, :padded]


def dot(x, y, contract: tuple[int, int]):
    """Multiply matrices as exactly as the less exact factor allows.

    bfloat16 takes one pass of the matrix unit, float32 six.
    """
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    if jnp.bfloat16 in (x.dtype, y.dtype):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x, y, dimensions, precision="highest", preferred_element_type=x.dtype)


def iota(axis: int, shape: tuple[int, int] = (TILE, TILE)):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def shifted(part, by: int):
    return pl.ds(pl.multiple_of(part.start + by, TILE), TILE)


def upright(x):
    """Transpose `[1, 128]` to `[128, 1]`."""
    return jnp.where(iota(0) == iota(1), jnp.broadcast_to(x, (TILE, TILE)), 0).sum(1, keepdims=True)


def flat(x):
    """Transpose `[128, 1]` to `[1, 128]`."""
    return jnp.where(iota(0) == iota(1), jnp.broadcast_to(x, (TILE, TILE)), 0).sum(0, keepdims=True)


def ratio(x, y, where=None):
    """Return x / y where x > 0 (or `where`), else 0; far out of any range where y is 0 and x is not."""
    return jnp.where(x > 0 if where is None else where, x / jnp.maximum(y, 1e-30), 0)


def times(tau: float, x):
    """Return tau x; kernels of problems that are not relaxed have no such product."""
    return x if tau == 1 else tau * x


def over(x, tau: float):
    """Return x / tau, likewise."""
    return x if tau == 1 else x / tau


def log(x):
    """Return log x, 0 where x is 0: potentials without support are 0."""
    return jnp.log(jnp.where(x > 0, x, 1))
