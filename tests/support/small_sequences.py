"""Small sets of sequences, and data sets built of them."""

import contextlib
import io
from pathlib import Path

import numpy as np

from data.vocab import RESIDUES
from scripts import build_sequences


def random_sequences(count: int, shortest: int = 30, longest: int = 150, seed: int = 0) -> dict[str, str]:
    """Sequences by name, of random lengths and residues."""
    rng = np.random.default_rng(seed)
    letters = np.array(list(RESIDUES))
    lengths = rng.integers(shortest, longest + 1, count)
    return {f"s{n}": "".join(rng.choice(letters, length)) for n, length in enumerate(lengths)}


def as_fasta(sequences: dict[str, str]) -> str:
    return "".join(f">{name} of a test\n{sequence}\n" for name, sequence in sequences.items())


def build(sequences: dict[str, str], folder: Path, *options: str) -> Path:
    """Build a data set, whose folder is returned."""
    (folder / "in.fasta").write_text(as_fasta(sequences))
    command = ["--input", str(folder / "in.fasta"), "--out", str(folder / "out"), *options]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        status = build_sequences.main(command)
    assert status == 0, told.getvalue()
    return folder / "out"
