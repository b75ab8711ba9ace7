"""Random draws of pairs from a split, by counts of pairs a family and length bucket; the pairs are never listed."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int32, Int64

from data import vocab
from data.families import BadRecordError, Family


@runtime_checkable
class Families(Protocol):
    """The families of one split by index, for example a list. Must be picklable if there are worker processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Family: ...


@dataclasses.dataclass(frozen=True)
class LengthIndex:
    """All pairs of a split, counted by family and length bucket; a pair of a family is found by its rank.

    The rows of a family that hold any residue are sorted by length. Two of them at places a > b have the rank
    a (a - 1) / 2 + b. The longer row decides the bucket, so the pairs of one bucket are one range of ranks.
    """

    rows: Int32[np.ndarray, " rows"]  # row numbers by length, family after family
    first: Int64[np.ndarray, " families"]  # place in `rows` where each family begins
    ranks: Int64[np.ndarray, "families edges"]  # bucket k has the ranks from ranks[:, k] to ranks[:, k + 1] - 1
    mass: Float64[np.ndarray, "families buckets"]  # pairs, scaled so that a family has at most `pairs_per_family`
    left_out: float  # share of these pairs that are longer than the largest bucket, 0 to 1
    bad: tuple[str, ...] = ()  # a message for each damaged record; its family counts as one without rows
    content: str = ""  # hash of all alignments in order

    @classmethod
    def build(
        cls, families: Families, buckets: Sequence[int], pairs_per_family: int, max_bad: int = 0
    ) -> "LengthIndex":
        """Count the pairs; reads every family once.

        Raises BadRecordError if more than max_bad records are damaged, and ValueError if there is no family, or no pair
        that fits into the largest bucket.
        """
        if not len(families):
            raise ValueError("families: the split is empty; training needs at least one family")
        bad: list[str] = []
        digest = hashlib.sha256()
        rows, edges = [], []
        for family in readable(families, max_bad, bad):
            digest.update(b"damaged" if family is None else _packed(family))
            of_family = _rows_by_length(family, buckets)
            rows.append(of_family[0])
            edges.append(of_family[1])
        sizes = np.array([len(r) for r in rows])
        ranks = _rank(np.stack(edges), 0)
        total = _rank(sizes, 0)
        weight = np.minimum(total, pairs_per_family)
        mass = np.diff(ranks) * (weight / np.maximum(total, 1))[:, None]
        if not mass.any():
            raise ValueError(
                f"buckets: no pair of the {len(families)} families fits into the largest, {buckets[-1]}; "
                "give larger buckets, or families with at least two sequences"
            )
        left_out = 1 - mass.sum() / weight.sum()
        first, content = np.cumsum(sizes) - sizes, digest.hexdigest()[:16]
        return cls(np.concatenate(rows), first, ranks, mass, float(left_out), tuple(bad), content)

    def draw(
        self, family: Int64[np.ndarray, "*shape"], bucket: int, rng: np.random.Generator
    ) -> Int32[np.ndarray, "*shape 4"]:
        """Draw one pair of each `family`, uniform over its pairs in the bucket, in either order; returns their ids."""
        longer, shorter = _unrank(rng.integers(self.ranks[family, bucket], self.ranks[family, bucket + 1]))
        swap = rng.random(family.shape) < 0.5
        x, y = (self.rows[self.first[family] + np.where(swap, a, b)] for a, b in ((shorter, longer), (longer, shorter)))
        return np.stack([family, x, family, y], axis=-1).astype(np.int32)


def readable(families: Families, max_bad: int, bad: list[str]) -> Iterator[Family | None]:
    """Yield all families in order, None for a damaged record, whose message is appended to `bad`.

    Raises BadRecordError if more than max_bad records are damaged.
    """
    for n in range(len(families)):
        try:
            yield families[n]
        except BadRecordError as error:
            bad.append(str(error))
            if len(bad) > max_bad:
                advice = "build or copy the data again, or leave such records out with a data.max_bad_records above"
                raise BadRecordError(f"{error}; {advice} {max_bad}") from error
            yield None


def row_lengths(family: Family) -> Int64[np.ndarray, " rows"]:
    """Return the number of residues of every row."""
    return vocab.is_residue(family.alignment).sum(axis=1)


def _packed(family: Family) -> bytes:
    """Return all that pairs of a family are made of."""
    return repr(family.alignment.shape).encode() + family.alignment.tobytes()


def _rows_by_length(
    family: Family | None, buckets: Sequence[int]
) -> tuple[Int32[np.ndarray, " rows"], Int64[np.ndarray, " edges"]]:
    """Return the rows with residues, shortest first, and how many are within length 0, buckets[0], buckets[1], ..."""
    lengths = np.zeros(0, np.int64) if family is None else row_lengths(family)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    return order.astype(np.int32), np.searchsorted(lengths[order], [0, *buckets], side="right")


def _rank(longer: Int64[np.ndarray, "*shape"], shorter: Int64[np.ndarray, "*shape"] | int) -> np.ndarray:
    """Return the rank of the pair at places longer > shorter; with shorter = 0, the number of pairs before `longer`."""
    return longer * (longer - 1) // 2 + shorter


def _unrank(rank: Int64[np.ndarray, "*shape"]) -> tuple[Int64[np.ndarray, "*shape"], Int64[np.ndarray, "*shape"]]:
    """Return (longer, shorter) of a rank, exact for up to 2^31 rows."""
    longer = ((1 + np.sqrt(1 + 8.0 * rank)) / 2).astype(np.int64)
    longer -= _rank(longer, 0) > rank  # from 2^27 rows on, the root may be rounded up to the next row
    return longer, rank - _rank(longer, 0)


def check_buckets(buckets: Sequence[int]) -> None:
    """Raise ValueError unless the lengths are positive and ascending."""
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
        raise ValueError(f"buckets: {tuple(buckets)} was given, allowed are positive lengths in ascending order")
