"""All steps of a problem (docs/math.md, section 3), by scaling a kernel or by absorbing every scaling at once.

Both keep sums in range as the absorption iteration of Schmitzer (2019, arXiv 1610.06519) does.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention import axes, implicit, support
from ot_attention.kernel import Kernel
from ot_attention.problem import Problem, column_potentials, in_range, row_potentials, row_tops
from ot_attention.spec import AllColumns, AllRows, Heads, SinkhornSpec

# Beyond e^60 in one step, entries that float32 flushes to 0 would hold more than 1e-12 of a row or column.
_LARGEST_MOVE = 60.0
_STEPS_BETWEEN_CHECKS = 12  # at most, on a GPU: 22 steps are two times eleven
# Relaxed rows keep e^(1 - tau_a) of their maximum, up to this power of e: so scalings begin near 1.
_LARGEST_KEPT = 40.0


class Solved(NamedTuple):
    """Output, and potentials after the last base step and after every tail step, dustbin last."""

    out: Float[Array, "N rows value"]
    f: Float[Array, "N R+1 all_rows"]
    g: Float[Array, "N R+1 all_columns"]
    residual: Float[Array, "N"]
    steps: Int[Array, "N"]  # base steps made


def by_absorption(heads: Heads, problem: Problem) -> tuple[Solved, Bool[Array, ""]]:
    """Make all steps, absorbing each scaling into the potentials at once, without a look at the data in between.

    For bands that remake their entries anyway. After the first step entries are at most b, so nothing overflows. The
    second result is False where a potential moved so far in one step that a sum lost digits to underflow.
    """
    a, b, spec, scores, agreed = problem.a, problem.b, problem.spec, problem.scores, problem.axis.agreed
    are_rows_one = heads.row_weights is None and not spec.is_relaxed  # what the band's own step assumes

    def scalings(f, g):
        """Return the scalings of one step of `exp(S + f + g)`."""
        kernel = scores.shift(f, g).exp()
        if are_rows_one:
            return kernel.scale_once(a, b)
        u = problem.row_scaling(kernel.times(jnp.ones_like(b)), f)
        sums = scores.shift(f + support.log(u), g).exp().transpose_times(jnp.ones_like(a))
        return u, problem.column_scaling(sums, g)

    def step(carry):
        """Return the next potentials, and the largest change of each in one step so far."""
        f, g, *largest = carry
        # A scaling of 0 where there is a target makes an infinite move: its sum was lost to underflow.
        moves = [jnp.log(jnp.where(target > 0, x, 1)) for x, target in zip(scalings(f, g), (a, b), strict=True)]
        return f + moves[0], g + moves[1], *map(jnp.maximum, largest, map(jnp.abs, moves))

    def base_step(carry):
        """Make a step of the heads that are not settled."""
        made, settled, potentials, _ = carry
        stepped = step(potentials)
        changes = (x - y for x, y in zip(stepped[:2], potentials[:2], strict=True))
        # The first step begins nowhere, and settles nothing.
        moved = jnp.where(made > 0, problem.movement(*changes), jnp.inf)
        potentials = tuple(jnp.where(settled[:, None], x, y) for x, y in zip(potentials, stepped, strict=True))
        made, settled = made + ~settled, settled | (moved <= spec.tolerance)
        return made, settled, potentials, unsettled(made, settled)

    def unsettled(made, settled):
        return ~agreed((made.max() >= spec.base_steps) | settled.all())

    def newton_step(carry):
        f, g, *largest = carry
        system = problem.newton_system(scores.shift(f, g).exp(), jnp.ones_like(a), jnp.ones_like(b), f)
        correction = implicit.newton_correction(system, problem.row_sums(f), spec.cg_steps)
        return step((f, g + correction, *largest))

    zeros = jnp.zeros_like(a), jnp.zeros_like(b)
    start = _absorbed_rows(problem, row_tops(problem, heads, zeros[1])), zeros[1], *zeros
    made, carry = jnp.full_like(heads.n_q, spec.base_steps), axes.varying_like(heads.q, start)
    if spec.tolerance:
        none_made, none_settled = jnp.zeros_like(heads.n_q), jnp.zeros(heads.n_q.shape, bool)
        begin = none_made, none_settled, carry, jnp.array(spec.base_steps > 0)
        made, _, carry, _ = jax.lax.while_loop(lambda c: c[3], base_step, axes.varying_like(heads.q, begin))
    else:
        carry = jax.lax.fori_loop(0, spec.base_steps, lambda _, c: step(c), carry)
    if spec.solver == "newton":
        made += spec.newton_steps
        carry = jax.lax.fori_loop(0, spec.newton_steps, lambda _, c: newton_step(c), carry)
    reached = [carry[:2] if spec.all_base_steps else zeros]
    for _ in range(spec.tail_steps):
        carry = step(carry)
        reached.append(carry[:2])
    f, g = (jnp.stack(side, 1) for side in zip(*reached, strict=True))
    plan = scores.shift(*carry[:2]).exp()
    out = plan.band.times(plan.tiles, heads.v)
    residual = problem.axis.max(jnp.abs(plan.times(jnp.ones_like(b)) - a).max(-1))
    return Solved(out, f, g, residual, made), agreed(jnp.maximum(*(x.max() for x in carry[2:])) < _LARGEST_MOVE)


class _Progress(NamedTuple):
    """Steps made, and the potentials of the last base step and of each tail step so far."""

    step: Int[Array, ""]
    corrections: Int[Array, ""]  # Newton's
    made: Int[Array, "N"]  # base steps of each head, at most `step`
    settled: Bool[Array, "N"]  # heads whose base steps have ended early
    f: Float[Array, "R+1 N all_rows"]
    g: Float[Array, "R+1 N all_columns"]

    def record(self, spec: SinkhornSpec, f, g) -> "_Progress":
        """Store the potentials of this step; base steps overwrite each other."""
        f, g = (jax.lax.dynamic_update_index_in_dim(h, x, self._slot(spec), 0) for h, x in ((self.f, f), (self.g, g)))
        return self._replace(f=f, g=g)

    def stepped(self, spec: SinkhornSpec, moved: Float[Array, "N"] | None, fits: Bool[Array, ""] | bool) -> "_Progress":
        """Count a step if it fits, and end the base steps if `moved`, by which it moved heads, settles all of them."""
        step = self.step + fits
        if moved is None:
            return self._replace(step=step)
        is_base = self.step < spec.base_steps
        made = self.made + (fits & ~(self.settled & is_base) & (self.step < spec.all_base_steps))
        settled = self.settled | (is_base & fits & (self.step > 0) & (moved <= spec.tolerance))
        step = jnp.where(spec.axis.agreed(settled.all()), jnp.maximum(step, spec.base_steps), step)
        return self._replace(step=step, made=made, settled=settled & (step < spec.base_steps))

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
    """Kernel `K = exp(S + f + g)` into which potentials are absorbed, and steps that scale it."""

    problem: Problem
    kernel: Kernel
    f: AllRows
    g: AllColumns
    begun: Int[Array, ""]  # steps made before

    @classmethod
    def create(cls, heads: Heads, problem: Problem, progress: _Progress) -> "_ScaledKernel":
        f, g = progress.last(problem.spec)
        absorbed = _absorbed_rows(problem, row_tops(problem, heads, g, plain=progress.step == 0))
        # Nothing is left to do after a last step in the log domain: u = v = 1.
        f = jnp.where(progress.step == problem.spec.all_steps, f, absorbed)
        return cls(problem, problem.scores.shift(f, g).exp(), f, g, progress.step)

    def scale(self, start: _Progress) -> _Scaling:
        """Make steps until all are done or one would leave the range."""
        a, b, steps = self.problem.a, self.problem.b, self.problem.spec.all_steps
        step = self._step
        if support.platform() == "gpu":
            # A condition on computed data makes a GPU's host wait for the device, and the device for the host: run
            # several steps between checks. Steps past the end are no-ops.
            at_once = math.ceil(steps / math.ceil(steps / _STEPS_BETWEEN_CHECKS))
            step = functools.partial(jax.lax.fori_loop, 0, at_once, lambda _, c: self._step(c))
        u, v = jnp.where(a > 0, 1, a), jnp.where(b > 0, 1, b)
        if self.problem.spec.tolerance or self.problem.spec.solver == "newton":  # they look at the step before
            u = jnp.where(a > 0, jnp.exp(start.last(self.problem.spec)[0] - self.f), a)
        carry = _Scaling(start, start.step >= 0, u, v)
        carry = jax.lax.while_loop(lambda c: (c.progress.step < steps) & c.fits, step, carry)
        return carry._replace(progress=self._record(carry.progress, carry.u, carry.v))

    def _step(self, carry: _Scaling) -> _Scaling:
        a, b, spec = self.problem.a, self.problem.b, self.problem.spec
        progress, _, u, v = self._newton_corrected(carry) if spec.solver == "newton" else carry
        new_u = self.problem.row_scaling(self.kernel.times(v), self.f)
        new_v = self.problem.column_scaling(self.kernel.transpose_times(new_u), self.g)
        fits = self.problem.axis.agreed(in_range(new_u, a) & in_range(new_v, b) & (progress.step < spec.all_steps))
        taken, moved = fits, None
        if spec.tolerance:
            taken = (fits & ~progress.settled)[:, None]
            moved = self.problem.movement(*(support.log(x) - support.log(y) for x, y in ((new_u, u), (new_v, v))))
        u, v = jnp.where(taken, new_u, u), jnp.where(taken, new_v, v)
        progress = progress.stepped(spec, moved, fits)
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
            f = self._row_potentials(u)
            system = self.problem.newton_system(self.kernel, u, v, f)
            v = v * jnp.exp(implicit.newton_correction(system, self.problem.row_sums(f), spec.cg_steps))
            return _Scaling(progress._replace(corrections=progress.corrections + 1), fits, u, v)

        return jax.lax.cond(due & (progress.corrections < spec.newton_steps), correct, lambda c: c, carry)

    def _record(self, progress: _Progress, u, v) -> _Progress:
        """Store the potentials of the last step, unless no step was made: f then only keeps sums in range."""
        found = self._row_potentials(u), self.g + support.log(v)
        potentials = zip(found, progress.last(self.problem.spec), strict=True)
        return progress.record(self.problem.spec, *(jnp.where(progress.step > self.begun, *x) for x in potentials))

    def _row_potentials(self, u: AllRows) -> AllRows:
        return jnp.where(self.problem.a > 0, support.log(u) + self.f, 0)


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
        residual = problem.axis.max(jnp.abs(u * kernel.times(v) - a).max(-1))
        stuck = (progress.step == start.step) & (start.step < spec.all_steps)
        progress = jax.lax.cond(stuck, functools.partial(_log_step, problem), lambda p: p, progress)
        return _Round(progress, (progress.step < spec.all_steps) | stuck, out, residual)

    history = (jnp.zeros((spec.tail_steps + 1, *x.shape), x.dtype) for x in (a, b))
    out = jnp.zeros((*heads.q.shape[:2], heads.v.shape[-1]), a.dtype)
    heads_made, none_settled = jnp.zeros_like(heads.n_q), jnp.zeros(heads.n_q.shape, bool)
    start = _Progress(jnp.array(0), jnp.array(0), heads_made, none_settled, *history)
    carry = _Round(start, jnp.array(True), out, jnp.zeros_like(a[:, 0]))
    carry = jax.lax.while_loop(lambda c: c.unfinished, absorb, axes.varying_like(heads.q, carry))
    f, g = carry.progress.f.swapaxes(0, 1), carry.progress.g.swapaxes(0, 1)
    made = carry.progress.made if spec.tolerance else jnp.full_like(heads.n_q, spec.all_base_steps)
    return Solved(carry.out, f, g, carry.residual, made)


def _log_step(problem: Problem, progress: _Progress) -> _Progress:
    """Make a step in the log domain, for scores whose rows and columns have nothing in common."""
    spec = problem.spec
    last_f, last_g = progress.last(spec)
    f = row_potentials(problem, last_g)
    g, moved = column_potentials(problem, f), None
    if spec.tolerance:
        moved, settled = problem.movement(f - last_f, g - last_g), progress.settled[:, None]
        f, g = jnp.where(settled, last_f, f), jnp.where(settled, last_g, g)
    return progress.stepped(spec, moved, True).record(spec, f, g)


def _absorbed_rows(problem: Problem, top: AllRows) -> AllRows:
    """Return what rows add to `S + g` before exp, from their maxima: minus these, but for what relaxed rows keep."""
    kept = (1 - problem.spec.tau_a) * top
    return jnp.clip(kept, -_LARGEST_KEPT, _LARGEST_KEPT) - top
