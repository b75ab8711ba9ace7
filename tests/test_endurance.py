"""A run of 10,000 steps, killed a hundred times, on a full disk, with workers that die."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support import processes as several
from tests.support import tiny
from tests.support.run import (
    PATIENCE,
    assert_same_run,
    program,
    rows,
    steps_of,
)
from training import checkpoints as kept
from training import run_folder


@contextlib.contextmanager
def disk_of(bytes_: int, folder: Path) -> Iterator[Path]:
    """A file system of its own; skips where that is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


LONG = {"total_steps": 10_000, "checkpoint__every": 500, "checkpoint__keep_every": 0}
OFTEN = LONG | {"checkpoint__every": 5}  # how often a run is saved does not change it
KILLS = 100


def sample(process: subprocess.Popen, folder: Path) -> Iterator[tuple[int, float, int, float]]:
    """Step, resident MB, open files and seconds of CPU of a running process, about once a second."""
    of = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), of.oneshot():
            logged = run_folder.read_metrics(folder)
            cpu = of.cpu_times()
            yield logged[-1]["step"] if logged else 0, of.memory_info().rss / 1e6, of.num_fds(), cpu.user + cpu.system
        time.sleep(1)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A run of 10,000 steps, and what it looked like from outside: rows of `sample`."""
    folder = tmp_path_factory.mktemp("long") / "run"
    process = program(folder, **LONG)
    samples = np.array(list(sample(process, folder)))
    assert process.returncode == 0, process.communicate()
    return folder, samples


@pytest.mark.slow
def test_memory_files_and_time_of_a_step_stay_flat_for_10000_steps(long_run):
    """Time is the processor's, which other work on the machine hardly changes. A step takes milliseconds."""
    _, samples = long_run
    early, late = (samples[(samples[:, 0] >= a) & (samples[:, 0] <= a + 2000)] for a in (1000, 7500))
    growth = np.median(late[:, 1]) / np.median(early[:, 1]) - 1
    files = [np.median(of[:, 2]) for of in (early, late)]
    seconds = [(of[-1, 3] - of[0, 3]) / (of[-1, 0] - of[0, 0]) for of in (early, late)]
    print(
        f"\nRSS {np.median(early[:, 1]):.0f} -> {np.median(late[:, 1]):.0f} MB ({growth:+.2%}), CPU time of a step "
        f"{seconds[0] * 1e3:.2f} -> {seconds[1] * 1e3:.2f} ms, open files {files[0]:.0f} -> {files[1]:.0f}"
    )
    assert growth < 0.02
    assert seconds[1] < 1.3 * seconds[0]
    assert files[1] == files[0]


def kill_somewhere(process: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """SIGKILL while it starts, while it saves, or at any time in its first half second of training."""
    where = rng.choices(("start", "save", "any"), (1, 5, 4))[0]
    if where == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        seen = set(steps_of(folder)) if (folder / "checkpoints").exists() else set()
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:  # until it trains
            if (folder / "checkpoints").exists() and set(steps_of(folder)) - seen:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        while where == "save" and process.poll() is None and time.monotonic() < deadline:
            if any("tmp" in path.name for path in (folder / "checkpoints").iterdir()):
                time.sleep(rng.uniform(0, 0.02))
                break
    process.kill()
    process.wait()
    halfway = (folder / "checkpoints").exists() and any("tmp" in name for name in steps_of(folder))
    return f"{where}, {'a save was in progress' if halfway else 'no save was in progress'}"


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_is_the_run_that_was_not(long_run, tmp_path):
    whole, _ = long_run
    folder, rng, told, furthest = tmp_path / "killed", random.Random(0), [], 0
    while len(told) < KILLS:
        process = program(folder, **OFTEN)
        told.append(kill_somewhere(process, folder, rng))
        assert process.returncode == -signal.SIGKILL, f"it ended before kill {len(told)}: {process.communicate()}"
        good = [int(name) for name in steps_of(folder) if name.isdigit()] if (folder / "checkpoints").exists() else []
        assert max(good, default=0) >= furthest, "a checkpoint was lost"
        furthest = max(good, default=0)
    process = program(folder, **LONG)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    print("\n", {what: told.count(what) for what in sorted(set(told))}, f"last killed at step {furthest}")
    assert sum("a save was in progress" in of_one for of_one in told) >= KILLS // 5
    assert not [name for name in steps_of(folder) if not name.isdigit()], "nothing damaged, nothing half written"
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    with disk_of(1_500_000, tmp_path / "small") as disk:
        folder = disk / "run"
        process = program(folder, total_steps=400, checkpoint__keep=100)
        _, errors = process.communicate(timeout=PATIENCE)
        last = errors.splitlines()[-1]
        print("\n", last)
        assert process.returncode == 1, errors
        assert last.startswith("train.py: ") and ("could not be written" in last or "No space left" in last)
        good = max(int(name) for name in steps_of(folder) if name.isdigit())
        assert good > 2 and kept.damage_of(folder / "checkpoints" / str(good)) is None
        subprocess.run(["mount", "-o", "remount,size=50M", str(disk)], check=True)
        process = program(folder, total_steps=good + 4, checkpoint__keep=100)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert rows(folder)[-1]["step"] == good + 4
        assert [row["step"] for row in rows(folder)] == list(range(1, good + 5))


WORKERS_DIE = """
import json, signal, sys
import numpy as np, psutil
from absl import app
from data import pfam, pipeline

def main(_):
    families = pfam.open_split(sys.argv[1], "train")
    settings = [pipeline.PipelineConfig(batch_size=4, buckets=(320,), workers=n) for n in (0, 2)]
    expected, iterator = (pipeline.train_iterator(families, of_one) for of_one in settings)
    same = []
    for step in range(60):
        if step in (3, 30):
            workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            workers[step % 2].send_signal(signal.SIGKILL)
        a, b = next(expected), next(iterator)
        same.append(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a))
    iterator.close()
    print(json.dumps([len(same), same.count(True)]))

if __name__ == "__main__":
    app.run(main)
"""


@pytest.mark.slow
def test_workers_that_die_are_replaced_and_no_batch_changes(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS_DIE)
    process = several.start(script, tiny.ROOT / "data/default")
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert json.loads(printed.splitlines()[-1]) == [60, 60]
    assert errors.count("a worker process died before batch") == 2
