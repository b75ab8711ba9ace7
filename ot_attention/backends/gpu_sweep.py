"""Sinkhorn step on a GPU in one visit of each entry: row sums, then column sums from the same entries.

A program owns a strip, up to 64 rows and all columns that they meet, and keeps the strip's entries in registers: two
products would make K twice. Row sums give u, the same entries give the strip's share of the column sums, and a second
kernel adds up the shares of the strips that meet a column.

Strips are cut along the longer of the two sequences, like the blocks of `xla.Band`: windows of a strip begin within 64
columns of each other, and `64 + 2 W` columns hold all of them. So the tiles inside the support are known beforehand.
The number of tiles that fit into registers decides where this pays (`cut_for`).

Microseconds of a full step of 262,144 rows on an H200, heads of 64 in bfloat16 (of 32 in float32: 384 residues), by
`scripts/tune_gpu.py`, with 4 warps unless said; two sweeps are the kernels `sum` and `vector` of `gpu_kernels`.

| | tiles of a strip | one sweep | two sweeps |
|---|---|---|---|
| W = 64 | 3 | 77 (8 warps: 94) | 126 |
| W = 64, float32 | 3 | 128 | 186 |
| W = 128 | 5 | 114 (8 warps: 116) | 156 |
| W = 256 | 9 | 267 (8 warps: 226; not taken) | 210 |

Several strips in a row, with the next one's operands loaded ahead, took 89 to 99 at W = 64: fewer programs fit.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from ot_attention import support
from ot_attention.backends import gpu_kernels, xla
from ot_attention.backends.gpu_kernels import Axes, Part, Place, Side
from ot_attention.spec import Columns, Lengths, Rows

ROWS = 64  # of a strip
_TILE = 64  # columns of a tile
_MOST_TILES = 6  # of a strip
_ADDED = 128  # columns whose shares a program adds up


class Cut(NamedTuple):
    """How strips lie; static, for a kernel is compiled for it."""

    tiles: int  # of 64 columns, that a strip has
    slides: bool  # whether strips begin where the window of their first row does, maybe before column 0; else at 0
    band: int | None  # half-width W; None where all is in the support

    def begins(self, tile: int) -> bool:
        """Tell whether windows of a strip's rows may begin after the tile's first column: last rows do not meet it."""
        return self.band is not None and (tile == 0 or not self.slides)

    def ends(self, tile: int) -> bool:
        """Tell whether windows of a strip's rows may end before the tile's last column: first rows do not meet it."""
        return self.band is not None and (_TILE * (tile + 1) > 2 * self.band or not self.slides)

    @property
    def warps(self) -> int:
        """Warps of a program: at most 96 registers of a thread hold entries."""
        return 4 if self.tiles <= 3 else 8


class Strips(NamedTuple):
    """Rows and first column of each strip, and the strips that meet each group of columns. Ends are exclusive."""

    row: Int[Array, "N strips"]
    row_stop: Int[Array, "N strips"]
    column: Int[Array, "N strips"]
    met_start: Int[Array, "N groups"]
    met_stop: Int[Array, "N groups"]
    n_k: Int[Array, "N 1"]


# Rows, columns, strips, and entries of the dustbin's column.
_Operands = tuple[Side, Side, Strips, Rows | None]


def cut_for(columns: int, band: int | None) -> Cut | None:
    """Choose how strips lie; None if the columns that they meet are too many for registers."""
    reach = columns if band is None else ROWS + 2 * band
    tiles = math.ceil(min(reach, columns) / _TILE)
    return Cut(tiles, reach < columns, band) if tiles <= _MOST_TILES else None


def strips(n_q: Lengths, n_k: Lengths, rows: int, columns: int, cut: Cut) -> Strips:
    """Cut rows into strips of at most 64 rows whose windows lie within the tiles of a strip."""
    n_q, n_k = n_q[:, None], n_k[:, None]
    ends = jnp.arange(math.ceil(max(rows, columns) / ROWS) + 1, dtype=jnp.int32) * ROWS
    ends = jnp.minimum(xla.first_row_at(ends, n_q, n_k), n_q)
    row, row_stop = ends[:, :-1], ends[:, 1:]
    column = jnp.zeros_like(row)
    if cut.slides and cut.band is not None:
        column = jnp.where(row < n_q, support.diagonal(row, n_q, n_k)[0] - cut.band, n_k)
    at = jnp.arange(0, columns, _ADDED, dtype=jnp.int32)
    search = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"), (0, None))
    met_start, met_stop = search(column + cut.tiles * _TILE, at + 1), search(column, at + _ADDED)
    return Strips(row, row_stop, column, met_start.astype(jnp.int32), met_stop.astype(jnp.int32), n_k)


def scale_once(rows: Side, columns: Side, strips: Strips, bin_column, scale: float, cut: Cut) -> tuple[Rows, Columns]:
    """Return `u = 1 / (K 1 + bin_column)` and `K^T u` for the matrix `K = exp(scale x_i . x_j + f_i + g_j)`.

    u is 0 where that sum is 0, and has no meaning beyond the length.
    """
    return _call((rows, columns, strips, bin_column), scale, cut, gpu_kernels.INTERPRET)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # traced and lowered once for all calls alike
def _call(operands: _Operands, scale: float, cut: Cut, interpret: bool) -> tuple[Array, Array]:
    rows, columns, strips, _ = operands
    (number, length, _), reach = rows.x.shape, cut.tiles * _TILE
    strip_count, groups = strips.row.shape[1], strips.met_start.shape[1]

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        varying = jax.typeof(rows.x).manual_axis_type  # axes that heads vary over in shard_map
        return jax.ShapeDtypeStruct((number, *sizes), rows.shift.dtype, manual_axis_type=varying)

    u, shares = pl.pallas_call(
        functools.partial(_strip_kernel, scale=scale, cut=cut),
        out_shape=(shape(length), shape(strip_count, reach)),
        grid=(strip_count, number),
        in_specs=(jax.tree.map(gpu_kernels.whole_head, operands),),
        out_specs=(
            pl.BlockSpec((None, length), lambda _, n: (n, 0)),  # strips write rows of their own
            pl.BlockSpec((None, None, reach), lambda s, n: (n, s, 0)),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=1),
        interpret=interpret,
        name="band_step",
    )(operands)
    given = shares, strips
    sums = pl.pallas_call(
        functools.partial(_add_kernel, reach=reach),
        out_shape=shape(groups * _ADDED),
        grid=(groups, number),
        in_specs=jax.tree.map(gpu_kernels.whole_head, given),
        out_specs=pl.BlockSpec((None, _ADDED), lambda c, n: (n, c)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="band_shares",
    )(*given)
    return u, sums[:, : columns.x.shape[1]]


def _strip_kernel(operands: _Operands, u_out, shares_out, *, scale: float, cut: Cut):
    """Make one strip's entries, the scalings of its rows and its share of the column sums.

    Tiles have columns along the first axis: row sums then cross threads once, not once for every tile. All loads come
    before all computation.
    """
    rows, columns, strips, bin_column = operands
    strip, axes = pl.program_id(0), Axes.of(is_matrix=False)
    row, row_stop, column, n_k = strips.row[strip], strips.row_stop[strip], strips.column[strip], strips.n_k[0]
    at = Place.at(row, ROWS, row_stop)
    # Rows and columns that do not exist have no entries.
    own = Part(at.load(rows.x), at.load(rows.shift, -jnp.inf))
    bins = 0 if bin_column is None else at.load(bin_column)
    others, windows = [], []
    for tile in range(cut.tiles):
        position = column + tile * _TILE + jnp.arange(_TILE, dtype=jnp.int32)
        met = Place(position, position, (position >= 0) & (position < n_k))
        others.append(Part(met.load(columns.x), met.load(columns.shift, -jnp.inf)))
        windows.append((met.load(columns.first) - row, met.load(columns.last) - row))

    made, place = [], axes.of_own(jnp.arange(ROWS, dtype=jnp.int32))
    for tile, (other, (first, last)) in enumerate(zip(others, windows, strict=True)):
        entries = gpu_kernels.exp2(axes.scores(own, other, scale, own_first=True))
        if cut.begins(tile):
            entries = jnp.where(place <= axes.of_other(last), entries, 0)
        if cut.ends(tile):
            entries = jnp.where(place >= axes.of_other(first), entries, 0)
        made.append(entries)
    sums = functools.reduce(jnp.add, made).sum(axes.other) + bins
    u = jnp.where((at.position < row_stop) & (sums > 0), gpu_kernels.reciprocal(sums), 0)
    plgpu.store(u_out.at[at.where], u, mask=at.exists)
    for tile, entries in enumerate(made):
        shares_out[pl.ds(tile * _TILE, _TILE)] = (entries * axes.of_own(u)).sum(axes.own)


def _add_kernel(shares, strips: Strips, out, *, reach: int):
    """Add up the shares of strips in a group of columns."""
    group = pl.program_id(0)
    position = group * _ADDED + jnp.arange(_ADDED, dtype=jnp.int32)

    def add(strip, total):
        place = position - strips.column[strip]
        exists = (place >= 0) & (place < reach)
        return total + plgpu.load(shares.at[strip, jnp.clip(place, 0, reach - 1)], mask=exists, other=0.0)

    zeros = jnp.zeros(_ADDED, out.dtype)
    out[...] = jax.lax.fori_loop(strips.met_start[group], strips.met_stop[group], add, zeros)
