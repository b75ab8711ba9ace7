"""notebooks/quickstart.ipynb runs, and holds what a run of it gave."""

import nbclient
import nbformat
import pytest

from tests.support import tiny

PATH = tiny.ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for cell in code(notebook) for output in cell.outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)


def check(notebook: nbformat.NotebookNode) -> None:
    """The reference model aligns both pairs of histidines, the alignment is shown, and both figures are."""
    (told,) = [line for line in printed(notebook).splitlines() if line.startswith("shipped weights: ")]
    assert told.endswith("{'distal': True, 'proximal': True}")
    assert "x: HBA_HUMAN, 142 residues" in printed(notebook) and "y: MYG_HUMAN, 154 residues" in printed(notebook)
    assert "arginines aligned: True" in printed(notebook)
    assert pictures(notebook) == 2


def test_what_is_stored_is_of_one_whole_run(notebook):
    assert PATH.stat().st_size < 300_000
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert "step 300 of 300, loss" in printed(notebook) or "300/300" in printed(notebook)  # without a terminal, on one
    check(notebook)


def test_it_runs(notebook, monkeypatch):
    """Take fewer steps: most of the time goes into compiling all the same."""
    (training,) = [cell for cell in code(notebook) if "STEPS = 300" in cell.source]
    training.source = training.source.replace("STEPS = 300", "STEPS = 10")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # no longer read by jax 0.12
    folder = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    assert "step 10 of 10, loss" in printed(notebook)
    check(notebook)
