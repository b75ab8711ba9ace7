"""What a run has to remember, parameters, optimiser, moving average, step, and how it is updated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from models import objectives
from models.mesh import DATA
from models.mesh import current as current_mesh
from models.objectives import Objective
from training import sharding


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`: AdamW with linear warm-up and cosine decay to `final_fraction` of the rate.

    accumulate: parts a batch is cut into, one after the other, for batches that do not fit into memory at once.
    ema: decay of the moving average of the parameters, which is what is evaluated.
    """

    learning_rate: float = 2e-3
    warmup_steps: int = 50
    final_fraction: float = 0.02
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    ema: float = 0.99
    accumulate: int = 1

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"optimizer.accumulate={self.accumulate} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"optimizer.ema={self.ema} must be at least 0 and below 1")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(
                f"optimizer.learning_rate={self.learning_rate} and clip_norm={self.clip_norm} must be above 0"
            )

    def schedule(self, total_steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, total_steps - 1)
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else self.learning_rate,
            self.learning_rate,
            warmup,
            total_steps,
            self.learning_rate * self.final_fraction,
        )


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    optimizer: PyTree


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The model's structure and the update rule: what is fixed while `TrainState` changes. Hashable by identity."""

    initial: Callable[[], TrainState]  # pure; `initial_state` computes it
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    settings: OptimizerConfig
    objective: Objective
    seed: int

    @classmethod
    def create(cls, objective: Objective, settings: OptimizerConfig, *, total_steps: int, seed: int) -> "Trainer":
        schedule = settings.schedule(total_steps)
        optimizer = optax.chain(
            optax.clip_by_global_norm(settings.clip_norm),
            optax.adamw(schedule, b2=0.98, weight_decay=settings.weight_decay, mask=_is_matrix),
        )

        def make_model() -> nnx.Module:
            return objective.make(nnx.Rngs(seed))

        def initial() -> TrainState:
            params = nnx.to_pure_dict(nnx.state(make_model()))
            return TrainState(jnp.array(0, jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))

        graph = nnx.graphdef(nnx.eval_shape(make_model))
        return cls(initial, graph, optimizer, schedule, settings, objective, seed)

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state on a mesh, whose devices need not be there."""
        state = jax.eval_shape(self.initial)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            sharding.shardings(state, mesh),
        )

    def initial_state(self, mesh: Mesh) -> TrainState:
        """Computed where it lies; the random numbers in it do not depend on the mesh."""
        return jax.jit(self.initial, out_shardings=_shardings(self.abstract_state(mesh)))()

    def compiled_update(self, mesh: Mesh) -> jax.stages.Wrapped:
        """`update` on a mesh. The state given is used up; the metrics are on all devices.

        It can be lowered from `abstract_state` and `abstract_batch` for devices that are not there.
        """
        state = _shardings(self.abstract_state(mesh))
        return jax.jit(
            sharding.on(mesh, self.update),
            in_shardings=(state, sharding.by_example(mesh)),
            out_shardings=(state, sharding.everywhere(mesh)),
            donate_argnums=0,
        )

    def compiled_evaluation(
        self, evaluate: Callable, mesh: Mesh
    ) -> Callable[[PyTree, Mapping[str, np.ndarray]], PyTree]:
        """`evaluate(params, batch)` on a mesh: every process gives the whole batch and gets the whole result."""
        params = _shardings(self.abstract_state(mesh).params)
        compiled = jax.jit(
            sharding.on(mesh, evaluate),
            in_shardings=(params, sharding.by_example(mesh)),
            out_shardings=sharding.everywhere(mesh),
        )
        return lambda params, batch: jax.device_get(compiled(params, sharding.from_whole(batch, mesh)))

    def model(self, params: PyTree) -> Any:
        return nnx.merge(self.graph, params)

    def update(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One step: the new state and scalar metrics of the batch before the update.

        Where loss, gradient or new parameters are not finite, the metric `finite` is 0 and only counts of steps change.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        grads, totals = self._gradients(state.params, self.objective.augment(batch, key))
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average forgets faster, or the initial parameters would stay in it for 1 / (1 - ema) steps.
        decay = jnp.minimum(self.settings.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = objectives.means(totals) | {
            "loss": self.objective.value(totals),
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": self.schedule(state.step),
            "residues": self.objective.residues(batch),
        }
        # Squares of a gradient whose norm is finite are finite, and so are the moments of the optimiser.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"]) & _is_finite(params)
        new = TrainState(state.step + 1, params, ema, optimizer)
        return jax.tree.map(functools.partial(_unless_count, finite), new, state), metrics | {
            "finite": finite.astype(jnp.float32)
        }

    def _gradients(self, params: PyTree, batch: dict[str, Array]) -> tuple[PyTree, dict[str, Float[Array, ""]]]:
        """Gradient of the loss and sums of the metrics over the batch, part by part."""
        counts = self.objective.counts(batch)

        def part_loss(params, part):
            totals = self.objective.totals(self.model(params), part)
            return self.objective.value(totals | counts), totals

        gradient = jax.grad(part_loss, has_aux=True)
        parts, mesh = self.settings.accumulate, current_mesh()
        groups = mesh.shape[DATA] if mesh else 1
        if len(batch["x"]) % (parts * groups):
            times = f" times mesh.data={groups}" if mesh else ""
            of = f"the batch of {len(batch['x'])} examples"
            raise ValueError(f"optimizer.accumulate={parts}{times} must divide {of}")
        # Every so many pairs, so that devices which share a batch share each part.
        batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), batch)
        # Not a loop of JAX: on CPUs XLA takes 80 times as long for a convolution's weight gradient inside one.
        done = gradient(params, jax.tree.map(lambda x: x[:, 0], batch))
        for n in range(1, parts):
            params, done = jax.lax.optimization_barrier((params, done))  # or all parts would be in memory at once
            part = jax.tree.map(lambda x: x[:, n], batch)  # noqa: B023
            done = jax.tree.map(jnp.add, done, gradient(params, part))
        return done


def abstract_batch(batch_size: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `Trainer.update` reads of a batch of the pipeline, padded to `length`, as shapes on a mesh."""
    shapes = {"x": (length,), "y": (length,), "x_length": (), "y_length": (), "target": (length,)}
    placed = sharding.by_example(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *of_one), jnp.int32, sharding=placed) for name, of_one in shapes.items()
    }


def _shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)


def _is_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _unless_count(finite: Bool[Array, ""], new: Array, old: Array) -> Array:
    """The new value if all is finite; counts of steps, of the schedule for one, go on in any case."""
    return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new


def _is_matrix(params: PyTree) -> PyTree:
    """Weight decay leaves biases, norms and single scores alone."""
    return jax.tree.map(lambda x: x.ndim > 1, params)
