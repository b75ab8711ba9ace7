"""Models whose Sinkhorn layers were compiled: maps of `scripts/compile_asap.py` on disk and in a model's structure."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from alignment import weights
from models.attention import Asap, AsapPotentials


def save(path: Path, maps: Mapping[str, Asap], params: PyTree, step: int, provenance: Mapping[str, Any]) -> None:
    """Writes the maps by layer into one safetensors file. `params`: those that they were fitted to."""
    layers = {layer: {"features": of.features, "two_sided": of.two_sided} for layer, of in maps.items()}
    config = {"layers": layers, "params": fingerprint(params), "provenance": dict(provenance)}
    arrays = {layer: {"directions": of.directions, "weights": of.weights} for layer, of in maps.items()}
    weights.save(path, arrays, config, step)


def load(path: Path, params: PyTree) -> dict[str, Asap]:
    """The maps of a file, by layer.

    Raises:
      ValueError: no such file, or one that was fitted to other parameters.
      FileNotFoundError: no file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; write it with scripts/compile_asap.py")
    config, _ = weights.read_config(path)
    if "layers" not in config:
        raise ValueError(f"{path} holds no compiled layers but a model; write them with scripts/compile_asap.py")
    if config["params"] != fingerprint(params):
        raise ValueError(
            f"{path} was fitted to other parameters than those given (of {json.dumps(config['provenance'])}): compile "
            "these with scripts/compile_asap.py"
        )
    arrays = jax.tree.map(jnp.asarray, weights.load_by_layer(path))
    return {
        layer: Asap(**arrays[layer], features=tuple(of["features"]), two_sided=of["two_sided"])
        for layer, of in config["layers"].items()
    }


def into(graph: nnx.GraphDef, params: PyTree, maps: Mapping[str, Asap]) -> nnx.GraphDef:
    """The structure with these layers compiled; parameters stay what they were.

    Raises ValueError for layers that the model has not.
    """
    model = nnx.merge(graph, params)
    layers = model.layers()
    if unknown := sorted(maps.keys() - layers.keys()):
        raise ValueError(f"the model has no {', '.join(unknown)}; it has {', '.join(layers)}")
    for layer, of in maps.items():
        layers[layer].implementation = AsapPotentials(of)
    return nnx.graphdef(model)


def fingerprint(params: PyTree) -> str:
    """Of names and values."""
    digest = hashlib.sha256()
    for keys, array in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(keys).encode() + np.asarray(array).tobytes())
    return digest.hexdigest()
