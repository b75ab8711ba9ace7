"""All steps of a problem (docs/math.md, section 3), by scaling a kernel or by absorbing every scaling at once.

Both keep sums in range as the absorption iteration of Schmitzer (2019, arXiv 1610.06519) does.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention import implicit, support
from ot_attention.kernel import Kernel
from ot_attention.problem import Problem, column_potentials, in_range, row_potentials, row_tops
from ot_attention.spec import AllColumns, AllRows, Heads, SinkhornSpec

# Beyond e^60 in one step, entries that float32 flushes to 0 would hold more than 1e-12 of a row or column.
_LARGEST_MOVE = 60.0
_STEPS_BETWEEN_CHECKS = 12  # at most, on a GPU: 22 steps are two times eleven


class Solved(NamedTuple):
    """Output, and potentials after the last base step and after every tail step, dustbin last."""

    out: Float[Array, "N rows value"]
    f: Float[Array, "N R+1 all_rows"]
    g: Float[Array, "N R+1 all_columns"]
    residual: Float[Array, "N"]


def by_absorption(heads: Heads, problem: Problem) -> tuple[Solved, Bool[Array, ""]]:
    """Make all steps, absorbing each scaling into the potentials at once, without a look at the data in between.

    For bands that remake their entries anyway. After the first step entries are at most b, so nothing overflows. The
    second result is False where a potential moved so far in one step that a sum lost digits to underflow.
    """
    a, b, spec, scores = problem.a, problem.b, problem.spec, problem.scores

    def step(carry):
        """Return the next potentials, and the largest change of each in one step so far."""
        f, g, *largest = carry
        u, v = scores.shift(f, g).exp().scale_once(a, b)
        moves = [jnp.log(jnp.where(target > 0, x, 1)) for x, target in ((u, a), (v, b))]
        return f + moves[0], g + moves[1], *map(jnp.maximum, largest, map(jnp.abs, moves))

    def newton_step(carry):
        f, g, *largest = carry
        system = problem.linear_system(scores.shift(f, g).exp(), jnp.ones_like(a), jnp.ones_like(b))
        return step((f, g + implicit.newton_correction(system, a, spec.cg_steps), *largest))

    zeros = jnp.zeros_like(a), jnp.zeros_like(b)
    carry = support.varying_like(heads.q, (-row_tops(problem, heads, zeros[1]), zeros[1], *zeros))
    carry = jax.lax.fori_loop(0, spec.base_steps, lambda _, c: step(c), carry)
    if spec.solver == "newton":
        carry = jax.lax.fori_loop(0, spec.newton_steps, lambda _, c: newton_step(c), carry)
    reached = [carry[:2] if spec.all_base_steps else zeros]
    for _ in range(spec.tail_steps):
        carry = step(carry)
        reached.append(carry[:2])
    f, g = (jnp.stack(side, 1) for side in zip(*reached, strict=True))
    plan = scores.shift(*carry[:2]).exp()
    out = plan.band.times(plan.tiles, heads.v)
    residual = jnp.abs(plan.times(jnp.ones_like(b)) - a).max(-1)
    return Solved(out, f, g, residual), jnp.maximum(*(x.max() for x in carry[2:])) < _LARGEST_MOVE


class _Progress(NamedTuple):
    """Steps made, and the potentials of the last base step and of each tail step so far."""

    step: Int[Array, ""]
    corrections: Int[Array, ""]  # Newton's
    f: Float[Array, "R+1 N all_rows"]
    g: Float[Array, "R+1 N all_columns"]

    def record(self, spec: SinkhornSpec, f, g) -> "_Progress":
        """Store the potentials of this step; base steps overwrite each other."""
        f, g = (jax.lax.dynamic_update_index_in_dim(h, x, self._slot(spec), 0) for h, x in ((self.f, f), (self.g, g)))
        return self._replace(f=f, g=g)

    def last(self, spec: SinkhornSpec) -> tuple[Array, Array]:
        f, g = (jax.lax.dynamic_index_in_dim(h, self._slot(spec), keepdims=False) for h in (self.f, self.g))
        return f, g

    def _slot(self, spec: SinkhornSpec) -> Int[Array, ""]:
        return jnp.maximum(self.step - spec.all_base_steps, 0)


class _Round(NamedTuple):
    """Carry of the outer loop, over kernels: steps so far, and output and residual if they are the last."""

    progress: _Progress
    unfinished: Bool[Array, ""]
    out: Float[Array, "N rows value"]
    residual: Float[Array, "N"]


class _Scaling(NamedTuple):
    """Carry of the inner loop, over steps with one kernel: `u_i K v_j` is the plan so far."""

    progress: _Progress
    fits: Bool[Array, ""]  # whether the last step was made: it was due, and its scalings are in range
    u: AllRows
    v: AllColumns


class _ScaledKernel(NamedTuple):
    """Kernel `K = exp(S + g - top)` into which potentials are absorbed, and steps that scale it."""

    problem: Problem
    kernel: Kernel
    top: AllRows
    g: AllColumns

    @classmethod
    def create(cls, heads: Heads, problem: Problem, progress: _Progress) -> "_ScaledKernel":
        f, g = progress.last(problem.spec)
        top = row_tops(problem, heads, g, plain=progress.step == 0)
        # Nothing is left to do after a last step in the log domain: u = v = 1.
        top = jnp.where(progress.step == problem.spec.all_steps, -f, top)
        return cls(problem, problem.scores.shift(-top, g).exp(), top, g)

    def scale(self, start: _Progress) -> _Scaling:
        """Make steps until all are done or one would leave the range."""
        a, b, steps = self.problem.a, self.problem.b, self.problem.spec.all_steps
        step = self._step
        if support.platform() == "gpu":
            # A condition on computed data makes a GPU's host wait for the device, and the device for the host: run
            # several steps between checks. Steps past the end are no-ops.
            at_once = math.ceil(steps / math.ceil(steps / _STEPS_BETWEEN_CHECKS))
            step = functools.partial(jax.lax.fori_loop, 0, at_once, lambda _, c: self._step(c))
        carry = _Scaling(start, start.step >= 0, jnp.where(a > 0, 1, a), jnp.where(b > 0, 1, b))
        carry = jax.lax.while_loop(lambda c: (c.progress.step < steps) & c.fits, step, carry)
        return carry._replace(progress=self._record(carry.progress, carry.u, carry.v))

    def _step(self, carry: _Scaling) -> _Scaling:
        a, b, spec = self.problem.a, self.problem.b, self.problem.spec
        progress, _, u, v = self._newton_corrected(carry) if spec.solver == "newton" else carry
        new_u = support.divide(a, self.kernel.times(v))
        new_v = support.divide(b, self.kernel.transpose_times(new_u))
        fits = in_range(new_u, a) & in_range(new_v, b) & (progress.step < spec.all_steps)
        u, v = jnp.where(fits, new_u, u), jnp.where(fits, new_v, v)
        progress = progress._replace(step=progress.step + fits)
        if support.platform() == "gpu":
            progress = self._record(progress, u, v)
        else:
            is_kept = progress.step >= spec.all_base_steps
            progress = jax.lax.cond(is_kept, lambda p: self._record(p, u, v), lambda p: p, progress)
        return _Scaling(progress, fits, u, v)

    def _newton_corrected(self, carry: _Scaling) -> _Scaling:
        """Make a Newton step if one is due: after the base steps, and then after each further one."""
        spec, progress = self.problem.spec, carry.progress
        due = progress.step >= spec.base_steps + progress.corrections

        def correct(carry: _Scaling) -> _Scaling:
            progress, fits, u, v = carry
            system = self.problem.linear_system(self.kernel, u, v)
            v = v * jnp.exp(implicit.newton_correction(system, self.problem.a, spec.cg_steps))
            return _Scaling(progress._replace(corrections=progress.corrections + 1), fits, u, v)

        return jax.lax.cond(due & (progress.corrections < spec.newton_steps), correct, lambda c: c, carry)

    def _record(self, progress: _Progress, u, v) -> _Progress:
        f = jnp.where(self.problem.a > 0, support.log(u) - self.top, 0)
        return progress.record(self.problem.spec, f, self.g + support.log(v))


def by_scaling(heads: Heads, problem: Problem) -> Solved:
    """Make all steps, few of which need an exp over the band.

    A kernel is scaled, `u = a / (K v)`, `v = b / (K^T u)`, until all steps are done or a scaling leaves its range.
    Potentials are then absorbed into a new kernel, after a step in the log domain if scaling made none.
    """
    a, b, spec = problem.a, problem.b, problem.spec

    def absorb(carry: _Round) -> _Round:
        start = carry.progress
        scaled = _ScaledKernel.create(heads, problem, start)
        progress, _, u, v = scaled.scale(start)
        kernel = scaled.kernel
        out = kernel.band.apply(kernel.tiles, u[:, :-1], v[:, :-1], heads.v)
        residual = jnp.abs(u * kernel.times(v) - a).max(-1)
        stuck = (progress.step == start.step) & (start.step < spec.all_steps)
        progress = jax.lax.cond(stuck, functools.partial(_log_step, problem), lambda p: p, progress)
        return _Round(progress, (progress.step < spec.all_steps) | stuck, out, residual)

    history = (jnp.zeros((spec.tail_steps + 1, *x.shape), x.dtype) for x in (a, b))
    out = jnp.zeros((*heads.q.shape[:2], heads.v.shape[-1]), a.dtype)
    carry = _Round(_Progress(jnp.array(0), jnp.array(0), *history), jnp.array(True), out, jnp.zeros_like(a[:, 0]))
    carry = jax.lax.while_loop(lambda c: c.unfinished, absorb, support.varying_like(heads.q, carry))
    f, g = carry.progress.f.swapaxes(0, 1), carry.progress.g.swapaxes(0, 1)
    return Solved(carry.out, f, g, carry.residual)


def _log_step(problem: Problem, progress: _Progress) -> _Progress:
    """Make a step in the log domain, for scores whose rows and columns have nothing in common."""
    f = row_potentials(problem, progress.last(problem.spec)[1])
    return progress._replace(step=progress.step + 1).record(problem.spec, f, column_potentials(problem, f))
