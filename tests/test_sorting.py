"""The sorting task: its data, what the model writes, and the run of a user."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eval as eval_program
from data import sorting
from data.sorting import SortingConfig, SortingStream
from evaluation import sorting as sorting_scores
from models.attention import BlockSpec, SparseSpec
from models.sorter import Sorter, SorterConfig, SortingObjective
from scripts import align
from tests.support import tiny

CONFIG = SortingConfig(batch_size=8, sequences=50, test_sequences=20, symbols=5, longest=6)
KINDS = ["sparse_sinkhorn", "local", "softmax"]


def all_batches():
    return [
        *map(SortingStream(CONFIG).__getitem__, range(3)),
        *(batch for split in sorting.EVALUATION_SPLITS for batch in sorting.evaluation_batches(CONFIG, split)),
    ]


def test_targets_are_the_symbols_in_order():
    for batch in all_batches():
        for x, y, target, length in zip(*(batch[name] for name in ("x", "y", "target", "length")), strict=True):
            symbols = x[: max(length - 1, 0)].tolist()
            assert all(1 <= symbol <= 5 for symbol in symbols)
            assert target[:length].tolist() == ([*sorted(symbols), 6] if length else [])
            assert x[:length].tolist() == ([*symbols, 6] if length else [])
            assert y[:length].tolist() == ([6, *sorted(symbols)] if length else [])
            assert not x[length:].any() and not y[length:].any() and not target[length:].any()


def test_lengths_are_those_of_the_split():
    for split, lengths in {"validation": (1, 6), "test_iid": (1, 6), "test_ood": (7, 12)}.items():
        found = [batch for batch in sorting.evaluation_batches(CONFIG, split)]
        length = np.concatenate([batch["length"][batch["id"] >= 0] - 1 for batch in found])
        assert (length.min(), length.max()) == lengths and len(length) == 20
        again = list(sorting.evaluation_batches(CONFIG, split))
        assert all((a[name] == b[name]).all() for a, b in zip(found, again, strict=True) for name in a)
    assert sum((batch["id"] >= 0).sum() for batch in sorting.evaluation_batches(CONFIG, "test_iid", limit=11)) == 11
    with pytest.raises(ValueError, match="allowed are validation, test_iid, test_ood"):
        next(sorting.evaluation_batches(CONFIG, "train"))


def test_an_epoch_holds_every_sequence_once_and_hosts_share_it():
    stream = SortingStream(CONFIG)
    first, second = ([stream[step]["id"].tolist() for step in range(n, n + 6)] for n in (0, 6))
    for epoch in (first, second):
        assert len({i for ids in epoch for i in ids}) == 48  # six batches of 8 fit into 50
    assert first != second
    halves = [SortingStream(CONFIG, shard_index=n, shard_count=2) for n in range(2)]
    assert [*halves[0][3]["id"], *halves[1][3]["id"]] == first[3]
    copy = pickle.loads(pickle.dumps(halves[1]))
    assert copy[3]["id"].tolist() == halves[1][3]["id"].tolist() and copy.fingerprint() == stream.fingerprint()
    other = SortingStream(dataclasses.replace(CONFIG, seed=1))
    assert other.fingerprint() != stream.fingerprint() and other[0]["x"].tolist() != stream[0]["x"].tolist()


def test_scores():
    batch = next(sorting.evaluation_batches(SortingConfig(batch_size=4, sequences=4, longest=3), "test_iid"))
    batch = batch | {"target": np.array([[1, 2, 3, 21], [4, 21, 0, 0], [5, 5, 21, 0], [7, 8, 9, 21]], np.int32)}
    written = np.array([[1, 2, 3, 21], [21, 0, 0, 0], [5, 6, 5, 0], [8, 9, 21, 0]], np.int32)
    assert sorting_scores.exact(written, batch).tolist() == [True, False, False, False]
    np.testing.assert_allclose(sorting_scores.edit_distances(written, batch), [0, 1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_the_decoder_would_say(kind):
    """Token by token with the whole written sequence before it: so no place saw a later one, or the padding."""
    spec = BlockSpec(kind, SparseSpec(block=3, steps=2))
    model = Sorter(SorterConfig(width=16, heads=2, depth=1, hidden=16), spec, 5, rngs=nnx.Rngs(0))
    model.out.bias[...] = jnp.array([-9, 0, 0, 0, 0, 0, -0.5])  # END, but not at once
    graph, params = nnx.split(model)
    batch = next(sorting.evaluation_batches(CONFIG, "test_ood"))
    x, length = jnp.asarray(batch["x"]), jnp.asarray(batch["length"])
    written = np.asarray(jax.jit(lambda p: nnx.merge(graph, p).write(x, length))(params))
    before = np.pad(written, ((0, 0), (1, 0)))[:, :-1]
    before[:, 0] = 6
    said = np.asarray(nnx.merge(graph, params)(x, jnp.asarray(before), length)).argmax(-1)
    going = np.cumsum(np.pad((written == 6) | (written == 0), ((0, 0), (1, 0)))[:, :-1], axis=1) == 0
    going &= np.arange(x.shape[1]) < batch["length"][:, None]
    assert going.sum() > 20
    np.testing.assert_array_equal(written[going], said[going])
    assert not written[~going].any()


def test_noise_only_while_training():
    task = SortingObjective(
        SorterConfig(width=16, heads=2, depth=1), BlockSpec("sparse_sinkhorn", SparseSpec(block=3)), 5
    )
    model, batch = task.make(nnx.Rngs(0)), {k: jnp.asarray(v) for k, v in SortingStream(CONFIG)[0].items()}
    seen = [task.augment(batch, jax.random.key(n)) for n in (0, 1)]
    losses = [float(task.value(task.totals(model, of))) for of in seen]
    assert losses[0] != losses[1]
    assert losses[0] == float(task.value(task.totals(model, seen[0])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SortingConfig(symbols=0), r"data\.symbols=0: allowed is an integer, 1 to"),
        (lambda: SortingConfig(sequences=5), r"data\.sequences=5: allowed is batch_size=128 or more"),
        (lambda: SorterConfig(depth=0), r"model\.depth=0: allowed is an integer, 1 to"),
        (lambda: BlockSpec("dense", SparseSpec()), r"attention\.kind='dense' must be one of sinkhorn, sparse_sinkhorn"),
        (
            lambda: SortingStream(CONFIG, shard_count=3),
            r"batch_size: 8 was given, allowed are multiples of",
        ),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_sorts_and_is_scored(tmp_path, capsys):
    """Two symbols are sorted after a few steps; eval.py finds what train.py logged on the same split."""
    options = {
        "total_steps": 120, "batch_size": 32, "data.sequences": 320, "data.symbols": 2, "data.longest": 3,
        "data.test_sequences": 64, "model.width": 32, "model.heads": 2, "model.depth": 1, "sparse.block": 2,
        "log.eval_pairs": 64, "log.eval_every": 120, "checkpoint.every": 60, "optimizer.learning_rate": 0.01,
        "optimizer.ema": 0.9, "log.wandb": "disabled",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    command = "train.py", f"--config={tiny.ROOT}/configs/sort_sinkhorn.py", f"--workdir={tmp_path}", *flags
    trained = tiny.program(*command)
    assert trained.returncode == 0, trained.stderr
    eval_program.main([f"--workdir={tmp_path}", "--split=validation"])
    assert "exact match, length 1-5" in capsys.readouterr().out
    report = json.loads((tmp_path / "eval_validation.json").read_text())
    overall = report["splits"]["validation"]["model"]["overall"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert overall["exact_match"]["value"] == logged["validation/exact_match"] > 0.9
    assert overall["edit_distance"]["value"] == pytest.approx(logged["validation/edit_distance"])
    (tmp_path / "a.fasta").write_text(">x\nMKV\n>y\nMKV\n")
    assert align.main([f"--workdir={tmp_path}", str(tmp_path / "a.fasta")]) == 1
    assert "was trained to sort" in capsys.readouterr().err
    assert eval_program.main([f"--workdir={tmp_path}", "--split=validation", f"--report={tmp_path / 'page'}"]) == 1
    assert "--report need a model that aligns" in capsys.readouterr().err
