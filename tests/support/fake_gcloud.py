#!/usr/bin/env python3
"""Stands in for gcloud where there is no cloud: objects are files, and a TPU is a process group on this machine.

$FAKE_CLOUD holds `objects/`, `calls.jsonl` (every call), `python` (what its machines start for Python) and `machine`
(state and process of the one there is). The first machine is preempted, killed, as soon as a snapshot in the bucket
holds a checkpoint of a later step than 0.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
MACHINE = CLOUD / "machine"


def main(words: list[str]) -> None:
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    plain = [word for word in words if not word.startswith("--")]
    if plain[0] == "storage":
        storage(plain[1], options, *plain[2:])
    else:
        {"create": create, "describe": describe, "delete": delete}[plain[3]](options)


def storage(verb: str, options: dict, source: str, target: str = "") -> None:
    if not local(source).exists():
        sys.exit(f"ERROR: {source} matched no objects")
    if verb == "cat":
        print(local(source).read_text(), end="")
    elif verb == "rsync":
        shutil.copytree(local(source), local(target), dirs_exist_ok=True)
    elif not ("no-clobber" in options and local(target).exists()):
        local(target).parent.mkdir(parents=True, exist_ok=True)
        part = local(target).with_suffix(f".{os.getpid()}")
        shutil.copyfile(local(source), part)
        part.replace(local(target))  # an object is there whole or not at all


def local(name: str) -> Path:
    return CLOUD / "objects" / name[5:] if name.startswith("gs://") else Path(name)


def create(options: dict) -> None:
    assert not MACHINE.exists(), "ALREADY_EXISTS"
    number = len(list(CLOUD.glob("disk*"))) + 1
    disk = CLOUD / f"disk{number}"
    interpreter = disk / "screen/venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {(CLOUD / "python").read_text()} "$@"\n')
    interpreter.chmod(0o755)
    script = options["metadata-from-file"].partition("=")[2]
    shutil.copyfile(script, disk / "startup.sh")
    environment = os.environ | {"HOME": str(disk)}
    command = ["bash", str(disk / "startup.sh")]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    MACHINE.write_text(json.dumps({"state": "ACTIVE", "process": process.pid, "number": number}))


def describe(options: dict) -> None:
    if not MACHINE.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    machine = json.loads(MACHINE.read_text())
    if machine["number"] == 1 and machine["state"] == "ACTIVE" and checkpoint_is_safe():
        kill(machine)
        MACHINE.write_text(json.dumps(machine | {"state": "SUSPENDED"}))
    print(json.loads(MACHINE.read_text())["state"])


def checkpoint_is_safe() -> bool:
    for snapshot in (CLOUD / "objects").rglob("runs.tar"):
        with tarfile.open(snapshot) as archive:
            if any(re.search(r"checkpoints/[1-9]\d*$", name) for name in archive.getnames()):
                return True
    return False


def delete(options: dict) -> None:
    kill(json.loads(MACHINE.read_text()))
    MACHINE.unlink()


def kill(machine: dict) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(machine["process"], signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
