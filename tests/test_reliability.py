"""A run loses nothing to what real machines do: signals, full disks, damaged files, numbers out of range, lost workers.

The fast half is part of the suite; `python -m pytest -m slow tests/test_reliability.py` does the same at length, with
real kills. What came out is in docs/reliability.md.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

import train
from alignment.inference import Pretrained
from configs import aligner
from data import pfam, pipeline, vocab
from data.families import BadRecordError
from evaluation import runs
from models.objectives import AlignmentObjective
from ot_attention import SinkhornSpec, sinkhorn_attention
from tests import test_sharding as several
from tests.support import tiny
from training import checkpoints as kept
from training import run_folder
from training.checkpoints import Checkpoints, DamagedCheckpointError
from training.nonfinite_guard import NonFiniteError, Verdict
from training.session import Session

CONFIG = f"--config={tiny.ROOT / 'configs/r2_dustbin.py'}"
RATES = {"residues_per_second", "examples_per_second", "data_share"}
SMALL = {"data__buckets": (64,), "log__eval_every": 0, "checkpoint__keep": 3, "checkpoint__every": 2, "total_steps": 7}
PATIENCE = 900  # seconds, on a machine with much other work


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[Path]:
    """All runs here are of one program."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


def config(**overrides):
    base = several.config(**SMALL | overrides)
    base.attention.dustbin = "full"
    return base


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with tiny.quick_compilation():
        train.train(config(), folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def rows(folder: Path) -> list[dict]:
    """The logged metrics without the rates."""
    return [{k: v for k, v in row.items() if k not in RATES} for row in run_folder.read_metrics(folder)]


def restored(folder: Path, step: int | None = None):
    settings = tiny.config_of(folder)
    trainer, mesh = runs.make_trainer(settings), runs.local_mesh(settings.batch_size)
    checkpoints = Checkpoints(folder, read_only=True)
    with contextlib.closing(checkpoints):
        return checkpoints.restore(trainer.abstract_state(mesh), step)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(folder: Path, expected: Path) -> None:
    """To the last bit: parameters, average, optimiser, step (which is all that random numbers hang on), place in the
    data, metrics.
    """
    assert rows(folder) == rows(expected)
    (state, position), (wanted, wanted_position) = restored(folder), restored(expected)
    assert position == wanted_position
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# ---- stopping and going on ----


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
    with tiny.quick_compilation():
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


def program(folder: Path, compiled: Path, *, limit: int | None = None, **overrides) -> subprocess.Popen:
    """The real train.py. limit: of any file that it writes, in bytes."""
    limited = ["prlimit", f"--fsize={limit}"] if limit else []
    command = [*limited, sys.executable, str(tiny.ROOT / "train.py"), CONFIG, f"--workdir={folder}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if limit:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *tiny.flags(**SMALL | overrides)], env=environment, text=True, **pipes)


def wait_until(happened, process: subprocess.Popen | None = None, every: float = 0.01) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(every)


def test_the_program_ends_with_75_at_sigterm_and_refuses_a_second_one(tmp_path, compiled_once):
    folder = tmp_path / "run"
    process = program(folder, compiled_once, total_steps=10**6)
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
    with tiny.quick_compilation():
        train.train(config(**changes), folder)
        before = rows(folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
        assert rows(folder) != before
        train.train(config(**changes), folder)
    assert rows(folder) == before


# ---- checkpoints ----


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.parent != checkpoint)


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(bytes(data))


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
    with tiny.quick_compilation():
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


@contextlib.contextmanager
def disk_of(bytes_: int, folder: Path) -> Iterator[Path]:
    """A file system of its own; skips where that is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_file_that_cannot_grow_ends_the_run_with_one_line(tmp_path, compiled_once, whole):
    """As on a full disk, where none can be mounted: no file may have more than 8 kB."""
    folder = tmp_path / "run"
    copy(whole, folder)
    process = program(folder, compiled_once, total_steps=12, limit=8000)
    _, errors = process.communicate(timeout=PATIENCE)
    told = re.findall(r"^train\.py: .*", errors, re.MULTILINE)
    assert process.returncode == 1 and len(told) == 1, errors
    assert told[0].startswith("train.py: the checkpoint of step 8 could not be written") and "Earlier ones" in told[0]
    assert kept.damage_of(folder / "checkpoints" / "7") is None and "8" not in steps_of(folder)


# ---- data ----

SHARDS = tiny.ROOT / "data/default/pfam/1.0.0"
TRAIN_SHARD = "pfam-train.array_record-00000-of-00001"
BATCHES = pipeline.PipelineConfig(batch_size=4, buckets=(320,), max_bad_records=2)


def damaged_shards(to: Path, *records: int) -> Path:
    """The data that ship, with a flipped bit in the middle of those records of the train split."""
    copy(SHARDS, to / "1.0.0")
    path = to / "1.0.0" / TRAIN_SHARD
    source = pfam.open_split(to, "train")
    for record in records:
        alignment = source[record].accession.encode()
        flip(path, path.read_bytes().index(alignment) + 40)
    return to


def test_a_damaged_record_is_named_by_shard_record_and_family(tmp_path):
    families = pfam.open_split(damaged_shards(tmp_path, 3), "train")
    for n in range(len(families)):
        if n != 3:
            families[n]
    place = rf"{TRAIN_SHARD}, record 3, family PF\d+ is damaged \(RuntimeError.*hash mismatch"
    with pytest.raises(BadRecordError, match=place):
        families[3]
    with pytest.raises(BadRecordError, match=place + ".*build or copy the data again, or .*data.max_bad_records"):
        pipeline.train_iterator(families, pipeline.PipelineConfig(batch_size=4, buckets=(320,)))


def test_damaged_records_are_counted_listed_and_left_out_the_same_way_every_time(tmp_path):
    families = pfam.open_split(damaged_shards(tmp_path / "a", 3, 8), "train")
    stream = pipeline.PairStream(families, BATCHES)
    assert [re.search(r"record (\d+)", told)[1] for told in stream.index.bad] == ["3", "8"]
    drawn = {int(family) for step in range(40) for family in stream[step]["id"][:, 0]}
    assert drawn.isdisjoint({3, 8}) and len(drawn) >= 4
    again = pipeline.PairStream(pfam.open_split(damaged_shards(tmp_path / "b", 3, 8), "train"), BATCHES)
    assert again.fingerprint() == stream.fingerprint()
    np.testing.assert_array_equal(again[17]["x"], stream[17]["x"])
    other = pipeline.BatchIterator(pipeline.PairStream(pfam.open_split(SHARDS.parent, "train"), BATCHES))
    with pytest.raises(ValueError, match="differ in data"):
        other.set_state({"step": 3, "stream": stream.fingerprint()})
    with pytest.raises(BadRecordError, match="max_bad_records above 2"):
        pipeline.PairStream(pfam.open_split(damaged_shards(tmp_path / "c", 3, 8, 9), "train"), BATCHES)


def test_a_truncated_shard_is_as_many_damaged_records(tmp_path):
    copy(SHARDS, tmp_path / "1.0.0")
    path = tmp_path / "1.0.0" / "pfam-validation.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:70000])
    families = pfam.open_split(tmp_path, "validation")
    with pytest.raises(BadRecordError, match=r"record 0, family PF02463 is damaged"):
        list(pipeline.evaluation_batches(families, 4, (320,)))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of the 2 families"):
        list(pipeline.evaluation_batches(families, 4, (320,), max_bad=2))


def test_a_shard_of_another_build_is_noticed(tmp_path):
    copy(SHARDS, tmp_path / "1.0.0")
    listed = tmp_path / "1.0.0" / pfam.RECORDS
    names = json.loads(listed.read_text())
    names["train"][0], names["train"][1] = names["train"][1], names["train"][0]
    listed.write_text(json.dumps(names))
    with pytest.raises(BadRecordError, match=r"record 0, .* holds PF.*: the shard is of another build"):
        pfam.open_split(tmp_path, "train")[0]


def test_a_run_on_damaged_data_lists_what_is_left_out_and_resumes(tmp_path, capsys):
    data, folder = damaged_shards(tmp_path / "data", 3), tmp_path / "run"
    changes = {"data__dir": str(data), "data__max_bad_records": 1}
    with tiny.quick_compilation():
        train.train(config(**changes), tmp_path / "whole")
        train.train(config(**changes, total_steps=7), folder)
        shutil.rmtree(folder / "checkpoints" / "7")
        train.train(config(**changes), folder)
    assert "1 damaged record(s) left out, listed in" in capsys.readouterr().err
    (told,) = json.loads((folder / "bad_records.json").read_text())
    assert "record 3, family PF" in told
    assert_same_run(folder, tmp_path / "whole")


# ---- numbers ----

MARK = 1  # length of all sequences of the batch that is poisoned


@pytest.fixture
def poisoned(monkeypatch):
    """The losses of a batch of such lengths are NaN; batch 5 (and those named) of every stream is one."""
    batches, drawn, totals = [5], pipeline.PairStream.__getitem__, AlignmentObjective.totals

    def with_one(self, step):
        batch = drawn(self, step)
        if step + 1 in batches:  # streams count from 0
            batch["x_length"][:] = batch["y_length"][:] = MARK
        return batch

    def measured(self, model, batch):
        factor = jnp.where((batch["x_length"] == MARK).all(), jnp.nan, 1.0)
        return {name: value * factor for name, value in totals(self, model, batch).items()}

    monkeypatch.setattr(pipeline.PairStream, "__getitem__", with_one)
    monkeypatch.setattr(AlignmentObjective, "totals", measured)
    return batches


def test_nothing_of_a_non_finite_step_is_kept_but_its_number(poisoned):
    settings = config()
    trainer, mesh = runs.make_trainer(settings), runs.local_mesh(4)
    families = pfam.open_split(tiny.ROOT / "data/default", "train")
    stream = pipeline.PairStream(families, pipeline.PipelineConfig(batch_size=4, buckets=(64,)))
    with tiny.quick_compilation():
        update, state = trainer.compiled_update(mesh), trainer.initial_state(mesh)
        for step, finite in ((3, True), (4, False), (5, True)):
            before = jax.device_get(state)
            state, metrics = update(state, {k: v for k, v in stream[step].items() if k != "id"})
            assert bool(metrics["finite"]) == finite and bool(jnp.isfinite(metrics["loss"])) == finite
            pairs = zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(state)), strict=True)
            for old, new in pairs:
                assert np.isfinite(new).all()
                if np.issubdtype(new.dtype, np.integer):
                    assert new == old + 1
                elif not finite:
                    np.testing.assert_array_equal(old, new)


def test_skip_leaves_the_update_out_and_resumes_exactly(poisoned, tmp_path, capsys):
    changes = {"train__on_nonfinite": "skip"}
    with tiny.quick_compilation():
        train.train(config(**changes), tmp_path / "whole")
        train.train(config(**changes), tmp_path / "resumed")
        for step in ("6", "7"):
            shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step)
        train.train(config(**changes), tmp_path / "resumed")
    assert "step 5: loss nan" in capsys.readouterr().err
    logged = rows(tmp_path / "whole")
    assert [(row["step"], row["nonfinite"]) for row in logged] == [(1, 0), (2, 0), (3, 0), (4, 0), (6, 1), (7, 1)]
    assert np.isfinite([value for row in logged for value in row.values()]).all()
    told = json.loads((tmp_path / "whole" / "nonfinite_5.json").read_text())
    assert told["step"] == told["batch"] == 5 and np.shape(told["ids"]) == (4, 3)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert restored(tmp_path / "whole")[1]["step"] == 7


def test_rollback_goes_on_behind_the_bad_batch_and_resumes_exactly(poisoned, tmp_path, monkeypatch):
    """Back to step 4, or 2 if the fifth is met before 4 is checked; steps then count on with batch 6."""
    changes, trained = {"train__on_nonfinite": "rollback", "checkpoint__every": 3}, []
    record = Session.record

    def noting(self, step):
        verdict = record(self, step)
        if verdict is not Verdict.ROLL_BACK:
            trained.append((step.number, step.batch))
        return verdict

    monkeypatch.setattr(Session, "record", noting)
    with tiny.quick_compilation():
        train.train(config(**changes), tmp_path / "whole")
        assert trained == [(1, 1), (2, 2), (3, 3), (4, 4), (4, 6), (5, 7), (6, 8), (7, 9)]
        train.train(config(**changes), tmp_path / "resumed")
        for step in ("6", "7"):
            shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step)
        train.train(config(**changes), tmp_path / "resumed")
    assert [(row["step"], row["nonfinite"]) for row in rows(tmp_path / "whole")] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1),
    ]  # fmt: skip
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert restored(tmp_path / "whole")[1] | {"stream": ""} == {"step": 9, "stream": "", "nonfinite": 1}


def test_too_many_of_them_stop_the_run(poisoned, tmp_path, monkeypatch):
    """And what is being saved meanwhile is kept."""
    add_sums = Checkpoints._add_sums
    monkeypatch.setattr(Checkpoints, "_add_sums", lambda self: (time.sleep(3), add_sums(self)))
    poisoned.append(6)
    changes = {"train__on_nonfinite": "skip", "train__max_nonfinite": 1}
    with tiny.quick_compilation(), pytest.raises(NonFiniteError, match=r"step 6: .*the last of 2 such steps"):
        train.train(config(**changes), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__on_nonfinite": "ignore"}, r"train\.on_nonfinite='ignore' must be stop, skip or rollback"),
        ({"train__max_nonfinite": -1}, r"train\.max_nonfinite=-1 must be at least 0"),
        ({"data__max_bad_records": -1}, r"max_bad_records: -1 was given"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        train.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- extreme inputs ----


def extreme(kind: str) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """q and k [1, 24, 2, 16] with scores of up to 1e4, of one constant, ..., and the true lengths."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 24, 2, 16)).astype(np.float32)
    if kind == "constant":
        return np.ones_like(q), np.ones_like(k), (24, 24)
    if kind == "identical":
        return 3 * q, 3 * q, (24, 24)
    if kind == "length 1":
        return q, k, (1, 24)
    if kind == "both of length 1":
        return q, k, (1, 1)
    scale = np.sqrt(1e4 / np.abs(np.einsum("bihd,bjhd->bhij", q, k) / 4).max())
    return scale * q, scale * k, (24, 20)


@pytest.mark.parametrize(("dustbin", "gradient"), [("none", "tail"), ("unit", "tail"), ("full", "implicit")])
def test_attention_of_extreme_scores_is_that_of_the_reference(dustbin, gradient):
    """Finite values and gradients; the output in float32 to within what a score of 1e4 can hold (1e-3)."""
    spec = SinkhornSpec(band=8, base_steps=4, dustbin=dustbin, gradient=gradient)

    def output(q, k, lengths, score, implementation):
        score = None if dustbin == "none" else score
        out, info = sinkhorn_attention(q, k, k, spec, *lengths, dustbin_score=score, implementation=implementation)
        return (out * out).sum(), (out, info)

    measure = jax.jit(jax.value_and_grad(functools.partial(output, implementation="xla"), (0, 1), has_aux=True))
    expect = jax.jit(functools.partial(output, implementation="reference"))
    for kind in ("1e4", "constant", "identical", "length 1", "both of length 1"):
        q, k, lengths = extreme(kind)
        given = q, k, [jnp.array([n]) for n in lengths], jnp.full(2, 1e4 if kind == "1e4" else 1.0)
        (_, (out, info)), grads = measure(*given)
        _, (expected, _) = expect(*given)
        assert all(np.isfinite(x).all() for x in (out, *grads, info.residual)), kind
        assert np.isfinite(info.f[..., : lengths[0]]).all() and np.isfinite(info.g[..., : lengths[1]]).all(), kind
        np.testing.assert_allclose(out, expected, atol=4e-3 * np.abs(k).max(), err_msg=kind)


GLOBIN = "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMF"
PAIRS = {
    "all X": ("X" * 30, "X" * 25),  # nothing is known of any residue
    "one residue again and again": ("A" * 30, "A" * 30),
    "one and one": ("W", "W"),
    "one and many": ("W", "ACDEFGHIKLMNPQRSTVWY" * 3),
    "identical": (GLOBIN, GLOBIN),
}


def test_extreme_pairs_are_aligned():
    """With the weights that ship."""
    model = Pretrained.load(tiny.ROOT / "weights/aligner.safetensors")
    found = model.align([(vocab.encode(x.encode()), vocab.encode(y.encode())) for x, y in PAIRS.values()])
    for (name, (x, y)), of_one in zip(PAIRS.items(), found, strict=True):
        assert ((of_one.confidence >= 0) & (of_one.confidence <= 1.001)).all(), name
        assert (np.diff(of_one.pairs, axis=0) > 0).all() and (of_one.pairs < (len(x), len(y))).all(), name
        assert np.isfinite(of_one.x_alone).all() and np.isfinite(of_one.y_alone).all(), name
    np.testing.assert_array_equal(found[-1].pairs, np.arange(len(GLOBIN))[:, None].repeat(2, 1), "with itself")


@pytest.mark.slow
def test_extreme_pairs_are_trained_on():
    """A batch of them, and of an empty one, has a finite loss with all its terms, and a finite update."""
    settings = several.config(
        aligner.get_config(), loss__sparse_ce=1.0, attention__base_steps=2, optimizer__warmup_steps=0
    )
    trainer, mesh = runs.make_trainer(settings), runs.local_mesh(1)
    tokens = [[vocab.encode(s.encode()) for s in pair] for pair in (*PAIRS.values(), ("", ""))]
    batch = {name: np.zeros((6, 64), np.int32) for name in ("x", "y")} | {"target": np.full((6, 64), -1, np.int32)}
    for n, (x, y) in enumerate(tokens):
        batch["x"][n, : len(x)], batch["y"][n, : len(y)] = x, y
        batch["target"][n, : min(len(x), len(y))] = np.arange(min(len(x), len(y)))
    batch |= {f"{name}_length": np.array([len(pair[of]) for pair in tokens], np.int32) for of, name in enumerate("xy")}
    with tiny.quick_compilation():
        update, state = trainer.compiled_update(mesh), trainer.initial_state(mesh)
        for _ in range(2):
            state, metrics = update(state, batch)
            assert metrics["finite"] == 1, metrics
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# ---- at length ----

LONG = {"total_steps": 10_000, "checkpoint__every": 500, "checkpoint__keep_every": 0}
OFTEN = LONG | {"checkpoint__every": 5}  # how often a run is saved does not change it
KILLS = 100


def sample(process: subprocess.Popen, folder: Path) -> Iterator[tuple[int, float, int, float]]:
    """Step, resident MB, open files and seconds of CPU of a running process, about once a second."""
    of = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), of.oneshot():
            logged = run_folder.read_metrics(folder)
            cpu = of.cpu_times()
            yield logged[-1]["step"] if logged else 0, of.memory_info().rss / 1e6, of.num_fds(), cpu.user + cpu.system
        time.sleep(1)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, compiled_once) -> tuple[Path, np.ndarray]:
    """A run of 10,000 steps, and what it looked like from outside: rows of `sample`."""
    folder = tmp_path_factory.mktemp("long") / "run"
    process = program(folder, compiled_once, **LONG)
    samples = np.array(list(sample(process, folder)))
    assert process.returncode == 0, process.communicate()
    return folder, samples


@pytest.mark.slow
def test_memory_files_and_time_of_a_step_stay_flat_for_10000_steps(long_run):
    """Time is the processor's, which other work on the machine hardly changes. A step takes milliseconds."""
    _, samples = long_run
    early, late = (samples[(samples[:, 0] >= a) & (samples[:, 0] <= a + 2000)] for a in (1000, 7500))
    growth = np.median(late[:, 1]) / np.median(early[:, 1]) - 1
    files = [np.median(of[:, 2]) for of in (early, late)]
    seconds = [(of[-1, 3] - of[0, 3]) / (of[-1, 0] - of[0, 0]) for of in (early, late)]
    print(
        f"\nRSS {np.median(early[:, 1]):.0f} -> {np.median(late[:, 1]):.0f} MB ({growth:+.2%}), CPU time of a step "
        f"{seconds[0] * 1e3:.2f} -> {seconds[1] * 1e3:.2f} ms, open files {files[0]:.0f} -> {files[1]:.0f}"
    )
    assert growth < 0.02
    assert seconds[1] < 1.3 * seconds[0]
    assert files[1] == files[0]


def kill_somewhere(process: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """SIGKILL while it starts, while it saves, or at any time in its first half second of training."""
    where = rng.choices(("start", "save", "any"), (1, 5, 4))[0]
    if where == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        seen = set(steps_of(folder)) if (folder / "checkpoints").exists() else set()
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:  # until it trains
            if (folder / "checkpoints").exists() and set(steps_of(folder)) - seen:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        while where == "save" and process.poll() is None and time.monotonic() < deadline:
            if any("tmp" in path.name for path in (folder / "checkpoints").iterdir()):
                time.sleep(rng.uniform(0, 0.02))
                break
    process.kill()
    process.wait()
    halfway = (folder / "checkpoints").exists() and any("tmp" in name for name in steps_of(folder))
    return f"{where}, {'a save was in progress' if halfway else 'no save was in progress'}"


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_is_the_run_that_was_not(long_run, tmp_path, compiled_once):
    whole, _ = long_run
    folder, rng, told, furthest = tmp_path / "killed", random.Random(0), [], 0
    while len(told) < KILLS:
        process = program(folder, compiled_once, **OFTEN)
        told.append(kill_somewhere(process, folder, rng))
        assert process.returncode == -signal.SIGKILL, f"it ended before kill {len(told)}: {process.communicate()}"
        good = [int(name) for name in steps_of(folder) if name.isdigit()] if (folder / "checkpoints").exists() else []
        assert max(good, default=0) >= furthest, "a checkpoint was lost"
        furthest = max(good, default=0)
    process = program(folder, compiled_once, **LONG)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    print("\n", {what: told.count(what) for what in sorted(set(told))}, f"last killed at step {furthest}")
    assert sum("a save was in progress" in of_one for of_one in told) >= KILLS // 5
    assert not [name for name in steps_of(folder) if not name.isdigit()], "nothing damaged, nothing half written"
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, compiled_once):
    with disk_of(1_500_000, tmp_path / "small") as disk:
        folder = disk / "run"
        process = program(folder, compiled_once, total_steps=400, checkpoint__keep=100)
        _, errors = process.communicate(timeout=PATIENCE)
        last = errors.splitlines()[-1]
        print("\n", last)
        assert process.returncode == 1, errors
        assert last.startswith("train.py: ") and ("could not be written" in last or "No space left" in last)
        good = max(int(name) for name in steps_of(folder) if name.isdigit())
        assert good > 2 and kept.damage_of(folder / "checkpoints" / str(good)) is None
        subprocess.run(["mount", "-o", "remount,size=50M", str(disk)], check=True)
        process = program(folder, compiled_once, total_steps=good + 4, checkpoint__keep=100)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert rows(folder)[-1]["step"] == good + 4
        assert [row["step"] for row in rows(folder)] == list(range(1, good + 5))


WORKERS_DIE = """
import json, signal, sys
import numpy as np, psutil
from absl import app
from data import pfam, pipeline

def main(_):
    families = pfam.open_split(sys.argv[1], "train")
    settings = [pipeline.PipelineConfig(batch_size=4, buckets=(320,), workers=n) for n in (0, 2)]
    expected, iterator = (pipeline.train_iterator(families, of_one) for of_one in settings)
    same = []
    for step in range(60):
        if step in (3, 30):
            workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            workers[step % 2].send_signal(signal.SIGKILL)
        a, b = next(expected), next(iterator)
        same.append(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a))
    iterator.close()
    print(json.dumps([len(same), same.count(True)]))

if __name__ == "__main__":
    app.run(main)
"""


@pytest.mark.slow
def test_workers_that_die_are_replaced_and_no_batch_changes(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS_DIE)
    process = several.start(script, tiny.ROOT / "data/default")
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert json.loads(printed.splitlines()[-1]) == [60, 60]
    assert errors.count("a worker process died before batch") == 2
