"""Write pairwise alignments as text, for people and in the formats of other programs.

Positions are counted from 1 in `text` and in tables of pairs (`tsv:id,identity`), and from 0 in `tsv` and `jsonl`. The
confidence of a column is the probability that its two residues are aligned, or that its only residue is aligned with
none.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignment.sequences import Record, told_apart
from data import vocab

GAP = "-"
_BLOCK = 60  # columns
_WIDEST_NAME = 20
NO_POSITION = -1
_STEPS = 10_000  # values of confidence between 0 and 1, in JSON
_DIGITS = [repr(n / _STEPS) for n in range(_STEPS + 1)]
# Karlin and Altschul's parameters of BLOSUM62 with BLAST's gap costs, where a gap of k residues costs 11 + k.
LAMBDA, K = 0.267, 0.041
_BLAST_OPENING, _BLAST_RESIDUE = 11, 1


class Aligned(NamedTuple):
    """Two sequences and their alignment, an `alignment.inference.PairAlignment`."""

    id: str
    x: Record
    y: Record
    pairs: Int[np.ndarray, "aligned 2"]
    confidence: Float[np.ndarray, " aligned"]
    x_alone: Float[np.ndarray, " x_length"]
    y_alone: Float[np.ndarray, " y_length"]


class Columns(NamedTuple):
    """An alignment column by column; of two neighbouring gaps, the unaligned residues of x come first."""

    i: Int[np.ndarray, " columns"]  # position in x, or NO_POSITION
    j: Int[np.ndarray, " columns"]
    x: str  # residues and gaps
    y: str
    confidence: Float[np.ndarray, " columns"]


def columns_of(aligned: Aligned) -> Columns:
    """Return the columns of an alignment, gaps included."""
    places: list[tuple[int, int]] = []
    x_next = y_next = 0
    for x_match, y_match in [*aligned.pairs.tolist(), (len(aligned.x.residues), len(aligned.y.residues))]:
        places += [(n, NO_POSITION) for n in range(x_next, x_match)]
        places += [(NO_POSITION, n) for n in range(y_next, y_match)]
        places.append((x_match, y_match))
        x_next, y_next = x_match + 1, y_match + 1
    i, j = np.array(places[:-1], int).reshape(-1, 2).T
    confidence = np.where(i == NO_POSITION, aligned.y_alone[j], aligned.x_alone[i])
    confidence[(i != NO_POSITION) & (j != NO_POSITION)] = aligned.confidence
    return Columns(i, j, _written(aligned.x, i), _written(aligned.y, j), confidence)


def _written(record: Record, positions: np.ndarray) -> str:
    return "".join(GAP if n == NO_POSITION else record.residues[n] for n in positions)


def text(aligned: Aligned, reference: Int[np.ndarray, " x_length"] | None = None) -> str:
    """Write a summary, then blocks of columns for people to read.

    Between the sequences, `|` marks identical residues, `:` a positive BLOSUM62 score and `.` any other score. Below
    them stands the confidence in tenths. `reference`, the position in y of each residue of x or -1, adds a line of
    `differences`.
    """
    columns = columns_of(aligned)
    same, substitution = np.array(list(columns.x)) == np.array(list(columns.y)), _substitutions(columns)
    middle = "".join(np.select([_alone(columns), same, substitution > 0], [" ", "|", ":"], "."))
    tenths = "".join(str(min(9, int(10 * c))) for c in columns.confidence)
    marks = "" if reference is None else differences(columns, reference)
    width = max(len(_short(name)) for name in (aligned.x.id, aligned.y.id, "confidence"))
    digits = len(str(max(len(aligned.x.residues), len(aligned.y.residues))))
    lines, ends = _summary(aligned, columns, middle), [0, 0]

    def line(name: str, begin: int | str, content: str, end: int | str = "") -> str:
        return f"{name:{width}} {begin:{digits}} {content} {end}".rstrip()

    for start in range(0, len(middle), _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = []
        for side, (record, letters) in enumerate(((aligned.x, columns.x[block]), (aligned.y, columns.y[block]))):
            residues = len(letters.replace(GAP, ""))
            begin, ends[side] = ends[side] + (residues > 0), ends[side] + residues
            rows.append(line(_short(record.id), begin, letters, ends[side]))
        lines += ["", rows[0], line("", "", middle[block]), rows[1], line("confidence", "", tenths[block])]
        if marks[block].strip():
            lines.append(line("reference", "", marks[block]))
    return "\n".join(lines) + "\n\n"


def differences(columns: Columns, reference: Int[np.ndarray, " x_length"]) -> str:
    """Mark the columns that differ from a reference alignment, others by a space.

    `!` marks two residues that the reference does not align with each other, `?` an unaligned residue that the
    reference aligns.
    """
    found = np.append(reference, NO_POSITION)[columns.i]  # partner of x's residue; -1 where there is none
    alone = _alone(columns)
    aligned_there = np.where(columns.i == NO_POSITION, np.isin(columns.j, reference), found != NO_POSITION)
    return "".join(np.select([~alone & (found != columns.j), alone & aligned_there], ["!", "?"], " "))


def _alone(columns: Columns) -> Bool[np.ndarray, " columns"]:
    return (columns.i == NO_POSITION) | (columns.j == NO_POSITION)


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "~"


def _substitutions(columns: Columns) -> Int[np.ndarray, " columns"]:
    x, y = (vocab.encode(letters.replace(GAP, "X").encode()) for letters in (columns.x, columns.y))
    return vocab.blosum62()[x, y]


def _summary(aligned: Aligned, columns: Columns, middle: str) -> list[str]:
    def share(count: int) -> str:
        return f"{count}/{len(middle)} ({100 * count / len(middle):.1f} %)"

    lines = [
        f"{side}: {record.id}, {len(record.residues)} residues{'  ' if record.description else ''}{record.description}"
        for side, record in (("x", aligned.x), ("y", aligned.y))
    ]
    mean = f"{aligned.confidence.mean():.2f} on average over" if len(aligned.pairs) else "none;"
    return [
        *lines,
        f"Identity:   {share(middle.count('|'))}",
        f"Positives:  {share(middle.count('|') + middle.count(':'))} by BLOSUM62",
        f"Gaps:       {share(middle.count(' '))}",
        f"Score:      {_score(columns)} by BLOSUM62, gaps {vocab.FIRST_GAP} and {vocab.FURTHER_GAP}",
        f"Confidence: {mean} {len(aligned.pairs)} aligned pairs",
    ]


def _score(columns: Columns) -> int:
    """Return the score of this alignment in Needleman-Wunsch, end gaps included."""
    score = int(_substitutions(columns).sum())
    for positions in (columns.i, columns.j):
        gap = positions == NO_POSITION
        openings = int((np.diff(gap, prepend=False) & gap).sum())
        score -= vocab.FURTHER_GAP * int(gap.sum()) + (vocab.FIRST_GAP - vocab.FURTHER_GAP) * openings
    return score


def stockholm(aligned: Aligned) -> str:
    """Write one Stockholm alignment, with the confidence as HMMER writes posterior probabilities.

    The lines `#=GR ... PP` and `#=GC PP_cons` hold rounded tenths, and `*` from .95 on.
    """
    columns = columns_of(aligned)
    marks = np.array(list("0123456789*"))[np.floor(columns.confidence * 10 + 0.5).astype(int)]
    names = [f"_{name}" if name.startswith(("#", "//")) else name for name in _names(aligned)]  # other lines begin so
    width = max(len("#=GC PP_cons"), *(len(f"#=GR {name} PP") for name in names))
    described = zip(names, (aligned.x.description, aligned.y.description), strict=True)
    lines = ["# STOCKHOLM 1.0", f"#=GF ID {aligned.id}", *(f"#=GS {name} DE {of}" for name, of in described if of)]
    for name, positions, written in zip(names, (columns.i, columns.j), (columns.x, columns.y), strict=True):
        lines.append(f"{name:{width}} {written}")
        lines.append(f"{f'#=GR {name} PP':{width}} {''.join(np.where(positions == NO_POSITION, '.', marks))}")
    return "\n".join([*lines, f"{'#=GC PP_cons':{width}} {''.join(marks)}", "//", ""])


def fasta(aligned: Aligned) -> str:
    """Write both sequences with gaps."""
    columns, (x, y) = columns_of(aligned), _names(aligned)
    return _fasta(x, aligned.x.description, columns.x) + _fasta(y, aligned.y.description, columns.y)


def a3m(aligned: Aligned, name: str | None = None) -> str:
    """Write y relative to x: a column for each residue of x, unaligned residues of y in lower case."""
    columns = columns_of(aligned)
    relative = (b.lower() if a == GAP else b for a, b in zip(columns.x, columns.y, strict=True))
    return _fasta(name or aligned.y.id, aligned.y.description, "".join(relative))


def _fasta(name: str, description: str, written: str) -> str:
    return f">{name}{' ' if description else ''}{description}\n{written}\n"


def _names(aligned: Aligned) -> tuple[str, str]:
    """Return the ids of x and y, told apart."""
    return aligned.x.id, told_apart(aligned.y.id, (aligned.x.id,))


def tsv(aligned: Aligned) -> str:
    """Write a line for each aligned pair: positions from 0, residues, confidence."""
    return "".join(
        f"{aligned.id}\t{i}\t{j}\t{aligned.x.residues[i]}\t{aligned.y.residues[j]}\t{c:.4f}\n"
        for (i, j), c in zip(aligned.pairs, aligned.confidence, strict=True)
    )


def jsonl(aligned: Aligned) -> str:
    """Write `{"id", "pairs": [[i, j], ...], "confidence": [...]}` with positions from 0."""
    # Equal to the text of json.dumps, in a fifth of its time: numbers are most of the output.
    pairs = ", ".join(["[%d, %d]"] * len(aligned.pairs)) % tuple(aligned.pairs.ravel().tolist())
    steps = np.rint(aligned.confidence.astype(float) * _STEPS).astype(int).tolist()
    confidence = ", ".join([_DIGITS[n] if n <= _STEPS else repr(n / _STEPS) for n in steps])
    return f'{{"id": {json.dumps(aligned.id)}, "pairs": [{pairs}], "confidence": [{confidence}]}}\n'


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
        score = int(_substitutions(self.core).sum()) - _BLAST_OPENING * self.openings - _BLAST_RESIDUE * self.gaps
        return (LAMBDA * score - math.log(K)) / math.log(2) if self.pairs else 0.0

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
    places = np.flatnonzero(~_alone(columns))
    within = slice(places[0], places[-1] + 1) if len(places) else slice(0)
    i, j, x, y, confidence = columns
    core = Columns(i[within], j[within], x[within], y[within], confidence[within])
    identical = np.array(list(core.x), "U1") == np.array(list(core.y), "U1")
    positive = identical | (~_alone(core) & (_substitutions(core) > 0))
    gaps = [positions == NO_POSITION for positions in (core.i, core.j)]
    openings = sum(int((gap[1:] & ~gap[:-1]).sum()) for gap in gaps)  # a core begins with an aligned pair
    count = int(identical.sum()), int(positive.sum()), int(_alone(core).sum())
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
    "score": ("BLOSUM62 score from end to end, gaps 11 and 1", lambda of: _score(of.columns)),
    "confidence": ("mean over the aligned pairs", lambda of: of.share(float(of.aligned.confidence.sum()))),
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
_TABLE = "tsv:"

FORMATS: dict[str, Callable[[Aligned], str]] = {of.__name__: of for of in (text, stockholm, a3m, fasta, tsv, jsonl)}
_SUFFIXES = {"text": ".txt", "stockholm": ".sto"}


def check_format(form: str) -> None:
    """Raise ValueError unless the name is of `FORMATS`, or "tsv:" before names of `COLUMNS` with commas between."""
    if form.startswith(_TABLE):
        unknown = [name for name in _columns_in(form) if name not in COLUMNS]
        if unknown:
            allowed = f"{BLAST}, {', '.join(COLUMNS)}"
            raise ValueError(f"{form}: {unknown[0]!r} is no column; allowed are {allowed}")
    elif form not in FORMATS:
        raise ValueError(f"{form!r} was given, allowed are {', '.join(FORMATS)}, and tsv: with names of columns")


def suffix(form: str) -> str:
    """Return how names of files in a format end."""
    name = form.partition(":")[0]
    return _SUFFIXES.get(name, f".{name}")


def written(alignments: Iterator[Aligned], form: str) -> Iterator[str]:
    """Write all alignments in a format that `check_format` knows; A3M begins with x, the query, of all of them."""
    if form.startswith(_TABLE):
        yield from _table(alignments, _columns_in(form), header=form != _TABLE + BLAST)
    elif form == "a3m":
        yield from _a3m_of_query(alignments)
    else:
        if form == "tsv":
            yield "id\ti\tj\tx\ty\tconfidence\n"
        yield from map(FORMATS[form], alignments)


def _columns_in(form: str) -> Sequence[str]:
    names = form.removeprefix(_TABLE).split(",")
    return [column for name in names for column in (_BLAST_COLUMNS if name == BLAST else [name])]


def _table(alignments: Iterator[Aligned], names: Sequence[str], *, header: bool) -> Iterator[str]:
    """Write a line for each pair of sequences. BLAST's own table has no header."""
    if header:
        yield "\t".join(names) + "\n"
    for summary in map(_summarised, alignments):
        yield "\t".join(str(COLUMNS[name][1](summary)) for name in names) + "\n"


def _a3m_of_query(alignments: Iterator[Aligned]) -> Iterator[str]:
    names: set[str] = set()
    for aligned in alignments:
        if not names:
            names.add(aligned.x.id)
            yield _fasta(aligned.x.id, aligned.x.description, aligned.x.residues)
        name = told_apart(aligned.y.id, names)
        names.add(name)
        yield a3m(aligned, name)
