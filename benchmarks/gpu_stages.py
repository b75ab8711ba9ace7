"""The stages of scripts/bench_gpu.py: generators of rows, which are written as soon as they are there.

A stage runs in a process of its own, which may be killed at its limit. Packages beyond JAX are imported where they are
needed, so that a missing package costs one stage.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_rates, harness
from benchmarks.gpu_programs import TINY, Settings, alignments, nvidia_smi, training_run
from benchmarks.harness import Row


def ceilings(settings: Settings) -> Iterator[Row]:
    """Describe the machine, then measure a large copy and a large bfloat16 product."""
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "numpy", "flax", "triton", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about = {"cpus": os.cpu_count(), "versions": versions, "nvidia_smi": nvidia_smi()}
    yield {"what": "machine"} | harness.machine() | about
    side, words, calls = (64, 2**10, 2) if settings.tiny else (8192, 2**30, 10)

    def seconds_of(program: Callable, sets: list[tuple]) -> float:
        def back_to_back(*given):  # launching all but the first is hidden
            for _ in range(calls):
                out = program(*given)  # not kept: large arrays would pile up
            return out

        return statistics.median(gpu_rates.clock(back_to_back, sets, 1.0)) / calls

    keys = jax.random.split(jax.random.key(0), 5)
    sets: list[tuple] = [(jax.random.normal(key, (words,), jnp.float32),) for key in keys[:2]]
    seconds = seconds_of(jax.jit(lambda x: jnp.copy(x)), sets)
    yield {"what": "copy", "bytes": 8 * words, "GB_a_second": 8e-9 * words / seconds}  # read and written
    sets = [tuple(jax.random.normal(key, (2, side, side), jnp.bfloat16)) for key in keys[2:]]
    seconds = seconds_of(jax.jit(lambda x, y: x @ y), sets)
    yield {"what": "bfloat16 product", "side": side, "TFLOP_a_second": 2e-12 * side**3 / seconds}


# Case of tests/support/conformance.py, dustbin, settings, dtype. Between them: steps in one sweep, every product,
# every dustbin, band and full support, empty rows and problems, ragged lengths, scores that leave the range of exp,
# Newton steps and implicit gradients. Their heads are narrow: wide ones are interpreted in tests/test_gpu.py.
CONFORMANCE = [
    ("square", "full", "plain", "bfloat16"), ("square", "none", "plain", "float32"),
    ("blocks", "full", "plain", "bfloat16"), ("full support", "full", "converging", "bfloat16"),
    ("sharp", "full", "plain", "float32"), ("blocks, x longer", "unit", "plain", "float32"),
    ("blocks, y longer", "full", "converging", "float32"), ("wide blocks", "none", "plain", "bfloat16"),
    ("ragged", "unit", "converging", "bfloat16"), ("full support", "none", "plain", "float32"),
    ("empty problem", "none", "plain", "bfloat16"), ("empty rows", "full", "plain", "float32"),
]  # fmt: skip


def conformance(settings: Settings) -> Iterator[Row]:
    """Compare the kernels with the reference in float64: error as a share of what the tests allow."""
    from tests.support import conformance as suite

    cases = {case.name: case for case in suite.CASES}
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "converging": suite.CONVERGING}

    def compare(name: str, dustbin: str, kind: str, dtype: str) -> Row:
        start, changes = time.perf_counter(), kinds[kind] | ({"base_steps": 2} if settings.tiny else {})
        found = suite.against_reference("pallas_gpu", cases[name], dustbin, dtype, **changes)
        ratios = {of: error / allowed for of, (error, allowed) in found.items()}
        worst = max(ratios, key=lambda of: ratios[of] if np.isfinite(ratios[of]) else np.inf)
        row = {"worst": worst, "error": found[worst][0], "error_to_allowed": ratios[worst]}
        row["seconds"] = time.perf_counter() - start
        wrong = sorted(of for of, ratio in ratios.items() if not ratio <= 1)
        return row | ({"failed": f"above what is allowed: {', '.join(wrong)}"} if wrong else {})

    plan = [("square", "none", "plain", "float32")] if settings.tiny else CONFORMANCE
    for about, row in harness.in_threads({of: functools.partial(compare, *of) for of in plan}):
        yield dict(zip(("case", "dustbin", "settings", "dtype"), about, strict=True)) | row


def rates(settings: Settings) -> Iterator[Row]:
    """Yield the rows of gpu_rates."""
    small = functools.partial(gpu_rates.Entry, 40, residues=40, heads=2, width=16, seconds=0.0)
    tiny = [small(8), small(None, "softmax, xla")]
    return gpu_rates.measured(tiny if settings.tiny else settings.rates or gpu_rates.PLAN)


class Step(NamedTuple):
    """A training step to be timed; batch None stands for the configuration's number of examples."""

    config: str
    dtype: str
    implementation: str
    batch: int | None = None


_CONFIGS, _BACKENDS = ("r2_dustbin", "aligner"), ("pallas_gpu", "xla")
TRAINING = [Step(*of) for dtype in ("float32", "bfloat16") for of in itertools.product(_CONFIGS, [dtype], _BACKENDS)]
TRAINING += [Step(config, "bfloat16", "pallas_gpu", 256) for config in _CONFIGS]
_WAVE = 4  # programs that are compiled together, before any of them is timed
_GROUP = 5  # steps between which the host does not wait, as in training


def training(settings: Settings) -> Iterator[Row]:
    """Measure examples a second of compiled updates on one batch that stays on the device."""
    plan = [Step("r2_dustbin", "float32", "pallas_gpu")] if settings.tiny else TRAINING
    seconds, length = (0.0, 32) if settings.tiny else (1.0, 192)  # padded; real lengths are two thirds of it and more
    with sampled_utilisation() as samples:
        for start in range(0, len(plan), _WAVE):
            wave = plan[start : start + _WAVE]
            built = harness.in_threads({step: functools.partial(_built, step, length, settings.tiny) for step in wave})
            for step, program in list(built):
                row = step._asdict() | {"length": length}
                yield row | (_timed_steps(program, seconds, samples) if "update" in program else program)


def _built(step: Step, length: int, tiny: bool) -> Row:
    """Compile an update; return it with its arguments and the columns that are known before it runs."""
    from evaluation import runs
    from training import sharding, state

    config = importlib.import_module(f"configs.{step.config}").get_config()
    changes: Row = {"model.dtype": step.dtype, "model.implementation": step.implementation}
    changes |= {"batch_size": step.batch} if step.batch else {}
    config.update_from_flattened_dict(changes | (TINY if tiny else {}))
    trainer = runs.make_trainer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(), config.batch_size, jax.devices()[:1])
    shapes = trainer.abstract_state(mesh), state.abstract_batch(config.batch_size, length, mesh)
    update, facts = harness.compile_program(trainer.compiled_update(mesh), *shapes)
    batch = jax.device_put(_pairs(config.batch_size, length), sharding.by_example(mesh))
    return {"batch": config.batch_size, "update": update, "given": (trainer.initial_state(mesh), batch)} | facts


def _pairs(number: int, length: int) -> dict[str, np.ndarray]:
    """Draw random pairs, aligned along the diagonal."""
    from data import vocab

    rng = np.random.default_rng(0)
    lengths = rng.integers(2 * length // 3, length + 1, (2, number)).astype(np.int32)
    i = np.arange(length, dtype=np.int32)
    x, y = np.where(i < lengths[..., None], rng.integers(1, vocab.X, (2, number, length)), vocab.PAD).astype(np.int32)
    target = np.where(i < lengths.min(0)[:, None], i, -1)
    return {"x": x, "y": y, "x_length": lengths[0], "y_length": lengths[1], "target": target}


def _timed_steps(program: Row, seconds: float, samples: list[tuple[float, float]]) -> Row:
    """Measure the time of a step and the GPU's utilisation meanwhile."""
    update, (state, batch) = program.pop("update"), program.pop("given")
    metrics: Row = {}

    def group() -> Any:
        nonlocal state, metrics
        for _ in range(_GROUP):
            state, metrics = update(state, batch)
        return state

    times = harness.clock({0: group}, 3, seconds=seconds)[0]
    began, step = time.perf_counter() - sum(times), statistics.median(times) / _GROUP
    used = [share for when, share in samples if when > began]
    row = program | {"step_ms": 1e3 * step, "examples_per_second": program["batch"] / step}
    row |= {"gpu_percent": statistics.mean(used) if used else None, "loss": float(metrics["loss"])}
    return row | ({} if float(metrics["finite"]) == 1 else {"failed": "the loss or its gradient is not finite"})


@contextlib.contextmanager
def sampled_utilisation() -> Iterator[list[tuple[float, float]]]:
    """Fill a list with times and the GPU's utilisation in percent; without nvidia-smi it stays empty."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()
    query = "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"

    def sample() -> None:
        while not over.wait(0.2) and (percent := nvidia_smi(*query)) is not None:
            with contextlib.suppress(ValueError):  # "[N/A]"
                samples.append((time.perf_counter(), float(percent)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


class Stage(NamedTuple):
    """A stage."""

    run: Callable[[Settings], Iterator[Row]]
    share: float  # of 12 minutes, in seconds
    columns: str  # of its table
    on_device: bool = True  # JAX runs in the stage's own process


_RATES = "length band method dtype error forward_ms forward_backward_ms ps_a_cell_and_half_iteration ps_a_cell_and_step"
_RATES += " Tcell_a_second forward_compile_s forward_backward_compile_s"
_TRAINING = "config dtype implementation batch length step_ms examples_per_second gpu_percent compile_s"
_RUN = "config status steps examples_per_second first_loss last_loss weights bytes"
STAGES = {
    "ceilings": Stage(ceilings, 30, "what device GB_a_second TFLOP_a_second"),
    "conformance": Stage(conformance, 110, "case dustbin settings dtype worst error error_to_allowed seconds"),
    "rates": Stage(rates, 180, _RATES),
    "training": Stage(training, 170, _TRAINING),
    "alignments": Stage(alignments, 80, "what pairs seconds pairs_per_second", on_device=False),
    "training_run": Stage(training_run, 150, _RUN, on_device=False),
}
