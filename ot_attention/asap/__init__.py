"""A frozen Sinkhorn layer without its loop: ASAP predicts row potentials, and two half steps make the plan of them.

ASAP (arXiv 2605.12879): train with Sinkhorn, freeze, and per head `fit` a linear map from cheap features of the rows to
the log-potential f. `apply` then computes `g = log b - LSE_i(S + f)`, `f = log a - LSE_j(S + g)`, the entropic
c-transform on both sides: row sums are exact and column sums nearly so. This is one Sinkhorn step, columns first, from
a learned start. It must beat Sinkhorn stopped after as much time (docs/asap.md).

The paper's features are exact potentials of one-dimensional optimal transport between q and k along directions. They
cost a sort of every projection of both sides, whatever the band.
"""

from ot_attention.asap.fitting import Deviation, deviation, fit
from ot_attention.asap.maps import Asap, Direction, Feature, Sample, apply, design_size, directions
from ot_attention.asap.transport import kantorovich

__all__ = [
    "Asap",
    "Deviation",
    "Direction",
    "Feature",
    "Sample",
    "apply",
    "design_size",
    "deviation",
    "directions",
    "fit",
    "kantorovich",
]
