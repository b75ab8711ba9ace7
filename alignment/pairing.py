"""Choose which sequences are aligned with which; pairs are made one by one, so millions of them need no memory."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alignment import sequences
from alignment.sequences import OnBad, PairRecord, PairsOfIds, Record, pair_of

_FILES, _TABLE = ("the first FASTA file", "the second FASTA file"), "the table of --pairs"
_USUAL_LENGTH = 256  # residues


class Work(NamedTuple):
    """Pairs to align, and what they are made of."""

    pairs: Iterator[PairRecord]
    total: int
    queries: Sequence[Record]  # different x, in their order
    largest: Iterable[PairRecord]  # the pair that takes most memory is among them
    inputs: Sequence[tuple[str, Iterable]]  # files as messages name them, and the records, pairs or places in them


def of_files(
    paths: Sequence[str], on_bad: OnBad | None = None, *, every: bool = False, both_ways: bool = False
) -> Work:
    """Pair the sequences of one FASTA file or two: the first with all others, or each of one with each of the other.

    Args:
        paths: Names of one file or two.
        on_bad: Takes the error of each record that cannot be read, as `sequences.read_fasta` does.
        every: Pair each sequence of the one file with each later one.
        both_ways: Pair it with each earlier one too, so that each sequence is a query x beside all others.
    """
    records = [sequences.read_fasta(path, on_bad) for path in paths]
    inputs, first = list(zip(_FILES, records, strict=False)), records[0]
    if len(records) == 1 and len(first) < 2:
        raise ValueError(f"{paths[0]} holds one sequence; give a second file, or a file with several sequences")
    if not every:
        xs, ys = records if len(records) == 2 else (first[:1], first[1:])
        product = itertools.product(_extremes(xs), _extremes(ys))
        return _work(itertools.product(xs, ys), len(xs) * len(ys), xs, product, inputs)
    total, largest = math.comb(len(first), 2), itertools.combinations(_extremes(first), 2)
    if both_ways:
        return _work(itertools.permutations(first, 2), 2 * total, first, largest, inputs)
    return _work(itertools.combinations(first, 2), total, first[:-1], largest, inputs)


def _work(
    pairs: Iterable[tuple[Record, Record]],
    total: int,
    queries: Sequence[Record],
    largest: Iterable[tuple[Record, Record]],
    inputs: Sequence[tuple[str, Iterable]],
) -> Work:
    return Work(itertools.starmap(pair_of, pairs), total, queries, [pair_of(*sides) for sides in largest], inputs)


def _extremes(records: list[Record]) -> list[Record]:
    """Return the shortest sequence and the two longest: memory grows with lengths, and with their difference."""
    by_length = sorted(records, key=lambda record: len(record.residues))
    return by_length if len(by_length) < 3 else [by_length[0], *by_length[-2:]]


def of_table(path: str, fasta: Sequence[str], on_bad: OnBad | None = None, *, by_query: bool = False) -> Work:
    """Pair sequences as a table says: a table of sequences, or one of ids if there are FASTA files.

    With `by_query`, pairs of a query x follow each other, in the order in which queries are first named.
    """
    if not fasta:
        return _of_sequences(path, on_bad, by_query=by_query)
    records = [sequences.read_fasta(name, on_bad) for name in fasta]
    pairs = sequences.read_pairs_of_ids(path, records[0], records[-1], on_bad)
    queries, first = np.unique(pairs.places[:, 0], return_index=True)
    order = np.argsort(first)
    if by_query:
        rank = np.empty(len(pairs.xs), int)
        rank[queries[order]] = np.arange(len(queries))
        pairs = PairsOfIds(pairs.xs, pairs.ys, pairs.places[np.argsort(rank[pairs.places[:, 0]], kind="stable")])
    named = [pairs.xs[n] for n in queries[order]]
    return Work(iter(pairs), len(pairs), named, pairs, [*zip(_FILES, records, strict=False), (_TABLE, pairs.places)])


def _of_sequences(path: str, on_bad: OnBad | None, *, by_query: bool) -> Work:
    pairs = sequences.read_pairs(path, on_bad)
    place = {pair.x: n for n, pair in reversed(list(enumerate(pairs)))}
    if by_query:
        pairs.sort(key=lambda pair: place[pair.x])
    return Work(iter(pairs), len(pairs), sorted(place, key=lambda x: place[x]), pairs, [(_TABLE, pairs)])


def chunks(pairs: Iterable[PairRecord], size: int) -> Iterator[list[PairRecord]]:
    """Divide pairs into lists of about the same work, `size` pairs of usual length or fewer longer ones.

    Which pairs are in a chunk depends on the pairs alone, so that a run which continues another finds the same.
    """
    chunk, work = list[PairRecord](), 0.0
    for pair in pairs:
        chunk.append(pair)
        work += work_of(pair.x, pair.y)
        if work >= size:
            yield chunk
            chunk, work = [], 0.0
    if chunk:
        yield chunk


def work_of(x: Record, y: Record) -> float:
    """Return about how long an alignment takes, 1 for sequences of usual length or shorter ones."""
    return max(1.0, len(x.residues) * len(y.residues) / _USUAL_LENGTH**2)


def digest(rows: Iterable) -> str:
    """Return the SHA-256 of records, pairs or places."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, default=np.ndarray.tolist).encode() + b"\n")
    return found.hexdigest()
