"""Flanked pairs and negatives: unrelated residues alone are added, each time the same, and the reference stays."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from data import pfam
from data.batches import PairReader, unbatch
from data.evaluation_pairs import evaluation_batches
from data.index import row_lengths
from data.transforms import NO_TARGET, pair
from data.variants import EVALUATION_SETS, FlankedReader, SplitRows, Stretch, flanks, negative
from tests.support.small_families import FAMILIES, make_family

ROOT = Path(__file__).parents[1]
PFAM = ROOT / "../shared/pfam"
# Ten families of six clans; the last two and the ones named alone have none.
CLANS = [
    dataclasses.replace(make_family(f"PF{n}", [30 + 9 * n, 33 + 7 * n, 40, 55 + n], pairs=3), clan=clan)
    for n, clan in enumerate(["A", "A", "A", "B", "B", "C", "D", "E", "", ""])
]


def listed(families, variant, batch_size=4, buckets=(64,), **options) -> list:
    """Ids and pairs of a variant. A small split may have a negative twice: y of two pairs of x."""
    batches = evaluation_batches(families, batch_size, buckets, variant=variant, **options)
    return [of_one for batch in batches for of_one in unbatch(batch)]


def read(*arguments, **options) -> dict:
    """Pairs of a variant by id."""
    return dict(listed(*arguments, **options))


def rows_of(families) -> SplitRows:
    lengths = [row_lengths(family) for family in families]
    return SplitRows([of.accession for of in families], [of.unit for of in families], lengths)


def assert_equal(a, b):
    for name in ("x", "y", "target"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def inside(part: np.ndarray, sequence: np.ndarray) -> bool:
    return part.astype(np.int32).tobytes() in sequence.astype(np.int32).tobytes()


@pytest.mark.parametrize("families", [CLANS, FAMILIES], ids=["clans", "lengths"])
def test_a_flanked_pair_is_its_pair_between_stretches_of_other_units(families):
    rows, reader = rows_of(families), PairReader(families)
    found = read(families, "flanked")
    assert found.keys() == read(families, "plain").keys()
    ends_used = set()
    for pair_id, flanked in found.items():
        core, ends = reader(*pair_id), flanks(rows, pair_id)
        taken = [end for end in ends if end]
        units = [families[pair_id[0]].unit, *(families[end.family].unit for end in taken)]
        assert taken and len(set(units)) == len(units), "pair and flanks must be of different units"
        ends_used |= {n for n, end in enumerate(ends) if end}
        lengths = [end.length if end else 0 for end in ends]
        assert len(flanked.x) == len(core.x) + sum(lengths[:2])
        assert len(flanked.y) == len(core.y) + sum(lengths[2:])
        for tokens, whole, (before, behind), around in (
            (flanked.x, core.x, lengths[:2], ends[:2]),
            (flanked.y, core.y, lengths[2:], ends[2:]),
        ):
            np.testing.assert_array_equal(tokens[before : len(tokens) - behind], whole)
            for end, part in zip(around, (tokens[:before], tokens[len(tokens) - behind :]), strict=True):
                assert end is None or (len(part) > 0 and inside(part, reader.sequence(end.family, end.row)))
        # The reference joins the residues that it joins in the core, and no other.
        aligned = [(i + lengths[0], j + lengths[2]) for i, j in enumerate(core.target.tolist()) if j != NO_TARGET]
        assert [(i, j) for i, j in enumerate(flanked.target.tolist()) if j != NO_TARGET] == aligned
    assert ends_used == {0, 1, 2, 3}


def test_flanks_by_hand():
    first, second = make_family("first", [6, 6], pairs=1), make_family("second", [9])
    ends = {(0, 0, 0, 1): (Stretch(1, 0, 2, 3), None, None, Stretch(1, 0, 0, 1))}
    got = FlankedReader([first, second], ends)(0, 0, 0, 1)
    core, other = pair(first.alignment, 0, 1), PairReader([first, second]).sequence(1, 0)
    np.testing.assert_array_equal(got.x, [*other[2:5], *core.x])
    np.testing.assert_array_equal(got.y, [*core.y, other[0]])
    np.testing.assert_array_equal(got.target, [NO_TARGET] * 3 + core.target.tolist())
    again = pickle.loads(pickle.dumps(FlankedReader([first, second], ends)))  # for workers
    assert_equal(again(0, 0, 0, 1), got)
    assert len(again(-1, -1, -1, -1).x) == 0


def test_half_of_the_flanks_are_beyond_forty_residues_and_half_of_the_ends_have_one():
    """Count many draws: 6,500 flanks, whose share has a standard error of 0.006."""
    rows = SplitRows([f"P{n}" for n in range(10)], list("abcdefghij"), [np.full(25, 60 + 40 * n) for n in range(10)])
    ids = [(f, i, f, j) for f in range(10) for i in range(25) for j in range(i)]
    ends = [flanks(rows, pair_id) for pair_id in ids]
    lengths = np.array([end.length for of in ends for end in of if end])
    assert 0.48 < (lengths > 40).mean() < 0.52 and 38 <= np.median(lengths) <= 42
    assert 0.235 < (lengths > 80).mean() < 0.265, "exponential: a quarter beyond twice the median"
    assert lengths.min() == 1 and lengths.max() == 300
    # Each end has a flank with probability 1/2; draws without any are repeated: 8/15.
    shares = np.mean([[end is not None for end in of] for of in ends], axis=0)
    assert np.abs(shares - 8 / 15).max() < 0.02
    room = [(end.start, rows.length(end.family, end.row) - end.length) for of in ends for end in of if end]
    assert all(0 <= start <= free for start, free in room)
    assert 0.48 < np.mean([start / free for start, free in room if free]) < 0.52, "stretches begin anywhere"


def test_rows_that_are_all_short_give_all_they_have():
    rows = SplitRows(["a", "b"], ["a", "b"], [np.array([9, 9]), np.array([0, 5, 2])])
    for j in range(40):
        taken = [end for end in flanks(rows, (0, 0, 0, j)) if end]
        assert len(taken) == 1, "two units: one flank"
        assert taken[0].family == 1 and taken[0].row in (1, 2) and 1 <= taken[0].length <= 5


def test_negatives_keep_x_and_take_y_of_another_unit_near_in_length():
    rows, positives = rows_of(CLANS), read(CLANS, "plain")
    negatives = listed(CLANS, "negatives")
    lengths = np.concatenate(rows.lengths)
    assert len(negatives) == len(positives)
    assert sorted(i[:2] for i, _ in negatives) == sorted(i[:2] for i in positives)
    reader = PairReader(CLANS)
    for (f, i, g, j), got in negatives:
        assert CLANS[f].unit != CLANS[g].unit
        np.testing.assert_array_equal(got.x, reader.sequence(f, i))
        np.testing.assert_array_equal(got.y, reader.sequence(g, j))
        assert (got.target == NO_TARGET).all() and len(got.target) == len(got.x)
    errors = [abs(rows.length(*negative(rows, i)[2:]) - rows.length(*i[2:])) for i in positives]
    at_random = np.abs(lengths[:, None] - lengths).mean()
    assert np.mean(errors) < at_random / 4, "a random row would betray a negative by its length"


def test_variants_are_the_same_whatever_else_is_read():
    for variant in ("flanked", "negatives"):
        everything = read(CLANS, variant)
        few = listed(CLANS, variant, batch_size=2, buckets=(80,), limit=7)
        assert len(few) == 7
        for pair_id, found in few:
            assert_equal(found, everything[pair_id])
    chosen = [
        sorted(i for i, _ in listed(CLANS, of, buckets=(80,), limit=7)) for of in ("plain", "flanked", "negatives")
    ]
    assert chosen[0] == chosen[1], "a limit chooses the same pairs"
    assert [i[:2] for i in chosen[0]] == [i[:2] for i in chosen[2]]


def test_flanks_and_negatives_are_pinned():
    """A change of Python or of this code must not change what earlier figures were measured on."""
    rows = rows_of(CLANS)
    assert flanks(rows, (0, 0, 0, 1)) == (Stretch(6, 0, 0, 76), None, Stretch(7, 3, 21, 22), None)
    assert flanks(rows, (5, 0, 5, 1)) == (None, *(Stretch(8, 3, 1, 60), Stretch(6, 3, 33, 25), Stretch(9, 0, 6, 5)))
    assert negative(rows, (0, 0, 0, 1)) == (0, 0, 6, 2) and negative(rows, (5, 0, 5, 1)) == (5, 0, 4, 0)


def test_one_unit_is_refused_with_what_to_do():
    related = [dataclasses.replace(family, clan="A") for family in CLANS]
    for variant in ("flanked", "negatives"):
        with pytest.raises(ValueError, match=rf"{variant}: .* two clans, this split has 1 \(A\): build data with more"):
            evaluation_batches(related, 4, (64,), variant=variant)
    with pytest.raises(ValueError, match="variant: 'reversed' was given, allowed are plain, flanked, negatives"):
        evaluation_batches(CLANS, 4, (64,), variant="reversed")


@pytest.mark.parametrize("name", [name for name, of in EVALUATION_SETS.items() if of.variant != "plain"])
def test_data_that_ship(name):
    split, variant = EVALUATION_SETS[name]
    families = pfam.open_split(ROOT / "data/default", split)
    made, base = listed(families, variant, 32, (384,)), read(families, "plain", 32, (384,))
    assert len(made) == len(base)
    units = [family.unit for family in families]
    for pair_id, found in made:
        if variant == "negatives":
            assert units[pair_id[0]] != units[pair_id[2]] and (found.target == NO_TARGET).all()
        else:
            core = base[pair_id]
            assert len(found.x) + len(found.y) > len(core.x) + len(core.y)
            assert (found.target != NO_TARGET).sum() == (core.target != NO_TARGET).sum() > 0


@pytest.mark.skipif(not PFAM.exists(), reason="shared/pfam is not beside the checkout")
def test_in_pfam_half_of_the_overhangs_are_beyond_forty_and_lengths_tell_nothing(tmp_path):
    """Rows of Pfam's domains are long enough for flanks; a negative's y is as long as y."""
    seeds = PFAM / "pairs_1000.sto.gz"
    recipe = pfam.Recipe(inputs=(str(seeds),), clans=str(PFAM / "Pfam-A.clans.tsv.gz"), evaluation_only=True)
    pfam.build(recipe, tmp_path / "pfam")
    families = list(pfam.open_split(tmp_path / "pfam", "test_ood"))
    rows = rows_of(families)
    ids = [(f, i, f, j) for f, family in enumerate(families) for i, j in family.pairs.tolist()]
    assert len(ids) > 900
    lengths = np.array([end.length for i in ids for end in flanks(rows, i) if end])
    assert 0.45 < (lengths > 40).mean() < 0.55
    changes = [abs(rows.length(*negative(rows, i)[2:]) / rows.length(*i[2:]) - 1) for i in ids[::5]]
    assert np.median(changes) < 0.05
