"""Devices that share sequences train as one does, and nothing gathers a sequence; other meshes resume the run."""

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

import train
from configs import aligner, pretrain, r2_balanced, sort_sinkhorn
from evaluation import tasks
from tests.support import small_sequences, tiny
from tests.support.processes import finish, sequence_config, start
from training import run_folder, sharding

# As in test_sharding.py: sums in another order, which later steps amplify.
ROUNDING = 5e-6

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from benchmarks import roofline
from evaluation import masked, runs
from tests.support import processes as shared
from training import sharding

settings, meshes = shared.sequence_config(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
batch = shared.sequence_batch(settings.data.join)
for mesh_of in meshes:
    mesh = sharding.make_mesh(sharding.MeshConfig(*mesh_of), settings.batch_size)
    trainer = runs.make_trainer(settings)
    state = trainer.initial_state(mesh)
    given = {name: x for name, x in batch.items() if name != "id"}
    shapes = sharding.abstract(given, settings.batch_size, mesh)
    update = trainer.compiled_update(mesh).lower(trainer.abstract_state(mesh), shapes).compile()
    losses = []
    for _ in range(3):
        state, metrics = jax.block_until_ready(update(state, sharding.from_hosts(given, mesh)))
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    single = {name: batch[name] for name in ("x", "length", "id")}
    predict = trainer.compiled_evaluation(masked.predictor(trainer), mesh)
    sums = predict(trainer.initial_state(mesh).params, single)
    text = update.as_text()
    sizes = {int(n) for shape in re.findall(r"\\b[a-z]+\\d+\\[([\\d,]+)\\]", text) for n in shape.split(",")}
    print(json.dumps({
        "losses": losses, "validation": {name: x.tolist() for name, x in sums.items()},
        "collectives": {of.kind: of.bytes for of in roofline.collectives(text, mesh.size)},
        "whole": sorted(size for size in sizes if size >= shared.PLACES),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }))
"""


def trained(settings: dict, meshes: list) -> list[dict]:
    (printed,) = finish(start("-c", PROGRAM, json.dumps(settings), json.dumps(meshes), devices=8), patience=600)
    return [json.loads(line) for line in printed.splitlines()]


def check(one: dict, shared: dict) -> None:
    np.testing.assert_allclose(shared["losses"], one["losses"], rtol=ROUNDING)
    for name, of_one in one["validation"].items():
        np.testing.assert_allclose(shared["validation"][name], of_one, rtol=1e-5, err_msg=name)
    assert shared["whole"] == [] != one["whole"], "a device holds an array of the length of a sequence"


JOINED = {"data.join": True, "attention.tau_a": 0.9, "attention.tau_b": 0.9}


def test_devices_that_share_sequences_train_as_one():
    one, eight = trained(JOINED | {"model.depth": 1, "model.attention_every": 1}, [(1, 1, 1), (2, 1, 4)])
    check(one, eight)
    assert eight["collectives"].keys() == {"all-reduce", "collective-permute"}
    # Gradients, metrics, and the few bytes by which devices agree on the steps.
    assert eight["collectives"]["all-reduce"] < 3 * 4 * eight["parameters"] + 2000


@pytest.mark.slow
@pytest.mark.parametrize("settings", [JOINED, {"attention.dustbin": "full"}, {"attention.tolerance": 1e-3}])
def test_every_mesh_trains_as_one_device(settings):
    one, *others = trained(settings, [(1, 1, 1), (1, 1, 8), (2, 1, 4), (1, 2, 4)])
    for shared in others:
        check(one, shared)
        assert "all-to-all" not in shared["collectives"]
    for shared in others[:2]:
        assert shared["collectives"].keys() == {"all-reduce", "collective-permute"}


@pytest.mark.slow
def test_a_run_is_resumed_on_another_mesh(tmp_path):
    """Through train.py, with validation: eight devices, and two of its four steps made again on one."""
    sequences = small_sequences.random_sequences(400, longest=120)
    built = small_sequences.build(sequences, tmp_path)
    options = {
        "data.dir": str(built), "data.buckets": (128,), "total_steps": 4, "checkpoint.every": 2, "checkpoint.keep": 3,
        "log.every": 1, "log.eval_every": 2, "log.eval_pairs": 8, "attention.band": 16, "mesh.data": 1,
        "optimizer.learning_rate": 1e-4,
    }  # fmt: skip
    settings = sequence_config(**options)
    changes = run_folder.differences(pretrain.get_config().to_dict(), settings.to_dict())
    flags = [f"--config.{key}={new}" for key, old, new in changes if old != {}]  # the others have their defaults
    eight, one = tmp_path / "eight", tmp_path / "one"
    command = [tiny.ROOT / "train.py", f"--config={tiny.ROOT / 'configs/pretrain.py'}", *flags, "--quiet"]
    finish(start(*command, f"--workdir={eight}", "--config.mesh.sequence=8", devices=8), patience=600)
    shutil.copytree(eight, one)
    shutil.rmtree(one / "checkpoints/4")
    train.train(settings, one, quiet=True)
    rows = [{}, {}]
    for found, folder in zip(rows, (eight, one), strict=True):
        for row in run_folder.read_metrics(folder):
            found.setdefault(row["step"], {}).update(row)
    assert list(rows[0]) == list(rows[1]) == [0, 1, 2, 3, 4]
    for step in (3, 4):
        same = [name for name in rows[0][step] if name in ("loss", "gradient_norm") or name.startswith("validation/")]
        assert "loss" in same and (step == 3 or "validation/cross_entropy" in same)
        np.testing.assert_allclose(
            *([row[step][name] for name in same] for row in rows), rtol=ROUNDING, err_msg=str(step)
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.buckets": (64, 100)}, r"data\.buckets=100: with mesh\.sequence=8 allowed are multiples of 8"),
        (
            {"attention.band": 55},
            r"mesh\.sequence=8 leaves 54 places of data\.buckets=432 to a device: attention\.band=55 needs at least 55",
        ),
        ({"model.kernel": 111}, r"model\.kernel=111 with model\.dilations=1 needs at least 55"),
        ({"attention.band": -1}, r"mesh\.sequence=8: attention\.band=-1, which needs whole sequences; allowed are"),
        ({"attention.kind": "local"}, r"mesh\.sequence=8: attention\.kind='local', which needs whole sequences"),
    ],
)
def test_what_devices_cannot_share_is_refused(changes, named):
    settings = sequence_config(**{"mesh.sequence": 8, "model.dilations": 1} | changes)
    with pytest.raises(ValueError, match=named):
        tasks.task_of(settings).check_mesh()


def test_neighbours_along_a_sequence_share_a_link():
    chips = [mock.Mock(jax.Device, process_index=0, coords=(n % 2, n // 2, 0)) for n in range(8)]  # of a v6e-8
    places = np.array([chip.coords for chip in sorted(chips, key=sharding._along_the_links)])
    assert (np.abs(np.diff(places, axis=0)).sum(axis=1) == 1).all()


def test_without_attention_only_convolutions_must_fit():
    for changes in {"attention.band": -1, "model.attention_every": 0}, {"attention.band": 54}:
        tasks.task_of(sequence_config(**{"mesh.sequence": 8} | changes)).check_mesh()


@pytest.mark.parametrize("base", [r2_balanced, aligner, sort_sinkhorn])
def test_pairs_and_sorted_symbols_are_not_shared(base):
    settings = base.get_config()
    settings.mesh.sequence = 2
    with pytest.raises(ValueError, match=r"mesh\.sequence=2: allowed is 1 for a model that is trained to (align|sort)"):
        tasks.task_of(settings).check_mesh()
