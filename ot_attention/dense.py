"""Many dense matrices of scores at once: steps by scaling, in which each absorbs at its own pace.

The definitions are those of `reference`, in docs/math.md, sections 3 to 6.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention import axes, reference, support
from ot_attention.problem import fit, scaling_of
from ot_attention.reference import Matrices, Potentials, Solved
from ot_attention.spec import AllColumns, AllRows, SinkhornSpec

Problem = tuple[Matrices, AllRows, AllColumns]  # scores, and targets of rows and columns
# The reference tile of the tail serves while no potential moves by more; sums of it that matter are then above e^-40.
_LARGEST_TAIL_MOVE = 20.0
_LARGEST_EXPONENT = 80.0  # of float32


class _Progress(NamedTuple):
    """Potentials that are absorbed into the kernels, and the steps that every matrix has made."""

    f: AllRows
    g: AllColumns
    made: Int[Array, "N"]
    settled: Bool[Array, "N"]

    def unfinished(self, spec: SinkhornSpec) -> Bool[Array, "N"]:
        return ~self.settled & (self.made < spec.base_steps)

    def counted(self, spec: SinkhornSpec, taken: Bool[Array, "N"], moved: Float[Array, "N"] | None) -> "_Progress":
        """Count a step of some matrices, which settles those that it has moved by little; not the first step."""
        settled = self.settled
        if moved is not None:
            settled |= taken & (self.made > 0) & (moved <= spec.tolerance)
        return self._replace(made=self.made + taken, settled=settled)


def solve(problem: Problem, spec: SinkhornSpec) -> Solved:
    """Return plan, log-potentials f and g, residual and base steps made.

    Everything behind the base steps is differentiated by JAX, in any mode and any number of times.
    """
    if spec.gradient == "unrolled":
        return reference.balance(*problem, spec, basis=None)
    scores, a, b = problem
    if isinstance(a.shape[1], int):  # conjugate gradients end after as many steps as there are unknowns
        spec = dataclasses.replace(spec, cg_steps=min(spec.cg_steps, a.shape[1]))
    constants = jax.lax.stop_gradient(problem)
    f, g, made = _base_steps(constants, spec)
    if spec.solver == "newton":
        f, g = reference.newton_steps(constants, (f, g), None, spec)
        made += spec.newton_steps
    if spec.gradient == "tail":
        plan, f, g = _tail(problem, (f, g), spec)
    else:
        _, f, g = _tail(constants, (f, g), spec)
        f, g = reference.converged((scores, support.log(a), support.log(b)), f, g, None, spec)
        plan = jnp.exp(scores + f[:, :, None] + g[:, None])
    return plan, f, g, reference.residual(plan, a), made


def _base_steps(problem: Problem, spec: SinkhornSpec) -> tuple[AllRows, AllColumns, Int[Array, "N"]]:
    """Return f and g after the base steps, and how many each matrix made.

    All steps are tried with one kernel. Matrices whose scalings leave the range of float32 begin anew, in rounds of
    their own in which the others do not change.
    """
    scores, a, b = problem
    top = jnp.where(a > 0, scores.max(-1), 0)
    made = jnp.zeros(scores.shape[0], jnp.int32)
    start = axes.varying_like(scores, _Progress(-spec.tau_a * top, jnp.zeros_like(b), made, made > 0))
    if spec.base_steps and not spec.tolerance:
        start = _all_at_once(problem, spec, start)
    f, g, made, _ = jax.lax.while_loop(
        lambda p: p.unfinished(spec).any(), functools.partial(_round, problem, spec), start
    )
    return f, g, made


def _all_at_once(problem: Problem, spec: SinkhornSpec, start: _Progress) -> _Progress:
    """Make all base steps of the matrices that need one kernel only."""
    _, a, b = problem
    kernel = _kernel(problem, start)

    def step(_, carry):
        (_, v), fits = carry
        u, v = _scalings(kernel, problem, spec, start, v)
        return (u, v), (fits[0] & fit(u, a), fits[1] & fit(v, b))

    carry = _ones(problem), axes.varying_like(a, (jnp.ones_like(a, bool), jnp.ones_like(b, bool)))
    (u, v), fits = jax.lax.fori_loop(0, spec.base_steps, step, carry)
    done = fits[0].all(-1) & fits[1].all(-1)
    f, g = (jnp.where(done[:, None], x + support.log(y), x) for x, y in ((start.f, u), (start.g, v)))
    return _Progress(f, g, jnp.where(done, spec.base_steps, start.made), start.settled)


def _round(problem: Problem, spec: SinkhornSpec, start: _Progress) -> _Progress:
    """Absorb potentials into new kernels, and make steps until every matrix is done or out of range."""
    _, a, b = problem
    kernel = _kernel(problem, start)

    def step(carry):
        progress, going, u, v = carry
        new_u, new_v = _scalings(kernel, problem, spec, start, v)
        taken, moved = going & fit(new_u, a).all(-1) & fit(new_v, b).all(-1), None
        if spec.tolerance:
            changes = (support.log(x) - support.log(y) for x, y in ((new_u, u), (new_v, v)))
            moved = support.movement(a, *changes, spec.is_relaxed)
        progress = progress.counted(spec, taken, moved)
        u, v = jnp.where(taken[:, None], new_u, u), jnp.where(taken[:, None], new_v, v)
        return progress, taken & progress.unfinished(spec), u, v

    carry = start, start.unfinished(spec), *_ones(problem)
    progress, _, u, v = jax.lax.while_loop(lambda c: c[1].any(), step, carry)
    progress = progress._replace(f=start.f + support.log(u), g=start.g + support.log(v))
    stuck = start.unfinished(spec) & (progress.made == start.made)
    log_step = functools.partial(_log_step, problem, spec)
    return jax.lax.cond(stuck.any(), log_step, lambda progress, _: progress, progress, stuck)


def _log_step(problem: Problem, spec: SinkhornSpec, progress: _Progress, stuck: Bool[Array, "N"]) -> _Progress:
    """Make a step in the log domain for matrices that no scaling can move."""
    f, g = reference.step(problem, progress.g, spec)
    moved = None
    if spec.tolerance:
        moved = support.movement(problem[1], f - progress.f, g - progress.g, spec.is_relaxed)
    f, g = jnp.where(stuck[:, None], f, progress.f), jnp.where(stuck[:, None], g, progress.g)
    return progress.counted(spec, stuck, moved)._replace(f=f, g=g)


def _tail(problem: Problem, base: Potentials, spec: SinkhornSpec) -> tuple[Matrices, AllRows, AllColumns]:
    """Return plan, f and g after the tail steps from constant potentials, by scaling one tile if that is exact."""
    scores, a, b = problem
    f, g = base
    if not spec.base_steps:  # f is what was subtracted from scores, and no potential
        f = jax.lax.stop_gradient(-spec.tau_a * jnp.where(a > 0, scores.max(-1), 0))
    start = _Progress(f, g, *(jnp.zeros(0, t) for t in (jnp.int32, bool)))
    # Entries beyond the range come with scalings beyond it.
    kernel = jnp.exp(jnp.minimum(scores + f[:, :, None] + g[:, None], _LARGEST_EXPONENT))
    constants = jax.lax.stop_gradient((kernel, problem))
    first = _scalings(*constants, spec, start, _ones(problem)[1])
    # A half step never moves potentials by more than the one before (docs/math.md, section 7).
    moves = (jnp.abs(jnp.log(jnp.where(t > 0, x, 1))) for x, t in zip(first, (a, b), strict=True))
    largest = jnp.maximum(*(x.max(-1) for x in moves))
    gentle = spec.tail_steps * largest < _LARGEST_TAIL_MOVE

    def scaled(kernel, problem):
        _, v = _ones(problem)
        kernel = jnp.where(gentle[:, None, None], kernel, 1)  # under `vmap` both ways are gone
        for _ in range(spec.tail_steps):
            u, v = _scalings(kernel, problem, spec, start, v)
        plan = jnp.einsum("ni,nij,nj->nij", u, kernel, v, precision="highest")
        return plan, *(jnp.where(t > 0, x + support.log(y), 0) for x, y, t in ((f, u, a), (g, v, b)))

    @jax.checkpoint
    def exact(kernel, problem):
        potentials = base
        for _ in range(spec.tail_steps):
            potentials = reference.step(problem, potentials[1], spec)
        return jnp.exp(problem[0] + potentials[0][:, :, None] + potentials[1][:, None]), *potentials

    return jax.lax.cond(gentle.all(), scaled, exact, kernel, problem)


def _kernel(problem: Problem, progress: _Progress) -> Matrices:
    return jnp.exp(problem[0] + progress.f[:, :, None] + progress.g[:, None])


def _scalings(kernel: Matrices, problem: Problem, spec: SinkhornSpec, start: _Progress, v: AllColumns) -> Potentials:
    """Return the next scalings of rows and columns, `u = a / (K v)` and `v = b / (K^T u)` unless relaxed."""
    _, a, b = problem
    u = scaling_of(a, jnp.einsum("nij,nj->ni", kernel, v, precision="highest"), spec.tau_a, start.f)
    return u, scaling_of(b, jnp.einsum("nij,ni->nj", kernel, u, precision="highest"), spec.tau_b, start.g)


def _ones(problem: Problem) -> Potentials:
    """Return scalings that change nothing, 0 without support."""
    _, a, b = problem
    return jnp.where(a > 0, jnp.ones_like(a), 0), jnp.where(b > 0, jnp.ones_like(b), 0)
