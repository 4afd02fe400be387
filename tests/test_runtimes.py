import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import two_inputs
from safetensors import safe_open
from torch import nn

from workbench import compress, data, deploy, models
from workbench.compress.computed import MaskedWeight
from workbench.deploy import runtimes

BATCH = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_every_runtime_gives_the_answers_of_the_model():
    model, inputs = two_inputs()
    expected = model(*inputs)
    for runtime in runtimes.installed():
        predictor = deploy.prepare(model, runtime, example_input=inputs)
        assert torch.allclose(predictor(*inputs), expected, atol=1e-5), runtime
        assert (predictor.runtime, predictor.simulated) == (runtime, False)
        assert not predictor(*inputs).requires_grad


openvino = pytest.param(
    "openvino",
    marks=pytest.mark.skipif("openvino" not in runtimes.installed(), reason="needs OpenVINO"),
)


@pytest.mark.parametrize("runtime", ["onnxruntime", "compiled"])
def test_static_int8_runs_on_int8_kernels(runtime):
    model, inputs = two_inputs()
    small = compress.quantize_static(model, [inputs])
    predictor = deploy.prepare(small, runtime, example_input=inputs)
    assert predictor.int8_kernels >= 2
    assert not predictor.simulated
    assert torch.allclose(predictor(*inputs), small(*inputs), atol=0.02)


def test_compiled_int8_stays_int8_for_other_shapes_and_threads():
    model, inputs = two_inputs()
    small = compress.quantize_static(model, [inputs])
    predictor = deploy.prepare(small, "compiled", example_input=inputs)
    kernels = []
    compile_once = predictor._compile
    predictor._compile = lambda *given: kernels.append(compile_once(*given))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(2):
                answer = predictor(*(x[:3] for x in inputs))
                assert torch.allclose(answer, small(*(x[:3] for x in inputs)), atol=0.02)
    finally:
        torch.set_num_threads(threads)
    assert kernels == 2 * [predictor.int8_kernels]
    assert predictor.int8_kernels >= 2


def test_a_resnet_runs_on_int8_convolutions_throughout():
    small = compress.quantize_static(models.build("resnet-8"), [BATCH])
    predictor = deploy.prepare(small, "onnxruntime", example_input=(BATCH,))
    assert predictor.operations["QLinearConv"] == 9
    assert predictor.operations["QLinearAdd"] == 3
    assert predictor.operations["Conv"] == 0


def test_openvino_runs_our_int8_on_its_own_kernels():
    pytest.importorskip("openvino")
    small = compress.quantize_static(models.build("resnet-8"), [BATCH])
    predictor = deploy.prepare(small, "openvino", example_input=(BATCH,))
    assert predictor.operations["Convolution u8"] == 9
    assert predictor.operations["Convolution f32"] == 0
    assert predictor.int8_kernels == 10
    assert not predictor.simulated
    assert torch.allclose(predictor(BATCH), small(BATCH), atol=0.05)


def test_dynamic_int8_runs_on_int8_kernels():
    model = models.build("lenet-300-100").eval()
    small = compress.quantize_dynamic(model)
    predictor = deploy.prepare(small, "onnxruntime", example_input=(BATCH,))
    assert predictor.operations["DynamicQuantizeMatMul"] == predictor.int8_kernels == 2
    assert torch.allclose(predictor(BATCH), small(BATCH), atol=1e-3)


class Reader(nn.Module):
    """An embedding, a recurrent layer and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(81, 64)
        self.recurrent = nn.LSTM(64, 64, num_layers=2, batch_first=True)
        self.out = nn.Linear(64, 81)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.out(self.recurrent(self.embedding(codes))[0])


def test_a_dynamic_lstm_runs_on_its_int8_kernel():
    model = Reader().eval()
    codes = torch.randint(0, 81, (2, 16), generator=torch.Generator().manual_seed(0))
    small = compress.quantize_dynamic(model)
    predictor = deploy.prepare(small, "onnxruntime", example_input=(codes,))
    assert predictor.operations["DynamicQuantizeLSTM"] == 2
    assert predictor.operations["DynamicQuantizeMatMul"] == 1
    assert torch.allclose(predictor(codes), small(codes), atol=0.02)
    plain = deploy.prepare(model, "onnxruntime", example_input=(codes,))
    assert len(predictor.artifact) < 0.4 * len(plain.artifact)


def test_eager_int8_and_few_bits_are_called_simulated():
    model = models.build("lenet-300-100")
    eight = compress.quantize_static(model, [BATCH])
    four = compress.quantize_weights(model, bits=4)
    assert deploy.prepare(eight, example_input=(BATCH,)).simulated
    lowered = deploy.prepare(four, "onnxruntime", example_input=(BATCH,))
    assert lowered.simulated
    assert "4-bit per channel weights become float" in lowered.note
    assert torch.allclose(lowered(BATCH), four(BATCH), atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", openvino])
def test_any_batch_size_after_export(runtime):
    model = models.build("lenet-5")
    predictor = deploy.prepare(model, runtime, example_input=(BATCH[:1],))
    for size in (1, 3, 16, 3):
        answers = predictor(BATCH[:size])
        assert torch.allclose(answers, model(BATCH[:size]), atol=1e-5)
    kept = predictor(BATCH[:3])
    predictor(BATCH[3:6])
    assert torch.equal(kept, predictor(BATCH[:3]))


def test_a_callable_is_a_predictor_without_artifact(tmp_path):
    predictor = deploy.prepare(lambda x: x.numpy().sum((1, 2, 3)), example_input=(BATCH,))
    assert torch.allclose(predictor(BATCH), BATCH.sum((1, 2, 3)), atol=1e-3)
    with pytest.raises(TypeError, match="has no artifact"):
        predictor.save(tmp_path / "model")
    assert deploy.prepare(predictor, example_input=(BATCH,)) is predictor


def test_an_exported_model_answers_alike_in_a_fresh_process(tmp_path):
    small = compress.quantize_static(models.build("lenet-5"), [BATCH])
    predictor = deploy.prepare(small, "onnxruntime", example_input=(BATCH,))
    predictor.save(tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", BATCH.numpy())
    code = (
        "import numpy as np, onnxruntime as o; s = o.InferenceSession('model.onnx');"
        "np.save('y.npy', s.run(None, {s.get_inputs()[0].name: np.load('x.npy')})[0])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), predictor(BATCH).numpy())


def test_an_exported_model_tells_nothing_of_this_machine():
    small = compress.quantize_static(models.build("resnet-8"), [BATCH])
    predictor = deploy.prepare(small, "onnxruntime", example_input=(BATCH,))
    assert str(Path(compress.__file__).parents[2]).encode() not in predictor.artifact
    assert b".py" not in predictor.artifact
    assert len(predictor.artifact) < 1.3 * 77_754  # bytes: one for each parameter, and the graph


def test_a_saved_module_holds_codes_and_ties_once(tmp_path):
    model, _ = two_inputs()
    models.save(compress.quantize_weights(model, bits=8), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert tensors["conv.sources.weight.codes"].dtype == torch.int8
    assert sum("codes" in key for key in tensors) == 5  # six layers, two of them tied


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        models.save(models.build("lenet-5"), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("candidate", "runtime", "device", "error", "message"),
    [
        (nn.Flatten(), "tensorrt", "cpu", ValueError, "choose from"),
        (len, "onnxruntime", "cpu", TypeError, "cannot be lowered"),
        ("model", "eager", "cpu", TypeError, "candidate is a str"),
        pytest.param(
            nn.Flatten(), "eager", "cuda", ValueError, "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(candidate, runtime, device, error, message):
    with pytest.raises(error, match=message):
        deploy.prepare(candidate, runtime, example_input=(BATCH,), device=device)


@pytest.mark.parametrize("runtime", ["onnxruntime", openvino])
def test_a_wrong_input_shape_is_named(runtime):
    predictor = deploy.prepare(models.build("resnet-8"), runtime, example_input=(BATCH,))
    with pytest.raises(ValueError, match=r"\(16, 1, 27, 28\).*takes.*\(-1, 1, 28, 28\)"):
        predictor(BATCH[:, :, 1:])


def test_openvino_computes_a_dynamic_model_in_int8():
    pytest.importorskip("openvino")
    model = models.build("lenet-300-100").eval()
    small = compress.quantize_dynamic(model)
    predictor = deploy.prepare(small, "openvino", example_input=(BATCH,))
    assert predictor.int8_kernels == 2
    assert torch.allclose(predictor(BATCH), small(BATCH), atol=0.02)
    plain = deploy.prepare(model, "openvino", example_input=(BATCH,))
    assert len(predictor.artifact) < 0.3 * len(plain.artifact)


@pytest.mark.parametrize("runtime", ["onnxruntime", openvino])
def test_a_saved_file_is_loaded_again(runtime, tmp_path):
    model, inputs = two_inputs()
    predictor = deploy.prepare(model, runtime, example_input=inputs)
    path = tmp_path / f"model{predictor.suffix}"
    predictor.save(path)
    for source in (path, str(path), path.read_bytes()):
        again = runtimes.load(source, threads=2)
        assert torch.allclose(again(*inputs), predictor(*inputs), atol=1e-6)
        assert (again.runtime, again.model, again.simulated) == (runtime, None, False)
        assert again.artifact == predictor.artifact


def test_a_runtime_that_is_not_installed_is_left_out(monkeypatch):
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        runtimes.importlib.util,
        "find_spec",
        lambda name: None if name == "openvino" else find(name),
    )
    assert runtimes.installed() == ("eager", "compiled", "onnxruntime")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[openvino\]"'):
        deploy.prepare(nn.Linear(2, 2), "openvino", example_input=(torch.rand(1, 2),))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_answers_of_the_cpu():
    model, inputs = two_inputs()
    for runtime in ("eager", "compiled"):
        predictor = deploy.prepare(model, runtime, example_input=inputs, device="cuda")
        assert torch.allclose(predictor(*inputs).cpu(), model(*inputs), atol=1e-3)


def test_eager_answers_without_multiplying_by_masks():
    pruned = compress.prune(models.build("lenet-5"), sparsity=0.9)
    predictor = deploy.prepare(pruned, example_input=(torch.rand(1, 1, 28, 28),))
    assert not any(isinstance(module, MaskedWeight) for module in predictor.running.modules())
    assert any(isinstance(module, MaskedWeight) for module in pruned.modules())
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(predictor.predict(x), pruned(x))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
@pytest.mark.parametrize("make", [
    compress.prune,
    lambda model: compress.make_permanent(compress.prune(model)),
    compress.share_weights,
])  # fmt: skip
def test_zeros_and_shared_values_are_simulated(runtime, make):
    small = make(models.build("lenet-5"))
    predictor = deploy.prepare(small, runtime, example_input=(torch.rand(1, 1, 28, 28),))
    assert predictor.simulated
    if "zero" in predictor.note:
        assert "50.0% of the weights are zero, and are multiplied like the others" in predictor.note


def test_removed_channels_are_real():
    task = data.task(*[(torch.rand(8, 1, 28, 28), torch.arange(8))] * 3)
    small = compress.prune_structured(models.build("lenet-5"), task)
    assert not deploy.prepare(small, example_input=task.example_input).simulated
