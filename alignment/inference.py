"""A trained aligner for use: pairs of any lengths in, hard alignments with confidence out.

Pairs are padded to few lengths and aligned in batches, so that few programs are compiled. Nothing of the size of both
lengths' product is made: the plan is held by its band.
"""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, PyTree

from alignment import asap_maps, decoding, weights
from models import pair_hmm
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of

DECODERS = ("posterior", "plan")
MAX_CELLS = 16_000_000  # of a band that is widened by itself; decoding takes about 50 bytes a cell
MAX_LENGTH = 46_000  # what exact arithmetic of the band allows, ot_attention.support.MAX_BANDED_PRODUCT
_BATCH_RESIDUES = 32 * 192  # padded residues of x in a batch on a CPU
_BATCH_RESIDUES_OF_ACCELERATOR = 1024 * 192
_CHUNK_BATCHES, _SMALLEST_CHUNK = 16, 2048  # batches, and pairs, of a chunk of `chunk_size`
_BATCH_CELLS = 1 << 27  # of the plans of a batch on an accelerator; decoding takes some 30 bytes a cell
_AHEAD, _AHEAD_OF_ACCELERATOR = 1, 16  # batches that are computed before the results of one are fetched
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


_NOTHING = Alignment(np.zeros((0, 2), np.int32), *[np.zeros(0, np.float32)] * 3)


class Plan(NamedTuple):
    """A plan held by windows: `values[i, c]` is P_ij for j = first[i] + c."""

    values: Float[np.ndarray, "rows width"]
    first: Int[np.ndarray, " rows"]
    columns: int


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
        maps = asap_maps.load(path, self.params)
        return dataclasses.replace(self, graph=asap_maps.into(self.graph, self.params, maps))

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

    def chunk_size(self) -> int:
        """Number of pairs of usual lengths that are best sorted by length and aligned together."""
        return max(_SMALLEST_CHUNK, _CHUNK_BATCHES * _batch_size(_USUAL_LENGTH, _USUAL_LENGTH, self.band))

    def align(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        *,
        decoder: str = "posterior",
        band: int | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Alignment]:
        """Align pairs of token sequences; the alignments are in their order.

        decoder: "posterior" aligns by maximum expected accuracy of the pair HMM that the plan weighs, "plan" by that of
          the plan itself (models/decode.py). band: in place of `band_for`, -1 for all. done: told how many are.

        Raises:
          ValueError: an empty sequence, one longer than `MAX_LENGTH`, an unknown decoder.
        """
        return next(self.align_chunks([pairs], decoder=decoder, band=band, done=done), [])

    def align_chunks(
        self,
        chunks: Iterable[Sequence[tuple[Tokens, Tokens]]],
        *,
        decoder: str = "posterior",
        band: int | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> Iterator[list[Alignment]]:
        """Yield the alignments of each chunk of pairs, as `align` does, while the device works on the next ones."""
        if decoder not in DECODERS:
            raise ValueError(f"decoder: {decoder!r} was given, allowed are {', '.join(DECODERS)}")
        ahead = _AHEAD if jax.default_backend() == "cpu" else _AHEAD_OF_ACCELERATOR
        for batch in _ahead(self._dispatched(chunks, decoder, band), ahead):
            for member, alignment in zip(batch.members, _alignments(batch), strict=True):
                batch.found[member] = alignment
            done(len(batch.members))
            if batch.last:
                yield batch.found

    def _dispatched(
        self, chunks: Iterable[Sequence[tuple[Tokens, Tokens]]], decoder: str, band: int | None
    ) -> Iterator["_Batch"]:
        for pairs in chunks:
            found: list[Alignment] = [_NOTHING] * len(pairs)
            left = len(pairs)
            for shape, members in _batches([self._shape(x, y, band) for x, y in pairs]):
                padded = _padded([pairs[n] for n in members], shape)
                left -= len(members)
                decoded = self._predict(shape.band, decoder)(self.params, *padded)
                yield _Batch(found, members, padded[2], padded[3], decoded, last=not left)

    def plan(self, x: Tokens, y: Tokens, *, band: int | None = None) -> Plan:
        """Return the plan of one pair; raises as `align` does."""
        shape = self._shape(x, y, band)._replace(batch=1)
        values, first = jax.device_get(self._predict(shape.band, None)(self.params, *_padded([(x, y)], shape)))
        return Plan(values[0, : len(x), : len(y)], first[0, : len(x)], len(y))

    def _shape(self, x: Tokens, y: Tokens, band: int | None) -> _Shape:
        for name, tokens in (("x", x), ("y", y)):
            if not 1 <= len(tokens) <= MAX_LENGTH:
                raise ValueError(f"{name}: {len(tokens)} residues were given, allowed are 1 to {MAX_LENGTH}")
        half_width = self.band_for(len(x), len(y)) if band is None else None if band == -1 else band
        rows, columns = bucket(len(x)), bucket(len(y))
        if max(rows, columns) < 4 * min(rows, columns):  # padded alike unless that wastes much: fewer programs
            rows = columns = max(rows, columns)
        return _Shape(_batch_size(rows, columns, half_width), rows, columns, half_width)

    @functools.cache  # noqa: B019
    def _predict(self, band: int | None, decoder: str | None) -> Callable:
        """Make the program that computes a batch's alignments, or its plans if `decoder` is None."""

        @jax.jit
        def predict(params, x, y, x_lengths, y_lengths):
            model = nnx.merge(self.graph, params)
            model.spec = dataclasses.replace(model.spec, band=band)  # of the plan; self-attention keeps its own
            plans, first = model.banded_plan(x, y, x_lengths, y_lengths)
            # Padding has no windows: those of the last residue go on, so that they never turn back.
            first = pair_hmm.rising(first, y_lengths)
            if decoder is None:
                return plans, first
            lengths, columns = (x_lengths, y_lengths), y.shape[1]
            if decoder == "posterior":
                gaps = model.gaps() if model.config.gap_model else jnp.asarray(decoding.Gaps().numbers())
                plans = plans * _thinning(plans, *lengths, self.band)[:, None, None]
                plans = decoding.posterior(plans, first, *lengths, gaps, columns)
            return decoding.decoded(plans, first, *lengths, columns)

        return predict


class _Batch(NamedTuple):
    """A batch that a device computes."""

    found: list[Alignment]  # of its chunk; this batch's are entered at the places `members`
    members: list[int]
    x_lengths: Int[np.ndarray, " batch"]
    y_lengths: Int[np.ndarray, " batch"]
    decoded: decoding.Decoded
    last: bool  # of the chunk


def _thinning(
    plans: Float[Array, "batch rows width"],
    x_lengths: Int[Array, " batch"],
    y_lengths: Int[Array, " batch"],
    band: int | None,
) -> Float[Array, " batch"]:
    """Compute the factor that brings plans to the density of those of training, which the gap model knows.

    It is 1 for usual pairs. Let a row's `exp(S)` sum to K, and its plan to m over residues. Where all n rows and
    columns are alike, a full dustbin of score s balances at `r = (1 - m) / m = e^s sqrt(n / K)`, and a cell of the plan
    is `exp(S) m / K`. It shrinks with K, which grows with the band, and with n. Both are undone, r being known from
    the plan's sums.

    band: that of training.
    """
    if band is None:
        return jnp.ones(len(plans))
    x_lengths, y_lengths = jnp.maximum(x_lengths, 1), jnp.maximum(y_lengths, 1)
    columns = jnp.maximum(1, jnp.minimum(plans.shape[2], y_lengths) / (2 * band + 1))
    rows = jnp.maximum(1, x_lengths / _USUAL_LENGTH)
    mass = plans.sum(axis=(1, 2))
    x_share, y_share = (jnp.clip(mass / n, 1e-6, 1) for n in (x_lengths, y_lengths))
    r = jnp.sqrt((1 - x_share) * (1 - y_share)) / x_share
    return columns * (1 + r) / (1 + r * jnp.sqrt(columns / rows))


def _batch_size(rows: int, columns: int, band: int | None) -> int:
    """Number of pairs that are computed at once."""
    if jax.default_backend() == "cpu":
        return max(1, _BATCH_RESIDUES // max(rows, columns))
    width = columns if band is None else min(2 * band + 1, columns)
    return max(1, min(_BATCH_RESIDUES_OF_ACCELERATOR // max(rows, columns), _BATCH_CELLS // (rows * width)))


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


def _ahead(items: Iterator[_Batch], count: int) -> Iterator[_Batch]:
    """Yield items once `count` more have been made."""
    waiting: collections.deque[_Batch] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _alignments(batch: _Batch) -> Iterator[Alignment]:
    match, confidence, x_alone, y_alone = jax.device_get(batch.decoded)
    for n, (x_length, y_length) in enumerate(zip(batch.x_lengths.tolist(), batch.y_lengths.tolist(), strict=True)):
        if n == len(batch.members):
            return
        aligned = np.flatnonzero(match[n] != decoding.NO_MATCH)
        pairs = np.stack([aligned, match[n, aligned]], axis=1).astype(np.int32)
        yield Alignment(pairs, confidence[n, aligned], x_alone[n, :x_length], y_alone[n, :y_length])


def dense_maximum(plan: Plan, longest: int) -> tuple[Float32[np.ndarray, "rows columns"], int]:
    """One plan as a picture with at most `longest` rows and columns, and how many residues a pixel is wide.

    A pixel shows the largest value of its residues: alignments are thin lines that means would wash out.
    """
    values, first, columns = plan
    scale = -(-max(len(values), columns) // longest)
    picture = np.zeros((-(-len(values) // scale), -(-columns // scale)), np.float32)
    row, place = np.nonzero(values)
    np.maximum.at(picture, (row // scale, (first[row] + place) // scale), values[row, place])
    return picture, scale
