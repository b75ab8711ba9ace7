"""Long lists of pairs: what is kept of a run that is interrupted, what continues it, and which pairs are written."""

import bz2
import gzip
import itertools
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from Bio import AlignIO, SeqIO

from alignment import formats, output, pairing, selection
from alignment.columns import Aligned
from alignment.inference import PairAlignment
from alignment.sequences import Record
from scripts import align

FORMS = [*(form for form in formats.FORMATS if form != "a3m"), "tsv:x,y,probability,cigar", "tsv:blast12"]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


class Model:
    """An aligner that takes no time: it aligns the first residues, and is interrupted after some chunks."""

    def __init__(self, chunks: float = np.inf, chunk: int = 3):
        self.band, self.chunks, self.chunk, self.aligned = 64, chunks, chunk, 0
        self.params = {"w": np.ones(3, np.float32)}

    def chunk_size(self) -> int:
        return self.chunk

    def memory(self, *_, **__) -> int:
        return 0

    def align_chunks(self, chunks, *, mode, band, done) -> Iterator[list[PairAlignment]]:
        for n, chunk in enumerate(chunks):
            if n >= self.chunks:
                raise KeyboardInterrupt
            self.aligned += len(chunk)
            yield [self.alignment(n, *pair) for n, pair in enumerate(chunk)]
            done(len(chunk))

    def alignment(self, n: int, x: np.ndarray, y: np.ndarray) -> PairAlignment:
        """Alignment that depends on the place in the chunk a little, as it does where batches are padded."""
        count = int(min(len(x), len(y), 3))
        pairs = np.arange(count, dtype=np.int32)[:, None].repeat(2, 1)
        probability = float((x.sum() * 7 + y.sum() * 13) % 101) / 101 + n * 1e-4
        alone = [np.zeros(len(tokens), np.float32) for tokens in (x, y)]
        return PairAlignment(pairs, np.full(count, 0.9, np.float32), probability, *alone, 5.0)


def fasta(path: Path, count: int, seed: int, prefix: str) -> None:
    rng = np.random.default_rng(seed)
    rows = ("".join(rng.choice(list(LETTERS), rng.integers(3, 9))) for _ in range(count))
    path.write_text("".join(f">{prefix}{n} number {n}\n{row}\n" for n, row in enumerate(rows)))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line with a model: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    fasta(tmp_path / "q.fasta", 3, 0, "q")
    fasta(tmp_path / "y.fasta", 7, 1, "y")
    fasta(tmp_path / "single.fasta", 1, 2, "o")

    def of(*arguments: str, model: Model | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(align, "_load", lambda _: model or Model())
        return align.main(list(arguments)), *capsys.readouterr()

    return of


@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, ()) for form in FORMS), ("jsonl", ("--top=2",)), ("tsv", ("--min-probability=.4",))],
)
def test_a_continued_run_writes_what_one_run_writes(run, tmp_path, form, options):
    given = ("q.fasta", "y.fasta", f"--format={form}", *options)
    assert run(*given, "--output=whole")[0] == 0
    for chunks in (3, 5):
        status, _, errors = run(*given, "--output=o", model=Model(chunks))
        assert status == 130 and "21 pairs are kept in" in errors and errors.endswith("align.py: interrupted\n")
        with (tmp_path / "o.part").open("ab") as file:
            file.write(b"half a li")  # of a process that was killed
        model = Model()
        status, _, _ = run(*given, "--output=o", "--resume", model=model)
        assert status == 0 and 0 < model.aligned < 21
        assert (tmp_path / "o").read_bytes() == (tmp_path / "whole").read_bytes()
        assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("unpack", [gzip.decompress, bz2.decompress, lzma.decompress])
def test_a_compressed_file_is_continued_too(run, tmp_path, unpack):
    suffix = {gzip.decompress: "gz", bz2.decompress: "bz2", lzma.decompress: "xz"}[unpack]
    for form in ("tsv", "a3m"):
        given = ("single.fasta", "y.fasta", f"--format={form}")
        assert run(*given, "--output=plain")[0] == run(*given, f"--output=whole.{suffix}")[0] == 0
        assert run(*given, f"--output=o.{suffix}", model=Model(2))[0] == 130
        with (tmp_path / f"o.{suffix}.part").open("ab") as file:
            file.write(b"\x1f\x8bhalf")
        assert run(*given, f"--output=o.{suffix}", "--resume")[0] == 0
        assert (tmp_path / f"o.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
        assert unpack((tmp_path / f"o.{suffix}").read_bytes()) == (tmp_path / "plain").read_bytes()


def test_an_a3m_that_is_continued_tells_ids_apart(run, tmp_path):
    shutil.copy(tmp_path / "y.fasta", tmp_path / "same.fasta")
    (tmp_path / "ids.tsv").write_text("y0\ty1\ny0\ty1\ny0\ty2\ny0\ty1\ny0\ty2\n")
    given = ("--pairs=ids.tsv", "y.fasta", "--format=a3m")
    assert run(*given, "--output=whole")[0] == 0
    assert run(*given, "--output=o", model=Model(1))[0] == 130
    assert run(*given, "--output=o", "--resume")[0] == 0
    assert [record.id for record in SeqIO.parse(tmp_path / "o", "fasta")] == ["y0", "y1", "y1_2", "y2", "y1_3", "y2_2"]
    assert (tmp_path / "o").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_can_be_killed_between_any_two_writes(run, tmp_path, monkeypatch):
    """Files are copied before each write, flush, record and replacement; each copy can be continued."""
    given = ("q.fasta", "y.fasta", "--format=jsonl", "--output=o")
    copies = itertools.count()

    def copied(function):
        def call(*arguments, **options):
            folder = tmp_path / f"copy{next(copies)}"
            folder.mkdir()
            for path in tmp_path.glob("o*"):
                shutil.copy(path, folder)
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for place, name in (
            (output.os, "fsync"),
            (output.files, "write"),
            (Path, "replace"),
            (output.Journal, "remove"),
        ):
            patched.setattr(place, name, copied(getattr(place, name)))
        assert run(*given, model=Model(chunk=8))[0] == 0
    expected = (tmp_path / "o").read_bytes()
    number = next(copies)
    assert number > 12
    for n in range(number):
        for path in tmp_path.glob("o*"):
            path.unlink()
        for path in (tmp_path / f"copy{n}").iterdir():
            shutil.copy(path, tmp_path)
        assert not (tmp_path / "o").exists() or (tmp_path / "o").read_bytes() == expected, "never half a result"
        status, _, errors = run(*given, "--resume", model=Model(chunk=8))
        assert (status, errors) == (0, "") and (tmp_path / "o").read_bytes() == expected


def test_what_differs_from_the_interrupted_run_is_named(run, tmp_path):
    given = ("q.fasta", "y.fasta", "--format=tsv", "--output=o")
    assert run(*given, "--mode=local", model=Model(3))[0] == 130
    kept = (tmp_path / "o.part").read_bytes(), (tmp_path / "o.part.json").read_bytes()

    def refused(*arguments: str, model: Model | None = None) -> str:
        status, _, errors = run(*arguments, "--resume", model=model)
        assert (status, errors.count("\n")) == (1, 1) and "was begun by another run" in errors
        return errors

    assert "--mode was local, now glocal; to begin anew, remove" in refused(*given)
    assert "--format was tsv, now jsonl" in refused(*given, "--mode=local", "--format=jsonl")
    assert "--top was None, now 2" in refused(*given, "--mode=local", "--top=2")
    other = Model()
    other.params = {"w": np.zeros(3, np.float32)}
    assert ": the model has changed;" in refused(*given, "--mode=local", model=other)
    assert "the number of pairs in a chunk was 3, now 4" in refused(*given, "--mode=local", model=Model(chunk=4))
    before = (tmp_path / "y.fasta").read_text()
    (tmp_path / "y.fasta").write_text(before + ">more\nMKV\n")
    assert ": the second FASTA file has changed;" in refused(*given, "--mode=local")
    (tmp_path / "y.fasta").write_text(before)

    status, _, errors = run(*given, "--mode=local")
    assert status == 1 and "o.part holds the first 9 of 21 pairs of an interrupted run; --resume continues it" in errors
    assert ((tmp_path / "o.part").read_bytes(), (tmp_path / "o.part.json").read_bytes()) == kept
    assert run(*given, "--mode=local", "--resume")[0] == 0


@pytest.mark.parametrize("record", ["", "[]", '{"run": {}}', '{"run": {}, "reached": {"pairs": -1}}', "\x00"])
def test_a_record_that_is_none_is_named(run, tmp_path, record):
    given = ("q.fasta", "y.fasta", "--output=o")
    assert run(*given, model=Model(3))[0] == 130
    (tmp_path / "o.part.json").write_text(record)
    status, _, errors = run(*given, "--resume")
    assert (status, errors.count("\n")) == (1, 1) and "o.part.json is no record of an interrupted run" in errors


def test_files_in_the_way_stay(run, tmp_path):
    given = ("q.fasta", "y.fasta", "--output=o")
    (tmp_path / "o.part").write_text("of another program")
    for options in ((), ("--resume",)):
        status, _, errors = run(*given, *options)
        assert status == 1 and "o.part is in the way, and not of an interrupted run; move or remove it" in errors
    assert (tmp_path / "o.part").read_text() == "of another program"
    (tmp_path / "o.part").unlink()
    assert run(*given, model=Model(3))[0] == 130
    (tmp_path / "o.part").write_text("cut")
    status, _, errors = run(*given, "--resume")
    assert status == 1 and "o.part is shorter than" in errors


def test_two_processes_cannot_write_the_same_file(run, tmp_path):
    seen = []

    class Second(Model):
        def align_chunks(self, *arguments, **options):
            yield from ()
            seen.append(run("q.fasta", "y.fasta", "--output=o", "--resume"))
            yield from super().align_chunks(*arguments, **options)

    assert run("q.fasta", "y.fasta", "--output=o", model=Second())[0] == 0
    ((status, _, errors),) = seen
    assert status == 1 and "o.part: another process writes it" in errors
    assert (tmp_path / "o").read_text() == run("q.fasta", "y.fasta")[1]


def test_nothing_is_kept_of_a_run_that_finished_nothing(run, tmp_path):
    assert run("q.fasta", "y.fasta", "--output=o", model=Model(0))[0] == 130
    assert not list(tmp_path.glob("o*"))
    assert run("q.fasta", "y.fasta", "--output=o", "--resume")[0] == 0


def test_long_pairs_are_recorded_more_often(run, tmp_path):
    (tmp_path / "long.fasta").write_text("".join(f">{n}\n{'MKV' * 400}\n" for n in range(4)))
    for size, expected in ((1, [1] * 6), (43, [2, 2, 2]), (1000, [6])):
        pairs = pairing.of_files(["long.fasta"], every=True).pairs
        assert [len(chunk) for chunk in pairing.chunks(pairs, size)] == expected


# ---- a file for each query ----


@pytest.mark.parametrize("options", [(), ("--top=2",)])
def test_queries_whose_files_are_finished_are_skipped(run, tmp_path, options):
    given = ("q.fasta", "y.fasta", "--format=a3m", *options)
    assert run(*given, "--output-dir=whole")[0] == 0
    status, _, errors = run(*given, "--output-dir=d", model=Model(5))
    finished = 1 if options else 2  # with --top a file appears when the next query is settled
    told = f"{7 * finished} of 21 pairs are kept in d: the same command with --resume continues"
    assert status == 130 and told in errors
    assert sorted(path.name for path in (tmp_path / "d").glob("[!.]*")) == ["q0.a3m", "q1.a3m"][:finished]
    assert run(*given, "--output-dir=d")[0] == 1, "without --resume"
    assert "--mode was glocal, now local" in run(*given, "--output-dir=d", "--resume", "--mode=local")[2]
    with mock.patch.object(output, "_written", wraps=output._written) as written:
        assert run(*given, "--output-dir=d", "--resume")[0] == 0
    assert [call.args[0].name for call in written.call_args_list] == ["q1.a3m", "q2.a3m"][finished - 1 :]
    found, expected = ({path.name: path.read_bytes() for path in Path(d).iterdir()} for d in ("d", "whole"))
    assert found == expected and len(found) == 3


def test_runs_of_other_queries_may_share_a_folder(run, tmp_path):
    assert run("q.fasta", "y.fasta", "--output-dir=d", model=Model(5))[0] == 130
    assert run("single.fasta", "y.fasta", "--output-dir=d")[0] == 0
    assert run("q.fasta", "y.fasta", "--output-dir=d", "--resume")[0] == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["o0.txt", "q0.txt", "q1.txt", "q2.txt"]


# ---- which pairs are written ----


def table(text: str) -> list[tuple[str, str, float]]:
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    return [(x, y, float(probability)) for x, y, probability in rows]


COLUMNS = "--format=tsv:x,y,probability"


def test_the_most_probable_partners_of_each_query(run):
    everything = table(run("q.fasta", "y.fasta", COLUMNS)[1])
    found = table(run("q.fasta", "y.fasta", COLUMNS, "--top=3")[1])
    expected = []
    for query in ("q0", "q1", "q2"):
        expected += sorted((row for row in everything if row[0] == query), key=lambda row: -row[2])[:3]
    assert found == expected


def test_equally_probable_partners_stay_in_order(run):
    model = Model()
    model.alignment = lambda n, *pair: Model().alignment(n, *pair)._replace(probability=0.5)
    rows = table(run("q.fasta", "y.fasta", COLUMNS, "--top=3", model=model)[1])
    assert [row[:2] for row in rows] == [(q, y) for q in ("q0", "q1", "q2") for y in ("y0", "y1", "y2")]


def test_each_sequence_is_a_query_where_the_best_of_all_pairs_are_asked_for(run):
    everything = table(run("y.fasta", "y.fasta", COLUMNS)[1])
    found = table(run("y.fasta", "--all-pairs", COLUMNS, "--top=1")[1])
    assert [row[0] for row in found] == [f"y{n}" for n in range(7)] and all(x != y for x, y, _ in found)
    assert len(table(run("y.fasta", "--all-pairs", COLUMNS)[1])) == 21 and len(everything) == 49


def test_pairs_of_ids_have_queries_too(run, tmp_path):
    (tmp_path / "ids.tsv").write_text("q1\ty0\nq0\ty1\nq1\ty2\nq0\ty3\nq1\ty4\n")
    found = table(run("--pairs=ids.tsv", "q.fasta", "y.fasta", COLUMNS, "--top=2")[1])
    assert [row[0] for row in found] == ["q1", "q1", "q0", "q0"]
    assert all(a[2] >= b[2] for a, b in (found[:2], found[2:]))


@pytest.mark.parametrize("options", [(), ("--top=5",), ("--resume", "--output=o")])
def test_improbable_pairs_are_left_out_and_counted(run, tmp_path, options):
    everything = table(run("q.fasta", "y.fasta", COLUMNS)[1])
    if "--resume" in options:
        run("q.fasta", "y.fasta", COLUMNS, "--min-probability=.5", "--output=o", model=Model(3))
    status, text, errors = run("q.fasta", "y.fasta", COLUMNS, "--min-probability=.5", *options)
    found = table(text or (tmp_path / "o").read_text())
    assert status == 0 and 0 < len(found) < 21 and min(row[2] for row in found) >= 0.5
    left_out = sum(row[2] < 0.5 for row in everything)
    assert errors == f"align.py: warning: {left_out} of 21 pairs were left out: --min-probability=0.5\n"
    if not options:
        assert found == [row for row in everything if row[2] >= 0.5]
    assert run("q.fasta", "y.fasta", COLUMNS, "--min-probability=0")[2] == ""


def test_a_query_without_partners_has_a_file(run, tmp_path):
    assert run("q.fasta", "y.fasta", "--format=a3m", "--min-probability=1", "--output-dir=d")[0] == 0
    assert [len(list(SeqIO.parse(path, "fasta"))) for path in sorted((tmp_path / "d").iterdir())] == [1, 1, 1]
    assert run("q.fasta", "y.fasta", "--min-probability=1", "--output=o.gz")[0] == 0
    assert gzip.decompress((tmp_path / "o.gz").read_bytes()) == b"" != (tmp_path / "o.gz").read_bytes()


def test_a_model_that_says_nothing_about_homology_is_refused_where_it_counts(run):
    silent = Model()
    silent.alignment = lambda *pair: Model().alignment(*pair)._replace(probability=float("nan"))
    for options in ("--top=2",), ("--min-probability=.1",):
        status, _, errors = run("q.fasta", "y.fasta", *options, model=silent)
        assert status == 1 and "need a model that tells the probability of homology" in errors
    for form, mark in (("text", "Homology"), ("stockholm", "probability"), ("fasta", "probab"), ("clustal", "probab")):
        status, text, _ = run("q.fasta", "y.fasta", f"--format={form}", model=silent)
        assert status == 0 and mark not in text and "nan" not in text
    records = [json.loads(line) for line in run("q.fasta", "y.fasta", "--format=jsonl", model=silent)[1].splitlines()]
    assert {record["probability"] for record in records} == {None}


# ---- memory ----


def test_pairs_are_made_when_they_are_aligned(tmp_path, monkeypatch):
    """No more than one chunk of a million pairs is made before it is written."""
    monkeypatch.chdir(tmp_path)
    fasta(tmp_path / "many.fasta", 1000, 0, "s")
    (tmp_path / "ids.tsv").write_text("s1\ts2\n" * 2000)
    for work in (
        pairing.of_files(["many.fasta", "many.fasta"]),
        pairing.of_files(["many.fasta"], every=True),
        pairing.of_table("ids.tsv", ["many.fasta"]),
    ):
        made = itertools.count()
        pairs = (pair for pair in work.pairs if next(made) >= 0)
        args = mock.Mock(mode="glocal", band=None, plot=None)
        alignments = align._aligned(Model(chunk=10), pairs, 0, args, lambda count: None)
        list(itertools.islice(selection.settled(alignments), 25))
        assert next(made) <= 40 < 2000 <= work.total


def test_no_more_than_the_best_are_held():
    """Batches, of which results are views, do not stay in memory."""
    x, alive = Record("x", "", "MKV"), []

    class Counted(np.ndarray):
        pass

    def alignments() -> Iterator[Aligned]:
        import weakref

        for n in range(500):
            batch = np.zeros((64, 3), np.float32).view(Counted)
            alive.append(weakref.ref(batch))
            assert sum(of() is not None for of in alive) <= 4
            pairs = np.zeros((0, 2), np.int32)
            yield Aligned(str(n), x, x, pairs, batch[0, :0], (n * 37 % 500) / 500, batch[0], batch[1])

    (best,) = selection.settled(alignments(), top=3)
    assert [round(aligned.probability * 500) for aligned in best.kept] == [499, 498, 497]
    assert (best.pairs, best.left_out) == (500, 0)


# ---- Clustal ----


def test_conservation_is_clustals():
    x, y = Record("x", "", "ASNCWMKG"), Record("y", "", "ATQAGKVP")
    pairs = np.arange(7, dtype=np.int32)[:, None].repeat(2, 1)
    aligned = Aligned("", x, y, pairs, np.ones(7), 0.5, np.ones(8), np.ones(8))
    lines = formats.clustal(aligned).splitlines()
    assert lines[0] == "CLUSTAL multiple sequence alignment by ot-attention, probability=0.5000"
    #                              identical, strong S-T, strong N-Q, weak C-A, none, none, none, gaps
    assert lines[3:] == ["x" + " " * 15 + "ASNCWMKG-", "y" + " " * 15 + "ATQAGKV-P", " " * 16 + "*::.     ", ""]


def test_clustal_is_read_by_others(run, tmp_path):
    (tmp_path / "ids.fasta").write_text(
        f">MUSCLE\n{'MKVLAWC' * 20}\n>{'long' * 20}\n{'WWWW' * 40}\n>CLUSTAL\n{'GGPH' * 15}\n"
    )
    text = run("ids.fasta", "--all-pairs", "--format=clustal", "--output=o.aln")
    assert text[0] == 0
    found = list(AlignIO.parse(tmp_path / "o.aln", "clustal"))
    assert [[row.id for row in pair] for pair in found] == [
        ["_MUSCLE", "long" * 20],
        ["_MUSCLE", "_CLUSTAL"],
        ["long" * 20, "_CLUSTAL"],
    ]
    assert [str(row.seq).replace("-", "") for row in found[0]] == ["MKVLAWC" * 20, "WWWW" * 40]
    assert len(found[0].column_annotations["clustal_consensus"]) == found[0].get_alignment_length()
    blocks = [line for line in (tmp_path / "o.aln").read_text().splitlines() if line.startswith("_MUSCLE")]
    assert len(blocks[0].split()[1]) == 60
