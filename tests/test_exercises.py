"""The exercises' mechanism, and each exercise with right and wrong answers."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from workbench.explore import exercises
from workbench.explore.exercises import check, close_to, returns, text_is


class Awkward:
    """Raises whenever it is used as a number, a text or a function."""

    def refuse(self, *_, **__):
        raise RuntimeError("no")

    __array__ = __bool__ = __call__ = __float__ = __iter__ = __eq__ = refuse
    __hash__ = None


@pytest.mark.parametrize("number", exercises.EXERCISES)
@pytest.mark.parametrize(
    "answer", [None, "text", [], {}, object(), np.array([]), torch.tensor([]), Awkward(), print,
               lambda: 1, float("nan"), 1j], ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_no_answer_makes_it_raise(number, answer):
    feedback = check(number, answer)
    assert feedback.right is False
    assert "Hint: " in repr(feedback)


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_ellipsis_is_not_an_answer_yet(number):
    assert repr(check(number, ...)) == f"{number}: not answered yet"
    assert check(number, ...).right is None


def test_an_unknown_exercise_is_refused():
    with pytest.raises(ValueError, match=r"no exercise '99.1'; known are 00.1, "):
        check("99.1", 1)


def test_feedback_tells_why_a_right_answer_is_right():
    feedback = check("01.1", 13_830)
    assert feedback.right is True
    assert repr(feedback).startswith("01.1: right. p (1 - p)")


def test_feedback_shows_what_an_answer_raised_and_escapes_it():
    def broken(low, high):
        raise KeyError("<low>")

    feedback = check("02.1", broken)
    assert repr(feedback).startswith("02.1: not yet (KeyError: '<low>'). Hint: ")
    assert "&lt;low&gt;" in feedback._repr_html_()


@pytest.mark.parametrize(
    ("answer", "right"),
    [(13_830, True), (torch.tensor(13_829.8), True), (12_500, True), (15_200, True),
     (12_400, False), (15_300, False), (3_457, False)],
)  # fmt: skip
def test_01_1_takes_ten_per_cent_either_way(answer, right):
    assert check("01.1", answer).right is right


def grid(low, high):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / 255
    return scale, round(-low / scale)


def test_02_1_takes_numbers_and_tensors():
    assert check("02.1", grid).right
    assert check("02.1", lambda low, high: tuple(map(torch.tensor, grid(low, high)))).right


@pytest.mark.parametrize(
    "wrong",
    [
        lambda low, high: ((high - low) / 255, round(-low / ((high - low) / 255))),  # leaves 0 out
        lambda low, high: (grid(low, high)[0] * 255 / 256, grid(low, high)[1]),
        lambda low, high: (grid(low, high)[0], grid(low, high)[1] + 1),
        lambda low, high: (grid(low, high)[0], grid(low, high)[1] + 0.4),
        lambda low, high: grid(low, high)[::-1],
    ],
)
def test_02_1_refuses_the_usual_mistakes(wrong):
    assert check("02.1", wrong).right is False


def soft(w, alpha):
    return w.sign() * (w.abs() - alpha).clamp(min=0)


@pytest.mark.parametrize(
    ("number", "answer", "right"),
    [("03.1", soft, True), ("03.1", lambda w, alpha: w - alpha * w.sign(), False),
     ("03.1", lambda w, alpha: w * (w.abs() > alpha), False),
     ("03.2", 1 / 3, True), ("03.2", 2 / 3, False), ("03.2", 0.5, False),
     ("03.3", 0.25, True), ("03.3", 0.5, False),
     ("06.1", 24, True), ("06.1", 120, False),
     ("06.2", (4, 2), True), ("06.2", (2, 4), False), ("06.2", (3, 3), False),
     ("06.3", 0.4, True), ("06.3", 0.7, False)],
)  # fmt: skip
def test_compression_exercises_know_right_from_wrong(number, answer, right):
    assert check(number, answer).right is right


@pytest.mark.parametrize("answer", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0])])
def test_close_to_takes_lists_arrays_and_tensors(answer):
    assert close_to([1, 2])(answer)
    assert not close_to([1, 2.1])(answer)
    assert not close_to([1, 2, 3])(answer)
    assert not close_to(1)(answer)


def test_close_to_takes_a_tensor_with_gradient():
    assert close_to(1)(torch.tensor(1.0, requires_grad=True))


def test_text_is_does_not_mind_case_and_spaces():
    assert text_is("zero point")("Zero-Point ")
    assert not text_is("zero point")("scale")
    assert not text_is("zero point")(3)


def test_returns_wants_every_case():
    assert returns([((1, 2), 3), ((2, 2), 4)])(lambda a, b: a + b)
    assert not returns([((1, 2), 3), ((3, 3), 9)])(lambda a, b: a + b)


def test_several_answers_are_told_one_by_one_and_in_full():
    shown = exercises.check_all({"02.1": None, "01.3": ..., "02.2": 2560})
    lines = repr(shown).splitlines()
    assert lines[0] == repr(check("02.1", None))
    assert lines[0].endswith(exercises.EXERCISES["02.1"].hint)
    assert lines[1:] == [repr(check("01.3", ...)), repr(check("02.2", 2560))]
    assert shown._repr_html_().count("<p>") == 3
    assert [feedback.right for feedback in shown] == [False, None, True]


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """A folder, as a notebook sees it, in which a score is kept."""
    monkeypatch.chdir(tmp_path)
    return exercises.keep_scores()


def test_no_score_is_kept_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check("01.3", 1.82)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no score is kept in .*keep_scores\(\)"):
        exercises.scores()


def test_a_new_sheet_is_empty_and_an_old_one_goes_on(sheet):
    assert not exercises.scores()["right"].any()
    check("01.3", 1.82)
    assert exercises.keep_scores() == sheet
    assert exercises.scores()["right"].sum() == 1


def test_scores_count_hints_until_the_answer_is_right(sheet):
    for answer in (..., 1, 2, ..., 1.82, 3):
        check("01.3", answer)
    check("01.1", "many")
    frame = exercises.scores()
    assert list(frame.index) == sorted(exercises.EXERCISES)
    assert frame.loc["01.3", ["right", "hints"]].tolist() == [True, 2]
    assert frame.loc["01.1", ["right", "hints"]].tolist() == [False, 1]
    assert frame.loc["01.2", ["right", "hints", "when"]].tolist() == [False, 0, ""]
    assert frame["right"].sum() == 1
    assert frame["hints"].sum() == 3


def test_unanswered_exercises_and_unknown_ones_leave_no_line(sheet):
    check("01.3", ...)
    with pytest.raises(ValueError, match="no exercise"):
        check("99.1", 1)
    assert sheet.read_bytes() == b""


def test_feedback_is_the_same_with_and_without_a_sheet(sheet):
    kept = [check("01.3", answer) for answer in (1, 1.82, ...)]
    sheet.unlink()
    assert kept == [check("01.3", answer) for answer in (1, 1.82, ...)]


def test_scores_list_the_exercises_of_the_notebooks_beside_the_sheet(sheet):
    (sheet.parent / "01_measuring.ipynb").touch()
    check("02.2", 2560)
    assert list(exercises.scores().index) == ["01.1", "01.2", "01.3", "02.2"]
    assert exercises.scores(sheet.parent).equals(exercises.scores())


@pytest.mark.parametrize(
    "damage",
    [b'{"exercise": "01.1", "ri', b"\xff\xfe\n", b"[]\n7\nnull\n", b'{"exercise": "99.1"}',
     b'{"exercise": ["01.1"], "right": true, "when": ""}',
     b'{"exercise": "01.1", "right": "yes", "when": ""}',
     b'{"exercise": "77.1", "right": true, "when": ""}'],
)  # fmt: skip
def test_a_damaged_line_spoils_no_other(sheet, damage):
    check("01.3", 1)
    with sheet.open("ab") as file:
        file.write(damage)
    check("01.3", 1.82)
    frame = exercises.scores()
    assert frame.loc["01.3", ["right", "hints"]].tolist() == [True, 1]
    assert frame["right"].sum() == 1
    assert frame["hints"].sum() == 1


def test_a_sheet_that_cannot_be_written_warns_and_the_answer_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / exercises.SHEET).mkdir()
    with pytest.warns(UserWarning, match="score sheet could not be written"):
        assert check("01.3", 1.82).right


ANSWER_OFTEN = """
import sys
from workbench.explore import exercises
for _ in range(200):
    exercises.check(sys.argv[1], None)
exercises.check("01.3", 1.82)
"""


def test_several_notebooks_share_a_sheet(sheet):
    kernels = [
        subprocess.Popen([sys.executable, "-c", ANSWER_OFTEN, number], cwd=sheet.parent)
        for number in ("00.1", "01.1", "03.3")
    ]
    assert [kernel.wait() for kernel in kernels] == [0, 0, 0]
    frame = exercises.scores()
    assert frame["hints"][["00.1", "01.1", "03.3"]].tolist() == [200, 200, 200]
    assert frame["right"]["01.3"]
