"""Fuzzing led by coverage, beside tests/test_hostile.py. Needs atheris, which has no wheel for every Python.

python -m tests.support.fuzz stockholm|fasta|pairs|clans FOLDER -max_total_time=60  # keeps inputs
"""

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["data.stockholm", "alignment.sequences", "data.families"]):
    from alignment import sequences
    from data import families, stockholm

from tests.support.stockholm_text import written

READERS = {
    "fasta": sequences.read_fasta,
    "pairs": lambda path: list(sequences.read_pairs(path)),
    "clans": families.read_clans,
}


def reads_stockholm(data: bytes) -> None:
    """Check that an alignment that is read can be written, and read again the same."""
    for found in stockholm.read(io.BytesIO(data), max_row_bytes=4000, max_family_bytes=20000, on_bad=lambda _: None):
        (same,) = stockholm.read(io.BytesIO(written(found)))
        assert same.ids == found.ids and (same.rows == found.rows).all()


def reads(kind: str, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with contextlib.suppress(ValueError, OSError):
        READERS[kind](str(path))


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        atheris.Setup(sys.argv, reads_stockholm if kind == "stockholm" else lambda data: reads(kind, path, data))
        atheris.Fuzz()
