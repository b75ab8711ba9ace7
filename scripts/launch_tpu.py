"""Run the screen on a Cloud TPU: `python scripts/launch_screen.py --target=tpu` (docs/distributed.md).

The TPU's machine runs the same launch_screen.py on its own disk. Every few minutes it puts all runs into the bucket as
one object, `runs.tar`, which is there whole or not at all, whatever happens to the machine meanwhile. The archive is
made on the disk first, because a broken pipe would end an upload early. It leaves out checkpoints that Orbax has not
committed by renaming. It holds checkpoints before metrics.jsonl (`--sort=name`), whose surplus lines train.py drops;
the newest checkpoint it finds is not deleted before two more are written. The successor of a preempted machine starts
from that object. The loop here only makes successors: it may be stopped, and started again, at any time.
"""

import dataclasses
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Accelerators whose chips are all on one machine, and the software it boots.
_SOFTWARE = {"v6e": "v2-alpha-tpuv6e", "v5litepod": "v2-alpha-tpuv5-lite"}
RUNTIMES = {f"{kind}-{n}": software for kind, software in _SOFTWARE.items() for n in (1, 4, 8)}
_LEFT_OUT = {"runs", "__pycache__"}  # of the code, like hidden files

# Runs as root at every boot. Braces hold values to fill in; braces of the shell are doubled.
_STARTUP = """\
#!/bin/bash
export HOME="${{HOME:-/root}}" BUCKET={folder}
mkdir -p "$HOME/screen/runs" && cd "$HOME/screen" || exit 1
log="$(date -u +%Y%m%dT%H%M%S).log"
exec >>"$log" 2>&1

put() {{ gcloud storage cp --quiet "$1" "$BUCKET/$2"; }}
status() {{ echo "$1" >status && put status status; }}
snapshot() {{ (  # an upload keeps the lock even if what started it was killed
  flock 9
  put "$log" "logs/$log"
  tar --sort=name --exclude='*.orbax-checkpoint-tmp*' --exclude=./compiled -C runs -cf new.tar .
  [ $? -le 1 ] && put new.tar runs.tar  # 1: a file changed while it was read
) 9>lock; }}
prepare() {{
  gcloud storage cp --quiet "$BUCKET/code.tar.gz" code.tar.gz && tar -xzf code.tar.gz || return 1
  if [ ! -x venv/bin/python ]; then  # the image's own Python is too old
    python3 -m pip install --quiet uv && python3 -m uv venv --quiet --python 3.12 venv &&
      (cd code && python3 -m uv pip install --quiet --python ../venv/bin/python -r requirements-tpu.txt) || return 1
  fi
  {fetch_data}
  [ -e restored ] && return  # after a reboot the disk knows more than the bucket
  gcloud storage cp --quiet "$BUCKET/runs.tar" old.tar && tar -xf old.tar -C runs && touch restored
}}

prepare || {{ put "$log" "logs/$log"; status failed; exit 1; }}
status running
(while sleep {snapshot_every}; do snapshot; done) &
snapshots=$!
while {command}; code=$?; [ $code = 75 ]; do snapshot; done  # 75: stopped by a signal; the machine may live on
if [ $code = 0 ]; then result=finished; else result=failed; fi
kill $snapshots
until snapshot; do sleep 10; done
status $result
"""


class LaunchError(Exception):
    """A message that says what stands in the way, and what to do."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A screen on a TPU; times in seconds."""

    name: str
    project: str
    zone: str
    folder: str  # gs://BUCKET/PATH
    accelerator: str
    spot: bool  # cheaper, may be preempted
    data: Path | None  # None: the data that ship
    arguments: tuple[str, ...]  # of launch_screen.py on the TPU's machine, beside --out and --data
    snapshot_every: int
    poll_every: int

    def create(self, startup: Path) -> list[str]:
        command = self._resources("create", f"--node-id={self.name}", f"--accelerator-type={self.accelerator}")
        command += [f"--runtime-version={RUNTIMES[self.accelerator]}", f"--metadata-from-file=startup-script={startup}"]
        command.append("--scopes=https://www.googleapis.com/auth/cloud-platform")  # to read and write the bucket
        return [*command, "--spot"] if self.spot else command

    def describe(self) -> list[str]:
        return self._resources("describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        return self._resources("delete", "--force", "--quiet")

    def upload(self, code: Path, runs: Path) -> list[list[str]]:
        """List the commands that upload the code, the data, and the runs to begin with if the bucket has none."""
        commands = [["cp", str(code), f"{self.folder}/code.tar.gz"]]
        commands += [["rsync", "--recursive", str(self.data), f"{self.folder}/data"]] if self.data else []
        commands += [["cp", "--no-clobber", str(runs), f"{self.folder}/runs.tar"]]
        return [["gcloud", "storage", *command] for command in commands]

    def read_status(self) -> list[str]:
        return ["gcloud", "storage", "cat", f"{self.folder}/status"]

    def download(self, runs: Path) -> list[str]:
        return ["gcloud", "storage", "cp", f"{self.folder}/runs.tar", str(runs)]

    def startup_script(self) -> str:
        command = ["venv/bin/python", "code/scripts/launch_screen.py", "--out=runs"]
        command += ["--data=data", *self.arguments] if self.data else self.arguments
        fetch = 'mkdir -p data && gcloud storage rsync --quiet --recursive "$BUCKET/data" data || return 1'
        values = {"folder": shlex.quote(self.folder), "fetch_data": fetch if self.data else ": # the data that ship"}
        return _STARTUP.format(**values, snapshot_every=self.snapshot_every, command=shlex.join(command))

    def _resources(self, verb: str, *options: str) -> list[str]:
        place = f"--project={self.project}", f"--zone={self.zone}"
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *place, *options]


def show(tpu: Tpu) -> None:
    """Print what `run` would do."""

    def tell(title: str, *commands: list[str]) -> None:
        print(f"# {title}:", *(f"$ {shlex.join(command)}" for command in commands), sep="\n")

    code, runs = Path("code.tar.gz"), Path("runs.tar")
    print(f"# startup.sh, which the TPU's machine runs at every boot:\n{tpu.startup_script()}")
    tell("the code, and runs to begin with", *tpu.upload(code, runs))
    every = tpu.read_status(), tpu.describe(), tpu.delete(), tpu.create(Path("startup.sh"))
    tell(f"every {tpu.poll_every} s until the status is finished; a suspended resource is deleted first", *every)
    tell("at the end, then the table is written as after a local screen", tpu.delete(), tpu.download(runs))


def run(tpu: Tpu, out: Path) -> None:
    """Run the screen on a TPU until it is finished, and put its runs into `out`; LaunchError says why it cannot."""
    if not shutil.which("gcloud"):
        where = "it comes with the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
        then = "then run `gcloud auth login`; --dry-run shows the commands without it"
        raise LaunchError(f"gcloud is not installed: {where}, {then}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if _status(tpu) == "finished":
            print(f"{tpu.folder} holds a finished screen; give another --name to run a new one", flush=True)
        else:
            _upload(tpu, Path(folder), out)
            _until_finished(tpu, Path(folder))
        runs = Path(folder) / "finished.tar"
        _gcloud(tpu.download(runs))
        with tarfile.open(runs) as archive:
            archive.extractall(out, filter="data")


def _upload(tpu: Tpu, folder: Path, out: Path) -> None:
    def code_only(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        hidden = any(part.startswith(".") or part in _LEFT_OUT for part in Path(entry.name).parts)
        return None if hidden else entry

    code, runs, status = (folder / name for name in ("code.tar.gz", "runs.tar", "status"))
    with tarfile.open(code, "w:gz") as archive:
        archive.add(ROOT, "code", filter=code_only)
    with tarfile.open(runs, "w") as archive:
        archive.add(out, ".", filter=lambda entry: None if entry.name.startswith("./compiled") else entry)
    for command in tpu.upload(code, runs):
        _gcloud(command)
    status.write_text("starting\n")
    _gcloud(["gcloud", "storage", "cp", str(status), f"{tpu.folder}/status"])


def _until_finished(tpu: Tpu, folder: Path) -> None:
    """Create the TPU, and again after every preemption; tell what changes; delete it when the screen has ended."""
    startup, last = folder / "startup.sh", None
    startup.write_text(tpu.startup_script())
    while True:
        status, state = now = _status(tpu), _state(tpu)
        if now != last:
            print(f"{time.strftime('%H:%M:%S')} {tpu.name}: screen {status}, TPU {state or 'not there'}", flush=True)
        last = now
        if status in ("finished", "failed"):
            if state is not None:
                _gcloud(tpu.delete())
            if status == "failed":
                then = f"logs are in {tpu.folder}/logs. Start again to continue from its last snapshot"
                raise LaunchError(f"the screen failed on the TPU; {then}")
            return
        if state == "FAILED":
            why = shlex.join(tpu.describe()[:-1])
            raise LaunchError(f"no TPU to be had: `{why}` says why. Quota and zones: docs/distributed.md")
        if state == "SUSPENDED":
            _gcloud(tpu.delete())
        if state in (None, "SUSPENDED"):
            _gcloud(tpu.create(startup))
        time.sleep(tpu.poll_every)


def _status(tpu: Tpu) -> str:
    done = subprocess.run(tpu.read_status(), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _state(tpu: Tpu) -> str | None:
    """Return the state of the resource; None if there is none."""
    done = subprocess.run(tpu.describe(), capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr:
        return None
    return f"unknown ({done.stderr.strip()[-200:]})"  # a network that comes back: ask again later


def _gcloud(command: list[str]) -> None:
    print("$", shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-1000:]}")
