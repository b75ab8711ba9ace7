"""A trained aligner for use: pairs of any lengths in, hard alignments with confidence out.

Sequences are encoded once each, then pairs are aligned by the pair HMM (`models.pair_aligner`). Up to `FULL` residues
all pairs of residues are computed; longer pairs in a band that follows the best path (`models.path_band`). Models of
transport plans (`models.aligner`) align by the maximum expected accuracy of their plan.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, PyTree

from alignment import asap_maps, batching
from alignment.batching import PairOfTokens, Tokens
from alignment.sequences import MAX_LENGTH
from models import attention, decoding, pair_hmm, weights
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of
from models.pair_aligner import Encoded, PairAligner, PairAlignerConfig
from models.pair_hmm import MODES, Mode

FULL = 1024  # residues of the longer sequence, up to which all pairs of residues are computed
BAND = 256  # residues to either side of the best path of longer pairs
MAX_CELLS = 16_000_000  # plan entries of a band that is widened by itself
_CHUNK_BATCHES, _SMALLEST_CHUNK = 16, 2048  # batches, and pairs, in a chunk of `chunk_size`
_USUAL_LENGTH = 256  # residues
_AHEAD, _AHEAD_OF_ACCELERATOR = 1, 16  # batches that are started before the results of one are fetched
_MOST_ENCODED = 1_000_000  # residues whose vectors are kept, 64 numbers each


class PairAlignment(NamedTuple):
    """A hard alignment of x with y."""

    pairs: Int32[np.ndarray, "aligned 2"]  # positions (i, j), from 0, both rising
    confidence: Float32[np.ndarray, " aligned"]  # of each pair: its posterior probability, or its share in the plan
    probability: float  # that x and y are homologous; not a number if the model says nothing about it
    x_alone: Float32[np.ndarray, " x_length"]  # probability that a residue is aligned with none, 1 minus its row's sum
    y_alone: Float32[np.ndarray, " y_length"]
    log_odds: float  # nats of all alignments over no alignment, overhangs as in mode glocal; or not a number


class PairPlan(NamedTuple):
    """Values of pairs of residues by antidiagonals and lanes (`models.pair_hmm`)."""

    values: Float[np.ndarray, "diagonals lanes"]
    first: Int[np.ndarray, " diagonals"]
    rows: int
    columns: int

    def dense(self) -> Float32[np.ndarray, "rows columns"]:
        """Return the values of all pairs of residues."""
        return self.picture(max(self.rows, self.columns))[0]

    def picture(self, longest: int) -> tuple[Float32[np.ndarray, "rows columns"], int]:
        """Return the values in at most `longest` rows and columns, and the number of residues that a pixel is wide.

        A pixel shows the largest value of its residues: alignments are thin lines, which means would wash out.
        """
        scale = -(-max(self.rows, self.columns) // longest)
        picture = np.zeros((-(-self.rows // scale), -(-self.columns // scale)), np.float32)
        d, lane = np.nonzero(self.values)
        row = self.first[d] + lane
        column, inside = d - row, (row < self.rows) & (d - row >= 0) & (d - row < self.columns)
        row, column, values = row[inside], column[inside], self.values[d[inside], lane[inside]]
        np.maximum.at(picture, (row // scale, column // scale), values)
        return picture, scale


class Prediction(NamedTuple):
    """All that a model says about one pair."""

    match: Int32[np.ndarray, " x_length"]  # position in y of each residue of x, or NO_MATCH
    plan: PairPlan  # transport plan; or weights of matches of the pair HMM, without nats of 20 and more
    posterior: PairPlan  # what was decoded: posterior of the pair HMM, or the plan itself
    probability: float
    measured: dict[str, float]


class _Outputs(NamedTuple):
    """Results of a program, with a batch axis; without a plan where alignments alone were asked for."""

    decoded: decoding.Decoded
    odds: Float[Array, " batch"]
    probability: Float[Array, " batch"]
    first: Int[Array, "batch diagonals"] | None = None
    plan: Float[Array, "batch diagonals lanes"] | None = None
    posterior: Float[Array, "batch diagonals lanes"] | None = None
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
Program = Callable[[PyTree, dict[str, np.ndarray]], Any]
Measure = Callable[[Any, dict[str, Array]], Mapping[str, Float[Array, " batch"]]]
Arrays = dict[str, np.ndarray]  # of a sequence, a number or a vector for each residue


class _Way(NamedTuple):
    """How the pairs of a batch are aligned: a program for each."""

    band: int | None
    mode: Mode
    measure: Measure | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters, and the structure of the model that they fit."""

    graph: nnx.GraphDef
    params: PyTree
    band: int | None  # half-width of a transport plan in training, in residues; None for no band
    compile: Callable[[Callable], Program] = jax.jit  # of a function of parameters and a batch, results on a device
    multiple: int = 1  # batch sizes are multiples of it: on a mesh the number of devices that share a batch
    programs: dict[_Way | None, Program] = dataclasses.field(default_factory=dict, repr=False)  # None: the encoder's

    @classmethod
    def load(cls, path: Path) -> "Pretrained":
        """Load a file of `weights.save`. Raises ValueError or OSError as that module does."""
        config, _ = weights.read_config(path)
        try:
            spec, blocks = specs_of(config)
            if config.get("task") == "pair_hmm":
                of_pairs = PairAlignerConfig(**config["model"])
                graph, like = _structure(lambda: PairAligner(of_pairs, blocks or spec, rngs=nnx.Rngs(0)))
            else:
                model = AlignerConfig(**config["model"])
                graph, like = _structure(lambda: Aligner(model, spec, encoder=blocks, rngs=nnx.Rngs(0)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold an aligner of this version: {error!r}") from error
        return cls(graph, weights.load(path, like), spec.band)

    def with_asap(self, path: Path) -> "Pretrained":
        """Replace layers by the maps of a file. Raises ValueError or FileNotFoundError as `asap_maps.load` does."""
        maps = asap_maps.load(path, self.params)
        return dataclasses.replace(self, graph=asap_maps.into(self.graph, self.params, maps), programs={})

    @property
    def plan_label(self) -> str:
        """Name what `Prediction.plan` holds, for figures."""
        return "weight of a match" if self.has_pair_hmm else "plan $P_{ij}$"

    @property
    def has_pair_hmm(self) -> bool:
        """Tell whether the model aligns by a pair HMM, and states a probability of homology; else by its plan."""
        return "calibration" in self.params

    def band_for(self, x_length: int, y_length: int) -> int | None:
        """Return the half-width of the band in which sequences are aligned, in residues; None for all pairs.

        A pair HMM's band lies around the best path, and longer pairs than `FULL` have one. A plan's band lies around
        the scaled diagonal. It is the band of training, or four times as much and so on, up to `MAX_CELLS` cells, until
        the shorter sequence fits anywhere into the longer one.
        """
        if self.has_pair_hmm:
            return None if max(x_length, y_length) <= FULL else BAND
        if self.band is None:
            return None
        band, needed = self.band, abs(x_length - y_length) + self.band // 2
        while band < needed and x_length * min(8 * band + 1, y_length) <= MAX_CELLS:
            band *= 4  # each width is a program of its own
        return None if 2 * band >= batching.bucket(max(x_length, y_length)) else band

    def memory(self, x_length: int, y_length: int, *, pairs: int = 1, band: int | None = None) -> int:
        """Return about how many bytes it takes on a CPU to align pairs of these lengths, beside programs."""
        return batching.memory(self._shape_of(x_length, y_length, band), pairs, plan=not self.has_pair_hmm)

    def chunk_size(self) -> int:
        """Return the number of pairs of usual lengths that are best sorted by length and aligned together."""
        return max(_SMALLEST_CHUNK, _CHUNK_BATCHES * batching.batch_size(_USUAL_LENGTH, _USUAL_LENGTH, None))

    def align(
        self, pairs: Pairs, *, mode: str = "glocal", band: int | None = None, done: Done = lambda count: None
    ) -> list[PairAlignment]:
        """Align pairs of token sequences; the alignments are in the order of the pairs.

        Overhangs cost as other gaps in mode "global", `terminal` nats of the model in "glocal", nothing in "local";
        models of plans know no modes. `band` is a half-width in place of `band_for`, in residues, -1 for all pairs.
        `done` is called with the number of pairs of each finished batch. Raises ValueError for an empty sequence, one
        longer than `MAX_LENGTH`, an unknown mode.
        """
        return next(self.align_chunks([pairs], mode=mode, band=band, done=done), [])

    def align_chunks(
        self, chunks: Chunks, *, mode: str = "glocal", band: int | None = None, done: Done = lambda count: None
    ) -> Iterator[list[PairAlignment]]:
        """Yield the alignments of each chunk of pairs, as `align` does, while the device computes the next chunk.

        A sequence that occurs in several pairs is encoded once, as long as `_MOST_ENCODED` residues hold it.
        """
        ahead = _AHEAD if jax.default_backend() == "cpu" else _AHEAD_OF_ACCELERATOR
        found: dict[int, PairAlignment] = {}
        for batch in _delayed(self._started(chunks, mode, band, None), ahead):
            found |= zip(batch.members, _alignments(batch), strict=True)
            done(len(batch.members))
            if batch.last:
                yield [found[n] for n in range(len(found))]
                found = {}

    def predict(
        self, pairs: Pairs, *, mode: str = "glocal", band: int | None = None, measure: Measure = lambda *_: {}
    ) -> Iterator[tuple[int, Prediction]]:
        """Yield the place in `pairs` and the prediction of each pair, in the order in which batches are computed.

        Mode and band are those of `align`. `measure` computes further numbers of each pair from the model and a batch
        with the keys x, y, x_length and y_length, in the same program. Give the same function every time, or the
        program is compiled again.
        """
        for batch in _delayed(self._started([pairs], mode, band, measure), _AHEAD):
            out = jax.device_get(batch.outputs)
            for n, (member, (rows, columns)) in enumerate(zip(batch.members, batch.lengths, strict=True)):
                first = out.first[n] if out.first is not None else np.zeros(out.plan.shape[1], np.int32)
                plan, posterior = (PairPlan(of[n], first, rows, columns) for of in (out.plan, out.posterior))
                measured = {name: float(values[n]) for name, values in out.measured.items()}
                match = out.decoded.match[n, :rows]
                yield member, Prediction(match, plan, posterior, float(out.probability[n]), measured)

    def _started(self, chunks: Chunks, mode: str, band: int | None, measure: Measure | None) -> Iterator["_Batch"]:
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} was given, allowed are {', '.join(MODES)}")
        encoder = _Encoder(self)
        for pairs in chunks:
            left = len(pairs)
            shapes = [self._shape(n, pair, band) for n, pair in enumerate(pairs)]
            encoder.see(pairs)
            for shape, members in batching.batches(shapes, self.multiple):
                batch = [pairs[n] for n in members]
                way = _Way(shape.band, cast(Mode, mode), measure)
                if way not in self.programs:
                    self.programs[way] = self.compile(functools.partial(_compute, self.graph, way))
                x, y = ([encoder.arrays(pair[side]) for pair in batch] for side in (0, 1))
                outputs = self.programs[way](self.params, batching.padded(x, y, shape))
                left -= len(members)
                yield _Batch(members, [(len(x), len(y)) for x, y in batch], outputs, last=not left)

    def _shape(self, place: int, pair: PairOfTokens, band: int | None) -> batching.Shape:
        lengths = len(pair[0]), len(pair[1])
        for name, length in zip("xy", lengths, strict=True):
            if not 1 <= length <= MAX_LENGTH:
                raise ValueError(f"pair {place}, {name}: {length} residues were given, allowed are 1 to {MAX_LENGTH}")
        return self._shape_of(*lengths, band)

    def _shape_of(self, x_length: int, y_length: int, band: int | None) -> batching.Shape:
        if band is None:
            band = self.band_for(x_length, y_length)
        elif band == -1 or band >= MAX_LENGTH:
            band = None
        return batching.shape_of(x_length, y_length, band)


class _Encoder:
    """The encoded sequences that were used last; of a model of plans, sequences alone."""

    def __init__(self, model: Pretrained):
        self._model = model
        self._known: collections.OrderedDict[bytes, Arrays] = collections.OrderedDict()

    def see(self, pairs: Pairs) -> None:
        """Encode the sequences of pairs, and forget those that were not used for long."""
        if not self._model.has_pair_hmm:
            return
        wanted = {x.tobytes(): x for pair in pairs for x in map(_as_tokens, pair)}
        for key in wanted.keys() & self._known.keys():
            self._known.move_to_end(key)
        new = [x for key, x in wanted.items() if key not in self._known]
        residues = sum(map(len, new)) + sum(len(of["tokens"]) for of in self._known.values())
        for key in [key for key in self._known if key not in wanted]:
            if residues > _MOST_ENCODED:
                residues -= len(self._known.pop(key)["tokens"])
        self._encode(new)

    def arrays(self, sequence: Tokens) -> Arrays:
        """Return tokens and vectors of a sequence of the last pairs."""
        sequence = _as_tokens(sequence)
        return self._known[sequence.tobytes()] if self._model.has_pair_hmm else {"tokens": sequence}

    def _encode(self, sequences: list[Tokens]) -> None:
        """Encode sequences in batches of one size for each length: their vectors never depend on other sequences."""
        model = self._model
        program = model.programs.get(None)
        if program is None:
            program = model.programs[None] = model.compile(functools.partial(_encode, model.graph))
        by_length: dict[int, list[Tokens]] = {}
        for sequence in sequences:
            by_length.setdefault(batching.bucket(len(sequence)), []).append(sequence)
        for length, of_length in by_length.items():
            size = batching.encoded_at_once(length, model.multiple)
            for start in range(0, len(of_length), size):
                members = of_length[start : start + size]
                batch = batching.padded_side("x", [{"tokens": x} for x in members], size, length)
                encoded = jax.device_get(program(model.params, batch))
                for n, tokens in enumerate(members):
                    # A view would keep the whole batch in memory.
                    found = {name: of[n, : len(tokens)].copy() for name, of in encoded.items()}
                    self._known[tokens.tobytes()] = {"tokens": tokens, **found}


def _as_tokens(sequence: Tokens) -> Tokens:
    return np.ascontiguousarray(sequence, np.int32)


def _structure(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, PyTree]:
    graph, like = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(like)


def _encode(graph: nnx.GraphDef, params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
    """Compute the vectors of sequences, and the offsets of their gap costs."""
    found = nnx.merge(graph, params).encode(batch["x"], batch["x_length"])
    arrays = {"vectors": found.vectors, "offset": found.offset}
    return {name: array for name, array in arrays.items() if array is not None}


def _compute(graph: nnx.GraphDef, way: _Way, params: PyTree, batch: dict[str, Array]) -> _Outputs:
    """Compute the alignments of a batch, and plans and measures if there is a measure."""
    model = nnx.merge(graph, params)
    lengths = batch["x_length"], batch["y_length"]
    shape = batch["x"].shape[1], batch["y"].shape[1]
    if isinstance(model, PairAligner):
        problem, values, odds = _aligned(model, way, batch)
        probability = model.homology(odds, *lengths)
        plan, first = jnp.exp(jnp.minimum(problem.log_weight, 20)), problem.first
        threshold = decoding.best_threshold(values, first, shape[0])
    else:
        plan, first, threshold = _plan(model, way.band, batch), None, jnp.zeros(1)
        values, odds = plan, jnp.full(len(lengths[0]), math.nan)
        probability = odds
    decoded = decoding.decode(values, first, *lengths, shape, threshold)
    if way.measure is None:
        return _Outputs(decoded, odds, probability)
    plan, values = plan.swapaxes(0, 1), values.swapaxes(0, 1)
    first = None if first is None else first.T
    return _Outputs(decoded, odds, probability, first, plan, values, way.measure(model, batch))


def _aligned(
    model: PairAligner, way: _Way, batch: dict[str, Array]
) -> tuple[pair_hmm.Problem, pair_hmm.LaneWeights, Float[Array, " batch"]]:
    """Return the problem of a batch of encoded pairs, its posterior, and the log-odds of alignment in mode glocal."""
    x, y = (Encoded(batch[side], batch[f"{side}_vectors"], batch.get(f"{side}_offset")) for side in "xy")
    lengths = batch["x_length"], batch["y_length"]
    problem, gaps = model.problem(x, y, *lengths, way.band)  # lanes are two residues apart, so the band is as wide
    odds, posterior = pair_hmm.posterior(problem, gaps, way.mode)
    if way.mode != "glocal":  # homology was calibrated in this mode
        odds = pair_hmm.log_odds(problem, gaps)
    return problem, posterior, odds


def _plan(model: Aligner, band: int | None, batch: dict[str, Array]) -> pair_hmm.LaneWeights:
    """Compute the transport plan of a batch by antidiagonals."""
    model.spec = dataclasses.replace(model.spec, band=band)  # of the plan; self-attention keeps its own
    x, y, x_length, y_length = (batch[name] for name in ("x", "y", "x_length", "y_length"))
    return attention.by_antidiagonals(model.banded_plan(x, y, x_length, y_length), y.shape[1])


def _delayed(items: Iterator[_Batch], count: int) -> Iterator[_Batch]:
    """Yield each item once `count` more have been made."""
    waiting: collections.deque[_Batch] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _alignments(batch: _Batch) -> Iterator[PairAlignment]:
    out = jax.device_get(batch.outputs)
    match, confidence, x_alone, y_alone = out.decoded
    for n, (x_length, y_length) in enumerate(batch.lengths):
        aligned = np.flatnonzero(match[n] != decoding.NO_MATCH)
        pairs = np.stack([aligned, match[n, aligned]], axis=1).astype(np.int32)
        alone = x_alone[n, :x_length], y_alone[n, :y_length]
        odds, probability = float(out.odds[n]), float(out.probability[n])
        yield PairAlignment(pairs, confidence[n, aligned], probability, *alone, odds)
