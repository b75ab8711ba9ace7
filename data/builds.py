"""Builds of TFDS data sets in ArrayRecord shards, with checksums: written, checked, found and opened alike.

A build appears at its place whole or not at all: it is written to `<out>.incomplete`, checksums last, and then renamed.
"""

import bisect
import contextlib
import hashlib
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import tensorflow_datasets as tfds

from data import build_folder
from data.build_folder import CHECKSUMS
from data.files import expanded, visible

REPORT = "report.json"
_PROGRAMS = {"pfam": "build_pfam.py", "sequences": "build_sequences.py"}  # of scripts/, by the name of the builder


@runtime_checkable
class Builder(Protocol):
    """TFDS builder that writes files of its own beside the shards."""

    name: str
    data_dir: Any

    def download_and_prepare(self, **options: Any) -> None: ...
    def finish(self) -> None: ...  # writes these files, when the shards are whole


B = TypeVar("B", bound=Builder)


def build(
    name: str,
    make: Callable[..., B],
    out: str | Path,
    inputs: tuple[str, ...],
    table: str = "",
    *,
    overwrite: bool = False,
    download_dir: str | Path | None = None,
    num_shards: int | None = None,
    **config: Any,
) -> B:
    """Build the shards in `out`/`name` by the builder that `make(data_dir=)` returns, and return the builder.

    `inputs` and `table` are the files that it reads; `config` goes to tfds.download.DownloadConfig (beam_options, for
    example). Raises FileExistsError if `out` has a data set and `overwrite` is off, or holds something else at the
    place of the data set, which is never deleted. No error changes `out`.
    """
    out = Path(expanded(out)).resolve()
    if not out.name:
        raise ValueError(f"out={out} is the root of all folders: give another folder")
    final, growing = out / name, out.with_name(out.name + ".incomplete")
    build_folder.check_inputs(inputs, table, out)
    build_folder.check_place(out, final, overwrite)
    build_folder.remove_unfinished(growing, name)
    missing = [folder for folder in growing.parents if not folder.exists()]
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        growing.mkdir(parents=True)
        prepared = make(data_dir=str(growing))
        prepared.download_and_prepare(
            download_dir=expanded(download_dir or growing / "downloads"),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards, **config),
        )
        prepared.finish()
        folder = Path(prepared.data_dir)
        (folder / CHECKSUMS).write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in _listed(folder)))
        build_folder.exchange(growing / name, final, growing / "replaced")
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()
        raise
    shutil.rmtree(growing, ignore_errors=True)
    return prepared


def verify(data_dir: str | Path) -> str:
    """Check every file of a data set against its SHA256SUMS; return a line that says what was checked.

    Raises ValueError if files are missing, changed or unknown, and FileNotFoundError if `data_dir` holds no data set.
    """
    folder = find_dataset(data_dir)
    expected = build_folder.read_checksums(folder)
    found = {path.name: _sha256(path) for path in _listed(folder)}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        names = ", ".join(wrong)
        raise ValueError(f"{folder}: missing, changed or unknown files: {names}; build or copy the data again")
    splits = tfds.builder_from_directory(str(folder)).info.splits.values()
    shards, records = (sum(getattr(split, name) for split in splits) for name in ("num_shards", "num_examples"))
    size = sum((folder / name).stat().st_size for name in found)
    counts = f"{len(splits)} splits, {shards} shards, {records:,} records, {size:,} bytes"
    return f"{folder}: {counts}: all {len(found)} files have their checksums"


def find_dataset(data_dir: str | Path, name: str = "pfam") -> Path:
    """Return the one folder below `data_dir` that holds a finished data set; `name` says in errors which is wanted."""
    data_dir, program = Path(expanded(data_dir)), f"scripts/{_PROGRAMS[name]}"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data.dir={data_dir} is not a folder; build one with {program} --out {data_dir}")
    # The checksums are written last: a folder without them is of a build that was killed.
    found = (path.parent for path in data_dir.rglob(CHECKSUMS) if path.with_name("dataset_info.json").is_file())
    hidden = (".", "__MACOSX")  # beginnings of names
    folders = sorted(p for p in found if not any(part.startswith(hidden) for part in p.relative_to(data_dir).parts))
    if not folders:
        raise FileNotFoundError(f"data.dir={data_dir} holds no data set; build one with {program}")
    if len(folders) > 1:
        raise ValueError(f"data.dir={data_dir} holds several data sets, choose one: {', '.join(map(str, folders))}")
    return folders[0]


class NoSplitError(ValueError):
    """A data set has no records in a split."""


class Shards:
    """Records of one split of a data set, and their places.

    wanted: A feature of the records. Raises FileNotFoundError or ValueError if folder, split, feature or shard is not
    there.
    """

    def __init__(self, folder: Path, split: str, wanted: str):
        try:
            dataset = tfds.builder_from_directory(str(folder))
            features = dataset.info.features.keys()
        except Exception as error:  # of json or protobuf, depending on the damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{folder} cannot be read ({reason}); build or copy the data again") from error
        if wanted not in features:
            raise ValueError(
                f"data.dir: the records of {folder} hold {', '.join(features)}, and {wanted} is needed: alignments are "
                "built by scripts/build_pfam.py, sequences by scripts/build_sequences.py"
            )
        if split not in dataset.info.splits:
            raise NoSplitError(
                f"split {split!r} is empty in {folder}; it has {', '.join(dataset.info.splits)}: add data"
            )
        self.info = dataset.info.splits[split]
        self.paths = [Path(path) for path in self.info.filepaths]
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} is missing; build or copy the data again")
        self.records = dataset.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        """Return shard, and number of the record in it, for messages."""
        ends = list(itertools.accumulate(self.info.shard_lengths))
        shard = bisect.bisect_right(ends, index)
        return f"{self.paths[shard]}, record {index - (ends[shard - 1] if shard else 0)}"


def _listed(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_file() and path.name != CHECKSUMS]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
