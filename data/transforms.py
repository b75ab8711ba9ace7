"""Sequence pairs cut out of a multiple alignment."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, UInt8

from data import vocab

NO_TARGET = -1
IDENTITY_EDGES = (0.15, 0.20, 0.25, 0.30, 0.40, 0.60)  # of the identity bins; a bin holds its lower edge

Tokens = Int32[np.ndarray, " _"]  # of one sequence


class Pair(NamedTuple):
    """Two unaligned sequences and the reference alignment between them."""

    x: Int32[np.ndarray, " x_length"]  # tokens
    y: Int32[np.ndarray, " y_length"]  # tokens
    target: Int32[np.ndarray, " x_length"]  # position in y aligned with x_i, or NO_TARGET


def pair(alignment: UInt8[np.ndarray, "rows columns"], i: int, j: int, insert_states: bool = False) -> Pair:
    """Cut rows i and j out of an alignment (ASCII, as in the file), with the reference alignment between them.

    Two residues are aligned where they share a column, in either case: curators align a seed in all its columns, and
    some seeds are mostly lower case (SMC_N: 78 % of its residues). In alignments made by a profile HMM (Pfam-A.full),
    lower case marks insert states, whose columns only stack residues. With `insert_states`, lower-case residues are
    part of the sequences, and have no target.

    Raises ValueError if i or j is no row of the alignment, or holds a symbol that is no residue and no gap.
    """
    for name, row in (("i", i), ("j", j)):
        if not 0 <= row < len(alignment):
            raise ValueError(f"{name}: row {row} was given, the alignment has rows 0..{len(alignment) - 1}")
    symbols = alignment[[i, j]]
    tokens = vocab.aligned_tokens(symbols)
    (x_row, y_row), (x_occupied, y_occupied) = tokens, tokens != vocab.PAD
    shared = vocab.can_be_aligned(symbols, insert_states).all(axis=0)
    target = np.full(np.count_nonzero(x_occupied), NO_TARGET, np.int32)
    target[np.cumsum(x_occupied)[shared] - 1] = np.cumsum(y_occupied)[shared] - 1
    return Pair(x_row[x_occupied].astype(np.int32), y_row[y_occupied].astype(np.int32), target)


def sequence(alignment: UInt8[np.ndarray, "rows columns"], row: int) -> Tokens:
    """Return the tokens of a row of an alignment, without its gaps."""
    tokens = vocab.aligned_tokens(alignment[row])
    return tokens[tokens != vocab.PAD].astype(np.int32)


def identities(
    alignment: UInt8[np.ndarray, "rows columns"], rows: Int[np.ndarray, "pairs 2"], insert_states: bool = False
) -> Float64[np.ndarray, " pairs"]:
    """Compute `pair_identity` of many pairs of rows at once."""
    symbols = alignment[rows]  # [pairs, 2, columns]
    tokens = vocab.aligned_tokens(symbols)
    aligned = vocab.can_be_aligned(symbols, insert_states).all(axis=1)
    same = aligned & (tokens[:, 0] == tokens[:, 1]) & (tokens[:, 0] != vocab.X)
    count = aligned.sum(axis=1)
    return np.where(count, same.sum(axis=1), np.nan) / np.maximum(count, 1)


def unaligned(x: Int32[np.ndarray, " x_length"], y: Int32[np.ndarray, " y_length"]) -> Pair:
    """Make a pair whose sequences have nothing to do with each other."""
    return Pair(x, y, np.full(len(x), NO_TARGET, np.int32))


def add_flanks(core: Pair, x_ends: tuple[Tokens, Tokens], y_ends: tuple[Tokens, Tokens]) -> Pair:
    """Extend both sequences by residues before and after the core, which are aligned with none."""
    shift = len(y_ends[0])
    target = np.where(core.target == NO_TARGET, NO_TARGET, core.target + shift)
    before, after = (np.full(len(end), NO_TARGET) for end in x_ends)
    return Pair(
        np.concatenate([x_ends[0], core.x, x_ends[1]]),
        np.concatenate([y_ends[0], core.y, y_ends[1]]),
        np.concatenate([before, target, after]).astype(np.int32),
    )


def crop(whole: Pair, draws: Float64[np.ndarray, "3"]) -> Pair:
    """Cut off up to half of one sequence at one end; return the whole pair if no aligned residue would be left.

    The sequences of a family begin and end alike, so their alignments run along the diagonal. Users' pairs need not.
    `draws`, uniform in [0, 1), choose the sequence, the end and the length.
    """
    of_x, at_start = draws[:2] < 0.5
    x_last, y_last = len(whole.x), len(whole.y)
    length = x_last if of_x else y_last
    cut = int(draws[2] * length / 2)
    first, last = (cut, length) if at_start else (0, length - cut)
    cropped = _part(whole, first, last, 0, y_last) if of_x else _part(whole, 0, x_last, first, last)
    return cropped if (cropped.target != NO_TARGET).any() else whole


def stagger(whole: Pair, draws: Float64[np.ndarray, "3"]) -> Pair:
    """Cut x = A B and y = B C out of a pair: one sequence loses its end, the other its beginning.

    `draws`, uniform in [0, 1), choose which sequence loses its end, and where: B begins among the first half of the
    aligned residues, and ends among the second half. A pair with fewer than two aligned residues stays whole.
    """
    aligned = aligned_pairs(whole.target)
    if len(aligned) < 2:
        return whole
    half = len(aligned) // 2
    first, last = aligned[[int(draws[1] * half), half + int(draws[2] * (len(aligned) - half))]].tolist()
    if draws[0] < 0.5:
        return _part(whole, 0, last[0] + 1, first[1], len(whole.y))
    return _part(whole, first[0], len(whole.x), 0, last[1] + 1)


def substitute(tokens: Tokens, rate: float, rng: np.random.Generator) -> Tokens:
    """Replace residues, each with probability `rate`, by another of the twenty, by its odds in BLOSUM62."""
    chosen = (rng.random(len(tokens)) < rate) & (tokens < vocab.X)
    drawn = rng.random(np.count_nonzero(chosen))
    found = (_SUBSTITUTES[tokens[chosen] - 1] < drawn[:, None]).sum(axis=1) + 1
    result = tokens.copy()
    result[chosen] = np.minimum(found, len(vocab.RESIDUES))
    return result


def _substitutes() -> Float64[np.ndarray, "20 20"]:
    """Return, for each of the twenty, cumulative probabilities of the residues that replace it."""
    odds = 2.0 ** (vocab.blosum62()[1:21, 1:21] / 2)  # the scores are in half bits
    np.fill_diagonal(odds, 0)
    return np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)


_SUBSTITUTES = _substitutes()


def _part(whole: Pair, x_first: int, x_last: int, y_first: int, y_last: int) -> Pair:
    """Cut out positions x_first to x_last - 1 of x, and y_first to y_last - 1 of y."""
    target = whole.target[x_first:x_last]
    inside = (target >= y_first) & (target < y_last)
    kept = np.where(inside, target - y_first, NO_TARGET).astype(np.int32)
    return Pair(whole.x[x_first:x_last], whole.y[y_first:y_last], kept)


def aligned_pairs(target: Int32[np.ndarray, " x_length"]) -> Int32[np.ndarray, "aligned 2"]:
    """Return the reference alignment as rows (position in x, position in y), in order."""
    aligned = np.flatnonzero(target != NO_TARGET)
    return np.stack([aligned, target[aligned]], axis=1).astype(np.int32)


def pair_identity(pair: Pair) -> float:
    """Return the share of aligned residue pairs that are of one amino acid; NaN if nothing is aligned.

    X, any ambiguous residue, equals nothing, itself included.
    """
    aligned = aligned_pairs(pair.target)
    if not len(aligned):
        return float("nan")
    x, y = pair.x[aligned[:, 0]], pair.y[aligned[:, 1]]
    return float(np.mean((x == y) & (x != vocab.X)))
