"""Save and load trained weights: one safetensors file, parameters by dotted name, the configuration in the header."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from data import files


def save(path: Path, params: PyTree, config: dict[str, Any], step: int) -> None:
    """Write the file, which appears when it is finished, and its folder if there is none."""
    header = {"config": json.dumps(config), "step": str(step)}
    arrays = {name: np.asarray(array) for name, array in named(params).items()}
    with files.finished(path, "wb") as file:
        file.write(safetensors.numpy.save(arrays, metadata=header))


def read_config(path: Path) -> tuple[dict[str, Any], int]:
    """Read configuration and step of the run that made the weights. Raises ValueError if `save` did not write them."""
    header = _open(path).metadata() or {}
    if not {"config", "step"} <= header.keys():
        raise ValueError(f"{path} has no configuration in its header; write it with scripts/export_weights.py")
    try:
        config, step = json.loads(header["config"]), int(header["step"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); take it from its source again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} has a header whose configuration is no table; take it from its source again")
    return config, step


def load(path: Path, like: PyTree) -> PyTree:
    """Load parameters in the structure of `like`. Raises ValueError if names or shapes differ."""
    file = _open(path)
    wanted = {name: np.shape(array) for name, array in named(like).items()}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(f"{path} does not fit the model of its configuration: {', '.join(wrong)} differ")
    return jax.tree.map_with_path(lambda keys, _: file.get_tensor(name_of(keys)), like)


def load_by_layer(path: Path) -> dict[str, dict[str, Any]]:
    """Load all arrays by layer and name: `a.b.c` is array `c` of layer `a.b`."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in load_all(path).items():
        layer, _, of_layer = name.rpartition(".")
        found.setdefault(layer, {})[of_layer] = array
    return found


def load_all(path: Path) -> dict[str, np.ndarray]:
    """Load all arrays by their dotted names."""
    file = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(path: Path):
    with path.open("rb"):  # whose errors name the file
        pass
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from error


def named(params: PyTree) -> dict[str, Any]:
    """Return the arrays of a tree by their dotted names."""
    return {name_of(keys): array for keys, array in jax.tree.leaves_with_path(params)}


def name_of(keys: Any) -> str:
    """Return the dotted name of a place in a tree."""
    return ".".join(str(key.key) for key in keys)
