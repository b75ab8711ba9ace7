"""Stockholm alignments, read as a stream and written back without loss.

Why not Biopython: it accepts unknown symbols and a record without its `//`, names neither line nor family of what it
refuses, cannot go on behind it, stops at Latin-1 text and has no bound on memory. Here one family is in memory.

Format: https://sonnhammer.sbc.su.se/Stockholm.html, with the block rule of Easel (a blank line ends a block, so a name
that comes twice within a block is a duplicate row, and in a later block it continues the row).
"""

import gzip
import string
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """One record. Text is Latin-1 decoded, which maps every byte to one character and back.

    gf holds (feature, text) and gs (row name, feature, text) in file order, features may repeat. gc maps a feature, and
    gr a (row name, feature), to one character a column. comments are the other lines that begin with '#'. line is that
    of the header, for messages.
    """

    ids: tuple[str, ...]
    rows: UInt8[np.ndarray, "rows columns"]
    gf: tuple[tuple[str, str], ...] = ()
    gs: tuple[tuple[str, str, str], ...] = ()
    gc: dict[str, str] | None = None
    gr: dict[tuple[str, str], str] | None = None
    comments: tuple[str, ...] = ()
    line: int = 0

    def feature(self, name: str) -> str | None:
        """The first #=GF text of that feature, or None."""
        return next((text for feature, text in self.gf if feature == name), None)


def read(
    source: str | Path | BufferedIOBase,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    max_family_bytes: int = MAX_FAMILY_BYTES,
    on_bad: Callable[[StockholmError], object] | None = None,
) -> Iterator[Alignment]:
    """Yields the alignments of a plain or gzip file, or of a binary handle, one at a time.

    A malformed family raises StockholmError. With `on_bad` (a list's append, say) the error goes there instead, the
    family is left out and reading goes on behind the next `//`. Truncated gzip data end the reading so; a wrong
    checksum is raised in any case, since the families read before it may be wrong.
    """
    with _opened(source) as (handle, path):
        parser = _Parser(handle, path, max_row_bytes, max_family_bytes)
        while not parser.at_end:
            try:
                alignment = parser.next_family()
            except StockholmError as error:
                if on_bad is None or isinstance(error.__cause__, gzip.BadGzipFile):
                    raise
                on_bad(error)
                parser.resynchronise()
            else:
                if alignment is not None:
                    yield alignment


def write(alignment: Alignment, handle: BufferedIOBase) -> None:
    """Writes one record, unwrapped; `read` gives the same record back."""
    gc, gr = alignment.gc or {}, alignment.gr or {}
    lines = ["# STOCKHOLM 1.0", *alignment.comments]
    lines += [f"#=GF {feature} {text}" for feature, text in alignment.gf]
    lines += [f"#=GS {name} {feature} {text}" for name, feature, text in alignment.gs]
    for name, row in zip(alignment.ids, alignment.rows, strict=True):
        lines.append(f"{name} {row.tobytes().decode('latin-1')}")
        lines += [f"#=GR {name} {feature} {text}" for (owner, feature), text in gr.items() if owner == name]
    lines += [f"#=GC {feature} {text}" for feature, text in gc.items()]
    handle.write("\n".join([*lines, "//", ""]).encode("latin-1"))


@contextmanager
def _opened(source: str | Path | BufferedIOBase) -> Iterator[tuple[BufferedIOBase, str]]:
    """A handle on the uncompressed bytes and the name for messages; closes only what it opened."""
    if not isinstance(source, str | Path):
        yield source, str(getattr(source, "name", "<stream>"))
        return
    with Path(source).open("rb") as raw:
        compressed = raw.peek(2)[:2] == b"\x1f\x8b"
        yield (gzip.GzipFile(fileobj=raw) if compressed else raw), str(source)


class _Record:
    """What has been read of one family. Keys of `pieces` are (kind, ...), values the pieces of one wrapped row."""

    def __init__(self, ordinal: int):
        self.ordinal = ordinal
        self.header_line = 0
        self.bytes = 0
        self.gf: list[tuple[str, str]] = []
        self.gs: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.pieces: dict[tuple[str, ...], list[bytes]] = {}
        self.last_line: dict[tuple[str, ...], int] = {}
        self.block: set[str] = set()

    @property
    def family(self) -> str:
        features = dict(reversed(self.gf))
        return features.get("AC") or features.get("ID") or f"number {self.ordinal} of the file"

    def add(self, kind: str, names: tuple[str, ...], piece: bytes, line: int) -> None:
        key = (kind, *names)
        self.pieces.setdefault(key, []).append(piece)
        self.last_line[key] = line


class _Parser:
    def __init__(self, handle: BufferedIOBase, path: str, max_row_bytes: int, max_family_bytes: int):
        self.handle, self.path = handle, path
        self.max_row_bytes, self.max_family_bytes = max_row_bytes, max_family_bytes
        self.line = 0
        self.at_end = False
        self.record = _Record(1)
        self.inside = False  # between a header and its `//`
        self.pending_header = False  # a header was met where `//` was expected: it opens the next family

    def fail(self, reason: str, line: int | None = None) -> StockholmError:
        return StockholmError(self.path, self.line if line is None else line, self.record.family, reason)

    def next_line(self) -> bytes | None:
        """The next line without its end, or None at the end of the file."""
        self.line += 1
        try:
            line = self.handle.readline(self.max_row_bytes + 1)
            too_long = len(line) > self.max_row_bytes and not line.endswith(b"\n")
            while too_long and not line.endswith(b"\n") and line:
                line = self.handle.readline(self.max_row_bytes)
        except (EOFError, OSError, zlib.error) as error:
            self.at_end = True
            raise self.fail(
                f"the file cannot be read further ({error}); it is truncated or corrupt, fetch it again"
            ) from error
        if too_long:
            raise self.fail(f"line of more than max_row_bytes={self.max_row_bytes} bytes")
        if not line:
            self.at_end = True
            self.line -= 1
        return line.rstrip(b"\r\n") if line else None

    def next_family(self) -> Alignment | None:
        """The next record, or None when only blank lines are left."""
        if not self.open_record():
            return None
        while (line := self.next_line()) is not None:
            if line.rstrip() == b"//":
                self.inside = False
                return self.close_record()
            if line.startswith(HEADER):
                self.inside, self.pending_header = False, True
                raise self.fail("a new header begins before the `//` that ends this family")
            self.take(line)
        raise self.fail("the file ends before the `//` that ends this family")

    def open_record(self) -> bool:
        self.record = _Record(self.record.ordinal + 1 if self.line else 1)
        while not self.pending_header:
            line = self.next_line()
            if line is None:
                return False
            if line.strip():
                self.pending_header = line.startswith(HEADER)
                self.inside = True
                if not self.pending_header:
                    raise self.fail(f"expected the header {HEADER.decode()!r}, found {_shown(line)}")
        self.inside, self.pending_header = True, False
        self.record.header_line = self.line
        return True

    def resynchronise(self) -> None:
        """Skips what is left of the bad family: up to its `//` or the next header."""
        while self.inside and not self.at_end:
            try:
                line = self.next_line()
            except StockholmError:
                continue  # belongs to the family that is already reported
            if line is None or line.rstrip() == b"//":
                self.inside = False
            elif line.startswith(HEADER):
                self.inside, self.pending_header = False, True

    def take(self, line: bytes) -> None:
        record = self.record
        record.bytes += len(line)
        if record.bytes > self.max_family_bytes:
            raise self.fail(f"family of more than max_family_bytes={self.max_family_bytes} bytes")
        tag = line[:5].rstrip() if line[4:5].isspace() or len(line) == 4 else b""
        if not line.strip():
            record.block.clear()
        elif tag == b"#=GF":
            feature, text = self.fields(line, 2)
            record.gf.append((feature, text))
        elif tag == b"#=GS":
            name, feature, text = self.fields(line, 3)
            record.gs.append((name, feature, text))
            record.last_line["GS", name] = self.line
        elif tag in (b"#=GC", b"#=GR"):
            *names, text = self.fields(line, 2 if tag == b"#=GC" else 3)
            record.add(tag[2:].decode(), tuple(names), text.encode("latin-1").strip(), self.line)
        elif line.startswith(b"#"):
            record.comments.append(line.decode("latin-1"))
        else:
            self.take_row(line)

    def fields(self, line: bytes, count: int) -> list[str]:
        """`count` fields behind the tag; the last one is free text, which may be empty."""
        found = [field.decode("latin-1") for field in line.split(None, count)[1:]]
        if len(found) < count - 1:
            raise self.fail(f"annotation with {len(found)} of at least {count - 1} fields: {_shown(line)}")
        return found + [""] * (count - len(found))

    def take_row(self, line: bytes) -> None:
        parts = line.split()
        if len(parts) != 2:
            raise self.fail(f"a row is a name and its residues, found {len(parts)} fields: {_shown(line)}")
        name, residues = parts[0].decode("latin-1"), parts[1]
        if unknown := residues.translate(None, SYMBOLS):
            raise self.fail(f"unknown symbol {_shown(unknown[:1])} in row {name!r}; letters, '-' and '.' are allowed")
        if name in self.record.block:
            raise self.fail(f"duplicate row {name!r}")
        self.record.block.add(name)
        self.record.add("row", (name,), residues, self.line)

    def close_record(self) -> Alignment:
        record = self.record
        joined = {key: b"".join(pieces) for key, pieces in record.pieces.items()}
        ids = tuple(key[1] for key in joined if key[0] == "row")
        if not ids:
            raise self.fail("no rows: a family needs at least one")
        self.check_lengths(joined, ids)
        rows = np.frombuffer(b"".join(joined["row", name] for name in ids), np.uint8).reshape(len(ids), -1)
        text = {key: value.decode("latin-1") for key, value in joined.items() if key[0] != "row"}
        return Alignment(
            ids=ids,
            rows=rows,
            gf=tuple(record.gf),
            gs=tuple(record.gs),
            gc={key[1]: value for key, value in text.items() if key[0] == "GC"},
            gr={(key[1], key[2]): value for key, value in text.items() if key[0] == "GR"},
            comments=tuple(record.comments),
            line=record.header_line,
        )

    def check_lengths(self, joined: dict[tuple[str, ...], bytes], ids: tuple[str, ...]) -> None:
        columns = len(joined["row", ids[0]])
        if columns > self.max_row_bytes:
            raise self.fail(f"rows of {columns} columns, more than max_row_bytes={self.max_row_bytes}")
        for key, value in joined.items():
            if len(value) != columns:
                what = " ".join(key if key[0] == "row" else (f"#={key[0]}", *key[1:]))
                raise self.fail(f"{what} has {len(value)} columns, the first row {columns}", self.record.last_line[key])
        for key, line in self.record.last_line.items():
            if key[0] in ("GS", "GR") and ("row", key[1]) not in joined:
                raise self.fail(f"#={key[0]} annotates {key[1]!r}, which is no row of the family", line)


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("latin-1"))
