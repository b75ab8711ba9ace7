"""Batches of evaluation hold every pair once, in few shapes."""

import numpy as np
import pytest

from data.batches import unbatch
from data.evaluation_pairs import evaluation_batches
from tests.support.small_families import FAMILIES, check_examples, make_family


def test_evaluation_yields_every_pair_exactly_once():
    batches = list(evaluation_batches(FAMILIES, 4, (16, 32)))
    ids = [i for batch in batches for i, _ in unbatch(batch)]
    assert sorted(ids) == [(f, i, f, j) for f, family in enumerate(FAMILIES) for i, j in family.pairs.tolist()]
    for batch in batches:
        check_examples(batch, FAMILIES)


def test_evaluation_shapes_are_few_and_hold_the_longest_in_the_same_memory():
    def shapes(**kwargs):
        return sorted({b["x"].shape[::-1] for b in evaluation_batches(FAMILIES, 4, (16, 32), **kwargs)})

    assert shapes() == [(16, 4), (32, 4), (64, 2), (128, 1)]
    assert shapes(divisible_by=2) == [(16, 4), (32, 4), (64, 2), (128, 2)]


def test_evaluation_pads_to_the_smallest_bucket():
    lengths = []
    for batch in evaluation_batches(FAMILIES, 4, (16, 32)):
        longer = np.maximum(batch["x_length"], batch["y_length"])[batch["id"][:, 0] >= 0]
        lengths.append(batch["x"].shape[1])
        assert (longer <= lengths[-1]).all()
        assert lengths[-1] == 16 or (longer > lengths[-1] // 2).all()
    assert lengths == sorted(lengths)


def test_evaluation_limit_is_spread_over_families_and_stable():
    def chosen(limit):
        return [i for batch in evaluation_batches(FAMILIES, 4, (64,), limit=limit) for i, _ in unbatch(batch)]

    assert sorted(family for family, *_ in chosen(4)) == [0, 1, 3, 4]
    assert chosen(4) == chosen(4)
    assert set(chosen(4)) < set(chosen(9))
    assert len(chosen(9)) == 9
    everything = [
        i for batch in evaluation_batches(FAMILIES, 4, (64,)) if batch["x"].shape[1] == 64 for i, _ in unbatch(batch)
    ]
    many = [make_family(f"PF{n}", [9, 9], pairs=1) for n in range(40)]
    of_many = [i[0] for batch in evaluation_batches(many, 10, (16,), limit=10) for i, _ in unbatch(batch)]
    assert len(set(of_many)) == 10
    assert max(of_many) >= 20, "not just the first families"
    assert chosen(1000) == everything, "pairs beyond the largest bucket are left out"


@pytest.mark.parametrize(
    ("families", "kwargs", "message"),
    [
        ([], {}, "families: none of the 0 families"),
        ([make_family("train", [10, 10])], {}, "families: none of the 1 families"),
        (FAMILIES, {"limit": 0}, "limit: 0"),
        (FAMILIES, {"limit": 5, "buckets": (4,)}, "limit: none of the 38 evaluation pairs fits the"),
        (FAMILIES, {"divisible_by": 3}, "divisible_by: 3 was given, allowed are divisors of batch_size = 4"),
        (FAMILIES, {"buckets": (32, 16)}, "buckets: "),
    ],
)
def test_bad_evaluation_arguments_are_named_before_the_first_batch(families, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluation_batches(families, 4, **{"buckets": (16,), **kwargs})
