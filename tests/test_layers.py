"""Imports go one way: configs; ot_attention; data; models; training and alignment; evaluation; then the programs."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each folder with the folders that its modules may import; nothing imports a program.
LAYERS = {
    "configs": set(),
    "ot_attention": set(),
    "data": set(),
    "models": {"ot_attention", "data"},
    "training": {"data", "models"},
    "alignment": {"data", "models"},
    "evaluation": {"data", "models", "training", "alignment"},
    "benchmarks": {"ot_attention", "data", "models", "training", "alignment", "evaluation"},
    "scripts": {"configs", "ot_attention", "data", "models", "training", "alignment", "evaluation", "benchmarks"},
}
PROGRAMS = {"train", "eval"}
FRAME = "command_line"  # of the programs, which imports the version and the names of files alone
LIBRARIES = ("configs", "ot_attention", "data", "models", "training", "alignment", "evaluation")


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no module: is the table of layers out of date?"
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


def layers_of(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} & (LAYERS.keys() | PROGRAMS)


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for folder in LAYERS for path in modules(folder)], ids=identifier)
def test_a_folder_imports_only_folders_before_it(path):
    folder = path.relative_to(ROOT).parts[0]
    assert layers_of(imports(path)) - {folder} <= LAYERS[folder]


def test_only_programs_import_their_frame():
    assert layers_of(imports(ROOT / f"{FRAME}.py")) <= {"ot_attention", "data"}
    importers = {
        path.relative_to(ROOT).parts[0] for folder in LAYERS for path in modules(folder) if FRAME in imports(path)
    }
    assert importers <= {"evaluation", "benchmarks", "scripts"}


def test_every_folder_with_code_is_in_the_table():
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert folders - {"tests"} == LAYERS.keys()


@pytest.mark.parametrize("path", modules("ot_attention"), ids=identifier)
def test_attention_needs_jax_numpy_and_jaxtyping_alone(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops - sys.stdlib_module_names <= {"ot_attention", "jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize("path", modules("data"), ids=identifier)
def test_data_needs_no_accelerator_library(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("jax", "flax", "optax")}


SETTINGS = {f"data.settings.{name}" for name in ("Choice", "Integer", "Number", "Section", "Switch")}


@pytest.mark.parametrize("path", modules("models"), ids=identifier)
def test_models_take_files_vocabulary_and_settings_from_data_and_attention_from_one_module(path):
    ours = {name for name in imports(path) if name.split(".")[0] in ("data", "ot_attention")}
    assert path.name == "attention.py" or not {name for name in ours if name.startswith("ot_attention")}
    assert {name for name in ours if name.startswith("data")} <= {"data.files", "data.vocab", *SETTINGS}


def test_libraries_do_not_print():
    calls = [
        f"{identifier(path)}:{node.lineno}"
        for folder in LIBRARIES
        for path in modules(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []
