"""Lower case of alignments made by a profile HMM is aligned with nothing, and an input says whether it is such."""

import gzip
import importlib.util
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import insert_states, pfam, recipe, stockholm, transforms, vocab
from data.families import evaluation_pairs, from_alignment
from data.recipe import Recipe
from scripts import build_pfam, split_stockholm

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MADE_BY_HMM = SHARED / "pfam_hmm" / "families.sto.gz"
needs_shared = pytest.mark.skipif(not MADE_BY_HMM.is_file(), reason="needs ../shared/pfam_hmm")
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam: pip install -r requirements-beam.txt"
)
HMM_ROWS = ["ACa.cDE", "A-ad.DE", "-Cwwy-E"]
SEED_ROWS = ["ACa-cDE", "A-adCDE"]  # column 5 holds lower and upper case


def symbols(*rows: str) -> np.ndarray:
    return np.array([list(row.encode()) for row in rows], np.uint8)


def record(accession: str, rows: list[str] = HMM_ROWS, rf: str = "") -> bytes:
    lines = ["# STOCKHOLM 1.0", f"#=GF AC {accession}", *(f"r{i} {row}" for i, row in enumerate(rows))]
    return "\n".join([*lines, *([f"#=GC RF {rf}"] if rf else []), "//", ""]).encode()


def build(folder: Path, name: str, data: bytes, *options: str) -> int:
    (folder / name).write_bytes(data)
    source = ["--input", str(folder / name), "--evaluation-only", "--overwrite"]
    return build_pfam.main([*source, "--out", str(folder / "out"), *options])


def built(folder: Path) -> dict[str, bool]:
    return {family.accession: family.insert_states for family in pfam.open_split(folder / "out", "test_ood")}


HAND_MADE = {  # rows, target as aligned in either case, target with insert states
    "insert columns stack residues": (("ACaaDE", "A-gaDE"), [0, -1, 1, 2, 3, 4], [0, -1, -1, -1, 3, 4]),
    "inserts of one row alone": (("AcD", "A.D"), [0, -1, 1], [0, -1, 1]),
    "inserts at both ends": (("wwAyy", "w.Ay."), [0, -1, 1, 2, -1], [-1, -1, 1, -1, -1]),
    "nothing but inserts": (("acd", "acd"), [0, 1, 2], [-1, -1, -1]),
    "an unknown residue in a match column": (("AXx", "AXx"), [0, 1, 2], [0, 1, -1]),
    "missing data": (("~~AC", "DaA_"), [2, -1], [2, -1]),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_lower_case_has_no_target_and_stays_in_the_sequences(name):
    rows, either_case, with_insert_states = HAND_MADE[name]
    plain = transforms.pair(symbols(*rows), 0, 1)
    marked = transforms.pair(symbols(*rows), 0, 1, insert_states=True)
    assert plain.target.tolist() == either_case
    assert marked.target.tolist() == with_insert_states
    for one, other in ((plain.x, marked.x), (plain.y, marked.y)):
        np.testing.assert_array_equal(one, other)
    assert vocab.decode(marked.x) == rows[0].upper().translate(dict.fromkeys(map(ord, "-.~_")))


def test_rows_that_share_insert_states_alone_are_no_evaluation_pair():
    rows = ["ACa", "--a", "A-a"]
    (alignment,) = stockholm.read(io.BytesIO(record("PF1", rows)))
    assert len(evaluation_pairs(from_alignment(alignment, {}))) == 3
    family = from_alignment(alignment, {}, insert_states=True)
    assert evaluation_pairs(family).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("rows", "column", "found"),
    [
        (("AC", "Ac"), 2, "'C' of a match state and 'c' of an insert state"),
        (("A.", "AC"), 2, "'C' of a match state and '.' of an insert state"),
        (("-C", "aC"), 1, "'-' of a match state and 'a' of an insert state"),
        (("A-", "A."), 2, "'-' of a match state and '.' of an insert state"),
    ],
)
def test_a_column_of_match_and_insert_states_is_malformed(rows, column, found, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"column {column} holds {found}: .*or give --no-insert-states"):
        insert_states.check_columns(symbols(*rows))
    data = record("PF00001") + record("PF00002", [*rows])
    assert build(tmp_path, "in.sto", data, "--insert-states") == 1
    assert f"in.sto, line 7, family PF00002: column {column} holds {found}" in capsys.readouterr().err
    assert build(tmp_path, "in.sto", data, "--insert-states", "--skip-bad") == 0
    assert "malformed, skipped: " in capsys.readouterr().err
    assert built(tmp_path) == {"PF00001": True}
    assert build(tmp_path, "in.sto", data, "--no-insert-states") == 0


def test_missing_data_are_of_no_state():
    insert_states.check_columns(symbols("A~_c", "~A._", "__~~"))


NAMED = {
    "Pfam-A.full": True,
    "Pfam-A.full.gz": True,
    "Pfam-A.full.part-00000-of-00002.sto.gz": True,
    "Pfam-A.seed": False,
    "Pfam-A.seed.gz": False,
    "mine.sto": False,
}


@pytest.mark.parametrize("name", NAMED)
def test_the_name_of_a_release_decides_and_an_option_overrules_it(name, tmp_path):
    pack = gzip.compress if name.endswith(".gz") else bytes
    assert build(tmp_path, name, pack(record("PF00001"))) == 0
    assert built(tmp_path) == {"PF00001": NAMED[name]}
    for option, expected in (("--insert-states", True), ("--no-insert-states", False)):
        assert build(tmp_path, name, pack(record("PF00001")), option) == 0
        assert built(tmp_path) == {"PF00001": expected}


def test_a_release_is_of_seeds_and_an_option_overrules_that():
    assert Recipe(release="37.0").insert_states_of("x/Pfam-A.full.gz") is False
    assert Recipe(release="37.0", insert_states=True).insert_states_of("x/Pfam-A.seed.gz") is True


def test_parts_of_a_file_are_read_as_the_file(tmp_path):
    (tmp_path / "Pfam-A.full.gz").write_bytes(gzip.compress(record("PF00001") + record("PF00002")))
    arguments = [str(tmp_path / "Pfam-A.full.gz"), "--parts", "2", "--out", str(tmp_path / "parts")]
    assert split_stockholm.main(arguments) == 0
    inputs = tuple(map(str, sorted((tmp_path / "parts").iterdir())))
    assert [Path(path).name for path in inputs] == [f"Pfam-A.full.part-0000{i}-of-00002.sto.gz" for i in range(2)]
    pfam.build(Recipe(inputs=inputs, evaluation_only=True), tmp_path / "out")
    assert built(tmp_path) == {"PF00001": True, "PF00002": True}


MARKED, UNMARKED = record("PF00001", rf="xx...xx"), record("PF00002")
UPPER_CASE = record("PF00003", ["AC.", "-CD"], rf="xx.")  # a seed with a curator's annotation


def test_the_annotation_of_match_columns_decides_elsewhere(tmp_path):
    assert build(tmp_path, "mine.sto", MARKED) == 0
    assert built(tmp_path) == {"PF00001": True}
    for data, expected in ((MARKED + UPPER_CASE, True), (record("PF00001") + UPPER_CASE, False)):
        assert build(tmp_path, "mine.sto", data) == 0
        assert built(tmp_path) == {"PF00001": expected, "PF00003": False}


@pytest.mark.parametrize("order", [[MARKED, UNMARKED], [UNMARKED, MARKED]])
def test_a_file_of_both_kinds_is_refused(order, tmp_path, capsys):
    data = b"".join([UPPER_CASE, *order, record("PF00004")])
    for options in ([], ["--skip-bad"]):
        assert build(tmp_path, "mine.sto", data, *options) == 1
        err = capsys.readouterr().err
        assert f"{tmp_path / 'mine.sto'}: family PF00001 has '#=GC RF'" in err
        assert "family PF00002 has none" in err
        assert "give --insert-states (insert_states=True) or --no-insert-states (insert_states=False)" in err
    assert build(tmp_path, "Pfam-A.seed", data) == 0
    assert build(tmp_path, "mine.sto", data, "--no-insert-states") == 0
    assert set(built(tmp_path).values()) == {False}


def test_files_may_differ(tmp_path):
    for name, data in (("a.sto", MARKED), ("b.sto", UNMARKED)):
        (tmp_path / name).write_bytes(data)
    inputs = tuple(str(tmp_path / name) for name in ("a.sto", "b.sto"))
    report = pfam.build(Recipe(inputs=inputs, evaluation_only=True), tmp_path / "out")
    assert built(tmp_path) == {"PF00001": True, "PF00002": False}
    assert report.read["insert_states"] == 1
    assert "; in 1 of 2 families lower case is aligned with nothing" in report.summary(with_clans=False)


def test_an_input_that_seems_to_have_insert_states_is_warned_of(tmp_path, capsys):
    seeds = [record(f"PF0001{i}", SEED_ROWS) for i in range(2)]
    told = "of the {} families seem to be aligned by a profile HMM"
    assert build(tmp_path, "mine.sto", record("PF00001") + record("PF00002") + seeds[0]) == 0
    err = capsys.readouterr().err
    assert err.count(f"warning: 2 {told.format(3)}") == 1
    assert "give --insert-states (insert_states=True), or --no-insert-states" in err
    quiet = [
        (record("PF00001") + seeds[0], "mine.sto", []),  # not most of them
        (record("PF00001", ["AC", "-C"]), "mine.sto", []),  # nothing in lower case
        (record("PF00001", ["ac", ".c"]), "mine.sto", []),  # no match state
        (record("PF00001"), "mine.sto", ["--insert-states"]),
        (record("PF00001"), "mine.sto", ["--no-insert-states"]),
        (record("PF00001"), "Pfam-A.seed", []),
        (record("PF00001"), "Pfam-A.full", []),
        (MARKED, "mine.sto", []),
    ]
    for data, name, options in quiet:
        assert build(tmp_path, name, data, *options) == 0
        assert "warning" not in capsys.readouterr().err


def test_records_of_earlier_versions_are_read_as_aligned_in_either_case():
    assert str(pfam.Pfam.VERSION) == "1.1.0"
    old = pfam.open_split(ROOT / "data" / "default", "validation")
    assert pfam.find_dataset(ROOT / "data" / "default").name == "1.0.0"
    assert [family.insert_states for family in old] == [False, False]


@needs_shared
def test_of_real_alignments_of_an_hmm_match_states_alone_are_aligned():
    options = Recipe(inputs=(str(MADE_BY_HMM),), evaluation_only=True, insert_states=True)
    families = itertools.islice(recipe.read_families(str(MADE_BY_HMM), {}, options, pytest.fail), 100)
    aligned = stacked = 0
    for family in families:
        rows = family.alignment
        for i, j in itertools.islice(itertools.combinations(range(len(rows)), 2), 5):
            pair = transforms.pair(rows, i, j, family.insert_states)
            texts = [rows[k].tobytes().decode() for k in (i, j)]
            ungapped = [text.replace("-", "").replace(".", "") for text in texts]
            found = transforms.aligned_pairs(pair.target)
            assert all(ungapped[0][a].isupper() and ungapped[1][b].isupper() for a, b in found)
            assert len(found) == sum(a.isupper() and b.isupper() for a, b in zip(*texts, strict=True))
            aligned += len(found)
            stacked += sum(a.islower() and b.islower() for a, b in zip(*texts, strict=True))
    assert aligned > 10_000
    assert stacked > 100


@needs_shared
def test_real_seeds_cause_no_warning_and_real_alignments_of_an_hmm_do():
    names = {
        "pfam/seeds_deep_192": False,
        "pfam/pairs_1000": False,
        "homstrad/homstrad": False,
        "pfam_hmm/families": True,
    }
    for name, expected in names.items():
        path = str(SHARED / f"{name}.sto.gz")
        options = Recipe(inputs=(path,), evaluation_only=True)
        families = list(itertools.islice(recipe.read_families(path, {}, options, pytest.fail), 100))
        assert not any(family.insert_states for family in families)
        seem = sum(insert_states.seem_present(family.alignment) for family in families)
        assert (2 * seem > len(families)) == expected


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("name", ["pfam/pairs_conserved_5043", "scop40/scop40_pairs", "pfam_hmm/families"])
def test_real_builds_warn_of_alignments_of_an_hmm_alone(name, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "build_pfam.py"), "--evaluation-only", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--input", str(SHARED / f"{name}.sto.gz")], check=True, capture_output=True, text=True
    )
    warned = "seem to be aligned by a profile HMM" in done.stderr
    assert warned == (name == "pfam_hmm/families")
    if warned:  # no column of the 2,081 families mixes the states
        subprocess.run([*command, "--input", str(MADE_BY_HMM), "--insert-states", "--overwrite"], check=True)
        assert len(pfam.open_split(tmp_path, "test_ood")) == 2_081


@needs_beam
@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("mine.sto", MARKED + UPPER_CASE, []),
        ("Pfam-A.full", UNMARKED, []),
        ("mine.sto", UNMARKED, ["--insert-states"]),
        ("mine.sto", UNMARKED + record("PF00009"), []),  # warned of
        ("mine.sto", UNMARKED + record("PF00009", ["AC", "Ac"]), ["--insert-states", "--skip-bad"]),
    ],
)
def test_beam_reads_insert_states_as_the_plain_build(name, data, options, tmp_path, capsys):
    found = []
    for engine in ([], ["--beam", "--beam-options", "--direct_num_workers=1"]):
        assert build(tmp_path, name, data, *options, *engine) == 0
        report = json.loads((pfam.find_dataset(tmp_path / "out") / "report.json").read_text())
        warned = "seem to be aligned by a profile HMM" in capsys.readouterr().err
        found.append((built(tmp_path), report, warned))
    assert found[0] == found[1]


@needs_beam
def test_beam_refuses_a_file_of_both_kinds(tmp_path, capsys):
    options = ["--skip-bad", "--beam", "--beam-options", "--direct_num_workers=1"]
    assert build(tmp_path, "mine.sto", MARKED + UNMARKED, *options) == 1
    assert "family PF00001 has '#=GC RF'" in capsys.readouterr().err
