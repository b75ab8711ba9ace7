"""Records of a build between the one reading of its input and the writing of the splits, one after the other."""

import pickle
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Place of a record in the file of a `Spool`."""

    offset: int
    size: int  # bytes


class Spool:
    """Packed records in a nameless file of a folder, which goes with the process, even if that is killed."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, record: Any) -> Piece:
        packed = zlib.compress(pickle.dumps(record, pickle.HIGHEST_PROTOCOL), 1)
        piece = Piece(self.file.seek(0, 2), len(packed))
        self.file.write(packed)
        return piece

    def read(self, piece: Piece) -> Any:
        self.file.seek(piece.offset)
        return pickle.loads(zlib.decompress(self.file.read(piece.size)))
