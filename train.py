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
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import jax
import numpy as np
import wandb
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import eval as evaluation
from configs import base
from data import pfam, pipeline, sorting
from models import sharding
from models.state import Checkpoints, Trainer, TrainState

T = TypeVar("T")

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/r2_balanced.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/<name of the configuration>")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several processes train together: HOST:PORT of process 0, the same in all of them, or auto"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are; with --coordinator=HOST:PORT")
_PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; with --coordinator=HOST:PORT")

# What may change when a run goes on; anything else makes it another run.
_FREE_KEYS = ("total_steps", "checkpoint.", "log.", "mesh.", "data.workers", "data.prefetch", "model.implementation")
_TRACED = 3  # steps


class NonFiniteError(Exception):
    """Loss or gradient is NaN or infinite."""


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
        jax.config.update("jax_enable_preemption_service", False)  # or SIGTERM would end nothing
        try:
            jax.distributed.initialize(None if auto else coordinator, processes, process)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--coordinator={coordinator}: no connection to the other processes: {error}") from error


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Runs or resumes, together with the other processes if there are any; returns the final state."""
    # ---- the run's folder, data, model ----
    trainer, mesh, iterator, validate = in_all_processes(lambda: prepare(config, workdir))

    # ---- resume ----
    leads = jax.process_index() == 0  # writes everything but the checkpoints, to which all contribute
    settings = json.dumps(json.loads(config.to_json()), indent=1) + "\n"
    in_all_processes(lambda: write_settings(workdir, settings))
    in_all_processes(lambda: check_shared(workdir, settings))
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
    if checkpoints.steps():
        state, position = checkpoints.restore(trainer.abstract_state(mesh))
        iterator.set_state(position)
    else:
        state = trainer.initial_state(mesh)
    start = int(state.step)
    log = MetricsLog(workdir, config, start)
    if leads:
        print(f"{workdir}: step {start} of {config.total_steps}, {iterator.stream.description()}")
    if start == 0:
        checkpoints.save(state, iterator.get_state(), config.to_dict())
        if validate:
            log.write(0, validate(state))

    # ---- the loop: step n is checked and logged while step n + 1 computes ----
    update = trainer.compiled_update(mesh)
    # Collectives of two steps on the threads of a CPU can wait for each other for ever.
    one_at_a_time = jax.default_backend() == "cpu" and mesh.size > 1
    progress = tqdm(
        total=config.total_steps,
        initial=start,
        unit=" steps",
        desc=workdir.name,
        smoothing=0.05,
        mininterval=1,
        disable=not leads,
    )
    previous = None
    for step in range(start + 1, config.total_steps + 1):
        if leads and step == config.log.trace:
            jax.profiler.start_trace(workdir / "trace")
        asked = time.perf_counter()
        examples = next(iterator)
        log.waited += time.perf_counter() - asked
        batch = sharding.from_hosts(cast(dict, examples), mesh)
        ids = batch.pop("id")
        state, metrics = update(state, batch)
        if one_at_a_time:
            jax.block_until_ready(state)
        if previous:
            check_and_log(*previous, log, progress, workdir)
        previous = step, metrics, ids
        last_traced = min(config.log.trace + _TRACED - 1, config.total_steps)
        if leads and step == last_traced and start < config.log.trace <= step:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        save = step % config.checkpoint.every == 0 or step == config.total_steps
        evaluate = validate and (step % config.log.eval_every == 0 or step == config.total_steps)
        if save or evaluate:
            check_and_log(*previous, log, progress, workdir)  # nothing is kept of a step that was not checked
            previous = None
        if save:
            checkpoints.save(state, iterator.get_state(), config.to_dict())
        if evaluate:
            log.write(step, validate(state))

    # ---- finish ----
    progress.close()
    checkpoints.close()
    iterator.close()
    log.close()
    return state


def prepare(config: ConfigDict, workdir: Path) -> tuple[Trainer, Mesh, pipeline.BatchIterator, Callable | None]:
    """Trainer, mesh, this process's part of the batches, and validation if it is wanted; the folder is not touched."""
    check_workdir(workdir, config)
    trainer = evaluation.make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(**config.mesh), config.batch_size)
    if config.batch_size % (mesh.shape["data"] * config.optimizer.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by optimizer.accumulate={config.optimizer.accumulate} "
            f"times mesh.data={mesh.shape['data']}"
        )
    make_batches = sorting_batches if evaluation.sorts(config) else pair_batches
    iterator, score = make_batches(trainer, mesh, config)
    return trainer, mesh, iterator, validation(score) if score else None


def validation(score: Callable[[TrainState], dict]) -> Callable[[TrainState], dict[str, float]]:
    """A function from the state to the model's metrics on a fixed sample of the validation split.

    Every process computes all of them from the same predictions, so that all go on together.
    """

    def validate(state: TrainState) -> dict[str, float]:
        overall = score(state)["model"]["overall"]
        return {f"validation/{name}": metric["value"] for name, metric in overall.items()}

    return validate


def pair_batches(
    trainer: Trainer, mesh: Mesh, config: ConfigDict
) -> tuple[pipeline.BatchIterator, Callable[[TrainState], dict] | None]:
    """This process's part of the batches of pairs, and, if wanted, how a state is scored on the validation split."""
    data_dir = evaluation.resolve_data_dir(config.data.dir)
    options = {key: value for key, value in config.data.items() if key != "dir"}
    pipeline_config = pipeline.PipelineConfig(batch_size=config.batch_size, seed=config.seed, **options)
    shard_index, shard_count = sharding.host_shard(mesh)
    iterator = pipeline.train_iterator(
        pfam.open_split(data_dir, "train"), pipeline_config, shard_index=shard_index, shard_count=shard_count
    )
    if not config.log.eval_every:
        return iterator, None
    families = pfam.open_split(data_dir, "validation")
    predict = trainer.compiled_evaluation(evaluation.predictor(trainer), mesh)

    def score(state: TrainState) -> dict:
        batches = pipeline.evaluation_batches(
            families,
            config.batch_size,
            config.data.buckets,
            limit=config.log.eval_pairs,
            divisible_by=mesh.shape["data"],
        )
        return evaluation.score_split(functools.partial(predict, state.ema), families, batches)

    return iterator, score


def sorting_batches(
    trainer: Trainer, mesh: Mesh, config: ConfigDict
) -> tuple[pipeline.BatchIterator, Callable[[TrainState], dict] | None]:
    """The same of the sorting task."""
    sorting_config = evaluation.sorting_config(config)
    shard_index, shard_count = sharding.host_shard(mesh)
    stream = sorting.SortingStream(sorting_config, shard_index=shard_index, shard_count=shard_count)
    iterator = pipeline.BatchIterator(stream)
    if not config.log.eval_every:
        return iterator, None
    write = trainer.compiled_evaluation(evaluation.writer(trainer), mesh)

    def score(state: TrainState) -> dict:
        batches = sorting.evaluation_batches(sorting_config, "validation", config.log.eval_pairs)
        return evaluation.score_sorting(functools.partial(write, state.ema), batches)

    return iterator, score


def check_and_log(step: int, metrics: dict, ids: jax.Array, log: "MetricsLog", progress: tqdm, workdir: Path) -> None:
    """Stops the run at a non-finite loss or gradient, naming its batch; else logs it. `ids`: of the global batch."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    residues = round(values.pop("residues"))
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        path = workdir / f"nonfinite_{step}.json"
        told = {"step": step, "metrics": values, "ids": multihost_utils.process_allgather(ids, tiled=True).tolist()}
        if jax.process_index() == 0:
            path.write_text(json.dumps(told) + "\n")
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The batch (family, row of "
            f"x, row of y in the train split) is in {path}. Checkpoints hold earlier steps only: start again to resume "
            "from the last one; if it comes back, lower optimizer.learning_rate in another workdir"
        )
    log.step(step, values, len(ids), residues)
    progress.update()
    progress.set_postfix_str(f"loss {values['loss']:.3f}, {log.residues_per_second:,.0f} residues/s", refresh=False)


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


class MetricsLog:
    """Lines of metrics.jsonl, and the same to W&B. Lines beyond the step a run resumes from are dropped first.

    Counts in every process, writes in the first.
    """

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.path, self.every = workdir / "metrics.jsonl", config.log.every
        self.residues_per_second = 0.0
        self.waited = 0.0  # seconds, for batches
        self._time, self._residues, self._examples = time.perf_counter(), 0, 0
        self._wandb = None
        if jax.process_index() > 0:
            return
        if self.path.exists():
            kept = [row for row in evaluation.read_metrics(workdir) if row["step"] <= start and start > 0]
            replace(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb = wandb.init(
            project="ot-attention",
            name=workdir.name,
            dir=workdir,
            config=config.to_dict(),
            mode=config.log.wandb,
            settings=wandb.Settings(silent=config.log.wandb != "online"),
        )

    def step(self, step: int, values: dict[str, float], examples: int, residues: int) -> None:
        """Counts a training step; every so many steps writes a line with the rates since the last one."""
        self._residues, self._examples = self._residues + residues, self._examples + examples
        seconds = time.perf_counter() - self._time
        if step % self.every == 0 or step == 1:
            self.residues_per_second = self._residues / seconds
            rates = {
                "residues_per_second": self.residues_per_second,
                "examples_per_second": self._examples / seconds,
                "data_share": self.waited / seconds,
            }
            self.write(step, values | rates)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line; the clock of the rates starts anew."""
        if self._wandb:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            self._wandb.log(values, step=step)
        self.waited, self._time, self._residues, self._examples = 0.0, time.perf_counter(), 0, 0

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError if the folder holds a run of another configuration."""
    path, wanted = workdir / "config.json", json.loads(config.to_json())
    if path.exists():
        found = json.loads(path.read_text())
        changed = [
            f"{key} was {old!r}, is {new!r}"
            for key, old, new in differences(found, wanted)
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
    """Writes a file whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
