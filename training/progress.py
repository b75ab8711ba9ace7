"""Progress of a run on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

from training.processes import tell

_SECONDS = 10  # at least, between two lines


class Progress:
    """Progress from the step `start` to the step `total`; nothing is shown if `quiet`.

    every: Steps between lines at least; 0 for no lines.
    """

    def __init__(self, name: str, start: int, total: int, every: int, *, quiet: bool):
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._total, self._every = total, 0 if quiet or on_terminal else every
        self._began: tuple[int, float] | None = None  # step and time of the first line
        self._shown = float("-inf")  # time of the last line
        bar = {"desc": name, "unit": " steps", "initial": start, "disable": quiet or not on_terminal}
        self._bar = tqdm(total=total, smoothing=0.05, mininterval=1, **bar)

    def show(self, step: int, loss: float, residues_per_second: float) -> None:
        """Show a step that was taken."""
        rate = f"{residues_per_second:,.0f} residues/s"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate}", refresh=False)
        self.move(step)
        now = time.monotonic()
        due = step == self._total or (step % max(self._every, 1) == 0 and now - self._shown >= _SECONDS)
        if self._every and due:
            tell(f"step {step:,} of {self._total:,}, loss {loss:.3f}, {rate}{self._left(step, now)}", sys.stderr)
            self._shown = now

    def move(self, step: int) -> None:
        """Go to a step, perhaps back, without its figures."""
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()

    def _left(self, step: int, now: float) -> str:
        """Estimate the time from all steps since the first line, before which programs were compiled."""
        if self._began is None or step <= self._began[0]:  # after a return to a checkpoint steps are counted anew
            self._began = step, now
            return ""
        first, then = self._began
        return f", {duration((self._total - step) * (now - then) / (step - first))} left"


def duration(seconds: float) -> str:
    """Return a duration in its largest fitting unit."""
    for unit, size in ("h", 3600), ("min", 60):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
