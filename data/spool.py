"""Families of a build between the one reading of its input and the writing of the splits, one after the other."""

import dataclasses
import json
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.families import Family


class Piece(NamedTuple):
    """Place of a family in the file of a `Spool`."""

    offset: int
    size: int  # bytes


class Spool:
    """Packed families in a nameless file of a folder, which goes with the process, even if that is killed."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, family: Family) -> Piece:
        """Append a family: a line of JSON, and the bytes of its alignment."""
        facts = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
        line = json.dumps(facts | {"alignment": family.alignment.shape, "pairs": family.pairs.tolist()})
        packed = zlib.compress(line.encode() + b"\n" + family.alignment.tobytes(), 1)
        piece = Piece(self.file.seek(0, 2), len(packed))
        self.file.write(packed)
        return piece

    def read(self, piece: Piece) -> Family:
        """Return a family as it was added."""
        self.file.seek(piece.offset)
        line, _, symbols = zlib.decompress(self.file.read(piece.size)).partition(b"\n")
        facts = json.loads(line)
        alignment = np.frombuffer(symbols, np.uint8).reshape(facts["alignment"])
        pairs = np.array(facts["pairs"], np.int32).reshape(-1, 2)
        return Family(**facts | {"rows": tuple(facts["rows"]), "alignment": alignment, "pairs": pairs})
