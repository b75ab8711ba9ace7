"""Damaged records of the data: named, counted, and left out the same way every time."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from data import pfam, pipeline
from data.evaluation_pairs import evaluation_batches
from data.families import BadRecordError
from tests.support import tiny
from tests.support.run import assert_same_run, config, copy, flip

SHARDS = tiny.ROOT / "data/default/pfam/1.0.0"
TRAIN_SHARD = "pfam-train.array_record-00000-of-00001"
BATCHES = pipeline.PipelineConfig(batch_size=4, buckets=(320,), max_bad_records=2)


def damaged_shards(to: Path, *records: int) -> Path:
    """The data that ship, with a flipped bit in the middle of those records of the train split."""
    copy(SHARDS, to / "1.0.0")
    path = to / "1.0.0" / TRAIN_SHARD
    source = pfam.open_split(to, "train")
    for record in records:
        alignment = source[record].accession.encode()
        flip(path, path.read_bytes().index(alignment) + 40)
    return to


def test_a_damaged_record_is_named_by_shard_record_and_family(tmp_path):
    families = pfam.open_split(damaged_shards(tmp_path, 3), "train")
    for n in range(len(families)):
        if n != 3:
            families[n]
    place = rf"{TRAIN_SHARD}, record 3, family PF\d+ is damaged \(RuntimeError.*hash mismatch"
    with pytest.raises(BadRecordError, match=place):
        families[3]
    with pytest.raises(BadRecordError, match=place + ".*build or copy the data again, or .*data.max_bad_records"):
        pipeline.train_iterator(families, pipeline.PipelineConfig(batch_size=4, buckets=(320,)))


def test_damaged_records_are_counted_listed_and_left_out_the_same_way_every_time(tmp_path):
    families = pfam.open_split(damaged_shards(tmp_path / "a", 3, 8), "train")
    stream = pipeline.PairStream(families, BATCHES)
    assert [re.search(r"record (\d+)", told)[1] for told in stream.index.bad] == ["3", "8"]
    drawn = {int(family) for step in range(40) for family in stream[step]["id"][:, 0]}
    assert drawn.isdisjoint({3, 8}) and len(drawn) >= 4
    again = pipeline.PairStream(pfam.open_split(damaged_shards(tmp_path / "b", 3, 8), "train"), BATCHES)
    assert again.fingerprint() == stream.fingerprint()
    np.testing.assert_array_equal(again[17]["x"], stream[17]["x"])
    other = pipeline.BatchIterator(pipeline.PairStream(pfam.open_split(SHARDS.parent, "train"), BATCHES))
    with pytest.raises(ValueError, match="differ in the data at"):
        other.set_state({"step": 3, "stream": stream.fingerprint()})
    with pytest.raises(BadRecordError, match="max_bad_records above 2"):
        pipeline.PairStream(pfam.open_split(damaged_shards(tmp_path / "c", 3, 8, 9), "train"), BATCHES)


def test_a_truncated_shard_is_as_many_damaged_records(tmp_path):
    copy(SHARDS, tmp_path / "1.0.0")
    path = tmp_path / "1.0.0" / "pfam-validation.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:70000])
    families = pfam.open_split(tmp_path, "validation")
    with pytest.raises(BadRecordError, match=r"record 0, family PF02463 is damaged"):
        list(evaluation_batches(families, 4, (320,)))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of the 2 families"):
        list(evaluation_batches(families, 4, (320,), max_bad=2))


def test_a_shard_of_another_build_is_noticed(tmp_path):
    copy(SHARDS, tmp_path / "1.0.0")
    listed = tmp_path / "1.0.0" / pfam.RECORDS
    names = json.loads(listed.read_text())
    names["train"][0], names["train"][1] = names["train"][1], names["train"][0]
    listed.write_text(json.dumps(names))
    with pytest.raises(BadRecordError, match=r"record 0, .* holds PF.*: the shard is of another build"):
        pfam.open_split(tmp_path, "train")[0]


def test_a_run_on_damaged_data_lists_what_is_left_out_and_resumes(tmp_path, capsys):
    data, folder = damaged_shards(tmp_path / "data", 3), tmp_path / "run"
    changes = {"data__dir": str(data), "data__max_bad_records": 1}
    train.train(config(**changes), tmp_path / "whole")
    copy(tmp_path / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "7")
    train.train(config(**changes), folder)
    assert "1 damaged record(s) left out, listed in" in capsys.readouterr().err
    (told,) = json.loads((folder / "bad_records.json").read_text())
    assert "record 3, family PF" in told
    assert_same_run(folder, tmp_path / "whole")
