"""The series as a workshop: routes through it, and an edition for students that is proven to run.

`write` makes a folder to hand out: the notebooks of a route without outputs and with their
exercises open, the package, the data, and a score sheet. `check` runs that folder as students
would. The key to the exercises is ``notebooks/solutions``; it is never copied. As a program,
``python -m workbench.explore.workshop`` does both.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode
from tqdm.auto import tqdm

from workbench.explore import blocks, exercises


@dataclass(frozen=True)
class Lesson:
    """A notebook in a course: what one can do after it, and the notebooks it builds on."""

    about: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """A way through the series that fits into ``minutes``; ``lessons`` are numbers of notebooks."""

    title: str
    minutes: int
    lessons: tuple[str, ...]


LESSONS = {
    "00": Lesson("read a trade-off plot, and tell a smaller model from a faster one"),
    "01": Lesson(
        "measure size, latency and accuracy, and see through numbers that flatter", ("00",)
    ),
    "02": Lesson("quantize to int8 that is really faster, and to few bits", ("01",)),
    "03": Lesson("prune weights and channels, and know which of the two saves time", ("01",)),
    "04": Lesson("distil a small model, and say whether the gain is more than noise", ("01",)),
    "05": Lesson("share weights and code them, and account for every byte", ("02", "03")),
    "06": Lesson(
        "order the steps, and divide a budget of bytes among the layers", ("02", "03", "05")
    ),
    "07": Lesson("send a model over a bad line, sealed, signed and verified", ("05",)),
    "08": Lesson("choose and tune an optimizer, and count what it keeps in memory", ("01",)),
    "09": Lesson("train on several workers, and find the bandwidth that it takes", ("08",)),
    "10": Lesson("cut a model by layers or within them, and find out who waits", ("09",)),
    "11": Lesson("run branches side by side, and see what a compiler merges", ("01",)),
    "12": Lesson("place a layer under the roof of a machine, and explain its speed", ("02",)),
    "13": Lesson("export a model, prove that it answers the same, and choose a runtime", ("02",)),
    "14": Lesson("serve a model to many clients, and keep it up under attack", ("13",)),
    "15": Lesson("mend what breaks on networks that other people trained", ("02", "05")),
    "16": Lesson("search under limits, and hand on a report with the evidence", ("06",)),
}
ROUTES = {
    "90min": Route("90 minutes", 90, ("00", "01", "02")),
    "half-day": Route("Half a day", 240, ("00", "01", "02", "03", "05", "06", "16")),
    "two-days": Route("Two days", 720, tuple(LESSONS)),
}
ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "workshop.csv"
_COPIED = (
    "workbench", "data", "notebooks/benchmarks/handlers",
    "pyproject.toml", "requirements.lock", "environment.yml", "Makefile", "LICENSE",
)  # fmt: skip
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def write(folder: str | os.PathLike, route: str = "two-days") -> Path:
    """Write the student edition of a route: all that a student's machine needs but the packages.

    Args:
        folder: is made; a student edition that is there and was never answered is replaced.
        route: a name in `ROUTES`.

    Returns:
        the folder.

    Raises:
        ValueError: there is no such route, the folder holds something else, or an exercise of the
            series is answered (it would be handed out).
        FileNotFoundError: the package does not lie in a clone with its notebooks.
    """
    if route not in ROUTES:
        raise ValueError(f"there is no route {route!r}; known are {', '.join(ROUTES)}")
    folder = Path(folder).absolute()
    _may_replace(folder)
    students = {path.name: opened(path) for path in series(ROUTES[route].lessons)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        edition = Path(place) / "edition"
        for name in _COPIED:
            _copy(ROOT / name, edition / name)
        (edition / "README.md").write_text(_readme(ROUTES[route], list(students)))
        for name in students:
            (edition / "notebooks" / name).touch()  # so that they find each other
        for name, notebook in students.items():
            _keep_links(notebook, edition / "notebooks")
            nbformat.write(notebook, edition / "notebooks" / name)
        exercises.keep_scores(edition / "notebooks")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(edition, folder)
    return folder


def check(folder: str | os.PathLike, *, run: bool = True, progress: bool = True) -> pd.DataFrame:
    """Use a student edition as a class would: in a copy, in real kernels, without the internet.

    Each exercise is left open first, then answered wrongly, then as in ``notebooks/solutions``.
    The copy imports its own package, not this one.

    Args:
        run: execute each notebook from top to bottom; otherwise its exercises only.

    Returns:
        one row for each notebook: ``seconds`` (NaN unless run), ``exercises``, how many of them
        were ``open``, gave their ``hint`` and came out ``right`` on the score sheet, and in
        ``trouble`` what is not as it should be, or nothing.

    Raises:
        ValueError: the folder holds no edition.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("notebooks/[0-9][0-9]_*.ipynb"))
    if not names:
        raise ValueError(f"{folder} holds no student edition; make one with workshop.write(folder)")
    rows = []
    with tempfile.TemporaryDirectory(prefix="workshop-") as place:
        copy = shutil.copytree(folder, Path(place) / "edition")
        sessions = [[name] for name in names] if run else [names]
        for session in tqdm(sessions, desc="check", disable=not progress):
            began = time.perf_counter()
            trial = _execute(_trial(copy, session, run), copy)
            seconds = time.perf_counter() - began if run else float("nan")
            scored = exercises.scores(copy / "notebooks")
            rows += [{"notebook": n, "seconds": seconds, **_found(trial, copy, n, scored)}
                     for n in session]  # fmt: skip
    return pd.DataFrame(rows)


def series(lessons: Sequence[str] = tuple(LESSONS)) -> list[Path]:
    """The notebooks of these numbers, in this order.

    Raises:
        FileNotFoundError: one is not there.
    """
    found = {path.name[:2]: path for path in ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")}
    for number in lessons:
        if number not in found:
            raise FileNotFoundError(
                f"there is no notebook {number} in {ROOT / 'notebooks'}; the workshop is made from "
                "a clone of the project"
            )
    return [found[number] for number in lessons]


def opened(path: str | os.PathLike) -> NotebookNode:
    """A notebook without outputs, its exercises open.

    Raises:
        ValueError: an exercise is answered in it.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        numbers = asked(cell)
        if numbers and cell.source.count("...") != len(numbers):
            raise ValueError(
                f"{path} answers one of {', '.join(numbers)}; students would get the answer. "
                "Restore it with git checkout, or write ... for each answer"
            )
    return notebook


def asked(cell: NotebookNode) -> list[str]:
    """Numbers of the exercises that a cell checks, in the order of their answers."""
    if cell.cell_type != "code" or not re.search(r"\bexercises\.check(_all)?\(", cell.source):
        return []
    return re.findall(r'"(\d\d\.\d+)"', cell.source)


def answered(cell: NotebookNode, answers: Mapping[str, str]) -> NotebookNode:
    """A cell of open exercises, answered: number -> Python expression."""
    pieces = cell.source.split("...")
    given = [answers[number] for number in asked(cell)]
    source = "".join(f"{a}{b}" for a, b in zip(pieces, [*given, ""], strict=True))
    return nbformat.v4.new_code_cell(source)


def key(number: str) -> list[NotebookNode]:
    """Cells of the solutions to a notebook; each leaves its answer in a variable, `_variable`.

    Raises:
        FileNotFoundError: there are no solutions to it.
    """
    path = ROOT / "notebooks" / "solutions" / series([number])[0].name
    cells = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            source = cell.source
            for solved, answer in re.findall(r'exercises\.check\("([\d.]+)", (\w+)\)', source):
                source += f"\n{_variable(solved)} = {answer}"
            cells.append(nbformat.v4.new_code_cell(source))
    return cells


def minutes(lesson: pd.Series) -> int:
    """Time for a notebook in class, to whole 5 minutes: 150 words and 100 words of code a minute,
    the time that it runs (a minute until it is timed), and 5 minutes for each exercise."""
    runs = 1 if pd.isna(lesson.seconds) else lesson.seconds / 60
    total = lesson.words / 150 + lesson.code_words / 100 + runs + 5 * lesson.exercises
    return 5 * round(total / 5)


def recorded() -> pd.DataFrame:
    """What was measured of each notebook, by number: ``seconds`` to run, words, exercises."""
    frame = pd.read_csv(RECORD)
    return frame.set_index(frame["notebook"].str[:2].rename("number"))


def record(frame: pd.DataFrame) -> None:
    """Keep the times of a `check`, and renew the table in ``notebooks/README.md``.

    Notebooks that this check did not run keep the time that they had, if any.
    """
    times = recorded().set_index("notebook").seconds if RECORD.is_file() else pd.Series(dtype=float)
    times = frame.set_index("notebook").seconds.round().combine_first(times)
    rows = [{"notebook": path.name, "seconds": times.get(path.name), **size(path.name)}
            for path in series()]  # fmt: skip
    pd.DataFrame(rows).to_csv(RECORD, index=False)
    blocks.put("lessons", overview(), ROOT / "notebooks" / "README.md")


def size(name: str) -> dict[str, int]:
    """How much there is to read and to answer in a notebook of the series."""
    cells = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells
    return {
        "words": sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown"),
        "code_words": sum(len(cell.source.split()) for cell in cells if cell.cell_type == "code"),
        "exercises": sum(len(asked(cell)) for cell in cells),
    }


def overview() -> str:
    """The lessons and the routes as two tables in Markdown, for ``notebooks/README.md``."""
    measured = recorded()
    lines = [["notebook", "afterwards you can", "builds on", "runs (s)", "in class (min)"]]
    for number, row in measured.iterrows():
        lesson = LESSONS[number]
        link = f"[{row.notebook.removesuffix('.ipynb').replace('_', ' ', 1)}]({row.notebook})"
        seconds = "not timed" if pd.isna(row.seconds) else f"{row.seconds:.0f}"
        lines.append([link, lesson.about, ", ".join(lesson.after), seconds, str(minutes(row))])
    ways = [["route", "`--route`", "notebooks", "in class (min)"]]
    for name, route in ROUTES.items():
        total = sum(minutes(measured.loc[number]) for number in route.lessons)
        ways.append([route.title, f"`{name}`", ", ".join(route.lessons), str(total)])
    return f"{_table(lines)}\n\n{_table(ways)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the student edition of a route into a folder, and check that it runs."""
    parser = argparse.ArgumentParser(prog="workbench.explore.workshop", description=main.__doc__)
    parser.add_argument("folder", nargs="?", default="build/workshop", help="folder to write")
    parser.add_argument("--route", default="two-days", choices=ROUTES, help="which notebooks")
    parser.add_argument("--no-run", action="store_true", help="check the exercises only")
    parser.add_argument("--record", action="store_true", help="renew the times in the README")
    given = parser.parse_args(arguments)
    folder = write(given.folder, given.route)
    frame = check(folder, run=not given.no_run)
    print(frame.drop(columns="trouble").round(0).to_string(index=False))
    troubles = [f"{row.notebook}: {row.trouble}" for row in frame.itertuples() if row.trouble]
    if troubles:
        sys.exit("\n".join(["the edition is not in order:", *troubles]))
    if given.record:
        record(frame)
    print(f"wrote {given.folder}: {frame.exercises.sum()} exercises, all in order")


def _may_replace(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    sheet = folder / "notebooks" / exercises.SHEET
    if not sheet.is_file():
        raise ValueError(f"{folder} is there and is no student edition; give another folder")
    if sheet.stat().st_size:
        raise ValueError(f"somebody has answered exercises in {folder}; give another folder")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy2(source, target)


def _readme(route: Route, names: Sequence[str]) -> str:
    lines = [["notebook", "afterwards you can"]]
    for name in names:
        title = name.removesuffix(".ipynb").replace("_", " ", 1)
        lines.append([f"[{title}](notebooks/{name})", LESSONS[name[:2]].about])
    return f"""# What it takes to make a model cheaper to serve

A workshop: {route.title.lower()}. Install once, with a network, then work without one:

```
make lab
```

Run the cells from the top: each answers a question that the text before it asks.

{_table(lines)}

Each notebook ends with exercises. Write your answer in place of `...` and run the cell: it says
whether the answer is right, or gives a hint. The score stays on your machine, in
`notebooks/{exercises.SHEET}`; look at it in any notebook with `exercises.scores()`. To begin anew,
empty that file; to keep no score, delete it.
"""


def _keep_links(notebook: NotebookNode, folder: Path) -> None:
    """Links to what is not in this edition become plain words."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(
                lambda link: link[0] if (folder / link[2].split("#")[0]).exists() else link[1],
                cell.source,
            )


def _trial(copy: Path, names: Sequence[str], run: bool) -> NotebookNode:
    """One notebook that does what a class does; the metadata of its cells say what is tried."""
    begin = "import pandas as pd\n\nimport workbench\nfrom workbench.explore import exercises\n"
    cells = [_marked(nbformat.v4.new_code_cell(f"{begin}\nprint(workbench.__file__)"), "package")]
    for name in names:
        number = name[:2]
        student = nbformat.read(copy / "notebooks" / name, as_version=4).cells
        questions = [cell for cell in student if asked(cell)]
        for cell in student if run else questions:
            cells.append(_marked(cell, f"{number} open") if asked(cell) else cell)
        for cell in questions:
            wrong = "\n".join(f'print(exercises.check("{n}", None))' for n in asked(cell))
            cells.append(_marked(nbformat.v4.new_code_cell(wrong), f"{number} hint"))
        cells += key(number)
        for cell in questions:
            solved = answered(cell, {n: _variable(n) for n in asked(cell)})
            cells.append(_marked(solved, f"{number} right"))
    return nbformat.v4.new_notebook(cells=cells)


def _marked(cell: NotebookNode, trial: str) -> NotebookNode:
    cell.metadata["trial"] = trial
    return cell


def _execute(notebook: NotebookNode, copy: Path) -> NotebookNode:
    """Run it in a kernel of its own. An error stops it, and stays in its cell's outputs; what left
    no output (a kernel that died, a cell without end) is noted in its metadata."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    away = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"),
                         "http://127.0.0.1:9")  # nobody listens there  # fmt: skip
    here = "127.0.0.1,localhost"
    path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **away, "no_proxy": here, "NO_PROXY": here, "PYTHONPATH": path}
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3",
        resources={"metadata": {"path": str(copy / "notebooks")}},
    )  # fmt: skip
    try:
        client.execute(env=environment)
    except (DeadKernelError, CellTimeoutError) as error:
        notebook.metadata["stopped"] = str(error).splitlines()[0]
    except CellExecutionError:
        pass
    return notebook


def _found(trial: NotebookNode, copy: Path, name: str, scored: pd.DataFrame) -> dict[str, object]:
    """What the trial showed of one notebook."""
    number = name[:2]
    shown = {"package": "", f"{number} open": "", f"{number} hint": "", f"{number} right": ""}
    trouble = [trial.metadata["stopped"]] if "stopped" in trial.metadata else []
    for cell in trial.cells:
        if cell.cell_type == "code":
            text, error = _text(cell)
            tried = cell.metadata.get("trial", "")
            shown[tried] = shown.get(tried, "") + text
            if error and "raises-exception" not in cell.metadata.get("tags", []):
                trouble.append(error)
    numbers = [n for n in exercises.EXERCISES if n[:2] == number]
    told = {
        "open": [f"{n}: not answered yet" in shown[f"{number} open"] for n in numbers],
        "hint": [exercises.EXERCISES[n].hint in shown[f"{number} hint"] for n in numbers],
        "right": [f"{n}: right." in shown[f"{number} right"] and scored["right"][n]
                  and scored["hints"][n] == 1 for n in numbers],
    }  # fmt: skip
    for what, yes in told.items():
        missing = [n for n, is_so in zip(numbers, yes, strict=True) if not is_so]
        trouble += [f"not {what}: {', '.join(missing)}"] if missing else []
    if not shown["package"].startswith(str(copy)):
        trouble.append("it imports another package than its own")
    counts = {what: sum(map(bool, yes)) for what, yes in told.items()}
    return {"exercises": len(numbers), **counts, "trouble": "; ".join(trouble)}


def _text(cell: NotebookNode) -> tuple[str, str]:
    """What a cell shows as text, and the error that it ended with, if any."""
    text, error = "", ""
    for output in cell.get("outputs", []):
        text += output.get("text", "") + output.get("data", {}).get("text/plain", "")
        if output.output_type == "error":
            error = f"{output.ename}: {output.evalue}"
    return text, error


def _variable(number: str) -> str:
    return f"solved_{number.replace('.', '_')}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
