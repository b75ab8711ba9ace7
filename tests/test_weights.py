"""models/weights.py and scripts/export_weights.py: the file alone gives the run's table."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

import eval as eval_program
from evaluation import runs
from models import weights
from scripts import align, export_weights
from tests.support import tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "deep" / "tiny.safetensors"
    assert export_weights.main([f"--workdir={tiny.trained()}", f"--output={path}"]) == 0
    return path


@pytest.mark.slow
def test_weights_alone_give_the_table_of_the_run(exported, tmp_path):
    of_run = tiny.evaluated(tiny.trained(), "test_ood", limit=8)
    output = tmp_path / "table.json"
    data = f"--data={tiny.ROOT}/data/default"
    eval_program.main([f"--weights={exported}", "--split=test_ood", "--limit=8", data, f"--output={output}"])
    assert json.loads(output.read_text()) == json.loads(json.dumps(of_run))


def test_a_checkpoint_can_be_chosen(exported, tmp_path):
    first = tmp_path / "first.safetensors"
    assert export_weights.main([f"--workdir={tiny.trained()}", f"--output={first}", "--step=0"]) == 0
    early, late = runs.load_weights(first), runs.load_weights(exported)
    assert (early.step, late.step) == (0, tiny.STEPS)
    kernels = (run.params["plan_projection"]["kernel"] for run in (early, late))
    assert not np.array_equal(*kernels)


def test_the_band_of_the_plan_can_be_replaced(tmp_path):
    wider = tmp_path / "wider.safetensors"
    export = [f"--workdir={tiny.trained()}", f"--output={wider}"]
    assert export_weights.main([*export, "--band=-1"]) == 0
    assert runs.load_weights(wider).trainer.model(runs.load_weights(wider).params).spec.band is None


def test_weights_that_do_not_fit_are_refused(exported, tmp_path):
    config, step = weights.read_config(exported)
    config["model"]["width"] = 32
    params = runs.load_weights(exported).params
    weights.save(tmp_path / "wider.safetensors", params, config, step)
    with pytest.raises(ValueError, match=r"does not fit the model.*encoder\.embed\.embedding.* differ"):
        runs.load_weights(tmp_path / "wider.safetensors")
    save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no configuration in its header"):
        runs.load_weights(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        runs.load_weights(tmp_path / "text.safetensors")


def test_a_failed_export_leaves_the_earlier_file(tmp_path, monkeypatch, capsys):
    output = tmp_path / "w.safetensors"
    output.write_bytes(b"earlier")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert export_weights.main([f"--workdir={tiny.trained()}", f"--output={output}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert output.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [output]


def test_a_band_out_of_range_is_refused(exported, tmp_path, capsys):
    assert export_weights.main([f"--weights={exported}", f"--output={tmp_path / 'new'}", "--band=-2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "band" in line and not (tmp_path / "new").exists()


def test_a_step_is_of_a_run_only(exported, capsys):
    with pytest.raises(SystemExit):
        eval_program.main([f"--weights={exported}", "--step=3"])
    assert "--weights holds a single step" in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert export_weights.main([f"--workdir={tmp_path}", f"--output={tmp_path}/w.safetensors"]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_align_takes_a_run_or_its_weights(exported, tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).write_text(f">{name}\nMKVLAWGKVGAHAGEYGAEALERMFLSFPTTKTYF\n")
    files = [str(tmp_path / name) for name in "ab"]
    outputs = []
    for source in (f"--workdir={tiny.trained()}", f"--weights={exported}"):
        assert align.main([*files, source, "--format=jsonl"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and '"id": "a:b"' in outputs[0]
