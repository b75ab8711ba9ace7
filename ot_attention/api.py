"""The two public functions: arguments are checked here, and heads laid out for the implementations."""

import functools
import inspect
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ot_attention import reference, sinkhorn, support
from ot_attention.backends import gpu, tpu
from ot_attention.spec import Heads, Implementation, SinkhornInfo, SinkhornSpec, UnsupportedError


def _without_padding(attend: Callable, *, one_dtype: bool = True) -> Callable:
    """For implementations that take padding as 0, and one dtype if so: kernels for TPUs see to both on the chip."""

    def attend_to_cleaned(heads: Heads, spec: SinkhornSpec):
        out, *info = attend(cleaned(heads) if one_dtype else without_padding(heads), spec)
        return support.zero_padding(out, heads.n_q), *info  # it is 0 already: for what comes back through padding

    return attend_to_cleaned


_ATTEND: dict[str, Callable] = {
    "reference": _without_padding(reference.attend),
    "xla": _without_padding(sinkhorn.attend),
    "pallas_tpu": tpu.attend,
    "pallas_gpu": _without_padding(functools.partial(sinkhorn.attend, band=gpu.Band), one_dtype=False),
}
_DTYPES = ("bfloat16", "float32", "float64")


def checked(function):
    """Checks arguments before anything else can fail on them: every misuse is a ValueError naming the argument."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        known = inspect.signature(_check).parameters
        bound.arguments |= _check(**{name: x for name, x in bound.arguments.items() if name in known})
        return function(*bound.args, **bound.kwargs)

    return wrapper


@checked
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
    """Attention whose weights are an entropic transport plan (contract, sections 1 to 3; arXiv 2605.08123).

    Lengths default to the padded ones; `dustbin_score` is required if and only if `spec.dustbin` is not "none".
    `implementation`: None chooses; "reference" is dense and plain, "xla" computes the band only, "pallas_tpu" keeps it
    on a TPU's chip; a named one is used or refused, never replaced. The output has the dtype of v; potentials are
    float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit, naming the argument. Lengths inside `jit` are clipped to
            the padded ones instead: their values are not known there.
        UnsupportedError: the named implementation cannot do this, and what to change.
    """
    arguments = by_head(q, k, v, dustbin_score, q_lengths, k_lengths)
    out, *info = _ATTEND[_choose(implementation, spec, arguments)](arguments, spec)
    out, f, g, residual = (x.reshape(q.shape[0], -1, *x.shape[1:]) for x in (out, *info))
    if spec.dustbin == "none":
        f, g = f[..., :-1], g[..., :-1]
    return out.swapaxes(1, 2).astype(v.dtype), SinkhornInfo(f, g, jax.lax.stop_gradient(residual))


@checked
def transport_plan(
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: Int[Array, "batch"] | None = None,
    k_lengths: Int[Array, "batch"] | None = None,
    dustbin_score: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch heads plan_rows plan_columns"]:
    """The plan that `sinkhorn_attention` applies, dense, with the dustbin as last row and column if there is one.

    For small inputs, plots and tests: memory is rows x columns for every head. Differentiable as the attention is.
    Raises as `sinkhorn_attention` does.
    """
    heads = cleaned(by_head(q, k, k, dustbin_score, q_lengths, k_lengths))
    _choose("reference", spec, heads)
    plan, *_ = reference.solve(heads, spec)
    if spec.dustbin == "none":
        plan = plan[:, :-1, :-1]
    return plan.reshape(q.shape[0], -1, *plan.shape[1:])


def by_head(q, k, v, dustbin_score, q_lengths, k_lengths) -> Heads:
    """Heads as the leading axis of everything."""
    batch, _, heads, _ = q.shape
    n_q, n_k = (jnp.repeat(n.astype(jnp.int32), heads) for n in (q_lengths, k_lengths))
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], x.shape[3]) for x in (q, k, v))
    result = Heads(q, k, v, jnp.tile(dustbin_score, batch), n_q, n_k)
    for x in result:
        result = support.varying_like(x, result)
    return result


def without_padding(heads: Heads) -> Heads:
    """With 0 as padding, whatever stood there."""
    q, k, v, score, n_q, n_k = heads
    q, k, v = (support.zero_padding(x, n) for x, n in ((q, n_q), (k, n_k), (v, n_k)))
    return Heads(q, k, v, score, n_q, n_k)


def cleaned(heads: Heads) -> Heads:
    """The same in the dtype of the computation: float32 or float64."""
    dtype = jnp.promote_types(jnp.result_type(*heads[:3]), jnp.float32)
    q, k, v, score, n_q, n_k = without_padding(heads)
    return Heads(q.astype(dtype), k.astype(dtype), v.astype(dtype), score.astype(dtype), n_q, n_k)


def _check(q, k, spec, q_lengths, k_lengths, dustbin_score, v=None, implementation=None) -> dict:
    """The array arguments, with defaults filled in. Raises ValueError."""
    if implementation is not None and implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation={implementation!r} must be None or one of {known}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None and name == "v":
            continue
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name} has shape {shape}; it must be [batch, length, heads, width], none of them 0")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {dtype}; it must be one of {', '.join(_DTYPES)}")
    (batch, rows, heads, width), columns = q.shape, k.shape[1]
    if k.shape != (batch, columns, heads, width):
        raise ValueError(f"k has shape {k.shape}; with q of shape {q.shape} it must be {(batch, 'any', heads, width)}")
    if v is not None and v.shape[:3] != (batch, columns, heads):
        raise ValueError(
            f"v has shape {v.shape}; with k of shape {k.shape} it must be {(batch, columns, heads, 'any')}"
        )
    if not isinstance(spec, SinkhornSpec):
        raise ValueError(f"spec={spec!r} must be a SinkhornSpec")
    longest = max(rows, columns)
    if spec.band is not None and longest * (longest + 128) >= support.MAX_BANDED_PRODUCT:
        raise ValueError(f"q and k of lengths {rows} and {columns} are too long for a band: at most 46276")
    if (dustbin_score is None) != (spec.dustbin == "none"):
        given = "missing" if dustbin_score is None else "given"
        raise ValueError(
            f"dustbin_score is {given}, but spec.dustbin={spec.dustbin!r}: give a score per head or 'none'"
        )
    if dustbin_score is None:
        dustbin_score = jnp.zeros(heads, q.dtype)
    elif jnp.shape(dustbin_score) != (heads,) or jnp.result_type(dustbin_score) not in _DTYPES:
        raise ValueError(f"dustbin_score must be {heads} floats, one a head; given {jnp.shape(dustbin_score)}")
    arrays = {} if v is None else {"v": jnp.asarray(v)}
    return arrays | {
        "q": jnp.asarray(q),
        "k": jnp.asarray(k),
        "q_lengths": _check_lengths("q_lengths", q_lengths, batch, rows),
        "k_lengths": _check_lengths("k_lengths", k_lengths, batch, columns),
        "dustbin_score": jnp.asarray(dustbin_score),
    }


def _check_lengths(name: str, lengths, batch: int, longest: int) -> Int[Array, "batch"]:
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    if jnp.shape(lengths) != (batch,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(
            f"{name} has shape {jnp.shape(lengths)} and dtype {jnp.result_type(lengths)}; it must be {batch} integers"
        )
    if not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if values.min() < 0 or values.max() > longest:
            raise ValueError(f"{name}={values.tolist()} must lie between 0 and the padded length {longest}")
    return jnp.clip(jnp.asarray(lengths), 0, longest)


def _choose(implementation: str | None, spec: SinkhornSpec, heads: Heads) -> str:
    """The implementation to use. Raises UnsupportedError if the named one cannot do it."""
    name = implementation or "xla"
    if implementation is None and spec.gradient == "unrolled":
        name = "reference"
    elif implementation is None and jax.default_backend() == "tpu":
        name = "xla" if tpu.unsupported_reason(heads, spec) else "pallas_tpu"
    elif implementation is None and support.platform() == "gpu":
        name = "xla" if gpu.unsupported_reason(heads) else "pallas_gpu"
    reasons = []
    if name == "pallas_gpu" and (reason := gpu.unsupported_reason(heads)):
        reasons.append(reason)
    if name == "pallas_tpu" and (reason := tpu.unsupported_reason(heads, spec)):
        reasons.append(reason)
    if spec.gradient == "unrolled" and spec.solver == "newton":
        reasons.append(
            "gradient='unrolled' goes through plain steps only; use solver='sinkhorn' or gradient='implicit'"
        )
    if spec.gradient == "unrolled" and name != "reference":
        reasons.append("gradient='unrolled' keeps every step; use implementation='reference' or gradient='tail'")
    if reasons:
        raise UnsupportedError(f"implementation {name!r} cannot do this: " + "; ".join(reasons))
    return name
