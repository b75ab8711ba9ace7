"""Files of sequences and tables of pairs: what is read, what is refused by name, and that warnings are few."""

import bz2
import gzip
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment import sequences
from alignment.sequences import Record

DNA = b"ATGGTGCTGTCTCCTGCCGACAAGACCAACG"
PROTEIN = "MVLSPADKTNVKAAWGKVGA"


@pytest.fixture
def read(tmp_path, monkeypatch) -> Callable[..., list[Record]]:
    """Read bytes as a file `many.fasta` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def of(content: bytes | str, **options: object) -> list[Record]:
        Path("many.fasta").write_bytes(content if isinstance(content, bytes) else content.encode())
        return sequences.read_fasta("many.fasta", **options)

    return of


def pairs_of(content: str, **options: object) -> list[sequences.PairRecord]:
    Path("p.tsv").write_bytes(content.encode())
    return sequences.read_pairs("p.tsv", **options)


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_packed_files_and_line_ends_of_any_system_are_read(read, pack, mark, end):
    text = end.join([">a b", "MK", "", "V*", ">c", "w", ""])
    assert read(pack(mark + text.encode())) == [Record("a", "b", "MKV"), Record("c", "", "W")]


def test_damaged_and_unreadable_packing_is_named(read):
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        with pytest.raises(ValueError, match=r"many\.fasta cannot be unpacked .*truncated or corrupt"):
            read(pack(b">a\n" + bytes(range(65, 90)) * 400)[:-9])
    with pytest.raises(ValueError, match=r"many\.fasta is a zip archive; unpack it"):
        read(b"PK\x03\x04abc")
    with pytest.raises(ValueError, match="UTF-16"):
        read(">a\nMKV".encode("utf-16"))


@pytest.mark.parametrize("space", ["\t", "\xa0", "\x0b", "\x1b", "\u2028", "  "])
def test_an_id_ends_at_any_white_space(read, space):
    (record,) = read(f">hb1{space}alpha\tchain\x0bOrganism A{space}\nMKV\n")
    assert record == Record("hb1", "alpha chain Organism A", "MKV")


@pytest.mark.parametrize("kind", ["P1", "F1", "XX"])
def test_pir_is_read(read, kind):
    text = f">{kind};HBA\nHemoglobin\talpha\nMVLSPADK\nTNVK AAW*\nC;Species: man\n\n>{kind};HBB\n\nMVH*\n"
    assert read(text) == [Record("HBA", "Hemoglobin alpha", "MVLSPADKTNVKAAW"), Record("HBB", "", "MVH")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">DL;x\ngene\nACGT*\n", r"record 1: '>DL;' begins nucleotides in PIR"),
        (">RL;x\nrna\nACGU*\n", r"record 1: '>RL;' begins nucleotides in PIR"),
        (">P1;x\nMVLSPADK\n", r"record 1: a record that begins with '>P1;' is PIR"),
        (">P1;x\n\nMV*LS*\nPADK*\n", r"record 1: residues follow the '\*'"),
        (">P1;x\nstructureX:1abc\nMV/LS*\n", r"record 1 \(x\), position 3: '/' is no residue; give each chain"),
    ],
)
def test_pir_that_cannot_be_aligned_is_named(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# STOCKHOLM 1.0\na MKV\n//\n", "a Stockholm alignment"),
        ("CLUSTAL W (1.83)\n\na MKV\n", "a Clustal alignment"),
        ("MUSCLE (3.8) multiple sequence alignment\n\na MKV\n", "a Clustal alignment"),
        ("#NEXUS\nbegin data;\n", "a NEXUS file"),
        ("PileUp\n\n MSF: 3\n", "a GCG alignment"),
        (" 2 30\na MKV\n", "a PHYLIP alignment"),
        ("LOCUS       NP_000549 142 aa\n", "a GenBank file"),
        ("ID   HBA_HUMAN   Reviewed;   142 AA.\n", "an EMBL or UniProt flat file"),
        ("HEADER    OXYGEN TRANSPORT\n", "a PDB file"),
        ("ATOM      1  N   VAL A   1\n", "a PDB file"),
        ("data_1ABC\n#\n", "an mmCIF file"),
        ("@SEQ_ID\nGATTTGGG\n+\n!''*((((\n", "FASTQ, reads of nucleotides; translate"),
        ("@HD\tVN:1.6\n", "a SAM file"),
        ('{"a": 1}\n', "JSON"),
        ("\n<!doctype html>\n<html>\n", "HTML; download"),
        ("##gff-version 3\n", "a GFF table"),
        ("HMMER3/f [3.3]\n", "a profile HMM"),
        ("%PDF-1.4\n", "a PDF document"),
        ("; a comment\n>a\nMKV\n", "a comment; remove the lines"),
        ("a\tMKV\tMKL\n", "a table with tabs; give it as --pairs"),
        ("a\tb\tc\td\n", "a table with tabs; give"),
        ("a,MKV,MKL\n", "a table with commas; give"),
        ("MKVL\nMKVA\n", "a sequence without a header; put a line '>id'"),
        ("Dear reader:\n", "no FASTA file"),
    ],
)
def test_other_formats_are_named(read, text, told):
    with pytest.raises(ValueError, match=r"many\.fasta begins with '.*', not with '>': it is ") as error:
        read(text)
    assert told in str(error.value) and ";" in str(error.value), "what it is, and what to do"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nMKV\n>a\nMKV\n", r"record 2 \(a\): this id has occurred before"),
        (">a\nMKV\n>b\n\n>c\nM\n", r"record 2 \(b\): the sequence is empty"),
        (">a\n*\n", r"record 1 \(a\): the sequence is empty"),
        (">a\nMKV 3\nLPA 6\n", r"record 1 \(a\), position 4: '3' is no residue; remove the numbers"),
        (">a\nMKV>b\nMKV\n", r"record 1 \(a\), position 4: '>' is no residue; a header must begin its line"),
        (">a\nMK\u00dfV\n", r"record 1 \(a\), position 3: '\u00df' is no residue"),
        (">a\nMK\ufb01V\n", r"record 1 \(a\), position 3: '\ufb01' is no residue"),
        (">a\nMKV\n>b\nM\0K\n", "is not text"),
        (">a\n" + "M" * 101, r"record 1 \(a\): 101 residues were given, allowed are at most 100"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(read, text, message, monkeypatch):
    monkeypatch.setattr(sequences, "MAX_LENGTH", 100)
    with pytest.raises(ValueError, match=rf"many\.fasta(, | ){message}"):
        read(text)


def test_bad_records_are_left_out_on_demand(read, monkeypatch):
    monkeypatch.setattr(sequences, "MAX_LENGTH", 100)
    bad: list[ValueError] = []
    text = f">a\nMKV\n>b\nMK1\n>c\n\n>a\nM\n>long\n{'M' * 101}\n>d\nW*\n"
    assert [record.id for record in read(text, on_bad=bad.append)] == ["a", "d"]
    assert [str(error).split(":")[0] for error in bad] == [
        "many.fasta, record 2 (b), position 3",
        "many.fasta, record 3 (c)",
        "many.fasta, record 4 (a)",
        "many.fasta, record 5 (long)",
    ]
    with pytest.raises(ValueError, match=r"many\.fasta: none of its records can be read"):
        read(">a\n1\n", on_bad=bad.append)


def test_what_is_odd_is_warned_of_once_a_file_and_kind(read):
    text = ">a\nMK*V~L\n>b\nM_K.V-L\n>c\nMKVL*\n>\nM*\n> d\nMK*VL\n>e\nM**K\n"
    records: list[Record] = []
    found = warned(lambda: records.extend(read(text)))
    assert [record.residues for record in records] == ["MKXVL", "MKVL", "MKVL", "M", "MKXVL", "MXXK"]
    assert sorted(found) == [
        "many.fasta: '*' is read as X in 3 sequences, first in record 1 (a), position 3",
        "many.fasta: gaps ('-', '.', '_', '~') are left out in 2 sequences, first in record 1 (a)",
        "many.fasta: ids are missing, and made of file and number, in 2 sequences, first in record 4: many_4",
    ]


def test_records_without_an_id_are_named_by_file_and_number(read):
    records = read(">many_2\nMKV\n>\nMKL\n> some text\nMKA\n")
    assert [record[:2] for record in records] == [("many_2", ""), ("many_2_2", ""), ("many_3", "some text")]


def test_nucleotides_are_refused_if_the_whole_file_looks_so(read):
    with pytest.raises(ValueError, match=r"many\.fasta holds DNA, it seems, .*: translate it"):
        read(b">a\n" + DNA + b"\n>b\n" + DNA.lower() + b"NNN\n")
    with pytest.raises(ValueError, match=r"many\.fasta holds RNA"):
        read(b">a\n" + DNA.replace(b"T", b"U"))
    with pytest.raises(ValueError, match="DNA"):
        read(b"".join(b">%d\nGATTACA\n" % n for n in range(9)))
    for proteins in (b">polyA\n" + b"A" * 40, b">silk\n" + b"GAGAGT" * 9, b">peptide\nGATTACA\n"):
        assert len(read(proteins)) == 1
    (told,) = warned(lambda: read(b">dna\n" + DNA + b"\n>p\n" + PROTEIN.encode()))
    assert "what looks like nucleotides is aligned as a protein in 1 sequence, record 1 (dna)" in told
    with pytest.raises(ValueError, match=r"p\.tsv holds DNA"):
        pairs_of(f"a\t{DNA.decode()}\t{DNA.decode()}\n")


@pytest.mark.parametrize(
    "header",
    ["", "id\tx\ty\n", "ID\tX\tY\r\n", "name\tseq1\tseq2\n", "pair_id\tquery\tTarget\n", '"id"\t"seqX"\t"seqY"\n'],
)
def test_a_line_of_column_names_is_no_pair(read, header):
    (pair,) = pairs_of(f"{header}# c\n\na\tMKV\tMKL\n")
    assert pair == ("a", Record("a/x", "", "MKV"), Record("a/y", "", "MKL"))
    assert pairs_of("name\tMKV\tMKL\n")[0].id == "name", "sequences are no names of columns"


def test_tables_of_spreadsheets_are_read(read):
    text = '"my pair"\t"MKV"\t\'MKL\'\r\n\tMK\tM*\r\n'
    one, other = pairs_of(text)
    assert (one.id, one.x.id, one.x.residues, one.y.residues) == ("my pair", "my_pair/x", "MKV", "MKL")
    assert (other.id, other.y.residues) == ("p_2", "M")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tMKV\n", r"line 1: 2 columns; there must be 3 with tabs between: id, x, y"),
        ("a,MKV,MKL\n", r"line 1: 1 column, with commas in place of tabs"),
        ("a;MKV;MKL\n", r"line 1: 1 column, with semicolons in place of tabs"),
        ("a MKV MKL\n", r"line 1: 1 column, with spaces in place of tabs"),
        (">a\nMKV\n", r"is a FASTA file, not a table of pairs: give it without --pairs"),
        ("# STOCKHOLM 1.0\na MKV\n", r"is a Stockholm alignment, not a table of pairs"),
        ("<html>\n", r"is HTML, not a table"),
        ("a\tMKV\tM?V\n", r"line 1 \(a\), y, position 2: '\?' is no residue"),
        ("id\tx\ty\n", r"holds no pair"),
        ("", r"holds no pair"),
        ("a\tM\t" + "M" * 101, r"line 1 \(a\), y: 101 residues"),
    ],
)
def test_tables_that_cannot_be_read_are_named(read, text, message, monkeypatch):
    monkeypatch.setattr(sequences, "MAX_LENGTH", 100)
    with pytest.raises(ValueError, match=rf"p\.tsv(, | ){message}"):
        pairs_of(text)


def test_bad_pairs_are_left_out_on_demand(read):
    bad: list[ValueError] = []
    assert [pair.id for pair in pairs_of("a\tMKV\tMK1\nb\tM\tK\nc\tM\n", on_bad=bad.append)] == ["b"]
    assert len(bad) == 2
    with pytest.raises(ValueError, match="holds no pair"):
        pairs_of("a\tMKV\tMK1\n", on_bad=bad.append)


def test_a_table_may_name_sequences_by_their_ids(read):
    records = read(">a\nMKV\n>b\nMKL\n>x\nMKA\n")
    Path("ids.tsv").write_text("query\ttarget\n# c\na\tb\nx\ta\n")
    one, other = sequences.read_pairs_of_ids("ids.tsv", records, records)
    assert (one.id, one.x, one.y, other.id) == ("a:b", records[0], records[1], "x:a")
    Path("ids.tsv").write_text("x\tb\n")
    assert next(iter(sequences.read_pairs_of_ids("ids.tsv", records, records))).x.residues == "MKA", (
        "ids are no names of columns"
    )
    Path("ids.tsv").write_text("a\tb\na\tnobody\n")
    with pytest.raises(ValueError, match=r"ids\.tsv, line 2: no sequence has the id 'nobody'"):
        sequences.read_pairs_of_ids("ids.tsv", records, records)
    bad: list[ValueError] = []
    assert len(sequences.read_pairs_of_ids("ids.tsv", records, records, bad.append)) == len(bad) == 1
    Path("ids.tsv").write_text("p\tMKV\tMKL\n")
    with pytest.raises(ValueError, match=r"line 1: 3 columns; there must be 2 with tabs between: id of x, id of y"):
        sequences.read_pairs_of_ids("ids.tsv", records, records)
