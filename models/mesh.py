"""Name the axes of a mesh of devices, and find the mesh that a function is traced for."""

import jax
from jax.sharding import AbstractMesh

DATA, MODEL = "data", "model"  # devices along "data" share a batch, devices along "model" share matrices and heads


def current() -> AbstractMesh | None:
    """Return the mesh of the function being traced, or None where there is none or it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh
