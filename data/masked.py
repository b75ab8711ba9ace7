"""Batches of single sequences, for models that predict masked residues; the objective masks them.

A training batch is a pure function of (seed, step): it draws one length bucket in proportion to its sequences, then
records of this bucket, then up to 8 sequences of each, so that few records are read for a batch. A longer sequence
than the last bucket belongs to it, and a random window of it is taken.

With `join` each row is filled with whole sequences, one place of padding between two of them. Grain's packing is no
help: what it puts into a row depends on all sequences before, so that no step could be made alone.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NotRequired, TypedDict, cast

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt8

from data import vocab
from data.batches import by_length
from data.iterator import Stream, shard_rows
from data.sequences import SequenceSource
from data.settings import BATCH_SIZE, SEED, Folder, Integer, Lengths, Section, Switch

_FROM_A_RECORD = 8  # sequences of a batch


class SequenceBatch(TypedDict):
    """Sequences of one length bucket, or rows of joined ones; an empty example has padding, length 0 and id -1."""

    x: Int32[np.ndarray, "batch places"]  # tokens, PAD from `length` on, and between joined sequences
    length: Int32[np.ndarray, " batch"]  # of a row with the places between its sequences
    id: Int32[np.ndarray, " batch"]  # number of the sequence in its split, of the first one of a row
    segments: NotRequired[Int32[np.ndarray, "batch places"]]  # joined sequences of a row from 1 on; 0 where x is PAD


@dataclasses.dataclass(frozen=True)
class SequenceConfig(Section):
    """Settings of the batches: `config.data` of a run, its batch size and its seed."""

    name: ClassVar[str] = "data"

    dir: Annotated[str, Folder()] = "runs/sequences"  # made by scripts/build_sequences.py
    buckets: Annotated[Sequence[int], Lengths()] = (128, 256, 512)  # padded lengths; of longer sequences a window
    join: Annotated[bool, Switch()] = False  # fill rows of the last bucket's length; the others are of evaluations
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
        digest = hashlib.sha256(repr(self._drawn_from()).encode())
        for array in (self.source.lengths, self.source.first):
            digest.update(array.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def description(self) -> str:
        longer = (self.source.lengths > self.config.buckets[-1]).mean()
        return f"{len(self.source):,} sequences, {longer:.1%} of them longer than the largest bucket"

    def _drawn_from(self) -> tuple:
        return "sequences", tuple(self.config.buckets), self.config.batch_size, self.config.seed

    def _drawn(self, step: int) -> tuple[int, Int64[np.ndarray, " batch"], Float64[np.ndarray, " batch"]]:
        """Draw the bucket and, for the global batch, sequences and the places of windows of long ones."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step,)))
        bucket, size = int(rng.choice(len(self._share), p=self._share)), self.config.batch_size
        counts = [min(_FROM_A_RECORD, size - start) for start in range(0, size, _FROM_A_RECORD)]
        ids = np.concatenate([self._of_a_record(rng, self._members[bucket], count) for count in counts])
        return bucket, ids, rng.random(size)

    def _of_a_record(
        self, rng: np.random.Generator, members: Int64[np.ndarray, " _"], count: int
    ) -> Int64[np.ndarray, " count"]:
        """Draw a record in proportion to the members in it, and some of these members."""
        first = self.source.first
        record = int(np.searchsorted(first, members[rng.integers(len(members))], "right")) - 1
        of_record = members[slice(*np.searchsorted(members, first[record : record + 2]))]
        return rng.choice(of_record, count, replace=len(of_record) < count)


class JoinedStream(SequenceStream):
    """Training batches of joined sequences by step number, as `SequenceStream`.

    Every sequence is as likely as another. The last one of a row is cut to a random window that fills the row: to leave
    it out would make long sequences rarer, and rows unequally full.
    """

    def __init__(self, source: SequenceSource, config: SequenceConfig, *, shard_index: int = 0, shard_count: int = 1):
        super().__init__(source, config, shard_index=shard_index, shard_count=shard_count)
        self._longest, self._all = config.buckets[-1], np.arange(len(source))

    def __getitem__(self, step: int) -> SequenceBatch:
        rows = [self._row(step, row) for row in range(self._shard.start, self._shard.stop)]
        x, segments, length, ids = (np.array(part, np.int32) for part in zip(*rows, strict=True))
        return SequenceBatch(x=x, length=length, id=ids, segments=segments)

    def largest(self) -> SequenceBatch:
        shape = self._shard.stop - self._shard.start, self._longest
        x, one = np.broadcast_to(np.int32(0), shape), np.broadcast_to(np.int32(0), shape[:1])
        return SequenceBatch(x=x, length=one, id=one, segments=x)

    def description(self) -> str:
        return f"{len(self.source):,} sequences, joined to rows of {self._longest:,} places"

    def _drawn_from(self) -> tuple:
        return "joined sequences", self._longest, self.config.batch_size, self.config.seed

    def _row(self, step: int, row: int) -> tuple[Int32[np.ndarray, " places"], Int32[np.ndarray, " places"], int, int]:
        """Return tokens, segments, length and first sequence of a row of the global batch."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step, row)))
        x, segments = np.full((2, self._longest), vocab.PAD, np.int32)
        ids = self._endless(rng)
        first, place, number = -1, 0, 0
        while place < self._longest:
            n, number = next(ids), number + 1
            tokens = _window(self.source[n], self._longest - place, rng.random())
            here = slice(place, place + len(tokens))
            x[here], segments[here] = tokens, number
            first, place = n if number == 1 else first, here.stop + 1
        return x, segments, place - 1, first

    def _endless(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield from self._of_a_record(rng, self._all, _FROM_A_RECORD).tolist()


def training_stream(
    source: SequenceSource, config: SequenceConfig, *, shard_index: int = 0, shard_count: int = 1
) -> SequenceStream:
    """Return this host's stream of the training batches that a configuration describes."""
    kind = JoinedStream if config.join else SequenceStream
    return kind(source, config, shard_index=shard_index, shard_count=shard_count)


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
