"""The panel, driven without a kernel, and the pure functions behind it."""

import math

import frames
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.explore import plots
from workbench.explore.panels import (
    OBJECTIVES,
    Explorer,
    Limits,
    Tradeoff,
    remaining,
    score_lost,
    tightest,
    winner,
)

FRAME = frames.frame()


def names(frame):
    return frame["name"].tolist()


def test_without_limits_everything_measured_remains():
    assert names(remaining(FRAME, Limits())) == [row[0] for row in frames.ROWS[:7]]


@given(st.floats(1e5, 3e6), st.floats(0, 0.2), st.booleans())
def test_what_remains_keeps_to_every_limit_and_nothing_else_does(size_bytes, lost, simulated):
    limits = Limits(size_bytes=size_bytes, score_lost=lost, simulated=simulated)
    expected = [
        row[0]
        for row in frames.ROWS[:7]
        if row[4] <= size_bytes and 0.9361 - row[5] <= lost + 1e-9 and (simulated or not row[3])
    ]
    assert names(remaining(FRAME, limits)) == expected


def test_a_limit_is_itself_allowed():
    frame = frames.frame((("a", "none", "eager", False, 1000, 0.91, 1.0, ""),
                          ("b", "int8", "eager", False, 500, 0.90, 1.0, "")))  # fmt: skip
    assert names(remaining(frame, Limits(score_lost=0.01, size_bytes=1000))) == ["a", "b"]


def test_families_of_techniques_are_kept():
    kept = remaining(FRAME, Limits(techniques=frozenset({"int8 static", "no technique"})))
    assert names(kept) == ["fp32", "fp32, onnxruntime", "fp32, compiled", "int8 static",
                           "int8 per tensor"]  # fmt: skip


def test_a_loss_of_a_metric_that_is_better_when_lower():
    frame = frames.bits_frame()
    assert score_lost(frame).round(6).tolist() == [0, 0.01, 0.26]
    assert names(remaining(frame, Limits(score_lost=0.02))) == ["fp32", "int8 dynamic"]


@pytest.mark.parametrize(
    ("objective", "name"),
    [("fastest", "int8 per tensor"), ("smallest", "2 bits"), ("most accurate", "fp32")],
)
def test_the_winner_is_best_at_the_objective(objective, name):
    assert winner(remaining(FRAME, Limits()), objective)["name"] == name


def test_the_most_accurate_has_the_fewest_bits_per_character():
    assert winner(frames.bits_frame()[1:], "most accurate")["name"] == "int8 dynamic"


def test_a_simulated_candidate_is_never_the_fastest():
    frame = frames.frame()
    frame.loc[frame["name"] == "2 bits", "latency_ms"] = 0.001
    assert winner(frame, "fastest")["name"] == "int8 per tensor"
    assert winner(frame[frame["simulated"]], "fastest") is None


def test_nothing_has_no_winner():
    assert all(winner(FRAME[:0], objective) is None for objective in OBJECTIVES)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective is 'cheapest'; choose one of fastest"):
        winner(FRAME, "cheapest")


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(size_bytes=1e5), "size_bytes"),
        (Limits(size_bytes=8e5, score_lost=0.0), "score_lost"),
        (Limits(techniques=frozenset()), "techniques"),
        (Limits(techniques=frozenset({"k-bit weights"}), simulated=False), "techniques"),
        (Limits(techniques=frozenset(), size_bytes=1e5), None),
    ],
)
def test_the_tightest_limit_is_the_one_that_keeps_most_out(limits, field):
    assert remaining(FRAME, limits).empty
    assert tightest(FRAME, limits) == field


@pytest.fixture
def panel():
    return Tradeoff(FRAME)


def set_label(slider, label):
    slider.value = dict(slider.options)[label]


def test_the_panel_starts_with_everything_and_names_the_fastest(panel):
    assert panel.limits == Limits()
    assert (
        "<b>int8 per tensor</b>: 722 kB, accuracy 93.3%, 0.73 ms, 5.6 times faster"
        in panel.answer.value
    )
    assert "7 of 8 remain" in panel.answer.value


def test_moving_a_slider_changes_what_remains_the_answer_and_the_picture(panel):
    picture = panel.picture.value
    set_label(panel.lost, "0.1 points")
    assert names(panel.remaining) == ["fp32", "fp32, onnxruntime", "fp32, compiled", "int8 static"]
    assert "<b>int8 static</b>" in panel.answer.value
    assert panel.picture.value != picture


def test_limits_of_size_are_round_and_the_last_lets_all_through(panel):
    labels = [label for label, _ in panel.size.options]
    assert labels[:3] == ["300 kB", "500 kB", "700 kB"]
    assert panel.size.options[-1] == ("any size", math.inf)
    set_label(panel.size, "300 kB")
    assert names(panel.remaining) == ["2 bits"]


def test_a_box_takes_its_technique_out(panel):
    panel.techniques["int8 static"].value = False
    assert panel.winner["name"] == "fp32, onnxruntime"


def test_simulated_candidates_can_be_left_out(panel):
    panel.objective.value = "smallest"
    assert panel.winner["name"] == "2 bits"
    assert "4.3 ms, simulated (no measurable difference)." in panel.answer.value
    panel.simulated.value = False
    assert panel.winner["name"] == "int8 per tensor"


def test_the_panel_says_which_limit_to_loosen(panel):
    set_label(panel.size, "500 kB")
    set_label(panel.lost, "0 points")
    assert "Nothing fits: loosen the size, now at most 500 kB." in panel.answer.value


def test_the_panel_says_that_simulated_ones_are_not_fast(panel):
    set_label(panel.size, "500 kB")
    assert "None of the 2 that remain can be the fastest" in panel.answer.value


def test_the_answer_is_announced_and_names_are_escaped():
    frame = frames.frame()
    frame.loc[0, "name"] = "<script>"
    frame.loc[0, "latency_ms"] = 0.1
    answer = Tradeoff(frame).answer.value
    assert 'aria-live="polite"' in answer
    assert "<b>&lt;script&gt;</b>" in answer


def test_every_control_has_a_description_and_waits_for_the_mouse_to_rest(panel):
    controls = [panel.objective, panel.size, panel.lost, panel.simulated]
    assert all(control.description for control in (*controls, *panel.techniques.values()))
    assert not panel.size.continuous_update
    assert not panel.lost.continuous_update


def test_what_the_panel_prints_is_the_same_in_every_run(panel):
    assert repr(panel) == "Tradeoff(8 candidates)"


def test_the_panel_needs_six_columns_only():
    frame = FRAME[["name", "technique", "simulated", "size_bytes", "score", "latency_ms"]]
    panel = Tradeoff(frame)
    assert panel.winner["name"] == "int8 per tensor"
    panel.objective.value = "smallest"
    assert "4.3 ms, simulated." in panel.answer.value
    with pytest.raises(ValueError, match="no column score"):
        Tradeoff(frame.drop(columns="score"))


def test_a_lower_is_better_metric_is_limited_in_its_own_unit():
    panel = Tradeoff(frames.bits_frame())
    assert [label for label, _ in panel.lost.options][:3] == ["0", "0.01", "0.02"]


def test_without_a_baseline_no_loss_can_be_asked_for():
    panel = Tradeoff(FRAME[1:])
    assert panel.lost.options == (("any loss", math.inf),)
    assert panel.winner["name"] == "int8 per tensor"


def explorer(**settings) -> tuple[Explorer, list[dict]]:
    """A panel, and the settings of every picture it asked for."""
    asked = []

    def draw(**chosen):
        asked.append(chosen)
        return plots.Picture(2 + len(asked), 2), f"chose <{chosen}>"

    return Explorer(draw, **settings), asked


def test_explorer_draws_once_at_first_and_once_for_each_change():
    panel, asked = explorer(sparsity=[0.5, 0.9], order={"first": "a", "second": "b"})
    before = bytes(panel.picture.value)
    panel.controls["sparsity"].value = 0.9
    panel.controls["order"].value = "b"
    assert asked == [
        {"sparsity": 0.5, "order": "a"},
        {"sparsity": 0.9, "order": "a"},
        {"sparsity": 0.9, "order": "b"},
    ]
    assert bytes(panel.picture.value).startswith(b"\x89PNG")
    assert bytes(panel.picture.value) != before


def test_explorer_has_a_slider_for_numbers_a_list_for_texts_and_names_for_both():
    panel, _ = explorer(sparsity=[0.5, 0.9], first_step={"Prune": "p"})
    kinds = {name: type(control).__name__ for name, control in panel.controls.items()}
    assert kinds == {"sparsity": "SelectionSlider", "first_step": "Dropdown"}
    assert [c.description for c in panel.controls.values()] == ["Sparsity", "First step"]
    assert not panel.controls["sparsity"].continuous_update


def test_explorer_announces_its_line_as_text():
    panel, _ = explorer(bits=[2])
    assert 'role="status"' in panel.answer.value
    assert "&lt;{&#x27;bits&#x27;: 2}&gt;" in panel.answer.value


@pytest.mark.parametrize("settings", [{}, {"bits": []}])
def test_explorer_needs_choices(settings):
    with pytest.raises(ValueError, match="give each at least one choice"):
        explorer(**settings)
