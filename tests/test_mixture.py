"""data/mixture.py and data/index.py: several data sets with weights, shares by identity, and an index that is kept."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest

from data import builds, index, mixture
from data.families import BadRecordError, Family
from data.index import SplitIndex
from data.pipeline import PairStream, PipelineConfig
from data.sampling import LengthIndex
from data.transforms import IDENTITY_EDGES, identities, pair, pair_identity
from tests.support import tiny
from tests.support.run import copy, flip
from tests.support.small_families import CONFIG, FAMILIES, make_family

SHARDS = tiny.ROOT / "data/default/pfam/1.0.0"
HALF_BELOW = (0.06, 0.10, 0.10, 0.10, 0.14, 0.30, 0.20)


def related(accession: str, identity: float, rows: int = 2, clan: str = "") -> Family:
    """Rows of 100 residues, which have `identity` with the first row, and less with each other."""
    rng = np.random.default_rng(list(accession.encode()))
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    first = rng.choice(letters, 100)
    other = letters[(np.searchsorted(letters, first) + rng.integers(1, 20, (rows, 100))) % 20]
    same = np.array([rng.permutation(100) < 100 * identity for _ in range(rows)])
    same[0] = True
    names, no_pairs = tuple(f"r{n}" for n in range(rows)), np.zeros((0, 2), np.int32)
    return Family(accession, accession, clan, names, np.where(same, first, other), no_pairs)


def drawn(families, steps: int = 3, **settings) -> tuple[PairStream, list]:
    config = PipelineConfig(**{"buckets": (128,), "batch_size": 250, "pairs_per_family": 10} | settings)
    stream = PairStream(families, config)
    return stream, [example for step in range(steps) for example in stream.examples(step)[1]]


# ---- names and weights ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a", [("runs/a", 1.0)]),
        ("runs/a:2, runs/b:0.5,runs/c", [("runs/a", 2.0), ("runs/b", 0.5), ("runs/c", 1.0)]),
        ("runs/a:0,runs/b", [("runs/a", 0.0), ("runs/b", 1.0)]),
        ("C:/data", "'C:/data' was given"),
        ("runs/a:0,runs/b:0", "all weights are 0"),
        ("runs/a,,runs/b", "'' was given"),
        ("runs/a:-1", "'runs/a:-1' was given, allowed is FOLDER or FOLDER:WEIGHT"),
        ("runs/a:nan", "allowed is FOLDER"),
        ("runs/a:1,runs/a:2", "runs/a is named twice"),
    ],
)
def test_entries_are_folders_with_weights(given, expected):
    if isinstance(expected, list):
        assert mixture.entries(given) == expected
        return
    with pytest.raises(ValueError, match=expected):
        mixture.entries(given)


def test_a_folder_may_have_any_name(tmp_path):
    for name in ("a:1", "b,c"):
        (tmp_path / name).mkdir()
        assert mixture.entries(str(tmp_path / name)) == [(str(tmp_path / name), 1.0)]


def test_only_data_sets_with_the_split_are_opened(tmp_path):
    """A data set without a test split is left out of evaluation; one without training families is an error."""
    copy(SHARDS, tmp_path / "a" / "1.0.0")
    copy(SHARDS, tmp_path / "b" / "1.0.0")
    described = tmp_path / "b" / "1.0.0" / "dataset_info.json"
    info = json.loads(described.read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "test_ood"]
    described.write_text(json.dumps(info))
    both = f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:3"
    alone, together = (mixture.open_split(str(tmp_path / "a"), "test_ood"), mixture.open_split(both, "test_ood"))
    assert len(together) == 2 * len(alone) and together.weights == [1.0, 3.0]
    assert together[len(alone)].accession == together[0].accession
    assert len(mixture.open_split(both, "validation").parts) == 1
    assert len(mixture.open_split(f"{tmp_path / 'a'},{tmp_path / 'b'}:0", "train").parts) == 1
    with pytest.raises(ValueError, match=rf"split 'train' is empty in {tmp_path / 'b'}"):
        mixture.open_split(both, "train")
    with pytest.raises(ValueError, match="split 'validation' is empty"):
        mixture.open_split(str(tmp_path / "b"), "validation")
    with pytest.raises(IndexError):
        together[len(together)]


# ---- shares ----


def test_data_sets_are_drawn_by_their_weights_whatever_their_sizes():
    small, large = [related("a", 0.5), related("b", 0.5)], [related(f"c{n}", 0.5) for n in range(20)]
    mixed = mixture.Mixture([small, large], [3.0, 1.0], ["small", "large"])
    stream, examples = drawn(mixed)
    share = np.mean([example.id[0] < 2 for example in examples])
    assert abs(share - 0.75) < 5 * np.sqrt(0.25 * 0.75 / len(examples))
    assert stream.description().startswith("small 75% of pairs; large 25% of pairs")
    for weights, names in (([2.0, 1.0], ["small", "large"]), ([3.0, 1.0], ["elsewhere", "x"])):
        other = PairStream(mixture.Mixture([small, large], weights, names), stream.config)
        assert (other.fingerprint() == stream.fingerprint()) == (weights == [3.0, 1.0]), "names do not count"
        assert other.content == stream.content


def test_a_mixture_is_resumed_bitwise_and_read_by_worker_processes_alike():
    mixed = mixture.Mixture([FAMILIES, [related("a", 0.3, 9)]], [1.0, 1.0], ["a", "b"])
    config = PipelineConfig(buckets=(16, 32, 128), batch_size=8, identity_mass=HALF_BELOW, noise=0.5, stagger=0.5)
    stream = PairStream(mixed, config)
    again = pickle.loads(pickle.dumps(stream))
    halves = [PairStream(mixed, config, shard_index=host, shard_count=2) for host in range(2)]
    for step in (5, 0, 3):
        whole, parts = stream[step], [half[step] for half in halves]
        for name, array in whole.items():
            np.testing.assert_array_equal(array, again[step][name])
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("rows", [2, 30])
def test_identity_bins_get_their_shares(rows):
    """Nine of ten families are above 60 %; of pairs that are drawn, half are below 40 %."""
    easy = [related(f"e{n}", 0.9, rows) for n in range(90)]
    hard = [related(f"h{n}", identity, rows) for n, identity in enumerate([0.1, 0.17, 0.22, 0.27, 0.35, 0.5] * 2)]
    stream, examples = drawn([*easy, *hard], identity_mass=HALF_BELOW)
    found = np.searchsorted(IDENTITY_EDGES, [pair_identity(example.pair) for example in examples], side="right")
    shares = np.bincount(found, minlength=7) / len(examples)
    assert "identity below .40 50%" in stream.description()
    if rows == 2:
        assert np.abs(shares - HALF_BELOW).max() < 5 * np.sqrt(0.25 / len(examples))
    assert abs(shares[:5].sum() - 0.5) < 0.06, shares


def test_weights_of_data_sets_and_shares_of_identities_hold_together():
    sets = [[related(f"{identity}", identity) for identity in of] for of in ([0.1, 0.9, 0.95], [0.1, 0.5, 0.9])]
    mixed = mixture.Mixture(sets, [1.0, 3.0], ["a", "b"])
    built = LengthIndex.build(mixed, (128,), 10)
    mass = built.by_identity((0.4, 0.0, 0.0, 0.0, 0.0, 0.2, 0.4))
    np.testing.assert_allclose(mass.sum((0, 1)), [0.4, 0, 0, 0, 0, 0.2, 0.4], atol=1e-6)
    np.testing.assert_allclose([mass[part].sum() for part in built.parts], [0.25, 0.75], atol=1e-6)


def test_bins_without_pairs_leave_their_shares_to_the_others():
    stream, _ = drawn(
        [related("a", 0.5), related("b", 0.9)], steps=1, identity_mass=(0.5, 0.0, 0.0, 0.0, 0.0, 0.3, 0.2)
    )
    np.testing.assert_allclose(stream._planner.mass.sum((0, 1))[5:] / stream._planner.mass.sum(), [0.6, 0.4])
    with pytest.raises(ValueError, match="no pair falls into a bin with a share above 0"):
        drawn([related("a", 0.9)], identity_mass=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_many_identities_at_once_are_those_of_the_pairs():
    alignment = FAMILIES[1].alignment.copy()
    alignment[3] = np.frombuffer(alignment[3].tobytes().lower(), np.uint8)
    rows = np.array([(1, 2), (3, 4), (10, 11), (3, 1)])
    for insert_states in (False, True):
        expected = [pair_identity(pair(alignment, i, j, insert_states)) for i, j in rows.tolist()]
        np.testing.assert_allclose(identities(alignment, rows, insert_states), expected)


# ---- the index ----


@pytest.fixture
def kept(monkeypatch):
    """Keep every index, however quickly it is made."""
    monkeypatch.setattr(index, "_KEPT_FROM", 0.0)


def counted(monkeypatch) -> list:
    """Return a list that gets an entry whenever families are read to count them."""
    calls, read = [], index.readable
    monkeypatch.setattr(index, "readable", lambda *rest: calls.append(1) or read(*rest))
    return calls


def test_an_index_is_kept_beside_the_shards_until_they_change(tmp_path, monkeypatch, kept):
    copy(SHARDS, tmp_path / "1.0.0")
    calls = counted(monkeypatch)
    streams = [PairStream(mixture.open_split(str(tmp_path), "train"), PipelineConfig(batch_size=4)) for _ in range(2)]
    assert len(calls) == 1 and streams[0].fingerprint() == streams[1].fingerprint()
    assert streams[0].content == streams[1].content
    for name in ("rows", "identity", "units"):
        np.testing.assert_array_equal(getattr(streams[0].index, name), getattr(streams[1].index, name))
    (stored,) = tmp_path.rglob(".index-*")
    assert "all 9 files have their checksums" in builds.verify(tmp_path), "the index is no file of the data set"
    stored.write_bytes(stored.read_bytes()[:100])
    SplitIndex.of(mixture.open_split(str(tmp_path), "train").parts[0])
    assert len(calls) == 2, "a damaged index is made again"
    shard = next(tmp_path.rglob("pfam-train.array_record*"))
    shutil.copyfile(shard, tmp_path / "copy")
    (tmp_path / "copy").replace(shard)  # the same bytes at another time
    SplitIndex.of(mixture.open_split(str(tmp_path), "train").parts[0])
    assert len(calls) == 3


def test_damage_that_the_index_knows_is_told_each_time(tmp_path, kept):
    copy(SHARDS, tmp_path / "1.0.0")
    shard = next(tmp_path.rglob("pfam-train.array_record*"))
    accession = mixture.open_split(str(tmp_path), "train")[3].accession
    flip(shard, shard.read_bytes().index(accession.encode()) + 40)
    families = mixture.open_split(str(tmp_path), "train").parts[0]
    for _ in range(2):
        assert len(SplitIndex.of(families, max_bad=1).bad) == 1
    with pytest.raises(BadRecordError, match=f"family {accession} is damaged.*max_bad_records above 0"):
        SplitIndex.of(families)


def test_an_index_that_cannot_be_kept_is_warned_of(tmp_path, monkeypatch, kept):
    copy(SHARDS, tmp_path / "1.0.0")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(index.files, "finished", full)
    with pytest.warns(UserWarning, match="cannot be kept.*disk full"):
        PairStream(mixture.open_split(str(tmp_path), "train"), PipelineConfig(batch_size=4))


def test_a_small_data_set_gets_no_file(tmp_path):
    copy(SHARDS, tmp_path / "1.0.0")
    PairStream(mixture.open_split(str(tmp_path), "train"), PipelineConfig(batch_size=4))
    assert not list(tmp_path.rglob(".index-*"))


def test_insert_states_make_other_data():
    family = make_family("one", [20, 20, 20])
    marked = dataclasses.replace(family, insert_states=True)
    assert SplitIndex.of([family]).content != SplitIndex.of([marked]).content


def test_earlier_settings_give_the_stream_of_earlier_versions():
    """Saved runs name their stream by this hash."""
    stream = PairStream(FAMILIES, CONFIG)
    assert (stream.fingerprint(), stream.content) == ("6896b8dc137805b0", "2a7db07ba9f713f6")
