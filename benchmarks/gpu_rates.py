"""Rates of attention on a GPU: picoseconds a cell and half-iteration of `pallas_gpu`, `xla`, cuDNN and flash-sinkhorn.

A stage of scripts/bench_gpu.py. A cell is one score of the support; T + R steps are 2 (T + R) half-iterations, softmax
attention counts as one, over all cells. Every timed program is checked first: its output and gradients for one example
and two heads against float64; a row that fails is reported and not timed. `softmax, cudnn` is
jax.nn.dot_product_attention. `flash-sinkhorn` (PyTorch and Triton, arXiv 2602.03067) is measured where it is installed,
head by head, because it takes one problem at a time.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, transport_plan
from scripts.bench_attention import Case, forward_backward

STEPS = SinkhornSpec().base_steps + SinkhornSpec().tail_steps
TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-6}
FAILURES = (
    UnsupportedError,
    RuntimeError,
    ValueError,
    TypeError,
    ImportError,
)  # of a method, which costs its own row only
_FEW_HEADS = 2  # whose numbers are checked; and which flash-sinkhorn is timed on
_SETS = 3  # of inputs, in rotation
_WARM_UP = 0.2  # seconds: until then the clock of a card that was idle rises
_FLASH_LENGTHS = 4096, 8192  # shorter problems of one head at a time leave the card idle
_WAVE = 16  # rows whose programs are compiled together, before any of them is timed
_PARTS = ("forward", "forward_backward")


class Method(NamedTuple):
    """A way to compute attention."""

    attend: Callable[[Case], Callable]  # as in bench_attention: of q, k, v, lengths and dustbin score
    passes: int  # over all cells, in the forward
    banded: bool = True


class Row(NamedTuple):
    """A row of the results to be measured."""

    length: int
    band: int | None
    method: str = "pallas_gpu"
    dtype: str = "bfloat16"


class Size(NamedTuple):
    """Sizes that all rows share: residues of a batch, heads, width of a head, and seconds for timing one program."""

    residues: int = 65536
    heads: int = 16
    width: int = 64
    seconds: float = 0.3

    def case(self, length: int, band: int | None) -> Case:
        return Case(max(1, self.residues // length), self.heads, length, band, (), width=self.width)


def sinkhorn(case: Case, implementation: str) -> Callable:
    """Sinkhorn attention of one of the library's implementations."""
    spec = SinkhornSpec(band=case.band, dustbin=case.dustbin)

    def attend(q, k, v, lengths, score):
        return sinkhorn_attention(q, k, v, spec, *lengths, score, implementation)[0]

    return attend


def softmax(case: Case, implementation: str) -> Callable:
    """Dense softmax attention."""

    def attend(q, k, v, lengths, score):
        # cuDNN has no float64, which only the check of numbers asks for.
        chosen = "xla" if q.dtype == jnp.float64 else implementation
        return jax.nn.dot_product_attention(q, k, v, implementation=chosen)

    return attend


METHODS = {
    "pallas_gpu": Method(functools.partial(sinkhorn, implementation="pallas_gpu"), 2 * STEPS),
    "xla": Method(functools.partial(sinkhorn, implementation="xla"), 2 * STEPS),
    "softmax, cudnn": Method(functools.partial(softmax, implementation="cudnn"), 1, banded=False),
    "softmax, xla": Method(functools.partial(softmax, implementation="xla"), 1, banded=False),
}
# The most informative first: what is not reached in time is lost. xla is slow and softmax, cudnn has no float32.
PLAN = [
    *(Row(1024, band) for band in (64, None, 256)),
    *(Row(4096, band) for band in (64, None, 256)),
    Row(1024, None, "softmax, cudnn"),
    Row(4096, None, "softmax, cudnn"),
    Row(1024, 64, "xla"),
    Row(1024, None, "xla"),
    Row(1024, 64, dtype="float32"),
    Row(1024, 64, "xla", "float32"),
    Row(4096, None, dtype="float32"),
    Row(8192, None),
    Row(512, 64),
    Row(512, None),
    Row(8192, 64),
    Row(2048, 64),
    Row(2048, None),
    Row(8192, None, dtype="float32"),
    *(Row(length, 256) for length in (512, 2048, 8192)),
    *(Row(length, None, "softmax, cudnn") for length in (512, 2048, 8192)),
]


def product(lengths: list[int], bands: list[int | None], methods: list[str], dtypes: list[str]) -> list[Row]:
    """Rows of every combination; dense softmax has no band."""
    rows = (Row(*of) for of in itertools.product(lengths, bands, methods, dtypes))
    return [row for row in rows if METHODS[row.method].banded or row.band is None]


def measured(plan: Sequence[Row], size: Size) -> Iterator[dict[str, Any]]:
    """One row of results for each row of the plan, and those of flash-sinkhorn at the end if it is installed."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(plan), _WAVE):
            yield from _measured_wave(plan[start : start + _WAVE], size, pool)
    if importlib.util.find_spec("flash_sinkhorn"):
        for length in _FLASH_LENGTHS:
            yield _about(Row(length, None, "flash-sinkhorn", "float32"), size) | or_failure(
                functools.partial(measure_flash_sinkhorn, size.case(length, None), size.seconds)
            )


def _measured_wave(wave: Iterable[Row], size: Size, pool: concurrent.futures.Executor) -> Iterator[dict[str, Any]]:
    """Compiles the programs of some rows in threads; then times them, with nothing beside."""
    oracles: dict[tuple, concurrent.futures.Future] = {}
    for row in wave:
        if (key := _oracle_of(row)) not in oracles:
            oracles[key] = pool.submit(_compiled_oracle, *key, size)
    programs = {(row, part): pool.submit(_compiled, row, part, size) for row in wave for part in _PARTS}
    concurrent.futures.wait([*oracles.values(), *programs.values()])
    for row in wave:
        of_row = {part: programs[row, part] for part in _PARTS}
        yield _about(row, size) | or_failure(functools.partial(measure, row, size, of_row, oracles[_oracle_of(row)]))


def _about(row: Row, size: Size) -> dict[str, Any]:
    case = size.case(row.length, row.band)
    about = {"length": row.length, "band": row.band, "method": row.method, "dtype": row.dtype, "batch": case.batch}
    return about | {"heads": size.heads, "width": size.width, "device": jax.devices()[0].device_kind}


def or_failure(function: Callable[[], dict]) -> dict[str, Any]:
    """Return what a function returns, or how it failed."""
    try:
        return function()
    except FAILURES as error:
        return {"failed": failure(error)}


def failure(error: Exception) -> str:
    """An exception in one line of at most some hundred characters: XLA's quote whole programs."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


# ---- programs and inputs ----


def _arguments(case: Case, dtype) -> tuple:
    """Shapes of q, k, v, lengths, dustbin score (none) and cotangent, in the order of `Case.arguments`."""
    x = jax.ShapeDtypeStruct((case.batch, case.length, case.heads, case.width), dtype)
    n = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return x, x, x, (n, n), None, x


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(one, shape, dtype) for one in jax.random.split(key, 4))


def drawn(case: Case, dtype: str, seed: int) -> tuple:
    """Normal inputs of a case, drawn on the device; sequences are as long as they are padded."""
    shape = case.batch, case.length, case.heads, case.width
    q, k, v, cotangent = _normal(jax.random.key(seed), shape, dtype)
    n = jnp.full(case.batch, case.length, jnp.int32)
    return q, k, v, (n, n), None, cotangent


def _compiled(row: Row, part: str, size: Size) -> tuple[Callable, float]:
    """A compiled program of the arguments of `drawn`, and the seconds it took to trace and compile."""
    attend = METHODS[row.method].attend(case := size.case(row.length, row.band))
    given, start = _arguments(case, row.dtype), time.perf_counter()
    if part == "forward":
        program = jax.jit(attend).lower(*given[:-1]).compile()
        return lambda *given: program(*given[:-1]), time.perf_counter() - start
    return jax.jit(forward_backward(attend)).lower(*given).compile(), time.perf_counter() - start


def _oracle_of(row: Row) -> tuple[int, int | None, str]:
    return row.length, row.band, "xla" if METHODS[row.method].banded else "softmax, xla"


def _compiled_oracle(length: int, band: int | None, method: str, size: Size) -> Callable:
    few = dataclasses.replace(size.case(length, band), batch=1, heads=min(size.heads, _FEW_HEADS))
    with jax.enable_x64(True):  # of this thread
        return jax.jit(forward_backward(METHODS[method].attend(few))).lower(*_arguments(few, jnp.float64)).compile()


# ---- measuring ----


def measure(row: Row, size: Size, programs: dict, oracle: concurrent.futures.Future) -> dict[str, Any]:
    """Error, then milliseconds and rates of the forward, and of forward and backward.

    programs: for each part the future of `_compiled`.
    """
    case, method = size.case(row.length, row.band), METHODS[row.method]
    runs = {part: programs[part].result() for part in _PARTS}
    found: dict[str, Any] = {f"{part}_compile_s": seconds for part, (_, seconds) in runs.items()}
    sets = [drawn(case, row.dtype, seed) for seed in range(_SETS)]
    found["error"] = error(runs["forward_backward"][0], oracle.result(), sets[0])
    if not found["error"] < TOLERANCE[row.dtype]:
        return found | {"failed": f"error {found['error']:.1e} is not below {TOLERANCE[row.dtype]:.1e}; not timed"}
    times = {part: clock(run, sets, size.seconds) for part, (run, _) in runs.items()}
    for part, seconds in times.items():
        found |= {f"{part}_ms": 1e3 * statistics.median(seconds), f"{part}_fastest_ms": 1e3 * min(seconds)}
        found[f"{part}_calls"] = len(seconds)
    counted = cells(case if method.banded else dataclasses.replace(case, band=None))
    return found | rates(statistics.median(times["forward"]), counted, method.passes)


def error(run: Callable, oracle: Callable, given: tuple) -> float:
    """Largest deviation of output and gradients from float64 for one example and two heads, relative to the largest
    value.
    """
    actual = [x[:1, :, :_FEW_HEADS] for x in run(*given)]
    with jax.enable_x64(True):
        q, k, v, cotangent = (x[:1, :, :_FEW_HEADS].astype("float64") for x in (*given[:3], given[5]))
        lengths = tuple(n[:1] for n in given[3])
        expected = jax.device_get(oracle(q, k, v, lengths, None, cotangent))
    pairs = zip(jax.device_get(actual), expected, strict=True)
    return max(float(np.abs(x.astype("float64") - y).max() / np.abs(y).max()) for x, y in pairs)


def clock(run: Callable, sets: Sequence[tuple], seconds: float, *, least: int = 5, most: int = 50) -> list[float]:
    """Seconds of each call, each of another set of inputs than the one before, for about so many seconds in all."""
    warm = time.perf_counter() + min(seconds, _WARM_UP)
    for number, given in enumerate(itertools.cycle(sets)):
        jax.block_until_ready(run(*given))
        if number + 1 >= len(sets) and time.perf_counter() > warm:
            break
    times: list[float] = []
    for given in itertools.cycle(sets):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - start)
        if len(times) >= most or (len(times) >= least and sum(times) > seconds):
            break
    return times


def cells(case: Case) -> int:
    """Number of cells in the support of all heads, sequences being as long as they are padded."""
    band = case.length if case.band is None else case.band
    i = np.arange(case.length)
    each = np.minimum(i + band, case.length - 1) - np.maximum(i - band, 0) + 1
    return case.batch * case.heads * int(each.sum())


def rates(seconds: float, cells: int, passes: int) -> dict[str, float]:
    """Picoseconds a cell, for one pass and for one full step (row and column), and cells a second.

    passes: half-iterations of a Sinkhorn method; 1 of softmax, which has no steps.
    """
    steps = {"ps_a_cell_and_step": 1e12 * seconds / (cells * passes / 2)} if passes > 1 else {}
    visits = cells * passes
    return {"ps_a_cell_and_half_iteration": 1e12 * seconds / visits, "Tcell_a_second": visits / seconds / 1e12} | steps


def measure_flash_sinkhorn(case: Case, seconds: float) -> dict[str, Any]:
    """Times flash-sinkhorn for the same number of alternating steps at full support, with its default TF32 products.

    Its cost is the squared distance: with `eps = 2 sqrt(d)` the norms go into the potentials, and plans are ours.
    """
    import torch
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating

    few = dataclasses.replace(case, batch=1, heads=_FEW_HEADS)
    q, k, *_ = few.arguments()
    x, y = ([torch.tensor(np.asarray(z[0, :, h]), device="cuda") for h in range(_FEW_HEADS)] for z in (q, k))
    weights, eps = torch.full((case.length,), 1 / case.length, device="cuda"), 2 * math.sqrt(case.width)

    def run():
        found = [
            sinkhorn_flashstyle_alternating(*points, weights, weights, eps=eps, n_iters=STEPS)
            for points in zip(x, y, strict=True)
        ]
        torch.cuda.synchronize()
        return found

    f, g = (z.cpu().double().numpy() for z in run()[0][:2])
    points = [z[0].cpu().double().numpy() for z in (x, y)]
    norms = [(z**2).sum(1) for z in points]
    cost = norms[0][:, None] + norms[1] - 2 * points[0] @ points[1].T
    plan = np.exp((f[:, None] + g - cost) / eps) / case.length
    ours = np.asarray(transport_plan(q[:, :, :1], k[:, :, :1], SinkhornSpec(band=None))[0, 0])
    found: dict[str, Any] = {"error": float(np.abs(plan - ours).max() / ours.max())}
    if not found["error"] < 2e-2:  # of TF32 products, and of steps in the other order
        return found | {"failed": f"error {found['error']:.1e} is not below 2e-2; not timed"}
    median = statistics.median(clock(lambda: run() and None, [()], seconds))
    return found | {"forward_ms": 1e3 * median} | rates(median, cells(few), 2 * STEPS)
