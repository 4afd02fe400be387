"""The server with keys, signatures, seals and TLS: who is refused, and what is written about it."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_models
import pytest

from workbench import transfer
from workbench.deploy import access
from workbench.deploy.server import Served, serve

RETRY_SECONDS = 10
PAYLOAD = 1234.5678  # a number that must not be seen in a log


def model(factor: float) -> bytes:
    return onnx_models.classifier(np.eye(4) * factor)


def write(repository: Path, name: str, version: int, data: bytes) -> Path:
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def call(
    url: str, key: str | None = None, body: dict | None = None, context=None
) -> tuple[int, dict, dict]:
    """Status, headers and message of the answer."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            text, status, found = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        text, status, found = error.read(), error.code, error.headers
    with contextlib.suppress(ValueError):
        return status, dict(found), json.loads(text)
    return status, dict(found), {"text": text.decode()}


def question() -> dict:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [PAYLOAD, 1, 2, 3]}
    return {"inputs": [tensor]}


def first_output(message: dict) -> float:
    return message["outputs"][0]["data"][0]


class Site:
    """A folder with signed models and keys, and a server on it."""

    def __init__(self, folder: Path):
        self.repository, self.audit = folder / "models", folder / "audit.jsonl"
        self.signers = {
            name: transfer.new_signing_key(folder, name=name) for name in ("ours", "theirs")
        }
        for name in ("double", "other"):
            self.sign(write(self.repository, name, 1, model(2)))
        self.keys = folder / "keys.json"
        make = access.create_key
        self.alice = make(self.keys, "alice", ["infer"], models=["double"])
        self.admin = make(self.keys, "root", ["admin"])
        self.meter = make(self.keys, "prometheus", ["metrics"])
        self.options = (
            "--keys", str(self.keys), "--audit", str(self.audit),
            "--verify-key", str(self.signers["ours"].public),
        )  # fmt: skip

    def sign(self, path: Path, by: str = "ours") -> Path:
        return access.sign_model(path, private_key=self.signers[by].private)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def load(self, server: Served, name: str) -> tuple[int, dict]:
        status, _, message = call(
            f"{server.url}/v2/repository/models/{name}/load", self.admin, {"parameters": {}}
        )
        return status, message


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site) -> Iterator[Served]:
    with serve(site.repository, *site.options) as server:
        yield server


def infer(server: Served, key: str | None, name: str = "double") -> tuple[int, dict, dict]:
    return call(f"{server.url}/v2/models/{name}/infer", key, question())


def test_the_right_key_is_answered(server, site):
    status, _, message = infer(server, site.alice)
    assert (status, first_output(message)) == (200, pytest.approx(2 * PAYLOAD))


def test_health_needs_no_key(server):
    for path in ("live", "ready"):
        assert call(f"{server.url}/v2/health/{path}")[0] == 200


def test_no_key_and_a_wrong_key_are_refused_and_logged(server, site):
    for key in (None, "wb_" + "x" * 43, site.alice[:-1], "Bearer"):
        status, headers, message = infer(server, key)
        assert status == 401
        assert headers["www-authenticate"].startswith("Bearer")
        assert set(message) == {"error"}
        entry = site.lines()[-1]
        assert (entry["event"], entry["status"], entry["name"]) == ("refused", 401, None)
        assert entry["client"] == "127.0.0.1"
    assert infer(server, site.alice)[0] == 200


@pytest.mark.parametrize(
    ("who", "method", "path"),
    [
        ("alice", "POST", "/v2/repository/models/double/load"),
        ("alice", "POST", "/v2/repository/models/double/unload"),
        ("alice", "GET", "/metrics"),
        ("admin", "POST", "/v2/models/double/infer"),
        ("admin", "GET", "/metrics"),
        ("meter", "POST", "/v2/models/double/infer"),
        ("meter", "POST", "/v2/repository/models/double/unload"),
        ("alice", "POST", "/v2/models/other/infer"),
        ("alice", "GET", "/v2/models/other"),
        ("alice", "GET", "/v2/models/other/ready"),
        ("alice", "POST", "/v2/models/other/generate"),
    ],
)
def test_the_wrong_scope_or_model_is_refused_and_logged(server, site, who, method, path):
    body = question() if method == "POST" else None
    status, _, message = call(server.url + path, getattr(site, who), body)
    assert status == 403
    assert set(message) == {"error"}
    entry = site.lines()[-1]
    assert (entry["event"], entry["status"]) == ("refused", 403)
    assert entry["name"] == {"alice": "alice", "admin": "root", "meter": "prometheus"}[who]


def test_a_model_named_in_the_body_is_refused_too(server, site):
    body = {"model": "other", "inputs": [[1, 2, 3, 4]]}
    assert call(f"{server.url}/predict", site.alice, body)[0] == 403
    entry = site.lines()[-1]
    assert (entry["status"], entry["name"], entry["model"]) == (403, "alice", "other")
    body["model"] = "double"
    assert call(f"{server.url}/predict", site.alice, body)[0] == 200


def test_the_index_shows_what_the_key_is_for(server, site):
    _, _, listed = call(f"{server.url}/v2/repository/index", site.alice, {})
    assert {entry["name"] for entry in listed} == {"double"}
    anybody = access.create_key(site.keys, "anybody", ["infer"])
    wait_until(lambda: call(f"{server.url}/v2/repository/index", anybody, {})[0] == 200)
    _, _, listed = call(f"{server.url}/v2/repository/index", anybody, {})
    assert {"double", "other"} <= {entry["name"] for entry in listed}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("GET", "/docs"), ("GET", "/v2/models/double/ready"),
     ("POST", "/v2/repository/index"), ("GET", "/v2/models/double"),
     ("POST", "/predict"), ("POST", "/explain"), ("GET", "/openapi.json"),
     ("POST", "/v2/models/double/generate_stream"),
     ("POST", "/v2/repository/models/double/unload")],
)  # fmt: skip
def test_every_other_route_needs_a_key(server, method, path):
    assert call(server.url + path, None, {} if method == "POST" else None)[0] == 401


def test_metrics_are_for_their_key(server, site):
    status, _, message = call(f"{server.url}/metrics", site.meter)
    assert status == 200
    assert "workbench_requests_total" in message["text"]


def test_too_many_requests_are_refused_and_say_when_to_come_back(server, site):
    slow = access.create_key(site.keys, "slow", ["infer"], rate_per_s=0.5)
    wait_until(lambda: infer(server, slow)[0] == 200)  # the key is known within a second
    status, headers, _ = infer(server, slow)
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 2
    assert site.lines()[-1]["name"] == "slow"
    assert infer(server, site.alice)[0] == 200


def test_an_expired_key_and_a_revoked_one(server, site):
    from datetime import timedelta

    brief = access.create_key(site.keys, "brief", ["infer"], expires_in=timedelta(seconds=4))
    gone = access.create_key(site.keys, "gone", ["infer"])
    wait_until(lambda: infer(server, gone)[0] == 200)
    access.revoke_key(site.keys, "gone")
    wait_until(lambda: infer(server, gone)[0] == 401)
    wait_until(lambda: "expired" in infer(server, brief)[2].get("error", ""))
    entry = site.lines()[-1]
    assert (entry["status"], entry["name"]) == (401, "brief")


def wait_until(condition) -> None:
    end = time.monotonic() + RETRY_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("attack", ["unsigned", "signed again", "bit flipped", "renamed"])
def test_a_swapped_model_is_not_loaded_and_logged(server, site, attack):
    """The version before goes on answering, and the right file is then accepted."""
    path = write(site.repository, "double", 2, model(3))
    try:
        if attack == "signed again":
            site.sign(path, by="theirs")
        elif attack == "bit flipped":
            site.sign(path)
            flip(path)
        elif attack == "renamed":
            for suffix in ("", ".sig"):
                shutil.copy(f"{site.repository}/other/1/model.onnx{suffix}", f"{path}{suffix}")
        status, message = site.load(server, "double")
        assert status == 400
        assert set(message) == {"error"}
        events = [(line["event"], line.get("model"), line.get("version")) for line in site.lines()]
        assert ("model refused", "double", "2") in events[-2:]
        status, _, message = infer(server, site.alice)
        assert (status, first_output(message)) == (200, pytest.approx(2 * PAYLOAD))
    finally:
        shutil.rmtree(path.parent)


def test_a_signed_model_is_swapped_in_and_who_did_it_is_logged(server, site):
    path = write(site.repository, "double", 2, model(2))
    site.sign(path)
    assert site.load(server, "double")[0] == 200
    read, done = site.lines()[-2:]
    assert (read["event"], read["version"], read["signed"]) == ("model read", "2", True)
    assert (done["event"], done["name"], done["model"]) == ("load", "root", "double")
    shutil.rmtree(path.parent)


def test_the_log_has_no_keys_and_no_payloads(server, site):
    infer(server, site.alice)
    call(f"{server.url}/v2/models/double{site.alice}/infer", site.alice, question())
    text = site.audit.read_text()
    for secret in (site.alice, site.admin, site.meter, str(PAYLOAD)):
        assert secret not in text
    assert all(line.keys() >= {"time", "event"} for line in site.lines())


def test_it_listens_on_this_machine_only(server):
    assert server.url.startswith("http://127.0.0.1:")


def test_nothing_starts_with_a_model_that_is_not_signed(site, tmp_path):
    write(tmp_path / "models", "double", 1, model(2))
    with pytest.raises(RuntimeError, match="has no signature"):
        serve(tmp_path / "models", *site.options)


@pytest.mark.parametrize("text", [None, "{}"])
def test_nothing_starts_without_the_file_of_keys(site, tmp_path, text):
    """A mistyped path must not mean that everybody may ask."""
    path = tmp_path / "keys.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RuntimeError, match="file of keys"):
        serve(site.repository, "--keys", str(path))


def test_a_sealed_model_over_tls(tmp_path):
    """The model lies encrypted on disk, the answer travels encrypted, and no plain copy appears."""
    data = model(5)
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(data)
    key = transfer.new_key(tmp_path / "seal.key")
    path = tmp_path / "models" / "double" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    transfer.seal(plain, path, key=key, name="double", version="1", progress=False)
    plain.unlink()
    certificate, private = access.self_signed(tmp_path)
    options = ("--decryption-key", tmp_path / "seal.key", "--tls-cert", certificate,
               "--tls-key", private)  # fmt: skip
    with serve(tmp_path / "models", *map(str, options)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=certificate)
        status, _, message = call(
            f"{server.url}/v2/models/double/infer", None, question(), trusting
        )
        assert (status, first_output(message)) == (200, pytest.approx(5 * PAYLOAD))
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            call(f"{server.url}/v2/health/live", context=ssl.create_default_context())
        with pytest.raises(OSError):  # noqa: PT011, it answers no plain HTTP
            call(server.url.replace("https", "http") + "/v2/health/live")
        assert sorted(os.listdir(path.parent)) == ["model.onnx"]
        weights = np.eye(4, dtype=np.float32).tobytes()
        assert all(
            weights not in found.read_bytes() and data[:200] not in found.read_bytes()
            for found in tmp_path.rglob("*")
            if found.is_file()
        )
    with pytest.raises(RuntimeError, match="does not load"):  # without the key
        serve(tmp_path / "models")


def test_nothing_remains(site):
    with serve(site.repository, *site.options) as server:
        pids = family(server.pid)
        assert len(pids) >= 3  # the server, where workers come from, and workers
        assert infer(server, site.alice)[0] == 200
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    done = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found


def test_the_command_of_the_readme_makes_a_key_that_works(server, site):
    done = subprocess.run(
        [sys.executable, "-m", "workbench.deploy.access", "create", "--keys", str(site.keys),
         "--name", "carol", "--scope", "infer", "--expires", "30d", "--rate", "100"],
        capture_output=True, text=True,
    )  # fmt: skip
    key = done.stdout.strip()
    wait_until(lambda: infer(server, key)[0] == 200)
