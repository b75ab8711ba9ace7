"""The aligner for use in Python: sequences in, alignments with confidence and a probability of homology out."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import vocab

# jax and the model are imported when an aligner is loaded: scripts/align.py refuses bad input before that.
if TYPE_CHECKING:
    from alignment.inference import PairAlignment, Pretrained

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "aligner.safetensors"


class Aligner:
    """Aligner of pairs of protein sequences, which are given as letters.

        aligner = Aligner.load()
        found = aligner.align("MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMF", "MVHLTPEEKSAVTALWGKVNVDEVGGEALGRLL")
        found.pairs          # [n, 2], positions from 0 in x and y
        found.confidence     # [n], probability that each of these pairs is right
        found.probability    # that x and y are homologous

    Lower case counts as upper case; B, J, O, U, X and Z are any residue; gaps and other symbols raise ValueError.
    """

    def __init__(self, model: "Pretrained"):
        self._model = model

    @classmethod
    def load(cls, weights: str | Path | None = None) -> "Aligner":
        """Load a file of weights, by default the one that ships.

        Raises OSError if it cannot be read, ValueError if it does not hold an aligner.
        """
        from alignment.inference import Pretrained

        return cls(Pretrained.load(WEIGHTS if weights is None else Path(weights)))

    def align(self, x: str, y: str, **options: Any) -> "PairAlignment":
        """Align two sequences; options are those of `align_pairs`."""
        (found,) = self.align_pairs([(x, y)], **options)
        return found

    def align_pairs(
        self, pairs: Iterable[tuple[str, str]], *, mode: str = "glocal", band: int | None = None
    ) -> "Iterator[PairAlignment]":
        """Yield the alignment of each pair of sequences, in their order; `pairs` may be longer than memory.

        Args:
            pairs: Sequences x and y.
            mode: "glocal" charges an overhang one price whatever its length, "global" as much as other gaps, "local"
                nothing.
            band: Half-width in residues of a band around the best path, -1 for all pairs of residues; by default all up
                to 1,024 residues, and 256 beyond.

        Raises:
            ValueError: An empty or too long sequence, a symbol that is no residue, an unknown mode.
        """
        encoded = ((vocab.encode(x.encode()), vocab.encode(y.encode())) for x, y in pairs)
        size = self._model.chunk_size()
        chunks = iter(lambda: list(itertools.islice(encoded, size)), [])
        options: dict[str, Any] = {"mode": mode, "band": band}
        for chunk in self._model.align_chunks(chunks, **options):
            yield from chunk
