"""Batches of single sequences, for models that predict masked residues; the objective masks them.

A training batch is a pure function of (seed, step): it draws one length bucket in proportion to its sequences, then
records of this bucket, then up to 8 sequences of each, so that few records are read for a batch. A longer sequence
than the last bucket belongs to it, and a random window of it is taken.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, TypedDict, cast

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt8

from data import vocab
from data.batches import by_length
from data.iterator import Stream, shard_rows
from data.sequences import SequenceSource
from data.settings import BATCH_SIZE, SEED, Folder, Integer, Lengths, Section

_FROM_A_RECORD = 8  # sequences of a batch


class SequenceBatch(TypedDict):
    """Sequences of one length bucket; an empty example has padding, length 0 and id -1."""

    x: Int32[np.ndarray, "batch places"]  # tokens, PAD from `length` on
    length: Int32[np.ndarray, " batch"]
    id: Int32[np.ndarray, " batch"]  # number of the sequence in its split


@dataclasses.dataclass(frozen=True)
class SequenceConfig(Section):
    """Settings of the batches: `config.data` of a run, its batch size and its seed."""

    name: ClassVar[str] = "data"

    dir: Annotated[str, Folder()] = "runs/sequences"  # made by scripts/build_sequences.py
    buckets: Annotated[Sequence[int], Lengths()] = (128, 256, 512)  # padded lengths; of longer sequences a window
    batch_size: Annotated[int, BATCH_SIZE] = 32  # sequences a step, over all hosts
    seed: Annotated[int, SEED] = 0
    workers: Annotated[int, Integer(0, 1024)] = 0  # as in pipeline.PipelineConfig
    prefetch: Annotated[int, Integer(1, 1 << 16)] = 4


class SequenceStream(Stream):
    """Training batches by step number: `stream[step]` is this host's part of the batch of that step. Picklable."""

    bad: tuple[str, ...] = ()

    def __init__(self, source: SequenceSource, config: SequenceConfig, *, shard_index: int = 0, shard_count: int = 1):
        self.source, self.config, self.content = source, config, source.content
        self._shard = shard_rows(config.batch_size, shard_index, shard_count)
        bucket = np.minimum(np.searchsorted(config.buckets, source.lengths), len(config.buckets) - 1)
        # The sequences of each bucket in the order of their records.
        self._members = [np.flatnonzero(bucket == n) for n in range(len(config.buckets))]
        self._share = np.bincount(bucket, minlength=len(config.buckets)) / len(bucket)

    def __getitem__(self, step: int) -> SequenceBatch:
        bucket, ids, draws = self._drawn(step)
        longest, ids = self.config.buckets[bucket], ids[self._shard]
        windows = zip(ids.tolist(), draws[self._shard].tolist(), strict=True)
        return assemble([_window(self.source[n], longest, draw) for n, draw in windows], ids, longest)

    def largest(self) -> SequenceBatch:
        """Return an empty batch of the largest bucket that has sequences; its arrays take no memory."""
        rows, places = self._shard.stop - self._shard.start, self.config.buckets[int(np.flatnonzero(self._share)[-1])]
        shapes = {"x": (rows, places), "length": (rows,), "id": (rows,)}
        return cast(SequenceBatch, {name: np.broadcast_to(np.int32(0), shape) for name, shape in shapes.items()})

    def fingerprint(self) -> str:
        """Return a hash of seed, sizes and lengths; hosts and workers do not change it."""
        c = self.config
        digest = hashlib.sha256(repr(("sequences", tuple(c.buckets), c.batch_size, c.seed)).encode())
        for array in (self.source.lengths, self.source.first):
            digest.update(array.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def description(self) -> str:
        longer = (self.source.lengths > self.config.buckets[-1]).mean()
        return f"{len(self.source):,} sequences, {longer:.1%} of them longer than the largest bucket"

    def _drawn(self, step: int) -> tuple[int, Int64[np.ndarray, " batch"], Float64[np.ndarray, " batch"]]:
        """Draw the bucket and, for the global batch, sequences and the places of windows of long ones."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step,)))
        bucket, size = int(rng.choice(len(self._share), p=self._share)), self.config.batch_size
        members, first = self._members[bucket], self.source.first
        parts = []
        for start in range(0, size, _FROM_A_RECORD):
            count = min(_FROM_A_RECORD, size - start)
            record = int(np.searchsorted(first, members[rng.integers(len(members))], "right")) - 1
            of_record = members[slice(*np.searchsorted(members, first[record : record + 2]))]
            parts.append(rng.choice(of_record, count, replace=len(of_record) < count))
        return bucket, np.concatenate(parts), rng.random(size)


def evaluation_batches(
    source: SequenceSource,
    batch_size: int,
    buckets: Sequence[int],
    *,
    limit: int | None = None,
    divisible_by: int = 1,
) -> Iterator[SequenceBatch]:
    """Yield the sequences of a split, each once and whole, as `batches.by_length` divides them.

    `limit` is the most sequences, the same ones every time, of those that fit into the given buckets. Raises ValueError
    if none does.
    """
    ids = np.arange(len(source))
    if limit is not None:
        fitting = np.flatnonzero(source.lengths <= buckets[-1])
        if not len(fitting):
            raise ValueError(f"buckets: no sequence of the split fits the largest, {buckets[-1]}; give larger buckets")
        ids = np.sort(np.random.default_rng(0).permutation(fitting)[:limit])
    for part, length in by_length(ids, source.lengths[ids], buckets, batch_size, divisible_by):
        yield assemble([source[n] if n >= 0 else np.zeros(0, np.uint8) for n in part.tolist()], part, length)


def assemble(sequences: list[UInt8[np.ndarray, " _"]], ids: Int64[np.ndarray, " batch"], longest: int) -> SequenceBatch:
    """Pad sequences to one length."""
    x = np.full((len(sequences), longest), vocab.PAD, np.int32)
    for row, tokens in zip(x, sequences, strict=True):
        row[: len(tokens)] = tokens
    length = np.array(list(map(len, sequences)), np.int32)
    return SequenceBatch(x=x, length=length, id=ids.astype(np.int32))


def _window(tokens: UInt8[np.ndarray, " length"], longest: int, draw: float) -> UInt8[np.ndarray, " _"]:
    start = int(draw * (max(len(tokens) - longest, 0) + 1))
    return tokens[start : start + longest]
