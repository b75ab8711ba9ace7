"""Newton steps and implicit gradients against dense linear algebra in NumPy, which shares no code with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_attention import SinkhornSpec, sinkhorn_attention
from tests.support.dense import multipliers

SPEC = SinkhornSpec(base_steps=10, solver="newton", gradient="implicit")
WIDTH = 16


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass
class Problem:
    """One head of random queries and keys, and an alignment to be found near the diagonal."""

    length: int
    band: int
    sd: float
    dustbin: str

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.q, self.k = rng.normal(size=(2, self.length, WIDTH))
        self.q *= self.sd
        shift = np.round(self.band / 3 * np.sin(np.arange(self.length) / self.length * 6)).astype(int)
        self.target = np.clip(np.arange(self.length) + shift, 0, self.length - 1)

    def spec(self, **changes):
        return dataclasses.replace(SPEC, band=self.band, dustbin=self.dustbin, **changes)


def losses(problem: Problem, spec: SinkhornSpec, dtype="float64"):
    """Gradients of q and k of the barycenter loss and of cross-entropy, and the residual."""
    score = None if problem.dustbin == "none" else jnp.array([0.5], dtype)
    values = jnp.stack([jnp.arange(problem.length, dtype=dtype), jnp.ones(problem.length, dtype)], -1)

    def both(q, k):
        out, info = sinkhorn_attention(
            q[None, :, None], k[None, :, None], values[None, :, None], spec, None, None, score
        )
        moment, mass = out[0, :, 0].T
        barycenter = ((moment / mass - problem.target) ** 2).mean()
        scores = (q * k[problem.target]).sum(-1) / WIDTH**0.5
        log_plan = scores + info.f[0, 0, : problem.length] + info.g[0, 0, problem.target]
        return (barycenter, -log_plan.mean()), info.residual.max()

    @jax.jit
    def run(q, k):
        _, pull_back, residual = jax.vjp(both, q, k, has_aux=True)
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        return {"barycenter": pull_back((one, zero)), "cross-entropy": pull_back((zero, one))}, residual

    return run(jnp.asarray(problem.q, dtype), jnp.asarray(problem.k, dtype))


def oracle(problem: Problem) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute the gradients at convergence: the plan by damped dense Newton steps, its derivative by a dense solve."""
    index = np.arange(problem.length)
    scores = problem.q @ problem.k.T / WIDTH**0.5
    scores = np.where(np.abs(index[:, None] - index) <= problem.band, scores, -np.inf)
    a = np.ones(problem.length)
    if problem.dustbin != "none":
        scores = np.pad(scores, ((0, 1), (0, 1)), constant_values=0.5)
        scores[-1, -1] = 0
        a = np.append(a, 1 if problem.dustbin == "unit" else problem.length)
    b = a  # both sequences are of one length
    plan = converge(scores, a, b)
    assert max(np.abs(plan.sum(1) - a).max(), np.abs(plan.sum(0) - b).max()) < 1e-14 * problem.length

    real = plan[: problem.length, : problem.length]
    mass = real.sum(1)
    barycenter = real @ index / mass
    of_barycenter = 2 * (barycenter - problem.target) / problem.length / mass
    of_plan = {"barycenter": real * (of_barycenter[:, None] * (index - barycenter[:, None]))}
    of_plan["cross-entropy"] = np.zeros_like(real)
    of_plan["cross-entropy"][index, problem.target] = -1 / problem.length
    gradients = {}
    for name, of_log_plan in of_plan.items():  # d loss / d log P, so that no gradient is infinite where P is 0
        of_log_plan = np.pad(of_log_plan, (0, len(a) - problem.length))
        x, y = multipliers(plan, of_log_plan.sum(1), of_log_plan.sum(0))
        of_scores = (of_log_plan - plan * (x[:, None] + y))[: problem.length, : problem.length] / WIDTH**0.5
        gradients[name] = of_scores @ problem.k, of_scores.T @ problem.q
    return gradients


def converge(scores, a, b):
    g = np.zeros_like(b)
    for _ in range(50):
        f = np.log(a) - np.logaddexp.reduce(scores + g, axis=1)
        g = np.log(b) - np.logaddexp.reduce(scores + f[:, None], axis=0)
    for _ in range(60):
        plan = np.exp(scores + f[:, None] + g)
        x, y = multipliers(plan, a - plan.sum(1), b - plan.sum(0))
        damping = min(1, 2 / max(np.abs(x).max(), np.abs(y).max()))
        f, g = f + damping * x, g + damping * y
        f = np.log(a) - np.logaddexp.reduce(scores + g, axis=1)
        g = np.log(b) - np.logaddexp.reduce(scores + f[:, None], axis=0)
    return np.exp(scores + f[:, None] + g)


def errors(actual, expected) -> dict[str, float]:
    return {
        name: max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(actual[name], of_name, strict=True))
        for name, of_name in expected.items()
    }


SIZES = [(256, 32), pytest.param(1024, 64, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("length", "band"), SIZES)
@pytest.mark.parametrize(
    ("sd", "dustbin"),
    [
        pytest.param(sd, dustbin, marks=() if (sd, dustbin) in {(3.0, "none"), (1.0, "full")} else pytest.mark.slow)
        for sd in (1.0, 3.0)
        for dustbin in ("none", "unit", "full")
    ],
)
def test_implicit_gradient_is_that_of_the_converged_plan(length, band, sd, dustbin):
    problem = Problem(length, band, sd, dustbin)
    expected = oracle(problem)
    for dtype in ("float64", "float32"):
        actual, residual = losses(problem, problem.spec(), dtype)
        assert max(errors(actual, expected).values()) <= 0.01
        assert residual <= 1e-4
    tail, _ = losses(problem, problem.spec(solver="sinkhorn", gradient="tail", base_steps=20))
    assert max(errors(tail, expected).values()) > 0.01  # what it is good for; 220 % without dustbin


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_residual_that_is_not_reached_is_reported(dtype):
    """Scores of sd 8 are nearly permutations, where Newton steps with few conjugate gradients stay far off."""
    problem = Problem(256, 32, 8.0, "none")
    q, k = (jnp.asarray(x, dtype)[None, :, None] for x in (problem.q, problem.k))
    _, info = sinkhorn_attention(q, k, k, problem.spec())
    index = np.arange(problem.length)
    near = np.where(np.abs(index[:, None] - index) <= problem.band, 0, -np.inf)
    plan = np.exp(problem.q @ problem.k.T / WIDTH**0.5 + near + np.asarray(info.f[0, 0])[:, None] + info.g[0, 0])
    true = np.abs(plan.sum(1) - 1).max()
    assert true > 1e-4
    np.testing.assert_allclose(info.residual, true, rtol=1e-2)
