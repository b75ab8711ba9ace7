"""A run in progress: what its configuration describes, and everything that records it in the run's folder."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from data import pipeline
from training import run_folder, sharding
from training.checkpoints import Checkpoints
from training.nonfinite_guard import NonFiniteGuard, NonFinitePolicy, TrainedStep, Verdict
from training.processes import gather, is_first_process, warn
from training.progress import Progress
from training.state import Trainer


class Parts(NamedTuple):
    """What a configuration describes.

    batches: This process's part of the training batches.
    score: From parameters to the summary of a fixed sample of the validation split; None if nothing is validated.
    """

    policy: NonFinitePolicy
    trainer: Trainer
    mesh: Mesh
    batches: pipeline.BatchIterator
    score: Callable[[PyTree], dict[str, dict]] | None


class Session:
    """A run in progress: its state, its place in the data, and its records in the folder."""

    def __init__(self, config: ConfigDict, workdir: Path, parts: Parts, resources: contextlib.ExitStack):
        self.config, self.workdir, self.parts = config, workdir, parts
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        self.checkpoints = Checkpoints(workdir, keep=keep, keep_every=keep_every)
        resources.push(self._finish_saving)
        if self.checkpoints.steps():
            self.state, position = self.checkpoints.restore(parts.trainer.abstract_state(parts.mesh))
            parts.batches.set_state(position)
        else:
            self.state, position = parts.trainer.initial_state(parts.mesh), {}
        self.start = int(self.state.step)
        self.guard = NonFiniteGuard(parts.policy, workdir, position.get("nonfinite", 0))
        self.log = run_folder.MetricsLog(workdir, config, self.start)
        if is_first_process():
            self._introduce(parts.batches.stream)
        self.progress = resources.enter_context(Progress(workdir, config.total_steps, self.start))

    def next_batch(self) -> dict[str, Array]:
        asked = time.perf_counter()
        examples = next(self.parts.batches)
        self.log.waited += time.perf_counter() - asked
        return sharding.from_hosts(cast(dict, examples), self.parts.mesh)

    def check(self, unchecked: list[TrainedStep], leave: int) -> TrainedStep | None:
        """Check and record steps until `leave` of them remain, or one is to be undone; return that one."""
        while len(unchecked) > leave:
            if self.record(step := unchecked.pop(0)) is Verdict.ROLL_BACK:
                return step
        return None

    def record(self, step: TrainedStep) -> Verdict:
        """Check one step, and log it or count it unless it is undone."""
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        verdict = self.guard.judge(step, values)
        examples, residues = len(step.ids), round(values.pop("residues"))
        if verdict is Verdict.KEEP:
            del values["finite"]
            counted = {} if self.parts.policy.on_nonfinite == "stop" else {"nonfinite": self.guard.nonfinite}
            self.log.step(step.number, values | counted, examples, residues)
            rate = f"{self.log.residues_per_second:,.0f} residues/s"
            self.progress.set_postfix_str(f"loss {values['loss']:.3f}, {rate}", refresh=False)
        elif verdict is Verdict.SKIP:
            self.log.count(examples, residues)
        if verdict is not Verdict.ROLL_BACK:
            self.progress.update()
        return verdict

    def roll_back(self, bad: TrainedStep) -> int:
        """Return to the last checkpoint, continue with the batch after the bad one, and return the step."""
        self.checkpoints.wait()
        self.state, position = self.checkpoints.restore(self.parts.trainer.abstract_state(self.parts.mesh))
        self.parts.batches.set_state(position | {"step": bad.batch})
        step = int(self.state.step)
        self.log.rewind(step)
        self.progress.reset_to(step)
        return step

    def save(self) -> None:
        position = self.parts.batches.get_state() | {"nonfinite": self.guard.nonfinite}
        self.checkpoints.save(self.state, position, self.config.to_dict())

    def is_evaluated(self, step: int) -> bool:
        if self.parts.score is None:
            return False
        return step % self.config.log.eval_every == 0 or step == self.config.total_steps

    def lacks_validation(self) -> bool:
        """Tell whether a kill prevented the validation of the first step; the first process decides for all."""
        return self.is_evaluated(self.start) and gather(str(self.log.was_validated(self.start)))[0] == "False"

    def validate(self, step: int) -> None:
        """Log the averaged parameters' scores. Every process computes all of them from the same predictions."""
        assert self.parts.score
        overall = self.parts.score(self.state.ema)["model"]["overall"]
        self.log.write(step, {f"validation/{name}": metric["value"] for name, metric in overall.items()})

    def close(self) -> None:
        self.progress.close()
        self.checkpoints.close()
        self.parts.batches.close()
        self.log.close()
        gather("")  # all end together, however long W&B takes in the first process: JAX waits for seconds only

    def _finish_saving(self, kind: type[BaseException] | None, *_) -> None:
        """Wait for the pending checkpoint when an error ends the run, unless a peer process died."""
        if kind and not issubclass(kind, jax.errors.JaxRuntimeError):
            self.checkpoints.wait()

    def _introduce(self, stream: pipeline.Stream) -> None:
        """Print what is about to be trained, and list records that are left out."""
        print(f"{self.workdir}: step {self.start} of {self.config.total_steps}, {stream.description()}")
        if stream.bad:
            path = self.workdir / "bad_records.json"
            run_folder.replace(path, json.dumps(stream.bad, indent=1) + "\n")
            warn(f"{len(stream.bad)} damaged record(s) left out, listed in {path}: {stream.bad[0]}")
