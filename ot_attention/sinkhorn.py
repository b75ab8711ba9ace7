"""The Sinkhorn loop and its one `custom_vjp`, above the products of `banded_xla.Band`; the dustbin is handled here.

Between forward and backward only q, k, v, the output and vectors over rows and columns are kept (arXiv 2605.08123).
Heads are taken in groups, one group's band at a time: it stays in cache, and memory does not grow with the batch.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ot_attention import support
from ot_attention.banded_xla import Band, block_shape
from ot_attention.spec import Heads, SinkhornSpec

# Potentials are folded into the kernel before the scalings leave this range; kernel entries too small for float32 then
# hold less than 1e-10 of a row's mass, also after `_log_step` has divided by a column mass of at least _LEAST_MASS.
_SCALING_RANGE = 1e10
_LEAST_MASS = 1e-8
# Beyond e^30 between two tail steps, one reference tile times vectors would lose digits (see `_Tail`).
_LARGEST_TAIL_CHANGE = 30.0
_GROUP_BYTES = 4 * 2**20


class Kernel(NamedTuple):
    """A matrix over the augmented support: the band's tiles, and the dustbin's column, row and corner."""

    tiles: Float[Array, "N blocks block reach"]
    column: Float[Array, "N rows"]
    row: Float[Array, "N columns"]
    corner: Float[Array, "N"]


class Solved(NamedTuple):
    """Output, and potentials after the last base step and after every tail step, dustbin last."""

    out: Float[Array, "N rows value"]
    f: Float[Array, "N R+1 all_rows"]
    g: Float[Array, "N R+1 all_columns"]
    residual: Float[Array, "N"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(heads: Heads, spec: SinkhornSpec):
    """Output `[N, rows, value]`, f `[N, rows + 1]`, g `[N, columns + 1]`, residual `[N]` of every head."""
    solved = _by_group(functools.partial(_forward, spec=spec), heads, spec)
    return solved.out, solved.f[:, -1], solved.g[:, -1], solved.residual


def _attend_fwd(heads, spec):
    solved = _by_group(functools.partial(_forward, spec=spec), heads, spec)
    return (solved.out, solved.f[:, -1], solved.g[:, -1], solved.residual), (heads, solved)


def _attend_bwd(spec, kept, cotangents):
    heads, solved = kept
    dq, dk, dv, ds = _by_group(functools.partial(_backward, spec=spec), (heads, solved, cotangents[:3]), spec)
    return (Heads(dq, dk, dv, ds, None, None),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _by_group(function, arguments, spec: SinkhornSpec):
    """Maps over groups of heads whose tiles fit `_GROUP_BYTES`, at least one head."""
    heads = arguments if isinstance(arguments, Heads) else arguments[0]
    number, rows, _ = heads.q.shape
    block, width, blocks = block_shape(rows, heads.k.shape[1], spec.band)
    at_most = max(1, _GROUP_BYTES // (block * width * blocks * heads.q.dtype.itemsize))
    group = max(size for size in range(1, min(number, at_most) + 1) if number % size == 0)
    if group == number:
        return function(arguments)
    split = jax.tree.map(lambda x: x.reshape(number // group, group, *x.shape[1:]), arguments)
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), jax.lax.map(function, split))


class _Problem(NamedTuple):
    """Support and targets of a group of heads."""

    band: Band
    a: Float[Array, "N all_rows"]
    b: Float[Array, "N all_columns"]
    exists: Bool[Array, "N"]  # the dustbin


def _problem(heads: Heads, spec: SinkhornSpec) -> _Problem:
    rows, columns = heads.q.shape[1], heads.k.shape[1]
    a, b = support.targets(heads.n_q, heads.n_k, rows, columns, spec.band, spec.dustbin, heads.q.dtype)
    band = Band.create(heads.n_q, heads.n_k, rows, columns, spec.band)
    return _Problem(band, a, b, support.dustbin_exists(heads.n_q, heads.n_k, spec.dustbin))


def _score_scale(heads: Heads, spec: SinkhornSpec) -> float:
    return 1 / (math.sqrt(heads.q.shape[-1]) * spec.epsilon)


def _scores(problem: _Problem, heads: Heads, spec: SinkhornSpec) -> Kernel:
    """Scores on the augmented support, minus infinity outside."""
    band, a, b, exists = problem
    bin_score = heads.dustbin_score[:, None]
    return Kernel(
        tiles=band.mask(band.outer(heads.q * _score_scale(heads, spec), heads.k), -jnp.inf),
        column=jnp.where(exists[:, None] & (a[:, :-1] > 0), bin_score, -jnp.inf),
        row=jnp.where(exists[:, None] & (b[:, :-1] > 0), bin_score, -jnp.inf),
        corner=jnp.where(exists, 0, jnp.full_like(a[:, -1], -jnp.inf)),
    )


def _forward(heads: Heads, spec: SinkhornSpec) -> Solved:
    """T + R steps (contract, section 2), few of which need an exp over the band.

    After one step in the log domain the kernel `K = exp(S + f + g)` is scaled, `u = a / (K v)`, `v = b / (K^T u)`,
    until all steps are done or a scaling leaves its range; then that step is made in the log domain, which renews K.
    """
    problem = _problem(heads, spec)
    band, a, b, _ = problem
    steps = spec.base_steps + spec.tail_steps
    unit = jnp.where(a > 0, 1, a), jnp.where(b > 0, 1, b)

    def record(history, step, f, g):
        slot = jnp.maximum(step - spec.base_steps, 0)  # base steps overwrite each other
        return tuple(
            jax.lax.dynamic_update_index_in_dim(h, x, slot, axis=0) for h, x in zip(history, (f, g), strict=True)
        )

    def renew(carry):
        step, history = carry[0], carry[-1]
        g = jax.lax.dynamic_index_in_dim(history[1], jnp.maximum(step - spec.base_steps, 0), keepdims=False)
        f, g, kernel = _log_step(problem, _scores(problem, heads, spec), g)

        def scale(carry):
            step, _, u, v, history = carry
            new_u = _ratio(a, _times(band, kernel, v))
            new_v = _ratio(b, _transpose_times(band, kernel, new_u))
            fine = _in_range(new_u, a) & _in_range(new_v, b)
            u, v = jnp.where(fine, new_u, u), jnp.where(fine, new_v, v)
            step = step + fine
            return step, fine, u, v, record(history, step, f + _log(u), g + _log(v))

        start = (step + 1, step > -1, *unit, record(history, step + 1, f, g))
        step, _, u, v, history = jax.lax.while_loop(lambda c: (c[0] < steps) & c[1], scale, start)
        return step, kernel, u, v, history

    kernel = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: _scores(problem, heads, spec)))
    history = tuple(jnp.zeros((spec.tail_steps + 1, *x.shape), x.dtype) for x in (a, b))
    carry = support.varying_like(heads.q, (jnp.array(0), kernel, *unit, history))
    _, kernel, u, v, (f, g) = jax.lax.while_loop(lambda c: c[0] < steps, renew, carry)

    out = u[:, :-1, None] * band.times(kernel.tiles, v[:, :-1, None] * heads.v)
    residual = jnp.abs(u * _times(band, kernel, v) - a).max(-1)
    return Solved(out, f.swapaxes(0, 1), g.swapaxes(0, 1), residual)


def _log_step(problem: _Problem, scores: Kernel, g: Array) -> tuple[Array, Array, Kernel]:
    """One step from g in the log domain: f, g and `exp(S + f + g)`."""
    band, a, b, _ = problem
    start = _shift(band, scores, jnp.zeros_like(a), g)
    top = jnp.where(a > 0, _row_max(band, start), 0)
    rows_at_most_1 = _exp(_shift(band, start, -top, jnp.zeros_like(b)))
    u = _ratio(a, _times(band, rows_at_most_1, jnp.ones_like(b)))
    f = _log(u) - top
    mass = _transpose_times(band, rows_at_most_1, u)

    def shared_exp():
        v = _ratio(b, mass)
        return g + _log(v), _scale(band, rows_at_most_1, u, v)

    def own_exp():
        shifted = _shift(band, scores, f, jnp.zeros_like(b))
        top = jnp.where(b > 0, _column_max(band, shifted), 0)
        total = _transpose_times(band, _exp(_shift(band, shifted, jnp.zeros_like(a), -top)), jnp.ones_like(a))
        g = _log(_ratio(b, total)) - top
        return g, _exp(_shift(band, shifted, jnp.zeros_like(a), g))

    # A column that no row likes underflows in the shared exp; it then gets a maximum of its own.
    g, kernel = jax.lax.cond(jnp.all((mass >= _LEAST_MASS * b) | (b == 0)), shared_exp, own_exp)
    return f, g, kernel


def _backward(arguments, spec: SinkhornSpec) -> tuple[Array, Array, Array, Array]:
    """Gradients of q, k, v and the dustbin score through the R tail steps (contract, section 3).

    The plan is made once more; each of the 2 R staircase factors is that plan times a row and a column vector, so dS is
    the plan times a low-rank field. Where potentials move so far within the tail that such a vector would overflow,
    every factor is made from the scores instead.
    """
    _, solved, _ = arguments
    change = (jnp.abs(solved.f[:, 1:] - solved.f[:, -1:]).max(), jnp.abs(solved.g - solved.g[:, -1:]).max())
    gentle = jnp.maximum(*change) < _LARGEST_TAIL_CHANGE
    return jax.lax.cond(
        gentle,
        functools.partial(_tail_gradient, spec=spec, one_tile=True),
        functools.partial(_tail_gradient, spec=spec, one_tile=False),
        arguments,
    )


def _tail_gradient(arguments, spec: SinkhornSpec, one_tile: bool) -> tuple[Array, Array, Array, Array]:
    heads, solved, (d_out, d_f, d_g) = arguments
    problem = _problem(heads, spec)
    band, a, b, _ = problem
    f, g = solved.f.swapaxes(0, 1), solved.g.swapaxes(0, 1)
    scores = _scores(problem, heads, spec)
    plan = _exp(_shift(band, scores, f[-1], g[-1]))

    def factor(r, s):
        """`exp(S + f_r + g_s)`, as a kernel and the row and column vectors that scale it."""
        if one_tile:
            return plan, jnp.exp(f[r] - f[-1]), jnp.exp(g[s] - g[-1])
        return _exp(_shift(band, scores, f[r], g[s])), jnp.ones_like(a), jnp.ones_like(b)

    dv = band.transpose_times(plan.tiles, d_out)
    g_bar = d_g + _with_bin((heads.v * dv).sum(-1))
    f_bar = d_f + _with_bin((d_out * solved.out).sum(-1))
    staircase = []  # (kernel, X, Y): minus dS is the sum of kernel * X_i Y_j
    for r in range(spec.tail_steps, 0, -1):
        kernel, row, column = factor(r, r)
        y = column * _ratio(g_bar, b)
        staircase.append((kernel, row, y))
        f_bar = f_bar - row * _times(band, kernel, y)
        kernel, row, column = factor(r, r - 1)
        x = row * _ratio(f_bar, a)
        staircase.append((kernel, x, column))
        g_bar, f_bar = -column * _transpose_times(band, kernel, x), jnp.zeros_like(f_bar)

    if one_tile:  # one product over Dv + 2 R columns gives the whole field
        x, y = (jnp.stack(side, -1) for side in list(zip(*staircase, strict=True))[1:])
        field = band.outer(jnp.concatenate([d_out, -x[:, :-1]], -1), jnp.concatenate([heads.v, y[:, :-1]], -1))
        d_tiles = plan.tiles * field
    else:
        d_tiles = plan.tiles * band.outer(d_out, heads.v)
        for kernel, x, y in staircase:
            d_tiles = d_tiles - band.scale(kernel.tiles, x[:, :-1], y[:, :-1])
    d_bin = -sum(
        (kernel.column * x[:, :-1]).sum(-1) * y[:, -1] + (kernel.row * y[:, :-1]).sum(-1) * x[:, -1]
        for kernel, x, y in staircase
    )
    scale = _score_scale(heads, spec)
    return scale * band.times(d_tiles, heads.k), scale * band.transpose_times(d_tiles, heads.q), dv, d_bin


def _with_bin(x: Array) -> Array:
    """A vector over residues with a 0 for the dustbin."""
    return jnp.pad(x, ((0, 0), (0, 1)))


def _ratio(x: Array, y: Array) -> Array:
    """x / y, 0 where either is 0: a target without support, or nothing to divide."""
    zero = (x == 0) | (y == 0)
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))


def _log(x: Array) -> Array:
    """log of a scaling, 0 where it is 0: potentials of unsupported rows and columns are 0."""
    return jnp.log(jnp.where(x == 0, 1, x))


def _in_range(scaling: Array, target: Array) -> Bool[Array, ""]:
    return jnp.all(((scaling > 1 / _SCALING_RANGE) & (scaling < _SCALING_RANGE)) | (target == 0))


def _shift(band: Band, kernel: Kernel, f: Array, g: Array) -> Kernel:
    """`S + f_i + g_j`."""
    return Kernel(
        band.shift(kernel.tiles, f[:, :-1], g[:, :-1]),
        kernel.column + f[:, :-1] + g[:, -1:],
        kernel.row + f[:, -1:] + g[:, :-1],
        kernel.corner + f[:, -1] + g[:, -1],
    )


def _scale(band: Band, kernel: Kernel, u: Array, v: Array) -> Kernel:
    """`u_i K v_j`."""
    return Kernel(
        band.scale(kernel.tiles, u[:, :-1], v[:, :-1]),
        kernel.column * u[:, :-1] * v[:, -1:],
        kernel.row * u[:, -1:] * v[:, :-1],
        kernel.corner * u[:, -1] * v[:, -1],
    )


def _exp(kernel: Kernel) -> Kernel:
    return Kernel(*(jnp.exp(x) for x in kernel))


def _times(band: Band, kernel: Kernel, x: Float[Array, "N all_columns"]) -> Float[Array, "N all_rows"]:
    residues = band.times(kernel.tiles, x[:, :-1]) + kernel.column * x[:, -1:]
    dustbin = (kernel.row * x[:, :-1]).sum(-1) + kernel.corner * x[:, -1]
    return jnp.concatenate([residues, dustbin[:, None]], -1)


def _transpose_times(band: Band, kernel: Kernel, x: Float[Array, "N all_rows"]) -> Float[Array, "N all_columns"]:
    residues = band.transpose_times(kernel.tiles, x[:, :-1]) + kernel.row * x[:, -1:]
    dustbin = (kernel.column * x[:, :-1]).sum(-1) + kernel.corner * x[:, -1]
    return jnp.concatenate([residues, dustbin[:, None]], -1)


def _row_max(band: Band, kernel: Kernel) -> Float[Array, "N all_rows"]:
    residues = jnp.maximum(band.row_max(kernel.tiles), kernel.column)
    return jnp.concatenate([residues, jnp.maximum(kernel.row.max(-1), kernel.corner)[:, None]], -1)


def _column_max(band: Band, kernel: Kernel) -> Float[Array, "N all_columns"]:
    residues = jnp.maximum(band.column_max(kernel.tiles), kernel.row)
    return jnp.concatenate([residues, jnp.maximum(kernel.column.max(-1), kernel.corner)[:, None]], -1)
