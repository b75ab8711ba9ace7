"""From a split of families to batches of sequence pairs: random for training, fixed for evaluation.

A training batch is a pure function of (seed, step): `PairStream(...)[step]` draws one length bucket, then `batch_size`
pairs whose longer sequence falls into that bucket. No state is carried from step to step, so the order of batches is
the same whatever the number of worker processes, hosts or restarts, and resuming costs nothing.
"""

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from data import vocab
from data.sampling import Families, LengthIndex, check_buckets, readable, row_lengths
from data.transforms import NO_TARGET, Pair, crop, pair

_LAST_STEP = 2**40  # Grain wants a length; no run gets there
_ATTEMPTS = 4  # draws of an example before a pair without any aligned residue is accepted
_RESTARTS = 3  # of dead worker processes, before one batch
_CACHED_FAMILIES = 512  # decoded records kept, mostly below 50 KB each; reading one takes longer than making its pair


class Batch(TypedDict):
    """Pairs of one length bucket; the arrays of an empty example hold padding, lengths 0 and id -1."""

    x: Int32[np.ndarray, "batch length"]  # tokens, PAD beyond x_length
    y: Int32[np.ndarray, "batch length"]
    x_length: Int32[np.ndarray, " batch"]
    y_length: Int32[np.ndarray, " batch"]
    target: Int32[np.ndarray, "batch length"]  # position in y aligned with x_i, NO_TARGET for none
    id: Int32[np.ndarray, "batch 3"]  # family (index in the split), row of x, row of y


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What determines the stream of training batches, and how it is computed.

    Attributes:
      buckets: Ascending padded lengths; a pair is padded to the first that holds its longer sequence.
      batch_size: Pairs a step, over all hosts.
      seed: Of the pairs drawn.
      pairs_per_family: A family counts as many times as it has pairs, at most this many; else a few big ones dominate.
      crop: Share of the pairs of which one sequence loses up to half at one end.
      workers: Processes that make batches; 0 makes them on a thread of this one. Does not change the batches.
      prefetch: Batches made ahead, by each worker. Does not change the batches.
      max_bad_records: Damaged records that may be left out; with one more there are no batches at all.
    """

    buckets: Sequence[int] = (64, 128, 256, 512)
    batch_size: int = 64
    seed: int = 0
    pairs_per_family: int = 1000
    crop: float = 0.0
    workers: int = 0
    prefetch: int = 4
    max_bad_records: int = 0

    def __post_init__(self):
        check_buckets(self.buckets)
        least_of = {
            "batch_size": 1,
            "pairs_per_family": 1,
            "prefetch": 1,
            "seed": 0,
            "workers": 0,
            "max_bad_records": 0,
        }
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} was given, allowed is {least} or more")
        if not 0 <= self.crop <= 1:
            raise ValueError(f"crop: {self.crop} was given, allowed is a share, 0 to 1")


class PairStream:
    """Training batches by step number: `stream[step]` is this host's part of the batch of that step.

    Picklable; `index` is computed once and travels to the worker processes.
    """

    def __init__(self, families: Families, config: PipelineConfig, *, shard_index: int = 0, shard_count: int = 1):
        self.config = config
        self.index = LengthIndex.build(families, config.buckets, config.pairs_per_family, config.max_bad_records)
        self.bad = self.index.bad
        self._shard = _shard_rows(config.batch_size, shard_index, shard_count)
        self._read = _Reader(families)

    def __getitem__(self, step: int) -> Batch:
        bucket, candidates, draws = self._candidates(step)
        ids, pairs = zip(*map(self._first_aligned, candidates[self._shard].tolist()), strict=True)
        cropped = [
            crop(found, draw[1:]) if draw[0] < self.config.crop else found
            for found, draw in zip(pairs, draws[self._shard], strict=True)
        ]
        return _assemble(cropped, np.array(ids), self.config.buckets[bucket])

    def fingerprint(self) -> str:
        """Names the stream: same seed, sizes and data, whatever the hosts and workers."""
        c = self.config
        of = hashlib.sha256(repr((tuple(c.buckets), c.batch_size, c.seed, c.crop)).encode())
        for array in (self.index.rows, self.index.first, self.index.ranks, self.index.mass):
            of.update(array.tobytes())
        return of.hexdigest()[:16]

    def description(self) -> str:
        return f"{self.index.left_out:.1%} of pairs longer than the largest bucket"

    def _candidates(
        self, step: int
    ) -> tuple[int, Int32[np.ndarray, "batch attempts 3"], Float64[np.ndarray, "batch 4"]]:
        """The bucket and, for every example of the global batch, a few pairs of which the first usable one is taken,
        and uniform draws of how it is cropped.
        """
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step,)))
        mass = self.index.mass
        bucket = int(rng.choice(mass.shape[1], p=mass.sum(0) / mass.sum()))
        weights = mass[:, bucket] / mass[:, bucket].sum()
        family = rng.choice(len(mass), size=(self.config.batch_size, _ATTEMPTS), p=weights)
        return bucket, self.index.draw(family, bucket, rng), rng.random((self.config.batch_size, 4))

    def _first_aligned(self, candidates: list[list[int]]) -> tuple[list[int], Pair]:
        for candidate in candidates:
            found = self._read(*candidate)
            if (found.target != NO_TARGET).any():
                break
        return candidate, found


@runtime_checkable
class Stream(Protocol):
    """Training batches as a pure function of the step: `PairStream`, `data.sorting.SortingStream`. Picklable."""

    config: Any  # with `workers` and `prefetch`
    bad: tuple[str, ...]  # records that were left out, and why

    def __getitem__(self, step: int) -> Any: ...

    def fingerprint(self) -> str:
        """Names the batches, so that a run does not go on with others."""

    def description(self) -> str:
        """For the first line of a run."""


class BatchIterator(grain.DatasetIterator):
    """Endless iterator over a `Stream`, made ahead by Grain on a thread or in worker processes.

    Its state is the number of the next step, not Grain's own (which is tied to the number of workers): it can be
    restored with other `workers`, and on other numbers of hosts. Grain's Orbax handlers accept the iterator, but they
    write one file a process: to restart on another number of processes, save `get_state()` as JSON (ocp.args.JsonSave).

    Worker processes need parsed absl flags (`absl.app.run`) and `if __name__ == "__main__"` in the main script.
    """

    def __init__(self, stream: Stream, start_step: int = 0):
        super().__init__()
        self.stream = stream
        self._fingerprint = stream.fingerprint()
        self._seek(start_step)

    def __next__(self) -> Any:
        batch = self._next()
        self.step += 1
        if self.stream.config.workers:  # arrays in shared memory, which Grain unlinks: hand out ordinary ones
            batch = {name: np.array(array) for name, array in batch.items()}
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, "stream": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at the saved step.

        Raises:
          ValueError: the state is of a stream with another seed, batch size, buckets, cap or data.
        """
        if state["stream"] != self._fingerprint:
            raise ValueError(
                f"state: saved by stream {state['stream']}, this is {self._fingerprint}: they differ in data, seed, "
                "batch_size, buckets or pairs_per_family; restore with those of the saved run or start a new one"
            )
        self._batches.close()
        self._seek(state["step"])

    def start_prefetch(self) -> None:
        self._batches.start_prefetch()

    def close(self) -> None:
        self._batches.close()
        super().close()

    def _next(self) -> Any:
        """The next batch; worker processes that died (for want of memory, say) are replaced, but not for ever."""
        for _ in range(_RESTARTS):
            try:
                return next(self._batches)
            except RuntimeError as error:  # Grain's, and as such also what tells of a dead worker
                if not self.stream.config.workers or "terminated unexpectedly" not in str(error):
                    raise
                warnings.warn(f"a worker process died before batch {self.step}; all are started again", stacklevel=3)
                self._batches.close()
                self._seek(self.step)
        raise OSError(
            f"data.workers={self.stream.config.workers}: worker processes died {_RESTARTS} times before batch "
            f"{self.step}; is there enough memory for them? Start again with fewer, or 0"
        )

    def _seek(self, step: int) -> None:
        self.step = step
        config = self.stream.config
        steps = grain.MapDataset.range(step, _LAST_STEP).map(self.stream.__getitem__)
        # One thread: a batch is bound by Python, more threads would only fight for the interpreter.
        ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch))
        if config.workers:
            options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch)
            ahead = ahead.mp_prefetch(options)
        self._batches = iter(ahead)


def train_iterator(
    families: Families, config: PipelineConfig, *, start_step: int = 0, shard_index: int = 0, shard_count: int = 1
) -> BatchIterator:
    """Batches of random pairs, endless, deterministic in (config.seed, step).

    Args:
      families: The split to draw from; read once in full here, then at random.
      start_step: Number of the first batch.
      shard_index, shard_count: This host, of how many; each gets its `batch_size / shard_count` rows of every batch.

    Raises:
      ValueError: empty split, no pair fits into the buckets, batch_size not divisible by shard_count, negative step.
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
    shard_index: int = 0,
    shard_count: int = 1,
    max_bad: int = 0,
) -> Iterator[Batch]:
    """The fixed evaluation pairs of a split, each once, shortest bucket first.

    Nothing is dropped: buckets are doubled upwards until the longest pair fits, and with every doubling the batch is
    halved, so that memory stays what `batch_size` pairs of the largest given bucket take. The last batch of a bucket is
    filled up with empty examples (id -1), so that a bucket is one compiled shape.

    Args:
      limit: For a quick look while training: only this many pairs, the same ones every time, from as many families as
        possible, and only pairs that fit into the given buckets, as every further shape is compiled.
      divisible_by: Every batch stays divisible by this, e.g. by the number of devices.
      shard_index, shard_count: As in `train_iterator`; all hosts get the same number of batches.
      max_bad: So many damaged records are left out, with a warning for each.

    Raises:
      BadRecordError: more than max_bad records are damaged.
      ValueError: no family or no evaluation pair in the split (with limit: none that fits), limit below 1, batch_size
        not divisible by divisible_by or shard_count.
    """
    check_buckets(buckets)
    _shard_rows(batch_size, shard_index, shard_count)
    if divisible_by < 1 or batch_size % divisible_by:
        raise ValueError(f"divisible_by: {divisible_by} was given, allowed are divisors of batch_size = {batch_size}")
    ids, lengths = _evaluation_pairs(families, max_bad)
    if limit is not None:
        chosen = _spread(ids, lengths <= buckets[-1], limit)
        ids, lengths = ids[chosen], lengths[chosen]
    parts = []
    unit = math.lcm(divisible_by, shard_count)
    for length, size in _evaluation_shapes(buckets, int(lengths.max()), batch_size, unit):
        fits, shard = lengths <= length, _shard_rows(size, shard_index, shard_count)
        parts += [(_filled_up(ids[fits][n : n + size], size)[shard], length) for n in range(0, fits.sum(), size)]
        ids, lengths = ids[~fits], lengths[~fits]
    read = _Reader(families)
    return (_assemble([read(*i) for i in part.tolist()], part, length) for part, length in parts)


def unbatch(batch: Batch) -> Iterator[tuple[tuple[int, int, int], Pair]]:
    """Id and pair of every example that is not empty, without padding."""
    for n, (family, i, j) in enumerate(batch["id"].tolist()):
        if family >= 0:
            x, y = slice(batch["x_length"][n]), slice(batch["y_length"][n])
            yield (family, i, j), Pair(batch["x"][n, x], batch["y"][n, y], batch["target"][n, x])


class _Reader:
    """Reads pairs by id and keeps the families read last decoded; every process fills its own cache."""

    def __init__(self, families: Families):
        self.families = families
        self._family = functools.lru_cache(_CACHED_FAMILIES)(families.__getitem__)

    def __call__(self, family: int, i: int, j: int) -> Pair:
        """The pair of an id; the empty one for an id of -1."""
        return pair(self._family(family).alignment, i, j) if family >= 0 else Pair(*[np.zeros(0, np.int32)] * 3)

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


def _evaluation_pairs(
    families: Families, max_bad: int
) -> tuple[Int64[np.ndarray, "pairs 3"], Int64[np.ndarray, " pairs"]]:
    """Ids of all evaluation pairs, family after family, and the length of the longer sequence of each."""
    ids, lengths = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    bad: list[str] = []
    for f, family in enumerate(readable(families, max_bad, bad)):
        if family is not None:
            ids.append(np.insert(family.pairs.astype(np.int64), 0, f, axis=1))
            lengths.append(row_lengths(family)[family.pairs].max(axis=1, initial=0))
    for told in bad:
        warnings.warn(f"left out: {told}", stacklevel=3)
    if not any(map(len, ids)):
        raise ValueError(
            f"families: none of the {len(families)} families of this split has evaluation pairs; "
            "evaluate on 'validation', 'test_iid' or 'test_ood', or on data with more families"
        )
    return np.concatenate(ids), np.concatenate(lengths)


def _spread(
    ids: Int64[np.ndarray, "pairs 3"], allowed: Bool[np.ndarray, " pairs"], limit: int
) -> Int64[np.ndarray, " chosen"]:
    """Which pairs to keep: a random one of every family, then a second one of every family, until there are `limit`."""
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


def _evaluation_shapes(buckets: Sequence[int], longest: int, batch_size: int, unit: int) -> Iterator[tuple[int, int]]:
    """Length and batch size of every bucket, up to one that holds `longest`."""
    yield from ((length, batch_size) for length in buckets)
    length = buckets[-1]
    while length < longest:
        length *= 2
        batch_size = batch_size if batch_size % (2 * unit) else batch_size // 2
        yield length, batch_size


def _filled_up(ids: Int64[np.ndarray, "pairs 3"], size: int) -> Int64[np.ndarray, "size 3"]:
    return np.pad(ids, ((0, size - len(ids)), (0, 0)), constant_values=-1)


def _shard_rows(batch_size: int, shard_index: int, shard_count: int) -> slice:
    """Rows of the global batch that belong to one host."""
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index: {shard_index} was given, allowed is 0 to shard_count - 1 = {shard_count - 1}")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size: {batch_size} was given, allowed are multiples of shard_count = {shard_count}")
    part = batch_size // shard_count
    return slice(shard_index * part, (shard_index + 1) * part)
