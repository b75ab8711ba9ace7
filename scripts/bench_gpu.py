"""Measure a GPU in stages, each with a time limit: ceilings, numbers, rates, training, alignments, a run of training.

  python scripts/bench_gpu.py --all --minutes=12 --output=runs/bench/gpu
  python scripts/bench_gpu.py --all --data=runs/pfam --override total_steps=3000 batch_size=128
  python scripts/bench_gpu.py --stages rates training --minutes=5
  python scripts/bench_gpu.py --stages rates --lengths 1024 4096 --bands 64 full --dtypes float32 --methods pallas_gpu
  python scripts/bench_gpu.py --all --tiny            # every stage on the CPU at tiny sizes, kernels interpreted

The stages run in this order. Each is a process of its own that is killed at its limit; rows it wrote until then count:

  ceilings      nvidia-smi, versions, a large copy, a large bfloat16 product
  conformance   12 cases of tests/support/conformance.py on the card, against the reference in float64
  rates         picoseconds a cell and half-iteration, beside xla and cuDNN attention (benchmarks/gpu_rates.py)
  training      examples a second of the update of aligner and r2_dustbin, and the GPU's utilisation
  alignments    pairs a second of scripts/align.py
  training_run  train.py with --config and --data until the time is over; the last stage gets the time that others leave

The output folder holds rows.jsonl (a JSON row for each result, appended at once; an earlier file is emptied first),
table.md, stages.log (what the stages print) and, of training_run, metrics.jsonl and the averaged weights. The exit
status is 1 if a row or a stage failed.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import jax

import command_line
from benchmarks import gpu_rates, harness
from benchmarks.gpu_programs import ROOT, Settings, nvidia_smi
from benchmarks.gpu_stages import STAGES
from data import files
from ot_attention.backends import gpu_kernels
from training import processes

ROWS, TABLE, LOG = "rows.jsonl", "table.md", "stages.log"
_MOST_LOG = 8 * 2**20  # bytes; more are cut at the beginning
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _parse(given)
    if args.stage:  # whose process writes into the log, traceback and all
        return run_stage(args.stage, args)
    return command_line.run("bench_gpu.py", lambda: run_stages(args, given), debug=args.debug)


def run_stages(args: argparse.Namespace, given: list[str]) -> None:
    """Run the chosen stages and print their tables. Raises ValueError if one fails, or there is no card."""
    if not args.tiny and not has_card():
        told = "there is no GPU here (neither /dev/nvidia0 nor a working nvidia-smi). Run it on a machine with an"
        raise ValueError(f"{told} NVIDIA card, or give --tiny to try every stage on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stage too
    for folder in (args.output, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, LOG):
        (args.output / name).write_text("")
    failed = schedule(args, given)
    print((args.output / TABLE).read_text())
    print(f"results: {args.output}")
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")
    if not harness.read_rows(args.output / ROWS):
        raise ValueError("nothing was measured: no stage wrote a row in its time, give more --minutes")


def has_card() -> bool:
    """Tell whether there is an NVIDIA card, without starting JAX on it, which would take its memory."""
    return Path("/dev/nvidia0").exists() or bool(nvidia_smi("-L"))


def schedule(args: argparse.Namespace, given: list[str]) -> list[str]:
    """Run the chosen stages; return the names of stages that failed or have a failed row."""
    shares, failed = sum(STAGES[name].share for name in args.stages), []
    end = time.monotonic() + 60 * args.minutes
    for name in args.stages:
        left = end - (began := time.monotonic())
        limit = left if name == args.stages[-1] else min(left, 60 * args.minutes * STAGES[name].share / shares)
        print(f"stage {name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        with (args.output / LOG).open("a") as log:
            print(f"===== {name} =====", file=log, flush=True)
            state = run_limited(*command_of(name, limit, args, given), limit, log) if limit > 0 else "left out, no time"
        print(f"stage {name}: {time.monotonic() - began:.0f} s of {limit:.0f} s, {state}", file=sys.stderr, flush=True)
        rows = harness.read_rows(args.output / ROWS)
        if state == "failed" or any("failed" in row for row in rows if row["stage"] == name):
            failed.append(name)
        files.write(args.output / TABLE, tables(rows))
        shorten(args.output / LOG)
    return failed


def command_of(name: str, limit: float, args: argparse.Namespace, given: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a stage's process, and its environment."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu" if args.tiny else "cuda,cpu", "PYTHONUNBUFFERED": "1"}
    if args.tiny:
        # Compiling takes longer than running. The second does the same for jax before 0.12, and more.
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if not STAGES[name].on_device:  # the stage starts the same programs several times
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.work / "compiled"))
    script, stage = str(ROOT / "scripts/bench_gpu.py"), [f"--stage={name}", f"--seconds={limit}"]
    return [sys.executable, script, *given, *stage], environment


def run_limited(command: list[str], environment: dict[str, str], limit: float, log: IO[str]) -> str:
    """Run a command in a process group of its own, which does not outlive the limit or this process."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        with processes.ended_with_parent(-process.pid, signal.SIGKILL):
            return "done" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "stopped at its limit"
    finally:
        with contextlib.suppress(ProcessLookupError):  # of a group that has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shorten(log: Path) -> None:
    """Keep the end of a log."""
    if log.stat().st_size > _MOST_LOG:
        log.write_bytes(log.read_bytes()[-_MOST_LOG // 2 :])


def run_stage(name: str, args: argparse.Namespace) -> int:
    """Write the rows of a stage as they come; a missing package or another failure is a row too."""
    if args.tiny and STAGES[name].on_device:
        gpu_kernels.INTERPRET = True
    with harness.row_writer(args.output / ROWS, append=True) as write:
        try:
            if not args.tiny and (found := backend(STAGES[name].on_device)) != "gpu":
                todo = "install jax[cuda13] of the version of jax, and look at the driver with nvidia-smi"
                raise RuntimeError(f"JAX computes on {found or 'nothing'} here, not on a GPU: {todo}")
            for row in STAGES[name].run(settings_of(args)):
                write({"stage": name} | row)
        except ImportError as missing:
            write({"stage": name, "failed": f"a package is missing: {missing}"})
            return 1
        except Exception as error:  # the cause is in the log, the fact among the rows
            write({"stage": name, "failed": harness.failure(error)})
            raise
    return 0


def backend(here: bool) -> str:
    """Ask what JAX computes on: without the card it falls back to the CPU in silence."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # asked here, JAX holds the card's memory
    return jax.default_backend() if here else subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip()


def settings_of(args: argparse.Namespace) -> Settings:
    """Collect the settings of the stages."""
    chosen = args.lengths, args.bands, args.methods, args.dtypes
    usual: tuple = [1024, 4096], [64, None, 256], ["pallas_gpu", "softmax, cudnn"], ["bfloat16"]
    combined = itertools.product(*(x or y for x, y in zip(chosen, usual, strict=True))) if any(chosen) else ()
    entries = itertools.starmap(gpu_rates.Entry, combined)
    plan = tuple(entry for entry in entries if entry.band is None or not entry.is_softmax)  # dense softmax has no band
    about = args.tiny, args.config, args.data, tuple(args.override)
    return Settings(args.seconds, args.output, args.work, *about, rates=plan)


def tables(rows: list[harness.Row]) -> str:
    """Return a Markdown table for each stage that has rows, and a list of what failed."""
    parts = []
    for name, stage in STAGES.items():
        if of_stage := [row for row in rows if row["stage"] == name]:
            failed = [f"- failed: {row['failed']}" for row in of_stage if "failed" in row]
            lines = filter(None, [harness.table(of_stage, stage.columns), *failed])
            parts.append("\n".join([f"## {name}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "runs/bench/gpu")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_const", dest="stages", const=list(STAGES), help="all stages")
    which.add_argument("--stages", nargs="+", choices=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}")
    positive, path, natural = command_line.positive, command_line.path, command_line.at_least(1)
    parser.add_argument("--minutes", type=positive, default=12, help="of all stages together; default: %(default)s")
    work = Path("runs/bench/gpu_work")
    parser.add_argument("--work", type=path, default=work, metavar="DIR", help="scratch files; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at tiny sizes, kernels interpreted")
    run = parser.add_argument_group("training_run")
    config = ROOT / "configs/aligner.py"
    run.add_argument("--config", type=path, default=config, metavar="FILE", help="default: configs/aligner.py")
    told = "shards; default: %(default)s"
    run.add_argument("--data", type=command_line.file_name, default="data/default", metavar="DIR", help=told)
    run.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    rates = parser.add_argument_group("rates", "all combinations of these, in place of the usual rows")
    rates.add_argument("--lengths", nargs="+", type=natural, metavar="N", help="residues")
    rates.add_argument("--bands", nargs="+", type=_band, metavar="N", help="half-widths or full")
    rates.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"])
    rates.add_argument("--methods", nargs="+", choices=list(gpu_rates.METHODS))
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)  # of the process that runs it
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if wrong := [override for override in args.override if "=" not in override]:
        parser.error(f"--override {wrong[0]}: write KEY=VALUE, for example total_steps=3000")
    args.output, args.work = args.output.resolve(), args.work.resolve()
    return args


def _band(text: str) -> int | None:
    return None if text == "full" else command_line.at_least(1)(text)


if __name__ == "__main__":
    sys.exit(main())
