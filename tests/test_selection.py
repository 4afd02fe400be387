import pytest
import torch
from torch import nn

from workbench import data, deploy
from workbench.measure import selection
from workbench.measure.selection import best

SETTINGS = dict(runtimes=("eager",), repeats=10, progress=False)


class Slow(nn.Module):
    """The same answers after a detour."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        for _ in range(20):
            self.model(x)
        return self.model(x)


@pytest.fixture
def case(blobs) -> tuple[dict[str, nn.Module], data.Task]:
    """A wide layer that is right about half of the task, a slow one, and a small one that errs."""
    torch.manual_seed(0)
    good = nn.Sequential(nn.Linear(2, 512), nn.Linear(512, 3))
    x, _ = blobs.train.source.tensors
    answers = data.task(train=(x, good(x).argmax(-1)), test=(x, good(x).argmax(-1)))
    return {"slow": Slow(good), "good": good, "small": nn.Linear(2, 3)}, answers


def test_the_fastest_within_the_loss_is_chosen(case):
    models, task = case
    found = best(models, task, **SETTINGS)
    assert found.name == "good, eager"
    assert found.predictor.model is models["good"]
    assert found.frame["fits"].tolist() == [True, True, False]
    assert found.frame["loss"].iloc[2] > 0.01
    assert best(models, task, loss=1, **SETTINGS).name == "small, eager"


def test_size_is_a_limit(case):
    models, task = case
    found = best(models, task, loss=1, size_bytes=1000, **SETTINGS)
    assert found.frame["fits"].tolist() == [False, False, True]
    with pytest.raises(
        ValueError, match=r"nothing is within .*: the smallest file, small, eager, has [\d,]+"
    ):
        best(models, task, size_bytes=1000, **SETTINGS)


def test_a_loss_of_a_metric_that_is_better_when_lower(case):
    models, task = case
    wrong = data.Metric("error", lambda o, t: (o.argmax(-1) != t).float(), higher_is_better=False)
    task = data.Task(task.name, task.train, task.validation, task.test, metric=wrong)
    assert best(models, task, **SETTINGS).name == "good, eager"


def test_every_installed_runtime_is_tried_and_what_fails_is_told(blobs, monkeypatch):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x

    monkeypatch.setattr(selection, "installed", lambda: ("eager", "onnxruntime"))
    models = {"layer": nn.Linear(2, 3), "branch": Branch()}
    frame = best(models, blobs, loss=1, repeats=10, progress=False).frame
    assert frame["name"].tolist() == [
        "layer, eager", "layer, onnxruntime", "branch, eager", "branch, onnxruntime",
    ]  # fmt: skip
    assert frame["error"].ne("").tolist() == [False, False, False, True]
    assert "cannot trace Branch" in frame["error"].iloc[3]
    assert not frame["fits"].iloc[3]


def test_a_module_alone_and_a_file_are_candidates(blobs):
    model = nn.Linear(2, 3)
    predictor = deploy.prepare(model, "onnxruntime", example_input=(torch.rand(1, 2),))
    assert best(model, blobs, loss=1, **SETTINGS).name == "model, eager"
    frame = best({"plain": model, "file": predictor}, blobs, loss=1, **SETTINGS).frame
    assert frame["name"].tolist() == ["plain, eager", "file"]


def test_nothing_that_runs_is_told(blobs):
    with pytest.raises(
        ValueError, match=r"nothing could be measured; model, eager: .*shapes cannot"
    ):
        best(nn.Linear(7, 3), blobs, **SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(loss=-1), "loss is -1; give 0 or more"),
        (dict(examples=0), "examples is 0; give 1 or more"),
        (dict(split="all"), "split is 'all'; choose"),
        (dict(runtimes=("eager", "tensorrt")), r"runtimes names \['tensorrt'\]; choose from"),
    ],
)
def test_refusals(blobs, wrong, message):
    with pytest.raises(ValueError, match=message):
        best(nn.Linear(2, 3), blobs, **SETTINGS | wrong)
