"""The student edition: what is in it, what is not, and that its check sees what is wrong."""

import json
import re

import nbformat
import pytest

from workbench.explore import blocks, exercises, workshop

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    return workshop.write(tmp_path_factory.mktemp("workshop") / "edition")


# Of the lessons, that is: an exercise may be there before its notebook is.
EXERCISES = sorted(n for n in exercises.EXERCISES if n[:2] in workshop.LESSONS)


def notebooks(folder):
    return {path.name: nbformat.read(path, as_version=4)
            for path in sorted(folder.glob("notebooks/*.ipynb"))}  # fmt: skip


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# The routes.


@pytest.mark.parametrize("route", workshop.ROUTES.values(), ids=workshop.ROUTES)
def test_a_route_holds_what_its_lessons_build_on_and_fits_into_its_time(route):
    seen = []
    for number in route.lessons:
        assert set(workshop.LESSONS[number].after) <= set(seen)
        seen.append(number)
    measured = workshop.recorded()
    assert sum(workshop.minutes(measured.loc[number]) for number in seen) <= route.minutes


def test_every_notebook_is_a_lesson_of_the_longest_route():
    found = sorted(path.name for path in workshop.ROOT.glob("notebooks/[0-9]*.ipynb"))
    assert [path.name for path in workshop.series()] == found
    assert workshop.ROUTES["two-days"].lessons == tuple(workshop.LESSONS)
    assert list(workshop.recorded().notebook) == found


def test_every_exercise_is_asked_by_its_notebook():
    asked = [number for path in workshop.series()
             for cell in nbformat.read(path, as_version=4).cells
             for number in workshop.asked(cell)]  # fmt: skip
    assert sorted(asked) == EXERCISES


def test_the_readme_of_the_notebooks_shows_the_record():
    readme = workshop.ROOT / "notebooks" / "README.md"
    assert blocks.read(readme, "lessons") == workshop.overview()
    for link in LINK.findall(readme.read_text()):
        assert (readme.parent / link).exists(), link


def test_the_record_is_of_about_these_notebooks():
    """Small corrections do not make it stale: with a fifth more to read, it is measured again."""
    for _, row in workshop.recorded().iterrows():
        now = workshop.size(row.notebook)
        assert now["exercises"] == row.exercises
        assert now["words"] == pytest.approx(row.words, rel=0.2), row.notebook
        assert now["code_words"] == pytest.approx(row.code_words, rel=0.2), row.notebook


def test_minutes_add_up():
    lesson = {"words": 1500, "code_words": 500, "seconds": 60, "exercises": 3}
    assert workshop.minutes(workshop.pd.Series(lesson)) == 30  # 10 + 5 + 1 + 15, to whole fives


def test_the_record_keeps_what_was_not_run_again(tmp_path, monkeypatch):
    for name in ("00_a.ipynb", "01_b.ipynb"):
        path = tmp_path / "notebooks" / name
        path.parent.mkdir(exist_ok=True)
        nbformat.write(small(name[:2], "1 + 1"), path)
    (tmp_path / "notebooks/README.md").write_text("<!-- lessons -->\n<!-- end of lessons -->")
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    monkeypatch.setattr(workshop, "RECORD", tmp_path / "record.csv")
    monkeypatch.setattr(workshop.series, "__defaults__", (("00", "01"),))
    route = {"all": workshop.Route("All", 90, ("00", "01"))}
    monkeypatch.setattr(workshop, "ROUTES", route)
    times = {"notebook": ["00_a.ipynb", "01_b.ipynb"], "seconds": [10.4, float("nan")]}
    workshop.record(workshop.pd.DataFrame(times))
    assert " | not timed | 15 |" in (tmp_path / "notebooks/README.md").read_text()
    workshop.record(workshop.pd.DataFrame({**times, "seconds": [float("nan"), 30.6]}))
    assert workshop.recorded().seconds.to_dict() == {"00": 10, "01": 31}
    shown = (tmp_path / "notebooks/README.md").read_text()
    assert "| [01 b](01_b.ipynb) |" in shown
    assert " | 31 | 15 |" in shown
    assert "| All | `all` | 00, 01 | 25 |" in shown


# The edition.


def test_outputs_are_gone_and_exercises_are_open(edition):
    found = notebooks(edition)
    assert sorted(found) == [path.name for path in workshop.series()]
    for name, notebook in found.items():
        for cell in code_of(notebook):
            assert cell.outputs == []
            assert cell.execution_count is None
            assert not (numbers := workshop.asked(cell)) or cell.source.count("...") == len(numbers)
        original = nbformat.read(workshop.ROOT / "notebooks" / name, as_version=4)
        assert [cell.source for cell in code_of(notebook)] == [c.source for c in code_of(original)]


def test_the_key_stays_out(edition):
    assert not list(edition.rglob("*solution*"))
    handed_out = "\n".join(cell.source for nb in notebooks(edition).values() for cell in nb.cells)
    for number in workshop.LESSONS:
        for cell in workshop.key(number)[1:]:
            answer = cell.source.split("feedback =")[0].strip()
            assert answer
            assert answer not in handed_out


def test_links_lead_somewhere(edition):
    pages = [(edition, (edition / "README.md").read_text())]
    pages += [(edition / "notebooks", cell.source) for nb in notebooks(edition).values()
              for cell in nb.cells if cell.cell_type == "markdown"]  # fmt: skip
    found = [(folder, link) for folder, text in pages for link in LINK.findall(text)]
    assert len(found) >= len(workshop.LESSONS)
    assert all((folder / link).exists() for folder, link in found)


def test_a_link_to_what_is_left_out_becomes_words(tmp_path):
    (tmp_path / "00.ipynb").touch()
    text = (
        "[a](00.ipynb#x), [b](solutions/00.ipynb), [c](https://example.org), [d](#e), ![f](g.png)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    workshop._keep_links(notebook, tmp_path)
    assert notebook.cells[0].source == text.replace("[b](solutions/00.ipynb)", "b")


def test_the_score_sheet_is_there_and_empty(edition):
    frame = exercises.scores(edition / "notebooks")
    assert list(frame.index) == EXERCISES
    assert not frame["right"].any()


def test_a_shorter_route_holds_its_lessons_only(tmp_path, monkeypatch):
    def with_links(path, opened=workshop.opened):
        notebook = opened(path)
        text = "[next](03_pruning.ipynb) [this](01_measuring.ipynb)"
        notebook.cells.append(nbformat.v4.new_markdown_cell(text))
        return notebook

    monkeypatch.setattr(workshop, "opened", with_links)
    short = workshop.write(tmp_path / "short", "90min")
    for notebook in notebooks(short).values():
        assert notebook.cells[-1].source == "next [this](01_measuring.ipynb)"
    assert [name[:2] for name in notebooks(short)] == list(workshop.ROUTES["90min"].lessons)
    assert "03 pruning" not in (short / "README.md").read_text()
    (short / "notebooks" / "old.txt").touch()
    assert workshop.write(short, "90min") == short  # nobody has used it
    assert not (short / "notebooks" / "old.txt").exists()
    assert list(tmp_path.iterdir()) == [short]


def test_exercises_of_the_edition_score_nothing_open_and_everything_with_the_key(edition):
    before = sorted(path for path in edition.rglob("*"))
    frame = workshop.check(edition, run=False, progress=False)
    assert frame.trouble.tolist() == [""] * len(workshop.LESSONS)
    assert frame.exercises.sum() == len(EXERCISES)
    for what in ("open", "hint", "right"):
        assert (frame[what] == frame.exercises).all()
    assert frame.seconds.isna().all()
    assert sorted(path for path in edition.rglob("*")) == before


def small(number, *sources):
    """A notebook with the exercises of this number, and little else."""
    numbers = [n for n in exercises.EXERCISES if n[:2] == number]
    answers = ", ".join(f'"{n}": ...' for n in numbers)
    begin = "import pandas as pd\nfrom workbench.explore import exercises"
    end = f"answers = {{{answers}}}\nexercises.check_all(answers)"
    cells = [nbformat.v4.new_code_cell(source) for source in (begin, *sources, end)]
    return nbformat.v4.new_notebook(cells=cells)


def test_the_check_runs_each_notebook_and_sees_what_is_wrong(edition, tmp_path, monkeypatch):
    """One whose key has a wrong answer, and one that fails and asks too little."""
    (tmp_path / "workbench").symlink_to(edition / "workbench")
    (tmp_path / "data").symlink_to(edition / "data")
    (tmp_path / "notebooks").mkdir()
    good = small("00", "from workbench import data\ndata.verified('austen.txt.xz')\nopen('x', 'w')")
    failing = small("01", "1 / 0")
    failing.cells[-1].source = failing.cells[-1].source.replace('"01.2": ..., ', "")
    for name, notebook in {"00": good, "01": failing}.items():
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}_small.ipynb")
    exercises.keep_scores(tmp_path / "notebooks")
    wrong = nbformat.v4.new_code_cell("solved_00_2 = 'linear'")
    key = workshop.key
    monkeypatch.setattr(workshop, "key", lambda number: [*key(number), wrong])

    frame = workshop.check(tmp_path, progress=False).set_index("notebook")

    assert frame.trouble["00_small.ipynb"] == "not right: 00.2"
    assert frame.loc["00_small.ipynb", ["exercises", "open", "hint", "right"]].tolist() == [
        2,
        2,
        2,
        1,
    ]
    assert frame.seconds.min() > 0
    assert "ZeroDivisionError: division by zero" in frame.trouble["01_small.ipynb"]
    assert "not open: 01.1, 01.2, 01.3" in frame.trouble["01_small.ipynb"]
    assert sorted(path.name for path in (tmp_path / "notebooks").iterdir()) == [
        "00_small.ipynb", "01_small.ipynb", exercises.SHEET,
    ]  # fmt: skip


def test_a_kernel_that_dies_is_told(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell("import os\nos._exit(1)")]
    trial = workshop._execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    assert "died" in trial.metadata["stopped"]


# What is refused.


def test_an_unknown_route_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no route 'week'; known are 90min, half-day, two-days"):
        workshop.write(tmp_path / "edition", "week")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no student edition; give another folder"):
        workshop.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_edition_with_answers_is_left_alone(tmp_path):
    (tmp_path / "notebooks").mkdir()
    exercises.keep_scores(tmp_path / "notebooks").write_text(json.dumps({"exercise": "00.1"}))
    with pytest.raises(ValueError, match="somebody has answered"):
        workshop.write(tmp_path)


def test_an_answered_exercise_is_not_handed_out(tmp_path):
    path = tmp_path / "00_small.ipynb"
    notebook = small("00")
    nbformat.write(notebook, path)
    assert workshop.asked(workshop.opened(path).cells[-1]) == ["00.1", "00.2"]
    notebook.cells[-1].source = notebook.cells[-1].source.replace("...", "38_877", 1)
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match=r"answers one of 00\.1, 00\.2; .*git checkout"):
        workshop.opened(path)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "keep_scores", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workshop.write(tmp_path / "edition", "90min")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no student edition"):
        workshop.check(tmp_path)
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no notebook 00 in .* a clone of the project"):
        workshop.write(tmp_path / "edition")


# The parts.


@pytest.mark.parametrize(
    ("source", "numbers", "expected"),
    [
        ('answer = ...\nexercises.check("11.1", answer)', ["11.1"],
         'answer = one\nexercises.check("11.1", answer)'),
        ('answers = {"02.1": ..., "02.2": ...}\nexercises.check_all(answers)', ["02.1", "02.2"],
         'answers = {"02.1": one, "02.2": two}\nexercises.check_all(answers)'),
        ("x = y[..., 0]", [], None),
    ],
)  # fmt: skip
def test_answers_take_the_place_of_the_dots(source, numbers, expected):
    cell = nbformat.v4.new_code_cell(source)
    assert workshop.asked(cell) == numbers
    if expected:
        given = dict(zip(numbers, ["one", "two"], strict=False))
        assert workshop.answered(cell, given).source == expected


def test_the_program_says_what_is_not_in_order(tmp_path, monkeypatch, capsys):
    row = {"notebook": "00_a.ipynb", "seconds": 1.0, "exercises": 2, "trouble": ""}
    checked = []

    def check(folder, run):
        checked.append((folder, run))
        return workshop.pd.DataFrame([row])

    monkeypatch.setattr(workshop, "check", check)
    arguments = [str(tmp_path / "edition"), "--route", "90min", "--no-run"]
    workshop.main(arguments)
    assert "2 exercises, all in order" in capsys.readouterr().out
    assert checked == [(tmp_path / "edition", False)]
    row["trouble"] = "not right: 00.1"
    with pytest.raises(SystemExit, match=r"00_a\.ipynb: not right: 00\.1"):
        workshop.main(arguments)
