"""Settings, inputs and diagnostics of Sinkhorn attention."""

import dataclasses
import numbers
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Integer, Num

from ot_attention.axes import ALONE, SequenceAxis

Dustbin = Literal["none", "unit", "full"]
Gradient = Literal["tail", "implicit", "unrolled"]
Solver = Literal["sinkhorn", "newton"]
Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

# Vectors over the rows and the columns of N problems; "all" means with the dustbin's entry, last.
Rows = Float[jax.Array, "N rows"]
Columns = Float[jax.Array, "N columns"]
AllRows = Float[jax.Array, "N all_rows"]
AllColumns = Float[jax.Array, "N all_columns"]
Lengths = Int[jax.Array, "N"]
Segments = tuple[Int[jax.Array, "N rows"], Int[jax.Array, "N rows"]]  # first and last position of each one's segment
Size = Any  # of an axis: an integer, or a symbol of `jax.export`
# What callers may give; lists of q, k and v are taken too.
LengthsLike = Integer[ArrayLike, "*batch"] | Sequence[int]
ScoreLike = Num[ArrayLike, "*heads"] | Sequence[float]
SegmentsLike = Integer[ArrayLike, "batch length"] | Sequence[Sequence[int]]
WeightsLike = Num[ArrayLike, "batch length"] | Sequence[Sequence[float]]

_MOST = 2**30  # of integers: sums of two fit into 32 bits


class UnsupportedError(ValueError):
    """Error for a call that an implementation cannot serve. The message says why and what to change."""


class SinkhornInfo(NamedTuple):
    """Log-potentials of the plan `exp(S + f + g)`, 0 at padding and at empty rows or columns; the dustbin is last.

    `f` and `g` are differentiable, with the surrogate's gradient as the output. `residual` is the largest absolute
    deviation of a row sum from its target, over rows with support; where `tau_a` is below 1 that deviation is wanted.
    `steps` counts the base steps made. Both carry no gradient.
    """

    f: Float[jax.Array, "batch heads rows"]
    g: Float[jax.Array, "batch heads columns"]
    residual: Float[jax.Array, "batch heads"]
    steps: Int[jax.Array, "batch heads"]


# So that exported functions that return it can be written to files.
jax.export.register_namedtuple_serialization(SinkhornInfo, serialized_name="ot_attention.SinkhornInfo")


@dataclasses.dataclass(frozen=True)
class SinkhornSpec:
    """Settings of one Sinkhorn attention layer; hashable, so usable as a static argument of `jax.jit`.

    Numbers may be NumPy's or array scalars; they become Python's.

    epsilon: entropic temperature; scores are `q . k / (sqrt(D) * epsilon)`. A value that JAX traces is a learned
        temperature: it gets its gradient, and is NaN unless it is finite and above 0. Such a spec has no hash: make it
        inside the function that is differentiated or compiled.
    base_steps: T, steps without gradient. tail_steps: R >= 1, differentiated steps (arXiv 2605.08123).
    band: W, half-width in residues of the support around the length-scaled diagonal; None for full support.
    dustbin: "none"; "unit" (the paper's single dustbin of unit capacity); "full" (any residue may be a gap).
    gradient: "tail" (exact for the surrogate), "implicit" (of the converged plan), "unrolled" (all T + R steps).
    solver: "newton" makes `newton_steps` Newton steps after the base steps, each followed by one more base step.
    cg_steps: conjugate gradient steps of each Newton step, and of the implicit gradient.
    tau_a, tau_b: relaxation of the row and of the column sums, from 1 (met) to 0 (free): rho / (rho + epsilon) for a
        Kullback-Leibler penalty of weight rho (Sejourne et al. 2019, arXiv 1910.12958). (1, 0) is softmax attention.
    tolerance: end a head's base steps after one that moves no row sum by more (relaxed: no potential); 0 makes all.

    Raises ValueError for values out of range.
    """

    epsilon: float = 1.0
    base_steps: int = 20
    tail_steps: int = 2
    band: int | None = 64
    dustbin: Dustbin = "none"
    gradient: Gradient = "tail"
    solver: Solver = "sinkhorn"
    newton_steps: int = 2
    cg_steps: int = 8
    tau_a: float = 1.0
    tau_b: float = 1.0
    tolerance: float = 0.0

    @property
    def is_relaxed(self) -> bool:
        return self.tau_a < 1 or self.tau_b < 1

    @property
    def axis(self) -> SequenceAxis:
        """Return the devices that share sequences: none, except in a `SharedSpec`."""
        return ALONE

    def settled(self) -> "SinkhornSpec":
        """Return the settings that do the same with the fewest steps: one step where a side is free.

        The half steps to the other side then begin from potentials 0, always, and every gradient is the tail's.
        """
        if self.tau_a > 0 and self.tau_b > 0:
            return self
        one_step: dict[str, Any] = {"base_steps": 0, "tail_steps": 1, "solver": "sinkhorn", "gradient": "tail"}
        return dataclasses.replace(self, **one_step, tolerance=0.0)

    @property
    def all_base_steps(self) -> int:
        """Number of steps without gradient, the one after each Newton step included."""
        return self.base_steps + (self.newton_steps if self.solver == "newton" else 0)

    @property
    def all_steps(self) -> int:
        return self.all_base_steps + self.tail_steps

    def __post_init__(self):
        _set(self, "epsilon", positive("epsilon", self.epsilon))
        for name, least in (("base_steps", 0), ("tail_steps", 1), ("newton_steps", 1), ("cg_steps", 1)):
            _set(self, name, integer(name, getattr(self, name), least))
        if self.band is not None:
            _set(self, "band", integer("band", self.band, 0, hint=" (None for full support)"))
        for name in ("tau_a", "tau_b"):
            _set(self, name, share(name, getattr(self, name)))
        _set(self, "tolerance", not_negative("tolerance", self.tolerance))
        for name, allowed in (("dustbin", Dustbin), ("gradient", Gradient), ("solver", Solver)):
            choice(name, getattr(self, name), get_args(allowed))
        if self.solver == "newton" and self.base_steps < 1:
            raise ValueError("base_steps=0 must be at least 1 with solver='newton': Newton starts from met column sums")


@dataclasses.dataclass(frozen=True)
class SharedSpec(SinkhornSpec):
    """Settings of a call whose sequences the devices along a mesh axis share; made from its `sequence_axis`."""

    sequence_axis: str | None = None

    @property
    def axis(self) -> SequenceAxis:
        return SequenceAxis(self.sequence_axis)


_set = object.__setattr__  # of a frozen dataclass, in its `__post_init__`


def positive(name: str, value: Any) -> Any:
    """Return a finite number above 0 as a float; if traced, as a float32 (at least) that is NaN if it is not one.

    Raises ValueError.
    """
    if isinstance(value, jax.core.Tracer):
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        if value.shape or not (is_float or jnp.issubdtype(value.dtype, jnp.integer)):
            raise ValueError(f"{name} is traced with shape {value.shape} and dtype {value.dtype}; it must be one float")
        if not is_float or value.dtype.itemsize < 4:
            value = value.astype(jnp.float32)
        return value + nan_unless((value > 0) & (value < jnp.inf), value.dtype)
    number = _scalar(value)
    if not isinstance(number, (int, float)) or not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be a finite number above 0")
    return float(number)


def nan_unless(right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return 0 where a traced value is right, and NaN where it is wrong, which no error can say."""
    # The logarithm of -1 makes NaN where it is due; a NaN to choose from would alarm `jax_debug_nans` always.
    return jnp.log(jnp.where(right, 1, -1).astype(dtype))


def not_negative(name: str, value: Any) -> float:
    """Return a finite number of at least 0 as a float. Raises ValueError."""
    number = _scalar(value)
    if not isinstance(number, (int, float)) or not 0 <= number <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
    return float(number)


def share(name: str, value: Any) -> float:
    """Return a number from 0 to 1 as a float. Raises ValueError."""
    number = _scalar(value)
    if not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 to 1")
    return float(number)


def integer(name: str, value: Any, least: int, hint: str = "") -> int:
    """Return an integer as Python's. Raises ValueError."""
    number = _scalar(value)
    if not isinstance(number, int) or not least <= number <= _MOST:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}, at most {_MOST}{hint}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False as Python's. Raises ValueError."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} must be True or False")
    return bool(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return a name among those allowed. Raises ValueError."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    return value


def _scalar(value: Any) -> int | float | None:
    """Return the number in a scalar of Python, NumPy or JAX; None for anything else, booleans and traced values too."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.generic)):
        return value if isinstance(value, int) else float(value)
    if not isinstance(value, (np.generic, np.ndarray, jax.Array)) or np.ndim(value):
        return None
    if jnp.issubdtype(value.dtype, jnp.integer):
        return int(value)
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else None


class Heads(NamedTuple):
    """Inputs of a backend, with batch and heads as one axis.

    Where devices share sequences, rows and columns are this device's share, and lengths those of whole sequences.
    """

    q: Float[jax.Array, "heads rows width"]
    k: Float[jax.Array, "heads columns width"]
    v: Float[jax.Array, "heads columns value"]
    dustbin_score: Float[jax.Array, "heads"]
    n_q: Int[jax.Array, "heads"]
    n_k: Int[jax.Array, "heads"]
    row_weights: Float[jax.Array, "heads rows"] | None = None  # targets of sums, where given
    column_weights: Float[jax.Array, "heads columns"] | None = None
    segments: Segments | None = None  # of self-attention: a residue meets only those of its own

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """Inputs that have gradients: q, k, v, dustbin scores and, if given, weights."""
        return *self[:4], *self.weights

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.row_weights, self.column_weights

    def replacing(self, differentiable: tuple[Any, ...]) -> "Heads":
        q, k, v, dustbin_score, row_weights, column_weights = differentiable
        return Heads(q, k, v, dustbin_score, self.n_q, self.n_k, row_weights, column_weights, self.segments)
