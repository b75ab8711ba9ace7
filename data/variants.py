"""Variants of the evaluation pairs of a split: the pairs with unrelated flanks, and pairs of unrelated sequences.

Proteins of users have more domains than the one that two of them share, and some share none. Nothing of it is stored:
each choice is drawn from a seed made of the pair's names, among all rows of the split. So a pair has the same flanks
and the same stranger each time, whatever other pairs are read.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from data.augmentation import LONGEST_FLANK, MEDIAN_FLANK
from data.batches import PairId, PairReader
from data.index import Families
from data.transforms import Pair, Tokens, add_flanks

PLAIN, FLANKED, NEGATIVES = "plain", "flanked", "negatives"
_SPLITS = "validation", "test_iid", "test_ood"
_CANDIDATES = 64  # rows drawn for a flank, of which the first that is long enough is taken, or for a negative pair


class EvaluationSet(NamedTuple):
    """Evaluation pairs of a split, or a variant of them."""

    split: str  # of the families
    variant: str


EVALUATION_SETS = {
    **{name: EvaluationSet(name, PLAIN) for name in _SPLITS},
    **{f"{name}_flanked": EvaluationSet(name, FLANKED) for name in _SPLITS},
    "negatives": EvaluationSet("validation", NEGATIVES),
    **{f"{name}_negatives": EvaluationSet(name, NEGATIVES) for name in _SPLITS[1:]},
}


class Stretch(NamedTuple):
    """A part of a row without gaps."""

    family: int
    row: int
    start: int
    length: int


Ends = tuple[Stretch | None, Stretch | None, Stretch | None, Stretch | None]  # before and behind x, before and behind y


class SplitRows:
    """Lengths of all rows of a split, and random draws of rows by unit: families of one clan may be related.

    Rows are drawn within one data set: units of two classifications, such as clans and folds, may be related too.
    """

    def __init__(
        self,
        accessions: Sequence[str],
        units: Sequence[str],
        lengths: Sequence[Int64[np.ndarray, " _rows"]],
        parts: Sequence[int] = (),
    ):
        """Take names, lengths and the number of the data set (0 if not given) family by family.

        A family without residues, such as a damaged one, is never drawn.
        """
        self.accessions, self.units, self.lengths = accessions, units, lengths
        self._parts = parts or [0] * len(units)
        self._with_residues = [np.flatnonzero(of) for of in lengths]
        self._families: dict[int, dict[str, list[int]]] = {part: {} for part in self._parts}
        for family, (part, unit) in enumerate(zip(self._parts, units, strict=True)):
            if len(self._with_residues[family]):
                self._families[part].setdefault(unit, []).append(family)
        self._names = {part: list(of_part) for part, of_part in self._families.items()}

    def count(self, family: int) -> int:
        """Return the number of units in the data set of a family."""
        return len(self._names[self._parts[family]])

    def length(self, family: int, row: int) -> int:
        return int(self.lengths[family][row])

    def draw(self, uniform: Callable[[], float], beside: int, excluded: set[str]) -> tuple[int, int]:
        """Draw a unit that is not excluded, one of its families, and one of the rows with residues.

        The unit is of the data set of the family `beside`. Returns family and row.
        """
        part = self._parts[beside]
        names = self._names[part]
        while (unit := names[int(uniform() * len(names))]) in excluded:
            pass
        families = self._families[part][unit]
        family = families[int(uniform() * len(families))]
        rows = self._with_residues[family]
        return family, int(rows[int(uniform() * len(rows))])

    def check_units(self, variant: str) -> None:
        """Raise ValueError if all families of a data set are of one unit."""
        for names in self._names.values():
            if len(names) < 2:
                raise ValueError(
                    f"{variant}: unrelated sequences need families of two clans, this split has {len(names)} "
                    f"({', '.join(names)}): build data with more families, or evaluate on another split"
                )


def flanks(rows: SplitRows, pair_id: PairId) -> Ends:
    """Draw the flanks of an evaluation pair: at each end with probability 1/2, and at one end at least.

    Their lengths are exponential, with the median `MEDIAN_FLANK`, and at most `LONGEST_FLANK`. Pair and flanks are all
    of different units, so a split of fewer than five units gives fewer flanks.
    """
    uniform = _uniform("flanks", rows, pair_id)
    ends: list[Stretch | None] = [None] * 4
    while not (chosen := sorted((u, end) for end, u in enumerate(uniform() for _ in ends) if u < 0.5)):
        pass
    used = {rows.units[pair_id[0]]}
    for _, end in chosen[: rows.count(pair_id[0]) - 1]:
        stretch = _stretch(rows, uniform, pair_id[0], used)
        ends[end] = stretch
        used.add(rows.units[stretch.family])
    return tuple(ends)  # type: ignore[return-value]  # of four


def _stretch(rows: SplitRows, uniform: Callable[[], float], beside: int, excluded: set[str]) -> Stretch:
    """Draw a length, then rows until one has that length; of rows that are all shorter, the longest counts whole."""
    drawn = -math.log(1 - uniform()) * MEDIAN_FLANK / math.log(2)
    length = min(max(math.ceil(drawn), 1), LONGEST_FLANK)
    longest, found = 0, (-1, -1)
    for _ in range(_CANDIDATES):
        candidate = rows.draw(uniform, beside, excluded)
        if rows.length(*candidate) > longest:
            longest, found = rows.length(*candidate), candidate
        if longest >= length:
            break
    length = min(length, longest)
    return Stretch(*found, int(uniform() * (longest - length + 1)), length)


def negative(rows: SplitRows, pair_id: PairId) -> PairId:
    """Draw an unrelated sequence in the place of y: of 64 rows of other units, the one nearest to y in length."""
    uniform, wanted = _uniform("negative", rows, pair_id), rows.length(*pair_id[2:])
    excluded = {rows.units[pair_id[0]]}
    drawn = [rows.draw(uniform, pair_id[0], excluded) for _ in range(_CANDIDATES)]
    return *pair_id[:2], *min(drawn, key=lambda row: abs(rows.length(*row) - wanted))


class FlankedReader(PairReader):
    """Pairs by id, each with its flanks."""

    def __init__(self, families: Families, ends: dict[PairId, Ends]):
        super().__init__(families)
        self.ends = ends

    def __call__(self, x_family: int, i: int, y_family: int, j: int) -> Pair:
        core = super().__call__(x_family, i, y_family, j)
        if x_family < 0:
            return core
        x_before, x_behind, y_before, y_behind = map(self._residues, self.ends[x_family, i, y_family, j])
        return add_flanks(core, (x_before, x_behind), (y_before, y_behind))

    def _residues(self, end: Stretch | None) -> Tokens:
        if end is None:
            return np.zeros(0, np.int32)
        return self.sequence(end.family, end.row)[end.start : end.start + end.length]

    def __reduce__(self):
        return FlankedReader, (self.families, self.ends)


def _uniform(purpose: str, rows: SplitRows, pair_id: PairId) -> Callable[[], float]:
    """Return the random numbers of a pair. Python promises that seeding and random() stay the same."""
    x_family, i, y_family, j = pair_id
    return random.Random(f"{purpose} {rows.accessions[x_family]} {i} {rows.accessions[y_family]} {j}").random
