"""Options of a build that choose the splits: every family to train, or the train split alone."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest

from data import pfam
from data.families import split_of, ungapped
from data.recipe import Recipe
from scripts import build_pfam

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam: pip install -r requirements-beam.txt"
)
BEAM = ["--beam", "--beam-options", "--direct_num_workers=1"]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
MANY = [f"{LETTERS[i % 20]}{LETTERS[i // 20]}DEFGHI" for i in range(60)]
FEW = ["ACDEFG-h", "ACDEF.GH", "-CDEFGHI"]


def names_of(split: str, count: int) -> list[str]:
    return [f"PF{i:05d}" for i in range(500) if split_of(f"PF{i:05d}") == split][:count]


TRAINED, VALIDATION, TESTED = names_of("train", 2), names_of("validation", 1), names_of("test_ood", 1)
ROWS = {TRAINED[0]: MANY, TRAINED[1]: FEW, VALIDATION[0]: MANY, TESTED[0]: FEW}


@pytest.fixture
def folder(tmp_path) -> Path:
    records = []
    for name, rows in ROWS.items():
        lines = ["# STOCKHOLM 1.0", f"#=GF AC {name}", *(f"r{i} {row}" for i, row in enumerate(rows)), "//", ""]
        records.append("\n".join(lines))
    (tmp_path / "in.sto").write_text("".join(records))
    (tmp_path / "clans.tsv").write_text("".join(f"{name}\t\n" for name in ROWS))
    return tmp_path


def build(folder: Path, *options: str, clans: bool = True, out: str = "out") -> int:
    table = ["--clans", str(folder / "clans.tsv")] if clans else []
    arguments = ["--input", str(folder / "in.sto"), *table, "--out", str(folder / out), "--overwrite"]
    return build_pfam.main([*arguments, *options])


def contents(data_dir: Path) -> dict[tuple[str, str], tuple]:
    return {
        (split, family.accession): (family.rows, family.alignment.tolist(), family.pairs.tolist())
        for split in report_of(data_dir)["records"]
        for family in pfam.open_split(data_dir, split)
    }


def report_of(data_dir: Path) -> dict:
    report = json.loads((pfam.find_dataset(data_dir) / "report.json").read_text())
    return {**report, "dropped": sorted(report["dropped"])}


def test_every_family_is_trained_on_and_part_of_its_sequences_held_out(folder):
    assert build(folder, "--every-family", clans=False) == 0
    assert report_of(folder / "out")["records"] == {"train": 4, "test_iid": 2}
    splits = {
        split: {f.accession: f for f in pfam.open_split(folder / "out", split)} for split in ("train", "test_iid")
    }
    assert set(splits["train"]) == set(ROWS)
    assert set(splits["test_iid"]) == {TRAINED[0], VALIDATION[0]}  # the others have too few sequences
    for name, rows in ROWS.items():
        trained, *held = (splits[split][name] for split in splits if name in splits[split])
        sequences = [sorted(map(ungapped, family.alignment)) for family in (trained, *held)]
        assert sorted(itertools.chain(*sequences)) == sorted(
            row.upper().replace("-", "").replace(".", "") for row in rows
        )
        assert not set(sequences[0]).intersection(*sequences[1:] or [[]])
        assert len(trained.pairs) == 0
        assert all(len(family.pairs) for family in held)


def test_train_alone_is_as_with_the_other_splits(folder):
    assert build(folder) == 0
    whole = contents(folder / "out")
    assert build(folder, "--train-only", out="alone") == 0
    assert contents(folder / "alone") == {key: value for key, value in whole.items() if key[0] == "train"}
    report = report_of(folder / "alone")
    assert report["records"] == {"train": 2}
    others = {"validation": VALIDATION[0], "test_ood": TESTED[0]}
    told = {f"{name} of {folder / 'in.sto'}: of {split}, and train alone is written" for split, name in others.items()}
    assert set(report["dropped"]) == told


def test_both_options_put_no_family_elsewhere(folder):
    assert build(folder, "--every-family", "--train-only", clans=False) == 0
    assert report_of(folder / "out")["records"] == {"train": 4}


def test_train_alone_without_a_family_of_train_is_no_success(folder, capsys):
    (folder / "in.sto").write_text(f"# STOCKHOLM 1.0\n#=GF AC {TESTED[0]}\na ACD\nb ACD\n//\n")
    assert build(folder, "--train-only") == 1
    assert "no family to write: 1 were read" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "clans", "told"),
    [
        (
            ["--every-family"],
            True,
            r"every_family \(--every-family\) puts all families into train, and clans=.*tsv divide",
        ),
        (
            ["--every-family", "--evaluation-only"],
            False,
            r"evaluation_only \(--evaluation-only\) into test_ood: give one",
        ),
        (
            ["--train-only", "--evaluation-only"],
            False,
            r"train_only \(--train-only\) writes train, and evaluation_only",
        ),
        (["--train-only"], False, "inputs need clans .*every_family, --every-family"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, clans, told, folder, capsys):
    assert build(folder, *options, clans=clans) == 1
    assert re.search(told, capsys.readouterr().err)


def test_a_release_is_divided_by_its_clans():
    with pytest.raises(ValueError, match=r"release=37\.0 divides them by clan: leave one of them out"):
        Recipe(release="37.0", every_family=True)


@needs_beam
@pytest.mark.parametrize("options", [["--every-family"], ["--train-only"]])
def test_beam_writes_the_same_records(options, folder):
    clans = options == ["--train-only"]
    assert build(folder, *options, clans=clans) == 0
    assert build(folder, *options, *BEAM, clans=clans, out="beam") == 0
    assert contents(folder / "beam") == contents(folder / "out")
    assert report_of(folder / "beam") == report_of(folder / "out")
