"""Tables with a line for each pair of sequences, and the columns that they may have.

Positions are counted from 1.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from alignment.columns import NO_POSITION, Aligned, Columns, columns_of, score_of, substitutions, unpaired

# Karlin and Altschul's parameters of BLOSUM62 with BLAST's gap costs, where a gap of k residues costs 11 + k.
LAMBDA, K = 0.267, 0.041
_BLAST_OPENING, _BLAST_RESIDUE = 11, 1


class _Summary(NamedTuple):
    """Counts of an alignment, from which columns of a table are made."""

    aligned: Aligned
    columns: Columns
    core: Columns  # from the first aligned pair to the last
    identical: int
    positive: int
    gaps: int  # columns of the core
    openings: int  # of gaps in the core

    @property
    def pairs(self) -> int:
        return len(self.aligned.pairs)

    def share(self, count: int | float) -> str:
        """Return a share of the aligned pairs."""
        return f"{count / max(1, self.pairs):.4f}"

    def place(self, which: int, side: int) -> int:
        """Return a position, counted from 1, in the first or last aligned pair; 0 if there is none."""
        return int(self.aligned.pairs[which, side]) + 1 if self.pairs else 0

    @property
    def percent_identity(self) -> float:
        return 100 * self.identical / max(1, len(self.core.x))

    @property
    def bits(self) -> float:
        total = int(substitutions(self.core).sum()) - _BLAST_OPENING * self.openings - _BLAST_RESIDUE * self.gaps
        return (LAMBDA * total - math.log(K)) / math.log(2) if self.pairs else 0.0

    @property
    def expected(self) -> float:
        return len(self.aligned.x.residues) * len(self.aligned.y.residues) * 2.0 ** min(1000.0, -self.bits)

    @property
    def cigar(self) -> str:
        i, j = self.columns.i, self.columns.j
        kinds = np.select([i == NO_POSITION, j == NO_POSITION], ["D", "I"], "M").tolist()
        return "".join(f"{len(list(run))}{kind}" for kind, run in itertools.groupby(kinds))


def _summarised(aligned: Aligned) -> _Summary:
    columns = columns_of(aligned)
    places = np.flatnonzero(~unpaired(columns))
    within = slice(places[0], places[-1] + 1) if len(places) else slice(0)
    i, j, x, y, confidence = columns
    core = Columns(i[within], j[within], x[within], y[within], confidence[within])
    identical = np.array(list(core.x), "U1") == np.array(list(core.y), "U1")
    positive = identical | (~unpaired(core) & (substitutions(core) > 0))
    gaps = [positions == NO_POSITION for positions in (core.i, core.j)]
    openings = sum(int((gap[1:] & ~gap[:-1]).sum()) for gap in gaps)  # a core begins with an aligned pair
    count = int(identical.sum()), int(positive.sum()), int(unpaired(core).sum())
    return _Summary(aligned, columns, core, *count, openings)


# Columns of tables: what they hold, for the help of align.py, and their text.
COLUMNS: dict[str, tuple[str, Callable[[_Summary], object]]] = {
    "id": ("id of the pair", lambda of: of.aligned.id),
    "x": ("id of x", lambda of: of.aligned.x.id),
    "y": ("id of y", lambda of: of.aligned.y.id),
    "x_start": ("first aligned residue of x, counted from 1; 0 if none is aligned", lambda of: of.place(0, 0)),
    "x_end": ("last aligned residue of x", lambda of: of.place(-1, 0)),
    "y_start": ("first aligned residue of y", lambda of: of.place(0, 1)),
    "y_end": ("last aligned residue of y", lambda of: of.place(-1, 1)),
    "x_length": ("residues of x", lambda of: len(of.aligned.x.residues)),
    "y_length": ("residues of y", lambda of: len(of.aligned.y.residues)),
    "length": ("columns from the first aligned pair to the last", lambda of: len(of.core.x)),
    "aligned": ("aligned pairs of residues", lambda of: of.pairs),
    "identity": ("identical pairs, as a share (0 to 1) of the aligned ones", lambda of: of.share(of.identical)),
    "positives": ("pairs identical or of positive BLOSUM62 score, as a share", lambda of: of.share(of.positive)),
    "gaps": ("columns with a gap, from the first aligned pair to the last", lambda of: of.gaps),
    "x_coverage": ("aligned share of x", lambda of: f"{of.pairs / len(of.aligned.x.residues):.4f}"),
    "y_coverage": ("aligned share of y", lambda of: f"{of.pairs / len(of.aligned.y.residues):.4f}"),
    "score": ("BLOSUM62 score from end to end, gaps 11 and 1", lambda of: score_of(of.columns)),
    "confidence": ("mean over the aligned pairs", lambda of: of.share(float(of.aligned.confidence.sum()))),
    "log_odds": ("nats of all alignments over no alignment", lambda of: f"{of.aligned.log_odds:.2f}"),
    "probability": ("that x and y are homologous, 0 to 1", lambda of: f"{of.aligned.probability:.4f}"),
    "cigar": ("from end to end, x as query: I only in x, D only in y", lambda of: of.cigar),
    "qseqid": ("x", lambda of: of.aligned.x.id),
    "sseqid": ("y", lambda of: of.aligned.y.id),
    "pident": ("identical pairs in per cent of length", lambda of: f"{of.percent_identity:.3f}"),
    "mismatch": ("aligned pairs that are not identical", lambda of: of.pairs - of.identical),
    "gapopen": ("gaps from the first aligned pair to the last", lambda of: of.openings),
    "qstart": ("x_start", lambda of: of.place(0, 0)),
    "qend": ("x_end", lambda of: of.place(-1, 0)),
    "sstart": ("y_start", lambda of: of.place(0, 1)),
    "send": ("y_end", lambda of: of.place(-1, 1)),
    "evalue": ("expected number in a search space of x_length y_length", lambda of: f"{of.expected:.2e}"),
    "bitscore": ("BLAST's, of this alignment from its first pair to its last", lambda of: f"{of.bits:.1f}"),
}
BLAST = "blast12"
_BLAST_COLUMNS = (
    *("qseqid", "sseqid", "pident", "length", "mismatch", "gapopen"),
    *("qstart", "qend", "sstart", "send", "evalue", "bitscore"),
)


def columns_in(names: str) -> Sequence[str]:
    """Return the columns that names with commas between stand for. Raises ValueError for a name that is not known."""
    found = [column for name in names.split(",") for column in (_BLAST_COLUMNS if name == BLAST else [name])]
    unknown = [name for name in found if name not in COLUMNS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no column; allowed are {BLAST}, {', '.join(COLUMNS)}")
    return found


def head(names: str) -> str:
    """Return the line of column names. BLAST's own table has none."""
    return "" if names == BLAST else "\t".join(columns_in(names)) + "\n"


def row(aligned: Aligned, columns: Sequence[str]) -> str:
    """Return the line of an alignment."""
    summary = _summarised(aligned)
    return "\t".join(str(COLUMNS[name][1](summary)) for name in columns) + "\n"
