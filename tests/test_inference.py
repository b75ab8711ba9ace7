"""alignment/inference.py: any lengths, batches, bands and modes, and that length costs no memory of its square."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignment import batching, inference, sequences
from alignment.columns import Aligned, columns_of, score_of
from alignment.inference import Pretrained
from alignment.sequences import Record
from data import vocab
from models import pair_hmm
from models.aligner import Aligner, AlignerConfig
from models.attention import specs_of
from models.decoding import LEAST_THRESHOLD, NO_MATCH
from ot_attention import support, transport_plan
from scripts import align
from tests.support.prior_aligner import FRAGMENT, HBA, HBB, config, initial, pairs_of


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return initial(config())


def program_of(model: Pretrained, shape: batching.Shape) -> tuple[Callable, dict]:
    """Return the function that aligns batches of a shape, and a batch."""
    sequence = {"tokens": np.ones(9, np.int32), "vectors": np.zeros((9, 8), np.float32)}
    batch = batching.padded([sequence], [sequence], shape)
    return functools.partial(inference._compute, model.graph, inference._Way(shape.band, "glocal", None)), batch


def prediction(model: Pretrained, x: np.ndarray, y: np.ndarray, **options: object) -> inference.Prediction:
    ((_, found),) = model.predict([(x, y)], **options)
    return found


def test_score_is_that_of_needleman_wunsch(model):
    import parasail

    (found,) = model.align([tuple(vocab.encode(s.encode()) for s in (HBA, HBB))])
    aligned = Aligned("", Record("x", "", HBA), Record("y", "", HBB), *found)
    x, y = columns_of(aligned)[2:4]
    cigar = parasail.nw_trace_striped_16(x.replace("-", ""), y.replace("-", ""), 11, 1, parasail.blosum62)
    assert score_of(columns_of(aligned)) <= cigar.score
    best = Aligned(
        "",
        aligned.x,
        aligned.y,
        np.array(pairs_of(cigar.traceback.query, cigar.traceback.ref)),
        np.ones(200),
        1.0,
        *[np.ones(200)] * 2,
    )
    best = best._replace(confidence=np.ones(len(best.pairs)))
    assert score_of(columns_of(best)) == cigar.score


def test_identical_sequences_are_aligned_residue_by_residue(model):
    tokens = vocab.encode(HBB.encode())
    (found,) = model.align([(tokens, tokens)])
    np.testing.assert_array_equal(found.pairs, np.arange(len(HBB))[:, None].repeat(2, 1))
    assert found.confidence.mean() > 0.95 and found.probability > 0.95
    assert max(found.x_alone.mean(), found.y_alone.mean()) < 0.05


def test_a_model_of_plans_aligns_by_its_plan():
    """Compare with the dense plan of the reference; about homology such a model says nothing."""
    settings = {"width": 16, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8, "value_width": 8}
    settings |= {"plan_gain": 1e-3, "positions": False, "substitution_prior": True}
    spec, _ = specs_of({"attention": {"base_steps": 10, "band": 64, "dustbin": "full"}})
    graph, params = nnx.split(Aligner(AlignerConfig(**settings), spec, rngs=nnx.Rngs(0)))
    model = Pretrained(graph, nnx.to_pure_dict(params), spec.band)
    x, y = vocab.encode(HBA.encode()), vocab.encode(HBB.encode())
    lengths = np.array([len(x)], np.int32), np.array([len(y)], np.int32)

    @jax.jit
    def of_reference(x, y, x_length, y_length):
        aligner = nnx.merge(model.graph, model.params)
        (given,) = aligner.attention_inputs(x, y, x_length, y_length)["plan"]
        plan = transport_plan(given.q, given.k, given.spec, *given.lengths, given.dustbin_score)
        return plan[:, 0, : x.shape[1], : y.shape[1]]

    dense = np.asarray(of_reference(x[None], y[None], *lengths))[0]
    whole = prediction(model, x, y, band=64)
    np.testing.assert_allclose(whole.plan.dense(), dense, atol=1e-4)
    np.testing.assert_allclose(whole.posterior.dense(), dense, atol=1e-4)
    (found,) = model.align([(x, y)], band=64)
    np.testing.assert_allclose(found.confidence, dense[tuple(found.pairs.T)], atol=1e-4)
    assert (found.pairs[:, 1] == whole.match[found.pairs[:, 0]]).all() and len(found.pairs) > 120
    assert math.isnan(found.probability) and math.isnan(found.log_odds)
    picture, scale = whole.plan.picture(50)
    assert scale == 3 and picture.shape == (48, 49)
    assert picture.max() == pytest.approx(dense.max(), abs=1e-4)


def test_gap_costs_of_residues_reach_both_sides():
    """Compare with the posterior of all pairs, whose offsets of x and y differ."""
    of = initial(config(contextual_gaps=True))
    of.params["gap_projection"]["kernel"] += np.linspace(-2, 2, 16)[:, None]
    x, y = vocab.encode(HBA.encode()), vocab.encode(HBB.encode())
    (found,) = of.align([(x, y)])
    lengths = jnp.array([len(x)]), jnp.array([len(y)])

    @jax.jit
    def posterior(params, x, y, swapped):
        weight, gaps = nnx.merge(of.graph, params).pair(x, y, *lengths)
        x_offset = jnp.where(swapped, gaps.y_offset[:, : x.shape[1]], gaps.x_offset)
        problem = pair_hmm.of_all_pairs(weight, *lengths)
        return pair_hmm.unskewed(pair_hmm.posterior(problem, gaps._replace(x_offset=x_offset))[1], y.shape[1])

    expected, other = (np.asarray(posterior(of.params, x[None], y[None], swapped))[0] for swapped in (False, True))
    of_pairs = tuple(found.pairs.T)
    np.testing.assert_allclose(found.confidence, expected[of_pairs], atol=1e-4)
    assert np.abs(expected - other)[of_pairs].max() > 0.01


def test_matches_below_half_of_the_expected_f1_are_left_out(model):
    """Most matches are certain, so that the least threshold is far below; around the missing piece some are likely."""
    found = prediction(model, *(vocab.encode(s.encode()) for s in (HBA, HBB[:60] + HBB[80:])))
    posterior = found.posterior.dense()
    aligned = np.flatnonzero(found.match != NO_MATCH)
    confidence = posterior[aligned, found.match[aligned]]
    threshold = confidence.sum() / (len(aligned) + posterior.sum())
    assert confidence.min() > threshold - 0.01 > 0.3
    assert ((posterior > LEAST_THRESHOLD) & (posterior < threshold - 0.01)).any()


def test_a_batch_is_aligned_as_each_pair_is(model):
    """Lengths need several programs and batches; results come in the order given."""
    rng = np.random.default_rng(0)
    whole = [vocab.encode(s.encode()) for s in (HBA, HBB, HBB[5:])]
    pairs = [(whole[i], whole[j]) for i, j in rng.integers(0, 3, (5, 2))]
    pairs.insert(2, (whole[0], vocab.encode(FRAGMENT.encode())))
    counts: list[int] = []
    together = model.align(pairs, done=counts.append)
    assert sum(counts) == len(pairs) == len(together)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = model.align([pair])
        np.testing.assert_array_equal(found.pairs, alone.pairs)
        np.testing.assert_allclose(found.confidence, alone.confidence, atol=1e-3)


def test_a_domain_is_found_anywhere_in_a_long_sequence(model):
    """Farther from the diagonal than the band of training reaches."""
    rng = np.random.default_rng(1)
    flank = rng.integers(1, 21, 300).astype(np.int32)
    x, y = vocab.encode(HBA.encode()), vocab.encode(HBB.encode())
    for left, right in ((0, 300), (300, 0), (150, 150)):
        embedded = np.concatenate([flank[:left], y, flank[300 - right :]]) if left + right else y
        (found,) = model.align([(x, embedded)])
        inside = (found.pairs[:, 1] >= left) & (found.pairs[:, 1] < left + len(y))
        assert inside.mean() > 0.9 and len(found.pairs) > 110


def test_memory_grows_with_the_length_alone(model):
    """The program for two sequences of 6,000 residues never holds as much as all pairs of them would take."""
    program, batch = program_of(model, batching.Shape(1, 6144, 6144, 256))
    compiled = jax.jit(program).lower(model.params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 6144 * 6144
    rng = np.random.default_rng(2)
    x = rng.integers(1, 21, 1500).astype(np.int32)
    y = np.where(rng.random(1500) < 0.3, rng.integers(1, 21, 1500), x).astype(np.int32)
    plan = prediction(model, x, y).plan
    assert plan.values.shape == (2 * 1536 - 1, inference.BAND)
    (found,) = model.align([(x, y)])
    assert (found.pairs[:, 0] == found.pairs[:, 1]).mean() > 0.98
    (part,) = model.align([(x[:140], y[:140])])
    assert found.confidence.mean() > part.confidence.mean() - 0.02, "longer pairs are not less sure"


def test_sequences_are_encoded_once(model):
    """Vectors do not depend on the sequences beside them either, so that a run that goes on gives the same bytes."""
    seen = []

    def counted(function):
        compiled = jax.jit(function)
        is_encoder = function.func is inference._encode

        def run(params, batch):
            if is_encoder:
                seen.extend(int(n) for n in batch["x_length"] if n)
            return compiled(params, batch)

        return run

    rng = np.random.default_rng(3)
    some = [rng.integers(1, 21, n).astype(np.int32) for n in (40, 50, 60, 70)]
    pairs = [(x, y) for x in some for y in some]
    counting = dataclasses.replace(model, compile=counted, programs={})
    found = [of for chunk in counting.align_chunks([pairs[:5], pairs[5:]]) for of in chunk]
    assert sorted(seen) == [40, 50, 60, 70] and len(found) == 16
    encoder = inference._Encoder(model)
    encoder.see(pairs)
    alone = inference._Encoder(model)
    alone.see(pairs[:1])
    np.testing.assert_array_equal(encoder.arrays(some[0])["vectors"], alone.arrays(some[0])["vectors"])


def test_the_estimate_of_memory_is_that_of_the_compiler(model):
    for shape in (
        batching.Shape(1, 1024, 1024, None),
        batching.Shape(1, 1536, 1536, 256),
        batching.Shape(2, 768, 768, None),
    ):
        program, batch = program_of(model, shape)
        found = jax.jit(program).lower(model.params, batch).compile().memory_analysis().temp_size_in_bytes
        assert 0.6 < batching.memory(shape, shape.batch, plan=False) / found < 1.7


def test_the_longest_sequences_are_aligned(model):
    """Padding may not exceed what the arithmetic of the band allows."""
    assert batching.bucket(sequences.MAX_LENGTH) == support.LONGEST_BANDED
    for length in (49_153, 50_000, 65_536):
        assert batching.bucket(length) == 65_536
    shape = batching.shape_of(1_000_000, 999_999, inference.BAND)
    program, batch = program_of(model, shape)
    shapes = {name: jax.ShapeDtypeStruct(of.shape, of.dtype) for name, of in batch.items()}
    assert jax.eval_shape(program, model.params, shapes).decoded.match.shape == (1, 1 << 20)


def test_lengths_are_checked(model):
    one = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="pair 0, y: 0 residues were given, allowed are 1 to 16777216"):
        model.align([(one, one[:0])])


def test_long_pairs_have_a_band(model):
    assert (
        model.band_for(1000, 1024) is None and model.band_for(1, 1025) == model.band_for(9000, 40_000) == inference.BAND
    )
    of_plans = dataclasses.replace(model, params={}, band=64)
    for x_length, y_length in ((1, 1), (150, 170), (1500, 1520), (300, 2500), (5000, 5000), (5, 40_000)):
        band = of_plans.band_for(x_length, y_length)
        assert band is None or band >= abs(x_length - y_length)
    assert of_plans.band_for(5000, 5000) == of_plans.band_for(1500, 1520) == 64
    assert of_plans.band_for(20_000, 40_000) * 40_000 <= inference.MAX_CELLS


def test_modes_differ_at_the_ends(model):
    """A short overhang is aligned along in mode global, where it would cost as a gap does, and not for nothing."""
    rng = np.random.default_rng(4)
    core, *ends = (rng.integers(1, 21, n).astype(np.int32) for n in (60, 40, 40))
    x, y = np.concatenate([ends[0], core]), np.concatenate([ends[1], core])
    counts = {mode: len(model.align([(x, y)], mode=mode)[0].pairs) for mode in inference.MODES}
    assert counts["global"] >= counts["glocal"] and counts["local"] <= counts["glocal"] and counts["glocal"] >= 58
    probabilities = {model.align([(x, y)], mode=mode)[0].probability for mode in inference.MODES}
    assert len(probabilities) == 1, "homology is judged in mode glocal"
    assert align._MODES == inference.MODES
    with pytest.raises(ValueError, match="mode: 'semiglobal' was given, allowed are global, glocal, local"):
        model.align([(x, y)], mode="semiglobal")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 96, 97, 129, 5000, 46_081, 50_000, 1 << 24])
def test_buckets_hold_their_lengths_and_are_few(length):
    assert length <= batching.bucket(length) < max(65, 1.51 * length)
    assert len({batching.bucket(n) for n in range(1, 5001)}) == 14
