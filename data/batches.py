"""Batches of sequence pairs: their arrays, and the pairs that ids name."""

import collections
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Int, Int32

from data import vocab
from data.families import Family
from data.index import Families
from data.transforms import NO_TARGET, Pair, pair, sequence, unaligned

PairId = tuple[int, int, int, int]  # family of x, row of x, family of y, row of y

_CACHED = 2**28  # bytes of decoded records that a process keeps; reading a record takes longer than making its pair
_OF_A_NAME = 100  # bytes of a row's name


class Batch(TypedDict):
    """Pairs of one length bucket; an empty example has padding, lengths 0 and id -1."""

    x: Int32[np.ndarray, "batch length"]  # tokens, PAD beyond x_length
    y: Int32[np.ndarray, "batch length"]
    x_length: Int32[np.ndarray, " batch"]
    y_length: Int32[np.ndarray, " batch"]
    target: Int32[np.ndarray, "batch length"]  # position in y aligned with x_i, NO_TARGET for none
    id: Int32[np.ndarray, "batch 4"]  # family of x (index in the split), row of x, family of y, row of y


def unbatch(batch: Batch) -> Iterator[tuple[PairId, Pair]]:
    """Yield id and unpadded pair of every example that is not empty."""
    for n, pair_id in enumerate(batch["id"].tolist()):
        if pair_id[0] >= 0:
            x, y = slice(batch["x_length"][n]), slice(batch["y_length"][n])
            yield tuple(pair_id), Pair(batch["x"][n, x], batch["y"][n, y], batch["target"][n, x])


def by_length(
    ids: Int[np.ndarray, "examples *columns"],
    lengths: Int[np.ndarray, " examples"],
    buckets: Sequence[int],
    batch_size: int,
    divisible_by: int = 1,
) -> Iterator[tuple[Int[np.ndarray, "batch *columns"], int]]:
    """Yield parts of the ids, each with the length that its examples are padded to, shortest bucket first.

    No example is dropped: the largest bucket is doubled until the longest fits. With every doubling the batch is
    halved, as far as `divisible_by` allows, so that its memory stays the same. The last part of a bucket is filled up
    with ids of -1, so that a bucket is one compiled shape.
    """
    shapes = [(length, batch_size) for length in buckets]
    while shapes[-1][0] < lengths.max(initial=0):
        length, size = shapes[-1]
        shapes.append((2 * length, size if size % (2 * divisible_by) else size // 2))
    for length, size in shapes:
        fits = lengths <= length
        filling = ((0, -int(fits.sum()) % size), *((0, 0),) * (ids.ndim - 1))
        filled = np.pad(ids[fits], filling, constant_values=-1)
        yield from ((part, length) for part in filled.reshape(-1, size, *ids.shape[1:]))
        ids, lengths = ids[~fits], lengths[~fits]


class PairReader:
    """Pairs by id, with a cache of decoded families in every process."""

    def __init__(self, families: Families):
        self.families = families
        self._kept: collections.OrderedDict[int, Family] = collections.OrderedDict()  # the latest used last
        self._bytes = 0

    def family(self, index: int) -> Family:
        """Return a family. Those used latest are kept, up to `_CACHED` bytes of them."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        found = self._kept[index] = self.families[index]
        self._bytes += _size(found)
        while self._bytes > _CACHED and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return found

    def __call__(self, x_family: int, i: int, y_family: int, j: int) -> Pair:
        """Return the pair of an id, unaligned if it is of two families; the empty pair for an id of -1."""
        if x_family < 0:
            return Pair(*[np.zeros(0, np.int32)] * 3)
        if x_family == y_family:
            family = self.family(x_family)
            return pair(family.alignment, i, j, family.insert_states)
        return unaligned(self.sequence(x_family, i), self.sequence(y_family, j))

    def sequence(self, family: int, row: int) -> Int32[np.ndarray, " length"]:
        """Return the tokens of a row without its gaps."""
        return sequence(self.family(family).alignment, row)

    def __reduce__(self):
        return PairReader, (self.families,)


def _size(family: Family) -> int:
    return family.alignment.nbytes + _OF_A_NAME * len(family.rows)


def assemble(pairs: Sequence[Pair], ids: Int[np.ndarray, "batch 4"], length: int) -> Batch:
    """Pad pairs to a length and stack them."""
    batch = Batch(
        x=np.full((len(pairs), length), vocab.PAD, np.int32),
        y=np.full((len(pairs), length), vocab.PAD, np.int32),
        x_length=np.array([len(p.x) for p in pairs], np.int32),
        y_length=np.array([len(p.y) for p in pairs], np.int32),
        target=np.full((len(pairs), length), NO_TARGET, np.int32),
        id=ids.astype(np.int32),
    )
    for n, p in enumerate(pairs):
        batch["x"][n, : len(p.x)] = p.x
        batch["y"][n, : len(p.y)] = p.y
        batch["target"][n, : len(p.x)] = p.target
    return batch
