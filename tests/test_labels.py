"""Names beside points: nothing is covered, and what has no room is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from workbench.explore.labels import Label, place


@pytest.fixture(scope="module")
def axes():
    figure = Figure(figsize=(5, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    return axes


@pytest.fixture(autouse=True)
def clean(axes):
    for text in list(axes.texts):
        text.remove()


def boxes(axes):
    renderer = axes.figure.canvas.get_renderer()
    for text in axes.texts:
        text.update_positions(renderer)
        yield Text.get_window_extent(text, renderer)


places = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=15)


@given(places)
@settings(max_examples=15)
def test_placed_names_cover_neither_points_nor_each_other_nor_leave_the_axes(axes, points):
    for text in list(axes.texts):
        text.remove()
    left_out = place(axes, [Label(x, y, f"candidate {i}") for i, (x, y) in enumerate(points)])
    found = list(boxes(axes))
    assert len(found) + len(left_out) == len(points)
    inside = axes.get_window_extent()
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:i])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)
        assert inside.x0 <= box.x0 + 1
        assert box.x1 - 1 <= inside.x1


def test_the_first_label_is_served_first(axes):
    wide = "a name that only fits in one row"
    crowd = [Label(0.5, 0.5, f"{wide} {i}") for i in range(20)]
    left_out = place(axes, crowd)
    assert left_out
    assert crowd[0].text not in left_out


def test_a_bar_is_covered_only_when_there_is_no_other_place(axes):
    place(axes, [Label(0.5, 0.5, "here")], bars=[Bbox([[0.5, 0.5], [0.9, 0.5]])])
    (box,) = boxes(axes)
    assert not box.overlaps(Bbox(axes.transData.transform([[0.5, 0.5], [0.9, 0.5]])))


def test_a_dollar_is_a_dollar(axes):
    place(axes, [Label(0.5, 0.5, "$5 or $6")])
    assert not axes.texts[0].get_parse_math()
    axes.figure.draw_without_rendering()
