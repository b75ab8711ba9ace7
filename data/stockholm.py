"""Stockholm alignments, read one family at a time.

Biopython's reader is not used: it accepts unknown symbols and a record without its `//`, names neither the line nor the
family of a malformed record, cannot continue after one, fails on Latin-1 text and does not bound memory.

Format: https://sonnhammer.sbc.su.se/Stockholm.html, with the blocks of Easel: a blank line ends a block, a name that
occurs twice within a block is a duplicate row, and in a later block it continues the row.
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data.files import DAMAGED, display_name, open_unpacked
from data.other_formats import format_of
from data.vocab import GAPS

SYMBOLS = string.ascii_letters.encode() + GAPS
HEADER = "# STOCKHOLM 1.0"
_HEADER = re.compile(rb"(\xef\xbb\xbf)?\s*#\s*STOCKHOLM\s+1(\.\d+)?(\s|$)", re.IGNORECASE)
_ADVICE = {  # where the input is of another format, by its kind
    "alignment": "; convert it, for example by esl-reformat of HMMER",
    "page": ", such as a page that tells an error; delete it and download again",
    "profile": "; alignments are another file (of Pfam: Pfam-A.seed, Pfam-A.full)",
    "shards": "; give what they were built from",
}
MAX_ROW_BYTES = 1 << 20  # the widest alignment of Pfam-A.full stays far below; a longer row is a damaged file
MAX_FAMILY_BYTES = 1 << 30


class StockholmError(ValueError):
    """Malformed input. `line` counts from 1; `family` is its accession, else its ID, else its number in the file."""

    def __init__(self, path: str, line: int, family: str, reason: str):
        super().__init__(path, line, family, reason)
        self.path, self.line, self.family, self.reason = path, line, family, reason

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}, family {self.family}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Alignment:
    """One family of a file. Text is decoded as Latin-1, which maps every byte to one character and back."""

    ids: tuple[str, ...]  # row names
    rows: UInt8[np.ndarray, "rows columns"]  # ASCII symbols as in the file
    gf: tuple[tuple[str, str], ...]  # (feature, text) in file order; features may repeat
    gs: tuple[tuple[str, str, str], ...]  # (row name, feature, text) in file order
    gc: dict[str, str]  # feature -> one character a column
    gr: dict[tuple[str, str], str]  # (row name, feature) -> one character a column
    comments: tuple[str, ...]  # other lines that begin with '#'
    line: int  # of the header, for messages
    number: int  # of the record in its file, from 1

    def feature(self, name: str) -> str | None:
        """Return the first #=GF text of a feature, or None."""
        return next((text for feature, text in self.gf if feature == name), None)

    @property
    def name(self) -> str:
        """Accession, else ID, else number in the file, for messages."""
        return _name(self.gf, self.number)


def is_header(line: bytes) -> bool:
    """Say whether a line begins a record. Case and white space may differ, and a byte order mark may come first."""
    return _HEADER.match(line) is not None


def no_header(line: bytes) -> str:
    """Return a message about a line where a record should begin."""
    seems = format_of(line.decode("latin-1"))
    advice = f"; it seems to be {seems.name}{_ADVICE.get(seems.kind, '')}" if seems else ""
    found = _shown(line) if line[:60].decode("latin-1").isprintable() or b"\t" in line else "other bytes"
    return f"expected the header {HEADER!r}, found {found}{advice}"


def read(
    source: str | Path | BufferedIOBase,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    max_family_bytes: int = MAX_FAMILY_BYTES,
    on_bad: Callable[[StockholmError], object] | None = None,
) -> Iterator[Alignment]:
    """Yield the alignments of a file, or of a binary handle, which stays open, one at a time.

    A file may be plain or compressed, or "-" for standard input (`data.files.open_unpacked`). Longer lines or rows than
    `max_row_bytes` and larger families than `max_family_bytes` are malformed. By default the first malformed family
    raises StockholmError. With `on_bad`, for example a list's append, `on_bad` gets the error instead, and reading
    continues after the family's `//`; truncated compressed data end the reading. Corrupt compressed data always raise
    the error, since the families read before may be wrong.
    """
    name = display_name(source if isinstance(source, str | Path) else getattr(source, "name", "<stream>"))
    with ExitStack() as opened:
        parser = _Parser(_open(source, opened), name, max_row_bytes, max_family_bytes)
        while not parser.at_end:
            try:
                alignment = parser.next_family()
            except StockholmError as error:
                if on_bad is None or (error.__cause__ is not None and not isinstance(error.__cause__, EOFError)):
                    raise
                on_bad(error)
            else:
                if alignment is not None:
                    yield alignment


def _open(source: str | Path | BufferedIOBase, opened: ExitStack) -> BufferedIOBase | BaseException:
    """Return a handle, or the error of a file whose first bytes cannot be unpacked."""
    if not isinstance(source, str | Path):
        return source
    try:
        return opened.enter_context(open_unpacked(source))
    except ValueError as error:
        if isinstance(error.__cause__, DAMAGED):
            return error.__cause__
        raise


class _Parser:
    """Position in a file and the family that is read there."""

    def __init__(self, handle: BufferedIOBase | BaseException, path: str, max_row_bytes: int, max_family_bytes: int):
        self.path, self.max_row_bytes, self.max_family_bytes = path, max_row_bytes, max_family_bytes
        self.line = self.families = 0  # read so far
        self.record: _Record | None = None  # between a header and its `//`
        self.skipping = False  # from a malformed line to the next `//` or header
        self.at_end = False
        self.lines = self._lines(handle)

    def next_family(self) -> Alignment | None:
        """Return the next family, or None at the end of the file."""
        for line in self.lines:
            if (alignment := self._take(line)) is not None:
                return alignment
        self.at_end = True
        if self.record is not None:
            raise self.record.error("the file ends before the `//` that ends this family")
        return None

    def _take(self, line: bytes) -> Alignment | None:
        """Take one line; return the family that it ends."""
        record, self.record = self.record, None
        at_end, begins = line.strip() == b"//", is_header(line)
        if (begins or record is not None) and (wrong := _no_text(line)):
            self.skipping = True
            raise (record or self._begin()).error(wrong, self.line)
        if begins:
            self.record, self.skipping = self._begin(), False
            if record is not None:
                raise record.error("a new header begins before the `//` that ends this family", self.line)
        elif self.skipping:
            self.skipping = not at_end
        elif record is None:
            self.skipping = bool(line.strip()) and not at_end  # a second `//` ends nothing
            if self.skipping:
                raise self._begin().error(no_header(line))
        elif at_end:
            return record.close(self.line)
        else:
            self.skipping = True  # if the next line of code raises
            record.take(line, self.line)
            self.record, self.skipping = record, False
        return None

    def _begin(self) -> "_Record":
        self.families += 1
        return _Record(self, self.line)

    def _lines(self, handle: BufferedIOBase | BaseException) -> Iterator[bytes]:
        """Yield lines without their end; of one that is too long, the first max_row_bytes + 1 bytes."""
        try:
            if isinstance(handle, BaseException):
                raise handle
            while line := handle.readline(self.max_row_bytes + 1):
                self.line += 1
                too_long = len(line) > self.max_row_bytes and not line.endswith(b"\n")
                rest = line
                while too_long and rest and not rest.endswith(b"\n"):
                    rest = handle.readline(self.max_row_bytes)
                yield line if too_long else line.rstrip(b"\r\n")
        except DAMAGED as error:
            record, self.record = self.record or self._begin(), None
            reason = f"the file cannot be read further ({error}); it is truncated or corrupt, fetch it again"
            raise record.error(reason, self.line + 1) from error


class _Record:
    """One family while it is read. A key is (kind, name, ...), for example ("GR", row, feature)."""

    def __init__(self, parser: _Parser, line: int):
        self.path, self.number, self.header_line, self.line = parser.path, parser.families, line, line
        self.max_row_bytes, self.max_family_bytes, self.bytes = parser.max_row_bytes, parser.max_family_bytes, 0
        self.gf: list[tuple[str, str]] = []
        self.gs: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.pieces: dict[tuple[str, ...], list[bytes]] = {}  # of one row over all blocks
        self.last_line: dict[tuple[str, ...], int] = {}
        self.block: set[str] = set()  # rows since the last blank line

    def error(self, reason: str, line: int | None = None) -> StockholmError:
        return StockholmError(self.path, line or self.line, _name(self.gf, self.number), reason)

    def take(self, line: bytes, number: int) -> None:
        """Add a line between header and `//`."""
        self.line = number
        line = line.lstrip()
        self.bytes += len(line)
        if len(line) > self.max_row_bytes:
            raise self.error(f"line of more than max_row_bytes={self.max_row_bytes} bytes")
        if self.bytes > self.max_family_bytes:
            raise self.error(f"family of more than max_family_bytes={self.max_family_bytes} bytes")
        tag = line[:5].rstrip()
        if not line.strip():
            self.block.clear()
        elif tag == b"#=GF":
            feature, text = self._fields(line, 2)
            self.gf.append((feature, text))
        elif tag == b"#=GS":
            name, feature, text = self._fields(line, 3)
            self.gs.append((name, feature, text))
            self.last_line["GS", name] = number
        elif tag in (b"#=GC", b"#=GR"):
            *names, text = self._fields(line, 2 if tag == b"#=GC" else 3)
            self._add((tag[2:].decode(), *names), text.encode("latin-1").strip())
        elif line.startswith(b"#"):
            self.comments.append(line.decode("latin-1"))
        else:
            self._take_row(line)

    def _fields(self, line: bytes, count: int) -> list[str]:
        """Return the `count` fields after the tag; the last one is free text, which may be empty."""
        found = [field.decode("latin-1") for field in line.split(None, count)[1:]]
        if len(found) < count - 1:
            raise self.error(f"annotation with {len(found)} of at least {count - 1} fields: {_shown(line)}")
        return found + [""] * (count - len(found))

    def _take_row(self, line: bytes) -> None:
        parts = line.split()
        if len(parts) != 2:
            raise self.error(f"a row is a name and its residues, found {len(parts)} fields: {_shown(line)}")
        name, residues = parts[0].decode("latin-1"), parts[1]
        if unknown := residues.translate(None, SYMBOLS):
            what = f"unknown symbol {_shown(unknown[:1])} in row {name!r}"
            stop = "; a stop is no residue: write X in its place" if unknown[:1] == b"*" else ""
            raise self.error(f"{what}; letters and the gaps '-', '.', '_' and '~' are allowed{stop}")
        if name in self.block:
            raise self.error(f"duplicate row {name!r}")
        self.block.add(name)
        self._add(("row", name), residues)

    def _add(self, key: tuple[str, ...], piece: bytes) -> None:
        self.pieces.setdefault(key, []).append(piece)
        self.last_line[key] = self.line

    def close(self, line: int) -> Alignment:
        """Check the family, whose `//` is on this line, and return it."""
        self.line = line
        joined = {key: b"".join(pieces) for key, pieces in self.pieces.items()}
        ids = tuple(key[1] for key in joined if key[0] == "row")
        if not ids:
            raise self.error("no rows: a family needs at least one")
        self._check_lengths(joined, ids)
        text = {key: value.decode("latin-1") for key, value in joined.items() if key[0] != "row"}
        rows = np.frombuffer(b"".join(joined["row", name] for name in ids), np.uint8).reshape(len(ids), -1)
        gc = {key[1]: value for key, value in text.items() if key[0] == "GC"}
        gr = {(key[1], key[2]): value for key, value in text.items() if key[0] == "GR"}
        gf, gs, comments = tuple(self.gf), tuple(self.gs), tuple(self.comments)
        return Alignment(ids, rows, gf, gs, gc, gr, comments, self.header_line, self.number)

    def _check_lengths(self, joined: dict[tuple[str, ...], bytes], ids: tuple[str, ...]) -> None:
        """Raise StockholmError unless all rows are of one length and annotations are of rows that exist."""
        columns = len(joined["row", ids[0]])
        if columns > self.max_row_bytes:
            raise self.error(f"rows of {columns} columns, more than max_row_bytes={self.max_row_bytes}")
        for key, value in joined.items():
            if len(value) != columns:
                what = " ".join(key if key[0] == "row" else (f"#={key[0]}", *key[1:]))
                raise self.error(f"{what} has {len(value)} columns, the first row {columns}", self.last_line[key])
        for key, line in self.last_line.items():
            if key[0] in ("GS", "GR") and ("row", key[1]) not in joined:
                raise self.error(f"#={key[0]} annotates {key[1]!r}, which is no row of the family", line)


def _no_text(line: bytes) -> str:
    """Return what is wrong with a line that holds bytes which no line of text has, else ""."""
    if b"\r" in line:
        return "a line holds a carriage return: lines of old Macs end so; convert them (tr '\\r' '\\n')"
    if b"\0" in line:
        return "a line holds a zero byte: the file is no text, or text in UTF-16; save it as UTF-8"
    return ""


def _name(gf: Iterable[tuple[str, str]], number: int) -> str:
    features = dict(reversed([*gf]))
    return features.get("AC") or features.get("ID") or f"number {number} of the file"


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("latin-1"))
