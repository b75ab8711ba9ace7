"""Draw plans, training curves and comparisons of runs, as PNG files.

All are drawn on `Figure` objects without pyplot: no display is needed, and no global state is left behind.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from data import files
from evaluation.metrics import FEW_PAIRS
from models.decoding import NO_MATCH

# Okabe and Ito's palette for any colour vision (https://jfly.uni-koeln.de/color/), without its yellow, which is pale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_BASELINE = "#9A9A9A"
_DPI = 150
_PANEL = (3.6, 2.7)  # inches

LABELS = {
    "loss": "loss",
    "reconstruction": "reconstruction (nats per residue)",
    "reconstruction_masked": "masked reconstruction (nats per residue)",
    "sparse_ce": "sparse CE (nats per aligned residue)",
    "alignment": "likelihood of the alignment (nats per residue)",
    "barycenter_mae": "barycenter MAE (residues)",
    "barycenter_within_1": "barycenter within 1 residue (share)",
    "precision": "precision (share)",
    "recall": "recall (share)",
    "f1": "F1 of aligned residue pairs",
    "auc": "AUC of related before unrelated pairs",
    "false_pairs": "false pairs (per residue of the shorter sequence)",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}

MetricRow = Mapping[str, Any]  # one line of metrics.jsonl: "step", and numbers under "metric" or "split/metric"
Where = Path | str | io.BytesIO  # a file, or memory
Bars = Mapping[str, Mapping[str, Mapping[str, Any]]]
Curve = tuple[list[int | float], list[int | float]]  # steps, values


def plan_heatmap(
    plan: Float[np.ndarray, "x_length y_length"],
    path: Where,
    *,
    target: Int[np.ndarray, " x_length"] | None = None,
    match: Int[np.ndarray, " x_length"] | None = None,
    scale: int = 1,
    title: str = "",
    label: str = "plan $P_{ij}$",
    posterior: Float[np.ndarray, "x_length y_length"] | None = None,
) -> None:
    """Draw a plan, and over it the reference alignment and the decoded one.

    Alignments hold the position in y of each residue of x, or -1. One value of the plan stands for `scale` residues of
    either sequence; `label` is the name of the values. A posterior gets a panel of its own, and then the alignments.
    """
    panels = [(plan, label)] if posterior is None else [(plan, label), (posterior, "posterior")]
    figure = Figure(figsize=(6.4 * len(panels), 5.6), layout="constrained")
    figure.suptitle(title)
    for axes, (values, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        # The square root shows mass spread thinly over a band beside the peaks of a sharp row.
        edges = np.array([0, values.shape[1], values.shape[0], 0]) * scale - 0.5
        norm = PowerNorm(0.5, vmin=0, vmax=max(float(values.max(initial=0)), 1e-12))
        image = axes.imshow(values, cmap="Greys", norm=norm, extent=tuple(edges))
        axes.set(xlabel="position in y (residues)", ylabel="position in x (residues)")
        figure.colorbar(image, ax=axes, label=f"{name} (square-root scale)", shrink=0.85)
    size = max(1.0, min(6.0, 600 / max(plan.shape)))
    squares = {"marker": "s", "color": _COLOURS[1], "markerfacecolor": "none", "label": "reference"}
    dots = {"marker": ".", "color": _COLOURS[0], "label": "decoded (MEA)"}
    for of, style in ((target, squares), (match, dots)):
        if of is not None:
            rows = np.flatnonzero(of != NO_MATCH)
            axes.plot(of[rows], rows, linestyle="none", markeredgewidth=0.7, markersize=size, **style)
            axes.legend(loc="upper right", markerscale=8 / (size + 2))
    _save(figure, path)


def metric_curves(rows: Sequence[MetricRow], path: Where, *, metrics: Sequence[str] | None = None) -> None:
    """Draw the metrics of one run against the step, a panel for each metric, a line for each split.

    Rows are lines of metrics.jsonl: "validation/f1" is metric f1 of split validation, plain "loss" is of split train.
    Raises ValueError if no row holds a number, or none holds one of `metrics`.
    """
    _curve_panels(_curves(rows), path, metrics)


def screen_figure(runs: Mapping[str, Sequence[MetricRow]], path: Where, *, split: str = "validation") -> None:
    """Draw one split's metrics of several runs against the step, a panel for each metric, a line for each run.

    Raises ValueError if no run has a number of this split.
    """
    _curve_panels({run: _curves(rows).get(split, {}) for run, rows in runs.items()}, path, title=split)


def comparison_bars(
    runs: Bars, baselines: Bars, path: Where, *, metrics: Sequence[str] | None = None, title: str = ""
) -> None:
    """Draw final metrics of runs (coloured) beside baselines (grey), with intervals, a panel for each metric.

    Both have the form {name: {metric: {"value", "low", "high"}}}, as `overall` in eval.py's JSON. A value without an
    interval (None) has a question mark. A name without a metric (a diagonal has no cross-entropy) keeps an empty line.
    Raises ValueError if there is nothing to draw, or nobody has one of `metrics`.
    """
    bars = {**runs, **baselines}
    colours = [*itertools.islice(itertools.cycle(_COLOURS), len(runs)), *[_BASELINE] * len(baselines)]

    def draw(axes: Axes, name: str) -> None:
        for row, (colour, summary) in enumerate(zip(colours, bars.values(), strict=True)):
            if name in summary:
                value, low, high = (summary[name][key] for key in ("value", "low", "high"))
                end = (value if high is None else max(value, high)), row
                axes.barh(row, value, height=0.7, color=colour)
                if low is not None:
                    axes.plot([low, high], [row, row], color="black", linewidth=1.2, solid_capstyle="butt")
                told = f"{value:#.3g}" + (" (?)" if low is None else "")
                axes.annotate(told, end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.margins(x=0.22)
        axes.set_xlim(left=0)

    _panels(bars.values(), metrics, draw, path, title=title, height=0.34 * len(bars) + 0.9)


def along_places(series: Mapping[str, Mapping[str, Mapping]], path: Where, *, title: str = "") -> None:
    """Draw final metrics of runs against the place that their configuration's argument gives, a panel for each metric.

    series: lines by name, each {place: {metric: {"value", "low", "high"}}}. Words come before numbers along the axis.
    Intervals are drawn as bars. Raises ValueError if there is nothing to draw.
    """
    places = sorted({place for line in series.values() for place in line}, key=_word_or_number)

    def draw(axes: Axes, name: str) -> None:
        for n, ((label, line), colour) in enumerate(zip(series.items(), itertools.cycle(_COLOURS), strict=False)):
            shown = [place for place in places if name in line.get(place, {})]
            found = [line[place][name] for place in shown]
            value, low, high = (np.array([of[key] for of in found], np.float64) for key in ("value", "low", "high"))
            beside = np.array([places.index(place) for place in shown]) + 0.06 * n  # intervals would hide each other
            spread = np.maximum(np.stack([value - low, high - value]), 0)
            axes.errorbar(beside, value, spread, color=colour, marker="o", markersize=4, linewidth=1, label=label)
        axes.set_xticks(range(len(places)), places)

    _panels((of for line in series.values() for of in line.values()), None, draw, path, title=title)


def _word_or_number(place: str) -> tuple[float, str]:
    try:
        return float(place), place
    except ValueError:
        return -math.inf, place


def identity_bins(summaries: Mapping[str, Mapping[str, Any]], path: Where, *, metric: str = "f1") -> None:
    """Draw one metric by identity of the aligned residues, the model in colour and baselines in grey, with intervals.

    Summaries have the form of a split in eval.py's JSON; the first is the model. Bins with few pairs get a star. Raises
    ValueError if no bin holds the metric.
    """
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary["bins"]))
    if not any(metric in values for summary in summaries.values() for values in summary["bins"].values()):
        raise ValueError(f"metric: {metric!r} is in no bin")
    figure, (axes,) = _figure(1, 1, 7.2, 3.6)
    styles = itertools.cycle(zip((_COLOURS[0], "#333333", "#666666", "#999999", "#BBBBBB"), "osv^D", strict=True))
    for n, ((who, summary), (colour, marker)) in enumerate(zip(summaries.items(), styles, strict=False)):
        places = [k for k, name in enumerate(names) if metric in summary["bins"].get(name, {})]
        found = [summary["bins"][names[k]][metric] for k in places]
        # None, where there is no interval, becomes NaN, which is not drawn.
        value, low, high = (np.array([of[key] for of in found], np.float64) for key in ("value", "low", "high"))
        beside = np.array(places) + 0.06 * (n - (len(summaries) - 1) / 2)  # intervals would hide each other
        # A bootstrap interval need not hold the value, over few families say.
        spread, width = np.maximum(np.stack([value - low, high - value]), 0), 2 if n == 0 else 1
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": width}
        axes.errorbar(beside, value, spread, capsize=2, label=who, **style)
    sizes = [(name, of.get("pairs", FEW_PAIRS)) for of_one in summaries.values() for name, of in of_one["bins"].items()]
    few = {name for name, pairs in sizes if pairs < FEW_PAIRS}
    axes.set_xticks(range(len(names)), [f"{name} *" if name in few else name for name in names])
    label = "identity of the aligned residues" + (f" (* fewer than {FEW_PAIRS} pairs)" if few else "")
    axes.set(xlabel=label, ylabel=LABELS.get(metric, metric), ylim=(0, 1.02))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    _save(figure, path)


def reliability(tenths: Sequence[Mapping[str, float]], path: Where) -> None:
    """Draw the share of correct residue pairs against their confidence, from `metrics.Reliability.tenths`.

    Tenths with few pairs are hollow.
    """
    figure, (left, right) = _figure(1, 2, 7.2, 3.2)
    confidence, correct, pairs = ([of[key] for of in tenths] for key in ("confidence", "correct", "pairs"))
    left.plot([0, 1], [0, 1], color=_BASELINE, linewidth=1, label="confidence is the probability")
    left.plot(confidence, correct, color=_COLOURS[0], marker="o", label="found")
    if few := [n for n, number in enumerate(pairs) if number < FEW_PAIRS]:
        x, y = ([of[n] for n in few] for of in (confidence, correct))
        hollow: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": _COLOURS[0], "markerfacecolor": "white"}
        left.plot(x, y, **hollow, label=f"fewer than {FEW_PAIRS} pairs")
    left.set(xlabel="mean confidence", ylabel="share in the reference", xlim=(0, 1), ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8, loc="upper left")
    right.bar(confidence, np.array(pairs) / max(sum(pairs), 1), width=0.06, color=_COLOURS[0])
    right.set(xlabel="mean confidence", ylabel="share of decoded pairs", xlim=(0, 1))
    _save(figure, path)


class PairPicture(NamedTuple):
    """A pair of sequences to draw: lengths, the reference alignment, identical residues, and lengths of flanks."""

    title: str
    x_length: int
    y_length: int
    target: Int[np.ndarray, " x_length"]  # position in y, or -1
    identical: Bool[np.ndarray, " x_length"]  # aligned with the same residue
    ends: tuple[int, int, int, int]  # residues before and after x, before and after y


def training_pairs(pairs: Sequence[PairPicture], path: Where, *, title: str = "") -> None:
    """Draw each pair as two bars, x above y, with the aligned stretches between them; flanks are orange.

    Stretches are the darker, the more of their residues are identical.
    """
    columns = 2 if len(pairs) > 4 else 1
    rows = -(-len(pairs) // columns)
    figure, axes = _figure(rows, columns, 6.4 * columns, 0.4 + 1.1 * rows)
    figure.suptitle(title)
    for panel in axes[len(pairs) :]:
        panel.set_visible(False)
    for panel, pair in zip(axes, pairs, strict=False):
        for y, length, (before, after) in ((1.0, pair.x_length, pair.ends[:2]), (0.0, pair.y_length, pair.ends[2:])):
            for start, stop, colour in (
                (0, before, _COLOURS[5]),
                (before, length - after, _BASELINE),
                (length - after, length, _COLOURS[5]),
            ):
                panel.barh(y, stop - start, left=start, height=0.22, color=colour)
        for first, last in _stretches(pair.target):
            corners = [(first, 0.89), (last + 1, 0.89), (pair.target[last] + 1, 0.11), (pair.target[first], 0.11)]
            share = 0.15 + 0.85 * float(pair.identical[first : last + 1].mean())
            panel.add_patch(Polygon(corners, color=_COLOURS[0], alpha=share, linewidth=0))
        panel.set(
            yticks=[0, 1], yticklabels=["y", "x"], ylim=(-0.25, 1.25), xlim=(0, max(pair.x_length, pair.y_length))
        )
        panel.set_title(pair.title, fontsize=8, loc="left")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(labelsize=7, length=2)
    _save(figure, path)


def _stretches(target: Int[np.ndarray, " x_length"]) -> Iterator[tuple[int, int]]:
    """Yield first and last position of each stretch of x whose residues are aligned with neighbours, one by one."""
    aligned = np.flatnonzero(target >= 0)
    breaks = np.flatnonzero((np.diff(aligned) != 1) | (np.diff(target[aligned]) != 1)) + 1
    for part in np.split(aligned, breaks):
        if len(part):
            yield int(part[0]), int(part[-1])


def _curves(rows: Sequence[MetricRow]) -> dict[str, dict[str, Curve]]:
    """Return the curves of a run by split and metric."""
    curves: dict[str, dict[str, Curve]] = {}
    for row in rows:
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            split, _, metric = key.rpartition("/")
            steps, values = curves.setdefault(split or "train", {}).setdefault(metric, ([], []))
            steps.append(row["step"])
            values.append(value)
    return curves


def _curve_panels(
    lines: Mapping[str, Mapping[str, Curve]], path: Where, metrics: Sequence[str] | None = None, title: str = ""
) -> None:
    def draw(axes: Axes, name: str) -> None:
        for colour, (label, curves) in zip(itertools.cycle(_COLOURS), lines.items(), strict=False):
            if name in curves:
                steps, values = curves[name]
                marker = "o" if len(steps) <= 20 else None
                axes.plot(steps, values, linewidth=1.5, marker=marker, markersize=3, label=label, color=colour)
        axes.set_xlabel("step")

    _panels(lines.values(), metrics, draw, path, title=title)


def _panels(
    found: Iterable[Mapping[str, Any]],
    wanted: Sequence[str] | None,
    draw: Callable[[Axes, str], None],
    path: Where,
    *,
    title: str = "",
    height: float = _PANEL[1],
) -> None:
    """Draw a panel for each metric that is wanted, by default for all that were found."""
    known = list(dict.fromkeys(itertools.chain.from_iterable(found)))
    if not known:
        raise ValueError("metrics: there is no number to draw in what was given")
    if missing := [name for name in wanted or () if name not in known]:
        raise ValueError(f"metrics: {', '.join(missing)} not found; there are {', '.join(known)}")
    names = wanted or sorted(known, key=lambda name: [*LABELS, name].index(name))
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure, grid = _figure(rows, columns, _PANEL[0] * columns, height * rows + 0.6)
    legend: dict[str, Any] = {}  # one for all panels: a line means the same in each
    for axes, name in zip(grid, names, strict=False):
        axes.xaxis.set_major_locator(MaxNLocator(5))
        draw(axes, name)
        axes.set_title(LABELS.get(name, name), fontsize=9)
        axes.tick_params(labelsize=8)
        legend |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid[len(names) :]:
        axes.remove()
    if legend:
        figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=min(len(legend), 4))
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Figure, path: Where) -> None:
    """Write a figure into memory, or a file that appears when it is finished, in the format of its name."""
    if isinstance(path, io.BytesIO):
        figure.savefig(path, dpi=_DPI)
        return
    with files.finished(path, "wb") as file:
        figure.savefig(file, dpi=_DPI, format=Path(path).suffix[1:] or None)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches, and its panels, without a frame above and on the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
