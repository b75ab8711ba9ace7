"""Every program of the repository: help, version, one line for a mistake, exit status, paths, silence."""

import argparse
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest

import command_line
import ot_attention
from data import files

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"))
    if "\ndef main(" in path.read_text() and '"__main__"' in path.read_text() and path.name != "train.py"
)
# For each program a command line that it can parse and not carry out: something is missing, or {file}, which is no
# folder, stands where a folder should.
MISTAKES = {
    "eval.py": ["--workdir={file}/none"],
    "scripts/align.py": ["{file}/none.fasta"],
    "scripts/aot_report.py": [f"--config={ROOT}/configs/r2_balanced.py", "--output={file}/x.json"],
    "scripts/bench_aligners.py": ["--pairs={file}/none.jsonl"],
    "scripts/bench_attention.py": ["--figure={file}/x.png"],
    "scripts/bench_balance.py": ["--output={file}/x.jsonl"],
    "scripts/bench_data.py": [f"--config={ROOT}/configs/aligner.py", "--config.data.dir=nowhere"],
    "scripts/bench_gpu.py": ["--all", "--tiny", "--output={file}/x"],
    "scripts/build_pfam.py": ["--verify={file}/none"],
    "scripts/build_sequences.py": ["--verify={file}/none"],
    "scripts/compare_runs.py": ["{file}/none"],
    "scripts/compile_asap.py": ["--workdir={file}/none"],
    "scripts/export_weights.py": ["--weights={file}/none", "--output={file}/x"],
    "scripts/gpu_wheels.py": ["--output={file}/x"],
    "scripts/launch_screen.py": ["--target=tpu", "--project=p", "--zone=z", "--bucket=gs://b"],  # without gcloud
    "scripts/show_batch.py": [
        f"--config={ROOT}/configs/aligner.py",
        "--config.data.dir={file}/none",
        "--output={file}/x",
    ],
    "scripts/split_stockholm.py": ["{file}/none.sto", "--parts=2", "--out={file}/x"],
    "scripts/tune_gpu.py": ["--output={file}/x"],
}
# train.py, whose flags are absl's, is tested alike in tests/test_run_config.py.
# Metavariables of files and folders; options without one are named.
_PATHS, _NAMED = ("FILE", "DIR", "RUN", "FASTA"), {"input", "output", "output_dir", "out", "data", "workdir", "plot"}
_NAMED |= {"figure", "work", "clans", "clusters", "download_dir", "verify"}


def loaded(program: str):
    """Import a program; some set the environment before they import JAX."""
    with mock.patch.dict(os.environ):
        return importlib.import_module(program.removesuffix(".py").replace("/", "."))


@pytest.fixture
def called(monkeypatch, capsys):
    """Return a function that runs a program in this process: its exit status, what it prints, and its stderr."""
    monkeypatch.setenv("PATH", "")

    def call(program: str, *arguments: str) -> tuple[object, str, str]:
        capsys.readouterr()
        try:
            status = loaded(program).main(list(arguments))
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return call


def told(errors: str) -> list[str]:
    """Return the lines of stderr without argparse's usage."""
    lines = errors.splitlines()
    return [line for line in lines if not line.startswith(("usage:", " "))] if errors.startswith("usage:") else lines


def mistake(program: str, folder: Path) -> list[str]:
    file = folder / "file"
    file.touch()
    return [argument.format(file=file) for argument in MISTAKES[program]]


def test_all_programs_are_tried():
    assert set(MISTAKES) == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_main_takes_a_command_line_and_returns_a_status(program):
    main = inspect.signature(loaded(program).main)
    (parameter,) = main.parameters.values()
    assert parameter.default is None and main.return_annotation in (int, "int")


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_and_help(program, called):
    status, printed, errors = called(program, "--version")
    assert (status, errors) == (0, "") and printed.split()[-1] == ot_attention.__version__
    status, printed, errors = called(program, "--help")
    assert (status, errors) == (0, "")
    assert f"python {program} " in printed, "no example"
    assert "exit status:" in printed and "70" in printed and "130" in printed
    assert "--debug" in printed


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_is_one_line(program, called, tmp_path):
    arguments = mistake(program, tmp_path)
    status, _, errors = called(program, *arguments)
    assert status == command_line.UNUSABLE, errors
    (line,) = told(errors)
    name, _, text = line.partition(": ")
    assert name in (Path(program).name, Path(program).stem) and text and "Traceback" not in text
    assert not [path for path in tmp_path.iterdir() if path.name != "file"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_debug_shows_where(program, called, tmp_path):
    status, _, errors = called(program, "--debug", *mistake(program, tmp_path))
    assert status == command_line.UNUSABLE and "Traceback (most recent call last)" in errors


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_command_line_is_one_line(program, called, tmp_path):
    status, _, errors = called(program, *mistake(program, tmp_path), "--no-such-option")
    assert status == command_line.WRONG_COMMAND_LINE, errors
    (line,) = told(errors)
    assert "no-such-option" in line and "Traceback" not in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_is_one_line(program, called, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    run = command_line.run
    monkeypatch.setattr(
        command_line, "run", lambda name, work, **options: run(name, interrupted, **options)
    )  # whatever the work is
    status, _, errors = called(program, *mistake(program, tmp_path))
    assert status == command_line.INTERRUPTED
    assert told(errors) in ([f"{Path(program).name}: interrupted"], [f"{Path(program).stem}: interrupted"])


def actions(program: str) -> list[argparse.Action]:
    """Return all options and arguments of a program."""
    parsers: list[argparse.ArgumentParser] = []

    def parse(self, *_, **__):
        parsers.append(self)
        raise SystemExit(0)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse), pytest.raises(SystemExit):
        loaded(program).main([])
    return parsers[0]._actions


def is_path(action: argparse.Action) -> bool:
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
    return any(name.startswith(_PATHS) for name in names) or (action.dest in _NAMED and action.metavar is None)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_path_may_begin_in_the_home_folder(program, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    paths = [action for action in actions(program) if is_path(action)]
    assert paths, "none was found: are the names in this test out of date?"
    for action in paths:
        assert callable(action.type), f"{action.dest}: a text that nobody expands"
        assert str(action.type("~/x.png")) == "/home/of/someone/x.png", action.dest


def test_numbers_out_of_range_are_refused_by_the_command_line(called):
    for arguments in (["--limit=0"], ["--limit=-1"], ["--limit=x"], ["--step=-1"], ["--threads=0"]):
        status, _, errors = called("eval.py", "--workdir=none", *arguments)
        assert status == command_line.WRONG_COMMAND_LINE
        (line,) = told(errors)
        assert "was given, allowed is" in line
    for text in ("0", "-1", "nan", "inf"):
        status, _, errors = called("scripts/gpu_wheels.py", f"--limit={text}")
        assert status == command_line.WRONG_COMMAND_LINE and "it must be above 0" in errors


def test_wheels_that_do_not_come_leave_the_earlier_ones(called, tmp_path, monkeypatch):
    (tmp_path / "old.whl").touch()
    monkeypatch.setattr(
        loaded("scripts/gpu_wheels.py"), "download", lambda folder: (folder / "half.whl").write_bytes(b"x")
    )
    monkeypatch.setattr(loaded("scripts/gpu_wheels.py"), "check", lambda *_: 1 / 0)
    assert called("scripts/gpu_wheels.py", f"--output={tmp_path}")[0] == command_line.FAULT
    assert [path.name for path in tmp_path.iterdir()] == ["old.whl"]
    monkeypatch.setattr(loaded("scripts/gpu_wheels.py"), "check", lambda *_: 1.0)
    assert called("scripts/gpu_wheels.py", f"--output={tmp_path}")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["half.whl"]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new" / "deeper" / "x.json")
    files.check_writable("/dev/null")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "file")
    for path, error in ((tmp_path / "file/x", NotADirectoryError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            files.check_writable(path)
    with mock.patch.object(os, "access", lambda *_: False), pytest.raises(PermissionError):
        files.check_writable(tmp_path / "new")


# ---- silence ----

PROGRAM = """
import sys
import command_line
import jax
def work():
    print(jax.devices()[0].platform)
sys.exit(command_line.run("small.py", work))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator may write what it likes")
def test_libtpu_without_a_tpu_is_silent():
    pytest.importorskip("libtpu", reason="libtpu is not installed (requirements-tpu.txt)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_PLATFORMS", "TPU_"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_a_tpu_is_left_to_libtpu(monkeypatch):
    for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "accel0"] if self == Path("/dev") else []))
    with mock.patch.dict(os.environ):
        assert command_line.run("small.py", lambda: None) == 0
        assert "TPU_ACCELERATOR_TYPE" not in os.environ
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    with mock.patch.dict(os.environ):
        assert command_line.run("small.py", lambda: None) == 0
        assert os.environ["TPU_ACCELERATOR_TYPE"] and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


def test_threads_restrict_a_program_to_some_cores(monkeypatch, capsys):
    program = "import command_line, os; command_line.run('p', lambda: print(len(os.sched_getaffinity(0))), threads=1)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    monkeypatch.delattr(os, "sched_setaffinity")
    assert command_line.run("p", lambda: None, threads=1) == command_line.UNUSABLE
    assert "p: --threads=1: this system cannot" in capsys.readouterr().err
