"""The pictures, checked by the data and the artists behind them."""

import copy
import itertools
import math

import frames
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from torch import nn

from workbench import compress, data, models, storage
from workbench.explore import plots
from workbench.storage.ledger import KIND_COLUMNS


def texts_of(axes):
    """The names written beside points."""
    return [text.get_text() for text in axes.texts]


def legend_of(picture):
    return [text.get_text() for text in picture.legends[0].get_texts()]


@pytest.fixture(scope="module")
def picture():
    return plots.tradeoff(frames.frame())


def points(sizes, scores, *, higher_is_better=True, simulated=False):
    names = [str(i) for i in range(len(sizes))]
    return pd.DataFrame(
        {"name": names, "technique": "none", "simulated": simulated, "size_bytes": sizes,
         "score": scores, "latency_ms": sizes, "higher_is_better": higher_is_better}
    )  # fmt: skip


coordinates = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@given(coordinates, st.booleans())
def test_front_is_what_no_other_candidate_beats(pairs, higher_is_better):
    sizes, scores = zip(*pairs, strict=True)
    frame = points(sizes, scores, higher_is_better=higher_is_better)
    sign = 1 if higher_is_better else -1

    def beaten(i):
        return any(
            sizes[j] <= sizes[i]
            and sign * scores[j] >= sign * scores[i]
            and (sizes[j], scores[j]) != (sizes[i], scores[i])
            for j in range(len(sizes))
        )

    front = plots.pareto_front(frame)
    assert set(front) == {str(i) for i in range(len(sizes)) if not beaten(i)}
    assert [sizes[int(name)] for name in front] == sorted(sizes[int(name)] for name in front)


def test_front_leaves_out_what_was_not_measured():
    frame = points([1, 2, math.nan], [0.9, math.nan, 0.99])
    assert plots.pareto_front(frame) == ["0"]


def test_a_simulated_candidate_is_on_the_front_of_size_but_never_of_latency():
    frame = points([1, 2], [0.9, 0.8], simulated=[True, False])
    assert plots.pareto_front(frame, "size_bytes") == ["0"]
    assert plots.pareto_front(frame, "latency_ms") == ["1"]


def test_tradeoff_draws_every_measured_candidate_in_both_panels(picture):
    for axes in picture.axes:
        drawn = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        assert sum(len(line.get_xdata()) for line in drawn) == 7


def test_tradeoff_names_every_candidate_that_has_room(picture):
    for axes in picture.axes:
        assert sorted(texts_of(axes)) == sorted(row[0] for row in frames.ROWS[:7])


def test_names_cover_neither_each_other_nor_points(picture):
    renderer = picture.canvas.get_renderer()
    for axes in picture.axes:
        boxes = [text_box(text, renderer) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        markers = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        for line in markers:
            for x, y in axes.transData.transform(line.get_xydata()):
                assert not any(box.contains(x, y) for box in boxes)


def text_box(annotation, renderer):
    """The box of an annotation's text, without its leader line."""
    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def test_failed_candidate_is_told_below_and_not_drawn(picture):
    assert picture.get_supxlabel() == "Not shown, could not be measured: broken"
    assert "int8 dynamic" not in legend_of(picture)


def test_simulated_candidates_are_hollow_and_the_legend_says_so(picture):
    axes = picture.axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert sorted(x for line in hollow for x in line.get_xdata()) == [201.304, 372.416]
    assert "hollow: simulated" in legend_of(picture)
    real = frames.frame(frames.ROWS[:3])
    assert "hollow: simulated" not in legend_of(plots.tradeoff(real))


def test_techniques_differ_in_marker_and_colour():
    rows = [(str(i), f"technique {'abcdefgh'[i]}", "eager", False, 1000.0 + i, 0.9, 1.0, "")
            for i in range(8)]  # fmt: skip
    lines = plots.tradeoff(frames.frame(rows)).axes[0].lines
    looks = {(line.get_color(), line.get_marker()) for line in lines if line.get_marker() in "o"
             or line.get_marker() in plots.MARKERS}  # fmt: skip
    assert len(looks) == 8


def test_baseline_is_drawn_where_the_verdict_says():
    frame = frames.frame()
    frame["verdict"] = ["1.0", "baseline", *[""] * 6]
    lines = [line for line in plots.tradeoff(frame).axes[1].lines if line.get_linestyle() == "--"]
    assert lines[1].get_xdata()[0] == frame["latency_ms"][1]


def test_score_axis_says_what_is_better_and_in_which_unit(picture):
    assert picture.axes[0].get_ylabel() == "accuracy (%)"
    label = plots.tradeoff(frames.bits_frame()).axes[0].get_ylabel()
    assert label == "bits per character (lower is better)"


def test_axis_is_logarithmic_only_where_the_range_is_wide(picture):
    size, latency = picture.axes
    assert (size.get_xscale(), latency.get_xscale()) == ("log", "linear")


def test_axes_stay_where_they_are_whatever_is_kept(picture):
    some = plots.tradeoff(frames.frame(), keep=["fp32"], winner="fp32")
    for a, b in zip(picture.axes, some.axes, strict=True):
        assert a.get_xlim() == b.get_xlim()
        assert a.get_ylim() == b.get_ylim()


def test_what_is_not_kept_is_grey_and_without_a_name():
    axes = plots.tradeoff(frames.frame(), keep=["fp32", "4 bits"]).axes[0]
    assert sorted(texts_of(axes)) == ["4 bits", "fp32"]
    faint = [line for line in axes.lines if line.get_marker() in ("o", "s", "^")
             and line.get_color() == plots.FAINT]  # fmt: skip
    assert sum(len(line.get_xdata()) for line in faint) == 5


@pytest.mark.parametrize("count", [80, 81])
def test_a_crowd_is_drawn_small_without_bars_and_names_only_the_best(count):
    rows = [("base", *frames.ROWS[0][1:])]
    rows += [(f"c{i}", *frames.ROWS[3][1:4], 5e5 + 1e4 * i, 0.90 - 1e-4 * i, 1.0, "")
             for i in range(count - 1)]  # fmt: skip
    axes = plots.tradeoff(frames.frame(rows), winner="c0").axes[0]
    points = [line for line in axes.lines if line.get_marker() == "s"]
    bars = [line for line in axes.lines if line.get_alpha() == 0.7]
    crowded = count > 80
    assert sum(len(line.get_xdata()) for line in points) == count - 1
    assert {line.get_markersize() for line in points} == {4.0 if crowded else 8.0}
    assert bool(bars) != crowded
    if crowded:
        assert sorted(texts_of(axes)) == ["base", "c0"]


def test_tradeoff_without_any_latency_is_one_panel():
    frame = frames.frame().assign(latency_ms=math.nan)
    (axes,) = plots.tradeoff(frame, winner="4 bits").axes
    assert "size" in axes.get_xlabel()


def test_a_callable_without_a_size_is_shown_by_its_latency():
    frame = frames.frame(frames.ROWS[:3])
    frame.loc[2, "size_bytes"] = math.nan
    size, latency = plots.tradeoff(frame).axes
    assert "fp32, compiled" not in texts_of(size)
    assert "fp32, compiled" in texts_of(latency)


def test_tradeoff_of_only_the_needed_columns():
    frame = frames.frame()[list(plots.NEEDED)]
    assert plots.tradeoff(frame).png().startswith(b"\x89PNG")


def test_tradeoff_says_which_column_is_missing():
    with pytest.raises(ValueError, match="no column score, latency_ms; it has name"):
        plots.tradeoff(frames.frame().drop(columns=["score", "latency_ms"]))


def test_tradeoff_refuses_a_frame_with_nothing_measured():
    with pytest.raises(ValueError, match="no candidate of the frame has a score"):
        plots.tradeoff(frames.frame()[7:])
    with pytest.raises(ValueError, match="no rows"):
        plots.tradeoff(frames.frame()[:0])


def test_pictures_leave_pyplot_and_its_settings_alone():
    before = dict(plt.rcParams)
    picture = plots.tradeoff(frames.frame())
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before
    assert picture._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("technique", "family"),
    [("none", "no technique"), ("int8 static per tensor", "int8 static"),
     ("4-bit per group of 64, affine weights", "k-bit weights"),
     ("int8 dynamic per channel: nothing quantized", "int8 dynamic"),
     ("prune(sparsity=0.9) + 2-bit per tensor weights", "prune + k-bit weights")],
)  # fmt: skip
def test_family_is_the_technique_without_its_settings(technique, family):
    assert plots.family(technique) == family


def test_weights_show_each_level_and_how_many_weights_have_it():
    before = torch.linspace(-1, 1, 200).reshape(2, 100)
    after = (before * 2).round() / 2  # five levels
    picture = plots.weights(before, after)
    levels, counts = picture.axes[1].lines[0].get_data()
    expected = after.unique(return_counts=True)
    np.testing.assert_array_equal(levels, expected[0])
    np.testing.assert_array_equal(counts, expected[1])
    assert picture.axes[0].patches  # 200 different values: a histogram


def test_weights_of_a_layer_by_name_and_by_default_the_largest():
    model = models.build("lenet-5")
    assert plots.weights(model).axes[-1].get_xlabel() == "value of a weight in layer 7"
    assert sum(bar.get_height() for bar in plots.weights(model, layer="0").axes[0].patches) == 500


def test_weights_names_the_layers_when_there_is_no_such_one():
    with pytest.raises(ValueError, match=r"layer is 'nine'; this model has 0.weight"):
        plots.weights(models.build("lenet-5"), layer="nine")
    with pytest.raises(ValueError, match="no weight of two or more dimensions"):
        plots.weights(nn.Flatten())


class Answers(nn.Module):
    """Answers the class that its table gives for the first input value."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return nn.functional.one_hot(self.table[x.flatten(1)[:, 0].long()], 3).float()


@pytest.fixture
def changed():
    """Six images whose answers go right, wrong, to another wrong one, or stay."""
    x = torch.arange(6.0)[:, None, None, None].expand(6, 1, 4, 4).contiguous()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    task = data.task((x, y), (x, y), validation=(x, y), labels=("a", "b", "c"))
    return (
        task,
        Answers(torch.tensor([0, 1, 0, 1, 1, 2])),
        Answers(torch.tensor([0, 2, 2, 2, 1, 2])),
    )


def test_answer_changes_are_sorted_into_kinds(changed):
    frame = plots.answer_changes(*changed)
    assert frame.to_dict("list") == {
        "index": [1, 2, 3],
        "target": ["b", "c", "a"],
        "before": ["b", "a", "b"],
        "after": ["c", "c", "c"],
        "kind": ["broken", "fixed", "other"],
    }


def test_indices_go_on_through_the_batches(changed):
    task, before, after = changed
    x, y = (torch.cat([part] * 200) for part in task.test.source.tensors)
    many = data.task((x, y), (x, y), validation=(x, y))
    frame = plots.answer_changes(many, before, after)
    assert frame["index"].tolist() == [6 * i + j for i in range(200) for j in (1, 2, 3)]


def test_a_model_has_no_answer_that_differs_from_its_own(changed):
    task, before, _ = changed
    assert plots.answer_changes(task, before, copy.deepcopy(before)).empty
    assert plots.confusion_change(task, before, before).png()


def test_confusion_change_counts_each_pair_of_answers(changed):
    picture = plots.confusion_change(*changed)
    matrix, summary = picture.axes[:2]
    cells = {text.get_position(): text.get_text() for text in matrix.texts}
    assert cells == {(2, 0): "1", (2, 1): "2"}  # a -> c once, b -> c twice
    assert [bar.get_width() for bar in summary.patches] == [1, 1, 1]
    assert summary.get_title(loc="left") == "3 changed, net +0 right"


def test_confusion_change_shows_the_images_that_broke(changed):
    shown = [axes for axes in plots.confusion_change(*changed).axes[2:] if axes.images]
    assert [axes.get_title() for axes in shown] == ["b\n→ c"]


def test_answers_of_a_sequence_model_are_refused():
    x = torch.zeros(4, 5)
    task = data.task((x, x.long()), (x, x.long()), validation=(x, x.long()))
    with pytest.raises(ValueError, match=r"one class per example: \(batch, classes\)"):
        plots.answer_changes(task, lambda x: torch.zeros(len(x), 5, 3), lambda x: x)


def test_curve_draws_one_line_with_bars_for_each_group():
    rows = [{"bits": bits, "score": 0.1 * bits, "score_low": 0.09 * bits, "score_high": 0.11 * bits,
             "by": by} for by in ("tensor", "channel") for bits in (8, 4, 2)]  # fmt: skip
    picture = plots.curve(pd.DataFrame(rows), "bits", by="by", references={"chance": 0.1})
    axes = picture.axes[0]
    assert len(axes.containers) == 2
    assert axes.containers[0].lines[0].get_xdata().tolist() == [2, 4, 8]
    low = axes.containers[0].lines[2][0].get_segments()[0][0][1]
    assert low == pytest.approx(0.18)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["tensor", "channel", "chance"]


def test_curve_says_which_column_is_missing():
    with pytest.raises(ValueError, match="no column bits"):
        plots.curve(frames.frame(), "bits")


def test_intervals_are_found_beside_their_column():
    assert plots.interval_columns("latency_ms") == ("latency_low_ms", "latency_high_ms")
    assert plots.interval_columns("speedup") == ("speedup_low", "speedup_high")


def levels() -> pd.DataFrame:
    rows = [(layer, bits, 10.0 / bits - 2) for layer in ("first", "second") for bits in (2, 4, 8)]
    return pd.DataFrame(rows, columns=["layer", "bits", "lost"])


def test_heatmap_numbers_every_cell_in_the_order_of_the_frame():
    frame = levels().iloc[::-1]
    axes = plots.heatmap(frame, "bits", "layer", "lost", middle=0).axes[0]
    assert [text.get_text() for text in axes.texts] == ["-0.8", "0.5", "3.0"] * 2
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["second", "first"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "4", "2"]
    low, high = axes.images[0].get_clim()
    assert low == -high  # so that the middle has the middle colour


def test_heatmap_leaves_unknown_cells_empty_and_refuses_double_ones():
    axes = plots.heatmap(levels().iloc[1:], "bits", "layer", "lost").axes[0]
    assert len(axes.texts) == 5
    with pytest.raises(ValueError, match="average them first"):
        plots.heatmap(pd.concat([levels(), levels()]), "bits", "layer", "lost")


@pytest.mark.parametrize(("higher", "top"), [(True, "a"), (False, "b")])
def test_ranked_has_the_best_at_the_top(higher, top):
    frame = pd.DataFrame({"order": ["a", "b"], "score": [0.9, 0.8], "higher_is_better": higher})
    axes = plots.ranked(frame.assign(score_low=0.79, score_high=0.91), "order").axes[0]
    assert axes.get_yticklabels()[-1].get_text() == top
    assert len(axes.collections) == 2  # one bar for each interval


def test_ranked_is_told_of_other_values_which_is_the_best():
    frame = pd.DataFrame({"file": ["a", "b"], "seconds": [2.0, 1.0]})
    for lower, top in ((True, "b"), (False, "a")):
        axes = plots.ranked(frame, "file", value="seconds", lower_is_better=lower).axes[0]
        assert axes.get_yticklabels()[-1].get_text() == top
    axes = plots.ranked(frame.assign(higher_is_better=False), "file", value="seconds").axes[0]
    assert axes.get_yticklabels()[-1].get_text() == "b"
    with pytest.raises(ValueError, match="lower_is_better=True or False: which 'seconds'"):
        plots.ranked(frame, "file", value="seconds")


def test_ranked_points_out_one_row():
    frame = pd.DataFrame({"order": ["a", "b", "c"], "score": [0.9, 0.8, 0.7]})
    lines = plots.ranked(frame, "order", mark="b").axes[0].lines
    assert [line.get_marker() for line in lines] == ["o", "D", "o"]


def test_cut_shows_what_goes_and_where_it_stands_on_the_curve():
    weight = torch.tensor([-4.0, -1.0, 2.0, 3.0])
    curve = pd.DataFrame({"sparsity": [0, 0.5, 1], "score": [0.9, 0.8, 0.1]})
    left, right = plots.cut(weight, curve, 0.5).axes
    gone = sum(patch.get_height() for patch in left.containers[0])
    kept = sum(patch.get_height() for patch in left.containers[1])
    assert (gone, kept) == (2, 2)
    assert [line.get_xdata()[0] for line in left.lines] == [-2, 2]
    assert right.lines[-1].get_xdata()[0] == 0.5


@pytest.mark.parametrize("sparsity", [0, 1])
def test_cut_at_both_ends(sparsity):
    weight = torch.tensor([-2.0, 0.0, 1.0])
    curve = pd.DataFrame({"sparsity": [0, 1], "score": [0.9, 0.1]})
    left, _ = plots.cut(weight, curve, sparsity).axes
    assert sum(patch.get_height() for patch in left.containers[0]) == 3 * sparsity


def test_cut_refuses_a_share_that_is_none():
    with pytest.raises(ValueError, match="give a share from 0 to 1"):
        plots.cut(torch.ones(2), pd.DataFrame({"sparsity": [0], "score": [1]}), 1.5)


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    model = compress.share_weights(models.pretrained("lenet-300-100"), clusters=8)
    path = tmp_path_factory.mktemp("ledger") / "model.safetensors"
    return storage.save(model, path, codec="huffman", progress=False)


def test_ledger_bars_hold_every_byte(account):
    bars = plots.ledger_bars(account)
    assert bars["size_bytes"].sum() == account.size_bytes
    kinds = account.by_kind()
    for kind, column in KIND_COLUMNS.items():
        assert bars[column].sum() == kinds[kind]
    assert bars["tensor"].tolist() == ["1.weight", "3.weight", "1.bias", "4 smaller ones"]
    assert bars["size_bytes"][:-1].is_monotonic_decreasing
    few = plots.ledger_bars(account, most=1)
    assert few["size_bytes"].tolist() == [
        bars["size_bytes"][0], account.size_bytes - bars["size_bytes"][0]
    ]  # fmt: skip
    rows = account.frame.set_index("tensor")
    entropy = rows.loc["1.weight"]["entropy_bits"] * 235_200 / 8
    assert bars["entropy_bytes"][0] == pytest.approx(entropy)
    assert bars["label"][0] == (
        f"{rows.loc['1.weight']['size_bytes']:,} B, {rows.loc['1.weight']['bits_per_weight']:.3g} "
        "bits a weight"
    )


def test_ledger_draws_the_bars_and_the_bound(account):
    (axes,) = plots.ledger(account).axes
    bars = plots.ledger_bars(account)
    ends = dict.fromkeys(bars.index, 0.0)
    for patch in axes.patches:  # each part begins where the one before it ends
        row = round(patch.get_y() + patch.get_height() / 2)
        assert patch.get_x() == pytest.approx(ends[row])
        ends[row] += patch.get_width()
    assert ends == pytest.approx((bars["size_bytes"] / 1000).to_dict())
    (bound,) = axes.lines
    assert list(bound.get_xdata()) == pytest.approx(list(bars["entropy_bytes"] / 1000))
    assert axes.get_xlabel() == "size in the file (kB)"
    assert [label.get_text() for label in axes.get_yticklabels()] == bars["tensor"].tolist()
    assert axes.get_title(loc="left").startswith(f"{account.size_bytes:,} bytes")
    assert texts_of(axes) == bars["label"].tolist()
    names = legend_of(plots.ledger(account))
    assert {"values", "codebook", "header", "entropy of the values"} <= set(names)
    assert "positions" not in names


def test_a_ledger_without_entropy_has_no_bound(account, tmp_path):
    path = tmp_path / "plain.safetensors"
    models.save(models.build("lenet-300-100"), path)
    (axes,) = plots.ledger(storage.inspect(path)).axes
    assert not axes.lines
    assert axes.get_xlabel() == "size in the file (kB)"


def test_an_empty_ledger_is_refused(account):
    with pytest.raises(ValueError, match="no rows"):
        plots.ledger(storage.Ledger(account.frame[:0]))


counted = st.dictionaries(st.integers(), st.integers(0, 1000), min_size=2, max_size=16)


@given(counted.filter(lambda counts: sum(count > 0 for count in counts.values()) > 1))
def test_code_words_are_a_shortest_prefix_code(counts):
    words = plots.code_words(counts)
    codes = words["code"].tolist()
    assert all(not b.startswith(a) for a, b in itertools.permutations(codes, 2))
    assert sum(2.0 ** -len(code) for code in codes) == 1
    used = sorted(count for count in counts.values() if count > 0)
    total = sum(used)
    cost = 0
    while len(used) > 1:  # as Huffman did it
        pair, used = used[:2], used[2:]
        cost += sum(pair)
        used = sorted([*used, sum(pair)])
    mean = (words["share"] * words["code"].str.len()).sum()
    assert mean == pytest.approx(cost / total)
    assert words["share"].sum() == pytest.approx(1)


def test_code_words_of_data():
    assert dict(zip(*plots.code_words("aab")[["symbol", "code"]].to_numpy().T, strict=True)) == {
        "a": "0", "b": "1"
    }  # fmt: skip
    tensor = torch.tensor([[0.5, 0.5], [0.5, -1.0]])
    assert plots.code_words(tensor)["symbol"].tolist() == [0.5, -1.0]
    assert plots.code_words({"x": 1, "never": 0, "y": 3})["symbol"].tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ("aaa", "1 different symbols occur; .* 2 to 16"),
        (range(17), "17 different symbols"),
        ({"a": 1, "b": -1}, r"counts are \[1, -1\]"),
        ({"a": 1, "b": math.nan}, "give 0 or more"),
    ],
)
def test_symbols_that_make_no_tree(symbols, message):
    with pytest.raises(ValueError, match=message):
        plots.code_tree(symbols)


def test_code_tree_leads_to_each_symbol_by_its_code():
    counts = {"a": 8, "b": 4, "c": 2, "d": 2}
    tree, table = plots.code_tree(counts).axes
    leaves = [line for line in tree.lines if line.get_marker() == "s"]
    assert [(leaf.get_xdata()[0], leaf.get_ydata()[0]) for leaf in leaves] == [
        (1, 0), (2, 1), (3, 2), (3, 3)
    ]  # fmt: skip
    assert [text.get_text() for text in table.texts[3:]] == [
        "a", "50 %", "0", "b", "25 %", "10", "c", "12.5 %", "110", "d", "12.5 %", "111"
    ]  # fmt: skip
    assert sorted(text.get_text() for text in tree.texts) == ["0"] * 3 + ["1"] * 3
    title = plots.code_tree(counts)._suptitle.get_text()
    assert title == "1.750 bits a symbol on average; the entropy is 1.750"


def bowl(x, y):
    return (x - 1) ** 2 + 4 * (y + 1) ** 2


def walks_of(*ends):
    return {f"to {end}": torch.linspace(0, end, 21)[:, None] * torch.tensor([1.0, -1.0])
            for end in ends}  # fmt: skip


def test_paths_gives_each_walk_a_panel_with_its_points():
    walks = walks_of(0.5, 1.0, 2.0, 3.0, 7.0)
    picture = plots.paths(bowl, walks, x=(-1, 5), y=(-5, 1), every=8)
    panels = [axes for axes in picture.axes if axes.axison]
    assert len(panels) == len(walks)
    assert len({axes.get_position().y0 for axes in panels}) == 2  # four panels to a row
    for axes, walk in zip(panels, walks.values(), strict=True):
        path, dots, lowest, start, end = (line.get_xydata() for line in axes.lines)
        assert np.array_equal(path, walk)
        assert np.array_equal(dots, walk[[8, 16]])
        assert np.allclose(lowest, [[1, -1]], atol=0.02)
        assert (start.tolist(), end.tolist()) == ([walk[0].tolist()], [walk[-1].tolist()])
        assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 5), (-5, 1))
        assert any(label.get_visible() for label in axes.get_yticklabels()) == (
            axes.get_subplotspec().is_first_col()
        )


def test_paths_says_how_high_each_walk_ends():
    picture = plots.paths(bowl, walks_of(1.0, 3.0), x=(-1, 5), y=(-5, 1), every=7)
    titles = [axes.get_title(loc="left") for axes in picture.axes]
    assert titles == ["to 1.0: 0", "to 3.0: 20"]
    assert legend_of(picture)[1] == "every 7 steps"


def test_paths_draws_contours_a_factor_of_ten_apart():
    axes = plots.paths(bowl, walks_of(1.0), x=(-1, 5), y=(-5, 1)).axes[0]
    (contour,) = axes.collections
    assert contour.levels.tolist() == [-3, -2, -1, 0, 1]
    above_one = np.concatenate([part.vertices for part in contour.get_paths()[3:4]])
    assert bowl(*torch.tensor(above_one.T)).numpy() == pytest.approx(1, rel=0.02)


def test_paths_labels_x_below_the_last_panel_of_each_column():
    panels = plots.paths(bowl, walks_of(1, 2, 3, 4, 5), x=(-1, 5), y=(-5, 1)).axes[:5]
    labelled = [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels]
    assert labelled == [False, True, True, True, True]


def test_paths_of_a_walk_that_diverged():
    walk = torch.tensor([[0.0, 0.0], [1e200, -1e200], [math.inf, math.nan]])
    picture = plots.paths(bowl, {"lost": walk}, x=(-1, 5), y=(-5, 1))
    assert picture.axes[0].get_title(loc="left") == "lost: nan"
    assert picture.png()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"walks": {}}, "there is no walk"),
        ({"walks": {"a": torch.zeros(5, 3)}}, r"walk 'a' has shape \(5, 3\); give points as"),
        ({"walks": {"a": torch.zeros(0, 2)}}, r"walk 'a' has shape \(0, 2\)"),
        ({"x": (1, 1)}, "x runs from 1 to 1; give the lower end first"),
        ({"y": (1, -1)}, "y runs from 1 to -1"),
        ({"every": 0}, "every is 0; give 1 or more steps"),
    ],
)
def test_what_paths_cannot_draw(change, message):
    arguments = {"walks": walks_of(1.0), "x": (-1, 5), "y": (-5, 1)} | change
    with pytest.raises(ValueError, match=message):
        plots.paths(bowl, **arguments)


def test_singular_values_are_those_of_the_weight_as_a_matrix():
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 3, 2), (3, 40), (5, 5)):
        weight = torch.randn(shape, generator=generator)
        expected = torch.linalg.svdvals(weight.flatten(1).double()).numpy()
        np.testing.assert_allclose(plots.singular_values(weight), expected, atol=1e-9)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.floats(0.01, 1))
def test_rank_for_is_the_least_number_of_directions(values, energy):
    values = np.sort(values)[::-1]
    rank, total = plots.rank_for(values, energy), np.square(values).sum()
    assert np.square(values[:rank]).sum() >= energy * total * (1 - 1e-9)
    assert np.square(values[: rank - 1]).sum() < energy * total or rank == 1


@pytest.fixture(scope="module")
def looked_at():
    """A model, its layers' shares, and how much each loses."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.ConvTranspose1d(4, 6, 1))
    shares = {"layer": ["0", "2"], "byte_share": [0.6, 0.4], "mac_share": [0.2, 0.8]}
    rows = [("0", 2, 0.3), ("0", 8, 0.0), ("2", 2, 0.1), ("2", 8, 0.0)]
    lost = pd.DataFrame(rows, columns=["layer", "level", "drop"]).assign(score=0.8)
    return model, pd.DataFrame(shares), lost


def test_layer_points_out_the_chosen_one_among_all(looked_at):
    model, *_ = looked_at
    spread, spectrum, loss, shares = plots.layer(*looked_at[:1], "2", *looked_at[1:]).axes
    assert spread.get_title(loc="left").endswith("24 different values")
    assert spectrum.lines[0].get_ydata() == pytest.approx(
        torch.linalg.svdvals(model[2].weight.detach().transpose(0, 1).flatten(1)).numpy(), abs=1e-5
    )
    marked = [line for line in loss.lines if line.get_color() == plots.COLOURS[1]]
    assert [list(line.get_ydata()) for line in marked] == [[0.1, 0.0]]
    grey, chosen = shares.lines
    assert (list(grey.get_xdata()), list(grey.get_ydata())) == ([0.2], [0.6])
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([0.8], [0.4])


def test_layer_names_the_layers_when_there_is_no_such_one(looked_at):
    model, shares, lost = looked_at
    with pytest.raises(ValueError, match="layer is '1'; the table has 0, 2"):
        plots.layer(model, "1", shares, lost)
