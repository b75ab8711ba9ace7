"""Data of the sorting task of arXiv 2002.11296 (after tensor2tensor): random symbols, and the same symbols in order.

Tokens: 0 is padding, 1 to `symbols` are the symbols, `symbols` + 1 is END. The model reads `x` (the symbols, END) and,
one place at a time, `y` (END, the sorted symbols). It has to predict `target` (the sorted symbols, END).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Annotated, ClassVar, TypedDict

import numpy as np
from jaxtyping import Int32

from data.iterator import Stream, shard_rows
from data.memory import available
from data.settings import BATCH_SIZE, SEED, Integer, Section

# By split: number of its random stream, and its lengths: n * longest + 1 to (n + 1) * longest. Stream 0 is training.
EVALUATION_SPLITS = {"validation": (1, 0), "test_iid": (2, 0), "test_ood": (3, 1)}


class SortingBatch(TypedDict):
    """Sequences and their sorted copies; all have `length` tokens, then zeros."""

    x: Int32[np.ndarray, "batch places"]
    y: Int32[np.ndarray, "batch places"]
    target: Int32[np.ndarray, "batch places"]
    length: Int32[np.ndarray, " batch"]
    id: Int32[np.ndarray, " batch"]  # number of the sequence; -1 for an empty one that fills the batch up


@dataclasses.dataclass(frozen=True)
class SortingConfig(Section):
    """Settings of the batches: `config.data` of a run, its batch size and its seed."""

    name: ClassVar[str] = "data"

    batch_size: Annotated[int, BATCH_SIZE] = 128
    seed: Annotated[int, SEED] = 0
    sequences: Annotated[int, Integer(1)] = 100_000  # to train on, drawn once, with lengths 1 to `longest`
    # of each evaluation split; test_ood has lengths from `longest` + 1 to 2 `longest`
    test_sequences: Annotated[int, Integer(1)] = 5_000
    symbols: Annotated[int, Integer(1, 1 << 20)] = 20
    longest: Annotated[int, Integer(1, 1 << 20)] = 10
    workers: Annotated[int, Integer(0, 1024)] = 0  # as in pipeline.PipelineConfig
    prefetch: Annotated[int, Integer(1, 1 << 16)] = 4

    def __post_init__(self):
        super().__post_init__()
        if self.sequences < self.batch_size:
            given = self.given("sequences", self.sequences)
            raise ValueError(f"{given}: allowed is batch_size={self.batch_size} or more")


class SortingStream(Stream):
    """Training batches by step number: `stream[step]` is this host's part. An epoch has every sequence at most once."""

    bad: tuple[str, ...] = ()
    content = ""  # settings decide all

    def __init__(self, config: SortingConfig, *, shard_index: int = 0, shard_count: int = 1):
        self.config = config
        self._rows = shard_rows(config.batch_size, shard_index, shard_count)
        _check_memory(config.sequences, config.longest)

    def __getitem__(self, step: int) -> SortingBatch:
        steps = self.config.sequences // self.config.batch_size
        epoch, step = divmod(step, steps)
        order = _order(self.config.seed, self.config.sequences, epoch)
        ids = order[step * self.config.batch_size : (step + 1) * self.config.batch_size][self._rows]
        symbols, lengths = self._sequences
        return _assemble(symbols[ids], lengths[ids], ids, self.config.symbols)

    @functools.cached_property
    def _sequences(self) -> tuple[Int32[np.ndarray, "sequences longest"], Int32[np.ndarray, " sequences"]]:
        return _draw(self.config, self.config.sequences, 0, 1, self.config.longest)

    def largest(self) -> SortingBatch:
        """Return an empty batch, all of which have one shape; its arrays take no memory."""
        rows, places = self._rows.stop - self._rows.start, self.config.longest + 1
        tokens, numbers = (np.broadcast_to(np.int32(0), shape) for shape in ((rows, places), (rows,)))
        return SortingBatch(x=tokens, y=tokens, target=tokens, length=numbers, id=numbers)

    def fingerprint(self) -> str:
        """Return a hash of all that decides the batches; hosts and workers do not change it."""
        c = self.config
        settings = repr(("sorting", c.batch_size, c.seed, c.sequences, c.symbols, c.longest))
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def description(self) -> str:
        return f"{self.config.sequences:,} sequences"


def evaluation_batches(config: SortingConfig, split: str, limit: int | None = None) -> Iterator[SortingBatch]:
    """Yield batches of the fixed sequences of a split, drawn apart from training (short ones may occur in both).

    The last batch is filled up with sequences of length 0, id -1. Raises ValueError: an unknown split.
    """
    if split not in EVALUATION_SPLITS:
        raise ValueError(f"split: {split!r} was given, allowed are {', '.join(EVALUATION_SPLITS)}")
    stream, times = EVALUATION_SPLITS[split]
    count = min(limit or config.test_sequences, config.test_sequences)
    symbols, lengths = _draw(config, count, stream, times * config.longest + 1, (times + 1) * config.longest)
    for start in range(0, count, config.batch_size):
        part = slice(start, start + config.batch_size)
        filled = ((0, config.batch_size - len(lengths[part])),)
        ids = np.pad(np.arange(count, dtype=np.int32)[part], filled, constant_values=-1)
        yield _assemble(np.pad(symbols[part], (*filled, (0, 0))), np.pad(lengths[part], filled), ids, config.symbols)


@functools.lru_cache(2)
def _order(seed: int, sequences: int, epoch: int) -> Int32[np.ndarray, " sequences"]:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch)))
    return rng.permutation(sequences).astype(np.int32)


def _draw(config: SortingConfig, count: int, stream: int, shortest: int, longest: int):
    _check_memory(count, longest)
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0, stream)))
    lengths = rng.integers(shortest, longest + 1, count)
    return rng.integers(1, config.symbols + 1, (count, longest)).astype(np.int32), lengths.astype(np.int32)


def _check_memory(count: int, longest: int) -> None:
    needed, left = 12 * count * longest, available()  # bytes: 8 for a symbol that is drawn, and the 4 that stay
    if needed > left:
        raise ValueError(
            f"{count:,} sequences of up to {longest:,} symbols need {needed / 1e9:,.1f} GB of memory, "
            f"{left / 1e9:,.1f} GB are free: lower data.sequences, data.test_sequences or data.longest"
        )


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
