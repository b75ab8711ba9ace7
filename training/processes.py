"""Several processes: join those that train together, let them fail together, exchange text; end children in time."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

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
        tell(f"train.py: {text}", sys.stderr)


def tell(text: str, stream: Any) -> None:
    """Print a line above a progress bar. A stream that nobody reads any more, as of a closed terminal, is given up."""
    if stream is None:  # it was closed when the program started
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
def ended_with_parent(target: int, number: signal.Signals) -> Iterator[None]:
    """Have a signal sent to a process if this one dies before the block ends, by SIGKILL too.

    A shell waits for the end of a pipe that only this process can write to. Linux alone could tell the child itself.

    target: Identifier of a process, or of a group of processes with a minus sign.
    """
    script = 'read -r line || kill -s "$1" -- "$2"'
    command = ["sh", "-c", script, "sh", number.name.removeprefix("SIG"), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as guard:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                guard.communicate("done\n")
