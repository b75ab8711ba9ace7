"""Backends made of a band and the loop of `ot_attention.sinkhorn`."""

from collections.abc import Callable
from typing import NamedTuple

from ot_attention import sinkhorn, support
from ot_attention.backends import Attended, Band
from ot_attention.spec import Heads, SinkhornSpec


class Loop(NamedTuple):
    """Backend made of a band and the loop of `sinkhorn`."""

    band: type[Band]
    unsupported_reason: Callable[[Heads, SinkhornSpec], str | None] = lambda heads, spec: None
    platform: str | None = None
    one_dtype: bool = True  # whether q, k and v must be in the dtype of the potentials

    def attend(self, heads: Heads, spec: SinkhornSpec, /) -> Attended:
        heads = (support.cleaned if self.one_dtype else support.without_padding)(heads, spec.axis)
        out, *info = sinkhorn.attend(heads, spec, self.band)
        # The output is already 0 at padding; masking again also zeroes the incoming cotangents there.
        return support.zero_padding(out, spec.axis.local(heads.n_q, out.shape[1])), *info
