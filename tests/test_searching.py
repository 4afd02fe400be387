import itertools
import json
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workbench import compress, data, measure, training
from workbench.compress.recipe import FineTune, Prune, QuantizeWeights, Recipe, ShareWeights
from workbench.data import Split
from workbench.explore import searching, spaces
from workbench.explore.limits import Limits
from workbench.explore.searching import search
from workbench.explore.spaces import CLUSTERS, SPARSITIES, Codes

LIMITS = Limits(size_bytes=2_000, score_lost=0.2)
QUICK = FineTune(epochs=1, optimizer=partial(torch.optim.AdamW, lr=1e-2))
OPTIONS = dict(
    minutes=5, repair=QUICK, polish=QUICK, seeds=0, examples=60, codec="rans", progress=False
)


def blobs(seed: int = 0) -> data.Task:
    """Four clouds of points in twenty dimensions, which a small network tells apart."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(4, 20, generator=generator)
    y = torch.randint(0, 4, (700,), generator=generator)
    x = middles[y] + 1.2 * torch.randn(700, 20, generator=generator)
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 400), (400, 550), (550, 700))]
    return data.task(train=parts[0], validation=parts[1], test=parts[2], name="blobs")


def network(task: data.Task) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 4))
    training.fit(model, task, epochs=4, progress=False,
                 optimizer=partial(torch.optim.AdamW, lr=1e-2))  # fmt: skip
    return model


@pytest.fixture(scope="module", autouse=True)
def short_rounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "ROUND", 4)
        yield


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def model(task):
    return network(task)


@pytest.fixture(scope="module")
def whole(model, task, tmp_path_factory):
    """Two rounds, not stopped."""
    path = tmp_path_factory.mktemp("whole") / "search.db"
    return search(model, task, LIMITS, storage=path, candidates=8, **OPTIONS)


def same(found: searching.Search, expected: searching.Search) -> None:
    """The same candidates with the same results; how long they took differs."""
    first, second = (f.frame.drop(columns="seconds", errors="ignore") for f in (found, expected))
    order = ["name", "stage"]
    first, second = (f.sort_values(order, ignore_index=True) for f in (first, second))
    pd.testing.assert_frame_equal(first, second)


def test_finds_what_keeps_to_the_limits(whole, model, task):
    best = whole.winner
    assert best.size_bytes <= LIMITS.size_bytes
    assert best.lost <= LIMITS.score_lost
    small = whole.recipe(model, task, progress=False)
    assert measure.artifact_bytes(small, codec="rans") == best.size_bytes
    fits = whole.frame[
        whole.frame.stage.eq("trained") & whole.frame.size_bytes.le(LIMITS.size_bytes)
    ]
    assert best.score == fits.score.max()


def test_frame_says_what_was_looked_at_and_what_was_trained(whole, model, task):
    counts = whole.frame.stage.value_counts()
    assert counts["baseline"] == 1
    assert counts["screened"] + counts["trained"] == 8
    assert 2 <= counts["trained"] <= 4  # two proxies, two rounds
    row = whole.frame[whole.frame.stage.eq("screened")].iloc[0]
    few = replace(task, validation=task.validation.subset(60, seed=0))
    small = Recipe.from_json(row.recipe)(model, few, progress=False)
    before = training.evaluate(model, few, split="validation")
    after = training.evaluate(small, few, split="validation")
    assert row.lost == pytest.approx(before.value - after.value)
    assert row.harm == pytest.approx(after.loss - before.loss)
    assert row.size_bytes == measure.artifact_bytes(small, codec="rans")


def test_what_is_trained_was_favoured_by_a_proxy(whole):
    """Of the first round: the least harm measured, or the least predicted, that fits."""
    frame = whole.frame.set_index("name")
    first = frame.loc[[n for n in frame.index if n.startswith("candidate")]]
    trained = first[first.stage.eq("trained")]
    left = first[first.stage.eq("screened") & first.size_bytes.le(LIMITS.size_bytes)]
    assert len(left)
    assert trained.size_bytes.max() <= LIMITS.size_bytes * 1.05  # training moves a few bytes
    assert any(json.loads(text)["steps"][-1]["step"] == "FineTune" for text in trained.recipe)


def test_training_that_does_harm_is_left_out(model, task, tmp_path):
    harmful = FineTune(optimizer=partial(torch.optim.SGD, lr=100.0))
    options = OPTIONS | {"repair": harmful, "polish": harmful, "candidates": 8}
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", **options)
    trained = found.frame[found.frame.stage.eq("trained")]
    assert len(trained)
    assert not trained.recipe.str.contains("FineTune").any()


def test_front_is_what_no_other_trained_one_beats(whole):
    trained = whole.frame[whole.frame.stage.eq("trained")]
    for row in trained.itertuples():
        beaten = (trained.size_bytes <= row.size_bytes) & (trained.score >= row.score)
        beaten &= (trained.size_bytes < row.size_bytes) | (trained.score > row.score)
        assert (row.name in set(whole.front.name)) == (not beaten.any())


def test_same_seed_and_stopped_or_not_the_same_candidates(whole, model, task, tmp_path):
    path = tmp_path / "search.db"
    for candidates in (0, 3, 8):
        found = search(model, task, LIMITS, storage=path, candidates=candidates, **OPTIONS)
    same(found, whole)
    other = search(model, task, LIMITS, storage=path, candidates=4, **OPTIONS | {"seed": 1})
    assert len(other.frame) == 5  # another search in the same file


class Travelling(Executor):
    """Runs a job where it is, after it went through a pickle as to another machine."""

    jobs = 0

    def submit(self, function, /, *args):
        Travelling.jobs += 1
        future = Future()
        function, args = pickle.loads(pickle.dumps((function, args)))
        future.set_result(pickle.loads(pickle.dumps(function(*args))))
        return future

    def map(self, function, *jobs):
        return [self.submit(function, *job).result() for job in zip(*jobs, strict=True)]


def test_an_executor_gives_the_same(whole, model, task, tmp_path):
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", candidates=8,
                   executor=Travelling(), **OPTIONS)  # fmt: skip
    assert Travelling.jobs > 8
    same(found, whole)


def test_interrupted_it_goes_on_with_nothing_lost(whole, model, task, tmp_path, monkeypatch):
    path, real, seen = tmp_path / "search.db", searching._screened, []

    def interrupted(job):
        seen.append(job)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(searching, "_screened", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, task, LIMITS, storage=path, candidates=8, **OPTIONS)
    same(search(model, task, LIMITS, storage=path, candidates=8, **OPTIONS), whole)
    assert len(seen) == 9  # one was begun twice


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_searching import *
searching.ROUND = 4
task = blobs()
search(network(task), task, LIMITS, storage=sys.argv[2], candidates=8, **OPTIONS)
"""


def test_killed_it_goes_on_with_nothing_lost(whole, model, task, tmp_path):
    path = tmp_path / "search.db"
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(arguments, env=environment)
    try:
        for _ in range(1200):
            if len(done := finished(path)) >= 2 or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = finished(path)
    same(search(model, task, LIMITS, storage=path, candidates=8, **OPTIONS), whole)
    after = finished(path)
    assert len(done) < len(after) == 8
    assert all(after[number] == when for number, when in done.items())  # none was done again


def finished(path: Path) -> dict[int, str]:
    """When each candidate was finished, as the file says."""
    if not path.exists():
        return {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        query = "SELECT number, datetime_complete FROM trials WHERE state = 'COMPLETE'"
        try:
            return dict(connection.execute(query).fetchall())
        except sqlite3.OperationalError:  # no tables yet
            return {}


def test_the_search_never_touches_the_test_examples(model, task, tmp_path, monkeypatch):
    def forbidden():
        raise AssertionError("the test examples were read")

    hidden = replace(task, test=Split(forbidden))
    real = searching._made

    def watched(recipe, model, few, given):
        # Nor could a technique, whatever it reads of the task that it is given.
        assert forbidden not in (few.test.source, given.test.source)
        return real(recipe, model, few, given)

    monkeypatch.setattr(searching, "_made", watched)
    search(model, hidden, LIMITS, storage=tmp_path / "search.db", candidates=4, **OPTIONS)
    with pytest.raises(AssertionError, match="were read"):
        search(model, hidden, LIMITS, storage=tmp_path / "search.db", candidates=4,
               **OPTIONS | {"seeds": 1})  # fmt: skip


def test_the_winner_is_trained_again_and_tested(model, task, tmp_path):
    options = OPTIONS | {"seeds": 3}
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", candidates=4, **options)
    assert found.tested.seed.tolist() == [0, 1, 2]
    assert found.tested.lost.mean() == pytest.approx(found.lost)
    assert found.lost_low < found.lost < found.lost_high
    before = training.evaluate(model, task).scores
    after = training.evaluate(found.model, task).scores
    assert found.tested.lost[0] == pytest.approx((before - after).mean().item())
    steps = [replace(s, seed=2) if hasattr(s, "seed") else s for s in found.recipe.steps]
    few = replace(task, validation=task.validation.subset(60, seed=0))
    third = training.evaluate(Recipe(*steps)(model, few, progress=False), task).value
    assert found.tested.score[2] == pytest.approx(third)
    assert found.tested.promised[0] == pytest.approx(found.winner.lost)
    assert found.tested.promised.mean() == pytest.approx(found.promised)
    assert "with 3 seeds it lost" in str(found)
    assert repr(found) == str(found)


def test_no_time_looks_at_nothing_and_keeps_what_was_found(whole, model, task, tmp_path):
    options = OPTIONS | {"minutes": 0}
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", **options)
    assert found.frame.stage.tolist() == ["baseline"]
    assert found.winner is found.model is found.recipe is None
    assert str(found).startswith("Nothing keeps to the limits: 0 looked at, 0 trained.")
    with pytest.raises(ValueError, match="no recipe to open as code"):
        _ = found.code


def test_time_is_kept_for_the_end(model, task, tmp_path, monkeypatch):
    """No candidate is begun where the winner could not be trained again in what is left."""
    now = [0.0]
    monkeypatch.setattr(searching.time, "monotonic", lambda: now[0])
    real = searching._trained
    monkeypatch.setattr(searching, "_trained", lambda job: real(job) | {"seconds": 50.0})
    screened = searching._screened

    def slow(job):
        now[0] += 10
        return screened(job)

    monkeypatch.setattr(searching, "_screened", slow)
    options = OPTIONS | {"minutes": 4, "seeds": 2}
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", **options)
    # Of 240 seconds, two trainings of 50 are set aside once it is known how long one takes.
    assert 40 < now[0] <= 240 - 2 * 50
    assert found.frame.stage.eq("trained").any()


def test_recipes_of_ones_own_are_trained_first_as_they_are(model, task, tmp_path):
    mine = {"mine": Recipe(QuantizeWeights(bits=2)), "large": Recipe(QuantizeWeights(bits=8))}
    options = OPTIONS | {"recipes": mine}
    limits = Limits(size_bytes=2_000)
    found = search(model, task, limits, storage=tmp_path / "search.db", candidates=0, **options)
    row = found.frame.set_index("name").loc["mine"]
    assert (row.stage, row.technique) == ("trained", "2-bit per channel weights")
    assert found.winner["name"] == "mine"
    assert found.frame.score.iloc[-2:].idxmax() == found.frame.index[found.frame.name == "large"]
    small = compress.quantize_weights(model, bits=2)
    assert row.size_bytes == measure.artifact_bytes(small, codec="rans")
    assert row.score == training.evaluate(small, task, split="validation").value


def test_smallest_goes_below_what_was_found(model, task, tmp_path):
    limits = Limits(score_lost=0.2)
    found = search(model, task, limits, objective="smallest", storage=tmp_path / "search.db",
                   candidates=12, **OPTIONS)  # fmt: skip
    trained = found.frame[found.frame.stage.eq("trained")]
    fits = trained[trained.lost <= limits.score_lost]
    assert found.winner.size_bytes == fits.size_bytes.min()
    assert len(fits) > 1


def test_a_plain_file_is_not_pruned(model, task, tmp_path):
    options = OPTIONS | {"codec": None}
    found = search(model, task, Limits(size_bytes=3_000), storage=tmp_path / "search.db",
                   candidates=4, **options)  # fmt: skip
    assert not any(isinstance(step, Prune) for step in found.recipe.steps)
    small = found.recipe(model, task, progress=False)
    assert found.winner.size_bytes == measure.artifact_bytes(small)


def test_fastest_is_timed_for_real(task, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                          nn.Linear(512, 4))  # fmt: skip
    training.fit(model, task, epochs=2, progress=False)
    limits = Limits(size_bytes=200_000, score_lost=0.3)
    found = search(model, task, limits, objective="fastest", storage=tmp_path / "search.db",
                   candidates=4, **OPTIONS)  # fmt: skip
    timed = found.frame[found.frame.latency_ms.notna()]
    assert timed.name.iloc[0] == "model"
    assert timed.runtime.eq("onnxruntime").all()
    assert not found.winner.simulated
    assert found.winner.latency_ms == timed.latency_ms[timed.stage.eq("trained")].min()
    assert found.winner.size_bytes <= limits.size_bytes
    assert "times as fast" in str(found)
    screened = found.frame[found.frame.stage.eq("screened")]
    assert screened.latency_ms.isna().all()


def test_what_cannot_be_built_is_passed_over(model, task, tmp_path, monkeypatch):
    real, calls = searching._made, []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("out of reach")
        return real(*arguments)

    monkeypatch.setattr(searching, "_made", sometimes)
    found = search(model, task, LIMITS, storage=tmp_path / "search.db", candidates=4, **OPTIONS)
    assert len(found.frame) == 4  # the model, and three of four
    assert "candidate 1" not in set(found.frame.name)


def test_machines_that_share_a_database_leave_each_other_alone(model, task, tmp_path):
    import optuna

    path = tmp_path / "search.db"
    url = f"sqlite:///{path}"
    search(model, task, LIMITS, storage=url, candidates=4, **OPTIONS)
    (name,) = optuna.get_all_study_names(url)
    others = optuna.load_study(study_name=name, storage=url).ask()
    search(model, task, LIMITS, storage=url, candidates=8, **OPTIONS)
    state = {t.number: t.state.name for t in optuna.load_study(study_name=name, storage=url).trials}
    assert state.pop(others.number) == "RUNNING"
    assert set(state.values()) == {"COMPLETE"}
    # A file is one's own: what was begun there was left by a process that is no more.
    search(model, task, LIMITS, storage=path, candidates=8, **OPTIONS)
    trials = optuna.load_study(study_name=name, storage=url).trials
    assert {t.state.name for t in trials} == {"COMPLETE"}


def test_code_makes_the_winner(whole, model, task):
    names = {"model": model, "task": task}
    exec(whole.code, names)
    assert names["recipe"] == whole.recipe
    assert measure.artifact_bytes(names["small"], codec="rans") == whole.winner.size_bytes


def test_shows_itself(whole):
    text = whole._repr_html_()
    assert whole.winner["name"] in text
    assert "ShareWeights" in text
    axes = whole.plot().axes[0]
    trained = whole.frame[whole.frame.stage.eq("trained")]
    drawn = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(drawn["trained"].get_xdata(), trained.size_bytes / 1e3)
    np.testing.assert_allclose(drawn["trained"].get_ydata(), trained.lost * 100)
    assert whole.winner["name"] in drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "best"}, "objective is 'best'; choose one of"),
        ({"limits": Limits()}, "limits has neither size_bytes nor score_lost"),
        ({"limits": Limits(size_bytes=0)}, "size_bytes is 0; give a number above 0"),
        ({"limits": replace(LIMITS, simulated=False)}, "refuses simulated candidates"),
        ({"minutes": -1}, "minutes is -1; give 0 or more"),
        ({"minutes": math.nan}, "minutes is nan; give 0 or more"),
        ({"candidates": -1}, "candidates is -1; give 0 or more"),
        ({"seeds": -1}, "seeds is -1; give 0 or more"),
        ({"examples": 0}, "examples is 0; give 1 or more"),
        ({"recipes": {"model": Recipe()}}, "a recipe is called 'model'"),
        ({"recipes": {"candidate 3": Recipe()}}, "a recipe is called 'candidate 3'"),
    ],
)
def test_wrong_settings_are_refused_before_any_file(model, task, tmp_path, changes, message):
    path = tmp_path / "search.db"
    settings = {"limits": LIMITS, "storage": path} | OPTIONS | changes
    with pytest.raises(ValueError, match=message):
        search(model, task, settings.pop("limits"), **settings)
    assert not path.exists()


def test_without_optuna_it_says_what_to_install(model, task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna"):
        search(model, task, LIMITS, storage=tmp_path / "search.db")


@given(st.sampled_from(SPARSITIES), st.sampled_from(CLUSTERS), st.booleans())
def test_predicted_bytes_are_near_those_of_a_file(sparsity, clusters, coded):
    layer = nn.Sequential(nn.Linear(300, 200, bias=False))
    nn.init.normal_(layer[0].weight, generator=torch.Generator().manual_seed(0))
    sparsity = sparsity if coded else 0.0
    small = compress.share_weights(compress.prune(layer, sparsity=sparsity), clusters=clusters)
    real = measure.artifact_bytes(small, codec="rans" if coded else None)
    space = Codes.__new__(Codes)
    space.coded, space.weights = coded, {"0": 60_000}
    predicted = space.layer_bytes("0", sparsity, clusters)
    assert predicted == pytest.approx(real, rel=0.25, abs=600)


def table(rows: list[tuple]) -> pd.DataFrame:
    columns = ["layer", "level", "loss_increase", "weights"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(shared_with=[[] for _ in rows], dense_bytes=4 * frame.weights,
                        model_bytes=100 + 4 * 30_000)  # fmt: skip


@given(st.lists(st.floats(0, 5), min_size=20, max_size=20), st.integers(3_000, 40_000))
def test_starts_are_the_best_plans_for_the_sensitivity(harms, limit):
    """By brute force: of all levels of two layers, none fits the same budget with less harm."""
    names, harms = {"a": 20_000, "b": 10_000}, iter(harms)
    sharing = [(n, c, next(harms), w) for n, w in names.items() for c in CLUSTERS]
    pruning = [(n, s, next(harms), w) for n, w in names.items() for s in SPARSITIES[1:]]
    space = Codes(table(pruning), table(sharing), coded=True)
    levels = [(s, c) for s in SPARSITIES for c in CLUSTERS]
    plans = []
    for part, healed in itertools.product(spaces.PARTS, spaces.HEALED):
        pairs = [
            (space.layer_bytes("a", *one) + space.layer_bytes("b", *two),
             space._harm("a", *one, healed) + space._harm("b", *two, healed), (one, two))
            for one in levels for two in levels
        ]  # fmt: skip
        fitting = [pair for pair in pairs if pair[0] <= part * limit - space.other_bytes]
        if fitting:
            least = min(harm for _, harm, _ in fitting)
            plans.append([both for _, harm, both in fitting if harm <= least + 1e-9])
    for parameters, best in zip(
        space.starts(Limits(size_bytes=limit), 120_100), plans, strict=True
    ):
        chosen = tuple((SPARSITIES[parameters[f"{n} sparsity"]],
                        CLUSTERS[parameters[f"{n} clusters"]]) for n in names)  # fmt: skip
        assert chosen in best


def test_the_smallest_is_sought_below_what_kept_the_score():
    """Half of it, or between it and what lost too much; anything cheaper where that is not."""
    screened = pd.DataFrame({"name": [*"abcde"], "size_bytes": [10, 28, 48, 70, 97]})
    trained = pd.DataFrame({"size_bytes": [100, 120], "lost": [0.01, 0.0]})

    def names(trained, part=screened):
        limits = Limits(size_bytes=110, score_lost=0.02)
        return "".join(searching._to_train(part, trained, "size_bytes", limits).name)

    assert names(trained) == "c"
    failed = pd.DataFrame({"size_bytes": [40], "lost": [0.05]})
    assert names(pd.concat([trained, failed])) == "d"
    assert names(trained, screened[screened.name != "c"]) == "abd"
    assert names(failed) == "abcde"


def test_tied_layers_get_one_level():
    sharing = table([("a", c, 0.0, 500) for c in CLUSTERS])
    sharing["shared_with"] = [["b"]] * len(sharing)
    space = Codes(table([("a", s, 0.0, 500) for s in SPARSITIES[1:]]), sharing, coded=True)

    class Fixed:
        def suggest_int(self, name, low, high):
            return high

    prune, share = space.recipe(Fixed()).steps
    assert prune.sparsity == {"a": 0.98, "b": 0.98}
    assert share == ShareWeights(clusters={"a": 31, "b": 31})
