"""Several processes that train together: join them, let them fail and stop together, exchange text."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

T = TypeVar("T")

_PATIENCE = 30  # seconds of silence after which a process counts as dead, also at the end


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect this process to the others, as the options of train.py say. Nothing of JAX may have run before.

    Raises ValueError if the options do not fit together, or there is no connection.
    """
    auto = coordinator in (None, "auto")
    if auto and (processes, process) != (None, None):
        raise ValueError("--processes and --process need --coordinator=HOST:PORT")
    if not auto and (processes is None or process is None or not 0 <= process < processes):
        raise ValueError(
            f"--coordinator={coordinator} needs --processes=N and --process=I with I from 0 to N - 1; given were "
            f"{processes} and {process}"
        )
    if coordinator:
        patience: dict = {"heartbeat_timeout_seconds": _PATIENCE, "shutdown_timeout_seconds": _PATIENCE}
        try:
            jax.distributed.initialize(None if auto else coordinator, processes, process, **patience)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--coordinator={coordinator}: no connection to the other processes: {error}") from error


def is_first_process() -> bool:
    """Tell whether this is the first process, which writes everything but its part of checkpoints."""
    return jax.process_index() == 0


def warn(text: str) -> None:
    """Print a line to stderr, in the first process only."""
    if is_first_process():
        tqdm.write(f"train.py: {text}", file=sys.stderr)


def in_all_processes(function: Callable[..., T], *arguments) -> T:
    """Call a function in every process, and wait for all of them.

    If it fails in some process with a ValueError, TypeError or OSError, all raise the message of the first.
    """
    failed = None
    try:
        result = function(*arguments)
    except (ValueError, TypeError, OSError) as error:
        failed = error
    messages = [message for message in gather("" if failed is None else str(failed) or repr(failed)) if message]
    if not messages:
        return result
    raise failed if failed is not None and str(failed) == messages[0] else ValueError(messages[0])


def gather(text: str) -> list[str]:
    """Return the texts of all processes, in their order, to each of them."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded) + 1)))
    return [bytes(row[:size]).decode() for row, size in zip(padded, sizes, strict=True)]


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function that tells, after a step, whether SIGTERM came: in all processes after the same step.

    A second SIGTERM ends the process at once.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # JAX handles the signal, and agrees on the step
    elif threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield lambda step: False
    else:
        came = threading.Event()

        def note(number, frame) -> None:
            came.set()
            signal.signal(signal.SIGTERM, before)

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield lambda step: came.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
