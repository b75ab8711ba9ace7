"""README and docs are true: their Python runs, and what they name exists: files, options, anchors, tests."""

import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

from configs import base
from data.variants import EVALUATION_SETS
from scripts import align

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.md", "docs/*.md", "weights/*.md")
    for path in ROOT.glob(pattern)
}
TEXTS = {name: path.read_text() for name, path in PAGES.items() if name != "CHANGELOG.md"}  # which tells of old names
ALL = "\n".join(TEXTS.values())
COMMANDS = [
    command.split()
    for command in re.findall(r"^ {4,}(?:[A-Z_]+=\S+ )*python (.+?)(?: +#.*)?$", ALL.replace("\\\n", " "), re.MULTILINE)
]
SHAPES = {"README.md": {"out": (2, 300, 4, 32)}, "docs/attention.md": {"plan": (2, 4, 301, 301)}}
SHAPES["docs/sparse.md"] = SHAPES["README.md"]
ALIGNED = ("README.md", "docs/aligner.md")  # pages whose Python aligns two globins


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(code, names)
    shapes = SHAPES.get(page, {})
    assert {name: names[name].shape for name in shapes} == shapes
    if page in ALIGNED:
        found = names["found"]
        assert len(found.pairs) == len(found.confidence) > 20 and found.probability > 0.5


def test_the_alignment_that_is_shown_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = re.search(r"```text\n(.*?)```", TEXTS["README.md"], re.DOTALL).group(1)
    assert align.main(["docs/globins.fasta"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--config\.([\w.]+)=", ALL))))
def test_options_of_configurations_exist(option):
    value = base.get_config()
    for key in option.split("."):
        assert key in value
        value = value[key]


@pytest.mark.parametrize("script", sorted({command[0] for command in COMMANDS if command[0].endswith(".py")}))
def test_flags_exist(script, capsys, monkeypatch):
    if script == "train.py":  # absl's flags can be defined once in a process
        known = set(re.findall(r'DEFINE_\w+\(\s*"([\w-]+)"', (ROOT / script).read_text()))
        known = {f"--{name}" for name in known}
    else:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        # Some programs set the environment before they import JAX.
        with mock.patch.dict(os.environ), pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    used = {word.split("=")[0] for words in COMMANDS if words[0] == script for word in words if word.startswith("--")}
    used = {flag for flag in used if not flag.startswith("--config.")} - {"--", "--runner"}
    assert used <= known | {"--config"}


FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "runs"]
NAMES = "|".join(path.name for path in FOLDERS)
NAMED = sorted(set(re.findall(rf"(?<![\w/.=-])((?:{NAMES})/[\w/.-]+\.(?:py|md|png|ipynb|fasta|safetensors))", ALL)))


@pytest.mark.parametrize("path", NAMED)
def test_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link


def test_tests_that_are_named_exist():
    written = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", ALL)) - set(EVALUATION_SETS)
    assert [name for name in named if f"def {name}(" not in written] == []


def test_sections_of_the_mathematics_that_the_source_cites_exist():
    sources = "\n".join(path.read_text() for folder in FOLDERS for path in folder.rglob("*.py"))
    cited = re.findall(r"docs/math\.md, sections? (\d+)(?: (?:to|and) (\d+))?", sources)
    sections = set(re.findall(r"^## (\d+)\.", TEXTS["docs/math.md"], re.MULTILINE))
    assert {number for pair in cited for number in pair if number} <= sections


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 130
