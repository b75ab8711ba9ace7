"""models/pair_aligner.py and its task: scores, the objective, and a run that learns, is scored and resumes."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eval as eval_program
import train
from alignment.inference import Pretrained
from configs import aligner as aligner_config
from configs import pretrain as pretrain_config
from data import vocab
from data.batches import unbatch
from evaluation import baselines, runs
from models import masked, pair_hmm, weights
from models.attention import BlockSpec, SinkhornSpec, SparseSpec
from models.pair_aligner import PairAlignerConfig, PairLossConfig, PairObjective
from tests.support import processes as several
from tests.support import run as small_runs
from tests.support import small_aligner, small_sequences
from tests.support.small_aligner import X_LENGTHS, Y_LENGTHS
from training import run_folder
from training.state import OptimizerConfig, Trainer

SMALL = PairAlignerConfig(width=16, depth=1, kernel=3, heads=2, attention_every=0, plan_width=8)
LOSS = PairLossConfig(masked=1.0)


def objective(loss: PairLossConfig = LOSS, attention=None, **changes) -> PairObjective:
    return PairObjective(PairAlignerConfig(**(vars(SMALL) | changes)), attention or SinkhornSpec(), loss)


def batch_of(seed: int = 0) -> dict[str, jax.Array]:
    """Three related pairs, an unrelated one, and a place without a pair."""
    batch = small_aligner.make_batch(seed=seed)
    batch = {name: batch[name] for name in ("x", "y", "target", "x_length", "y_length")}
    batch["target"][3] = -1
    empty = {"x": 0, "y": 0, "target": -1, "x_length": 0, "y_length": 0}
    return {name: jnp.concatenate([x, np.full_like(x[:1], empty[name])]) for name, x in batch.items()}


def lengths_of(batch) -> tuple[jax.Array, jax.Array]:
    return batch["x_length"], batch["y_length"]


# ---- the model ----


def test_scores_begin_as_normalised_blosum62():
    """The prior, less half of the means of its row and its column, is left where projections are 0."""
    model, batch = objective().make(nnx.Rngs(0)), batch_of()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    params["plan_projection"]["kernel"] *= 0
    found, gaps = jax.jit(lambda params, *of: nnx.merge(graph, params).pair(*of))(
        params, batch["x"], batch["y"], *lengths_of(batch)
    )
    for n, (rows, columns) in enumerate(zip(X_LENGTHS, Y_LENGTHS, strict=True)):
        x, y = (np.asarray(batch[side])[n, :length] for side, length in (("x", rows), ("y", columns)))
        scores = 0.3466 * vocab.blosum62()[np.ix_(x, y)]
        row, column = (np.log(np.exp(scores).mean(axis, keepdims=True)) for axis in (1, 0))
        np.testing.assert_allclose(found[n, :rows, :columns], scores - row / 2 - column / 2 - 0.1, atol=1e-4)
    assert gaps.x_offset is None and gaps.y_offset is None
    np.testing.assert_allclose(gaps.opening, [4.0, 6.5], rtol=1e-6)
    np.testing.assert_allclose(gaps.extension, [0.5, 0.05], rtol=1e-6)
    assert float(gaps.terminal) == pytest.approx(3)
    places = X_LENGTHS * np.asarray(Y_LENGTHS)
    np.testing.assert_allclose(gaps.empty, 10 - np.log([*places, 1]), rtol=1e-5)


@pytest.mark.parametrize("contextual", [False, True])
def test_pairs_are_computed_as_encoded_one_by_one(contextual):
    """Training encodes both sequences in one call, or each alone where paddings differ; users encode once each."""
    model, batch = objective(contextual_gaps=contextual).make(nnx.Rngs(0)), batch_of()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    if contextual:
        params["gap_projection"]["kernel"] += np.linspace(-1, 1, 16)[:, None]

    @jax.jit
    def computed(params, batch):
        model, lengths = nnx.merge(graph, params), lengths_of(batch)
        together = model.pair(batch["x"], batch["y"], *lengths)
        apart = model.pair(batch["x"], jnp.pad(batch["y"], ((0, 0), (0, 3))), *lengths)
        encoded = model.encode(batch["x"], lengths[0]), model.encode(batch["y"], lengths[1])
        problem, gaps = model.problem(*encoded, *lengths, None)
        return together, apart, pair_hmm.unskewed(problem.log_weight, 20), gaps

    (together, gaps), (apart, gaps_apart), of_users, gaps_of_users = computed(params, batch)
    for n, (rows, columns) in enumerate(zip(X_LENGTHS, Y_LENGTHS, strict=True)):
        inside = np.s_[n, :rows, :columns]
        np.testing.assert_allclose(together[inside], apart[inside], atol=1e-5)
        np.testing.assert_allclose(together[inside], of_users[inside], atol=1e-5)
        if contextual:
            for of, length in ((1, rows), (2, columns)):
                of_pair = [list(g[4:])[of - 1][n, :length] for g in (gaps, gaps_apart, gaps_of_users)]
                np.testing.assert_allclose(of_pair[0], of_pair[1], atol=1e-6)
                np.testing.assert_allclose(of_pair[0], of_pair[2], atol=1e-6)
    assert (gaps.x_offset is not None) == contextual
    assert not contextual or float(jnp.abs(gaps.x_offset).max()) > 0.1


def test_the_temperature_and_the_calibration_are_of_use():
    model, batch = objective().make(nnx.Rngs(0)), batch_of()
    lengths = lengths_of(batch)
    model.calibration.temperature[...] = jnp.asarray(2.0)
    encoded = model.encode(batch["x"], lengths[0]), model.encode(batch["y"], lengths[1])
    problem, gaps = model.problem(*encoded, *lengths, None)
    np.testing.assert_allclose(gaps.opening, [2.0, 3.25], rtol=1e-6)
    weight, _ = model.pair(batch["x"], batch["y"], *lengths)
    np.testing.assert_allclose(problem.log_weight[3, 0, 1], weight[0, 1, 2] / 2, rtol=1e-4)
    model.calibration.homology[...] = jnp.asarray([0.5, -0.25, 1.0])
    odds = jnp.asarray([3.0, 40.0, 0.0, 1.0, 0.0])
    places = np.log(np.maximum(lengths[0], 1)) + np.log(np.maximum(lengths[1], 1))
    expected = 1 / (1 + np.exp(-(0.5 * np.asarray(odds) - 0.25 * places + 1)))
    np.testing.assert_allclose(model.homology(odds, *lengths), expected, rtol=1e-5)


# ---- the objective ----


def totals_of(objective: PairObjective, batch, seed: int = 0) -> dict[str, float]:
    graph, params = nnx.split(objective.make(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    compute = jax.jit(lambda params, batch: objective.totals(nnx.merge(graph, params), batch))
    return {name: float(x) for name, x in compute(params, objective.augment(batch, jax.random.key(seed))).items()}


def test_totals_are_likelihoods_and_masked_residues():
    of, batch = objective(), batch_of()
    found = totals_of(of, batch)
    model, lengths = of.make(nnx.Rngs(0)), lengths_of(batch)
    weight, gaps = model.pair(batch["x"], batch["y"], *lengths)
    nats = pair_hmm.negative_log_likelihood(weight, batch["target"], *lengths, gaps)
    aligned = (np.asarray(batch["target"]) >= 0).sum(1)
    length = np.where(aligned, aligned, np.minimum(*lengths))  # the unrelated pair counts as one of its length
    nats = np.asarray(nats) / np.sqrt(np.maximum(length, 1))
    assert found["related"] == pytest.approx(nats[:3].sum(), rel=1e-4)
    assert found["unrelated"] == pytest.approx(nats[3], rel=1e-4)
    assert found["alignment"] == pytest.approx(nats[:4].sum(), rel=1e-4)
    counts = {name: found[f"{name}/count"] for name in ("alignment", "related", "unrelated")}
    assert counts == {"alignment": 4, "related": 3, "unrelated": 1}
    augmented = of.augment(batch, jax.random.key(0))
    chosen = np.asarray(augmented["chosen"])
    predicted = model.predicted(augmented["seen"], lengths[0])
    of_chosen, _ = masked.scores(predicted, batch["x"])
    assert found["masked"] == pytest.approx(float(np.asarray(of_chosen)[chosen].sum()), rel=1e-4)
    assert found["masked/count"] == chosen.sum() > 0
    value = float(of.value({name: jnp.asarray(x) for name, x in found.items()}))
    assert value == pytest.approx(found["alignment"] / 4 + found["masked"] / chosen.sum(), rel=1e-5)
    assert {name: float(x) for name, x in of.counts(augmented).items()} == {
        name: x for name, x in found.items() if name.endswith("/count")
    }
    assert int(of.residues(batch)) == X_LENGTHS.sum() + Y_LENGTHS.sum()


@pytest.mark.parametrize("term", ["alignment", "masked"])
def test_a_term_of_weight_0_is_not_computed(term):
    found = totals_of(objective(PairLossConfig(**{term: 0.0})), batch_of())
    other = {"alignment": "masked", "masked": "alignment"}[term]
    assert other in found and term not in found and f"{term}/count" not in found
    assert ("related" in found) == (term == "masked")


def test_padding_and_places_without_a_pair_change_nothing():
    of, batch = objective(PairLossConfig(masked=0.0), contextual_gaps=True), batch_of()
    whole = totals_of(of, batch)
    longer = {name: jnp.pad(x, ((0, 0), (0, 6))) if x.ndim == 2 else x for name, x in batch.items()}
    longer["target"] = jnp.pad(batch["target"], ((0, 0), (0, 6)), constant_values=-1)
    for other in (longer, {name: x[:4] for name, x in batch.items()}, {n: x[::-1] for n, x in batch.items()}):
        assert totals_of(of, other) == pytest.approx(whole, rel=2e-5)


def learned(kind: str | None, **changes):
    """Trainer of the small model, its state before and after some steps on one batch, and the metrics."""
    attention = BlockSpec(kind, SparseSpec(block=6)) if kind else None
    trainer = Trainer.create(
        objective(attention=attention, **changes),
        OptimizerConfig(warmup_steps=0, learning_rate=0.01),
        total_steps=100,
        seed=1,
    )
    update, before, told = jax.jit(trainer.update), trainer.initial(), []
    state = before
    for _ in range(8):
        state, metrics = update(state, batch_of())
        told.append({name: float(x) for name, x in metrics.items()})
    return trainer, before, state, told


def test_a_batch_is_learned_and_every_parameter_but_the_calibration_takes_part():
    _, before, after, told = learned(None, contextual_gaps=True)
    assert {"loss", "alignment", "related", "unrelated", "masked", "gradient_norm"} <= told[0].keys()
    assert told[-1]["loss"] < 0.9 * told[0]["loss"] and told[-1]["alignment"] < 0.9 * told[0]["alignment"]
    assert told[-1]["unrelated"] < told[0]["unrelated"]
    assert told[0]["loss"] == pytest.approx(told[0]["alignment"] + told[0]["masked"], rel=1e-5)
    (old, new) = (weights.named(state.params) for state in (before, after))
    same = {name for name, x in old.items() if (np.asarray(x) == np.asarray(new[name])).all()}
    assert same == {"calibration.temperature", "calibration.homology"}


@pytest.mark.slow
def test_gap_costs_that_are_not_learned_stay():
    _, before, after, _ = learned(None, learn_gaps=False)
    for name, x in weights.named(before.params["gaps"]).items():
        assert (np.asarray(x) == np.asarray(weights.named(after.params["gaps"])[name])).all(), name
    assert float(before.params["match"]) != float(after.params["match"])


def test_noise_of_sorted_blocks_reaches_the_encoder():
    of = objective(attention=BlockSpec("sparse_sinkhorn", SparseSpec(block=6)), attention_every=1)
    batch = batch_of()
    first, other = (totals_of(of, batch, seed)["alignment"] for seed in (0, 1))
    assert first != other
    assert "noise" not in objective().augment(batch, jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PairAlignerConfig(plan_gain=0.0), r"model\.plan_gain=0\.0"),
        (lambda: PairAlignerConfig(plan_width=0), r"model\.plan_width=0"),
        (lambda: PairLossConfig(alignment=-1.0), r"loss\.alignment=-1\.0"),
        (lambda: PairLossConfig(alignment=0.0, masked=0.0), r"loss\.alignment=0\.0, loss\.masked=0\.0: one must"),
        (lambda: PairLossConfig(mask_rate=1.0), r"loss\.mask_rate=1\.0"),
        (lambda: PairLossConfig(mask_rate=0.0), r"loss\.mask_rate=0\.0"),
    ],
)
def test_a_setting_out_of_range_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


# ---- runs ----


def config(**overrides):
    """A run of some seconds on the data that ship."""
    changes = {
        "data__buckets": (320,),
        "batch_size": 4,
        "total_steps": 6,
        "checkpoint__every": 2,
        "checkpoint__keep": 3,
    }
    changes |= {"checkpoint__keep_every": 0, "log__eval_every": 6, "log__eval_pairs": 2}
    changes |= {"optimizer__warmup_steps": 1, "optimizer__learning_rate": 0.01, "loss__masked": 1.0}
    return several.config(aligner_config.get_config(), **changes | overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.train(config(), folder, quiet=True)
    return folder


def test_a_run_learns_and_logs_each_part_of_its_loss(finished):
    rows = [row for row in run_folder.read_metrics(finished) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {"loss", "alignment", "related", "unrelated", "masked"} <= row.keys()
        assert row["loss"] == pytest.approx(row["alignment"] + row["masked"], rel=1e-4)
    assert rows[-1]["masked"] < rows[0]["masked"] and rows[-1]["loss"] < rows[0]["loss"]
    last = run_folder.read_metrics(finished)[-1]
    for name in ("validation/f1", "validation_flanked/f1", "negatives/auc"):
        assert 0 <= last[name] <= 1


def test_a_stopped_run_goes_on_as_if_it_had_not(finished, tmp_path):
    folder = small_runs.copy(finished, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / str(step))
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    train.train(config(), folder, quiet=True)
    small_runs.assert_same_run(folder, finished)


def test_eval_scores_pairs_flanked_pairs_and_negatives(finished, tmp_path, capsys):
    for split in ("validation", "validation_flanked", "negatives"):
        output = tmp_path / f"{split}.json"
        arguments = [f"--workdir={finished}", f"--split={split}", "--limit=2", f"--output={output}"]
        assert eval_program.main(arguments) == 0, capsys.readouterr().err
        told, report = capsys.readouterr().out, json.loads(output.read_text())
        result = report["splits"][split]
        assert "certificates" not in report and f"{split}: 2 pairs" in told
        if split == "negatives":
            assert (
                list(result) == ["model", "nw_blosum62"] and {"auc", "false_pairs"} == result["model"]["overall"].keys()
            )
            continue
        assert list(result) == ["model", *baselines.BASELINES]
        # A pair HMM reconstructs nothing, and is scored by its posterior.
        assert result["model"]["overall"].keys() >= {"f1", "precision", "recall", "sparse_ce", "barycenter_mae"}
        assert not {"reconstruction", "reconstruction_masked"} & result["model"]["overall"].keys()
        assert list(report["reliability"]) == [split]
        stated = report["calibration"][split]
        assert stated["pairs"] == sum(of["pairs"] for of in report["reliability"][split]) > 20
        assert f"{stated['right']:.3f} are right; calibration error {stated['error']:.3f}" in told


def test_negatives_are_told_by_the_probability_of_homology(finished):
    """Count AUC again from the probabilities that users get of the same pairs."""
    run = runs.load_run(finished)
    task, model = run.task, run.pretrained()
    _, batches = task.open(run.config.data.dir, "negatives", run.mesh)
    related, unrelated = (
        [(pair.x, pair.y) for batch in of for _, pair in unbatch(batch)] for of in map(list, batches(3))
    )
    positive, negative = ([of.probability for of in model.align(pairs)] for pairs in (related, unrelated))
    assert all(0 <= p <= 1 for p in positive + negative)
    auc = np.mean([(a > b) + 0.5 * (a == b) for a in positive for b in negative])
    report = task.evaluate(run, "negatives", pictures=finished / "figures", limit=3)
    assert report["splits"]["negatives"]["model"]["overall"]["auc"]["value"] == pytest.approx(auc)


def test_its_weights_are_a_file_that_aligns_as_the_run_does(finished, tmp_path):
    run, path = runs.load_run(finished), tmp_path / "w.safetensors"
    weights.save(path, run.params, run.config.to_dict(), run.step)
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(1, 21, n, dtype=np.int32) for n in lengths) for lengths in ((30, 40), (50, 20))]
    of_file, of_run = (model.align(pairs) for model in (Pretrained.load(path), run.pretrained()))
    for a, b in zip(of_file, of_run, strict=True):
        np.testing.assert_array_equal(a.pairs, b.pairs)
        np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-5)
        assert a.probability == pytest.approx(b.probability, rel=1e-5)


ON_FOUR_DEVICES = """
import json
import tests.test_pair_aligner as t
print(json.dumps([t.measured(mesh_of) for mesh_of in ((1, 1), (2, 1), (2, 2))]))
"""


def measured(mesh_of: tuple[int, int]) -> list[list[float]]:
    """Losses and gradient norms of three steps."""
    base = aligner_config.get_config()
    base.model.contextual_gaps = True
    return several.steps(mesh_of, base)[1]


@pytest.mark.slow  # some 70 processor seconds
def test_several_devices_train_as_one():
    (printed,) = several.finish(several.start("-c", ON_FOUR_DEVICES, devices=4))
    expected, *others = json.loads(printed.splitlines()[-1])
    for found in others:
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_a_run_begins_from_a_run_of_masked_residues(tmp_path, capsys):
    """It takes the encoder and the layer that predicts residues; what only aligners have stays as it was made."""
    built = small_sequences.build(small_sequences.random_sequences(200), tmp_path)
    source = pretrain_config.get_config()
    small = {"width": 16, "depth": 1, "kernel": 3, "heads": 2, "attention_every": 0}
    source.update(total_steps=2, batch_size=8)
    source.model.update(**small)
    source.data.update(dir=str(built), buckets=(112,))
    source.log.update(eval_every=0, wandb="disabled")
    train.train(source, tmp_path / "source", quiet=True)
    alike = {f"model__{name}": value for name, value in small.items()}
    wanted = config(total_steps=1, log__eval_every=0, checkpoint__keep_every=1, **alike)
    capsys.readouterr()
    train.train(wanted, tmp_path / "run", init_from=str(tmp_path / "source"), quiet=True)
    assert "begun from" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/init.json").read_text())
    assert not record.get("left_over") and not record.get("other_shape")
    given = weights.named(runs.load_run(tmp_path / "source").params)
    found = weights.named(small_runs.restored(tmp_path / "run", 0)[0].params)
    assert {name.split(".")[0] for name in given} == {"encoder", "residues"}
    for name, x in given.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert set(record["missing"]) == found.keys() - given.keys()
