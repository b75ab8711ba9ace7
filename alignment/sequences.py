"""Read protein sequences from FASTA or PIR files, and pairs of sequences from tables.

Residues may be in either case (soft masking has no effect) and are returned in upper case. White space and stops, `*`,
at the end are dropped. The gaps `-`, `.`, `_` and `~` are dropped, and a stop inside becomes X, both with a warning. B,
J, O, U, X and Z are kept and are aligned as "any residue". Any other symbol is an error that names its place.
"""

import array
import dataclasses
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from data import files, vocab
from data.other_formats import format_of

MAX_BYTES = 1 << 30  # in a file, unpacked; Swiss-Prot has 0.3 GB
MAX_LENGTH = 1 << 24  # residues, a padded length; what float32 counts, and ot_attention.support.LONGEST_BANDED
_GAPS, _STOP, _UNKNOWN = vocab.GAPS.decode(), "*", "X"
_LETTERS = vocab.RESIDUES + vocab.AMBIGUOUS
_ALLOWED = frozenset(_LETTERS + _LETTERS.lower() + _GAPS + _STOP)
_WITHOUT_GAPS = str.maketrans("", "", _GAPS)
_HINTS = {
    **dict.fromkeys("0123456789", "; remove the numbers of lines"),
    ">": "; a header must begin its line",
    "/": "; give each chain a record of its own",
}
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")  # control characters too: they would reach the user's terminal

# https://salilab.org/modeller/10.5/manual/node501.html; P1 is a protein, F1 a fragment of one, XX of unknown kind.
_PIR = re.compile(r"(P1|F1|D1|DL|DC|RL|RC|N1|N3|XX);\s*")
_PIR_PROTEINS = ("P1", "F1", "XX")
_PIR_ANNOTATION = re.compile(r"\w{1,2};|\s*$")

_TO_FASTA = "write its sequences as FASTA"
_ADVICE = {  # where a file is of another format, by its kind
    "alignment": "write its sequences as FASTA (esl-reformat fasta FILE)",
    "page": "download the FASTA file itself",
    "reads": "translate its nucleotides to proteins",
    "table": "give it as --pairs if its columns are id, x, y with tabs between",
}
_OTHER_TEXT = {
    r"[;#!]": ("a comment", "remove the lines before the first '>'"),
    rf"[{_LETTERS}{_LETTERS.lower()}\-*.\s]+$": (
        "a sequence without a header",
        "put a line '>id' before each sequence",
    ),
}
# Names that people give to columns: "id", "pair name"; "x", "seq1", "first sequence", "protein_b".
_FIRST_COLUMN = re.compile(
    r"(?:(?:ids?|names?|pairs?|key|label|accession|identifier|number|nr|no)[\W_]*)+", re.IGNORECASE
)
_WORDS = (
    "(?:ids?|names?|seq(?:uence)?|query|target|ref(?:erence)?|subject|hit|template|protein|chain|first|second|left|right|"
    "one|two|residues)"
)
_FURTHER_COLUMN = re.compile(rf"(?:{_WORDS}[\W_\d]*)+[a-z]?|[a-z][\W_\d]*{_WORDS}?", re.IGNORECASE)
_SEPARATORS = {",": "commas", ";": "semicolons", "|": "bars", " ": "spaces"}

OnBad = Callable[[ValueError], object]
Row = TypeVar("Row")


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


@dataclasses.dataclass(frozen=True, eq=False)
class PairsOfIds:
    """Pairs of sequences by their places in lists of records: eight bytes each, until it is asked for."""

    xs: list[Record]
    ys: list[Record]
    places: Int[np.ndarray, "pairs 2"]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[PairRecord]:
        for i, j in self.places:
            yield pair_of(self.xs[i], self.ys[j])


def pair_of(x: Record, y: Record) -> PairRecord:
    """Return a pair that is named by the ids of its sequences."""
    return PairRecord(f"{x.id}:{y.id}", x, y)


def read_fasta(path: str, on_bad: OnBad | None = None) -> list[Record]:
    """Read all records of a FASTA or PIR file, plain or compressed, or of standard input ("-").

    A record without an id gets the name of the file and its number. `on_bad` is called with the error of every record
    that cannot be read, which is left out; by default the error is raised. Raises OSError if the file cannot be read,
    and ValueError, with file, record and position, if it is no FASTA file of proteins, a record is empty or longer than
    `MAX_LENGTH`, an id occurs twice, or no record is left.
    """
    name, text = files.display_name(path), _read_text(path)
    first = _first_line(text)
    if not first:
        raise ValueError(f"{name} is empty; a FASTA file begins with '>'")
    if not first.startswith(">"):
        raise ValueError(f"{name} begins with {first[:20]!r}, not with '>': it is {_told_format(first)}")
    notes, records = _Notes(name), dict[str, Record]()
    for n, (header, lines) in enumerate(_split(text), start=1):
        where = f"{name}, record {n}"
        try:
            identifier, description, sequence = _fields_of_record(header, lines, where)
            if not identifier:
                identifier = told_apart(_numbered(path, n), records)
                notes.add("ids are missing, and made of file and number,", f"record {n}: {identifier}")
            where = f"{where} ({identifier})"
            if identifier in records:
                raise ValueError(f"{where}: this id has occurred before; give each sequence its own")
            records[identifier] = Record(identifier, description, _residues(sequence, where, notes))
        except ValueError as error:
            _take(error, on_bad)
    if not records:
        raise ValueError(f"{name}: none of its records can be read")
    _check_proteins([record.residues for record in records.values()], name)
    notes.warn()
    return list(records.values())


def read_pairs(path: str, on_bad: OnBad | None = None) -> list[PairRecord]:
    """Read lines `id <tab> x <tab> y`, where x and y are sequences; plain, compressed or standard input ("-").

    Empty lines, lines that begin with '#' and a first line of column names are skipped. Fields may be quoted. An id may
    occur more than once; a pair without one gets the name of the file and its line. `on_bad` and errors are those of
    `read_fasta`.
    """
    name = files.display_name(path)
    notes = _Notes(name)

    def pair(n: int, fields: list[str]) -> PairRecord:
        identifier, *sides = fields
        identifier = _SPACE.sub(" ", identifier) or _numbered(path, n)
        x, y = (
            Record(
                f"{identifier.replace(' ', '_')}/{side}",
                "",
                _residues(s, f"{name}, line {n} ({identifier}), {side}", notes),
            )
            for side, s in zip("xy", sides, strict=True)
        )
        return PairRecord(identifier, x, y)

    pairs = list(_read_table(path, ("id", "x", "y"), pair, _names_columns, on_bad))
    _check_proteins([side.residues for pair in pairs for side in pair[1:]], name)
    notes.warn()
    return pairs


def read_pairs_of_ids(path: str, x: list[Record], y: list[Record], on_bad: OnBad | None = None) -> PairsOfIds:
    """Read lines `x_id <tab> y_id`, where the ids are of `x` and `y`, as `read_pairs` reads lines of sequences."""
    known = [{record.id: n for n, record in enumerate(of)} for of in (x, y)]

    def places(n: int, fields: list[str]) -> tuple[int, int]:
        for identifier, records in zip(fields, known, strict=True):
            if identifier not in records:
                raise ValueError(f"{files.display_name(path)}, line {n}: no sequence has the id {identifier!r}")
        return known[0][fields[0]], known[1][fields[1]]

    def is_header(fields: list[str]) -> bool:
        return _names_columns(["id", *fields]) and not (fields[0] in known[0] or fields[-1] in known[1])

    rows = _read_table(path, ("id of x", "id of y"), places, is_header, on_bad)
    found = array.array("i", itertools.chain.from_iterable(rows))
    return PairsOfIds(x, y, np.frombuffer(found, np.intc).reshape(-1, 2))


def told_apart(name: str, used: Collection[str], key: Callable[[str], str] = str) -> str:
    """Return a name whose key is not in use: the name itself, or with _2, _3 and so on at its end."""
    candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    return next(candidate for candidate in candidates if key(candidate) not in used)


class _Notes:
    """Count what is odd in a file, to warn once of each kind."""

    def __init__(self, file: str):
        self.file = file
        self.found: dict[str, tuple[int, str]] = {}  # number of sequences, place of the first

    def add(self, kind: str, where: str) -> None:
        number, first = self.found.get(kind, (0, where))
        self.found[kind] = number + 1, first.removeprefix(f"{self.file}, ")

    def warn(self) -> None:
        for kind, (number, first) in self.found.items():
            sequences = "1 sequence," if number == 1 else f"{number} sequences, first in"
            warnings.warn(f"{self.file}: {kind} in {sequences} {first}", stacklevel=3)


def _take(error: ValueError, on_bad: OnBad | None) -> None:
    if on_bad is None:
        raise error
    on_bad(error)


def _read_text(path: str) -> str:
    name = files.display_name(path)
    with files.open_unpacked(path) as file:
        try:
            data = file.read(MAX_BYTES + 1)
        except files.DAMAGED as error:
            raise ValueError(
                f"{name} cannot be unpacked ({error}): it is truncated or corrupt, fetch it again"
            ) from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES} bytes (unpacked): cut it into parts")
    if b"\0" in data:
        raise ValueError(
            f"{name} is not text (it holds a zero byte); give plain text, or text packed by gzip, bzip2 or xz"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        warnings.warn(f"{name} is not UTF-8 (byte {error.start}); read as Latin-1", stacklevel=3)
        return data.decode("latin-1")


def _lines(text: str) -> Iterator[str]:
    """Yield lines that end as on any system. str.splitlines would also cut at characters that headers may hold."""
    return (line.removesuffix("\n") for line in io.StringIO(text, newline=None))


def _first_line(text: str) -> str:
    return next((line for line in _lines(text) if line.strip()), "")


def _told_format(first: str) -> str:
    """Return what a file is that begins with this line, and what to do."""
    if found := format_of(first):
        return f"{found.name}; {_ADVICE.get(found.kind, _TO_FASTA)}"
    texts = (told for pattern, told in _OTHER_TEXT.items() if re.match(pattern, first))
    return "; ".join(next(texts, ("no FASTA file", _TO_FASTA)))


def _split(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the header of each record, without its '>', and its further lines."""
    header, lines = "", list[str]()
    found = False
    for line in _lines(text):
        if not line.startswith(">"):
            lines.append(line)
            continue
        if found:
            yield header, lines
        header, lines, found = line[1:], [], True
    yield header, lines


def _fields_of_record(header: str, lines: list[str], where: str) -> tuple[str, str, str]:
    """Return id, description and sequence of a record of FASTA or PIR."""
    if kind := _PIR.match(header):
        if kind[1] not in _PIR_PROTEINS:
            raise ValueError(f"{where}: '>{kind[1]};' begins nucleotides in PIR; translate them to proteins")
        # The description stands on a line of its own.
        header, lines = f"{header[kind.end() :]} {' '.join(lines[:1])}", _pir_sequence(lines[1:], where)
    identifier, _, description = _SPACE.sub(" ", header).partition(" ")
    return identifier, description.strip(), "".join(lines)


def _pir_sequence(lines: list[str], where: str) -> list[str]:
    """Return the lines of a sequence in PIR, which ends with '*'; lines of annotation may follow."""
    last = next((n for n, line in enumerate(lines) if _STOP in line), None)
    if last is None:
        raise ValueError(f"{where}: a record that begins with '>P1;' is PIR: a line of description, and '*' at the end")
    if not lines[last].rstrip().endswith(_STOP) or not all(map(_PIR_ANNOTATION.match, lines[last + 1 :])):
        raise ValueError(f"{where}: residues follow the '*' that ends a sequence in PIR")
    return lines[: last + 1]


def _numbered(path: str, number: int) -> str:
    """Return an id for what has none."""
    stem = "stdin" if path == files.STANDARD_STREAM else Path(path).name.split(".")[0]
    return f"{_SPACE.sub('_', stem) or 'sequence'}_{number}"


def _read_table(
    path: str,
    columns: Sequence[str],
    make: Callable[[int, list[str]], Row],
    is_header: Callable[[list[str]], bool],
    on_bad: OnBad | None,
) -> Iterator[Row]:
    """Make a row of each line, from the number of the line and its fields."""
    name, text, found = files.display_name(path), _read_text(path), False
    first, wanted = _first_line(text), ", ".join(columns)
    if first.startswith(">"):
        raise ValueError(f"{name} is a FASTA file, not a table of pairs: give it without --pairs")
    if "\t" not in first and (other := format_of(first)) and other.kind != "table":
        raise ValueError(f"{name} is {other.name}, not a table of pairs; each line must be {wanted} with tabs between")
    rows = ((n, line) for n, line in enumerate(_lines(text), start=1) if line.strip() and not line.startswith("#"))
    for place, (n, line) in enumerate(rows):
        fields = [_unquoted(field.strip()) for field in line.split("\t")]
        if place == 0 and len(fields) == len(columns) and is_header(fields):
            if [field.lower() for field in fields] != ["id", "x", "y"]:
                warnings.warn(f"{name}, line {n} is taken for names of columns: {' '.join(fields)}", stacklevel=3)
            continue
        try:
            if len(fields) != len(columns):
                told = _told_columns(fields)
                raise ValueError(f"{name}, line {n}: {told}; there must be {len(columns)} with tabs between: {wanted}")
            row = make(n, fields)
        except ValueError as error:
            _take(error, on_bad)
            continue
        found = True
        yield row
    if not found:
        raise ValueError(f"{name} holds no pair; each line must be {wanted} with tabs between")


def _unquoted(field: str) -> str:
    return field[1:-1].strip() if len(field) > 1 and field[0] == field[-1] and field[0] in "\"'" else field


def _told_columns(fields: list[str]) -> str:
    if len(fields) > 1:
        return f"{len(fields)} columns"
    separator = next((name for mark, name in _SEPARATORS.items() if mark in fields[0]), None)
    return f"1 column, with {separator} in place of tabs" if separator else "1 column"


def _names_columns(fields: list[str]) -> bool:
    """Tell names of columns (id, seq1, seq2) from an id and two sequences."""
    return bool(_FIRST_COLUMN.fullmatch(fields[0])) and all(map(_FURTHER_COLUMN.fullmatch, fields[1:]))


def _residues(sequence: str, where: str, notes: _Notes) -> str:
    letters = "".join(sequence.split())
    if not _ALLOWED.issuperset(letters):
        bad = next(n for n, letter in enumerate(letters) if letter not in _ALLOWED)
        raise ValueError(
            f"{where}, position {bad + 1}: {letters[bad]!r} is no residue{_HINTS.get(letters[bad], '')}; allowed are "
            f"the letters {_LETTERS} in either case"
        )
    residues = letters.translate(_WITHOUT_GAPS).rstrip(_STOP).upper()
    if not residues:
        raise ValueError(f"{where}: the sequence is empty")
    if len(residues) > MAX_LENGTH:
        raise ValueError(
            f"{where}: {len(residues)} residues were given, allowed are at most {MAX_LENGTH}; cut it into domains"
        )
    if _WITHOUT_GAPS.keys() & set(map(ord, set(letters))):
        notes.add("gaps ('-', '.', '_', '~') are left out", where)
    if _STOP in residues:
        notes.add("'*' is read as X", f"{where}, position {letters.index(_STOP) + 1}")
    if vocab.seem_nucleotides(Counter(residues)):
        notes.add("what looks like nucleotides is aligned as a protein", where)
    return residues.replace(_STOP, _UNKNOWN)


def _check_proteins(sequences: list[str], name: str) -> None:
    """Raise ValueError if all sequences look like DNA or RNA: together, since each may be too short to say."""
    letters = [Counter(sequence) for sequence in sequences]
    together = sum(letters, Counter[str]())
    if all(map(vocab.may_be_nucleotides, letters)) and vocab.seem_nucleotides(together):
        kind = "RNA" if together["U"] else "DNA"
        raise ValueError(f"{name} holds {kind}, it seems, and proteins are aligned here: translate it")
