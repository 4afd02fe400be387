import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from workbench.deploy import loading
from workbench.deploy.loading import TensorSpec, load_bytes

WEIGHT = np.arange(8, dtype=np.float32).reshape(4, 2)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def product(
    kind=TensorProto.FLOAT, external: str | None = None, record: str | None = None
) -> bytes:
    """An .onnx file that no tool of the workbench has touched: x @ WEIGHT."""
    weight = numpy_helper.from_array(WEIGHT.astype(helper.tensor_dtype_to_np_dtype(kind)), "weight")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=external)
        weight.external_data.add(key="length", value=str(WEIGHT.nbytes))
    return model(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 2])],
        [weight],
        record,
    )


def model(nodes, inputs, outputs, weights=(), record=None) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(weights))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if record is not None:
        proto.metadata_props.add(key=loading.RECORD, value=record)
    return proto.SerializeToString()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def openvino_file(compression: int = zipfile.ZIP_STORED) -> bytes:
    openvino = pytest.importorskip("openvino")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, loading.XML)
        openvino.save_model(openvino.Core().read_model(product()), path, compress_to_fp16=False)
        parts = {name: Path(folder, name).read_bytes() for name in (loading.XML, loading.WEIGHTS)}
    return zipped(parts, compression)


FILES = {"onnx": product, "openvino": openvino_file}


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_plain_onnx_file_gives_the_answers_of_numpy(batch, seed):
    x = np.random.default_rng(seed).standard_normal((batch, 4), dtype=np.float32)
    (answer,) = PLAIN.run([x])
    np.testing.assert_allclose(answer, x @ WEIGHT, rtol=1e-5, atol=1e-5)


PLAIN = load_bytes(product())


@pytest.mark.parametrize("kind", FILES)
def test_inputs_and_outputs_are_described(kind):
    loaded = load_bytes(FILES[kind]())
    assert loaded.inputs == (TensorSpec("x", "float32", (-1, 4)),)
    assert loaded.outputs == (TensorSpec("y", "float32", (-1, 2)),)
    assert (loaded.runtime, loaded.record) == ({"onnx": "onnxruntime"}.get(kind, kind), {})


@pytest.mark.parametrize("kind", FILES)
def test_arrays_may_be_views_and_read_only_and_answers_stay(kind):
    loaded = load_bytes(FILES[kind]())
    fixed = X.copy()
    fixed.flags.writeable = False
    (first,) = loaded.run([fixed])
    (second,) = loaded.run([X[::-1, ::-1]])
    (third,) = loaded.run([np.frombuffer(X.tobytes(), np.float32).reshape(3, 4)[:1]])
    np.testing.assert_allclose(first, X @ WEIGHT, rtol=1e-5)
    np.testing.assert_allclose(second, X[::-1, ::-1] @ WEIGHT, rtol=1e-5)
    np.testing.assert_allclose(third, X[:1] @ WEIGHT, rtol=1e-5)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([X.astype(np.float64)], r"'x' is float64 of shape \(3, 4\); the model takes float32"),
        ([X[:, :3]], r"of shape \(3, 3\); .* of shape \(-1, 4\), where -1 is any length"),
        ([X[0]], r"of shape \(4,\)"),
        ([X[None]], r"of shape \(1, 3, 4\)"),
        ([], "0 inputs were given; the model takes 1"),
        ([X, X], "2 inputs were given"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(kind, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_bytes(FILES[kind]()).run(arrays)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ONNX Runtime does not load"),
        (b"hello", "ONNX Runtime does not load"),
        (product()[:40], "ONNX Runtime does not load"),
        (b"PK\x03\x04", "the file is damaged"),
        (zipped({"a": b"1"}), r"holds \['a'\]; expected"),
        (product(record="{"), "the record in the file is not JSON"),
        (product(record="[]"), "the record in the file is a list"),
    ],
)
def test_what_is_no_model_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        load_bytes(data)


def test_a_damaged_openvino_file_is_refused():
    for part in (loading.XML, loading.WEIGHTS):
        with zipfile.ZipFile(io.BytesIO(openvino_file())) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        parts[part] = parts[part][: len(parts[part]) // 2]
        with pytest.raises(ValueError, match="OpenVINO does not load"):
            load_bytes(zipped(parts))


def test_a_file_may_be_compressed_but_not_be_a_bomb():
    assert load_bytes(openvino_file(zipfile.ZIP_DEFLATED)).run([X])[0].shape == (3, 2)
    bomb = {loading.XML: b"<net/>", loading.WEIGHTS: bytes(10_000_000)}
    with pytest.raises(ValueError, match=r"bytes would unpack to 10,000,006; a model does not"):
        load_bytes(zipped(bomb, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "/etc/hostname", "absolute"])
def test_a_file_cannot_name_others_as_its_weights(place, tmp_path, monkeypatch):
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside" if place.startswith("..") else tmp_path)
    place = str(tmp_path / "weights.bin") if place == "absolute" else place
    with pytest.raises(ValueError, match="ONNX Runtime does not load"):
        load_bytes(product(external=place))


def test_a_record_is_read():
    assert load_bytes(product(record='{"format": "onnx"}')).record == {"format": "onnx"}


def test_types_are_those_of_numpy():
    loaded = load_bytes(product(TensorProto.DOUBLE))
    assert loaded.inputs[0].dtype == "float64"
    (answer,) = loaded.run([X.astype(np.float64)])
    assert answer.dtype == np.float64
    text = helper.make_tensor_value_info("x", TensorProto.STRING, [1])
    out = helper.make_tensor_value_info("y", TensorProto.STRING, [1])
    with pytest.raises(ValueError, match="'x' is of type string; only"):
        load_bytes(model([helper.make_node("Identity", ["x"], ["y"])], [text], [out]))
    with pytest.raises(ValueError, match="'x' is of type complex64; only"):
        loading._numpy_name("x", "complex64")


def test_threads_are_counted_from_one():
    with pytest.raises(ValueError, match="threads is 0; give 1 or more"):
        load_bytes(product(), threads=0)
    options = load_bytes(product(), threads=2).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_a_torch_file_needs_trust():
    archive = zipped({"archive/archive_format": b"pt2", "archive/data/sample_inputs/model.pt": b""})
    with pytest.raises(ValueError, match="can run code of whoever wrote it"):
        load_bytes(archive)


def test_a_missing_openvino_names_the_extra(monkeypatch):
    data = openvino_file()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[openvino\]"'):
        load_bytes(data)


def test_onnx_runs_without_torch(tmp_path):
    (tmp_path / "model.onnx").write_bytes(product())
    code = (
        "import sys, importlib.util as u, numpy as np;"
        f"spec = u.spec_from_file_location('loading', {str(Path(loading.__file__))!r});"
        "loading = u.module_from_spec(spec); sys.modules['loading'] = loading;"
        "spec.loader.exec_module(loading);"
        "m = loading.load_bytes(open('model.onnx', 'rb').read());"
        "print(m.run([np.ones((1, 4), np.float32)])[0].tolist(), 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == f"{[WEIGHT.sum(0).tolist()]} False"


COME_AND_GO = """
import signal, sys
from workbench.deploy.loading import load_bytes

file = open(sys.argv[1], "rb").read()
first, second = load_bytes(file), load_bytes(file)
del first
del second
signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells make their children deaf
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("it goes on")
"""


def test_a_notebook_survives_an_interrupt_after_openvino_models_have_gone(tmp_path):
    (tmp_path / "model.zip").write_bytes(openvino_file())
    command = [sys.executable, "-X", "faulthandler", "-c", COME_AND_GO, tmp_path / "model.zip"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "it goes on\n"), done.stderr


def test_the_module_itself_needs_only_numpy():
    source = Path(importlib.util.find_spec("workbench.deploy.loading").origin).read_text()
    tops = {line.split()[1].split(".")[0] for line in source.splitlines()
            if line.startswith(("import ", "from "))}  # fmt: skip
    assert tops - set(sys.stdlib_module_names) == {"numpy"}
