import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation import figures

ROWS = [
    {
        "step": step,
        "loss": 3.0 - step / 10,
        "learning_rate": 1e-3,
        "note": "text",
        "resumed": True,
        "validation/f1": 0.1 * step,
    }
    for step in range(4)
]
SUMMARY = {"f1": {"value": 0.5, "low": 0.4, "high": 0.6}, "sparse_ce": {"value": 2.0, "low": 1.9, "high": 2.2}}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures saved by the code under test, kept for inspection; the files are written all the same."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (kept.append(self), save(self, *args, **options))
    )
    return kept


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def png_size(path) -> int:
    assert path.read_bytes().startswith(b"\x89PNG")
    return path.stat().st_size


def test_heatmap_draws_plan_and_both_paths(tmp_path, drawn):
    plan = np.eye(5, 7, dtype=np.float32)
    target, match = np.array([0, 1, -1, 3, 6]), np.array([0, 1, 2, -1, -1])
    figures.plan_heatmap(plan, tmp_path / "plan.png", target=target, match=match, title="pair")
    assert png_size(tmp_path / "plan.png") > 5000
    axes = drawn[0].axes[0]
    reference, decoded = axes.lines
    np.testing.assert_array_equal(reference.get_xydata(), [[0, 0], [1, 1], [3, 3], [6, 4]])
    np.testing.assert_array_equal(decoded.get_xydata(), [[0, 0], [1, 1], [2, 2]])
    assert "residues" in axes.get_xlabel() and drawn[0].get_suptitle() == "pair"


def test_heatmap_of_an_empty_plan_without_paths(tmp_path):
    figures.plan_heatmap(np.zeros((3, 3), np.float32), tmp_path / "plan.png")
    assert png_size(tmp_path / "plan.png") > 1000


def test_metric_curves_have_a_panel_a_metric_and_a_line_a_split(tmp_path, drawn):
    rows = [*ROWS, {"step": 3, "validation/loss": 2.9}]
    figures.metric_curves(rows, tmp_path / "curves.png")
    png_size(tmp_path / "curves.png")
    assert titles(drawn[0]) == ["loss", "F1 of aligned residue pairs", "learning rate"]
    loss, f1, _ = drawn[0].axes
    assert {line.get_label(): list(line.get_xdata()) for line in loss.lines} == {
        "train": [0, 1, 2, 3],
        "validation": [3],
    }
    np.testing.assert_allclose(f1.lines[0].get_ydata(), [0, 0.1, 0.2, 0.3])
    assert f1.lines[0].get_color() == loss.lines[1].get_color(), "a split keeps its colour in every panel"


def test_screen_overlays_runs_of_one_split(tmp_path, drawn):
    figures.screen_figure({"r1": ROWS, "r2": ROWS[:2]}, tmp_path / "screen.png")
    assert titles(drawn[0]) == ["F1 of aligned residue pairs"]
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["r1", "r2"]
    with pytest.raises(ValueError, match="no number to draw"):
        figures.screen_figure({"r1": ROWS}, tmp_path / "screen.png", split="test")


def test_bars_leave_out_what_a_baseline_lacks(tmp_path, drawn):
    figures.comparison_bars({"r1": SUMMARY}, {"nw": {"f1": SUMMARY["f1"]}}, tmp_path / "bars.png", title="test")
    png_size(tmp_path / "bars.png")
    cross_entropy, f1 = drawn[0].axes
    assert [bar.get_width() for bar in f1.patches] == [0.5, 0.5]
    assert [bar.get_width() for bar in cross_entropy.patches] == [2.0]
    np.testing.assert_array_equal(f1.lines[0].get_xdata(), [0.4, 0.6])
    assert [label.get_text() for label in cross_entropy.get_yticklabels()] == ["r1", "nw"]


def test_a_value_without_interval_is_drawn_and_marked(tmp_path, drawn):
    alone = {"f1": {"value": 0.5, "low": None, "high": None}}
    figures.comparison_bars({"r1": alone}, {"nw": {"f1": SUMMARY["f1"]}}, tmp_path / "bars.png")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.5] and len(axes.lines) == 1
    assert [text.get_text() for text in axes.texts] == ["0.500 (?)", "0.500"]


def test_bins_with_few_pairs_are_marked(tmp_path, drawn):
    alone = {"f1": {"value": 0.5, "low": None, "high": None}, "pairs": 9, "families": 3}
    summary = {"bins": {"<.15": alone, ">.60": {"f1": SUMMARY["f1"], "pairs": 10, "families": 9}}}
    figures.identity_bins({"model": summary}, tmp_path / "bins.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<.15 *", ">.60"]
    assert "* fewer than 10 pairs" in axes.get_xlabel()
    (bars,) = [artist for artist in axes.collections if hasattr(artist, "get_segments")]
    ends = [np.asarray(segment)[:, 1] for segment in bars.get_segments() if len(segment)]
    np.testing.assert_allclose(ends, [[0.4, 0.6]])


def test_tenths_with_few_pairs_are_hollow(tmp_path, drawn):
    tenths = [{"confidence": 0.15, "correct": 1.0, "pairs": 9}, {"confidence": 0.95, "correct": 0.9, "pairs": 10}]
    figures.reliability(tenths, tmp_path / "reliability.png")
    hollow = drawn[0].axes[0].lines[-1]
    assert hollow.get_markerfacecolor() == "white" and list(hollow.get_xdata()) == [0.15]


def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "plan.pdf"
    figures.plan_heatmap(np.eye(3, dtype=np.float32), path)
    earlier = path.read_bytes()
    assert earlier.startswith(b"%PDF")

    def half(self, file, **options):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="the disk is full"):
        figures.plan_heatmap(np.eye(3, dtype=np.float32), path)
    assert path.read_bytes() == earlier and list(path.parent.iterdir()) == [path]


def test_an_unknown_metric_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="metrics: auc not found; there are loss, learning_rate, f1"):
        figures.metric_curves(ROWS, tmp_path / "curves.png", metrics=["loss", "auc"])


def test_pyplot_with_its_global_state_is_never_imported():
    code = "import sys, evaluation.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
