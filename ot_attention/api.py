"""The two public functions, and the checks and the layout of their arguments."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ot_attention import reference, support
from ot_attention.backends import registry
from ot_attention.spec import Heads, Implementation, SinkhornInfo, SinkhornSpec, UnsupportedError
from ot_attention.support import cleaned

_DTYPES = ("bfloat16", "float32", "float64")


def sinkhorn_attention(
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch columns heads width"],
    v: Float[Array, "batch columns heads value"],
    spec: SinkhornSpec,
    q_lengths: Int[Array, "batch"] | None = None,
    k_lengths: Int[Array, "batch"] | None = None,
    dustbin_score: Float[Array, "heads"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch rows heads value"], SinkhornInfo]:
    """Compute attention whose weights are an entropic transport plan (arXiv 2605.08123; docs/math.md, sections 1 to 3).

    The output has the dtype of v; potentials are float32, or float64 for float64 inputs. Scores of queries q and keys k
    are `q . k / (sqrt(width) * epsilon)`. Lengths, of q and of k and v, are in residues; None is the padded length.
    `dustbin_score`, of residues with the dustbin, is required if and only if `spec.dustbin` is not "none".

    implementation: None chooses; "reference" is dense, "xla" computes the band only on any device, "pallas_gpu" and
    "pallas_tpu" are kernels. A named one is used or refused, never replaced.

    Raises ValueError for shapes, dtypes or lengths that do not fit, naming the argument (inside `jit`, lengths are
    clipped to the padded length instead), and UnsupportedError, saying what to change, where it cannot do this.
    """
    _check_implementation(implementation)
    batch, heads = laid_out(q, k, v, spec, q_lengths, k_lengths, dustbin_score)
    backend = registry.BACKENDS[registry.choose(implementation, heads, spec)]
    out, *info = (x.reshape(batch, -1, *x.shape[1:]) for x in backend.attend(heads, spec))
    f, g, residual = info
    if spec.dustbin == "none":
        f, g = f[..., :-1], g[..., :-1]
    return out.swapaxes(1, 2).astype(heads.v.dtype), SinkhornInfo(f, g, jax.lax.stop_gradient(residual))


def transport_plan(
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: Int[Array, "batch"] | None = None,
    k_lengths: Int[Array, "batch"] | None = None,
    dustbin_score: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch heads plan_rows plan_columns"]:
    """Return the dense plan that `sinkhorn_attention` applies, the dustbin as last row and column if there is one.

    For small inputs, plots and tests: it runs the reference, and memory is rows x columns for every head. It is
    differentiable, and raises errors, as `sinkhorn_attention` does.
    """
    batch, heads = laid_out(q, k, None, spec, q_lengths, k_lengths, dustbin_score)
    registry.choose("reference", heads, spec)
    plan, *_ = reference.solve(cleaned(heads), spec)
    if spec.dustbin == "none":
        plan = plan[:, :-1, :-1]
    return plan.reshape(batch, -1, *plan.shape[1:])


def laid_out(q, k, v, spec: SinkhornSpec, q_lengths, k_lengths, dustbin_score) -> tuple[int, Heads]:
    """Check arguments, and return the batch size and the inputs of a backend.

    v: values; None for problems that need only the plan. Raises ValueError.
    """
    arguments = _check(q, k, v, spec, q_lengths, k_lengths, dustbin_score)
    return arguments[0].shape[0], by_head(*arguments)


def only_xla(implementation: Implementation | None, what: str) -> None:
    """Raise UnsupportedError for a named implementation other than "xla", for `what` that runs in XLA alone."""
    _check_implementation(implementation)
    if implementation not in (None, "xla"):
        raise UnsupportedError(
            f"implementation {implementation!r} cannot do this: {what} run in XLA; use implementation='xla' or None"
        )


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation={implementation!r} must be None or one of {known}")


def by_head(q, k, v, dustbin_score, q_lengths, k_lengths) -> Heads:
    """Merge batch and heads into one leading axis."""
    batch, _, heads, _ = q.shape
    n_q, n_k = (jnp.repeat(n.astype(jnp.int32), heads) for n in (q_lengths, k_lengths))
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], x.shape[3]) for x in (q, k, v))
    result = Heads(q, k, v, jnp.tile(dustbin_score, batch), n_q, n_k)
    for x in result:
        result = support.varying_like(x, result)
    return result


def _check(q, k, v, spec, q_lengths, k_lengths, dustbin_score) -> tuple[Array, ...]:
    """Return what `by_head` takes, as arrays. Raises ValueError, before anything else can fail on them."""
    v = k if v is None else v
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name} has shape {shape}; it must be [batch, length, heads, width], none of them 0")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {dtype}; it must be one of {', '.join(_DTYPES)}")
    (batch, rows, heads, width), columns = q.shape, k.shape[1]
    if k.shape != (batch, columns, heads, width):
        raise ValueError(f"k has shape {k.shape}; with q of shape {q.shape} it must be {(batch, 'any', heads, width)}")
    if v.shape[:3] != (batch, columns, heads):
        raise ValueError(f"v has shape {v.shape}; for k of shape {k.shape} it must be {(batch, columns, heads, 'any')}")
    if not isinstance(spec, SinkhornSpec):
        raise ValueError(f"spec={spec!r} must be a SinkhornSpec")
    longest = max(rows, columns)
    if spec.band is not None and longest * (longest + 128) >= support.MAX_BANDED_PRODUCT:
        raise ValueError(f"q and k of lengths {rows} and {columns} are too long for a band: at most 46276")
    if (dustbin_score is None) != (spec.dustbin == "none"):
        given = "missing" if dustbin_score is None else "given"
        raise ValueError(f"dustbin_score is {given}, but spec.dustbin={spec.dustbin!r}: give one a head or 'none'")
    if dustbin_score is None:
        dustbin_score = jnp.zeros(heads, q.dtype)
    elif jnp.shape(dustbin_score) != (heads,) or jnp.result_type(dustbin_score) not in _DTYPES:
        raise ValueError(f"dustbin_score must be {heads} floats, one a head; given {jnp.shape(dustbin_score)}")
    sides = ("q_lengths", q_lengths, rows), ("k_lengths", k_lengths, columns)
    return *map(jnp.asarray, (q, k, v, dustbin_score)), *(_check_lengths(*x, batch) for x in sides)


def _check_lengths(name: str, lengths, longest: int, batch: int) -> Int[Array, "batch"]:
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    shape, dtype = jnp.shape(lengths), jnp.result_type(lengths)
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}; it must be {batch} integers")
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.min() < 0 or values.max() > longest:
            raise ValueError(f"{name}={values.tolist()} must lie between 0 and the padded length {longest}")
    return jnp.clip(jnp.asarray(lengths), 0, longest)
