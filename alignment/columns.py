"""Alignments of two sequences, column by column, and their scores.

The confidence of a column is the probability that its two residues are aligned, or that its only residue is aligned
with none.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignment.sequences import Record
from data import vocab

GAP = "-"
NO_POSITION = -1


class Aligned(NamedTuple):
    """Two sequences and their alignment, an `alignment.inference.PairAlignment`."""

    id: str
    x: Record
    y: Record
    pairs: Int[np.ndarray, "aligned 2"]
    confidence: Float[np.ndarray, " aligned"]
    probability: float  # that x and y are homologous; not a number where nothing is known about it
    x_alone: Float[np.ndarray, " x_length"]
    y_alone: Float[np.ndarray, " y_length"]
    log_odds: float = math.nan  # nats of all alignments over no alignment


class Columns(NamedTuple):
    """An alignment column by column; of two neighbouring gaps, the unaligned residues of x come first."""

    i: Int[np.ndarray, " columns"]  # position in x, or NO_POSITION
    j: Int[np.ndarray, " columns"]
    x: str  # residues and gaps
    y: str
    confidence: Float[np.ndarray, " columns"]


def columns_of(aligned: Aligned) -> Columns:
    """Return the columns of an alignment, gaps included."""
    places: list[tuple[int, int]] = []
    x_next = y_next = 0
    for x_match, y_match in [*aligned.pairs.tolist(), (len(aligned.x.residues), len(aligned.y.residues))]:
        places += [(n, NO_POSITION) for n in range(x_next, x_match)]
        places += [(NO_POSITION, n) for n in range(y_next, y_match)]
        places.append((x_match, y_match))
        x_next, y_next = x_match + 1, y_match + 1
    i, j = np.array(places[:-1], int).reshape(-1, 2).T
    confidence = np.where(i == NO_POSITION, aligned.y_alone[j], aligned.x_alone[i])
    confidence[(i != NO_POSITION) & (j != NO_POSITION)] = aligned.confidence
    return Columns(i, j, _written(aligned.x, i), _written(aligned.y, j), confidence)


def _written(record: Record, positions: np.ndarray) -> str:
    return "".join(GAP if n == NO_POSITION else record.residues[n] for n in positions)


def unpaired(columns: Columns) -> Bool[np.ndarray, " columns"]:
    """Return which columns hold a gap."""
    return (columns.i == NO_POSITION) | (columns.j == NO_POSITION)


def substitutions(columns: Columns) -> Int[np.ndarray, " columns"]:
    """Return the BLOSUM62 score of each column, 0 for a gap."""
    x, y = (vocab.encode(letters.replace(GAP, "X").encode()) for letters in (columns.x, columns.y))
    return vocab.blosum62()[x, y]


def score_of(columns: Columns) -> int:
    """Return the score of this alignment in Needleman-Wunsch, end gaps included."""
    total = int(substitutions(columns).sum())
    for positions in (columns.i, columns.j):
        gap = positions == NO_POSITION
        openings = int((np.diff(gap, prepend=False) & gap).sum())
        total -= vocab.FURTHER_GAP * int(gap.sum()) + (vocab.FIRST_GAP - vocab.FURTHER_GAP) * openings
    return total
