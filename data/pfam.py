"""Pfam as a TFDS data set in ArrayRecord shards, one record a family. Neither writing nor reading needs TensorFlow.

    build(Recipe(inputs=("Pfam-A.seed.gz",), clans="Pfam-A.clans.tsv.gz"), "runs/pfam")
    families = open_split("runs/pfam", "train")     # families[i] is a Family

data/builds.py has what this data set shares with others.
"""

import functools
import json
import operator
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import ClassVar, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from data import builds
from data.builds import REPORT, find_dataset
from data.families import SALT, SPLITS, BadRecordError, Family, read_clans
from data.files import expanded
from data.index import SplitIndex
from data.recipe import Candidate, Place, Recipe, Report, candidate, choose, counts, read_inputs
from data.spool import Piece, Spool

RECORDS = "records.json"  # split -> accessions in the order of its records, to name a record that is damaged
_TEXTS = "accession", "name", "clan"


class Pfam(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the splits that data/families.py describes."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "Splits by clan, held-out sequences, fixed evaluation pairs.",
        "1.1.0": "insert_states: whether lower case marks insert states. Records of 1.0.0 lack it: False.",
    }
    code_path = None  # with a path, TFDS looks for a checksum file through a package that it does not declare

    def __init__(self, *, recipe: Recipe, **kwargs):
        super().__init__(file_format="array_record", **kwargs)
        self.recipe = recipe
        self.report = Report()

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in _TEXTS}
        arrays = {
            "rows": tfds.features.Tensor(shape=(None,), dtype=np.str_),
            "alignment": tfds.features.Tensor(shape=(None, None), dtype=np.uint8, encoding="zlib"),
            "pairs": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
            "insert_states": tfds.features.Scalar(dtype=np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pfam alignments, one record a family, split by clan (train, validation, test_ood); "
            f"test_iid holds sequences withheld from the training families. Split salt: {SALT}.",
            features=tfds.features.FeaturesDict(texts | arrays),
            homepage="https://www.ebi.ac.uk/interpro/entry/pfam/",
            license="CC0 1.0",
            citation="Mistry et al., Pfam: The protein families database in 2021, Nucleic Acids Res. 49, D412 (2021)",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        inputs, clans = self.local_input(dl_manager)
        spool = Spool(Path(self.data_dir))
        kept = self.survey(inputs, clans, spool)
        self.report.check(clans, sum(map(len, kept.values())))
        sizes = {split: len(pieces) for split, pieces in kept.items()}
        num_shards = self.recipe.num_shards or 1
        for split, size in sizes.items():
            if num_shards > size:
                raise ValueError(f"num_shards={num_shards}: split {split} has {size} records; ask for fewer")
        # TFDS cannot write a split without records.
        return {split: self._generate_examples(spool, kept[split]) for split in SPLITS if split in kept}

    def local_input(self, dl_manager: tfds.download.DownloadManager) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the Stockholm files and the clan of each accession; downloads both if the recipe names a release."""
        recipe = self.recipe
        if not recipe.release:
            return recipe.inputs, read_clans(recipe.clans) if recipe.clans else {}
        folder = f"{recipe.mirror.rstrip('/')}/Pfam{recipe.release}"
        urls = {name: f"{folder}/{name}" for name in ("Pfam-A.seed.gz", "Pfam-A.clans.tsv.gz")}
        try:
            files = dl_manager.download(urls)
        except tfds.download.DownloadError as error:
            raise OSError(f"{error} Check release={recipe.release!r} and mirror={recipe.mirror!r}") from error
        return (str(files["Pfam-A.seed.gz"]),), read_clans(str(files["Pfam-A.clans.tsv.gz"]))

    def survey(self, inputs: tuple[str, ...], clans: dict[str, str], spool: Spool) -> dict[str, list[Piece]]:
        """Read all input, once, and put its records into the spool; return those to keep, by split."""
        candidates: dict[str, list[Candidate]] = {}
        pieces: dict[Place, dict[str, Piece]] = {}
        read = Counter(files=len(inputs))
        placed = read_inputs(inputs, clans, self.recipe, self.report.skipped.append)
        for place, family in tqdm(placed, desc="Reading families", unit=" families", mininterval=1.0, disable=None):
            records = dict(self.recipe.records(family))
            found = candidate(place, inputs[place[0]], family, tuple(records), clans, self.recipe)
            pieces[place] = {split: spool.add(record) for split, record in records.items()}
            read.update(counts(found))
            candidates.setdefault(family.accession, []).append(found)
        self.report.read = dict(read)
        kept: dict[str, list[Piece]] = {}
        for same in candidates.values():
            best, left_out = choose(same)
            self.report.dropped += left_out
            for split, piece in pieces[best.place].items() if best else ():
                kept.setdefault(split, []).append(piece)
        return kept

    def _generate_examples(self, spool: Spool, pieces: list[Piece]) -> Iterator[tuple[str, dict]]:
        for piece in pieces:
            family = spool.read(piece)
            yield family.accession, to_example(family)

    def finish(self) -> None:
        """Write the report, and the accessions of all records."""
        accessions, folder = _accessions(self), Path(self.data_dir)
        self.report.records = {split: len(names) for split, names in accessions.items()}
        (folder / REPORT).write_text(json.dumps(asdict(self.report), indent=1) + "\n")
        (folder / RECORDS).write_text(json.dumps(accessions, indent=1) + "\n")


def _accessions(prepared: Pfam) -> dict[str, list[str]]:
    """Return the accessions of each split in the order of its records."""
    packed = {"alignment": tfds.decode.SkipDecoding()}
    return {
        split: [example["accession"].decode() for example in prepared.as_data_source(split=split, decoders=packed)]
        for split in prepared.info.splits
    }


def to_example(family: Family) -> dict:
    """Return a record as `Pfam` writes it."""
    example = {f.name: getattr(family, f.name) for f in fields(family)}
    return {**example, "rows": np.array(family.rows, dtype=object)}


def from_record(record: bytes) -> Family:
    """Read a record as `Pfam` writes it.

    TFDS's own decoder of the same message takes three times as long, more than all the rest of a batch.
    """
    features = tf_example_pb2.Example.FromString(record).features.feature
    text = {name: features[name].bytes_list.value[0].decode() for name in _TEXTS}
    symbols = zlib.decompress(features["alignment/value"].bytes_list.value[0])
    return Family(
        **text,
        rows=tuple(name.decode() for name in features["rows"].bytes_list.value),
        alignment=np.frombuffer(symbols, np.uint8).reshape(features["alignment/shape"].int64_list.value),
        pairs=np.array(features["pairs"].int64_list.value, np.int32).reshape(-1, 2),
        insert_states=any(features["insert_states"].int64_list.value),  # records of version 1.0.0 have none
    )


def build(
    recipe: Recipe,
    out: str | Path,
    *,
    download_dir: str | Path | None = None,
    builder: type[Pfam] = Pfam,
    **options,
) -> Report:
    """Build the shards in `out`/pfam, as `builds.build`, which takes the other options."""
    kept = Path(expanded(out)).resolve()
    downloads = download_dir or (kept.with_name(kept.name + ".downloads") if recipe.release else None)
    make = functools.partial(builder, recipe=recipe)
    options |= {"num_shards": recipe.num_shards, "download_dir": downloads}
    report = builds.build(builder.name, make, out, recipe.inputs, recipe.clans, **options).report
    if "train" in report.records:
        SplitIndex.of(open_split(out, "train"))  # a large one is kept, so that training need not read all records
    return report


class FamilySource:
    """Random access to the families of one split: len(), [i], picklable, as Grain needs it. Made by `open_split`."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.shards = builds.Shards(folder, split, "alignment")
        self.shard_paths = self.shards.paths
        self._records = ArrayRecordDataSource(self.shards.info.file_instructions)  # opens no shard yet
        listed = folder / RECORDS  # data sets of early versions have none
        try:
            self.accessions: list[str] = json.loads(listed.read_text())[split] if listed.exists() else []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{listed} is damaged ({error!r}); build or copy the data again") from error

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: SupportsIndex) -> Family:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: split {self.split!r} has {len(self)} families")
        try:
            family = from_record(self._records[index])
        except Exception as error:  # of Riegeli, zlib or protobuf, depending on the damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise BadRecordError(f"{self.place(index)} is damaged ({reason})") from error
        expected = self.accessions[index] if self.accessions else family.accession
        if family.accession != expected:
            raise BadRecordError(f"{self.place(index)} holds {family.accession}: the shard is of another build")
        return family

    def place(self, index: int) -> str:
        """Return shard, number of the record in it and family, for messages."""
        family = self.accessions[index] if self.accessions else f"number {index} of {self.split}"
        return f"{self.shards.place(index)}, family {family}"

    def __reduce__(self):
        return FamilySource, (self.folder, self.split)


def open_split(data_dir: str | Path, split: str) -> FamilySource:
    """Open the families of one split of the data set below `data_dir`.

    Raises FileNotFoundError if there is no such folder, or no data set or shard in it, and ValueError for an unknown
    split, a split without families, or several data sets.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    return FamilySource(find_dataset(data_dir), split)
