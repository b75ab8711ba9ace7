"""scripts/launch_screen.py: the commands it runs, here and on a TPU, and the table and figures of their reports."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.baselines import BASELINES
from evaluation.metrics import METRICS
from scripts import launch_screen, launch_tpu
from tests.support import tiny

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


def test_configurations_may_have_arguments(tmp_path, capsys):
    launch_screen.main(["--dry-run", "--configs", "dial:0.8,full", f"--out={tmp_path}"])
    train, score, *_ = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert f"--workdir={tmp_path / 'dial-0.8-full'}" in score
    assert {"--config=configs/dial.py:0.8,full", f"--workdir={tmp_path / 'dial-0.8-full'}"} < set(train)


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
    assert set("".join(cells(rule))) == {"-"} and len(cells(rule)) == len(cells(head))
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


def test_runs_with_arguments_are_drawn_along_these(runs):
    for name, place in (("a", "softmax"), ("b", "0.5,full")):
        (runs / name).rename(runs / launch_screen.folder_of(f"dial:{place}"))
    launch_screen.collect(["dial:softmax", "dial:0.5,full"], runs)
    assert (runs / "test_ood_places.png").read_bytes().startswith(b"\x89PNG")
    ends = {"dial-softmax": {"f1": 1}, "dial-0.5-full": {"f1": 2}, "r1": {"f1": 3}}
    arguments = {"dial-softmax": ("dial", "softmax"), "dial-0.5-full": ("dial", "0.5,full"), "r1": ("r1", "")}
    expected = {"dial": {"softmax": {"f1": 1}}, "dial, full": {"0.5": {"f1": 2}}}
    assert launch_screen.along_places(ends, arguments) == expected


def test_a_screen_without_validation_has_its_table(runs):
    for run in "ab":
        (runs / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    launch_screen.collect(["a", "b"], runs)
    assert (runs / "screen.md").exists() and not (runs / "curves.png").exists()


def test_values_without_intervals_are_shown(runs):
    path = runs / "a/end_test_iid.json"
    report = json.loads(path.read_text())
    for of in report["splits"]["test_iid"].values():
        for metric in of["overall"].values():
            metric |= {"low": None, "high": None}
    path.write_text(json.dumps(report))
    launch_screen.collect(["a", "b"], runs)
    assert "0.00 → 0.260" in (runs / "screen.md").read_text()


def test_a_missing_report_is_named(runs):
    (runs / "b" / "end_test_iid.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"b/end_test_iid\.json"):
        launch_screen.collect(["a", "b"], runs)


TPU = ["--target=tpu", "--project=p", "--zone=z", "--bucket=gs://b/of/mine/", "--name=n"]


@pytest.fixture
def launch(monkeypatch, capsys):
    """Runs the command line where nothing is on PATH; its exit status, and what it printed."""
    monkeypatch.setenv("PATH", "")

    def run(*options: str):
        try:
            status = launch_screen.main(options)
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr()

    return run


def test_dry_run_for_a_tpu_needs_no_gcloud(launch, tmp_path):
    options = ["--dry-run", f"--out={tmp_path}", "--data=shards", "--steps=20", "--accelerator=v6e-4", "--on-demand"]
    code, (printed, _) = launch(*TPU, *options, "--", "--config.batch_size=4")
    assert not code
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("$ ")]
    assert [command[:5] for command in commands if command[1] == "compute"] == [
        ["gcloud", "compute", "tpus", "queued-resources", verb] for verb in ("describe", "delete", "create", "delete")
    ]
    (create,) = [command for command in commands if "create" in command]
    assert {"n", "--project=p", "--zone=z", "--accelerator-type=v6e-4"} < set(create)
    assert "--spot" not in create and "--runtime-version=v2-alpha-tpuv6e" in create
    (script,) = [line for line in printed.splitlines() if "launch_screen.py" in line]
    assert "--data=data --steps=20 --configs" in script and "-- --config.batch_size=4" in script
    assert "BUCKET=gs://b/of/mine/n" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TPU, "gcloud is not installed: it comes with the Google Cloud CLI"),
        (["--target=tpu", "--zone=z"], "--target=tpu needs --project, --bucket"),
        ([*TPU, "--bucket=b"], "--bucket=b must begin with gs://"),
        ([*TPU, "--accelerator=v6e-16"], "invalid choice: 'v6e-16'"),
        (["--configs", "r2_balanced", "r3"], "--configs: r3 not found in configs/; there are aligner, "),
        (["--limit=0"], "argument --limit: '0' was given, allowed is 1 or more"),
    ],
)
def test_what_is_missing_for_a_tpu_is_said(launch, options, message, tmp_path):
    code, (_, errors) = launch(*options, f"--out={tmp_path / 'out'}")
    assert code in (1, 2) and message in errors.splitlines()[-1]


class Cloud:
    """gcloud is tests/support/fake_gcloud.py, whose machines start `python` for Python."""

    def __init__(self, folder: Path, monkeypatch, python: str):
        self.folder, binaries = folder, folder / "bin"
        binaries.mkdir(parents=True)
        (folder / "python").write_text(python)
        (binaries / "gcloud").write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/support/fake_gcloud.py"} "$@"\n'
        )
        (binaries / "gcloud").chmod(0o755)
        monkeypatch.setenv("FAKE_CLOUD", str(folder))
        monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")

    def logs(self) -> list[str]:
        """Return the logs of every machine from the bucket."""
        return [log.read_text() for log in sorted((self.folder / "objects/b/n/logs").iterdir())]

    def made(self) -> int:
        """How many machines there were; fails if one is left, which would cost money."""
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        made, deleted = (sum(verb in call for call in calls) for verb in ("create", "delete"))
        assert made == deleted and not (self.folder / "machine").exists()
        return made


def tpu(*arguments: str) -> launch_tpu.Tpu:
    return launch_tpu.Tpu("n", "p", "z", "gs://b/n", "v6e-8", True, None, arguments, snapshot_every=1, poll_every=1)


# Stands in for the screen on the machine: the first half ends in a checkpoint and one that is being written.
HALVES = """#!/bin/sh
if [ -e runs/a/first ]; then echo "goes on" && ls runs/a/checkpoints && touch runs/a/second && exit; fi
mkdir -p runs/a/checkpoints/3 runs/a/checkpoints/6.orbax-checkpoint-tmp-1 runs/compiled
touch runs/a/first && sleep 60
"""


def test_a_preempted_machine_has_a_successor_that_starts_from_the_snapshot(tmp_path, monkeypatch, capsys):
    cloud = Cloud(tmp_path / "cloud", monkeypatch, str(tmp_path / "halves"))
    (tmp_path / "halves").write_text(HALVES)
    (tmp_path / "halves").chmod(0o755)
    launch_tpu.run(tpu(), tmp_path / "out")
    assert cloud.made() == 2 and "TPU SUSPENDED" in capsys.readouterr().out
    first, second = cloud.logs()
    assert "goes on\n3\n" in second and "goes on" not in first
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {"a", "first", "second", "checkpoints", "3"}
    # A finished screen is only fetched.
    launch_tpu.run(tpu(), tmp_path / "again")
    assert cloud.made() == 2 and (tmp_path / "again/a/second").exists()


def test_a_screen_that_fails_on_a_tpu_says_so_and_costs_nothing_more(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path / "cloud", monkeypatch, "/bin/false")
    with pytest.raises(launch_tpu.LaunchError, match="the screen failed on the TPU; logs are in gs://b/n/logs"):
        launch_tpu.run(tpu(), tmp_path / "out")
    assert cloud.made() == 1 and len(cloud.logs()) == 1


@pytest.mark.slow
def test_a_preempted_screen_on_a_tpu_goes_on_and_ends_with_the_table(tmp_path, monkeypatch, capsys):
    cloud, out = Cloud(tmp_path / "cloud", monkeypatch, sys.executable), tmp_path / "out"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    options = ["--bucket=gs://b", "--configs", "r2_dustbin", "--limit=4", "--snapshot-every=1", "--poll-every=1"]
    assert launch_screen.main([*TPU, *options, f"--out={out}", "--", *tiny.flags()]) == 0
    printed = capsys.readouterr().out
    assert "TPU SUSPENDED" in printed and "screen finished" in printed
    assert "### test_ood" in printed and "| r2_dustbin " in printed
    # The second machine went on from a checkpoint of the first, and the metrics have no gap and no double.
    first, second = cloud.logs()
    assert cloud.made() == 2
    assert "step 0 of 6" in first and "step 0 of 6" not in second
    assert "step 3 of 6" in second or "step 6 of 6" in second
    rows = map(json.loads, (out / "r2_dustbin/metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
