"""Generated parts of pages that people write: a block between two marks, the same on every page.

The block ``comparison`` stands between ``<!-- comparison -->`` and ``<!-- end of comparison -->``.
"""

import os
from pathlib import Path

from workbench import data


def read(path: str | os.PathLike, name: str) -> str:
    """The block of this name on a page.

    Raises:
        ValueError: the page has no such block, or has it twice.
    """
    return _parts(Path(path), name)[1].strip("\n")


def put(name: str, text: str, *paths: str | os.PathLike) -> None:
    """Write the same block on each of these pages, in place of what is there.

    Raises:
        ValueError: a page has no such block, or has it twice; then none is changed.
    """
    start, end = _marks(name)
    parts = {path: _parts(Path(path), name) for path in paths}
    for path, (before, _, after) in parts.items():
        page = f"{before}{start}\n{text}\n{end}{after}"
        data.write_whole(path, lambda part, page=page: Path(part).write_text(page, "utf-8"))


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    """What stands before, in and after the block."""
    page = path.read_text("utf-8")
    marks = _marks(name)
    if [page.count(mark) for mark in marks] != [1, 1]:
        raise ValueError(f"{path} must have the lines {marks[0]} and {marks[1]} once each")
    before, rest = page.split(marks[0])
    if marks[1] not in rest:
        raise ValueError(f"in {path}, {marks[1]} stands before {marks[0]}")
    return before, *rest.split(marks[1])


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
