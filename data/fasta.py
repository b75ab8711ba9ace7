"""Read the records of FASTA files one after the other, plain or packed; never a whole file.

Biopython's SimpleFastaParser is not used: it neither bounds the memory of a record nor names what another file is.
alignment/sequences.py reads whole files, of PIR too, for alignments that a person waits for.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from data import vocab
from data.files import DAMAGED, display_name, open_unpacked
from data.other_formats import format_of

MAX_RECORD_BYTES = 1 << 26  # the longest known protein has 46,000 residues; a file that is no FASTA has no end
_DROPPED = vocab.GAPS + b" \t\v\f"
_STOP, _UNKNOWN = b"*", b"X"


class Record(NamedTuple):
    """One record, as it stands in the file."""

    number: int  # in the file, from 1
    name: str  # first word of the header, "" if there is none
    sequence: bytes  # all its lines, without their ends


def read(path: str) -> Iterator[Record]:
    """Yield the records of one file. Raises ValueError, with the file, if it is no FASTA file or is damaged."""
    name = display_name(path)
    header, parts, size, number = b"", list[bytes](), 0, 0
    for line in _lines(path):
        if line.startswith(b">"):
            if number:
                yield _record(number, header, parts)
            header, parts, size, number = line[1:], [], 0, number + 1
            continue
        if not number:
            if line.strip():
                raise ValueError(f"{name} {_told(line)}; give FASTA files of proteins")
            continue
        size += len(line)
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"{name}, record {number} has more than {MAX_RECORD_BYTES} bytes: is it a protein?")
        parts.append(line)
    if not number:
        raise ValueError(f"{name} holds no sequence: it is empty; give FASTA files of proteins")
    yield _record(number, header, parts)


def tokens_of(record: Record) -> UInt8[np.ndarray, " length"]:
    """Return the tokens of a record, either case. Gaps and final stops are dropped, other stops are unknown residues.

    Raises ValueError for a record without a name or a residue, for symbols that are no residues, and for nucleotides.
    """
    if not record.name:
        raise ValueError("its header has no name: write '>name'")
    residues = record.sequence.translate(None, _DROPPED).rstrip(_STOP).replace(_STOP, _UNKNOWN)
    tokens = vocab.encode(residues).astype(np.uint8)
    if not (tokens <= len(vocab.RESIDUES)).any():
        raise ValueError("it has no known residue")
    if vocab.seem_nucleotides(vocab.count_letters(np.frombuffer(residues, np.uint8))):
        raise ValueError("its residues are nucleotides (DNA or RNA), proteins are needed: translate or remove it")
    return tokens


def _lines(path: str) -> Iterator[bytes]:
    """Yield lines that end as on any system, without their ends; of a very long one its parts."""
    try:
        with open_unpacked(path) as file:
            while line := file.readline(MAX_RECORD_BYTES):
                if b"\0" in line:
                    raise ValueError(f"{display_name(path)} is not text (it holds a zero byte)")
                yield from line.splitlines() if b"\r" in line else (line.removesuffix(b"\n"),)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename:
            raise
        told = f"cannot be unpacked ({error}): it is truncated or corrupt, fetch it again"
        raise ValueError(f"{display_name(path)} {told}") from error


def _record(number: int, header: bytes, parts: list[bytes]) -> Record:
    name, *_ = [*header.decode("utf-8", "replace").split(maxsplit=1), ""]
    return Record(number, name, b"".join(parts))


def _told(line: bytes) -> str:
    text = line.decode("latin-1").strip()
    found = format_of(text)
    return f"begins with {text[:20]!r}, not with '>'" + (f": it seems to be {found.name}" if found else "")
