"""A small aligner, a batch that it takes, and a trainer of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data import vocab
from models.aligner import Aligner, AlignerConfig
from models.objectives import AlignmentObjective, LossConfig
from ot_attention import SinkhornSpec, transport_plan
from training.state import OptimizerConfig, Trainer

SMALL = AlignerConfig(width=16, depth=1, heads=2, attention_every=1, plan_width=8, value_width=8)
SPECS = {
    "balanced": SinkhornSpec(base_steps=4, band=5),
    "dustbin": SinkhornSpec(base_steps=4, band=5, dustbin="full"),
}


X_LENGTHS, Y_LENGTHS = np.array([20, 13, 17, 12], np.int32), np.array([18, 20, 12, 15], np.int32)


def make_model(spec: SinkhornSpec, **changes) -> Aligner:
    """A model of small widths whose plan is far from uniform, as a trained one's is."""
    model = Aligner(AlignerConfig(**(vars(SMALL) | changes)), spec, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    params["plan_projection"]["kernel"] *= 2.0
    return nnx.merge(graph, params)


def dense_plan(model: Aligner, x, y, x_length, y_length) -> jax.Array:
    """The plan over residues by the reference route."""
    (given,) = model.attention_inputs(x, y, x_length, y_length)["plan"]
    plan = transport_plan(given.q, given.k, given.spec, *given.lengths, dustbin_score=given.dustbin_score)
    return plan[:, 0, : x.shape[1], : y.shape[1]]


def tokens(rng: np.random.Generator, lengths: np.ndarray, padded: int) -> np.ndarray:
    drawn = rng.integers(1, 21, (len(lengths), padded), dtype=np.int32)
    return np.where(np.arange(padded) < lengths[:, None], drawn, vocab.PAD)


def make_batch(padded: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pairs; targets rise, and some lie outside the band."""
    rng = np.random.default_rng(seed)
    target = np.full((4, padded), -1, np.int32)
    for row, x_length, y_length in zip(target, X_LENGTHS, Y_LENGTHS, strict=True):
        aligned = min(x_length, y_length) - 3
        row[np.sort(rng.choice(x_length, aligned, replace=False))] = np.sort(
            rng.choice(y_length, aligned, replace=False)
        )
    x, y = tokens(rng, X_LENGTHS, padded), tokens(rng, Y_LENGTHS, padded)
    target[0, :2], target[0, 2:4] = -1, (13, 15)
    batch = {"x": x, "y": y, "target": target, "x_length": X_LENGTHS, "y_length": Y_LENGTHS}
    return batch | {"x_seen": x, "query_mask": x != vocab.PAD}


def make_trainer(model=SMALL, loss_config=None, **settings):
    # Warm-up begins at a rate of 0; without it the first update already changes something.
    optimizer = OptimizerConfig(**({"warmup_steps": 0} | settings))
    loss_config = loss_config or LossConfig(sparse_ce=0.5)
    trainer = Trainer.create(
        AlignmentObjective(model, SPECS["dustbin"], loss_config), optimizer, total_steps=10, seed=1
    )
    return trainer, trainer.initial()


def training_batch() -> dict[str, jax.Array]:
    batch = make_batch()
    return {name: jnp.asarray(batch[name]) for name in ("x", "y", "target", "x_length", "y_length")}
