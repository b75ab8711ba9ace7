"""Places of a build: inputs that exist, and folders that may be made, replaced and removed."""

import os
import shutil
from pathlib import Path

from data.files import STANDARD_STREAM, visible

CHECKSUMS = "SHA256SUMS"


def check_inputs(inputs: tuple[str, ...], table: str, out: Path) -> None:
    """Raise an error unless all inputs are files that any worker can read, and outside of the folder to make.

    A table, "" for none, is read once, and may be the standard input.
    """
    for name in (*inputs, *filter(None, [table])):
        path = Path(name)
        if name == table and name == STANDARD_STREAM:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"input {name} is not a file but a folder: give the files in it")
        if path.exists() and not path.is_file():
            raise ValueError(
                f"input {name} is not a file, but a pipe or device: save it first, for all workers to read"
            )
        if not path.is_file():
            raise FileNotFoundError(f"input {name} is not a file")
        if path.resolve().parent == out:
            raise ValueError(f"out={out} is the folder of the input {name}: give another folder")


def check_place(out: Path, final: Path, overwrite: bool) -> None:
    """Raise an error unless a data set can be put into `out`, in place of a data set of this program at most."""
    for folder in (out, final):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"out={out}: {folder} is a file; give a folder")
    if out.exists() and not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"out={out}: no permission to write into this folder")
    if not final.exists():
        return
    if foreign := _foreign(final):
        raise FileExistsError(f"out={out}: {foreign} is no file of a data set; move it, or choose another folder")
    if not overwrite:
        raise FileExistsError(f"out={out} has a data set: choose another folder, or overwrite=True (--overwrite)")


def _foreign(final: Path) -> Path | None:
    """Return a path in this folder that no build has put there, if there is one."""
    for version in _entries(final):
        if not (version / CHECKSUMS).is_file():
            return version
        ours = {CHECKSUMS, *read_checksums(version)}
        if unknown := next((path for path in _entries(version) if path.name not in ours), None):
            return unknown
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted({*visible(folder), *(path for path in folder.iterdir() if path.is_dir())})


def remove_unfinished(growing: Path, name: str) -> None:
    """Remove what a build that was killed has left, and nothing else."""
    if not os.path.lexists(growing):
        return
    if not growing.is_dir() or any(path.name not in (name, "downloads", "replaced") for path in visible(growing)):
        raise FileExistsError(f"{growing} is in the way, and is not what a build leaves: move it")
    shutil.rmtree(growing)


def exchange(new: Path, final: Path, old: Path) -> None:
    """Move a folder to its final place, and what was there to `old`; after an error, back again."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.replace(old)
    try:
        new.replace(final)
    except BaseException:
        if old.exists():
            old.replace(final)
        raise


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of each file that SHA256SUMS lists."""
    lines = (line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines())
    return {name: checksum for checksum, _, name in lines}
