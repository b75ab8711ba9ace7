"""A trained aligner for use: pairs of any lengths in, hard alignments with confidence out.

Pairs are padded to few lengths and aligned in batches, so that few programs are compiled. Nothing of the size of both
lengths' product is made: the plan is held by its band.
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

from models import compiled, decode, weights
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of

DECODERS = ("posterior", "plan")
MAX_CELLS = 16_000_000  # of a band that is widened by itself; decoding takes about 50 bytes a cell
MAX_LENGTH = 46_000  # what exact arithmetic of the band allows, ot_attention.support.MAX_BANDED_PRODUCT
_BATCH_RESIDUES = 32 * 192  # padded residues of x in a batch
_SMALLEST = 64  # padded length
_USUAL_LENGTH = 256  # residues; few pairs of training are longer
_LONG, _LONG_BAND = 1024, 256  # from where on a model that was trained without a band gets one, and which

Tokens = Int[np.ndarray, "_"]  # one sequence


class Alignment(NamedTuple):
    """A hard alignment of x with y."""

    pairs: Int32[np.ndarray, "aligned 2"]  # positions (i, j), from 0, both rising
    confidence: Float32[np.ndarray, " aligned"]  # of each pair: its posterior probability, or its share in the plan
    x_alone: Float32[np.ndarray, " x_length"]  # what x_i has with no residue of y: 1 minus its sum over all pairs
    y_alone: Float32[np.ndarray, " y_length"]


class Plans(NamedTuple):
    """Plans, or posteriors, held by windows: `values[n, i, c]` is P_ij for j = windows.first[n, i] + c."""

    values: Float[np.ndarray, "batch rows width"]
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
        model, (spec, blocks) = AlignerConfig(**config["model"]), specs_of(config)
        graph, like = nnx.split(nnx.eval_shape(lambda: Aligner(model, spec, encoder=blocks, rngs=nnx.Rngs(0))))
        return cls(graph, parameters(nnx.to_pure_dict(like)), spec.band)

    @classmethod
    def load(cls, path: Path) -> "Pretrained":
        """From a file of `models.weights.save`; raises ValueError or OSError as that module does."""
        config, _ = weights.read_config(path)
        return cls.from_config(config, functools.partial(weights.load, path))

    def compiled(self, path: Path) -> "Pretrained":
        """With the layers of a file of `models.compiled.save` compiled; raises as `models.compiled.load` does."""
        maps = compiled.load(path, self.params)
        return dataclasses.replace(self, graph=compiled.into(self.graph, self.params, maps))

    def band_for(self, x_length: int, y_length: int) -> int | None:
        """Half-width of the band: wide enough that the shorter sequence fits anywhere into the longer one.

        That of training, or four times as much and so on, up to `MAX_CELLS` cells; None, which is all, where it covers
        most. A model that was trained without a band has one where sequences are long.
        """
        padded = bucket(max(x_length, y_length))
        band = self.band or _LONG_BAND
        needed = abs(x_length - y_length) + band // 2
        while band < needed and x_length * min(8 * band + 1, y_length) <= MAX_CELLS:
            band *= 4  # each width is a program of its own
        if 2 * band >= padded or (self.band is None and padded <= _LONG):
            return None
        if band < needed:
            warnings.warn(
                f"lengths {x_length} and {y_length} differ by more than the band of {band} residues reaches; --band=N "
                "widens it, for more memory",
                stacklevel=2,
            )
        return band

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
                thick = plan.values * self._thinning(plan, x_lengths, y_lengths)[:, None, None]
                values = decode.posterior_in_windows(thick, plan.windows, x_lengths, y_lengths, gaps)
                plan = Plans(values, plan.windows)
            for n, alignment in zip(members, _decoded(plan, x_lengths, y_lengths), strict=False):
                found[n] = alignment
            done(len(members))
        return [alignment for alignment in found if alignment is not None]

    def plan(self, x: Tokens, y: Tokens, *, band: int | None = None) -> Plans:
        """The plan of one pair; raises as `align` does."""
        (_, plan, _), *_ = self._plans([(x, y)], band)
        return plan

    def _thinning(
        self, plan: Plans, x_lengths: Int[np.ndarray, " batch"], y_lengths: Int[np.ndarray, " batch"]
    ) -> Float[np.ndarray, " batch"]:
        """How much thinner plans are spread than those of training, which the gap model knows; 1 for usual pairs.

        Let a row's `exp(S)` sum to K, and its plan to m over residues. Where all n rows and columns are alike, a full
        dustbin of score s balances at `r = (1 - m) / m = e^s sqrt(n / K)`, and a cell of the plan is `exp(S) m / K`. It
        shrinks with K, which grows with the band, and with n. Both are undone, r being known from the plan's sums.
        """
        if self.band is None:
            return np.ones(len(x_lengths))
        x_lengths, y_lengths = np.maximum(x_lengths, 1), np.maximum(y_lengths, 1)
        columns = np.maximum(1, np.minimum(plan.windows.width, y_lengths) / (2 * self.band + 1))
        rows = np.maximum(1, x_lengths / _USUAL_LENGTH)
        mass = plan.values.sum(axis=(1, 2), dtype=np.float64)
        x_share, y_share = (np.clip(mass / n, 1e-6, 1) for n in (x_lengths, y_lengths))
        r = np.sqrt((1 - x_share) * (1 - y_share)) / x_share
        return columns * (1 + r) / (1 + r * np.sqrt(columns / rows))

    def _plans(
        self, pairs: Sequence[tuple[Tokens, Tokens]], band: int | None
    ) -> Iterator[tuple[list[int], Plans, decode.Gaps]]:
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
            return model.banded_plan(x, y, x_length, y_length), gaps

        return predict


def bucket(length: int) -> int:
    """The padded length: 64, 96, 128, 192, 256, 384, and so on."""
    power = max(_SMALLEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _SMALLEST and length <= power * 3 // 4 else power


def _batches(shapes: Sequence[_Shape]) -> Iterator[tuple[_Shape, list[int]]]:
    """Places of pairs that are computed together.

    Compiling a program takes as long as aligning hundreds of pairs: few pairs of a shape are padded to a larger one
    that is needed anyway, and where they are the only ones they go one by one, as a single pair does.
    """
    groups: dict[_Shape, list[int]] = {}
    for n, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(n)
    waiting = sorted(groups, key=lambda shape: (shape.rows, shape.columns))
    while waiting:
        shape, members = (first := waiting.pop(0)), groups[first]
        larger = next((other for other in waiting if _holds(other, shape)), None)
        if larger and len(members) < 2 * shape.batch:
            groups[larger] += members
            continue
        step = shape.batch if len(members) > max(1, shape.batch // 8) else 1
        for start in range(0, len(members), step):
            yield shape._replace(batch=step), members[start : start + step]


def _holds(larger: _Shape, shape: _Shape) -> bool:
    """Whether pairs of `shape` can be padded to `larger` at little cost; the band stays, for results depend on it."""
    sizes = (larger.rows, shape.rows), (larger.columns, shape.columns)
    return larger.band == shape.band and all(small <= large <= 4 * small for large, small in sizes)


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


def _held(members: list[int], padded, predicted) -> tuple[list[int], Plans, decode.Gaps]:
    """On the host, cut to the longest of the batch."""
    ((values, first), gaps), (*_, x_lengths, y_lengths) = jax.device_get(predicted), padded
    rows, columns = x_lengths.max(), y_lengths.max()
    # Padding has no windows: those of the last residue go on, so that they never turn back.
    first, values = np.maximum.accumulate(first[:, :rows], axis=1), values[:, :rows, :columns]
    gaps = decode.Gaps() if gaps is None else decode.Gaps(*gaps.tolist())
    return members, Plans(values, decode.Windows(first, values.shape[2], int(columns))), gaps


def _decoded(
    plan: Plans, x_lengths: Int[np.ndarray, " batch"], y_lengths: Int[np.ndarray, " batch"]
) -> Iterator[Alignment]:
    match, confidence = decode.mea_in_windows(plan.values, plan.windows)
    x_mass = plan.values.sum(axis=2)
    for n, (x_length, y_length) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist(), strict=True)):
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


def dense_maximum(plan: Plans, longest: int) -> tuple[Float32[np.ndarray, "rows columns"], int]:
    """One plan as a picture with at most `longest` rows and columns, and how many residues a pixel is wide.

    A pixel shows the largest value of its residues: alignments are thin lines that means would wash out.
    """
    values, first, columns = plan.values[0], plan.windows.first[0], plan.windows.columns
    scale = -(-max(len(values), columns) // longest)
    picture = np.zeros((-(-len(values) // scale), -(-columns // scale)), np.float32)
    row, place = np.nonzero(values)
    np.maximum.at(picture, (row // scale, (first[row] + place) // scale), values[row, place])
    return picture, scale
