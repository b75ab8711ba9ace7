"""A run in progress: what its configuration describes, and everything that records it in the run's folder."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from data import files, pipeline
from training import run_folder, sharding
from training.checkpoints import Checkpoints
from training.initial import Initial, write_record
from training.nonfinite_guard import NonFinitePolicy, TrainedStep, Verdict, guard
from training.processes import gather, is_first_process, tell, warn
from training.progress import Progress
from training.signals import StopRequestedError, StopRequests
from training.state import Trainer, TrainState

_TRACED = 3  # steps


class Parts(NamedTuple):
    """Parts of a run that its configuration describes."""

    policy: NonFinitePolicy
    trainer: Trainer
    mesh: Mesh
    update: Callable  # jitted: a training step, compiled when it is first called
    batches: pipeline.BatchIterator  # this process's part of them
    # Parameters, function that is called now and then -> tables of a sample of each split of log.eval_splits
    score: Callable[[PyTree, Callable[[], None]], dict[str, dict[str, dict]]] | None
    initial: Initial | None = None  # parameters to begin from


class Session:
    """State of a run, its place in the data, and its records in the folder."""

    def __init__(
        self, config: ConfigDict, workdir: Path, parts: Parts, resources: contextlib.ExitStack, *, quiet: bool = False
    ):
        self.config, self.workdir, self.parts = config, workdir, parts
        kept = config.checkpoint
        self.checkpoints = Checkpoints(workdir, keep=kept.keep, keep_every=kept.keep_every)
        resources.push(self._finish_saving)
        if self.checkpoints.steps():
            position = self._restore()
            parts.batches.set_state(position)
        else:
            self.state, position = self._begin(), {}
        self.start = int(self.state.step)
        self.nonfinite = position.get("nonfinite", 0)  # steps so far
        self.log = run_folder.MetricsLog(workdir, config, self.start)
        if is_first_process():
            self._introduce(parts.batches.stream)
        silent = quiet or not is_first_process()
        self.progress = Progress(workdir.name, self.start, config.total_steps, config.log.every, quiet=silent)
        resources.callback(self.progress.close)

    def next_batch(self) -> dict[str, Array]:
        asked = time.perf_counter()
        examples = next(self.parts.batches)
        self.log.waited += time.perf_counter() - asked
        return sharding.from_hosts(cast(dict, examples), self.parts.mesh)

    def record(self, step: TrainedStep) -> Verdict:
        """Check a step, and log it, or count it if its update was left out."""
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        residues, finite = round(values.pop("residues")), values.pop("finite") == 1
        verdict, policy = Verdict.KEEP, self.parts.policy
        if not finite:
            self.nonfinite += 1
            verdict = guard(policy, step, values, self.nonfinite, self.workdir)
        if verdict is Verdict.KEEP:
            counted = {} if policy.on_nonfinite == "stop" else {"nonfinite": self.nonfinite}
            self.log.step(step.number, values | counted, len(step.ids), residues)
            self.progress.show(step.number, values["loss"], self.log.residues_per_second)
        elif verdict is Verdict.SKIP:
            self.log.count(len(step.ids), residues)
            self.progress.move(step.number)
        return verdict

    def roll_back(self, bad: TrainedStep) -> int:
        """Return to the last checkpoint, go on with the batch after the bad one, and return the checkpoint's step."""
        self.checkpoints.wait()
        self.parts.batches.set_state(self._restore() | {"step": bad.batch})
        step = int(self.state.step)
        self.log.rewind(step)
        self.progress.move(step)
        return step

    def save(self) -> None:
        position = self.parts.batches.get_state() | {"nonfinite": self.nonfinite}
        self.checkpoints.save(self.state, position, self.config.to_dict())

    def is_saved(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def is_evaluated(self, step: int) -> bool:
        every = self.config.log.eval_every
        return bool(every) and (step % every == 0 or step == self.config.total_steps)

    def lacks_validation(self, step: int) -> bool:
        """Tell whether the validation of a step is missing in the log, or a split of it; the first process decides."""
        if not self.is_evaluated(step):
            return False
        logged = {name for row in run_folder.read_metrics(self.workdir) if row["step"] == step for name in row}
        found = {name.rpartition("/")[0] for name in logged}
        return gather(str(found.issuperset(self.config.log.eval_splits)))[0] == "False"

    def validate(self, step: int, requests: StopRequests) -> None:
        """Log scores of the averaged parameters. Every process computes all of them from the same predictions.

        A request to stop cuts it short; it is made up for when the run is resumed.
        """
        assert self.parts.score
        try:
            scores = self.parts.score(self.state.ema, requests.raise_if_noted)
        except StopRequestedError:
            return
        overall = {split: tables["model"]["overall"] for split, tables in scores.items()}
        values = {f"{split}/{name}": of["value"] for split, found in overall.items() for name, of in found.items()}
        self.log.write(step, values)

    def close(self) -> None:
        for resource in (self.progress, self.checkpoints, self.parts.batches, self.log):
            resource.close()
        gather("")  # all end together, however long W&B takes in the first process: JAX waits for seconds only

    def _begin(self) -> TrainState:
        """Make the state before training. What it begins from is recorded before the first checkpoint."""
        state, begun = self.parts.trainer.initial_state(self.parts.mesh), self.parts.initial
        if begun is None:
            return state
        if is_first_process():
            write_record(begun, self.workdir)
            tell(f"{self.workdir}: {begun.told()}", sys.stdout)
        return begun.into(state)

    def _restore(self) -> dict:
        self.state, position = self.checkpoints.restore(self.parts.trainer.abstract_state(self.parts.mesh))
        return position

    def _finish_saving(self, kind: type[BaseException] | None, *_) -> None:
        """Wait for the pending checkpoint when an error ends the run, unless a peer process died."""
        if kind and not issubclass(kind, jax.errors.JaxRuntimeError):
            self.checkpoints.wait()

    def _introduce(self, stream: pipeline.Stream) -> None:
        """Tell what is about to be trained, and list records that are left out."""
        tell(f"{self.workdir}: step {self.start} of {self.config.total_steps}, {stream.description()}", sys.stdout)
        if stream.bad:
            path = self.workdir / "bad_records.json"
            files.write(path, json.dumps(stream.bad, indent=1) + "\n")
            warn(f"{len(stream.bad)} damaged record(s) left out, listed in {path}: {stream.bad[0]}")


class Profile:
    """Profiler trace of a few steps from `config.log.trace` on, in `<workdir>/trace`, of the first process."""

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.folder, self.running = workdir / "trace", False
        self.first = config.log.trace if is_first_process() and config.log.trace > start else 0
        self.last = min(self.first + _TRACED - 1, config.total_steps)

    def before(self, step: int) -> None:
        if step == self.first and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, result: PyTree) -> None:
        if step == self.last and self.running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.running = False
