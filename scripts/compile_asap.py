"""Compiles the Sinkhorn layers of a trained model: fits maps that replace their steps, and says what that is worth.

python scripts/compile_asap.py --workdir=runs/r2_dustbin        # writes asap.safetensors and asap.json there
python scripts/compile_asap.py --weights=weights/aligner.safetensors --data=runs/pfam --output=runs/aligner.asap
python scripts/compile_asap.py --workdir=runs/r2_dustbin --features kantorovich --projections=64   # the paper's map
python scripts/compile_asap.py --workdir=runs/r2_dustbin --ablation         # also other maps, minutes more
python scripts/compile_asap.py --workdir=runs/r2_dustbin --buckets 64 128   # how it carries over to longer pairs
python eval.py --workdir=runs/r2_dustbin --asap=runs/r2_dustbin/asap.safetensors

Fitted on pairs of --split, measured on pairs of the validation split. Every map is compared with the layer's own T + R
steps (ours, and in the log domain and dense, as is usual), and with Sinkhorn stopped after few steps, which are fitted
to nothing: in each plan's deviation from the layer's, in time of the same outputs, taken in turn within this process,
and in the model's metrics. `zero` is the map to f = 0: one step of Sinkhorn that starts at the columns.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float
from tqdm import tqdm

from alignment import asap_maps
from data import pfam, pipeline
from evaluation import runs, scoring, tasks
from models.attention import Asap, SinkhornSpec
from ot_attention import SinkhornInfo, asap, sinkhorn_attention
from ot_attention.asap import Deviation, Direction, Feature, Sample
from ot_attention.spec import Implementation
from scripts.bench_attention import clock

_SCORED = 3  # steps, up to which the models with truncated steps are scored too
_COMPARED = 4  # samples of a padded length, batches of one side, whose plans are compared entry by entry

Attend = Callable[[Sample, Float[Array, "batch columns heads value"]], tuple]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one map."""

    features: tuple[Feature, ...] = ("mass",)
    directions: Direction = "random"
    projections: int = 16
    ridge: float = 1e-3
    newton_steps: int = 3
    two_sided: bool = True

    def fit(self, samples: list[Sample], spec: SinkhornSpec) -> Asap:
        projected = {"kantorovich", "squares"} & set(self.features)
        vectors = asap.directions(self.directions, samples, self.projections if projected else 0)
        empty = Asap.create(vectors, self.features, self.two_sided)
        return asap.fit(empty, samples, spec, ridge=self.ridge, newton_steps=self.newton_steps)

    def __str__(self) -> str:
        projected = f" {self.projections} {self.directions}" if {"kantorovich", "squares"} & set(self.features) else ""
        fitted = f"newton {self.newton_steps}" if self.newton_steps else "ridge"
        sides = "" if self.two_sided else ", one-sided"
        return f"{'+'.join(self.features) or 'dustbin only'}{projected}, {fitted}{sides}"


PAPER = Settings(("kantorovich",), "random", 100, newton_steps=0)
ABLATION = (
    dataclasses.replace(PAPER, projections=4),
    dataclasses.replace(PAPER, projections=16),
    PAPER,
    dataclasses.replace(PAPER, projections=8, directions="principal"),
    dataclasses.replace(PAPER, projections=8, directions="keys"),
    dataclasses.replace(PAPER, projections=16, newton_steps=3),
    dataclasses.replace(PAPER, projections=16, two_sided=False),
    dataclasses.replace(PAPER, projections=16, features=("kantorovich", "squares")),
    Settings(()),
    Settings(("position",)),
    Settings(newton_steps=0),
    Settings(two_sided=False),
    Settings(("mass", "position")),
    Settings(("mass", "kantorovich", "squares")),
)


class Layer(NamedTuple):
    """What a layer was given, and what potentials it found, batch by batch."""

    spec: SinkhornSpec
    samples: list[Sample]
    values: list[Float[Array, "batch columns heads value"]]
    teachers: list[SinkhornInfo]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what it reads is read-only
    try:
        report = compile_model(args)
    except (ValueError, OSError) as error:
        print(f"compile_asap: {error}", file=sys.stderr)
        return 1
    print(table(report))
    print(f"\nwritten: {args.output}, {args.output.with_suffix('.json')}")
    return 0


def compile_model(args: argparse.Namespace) -> dict[str, Any]:
    """Fits, writes the maps, and measures them."""
    run = runs.load_weights(args.weights) if args.weights else runs.load_run(args.workdir, args.step)
    runs.check_aligns(run)
    shards = tasks.resolve_data_dir(args.data or run.config.data.dir)
    buckets = tuple(args.buckets or run.config.data.buckets)
    settings = Settings(
        tuple(args.features), args.directions, args.projections, args.ridge, args.newton_steps, not args.one_sided
    )
    layers = attended(run, _calibration(run, shards, args.split, buckets, args.pairs), "calibration")
    maps = {
        name: settings.fit(layer.samples, layer.spec)
        for name, layer in tqdm(layers.items(), desc="fitting", unit=" layers")
    }
    told = {
        "run": str(args.weights or args.workdir),
        "step": run.step,
        "split": args.split,
        "pairs": args.pairs,
        "buckets": buckets,
        "settings": dataclasses.asdict(settings),
    }
    asap_maps.save(args.output, maps, run.params, run.step, told)

    families = pfam.open_split(shards, "validation")
    batches = list(_evaluation(run, families, args.pairs))
    held_out = attended(run, batches, "validation")
    report: dict[str, Any] = {"provenance": told, "layers": {}, "lengths": {}, "ablation": {}, "metrics": {}}

    def write() -> None:
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")

    for name, layer in held_out.items():
        ways, of_map = methods(layer.spec, maps[name], args.steps), _jitted_map(layer.spec, maps[name])
        report["layers"][name] = compare(layer, ways, args.rounds)
        report["lengths"][name] = {
            length: spread(layer, places[:_COMPARED], of_map) for length, places in by_length(layer).items()
        }
        write()
    if not args.no_scores:
        scored = [k for k in args.steps if k <= _SCORED]
        report["metrics"] = metrics(run, args.output, families, batches, scored)
        write()
    for name, layer in held_out.items() if args.ablation else ():
        fitted = {str(of): of.fit(layers[name].samples, layer.spec) for of in tqdm(ABLATION, desc=f"{name}: others")}
        others = {of: _jitted_map(layer.spec, m) for of, m in fitted.items()}
        report["ablation"][name] = compare(layer, others, args.rounds)
        write()
    return report


# ---- what layers are given ----


def _calibration(run: runs.Run, shards: Path, split: str, buckets, pairs: int) -> Iterator[pipeline.Batch]:
    families, batch_size = pfam.open_split(shards, split), run.config.batch_size
    if split != "train":
        yield from pipeline.evaluation_batches(families, batch_size, buckets, limit=pairs)
        return
    config = pipeline.PipelineConfig(
        buckets, batch_size, run.config.seed + 1, run.config.data.pairs_per_family, run.config.data.crop
    )
    batches = pipeline.train_iterator(families, config)
    yield from itertools.islice(batches, max(1, pairs // batch_size))
    batches.close()


def _evaluation(run: runs.Run, families: pipeline.Families, pairs: int) -> Iterator[pipeline.Batch]:
    divisible_by = run.mesh.shape["data"]
    return pipeline.evaluation_batches(
        families, run.config.batch_size, run.config.data.buckets, limit=pairs, divisible_by=divisible_by
    )


def attended(run: runs.Run, batches: Iterable[pipeline.Batch], progress: str) -> dict[str, Layer]:
    """Inputs and the teacher's potentials of every layer on the batches' pairs; x and y of a batch are two samples."""
    layers = {name: Layer(of.spec, [], [], []) for name, of in run.trainer.model(run.params).layers().items()}

    @jax.jit
    def inputs(params, *pair):
        given = run.trainer.model(params).attention_inputs(*pair)
        return {name: [(x.q, x.k, x.v, *x.lengths, x.dustbin_score) for x in of] for name, of in given.items()}

    for batch in tqdm(list(batches), desc=progress, unit=" batches"):
        pair = (jnp.asarray(batch[name]) for name in ("x", "y", "x_length", "y_length"))
        for name, of in inputs(run.params, *pair).items():
            for q, k, v, *rest in of:
                layer, sample = layers[name], Sample(q, k, rest[0], rest[1], rest[2], jnp.zeros((0, 0, 0)))
                _, info = _attend(sample, v, layer.spec, None)
                layer.samples.append(sample._replace(f=info.f))
                layer.values.append(v)
                layer.teachers.append(info)
    return layers


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _attend(sample: Sample, v, spec: SinkhornSpec, implementation: Implementation | None) -> tuple:
    return sinkhorn_attention(sample.q, sample.k, v, spec, *sample[2:5], implementation)


@functools.partial(jax.jit, static_argnames="spec")
def _apply(sample: Sample, v, of: Asap, spec: SinkhornSpec) -> tuple:
    q, k, *rest = sample[:-1]
    return asap.apply(of, q, k, v, spec, *rest)


def _jitted_map(spec: SinkhornSpec, of: Asap) -> Attend:
    return functools.partial(_apply, of=of, spec=spec)


def methods(spec: SinkhornSpec, of: Asap, steps: Iterable[int]) -> dict[str, Attend]:
    """All ways to the layer's outputs."""
    heads, _, width = of.directions.shape
    zero = Asap.create(jnp.zeros((heads, 0, width)), ())
    truncated = {k: dataclasses.replace(spec, base_steps=k - 1, tail_steps=1, solver="sinkhorn") for k in steps}
    return {
        "teacher": functools.partial(_attend, spec=spec, implementation=None),
        "log domain": functools.partial(_attend, spec=spec, implementation="reference"),
        "asap": _jitted_map(spec, of),
        "zero": _jitted_map(spec, zero),
        **{f"sinkhorn {k}": functools.partial(_attend, spec=of, implementation=None) for k, of in truncated.items()},
    }


# ---- comparing ----


def compare(layer: Layer, ways: Mapping[str, Attend], rounds: int) -> dict[str, dict]:
    """For every way its time and its deviation from the teacher, at the padded length that has most samples."""
    at = by_length(layer)
    length = max(at, key=lambda length: len(at[length]))
    sample, v = layer.samples[at[length][0]], layer.values[at[length][0]]
    calls: dict[tuple[str, str], Callable] = {
        (name, "ms"): functools.partial(way, sample, v) for name, way in ways.items()
    }
    seconds = clock(calls, rounds, of=list)
    return {
        name: {
            "shape": list(sample.q.shape),
            "ms": 1e3 * statistics.median(seconds[name, "ms"]),
            "least_ms": 1e3 * min(seconds[name, "ms"]),  # what else the machine does cannot make it less
            "deviation": spread(layer, at[length][:_COMPARED], way),
        }
        for name, way in ways.items()
    }


def by_length(layer: Layer) -> dict[int, list[int]]:
    """Places of samples by their padded length."""
    found: dict[int, list[int]] = {}
    for n, sample in enumerate(layer.samples):
        found.setdefault(sample.q.shape[1], []).append(n)
    return found


def spread(layer: Layer, places: Iterable[int], way: Attend) -> dict[str, dict]:
    """Of the deviations median and worst over pairs and heads, and medians of every head."""
    found = [_deviation(layer, n, way) for n in places]
    return {
        name: {"median": float(np.median(x)), "worst": float(x.max()), "heads": np.median(x, axis=0).tolist()}
        for name, x in ((name, np.concatenate([getattr(of, name) for of in found])) for name in Deviation._fields)
    }


def _deviation(layer: Layer, n: int, way: Attend) -> Deviation:
    """Of one sample's plans; `[pairs, heads]`, pairs that fill up a batch left out."""
    sample = layer.samples[n]
    _, info = way(sample, layer.values[n])
    real = np.asarray(sample.q_lengths) > 0
    return jax.tree.map(lambda x: np.asarray(x)[real], _deviations(sample, layer.spec, layer.teachers[n][:2], info[:2]))


@functools.partial(jax.jit, static_argnames="spec")
def _deviations(sample: Sample, spec: SinkhornSpec, teacher, student) -> Deviation:
    q, k, *rest = sample[:-1]
    return asap.deviation(q, k, spec, *rest, teacher=teacher, student=student)


def metrics(
    run: runs.Run, path: Path, families: pipeline.Families, batches: list[pipeline.Batch], steps: Iterable[int]
) -> dict:
    """Of the model as trained, compiled, and with truncated steps, on the same pairs."""
    compared = {"teacher": run, "asap": runs.with_asap(run, path)}
    for k in steps:
        config = run.config.copy_and_resolve_references()
        config.attention.update(base_steps=k - 1, tail_steps=1, solver="sinkhorn")
        compared[f"sinkhorn {k}"] = run._replace(config=config, trainer=runs.make_trainer(config))
    found = {}
    for name, of in tqdm(compared.items(), desc="scoring", unit=" models"):
        predict = of.trainer.compiled_evaluation(scoring.predictor(of.trainer), of.mesh)
        scores = scoring.score_split(functools.partial(predict, of.params), families, batches)
        found[name] = {who: scores[who]["overall"] for who in ("model", "transport") if who in scores}
    return found


# ---- telling ----


def table(report: dict) -> str:
    """Deviations, times and metrics as text."""
    lines = []
    for title in ("layers", "ablation"):
        for layer, rows in report[title].items():
            shape, others = next(iter(rows.values()))["shape"], ": other maps" if title == "ablation" else ""
            lines += [f"\n{layer}{others}, ms at {shape}; median / worst of pairs and heads"]
            lines += [f"{'':44}{'ms':>8}{'least':>8}" + "".join(f"{name:>20}" for name in Deviation._fields)]
            lines += [_row(name, (row["ms"], row["least_ms"]), row["deviation"]) for name, row in rows.items()]
            if title == "layers":
                lines += [_row(f"asap, padded to {n}", (), of) for n, of in report["lengths"][layer].items()]
    for who in report["metrics"].get("teacher", ()):
        lines += ["\nmodels on validation pairs"]
        names = list(report["metrics"]["teacher"][who])
        lines += [f"{who:16}" + "".join(f"{name:>23}" for name in names)]
        for name, scores in report["metrics"].items():
            lines += [f"{name:16}" + "".join(f"{scores[who][metric]['value']:>23.4f}" for metric in names)]
    return "\n".join(lines)


def _row(name: str, milliseconds: Sequence[float], spread: dict) -> str:
    times = "".join(f"{x:>8.1f}" for x in milliseconds)
    return f"{name:44}{times:16}" + "".join(f"{x['median']:.1e} / {x['worst']:.1e}".rjust(20) for x in spread.values())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="folder of the run, as given to train.py")
    model.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="instead of a run: weights alone")
    parser.add_argument("--step", type=int, help="which checkpoint of --workdir; default: the newest")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: asap.safetensors in WORKDIR or in runs/NAME"
    )
    parser.add_argument("--data", help="folder with other shards than those the run was trained on")
    parser.add_argument("--split", default="train", choices=("train", "validation"), help="to fit on; default: train")
    parser.add_argument("--pairs", type=int, default=256, help="to fit on, and as many to measure on; default: 256")
    parser.add_argument(
        "--buckets", type=int, nargs="+", metavar="N", help="padded lengths to fit on; default: the run's"
    )
    default = Settings()
    parser.add_argument(
        "--features", nargs="*", choices=get_args(Feature), default=default.features, help="default: mass"
    )
    parser.add_argument("--directions", choices=get_args(Direction), default=default.directions, help="of projections")
    parser.add_argument("--projections", type=int, default=default.projections, help="default: %(default)s a head")
    parser.add_argument("--ridge", type=float, default=default.ridge, help="default: %(default)s")
    parser.add_argument("--newton-steps", type=int, default=default.newton_steps, help="0: ridge alone; default: 3")
    parser.add_argument("--one-sided", action="store_true", help="leave the predicted f as it is")
    parser.add_argument("--ablation", action="store_true", help="also fit and measure other maps")
    parser.add_argument("--no-scores", action="store_true", help="compare the layers alone, not the models' metrics")
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 3, 5, 8), help="of Sinkhorn stopped early")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls; default: 9")
    args = parser.parse_args(argv)
    if args.weights and args.step is not None:
        parser.error("--step chooses a checkpoint of --workdir; --weights holds a single step")
    for name in ("pairs", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    if min(args.steps) < 1:
        parser.error(f"--steps={min(args.steps)} must be at least 1")
    args.output = args.output or (args.workdir or Path("runs") / args.weights.stem) / "asap.safetensors"
    return args


if __name__ == "__main__":
    sys.exit(main())
