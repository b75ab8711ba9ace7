"""The benchmark of a card runs every stage at tiny sizes, and no stage costs another one its results or its time."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import harness
from benchmarks.attention import Case
from benchmarks.gpu_programs import TINY, Settings
from benchmarks.gpu_stages import STAGES
from models import weights
from ot_attention.backends import gpu_kernels
from scripts import bench_gpu

ROOT = Path(__file__).parents[1]
HALVES = ["ceilings", "conformance", "rates", "training"], ["alignments", "training_run"]


def start(output: Path, stages: list[str], environment: dict[str, str]) -> subprocess.Popen:
    flags = "--tiny", f"--output={output}", f"--work={output}_work", f"--config={ROOT / 'configs/r2_dustbin.py'}"
    command = [sys.executable, ROOT / "scripts/bench_gpu.py", *flags, "--stages", *stages]
    return subprocess.Popen(command, cwd=output.parent, env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_every_stage_runs_and_leaves_what_it_is_for(tmp_path):
    """One test, for the stages take a minute: two workers would run them twice."""
    results = run_all_stages(tmp_path)
    check_rows_and_tables(results)
    check_figures(results)
    (path,) = results[1].glob("*.safetensors")
    config, step = weights.read_config(path)
    assert step == TINY["total_steps"] and config["model"]["width"] == TINY["model.width"]


def run_all_stages(folder: Path) -> list[Path]:
    """Output folders of all stages, half of them beside the other half."""
    (folder / "wandb.py").write_text("raise ImportError('W&B is switched off and must not be imported')")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    outputs = [folder / str(n) for n in range(len(HALVES))]
    started = [start(*of, environment) for of in zip(outputs, HALVES, strict=True)]
    for process, output in zip(started, outputs, strict=True):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors + (output / "stages.log").read_text()[-3000:]
    return outputs


def check_rows_and_tables(results: list[Path]) -> None:
    for output, stages in zip(results, HALVES, strict=True):
        rows, table = harness.read_rows(output / "rows.jsonl"), (output / "table.md").read_text()
        assert list(dict.fromkeys(row["stage"] for row in rows)) == stages
        assert not [row for row in rows if "failed" in row]
        assert re.findall("^## (.*)", table, re.MULTILINE) == stages
        assert "failed" not in table
        for line in (output / "rows.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert all(f"===== {stage} =====" in (output / "stages.log").read_text() for stage in stages)
    names = {path.name for output in results for path in output.iterdir()}
    assert names == {"rows.jsonl", "table.md", "stages.log", "metrics.jsonl", "r2_dustbin.safetensors"}


def check_figures(results: list[Path]) -> None:
    rows = [row for output in results for row in harness.read_rows(output / "rows.jsonl")]
    of = {name: [row for row in rows if row["stage"] == name] for name in STAGES}
    assert of["ceilings"][0]["device"] and of["ceilings"][0]["versions"]["jax"]
    assert of["ceilings"][1]["GB_a_second"] > 0 and of["ceilings"][2]["TFLOP_a_second"] > 0
    assert all(0 < row["error_to_allowed"] <= 1 for row in of["conformance"])
    (sinkhorn, softmax), all_cells = of["rates"], 2 * 40 * 40
    for row, passes, cells in ((sinkhorn, 44, Case(1, 2, 40, 8).cells()), (softmax, 1, all_cells)):
        assert 0 < row["error"] < 2.0**-6 and row["forward_backward_ms"] > 0 and row["forward_compile_s"] > 0
        seconds = row["ps_a_cell_and_half_iteration"] * 1e-12 * cells * passes
        assert seconds == pytest.approx(row["forward_ms"] / 1e3)
        assert row["Tcell_a_second"] * row["ps_a_cell_and_half_iteration"] == pytest.approx(1)
    assert sinkhorn["ps_a_cell_and_step"] == pytest.approx(2 * sinkhorn["ps_a_cell_and_half_iteration"])
    assert sinkhorn["method"] == "pallas_gpu" and "ps_a_cell_and_step" not in softmax
    (step,) = of["training"]
    assert step["implementation"] == "pallas_gpu"
    assert step["examples_per_second"] == pytest.approx(1e3 * step["batch"] / step["step_ms"])
    assert np.isfinite(step["loss"])
    assert of["alignments"][0]["pairs_per_second"] > 0
    assert of["training_run"][0] | {"status": 0, "config": "r2_dustbin", "stopped": False} == of["training_run"][0]


# ---- one stage does not cost another ----


def test_a_stage_is_ended_at_its_limit_with_all_that_it_started(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    log, began = tmp_path / "log", time.monotonic()
    with log.open("w") as file:
        state = bench_gpu.run_limited([sys.executable, "-c", program], dict(os.environ), 3.0, file)
    assert state == "stopped at its limit" and time.monotonic() - began < 60
    assert gone(int(log.read_text()))


def gone(process: int) -> bool:
    """Tell whether a process ends within some seconds; one that nobody waits for stays as a zombie."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("status", "state"), [(0, "done"), (3, "failed")])
def test_how_a_stage_ended_is_told(status, state, tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert bench_gpu.run_limited([sys.executable, "-c", f"exit({status})"], dict(os.environ), 60, file) == state


def scheduled(
    tmp_path, monkeypatch, *flags: str, states=(), seconds=1.0, rows=()
) -> tuple[dict[str, float], list[str]]:
    """The limits that stages are given when each takes some seconds, and those that are said to have failed."""
    clock, limits, states = [0.0], {}, dict(states)

    def run(name, _, limit, log):
        limits[name], clock[0] = limit, clock[0] + seconds
        return states.get(name, "done")

    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench_gpu, "command_of", lambda name, *_: (name, {}))
    monkeypatch.setattr(bench_gpu, "run_limited", run)
    args = bench_gpu._parse([*flags, f"--output={tmp_path}", f"--work={tmp_path}"])
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / bench_gpu.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / bench_gpu.LOG).touch()
    return limits, bench_gpu.schedule(args, [])


def test_time_that_is_left_goes_to_the_last_stage(tmp_path, monkeypatch):
    limits, failed = scheduled(tmp_path, monkeypatch, "--all", "--minutes=12")
    assert list(limits) == list(STAGES) and failed == []
    assert limits["rates"] == pytest.approx(STAGES["rates"].share) == 180  # shares are seconds of 12 minutes
    assert limits["training_run"] == 720 - 5
    limits, _ = scheduled(tmp_path, monkeypatch, "--stages", "rates", "training", "--minutes=6")
    assert limits == {"rates": pytest.approx(360 * 180 / 350), "training": 359}
    limits, _ = scheduled(tmp_path, monkeypatch, "--all", "--minutes=1", seconds=25.0)
    assert list(limits) == ["ceilings", "conformance", "rates"] and limits["rates"] == 10


def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    states = {"ceilings": "failed", "rates": "stopped at its limit"}
    limits, failed = scheduled(tmp_path, monkeypatch, "--all", states=states)
    assert failed == ["ceilings"] and list(limits) == list(STAGES)
    assert "stage rates: 1 s of 180 s, stopped at its limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module named 'grain'"), "a package is missing: No module named 'grain'"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_a_stage_found_before_it_failed_is_kept(error, told, tmp_path, monkeypatch):
    def run(settings: Settings):
        yield {"what": "first", "seconds": 1.0}
        raise error

    monkeypatch.setitem(STAGES, "alignments", STAGES["alignments"]._replace(run=run))
    flags = ["--all", "--tiny", "--stage=alignments", f"--output={tmp_path}"]
    if isinstance(error, ImportError):
        assert bench_gpu.main(flags) == 1
    else:
        with pytest.raises(type(error)):  # the log has the traceback
            bench_gpu.main(flags)
    rows = harness.read_rows(tmp_path / "rows.jsonl")
    assert rows == [
        {"stage": "alignments", "what": "first", "seconds": 1.0},
        {"stage": "alignments", "failed": told},
    ]
    assert f"- failed: {told}" in bench_gpu.tables(rows)


def test_half_a_row_of_a_stage_that_was_ended_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"stage": "rates"}\n{"stage": "ra')
    assert harness.read_rows(tmp_path / "rows") == [{"stage": "rates"}]


def test_logs_are_kept_short(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "_MOST_LOG", 100)
    log = tmp_path / "log"
    log.write_text("x" * 100)
    bench_gpu.shorten(log)
    assert log.stat().st_size == 100
    log.write_text("x" * 200 + "the end")
    bench_gpu.shorten(log)
    assert log.stat().st_size == 50 and log.read_text().endswith("the end")


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "has_card", lambda: False)
    assert bench_gpu.main(["--all", f"--output={tmp_path / 'out'}"]) == 1
    assert "there is no GPU here" in (told := capsys.readouterr().err) and "--tiny" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("stage", ["ceilings", "alignments"])
def test_a_stage_does_not_measure_the_cpu_in_place_of_the_card(stage, tmp_path):
    with pytest.raises(RuntimeError, match="JAX computes on cpu here, not on a GPU"):
        bench_gpu.main(["--all", f"--stage={stage}", f"--output={tmp_path}"])
    (row,) = harness.read_rows(tmp_path / "rows.jsonl")
    assert "not on a GPU" in row["failed"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--all", "--override", "total_steps"], "write KEY=VALUE"),
        (["--all", "--minutes=0"], "must be above 0"),
        (["--stages", "speed"], "invalid choice: 'speed'"),
        ([], "one of the arguments --all --stages is required"),
    ],
)
def test_wrong_command_lines_are_explained(flags, told, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main(flags)
    assert told in capsys.readouterr().err


# ---- stages that start programs ----


def test_numbers_above_what_is_allowed_fail_a_stage(tmp_path, monkeypatch):
    from tests.support import conformance as suite

    found = {"out": (1e-4, 1e-3), "dq": (2e-3, 1e-3), "dk": (float("nan"), 1e-3)}
    monkeypatch.setattr(suite, "against_reference", lambda *_, **__: found)
    monkeypatch.setattr(gpu_kernels, "INTERPRET", False)  # a stage's own process switches it on: undone at the end
    assert bench_gpu.main(["--all", "--tiny", "--stage=conformance", f"--output={tmp_path}"]) == 0
    (row,) = harness.read_rows(tmp_path / "rows.jsonl")
    assert row["failed"] == "above what is allowed: dk, dq" and (row["worst"], row["error"]) == ("dk", "nan")
    assert "- failed: above what is allowed: dk, dq" in bench_gpu.tables([row])
    assert scheduled(tmp_path / "rest", monkeypatch, "--all", rows=[row])[1] == ["conformance"]
