"""The benchmark's methods solve one problem, and its rows, table and figure hold what was measured."""

import json

import jax
import pytest

from benchmarks import attention, harness
from benchmarks.attention import Case
from scripts import bench_attention

LONG = attention.CASES["long"]
PEERS = "softmax", "tail", "ott unrolled", "ott implicit"
TINY = {
    "full": Case(1, 1, 24, None, PEERS, width=8),
    "band": Case(
        2,
        1,
        280,
        6,
        ("softmax 64", "softmax 128", "tail", "newton, implicit", "tail, tau (1, 0)"),
        width=8,
        dustbin="full",
        ragged=True,
    ),
}
SPARSE = {
    f"sparse {length}": Case(1, 1, length, None, ("softmax, dense", "sparse sinkhorn", "sparse sinkhorn, sortcut"), 8)
    for length in (100, 200)
}
GROWING = {f"scaling {length}": Case(1, 1, length, 4, ("softmax 64", "tail"), width=8) for length in (64, 128)}


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
    assert bias["softmax 64"] is None
    assert bias["tail, tau (1, 0)"] < 1e-5


def test_times_memory_and_ratios_are_reported(measured):
    rows, table, exponents, figure = measured
    for row in rows:
        for what in ("forward", "forward_backward"):
            assert row[f"{what}_ms"] > 0 and row[f"{what}_compile_s"] > 0
            assert row[f"{what}_to_softmax"] > 0 and row[f"{what}_temporary_bytes"] > 0
        assert [row["case"], row["method"]] in [
            [x.strip() for x in line.split("|")[1:3]] for line in table.splitlines()
        ]
        fastest = row["forward_fastest_softmax"]
        ratios = {r["method"]: r["forward_to_softmax"] for r in rows if r["case"] == row["case"]}
        assert ratios[fastest] == min(r for m, r in ratios.items() if m.startswith("softmax")) == 1
    assert exponents.splitlines()[0].startswith("softmax 64: time ~ length^")
    for path in (figure, figure.with_stem("scaling_sparse")):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_softmax_programs_have_blocks_of_their_own():
    """The program that ours is compared with does not change with the block size of our band."""
    for method in LONG.methods[:4]:
        text = str(jax.make_jaxpr(attention.METHODS[method](LONG, "xla"))(*LONG.arguments()[:-1]))
        block, heads = (64, 128)["128" in method], 1 if "head by head" in method else 4
        tiles = f"f32[{heads},{2048 // block},{block},{block + 512}]"
        assert tiles in text and not any(f"f32[{5 - heads},{2048 // b},{b}," in text for b in (64, 128)), method


def test_what_an_implementation_cannot_do_is_told(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    output.write_text("earlier")
    monkeypatch.setattr(attention, "CASES", {"short": Case(1, 1, 8, 2, ("tail",))})
    arguments = ["--cases", "short", "--implementation=pallas_gpu", f"--output={output}", f"--figure={tmp_path / 'x'}"]
    assert bench_attention.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_attention.py: ") and "implementation 'pallas_gpu'" in line
    assert output.read_text() == "earlier"


def test_no_row_is_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "CASES", {"short": Case(1, 1, 8, 2, ())})
    monkeypatch.setattr(attention, "measure", lambda *_: [])
    arguments = ["--cases", "short", f"--output={tmp_path / 'rows.jsonl'}", f"--figure={tmp_path / 'x'}"]
    assert bench_attention.main(arguments) == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_replace_an_earlier_result_at_the_end(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for number in (1, 2):
        with harness.row_writer(path) as write:
            write({"number": number, "error": float("nan")})
            assert harness.read_rows(tmp_path / "new/rows.jsonl.part") == [{"number": number, "error": "nan"}]
            assert not path.exists() or harness.read_rows(path) == [{"number": 1, "error": "nan"}]
    with pytest.raises(KeyboardInterrupt), harness.row_writer(path) as write:
        write({"number": 3})
        raise KeyboardInterrupt
    assert [row["number"] for row in harness.read_rows(path)] == [2]
    assert harness.read_rows(tmp_path / "new/rows.jsonl.part") == [{"number": 3}]  # what was measured is not lost
    with harness.row_writer(path, append=True) as write:
        write({"number": 4})
    assert [row["number"] for row in harness.read_rows(path)] == [2, 4]
