"""The pair HMM with two affine gap states (Durbin et al. 1998, chapter 4; ProbCons, Do et al. 2005).

A monotone alignment weighs the product of its matches and gaps. A match of residues i and j weighs `log_weight[i, j]`
nats. A gap of k residues between two matches costs `opening + (k - 1) extension` nats in one of two states: in one
short gaps are cheap, in the other long ones. An overhang before the first or behind the last match has a price of its
own, which depends on the mode (`Mode`). Where residues of both sequences are unaligned, the residues of y come first,
so that each alignment counts once. The empty alignment, the one of unrelated sequences, has a price of its own.

The work goes along antidiagonals i + j = d, whose cells depend on earlier ones only: each step is elementwise over a
batch and its lanes. Lane k of antidiagonal d is row `first[d] + k`. Without `first`, lane k is row k, and all pairs of
residues are computed; with it, lanes are a band around a path, wherever the path leads (docs/math.md, section 9).

Weights of paths differ by hundreds of nats, where a domain occurs twice for example, and float32 would lose those that
match late. Each cell therefore holds its states as float32 with an exponent of its own, a power of two. Sums need no
logarithms: four times faster than `logaddexp`. Derivatives come from automatic differentiation: by match weights they
are posterior probabilities, by gap costs expected numbers of gaps (the forward-backward algorithm).
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOG_ZERO = -1e30  # logarithm of 0: finite, so that differences and derivatives are finite
_LN2 = 0.6931471805599453
_NOTHING = -(1 << 28)  # exponent of a cell that nothing leads to
_computed_once = jax.lax.optimization_barrier  # else XLA computes, for every use, what is cheap but used often

Mode = Literal["global", "glocal", "local"]  # overhangs cost as gaps; `terminal` nats each; nothing
MODES: tuple[Mode, ...] = get_args(Mode)

Lengths = Int[Array, " batch"]
LaneWeights = Float[Array, "diagonals batch lanes"]
First = Int[Array, "diagonals batch"]
AllPairs = Float[Array, "batch x_length y_length"]
Target = Int[Array, "batch x_length"]
Offsets = Float[Array, "batch length"]


class Gaps(NamedTuple):
    """Costs in nats, those of gaps above 0.

    x_offset, y_offset: Added to the cost of opening a gap at a residue that is unaligned, in both states; or None.
    """

    opening: Float[Array, "2"]  # of short gaps, of long gaps
    extension: Float[Array, "2"]
    terminal: Float[Array, ""]  # of an overhang of any length, in mode glocal
    empty: Float[Array, " batch"]  # of the alignment without a match, in mode glocal; of any sign
    x_offset: Float[Array, "batch x_length"] | None = None
    y_offset: Float[Array, "batch y_length"] | None = None


class Problem(NamedTuple):
    """Match weights of a batch by lanes, in nats; `LOG_ZERO` for none and beyond the lengths."""

    log_weight: LaneWeights
    first: First | None  # row of lane 0; from one antidiagonal to the next it rises by at most 1
    x_lengths: Lengths
    y_lengths: Lengths


class _Cells(NamedTuple):
    """Weights of the alignments that end at each cell of an antidiagonal, by state, over 2 to the `exponent`."""

    match: Float[Array, "batch lanes"]
    y_gap: Float[Array, "2 batch lanes"]
    x_gap: Float[Array, "2 batch lanes"]
    exponent: Int[Array, "batch lanes"]


class _Scaled(NamedTuple):
    """Numbers over 2 to the `exponent`."""

    value: Float[Array, "*shape"]
    exponent: Int[Array, "*shape"]


def of_all_pairs(log_weight: AllPairs, x_lengths: Lengths, y_lengths: Lengths) -> Problem:
    """Make the problem of all pairs of residues."""
    inside = (jnp.arange(log_weight.shape[1]) < x_lengths[:, None])[:, :, None]
    inside &= (jnp.arange(log_weight.shape[2]) < y_lengths[:, None])[:, None, :]
    return Problem(skewed(jnp.where(inside, log_weight, LOG_ZERO), LOG_ZERO), None, x_lengths, y_lengths)


def tempered(problem: Problem, gaps: Gaps, temperature: Float[Array, ""]) -> tuple[Problem, Gaps]:
    """Divide all nats by a temperature: above 1, alignments differ less in probability."""
    log_weight = jnp.where(problem.log_weight > -1e8, problem.log_weight / temperature, LOG_ZERO)
    return problem._replace(log_weight=log_weight), jax.tree.map(lambda cost: cost / temperature, gaps)


def skewed(pairs: AllPairs, fill: float) -> LaneWeights:
    """Turn rows and columns into antidiagonals and lanes; lanes that are no pair get `fill`."""
    batch, rows, columns = pairs.shape
    wide = jnp.pad(pairs, ((0, 0), (0, 0), (0, rows)), constant_values=fill).reshape(batch, -1)
    # Rows that are one shorter begin one place further right each.
    turned = wide[:, : rows * (columns + rows - 1)].reshape(batch, rows, columns + rows - 1)
    return jax.lax.optimization_barrier(turned).transpose(2, 0, 1)


def unskewed(lanes: LaneWeights, columns: int) -> AllPairs:
    """Turn antidiagonals and lanes back into rows and columns, where lanes are rows."""
    _, batch, rows = lanes.shape
    turned = jax.lax.optimization_barrier(lanes.transpose(1, 2, 0)).reshape(batch, -1)
    wide = jnp.pad(turned, ((0, 0), (0, rows))).reshape(batch, rows, columns + rows)
    return wide[:, :, :columns]


def negative_log_likelihood(
    log_weight: AllPairs, target: Target, x_lengths: Lengths, y_lengths: Lengths, gaps: Gaps, mode: Mode = "glocal"
) -> Float[Array, " batch"]:
    """Compute the nats of each reference alignment, which may be empty.

    `target` is the column that each row is aligned to, negative for none.
    """
    problem = of_all_pairs(log_weight, x_lengths, y_lengths)
    reference = log_weight_of(log_weight, target, x_lengths, y_lengths, gaps, mode)
    return log_partition(problem, gaps, mode) - reference


def log_weight_of(
    log_weight: AllPairs, target: Target, x_lengths: Lengths, y_lengths: Lengths, gaps: Gaps, mode: Mode = "glocal"
) -> Float[Array, " batch"]:
    """Compute the log-weight of an alignment, summed over the states that its gaps may have."""
    aligned, row = target >= 0, jnp.arange(target.shape[1])
    at_target = jnp.take_along_axis(log_weight, jnp.maximum(target, 0)[..., None], axis=2)[..., 0]
    matches = jnp.where(aligned, at_target, 0).sum(1)
    rows, columns = jnp.where(aligned, row, -1), jnp.where(aligned, target, -1)
    last_row, last_column = (  # of the matches before each row; -1 where there is none
        jnp.pad(jax.lax.cummax(x, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1) for x in (rows, columns)
    )
    between = jnp.where(aligned & (last_row >= 0), _gap(row - last_row - 1, gaps), 0).sum(1)
    between += jnp.where(aligned & (last_row >= 0), _gap(target - last_column - 1, gaps), 0).sum(1)
    if gaps.x_offset is not None and gaps.y_offset is not None:
        offsets = (gaps.x_offset, row - 1, last_row), (gaps.y_offset, target - 1, last_column)
        for offset, end, last in offsets:
            opened = jnp.take_along_axis(offset, jnp.clip(last + 1, 0, offset.shape[1] - 1), axis=1)
            between -= jnp.where(aligned & (last_row >= 0) & (end > last), opened, 0).sum(1)
    none, first = ~aligned.any(1), jnp.argmax(aligned, 1)
    before = first, jnp.take_along_axis(target, first[:, None], axis=1)[:, 0]
    behind = x_lengths - 1 - rows.max(1), y_lengths - 1 - columns.max(1)
    ends = sum(_overhang(length, gaps, mode) for length in (*before, *behind))
    return jnp.where(none, log_empty(x_lengths, y_lengths, gaps, mode), matches + between + ends)


def log_empty(x_lengths: Lengths, y_lengths: Lengths, gaps: Gaps, mode: Mode = "glocal") -> Float[Array, " batch"]:
    """Compute the log-weight of the alignment without a match.

    In mode global it has two overhangs, x and y. In mode local it is as much heavier as the overhangs of an alignment
    amid both sequences are: unrelated sequences are as likely in both modes.
    """
    exists = jnp.minimum(x_lengths, y_lengths) > 0
    if mode == "global":
        return _overhang(x_lengths, gaps, mode) + _overhang(y_lengths, gaps, mode)
    return jnp.where(exists, (4 * gaps.terminal if mode == "local" else 0) - gaps.empty, 0)


def log_odds(problem: Problem, gaps: Gaps, mode: Mode = "glocal") -> Float[Array, " batch"]:
    """Compute the logarithm of the summed weights of all alignments over the weight of the empty one, at least 0."""
    return log_partition(problem, gaps, mode) - log_empty(problem.x_lengths, problem.y_lengths, gaps, mode)


def log_partition(problem: Problem, gaps: Gaps, mode: Mode = "glocal") -> Float[Array, " batch"]:
    """Compute the logarithm of the summed weights of all alignments of each pair.

    Its derivative keeps ten numbers a cell, and computes the steps again.
    """
    return _log(_forward(problem, gaps, mode, keep=False)[0])


def posterior(problem: Problem, gaps: Gaps, mode: Mode = "glocal") -> tuple[Float[Array, " batch"], LaneWeights]:
    """Compute the log-odds, and the probability that each pair of residues is aligned (forward-backward algorithm).

    The probabilities are the derivative of `log_partition` by the match weights, in half of its time and a third of its
    memory. They have no derivative that is of use.
    """
    total, matched = _forward(problem, gaps, mode, keep=True)
    assert matched is not None
    odds = _log(total) - log_empty(problem.x_lengths, problem.y_lengths, gaps, mode)
    return odds, _backward(problem, gaps, mode, total, matched)


def _forward(problem: Problem, gaps: Gaps, mode: Mode, *, keep: bool) -> tuple[_Scaled, _Scaled | None]:
    """Sum the weights of all alignments; return the sums, and those of the alignments up to each match if wanted."""
    log_weight, first, x_lengths, y_lengths = problem
    diagonals, batch, lanes = log_weight.shape
    factors = _factors(gaps, lanes)

    def step(carry, inputs):
        cells, before, total = carry
        d, log_weight, first, moved = inputs
        (i, j), row = _places(d, first, lanes), _row(first)
        every = cells.match + cells.y_gap[0] + cells.y_gap[1]  # what a gap in x may follow
        before_x, x_gap, exponent_above = (above(x, moved) for x in (every, cells.x_gap, cells.exponent))
        every = _Scaled(*(same(x, moved) for x in (every + cells.x_gap[0] + cells.x_gap[1], cells.exponent)))
        cells = _Cells(*(same(x, moved) for x in cells))
        before = _Scaled(*(above(x, moved) for x in before))
        start = _times(_overhang_weight(i, gaps, mode), _overhang_weight(j, gaps, mode))
        match = _times(_split(log_weight), _normalised(_plus(start, before)))
        exponent = jnp.maximum(jnp.maximum(match.exponent, cells.exponent), exponent_above)
        new = _Cells(
            match.value * _power(match.exponent - exponent),
            (factors.opening * factors.y_eased(cells.match, d - row) + factors.extension * cells.y_gap)
            * _power(cells.exponent - exponent),
            (factors.opening * factors.x_eased(before_x, row) + factors.extension * x_gap)
            * _power(exponent_above - exponent),
            exponent,
        )
        matched = _Scaled(new.match, exponent)
        total = _plus(total, _times(_end(problem, i, j, gaps, mode), matched))
        return (new, every, total), matched if keep else None

    initial = _Cells(*_no_cells(batch, lanes)), _nothing(batch, lanes), _nothing(batch, lanes)
    per_step = jnp.arange(diagonals), log_weight, first, moves(first)
    (*_, total), matched = jax.lax.scan(jax.checkpoint(step), initial, per_step)
    most = total.exponent.max(axis=1)
    total = _Scaled((total.value * _power(total.exponent - most[:, None])).sum(axis=1), most)
    return _plus(total, _split(log_empty(x_lengths, y_lengths, gaps, mode))), matched


def _backward(problem: Problem, gaps: Gaps, mode: Mode, total: _Scaled, matched: _Scaled) -> LaneWeights:
    """Sum the weights of what follows each cell, by state, from the end; return the probabilities of matches."""
    log_weight, first, *_ = problem
    diagonals, batch, lanes = log_weight.shape
    factors = _factors(gaps, lanes)
    moved = moves(first)
    if moved is not None:  # to the next antidiagonal
        moved = jnp.concatenate([moved[1:], jnp.zeros_like(moved[:1])])

    def step(carry, inputs):
        cells, next_match, match = carry  # of the next antidiagonal; and matches of the one behind it
        d, log_weight, first, moved, matched = inputs
        (i, j), row = _places(d, first, lanes), _row(first)
        y_gap, exponent_left = (_right(x, moved) for x in (cells.y_gap, cells.exponent))
        x_gap, exponent_above = (_below(x, moved) for x in (cells.x_gap, cells.exponent))
        match = _Scaled(*(_below(x, moved) for x in match))
        y_gap, x_gap, exponent_left, exponent_above, match = _computed_once(
            (y_gap, x_gap, exponent_left, exponent_above, match)
        )
        end = _end(problem, i, j, gaps, mode)
        top = jnp.maximum(jnp.maximum(match.exponent, end.exponent), jnp.maximum(exponent_left, exponent_above))
        after_match, ended = (x.value * _power(x.exponent - top) for x in (match, end))
        y_gap, x_gap = y_gap * _power(exponent_left - top), x_gap * _power(exponent_above - top)
        after_y = after_match + factors.x_eased(_both(factors.opening * x_gap), row + 1)
        after = ended + after_y + factors.y_eased(_both(factors.opening * y_gap), d - row + 1)
        after = _normalised(_Scaled(after, top))
        after, after_y, after_match, y_gap, x_gap = _computed_once((after, after_y, after_match, y_gap, x_gap))
        scale = _power(top - after.exponent)
        new = _Cells(
            after.value,
            (after_y + factors.extension * y_gap) * scale,
            (after_match + factors.extension * x_gap) * scale,
            after.exponent,
        )
        found = _times(matched, after)
        probability = (
            found.value * _power(jnp.minimum(found.exponent - total.exponent[:, None], 60)) / total.value[:, None]
        )
        match = _Scaled(*(_right(x, moved) for x in next_match))
        return (new, _times(_split(log_weight), after), match), probability

    initial = _Cells(*_no_cells(batch, lanes)), _nothing(batch, lanes), _nothing(batch, lanes)
    per_step = jnp.arange(diagonals), log_weight, first, moved, matched
    return jax.lax.scan(step, initial, per_step, reverse=True)[1]


class _Factors(NamedTuple):
    """Weights of gap costs.

    x_ease, y_ease: Factors of the openings at residues, with a margin for lanes beyond the ends; y from its end, so
        that the lanes of an antidiagonal are neighbours in both. The derivative of indices would be a scatter, which is
        many times as slow as the one of slices.
    """

    opening: Float[Array, "2 1 1"]
    extension: Float[Array, "2 1 1"]
    lanes: int
    x_ease: Float[Array, "batch _"] | None
    y_ease: Float[Array, "batch _"] | None

    def x_eased(self, weights: Float[Array, "batch lanes"], row: int | Int[Array, "*batch"]) -> Array:
        """Multiply by the factors of the residues of x, from the row of lane 0."""
        return weights if self.x_ease is None else weights * self._lanes_of(self.x_ease, row)

    def y_eased(self, weights: Float[Array, "batch lanes"], column: int | Int[Array, "*batch"]) -> Array:
        """Multiply by the factors of the residues of y, from the column of lane 0."""
        if self.y_ease is None:
            return weights
        last = self.y_ease.shape[1] - 2 * _margin(self.lanes) - 1
        return weights * self._lanes_of(self.y_ease, last - column)

    def _lanes_of(self, ease: Float[Array, "batch places"], start: int | Int[Array, "*batch"]) -> Array:
        def cut(ease, start):
            return jax.lax.dynamic_slice_in_dim(ease, start + _margin(self.lanes), self.lanes, axis=-1)

        return (jax.vmap(cut) if jnp.ndim(start) else cut)(ease, start)


def _factors(gaps: Gaps, lanes: int) -> _Factors:
    opening, extension = (jnp.exp(-cost)[:, None, None] for cost in (gaps.opening, gaps.extension))
    y_offset = None if gaps.y_offset is None else gaps.y_offset[:, ::-1]
    margins = (0, 0), (_margin(lanes), _margin(lanes))
    eases = (None if x is None else jnp.exp(-jnp.pad(x, margins)) for x in (gaps.x_offset, y_offset))
    return _Factors(opening, extension, lanes, *eases)


def _margin(lanes: int) -> int:
    """Return how far lanes reach beyond the residues, on the next antidiagonal too."""
    return lanes + 1


def _row(first: Int[Array, " batch"] | None) -> int | Int[Array, " batch"]:
    """Return the row of lane 0."""
    return 0 if first is None else first


def _places(d, first, lanes: int) -> tuple[Int[Array, "_ lanes"], Int[Array, "_ lanes"]]:
    """Return rows and columns of the lanes of an antidiagonal."""
    i = jnp.arange(lanes)[None] + (0 if first is None else first[:, None])
    return i, d - i


def _end(problem: Problem, i, j, gaps: Gaps, mode: Mode) -> _Scaled:
    """Return the weights of the overhangs behind a last match."""
    left = problem.x_lengths[:, None] - 1 - i, problem.y_lengths[:, None] - 1 - j
    return _times(*(_overhang_weight(overhang, gaps, mode) for overhang in left))


def _nothing(batch: int, lanes: int) -> _Scaled:
    return _Scaled(jnp.zeros((batch, lanes)), jnp.full((batch, lanes), _NOTHING))


def _no_cells(batch: int, lanes: int):
    zero, exponent = _nothing(batch, lanes)
    gap = jnp.zeros((2, batch, lanes))
    return zero, gap, gap, exponent


def _both(states: Float[Array, "2 batch lanes"]) -> Float[Array, "batch lanes"]:
    return states[0] + states[1]


def _log(x: _Scaled) -> Array:
    return jnp.log(x.value) + x.exponent * _LN2


def moves(first: First | None) -> Bool[Array, "diagonals batch 1"] | None:
    """Tell on which antidiagonals the lanes move on by a row; None where they never do."""
    return None if first is None else (jnp.diff(first, axis=0, prepend=first[:1]) > 0)[:, :, None]


def same(cells: Array, moved: Array | None) -> Array:
    """Shift cells of the antidiagonal before to the lanes of their rows."""
    return cells if moved is None else jnp.where(moved, _shifted(cells, -1), cells)


def above(cells: Array, moved: Array | None) -> Array:
    """Shift cells of the antidiagonal before to the lanes of the rows below."""
    return _shifted(cells, 1) if moved is None else jnp.where(moved, cells, _shifted(cells, 1))


def _right(cells: Array, moved: Array | None) -> Array:
    """Shift cells of the next antidiagonal to the lanes of their rows."""
    return cells if moved is None else jnp.where(moved, _shifted(cells, 1), cells)


def _below(cells: Array, moved: Array | None) -> Array:
    """Shift cells of the next antidiagonal to the lanes of the rows above."""
    return _shifted(cells, -1) if moved is None else jnp.where(moved, cells, _shifted(cells, -1))


def _shifted(x, by: int):
    """Shift lanes to the right; nothing leads to those that come in."""
    fill = jnp.asarray(0 if jnp.issubdtype(x.dtype, jnp.floating) else _NOTHING, x.dtype)
    return jax.lax.pad(x, fill, [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)])


def _split(log: Float[Array, "*shape"]) -> _Scaled:
    """Compute the exponential; 0 below -1e8 nats."""
    exists = log > -1e8
    exponent = jnp.where(exists, jnp.round(jax.lax.stop_gradient(log) / _LN2), 0)
    value = jnp.where(exists, jnp.exp(jnp.where(exists, log, 0) - exponent * _LN2), 0)
    return _Scaled(value, jnp.where(exists, exponent.astype(jnp.int32), _NOTHING))


def _plus(a: _Scaled, b: _Scaled) -> _Scaled:
    exponent = jnp.maximum(a.exponent, b.exponent)
    return _Scaled(a.value * _power(a.exponent - exponent) + b.value * _power(b.exponent - exponent), exponent)


def _times(a: _Scaled, b: _Scaled) -> _Scaled:
    return _Scaled(a.value * b.value, jnp.maximum(a.exponent + b.exponent, _NOTHING))


def _normalised(x: _Scaled) -> _Scaled:
    """Move the power of two of the values into the exponents."""
    power = (jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x.value), jnp.int32) >> 23) - 127
    return _Scaled(x.value * jax.lax.bitcast_convert_type((127 - power) << 23, jnp.float32), x.exponent + power)


def _power(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute 2 to an exponent of at most 0; 0 below the range of float32."""
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent + 127, 0) << 23, jnp.float32)


def _overhang_weight(length: Int[Array, "_ lanes"], gaps: Gaps, mode: Mode) -> _Scaled:
    if mode == "global":  # long overhangs may be beyond the range of float32
        return _split(_overhang(length, gaps, mode))
    nats = _overhang(length, gaps, mode)
    return _Scaled(jnp.exp(nats), jnp.zeros(length.shape, jnp.int32))


def _overhang(length: Int[Array, "*shape"], gaps: Gaps, mode: Mode) -> Float[Array, "*shape"]:
    """Compute the log-weight of an overhang; 0 where there is none."""
    if mode == "global":
        return _gap(length, gaps)
    return jnp.where(length > 0, -gaps.terminal if mode == "glocal" else 0.0, 0.0)


def _gap(length: Int[Array, "*shape"], gaps: Gaps) -> Float[Array, "*shape"]:
    """Compute the log-weight of a gap between matches, summed over its states; 0 where there is none."""
    of_state = [-o - (length - 1) * e for o, e in zip(gaps.opening, gaps.extension, strict=True)]
    return jnp.where(length > 0, jnp.logaddexp(*of_state), 0.0)
