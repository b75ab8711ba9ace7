"""Choices for a whole training batch, made from seed and step before any record is read."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from data.augmentation import MOST_NOISE, NO_ENDS, Changes, Ends, FlankLengths, Shares
from data.sampling import LengthIndex
from data.settings import BATCH_SIZE, SEED, BinShares, Integer, Lengths, Section
from data.transforms import IDENTITY_EDGES

_ATTEMPTS = 4  # candidates of an example, in case that the first have no aligned residue
_ATTEMPTS_BY_IDENTITY = 32  # the same where the identity has to fall into a bin
_PARTNERS = 20  # draws of a second family before a negative pair is given up
_DONORS = 8  # families that the flanks of a batch are cut from; one for each flank would take as long as all pairs

Cumulative = Float64[np.ndarray, " choices"]


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Shares, Section):
    """Settings of the training batches. `workers` and `prefetch` do not change the batches."""

    name: ClassVar[str] = "data"

    # ascending; a pair is padded to the first that holds both sequences
    buckets: Annotated[Sequence[int], Lengths()] = (64, 128, 192, 256, 384)
    batch_size: Annotated[int, BATCH_SIZE] = 64  # pairs a step, over all hosts
    seed: Annotated[int, SEED] = 0  # of everything that is drawn
    # largest weight of a family; below, a family weighs as much as it has pairs
    pairs_per_family: Annotated[int, Integer(1, or_all=True)] = 100
    # shares of the pairs in the bins of IDENTITY_EDGES; none for the shares that the families have
    identity_mass: Annotated[Sequence[float], BinShares(len(IDENTITY_EDGES) + 1)] = ()
    workers: Annotated[int, Integer(0, 1024)] = 0  # processes that make batches; 0 for a thread
    prefetch: Annotated[int, Integer(1, 1 << 16)] = 4  # batches made ahead, by each worker
    max_bad_records: Annotated[int, Integer()] = 0  # damaged records that may be left out; one more is an error


class Plan(NamedTuple):
    """Choices for all examples of a global batch."""

    bucket: int
    candidates: Int32[np.ndarray, "batch attempts 4"]  # ids to try in turn
    bins: Int64[np.ndarray, " batch"]  # identity bin that is wanted; -1 for any
    changes: list[Changes]
    donors: list[Int64[np.ndarray, " donors"]]  # families of each data set, to cut flanks from


class Planner:
    """Draws of the plans, by the mass of families, buckets and identity bins."""

    def __init__(self, index: LengthIndex, config: PipelineConfig):
        self.index, self.config = index, config
        self.mass = index.by_identity(config.identity_mass) if config.identity_mass else index.mass
        self._flanks = FlankLengths(config.buckets)
        for name in ("flanks", "negatives"):
            if getattr(config, name):
                self._check_units(name)

    def plan(self, step: int) -> Plan:
        """Draw the plan of a step."""
        config, size = self.config, self.config.batch_size
        rng, other = self._generator(step), self._generator(step, 0)
        bucket = int(_choose(_cumulative(self.bucket_mass), rng.random()))
        origins, ends = self._flanked(bucket, other.random((size, 3)) if config.flanks else np.ones((size, 3)))
        attempts = _ATTEMPTS_BY_IDENTITY if config.identity_mass else _ATTEMPTS
        candidates, bins = np.zeros((size, attempts, 4), np.int32), np.full(size, -1)
        for origin in np.unique(origins).tolist():
            of_origin = np.flatnonzero(origins == origin)
            family, bins[of_origin] = self._families(origin, (len(of_origin), attempts), rng)
            candidates[of_origin] = self.index.draw(family, origin, rng)
        crops, draws = rng.random((size, 4)), other.random((size, 7))
        partners = [
            self._partner(int(candidates[n, 0, 0]), int(origins[n]), other) if draws[n, 6] < config.negatives else None
            for n in range(size)
        ]
        changes = [self._changes(*of) for of in zip(crops, draws, ends, partners, strict=True)]
        donors = [self._donors(part, other) for part in self.index.parts] if config.flanks else []
        return Plan(bucket, candidates, bins, changes, donors)

    @functools.cached_property
    def bucket_mass(self) -> Float64[np.ndarray, " buckets"]:
        """Mass of the batches of each bucket, with flanks."""
        share, moved = self.config.flanks, self._flanks.moved(self._pair_mass).sum(axis=0)
        return (1 - share) * self._pair_mass + share * moved if share else self._pair_mass

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=key))

    @functools.cached_property
    def _pair_mass(self) -> Float64[np.ndarray, " buckets"]:
        return self.mass.sum(axis=(0, 2)) if self.mass.ndim == 3 else self.mass.sum(axis=0)

    @functools.cached_property
    def _by_bucket(self) -> list[Cumulative]:
        """Cumulative shares over families, and over the identity bins of each, in every bucket."""
        return [_cumulative(self.mass[:, bucket].ravel()) for bucket in range(self.mass.shape[1])]

    def _families(self, bucket: int, shape: tuple[int, int], rng: np.random.Generator):
        """Draw a family for each attempt, or one family and an identity bin for each example."""
        if self.mass.ndim == 2:
            return _choose(self._by_bucket[bucket], rng.random(shape)), -1
        family, bins = np.divmod(_choose(self._by_bucket[bucket], rng.random(shape[0])), self.mass.shape[2])
        return np.repeat(family[:, None], shape[1], axis=1), bins

    def _flanked(self, bucket: int, draws: Float64[np.ndarray, "batch 3"]) -> tuple[Int[np.ndarray, " batch"], list]:
        """Choose the examples with flanks, their lengths, and the bucket of each pair without its flanks."""
        origins, ends = np.full(len(draws), bucket), [NO_ENDS] * len(draws)
        moved = self._flanks.moved(self._pair_mass)[:, bucket]
        share = self.config.flanks * moved.sum() / self.bucket_mass[bucket]
        for n in np.flatnonzero(draws[:, 0] < share):
            origins[n] = _choose(_cumulative(moved), draws[n, 1])
            ends[n] = self._flanks.draw(int(origins[n]), bucket, draws[n, 2])
        return origins, ends

    def _changes(self, crop, draws, ends: Ends, partner: tuple[int, int] | None) -> Changes:
        return Changes(
            crop=crop[1:] if crop[0] < self.config.crop else None,
            stagger=draws[1:4] if draws[0] < self.config.stagger else None,
            noise=float(MOST_NOISE * draws[5]) if draws[4] < self.config.noise else 0.0,
            ends=ends,
            partner=partner,
        )

    def _partner(self, family: int, bucket: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Draw family and row of an unrelated sequence, of another clan in the same data set; None if none is found."""
        cumulative, bins = self._by_bucket[bucket], self.mass[0, 0].size
        part = self.index.part_of(family)
        low, high = (cumulative[end * bins - 1] if end else 0.0 for end in (part.start, part.stop))
        for draw in rng.random(_PARTNERS):
            other = min(int(_choose(cumulative, low + draw * (high - low))) // bins, part.stop - 1)
            if self.index.units[other] != self.index.units[family]:
                return other, int(self.index.draw(np.array([other]), bucket, rng)[0, 1])
        return None

    def _donors(self, part: slice, rng: np.random.Generator) -> Int64[np.ndarray, " donors"]:
        mass = self.index.mass[part].sum(axis=1)
        return part.start + _choose(_cumulative(mass), rng.random(_DONORS))

    def _check_units(self, name: str) -> None:
        for number, part in enumerate(self.index.parts, start=1):
            used = self.index.mass[part].any(axis=1)
            if len(np.unique(self.index.units[part][used])) < 2:
                raise ValueError(
                    f"data.{name}={getattr(self.config, name)}: needs families of at least two clans, data set "
                    f"{number} of data.dir has one: give data.{name}=0, or other data"
                )


def _cumulative(mass: Float64[np.ndarray, " choices"]) -> Cumulative:
    if not mass.any():  # nothing is drawn from it
        return mass.cumsum()
    shares = (mass / mass.sum()).cumsum()
    return shares / shares[-1]


def _choose(cumulative: Cumulative, draws: Any) -> Any:
    """Return the choices that numbers in [0, 1) stand for."""
    return np.searchsorted(cumulative, draws, side="right")
