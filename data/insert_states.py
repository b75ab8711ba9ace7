"""Insert states of alignments made by a profile HMM: which families have them, and what their columns may hold.

In such an alignment, Pfam-A.full for example, upper case and '-' are of match states. Lower case and '.' are of insert
states: residues between two match columns, which share columns without being aligned with each other. The gaps '~' and
'_' are of neither.
"""

import string
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data.stockholm import Alignment

Symbols = UInt8[np.ndarray, "rows columns"]  # ASCII

_NAMES = {"Pfam-A.full": True, "Pfam-A.seed": False}  # beginnings of the names of a release's files
_MATCH, _INSERT = 1, 2  # states, of each symbol in _STATES
_STATES = np.zeros(256, np.uint8)
_STATES[list(string.ascii_uppercase.encode() + b"-")] = _MATCH
_STATES[list(string.ascii_lowercase.encode() + b".")] = _INSERT
_OPTIONS = "--insert-states (insert_states=True) or --no-insert-states (insert_states=False)"


def told_by_name(path: str) -> bool | None:
    """Say whether a file has insert states: a Pfam release's full alignments do, its seeds do not; None for others."""
    return next((told for name, told in _NAMES.items() if Path(path).name.startswith(name)), None)


class Decision:
    """Decides of each family of one file whether it has insert states; `told` holds for all, if it is not None.

    Else the annotation #=GC RF decides, in which an HMM's program marks the match columns. Families of upper case alone
    are the same with and without insert states, so their annotation is left out: curators of seeds give some of them.
    """

    def __init__(self, path: str, told: bool | None):
        self.path, self.told = path, told
        self.first: dict[bool, str] = {}  # name of the first family with and without the annotation

    def __call__(self, alignment: Alignment) -> bool:
        """Raise ValueError if the annotation of this family and that of an earlier one say different things."""
        if self.told is not None or not _has_lower_case(alignment.rows):
            return bool(self.told)
        marked = "RF" in alignment.gc
        self.first.setdefault(marked, alignment.name)
        if len(self.first) == 2:
            raise ValueError(
                f"{self.path}: family {self.first[True]} has '#=GC RF', as alignments by a profile HMM have, and "
                f"family {self.first[False]} has none; both have lower case, which is aligned in the latter alone: "
                f"divide the file, or give {_OPTIONS} for all of it"
            )
        return marked


def check_columns(symbols: Symbols) -> None:
    """Raise ValueError, with the first such column, if match states and insert states share one."""
    mixed = np.flatnonzero(_states_of_columns(symbols) == _MATCH | _INSERT)
    if not mixed.size:
        return
    column = symbols[:, mixed[0]]
    of_match, of_insert = (chr(column[_STATES[column] == state][0]) for state in (_MATCH, _INSERT))
    raise ValueError(
        f"column {mixed[0] + 1} holds {of_match!r} of a match state and {of_insert!r} of an insert state: with insert "
        "states a column has either upper case and '-', or lower case and '.'; correct the family, or give "
        "--no-insert-states (insert_states=False) if lower case is as aligned as upper case"
    )


def seem_present(symbols: Symbols) -> bool:
    """Say whether an HMM seems to have made an alignment: columns of either kind, none of both, and lower case."""
    if not _has_lower_case(symbols):
        return False
    states = _states_of_columns(symbols)
    return bool((states == _MATCH).any() and (states != _MATCH | _INSERT).all())


def _states_of_columns(symbols: Symbols) -> UInt8[np.ndarray, " columns"]:
    """Return the states of each column: _MATCH, _INSERT, both or none."""
    return np.bitwise_or.reduce(_STATES[symbols], axis=0)


def _has_lower_case(symbols: Symbols) -> bool:
    return bool(((symbols >= ord("a")) & (symbols <= ord("z"))).any())
