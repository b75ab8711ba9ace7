"""data/augmentation.py and data/plan.py: each change in its share of pairs, the same for each host, and right."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from data import mixture, transforms, vocab
from data.augmentation import LONGEST_FLANK, NO_ENDS, FlankLengths
from data.batches import PairReader
from data.pipeline import PairStream, PipelineConfig
from data.transforms import NO_TARGET
from models import pair_aligner
from scripts import show_batch
from tests.support.small_families import make_family

BUCKETS = (64, 128, 256)
EVERYTHING = {"crop": 0.25, "stagger": 0.3, "noise": 0.2, "flanks": 0.5, "negatives": 0.2}
FAMILIES = [
    dataclasses.replace(make_family(f"PF{n:05}", [30 + 8 * n, 33 + 8 * n, 41 + 8 * n]), clan=f"CL{n // 2}")
    for n in range(12)
]


def stream(families=FAMILIES, **settings) -> PairStream:
    return PairStream(families, PipelineConfig(**{"buckets": BUCKETS, "batch_size": 64} | settings))


def examples(of: PairStream, steps: int = 6) -> list:
    return [example for step in range(steps) for example in of.examples(step)[1]]


def tokens(text: bytes) -> np.ndarray:
    return vocab.encode(text)


# ---- each change on its own ----


def test_flanks_move_the_alignment_and_are_aligned_with_nothing():
    core = transforms.Pair(tokens(b"ARN"), tokens(b"AN"), np.array([0, -1, 1], np.int32))
    flanked = transforms.add_flanks(core, (tokens(b"WW"), tokens(b"")), (tokens(b"C"), tokens(b"KKK")))
    assert (vocab.decode(flanked.x), vocab.decode(flanked.y)) == ("WWARN", "CANKKK")
    np.testing.assert_array_equal(flanked.target, [-1, -1, 1, -1, 2])


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((0.0, 0.0, 0.99), ("ARNDCQ", "ARNDCQ")),  # all stays
        ((0.0, 0.5, 0.0), ("ARND", "RNDCQ")),  # x loses its end, y its beginning
        ((0.9, 0.5, 0.0), ("RNDCQ", "ARND")),
    ],
)
def test_a_staggered_pair_overlaps_in_its_middle(draws, expected):
    whole = transforms.Pair(tokens(b"ARNDCQ"), tokens(b"ARNDCQ"), np.arange(6, dtype=np.int32))
    staggered = transforms.stagger(whole, np.array(draws))
    assert (vocab.decode(staggered.x), vocab.decode(staggered.y)) == expected
    for i, j in transforms.aligned_pairs(staggered.target):
        assert staggered.x[i] == staggered.y[j]
    assert (staggered.target != NO_TARGET).sum() == len(set(expected[0]) & set(expected[1]))


def test_a_pair_that_cannot_be_staggered_stays_whole():
    whole = transforms.Pair(tokens(b"AR"), tokens(b"AN"), np.array([0, -1], np.int32))
    assert transforms.stagger(whole, np.zeros(3)) is whole


def test_substitutions_follow_blosum62_at_their_rate():
    rng = np.random.default_rng(0)
    before = tokens(b"IX" * 20_000)
    after = transforms.substitute(before, 0.3, rng)
    changed = before != after
    assert not changed[1::2].any(), "X stays"
    assert abs(changed[::2].mean() - 0.3) < 5 * np.sqrt(0.21 / 20_000)
    counts = np.bincount(after[::2][changed[::2]], minlength=22)
    assert counts[vocab.RESIDUES.index("I") + 1] == 0 and counts[vocab.X] == 0
    ratio = counts[vocab.RESIDUES.index("V") + 1] / counts[vocab.RESIDUES.index("G") + 1]
    assert 2**3.5 * 0.7 < ratio < 2**3.5 * 1.4, "I:V scores 3 half bits, I:G -4"


def test_half_of_the_flanks_are_longer_than_40_and_each_pair_has_one():
    ends = FlankLengths((64, 1024))._ends
    lengths = ends[ends > 0]
    assert 0.48 < (lengths > 40).mean() < 0.54 and lengths.max() <= LONGEST_FLANK
    assert (ends > 0).any(axis=1).all() and 0.45 < (ends > 0).mean() < 0.6


def test_flanked_pairs_fit_the_bucket_that_they_go_to():
    lengths = FlankLengths(BUCKETS)
    mass = np.array([5.0, 3.0, 2.0])
    moved = lengths.moved(mass)
    np.testing.assert_allclose(moved.sum(), mass.sum())
    assert not moved[2].any(), "pairs of the largest bucket have no room"
    for origin, bucket in ((0, 1), (0, 2), (1, 2)):
        for draw in np.linspace(0, 1, 50, endpoint=False):
            ends = lengths.draw(origin, bucket, draw)
            needed = max(ends[0] + ends[1], ends[2] + ends[3])
            assert needed > BUCKETS[bucket - 1] - BUCKETS[origin]
            assert bucket == 2 or needed <= BUCKETS[bucket] - BUCKETS[origin]
    np.testing.assert_allclose(FlankLengths((64,)).moved(np.ones(1)), [[1.0]])


# ---- batches ----


def test_each_change_has_its_share():
    found = examples(stream(**EVERYTHING), 12)
    positive = [example for example in found if "negatives" not in example.changes]
    for name, share in EVERYTHING.items():
        among = found if name in ("flanks", "negatives") else positive
        measured = np.mean([name in example.changes for example in among])
        assert abs(measured - share) < 5 * np.sqrt(share * (1 - share) / len(among)), (name, measured)


def test_examples_are_what_their_ids_and_changes_say():
    """The unflanked part of each pair is the pair of its id; flanks are of other clans, and differ from each other."""
    read, clans = PairReader(FAMILIES), [family.clan for family in FAMILIES]
    rows = {vocab.decode(read.sequence(f, r)): clans[f] for f in range(len(FAMILIES)) for r in range(3)}
    for example in examples(stream(flanks=0.7, negatives=0.3), 4):
        (x_family, _, y_family, _), (before, after, y_before, y_after) = example.id, example.ends
        x, y, target = example.pair
        core = transforms.Pair(*read(*example.id))
        np.testing.assert_array_equal(x[before : len(x) - after], core.x)
        np.testing.assert_array_equal(y[y_before : len(y) - y_after], core.y)
        shifted = np.where(core.target == NO_TARGET, NO_TARGET, core.target + y_before)
        np.testing.assert_array_equal(target[before : len(x) - after], shifted)
        assert (np.delete(target, np.arange(before, len(x) - after)) == NO_TARGET).all()
        assert ("negatives" in example.changes) == (clans[x_family] != clans[y_family])
        assert example.ends == NO_ENDS or "flanks" in example.changes
        flanks = [x[:before], x[len(x) - after :], y[:y_before], y[len(y) - y_after :]]
        origins = [next(c for row, c in rows.items() if vocab.decode(f) in row) for f in flanks if len(f) > 8]
        assert len({*origins, clans[x_family], clans[y_family]}) == len(origins) + len(
            {clans[x_family], clans[y_family]}
        )


def test_batches_are_the_same_for_hosts_and_whatever_was_made_before():
    whole = stream(**EVERYTHING)
    halves = [PairStream(FAMILIES, whole.config, shard_index=host, shard_count=2) for host in range(2)]
    again = {step: whole[step] for step in (3, 1, 0)}
    for step in (0, 1, 3):
        parts = [half[step] for half in halves]
        for name, array in again[step].items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
        assert again[step]["x"].shape[1] in BUCKETS


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_setting_makes_another_stream(name):
    changed = stream(**{name: 0.5})
    assert changed.fingerprint() != stream().fingerprint()
    assert f"{name} 50%" in changed.description()


@pytest.mark.parametrize("name", ["flanks", "negatives"])
def test_unrelated_residues_need_a_second_clan(name):
    one = [dataclasses.replace(family, clan="CL1") for family in FAMILIES]
    stream(one, crop=0.5, stagger=0.5, noise=0.5)
    with pytest.raises(
        ValueError, match=rf"data\.{name}=0\.5: needs families of at least two clans, .* data\.{name}=0"
    ):
        stream(one, **{name: 0.5})
    mixed = mixture.Mixture([FAMILIES, one], [1.0, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"data set 2 of data\.dir has one"):
        stream(mixed, **{name: 0.5})


def test_unrelated_residues_come_from_the_pairs_own_data_set():
    """Clans of one data set and folds of another may be relatives: only one classification tells what is unrelated."""
    sets = [FAMILIES[:6], FAMILIES[6:]]
    mixed = mixture.Mixture(sets, [1.0, 1.0], ["a", "b"])
    found = examples(stream(mixed, negatives=1.0))
    assert all((example.id[0] < 6) == (example.id[2] < 6) for example in found)
    assert sum("negatives" in example.changes for example in found) > 0.9 * len(found)


def test_a_negative_pair_counts_in_the_loss():
    """Count pairs alone, not what makes a batch full."""
    target = jnp.array([[0, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]])
    pairs, related = pair_aligner._kinds({"target": target, "x_length": jnp.array([3, 2, 0])})
    assert pairs.tolist() == [True, True, False] and related.tolist() == [True, False, False]


def test_the_picture_of_a_batch_is_drawn(tmp_path, capsys):
    arguments = ["--config=configs/aligner.py", "--config.data.negatives=0.5", f"--output={tmp_path / 'b.png'}"]
    assert show_batch.main([*arguments, "--step=2", "--pairs=5"]) == 0
    told = capsys.readouterr().out
    assert "step 2: 5 of 32 pairs, padded to" in told and "negatives 50%" in told
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert show_batch.main(["--config=configs/sort_softmax.py"]) == 1
    assert "task='sorting' has no pairs to draw" in capsys.readouterr().err


def test_examples_of_one_pair_are_changed_differently():
    found = examples(stream([make_family("PF1", [50, 50])], noise=1.0, batch_size=16), 1)
    assert len({example.pair.x.tobytes() for example in found}) > 12
    rates = [np.mean(a.pair.x != b.pair.x) for a, b in itertools.pairwise(found) if a.id == b.id]
    assert len(rates) > 2 and min(rates) < np.mean(rates)
