"""A run loses nothing to what real machines do: signals, full disks, damaged files, numbers out of range, lost workers.

The fast half is part of the suite; `python -m pytest -m slow tests/test_endurance.py` does the same at length, with
real kills. What came out is in docs/reliability.md.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from tests.support import tiny
from tests.support.run import PATIENCE, assert_same_run, config, copy, flip, program, restored, rows, steps_of
from training import checkpoints as kept
from training import run_folder
from training.checkpoints import DamagedCheckpointError
from training.session import Session


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.train(config(), folder)
    return folder


def test_sigterm_saves_and_the_run_goes_on_to_the_last_bit(whole, tmp_path, monkeypatch):
    """Also the ids of every batch are those of the run that was not stopped."""
    seen: dict[str, list] = {"whole": [], "stopped": []}
    record, name = Session.record, "stopped"

    def noting(self, step):
        verdict = record(self, step)
        seen[name].append((step.number, np.asarray(step.ids).tolist()))
        if name == "stopped" and step.number == 3 and not seen["whole"]:
            signal.raise_signal(signal.SIGTERM)
        return verdict

    monkeypatch.setattr(Session, "record", noting)
    handler = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(train.Stopped, match=r"step (4|5) is saved; the same command goes on"):
        train.train(config(), folder)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert steps_of(folder)[-1] == str(rows(folder)[-1]["step"]), "saved is the step that was logged last"
    name = "whole"
    train.train(config(), tmp_path / "again")
    name = "stopped"
    train.train(config(), folder)
    assert seen["stopped"] == seen["whole"] and len(seen["whole"]) == 7
    assert_same_run(folder, whole)


def wait_until(happened, process: subprocess.Popen | None = None, every: float = 0.01) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(every)


def test_the_program_ends_with_75_at_sigterm_and_refuses_a_second_one(tmp_path):
    folder = tmp_path / "run"
    process = program(folder, total_steps=10**6)
    try:
        wait_until((folder / "checkpoints" / "2").exists, process)
        with pytest.raises(
            ValueError, match=rf"in use by another train\.py \(process {process.pid}\).*another --workd"
        ):
            train.train(config(total_steps=10**6), folder)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == train.STOPPED == 75
    step = re.search(r"stopped by SIGTERM, step (\d+) is saved", told)
    assert step and step[1] in steps_of(folder) and rows(folder)[-1]["step"] == int(step[1])


HOLDER = """
import sys, time
from pathlib import Path
from training.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_no_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use"), run_folder.run_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with run_folder.run_lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_line_cut_off_is_dropped_and_a_damaged_one_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        run_folder.read_metrics(tmp_path)


@pytest.mark.slow
def test_a_validation_that_a_kill_prevented_is_made_up_for(tmp_path):
    """Between the checkpoint of a step and its validation there is time to be killed."""
    changes = {"log__eval_every": 2, "total_steps": 2, "data__buckets": (128,)}
    folder = tmp_path / "run"
    train.train(config(**changes), folder)
    before = rows(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert rows(folder) != before
    train.train(config(**changes), folder)
    assert rows(folder) == before


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.parent != checkpoint)


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_to_any_file_of_a_checkpoint_is_seen(whole, tmp_path, how):
    """Orbax reads most flipped bits as if they were true."""
    files = files_of(whole / "checkpoints" / "7")
    assert len(files) > 10
    for n, file in enumerate(files):
        folder = copy(whole / "checkpoints" / "7", tmp_path / str(n))
        damage(folder / file.relative_to(whole / "checkpoints" / "7"), how)
        assert file.name in kept.damage_of(folder)
    assert kept.damage_of(whole / "checkpoints" / "7") is None


def test_orbax_alone_reads_a_changed_file_as_if_it_were_true(whole, tmp_path):
    """Why there are checksums; when this fails, they may go."""
    folder = copy(whole, tmp_path / "run")
    changed = folder / "checkpoints" / "7" / "iterator" / "metadata"
    changed.write_bytes(changed.read_bytes().replace(b'"step": 7', b'"step": 6').replace(b'"step":7', b'"step":6'))
    for path in (folder / "checkpoints").glob("*/" + kept.SUMS):
        path.unlink()
    with pytest.warns(UserWarning, match="has no checksums, an older version wrote it"):
        state, position = restored(folder)
    assert int(state.step) == 7 and position["step"] == 6


def test_the_checkpoint_before_a_damaged_one_is_used_to_the_last_bit(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path / "run")
    flip(files_of(folder / "checkpoints" / "7")[-1])
    (folder / "checkpoints" / "6" / kept.SUMS).unlink()
    with pytest.raises(
        DamagedCheckpointError, match=r"checkpoints/7 is damaged: 1 of \d+ files.*steps 0, 4, 6, 7.*--step"
    ):
        restored(folder)
    train.train(config(), folder)
    told = capsys.readouterr().err
    assert "checkpoint 7 is damaged (1 of" in told and "it is now 7.damaged" in told
    assert "checkpoint 6 is damaged (SHA256SUMS is missing); it is now 6.damaged" in told
    assert {"6.damaged", "7.damaged", "4", "6", "7"} <= set(steps_of(folder))
    assert_same_run(folder, whole)


def test_without_a_good_checkpoint_nothing_starts_anew(whole, tmp_path):
    folder = copy(whole, tmp_path / "run")
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(files_of(checkpoint)[0])
    before = steps_of(folder)
    with pytest.raises(DamagedCheckpointError, match=r"no good checkpoint: checkpoint 7.*Bring one back from a copy"):
        train.train(config(), folder)
    assert steps_of(folder) == before and rows(folder) == rows(whole)


def test_names_of_damaged_ones_do_not_collide(whole, tmp_path):
    folder = copy(whole, tmp_path / "run")
    for expected in ("7.damaged", "7.damaged.1"):
        shutil.copytree(whole / "checkpoints" / "7", folder / "checkpoints" / "7", dirs_exist_ok=True)
        flip(folder / "checkpoints" / "7" / "iterator" / "metadata")
        assert kept.set_damaged_aside(folder)[0].endswith(f"it is now {expected}")


@pytest.mark.slow
def test_a_file_that_cannot_grow_ends_the_run_with_one_line(tmp_path, whole):
    """Imitate a full disk, where none can be mounted: no file may have more than 8 kB."""
    folder = tmp_path / "run"
    copy(whole, folder)
    process = program(folder, total_steps=12, limit=8000)
    _, errors = process.communicate(timeout=PATIENCE)
    told = re.findall(r"^train\.py: .*", errors, re.MULTILINE)
    assert process.returncode == 1 and len(told) == 1, errors
    assert told[0].startswith("train.py: the checkpoint of step 8 could not be written") and "Earlier ones" in told[0]
    assert kept.damage_of(folder / "checkpoints" / "7") is None and "8" not in steps_of(folder)
