"""The stages of scripts/bench_gpu.py, each a generator of rows that are written as soon as they are there.

A stage runs in a process of its own, which may be killed at its limit; it imports only what it needs, so that a missing
package costs one stage.
"""

import concurrent.futures
import contextlib
import gzip
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINY = {  # of a configuration: trains in seconds on a CPU
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.attention_every": 0,
    "model.plan_width": 8,
    "model.value_width": 8,
    "attention.base_steps": 3,
    "attention.band": 16,
    "data.buckets": (64,),
    "batch_size": 2,
    "total_steps": 2,
}
Row = dict[str, Any]


class Settings(NamedTuple):
    """Settings of stages. seconds: until the stage is killed. work: a folder for what is not a result."""

    seconds: float
    output: Path
    work: Path
    tiny: bool = False
    config: Path = ROOT / "configs/aligner.py"
    data: str = "data/default"
    overrides: tuple[str, ...] = ()  # "key=value" of the configuration of training_run
    rates: tuple[Any, Any] | None = None  # plan and size of gpu_rates, if not its own


# ---- what the machine can do ----


def ceilings(settings: Settings) -> Iterator[Row]:
    """Yields what the machine is, then the rate of a large copy and of a large bfloat16 product."""
    import jax
    import jax.numpy as jnp

    from benchmarks import gpu_rates

    yield {
        "what": "machine",
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "versions": _versions("jax", "jaxlib", "numpy", "flax", "triton", "torch") | {"python": sys.version.split()[0]},
        "nvidia_smi": nvidia_smi(),
    }
    side, words, calls = (64, 2**10, 2) if settings.tiny else (8192, 2**30, 10)

    def seconds_of(function: Callable, sets: list[tuple]) -> float:
        program = jax.jit(lambda *x: function(*x))

        def back_to_back(*given):  # launching all but the first is hidden
            for _ in range(calls):
                out = program(*given)  # not kept: large arrays would pile up
            return out

        return statistics.median(gpu_rates.clock(back_to_back, sets, 1.0)) / calls

    keys = jax.random.split(jax.random.key(0), 5)
    seconds = seconds_of(jnp.copy, [(jax.random.normal(key, (words,), jnp.float32),) for key in keys[:2]])
    yield {"what": "copy", "bytes": 8 * words, "GB_a_second": 8e-9 * words / seconds}  # read and written
    sets = [tuple(jax.random.normal(key, (2, side, side), jnp.bfloat16)) for key in keys[2:]]
    seconds = seconds_of(jnp.matmul, sets)
    yield {"what": "bfloat16 product", "side": side, "TFLOP_a_second": 2e-12 * side**3 / seconds}


def _versions(*names: str) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def nvidia_smi(*options: str) -> str | None:
    """Output of nvidia-smi; None where it is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else None


# ---- numbers ----

# Case of tests/support/conformance.py, dustbin, settings, dtype. Between them: steps in one sweep, every product,
# every dustbin, band and full support, empty rows and problems, ragged lengths, scores that leave the range of exp,
# Newton steps and implicit gradients. Their heads are narrow: wide ones are interpreted in tests/test_gpu.py.
CONFORMANCE = [
    ("square", "full", "plain", "bfloat16"),
    ("square", "none", "plain", "float32"),
    ("blocks", "full", "plain", "bfloat16"),
    ("full support", "full", "converging", "bfloat16"),
    ("sharp", "full", "plain", "float32"),
    ("blocks, x longer", "unit", "plain", "float32"),
    ("blocks, y longer", "full", "converging", "float32"),
    ("wide blocks", "none", "plain", "bfloat16"),
    ("ragged", "unit", "converging", "bfloat16"),
    ("full support", "none", "plain", "float32"),
    ("empty problem", "none", "plain", "bfloat16"),
    ("empty rows", "full", "plain", "float32"),
]


def conformance(settings: Settings) -> Iterator[Row]:
    """Yields for each case the error of the kernels in relation to what the tests allow, compiled in threads."""
    from tests.support import conformance as suite

    cases = {case.name: case for case in suite.CASES}
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "converging": suite.CONVERGING}
    plan = CONFORMANCE

    def compare(name: str, dustbin: str, kind: str, dtype: str) -> Row:
        start, changes = time.perf_counter(), kinds[kind] | ({"base_steps": 2} if settings.tiny else {})
        found = suite.against_reference("pallas_gpu", cases[name], dustbin, dtype, **changes)
        ratios = {of: error / allowed for of, (error, allowed) in found.items()}
        worst = max(ratios, key=lambda of: ratios[of] if np.isfinite(ratios[of]) else np.inf)
        wrong = sorted(of for of, ratio in ratios.items() if not ratio <= 1)
        return {
            "worst": worst,
            "error": found[worst][0],
            "error_to_allowed": ratios[worst],
            "seconds": time.perf_counter() - start,
        } | ({"failed": f"above what is allowed: {', '.join(wrong)}"} if wrong else {})

    if settings.tiny:
        plan = [("square", "none", "plain", "float32")]
    for about, row in _in_threads({of: lambda of=of: compare(*of) for of in plan}):
        yield dict(zip(("case", "dustbin", "settings", "dtype"), about, strict=True)) | row


def _in_threads(functions: dict[Any, Callable[[], Row]]) -> Iterator[tuple[Any, Row]]:
    """Yields the result of each function, or how it failed, in the order in which they end."""
    from benchmarks import gpu_rates

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = {pool.submit(function): key for key, function in functions.items()}
        for done in concurrent.futures.as_completed(keys):
            yield keys[done], gpu_rates.or_failure(done.result)


# ---- rates of attention ----


def rates(settings: Settings) -> Iterator[Row]:
    """Yields the rows of gpu_rates."""
    from benchmarks import gpu_rates

    plan, size = settings.rates or (gpu_rates.PLAN, gpu_rates.Size())
    if settings.tiny:
        plan = [gpu_rates.Row(40, 8), gpu_rates.Row(40, None, "softmax, xla")]
        size = gpu_rates.Size(residues=40, heads=2, width=16, seconds=0.0)
    yield from gpu_rates.measured(plan, size)


# ---- training steps ----


class Step(NamedTuple):
    """A training step to be timed."""

    config: str
    dtype: str
    implementation: str
    batch: int | None  # examples; None for the configuration's


TRAINING = [
    *(
        Step(config, dtype, implementation, None)
        for dtype, config, implementation in itertools.product(
            ("float32", "bfloat16"), ("r2_dustbin", "aligner"), ("pallas_gpu", "xla")
        )
    ),
    *(Step(config, "bfloat16", "pallas_gpu", 256) for config in ("r2_dustbin", "aligner")),
]
_TRAINED_LENGTH = 192  # padded; real lengths are two thirds of it and more
_WAVE = 4  # programs that are compiled together, before any of them is timed


def training(settings: Settings) -> Iterator[Row]:
    """Yields examples a second of compiled updates on one batch that stays on the device."""
    plan = [Step("r2_dustbin", "float32", "pallas_gpu", None)] if settings.tiny else TRAINING
    seconds, length = (0.0, 32) if settings.tiny else (1.0, _TRAINED_LENGTH)
    with sampled_utilisation() as samples:
        for start in range(0, len(plan), _WAVE):
            wave = plan[start : start + _WAVE]
            built = _in_threads({step: lambda step=step: _built(step, length, settings.tiny) for step in wave})
            for step, program in list(built):
                row = step._asdict() | {"length": length}
                yield row | (_timed_steps(program, seconds, samples) if "update" in program else program)


def _built(step: Step, length: int, tiny: bool) -> Row:
    """The compiled update, a state, and what is known before it runs."""
    import importlib

    import jax

    from evaluation import runs
    from training import sharding, state

    config = importlib.import_module(f"configs.{step.config}").get_config()
    changes: Row = {"model.dtype": step.dtype, "model.implementation": step.implementation}
    changes |= {"batch_size": step.batch} if step.batch else {}
    config.update_from_flattened_dict(changes | (TINY if tiny else {}))
    trainer = runs.make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(), config.batch_size, jax.devices()[:1])
    start = time.perf_counter()
    shapes = trainer.abstract_state(mesh), state.abstract_batch(config.batch_size, length, mesh)
    update = trainer.compiled_update(mesh).lower(*shapes).compile()
    batch = {
        name: jax.device_put(x, sharding.by_example(mesh)) for name, x in _pairs(config.batch_size, length).items()
    }
    return {
        "batch": config.batch_size,
        "compile_s": time.perf_counter() - start,
        "temporary_MB": memory.temp_size_in_bytes / 1e6 if (memory := update.memory_analysis()) else None,
        "update": update,
        "given": (trainer.initial_state(mesh), batch),
    }


def _pairs(number: int, length: int) -> dict[str, np.ndarray]:
    """Random pairs, aligned along the diagonal."""
    from data import vocab

    rng = np.random.default_rng(0)
    x_length, y_length = rng.integers(2 * length // 3, length + 1, (2, number)).astype(np.int32)
    i = np.arange(length, dtype=np.int32)
    x, y = rng.integers(1, vocab.X, (2, number, length)).astype(np.int32)
    return {
        "x": np.where(i < x_length[:, None], x, vocab.PAD),
        "y": np.where(i < y_length[:, None], y, vocab.PAD),
        "x_length": x_length,
        "y_length": y_length,
        "target": np.where(i < np.minimum(x_length, y_length)[:, None], i, -1).astype(np.int32),
    }


def _timed_steps(program: Row, seconds: float, samples: list[tuple[float, float]], group: int = 5) -> Row:
    """Runs steps in groups, as training does: the host waits only at the end of a group."""
    import jax

    update, (state, batch) = program.pop("update"), program.pop("given")
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 or sum(times) < seconds:  # the first group is not counted
        start = time.perf_counter()
        for _ in range(group):
            state, metrics = update(state, batch)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / group)
        began = time.perf_counter() if len(times) == 1 else began
    median, used = statistics.median(times[1:]), [share for when, share in samples if when > began]
    row = program | {"step_ms": 1e3 * median, "examples_per_second": program["batch"] / median}
    row |= {"gpu_percent": statistics.mean(used) if used else None, "loss": float(metrics["loss"])}
    return row | ({} if float(metrics["finite"]) == 1 else {"failed": "the loss or its gradient is not finite"})


@contextlib.contextmanager
def sampled_utilisation() -> Iterator[list[tuple[float, float]]]:
    """Fills a list with times and the GPU's utilisation in percent; it stays empty without nvidia-smi."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.2):
            told = nvidia_smi("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0")
            if told is None:
                return
            with contextlib.suppress(ValueError):  # "[N/A]"
                samples.append((time.perf_counter(), float(told)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


# ---- alignments ----


_SOME_PAIRS, _MOST_PAIRS = 2048, 100_000
_LEAST_RATE = 2500  # pairs a second, so that the run ends in time
_START = 10  # seconds of a command, before its first pair


def alignments(settings: Settings) -> Iterator[Row]:
    """Yields pairs a second of scripts/align.py, over the whole command.

    First some pairs with compilation; then, with programs that are kept, as many as there should be time for, up to
    100,000.
    """
    deadline = time.perf_counter() + 0.9 * settings.seconds
    first = _aligned(2 if settings.tiny else _SOME_PAIRS, "with compilation", settings)
    yield first
    if settings.tiny or "failed" in first:
        return
    left = deadline - time.perf_counter() - _START
    if (number := int(min(_MOST_PAIRS, _LEAST_RATE * left))) > _SOME_PAIRS:
        yield _aligned(number, "compiled before", settings)


def _aligned(number: int, what: str, settings: Settings, length: int = 150) -> Row:
    pairs, output = settings.work / "pairs.tsv", settings.work / "aligned.jsonl.gz"
    write_pairs(pairs, number, 20 if settings.tiny else length)
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
    """Writes random pairs of proteins, in the format of align.py --pairs."""
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    residues = letters[np.random.default_rng(number).integers(0, len(letters), (number, 2, length))]
    with path.open("w") as file:
        for n, (x, y) in enumerate(residues):
            file.write(f"{n}\t{x.tobytes().decode()}\t{y.tobytes().decode()}\n")


# ---- a run of training ----


def training_run(settings: Settings) -> Iterator[Row]:
    """Trains until shortly before the limit; keeps the averaged weights and metrics.jsonl in the output folder."""
    workdir, name = settings.work / "run", settings.config.stem
    shutil.rmtree(workdir, ignore_errors=True)
    flags = {"data.dir": settings.data, "log.wandb": "disabled", "log.eval_every": 0}
    flags |= TINY if settings.tiny else {}
    flags |= dict(override.split("=", 1) for override in settings.overrides)
    command = [sys.executable, ROOT / "train.py", f"--config={settings.config}", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*map(str, command), *(f"--config.{key}={value}" for key, value in flags.items())],
        stderr=subprocess.PIPE,
        text=True,
    )
    margin = min(50.0, settings.seconds / 3)  # to save, and to export
    status, errors = stop_softly(process, settings.seconds - margin, 0.5 * margin)
    row: Row = {"config": name, "status": status, "stopped": status == 75}
    if (workdir / "metrics.jsonl").exists():
        shutil.copy(workdir / "metrics.jsonl", settings.output / "metrics.jsonl")
        row |= _course(settings.output / "metrics.jsonl")
    if status not in (0, 75):
        row["failed"] = f"train.py ended with {status}: {_last_line(errors)}"
    yield row
    weights = settings.output / f"{name}.safetensors"
    failed = run_script("scripts/export_weights.py", f"--workdir={workdir}", f"--output={weights}")
    yield {"config": name, "weights": weights.name} | (
        {"failed": failed} if failed else {"bytes": weights.stat().st_size}
    )


def stop_softly(process: subprocess.Popen, seconds: float, patience: float) -> tuple[int, str]:
    """Sends SIGTERM after some seconds, and SIGKILL if that is not heeded; returns the exit status and stderr."""
    for limit, number in (seconds, signal.SIGTERM), (patience, signal.SIGKILL):
        try:
            return _finished(process, limit)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    return _finished(process, None)


def _finished(process: subprocess.Popen, limit: float | None) -> tuple[int, str]:
    _, errors = process.communicate(timeout=limit)
    sys.stderr.write(errors or "")
    return process.returncode, errors or ""


def _course(metrics: Path) -> Row:
    rows = [row for line in metrics.read_text().splitlines() if "loss" in (row := json.loads(line))]
    if not rows:
        return {}
    speed = statistics.median(row["examples_per_second"] for row in rows[-10:])
    first, last = rows[0], rows[-1]
    return {"steps": last["step"], "examples_per_second": speed, "first_loss": first["loss"], "last_loss": last["loss"]}


def run_script(script: str, *arguments: str) -> str | None:
    """Runs a program of the repository; returns None, or the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    return None if done.returncode == 0 else f"{Path(script).name}: {_last_line(done.stderr)}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:400]


class Stage(NamedTuple):
    """A stage and how its results are shown.

    run: Generator of rows.
    share: Of the time, in seconds of 12 minutes.
    columns: Of its table.
    on_device: JAX runs in the stage's own process.
    """

    run: Callable[[Settings], Iterator[Row]]
    share: float
    columns: tuple[str, ...]
    on_device: bool = True


STAGES = {
    "ceilings": Stage(ceilings, 30, ("what", "device", "GB_a_second", "TFLOP_a_second")),
    "conformance": Stage(
        conformance, 110, ("case", "dustbin", "settings", "dtype", "worst", "error", "error_to_allowed", "seconds")
    ),
    "rates": Stage(
        rates,
        180,
        (
            "length",
            "band",
            "method",
            "dtype",
            "error",
            "forward_ms",
            "forward_backward_ms",
            "ps_a_cell_and_half_iteration",
            "ps_a_cell_and_step",
            "Tcell_a_second",
            "forward_compile_s",
            "forward_backward_compile_s",
        ),
    ),
    "training": Stage(
        training,
        170,
        (
            "config",
            "dtype",
            "implementation",
            "batch",
            "length",
            "step_ms",
            "examples_per_second",
            "gpu_percent",
            "compile_s",
        ),
    ),
    "alignments": Stage(alignments, 80, ("what", "pairs", "seconds", "pairs_per_second"), on_device=False),
    "training_run": Stage(
        training_run,
        150,
        ("config", "status", "steps", "examples_per_second", "first_loss", "last_loss", "weights", "bytes"),
        on_device=False,
    ),
}
