"""Every notebook runs from top to bottom, keeps no outputs, and defines nothing of its own."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(read(path), timeout=600, resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    assert not any(cell.get("outputs") for cell in read(path).cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_logic_of_its_own(path):
    code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    words = ("def ", "class ", "while ", "try:")
    assert not [line for text in code for line in text.splitlines() if line.startswith(words)]
