"""scripts/bench_data.py: a made file that builds, and figures of the data that ship."""

import json

from data import pfam, stockholm
from data.families import SPLITS
from data.recipe import Recipe
from scripts import bench_data
from tests.support import tiny


def test_a_made_file_has_the_families_and_rows_and_builds(tmp_path):
    rows = [f"row{n} ACDEFGHIKLMNPQRSTVW{'Y-'[n % 2]}\n" for n in range(12)]
    records = [f"# STOCKHOLM 1.0\n#=GF AC {name}\n{''.join(of)}//\n" for name, of in (("A", rows), ("B", rows[:2]))]
    source, made = tmp_path / "source.sto", tmp_path / "made.sto.gz"
    source.write_text("".join(records))
    wanted = ["--families=30", "--rows=150"]
    assert bench_data.main([f"--make={made}", "--input", str(source), *wanted]) == 0
    read = list(stockholm.read(made))
    assert len(read) == 30 and len({of.feature("AC") for of in read}) == 30
    assert abs(sum(len(of.ids) for of in read) - 150) < 10
    report = pfam.build(Recipe((str(made),), clans=str(tmp_path / "made.sto.clans.tsv")), tmp_path / "data")
    assert report.read["known_to_clans"] == 30 and set(report.records) <= set(SPLITS)


def test_figures_of_a_data_set(tmp_path, capsys):
    output = tmp_path / "data.json"
    data = f"--config.data.dir={tiny.ROOT / 'data/default'}"
    given = [f"--config={tiny.ROOT}/configs/aligner.py", data, "--config.batch_size=4", "--batches=2"]
    assert bench_data.main([*given, f"--output={output}"]) == 0
    found = json.loads(output.read_text())
    assert found["families"] == 17 and found["resumed batch is the same"] == 1
    assert found["pairs/s, plain"] > 0 and found["pairs/s of processor time, as configured"] > 0
    assert "pairs/s, as configured" in capsys.readouterr().out
    assert bench_data.main([f"--config={tiny.ROOT}/configs/sort_softmax.py"]) == 1
    assert "task='sorting' has no pairs" in capsys.readouterr().err
