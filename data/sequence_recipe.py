"""Input of a build of sequences: which are kept, in which split each is, and what a report counts.

Splits depend on a hash of a cluster's name alone, so a cluster is in the same split of each data set. Clusters are
sequences themselves, as where the input holds one representative of each, or come from a table.
"""

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from data import fasta, vocab
from data.files import DAMAGED, STANDARD_STREAM, display_name, expanded, open_unpacked

SPLITS = ("train", "validation", "test_ood")
SALT = "sequences-0"
_TRAIN_SHARE, _VALIDATION_SHARE = 0.96, 0.02  # of the clusters; the rest is test_ood
BUCKETS = (64, 128, 256, 512, 1024, 2048)
MIN_LENGTH = 30
_COLUMNS = "'representative<tab>member'"  # of the table of clusters


class Sequence(NamedTuple):
    """One sequence, or a piece of a long one."""

    name: str  # of a piece with its residues, counted from 1: P12345/1-2000
    tokens: UInt8[np.ndarray, " length"]


@dataclass(frozen=True)
class Recipe:
    """Input and options of a build of sequences."""

    inputs: tuple[str, ...]  # FASTA files, plain or packed
    clusters: str = ""  # table of lines `representative<tab>member`; "": each sequence is a cluster
    buckets: tuple[int, ...] = BUCKETS  # lengths; a record holds sequences of one
    min_length: int = MIN_LENGTH  # shorter sequences are left out
    skip_bad: bool = False  # list malformed sequences in the report instead of stopping at the first
    num_shards: int | None = None  # of every split; by default it follows from the size

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(map(expanded, self.inputs)))
        object.__setattr__(self, "clusters", expanded(self.clusters))
        buckets = tuple(self.buckets)
        if not self.inputs:
            raise ValueError("inputs: none was given; a build needs FASTA files")
        if STANDARD_STREAM in self.inputs:
            raise ValueError("inputs: '-' (standard input) can be read once, a build reads again: save it as a file")
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets={buckets}: allowed are lengths of at least 1 in ascending order: 64 128 256")
        if not 1 <= self.min_length <= buckets[-1]:
            raise ValueError(f"min_length={self.min_length}: allowed is 1 to the largest bucket, {buckets[-1]}")
        if self.num_shards is not None and self.num_shards < 1:
            raise ValueError(
                f"num_shards={self.num_shards}: a split has at least 1; by default it follows from the size"
            )


@dataclass
class Report:
    """Result of a build: what was read, and what each split holds."""

    read: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # sequences, pieces included, and residues
    records: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # messages about malformed sequences

    def summary(self) -> str:
        """Return a line that says what was read and left out."""
        n, unknown = Counter(self.read), ", ".join(vocab.AMBIGUOUS)
        files = f"{n['files']:,} file{'s' * (n['files'] != 1)}: {n['sequences']:,} sequences"
        residues = f"{n['residues']:,} residues, {n['unknown_letters']:,} of them unknown ({unknown})"
        kinds = {"malformed": "malformed", "short": "too short", "again": "there before"}
        out = ", ".join(f"{n[kind]:,} {told}" for kind, told in kinds.items())
        cut = f"; {n['long']:,} long ones cut into {n['pieces']:,} pieces" if n["long"] else ""
        return f"read {files}, {residues}; left out: {out}{cut}"


class Survey:
    """Everything that is known of the input after it was read once: which records are left out.

    Memory holds a hash of every name and of every sequence, some 200 bytes for a sequence, and the table of clusters.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.clusters = read_clusters(recipe.clusters) if recipe.clusters else {}
        self.left_out: set[tuple[int, int]] = set()  # number of the input, and of the record in it
        self._names, self._sequences = set[int](), set[int]()

    @classmethod
    def of(cls, recipe: Recipe, report: Report) -> "Survey":
        """Read all input, fill the report, and raise ValueError if nothing is left or a sequence is malformed."""
        survey, read = cls(recipe), Counter[str](files=len(recipe.inputs))
        splits = {split: Counter[str]() for split in SPLITS}
        for place, record in survey._records("Reading"):
            try:
                tokens = fasta.tokens_of(record)
                why = survey._reason(record, tokens)
            except ValueError as error:
                told = f"{display_name(recipe.inputs[place[0]])}, record {record.number} ({record.name}): {error}"
                if not recipe.skip_bad:
                    raise ValueError(told) from error
                report.skipped.append(told)
                tokens, why = np.zeros(0, np.uint8), "malformed"
            read.update(sequences=1, residues=len(tokens), unknown_letters=int((tokens == vocab.X).sum()))
            if why:
                read[why] += 1
                survey.left_out.add(place)
                continue
            pieces = cut(record.name, tokens, recipe.buckets[-1])
            read["known_to_clusters"] += record.name in survey.clusters
            if len(pieces) > 1:
                read.update(long=1, pieces=len(pieces))
            splits[survey.split_of(record.name)].update(sequences=len(pieces), residues=len(tokens))
        report.read, report.splits = dict(read), {split: dict(found) for split, found in splits.items() if found}
        survey._check(report)
        return survey

    def sequences(self, split: str) -> Iterator[Sequence]:
        """Read the input again; yield the sequences of a split."""
        for place, record in self._records(None):
            if place not in self.left_out and self.split_of(record.name) == split:
                yield from cut(record.name, fasta.tokens_of(record), self.recipe.buckets[-1])

    def split_of(self, name: str) -> str:
        """Return the split of a sequence's cluster."""
        return split_of(self.clusters.get(name, name))

    def _records(self, told: str | None) -> Iterator[tuple[tuple[int, int], fasta.Record]]:
        for i, path in enumerate(self.recipe.inputs):
            records = fasta.read(path)
            for record in tqdm(records, told, unit=" sequences", mininterval=1.0, disable=None if told else True):
                yield (i, record.number), record

    def _reason(self, record: fasta.Record, tokens: UInt8[np.ndarray, " length"]) -> str:
        """Return why a sequence is left out, "" for not. Raises ValueError for a name of another sequence."""
        if len(tokens) < self.recipe.min_length:
            return "short"
        if (sequence := _hash(tokens.tobytes())) in self._sequences:
            return "again"
        if (name := _hash(record.name.encode())) in self._names:
            raise ValueError("this name has occurred before, of another sequence; give each sequence its own")
        self._sequences.add(sequence)
        self._names.add(name)
        return ""

    def _check(self, report: Report) -> None:
        read = Counter(report.read)
        if not report.splits:
            first = f"; the first malformed one: {report.skipped[0]}" if report.skipped else ""
            raise ValueError(f"no sequence to write: {report.summary()}{first}")
        kept = read["sequences"] - sum(read[why] for why in ("malformed", "short", "again"))
        if not self.clusters or 2 * read["known_to_clusters"] >= kept:
            return
        member, representative = next(iter(self.clusters.items()))
        told = (
            f"clusters: the table knows {read['known_to_clusters']} of the {kept} sequences; its first line has the "
            f"representative {representative!r} and the member {member!r}"
        )
        if not read["known_to_clusters"]:
            raise ValueError(f"{told}: give the table of these sequences")
        warnings.warn(f"{told}: each other sequence is a cluster of its own", stacklevel=2)


def split_of(cluster: str) -> str:
    """Return 'train', 'validation' or 'test_ood' for a cluster, in shares of 96, 2 and 2 %."""
    share = int.from_bytes(hashlib.sha256(f"{SALT}\0{cluster}".encode()).digest()[:8], "big") / 2**64
    if share < _TRAIN_SHARE:
        return "train"
    return "validation" if share < _TRAIN_SHARE + _VALIDATION_SHARE else "test_ood"


def cut(name: str, tokens: UInt8[np.ndarray, " length"], longest: int) -> list[Sequence]:
    """Cut a sequence into as few pieces as fit, of about one length; a piece's name has its residues, from 1."""
    count = -(-len(tokens) // longest)
    if count == 1:
        return [Sequence(name, tokens)]
    ends = np.linspace(0, len(tokens), count + 1).astype(int)
    return [Sequence(f"{name}/{a + 1}-{b}", tokens[a:b]) for a, b in itertools.pairwise(ends)]


def read_clusters(path: str) -> dict[str, str]:
    """Read lines `representative<tab>member`, as MMseqs2's createtsv writes them, as member -> representative.

    Raises ValueError, with file and line, for another line, and for a member of two clusters.
    """
    name, clusters = display_name(path), dict[str, str]()
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(file, start=1):
                fields = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
                if not line.strip():
                    continue
                if len(fields) != 2 or not all(fields):
                    raise ValueError(f"{name}, line {number}: expected {_COLUMNS}, found {line[:60]!r}")
                if clusters.setdefault(fields[1], fields[0]) != fields[0]:
                    raise ValueError(f"{name}, line {number}: {fields[1]!r} is a member of two clusters")
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{name} is truncated or corrupt ({error}); fetch it again") from error
    if not clusters:
        raise ValueError(f"{name} has no line: expected {_COLUMNS}")
    return clusters


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "big")
