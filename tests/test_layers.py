"""Imports go one way: configs; ot_attention; data; models; report.py; eval.py; workdir.py; train.py. Each knows only
what stands before it.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"configs", "ot_attention", "data", "models", "report", "eval", "workdir", "train", "scripts"}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no module: is the list of layers out of date?"
    return found


def imports(path: Path) -> set[str]:
    """Dotted names a module imports, `from a import b` as a.b; a relative import fails, it would hide the layer."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_ours(names: set[str], *but: str) -> set[str]:
    """Those of the names that are ours and lie in none of the layers `but`."""
    return {name for name in names if (top := name.split(".")[0]) in OURS and top not in but}


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules("configs"), ids=identifier)
def test_configurations_are_plain_values(path):
    assert of_ours(imports(path), "configs") == set()


@pytest.mark.parametrize("path", modules("ot_attention"), ids=identifier)
def test_attention_can_be_used_alone(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops - sys.stdlib_module_names <= {"ot_attention", "jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize("path", modules("data"), ids=identifier)
def test_data_knows_no_model(path):
    names = imports(path)
    assert of_ours(names, "data") == set()
    assert not {name for name in names if name.split(".")[0] in ("jax", "flax", "optax")}


@pytest.mark.parametrize("path", modules("models"), ids=identifier)
def test_models_take_only_the_vocabulary_from_data(path):
    assert of_ours(imports(path), "models", "ot_attention") <= {"data.vocab"}


@pytest.mark.parametrize("path", [p for p in modules("models") if p.name != "attention.py"], ids=identifier)
def test_only_models_attention_knows_the_attention(path):
    assert of_ours(imports(path), "models", "data") == set()


def test_programs():
    assert of_ours(imports(ROOT / "report.py"), "data", "models") == set()
    assert of_ours(imports(ROOT / "eval.py"), "data", "models", "report") == set()
    assert of_ours(imports(ROOT / "workdir.py"), "eval") == set()
    assert of_ours(imports(ROOT / "train.py"), "data", "models", "report", "eval", "workdir", "configs") == set()


def test_no_library_prints_and_there_is_no_drawer_for_odds_and_ends():
    libraries = [path for folder in ("ot_attention", "data", "models") for path in modules(folder)]
    calls = [
        f"{identifier(path)}:{node.lineno}"
        for path in libraries
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []
    assert [path.name for path in [*libraries, *modules("scripts"), *ROOT.glob("*.py")] if "util" in path.stem] == []
