"""report.py: the page holds the numbers of the JSON, figures and alignments, and nothing from elsewhere."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import eval as eval_program
from alignment import formats
from alignment.columns import columns_of
from data.families import Family
from data.transforms import Pair
from evaluation import metrics, report
from tests.support import tiny

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Everything that the tests ask of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.values: list[float] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.values += [float(value) for name, value in attrs if (tag, name) == ("data", "value")]
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def of(self, tag: str, name: str) -> list[str]:
        return [value for where, which, value in self.attributes if (where, which) == (tag, name)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[dict, Page, str]:
    """The JSON and the page of a run, as the command line writes them."""
    folder = tmp_path_factory.mktemp("report")
    output, workdir = folder / "scores.json", tiny.trained()
    eval_program.main(
        [f"--workdir={workdir}", "--split=test_ood", "--limit=6", f"--output={output}", f"--report={folder / 'deep'}"]
    )
    text = (folder / "deep" / "report.html").read_text()
    return json.loads(output.read_text()), Page(text), text


def test_the_numbers_are_those_of_the_json(written):
    scores, page, _ = written
    expected = [of["overall"]["f1"]["value"] for result in scores["splits"].values() for of in result.values()]
    for result in scores["splits"].values():
        for name in metrics.METRICS:
            found = [of["overall"].get(name) for of in result.values()]
            expected += [metric["value"] for metric in found if metric]
        for name in result["model"]["bins"]:
            expected += [of["bins"][name]["f1"]["value"] for of in result.values()]
    assert page.values == expected
    for result in scores["splits"].values():
        metric = result["model"]["overall"]["barycenter_mae"]
        told = "no interval" if metric["low"] is None else f"{metric['low']:.3f}–{metric['high']:.3f}"
        assert f"{metric['value']:.3f} {told}" in page.texts["td"]
        model = result["model"]
        assert any(f"{model['pairs']} pairs of {model['families']} families" in text for text in page.texts["h2"])
        for name, of_bin in model["bins"].items():
            mark = " *" if of_bin["pairs"] < metrics.FEW_PAIRS else ""
            assert f"{name} ({of_bin['pairs']} of {of_bin['families']}){mark}" in page.texts["th"]
        for spread in scores["certificates"]["test_ood"].values():
            assert f"{spread['residual']['median']:.2g} / {spread['residual']['worst']:.2g}" in page.texts["td"]


def summary(**overall: float) -> dict:
    values = {name: {"value": value, "low": None, "high": None} for name, value in overall.items()}
    return {"overall": values, "bins": {}, "pairs": 1234, "families": 3}


PLAIN = {"model": summary(f1=0.25), "nw_blosum62": summary(f1=0.5)}
UNRELATED = {"model": summary(auc=0.75, false_pairs=0.125), "nw_blosum62": summary(auc=0.625, false_pairs=0.375)}


@pytest.mark.parametrize(
    ("splits", "values", "titles"),
    [
        ({"negatives": UNRELATED}, [0.75, 0.625, 0.75, 0.625, 0.125, 0.375], ["AUC"]),
        ({"validation_flanked": PLAIN}, [0.25, 0.5, 0.25, 0.5], ["F1"]),
        (
            {"negatives": UNRELATED, "validation": PLAIN},
            [0.25, 0.5, 0.75, 0.625, 0.75, 0.625, 0.125, 0.375, 0.25, 0.5],
            ["F1", "AUC"],
        ),
    ],
    ids=["negatives", "flanked", "mixed"],
)
def test_pages_of_variants_alone_and_mixed(splits, values, titles, tmp_path):
    path = tmp_path / "report.html"
    spread = {name: {"median": 0.5, "worst": None, "finite": 0.5} for name in ("residual", "rate")}
    certificates = {name: {"plan": spread} for name in splits if name != "negatives"}
    whole = {"step": 3, "config": {}, "splits": splits, "certificates": certificates}
    report.write_html(path, whole if certificates else {k: whole[k] for k in list(whole)[:3]}, report.Examples())
    page, lower = Page(path.read_text()), '<td class="best"><data value="0.125">'
    assert page.values == values and (lower in path.read_text()) == ("negatives" in splits), "fewer are better"
    assert [text.split()[0] for text in page.texts["h3"] if text.split()[0] in ("F1", "AUC")] == titles
    assert sum("How converged" in text for text in page.texts["h3"]) == len(certificates)
    assert page.of("section", "id")[:-1] == list(splits) and len(page.of("img", "src")) == len(splits)
    assert any("1,234 pairs of 3 families" in text for text in page.texts["h2"])
    best = [value for tag, name, value in page.attributes if (tag, name) == ("td", "class") and value == "best"]
    assert len(best) == sum(1 + len(of["model"]["overall"]) for of in splits.values())


def test_figures_are_embedded_and_nothing_is_loaded(written):
    _, page, text = written
    sources = page.of("img", "src")
    assert len(sources) > 2 * 3 + 1
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    assert all(page.of("img", "alt"))
    assert {value[0] for value in page.of("a", "href")} == {"#"}
    assert {value[1:] for value in page.of("a", "href")} <= set(page.of("section", "id"))
    assert "training" in page.of("section", "id")
    assert not {tag for tag, _, _ in page.attributes} & {"link", "script", "iframe"}
    assert not [word for word in ("://", "url(", "@import", "<script") if word in text]


def test_settings_command_and_alignments_are_told(written):
    scores, page, _ = written
    assert any(command.startswith("python eval.py --workdir=") for command in page.texts["code"])
    settings = page.texts["tr"][-80:]
    assert "model.width16" in settings and f"total_steps{tiny.STEPS}" in settings
    for text in page.texts["pre"]:
        assert "Identity:" in text and "confidence" in text
    f1 = [float(line.split()[1].rstrip(",")) for line in page.texts["p"] if line.startswith("F1 ")]
    assert len(f1) == len(page.texts["pre"]) > 4
    assert min(f1) < scores["splits"]["test_ood"]["model"]["overall"]["f1"]["value"] < max(f1)


def example(name: str, match: list[int], baseline: list[int], target=(0, 1, 2, -1, 3), label="") -> report.Example:
    pair = Pair(*(np.array(x, np.int32) for x in ([1, 2, 3, 4, 5], [1, 2, 3, 5], target)))
    found, other = np.array(match, np.int32), np.array(baseline, np.int32)
    plan = np.full((5, 4), 0.25)
    family = Family(name, label, "", ("x/1", "<y>"), np.zeros((2, 1), np.uint8), np.zeros((0, 2), np.int32))
    scores = (metrics.score_prediction(name, pair, np.zeros(5), of) for of in (found, other))
    return report.Example(family, (0, 1), pair, plan, plan, found, *scores)


RIGHT, HALF, NONE = [0, 1, 2, -1, 3], [0, 1, -1, 2, -1], [-1, -1, 0, 1, -1]


def test_worst_best_and_lost_pairs_are_chosen_one_a_family():
    examples = report.Examples(count=2)
    seen = [("A", RIGHT, HALF), ("A", NONE, NONE), ("B", HALF, RIGHT), ("C", RIGHT, RIGHT), ("D", NONE, RIGHT)]
    for name, match, baseline in seen:
        examples.see("test", example(name, match, baseline))
    chosen = [[of.family.accession for of in examples.of("test", kind)] for kind in report.KINDS]
    assert chosen == [["A", "D"], ["A", "C"], ["D", "B"]]
    worst, best, _ = report.KINDS
    assert examples.of("test", worst)[0].model.f1 == 0 and examples.of("test", best)[0].model.f1 == 1
    assert examples.of("other", worst) == []


def test_a_pair_without_reference_and_prediction_is_none():
    examples = report.Examples()
    nothing = [-1] * 5
    examples.see("test", example("A", nothing, RIGHT, target=nothing))
    assert examples.of("test", report.KINDS[0]) == []


def test_names_are_escaped(written, tmp_path):
    scores, _, _ = written
    examples = report.Examples()
    for split in scores["splits"]:
        examples.see(split, example("PF1", HALF, RIGHT, label="<b>&"))
    scores = scores | {"config": {"data": {"dir": "<i>\"'&"}}}
    path = tmp_path / "report.html"
    report.write_html(path, scores, examples, command="python eval.py '<script>'")
    page = Page(path.read_text())
    assert "PF1 <b>&" in page.texts["h4"] and "<i>\"'&" in page.texts["td"]
    assert "python eval.py '<script>'" in page.texts["code"] and "script" not in page.texts
    assert "y: <y>, 4 residues" in page.texts["pre"][0]


def test_the_text_marks_where_the_reference_differs():
    of = example("A", HALF, RIGHT)
    columns = columns_of(report._aligned(of))
    assert (columns.x, columns.y) == ("ARNDC-", "AR-N-C")
    # x_2 is alone and aligned there, x_3 aligned and alone there, x_4 and y_3 alone and aligned with each other there.
    assert formats.differences(columns, of.pair.target) == "  ?!??"
    assert "reference" not in formats.text(report._aligned(example("A", RIGHT, RIGHT)), of.pair.target)
    assert "reference" not in formats.text(report._aligned(of))


def test_reliability_groups_by_tenths():
    found = metrics.Reliability()
    found.add(np.array([0.05, 0.92, 1.0]), np.array([False, True, True]))
    found.add(np.array([0.98, 0.5]), np.array([False, True]))
    assert found.tenths() == [
        {"confidence": pytest.approx(0.05), "correct": 0, "pairs": 1},
        {"confidence": 0.5, "correct": 1, "pairs": 1},
        {"confidence": pytest.approx(2.9 / 3), "correct": pytest.approx(2 / 3), "pairs": 3},
    ]
    assert metrics.Reliability().tenths() == []


def test_the_template_ships():
    assert (Path(report.__file__).parent / report.TEMPLATE).exists()
