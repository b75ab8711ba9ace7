"""Batches of sequence pairs from a split of families: random ones for training, fixed ones for evaluation.

A training batch is a pure function of (seed, step): `PairStream(...)[step]` draws one length bucket, then `batch_size`
pairs whose longer sequence falls into that bucket. No state is carried from step to step, so the batches are the same
for any number of worker processes, hosts or restarts.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, TypedDict, cast

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from data import vocab
from data.iterator import BatchIterator, Stream, shard_rows
from data.sampling import Families, LengthIndex, check_buckets, readable, row_lengths
from data.settings import BATCH_SIZE, MOST, SEED, Integer, Lengths, Number, Section
from data.transforms import NO_TARGET, Pair, crop, pair

Ids = Int64[np.ndarray, "pairs 3"]
PairLengths = Int64[np.ndarray, " pairs"]

_ATTEMPTS = 4  # draws of an example before a pair without any aligned residue is accepted
_CACHED_FAMILIES = 512  # decoded records kept, mostly below 50 KB each; reading one takes longer than making its pair


class Batch(TypedDict):
    """Pairs of one length bucket; an empty example has padding, lengths 0 and id -1."""

    x: Int32[np.ndarray, "batch length"]  # tokens, PAD beyond x_length
    y: Int32[np.ndarray, "batch length"]
    x_length: Int32[np.ndarray, " batch"]
    y_length: Int32[np.ndarray, " batch"]
    target: Int32[np.ndarray, "batch length"]  # position in y aligned with x_i, NO_TARGET for none
    id: Int32[np.ndarray, "batch 3"]  # family (index in the split), row of x, row of y


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
        self._read = _Reader(families)

    def __getitem__(self, step: int) -> Batch:
        bucket, candidates, draws = self._candidates(step)
        ids, pairs = zip(*map(self._first_aligned, candidates[self._shard].tolist()), strict=True)
        cropped = [
            crop(found, draw[1:]) if draw[0] < self.config.crop else found
            for found, draw in zip(pairs, draws[self._shard], strict=True)
        ]
        return _assemble(cropped, np.array(ids), self.config.buckets[bucket])

    def largest(self) -> Batch:
        """Return an empty batch of the largest bucket that has pairs; its arrays take no memory."""
        bucket = int(np.flatnonzero(self.index.mass.any(0))[-1])
        rows = self._shard.stop - self._shard.start
        shapes = {"x": (self.config.buckets[bucket],), "x_length": (), "id": (3,)}
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
    ) -> tuple[int, Int32[np.ndarray, "batch attempts 3"], Float64[np.ndarray, "batch 4"]]:
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


def evaluation_batches(
    families: Families,
    batch_size: int,
    buckets: Sequence[int],
    *,
    limit: int | None = None,
    divisible_by: int = 1,
    max_bad: int = 0,
) -> Iterator[Batch]:
    """Return the fixed evaluation pairs of a split in batches, each pair once, shortest bucket first.

    No pair is dropped: the largest bucket is doubled until the longest pair fits. With every doubling the batch is
    halved, so that its memory stays the same. The last batch of a bucket is filled up with empty examples (id -1), so
    that a bucket is one compiled shape.

    `limit` is the most pairs, for a quick look while training: the same ones every time, spread over the families, and
    only pairs that fit into the given buckets, as every further shape is compiled. `divisible_by` divides every batch
    size, for example the number of devices. `max_bad` damaged records may be left out, with a warning for each.

    Raises BadRecordError for more of them, and ValueError: no family or no evaluation pair in the split (with limit:
    none that fits), limit below 1, batch_size not divisible by divisible_by.
    """
    check_buckets(buckets)
    if not 1 <= divisible_by <= batch_size or batch_size % divisible_by:
        raise ValueError(f"divisible_by: {divisible_by} was given, allowed are divisors of batch_size = {batch_size}")
    ids, lengths = _evaluation_pairs(families, max_bad)
    if limit is not None:
        chosen = _spread(ids, lengths <= buckets[-1], limit)
        ids, lengths = ids[chosen], lengths[chosen]
    parts = []
    for length, size in _evaluation_shapes(buckets, int(lengths.max()), batch_size, divisible_by):
        fits = lengths <= length
        filled_up = np.pad(ids[fits], ((0, -fits.sum() % size), (0, 0)), constant_values=-1)
        parts += [(part, length) for part in filled_up.reshape(-1, size, 3)]
        ids, lengths = ids[~fits], lengths[~fits]
    read = _Reader(families)
    return (_assemble([read(*i) for i in part.tolist()], part, length) for part, length in parts)


def unbatch(batch: Batch) -> Iterator[tuple[tuple[int, int, int], Pair]]:
    """Yield id and unpadded pair of every example that is not empty."""
    for n, (family, i, j) in enumerate(batch["id"].tolist()):
        if family >= 0:
            x, y = slice(batch["x_length"][n]), slice(batch["y_length"][n])
            yield (family, i, j), Pair(batch["x"][n, x], batch["y"][n, y], batch["target"][n, x])


class _Reader:
    """Pairs by id, with a cache of decoded families in every process."""

    def __init__(self, families: Families):
        self.families = families
        self._family = functools.lru_cache(_CACHED_FAMILIES)(families.__getitem__)

    def __call__(self, family: int, i: int, j: int) -> Pair:
        """Return the pair of an id; the empty pair for an id of -1."""
        if family < 0:
            return Pair(*[np.zeros(0, np.int32)] * 3)
        found = self._family(family)
        return pair(found.alignment, i, j, found.insert_states)

    def __reduce__(self):
        return _Reader, (self.families,)


def _assemble(pairs: Sequence[Pair], ids: Int[np.ndarray, "batch 3"], length: int) -> Batch:
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


def _evaluation_pairs(families: Families, max_bad: int) -> tuple[Ids, PairLengths]:
    """Return the ids of all evaluation pairs, family after family, and the length of each pair's longer sequence."""
    ids, lengths = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    bad: list[str] = []
    for f, family in enumerate(readable(families, max_bad, bad)):
        if family is not None:
            ids.append(np.insert(family.pairs.astype(np.int64), 0, f, axis=1))
            lengths.append(row_lengths(family)[family.pairs].max(axis=1, initial=0))
    for message in bad:
        warnings.warn(f"left out: {message}", stacklevel=3)
    if not any(map(len, ids)):
        raise ValueError(
            f"families: none of the {len(families)} families of this split has evaluation pairs; "
            "evaluate on 'validation', 'test_iid' or 'test_ood', or on data with more families"
        )
    return np.concatenate(ids), np.concatenate(lengths)


def _spread(ids: Ids, allowed: Bool[np.ndarray, " pairs"], limit: int) -> Int64[np.ndarray, " chosen"]:
    """Choose `limit` pairs: a random one of every family, then a second one of every family, and so on."""
    if limit < 1:
        raise ValueError(f"limit: {limit} was given, allowed is 1 or more, or None for all pairs")
    if not allowed.any():
        raise ValueError(f"limit: none of the {len(ids)} evaluation pairs fits the largest bucket; give larger buckets")
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(np.flatnonzero(allowed))
    shuffled = shuffled[np.argsort(ids[shuffled, 0], kind="stable")]
    _, first, count = np.unique(ids[shuffled, 0], return_index=True, return_counts=True)
    turn = np.arange(len(shuffled)) - np.repeat(first, count)
    return np.sort(shuffled[np.lexsort((rng.random(len(turn)), turn))[:limit]])


def _evaluation_shapes(buckets: Sequence[int], longest: int, batch_size: int, divisor: int) -> Iterator[tuple]:
    """Yield length and batch size of every bucket, up to one that holds `longest`."""
    yield from ((length, batch_size) for length in buckets)
    length = buckets[-1]
    while length < longest:
        length *= 2
        batch_size = batch_size if batch_size % (2 * divisor) else batch_size // 2
        yield length, batch_size
