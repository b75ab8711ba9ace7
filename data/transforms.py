"""Sequence pairs cut out of a multiple alignment."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, UInt8

from data import vocab

NO_TARGET = -1

Tokens = Int32[np.ndarray, " _length"]


class Pair(NamedTuple):
    """Two unaligned sequences and the reference alignment between them."""

    x: Int32[np.ndarray, " x_length"]  # tokens
    y: Int32[np.ndarray, " y_length"]  # tokens
    target: Int32[np.ndarray, " x_length"]  # position in y aligned with x_i, or NO_TARGET


def pair(alignment: UInt8[np.ndarray, "rows columns"], i: int, j: int) -> Pair:
    """Cut rows i and j out of an alignment (ASCII, as in the file), with the reference alignment between them.

    Two residues are aligned where they share a column, in either case: curators align a seed in all its columns, and
    some seeds are mostly lower case (SMC_N: 78 % of its residues). In alignments made by a profile HMM (Pfam full),
    lower case marks insert states, whose columns only stack residues; mask them first.

    Raises ValueError if i or j is no row of the alignment, or holds a symbol that is no residue and no gap.
    """
    for name, row in (("i", i), ("j", j)):
        if not 0 <= row < len(alignment):
            raise ValueError(f"{name}: row {row} was given, the alignment has rows 0..{len(alignment) - 1}")
    x_row, y_row = alignment[i], alignment[j]
    x_occupied, y_occupied = ~np.isin([x_row, y_row], np.frombuffer(vocab.GAPS, np.uint8))
    shared = x_occupied & y_occupied
    target = np.full(x_occupied.sum(), NO_TARGET, np.int32)
    target[np.cumsum(x_occupied)[shared] - 1] = np.cumsum(y_occupied)[shared] - 1
    return Pair(vocab.encode(x_row[x_occupied]), vocab.encode(y_row[y_occupied]), target)


def sequence(alignment: UInt8[np.ndarray, "rows columns"], row: int) -> Int32[np.ndarray, " length"]:
    """Return the tokens of a row of an alignment, without its gaps."""
    symbols = alignment[row]
    return vocab.encode(symbols[~np.isin(symbols, np.frombuffer(vocab.GAPS, np.uint8))])


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
    length = len(whole.x if of_x else whole.y)
    cut = int(draws[2] * length / 2)
    first, last = (cut, length) if at_start else (0, length - cut)
    if of_x:
        cropped = Pair(whole.x[first:last], whole.y, whole.target[first:last])
    else:
        inside = (whole.target >= first) & (whole.target < last)
        target = np.where(inside, whole.target - first, NO_TARGET).astype(np.int32)
        cropped = Pair(whole.x, whole.y[first:last], target)
    return cropped if (cropped.target != NO_TARGET).any() else whole


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
