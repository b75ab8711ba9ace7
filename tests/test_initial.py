"""A run that begins from the parameters of another one, or of a file of weights."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from evaluation import runs
from models import weights
from tests.support import processes as several
from tests.support import tiny
from training import initial, sharding
from training.checkpoints import Checkpoints, newest_average

SHIPPED = str(tiny.ROOT / "weights/aligner.safetensors")


def model_of(run: Path, mesh_of: tuple[int, int] = (1, 1), **changes):
    config = tiny.config_of(run, **changes)
    return runs.make_trainer(config), sharding.make_mesh(sharding.MeshConfig(*mesh_of), config.batch_size)


def begun_of(place: object, run: Path, workdir: Path, **changes):
    trainer, mesh = model_of(run, **changes)
    return initial.prepare(str(place), trainer.abstract_state(mesh).params, workdir)


def test_the_newest_average_is_read_without_a_model():
    run = tiny.trained()
    arrays, step = newest_average(run)
    loaded = runs.load_run(run)
    assert step == loaded.step == tiny.STEPS
    given = weights.named(arrays)
    for name, x in weights.named(loaded.params).items():
        np.testing.assert_array_equal(given.pop(name), x)
    assert not given


def test_a_run_and_its_file_are_the_same_source(tmp_path):
    run = runs.load_run(tiny.trained())
    path = tmp_path / "w.safetensors"
    weights.save(path, run.params, run.config.to_dict(), run.step)
    of_run, of_file = initial.read(str(tiny.trained())), initial.read(str(path))
    assert of_run.digest == of_file.digest and of_run.step == of_file.step == tiny.STEPS
    run.params["plan_projection"]["bias"] += 1
    weights.save(path, run.params, run.config.to_dict(), run.step)
    assert initial.read(str(path)).digest != of_run.digest


def replaced(run: Path, mesh_of: tuple[int, int]) -> initial.Initial:
    """Begin a deeper model with another plan from a run; each array is where it would be without, parameters twice."""
    changes = {"model__depth": 2, "model__plan_width": 12, "model__refinement": 1}
    trainer, mesh = model_of(run, mesh_of, **changes)
    begun = initial.prepare(str(run), trainer.abstract_state(mesh).params, run / "none")
    fresh = trainer.initial_state(mesh)
    state, source, wanted = begun.into(fresh), weights.named(newest_average(run)[0]), weights.named(fresh.params)
    for tree in (state.params, state.ema):
        for name, x in weights.named(tree).items():
            np.testing.assert_array_equal(x, source[name] if name in begun.taken else wanted[name], err_msg=name)
            assert x.sharding == wanted[name].sharding
    missing = {name for name in wanted if name.startswith(("encoder.blocks.1.", "votes."))}
    assert set(begun.missing) == missing and not begun.left_over
    assert set(begun.taken) == wanted.keys() - missing - set(begun.other_shape)
    return begun


def test_what_fits_replaces_parameters_and_average():
    begun = replaced(tiny.trained(), (1, 1))
    told, count = begun.told(), sum(x.size for x in begun.taken.values())
    assert f"step {tiny.STEPS}: {len(begun.taken)} of {len(begun.sizes)} arrays, {count:,} of " in told
    assert "not there: encoder.blocks.1." in told and " more; of another shape" in told
    assert "of another shape: plan_projection.bias (8,) for (12,), plan_projection.kernel (16, 8) for (16, 12)" in told
    assert "left over" not in told


def test_a_mesh_gets_the_same_parameters():
    program = "import sys, pathlib, tests.test_initial as t; t.replaced(pathlib.Path(sys.argv[1]), (2, 2)); print('ok')"
    (printed,) = several.finish(several.start("-c", program, tiny.trained(), devices=4))
    assert printed.splitlines()[-1] == "ok"


def test_nothing_in_common_names_both(tmp_path):
    path = tmp_path / "other.safetensors"
    weights.save(path, {"decoder_in": {"bias": np.zeros(7)}, "other": {"kernel": np.zeros((2, 3))}}, {}, 1)
    with pytest.raises(ValueError, match=r"no array of the model is there in its shape") as raised:
        begun_of(path, tiny.trained(), tmp_path)
    told = str(raised.value)
    assert told.startswith(f"--init-from={path}: ") and "decoder_in.bias (7,), other.kernel (2, 3)" in told
    assert "the model of --config has decoder_in.bias (16,)" in told


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    run = runs.load_run(tiny.trained())
    bad = tmp_path / "bad.safetensors"
    run.params["plan_projection"]["bias"] += np.nan
    weights.save(bad, run.params, run.config.to_dict(), run.step)
    (tmp_path / "text").write_text("no weights")
    empty = tmp_path / "empty"
    shutil.copytree(tiny.trained(), empty, ignore=shutil.ignore_patterns("checkpoints"))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny.trained(), damaged)
    (damaged / "checkpoints" / str(tiny.STEPS) / "iterator" / "metadata").write_text("{}")
    for place, reason in {
        tmp_path / "none": "No such file",
        tmp_path / "text": "is no safetensors file",
        tmp_path: "holds no run",
        empty: "holds no checkpoint",
        damaged: "is damaged",
        bad: "plan_projection.bias holds values that are not finite",
    }.items():
        with pytest.raises(ValueError, match=reason) as raised:
            begun_of(place, tiny.trained(), tmp_path / "new")
        assert str(raised.value).startswith(f"--init-from={place}: ")


def test_a_run_has_one_beginning(tmp_path):
    """Only the source of init.json may be given again, by any name, or none."""
    run, first = tiny.trained(), tmp_path / "first.safetensors"
    loaded = runs.load_run(run, 0)
    weights.save(first, loaded.params, loaded.config.to_dict(), 0)
    with pytest.raises(ValueError, match=r"the run of .* began without it; leave --init-from out"):
        begun_of(first, run, run)
    new = tmp_path / "new"
    shutil.copytree(run, new)
    initial.write_record(begun_of(first, run, tmp_path / "none"), new)
    shutil.copy(first, tmp_path / "moved.safetensors")
    for place in (first, tmp_path / "moved.safetensors", ""):
        begun_of(place, run, new)
    with pytest.raises(ValueError, match=rf"began from {first} \(step 0\), whose parameters are others"):
        begun_of(run, run, new)
    shutil.rmtree(new / "checkpoints")
    begun_of(run, run, new)  # nothing is saved: the run begins anew
    with pytest.raises(ValueError, match="has saved nothing: give --init-from again"):
        begun_of("", run, new)


def test_a_source_may_have_been_trained_on(tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    for folder in (run, new):
        shutil.copytree(tiny.trained(), folder)
    shutil.rmtree(run / "checkpoints" / str(tiny.STEPS))
    earlier = max(int(path.name) for path in (run / "checkpoints").iterdir())
    initial.write_record(begun_of(run, run, tmp_path / "none"), new)
    shutil.rmtree(run)
    shutil.copytree(tiny.trained(), run)
    assert initial.read(str(run)).step == tiny.STEPS > earlier
    begun_of(run, run, new)


def test_a_run_begins_there_and_resumes(tmp_path, capsys):
    """Checkpoint 0 holds what was taken; the same command goes on, and the first line says what was taken."""
    workdir, source = tmp_path / "run", tiny.trained()
    changes = {"checkpoint__keep_every": 1, "log__eval_every": 0, "model__substitution_prior": True}
    train.train(tiny.config_of(source, **changes, total_steps=1), workdir, init_from=str(source), quiet=True)
    taken, record = capsys.readouterr().out.splitlines()[0], json.loads((workdir / "init.json").read_text())
    assert taken.startswith(f"{workdir}: begun from {source}, step {tiny.STEPS}: ")
    assert "not there: prior_weight" in taken
    assert record["missing"] == ["prior_weight"]
    config = tiny.config_of(workdir)
    trainer, mesh = runs.make_trainer(config), runs.local_mesh(config.batch_size)
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        state, _ = checkpoints.restore(trainer.abstract_state(mesh), 0)
    expected = weights.named(newest_average(source)[0])
    for tree in (state.params, state.ema):
        found = weights.named(tree)
        assert all((found[name] == x).all() for name, x in expected.items()) and len(found) == len(expected) + 1
    state = train.train(tiny.config_of(workdir, total_steps=2), workdir, init_from=str(source), quiet=True)
    assert int(state.step) == 2 and "begun from" not in capsys.readouterr().out


def test_the_flag_reaches_the_run(tmp_path):
    command = "train.py", f"--config={tiny.ROOT}/configs/r2_dustbin.py", f"--workdir={tmp_path}/run"
    done = tiny.program(*command, f"--init-from={tmp_path}/none", *tiny.flags())
    told = f"train.py: --init-from={tmp_path}/none: No such file or directory; give the folder of a run, or a "
    assert done.returncode == 1 and done.stderr == f"{told}.safetensors file\n"
    assert not (tmp_path / "run").exists()
