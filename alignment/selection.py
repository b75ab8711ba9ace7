"""Choose which alignments are written: all, those that are probable enough, or the most probable ones of each query."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from alignment.columns import Aligned
from alignment.pairing import work_of
from alignment.sequences import Record


class Settled(NamedTuple):
    """Pairs, next in the order of the input, of which it is known whether they are written."""

    query: Record
    pairs: int
    work: float  # that they took, in the unit of `pairing.work_of`
    left_out: int  # among them, because they are not probable enough
    kept: list[Aligned]


def settled(alignments: Iterable[Aligned], *, least: float = 0.0, top: int | None = None) -> Iterator[Settled]:
    """Yield each alignment, or with `top` the alignments of each query x, as soon as it is known what is written.

    Args:
        alignments: Alignments in the order of the input. With `top`, those of a query follow each other.
        least: Probability of homology below which an alignment is left out.
        top: Number of alignments of each query that are kept, the most probable first; of equal ones, those of higher
            log-odds first, else in their order. No more than these are held in memory. None for all, in the order of
            the input.

    Raises:
        ValueError: if probabilities are asked for and the model gives none.
    """
    for query, of_query in itertools.groupby(alignments, key=lambda aligned: aligned.x):
        if top is None:
            for aligned in of_query:
                keep = _known(aligned) >= least if least else True
                yield Settled(query, 1, work_of(aligned.x, aligned.y), int(not keep), [aligned] if keep else [])
        else:
            yield _best(query, of_query, least, top)


def _best(query: Record, alignments: Iterator[Aligned], least: float, top: int) -> Settled:
    pairs = left_out = 0
    work = 0.0

    def probable() -> Iterator[Aligned]:
        nonlocal pairs, work, left_out
        for aligned in alignments:
            pairs += 1
            work += work_of(aligned.x, aligned.y)
            if _known(aligned) < least:
                left_out += 1
            else:
                yield _alone(aligned)

    kept = heapq.nlargest(top, probable(), key=lambda aligned: (aligned.probability, aligned.log_odds))
    return Settled(query, pairs, work, left_out, kept)


def _alone(aligned: Aligned) -> Aligned:
    """Copy what may be a view of a whole batch, which would stay in memory."""
    confidence, x_alone, y_alone = (of.copy() for of in (aligned.confidence, aligned.x_alone, aligned.y_alone))
    return aligned._replace(confidence=confidence, x_alone=x_alone, y_alone=y_alone)


def _known(aligned: Aligned) -> float:
    if math.isnan(aligned.probability):
        raise ValueError(
            "--top and --min-probability need a model that tells the probability of homology; this has none"
        )
    return aligned.probability
