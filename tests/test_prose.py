"""Docstrings begin with a verb or a noun, and nothing cites a text that is not in the repository."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "ot_attention", "data", "models", "training", "alignment", "evaluation", "benchmarks", "scripts")
FILES = sorted(
    [
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
        *ROOT.glob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
)
UNCLEAR = re.compile(r"(Of|That|Those|What|Which|As|By|In|With|The same|Whether)\b")
ELSEWHERE = re.compile(r"\bthe contract\b|contract, section", re.IGNORECASE)


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_a_docstring_is_understood_without_the_name(path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    texts = [(node, ast.get_docstring(node) or "") for node in nodes]
    assert [f"{path}:{getattr(node, 'lineno', 1)}: {text[:60]}" for node, text in texts if UNCLEAR.match(text)] == []


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=identifier)
def test_nothing_cites_a_text_that_is_not_here(path):
    if path != Path(__file__).resolve():
        assert not ELSEWHERE.search(path.read_text())
