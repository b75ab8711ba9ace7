"""Calibration of confidence and homology on validation pairs (`evaluation.calibration`)."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import supervised
from evaluation import calibration, runs
from evaluation.tasks import checked
from models import weights
from scripts import export_weights
from tests.support import tiny

ALIGNER = tiny.ROOT / "weights" / "aligner.safetensors"
DATA, FEW = "data/default", 6


@pytest.fixture(scope="module")
def run() -> runs.Run:
    return runs.load_weights(ALIGNER)


def test_a_logistic_regression_finds_the_weights_that_made_the_pairs():
    rng = np.random.default_rng(0)
    features = np.stack([10 * rng.normal(size=40_000), 9 + rng.normal(size=40_000), np.ones(40_000)], 1)
    wanted = np.array([0.3, -0.4, 3.6])
    related = rng.random(len(features)) < 1 / (1 + np.exp(-features @ wanted))
    found = calibration._logistic(features[related], features[~related])
    wanted[2] += np.log((~related).sum() / related.sum())  # both kinds count alike
    np.testing.assert_allclose(found, wanted, atol=0.2)
    np.testing.assert_allclose(found[:2], wanted[:2], atol=0.03)


def test_the_loss_of_confidence_is_by_hand(run):
    model = run.pretrained()
    pairs, _ = calibration._pairs(run, DATA, "validation", FEW)
    nats = []
    for pair, found in zip(pairs, model.align([(pair.x, pair.y) for pair in pairs]), strict=True):
        for (i, j), stated in zip(found.pairs.tolist(), found.confidence.tolist(), strict=True):
            sure = min(max(stated, 1e-3), 1 - 1e-3)
            nats.append(-math.log(sure if pair.target[i] == j else 1 - sure))
    assert calibration._loss(model, pairs) == pytest.approx(np.mean(nats), rel=1e-4)
    assert calibration._loss(calibration._with(model, temperature=2.5), pairs) > 2 * np.mean(nats)


def test_the_best_temperature_and_homology_are_kept(run, monkeypatch):
    monkeypatch.setattr(calibration, "_TEMPERATURES", (2.5, 1.0))
    blunt = dataclasses.replace(run.pretrained())
    shifted = run._replace(params=calibration._with(blunt, temperature=2.5, homology=[9.0, 9.0, 9.0]).params)
    params, told = calibration.fitted(shifted, DATA, FEW)
    assert float(params["calibration"]["temperature"]) == 1 and told[0].endswith("nats a residue pair: 1")
    assert params["calibration"]["homology"][0] > 0, "of higher odds, more homologs"
    model = dataclasses.replace(blunt, params=params)
    related, unrelated = calibration._pairs(run, DATA, "negatives", FEW)
    told_apart = [[of.probability for of in model.align([(p.x, p.y) for p in some])] for some in (related, unrelated)]
    assert np.mean(told_apart[0]) > 0.8 and np.mean(told_apart[1]) < 0.2
    others = [{name: of for name, of in tree.items() if name != "calibration"} for tree in (run.params, params)]
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_the_option_writes_what_was_fitted(run, tmp_path, monkeypatch, capsys):
    fitted = {**run.params, "calibration": {**run.params["calibration"], "temperature": np.float32(1.25)}}
    asked = []
    monkeypatch.setattr(calibration, "fitted", lambda of, data: asked.append(data) or (fitted, ["told"]))
    path = tmp_path / "w.safetensors"
    arguments = [f"--weights={ALIGNER}", f"--calibrate={DATA}", f"--output={path}"]
    assert export_weights.main(arguments) == 0
    assert asked == [DATA] and "told" in capsys.readouterr().out
    assert weights.load_all(path)["calibration.temperature"] == np.float32(1.25)


def test_a_model_of_plans_is_refused():
    config = checked(supervised.get_config())
    trainer, mesh = runs.make_trainer(config), runs.local_mesh(config.batch_size)
    of_plans = runs.Run(config, trainer, mesh, trainer.initial_state(mesh).params, 0)
    with pytest.raises(ValueError, match="nothing to calibrate: give one of task pair_hmm"):
        calibration.fitted(of_plans, DATA)
