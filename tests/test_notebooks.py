"""Every notebook runs from a clean kernel, and is committed with small outputs and no error."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 1_500_000  # what can still be read online
PLOTLY = "application/vnd.plotly.v1+json"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_a_clean_kernel(path: Path, tmp_path: Path) -> None:
    """An assert in a notebook is a test: any error in a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_committed_with_outputs(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "run `make notebooks` and commit the outputs"
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert kinds & {"execute_result", "display_data"}


def test_the_quickstart_is_ten_cells_with_pictures() -> None:
    """A picture of every figure, for those who run no scripts: `python notebooks/execute.py --pictures`."""
    cells = nbformat.read(FOLDER / "00_quickstart.ipynb", as_version=4).cells
    assert len(cells) == 10
    outputs = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs]
    data = [out["data"] for out in outputs if "data" in out]
    assert any(PLOTLY in d for d in data)
    assert [d for d in data if PLOTLY in d and "image/png" not in d] == []
