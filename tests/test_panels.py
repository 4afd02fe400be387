"""The panels, driven without a kernel, and the pure functions behind them."""

import asyncio
import math
from functools import partial

import frames
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workbench import compress, data, models, storage, training
from workbench.compress import FineTune, Prune, QuantizeDynamic, QuantizeWeights, Recipe
from workbench.explore import difference, panels, plots
from workbench.explore.code import code_of
from workbench.explore.limits import (
    OBJECTIVES,
    Limits,
    remaining,
    score_lost,
    tightest,
    winner,
)
from workbench.explore.panels import (
    Explorer,
    Tradeoff,
    attempt,
    layer_table,
    layer_view,
    playground,
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


def test_rows_may_lack_the_verdict_that_others_have():
    frame = pd.concat([FRAME[:4], FRAME[4:5].drop(columns="verdict")], ignore_index=True)
    assert "<b>int8 per tensor</b>: 722 kB, accuracy 93.3%, 0.73 ms. 5 of 5" in (
        Tradeoff(frame).answer.value
    )


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


def test_choices_can_depend_on_the_setting_before():
    levels = {"bits": {"8 bits": 8, "4 bits": 4}, "sparsity": {"half": 0.5}}
    panel, asked = explorer(technique=["bits", "sparsity"], level=lambda t: levels[t])
    panel.controls["level"].value = 4
    panel.controls["technique"].value = "sparsity"
    assert type(panel.controls["level"]).__name__ == "SelectionSlider"
    assert panel.settings == {"technique": "sparsity", "level": 0.5}
    drawn = [(settings["technique"], settings["level"]) for settings in asked]
    assert dict.fromkeys(drawn) == dict.fromkeys([("bits", 8), ("bits", 4), ("sparsity", 0.5)])


def test_fifty_moves_in_a_browser_are_drawn_once_they_rest(monkeypatch):
    panel, asked = explorer(bits=list(range(60)))

    async def move():
        monkeypatch.setattr(panels, "_loop_of_browser", asyncio.get_running_loop)
        monkeypatch.setattr(panels, "_REST_S", 0.05)
        for bits in range(1, 51):
            panel.controls["bits"].value = bits
            await asyncio.sleep(0.001)
        drawn = len(asked)
        await asyncio.sleep(0.5)
        return drawn

    assert asyncio.run(move()) < 10  # more than one only where the machine was held up
    assert asked[-1] == {"bits": 50}
    assert len(asked) < 10


def test_changes_made_by_a_cell_are_drawn_at_once_even_in_an_event_loop():
    async def move():
        panel, asked = explorer(bits=[2, 4])
        panel.controls["bits"].value = 4
        return asked

    assert asyncio.run(move())[-1] == {"bits": 4}


RECIPES = {
    "three bits": Recipe(QuantizeWeights(bits=3)),
    "pruned": Recipe(Prune(sparsity=0.5), QuantizeWeights(bits=4)),
}


@pytest.fixture(scope="module")
def small():
    """A network of three classes, its task, and a frame of two recipes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 6, generator=generator)
    parts = zip(x.split(300), x[:, :3].argmax(1).split(300), strict=True)
    splits = [data.Split(torch.utils.data.TensorDataset(*part)) for part in parts]
    task = data.Task("three classes", *splits, labels=("a", "b", "c"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    training.fit(model, task, epochs=5, progress=False)
    rows = [attempt(model, task, None)]
    for name, recipe in RECIPES.items():
        made = recipe(model, task, progress=False)
        score = training.evaluate(made, task, split="validation").value
        rows.append(rows[0] | {
            "name": name, "technique": " + ".join(compress.steps(made)), "simulated": True,
            "size_bytes": models.file_bytes(made), "score": score, "verdict": "",
            "recipe": recipe.to_json(),
        })  # fmt: skip
    return model, task, pd.DataFrame(rows)


def test_looking_at_a_candidate_shows_code_that_makes_its_recipe(small):
    panel = Tradeoff(small[2])
    panel.objective.value = "smallest"
    assert panel.candidate.value == panel.winner["name"] == "three bits"
    assert set(panel.candidate.options) <= set(small[2]["name"])
    assert "QuantizeWeights(bits=3)" in panel.recipe.value
    assert 'tabindex="0"' in panel.recipe.value


def test_the_list_to_look_at_is_the_front_of_what_remains(small):
    frame = small[2]
    panel = Tradeoff(frame)
    set_label(panel.size, panel.size.options[0][0])
    left = panel.remaining
    assert 0 < len(left) < len(frame)
    assert set(panel.candidate.options) == set(plots.pareto_front(left))


@pytest.mark.parametrize("given", [True, False], ids=["model given", "made by its recipe"])
def test_opening_a_candidate_shows_its_bytes_and_changed_answers(small, given, tmp_path):
    model, task, frame = small
    made = RECIPES["three bits"](model, task, progress=False)
    known = {"as it is": model} | ({"three bits": made} if given else {})
    panel = Tradeoff(frame, models=known, task=task)
    panel.candidate.value = "three bits"
    assert panel.inside.layout.display == "none"
    panel.opener.click()
    account = storage.save(made, tmp_path / "model.safetensors", codec="plain", progress=False)
    assert panel.inside.value == plots.ledger(account).png()
    found = difference(model, made, task, split="validation")
    assert repr(found).split(";")[0] in panel.opened.value
    assert not panel.opener.disabled
    panel.candidate.value = panel.candidate.options[-1]
    if panel.candidate.value != "three bits":
        assert panel.opened.value == ""
        assert panel.inside.layout.display == "none"


def test_what_cannot_be_opened_says_why(small):
    model, task, frame = small
    panel = Tradeoff(frame.drop(columns="recipe"), models={"as it is": model}, task=task)
    panel.candidate.value = "three bits"
    panel.opener.click()
    assert "three bits is not among the models and has no recipe" in panel.opened.value
    assert not panel.opener.disabled


def test_models_come_with_their_task_and_their_baseline(small):
    model, task, frame = small
    with pytest.raises(ValueError, match="both models and task"):
        Tradeoff(frame, models={"as it is": model})
    with pytest.raises(ValueError, match="the baseline, 'as it is' has to be among them"):
        Tradeoff(frame, models={"other": model}, task=task)


def test_without_recipes_and_models_there_is_nothing_to_open(panel):
    assert panel.candidate not in [
        c for row in panel.children for c in getattr(row, "children", [])
    ]
    assert len(panel.children) == 4


def test_five_thousand_candidates_are_drawn_as_a_crowd():
    generator = np.random.default_rng(0)
    count = 5000
    frame = pd.DataFrame({
        "name": [f"candidate {i}" for i in range(count)], "technique": "none", "simulated": False,
        "size_bytes": generator.uniform(1e4, 1e5, count), "score": generator.uniform(0, 1, count),
        "latency_ms": generator.uniform(1, 2, count),
    })  # fmt: skip
    panel = Tradeoff(frame)
    set_label(panel.size, "30 kB")
    assert set(panel.remaining["name"]) == set(frame["name"][frame["size_bytes"] <= 3e4])
    assert len(panel.picture.value) < 1_000_000


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        RECIPES["pruned"],
        Recipe(
            FineTune(optimizer=partial(torch.optim.SGD, lr=0.1)), QuantizeWeights(bits={"0": 2})
        ),
    ],
)
def test_code_makes_the_recipe_and_applies_it(recipe):
    names = {"model": "a model", "task": "a task"}
    lines, _, last = code_of(recipe).rpartition("\n")
    exec(lines, names)
    assert names["recipe"] == recipe
    assert last == "small = recipe(model, task)"


@pytest.fixture(scope="module")
def lost(small):
    model, task, _ = small
    return compress.sensitivity(model, task, QuantizeWeights, [2, 8], progress=False)


def test_layer_table_shares_are_of_the_file_and_of_the_work(small, lost):
    model, task, _ = small
    table = layer_table(model, task, lost)
    assert table["layer"].tolist() == ["0", "2"]
    assert table["weights"].tolist() == [192, 96]
    assert table["macs"].tolist() == [192, 96]
    assert table["mac_share"].tolist() == pytest.approx([2 / 3, 1 / 3])
    shares = table["size_bytes"] / models.file_bytes(model)
    assert table["byte_share"].tolist() == pytest.approx(shares.tolist())
    values = torch.linalg.svdvals(model[0].weight.detach().double()).numpy()
    assert table["directions"][0] == plots.rank_for(values, 0.9)
    assert table["drop"].tolist() == [lost["drop"][:2].max(), lost["drop"][2:].max()]


def test_layer_view_says_what_the_chosen_layer_has(small, lost):
    model, task, _ = small
    panel = layer_view(model, layer_table(model, task, lost), lost)
    before = bytes(panel.picture.value)
    panel.controls["layer"].value = "2"
    assert "2 (Linear): 96 weights" in panel.answer.value
    assert "96 multiplications, 33.3% of all" in panel.answer.value
    assert bytes(panel.picture.value) != before


def test_an_attempt_is_scored_on_validation_and_says_what_was_left(small):
    model, task, _ = small
    row = attempt(model, task, QuantizeWeights(bits=2, skip=["2"]))
    made = compress.quantize_weights(model, bits=2, skip=["2"])
    assert row["size_bytes"] == models.file_bytes(made)
    assert row["score"] == training.evaluate(made, task, split="validation").value
    assert row["agreement"] == difference(model, made, task, split="validation").agreement
    assert row["left"] == "1 of 2 layers quantized, 66.7% of the weights; left 2: in skip"
    assert row["simulated"]
    assert row["error"] == ""


def test_an_attempt_that_does_nothing_says_so_without_a_warning(small, recwarn):
    model, task, _ = small
    row = attempt(model, task, QuantizeDynamic(minimum_weights=10_000))
    assert row["left"].startswith("nothing quantized")
    assert not recwarn.list


def test_a_refused_attempt_keeps_the_words_of_the_technique(small):
    model, task, _ = small
    row = attempt(model, task, QuantizeWeights(bits=99))
    assert "bits" in row["error"]
    assert math.isnan(row["score"])


def test_the_playground_keeps_every_result(small):
    model, task, _ = small
    panel = playground(model, task, examples=100)
    assert "QuantizeWeights(bits=8)" in panel.answer.value
    panel.controls["technique"].value = "prune weights"
    panel.controls["setting"].value = Prune(sparsity=0.95)
    assert "Prune(sparsity=0.95): " in panel.answer.value
    assert "2 of 2 layers pruned" in panel.answer.value
    labels = [label for label, _ in panel.controls["setting"].options]
    assert labels[0] == "sparsity=0.3"


def test_the_playground_says_what_is_refused(small):
    model, task, _ = small
    steps = {"good": [QuantizeWeights()], "bad": [QuantizeWeights(bits=99)]}
    panel = playground(model, task, techniques=steps)
    panel.controls["technique"].value = "bad"
    assert "QuantizeWeights(bits=99) is refused: " in panel.answer.value


def test_levels_are_named_by_the_settings_in_which_they_differ():
    named = {name: list(panels._levels(steps)) for name, steps in panels.TECHNIQUES.items()}
    assert named["round the weights"] == [f"bits={bits}" for bits in (8, 6, 5, 4, 3, 2)]
    assert named["prune channels"][0] == "parameters=0.9"
    assert named["int8, inputs rounded anew"] == ["as usual"]
    assert all(len(named[name]) == len(steps) for name, steps in panels.TECHNIQUES.items())
