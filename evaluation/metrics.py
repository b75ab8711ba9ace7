"""Score alignments: sums for one pair, and their means over many with bootstrap intervals; see docs/math.md, section 8.

A pair is scored once, into sums and counts (`PairScores`). Every metric is a ratio of such sums: means over a split, an
identity bin or a bootstrap sample of families are then a few additions.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32

from data.transforms import NO_TARGET, Pair, pair_identity

BINS = ("<.15", ".15-.20", ".20-.25", ".25-.30", ".30-.40", ".40-.60", ">.60")
_BIN_EDGES = (0.15, 0.20, 0.25, 0.30, 0.40, 0.60)  # a bin holds its lower edge
_TENTHS = 10  # groups of confidence
_RESAMPLES = 1000  # samples of the bootstrap
LEAST_FAMILIES = 5  # of an interval: the bootstrap of fewer is far too narrow, and without width for one
FEW_PAIRS = 10  # a figure of fewer pairs is marked
PROBABILITY_FLOOR = 1e-6  # a true column outside the band costs 13.8 nats, not infinitely many

Ratio = Float64[np.ndarray, "2 pairs"]  # numerator and denominator of each pair
Summary = dict[str, dict[str, float | None]]  # {metric: {"value", "low", "high"}}


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Sums and counts of one pair, NaN where a number does not apply: a diagonal has no cross-entropy."""

    family: str
    identity: float  # share of the aligned residues that are equal; NaN where none is aligned
    aligned: int  # residues of x with a target, over which the first three sums run
    abs_error: float = math.nan  # of the barycenter, residues
    within_1: float = math.nan
    cross_entropy: float = math.nan  # nats
    true_positives: float = math.nan  # residue pairs predicted and in the reference
    predicted: float = math.nan
    reference: float = math.nan
    reconstruction_nats: float = math.nan
    reconstruction_residues: float = math.nan
    masked_nats: float = math.nan  # the same with residues of x masked before the queries are computed
    masked_residues: float = math.nan

    @property
    def f1(self) -> float:
        """F1 of the pair; NaN where nothing is predicted and nothing is in the reference."""
        pairs = self.predicted + self.reference
        return 2 * self.true_positives / pairs if pairs else math.nan


# Each metric is the sum of the first fields over the sum of the second.
METRICS = {
    "reconstruction": (("reconstruction_nats",), ("reconstruction_residues",)),
    "reconstruction_masked": (("masked_nats",), ("masked_residues",)),
    "sparse_ce": (("cross_entropy",), ("aligned",)),
    "barycenter_mae": (("abs_error",), ("aligned",)),
    "barycenter_within_1": (("within_1",), ("aligned",)),
    "precision": (("true_positives",), ("predicted",)),
    "recall": (("true_positives",), ("reference",)),
    "f1": (("true_positives", "true_positives"), ("predicted", "reference")),
}


def identity_bin(identity: float) -> str | None:
    """Return the bin of an identity in [0, 1]; None for NaN."""
    return None if math.isnan(identity) else BINS[int(np.searchsorted(_BIN_EDGES, identity, side="right"))]


def barycenters(plan: Float[np.ndarray, "x_length y_length"]) -> Float64[np.ndarray, " x_length"]:
    """Return the mean column of each row, weighted by the plan; for a row without mass, the scaled diagonal."""
    x_length, y_length = plan.shape
    mass = plan.sum(axis=1, dtype=np.float64)
    moment = plan.astype(np.float64) @ np.arange(y_length)
    scaled = (np.arange(x_length) + 0.5) * y_length / x_length - 0.5
    return np.where(mass > 0, moment / np.where(mass > 0, mass, 1), scaled)


def score_alignment(family: str, pair: Pair, match: Int32[np.ndarray, " x_length"]) -> PairScores:
    """Score a hard alignment alone: the position in y, or -1, of each residue of x."""
    aligned = pair.target != NO_TARGET
    return PairScores(
        family=family,
        identity=pair_identity(pair),
        aligned=int(aligned.sum()),
        true_positives=float((match == pair.target)[aligned].sum()),
        predicted=float((match != NO_TARGET).sum()),
        reference=float(aligned.sum()),
    )


def score_prediction(
    family: str, pair: Pair, positions: Float64[np.ndarray, " x_length"], match: Int32[np.ndarray, " x_length"]
) -> PairScores:
    """Score soft positions in y, and a hard alignment (position in y or -1), of the residues of x.

    Raises ValueError if the position of an aligned residue is not finite.
    """
    error = np.abs(positions - pair.target)[pair.target != NO_TARGET]
    if not np.isfinite(error).all():
        raise ValueError(f"positions: NaN or inf for an aligned residue of a pair of {family}; all must be finite")
    scores = score_alignment(family, pair, match)
    return dataclasses.replace(scores, abs_error=float(error.sum()), within_1=float((error <= 1).sum()))


def score_plan(
    family: str, pair: Pair, plan: Float[np.ndarray, "rows columns"], match: Int32[np.ndarray, " x_length"]
) -> PairScores:
    """Score a plan over the residues of x and y (no dustbin, no padding) and the alignment decoded from it.

    Raises ValueError if the plan is not [length of x, length of y] or not finite.
    """
    if plan.shape != (len(pair.x), len(pair.y)):
        raise ValueError(
            f"plan: shape {plan.shape} was given for a pair of lengths {len(pair.x)} and {len(pair.y)} of {family}; "
            "cut padding and the dustbin off first"
        )
    aligned = np.flatnonzero(pair.target != NO_TARGET)
    nats = -np.log(np.maximum(plan[aligned, pair.target[aligned]], PROBABILITY_FLOOR))
    scores = score_prediction(family, pair, barycenters(plan), match)
    return dataclasses.replace(scores, cross_entropy=float(nats.sum(dtype=np.float64)))


class Reliability:
    """Share of decoded residue pairs that the reference has, by tenths of their confidence."""

    def __init__(self):
        self._sums = np.zeros((_TENTHS, 3))  # pairs, confidence, correct ones

    def add(self, confidence: Float[np.ndarray, " pairs"], correct: Bool[np.ndarray, " pairs"]) -> None:
        """Count decoded residue pairs."""
        tenth = np.clip((confidence * _TENTHS).astype(int), 0, _TENTHS - 1)
        np.add.at(self._sums, tenth, np.stack([np.ones(len(tenth)), confidence, correct], axis=1))

    def tenths(self) -> list[dict[str, float]]:
        """Return `{"confidence": mean, "correct": share, "pairs": count}` of every tenth that holds pairs, rising."""
        return [
            {"confidence": float(confidence / count), "correct": float(correct / count), "pairs": int(count)}
            for count, confidence, correct in self._sums
            if count
        ]


def calibration(tenths: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return mean confidence, share that is right, expected calibration error over tenths, and number of pairs."""
    stated, right, count = (np.array([of[key] for of in tenths]) for key in ("confidence", "correct", "pairs"))
    share = count / count.sum()
    error = float(share @ np.abs(stated - right))
    return {"stated": float(share @ stated), "right": float(share @ right), "error": error, "pairs": int(count.sum())}


def summarise(scores: Sequence[PairScores]) -> dict:
    """Pool the sums of all pairs, with bootstrap 95 % intervals over families, overall and by identity bin.

    Pairs of one family are not independent: families are drawn with replacement, each with all its pairs. "low" and
    "high" are None for a metric that applies to fewer than `LEAST_FAMILIES`. The summary is {"overall": {metric:
    {"value", "low", "high"}}, "bins": {bin: {metric: ..., "pairs": number, "families": number}}, "pairs": number,
    "families": number}. Metrics that apply to no pair, and bins without a pair, are left out.
    """
    ratios = {name: _ratio(scores, *fields) for name, fields in METRICS.items()}
    families = np.unique([score.family for score in scores], return_inverse=True)[1]
    return by_bin(ratios, families, np.array([identity_bin(score.identity) or "" for score in scores]), BINS)


def summarise_negatives(
    families: Sequence[str],
    scores: Float64[np.ndarray, " pairs"],
    of_related: Float64[np.ndarray, " related"],
    decoded: Float64[np.ndarray, " pairs"],
    shorter: Float64[np.ndarray, " pairs"],
) -> dict:
    """Summarise pairs of unrelated sequences, in the form of `summarise` without bins.

    `auc` is the area under the ROC curve: the share of all (related, unrelated) couples in which the related pair has
    the higher score, where ties count half. `false_pairs` is the number of decoded residue pairs over the residues of
    the shorter sequences. Intervals are over the families of the unrelated pairs' first sequences.

    Args:
        families: Family of the first sequence of each unrelated pair.
        scores: Score of each unrelated pair.
        of_related: Scores of the evaluation pairs.
        decoded: Residue pairs that are aligned in each unrelated pair.
        shorter: Length of the shorter sequence of each unrelated pair, in residues.
    """
    in_order = np.sort(of_related)
    not_higher, lower = (np.searchsorted(in_order, scores, side) for side in ("right", "left"))
    wins = 1 - (not_higher + lower) / (2 * len(in_order))
    ratios = {"auc": np.stack([wins, np.ones(len(wins))]), "false_pairs": np.stack([decoded, shorter])}
    return by_bin(ratios, np.unique(families, return_inverse=True)[1], np.full(len(wins), ""), ())


def by_bin(ratios: dict[str, Ratio], families: np.ndarray, bins: np.ndarray, names: Iterable[str]) -> dict:
    """Compute `intervals` over all pairs and in each bin that holds any, and count pairs and families."""

    def group(members: np.ndarray) -> Summary:
        return intervals({name: ratio[:, members] for name, ratio in ratios.items()}, families[members])

    def sizes(members: np.ndarray) -> dict[str, int]:
        return {"pairs": len(members), "families": len(np.unique(families[members]))}

    everything, of_bins = np.arange(len(bins)), {name: np.flatnonzero(bins == name) for name in names}
    summaries = {name: group(members) | sizes(members) for name, members in of_bins.items() if len(members)}
    return {"overall": group(everything), "bins": summaries} | sizes(everything)


def _ratio(scores: Sequence[PairScores], numerator: Sequence[str], denominator: Sequence[str]) -> Ratio:
    """Return numerator and denominator of each pair, both 0 where the metric does not apply."""
    sums = [[sum(getattr(score, field) for field in fields) for score in scores] for fields in (numerator, denominator)]
    ratio = np.array(sums, np.float64).reshape(2, len(scores))
    applies = np.isfinite(ratio).all(axis=0) & (ratio[1] > 0)
    return np.where(applies, ratio, 0)


def intervals(ratios: dict[str, Ratio], family: Int[np.ndarray, " pairs"]) -> Summary:
    """Compute ratios of sums over pairs, from numerators and denominators, with bootstrap intervals over families.

    Metrics that apply to no pair are left out; for fewer than `LEAST_FAMILIES`, "low" and "high" are None.
    """
    ratios = {name: ratio for name, ratio in ratios.items() if ratio[1].sum() > 0}
    if not ratios:
        return {}
    _, family = np.unique(family, return_inverse=True)
    count = int(family.max()) + 1
    sums = np.array([[np.bincount(family, part, count) for part in ratio] for ratio in ratios.values()])
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return {name: _interval(of, weights.astype(np.float64)) for name, of in zip(ratios, sums, strict=True)}


def _interval(sums: Float64[np.ndarray, "2 families"], weights: Float64[np.ndarray, "resamples families"]) -> dict:
    """Return the ratio of sums over families, and its 95 % interval over families that are drawn so often."""
    value = float(sums[0].sum() / sums[1].sum())
    if np.count_nonzero(sums[1]) < LEAST_FAMILIES:
        return {"value": value, "low": None, "high": None}
    numerator, denominator = sums @ weights.T
    drawn = denominator > 0  # else the metric applies to none of the families that were drawn
    low, high = np.quantile(numerator[drawn] / denominator[drawn], [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}
