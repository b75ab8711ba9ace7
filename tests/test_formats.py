"""Tables of pairs: each column by hand, and what BLAST's statistics say of the same alignment."""

import math
import re

import numpy as np
import pytest

from alignment import formats, tables
from alignment.columns import Aligned
from alignment.sequences import Record

X = Record("q", "a query", "MKVLAAGWC")
Y = Record("s", "", "GGMKLLAGWCPP")


def aligned(pairs: list[tuple[int, int]]) -> Aligned:
    """MKVLAAGWC and GGMKLLAGWCPP with these pairs of residues aligned."""
    confidence = np.linspace(0.5, 1, len(pairs))
    return Aligned(
        "q:s", X, Y, np.array(pairs, np.int32).reshape(-1, 2), confidence, 0.98761, np.ones(9), np.ones(12), 12.5
    )


# --MKVLAAGWC--
# GGMKLLA-GWCPP
SOME = aligned([(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (6, 7), (7, 8), (8, 9)])
NONE = aligned([])
BY_HAND = {
    "id": "q:s",
    "x": "q",
    "y": "s",
    "x_start": "1",
    "x_end": "9",
    "y_start": "3",
    "y_end": "10",
    "x_length": "9",
    "y_length": "12",
    "length": "9",
    "aligned": "8",
    "identity": "0.8750",  # 7 of 8; V and L score 1
    "positives": "1.0000",
    "gaps": "1",
    "x_coverage": "0.8889",
    "y_coverage": "0.6667",
    "score": "10",  # 5+5+1+4+4+6+11+9 = 45, less 11 for the gap inside, 12 for each end
    "confidence": "0.7500",
    "probability": "0.9876",
    "log_odds": "12.50",
    "cigar": "2D5M1I3M2D",
    "qseqid": "q",
    "sseqid": "s",
    "pident": "77.778",
    "mismatch": "1",
    "gapopen": "1",
    "qstart": "1",
    "qend": "9",
    "sstart": "3",
    "send": "10",
}


def rows(form: str, *alignments: Aligned) -> list[list[str]]:
    writer = formats.Writer(form)
    text = "".join([writer.begin(X), *map(writer.text, alignments)])
    return [line.split("\t") for line in text.splitlines()]


def test_every_column_by_hand():
    head, row = rows(f"tsv:{','.join(BY_HAND)}", SOME)
    assert dict(zip(head, row, strict=True)) == BY_HAND
    assert set(tables.COLUMNS) - set(BY_HAND) == {"evalue", "bitscore"}


def test_scores_of_blast():
    """Bits and expectation by the formulas of Karlin and Altschul, for 45 less 12 for the gap."""
    bits = (0.267 * (45 - 12) - math.log(0.041)) / math.log(2)
    (row,) = rows("tsv:blast12", SOME)
    assert row == ["q", "s", "77.778", "9", "1", "1", "1", "9", "3", "10", f"{9 * 12 / 2**bits:.2e}", f"{bits:.1f}"]
    head, same = rows("tsv:id,blast12", SOME)
    assert head[:3] == ["id", "qseqid", "sseqid"] and same[1:] == row


def test_a_pair_without_aligned_residues_has_zeros():
    _, row = rows("tsv:x_start,y_end,length,aligned,identity,confidence,cigar,pident,evalue,bitscore", NONE)
    assert row == ["0", "0", "0", "0", "0.0000", "0.0000", "9I12D", "0.000", "1.08e+02", "0.0"]


def test_hopeless_alignments_have_a_number_too():
    far = Record("w", "", "W" * 3000)
    pairs = np.arange(3000)[:, None].repeat(2, 1)
    of = Aligned("", far, far._replace(residues="P" * 3000), pairs, np.ones(3000), 0.5, *[np.ones(3000)] * 2)
    _, (expected, bits) = rows("tsv:evalue,bitscore", of)
    assert float(bits) < -4000 and float(expected) > 1e300


def test_a_cigar_tells_the_alignment():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = rng.integers(0, 10)
        pairs = list(zip(*(sorted(rng.choice(n, count, replace=False)) for n in (9, 12)), strict=True))
        _, (cigar,) = rows("tsv:cigar", aligned(pairs))
        i = j = 0
        found = []
        for length, kind in re.findall(r"(\d+)([MID])", cigar):
            for _ in range(int(length)):
                found += [(i, j)] if kind == "M" else []
                i, j = i + (kind != "D"), j + (kind != "I")
        assert (found, i, j) == (pairs, 9, 12)


@pytest.mark.parametrize("form", ["tsv:", "tsv:id,,x", "tsv:id,Identity", "tsv:id, x", "blast12", "TSV", ""])
def test_formats_that_do_not_exist_are_refused(form):
    with pytest.raises(ValueError, match=r"allowed are (blast12, id, x|text, stockholm)"):
        formats.check_format(form)


def test_formats_that_exist_are_taken():
    for form in (*formats.FORMATS, "tsv:blast12", "tsv:cigar", f"tsv:{','.join(tables.COLUMNS)}"):
        formats.check_format(form)
    assert {formats.suffix(form) for form in (*formats.FORMATS, "tsv:id")} == {
        ".txt",
        ".sto",
        ".a3m",
        ".fasta",
        ".aln",
        ".tsv",
        ".jsonl",
    }
