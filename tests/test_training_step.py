"""The loss and the update rule: what is learned, averaged, accumulated and kept in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.aligner import AlignerConfig
from models.attention import BlockSpec, SparseSpec
from models.objectives import AlignmentObjective, LossConfig
from ot_attention import SinkhornSpec
from tests.support.small_aligner import (
    SMALL,
    SPECS,
    make_trainer,
    training_batch,
)
from training.state import OptimizerConfig, Trainer


@pytest.mark.parametrize(
    "kind", ["sparse_sinkhorn", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("local", "softmax"))]
)
def test_self_attention_of_another_kind_is_trained(kind):
    """Padding changes nothing, every parameter learns, and only the sorted kind is noisy while training."""
    model = AlignerConfig(**(vars(SMALL) | {"attention_every": 1, "depth": 1}))
    spec, blocks = SPECS["dustbin"], BlockSpec(kind, SparseSpec(block=6))
    trainer = Trainer.create(
        AlignmentObjective(model, spec, LossConfig(sparse_ce=0.5), blocks),
        OptimizerConfig(warmup_steps=0),
        total_steps=9,
        seed=1,
    )
    state, batch = trainer.initial(), training_batch()
    totals = jax.jit(lambda batch: trainer.objective.totals(trainer.model(state.params), batch))
    seen = trainer.objective.augment(batch, jax.random.key(3))
    other = seen | {"noise": seen["noise"][::-1]}
    assert (float(totals(seen)["sparse_ce"]) != float(totals(other)["sparse_ce"])) == (kind == "sparse_sinkhorn")
    longer = {name: jnp.pad(x, ((0, 0), (0, 7))) if x.ndim == 2 else x for name, x in seen.items()}
    longer["target"] = jnp.pad(seen["target"], ((0, 0), (0, 7)), constant_values=-1)
    if kind != "sparse_sinkhorn":  # whose noise is drawn by block
        np.testing.assert_allclose(totals(longer)["sparse_ce"], totals(seen)["sparse_ce"], rtol=1e-5)
    after, _ = jax.jit(trainer.update)(state, batch)
    for path, old in jax.tree_util.tree_leaves_with_path(state.params):
        new = functools.reduce(lambda tree, key: tree[key.key], path, after.params)
        assert (np.asarray(old) != np.asarray(new)).any(), path


@pytest.fixture(scope="module")
def update():
    return jax.jit(make_trainer()[0].update)


@pytest.fixture(scope="module")
def updated(update):
    _, state = make_trainer()
    return state, *update(state, training_batch())


def test_update_changes_every_parameter_and_counts(updated):
    before, after, measured = updated
    assert int(after.step) == 1
    same = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True
        )
        if (np.asarray(old) == np.asarray(new)).all()
    ]
    assert same == []
    assert {"loss", "gradient_norm", "learning_rate", "reconstruction", "sparse_ce", "residual"} <= measured.keys()


def test_the_average_follows_slowly_and_at_first_faster(update, updated):
    before, _, _ = updated
    for step, decay in ((0, 1 / 10), (7, 8 / 17), (10_000, 0.99)):
        after, _ = update(before._replace(step=jnp.array(step, jnp.int32)), training_batch())
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, before.ema, after.params)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, expected)


def test_accumulation_gives_the_update_of_the_whole_batch(updated):
    """Parts hold different numbers of aligned residues, so their means must not simply be averaged."""
    _, whole, of_whole = updated
    trainer, state = make_trainer(accumulate=2)
    parts, of_parts = jax.jit(trainer.update)(state, training_batch())
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # Adam's first step is the sign of the gradient where that is above its epsilon: its moments are what to compare.
    for a, b in zip(jax.tree.leaves(parts.optimizer), jax.tree.leaves(whole.optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"optimizer\.accumulate=3 must divide the batch of 4 examples"):
        make_trainer(accumulate=3)[0].update(state, training_batch())


def test_bfloat16_computes_in_it_and_keeps_float32(updated):
    trainer, state = make_trainer(AlignerConfig(**(vars(SMALL) | {"dtype": "bfloat16"})))
    after, measured = jax.jit(trainer.update)(state, training_batch())
    kept = jax.tree.leaves((after.params, after.ema, after.optimizer))
    assert {str(x.dtype) for x in kept} == {"float32", "int32"}
    assert all(np.isfinite(x).all() for x in [*kept, *measured.values()])
    _, _, in_float32 = updated
    difference = abs(float(measured["loss"] - in_float32["loss"]))
    assert 0 < difference < 0.05, "0: nothing was computed in bfloat16"


def test_loss_is_the_weighted_sum(updated):
    _, _, measured = updated  # reconstruction 1, sparse CE 0.5, two of whose targets lie outside the band
    totals = {"reconstruction": 6.0, "reconstruction/count": 3.0, "sparse_ce_unfloored": 12.0, "sparse_ce/count": 4.0}
    totals = {name: jnp.asarray(value) for name, value in totals.items()}
    for weights, expected in (({"reconstruction": 0.5, "sparse_ce": 2.0}, 0.5 * 2 + 2 * 3), ({}, 2)):
        objective = AlignmentObjective(SMALL, SinkhornSpec(), LossConfig(**weights))
        assert float(objective.value(totals)) == pytest.approx(expected)
    assert float(measured["reconstruction"]) < float(measured["loss"])
    assert float(measured["loss"]) < float(measured["reconstruction"] + 0.5 * measured["sparse_ce"])


def test_learning_rate_warms_up_and_decays():
    settings = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, final_fraction=0.1)
    rate = settings.schedule(20)
    assert [float(rate(step)) for step in (0, 2, 4, 20, 100)] == pytest.approx([0, 5e-3, 1e-2, 1e-3, 1e-3])
    rates = [float(rate(step)) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True)
    assert float(settings.schedule(3)(2)) == pytest.approx(1e-2), "a run shorter than its warm-up must reach the top"
