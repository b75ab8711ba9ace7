"""The aligner: one encoder for both sequences, scores of all pairs of residues, and the pair HMM that aligns by them.

Scores begin as BLOSUM62 with a learned weight; the encoder adds what it learned about residues in their surroundings.
They are normalised by relaxed transport (docs/math.md, section 13), one symmetric half step from zero potentials:

    f_i = -tau log mean_j exp(S_ij)     g_j = -tau log mean_i exp(S_ij)     tau = 1/2

so that a residue which is like everything has no high score with anything. `exp(S + f + g + match)` weighs a match.
"""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data import vocab
from data.settings import Integer, Number, Section, Switch
from models import masked, pair_hmm, path_band
from models.attention import BlockSpec, Lengths, Noise, SinkhornSpec
from models.encoder import Encoder, EncoderConfig
from models.objectives import Batch, Totals

_PRIOR_WEIGHT = 0.3466  # ln 2 / 2: BLOSUM62 is in half bits, the weight turns its scores into log-odds in nats
_RELAXATION = 0.5  # tau of the half step
_OPENING, _EXTENSION, _TERMINAL, _EMPTY = (4.0, 6.5), (0.5, 0.05), 3.0, 10.0  # nats, where training begins
_MATCH = -0.1

Tokens = Int[Array, "batch length"]
AllPairs = Float[Array, "batch x_length y_length"]


@dataclasses.dataclass(frozen=True)
class PairAlignerConfig(EncoderConfig):
    """`config.model` of the aligner, which configs/aligner.py describes."""

    plan_width: Annotated[int, Integer(1, 1 << 14)] = 64
    plan_gain: Annotated[float, Number(open_least=True, hint=", or nothing is learned")] = 0.5
    learn_gaps: Annotated[bool, Switch()] = True
    contextual_gaps: Annotated[bool, Switch()] = False


@dataclasses.dataclass(frozen=True)
class PairLossConfig(Section):
    """`config.loss` of the aligner: weights of the terms, and the share of residues that are masked."""

    name: ClassVar[str] = "loss"

    alignment: Annotated[float, Number()] = 1.0
    masked: Annotated[float, Number()] = 6.0
    mask_rate: Annotated[float, Number(0.0, 1.0, open_least=True, open_most=True)] = 0.15

    def __post_init__(self):
        super().__post_init__()
        if not (self.alignment or self.masked):
            raise ValueError("loss.alignment=0.0, loss.masked=0.0: one must be above 0")


class Encoded(NamedTuple):
    """All that the aligner needs of sequences, each by itself.

    vectors: Products of two are scores without BLOSUM62.
    offset: Added to the cost of opening a gap at a residue, in nats; None where it does not depend on residues.
    """

    tokens: Tokens
    vectors: Float[Array, "batch length plan_width"]
    offset: Float[Array, "batch length"] | None


class GapCosts(nnx.Module):
    """Learned costs of gaps in nats, kept above 0 as logarithms."""

    def __init__(self):
        self.log_opening = nnx.Param(jnp.log(jnp.asarray(_OPENING)))
        self.log_extension = nnx.Param(jnp.log(jnp.asarray(_EXTENSION)))
        self.log_terminal = nnx.Param(jnp.log(jnp.asarray(_TERMINAL)))


class Calibration(nnx.Module):
    """Numbers that are fitted on validation pairs after training, and not trained (`evaluation.calibration`).

    temperature: All weights of alignments are taken to the power of its inverse.
    homology: Logit of the probability of homology: weights of the log-odds of alignment and of the logarithm of the
        product of both lengths, and a constant.
    """

    def __init__(self):
        self.temperature = nnx.Param(jnp.asarray(1.0))
        self.homology = nnx.Param(jnp.asarray([1.0, -1.0, 0.0]))


class PairAligner(nnx.Module):
    """Aligner of pairs of sequences; the encoder and the layer `residues` are those of `models.masked`."""

    def __init__(self, config: PairAlignerConfig, attention: SinkhornSpec | BlockSpec, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, attention, rngs=rngs)
        self.residues = nnx.Linear(config.width, len(vocab.RESIDUES), rngs=rngs)
        spread = nnx.initializers.variance_scaling(config.plan_gain**2, "fan_in", "truncated_normal")
        self.plan_projection = nnx.Linear(config.width, config.plan_width, kernel_init=spread, rngs=rngs)
        self.prior_weight = nnx.Param(jnp.asarray(_PRIOR_WEIGHT))
        self.match = nnx.Param(jnp.asarray(_MATCH))  # added to every score
        self.log_empty = nnx.Param(jnp.log(jnp.asarray(_EMPTY)))
        self.gaps = GapCosts()
        if config.contextual_gaps:
            self.gap_projection = nnx.Linear(config.width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.calibration = Calibration()

    def encode(self, tokens: Tokens, lengths: Lengths, noise: Noise = None) -> Encoded:
        """Encode sequences, each by itself."""
        return self._encoded(tokens, self.encoder(tokens, lengths, noise))

    def predicted(self, seen: Tokens, lengths: Lengths, noise: Noise = None) -> Float[Array, "batch length residues"]:
        """Compute log-probabilities of the twenty residues at every place of masked sequences."""
        return jax.nn.log_softmax(self.residues(self.encoder(seen, lengths, noise)))

    def sides(self, x: Encoded, y: Encoded, x_lengths: Lengths, y_lengths: Lengths) -> path_band.Sides:
        """Return vectors whose products are scores before their normalisation, in nats."""
        prior = self.prior_weight[...] * jnp.asarray(vocab.blosum62(), jnp.float32)[x.tokens]
        q = jnp.concatenate([x.vectors, prior], -1)
        k = jnp.concatenate([y.vectors, jax.nn.one_hot(y.tokens, vocab.SIZE)], -1)
        return path_band.Sides(q, k, x_lengths, y_lengths)

    def log_weights(self, sides: path_band.Sides) -> AllPairs:
        """Compute the log-weight of every match, in nats; without meaning beyond the lengths."""
        scores = jnp.einsum("bip,bjp->bij", sides.q, sides.k, precision="highest")
        f, g = _half_step(scores, 2, sides.y_lengths), _half_step(scores, 1, sides.x_lengths)
        return scores + f + g + self.match[...]

    def problem(
        self, x: Encoded, y: Encoded, x_lengths: Lengths, y_lengths: Lengths, lanes: int | None
    ) -> tuple[pair_hmm.Problem, pair_hmm.Gaps]:
        """Make the calibrated problem of all pairs of residues, or of a band of lanes around the best path."""
        sides, gaps = self.sides(x, y, x_lengths, y_lengths), self.gap_costs(x, y, x_lengths, y_lengths)
        if lanes is None:
            problem = pair_hmm.of_all_pairs(self.log_weights(sides), x_lengths, y_lengths)
        else:
            problem = path_band.problem(sides, gaps, self.match[...], _RELAXATION, lanes)
        return pair_hmm.tempered(problem, gaps, self.calibration.temperature[...])

    def homology(self, odds: Float[Array, " batch"], x_lengths: Lengths, y_lengths: Lengths) -> Float[Array, " batch"]:
        """Compute the probability that sequences are homologous from the log-odds of their alignment."""
        slope, size, intercept = self.calibration.homology[...]
        return jax.nn.sigmoid(slope * odds + size * _log_places(x_lengths, y_lengths) + intercept)

    def gap_costs(self, x: Encoded, y: Encoded, x_lengths: Lengths, y_lengths: Lengths) -> pair_hmm.Gaps:
        """Return the costs of gaps, and of no alignment, for a batch of pairs.

        The latter falls with the logarithm of the number of pairs of residues, as alignments by chance become as many
        more (Karlin and Altschul 1990).
        """
        learned = self.gaps.log_opening[...], self.gaps.log_extension[...], self.gaps.log_terminal[...]
        opening, extension, terminal = map(
            jnp.exp, learned if self.config.learn_gaps else jax.lax.stop_gradient(learned)
        )
        empty = jnp.exp(self.log_empty[...]) - _log_places(x_lengths, y_lengths)
        return pair_hmm.Gaps(opening, extension, terminal, empty, x.offset, y.offset)

    def pair(
        self,
        x: Int[Array, "batch x_length"],
        y: Int[Array, "batch y_length"],
        x_lengths: Lengths,
        y_lengths: Lengths,
        noise: Noise = None,
    ) -> tuple[AllPairs, pair_hmm.Gaps]:
        """Compute the log-weights of all matches of a batch of pairs, and their costs of gaps."""
        if x.shape != y.shape:
            both = self.encode(x, x_lengths, noise), self.encode(y, y_lengths, noise)
        else:
            both = self._encode_pairs(x, y, x_lengths, y_lengths, noise)
        lengths = x_lengths, y_lengths
        return self.log_weights(self.sides(*both, *lengths)), self.gap_costs(*both, *lengths)

    def _encode_pairs(self, x, y, x_lengths, y_lengths, noise) -> tuple[Encoded, Encoded]:
        """Encode both sequences in one call; pair by pair, so that devices which share a batch keep their pairs."""
        noises = None if noise is None else jax.vmap(lambda key: jax.random.split(key))(noise).reshape(-1)
        tokens, lengths = jnp.stack([x, y], 1).reshape(-1, x.shape[1]), jnp.stack([x_lengths, y_lengths], 1).reshape(-1)
        both = self.encode(tokens, lengths, noises)

        def of(which: int) -> Encoded:
            return jax.tree.map(lambda z: z.reshape(-1, 2, *z.shape[1:])[:, which], both)

        return of(0), of(1)

    def _encoded(self, tokens, features) -> Encoded:
        vectors = self.plan_projection(features) / self.config.plan_width**0.25
        offset = self.gap_projection(features)[..., 0] if self.config.contextual_gaps else None
        return Encoded(tokens, vectors, offset)


def _log_places(x_lengths: Lengths, y_lengths: Lengths) -> Float[Array, " batch"]:
    """Compute the logarithm of the number of pairs of residues, where an alignment can begin."""
    return jnp.log(jnp.maximum(x_lengths, 1) * 1.0) + jnp.log(jnp.maximum(y_lengths, 1) * 1.0)


def _half_step(scores: AllPairs, axis: int, lengths: Lengths) -> Float[Array, "batch _ _"]:
    """Compute the potentials of a relaxed half step from zero potentials, along an axis of these true lengths."""
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    inside = jnp.where(place < lengths[:, None, None], scores, pair_hmm.LOG_ZERO)
    total = jax.nn.logsumexp(inside, axis=axis, keepdims=True)
    return -_RELAXATION * (total - jnp.log(jnp.maximum(lengths, 1).astype(scores.dtype))[:, None, None])


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """Objective of the aligner (a `models.objectives.Objective`): likelihood of alignments, and masked residues.

    attention: Of the encoder.
    """

    model: PairAlignerConfig
    attention: SinkhornSpec | BlockSpec
    loss: PairLossConfig

    def make(self, rngs: nnx.Rngs) -> PairAligner:
        return PairAligner(self.model, self.attention, rngs=rngs)

    def augment(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Choose residues of x to predict, hide most of them, and add random keys if the encoder takes noise."""
        return masked.augmented(batch, key, self.loss.mask_rate, self.attention)

    def totals(self, model: PairAligner, batch: Batch) -> Totals:
        found: Totals = {}
        if self.loss.alignment:
            found |= self._alignment(model, batch)
        if self.loss.masked:
            predicted = model.predicted(batch["seen"], batch["x_length"], batch.get("noise"))
            nats, _ = masked.scores(predicted, batch["x"])
            found["masked"] = jnp.where(batch["chosen"], nats, 0).sum()
        return found | {name: count for name, count in self.counts(batch).items() if name[: -len("/count")] in found}

    def counts(self, batch: Batch) -> Totals:
        pairs, related = (x.sum().astype(jnp.float32) for x in _kinds(batch))
        found = {"alignment": pairs, "related": related, "unrelated": pairs - related}
        if "chosen" in batch:
            found["masked"] = batch["chosen"].sum().astype(jnp.float32)
        return {f"{name}/count": count for name, count in found.items()}

    def value(self, totals: Totals) -> Float[Array, ""]:
        weights = {"alignment": self.loss.alignment, "masked": self.loss.masked}
        terms = (w * totals[n] / jnp.maximum(totals[f"{n}/count"], 1) for n, w in weights.items() if w)
        return sum(terms, jnp.asarray(0.0))

    def residues(self, batch: Batch) -> Int[Array, ""]:
        return (batch["x_length"] + batch["y_length"]).sum()

    def _alignment(self, model: PairAligner, batch: Batch) -> Totals:
        """Sum the nats of the reference alignments, over the square root of their lengths.

        An alignment's nats grow with its length, but neighbours depend on each other, and long alignments are not
        worth as much more. `related` and `unrelated` are of pairs with and without an alignment; the shorter sequence
        is the length of none, or an unrelated pair would count ten times as much a nat.
        """
        target, lengths = batch["target"], (batch["x_length"], batch["y_length"])
        log_weight, gaps = model.pair(batch["x"], batch["y"], *lengths, batch.get("noise"))
        nats = pair_hmm.negative_log_likelihood(log_weight, target, *lengths, gaps)
        pairs, related = _kinds(batch)
        length = jnp.where(related, (target >= 0).sum(1), jnp.minimum(*lengths))
        nats = nats / jnp.sqrt(jnp.maximum(length, 1))
        kinds = {"alignment": pairs, "related": related, "unrelated": pairs & ~related}
        return {name: jnp.where(of, nats, 0).sum() for name, of in kinds.items()}


def _kinds(batch: Batch) -> tuple[Array, Array]:
    """Tell which examples are pairs, and which of them have an alignment."""
    return batch["x_length"] > 0, (batch["target"] >= 0).any(1)
