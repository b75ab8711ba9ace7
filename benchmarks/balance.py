"""Named batches of scores, and the ways to balance them that scripts/bench_balance.py compares."""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import harness
from ot_attention import SinkhornSpec, balance

STEPS = SinkhornSpec().base_steps + SinkhornSpec().tail_steps
HAS_OTT = importlib.util.find_spec("ott") is not None


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of square matrices of normal scores with standard deviation sd; of some, as a share, it is sharp_sd."""

    number: int
    size: int
    sd: float = 1.0
    sharp: float = 0.0
    sharp_sd: float = 8.0

    def arguments(self, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
        """Draw scores and a cotangent of the plans, `[number, size, size]`, equal in every dtype up to rounding."""
        shape = self.number, self.size, self.size
        scores, cotangent = (jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0)))
        is_sharp = jnp.arange(self.number) < self.sharp * self.number
        sds = jnp.where(is_sharp, self.sharp_sd, self.sd)[:, None, None]
        return (scores * sds).astype(dtype), cotangent.astype(dtype)


CASES = {
    "4 x 4": Case(65536, 4),
    "4 x 4, one in 1,000 sharp": Case(65536, 4, sharp=0.001),
    "64 x 64": Case(1024, 64),
    "1,024 x 1,024": Case(1, 1024),
}


def ours(**changes) -> Callable:
    spec = SinkhornSpec(**changes)
    return lambda scores: balance(scores, spec)[0]


def plain(scores: jax.Array) -> jax.Array:
    """Make the same steps as one would write them, for automatic differentiation."""

    def step(potentials, _):
        f = -jax.nn.logsumexp(scores + potentials[1][:, None], -1)
        return (f, -jax.nn.logsumexp(scores + f[:, :, None], -2)), None

    zeros = jnp.zeros_like(scores[:, :, 0]), jnp.zeros_like(scores[:, 0])
    (f, g), _ = jax.lax.scan(step, zeros, length=STEPS)
    return jnp.exp(scores + f[:, :, None] + g[:, None])


def ott(is_implicit: bool) -> Callable:
    """Make ott-jax, mapped over matrices. It updates columns first, so it gets the transposed problem."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

    steps: dict = dict.fromkeys(("inner_iterations", "min_iterations", "max_iterations"), STEPS)
    differentiation = implicit_differentiation.ImplicitDiff() if is_implicit else None
    solver = sinkhorn.Sinkhorn(threshold=-1.0, implicit_diff=differentiation, **steps)

    def one(scores):
        ones = jnp.ones(len(scores), scores.dtype)
        problem = linear_problem.LinearProblem(geometry.Geometry(-scores.T, epsilon=1.0), ones, ones)
        return solver(problem).matrix.T

    return jax.vmap(one)


METHODS: dict[str, Callable[[], Callable]] = {
    "unrolled": lambda: plain,
    "tail": ours,
    "implicit": lambda: ours(gradient="implicit"),
    "ott unrolled": lambda: ott(False),
    "ott implicit": lambda: ott(True),
}
# The computation in float64 that each is compared with.
_EXACT = {"tail": lambda: ours(), "implicit": lambda: ours(gradient="implicit")}
_EXACT["ott implicit"] = lambda: ours(gradient="implicit", cg_steps=50)


def parts(way: Callable) -> dict[str, Callable]:
    """Make the timed functions of `Case.arguments`: plans, and plans with the gradient of the scores."""

    def forward_backward(scores, cotangent):
        plan, pull_back = jax.vjp(way, scores)
        return plan, *pull_back(cotangent)

    return {"forward": lambda scores, cotangent: way(scores), "forward_backward": forward_backward}


def errors(method: str, case: Case, actual: tuple) -> dict[str, float]:
    """Compute the largest errors of plans and gradients, relative to the largest entry."""
    with jax.enable_x64(True):
        way = _EXACT.get(method, lambda: plain)()
        expected = jax.jit(parts(way)["forward_backward"])(*case.arguments("float64"))
        off = (float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(actual, expected, strict=True))
        return dict(zip(("error_plan", "error_gradient"), off, strict=True))


def measure(name: str, case: Case, rounds: int) -> list[harness.Row]:
    """Measure error, memory and time of every method; how it fails where it does, and ott-jax where it is installed."""
    rows: dict[str, harness.Row] = {}
    calls: dict[tuple[str, str], Callable] = {}
    for method in tqdm([m for m in METHODS if HAS_OTT or not m.startswith("ott")], desc=name, disable=None):
        own: dict[str, Callable] = {}
        row = harness.or_failure(functools.partial(_compiled, method, case, own))
        rows[method] = {"case": name, "method": method} | row
        if "failed" not in row:
            calls |= {(method, part): call for part, call in own.items()}
    medians = {key: statistics.median(of) for key, of in harness.clock(calls, rounds).items()}
    for (method, part), seconds in medians.items():
        times = {f"{part}_ms": 1e3 * seconds}
        if ("unrolled", part) in medians:
            times[f"{part}_speedup"] = medians["unrolled", part] / seconds
        rows[method] |= times
    shared = dataclasses.asdict(case) | {"steps": STEPS} | harness.machine()
    return [row | shared for row in rows.values()]


def _compiled(method: str, case: Case, calls: dict[str, Callable]) -> harness.Row:
    """Compile a method's parts into calls, and return facts and errors."""
    row: harness.Row = {}
    for part, function in parts(METHODS[method]()).items():
        program, facts = harness.compile_program(function, *case.arguments())
        row |= {f"{part}_{fact}": value for fact, value in facts.items()}
        calls[part] = functools.partial(program, *case.arguments())
    return row | errors(method, case, calls["forward_backward"]())
