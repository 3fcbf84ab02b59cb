"""The notebooks run from top to bottom, show what they promise, and are kept without outputs."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 600


def read(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what nbformat brings
        import nbformat

    return nbformat.read(EXAMPLES / name, as_version=4)


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES.glob("*.ipynb")])
def test_notebooks_are_kept_without_outputs(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_watch_experts_shows_that_code_and_stories_have_experts_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SHOAL_URL", "SHOAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nbclient import NotebookClient

        notebook = read("watch_experts.ipynb")
        resources = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(
            notebook, timeout=TIMEOUT_S, startup_timeout=TIMEOUT_S, resources=resources
        )
        client.execute()
    cells = {cell.id: cell for cell in notebook.cells}
    told = text_of(cells["overlap"])
    moved = [int(percent) for percent in re.findall(r"^layer \d+: (\d+)% of", told, re.M)]
    assert len(moved) == 3
    assert all(percent > 20 for percent in moved)
    assert any("image/png" in output.get("data", {}) for output in cells["maps"].outputs)
    assert "Once upon a time" in text_of(cells["ask"])


def text_of(cell: Any) -> str:
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")
