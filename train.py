"""Trains an aligner from a configuration, and goes on where it stopped when started again.

  python train.py --config=configs/r2_balanced.py                       # into runs/r2_balanced
  python train.py --config=configs/r2_dustbin.py --config.loss.sparse_ce=1.0 --workdir=runs/supervised
  python train.py --config=configs/r2_balanced.py --config.data.dir=runs/pfam --config.total_steps=2000

The folder of a run holds config.json, metrics.jsonl and checkpoints/. Score it with eval.py.

All devices of this machine share a batch; --config.mesh says how. On several machines, or in several processes of one,
start the same command in each, with one --workdir and one --config.data.dir that all of them see, and

  --coordinator=HOST:PORT --processes=2 --process=0     # and --process=1 in the other; HOST is where process 0 runs
  --coordinator=auto                                    # on a TPU slice or a cluster that JAX knows

A run may go on with another number of processes or devices; its batches stay the same.

Exit codes: 0, finished; 75, stopped in between by SIGTERM, after saving, or by the loss of another process: start it
again; anything else: see the message.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from configs import base
from data import pipeline
from evaluation.runs import make_trainer
from evaluation.tasks import task_of
from training import sharding
from training.checkpoints import Checkpoints, set_damaged_aside
from training.run_folder import MetricsLog, check_shared, check_workdir, differences, replace, run_lock, write_settings
from training.state import Trainer, TrainState

T = TypeVar("T")

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/r2_balanced.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/<name of the configuration>")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several processes train together: HOST:PORT of process 0, the same in all of them, or auto"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are; with --coordinator=HOST:PORT")
_PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; with --coordinator=HOST:PORT")

_TRACED = 3  # steps


STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"
_LOST = 30  # seconds of silence after which a process is held to be dead, and of patience at the end


class NonFiniteError(Exception):
    """Loss or gradient is NaN or infinite."""


class Stopped(Exception):
    """Told to stop in the middle of a run, which is saved."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`: what happens at a loss or gradient that is not finite. The batch is named in a file in any case.

    on_nonfinite: "stop" the run; "skip" the update; "rollback": go on from the last checkpoint, with the batches that
      follow the bad one.
    max_nonfinite: With "skip" and "rollback", the run stops after so many.
    """

    on_nonfinite: str = "stop"
    max_nonfinite: int = 10

    def __post_init__(self):
        if self.on_nonfinite not in ("stop", "skip", "rollback"):
            raise ValueError(f"train.on_nonfinite={self.on_nonfinite!r} must be stop, skip or rollback")
        if self.max_nonfinite < 0:
            raise ValueError(f"train.max_nonfinite={self.max_nonfinite} must be at least 0")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"train.py: unknown argument {argv[1]!r}; options are written --name=value, see --help")
    if _CONFIG.value is None:
        sys.exit("train.py: --config is missing, for example --config=configs/r2_balanced.py")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"))
    except (ValueError, TypeError, OSError, NonFiniteError) as error:
        sys.exit(f"train.py: {error}")
    except Stopped as told:
        print(f"train.py: {told}", file=sys.stderr)
        sys.exit(STOPPED)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"train.py: another process is gone; start all of them again to go on ({error})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(STOPPED)  # JAX would wait for the others to end with this one


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this one of several processes; nothing of JAX may have run before. Raises ValueError."""
    auto = coordinator in (None, "auto")
    if auto and (processes, process) != (None, None):
        raise ValueError("--processes and --process need --coordinator=HOST:PORT")
    if not auto and (processes is None or process is None or not 0 <= process < processes):
        raise ValueError(
            f"--coordinator={coordinator} needs --processes=N and --process=I with I from 0 to N - 1; given were "
            f"{processes} and {process}"
        )
    if coordinator:
        try:
            jax.distributed.initialize(
                None if auto else coordinator,
                processes,
                process,
                heartbeat_timeout_seconds=_LOST,
                shutdown_timeout_seconds=_LOST,
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--coordinator={coordinator}: no connection to the other processes: {error}") from error


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Runs or resumes, together with the other processes if there are any; returns the final state.

    Raises:
      ValueError, OSError: a setting, the data or the folder is not as it should be; the message says what to do.
      NonFiniteError: see `TrainConfig`.
      Stopped: by SIGTERM, after saving.
    """
    # ---- the run's folder, data, model ----
    policy = TrainConfig(**config.train)
    trainer, mesh, iterator, validate = in_all_processes(lambda: prepare(config, workdir))
    leads = jax.process_index() == 0  # writes everything but the checkpoints, to which all contribute
    settings = json.dumps(json.loads(config.to_json()), indent=1) + "\n"
    with contextlib.ExitStack() as resources:
        in_all_processes(lambda: resources.enter_context(run_lock(workdir)) if leads else None)
        told_to_stop = resources.enter_context(on_sigterm())
        in_all_processes(lambda: check_workdir(workdir, config))  # anew: now nobody else changes it
        in_all_processes(lambda: write_settings(workdir, settings))
        in_all_processes(lambda: check_shared(workdir, settings))
        for damage in in_all_processes(lambda: set_damaged_aside(workdir) if leads else []):
            warn(damage)

        # ---- resume ----
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        resources.push(functools.partial(finish_saving, checkpoints))
        if checkpoints.steps():
            state, position = checkpoints.restore(trainer.abstract_state(mesh))
            iterator.set_state(position)
        else:
            state, position = trainer.initial_state(mesh), {}
        step = start = int(state.step)
        log = MetricsLog(workdir, config, start)
        if leads:
            introduce(workdir, config, start, iterator.stream)
        progress = resources.enter_context(progress_bar(workdir, config, start))
        guard = NonFiniteGuard(policy, log, progress, workdir, position.get("nonfinite", 0))
        if start == 0:
            checkpoints.save(state, guard.position(iterator), config.to_dict())
        if validate and is_evaluated(start, config) and gather(str(log.was_validated(start)))[0] == "False":
            log.write(start, validate(state))

        # ---- the loop: step n is checked and logged while step n + 1 computes ----
        update = trainer.compiled_update(mesh)
        # Collectives of two steps on the threads of a CPU can wait for each other for ever.
        one_at_a_time = jax.default_backend() == "cpu" and mesh.size > 1
        profile = Profile(workdir, config, start)
        previous, stop = None, False
        while step < config.total_steps and not stop:
            step += 1
            profile.before(step)
            asked = time.perf_counter()
            examples = next(iterator)
            log.waited += time.perf_counter() - asked
            batch = sharding.from_hosts(cast(dict, examples), mesh)
            ids = batch.pop("id")
            state, metrics = update(state, batch)
            if one_at_a_time:
                jax.block_until_ready(state)
            profile.after(step, state)
            stop = told_to_stop(step)
            save = step % config.checkpoint.every == 0 or step == config.total_steps or stop
            evaluate = validate and is_evaluated(step, config) and not stop
            try:
                if previous:
                    guard(*previous)
                previous = step, iterator.step, metrics, ids
                if save or evaluate:
                    guard(*previous)  # nothing is kept of a step that was not checked
                    previous = None
            except RollBack as bad:
                checkpoints.wait()
                state, position = checkpoints.restore(trainer.abstract_state(mesh))
                iterator.set_state(position | {"step": bad.batch})
                step, previous = int(state.step), None
                log.rewind(step)
                progress.reset_to(step)
                continue
            if save:
                checkpoints.save(state, guard.position(iterator), config.to_dict())
            if evaluate:
                log.write(step, validate(state))

        # ---- finish ----
        progress.close()
        checkpoints.close()
        iterator.close()
        log.close()
        gather("")  # all end together, however long the first one's W&B takes: JAX itself has little patience
        if step < config.total_steps:
            raise Stopped(f"{workdir}: stopped by SIGTERM, step {step} is saved; the same command goes on from there")
    return state


def finish_saving(checkpoints: Checkpoints, kind: type[BaseException] | None, *_) -> None:
    """When an error ends the run: or what is being saved just then would be lost. A lost process is not waited for."""
    if kind and not issubclass(kind, jax.errors.JaxRuntimeError):
        checkpoints.wait()


def prepare(config: ConfigDict, workdir: Path) -> tuple[Trainer, Mesh, pipeline.BatchIterator, Callable | None]:
    """Trainer, mesh, this process's part of the batches, and validation if it is wanted; the folder is not touched."""
    check_workdir(workdir, config)
    task, trainer = task_of(config), make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(**config.mesh), config.batch_size)
    if config.batch_size % (mesh.shape["data"] * config.optimizer.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by optimizer.accumulate={config.optimizer.accumulate} "
            f"times mesh.data={mesh.shape['data']}"
        )
    iterator = task.batches(mesh)
    return trainer, mesh, iterator, validation(task.validation(trainer, mesh)) if config.log.eval_every else None


def validation(score: Callable[[PyTree], dict]) -> Callable[[TrainState], dict[str, float]]:
    """A function from the state to the model's metrics on a fixed sample of the validation split.

    Every process computes all of them from the same predictions, so that all go on together.
    """

    def validate(state: TrainState) -> dict[str, float]:
        overall = score(state.ema)["model"]["overall"]
        return {f"validation/{name}": metric["value"] for name, metric in overall.items()}

    return validate


class RollBack(Exception):
    """To the last checkpoint, and on with the batch of this number."""

    def __init__(self, batch: int):
        super().__init__(batch)
        self.batch = batch


class NonFiniteGuard:
    """Logs a step, or does with a non-finite one what `config.train` says.

    nonfinite: how many there have been; part of what a checkpoint holds.
    """

    def __init__(self, policy: TrainConfig, log: MetricsLog, progress: "Progress", workdir: Path, nonfinite: int):
        self.policy, self.log, self.progress, self.workdir = policy, log, progress, workdir
        self.nonfinite = nonfinite

    def __call__(self, step: int, batch: int, metrics: dict, ids: jax.Array) -> None:
        """batch: number of the step's batch, which is the step's own unless some were left out; ids: of all of it.

        Raises:
          NonFiniteError, RollBack: what is not finite ends the run, or takes it back.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        residues, finite = round(values.pop("residues")), values.pop("finite") == 1
        if finite:
            counted = {} if self.policy.on_nonfinite == "stop" else {"nonfinite": self.nonfinite}
            self.log.step(step, values | counted, len(ids), residues)
            self.progress.update()
            rate = f"{self.log.residues_per_second:,.0f} residues/s"
            self.progress.set_postfix_str(f"loss {values['loss']:.3f}, {rate}", refresh=False)
            return
        self.nonfinite += 1
        path = self._keep(step, batch, values, ids)
        told = (
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The batch (family, row of "
            f"x, row of y in the train split) is in {path}"
        )
        if self.policy.on_nonfinite == "stop" or self.nonfinite > self.policy.max_nonfinite:
            before = f", the last of {self.nonfinite} such steps" if self.nonfinite > 1 else ""
            raise NonFiniteError(
                f"{told}{before}. Checkpoints hold earlier steps only: start again to resume from the last one; if it "
                "comes back, lower optimizer.learning_rate in another workdir, or give train.on_nonfinite=skip or "
                "rollback, and train.max_nonfinite"
            )
        so_far = f"{self.nonfinite} of at most {self.policy.max_nonfinite}"
        if self.policy.on_nonfinite == "rollback":
            warn(f"{told}. Back to the last checkpoint, and on with batch {batch + 1} ({so_far})")
            raise RollBack(batch)
        warn(f"{told}. Its update is left out ({so_far})")
        self.log.count(len(ids), residues)
        self.progress.update()

    def position(self, iterator: pipeline.BatchIterator) -> dict[str, Any]:
        """What `Checkpoints` keeps beside the state."""
        return iterator.get_state() | {"nonfinite": self.nonfinite}

    def _keep(self, step: int, batch: int, values: dict[str, float], ids: jax.Array) -> Path:
        path = self.workdir / f"nonfinite_{batch}.json"
        of_all = multihost_utils.process_allgather(ids, tiled=True).tolist()
        if jax.process_index() == 0:
            path.write_text(json.dumps({"step": step, "batch": batch, "metrics": values, "ids": of_all}) + "\n")
        return path


class Progress(tqdm):
    """A bar that can go back."""

    def reset_to(self, step: int) -> None:
        self.initial = self.n = step
        self.refresh()


def progress_bar(workdir: Path, config: ConfigDict, start: int) -> Progress:
    return Progress(
        total=config.total_steps,
        initial=start,
        unit=" steps",
        desc=workdir.name,
        smoothing=0.05,
        mininterval=1,
        disable=jax.process_index() > 0,
    )


class Profile:
    """A trace of a few steps, in `<workdir>/trace`, from the first process."""

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.folder, self.running = workdir / "trace", False
        asked = jax.process_index() == 0 and config.log.trace > start
        self.first = config.log.trace if asked else 0
        self.last = min(self.first + _TRACED - 1, config.total_steps)

    def before(self, step: int) -> None:
        if step == self.first and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, state: TrainState) -> None:
        if step == self.last and self.running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """A function that says whether the run is to stop after a step: in all processes after the same one.

    A second SIGTERM ends the process at once.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # JAX heeds the signal, and agrees on the step
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda step: False
        return

    def note(number, frame) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def is_evaluated(step: int, config: ConfigDict) -> bool:
    return step % config.log.eval_every == 0 or step == config.total_steps


def introduce(workdir: Path, config: ConfigDict, start: int, stream: pipeline.Stream) -> None:
    """Tells what is about to be trained, and on what not."""
    print(f"{workdir}: step {start} of {config.total_steps}, {stream.description()}")
    if stream.bad:
        replace(workdir / "bad_records.json", json.dumps(stream.bad, indent=1) + "\n")
        warn(f"{len(stream.bad)} damaged record(s) left out, listed in {workdir / 'bad_records.json'}: {stream.bad[0]}")


def warn(text: str) -> None:
    """Once, whatever the number of processes."""
    if jax.process_index() == 0:
        tqdm.write(f"train.py: {text}", file=sys.stderr)


def in_all_processes(function: Callable[[], T]) -> T:
    """Calls it in every process; if it fails in one, all fail with the message of the first, and none is waited for."""
    failed = None
    try:
        result = function()
    except (ValueError, TypeError, OSError) as error:
        failed = error
    messages = [message for message in gather("" if failed is None else str(failed) or repr(failed)) if message]
    if not messages:
        return result
    raise failed if failed is not None and str(failed) == messages[0] else ValueError(messages[0])


def gather(text: str) -> list[str]:
    """That of every process."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded) + 1)))
    return [bytes(row[:size]).decode() for row, size in zip(padded, sizes, strict=True)]


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parsing, with one line where ml_collections would show a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        known = ", ".join(f"--config.{key}" for key, *_ in differences({}, json.loads(base.get_config().to_json())))
        missing = " ".join(str(error.args[0]).split())
        sys.exit(f"train.py: the configuration has no key {missing}. There are: {known}")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
