"""Scores a trained run on held-out families, beside two diagonals and Needleman-Wunsch on the same pairs.

python eval.py --workdir=runs/r2_balanced                          # both test splits, table, JSON and figures
python eval.py --workdir=runs/r2_balanced --split=validation --step=0
python eval.py --workdir=runs/r2_balanced --data=runs/pfam --output=table.json
python eval.py --workdir=runs/r2_balanced --report=runs/report   # also one HTML page, with alignments
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam --split=test_ood
python eval.py --workdir=runs/r2_dustbin --asap=runs/r2_dustbin/asap.safetensors   # of scripts/compile_asap.py
"""

import argparse
import dataclasses
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from data import baselines, metrics, pfam, pipeline, sorting, vocab
from models import compiled, decode, figures, loss, sharding, weights
from models.aligner import AlignerConfig
from models.attention import Certificate, specs_of
from models.checkpoints import Checkpoints
from models.loss import Alignment, LossConfig
from models.sorter import SorterConfig, Sorting
from models.state import OptimizerConfig, Task, Trainer
from report import Example, Examples, write_html

SPLITS = {
    "validation": ("validation",),
    "test_iid": ("test_iid",),
    "test_ood": ("test_ood",),
    "test": ("test_iid", "test_ood"),
}
_MASK_EVERY = 7  # residues; masked reconstruction asks for every seventh one
_PICTURES = 3  # plans drawn for every split, of different families
_CERTIFIED = 128  # pairs of every split whose plans are certified

Predict = Callable[[pipeline.Batch], dict[str, np.ndarray]]


class Run(NamedTuple):
    """A trained model."""

    config: ConfigDict
    trainer: Trainer
    mesh: Mesh
    params: PyTree  # averaged
    step: int


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what it reads is read-only
    try:
        examples = Examples() if args.report else None
        options = {"data_dir": args.data, "limit": args.limit, "examples": examples, "asap": args.asap}
        folder, suffix = args.workdir or Path("runs") / f"eval_{args.weights.stem}", "_asap" if args.asap else ""
        pictures = folder / f"figures{suffix}"
        if args.weights:
            report = evaluate(load_weights(args.weights), args.split, pictures, **options)
        else:
            report = evaluate_run(args.workdir, args.split, pictures, step=args.step, **options)
        output = args.output or folder / f"eval_{args.split}{suffix}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        if examples:
            rows = read_metrics(args.workdir) if args.workdir else []
            given = sys.argv[1:] if arguments is None else arguments
            write_html(args.report / "report.html", report, examples, rows, f"python eval.py {shlex.join(given)}")
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    print(table(report))
    figures_too = f", figures in {pictures}" if pictures.exists() else ""
    print(f"\nwritten: {output}{figures_too}")
    if args.report:
        print(f"the page: {args.report / 'report.html'}")


def evaluate_run(
    workdir: Path, split: str, pictures: Path | None = None, *, step: int | None = None, **options
) -> dict:
    """The contract's JSON for one run and the splits that `split` names.

    pictures: the folder to draw figures into; default: `<workdir>/figures`. options: of `evaluate`.

    Raises ValueError or FileNotFoundError: no run in workdir, no such checkpoint, no data, an empty split.
    """
    pictures = pictures or workdir / "figures"
    report = evaluate(load_run(workdir, step), split, pictures, **options)
    if rows := read_metrics(workdir):
        pictures.mkdir(parents=True, exist_ok=True)
        figures.metric_curves(rows, pictures / "training.png")
    return report


def load_run(workdir: Path, step: int | None = None) -> Run:
    """What a checkpoint of a run holds, by default the newest."""
    config = read_config(workdir)
    trainer, mesh = described(config, workdir / "config.json")
    checkpoints = Checkpoints(workdir, read_only=True)
    state, _ = checkpoints.restore(trainer.abstract_state(mesh), step)
    checkpoints.close()
    return Run(config, trainer, mesh, state.ema, int(state.step))


def load_weights(path: Path) -> Run:
    """What a file of `scripts/export_weights.py` holds."""
    values, step = weights.read_config(path)
    config = ConfigDict(values)
    trainer, mesh = described(config, path)
    return Run(config, trainer, mesh, weights.load(path, trainer.abstract_state(mesh).params), step)


def with_asap(run: Run, path: Path) -> Run:
    """The run with the layers compiled that a file of scripts/compile_asap.py holds; raises ValueError if it is not of
    this run.
    """
    graph = compiled.into(run.trainer.graph, run.params, compiled.load(path, run.params))
    return run._replace(trainer=dataclasses.replace(run.trainer, graph=graph))


def evaluate(
    run: Run,
    split: str,
    pictures: Path,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    examples: Examples | None = None,
    asap: Path | None = None,
) -> dict:
    """The contract's JSON for one model and the splits that `split` names; draws figures into the folder `pictures`.

    examples: sees every pair as it is aligned. asap: of `with_asap`; certificates then are those of Sinkhorn's steps on
    what the compiled model's layers see.
    """
    if sorts(run.config):
        if data_dir or examples or asap:
            raise ValueError("--data, --report and --asap are of alignments; this run sorts")
        return evaluate_sorting(run, split, limit)
    config, run = run.config, with_asap(run, asap) if asap else run
    shards = resolve_data_dir(data_dir or config.data.dir)
    predict, certify = (
        functools.partial(run.trainer.compiled_evaluation(function(run.trainer), run.mesh), run.params)
        for function in (predictor, certifier)
    )
    pictures.mkdir(parents=True, exist_ok=True)
    report: dict = {"step": run.step, "config": config.to_dict(), "splits": {}}
    report |= {"certificates": {}, "reliability": {}} | ({"asap": str(asap)} if asap else {})
    for name in SPLITS[split]:
        families = pfam.open_split(shards, name)
        batches = functools.partial(
            pipeline.evaluation_batches,
            families,
            config.batch_size,
            config.data.buckets,
            divisible_by=run.mesh.shape["data"],
            max_bad=config.data.get("max_bad_records", 0),  # older runs have none
        )
        observer = Observer(name, pictures, examples)
        report["splits"][name] = score_split(predict, families, batches(limit=limit), see=observer, progress=name)
        report["reliability"][name] = observer.reliability.tenths()
        report["certificates"][name] = certify_split(certify, batches(limit=min(limit or _CERTIFIED, _CERTIFIED)))
        summary = {who: result["overall"] for who, result in report["splits"][name].items()}
        others = {who: summary[who] for who in baselines.BASELINES}
        figures.comparison_bars({"model": summary["model"]}, others, pictures / f"{name}.png", title=name)
    return report


def evaluate_sorting(run: Run, split: str, limit: int | None = None) -> dict:
    """The same JSON for a model that sorts: exact match and edit distance (a share of the length), by length."""
    write = functools.partial(run.trainer.compiled_evaluation(writer(run.trainer), run.mesh), run.params)
    report: dict = {"step": run.step, "config": run.config.to_dict(), "splits": {}}
    for name in SPLITS[split]:
        batches = list(sorting.evaluation_batches(sorting_config(run.config), name, limit))
        report["splits"][name] = score_sorting(write, tqdm(batches, desc=name, unit=" batches"))
    return report


def score_sorting(write: Callable, batches: Iterable[sorting.SortingBatch]) -> dict[str, dict]:
    """Summary of the model on sequences of a split."""
    scores = []
    for batch in batches:
        written, real = write(batch), batch["id"] >= 0
        of_batch = sorting.exact(written, batch), sorting.edit_distances(written, batch), batch["length"] - 1
        scores.append([x[real] for x in of_batch])
    return {"model": sorting.summarise(*(np.concatenate(x) for x in zip(*scores, strict=True)))}


def writer(trainer: Trainer) -> Callable:
    """`(params, batch) -> tokens`."""
    return lambda params, batch: trainer.model(params).write(batch["x"], batch["length"])


def sorting_config(config: ConfigDict) -> sorting.SortingConfig:
    return sorting.SortingConfig(batch_size=config.batch_size, seed=config.seed, **config.data)


class Observer:
    """What is kept of the pairs of a split beside their scores: plans of the first families, reliability, examples."""

    def __init__(self, split: str, pictures: Path, examples: Examples | None):
        self.reliability = metrics.Reliability()
        self._split, self._pictures, self._examples = split, pictures, examples
        self._drawn: set[str] = set()

    def __call__(self, example: Example) -> None:
        decoded = np.flatnonzero(example.match != decode.NO_MATCH)
        match = example.match[decoded]
        self.reliability.add(example.posterior[decoded, match], match == example.pair.target[decoded])
        if self._examples:
            self._examples.see(self._split, example)
        if len(self._drawn) < _PICTURES and example.family.accession not in self._drawn:
            self._drawn.add(example.family.accession)
            draw_plan(self._pictures, self._split, example)


def score_split(
    predict: Predict,
    families: pipeline.Families,
    batches: Iterable[pipeline.Batch],
    *,
    see: Callable[[Example], None] = lambda example: None,
    progress: str = "",
) -> dict[str, dict]:
    """Summary of the model and of every baseline on evaluation pairs of a split, the families'.

    The plan of a model with a gap model is the posterior that its pair HMM makes of what was transported, and is what
    is decoded; `transport` then is the transport plan by itself, with the same decoded alignment. see: is given every
    pair.
    """
    scores: dict[str, list[metrics.PairScores]] = {who: [] for who in ("model", "transport", *baselines.BASELINES)}
    for batch in tqdm(list(batches), desc=progress, unit=" batches", disable=not progress):
        result = predict(batch)
        plans, gaps = result.pop("plan"), result.pop("gaps", None)
        lengths = batch["x_length"], batch["y_length"]
        posterior, match = decode.decode_dense(plans, *lengths, gaps)
        for n, (identity, pair) in enumerate(pipeline.unbatch(batch)):
            family = families[identity[0]]
            plan, found = plans[n, : len(pair.x), : len(pair.y)], match[n, : len(pair.x)]
            of_pair = posterior[n, : len(pair.x), : len(pair.y)]
            score = metrics.score_plan(family.accession, pair, of_pair, found)
            if gaps is not None:
                scores["transport"].append(metrics.score_plan(family.accession, pair, plan, found))
            scores["model"].append(score.with_reconstruction({k: v[n] for k, v in result.items()}))
            for who, baseline in baselines.BASELINES.items():
                prediction = baseline(pair)
                scores[who].append(metrics.score_prediction(family.accession, pair, *prediction))
            see(Example(family, identity[1:], pair, plan, of_pair, found, score, scores["nw_blosum62"][-1]))
    return {who: metrics.summarise(of_pairs) for who, of_pairs in scores.items() if of_pairs}


def predictor(trainer: Trainer) -> Callable:
    """`(params, batch) -> plan, gap model if any, reconstruction sums`, with x as it is and with residues masked."""

    def predict(params, batch):
        model = trainer.model(params)
        x = batch["x"]
        position = jnp.arange(x.shape[1]) + batch["id"].sum(-1, keepdims=True)
        masked = (position % _MASK_EVERY == 0) & (x != vocab.PAD)
        whole = loss.sums(model, batch | {"x_seen": x, "asked": x != vocab.PAD})
        hidden = loss.sums(model, batch | {"x_seen": jnp.where(masked, vocab.MASK, x), "asked": masked})
        gaps = {"gaps": model.gaps()} if model.config.gap_model else {}
        return gaps | {
            "plan": model.plan(x, batch["y"], batch["x_length"], batch["y_length"]),
            "reconstruction_nats": whole["reconstruction"],
            "reconstruction_residues": whole["reconstruction/count"],
            "masked_nats": hidden["reconstruction"],
            "masked_residues": hidden["reconstruction/count"],
        }

    return predict


def certify_split(certify: Callable, batches: Iterable[pipeline.Batch]) -> dict[str, dict]:
    """For every layer and certificate the median and the worst over pairs and heads (None: infinite), and the share
    that is finite.
    """
    found: dict[str, list[Certificate]] = {}
    for batch in batches:
        for layer, certificate in certify(batch).items():
            real = np.resize(batch["id"][:, 0] >= 0, len(certificate.residual))  # self-attention has x, then y
            found.setdefault(layer, []).append(Certificate(*(x[real] for x in certificate)))
    return {layer: _spread(jax.tree.map(lambda *x: np.concatenate(x), *of)) for layer, of in found.items()}


def _spread(certificate: Certificate) -> dict[str, dict]:
    def number(x):
        return float(x) if np.isfinite(x) else None

    return {
        name: {"median": number(np.median(x)), "worst": number(x.max()), "finite": float(np.isfinite(x).mean())}
        for name, x in certificate._asdict().items()
    }


def certifier(trainer: Trainer) -> Callable:
    """`(params, batch) -> certificates` of every layer."""
    return lambda params, batch: trainer.model(params).certificates(
        batch["x"], batch["y"], batch["x_length"], batch["y_length"]
    )


def make_trainer(config: ConfigDict) -> Trainer:
    """What a configuration describes; a misspelt key fails here."""
    return Trainer.create(
        make_task(config), OptimizerConfig(**config.optimizer), total_steps=config.total_steps, seed=config.seed
    )


def described(config: ConfigDict, path: Path) -> tuple[Trainer, Mesh]:
    """Trainer and local mesh of a stored configuration. Raises ValueError naming the file."""
    try:
        return make_trainer(config), local_mesh(config.batch_size)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a model of this version: {error}") from error


def make_task(config: ConfigDict) -> Task:
    spec, blocks = specs_of(config.to_dict())
    if not sorts(config):
        return Alignment(AlignerConfig(**config.model), spec, LossConfig(**config.loss), blocks)
    if blocks is None:
        raise ValueError("attention.kind='sinkhorn' cannot be causal; sort with sparse_sinkhorn, local or softmax")
    return Sorting(SorterConfig(**config.model), blocks, config.data.symbols)


def sorts(config: ConfigDict) -> bool:
    """Whether it is one of the sorting task; all others align."""
    return config.get("task") == "sorting"


def check_aligns(run: Run) -> None:
    """Raises ValueError for a run of the sorting task."""
    if sorts(run.config):
        raise ValueError("the run is one of the sorting task, and has no plan: give one that was trained on alignments")


def local_mesh(batch_size: int) -> Mesh:
    """As many of this machine's devices as can share a batch evenly."""
    data = max(n for n in range(1, len(jax.devices()) + 1) if batch_size % n == 0)
    return sharding.make_mesh(sharding.MeshConfig(data), batch_size)


def resolve_data_dir(directory: str) -> Path:
    """As given if it exists; else relative to the repository, where the data that ship with it are."""
    path = Path(directory)
    beside = Path(__file__).parent / path
    return beside if not path.exists() and beside.exists() else path


def read_config(workdir: Path) -> ConfigDict:
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json): train one with --workdir={workdir}")
    try:
        return ConfigDict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): take it from config/metadata of the newest checkpoint"
        ) from error


def read_metrics(workdir: Path) -> list[dict]:
    """Lines of metrics.jsonl; none where there is no such file. One without its end is cut off, and left out."""
    path, rows = workdir / "metrics.jsonl", []
    *lines, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    for n, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is damaged ({error}): remove the line") from error
    return rows


def draw_plan(directory: Path, split: str, example: Example) -> None:
    family, (row_x, row_y) = example.family.accession, example.rows
    name = re.sub(r"[^\w-]", "_", family)  # it comes from the data, and must not lead out of the folder
    path = directory / f"plan_{split}_{name}_{row_x}_{row_y}.png"
    title = f"{family} ({split}), rows {row_x} and {row_y}"
    figures.plan_heatmap(example.posterior, path, target=example.pair.target, match=example.match, title=title)


def table(report: dict) -> str:
    """Every metric with its interval for every split, and F1 by identity bin, as text."""
    lines = []
    for split, result in report["splits"].items():
        pairs, sorted_ones = result["model"]["pairs"], "exact_match" in result["model"]["overall"]
        of, over = ("sequences", "sequences") if sorted_ones else ("pairs", "families")
        told = f"step {report['step']}" + (f", compiled by {report['asap']}" if "asap" in report else "")
        lines += [f"\n{split}: {pairs} {of}, {told}; 95 % intervals over {over}"]
        names = list(result["model"]["overall"])
        lines.append(f"{'':24}" + "".join(f"{who:>24}" for who in result))
        for name in names:
            cells = [_cell(summary["overall"].get(name)) for summary in result.values()]
            lines.append(f"{name:24}" + "".join(f"{cell:>24}" for cell in cells))
        metric, of_bin = ("exact_match", "exact match, length ") if sorted_ones else ("f1", "f1, identity ")
        for name in result["model"]["bins"]:
            cells = [f"{summary['bins'][name][metric]['value']:.3f}" for summary in result.values()]
            lines.append(f"{of_bin + name:24}" + "".join(f"{cell:>24}" for cell in cells))
        if not sorted_ones:
            lines += _certificate_lines(report["certificates"][split])
    return "\n".join(lines)


def _certificate_lines(layers: dict[str, dict]) -> list[str]:
    names = Certificate._fields
    lines = [f"{'median / worst':24}" + "".join(f"{name:>20}" for name in names)]
    for layer, spread in layers.items():
        cells = (" / ".join(_number(spread[name][which]) for which in ("median", "worst")) for name in names)
        lines.append(f"{layer:24}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2g}"


def _cell(metric: dict | None) -> str:
    return "-" if metric is None else f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="folder of the run, as given to train.py")
    model.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="instead of a run: weights alone")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test, which is both test splits")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: eval_SPLIT.json in WORKDIR or in runs/eval_NAME of the weights"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="also writes one page, DIR/report.html")
    parser.add_argument(
        "--asap", type=Path, metavar="FILE", help="maps of scripts/compile_asap.py in place of Sinkhorn's steps"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--data", help="folder with other shards than those the run was trained on")
    parser.add_argument("--limit", type=int, help="at most this many pairs a split, for a quick look")
    args = parser.parse_args(arguments)
    if args.weights and args.step is not None:
        parser.error("--step chooses a checkpoint of --workdir; --weights holds a single step")
    return args


if __name__ == "__main__":
    main()
