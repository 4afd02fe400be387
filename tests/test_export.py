import shutil
import zipfile
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
import torch._inductor.config
from networks import two_inputs
from torch import nn

from workbench import compress, data, models
from workbench.deploy import exporting, runtimes
from workbench.deploy.exporting import FORMATS, SUFFIXES, ParityError, export, parity
from workbench.deploy.lowering import UnsupportedError

IMAGES = torch.rand(24, 1, 28, 28, generator=torch.Generator().manual_seed(0))
TASK = data.task(train=(IMAGES, torch.arange(24) % 10), test=(IMAGES, torch.arange(24) % 10))


def needs(format: str):
    marks = []
    if format.startswith("openvino"):
        marks = [
            pytest.mark.skipif("openvino" not in runtimes.installed(), reason="needs OpenVINO")
        ]
    return pytest.param(format, marks=marks)


def path_of(folder, format: str):
    return folder / f"model{SUFFIXES[format]}"


@pytest.mark.parametrize("format", [needs(f) for f in FORMATS[:3] + FORMATS[4:5]])
def test_a_file_answers_like_the_model_for_any_batch(format, tmp_path):
    model, inputs = two_inputs()
    model.eval()
    answers = model(*inputs).argmax(-1)
    task = data.task(train=(*inputs, answers), test=(*inputs, answers))
    path = path_of(tmp_path, format)
    made = export(model, path, format, task=task)
    loaded = runtimes.load(path, trusted=True)
    for size in (1, 2):
        some = tuple(x[:size] for x in inputs)
        limit = 2e-2 if format == "openvino-fp16" else 1e-5
        assert torch.allclose(loaded(*some), model(*some), atol=limit)
    assert made.size_bytes == path.stat().st_size
    assert made.record == loaded.loaded.record
    assert made.record["inputs"][1]["shape"] == [-1, 5]
    assert made.record["outputs"][0]["dtype"] == "float32"
    assert made.record["parity"] == {"split": "test", **asdict(made.parity)}
    assert made.parity.agreement == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_machine_code_answers_like_the_model_for_any_batch(tmp_path):
    model = nn.Linear(8, 3)
    x = torch.rand(20, 8)
    task = data.task(train=(x, model(x).argmax(-1)), test=(x, model(x).argmax(-1)))
    made = export(model, tmp_path / "a.pt2", "aotinductor", task=task)
    loaded = runtimes.load(tmp_path / "a.pt2", trusted=True)
    for size in (1, 2, 20):
        assert torch.allclose(loaded(x[:size]), model(x[:size]), atol=1e-5)
    assert loaded.runtime == "aotinductor"
    assert loaded.loaded.record == made.record
    with pytest.raises(ValueError, match=r"of shape \(2, 7\); the model takes .* \(-1, 8\)"):
        loaded(x[:2, :7])


@pytest.mark.parametrize("format", [needs(f) for f in FORMATS[:3] + FORMATS[4:5]])
def test_the_same_model_is_the_same_file_and_tells_nothing_of_this_machine(format, tmp_path):
    model = models.build("lenet-300-100")
    (tmp_path / "again").mkdir()
    paths = path_of(tmp_path, format), path_of(tmp_path / "again", format)
    for path in paths:
        export(model, path, format, task=TASK, agreement=0.8)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    root = str(exporting.Path(exporting.__file__).parents[2]).encode()
    assert root not in first
    assert b".py" not in first
    least = 2 if format == "openvino-fp16" else 4  # bytes of a weight
    assert 0 < len(first) - least * 266_610 < 30_000


def test_torch_files_hold_no_pickle(tmp_path):
    export(models.build("lenet-300-100"), tmp_path / "a.pt2", "torch.export", task=TASK)
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        starts = {entry.filename: archive.read(entry)[:4] for entry in archive.infolist()}
    assert not [name for name, start in starts.items() if start[:2] in (b"PK", b"\x80\x02")]


def test_int8_stays_int8_and_removed_channels_stay_removed(tmp_path):
    model = models.build("lenet-5")
    int8 = compress.quantize_static(model, [IMAGES])
    half = compress.prune_structured(model, TASK)
    plain, small, narrow = (
        export(m, tmp_path / f"{i}.onnx", task=TASK) for i, m in enumerate((model, int8, half))
    )
    assert small.size_bytes < 0.27 * plain.size_bytes
    assert small.record["int8_kernels"] == 3  # what leaves the last layer is not rounded
    assert (small.precision, plain.precision) == ("int8", "float32")
    assert small.record["techniques"] == ["int8 static per channel"]
    weights = {tuple(w.dims) for w in onnx.load(tmp_path / "0.onnx").graph.initializer}
    fewer = {tuple(w.dims) for w in onnx.load(tmp_path / "2.onnx").graph.initializer}
    assert (50, 20, 5, 5) in weights
    assert (50, 20, 5, 5) not in fewer
    assert narrow.size_bytes < 0.4 * plain.size_bytes


@pytest.mark.parametrize("format", [needs("openvino"), needs("torch.export")])
def test_other_formats_keep_int8_too(format, tmp_path):
    model = models.build("lenet-5")
    plain = export(model, path_of(tmp_path, format), format, task=TASK)
    int8 = compress.quantize_static(model, [IMAGES])
    small = export(int8, path_of(tmp_path, format), format, task=TASK)
    assert small.size_bytes < 0.31 * plain.size_bytes
    if format == "openvino":
        assert small.record["int8_kernels"] == 4
    loaded = runtimes.load(path_of(tmp_path, format), trusted=True)
    assert loaded.simulated == small.record["simulated"] == (format == "torch.export")


@pytest.mark.parametrize("format", [needs("onnx"), needs("openvino"), needs("torch.export")])
def test_dynamic_int8_is_exported(format, tmp_path):
    small = compress.quantize_dynamic(models.build("lenet-300-100"))
    made = export(small, path_of(tmp_path, format), format, task=TASK)
    assert made.size_bytes < 0.35 * 266_610 * 4
    answers = runtimes.load(made.path, trusted=True)(IMAGES)
    assert torch.allclose(answers, small(IMAGES), atol=0.02)


def test_openvino_quantizes_by_itself(tmp_path):
    pytest.importorskip("nncf")
    model, task = models.pretrained("lenet-5"), data.fashion_mnist()
    task = replace(task, test=task.test.subset(500), validation=task.validation.subset(100))
    made = export(model, tmp_path / "a.zip", "openvino-int8", task=task, agreement=0.97)
    assert made.record["int8_kernels"] == 4
    assert made.precision == "int8"
    assert "NNCF" in made.record["note"]
    assert made.size_bytes < 0.3 * 431_080 * 4
    assert made.record["versions"].keys() == {"torch", "onnx", "openvino", "nncf"}


def test_parity_counts_equal_answers():
    model = nn.Linear(4, 3)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    answers = model(x).argmax(-1)
    task = data.task(train=(x, answers), test=(x, answers))

    def other(x):
        shifted = model(x).detach().clone()
        shifted[0, (shifted[0].argmax() + 1) % 3] += 100
        return shifted

    found = parity(model, other, task, batch_size=5)  # one of each batch of five is changed
    assert (found.examples, found.agreement) == (10, 0.8)
    assert (found.score_before, found.score_after) == (1.0, pytest.approx(0.8))
    assert found.largest_difference == pytest.approx(100, rel=1e-4)
    assert parity(model, model, task).largest_difference == 0


def test_parity_sees_nan():
    task = data.task(*[(torch.ones(10, 4), torch.zeros(10).long())] * 2)
    found = parity(nn.Linear(4, 3), lambda x: x[:, :3] * np.nan, task)
    assert found.largest_difference == float("inf")


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, wrong = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(50, 4)
    task = data.task(train=(x, model(x).argmax(-1)), test=(x, model(x).argmax(-1)))
    make = exporting._MAKERS["onnx"]
    monkeypatch.setitem(exporting._MAKERS, "onnx", lambda model, *rest: make(wrong, *rest))
    with pytest.raises(ParityError, match=r"same answer to \d+\.\d+% of 50 examples, less than"):
        export(model, tmp_path / "a.onnx", task=task)
    with pytest.raises(ParityError, match=r"accuracy changes from 1\.0000 to 0.* of 0\.003"):
        export(model, tmp_path / "a.onnx", task=task, agreement=0)
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "a.onnx", task=task, agreement=0, tolerance=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


class Determinant(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x) if self.training else torch.det(x)[:, None]


class Values(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


class Branch(nn.Module):
    def forward(self, x):
        return x[:, 0] if x.sum() > 0 else -x[:, 0]


@pytest.mark.parametrize(
    ("layer", "format", "message"),
    [
        (Values(), "onnx", r"no operation for aten._linalg_svd.default of layer 2\.0 \(Values\)"),
        (Branch(), "torch.export", r"cannot trace layer 2\.0 \(Branch\): Could not guard on data"),
        pytest.param(
            Determinant(), "openvino", r"OpenVINO has no operation for Det of layer 2\.0 \(Deter",
            marks=pytest.mark.skipif("openvino" not in runtimes.installed(), reason="no OpenVINO"),
        ),
    ],
)  # fmt: skip
def test_an_operation_that_is_missing_is_named_with_its_layer(layer, format, message, tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (4, 4)), nn.Sequential(layer)).eval()
    task = data.task(*[(torch.rand(20, 16), torch.zeros(20).long())] * 2)
    with pytest.raises(UnsupportedError, match=message):
        export(model, path_of(tmp_path, format), format, task=task)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_told(tmp_path):
    # Not by monkeypatch, which would delete the setting at the end, for all tests after it.
    without = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    task = data.task(*[(torch.rand(20, 3), torch.zeros(20).long())] * 2)
    message = r"AOTInductor cannot compile .* compiler"
    with without, pytest.raises(UnsupportedError, match=message):
        export(nn.Linear(3, 2), tmp_path / "a.pt2", "aotinductor", task=task)


@pytest.mark.parametrize(
    ("model", "name", "format", "error", "message"),
    [
        ("lenet-5", "a.onnx", "tflite", ValueError, r"format is 'tflite'; choose from"),
        ("lenet-5", "a.pt", "torch.export", ValueError, r"a\.pt is to hold torch\.export.*\.pt2"),
        ("lenet-5", "b/a.onnx", "onnx", FileNotFoundError, "there is no folder"),
        (None, "a.onnx", "onnx", TypeError, "model is a NoneType"),
        pytest.param("int8", "a.zip", "openvino-int8", ValueError, "is int8 already; export it in",
                     marks=pytest.mark.skipif("openvino" not in runtimes.installed(),
                                              reason="needs OpenVINO")),
    ],
)  # fmt: skip
def test_refusals_come_before_any_work(model, name, format, error, message, tmp_path):
    if model == "int8":
        model = compress.quantize_static(models.build("lenet-300-100"), [IMAGES])
    elif model:
        model = models.build(model)
    with pytest.raises(error, match=message):
        export(model, tmp_path / name, format, task=TASK)


def test_what_is_simulated_is_said_in_the_file(tmp_path):
    few = compress.quantize_weights(models.build("lenet-300-100"), bits=4)
    made = export(few, tmp_path / "a.onnx", task=TASK)
    loaded = runtimes.load(tmp_path / "a.onnx")
    assert made.record["simulated"]
    assert loaded.simulated
    assert "become float here" in loaded.note
