"""The build of data/pfam.py as an Apache Beam pipeline, for input that one machine cannot hold, such as Pfam-A.full.

    parse every file -> one record an accession -> split -> write

A gzip file cannot be divided among workers, so each file is parsed by one worker, which also makes the records; the
grouping by accession then spreads these. First divide Pfam-A.full.gz into about as many parts as there are workers
(scripts/split_stockholm.py). Inputs and output are paths that all workers see. A family must fit into a worker's
memory; `max_rows` cuts it down first.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from data.families import SPLITS
from data.pfam import Pfam, to_example
from data.recipe import Candidate, Recipe, candidate, choose, counts, read_families

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions as PipelineOptions
except ImportError as error:
    raise ImportError(f"Apache Beam is missing ({error}): pip install -r requirements-beam.txt") from error

Placed = tuple[Candidate, list[tuple[str, dict]]]  # the examples of a family, each with its split


class PfamBeam(Pfam, skip_registration=True):
    """Builder that writes the same records as `Pfam`; every split must get at least one family."""

    name = Pfam.name

    def download_and_prepare(self, **options) -> None:
        try:
            super().download_and_prepare(**options)
        except ValueError as error:
            if "number of generated examples is 0" not in str(error):
                raise
            raise ValueError(
                f"{error} Beam writes no split without records: give families of every split, or build without --beam"
            ) from error

    def _split_generators(self, dl_manager: tfds.download.DownloadManager, pipeline: "beam.Pipeline"):
        inputs, self.clans = self.local_input(dl_manager)
        self.report.read = {"files": len(inputs)}
        read = (
            pipeline
            | "Files" >> beam.Create(list(enumerate(inputs)))
            | "OneFileAWorker" >> beam.Reshuffle()
            | "Parse" >> beam.FlatMap(parse, self.clans, self.recipe).with_outputs("skipped", main="families")
        )
        chosen = (
            read.families
            | "SameAccession" >> beam.GroupByKey()
            | "Choose" >> beam.FlatMap(records_of).with_outputs("dropped", *SPLITS)
        )
        counted = (
            read.families
            | "Count" >> beam.Map(lambda family: counts(family[1][0]))
            | "Sum" >> beam.CombineGlobally(total)
        )
        texts = {"skipped": read.skipped, "dropped": chosen.dropped}
        gathered = {kind: found | f"Gather_{kind}" >> beam.combiners.ToList() for kind, found in texts.items()}
        self.notes = Path(self.data_dir) / "notes"
        for kind, found in (gathered | {"read": counted}).items():
            _ = found | f"Note_{kind}" >> beam.Map(note, str(self.notes.with_suffix(f".{kind}")))
        return {split: chosen[split] for split in self.recipe.splits}

    def _process_pipeline_result(self, pipeline_result: "beam.runners.runner.PipelineResult") -> None:
        noted = {}
        for kind in ("skipped", "dropped", "read"):
            path = self.notes.with_suffix(f".{kind}")
            noted[kind] = json.loads(path.read_text())
            path.unlink()
        self.report.skipped, self.report.dropped = sorted(noted["skipped"]), sorted(noted["dropped"])
        self.report.read |= noted["read"]
        self.report.check(self.clans, noted["read"].get("families", 0) - len(noted["dropped"]))


def parse(numbered: tuple[int, str], clans: dict[str, str], recipe: Recipe) -> Iterator:
    """Yield (accession, (candidate, examples)) for each family of a file; malformed ones go to the output 'skipped'."""
    number, path = numbered
    skipped: list[str] = []
    for index, family in enumerate(read_families(path, clans, recipe, skipped.append)):
        records = list(recipe.records(family))
        splits = tuple(split for split, _ in records)
        found = candidate((number, index), path, family, splits, clans, recipe)
        yield family.accession, (found, [(split, to_example(record)) for split, record in records])
    yield from (beam.pvalue.TaggedOutput("skipped", text) for text in skipped)


def records_of(same: tuple[str, Iterable[Placed]]) -> Iterator["beam.pvalue.TaggedOutput"]:
    """Yield the records of the family that is kept of one accession, each to the output of its split."""
    accession, placed = same
    examples = dict(placed)
    best, left_out = choose(list(examples))
    yield from (beam.pvalue.TaggedOutput("dropped", text) for text in left_out)
    for split, example in examples[best] if best else ():
        yield beam.pvalue.TaggedOutput(split, (accession, example))


def total(found: Iterable[Counter[str]]) -> Counter[str]:
    """Add counts; `sum` would leave out zeros."""
    added: Counter[str] = Counter()
    for one in found:
        added.update(one)
    return added


def note(found: list[str] | dict[str, int], path: str) -> None:
    Path(path).write_text(json.dumps(found))
