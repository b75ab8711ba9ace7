"""The benchmark's methods solve one problem, and its rows, table and figure hold what was measured."""

import json

import pytest

from benchmarks import attention
from benchmarks.attention import Case
from scripts import bench_attention

PEERS = "softmax", "tail", "ott unrolled", "ott implicit"
TINY = {
    "full": Case(1, 1, 24, None, PEERS, width=8),
    "band": Case(2, 1, 40, 6, ("softmax", "tail", "newton, implicit"), width=8, dustbin="full", ragged=True),
}
SPARSE = {
    f"sparse {length}": Case(1, 1, length, None, ("softmax, dense", "sparse sinkhorn", "sparse sinkhorn, sortcut"), 8)
    for length in (100, 200)
}
GROWING = {f"scaling {length}": Case(1, 1, length, 4, ("softmax", "tail"), width=8) for length in (64, 128)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("ott", reason="ott-jax is not installed (requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("bench")
    output, figure = folder / "new" / "rows.jsonl", folder / "new" / "scaling.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CASES", TINY)
        patch.setattr(attention, "SERIES", {"scaling": GROWING, "sparse": SPARSE})
        bench_attention.main(
            ["--rounds=2", f"--output={output}", f"--figure={figure}", "--cases", "full", "band", "scaling", "sparse"]
        )
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        growing = [row for row in rows if row["case"] in GROWING]
        yield rows, bench_attention.table(rows), bench_attention.exponents(growing), figure


def test_all_methods_solve_the_same_problem(measured):
    rows, *_ = measured
    for row in rows:
        assert list(row)[:3] == ["case", "method", "error"]
        assert row["error"]["out"] < 1e-5 and row["error"]["gradient"] < 2e-2, row
        if row["method"] != "ott implicit":  # its gradient is that of the converged plan
            assert row["error"]["gradient"] < 1e-4, row
    bias = {row["method"]: row["error"].get("gradient_to_converged") for row in rows if row["case"] == "band"}
    assert bias["newton, implicit"] < 1e-4 < bias["tail"]
    assert bias["softmax"] is None


def test_times_memory_and_ratios_are_reported(measured):
    rows, table, exponents, figure = measured
    for row in rows:
        for what in ("forward", "forward_backward"):
            assert row[f"{what}_ms"] > 0 and row[f"{what}_compile_s"] > 0
            assert row[f"{what}_to_softmax"] > 0 and row[f"{what}_temporary_bytes"] > 0
        assert [row["case"], row["method"]] in [
            [x.strip() for x in line.split("|")[1:3]] for line in table.splitlines()
        ]
    softmax = [row["forward_to_softmax"] for row in rows if row["method"].startswith("softmax")]
    assert min(softmax) == 1
    assert exponents.splitlines()[0].startswith("softmax: time ~ length^")
    for path in (figure, figure.with_stem("scaling_sparse")):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_an_implementation_cannot_do_is_told(tmp_path):
    arguments = ["--cases", "short", "--implementation=pallas_gpu", f"--output={tmp_path / 'rows.jsonl'}"]
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit, match="implementation 'pallas_gpu'"),
    ):
        patch.setattr(attention, "CASES", {"short": Case(1, 1, 8, 2, ("tail",))})
        bench_attention.main(arguments)
