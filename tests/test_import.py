"""``import workbench`` must cost almost nothing: its rooms come in when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import workbench


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_heavy_packages_stay_out():
    heavy = ("torch", "numpy", "pandas", "matplotlib", "onnxruntime", "ipywidgets")
    code = f"import sys, workbench; print([name for name in {heavy} if name in sys.modules])"
    assert run(code) == "[]"


def test_import_takes_under_a_fifth_of_a_second():
    code = (
        "import time; start = time.perf_counter(); import workbench; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(5)) < 0.2


def test_rooms_are_listed_and_come_in_when_used():
    assert {"data", "models", "training"} <= set(dir(workbench))
    assert run("import workbench; print(workbench.data.__name__)") == "workbench.data"


def test_unknown_room_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = workbench.nothing_here


# Arrows point one way: explore -> measure -> compress, storage, transfer, deploy, parallel -> data,
# models, training. A task of sentences is made of the tokens of its network. Storage takes apart
# what compress made; transfer looks into files of storage; deploy opens what transfer sealed.
BENCH = {"data", "models", "training"}
ALLOWED = {
    "data": {"models"},
    "models": {"data", "models"},
    "training": {"data"},
    "compress": BENCH | {"compress"},
    "storage": BENCH | {"compress", "storage"},
    "transfer": BENCH | {"storage", "transfer"},
    "deploy": BENCH | {"compress", "transfer", "deploy"},
    "parallel": BENCH | {"parallel"},
}
ALLOWED["measure"] = {*ALLOWED, "measure"}
ALLOWED["explore"] = {*ALLOWED, "explore"}
PACKAGE = Path(workbench.__file__).parent
MODULES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})


def imported_rooms(source: str) -> set[str]:
    """Rooms of the workbench that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("workbench.")} & set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_lies_below_them(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_rooms(path.read_text()) <= ALLOWED[room]
