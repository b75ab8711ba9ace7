"""Read protein sequences from FASTA files, and pairs of sequences from tables.

Residues may be in either case (soft masking has no effect) and are returned in upper case. White space and a stop, `*`
at the end, are dropped; the gaps `-` and `.` are dropped with a warning. B, J, O, U, X and Z are kept and are aligned
as "any residue". Any other symbol is an error that names its place.
"""

import codecs
import contextlib
import gzip
import io
import sys
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

from Bio.SeqIO.FastaIO import SimpleFastaParser

from data import vocab

STANDARD_INPUT = "-"
MAX_BYTES = 1 << 30  # in a file, unpacked; Swiss-Prot has 0.3 GB
_GZIP = b"\x1f\x8b"
_ALLOWED = frozenset(vocab.RESIDUES + vocab.AMBIGUOUS + "-.")
_NUCLEOTIDES = "ACGTUN"
_SUSPICIOUS = 20  # residues; shorter peptides may be made of A, C, G and T


class Record(NamedTuple):
    """One sequence."""

    id: str  # the first word of the header
    description: str  # the rest of it
    residues: str  # upper case, no gaps


class PairRecord(NamedTuple):
    """Two sequences to align."""

    id: str
    x: Record
    y: Record


def read_fasta(path: str) -> list[Record]:
    """Read all records of a FASTA file, plain or gzip, or of standard input ("-").

    Raises OSError if it cannot be read, and ValueError, with file, record and position, if it is no FASTA file of
    proteins, a record is empty or an id occurs twice.
    """
    name, text = _name(path), _read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise ValueError(f"{name} is empty; a FASTA file begins with '>'")
    if not first.startswith(">"):
        raise ValueError(f"{name} begins with {first[:20]!r}, not with '>': it is no FASTA file")
    records: dict[str, Record] = {}
    for n, (header, sequence) in enumerate(SimpleFastaParser(io.StringIO(text, newline=None)), start=1):
        identifier, _, description = header.strip().partition(" ")
        where = f"{name}, record {n} ({identifier or 'without an id'})"
        if not identifier:
            raise ValueError(f"{where}: '>' must be followed by an id")
        if identifier in records:
            raise ValueError(f"{where}: this id has occurred before; give each sequence its own")
        records[identifier] = Record(identifier, description.strip(), _residues(sequence, where))
    return list(records.values())


def read_pairs(path: str) -> list[PairRecord]:
    """Read lines `id <tab> x <tab> y`, where x and y are sequences; plain, gzip or standard input ("-").

    Empty lines, lines that begin with '#' and a first line `id x y` are skipped. An id may occur more than once. Raises
    as `read_fasta` does.
    """
    name, pairs = _name(path), []
    for n, line in enumerate(_read_text(path).splitlines(), start=1):
        fields = [field.strip() for field in line.split("\t")]
        if not line.strip() or line.startswith("#") or (n == 1 and [f.lower() for f in fields] == ["id", "x", "y"]):
            continue
        if len(fields) != 3:
            raise ValueError(f"{name}, line {n}: {len(fields)} columns; there must be 3 with tabs between: id, x, y")
        identifier, x, y = fields
        x, y = (_residues(s, f"{name}, line {n} ({identifier}), {side}") for s, side in ((x, "x"), (y, "y")))
        pairs.append(PairRecord(identifier, Record(f"{identifier}/x", "", x), Record(f"{identifier}/y", "", y)))
    if not pairs:
        raise ValueError(f"{name} holds no pair; each line must be id, x, y with tabs between")
    return pairs


def _name(path: str) -> str:
    return "standard input" if path == STANDARD_INPUT else path


def _read_text(path: str) -> str:
    with contextlib.nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else Path(path).open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if data[:2] == _GZIP:
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{_name(path)} begins as gzip does and cannot be unpacked: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{_name(path)} has more than {MAX_BYTES} bytes (unpacked): cut it into parts")
    if b"\0" in data:
        raise ValueError(f"{_name(path)} is not text (it holds a zero byte); give plain text or gzip")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        warnings.warn(f"{_name(path)} is not UTF-8 (byte {error.start}); read as Latin-1", stacklevel=2)
        return data.decode("latin-1")


def _residues(sequence: str, where: str) -> str:
    residues = "".join(sequence.split()).upper().removesuffix("*")
    ungapped = residues.replace("-", "").replace(".", "")
    if len(ungapped) < len(residues):
        warnings.warn(f"{where}: {len(residues) - len(ungapped)} gaps ('-', '.') are left out", stacklevel=3)
    if not _ALLOWED.issuperset(residues):
        bad = next(n for n, letter in enumerate(residues) if letter not in _ALLOWED)
        stop = "; '*' may only be the last symbol" if residues[bad] == "*" else ""
        raise ValueError(
            f"{where}, position {bad + 1}: {residues[bad]!r} is no residue{stop}; allowed are the letters "
            f"{vocab.RESIDUES}{vocab.AMBIGUOUS} in either case"
        )
    if not ungapped:
        raise ValueError(f"{where}: the sequence is empty")
    if len(ungapped) >= _SUSPICIOUS and sum(map(ungapped.count, _NUCLEOTIDES)) > 0.95 * len(ungapped):
        warnings.warn(f"{where}: looks like nucleotides; it is aligned as a protein all the same", stacklevel=3)
    return ungapped
