"""The same build as an Apache Beam pipeline, for what one machine cannot hold: all of Pfam-A.full on a runner of yours.

    parse every file -> one record an accession -> split -> write

A gzip file cannot be divided among workers, so a file is the unit of parsing, and a reshuffle behind it spreads the
rest. Divide Pfam-A.full.gz into about as many parts as there are workers beforehand (scripts/split_stockholm.py).
Inputs and output are paths that all workers see. A family must fit into a worker's memory; max_rows cuts it down
ahead of the reshuffle.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from data.families import SPLITS, Family, read_clans
from data.pfam import Pfam, to_example
from data.recipe import Candidate, Recipe, candidate, choose, read_families

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise ImportError(f"Apache Beam is missing ({error}): pip install -r requirements-beam.txt") from error

Placed = tuple[Candidate, Family]


class PfamBeam(Pfam, skip_registration=True):
    """Writes what `Pfam` writes, record for record; every split must get at least one family."""

    name = Pfam.name

    def _split_generators(self, dl_manager: tfds.download.DownloadManager, pipeline: "beam.Pipeline"):
        inputs, clans_path = self.local_files(dl_manager)
        clans = read_clans(clans_path) if clans_path else {}
        read = (
            pipeline
            | "Files" >> beam.Create(list(enumerate(inputs)))
            | "OneFileAWorker" >> beam.Reshuffle()
            | "Parse" >> beam.FlatMap(parse, clans, self.recipe).with_outputs("skipped", main="families")
        )
        chosen = (
            read.families
            | "Spread" >> beam.Reshuffle()
            | "SameAccession" >> beam.GroupByKey()
            | "Choose" >> beam.FlatMap(records_of, self.recipe).with_outputs("dropped", *SPLITS)
        )
        self.notes = Path(self.data_dir) / "notes"
        for kind, texts in (("skipped", read.skipped), ("dropped", chosen.dropped)):
            path = str(self.notes.with_suffix(f".{kind}"))
            _ = texts | f"Gather_{kind}" >> beam.combiners.ToList() | f"Note_{kind}" >> beam.Map(note, path)
        return {split: chosen[split] for split in SPLITS}

    def _process_pipeline_result(self, pipeline_result: "beam.runners.runner.PipelineResult") -> None:
        for kind in ("skipped", "dropped"):
            path = self.notes.with_suffix(f".{kind}")
            setattr(self.report, kind, sorted(json.loads(path.read_text())))
            path.unlink()


def parse(numbered: tuple[int, str], clans: dict[str, str], recipe: Recipe) -> Iterator:
    """(accession, (candidate, family)) of every family of one file; malformed ones go to the output 'skipped'."""
    number, path = numbered
    skipped: list[str] = []
    for index, family in enumerate(read_families(path, clans, recipe, skipped.append)):
        yield family.accession, (candidate((number, index), path, family, recipe), family)
    yield from (beam.pvalue.TaggedOutput("skipped", text) for text in skipped)


def records_of(same: tuple[str, Iterable[Placed]], recipe: Recipe) -> Iterator["beam.pvalue.TaggedOutput"]:
    """The records of the family that is kept of one accession, each to the output of its split."""
    accession, placed = same
    families = dict(placed)
    best, left_out = choose(list(families))
    yield from (beam.pvalue.TaggedOutput("dropped", text) for text in left_out)
    if best is not None:
        for split, record in recipe.records(families[best]):
            yield beam.pvalue.TaggedOutput(split, (accession, to_example(record)))


def note(texts: list[str], path: str) -> None:
    Path(path).write_text(json.dumps(texts))


def pipeline_options(arguments: list[str]) -> "PipelineOptions":
    """Options as Beam's own command lines take them, for example ["--runner=FlinkRunner"]."""
    return PipelineOptions(arguments)
