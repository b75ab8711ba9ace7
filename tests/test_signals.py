"""A run is stopped softly by one signal and at once by two, nothing outlives its parent, and progress ends no run."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from evaluation import scoring
from scripts import launch_screen
from tests.support import tiny
from tests.support.run import config, rows, steps_of
from training import processes, progress, signals
from training.session import Session
from training.signals import stop_requests

PATIENCE = 200  # seconds, on a machine with much other work


def started(script: str, *arguments: object, folder: Path) -> subprocess.Popen:
    """A program in a group of its own, as a terminal starts it; scripts print "ready"."""
    path = folder / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(path), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


def read_line(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.strip()


def gone(process: int) -> bool:
    """Tell whether a process ends within some seconds; one that nobody waits for stays as a zombie."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(150):
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


# ---- the first signal ----


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")])
def test_ctrl_c_and_a_closed_terminal_save_as_sigterm_does(number, name, tmp_path, monkeypatch):
    record = Session.record

    def then_signal(self, step):
        verdict = record(self, step)
        if step.number == 3:
            signal.raise_signal(number)
        return verdict

    monkeypatch.setattr(Session, "record", then_signal)
    before = signal.getsignal(number)
    with pytest.raises(train.Stopped, match=rf"stopped by {name}, step (4|5) is saved; the same command goes on"):
        train.train(config(), tmp_path / "run")
    assert steps_of(tmp_path / "run")[-1] == str(rows(tmp_path / "run")[-1]["step"])
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


def test_a_validation_is_cut_short_and_made_up_for(tmp_path, monkeypatch):
    """Step 5 is no multiple of checkpoint.every, and saved all the same."""

    def interrupted(model, families, batches, *, see):
        signal.raise_signal(signal.SIGTERM)
        see(None)
        pytest.fail("it was not cut short")

    settings = config(log__eval_every=5, total_steps=5, data__buckets=(128,))
    monkeypatch.setattr(Session, "lacks_validation", lambda self, step: step == 5)  # not of step 0
    monkeypatch.setattr(scoring, "score_split", interrupted)
    with pytest.raises(train.Stopped, match="step 5 is saved"):
        train.train(settings, tmp_path / "run")
    assert "5" in steps_of(tmp_path / "run") and not any("validation/f1" in row for row in rows(tmp_path / "run"))
    monkeypatch.undo()
    scores = {"model": {"overall": {"f1": {"value": 0.5}}}}
    monkeypatch.setattr(scoring, "score_split", lambda *_, **__: scores)
    train.train(settings, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if "validation/f1" in row] == [5]


def test_what_is_ignored_stays_ignored():
    """nohup(1) and shells that start a program in the background count on it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert not requests.noted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_that_gets_no_signals_works_without():
    found = []

    def work():
        with stop_requests() as requests:
            found.append(requests.came(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_one_of_several_processes_passes_ctrl_c_on_as_sigterm(monkeypatch):
    """JAX notes SIGTERM, and lets all processes save the same step."""
    sent = []
    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.os, "kill", lambda process, number: sent.append((process, number)))
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as requests:
        assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
        assert not requests.noted, "it must not stop before the others"
    assert sent == [(os.getpid(), signal.SIGTERM)]


# ---- the second signal ----

# The main thread is away from Python for minutes, as while XLA compiles.
BUSY = """
import hashlib
from training.signals import stop_requests
with stop_requests():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2 * 10**9)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_program_at_once_whatever_it_does(second, tmp_path):
    process = started(BUSY, folder=tmp_path)
    try:
        assert read_line(process) == "ready"
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(second)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + second and "Traceback" not in errors


def test_two_signals_at_once_are_one(monkeypatch):
    """timeout(1) sends one to the program, and the same to its group."""
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals, "_ONE_REQUEST", 30)
    with stop_requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requests.noted and requests.came(1)
        time.sleep(0.3)
    assert ended == []


def test_a_user_who_has_to_wait_is_told(monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(signals, "_PATIENCE", 0.1)
    monkeypatch.setattr(signals, "warn", lambda text: "ends it at once" in text and told.set())
    with stop_requests():
        signal.raise_signal(signal.SIGTERM)
        assert told.wait(PATIENCE)


# ---- children ----

WORKERS = """
import signal, sys, time
from absl import app
import psutil
from data import pfam, pipeline

def main(_):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    families = pfam.open_split(sys.argv[1], "train")
    iterator = pipeline.train_iterator(families, pipeline.PipelineConfig(batch_size=4, buckets=(320,), workers=2))
    next(iterator), next(iterator)
    print(*[process.pid for process in psutil.Process().children()], flush=True)
    sys.stdin.readline()
    for _ in range(40):
        next(iterator)
    print("went on", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    app.run(main)
"""


def test_workers_ignore_signals_of_the_group_and_end_with_their_parent(tmp_path):
    """Killed workers would be replaced with a warning, so there must be none."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(script), str(tiny.ROOT / "data/default")]
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
    memory = set(Path("/dev/shm").glob("psm_*"))
    try:
        workers = [int(word) for word in read_line(process).split()]
        assert len(workers) >= 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
        process.stdin.write("\n")
        process.stdin.flush()
        assert read_line(process) == "went on"
    finally:
        process.kill()
    errors = process.communicate(timeout=PATIENCE)[1]
    assert all(map(gone, workers))
    assert "Traceback" not in errors and "worker process died" not in errors
    left = set(Path("/dev/shm").glob("psm_*")) - memory
    assert not [path for path in left if path.stat().st_uid == os.getuid() and not in_use(path)]


def in_use(path: Path) -> bool:
    """Tell whether a process has mapped shared memory; other tests may run at the same time."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if path.name in maps.read_text():
                return True
        except OSError:
            continue
    return False


CHILD = """
import os, signal, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print(os.getpid(), flush=True)
while not got:
    time.sleep(0.05)
time.sleep(1)
print(*got, flush=True)
raise SystemExit(75)
"""
SCREEN = """
import os, sys
from scripts import launch_screen
print(*launch_screen.run_child([sys.executable, "-c", sys.argv[1]], dict(os.environ)), flush=True)
"""
STAGE = """
import os, sys
from scripts import bench_gpu
with open(sys.argv[2], "w") as log:
    bench_gpu.run_limited([sys.executable, "-c", sys.argv[1]], dict(os.environ), 600, log)
"""


def test_the_screen_passes_each_signal_on_once(tmp_path):
    """A terminal sends Ctrl-C to all processes of the group; a second one would end the child without saving."""
    process = started(SCREEN, CHILD, folder=tmp_path)
    try:
        read_line(process)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert printed.splitlines() == [str(int(signal.SIGINT)), "75 1"] and errors == ""


@pytest.mark.parametrize("parent", [SCREEN, STAGE], ids=["screen", "stage"])
def test_children_of_a_killed_script_are_told_or_killed(parent, tmp_path):
    log = tmp_path / "log"
    process = started(parent, CHILD, log, folder=tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE
        child = read_line(process) if parent == SCREEN else ""
        while not child and time.monotonic() < deadline:
            child = log.read_text().strip() if log.exists() else ""
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.kill()
    assert gone(int(child))
    if parent == SCREEN:
        assert process.stdout.read().strip() == str(int(signal.SIGTERM)), "train.py saves at SIGTERM"


def test_a_child_that_ends_first_is_not_sent_anything():
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with processes.ended_with_parent(child.pid, signal.SIGKILL):
        pass
    time.sleep(0.2)
    assert child.poll() is None
    child.communicate()
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("ended", "status"), [((75, 1), 75), ((75, 0), 75), ((130, 2), 130), ((-2, 1), 75), ((1, 0), "ended with exit")]
)
def test_exit_status_of_the_screen(ended, status, tmp_path, monkeypatch):
    monkeypatch.setattr(launch_screen, "run_child", lambda *_: ended)
    args = SimpleNamespace(out=tmp_path, configs=["a"], data=None, steps=None, limit=None, overrides=[], dry_run=False)
    with pytest.raises(SystemExit) as stop:
        launch_screen.here(args)
    assert stop.value.code == status or status in str(stop.value.code)


# ---- progress ----


class Stream(io.StringIO):
    """A stderr that is a terminal, or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def shown(monkeypatch, *, terminal: bool, quiet: bool = False, every: int = 10) -> str:
    """Return the text that 100 steps write, 3 seconds each."""
    clock, stream = [0.0], Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress("run", 0, 100, every, quiet=quiet)
    for step in range(1, 101):
        clock[0] += 3
        bar.show(step, 2.25, 5300.4)
    bar.close()
    monkeypatch.undo()
    return stream.getvalue()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert lines[0] == "step 10 of 100, loss 2.250, 5,300 residues/s"
    assert lines[1] == "step 20 of 100, loss 2.250, 5,300 residues/s, 4 min left"
    assert lines[-2].endswith(", 30 s left") and lines[-1].startswith("step 100 of 100,") and len(lines) == 10
    assert len(shown(monkeypatch, terminal=False, every=1).splitlines()) == 26, "one in 10 seconds, and the last"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    assert "\r" in shown(monkeypatch, terminal=True) and "step 10 of" not in shown(monkeypatch, terminal=True)


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_no_progress(terminal, monkeypatch):
    assert shown(monkeypatch, terminal=terminal, quiet=True) == ""


def test_a_stream_that_nobody_reads_ends_no_run(tmp_path, monkeypatch):
    """The reader of a pipe has gone, as head(1) goes, or the terminal is closed."""
    streams = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, name, streams[-1])
    train.train(config(total_steps=2), tmp_path / "run")
    processes.warn("a warning")
    monkeypatch.undo()
    for stream in streams:
        stream.close()
    assert rows(tmp_path / "run")[-1]["step"] == 2


def test_a_stream_that_was_closed_at_the_start_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    bar = progress.Progress("run", 0, 3, 1, quiet=False)
    bar.show(1, 1.0, 1.0)
    bar.close()
    processes.warn("a warning")
    assert capsys.readouterr().out == "", "neither goes elsewhere"
