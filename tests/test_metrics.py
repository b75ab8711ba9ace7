import dataclasses
import math

import numpy as np
import pytest

from data.transforms import Pair
from evaluation import metrics
from evaluation.metrics import PairScores


def pair(target: list[int], y_length: int, x: list[int] | None = None, y: list[int] | None = None) -> Pair:
    x = x or [1] * len(target)
    y = y or [1] * y_length
    return Pair(np.array(x, np.int32), np.array(y, np.int32), np.array(target, np.int32))


def scores(family: str, identity: float = 0.5, **sums: float) -> PairScores:
    return PairScores(**{"family": family, "identity": identity, "aligned": 10, **sums})


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (0.0, "<.15"),
        (0.149, "<.15"),
        (0.15, ".15-.20"),
        (0.2, ".20-.25"),
        (0.25, ".25-.30"),
        (0.3, ".30-.40"),
        (0.399, ".30-.40"),
        (0.4, ".40-.60"),
        (0.599, ".40-.60"),
        (0.6, ">.60"),
        (1.0, ">.60"),
        (math.nan, None),
    ],
)
def test_identity_bins_hold_their_lower_edge(identity, name):
    assert metrics.identity_bin(identity) == name


def test_barycenter_uses_real_mass_and_rows_without_mass_fall_on_the_scaled_diagonal():
    plan = np.array([[0.2, 0.2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1e-6]], np.float32)
    np.testing.assert_allclose(metrics.barycenters(plan), [0.5, 1.5, 3.0])


def test_plan_scores_by_hand():
    plan = np.array([[0.5, 0.0, 0.5], [0.0, 0.25, 0.0], [0.1, 0.1, 0.8], [0.0, 0.0, 1.0]], np.float32)
    one = pair([0, 2, -1, 2], 3, x=[1, 2, 3, 4], y=[1, 9, 4])
    got = metrics.score_plan("PF1", one, plan, np.array([0, 1, -1, 2], np.int32))
    assert (got.aligned, got.reference, got.predicted, got.true_positives) == (3, 3, 3, 2)
    assert got.identity == pytest.approx(2 / 3)
    assert got.abs_error == pytest.approx(1 + 1 + 0)
    assert got.within_1 == 3
    assert got.cross_entropy == pytest.approx(math.log(2) + math.log(1e6) + 0)
    assert math.isnan(got.reconstruction_nats)


def test_predicting_an_unaligned_residue_costs_precision_and_not_recall():
    got = metrics.score_prediction("PF1", pair([0, -1], 2), np.array([0.0, 1.0]), np.array([0, 1], np.int32))
    overall = metrics.summarise([got])["overall"]
    assert (overall["precision"]["value"], overall["recall"]["value"]) == (0.5, 1.0)
    assert overall["f1"]["value"] == pytest.approx(2 / 3)


def test_summary_pools_the_residues_of_all_pairs():
    some = [scores("a", abs_error=10.0), dataclasses.replace(scores("b", abs_error=90.0), aligned=30)]
    assert metrics.summarise(some)["overall"]["barycenter_mae"]["value"] == pytest.approx(100 / 40)


def test_summary_has_its_shape_and_leaves_out_what_does_not_apply():
    got = metrics.summarise([scores("a", 0.1, within_1=5.0), scores("b", 0.7), scores("c", math.nan, within_1=1.0)])
    assert got["pairs"] == 3
    assert set(got["overall"]) == {"barycenter_within_1"}
    assert set(got["overall"]["barycenter_within_1"]) == {"value", "low", "high"}
    assert set(got["bins"]) == {"<.15", ">.60"}
    assert got["bins"][">.60"] == {"pairs": 1, "families": 1}
    assert got["bins"]["<.15"]["barycenter_within_1"]["value"] == 0.5
    # pairs to which a metric does not apply weigh nothing in its denominator
    assert got["overall"]["barycenter_within_1"]["value"] == pytest.approx(6 / 20)
    assert metrics.summarise([]) == {"overall": {}, "bins": {}, "pairs": 0, "families": 0}


def test_pairs_and_families_are_counted_everywhere():
    some = [scores(f"f{k % 3}", 0.1 if k < 4 else 0.5, abs_error=1.0) for k in range(9)]
    got = metrics.summarise(some)
    assert (got["pairs"], got["families"]) == (9, 3)
    sizes = {name: (of["pairs"], of["families"]) for name, of in got["bins"].items()}
    assert sizes == {"<.15": (4, 3), ".40-.60": (5, 3)}


def test_reconstruction_is_reported_both_ways():
    one = scores("a", reconstruction_nats=4.0, reconstruction_residues=8.0, masked_nats=9.0, masked_residues=3.0)
    overall = metrics.summarise([one])["overall"]
    assert overall["reconstruction"]["value"] == 0.5
    assert overall["reconstruction_masked"]["value"] == 3.0


def test_interval_draws_whole_families():
    """Seven times the same pair in each family tells no more than one: the pairs of a family move together."""
    values = np.random.default_rng(1).normal(5, 1, 60)
    single = [scores(f"f{k}", abs_error=10 * v) for k, v in enumerate(values)]
    repeated = [score for score in single for _ in range(7)]
    first, second = (metrics.summarise(s)["overall"]["barycenter_mae"] for s in (single, repeated))
    assert first == pytest.approx(second)
    # and about as wide as theory has it: 2 x 1.96 sd / sqrt(60)
    assert first["high"] - first["low"] == pytest.approx(2 * 1.96 * values.std() / math.sqrt(60), rel=0.1)
    assert first["low"] < first["value"] < first["high"]


def test_interval_is_reproducible():
    some = [scores(f"f{k}", abs_error=float(k)) for k in range(10)]
    assert metrics.summarise(some) == metrics.summarise(some)


@pytest.mark.parametrize("families", [1, 2, 4, 5, 6])
def test_fewer_than_five_families_have_no_interval(families):
    some = [scores(f"f{k}", abs_error=1.0 + k) for k in range(families) for _ in range(40)]
    found = metrics.summarise(some)
    for summary in (found["overall"], found["bins"][".40-.60"]):
        mae = summary["barycenter_mae"]
        assert mae["value"] == pytest.approx(np.mean(np.arange(families) + 1) / 10)
        if families < 5:
            assert (mae["low"], mae["high"]) == (None, None)
        else:
            assert mae["low"] < mae["value"] < mae["high"]


def test_families_without_the_metric_do_not_count():
    have, lack = [scores(f"a{k}", within_1=3.0) for k in range(4)], [scores(f"b{k}") for k in range(900)]
    assert metrics.summarise([*have, *lack])["overall"]["barycenter_within_1"]["low"] is None
    have.append(scores("a4", within_1=8.0))
    found = metrics.summarise([*have, *lack])["overall"]["barycenter_within_1"]
    assert (found["value"], found["low"]) == (pytest.approx(0.4), pytest.approx(0.3))
    assert 0.4 < found["high"] <= 0.8


def negatives(scores, of_related, families=None, decoded=None) -> dict:
    ones = np.ones(len(scores))
    decoded = ones if decoded is None else np.array(decoded, float)
    names = families or [f"f{k}" for k in range(len(scores))]
    told = np.array(scores, float), np.array(of_related, float), decoded, 10 * ones
    return metrics.summarise_negatives(names, *told)


def test_area_under_the_curve_by_hand():
    """Six couples: the related pair is higher in 0.4 > 0.1, 0.9 > 0.1 and 0.9 > 0.4, and level in 0.4 = 0.4."""
    found = negatives([0.1, 0.4, 1.0], [0.4, 0.9])
    assert found["overall"]["auc"]["value"] == pytest.approx(3.5 / 6)
    assert found["overall"]["auc"]["low"] is None and (found["pairs"], found["families"], found["bins"]) == (3, 3, {})
    for scores, expected in (([0, 0], 1.0), ([3, 3], 0.0), ([1, 2], 0.5)):
        assert negatives(scores, [1, 2])["overall"]["auc"]["value"] == pytest.approx(expected)


def test_area_under_the_curve_is_the_share_of_couples_in_order():
    rng = np.random.default_rng(0)
    scores, of_related = rng.integers(0, 12, 60) / 10, rng.integers(4, 16, 45) / 10  # with many ties
    couples = [1.0 if a > b else 0.5 if a == b else 0.0 for a in of_related for b in scores]
    found = negatives(scores, of_related, families=[f"f{k % 9}" for k in range(60)])["overall"]["auc"]
    assert found["value"] == pytest.approx(np.mean(couples))
    assert found["low"] < found["value"] < found["high"]
    # The area below the curve itself: the trapezoid rule over all thresholds.
    thresholds = np.concatenate([[np.inf], np.unique([*scores, *of_related])[::-1]])
    true, false = ([(of >= t).mean() for t in thresholds] for of in (of_related, scores))
    assert found["value"] == pytest.approx(np.trapezoid(true, false))


def test_false_pairs_are_pooled_over_the_residues_of_the_shorter_sequences():
    scores, decoded, shorter = np.zeros(2), np.array([3.0, 6.0]), np.array([10.0, 90.0])
    found = metrics.summarise_negatives(["a", "b"], scores, np.ones(1), decoded, shorter)
    assert found["overall"]["false_pairs"]["value"] == pytest.approx(9 / 100)


def test_unusable_predictions_are_refused():
    one, match = pair([0, 1], 2), np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match="NaN or inf for an aligned residue of a pair of PF1"):
        metrics.score_prediction("PF1", one, np.array([0.0, np.nan]), match)
    with pytest.raises(ValueError, match=r"plan: shape \(2, 3\).*cut padding and the dustbin off"):
        metrics.score_plan("PF1", one, np.zeros((2, 3), np.float32), match)
