"""Builds say what they read, report no success for nothing, and touch nothing that is not theirs."""

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data import build_folder, builds, pfam, stockholm
from data.recipe import Recipe
from data.spool import Spool
from scripts import build_pfam, split_stockholm
from tests.support.small_families import FAMILIES

ROWS = ["ACDEFG-h", "XCDEF.GH", "-CDEFGBI"]


def record(accession: str, rows: list[str] = ROWS) -> bytes:
    lines = ["# STOCKHOLM 1.0", f"#=GF AC {accession}.2", *(f"r{i} {row}" for i, row in enumerate(rows)), "//", ""]
    return "\n".join(lines).encode()


GOOD = record("PF00001") + record("PF00002")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A home folder with input in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "in.sto").write_bytes(GOOD)
    (tmp_path / "raw" / "clans.tsv").write_text("PF00001\tCL1\nPF00002\tCL1\n")
    return tmp_path


def build(folder: Path, *options: str, name: str = "in.sto", out: str = "out") -> int:
    source = ["--input", str(folder / "raw" / name), "--evaluation-only"]
    return build_pfam.main([*source, "--out", str(folder / out), *options])


def told(capsys) -> str:
    """The one line on stderr, without the name of the program."""
    (line,) = capsys.readouterr().err.splitlines()
    program, text = line.split(": ", 1)
    assert program in ("build_pfam", "split_stockholm")
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_build_says_what_it_read(folder, capsys):
    clans = ["--clans", str(folder / "raw" / "clans.tsv")]
    assert build(folder, *clans) == 0
    read = "read 1 file: 2 families, 6 rows, 42 residues, 4 of them unknown (B, J, O, U, X, Z)"
    assert f"\n{read}; the table of clans knows 2 of 2 families\n" in capsys.readouterr().out
    report = json.loads((builds.find_dataset(folder / "out") / "report.json").read_text())
    counted = {"files": 1, "families": 2, "rows": 6, "residues": 42, "unknown_letters": 4, "known_to_clans": 2}
    counted |= {"insert_states": 0, "seem_insert_states": 0}
    assert report["read"] == counted
    assert build(folder, "--overwrite") == 0
    assert f"\n{read}\n" in capsys.readouterr().out


def test_an_input_is_read_once(folder, monkeypatch):
    opened, read = [], stockholm.read
    monkeypatch.setattr(stockholm, "read", lambda path, **options: opened.append(path) or read(path, **options))
    names = "PF00001", "PF00003", "PF00009"  # of train and validation
    (folder / "raw" / "many.sto").write_bytes(b"".join(map(record, names)))
    (folder / "raw" / "clans.tsv").write_text("".join(f"{name}\t\n" for name in names))
    recipe = Recipe(inputs=(str(folder / "raw" / "many.sto"),), clans=str(folder / "raw" / "clans.tsv"))
    assert len(pfam.build(recipe, folder / "out").records) > 1
    assert opened == list(recipe.inputs)


def test_records_wait_in_a_file_that_nobody_sees(tmp_path):
    spool = Spool(tmp_path)
    families = [dataclasses.replace(family, clan="\xe9\n", insert_states=n == 1) for n, family in enumerate(FAMILIES)]
    pieces = [spool.add(family) for family in families[:3]]
    read = [spool.read(piece) for piece in pieces[::-1]]
    pieces.append(spool.add(families[3]))
    for family, found in zip(families, [*read[::-1], spool.read(pieces[3])], strict=False):
        for field in dataclasses.fields(family):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(family, field.name))
        assert type(found.rows) is tuple and found.pairs.dtype == np.int32
    assert pieces[1].size < FAMILIES[1].alignment.size  # packed
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_clans_that_knows_no_family_is_an_error_and_one_that_knows_few_a_warning(folder, capsys):
    (folder / "raw" / "many.sto").write_bytes(b"".join(record(f"PF0000{n}") for n in range(1, 6)))
    table = folder / "raw" / "other.tsv"
    table.write_text("CL1\tPF00001\nCL2\tPF00002\n")
    for options in ([], ["--overwrite"]):
        assert build(folder, "--clans", str(table), *options) == 1
        expected = "clans: the table knows 0 of the 2 families; expected are lines 'accession<tab>clan<tab>...', "
        assert told(capsys).startswith(f"{expected}the first has the accession 'CL1' and the clan 'PF00001'")
    assert not (folder / "out").exists()
    assert build(folder, "--clans", str(folder / "raw" / "clans.tsv"), name="many.sto") == 0
    assert "build_pfam: warning: clans: the table knows 2 of the 5 families" in capsys.readouterr().err


def test_clans_may_come_from_standard_input_and_alignments_may_not(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"PF00001\tCL1\nPF00002\tCL1\n")))
    assert build(folder, "--clans", "-") == 0
    assert {family.clan for family in pfam.open_split(folder / "out", "test_ood")} == {"CL1"}
    capsys.readouterr()
    assert build_pfam.main(["--input", "-", "--evaluation-only", "--out", str(folder / "other")]) == 1
    assert "'-' (standard input) cannot be read by the workers of a build" in told(capsys)
    os.mkfifo(folder / "raw" / "pipe")
    assert build(folder, name="pipe", out="other") == 1
    assert "is not a file, but a pipe or device" in told(capsys)
    assert build(folder, name="", out="other") == 1
    assert "is not a file but a folder: give the files in it" in told(capsys)


NOTHING = {
    "empty": (b"", [], "holds no family: it is empty"),
    "blank": (b"\n \r\n", [], "holds no family: it is empty"),
    "empty, skipped": (
        b"",
        ["--skip-bad"],
        "no family to write: 0 were read, 1 malformed, 0 left out; the first: .*empty",
    ),
    "all malformed": (record("PF1", ["AC", "A"]), ["--skip-bad"], "no family to write: 0 were read, 1 malformed"),
    "FASTA, skipped": (b">a\nACDE\n", ["--skip-bad"], "no family to write: .*seems to be FASTA"),
    "single rows": (
        record("PF1", ["ACDE"]),
        [],
        "no family to write: 1 were read, 0 malformed, 1 left out; .*no two rows",
    ),
    "gaps": (record("PF1", ["~~~", "___"]), [], "no family to write"),
    "malformed": (GOOD + record("PF1", ["AC", "A"]), [], "row r1 has 1 columns"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_no_success_and_leaves_the_old_data_whole(name, folder, capsys):
    data, options, reason = NOTHING[name]
    assert build(folder) == 0
    before = contents(folder / "out")
    (folder / "raw" / "bad.sto").write_bytes(data)
    capsys.readouterr()
    assert build(folder, "--overwrite", *options, name="bad.sto") == 1
    assert re.search(reason, told(capsys))
    assert contents(folder / "out") == before
    assert sorted(path.name for path in folder.iterdir()) == ["out", "raw"]
    assert build(folder, *options, name="bad.sto", out="new/deep") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--max-rows=0", "max_rows=0: at least 2"),
        ("--max-rows=-1", "max_rows=-1: at least 2"),
        ("--num-shards=0", "num_shards=0: a split has at least 1"),
        ("--num-shards=-1", "num_shards=-1"),
        ("--num-shards=99999999999999999999", "num_shards=99999999999999999999: split test_ood has 2 records"),
        ("--pairs-per-family=0", "pairs=0"),
        ("--pairs-per-family=-1", "pairs=-1"),
        ("--pairs-per-family=99999999999999", "pairs=99999999999999"),
        ("--max-family-bytes=0", "max_family_bytes=0"),
        ("--max-family-bytes=-1", "max_family_bytes=-1"),
        ("--max-family-bytes=9", "family of more than max_family_bytes=9 bytes"),
        ("--release=37.0", "not allowed with argument"),
        ("--max-rows=many", "invalid int value: 'many'"),
        ("--num-shards=1.5", "invalid int value: '1.5'"),
        ("--out=", "an empty path was given"),
        ("--clans=", "an empty path was given"),
    ],
)
def test_settings_out_of_range_are_named_before_anything_is_written(option, reason, folder, capsys):
    try:
        status = build(folder, option)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["raw"]


def test_a_huge_limit_of_rows_keeps_all(folder):
    assert build(folder, "--max-rows", "9" * 30, "--max-family-bytes", "9" * 30) == 0
    assert {len(family.rows) for family in pfam.open_split(folder / "out", "test_ood")} == {3}


def test_a_release_brings_its_own_clans():
    with pytest.raises(ValueError, match="clans=table was given, but a release brings its own"):
        Recipe(release="37.0", clans="table")


def test_what_is_no_data_set_is_never_replaced(folder, capsys):
    mine = folder / "out" / "pfam" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for options in ([], ["--overwrite"]):
        assert build(folder, *options) == 1
        assert f"{mine} is no file of a data set; move it" in told(capsys)
    shutil.rmtree(folder / "out")
    assert build(folder) == 0
    added = builds.find_dataset(folder / "out") / "notes.md"
    for make, remove in ((added.touch, added.unlink), (added.mkdir, added.rmdir)):
        make()
        capsys.readouterr()
        assert build(folder, "--overwrite") == 1
        assert f"{added} is no file of a data set" in told(capsys)
        remove()
    (added.parent / ".DS_Store").touch()
    assert build(folder, "--overwrite") == 0
    assert mine.parent.is_dir() and not mine.exists()

    unfinished = folder / "out.incomplete" / "thesis.tex"
    unfinished.parent.mkdir()
    unfinished.write_text("mine")
    capsys.readouterr()
    assert build(folder, "--overwrite") == 1
    assert "out.incomplete is in the way, and is not what a build leaves: move it" in told(capsys)
    assert unfinished.read_text() == "mine"


def test_places_that_cannot_be_used_are_named(folder, capsys, monkeypatch):
    (folder / "file").write_text("mine")
    (folder / "half").mkdir()
    (folder / "half" / "pfam").write_text("mine")
    places = {
        "file": "file is a file; give a folder",
        "half": "pfam is a file; give a folder",
        "file/below": "Not a directory",
        "raw": f"is the folder of the input {folder / 'raw' / 'in.sto'}",
        "/": "is the root of all folders",
        "/proc/none/out": "No such file",
    }
    for place, reason in places.items():
        assert build(folder, "--overwrite", out=place) == 1
        assert reason in told(capsys)
    assert (folder / "file").read_text() == (folder / "half" / "pfam").read_text() == "mine"
    (folder / "kept").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert build(folder, out="kept") == 1
    assert "no permission to write into this folder" in told(capsys)


def test_an_exchange_that_fails_puts_the_old_data_back(folder):
    new, final, old = (folder / name for name in ("new", "final", "old"))
    final.mkdir()
    (final / "data").write_text("old")
    with pytest.raises(FileNotFoundError):
        build_folder.exchange(new, final, old)
    assert (final / "data").read_text() == "old"


def test_the_home_folder_is_meant_in_every_path(folder, capsys):
    arguments = ["--input", "~/raw/in.sto", "--clans", "~/raw/clans.tsv", "--evaluation-only", "--out", "~/out"]
    assert build_pfam.main(arguments) == 0
    assert build_pfam.main(["--verify", "~/out"]) == 0
    recipe = Recipe(inputs=("~/raw/in.sto",), clans="~/raw/clans.tsv", evaluation_only=True)
    pfam.build(recipe, "~/again", download_dir="~/downloads")
    builds.verify("~/again")
    assert len(pfam.open_split("~/again", "test_ood")) == 2
    assert split_stockholm.main(["~/raw/in.sto", "--parts", "2", "--out", "~/parts"]) == 0
    assert {path.name for path in folder.iterdir()} >= {"out", "again", "parts"}
    with pytest.raises(ValueError, match=r"~nobody-at-all/in\.sto: "):
        Recipe(inputs=("~nobody-at-all/in.sto",), evaluation_only=True)


def test_what_systems_leave_in_folders_does_not_count(folder):
    assert build(folder) == 0
    data = builds.find_dataset(folder / "out")
    for place in (folder / "out", data.parent, data):
        for name in (
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            "._SHA256SUMS",
            "._pfam-test_ood.array_record-00000-of-00001",
        ):
            (place / name).write_text("x")
    shutil.copytree(data, folder / "out" / ".Trash-1000" / "1.0.0")
    (folder / "out" / "__MACOSX").mkdir()
    assert "all 6 files have their checksums" in builds.verify(folder / "out")
    assert len(pfam.open_split(folder / "out", "test_ood")) == 2
    (data / "new").touch()
    with pytest.raises(ValueError, match="missing, changed or unknown files: new"):
        builds.verify(folder / "out")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", ""])
@pytest.mark.parametrize("name", ["records.json", "dataset_info.json", "features.json"])
def test_damaged_descriptions_of_a_data_set_are_named(name, damage, folder):
    assert build(folder) == 0
    path = builds.find_dataset(folder / "out") / name
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"build or copy the data again|is empty in"):
        len(pfam.open_split(folder / "out", "test_ood"))
    (path.parent / "SHA256SUMS").write_text("no such line\n")
    with pytest.raises(ValueError, match="missing, changed or unknown files"):
        builds.verify(folder / "out")


DIVIDED = {
    "empty": (b"", 2, "holds no family: it is empty"),
    "FASTA": (b">a\nACDE\n", 2, "expected the header .*seems to be FASTA"),
    "too few families": (GOOD, 3, "--parts 3: .*in.sto has only 2 families"),
    "truncated": (gzip.compress(GOOD)[:-30], 2, "truncated or corrupt"),
    "zip": (b"PK\x03\x04", 2, "a zip archive"),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_dividing_nothing_is_no_success(name, folder, capsys):
    data, parts, reason = DIVIDED[name]
    (folder / "raw" / "in.sto").write_bytes(data)
    arguments = [str(folder / "raw" / "in.sto"), "--parts", str(parts), "--out", str(folder / "parts")]
    assert split_stockholm.main(arguments) == 1
    assert re.search(reason, told(capsys))
    assert not (folder / "parts").exists()


@pytest.mark.parametrize("parts", ["0", "-1", "1.5", "many", "1001", "9" * 30])
def test_numbers_of_parts_out_of_range_are_named(parts, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        split_stockholm.main([str(folder / "raw" / "in.sto"), f"--parts={parts}", "--out", str(folder / "parts")])
    assert f"argument --parts: '{parts}' was given, allowed are 1 to 1000" in capsys.readouterr().err
    assert not (folder / "parts").exists()


def test_standard_input_can_be_divided(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD.replace(b"//", b"//\n//"))))
    assert split_stockholm.main(["-", "--parts", "2", "--out", str(folder / "parts")]) == 0
    recipe = Recipe(inputs=tuple(map(str, sorted((folder / "parts").iterdir()))), evaluation_only=True)
    assert pfam.build(recipe, folder / "out").read["families"] == 2
