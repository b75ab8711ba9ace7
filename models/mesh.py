"""Name the axes of a mesh of devices, and find the mesh that a function is traced for."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array

# Devices along "data" share a batch, along "model" matrices and heads, along "sequence" the places of each sequence.
DATA, MODEL, SEQUENCE = "data", "model", "sequence"


def current() -> AbstractMesh | None:
    """Return the mesh of the function being traced, or None where there is none or it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shares() -> int:
    """Return the number of devices that share the places of a sequence, in the mesh of the function being traced."""
    mesh = current()
    return mesh.shape.get(SEQUENCE, 1) if mesh else 1


def with_neighbours(x: Array, reach: int) -> Array:
    """Add the nearest `reach` places of both neighbours to a device's share `[batch, places, ...]`; zeros at the ends.

    For functions that `jax.shard_map` calls. A share must hold at least `reach` places.
    """
    if not reach:
        return x
    devices = jax.lax.axis_size(SEQUENCE)
    forward = [(n, n + 1) for n in range(devices - 1)]
    before = jax.lax.ppermute(x[:, -reach:], SEQUENCE, forward)
    after = jax.lax.ppermute(x[:, :reach], SEQUENCE, [(b, a) for a, b in forward])
    return jnp.concatenate([before, x, after], axis=1)
