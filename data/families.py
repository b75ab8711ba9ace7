"""Families, their split by clan, the held-out sequences of the training families, and the fixed evaluation pairs.

Every choice is a hash of names and sequences. So a family keeps its split, and a sequence its side, whatever the order
of the input and whatever other families are built with it.
"""

import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from data.files import DAMAGED, display_name, open_unpacked, without_endings
from data.insert_states import check_columns
from data.other_formats import format_of
from data.stockholm import Alignment
from data.vocab import GAPS, can_be_aligned, count_letters, seem_nucleotides

SPLITS = ("train", "validation", "test_iid", "test_ood")
# Chosen once, before anything was trained: the first of "pfam-0", "pfam-1", ... with which validation and test_ood of
# the default data each have two families of 15 evaluation pairs. Another salt changes every split.
SALT = "pfam-5"
TRAIN_SHARE, VALIDATION_SHARE = 0.80, 0.05  # of the clans; the rest is test_ood
HELD_OUT_SHARE = 0.15  # of the sequences of a training family
MIN_SEQUENCES_TO_HOLD_OUT = 10
PAIRS_PER_FAMILY = 15
MAX_CLANS_BYTES = 1 << 28  # unpacked; the table of Pfam 37 has 2 MB
_VERSIONED = re.compile(r"([A-Za-z]+_?\d+)\.\d+")
_NO_CLAN = ("", "\\N", "-", "NULL", "NONE", "NA", "N/A", "NAN")  # \N is the NULL of Pfam's tables


class BadRecordError(ValueError):
    """A record of a data set is damaged; the message names shard, record and family."""


@dataclass(frozen=True, eq=False)
class Family:
    """One family of one split."""

    accession: str  # without version
    name: str
    clan: str  # "" for none
    rows: tuple[str, ...] = field(repr=False)  # row names
    alignment: UInt8[np.ndarray, "rows columns"] = field(repr=False)  # ASCII symbols as in the file
    pairs: Int32[np.ndarray, "pairs 2"] = field(repr=False)  # rows of the fixed evaluation pairs; none in training
    insert_states: bool = False  # lower case marks insert states of a profile HMM, which are aligned with nothing

    @property
    def unit(self) -> str:
        """Name of the group that is never divided between splits: the clan, or a family without clan."""
        return self.clan or self.accession


def from_alignment(
    alignment: Alignment, clans: dict[str, str], path: str = "", *, insert_states: bool = False
) -> Family:
    """Make a family without evaluation pairs; `clans` maps accessions to clans.

    Its accession is 'PF08975' for '#=GF AC PF08975.5', or the ID without AC. A record without both is named after its
    file at `path`. Raises ValueError if there is none either, if the residues are nucleotides, or if it is said to have
    insert states and a column mixes them with match states.
    """
    if insert_states:
        check_columns(alignment.rows)
    if seem_nucleotides(count_letters(alignment.rows)):
        raise ValueError("its residues are nucleotides (DNA or RNA), proteins are needed: translate or remove it")
    given = (alignment.feature(feature) or "" for feature in ("AC", "ID"))
    stripped = (text.strip().rstrip(";").rstrip() for text in given)
    accession = without_version(next(filter(None, stripped), "") or _named_after(path, alignment.number))
    if not accession:
        raise ValueError(f"the alignment of {alignment.ids[0]!r} has neither '#=GF AC' nor '#=GF ID'; give it one")
    name, no_pairs = (alignment.feature("ID") or accession).strip(), np.zeros((0, 2), np.int32)
    clan = clans.get(accession, "")
    return Family(accession, name, clan, alignment.ids, alignment.rows, no_pairs, insert_states)


def without_version(accession: str) -> str:
    """Cut the version off an accession: PF00001 of PF00001.25.

    What stays must be letters and a number, since dots are part of other names: CATH's 1.10.275.10, SCOP's a.102.
    """
    versioned = _VERSIONED.fullmatch(accession)
    return versioned[1] if versioned else accession


def _named_after(path: str, number: int) -> str:
    """Return the file's name without its endings; of a later record followed by its number, as in globins/2."""
    name = without_endings(path)
    return f"{name}/{number}" if name and number > 1 else name


def read_clans(path: str | Path) -> dict[str, str]:
    """Read Pfam-A.clans.tsv, plain or compressed, as accession -> clan; "" for a family without clan.

    Raises ValueError, with file and line, for a table without rows, a line without a clan's column, and two clans of
    one accession.
    """
    name, columns = display_name(path), "'accession<tab>clan<tab>...'"
    clans: dict[str, str] = {}
    lines = re.split(r"\r\n|\r|\n", _read_table(path))
    found = format_of(next((line for line in lines if line.strip()), ""))
    seems = f"; the file seems to be {found.name}" if found else ""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        accession, *others = (field.strip() for field in line.split("\t"))
        if not accession or not others:
            raise ValueError(f"{name}, line {number}: expected {columns}, found {line[:60]!r}{seems}")
        accession, clan = without_version(accession), "" if others[0].upper() in _NO_CLAN else others[0]
        if clans.setdefault(accession, clan) != clan:
            raise ValueError(
                f"{name}, line {number}: {accession!r} is in {clan!r} here and in {clans[accession]!r} before; "
                f"columns are {columns}, and a family has one clan: correct the table, or swap its columns"
            )
    if not clans:
        raise ValueError(f"{name} has no row: expected {columns} as in Pfam-A.clans.tsv{seems}")
    return clans


def _read_table(path: str | Path) -> str:
    name = display_name(path)
    with open_unpacked(path) as file:
        try:
            raw = file.read(MAX_CLANS_BYTES + 1)
        except DAMAGED as error:
            raise ValueError(f"{name} is truncated or corrupt ({error}); fetch it again") from error
    if len(raw) > MAX_CLANS_BYTES:
        raise ValueError(
            f"{name} has more than {MAX_CLANS_BYTES} bytes (unpacked): is it the table of clans? Give Pfam-A.clans.tsv"
        )
    return raw.decode("latin-1")


def split_of(unit: str) -> str:
    """Return 'train', 'validation' or 'test_ood' for a clan or an accession, in shares of 80, 5 and 15 %."""
    share = _hash_share(unit)
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test_ood"


def limit_rows(family: Family, max_rows: int | None) -> Family:
    """Keep the `max_rows` rows with the smallest hashes, in file order; None keeps all."""
    if max_rows is None or len(family.rows) <= max_rows:
        return family
    hashes = [_hash_share(family.accession, name) for name in family.rows]
    return _with_rows(family, np.sort(np.argsort(hashes, kind="stable")[:max_rows]))


def split_records(
    family: Family, split: str | None = None, *, pairs: int = PAIRS_PER_FAMILY
) -> Iterator[tuple[str, Family]]:
    """Yield the (split, record) that one family gives: none (no two rows share an aligned residue), one or two.

    Part of the sequences of a training family go to 'test_iid', other families are in one split whole. By default the
    clan, or the family without one, decides the split. A record has at most `pairs` evaluation pairs, a 'train' record
    none.
    """
    split = split or split_of(family.unit)
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
            return  # a family that training cannot use gives no test_iid either
        yield split, record if split == "train" else replace(record, pairs=found)


def held_out_rows(family: Family) -> Bool[np.ndarray, " rows"]:
    """Mask the rows of a training family that go to 'test_iid'. Rows of equal sequence fall on the same side."""
    sequences = [ungapped(row) for row in family.alignment]
    distinct = set(sequences)
    held = {s for s in distinct if _hash_share(family.accession, s) >= 1 - HELD_OUT_SHARE}
    enough = len(distinct) >= MIN_SEQUENCES_TO_HOLD_OUT and min(len(held), len(distinct) - len(held)) >= 2
    return np.array([enough and s in held for s in sequences], bool)


def evaluation_pairs(family: Family, cap: int = PAIRS_PER_FAMILY) -> Int32[np.ndarray, "pairs 2"]:
    """Draw at most `cap` row pairs i < j that share an aligned residue, without replacement, seeded by the accession.

    Stops after 100 * cap different draws: thousands of fragments may have millions of pairs without overlap.
    """
    aligned = can_be_aligned(family.alignment, family.insert_states)
    total = math.comb(len(aligned), 2)
    # Python promises that seeding and random() stay the same in later versions; numpy promises nothing of the kind.
    draw = random.Random(family.accession).random
    seen: set[int] = set()
    pairs: list[tuple[int, int]] = []
    while len(pairs) < cap and len(seen) < min(total, 100 * cap):
        index = int(draw() * total)
        if index in seen:
            continue
        seen.add(index)
        i, j = _pair_at(index)
        if (aligned[i] & aligned[j]).any():
            pairs.append((i, j))
    return np.array(pairs, np.int32).reshape(-1, 2)


def ungapped(row: UInt8[np.ndarray, " columns"]) -> str:
    """Return the residues of a row in upper case."""
    return row.tobytes().translate(None, GAPS).decode("ascii").upper()


def _pair_at(index: int) -> tuple[int, int]:
    """Return the index-th of (0,1), (0,2), (1,2), (0,3), ..."""
    j = (1 + math.isqrt(1 + 8 * index)) // 2
    return index - j * (j - 1) // 2, j


def _with_rows(family: Family, kept: Int[np.ndarray, " kept"]) -> Family:
    return replace(family, rows=tuple(family.rows[i] for i in kept), alignment=family.alignment[kept])


def _hash_share(*parts: str) -> float:
    """Hash SALT and the parts to a number in [0, 1)."""
    digest = hashlib.sha256("\0".join((SALT, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
