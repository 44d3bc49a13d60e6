"""The notebook of docs/, run by a kernel of this environment; its outputs are stored in it.

python -m benchmarks.notebook
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LONGEST = 300  # seconds of one cell


def read(path: Path = NOTEBOOK) -> Any:
    """Return the notebook with its outputs."""
    return nbformat.read(path, as_version=4)


def digest(notebook: Any) -> str:
    """Return a SHA-256 (hex) of the code: outputs that are stored with it are those of this code."""
    return hashlib.sha256(
        "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()
    ).hexdigest()


def executed(notebook: Any) -> Any:
    """Run all cells in a new kernel, in a folder of its own, and return the notebook with their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised something.
        jupyter_client.kernelspec.NoSuchKernel: this environment has no kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"timeout": LONGEST, "kernel_name": "python3", "record_timing": False}
        return NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options).execute()


def in_short(notebook: Any) -> Any:
    """Return an executed notebook as it is stored: without progress bars, second forms of pictures, and paths."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _in_short(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "outputs_of": digest(notebook),
    }
    return notebook


def _in_short(outputs: list[Any]) -> list[Any]:
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    kept = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
    for output in outputs:
        if output.output_type != "stream":
            output.data.pop("image/jpeg", None)
            output.data["text/plain"] = re.sub(r"/tmp/\w+", "/tmp/runs", output.data["text/plain"])
            kept.append(output)
    return kept


def main() -> None:
    """Run the notebook and write it."""
    nbformat.write(in_short(executed(read())), NOTEBOOK)


if __name__ == "__main__":
    main()
