"""Rates of attention on a GPU: picoseconds a cell and half-iteration of `pallas_gpu`, `xla`, cuDNN and flash-sinkhorn.

A stage of scripts/bench_gpu.py. A cell is one score of the support. T + R steps are 2 (T + R) half-iterations; softmax
attention counts as one, over all cells. Every program is checked before it is timed: its output and gradients for one
example and two heads against float64. `softmax, cudnn` is jax.nn.dot_product_attention. `flash-sinkhorn` (PyTorch and
Triton, arXiv 2602.03067) is measured where it is installed, one head at a time, because it takes one problem at a time.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import attention, harness
from benchmarks.attention import STEPS, Case
from benchmarks.harness import Row
from ot_attention import SinkhornSpec, transport_plan

TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-6}
_FEW_HEADS = 2  # whose numbers are checked, and which flash-sinkhorn is timed on
_SETS = 3  # of inputs, in rotation
_FLASH_LENGTHS = 4096, 8192  # shorter problems of one head at a time leave the card idle
_WAVE = 16  # entries whose programs are compiled together, before any of them is timed
_PARTS = ("forward", "forward_backward")


class Entry(NamedTuple):
    """An entry of the plan, which becomes one row of results."""

    length: int
    band: int | None
    method: str = "pallas_gpu"
    dtype: str = "bfloat16"
    residues: int = 65536  # of a batch
    heads: int = 16
    width: int = 64
    seconds: float = 0.3  # for timing one program

    @property
    def is_softmax(self) -> bool:
        """Softmax attention has no band here, and visits every cell once."""
        return self.method.startswith("softmax")

    def case(self) -> Case:
        number = max(1, self.residues // self.length)
        return Case(number, self.heads, self.length, self.band, width=self.width)

    def oracle(self) -> "Entry":
        return self._replace(method="softmax, xla" if self.is_softmax else "xla", dtype="float64")

    def few(self) -> Case:
        """Return the part of the case that is checked: one example, at most two heads."""
        return dataclasses.replace(self.case(), batch=1, heads=min(self.heads, _FEW_HEADS))


def method(name: str, case: Case) -> Callable:
    """Make a method, as those of benchmarks/attention.py are; softmax is dense."""
    if not name.startswith("softmax"):
        return attention.sinkhorn(case, name)
    implementation: Any = name.removeprefix("softmax, ")
    return lambda q, k, v, lengths, score: jax.nn.dot_product_attention(q, k, v, implementation=implementation)


METHODS = "pallas_gpu", "xla", "softmax, cudnn", "softmax, xla"
# The most informative first: what is not reached in time is lost. xla is slow and softmax, cudnn has no float32.
PLAN = [
    *(Entry(length, band) for length in (1024, 4096) for band in (64, None, 256)),
    *(Entry(length, None, "softmax, cudnn") for length in (1024, 4096)),
    *(Entry(1024, band, "xla") for band in (64, None)),
    *(Entry(1024, 64, method, "float32") for method in ("pallas_gpu", "xla")),
    Entry(4096, None, dtype="float32"),
    *itertools.starmap(Entry, ((8192, None), (512, 64), (512, None), (8192, 64), (2048, 64), (2048, None))),
    Entry(8192, None, dtype="float32"),
    *(Entry(length, 256) for length in (512, 2048, 8192)),
    *(Entry(length, None, "softmax, cudnn") for length in (512, 2048, 8192)),
]


def measured(plan: Sequence[Entry]) -> Iterator[Row]:
    """Yield one row for each entry of the plan, then the rows of flash-sinkhorn if it is installed."""
    for start in range(0, len(plan), _WAVE):
        wave = plan[start : start + _WAVE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            oracles = {of: pool.submit(_oracle, of) for of in dict.fromkeys(map(Entry.oracle, wave))}
            programs = {of: [pool.submit(_program, of.case(), of, part) for part in _PARTS] for of in wave}
        for entry in wave:
            yield _row(entry, measure, programs[entry], oracles[entry.oracle()])
    if importlib.util.find_spec("flash_sinkhorn"):
        for length in _FLASH_LENGTHS:
            yield _row(Entry(length, None, "flash-sinkhorn", "float32"), measure_flash_sinkhorn)


def _row(entry: Entry, measure: Callable, *built: Any) -> Row:
    about = entry._asdict() | {"batch": entry.case().batch} | harness.machine()
    return about | harness.or_failure(functools.partial(measure, entry, *built))


def _program(case: Case, entry: Entry, part: str) -> tuple[Callable, Row]:
    shapes = jax.eval_shape(functools.partial(case.arguments, entry.dtype))
    return harness.compile_program(attention.parts(method(entry.method, case))[part], *shapes)


def _oracle(entry: Entry) -> Callable:
    with jax.enable_x64(True):  # of this thread
        return _program(entry.few(), entry, "forward_backward")[0]


def measure(entry: Entry, programs: list[Future], oracle: Future) -> Row:
    """Measure the error, then milliseconds and rates of the forward pass, and of forward and backward."""
    case, built = entry.case(), {part: program.result() for part, program in zip(_PARTS, programs, strict=True)}
    runs = {part: run for part, (run, _) in built.items()}
    found: Row = {f"{part}_{fact}": value for part, (_, facts) in built.items() for fact, value in facts.items()}
    sets = [case.arguments(entry.dtype, seed) for seed in range(_SETS)]
    found["error"] = error(runs["forward_backward"], oracle.result(), sets[0])
    if not found["error"] < TOLERANCE[entry.dtype]:
        return found | {"failed": f"error {found['error']:.1e} is not below {TOLERANCE[entry.dtype]:.1e}; not timed"}
    for part, run in runs.items():
        seconds = clock(run, sets, entry.seconds)
        found |= {f"{part}_ms": 1e3 * statistics.median(seconds), f"{part}_fastest_ms": 1e3 * min(seconds)}
        found[f"{part}_calls"] = len(seconds)
    cells = dataclasses.replace(case, band=None if entry.is_softmax else case.band).cells()
    return found | rates(found["forward_ms"] / 1e3, cells, 1 if entry.is_softmax else 2 * STEPS)


def error(run: Callable, oracle: Callable, given: tuple) -> float:
    """Compute the largest relative deviation of output and gradients from float64, for one example and two heads."""
    actual = [x[:1, :, :_FEW_HEADS] for x in run(*given)]
    with jax.enable_x64(True):
        q, k, v, cotangent = (x[:1, :, :_FEW_HEADS].astype("float64") for x in (*given[:3], given[5]))
        lengths = tuple(n[:1] for n in given[3])
        expected = jax.device_get(oracle(q, k, v, lengths, None, cotangent))
    pairs = zip(jax.device_get(actual), expected, strict=True)
    return max(float(np.abs(x.astype("float64") - y).max() / np.abs(y).max()) for x, y in pairs)


def clock(run: Callable, sets: Sequence[tuple], seconds: float) -> list[float]:
    """Measure the seconds of 5 to 50 calls, each with another set of inputs than the call before."""
    rotation = itertools.cycle(sets)
    warm_up = min(seconds, harness.GPU_WARM_UP)
    return harness.clock({0: lambda: run(*next(rotation))}, 5, seconds=seconds, warm_up=warm_up)[0]


def rates(seconds: float, cells: int, passes: int) -> dict[str, float]:
    """Compute picoseconds a cell for a pass (half-iteration) and for a step of two; softmax has one pass, no steps."""
    each = 1e12 * seconds / (cells * passes)
    steps = {"ps_a_cell_and_step": 2 * each} if passes > 1 else {}
    return {"ps_a_cell_and_half_iteration": each, "Tcell_a_second": 1 / each} | steps


def measure_flash_sinkhorn(entry: Entry) -> Row:
    """Time flash-sinkhorn for the same number of alternating steps at full support, with its default TF32 products."""
    # Its cost is the squared distance. With `eps = 2 sqrt(d)` the norms go into the potentials, and plans are ours.
    import torch
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating as solve

    few, length = entry.few(), entry.length
    q, k, *_ = few.arguments()
    x, y = ([torch.tensor(np.asarray(z[0, :, h]), device="cuda") for h in range(few.heads)] for z in (q, k))
    weights, eps = torch.full((length,), 1 / length, device="cuda"), 2 * math.sqrt(few.width)

    def potentials():
        found = [solve(*points, weights, weights, eps=eps, n_iters=STEPS) for points in zip(x, y, strict=True)]
        torch.cuda.synchronize()
        return found

    f, g = (z.cpu().double().numpy() for z in potentials()[0][:2])
    points = [z[0].cpu().double().numpy() for z in (x, y)]
    norms = [(z**2).sum(1) for z in points]
    cost = norms[0][:, None] + norms[1] - 2 * points[0] @ points[1].T
    plan = np.exp((f[:, None] + g - cost) / eps) / length
    ours = np.asarray(transport_plan(q[:, :, :1], k[:, :, :1], SinkhornSpec(band=None))[0, 0])
    found = {"error": float(np.abs(plan - ours).max() / ours.max())}
    if not found["error"] < 2e-2:  # TF32 products, and steps in the other order
        return found | {"failed": f"error {found['error']:.1e} is not below 2e-2; not timed"}
    median = statistics.median(clock(lambda: potentials() and None, [()], entry.seconds))
    return found | {"forward_ms": 1e3 * median} | rates(median, few.cells(), 2 * STEPS)
