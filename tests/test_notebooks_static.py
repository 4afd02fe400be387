"""What nbval does not see: it passes cells that were never run, and reads no prose."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")],
)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(root|home|Users|tmp|var|mnt|opt)/|[A-Z]:\\\\?Users\\")
TIME = re.compile(r"\d\s?(ns|us|[µμ]s|ms|milliseconds)\b|<th>[^<]*(_ms|\(ms\))</th>")

every_notebook = pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "notebooks"))
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def output_text(cell: nbformat.NotebookNode) -> str:
    """Everything a cell shows, pictures left out."""
    shown = []
    for output in cell.outputs:
        shown.append(output.get("text", ""))
        shown += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        shown += output.get("traceback", [])
    return "\n".join(shown)


def calls(source: str, statement: type[ast.AST], name: str = "") -> bool:
    """Whether the source of a cell holds such a statement, or a call of the named function."""
    tree = ast.parse(TransformerManager().transform_cell(source))
    return any(
        isinstance(node, statement) and (not name or getattr(node.func, "id", "") == name)
        for node in ast.walk(tree)
    )


def test_there_are_notebooks():
    assert ROOT / "notebooks/00_start_here.ipynb" in NOTEBOOKS


def test_one_digit_in_a_stored_output_decides(tmp_path):
    """nbval itself, with the project's settings: two cells, and one stored output is wrong."""
    cells = []
    for count, stored in enumerate(("0.9361", "0.9362"), start=1):
        cell = nbformat.v4.new_code_cell("0.9361", execution_count=count)
        data = {"text/plain": stored}
        cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=count)]
        cells.append(cell)
    path = tmp_path / "two_cells.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 1 passed" in ran.stdout


@every_notebook
def test_saved_after_restart_and_run_all(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_metadata(notebook):
    metadata = read(notebook).metadata
    assert "widgets" not in metadata, "clear the saved widget state"
    assert metadata.kernelspec.name == "python3"


@every_notebook
def test_errors_are_announced(notebook):
    for cell in code_cells(notebook):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in tags(cell)), cell.source


@every_notebook
def test_no_machine_path(notebook):
    for cell in read(notebook).cells:
        text = cell.source + "\n" + (output_text(cell) if cell.cell_type == "code" else "")
        assert not MACHINE_PATH.search(text), cell.source
        assert str(Path.home()) not in text, cell.source


@every_notebook
def test_size(notebook):
    assert notebook.stat().st_size < 500_000
    assert len(read(notebook).cells) <= 30
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, cell.source


@every_notebook
def test_cell_that_prints_asserts(notebook):
    for cell in code_cells(notebook):
        if calls(cell.source, ast.Call, "print"):
            assert calls(cell.source, ast.Assert), cell.source


@every_notebook
def test_times_are_not_compared(notebook):
    for cell in code_cells(notebook):
        if "nbval-ignore-output" not in tags(cell):
            assert not TIME.search(output_text(cell)), cell.source
