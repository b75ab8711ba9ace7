"""Sparse Sinkhorn Attention against a construction of its own, residue by residue, and against what it must become."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from ot_attention import sparse
from ot_attention.sparse import SparseSpec, local_attention, softmax_attention, sparse_sinkhorn_attention

# One program compiles faster than its operations do one by one.
attend = jax.jit(sparse_sinkhorn_attention, static_argnums=4)
soft_permutation = jax.jit(sparse.soft_permutation, static_argnums=1)

HEADS, WIDTH, VALUE = 2, 6, 3


def problem(length, spec, seed=0, batch=2, dtype=np.float64):
    """q, k, v, scores."""
    rng = np.random.default_rng(seed)
    blocks = spec.blocks(length)
    shapes = (length, HEADS, WIDTH), (length, HEADS, WIDTH), (length, HEADS, VALUE), (HEADS, blocks, blocks)
    return [jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in shapes]


def dense(q, k, v, scores, spec, length):
    """One example in NumPy float64, every query by itself; all residues beyond `length` are never looked at."""
    q, k, v = (np.asarray(x, np.float64)[:length] for x in (q, k, v))
    blocks = -(-length // spec.block)
    out = np.zeros((length, *v.shape[1:]))
    for h in range(q.shape[1]):
        plan = balanced(np.asarray(scores, np.float64)[h, :blocks, :blocks] / spec.temperature, spec)
        for t in range(length):
            own = t // spec.block
            keys, values, weight = [], [], []

            def come(place, keys=keys, values=values, weight=weight, plan=plan, h=h):
                for slot in range(spec.block):
                    sources = [(j, j * spec.block + slot) for j in range(blocks) if j * spec.block + slot < length]
                    mass = sum(plan[place, j] for j, _ in sources)
                    if mass > 0:
                        total = plan[place].sum()
                        keys.append(sum(plan[place, j] * k[s, h] for j, s in sources) * total / mass)
                        values.append(sum(plan[place, j] * v[s, h] for j, s in sources) * total / mass)
                        weight.append(mass / total)

            if spec.sortcut:
                for place in range(min(spec.sortcut, blocks)):
                    come(place)
            else:
                come(own)
                last = t + 1 if spec.causal else min((own + 1) * spec.block, length)
                for s in range(own * spec.block, last):
                    keys.append(k[s, h])
                    values.append(v[s, h])
                    weight.append(1.0)
            logits = np.array([q[t, h] @ key for key in keys]) / np.sqrt(q.shape[-1]) + np.log(weight)
            out[t, h] = softmax(logits) @ np.array(values)
            if spec.mixture:
                seen = t + 1 if spec.causal else length
                out[t, h] += softmax(k[:seen, h] @ q[t, h] / np.sqrt(q.shape[-1])) @ v[:seen, h]
    return out


def balanced(scores, spec):
    """Balance by the definition; causal, every sum over the triangle and, of a column, down to the row at hand."""
    n = len(scores)
    if not spec.causal:
        for _ in range(spec.steps):
            scores = scores - logsumexp(scores, axis=0, keepdims=True)
            scores = scores - logsumexp(scores, axis=1, keepdims=True)
        return np.exp(scores)
    plan = np.array([[np.exp(scores[i, j]) if j < i else 0.0 for j in range(n)] for i in range(n)])
    for _ in range(spec.steps):
        plan = np.array([[plan[i, j] / (plan[: i + 1, j].sum() or 1) for j in range(n)] for i in range(n)])
        plan = np.array([row / (row.sum() or 1) for row in plan])
    return plan


SPECS = {
    "sorted": SparseSpec(block=4),
    "causal": SparseSpec(block=4, steps=2, causal=True),
    "sortcut": SparseSpec(block=4, sortcut=2),
    "mixture": SparseSpec(block=4, mixture=True),
    "causal mixture": SparseSpec(block=4, steps=3, causal=True, mixture=True),
    "block of 1": SparseSpec(block=1),
    "one block": SparseSpec(block=32),
}


@pytest.mark.parametrize("name", SPECS)
def test_agrees_with_the_dense_construction(name):
    spec = SPECS[name]
    with jax.enable_x64(True):
        arguments = problem(19, spec)
        for lengths in (None, (19, 11), (8, 1)):
            out = attend(*arguments, spec, None if lengths is None else jnp.array(lengths))
            assert out.dtype == jnp.float64
            for n, length in enumerate(lengths or (19, 19)):
                expected = dense(*(x[n] for x in arguments), spec, length)
                np.testing.assert_allclose(out[n, :length], expected, rtol=1e-10, atol=1e-12)
                assert (np.asarray(out[n, length:]) == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_float32_and_bfloat16(name):
    """Errors are those of rounding: of the inputs in bfloat16, and of what comes to a place."""
    spec = SPECS[name]
    arguments = problem(19, spec, dtype=np.float32)
    expected = np.zeros((2, 19, HEADS, VALUE))
    for n, length in enumerate((19, 11)):
        expected[n, :length] = dense(*(x[n] for x in arguments), spec, length)
    lengths = jnp.array([19, 11])
    exact = attend(*arguments, spec, lengths)
    np.testing.assert_allclose(exact, expected, atol=2e-6)
    *low, scores = arguments
    rounded = attend(*(x.astype(jnp.bfloat16) for x in low), scores, spec, lengths)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), expected, atol=0.06)


def test_sorted_by_the_identity_it_is_local_attention():
    spec = SparseSpec(block=4)
    with jax.enable_x64(True):
        q, k, v, scores = problem(16, spec)
        stay = jnp.broadcast_to(1e4 * jnp.eye(4), scores.shape)
        local = local_attention(q, k, v, spec)
        np.testing.assert_allclose(attend(q, k, v, stay, spec), local, atol=1e-12)
        for block in range(4):
            part = slice(4 * block, 4 * block + 4)
            alone = softmax_attention(q[:, part], k[:, part], v[:, part], causal=False)
            np.testing.assert_allclose(local[:, part], alone, atol=1e-12)


def test_sortcut_to_all_blocks_cuts_none():
    """A permutation moves keys, and dense attention does not care where they are."""
    with jax.enable_x64(True):
        q, k, v, _ = problem(16, SparseSpec(block=4))
        order = jnp.broadcast_to(1e4 * jnp.eye(4)[jnp.array([2, 0, 1, 3])], (2, HEADS, 4, 4))
        whole = softmax_attention(q, k, v, causal=False, lengths=jnp.array([16, 9]))
        for sortcut in (4, 7):
            spec = SparseSpec(block=4, sortcut=sortcut)
            np.testing.assert_allclose(attend(q, k, v, order, spec, jnp.array([16, 9])), whole, atol=1e-12)
        cut = attend(q, k, v, order, SparseSpec(block=4, sortcut=1))
        kept = softmax_attention(q[:, 8:12], k[:, 8:12], v[:, 8:12], causal=False)
        np.testing.assert_allclose(cut[:, 8:12], kept, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0.1, 5))
def test_soft_permutations_are_doubly_stochastic(blocks, seed, spread):
    scores = jnp.asarray(spread * np.random.default_rng(seed).normal(size=(1, 1, 12, 12)), jnp.float32)
    spec, lengths = SparseSpec(block=3, steps=200, temperature=1.0), jnp.array([3 * blocks])
    plan = np.asarray(soft_permutation(scores, spec, lengths))[0, 0]
    assert (plan[blocks:] == 0).all() and (plan[:, blocks:] == 0).all()
    np.testing.assert_allclose(plan.sum(1)[:blocks], 1, atol=1e-4)
    if spread < 2:  # sharper ones take longer
        np.testing.assert_allclose(plan.sum(0)[:blocks], 1, atol=0.02)


@pytest.mark.parametrize("changes", [{}, {"mixture": True}, {"block": 5}])
def test_no_causal_output_depends_on_later_residues(changes):
    """Follow gradients through attention and through a sort network that reads the same residues."""
    spec = dataclasses.replace(SparseSpec(block=4, steps=2, causal=True), **changes)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        length = 18
        x = jnp.asarray(rng.normal(size=(1, length, WIDTH)))
        a = jnp.asarray(rng.normal(size=(WIDTH, HEADS, WIDTH)))

        def outputs(x):
            places, blocks = sparse.pooled(x, spec, jnp.array([length]))
            scores = jnp.einsum("bid,dhe,bje->bhij", places, a, blocks)
            heads = jnp.broadcast_to(x[:, :, None], (1, length, HEADS, WIDTH))
            return attend(heads, heads, heads, scores, spec)[0]

        jacobian = np.abs(jax.jit(jax.jacobian(outputs))(x)).sum(
            (1, 2, 3, 5)
        )  # of outputs (t, head, value) by x (1, s, width)
        later = np.triu(np.ones((length, length), bool), 1)
        assert (jacobian[later] == 0).all()
        reached = jacobian > 0
        first_of_last_block = (length - 1) // spec.block * spec.block
        assert reached[-1, :first_of_last_block].all() and reached[-1, -1], "and it sees earlier blocks"


def test_causal_balancing_tends_to_the_shift_by_one():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 6, 6)), jnp.float32)
    for steps in (1, 7, 400):
        spec = SparseSpec(block=1, steps=steps, causal=True)
        plan = np.asarray(soft_permutation(scores, spec, jnp.array([6])))[0, 0]
        np.testing.assert_allclose(plan.sum(1), [0, 1, 1, 1, 1, 1], atol=1e-5)
        others = plan[np.tril_indices(6, -2)]
        assert (others > 0).all() and others.max() <= 1 / steps
    np.testing.assert_allclose(plan, np.eye(6, k=-1), atol=1 / 400)


def test_noise_is_that_of_the_example():
    spec = SPECS["sorted"]
    q, k, v, scores = problem(19, spec, dtype=np.float32, batch=3)
    keys, lengths = jax.random.split(jax.random.key(0), 3), jnp.array([19, 7, 12])
    noisy = attend(q, k, v, scores, spec, lengths, keys)
    assert np.abs(noisy - attend(q, k, v, scores, spec, lengths)).max() > 0.01
    alone = attend(*(x[2:] for x in (q, k, v, scores)), spec, lengths[2:], keys[2:])
    np.testing.assert_allclose(noisy[2:], alone, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_padding_reaches_nothing(name):
    """NaN there changes neither output nor gradient; an example without residues gives 0."""
    spec, lengths = SPECS[name], jnp.array([13, 0])
    q, k, v, scores = problem(19, spec, dtype=np.float32)

    def loss(q, k, v, scores):
        return (attend(q, k, v, scores, spec, lengths) ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    value, clean = gradient(q, k, v, scores)
    padding = (jnp.arange(19) >= lengths[:, None])[..., None, None]
    spoilt_value, spoilt = gradient(*(jnp.where(padding, jnp.nan, x) for x in (q, k, v)), scores)
    assert value == spoilt_value and np.isfinite(value)
    for a, b in zip(clean, spoilt, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sortcut", [None, 1])
@pytest.mark.parametrize("size", [10.0, 45.0, 1e4])
def test_slots_to_which_almost_nothing_comes(size, sortcut):
    """Two blocks change places, and the second has no residue to give for half of the slots."""
    spec, lengths = SparseSpec(block=4, sortcut=sortcut), jnp.array([6])
    *heads, _ = problem(8, spec, dtype=np.float32, batch=1)
    scores = jnp.broadcast_to(-size * jnp.eye(2), (1, HEADS, 2, 2))

    def loss(*arguments):
        return (attend(*arguments, spec, lengths) ** 2).sum()

    for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*heads, scores):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", ["sorted", "causal", "sortcut"])
def test_the_sort_network_gets_a_gradient(name):
    """Compare with finite differences."""
    spec, lengths = SPECS[name], jnp.array([19, 14])
    with jax.enable_x64(True):
        q, k, v, scores = problem(19, spec)

        def loss(scores):
            return (attend(q, k, v, scores, spec, lengths) ** 2).sum()

        direction = jnp.asarray(np.random.default_rng(9).normal(size=scores.shape))
        slope = (jax.grad(loss)(scores) * direction).sum()
        step = 1e-5
        difference = (loss(scores + step * direction) - loss(scores - step * direction)) / (2 * step)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseSpec(block=0), r"block=0 must be an integer of at least 1"),
        (lambda: SparseSpec(steps=0), r"steps=0"),
        (lambda: SparseSpec(sortcut=0), r"sortcut=0"),
        (lambda: SparseSpec(temperature=0.0), r"temperature=0\.0 must be a finite number above 0"),
        (lambda: SparseSpec(causal=True, sortcut=1), r"sortcut=1 with causal=True"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_that_do_not_fit():
    spec = SPECS["sorted"]
    q, k, v, scores = problem(19, spec, dtype=np.float32)
    with pytest.raises(ValueError, match=r"scores has shape .* with block=4 it must be \(2, 2, 5, 5\)"):
        sparse_sinkhorn_attention(q, k, v, scores[:, :, 1:], spec)
    with pytest.raises(ValueError, match="k and v have shapes"):
        sparse_sinkhorn_attention(q, k[:, 1:], v, scores, spec)
    with pytest.raises(ValueError, match="lengths has shape"):
        local_attention(q, k, v, spec, jnp.array([19]))
