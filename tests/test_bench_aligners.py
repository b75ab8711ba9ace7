"""scripts/bench_aligners.py: peers that run for real where they are installed, figures of eval.py, and what is told."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import parasail
import pytest

from benchmarks import aligners, peers
from data import vocab
from data.evaluation_pairs import evaluation_batches
from data.transforms import NO_TARGET, Pair
from data.variants import EVALUATION_SETS
from evaluation import baselines, metrics, runs, scoring
from evaluation.alignment import open_families
from scripts import bench_aligners
from tests.support import tiny

DATA = "data/default"
LIMIT = 16  # pairs; of test_ood, all are of lengths that eval.py scores with a limit
ALPHA = "VLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKLLSH"
BETA = "VHLTPEEKSAVTALWGKVNVDEVGGEALGRLLVVYPWTQRFFESFGDLSTPDAVMGNPKVKAHGKKVLGAFSDGLAHLDNLKGTFATLSELHCDKLHVDPENFRL"


def pair_of(x: str, y: str) -> Pair:
    x_tokens, y_tokens = (vocab.encode(of.encode()) for of in (x, y))
    return Pair(x_tokens, y_tokens, np.full(len(x), NO_TARGET, np.int32))


def lines_of(pairs: list[dict], path: Path) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in pairs).encode()))
    return path


def installed(name: str) -> peers.Peer:
    found, missing = peers.find(None)
    if name in missing:
        pytest.skip(f"{name} is not installed (Debian package {peers.TOOLS[name].package})")
    return next(peer for peer in found if peer.name == name)


def fake(folder: Path, name: str, script: str) -> None:
    """Write an executable in the place of a program that is not installed."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# ---- alignments of the peers ----


def test_fasta_with_gaps_is_read_in_any_order_and_checked():
    pair = pair_of("ACDE", "ADEF")
    text = "Noise of a program\n>y other words\nA-D.EF\n>x\nACD\n-e-\n"
    assert peers.from_fasta(text, pair).tolist() == [0, NO_TARGET, 1, 2]
    for broken, told in {
        "": "has the records none",
        ">x\nACDE\n": "has the records x",
        ">x\nACDE\n>y\nADEF-\n": "rows of 4 and 5 columns",
        ">x\nACDE\n>y\nADEG\n": "not those that were given",
        ">x\nACDE\n>y\nAD1F\n": "'1' is no residue",
    }.items():
        with pytest.raises(ValueError, match=told):
            peers.from_fasta(broken, pair)


def test_positions_of_hhalign_are_of_the_first_alignment():
    pair = pair_of("ACDE", "ADEF")
    head = ">y\nmissing dssp\n    i     j  score     SS  probab\n"
    first = "    1     1   1.79   0.00  0.7342\n    3     2   0.22   0.00  0.8460\n"
    assert peers.from_positions(f"{head}{first}{head}    4     4   0.2   0.0  0.8\n", pair).tolist() == [0, -1, 1, -1]
    assert peers.from_positions("", pair).tolist() == [NO_TARGET] * 4  # nothing similar was found
    with pytest.raises(ValueError, match="beyond the sequences"):
        peers.from_positions(head + "    5     1   1.79   0.00  0.7\n", pair)


def test_parasail_aligns_globally_semiglobally_and_locally():
    found, _ = peers.find(("nw_blosum62", "semiglobal_blosum62", "local_blosum62"))
    apart = pair_of("CCSSS", "TTTCC")
    whole, ends, local = (peer.align(apart).tolist() for peer in found)
    assert whole == list(range(5)) and ends == local == [3, 4] + [NO_TARGET] * 3
    # Residues at both ends that are not alike stay outside a local alignment alone.
    shifted = pair_of("PPPPPWWWWCHHHHWGGGGG", "DDDWWWWCHHHHWKKKKKKK")
    assert found[2].align(shifted).tolist() == [NO_TARGET] * 5 + list(range(3, 13)) + [NO_TARGET] * 5


@pytest.mark.parametrize("name", peers.TOOLS)
def test_an_installed_program_aligns_relatives(name):
    peer = installed(name)
    assert peer.external and peer.version
    pair = pair_of(ALPHA, BETA)
    match, expected = peer.align(pair), baselines.nw_blosum62(pair).match
    rows = np.flatnonzero(match != NO_TARGET)
    assert (np.diff(match[rows]) > 0).all()
    assert (match == expected)[expected != NO_TARGET].mean() > 0.6


def test_one_name_serves_two_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "muscle", "echo 'MUSCLE v3.8.1551 by Robert C. Edgar'")
    found, missing = peers.find(None)
    assert [(peer.name, peer.version) for peer in found if peer.external] == [("muscle3", "MUSCLE v3.8.1551")]
    assert "muscle5" in missing and "kalign" in missing
    with pytest.raises(FileNotFoundError, match=r"muscle5, fsa not found on the PATH; .* packages muscle fsa, or"):
        peers.find(("muscle5", "muscle3", "fsa"))


FAILING = """
if [ "$1" = --version ]; then echo 'kalign 0.0'; exit; fi
if grep -q WWWW in.fa; then echo 'no memory for it' >&2; exit 3; fi
cp in.fa out.fa
"""


def test_a_pair_that_a_peer_fails_on_has_no_alignment(tmp_path, monkeypatch, capsys):
    fake(tmp_path / "bin", "kalign", FAILING)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    rows = [{"x": x, "y": y, "ref": [[0, 0], [1, 1]]} for x, y in (("ACDE", "ACDF"), ("WWWW", "WWWF"), ("KLM", "KLV"))]
    given = [f"--pairs={lines_of(rows, tmp_path / 'pairs.jsonl.gz')}", "--no-model", "--peers=kalign"]
    output = tmp_path / "results.json"
    assert bench_aligners.main([*given, f"--output={output}", f"--plot={tmp_path / 'bars.png'}"]) == 0
    printed = capsys.readouterr().out
    assert "kalign failed on 1 of 3 pairs, first: exit status 3: no memory for it" in printed
    entry = json.loads(output.read_text())["aligners"]["kalign"]
    assert entry["failures"]["count"] == 1 and entry["overall"]["mean_f1"]["value"] == pytest.approx(2 / 3)
    assert entry["cpu_seconds"] > 0 and (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


# ---- pairs, and what counts ----


def test_pairs_of_a_file(tmp_path):
    rows = [{"x": "ACDEF", "y": "ACDFK", "ref": [[1, 1], [2, 2]]}]
    pairs = aligners.of_file(lines_of(rows, tmp_path / "pairs.jsonl.gz"), None)
    (case,) = pairs.cases
    assert case.pair.target.tolist() == [-1, 1, 2, -1, -1] and pairs.covered
    # (0, 0) and (4, 4) are beyond the reference; (3, 2) contradicts it.
    match = np.array([0, 1, NO_TARGET, 2, 4], np.int32)
    assert aligners.counted(match, case, covered=True).tolist() == [-1, 1, -1, 2, -1]
    assert aligners.counted(match, case, covered=False) is match


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"x": "ACD", "y": "AC"}, "KeyError: 'ref'"),
        ({"x": "AC1", "y": "AC", "ref": []}, "'1' at position 2"),
        ({"x": "ACD", "y": "AC", "ref": [[0, 2]]}, "positions from 0"),
        ({"x": "ACD", "y": "ACD", "ref": [[1, 1], [2, 0]]}, "both rising"),
        ({"x": "", "y": "AC", "ref": []}, "not empty"),
        ([1], "TypeError"),
    ],
)
def test_a_wrong_line_is_named(row, told, tmp_path, capsys):
    good = {"x": "AC", "y": "AC", "ref": [[0, 0]]}
    path = lines_of([good, row], tmp_path / "pairs.jsonl.gz")
    assert bench_aligners.main(["--no-model", f"--pairs={path}"]) == 1
    error = capsys.readouterr().err
    assert told in error and "pairs.jsonl.gz, pair 2" in error and error.count("\n") == 1


def test_a_cut_file_is_told(tmp_path):
    path = lines_of([{"x": "AC" * 50, "y": "AC" * 50, "ref": []}] * 50, tmp_path / "pairs.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        aligners.of_file(path, None)


# ---- figures ----


@pytest.mark.parametrize("split", ["test_ood", pytest.param("test_ood_flanked", marks=pytest.mark.slow)])
def test_figures_are_those_of_eval(split, tmp_path, capsys):
    run, output, (base, variant) = runs.load_run(tiny.trained()), tmp_path / "results.json", EVALUATION_SETS[split]
    families = open_families(DATA, base)
    batches = evaluation_batches(families, 4, run.config.data.buckets, variant=variant, limit=LIMIT)
    evaluated = scoring.score_split(run.pretrained(), families, batches)

    given = [f"--workdir={tiny.trained()}", f"--data={DATA}", f"--split={split}", f"--limit={LIMIT}"]
    assert bench_aligners.main([*given, "--peers=nw_blosum62", f"--output={output}"]) == 0
    found = json.loads(output.read_text())["aligners"]
    # Batches of other pairs may round otherwise, and the alignments of a model that was hardly trained hang on it.
    for name, of_eval, within in (("ours", "model", 2e-3), ("nw_blosum62", "nw_blosum62", 1e-9)):
        ours, theirs = found[name], evaluated[of_eval]
        assert ours["pairs"] == theirs["pairs"] == LIMIT and ours["families"] == theirs["families"]
        for metric in ("f1", "precision", "recall"):
            assert ours["overall"][metric] == pytest.approx(theirs["overall"][metric], abs=within)
        for group, of_bin in theirs["bins"].items():
            assert ours["bins"][group]["pairs"] == of_bin["pairs"]
            assert ours["bins"][group]["f1"] == pytest.approx(of_bin["f1"], abs=5 * within)
    assert found["ours"]["cpu_seconds_with_compilation"] > found["ours"]["cpu_seconds"] > 0
    of_all = found["ours"]["calibration"]["overall"]
    assert of_all["right"] == pytest.approx(found["ours"]["overall"]["precision"]["value"])
    assert set(found["ours"]["calibration"]) - {"overall"} == set(found["ours"]["bins"])
    printed = capsys.readouterr().out
    assert "Ahead of ours in F1: overall: nw_blosum62" in printed and "expected calibration error" in printed


def test_mean_f1_is_a_mean_over_pairs():
    pairs = aligners.of_split(DATA, "test_iid", LIMIT)
    (peer,), _ = peers.find(("nw_blosum62",))
    entry = aligners.measure_peer(peer, pairs)
    scores = [metrics.score_alignment(of.family, of.pair, peer.align(of.pair)) for of in pairs.cases]
    assert entry["overall"]["mean_f1"]["value"] == pytest.approx(np.nanmean([score.f1 for score in scores]))
    assert len(pairs.cases) == LIMIT == entry["pairs"]


def test_calibration_error_is_the_mean_distance_of_tenths():
    tenths = [
        {"confidence": 0.2, "correct": 0.5, "pairs": 1},
        {"confidence": 0.9, "correct": 0.8, "pairs": 3},
    ]
    assert metrics.calibration(tenths) == pytest.approx(
        {"stated": 0.725, "right": 0.725, "error": (0.3 + 3 * 0.1) / 4, "pairs": 4}
    )


# ---- the file of results ----


@pytest.fixture
def first(tmp_path) -> tuple[Path, list[str]]:
    """A file of one peer, and the command line that made it."""
    given = ["--no-model", f"--data={DATA}", "--split=test_iid", "--limit=8", f"--output={tmp_path / 'results.json'}"]
    assert bench_aligners.main([*given, "--peers=nw_blosum62"]) == 0
    return tmp_path / "results.json", given


def test_resuming_keeps_what_is_there(first, monkeypatch, capsys):
    path, given = first
    before = json.loads(path.read_text())["aligners"]["nw_blosum62"]
    called: list[str] = []
    measure = aligners.measure_peer
    monkeypatch.setattr(aligners, "measure_peer", lambda peer, *of: called.append(peer.name) or measure(peer, *of))
    assert bench_aligners.main([*given, "--resume", "--peers=nw_blosum62,local_blosum62"]) == 0
    after = json.loads(path.read_text())["aligners"]
    assert called == ["local_blosum62"] and list(after) == ["nw_blosum62", "local_blosum62"]
    assert after["nw_blosum62"] == before
    assert bench_aligners.main([*given, "--resume", "--peers=none"]) == 0 and len(called) == 1
    assert "local_blosum62" in capsys.readouterr().out.split("\n\n")[-2]
    # Another version of a peer is measured again.
    path.write_text(path.read_text().replace(before["version"], "parasail 0.1"))
    assert bench_aligners.main([*given, "--resume", "--peers=nw_blosum62"]) == 0
    assert called == ["local_blosum62", "nw_blosum62"]


def test_results_are_not_lost_or_mixed(first, capsys):
    path, given = first
    before = path.read_bytes()
    for more, told in {
        (): "exists: add to it with --resume",
        ("--resume", "--limit=7"): "results of other pairs",
        ("--resume", "--split=test_ood"): "results of other pairs",
    }.items():
        assert bench_aligners.main([*given, *more]) == 1
        assert told in capsys.readouterr().err and path.read_bytes() == before
    path.write_text("{}")
    assert bench_aligners.main([*given, "--resume"]) == 1
    assert "holds no results of bench_aligners.py" in capsys.readouterr().err


def test_an_interruption_loses_one_aligner(first, monkeypatch):
    path, given = first

    def interrupted(algorithm, pair):
        if algorithm is parasail.sw_trace_striped_sat:
            raise KeyboardInterrupt
        return baselines_match(algorithm, pair)

    baselines_match = baselines.trace_match
    monkeypatch.setattr(baselines, "trace_match", interrupted)
    status = bench_aligners.main([*given, "--resume", "--peers=semiglobal_blosum62,local_blosum62"])
    assert status == 130
    assert list(json.loads(path.read_text())["aligners"]) == ["nw_blosum62", "semiglobal_blosum62"]


# ---- tables and the command line ----


def entry(f1: float, kind: str = "peer", seconds: float = 1.0) -> dict:
    values = {name: {"value": f1, "low": None, "high": None} for name in ("f1", "mean_f1", "precision", "recall")}
    facts = {"kind": kind, "pairs": 9, "families": 9, "failures": {"count": 0, "first": ""}}
    return facts | {"overall": values, "bins": {"<.15": values | {"pairs": 4}}, "cpu_seconds_per_1000_pairs": seconds}


def test_the_best_has_a_star_and_peers_that_are_ahead_are_named():
    entries = {"ours": entry(0.7, "model", 9), "mafft": entry(0.8), "fsa": entry(0.9, seconds=2), "kalign": entry(0.6)}
    text = bench_aligners.report(entries, "ours")
    lines = {line.split()[0]: line.split() for line in text.split("\n\n")[0].splitlines()[2:]}
    assert lines["fsa"] == ["fsa", *["0.900", "*"] * 4, "2", "0"]
    assert lines["mafft"] == ["mafft", *["0.800"] * 4, "1", "*", "0"]
    expected = "fsa 0.900, mafft 0.800 (ours 0.700)"
    assert text.endswith(f"Ahead of ours in mean F1: overall: {expected}; <.15 (4 pairs): {expected}.")
    assert "No peer is ahead of ours in F1, overall" in bench_aligners.report({"ours": entry(0.7, "model")}, "ours")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--peers=blast"], "'blast' was given, allowed are all, none, or of nw_blosum62"),
        (["--resume"], "--resume adds to the file of --output"),
        (["--no-model", "--weights=x"], "leave out --weights"),
        (["--name=mafft"], "is a peer's"),
        (["--plot=x.txt"], "names of pictures end in"),
        (["--split=negatives"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_aligners.main(arguments)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_nothing_to_measure_is_told(capsys):
    assert bench_aligners.main(["--no-model", f"--data={DATA}", "--limit=2", "--peers=none"]) == 1
    assert "leave nothing to measure" in capsys.readouterr().err


def test_peers_that_are_not_found_are_named(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert bench_aligners.main(["--no-model", f"--data={DATA}", "--limit=2"]) == 0
    missing = ", ".join(peers.TOOLS)
    assert capsys.readouterr().out.startswith(f"not found, and left out: {missing} (Debian packages: probcons muscle ")
