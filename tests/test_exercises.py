"""The exercises' mechanism, and each exercise with right and wrong answers."""

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
