"""Families, their split by clan, the held-out sequences of the training families, and the fixed evaluation pairs.

Every choice is a hash of names and sequences, never of order or of what else is in the data: a family keeps its split,
and a sequence its side, whatever it is built together with.
"""

import gzip
import hashlib
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from data.stockholm import Alignment
from data.vocab import GAPS, is_residue

SPLITS = ("train", "validation", "test_iid", "test_ood")
# Chosen once, before anything was trained: the first of "pfam-0", "pfam-1", ... with which validation and test_ood of
# the default data each have two families of 15 evaluation pairs. Another salt is another split of everything.
SALT = "pfam-5"
TRAIN_SHARE, VALIDATION_SHARE = 0.80, 0.05  # the rest is test_ood
HELD_OUT_SHARE = 0.15  # of the sequences of a training family
MIN_SEQUENCES_TO_HOLD_OUT = 10
PAIRS_PER_FAMILY = 15
MAX_CLANS_BYTES = 1 << 28  # that of Pfam 37 has 2 MB


class BadRecordError(ValueError):
    """A record of a data set is damaged; the message names shard, record and family."""


@dataclass(frozen=True, eq=False)
class Family:
    """One family of one split.

    accession has no version; clan is "" for none; rows are the row names; alignment holds ASCII exactly as in the file;
    pairs are row indices, the fixed evaluation pairs, and empty in the training split.
    """

    accession: str
    name: str
    clan: str
    rows: tuple[str, ...] = field(repr=False)
    alignment: UInt8[np.ndarray, "rows columns"] = field(repr=False)
    pairs: Int32[np.ndarray, "pairs 2"] = field(repr=False)

    @property
    def unit(self) -> str:
        """What is never divided between splits: the clan, or the family itself where it has none."""
        return self.clan or self.accession


def accession_of(alignment: Alignment) -> str:
    """'PF08975' of '#=GF AC PF08975.5'; a record without AC goes by its ID, one without both is refused."""
    name = (alignment.feature("AC") or alignment.feature("ID") or "").strip().rstrip(";").split(".")[0]
    if not name:
        raise ValueError(f"the alignment of {alignment.ids[0]!r} has neither '#=GF AC' nor '#=GF ID'; give it one")
    return name


def from_alignment(alignment: Alignment, clans: dict[str, str]) -> Family:
    accession = accession_of(alignment)
    return Family(
        accession=accession,
        name=(alignment.feature("ID") or accession).strip(),
        clan=clans.get(accession, ""),
        rows=alignment.ids,
        alignment=alignment.rows,
        pairs=np.zeros((0, 2), np.int32),
    )


def read_clans(path: str | Path) -> dict[str, str]:
    """Accession -> clan of Pfam-A.clans.tsv, plain or gzip; "" for a family without clan."""
    with Path(path).open("rb") as file:
        compressed = file.peek(2)[:2] == b"\x1f\x8b"
        try:
            raw = (gzip.GzipFile(fileobj=file) if compressed else file).read(MAX_CLANS_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again") from error
    if len(raw) > MAX_CLANS_BYTES:
        raise ValueError(f"{path} has more than {MAX_CLANS_BYTES} bytes (unpacked): is it the table of clans?")
    text = raw.decode("latin-1")
    clans = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number}: expected 'accession<tab>clan<tab>...', found {line[:60]!r}")
        clans[fields[0].split(".")[0]] = "" if fields[1] == "\\N" else fields[1]  # \N: the dump's NULL
    return clans


def split_of(unit: str) -> str:
    """'train', 'validation' or 'test_ood' for a clan or an accession, in shares of 80, 5 and 15 %."""
    share = _hash_share(unit)
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test_ood"


def limit_rows(family: Family, max_rows: int | None) -> Family:
    """At most `max_rows` rows, in file order: those with the smallest hash, so that the choice is stable."""
    if max_rows is None or len(family.rows) <= max_rows:
        return family
    hashes = [_hash_share(family.accession, name) for name in family.rows]
    return _with_rows(family, np.sort(np.argsort(hashes, kind="stable")[:max_rows]))


def split_records(
    family: Family, *, evaluation_only: bool = False, pairs: int = PAIRS_PER_FAMILY
) -> Iterator[tuple[str, Family]]:
    """The (split, record) that one family gives: none (no two rows with an aligned residue), one or two.

    A training family gives up part of its sequences to 'test_iid'. The `train` record has no evaluation pairs, others
    have at most `pairs`. With `evaluation_only` every family goes to 'test_ood' whole.
    """
    split = "test_ood" if evaluation_only else split_of(family.unit)
    if split != "train":
        records = [(split, family)]
    else:
        held_out = held_out_rows(family)
        records = [("train", _with_rows(family, np.flatnonzero(~held_out)))]
        if held_out.any():
            records.append(("test_iid", _with_rows(family, np.flatnonzero(held_out))))
    for split, record in records:
        found = evaluation_pairs(record, pairs)
        if not len(found):
            return  # also ends a training family before its test_iid: those families must have been seen in training
        yield split, record if split == "train" else replace(record, pairs=found)


def held_out_rows(family: Family) -> Bool[np.ndarray, " rows"]:
    """Which rows of a training family are kept for 'test_iid'. Rows of equal sequence fall on the same side."""
    sequences = [ungapped(row) for row in family.alignment]
    distinct = set(sequences)
    held = {s for s in distinct if _hash_share(family.accession, s) >= 1 - HELD_OUT_SHARE}
    enough = len(distinct) >= MIN_SEQUENCES_TO_HOLD_OUT and min(len(held), len(distinct) - len(held)) >= 2
    return np.array([enough and s in held for s in sequences], bool)


def evaluation_pairs(family: Family, cap: int = PAIRS_PER_FAMILY) -> Int32[np.ndarray, "pairs 2"]:
    """At most `cap` row pairs i < j that share an aligned residue, drawn without replacement, seeded by the accession.

    Gives up after 100 * cap different draws: thousands of fragments may have millions of pairs without overlap.
    """
    residue = is_residue(family.alignment)
    count = len(residue)
    total = count * (count - 1) // 2
    # Only random() and its seeding are promised to stay the same in later Pythons; numpy's generators promise nothing.
    draw = random.Random(family.accession).random
    seen: set[int] = set()
    pairs: list[tuple[int, int]] = []
    while len(pairs) < cap and len(seen) < min(total, 100 * cap):
        index = int(draw() * total)
        if index in seen:
            continue
        seen.add(index)
        i, j = _pair_at(index)
        if (residue[i] & residue[j]).any():
            pairs.append((i, j))
    return np.array(pairs, np.int32).reshape(-1, 2)


def ungapped(row: UInt8[np.ndarray, " columns"]) -> str:
    """The residues of a row in upper case."""
    return row.tobytes().translate(None, GAPS).decode("ascii").upper()


def _pair_at(index: int) -> tuple[int, int]:
    """The index-th of (0,1), (0,2), (1,2), (0,3), ..."""
    j = (1 + math.isqrt(1 + 8 * index)) // 2
    return index - j * (j - 1) // 2, j


def _with_rows(family: Family, kept: Int[np.ndarray, " kept"]) -> Family:
    return replace(family, rows=tuple(family.rows[i] for i in kept), alignment=family.alignment[kept])


def _hash_share(*parts: str) -> float:
    """A number in [0, 1) that depends on SALT and the parts alone."""
    digest = hashlib.sha256("\0".join((SALT, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
