"""train.py: a run that is stopped goes on as if it never had been, and nothing of a run is lost to a mistake."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from configs import sort_sinkhorn
from evaluation import runs
from evaluation.tasks import completed
from tests.support import tiny
from training.checkpoints import Checkpoints
from training.nonfinite_guard import NonFiniteError
from training.run_folder import check_workdir
from training.session import Session

RATES = {"residues_per_second", "examples_per_second", "data_share"}


@pytest.fixture(scope="module")
def finished() -> Path:
    return tiny.trained()


def rows(workdir: Path) -> list[dict]:
    """The logged metrics without the rates."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in RATES} for line in lines]


def kept(workdir: Path) -> list[int]:
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def restored(workdir: Path, step: int):
    config = tiny.config_of(workdir)
    trainer, mesh = runs.make_trainer(config), runs.local_mesh(config.batch_size)
    checkpoints = Checkpoints(workdir, read_only=True)
    result = checkpoints.restore(trainer.abstract_state(mesh), step)
    checkpoints.close()
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(path: Path) -> None:
    """Checkpoints are written while training goes on; the folder has its final name once it is whole."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def test_folder_of_a_run(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["width"] == 16 and config["data"]["buckets"] == [320]
    assert config["attention"]["dustbin"] == "full", "the configuration named must be the one trained"
    assert kept(finished) == [0, tiny.STEPS], "the newest one, and multiples of keep_every"
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, tiny.STEPS + 1))
    assert [row["step"] for row in logged if "validation/f1" in row] == [0, 3, 6]
    assert all(row["residues_per_second"] > 0 and 0 <= row["data_share"] < 1 for row in logged if "loss" in row)
    values = [value for row in logged for value in row.values()]
    assert np.isfinite(values).all()


def test_all_splits_that_are_asked_for_are_logged_and_made_up_for(finished, tmp_path):
    """A finished run that is asked for more splits scores them; f1 of the old one stays as it was."""
    workdir = shutil.copytree(finished, tmp_path / "again")
    splits = ("validation", "validation_flanked", "negatives")
    train.train(tiny.config_of(finished, log__eval_splits=splits), workdir)
    *before, last = rows(workdir)
    assert before == rows(finished) and last["step"] == tiny.STEPS
    of_splits = {split: {name.partition("/")[2] for name in last if name.startswith(f"{split}/")} for split in splits}
    assert of_splits["validation"] == of_splits["validation_flanked"] > {"f1", "barycenter_mae"}
    assert of_splits["negatives"] == {"auc", "false_pairs"}
    assert last["validation/f1"] == pytest.approx(before[-1]["validation/f1"])
    assert last["validation/f1"] != last["validation_flanked/f1"]
    logged = contents(workdir)
    train.train(tiny.config_of(finished, log__eval_splits=splits), workdir)
    assert contents(workdir) == logged, "nothing is missing any more"


def test_splits_that_cannot_be_scored_are_named_before_the_run_begins(finished, tmp_path):
    shutil.copytree(tiny.ROOT / "data/default", tmp_path / "data")
    (info,) = (tmp_path / "data").rglob("dataset_info.json")
    told = json.loads(info.read_text())
    told["splits"] = [of for of in told["splits"] if of["name"] != "validation"]
    info.write_text(json.dumps(told))
    for splits, message in {
        ("validation",): r"log\.eval_splits=\('validation',\): split 'validation' is empty in",
        ("test_iid", "negatives"): r"log\.eval_splits=.*: negatives is made of .*; or take test_ood_negatives",
    }.items():
        config = tiny.config_of(finished, log__eval_splits=splits, data__dir=str(tmp_path / "data"))
        with pytest.raises(ValueError, match=message):
            train.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    config = sort_sinkhorn.get_config()
    config.log.eval_splits = ("validation", "negatives")
    with pytest.raises(
        ValueError, match=r"log\.eval_splits=\('validation', 'negatives'\): allowed are validation, test_iid"
    ):
        train.train(config, tmp_path / "new")


def test_steps_are_traced_when_asked(finished, tmp_path):
    train.train(tiny.config_of(finished, log__trace=2, log__eval_every=0, total_steps=3), tmp_path / "traced")
    assert list((tmp_path / "traced" / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    """Parameters, optimiser, average and metrics are the same to the last bit, so the batches were too.

    Both runs are made in this process: on jax 0.12 one made in another can differ in the last bit from step 0 on.
    """
    whole, workdir = tmp_path / "whole", tmp_path / "stopped"
    config = tiny.config_of(finished)
    train.train(config, whole)
    record = Session.record

    def stop_after_step_5(self, step):
        verdict = record(self, step)
        if step.number == 5:
            raise KeyboardInterrupt
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(Session, "record", stop_after_step_5)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, workdir)
    wait_for(workdir / "checkpoints" / "3")
    assert rows(workdir)[-1]["step"] == 5, "steps after the checkpoint were logged, and must not appear twice"
    train.train(config, workdir)

    assert rows(workdir) == rows(whole)
    (state, position), (expected, expected_position) = restored(workdir, tiny.STEPS), restored(whole, tiny.STEPS)
    assert position == expected_position and position["step"] == tiny.STEPS
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_training_moved_the_parameters(finished):
    """Or equal runs would prove nothing."""
    (start, _), (end, _) = restored(finished, 0), restored(finished, tiny.STEPS)
    for name in ("params", "ema"):
        pairs = zip(jax.tree.leaves(getattr(start, name)), jax.tree.leaves(getattr(end, name)), strict=True)
        assert all((np.asarray(a) != np.asarray(b)).any() for a, b in pairs), name


def test_a_finished_run_started_again_changes_nothing(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "again")
    state = train.train(tiny.config_of(finished), workdir)
    assert int(state.step) == tiny.STEPS
    assert contents(workdir) == contents(finished)


def test_the_folder_of_another_run_is_refused_untouched(finished):
    before = contents(finished)
    with pytest.raises(ValueError, match=r"another configuration.*model\.width was 16, is 8.*another --workdir"):
        train.train(tiny.config_of(finished, model__width=8), finished)
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        train.train(tiny.config_of(finished, seed=1), finished)
    assert contents(finished) == before


def test_what_does_not_change_the_model_may_change(finished):
    free = {"total_steps": 9, "log__every": 2, "log__eval_pairs": 8, "checkpoint__keep": 3, "data__prefetch": 2}
    check_workdir(finished, tiny.config_of(finished, **free), completed)


def test_a_mistaken_setting_leaves_no_folder(finished, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer\.ema=2"):
        train.train(tiny.config_of(finished, optimizer__ema=2.0), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.train(tiny.config_of(finished, data__dir=str(tmp_path / "nowhere")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_non_finite_loss_stops_before_anything_of_it_is_kept(finished, tmp_path, monkeypatch):
    """A first update of 1e38 leaves finite parameters whose squares overflow in the second step."""
    saved, save = [], Checkpoints.save

    def noted_save(self, state, *rest):
        saved.append(int(state.step))  # what is on disk says nothing of a checkpoint still being written
        save(self, state, *rest)

    monkeypatch.setattr(Checkpoints, "save", noted_save)
    config = tiny.config_of(
        finished,
        optimizer__learning_rate=1e38,
        optimizer__warmup_steps=0,
        checkpoint__every=2,
        checkpoint__keep=9,
        log__eval_every=0,
    )
    with pytest.raises(NonFiniteError, match=r"step 2: loss nan.*nonfinite_2\.json"):
        train.train(config, tmp_path)
    told = json.loads((tmp_path / "nonfinite_2.json").read_text())
    assert told["step"] == 2 and not np.isfinite(told["metrics"]["loss"])
    assert np.shape(told["ids"]) == (4, 4) and np.min(told["ids"]) >= 0
    assert saved == [0]
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_mistakes_on_the_command_line_take_one_line(tmp_path):
    config = f"--config={tiny.ROOT / 'configs/r2_balanced.py'}"
    empty = tmp_path / "empty"
    empty.mkdir()
    mistakes = {
        "--config is missing": [],
        "model.width": [config, "--config.model.wdith=8"],
        "holds no data set": [config, f"--config.data.dir={empty}"],
    }
    with ThreadPoolExecutor() as pool:
        ended = pool.map(
            lambda mistake: tiny.program("train.py", f"--workdir={tmp_path / 'run'}", *mistake), mistakes.values()
        )
    for told, done in zip(mistakes, ended, strict=True):
        assert done.returncode == (2 if told == "--config is missing" else 1) and done.stdout == ""
        assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1, done.stderr
        assert told in done.stderr
    assert not (tmp_path / "run").exists()
