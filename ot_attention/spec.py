"""Settings, inputs and diagnostics of Sinkhorn attention."""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
from jaxtyping import Float, Int

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


class UnsupportedError(ValueError):
    """Error for a call that an implementation cannot serve. The message says why and what to change."""


class SinkhornInfo(NamedTuple):
    """Log-potentials of the plan `exp(S + f + g)`, 0 at padding and at empty rows or columns; the dustbin is last.

    `f` and `g` are differentiable, with the surrogate's gradient as the output. `residual` is the largest absolute
    deviation of a row sum from its target, over rows with support; it carries no gradient.
    """

    f: Float[jax.Array, "batch heads rows"]
    g: Float[jax.Array, "batch heads columns"]
    residual: Float[jax.Array, "batch heads"]


@dataclasses.dataclass(frozen=True)
class SinkhornSpec:
    """Settings of one Sinkhorn attention layer; hashable, so usable as a static argument of `jax.jit`.

    epsilon: entropic temperature; scores are `q . k / (sqrt(D) * epsilon)`.
    base_steps: T, steps without gradient. tail_steps: R >= 1, differentiated steps (arXiv 2605.08123).
    band: W, half-width in residues of the support around the length-scaled diagonal; None for full support.
    dustbin: "none"; "unit" (the paper's single dustbin of unit capacity); "full" (any residue may be a gap).
    gradient: "tail" (exact for the surrogate), "implicit" (of the converged plan), "unrolled" (all T + R steps).
    solver: "newton" makes `newton_steps` Newton steps after the base steps, each followed by one more base step.
    cg_steps: conjugate gradient steps of each Newton step, and of the implicit gradient.

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

    @property
    def all_base_steps(self) -> int:
        """Number of steps without gradient, the one after each Newton step included."""
        return self.base_steps + (self.newton_steps if self.solver == "newton" else 0)

    @property
    def all_steps(self) -> int:
        return self.all_base_steps + self.tail_steps

    def __post_init__(self):
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon={self.epsilon!r} must be a finite number above 0")
        for name, least in (("base_steps", 0), ("tail_steps", 1), ("newton_steps", 1), ("cg_steps", 1)):
            _check_int(name, getattr(self, name), least)
        if self.band is not None:
            _check_int("band", self.band, 0, hint=" (None for full support)")
        for name, allowed in (("dustbin", Dustbin), ("gradient", Gradient), ("solver", Solver)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(allowed))}")
        if self.solver == "newton" and self.base_steps < 1:
            raise ValueError("base_steps=0 must be at least 1 with solver='newton': Newton starts from met column sums")


def _check_int(name: str, value: object, least: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{hint}")


class Heads(NamedTuple):
    """Inputs of a backend, with batch and heads as one axis."""

    q: Float[jax.Array, "heads rows width"]
    k: Float[jax.Array, "heads columns width"]
    v: Float[jax.Array, "heads columns value"]
    dustbin_score: Float[jax.Array, "heads"]
    n_q: Int[jax.Array, "heads"]
    n_k: Int[jax.Array, "heads"]
