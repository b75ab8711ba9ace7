"""Changes of training pairs: crops, staggered pairs, substitutions, unrelated flanks, unrelated partners.

Users' proteins are longer than the domains that families hold, and some pairs are no relatives.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from data.settings import Number
from data.transforms import Pair, Tokens, add_flanks, crop, stagger, substitute

Share = Annotated[float, Number(0.0, 1.0)]
Ends = tuple[int, int, int, int]  # residues before and after x, before and after y
Cut = Callable[[int], Tokens]  # makes a flank of about this length

NO_ENDS: Ends = (0, 0, 0, 0)
MEDIAN_FLANK, LONGEST_FLANK = 40, 300  # residues; half of the overhangs of whole proteins are longer than 40
_MEDIAN_DRAWN = 42  # some are cut short where the largest bucket or a sequence to cut from is
MOST_NOISE = 0.3  # share of residues that a noisy pair loses
_DRAWN = 4096  # flanked pairs, whose lengths are drawn once; each flanked pair of a batch has the lengths of one


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of the training pairs that are changed, which configs/base.py describes."""

    crop: Share = 0.0
    stagger: Share = 0.0
    noise: Share = 0.0
    flanks: Share = 0.0
    negatives: Share = 0.0


class Changes(NamedTuple):
    """Changes of one pair, as numbers that are drawn before the pair is read."""

    crop: Float64[np.ndarray, "3"] | None = None  # numbers for `transforms.crop`
    stagger: Float64[np.ndarray, "3"] | None = None  # numbers for `transforms.stagger`
    noise: float = 0.0  # share of residues to replace
    ends: Ends = NO_ENDS  # lengths of flanks
    partner: tuple[int, int] | None = None  # family and row that stand for y's

    def names(self) -> tuple[str, ...]:
        """Return the fields of `Shares` that are applied."""
        if self.partner:
            made: dict[str, object] = {"negatives": True}
        else:
            made = {"crop": self.crop is not None, "stagger": self.stagger is not None, "noise": self.noise > 0}
        made["flanks"] = self.ends != NO_ENDS
        return tuple(name for name, is_made in made.items() if is_made)

    def alter(self, whole: Pair, rng: np.random.Generator) -> Pair:
        """Crop, stagger and substitute."""
        if self.crop is not None:
            whole = crop(whole, self.crop)
        if self.stagger is not None:
            whole = stagger(whole, self.stagger)
        if self.noise:
            x, y = (substitute(tokens, self.noise, rng) for tokens in whole[:2])
            whole = Pair(x, y, whole.target)
        return whole

    def flank(self, core: Pair, longest: int, cut: Cut) -> tuple[Pair, Ends]:
        """Add flanks, so far as no sequence becomes longer than `longest`; return their lengths, too."""
        found = []
        for tokens, before, after in ((core.x, *self.ends[:2]), (core.y, *self.ends[2:])):
            share = min(1.0, (longest - len(tokens)) / max(before + after, 1))
            found += [cut(int(length * share)) if length else tokens[:0] for length in (before, after)]
        flanked = add_flanks(core, (found[0], found[1]), (found[2], found[3]))
        return flanked, (len(found[0]), len(found[1]), len(found[2]), len(found[3]))


class FlankLengths:
    """Lengths of flanks, and the length buckets that flanked pairs come from and go to.

    Half of the flanks are longer than MEDIAN_FLANK. A pair of bucket k that becomes longer by `needed` residues goes to
    the first bucket that holds the longest pair of bucket k and these; if none does, to the largest, where its flanks
    are cut short. Pairs of the largest bucket get no flanks, unless there is no other bucket.
    """

    def __init__(self, buckets: Sequence[int]):
        rng = np.random.default_rng(0)
        lengths = np.ceil(_MEDIAN_DRAWN * -np.log2(1 - rng.random((_DRAWN, 4)))).clip(1, LONGEST_FLANK).astype(int)
        there = rng.random((_DRAWN, 4)) < 0.5
        there[np.arange(_DRAWN), rng.integers(0, 4, _DRAWN)] |= ~there.any(axis=1)
        lengths = np.where(there, lengths, 0)
        needed = np.maximum(lengths[:, 0] + lengths[:, 1], lengths[:, 2] + lengths[:, 3])
        self._ends: Int64[np.ndarray, "drawn 4"] = lengths[np.argsort(needed, kind="stable")]
        room = np.subtract.outer(buckets, buckets).T.clip(0)  # [from, to]
        self._stop: Int64[np.ndarray, "buckets buckets"] = np.searchsorted(np.sort(needed), room, side="right")
        self._stop[:, -1] = _DRAWN
        self._start = np.pad(self._stop[:, :-1], ((0, 0), (1, 0)))

    def moved(self, mass: Float64[np.ndarray, " buckets"]) -> Float64[np.ndarray, "buckets buckets"]:
        """Share the mass out to flanked pairs, by the bucket that they come from and the bucket that they go to."""
        origins = np.append(mass[:-1], 0) if mass[:-1].any() else mass
        return mass.sum() * (origins / origins.sum())[:, None] * (self._stop - self._start) / _DRAWN

    def draw(self, origin: int, bucket: int, draw: float) -> Ends:
        """Return lengths with which a pair goes from bucket `origin` to `bucket`; `draw` is uniform in [0, 1)."""
        start, stop = self._start[origin, bucket], self._stop[origin, bucket]
        return tuple(self._ends[start + int(draw * (stop - start))].tolist())


def stretch(tokens: Tokens, length: int, rng: np.random.Generator) -> Tokens:
    """Cut a random stretch out of a sequence; a shorter sequence is returned whole."""
    first = int(rng.integers(0, max(len(tokens) - length, 0) + 1))
    return tokens[first : first + length]
