import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_models
import psutil
import pytest
import requests
from bad_requests import BAD, BAD_BINARY, body, tensor

from workbench.deploy.protocol import DATATYPES
from workbench.deploy.server import main, serve

WEIGHT = np.array([[1, 0, 2], [0, 1, -2]], np.float32)
LABELS = ["ankle boot", "bag", "coat"]
MOST_BYTES = 2**20
SYMBOLS = "abcdefg "


def write(folder: Path, name: str, version: int, content: bytes) -> Path:
    path = folder / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def plain(weight=WEIGHT, **more) -> bytes:
    return onnx_models.classifier(weight, shape=(2,), record={"labels": LABELS}, **more)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write(folder, "plain", 1, plain())
    write(folder, "types", 1, onnx_models.every_type())
    write(folder, "text", 1, onnx_models.successor(SYMBOLS, 8))
    options = ["--max-batch", "8", "--receive-s", "1", "--body-bytes", str(MOST_BYTES)]
    with serve(folder, *options) as served:
        yield served


def post(server, path: str, content=b"", **headers) -> requests.Response:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(server.url + path, data=content, headers=headers, timeout=20)


def infer(server, values=(1.0, 2.0), model="plain", **more) -> requests.Response:
    x = np.atleast_2d(np.asarray(values, np.float32))
    entry = tensor(shape=[*x.shape], data=x.ravel().tolist())
    return post(server, f"/v2/models/{model}/infer", body(entry, **more))


def outputs(response: requests.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    (entry,) = response.json()["outputs"]
    return np.reshape(entry["data"], entry["shape"])


def assert_still_right(server):
    np.testing.assert_allclose(outputs(infer(server)), [[1.0, 2.0]] @ WEIGHT)


def assert_refused(status: int, text: str, *statuses: int):
    assert 400 <= status < 500, text
    assert not statuses or status in statuses, (status, text)
    assert [*json.loads(text)] == ["error"]


# What the protocol promises


def test_metadata_and_health(server):
    get = lambda path: requests.get(server.url + path, timeout=5)  # noqa: E731
    assert get("/v2").json()["name"] == "workbench"
    assert "binary_tensor_data" in get("/v2").json()["extensions"]
    assert get("/v2/health/live").status_code == get("/v2/health/ready").status_code == 200
    found = get("/v2/models/plain").json()
    assert found["versions"] == ["1"]
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert found["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert get("/v2/models/plain/versions/1").json() == found
    assert get("/v2/models/plain/ready").status_code == 200
    for missing in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/plain/versions/9"):
        assert_refused(get(missing).status_code, get(missing).text, 404)
    index = post(server, "/v2/repository/index").json()
    assert {entry["name"]: entry["state"] for entry in index} == dict.fromkeys(
        ("plain", "text", "types"), "READY"
    )


def test_answers_name_the_model_and_echo_the_id(server):
    answer = infer(server, [[1, 2], [3, 4]], id="request 7").json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == (
        "request 7",
        "plain",
        "1",
    )
    assert "id" not in infer(server).json()


def test_answers_may_be_compressed(server):
    x = np.arange(8 * 3, dtype=np.float64).reshape(8, 3)
    wide = {"name": "in_FP64", "shape": [8, 3], "datatype": "FP64", "data": x.ravel().tolist()}
    others = [
        {"name": f"in_{t}", "shape": [8, 3], "datatype": t, "data": [0] * 24}
        for t in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16",
                  "FP32")
    ]  # fmt: skip
    truth = {"name": "in_BOOL", "shape": [8, 3], "datatype": "BOOL", "data": [True] * 24}
    content = json.dumps({"inputs": [wide, *others, truth]}).encode()
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        response = post(server, "/v2/models/types/infer", pack(content), Content_Encoding=encoding,
                        Accept_Encoding=encoding)  # fmt: skip
        assert response.status_code == 200, response.text
        assert response.headers["content-encoding"] == encoding
        found = {entry["name"]: entry for entry in response.json()["outputs"]}
        assert found["out_FP64"]["data"] == x.ravel().tolist()
        assert found["out_BOOL"]["data"] == [True] * 24
    response = post(server, "/v2/models/types/infer", content, Accept_Encoding="identity")
    assert "content-encoding" not in response.headers


def test_the_plain_route_names_classes(server):
    answer = post(server, "/predict", {"model": "plain", "inputs": [[1, 0], [0, 1]]}).json()
    assert answer["outputs"] == WEIGHT.tolist()
    assert answer["classes"] == ["coat", "bag"]


def test_an_answer_is_sent_at_once_and_in_one_piece(server):
    from workbench.deploy.server import _bound

    # Otherwise the system holds the second part of an answer back for 40 ms.
    with _bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=9) as line:
        line.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
        received = line.recv(2**16)
    assert received.startswith(b"HTTP/1.1 200")
    assert received.endswith(b"}")


def test_many_clients_get_their_own_answers(server):
    rng = np.random.default_rng(0)
    asked = [rng.normal(size=(rng.integers(1, 8), 2)).astype(np.float32) for _ in range(200)]
    with ThreadPoolExecutor(16) as pool:
        for x, y in zip(asked, pool.map(lambda x: outputs(infer(server, x)), asked), strict=True):
            np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-5, atol=1e-5)
    text = requests.get(f"{server.url}/metrics", timeout=5).text
    (count,) = re.findall(r'workbench_requests_total{model="plain",status="200"} (.*)', text)
    assert float(count) >= 200
    for name in ("batch_examples_bucket", "request_seconds_bucket", "queued_examples", "workers",
                 "version_share", "batch_limit"):  # fmt: skip
        assert f"workbench_{name}{{" in text


def test_text_is_continued_at_once_or_symbol_by_symbol(server):
    asked = {"text_input": "ab", "parameters": {"max_tokens": 12, "temperature": 0}}
    answer = post(server, "/v2/models/text/generate", asked).json()
    expected = "".join(SYMBOLS[(2 + n) % len(SYMBOLS)] for n in range(12))
    assert answer["text_output"] == expected
    with requests.post(f"{server.url}/v2/models/text/versions/1/generate_stream", json=asked,
                       stream=True, timeout=5) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert [json.loads(event)["text_output"] for event in events] == [*expected]
    drawn = {"text_input": "a", "parameters": {"max_tokens": 20, "temperature": 30.0, "seed": 3}}
    one, two = (post(server, "/v2/models/text/generate", drawn).json() for _ in range(2))
    assert one == two
    assert one["text_output"] != expected


def test_a_client_that_leaves_a_stream_ends_it(server):
    asked = {"text_input": "ab", "parameters": {"max_tokens": 1000}}
    url = f"{server.url}/v2/models/text/generate_stream"
    with requests.post(url, json=asked, stream=True, timeout=5) as response:
        next(response.iter_lines())
    assert_still_right(server)


@pytest.mark.parametrize("method", ["http", "binary", "gzip", "deflate"])
def test_the_triton_client(server, method):
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("types")
        metadata = client.get_model_metadata("types")
        rng = np.random.default_rng(1)
        asked, arrays = [], {}
        for entry in metadata["inputs"]:
            dtype = entry["datatype"]
            array = rng.integers(0, 2, (2, 3)).astype(DATATYPES[dtype])
            arrays[entry["name"]] = array
            asked.append(http.InferInput(entry["name"], [2, 3], dtype))
            # JSON has no half precision in this client
            as_binary = method != "http" or dtype == "FP16"
            asked[-1].set_data_from_numpy(array, binary_data=as_binary)
        compress = method if method in ("gzip", "deflate") else None
        wanted = None
        if method == "http":
            wanted = [http.InferRequestedOutput(entry["name"], binary_data=False)
                      for entry in metadata["outputs"]]  # fmt: skip
        result = client.infer(
            "types", asked, outputs=wanted, request_id="9",
            request_compression_algorithm=compress, response_compression_algorithm=compress,
        )  # fmt: skip
        assert result.get_response()["id"] == "9"
        for name, array in arrays.items():
            np.testing.assert_array_equal(result.as_numpy(name.replace("in_", "out_")), array)
        with pytest.raises(Exception, match="no model 'other' is loaded"):
            client.infer("other", asked)
        assert len(client.get_model_repository_index()) == 3
    finally:
        client.close()


def test_curl(server, tmp_path):
    content = body().decode()
    command = ["curl", "-s", "-d", content, f"{server.url}/v2/models/plain/infer"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
        assert json.loads(done.stdout)["outputs"][0]["shape"] == [1, 3]


# What it refuses


@pytest.mark.parametrize("kind", BAD)
def test_bad_bodies(server, kind):
    response = post(server, "/v2/models/plain/infer", BAD[kind][0])
    assert_refused(response.status_code, response.text, 400)
    assert_still_right(server)


@pytest.mark.parametrize("kind", [kind for kind in BAD_BINARY if "digits" not in kind])
def test_lying_binary_bodies(server, kind):
    (content, length), _ = BAD_BINARY[kind]
    response = post(
        server, "/v2/models/plain/infer", content, Inference_Header_Content_Length=length
    )
    assert_refused(response.status_code, response.text, 400)
    assert_still_right(server)


BOMB = gzip.compress(b"[" * 2**26)
GZIP = {"Content-Encoding": "gzip"}
INFER, LOAD, GENERATE = (
    "/v2/models/plain/infer", "/v2/repository/models/plain/load", "/v2/models/text/generate",
)  # fmt: skip
WRONG = {
    "gzip bomb": ("POST", INFER, BOMB, GZIP, 413),
    "gzip bomb in a bomb": ("POST", INFER, gzip.compress(BOMB), GZIP, 400),
    "gzip cut": ("POST", INFER, gzip.compress(body())[:-4], GZIP, 400),
    "not gzip": ("POST", INFER, body(), GZIP, 400),
    "brotli": ("POST", INFER, body(), {"Content-Encoding": "br"}, 415),
    "two encodings": ("POST", INFER, body(), {"Content-Encoding": "gzip, gzip"}, 415),
    "64 MB": ("POST", INFER, b"1" * 2**26, {}, 413),
    "one byte too long": ("POST", INFER, b" " * (MOST_BYTES + 1), {}, 413),
    "unknown model": ("POST", "/v2/models/other/infer", body(), {}, 404),
    "unknown version": ("POST", "/v2/models/plain/versions/2/infer", body(), {}, 404),
    "no version": ("POST", "/v2/models/plain/versions//infer", body(), {}, 404),
    "traversal": ("POST", "/v2/models/../../etc/passwd/infer", body(), {}, 404),
    "coded traversal": ("POST", "/v2/models/%2e%2e%2f%2e%2e%2fetc/infer", body(), {}, 404),
    "traversal to load": ("POST", "/v2/repository/models/..%2f..%2fetc/load", b"{}", {}, 404),
    "dots to load": ("POST", "/v2/repository/models/../load", b"{}", {}, 404),
    "traversal by version": (
        "POST", LOAD, b'{"parameters": {"version": "../../1"}}', {}, 404,
    ),
    "zero byte": ("POST", "/v2/models/plain%00/infer", body(), {}, 404),
    "other letters": ("GET", "/v2/models/%ff%fe", b"", {}, 404),
    "long name": ("GET", "/v2/models/" + "a" * 8000, b"", {}, 404),
    "unknown path": ("GET", "/v3", b"", {}, 404),
    "GET to infer": ("GET", INFER, b"", {}, 405),
    "DELETE": ("DELETE", "/v2/models/plain", b"", {}, 405),
    "TRACE": ("TRACE", "/v2", b"", {}, 405),
    "made-up method": ("MAKEUP", "/v2", b"", {}, 405),
    "timeout in text": ("POST", INFER, body(parameters={"timeout": "1"}), {}, 400),
    "timeout below 0": ("POST", INFER, body(parameters={"timeout": -1}), {}, 400),
    "load without file": ("POST", "/v2/repository/models/other/load", b"", {}, 404),
    "load a number": ("POST", LOAD, b'{"parameters": {"version": 1}}', {}, 400),
    "load too much": ("POST", LOAD, b'{"parameters": {"share": 2}}', {}, 400),
    "load a config": ("POST", LOAD, b'{"parameters": {"config": "{}"}}', {}, 400),
    "load with a list": ("POST", LOAD, b'{"parameters": []}', {}, 400),
    "unload what is not there": ("POST", "/v2/repository/models/other/unload", b"", {}, 404),
    "predict without a model": ("POST", "/predict", b'{"inputs": [[1, 2]]}', {}, 400),
    "predict another": ("POST", "/predict", b'{"model": "other", "inputs": [[1, 2]]}', {}, 404),
    "predict text": ("POST", "/predict", b'{"model": "plain", "inputs": "ab"}', {}, 400),
    "predict one flat": ("POST", "/predict", b'{"model": "plain", "inputs": [1, 2]}', {}, 400),
    "predict three numbers": (
        "POST", "/predict", b'{"model": "plain", "inputs": [[1, 2, 3]]}', {}, 400,
    ),
    "predict too many": (
        "POST", "/predict", b'{"model": "plain", "inputs": [[1, 2]' + b", [1, 2]" * 8 + b"]}", {},
        400,
    ),
    "predict of many inputs": (
        "POST", "/predict", b'{"model": "types", "inputs": [[1, 2, 3]]}', {}, 422,
    ),
    "predict beyond float": (
        "POST", "/predict", b'{"model": "plain", "inputs": [[3e38, -3e38]]}', {}, 422,
    ),
    "explain two": ("POST", "/explain", b'{"model": "plain", "inputs": [[1, 2], [1, 2]]}', {}, 400),
    "explain no class": (
        "POST", "/explain", b'{"model": "plain", "inputs": [[1, 2]], "target": 3}', {}, 400,
    ),
    "explain by magic": (
        "POST", "/explain", b'{"model": "plain", "inputs": [[1, 2]], "method": 1}', {}, 400,
    ),
    "generate without text": ("POST", GENERATE, b"{}", {}, 400),
    "generate from nothing": ("POST", GENERATE, b'{"text_input": ""}', {}, 422),
    "generate from unknown": ("POST", GENERATE, b'{"text_input": "xyz"}', {}, 422),
    "stream from unknown": ("POST", GENERATE + "_stream", b'{"text_input": "xyz"}', {}, 422),
    "generate by a classifier": (
        "POST", "/v2/models/plain/generate", b'{"text_input": "ab"}', {}, 422,
    ),
    "generate too much": (
        "POST", GENERATE, b'{"text_input": "ab", "parameters": {"max_tokens": 9999}}', {}, 400,
    ),
    "generate too hot": (
        "POST", GENERATE, b'{"text_input": "ab", "parameters": {"temperature": -1}}', {}, 400,
    ),
    "generate from a strange seed": (
        "POST", GENERATE, b'{"text_input": "ab", "parameters": {"seed": 1e400}}', {}, 400,
    ),
    "codes the model lacks": (
        "POST", "/v2/models/text/infer",
        body({"name": "codes", "shape": [1, 8], "datatype": "INT64", "data": [99] * 8}), {}, 422,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_requests(server, kind):
    method, path, content, headers, status = WRONG[kind]
    head = [f"{method} {path} HTTP/1.1", "Host: a", f"Content-Length: {len(content)}"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    answer = exchange(server, "\r\n".join(head).encode() + b"\r\n\r\n", content)
    assert_refused(*answer, status)
    assert_still_right(server)


def exchange(server, *parts: bytes, end: bool = False) -> tuple[int, str]:
    """Send bytes as they are, and read the answer: its status and its body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        for part in parts:
            line.sendall(part)
        if end:
            line.shutdown(socket.SHUT_WR)
        stream = line.makefile("rb")
        status = stream.readline()
        assert status.startswith(b"HTTP/1.1 "), "the connection closed without an answer"
        headers = {}
        while (header := stream.readline().strip()) != b"":
            name, _, value = header.decode().partition(": ")
            headers[name.lower()] = value
        return int(status.split()[1]), stream.read(int(headers["content-length"])).decode()


def head(*lines: str, first: str = f"POST {INFER} HTTP/1.1", host: str = "Host: a") -> bytes:
    return (
        "\r\n".join([first, host, *lines, "", ""])
        .encode("latin-1")
        .replace(b"\r\n\r\n\r\n", b"\r\n\r\n")
    )


GOOD = body()
CHUNKED = "Transfer-Encoding: chunked"
RAW = {
    "1 MB header": [head("X: " + "a" * 2**20)],
    "1 MB of headers": [head(*(f"X{n}: {'a' * 90}" for n in range(10_000)))],
    "1 MB address": [head(first="GET /" + "a" * 2**20 + " HTTP/1.1")],
    "no HTTP": [b"hello\r\n\r\n"],
    "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n"],
    "HTTP/9.9": [head(first="GET /v2 HTTP/9.9")],
    "HTTP/2": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "no version": [b"GET /v2\r\n\r\n"],
    "space in the address": [head(first="GET /v2 /health HTTP/1.1")],
    "no host": [head(host="X: y")],
    "two hosts": [head("Host: b")],
    "header without colon": [head("nonsense")],
    "space before the colon": [head("Content-Length : 3")],
    "control character": [head("X: a\x00b")],
    "two lengths": [head("Content-Length: 3", "Content-Length: 4"), b"abcd"],
    "length and chunks": [
        head("Content-Length: 5", CHUNKED),
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
    ],
    "negative length": [head("Content-Length: -1")],
    "length in words": [head("Content-Length: ten")],
    "length with a sign": [head("Content-Length: +3"), b"abc"],
    "length beyond 64 bits": [head("Content-Length: " + "9" * 19)],
    "length of 30 digits": [head("Content-Length: " + "9" * 30)],
    "unknown encoding": [head("Transfer-Encoding: gzip"), GOOD],
    "chunk of no size": [head(CHUNKED), b"x\r\nabc\r\n0\r\n\r\n"],
    "chunk of negative size": [head(CHUNKED), b"-3\r\nabc\r\n0\r\n\r\n"],
    "enormous chunk": [head(CHUNKED), b"f" * 15 + b"\r\n" + b"a" * (MOST_BYTES + 1)],
    "too much in chunks": [
        head(CHUNKED),
        (b"10000\r\n" + b"a" * 2**16 + b"\r\n") * 32,
        b"0\r\n\r\n",
    ],
    "slow head": [b"POST /v2/mod"],
    "slow body": [head("Content-Length: 100"), b'{"inputs"'],
    "slow chunks": [head(CHUNKED), b"5\r\nab"],
    "expects too much": [head("Content-Length: 99999999", "Expect: 100-continue")],
}


EXACTLY = {
    "1 MB header": 431, "1 MB of headers": 431, "slow head": 408, "slow body": 408,
    "slow chunks": 408, "enormous chunk": 413, "too much in chunks": 413, "expects too much": 413,
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_what_is_hardly_http(server, kind):
    status, text = exchange(server, *RAW[kind])
    assert_refused(status, text)
    assert status == EXACTLY.get(kind, status)
    assert_still_right(server)


def test_a_second_request_may_not_be_slow_either(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=9) as line:
        line.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
        assert line.recv(2**16).startswith(b"HTTP/1.1 200")
        line.sendall(head("Content-Length: 100") + b"{")
        assert line.recv(2**16).startswith(b"HTTP/1.1 408")


def test_a_body_that_ends_early(server):
    assert_refused(*exchange(server, head("Content-Length: 100"), b"{", end=True), 400, 408)
    assert_still_right(server)


def test_a_refused_body_leaves_the_connection_usable(server):
    with requests.Session() as session:
        url = server.url + INFER
        assert session.post(url, data=b" " * (MOST_BYTES + 1), timeout=9).status_code == 413
        assert session.post(url, data=GOOD, timeout=9).status_code == 200


def test_there_are_many_kinds_of_bad_requests():
    assert len(BAD) + len(BAD_BINARY) + len(WRONG) + len(RAW) > 140


def test_an_answer_is_explained(server):
    pytest.importorskip("captum")
    asked = {"model": "plain", "inputs": [[3, 5]], "target": 2}
    answer = post(server, "/explain", asked).json()
    # Of a linear model, taking an input away lowers the output by just its part.
    np.testing.assert_allclose(answer["attributions"], [[3, 5]] * WEIGHT[:, 2])
    assert (answer["target"], answer["class"]) == (2, "coat")
    response = post(server, "/explain", {**asked, "method": "integrated gradients"})
    assert_refused(response.status_code, response.text, 422)
    assert "this file has ('occlusion',)" in response.text


def test_a_module_is_exported_and_served(blobs):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    with serve(model, task=blobs, name="blobs") as served:
        answer = post(served, "/predict", {"inputs": [[1, 2]]}).json()
        expected = model(torch.tensor([[1.0, 2.0]])).tolist()
        np.testing.assert_allclose(answer["outputs"], expected, rtol=1e-5)
        assert answer["model"] == "blobs"


def test_programs_of_torch_are_served_when_trusted_and_have_gradients(tmp_path, blobs):
    torch = pytest.importorskip("torch")
    pytest.importorskip("captum")
    from workbench.deploy.exporting import export

    model = torch.nn.Linear(2, 3)
    path = tmp_path / "blobs.pt2"
    export(model, path, "torch.export", task=blobs)
    with pytest.raises(RuntimeError, match="can run code of whoever wrote it"):
        serve(path)
    with serve(path, "--trusted") as served:
        answer = post(served, "/explain", {"inputs": [[3, 5]], "target": 1}).json()
        expected = [3, 5] * model.weight[1].detach().numpy()
        np.testing.assert_allclose(answer["attributions"], [expected], rtol=1e-4)


def test_the_page_for_people_loads_nothing_from_elsewhere(server):
    text = requests.get(f"{server.url}/docs", timeout=30).text
    assert "/predict" in text or "/v2/models/" in text
    assert not re.search(r"https?:|//[a-z]|<script|<link", text)


def test_openapi_under_schemathesis(tmp_path):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    write(tmp_path, "plain", 1, plain(WEIGHT / 8))  # no number that fits makes it overflow
    write(tmp_path, "text", 1, onnx_models.successor(SYMBOLS, 8))
    with serve(tmp_path) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 20
        last = [operation for operation in operations if operation.path.endswith("/unload")]
        for operation in [o for o in operations if o not in last] + last:

            @given(case=operation.as_strategy())
            @settings(
                max_examples=10,
                database=None,
                derandomize=True,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[*HealthCheck],
            )
            def check(case):
                case.call_and_validate(timeout=10)

            check()


# What it survives


@contextlib.contextmanager
def asking(server, threads: int = 4, allowed: tuple[int, ...] = (200,)):
    """Ask all the time from several threads; gives the list of what was answered.

    Each entry is a status and the index of the weights that the answer was computed with.
    """
    seen, stop = [], threading.Event()

    def ask():
        with requests.Session() as session:
            while not stop.is_set():
                response = session.post(server.url + INFER, data=GOOD, timeout=20)
                answer = response.json()["outputs"][0]["data"] if response.ok else response.text
                seen.append((response.status_code, answer))

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(ask) for _ in range(threads)]
        try:
            yield seen
        finally:
            stop.set()
        for task in running:
            task.result()
    assert {status for status, _ in seen} <= {*allowed}, [x for x in seen if x[0] not in allowed][
        :3
    ]


def workers_of(server) -> list[psutil.Process]:
    """The processes that compute; the one they are forked from is their parent."""
    (nursery,) = psutil.Process(server.pid).children()
    return nursery.children()


def load(server, **parameters) -> requests.Response:
    return post(server, LOAD, {"parameters": parameters})


def test_swaps_under_load_lose_no_request(tmp_path):
    for version in (1, 2):
        write(tmp_path, "plain", version, plain(WEIGHT * version))
    swaps = 20
    with serve(tmp_path) as served:
        assert outputs(infer(served)).tolist() == ([[1.0, 2.0]] @ (2 * WEIGHT)).tolist()
        with asking(served) as seen:
            for swap in range(swaps):
                response = load(served, version=str(1 + swap % 2))
                assert response.status_code == 200, response.text
        answers = {tuple(answer) for _, answer in seen}
        assert answers == {tuple(([1.0, 2.0] @ (v * WEIGHT)).tolist()) for v in (1, 2)}
        wait_for(lambda: len(workers_of(served)) <= 2)  # the default, and the one before
        text = requests.get(f"{served.url}/metrics", timeout=5).text
        assert f'workbench_swaps_total{{model="plain"}} {swaps}.0' in text


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_killed_worker_is_missed_by_nobody(tmp_path):
    write(tmp_path, "plain", 1, plain(work=40))
    with serve(tmp_path, "--workers", "2") as served, asking(served) as seen:
        for _ in range(4):
            victims = workers_of(served)
            victims[0].kill()
            count = len(seen)
            wait_for(lambda count=count: len(seen) > count + 20)
        for victim in workers_of(served):
            victim.kill()
        count = len(seen)
        wait_for(lambda count=count: len(seen) > count + 20)
        wait_for(lambda: len(workers_of(served)) == 2)


def test_the_nursery_may_be_killed_too(tmp_path):
    write(tmp_path, "plain", 1, plain())
    with serve(tmp_path) as served:
        (nursery,) = psutil.Process(served.pid).children()
        (worker,) = nursery.children()
        nursery.kill()
        worker.kill()
        assert_still_right(served)


def test_overload_is_refused_quickly_and_the_rest_is_answered(tmp_path):
    write(tmp_path, "plain", 1, plain(work=200))
    with serve(tmp_path, "--max-batch", "1", "--queue-ms", "10") as served:
        with asking(served, threads=16, allowed=(200, 429)) as seen:
            time.sleep(1.5)
        statuses = [status for status, _ in seen]
        assert statuses.count(200) > 10
        assert statuses.count(429) > 10
        response = next(answer for status, answer in seen if status == 429)
        assert "too much is waiting" in response
        time.sleep(1.1)
        assert_still_right(served)


def test_a_file_that_is_no_model_changes_nothing(tmp_path):
    path = write(tmp_path, "plain", 1, plain())
    with serve(tmp_path) as served:
        write(tmp_path, "plain", 2, plain()[:-20])
        response = load(served)
        assert_refused(response.status_code, response.text, 400)
        assert "does not load" in response.text
        path.write_bytes(b"")
        assert_refused(load(served, version="1").status_code, response.text, 400)
        assert_still_right(served)
        index = post(served, "/v2/repository/index").json()
        assert [(entry["version"], entry["state"]) for entry in index] == [
            ("1", "READY"), ("2", "UNAVAILABLE"),
        ]  # fmt: skip
        assert "does not load" in index[1]["reason"]


@pytest.mark.parametrize("stored", [False, True])
def test_a_version_with_other_answers_is_not_swapped_in(tmp_path, stored):
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    write(tmp_path, "plain", 1, plain())
    answers = {"y": x @ WEIGHT} if stored else {}
    np.savez(tmp_path / "plain" / "samples.npz", x=x, **answers)
    with serve(tmp_path) as served:
        write(tmp_path, "plain", 2, plain(WEIGHT[:, ::-1].copy()))
        response = load(served)
        assert_refused(response.status_code, response.text, 409)
        assert re.search(r"\d+\.\d% of its answers are like", response.text)
        assert_still_right(served)
        write(tmp_path, "plain", 3, plain(WEIGHT * 1.001))
        assert load(served).json()["version"] == "3"


def test_a_canary_gets_its_share_and_is_promoted_or_ended(tmp_path):
    for version in (1, 2):
        write(tmp_path, "plain", version, plain(WEIGHT * version))
    with serve(tmp_path) as served:
        load(served, version="1")
        assert_still_right(served)
        assert load(served, version="2", share=0.25).status_code == 200
        seen = [infer(served).json()["model_version"] for _ in range(200)]
        assert 20 <= seen.count("2") <= 80
        assert_refused(load(served, version="1", share=0.5).status_code, '{"error": ""}', 409)
        named = [infer(served, model=f"plain/versions/{v}").json() for v in (1, 2)]
        assert [answer["model_version"] for answer in named] == ["1", "2"]
        pids = {worker.pid for worker in workers_of(served)}
        assert load(served, version="2").status_code == 200  # promoted as it is, not loaded again
        assert {worker.pid for worker in workers_of(served)} <= pids
        assert {infer(served).json()["model_version"] for _ in range(20)} == {"2"}
        assert load(served, version="1", share=0).status_code == 200
        assert {infer(served).json()["model_version"] for _ in range(20)} == {"2"}
        post(served, "/v2/repository/models/plain/unload", {"parameters": {"version": "2"}})
        assert infer(served).json()["model_version"] == "1"
        post(served, "/v2/repository/models/plain/unload")
        assert_refused(infer(served).status_code, infer(served).text, 404)
        assert requests.get(f"{served.url}/v2/health/ready", timeout=5).status_code == 503
        assert load(served).status_code == 200


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_version_whose_errors_rise_is_rolled_back(tmp_path, share):
    write(tmp_path, "plain", 1, plain())
    with serve(tmp_path) as served:
        for _ in range(5):
            infer(served)
        write(tmp_path, "plain", 2, plain(np.full((2, 3), 3e38)))  # its answers overflow
        assert load(served, share=share).status_code == 200
        statuses = [infer(served).status_code for _ in range(120)]
        assert 20 <= statuses.count(422) <= 60
        assert statuses.count(422) + statuses.count(200) == 120
        assert statuses[-20:] == [200] * 20
        index = post(served, "/v2/repository/index").json()
        assert "version 2 was rolled back" in index[1]["reason"]
        text = requests.get(f"{served.url}/metrics", timeout=5).text
        assert 'workbench_rollbacks_total{model="plain"} 1.0' in text


def test_a_deadline_that_passes_is_504(tmp_path):
    write(tmp_path, "plain", 1, plain(work=400))
    with serve(tmp_path) as served:
        response = infer(served, parameters={"timeout": 1})
        assert (response.status_code, [*response.json()]) == (504, ["error"])
        assert_still_right(served)


# How it starts and ends


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(tmp_path, how):
    write(tmp_path, "plain", 1, plain())
    served = serve(tmp_path, "--workers", "2")
    processes = family(served.pid)
    assert len(processes) == 4
    if how != "stop":
        os.kill(served.pid, getattr(signal, how))
        wait_for(lambda: not any(map(alive, processes)))
    served.stop()
    assert not any(map(alive, processes))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(served.url.split(":")[-1])), timeout=5)


def test_it_ends_with_the_notebook_even_when_that_is_killed(tmp_path):
    write(tmp_path, "plain", 1, plain())
    code = "import sys, time; from workbench.deploy.server import serve; "
    code += "print(serve(sys.argv[1]).pid, flush=True); time.sleep(60)"
    notebook = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with notebook:
        processes = family(int(notebook.stdout.readline()))
        notebook.kill()
    wait_for(lambda: not any(map(alive, processes)))


def status_or_refused(server) -> int | str:
    """The status of an answer; what comes too late to be accepted is no request in flight."""
    try:
        return infer(server).status_code
    except requests.ConnectionError as error:
        if "refused" not in str(error):
            raise
        return "refused"


@pytest.mark.parametrize(("end", "late"), [("stop", "refused"), ("unload", 404)])
def test_requests_in_flight_are_answered_before_it_ends(tmp_path, end, late):
    write(tmp_path, "plain", 1, plain(work=400))
    with serve(tmp_path, "--max-batch", "1") as served, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(status_or_refused, served) for _ in range(8)]
        wait_for(lambda: any(task.done() for task in asked))
        if end == "stop":
            served.stop()
        else:
            post(served, "/v2/repository/models/plain/unload")
        answers = [task.result() for task in asked]
        assert set(answers) <= {200, late}
        assert answers.count(200) >= 2
        if end == "unload":
            wait_for(lambda: not workers_of(served))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "missing.onnx"], "missing.onnx is no file"),
        (["--repository", "missing"], "missing is no folder"),
        (["--model", "a/b={}"], "cannot be called 'a/b'"),
        (["--model", "{}", "--max-batch", "0"], "most_examples is 0"),
        (["--model", "{}", "--deadline-ms", "0"], "deadline_ms is 0"),
        (["--model", "{}", "--tls-cert", "{}"], "--tls-cert and --tls-key together"),
        (["--model", "{}", "--port", "1", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--repository", "."], "no model file"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    Path("elsewhere/plain.onnx").write_bytes(plain())
    with pytest.raises(SystemExit) as ended:
        main([option.replace("{}", "elsewhere/plain.onnx") for option in options])
    assert ended.value.code == 1
    assert reason in capsys.readouterr().err


def test_the_command_needs_a_model(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "give --model FILE or --repository FOLDER" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="does not load"):
        serve(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="nothing at"):
        serve(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match="needs task="):
        serve(object())
