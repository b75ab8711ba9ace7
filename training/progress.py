"""Show a run in progress: a progress bar, and a profiler trace of a few steps."""

from pathlib import Path

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from training.processes import is_first_process

_TRACED = 3  # steps


class Progress(tqdm):
    """Progress bar of the first process that can go back."""

    def __init__(self, workdir: Path, total_steps: int, start: int):
        super().__init__(
            total=total_steps,
            initial=start,
            unit=" steps",
            desc=workdir.name,
            smoothing=0.05,
            mininterval=1,
            disable=not is_first_process(),
        )

    def reset_to(self, step: int) -> None:
        self.initial = self.n = step
        self.refresh()


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

    def after(self, step: int, result: object) -> None:
        """Stop the trace after its last step, once the step's result is computed."""
        if step == self.last and self.running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.running = False
