"""Group pairs of sequences into padded batches of few shapes: each shape is a program that must be compiled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

_BATCH_RESIDUES = 32 * 192  # padded residues of x in a batch on a CPU
_BATCH_RESIDUES_OF_ACCELERATOR = 1024 * 192
_ENCODED_RESIDUES = 8 * 256  # residues that are encoded at once on a CPU; few, as a single pair takes as long
_BATCH_CELLS = 1 << 27  # plan entries in a batch on an accelerator; decoding takes about 30 bytes for each
_SMALLEST = 64  # padded length
# What aligners take on a CPU, by XLA's analysis of memory: for a cell of all pairs of residues, for a cell of a band,
# for a residue that is encoded.
_BYTES_OF_CELL, _BYTES_OF_BAND, _BYTES_OF_RESIDUE = 21, 38, 5200

Tokens = Int[np.ndarray, "_"]  # one sequence
PairOfTokens = tuple[Tokens, Tokens]
Arrays = Mapping[str, np.ndarray]  # of a sequence: `tokens`, and others with an entry for each residue


class Shape(NamedTuple):
    """Padded sizes that a program is compiled for."""

    batch: int
    rows: int
    columns: int
    band: int | None


def shape_of(x_length: int, y_length: int, band: int | None) -> Shape:
    """Return the shape of the batches in which pairs of these lengths are computed."""
    rows, columns = bucket(x_length), bucket(y_length)
    if max(rows, columns) < 4 * min(rows, columns):  # padded alike unless that wastes much: fewer programs
        rows = columns = max(rows, columns)
    return Shape(batch_size(rows, columns, band), rows, columns, band)


def bucket(length: int) -> int:
    """Return the padded length: 64, 96, 128, 192, 256, 384, and so on."""
    power = max(_SMALLEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _SMALLEST and length <= power * 3 // 4 else power


def batch_size(rows: int, columns: int, band: int | None) -> int:
    """Return the number of pairs that are computed at once."""
    if jax.default_backend() == "cpu":
        return max(1, _BATCH_RESIDUES // max(rows, columns))
    cells = _cells(rows, columns, band)
    return max(1, min(_BATCH_RESIDUES_OF_ACCELERATOR // max(rows, columns), _BATCH_CELLS // cells))


def memory(shape: Shape, pairs: int, *, plan: bool) -> int:
    """Return about how many bytes the batches of this many pairs take on a CPU; by a plan, or by the pair HMM."""
    lanes = shape.rows if plan or shape.band is None else min(shape.rows, shape.band)
    each = _BYTES_OF_CELL if shape.band is None else _BYTES_OF_BAND
    decoding = each * (shape.rows + shape.columns) * lanes
    encoding = _BYTES_OF_RESIDUE * (shape.rows + shape.columns)
    return _size(shape, pairs) * max(decoding, encoding)  # one after the other, in the same memory


def _size(shape: Shape, pairs: int) -> int:
    """Return the number of pairs in each batch of this many pairs."""
    return shape.batch if pairs > max(1, shape.batch // 8) else 1


def _cells(rows: int, columns: int, band: int | None) -> int:
    """Return the number of plan entries that are held."""
    return rows * (columns if band is None else min(2 * band + 1, columns))


def batches(shapes: Sequence[Shape], multiple: int = 1) -> Iterator[tuple[Shape, list[int]]]:
    """Yield the shape of each batch and the places in `shapes` of its pairs.

    Compiling a program takes as long as aligning hundreds of pairs. Few pairs of a shape are therefore padded to a
    larger shape that is needed anyway. If there is none, they are computed one by one, as a single pair is. Batch sizes
    are rounded up to a multiple of `multiple`, the number of devices that share a batch.
    """
    groups: dict[Shape, list[int]] = {}
    for n, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(n)
    waiting = sorted(groups, key=lambda shape: (shape.rows, shape.columns))
    while waiting:
        shape = waiting.pop(0)
        members = groups[shape]
        # Results depend on the band, which must be equal; those that wait have no fewer rows.
        alike = (other for other in waiting if other.band == shape.band and other.columns >= shape.columns)
        larger = next((of for of in alike if of.rows <= 4 * shape.rows and of.columns <= 4 * shape.columns), None)
        if larger and len(members) < 2 * shape.batch:
            groups[larger] += members
            continue
        size = -(-_size(shape, len(members)) // multiple) * multiple
        for start in range(0, len(members), size):
            yield shape._replace(batch=size), members[start : start + size]


def encoded_at_once(length: int, multiple: int = 1) -> int:
    """Return the number of sequences of a padded length that are encoded at once, a multiple of `multiple`."""
    residues = _ENCODED_RESIDUES if jax.default_backend() == "cpu" else _BATCH_RESIDUES_OF_ACCELERATOR
    return -(-max(1, residues // length) // multiple) * multiple


def padded(x: Sequence[Arrays], y: Sequence[Arrays], shape: Shape) -> dict[str, np.ndarray]:
    """Return tokens, further arrays and lengths of a batch, 0 beyond the sequences and where the batch has no pair."""
    return padded_side("x", x, shape.batch, shape.rows) | padded_side("y", y, shape.batch, shape.columns)


def padded_side(side: str, sequences: Sequence[Arrays], batch: int, length: int) -> dict[str, np.ndarray]:
    """Return the arrays of one side of a batch, as `padded` does: tokens as `x`, others as `x_vectors` and so on."""
    found = {f"{side}_length": np.zeros(batch, np.int32)}
    for name, array in sequences[0].items():
        found[side if name == "tokens" else f"{side}_{name}"] = np.zeros((batch, length, *array.shape[1:]), array.dtype)
    for n, arrays in enumerate(sequences):
        found[f"{side}_length"][n] = len(arrays["tokens"])
        for name, array in arrays.items():
            found[side if name == "tokens" else f"{side}_{name}"][n, : len(array)] = array
    return found
