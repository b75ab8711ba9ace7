"""Save and load the ASAP maps of `scripts/compile_asap.py`, and put them in place of a model's Sinkhorn layers."""

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

from models import weights
from models.attention import Asap, AsapPotentials


def save(path: Path, maps: Mapping[str, Asap], params: PyTree, step: int, provenance: Mapping[str, Any]) -> None:
    """Write the maps that were fitted to `params`, by layer, and their provenance into one safetensors file."""
    layers = {layer: {"features": of.features, "two_sided": of.two_sided} for layer, of in maps.items()}
    config = {"layers": layers, "params": fingerprint(params), "provenance": dict(provenance)}
    arrays = {layer: {"directions": of.directions, "weights": of.weights} for layer, of in maps.items()}
    weights.save(path, arrays, config, step)


def load(path: Path, params: PyTree) -> dict[str, Asap]:
    """Load the maps of a file, by layer.

    Raises FileNotFoundError, or ValueError if it is not a file of `save` or was fitted to other parameters.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; write it with scripts/compile_asap.py")
    config, _ = weights.read_config(path)
    if "layers" not in config:
        raise ValueError(f"{path} holds no compiled layers but a model; write them with scripts/compile_asap.py")
    if config.get("params") != fingerprint(params):
        provenance = json.dumps(config.get("provenance"))
        raise ValueError(
            f"{path} was fitted to other parameters than the given ones ({provenance}): compile "
            "these with scripts/compile_asap.py"
        )
    arrays = jax.tree.map(jnp.asarray, weights.load_by_layer(path))
    try:
        return {
            layer: Asap(**arrays[layer], features=tuple(of["features"]), two_sided=of["two_sided"])
            for layer, of in config["layers"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); write it again with scripts/compile_asap.py") from error


def into(graph: nnx.GraphDef, params: PyTree, maps: Mapping[str, Asap]) -> nnx.GraphDef:
    """Return the structure of the model with maps in place of layers; it fits the same parameters.

    Raises ValueError if the model lacks one of the layers.
    """
    model = nnx.merge(graph, params)
    layers = model.layers()
    if unknown := sorted(maps.keys() - layers.keys()):
        raise ValueError(f"the model has no {', '.join(unknown)}; it has {', '.join(layers)}")
    for layer, of in maps.items():
        layers[layer].implementation = AsapPotentials(of)
    return nnx.graphdef(model)


def fingerprint(params: PyTree) -> str:
    """Return a hash of the names and values."""
    digest = hashlib.sha256()
    for keys, array in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(keys).encode() + np.asarray(array).tobytes())
    return digest.hexdigest()
