"""The aligner, its loss and its update rule: what padding, masks, plans and settings may and may not change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data import vocab
from data.transforms import Pair
from evaluation import metrics
from models import attention, objectives, pair_hmm
from models.aligner import Aligner, AlignerConfig
from models.objectives import LossConfig
from ot_attention import SinkhornSpec
from tests.support.small_aligner import (
    SMALL,
    SPECS,
    X_LENGTHS,
    Y_LENGTHS,
    dense_plan,
    make_batch,
    make_model,
    tokens,
)
from training.state import OptimizerConfig


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, x, y, target, x_length, y_length):
    model = nnx.merge(graph, params)
    transported, logits = model(x, y, target, x_length, y_length)
    told = {name: value for name, value in transported._asdict().items() if value is not None}
    return told | {"logits": logits, "plan": dense_plan(model, x, y, x_length, y_length)}


def forward(model: Aligner, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = ("x_seen", "y", "target", "x_length", "y_length")
    return jax.device_get(_forward(*nnx.split(model), *(jnp.asarray(batch[name]) for name in names)))


def test_certificates_are_those_of_the_plans_that_are_applied():
    model, batch = make_model(SPECS["dustbin"]), make_batch()
    pair = tuple(jnp.asarray(batch[name]) for name in ("x", "y", "x_length", "y_length"))
    certificates = model.certificates(*pair)
    assert list(certificates) == ["self-attention 1", "plan"]
    transported, _ = model(pair[0], pair[1], jnp.asarray(batch["target"]), *pair[2:])
    np.testing.assert_allclose(certificates["plan"].residual[:, 0], transported.residual, rtol=1e-5)
    attend = model.encoder.blocks[1]
    h_y = model.encoder.blocks[0](model.encoder.embed(pair[1]), (pair[1] != vocab.PAD)[..., None].astype(float))
    alone = attention.certify(attend.attention.inputs(attend.norm(h_y), pair[3]))
    np.testing.assert_allclose(certificates["self-attention 1"].residual[4:], alone.residual, rtol=1e-4, atol=1e-6)
    assert alone.residual.shape == (4, SMALL.heads)


@functools.partial(jax.jit, static_argnums=0)
def _sums(graph, params, batch):
    return objectives.sums(nnx.merge(graph, params), batch)


def sums_of(model: Aligner, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return jax.device_get(_sums(*nnx.split(model), {name: jnp.asarray(value) for name, value in batch.items()}))


@pytest.fixture(scope="module", params=SPECS)
def model(request) -> Aligner:
    return make_model(SPECS[request.param])


@pytest.fixture(scope="module")
def whole(model) -> dict[str, np.ndarray]:
    return forward(model, make_batch())


def unpadded(result: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the entries of residues, pair after pair."""
    parts = []
    for n, (rows, columns) in enumerate(zip(X_LENGTHS, Y_LENGTHS, strict=True)):
        parts += [result[name][n, :rows] for name in ("logits", "values", "mass", "barycenter", "log_target")]
        parts += [result["plan"][n, :rows, :columns], result["residual"][n]]
    return parts


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_length_and_content_of_padding_do_not_matter(model, whole):
    """Padded alike, both sequences are encoded in one pass; padded differently, as here, in two."""
    batch, padded = make_batch(), (24, 27)
    rng = np.random.default_rng(1)
    for name, length, lengths in zip(("x_seen", "y"), padded, (X_LENGTHS, Y_LENGTHS), strict=True):
        wider = np.pad(batch[name], ((0, 0), (0, length - 20)))
        junk = rng.integers(0, vocab.SIZE, wider.shape, dtype=np.int32)
        batch[name] = np.where(np.arange(length) < lengths[:, None], wider, junk)
    batch["target"] = np.pad(batch["target"], ((0, 0), (0, padded[0] - 20)), constant_values=-1)
    assert_same(unpadded(forward(model, batch)), unpadded(whole))


def test_pairs_of_a_batch_do_not_see_each_other(model, whole):
    order = np.array([2, 0, 3, 1])
    shuffled = forward(model, {name: value[order] for name, value in make_batch().items()})
    for name, value in shuffled.items():
        np.testing.assert_allclose(value, whole[name][order], rtol=1e-4, atol=2e-5, err_msg=name)


def test_x_reaches_its_reconstruction_through_the_plan_alone():
    """Where one residue is to choose from, every x_i gets it whole: nothing of x is left in the logits."""
    model = make_model(SinkhornSpec(base_steps=4, band=None))
    batch = make_batch() | {"y_length": np.ones(4, np.int32), "target": np.full((4, 20), -1, np.int32)}
    batch["y"] = np.where(np.arange(20) < 1, batch["y"], vocab.PAD)
    result = forward(model, batch)
    other = forward(model, batch | {"x_seen": np.where(batch["x"] > 0, batch["x"] % 20 + 1, 0)})
    first = result["logits"][:, :1]
    for n, length in enumerate(X_LENGTHS):
        np.testing.assert_allclose(result["logits"][n, :length], np.broadcast_to(first[n], (length, 20)), atol=1e-5)
        np.testing.assert_allclose(other["logits"][n, :length], result["logits"][n, :length], atol=1e-5)
    elsewhere = forward(model, batch | {"y": np.where(batch["y"] > 0, batch["y"] % 20 + 1, 0)})
    assert np.abs(elsewhere["logits"] - result["logits"])[:, 0].max() > 1e-2, "the logits do not even depend on y"


def test_a_masked_residue_does_not_tell_what_it_was(model):
    x = jnp.asarray(make_batch()["x"])
    key = jax.random.key(3)
    seen, asked = objectives.queries(x, key, 0.3)
    renamed, asked_again = objectives.queries(jnp.where(asked, x % 20 + 1, x), key, 0.3)
    assert asked.any() and (asked == asked_again).all()
    np.testing.assert_array_equal(seen, renamed)
    np.testing.assert_array_equal(seen, np.where(asked, vocab.MASK, x))
    assert not (asked & (x == vocab.PAD)).any()


def test_every_residue_is_asked_for_where_nothing_is_masked():
    x = jnp.asarray(make_batch()["x"])
    seen, asked = objectives.queries(x, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(seen, x)
    np.testing.assert_array_equal(asked, x != vocab.PAD)


def test_the_share_of_masked_residues():
    _, asked = objectives.queries(jnp.ones((100, 200), jnp.int32), jax.random.key(0), 0.15)
    assert float(asked.mean()) == pytest.approx(0.15, abs=0.01)  # 4 standard errors


def test_what_is_streamed_agrees_with_the_dense_plan(whole):
    target = make_batch()["target"]
    for n, (rows, columns) in enumerate(zip(X_LENGTHS, Y_LENGTHS, strict=True)):
        plan = whole["plan"][n, :rows, :columns].astype(np.float64)
        mass = plan.sum(-1)
        np.testing.assert_allclose(whole["mass"][n, :rows], mass, rtol=1e-4)
        np.testing.assert_allclose(whole["barycenter"][n, :rows], plan @ np.arange(columns) / mass, rtol=1e-4)
        at_target = np.where(target[n, :rows] >= 0, plan[np.arange(rows), target[n, :rows]], 0)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(whole["log_target"][n, :rows], np.log(at_target), rtol=1e-4, atol=1e-4)
    inside = np.isfinite(whole["log_target"])
    assert inside.any() and (~inside & (target >= 0)).any(), "targets must lie on both sides of the band's edge"


def test_metrics_while_training_are_those_of_the_evaluation(model, whole):
    batch = make_batch()
    sums = sums_of(model, batch)
    for n, (rows, columns) in enumerate(zip(X_LENGTHS, Y_LENGTHS, strict=True)):
        pair = Pair(batch["x"][n, :rows], batch["y"][n, :columns], batch["target"][n, :rows])
        plan = whole["plan"][n, :rows, :columns]
        score = metrics.score_plan("family", pair, plan, np.full(rows, -1, np.int32))
        assert sums["sparse_ce/count"][n] == sums["barycenter_mae/count"][n] == score.aligned
        assert sums["sparse_ce"][n] == pytest.approx(score.cross_entropy, rel=1e-4)
        assert sums["barycenter_mae"][n] == pytest.approx(score.abs_error, rel=1e-4)
        assert sums["barycenter_within_1"][n] == score.within_1


def test_reconstruction_counts_asked_residues_of_the_twenty(model, whole):
    batch = make_batch()
    x = batch["x"].copy()
    x[:, 4] = vocab.X
    asked = (np.arange(20) % 3 == 1) & (x != vocab.PAD)
    sums = sums_of(model, batch | {"x": x, "query_mask": asked})
    known = asked & (x != vocab.X)
    log_probability = np.asarray(jax.nn.log_softmax(whole["logits"]))
    nats = -np.take_along_axis(log_probability, np.clip(x - 1, 0, 19)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(sums["reconstruction/count"], known.sum(-1))
    np.testing.assert_allclose(sums["reconstruction"], np.where(known, nats, 0).sum(-1), rtol=1e-4)
    assert known.sum() < asked.sum()


def test_the_prior_adds_log_odds_of_substitution_to_the_scores():
    """log P = S + f_i + g_j: what is left of a difference without row and column means is a difference of scores."""
    spec = SinkhornSpec(epsilon=0.5, base_steps=4, band=None)
    full = np.full(4, 20, np.int32)
    batch = make_batch() | {"x_length": full, "y_length": full}
    rng = np.random.default_rng(5)
    batch |= {"x_seen": tokens(rng, full, 20), "y": tokens(rng, full, 20)}
    arguments = [jnp.asarray(batch[name]) for name in ("x_seen", "y", "x_length", "y_length")]
    # Both draw the same initial parameters: the prior's weight is no random one.
    models = (make_model(spec, substitution_prior=p) for p in (False, True))
    plain, prior = (np.asarray(dense_plan(model, *arguments)) for model in models)
    expected = math.log(2) / 2 * vocab.blosum62()[batch["x_seen"][:, :, None], batch["y"][:, None, :]]
    difference = np.log(prior) - np.log(plain)
    np.testing.assert_allclose(_centred(difference), _centred(expected), atol=2e-3)


def _centred(scores):
    return scores - scores.mean(1, keepdims=True) - scores.mean(2, keepdims=True) + scores.mean((1, 2), keepdims=True)


@pytest.mark.parametrize("band", [5, None])
def test_antidiagonals_hold_the_plan(band):
    spec, batch = SinkhornSpec(base_steps=4, band=band, dustbin="full"), make_batch()
    model = make_model(spec)
    arguments = [jnp.asarray(batch[name]) for name in ("x", "y", "x_length", "y_length")]
    lanes = attention.by_antidiagonals(model.banded_plan(*arguments), 20)
    expected = dense_plan(model, *arguments)
    np.testing.assert_allclose(pair_hmm.unskewed(lanes, 20), expected, rtol=1e-4, atol=1e-6)
    assert float(lanes.sum()) == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AlignerConfig(width=0), r"model\.width=0"),
        (lambda: AlignerConfig(depth=-1), r"model\.depth=-1"),
        (lambda: AlignerConfig(refinement=-1), r"model\.refinement=-1"),
        (lambda: AlignerConfig(plan_width=6), r"model\.plan_width=6.*multiple of 4"),
        (lambda: AlignerConfig(dtype="float16"), r"model\.dtype='float16'.*bfloat16"),
        (lambda: make_model(SPECS["balanced"], heads=3), r"model\.heads=3.*model\.width=16"),
        (lambda: LossConfig(reconstruction=0.0), r"loss\.reconstruction=0\.0.*loss\.sparse_ce=0\.0"),
        (lambda: AlignerConfig(plan_gain=0.0), r"model\.plan_gain=0\.0"),
        (lambda: AlignerConfig(residual_scale=0.0), r"model\.residual_scale=0\.0"),
        (lambda: LossConfig(sparse_ce=-1.0), r"loss\.sparse_ce=-1\.0"),
        (lambda: LossConfig(mask_rate=1.0), r"loss\.mask_rate=1\.0"),
        (lambda: OptimizerConfig(accumulate=0), r"optimizer\.accumulate=0"),
        (lambda: OptimizerConfig(ema=1.0), r"optimizer\.ema=1\.0"),
        (lambda: OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate=0\.0"),
        (lambda: OptimizerConfig(clip_norm=-1.0), r"clip_norm=-1\.0"),
        (lambda: SinkhornSpec(epsilon=-1.0), r"epsilon=-1\.0"),
    ],
)
def test_a_setting_out_of_range_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("kind", [AlignerConfig, LossConfig, OptimizerConfig, SinkhornSpec])
def test_a_misspelt_setting_is_named(kind):
    with pytest.raises(TypeError, match="wdith"):
        kind(wdith=3)
