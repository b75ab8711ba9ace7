"""Checkpoints of a run, written asynchronously and guarded by checksums.

Orbax notices most missing and truncated files, but reads flipped bits in an array or in the iterator's state as if they
were true (docs/reliability.md). Every checkpoint therefore holds SHA256SUMS of its files. They are written before Orbax
commits the checkpoint by renaming it, so each complete checkpoint has them.
"""

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from data.files import is_stray
from training.processes import is_first_process
from training.state import TrainState

SUMS = "SHA256SUMS"
# Orbax writes these after the sums, and restores nothing from them.
_UNCHECKED = frozenset({SUMS, "_CHECKPOINT_METADATA", "commit_success.txt"})


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """Checkpoints of a run in `<workdir>/checkpoints`: state, data iterator and configuration, written asynchronously.

    All processes of a run share the folder and call the same methods. A checkpoint can be restored on another mesh and
    by another number of processes.

    keep: Number of newest checkpoints that stay; -1 for all. keep_every: Multiples of this step stay, too; 0 for none.
    """

    def __init__(self, workdir: Path, *, keep: int = 2, keep_every: int = 0, read_only: bool = False):
        self.directory, self._saving = workdir.absolute() / "checkpoints", -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only or keep == -1 else keep,
            keep_period=keep_every or None,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # left by saves that were killed
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_sums),
        )
        names = "state", "iterator", "config"
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=names)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, iterator: dict, config: dict) -> None:
        """Start saving, unless this step is saved already. Raises OSError if the previous save failed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            iterator=ocp.args.JsonSave(iterator),
            config=ocp.args.JsonSave(config),
        )
        self.wait()
        self._saving = step
        with self._failing_clearly():
            self._manager.save(step, args=items)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """Return state and iterator state of the checkpoint of a step; None takes the newest.

        `like` has shapes, dtypes and shardings of the state (`Trainer.abstract_state`). Raises FileNotFoundError if
        there is no such checkpoint, and DamagedCheckpointError if files differ from what was saved.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            have = f"the steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise FileNotFoundError(f"{self.directory} holds {have}{'' if step is None else f', not step {step}'}")
        step = steps[-1] if step is None else step
        if damage := damage_of(self.directory / str(step)):
            raise DamagedCheckpointError(
                f"{self.directory / str(step)} is damaged: {damage}. There are the steps {', '.join(map(str, steps))}; "
                "train.py sets it aside and goes on from the one before, eval.py takes another with --step"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), iterator=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return TrainState(**restored["state"]), restored["iterator"]

    def wait(self) -> None:
        """Wait for the pending save. Raises OSError if it failed, on a full disk for example."""
        with self._failing_clearly():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any kind: Orbax's, TensorStore's, the file system's
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise OSError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory} ({reason}). "
                "Earlier ones are whole: free space there and start again to resume from the last"
            ) from error

    def close(self) -> None:
        """Wait for the pending save, and release Orbax's resources."""
        self.wait()
        self._manager.close()

    def _add_sums(self) -> None:
        """Write the checksums of the checkpoint that Orbax is about to commit. Orbax's thread calls it."""
        if is_first_process():
            (folder,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            (folder / SUMS).write_text("".join(f"{line}\n" for line in _sums(folder)))


def set_damaged_aside(workdir: Path) -> list[str]:
    """Rename damaged checkpoints that are newer than the last good one to `<step>.damaged`. Nothing is deleted.

    One process may call it, before any `Checkpoints` of the folder is made. It returns a message for each of them.
    Raises DamagedCheckpointError if there are checkpoints and none is good; then nothing is renamed.
    """
    found = saved(workdir)
    damaged = {}
    for folder in reversed(found):
        if (damage := damage_of(folder)) is None:
            break
        damaged[folder] = f"checkpoint {folder.name} is damaged ({damage})"
    if found and len(damaged) == len(found):
        raise DamagedCheckpointError(
            f"{workdir / 'checkpoints'} holds no good checkpoint: {'; '.join(damaged.values())}. Bring one back from a "
            "copy, or start anew in another --workdir"
        )
    for folder, message in damaged.items():
        names = (f"{folder.name}.damaged" + (f".{n}" if n else "") for n in itertools.count())
        free = next(path for name in names if not (path := folder.with_name(name)).exists())
        damaged[folder] = f"{message}; it is now {folder.rename(free).name}"
    return list(damaged.values())


def newest_average(workdir: Path) -> tuple[PyTree, int]:
    """Return the averaged parameters of the newest checkpoint, in the memory of this machine, and its step.

    No model is needed for it. Raises FileNotFoundError if there is none, and DamagedCheckpointError.
    """
    if not (found := saved(workdir)):
        raise FileNotFoundError(f"{workdir} holds no checkpoint: train there first, or give another run")
    if damage := damage_of(found[-1]):
        raise DamagedCheckpointError(f"{found[-1]} is damaged: {damage}. The run there sets it aside when it goes on")
    path = found[-1].absolute() / "state"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = {"ema": reader.metadata(path).item_metadata["ema"]}
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restored = reader.restore(
            path, args=ocp.args.PyTreeRestore(shapes, restore_args=as_arrays, partial_restore=True)
        )
    return restored["ema"], int(found[-1].name)


def newest_position(workdir: Path) -> dict | None:
    """Return the iterator state of the newest checkpoint, which must be whole; None if there is none."""
    found = saved(workdir)
    return ocp.JsonCheckpointHandler().restore(found[-1].absolute() / "iterator") if found else None


def saved(workdir: Path) -> list[Path]:
    """Return the folders of all checkpoints, oldest first; copies such as `100.bak` are none."""
    folders = [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.is_dir()]
    return sorted((path for path in folders if path.name.isdecimal()), key=lambda path: int(path.name))


def damage_of(folder: Path) -> str | None:
    """Compare a checkpoint with its checksums; return None if they agree, else a message.

    Old versions wrote no checksums: a run that has none at all is accepted with a warning.
    """
    path = folder / SUMS
    if not path.exists():
        if any((other / SUMS).exists() for other in folder.parent.iterdir() if other.is_dir()):
            return f"{SUMS} is missing"
        warnings.warn(f"{folder} has no checksums, an older version wrote it: used unchecked", stacklevel=2)
        return None
    listed = path.read_text(errors="replace").splitlines(), _sums(folder)
    expected, found = (dict(line.split("  ", 1)[::-1] for line in lines if "  " in line) for lines in listed)
    unknown = {name for name in found.keys() - expected.keys() if not any(map(is_stray, Path(name).parts))}
    wrong = sorted(unknown.union(name for name in expected if expected[name] != found.get(name)))
    if wrong:
        return f"{len(wrong)} of {len(expected)} files missing, changed or unknown: {', '.join(wrong[:3])}"
    return None


def _sums(folder: Path) -> list[str]:
    """Make the lines of `sha256sum`, which can check them: digest, two blanks, name below the folder."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.parent != folder or path.name not in _UNCHECKED):
            with path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}")
    return lines
