"""Trains an aligner from a configuration, and goes on where it stopped when started again.

  python train.py --config=configs/r2_balanced.py                       # into runs/r2_balanced
  python train.py --config=configs/r2_dustbin.py --config.loss.sparse_ce=1.0 --workdir=runs/supervised
  python train.py --config=configs/r2_balanced.py --config.data.dir=runs/pfam --config.total_steps=2000

The folder of a run holds config.json, metrics.jsonl and checkpoints/. Score it with eval.py.
"""

import functools
import json
import math
import sys
import time
from pathlib import Path

import jax
import wandb
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import eval as evaluation
from configs import base
from data import pfam, pipeline
from models.state import Checkpoints, TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file, e.g. configs/r2_balanced.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default: runs/<name of the configuration>")

# What may change when a run goes on; anything else makes it another run.
_FREE_KEYS = ("total_steps", "checkpoint.", "log.", "data.workers", "data.prefetch", "model.implementation")
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
        train(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"))
    except (ValueError, TypeError, OSError, NonFiniteError) as error:
        sys.exit(f"train.py: {error}")


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Runs or resumes; returns the final state."""
    # ---- the run's folder, data, model ----
    check_workdir(workdir, config)
    data_dir = evaluation.resolve_data_dir(config.data.dir)
    trainer, state = evaluation.make_trainer(config)
    options = {key: value for key, value in config.data.items() if key != "dir"}
    pipeline_config = pipeline.PipelineConfig(batch_size=config.batch_size, seed=config.seed, **options)
    iterator = pipeline.train_iterator(pfam.open_split(data_dir, "train"), pipeline_config)
    validate = validation(trainer, data_dir, config) if config.log.eval_every else None

    # ---- resume ----
    replace(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=1) + "\n")
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
    if checkpoints.steps():
        state, position = checkpoints.restore(state)
        iterator.set_state(position)
    start = int(state.step)
    log = MetricsLog(workdir, config, start)
    left_out = iterator.stream.index.left_out
    print(f"{workdir}: step {start} of {config.total_steps}, {left_out:.1%} of pairs longer than the largest bucket")
    if start == 0:
        checkpoints.save(state, iterator.get_state(), config.to_dict())
        if validate:
            log.write(0, validate(state))

    # ---- the loop: step n is checked and logged while step n + 1 computes ----
    update = jax.jit(trainer.update, donate_argnums=0)
    progress = tqdm(
        total=config.total_steps, initial=start, unit=" steps", desc=workdir.name, smoothing=0.05, mininterval=1
    )
    previous = None
    for step in range(start + 1, config.total_steps + 1):
        if step == config.log.trace:
            jax.profiler.start_trace(workdir / "trace")
        asked = time.perf_counter()
        batch = next(iterator)
        log.waited += time.perf_counter() - asked
        ids = batch.pop("id")
        state, metrics = update(state, batch)
        if previous:
            check_and_log(*previous, log, progress, workdir)
        previous = step, metrics, ids, int(batch["x_length"].sum() + batch["y_length"].sum())
        if step == min(config.log.trace + _TRACED - 1, config.total_steps) and start < config.log.trace <= step:
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


def validation(trainer, data_dir: Path, config: ConfigDict):
    """A function from the state to the model's metrics on a fixed sample of the validation split."""
    families = pfam.open_split(data_dir, "validation")
    predict = jax.jit(evaluation.predictor(trainer))

    def validate(state: TrainState) -> dict[str, float]:
        scores = evaluation.score_split(
            functools.partial(predict, state.ema),
            families,
            config.batch_size,
            config.data.buckets,
            limit=config.log.eval_pairs,
        )
        overall = scores["model"]["overall"]
        return {f"validation/{name}": metric["value"] for name, metric in overall.items()}

    return validate


def check_and_log(step, metrics, ids, residues, log: "MetricsLog", progress: tqdm, workdir: Path) -> None:
    """Stops the run at a non-finite loss or gradient, naming its batch; else logs the step."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        path = workdir / f"nonfinite_{step}.json"
        path.write_text(json.dumps({"step": step, "metrics": values, "ids": ids.tolist()}) + "\n")
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The batch (family, row of "
            f"x, row of y in the train split) is in {path}. Checkpoints hold earlier steps only: start again to resume "
            "from the last one; if it comes back, lower optimizer.learning_rate in another workdir"
        )
    log.step(step, values, len(ids), residues)
    progress.update()
    progress.set_postfix_str(f"loss {values['loss']:.3f}, {log.residues_per_second:,.0f} residues/s", refresh=False)


class MetricsLog:
    """Lines of metrics.jsonl, and the same to W&B. Lines beyond the step a run resumes from are dropped first."""

    def __init__(self, workdir: Path, config: ConfigDict, start: int):
        self.path, self.every = workdir / "metrics.jsonl", config.log.every
        self.residues_per_second = 0.0
        self.waited = 0.0  # seconds, for batches
        self._time, self._residues, self._examples = time.perf_counter(), 0, 0
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
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        self._wandb.log(values, step=step)
        self.waited, self._time, self._residues, self._examples = 0.0, time.perf_counter(), 0, 0

    def close(self) -> None:
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
