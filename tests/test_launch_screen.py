"""scripts/launch_screen.py: the commands it runs, and the table and figures made of their reports."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.baselines import BASELINES
from data.metrics import METRICS
from scripts import launch_screen

ROOT = Path(__file__).parents[1]
SPLITS = ("validation", "test_iid", "test_ood")


def test_dry_run_prints_the_commands_and_does_nothing(tmp_path):
    options = ["--dry-run", "--configs", "r1_balanced", "r2_dustbin", "--steps=20", "--limit=8"]
    arguments = [*options, f"--out={tmp_path}", f"--data={tmp_path / 'shards'}", "--", "--config.batch_size=4"]
    script = str(ROOT / "scripts/launch_screen.py")
    printed = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout
    expected = []
    for name in ("r1_balanced", "r2_dustbin"):
        run = tmp_path / name
        train = ["train.py", f"--config=configs/{name}.py", f"--workdir={run}"]
        train += [f"--config.data.dir={tmp_path / 'shards'}", "--config.total_steps=20"]
        expected.append([*train, "--config.checkpoint.keep_every=20", "--config.batch_size=4"])
        for split in SPLITS:
            score = ["eval.py", f"--workdir={run}", "--limit=8", f"--split={split}"]
            expected.append([*score, f"--output={run / f'end_{split}.json'}"])
            expected.append([*score, "--step=0", f"--output={run / f'start_{split}.json'}"])
    assert [shlex.split(line) for line in printed.splitlines()] == [["$", sys.executable, *e] for e in expected]
    assert list(tmp_path.iterdir()) == []


def summary(value: float, names) -> dict:
    overall = {name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name in names}
    return {"overall": overall, "bins": {}, "pairs": 10}


def reports(value: float) -> dict:
    """Scores of one split: the model's at `value`, the baselines' further up."""
    of_alignments = [name for name in METRICS if not name.startswith(("reconstruction", "sparse"))]
    baselines = {who: summary(0.5 + 0.1 * n, of_alignments) for n, who in enumerate(BASELINES)}
    return {"model": summary(value, METRICS)} | baselines


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table_of_a_split():
    table = launch_screen.markdown({"a": [reports(0.25), reports(0.375)], "b": [reports(0.125), reports(0.75)]})
    head, rule, *lines = table.splitlines()
    assert sorted(cells(head)) == sorted(["", *METRICS])
    assert set(cells(rule)) == {"---"} and len(cells(rule)) == len(cells(head))
    by_name = {cells(line)[0]: dict(zip(cells(head), cells(line), strict=True)) for line in lines}
    assert list(by_name) == ["a", "b", *BASELINES]
    assert all(by_name["a"][name] == "0.25 → 0.375" for name in METRICS)
    assert by_name["b"]["f1"] == "0.12 → 0.750"
    assert by_name["nw_blosum62"]["f1"] == "0.700" and by_name["nw_blosum62"]["sparse_ce"] == ""


@pytest.fixture
def runs(tmp_path) -> Path:
    for run, gain in (("a", 0.25), ("b", 0.5)):
        (tmp_path / run).mkdir()
        lines = [{"step": step, "loss": 3 - step / 10, "validation/f1": step / 20} for step in (0, 5, 10)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for n, split in enumerate(SPLITS):
            for when, value in (("start", 0.0), ("end", gain + n / 100)):
                report = {"splits": {split: reports(value)}}
                (tmp_path / run / f"{when}_{split}.json").write_text(json.dumps(report))
    return tmp_path


def test_tables_and_figures_of_a_screen(runs, capsys):
    launch_screen.collect(["a", "b"], runs)
    text = (runs / "screen.md").read_text()
    assert text.strip() in capsys.readouterr().out
    parts = dict(zip(SPLITS, text.split("### ")[1:], strict=True))
    for n, split in enumerate(SPLITS):
        assert parts[split].startswith(split)
        assert f"0.00 → {0.25 + n / 100:.3f}" in parts[split] and f"0.00 → {0.5 + n / 100:.3f}" in parts[split]
    screen = json.loads((runs / "screen.json").read_text())
    assert screen["test_ood"]["b"][1]["model"]["overall"]["f1"]["value"] == pytest.approx(0.52)
    for name in ("curves", *SPLITS):
        assert (runs / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_report_is_named(runs):
    (runs / "b" / "end_test_iid.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"b/end_test_iid\.json"):
        launch_screen.collect(["a", "b"], runs)
