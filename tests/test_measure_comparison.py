"""The one frame: its columns, what fails in it, and what it leaves alone."""

import copy
import math
import pickle
import re
from concurrent.futures import Executor, Future, ProcessPoolExecutor

import pytest
import torch
from networks import two_inputs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from workbench import compress, data, models, training
from workbench.deploy.runtimes import Predictor
from workbench.measure import accuracy, size
from workbench.measure.comparison import COLUMNS, compare

generator = torch.Generator().manual_seed(0)
IMAGES = torch.rand(60, 1, 28, 28, generator=generator)
LABELS = torch.randint(0, 10, (60,), generator=generator)
TASK = data.task(train=(IMAGES, LABELS), test=(IMAGES, LABELS))
FAST = {"repeats": 10, "progress": False}


def row(entry, **arguments):
    """The row of ``entry`` beside a baseline that works."""
    frame = compare(TASK, {"base": small(), "it": entry}, **(FAST | arguments))
    assert frame.error[0] == ""
    return frame.set_index("name").loc["it"]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.layer(x + y)


def test_one_tidy_row_for_each():
    lenet, other = models.build("lenet-300-100"), models.build("lenet-5", seed=1)
    frame = compare(TASK, {"a": lenet, "b": other, "c": (lenet, "onnxruntime")}, seed=3, **FAST)
    assert tuple(frame.columns) == COLUMNS
    assert frame.name.tolist() == ["a", "b", "c"]
    assert frame.runtime.tolist() == ["eager", "eager", "onnxruntime"]
    assert frame.error.tolist() == ["", "", ""]
    assert frame.verdict[0] == "baseline"
    assert set(frame.seed) == {3}

    b = frame.iloc[1]
    scores = [training.evaluate(model.eval(), TASK).scores for model in (lenet, other)]
    assert b.score == scores[1].mean()
    assert (b.score_low, b.score_high) == accuracy.interval(scores[1], True)
    assert b.p_value == accuracy.paired_p_value(*scores, True)
    assert b.size_bytes == size.artifact_bytes(other)
    assert b.compression_ratio == size.artifact_bytes(lenet) / b.size_bytes
    assert (b.parameters, b.nonzeros) == (431_080, size.nonzeros(other))
    assert b.macs == 2_293_000
    assert b.peak_memory_bytes > 0
    assert b.latency_low_ms <= b.latency_ms <= b.latency_high_ms
    assert b.speedup_low < b.speedup < b.speedup_high
    assert frame.p_value[2] == 1.0  # the same model on another runtime
    assert math.isnan(frame.p_value[0])
    assert math.isnan(frame.peak_memory_bytes[2])


def test_files_are_coded_on_demand():
    pruned = compress.prune(small(), sparsity=0.9)
    candidates = {"plain": small(), "coded": pruned, "ORT": (small(), "onnxruntime")}
    plain = compare(TASK, candidates, **FAST).set_index("name")
    named = compare(TASK, candidates, codec={"coded": "huffman"}, **FAST).set_index("name")
    everywhere = compare(TASK, candidates, codec="huffman", **FAST).set_index("name")
    coded = size.artifact_bytes(pruned, codec="huffman")
    assert coded < plain.size_bytes["coded"]
    assert named.size_bytes.to_dict() == plain.size_bytes.to_dict() | {"coded": coded}
    assert named.compression_ratio["coded"] == plain.size_bytes["plain"] / coded
    assert "file coded (huffman)" in named.note["coded"]
    assert everywhere.size_bytes["plain"] < plain.size_bytes["plain"]
    assert everywhere.size_bytes["ORT"] == plain.size_bytes["ORT"]
    assert "coded" not in everywhere.note["ORT"] + named.note["plain"]
    assert set(everywhere.error) == {""}


def test_a_named_baseline():
    frame = compare(TASK, {"a": small(), "b": models.build("lenet-5")}, baseline="b", **FAST)
    assert frame.verdict[1] == "baseline"
    assert frame.compression_ratio[0] > 10
    assert frame.compression_ratio[1] == 1


def test_models_are_unchanged():
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(2304, 10))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    frame = compare(TASK, {"a": model, "b": (model, "onnxruntime")}, **FAST)
    assert frame.error.tolist() == ["", ""]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_callable_has_answers_and_speed_only():
    model = small()
    it = row(lambda x: model(x), runtime="onnxruntime")
    assert (it.runtime, it.error, it.p_value) == ("callable", "", 1.0)
    assert it.latency_ms > 0
    assert it[["size_bytes", "compression_ratio", "parameters", "nonzeros", "macs"]].isna().all()


def test_several_inputs():
    x, y, target = torch.rand(40, 4), torch.rand(40, 4), torch.randint(0, 3, (40,))
    task = data.task(train=(x, y, target), test=(x, y, target))
    frame = compare(task, {"a": TwoInputs()}, batch_size=8, **FAST)
    assert frame.error[0] == ""
    assert frame.batch_size[0] == 8
    assert frame.macs[0] == 12  # for one example, whatever the batch


def nan_weights():
    model = models.build("lenet-5")
    model[3].weight.data[0, 0, 0, 0] = math.nan
    return model


class Divides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x):
        return self.layer(x.flatten(1)) * math.nan


def pair(model):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x), x

    return Pair()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (nan_weights(), "weight 3.weight holds NaN"),
        (nn.ReLU(), "ReLU has no parameters"),
        (Divides(), "answers NaN"),
        (pair(small()), "returns a tuple"),
        (3, "candidate is a int"),
        ((small(), "abacus"), "runtime is 'abacus'"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: x[:3].flatten(1), "ValueError|RuntimeError"),
    ],
)
def test_one_that_fails_says_why_and_the_rest_go_on(entry, message):
    it = row(entry)
    assert re.search(message, it.error)
    assert it[["score", "latency_ms", "speedup", "size_bytes"]].isna().all()
    assert it.verdict == ""


def test_a_wrong_input_shape_names_the_layer_and_both_shapes():
    error = row(nn.Sequential(nn.Flatten(), nn.Linear(100, 10))).error
    assert "inputs of shape (1, 1, 28, 28)" in error
    assert (
        "layer 1 = Linear(in_features=100, out_features=10, bias=True) was given (1, 784)" in error
    )


def test_a_failure_between_layers_is_not_blamed_on_a_layer():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(784, 10)

        def forward(self, x):
            return self.layer(x.flatten(1)) @ torch.rand(3, 3)

    error = row(Between()).error
    assert "Between" in error
    assert "Linear" not in error


def test_failing_only_at_the_latency_batch():
    model = small()

    def needs_many(x):
        if len(x) < 10:
            raise RuntimeError("too few")
        return model(x)

    it = row(needs_many)
    assert "too few" in it.error
    assert math.isnan(it.score)


def test_a_network_from_outside_goes_through_with_int8():
    model, inputs = two_inputs()
    target = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(0))
    task = data.task((*inputs, target), (*inputs, target), (*inputs, target))
    small = compress.quantize_static(model, task)
    frame = compare(task, {"mine": model, "int8": (small, "onnxruntime"), "eager": small}, **FAST)
    assert frame.error.tolist() == ["", "", ""]
    assert frame.simulated.tolist() == [False, False, True]
    assert frame.technique.tolist() == ["none", *2 * ["int8 static per channel"]]
    assert frame.note[1] == "6 of 6 layers quantized, 100.0% of the weights"


def test_int8_dynamic_on_a_cnn_is_reported_as_nothing_quantized():
    with pytest.warns(UserWarning, match="nothing quantized"):
        entry = compress.quantize_dynamic(models.build("resnet-8"))
    found = row(entry)
    assert found.technique == "int8 dynamic per channel: nothing quantized"
    assert found.note.startswith("nothing quantized (9 layers: a convolution needs calibration")


def test_without_the_baseline_the_others_have_no_ratios():
    frame = compare(TASK, {"bad": nn.ReLU(), "good": small()}, **FAST)
    good = frame.iloc[1]
    assert "no parameters" in frame.error[0]
    assert good.latency_ms > 0
    assert good.score >= 0
    assert good[["speedup", "speedup_low", "p_value", "compression_ratio"]].isna().all()
    assert good.verdict == ""


def test_what_is_simulated_is_never_faster():
    class Simulated(Predictor):
        def __init__(self):
            super().__init__()
            self.simulated = True

        def predict(self, x):
            return torch.zeros(len(x), 10)

    it = row(Simulated(), repeats=30)
    assert it.speedup > 1
    assert it.verdict.startswith("simulated")
    assert "faster" not in it.verdict


class Travelling(Executor):
    """Runs at once what survives a pickle, as a process pool would."""

    def __init__(self):
        self.bytes_sent = []

    def submit(self, function, /, *arguments, **named):
        future = Future()
        try:
            sent = pickle.dumps((function, arguments, named))
            self.bytes_sent.append(len(sent))
            function, arguments, named = pickle.loads(sent)
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def test_an_executor_scores_what_can_travel():
    model = small(2)
    candidates = {
        "a": small(),
        "b": small(1),
        "here": lambda x: model(x),
        "f": lambda x: 1 / 0,
    }
    executor = Travelling()
    there = compare(TASK, candidates, executor=executor, **FAST)
    here = compare(TASK, candidates, **FAST)
    assert len(executor.bytes_sent) == 2
    assert there.score.equals(here.score)
    assert there.p_value.equals(here.p_value)
    assert "ZeroDivisionError" in there.error[3]


def test_only_the_split_travels():
    large = torch.rand(5000, 1, 28, 28)
    train = (large, torch.zeros(5000, dtype=torch.long))
    task = data.task(train=train, validation=train, test=(IMAGES, LABELS))
    executor = Travelling()
    compare(task, {"a": small()}, executor=executor, **FAST)
    assert executor.bytes_sent[0] < 1_000_000 < large.nbytes


def test_a_broken_executor_does_no_harm():
    executor = ProcessPoolExecutor(1)
    executor.shutdown()
    assert compare(TASK, {"a": small()}, executor=executor, **FAST).error[0] == ""


def test_interrupting_passes_through():
    def interrupt(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(TASK, {"a": small(), "b": interrupt}, **FAST)


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        ({}, {}, "nothing to measure"),
        (None, {"baseline": "x"}, "baseline is 'x'"),
        (None, {"batch_size": 0}, "batch_size is 0"),
        (None, {"batch_size": 61}, "batch_size is 61; the test split has 60"),
        (None, {"threads": 0}, "threads is 0"),
        (None, {"repeats": 1}, "repeats is 1"),
        (None, {"split": "exam"}, "split is 'exam'"),
        (None, {"runtime": "abacus"}, "runtime is 'abacus'"),
        (None, {"codec": "zip"}, "codec is 'zip'; choose 'auto' or one of plain, run_length"),
        (None, {"codec": {"b": "auto"}}, r"codec names \['b'\]; candidates are \['a'\]"),
    ],
)
def test_bad_arguments_are_refused(models, arguments, message):
    models = {"a": small()} if models is None else models
    with pytest.raises(ValueError, match=message):
        compare(TASK, models, **(FAST | arguments))


def test_a_tuple_that_is_no_pair_is_refused():
    with pytest.raises(TypeError, match="a is a tuple of 3"):
        compare(TASK, {"a": (small(), "eager", 1)}, **FAST)


def test_a_shuffled_split_cannot_be_paired():
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=20, shuffle=True)
    task = data.task(train=loader, validation=loader, test=loader)
    with pytest.raises(ValueError, match="random order"):
        compare(task, {"a": small()}, **FAST)


def test_every_column_is_explained():
    assert all(f"``{column}``" in compare.__doc__ for column in COLUMNS)
