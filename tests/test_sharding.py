"""Training on several devices and in several processes is training on one, to rounding; nothing waits for ever."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from evaluation import runs
from tests.support import tiny
from tests.support.processes import EIGHT, PATIENCE, SHARED, config, finish, free_port, start, steps, stream
from training import run_folder, sharding
from training.checkpoints import Checkpoints
from training.processes import join

CONFIG = tiny.ROOT / "configs/r2_dustbin.py"
# Sums over the batch are added in another order: a few ulps of float32 (6e-8) a step, which later steps amplify.
# Measured: 2e-7 after 4 steps.
ROUNDING = 5e-6

ON_EIGHT_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from tests.support import processes as shared
from evaluation import runs
from training import run_folder
from training import sharding
from training.checkpoints import Checkpoints

folder = Path(sys.argv[1])
losses, initial = {}, {}
for mesh_of in ((8, 1), (2, 4)):
    initial[mesh_of], losses[str(mesh_of)], trainer, mesh, state = shared.steps(mesh_of)
for mesh_of, leaves in initial.items():
    for a, b in zip(leaves, initial[8, 1], strict=True):
        # Not to the last bit: vectors of another length are rounded by other instructions.
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-7, err_msg=f"initial values depend on the mesh: {mesh_of}")
kernel = state.optimizer[1][0].mu["encoder"]["blocks"][0]["mix"]["kernel"]
assert kernel.addressable_shards[0].data.shape[-1] * 4 == kernel.shape[-1], "the moments are not cut as the parameters"

checkpoints = Checkpoints(folder)
checkpoints.save(state, {"step": 3}, {})
checkpoints.close()
mesh = sharding.make_mesh(sharding.MeshConfig(4, 2), 8)
checkpoints = Checkpoints(folder, read_only=True)
again, _ = checkpoints.restore(trainer.abstract_state(mesh))
checkpoints.close()
for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
    assert b.sharding.mesh == mesh
np.savez(folder / "saved.npz", *jax.device_get(jax.tree.leaves(state)))
print(json.dumps(losses))
"""

THE_ALIGNER = """
import json
from tests.support import processes as shared
from configs import base

def measured(mesh_of):
    config = base.get_config()
    config.attention.dustbin = "full"
    config.model.update(refinement=1, substitution_prior=True, positions=False)
    config.loss.update(reconstruction=0.0, sparse_ce=1.0)
    return shared.steps(mesh_of, config)[1]

print(json.dumps([measured(mesh_of) for mesh_of in ((1, 1), (2, 2))]))
"""

TWO_PROCESSES = """
import json, sys
import jax, numpy as np
from tests.support import processes as shared
from jax.experimental import multihost_utils
from training import sharding
from training.processes import gather, in_all_processes, join

join(sys.argv[1], 2, int(sys.argv[2]))
process = jax.process_index()

def check():
    if process == 1:
        raise OSError("the disk of process 1 is full")
    return process

try:
    in_all_processes(check)
    told = None
except (OSError, ValueError) as error:
    told = str(error)
assert in_all_processes(lambda: process) == process
mesh = sharding.make_mesh(sharding.MeshConfig(), 8)
stream = shared.stream(*sharding.host_shard(mesh))
batches = [sharding.from_hosts({"id": stream[step]["id"]}, mesh) for step in range(3)]
ids = [multihost_utils.process_allgather(batch["id"], tiled=True).tolist() for batch in batches]
sequences = {"x": np.arange(48).reshape(8, 6), "length": np.arange(8)}
mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 2), 8)
assert sharding.host_shard(mesh) == (0, 1), "both read all examples, and each keeps half of their places"
shared = sharding.from_hosts(sequences, mesh)
assert shared["x"].addressable_shards[0].data.tolist() == sequences["x"][:, 3 * process :][:, :3].tolist()
assert shared["length"].addressable_shards[0].data.tolist() == [*range(8)]
print(json.dumps([told, ids, gather("é" * (process + 1))]))
"""


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory) -> tuple[Path, dict]:
    """Folder of a checkpoint, and the losses by mesh."""
    folder = tmp_path_factory.mktemp("eight")
    (printed,) = finish(start("-c", ON_EIGHT_DEVICES, folder, devices=8))
    return folder, json.loads(printed.splitlines()[-1])


def test_eight_devices_train_as_one(on_eight):
    _, expected, *_ = steps((1, 1))
    _, losses = on_eight
    assert list(losses) == ["(8, 1)", "(2, 4)"]
    for mesh_of, measured in losses.items():
        np.testing.assert_allclose(measured, expected, rtol=ROUNDING, err_msg=mesh_of)


@pytest.mark.slow
def test_the_aligner_trains_on_four_devices_as_on_one():
    """Votes, the substitution prior and the likelihood of the alignment included. Measured: 9e-6 after three steps."""
    (printed,) = finish(start("-c", THE_ALIGNER, devices=4), patience=600)
    one, four = json.loads(printed.splitlines()[-1])
    np.testing.assert_allclose(four, one, rtol=4 * ROUNDING)


def test_a_checkpoint_of_eight_devices_is_read_on_one(on_eight):
    folder, _ = on_eight
    trainer, mesh = runs.make_trainer(config(**EIGHT)), sharding.make_mesh(sharding.MeshConfig(1), 8)
    checkpoints = Checkpoints(folder, read_only=True)
    state, position = checkpoints.restore(trainer.abstract_state(mesh))
    checkpoints.close()
    assert position == {"step": 3} and int(state.step) == 3
    saved = np.load(folder / "saved.npz")
    for name, x in zip(saved.files, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, saved[name])


def test_what_is_said_to_be_cut_exists():
    trainer, mesh = runs.make_trainer(config(**EIGHT)), sharding.make_mesh(sharding.MeshConfig(1), 8)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainer.abstract_state(mesh).params)]
    assert sharding._CUT.keys() <= {tuple(key.key for key in path[-2:]) for path in paths}


def test_two_processes_read_the_batches_of_one_and_fail_together():
    address = f"localhost:{free_port()}"
    first, second = finish(*(start("-c", TWO_PROCESSES, address, process) for process in range(2)))
    assert first == second
    told, ids, gathered = json.loads(first.splitlines()[-1])
    assert told == "the disk of process 1 is full"
    assert gathered == ["é", "éé"]
    whole = stream()
    assert ids == [whole[step]["id"].tolist() for step in range(3)]


TOTAL = 16
TRAINING = SHARED | {
    "total_steps": TOTAL,
    "checkpoint__every": 2,
    "log__eval_every": 1000,  # before the first step and after the last
    "optimizer__learning_rate": 1e-4,  # or rounding would be amplified beyond any useful tolerance
}


def train_together(workdir: Path, processes: int) -> list[subprocess.Popen]:
    address = f"localhost:{free_port()}"
    command = [tiny.ROOT / "train.py", f"--config={CONFIG}", f"--workdir={workdir}", *tiny.flags(**TRAINING)]
    together = [f"--coordinator={address}", f"--processes={processes}"] if processes > 1 else []
    return [start(*command, *together, *([f"--process={n}"] if together else [])) for n in range(processes)]


def logged(workdir: Path) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for row in run_folder.read_metrics(workdir):
        found.setdefault(row["step"], {}).update(row)
    return found


def wait_for_step(step: int, workdir: Path, processes: list[subprocess.Popen]) -> None:
    """Until it is logged, and there is a checkpoint beside the first one."""
    deadline = time.monotonic() + PATIENCE
    while len(logged(workdir)) <= step or not any((workdir / "checkpoints").glob("[1-9]")):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline, "two processes make no progress"
        time.sleep(0.01)


def kill_after(step: int, workdir: Path, processes: list[subprocess.Popen]) -> None:
    """Kill all processes without a warning."""
    try:
        wait_for_step(step, workdir, processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on_as_two_and_as_one(tmp_path):
    alone, killed, as_one = tmp_path / "alone", tmp_path / "killed", tmp_path / "as_one"
    train.train(config(**TRAINING), alone)
    kill_after(2, killed, train_together(killed, 2))
    assert max(logged(killed)) < TOTAL, "killed too late to show anything"
    shutil.copytree(killed, as_one)
    outputs = finish(*train_together(killed, 2), *train_together(as_one, 1))
    assert outputs[1] == "", "only the first process tells anything"
    assert all("step 0 of" not in output for output in outputs), "they started anew"
    expected = logged(alone)
    assert list(expected) == list(range(TOTAL + 1))
    for workdir in (killed, as_one):
        rows = logged(workdir)
        assert list(rows) == list(expected)
        for step, row in rows.items():
            same = [name for name in row if name in ("loss", "gradient_norm") or name.startswith("validation/recon")]
            assert same
            of_both = [[of[step][name] for name in same] for of in (rows, expected)]
            np.testing.assert_allclose(*of_both, rtol=ROUNDING, err_msg=f"{workdir.name}, step {step}: {same}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_is_killed_the_other_stops_and_both_go_on(tmp_path, victim):
    workdir = tmp_path / "run"
    processes = train_together(workdir, 2)
    survivor = processes[1 - victim]
    try:
        wait_for_step(3, workdir, processes)
        killed = time.monotonic()
        processes[victim].send_signal(signal.SIGKILL)
        _, told = survivor.communicate(timeout=60)
        print(f"\nprocess {victim} killed: the other stopped after {time.monotonic() - killed:.1f} s")
    finally:
        for process in processes:
            process.kill()
    assert "train.py: another process is gone; start all of them again" in told or "another task died" in told, told
    assert survivor.returncode in (train.STOPPED, -signal.SIGABRT)
    assert max(logged(workdir)) < TOTAL, "killed too late to show anything"
    finish(*train_together(workdir, 2))
    assert list(logged(workdir)) == list(range(TOTAL + 1))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_and_ends_both(tmp_path):
    workdir = tmp_path / "run"
    processes = train_together(workdir, 2)
    try:
        wait_for_step(3, workdir, processes)
        processes[1].terminate()
        told = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [train.STOPPED] * 2, told
    last = max(logged(workdir))
    assert last < TOTAL and f"stopped by SIGTERM, step {last} is saved" in told[0]
    assert (workdir / "checkpoints" / str(last)).exists()
    finish(*train_together(workdir, 2))
    assert list(logged(workdir)) == list(range(TOTAL + 1))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sharding.MeshConfig(model=0), r"mesh\.model=0: allowed is an integer, 1 or more"),
        (lambda: sharding.MeshConfig(data=0), r"mesh\.data=0: allowed is an integer, 1 or more, or -1 for all"),
        (lambda: sharding.make_mesh(sharding.MeshConfig(2, 3), 4), r"mesh\.data=2 times mesh\.model=3 makes 6 devices"),
        (lambda: sharding.make_mesh(sharding.MeshConfig(-1, 3), 4), r"mesh\.model=3 makes 3 devices, there are 1"),
        (lambda: sharding.MeshConfig(sequence=0), r"mesh\.sequence=0: allowed is an integer, 1 or more"),
        (
            lambda: sharding.make_mesh(sharding.MeshConfig(1, 2, 4), 4),
            r"mesh\.model=2 times mesh\.sequence=4 makes 8 devices, there are 1",
        ),
        (
            lambda: sharding.make_mesh(sharding.MeshConfig(2), 5, [*jax.devices() * 2]),
            r"batch_size=5 must be divisible by mesh\.data=2",
        ),
        (lambda: join("host:1", 2, None), "--coordinator=host:1 needs --processes=N and --process=I"),
        (lambda: join("host:1", 2, 2), "I from 0 to N - 1; given were 2 and 2"),
        (lambda: join(None, 2, 0), "--processes and --process need --coordinator"),
    ],
)
def test_a_setting_that_cannot_be_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
