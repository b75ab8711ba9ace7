"""scripts/align.py: what goes in, what comes out in every format, and that length costs no memory of its square."""

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import math
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
from flax import nnx

from alignment import batching, formats, inference, sequences
from alignment.columns import Aligned, columns_of, score_of
from alignment.inference import Pretrained
from alignment.sequences import Record
from data import stockholm, vocab
from models import weights
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of
from models.pair_aligner import PairAligner, PairAlignerConfig
from ot_attention import transport_plan
from scripts import align
from tests.support import tiny

HBA = (
    "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKLLSHCLL"
    "VTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR"
)
HBB = (
    "MVHLTPEEKSAVTALWGKVNVDEVGGEALGRLLVVYPWTQRFFESFGDLSTPDAVMGNPKVKAHGKKVLGAFSDGLAHLDNLKGTFATLSELHCDKLHVDPENFRLL"
    "GNVLVCVLAHHFGKEFTPPVQAAYQKVVAGVANALAHKYH"
)
FRAGMENT = HBA[30:90]


def config(**model: object) -> dict:
    """BLOSUM62 and nothing learned: it aligns relatives as they should be."""
    settings = {"width": 16, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8, "plan_gain": 1e-3}
    return {"task": "pair_hmm", "model": settings | model, "attention": {}}


def initial(of: dict) -> Pretrained:
    spec, _ = specs_of(of)
    graph, params = nnx.split(PairAligner(PairAlignerConfig(**of["model"]), spec, rngs=nnx.Rngs(0)))
    return Pretrained(graph, nnx.to_pure_dict(params), spec.band)


def program_of(model: Pretrained, shape: batching.Shape) -> tuple[Callable, dict]:
    """Return the function that aligns batches of a shape, and a batch."""
    sequence = {"tokens": np.ones(9, np.int32), "vectors": np.zeros((9, 8), np.float32)}
    batch = batching.padded([sequence], [sequence], shape)
    return functools.partial(inference._compute, model.graph, inference._Way(shape.band, "glocal", None)), batch


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


def prediction(model: Pretrained, x: np.ndarray, y: np.ndarray, **options: object) -> inference.Prediction:
    ((_, found),) = model.predict([(x, y)], **options)
    return found


def pairs_of(x: str, y: str) -> list[list[int]]:
    """Positions of the columns in which both have a residue; lower case is a residue of its own."""
    i = j = 0
    found = []
    for a, b in zip(x, y, strict=True):
        if a != "-" and b != "-":
            found.append([i, j])
        i, j = i + (a != "-"), j + (b != "-")
    return found


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


def test_score_is_that_of_needleman_wunsch(model):
    import parasail

    (found,) = model.align([tuple(vocab.encode(s.encode()) for s in (HBA, HBB))])
    aligned = Aligned("", Record("x", "", HBA), Record("y", "", HBB), *found)
    x, y = columns_of(aligned)[2:4]
    cigar = parasail.nw_trace_striped_16(x.replace("-", ""), y.replace("-", ""), 11, 1, parasail.blosum62)
    assert score_of(columns_of(aligned)) <= cigar.score
    best = Aligned(
        "",
        aligned.x,
        aligned.y,
        np.array(pairs_of(cigar.traceback.query, cigar.traceback.ref)),
        np.ones(200),
        1.0,
        *[np.ones(200)] * 2,
    )
    best = best._replace(confidence=np.ones(len(best.pairs)))
    assert score_of(columns_of(best)) == cigar.score


def test_identical_sequences_are_aligned_residue_by_residue(model):
    tokens = vocab.encode(HBB.encode())
    (found,) = model.align([(tokens, tokens)])
    np.testing.assert_array_equal(found.pairs, np.arange(len(HBB))[:, None].repeat(2, 1))
    assert found.confidence.mean() > 0.95 and found.probability > 0.95
    assert max(found.x_alone.mean(), found.y_alone.mean()) < 0.05


def test_a_model_of_plans_aligns_by_its_plan():
    """Compare with the dense plan of the reference; about homology such a model says nothing."""
    settings = {"width": 16, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8, "value_width": 8}
    settings |= {"plan_gain": 1e-3, "positions": False, "substitution_prior": True}
    spec, _ = specs_of({"attention": {"base_steps": 10, "band": 64, "dustbin": "full"}})
    graph, params = nnx.split(Aligner(AlignerConfig(**settings), spec, rngs=nnx.Rngs(0)))
    model = Pretrained(graph, nnx.to_pure_dict(params), spec.band)
    x, y = vocab.encode(HBA.encode()), vocab.encode(HBB.encode())
    lengths = np.array([len(x)], np.int32), np.array([len(y)], np.int32)

    @jax.jit
    def of_reference(x, y, x_length, y_length):
        aligner = nnx.merge(model.graph, model.params)
        (given,) = aligner.attention_inputs(x, y, x_length, y_length)["plan"]
        plan = transport_plan(given.q, given.k, given.spec, *given.lengths, given.dustbin_score)
        return plan[:, 0, : x.shape[1], : y.shape[1]]

    dense = np.asarray(of_reference(x[None], y[None], *lengths))[0]
    whole = prediction(model, x, y, band=64)
    np.testing.assert_allclose(whole.plan.dense(), dense, atol=1e-4)
    np.testing.assert_allclose(whole.posterior.dense(), dense, atol=1e-4)
    (found,) = model.align([(x, y)], band=64)
    np.testing.assert_allclose(found.confidence, dense[tuple(found.pairs.T)], atol=1e-4)
    assert (found.pairs[:, 1] == whole.match[found.pairs[:, 0]]).all() and len(found.pairs) > 120
    assert math.isnan(found.probability) and math.isnan(found.log_odds)
    picture, scale = whole.plan.picture(50)
    assert scale == 3 and picture.shape == (48, 49)
    assert picture.max() == pytest.approx(dense.max(), abs=1e-4)


def test_a_batch_is_aligned_as_each_pair_is(model):
    """Lengths need several programs and batches; results come in the order given."""
    rng = np.random.default_rng(0)
    whole = [vocab.encode(s.encode()) for s in (HBA, HBB, HBB[5:])]
    pairs = [(whole[i], whole[j]) for i, j in rng.integers(0, 3, (5, 2))]
    pairs.insert(2, (whole[0], vocab.encode(FRAGMENT.encode())))
    counts: list[int] = []
    together = model.align(pairs, done=counts.append)
    assert sum(counts) == len(pairs) == len(together)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = model.align([pair])
        np.testing.assert_array_equal(found.pairs, alone.pairs)
        np.testing.assert_allclose(found.confidence, alone.confidence, atol=1e-3)


def test_a_domain_is_found_anywhere_in_a_long_sequence(model):
    """Farther from the diagonal than the band of training reaches."""
    rng = np.random.default_rng(1)
    flank = rng.integers(1, 21, 300).astype(np.int32)
    x, y = vocab.encode(HBA.encode()), vocab.encode(HBB.encode())
    for left, right in ((0, 300), (300, 0), (150, 150)):
        embedded = np.concatenate([flank[:left], y, flank[300 - right :]]) if left + right else y
        (found,) = model.align([(x, embedded)])
        inside = (found.pairs[:, 1] >= left) & (found.pairs[:, 1] < left + len(y))
        assert inside.mean() > 0.9 and len(found.pairs) > 110


def test_memory_grows_with_the_length_alone(model):
    """The program for two sequences of 6,000 residues never holds as much as all pairs of them would take."""
    program, batch = program_of(model, batching.Shape(1, 6144, 6144, 256))
    compiled = jax.jit(program).lower(model.params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 6144 * 6144
    rng = np.random.default_rng(2)
    x = rng.integers(1, 21, 1500).astype(np.int32)
    y = np.where(rng.random(1500) < 0.3, rng.integers(1, 21, 1500), x).astype(np.int32)
    plan = prediction(model, x, y).plan
    assert plan.values.shape == (2 * 1536 - 1, inference.BAND)
    (found,) = model.align([(x, y)])
    assert (found.pairs[:, 0] == found.pairs[:, 1]).mean() > 0.98
    (part,) = model.align([(x[:140], y[:140])])
    assert found.confidence.mean() > part.confidence.mean() - 0.02, "longer pairs are not less sure"


def test_sequences_are_encoded_once(model):
    """Vectors do not depend on the sequences beside them either, so that a run that goes on gives the same bytes."""
    seen = []

    def counted(function):
        compiled = jax.jit(function)
        is_encoder = function.func is inference._encode

        def run(params, batch):
            if is_encoder:
                seen.extend(int(n) for n in batch["x_length"] if n)
            return compiled(params, batch)

        return run

    rng = np.random.default_rng(3)
    some = [rng.integers(1, 21, n).astype(np.int32) for n in (40, 50, 60, 70)]
    pairs = [(x, y) for x in some for y in some]
    counting = dataclasses.replace(model, compile=counted, programs={})
    found = [of for chunk in counting.align_chunks([pairs[:5], pairs[5:]]) for of in chunk]
    assert sorted(seen) == [40, 50, 60, 70] and len(found) == 16
    encoder = inference._Encoder(model)
    encoder.see(pairs)
    alone = inference._Encoder(model)
    alone.see(pairs[:1])
    np.testing.assert_array_equal(encoder.arrays(some[0])["vectors"], alone.arrays(some[0])["vectors"])


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
            b">a\n" + b"M" * 46_001 + b"\n>b\nM\n",
            r"record 1 \(a\): 46001 residues were given, allowed are at most 46000",
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


def test_the_estimate_of_memory_is_that_of_the_compiler(model):
    for shape in (
        batching.Shape(1, 1024, 1024, None),
        batching.Shape(1, 1536, 1536, 256),
        batching.Shape(2, 768, 768, None),
    ):
        program, batch = program_of(model, shape)
        found = jax.jit(program).lower(model.params, batch).compile().memory_analysis().temp_size_in_bytes
        assert 0.6 < batching.memory(shape, shape.batch, plan=False) / found < 1.7


def test_the_longest_sequences_are_aligned(model):
    """Padding may not exceed what the arithmetic of the band allows."""
    for length in (33_000, sequences.MAX_LENGTH):
        assert length <= batching.bucket(length) <= 46_276
    program, batch = program_of(model, batching.shape_of(sequences.MAX_LENGTH, 40_000, inference.BAND))
    shapes = {name: jax.ShapeDtypeStruct(of.shape, of.dtype) for name, of in batch.items()}
    assert jax.eval_shape(program, model.params, shapes).decoded.match.shape == (1, 46_080)


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


def test_lengths_are_checked(model):
    one = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="pair 0, y: 0 residues were given, allowed are 1 to 46000"):
        model.align([(one, one[:0])])


def test_long_pairs_have_a_band(model):
    assert (
        model.band_for(1000, 1024) is None and model.band_for(1, 1025) == model.band_for(9000, 40_000) == inference.BAND
    )
    of_plans = dataclasses.replace(model, params={}, band=64)
    for x_length, y_length in ((1, 1), (150, 170), (1500, 1520), (300, 2500), (5000, 5000), (5, 40_000)):
        band = of_plans.band_for(x_length, y_length)
        assert band is None or band >= abs(x_length - y_length)
    assert of_plans.band_for(5000, 5000) == of_plans.band_for(1500, 1520) == 64
    assert of_plans.band_for(20_000, 40_000) * 40_000 <= inference.MAX_CELLS


def test_modes_differ_at_the_ends(model):
    """A short overhang is aligned along in mode global, where it would cost as a gap does, and not for nothing."""
    rng = np.random.default_rng(4)
    core, *ends = (rng.integers(1, 21, n).astype(np.int32) for n in (60, 40, 40))
    x, y = np.concatenate([ends[0], core]), np.concatenate([ends[1], core])
    counts = {mode: len(model.align([(x, y)], mode=mode)[0].pairs) for mode in inference.MODES}
    assert counts["global"] >= counts["glocal"] and counts["local"] <= counts["glocal"] and counts["glocal"] >= 58
    probabilities = {model.align([(x, y)], mode=mode)[0].probability for mode in inference.MODES}
    assert len(probabilities) == 1, "homology is judged in mode glocal"
    assert align._MODES == inference.MODES
    with pytest.raises(ValueError, match="mode: 'semiglobal' was given, allowed are global, glocal, local"):
        model.align([(x, y)], mode="semiglobal")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 96, 97, 129, 5000, 46_000])
def test_buckets_hold_their_lengths_and_are_few(length):
    assert length <= batching.bucket(length) < max(65, 1.51 * length)
    assert len({batching.bucket(n) for n in range(1, 5001)}) == 14
