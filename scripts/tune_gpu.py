"""Times the kernels of `pallas_gpu` for several tilings: the tables in ot_attention/gpu_kernels.py and gpu_sweep.py.

  python scripts/tune_gpu.py                                 # on a GPU: every kind of kernel, about a minute
  python scripts/tune_gpu.py --kinds step sum --output runs/bench/tilings.jsonl

A row is one kernel with one tiling: milliseconds of a call, and picoseconds a cell of the support. The table of tilings
is not read by the library: what is fastest is written into `tiling_for` and `cut_for` by hand.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ot_attention.backends import gpu, gpu_kernels, gpu_sweep
from ot_attention.backends.gpu_kernels import Tiling

KINDS = ("step", "sum", "vector", "matrix", "gradient")
_CALLS = 50  # of a kernel in a program
_WARM_UP = 0.2  # seconds, until the clock of a card that was idle has risen


class Problem(NamedTuple):
    """Heads of one length. The residues of all heads together are the same for every problem."""

    length: int
    band: int | None
    width: int
    dtype: str


NARROW, MIDDLE, WIDE, FULL = (Problem(2048, band, 64, "bfloat16") for band in (64, 128, 256, None))
FLOAT32 = Problem(384, 64, 32, "float32")


class Variant(NamedTuple):
    """A kernel, a problem and a tiling. A strip has as many tiles as it needs, and 64 rows."""

    kind: str
    problem: Problem
    tiling: Tiling  # of a step, the warps alone are used
    block: int = 64  # positions that a program owns


def variants(kind: str) -> Iterator[Variant]:
    """List the tilings that are timed of one kind of kernel."""
    if kind == "step":
        for problem in (NARROW, FLOAT32, MIDDLE, WIDE):
            for warps in (4, 8):
                yield Variant(kind, problem, Tiling(64, warps, 1, False))
        return
    for problem in (NARROW, FLOAT32, MIDDLE, WIDE, FULL):
        for stages in (1, 2, 3):
            yield Variant(kind, problem, Tiling(64, 4, stages, problem not in (NARROW, FLOAT32)))
    for problem in (WIDE, FULL):
        for stages in (2, 3):
            yield Variant(kind, problem, Tiling(64, 4 if kind != "gradient" else 8, stages, True), block=128)


def program(variant: Variant, residues: int) -> tuple[Any, tuple]:
    """Lower a program that calls the kernel some times in a row with the given tiling; return it and its arguments."""
    kind, problem, tiling, block = variant
    number = residues // problem.length
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, x = (jax.random.normal(key, (number, problem.length, problem.width), problem.dtype) for key in keys)
    n = jnp.full(number, problem.length, jnp.int32)

    def run(q, k, x, n):
        band, scores = gpu.Band.scores(q, k, n, n, problem.band, problem.width**-0.5)
        scores = band.shift(scores, -4.0 * jnp.ones_like(scores.f), jnp.zeros_like(scores.g))

        def call(_, f):
            terms, vector = band.exp(scores._replace(f=f)), f[:, :-1]
            if kind == "step":
                made = functools.reduce(jnp.add, band.scale_once(terms, jnp.ones_like(vector), None))
            elif kind == "sum":
                made = band.sums(terms, by_rows=True)
            elif kind == "vector":
                made = band.transpose_times(terms, vector)
            elif kind == "matrix":
                made = band.times(terms, x)[..., 0]
            else:  # as the gradient of q: fields of the values and of four vectors
                few = jnp.stack([vector] * 4, -1)
                made = band.times(band.modulate(terms, (x, x), (few, few)), x)[..., 0]
            return f.at[:, :-1].add(1e-6 * made)

        return jax.lax.fori_loop(0, _CALLS, call, scores.f)

    with contextlib.ExitStack() as patches:
        for patch in (
            mock.patch.object(gpu_sweep, "_MOST_TILES", 9),
            mock.patch.object(gpu_sweep.Cut, "warps", tiling.warps),
            mock.patch.object(gpu_kernels, "block_for", lambda *_: block),
            mock.patch.object(gpu_kernels, "tiling_for", lambda *_: tiling),
        ):
            patches.enter_context(patch)
        return jax.jit(run).lower(q, k, x, n), (q, k, x, n)


def seconds(run: Callable, rounds: int) -> float:
    """Measure the median time of one kernel call; first the card is kept busy until its clock has risen."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    until = time.perf_counter() + _WARM_UP
    while time.perf_counter() < until:
        once()
    return statistics.median(once() for _ in range(rounds)) / _CALLS


def cells(problem: Problem, residues: int) -> int:
    """Count the cells in the support of all heads."""
    band = problem.length if problem.band is None else problem.band
    i = np.arange(problem.length)
    each = np.minimum(i + band, problem.length - 1) - np.maximum(i - band, 0) + 1
    return residues // problem.length * int(each.sum())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of kernels; default: all")
    parser.add_argument("--residues", type=int, default=1 << 18, help="of all heads; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each program; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/tilings.jsonl"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    if jax.default_backend() != "gpu" and not gpu_kernels.INTERPRET:
        sys.exit("tune_gpu.py: there is no GPU here; run it on a machine with an NVIDIA card and jax[cuda13]")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    todo = [variant for kind in args.kinds for variant in variants(kind)]
    lowered = [program(variant, args.residues) for variant in todo]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(_compiled, [program for program, _ in lowered]))  # all, before any is timed
    with args.output.open("w") as out:
        for variant, (_, given), run in zip(todo, lowered, programs, strict=True):
            tiling = {"block": variant.block, **variant.tiling._asdict()}
            row: dict[str, Any] = {"kind": variant.kind, **variant.problem._asdict(), **tiling}
            if isinstance(run, Exception):
                row["failed"] = f"{type(run).__name__}: {run}"[:200]
            else:
                took = seconds(functools.partial(run, *given), args.rounds)
                row |= {"ms": 1e3 * took, "ps_a_cell": 1e12 * took / cells(variant.problem, args.residues)}
            print(json.dumps(row), flush=True)
            out.write(json.dumps(row) + "\n")


def _compiled(program) -> Any:
    """Compile a program, or return its error: a tiling that is too large must not stop the others."""
    try:
        return program.compile()
    except jax.errors.JaxRuntimeError as error:
        return error


if __name__ == "__main__":
    main()
