"""A trained aligner for use: pairs of any lengths in, hard alignments with confidence out.

Nothing on the device has the size of the product of both lengths: plans are held by the windows of their band.
"""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, PyTree

from alignment import asap_maps, batching, decoding
from alignment.batching import PairOfTokens
from alignment.sequences import MAX_LENGTH
from models import pair_hmm, weights
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of

DECODERS = ("posterior", "plan")
MAX_CELLS = 16_000_000  # plan entries of a band that is widened by itself; decoding takes about 50 bytes for each
_CHUNK_BATCHES, _SMALLEST_CHUNK = 16, 2048  # batches, and pairs, in a chunk of `chunk_size`
_AHEAD, _AHEAD_OF_ACCELERATOR = 1, 16  # batches that are started before the results of one are fetched
_LONG, _LONG_BAND = 1024, 256  # a model that was trained without a band gets this band at greater lengths than this


class PairAlignment(NamedTuple):
    """A hard alignment of x with y."""

    pairs: Int32[np.ndarray, "aligned 2"]  # positions (i, j), from 0, both rising
    confidence: Float32[np.ndarray, " aligned"]  # of each pair: its posterior probability, or its share in the plan
    probability: float  # that x and y are homologous; not a number if the model says nothing about it
    x_alone: Float32[np.ndarray, " x_length"]  # probability that a residue is aligned with none, 1 minus its row's sum
    y_alone: Float32[np.ndarray, " y_length"]


class PairPlan(NamedTuple):
    """A plan held by windows: `values[i, c]` is P_ij for j = first[i] + c."""

    values: Float[np.ndarray, "rows width"]
    first: Int[np.ndarray, " rows"]
    columns: int

    def dense(self) -> Float32[np.ndarray, "rows columns"]:
        """Return the whole plan."""
        return self.picture(max(len(self.values), self.columns))[0]

    def picture(self, longest: int) -> tuple[Float32[np.ndarray, "rows columns"], int]:
        """Return the plan in at most `longest` rows and columns, and the number of residues that a pixel is wide.

        A pixel shows the largest value of its residues: alignments are thin lines, which means would wash out.
        """
        scale = -(-max(len(self.values), self.columns) // longest)
        picture = np.zeros((-(-len(self.values) // scale), -(-self.columns // scale)), np.float32)
        row, place = np.nonzero(self.values)
        np.maximum.at(picture, (row // scale, (self.first[row] + place) // scale), self.values[row, place])
        return picture, scale


class Prediction(NamedTuple):
    """All that a model says about one pair."""

    match: Int32[np.ndarray, " x_length"]  # position in y of each residue of x, or NO_MATCH
    plan: PairPlan
    posterior: PairPlan  # what was decoded: posterior of the pair HMM, or the plan itself
    measured: dict[str, float]


class _Outputs(NamedTuple):
    """Results of a program, with a leading batch axis; without a plan where alignments alone were asked for."""

    decoded: decoding.Decoded
    first: Int[Array, "batch rows"] | None = None
    plan: Float[Array, "batch rows width"] | None = None
    posterior: Float[Array, "batch rows width"] | None = None
    measured: Mapping[str, Float[Array, " batch"]] = {}


class _Batch(NamedTuple):
    """A batch that was handed to a device."""

    members: list[int]  # places of its pairs in their chunk
    lengths: list[tuple[int, int]]
    outputs: _Outputs
    last: bool  # of its chunk


Pairs = Sequence[PairOfTokens]
Chunks = Iterable[Pairs]
Done = Callable[[int], object]
Program = Callable[[PyTree, dict[str, np.ndarray]], _Outputs]
Measure = Callable[[Aligner, dict[str, Array]], Mapping[str, Float[Array, " batch"]]]
Key = tuple[int | None, str, Measure | None]  # band, decoder and measure of a program


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters, and the structure of the model that they fit."""

    graph: nnx.GraphDef
    params: PyTree
    band: int | None  # half-width in training, in residues; None for no band
    compile: Callable[[Callable], Program] = jax.jit  # of a function of parameters and a batch, results on a device
    multiple: int = 1  # batch sizes are multiples of it: on a mesh the number of devices that share a batch
    programs: dict[Key, Program] = dataclasses.field(default_factory=dict, repr=False)  # compiled, for any parameters

    @classmethod
    def load(cls, path: Path) -> "Pretrained":
        """Load a file of `weights.save`. Raises ValueError or OSError as that module does."""
        config, _ = weights.read_config(path)
        try:
            model, (spec, blocks) = AlignerConfig(**config["model"]), specs_of(config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold an aligner of this version: {error!r}") from error
        graph, like = nnx.split(nnx.eval_shape(lambda: Aligner(model, spec, encoder=blocks, rngs=nnx.Rngs(0))))
        return cls(graph, weights.load(path, nnx.to_pure_dict(like)), spec.band)

    def with_asap(self, path: Path) -> "Pretrained":
        """Replace layers by the maps of a file. Raises ValueError or FileNotFoundError as `asap_maps.load` does."""
        maps = asap_maps.load(path, self.params)
        return dataclasses.replace(self, graph=asap_maps.into(self.graph, self.params, maps), programs={})

    @property
    def decoder(self) -> str:
        """The decoder that the model was trained for: "posterior" if it learned a gap model, else "plan"."""
        return "posterior" if "gaps" in self.params else "plan"

    def band_for(self, x_length: int, y_length: int) -> int | None:
        """Return a half-width of the band with which the shorter sequence fits anywhere into the longer one.

        It is the band of training, or four times as much and so on, up to `MAX_CELLS` cells. None, no band, is returned
        where the band covers most, and for a model that was trained without a band unless sequences are long.
        """
        padded = batching.bucket(max(x_length, y_length))
        band = self.band or _LONG_BAND
        needed = self._needed(x_length, y_length)
        while band < needed and x_length * min(8 * band + 1, y_length) <= MAX_CELLS:
            band *= 4  # each width is a program of its own
        if 2 * band >= padded or (self.band is None and padded <= _LONG):
            return None
        return band

    def memory(self, x_length: int, y_length: int, *, pairs: int = 1, band: int | None = None) -> int:
        """Return about how many bytes it takes on a CPU to align pairs of these lengths, beside programs."""
        shape = batching.shape_of(x_length, y_length, self._half_width(x_length, y_length, band))
        return batching.memory(shape, pairs)

    def chunk_size(self) -> int:
        """Return the number of pairs of usual lengths that are best sorted by length and aligned together."""
        usual = decoding.USUAL_LENGTH
        return max(_SMALLEST_CHUNK, _CHUNK_BATCHES * batching.batch_size(usual, usual, self.band))

    def align(
        self, pairs: Pairs, *, mode: str = "glocal", band: int | None = None, done: Done = lambda count: None
    ) -> list[PairAlignment]:
        """Align pairs of token sequences; the alignments are in the order of the pairs.

        The decoder "posterior" aligns by the pair HMM that the plan weighs, "plan" by the plan itself; both by maximum
        expected accuracy (alignment/decoding.py). None is the model's own. `band` is a half-width in place of
        `band_for`, in residues, -1 for no band. `done` is called with the number of pairs of each finished batch.
        Raises ValueError for an empty sequence, one longer than `MAX_LENGTH`, an unknown decoder.
        """
        return next(self.align_chunks([pairs], mode=mode, band=band, done=done), [])

    def align_chunks(
        self, chunks: Chunks, *, mode: str = "glocal", band: int | None = None, done: Done = lambda count: None
    ) -> Iterator[list[PairAlignment]]:
        """Yield the alignments of each chunk of pairs, as `align` does, while the device computes the next chunk."""
        ahead = _AHEAD if jax.default_backend() == "cpu" else _AHEAD_OF_ACCELERATOR
        found: dict[int, PairAlignment] = {}
        for batch in _delayed(self._started(chunks, None, band, None), ahead):
            found |= zip(batch.members, _alignments(batch), strict=True)
            done(len(batch.members))
            if batch.last:
                yield [found[n] for n in range(len(found))]
                found = {}

    def predict(
        self, pairs: Pairs, *, decoder: str | None = None, band: int | None = None, measure: Measure = lambda *_: {}
    ) -> Iterator[tuple[int, Prediction]]:
        """Yield the place in `pairs` and the prediction of each pair, in the order in which batches are computed.

        Decoder and band are those of `align`. `measure` computes further numbers of each pair from the model and a
        batch with the keys x, y, x_length and y_length, in the same program. Give the same function every time, or the
        program is compiled again.
        """
        for batch in _delayed(self._started([pairs], decoder, band, measure), _AHEAD):
            outputs = jax.device_get(batch.outputs)
            for n, (member, (rows, columns)) in enumerate(zip(batch.members, batch.lengths, strict=True)):
                first = outputs.first[n, :rows]
                plan, posterior = (PairPlan(of[n, :rows], first, columns) for of in (outputs.plan, outputs.posterior))
                measured = {name: float(values[n]) for name, values in outputs.measured.items()}
                yield member, Prediction(outputs.decoded.match[n, :rows], plan, posterior, measured)

    def _started(
        self, chunks: Chunks, decoder: str | None, band: int | None, measure: Measure | None
    ) -> Iterator[_Batch]:
        decoder = decoder or self.decoder
        if decoder not in DECODERS:
            raise ValueError(f"decoder: {decoder!r} was given, allowed are {', '.join(DECODERS)}")
        warned = band is not None
        for pairs in chunks:
            left = len(pairs)
            shapes = [self._shape(n, pair, band) for n, pair in enumerate(pairs)]
            warned = warned or self._warned_of_reach(pairs, shapes)
            for shape, members in batching.batches(shapes, self.multiple):
                batch = [pairs[n] for n in members]
                key = shape.band, decoder, measure
                if key not in self.programs:
                    self.programs[key] = self.compile(functools.partial(_compute, self.graph, self.band, key))
                outputs = self.programs[key](self.params, batching.padded(batch, shape))
                left -= len(members)
                yield _Batch(members, [(len(x), len(y)) for x, y in batch], outputs, last=not left)

    def _warned_of_reach(self, pairs: Pairs, shapes: Sequence[batching.Shape]) -> bool:
        """Warn of the first pair whose shorter sequence does not fit anywhere into the longer one. Return whether."""
        for (x, y), shape in zip(pairs, shapes, strict=True):
            if shape.band is not None and shape.band < self._needed(len(x), len(y)):
                warnings.warn(
                    f"lengths {len(x)} and {len(y)}, and perhaps others, differ by more than the band of {shape.band} "
                    "residues reaches; --band=N widens it, for more memory",
                    stacklevel=4,
                )
                return True
        return False

    def _needed(self, x_length: int, y_length: int) -> int:
        return abs(x_length - y_length) + (self.band or _LONG_BAND) // 2

    def _shape(self, place: int, pair: PairOfTokens, band: int | None) -> batching.Shape:
        lengths = len(pair[0]), len(pair[1])
        for name, length in zip("xy", lengths, strict=True):
            if not 1 <= length <= MAX_LENGTH:
                raise ValueError(f"pair {place}, {name}: {length} residues were given, allowed are 1 to {MAX_LENGTH}")
        return batching.shape_of(*lengths, self._half_width(*lengths, band))

    def _half_width(self, x_length: int, y_length: int, band: int | None) -> int | None:
        if band is None:
            return self.band_for(x_length, y_length)
        return None if band == -1 or band >= MAX_LENGTH else band


def _compute(
    graph: nnx.GraphDef, trained_band: int | None, key: Key, params: PyTree, batch: dict[str, Array]
) -> _Outputs:
    """Compute the alignments of a batch, and plans and measures if there is a measure."""
    band, decoder, measure = key
    model = nnx.merge(graph, params)
    model.spec = dataclasses.replace(model.spec, band=band)  # of the plan; self-attention keeps its own
    x, y, x_length, y_length = (batch[name] for name in ("x", "y", "x_length", "y_length"))
    plan, first = model.banded_plan(x, y, x_length, y_length)
    first = pair_hmm.rising(first, y_length)  # rows of padding have no windows of their own
    posterior = plan
    if decoder == "posterior":
        gaps = model.gaps() if model.config.gap_model else jnp.asarray(decoding.Gaps().numbers())
        corrected = plan * decoding.density_correction(plan, x_length, y_length, trained_band)[:, None, None]
        posterior = decoding.posterior(corrected, first, x_length, y_length, gaps, y.shape[1])
    decoded = decoding.decode(posterior, first, x_length, y_length, y.shape[1])
    return _Outputs(decoded) if measure is None else _Outputs(decoded, first, plan, posterior, measure(model, batch))


def _delayed(items: Iterator[_Batch], count: int) -> Iterator[_Batch]:
    """Yield each item once `count` more have been made."""
    waiting: collections.deque[_Batch] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _alignments(batch: _Batch) -> Iterator[PairAlignment]:
    match, confidence, x_alone, y_alone = jax.device_get(batch.outputs.decoded)
    for n, (x_length, y_length) in enumerate(batch.lengths):
        aligned = np.flatnonzero(match[n] != decoding.NO_MATCH)
        pairs = np.stack([aligned, match[n, aligned]], axis=1).astype(np.int32)
        # A placeholder until models say it themselves.
        probability = float(confidence[n, aligned].mean()) if len(aligned) else 0.0
        yield PairAlignment(pairs, confidence[n, aligned], probability, x_alone[n, :x_length], y_alone[n, :y_length])
