"""Write alignments to a file that appears when it is finished, or to a file for each query; continue interrupted runs.

An unfinished file is `FILE.part`. A journal beside it, `FILE.part.json`, records how many pairs are settled, how many
bytes their alignments take, and what the alignments depend on: a run that continues it must be the same. What was
written behind the last record is cut off. Compressed files hold a member for each record, so they can be cut as well.
"""

import bz2
import contextlib
import fcntl
import gzip
import json
import lzma
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from alignment import formats
from alignment.selection import Settled
from alignment.sequences import Record, told_apart
from data import files

Run = Mapping[str, Any]  # what alignments depend on, by the name under which a user knows it; values that JSON holds
_COMPRESSORS: dict[str, Callable[..., Any]] = {
    # gzip's default level, 9, takes longer than all else here, for files a quarter smaller.
    ".gz": lambda file, mode: gzip.GzipFile("", mode, 4, file, mtime=0),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_LONGEST_NAME = 100  # characters, of a file; systems allow 255 bytes


class Reached(NamedTuple):
    """Place in the work of a run."""

    pairs: int = 0  # that are settled, in the order of the input
    left_out: int = 0  # among them, by --min-probability
    bytes: int = 0  # of the unfinished file

    def after(self, settled: Settled) -> "Reached":
        return Reached(self.pairs + settled.pairs, self.left_out + settled.left_out, self.bytes)


class Results(Protocol):
    """Place where alignments are written, one after the other."""

    reached: Reached

    def take(self, settled: Settled) -> None:
        """Write the alignments that are kept."""


class _Stream:
    """Alignments as text to a function, without a way to continue."""

    def __init__(self, write: Callable[[str], object], form: str):
        self.reached = Reached()
        self._write, self._writer = write, formats.Writer(form)

    def take(self, settled: Settled) -> None:
        """Write the alignments that are kept."""
        _write(self._write, self._writer, settled, begins=not self.reached.pairs)
        self.reached = self.reached.after(settled)


def _write(write: Callable[[str], object], writer: formats.Writer, settled: Settled, *, begins: bool) -> None:
    if begins:
        write(writer.begin(settled.query))
    for aligned in settled.kept:
        write(writer.text(aligned))


class Journal:
    """How far a run has come, in a file of JSON that is replaced at once.

    Args:
        path: The file.
        run: What alignments depend on.
        resume: Continue an interrupted run. Without it, one that has come to anything is an error.
        place: File or folder that the user named.
        total: Number of pairs.

    Raises:
        ValueError: if the journal is of another run, is no journal, or is there and `resume` is not given.
    """

    def __init__(self, path: Path, run: Run, *, resume: bool, place: Path, total: int):
        self.path, self._run = path, json.loads(json.dumps(run))
        before, self.reached = _read_journal(path) if path.exists() else ({}, Reached())
        if not self.reached.pairs:  # nothing is lost if it is begun anew
            self.reached = Reached()
            return
        anew = f"to begin anew, remove {path}"
        if not resume:
            told = f"the first {self.reached.pairs} of {total} pairs of an interrupted run"
            raise ValueError(f"{place} holds {told}; --resume continues it; {anew}")
        changed = [name for name in {**before, **self._run} if before.get(name) != self._run.get(name)]
        if changed:
            told = ", ".join(_told_change(name, before.get(name), self._run.get(name)) for name in changed)
            raise ValueError(f"--resume: {place} was begun by another run: {told}; {anew}")

    def record(self, reached: Reached) -> None:
        """Replace the record. What it counts must be on the disk already."""
        files.write(self.path, json.dumps({"reached": reached._asdict(), "run": self._run}, indent=1) + "\n")
        self.reached = reached

    def remove(self) -> None:
        """Remove the file, when nothing is left to continue."""
        self.path.unlink(missing_ok=True)


def _read_journal(path: Path) -> tuple[dict[str, Any], Reached]:
    try:
        found = json.loads(path.read_text())
        run, reached = found["run"], Reached(**found["reached"])
        if not (isinstance(run, dict) and all(type(n) is int and n >= 0 for n in reached)):
            raise TypeError("a number is not one")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of an interrupted run ({error!r}); move or remove it") from error
    return run, reached


def _told_change(name: str, before: Any, now: Any) -> str:
    if any(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (before, now)):
        return f"{name} has changed"
    return f"{name} was {before}, now {now}"


class _PartFile:
    """`FILE.part`, which is the file when it is finished; recorded each time that `every` more work is settled."""

    def __init__(self, file: IO[bytes], suffix: str, form: str, journal: Journal, names: Sequence[str], every: int):
        self.reached = journal.reached
        self._file, self._compressor = file, _COMPRESSORS.get(suffix)
        self._member: Any = None
        self._journal, self._every, self._since = journal, every, 0.0
        self._writer = formats.Writer(form, names)

    def take(self, settled: Settled) -> None:
        """Write the alignments that are kept, and make a record of it where it is time to."""
        _write(self._append, self._writer, settled, begins=not self.reached.pairs)
        self.reached = self.reached.after(settled)
        self._since += settled.work
        if self._since >= self._every:
            self.flush()
            self._journal.record(self.reached)
            self._since = 0.0

    def _append(self, text: str) -> None:
        if self._member is None:
            self._member = self._compressor(self._file, "wb") if self._compressor else self._file
        self._member.write(text.encode())

    def flush(self) -> None:
        """Bring all to the disk, compressed as a whole member."""
        if self._compressor and self._member is not None:
            self._member.close()
        self._member = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self.reached = self.reached._replace(bytes=self._file.tell())

    def finish(self) -> None:
        """Bring all to the disk; a compressed file has one member at least."""
        if not self.reached.bytes:
            self._append("")
        self.flush()


@contextlib.contextmanager
def to_standard_output(form: str) -> Iterator[Results]:
    """Write to standard output. Raises ValueError if it is closed."""
    if sys.stdout is None:
        raise ValueError("standard output is closed; give --output=FILE")
    yield _Stream(sys.stdout.write, form)
    sys.stdout.flush()


@contextlib.contextmanager
def to_file(path: Path, form: str, run: Run, *, resume: bool, total: int, every: int) -> Iterator[Results]:
    """Write a file that replaces `path` when the block ends, and only if no error ended it.

    Args:
        path: The file; `.gz`, `.bz2` and `.xz` compress. A device or pipe is written to at once.
        form: Format.
        run: What alignments depend on.
        resume: Continue what an interrupted run left.
        total: Number of pairs.
        every: Work, in the unit of `pairing.work_of`, after which what is written is recorded.

    Raises:
        ValueError: if another run is to be continued, there is an interrupted one, or another process writes the file.
    """
    if path.exists() and not path.is_file():
        if resume:
            raise ValueError(f"--resume: {path} is no file; what was written to it cannot be continued")
        with path.open("w", encoding="utf-8") as device:
            yield _Stream(device.write, form)
        return
    path = path.resolve()  # through symbolic links, which stay
    path.parent.mkdir(parents=True, exist_ok=True)
    part, record = (path.with_name(f"{path.name}{ending}") for ending in (".part", ".part.json"))
    if record.exists() and not part.exists():  # killed when it was finished
        record.unlink()
    if part.exists() and part.stat().st_size and not record.exists():
        raise ValueError(f"{part} is in the way, and not of an interrupted run; move or remove it")
    with part.open("ab") as file:
        _lock(file, part)
        journal = Journal(record, run, resume=resume, place=part, total=total)
        if part.stat().st_size < journal.reached.bytes:
            raise ValueError(f"--resume: {part} is shorter than {record} says; to begin anew, remove both")
        file.truncate(journal.reached.bytes)
        file.seek(0, os.SEEK_END)
        results = _PartFile(file, path.suffix, form, journal, _names(part, form), every)
        try:
            journal.record(journal.reached)
            yield results
            results.finish()
            if path.exists():
                shutil.copymode(path, part)
            part.replace(path)
            journal.remove()
        except BaseException:
            _tell_kept(journal, part, total)
            if not journal.reached.pairs:
                part.unlink(missing_ok=True)
                journal.remove()
            raise


def _tell_kept(journal: Journal, place: Path, total: int) -> None:
    if journal.reached.pairs:
        told = f"{journal.reached.pairs} of {total} pairs are kept in {place}"
        warnings.warn(f"{told}: the same command with --resume continues", stacklevel=3)


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes from writing this file, until it is closed. Raises ValueError if another one does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return
    except BlockingIOError:
        pass
    except OSError:  # file systems without locks
        return
    raise ValueError(f"{path}: another process writes it; let it end, or give another --output")


def _names(path: Path, form: str) -> list[str]:
    """Return the ids in an unfinished A3M, from which further ids are told apart."""
    if form != "a3m" or not path.stat().st_size:
        return []
    with files.open_unpacked(path) as file:
        return [line[1:].split()[0].decode() for line in file if line.startswith(b">")]


class _Folder:
    """A file for each query, which appears when it is finished; the journal counts the pairs of finished files."""

    def __init__(self, paths: Mapping[Record, Path], form: str, journal: Journal, opened: contextlib.ExitStack):
        self.reached = journal.reached
        self._paths, self._form, self._journal, self._opened = paths, form, journal, opened
        self._query: Record | None = None
        self._stream: _Stream | None = None

    def take(self, settled: Settled) -> None:
        """Write the alignments that are kept to the file of their query."""
        if self._stream is None or settled.query != self._query:
            self.finish()
            self._query = settled.query
            self._stream = _Stream(self._opened.enter_context(_written(self._paths[settled.query])), self._form)
        self._stream.take(settled)
        self.reached = self.reached.after(settled)

    def finish(self) -> None:
        """Let the file of the query appear, and record it."""
        if self._stream is not None:
            self._opened.close()
            self._journal.record(self.reached)
        self._stream = None


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Callable[[str], object]]:
    with files.finished(path, "wb") as raw:
        yield lambda text: raw.write(text.encode())


@contextlib.contextmanager
def to_folder(
    folder: Path, form: str, run: Run, *, queries: Sequence[Record], resume: bool, total: int, key: str
) -> Iterator[Results]:
    """Write a file for each query, named by its id.

    Args:
        folder: The folder, which is made if it is missing.
        form: Format.
        run: What alignments depend on.
        queries: All queries, in the order in which their alignments come.
        resume: Leave out the queries whose files an interrupted run has finished.
        total: Number of pairs.
        key: Hexadecimal digest of the queries: runs of other queries may write to the same folder at the same time.

    Raises:
        ValueError: if another run is to be continued, or there is an interrupted one.
    """
    journal = Journal(folder / f".align.{key[:16]}.json", run, resume=resume, place=folder, total=total)
    try:
        with contextlib.ExitStack() as opened:
            results = _Folder(_paths(folder, queries, form), form, journal, opened)
            yield results
            results.finish()
    except BaseException:
        _tell_kept(journal, folder, total)
        raise
    journal.remove()


def _paths(folder: Path, queries: Sequence[Record], form: str) -> dict[Record, Path]:
    paths, used = dict[Record, Path](), set[str]()
    for query in queries:
        # Some file systems take names in another case for the same.
        name = told_apart(_file_name(query.id), used, str.lower)
        used.add(name.lower())
        paths[query] = folder / f"{name}{formats.suffix(form)}"
    return paths


def _file_name(identifier: str) -> str:
    """Return a name that file systems allow and programs do not mistake for an option."""
    return re.sub(r"^[-.]|[^\w.=+@-]", "_", identifier, flags=re.ASCII)[:_LONGEST_NAME]
