"""The pair HMM that orders a plan: how likely it makes a reference alignment, differentiably.

A plan knows no order and no gaps. Here its values are the weights of matches, `sharpness log P + match` nats each,
and a gap costs `opening` nats; `models/decode.py` aligns by the same model. models/pair_hmm.py sums the weights of all
alignments; the derivative of the sum's logarithm by a match's weight is the posterior of that match.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import pair_hmm


class GapModel(nnx.Module):
    """The three numbers, learned; sharpness and opening stay above 0.

    They start where the plan of BLOSUM62 alone aligns best (docs/aligner.md).
    """

    def __init__(self):
        self.log_sharpness = nnx.Param(jnp.log(0.9))
        self.match = nnx.Param(jnp.asarray(5.2))
        self.log_opening = nnx.Param(jnp.log(4.5))

    def __call__(self) -> Float[Array, "3"]:
        """sharpness, match, opening."""
        return jnp.stack([jnp.exp(self.log_sharpness[...]), self.match[...], jnp.exp(self.log_opening[...])])


def negative_log_likelihood(
    log_plan: Float[Array, "batch x_length y_length"],
    target: Int[Array, "batch x_length"],
    x_lengths: Int[Array, "batch"],
    y_lengths: Int[Array, "batch"],
    gaps: Float[Array, "3"],
) -> Float[Array, "batch"]:
    """Nats of the reference alignment of each pair; of those of its matches that the plan's band holds.

    `log_plan` is minus infinity outside the band, and may be anything beyond the lengths.
    """
    sharpness, match, opening = gaps
    inside = jnp.isfinite(log_plan)
    inside &= (jnp.arange(log_plan.shape[1]) < x_lengths[:, None])[:, :, None]
    inside &= (jnp.arange(log_plan.shape[2]) < y_lengths[:, None])[:, None, :]
    log_weight = jnp.where(inside, sharpness * jnp.where(inside, log_plan, 0) + match, pair_hmm.NOTHING)
    column = jnp.maximum(target, 0)[..., None]
    found = jnp.take_along_axis(log_weight, column, axis=2)[..., 0]
    aligned = (target >= 0) & (found > pair_hmm.NOTHING / 2)
    matches = jnp.where(aligned, found, 0).sum(1)
    openings = _openings(jnp.where(aligned, target, -1), x_lengths, y_lengths)
    return log_partition(log_weight, x_lengths, y_lengths, opening) - matches + opening * openings


@jax.custom_vjp
def log_partition(
    log_weight: Float[Array, "batch x_length y_length"],
    x_lengths: Int[Array, "batch"],
    y_lengths: Int[Array, "batch"],
    opening: Float[Array, ""],
) -> Float[Array, "batch"]:
    """Logarithm of the summed weights of all alignments of each pair.

    log_weight: of matches, `pair_hmm.NOTHING` for none and beyond the lengths. Its derivative is the posterior, from
      the pair HMM's forward and backward pass; automatic differentiation would keep every step of every row.
    """
    prefixes = _prefixes(log_weight, x_lengths, y_lengths, opening)
    return prefixes.total + prefixes.total_scale


def _prefixes(log_weight, x_lengths, y_lengths, opening) -> pair_hmm.Prefixes:
    end = jnp.stack([x_lengths, y_lengths], 1)
    return pair_hmm.forward(log_weight, None, jnp.zeros_like(end), end, opening)


def _partition_forward(log_weight, x_lengths, y_lengths, opening):
    prefixes, slopes = jax.jvp(
        lambda o: _prefixes(log_weight, x_lengths, y_lengths, o), (opening,), (jnp.ones_like(opening),)
    )
    residuals = log_weight, x_lengths, y_lengths, opening, prefixes, slopes.total
    return prefixes.total + prefixes.total_scale, residuals


def _partition_backward(residuals, cotangent):
    log_weight, x_lengths, y_lengths, opening, prefixes, slope = residuals
    suffixes = pair_hmm.suffixes(log_weight, x_lengths, y_lengths, opening)
    posterior = pair_hmm.joined(log_weight, prefixes, suffixes)
    return posterior * cotangent[:, None, None], None, None, (slope * cotangent).sum()


log_partition.defvjp(_partition_forward, _partition_backward)


def _openings(
    target: Int[Array, "batch x_length"], x_lengths: Int[Array, "batch"], y_lengths: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Gaps of the alignment: runs of unaligned residues of x, and of y, between two matches or at an end."""
    length = target.shape[1]
    aligned, row = target >= 0, jnp.arange(length)
    # The last match before each row; node 0 is one.
    last_row = jax.lax.cummax(jnp.where(aligned, row, -1), axis=1)
    last_row = jnp.pad(last_row[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    last_column = jnp.pad(
        jax.lax.cummax(jnp.where(aligned, target, -1), axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1
    )
    between = (aligned & (row - last_row > 1)).sum(1) + (aligned & (target - last_column > 1)).sum(1)
    end_row = jnp.where(aligned, row, -1).max(1)
    at_end = (x_lengths - end_row > 1).astype(jnp.int32) + (y_lengths - target.max(1) > 1)
    return (between + at_end).astype(jnp.float32)
