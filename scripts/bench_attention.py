"""Sinkhorn attention against softmax attention, the dense reference and ott-jax: error, time and memory on named cases.

  python scripts/bench_attention.py                            # all cases; a table, and a JSON row for each method
  python scripts/bench_attention.py --cases long short --rounds 15
  python scripts/bench_attention.py --cases scaling --figure docs/bench_scaling.png
  python scripts/bench_attention.py --cases sparse     # Sparse Sinkhorn Attention and dense softmax, 1k to 16k residues

Every round calls each method of a case once to warm up and once against the clock, in turn, so that what else the
machine does hits all of them; times are medians, and ratios are to the faster of the two softmax programs. Rows carry
the error first: the largest deviation from the same computation in float64, relative to its largest value, and for
gradients also the distance to the gradient of the converged plan. ott-jax is measured where it is installed
(pip install ott-jax; requirements-dev.txt has it).
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, sparse
from ot_attention.backends.xla import Band

_MOST_ORACLE_CELLS = 4 * 2048 * 2048  # dense in float64; beyond, the banded implementation in float64 judges
_STEPS = SinkhornSpec().base_steps + SinkhornSpec().tail_steps  # what ott-jax is given too


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: q, k, v [batch, length, heads, width], normal with scores of standard deviation sd."""

    batch: int
    heads: int
    length: int
    band: int | None
    methods: tuple[str, ...]
    width: int = 64
    dustbin: Literal["none", "unit", "full"] = "none"
    ragged: bool = False
    sd: float = 1.0
    epsilon: float = 1.0

    def arguments(self, dtype="float32"):
        """q, k, v, lengths, dustbin score, and a cotangent of the output."""
        rng = np.random.default_rng(0)
        shape = self.batch, self.length, self.heads, self.width
        q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
        least = self.length // 3 if self.ragged else self.length
        lengths = tuple(jnp.asarray(rng.integers(least, self.length + 1, self.batch), jnp.int32) for _ in range(2))
        score = None if self.dustbin == "none" else jnp.zeros(self.heads, dtype)
        return q * self.sd, k, v, lengths, score, cotangent


_OURS = ("softmax", "softmax head by head", "tail", "newton, tail", "newton, implicit")
CASES = {
    "long": Case(1, 4, 2048, 256, _OURS),
    "long, dustbin": Case(1, 4, 2048, 256, _OURS, dustbin="full"),
    "long, sharp": Case(1, 4, 2048, 256, _OURS[:3], sd=30.0),
    "long, epsilon .05": Case(1, 4, 2048, 256, _OURS[:3], epsilon=0.05),
    "short": Case(32, 4, 192, 64, _OURS),
    "short, ragged, dustbin": Case(32, 4, 192, 64, _OURS, dustbin="full", ragged=True),
    "peers, full support": Case(
        1, 4, 1024, None, ("softmax", "tail", "dense unrolled", "ott unrolled", "ott implicit", "ott kernel mode")
    ),
    "peers, band 64": Case(1, 4, 1024, 64, ("softmax", "tail", "newton, implicit", "dense unrolled")),
}
SCALING = {
    f"scaling {length}": Case(1, 1, length, 256, ("softmax", "tail", "newton, implicit"))
    for length in (1024, 2048, 4096, 8192, 16384, 32768)
}


SPARSE = {
    f"sparse {length}": Case(1, 1, length, None, ("softmax, dense", "sparse sinkhorn", "sparse sinkhorn, sortcut"))
    for length in (1024, 2048, 4096, 8192, 16384)
}

# ---- methods: (case, implementation) -> a function of q, k, v, lengths and dustbin score that returns the output ----


def sinkhorn(case: Case, implementation: str, **changes) -> Callable:
    spec = SinkhornSpec(band=case.band, dustbin=case.dustbin, epsilon=case.epsilon, **changes)

    def attend(q, k, v, lengths, score):
        return sinkhorn_attention(q, k, v, spec, *lengths, score, implementation)[0]

    return attend


def softmax(case: Case, head_by_head: bool) -> Callable:
    """Banded softmax attention with automatic differentiation, over the same blocks."""

    def attend_heads(q, k, v, n_q, n_k):
        band = Band.create(n_q, n_k, q.shape[1], k.shape[1], case.band)
        scores = band.mask(band.outer(q / (q.shape[-1] ** 0.5 * case.epsilon), k), -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(q.dtype).min))
        weights = jnp.exp(scores - top)
        total = band.put_rows(weights.sum(-1))
        return band.times(weights, v) / jnp.where(total > 0, total, 1)[..., None]

    def attend(q, k, v, lengths, score):
        batch, length, heads, _ = q.shape
        arrays = (
            *(x.swapaxes(1, 2).reshape(batch * heads, length, -1) for x in (q, k, v)),
            *(jnp.repeat(n, heads) for n in lengths),
        )
        if head_by_head:
            out = jax.lax.map(lambda one: attend_heads(*(x[None] for x in one))[0], arrays)
        else:
            out = attend_heads(*arrays)
        return out.reshape(batch, heads, length, -1).swapaxes(1, 2)

    return attend


def ott(case: Case, implicit: bool, lse_mode: bool = True) -> Callable:
    """ott-jax at full support. It updates columns first, so it is given the transposed problem."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

    solver = sinkhorn.Sinkhorn(
        lse_mode=lse_mode,
        threshold=-1.0,
        inner_iterations=_STEPS,
        min_iterations=_STEPS,
        max_iterations=_STEPS,
        implicit_diff=implicit_differentiation.ImplicitDiff() if implicit else None,
    )

    def one_head(q, k, v):
        cost = -(k @ q.T) / q.shape[-1] ** 0.5
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost, epsilon=case.epsilon), jnp.ones(len(k), q.dtype), jnp.ones(len(q), q.dtype)
        )
        return solver(problem).matrix.T @ v

    def attend(q, k, v, lengths, score):
        return jax.vmap(jax.vmap(one_head, 1, 1))(q, k, v)

    return attend


def dense_softmax(q, k, v, lengths, score):
    return sparse.softmax_attention(q, k, v, causal=False, lengths=lengths[0])


def sparse_sinkhorn(**changes) -> Callable:
    """With a sort network of one layer, the identity: places and blocks are known by their mean queries and keys."""
    spec = sparse.SparseSpec(block=64, **changes)

    def attend(q, k, v, lengths, score):
        batch, length, heads, width = q.shape
        places, _ = sparse.pooled(q.reshape(batch, length, -1), spec, lengths[0])
        _, blocks = sparse.pooled(k.reshape(batch, length, -1), spec, lengths[0])
        places, blocks = (x.reshape(batch, -1, heads, width) / spec.block for x in (places, blocks))
        scores = jnp.einsum("bihd,bjhd->bhij", places, blocks)
        return sparse.sparse_sinkhorn_attention(q, k, v, scores, spec, lengths[0])

    return attend


_NEWTON = {"base_steps": 10, "solver": "newton"}
METHODS: dict[str, Callable[[Case, str], Callable]] = {
    "softmax": lambda case, _: softmax(case, head_by_head=False),
    "softmax head by head": lambda case, _: softmax(case, head_by_head=True),
    "tail": lambda case, implementation: sinkhorn(case, implementation),
    "newton, tail": lambda case, implementation: sinkhorn(case, implementation, **_NEWTON),
    "newton, implicit": lambda case, implementation: sinkhorn(case, implementation, gradient="implicit", **_NEWTON),
    "softmax, dense": lambda *_: dense_softmax,
    "sparse sinkhorn": lambda *_: sparse_sinkhorn(),
    "sparse sinkhorn, sortcut": lambda *_: sparse_sinkhorn(sortcut=2),
    "dense unrolled": lambda case, _: sinkhorn(case, "reference", gradient="unrolled"),
    "ott unrolled": lambda case, _: ott(case, implicit=False),
    "ott implicit": lambda case, _: ott(case, implicit=True),
    "ott kernel mode": lambda case, _: ott(case, implicit=False, lse_mode=False),
}
# Whose computation in float64 a method is compared with, if not its own.
_SAME_AS = {"softmax": "softmax head by head"} | {m: "dense unrolled" for m in METHODS if m.startswith("ott")}


# ---- oracles, in float64 ----


@functools.lru_cache(maxsize=4)
def exact(method: str, case: Case) -> tuple:
    """Output and gradients of the same computation, dense where that fits."""
    cells = case.batch * case.heads * case.length**2
    return in_float64(METHODS[method](case, "reference" if cells <= _MOST_ORACLE_CELLS else "xla"), case)


@functools.lru_cache(maxsize=1)
def converged(case: Case) -> tuple:
    """Output and gradients at the fixed point."""
    spec = {"base_steps": 20, "solver": "newton", "newton_steps": 8, "cg_steps": 60, "gradient": "implicit"}
    return in_float64(sinkhorn(case, "xla", **spec), case)


def in_float64(attend: Callable, case: Case) -> tuple:
    with jax.enable_x64(True):
        return jax.jit(forward_backward(attend))(*case.arguments("float64"))


# ---- measuring ----


def forward_backward(attend: Callable) -> Callable:
    """Output and gradients of q, k and v for a given cotangent."""

    def run(q, k, v, lengths, score, cotangent):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, lengths, score), q, k, v)
        return out, *pull_back(cotangent)

    return run


def errors(method: str, case: Case, attend: Callable) -> dict[str, float]:
    """Of the output and of the gradients, in float32 against float64, and of the gradient against the converged one."""
    actual = jax.jit(forward_backward(attend))(*case.arguments())
    expected = exact(_SAME_AS.get(method, method), case)
    with jax.enable_x64(True):
        found = {"out": _deviation(actual[0], expected[0])}
        found |= {"gradient": max(_deviation(x, y) for x, y in zip(actual[1:], expected[1:], strict=True))}
        if not method.startswith(("softmax", "sparse")):
            found["gradient_to_converged"] = max(
                float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
                for x, y in zip(actual[1:3], converged(case)[1:3], strict=True)
            )
    return found


def _deviation(actual, expected) -> float:
    return float(jnp.abs(actual.astype(expected.dtype) - expected).max() / jnp.abs(expected).max())


Programs = dict[tuple[str, str], Callable]  # by method and "forward" or "forward_backward"


def build(name: str, case: Case, implementation: str, progress: tqdm) -> tuple[dict[str, dict[str, Any]], Programs]:
    """For every method of the case its errors, compile times and memory, and the compiled programs."""
    arguments = case.arguments()
    rows: dict[str, dict[str, Any]] = {}
    programs: Programs = {}
    for method in case.methods:
        progress.set_description(f"{name}: {method}")
        attend = METHODS[method](case, implementation)
        rows[method] = {"case": name, "method": method, "error": errors(method, case, attend)}
        for what, run, given in (
            ("forward", attend, arguments[:-1]),
            ("forward_backward", forward_backward(attend), arguments),
        ):
            start = time.perf_counter()
            program = jax.jit(run).lower(*given).compile()
            rows[method][f"{what}_compile_s"] = time.perf_counter() - start
            if memory := program.memory_analysis():
                rows[method][f"{what}_temporary_bytes"] = memory.temp_size_in_bytes
            programs[method, what] = functools.partial(program, *given)
        progress.update()
    return rows, programs


def clock(programs: Programs, rounds: int, of: Callable = statistics.median) -> dict[tuple[str, str], Any]:
    """Median seconds of each program, or what else is wanted `of` them; each call follows one that is not timed."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _, (key, program) in itertools.product(range(rounds), programs.items()):
        jax.block_until_ready(program())
        start = time.perf_counter()
        jax.block_until_ready(program())
        times[key].append(time.perf_counter() - start)
    return {key: of(seconds) for key, seconds in times.items()}


def measure(name: str, case: Case, implementation: str, rounds: int, progress: tqdm) -> list[dict]:
    """A row for every method of the case."""
    rows, programs = build(name, case, implementation, progress)
    medians = clock(programs, rounds)
    for (method, what), seconds in medians.items():
        softmax = min(t for (m, w), t in medians.items() if w == what and m.startswith("softmax"))
        rows[method] |= {f"{what}_ms": 1e3 * seconds, f"{what}_to_softmax": seconds / softmax}
    progress.update()
    machine = {"implementation": implementation, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return [row | dataclasses.asdict(case) | machine for row in rows.values()]


# ---- reporting ----


def table(rows: list[dict]) -> str:
    lines = [
        "| case | method | error, out | error, gradient | gradient to converged | forward ms (x softmax) "
        "| forward + backward ms (x softmax) | temporary MB |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        error, bias = row["error"], row["error"].get("gradient_to_converged")
        times = (f"{row[f'{w}_ms']:.1f} ({row[f'{w}_to_softmax']:.2f})" for w in ("forward", "forward_backward"))
        cells = [row["case"], row["method"], f"{error['out']:.0e}", f"{error['gradient']:.0e}"]
        cells += ["" if bias is None else f"{bias:.2%}", *times, f"{row['forward_backward_temporary_bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exponents(rows: list[dict]) -> str:
    """Slopes of time and memory against length, in logarithms, of rows of a series of cases."""
    lines = []
    for method, (lengths, times, sizes) in _against_length(rows).items():
        slopes = (np.polyfit(np.log(lengths), np.log(y), 1)[0] for y in (times, sizes))
        lines.append("{}: time ~ length^{:.3f}, memory ~ length^{:.3f}".format(method, *slopes))
    return "\n".join(lines)


def _against_length(rows: list[dict]) -> dict[str, tuple[list, ...]]:
    keys = ("length", "forward_backward_ms", "forward_backward_temporary_bytes")
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: tuple([row[key] for row in rows if row["method"] == m] for key in keys) for m in methods}


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Time and temporary memory of forward + backward against length, on logarithmic axes, of a series of cases."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, label, index, unit in zip(
        figure.subplots(1, 2), ("time (ms)", "memory (MB)"), (1, 2), (1, 1e6), strict=True
    ):
        for method, series in _against_length(rows).items():
            axes.loglog(series[0], np.array(series[index]) / unit, marker="o", markersize=3, label=method)
        axes.set_xlabel("length (residues)")
        axes.set_ylabel(label)
        axes.set_xticks(ticks := sorted({row["length"] for row in rows}))
        axes.set_xticklabels([f"{tick // 1024}k" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(f"one head, {title}, forward + backward, temporary memory of the compiled program")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    args = _parse(arguments)
    series = {"scaling": SCALING, "sparse": SPARSE}
    cases = {name: case for name, case in CASES.items() if name in args.cases}
    for name in series:
        cases |= series[name] if name in args.cases else {}
    if importlib.util.find_spec("ott") is None:
        print("ott-jax is not installed and left out (pip install ott-jax)", file=sys.stderr)
        cases = {
            name: dataclasses.replace(case, methods=tuple(m for m in case.methods if not m.startswith("ott")))
            for name, case in cases.items()
        }
    rows: list[dict] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with args.output.open("w") as file, tqdm(total=sum(len(c.methods) + 1 for c in cases.values())) as progress:
            for name, case in cases.items():
                for row in measure(name, case, args.implementation, args.rounds, progress):
                    file.write(json.dumps(row) + "\n")
                    rows.append(row)
    except UnsupportedError as error:
        sys.exit(f"bench_attention.py: {error}")
    print(table(rows))
    for name, title in (("scaling", "W = 256"), ("sparse", "blocks of 64")):
        if of_series := [row for row in rows if row["case"] in series[name]]:
            figure = args.figure if name == "scaling" else args.figure.with_stem(f"{args.figure.stem}_{name}")
            print("\n" + exponents(of_series))
            draw(of_series, figure, title)
            print(f"figure: {figure}")
    print(f"rows: {args.output}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, "scaling", "sparse"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {names}")
    parser.add_argument("--implementation", default="xla", help="of ours: xla, pallas_tpu, pallas_gpu; default: xla")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each program; default: 9")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/rows.jsonl"), help="default: %(default)s")
    parser.add_argument(
        "--figure", type=Path, default=Path("runs/bench/scaling.png"), help="default: %(default)s; _sparse beside it"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
