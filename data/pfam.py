"""Pfam as a TFDS data set in ArrayRecord shards, one record a family. Neither writing nor reading needs TensorFlow.

    build(Recipe(inputs=("Pfam-A.seed.gz",), clans="Pfam-A.clans.tsv.gz"), "runs/pfam")
    families = open_split("runs/pfam", "train")     # families[i] is a Family

A build appears at its place whole or not at all: it is written to `<out>.incomplete`, checksums last, and then renamed.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import operator
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import ClassVar, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data import build_folder
from data.build_folder import CHECKSUMS
from data.families import SALT, SPLITS, BadRecordError, Family, read_clans
from data.files import expanded, visible
from data.recipe import Candidate, Place, Recipe, Report, candidate, choose, counts, read_inputs
from data.spool import Piece, Spool

RECORDS = "records.json"  # split -> accessions in the order of its records, to name a record that is damaged
REPORT = "report.json"
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
            pieces[place] = {split: spool.add(to_example(record)) for split, record in records.items()}
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
            example = spool.read(piece)
            yield example["accession"], example


def to_example(family: Family) -> dict:
    """Return a record as `Pfam` writes it."""
    example = {f.name: getattr(family, f.name) for f in fields(family)}
    return {**example, "rows": np.array(family.rows, dtype=object)}


def from_example(example: dict) -> Family:
    text = {name: example[name].decode() for name in _TEXTS}
    rows = tuple(name.decode() for name in example["rows"])
    insert_states = bool(example.get("insert_states", False))  # records of version 1.0.0 have none
    arrays = {name: example[name] for name in ("alignment", "pairs")}
    return Family(**text, rows=rows, **arrays, insert_states=insert_states)


def build(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    download_dir: str | Path | None = None,
    builder: type[Pfam] = Pfam,
    **config,
) -> Report:
    """Build the shards in `out`/pfam; `config` goes to tfds.download.DownloadConfig (beam_options, for example).

    Raises FileExistsError if `out` has a data set and `overwrite` is off, or holds something else at the place of the
    data set, which is never deleted. No error changes `out`.
    """
    out = Path(expanded(out)).resolve()
    if not out.name:
        raise ValueError(f"out={out} is the root of all folders: give another folder")
    final, growing = out / builder.name, out.with_name(out.name + ".incomplete")
    build_folder.check_inputs(recipe, out)
    build_folder.check_place(out, final, overwrite)
    build_folder.remove_unfinished(growing, builder.name)
    missing = [folder for folder in growing.parents if not folder.exists()]
    kept_downloads = out.with_name(out.name + ".downloads") if recipe.release else growing / "downloads"
    try:
        growing.mkdir(parents=True)
        prepared = builder(recipe=recipe, data_dir=str(growing))
        prepared.download_and_prepare(
            download_dir=expanded(download_dir or kept_downloads),
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False, num_shards=recipe.num_shards, **config
            ),
        )
        _finish(prepared)
        build_folder.exchange(growing / builder.name, final, growing / "replaced")
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()
        raise
    shutil.rmtree(growing, ignore_errors=True)
    return prepared.report


def _finish(prepared: Pfam) -> None:
    """Write the report, the accessions of all records and, last, the checksums."""
    packed = {"alignment": tfds.decode.SkipDecoding()}
    accessions = {
        split: [example["accession"].decode() for example in prepared.as_data_source(split=split, decoders=packed)]
        for split in prepared.info.splits
    }
    prepared.report.records = {split: len(names) for split, names in accessions.items()}
    folder = Path(prepared.data_dir)
    (folder / REPORT).write_text(json.dumps(asdict(prepared.report), indent=1) + "\n")
    (folder / RECORDS).write_text(json.dumps(accessions, indent=1) + "\n")
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in _listed(folder)))


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
    shards, families = (sum(getattr(split, name) for split in splits) for name in ("num_shards", "num_examples"))
    size = sum((folder / name).stat().st_size for name in found)
    counts = f"{len(splits)} splits, {shards} shards, {families:,} families, {size:,} bytes"
    return f"{folder}: {counts}: all {len(found)} files have their checksums"


def find_dataset(data_dir: str | Path) -> Path:
    """Return the one folder below `data_dir` that holds a finished data set."""
    data_dir = Path(expanded(data_dir))
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"data.dir={data_dir} is not a folder; build one with scripts/build_pfam.py --out {data_dir}"
        )
    # The checksums are written last: a folder without them is of a build that was killed.
    found = (path.parent for path in data_dir.rglob(CHECKSUMS) if path.with_name("dataset_info.json").is_file())
    hidden = (".", "__MACOSX")  # beginnings of names
    folders = sorted(p for p in found if not any(part.startswith(hidden) for part in p.relative_to(data_dir).parts))
    if not folders:
        raise FileNotFoundError(f"data.dir={data_dir} holds no data set; build one with scripts/build_pfam.py")
    if len(folders) > 1:
        raise ValueError(f"data.dir={data_dir} holds several data sets, choose one: {', '.join(map(str, folders))}")
    return folders[0]


class FamilySource:
    """Random access to the families of one split: len(), [i], picklable, as Grain needs it. Made by `open_split`."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        try:
            dataset = tfds.builder_from_directory(str(folder))
        except Exception as error:  # of json or protobuf, depending on the damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{folder} cannot be read ({reason}); build or copy the data again") from error
        if split not in dataset.info.splits:
            raise ValueError(
                f"split {split!r} is empty in {folder}; it has {', '.join(dataset.info.splits)}: add families"
            )
        self.split_info = dataset.info.splits[split]
        for path in self.split_info.filepaths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"shard {path} is missing; build or copy the data again")
        self.records = dataset.as_data_source(split=split)
        listed = folder / RECORDS  # data sets of early versions have none
        try:
            self.accessions: list[str] = json.loads(listed.read_text())[split] if listed.exists() else []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{listed} is damaged ({error!r}); build or copy the data again") from error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> Family:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: split {self.split!r} has {len(self)} families")
        try:
            family = from_example(self.records[index])
        except Exception as error:  # of Riegeli, zlib or protobuf, depending on the damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise BadRecordError(f"{self.place(index)} is damaged ({reason})") from error
        expected = self.accessions[index] if self.accessions else family.accession
        if family.accession != expected:
            raise BadRecordError(f"{self.place(index)} holds {family.accession}: the shard is of another build")
        return family

    def place(self, index: int) -> str:
        """Return shard, number of the record in it and family, for messages."""
        ends = list(itertools.accumulate(self.split_info.shard_lengths))
        shard = bisect.bisect_right(ends, index)
        path, number = self.split_info.filepaths[shard], index - (ends[shard - 1] if shard else 0)
        family = self.accessions[index] if self.accessions else f"number {index} of {self.split}"
        return f"{path}, record {number}, family {family}"

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


def _listed(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_file() and path.name != CHECKSUMS]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
