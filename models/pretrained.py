"""A trained aligner for use: pairs of any lengths in, hard alignments with confidence out.

Pairs are padded to few lengths and aligned in batches, so that few programs are compiled. Nothing of the size of both
lengths' product is made: the plan is held by its band, from the potentials.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Float64, Int, Int32, PyTree

from models import decode, weights
from models.aligner import Aligner, AlignerConfig
from models.attention import Potentials, SinkhornSpec

DECODERS = ("posterior", "plan")
MAX_CELLS = 16_000_000  # of a band that is widened by itself; decoding takes about 50 bytes a cell
MAX_LENGTH = 46_000  # what exact arithmetic of the band allows, ot_attention.support.MAX_BANDED_PRODUCT
_BATCH_RESIDUES = 32 * 192  # padded residues of x in a batch
_SMALLEST = 64
_ROWS = 64  # of a plan made at a time

Tokens = Int[np.ndarray, " length"]


class Alignment(NamedTuple):
    """A hard alignment of x with y."""

    pairs: Int32[np.ndarray, "aligned 2"]  # positions (i, j), from 0, both rising
    confidence: Float32[np.ndarray, " aligned"]  # of each pair: its posterior probability, or its share in the plan
    x_alone: Float32[np.ndarray, " x_length"]  # what x_i has with no residue of y: 1 minus its sum over all pairs
    y_alone: Float32[np.ndarray, " y_length"]


class BandedPlan(NamedTuple):
    """Plans held by windows: `values[n, i, c]` is P_ij for j = windows.first[n, i] + c."""

    values: Float32[np.ndarray, "batch rows width"]
    windows: decode.Windows


class _Shape(NamedTuple):
    """What a program is compiled for."""

    batch: int
    rows: int
    columns: int
    band: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters and the structure that they fit. Hashable by identity."""

    graph: nnx.GraphDef
    params: PyTree
    band: int | None  # that of training

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: Callable[[PyTree], PyTree]) -> "Pretrained":
        """`config`: that of the run; `parameters` makes them for a tree of their shapes."""
        model, spec = AlignerConfig(**config["model"]), dict(config["attention"])
        if spec["band"] == -1:  # a flag cannot say None
            spec["band"] = None
        graph, like = nnx.split(nnx.eval_shape(lambda: Aligner(model, SinkhornSpec(**spec), rngs=nnx.Rngs(0))))
        return cls(graph, parameters(nnx.to_pure_dict(like)), spec["band"])

    @classmethod
    def load(cls, path: Path) -> "Pretrained":
        """From a file of `models.weights.save`; raises ValueError or OSError as that module does."""
        config, _ = weights.read_config(path)
        return cls.from_config(config, functools.partial(weights.load, path))

    def band_for(self, x_length: int, y_length: int) -> int | None:
        """Half-width of the band: wide enough that the shorter sequence fits anywhere into the longer one.

        Doubled from that of training, up to `MAX_CELLS` cells; None where that is all.
        """
        band = self.band
        if band is None:
            return None
        band = max(band, 1)
        needed = abs(x_length - y_length) + band // 2
        while band < needed and x_length * min(4 * band + 1, y_length) <= MAX_CELLS:
            band *= 2
        if band < needed:
            warnings.warn(
                f"lengths {x_length} and {y_length} differ by more than the band of {band} residues reaches; --band=N "
                "widens it, for more memory",
                stacklevel=2,
            )
        return None if band >= max(x_length, y_length) else band

    def align(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        *,
        decoder: str = "posterior",
        band: int | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Alignment]:
        """The alignments of pairs of token sequences, in their order.

        decoder: "posterior" aligns by maximum expected accuracy of the pair HMM that the plan weighs, "plan" by that of
          the plan itself (models/decode.py). band: in place of `band_for`, -1 for all. done: told how many are.

        Raises:
          ValueError: an empty sequence, one longer than `MAX_LENGTH`, an unknown decoder.
        """
        if decoder not in DECODERS:
            raise ValueError(f"decoder: {decoder!r} was given, allowed are {', '.join(DECODERS)}")
        found: list[Alignment | None] = [None] * len(pairs)
        for members, plan, gaps in self._plans(pairs, band):
            x_lengths, y_lengths = _lengths([pairs[n] for n in members], len(plan.values))
            if decoder == "posterior":
                values = decode.posterior_in_windows(plan.values, plan.windows, x_lengths, y_lengths, gaps)
                plan = BandedPlan(values, plan.windows)
            for n, alignment in zip(members, _decoded(plan, x_lengths, y_lengths), strict=False):
                found[n] = alignment
            done(len(members))
        return [alignment for alignment in found if alignment is not None]

    def plan(self, x: Tokens, y: Tokens, *, band: int | None = None) -> BandedPlan:
        """The plan of one pair; raises as `align` does."""
        (_, plan, _), *_ = self._plans([(x, y)], band)
        return plan

    def _plans(
        self, pairs: Sequence[tuple[Tokens, Tokens]], band: int | None
    ) -> Iterator[tuple[list[int], BandedPlan, decode.Gaps]]:
        """Which pairs, their plans and gap model, batch by batch; the next batch is computed while one is used."""
        waiting = None
        for shape, members in _batches([self._shape(x, y, band) for x, y in pairs]):
            padded = _padded([pairs[n] for n in members], shape)
            following = members, padded, self._predict(shape.band)(self.params, *padded)
            if waiting:
                yield _held(*waiting)
            waiting = following
        if waiting:
            yield _held(*waiting)

    def _shape(self, x: Tokens, y: Tokens, band: int | None) -> _Shape:
        for name, tokens in (("x", x), ("y", y)):
            if not 1 <= len(tokens) <= MAX_LENGTH:
                raise ValueError(f"{name}: {len(tokens)} residues were given, allowed are 1 to {MAX_LENGTH}")
        half_width = self.band_for(len(x), len(y)) if band is None else None if band == -1 else band
        rows, columns = bucket(len(x)), bucket(len(y))
        if max(rows, columns) < 4 * min(rows, columns):  # padded alike unless that wastes much: fewer programs
            rows = columns = max(rows, columns)
        return _Shape(max(1, _BATCH_RESIDUES // max(rows, columns)), rows, columns, half_width)

    @functools.cache  # noqa: B019
    def _predict(self, band: int | None) -> Callable:
        @jax.jit
        def predict(params, x, y, x_length, y_length):
            model = nnx.merge(self.graph, params)
            model.spec = dataclasses.replace(model.spec, band=band)  # of the plan; self-attention keeps its own
            gaps = model.gaps() if model.config.gap_model else None
            return model.potentials(x, y, x_length, y_length), gaps

        return predict


def bucket(length: int) -> int:
    """The padded length: 64, 96, 128, 192, 256, 384, and so on."""
    power = max(_SMALLEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _SMALLEST and length <= power * 3 // 4 else power


def _batches(shapes: Sequence[_Shape]) -> Iterator[tuple[_Shape, list[int]]]:
    """Places of pairs of one shape, full batches of them; few that are left go one by one, as a single pair does."""
    groups: dict[_Shape, list[int]] = {}
    for n, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(n)
    for shape, members in groups.items():
        for start in range(0, len(members), shape.batch):
            part = members[start : start + shape.batch]
            if 4 * len(part) > shape.batch:
                yield shape, part
            else:
                yield from ((shape._replace(batch=1), [n]) for n in part)


def _lengths(pairs: Sequence[tuple[Tokens, Tokens]], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of x and of y, 0 where the batch holds no pair."""
    lengths = np.zeros((2, batch), np.int32)
    lengths[:, : len(pairs)] = np.array([(len(x), len(y)) for x, y in pairs]).T
    return lengths[0], lengths[1]


def _padded(pairs: Sequence[tuple[Tokens, Tokens]], shape: _Shape) -> tuple[np.ndarray, ...]:
    x, y = (np.zeros((shape.batch, length), np.int32) for length in (shape.rows, shape.columns))
    for n, (x_tokens, y_tokens) in enumerate(pairs):
        x[n, : len(x_tokens)], y[n, : len(y_tokens)] = x_tokens, y_tokens
    return x, y, *_lengths(pairs, shape.batch)


def _held(members: list[int], padded, predicted) -> tuple[list[int], BandedPlan, decode.Gaps]:
    (potentials, gaps), (*_, x_lengths, y_lengths) = jax.device_get(predicted), padded
    gaps = decode.Gaps() if gaps is None else decode.Gaps(*gaps.tolist())
    return members, banded_plan(potentials, x_lengths, y_lengths), gaps


def banded_plan(potentials: Potentials, x_lengths: np.ndarray, y_lengths: np.ndarray) -> BandedPlan:
    """The plans that NumPy potentials describe, some rows at a time; as long as the longest of each side."""
    rows, columns = max(1, x_lengths.max()), max(1, y_lengths.max())
    first, last = potentials.first[:, :rows], potentials.last[:, :rows]
    width = max(1, int((last - first).max()) + 1)
    values = np.zeros((len(first), rows, width), np.float32)
    for n, x_length in enumerate(x_lengths):
        for start in range(0, x_length, _ROWS):
            here = slice(start, min(start + _ROWS, x_length))
            values[n, here] = _windows_of(Potentials(*(x[n] for x in potentials)), here, width)
    # Padding has no windows: those of the last residue go on, so that they never turn back.
    return BandedPlan(values, decode.Windows(np.maximum.accumulate(first, axis=1), width, columns))


def _windows_of(pair: Potentials, here: slice, width: int) -> Float32[np.ndarray, "rows width"]:
    first, last, f = (np.asarray(x[here])[:, None] for x in (pair.first, pair.last, pair.f))
    start, end = int(first[0, 0]), max(int(last[-1, 0]), int(first[0, 0])) + 1
    scores = np.asarray(pair.q[here] @ pair.k[start:end].T + pair.g[start:end])
    place = first + np.arange(width)
    inside = place <= last
    log_plan = np.take_along_axis(scores, np.where(inside, place - start, 0), axis=1) + f
    return np.where(inside, np.exp(np.where(inside, log_plan, 0)), 0)


def _decoded(
    plan: BandedPlan, x_lengths: Int[np.ndarray, " batch"], y_lengths: Int[np.ndarray, " batch"]
) -> Iterator[Alignment]:
    match, confidence = decode.mea_in_windows(plan.values, plan.windows)
    x_mass = plan.values.sum(axis=2)
    for n, (x_length, y_length) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        aligned = np.flatnonzero(match[n] != decode.NO_MATCH)
        pairs = np.stack([aligned, match[n, aligned]], axis=1).astype(np.int32)
        y_mass = _column_sums(plan.values[n, :x_length], plan.windows.first[n, :x_length], y_length)
        alone = (np.clip(1 - mass, 0, 1).astype(np.float32) for mass in (x_mass[n, :x_length], y_mass))
        yield Alignment(pairs, confidence[n, aligned], *alone)


def _column_sums(
    values: Float[np.ndarray, "rows width"], first: Int[np.ndarray, " rows"], columns: int
) -> Float64[np.ndarray, " columns"]:
    place = first[:, None] + np.arange(values.shape[1])
    return np.bincount(place.ravel(), weights=values.ravel(), minlength=columns)[:columns]


def dense_maximum(plan: BandedPlan, longest: int) -> tuple[Float32[np.ndarray, "rows columns"], int]:
    """One plan as a picture with at most `longest` rows and columns, and how many residues a pixel is wide.

    A pixel shows the largest value of its residues: alignments are thin lines that means would wash out.
    """
    values, first, columns = plan.values[0], plan.windows.first[0], plan.windows.columns
    scale = -(-max(len(values), columns) // longest)
    picture = np.zeros((-(-len(values) // scale), -(-columns // scale)), np.float32)
    row, place = np.nonzero(values)
    np.maximum.at(picture, (row // scale, (first[row] + place) // scale), values[row, place])
    return picture, scale
