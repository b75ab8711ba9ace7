"""Several data sets with weights as one: `data.dir` of a run, such as "runs/pfam:1,runs/hmm:0.5,runs/scop40:0.5"."""

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import SupportsIndex

from data import pfam
from data.builds import NoSplitError
from data.families import Family
from data.index import Families
from data.settings import Number

_WEIGHT = Number()


class Mixture:
    """Families of one split of several data sets, one behind the other; picklable. A data set has a weight above 0."""

    def __init__(self, parts: Sequence[Families], weights: Sequence[float], names: Sequence[str]):
        self.parts, self.weights, self.names = list(parts), list(weights), list(names)
        self._sizes = [len(part) for part in self.parts]

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, index: SupportsIndex) -> Family:
        place = operator.index(index)
        for part, size in zip(self.parts, self._sizes, strict=True):
            if 0 <= place < size:
                return part[place]
            place -= size
        raise IndexError(f"index {index}: the mixture has {len(self)} families")


def entries(data_dir: str) -> list[tuple[str, float]]:
    """Return folder and weight of each data set that `data.dir` names; a folder without a weight has 1.

    Raises ValueError for an empty entry, a folder that is named twice, a weight below 0, and weights that are all 0.
    """
    if Path(data_dir).is_dir():  # whatever its name holds
        return [(data_dir, 1.0)]
    found = [_entry(text.strip(), data_dir) for text in data_dir.split(",")]
    folders = [folder for folder, _ in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), ""):
        raise ValueError(f"data.dir={data_dir!r}: {twice} is named twice; add up its weights")
    if not any(weight for _, weight in found):
        raise ValueError(f"data.dir={data_dir!r}: all weights are 0; give a data set to draw from a weight above 0")
    return found


def open_split(data_dir: str, split: str, place: Callable[[str], Path] = Path) -> Mixture:
    """Open a split of all data sets with a weight above 0; `place` finds the folder that a name stands for.

    Every data set must have the split `train`, and at least one any other split. Raises ValueError and
    FileNotFoundError as `entries` and `pfam.open_split` do.
    """
    chosen = [(folder, weight) for folder, weight in entries(data_dir) if weight]
    found, errors = [], []
    for folder, weight in chosen:
        try:
            found.append((pfam.open_split(place(folder), split), weight, folder))
        except NoSplitError as error:
            errors.append(error)
    if errors and (split == "train" or not found):
        raise errors[0]
    return Mixture(*map(list, zip(*found, strict=True)))


def _entry(text: str, data_dir: str) -> tuple[str, float]:
    """Read FOLDER or FOLDER:WEIGHT."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        folder, weight = text, "1"
    try:
        if not folder.strip():
            raise ValueError
        return folder, _WEIGHT.read(float(weight))
    except ValueError as error:
        raise ValueError(
            f"data.dir={data_dir!r}: {text!r} was given, allowed is FOLDER or FOLDER:WEIGHT with {_WEIGHT}, "
            "several with commas between them"
        ) from error
