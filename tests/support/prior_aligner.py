"""An aligner of BLOSUM62 without anything learned, and globins: it aligns relatives as they should be."""

from flax import nnx

from alignment.inference import Pretrained
from models.attention import specs_of
from models.pair_aligner import PairAligner, PairAlignerConfig

HBA = (
    "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKLLSHCLL"
    "VTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR"
)
HBB = (
    "MVHLTPEEKSAVTALWGKVNVDEVGGEALGRLLVVYPWTQRFFESFGDLSTPDAVMGNPKVKAHGKKVLGAFSDGLAHLDNLKGTFATLSELHCDKLHVDPENFRLL"
    "GNVLVCVLAHHFGKEFTPPVQAAYQKVVAGVANALAHKYH"
)
FRAGMENT = HBA[30:90]


def config(**model: object) -> dict:
    """Return the configuration of an aligner whose projections are nearly 0, with changes of the model."""
    settings = {"width": 16, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8, "plan_gain": 1e-3}
    return {"task": "pair_hmm", "model": settings | model, "attention": {}}


def initial(of: dict) -> Pretrained:
    """Make the aligner of a configuration, before any training."""
    spec, _ = specs_of(of)
    graph, params = nnx.split(PairAligner(PairAlignerConfig(**of["model"]), spec, rngs=nnx.Rngs(0)))
    return Pretrained(graph, nnx.to_pure_dict(params), spec.band)


def pairs_of(x: str, y: str) -> list[list[int]]:
    """Return positions of the columns in which both have a residue; lower case is a residue of its own."""
    i = j = 0
    found = []
    for a, b in zip(x, y, strict=True):
        if a != "-" and b != "-":
            found.append([i, j])
        i, j = i + (a != "-"), j + (b != "-")
    return found
