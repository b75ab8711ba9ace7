"""The state of a run (step, parameters, their moving average, optimiser) and the update of a training step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from data.settings import Integer, Number, Section
from models import objectives
from models.mesh import DATA
from models.mesh import current as current_mesh
from models.objectives import Objective
from training import sharding


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """`config.optimizer`, which configs/base.py describes."""

    name: ClassVar[str] = "optimizer"

    learning_rate: Annotated[float, Number(open_least=True)] = 2e-3
    warmup_steps: Annotated[int, Integer()] = 50
    final_fraction: Annotated[float, Number(0.0, 1.0)] = 0.02
    weight_decay: Annotated[float, Number()] = 1e-3
    clip_norm: Annotated[float, Number()] = 1.0
    ema: Annotated[float, Number(0.0, 1.0, open_most=True)] = 0.99
    accumulate: Annotated[int, Integer(1, 1 << 24)] = 1

    def schedule(self, total_steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, total_steps - 1)
        peak, start = self.learning_rate, 0.0 if warmup else self.learning_rate
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, total_steps, peak * self.final_fraction)


Evaluation = Callable[[PyTree, Mapping[str, np.ndarray]], PyTree]  # parameters, batch -> result


class TrainState(NamedTuple):
    """Everything that an update changes, and a checkpoint holds."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    optimizer: PyTree


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Structure of the model and rule of the update, fixed while `TrainState` changes."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    settings: OptimizerConfig
    objective: Objective
    seed: int

    @classmethod
    def create(cls, objective: Objective, settings: OptimizerConfig, *, total_steps: int, seed: int) -> "Trainer":
        def is_matrix(params):  # weight decay shrinks no biases, norms and single scores
            return jax.tree.map(lambda x: x.ndim > 1, params)

        schedule = settings.schedule(total_steps)
        optimizer = optax.chain(
            optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
            optax.adamw(schedule, b2=0.98, weight_decay=settings.weight_decay, mask=is_matrix),
        )
        graph = nnx.graphdef(nnx.eval_shape(lambda: objective.make(nnx.Rngs(seed))))
        return cls(graph, optimizer, schedule, settings, objective, seed)

    def initial(self) -> TrainState:
        """Compute the state before training on one device."""
        params = nnx.to_pure_dict(nnx.state(self.objective.make(nnx.Rngs(self.seed))))
        return TrainState(jnp.array(0, jnp.int32), params, jax.tree.map(jnp.copy, params), self.optimizer.init(params))

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Return shapes, dtypes and shardings of the state on a mesh, whose devices need not exist."""
        state = jax.eval_shape(self.initial)
        placed = sharding.shardings(state, mesh)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, placed)

    def initial_state(self, mesh: Mesh) -> TrainState:
        """Compute the initial state on the devices that hold it; its random numbers do not depend on the mesh."""
        return jax.jit(self.initial, out_shardings=_shardings(self.abstract_state(mesh)))()

    def compiled_update(self, mesh: Mesh) -> jax.stages.Wrapped:
        """Compile `update` for a mesh. It consumes the state that it is given; its metrics are on all devices.

        It can be lowered from `abstract_state` and `abstract_batch` for devices that do not exist.
        """
        state = _shardings(self.abstract_state(mesh))
        return jax.jit(
            sharding.on(mesh, self.update),
            in_shardings=(state, sharding.of_batches(mesh)),
            out_shardings=(state, sharding.everywhere(mesh)),
            donate_argnums=0,
        )

    def compiled_evaluation(self, evaluate: Callable, mesh: Mesh) -> Evaluation:
        """Compile `evaluate(params, batch)` for a mesh. Each process passes whole batches and gets whole results."""
        params = _shardings(self.abstract_state(mesh).params)
        compiled = jax.jit(
            sharding.on(mesh, evaluate),
            in_shardings=(params, sharding.of_batches(mesh)),
            out_shardings=sharding.everywhere(mesh),
        )
        return lambda params, batch: jax.device_get(compiled(params, sharding.from_whole(batch, mesh)))

    def model(self, params: PyTree) -> Any:
        return nnx.merge(self.graph, params)

    def update(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """Take one training step; return the new state, and the metrics of the batch before the update.

        If loss, gradient or new parameters are not finite, the metric `finite` is 0 and only counts of steps change.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        grads, totals = self._gradients(state.params, self.objective.augment(batch, key))
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average decays faster, or the initial parameters would stay in it for 1 / (1 - ema) steps.
        decay = jnp.minimum(self.settings.ema, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = objectives.means(totals) | {
            "loss": self.objective.value(totals),
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": self.schedule(state.step),
            "residues": self.objective.residues(batch),
        }
        # A gradient of finite norm has finite squares, so the moments of the optimiser are finite.
        checked = [metrics["loss"], metrics["gradient_norm"], *jax.tree.leaves(params)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in checked]).all()
        new = TrainState(state.step + 1, params, ema, optimizer)
        # Counts of steps are integers, and grow even if the update is left out.
        kept = jax.tree.map(lambda x, old: jnp.where(finite | jnp.issubdtype(x.dtype, jnp.integer), x, old), new, state)
        return kept, metrics | {"finite": finite.astype(jnp.float32)}

    def _gradients(self, params: PyTree, batch: dict[str, Array]) -> tuple[PyTree, dict[str, Float[Array, ""]]]:
        """Compute the gradient of the loss and the totals of the metrics, one part of the batch after the other."""
        counts = self.objective.counts(batch)

        def part_loss(params, part):
            totals = self.objective.totals(self.model(params), part)
            return self.objective.value(totals | counts), totals

        gradient = jax.grad(part_loss, has_aux=True)
        parts, mesh = self.settings.accumulate, current_mesh()
        groups = mesh.shape[DATA] if mesh else 1
        if len(batch["x"]) % (parts * groups):
            asked = f"optimizer.accumulate={parts}" + (f" times mesh.data={groups}" if mesh else "")
            raise ValueError(f"{asked} must divide the batch of {len(batch['x'])} examples")
        # A part holds every `parts`-th example, so that devices which share a batch share each part.
        batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), batch)
        # No loop of JAX: inside one, XLA on CPUs takes 80 times as long for the weight gradient of a convolution.
        done = gradient(params, jax.tree.map(lambda x: x[:, 0], batch))
        for n in range(1, parts):
            params, done = jax.lax.optimization_barrier((params, done))  # or all parts would be in memory at once
            part = jax.tree.map(lambda x: x[:, n], batch)  # noqa: B023
            done = jax.tree.map(jnp.add, done, gradient(params, part))
        return done


def abstract_batch(batch_size: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, on a mesh, of the parts of an alignment batch that `Trainer.update` reads."""
    shapes = {"x": (length,), "y": (length,), "x_length": (), "y_length": (), "target": (length,)}
    placed = sharding.by_example(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.int32, sharding=placed) for name, shape in shapes.items()
    }


def _shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)
