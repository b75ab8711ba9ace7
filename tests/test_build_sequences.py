"""scripts/build_sequences.py: every sequence once, in the split of its cluster, beside sequences of like length."""

import gzip
import json
import pickle
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data import builds, fasta, sequences, vocab
from data.families import BadRecordError
from data.pfam import open_split
from data.sequence_recipe import SPLITS, cut, split_of
from data.sequences import PER_RECORD, open_sequences
from scripts import build_sequences
from tests.support import small_sequences
from tests.support.run import flip

ROOT = Path(__file__).parents[1]
SWISSPROT = ROOT.parent / "shared" / "swissprot" / "swissprot50.fasta.gz"
GOOD = "MKVLAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF"  # 38 residues


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def build(folder: Path, text: str | bytes, *options: str, out: str = "out") -> int:
    (folder / "in").write_bytes(text if isinstance(text, bytes) else text.encode())
    return build_sequences.main(["--input", str(folder / "in"), "--out", str(folder / out), *options])


def contents(data_dir: Path) -> dict[str, dict[str, str]]:
    """Sequences by split and name, as the records have them."""
    found: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        try:
            source = open_sequences(data_dir, split)
        except ValueError as error:
            assert "is empty" in str(error)
            continue
        names = [name.decode() for record in source.shards.records for name in record["names"]]
        assert len(set(names)) == len(names) == len(source)
        found[split] = {name: vocab.decode(source[n].astype(np.int32)) for n, name in enumerate(names)}
    return found


def test_every_sequence_comes_back_in_the_split_of_its_name(folder):
    given = small_sequences.random_sequences(800)
    found = contents(small_sequences.build(given, folder, "--buckets", "50", "100", "150"))
    assert {name: sequence for split in found.values() for name, sequence in split.items()} == given
    assert set(found) == set(SPLITS)
    assert all(split_of(name) == split for split, names in found.items() for name in names)
    assert len(found["train"]) > 700


def test_records_hold_sequences_of_one_bucket_and_the_index_lists_them(folder):
    given = small_sequences.random_sequences(800)
    source = open_sequences(small_sequences.build(given, folder, "--buckets", "50", "100", "150"), "train")
    bucket = np.searchsorted([50, 100, 150], source.lengths)
    orders = []
    for record in range(len(source.shards)):
        part = slice(source.first[record], source.first[record + 1])
        assert len(set(bucket[part])) == 1 and 1 <= len(bucket[part]) <= PER_RECORD
        assert [len(x) for x in source.record(record)] == source.lengths[part].tolist()
        names = [int(name[1:]) for name in source.shards.records[record]["names"]]
        orders.append(names == sorted(names))
    assert 12 <= len(orders) <= 18  # of some 770 sequences in three buckets
    assert not any(orders), "neighbours of the file would be neighbours in batches"
    tokens = np.concatenate([source[n] for n in range(len(source))])
    assert source.residues.tolist() == np.bincount(tokens, minlength=vocab.SIZE).tolist()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.content == source.content and (copy[5] == source[5]).all()


def test_spellings_of_a_sequence(folder, capsys):
    """Lower case, gaps, stops, blanks, lines of Windows, a packed file: all are the same sequence, kept once."""
    texts = [
        f">a x\n{GOOD}\n",
        f">b\n{GOOD.lower()}*\n",
        f">c\r\n{GOOD[:9]}-.\r\n{GOOD[9:]}  \r\n",
        f">d\n{GOOD[:5]} ~\n_{GOOD[5:]}",
    ]
    for text in texts:
        assert build(folder, gzip.compress(text.encode()), "--overwrite") == 0
        assert list(next(iter(contents(folder / "out").values())).values()) == [GOOD]
    capsys.readouterr()
    short = f">e\n{GOOD[:29]}\n>f\nMK*{GOOD}\n"
    assert build(folder, "\n".join([*texts, short]), "--overwrite", "--buckets", "30", "40", "64") == 0
    told = capsys.readouterr().out
    assert "read 1 file: 6 sequences, 222 residues, 1 of them unknown (B, J, O, U, X, Z)" in told
    assert "left out: 0 malformed, 1 too short, 3 there before" in told and "pieces" not in told
    found = {name: x for of in contents(folder / "out").values() for name, x in of.items()}
    assert found == {"a": GOOD, "f": f"MKX{GOOD}"}
    report = json.loads((builds.find_dataset(folder / "out") / "report.json").read_text())
    assert report["read"]["again"] == 3 and sum(x["residues"] for x in report["splits"].values()) == 79


def test_long_sequences_are_cut_into_pieces_of_one_split(folder, capsys):
    given = small_sequences.random_sequences(40, 120, 500)
    data_dir = small_sequences.build(given, folder, "--buckets", "64", "100")
    for split, found in contents(data_dir).items():
        for name in {name.split("/")[0] for name in found}:
            assert split_of(name) == split
            pieces = sorted(
                (tuple(map(int, piece.split("/")[1].split("-"))), sequence)
                for piece, sequence in found.items()
                if piece.split("/")[0] == name
            )
            assert "".join(sequence for _, sequence in pieces) == given[name]
            assert pieces[0][0][0] == 1 and pieces[-1][0][1] == len(given[name])
            assert len(pieces) == -(-len(given[name]) // 100) and all(50 <= len(x) <= 100 for _, x in pieces)
    assert [len(x.tokens) for x in cut("x", np.zeros(201, np.uint8), 100)] == [67, 67, 67]


def test_members_of_a_cluster_stay_together(folder, capsys):
    given = small_sequences.random_sequences(400)
    members = {name: f"s{int(name[1:]) // 10}0" for name in given}
    table = folder / "clusters.tsv.gz"
    table.write_bytes(gzip.compress("".join(f"{of}\t{name}\n" for name, of in members.items()).encode()))
    found = contents(small_sequences.build(given, folder, "--clusters", str(table)))
    for split, names in found.items():
        assert {split_of(members[name]) for name in names} == {split}
    assert any(split_of(name) != split for split, names in found.items() for name in names)
    text = (folder / "in.fasta").read_text()
    for lines, reason in {
        "s0\n": "line 1: expected 'representative<tab>member', found b's0",
        "s0\ts1\ns2\ts1\n": "line 2: 's1' is a member of two clusters",
        "": "has no line",
        "x\ty\n": "the table knows 0 of the 400 sequences; its first line has the representative 'x' and the",
    }.items():
        table.write_text(lines)
        capsys.readouterr()
        assert build(folder, text, "--clusters", str(table), out="other") == 1
        assert reason in capsys.readouterr().err
    table.write_text("s0\ts1\n")
    assert build(folder, text, "--clusters", str(table), out="other") == 0
    assert "build_sequences: warning: clusters: the table knows 1 of the 400" in capsys.readouterr().err


MALFORMED = {
    "a name of two sequences": (f">a\n{GOOD}\n>a\n{GOOD}A\n", r"record 2 \(a\): this name has occurred before"),
    "a digit": (f">a\n{GOOD}\n>b\n{GOOD}1\n", r"record 2 \(b\): sequence: symbol '1' at position 38 is no residue"),
    "no name": (f">a\n{GOOD}\n> \n{GOOD}A\n", r"record 2 \(\): its header has no name"),
    "nothing": (f">a\n{GOOD}\n>b\n>c\n{GOOD}A\n", r"record 2 \(b\): it has no known residue"),
    "unknown alone": (f">a\n{GOOD}\n>b\nXXXX{'X' * 40}\n", r"record 2 \(b\): it has no known residue"),
    "DNA": (f">a\n{GOOD}\n>b\n{'ACGTTGCAAC' * 4}\n", r"record 2 \(b\): its residues are nucleotides"),
}
UNUSABLE = {
    "empty": (b"", "holds no sequence: it is empty"),
    "blank": (b"\n\r\n", "holds no sequence: it is empty"),
    "all DNA": (b">a\n" + b"ACGTTGCAAC" * 9, "its residues are nucleotides|no sequence to write.*nucleotides"),
    "Stockholm": (b"# STOCKHOLM 1.0\na AC\n//\n", "not with '>': it seems to be a Stockholm alignment"),
    "no FASTA": (b"hello\n", "begins with 'hello', not with '>'; give FASTA"),
    "truncated": (gzip.compress(f">a\n{GOOD * 99}\n".encode())[:-9], "truncated or corrupt"),
    "binary": (b">a\n\0\0", "zero byte"),
    "all short": (b">a\nMKV\n", "no sequence to write: .*1 too short"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_sequence_stops_the_build_or_is_listed(name, folder, capsys):
    text, reason = MALFORMED[name]
    assert build(folder, text) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"build_sequences: {folder}/in, {reason}", line) and not (folder / "out").exists()
    assert build(folder, text, "--skip-bad") == 0
    told = capsys.readouterr()
    assert re.search(rf"malformed, skipped: .*{reason}", told.err) and "left out: 1 malformed" in told.out
    kept = {name for of in contents(folder / "out").values() for name in of}
    assert kept == {"a", "c"} if name == "nothing" else kept == {"a"}


@pytest.mark.parametrize("name", UNUSABLE)
def test_nothing_is_no_success_and_leaves_the_old_data_whole(name, folder, capsys):
    data, reason = UNUSABLE[name]
    assert build(folder, f">a\n{GOOD}\n") == 0
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    for options in ([], ["--skip-bad"]):
        capsys.readouterr()
        assert build(folder, data, "--overwrite", *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(reason, line), line
        assert build(folder, data, *options, out="new/deep") == 1
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--buckets", "64", "32"], "buckets=(64, 32)"),
        (["--buckets", "0", "32"], "buckets=(0, 32)"),
        (["--min-length=0"], "min_length=0"),
        (["--min-length=65", "--buckets", "64"], "min_length=65: allowed is 1 to the largest bucket, 64"),
        (["--num-shards=0"], "num_shards=0"),
        (["--min-length=x"], "invalid int value"),
        (["--clusters=nowhere"], "input nowhere is not a file"),
    ],
)
def test_settings_out_of_range_are_named(options, reason, folder, capsys):
    try:
        status = build(folder, f">a\n{GOOD}\n", *options)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2) and reason in capsys.readouterr().err and not (folder / "out").exists()


def test_damage_is_found_and_named(folder, capsys):
    data_dir = small_sequences.build(small_sequences.random_sequences(300), folder)
    assert build_sequences.main(["--verify", str(data_dir)]) == 0
    assert "3 splits, 3 shards" in (told := capsys.readouterr().out) and "files have their checksums" in told
    found = builds.find_dataset(data_dir)
    (shard,) = found.glob("*train*")
    source = open_sequences(data_dir, "train")
    flip(shard, shard.read_bytes().index(b"lengths") + 40)
    assert build_sequences.main(["--verify", str(data_dir)]) == 1
    assert shard.name in capsys.readouterr().err
    with pytest.raises(BadRecordError, match=rf"{shard}, record 0 is damaged \(RuntimeError.*; build the data again"):
        source[0]
    other = folder / "other"
    other.mkdir()
    others = builds.find_dataset(small_sequences.build(small_sequences.random_sequences(310, seed=1), other))
    shutil.copy(others / sequences.INDEX, found)
    with pytest.raises(ValueError, match=r"is of other shards|is not what"):
        open_sequences(data_dir, "train").record(1)
    (found / sequences.INDEX).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"index\.safetensors cannot be read"):
        open_sequences(data_dir, "train")


def test_alignments_and_sequences_are_told_apart(folder):
    with pytest.raises(ValueError, match=r"tokens is needed: alignments are built by .*build_pfam\.py, sequences by"):
        open_sequences(ROOT / "data/default", "train")
    data_dir = small_sequences.build(small_sequences.random_sequences(50), folder)
    with pytest.raises(ValueError, match=r"hold .*tokens.*, and alignment is needed"):
        open_split(data_dir, "train")
    with pytest.raises(FileNotFoundError, match=r"is not a folder; build one with scripts/build_sequences\.py --out"):
        open_sequences(folder / "none", "train")
    with pytest.raises(ValueError, match="the splits of sequences are train, validation, test_ood"):
        open_sequences(data_dir, "test_iid")


@pytest.mark.skipif(not SWISSPROT.exists(), reason="the shared data are not here: ../shared/swissprot")
def test_real_sequences_are_read():
    tokens = [fasta.tokens_of(record) for record in islice(fasta.read(str(SWISSPROT)), 2000)]
    assert sum(map(len, tokens)) == 236_238 and max(x.max() for x in tokens) <= vocab.X
