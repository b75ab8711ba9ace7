"""scripts/aot_report.py with benchmarks/counting.py and benchmarks/roofline.py: a step for a TPU, counts, the model."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import counting, roofline
from benchmarks.counting import Matmul, Operations
from benchmarks.roofline import CHIPS
from configs import r2_dustbin
from evaluation import runs
from ot_attention import SinkhornSpec, sinkhorn_attention

ROOT = Path(__file__).parents[1]
SMALL = {"batch_size": 16, "width": 32, "depth": 1, "heads": 2, "attention_every": 1, "plan_width": 16}
BUCKET = 64
# One process, as JAX and libtpu take long to load: the report, for a chip with a byte of memory, then exchanges whose
# bytes are known.
PROGRAM = """
import contextlib, dataclasses, functools, io, json, sys
from scripts import aot_report
from benchmarks import roofline
roofline.CHIPS["v6e"] = dataclasses.replace(roofline.CHIPS["v6e"], memory=1)
arguments = sys.argv[1:]
with contextlib.redirect_stderr(io.StringIO()) as errors:
    status = aot_report.main(arguments)
print(json.dumps({"status": status, "exit": errors.getvalue()}))

import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("a", "b"))

def exchange(x):  # [1024, 128] float32 on each chip
    summed = jax.lax.psum(x, "b")
    gathered = jax.lax.all_gather(x * 2, "b")
    scattered = jax.lax.psum_scatter(x * 3, "b", tiled=True)
    sent = jax.lax.ppermute(x * 4, "b", [(i, (i + 1) % 4) for i in range(4)])
    return summed, gathered, scattered, sent

mapped = jax.shard_map(exchange, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
x = jax.ShapeDtypeStruct((8 * 1024, 128), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(("a", "b"))))
text = jax.jit(mapped).lower(x).compile().as_text()
print(json.dumps({"exchanges": [of._asdict() for of in roofline.collectives(text, 8)]}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """Return the output and the report of the program."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (requirements-tpu.txt)")
    output = tmp_path_factory.mktemp("aot") / "report.json"
    flags = [f"--config.{'' if key == 'batch_size' else 'model.'}{key}={value}" for key, value in SMALL.items()]
    arguments = [f"--config={ROOT / 'configs/r2_dustbin.py'}", *flags, f"--bucket={BUCKET}", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, code, exchanges = done.stdout.splitlines()
    return {
        "printed": done.stdout,
        **json.loads(code),
        **json.loads(exchanges),
        "report": json.loads(output.read_text()),
    }


@pytest.fixture(scope="module")
def trainer():
    config = r2_dustbin.get_config()
    config.batch_size = SMALL["batch_size"]
    config.model.update({key: value for key, value in SMALL.items() if key != "batch_size"})
    config.model.implementation = "pallas_tpu"
    return runs.make_trainer(config)


@pytest.mark.slow
def test_report_of_a_step_compiled_for_a_tpu(compiled, trainer):
    (row,) = compiled["report"]["buckets"]
    assert compiled["report"]["mesh"] == {"data": 8, "model": 1} and compiled["report"]["attention"] == "pallas_tpu"
    # The kernels that the model counts are those that the compiler calls: self-attention and the plan, there and back.
    assert row["counted"].keys() - {"forward", "backward", "update"} == row["kernels"].keys()
    assert sum(row["kernels"].values()) == 4
    state = jax.eval_shape(trainer.initial)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held <= row["memory"]["argument"] < 1.2 * held + 2**20  # and the batch
    assert row["memory"]["argument"] < row["memory"]["peak"] < CHIPS["v6e"].memory
    # Data parallelism sums the gradients, and scalars.
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    (sums,) = row["collectives"]
    assert sums["kind"] == "all-reduce" and 4 * parameters <= sums["bytes"] < 1.05 * 4 * parameters + 1000
    assert sums["sent"] == pytest.approx(2 * 7 / 8 * sums["bytes"])
    step = sum(part["seconds"] for part in row["model"].values())
    assert row["model_examples_per_second"] == pytest.approx(SMALL["batch_size"] / step)
    assert compiled["report"]["model_examples_per_second"] is None  # one bucket says nothing of the others


@pytest.mark.slow
def test_a_step_that_does_not_fit_fails_and_says_so(compiled):
    assert f"bucket {BUCKET}: takes" in compiled["exit"] and "bytes a chip, there are 1" in compiled["exit"]
    assert "MODEL, an upper bound of speed and not a measurement" in compiled["printed"]


@pytest.mark.slow
def test_exchanges_of_a_compiled_program(compiled):
    size = 1024 * 128 * 4
    found = {of["kind"]: of for of in compiled["exchanges"]}
    assert found["all-reduce"]["bytes"] == size and found["all-reduce"]["sent"] == pytest.approx(1.5 * size)
    assert found["all-gather"]["bytes"] == 4 * size and found["all-gather"]["sent"] == pytest.approx(3 * size)
    assert found["collective-permute"]["bytes"] == size == found["collective-permute"]["sent"]
    scattered = found.get("reduce-scatter")
    if scattered:  # or the compiler made it of an all-reduce
        assert scattered["bytes"] == size / 4 and scattered["sent"] == pytest.approx(0.75 * size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x4"], "--topology=v9:2x4 must begin with one of v6e, "),
        (["--config.nope=1"], "nope"),
    ],
)
def test_misuse_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the program sets some of it
    monkeypatch.chdir(ROOT)
    from scripts import aot_report

    try:
        assert aot_report.main(["--config=configs/r2_balanced.py", *arguments]) == 1
    except SystemExit as stopped:
        assert stopped.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# ---- counts ----


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def total(parts: counting.Parts) -> Operations:
    result = Operations()
    for of in parts.values():
        result.add(of, 1)
    return result


def test_counts_of_dense_layers_are_closed_forms():
    def network(x, w, kernel):
        h = jax.lax.dot(jnp.tanh(x @ w), w.T, precision="highest")
        return jax.lax.conv_general_dilated(h[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    counts = total(counting.count(network, shape(128, 64), shape(64, 32), shape(5, 64, 16)))
    plain = 2 * 128 * 64 * 32
    assert counts.flops() == plain + 6 * plain + 2 * 128 * 5 * 64 * 16
    assert counts.transcendental == 128 * 32 and counts.passes() == [1, 6]
    elements = (128 * 64 + 64 * 32 + 128 * 32) * 2 + 128 * 64 + 5 * 64 * 16 + 128 * 16  # each product's in and out
    results = 128 * 64 + 64 * 32 + 5 * 64 * 16 + 128 * 16  # the function's own
    assert counts.hbm == 4 * (elements + results)


def test_counts_agree_with_the_compiler_where_there_is_no_loop():
    def loss(w, x):
        return (jnp.maximum(x @ w, 0) @ w.T).sum()

    arguments = shape(256, 128), shape(64, 256)
    step = jax.value_and_grad(loss)
    analysed = jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]
    parts = counting.count(step, *arguments)
    assert total(parts).flops() == pytest.approx(analysed, rel=0.02)
    assert parts["backward"].flops() == 1.5 * parts["forward"].flops()  # x needs no gradient, and comes into one


def test_loops_count_as_often_as_they_run(monkeypatch):
    def power(x, steps, flag):
        def step(carry):
            n, x = carry
            return n + 1, jax.lax.cond(n >= 2, lambda x: x @ x, lambda x: x, x)

        _, x = jax.lax.while_loop(lambda c: (c[0] < steps) & (c[1].sum() > flag), step, (0, x))
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)

    counts = total(counting.count(power, shape(8, 8), np.int32(10), shape()))
    assert counts.flops() == (8 + 3) * 2 * 8**3
    monkeypatch.setattr(counting, "_MOST_STEPS", 50)
    with pytest.raises(ValueError, match="a loop does not end within"):
        counting.count(power, shape(8, 8), shape(dtype=jnp.int32), shape())


def kernel_operations(base_steps: int, length: int, **options) -> Operations:
    """Count operations of the attention's forward kernel, for one head of width 64."""
    spec = SinkhornSpec(base_steps=base_steps, **options)
    x, lengths = shape(1, 256, 1, 64), np.full(1, length, np.int32)

    def attend(q, k, v, lengths):
        return sinkhorn_attention(q, k, v, spec, lengths, lengths, None, "pallas_tpu")[0]

    parts = counting.count(attend, x, x, x, lengths)
    (kernel,) = [of for name, of in parts.items() if name not in ("forward", "backward", "update")]
    return kernel


def test_every_step_of_the_kernel_is_counted():
    """Multiply and add, twice for each score in the band's tiles, and the same in every step."""
    few, some, many = (kernel_operations(steps, 256, band=None) for steps in (10, 20, 40))
    assert many.vector - some.vector == pytest.approx(2 * (some.vector - few.vector))
    assert some.vector - few.vector >= 10 * 4 * 256 * 256
    assert few.flops() == many.flops() >= 6 * 2 * 256 * 256 * (64 + 64)  # Q K^T and P V, six passes each
    assert few.transcendental >= 256 * 256


def test_short_sequences_cost_less():
    assert kernel_operations(20, 128, band=64).vector < 0.6 * kernel_operations(20, 256, band=64).vector


@pytest.mark.slow
def test_a_mesh_does_not_change_how_much_work_there_is(compiled, trainer):
    """The kernels' part, which runs under shard_map."""
    whole = shape(SMALL["batch_size"], BUCKET, dtype=jnp.int32)
    lengths = np.full(SMALL["batch_size"], BUCKET, np.int32)
    batch = {"x": whole, "y": whole, "target": whole, "x_length": lengths, "y_length": lengths}
    parts = counting.count(trainer.update, jax.eval_shape(trainer.initial), batch)
    (row,) = compiled["report"]["buckets"]
    for name in row["kernels"]:
        assert parts[name].flops() == pytest.approx(row["counted"][name]["flops"])
        assert parts[name].vector == pytest.approx(row["counted"][name]["vector"])


# ---- the model ----


def test_products_are_padded_to_the_array():
    assert Matmul(2, 1000, 64, 512, 6).flops() == 2 * 2 * 6 * 1000 * 64 * 512
    assert Matmul(1, 1000, 64, 512, 1).flops(256) == 2 * 1000 * 256 * 512
    assert Matmul(1, 1000, 64, 66, 1).flops(256) == 2 * 256 * 1024 * 66


@pytest.mark.parametrize("more", ["matmuls", "vector", "transcendental", "hbm", "ici"])
def test_the_model_is_monotone(more):
    work = Operations(Counter({Matmul(1, 512, 512, 512, 6): 1000}), 1e9, 1e9, 1e9, 1e9)
    larger = Operations(work.matmuls.copy(), 1e9, 1e9, 1e9, 1e9)
    if more == "matmuls":
        larger.matmuls[Matmul(1, 512, 512, 512, 6)] *= 100
    else:
        setattr(larger, more, 1e12)

    def seconds(of, data=8, chip="v6e"):
        return roofline.step_time({"forward": of}, [], CHIPS[chip], data=data, model=1)["forward"].seconds

    assert seconds(larger) > seconds(work) == pytest.approx(seconds(work, data=16) * 2)
    assert seconds(work, chip="v5e") > seconds(work)
    assert math.isclose(seconds(work, data=1), 8 * seconds(work))


def test_the_update_is_not_shared_along_the_data_axis():
    parts = {"update": Operations(hbm=1.6e9)}
    assert roofline.step_time(parts, [], CHIPS["v6e"], data=8, model=1)["update"] == (pytest.approx(1e-3), "memory")
    assert roofline.step_time(parts, [], CHIPS["v6e"], data=4, model=2)["update"].seconds == pytest.approx(5e-4)
