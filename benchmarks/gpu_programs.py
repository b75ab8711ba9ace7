"""Stages of scripts/bench_gpu.py that start programs of the repository, and the settings of all stages."""

import gzip
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import gpu_rates, harness
from benchmarks.harness import Row

ROOT = Path(__file__).resolve().parent.parent
# Changes of a configuration with which it trains in seconds on a CPU.
_TINY_MODEL = {"width": 16, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8}
TINY: Row = {f"model.{key}": value for key, value in _TINY_MODEL.items()} | {"batch_size": 2, "total_steps": 2}
TINY |= {"attention.base_steps": 3, "attention.band": 16, "data.buckets": (64,)}


class Settings(NamedTuple):
    """Settings of the stages."""

    seconds: float  # until the stage is killed
    output: Path
    work: Path  # for everything that is no result
    tiny: bool = False  # on the CPU, at tiny sizes
    config: Path = ROOT / "configs/aligner.py"  # this and what follows: of training_run
    data: str = "data/default"
    overrides: tuple[str, ...] = ()  # "key=value"
    rates: tuple[gpu_rates.Entry, ...] = ()  # in place of the usual plan


def nvidia_smi(*options: str) -> str | None:
    """Return the output of nvidia-smi, or None where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else None


_SOME_PAIRS, _MOST_PAIRS = 2048, 100_000
_LEAST_RATE, _START = 2500, 10  # pairs a second, so that the run ends in time; seconds before the first pair


def alignments(settings: Settings) -> Iterator[Row]:
    """Measure pairs a second of the command align.py: with compilation, then as many as there should be time for."""
    deadline = time.perf_counter() + 0.9 * settings.seconds
    yield (first := _aligned(2 if settings.tiny else _SOME_PAIRS, "with compilation", settings))
    left = deadline - time.perf_counter() - _START
    number = int(min(_MOST_PAIRS, _LEAST_RATE * left))
    if number > _SOME_PAIRS and not settings.tiny and "failed" not in first:
        yield _aligned(number, "compiled before", settings)


def _aligned(number: int, what: str, settings: Settings) -> Row:
    pairs, output = settings.work / "pairs.tsv", settings.work / "aligned.jsonl.gz"
    write_pairs(pairs, number, 20 if settings.tiny else 150)
    start = time.perf_counter()
    failed = run_script("scripts/align.py", f"--pairs={pairs}", "--format=jsonl", f"--output={output}", "--quiet")
    seconds = time.perf_counter() - start
    row: Row = {"what": what, "pairs": number, "seconds": seconds}
    if failed:
        return row | {"failed": failed}
    with gzip.open(output, "rt") as file:
        lines = sum(1 for _ in file)
    wrong = {} if lines == number else {"failed": f"{lines} alignments were written of {number}"}
    return row | {"pairs_per_second": number / seconds} | wrong


def write_pairs(path: Path, number: int, length: int) -> None:
    """Write random pairs of proteins in the format of align.py --pairs."""
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    residues = letters[np.random.default_rng(number).integers(0, len(letters), (number, 2, length))]
    pairs = (f"{n}\t{x.tobytes().decode()}\t{y.tobytes().decode()}\n" for n, (x, y) in enumerate(residues))
    path.write_text("".join(pairs))


def training_run(settings: Settings) -> Iterator[Row]:
    """Train until shortly before the limit; keep the averaged weights and metrics.jsonl in the output folder."""
    workdir, name = settings.work / "run", settings.config.stem
    shutil.rmtree(workdir, ignore_errors=True)
    flags = {"data.dir": settings.data, "log.wandb": "disabled", "log.eval_every": 0}
    flags |= (TINY if settings.tiny else {}) | dict(override.split("=", 1) for override in settings.overrides)
    command = [sys.executable, str(ROOT / "train.py"), f"--config={settings.config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    margin = min(50.0, settings.seconds / 3)  # to save, and to export
    status, errors = stop_softly(process, settings.seconds - margin, 0.5 * margin)
    row: Row = {"config": name, "status": status, "stopped": status == 75}
    if (metrics := workdir / "metrics.jsonl").exists():
        shutil.copy(metrics, settings.output)
        if rows := [line for line in harness.read_rows(metrics) if "loss" in line]:
            speed = statistics.median(line["examples_per_second"] for line in rows[-10:])
            row |= {"steps": rows[-1]["step"], "examples_per_second": speed}
            row |= {"first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
    if status not in (0, 75):
        row["failed"] = f"train.py ended with {status}: {_last_line(errors)}"
    yield row
    weights = settings.output / f"{name}.safetensors"
    failed = run_script("scripts/export_weights.py", f"--workdir={workdir}", f"--output={weights}")
    result = {"failed": failed} if failed else {"bytes": weights.stat().st_size}
    yield {"config": name, "weights": weights.name} | result


def stop_softly(process: subprocess.Popen, seconds: float, patience: float) -> tuple[int, str]:
    """Send SIGTERM after some seconds, and SIGKILL if that is not heeded; return the exit status and stderr."""
    for limit, number in (seconds, signal.SIGTERM), (patience, signal.SIGKILL), (None, 0):
        try:
            _, errors = process.communicate(timeout=limit)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    sys.stderr.write(errors or "")
    return process.returncode, errors or ""


def run_script(script: str, *arguments: str) -> str | None:
    """Run a program of the repository; return None, or the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    return None if done.returncode == 0 else f"{Path(script).name}: {_last_line(done.stderr)}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:400]
