"""The benchmark's methods balance the same scores, and its rows and table hold what was measured."""

import json

import pytest

from benchmarks import balance
from scripts import bench_balance


def test_all_methods_balance_the_same_scores(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ott", reason="ott-jax is not installed (requirements-dev.txt)")
    output = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(balance, "CASES", {"tiny": balance.Case(6, 4, sharp=0.2, sharp_sd=3.0)})
    assert bench_balance.main(["--rounds=1", f"--output={output}", "--cases", "tiny"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["method"] for row in rows] == list(balance.METHODS)
    failed = [row["method"] for row in rows if "failed" in row]
    assert failed in ([], ["ott implicit"])  # lineax refuses some systems, as they have a gauge
    for row in [row for row in rows if row["method"] not in failed]:
        assert row["error_plan"] < 1e-5 and row["error_gradient"] < (2e-2 if "implicit" in row["method"] else 1e-5), row
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0 and row["forward_backward_temporary_bytes"] > 0
    assert rows[0]["forward_speedup"] == rows[0]["forward_backward_speedup"] == 1
    printed = capsys.readouterr().out
    assert all(f"| {row['method']} " in printed for row in rows) and f"rows: {output}" in printed


def test_a_method_that_fails_costs_its_own_row(monkeypatch):
    def failing():
        raise RuntimeError("too large")

    monkeypatch.setattr(balance, "METHODS", {"unrolled": lambda: balance.plain, "ott unrolled": failing})
    monkeypatch.setattr(balance, "HAS_OTT", True)
    plain, failed = balance.measure("tiny", balance.Case(2, 3), rounds=1)
    assert plain["forward_ms"] > 0 and failed["failed"] == "RuntimeError: too large"
    assert "too large" in bench_balance.table([plain, failed])
