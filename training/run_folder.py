"""Guard the folder of a run against a second writer and another configuration; keep the log of its metrics."""

import contextlib
import fcntl
import importlib.util
import json
import logging
import netrc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from urllib.parse import urlparse

import jax
from ml_collections import ConfigDict

from data import files
from training.processes import is_first_process

# Beginnings of the settings that may change when a run is resumed. Any other change makes it another run.
# What the data are is compared by their content (`BatchIterator.check`), not by their place.
_FREE_DATA = "data.dir", "data.workers", "data.prefetch", "data.max_bad_records"
_FREE_KEYS = "total_steps", "train.", "checkpoint.", "log.", "mesh.", *_FREE_DATA, "model.implementation"


def name_of(config: str, argument: str = "") -> str:
    """Return the name of a run's folder, from its configuration's name and argument: dial-0.8-full."""
    return "-".join(filter(None, (config, *argument.replace("/", "_").split(","))))


def check_place(workdir: Path) -> None:
    """Raise ValueError unless the folder, or one to make it in, can be written."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--workdir={workdir}: {there} is a file; give the name of a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--workdir={workdir}: nothing can be written to {there}; give another folder")


@contextlib.contextmanager
def removed_on_failure(workdir: Path) -> Iterator[None]:
    """Remove the folder and its parents, as far as they were missing before, if an error ends the block."""
    missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path == workdir else path.rmdir()
        raise


@contextlib.contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Lock the folder, which is made if it is missing. Raises ValueError if another process holds the lock.

    The lock is released when the process exits, even by SIGKILL. It is flock(2), which works on NFS of Linux, but not
    on every network disk and not on object stores mounted as a disk.
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


def check_workdir(workdir: Path, config: ConfigDict, completed: Callable[[dict], dict]) -> None:
    """Raise ValueError if the folder holds a run of another configuration.

    `completed` adds to settings the defaults of keys that are missing, as they are in runs of earlier versions.
    """
    if not (workdir / "config.json").exists():
        return
    old, new = (completed(json.loads(one.to_json())) for one in (read_config(workdir), config))
    found = differences(old, new)
    changed = [f"{key} was {was!r}, is {now!r}" for key, was, now in found if not key.startswith(_FREE_KEYS)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}). Give another --workdir to "
            "start a new run, or the same values to go on with this one"
        )


def check_shared(workdir: Path, config: ConfigDict) -> None:
    """Raise ValueError unless this process sees the configuration that the first one wrote, and has the same."""
    path = workdir / "config.json"
    if not path.exists() or path.read_text() != as_text(config):
        raise ValueError(
            f"{path} is not what process 0 wrote, in process {jax.process_index()}: give all processes the same "
            "options, and a --workdir on a disk that they share"
        )


def differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield the dotted name and both values of every setting that differs."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, {}), new.get(key, {})
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def read_config(workdir: Path) -> ConfigDict:
    """Read the configuration of a run. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one with --workdir={workdir}")
    try:
        return ConfigDict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): take it from config/metadata of the newest checkpoint, or remove it if the "
            "run's options are known: train.py writes it again"
        ) from error


def read_metrics(workdir: Path) -> list[dict]:
    """Read the lines of metrics.jsonl, if there is one. A last line without its end is left out."""
    path, rows = workdir / "metrics.jsonl", []
    *lines, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is damaged ({error}): remove the line") from error
    return rows


class MetricsLog:
    """Lines of metrics.jsonl, and the same in W&B. Counts in every process, writes in the first.

    waited: Seconds that the steps since the last line waited for their batches.
    """

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.workdir, self.path, self.every = workdir, workdir / "metrics.jsonl", config.log.every
        self.residues_per_second = 0.0
        self._restart_rates()
        self.rewind(start)
        wanted = is_first_process() and config.log.wandb != "disabled"
        self._wandb = _start_wandb(workdir, config) if wanted else None

    def rewind(self, start: int) -> None:
        """Drop the lines of steps after `start`, from which the run continues; all lines if `start` is 0."""
        if is_first_process() and self.path.exists():
            kept = [row for row in read_metrics(self.workdir) if row["step"] <= start and start > 0]
            files.write(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def step(self, step: int, values: dict[str, float], examples: int, residues: int) -> None:
        """Count a training step; every `log.every` steps, write its metrics and the rates since the last line."""
        self.count(examples, residues)
        seconds = time.perf_counter() - self._since
        due = self.every and (step % self.every == 0 or step == 1)
        if due or not self.every:
            self.residues_per_second = self._residues / seconds
        if due:
            rates = {"residues_per_second": self.residues_per_second, "examples_per_second": self._examples / seconds}
            self.write(step, values | rates | {"data_share": self.waited / seconds})

    def count(self, examples: int, residues: int) -> None:
        """Add a step's work to the rates."""
        self._residues += residues
        self._examples += examples

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a line, and start the rates anew."""
        if is_first_process():
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)
        self._restart_rates()

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()

    def _restart_rates(self) -> None:
        self.waited, self._since = 0.0, time.perf_counter()
        self._residues = self._examples = 0


def without_folders(value):
    """Cut absolute paths in settings, alone or in a list, to their last part, so that no path leaves the machine."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    return ",".join(PurePath(one).name if PurePath(one).is_absolute() else one for one in value.split(","))


def check_wandb(mode: str) -> None:
    """Raise ValueError if W&B is not installed, or has no key for `mode` "online". Nothing is sent, nobody is asked."""
    if mode == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"log.wandb={mode} needs the package wandb: install it, or give log.wandb=disabled")
    if mode == "online" and not _has_wandb_key():
        raise ValueError(
            "log.wandb=online needs an account, and there is no key of one: run `wandb login`, or give "
            "log.wandb=offline, which writes the same to the run's folder"
        )


def _has_wandb_key() -> bool:
    """Look where W&B looks: into its variables, its files of settings and .netrc."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    if settings.api_key:
        return True
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    found = [path for name in names if (path := Path(name).expanduser()).is_file()]
    try:
        return any(netrc.netrc(path).authenticators(urlparse(settings.base_url).hostname or "") for path in found)
    except (netrc.NetrcParseError, OSError):
        return False


def _start_wandb(workdir: Path, config: ConfigDict):
    """Start a W&B run that stores metrics and settings, and nothing of the machine, its user, paths or command."""
    import wandb  # not needed by runs with config.log.wandb=disabled

    logging.getLogger("wandb").addFilter(lambda record: record.levelno >= logging.WARNING)  # it logs every path
    disabled = ("disable_code", "disable_git", "x_disable_machine_info", "x_disable_meta", "x_disable_stats")
    private: dict = dict.fromkeys(disabled, True) | {"save_code": False, "x_save_requirements": False}
    settings = wandb.Settings(silent=config.log.wandb != "online", console="off", **private)
    told: dict = {"project": "ot-attention", "name": workdir.name, "config": without_folders(config.to_dict())}
    try:
        return wandb.init(dir=workdir, mode=config.log.wandb, settings=settings, **told)
    except wandb.Error as error:
        raise ValueError(
            f"log.wandb={config.log.wandb}: W&B does not start ({error}); try offline or disabled"
        ) from error


def as_text(config: ConfigDict) -> str:
    """Return a configuration as the text of config.json."""
    return json.dumps(json.loads(config.to_json()), indent=1) + "\n"
