"""Random draws of pairs from one split of one or several data sets; the pairs are never listed."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int32, Int64

from data.index import Families, SplitIndex

_FITTING_STEPS = 200  # of the shares of data sets and identity bins; each takes microseconds

Mass = Float64[np.ndarray, "families buckets *bins"]


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
    units: Int64[np.ndarray, " families"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    identity: Float64[np.ndarray, "families bins"] = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    parts: tuple[slice, ...] = ()  # families of each data set

    @classmethod
    def build(
        cls, families: Families, buckets: Sequence[int], pairs_per_family: int, max_bad: int = 0
    ) -> "LengthIndex":
        """Count the pairs of a split, or of each `part` of a mixture.

        Raises BadRecordError if more than max_bad records are damaged, and ValueError if there is no family, or no pair
        that fits into the largest bucket.
        """
        parts = getattr(families, "parts", [families])
        weights = getattr(families, "weights", [1.0])
        found = [cls._of_one(SplitIndex.of(part, max_bad), buckets, pairs_per_family) for part in parts]
        return found[0] if len(found) == 1 else _joined(found, np.array(weights) / sum(weights))

    @classmethod
    def _of_one(cls, split: SplitIndex, buckets: Sequence[int], pairs_per_family: int) -> "LengthIndex":
        family_of_row = np.repeat(np.arange(len(split.rows)), split.rows)
        order = np.lexsort((split.lengths, family_of_row))  # stable, so rows of equal length stay in order
        order = order[split.lengths[order] > 0]
        begin = np.cumsum(split.rows) - split.rows
        rows = order - begin[family_of_row[order]]
        within = np.searchsorted([0, *buckets], split.lengths[order], side="left")  # 0 is no length of `order`
        counts = np.zeros((len(split.rows), len(buckets) + 2), np.int64)
        np.add.at(counts, (family_of_row[order], within), 1)
        edges = np.cumsum(counts, axis=1)
        sizes, ranks = edges[:, -1], _rank(edges[:, :-1], 0)
        total = _rank(sizes, 0)
        weight = np.minimum(total, pairs_per_family)
        mass = np.diff(ranks) * (weight / np.maximum(total, 1))[:, None]
        if not mass.any():
            raise ValueError(
                f"buckets: no pair of the {len(sizes)} families fits into the largest, {buckets[-1]}; "
                "give larger buckets, or families with at least two sequences"
            )
        return cls(
            rows=rows.astype(np.int32),
            first=np.cumsum(sizes) - sizes,
            ranks=ranks,
            mass=mass,
            left_out=float(1 - mass.sum() / weight.sum()),
            bad=split.bad,
            content=split.content,
            units=split.units,
            identity=split.identity.astype(np.float64),
            parts=(slice(0, len(sizes)),),
        )

    def draw(
        self, family: Int64[np.ndarray, "*shape"], bucket: int, rng: np.random.Generator
    ) -> Int32[np.ndarray, "*shape 4"]:
        """Draw one pair of each `family`, uniform over its pairs in the bucket, in either order; returns their ids."""
        longer, shorter = _unrank(rng.integers(self.ranks[family, bucket], self.ranks[family, bucket + 1]))
        swap = rng.random(family.shape) < 0.5
        x, y = (self.rows[self.first[family] + np.where(swap, a, b)] for a, b in ((shorter, longer), (longer, shorter)))
        return np.stack([family, x, family, y], axis=-1).astype(np.int32)

    def by_identity(self, wanted: Sequence[float]) -> Float64[np.ndarray, "families buckets bins"]:
        """Scale the mass so that each identity bin has the wanted share, and each data set keeps its own.

        Both are met by iterative proportional fitting, where that is possible; else the bins' shares are. A bin that no
        pair falls into leaves its share to the others. Raises ValueError if no pair falls into a wanted bin.
        """
        mass = self.mass[..., None] * self.identity[:, None]
        table = np.stack([mass[part].sum((0, 1)) for part in self.parts])
        columns = np.where(table.any(axis=0), wanted, 0.0)
        if not columns.any():
            raise ValueError(
                f"data.identity_mass={tuple(wanted)}: no pair falls into a bin with a share above 0; give shares "
                "to the other bins, or () for none"
            )
        by_part, by_bin = _fitted(table, table.sum(axis=1), columns / columns.sum() * table.sum())
        scale = np.repeat(by_part, [part.stop - part.start for part in self.parts])
        return mass * scale[:, None, None] * by_bin

    def rows_of(self, family: int) -> Int32[np.ndarray, " rows"]:
        """Return the rows of a family that hold any residue, the shortest first."""
        end = self.first[family + 1] if family + 1 < len(self.first) else len(self.rows)
        return self.rows[self.first[family] : end]

    def part_of(self, family: int) -> slice:
        """Return the families of the data set that a family belongs to."""
        return next(part for part in self.parts if family < part.stop)


def _joined(found: Sequence[LengthIndex], weights: Float64[np.ndarray, " parts"]) -> LengthIndex:
    """Put the indices of several data sets one behind the other, with masses in the ratio of the weights."""
    ends = np.cumsum([len(of.mass) for of in found])
    rows = np.cumsum([0, *(len(of.rows) for of in found)])
    units = np.cumsum([0, *(of.units.max() + 1 for of in found)])
    return LengthIndex(
        rows=np.concatenate([of.rows for of in found]),
        first=np.concatenate([of.first + begin for of, begin in zip(found, rows, strict=False)]),
        ranks=np.concatenate([of.ranks for of in found]),
        mass=np.concatenate([of.mass * (w / of.mass.sum()) for of, w in zip(found, weights, strict=True)]),
        left_out=float(sum(of.left_out * w for of, w in zip(found, weights, strict=True))),
        bad=tuple(itertools.chain(*(of.bad for of in found))),
        content=hashlib.sha256(" ".join(of.content for of in found).encode()).hexdigest()[:16],
        units=np.concatenate([of.units + begin for of, begin in zip(found, units, strict=False)]),
        identity=np.concatenate([of.identity for of in found]),
        parts=tuple(slice(end - len(of.mass), end) for of, end in zip(found, ends.tolist(), strict=True)),
    )


def _fitted(
    table: Float64[np.ndarray, "rows columns"],
    rows: Float64[np.ndarray, " rows"],
    columns: Float64[np.ndarray, " columns"],
) -> tuple[Float64[np.ndarray, " rows"], Float64[np.ndarray, " columns"]]:
    """Find factors of rows and columns that give a table these sums (iterative proportional fitting)."""
    by_row, by_column = np.ones(len(rows)), np.ones(len(columns))
    for _ in range(_FITTING_STEPS):
        by_row = rows / np.maximum(table @ by_column, np.finfo(float).tiny)
        by_column = columns / np.maximum(by_row @ table, np.finfo(float).tiny)
    return by_row, by_column


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
