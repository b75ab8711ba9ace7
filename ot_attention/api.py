"""The two public functions, and the checks and the layout of their arguments."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from ot_attention import axes, reference, support
from ot_attention.axes import ALONE, SequenceAxis
from ot_attention.backends import registry
from ot_attention.meshes import EXAMPLES, HEADS, Argument, on_each_device
from ot_attention.spec import (
    Heads,
    Implementation,
    LengthsLike,
    ScoreLike,
    SegmentsLike,
    SharedSpec,
    SinkhornInfo,
    SinkhornSpec,
    Size,
    UnsupportedError,
    WeightsLike,
    nan_unless,
)
from ot_attention.support import cleaned

DTYPES = ("bfloat16", "float32", "float64")


@support.promoting
def sinkhorn_attention(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    v: Float[ArrayLike, "batch columns heads value"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    implementation: Implementation | None = None,
    row_weights: WeightsLike | None = None,
    column_weights: WeightsLike | None = None,
    sequence_axis: str | None = None,
    segment_ids: SegmentsLike | None = None,
) -> tuple[Float[Array, "batch rows heads value"], SinkhornInfo]:
    """Compute attention whose weights are an entropic transport plan (arXiv 2605.08123; docs/math.md, sections 1 to 3).

    The output has the dtype of v; potentials are float32, or float64 for float64 inputs. Scores of queries q and keys k
    are `q . k / (sqrt(width) * epsilon)`. Lengths, of q and of k and v, are in residues; None is the padded length.
    `dustbin_score`, of residues with the dustbin, is required if and only if `spec.dustbin` is not "none". Arrays may
    be of JAX or NumPy, or lists. Lengths may have any integer dtype; one length or score is for all.

    row_weights, column_weights: sums that the plan's rows and columns must have, `[batch, rows]` and
    `[batch, columns]`, positive; anything at padding. By default rows have 1, and columns n_q / n_k or, with a dustbin,
    1. Without a dustbin and unless relaxed, weights of columns are scaled to the sum of the rows'. They get gradients.
    Where JAX traces them, an example of which a weight is not finite and above 0 becomes NaN.

    segment_ids: integers `[batch, rows]`, for self-attention without a dustbin. A run of equal ids is a segment, and
    residues meet only within theirs.

    On a mesh of explicit axes the batch and the heads may be sharded, and results are sharded alike.

    sequence_axis: axis of a mesh, inside `shard_map`, whose devices hold equal shares of each sequence, in order; for
    self-attention in a band of at most one share. q, k, v, weights and segment_ids are this device's share, as are
    output, f and g (which end with a copy of the dustbin's entry). Lengths are of whole sequences, None for all.
    Neighbours exchange W keys and values once, and W potentials a half step; nothing gathers a sequence.

    implementation: None chooses; "reference" is dense, "xla" computes the band only on any device, "pallas_gpu" and
    "pallas_tpu" are kernels. A named one is used or refused, never replaced.

    Raises ValueError for shapes, dtypes or lengths that do not fit, naming the argument (inside `jit`, lengths are
    clipped to the padded length instead), and UnsupportedError, saying what to change, where it cannot do this.
    """
    _check_implementation(implementation)
    of_both = (row_weights, column_weights), sequence_axis, segment_ids
    checked = Checked.create(q, k, v, spec, q_lengths, k_lengths, dustbin_score, *of_both)
    with registry.kernels_have_their_device():
        out, info = checked.of_every_head(_attend, implementation)
    return out.swapaxes(1, 2), info


def _attend(heads: Heads, spec: SinkhornSpec, implementation: Implementation | None) -> tuple[Array, SinkhornInfo]:
    backend = registry.BACKENDS[registry.choose(implementation, heads, spec)]
    out, f, g, residual, steps = backend.attend(heads, spec)
    if spec.dustbin == "none":
        f, g = f[:, :-1], g[:, :-1]
    return out.astype(heads.v.dtype), SinkhornInfo(f, g, jax.lax.stop_gradient(residual), steps)


@support.promoting
def transport_plan(
    q: Float[ArrayLike, "batch rows heads width"],
    k: Float[ArrayLike, "batch columns heads width"],
    spec: SinkhornSpec,
    q_lengths: LengthsLike | None = None,
    k_lengths: LengthsLike | None = None,
    dustbin_score: ScoreLike | None = None,
    row_weights: WeightsLike | None = None,
    column_weights: WeightsLike | None = None,
    segment_ids: SegmentsLike | None = None,
) -> Float[Array, "batch heads plan_rows plan_columns"]:
    """Return the dense plan that `sinkhorn_attention` applies, the dustbin as last row and column if there is one.

    For small inputs, plots and tests: it runs the reference, and memory is rows x columns for every head. It is
    differentiable, and raises errors, as `sinkhorn_attention` does.
    """
    of_both = (row_weights, column_weights), None, segment_ids
    return Checked.create(q, k, None, spec, q_lengths, k_lengths, dustbin_score, *of_both).of_every_head(_plan)


def _plan(heads: Heads, spec: SinkhornSpec) -> Float[Array, "N plan_rows plan_columns"]:
    registry.choose("reference", heads, spec)
    plan, *_ = reference.solve(cleaned(heads), spec)
    return plan[:, :-1, :-1] if spec.dustbin == "none" else plan


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


class Checked(NamedTuple):
    """Arguments of a public function as arrays of the right shapes and dtypes, and a spec of static numbers."""

    q: Float[Array, "batch rows heads width"]
    k: Float[Array, "batch columns heads width"]
    v: Float[Array, "batch columns heads value"]
    dustbin_score: Float[Array, "heads"]
    q_lengths: Int[Array, "batch"]
    k_lengths: Int[Array, "batch"]
    epsilon: Float[Array, ""] | None  # if traced; the spec then has 1, so that no backend need know of it
    row_weights: Float[Array, "batch rows"] | None
    column_weights: Float[Array, "batch columns"] | None
    segment_ids: Int[Array, "batch rows"] | None
    spec: SinkhornSpec

    @classmethod
    def create(
        cls,
        q,
        k,
        v,
        spec: SinkhornSpec,
        q_lengths,
        k_lengths,
        dustbin_score,
        weights: tuple[Any, Any] = (None, None),
        sequence_axis: Any = None,
        segment_ids: Any = None,
    ) -> "Checked":
        """Check arguments, before anything else can fail on them. Raises ValueError.

        v: values; None for problems that need only the plan. weights: of rows and of columns.
        """
        q, k = as_heads("q", q), as_heads("k", k)
        v = k if v is None else as_heads("v", v)
        (batch, rows, heads, width), columns = q.shape, k.shape[1]
        if k.shape != (fitting := (batch, columns, heads, width)):
            raise ValueError(
                f"k has shape {k.shape}; with q of shape {q.shape} it must be {(batch, 'any', heads, width)}"
            )
        if v.shape[:3] != fitting[:3]:
            raise ValueError(f"v has shape {v.shape}; for k of shape {k.shape} it must be {(*fitting[:3], 'any')}")
        if not isinstance(spec, SinkhornSpec):
            raise ValueError(f"spec={spec!r} must be a SinkhornSpec")
        if segment_ids is not None or sequence_axis is not None:
            named = "segment_ids" if sequence_axis is None else "sequence_axis"
            q_lengths, k_lengths = _one_length(named, (rows, columns), q_lengths, k_lengths)
        axis = _sequence_axis(sequence_axis, spec, rows)
        for name, length in (("q", rows * axis.size), ("k", columns * axis.size)):
            _check_longest(name, length, spec)
        epsilon = None
        if isinstance(spec.epsilon, jax.Array):
            epsilon, spec = spec.epsilon, dataclasses.replace(spec, epsilon=1.0)
        score = _score(dustbin_score, spec, heads, support.potential_dtype(q, k, v))
        n_q = as_lengths("q_lengths", q_lengths, rows * axis.size, batch)
        n_k = as_lengths("k_lengths", k_lengths, columns * axis.size, batch)
        row_weights = as_weights("row_weights", weights[0], (batch, rows), axis.local(n_q, rows))
        column_weights = as_weights("column_weights", weights[1], (batch, columns), axis.local(n_k, columns))
        ids = _segment_ids(segment_ids, (batch, rows), spec, weights)
        if axis.is_shared:
            spec = SharedSpec(**vars(spec), sequence_axis=axis.name)
        return cls(q, k, v, score, n_q, n_k, epsilon, row_weights, column_weights, ids, spec.settled())

    def of_every_head(
        self, function: Callable[..., PyTree], *options: Hashable, layers: PyTree = None, examples: PyTree = None
    ) -> Any:
        """Return `function(heads, spec, *options)`, the leading axis of its results as `[batch, heads]`.

        function: takes also `layers` and `examples`, if given, after the spec, their leading axes merged as in `Heads`.
        layers: arrays `[heads, ...]`. examples: arrays `[batch, heads, ...]`.
        """
        by_length, by_layer, by_example = (EXAMPLES, None, HEADS), (HEADS,), (EXAMPLES,)
        meanings = *(by_length,) * 3, by_layer, by_example, by_example, (), by_example, by_example, by_example
        arguments = tuple(map(Argument, self._fields[:-1], self[:-1], meanings))
        arguments += Argument("layers", layers, by_layer), Argument("examples", examples, (EXAMPLES, HEADS))
        return on_each_device(_of_every_head, arguments, function, self.spec, *options)


def _of_every_head(
    q, k, v, score, n_q, n_k, epsilon, row_weights, column_weights, ids, layers, examples, function, spec, *options
) -> PyTree:
    axis = spec.axis
    if epsilon is not None:
        dtype = support.potential_dtype(q, k, v)
        # Padding must not reach the gradient of epsilon.
        q = support.zero_padding(q, axis.local(n_q, q.shape[1])).astype(dtype) / epsilon.astype(dtype)
    right = []  # what is wrong and traced makes its example NaN
    for weights, n in ((row_weights, n_q), (column_weights, n_k)):
        if isinstance(weights, jax.core.Tracer):
            real = support.positions(n, weights.shape[1], axis) < n[:, None]
            right.append((~real | ((weights > 0) & (weights < jnp.inf))).all(1))
    if axis.is_shared or ids is not None:
        right.append(n_q == n_k)
    for of_example in right:
        q = q + nan_unless(axis.sum((~of_example).astype(jnp.int32)) == 0, q.dtype)[:, None, None, None]
    batch, heads = q.shape[0], q.shape[2]
    segments = None if ids is None else support.segments_of(ids, axis, spec.band)
    given = by_head(q, k, v, score, n_q, n_k, row_weights, column_weights, segments)
    more = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), layers), examples
    more = jax.tree.map(lambda x: axes.varying_like(given.q, x.reshape(batch * heads, *x.shape[2:])), more)
    results = function(given, spec, *(x for x in more if x is not None), *options)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), results)


def by_head(
    q, k, v, dustbin_score, q_lengths, k_lengths, row_weights=None, column_weights=None, segments=None
) -> Heads:
    """Merge batch and heads into one leading axis."""
    batch, _, heads, _ = q.shape

    def of_heads(x):
        return jnp.broadcast_to(x[:, None], (batch, heads, *x.shape[1:]))

    n_q, n_k = (of_heads(n.astype(jnp.int32)) for n in (q_lengths, k_lengths))
    score = jnp.broadcast_to(dustbin_score, (batch, heads))
    more = jax.tree.map(of_heads, (row_weights, column_weights, segments))
    given = Heads(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), score, n_q, n_k, *more)
    result = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), given)
    for x in jax.tree.leaves(result):
        result = axes.varying_like(x, result)
    return result


def as_array(name: str, x: Any) -> Any:
    """Return an array: of NumPy, where integers keep their values, unless JAX holds or traces it. Raises ValueError."""
    if isinstance(x, (jax.Array, np.ndarray)):
        return x
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
    try:
        return jnp.asarray(x) if traced or hasattr(x, "__jax_array__") else np.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is no array: {error}") from error


def as_heads(name: str, x: Any) -> Float[Array, "batch length heads width"]:
    x = as_array(name, x)
    if len(x.shape) != 4 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}; it must be [batch, length, heads, width], none of them 0")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be one of {', '.join(DTYPES)}")
    return jnp.asarray(x)


def _one_length(name: str, sizes: tuple[Size, Size], q_lengths, k_lengths) -> tuple[Any, Any]:
    """Return the lengths of q and of k, which are one. Raises ValueError as far as they are known to differ."""
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name} is for self-attention: q has length {sizes[0]}, k must have it, not {sizes[1]}")
    if q_lengths is None or k_lengths is None:
        q_lengths = k_lengths = k_lengths if q_lengths is None else q_lengths
    are_known = not any(n is None or isinstance(n, jax.core.Tracer) for n in (q_lengths, k_lengths))
    if are_known and not np.array_equal(np.asarray(q_lengths), np.asarray(k_lengths)):
        raise ValueError(f"{name} is for self-attention: k_lengths must be q_lengths, or left out")
    return q_lengths, k_lengths


def _sequence_axis(name: Any, spec: SinkhornSpec, share: Size) -> SequenceAxis:
    """Return the axis whose devices share sequences. Raises ValueError."""
    if name is None:
        return ALONE
    known = jax.sharding.get_abstract_mesh().manual_axes
    if name not in known:
        there = ", ".join(known) or "none"
        raise ValueError(f"sequence_axis={name!r} must be an axis of a mesh inside jax.shard_map; here are: {there}")
    if spec.band is None or spec.band > share:
        raise ValueError(
            f"spec.band={spec.band} reaches beyond the neighbours along sequence_axis={name!r}: allowed is at most one "
            f"share, {share}; use a narrower band or fewer devices"
        )
    return SequenceAxis(name)


def _segment_ids(
    ids: Any, shape: tuple, spec: SinkhornSpec, weights: tuple[Any, Any]
) -> Int[Array, "batch rows"] | None:
    """Return segment ids as int32. Raises ValueError, and UnsupportedError for what would join segments."""
    if ids is None:
        return None
    ids = as_array("segment_ids", ids)
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has shape {ids.shape} and dtype {ids.dtype}; it must be {shape} integers")
    joined, change = "", ""
    if spec.dustbin != "none":
        joined, change = f"spec.dustbin={spec.dustbin!r}", "dustbin='none' with tau_a and tau_b below 1"
    elif not spec.is_relaxed and weights != (None, None):
        joined, change = "weights that are balanced", "tau_a or tau_b below 1"
    elif not spec.is_relaxed and (spec.gradient == "implicit" or spec.solver == "newton"):
        joined, change = "a balanced plan's gradient='implicit' or solver='newton'", "tau_a or tau_b below 1"
    if joined:
        raise UnsupportedError(f"segment_ids cannot be kept apart with {joined}, one for all segments; use {change}")
    return jnp.asarray(ids).astype(jnp.int32)


def _check_longest(name: str, length, spec: SinkhornSpec) -> None:
    """Raise ValueError for a length whose band has no exact arithmetic, UnsupportedError if that is not known."""
    try:
        if spec.band is not None and length > support.LONGEST_BANDED:
            raise ValueError(f"{name} of length {length} is too long for a band: at most {support.LONGEST_BANDED}")
    except jax.errors.InconclusiveDimensionOperation as error:
        raise UnsupportedError(
            f"{name} has the symbolic length {length}, and a band is for at most {support.LONGEST_BANDED}; use "
            f"jax.export.symbolic_shape(..., constraints=['{length} <= {support.LONGEST_BANDED}']), or band=None"
        ) from error


def _score(score: Any, spec: SinkhornSpec, heads: int, dtype) -> Float[Array, "heads"]:
    if (score is None) != (spec.dustbin == "none"):
        given = "missing" if score is None else "given"
        raise ValueError(f"dustbin_score is {given}, but spec.dustbin={spec.dustbin!r}: give one a head or 'none'")
    if score is None:
        return jnp.zeros(heads, dtype)
    score = as_array("dustbin_score", score)
    is_number = score.dtype in DTYPES or jnp.issubdtype(score.dtype, jnp.integer)
    if score.shape not in ((), (heads,)) or not is_number:
        raise ValueError(
            f"dustbin_score must be {heads} floats, one a head; given {score.dtype} of shape {score.shape}"
        )
    return jnp.broadcast_to(jnp.asarray(score, None if score.dtype in DTYPES else dtype), (heads,))


def as_weights(name: str, weights: Any, shape: tuple, n: Int[Array, "batch"]) -> Float[Array, "batch length"] | None:
    """Return weights as floats, 1 at padding if it is known. Raises ValueError, for values only if they are known."""
    if weights is None:
        return None
    weights = as_array(name, weights)
    is_number = weights.dtype in DTYPES or jnp.issubdtype(weights.dtype, jnp.integer)
    if weights.shape != shape or not is_number:
        raise ValueError(f"{name} has shape {weights.shape} and dtype {weights.dtype}; it must be {shape} floats")
    if not any(isinstance(x, jax.core.Tracer) for x in (weights, n)):
        real = np.arange(shape[1]) < np.asarray(jax.device_get(n))[:, None]
        values = np.where(real, np.asarray(jax.device_get(weights), np.float64), 1)
        if not (np.isfinite(values) & (values > 0)).all():
            wrong = values[~(np.isfinite(values) & (values > 0))][0]
            raise ValueError(f"{name} holds {wrong}; weights of residues must be finite numbers above 0")
    return jnp.asarray(weights, None if weights.dtype in DTYPES else jnp.float32)


def as_lengths(name: str, lengths: Any, longest: int, batch: int) -> Int[Array, "batch"]:
    """Return lengths as int32, at most the padded one. Raises ValueError, for values only if they are known."""
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    lengths = as_array(name, lengths)
    if lengths.shape not in ((), (batch,)) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} has shape {lengths.shape} and dtype {lengths.dtype}; it must be {batch} integers")
    if not isinstance(lengths, jax.core.Tracer):
        values = jax.device_get(lengths)
        if values.min() < 0 or values.max() > longest:
            raise ValueError(f"{name}={values.tolist()} must lie between 0 and the padded length {longest}")
    if lengths.dtype.itemsize < 4:
        lengths = lengths.astype(jnp.int32)  # first: the padded length may be too large for the dtype
    lengths = jnp.clip(jnp.asarray(lengths), 0, longest).astype(jnp.int32)
    return jnp.broadcast_to(lengths, (batch,))
