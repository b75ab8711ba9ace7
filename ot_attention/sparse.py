"""Sparse Sinkhorn Attention (Tay et al., arXiv 2002.11296; docs/math.md, section 11).

A sort network scores every place against every block of keys and values. Sinkhorn steps balance the scores into a soft
permutation, by which blocks move to places. A query attends, in one softmax, to the block at its place and to its own.
The paper leaves room for choices beside those that section 11 names:

- The caller brings the sort network (`models/attention.py`), which reads `pooled`. The paper's network has one output
  for every place, and so one length; scores of places against blocks fit any length.
- A balancing step normalises columns, then rows: every place holds a mean of blocks after any number of steps.
- Causal: column sums run over places up to the current one, since later places depend on residues that it may not see.
  Balancing tends to the shift by one place: take few steps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ot_attention import reference, support
from ot_attention.api import as_heads, as_lengths
from ot_attention.spec import LengthsLike, flag, integer, positive

Residues = Float[Array | np.ndarray, "batch length heads width"]
Values = Float[Array | np.ndarray, "batch length heads value"]
_LEAST_SHARE = 1e-6  # Smaller shares of real residues count as 0: the gradient of their mean would overflow.
_NEVER = -1e30  # Score of a forbidden block: finite, because cumulative sums of minus infinities have no gradient.


@dataclasses.dataclass(frozen=True)
class SparseSpec:
    """Settings of one layer; hashable.

    block: residues in a block.
    steps: number of balancing steps, each of columns, then rows.
    temperature: divides the scores, Gumbel noise included.
    causal: a query sees no later residue.
    sortcut: number of sorted blocks, from the first, to which all queries attend; None for the sorted and own blocks.
    mixture: adds dense softmax attention to the output.

    Raises ValueError for values out of range.
    """

    block: int = 32
    steps: int = 7
    temperature: float = 0.75
    causal: bool = False
    sortcut: int | None = None
    mixture: bool = False

    def __post_init__(self):
        for name in ("block", "steps", "sortcut"):
            if (name, self.sortcut) != ("sortcut", None):
                object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))
        for name in ("causal", "mixture"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.causal and self.sortcut:
            raise ValueError(f"sortcut={self.sortcut} with causal=True: the first places would see later blocks")

    def blocks(self, length: int) -> int:
        """Return the number of blocks in a sequence of (padded) `length`."""
        return -(-length // self.block)


@support.promoting
def pooled(
    x: Float[Array, "batch length width"], spec: SparseSpec, lengths: LengthsLike
) -> tuple[Float[Array, "batch blocks width"], Float[Array, "batch blocks width"]]:
    """Sum over each block, padding left out: a sort network's inputs for places and for blocks.

    With `spec.causal` a place's input is the sum over all earlier blocks.
    """
    lengths = as_lengths("lengths", lengths, x.shape[1], x.shape[0])
    blocks = _cut(support.zero_padding(x, lengths), spec.block).sum(2)
    places = jnp.cumsum(blocks, 1) - blocks if spec.causal else blocks
    return places, blocks


@support.promoting
def soft_permutation(
    scores: Float[Array, "batch heads places blocks"],
    spec: SparseSpec,
    lengths: LengthsLike,
    noise: Key[Array, "batch"] | None = None,
) -> Float[Array, "batch heads places blocks"]:
    """Balance scores in the log domain: the share of each block that comes to each place, 0 where there is no block.

    noise: random keys, one for each example, for Gumbel noise added to the scores; None when not training.
    """
    scores = jnp.asarray(scores)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    lengths = as_lengths("lengths", lengths, scores.shape[-1] * spec.block, scores.shape[0])
    if noise is not None:
        scores += jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], scores.dtype))(noise)
    scores /= jnp.asarray(spec.temperature, scores.dtype)
    place = jnp.arange(scores.shape[-1])
    exists = place < -(-lengths // spec.block)[:, None]
    allowed = exists[:, None, :, None] & exists[:, None, None, :]
    if spec.causal:
        return _balanced_causally(scores, allowed & (place < place[:, None]), spec.steps)
    target = jnp.broadcast_to(exists[:, None], scores.shape[:-1]).astype(scores.dtype)
    scores = jnp.where(allowed, scores, -jnp.inf)

    def step(f, _):
        g = reference.log_scaling(scores + f[..., None], target, axis=-2)
        return reference.log_scaling(scores + g[..., None, :], target, axis=-1), g

    f, g = jax.lax.scan(step, jnp.zeros_like(target), length=spec.steps)
    return jnp.exp(scores + f[..., None] + g[-1][..., None, :])


def _balanced_causally(scores, allowed: Bool[Array, "batch 1 places blocks"], steps: int):
    scores = jnp.where(allowed, scores, _NEVER)

    def step(scores, _):
        scores = jnp.where(allowed, scores - jax.lax.cumlogsumexp(scores, axis=scores.ndim - 2), _NEVER)
        return jnp.where(allowed, jax.nn.log_softmax(scores, axis=-1), _NEVER), None

    scores, _ = jax.lax.scan(step, scores, length=steps)
    return jnp.where(allowed, jnp.exp(scores), 0)


@support.promoting
def sparse_sinkhorn_attention(
    q: Residues,
    k: Residues,
    v: Values,
    scores: Float[Array, "batch heads places blocks"],
    spec: SparseSpec,
    lengths: LengthsLike | None = None,
    noise: Key[Array, "batch"] | None = None,
) -> Float[Array, "batch length heads value"]:
    """Attend by softmax to the sorted and the own block. The output has the dtype of v, and is 0 at padding.

    scores: the sort network's, places against blocks, `spec.blocks(length)` of each; float32 is best.
    noise: as in `soft_permutation`.
    Raises ValueError for shapes that do not fit, naming the argument.
    """
    q, k, v, n = _checked(q, k, v, lengths)
    blocks = spec.blocks(q.shape[1])
    if jnp.shape(scores) != (expected := (q.shape[0], q.shape[2], blocks, blocks)):
        raise ValueError(f"scores has shape {jnp.shape(scores)}; with block={spec.block} it must be {expected}")
    permutation = soft_permutation(scores, spec, n, noise)
    moved_k, moved_v, share = _sorted(permutation, k, v, spec, n)
    if spec.sortcut:
        out = _attend_to_first(q, moved_k, moved_v, share, spec.sortcut)
    else:
        out = _attend_to_blocks(q, k, v, (moved_k, moved_v, share), spec, n)
    if spec.mixture:
        out += softmax_attention(q, k, v, causal=spec.causal, lengths=n)
    return support.zero_padding(out, n)


@support.promoting
def local_attention(
    q: Residues, k: Residues, v: Values, spec: SparseSpec, lengths: LengthsLike | None = None
) -> Float[Array, "batch length heads value"]:
    """Attend by softmax to the own block alone; only `spec.block` and `spec.causal` are read. Raises ValueError."""
    q, k, v, n = _checked(q, k, v, lengths)
    return support.zero_padding(_attend_to_blocks(q, k, v, None, spec, n), n)


@support.promoting
def softmax_attention(
    q: Residues, k: Residues, v: Values, *, causal: bool, lengths: LengthsLike | None = None
) -> Float[Array, "batch length heads value"]:
    """Attend by dense softmax; 0 at padding. Raises ValueError for shapes that do not fit."""
    q, k, v, n = _checked(q, k, v, lengths)
    one_block = SparseSpec(block=q.shape[1], causal=causal)
    return support.zero_padding(_attend_to_blocks(q, k, v, None, one_block, n), n)


def _checked(q, k, v, lengths):
    """Return the arrays with 0 as padding, and lengths. Raises ValueError for shapes that do not fit."""
    q, k, v = as_heads("q", q), as_heads("k", k), as_heads("v", v)
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"k and v have shapes {k.shape} and {v.shape}; with q they must be {(*q.shape[:3], 'any')}")
    lengths = as_lengths("lengths", lengths, q.shape[1], q.shape[0])
    return *(support.zero_padding(x, lengths) for x in (q, k, v)), lengths


def _cut(x: Float[Array, "batch length ..."], block: int) -> Float[Array, "batch blocks block ..."]:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _sorted(permutation, k, v, spec: SparseSpec, lengths):
    """Move blocks of keys and values to places, `[batch, place, slot, heads, width]`.

    The third result is the share of real residues in each slot, `[batch, heads, place, slot]`.
    """
    k, v = _cut(k, spec.block), _cut(v, spec.block)
    place = jnp.arange(k.shape[1] * spec.block)
    real = (place < lengths[:, None]).reshape(*k.shape[:3]).astype(permutation.dtype)
    share = jnp.einsum("bhij,bjs->bhis", permutation, real)
    share = jnp.where(share < _LEAST_SHARE, 0, share)

    def move(x):
        moved = jnp.einsum("bhij,bjshd->bhisd", permutation.astype(x.dtype), x, preferred_element_type=share.dtype)
        mean = support.divide(moved, jnp.broadcast_to(share[..., None], moved.shape))
        return mean.astype(x.dtype).transpose(0, 2, 3, 1, 4)

    return move(k), move(v), share


def _attend_to_blocks(q, k, v, moved, spec: SparseSpec, lengths):
    """Attend in one softmax to the own block and, if given, the sorted one: `moved` as `_sorted` returns it."""
    length = q.shape[1]
    q, k, v = (_cut(x, spec.block) for x in (q, k, v))
    slot = jnp.arange(spec.block)
    allowed = (jnp.arange(k.shape[1] * spec.block) < lengths[:, None]).reshape(k.shape[0], 1, -1, 1, spec.block)
    if spec.causal:
        allowed &= slot <= slot[:, None]
    logits = _logits("bishd,bithd->bhist", q, k)
    if moved:
        moved_k, moved_v, share = moved
        came = (share > 0)[:, :, :, None]
        to_moved = _logits("bishd,bithd->bhist", q, moved_k) + jnp.log(jnp.where(came, share[:, :, :, None], 1))
        allowed = jnp.concatenate([jnp.broadcast_to(x, logits.shape) for x in (allowed, came)], -1)
        logits, v = jnp.concatenate([logits, to_moved], -1), jnp.concatenate([v, moved_v], 2)
    out = jnp.einsum("bhist,bithd->bishd", _softmax(logits, allowed).astype(v.dtype), v)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _attend_to_first(q, moved_k, moved_v, share, blocks: int):
    """Attend by SortCut, `softmax(Q psi(K)[:n]^T) psi(V)[:n]`: all queries to the same n sorted blocks."""
    k, v = (x[:, :blocks].reshape(x.shape[0], -1, *x.shape[3:]) for x in (moved_k, moved_v))
    share = share[:, :, :blocks].reshape(*share.shape[:2], 1, -1)
    logits = _logits("bshd,bthd->bhst", q, k) + jnp.log(jnp.where(share > 0, share, 1))
    return jnp.einsum("bhst,bthd->bshd", _softmax(logits, share > 0).astype(v.dtype), v)


def _logits(product: str, q, k):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum(product, q, k, preferred_element_type=dtype) / math.sqrt(q.shape[-1])


def _softmax(logits, allowed):
    """Compute softmax over allowed entries; 0 in rows without any."""
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True, initial=_NEVER, where=allowed))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - top, 0)), 0)
    return support.divide(weights, jnp.broadcast_to(weights.sum(-1, keepdims=True), weights.shape))
