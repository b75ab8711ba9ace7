"""Stockholm alignments, read one family at a time.

Biopython's reader is not used: it accepts unknown symbols and a record without its `//`, names neither the line nor the
family of a malformed record, cannot continue after one, fails on Latin-1 text and does not bound memory.

Format: https://sonnhammer.sbc.su.se/Stockholm.html, with the blocks of Easel: a blank line ends a block, a name that
occurs twice within a block is a duplicate row, and in a later block it continues the row.
"""

import gzip
import string
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

SYMBOLS = (string.ascii_letters + "-.").encode()
HEADER = b"# STOCKHOLM 1.0"
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

    def feature(self, name: str) -> str | None:
        """Return the first #=GF text of a feature, or None."""
        return next((text for feature, text in self.gf if feature == name), None)


@contextmanager
def open_unpacked(path: str | Path) -> Iterator[BufferedIOBase]:
    """Open a plain or gzip file; what is read are its unpacked bytes."""
    with Path(path).open("rb") as raw:
        yield gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


def read(
    source: str | Path | BufferedIOBase,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    max_family_bytes: int = MAX_FAMILY_BYTES,
    on_bad: Callable[[StockholmError], object] | None = None,
) -> Iterator[Alignment]:
    """Yield the alignments of a plain or gzip file, or of a binary handle, which stays open, one at a time.

    Longer lines or rows than `max_row_bytes` and larger families than `max_family_bytes` are malformed. `on_bad` is
    called with the StockholmError of every malformed family, for example a list's append. The family is left out and
    reading continues after its `//`; truncated gzip data end the reading. By default the error is raised, and that of a
    wrong gzip checksum is raised in any case, since the families read before it may be wrong.
    """
    opened = open_unpacked(source) if isinstance(source, str | Path) else nullcontext(source)
    name = str(source if isinstance(source, str | Path) else getattr(source, "name", "<stream>"))
    with opened as handle:
        parser = _Parser(handle, name, max_row_bytes, max_family_bytes)
        while not parser.at_end:
            try:
                alignment = parser.next_family()
            except StockholmError as error:
                if on_bad is None or isinstance(error.__cause__, gzip.BadGzipFile):
                    raise
                on_bad(error)
            else:
                if alignment is not None:
                    yield alignment


class _Parser:
    """Position in a file and the family that is read there."""

    def __init__(self, handle: BufferedIOBase, path: str, max_row_bytes: int, max_family_bytes: int):
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
        at_end = line.rstrip() == b"//"
        if line.startswith(HEADER):
            self.record, self.skipping = self._begin(), False
            if record is not None:
                raise record.error("a new header begins before the `//` that ends this family", self.line)
        elif self.skipping:
            self.skipping = not at_end
        elif record is None:
            self.skipping = bool(line.strip())
            if self.skipping:
                raise self._begin().error(f"expected the header {HEADER.decode()!r}, found {_shown(line)}")
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

    def _lines(self, handle: BufferedIOBase) -> Iterator[bytes]:
        """Yield lines without their end; of one that is too long, the first max_row_bytes + 1 bytes."""
        try:
            while line := handle.readline(self.max_row_bytes + 1):
                self.line += 1
                too_long = len(line) > self.max_row_bytes and not line.endswith(b"\n")
                rest = line
                while too_long and rest and not rest.endswith(b"\n"):
                    rest = handle.readline(self.max_row_bytes)
                yield line if too_long else line.rstrip(b"\r\n")
        except (EOFError, OSError, zlib.error) as error:
            record, self.record = self.record or self._begin(), None
            reason = f"the file cannot be read further ({error}); it is truncated or corrupt, fetch it again"
            raise record.error(reason, self.line + 1) from error


class _Record:
    """One family while it is read. A key is (kind, name, ...), for example ("GR", row, feature)."""

    def __init__(self, parser: _Parser, line: int):
        self.path, self.ordinal, self.header_line, self.line = parser.path, parser.families, line, line
        self.max_row_bytes, self.max_family_bytes, self.bytes = parser.max_row_bytes, parser.max_family_bytes, 0
        self.gf: list[tuple[str, str]] = []
        self.gs: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.pieces: dict[tuple[str, ...], list[bytes]] = {}  # of one row over all blocks
        self.last_line: dict[tuple[str, ...], int] = {}
        self.block: set[str] = set()  # rows since the last blank line

    def error(self, reason: str, line: int | None = None) -> StockholmError:
        features = dict(reversed(self.gf))
        family = features.get("AC") or features.get("ID") or f"number {self.ordinal} of the file"
        return StockholmError(self.path, line or self.line, family, reason)

    def take(self, line: bytes, number: int) -> None:
        """Add a line between header and `//`."""
        self.line = number
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
            raise self.error(f"unknown symbol {_shown(unknown[:1])} in row {name!r}; letters, '-' and '.' are allowed")
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
        return Alignment(ids, rows, tuple(self.gf), tuple(self.gs), gc, gr, tuple(self.comments), self.header_line)

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


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("latin-1"))
