"""Masked residues: batches of sequences, what is hidden of them, the scores, and a run that an aligner begins from."""

import copy
import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import eval as eval_program
import train
from configs import aligner as aligner_config
from configs import pretrain as pretrain_config
from data import masked, vocab
from data.masked import SequenceConfig, SequenceStream
from data.sequences import open_sequences
from evaluation import masked as masked_scores
from evaluation import runs, tasks
from models import weights
from models.attention import BlockSpec, SinkhornSpec, SparseSpec
from models.encoder import EncoderConfig
from models.masked import MaskedLossConfig, MaskedObjective, hidden
from scripts import align
from tests.support import small_sequences
from training import initial

CONFIG = SequenceConfig(batch_size=12, buckets=(40, 60, 100), seed=3)
SMALL = EncoderConfig(width=16, depth=2, kernel=3, heads=2, attention_every=0)


def test_a_batch_holds_windows_of_the_sequences_of_one_bucket(source):
    stream, seen, windows = SequenceStream(source, CONFIG), set(), set()
    for step in range(40):
        batch = stream[step]
        places = batch["x"].shape[1]
        assert places in CONFIG.buckets
        shorter = max([0, *(length for length in CONFIG.buckets if length < places)])
        for x, length, n in zip(batch["x"], batch["length"], batch["id"].tolist(), strict=True):
            whole = source[n]
            assert len(whole) > shorter and (len(whole) <= places or places == CONFIG.buckets[-1])
            assert length == min(len(whole), places) and not x[length:].any()
            starts = [k for k in range(len(whole) - length + 1) if (whole[k : k + length] == x[:length]).all()]
            assert starts, "no window of this sequence"
            if len(whole) > places:
                windows.add((starts[0] == 0, starts[-1] == len(whole) - length))
        seen.add(places)
    assert seen == set(CONFIG.buckets) and len(windows) > 1


def test_batches_are_the_same_for_any_hosts_and_after_pickling(source):
    stream = SequenceStream(source, CONFIG)
    parts = [SequenceStream(source, CONFIG, shard_index=n, shard_count=3) for n in range(3)]
    parts[1] = pickle.loads(pickle.dumps(parts[1]))
    for step in (0, 7, 2**33):
        whole, cut = stream[step], [part[step] for part in parts]
        assert all((np.concatenate([part[name] for part in cut]) == whole[name]).all() for name in whole)
    assert {part.fingerprint() for part in parts} == {stream.fingerprint()}
    assert stream[0]["id"].tolist() != stream[1]["id"].tolist()
    other = SequenceStream(source, dataclasses.replace(CONFIG, seed=4))
    assert other.fingerprint() != stream.fingerprint() and other[0]["id"].tolist() != stream[0]["id"].tolist()
    largest = stream.largest()
    assert largest["x"].shape == (12, 100) and largest.keys() == whole.keys()
    assert stream.content == source.content != open_sequences(source.folder, "validation").content


def test_other_records_of_the_same_sequences_are_another_stream(source):
    """A batch draws records: the same sequences in other records are drawn otherwise."""
    regrouped = copy.copy(source)
    regrouped.first = np.delete(source.first, 1)
    assert SequenceStream(regrouped, CONFIG).fingerprint() != SequenceStream(source, CONFIG).fingerprint()


def test_every_sequence_is_as_likely_as_another(source):
    """Counted over many batches: by bucket, and by sequence."""
    stream, steps = SequenceStream(source, CONFIG), 1500
    drawn = np.bincount(np.concatenate([stream._drawn(step)[1] for step in range(steps)]), minlength=len(source))
    expected = 12 * steps / len(source)  # some 30
    bucket = np.minimum(np.searchsorted(CONFIG.buckets, source.lengths), 2)
    for n in range(3):
        assert drawn[bucket == n].mean() == pytest.approx(expected, rel=0.3)  # by chance 9 %
    assert drawn.min() > expected / 4 and drawn.max() < 3 * expected


def test_an_evaluation_holds_every_sequence_once_and_whole(built, source):
    batches = list(masked.evaluation_batches(source, 8, (40, 60), divisible_by=2))
    ids = np.concatenate([batch["id"] for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(len(source)))
    assert {batch["x"].shape for batch in batches} == {(8, 40), (8, 60), (4, 120), (2, 240)}
    for batch in batches:
        for x, length, n in zip(batch["x"], batch["length"], batch["id"].tolist(), strict=True):
            assert x[:length].tolist() == (source[n].tolist() if n >= 0 else [])
    chosen = [
        np.concatenate([batch["id"] for batch in masked.evaluation_batches(source, 8, (40, 60), limit=20)])
        for _ in range(2)
    ]
    assert (chosen[0] == chosen[1]).all() and (real := chosen[0][chosen[0] >= 0]).size == 20
    assert (source.lengths[real] <= 60).all() and len(set(real.tolist())) == 20
    with pytest.raises(ValueError, match="no sequence of the split fits the largest, 20"):
        next(masked.evaluation_batches(source, 8, (20,), limit=3))


def test_known_residues_are_chosen_and_most_of_them_hidden():
    x = jnp.tile(jnp.asarray([1, 5, 20, vocab.X, vocab.PAD, 7]), (64, 400))
    seen, chosen = map(np.asarray, jax.jit(hidden, static_argnums=2)(x, jax.random.key(1), 0.15))
    assert not chosen[(x == vocab.X) | (x == vocab.PAD)].any() and (seen == x)[~chosen].all()
    known = np.isin(x, [1, 5, 7, 20])
    assert chosen[known].mean() == pytest.approx(0.15, abs=0.005)
    of_chosen, was = seen[chosen], np.asarray(x)[chosen]
    assert (of_chosen == vocab.MASK).mean() == pytest.approx(0.8, abs=0.01)
    replaced = (of_chosen != vocab.MASK) & (of_chosen != was)
    assert replaced.mean() == pytest.approx(0.1 * 19 / 20, abs=0.01)
    assert set(of_chosen[replaced]) == set(range(1, 21))
    rows = {row.tobytes() for row in chosen}
    assert len(rows) == len(chosen), "each sequence has a mask of its own"


@pytest.mark.parametrize("kind", ["softmax", "sinkhorn"])
def test_totals_are_those_of_the_chosen_residues_alone(kind, source):
    attention = SinkhornSpec(band=8, base_steps=2, tail_steps=1)
    attention = BlockSpec("softmax", SparseSpec(block=4)) if kind == "softmax" else attention
    model = dataclasses.replace(SMALL, attention_every=2)
    objective = MaskedObjective(model, attention, MaskedLossConfig(0.3))
    graph, params = nnx.split(objective.make(nnx.Rngs(0)))
    batch = {name: jnp.asarray(x) for name, x in SequenceStream(source, CONFIG)[0].items() if name != "id"}
    batch = objective.augment(batch, jax.random.key(1))
    assert ("noise" in batch) == (kind == "softmax")

    @jax.jit
    def compute(params, batch):
        model = nnx.merge(graph, params)
        return model(batch["seen"], batch["length"]), objective.totals(model, batch)

    predicted, totals = compute(params, batch)
    np.testing.assert_allclose(np.exp(predicted).sum(-1), 1, rtol=1e-5)
    rows, places = np.nonzero(np.asarray(batch["chosen"]))
    nats = -np.asarray(predicted)[rows, places, np.asarray(batch["x"])[rows, places] - 1]
    assert float(totals["cross_entropy"]) == pytest.approx(nats.sum(), rel=1e-5)
    assert float(totals["cross_entropy/count"]) == len(nats) == float(objective.counts(batch)["cross_entropy/count"])
    assert float(objective.value(totals)) == pytest.approx(nats.mean(), rel=1e-5)
    padded = batch | {name: jnp.pad(batch[name], ((0, 0), (0, 5))) for name in ("x", "seen", "chosen")}
    padded["seen"] = padded["seen"].at[:, -5:].set(3)
    _, again = compute(params, padded)
    assert float(again["cross_entropy"]) == pytest.approx(float(totals["cross_entropy"]), rel=1e-5)


def test_the_perplexity_is_the_exponential_of_the_mean():
    from models import objectives

    found = objectives.means({"perplexity": jnp.array(6.0), "perplexity/count": jnp.array(3.0)})
    assert float(found["perplexity"]) == pytest.approx(math.exp(2))


def test_scores_of_a_model_that_knows_the_answers_and_of_the_composition():
    x = np.array([[1, 1, 2, 1, 3, 1, 2, 1], [2, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.int32)
    batch = {"x": x, "length": np.array([8, 7, 0], np.int32), "id": np.array([0, 1, -1], np.int32)}
    chosen = np.asarray(masked_scores.masked(jnp.asarray(x), jnp.asarray(batch["id"])))
    assert [np.flatnonzero(row).tolist() for row in chosen] == [[0, 7], [6], []]
    residues = np.zeros(vocab.SIZE, np.int64)
    residues[1:4] = 59, 29, 0  # with one more of each of the twenty: 60, 30, 1, and 17 others of 108
    kinds = np.zeros((3, vocab.SIZE), np.int64)
    kinds[0, 1], kinds[1, 2] = 2, 1
    sums = {"nats": [0.2, 0.4, 9], "right": [2, 0, 9], "count": [2, 1, 9], "residues": kinds}
    found = masked_scores.score_split(lambda _: sums, [batch], residues)
    model, unigram = (found[who]["overall"] for who in ("model", "unigram"))
    assert model["cross_entropy"]["value"] == pytest.approx(0.2) and model["accuracy"]["value"] == pytest.approx(2 / 3)
    assert model["perplexity"]["value"] == pytest.approx(math.exp(0.2)) and model["perplexity"]["low"] is None
    nats = -(2 * math.log(60 / 108) + math.log(30 / 108)) / 3
    assert unigram["perplexity"]["value"] == pytest.approx(math.exp(nats))
    assert unigram["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["model"]["pairs"] == 2 and list(found["model"]["bins"]) == ["-64"]
    with pytest.raises(ValueError, match="no sequence to score"):
        masked_scores.score_split(lambda _: sums, [], residues)


def test_the_aligner_takes_the_whole_encoder(tmp_path):
    """Compare names and shapes, from the configurations that ship."""
    shapes = [
        runs.make_trainer(tasks.checked(config.get_config())).abstract_state(runs.local_mesh(1)).params
        for config in (pretrain_config, aligner_config)
    ]
    source, target = map(weights.named, shapes)
    taken = {name: x.shape for name, x in target.items() if name.startswith(("encoder.", "residues."))}
    assert len(taken) > 50 and {name: x.shape for name, x in source.items()} == taken
    assert taken["residues.kernel"] == (144, 20)


def small_run(built, **changes) -> ConfigDict:
    options = {
        "total_steps": 40, "batch_size": 16, "data.dir": str(built), "data.buckets": (112,), "model.width": 16,
        "model.depth": 2, "model.kernel": 3, "log.eval_every": 40, "log.eval_pairs": -1, "log.wandb": "disabled",
        "checkpoint.every": 20, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 2, "optimizer.ema": 0.8,
    }  # fmt: skip
    config = pretrain_config.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(options | changes)
    return config


def test_a_run_learns_is_scored_and_handed_to_an_aligner(tmp_path, capsys):
    """Sequences of two residues in turn: what is masked can be told from the neighbours, and composition cannot."""
    rng = np.random.default_rng(0)
    repeats = {f"r{n}": ("AW" * 100)[: rng.integers(40, 100)] + "A" * (n % 7) for n in range(400)}
    repeats = {name: x for x, name in {x: name for name, x in repeats.items()}.items()}
    built, workdir = small_sequences.build(repeats, tmp_path), tmp_path / "run"
    config = small_run(built)
    train.train(config, workdir, quiet=True)
    train.train(config, workdir, quiet=True)  # finished: changes nothing
    out = ["--workdir", str(workdir), "--split"]
    assert eval_program.main([*out, "validation"]) == 0, capsys.readouterr().err
    assert "perplexity, length 65-128" in (told := capsys.readouterr().out) and "95 % intervals over sequences" in told
    scores = json.loads((workdir / "eval_validation.json").read_text())["splits"]["validation"]
    model, unigram = (scores[who]["overall"]["perplexity"] for who in ("model", "unigram"))
    assert model["value"] < 1.4 < 1.8 < unigram["value"] < 2.2
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert logged["validation/perplexity"] == pytest.approx(model["value"])
    assert (workdir / "figures" / "validation.png").exists()
    assert eval_program.main([*out, "test_iid"]) == 1
    assert "--split=test_iid: allowed are validation, test_ood for a model" in capsys.readouterr().err
    assert eval_program.main([*out, "validation", f"--report={tmp_path / 'page'}"]) == 1
    assert "--report needs a model that aligns; this one was trained to predict masked" in capsys.readouterr().err
    (tmp_path / "a.fasta").write_text(">x\nMKV\n>y\nMKV\n")
    assert align.main([f"--workdir={workdir}", str(tmp_path / "a.fasta")]) == 1
    assert "was trained to predict masked residues, and has no plan" in capsys.readouterr().err
    small = aligner_config.get_config()
    small.model.update(width=16, depth=2, kernel=3)
    shapes = runs.make_trainer(tasks.checked(small)).abstract_state(runs.local_mesh(1)).params
    begun = initial.prepare(str(workdir), shapes, tmp_path / "none")
    assert not begun.left_over and not begun.other_shape
    assert set(begun.taken) == {name for name in weights.named(shapes) if name.startswith(("encoder.", "residues."))}
