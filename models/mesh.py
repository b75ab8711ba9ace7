"""Name the axes of a mesh of devices, and find the mesh that a function is traced for."""

import jax
from jax.sharding import AbstractMesh

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
