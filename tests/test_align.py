"""scripts/align.py: what goes in, and what comes out in every format."""

import bz2
import functools
import gzip
import io
import json
import lzma
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from Bio import AlignIO, SeqIO

from alignment import formats
from alignment.columns import Aligned
from alignment.inference import Pretrained
from alignment.sequences import Record
from data import stockholm
from models import weights
from scripts import align
from tests.support import tiny
from tests.support.prior_aligner import FRAGMENT, HBA, HBB, config, initial, pairs_of


@pytest.fixture(scope="module", autouse=True)
def quick():
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)  # align.py chooses one


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return initial(config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """Make a folder with weights and FASTA files."""
    folder = tmp_path_factory.mktemp("align")
    weights.save(folder / "w.safetensors", model.params, config(), 0)
    (folder / "a.fasta").write_text(f">HBA alpha chain\n{HBA[:70]}\n{HBA[70:].lower()}*\n")
    (folder / "b.fasta").write_text(f"\n>HBB\n{HBB}\n")
    (folder / "many.fasta").write_text(f">HBA\n{HBA}\n>HBB beta\n{HBB}\n>part\n{FRAGMENT}\n>one\nW\n")
    return folder


@functools.cache
def loaded(path: Path, load=Pretrained.load) -> Pretrained:
    """Load weights once: their programs are compiled once."""
    return load(path)


@pytest.fixture
def run(folder, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """The command line with the test's weights: exit status, standard output, standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(Pretrained, "load", loaded)

    def of(*arguments: str) -> tuple[int, str, str]:
        status = align.main(["--weights=w.safetensors", *arguments])
        return status, *capsys.readouterr()

    return of


def test_all_formats_hold_the_same_alignment(run):
    output = {form: run("a.fasta", "b.fasta", f"--format={form}") for form in formats.FORMATS}
    assert {status for status, *_ in output.values()} == {0}
    text, stockholm, a3m, fasta, clustal, tsv, jsonl = (io.StringIO(output[form][1]) for form in formats.FORMATS)

    (record,) = map(json.loads, jsonl)
    assert list(record) == ["id", "pairs", "confidence", "probability"]
    probability = f"{record['probability']:.4f}"
    assert record["id"] == "HBA:HBB" and len(record["pairs"]) == len(record["confidence"]) > 130
    assert (np.diff(record["pairs"], axis=0) > 0).all()
    assert [140, 145] in record["pairs"], "the ends of the globins are aligned"

    for handle, form in ((stockholm, "stockholm"), (fasta, "fasta"), (clustal, "clustal")):
        x, y = AlignIO.read(handle, form)
        assert (x.id, y.id) == ("HBA", "HBB")
        assert (str(x.seq).replace("-", ""), str(y.seq).replace("-", "")) == (HBA, HBB)
        assert pairs_of(str(x.seq), str(y.seq)) == record["pairs"]
        if form == "stockholm":
            assert x.description == "alpha chain"
            assert f"#=GF CC probability of homology {probability}\n" in stockholm.getvalue()
            marks = x.letter_annotations["posterior_probability"]
            found = [m for m, a, b in zip(marks, x.seq, y.seq, strict=True) if a != "-" and b != "-"]
            assert found == ["0123456789*"[int(10 * c + 0.5)] for c in record["confidence"]]

        if form == "fasta":
            assert (x.description, y.description) == ("HBA alpha chain", f"HBB probability={probability}")
    assert clustal.getvalue().splitlines()[0].endswith(f", probability={probability}")

    query, other = SeqIO.parse(a3m, "fasta")
    assert other.description == f"HBB probability={probability}"
    assert str(query.seq) == HBA
    assert str(other.seq).upper().replace("-", "") == HBB
    columns = np.array([not c.islower() for c in other.seq])
    position = np.cumsum([c != "-" for c in other.seq]) - 1
    in_columns = [(str(other.seq)[n], position[n]) for n in np.flatnonzero(columns)]
    assert [[i, j] for i, (c, j) in enumerate(in_columns) if c != "-"] == record["pairs"]

    head, *rows = (line.rstrip("\n").split("\t") for line in tsv)
    assert head == ["id", "i", "j", "x", "y", "confidence", "probability"]
    assert [[int(row[1]), int(row[2])] for row in rows] == record["pairs"]
    assert all(HBA[int(i)] == x and HBB[int(j)] == y for _, i, j, x, y, *_ in rows)
    assert {row[-1] for row in rows} == {probability}

    lines = text.getvalue().splitlines()
    blocks = [line.split() for line in lines if line.startswith(("HBA", "HBB"))]
    x, y = ("".join(block[2] for block in blocks if block[0] == name) for name in ("HBA", "HBB"))
    assert pairs_of(x, y) == record["pairs"]
    assert blocks[0][1] == "1" and blocks[-2][3] == str(len(HBA)) and blocks[-1][3] == str(len(HBB))
    identical = sum(HBA[i] == HBB[j] for i, j in record["pairs"])
    assert f"\nHomology:   probability {probability}\n" in text.getvalue()
    assert f"Identity:   {identical}/{len(x)} (" in text.getvalue()
    assert f"Gaps:       {len(x) - len(record['pairs'])}/{len(x)} (" in text.getvalue()


def test_json_lines_are_what_the_json_module_writes():
    confidence = np.array([0, 1, 1e-5, 0.00005, 0.03125, 0.9999999, 1.00004, 1.25, 0.3, 1 / 3], np.float32)
    record = Record("x", "", "A" * 20)
    for count in (0, 1, len(confidence)):
        pairs = np.arange(2 * count, dtype=np.int32).reshape(-1, 2)
        aligned = Aligned('a"\u00e9', record, record, pairs, confidence[:count], 0.123456, np.ones(20), np.ones(20))
        rounded = [round(float(c), 4) for c in confidence[:count]]
        expected = {"id": aligned.id, "pairs": pairs.tolist(), "confidence": rounded, "probability": 0.1235}
        assert formats.jsonl(aligned) == json.dumps(expected) + "\n"
        unknown = formats.jsonl(aligned._replace(probability=float("nan")))
        assert unknown == json.dumps(expected | {"probability": None}) + "\n"


def test_which_pairs_are_aligned(run):
    def names(*arguments: str) -> list[str]:
        status, output, _ = run(*arguments, "--format=jsonl")
        assert status == 0
        return [json.loads(line)["id"] for line in output.splitlines()]

    assert names("many.fasta") == ["HBA:HBB", "HBA:part", "HBA:one"]
    assert names("many.fasta", "--all-pairs") == [
        "HBA:HBB",
        "HBA:part",
        "HBA:one",
        "HBB:part",
        "HBB:one",
        "part:one",
    ]
    assert names("b.fasta", "many.fasta") == ["HBB:HBA", "HBB:HBB", "HBB:part", "HBB:one"]


def test_an_a3m_has_its_query_once(run):
    records = list(SeqIO.parse(io.StringIO(run("many.fasta", "--format=a3m")[1]), "fasta"))
    assert [record.id for record in records] == ["HBA", "HBB", "part", "one"]
    assert {sum(not c.islower() for c in record.seq) for record in records} == {len(HBA)}


def test_names_in_stockholm_are_distinct(run):
    x, y = AlignIO.read(io.StringIO(run("a.fasta", "a.fasta", "--format=stockholm")[1]), "stockholm")
    assert (x.id, y.id) == ("HBA", "HBA_2") and x.seq == y.seq


def test_pairs_of_a_table(run, folder):
    (folder / "p.tsv").write_text(f"id\tx\ty\n# two\nfirst\t{HBA}\t{HBB}\n\nsecond\tW\tw\n")
    status, output, _ = run("--pairs=p.tsv", "--format=jsonl")
    first, second = map(json.loads, output.splitlines())
    assert status == 0 and first["id"] == "first" and len(first["pairs"]) > 130
    assert second["id"] == "second" and second["pairs"] in ([[0, 0]], [])
    assert len(second["confidence"]) == len(second["pairs"])


def test_standard_input_gzip_and_output_files(run, folder, monkeypatch):
    expected = run("a.fasta", "b.fasta", "--format=tsv")[1]
    (folder / "b.gz").write_bytes(gzip.compress((folder / "b.fasta").read_bytes()))
    assert run("a.fasta", "b.gz", "--format=tsv")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "b.gz").read_bytes())))
    assert run("a.fasta", "-", "--format=tsv", "--output=o.tsv.gz")[:2] == (0, "")
    assert gzip.decompress((folder / "o.tsv.gz").read_bytes()).decode() == expected


def test_the_plan_is_drawn(run, folder):
    assert run("a.fasta", "b.fasta", "--plot=plan.png")[0] == 0
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    status, _, errors = run("many.fasta", "--plot=plan.png")
    assert status == 1 and "--plot draws the plan of one pair; 3 were given" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.fasta is empty"),
        (b"MKV\n", "begins with 'MKV', not with '>'"),
        (b"HEADER    OXYGEN TRANSPORT\n", "it is a PDB file"),
        (b">a\nMKV\n>a\nMKV\n", r"record 2 \(a\): this id has occurred before"),
        (b">a\nMK\nV1L\n", r"record 1 \(a\), position 4: '1' is no residue"),
        (
            b">a\n" + b"M" * ((1 << 24) + 1) + b"\n>b\nM\n",
            r"record 1 \(a\): 16777217 residues were given, allowed are at most 16777216; cut it into domains",
        ),
        (b">a\nMK\0V\n", "is not text"),
        (gzip.compress(b">a\nMKV\n" * 9, mtime=0)[:-9], "cannot be unpacked"),
        (b">a\n" + b"ACGT" * 9 + b"\n>b\n" + b"ACGT" * 9, "holds DNA, it seems"),
        (b">a\nMKV\n", "holds one sequence; give a second file"),
    ],
)
def test_bad_input_is_named_and_what_was_written_before_stays(run, folder, content, message):
    (folder / "bad.fasta").write_bytes(content)
    (folder / "kept.txt").write_text("before")
    with mock.patch.object(align, "_load", side_effect=AssertionError("the model is loaded")):
        status, output, errors = run("bad.fasta", "--output=kept.txt")
    assert status == 1 and output == "" and (folder / "kept.txt").read_text() == "before"
    assert errors.count("\n") == 1 and errors.startswith("align.py: bad.fasta")
    assert re.search(message, errors)


def test_bad_tables_and_files_are_named(run, folder):
    (folder / "bad.tsv").write_text("a\tMKV\tMKV\nb\tMKV\n")
    assert "bad.tsv, line 2: 2 columns" in run("--pairs=bad.tsv")[2]
    (folder / "bad.tsv").write_text("HBA\tHBB\nHBA\tnobody\n")
    assert "bad.tsv, line 2: no sequence has the id 'nobody'" in run("--pairs=bad.tsv", "many.fasta")[2]
    status, _, errors = run("nowhere.fasta")
    assert status == 1 and "nowhere.fasta" in errors and errors.count("\n") == 1
    status, _, errors = run("a.fasta", "b.fasta", "--weights=nowhere.safetensors")
    assert status == 1 and "no weights at nowhere.safetensors" in errors


def test_doubtful_input_is_warned_of(run, folder):
    (folder / "odd.fasta").write_bytes(b"\xef\xbb\xbf>dna\n" + b"ACGT" * 8 + b"\r\n>gaps caf\xe9\r\nM-K.V*UX\r\n")
    status, output, errors = run("odd.fasta", "--format=fasta")
    assert status == 0 and "caf" in output and "MKVXUX" in output.replace("-", "")
    for part in (
        "is not UTF-8",
        "nucleotides",
        "gaps (",
        "'*' is read as X in 1 sequence, record 2 (gaps), position 6",
    ):
        assert part in errors
    assert errors.count("\n") == errors.count("align.py: warning: odd.fasta") == 4
    assert run("odd.fasta", "--format=fasta", "--quiet")[2] == ""


def test_records_that_cannot_be_read_are_left_out_on_demand(run, folder):
    (folder / "mixed.fasta").write_text(f">HBA\n{HBA}\n>bad\nMK1\n>HBB\n{HBB}\n>HBB\n{HBB}\n")
    assert run("mixed.fasta")[0] == 1
    status, output, errors = run("mixed.fasta", "--skip-bad", "--format=jsonl")
    assert status == 0 and [json.loads(line)["id"] for line in output.splitlines()] == ["HBA:HBB"]
    assert "left out: mixed.fasta, record 2 (bad), position 3" in errors and "left out: mixed.fasta, record 4" in errors
    assert errors.splitlines()[-1] == "align.py: warning: 2 records or pairs that cannot be read were left out"
    (folder / "mixed.fasta").write_text(">bad\nMK1\n")
    (folder / "kept.txt").write_text("before")
    status, _, errors = run("mixed.fasta", "a.fasta", "--skip-bad", "--output=kept.txt")
    assert status == 1 and "none of its records can be read" in errors and (folder / "kept.txt").read_text() == "before"


def test_a_table_of_ids_beside_sequences(run, folder):
    (folder / "ids.tsv").write_text("x\ty\nHBB\tpart\nHBA\tHBB\nHBB\tone\n")
    status, output, _ = run("--pairs=ids.tsv", "many.fasta", "--format=jsonl")
    assert status == 0 and [json.loads(line)["id"] for line in output.splitlines()] == [
        "HBB:part",
        "HBA:HBB",
        "HBB:one",
    ]
    status, _, _ = run("--pairs=ids.tsv", "many.fasta", "--format=a3m", "--output-dir=of_ids")
    assert status == 0 and sorted(path.name for path in (folder / "of_ids").iterdir()) == ["HBA.a3m", "HBB.a3m"]
    records = SeqIO.parse(folder / "of_ids" / "HBB.a3m", "fasta")
    assert [record.id for record in records] == ["HBB", "part", "one"]


def test_an_a3m_has_one_query(run, folder):
    (folder / "queries.fasta").write_text(f">q/1\n{FRAGMENT}\n>q_1\n{HBA}\n>Q_1\n{HBB}\n>..\nMKVL\n")
    (folder / "kept.a3m").write_text("before")
    for arguments in (["queries.fasta", "many.fasta"], ["many.fasta", "--all-pairs"]):
        status, output, errors = run(*arguments, "--format=a3m", "--output=kept.a3m")
        assert status == 1 and output == "" and (folder / "kept.a3m").read_text() == "before"
        assert "an A3M holds one query" in errors and "--output-dir=DIR" in errors
    assert run("queries.fasta", "many.fasta", "--format=a3m", "--output-dir=hits/new")[:2] == (0, "")
    written = {path.name: list(SeqIO.parse(path, "fasta")) for path in (folder / "hits/new").iterdir()}
    assert {name: records[0].id for name, records in written.items()} == {
        "q_1.a3m": "q/1",
        "q_1_2.a3m": "q_1",
        "Q_1_3.a3m": "Q_1",
        "_..a3m": "..",
    }
    for query, *others in written.values():
        assert [record.id for record in others] == ["HBA", "HBB", "part", "one"]
        assert {sum(not c.islower() for c in record.seq) for record in others} == {len(query)}


@pytest.mark.parametrize("form", [*formats.FORMATS, "tsv:id,aligned"])
def test_every_format_can_be_written_to_a_file_a_query(run, folder, form):
    status, *_ = run("b.fasta", "a.fasta", f"--format={form}", "--output-dir=each")
    text = (folder / "each" / f"HBB{formats.suffix(form)}").read_text()
    assert status == 0 and text == run("b.fasta", "a.fasta", f"--format={form}")[1] != ""


def test_ids_of_an_a3m_are_told_apart(run):
    records = SeqIO.parse(io.StringIO(run("a.fasta", "many.fasta", "--format=a3m")[1]), "fasta")
    assert [record.id for record in records] == ["HBA", "HBA_2", "HBB", "part", "one"]


def test_ids_shift_no_column(run, folder):
    (folder / "tabs.fasta").write_text(f">#hb1\talpha\tchain\n{HBA}\n>//\tbeta\n{HBB}\n")
    rows = [line.split("\t") for line in run("tabs.fasta", "--format=tsv")[1].splitlines()]
    assert {len(row) for row in rows} == {7} and rows[1][0] == "#hb1://"
    (folder / "tabs.sto").write_text(run("tabs.fasta", "--format=stockholm")[1])
    (found,) = stockholm.read(folder / "tabs.sto")
    assert found.ids == ("_#hb1", "_//") and ("_#hb1", "DE", "alpha chain") in found.gs
    assert [bytes(row).decode().replace("-", "") for row in found.rows] == [HBA, HBB]


def test_output_is_replaced_by_a_finished_run_only(run, folder):
    (folder / "kept.jsonl").write_text("before")
    with mock.patch.object(Pretrained, "align_chunks", side_effect=KeyboardInterrupt):
        status, _, errors = run("a.fasta", "b.fasta", "--format=jsonl", "--output=kept.jsonl")
    assert (status, errors) == (130, "align.py: interrupted\n") and (folder / "kept.jsonl").read_text() == "before"

    with mock.patch.object(formats.Writer, "text", side_effect=OSError("no space left")):
        status, _, errors = run("a.fasta", "b.fasta", "--output=kept.jsonl")
    assert (status, errors) == (1, "align.py: no space left\n") and (folder / "kept.jsonl").read_text() == "before"
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or ".part" in path.name]


@pytest.mark.parametrize(
    ("suffix", "unpack"), [(".gz", gzip.decompress), (".bz2", bz2.decompress), (".xz", lzma.decompress)]
)
def test_names_say_how_output_is_packed(run, folder, suffix, unpack):
    assert run("a.fasta", "b.fasta", "--format=tsv", f"--output=new/o.tsv{suffix}")[:2] == (0, "")
    assert unpack((folder / f"new/o.tsv{suffix}").read_bytes()).decode() == run("a.fasta", "b.fasta", "--format=tsv")[1]


def test_home_is_the_home_folder(run, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert run("~/a.fasta", "~/b.fasta", "--output=~/at_home.txt", "--plot=~/at_home.png")[0] == 0
    assert (folder / "at_home.txt").exists() and (folder / "at_home.png").exists()


def test_a_pair_that_memory_cannot_hold_is_named_before_it_is_compiled(run, folder):
    (folder / "long.fasta").write_text(f">short\n{HBA}\n>q\n{HBA * 20}\n>long\n{HBB * 30}\n")
    with mock.patch("data.memory.available", return_value=300_000_000):
        with mock.patch.object(Pretrained, "align_chunks", side_effect=AssertionError("aligned")):
            status, output, errors = run("long.fasta", "--all-pairs", "--band=-1")
        assert (status, output, errors.count("\n")) == (1, "", 1)
        assert re.search(
            r"q:long, 2840 x 4410 residues: .* about 1\.[4-7] GB of memory, 0\.3 GB are left; --band=N", errors
        )
        assert run("a.fasta", "b.fasta")[0] == 0


def test_a_pair_that_no_band_makes_fit_is_named_too(run, folder):
    (folder / "long.fasta").write_text(f">titins\n{HBA * 800}\n>long\n{HBB * 700}\n")
    with (
        mock.patch("data.memory.available", return_value=900_000_000),
        mock.patch.object(Pretrained, "align_chunks", side_effect=AssertionError("aligned")),
    ):
        status, output, errors = run("long.fasta")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert re.search(
        r"titins:long, 113600 x 102900 residues: .* about 2\.6 GB of memory, 0\.9 GB are left; cut the longer", errors
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b", "c"],
        ["a", "b", "--all-pairs"],
        ["-", "-"],
        ["a", "--band=0"],
        ["a", "--format=x"],
        ["a", "--format=tsv:"],
        ["a", "--format=tsv:id,nothing"],
        ["a", "--output=o", "--output-dir=d"],
        ["a", "--plot=plan"],
        ["a", "--plot=plan.txt"],
        ["a", "--threads=0"],
        ["a", "--decoder=plan"],
        ["a", "--mode=semiglobal"],
        ["a", "--top=0"],
        ["a", "--min-probability=1.01"],
        ["a", "--min-probability=-0.1"],
        ["a", "--min-probability=nan"],
        ["a", "--min-probability=half"],
        ["a", "--resume"],
        ["a", "--resume", "--output=-"],
        ["--pairs=p", "--top=2"],
        ["a", "--pairs=p", "--all-pairs"],
        ["a", "b", "c", "--pairs=p"],
        ["-", "--pairs=-"],
        [__file__, "--output=" + __file__],
        ["a", "--weights=w", "--workdir=r"],
    ],
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        align.main(arguments)
    errors = capsys.readouterr().err
    assert error.value.code == 2 and "align.py: error: " in errors
    if "nothing" in "".join(arguments):
        assert "'nothing' is no column; allowed are blast12, id, x, y, x_start" in errors


@pytest.fixture(scope="module")
def command(folder) -> Callable[..., subprocess.Popen]:
    """Start the command line as a process of its own."""
    environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache"), "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = str(tiny.ROOT)

    def start(*arguments: str) -> subprocess.Popen:
        program = [sys.executable, str(tiny.ROOT / "scripts/align.py"), "--weights=w.safetensors", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(program, cwd=folder, env=environment, **pipes)

    return start


def test_a_reader_that_stops_is_no_error(folder, command):
    done = command("many.fasta")
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 0
    assert list((folder / "cache" / "ot-attention").iterdir()), "compiled programs are kept"


def test_ctrl_c_is_one_line_and_leaves_no_output(folder, command):
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    rows = ("".join(letters[rng.integers(0, 20, 300)]) for _ in range(400))
    (folder / "much.fasta").write_text("".join(f">{n}\n{row}\n" for n, row in enumerate(rows)))
    started = command("much.fasta", "--all-pairs", "--format=jsonl", "--output=much.jsonl", "--threads=1")
    while not (folder / "much.jsonl.part.json").exists() and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=60)
    assert (started.returncode, output, errors) == (130, b"", b"align.py: interrupted\n")
    assert not list(folder.glob("*much.jsonl*")), "the first chunk was not finished"


def test_the_weights_that_ship_align_globins(run):
    status = align.main(["a.fasta", "b.fasta", "--output=shipped.jsonl", "--format=jsonl"])
    record = json.loads(Path("shipped.jsonl").read_text())
    assert status == 0 and [140, 145] in record["pairs"] and len(record["pairs"]) > 135
    assert np.mean(record["confidence"]) > 0.8
