"""eval.py: the report of a run, its table and its figures."""

import json
import re
import shutil
from pathlib import Path

import pytest

import eval as eval_program
from alignment.inference import Pretrained
from data import pfam
from data.batches import unbatch
from data.evaluation_pairs import evaluation_batches
from data.transforms import NO_TARGET, Pair
from evaluation import metrics, runs, scoring
from evaluation.alignment import AlignmentTask
from evaluation.baselines import BASELINES, nw_with_score
from models import weights
from tests.support import tiny
from training import run_folder

WHO = ("model", *BASELINES)
OF_A_MODEL = {"reconstruction", "reconstruction_masked", "sparse_ce"}


@pytest.fixture(scope="module")
def finished() -> Path:
    return tiny.trained()


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory) -> tuple[dict, str]:
    """The JSON that the command line writes, and what it prints."""
    output = tmp_path_factory.mktemp("scores") / "deep" / "scores.json"
    done = tiny.program("eval.py", f"--workdir={finished}", f"--output={output}", "--limit=64")
    assert (done.returncode, done.stderr) == (0, "")  # no progress without a terminal, no chatter of libraries
    return json.loads(output.read_text()), done.stdout


def test_report_has_the_documented_shape(scored):
    report, _ = scored
    assert report["step"] == tiny.STEPS and report["config"]["model"]["width"] == 16
    assert list(report["splits"]) == ["test_iid", "test_ood"]
    for result in report["splits"].values():
        assert list(result) == ["model", "diagonal", "scaled_diagonal", "nw_blosum62"]
        for who, summary in result.items():
            assert summary.keys() == {"overall", "bins", "pairs", "families"}
            assert summary["overall"].keys() == metrics.METRICS.keys() - (set() if who == "model" else OF_A_MODEL)
            assert summary["pairs"] == result["model"]["pairs"] > 40
            assert summary["bins"].keys() == result["model"]["bins"].keys() <= set(metrics.BINS)
            assert 2 < summary["families"] <= summary["pairs"] >= sum(of["pairs"] for of in summary["bins"].values())
            for group in (summary | summary["overall"], *summary["bins"].values()):
                assert 1 <= group["families"] <= group["pairs"]
                for metric in (group[name] for name in metrics.METRICS.keys() & group.keys()):
                    assert metric.keys() == {"value", "low", "high"}
                    if group["families"] < metrics.LEAST_FAMILIES:
                        assert metric["low"] is None and metric["high"] is None
                    else:
                        assert metric["low"] <= metric["high"]
    assert report["splits"]["test_iid"] != report["splits"]["test_ood"]


def test_needleman_wunsch_beats_the_diagonals_on_real_families(scored):
    """Or the pairs and the predictions were not of the same sequences."""
    report, _ = scored
    for result in report["splits"].values():
        f1 = {who: summary["overall"]["f1"]["value"] for who, summary in result.items()}
        assert f1["nw_blosum62"] > 0.6 > max(f1["diagonal"], f1["scaled_diagonal"])


def test_the_table_holds_every_number_of_the_report(scored):
    report, printed = scored
    lines = {split: part for split, part in zip(report["splits"], printed.split("\ntest_")[1:], strict=True)}
    for split, result in report["splits"].items():
        table = {line.split("  ")[0]: line for line in lines[split].splitlines()}
        for name in metrics.METRICS:
            known = [who for who in WHO if name in result[who]["overall"]]
            cells = [result[who]["overall"][name] for who in known]
            told = [
                f"{of['value']:.3f} " + ("(?)" if of["low"] is None else f"({of['low']:.3f}-{of['high']:.3f})")
                for of in cells
            ]
            assert table[name].split("  ", 1)[1].split() == " ".join(told + ["-"] * (len(WHO) - len(known))).split()
        counts = f"{result['model']['pairs']} pairs of {result['model']['families']} families, step"
        assert f"{split}: {counts}" in printed
        for name, of_bin in result["model"]["bins"].items():
            told = [f"{result[who]['bins'][name]['f1']['value']:.3f}" for who in WHO]
            sizes = f"{of_bin['pairs']}{' *' if of_bin['pairs'] < metrics.FEW_PAIRS else ''} {of_bin['families']}"
            assert table[f"f1, identity {name}"].split()[3:] == [*sizes.split(), *told]


def few(families: int, pairs: int) -> dict:
    """A report of one split: pairs of this many families."""
    found = {"abs_error": 5.0, "true_positives": 6.0, "predicted": 9.0, "reference": 10.0}
    some = [metrics.PairScores(f"f{k % families}", identity=0.5, aligned=10, **found) for k in range(pairs)]
    splits = {"validation": dict.fromkeys(WHO, metrics.summarise(some))}
    return {"step": 1, "splits": splits, "certificates": {"validation": {}}}


def test_what_chance_decides_is_marked_in_the_table():
    told = eval_program.table(few(families=4, pairs=9))
    assert "validation: 9 pairs of 4 families, step 1" in told and "0.500 (?)" in told
    assert "(?) no interval: fewer than 5 families have the metric" in told
    assert re.search(r"f1, identity \.40-\.60 +9 \* +4 ", told) and "* fewer than 10 pairs: chance decides" in told
    told = eval_program.table(few(families=5, pairs=10))
    assert "(?)" not in told and "*" not in told and "0.500 (0.500-0.500)" in told


def test_the_scores_are_of_the_alignments_that_users_get(finished, tmp_path):
    """F1 of the report, counted again from what scripts/align.py gives of the run's weights."""
    run, families = runs.load_run(finished), pfam.open_split(tiny.ROOT / "data/default", "test_ood")
    batches = list(evaluation_batches(families, 4, (320,), limit=8))
    pairs = [pair for batch in batches for _, pair in unbatch(batch)]
    path = tmp_path / "w.safetensors"
    weights.save(path, run.params, run.config.to_dict(), run.step)
    found = [set(map(tuple, of.pairs.tolist())) for of in Pretrained.load(path).align([pair[:2] for pair in pairs])]
    reference = [{(i, j) for i, j in enumerate(pair.target.tolist()) if j >= 0} for pair in pairs]
    f1 = 2 * sum(len(a & b) for a, b in zip(found, reference, strict=True)) / sum(map(len, found + reference))
    scored = scoring.score_split(run.pretrained(), families, batches)["model"]
    assert scored["overall"]["f1"]["value"] == pytest.approx(f1) and 0 < f1 < 1 and scored["pairs"] == 8


@pytest.fixture(scope="module")
def variants(finished, tmp_path_factory) -> dict:
    """Report with flanked pairs and negatives, as eval.py makes them one after the other."""
    run, pictures = runs.load_run(finished), tmp_path_factory.mktemp("variants")
    names = "validation_flanked", "negatives"  # of the lengths of few programs
    flanked, negatives = (run.task.evaluate(run, name, pictures=pictures, limit=2) for name in names)
    splits = flanked["splits"] | negatives.pop("splits")
    return flanked | negatives | {"splits": splits, "pictures": pictures}


def pairs_of(variant: str) -> list[Pair]:
    families = pfam.open_split(tiny.ROOT / "data/default", "validation")
    batches = evaluation_batches(families, 4, (320,), limit=2, variant=variant)
    return [pair for batch in batches for _, pair in unbatch(batch)]


def test_flanked_pairs_are_reported_as_others_are(variants):
    result, nothing = variants["splits"]["validation_flanked"], NO_TARGET
    assert list(result) == list(WHO) and result["model"]["overall"].keys() == metrics.METRICS.keys()
    assert result["model"]["bins"] and result["model"]["pairs"] == 2
    found = [(nw_with_score(pair)[0].match, pair.target) for pair in pairs_of("flanked")]
    counts = [((a == b)[b != nothing].sum(), (a != nothing).sum() + (b != nothing).sum()) for a, b in found]
    f1 = 2 * sum(right for right, _ in counts) / sum(pairs for _, pairs in counts)
    assert result["nw_blosum62"]["overall"]["f1"]["value"] == pytest.approx(f1)
    assert list(variants["certificates"]) == list(variants["reliability"]) == ["validation_flanked"]
    assert {path.name for path in variants["pictures"].iterdir()} > {"validation_flanked.png", "negatives.png"}


def test_negatives_have_metrics_of_their_own(variants, finished):
    """Scores are counted again from alignments of the same pairs, one by one."""
    found = variants["splits"]["negatives"]
    assert list(found) == ["model", "nw_blosum62"], "diagonals have no score"
    model, related, unrelated = runs.load_run(finished).pretrained(), pairs_of("plain"), pairs_of("negatives")

    def scores_of(pairs):
        alignments = model.align([(pair.x, pair.y) for pair in pairs])
        return [of.confidence.sum() / min(len(p.x), len(p.y)) for of, p in zip(alignments, pairs, strict=True)]

    def nw(pair):
        return nw_with_score(pair)[1] / min(len(pair.x), len(pair.y))

    positive, negative = scores_of(related), scores_of(unrelated)
    auc = sum(a > b for a in positive for b in negative) / 4
    assert found["model"]["overall"]["auc"]["value"] == pytest.approx(auc)
    auc = sum(nw(a) > nw(b) for a in related for b in unrelated) / 4
    assert found["nw_blosum62"]["overall"]["auc"]["value"] == pytest.approx(auc) and auc > 0.5
    shorter = sum(min(len(pair.x), len(pair.y)) for pair in unrelated)
    false_pairs = sum(len(of.pairs) for of in model.align([(pair.x, pair.y) for pair in unrelated])) / shorter
    assert found["model"]["overall"]["false_pairs"]["value"] == pytest.approx(false_pairs) and 0 < false_pairs <= 1
    for of in found.values():
        assert of.keys() == {"overall", "bins", "pairs", "families"} and of["bins"] == {} and of["pairs"] == 2


def test_tables_of_variants_alone_and_mixed(variants):
    told = eval_program.table(variants)
    assert re.search(r"auc +\d\.\d{3} .*\nfalse_pairs +\d\.\d{3} ", told) and told.count("median / worst") == 1
    for name, of_split in variants["splits"].items():
        alone = {"step": 1, "splits": {name: of_split}}
        alone |= {} if name == "negatives" else {"certificates": variants["certificates"]}
        told = eval_program.table(alone)
        assert f"{name}: 2 pairs of 1 families, step 1" in told
        assert ("auc" in told) == (name == "negatives") == ("f1" not in told)


def test_a_data_set_without_the_families_of_a_variant_says_so(finished, tmp_path, capsys):
    without = dict.fromkeys(("validation", "test_iid"))
    shutil.copytree(tiny.ROOT / "data/default", tmp_path / "data")
    (info,) = (tmp_path / "data").rglob("dataset_info.json")
    told = json.loads(info.read_text())
    told["splits"] = [of for of in told["splits"] if of["name"] not in without]
    info.write_text(json.dumps(told))
    for split, expected in {
        "negatives": "negatives is made of the families of validation: split 'validation' is empty in .*; it has "
        "train, test_ood: add data; or take test_ood_negatives$",
        "test_iid_flanked": "test_iid_flanked is made of the families of test_iid: split 'test_iid' is empty",
    }.items():
        arguments = [f"--workdir={finished}", f"--data={tmp_path / 'data'}", f"--split={split}"]
        assert eval_program.main(arguments) == 1
        assert re.search(expected, capsys.readouterr().err.strip())


def test_certificates_of_the_layers_are_reported(scored):
    report, printed = scored
    for layers in report["certificates"].values():
        assert list(layers) == ["plan"]  # the tiny model has no self-attention
        for name, spread in layers["plan"].items():
            assert spread.keys() == {"median", "worst", "finite"}, name
        assert layers["plan"]["residual"]["worst"] > layers["plan"]["residual"]["median"] > 0
        assert 0 < layers["plan"]["rate"]["median"] <= layers["plan"]["contraction"]["worst"] == 1
        told = next(line for line in printed.splitlines() if line.startswith("plan "))
        assert f"{layers['plan']['residual']['median']:.2g} / {layers['plan']['residual']['worst']:.2g}" in printed
        assert len(told.split()) == 1 + 3 * len(layers["plan"])


def test_figures_are_drawn(finished, scored):
    names = {path.name for path in (finished / "figures").glob("*.png")}
    assert {"training.png", "test_iid.png", "test_ood.png"} <= names
    for split in ("test_iid", "test_ood"):
        assert any(name.startswith(f"plan_{split}_PF") for name in names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (finished / "figures").glob("*.png"))


def test_a_restored_checkpoint_scores_as_it_did_while_training(finished):
    limit = tiny.OVERRIDES["log.eval_pairs"]
    logged = {row["step"]: row for row in run_folder.read_metrics(finished) if "validation/f1" in row}
    report = tiny.evaluated(finished, "validation", step=tiny.STEPS, limit=limit)
    overall = report["splits"]["validation"]["model"]["overall"]
    assert report["splits"]["validation"]["model"]["pairs"] == limit
    assert {f"validation/{name}": metric["value"] for name, metric in overall.items()} | {
        "step": tiny.STEPS
    } == pytest.approx(logged[tiny.STEPS], rel=1e-5)
    assert logged[0]["validation/reconstruction"] != pytest.approx(logged[tiny.STEPS]["validation/reconstruction"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--step=4"], "holds the steps 0, 6, not step 4"),
        (["--data=nowhere"], "nowhere is not a folder"),
        (["--workdir=nowhere"], "nowhere holds no run"),
        (["--output={run}/config.json/x"], "config.json: Not a directory"),
        (["--output={run}"], "Is a directory"),
        (["--report={run}/config.json"], "config.json: Not a directory"),
        (["--asap={run}/config.json"], "config.json is no safetensors file"),
        (["--asap={run}"], "Is a directory"),
        (["--asap={run}/none"], "none does not exist"),
    ],
)
def test_mistakes_are_told(finished, arguments, told, capsys):
    before = sorted(finished.rglob("*"))
    arguments = [argument.format(run=finished) for argument in arguments]
    assert eval_program.main([f"--workdir={finished}", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and line.startswith("eval.py: ")
    assert sorted(finished.rglob("*")) == before or "--data=nowhere" in arguments  # which is found when pairs are read


def changed(config: dict, **settings) -> str:
    for name, value in settings.items():
        *parents, key = name.split("__")
        table = config
        for parent in parents:
            table = table[parent]
        table.pop(key) if value is None else table.update({key: value})
    return json.dumps(config)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda config: "", "config.json is damaged"),
        (lambda config: json.dumps(config)[:100], "config.json is damaged"),
        (lambda config: "[1, 2]", "config.json is damaged"),
        (lambda config: "null", "config.json does not describe a model of this version"),
        (lambda config: "{}", "config.json does not describe a model of this version"),
        (lambda config: changed(config, model=None), "config.json does not describe a model of this version"),
        (lambda config: changed(config, data__buckets="x"), "config.json does not describe a model of this version"),
        (lambda config: changed(config, batch_size="x"), "config.json does not describe a model of this version"),
        (lambda config: changed(config, batch_size=0), "config.json does not describe a model of this version"),
        (lambda config: changed(config, model__new=1), "config.json does not describe a model of this version"),
        (lambda config: changed(config, model__width=32), "a checkpoint that does not fit its config.json"),
        (lambda config: changed(config, model__depth=2), "a checkpoint that does not fit its config.json"),
    ],
)
def test_a_run_whose_configuration_is_unusable_is_named(finished, tmp_path, make, told, capsys):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "config.json").write_text(make(config))
    assert eval_program.main([f"--workdir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and str(tmp_path) in line and len(line) < 1000


def test_files_of_weights_that_are_none_are_named(finished, tmp_path, capsys):
    good = (tiny.ROOT / "weights/aligner.safetensors").read_bytes()
    made = {"empty": b"", "short": good[:-100], "header": good[:1000], "text": b"no weights at all"}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    for name in (*made, "none", "", "empty/x"):
        assert eval_program.main([f"--weights={tmp_path / name}", "--limit=1"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in line, name


def test_without_a_checkpoint_it_says_so(finished, tmp_path, capsys):
    shutil.copy(finished / "config.json", tmp_path)
    assert eval_program.main([f"--workdir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no checkpoint" in line


def test_nothing_to_score_is_an_error(finished):
    run = runs.load_run(finished)
    with pytest.raises(ValueError, match="there is no pair to score"):
        scoring.score_split(run.pretrained(), [], [])


def test_a_failed_evaluation_leaves_the_earlier_result(finished, tmp_path, monkeypatch, capsys):
    output = tmp_path / "scores.json"
    output.write_text("earlier")
    unwritable = few(5, 10) | {"step": object()}  # no JSON
    monkeypatch.setattr(AlignmentTask, "evaluate", lambda *_, **__: unwritable)
    assert eval_program.main([f"--workdir={finished}", f"--output={output}"]) == 70
    assert "a fault of the program" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(AlignmentTask, "evaluate", lambda *_, **__: few(5, 10))
    assert eval_program.main([f"--workdir={finished}", f"--output={tmp_path}/new/scores.json"]) == 0
    assert output.read_text() == "earlier" and [path.name for path in tmp_path.iterdir()] == ["scores.json", "new"]
    assert json.loads((tmp_path / "new/scores.json").read_text())["step"] == 1
