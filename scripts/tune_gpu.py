"""Time the kernels of `pallas_gpu` for several tilings: the tables in gpu_kernels.py and gpu_sweep.py.

  python scripts/tune_gpu.py                                 # on a GPU: every kind of kernel, about a minute
  python scripts/tune_gpu.py --kinds step sum --output runs/bench/tilings.jsonl

A row is one kernel with one tiling: milliseconds of a call, and picoseconds a cell of the support. The library does not
read the rows: the fastest tilings are written into `tiling_for` and `cut_for` by hand. Rows are appended to
OUTPUT.part, which becomes OUTPUT at the end.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

import command_line
from benchmarks import harness
from benchmarks.attention import Case
from ot_attention.backends import gpu, gpu_kernels, gpu_sweep
from ot_attention.backends.gpu_kernels import Tiling
from ot_attention.support import Layout

KINDS = ("step", "sum", "vector", "matrix", "gradient")
_CALLS = 50  # of a kernel in a program


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
        for problem, warps in itertools.product((NARROW, FLOAT32, MIDDLE, WIDE), (4, 8)):
            yield Variant(kind, problem, Tiling(64, warps, 1, False))
        return
    for problem, stages in itertools.product((NARROW, FLOAT32, MIDDLE, WIDE, FULL), (1, 2, 3)):
        yield Variant(kind, problem, Tiling(64, 4, stages, problem not in (NARROW, FLOAT32)))
    for problem, stages in itertools.product((WIDE, FULL), (2, 3)):
        yield Variant(kind, problem, Tiling(64, 4 if kind != "gradient" else 8, stages, True), block=128)


def lowered(variant: Variant, residues: int) -> tuple[jax.stages.Lowered, tuple]:
    """Lower a program that calls the kernel some times in a row with the given tiling; return it and its arguments."""
    kind, problem, tiling, block = variant
    number = residues // problem.length
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, x = (jax.random.normal(key, (number, problem.length, problem.width), problem.dtype) for key in keys)
    n = jnp.full(number, problem.length, jnp.int32)

    def run(q, k, x, n):
        layout = Layout.of(n, n, problem.length, problem.length, problem.band)
        band, scores = gpu.Band.scores(q, k, layout, problem.width**-0.5)
        scores = band.shift(scores, -4.0 * jnp.ones_like(scores.f), jnp.zeros_like(scores.g))

        def call(_, f):
            terms, vector = band.exp(scores._replace(f=f)), f[:, :-1]
            few = jnp.stack([vector] * 4, -1)
            made = {
                "step": lambda: functools.reduce(jnp.add, band.scale_once(terms, jnp.ones_like(vector), None)),
                "sum": lambda: band._product(terms, None, by_rows=True),
                "vector": lambda: band.transpose_times(terms, vector),
                "matrix": lambda: band.times(terms, x)[..., 0],
                # As the gradient of q: fields of the values and of four vectors.
                "gradient": lambda: band.times(band.modulate(terms, (x, x), (few, few)), x)[..., 0],
            }
            return f.at[:, :-1].add(1e-6 * made[kind]())

        return jax.lax.fori_loop(0, _CALLS, call, scores.f)

    with (
        mock.patch.object(gpu_sweep, "_MOST_TILES", 9),
        mock.patch.object(gpu_sweep.Cut, "warps", tiling.warps),
        mock.patch.multiple(gpu_kernels, block_for=lambda *_: block, tiling_for=lambda *_: tiling),
    ):
        return jax.jit(run).lower(q, k, x, n), (q, k, x, n)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = harness.parser(__doc__, "runs/bench/tilings.jsonl", rounds=7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of kernels; default: all")
    longest = max(variant.problem.length for kind in KINDS for variant in variants(kind))
    least, told = command_line.at_least(longest), "of all heads; default: %(default)s"
    parser.add_argument("--residues", type=least, default=1 << 18, metavar="N", help=told)
    args = parser.parse_args(arguments)
    return command_line.run("tune_gpu.py", lambda: tune(args), debug=args.debug)


def tune(args: argparse.Namespace) -> None:
    """Time the chosen kernels. Raises ValueError without a GPU, or if no kernel could be timed."""
    if jax.default_backend() != "gpu" and not gpu_kernels.INTERPRET:
        raise ValueError("there is no GPU here; run it on a machine with an NVIDIA card and jax[cuda13]")
    programs = {variant: lowered(variant, args.residues) for kind in args.kinds for variant in variants(kind)}
    compiling = {
        variant: lambda program=program: {"run": program.compile()} for variant, (program, _) in programs.items()
    }
    found = dict(harness.in_threads(compiling))  # all, before any is timed; a tiling can be too large
    with harness.row_writer(args.output) as write:
        for variant, (_, given) in programs.items():
            kind, problem, tiling, block = variant
            row: harness.Row = {"kind": kind, **problem._asdict(), "block": block, **tiling._asdict()}
            if "failed" in found[variant]:
                row |= found[variant]
            else:
                calls = {kind: functools.partial(found[variant]["run"], *given)}
                times = harness.clock(calls, args.rounds, warm_up=harness.GPU_WARM_UP)[kind]
                seconds = statistics.median(times) / _CALLS
                cells = Case(args.residues // problem.length, 1, problem.length, problem.band).cells()
                row |= {"ms": 1e3 * seconds, "ps_a_cell": 1e12 * seconds / cells}
            print(json.dumps(row), flush=True)
            write(row)
    if all("failed" in of for of in found.values()):
        raise ValueError(f"no kernel could be compiled, see {args.output}")


if __name__ == "__main__":
    sys.exit(main())
