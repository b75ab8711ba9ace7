"""Named problems of attention, and the methods that scripts/bench_attention.py compares on them.

A method, of a case and an implementation, is a function of q, k, v, lengths and dustbin scores that returns the output.
"""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import harness
from ot_attention import SinkhornSpec, sinkhorn_attention, sparse
from ot_attention.backends.xla import Band
from ot_attention.support import Layout

STEPS = SinkhornSpec().base_steps + SinkhornSpec().tail_steps
HAS_OTT = importlib.util.find_spec("ott") is not None
_MOST_ORACLE_CELLS = 4 * 2048 * 2048  # dense in float64; larger problems are judged by the banded code in float64


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: q, k, v [batch, length, heads, width], normal, with scores of standard deviation sd."""

    batch: int
    heads: int
    length: int
    band: int | None
    methods: tuple[str, ...] = ()
    width: int = 64
    dustbin: Literal["none", "unit", "full"] = "none"
    ragged: bool = False
    sd: float = 1.0
    epsilon: float = 1.0

    def arguments(self, dtype: str = "float32", seed: int = 0) -> tuple:
        """Draw q, k, v, lengths, dustbin scores and a cotangent of the output, equal in every dtype up to rounding."""
        shape = self.batch, self.length, self.heads, self.width
        keys = jax.random.split(jax.random.key(seed), 4)
        q, k, v, cotangent = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys)
        least, rng = self.length // 3 if self.ragged else self.length, np.random.default_rng(seed)
        lengths = tuple(jnp.asarray(rng.integers(least, self.length + 1, self.batch), jnp.int32) for _ in range(2))
        score = None if self.dustbin == "none" else jnp.zeros(self.heads, dtype)
        return q * self.sd, k, v, lengths, score, cotangent

    def cells(self) -> int:
        """Count the scores in the support of all heads, if sequences have no padding."""
        band = self.length - 1 if self.band is None else min(self.band, self.length - 1)
        return self.batch * self.heads * ((2 * band + 1) * self.length - band * (band + 1))


_BANDED = "softmax 64", "softmax 64 head by head", "softmax 128", "softmax 128 head by head"
_WHOLE = "softmax", "softmax head by head"  # of full support, or where blocks would cover nearly all
_OURS = "tail", "newton, tail", "newton, implicit"
_DIAL = "tail, tolerance", "tail, tau .9", "tail, tau .5", "tail, tau (1, 0)"
_PEERS = "tail", "dense unrolled", "ott unrolled", "ott implicit", "ott kernel mode"
CASES = {
    "long": Case(1, 4, 2048, 256, (*_BANDED, *_OURS, *_DIAL[1:])),
    "long, dustbin": Case(1, 4, 2048, 256, (*_BANDED, *_OURS, *_DIAL[:2]), dustbin="full"),
    "long, sharp": Case(1, 4, 2048, 256, (*_BANDED, "tail"), sd=30.0),
    "long, epsilon .05": Case(1, 4, 2048, 256, (*_BANDED, "tail"), epsilon=0.05),
    "short": Case(32, 4, 192, 64, (*_WHOLE, *_OURS)),
    "short, ragged, dustbin": Case(32, 4, 192, 64, (*_WHOLE, *_OURS), dustbin="full", ragged=True),
    "peers, full support": Case(1, 4, 1024, None, (*_WHOLE, *_PEERS)),
    "peers, band 64": Case(1, 4, 1024, 64, (*_BANDED, "tail", "newton, implicit", "dense unrolled")),
}
_SCALING = "softmax 64", "softmax 128", "tail", "newton, implicit"  # of one head
_SPARSE = "softmax, dense", "sparse sinkhorn", "sparse sinkhorn, sortcut"
SERIES = {  # cases of growing length, of which slopes and a figure are made
    "scaling": {f"scaling {1024 << n}": Case(1, 1, 1024 << n, 256, _SCALING) for n in range(6)},
    "sparse": {f"sparse {1024 << n}": Case(1, 1, 1024 << n, None, _SPARSE) for n in range(5)},
}


def sinkhorn(case: Case, implementation: Any, **changes) -> Callable:
    """Make Sinkhorn attention of one implementation."""
    spec = SinkhornSpec(band=case.band, dustbin=case.dustbin, epsilon=case.epsilon, **changes)
    return lambda q, k, v, lengths, score: sinkhorn_attention(
        q, k, v, spec, lengths[0], lengths[1], score, implementation
    )[0]


def softmax(case: Case, _: str, block: int = 64, head_by_head: bool = False) -> Callable:
    """Make banded softmax attention with automatic differentiation, over blocks of `block` rows."""

    def attend_heads(q, k, v, n_q, n_k):
        band = Band.create(Layout.of(n_q, n_k, q.shape[1], k.shape[1], case.band), q.shape[1], k.shape[1], block)
        scores = band.mask(band.outer(q / (q.shape[-1] ** 0.5 * case.epsilon), k), -jnp.inf)
        top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(q.dtype).min))
        weights = jnp.exp(scores - top)
        total = band.put_rows(weights.sum(-1))
        return band.times(weights, v) / jnp.where(total > 0, total, 1)[..., None]

    def attend(q, k, v, lengths, score):
        batch, length, heads, _ = q.shape
        values = (x.swapaxes(1, 2).reshape(batch * heads, length, -1) for x in (q, k, v))
        arrays = (*values, *(jnp.repeat(n, heads) for n in lengths))
        if head_by_head:
            out = jax.lax.map(lambda one: attend_heads(*(x[None] for x in one))[0], arrays)
        else:
            out = attend_heads(*arrays)
        return out.reshape(batch, heads, length, -1).swapaxes(1, 2)

    return attend


def ott(case: Case, implicit: bool, lse_mode: bool = True) -> Callable:
    """Make attention of ott-jax at full support. It updates columns first, so it gets the transposed problem."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

    steps: dict = dict.fromkeys(("inner_iterations", "min_iterations", "max_iterations"), STEPS)
    differentiation = implicit_differentiation.ImplicitDiff() if implicit else None
    solver = sinkhorn.Sinkhorn(lse_mode=lse_mode, threshold=-1.0, implicit_diff=differentiation, **steps)

    def one_head(q, k, v):
        cost = geometry.Geometry(-(k @ q.T) / q.shape[-1] ** 0.5, epsilon=case.epsilon)
        marginals = jnp.ones(len(k), q.dtype), jnp.ones(len(q), q.dtype)
        return solver(linear_problem.LinearProblem(cost, *marginals)).matrix.T @ v

    return lambda q, k, v, lengths, score: jax.vmap(jax.vmap(one_head, 1, 1))(q, k, v)


def sparse_sinkhorn(**changes) -> Callable:
    """Make Sparse Sinkhorn Attention whose sort network is the identity on the mean queries and keys of blocks."""
    spec = sparse.SparseSpec(block=64, **changes)

    def attend(q, k, v, lengths, score):
        batch, length, heads, width = q.shape
        (places, _), (_, blocks) = (sparse.pooled(x.reshape(batch, length, -1), spec, lengths[0]) for x in (q, k))
        places, blocks = (x.reshape(batch, -1, heads, width) / spec.block for x in (places, blocks))
        scores = jnp.einsum("bihd,bjhd->bhij", places, blocks)
        return sparse.sparse_sinkhorn_attention(q, k, v, scores, spec, lengths[0])

    return attend


_NEWTON: dict = {"base_steps": 10, "solver": "newton"}
_EARLY: dict = {"base_steps": 200, "tolerance": 1e-4}  # as many steps as that takes
_RELAXED: dict[str, dict] = {
    "tail, tau .9": {"tau_a": 0.9, "tau_b": 0.9},
    "tail, tau .5": {"tau_a": 0.5, "tau_b": 0.5},
    "tail, tau (1, 0)": {"tau_a": 1.0, "tau_b": 0.0},
}
_DENSE = functools.partial(sparse.softmax_attention, causal=False)
METHODS: dict[str, Callable[[Case, str], Callable]] = {
    "softmax": softmax,
    "softmax head by head": functools.partial(softmax, head_by_head=True),
    **{
        f"softmax {block}{name}": functools.partial(softmax, block=block, head_by_head=head_by_head)
        for block in (64, 128)
        for name, head_by_head in (("", False), (" head by head", True))
    },
    "tail": sinkhorn,
    "newton, tail": functools.partial(sinkhorn, **_NEWTON),
    "newton, implicit": functools.partial(sinkhorn, gradient="implicit", **_NEWTON),
    "tail, tolerance": functools.partial(sinkhorn, **_EARLY),
    **{method: functools.partial(sinkhorn, **_EARLY, **taus) for method, taus in _RELAXED.items()},
    "softmax, dense": lambda *_: lambda q, k, v, lengths, score: _DENSE(q, k, v, lengths=lengths[0]),
    "sparse sinkhorn": lambda *_: sparse_sinkhorn(),
    "sparse sinkhorn, sortcut": lambda *_: sparse_sinkhorn(sortcut=2),
    "dense unrolled": lambda case, _: sinkhorn(case, "reference", gradient="unrolled"),
    "ott unrolled": lambda case, _: ott(case, implicit=False),
    "ott implicit": lambda case, _: ott(case, implicit=True),
    "ott kernel mode": lambda case, _: ott(case, implicit=False, lse_mode=False),
}
# Methods that are compared with another method in float64 instead of their own computation.
_SAME_AS = {m: "dense unrolled" for m in METHODS if m.startswith("ott")} | {m: "softmax" for m in (*_BANDED, *_WHOLE)}


def parts(attend: Callable) -> dict[str, Callable]:
    """Make the timed functions of `Case.arguments`: the output, and the output with gradients of q, k and v."""

    def forward_backward(q, k, v, lengths, score, cotangent):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, lengths, score), q, k, v)
        return out, *pull_back(cotangent)

    return {"forward": lambda *given: attend(*given[:-1]), "forward_backward": forward_backward}


_CONVERGED: dict = {"base_steps": 20, "solver": "newton", "newton_steps": 8, "cg_steps": 60, "gradient": "implicit"}


@functools.lru_cache(maxsize=4)
def exact(method: str, case: Case) -> tuple:
    """Compute output and gradients in float64, dense where that fits into memory."""
    dense = case.batch * case.heads * case.length**2 <= _MOST_ORACLE_CELLS
    return _in_float64(METHODS[method](case, "reference" if dense else "xla"), case)


@functools.lru_cache(maxsize=4)
def converged(case: Case, taus: tuple = ()) -> tuple:
    """Compute output and gradients in float64 at the fixed point."""
    return _in_float64(sinkhorn(case, implementation="xla", **_CONVERGED, **dict(taus)), case)


def _in_float64(attend: Callable, case: Case) -> tuple:
    with jax.enable_x64(True):
        return jax.jit(parts(attend)["forward_backward"])(*case.arguments("float64"))


def errors(method: str, case: Case, actual: tuple) -> dict[str, float]:
    """Compute relative errors of output and gradients, and the distances of both to the fixed point's."""
    expected = exact(_SAME_AS.get(method, method), case)
    with jax.enable_x64(True):
        off = [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(actual, expected, strict=True)]
        found = {"out": off[0], "gradient": max(off[1:])}
        if not method.startswith(("softmax", "sparse")):
            pairs = zip(actual[:3], converged(case, tuple(_RELAXED.get(method, {}).items())), strict=False)
            out, *gradients = (float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)
            found |= {"out_to_converged": out, "gradient_to_converged": max(gradients)}
    return found


def measure(name: str, case: Case, implementation: str, rounds: int) -> list[harness.Row]:
    """Measure error, compile time, memory and time of every method of a case; ott-jax only where it is installed."""
    arguments, rows, calls = case.arguments(), {}, {}
    methods = [method for method in case.methods if HAS_OTT or not method.startswith("ott")]
    for method in tqdm(methods, desc=name, unit=" methods", disable=None):
        row: harness.Row = {}
        for part, function in parts(METHODS[method](case, implementation)).items():
            program, facts = harness.compile_program(function, *arguments)
            row |= {f"{part}_{fact}": value for fact, value in facts.items()}
            calls[method, part] = functools.partial(program, *arguments)
        error = errors(method, case, calls[method, "forward_backward"]())
        rows[method] = {"case": name, "method": method, "error": error} | row
    medians = {key: statistics.median(of) for key, of in harness.clock(calls, rounds).items()}
    for (method, part), seconds in medians.items():
        fastest = min((m for m in methods if m.startswith("softmax")), key=lambda m: medians[m, part])
        ratio = {f"{part}_to_softmax": seconds / medians[fastest, part], f"{part}_fastest_softmax": fastest}
        rows[method] |= {f"{part}_ms": 1e3 * seconds} | ratio
    shared = dataclasses.asdict(case) | {"implementation": implementation} | harness.machine()
    return [row | shared for row in rows.values()]
