"""Attention by entropic optimal transport: banded, with a dustbin, differentiable. Needs jax, numpy, jaxtyping only."""

from ot_attention.api import sinkhorn_attention, transport_plan
from ot_attention.balance import balance
from ot_attention.spec import SinkhornInfo, SinkhornSpec, UnsupportedError

__version__ = "0.2.0"

__all__ = ["SinkhornInfo", "SinkhornSpec", "UnsupportedError", "balance", "sinkhorn_attention", "transport_plan"]
