"""The estimate of a run's memory is below what XLA takes, and refuses what no machine holds before anything is made."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from configs import long_context, sort_sinkhorn
from evaluation import alignment, tasks
from evaluation.runs import make_trainer
from evaluation.task import evaluated_at_once
from tests.support.run import config
from training import memory, sharding
from training.memory import Estimate
from training.state import abstract_batch

GB = 10**9


def described(settings):
    """Trainer, mesh, and an empty batch of the largest shape."""
    trainer = make_trainer(settings)
    mesh = sharding.make_mesh(sharding.MeshConfig(1), settings.batch_size)
    return trainer, mesh, tasks.task_of(settings).batches(mesh).stream.largest()


def estimated(settings) -> Estimate:
    return memory.estimate(*described(settings), settings)


def sorting(**changes):
    settings = sort_sinkhorn.get_config()
    settings.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return settings


def test_the_estimate_is_near_what_xla_takes_and_not_above():
    settings = config(batch_size=64)
    trainer, mesh, batch = described(settings)
    found = memory.estimate(trainer, mesh, batch, settings)
    placed = sharding.by_example(mesh)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for name, x in batch.items() if name != "id"
    }
    update = trainer.compiled_update(mesh).lower(trainer.abstract_state(mesh), shapes).compile()
    taken = update.memory_analysis()
    total = taken.temp_size_in_bytes + taken.argument_size_in_bytes
    assert 0.35 < (found.model + found.batch) / total <= 1  # real models are larger than what is not counted


def test_the_largest_batch_takes_no_memory_and_has_the_shapes_of_one():
    _, mesh, batch = described(config(batch_size=10**7, data__buckets=(64, 128, 40_000)))
    expected = abstract_batch(10**7, 40_000, mesh)
    assert {name: x.shape for name, x in batch.items() if name != "id"} == {n: x.shape for n, x in expected.items()}
    assert all(set(x.strides) == {0} for x in batch.values())
    # A bucket that no pair needs is never made.
    assert described(config(data__buckets=(64, 1024, 40_000)))[2]["x"].shape == (4, 1024)
    stream = tasks.task_of(sorting()).batches(mesh).stream
    assert {name: x.shape for name, x in stream.largest().items()} == {name: x.shape for name, x in stream[0].items()}


def test_a_batch_in_parts_takes_less_and_more_examples_take_more():
    whole, parts, double = (
        estimated(config(**changes))
        for changes in ({"batch_size": 64}, {"batch_size": 64, "optimizer__accumulate": 4}, {"batch_size": 128})
    )
    assert parts.batch == pytest.approx(whole.batch / 4, rel=0.1) and parts.model == whole.model
    assert double.batch == pytest.approx(whole.batch * 2, rel=0.1) and double.ahead == 2 * whole.ahead


def test_devices_that_share_sequences_keep_what_their_shares_need():
    settings = long_context.get_config()
    settings.model.update(width=16, depth=4, heads=2)
    settings = tasks.checked(settings)
    trainer = make_trainer(settings)

    def kept(shares: int, length: int) -> int:
        devices = jax.devices()[:1] * shares
        mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, shares), 1, devices)
        x = np.broadcast_to(np.int32(0), (1, length))
        return memory.estimate(trainer, mesh, {"x": x, "segments": x, "length": x[:, 0], "id": x[:, 0]}, settings).batch

    assert kept(8, 8 * 1024) == kept(1, 1024)


def test_batches_ahead_and_workers_count():
    base, more = estimated(config()), estimated(config(data__workers=3, data__prefetch=40))
    assert base.workers == 0 and more.workers == 3 * memory._WORKER and more.ahead == base.ahead * 3 * 10


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 10**7}, r"batch_size \(10000000\).*or raise optimizer\.accumulate \(1\)"),
        ({"data__buckets": (40_000,), "batch_size": 4096, "attention__band": 64}, r"data\.buckets \(40000\)"),
        ({"model__width": 65_536}, r"lower model\.width \(65536\)"),
        ({"data__prefetch": 2**16, "batch_size": 1024}, r"lower data\.prefetch \(65536\)"),
        ({"data__workers": 1024}, r"lower data\.workers \(1024\)"),
    ],
)
def test_what_no_machine_holds_is_refused_before_the_folder_is_made(changes, advice, tmp_path):
    with pytest.raises(ValueError, match=rf"needs at least [\d,.]+ GB of memory, [\d,.]+ GB are free: .*{advice}"):
        train.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"batch_size": 100_000, "data__longest": 4000}, r"data\.longest"), ({"data__sequences": 2**31 - 1}, "sequences")],
)
def test_the_sorting_task_is_refused_too(changes, key, tmp_path):
    with pytest.raises(ValueError, match=rf"GB of memory, .* GB are free: .*{key}"):
        train.train(sorting(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_machine_holds_is_not_refused(monkeypatch):
    settings = config()
    trainer, mesh, batch = described(settings)
    needed = sum(memory.estimate(trainer, mesh, batch, settings))
    monkeypatch.setattr(memory, "available", lambda: needed)
    memory.check(trainer, mesh, batch, settings)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    with pytest.raises(ValueError, match="this run needs at least"):
        memory.check(trainer, mesh, batch, settings)


def devices(platform: str, *limits: int | None) -> list:
    """Devices of a kind, and what each says about its memory."""

    def device(limit):
        return SimpleNamespace(platform=platform, memory_stats=lambda: limit and {"bytes_limit": limit})

    return [device(limit) for limit in limits]


def test_accelerators_and_main_memory_are_judged_apart(monkeypatch):
    settings = config()
    needed = Estimate(model=2 * GB, batch=5 * GB, ahead=3 * GB, workers=GB)
    for found, free, refused in [
        (devices("gpu", 7 * GB, 7 * GB), 4 * GB, None),
        (
            devices("gpu", 7 * GB, 6 * GB),
            4 * GB,
            "7.0 GB of memory, 6.0 GB are what each device has: lower",
        ),
        (devices("gpu", 7 * GB), 3 * GB, "4.0 GB of memory, 3.0 GB are free: lower data.prefetch"),
        (devices("tpu", None), 4 * GB, None),
        (devices("cpu", None, None), 18 * GB, None),
        (devices("cpu", None, None), 17 * GB, "18.0 GB of memory, 17.0 GB are free: lower batch_size"),
    ]:
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        if refused is None:
            memory.judge(needed, found, settings)
            continue
        with pytest.raises(ValueError) as error:
            memory.judge(needed, found, settings)
        assert refused in str(error.value)


def test_evaluation_batches_stay_small_whatever_training_takes():
    """Or a run trained on a large machine could not be scored on a smaller one."""
    settings = config(batch_size=120_000, data__buckets=(320,))
    task, mesh = tasks.task_of(settings), sharding.make_mesh(sharding.MeshConfig(1), settings.batch_size)
    families = alignment.open_families(settings.data.dir, "validation")
    batches = list(task._evaluation_batches(families, mesh, None))
    assert max(len(batch["x"]) for batch in batches) == 128
    assert sum((batch["id"][:, 0] >= 0).sum() for batch in batches) == 30
    assert evaluated_at_once(120_000, 3) == 126 and evaluated_at_once(4, 4) == 4
    assert evaluated_at_once(120_000, 256) == 256
    assert tasks.task_of(sorting(batch_size=2048))._evaluated(mesh).batch_size == 128
