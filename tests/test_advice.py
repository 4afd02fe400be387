import functools
import math
from dataclasses import replace

import advised
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Branching, Tied
from torch import nn

from workbench import compress, data, measure
from workbench.compress.recipe import EqualizeLayers
from workbench.explore import advice as module
from workbench.explore.advice import Advice, Idea, advise
from workbench.explore.diagnosis import Finding
from workbench.explore.facts import Facts, _rank_share, _spare, facts
from workbench.explore.limits import Limits
from workbench.training import Evaluation, evaluate


@functools.cache
def consulted(builder):
    """The model, its task and limits, what is known to be best, and what is advised."""
    model, task, limits, objective, known = builder()
    return model, task, limits, known, advise(model, task, limits, objective=objective,
                                              progress=False)  # fmt: skip


def test_the_technique_known_to_be_the_best_comes_first():
    first = {b.__name__: consulted(b)[4][0].technique for b in advised.BUILDERS}
    known = {b.__name__: consulted(b)[3] for b in advised.BUILDERS}
    right = [name for name in known if known[name] == first[name]]
    assert len(right) >= 5, (first, known)  # two of the six are a matter of time


@pytest.mark.parametrize("builder", advised.BUILDERS)
def test_the_first_advice_keeps_its_promise_on_examples_it_never_saw(builder):
    model, task, limits, _known, found = consulted(builder)
    best = found[0]
    predictor = best.apply(model, task, progress=False)
    assert measure.artifact_bytes(predictor.model, codec="auto") == best.size_bytes
    lost = evaluate(model, task).value - evaluate(predictor, task).value
    assert best.fits
    assert best.size_bytes <= limits.size_bytes
    assert lost <= limits.score_lost + 0.01


def test_why_each_answer_is_the_best():
    """What makes it so, by measurement, without a clock."""
    model, task, *_, found = consulted(advised.spare_channels)
    small = found[0].apply(model, task, progress=False).model
    assert measure.macs(small, task.example_input) < 0.25 * measure.macs(model, task.example_input)

    model, task, *_, found = consulted(advised.one_embedding)
    assert found.facts.top("weight_share")["layer"] == "embedding"
    assert found[0].size_bytes < min(a.size_bytes for a in found if "int8" in a.technique) / 2

    *_, found = consulted(advised.tiny)
    assert found.facts.fixed_share > 0.5

    model, task, *_, found = consulted(advised.depthwise)
    broken = compress.quantize_static(model, task, granularity="tensor")
    assert evaluate(model, task).value - evaluate(broken, task).value > 0.1
    assert any(f.cause == "Do not give a whole tensor one scale" for f in found.avoid)

    model, task, *_, found = consulted(advised.quantized)
    assert found[0].apply(model, task).int8_kernels > 0
    assert any(f.cause == "Do not quantize again" for f in found.avoid)

    model, task, *_, found = consulted(advised.sparse)
    assert found.facts.mean("zeros") > 0.85
    coded = {a.technique: a.size_bytes for a in found}
    assert coded["shared weights"] < coded["the file coded"] / 2 < found.facts.size_bytes / 8


@pytest.fixture(scope="module")
def clouds():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (600,), generator=generator)
    x = torch.randn(600, 8, generator=generator) + 3 * nn.functional.one_hot(y, 8)
    task = data.task(train=(x[:400], y[:400]), test=(x[400:], y[400:]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(),
                          nn.Linear(64, 3))  # fmt: skip
    for _ in range(30):
        for (inputs,), target in task.train.batches(100):
            loss = nn.functional.cross_entropy(model(inputs), target)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= 0.1 * g
    return model.eval(), task


@pytest.fixture(scope="module")
def found(clouds):
    return advise(*clouds, objective="smallest", progress=False)


def test_the_frame_and_the_texts_show_what_was_found(found):
    frame = found.frame
    assert list(frame["rank"]) == list(range(1, len(found) + 1))
    assert len(found) >= 4
    assert (frame["size_bytes"][frame["fits"]].diff().dropna() >= 0).all()
    assert np.allclose(frame["times_smaller"] * frame["size_bytes"], found.facts.size_bytes)
    text, page = repr(found), found._repr_html_()
    for a in found:
        assert a.technique in text
        assert a.technique in page
        assert a.reason in text
        assert a.why
        assert not a.why.endswith(".")
        assert not a.reason.endswith(".")
    for finding in found.avoid:
        assert finding.cause in text
        assert finding.evidence
    assert "<code>" in page
    assert page.count("<table>") == page.count("</table>") == 2


def test_code_does_what_apply_does(found, clouds, tmp_path, monkeypatch):
    model, task = clouds
    monkeypatch.chdir(tmp_path)
    (x,), _ = next(iter(task.test.batches(50)))
    for a in (found[0], next(a for a in found if not a.recipe.steps)):
        names = {"model": model, "task": task}
        exec(a.code, names)
        assert (tmp_path / "small.safetensors").stat().st_size == a.size_bytes
        again = a.apply(model, task, progress=False)
        assert again.runtime == a.runtime == names["fast"].runtime
        assert torch.equal(again(x), names["fast"](x))


def test_what_was_measured_is_so(found, clouds):
    model, task = clouds
    few = replace(task, validation=task.validation.subset(40))
    assert len(task.validation) == 40  # all of them, whatever is asked for
    for a in found:
        small = a.recipe(model, task, progress=False) if a.recipe.steps else model
        if a.sure == "low":
            continue
        assert measure.artifact_bytes(small, codec="auto") == a.size_bytes
        before, after = (evaluate(m, few, split="validation").value for m in (model, small))
        assert a.lost == pytest.approx(before - after, abs=0.026)  # int8 kernels: one answer
        assert math.isnan(a.speedup) == (a.runtime == "eager" or not a.fits)


def test_nothing_of_the_callers_changes_and_the_test_split_stays_closed(found, clouds):
    model, task = clouds

    def closed():
        raise AssertionError("the test split was read")
        yield

    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads, model = torch.get_num_threads(), model.train()
    again = advise(model, replace(task, test=data.Split(closed)), objective="smallest",
                   progress=False)  # fmt: skip
    assert model.training
    assert torch.get_num_threads() == threads
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    columns = ["technique", "recipe", "runtime", "size_bytes", "lost", "lost_low", "sure"]
    pd.testing.assert_frame_equal(found.frame[columns], again.frame[columns])


def test_limits_are_kept(clouds, monkeypatch):
    model, task = clouds
    monkeypatch.setattr(module, "_RULES", (module._runtime, module._shared))
    real = advise(model, task, Limits(score_lost=0.05, simulated=False), progress=False)
    assert all(a.runtime != "eager" or not a.recipe.steps for a in real if a.fits)
    tight = advise(model, task, Limits(size_bytes=10), objective="smallest", progress=False)
    assert len(tight)
    assert not any(a.fits for a in tight)


def test_what_a_technique_refuses_is_told(monkeypatch):
    monkeypatch.setattr(module, "_RULES", (module._static_int8, module._shared))
    x, y = torch.randn(60, 4), torch.randint(0, 4, (60,))
    task = data.task(train=(x, y), test=(x, y))
    found = advise(Branching().eval(), task, Limits(score_lost=1.0), progress=False)
    told = {f.cause: f.evidence for f in found.avoid}
    assert (
        "Branching cannot be traced"
        in told["Do not count on int8 weights and activations in onnxruntime"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective is 'best'; choose one of fastest, smallest"),
        ({"runtimes": ("tensorrt",)}, r"runtimes names \['tensorrt'\]; installed"),
        ({"examples": 0}, "examples is 0; give 1 or more"),
        ({"threads": 0}, "threads is 0; give 1 or more"),
    ],
)
def test_refused_before_any_work(clouds, options, message):
    with pytest.raises(ValueError, match=message):
        advise(*clouds, **options)


def test_a_model_without_weights_is_refused(clouds):
    with pytest.raises(ValueError, match="ReLU has no layer with weights"):
        advise(nn.ReLU(), clouds[1], progress=False)


# Facts


def test_facts_of_a_network_made_to_measure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].weight[48:] = 2 * model[0].weight[:16]  # a quarter says nothing new
        model[2].weight.copy_(torch.outer(torch.randn(32), torch.randn(64)))  # rank 1
        model[2].weight[:8] = 0
    f = facts(model, (torch.randn(1, 32),))
    first, last = f.layers.iloc[0], f.layers.iloc[1]
    assert first["spare"] == pytest.approx(0.25)
    assert first["zeros"] == 0
    assert last["rank_share"] == pytest.approx(1 / 32)
    assert last["zeros"] == pytest.approx(0.25)
    assert list(f.layers["macs"]) == [2048, 2048]
    assert f.layers["weight_share"].sum() == pytest.approx(1)
    assert f.share("mac_share", nn.Linear) == pytest.approx(1)
    assert 0 < f.layers["time_share"].sum() <= 1
    assert 0 <= f.fixed_share <= 1
    assert f.mean("zeros") == pytest.approx(0.125)


def test_a_scale_of_the_batch_norm_counts_and_zeros_are_as_stored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).eval()
    with torch.no_grad():
        model[1].weight[:2] = 0
        model[1].weight[7] = 100
    row = facts(model, (torch.randn(1, 1, 5, 5),)).layers.iloc[0]
    assert row["spare"] >= 2 / 8
    assert row["zeros"] == 0
    assert row["spread"] > 50


def test_tied_weights_have_their_bytes_once():
    f = facts(Tied().eval(), (torch.tensor([[0, 1, 2]]),))
    assert list(f.layers["tied"]) == [False, False, True]
    assert f.layers["weight_share"].iloc[2] == 0
    assert f.layers["weight_share"].sum() == pytest.approx(1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_rank_share_is_that_of_the_singular_values(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    squared = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    shares = squared.cumsum() / squared.sum()
    assert _rank_share(weight) == (np.argmax(shares >= 0.9) + 1) / min(rows, columns)


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_spare_counts_copies_and_zeros(rows, copies, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=generator)
    twins = -3 * weight[torch.randint(rows, (copies,), generator=generator)]
    whole = torch.cat([weight, twins, torch.zeros(dead, 64)])
    assert _spare(whole) == pytest.approx((copies + dead) / len(whole))


# Rules, on facts made up


def made_up(**changes) -> Facts:
    row = {"layer": "a", "type": "Linear", "weights": 10_000, "stored_as": "float", "tied": False,
           "weight_share": 1.0, "macs": 10_000, "mac_share": 1.0, "time_share": 1.0,
           "rank_share": 0.5, "spare": 0.0, "zeros": 0.0, "values": 9, "spread": 2.0}  # fmt: skip
    whole = {key: changes.pop(key) for key in list(changes) if key not in row}
    frame = pd.DataFrame([row | changes])
    return replace(Facts(frame, 40_000, 1.0, 0.2, ("AVX2",)), **whole)


def said(f: Facts) -> tuple[dict[str, Idea], set[str]]:
    all_said = [word for rule in module._RULES for word in rule(f)]
    return (
        {idea.technique: idea for idea in all_said if isinstance(idea, Idea)},
        {finding.cause for finding in all_said if isinstance(finding, Finding)},
    )


def test_rules_look_at_facts():
    ideas, avoid = said(made_up())
    assert "int8 with ranges taken from each input" in ideas
    assert {"Do not factorize", "Do not convert to bfloat16 for speed"} <= avoid
    ideas, avoid = said(made_up(type="Conv2d"))
    assert "Do not quantize dynamically" in avoid
    assert "int8 weights and activations" in ideas
    assert "int8 with ranges taken from each input" not in ideas
    assert "low rank" in said(made_up(rank_share=0.1))[0]
    assert "file coded" in " ".join(said(made_up(zeros=0.9))[0])
    assert "single weights removed" not in said(made_up(zeros=0.9))[0]
    ideas, avoid = said(made_up(stored_as="8-bit per channel"))
    assert list(ideas) == ["another runtime"]
    assert "Do not quantize again" in avoid
    for able in ("AMX BF16", "AVX-512 BF16"):
        assert "Do not convert to bfloat16 for speed" not in said(made_up(extensions=(able,)))[1]
    bold = said(made_up(spare=0.7))[0]["fewer channels"].recipes
    assert len(bold) > len(said(made_up())[0]["fewer channels"].recipes)
    steps = said(made_up(spread=20.0))[0]["int8 weights and activations"].recipes[-1].steps
    assert [type(step).__name__ for step in steps] == ["EqualizeLayers", "QuantizeStatic"]


# Figures


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_loss_and_its_interval(pairs):
    before, after = (torch.tensor(column, dtype=torch.float) for column in zip(*pairs, strict=True))
    low, lost, high = module._lost(Evaluation(before, 0), Evaluation(after, 0), data.ACCURACY)
    # Agresti and Min (2005): half a pair more in each of the four cells
    n, b, c = len(pairs), int((before > after).sum()), int((after > before).sum())
    middle = (b - c) / (n + 2)
    half = 1.96 * math.sqrt((b + c + 1) - (b - c) ** 2 / (n + 2)) / (n + 2)
    assert (low, high) == pytest.approx((middle - half, middle + half))
    assert lost == pytest.approx((b - c) / n)
    assert low < high


def test_a_metric_where_less_is_better():
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, 3.5])
    found = module._lost(Evaluation(before, 0), Evaluation(after, 0), data.BITS_PER_CHARACTER)
    assert found == pytest.approx((0.5, 0.5, 0.5))


def piece(name: str, sure: str, speed: tuple[float, float, float], fits: bool = True) -> Advice:
    recipe = compress.Recipe()
    return Advice(name, recipe, "eager", "", fits, 10, 0, 0, 0, *speed, sure, "")


def test_only_what_cannot_be_told_apart_is_put_in_order_of_how_sure_it_is():
    a = piece("a", "medium", (5.7, 5.3, 6.1))
    b = piece("b", "high", (5.3, 5.0, 5.6))
    c = piece("c", "high", (2.0, 1.9, 2.1))
    d = piece("d", "high", (9.0, 8.0, 10.0), fits=False)
    assert [x.technique for x in module._settled([a, b, c, d], "fastest")] == ["b", "a", "c", "d"]
    assert [x.technique for x in module._settled([a, c, d], "fastest")] == ["a", "c", "d"]


def test_the_training_that_may_repair_it():
    pruned = compress.Recipe(compress.Prune(sparsity=0.9))
    assert module._with_training(pruned).steps == (*pruned.steps, compress.FineTune())
    equalized = compress.Recipe(EqualizeLayers(), compress.QuantizeStatic())
    trained = (EqualizeLayers(), compress.QuantizeAware())
    assert module._with_training(equalized).steps == trained


def test_what_did_not_help_is_told_to_be_left():
    plain = replace(piece("another runtime", "high", (3.0, 2.9, 3.1)), runtime="onnxruntime")
    step = compress.Recipe(compress.QuantizeStatic())
    slower = replace(piece("int8", "high", (2.0, 1.9, 2.1)), runtime="onnxruntime", recipe=step)
    useless = replace(piece("zeros", "high", (1.0, 0.9, 1.1)), size_bytes=40_000, recipe=step)
    helps, left = module._rank([slower, useless, plain], made_up(), "fastest")
    assert [a.technique for a in helps] == ["another runtime", "int8"]
    assert {f.cause for f in left} == {"Leave zeros", "Do not expect speed of int8"}
    smallest, _ = module._rank([slower, replace(plain, size_bytes=9)], made_up(), "smallest")
    assert smallest[0].technique == "another runtime"
