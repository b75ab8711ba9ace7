"""Train a model from a configuration; the same command started again resumes the run.

  python train.py --config=configs/r2_balanced.py                       # into runs/r2_balanced
  python train.py --config=configs/r2_dustbin.py --config.loss.sparse_ce=1.0 --workdir=runs/supervised
  python train.py --config=configs/r2_balanced.py --config.data.dir=runs/pfam --config.total_steps=2000
  python train.py --config=configs/finetune.py --config.data.dir=runs/mine --init-from=weights/aligner.safetensors

The folder of a run holds config.json, metrics.jsonl and checkpoints/. Score it with eval.py.

All devices of this machine share a batch; --config.mesh says how. On several machines, or in several processes of one,
start the same command in each, with one --workdir and one --config.data.dir that all of them see, and

  --coordinator=HOST:PORT --processes=2 --process=0     # and --process=1 in the other; HOST is where process 0 runs
  --coordinator=auto                                    # on a TPU slice or a cluster that JAX knows

A run may be resumed with another number of processes or devices; its batches stay the same.

Progress is a bar on a terminal and a line now and then elsewhere; --quiet shows none.

Ctrl-C, SIGTERM and SIGHUP stop the run after the step in progress; it is saved. A second one ends it at once.

exit status: 0, finished; 1 if a setting, the data, the folder or the devices cannot be used (one line says why; --debug
shows where; a run that cannot start leaves no folder); 2 for a wrong command line; 70 for a fault of the program; 75,
stopped by a signal (after saving) or by the loss of another process: start it again; 130, ended by Ctrl-C unsaved
"""

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import command_line
from data import files
from evaluation.runs import make_trainer
from evaluation.tasks import checked, completed, task_of
from training import initial, memory, run_folder, sharding
from training.checkpoints import newest_position, set_damaged_aside
from training.nonfinite_guard import NonFiniteError, NonFinitePolicy, TrainedStep, Verdict
from training.processes import in_all_processes, is_first_process, join, warn
from training.session import Parts, Profile, Session
from training.signals import stop_requests
from training.state import TrainState

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/r2_balanced.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; default: runs/<name of the configuration>, its argument behind it"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several processes train together: HOST:PORT of process 0, the same in all of them, or auto"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are; with --coordinator=HOST:PORT")
_PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; with --coordinator=HOST:PORT")
_INIT_FROM = flags.DEFINE_string(
    "init-from", "", "begin from parameters of another run (its folder) or of a .safetensors file, as far as they fit"
)
_QUIET = flags.DEFINE_bool("quiet", False, "show no progress; warnings and errors stay")
_THREADS = flags.DEFINE_integer("threads", None, "CPU cores to use; default: all", lower_bound=1)
_DEBUG = flags.DEFINE_boolean("debug", False, "show where an error arose")
_VERSION = flags.DEFINE_boolean("version", False, "show the version and exit")
_NAME = "train.py"
# Kind of the devices that these implementations run on.
_DEVICES = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


class Stopped(Exception):
    """A signal came in the middle of a run; the run is saved."""


def main(argv: list[str]) -> int:
    """Run the command line, whose flags are parsed, and return the exit status."""
    if _VERSION.value:
        print(f"{_NAME} {command_line.version()}")
        return 0
    if len(argv) > 1:
        told = f"unknown argument {argv[1]!r}; options are written --name=value, see --help"
        return command_line.failed(_NAME, told, command_line.WRONG_COMMAND_LINE)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file it writes
    return command_line.run(_NAME, _work, debug=_DEBUG.value, threads=_THREADS.value, also=(NonFiniteError,))


def _work() -> int:
    path, _, place = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = run_folder.name_of(Path(path).stem, place)
    if _WORKDIR.value is not None and not _WORKDIR.value.strip():
        raise ValueError("--workdir is empty; give the name of a folder, or leave it out")
    workdir = Path(files.expanded(_WORKDIR.value or f"runs/{name}"))
    try:
        join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train(_CONFIG.value, workdir, init_from=_INIT_FROM.value, quiet=_QUIET.value)
    except Stopped as stopped:
        return command_line.failed(_NAME, str(stopped), STOPPED)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        told = f"another process is gone; start all of them again to go on ({command_line.message(error)})"
        command_line.failed(_NAME, told, STOPPED)
        sys.stderr.flush()
        os._exit(STOPPED)  # JAX would wait for the others to end with this one
    return 0


def train(config: ConfigDict, workdir: Path, *, init_from: str = "", quiet: bool = False) -> TrainState:
    """Start or resume a run, together with the other processes if there are any, and return its final state.

    A run that starts takes the parameters of `init_from`, a run or a file of weights, where they fit its model.
    Its progress is shown on stderr unless `quiet`. Raises ValueError or OSError if a setting, the data or the folder
    cannot be used; NonFiniteError if `config.train` ends the run at a loss or gradient that is not finite; Stopped if a
    signal came (training/signals.py), and the run is saved.
    """
    # ---- settings, model, data and folder ----
    config = in_all_processes(checked, config)
    parts = in_all_processes(prepare, config, workdir, init_from)
    with contextlib.ExitStack() as resources:
        requests = resources.enter_context(stop_requests())
        with run_folder.removed_on_failure(workdir) if is_first_process() else contextlib.nullcontext():
            for damage in in_all_processes(open_folder, config, workdir, parts, resources):
                warn(damage)
            in_all_processes(run_folder.check_shared, workdir, config)

            # ---- start or resume ----
            session = Session(config, workdir, parts, resources, quiet=quiet)
        if session.start == 0:
            session.save()
        if session.lacks_validation(session.start):
            session.validate(session.start, requests)

        # ---- the loop: step n is checked and logged while step n + 1 computes ----
        # On CPUs the collectives of two steps at once can wait for each other for ever.
        one_at_a_time = jax.default_backend() == "cpu" and parts.mesh.size > 1
        profile = Profile(workdir, config, session.start)
        step, stop, unchecked = session.start, requests.noted, list[TrainedStep]()
        while step < config.total_steps and not stop:
            step += 1
            profile.before(step)
            batch = session.next_batch()
            ids = batch.pop("id")
            session.state, metrics = parts.update(session.state, batch)
            if one_at_a_time:
                jax.block_until_ready(session.state)
            profile.after(step, session.state)
            unchecked.append(TrainedStep(step, parts.batches.step, metrics, ids))
            stop = requests.came(step)
            save = session.is_saved(step) or stop
            evaluate = session.is_evaluated(step) and not stop
            due = len(unchecked) - (0 if save or evaluate else 1)  # nothing is saved or evaluated unchecked
            ready, unchecked = unchecked[:due], unchecked[due:]
            bad = next((one for one in ready if session.record(one) is Verdict.ROLL_BACK), None)
            if bad:
                step, unchecked = session.roll_back(bad), []
                continue
            if save:
                session.save()
            if evaluate:
                session.validate(step, requests)
                if requests.noted:  # the validation may be cut short
                    stop = True
                    session.save()

        # ---- finish ----
        unfinished = step < config.total_steps or (stop and session.lacks_validation(step))
        session.close()
        if unfinished:
            how = f"stopped by {requests.name}, step {step} is saved"
            raise Stopped(f"{workdir}: {how}; the same command goes on from there")
    return session.state


def prepare(config: ConfigDict, workdir: Path, init_from: str = "") -> Parts:
    """Make the parts of a run without touching its folder. Raises ValueError or OSError if something does not fit."""
    run_folder.check_place(workdir)
    run_folder.check_workdir(workdir, config, completed)
    run_folder.check_wandb(config.log.wandb)
    policy = NonFinitePolicy.of(config.train.to_dict())
    task = task_of(config)
    task.check_mesh()
    mesh = sharding.make_mesh(sharding.MeshConfig.of(config.mesh.to_dict()), config.batch_size)
    _check_implementation(config, mesh)
    trainer = make_trainer(config)
    if config.batch_size % (mesh.shape["data"] * config.optimizer.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by optimizer.accumulate={config.optimizer.accumulate} "
            f"times mesh.data={mesh.shape['data']}"
        )
    score = task.validation(trainer, mesh) if config.log.eval_every else None
    batches, update = task.batches(mesh), trainer.compiled_update(mesh)
    largest = batches.stream.largest()
    memory.check(trainer, mesh, largest, config)
    # What the model cannot do is raised when it is traced; a step with a batch of this shape uses the trace again.
    state = trainer.abstract_state(mesh)
    jax.eval_shape(update, state, _abstract(largest, config.batch_size, mesh))
    return Parts(policy, trainer, mesh, update, batches, score, initial.prepare(init_from, state.params, workdir))


def _check_implementation(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError if the named implementation of the attention does not run on the devices of the mesh."""
    named, found = config.model.get("implementation"), mesh.devices.flat[0].platform
    if (needed := _DEVICES.get(named, found)) != found:
        raise ValueError(
            f"model.implementation={named!r}: needs a {needed.upper()}, JAX found a {found.upper()} here; allowed are "
            "auto, xla and reference"
        )


def _abstract(batch: Mapping[str, np.ndarray], batch_size: int, mesh: jax.sharding.Mesh) -> dict:
    """Return the shapes of a whole training batch from this process's part of it."""
    return sharding.abstract({name: x for name, x in batch.items() if name != "id"}, batch_size, mesh)


def open_folder(config: ConfigDict, workdir: Path, parts: Parts, resources: contextlib.ExitStack) -> list[str]:
    """Lock the folder, write the configuration and set damaged checkpoints aside, with a message for each.

    Only the first process does it. Raises ValueError if the folder holds a run of other settings or data.
    """
    if not is_first_process():
        return []
    resources.enter_context(run_folder.run_lock(workdir))
    run_folder.check_workdir(workdir, config, completed)  # again: from now on no other run changes it
    damaged = set_damaged_aside(workdir)
    if position := newest_position(workdir):
        parts.batches.check(position)
    files.write(workdir / "config.json", run_folder.as_text(config))
    return damaged


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; tell mistakes in one line, and exit."""
    asked = {"--help", "-h", "-?", "--helpshort"}.intersection(argv)
    if asked:
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    argv, given = command_line.config_with_home(argv)
    if given is None and "--version" not in argv:
        told = "--config is missing, for example --config=configs/r2_balanced.py"
        sys.exit(command_line.failed(_NAME, told, command_line.WRONG_COMMAND_LINE))
    config = None
    try:
        config = None if given is None else _read_config(given)
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        known = ", ".join(
            f"--config.{key}" for key, *_ in run_folder.differences({}, config.to_dict() if config else {})
        )
        missing = " ".join(str(error.args[0]).split())
        told, status = f"the configuration has no key {missing}. There are: {known}", command_line.UNUSABLE
    except (flags.Error, ValueError, TypeError, OSError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        told = command_line.message(error)
        is_command = isinstance(error, flags.Error) and "--config" not in told
        status = command_line.WRONG_COMMAND_LINE if is_command else command_line.UNUSABLE
    sys.exit(command_line.failed(_NAME, told, status))


def _read_config(given: str) -> ConfigDict:
    """Read a configuration file. Raises ValueError in one line where ml_collections shows a traceback or nothing."""
    path, *argument = given.split(":", 1)
    if not Path(path).is_file():
        raise ValueError(f"--config={given}: there is no such file; configs/ has some")
    try:
        config = runpy.run_path(path)["get_config"](*argument)
    except KeyError as error:
        told = "get_config() is missing" if error.args == ("get_config",) else f"KeyError: {error}"
        raise ValueError(f"--config={given} cannot be used ({told})") from error
    except Exception as error:  # any kind: the file is a program
        told = f"{type(error).__name__}: {command_line.message(error)}"
        raise ValueError(f"--config={given} cannot be used ({told})") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={given}: get_config() returned {type(config).__name__}, allowed is a ConfigDict")
    return config


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
