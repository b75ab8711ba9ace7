"""Write pairwise alignments as text, for people and in the formats of other programs.

Positions are counted from 1 in `text` and from 0 in `tsv` and `jsonl`. The confidence of a column is the probability
that its two residues are aligned, or that its only residue is aligned with none.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignment.sequences import Record
from data import vocab

GAP = "-"
_BLOCK = 60  # columns
_WIDEST_NAME = 20
NO_POSITION = -1
_STEPS = 10_000  # values of confidence between 0 and 1, in JSON
_DIGITS = [repr(n / _STEPS) for n in range(_STEPS + 1)]


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
    names = aligned.x.id, aligned.y.id + ("_2" if aligned.x.id == aligned.y.id else "")  # each name only once
    width = max(len("#=GC PP_cons"), *(len(f"#=GR {name} PP") for name in names))
    described = zip(names, (aligned.x.description, aligned.y.description), strict=True)
    lines = ["# STOCKHOLM 1.0", f"#=GF ID {aligned.id}", *(f"#=GS {name} DE {of}" for name, of in described if of)]
    for name, positions, written in zip(names, (columns.i, columns.j), (columns.x, columns.y), strict=True):
        lines.append(f"{name:{width}} {written}")
        lines.append(f"{f'#=GR {name} PP':{width}} {''.join(np.where(positions == NO_POSITION, '.', marks))}")
    return "\n".join([*lines, f"{'#=GC PP_cons':{width}} {''.join(marks)}", "//", ""])


def fasta(aligned: Aligned) -> str:
    """Write both sequences with gaps."""
    columns = columns_of(aligned)
    return _fasta(aligned.x, columns.x) + _fasta(aligned.y, columns.y)


def a3m(aligned: Aligned) -> str:
    """Write y relative to x: a column for each residue of x, unaligned residues of y in lower case."""
    columns = columns_of(aligned)
    relative = (b.lower() if a == GAP else b for a, b in zip(columns.x, columns.y, strict=True))
    return _fasta(aligned.y, "".join(relative))


def _fasta(record: Record, written: str) -> str:
    return f">{record.id}{' ' if record.description else ''}{record.description}\n{written}\n"


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


FORMATS: dict[str, Callable[[Aligned], str]] = {of.__name__: of for of in (text, stockholm, a3m, fasta, tsv, jsonl)}


def written(alignments: Iterator[Aligned], form: str) -> Iterator[str]:
    """Write all alignments in one of the `FORMATS`; an A3M names a query once for all pairs that follow it."""
    query: Record | None = None
    if form == "tsv":
        yield "id\ti\tj\tx\ty\tconfidence\n"
    for aligned in alignments:
        if form == "a3m" and aligned.x != query:
            query = aligned.x
            yield _fasta(query, query.residues)
        yield FORMATS[form](aligned)
