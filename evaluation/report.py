"""Write an evaluation as one HTML page with tables, figures and alignments; the page loads no other file."""

import base64
import datetime
import importlib.metadata
import io
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Int

from alignment import formats
from alignment.columns import NO_POSITION, Aligned
from alignment.sequences import Record
from data import files, vocab
from data.families import Family
from data.transforms import Pair
from evaluation import figures, metrics
from evaluation.baselines import BASELINES
from evaluation.metrics import PairScores

TEMPLATE = "report.html.jinja"
_SHOWN = 3  # alignments of each kind and split
_BASELINE = "nw_blosum62"  # its F1 stands beside each alignment
_LOWER_IS_BETTER = ("reconstruction", "reconstruction_masked", "sparse_ce", "barycenter_mae", "false_pairs")
_CURVES = (
    *("loss", "reconstruction", "sparse_ce", "alignment", "f1", "barycenter_mae"),
    *("auc", "false_pairs", "gradient_norm", "learning_rate"),
)
_FIRST = {"f1": "F1 of aligned residue pairs", "auc": "AUC of related before unrelated pairs"}  # tables of all splits
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


class Example(NamedTuple):
    """A pair of a split, the alignment of the model, and the scores of model and baseline."""

    family: Family
    rows: tuple[int, int]
    pair: Pair
    plan: Float[np.ndarray, "x_length y_length"]
    posterior: Float[np.ndarray, "x_length y_length"]
    match: Int[np.ndarray, " x_length"]
    model: PairScores
    baseline: PairScores
    plan_label: str = "plan $P_{ij}$"
    probability: float = math.nan  # of homology


class Kind(NamedTuple):
    """A choice of examples, the lowest `key` first."""

    title: str
    description: str
    key: Callable[[Example], tuple[float, ...]]


KINDS = (
    Kind("Worst", "The lowest F1, one pair of a family.", lambda e: (e.model.f1,)),
    Kind(
        "Best",
        "The highest F1, one pair of a family; of equals, the lowest identity.",
        lambda e: (-e.model.f1, e.model.identity),
    ),
    Kind(
        "Where Needleman-Wunsch is ahead",
        "Pairs in which the F1 of Needleman-Wunsch exceeds the model's most.",
        lambda e: (e.model.f1 - e.baseline.f1,),
    ),
)


class Examples:
    """The pairs that the page shows, chosen among all pairs of all splits."""

    def __init__(self, count: int = _SHOWN):
        self._count = count
        self._kept: dict[str, dict[str, dict[str, Example]]] = {}  # by split, kind and family

    def see(self, split: str, example: Example) -> None:
        """Keep the example if it is among the first of a kind so far; a pair without an F1 never is."""
        if not (np.isfinite(example.model.f1) and np.isfinite(example.baseline.f1)):
            return
        for kind in KINDS:
            kept, family = self._kept.setdefault(split, {}).setdefault(kind.title, {}), example.family.accession
            kept[family] = min(kept.get(family, example), example, key=kind.key)
            for last in self.of(split, kind)[self._count :]:
                del kept[last.family.accession]

    def of(self, split: str, kind: Kind) -> list[Example]:
        """Return the kept examples of a split, the lowest key first."""
        return sorted(self._kept.get(split, {}).get(kind.title, {}).values(), key=kind.key)


def write_html(
    path: Path, report: Mapping[str, Any], examples: Examples, rows: Sequence[figures.MetricRow] = (), command: str = ""
) -> None:
    """Write the page from the result of a task's `evaluate` and the examples collected during it.

    Rows are the lines of metrics.jsonl, if there is a run. The page names the command line that made it.
    """
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    measured = {name.rpartition("/")[2] for row in rows for name in row}
    curves = [name for name in _CURVES if name in measured]
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    page = environment.get_template(TEMPLATE).render(
        report=report,
        least_families=metrics.LEAST_FAMILIES,
        few_pairs=metrics.FEW_PAIRS,
        first=[table for metric, title in _FIRST.items() if (table := _all_splits(metric, title, report["splits"]))],
        splits=[_split(name, report, examples) for name in report["splits"]],
        curves=_drawn(figures.metric_curves, rows, metrics=curves) if curves else "",
        configuration=sorted(flatten_dict(report["config"], sep=".").items()),
        command=command,
        versions=f"Python {platform.python_version()}, {packages}; {devices}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    files.write(path, page)


def _split(name: str, report: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
    """Return the values of one split that the template shows."""
    result, tenths = report["splits"][name], report.get("reliability", {}).get(name)
    model, overall = result["model"], {who: of["overall"] for who, of in result.items()}
    others = {who: overall.pop(who) for who in BASELINES if who in overall}
    return {
        "name": name,
        "metrics": {"who": list(result), "rows": [_row(metric, result) for metric in model["overall"]]},
        "bins": {"who": list(result), "rows": [_row("f1", result, of_bin) for of_bin in model["bins"]]},
        "bars": _drawn(figures.comparison_bars, overall, others, metrics=list(others[_BASELINE])),
        "by_identity": _drawn(figures.identity_bins, dict(result)) if model["bins"] else "",
        "reliability": _drawn(figures.reliability, tenths) if tenths else "",
        "kinds": [
            (kind, [_shown(example, with_plan=n == 0) for n, example in enumerate(examples.of(name, kind))])
            for kind in KINDS
        ],
        "certificates": report.get("certificates", {}).get(name, {}),
    }


def _all_splits(metric: str, title: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with a row for each split that has the metric, and nothing if there is none."""
    found = {name: of for name, of in splits.items() if metric in of["model"]["overall"]}
    rows = [{"split": name, "of": of["model"], **_row(metric, of)} for name, of in found.items()]
    return {"title": title, "who": list(next(iter(found.values()))), "rows": rows} if found else {}


def _row(metric: str, result: Mapping[str, Any], of_bin: str = "") -> dict[str, Any]:
    """Return a row of a table, over all pairs or a bin, and the best value in it if there are several."""
    cells = [(of["bins"].get(of_bin, {}) if of_bin else of["overall"]).get(metric) for of in result.values()]
    values = [cell["value"] for cell in cells if cell]
    best = (min if metric in _LOWER_IS_BETTER else max)(values) if len(values) > 1 else None
    return {"label": _bin(of_bin, result) if of_bin else figures.LABELS[metric], "cells": cells, "best": best}


def _bin(name: str, result: Mapping[str, Any]) -> str:
    """Return the name of a bin and its size, with a star if it has few pairs."""
    pairs, families = (result["model"]["bins"][name][of] for of in ("pairs", "families"))
    return f"{name} ({pairs:,} of {families:,}){' *' if pairs < metrics.FEW_PAIRS else ''}"


def _shown(example: Example, *, with_plan: bool) -> dict[str, Any]:
    """Return text, heat maps and numbers of an alignment."""
    both = {"target": example.pair.target, "match": example.match}
    return {
        "of": example,
        "lines": formats.text(_aligned(example), example.pair.target).rstrip().splitlines(),
        "posterior": _drawn(figures.plan_heatmap, example.posterior, label="posterior", **both),
        "plan": _drawn(figures.plan_heatmap, example.plan, label=example.plan_label, **both) if with_plan else "",
    }


def _aligned(example: Example) -> Aligned:
    ids = [example.family.rows[row] for row in example.rows]
    x, y = (Record(name, "", vocab.decode(tokens)) for name, tokens in zip(ids, example.pair[:2], strict=True))
    i = np.flatnonzero(example.match != NO_POSITION)
    pairs, posterior = np.stack([i, example.match[i]], axis=1), example.posterior
    x_alone, y_alone = (np.clip(1 - posterior.sum(axis), 0, 1) for axis in (1, 0))
    confidence = posterior[i, example.match[i]]
    return Aligned(example.family.accession, x, y, pairs, confidence, example.probability, x_alone, y_alone)


def _drawn(draw: Callable, *arguments: Any, **options: Any) -> str:
    """Return the picture that a function of `figures` draws, as a data URI."""
    memory = io.BytesIO()
    draw(*arguments, path=memory, **options)
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()
