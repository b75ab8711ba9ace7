"""Facts about all rows of a split that sampling needs; counted once, and kept beside the shards."""

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy
from jaxtyping import Float32, Int32, Int64
from safetensors import SafetensorError, safe_open

from data import files, vocab
from data.families import BadRecordError, Family
from data.transforms import IDENTITY_EDGES, identities

_VERSION = 1  # of the file's content
_SAMPLED = 64  # pairs of a family, whose identities are measured
_KEPT_FROM = 2.0  # seconds of counting from which on the result is kept
_ARRAYS, _TEXTS = ("lengths", "rows", "units", "identity"), ("unit_names", "bad", "content")


@runtime_checkable
class Families(Protocol):
    """The families of one split by index, for example a list. Must be picklable if there are worker processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Family: ...


@runtime_checkable
class Stored(Families, Protocol):
    """The families of a data set on a disk."""

    folder: Path
    split: str
    shard_paths: list[Path]


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """Row lengths, clans and identities of all families of a split, in order."""

    lengths: Int32[np.ndarray, " rows"]  # residues of every row, family after family
    rows: Int64[np.ndarray, " families"]  # rows of every family; none of a damaged one
    units: Int64[np.ndarray, " families"]  # place of its clan, or of its accession if it has none, in `unit_names`
    unit_names: tuple[str, ...]
    identity: Float32[np.ndarray, "families bins"]  # share of its pairs in each bin of IDENTITY_EDGES, estimated
    bad: tuple[str, ...]  # a message for each damaged record
    content: str  # hash of all alignments in order

    @classmethod
    def of(cls, families: Families, max_bad: int = 0) -> "SplitIndex":
        """Read the index that is kept beside the shards, or count, and keep it where that took long.

        Raises ValueError if there is no family, and BadRecordError if more than max_bad records are damaged.
        """
        if not len(families):
            raise ValueError("families: the split is empty; training needs at least one family")
        path, fingerprint = _place(families)
        found = _kept(path, fingerprint) if path else None
        if found is None:
            began = time.monotonic()
            found = cls.counted(families, max_bad)
            if path and time.monotonic() - began >= _KEPT_FROM:
                found.keep(path, fingerprint)
        for n, message in enumerate(found.bad):
            _check_bad(n + 1, max_bad, message)
        return found

    @classmethod
    def counted(cls, families: Families, max_bad: int = 0) -> "SplitIndex":
        """Count the index anew; reads every family once."""
        bad: list[str] = []
        digest = hashlib.sha256()
        lengths, identity, names = [], [], []
        for family in readable(families, max_bad, bad):
            digest.update(b"damaged" if family is None else _packed(family))
            lengths.append(np.zeros(0, np.int64) if family is None else row_lengths(family))
            identity.append(_identity_shares(family))
            names.append("" if family is None else family.unit)
        unit_names, units = np.unique(names, return_inverse=True)
        return cls(
            lengths=np.concatenate(lengths).astype(np.int32),
            rows=np.array([len(of_family) for of_family in lengths]),
            units=units,
            unit_names=tuple(unit_names.tolist()),
            identity=np.stack(identity),
            bad=tuple(bad),
            content=digest.hexdigest()[:16],
        )

    def keep(self, path: Path, fingerprint: str) -> None:
        """Write the index; warn if nothing can be written there."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        texts = {name: json.dumps(getattr(self, name)) for name in _TEXTS}
        try:
            with files.finished(path, "wb") as file:
                file.write(safetensors.numpy.save(arrays, metadata=texts | {"fingerprint": fingerprint}))
        except OSError as error:
            warnings.warn(f"the index of the data cannot be kept, each start counts it again: {error}", stacklevel=3)


def readable(families: Families, max_bad: int, bad: list[str]) -> Iterator[Family | None]:
    """Yield all families in order, None for a damaged record, whose message is appended to `bad`.

    Raises BadRecordError if more than max_bad records are damaged.
    """
    for n in range(len(families)):
        try:
            yield families[n]
        except BadRecordError as error:
            bad.append(str(error))
            _check_bad(len(bad), max_bad, str(error))
            yield None


def row_lengths(family: Family) -> Int64[np.ndarray, " rows"]:
    """Return the number of residues of every row."""
    return vocab.is_residue(family.alignment).sum(axis=1)


def _check_bad(count: int, max_bad: int, message: str) -> None:
    if count > max_bad:
        advice = "build or copy the data again, or leave such records out with a data.max_bad_records above"
        raise BadRecordError(f"{message}; {advice} {max_bad}")


def _place(families: Families) -> tuple[Path | None, str]:
    """Return the file of the index of a split of a data set, and a hash of the shards' sums, sizes and times."""
    if not isinstance(families, Stored):
        return None, ""
    shards = [path.stat() for path in families.shard_paths]
    sums = (families.folder / "SHA256SUMS").read_bytes()
    facts = repr((_VERSION, _SAMPLED, IDENTITY_EDGES, [(shard.st_size, shard.st_mtime_ns) for shard in shards]))
    return families.folder / f".index-{families.split}.safetensors", hashlib.sha256(sums + facts.encode()).hexdigest()


def _kept(path: Path, fingerprint: str) -> SplitIndex | None:
    """Read an index; None if there is none, it is damaged, or it is of other shards."""
    try:
        with safe_open(path, framework="numpy") as stored:
            header = stored.metadata() or {}
            if header["fingerprint"] != fingerprint:
                return None
            fields: dict[str, Any] = {name: stored.get_tensor(name) for name in _ARRAYS}
            fields |= {name: json.loads(header[name]) for name in _TEXTS}
        return SplitIndex(**fields | {name: tuple(fields[name]) for name in ("unit_names", "bad")})
    except (OSError, ValueError, KeyError, SafetensorError):  # what cannot be read is counted again
        return None


def _packed(family: Family) -> bytes:
    """Return all that pairs of a family are made of."""
    kind = b"insert states" if family.insert_states else b""
    return kind + repr(family.alignment.shape).encode() + family.alignment.tobytes()


def _identity_shares(family: Family | None) -> Float32[np.ndarray, " bins"]:
    """Estimate the share of a family's pairs in each identity bin; pairs without an alignment are in none."""
    bins = len(IDENTITY_EDGES) + 1
    if family is None or len(family.alignment) < 2:
        return np.zeros(bins, np.float32)
    rows = _sampled_rows(family.accession, len(family.alignment))
    found = identities(family.alignment, rows, family.insert_states)
    found = np.searchsorted(IDENTITY_EDGES, found[~np.isnan(found)], side="right")
    return (np.bincount(found, minlength=bins) / len(rows)).astype(np.float32)


def _sampled_rows(accession: str, rows: int) -> Int64[np.ndarray, "pairs 2"]:
    """Return all pairs of rows if there are few, else random ones."""
    if rows * (rows - 1) // 2 <= _SAMPLED:
        return np.stack(np.triu_indices(rows, 1), axis=1)
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(accession.encode()).digest(), np.uint32))
    first = rng.integers(0, rows, _SAMPLED)
    return np.stack([first, (first + rng.integers(1, rows, _SAMPLED)) % rows], axis=1)
