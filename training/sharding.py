"""Place arrays on several devices: batches are cut over the mesh axes "data" and "sequence", matrices over "model".

XLA's partitioner follows these placements everywhere but in the attention, which each device computes for its part
(models/attention.py).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from data.settings import Integer, Section
from models.mesh import DATA, MODEL, SEQUENCE

# Parameter (layer, name) -> the dimension that is cut over "model". As in Megatron-LM (arXiv 1909.08053) the first
# matrix of a block is cut by outputs, the second by inputs: a block needs one sum over devices, not two exchanges.
# Everything else is whole on all devices: cutting it would send more than it saves.
_CUT = {
    ("mix", "kernel"): -1,  # convolution block
    ("mix", "bias"): -1,
    ("project", "kernel"): -2,  # self-attention, by heads: [width, 3, heads, head width]
    ("dustbin", "_score"): -1,
    ("out", "kernel"): 0,  # both
    ("decoder_in", "kernel"): -1,
    ("decoder_in", "bias"): -1,
    ("decoder_out", "kernel"): 0,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """`config.mesh`, which configs/base.py describes: number of devices along each axis."""

    name: ClassVar[str] = "mesh"

    data: Annotated[int, Integer(1, or_all=True)] = -1
    model: Annotated[int, Integer(1)] = 1
    sequence: Annotated[int, Integer(1)] = 1


def make_mesh(config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of a run of given or all devices. Each process holds neighbouring rows of a batch.

    `batch_size` counts the examples of a step, over all devices. Raises ValueError if there are too few devices, if
    devices of several processes are left over, or if the batch cannot be shared evenly.
    """
    order = _along_the_links if config.sequence > 1 else _by_number
    found = sorted(jax.devices() if devices is None else devices, key=order)
    group = config.model * config.sequence
    data = config.data if config.data != -1 else max(len(found) // group, 1)
    used, processes = data * group, {device.process_index for device in found}
    if used > len(found) or (len(processes) > 1 and used < len(found)):
        asked = f"mesh.data={config.data} times mesh.model={config.model}"
        asked += f" times mesh.sequence={config.sequence}" if config.sequence > 1 else ""
        raise ValueError(
            f"{asked} makes {used} devices, there are {len(found)} in "
            f"{len(processes)} process(es): it must be no more, and all of them if there are several processes"
        )
    if batch_size % data:
        raise ValueError(f"batch_size={batch_size} must be divisible by mesh.data={data}")
    shape = data, config.model, config.sequence
    mesh = Mesh(np.array(found[:used]).reshape(shape), (DATA, MODEL, SEQUENCE))
    for process in processes:
        _rows_of(mesh, process)
    return mesh


def _by_number(device: jax.Device) -> tuple[int, ...]:
    return device.process_index, device.id


def _along_the_links(device: jax.Device) -> tuple[int, ...]:
    """Order the chips of a process row by row, there and back, so that neighbours along an axis share a link."""
    x, y, z = getattr(device, "coords", (device.id, 0, 0))
    return device.process_index, z, y, -x if y % 2 else x


def host_shard(mesh: Mesh) -> tuple[int, int]:
    """Return `shard_index` and `shard_count` of the pipeline: the part of every batch that this process reads.

    Processes whose devices are in the same group read the same part.
    """
    rows = _rows_of(mesh, jax.process_index())
    return rows.start // len(rows), len(mesh.devices) // len(rows)


def _rows_of(mesh: Mesh, process: int) -> range:
    """Return the rows of the mesh with devices of a process. Raises ValueError unless processes cut it evenly."""
    theirs = [n for n, row in enumerate(mesh.devices) if process in {device.process_index for device in row.flat}]
    rows = range(theirs[0], theirs[-1] + 1)
    whole = len({device.process_index for device in mesh.devices[rows.start : rows.stop].flat}) == 1
    if (not whole and len(rows) > 1) or rows.start % len(rows) or len(mesh.devices) % len(rows):
        group = f"mesh.model={mesh.shape[MODEL]}"
        group += f" times mesh.sequence={mesh.shape[SEQUENCE]}" if mesh.shape[SEQUENCE] > 1 else ""
        raise ValueError(f"{group} must divide the number of devices of a process or be a multiple of it")
    return rows


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Place parameters, and trees that hold copies of their tree (average, moments of the optimiser)."""

    def place(path, x):
        names = tuple(getattr(key, "key", None) for key in path[-2:])
        axes: list[str | None] = [None] * x.ndim
        if names in _CUT and x.shape[_CUT[names]] % mesh.shape[MODEL] == 0:
            axes[_CUT[names]] = MODEL
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map_with_path(place, tree)


def by_example(mesh: Mesh) -> NamedSharding:
    """Cut arrays along their first axis, the examples."""
    return NamedSharding(mesh, P(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Keep arrays whole on every device."""
    return NamedSharding(mesh, P())


def of_batches(mesh: Mesh) -> NamedSharding | None:
    """Return how a compiled function places its batch; None for as it is given, which `of_batch` says of each array."""
    return by_example(mesh) if mesh.shape[SEQUENCE] == 1 else None


def of_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Place the arrays of a batch: all are cut by examples, and those of the shape of `x` by places as well."""
    if mesh.shape[SEQUENCE] == 1:
        return dict.fromkeys(batch, by_example(mesh))
    by_place = NamedSharding(mesh, P(DATA, SEQUENCE))
    return {name: by_place if x.shape == batch["x"].shape else by_example(mesh) for name, x in batch.items()}


def abstract(batch: Mapping[str, Any], batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a whole batch on a mesh from any number of its examples."""
    shapes = {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    placed = of_batch(shapes, mesh)
    return {name: x.update(sharding=placed[name]) for name, x in shapes.items()}


def from_hosts(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Make the global batch from the examples that each process has (`host_shard`), with all their places."""
    (_, hosts), placed = host_shard(mesh), of_batch(batch, mesh)
    return {
        name: jax.make_array_from_process_local_data(placed[name], x, (hosts * len(x), *x.shape[1:]))
        for name, x in batch.items()
    }


def from_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Make the global batch, which every process has whole."""
    placed = of_batch(batch, mesh)
    return {name: jax.make_array_from_callback(x.shape, placed[name], x.__getitem__) for name, x in batch.items()}


def on(mesh: Mesh, function: Callable) -> Callable:
    """Wrap a function so that `models.mesh.current()` is the mesh while it is traced."""

    @functools.wraps(function)
    def in_context(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return in_context
