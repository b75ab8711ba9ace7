"""Baselines to compare a model with: two diagonals that never look at a residue, and Needleman-Wunsch."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import parasail
from jaxtyping import Float64, Int32

from data import vocab
from data.transforms import NO_TARGET, Pair

_INSERT, _DELETE = 1, 2  # operation codes of a packed CIGAR (SAM specification, 4.2): residues of x alone, of y alone


class Placement(NamedTuple):
    """The alignment that a baseline proposes for a pair."""

    positions: Float64[np.ndarray, " x_length"]  # place in y of each residue of x, compared with the barycenter
    match: Int32[np.ndarray, " x_length"]  # hard alignment: position in y, or -1


def diagonal(pair: Pair) -> Placement:
    """Place x_i at j = i. Past the end of y, that is still a place, but there is no residue to align with."""
    rows = np.arange(len(pair.x))
    match = np.where(rows < len(pair.y), rows, NO_TARGET)
    return Placement(rows.astype(np.float64), match.astype(np.int32))


def scaled_diagonal(pair: Pair) -> Placement:
    """Place x_i at c(i) = (i + 1/2) n_y / n_x - 1/2, and align it with the nearest residue of y.

    Where x is longer, several x_i share a residue of y: a rule without gaps cannot say which of them are unaligned.
    """
    numerator = (2 * np.arange(len(pair.x)) + 1) * len(pair.y)
    positions = numerator / (2 * len(pair.x)) - 0.5
    # floor(c + 1/2) in integer arithmetic: no rounding error can leave 0..n_y - 1
    return Placement(positions, (numerator // (2 * len(pair.x))).astype(np.int32))


def nw_blosum62(pair: Pair) -> Placement:
    """Align globally: Needleman-Wunsch with BLOSUM62 and affine gaps of 11 and 1, also at the ends.

    An unaligned residue of x is placed between its aligned neighbours by linear interpolation, and beside its only
    neighbour at an end. Where no residue is aligned, all are placed on the scaled diagonal. Raises ValueError if a
    sequence is empty.
    """
    return nw_with_score(pair)[0]


def nw_with_score(pair: Pair) -> tuple[Placement, int]:
    """Return the alignment of `nw_blosum62` and its score, in units of BLOSUM62."""
    if not (len(pair.x) and len(pair.y)):
        raise ValueError(f"pair: lengths {len(pair.x)} and {len(pair.y)} were given, both must be at least 1")
    match, score = trace_match(parasail.nw_trace_striped_sat, pair)
    rows = np.flatnonzero(match != NO_TARGET)
    if not rows.size:
        return Placement(scaled_diagonal(pair).positions, match), score
    return Placement(np.interp(np.arange(len(match)), rows, match[rows]), match), score


def trace_match(algorithm: Callable, pair: Pair) -> tuple[Int32[np.ndarray, " x_length"], int]:
    """Align by a trace function of parasail with BLOSUM62 and gaps of 11 and 1; return the alignment and its score."""
    result = algorithm(
        vocab.decode(pair.x), vocab.decode(pair.y), vocab.FIRST_GAP, vocab.FURTHER_GAP, parasail.blosum62
    )
    cigar = np.asarray(result.cigar.seq, np.uint32)
    operations = np.repeat(cigar & 15, cigar >> 4)
    x_step, y_step = operations != _DELETE, operations != _INSERT
    match, both = np.full(len(pair.x), NO_TARGET, np.int32), x_step & y_step
    first_x, first_y = result.cigar.beg_query, result.cigar.beg_ref  # 0 unless residues before are left out of it
    match[first_x + np.cumsum(x_step)[both] - 1] = first_y + np.cumsum(y_step)[both] - 1
    return match, result.score


BASELINES = {"diagonal": diagonal, "scaled_diagonal": scaled_diagonal, "nw_blosum62": nw_blosum62}
