"""What the README tells a reader to type is there: its Python runs, its commands' options exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    set(re.findall(r"^    (?:[A-Z_]+=\S+ )*python (.+?)(?: +#.*)?$", README.replace("\\\n", " "), re.MULTILINE))
)
OPTIONS = sorted(set(re.findall(r"--config\.([\w.]+)=", README)))


def test_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == (2, 300, 4, 32)
    assert names["plan"].shape == (2, 4, 301, 301)


def test_python_of_the_page_on_sparse_attention_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sparse.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == (2, 300, 4, 32)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_readme_exist(option):
    value = base.get_config()
    for key in option.split("."):
        assert key in value
        value = value[key]


@pytest.mark.parametrize("script", sorted({c.split()[0] for c in COMMANDS if c.split()[0].endswith(".py")}))
def test_flags_of_the_readme_exist(script):
    assert (ROOT / script).exists()
    known = subprocess.run(
        [sys.executable, script, "--helpfull" if script == "train.py" else "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    used = {flag for c in COMMANDS if c.split()[0] == script for flag in re.findall(r"(--[a-z][a-z-]*)(?=[= ]|$)", c)}
    assert used - {"--runner"} <= set(re.findall(r"--(?:\[no\])?[a-z][a-z-]*", known)), used


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"(?:configs|data|tests|scripts|docs|notebooks)/[\w/.]+\.(?:py|md|png|ipynb)", README))),
)
def test_files_of_the_readme_exist(path):
    assert (ROOT / path).exists()
