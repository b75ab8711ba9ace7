"""data/stockholm.py: real files lose nothing, memory holds one family, errors name file, line and family."""

import gzip
import io
import itertools
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.stockholm import Alignment, StockholmError, read
from tests.support.stockholm_text import written

SHARED = Path(__file__).parents[2] / "shared"
REAL = {
    "pfam/seeds_deep_192.sto.gz": (192, 41_160),
    "pfam/pairs_1000.sto.gz": (1_000, 2_000),
    "pfam/pairs_conserved_5043.sto.gz": (5_043, 10_086),
    "homstrad/homstrad.sto.gz": (380, 2_106),
}
GOOD = b"# STOCKHOLM 1.0\n#=GF AC PF%05d.1\na/1-4 AC-d\nb/1-4 A.GD\n//\n"


def real(name: str) -> Path:
    if not (SHARED / name).is_file():
        pytest.skip(f"needs ../shared/{name}")
    return SHARED / name


def parse(data: bytes, **limits) -> list[Alignment]:
    return list(read(io.BytesIO(data), **limits))


def text(row: np.ndarray) -> str:
    return row.tobytes().decode("ascii")


def content(alignment: Alignment) -> tuple:
    a = alignment
    return a.ids, [text(row) for row in a.rows], a.gf, a.gs, a.gc, a.gr, a.comments


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if "5043" in x else ()) for x in REAL])
def test_real_files_lose_nothing(name):
    path = real(name)
    alignments = list(read(path))
    assert (len(alignments), sum(len(a.ids) for a in alignments)) == REAL[name]

    # Against the raw bytes: every free-text annotation word for word, every aligned character counted by kind of line.
    annotations, characters = Counter(), Counter()
    for line in gzip.decompress(path.read_bytes()).split(b"\n"):
        fields = line.decode("latin-1").split()
        if line.startswith((b"#=GF", b"#=GS")):
            annotations[" ".join(fields)] += 1
        elif fields and not line.startswith((b"# ", b"//")):
            characters[fields[0] if line.startswith(b"#") else "row"] += len(fields[-1])
    assert annotations == Counter(
        " ".join(" ".join((tag, *item)).split())
        for a in alignments
        for tag, items in (("#=GF", a.gf), ("#=GS", a.gs))
        for item in items
    )
    assert characters["row"] == sum(a.rows.size for a in alignments)
    assert characters["#=GC"] == sum(len(value) for a in alignments for value in a.gc.values())
    assert characters["#=GR"] == sum(len(value) for a in alignments for value in a.gr.values())

    for once, again in zip(alignments, parse(b"".join(map(written, alignments))), strict=True):
        assert content(once) == content(again)


@pytest.mark.parametrize("name", ["pfam/seeds_deep_192.sto.gz", "pfam/pairs_1000.sto.gz"])
def test_rows_equal_those_of_biopython(name):
    align_io = pytest.importorskip("Bio.AlignIO")
    with gzip.open(real(name), "rt", encoding="latin-1") as handle:
        for ours, theirs in zip(read(SHARED / name), align_io.parse(handle, "stockholm"), strict=True):
            assert ours.ids == tuple(record.id for record in theirs)
            assert [text(row) for row in ours.rows] == [str(record.seq) for record in theirs]


def test_every_feature_of_the_format():
    data = (
        "# STOCKHOLM 1.0\n# made by hand\n#=GF ID X\n#=GF AU Riaño-Pachón D\n#=GF CC  two  spaces\n#=GF CC\n"
        "#=GS a/1-6 DR PDB; 1xyz A; 1-6;\n\n"
        "a/1-6  ACd.-E\n#=GR a/1-6 SS HHXX.C\nbb     acDEFG\n#=GC SS_cons HH..CC\n\n"
        "bb     AC\na/1-6  D-\n#=GR a/1-6 SS CC\n#=GC SS_cons HH\n//\n\n"
    ).encode("latin-1")
    for variant in (data, data.replace(b"\n", b"\r\n")):
        (alignment,) = parse(variant)
        assert alignment.ids == ("a/1-6", "bb")
        assert [text(row) for row in alignment.rows] == ["ACd.-ED-", "acDEFGAC"]
        assert alignment.gf == (("ID", "X"), ("AU", "Riaño-Pachón D"), ("CC", "two  spaces"), ("CC", ""))
        assert alignment.gs == (("a/1-6", "DR", "PDB; 1xyz A; 1-6;"),)
        assert alignment.gc == {"SS_cons": "HH..CCHH"}
        assert alignment.gr == {("a/1-6", "SS"): "HHXX.CCC"}
        assert alignment.comments == ("# made by hand",)
        assert alignment.line == 1
        assert (alignment.feature("ID"), alignment.feature("AC")) == ("X", None)


def test_plain_and_gzip_files(tmp_path):
    (tmp_path / "plain").write_bytes(GOOD % 1 + GOOD % 2)
    (tmp_path / "zipped").write_bytes(
        gzip.compress(GOOD % 1) + gzip.compress(GOOD % 2)
    )  # two gzip members, as bgzip writes
    plain, zipped = (list(map(content, read(tmp_path / name))) for name in ("plain", "zipped"))
    assert len(plain) == 2
    assert plain == zipped
    assert parse(b"") == parse(b"\n \n") == []


HEADER = b"# STOCKHOLM 1.0\n#=GF AC PF00007.3\n"
MALFORMED = {  # name: (the family, line within it, what the message must say)
    "length": (HEADER + b"a ACDE\nb ACD\nc ACDE\n//\n", 4, "row b has 3 columns, the first row 4"),
    "wrapped length": (HEADER + b"a AC\nb AC\n\na DE\n//\n", 4, "row b has 2 columns, the first row 4"),
    "GC length": (HEADER + b"a ACDE\n#=GC RF xx\n//\n", 4, "#=GC RF has 2 columns"),
    "GR length": (HEADER + b"a ACDE\n#=GR a SS HHHHH\n//\n", 4, "#=GR a SS has 5 columns"),
    "GR of no row": (HEADER + b"a ACDE\n#=GR b SS HHHH\n//\n", 4, "'b', which is no row"),
    "GS of no row": (HEADER + b"#=GS b AC Q1\na ACDE\n//\n", 3, "'b', which is no row"),
    "symbol *": (HEADER + b"a ACDE\nb AC*E\n//\n", 4, "unknown symbol '*' in row 'b'"),
    "symbol ?": (
        HEADER + b"a AC?E\n//\n",
        3,
        "unknown symbol '?' in row 'a'; letters and the gaps '-', '.', '_' and '~'",
    ),
    "old Mac": (HEADER + b"#=GF ID x\ra ACDE\n//\n", 3, "lines of old Macs end so"),
    "zero byte": (HEADER + b"#=GF ID x\0\na ACDE\n//\n", 3, "a line holds a zero byte"),
    "digit": (HEADER + b"a AC1E\n//\n", 3, "unknown symbol '1'"),
    "Latin-1 residue": (HEADER + b"a AC\xf1E\n//\n", 3, "unknown symbol 'ñ'"),
    "duplicate": (HEADER + b"a ACDE\nb ACDE\na ACDE\n//\n", 5, "duplicate row 'a'"),
    "empty": (HEADER + b"#=GC RF xx\n//\n", 4, "no rows"),
    "three fields": (HEADER + b"a AC DE\n//\n", 3, "found 3 fields"),
    "one field": (HEADER + b"ACDE\n//\n", 3, "found 1 fields"),
    "annotation": (HEADER + b"#=GR a\na ACDE\n//\n", 3, "annotation with 1"),
    "no //": (HEADER + b"a ACDE\n", 4, "before the `//`"),
    "long line": (HEADER + b"a " + b"A" * 5_000 + b"\nb AA\n//\n", 3, "max_row_bytes=4096"),
    "long wrapped row": (HEADER + (b"a " + b"A" * 4_000 + b"\n\n") * 2 + b"//\n", 7, "max_row_bytes=4096"),
    "big family": (
        HEADER + b"".join(b"%d %s\n" % (i, b"A" * 4_000) for i in range(5)) + b"//\n",
        7,
        "max_family_bytes=16384",
    ),
}
LIMITS = {"max_row_bytes": 4096, "max_family_bytes": 16384}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_family_is_named_and_can_be_skipped(name, tmp_path):
    bad, line, message = MALFORMED[name]
    path = tmp_path / "in.sto"
    path.write_bytes(GOOD % 1 + bad + GOOD % 2)

    reader = read(path, **LIMITS)
    assert next(reader).feature("AC") == "PF00001.1"
    with pytest.raises(StockholmError) as caught:
        next(reader)
    error = caught.value
    assert (error.path, error.line - 5, error.family) == (str(path), line, "PF00007.3")
    assert message in str(error)
    assert str(error).startswith(f"{path}, line {line + 5}, family PF00007.3: ")

    skipped = []
    kept = [a.feature("AC") for a in read(path, **LIMITS, on_bad=skipped.append)]
    assert kept == ["PF00001.1", "PF00002.1"]
    assert [str(e) for e in skipped] == [str(error)]


def test_missing_header_end_of_file_and_unnamed_family():
    with pytest.raises(
        StockholmError, match=r"line 1, family number 1 of the file: expected the header '# STOCKHOLM 1.0'"
    ):
        parse(b">a\nACDE\n")
    with pytest.raises(StockholmError, match=r"line 8, family PF00002.1: the file ends before the `//`"):
        parse(GOOD % 1 + (GOOD % 2).removesuffix(b"b/1-4 A.GD\n//\n"))
    skipped = []
    assert len(parse(b"junk\n//\n" + GOOD % 1 + b"more junk\n" + GOOD % 2, on_bad=skipped.append)) == 2
    assert [(e.line, e.family) for e in skipped] == [(1, "number 1 of the file"), (8, "number 3 of the file")]


def test_truncated_gzip_is_named_and_ends_the_reading(tmp_path):
    whole = gzip.compress(b"".join(GOOD % i for i in range(2_000)))
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StockholmError, match="truncated or corrupt") as caught:
        list(read(tmp_path / "cut"))
    assert caught.value.line > 1
    skipped = []
    kept = list(read(tmp_path / "cut", on_bad=skipped.append))
    assert 0 < len(kept) < 2_000
    assert [e.line for e in skipped] == [caught.value.line]


def test_wrong_gzip_checksum_is_never_skipped(tmp_path):
    damaged = bytearray(gzip.compress(b"".join(GOOD % i for i in range(100))))
    damaged[-8] ^= 0xFF
    (tmp_path / "damaged").write_bytes(damaged)
    for on_bad in (None, [].append):
        with pytest.raises(StockholmError, match="truncated or corrupt"):
            list(read(tmp_path / "damaged", on_bad=on_bad))


def test_errors_survive_a_worker_process():
    error = pickle.loads(pickle.dumps(StockholmError("f", 3, "PF1", "reason")))
    assert (error.path, error.line, error.family, str(error)) == ("f", 3, "PF1", "f, line 3, family PF1: reason")


def test_memory_is_bounded_by_one_family(tmp_path):
    rows = b"".join(b"row%04d %s\n" % (i, b"ACDEFGHIKL" * 100) for i in range(200))
    family = b"# STOCKHOLM 1.0\n#=GF AC PF1\n" + rows + b"//\n"
    with (tmp_path / "big.sto").open("wb") as handle:
        handle.writelines(itertools.repeat(family, 60))
    tracemalloc.start()
    try:
        count = sum(1 for _ in read(tmp_path / "big.sto"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 60
    assert peak < 6 * len(family)  # its lines, the joined rows, the matrix, and the alignment handed out before
