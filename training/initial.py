"""Parameters that a run begins from: those of another run or of a file of weights, as far as they fit its model."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from data import files
from models import weights
from training.checkpoints import newest_average, saved
from training.run_folder import read_config
from training.state import TrainState

RECORD = "init.json"
_SHOWN = 4  # names in a message


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters by dotted name, and where they are from: `--init-from` and a step."""

    place: str
    step: int
    arrays: Mapping[str, np.ndarray]

    @property
    def digest(self) -> str:
        """Hash of names, shapes and values."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(repr((name, array.dtype.str, array.shape)).encode() + array.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Initial:
    """Parameters of a source that replace those of a new run, and the names of all others."""

    source: Source
    sizes: dict[str, int]  # of the arrays of the model
    taken: dict[str, np.ndarray]
    missing: list[str]  # of the model, not in the source
    other_shape: dict[str, list[tuple[int, ...]]]  # in the source, in the model
    left_over: list[str]  # of the source, not in the model

    def into(self, state: TrainState) -> TrainState:
        """Replace parameters and their average in the state before training; each process places its part."""

        def replaced(keys, x):
            if (given := self.taken.get(weights.name_of(keys))) is None:
                return x
            return jax.make_array_from_callback(x.shape, x.sharding, given.__getitem__)

        params, ema = (jax.tree.map_with_path(replaced, tree) for tree in (state.params, state.ema))
        return state._replace(params=params, ema=ema)

    def told(self) -> str:
        """Return a line that says what was taken, and what was not."""
        taken, source = sum(self.sizes[name] for name in self.taken), self.source
        arrays = f"{len(self.taken)} of {len(self.sizes)} arrays, {taken:,} of {sum(self.sizes.values()):,} parameters"
        shapes = [f"{name} {was} for {wanted}" for name, (was, wanted) in self.other_shape.items()]
        others = {"not there": self.missing, "of another shape": shapes, "left over": self.left_over}
        parts = [f"begun from {source.place}, step {source.step}: {arrays}"]
        return "; ".join([*parts, *(f"{what}: {_listed(names)}" for what, names in others.items() if names)])

    def record(self) -> dict[str, Any]:
        """Return the content of init.json."""
        about = {"source": self.source.place, "step": self.source.step, "digest": self.source.digest}
        lists = {name: getattr(self, name) for name in ("missing", "other_shape", "left_over")}
        return about | {"taken": sorted(self.taken)} | lists


def prepare(place: str, params: PyTree, workdir: Path) -> Initial | None:
    """Read what a run begins from, `--init-from`, and compare it with the shapes of its parameters; None for "".

    Raises ValueError or OSError if it cannot be read or fits nowhere, or if the run of the folder began otherwise.
    """
    source = read(place) if place else None
    _check_begun(source, workdir)
    return _matched(source, params) if source else None


def read(place: str) -> Source:
    """Read the newest averaged parameters of a run, or a file of scripts/export_weights.py."""
    path = Path(files.expanded(place))
    try:
        if path.is_dir():
            read_config(path)  # says what is wrong with a folder that is no run
            params, step = newest_average(path)
            return Source(place, step, {name: np.asarray(x) for name, x in weights.named(params).items()})
        _, step = weights.read_config(path)
        return Source(place, step, weights.load_all(path))
    except (ValueError, OSError) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"--init-from={place}: {told}; give the folder of a run, or a .safetensors file") from error


def write_record(initial: Initial, workdir: Path) -> None:
    """Write init.json into the folder of a run."""
    files.write(workdir / RECORD, json.dumps(initial.record(), indent=1) + "\n")


def _matched(source: Source, params: PyTree) -> Initial:
    wanted, taken = weights.named(params), {}
    other_shape = {}
    for name in wanted.keys() & source.arrays.keys():
        array, shape = source.arrays[name], wanted[name].shape
        if array.shape != shape:
            other_shape[name] = [array.shape, shape]
        elif not np.isfinite(array).all():
            raise ValueError(f"--init-from={source.place}: {name} holds values that are not finite; give another step")
        else:
            taken[name] = array.astype(wanted[name].dtype)
    missing, left_over = sorted(wanted.keys() - source.arrays.keys()), sorted(source.arrays.keys() - wanted.keys())
    if not taken:
        have = "; ".join(
            f"{who} has {_listed([f'{name} {tuple(x.shape)}' for name, x in sorted(of.items())])}"
            for who, of in ((source.place, source.arrays), ("the model of --config", wanted))
        )
        raise ValueError(f"--init-from={source.place}: no array of the model is there in its shape: {have}")
    sizes = {name: int(np.prod(x.shape)) for name, x in wanted.items()}
    return Initial(source, sizes, taken, missing, dict(sorted(other_shape.items())), left_over)


def _check_begun(source: Source | None, workdir: Path) -> None:
    """Raise ValueError if a folder holds a run that began from something else."""
    path = workdir / RECORD
    begun = json.loads(path.read_text()) if path.exists() else None
    advice = "leave --init-from out to go on with it, or give another --workdir to start a new run"
    if not saved(workdir):
        if begun and not source:
            raise ValueError(
                f"{workdir} was to begin from {begun['source']} and has saved nothing: give --init-from again, or "
                "another --workdir"
            )
    elif source and not begun:
        raise ValueError(f"--init-from={source.place}: the run of {workdir} began without it; {advice}")
    elif source and begun and source.digest != begun["digest"] and not _went_on(source, begun):
        raise ValueError(
            f"--init-from={source.place} (step {source.step}): the run of {workdir} began from {begun['source']} "
            f"(step {begun['step']}), whose parameters are others; {advice}"
        )


def _went_on(source: Source, begun: Mapping[str, Any]) -> bool:
    """Tell whether the source is the recorded run, which was trained on since."""
    return (
        source.place == begun["source"] and Path(files.expanded(source.place)).is_dir() and source.step > begun["step"]
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
