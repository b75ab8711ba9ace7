"""Stages of the benchmark of a card, what they measure, and the wheels that it takes there."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_programs, gpu_rates, gpu_stages
from benchmarks.attention import Case
from benchmarks.gpu_stages import Settings
from ot_attention.backends import gpu_kernels
from scripts import bench_gpu, gpu_wheels, tune_gpu

ROOT = Path(__file__).parents[1]
SMALL = {"residues": 40, "heads": 2, "width": 16, "seconds": 0.0}


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_rates, "TOLERANCE", {"bfloat16": 1e-9})
    (row,) = gpu_rates.measured([gpu_rates.Entry(40, None, "softmax, xla", **SMALL)])
    assert "is not below 1.0e-09; not timed" in row["failed"] and 1e-9 < row["error"] < 2.0**-6
    assert "forward_ms" not in row


def test_a_method_that_cannot_run_costs_its_own_row():
    plan = [gpu_rates.Entry(40, None, method, **SMALL) for method in ("pallas_gpu", "softmax, xla")]
    refused, timed = gpu_rates.measured(plan)
    assert "there is no GPU here" in refused["failed"] and timed["forward_ms"] > 0


def test_cells_of_a_band_are_those_of_the_support():
    i = np.arange(40)
    assert Case(3, 2, 40, 4).cells() == 6 * (np.abs(i[:, None] - i) <= 4).sum()
    assert Case(3, 2, 40, None).cells() == 6 * 40 * 40


def test_rows_of_rates_can_be_chosen():
    flags = [
        "--stages",
        "rates",
        "--stage=rates",
        "--lengths",
        "8",
        "16",
        "--bands",
        "4",
        "full",
        "--dtypes",
        "float32",
    ]
    plan = bench_gpu.settings_of(bench_gpu._parse([*flags, "--methods", "pallas_gpu", "softmax, xla"])).rates
    assert [(row.length, row.band, row.method) for row in plan] == [
        (length, *of) for length in (8, 16) for of in ((4, "pallas_gpu"), (None, "pallas_gpu"), (None, "softmax, xla"))
    ]
    assert bench_gpu.settings_of(bench_gpu._parse(["--stages", "rates", "--stage=rates"])).rates == ()


@pytest.mark.parametrize(("seconds", "many"), [(80.0, 100_000), (40.0, 47_500), (18.0, None)])
def test_alignments_are_as_many_as_there_is_time_for(seconds, many, tmp_path, monkeypatch):
    clock = [0.0]

    def aligned(number, what, settings):
        clock[0] += 7.0
        return {"what": what, "pairs": number}

    monkeypatch.setattr(gpu_programs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu_programs, "_aligned", aligned)
    rows = list(gpu_programs.alignments(Settings(seconds, tmp_path, tmp_path)))
    assert [row["pairs"] for row in rows] == [2048, *([many] if many else [])]


def test_pairs_are_random_proteins_in_the_format_of_align(tmp_path):
    gpu_programs.write_pairs(tmp_path / "pairs.tsv", 50, 30)
    lines = [line.split("\t") for line in (tmp_path / "pairs.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == list(map(str, range(50)))
    assert len({residues for line in lines for residues in line[1:]}) == 100
    assert {len(residues) for line in lines for residues in line[1:]} == {30}


def test_training_is_told_to_stop_before_it_is_ended():
    heeds = "import signal, time; signal.signal(15, lambda *_: exit(75)); print('x', flush=True); time.sleep(600)"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    for program, expected in ((heeds, 75), (deaf, -9), ("import sys; sys.exit('no data')", 1)):
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()  # the handler stands
        status, errors = gpu_programs.stop_softly(
            process, 1.0 if expected != 1 else 60.0, 60.0 if expected == 75 else 1.0
        )
        assert status == expected and (expected != 1 or "no data" in errors)


def test_a_program_that_fails_is_quoted():
    assert gpu_programs.run_script("scripts/align.py", "--pairs=/nowhere.tsv").startswith("align.py: align.py: ")


def test_conformance_covers_what_kernels_distinguish():
    from tests.support import conformance as suite

    cases = {case.name: case for case in suite.CASES}
    assert len(gpu_stages.CONFORMANCE) == len(set(gpu_stages.CONFORMANCE)) == 12
    assert all(dustbin in cases[name].dustbins for name, dustbin, *_ in gpu_stages.CONFORMANCE)
    for choices, seen in zip(
        (suite.DUSTBINS, ["plain", "converging"], ["float32", "bfloat16"]),
        map(set, list(zip(*gpu_stages.CONFORMANCE, strict=True))[1:]),
        strict=True,
    ):
        assert seen == set(choices)
    assert {dtype for _, _, kind, dtype in gpu_stages.CONFORMANCE if kind == "converging"} == {"float32", "bfloat16"}


def test_utilisation_is_sampled_while_a_stage_runs(monkeypatch):
    told = iter(["37\n", "[N/A]\n", "41\n", None])
    monkeypatch.setattr(gpu_stages, "nvidia_smi", lambda *_: next(told))
    with gpu_stages.sampled_utilisation() as samples:
        time.sleep(1.5)
    assert [share for _, share in samples] == [37.0, 41.0] and samples[0][0] < samples[1][0] < time.perf_counter()


def test_random_pairs_of_training_are_padded_and_aligned():
    batch = gpu_stages._pairs(8, 30)
    real = np.arange(30) < batch["x_length"][:, None]
    assert ((batch["x"] > 0) == real).all() and not (batch["target"][~real] >= 0).any()
    assert (batch["target"] < batch["y_length"][:, None]).all() and (batch["target"] >= 0).any(1).all()


def test_every_requirement_is_carried_or_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["train"]
    wheels = [Requirement(line).name for line in gpu_wheels.wanted()]
    assert {Requirement(line).name for line in required} - {"wandb"} <= {*wheels, *gpu_wheels.THERE}
    assert not set(wheels) & gpu_wheels.THERE and len(wheels) == len(set(wheels))
    assert {"flax", "tabulate", "dm-tree"} <= set(wheels) and "wandb" not in wheels


def test_too_many_wheels_and_wheels_of_this_machine_are_refused(tmp_path):
    large, bound = tmp_path / "large-1-py3-none-any.whl", tmp_path / "own-1-cp312-cp312-linux_x86_64.whl"
    large.write_bytes(bytes(2**20))
    bound.touch()
    gpu_wheels.check([large], 1.0)
    with pytest.raises(ValueError, match=r"1\.0 MiB, more than --limit=0\.5; the largest are large-1-py3-none-any"):
        gpu_wheels.check([large], 0.5)
    with pytest.raises(ValueError, match="built for this machine only, and of no use elsewhere: own-1"):
        gpu_wheels.check([large, bound], 2.0)


def test_pip_that_fails_is_explained(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(gpu_wheels.subprocess, "run", lambda *_, **__: failed)
    assert gpu_wheels.main([f"--output={tmp_path}"]) == 1
    assert "pip download ended with status 1" in capsys.readouterr().err


def test_tilings_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
    monkeypatch.setattr(tune_gpu, "_CALLS", 1)
    problem, tiling = tune_gpu.Problem(40, 8, 16, "float32"), tune_gpu.Tiling(16, 4, 1, True)
    monkeypatch.setattr(tune_gpu, "variants", lambda kind: [tune_gpu.Variant(kind, problem, tiling, block=32)])
    tune_gpu.main(["--kinds", "sum", "gradient", "--residues=80", "--rounds=1", f"--output={tmp_path / 'rows.jsonl'}"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["sum", "gradient"]
    assert all(row["block"] == 32 and row["tile"] == 16 and row["ms"] > 0 for row in rows)
    assert rows[0]["ps_a_cell"] == pytest.approx(1e9 * rows[0]["ms"] / (2 * 40 * 17 - 2 * 72))
