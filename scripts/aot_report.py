"""Compile a configuration's whole training step for TPUs that are not there: memory, exchanges, and a model of time.

  python scripts/aot_report.py --config=configs/r2_balanced.py                     # a v6e-8, every bucket
  python scripts/aot_report.py --config=configs/r1_dustbin.py --topology=v5p:2x2x1 --bucket 128 384
  python scripts/aot_report.py --config=configs/r2_balanced.py --config.mesh.model=2 --output=runs/aot.json

Takes the options of a configuration as train.py does: --config=FILE --config.KEY=VALUE. Needs libtpu, not a TPU.
Memory, exchanges and kernels are what the real compiler reports. Times and examples/s are a MODEL, an upper bound of
speed (benchmarks/roofline.py), and were not measured. Ends with status 1 if a step does not fit.
"""

import os

# Before JAX is imported: no TPU is looked for, and several may compile at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}

import argparse
import collections
import functools
import importlib.util
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

import command_line
from benchmarks import counting, roofline
from benchmarks.roofline import CHIPS, Chip
from data import files
from data.pipeline import PairStream
from evaluation import runs
from evaluation.alignment import AlignmentTask, open_families
from evaluation.tasks import task_of
from models.mesh import MODEL, SEQUENCE
from ot_attention import UnsupportedError
from training import sharding
from training.state import Trainer

_PAPER, _TARGET = 8.5, 850  # examples/s: arXiv 2605.08123 reports the first
_EXAMPLES = "v6e:2x4, v6e:1x1, v6e:4x4, v5e:2x4, v5p:2x2x1"
_MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    args, config = command_line.parse_with_config(parser, arguments)
    return command_line.run("aot_report.py", lambda: write_report(args, config), debug=args.debug)


def write_report(args: argparse.Namespace, config: ConfigDict) -> None:
    """Print the report, and write it if asked to. Raises ValueError if a step does not fit."""
    if args.output:
        files.check_writable(args.output)
    report = report_on(config, args.topology, args.bucket or config.data.buckets)
    print(text(report))
    if args.output:
        files.write(args.output, json.dumps(report, indent=1) + "\n")
    if failures := [f"bucket {row['bucket']}: {row['failure']}" for row in report["buckets"] if row["failure"]]:
        raise ValueError("; ".join(failures))


def report_on(config: ConfigDict, topology: str, buckets: Sequence[int]) -> dict:
    """Report every bucket, and the speed that the model gives the configuration."""
    task_of(config).check_mesh()
    mesh, chip = make_mesh(config, topology), CHIPS[topology.partition(":")[0]]
    resolved = _resolved(config, mesh, max(buckets))
    task, trainer = task_of(resolved), runs.make_trainer(resolved)
    progress = tqdm(buckets, unit=" buckets", desc=f"compiling for {topology}", disable=None)
    rows = [report_bucket(trainer, task.abstract_batch(bucket, mesh), mesh, chip) for bucket in progress]
    report = {"config": config.to_dict(), "topology": topology, "mesh": dict(mesh.shape)}
    report |= {"attention": resolved.model.implementation, "memory": chip.memory, "buckets": rows}
    return report | _speed(rows, config)


def make_mesh(config: ConfigDict, topology: str) -> Mesh:
    """Make the configuration's mesh over the chips of a topology. Raise ValueError if there is no such topology."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, which compiles for TPUs, is not installed: pip install -r requirements-tpu.txt")
    if topology.partition(":")[0] not in CHIPS:
        raise ValueError(f"--topology={topology} must begin with one of {', '.join(CHIPS)}; for example {_EXAMPLES}")
    try:
        options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"--topology={topology} is unknown to libtpu, which knows {_EXAMPLES}: {error}") from None
    return sharding.make_mesh(sharding.MeshConfig(**config.mesh), config.batch_size, devices)


def counted(of: counting.Operations, chip: Chip) -> dict:
    """Return the counts of a part, of its products also those that the chip's array makes."""
    products = {"flops": of.flops(), "flops_padded": of.flops(chip.side), "passes": of.passes()}
    return products | {"vector": of.vector, "transcendental": of.transcendental, "hbm_bytes": of.hbm}


def report_bucket(trainer: Trainer, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, chip: Chip) -> dict:
    """Compile the step for batches of one shape; return the compiler's figures (bytes of a chip) and the model's."""
    state, (batch_size, length) = trainer.abstract_state(mesh), batch["x"].shape
    begin = time.perf_counter()
    lowered = trainer.compiled_update(mesh).lower(state, batch)
    lowering = time.perf_counter() - begin
    row: dict[str, Any] = {"bucket": length, "lower_seconds": lowering, "failure": None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"failure": f"does not fit: {str(error).strip()[:400]}"}
    row["compile_seconds"] = time.perf_counter() - begin - lowering
    program, found = str(compiled.as_text()), cast(Any, compiled.memory_analysis())
    row["memory"] = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "temp")}
    row["memory"]["peak"] = peak = found.peak_memory_in_bytes  # outputs lie where the arguments were
    if peak > chip.memory:
        row["failure"] = f"takes {peak} bytes a chip, there are {chip.memory}"
    calls = re.findall(r"%?([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", program)
    row["kernels"] = dict(collections.Counter(re.sub(r"[.\d]+$", "", name) for name in calls))
    exchanged = roofline.collectives(program, mesh.size)
    row["collectives"] = [of._asdict() for of in exchanged]
    longest = np.full(batch_size, length, np.int32)
    known = {name: longest if x.shape == longest.shape else x for name, x in batch.items()}
    parts = counting.count(sharding.on(mesh, trainer.update), state, known)
    row["counted"] = {name: counted(of, chip) for name, of in parts.items()}
    row["exchanges"] = sum(of.exchanges for of in parts.values()) / mesh.size
    row["to_neighbours"] = sum(of.ici for of in parts.values()) / mesh.size
    # The model counts permutations by devices that share a sequence as often as loops make them.
    sums = [of for of in exchanged if of.kind != "collective-permute" or mesh.shape[SEQUENCE] == 1]
    sharing = mesh.size // mesh.shape[MODEL]
    times = roofline.step_time(parts, sums, chip, data=sharing, model=mesh.shape[MODEL])
    seconds = sum(part.seconds for part in times.values())
    row["model"] = {name: part._asdict() for name, part in times.items()}
    return row | {"model_step_seconds": seconds, "model_examples_per_second": batch_size / seconds}


def text(report: dict) -> str:
    """Return the report as Markdown tables."""
    table = functools.partial(tabulate, headers="keys", tablefmt="github", disable_numparse=True)
    rows = [row for row in report["buckets"] if "memory" in row]
    mesh = " x ".join(f"{size} {axis}" for axis, size in report["mesh"].items())
    about = f"{report['config']['batch_size']} examples a step, attention {report['attention']}"
    parts = [f"{report['topology']}, mesh {mesh}, {about}"]
    if rows:
        compiled, modelled = zip(*map(_cells, rows), strict=True)
        limit = {"limit MiB": f"{report['memory'] / _MIB:.0f}"}
        passes = [(name, " and ".join(map(str, of["passes"]))) for name, of in rows[0]["counted"].items()]
        parts += [
            "Compiled; memory of a chip:",
            table([of | limit for of in compiled]),
            "MODEL, an upper bound of speed and not a measurement; microseconds a step, and the unit that is busy:",
            table(modelled),
            f"Products take bfloat16 passes: {'; '.join(f'{name} {number}' for name, number in passes if number)}.",
        ]
    if speed := report["model_examples_per_second"]:
        shares = ", ".join(f"{bucket}: {share:.0%}" for bucket, share in report["bucket_shares"].items())
        told = f"by the model; the paper reports {_PAPER}, the target is {_TARGET}."
        parts.append(f"Buckets as training draws them ({shares}): at most {speed:,.0f} examples/s {told}")
    return "\n\n".join(parts)


def _cells(row: dict) -> tuple[dict[str, str], dict[str, str]]:
    """Return a row of what the compiler says, and a row of the model."""
    parts = {name: f"{part['seconds'] * 1e6:.0f} {part['bound']}" for name, part in row["model"].items()}
    speed = {"step": f"{row['model_step_seconds'] * 1e6:.0f}", "examples/s": f"{row['model_examples_per_second']:,.0f}"}
    bucket = {"bucket": str(row["bucket"])}
    cells = bucket | {f"{what} s": f"{row[f'{what}_seconds']:.1f}" for what in ("lower", "compile")}
    cells |= {f"{what} MiB": f"{size / _MIB:.1f}" for what, size in row["memory"].items()}
    exchanges = [f"{of['number']} {of['kind']} {of['bytes'] / _MIB:.2f} MiB" for of in row["collectives"]]
    calls = [f"{number} {name}" for name, number in row["kernels"].items()]
    return cells | {
        "exchanges": ", ".join(exchanges) or "none",
        "in a run": f"{row['exchanges']:.0f}, {row['to_neighbours'] / _MIB:.2f} MiB to neighbours",
        "kernels": ", ".join(calls) or "none",
    }, bucket | parts | speed


def _speed(rows: list[dict], config: ConfigDict) -> dict:
    """Model the speed of the configuration over its buckets as training draws them, if all of them were compiled."""
    found = {row["bucket"]: row.get("model_step_seconds") for row in rows}
    if any(found.get(bucket) is None for bucket in config.data.buckets):
        return {"bucket_shares": None, "model_examples_per_second": None}
    task = task_of(config)
    if not isinstance(task, AlignmentTask):
        return {"bucket_shares": None, "model_examples_per_second": None}
    shares = PairStream(open_families(config.data.dir, "train"), task.data()).bucket_shares()
    mean = sum(share * (found[bucket] or 0) for bucket, share in shares.items())
    return {"bucket_shares": shares, "model_examples_per_second": config.batch_size / mean}


def _resolved(config: ConfigDict, mesh: Mesh, longest: int) -> ConfigDict:
    """Replace the implementation "auto" by its choice on a TPU; asked here, it would choose for a CPU."""
    config = config.copy_and_resolve_references()
    if config.model.implementation == "auto" and (mesh.shape[SEQUENCE] > 1 or config.data.get("join", False)):
        config.model.implementation = "xla"  # as `ot_attention.backends.registry.choose` does
    if config.model.implementation == "auto":
        config.model.implementation = "pallas_tpu"
        trainer = runs.make_trainer(config)
        batch = task_of(config).abstract_batch(longest, mesh)
        try:
            jax.eval_shape(sharding.on(mesh, trainer.update), trainer.abstract_state(mesh), batch)
        except UnsupportedError:
            config.model.implementation = "xla"
    return config


def _parser() -> command_line.Parser:
    usage = "aot_report.py --config=FILE [--config.KEY=VALUE ...] [options]"
    parser, natural = command_line.Parser(__doc__, usage=usage, allow_abbrev=False), command_line.at_least(1)
    parser.add_argument("--topology", default="v6e:2x4", help=f"name in libtpu; default: v6e:2x4; also {_EXAMPLES}")
    told = "padded lengths; default: all of the configuration"
    parser.add_argument("--bucket", type=natural, nargs="+", metavar="N", help=told)
    parser.add_argument("--output", type=command_line.path, metavar="FILE", help="JSON file to write as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
