"""Batches of sequence pairs from the training families of one or several data sets.

A training batch is a pure function of (seed, step): `PairStream(...)[step]` draws one length bucket, then `batch_size`
pairs whose longer sequence falls into that bucket. No state is carried from step to step, so the batches are the same
for any number of worker processes, hosts or restarts.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int32

from data.augmentation import NO_ENDS, Cut, Ends, Shares, stretch
from data.batches import Batch, PairId, PairReader, assemble
from data.index import Families
from data.iterator import BatchIterator, Stream, shard_rows
from data.plan import PipelineConfig, Plan, Planner
from data.sampling import LengthIndex
from data.settings import MOST
from data.transforms import IDENTITY_EDGES, NO_TARGET, Pair, Tokens, identities

_AT_ONCE = 8  # candidates whose identities are computed together
_TRIED = 3  # donors of a flank, until one is long enough
_UNUSED = np.random.default_rng(0)  # where nothing is drawn; to make a generator takes as long as to make a pair


class Example(NamedTuple):
    """A training pair, and what was done to it."""

    id: PairId
    pair: Pair
    changes: tuple[str, ...]  # fields of `Shares`
    ends: Ends  # lengths of its flanks


class PairStream(Stream):
    """Training batches by step number: `stream[step]` is this host's part of the batch of that step.

    Picklable; the index is computed once and travels to the worker processes.
    """

    def __init__(self, families: Families, config: PipelineConfig, *, shard_index: int = 0, shard_count: int = 1):
        self.config = config
        most = MOST if config.pairs_per_family == -1 else config.pairs_per_family
        self.index = LengthIndex.build(families, config.buckets, most, config.max_bad_records)
        self.bad, self.content = self.index.bad, self.index.content
        self._planner = Planner(self.index, config)
        self._shard = shard_rows(config.batch_size, shard_index, shard_count)
        self._names: Sequence[str] = getattr(families, "names", ())
        self._read = PairReader(families)

    def __getitem__(self, step: int) -> Batch:
        bucket, examples = self.examples(step)
        ids = np.array([example.id for example in examples])
        return assemble([example.pair for example in examples], ids, bucket)

    def examples(self, step: int) -> tuple[int, list[Example]]:
        """Make this host's examples of a step; return the length that they are padded to, and the examples."""
        plan = self._planner.plan(step)
        rows = range(self._shard.start, self._shard.stop)
        return self.config.buckets[plan.bucket], [self._example(step, plan, n) for n in rows]

    def largest(self) -> Batch:
        """Return an empty batch of the largest bucket that has pairs; its arrays take no memory."""
        bucket = int(np.flatnonzero(self._planner.bucket_mass)[-1])
        rows = self._shard.stop - self._shard.start
        shapes = {"x": (self.config.buckets[bucket],), "x_length": (), "id": (4,)}
        shapes |= {"y": shapes["x"], "y_length": (), "target": shapes["x"]}
        return cast(Batch, {name: np.broadcast_to(np.int32(0), (rows, *shape)) for name, shape in shapes.items()})

    def bucket_shares(self) -> dict[int, float]:
        """Return the share of batches of each bucket that has any."""
        mass = self._planner.bucket_mass
        return {length: float(x) for length, x in zip(self.config.buckets, mass / mass.sum(), strict=True) if x}

    def fingerprint(self) -> str:
        """Return a hash of the settings and lengths that decide the batches; hosts and workers do not change it."""
        c = self.config
        later = (c.stagger, c.noise, c.flanks, c.negatives, tuple(c.identity_mass))
        # Later settings count where they are on, so that runs of earlier versions can be resumed.
        settings = (tuple(c.buckets), c.batch_size, c.seed, c.crop, *(later if any(later) else ()))
        digest = hashlib.sha256(repr(settings).encode())
        for array in (self.index.rows, self.index.first, self.index.ranks, self._planner.mass):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def description(self) -> str:
        """Say where the pairs come from, and which share of them is changed."""
        return "; ".join([*self._sources(), *self._shares(), self._too_long()])

    def _sources(self) -> Iterator[str]:
        mass = self._planner.mass
        for name, part in zip(self._names, self.index.parts, strict=False):
            yield f"{name} {mass[part].sum() / mass.sum():.0%} of pairs"

    def _shares(self) -> Iterator[str]:
        if self.config.identity_mass:
            bins = self._planner.mass.sum(axis=(0, 1))
            yield f"identity below .40 {bins[: IDENTITY_EDGES.index(0.40) + 1].sum() / bins.sum():.0%}"
        for field in dataclasses.fields(Shares):
            if share := getattr(self.config, field.name):
                yield f"{field.name} {share:.0%}"

    def _too_long(self) -> str:
        return f"{self.index.left_out:.1%} of pairs longer than the largest bucket"

    def _example(self, step: int, plan: Plan, n: int) -> Example:
        changes, length = plan.changes[n], self.config.buckets[plan.bucket]
        rng = self._generator(step, n) if changes.noise or changes.ends != NO_ENDS else _UNUSED
        if changes.partner:
            pair_id = (*plan.candidates[n, 0, :2].tolist(), *changes.partner)
            found = self._read(*pair_id)
        else:
            pair_id, found = self._first_fitting(plan.candidates[n], int(plan.bins[n]))
            found = changes.alter(found, rng)
        ends = NO_ENDS
        if changes.ends != NO_ENDS:
            found, ends = changes.flank(found, length, self._cutter(pair_id, plan, rng))
        return Example(pair_id, found, changes.names(), ends)

    def _generator(self, step: int, n: int) -> np.random.Generator:
        """Make the generator of draws that depend on the records read: no example may change another."""
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(step, 1, n)))

    def _first_fitting(self, candidates: Int32[np.ndarray, "attempts 4"], wanted: int) -> tuple[PairId, Pair]:
        """Return id and pair of the first candidate with an aligned residue, else of the last.

        One of the wanted identity bin is preferred; -1 stands for any.
        """
        for candidate in (candidates if wanted < 0 else self._preferred(candidates, wanted)).tolist():
            found = self._read(*candidate)
            if (found.target != NO_TARGET).any():
                break
        return tuple(candidate), found

    def _preferred(self, candidates: Int32[np.ndarray, "attempts 4"], wanted: int) -> Int32[np.ndarray, "some 4"]:
        """Return the first candidate of the wanted identity bin, or all if there is none; all are of one family."""
        family = self._read.family(int(candidates[0, 0]))
        if len(family.rows) == 2:  # there is one pair
            return candidates[:1]
        for first in range(0, len(candidates), _AT_ONCE):
            some = candidates[first : first + _AT_ONCE]
            found = identities(family.alignment, some[:, 1::2], family.insert_states)
            fits = np.searchsorted(IDENTITY_EDGES, found, side="right") == wanted
            if (fits := fits & ~np.isnan(found)).any():
                return some[fits][:1]
        return candidates

    def _cutter(self, pair_id: PairId, plan: Plan, rng: np.random.Generator) -> Cut:
        """Return a function that cuts a flank out of a clan other than the pair's and than its other flanks'."""
        units, index = self.index.units, self.index
        used = {int(units[pair_id[0]]), int(units[pair_id[2]])}
        donors = plan.donors[index.parts.index(index.part_of(pair_id[0]))].tolist()

        def cut(length: int) -> Tokens:
            first = int(rng.integers(len(donors)))
            unrelated = [f for f in donors[first:] + donors[:first] if int(units[f]) not in used]
            best = np.zeros(0, np.int32)
            for family in unrelated[:_TRIED]:
                rows = index.rows_of(family)
                # The longer half of the rows: flanks are longer than many a domain.
                found = self._read.sequence(family, int(rows[int(rng.integers(len(rows) // 2, len(rows)))]))
                if len(found) > len(best):
                    best, unit = found, int(units[family])
                if len(best) >= length:
                    break
            if len(best):
                used.add(unit)
            return stretch(best, length, rng)

        return cut


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
