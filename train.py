"""Train a model from a configuration; the same command started again resumes the run.

  python train.py --config=configs/r2_balanced.py                       # into runs/r2_balanced
  python train.py --config=configs/r2_dustbin.py --config.loss.sparse_ce=1.0 --workdir=runs/supervised
  python train.py --config=configs/r2_balanced.py --config.data.dir=runs/pfam --config.total_steps=2000

The folder of a run holds config.json, metrics.jsonl and checkpoints/. Score it with eval.py.

All devices of this machine share a batch; --config.mesh says how. On several machines, or in several processes of one,
start the same command in each, with one --workdir and one --config.data.dir that all of them see, and

  --coordinator=HOST:PORT --processes=2 --process=0     # and --process=1 in the other; HOST is where process 0 runs
  --coordinator=auto                                    # on a TPU slice or a cluster that JAX knows

A run may be resumed with another number of processes or devices; its batches stay the same.

Progress is a bar on a terminal and a line now and then elsewhere; --quiet shows none.

Ctrl-C, SIGTERM and SIGHUP stop the run after the step in progress; it is saved. A second one ends it at once.

Exit codes: 0, finished; 75, stopped by a signal (after saving) or by the loss of another process: start it again;
130, ended by Ctrl-C without saving; anything else: see the message.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import command_line
from configs import base
from evaluation.runs import make_trainer
from evaluation.tasks import task_of
from training import memory, run_folder, sharding
from training.checkpoints import set_damaged_aside
from training.nonfinite_guard import NonFiniteError, NonFinitePolicy, TrainedStep, Verdict
from training.processes import in_all_processes, is_first_process, join, warn
from training.session import Parts, Profile, Session
from training.signals import stop_requests
from training.state import TrainState

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again"

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/r2_balanced.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/<name of the configuration>")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several processes train together: HOST:PORT of process 0, the same in all of them, or auto"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are; with --coordinator=HOST:PORT")
_PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; with --coordinator=HOST:PORT")
_QUIET = flags.DEFINE_bool("quiet", False, "show no progress; warnings and errors stay")


class Stopped(Exception):
    """A signal came in the middle of a run; the run is saved."""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"train.py: unknown argument {argv[1]!r}; options are written --name=value, see --help")
    if _CONFIG.value is None:
        sys.exit("train.py: --config is missing, for example --config=configs/r2_balanced.py")
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file it writes
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"), quiet=_QUIET.value)
    except (ValueError, TypeError, OSError, NonFiniteError) as error:
        sys.exit(f"train.py: {error}")
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        sys.exit(command_line.INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"train.py: another process is gone; start all of them again to go on ({error})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(STOPPED)  # JAX would wait for the others to end with this one


def train(config: ConfigDict, workdir: Path, *, quiet: bool = False) -> TrainState:
    """Start or resume a run, together with the other processes if there are any, and return its final state.

    Its progress is shown on stderr unless `quiet`. Raises ValueError or OSError if a setting, the data or the folder
    cannot be used; NonFiniteError if `config.train` ends the run at a loss or gradient that is not finite; Stopped if a
    signal came (training/signals.py), and the run is saved.
    """
    # ---- model, data and folder ----
    parts = in_all_processes(prepare, config, workdir)
    with contextlib.ExitStack() as resources:
        requests = resources.enter_context(stop_requests())
        for damage in in_all_processes(open_folder, config, workdir, resources):
            warn(damage)
        in_all_processes(run_folder.check_shared, workdir, config)

        # ---- start or resume ----
        session = Session(config, workdir, parts, resources, quiet=quiet)
        if session.start == 0:
            session.save()
        if session.lacks_validation(session.start):
            session.validate(session.start, requests)

        # ---- the loop: step n is checked and logged while step n + 1 computes ----
        update = parts.trainer.compiled_update(parts.mesh)
        # On CPUs the collectives of two steps at once can wait for each other for ever.
        one_at_a_time = jax.default_backend() == "cpu" and parts.mesh.size > 1
        profile = Profile(workdir, config, session.start)
        step, stop, unchecked = session.start, requests.noted, list[TrainedStep]()
        while step < config.total_steps and not stop:
            step += 1
            profile.before(step)
            batch = session.next_batch()
            ids = batch.pop("id")
            session.state, metrics = update(session.state, batch)
            if one_at_a_time:
                jax.block_until_ready(session.state)
            profile.after(step, session.state)
            unchecked.append(TrainedStep(step, parts.batches.step, metrics, ids))
            stop = requests.came(step)
            save = step % config.checkpoint.every == 0 or step == config.total_steps or stop
            evaluate = session.is_evaluated(step) and not stop
            due = len(unchecked) - (0 if save or evaluate else 1)  # nothing is saved or evaluated unchecked
            checked, unchecked = unchecked[:due], unchecked[due:]
            bad = next((one for one in checked if session.record(one) is Verdict.ROLL_BACK), None)
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


def prepare(config: ConfigDict, workdir: Path) -> Parts:
    """Make the parts of a run without touching its folder. Raises ValueError or OSError if something does not fit."""
    policy = NonFinitePolicy(**config.train)
    run_folder.check_workdir(workdir, config)
    task, trainer = task_of(config), make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(**config.mesh), config.batch_size)
    if config.batch_size % (mesh.shape["data"] * config.optimizer.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by optimizer.accumulate={config.optimizer.accumulate} "
            f"times mesh.data={mesh.shape['data']}"
        )
    score, batches = task.validation(trainer, mesh) if config.log.eval_every else None, task.batches(mesh)
    memory.check(trainer, mesh, batches.stream.largest(), config)
    return Parts(policy, trainer, mesh, batches, score)


def open_folder(config: ConfigDict, workdir: Path, resources: contextlib.ExitStack) -> list[str]:
    """Lock the folder, write the configuration and set damaged checkpoints aside, with a message for each.

    Only the first process does it.
    """
    if not is_first_process():
        return []
    resources.enter_context(run_folder.run_lock(workdir))
    run_folder.check_workdir(workdir, config)  # again: from now on no other run changes it
    run_folder.replace(workdir / "config.json", run_folder.as_text(config))
    return set_damaged_aside(workdir)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags; tell mistakes in one line where ml_collections would show a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        settings = run_folder.differences({}, json.loads(base.get_config().to_json()))
        known = ", ".join(f"--config.{key}" for key, *_ in settings)
        missing = " ".join(str(error.args[0]).split())
        sys.exit(f"train.py: the configuration has no key {missing}. There are: {known}")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
