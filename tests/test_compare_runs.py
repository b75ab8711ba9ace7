"""scripts/compare_runs.py: seeds share a row, figures run along a setting, and what cannot be compared is named."""

import json
from pathlib import Path

import pytest

from configs import base
from scripts import compare_runs
from training import run_folder


def run(folder: Path, f1: float, *, step: int = 10, scores=("f1", "barycenter_mae"), **changes) -> Path:
    """Write a folder as train.py does, with two validations."""
    folder.mkdir(parents=True)
    config = base.changed(base.get_config(), {key.replace("__", "."): value for key, value in changes.items()})
    (folder / "config.json").write_text(run_folder.as_text(config))
    lines = [{"step": 5} | {f"validation/{name}": 0.1 for name in scores}, {"step": 7, "loss": 3.0}]
    others = {"validation_flanked/f1": 0.9, "negatives/auc": 0.9}  # which are no part of the comparison
    lines += [{"step": step} | {f"validation/{name}": f1 for name in scores} | others]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[str]:
    made = [run(tmp_path / f"s{seed}/low", 0.5 + seed / 10, seed=seed, attention__tau_b=0.5) for seed in range(3)]
    made += [run(tmp_path / "s0/high", 0.75, attention__tau_b=1.0)]
    made += [run(tmp_path / "s0/binned", 0.25, attention__tau_b=1.0, attention__dustbin="full")]
    return [str(path) for path in made]


def test_seeds_share_a_row_with_their_mean_and_range(runs, capsys):
    assert compare_runs.main(runs) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["", "runs", "step", "f1", "barycenter_mae"]
    assert lines[2] == ["low", "3", "10", *["0.600 (0.500 to 0.700)"] * 2]
    assert lines[3:] == [["high", "1", "10", "0.750", "0.750"], ["binned", "1", "10", "0.250", "0.250"]]


def test_figures_and_numbers_are_written(runs, tmp_path):
    out = tmp_path / "out"
    assert compare_runs.main([*runs, "--along=attention.tau_b", "--by=attention.dustbin", f"--output={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {f"comparison.{end}" for end in ("md", "json", "png")} | {
        "along.png"
    }
    assert (out / "along.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "comparison.json").read_text())["low"]["f1"] == {"value": 0.6, "low": 0.5, "high": 0.7}
    lines = compare_runs.along(
        {"a": Path(runs[0]), "b": Path(runs[-1])}, {"a": 1, "b": 2}, "attention.tau_b", "attention.dustbin"
    )
    assert lines == {"attention.dustbin none": {"0.5": 1}, "attention.dustbin full": {"1.0": 2}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--along=attention.tau_b"], "high and binned both have 1.0; leave one out, or tell them by --by"),
        (["--along=attention.tau"], "attention.tau is no setting of the runs"),
        (["{tmp}/other/low"], "differ in batch_size: give their folders different names"),
        (["{tmp}/twice/low"], "have the same seed, 0: give one of them"),
        (["{tmp}/late/low"], "runs named low were validated last at steps [10, 20]: finish them first"),
        (["{tmp}/silent"], "silent has logged no validation: train with --config.log.eval_every=N"),
        (["{tmp}/nothing"], "nothing holds no run"),
    ],
)
def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys, options, message):
    low = {"attention__tau_b": 0.5}
    run(tmp_path / "other/low", 0.5, seed=5, batch_size=4, **low)
    run(tmp_path / "twice/low", 0.5, **low)
    run(tmp_path / "late/low", 0.5, seed=5, step=20, **low)
    run(tmp_path / "silent", 0.5, scores=())
    options = [option.format(tmp=tmp_path) for option in options]
    assert compare_runs.main([*options, *runs, f"--output={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_scores_of_another_task_are_compared_too(tmp_path, capsys):
    assert compare_runs.main([str(run(tmp_path / "sorted", 0.5, scores=("exact_match",)))]) == 0
    assert "exact_match" in capsys.readouterr().out


def test_options_that_need_others_say_so(runs, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_runs.main([*runs, "--along=attention.tau_b"])
    assert "--along needs --output" in capsys.readouterr().err
