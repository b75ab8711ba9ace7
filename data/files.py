"""Open compressed text to read, and write files that appear only when they are finished."""

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import lzma
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any, cast

# Names, in lower case, of files and folders that operating systems leave anywhere; so do names that begin with a dot.
_STRAY = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "@eadir", "__macosx", "$recycle.bin"}
STANDARD_STREAM = "-"  # as a name: standard input, or standard output
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # errors of reading a truncated or corrupt compressed file
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ENDINGS = (".gz", ".bz2", ".xz"), (".sto", ".stk", ".sth", ".stockholm", ".txt")  # of Stockholm files
_NOT_READ = {
    b"PK\x03\x04": "a zip archive; unpack it (unzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it (unzstd), or compress by gzip, bzip2 or xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it (7z x)",
    b"\x1f\x9d": "compressed by compress; unpack it (uncompress)",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it (unlz4), or compress by gzip, bzip2 or xz",
    b"Rar!": "a rar archive; unpack it (unrar)",
    codecs.BOM_UTF32_LE: "text in UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF32_BE: "text in UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF16_LE: "text in UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "text in UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
_TAR = slice(257, 262), b"ustar"
_PEEKED = 512  # bytes


def display_name(path: str | Path) -> str:
    """Return the name of a file for messages."""
    return "standard input" if str(path) == STANDARD_STREAM else str(path)


def without_endings(path: str | Path) -> str:
    """Return the name of a Stockholm file without folder and endings: Pfam-A.full of parts/Pfam-A.full.gz."""
    name = Path(path).name
    for endings in _ENDINGS:
        ending = next((ending for ending in endings if name.lower().endswith(ending)), "")
        name = name[: len(name) - len(ending)] or name
    return name


def expanded(path: str | PurePath) -> str:
    """Return a path with `~` as the home folder."""
    if not str(path).startswith("~"):
        return str(path)
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, without what systems and editors leave there (`is_stray`)."""
    return sorted(path for path in folder.iterdir() if not is_stray(path.name))


def is_stray(name: str) -> bool:
    """Tell whether an operating system, a network disk or an editor leaves files or folders of this name anywhere."""
    return name.startswith((".", "~$", "#")) or name.endswith("~") or name.lower() in _STRAY


@contextlib.contextmanager
def open_unpacked(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """Open the unpacked bytes of a plain, gzip, bzip2 or xz file, or of standard input ("-"), without a UTF-8 mark.

    The content decides, not the name. Raises OSError if the file cannot be opened, ValueError that names the file and
    the format if it is another archive, another compression or UTF-16. Reading may raise one of `DAMAGED`.
    """
    with contextlib.ExitStack() as opened:
        raw = _standard_input() if str(path) == STANDARD_STREAM else opened.enter_context(Path(path).open("rb"))
        file: Any = raw if hasattr(raw, "peek") else io.BufferedReader(cast(io.RawIOBase, raw), _PEEKED)
        begin = file.peek(_PEEKED)[:_PEEKED]
        opener = next((opener for mark, opener in _OPENERS.items() if begin.startswith(mark)), None)
        if opener:
            file = opened.enter_context(opener(file))
            begin = _peeked(file, path)
        for mark, told in _NOT_READ.items():
            if begin.startswith(mark):
                raise ValueError(f"{display_name(path)} is {told}")
        if begin[_TAR[0]] == _TAR[1]:
            raise ValueError(f"{display_name(path)} is a tar archive; unpack it (tar -xf) and give a file of it")
        if begin.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield file


def _standard_input() -> io.BufferedIOBase:
    if sys.stdin is None:
        raise ValueError("standard input is closed; give a file, or a pipe")
    return cast(io.BufferedIOBase, sys.stdin.buffer)


def _peeked(file, path: str | Path) -> bytes:
    try:
        return file.peek(_PEEKED)[:_PEEKED]
    except DAMAGED as error:
        raise ValueError(
            f"{display_name(path)} cannot be unpacked ({error}): it is truncated or corrupt, fetch it again"
        ) from error


@contextlib.contextmanager
def finished(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write ("w") or ("wb"), which replaces `path` when the block ends, and only if no error ended it.

    It is written beside `path`, as `.<name>.<process>.tmp`, flushed to the disk and renamed. A device or a pipe at
    `path` is written to at once. Missing folders are made.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with path.open(mode) as file:
            yield file
        return
    path = path.resolve()  # through symbolic links, which stay
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError if a file cannot be written to `path`, before the work for it. Missing folders are no fault."""
    path = Path(path).resolve()
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    replaced = path.is_file() or not path.exists()  # else a device
    for needed in [folder, path] if replaced else [path]:
        if needed.exists() and not os.access(needed, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(needed))


def write(path: str | Path, text: str) -> None:
    """Replace a file by a finished one with this text."""
    with finished(path) as file:
        file.write(text)
