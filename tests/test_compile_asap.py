"""scripts/compile_asap.py, and the programs that take its maps: `eval.py --asap`, `scripts/align.py --asap`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_program
from alignment import asap_maps
from alignment.inference import Pretrained
from benchmarks import asap_ways
from data import pfam
from data.evaluation_pairs import evaluation_batches
from evaluation import runs
from models import weights
from ot_attention.asap import Deviation
from scripts import align, compile_asap
from tests.support import tiny

DATA = f"--data={tiny.ROOT / 'data/default'}"
LAYERS = ["self-attention 1", "plan"]
PAIRS = 4


@pytest.fixture(scope="module", autouse=True)
def quick():
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)  # align.py chooses one


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights of a tiny model with self-attention, untrained."""
    config = tiny.config_of(tiny.trained(), model__attention_every=1, attention__band=-1, data__buckets=(128,))
    trainer, mesh = runs.make_trainer(config), runs.local_mesh(config.batch_size)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    weights.save(path, trainer.initial_state(mesh).params, config.to_dict(), 0)
    return path


@pytest.fixture(scope="module")
def maps(model):
    """The file of maps; the report lies beside it."""
    path = model.with_name("maps.safetensors")
    options = ["--rounds=1", f"--pairs={PAIRS}", "--newton-steps=1", "--projections=2", "--features", "kantorovich"]
    options += ["--steps", "5"]  # the model makes 5
    assert compile_asap.main([f"--weights={model}", DATA, f"--output={path}", *options]) == 0
    return path


@pytest.mark.slow
def test_the_report_says_what_each_way_costs_and_gives(maps):
    report = json.loads(maps.with_suffix(".json").read_text())
    assert report["provenance"]["settings"]["features"] == ["kantorovich"]
    assert list(report["layers"]) == list(report["lengths"]) == LAYERS
    for rows in report["layers"].values():
        assert list(rows) == ["teacher", "log domain", "asap", "zero", "sinkhorn 5"]
        off = {name: row["deviation"]["divergence"]["median"] for name, row in rows.items()}
        assert off["teacher"] < 1e-6 and off["log domain"] < 1e-5
        assert off["sinkhorn 5"] < 1e-10
        assert off["asap"] < off["zero"]  # the dustbin's row alone sees to that
        assert all(row["ms"] > 0 and row["deviation"].keys() == set(Deviation._fields) for row in rows.values())
    assert list(report["metrics"]) == ["teacher", "asap"]
    assert "self-attention 1" in (told := compile_asap.table(report))
    mae = report["metrics"]["asap"]["model"]["barycenter_mae"]["value"]
    assert f"{mae:.4f}" in told and f"{report['layers']['plan']['asap']['ms']:.1f}" in told


@pytest.mark.slow
def test_eval_scores_the_compiled_model(model, maps, tmp_path, capsys):
    output, report = tmp_path / "table.json", json.loads(maps.with_suffix(".json").read_text())
    options = [f"--weights={model}", DATA, "--split=validation", f"--limit={PAIRS}", f"--output={output}"]
    eval_program.main([*options, f"--asap={maps}"])
    assert f"compiled by {maps}" in capsys.readouterr().out
    scored = json.loads(output.read_text())["splits"]["validation"]["model"]["overall"]
    for name, metric in report["metrics"]["asap"]["model"].items():
        assert metric["value"] == pytest.approx(scored[name]["value"], rel=1e-5)
    assert scored["sparse_ce"] != pytest.approx(report["metrics"]["teacher"]["model"]["sparse_ce"]["value"], rel=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_is_replaced_in_all_that_reads_it(model, maps, layer):
    """Take a map whose f is far off: only results that depend on the layer may change."""
    run = runs.load_weights(model)
    of = asap_maps.load(maps, run.params)[layer]
    far = {layer: dataclasses.replace(of, weights=of.weights + 5, two_sided=False)}
    changed = run._replace(
        trainer=dataclasses.replace(run.trainer, graph=asap_maps.into(run.trainer.graph, run.params, far))
    )
    families = pfam.open_split(tiny.ROOT / "data/default", "validation")
    batch = next(iter(evaluation_batches(families, 2, (128,), limit=2)))
    pair = [jnp.asarray(batch[name]) for name in ("x", "y", "x_length", "y_length")]

    @jax.jit
    def seen(params):
        model = changed.trainer.model(params), run.trainer.model(params)
        target = jnp.asarray(batch["target"])
        return [(m.banded_plan(*pair).values, m(*pair[:2], target, *pair[2:])[0], m._encode(*pair)[0]) for m in model]

    (plan, transported, encoded), (plan_0, transported_0, encoded_0) = seen(run.params)
    for now, before in ((plan, plan_0), (transported.values, transported_0.values)):
        assert np.abs(now - before).max() > 0.01 * np.abs(before).max()
    np.testing.assert_allclose(plan.sum(-1), transported.mass, rtol=1e-3, atol=1e-5)
    assert (np.abs(encoded - encoded_0).max() > 1e-3) == (layer != "plan")


def test_align_uses_the_maps(model, maps, tmp_path, capsys):
    for name, residues in (("a", "MKVLAWGKVGAHAGEYGAEALERMFLSFPTTKTYF"), ("b", "MKVLWGKVGHAGEYGAEALRMFLSFPTTKTYFAA")):
        (tmp_path / name).write_text(f">{name}\n{residues}\n")
    files = [str(tmp_path / name) for name in "ab"]
    outputs = []
    for extra in ([], [f"--asap={maps}"]):
        assert align.main([*files, f"--weights={model}", "--format=jsonl", *extra]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0]["confidence"] != pytest.approx(outputs[1]["confidence"], rel=1e-3)


def test_maps_of_other_models_and_other_files_are_refused(model, maps, tmp_path, capsys):
    other = Pretrained.load(model)
    changed = jax.tree.map(lambda x: x + 1, other.params)
    with pytest.raises(ValueError, match=r"fitted to other parameters.*compile these"):
        asap_maps.load(maps, changed)
    with pytest.raises(ValueError, match="holds no compiled layers but a model"):
        other.with_asap(model)
    with pytest.raises(FileNotFoundError, match=r"compile_asap\.py"):
        other.with_asap(tmp_path / "none")
    with pytest.raises(ValueError, match=r"the model has no head; it has self-attention 1, plan"):
        asap_maps.into(other.graph, other.params, {"head": asap_maps.load(maps, other.params)["plan"]})
    assert compile_asap.main([f"--workdir={tmp_path}", DATA]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_maps_that_are_not_measured_leave_the_earlier_ones(model, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no scores")

    monkeypatch.setattr(asap_ways, "attended", lambda *_: {})
    monkeypatch.setattr(asap_ways, "metrics", fail)
    paths = [tmp_path / "asap.safetensors", tmp_path / "asap.json"]
    for path in paths:
        path.write_text("earlier")
    assert compile_asap.main([f"--weights={model}", DATA, f"--output={paths[0]}", "--pairs=2"]) == 1
    assert capsys.readouterr().err == "compile_asap.py: no scores\n"
    assert [path.read_text() for path in paths] == ["earlier", "earlier"] and len(list(tmp_path.iterdir())) == 2


def test_values_and_keys_survive_the_file(model, maps, tmp_path):
    params = Pretrained.load(model).params
    again = tmp_path / "again.safetensors"
    of = asap_maps.load(maps, params)
    asap_maps.save(again, of, params, 0, {"run": "again"})
    for layer, found in asap_maps.load(again, params).items():
        assert (found.features, found.two_sided) == (of[layer].features, of[layer].two_sided)
        np.testing.assert_array_equal(found.weights, of[layer].weights)
        np.testing.assert_array_equal(found.directions, of[layer].directions)
