"""Name the format of a file by its first line, to tell a user whose file is of another format than asked for."""

import re
from typing import Literal, NamedTuple

Kind = Literal["alignment", "entry", "reads", "page", "profile", "table", "shards", "other"]


class Format(NamedTuple):
    """Format of a file; each reader has advice of its own for each kind."""

    name: str
    kind: Kind


_FORMATS: list[tuple[str, str, Kind]] = [  # the first pattern that a line begins with counts
    (r"(?i:#\s*STOCKHOLM)", "a Stockholm alignment", "alignment"),
    (r"#=G[FSCR]\s", "a Stockholm alignment without its header", "alignment"),
    (r">[A-Z][A-Z0-9];", "PIR (NBRF)", "alignment"),
    (r">", "FASTA, aligned FASTA, A2M or A3M", "alignment"),
    (r"(CLUSTAL|MUSCLE|PROBCONS|T-COFFEE|MSAPROBS)\b", "a Clustal alignment", "alignment"),
    (r"(PileUp|!!AA|!!NA|MSF:)|.*\bMSF:", "a GCG alignment (MSF)", "alignment"),
    (r"#NEXUS", "a NEXUS file", "alignment"),
    (r"\s*\d+\s+\d+(\s+\w)?\s*$", "a PHYLIP alignment", "alignment"),
    (r"HMMER\d|HHsearch|HMM\b", "a profile HMM", "profile"),
    (r"(?i:\s*<(!DOCTYPE html|html|head))", "HTML", "page"),
    (r"\s*<", "XML", "page"),
    (r"\s*[{\[]\s*($|[\"{\[\]}\d-])", "JSON", "entry"),
    (r"@(HD|SQ|RG|PG|CO)\t", "a SAM file", "reads"),
    (r"@", "FASTQ, reads of nucleotides", "reads"),
    (r"##gff", "a GFF table of features", "entry"),
    (r"LOCUS ", "a GenBank file", "entry"),
    (r"ID {3}", "an EMBL or UniProt flat file", "entry"),
    (r"(HEADER|ATOM|HETATM|REMARK|TITLE|MODEL|CRYST1|SEQRES|COMPND|OBSLTE|EXPDTA) ", "a PDB file", "entry"),
    (r"data_|loop_", "an mmCIF file", "entry"),
    (r"%PDF", "a PDF document", "entry"),
    (r"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "ArrayRecord, shards of a data set", "shards"),
    (r".*[\x00-\x08\x0e-\x1f]", "binary data", "other"),
    (r"[^\t]*\t", "a table with tabs", "table"),
    (r"[^,\s]+,[^,]*", "a table with commas", "table"),
]


def format_of(line: str) -> Format | None:
    """Return the format of which a line, bytes decoded as Latin-1, seems to be the first; None for any text."""
    found = (Format(name, kind) for pattern, name, kind in _FORMATS if re.match(pattern, line, re.DOTALL))
    return next(found, None)
