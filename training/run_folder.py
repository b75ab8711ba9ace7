"""The folder of a run: who may write there, which run it holds, its metrics."""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePath

import jax
from ml_collections import ConfigDict

# What may change when a run goes on; anything else makes it another run.
_FREE_KEYS = (
    "total_steps",
    "train.",
    "checkpoint.",
    "log.",
    "mesh.",
    "data.workers",
    "data.prefetch",
    "data.max_bad_records",
    "model.implementation",
)


@contextlib.contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """No other process can hold the folder, which is made if need be; a process that dies, however, lets go.

    By flock(2): also on NFS of Linux, but not on every network disk, and not through object stores mounted as one.

    Raises:
      ValueError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by another train.py (process {file.read().strip() or 'unknown'}): wait for it or "
                "stop it, or give another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError if the folder holds a run of another configuration."""
    path, wanted = workdir / "config.json", json.loads(config.to_json())
    if path.exists():
        changed = [
            f"{key} was {old!r}, is {new!r}"
            for key, old, new in differences(_read_settings(path), wanted)
            if not key.startswith(_FREE_KEYS)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another configuration ({'; '.join(changed)}). Give another --workdir to "
                "start a new run, or the same values to go on with this one"
            )


def write_settings(workdir: Path, settings: str) -> None:
    """Once, whatever the number of processes."""
    if jax.process_index() == 0:
        replace(workdir / "config.json", settings)


def check_shared(workdir: Path, settings: str) -> None:
    """Raises ValueError unless this process sees what the first one wrote."""
    path = workdir / "config.json"
    if not path.exists() or path.read_text() != settings:
        raise ValueError(
            f"{path} is not what process 0 wrote, in process {jax.process_index()}: give all processes the same "
            "options, and a --workdir on a disk that they share"
        )


def differences(old: dict, new: dict, prefix: str = ""):
    """Dotted names of what differs, with both values."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, {}), new.get(key, {})
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where the power fails, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_config(workdir: Path) -> ConfigDict:
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one with --workdir={workdir}")
    try:
        return ConfigDict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): take it from config/metadata of the newest checkpoint"
        ) from error


def read_metrics(workdir: Path) -> list[dict]:
    """Lines of metrics.jsonl; none where there is no such file. One without its end is cut off, and left out."""
    path, rows = workdir / "metrics.jsonl", []
    *lines, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is damaged ({error}): remove the line") from error
    return rows


class MetricsLog:
    """Lines of metrics.jsonl, and the same to W&B. Counts in every process, writes in the first."""

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.workdir, self.path, self.every = workdir, workdir / "metrics.jsonl", config.log.every
        self.residues_per_second = 0.0
        self.waited = 0.0  # seconds, for batches
        self._time, self._residues, self._examples = time.perf_counter(), 0, 0
        self._leads = jax.process_index() == 0
        self.rewind(start)
        self._wandb = _start_wandb(workdir, config) if self._leads and config.log.wandb != "disabled" else None

    def rewind(self, start: int) -> None:
        """Drops the lines of later steps, beyond which a run resumes; all of them if nothing was trained yet."""
        if jax.process_index() == 0 and self.path.exists():
            kept = [row for row in read_metrics(self.workdir) if row["step"] <= start and start > 0]
            replace(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def was_validated(self, step: int) -> bool:
        """Whether the step has its validation: a run may be killed between a checkpoint and that."""
        rows = read_metrics(self.workdir)
        return any(row["step"] == step and any(name.startswith("validation/") for name in row) for row in rows)

    def step(self, step: int, values: dict[str, float], examples: int, residues: int) -> None:
        """Counts a training step; every so many steps writes a line with the rates since the last one."""
        self.count(examples, residues)
        seconds = time.perf_counter() - self._time
        if step % self.every == 0 or step == 1:
            self.residues_per_second = self._residues / seconds
            rates = {
                "residues_per_second": self.residues_per_second,
                "examples_per_second": self._examples / seconds,
                "data_share": self.waited / seconds,
            }
            self.write(step, values | rates)

    def count(self, examples: int, residues: int) -> None:
        """Of a step, for the rates."""
        self._residues, self._examples = self._residues + residues, self._examples + examples

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line; the clock of the rates starts anew."""
        if self._leads:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)
        self.waited, self._time, self._residues, self._examples = 0.0, time.perf_counter(), 0, 0

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()


def without_folders(values: dict) -> dict:
    """The same settings, absolute paths cut to their last part: what leaves the machine does not tell of its disks."""

    def shown(value):
        if isinstance(value, dict):
            return without_folders(value)
        return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value

    return {key: shown(value) for key, value in values.items()}


def _start_wandb(workdir: Path, config: ConfigDict):
    """A W&B run that stores metrics and settings, and nothing of the machine, its user, its paths or the command."""
    import wandb  # not needed by runs with config.log.wandb=disabled

    logging.getLogger("wandb").addFilter(lambda record: record.levelno >= logging.WARNING)  # it logs every path
    return wandb.init(
        project="ot-attention",
        name=workdir.name,
        dir=workdir,
        config=without_folders(config.to_dict()),
        mode=config.log.wandb,
        settings=wandb.Settings(
            silent=config.log.wandb != "online",
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )


def _read_settings(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): take it from config/metadata of the newest checkpoint, or remove it if the "
            "run's options are those given now"
        ) from error
