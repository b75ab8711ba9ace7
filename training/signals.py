"""Signals that ask a run to stop: at the first it saves and ends, at the second it ends at once."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from training.processes import warn

# Ctrl-C, the machine, and a terminal that was closed.
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
_ONE_REQUEST = 0.1  # seconds; timeout(1) sends its signal to the process, and at once again to all of its group
_PATIENCE = 3  # seconds until a user is told that the program has understood


class StopRequestedError(Exception):
    """A signal came while something was done that can be done again later."""


class StopRequests:
    """Signals that came to this process, or to another one of a run of several."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._several = jax.process_count() > 1

    @property
    def name(self) -> str:
        """Name of the signal that came first."""
        # Several processes pass on a request as SIGTERM.
        return _NAMES[signal.Signals(self._first or signal.SIGTERM)]

    def came(self, step: int) -> bool:
        """Tell after a step whether to stop: in all processes after the same step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self.noted

    @property
    def noted(self) -> bool:
        """Tell whether a signal came to this process, if it is the only one."""
        return self._first is not None and not self._several

    def raise_if_noted(self) -> None:
        """Raise StopRequestedError if a signal came; not in several processes, where none may leave the others."""
        if self.noted:
            raise StopRequestedError

    def handle(self, number: int, frame: object) -> None:
        """Note a signal, as a handler of Python."""
        self._first = self._first or number

    def watch(self, signals: int) -> None:
        """Read the numbers of signals from a file until its end, and end the process at the second one."""
        began = told = None
        while True:
            waiting = began is not None and not told
            if not select.select([signals], [], [], _PATIENCE if waiting else None)[0]:
                told = True
                warn("it stops when the work in progress is done and saved; the same again ends it at once")
            elif not (numbers := os.read(signals, 64)):
                return
            elif began is None:
                began = time.monotonic()
                self.handle(numbers[0], None)
                if self._several and numbers[0] != signal.SIGTERM:
                    os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it, and brings the processes to agree on a step
            elif time.monotonic() - began > _ONE_REQUEST:
                os._exit(128 + numbers[0])


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Note signals instead of ending at them. A signal that is ignored, as under nohup(1), stays ignored.

    Handlers of Python run between two of its instructions, and compiling a program for minutes is one. So a thread
    reads the signals too. Outside the main thread, which alone can handle signals, none are noted.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=requests.watch, args=(reader,), daemon=True)
    watcher.start()
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    left_alone = {signal.SIGTERM} if jax.process_count() > 1 else set()  # JAX has a handler of its own
    before = {number: signal.getsignal(number) for number in _NAMES.keys() - left_alone}
    ours = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, requests.handle)
    try:
        yield requests
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        os.close(writer)
        watcher.join()
        os.close(reader)
