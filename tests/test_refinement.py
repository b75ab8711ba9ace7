"""models/refinement.py: votes are sums along diagonals, and change nothing before any training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import refinement
from models.aligner import Aligner, AlignerConfig
from ot_attention import SinkhornSpec
from tests.support.small_aligner import dense_plan

SPEC = SinkhornSpec(base_steps=4, band=None, dustbin="full")
SMALL = AlignerConfig(width=16, depth=1, attention_every=0, plan_width=8, value_width=8)
X_LENGTHS, Y_LENGTHS = jnp.array([20, 13]), jnp.array([18, 20])


def make_model(**changes) -> Aligner:
    return Aligner(AlignerConfig(**(vars(SMALL) | changes)), SPEC, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _plan(graph, params, *pair):
    return dense_plan(nnx.merge(graph, params), *pair)


def plan_of(model: Aligner, *pair) -> jax.Array:
    return _plan(*nnx.split(model), *pair)


def tokens(seed: int, length: int = 20) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(1, 21, (2, length), dtype=np.int32))


@pytest.mark.parametrize("reach", [0, 2, 8])
def test_a_vote_is_the_sum_of_the_plan_near_the_diagonal(reach):
    """The formula of the module, cell by cell, on a plan that is no function of j - i."""
    rows, columns = 11, 14
    plan = np.random.default_rng(0).random((rows, columns)) ** 4
    wave_x, wave_y = (refinement.waves(jnp.arange(n)[None]) for n in (rows, columns))
    brought = jnp.asarray(plan, jnp.float32) @ wave_y
    near = refinement.nearby_mean(refinement.turn(brought, wave_x, back=True), jnp.ones((1, rows, 1)), reach)
    votes = refinement.turn(near, wave_x)[0] @ wave_y[0].T
    frequency = np.geomspace(np.pi / 128, np.pi, 24)
    i, j = np.mgrid[:rows, :columns]
    for row, column in ((0, 0), (5, 9), (10, 2)):
        kernel = np.cos(frequency * ((j - i) - (column - row))[..., None]).sum(-1)
        window = np.abs(np.arange(rows) - row) <= reach
        expected = (plan * kernel)[window].sum() / window.sum()
        assert float(votes[row, column]) == pytest.approx(expected, abs=1e-3)


def test_rows_of_padding_have_no_vote():
    real = (jnp.arange(9) < 6)[None, :, None].astype(jnp.float32)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 3)), jnp.float32)
    near = refinement.nearby_mean(z, real, 2)
    np.testing.assert_allclose(near[0, 5], z[0, 3:6].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(near[0, 6:], 0)
    np.testing.assert_allclose(refinement.nearby_mean(z.at[:, 6:].set(1e6), real, 2), near, rtol=1e-5)


def test_before_training_the_second_plan_is_the_first():
    x, y = tokens(1), tokens(2)
    once, twice = (plan_of(make_model(refinement=n), x, y, X_LENGTHS, Y_LENGTHS) for n in (0, 2))
    np.testing.assert_allclose(once, twice, atol=1e-5)


def test_votes_sharpen_a_shifted_copy():
    """y is x without its first residues; equal weights of all votes favour the diagonal that most residues share."""
    model, x = make_model(refinement=1, positions=False, substitution_prior=True), tokens(3, 40)
    y, lengths = x[:, 7:], (jnp.array([40, 40]), jnp.array([33, 33]))
    rows = np.arange(7, 40)
    before = plan_of(model, x, y, *lengths)[:, rows, rows - 7]
    bias = model.votes.weights.bias
    model.votes.weights.bias.set_value(jnp.full_like(bias[...], 0.2))
    after = plan_of(model, x, y, *lengths)[:, rows, rows - 7]
    assert float(after.mean()) > float(before.mean()) + 0.1


def test_every_parameter_of_the_votes_learns():
    """Parameters before the zero weights learn only once these weights have moved."""
    model = make_model(refinement=1)
    model.votes.weights.kernel.set_value(jnp.full_like(model.votes.weights.kernel[...], 0.1))
    model.votes.query.kernel.set_value(jnp.full_like(model.votes.query.kernel[...], 0.1))
    graph, params = nnx.split(model)
    x, y, target = tokens(1), tokens(2), jnp.broadcast_to(jnp.arange(20), (2, 20)) % 15

    def loss(params):
        transported, _ = nnx.merge(graph, params)(x, y, target, X_LENGTHS, Y_LENGTHS)
        return jnp.where(jnp.isfinite(transported.log_target), transported.log_target, 0).sum()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)["votes"]):
        assert np.isfinite(gradient[...]).all() and np.abs(gradient[...]).max() > 0, path


def test_without_positions_a_plan_does_not_know_where_it_is():
    """Equal residues everywhere: only positions could tell the columns apart.

    Columns near the ends are left out: the encoder's convolutions see the ends 2 residues away.
    """
    x = jnp.ones((1, 20), jnp.int32)
    length = (jnp.array([20]), jnp.array([20]))
    for positions in (True, False):
        plan = plan_of(make_model(positions=positions), x, x, *length)[0, 4:16, 4:16]
        assert (float(np.ptp(plan)) > 1e-3) == positions
