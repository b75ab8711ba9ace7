"""Which pairs there are, and how often each is drawn: counts by family and length bucket, without listing them."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int32, Int64

from data import vocab
from data.families import BadRecordError, Family


@runtime_checkable
class Families(Protocol):
    """The families of one split by index; a list will do. Must be picklable if there are worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Family: ...


@dataclasses.dataclass(frozen=True)
class LengthIndex:
    """All pairs of a split, counted by family and length bucket, each reachable by its rank.

    The rows of a family that hold any residue stand in order of length. Two of them at places a > b have the rank
    a (a - 1) / 2 + b. The longer row decides the bucket, so the pairs of one bucket are one run of ranks.

    Attributes:
      rows: Row numbers by length, family after family.
      first: Where each family begins in `rows`.
      ranks: Pairs of bucket k are those with ranks[:, k] <= rank < ranks[:, k + 1].
      mass: How many of the (capped) pairs of a family fall into each bucket.
      left_out: Share of the capped pairs that is longer than the largest bucket, 0 to 1.
      bad: What is wrong with each damaged record; its family counts as one without rows.
    """

    rows: Int32[np.ndarray, " rows"]
    first: Int64[np.ndarray, " families"]
    ranks: Int64[np.ndarray, "families edges"]
    mass: Float64[np.ndarray, "families buckets"]
    left_out: float
    bad: tuple[str, ...] = ()

    @classmethod
    def build(
        cls, families: Families, buckets: Sequence[int], pairs_per_family: int, max_bad: int = 0
    ) -> "LengthIndex":
        """Reads every family once.

        Raises:
          BadRecordError: more than max_bad records are damaged.
          ValueError: there is no family, or no pair that fits into the largest bucket.
        """
        if not len(families):
            raise ValueError("families: the split is empty; a split that training reads needs at least one family")
        bad: list[str] = []
        rows, edges = zip(
            *(_rows_by_length(family, buckets) for family in readable(families, max_bad, bad)), strict=True
        )
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
        return cls(np.concatenate(rows), np.cumsum(sizes) - sizes, ranks, mass, float(left_out), tuple(bad))

    def draw(
        self, family: Int64[np.ndarray, "*shape"], bucket: int, rng: np.random.Generator
    ) -> Int32[np.ndarray, "*shape 3"]:
        """Ids of pairs, uniform over those of each family in the bucket, in either order."""
        longer, shorter = _unrank(rng.integers(self.ranks[family, bucket], self.ranks[family, bucket + 1]))
        swap = rng.random(family.shape) < 0.5
        x, y = (self.rows[self.first[family] + np.where(swap, a, b)] for a, b in ((shorter, longer), (longer, shorter)))
        return np.stack([family, x, y], axis=-1).astype(np.int32)


def readable(families: Families, max_bad: int, bad: list[str]) -> Iterator[Family | None]:
    """All families in order, None for a damaged record, of which `bad` is told.

    Raises:
      BadRecordError: the one after max_bad of them.
    """
    for n in range(len(families)):
        try:
            yield families[n]
        except BadRecordError as error:
            bad.append(str(error))
            if len(bad) > max_bad:
                raise BadRecordError(
                    f"{error}; build or copy the data again, or leave such records out with a data.max_bad_records "
                    f"above {max_bad}"
                ) from error
            yield None


def row_lengths(family: Family) -> Int64[np.ndarray, " rows"]:
    """Residues of every row."""
    return vocab.is_residue(family.alignment).sum(axis=1)


def _rows_by_length(
    family: Family | None, buckets: Sequence[int]
) -> tuple[Int32[np.ndarray, " rows"], Int64[np.ndarray, " edges"]]:
    """Rows with residues, shortest first, and how many of them fit into no bucket, the first bucket, the second, ..."""
    lengths = np.zeros(0, np.int64) if family is None else row_lengths(family)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    return order.astype(np.int32), np.searchsorted(lengths[order], [0, *buckets], side="right")


def _rank(longer: Int64[np.ndarray, "*shape"], shorter: Int64[np.ndarray, "*shape"] | int) -> np.ndarray:
    """Rank of the pair of rows at places longer > shorter; with shorter = 0: how many pairs come before `longer`."""
    return longer * (longer - 1) // 2 + shorter


def _unrank(rank: Int64[np.ndarray, "*shape"]) -> tuple[Int64[np.ndarray, "*shape"], Int64[np.ndarray, "*shape"]]:
    """Inverse of `_rank`, exact to 2^31 rows; from 2^27 on the root may be rounded up to the next row."""
    longer = ((1 + np.sqrt(1 + 8.0 * rank)) / 2).astype(np.int64)
    longer -= _rank(longer, 0) > rank
    return longer, rank - _rank(longer, 0)


def check_buckets(buckets: Sequence[int]) -> None:
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
        raise ValueError(f"buckets: {tuple(buckets)} was given, allowed are positive lengths in ascending order")
