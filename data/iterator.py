"""Training batches made ahead, on a thread or in worker processes, and resumed by step number."""

import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

_LAST_STEP = 2**40  # Grain wants a length; no run gets there
_RESTARTS = 3  # of dead worker processes, before one batch
# A terminal, and programs that end others, send these to all processes of a group. Workers end with their parent.
_OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@runtime_checkable
class Stream(Protocol):
    """Training batches as a pure function of the step. Picklable."""

    config: Any  # with `workers` and `prefetch`
    bad: tuple[str, ...]  # messages about the records that were left out
    content: str  # hash of the data, "" where the settings decide all of it

    def __getitem__(self, step: int) -> Any: ...
    def largest(self) -> Any: ...  # batch of the largest shape, whose arrays take no memory
    def fingerprint(self) -> str: ...  # hash of all that decides which data are drawn, `content` apart
    def description(self) -> str: ...  # phrase for the first line of a run


class BatchIterator(grain.DatasetIterator):
    """Endless iterator over a `Stream`; Grain makes the batches ahead on a thread or in worker processes.

    Its state is the number of the next step. Grain's own state is tied to the number of workers; this one can be
    restored with other `workers` and on another number of hosts. Grain's Orbax handlers accept the iterator but write
    one file a process; to restart on another number of processes, save `get_state()` as JSON (ocp.args.JsonSave).

    Worker processes need parsed absl flags (`absl.app.run`) and `if __name__ == "__main__"` in the main script.
    """

    def __init__(self, stream: Stream, start_step: int = 0):
        super().__init__()
        self.stream = stream
        self._fingerprint = stream.fingerprint()
        # Worker processes inherit the signals that the thread blocks.
        self._starter = ThreadPoolExecutor(1, initializer=_block_signals) if stream.config.workers else None
        self._seek(start_step)

    def __next__(self) -> Any:
        """Return the next batch. Dead worker processes (out of memory, for example) are replaced a few times."""
        workers = self.stream.config.workers
        for _ in range(_RESTARTS):
            try:
                batch = self._starter.submit(next, self._batches).result() if self._starter else next(self._batches)
            except RuntimeError as error:  # Grain's type for errors of the stream and for a dead worker alike
                if not workers or "terminated unexpectedly" not in str(error):
                    raise
                warnings.warn(f"a worker process died before batch {self.step}; all are started again", stacklevel=2)
                self._batches.close()
                self._seek(self.step)
            else:
                self.step += 1
                # Grain unlinks the shared memory that arrays of worker processes are in.
                return {name: np.array(array) for name, array in batch.items()} if workers else batch
        raise OSError(
            f"data.workers={workers}: worker processes died {_RESTARTS} times before batch {self.step}, perhaps for "
            "want of memory; start again with fewer, or 0"
        )

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, "stream": self._fingerprint, "content": self.stream.content}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at the saved step. Raises ValueError as `check` does."""
        self.check(state)
        self._batches.close()
        self._seek(state["step"])

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state is of a stream with another seed, batch size, buckets, cap or data.

        The data's place and name do not matter. States of earlier versions tell data of other lengths only.
        """
        if state["stream"] != self._fingerprint:
            raise ValueError(
                f"the batches of the saved run are others (stream {state['stream']}, this is {self._fingerprint}): "
                "they differ in the data at data.dir or their weights, in seed, batch_size, or a setting of data "
                "(buckets, shares, caps); give the values of the saved run, or start a new one in another --workdir"
            )
        if state.get("content", self.stream.content) != self.stream.content:
            raise ValueError(
                f"the saved run was trained on other sequences or alignments (hash {state['content']}, of the training "
                f"split at data.dir {self.stream.content}); give its data, or start a new run in another --workdir"
            )

    def close(self) -> None:
        self._batches.close()
        if self._starter:
            self._starter.shutdown()
        super().close()

    def _seek(self, step: int) -> None:
        self.step = step
        config = self.stream.config
        steps = grain.MapDataset.range(step, _LAST_STEP).map(self.stream.__getitem__)
        # One thread: making a batch is Python code, and more threads would only compete for the interpreter.
        ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch))
        if config.workers:
            options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch)
            ahead = ahead.mp_prefetch(options, _end_with_parent)
        self._batches = iter(ahead)


def _block_signals() -> None:
    """Block signals in this thread, in processes that it starts, and in the process that frees their shared memory."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
    resource_tracker.ensure_running()  # which unblocks some of them in this thread
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)


def _end_with_parent(worker: int, workers: int) -> None:
    """End this worker process when its parent is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def shard_rows(batch_size: int, shard_index: int, shard_count: int) -> slice:
    """Return the rows of the global batch that belong to one host."""
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index: {shard_index} was given, allowed is 0 to shard_count - 1 = {shard_count - 1}")
    if batch_size % shard_count:
        raise ValueError(f"batch_size: {batch_size} was given, allowed are multiples of shard_count = {shard_count}")
    part = batch_size // shard_count
    return slice(shard_index * part, (shard_index + 1) * part)
