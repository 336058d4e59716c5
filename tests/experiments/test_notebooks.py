"""Notebooks run from start to end, and what is committed of them is what they gave."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# In a process of its own: the kernel's client warns, and leaves sockets for the collector.
_EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
place = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
nbformat.write(notebook, sys.argv[3])
"""


def _pictures(notebook):
    return [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def test_there_are_four():
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["attention", "finetune", "quickstart", "retrieval"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert _pictures(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_start_to_end(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _EXECUTE, path, FOLDER, tmp_path / path.name],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, now = (nbformat.read(p, as_version=4) for p in (path, tmp_path / path.name))
    assert len(_pictures(now)) == len(_pictures(before))
    for cell, again in zip(before.cells, now.cells, strict=True):
        assert cell.source == again.source
        kinds = [  # what goes to standard error is the machine's: XLA tells of slow compilations
            {o.output_type for o in c.get("outputs", []) if o.get("name") != "stderr"}
            for c in (cell, again)
        ]
        assert kinds[0] == kinds[1], cell.source
