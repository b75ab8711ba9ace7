"""The backends there are, and the choice of one for a call.

A new backend is a module that satisfies `Backend` or `Band`, a line in `BACKENDS` and its name in `Implementation`.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.export import is_symbolic_dim

from ot_attention import reference, support
from ot_attention.backends import Backend, gpu, tpu, xla
from ot_attention.backends.loop import Loop
from ot_attention.spec import Heads, Implementation, SinkhornSpec, UnsupportedError

# `implementation=None` takes the first that serves the platform and the call.
BACKENDS: dict[Implementation, Backend] = {
    "pallas_tpu": tpu,
    "pallas_gpu": Loop(gpu.Band, gpu.unsupported_reason, platform="gpu", one_dtype=False),
    "xla": Loop(xla.Band),
    "reference": reference,
}


def choose(name: Implementation | None, heads: Heads, spec: SinkhornSpec) -> Implementation:
    """Return the named backend, or without a name the one to use. Raises UnsupportedError if it cannot do this."""
    candidates = [name] if name else [n for n, b in BACKENDS.items() if b.platform in (None, support.platform())]
    if name is None and tpu.is_by_products(heads, spec):  # which nobody has run on a chip, nor beside "xla"
        candidates = [candidate for candidate in candidates if candidate != "pallas_tpu"]
    for candidate in candidates:
        if not (reasons := _unsupported_reasons(candidate, heads, spec)):
            return candidate
    raise UnsupportedError(f"implementation {candidates[-1]!r} cannot do this: " + "; ".join(reasons))


@contextlib.contextmanager
def kernels_have_their_device() -> Iterator[None]:
    """Raise UnsupportedError where JAX is about to compile the kernels of a TPU for another device."""
    try:
        yield
    except ValueError as error:
        if "interpret mode" not in str(error):
            raise
        raise UnsupportedError(
            "implementation 'pallas_tpu' cannot do this: there is no TPU here; use implementation='xla' or None"
        ) from error


def _unsupported_reasons(name: Implementation, heads: Heads, spec: SinkhornSpec) -> list[str]:
    if BACKENDS[name].platform and any(is_symbolic_dim(size) for x in jax.tree.leaves(heads) for size in x.shape):
        return ["its kernels need known sizes, not symbols of jax.export; use implementation='xla'"]
    reasons = [BACKENDS[name].unsupported_reason(heads, spec)]
    if spec.gradient == "unrolled" and spec.solver == "newton":
        reasons.append("gradient='unrolled' takes plain steps only; use solver='sinkhorn' or gradient='implicit'")
    if spec.gradient == "unrolled" and name != "reference":
        reasons.append("gradient='unrolled' keeps every step; use implementation='reference' or gradient='tail'")
    return [reason for reason in reasons if reason]
