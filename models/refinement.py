"""Refine scores by the votes of a first plan, which are spread along diagonals and added to the scores.

A Sinkhorn plan has no order: it cannot express that neighbours in x are aligned with neighbours in y. A first plan P
votes for it. P transports the positions of y as waves `exp(i w j)`. Taken relative to the position of their row, and
averaged over n nearby rows i', they are `sum_i'j' P_i'j' exp(i w (j' - i')) / n`. Their product with the wave of
column j, relative to row i, is high where P has mass on the same diagonal. With weights a_w of the frequencies,

    vote_ij = sum_i' 1/n sum_j' P_i'j' kappa((j' - i') - (j - i)),   kappa(d) = sum_w a_w cos(w d).

Votes are therefore scores of low rank, and attention needs no new input. The weights depend on what P sends to x.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

WINDOWS = (0, 2, 8, 32)  # residues to either side that are averaged over
_SLOWEST = math.pi / 128  # radians a residue; the fastest is pi
_FREQUENCIES = 24

Waves = Float[Array, "*shape waves"]
X = Float[Array, "batch x_length _"]  # channels of each residue
Y = Float[Array, "batch y_length _"]


def waves(position: Int[Array, "batch length"]) -> Float[Array, "batch length waves"]:
    """Compute cosines and sines of the positions at all frequencies."""
    frequency = jnp.asarray(np.geomspace(_SLOWEST, math.pi, _FREQUENCIES), jnp.float32)
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def turn(z: Waves, by: Waves, *, back: bool = False) -> Waves:
    """Multiply complex numbers, given as real and imaginary halves; `back` conjugates the second."""
    (a, b), (cos, sin) = jnp.split(z, 2, -1), jnp.split(by, 2, -1)
    sin = -sin if back else sin
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def nearby_mean(
    z: Float[Array, "batch length channels"], real: Float[Array, "batch length 1"], reach: int
) -> Float[Array, "batch length channels"]:
    """Average over the real rows at most `reach` away; 0 at padding."""
    if not reach:
        return z * real
    length = z.shape[1]
    summed = jnp.pad(jnp.cumsum(jnp.concatenate([z * real, real], -1), axis=1), ((0, 0), (1, 0), (0, 0)))
    last = np.minimum(np.arange(length) + reach + 1, length)
    first = np.maximum(np.arange(length) - reach, 0)
    window = summed[:, last] - summed[:, first]
    return real * window[..., :-1] / jnp.maximum(window[..., -1:], 1)


class Votes(nnx.Module):
    """Extra channels of queries and keys, which change no score in an untrained model.

    blocks: Residual convolution blocks over x that weigh the votes.
    """

    def __init__(
        self, width: int, value_width: int, content_width: int, blocks: Sequence[nnx.Module], *, rngs: nnx.Rngs
    ):
        scales, zero = len(WINDOWS), nnx.initializers.zeros
        self.into = nnx.Linear(width + value_width + scales * (_FREQUENCIES + 1), width, rngs=rngs)
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.weights = nnx.Linear(width, scales * _FREQUENCIES, kernel_init=zero, rngs=rngs)
        self.query = nnx.Linear(width, content_width, kernel_init=zero, rngs=rngs)
        self.key = nnx.Linear(width, content_width, use_bias=False, rngs=rngs)

    def __call__(self, brought: X, mass: Float[Array, "batch x_length"], h_x: X, h_y: Y, real: X) -> tuple[X, Y]:
        """Compute the channels of queries and keys.

        `brought` holds values and then waves of y, as the first plan sends them to x; `mass` its row sums.
        """
        rows, columns = (waves(jnp.arange(h.shape[1])[None]) for h in (h_x, h_y))
        brought, found = jnp.split(brought, [brought.shape[-1] - 2 * _FREQUENCIES], -1)
        own = turn(found, jnp.broadcast_to(rows, found.shape), back=True)
        near = [nearby_mean(jnp.concatenate([own, mass[..., None]], -1), real, reach) for reach in WINDOWS]
        sizes = [jnp.concatenate([_magnitude(z[..., :-1]), z[..., -1:]], -1) for z in near]
        h = self.into(jnp.concatenate([h_x, brought, *sizes], -1))
        for block in self.blocks:
            h = block(h, real)
        h = self.norm(h)
        weights = jnp.split(self.weights(h), len(WINDOWS), -1)
        weighted = [jnp.concatenate([w, w], -1) * z[..., :-1] for w, z in zip(weights, near, strict=True)]
        votes = jnp.stack(weighted).sum(0)
        q = jnp.concatenate([turn(votes, jnp.broadcast_to(rows, votes.shape)), self.query(h)], -1)
        k = jnp.concatenate([jnp.broadcast_to(columns, (*h_y.shape[:2], columns.shape[-1])), self.key(h_y)], -1)
        return q, k


def _magnitude(z: Waves) -> Float[Array, "*shape half"]:
    a, b = jnp.split(z, 2, -1)
    return jnp.sqrt(jax.nn.relu(a * a + b * b) + 1e-6)
