"""data/pipeline.py: a stream of batches that depends on (seed, step) alone, and evaluation that loses no pair."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data import batches
from data.evaluation_pairs import evaluation_batches
from data.families import Family
from data.pipeline import PairStream, PipelineConfig, train_iterator
from data.sampling import LengthIndex, _rank, _unrank
from data.transforms import NO_TARGET
from data.vocab import is_residue
from tests.support.small_families import CONFIG, FAMILIES, check_examples, make_family, take

ROOT = Path(__file__).parents[1]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_hold_the_pairs_their_ids_name():
    for batch in take(train_iterator(FAMILIES, CONFIG), 20):
        check_examples(batch, FAMILIES)
        assert (batch["id"] >= 0).all()
        assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(batch, np.dtype(np.int32))


def test_target_points_at_residues_of_the_same_column():
    batch = PairStream(FAMILIES, CONFIG)[0]
    for n, (family, i, _, j) in enumerate(batch["id"]):
        rows = FAMILIES[family].alignment[[i, j]]
        columns = [np.flatnonzero(is_residue(row)) for row in rows]
        for position, target in enumerate(batch["target"][n, : batch["x_length"][n]]):
            same = np.flatnonzero(columns[1] == columns[0][position])
            assert target == (same[0] if same.size else NO_TARGET)


def test_every_pair_is_padded_to_the_smallest_bucket_that_holds_it():
    shapes = set()
    for batch in take(train_iterator(FAMILIES, CONFIG), 40):
        longer = np.maximum(batch["x_length"], batch["y_length"])
        length = batch["x"].shape[1]
        assert batch["x"].shape == batch["y"].shape == batch["target"].shape == (8, length)
        assert (np.asarray(CONFIG.buckets)[np.searchsorted(CONFIG.buckets, longer)] == length).all()
        shapes.add(length)
    assert shapes == set(CONFIG.buckets)


def test_stream_depends_on_seed_and_step_alone():
    first = take(train_iterator(FAMILIES, CONFIG), 3)
    for a, b in zip(first, take(train_iterator(FAMILIES, CONFIG), 3), strict=True):
        assert_same(a, b)
    other = PipelineConfig(buckets=CONFIG.buckets, batch_size=8, seed=4, pairs_per_family=50)
    assert not np.array_equal(first[0]["id"], PairStream(FAMILIES, other)[0]["id"])
    assert not np.array_equal(first[0]["id"], first[1]["id"])


def test_random_access_equals_iteration():
    running = take(train_iterator(FAMILIES, CONFIG), 12)
    stream = PairStream(FAMILIES, CONFIG)
    for step in (11, 0, 7):
        assert_same(stream[step], running[step])
    assert_same(take(train_iterator(FAMILIES, CONFIG, start_step=9), 1)[0], running[9])


def test_a_share_of_the_pairs_is_cropped():
    config = PipelineConfig(buckets=CONFIG.buckets, batch_size=200, seed=3, pairs_per_family=50, crop=0.5)
    whole, cropped = (PairStream(FAMILIES, of)[5] for of in (dataclasses.replace(config, crop=0.0), config))
    np.testing.assert_array_equal(whole["id"], cropped["id"])
    shorter = [(cropped[name] < whole[name]) for name in ("x_length", "y_length")]
    assert not (shorter[0] & shorter[1]).any()
    assert all(one.mean() == pytest.approx(0.25, abs=0.12) for one in shorter)
    assert PairStream(FAMILIES, config).fingerprint() != PairStream(FAMILIES, CONFIG).fingerprint()
    with pytest.raises(ValueError, match=r"data.crop=1\.5"):
        PipelineConfig(crop=1.5)


GOLDEN = [[3, 1, 3, 0], [1, 2, 1, 8], [3, 4, 3, 1]]


def test_stream_is_the_one_of_earlier_versions():
    """Checkpoints hold a step number only: if this changes, resumed runs silently train on other pairs."""
    ids = PairStream(FAMILIES, CONFIG)[5]["id"].tolist()
    assert ids[:3] == GOLDEN, (
        f"step 5 begins with {ids[:3]}. If that is intended, update GOLDEN, change `PairStream.fingerprint` so that "
        "older checkpoints are refused, and note it in CHANGELOG.md"
    )


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_global_batch(hosts):
    whole = PairStream(FAMILIES, CONFIG)
    parts = [PairStream(FAMILIES, CONFIG, shard_index=h, shard_count=hosts) for h in range(hosts)]
    for step in range(5):
        shards = [part[step] for part in parts]
        assert_same({name: np.concatenate([s[name] for s in shards]) for name in shards[0]}, whole[step])


def test_pairs_of_a_family_are_uniform_within_a_bucket():
    """Chi-square of 20,000 draws over all pairs of the bucket, at 5 standard deviations; empty rows form no pair."""
    families = [make_family("deep", [5] * 4 + [0] * 3 + [12] * 6 + [20] * 8 + [70])]
    index = LengthIndex.build(families, (8, 16, 32), pairs_per_family=1000)
    expected = {0: 4 * 3 / 2, 1: 6 * 5 / 2 + 6 * 4, 2: 8 * 7 / 2 + 8 * 10}
    for bucket, pairs in expected.items():
        ids = index.draw(np.zeros(20_000, np.int64), bucket, np.random.default_rng(bucket))
        assert (ids[:, 1] != ids[:, 3]).all()
        cells, counts = np.unique(ids[:, 1::2], axis=0, return_counts=True)
        assert len(cells) == 2 * pairs, "in both orders"
        mean = 20_000 / (2 * pairs)
        chi_square, freedom = np.sum((counts - mean) ** 2 / mean), 2 * pairs - 1
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_ranks_are_exact_for_families_of_millions_of_rows():
    longer = np.concatenate([np.arange(1, 2000), np.random.default_rng(0).integers(2**20, 2**31, 2000)])
    for shorter in (np.zeros_like(longer), longer - 1):
        np.testing.assert_array_equal(_unrank(_rank(longer, shorter)), (longer, shorter))


def test_cap_keeps_a_big_family_from_dominating():
    families = [make_family("big", [12] * 200), make_family("small", [12] * 15)]  # 19,900 and 105 pairs
    counts = {}
    for cap in (100, 10**6):
        config = PipelineConfig(buckets=(16,), batch_size=500, pairs_per_family=cap)
        family = np.concatenate([PairStream(families, config)[step]["id"][:, 0] for step in range(4)])
        counts[cap] = np.mean(family == 0)
    assert abs(counts[100] - 1 / 2) < 5 * np.sqrt(0.25 / 2000)
    assert abs(counts[10**6] - 19_900 / 20_005) < 0.01


def test_buckets_are_chosen_by_their_pairs():
    """5 rows of length 10 and 5 of length 30: 10 pairs fit into 16, the other 35 need 32."""
    config = PipelineConfig(buckets=(16, 32), batch_size=1)
    stream = PairStream([make_family("two", [10] * 5 + [30] * 5)], config)
    share = np.mean([stream[step]["x"].shape[1] == 16 for step in range(600)])
    assert abs(share - 10 / 45) < 5 * np.sqrt(0.25 * 0.75 / 600)


def test_share_of_too_long_pairs_is_reported():
    families = [make_family("half", [10, 10, 10, 99]), make_family("fits", [10, 11, 12, 13])]
    stream = PairStream(families, PipelineConfig(buckets=(16,), batch_size=4))
    assert stream.index.left_out == pytest.approx(3 / 12)
    assert 3 not in stream[0]["id"][stream[0]["id"][:, 0] == 0][:, 1::2]


def test_pairs_without_an_aligned_residue_are_drawn_again():
    """Three rows in the left half, three in the right: 9 of 15 pairs share no column; after four draws 13 % stay so."""
    alignment = np.full((6, 20), ord("."), np.uint8)
    alignment[:3, :10] = alignment[3:, 10:] = ord("a")
    family = Family("PF1", "halves", "", tuple("abcdef"), alignment, np.zeros((0, 2), np.int32))
    batch = PairStream([family], PipelineConfig(buckets=(16,), batch_size=2000))[0]
    unaligned = np.mean((batch["target"] == NO_TARGET).all(axis=1))
    assert abs(unaligned - 0.6**4) < 5 * np.sqrt(0.13 * 0.87 / 2000)


def test_orbax_restores_mid_stream_with_the_identical_next_batch(tmp_path):
    iterator = train_iterator(FAMILIES, CONFIG)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 3)
        restored = train_iterator(FAMILIES, CONFIG)
        next(restored)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    assert restored.step == 5
    for a, b in zip(take(restored, 3), expected, strict=True):
        assert_same(a, b)


def test_state_survives_json_and_another_host_count():
    iterator = train_iterator(FAMILIES, CONFIG)
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 1)[0]
    halves = []
    for host in range(2):
        other = train_iterator(FAMILIES, CONFIG, shard_index=host, shard_count=2)
        other.set_state(state)
        halves.append(take(other, 1)[0])
    assert_same({name: np.concatenate([h[name] for h in halves]) for name in expected}, expected)


@pytest.mark.parametrize("change", ["seed", "batch_size", "buckets", "pairs_per_family", "data"])
def test_state_of_another_stream_is_refused(change):
    values = {"seed": 9, "batch_size": 4, "buckets": (16, 64), "pairs_per_family": 2}
    fields = {"buckets": CONFIG.buckets, "batch_size": 8, "seed": 3, "pairs_per_family": 50}
    fields |= {change: values[change]} if change in values else {}
    iterator = train_iterator(FAMILIES[::-1] if change == "data" else FAMILIES, PipelineConfig(**fields))
    with pytest.raises(ValueError, match="batches of the saved run are others"):
        iterator.set_state(train_iterator(FAMILIES, CONFIG).get_state())


WORKERS_SCRIPT = """
import dataclasses, itertools, pickle
from absl import app
from data.pipeline import train_iterator
from tests.support.small_families import CONFIG, FAMILIES

def main(argv):
    iterator = train_iterator(FAMILIES, dataclasses.replace(CONFIG, workers=2, prefetch=1), start_step=2)
    batches = list(itertools.islice(iterator, 5))
    state = iterator.get_state()
    iterator.close()
    with open(argv[1], "wb") as file:
        pickle.dump((batches, state), file)

if __name__ == "__main__":
    app.run(main)
"""


def test_worker_processes_give_the_same_batches_and_state(tmp_path):
    script, output = tmp_path / "workers.py", tmp_path / "batches.pickle"
    script.write_text(WORKERS_SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, output], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    batches, state = pickle.loads(output.read_bytes())
    one_process = train_iterator(FAMILIES, CONFIG)
    one_process.set_state(state)  # saved with two workers, restored with none
    for a, b in zip(batches, take(train_iterator(FAMILIES, CONFIG, start_step=2), 5), strict=True):
        assert_same(a, b)
    assert_same(next(one_process), PairStream(FAMILIES, CONFIG)[7])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buckets": ()}, r"data\.buckets=\(\): allowed"),
        ({"buckets": (64, 32)}, r"data\.buckets=\(64, 32\): allowed"),
        ({"buckets": (0, 32)}, r"data\.buckets=\(0, 32\)"),
        ({"batch_size": 0}, "^batch_size=0: allowed is an integer, 1 to"),
        ({"pairs_per_family": 0}, r"data\.pairs_per_family=0.*or -1 for all"),
        ({"seed": -1}, "^seed=-1"),
        ({"workers": -1}, r"data\.workers=-1"),
        ({"prefetch": 0}, r"data\.prefetch=0"),
    ],
)
def test_bad_configuration_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**fields)


@pytest.mark.parametrize(
    ("families", "kwargs", "message"),
    [
        ([], {}, "families: the split is empty"),
        ([make_family("long", [70, 80])], {}, "buckets: no pair of the 1 families fits into the largest, 64"),
        ([make_family("one", [20])], {}, "buckets: no pair"),
        (FAMILIES, {"shard_count": 3}, "batch_size: 8 was given, allowed are multiples of shard_count = 3"),
        (FAMILIES, {"shard_index": 2, "shard_count": 2}, "shard_index: 2 was given"),
        (FAMILIES, {"start_step": -1}, "start_step: -1"),
    ],
)
def test_bad_training_arguments_are_named(families, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(families, CONFIG, **kwargs)


def test_default_data_trains_and_evaluates():
    folder = ROOT / "data" / "default"
    if not any(folder.rglob("dataset_info.json")):
        pytest.skip(f"{folder} holds no dataset")
    from data.pfam import open_split

    train = open_split(folder, "train")
    check_examples(take(train_iterator(train, PipelineConfig(batch_size=4)), 1)[0], train)
    for split in ("validation", "test_iid", "test_ood"):
        families = open_split(folder, split)
        for batch in evaluation_batches(families, 16, (64, 128, 256, 512), limit=32):
            check_examples(batch, families)


def test_a_process_keeps_the_latest_families_up_to_a_number_of_bytes(monkeypatch):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    families = Counted(FAMILIES)
    read = batches.PairReader(families)
    for index in (0, 1, 0, 3, 1, 0):
        assert read.family(index) is FAMILIES[index]
    assert families.reads == 3
    monkeypatch.setattr(batches, "_CACHED", batches._size(FAMILIES[0]) + batches._size(FAMILIES[3]))
    families.reads, read = 0, batches.PairReader(families)
    for index in (0, 3, 0, 4, 0, 3):  # 4 takes the place of 3, which was used before 0
        assert read.family(index) is FAMILIES[index]
    assert families.reads == 4 and len(read._kept) == 2
