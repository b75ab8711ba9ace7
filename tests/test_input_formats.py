"""Stockholm files and tables of clans as other programs write them are read, and other files are named."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import index, pfam, transforms, vocab
from data.families import SPLITS, from_alignment, read_clans, ungapped, without_version
from data.recipe import Recipe, read_families
from data.stockholm import StockholmError, read

ROOT = Path(__file__).parents[1]
PLAIN = b"# STOCKHOLM 1.0\n#=GF ID one\n#=GF AC PF00001.2\na/1-4 AC-DE\nb/1-4 A.GDE\n#=GC RF xx-xx\n//\n"
SECOND = PLAIN.replace(b"one", b"two").replace(b"PF00001", b"PF00002")
BOM = b"\xef\xbb\xbf"
VARIANTS = {
    "byte order mark": BOM + PLAIN + SECOND,
    "byte order mark of an appended file": PLAIN + BOM + SECOND,
    "white space around //": (PLAIN + SECOND).replace(b"//", b" \t// "),
    "doubled //": (PLAIN + SECOND).replace(b"//\n", b"//\n//\n\n//\n"),
    "lower-case header": (PLAIN + SECOND).replace(b"# STOCKHOLM", b"# stockholm"),
    "header without a space": (PLAIN + SECOND).replace(b"# STOCKHOLM", b"#STOCKHOLM"),
    "header with more spaces": (PLAIN + SECOND).replace(b"# STOCKHOLM 1.0", b" #  STOCKHOLM\t1.0  "),
    "header of version 1.1": (PLAIN + SECOND).replace(b"1.0", b"1.1"),
    "lines of Windows": BOM + (PLAIN + SECOND).replace(b"\n", b"\r\n"),
    "blank lines before": b"\n \r\n\t\n" + PLAIN + b"\n\n" + SECOND + b"\n",
    "tabs": (PLAIN + SECOND).replace(b"#=GF ", b"#=GF\t").replace(b"1-4 ", b"1-4\t\t").replace(b"RF ", b"RF\t"),
    "indented lines": (PLAIN + SECOND).replace(b"\n", b"\n  "),
    "gzip": gzip.compress(BOM + PLAIN + SECOND),
    "bzip2": bz2.compress(PLAIN) + bz2.compress(SECOND),
    "xz": lzma.compress(PLAIN) + lzma.compress(SECOND),
}


def content(path: Path) -> list[tuple]:
    return [(a.ids, a.rows.tolist(), a.gf, a.gc, a.number) for a in read(path)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_stockholm_are_read_alike(name, tmp_path):
    (tmp_path / "plain").write_bytes(PLAIN + SECOND)
    (tmp_path / "variant").write_bytes(VARIANTS[name])
    assert content(tmp_path / "variant") == content(tmp_path / "plain")
    assert len(content(tmp_path / "plain")) == 2


OTHERS = {
    "FASTA": (b">a\nACDE\n>b\nACDE\n", "FASTA"),
    "A3M": (b"\n>a/1-4\nACdE\n", "A3M"),
    "PIR": (b">P1;HBA\nHemoglobin\nACDE*\n", "PIR"),
    "Clustal": (b"CLUSTAL W (1.83) multiple sequence alignment\n\na ACDE\n", "Clustal"),
    "Clustal of MUSCLE": (b"MUSCLE (3.8) multiple sequence alignment\n\na ACDE\n", "Clustal"),
    "PHYLIP": (b" 2 4\na         ACDE\nb         ACDE\n", "PHYLIP"),
    "MSF": (b"PileUp\n\n   MSF:  4  Type: P  Check: 1  ..\n", "MSF"),
    "NEXUS": (b"#NEXUS\nBEGIN DATA;\n", "NEXUS"),
    "table": (b"PF00001\tCL0192\tGPCR_A\n", "a table with tabs"),
    "CSV": (b"id,x,y\n1,ACDE,ACDE\n", "a table with commas"),
    "HTML": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n", "HTML"),
    "HTML in lower case": (b"<html>\r\n<head><title>502</title></head>\n", "HTML"),
    "XML": (b"<?xml version='1.0'?>\n", "XML"),
    "HMM": (b"HMMER3/f [3.4 | Aug 2023]\nNAME  x\n", "profile HMM"),
    "JSON": (b'{"records": 1}\n', "JSON"),
    "JSON over lines": (b"[\n 1]\n", "JSON"),
    "ArrayRecord": (next(ROOT.glob("data/default/pfam/1.0.0/pfam-train.*")).read_bytes(), "ArrayRecord"),
    "binary": (b"\x93NUMPY\x01\x00v\x00{'descr'", "binary data"),
    "no header": (b"#=GF AC PF00001.2\na ACDE\n//\n", "without its header"),
    "old Mac": (PLAIN.replace(b"\n", b"\r"), "lines of old Macs"),
    "UTF-16 without a mark": (PLAIN.decode().encode("utf-16-be"), "binary data"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(name, tmp_path):
    given, told = OTHERS[name]
    (tmp_path / "in").write_bytes(given)
    with pytest.raises(StockholmError, match=told) as caught:
        list(read(tmp_path / "in"))
    assert str(caught.value).startswith(f"{tmp_path / 'in'}, line ")
    assert "\n" not in str(caught.value)


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("in.sto", PLAIN)
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w:gz") as packed:
            packed.addfile(tarfile.TarInfo("in.sto"), io.BytesIO())
    else:
        file.write({"zstd": b"\x28\xb5\x2f\xfd", "UTF-16": b""}[kind] + PLAIN.decode().encode("utf-16"))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "zstd", "UTF-16"])
@pytest.mark.parametrize("reader", [lambda path: list(read(path)), read_clans], ids=["alignments", "clans"])
def test_archives_and_other_encodings_are_named(kind, reader, tmp_path):
    (tmp_path / "in").write_bytes(archive(kind))
    with pytest.raises(ValueError, match=rf"{tmp_path / 'in'} is .*{kind}"):
        reader(tmp_path / "in")


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
@pytest.mark.parametrize("families", [1, 500])
def test_truncated_data_end_the_reading_and_corrupt_data_are_never_skipped(module, families, tmp_path):
    rows = np.random.default_rng(0).choice(list("ACDEFGHIKLMNPQRSTVWY"), (families, 40))
    whole = b"".join(b"# STOCKHOLM 1.0\n#=GF AC P%d\na %s\n//\n" % (n, "".join(r).encode()) for n, r in enumerate(rows))
    packed = module.compress(whole)
    path = tmp_path / "in"
    path.write_bytes(packed[: len(packed) * 9 // 10 if families > 1 else len(packed) - 12])
    with pytest.raises(StockholmError, match="truncated or corrupt"):
        list(read(path))
    told: list = []
    assert (
        len(list(read(path, on_bad=told.append))) < families or families == 1
    )  # the file's end may be all that is cut off
    assert len(told) == 1
    damaged = bytearray(packed)
    damaged[-5 if module is gzip else len(packed) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(StockholmError, match="truncated or corrupt"):
        list(read(path, on_bad=told.append))


def test_missing_data_are_gaps_everywhere(tmp_path):
    rows = {"a": b"MKVLAAG", "b": b"~~VL-AG", "c": b"__VL.AG"}
    lines = b"".join(name.encode() + b" " + row + b"\n" for name, row in rows.items())
    (tmp_path / "in.sto").write_bytes(b"# STOCKHOLM 1.0\n#=GF AC PF00001\n" + lines + b"//\n")
    recipe = Recipe(inputs=(str(tmp_path / "in.sto"),), evaluation_only=True)
    pfam.build(recipe, tmp_path / "out")
    (family,) = pfam.open_split(tmp_path / "out", "test_ood")
    assert [row.tobytes() for row in family.alignment] == list(rows.values()), "records hold the file as it is"
    assert [ungapped(row) for row in family.alignment] == ["MKVLAAG", "VLAG", "VLAG"]
    assert index.row_lengths(family).tolist() == [7, 4, 4]
    assert len(family.pairs) == 3
    for other in (1, 2):
        pair = transforms.pair(family.alignment, 0, other)
        assert pair.target.tolist() == [-1, -1, 0, 1, -1, 2, 3]
        assert vocab.decode(pair.y) == "VLAG"


def test_a_stop_in_a_row_is_named():
    with pytest.raises(StockholmError, match=r"unknown symbol '\*' in row 'b/1-4'.*write X in its place"):
        list(read(io.BytesIO(PLAIN.replace(b"A.GDE", b"A.GD*"))))


def letters(text: str) -> Counter[str]:
    return vocab.count_letters(np.frombuffer(text.encode(), np.uint8))


@pytest.mark.parametrize(
    "text",
    [
        "GGCUACGUAGCAAUGCUAACGUCC",
        "ggcuacgu",
        "ACGTACGTTGCAACGTTGCA",
        "acgtnnnnacgtryacgtacgtacgtkm",
        "UUUUUUUUUUUUUUUUUUAA",
    ],
)
def test_nucleotides_are_recognised(text):
    assert vocab.seem_nucleotides(letters(text))


@pytest.mark.parametrize(
    "text",
    [
        "ACGT",  # a peptide
        "GAGAGSGAGAGSGAGAGAGAGAGA",  # silk
        "DTASDAAAAAALTAANAKAAAELTAANAAAAAAATAR",  # an antifreeze protein
        "CCNCSSKWCRDHSRCCGRGCCNCSSK",  # cysteines
        "GGAGGNTTGGAAUGGLLFFEEGGAGGNTTGGAA",
        "XXXXXXXXXXXXXXXXXXXXXXXXXX",
        "",
    ],
)
def test_proteins_are_no_nucleotides(text):
    assert not vocab.seem_nucleotides(letters(text))


def test_no_family_that_ships_seems_to_be_of_nucleotides():
    families = [family for split in SPLITS for family in pfam.open_split(ROOT / "data/default", split)]
    assert not [f.accession for f in families if vocab.seem_nucleotides(vocab.count_letters(f.alignment))]


@pytest.mark.parametrize("residues", ["GGCUACGUAGC-AAUGCUAACG", "acgtacgtgg..ccaattacgt"])
def test_families_of_nucleotides_are_refused_by_name(residues, tmp_path):
    rna = f"# STOCKHOLM 1.0\n#=GF AC RF00001\na {residues}\nb {residues}\n//\n".encode()
    (tmp_path / "in.sto").write_bytes(PLAIN + rna)
    recipe = Recipe(inputs=(str(tmp_path / "in.sto"),), evaluation_only=True)
    told = rf"{tmp_path / 'in.sto'}, line 8, family RF00001: its residues are nucleotides"
    with pytest.raises(StockholmError, match=told):
        list(read_families(recipe.inputs[0], {}, recipe, print))
    skipped: list[str] = []
    recipe = Recipe(inputs=recipe.inputs, evaluation_only=True, skip_bad=True)
    assert [f.accession for f in read_families(recipe.inputs[0], {}, recipe, skipped.append)] == ["PF00001"]
    assert "nucleotides" in skipped[0]


@pytest.mark.parametrize(
    ("given", "accession"),
    [
        ("PF00001.25", "PF00001"),
        ("PF00001", "PF00001"),
        ("NP_000001.2", "NP_000001"),
        ("1.10.275.10/FF/000026", "1.10.275.10/FF/000026"),
        ("1.10.275.10", "1.10.275.10"),
        ("1.10", "1.10"),
        ("a.102", "a.102"),
        ("G3DSA:1.10.275.10", "G3DSA:1.10.275.10"),
        ("PF00001.25.1", "PF00001.25.1"),
        ("PF00001.x", "PF00001.x"),
    ],
)
def test_only_a_number_at_the_end_of_an_accession_is_a_version(given, accession, tmp_path):
    assert without_version(given) == accession
    (alignment,) = read(io.BytesIO(PLAIN.replace(b"PF00001.2", given.encode())))
    (tmp_path / "clans").write_text(f"{given}\tCL1\n")
    family = from_alignment(alignment, read_clans(tmp_path / "clans"))
    assert (family.accession, family.clan) == (accession, "CL1")


def test_records_without_a_name_take_the_name_of_their_file(tmp_path):
    nameless = b"# STOCKHOLM 1.0\na ACDE\nb ACDE\n//\n"
    names = {}
    for file in ("globins.sto", "1.10.275.10.sto.gz", "PF00001.25.stk", "plain"):
        path = tmp_path / file
        path.write_bytes(gzip.compress(nameless * 2) if file.endswith("gz") else nameless * 2)
        recipe = Recipe(inputs=(str(path),), evaluation_only=True)
        names[file] = [family.accession for family in read_families(str(path), {}, recipe, print)]
    assert names == {
        "globins.sto": ["globins", "globins/2"],
        "1.10.275.10.sto.gz": ["1.10.275.10", "1.10.275.10/2"],
        "PF00001.25.stk": ["PF00001", "PF00001.25/2"],
        "plain": ["plain", "plain/2"],
    }


CLANS = {"PF00001": "CL0192", "PF00002": ""}
TABLES = {
    "byte order mark": BOM + b"PF00001\tCL0192\tx\nPF00002\t\t\n",
    "lines of Windows": b"PF00001\tCL0192\r\nPF00002\t\r\n",
    "lines of old Macs": b"PF00001\tCL0192\rPF00002\t\r",
    "versions": b"PF00001.25\tCL0192\nPF00002.1\t\\N\n",
    "repeated rows": b"PF00001\tCL0192\nPF00001.3\tCL0192\nPF00002\t\n",
    "comments": b"# accession, clan\n\nPF00001\tCL0192\nPF00002\t-\n",
    "NULL": b"PF00001\t CL0192 \nPF00002\tNULL\n",
    "nan": b"PF00001\tCL0192\nPF00002\tnan\n",
    "gzip": gzip.compress(b"PF00001\tCL0192\nPF00002\t\n"),
    "bzip2": bz2.compress(b"PF00001\tCL0192\nPF00002\t\n"),
    "xz": lzma.compress(b"PF00001\tCL0192\nPF00002\t\n"),
}


@pytest.mark.parametrize("name", TABLES)
def test_variants_of_the_table_of_clans_are_read_alike(name, tmp_path):
    (tmp_path / "clans").write_bytes(TABLES[name])
    assert read_clans(tmp_path / "clans") == CLANS


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (b"", "has no row"),
        (b"\n\r\n# only a comment\n", "has no row"),
        (b"PF00001,CL0192\n", "line 1: expected .*found 'PF00001,CL0192'; the file seems to be a table with commas"),
        (b"PF00001 CL0192\n", "line 1: expected 'accession<tab>clan"),
        (b"\tCL0192\n", "line 1: expected 'accession<tab>clan"),
        (b"<!DOCTYPE html>\n<p>404\n", "line 1: .*seems to be HTML"),
        (PLAIN, "seems to be a Stockholm alignment"),
        (b"CL0192\tPF00001\nCL0192\tPF00002\n", "line 2: 'CL0192' is in 'PF00002' here and in 'PF00001' before"),
        (b"PF00001\tCL0192\nPF00001\tCL0001\n", "line 2: 'PF00001' is in 'CL0001' here and in 'CL0192' before"),
        (b"PF00001.1\tCL0192\nPF00001.2\t\n", "line 2: 'PF00001' is in '' here"),
        (lzma.compress(b"PF00001\tCL0192\n")[:-20], "truncated or corrupt"),
    ],
)
def test_other_tables_are_refused_by_name(table, told, tmp_path):
    (tmp_path / "clans").write_bytes(table)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'clans'}.*{told}"):
        read_clans(tmp_path / "clans")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_clans(tmp_path / "nowhere")
