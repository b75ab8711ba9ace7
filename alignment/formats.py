"""Write pairwise alignments as text, for people and in the formats of other programs.

Positions are counted from 1 in `text` and in tables of pairs (`tsv:id,identity`), and from 0 in `tsv` and `jsonl`. All
formats but these tables, `tsv` and `jsonl` hold both sequences from end to end, what is not aligned as gaps.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int

from alignment import tables
from alignment.columns import GAP, NO_POSITION, Aligned, Columns, columns_of, score_of, substitutions, unpaired
from alignment.sequences import Record, told_apart
from data import vocab

_BLOCK = 60  # columns
_WIDEST_NAME = 20
_STEPS = 10_000  # values of confidence between 0 and 1, in JSON
_DIGITS = [repr(n / _STEPS) for n in range(_STEPS + 1)]
# Groups of Clustal W and Clustal Omega (Thompson, Higgins and Gibson 1994; Gonnet PAM 250): above .5, and up to it.
_STRONG = ["STA", "NEQK", "NHQK", "NDEQ", "QHRK", "MILV", "MILF", "HY", "FYW"]
_WEAK = ["CSA", "ATV", "SAG", "STNK", "STPA", "SGND", "SNDEQK", "NDEQHK", "NEQHRK", "FVLIM", "HFY"]
_HEADERS = {"CLUSTAL", "MUSCLE", "PROBCONS", "MSAPROBS", "KALIGN", "BIOPYTHON"}  # words that begin a Clustal alignment


def text(aligned: Aligned, reference: Int[np.ndarray, " x_length"] | None = None) -> str:
    """Write a summary, then blocks of columns for people to read.

    Between the sequences, `|` marks identical residues, `:` a positive BLOSUM62 score and `.` any other score. Below
    them stands the confidence in tenths. `reference`, the position in y of each residue of x or -1, adds a line of
    `differences`.
    """
    columns = columns_of(aligned)
    same, substitution = np.array(list(columns.x)) == np.array(list(columns.y)), substitutions(columns)
    middle = "".join(np.select([unpaired(columns), same, substitution > 0], [" ", "|", ":"], "."))
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
    alone = unpaired(columns)
    aligned_there = np.where(columns.i == NO_POSITION, np.isin(columns.j, reference), found != NO_POSITION)
    return "".join(np.select([~alone & (found != columns.j), alone & aligned_there], ["!", "?"], " "))


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "~"


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
        f"Score:      {score_of(columns)} by BLOSUM62, gaps {vocab.FIRST_GAP} and {vocab.FURTHER_GAP}",
        f"Confidence: {mean} {len(aligned.pairs)} aligned pairs",
        *([f"Homology:   probability {_probability(aligned)}"] if _probability(aligned) else []),
    ]


def stockholm(aligned: Aligned) -> str:
    """Write one Stockholm alignment, with the confidence as HMMER writes posterior probabilities.

    The lines `#=GR ... PP` and `#=GC PP_cons` hold rounded tenths, and `*` from .95 on.
    """
    columns = columns_of(aligned)
    marks = np.array(list("0123456789*"))[np.floor(columns.confidence * 10 + 0.5).astype(int)]
    names = [f"_{name}" if name.startswith(("#", "//")) else name for name in _names(aligned)]  # other lines begin so
    width = max(len("#=GC PP_cons"), *(len(f"#=GR {name} PP") for name in names))
    probability = [f"#=GF CC probability of homology {_probability(aligned)}"] if _probability(aligned) else []
    described = zip(names, (aligned.x.description, aligned.y.description), strict=True)
    lines = ["# STOCKHOLM 1.0", f"#=GF ID {aligned.id}", *probability]
    lines += [f"#=GS {name} DE {of}" for name, of in described if of]
    for name, positions, written in zip(names, (columns.i, columns.j), (columns.x, columns.y), strict=True):
        lines.append(f"{name:{width}} {written}")
        lines.append(f"{f'#=GR {name} PP':{width}} {''.join(np.where(positions == NO_POSITION, '.', marks))}")
    return "\n".join([*lines, f"{'#=GC PP_cons':{width}} {''.join(marks)}", "//", ""])


def clustal(aligned: Aligned) -> str:
    """Write a Clustal alignment in blocks, with its line of conservation below each.

    `*` marks identical residues, `:` residues of a strong group of Clustal's, `.` residues of a weak one. An id that
    begins alignments, as MUSCLE does, gets `_` before it.
    """
    columns = columns_of(aligned)
    names = [f"_{name}" if name.upper() in _HEADERS else name for name in _names(aligned)]
    width = max(16, *(len(name) + 1 for name in names))
    conserved = "".join(map(_conservation, columns.x, columns.y))
    probability = f", probability={_probability(aligned)}" if _probability(aligned) else ""
    lines = [f"CLUSTAL multiple sequence alignment by ot-attention{probability}", ""]
    rows = [*zip(names, (columns.x, columns.y), strict=True), ("", conserved)]
    for start in range(0, len(conserved), _BLOCK):
        lines += ["", *(f"{name:{width}}{letters[start : start + _BLOCK]}" for name, letters in rows)]
    return "\n".join(lines) + "\n\n"


@functools.cache
def _conservation(a: str, b: str) -> str:
    if GAP in (a, b):
        return " "
    kinds = (("*", [a + b] if a == b else []), (":", _STRONG), (".", _WEAK))
    return next((mark for mark, groups in kinds if any(a in group and b in group for group in groups)), " ")


def fasta(aligned: Aligned) -> str:
    """Write both sequences with gaps, and the probability behind the description of y."""
    columns, (x, y) = columns_of(aligned), _names(aligned)
    return _fasta(x, aligned.x.description, columns.x) + _fasta(y, _described(aligned), columns.y)


def a3m(aligned: Aligned, name: str | None = None) -> str:
    """Write y relative to x: a column for each residue of x, unaligned residues of y in lower case."""
    columns = columns_of(aligned)
    relative = (b.lower() if a == GAP else b for a, b in zip(columns.x, columns.y, strict=True))
    return _fasta(name or aligned.y.id, _described(aligned), "".join(relative))


def _described(aligned: Aligned) -> str:
    probability = [f"probability={_probability(aligned)}"] if _probability(aligned) else []
    return " ".join([*([aligned.y.description] if aligned.y.description else []), *probability])


def _probability(aligned: Aligned) -> str:
    """Return the probability of homology, or nothing where it is not known."""
    return "" if math.isnan(aligned.probability) else f"{aligned.probability:.4f}"


def _fasta(name: str, description: str, written: str) -> str:
    return f">{name}{' ' if description else ''}{description}\n{written}\n"


def _names(aligned: Aligned) -> tuple[str, str]:
    """Return the ids of x and y, told apart."""
    return aligned.x.id, told_apart(aligned.y.id, (aligned.x.id,))


def tsv(aligned: Aligned) -> str:
    """Write a line for each aligned pair: positions from 0, residues, confidence, probability of the whole."""
    return "".join(
        f"{aligned.id}\t{i}\t{j}\t{aligned.x.residues[i]}\t{aligned.y.residues[j]}\t{c:.4f}\t{aligned.probability:.4f}\n"
        for (i, j), c in zip(aligned.pairs, aligned.confidence, strict=True)
    )


def jsonl(aligned: Aligned) -> str:
    """Write `{"id", "pairs": [[i, j], ...], "confidence": [...], "probability"}` with positions from 0."""
    # Equal to the text of json.dumps, in a fifth of its time: numbers are most of the output.
    pairs = ", ".join(["[%d, %d]"] * len(aligned.pairs)) % tuple(aligned.pairs.ravel().tolist())
    steps = np.rint(aligned.confidence.astype(float) * _STEPS).astype(int).tolist()
    confidence = ", ".join([_DIGITS[n] if n <= _STEPS else repr(n / _STEPS) for n in steps])
    probability = "null" if math.isnan(aligned.probability) else repr(round(float(aligned.probability), 4))
    return (
        f'{{"id": {json.dumps(aligned.id)}, "pairs": [{pairs}], "confidence": [{confidence}], '
        f'"probability": {probability}}}\n'
    )


FORMATS: dict[str, Callable[[Aligned], str]] = {
    of.__name__: of for of in (text, stockholm, a3m, fasta, clustal, tsv, jsonl)
}
_TABLE = "tsv:"
_SUFFIXES = {"text": ".txt", "stockholm": ".sto", "clustal": ".aln"}


def check_format(form: str) -> None:
    """Raise ValueError unless the name is of `FORMATS`, or "tsv:" before names of columns with commas between."""
    if form.startswith(_TABLE):
        try:
            tables.columns_in(form.removeprefix(_TABLE))
        except ValueError as error:
            raise ValueError(f"{form}: {error}") from error
    elif form not in FORMATS:
        raise ValueError(f"{form!r} was given, allowed are {', '.join(FORMATS)}, and tsv: with names of columns")


def suffix(form: str) -> str:
    """Return how names of files in a format end."""
    name = form.partition(":")[0]
    return _SUFFIXES.get(name, f".{name}")


class Writer:
    """Texts of alignments that follow each other in a file, in a format that `check_format` knows.

    Args:
        form: The format.
        names: Ids that an A3M holds already, which the next alignments continue.
    """

    def __init__(self, form: str, names: Iterable[str] = ()):
        self.form = form
        self._names = set(names)
        self._columns = tables.columns_in(form.removeprefix(_TABLE)) if form.startswith(_TABLE) else []

    def begin(self, query: Record) -> str:
        """Return what stands before all alignments: names of columns, or x, the query, of an A3M."""
        if self.form == "a3m":
            self._names.add(query.id)
            return _fasta(query.id, query.description, query.residues)
        if self._columns:
            return tables.head(self.form.removeprefix(_TABLE))
        return "id\ti\tj\tx\ty\tconfidence\tprobability\n" if self.form == "tsv" else ""

    def text(self, aligned: Aligned) -> str:
        """Return an alignment."""
        if self._columns:
            return tables.row(aligned, self._columns)
        if self.form != "a3m":
            return FORMATS[self.form](aligned)
        name = told_apart(aligned.y.id, self._names)
        self._names.add(name)
        return a3m(aligned, name)
