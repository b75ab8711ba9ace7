"""Batches of sequence pairs from a split of families: random ones for training.

A training batch is a pure function of (seed, step): `PairStream(...)[step]` draws one length bucket, then `batch_size`
pairs whose longer sequence falls into that bucket. No state is carried from step to step, so the batches are the same
for any number of worker processes, hosts or restarts.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Annotated, ClassVar, cast

import numpy as np
from jaxtyping import Float64, Int32

from data.batches import Batch, PairReader, assemble
from data.iterator import BatchIterator, Stream, shard_rows
from data.sampling import Families, LengthIndex
from data.settings import BATCH_SIZE, MOST, SEED, Integer, Lengths, Number, Section
from data.transforms import NO_TARGET, Pair, crop

_ATTEMPTS = 4  # draws of an example before a pair without any aligned residue is accepted


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Section):
    """Settings of the training batches. `workers` and `prefetch` do not change the batches."""

    name: ClassVar[str] = "data"

    # ascending; a pair is padded to the first that holds both sequences
    buckets: Annotated[Sequence[int], Lengths()] = (64, 128, 192, 256, 384)
    batch_size: Annotated[int, BATCH_SIZE] = 64  # pairs a step, over all hosts
    seed: Annotated[int, SEED] = 0  # of the pairs and crops that are drawn
    # largest weight of a family; below, a family weighs as much as it has pairs
    pairs_per_family: Annotated[int, Integer(1, or_all=True)] = 100
    crop: Annotated[float, Number(0.0, 1.0)] = 0.0  # share of pairs in which one sequence loses up to half at one end
    workers: Annotated[int, Integer(0, 1024)] = 0  # processes that make batches; 0 for a thread
    prefetch: Annotated[int, Integer(1, 1 << 16)] = 4  # batches made ahead, by each worker
    max_bad_records: Annotated[int, Integer()] = 0  # damaged records that may be left out; one more is an error


class PairStream(Stream):
    """Training batches by step number: `stream[step]` is this host's part of the batch of that step.

    Picklable; `index` is computed once and travels to the worker processes.
    """

    def __init__(self, families: Families, config: PipelineConfig, *, shard_index: int = 0, shard_count: int = 1):
        self.config = config
        most = MOST if config.pairs_per_family == -1 else config.pairs_per_family
        self.index = LengthIndex.build(families, config.buckets, most, config.max_bad_records)
        self.bad, self.content = self.index.bad, self.index.content
        self._shard = shard_rows(config.batch_size, shard_index, shard_count)
        self._read = PairReader(families)

    def __getitem__(self, step: int) -> Batch:
        bucket, candidates, draws = self._candidates(step)
        ids, pairs = zip(*map(self._first_aligned, candidates[self._shard].tolist()), strict=True)
        cropped = [
            crop(found, draw[1:]) if draw[0] < self.config.crop else found
            for found, draw in zip(pairs, draws[self._shard], strict=True)
        ]
        return assemble(cropped, np.array(ids), self.config.buckets[bucket])

    def largest(self) -> Batch:
        """Return an empty batch of the largest bucket that has pairs; its arrays take no memory."""
        bucket = int(np.flatnonzero(self.index.mass.any(0))[-1])
        rows = self._shard.stop - self._shard.start
        shapes = {"x": (self.config.buckets[bucket],), "x_length": (), "id": (4,)}
        shapes |= {"y": shapes["x"], "y_length": (), "target": shapes["x"]}
        return cast(Batch, {name: np.broadcast_to(np.int32(0), (rows, *shape)) for name, shape in shapes.items()})

    def fingerprint(self) -> str:
        """Return a hash of seed, sizes and lengths; hosts and workers do not change it."""
        c = self.config
        digest = hashlib.sha256(repr((tuple(c.buckets), c.batch_size, c.seed, c.crop)).encode())
        for array in (self.index.rows, self.index.first, self.index.ranks, self.index.mass):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def description(self) -> str:
        return f"{self.index.left_out:.1%} of pairs longer than the largest bucket"

    def _candidates(
        self, step: int
    ) -> tuple[int, Int32[np.ndarray, "batch attempts 4"], Float64[np.ndarray, "batch 4"]]:
        """Draw the bucket and, for every example of the global batch, pairs to try in turn and numbers for `crop`."""
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step,)))
        mass = self.index.mass
        bucket = int(rng.choice(mass.shape[1], p=mass.sum(0) / mass.sum()))
        weights = mass[:, bucket] / mass[:, bucket].sum()
        family = rng.choice(len(mass), size=(self.config.batch_size, _ATTEMPTS), p=weights)
        return bucket, self.index.draw(family, bucket, rng), rng.random((self.config.batch_size, 4))

    def _first_aligned(self, candidates: list[list[int]]) -> tuple[list[int], Pair]:
        """Return id and pair of the first candidate with an aligned residue, else of the last."""
        for candidate in candidates:
            found = self._read(*candidate)
            if (found.target != NO_TARGET).any():
                break
        return candidate, found


def train_iterator(
    families: Families, config: PipelineConfig, *, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
) -> BatchIterator:
    """Return an endless iterator over batches of random pairs, deterministic in (config.seed, step).

    Reads all families once. This host, `shard_index` of `shard_count`, gets `batch_size / shard_count` rows of a batch.
    Raises ValueError: empty split, no pair that fits into the buckets, indivisible batch_size, negative step.
    """
    if start_step < 0:
        raise ValueError(f"start_step: {start_step} was given, allowed is 0 or more")
    stream = PairStream(families, config, shard_index=shard_index, shard_count=shard_count)
    return BatchIterator(stream, start_step)
