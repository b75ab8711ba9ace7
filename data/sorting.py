"""The sorting task of arXiv 2002.11296 (tensor2tensor's): random symbols in, the same symbols in order out.

Tokens: 0 pads, 1 to `symbols` are the symbols, `symbols` + 1 is END. The model reads `x` (the symbols, END) and, one
place at a time, `y` (END, the sorted symbols), from which it has to make `target` (the sorted symbols, END).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
from jaxtyping import Int32

SPLITS = {"validation": (1, 0), "test_iid": (2, 0), "test_ood": (3, 1)}  # seed; how many times `longest` is exceeded


class SortingBatch(TypedDict):
    """Padding is 0; all three are `length` tokens long."""

    x: Int32[np.ndarray, "batch places"]
    y: Int32[np.ndarray, "batch places"]
    target: Int32[np.ndarray, "batch places"]
    length: Int32[np.ndarray, " batch"]
    id: Int32[np.ndarray, " batch"]  # number of the sequence; -1 for one that only fills a batch up


@dataclasses.dataclass(frozen=True)
class SortingConfig:
    """`config.data` of the task, and what the batches depend on besides.

    sequences: to train on, drawn once with replacement from `symbols` symbols, of lengths 1 to `longest`.
    test_sequences: of each test split: `test_iid` has lengths 1 to `longest`, `test_ood` those up to twice as long.
    workers, prefetch: as of `pipeline.PipelineConfig`.
    """

    batch_size: int = 128
    seed: int = 0
    sequences: int = 100_000
    test_sequences: int = 5_000
    symbols: int = 20
    longest: int = 10
    workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        least = {"workers": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value, at_least = getattr(self, field.name), least.get(field.name, 1)
            if value < at_least:
                raise ValueError(f"{field.name}: {value} was given, allowed is {at_least} or more")
        if self.sequences < self.batch_size:
            raise ValueError(
                f"sequences: {self.sequences} was given, allowed is batch_size = {self.batch_size} or more"
            )


class SortingStream:
    """Training batches by step number: `stream[step]` is this host's part. Every sequence comes once in an epoch."""

    bad: tuple[str, ...] = ()

    def __init__(self, config: SortingConfig, *, shard_index: int = 0, shard_count: int = 1):
        if config.batch_size % shard_count:
            raise ValueError(f"batch_size: {config.batch_size} was given, allowed are multiples of {shard_count}")
        self.config = config
        self._shard = shard_index, shard_count
        self._symbols, self._lengths = _draw(config, config.sequences, 0, 1, config.longest)
        self._order = functools.lru_cache(2)(self._shuffled)

    def __getitem__(self, step: int) -> SortingBatch:
        steps = self.config.sequences // self.config.batch_size
        epoch, step = divmod(step, steps)
        of_all_hosts = self._order(epoch)[step * self.config.batch_size : (step + 1) * self.config.batch_size]
        shard, shards = self._shard
        ids = np.split(of_all_hosts, shards)[shard]
        return _assemble(self._symbols[ids], self._lengths[ids], ids, self.config.symbols)

    def fingerprint(self) -> str:
        """Names the stream, whatever the hosts and workers."""
        c = self.config
        of = repr(("sorting", c.batch_size, c.seed, c.sequences, c.symbols, c.longest))
        return hashlib.sha256(of.encode()).hexdigest()[:16]

    def description(self) -> str:
        return f"{self.config.sequences:,} sequences"

    def _shuffled(self, epoch: int) -> Int32[np.ndarray, " sequences"]:
        rng = np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(1, epoch)))
        return rng.permutation(self.config.sequences).astype(np.int32)

    def __reduce__(self):
        shard, shards = self._shard
        return functools.partial(SortingStream, shard_index=shard, shard_count=shards), (self.config,)


def evaluation_batches(config: SortingConfig, split: str, limit: int | None = None) -> Iterator[SortingBatch]:
    """Sequences that training does not see (short ones may still come in both by chance), always the same.

    The last batch is filled up with sequences of length 0, id -1. Raises ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} was given, allowed are {', '.join(SPLITS)}")
    number, times = SPLITS[split]
    count = min(limit or config.test_sequences, config.test_sequences)
    symbols, lengths = _draw(config, count, number, times * config.longest + 1, (times + 1) * config.longest)
    for start in range(0, count, config.batch_size):
        part = slice(start, start + config.batch_size)
        filled = ((0, config.batch_size - len(lengths[part])),)
        ids = np.pad(np.arange(count, dtype=np.int32)[part], filled, constant_values=-1)
        yield _assemble(np.pad(symbols[part], (*filled, (0, 0))), np.pad(lengths[part], filled), ids, config.symbols)


def _draw(config: SortingConfig, count: int, stream: int, shortest: int, longest: int):
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0, stream)))
    lengths = rng.integers(shortest, longest + 1, count)
    return rng.integers(1, config.symbols + 1, (count, longest)).astype(np.int32), lengths.astype(np.int32)


def _assemble(symbols, lengths, ids, symbol_count: int) -> SortingBatch:
    place = np.arange(symbols.shape[1] + 1)
    real, end = ids >= 0, symbol_count + 1
    x = np.where(place[:-1] < lengths[:, None], symbols, end)
    in_order = np.sort(x, axis=1)  # END is the largest, so it comes last
    x, in_order = (np.pad(tokens, ((0, 0), (0, 1)), constant_values=end) for tokens in (x, in_order))
    y = np.roll(in_order, 1, axis=1)
    length = np.where(real, lengths + 1, 0).astype(np.int32)
    inside = place < length[:, None]
    x, y, target = (np.where(inside, tokens, 0).astype(np.int32) for tokens in (x, y, in_order))
    return SortingBatch(x=x, y=y, target=target, length=length, id=ids)
