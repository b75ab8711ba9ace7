"""Fit maps that replace the Sinkhorn steps of a trained model (ASAP), and compare them with the steps.

python scripts/compile_asap.py --workdir=runs/r2_dustbin        # writes asap.safetensors and asap.json there
python scripts/compile_asap.py --weights=weights/aligner.safetensors --data=runs/pfam --output=runs/aligner.asap
python scripts/compile_asap.py --workdir=runs/r2_dustbin --features kantorovich --projections=64   # the paper's map
python scripts/compile_asap.py --workdir=runs/r2_dustbin --ablation         # also other maps, minutes more
python scripts/compile_asap.py --workdir=runs/r2_dustbin --buckets 64 128   # how it carries over to longer pairs
python eval.py --workdir=runs/r2_dustbin --asap=runs/r2_dustbin/asap.safetensors

Maps are fitted on pairs of --split and measured on pairs of the validation split: deviation of each plan from the
teacher's, time of the same outputs, taken in turn, and metrics of the model. They are compared with the layer's own
T + R steps (`teacher`; `log domain`: dense) and with Sinkhorn stopped after few steps, which needs no fit. `zero` is
the map to f = 0: one Sinkhorn step that starts at the columns.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from tabulate import tabulate
from tqdm import tqdm

import command_line
from alignment import asap_maps
from benchmarks import asap_ways
from data import files, pipeline
from data.batches import Batch
from data.evaluation_pairs import evaluation_batches
from evaluation import model_options, runs
from evaluation.alignment import DataConfig, open_families
from models.attention import Asap, SinkhornSpec
from ot_attention import asap
from ot_attention.asap import Deviation, Direction, Feature, Sample

_SCORED = 3  # steps, up to which the models with truncated steps are scored too


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one map."""

    features: tuple[Feature, ...] = ("mass",)
    directions: Direction = "random"
    projections: int = 16
    ridge: float = 1e-3
    newton_steps: int = 3
    two_sided: bool = True

    def projected(self) -> int:
        return self.projections if {"kantorovich", "squares"} & set(self.features) else 0

    def fit(self, samples: list[Sample], spec: SinkhornSpec) -> Asap:
        vectors = asap.directions(self.directions, samples, self.projected())
        empty = Asap.create(vectors, self.features, self.two_sided)
        return asap.fit(empty, samples, spec, ridge=self.ridge, newton_steps=self.newton_steps)

    def __str__(self) -> str:
        projected = f" {self.projections} {self.directions}" if self.projected() else ""
        fitted = f"newton {self.newton_steps}" if self.newton_steps else "ridge"
        sides = "" if self.two_sided else ", one-sided"
        return f"{'+'.join(self.features) or 'dustbin only'}{projected}, {fitted}{sides}"


_paper = functools.partial(Settings, ("kantorovich",), newton_steps=0)
ABLATION = (
    *(_paper(projections=n) for n in (4, 16, 100)),
    *(_paper(projections=8, directions=directions) for directions in ("principal", "keys")),
    _paper(newton_steps=3),
    _paper(two_sided=False),
    Settings(("kantorovich", "squares"), newton_steps=0),
    *(Settings(features) for features in ((), ("position",))),
    Settings(newton_steps=0),
    Settings(two_sided=False),
    *(Settings(features) for features in (("mass", "position"), ("mass", "kantorovich", "squares"))),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    args = model_options.parse(parser, argv)
    args.output = args.output or (args.workdir or Path("runs") / args.weights.stem) / "asap.safetensors"
    return command_line.run("compile_asap.py", lambda: compile_model(args), debug=args.debug, threads=args.threads)


def compile_model(args: argparse.Namespace) -> None:
    """Fit the maps and measure them; write maps and report at the end, and print the table."""
    run, beside = model_options.load(args), args.output.with_suffix(".json")
    runs.check_aligns(run)
    for path in (args.output, beside):
        files.check_writable(path)
    shards = str(args.data or run.config.data.dir)
    buckets = tuple(args.buckets or run.config.data.buckets)
    of_map = tuple(args.features), args.directions, args.projections, args.ridge, args.newton_steps, not args.one_sided
    settings = Settings(*of_map)
    layers = asap_ways.attended(run, _batches(run, shards, args.split, buckets, args.pairs), "calibration")
    fitting = tqdm(layers.items(), desc="fitting", unit=" layers", disable=None)
    maps = {name: settings.fit(layer.samples(), layer.spec) for name, layer in fitting}
    provenance = {"run": str(args.weights or args.workdir), "step": run.step, "split": args.split, "pairs": args.pairs}
    provenance |= {"buckets": buckets, "settings": dataclasses.asdict(settings)}

    batches = list(_batches(run, shards, "validation", run.config.data.buckets, args.pairs))
    report: dict[str, Any] = {"provenance": provenance, "layers": {}, "lengths": {}, "ablation": {}, "metrics": {}}
    held_out = asap_ways.attended(run, batches, "validation")
    for name, layer in held_out.items():
        ways = asap_ways.ways(layer.spec, maps[name], args.steps)
        report["layers"][name] = asap_ways.compare(layer, ways, args.rounds)
        off = {n: asap_ways.spread(layer.spec, inputs, ways["asap"]) for n, inputs in layer.inputs.items()}
        report["lengths"][name] = off
    if not args.no_scores:
        scored, families = [k for k in args.steps if k <= _SCORED], open_families(shards, "validation")
        report["metrics"] = asap_ways.metrics(run, maps, families, batches, scored)
    for name, layer in held_out.items() if args.ablation else ():
        fitting = tqdm(ABLATION, desc=f"{name}: others", disable=None)
        fitted = {str(of): of.fit(layers[name].samples(), layer.spec) for of in fitting}
        others = {of: functools.partial(asap_ways.apply, of=x, spec=layer.spec) for of, x in fitted.items()}
        report["ablation"][name] = asap_ways.compare(layer, others, args.rounds)
    asap_maps.save(args.output, maps, run.params, run.step, provenance)
    files.write(beside, json.dumps(report, indent=1) + "\n")
    print(f"{table(report)}\n\nwritten: {args.output}, {beside}")


def _batches(run: runs.Run, shards: str, split: str, buckets: Sequence[int], pairs: int) -> Iterator[Batch]:
    """Yield batches with about `pairs` pairs: random ones of the training split, else those that evaluation takes."""
    families, batch_size = open_families(shards, split), run.config.batch_size
    if split != "train":
        divisible_by = run.mesh.shape["data"]
        yield from evaluation_batches(families, batch_size, buckets, limit=pairs, divisible_by=divisible_by)
        return
    other_pairs = {"buckets": buckets, "batch_size": batch_size, "seed": run.config.seed + 1}  # than in training
    config = DataConfig.of({**run.config.data, **other_pairs})
    with contextlib.closing(pipeline.train_iterator(families, config)) as batches:
        yield from itertools.islice(batches, max(1, pairs // batch_size))


def table(report: dict) -> str:
    """Return deviations, times and metrics as text."""

    def row(name: str, off: dict, *times: float) -> list[str]:
        cells = [f"{x['median']:.1e} / {x['worst']:.1e}" for x in off.values()]
        return [name, *(f"{ms:.1f}" for ms in times), *[""] * (2 - len(times)), *cells]

    parts = []
    for title in ("layers", "ablation"):
        for layer, ways in report[title].items():
            shape, others = next(iter(ways.values()))["shape"], ": other maps" if title == "ablation" else ""
            rows = [row(name, way["deviation"], way["ms"], way["least_ms"]) for name, way in ways.items()]
            lengths = report["lengths"][layer].items() if title == "layers" else ()
            rows += [row(f"asap, padded to {n}", off) for n, off in lengths]
            parts.append(f"{layer}{others}, ms at {shape}; median / worst of pairs and heads")
            parts.append(tabulate(rows, ["", "ms", "least", *Deviation._fields], disable_numparse=True))
    for who, of_teacher in report["metrics"].get("teacher", {}).items():
        models = report["metrics"].items()
        rows = [[name, *(scores[who][metric]["value"] for metric in of_teacher)] for name, scores in models]
        parts += [f"{who} on validation pairs", tabulate(rows, ["", *of_teacher], floatfmt=".4f")]
    return "\n\n".join(parts)


def _parser() -> command_line.Parser:
    parser, natural = command_line.Parser(__doc__, threads=True), command_line.at_least(1)
    model_options.add_model_options(parser, asap=False)
    where = "default: asap.safetensors in WORKDIR or in runs/NAME"
    parser.add_argument("--output", type=command_line.path, metavar="FILE", help=where)
    told = "folder with other shards than those the run was trained on"
    parser.add_argument("--data", type=command_line.file_name, metavar="DIR", help=told)
    parser.add_argument("--split", default="train", choices=("train", "validation"), help="to fit on; default: train")
    told = "to fit on, and as many to measure on; default: 256"
    parser.add_argument("--pairs", type=natural, default=256, metavar="N", help=told)
    parser.add_argument("--buckets", type=natural, nargs="+", metavar="N", help="lengths to fit on; default: the run's")
    features, directions = get_args(Feature), get_args(Direction)
    parser.add_argument("--features", nargs="*", choices=features, default=Settings.features, help="default: mass")
    parser.add_argument("--directions", choices=directions, default=Settings.directions, help="of projections")
    told = "default: %(default)s a head"
    parser.add_argument("--projections", type=natural, default=Settings.projections, metavar="N", help=told)
    parser.add_argument("--ridge", type=command_line.positive, default=Settings.ridge, help="default: %(default)s")
    told, least = "0: ridge alone; default: 3", command_line.at_least(0)
    parser.add_argument("--newton-steps", type=least, default=Settings.newton_steps, metavar="N", help=told)
    parser.add_argument("--one-sided", action="store_true", help="leave the predicted f as it is")
    parser.add_argument("--ablation", action="store_true", help="also fit and measure other maps")
    parser.add_argument("--no-scores", action="store_true", help="compare the layers alone, not the models' metrics")
    told = "of Sinkhorn stopped early"
    parser.add_argument("--steps", type=natural, nargs="+", default=(1, 2, 3, 5, 8), metavar="N", help=told)
    parser.add_argument("--rounds", type=natural, default=9, metavar="N", help="timed calls; default: 9")
    return parser


if __name__ == "__main__":
    sys.exit(main())
