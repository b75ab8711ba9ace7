"""Rows of joined sequences: how they are filled, that no sequence sees another one, and a run that learns from them."""

import dataclasses
import hashlib
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import command_line
import train
from configs import long_context
from data import vocab
from data.masked import SequenceConfig, assemble, training_stream
from evaluation import tasks
from models import attention
from models.attention import BlockSpec, SinkhornSpec, SparseSpec
from models.encoder import Encoder, EncoderConfig, convolved
from models.masked import MaskedLossConfig, MaskedObjective
from tests.support import small_sequences

CONFIG = SequenceConfig(batch_size=6, buckets=(60, 500), seed=3, join=True)
SMALL = EncoderConfig(width=8, depth=1, kernel=5, heads=2, attention_every=1)
LENGTHS = 23, 1, 40, 17, 2, 30


# ---- rows ----


def test_a_row_is_filled_with_whole_sequences_and_the_last_is_a_window(source):
    stream, number = training_stream(source, CONFIG), {source[n].tobytes(): n for n in range(len(source))}
    whole, windows = 0, set()
    for step in range(20):
        batch = stream[step]
        for x, length, first, segments in zip(
            *(batch[name] for name in ("x", "length", "id", "segments")), strict=True
        ):
            assert x.shape == segments.shape == (500,) and length in (499, 500), "a row is full"
            np.testing.assert_array_equal(x != vocab.PAD, segments > 0)
            edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
            starts, ends = edges[::2], edges[1::2]
            np.testing.assert_array_equal(starts[1:], ends[:-1] + 1, err_msg="one place lies between two sequences")
            assert starts[0] == 0 and ends[-1] == length
            assert segments[starts].tolist() == list(range(1, len(starts) + 1))
            *complete, last = (x[a:b].astype(np.uint8).tobytes() for a, b in zip(starts, ends, strict=True))
            assert number[complete[0]] == first and all(part in number for part in complete)
            whole += len(complete)
            of = [text for text in number if last in text]
            assert of, "no window of a sequence"
            windows.add((of[0].startswith(last), of[0].endswith(last)))
    assert whole > 400 and windows > {(True, False), (False, True)}


def test_a_longer_sequence_than_a_row_fills_it(source):
    stream = training_stream(source, dataclasses.replace(CONFIG, buckets=(35,), batch_size=40))
    batch = stream[0]
    alone = batch["segments"].max(1) == 1
    assert alone.any() and (batch["length"] >= 34).all()
    for x, n in zip(batch["x"][alone], batch["id"][alone].tolist(), strict=True):
        assert x[x > 0].astype(np.uint8).tobytes() in source[n].tobytes()


def test_rows_are_the_same_for_any_hosts_and_after_pickling(source):
    stream = training_stream(source, CONFIG)
    parts = [training_stream(source, CONFIG, shard_index=n, shard_count=3) for n in range(3)]
    parts[1] = pickle.loads(pickle.dumps(parts[1]))
    for step in (0, 7, 2**33):
        whole, cut = stream[step], [part[step] for part in parts]
        assert all((np.concatenate([part[name] for part in cut]) == whole[name]).all() for name in whole)
    assert {part.fingerprint() for part in parts} == {stream.fingerprint()}
    assert len({row.tobytes() for step in range(3) for row in stream[step]["x"]}) == 18, "rows and steps differ"
    other = training_stream(source, dataclasses.replace(CONFIG, seed=4))
    assert other.fingerprint() != stream.fingerprint() and (other[0]["x"] != stream[0]["x"]).any()
    largest = stream.largest()
    assert {name: (x.shape, x.dtype) for name, x in largest.items()} == {
        name: (x.shape, x.dtype) for name, x in whole.items()
    }
    assert "joined to rows of 500 places" in stream.description()


def test_batches_of_single_sequences_are_the_stream_of_earlier_versions(source):
    config = dataclasses.replace(CONFIG, join=False)
    stream = training_stream(source, config)
    digest = hashlib.sha256(repr(("sequences", (60, 500), 6, 3)).encode())
    digest.update(source.lengths.tobytes() + source.first.tobytes())
    assert stream.fingerprint() == digest.hexdigest()[:16] != training_stream(source, CONFIG).fingerprint()
    assert "segments" not in stream[0] and "segments" not in stream.largest()


def test_every_sequence_is_as_likely_as_another(source):
    stream = training_stream(source, CONFIG)
    rows = [stream._endless(np.random.default_rng(n)) for n in range(300)]
    drawn = np.bincount([next(row) for row in rows for _ in range(48)], minlength=len(source))
    expected = 300 * 48 / len(source)  # some 25
    assert drawn.min() > expected / 5 and drawn.max() < 3 * expected
    assert drawn[source.lengths < 60].mean() == pytest.approx(drawn[source.lengths > 100].mean(), rel=0.2)


# ---- no sequence sees another one ----


def joined() -> tuple[dict, dict]:
    """One row of sequences, and the same sequences in rows of their own, with the same residues hidden."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 21, length).astype(np.uint8) for length in LENGTHS]
    alone = assemble(sequences, np.arange(len(LENGTHS)), 64)
    row = {name: np.zeros((1, 128), np.int32) for name in ("x", "seen", "chosen", "segments")}
    apart = {"x": alone["x"], "seen": alone["x"].copy(), "chosen": np.zeros_like(alone["x"])}
    start = 0
    for n, length in enumerate(LENGTHS):
        apart["chosen"][n, :length] = rng.random(length) < 0.4
        apart["seen"][n] = np.where(apart["chosen"][n], vocab.MASK, alone["x"][n])
        for name, x in apart.items():
            row[name][0, start : start + length] = x[n, :length]
        row["segments"][0, start : start + length] = n + 1
        start += length + 1
    for batch, length in ((row, np.array([start - 1], np.int32)), (apart, alone["length"])):
        batch |= {"chosen": batch["chosen"] > 0, "length": length}
    return jax.tree.map(jnp.asarray, (row, apart))


@pytest.mark.parametrize(
    ("implementation", "tau"),
    [
        ("reference", 1.0),
        pytest.param("reference", 0.9, marks=pytest.mark.slow),
        pytest.param("xla", 1.0, marks=pytest.mark.slow),
        ("xla", 0.9),
    ],
)
def test_a_row_has_the_features_loss_and_gradient_of_its_sequences(implementation, tau):
    spec = SinkhornSpec(band=8, base_steps=3, tail_steps=1, tau_a=tau, tau_b=tau)
    model = dataclasses.replace(SMALL, implementation=implementation)
    objective = MaskedObjective(model, spec, MaskedLossConfig(0.3))
    graph, params = nnx.split(objective.make(nnx.Rngs(0)))
    row, apart = joined()

    @jax.jit
    def compute(params, batch):
        def loss(params):
            totals = objective.totals(nnx.merge(graph, params), batch)
            return objective.value(totals), totals

        encoder = nnx.merge(graph, params).encoder
        features = encoder(batch["seen"], batch["length"], segments=batch.get("segments"))
        return features, jax.value_and_grad(loss, has_aux=True)(params)

    features, ((value, totals), gradient) = compute(params, row)
    expected, ((value_apart, totals_apart), gradient_apart) = compute(params, apart)
    real = np.arange(64) < np.asarray(apart["length"])[:, None]
    np.testing.assert_allclose(features[row["segments"] > 0], expected[real], rtol=0, atol=2e-5)
    assert value == pytest.approx(float(value_apart), rel=1e-5)
    assert objective.residues(row) == objective.residues(apart) == sum(LENGTHS)
    for name, x in totals.items():
        assert x == pytest.approx(float(totals_apart[name]), rel=1e-5), name
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient_apart))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(("kernel", "dilation"), [(5, 16), (3, 1), (4, 3), (1, 1)])
def test_the_convolution_of_one_segment_is_the_layers(kernel, dilation):
    layer = nnx.Conv(6, 6, (kernel,), kernel_dilation=(dilation,), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x = jax.random.normal(jax.random.key(1), (2, 40, 6))
    ones = jnp.ones((2, 40), jnp.int32)
    np.testing.assert_allclose(convolved(layer, x, ones), layer(x), rtol=0, atol=5e-6)
    cut = jnp.where(jnp.arange(40) < 19, 1, 2)
    found = convolved(layer, x, jnp.stack([cut, cut]))
    np.testing.assert_allclose(found[:, :19], layer(x[:, :19]), rtol=0, atol=5e-6)
    np.testing.assert_allclose(found[:, 19:], layer(x[:, 19:]), rtol=0, atol=5e-6)


def test_the_convolution_of_bfloat16_is_as_near_as_the_layers():
    layer = nnx.Conv(16, 16, (5,), kernel_dilation=(1,), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 40, 16), jnp.bfloat16)
    found, own = convolved(layer, x, jnp.ones((2, 40), jnp.int32)), layer(x)
    assert found.dtype == own.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), own.astype(np.float32), atol=0.02)


def test_padding_is_never_chosen_to_be_predicted(source):
    objective = MaskedObjective(SMALL, SinkhornSpec(), MaskedLossConfig(0.9))
    batch = {name: jnp.asarray(x) for name, x in training_stream(source, CONFIG)[0].items() if name != "id"}
    augmented = objective.augment(batch, jax.random.key(0))
    between = np.asarray(batch["segments"]) == 0
    assert between.sum() > 20 and not np.asarray(augmented["chosen"])[between].any()
    assert (np.asarray(augmented["seen"])[between] == vocab.PAD).all()
    assert objective.residues(augmented) == (~between).sum()


# ---- rotary positions ----


def test_products_depend_on_the_difference_of_places_at_any_place():
    """The angles of positions in float32, which are off by .0055 at 131,000, fail."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal(36).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x) for x in (q, k))
    turn = jax.device_get(jax.jit(attention.angles_of_places, static_argnums=(0, 1))(131_072, 18))

    def products(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        rows, columns = (
            np.asarray(attention.turned(jnp.tile(x, (1, len(n), 1, 1)), attention.Turn(*(part[:, n] for part in turn))))
            for x, n in ((q, i), (k, j))
        )
        return (rows.astype(np.float64) * columns).sum(-1)[0, :, 0]

    i, by = rng.integers(64, 131_008, 2000), rng.integers(-64, 65, 2000)
    np.testing.assert_allclose(products(i, i + by), products(np.full(2000, 64), 64 + by), rtol=0, atol=6e-5)


def test_angles_of_the_first_places_are_those_of_float32_positions():
    position = jnp.arange(1500, dtype=jnp.float32)[None]
    exact = np.arange(1500)[:, None] * 1000.0 ** (-np.arange(5) / 5)
    for length in (7, 1024, 1500):
        turn, old = attention.angles_of_places(length, 5), attention.angles(position[:, :length], 5)
        for part, before, of in zip(turn, old, (np.sin, np.cos), strict=True):
            assert part.shape == (1, length, 1, 5)
            np.testing.assert_array_equal(part[:, :1024], before[:, :1024])
            np.testing.assert_allclose(part[0, :, 0], of(exact[:length]), rtol=0, atol=1e-4)


# ---- what would mix the sequences is refused ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention.kind": "softmax"}, "attention.kind='softmax' would mix the sequences of a row; set"),
        ({"attention.kind": "local"}, "attention.kind='local' would mix"),
        ({"attention.dustbin": "full"}, "attention.dustbin='full' would couple the sequences of a row; set"),
    ],
)
def test_attention_that_would_mix_sequences_is_refused(built, tmp_path, capsys, changes, told):
    config = small_run(built, **changes)
    assert command_line.run("train.py", lambda: train.train(config, tmp_path / "run") and None) == 1
    assert told in (line := capsys.readouterr().err) and line.count("\n") == 1 and list(tmp_path.iterdir()) == []
    for other in ({"data.join": False}, {"model.attention_every": 0}):
        tasks.task_of(tasks.checked(small_run(built, **changes, **other))).objective()


def test_an_encoder_of_another_attention_takes_no_segments():
    encoder = Encoder(SMALL, BlockSpec("softmax", SparseSpec(block=4)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"attention\.kind='softmax' would mix the sequences of a row"):
        encoder(jnp.ones((1, 8), jnp.int32), jnp.array([8]), segments=jnp.ones((1, 8), jnp.int32))


# ---- a run ----


def small_run(built, **changes) -> ConfigDict:
    options = {
        "total_steps": 20, "batch_size": 4, "data.dir": str(built), "data.buckets": (112, 600), "model.width": 16,
        "model.depth": 1, "model.kernel": 3, "model.attention_every": 1, "attention.band": 8, "attention.base_steps": 4,
        "mesh.sequence": 1, "log.every": 1, "log.eval_every": 20, "log.eval_pairs": 8, "log.wandb": "disabled",
        "checkpoint.every": 20, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 2, "optimizer.ema": 0.8,
    }  # fmt: skip
    config = long_context.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(options | changes)
    return config


def test_a_run_learns_from_joined_rows_and_is_validated_on_single_sequences(tmp_path, capsys):
    """Sequences of two residues in turn: what is masked can be told from the neighbours."""
    rng = np.random.default_rng(0)
    repeats = {f"r{n}": ("AW" * 100)[: rng.integers(40, 100)] + "A" * (n % 7) for n in range(400)}
    repeats = {name: x for x, name in {x: name for name, x in repeats.items()}.items()}
    built = small_sequences.build(repeats, tmp_path)
    train.train(small_run(built), tmp_path / "run", quiet=True)
    assert "joined to rows of 600 places" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 20 and losses[0] > 2 and losses[-1] < 0.7
    assert rows[-1]["validation/perplexity"] < 2.5
