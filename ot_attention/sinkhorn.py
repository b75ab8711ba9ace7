"""The Sinkhorn loop and its one `custom_vjp`, above the products of `Kernel`.

Between forward and backward only q, k, v, the output and vectors over rows and columns are kept (arXiv 2605.08123).
Heads are taken in groups, one group's band at a time: it stays in cache, and memory does not grow with the batch.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_attention import implicit, support
from ot_attention.backends.xla import Band
from ot_attention.kernel import AnyBand, Dustbin, Kernel
from ot_attention.spec import Heads, SinkhornSpec

# Potentials are folded into the kernel before the scalings leave this range. A row's largest kernel entry is 1, or at
# least e^-16 where the row maximum is skipped: entries too small for float32 hold under 1e-10 of a row or column.
_SCALING_RANGE = 1e10
# Below, `exp(S)` needs no row maximum.
_LARGEST_PLAIN_SCORE = 16.0
# Beyond e^30 between two tail steps, one reference tile times vectors would lose digits (see `_minus_exact_tail`).
_LARGEST_TAIL_CHANGE = 30.0
# Beyond e^60 in one step, entries that float32 flushes to 0 would hold more than 1e-12 of a row or column.
_LARGEST_MOVE = 60.0
_STEPS_BETWEEN_CHECKS = 12  # at most, on a GPU: 22 steps are two times eleven


class Solved(NamedTuple):
    """Output, and potentials after the last base step and after every tail step, dustbin last."""

    out: Float[Array, "N rows value"]
    f: Float[Array, "N R+1 all_rows"]
    g: Float[Array, "N R+1 all_columns"]
    residual: Float[Array, "N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(heads: Heads, spec: SinkhornSpec, band: type[AnyBand] = Band):
    """Output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual `[N]` of every head.

    band: how the implementation holds the band.
    """
    return _attend_fwd(heads, spec, band)[0]


def _attend_fwd(heads, spec, band):
    solved = by_group(functools.partial(forward, spec=spec, band=band), heads, spec, band)
    return (solved.out, solved.f[:, -1], solved.g[:, -1], solved.residual), (heads, solved)


def _attend_bwd(spec, band, kept, cotangents):
    heads, solved = kept
    backward = functools.partial(_backward, spec=spec, band=band)
    dq, dk, dv, ds = by_group(backward, (heads, solved, cotangents[:3]), spec, band)
    gradients = (d.astype(x.dtype) for d, x in zip((dq, dk, dv, ds), heads[:4], strict=True))
    return (Heads(*gradients, None, None),)


attend.defvjp(_attend_fwd, _attend_bwd)


def by_group(function, arguments, spec: SinkhornSpec, band: type[AnyBand] = Band):
    """Maps over groups of as many heads as the band takes at a time."""
    heads = arguments if isinstance(arguments, Heads) else arguments[0]
    number, rows, _ = heads.q.shape
    group = band.heads_at_once(number, rows, heads.k.shape[1], spec.band, heads.q.dtype.itemsize)
    if group == number:
        return function(arguments)
    split = jax.tree.map(lambda x: x.reshape(number // group, group, *x.shape[1:]), arguments)
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), jax.lax.map(function, split))


class Problem(NamedTuple):
    """Scores of a group of heads, and what rows and columns must sum to."""

    scores: Kernel
    a: Float[Array, "N all_rows"]
    b: Float[Array, "N all_columns"]
    spec: SinkhornSpec
    lengths: tuple[Int[Array, "N"], Int[Array, "N"]]

    @classmethod
    def create(cls, heads: Heads, spec: SinkhornSpec, band: type[AnyBand] = Band) -> "Problem":
        q, k, _, bin_score, n_q, n_k = heads
        dtype = _dtype(heads)
        a, b = support.targets(n_q, n_k, q.shape[1], k.shape[1], spec.band, spec.dustbin, dtype)
        dustbin = None
        if spec.dustbin != "none":
            exists, bin_score = (
                support.dustbin_exists(n_q, n_k, spec.dustbin)[:, None],
                bin_score.astype(dtype)[:, None],
            )
            dustbin = Dustbin(
                column=jnp.where(exists & (a[:, :-1] > 0), bin_score, -jnp.inf),
                row=jnp.where(exists & (b[:, :-1] > 0), bin_score, -jnp.inf),
                corner=jnp.where(exists, jnp.zeros_like(bin_score), -jnp.inf),
            )
        created, tiles = band.scores(q, k, n_q, n_k, spec.band, _score_scale(heads, spec))
        return cls(Kernel(created, tiles, dustbin), a, b, spec, (n_q, n_k))

    def linear_system(self, kernel: Kernel, u, v) -> implicit.Plan:
        """That of the plan `u_i K v_j`, whose column sums are met."""
        bin_column, bin_row = jnp.zeros_like(self.a), jnp.zeros_like(self.b)
        if kernel.bin is not None:
            column, row, corner = kernel.bin
            bin_column = u * jnp.concatenate([column, corner], -1) * v[:, -1:]
            bin_row = u[:, -1:] * jnp.concatenate([row, corner], -1) * v
        hats = implicit.hats(*self.lengths, self.a.shape[1] - 1, self.b.shape[1] - 1, self.spec.band, self.a.dtype)
        return implicit.Plan(
            times=lambda x: _scaled(u, kernel.times(_scaled(v, x))),
            transpose_times=lambda x: v * kernel.transpose_times(u * x),
            row_sums=u * kernel.times(v),
            column_sums=self.b,
            bin_column=bin_column,
            bin_row=bin_row,
            hats=hats,
        )


def _score_scale(heads: Heads, spec: SinkhornSpec) -> float:
    return 1 / (math.sqrt(heads.q.shape[-1]) * spec.epsilon)


def _dtype(heads: Heads) -> jnp.dtype:
    """Of potentials and sums."""
    return jnp.promote_types(jnp.result_type(*heads[:3]), jnp.float32)


def _largest_score(heads: Heads, spec: SinkhornSpec) -> Float[Array, ""]:
    """A bound on the absolute scores, by Cauchy and Schwarz."""
    q, k = (x.astype(_dtype(heads)) for x in heads[:2])
    longest_q, longest_k = (jnp.sqrt((x * x).sum(-1).max()) for x in (q, k))
    return jnp.maximum(longest_q * longest_k * _score_scale(heads, spec), jnp.abs(heads.dustbin_score).max())


class _Progress(NamedTuple):
    """Where the iteration stands: the potentials of the last base step and of each tail step so far."""

    step: Int[Array, ""]
    corrections: Int[Array, ""]  # Newton's
    f: Float[Array, "R+1 N all_rows"]
    g: Float[Array, "R+1 N all_columns"]

    def record(self, spec: SinkhornSpec, f, g) -> "_Progress":
        """The potentials that this step has reached; those of base steps overwrite each other."""
        slot = jnp.maximum(self.step - spec.all_base_steps, 0)
        f, g = (jax.lax.dynamic_update_index_in_dim(h, x, slot, 0) for h, x in ((self.f, f), (self.g, g)))
        return self._replace(f=f, g=g)

    def last(self, spec: SinkhornSpec) -> tuple[Array, Array]:
        slot = jnp.maximum(self.step - spec.all_base_steps, 0)
        return tuple(jax.lax.dynamic_index_in_dim(h, slot, keepdims=False) for h in (self.f, self.g))


def forward(heads: Heads, spec: SinkhornSpec, band: type[AnyBand] = Band) -> Solved:
    """Make all steps (contract, section 2) in the way that suits the band."""
    problem = Problem.create(heads, spec, band)
    if not band.remakes:
        return _by_scaling(heads, problem)
    solved, is_exact = _by_absorption(heads, problem)
    return jax.lax.cond(is_exact, lambda: solved, lambda: _by_scaling(heads, problem))


def _by_absorption(heads: Heads, problem: Problem) -> tuple[Solved, Bool[Array, ""]]:
    """Make all steps, absorbing each scaling into the potentials at once, without a look at the data in between.

    For bands that remake their entries anyway. After the first step entries are at most b, so nothing overflows; where
    a step moves a potential so far that a sum lost digits to underflow, the second result is False.
    """
    a, b, spec, scores = problem.a, problem.b, problem.spec, problem.scores

    def step(carry):
        f, g, furthest = carry
        u, v = scores.shift(f, g).exp().scale_once(a, b)
        moves = tuple(jnp.log(jnp.where(target > 0, x, 1)) for x, target in ((u, a), (v, b)))
        furthest = tuple(jnp.maximum(most, jnp.abs(move)) for most, move in zip(furthest, moves, strict=True))
        return f + moves[0], g + moves[1], furthest

    def newton_step(carry):
        f, g, furthest = carry
        system = problem.linear_system(scores.shift(f, g).exp(), jnp.ones_like(a), jnp.ones_like(b))
        return step((f, g + implicit.newton_correction(system, a, spec.cg_steps), furthest))

    nothing = jnp.zeros_like(a), jnp.zeros_like(b)
    top = row_tops(problem, heads, nothing[1])
    carry = support.varying_like(heads.q, (-top, nothing[1], nothing))
    carry = jax.lax.fori_loop(0, spec.base_steps, lambda _, c: step(c), carry)
    if spec.solver == "newton":
        carry = jax.lax.fori_loop(0, spec.newton_steps, lambda _, c: newton_step(c), carry)
    reached = [carry[:2] if spec.all_base_steps else nothing]
    for _ in range(spec.tail_steps):
        carry = step(carry)
        reached.append(carry[:2])
    f, g, furthest = carry
    f_reached, g_reached = (jnp.stack(side, 1) for side in zip(*reached, strict=True))
    plan = scores.shift(f, g).exp()
    out = plan.band.times(plan.tiles, heads.v)
    residual = jnp.abs(plan.times(jnp.ones_like(b)) - a).max(-1)
    is_exact = jnp.maximum(furthest[0].max(), furthest[1].max()) < _LARGEST_MOVE
    return Solved(out, f_reached, g_reached, residual), is_exact


def _by_scaling(heads: Heads, problem: Problem) -> Solved:
    """Make all steps, few of which need an exp over the band.

    The kernel `K = exp(S + g - row maximum)` is scaled, `u = a / (K v)`, `v = b / (K^T u)`, until all steps are done or
    a scaling leaves its range. Then K is made anew from the g reached, after a step in the log domain if there was no
    progress otherwise.
    """
    a, b, spec, scores = problem.a, problem.b, problem.spec, problem.scores
    steps = spec.all_base_steps + spec.tail_steps

    def renew(carry):
        start, *_ = carry
        f, g = start.last(spec)
        top = row_tops(problem, heads, g, plain=start.step == 0)
        top = jnp.where(start.step == steps, -f, top)  # the last step was one in the log domain: u = v = 1
        kernel = scores.shift(-top, g).exp()
        progress, u, v = _scale(problem, kernel, top, g, start)
        out = kernel.band.apply(kernel.tiles, u[:, :-1], v[:, :-1], heads.v)
        residual = jnp.abs(u * kernel.times(v) - a).max(-1)
        stuck = (progress.step == start.step) & (start.step < steps)
        progress = jax.lax.cond(stuck, functools.partial(_log_step, problem), lambda p: p, progress)
        return progress, (progress.step < steps) | stuck, out, residual

    history = (jnp.zeros((spec.tail_steps + 1, *x.shape), x.dtype) for x in (a, b))
    start = _Progress(jnp.array(0), jnp.array(0), *history)
    going = start, jnp.array(True), jnp.zeros((*heads.q.shape[:2], heads.v.shape[-1]), a.dtype), jnp.zeros_like(a[:, 0])
    progress, _, out, residual = jax.lax.while_loop(lambda c: c[1], renew, support.varying_like(heads.q, going))
    return Solved(out, progress.f.swapaxes(0, 1), progress.g.swapaxes(0, 1), residual)


def row_tops(problem: Problem, heads: Heads, g, plain: Bool[Array, ""] | bool = True) -> Float[Array, "N all_rows"]:
    """What is taken off the rows of `S + g` before exp: their maxima, or nothing if g is 0 (`plain`) and S is small."""
    f = jnp.zeros_like(problem.a)
    return jax.lax.cond(
        plain & (_largest_score(heads, problem.spec) < _LARGEST_PLAIN_SCORE),
        lambda: f,
        lambda: jnp.where(problem.a > 0, problem.scores.shift(f, g).row_max(), 0),
    )


def _scale(problem: Problem, kernel: Kernel, top, g, start: _Progress) -> tuple[_Progress, Array, Array]:
    """Steps by scaling `K = exp(S + g - top)`, until all are done or one would leave the range."""
    a, b, spec = problem.a, problem.b, problem.spec

    def potentials(u, v):
        return jnp.where(a > 0, log(u) - top, 0), g + log(v)

    def correct(progress, u, v):
        system = problem.linear_system(kernel, u, v)
        v = v * jnp.exp(implicit.newton_correction(system, a, spec.cg_steps))
        return progress._replace(corrections=progress.corrections + 1), u, v

    def step(carry):
        progress, _, u, v = carry
        if spec.solver == "newton":
            due = (progress.step >= spec.base_steps + progress.corrections) & (progress.corrections < spec.newton_steps)
            progress, u, v = jax.lax.cond(due, correct, lambda *x: x, progress, u, v)
        new_u = support.divide(a, kernel.times(v))
        new_v = support.divide(b, kernel.transpose_times(new_u))
        fine = in_range(new_u, a) & in_range(new_v, b) & (progress.step < steps)
        u, v = jnp.where(fine, new_u, u), jnp.where(fine, new_v, v)
        progress = progress._replace(step=progress.step + fine)
        if on_gpu:
            progress = progress.record(spec, *potentials(u, v))
        else:
            progress = jax.lax.cond(
                progress.step >= spec.all_base_steps, lambda p: p.record(spec, *potentials(u, v)), lambda p: p, progress
            )
        return progress, fine, u, v

    def several_steps(carry):
        """As many as are checked at once; those after the last, or after one out of range, change nothing."""
        return jax.lax.fori_loop(0, at_once, lambda _, c: step(c), carry)

    steps = spec.all_base_steps + spec.tail_steps
    # On a GPU a condition on what was computed makes the host wait for the device and the device for the host.
    on_gpu = support.platform() == "gpu"
    at_once = math.ceil(steps / math.ceil(steps / _STEPS_BETWEEN_CHECKS))
    carry = start, start.step >= 0, jnp.where(a > 0, 1, a), jnp.where(b > 0, 1, b)
    progress, _, u, v = jax.lax.while_loop(
        lambda c: (c[0].step < steps) & c[1], several_steps if on_gpu else step, carry
    )
    return progress.record(spec, *potentials(u, v)), u, v


def _log_step(problem: Problem, progress: _Progress) -> _Progress:
    """One step in the log domain, for scores whose rows and columns have nothing in common."""
    _, g = progress.last(problem.spec)
    f = row_potentials(problem, g)
    g = column_potentials(problem, f)
    return progress._replace(step=progress.step + 1).record(problem.spec, f, g)


def row_potentials(problem: Problem, g: Float[Array, "N all_columns"]) -> Float[Array, "N all_rows"]:
    """The half step `f = log a - LSE_j(S + g)` in the log domain."""
    a, b = problem.a, problem.b
    shifted = problem.scores.shift(jnp.zeros_like(a), g)
    top = jnp.where(a > 0, shifted.row_max(), 0)
    return log(support.divide(a, shifted.shift(-top, jnp.zeros_like(b)).exp().times(jnp.ones_like(b)))) - top


def column_potentials(problem: Problem, f: Float[Array, "N all_rows"]) -> Float[Array, "N all_columns"]:
    """The half step `g = log b - LSE_i(S + f)` in the log domain."""
    a, b = problem.a, problem.b
    shifted = problem.scores.shift(f, jnp.zeros_like(b))
    top = jnp.where(b > 0, shifted.column_max(), 0)
    return log(support.divide(b, shifted.shift(jnp.zeros_like(a), -top).exp().transpose_times(jnp.ones_like(a)))) - top


def _backward(arguments, spec: SinkhornSpec, band: type[AnyBand] = Band) -> tuple[Array, Array, Array, Array]:
    """Gradients of q, k, v and the dustbin score: `dS = P * (G - sum of x_i y_j)`, the plan P made once more.

    The sum has two terms for every tail step, or two for the converged plan: one product gives the whole field.
    """
    heads, solved, (d_out, d_f, d_g) = arguments
    problem = Problem.create(heads, spec, band)
    plan = problem.scores.shift(solved.f[:, -1], solved.g[:, -1]).exp()
    d_out = d_out.astype(heads.v.dtype)  # which it had: `api` hands out the output so
    dv = plan.band.transpose_times(plan.tiles, d_out)
    g_bar = d_g + support.with_dustbin((heads.v * dv).sum(-1))
    f_bar = d_f + support.with_dustbin((d_out * solved.out).sum(-1))

    if spec.gradient == "implicit":
        x, y = _implicit_terms(problem, plan, f_bar, g_bar)
    else:
        change = (jnp.abs(solved.f[:, 1:] - solved.f[:, -1:]).max(), jnp.abs(solved.g - solved.g[:, -1:]).max())
        gentle = jnp.maximum(*change) < _LARGEST_TAIL_CHANGE
        x, y = (jnp.where(gentle, z, 0) for z in _tail_terms(problem, plan, solved, f_bar, g_bar))
    d_scores = plan.modulate((support.with_dustbin(d_out), support.with_dustbin(heads.v)), (-x, y))
    of_scores = functools.partial(_of_scores, heads=heads, spec=spec)
    if spec.gradient == "implicit":
        dq, dk, d_bin = of_scores(d_scores)
    else:
        dq, dk, d_bin = jax.lax.cond(
            gentle,
            lambda d, *_: of_scores(d),
            lambda d, *rest: of_scores(_minus_exact_tail(d, problem, *rest)),
            *(d_scores, solved, f_bar, g_bar),
        )
    return dq, dk, dv, d_bin


def _of_scores(d_scores: Kernel, heads: Heads, spec: SinkhornSpec) -> tuple[Array, Array, Array]:
    """Gradients of q, k and the dustbin score from those of the scores."""
    scale, tiles = _score_scale(heads, spec), d_scores.tiles
    dq, dk = d_scores.band.times(tiles, heads.k), d_scores.band.transpose_times(tiles, heads.q)
    d_bin = jnp.zeros_like(heads.dustbin_score, dq.dtype)
    if d_scores.bin is not None:
        d_bin = d_scores.bin.column.sum(-1) + d_scores.bin.row.sum(-1)
    return scale * dq, scale * dk, d_bin


def _tail_terms(problem: Problem, plan: Kernel, solved: Solved, f_bar, g_bar):
    """The 2 R staircase factors of the tail (contract, section 3), each the plan times a row and a column vector."""
    rows, columns = (jnp.exp(x - x[:, -1:]).swapaxes(0, 1) for x in (solved.f, solved.g))
    terms = []
    for r in range(problem.spec.tail_steps, 0, -1):
        y = columns[r] * support.divide(g_bar, problem.b)
        f_bar = f_bar - rows[r] * plan.times(y)
        x = rows[r] * support.divide(f_bar, problem.a)
        g_bar = -columns[r - 1] * plan.transpose_times(x)
        terms += [(rows[r], y), (x, columns[r - 1])]
        f_bar = jnp.zeros_like(f_bar)
    return (jnp.stack(side, -1) for side in zip(*terms, strict=True))


def _minus_exact_tail(d_scores: Kernel, problem: Problem, solved: Solved, f_bar, g_bar) -> Kernel:
    """The same where potentials move so far within the tail that those vectors would overflow.

    Each factor is made from the scores and taken off, one after the other.
    """
    a, b, scores = problem.a, problem.b, problem.scores
    for r in range(problem.spec.tail_steps, 0, -1):
        f, g, earlier_g = solved.f[:, r], solved.g[:, r], solved.g[:, r - 1]
        factor, y = scores.shift(f, g).exp(), support.divide(g_bar, b)
        f_bar = f_bar - factor.times(y)
        d_scores = d_scores.minus(factor.scale(jnp.ones_like(a), y))
        factor, x = scores.shift(f, earlier_g).exp(), support.divide(f_bar, a)
        d_scores = d_scores.minus(factor.scale(x, jnp.ones_like(b)))
        f_bar, g_bar = jnp.zeros_like(f_bar), -factor.transpose_times(x)
    return d_scores


def _implicit_terms(problem: Problem, plan: Kernel, f_bar, g_bar):
    """The converged plan's multipliers (contract, section 4): `dS = P * (G - x_i - y_j)`."""
    one_row, one_column = jnp.ones_like(problem.a), jnp.ones_like(problem.b)
    system = problem.linear_system(plan, one_row, one_column)
    x, y = implicit.solve(system, f_bar, g_bar, problem.spec.cg_steps)
    return jnp.stack([x, one_row], -1), jnp.stack([one_column, y], -1)


def _scaled(scaling: Array, x: Array) -> Array:
    """`diag(scaling) x` for a vector or several columns."""
    return scaling.reshape(scaling.shape + (1,) * (x.ndim - 2)) * x


def log(x: Array) -> Array:
    """log of a scaling, 0 where it is 0: potentials of unsupported rows and columns are 0."""
    return jnp.log(jnp.where(x == 0, 1, x))


def in_range(scaling: Array, target: Array) -> Bool[Array, ""]:
    return jnp.all(((scaling > 1 / _SCALING_RANGE) & (scaling < _SCALING_RANGE)) | (target == 0))
