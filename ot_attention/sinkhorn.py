"""The Sinkhorn loop's one `custom_vjp`, above the products of `Kernel`.

Between forward and backward only q, k, v, the output and vectors over rows and columns are kept (arXiv 2605.08123).
Heads are taken in groups, one group's band at a time: it stays in cache, and memory does not grow with the batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ot_attention import axes, derivatives, implicit, support
from ot_attention.backends import Band, RemakingBand
from ot_attention.backends.xla import Band as XlaBand
from ot_attention.kernel import Kernel
from ot_attention.problem import Problem, column_potentials, row_potentials, score_scale
from ot_attention.spec import Heads, SinkhornSpec
from ot_attention.steps import Solved, by_absorption, by_scaling

# Beyond e^30 between two tail steps, one reference tile times vectors would lose digits (see `_minus_exact_tail`).
_LARGEST_TAIL_CHANGE = 30.0
# Beyond it, rounding a potential to float32 changes a plan by more than 5e-7. Flat scores of 100,000 columns are below.
_LARGEST_EXACT_POTENTIAL = 12.0


def attend(heads: Heads, spec: SinkhornSpec, band: type[Band] = XlaBand):
    """Return output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual and steps of every head."""
    return _attend(derivatives.only_reverse(heads, band.implementation()), spec, band)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(heads: Heads, spec: SinkhornSpec, band: type[Band]):
    return _attend_fwd(heads, spec, band)[0]


def _attend_fwd(heads, spec, band):
    heads = _within_first_derivative(heads, band)
    solved = by_group(functools.partial(_solved, spec=spec, band=band), heads, spec, band)
    of_heads = map(spec.axis.alike, (solved.residual, solved.steps))
    return (solved.out, solved.f[:, -1], solved.g[:, -1], *of_heads), (heads, solved)


def _attend_bwd(spec, band, kept, cotangents):
    heads, solved = kept
    arguments = heads, solved, _within_first_derivative(cotangents[:3], band)
    found = by_group(functools.partial(_backward, spec=spec, band=band), arguments, spec, band)
    gradients = jax.tree.map(lambda x, d: d.astype(x.dtype), heads.differentiable, found)
    return (heads._replace(n_q=None, n_k=None, segments=None).replacing(gradients),)


_attend.defvjp(support.promoting(_attend_fwd), support.promoting(_attend_bwd))


def _within_first_derivative(tree, band: type[Band]):
    """Return the arrays; a second derivative is refused for bands whose products are kernels."""
    return derivatives.only_first(tree, band.implementation()) if issubclass(band, RemakingBand) else tree


def by_group(function, arguments, spec: SinkhornSpec, band: type[Band] = XlaBand):
    """Map a function over groups of heads, as many as the band takes at a time."""
    heads = arguments if isinstance(arguments, Heads) else arguments[0]
    number, rows, _ = heads.q.shape
    group = band.heads_at_once(number, rows, heads.k.shape[1], spec.band, heads.q.dtype.itemsize)
    if group == number:
        return function(arguments)
    split = jax.tree.map(lambda x: x.reshape(number // group, group, *x.shape[1:]), arguments)
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), jax.lax.map(function, split))


def forward(heads: Heads, spec: SinkhornSpec, band: type[Band] = XlaBand) -> Solved:
    """Make all steps in the way that suits the band."""
    problem = Problem.create(heads, spec, band)
    if not issubclass(band, RemakingBand):
        return by_scaling(heads, problem)
    solved, is_exact = by_absorption(heads, problem)
    return jax.lax.cond(is_exact, lambda: solved, lambda: by_scaling(heads, problem))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _solved(heads: Heads, spec: SinkhornSpec, band: type[Band]) -> Solved:
    """Make all steps; the derivatives, needed for second ones only, are the surrogate's."""
    return forward(heads, spec, band)


def _solved_jvp(spec, band, primals, tangents):
    (heads,), (changes,) = primals, tangents
    solved = _solved(heads, spec, band)
    tangents_of = _implicit_tangents if spec.gradient == "implicit" else _tail_tangents
    out, f, g = tangents_of(heads, Heads(*changes), solved, spec, band)
    return solved, Solved(out, f, g, jnp.zeros_like(solved.residual), np.zeros(solved.steps.shape, jax.dtypes.float0))


_solved.defjvp(support.promoting(_solved_jvp))


def _tail_tangents(heads: Heads, changes: Heads, solved: Solved, spec: SinkhornSpec, band: type[Band]):
    """Return tangents of output, f and g of the tail steps, made once more, from constant potentials."""

    def tail(*given):
        problem = Problem.create(heads.replacing(given), spec, band)
        reached = [(solved.f[:, 0], solved.g[:, 0])]
        for _ in range(spec.tail_steps):
            f = row_potentials(problem, reached[-1][1])
            reached.append((f, column_potentials(problem, f)))
        plan = problem.scores.shift(*reached[-1]).exp()
        return plan.band.times(plan.tiles, given[2]), *(jnp.stack(side, 1) for side in zip(*reached, strict=True))

    return jax.jvp(tail, heads.differentiable, changes.differentiable)[1]


def _implicit_tangents(heads: Heads, changes: Heads, solved: Solved, spec: SinkhornSpec, band: type[Band]):
    """Return tangents of output, f and g of the converged plan."""
    f, g = solved.f[:, -1], solved.g[:, -1]

    def problem_and_plan(given, f, g):
        problem = Problem.create(heads.replacing(given), spec, band)
        return problem, problem.scores.shift(f, g).exp()

    def unmet(given):
        """Return sums of rows and columns beyond what weights ask for, as far as they change with the inputs."""
        problem, plan = problem_and_plan(given, f, g)
        rows, columns = plan.times(jnp.ones_like(problem.b)), plan.transpose_times(jnp.ones_like(problem.a))
        log_a, log_b = support.log(problem.a), support.log(problem.b)
        held_rows, held_columns = jax.lax.stop_gradient((rows, columns))
        return rows - held_rows * log_a, columns - held_columns * log_b

    def output(given, f, g):
        _, plan = problem_and_plan(given, f, g)
        return plan.band.times(plan.tiles, given[2])

    inputs, input_changes = heads.differentiable, changes.differentiable
    _, (rows, columns) = jax.jvp(unmet, (inputs,), (input_changes,))
    problem, plan = problem_and_plan(inputs, f, g)
    system = problem.linear_system(plan, jnp.ones_like(f), jnp.ones_like(g))
    d_f, d_g = implicit.solve(system, -rows, -columns, spec.cg_steps)
    _, d_out = jax.jvp(output, (inputs, f, g), (input_changes, d_f, d_g))
    return d_out, *(jnp.broadcast_to(d[:, None], x.shape) for d, x in ((d_f, solved.f), (d_g, solved.g)))


def _backward(arguments, spec: SinkhornSpec, band: type[Band] = XlaBand) -> tuple[Array | None, ...]:
    """Return gradients of `Heads.differentiable` from `dS = P * (G - sum of x_i y_j)`, with P made once more.

    The sum has two terms for every tail step, or two for the converged plan: one product gives the whole field.
    """
    heads, solved, (d_out, d_f, d_g) = arguments
    problem = Problem.create(heads, spec, band)
    d_out = d_out.astype(heads.v.dtype)  # exact: the output was rounded to it
    d_f, d_g = (_of_one_dustbin(d, spec) for d in (d_f, d_g))
    agreed = spec.axis.agreed
    is_small = agreed(jnp.maximum(jnp.abs(solved.f).max(), jnp.abs(solved.g).max()) < _LARGEST_EXACT_POTENTIAL)
    pull_back = functools.partial(_pull_back, heads=heads, spec=spec)

    def last_plan():
        return problem.scores.shift(solved.f[:, -1], solved.g[:, -1]).exp()

    def sums(plan, scaling, out):
        """Return dV, cotangents of f and g, and the values' fields, for the plan `K diag(scaling)` and its output."""
        dv = plan.band.transpose_times(plan.tiles, d_out)
        v = heads.v
        if scaling is not None:
            of_residues = scaling[:, :-1, None]
            dv, v = of_residues * dv, of_residues.astype(v.dtype) * v
        g_bar = d_g + support.with_dustbin((heads.v * dv).sum(-1))
        f_bar = d_f + support.with_dustbin((d_out * out).sum(-1))
        return dv, f_bar, g_bar, (support.with_dustbin(d_out), support.with_dustbin(v))

    if spec.gradient == "implicit":
        # dS = P * (G - x_i - y_j), docs/math.md, section 5
        plan = last_plan()
        one_row, one_column = jnp.ones_like(problem.a), jnp.ones_like(problem.b)
        scaling, out = jax.lax.cond(
            is_small, lambda: (one_column, solved.out), lambda: _remade_output(problem, plan, heads)
        )
        dv, f_bar, g_bar, values = sums(plan, scaling, out)
        system = problem.linear_system(plan, one_row, scaling)
        x, y = implicit.solve(system, f_bar, g_bar, spec.cg_steps)
        terms = -jnp.stack([x, one_row], -1), jnp.stack([scaling, scaling * y], -1)
        dq, dk, d_bin = pull_back(plan.modulate(values, terms))
        return dq, dk, dv, d_bin, *_of_weights(problem, heads, system.row_sums * x, system.column_sums * y)

    change = (jnp.abs(solved.f[:, 1:] - solved.f[:, -1:]).max(), jnp.abs(solved.g - solved.g[:, -1:]).max())
    gentle = agreed(is_small & (jnp.maximum(*change) < _LARGEST_TAIL_CHANGE))

    # Both ways make their tiles inside: tiles of the one take no memory while the other runs.
    def by_terms():
        plan = last_plan()
        dv, f_bar, g_bar, values = sums(plan, None, solved.out)
        (x, y), of_targets = _tail_terms(problem, plan, solved, f_bar, g_bar)
        d_scores = plan.modulate(values, (-jnp.where(gentle, x, 0), jnp.where(gentle, y, 0)))
        return *pull_back(d_scores), dv, of_targets

    def exact():
        plan = last_plan()
        dv, f_bar, g_bar, values = sums(plan, *_remade_output(problem, plan, heads))
        d_scores, of_targets = _minus_exact_tail(plan.modulate(values), problem, solved, f_bar, g_bar)
        return *pull_back(d_scores), dv, of_targets

    dq, dk, d_bin, dv, of_targets = jax.lax.cond(gentle, by_terms, exact)
    return dq, dk, dv, d_bin, *_of_weights(problem, heads, *of_targets)


def _of_one_dustbin(cotangent: Array, spec: SinkhornSpec) -> Array:
    """Return the cotangent of a potential with the dustbin's entry added up over the devices, which have copies."""
    if not spec.axis.is_shared:
        return cotangent
    return jnp.concatenate([cotangent[:, :-1], spec.axis.sum(cotangent[:, -1:])], 1)


def _remade_output(problem: Problem, plan: Kernel, heads: Heads) -> tuple[Array, Array]:
    """Return the scaling that gives the plan's columns their sums, and the output of the plan so scaled.

    Large potentials are rounded by so much that `exp(S + f + g)` is not the plan of the forward pass. Gradients are
    differences between sums over one and the same plan, and may be far smaller than the sums.
    """
    scaling = jnp.ones_like(problem.b)  # relaxed columns have no sums that are known otherwise
    if problem.spec.tau_b == 1:
        scaling = support.divide(problem.b, plan.transpose_times(jnp.ones_like(problem.a)))
    values = scaling[:, :-1, None].astype(heads.v.dtype) * heads.v
    return scaling, plan.band.times(plan.tiles, values)


def _pull_back(d_scores: Kernel, heads: Heads, spec: SinkhornSpec) -> tuple[Array, Array, Array]:
    """Return gradients of q, k and the dustbin score from the gradient of the scores.

    Where devices share sequences, each has the score's gradient by its own residues, which JAX adds up.
    """
    scale, tiles = score_scale(heads, spec), d_scores.tiles
    dq, dk = d_scores.band.times(tiles, heads.k), d_scores.band.transpose_times(tiles, heads.q)
    d_bin = jnp.zeros_like(heads.dustbin_score, dq.dtype)
    if d_scores.bin is not None:
        d_bin = d_scores.bin.column.sum(-1) + d_scores.bin.row.sum(-1)
    return scale * dq, scale * dk, d_bin


def _tail_terms(problem: Problem, plan: Kernel, solved: Solved, f_bar, g_bar):
    """Return the row and column vectors of the tail's 2 R terms, and the cotangents of log a and log b.

    See docs/math.md, section 4. A half step to potentials that stay 0 has no term.
    """
    tau_a, tau_b = problem.spec.tau_a, problem.spec.tau_b
    rows, columns = (jnp.exp(x - x[:, -1:]).swapaxes(0, 1) for x in (solved.f, solved.g))
    terms, of_a, of_b = [], jnp.zeros_like(f_bar), jnp.zeros_like(g_bar)
    for r in range(problem.spec.tail_steps, 0, -1):
        if tau_b:
            of_b += tau_b * g_bar
            y = columns[r] * tau_b * support.divide(g_bar, problem.column_sums(solved.g[:, r]))
            f_bar = f_bar - rows[r] * plan.times(y)
            terms.append((rows[r], y))
        if tau_a:
            of_a += tau_a * f_bar
            x = rows[r] * tau_a * support.divide(f_bar, problem.row_sums(solved.f[:, r]))
            g_bar = -columns[r - 1] * plan.transpose_times(x)
            terms.append((x, columns[r - 1]))
        f_bar = jnp.zeros_like(f_bar)
    none = jnp.zeros((*f_bar.shape, 1), f_bar.dtype), jnp.zeros((*g_bar.shape, 1), g_bar.dtype)
    sides = tuple(jnp.stack(side, -1) for side in zip(*terms, strict=True)) or none
    return sides, (of_a, of_b)


def _minus_exact_tail(d_scores: Kernel, problem: Problem, solved: Solved, f_bar, g_bar):
    """Subtract the tail's terms one by one, each made from the scores; return the cotangents of log a and log b too.

    For potentials so large that rounding changes the sums of `exp(S + f + g)`, by which shares are divided here, and
    for those that move so far within the tail that the vectors of `_tail_terms` would overflow.
    """
    tau_a, tau_b = problem.spec.tau_a, problem.spec.tau_b
    one_row, one_column = jnp.ones_like(problem.a), jnp.ones_like(problem.b)

    def minus_step(carry, step):
        d_scores, f_bar, g_bar, of_a, of_b = carry
        f, g, earlier_g = step
        if tau_b:
            of_b += tau_b * g_bar
            factor = problem.scores.shift(f, g).exp()
            y = tau_b * support.divide(g_bar, factor.transpose_times(one_row))
            f_bar = f_bar - factor.times(y)
            d_scores = d_scores.minus(factor.modulate((one_row[..., None], y[..., None])))
        if tau_a:
            of_a += tau_a * f_bar
            factor = problem.scores.shift(f, earlier_g).exp()
            x = tau_a * support.divide(f_bar, factor.times(one_column))
            d_scores = d_scores.minus(factor.modulate((x[..., None], one_column[..., None])))
            g_bar = -factor.transpose_times(x)
        return (d_scores, axes.varying_like(f_bar, jnp.zeros_like(f_bar)), g_bar, of_a, of_b), None

    none = axes.varying_like(f_bar, (jnp.zeros_like(f_bar), jnp.zeros_like(g_bar)))
    carry = d_scores, f_bar, g_bar, *none
    steps = tuple(x.swapaxes(0, 1)[::-1] for x in (solved.f[:, 1:], solved.g[:, 1:], solved.g[:, :-1]))
    if not isinstance(d_scores.tiles, jax.Array):  # they list what was subtracted
        for r in range(problem.spec.tail_steps):
            carry, _ = minus_step(carry, [x[r] for x in steps])
    else:  # in a loop, or XLA would subtract all terms at once and keep them until then
        carry, _ = jax.lax.scan(minus_step, carry, steps)
    d_scores, _, _, *of_targets = carry
    return d_scores, tuple(of_targets)


def _of_weights(problem: Problem, heads: Heads, of_log_a, of_log_b) -> tuple[Array | None, Array | None]:
    """Return gradients of the weights, None for those not given, from the cotangents of log a and log b."""
    weights = heads.weights
    if weights[0] is None and weights[1] is None:
        return weights

    def targets(row_weights, column_weights):
        given = heads._replace(row_weights=row_weights, column_weights=column_weights)
        return support.targets_of(given, problem.spec, problem.a.dtype)

    _, pull_back = jax.vjp(targets, *weights)
    of_targets = support.divide(of_log_a, problem.a), support.divide(of_log_b, problem.b)
    return pull_back(tuple(map(problem.axis.once, of_targets)))  # copies of the dustbin's targets are one
