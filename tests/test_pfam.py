"""data/pfam.py and its command lines: nothing leaks between splits, a build is whole or absent, damage is reported."""

import functools
import gzip
import http.server
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import builds
from data.builds import verify
from data.families import SPLITS, Family, split_of, ungapped
from data.pfam import build, open_split
from data.recipe import Recipe
from data.vocab import is_residue
from scripts import build_pfam, split_stockholm

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "data" / "default"
SHARED = ROOT.parent / "shared" / "pfam"
REAL = ("seeds_deep_192.sto.gz", "pairs_1000.sto.gz", "pairs_conserved_5043.sto.gz")


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/pfam")
    out = tmp_path_factory.mktemp("shared") / "pfam"
    inputs = [str(SHARED / name) for name in REAL]
    clans = ["--clans", str(SHARED / "Pfam-A.clans.tsv.gz")]
    # A process of its own: without the run-time type checks of this one it takes 4 s instead of 20.
    command = [sys.executable, str(ROOT / "scripts" / "build_pfam.py"), *clans, "--out", str(out), "--input", *inputs]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(params=["default", "shared"])
def splits(request) -> dict[str, list[Family]]:
    data_dir = DEFAULT if request.param == "default" else request.getfixturevalue("shared_data")
    return {split: list(open_split(data_dir, split)) for split in SPLITS}


def sequences(family: Family) -> list[str]:
    return [ungapped(row) for row in family.alignment]


def test_no_family_clan_or_sequence_leaks(splits):
    assert all(splits.values())
    apart = ("train", "validation", "test_ood")
    for kind in ("accession", "unit"):
        where = {}
        for split in apart:
            for value in {getattr(family, kind) for family in splits[split]}:
                assert where.setdefault(value, split) == split, f"{kind} {value} is in {where[value]} and in {split}"
    for split in SPLITS:
        assert max(Counter(family.accession for family in splits[split]).values()) == 1

    train = {family.accession: family for family in splits["train"]}
    for family in splits["test_iid"]:
        assert not set(sequences(family)) & set(sequences(train[family.accession]))
        assert family.clan == train[family.accession].clan
        assert family.alignment.shape[1] == train[family.accession].alignment.shape[1]


def test_evaluation_pairs_are_fixed_distinct_and_aligned(splits):
    assert all(len(family.pairs) == 0 for family in splits["train"])
    for split in SPLITS[1:]:
        for family in splits[split]:
            pairs = [tuple(pair) for pair in family.pairs.tolist()]
            assert 1 <= len(pairs) == len(set(pairs)) <= 15
            residue = is_residue(family.alignment)
            for i, j in pairs:
                assert 0 <= i < j < len(family.rows)
                assert (residue[i] & residue[j]).any()


def test_default_data_are_real_whole_and_small():
    verify(DEFAULT)
    assert [len(open_split(DEFAULT, split)) for split in SPLITS] == [17, 2, 6, 4]
    assert sum(path.stat().st_size for path in DEFAULT.rglob("*") if path.is_file()) < 1_000_000
    provenance = (DEFAULT / "PROVENANCE.md").read_text()
    rows = Counter()
    for split in SPLITS:
        for family in open_split(DEFAULT, split):
            rows[family.accession, family.clan or "none"] += len(family.rows)
    for (accession, clan), count in rows.items():
        assert f"| {accession} | {clan} | {count} |" in provenance
    shards = json.loads((builds.find_dataset(DEFAULT) / "dataset_info.json").read_text())
    assert shards["fileFormat"] == "array_record"


def test_shared_data_are_complete(shared_data):
    verify(shared_data)
    report = report_of(shared_data)
    assert report["skipped"] == []
    assert len(report["dropped"]) == 28  # accessions of two files: the deep record stays
    families = {split: list(open_split(shared_data, split)) for split in SPLITS}
    assert report["records"] == {split: len(families[split]) for split in SPLITS}
    assert sum(len(families[split]) for split in ("train", "validation", "test_ood")) == 192 + 1_000 + 5_043 - 28
    rows = sum(len(family.rows) for split in SPLITS for family in families[split])
    assert rows == 41_160 + 2_000 + 10_086 - 28 * 2


# Small made input, its accessions chosen by the split they fall into.
def names_of(split: str, count: int) -> list[str]:
    return [f"PF{i:05d}" for i in range(500) if split_of(f"PF{i:05d}") == split][:count]


def record(accession: str, rows: list[str]) -> bytes:
    lines = ["# STOCKHOLM 1.0", f"#=GF AC {accession}.2", f"#=GF ID name_{accession}"]
    return "\n".join([*lines, *(f"r{i}/é {row}" for i, row in enumerate(rows)), "//", ""]).encode("latin-1")


ROWS = ["ACDEFG-h", "ACDEF.GH", "-CDEFGHI"]
ACCESSIONS = names_of("train", 2) + names_of("validation", 1) + names_of("test_ood", 1)
BAD = record(ACCESSIONS[1], ["ACDE", "AC"])


@pytest.fixture
def made(tmp_path) -> Path:
    many = [f"{'ACDEFGHIKLMNPQRSTVWY'[i % 20]}{'ACDEFGHIKLMNPQRSTVWY'[i // 20]}DEFGHI" for i in range(60)]
    first, *others = ACCESSIONS
    (tmp_path / "in.sto").write_bytes(record(first, many) + b"".join(record(name, ROWS) for name in others))
    (tmp_path / "bad.sto").write_bytes(BAD + record(ACCESSIONS[0], ROWS) + b"# STOCKHOLM 1.0\na AC\nb AC\n//\n")
    (tmp_path / "clans.tsv").write_text("".join(f"{name}\t\t\tX\n" for name in ACCESSIONS[:2]))
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return build_pfam.main(["--out", str(folder / "out"), *arguments])


def local(folder: Path, *names: str) -> list[str]:
    return ["--clans", str(folder / "clans.tsv"), "--input", *(str(folder / name) for name in names)]


def report_of(data_dir: Path) -> dict:
    report = json.loads((builds.find_dataset(data_dir) / "report.json").read_text())
    return {**report, "skipped": sorted(report["skipped"]), "dropped": sorted(report["dropped"])}


def contents(data_dir: Path) -> dict:
    """Everything the data set holds, by split and accession."""
    return {
        (split, f.accession): (f.name, f.clan, f.rows, f.alignment.tolist(), f.pairs.tolist())
        for split in report_of(data_dir)["records"]
        for f in open_split(data_dir, split)
    }


def test_records_hold_the_file_as_it_is(made, capsys):
    assert run(made, *local(made, "in.sto")) == 0
    assert "train 2, validation 1, test_iid 1, test_ood 1" in capsys.readouterr().out
    source = open_split(made / "out", "validation")
    family = source[0]
    assert (family.accession, family.name, family.clan) == (ACCESSIONS[2], f"name_{ACCESSIONS[2]}", "")
    assert family.rows == ("r0/é", "r1/é", "r2/é")
    assert [row.tobytes().decode() for row in family.alignment] == ROWS
    assert family.alignment.dtype == np.uint8
    assert sorted(family.pairs.tolist()) == [[0, 1], [0, 2], [1, 2]]
    again = pickle.loads(pickle.dumps(source))
    assert again[np.int64(0)].accession == family.accession
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"index {index}: split 'validation' has 1 families"):
            source[index]


def test_data_for_evaluation_alone_are_never_trained_on(made, capsys):
    """No clans are needed: nothing is divided."""
    arguments = ["--input", str(made / "in.sto"), "--evaluation-only", "--pairs-per-family", "2"]
    assert run(made, *arguments) == 0
    assert "test_ood 4" in capsys.readouterr().out
    assert list(report_of(made / "out")["records"]) == ["test_ood"]
    families = list(open_split(made / "out", "test_ood"))
    assert sorted(f.accession for f in families) == sorted(ACCESSIONS)
    assert max(len(f.rows) for f in families) == 60  # whole: no row is held out
    assert {len(f.pairs) for f in families} == {2}
    with pytest.raises(ValueError, match="split 'train' is empty"):
        open_split(made / "out", "train")


def test_the_number_of_shards_changes_no_record(made, capsys):
    run(made, *local(made, "in.sto"))
    once = contents(made / "out")
    assert run(made, *local(made, "in.sto"), "--overwrite", "--num-shards", "2") == 1
    assert "num_shards=2: split test_iid has 1 records; ask for fewer" in capsys.readouterr().err
    more = made / "more.sto"
    more.write_bytes(b"".join(record(n, ROWS) for split in SPLITS for n in names_of(split, 3)))
    assert run(made, *local(made, "more.sto"), "--overwrite", "--num-shards", "2") == 0
    assert len(list((made / "out").rglob("pfam-train.array_record-*-of-00002"))) == 2
    verify(made / "out")
    twice = contents(made / "out")
    assert run(made, *local(made, "more.sto"), "--overwrite") == 0
    assert contents(made / "out") == twice != once


def test_of_two_records_the_longer_stays_and_max_rows_limits(made, capsys):
    (made / "single.sto").write_bytes(record("PF00999", ["ACDE"]))
    assert run(made, *local(made, "bad.sto", "in.sto", "single.sto"), "--skip-bad", "--max-rows", "20") == 0
    err = capsys.readouterr().err
    assert f"left out: PF00999 of {made / 'single.sto'}: no two rows with an aligned residue" in err
    assert f"left out: {ACCESSIONS[0]} of {made / 'bad.sto'}: 3 rows, but {made / 'in.sto'} has 20" in err
    kept = {key: value for key, value in contents(made / "out").items() if key[1] == ACCESSIONS[0]}
    assert sum(len(rows) for _, _, rows, _, _ in kept.values()) == 20


def test_malformed_family_stops_the_build_or_is_listed(made, capsys):
    assert run(made, *local(made, "in.sto", "bad.sto")) == 1
    expected = f"{made / 'bad.sto'}, line 5, family {ACCESSIONS[1]}.2: row r1/é has 2 columns, the first row 4"
    assert f"build_pfam: {expected}" in capsys.readouterr().err
    assert not (made / "out").exists()

    assert run(made, *local(made, "in.sto", "bad.sto"), "--skip-bad") == 0
    err = capsys.readouterr().err
    assert f"malformed, skipped: {expected}" in err
    assert "1 families malformed, skipped" in err
    report = report_of(made / "out")
    assert [len(report[key]) for key in ("skipped", "dropped")] == [1, 1]


def test_a_killed_build_leaves_nothing_that_looks_complete(made):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from data import builds, pfam\n"
        "builds._sha256 = lambda path: os._exit(9)\n"  # the last moment: all shards are written, the checksums are not
        "from data.recipe import Recipe\n"
        "pfam.build(Recipe(inputs=(sys.argv[2],), clans=sys.argv[3]), sys.argv[4])"
    )
    arguments = [str(ROOT), str(made / "in.sto"), str(made / "clans.tsv"), str(made / "out")]
    assert subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True).returncode == 9
    assert (made / "out.incomplete").is_dir()
    for data_dir in (made / "out", made / "out.incomplete", made):
        with pytest.raises(FileNotFoundError, match=r"data\.dir="):
            open_split(data_dir, "train")
    assert run(made, *local(made, "in.sto")) == 0  # the same command again
    verify(made / "out")
    assert not (made / "out.incomplete").exists()


def test_an_existing_data_set_is_only_replaced_on_request_and_with_a_whole_one(made, capsys):
    run(made, *local(made, "in.sto"))
    (made / "out" / "notes.md").write_text("mine")
    before = contents(made / "out")
    assert run(made, *local(made, "in.sto")) == 1
    assert "has a data set: choose another folder" in capsys.readouterr().err
    assert run(made, *local(made, "bad.sto"), "--overwrite") == 1
    assert contents(made / "out") == before
    assert (made / "out" / "notes.md").read_text() == "mine"


def test_open_split_says_what_is_wrong(made):
    run(made, *local(made, "in.sto"))
    with pytest.raises(FileNotFoundError, match=r"data\.dir=.*nowhere is not a folder; build one with"):
        open_split(made / "nowhere", "train")
    (made / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        open_split(made / "empty", "train")
    with pytest.raises(
        ValueError, match="split 'test' is unknown; the splits are train, validation, test_iid, test_ood"
    ):
        open_split(made / "out", "test")
    shutil.copytree(made / "out", made / "both" / "a")
    shutil.copytree(made / "out", made / "both" / "b")
    with pytest.raises(ValueError, match="holds several data sets"):
        open_split(made / "both", "train")
    build(Recipe(inputs=(str(made / "bad.sto"),), clans=str(made / "clans.tsv"), skip_bad=True), made / "small")
    with pytest.raises(ValueError, match=r"split 'test_ood' is empty in .*; it has train"):
        open_split(made / "small", "test_ood")
    shard = next((made / "both" / "a").rglob("pfam-train.*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .* is missing"):
        open_split(made / "both" / "a", "train")


def test_verify_says_what_was_checked_and_names_damaged_files(made, capsys):
    run(made, *local(made, "in.sto"))
    capsys.readouterr()
    command = ["--verify", str(made / "out")]
    folder = builds.find_dataset(made / "out")
    assert build_pfam.main(command) == 0
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != builds.CHECKSUMS)
    counts = f"4 splits, 4 shards, 5 records, {size:,} bytes: all 9 files have their checksums"
    assert capsys.readouterr().out == f"{folder}: {counts}\n"

    changed = next(folder.glob("pfam-train.*"))
    data = bytearray(changed.read_bytes())
    data[100] ^= 1
    changed.write_bytes(data)
    assert build_pfam.main(command) == 1
    told = f"missing, changed or unknown files: {changed.name}; build or copy the data again"
    assert capsys.readouterr() == ("", f"build_pfam: {folder}: {told}\n")

    (folder / "features.json").unlink()
    (folder / "new").touch()
    with pytest.raises(ValueError, match=f"features.json, new, {changed.name};"):
        verify(made / "out")
    assert build_pfam.main(["--verify", str(made / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_a_build_needs_a_folder_to_write_to(capsys):
    with pytest.raises(SystemExit):
        build_pfam.main(["--release", "37.0"])
    assert "--out is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "give either a release or inputs, not neither"),
        ({"inputs": ("a",), "release": "37.0"}, "not both"),
        ({"inputs": ("a",)}, "inputs need clans"),
        ({"inputs": ("a",), "clans": "c", "max_rows": 1}, "max_rows=1: at least 2"),
        ({"inputs": ("a",), "evaluation_only": True, "pairs": 0}, "pairs=0: at least 1"),
    ],
)
def test_recipe_refuses_what_it_cannot_make(recipe, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**recipe)


def test_missing_input_is_named(made, capsys):
    assert run(made, *local(made, "in.sto", "no.sto")) == 1
    assert f"input {made / 'no.sto'} is not a file" in capsys.readouterr().err


@pytest.fixture
def mirror(made):
    """A server of one release on this machine; yields its address and the list of what was asked for."""
    release = made / "mirror" / "Pfam37.0"
    release.mkdir(parents=True)
    (release / "Pfam-A.seed.gz").write_bytes(gzip.compress((made / "in.sto").read_bytes()))
    (release / "Pfam-A.clans.tsv.gz").write_bytes(gzip.compress((made / "clans.tsv").read_bytes()))
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=made / "mirror")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_release_is_downloaded_once_and_equals_the_local_build(made, mirror):
    address, asked = mirror
    assert run(made, "--release", "37.0", "--mirror", address) == 0
    assert sorted(asked) == ["/Pfam37.0/Pfam-A.clans.tsv.gz", "/Pfam37.0/Pfam-A.seed.gz"]
    assert run(made, "--release", "37.0", "--mirror", address, "--overwrite") == 0
    assert len(asked) == 2  # the second build took the kept downloads
    build(Recipe(inputs=(str(made / "in.sto"),), clans=str(made / "clans.tsv")), made / "local")
    assert contents(made / "out") == contents(made / "local")


def test_unknown_release_is_named(made, mirror, capsys):
    assert run(made, "--release", "99.0", "--mirror", mirror[0]) == 1
    assert "Pfam99.0/Pfam-A" in capsys.readouterr().err
    assert not (made / "out").exists()


def test_split_stockholm_divides_without_loss(made):
    arguments = [str(made / "in.sto"), "--parts", "3", "--out", str(made / "parts")]
    assert split_stockholm.main(arguments) == 0
    parts = sorted((made / "parts").iterdir())
    assert [part.name for part in parts] == [f"in.part-{i:05d}-of-00003.sto.gz" for i in range(3)]
    run(made, *local(made, "in.sto"))
    build(Recipe(inputs=tuple(map(str, parts)), clans=str(made / "clans.tsv")), made / "of_parts")
    assert contents(made / "of_parts") == contents(made / "out")
    assert split_stockholm.main(arguments) == 1  # the folder exists


needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam: pip install -r requirements-beam.txt"
)


@needs_beam
def test_beam_writes_the_same_records(made, capsys):
    inputs = local(made, "in.sto", "bad.sto")
    assert run(made, *inputs, "--skip-bad") == 0
    plain, report = contents(made / "out"), report_of(made / "out")
    assert run(made, *inputs, "--skip-bad", "--overwrite", "--beam", "--beam-options", "--direct_num_workers=1") == 0
    assert contents(made / "out") == plain
    assert report_of(made / "out") == report
    verify(made / "out")


@needs_beam
def test_beam_builds_for_evaluation_alone_and_reports_no_success_for_nothing(made, capsys):
    beam = ["--evaluation-only", "--beam", "--beam-options", "--direct_num_workers=1"]
    assert run(made, "--input", str(made / "in.sto"), *beam) == 0
    assert report_of(made / "out")["records"] == {"test_ood": 4}
    before = contents(made / "out")
    (made / "bad.sto").write_bytes(BAD)
    capsys.readouterr()
    assert run(made, "--input", str(made / "bad.sto"), "--skip-bad", "--overwrite", *beam) == 1
    assert "Beam writes no split without records" in capsys.readouterr().err
    assert contents(made / "out") == before
    assert not (made / "out.incomplete").exists()


def test_missing_beam_is_named(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "data.beam", raising=False)
    assert run(made, *local(made, "in.sto"), "--beam") == 1
    assert "pip install -r requirements-beam.txt" in capsys.readouterr().err
