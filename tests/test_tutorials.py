"""Tutorials are kept twice: as a source to read and review, and as a notebook with its outputs."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))


def test_there_is_a_source_for_every_notebook():
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source_and_outputs(source):
    jupytext = pytest.importorskip("jupytext")
    cells, written = (jupytext.read(path).cells for path in (source, source.with_suffix(".ipynb")))
    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in written]
    code = [cell for cell in written if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, 1)), "run `make tutorials`"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
