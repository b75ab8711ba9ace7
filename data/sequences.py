"""Unaligned protein sequences as a TFDS data set in ArrayRecord shards, up to 64 of like length in a record.

    build(Recipe(inputs=("swissprot.fasta.gz",)), "runs/sequences")
    sequences = open_sequences("runs/sequences", "train")     # sequences.lengths, sequences.record(0)

The lengths of all sequences, the residue counts and a hash of each split stand in one small file beside the shards.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors.numpy
import tensorflow_datasets as tfds
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import builds, vocab
from data.builds import REPORT
from data.families import BadRecordError
from data.sequence_recipe import SPLITS, Recipe, Report, Sequence, Survey

INDEX = "index.safetensors"  # by split: lengths of the sequences and sizes of the records, in order; residues; a hash
PER_RECORD = 64  # sequences
_MIXED = 4096  # sequences of one split and bucket that are shuffled together before they are put into records
_CACHED = 256  # records of a split that stay in memory, some 20 KB each


class Sequences(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the splits that data/sequence_recipe.py describes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Splits by cluster, records by length."}
    code_path = None  # with a path, TFDS looks for a checksum file through a package that it does not declare

    def __init__(self, *, recipe: Recipe, **kwargs):
        super().__init__(file_format="array_record", **kwargs)
        self.recipe, self.report = recipe, Report()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "names": tfds.features.Tensor(shape=(None,), dtype=np.str_),
            "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="zlib"),  # one after the other
        }
        description = "Protein sequences, some of like length in a record; train, validation and test_ood by cluster."
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        survey = Survey.of(self.recipe, self.report)
        # TFDS cannot write a split without records.
        return {split: self._generate_examples(survey, split) for split in SPLITS if self.report.splits.get(split)}

    def _generate_examples(self, survey: Survey, split: str) -> Iterator[tuple[str, dict]]:
        groups = _grouped(survey.sequences(split), self.recipe.buckets)
        for n, group in enumerate(tqdm(groups, f"Writing {split}", unit=" records", mininterval=1.0, disable=None)):
            names = np.array([sequence.name for sequence in group], dtype=object)
            tokens = [sequence.tokens for sequence in group]
            lengths = np.array(list(map(len, tokens)), np.int32)
            yield f"{split} {n}", {"names": names, "lengths": lengths, "tokens": np.concatenate(tokens)}

    def finish(self) -> None:
        """Write the report, and the index, from the records as they are read again."""
        arrays: dict[str, np.ndarray] = {}
        folder = Path(self.data_dir)
        for split in self.info.splits:
            index = _index(self.as_data_source(split=split))
            arrays |= {f"{split}/{name}": array for name, array in index.items()}
            self.report.records[split] = len(index["sizes"])
        (folder / INDEX).write_bytes(safetensors.numpy.save(arrays))
        (folder / REPORT).write_text(json.dumps(dataclasses.asdict(self.report), indent=1) + "\n")


def build(recipe: Recipe, out: str | Path, *, overwrite: bool = False) -> Report:
    """Build the shards in `out`/sequences, as `builds.build`."""
    make = functools.partial(Sequences, recipe=recipe)
    options: dict = {"overwrite": overwrite, "num_shards": recipe.num_shards}
    return builds.build(Sequences.name, make, out, recipe.inputs, recipe.clusters, **options).report


class SequenceSource:
    """Random access to the records of one split. Picklable. Made by `open_sequences`.

    Sequence n has `lengths[n]` residues, and is in record `np.searchsorted(first, n, "right") - 1`.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.shards = builds.Shards(folder, split, "tokens")
        try:
            with safe_open(folder / INDEX, framework="numpy") as index:
                names = ("lengths", "sizes", "residues", "content")
                found = {name: index.get_tensor(f"{split}/{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / INDEX} cannot be read ({error}); build or copy the data again") from error
        self.lengths: Int64[np.ndarray, " sequences"] = found["lengths"].astype(np.int64)
        self.first: Int64[np.ndarray, " edges"] = np.concatenate([[0], np.cumsum(found["sizes"])])
        self.residues: Int64[np.ndarray, " tokens"] = found["residues"]  # number of each token
        self.content = found["content"].tobytes().decode()  # hash of all sequences, in order
        if len(self.shards) != len(self.first) - 1 or len(self.lengths) != self.first[-1]:
            raise ValueError(f"{folder / INDEX} is of other shards; build or copy the data again")
        self.record = functools.lru_cache(_CACHED)(self._record)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> UInt8[np.ndarray, " length"]:
        """Return the tokens of one sequence. Raises BadRecordError if its record is damaged."""
        record = int(np.searchsorted(self.first, number, "right")) - 1
        return self.record(record)[number - self.first[record]]

    def _record(self, index: int) -> list[UInt8[np.ndarray, " length"]]:
        try:
            example = self.shards.records[index]
            tokens, lengths = example["tokens"], example["lengths"]
        except Exception as error:  # of Riegeli, zlib or protobuf, depending on the damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise BadRecordError(f"{self.shards.place(index)} is damaged ({reason}); build the data again") from error
        expected = self.lengths[self.first[index] : self.first[index + 1]]
        if not np.array_equal(lengths, expected) or len(tokens) != expected.sum():
            raise BadRecordError(f"{self.shards.place(index)} is not what {INDEX} lists: it is of another build")
        return np.split(tokens, np.cumsum(expected)[:-1])

    def __reduce__(self):
        return SequenceSource, (self.folder, self.split)


def open_sequences(data_dir: str | Path, split: str) -> SequenceSource:
    """Open the sequences of one split of the data set below `data_dir`.

    Raises FileNotFoundError if there is no such folder, or no data set or shard in it, and ValueError for an unknown
    split, a split without sequences, alignments, or several data sets.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the splits of sequences are {', '.join(SPLITS)}")
    return SequenceSource(builds.find_dataset(data_dir, Sequences.name), split)


def _grouped(sequences: Iterable[Sequence], buckets: tuple[int, ...]) -> Iterator[list[Sequence]]:
    """Yield groups of at most `PER_RECORD` sequences of one bucket; `_MIXED` are shuffled by a hash of their names."""
    waiting: list[list[Sequence]] = [[] for _ in buckets]
    for sequence in sequences:
        bucket = int(np.searchsorted(buckets, len(sequence.tokens)))
        waiting[bucket].append(sequence)
        if len(waiting[bucket]) == _MIXED:
            yield from _shuffled(waiting[bucket])
            waiting[bucket] = []
    for rest in waiting:
        yield from _shuffled(rest)


def _shuffled(sequences: list[Sequence]) -> Iterator[list[Sequence]]:
    order = sorted(sequences, key=lambda sequence: hashlib.sha256(sequence.name.encode()).digest())
    return (order[start : start + PER_RECORD] for start in range(0, len(order), PER_RECORD))


def _index(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """Return what `INDEX` holds of one split."""
    lengths, digest, residues = [], hashlib.sha256(), np.zeros(vocab.SIZE, np.int64)
    for record in records:
        lengths.append(record["lengths"])
        residues += np.bincount(record["tokens"], minlength=vocab.SIZE)
        digest.update(record["lengths"].tobytes() + record["tokens"].tobytes())
    sizes = np.array(list(map(len, lengths)), np.int32)
    content = np.frombuffer(digest.hexdigest()[:16].encode(), np.uint8)
    return {"lengths": np.concatenate(lengths), "sizes": sizes, "residues": residues, "content": content}
