"""A frozen Sinkhorn layer without its loop: ASAP predicts row potentials, and two half steps make the plan of them.

ASAP (arXiv 2605.12879; docs/math.md, section 10): train with Sinkhorn, freeze, and per head `fit` a linear map from
cheap features of the rows to the log-potential f. `apply` then makes one Sinkhorn step, columns first, from there. It
must beat Sinkhorn stopped after as much time (docs/asap.md).
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
