"""Run the cells of `notebook_cells.py`, and write them with their outputs to `notebook.ipynb`.

`pip install "raybert[sample,report,notebook]"` has what it needs. Some minutes on two cores.
"""

import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent


def cells() -> nbformat.NotebookNode:
    """The notebook without outputs."""
    return jupytext.read(DOCS / "notebook_cells.py", fmt="py:percent")


def main() -> None:
    """Run the notebook in an empty folder."""
    notebook = cells()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":  # warnings name paths of this machine
            cell.outputs = [found for found in cell.outputs if found.get("name") != "stderr"]
        cell.metadata.pop("execution", None)  # times, which differ between two runs
    notebook.metadata = {"kernelspec": notebook.metadata.get("kernelspec", {})}
    nbformat.write(notebook, DOCS / "notebook.ipynb")


if __name__ == "__main__":
    main()
