"""Numbers that are not finite, and inputs that come near them."""

import functools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from alignment.inference import Pretrained
from configs import aligner
from data import pfam, pipeline, vocab
from evaluation import runs
from models.objectives import AlignmentObjective
from ot_attention import SinkhornSpec, sinkhorn_attention
from tests.support import processes as several
from tests.support import tiny
from tests.support.run import assert_same_run, config, copy, restored, rows
from training.checkpoints import Checkpoints
from training.nonfinite_guard import NonFiniteError, Verdict
from training.session import Session

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
    train.train(config(**changes), tmp_path / "whole")
    copy(tmp_path / "whole", tmp_path / "resumed")
    for step in ("6", "7"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step)
    train.train(config(**changes), tmp_path / "resumed")
    assert "step 5: loss nan" in capsys.readouterr().err
    logged = rows(tmp_path / "whole")
    assert [(row["step"], row["nonfinite"]) for row in logged] == [(1, 0), (2, 0), (3, 0), (4, 0), (6, 1), (7, 1)]
    assert np.isfinite([value for row in logged for value in row.values()]).all()
    told = json.loads((tmp_path / "whole" / "nonfinite_5.json").read_text())
    assert told["step"] == told["batch"] == 5 and np.shape(told["ids"]) == (4, 4)
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
    train.train(config(**changes), tmp_path / "whole")
    assert trained == [(1, 1), (2, 2), (3, 3), (4, 4), (4, 6), (5, 7), (6, 8), (7, 9)]
    copy(tmp_path / "whole", tmp_path / "resumed")
    for step in ("6", "7"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step)
    train.train(config(**changes), tmp_path / "resumed")
    assert [(row["step"], row["nonfinite"]) for row in rows(tmp_path / "whole")] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1),
    ]  # fmt: skip
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    unknown = {"stream": "", "content": ""}
    assert restored(tmp_path / "whole")[1] | unknown == {"step": 9, "nonfinite": 1} | unknown


def test_too_many_of_them_stop_the_run(poisoned, tmp_path, monkeypatch):
    """And what is being saved meanwhile is kept."""
    add_sums = Checkpoints._add_sums
    monkeypatch.setattr(Checkpoints, "_add_sums", lambda self: (time.sleep(3), add_sums(self)))
    poisoned.append(6)
    changes = {"train__on_nonfinite": "skip", "train__max_nonfinite": 1}
    with pytest.raises(NonFiniteError, match=r"step 6: .*the last of 2 such steps"):
        train.train(config(**changes), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__on_nonfinite": "ignore"}, r"train\.on_nonfinite='ignore': allowed is one of stop, skip, rollback"),
        ({"train__max_nonfinite": -1}, r"train\.max_nonfinite=-1: allowed is an integer, 0 or more"),
        ({"data__max_bad_records": -1}, r"data\.max_bad_records=-1: allowed"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        train.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    """Use the weights that ship."""
    model = Pretrained.load(tiny.ROOT / "weights/aligner.safetensors")
    found = model.align([(vocab.encode(x.encode()), vocab.encode(y.encode())) for x, y in PAIRS.values()])
    for (name, (x, y)), of_one in zip(PAIRS.items(), found, strict=True):
        assert ((of_one.confidence >= 0) & (of_one.confidence <= 1.001)).all(), name
        assert (np.diff(of_one.pairs, axis=0) > 0).all() and (of_one.pairs < (len(x), len(y))).all(), name
        assert np.isfinite(of_one.x_alone).all() and np.isfinite(of_one.y_alone).all(), name
        assert 0 <= of_one.probability <= 1, name
    np.testing.assert_array_equal(found[-1].pairs, np.arange(len(GLOBIN))[:, None].repeat(2, 1), "with itself")


@pytest.mark.slow
def test_extreme_pairs_are_trained_on():
    """A batch of them, and of an empty one, has a finite loss with all its terms, and a finite update."""
    settings = several.config(aligner.get_config(), model__contextual_gaps=True, optimizer__warmup_steps=0)
    trainer, mesh = runs.make_trainer(settings), runs.local_mesh(1)
    tokens = [[vocab.encode(s.encode()) for s in pair] for pair in (*PAIRS.values(), ("", ""))]
    batch = {name: np.zeros((6, 64), np.int32) for name in ("x", "y")} | {"target": np.full((6, 64), -1, np.int32)}
    for n, (x, y) in enumerate(tokens):
        batch["x"][n, : len(x)], batch["y"][n, : len(y)] = x, y
        batch["target"][n, : min(len(x), len(y))] = np.arange(min(len(x), len(y)))
    batch |= {f"{name}_length": np.array([len(pair[of]) for pair in tokens], np.int32) for of, name in enumerate("xy")}
    update, state = trainer.compiled_update(mesh), trainer.initial_state(mesh)
    for _ in range(2):
        state, metrics = update(state, batch)
        assert metrics["finite"] == 1, metrics
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
