"""The container and what runs it: each file by its schema or its own tool, and one build."""

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import workbench

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILES = [ROOT / "Dockerfile", ROOT / ".dockerignore", ROOT / "compose.yaml",
         *(path for path in sorted(DEPLOY.iterdir()) if path.is_file())]  # fmt: skip


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def tool(name: str) -> str:
    """A program, of this Python's environment or of the machine; the test is skipped without it."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)


# Dockerfile


def instructions() -> list[tuple[str, str]]:
    """Instruction and argument of each line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def stage() -> list[tuple[str, str]]:
    """The last stage, which is the image."""
    found = instructions()
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


def healthcheck() -> list[str]:
    text = dict(stage())["HEALTHCHECK"]
    return json.loads(text[text.index("[") :])


def test_hadolint_finds_nothing():
    done = run(tool("hadolint"), ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_not_root_s_and_nothing_runs_as_root_in_its_last_stage():
    words = [word for word, _ in stage()]
    user = dict(stage())["USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)  # a number: Kubernetes cannot read names
    assert "RUN" not in words
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_nothing_is_compiled_and_every_version_is_locked():
    text = " ".join(argument for word, argument in instructions() if word == "RUN")
    assert "--only-binary=:all:" in text
    assert "--constraint=requirements.lock" in text
    assert not re.search(r"\b(gcc|g\+\+|build-essential|apt-get|curl|wget)\b", text)


def test_it_has_a_health_check_of_the_protocol_and_starts_without_a_shell():
    found = dict(stage())
    assert "--timeout=" in found["HEALTHCHECK"]
    command = healthcheck()
    assert "/v2/health/ready" in command[2]
    assert command[0] == "python3"
    compile(command[2], "healthcheck", "exec")
    start = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    assert start[:3] == ["python3", "-m", "workbench.deploy.server"]


def options_of_the_server() -> set[str]:
    done = run(sys.executable, "-m", "workbench.deploy.server", "--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def test_every_option_that_a_file_gives_the_server_exists():
    given = json.loads(dict(stage())["ENTRYPOINT"]) + json.loads(dict(stage())["CMD"])
    given += yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["server"]["command"]
    given += documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    given += documents("kserve.yaml")[0]["spec"]["containers"][0]["args"]
    given += re.findall(r"--[a-z]+(?= /models)", (DEPLOY / "run.sh").read_text())
    used = {str(text).split("=")[0] for text in given if str(text).startswith("--")}
    assert len(used) > 5
    assert used <= options_of_the_server()


def test_only_what_is_needed_travels_to_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    copied = [
        word
        for kind, argument in instructions()
        if kind == "COPY" and "--from" not in argument
        for word in argument.split()[:-1]
    ]
    assert {line[1:] for line in lines if line[0] == "!"} == set(copied)


def served_packages() -> set[str]:
    """All that the server in the container needs, and what that needs in turn."""
    lines = (DEPLOY / "serve.txt").read_text().splitlines()
    wanted = [line.split("#")[0].strip() for line in lines if line[0] != "#"]
    found = set()
    while wanted:
        package = canonicalize_name(wanted.pop())
        if package not in found:
            found.add(package)
            needs = map(Requirement, metadata.requires(package) or [])
            wanted += [
                n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})
            ]
    return found


def test_what_the_server_needs_is_in_the_lock_and_leaves_torch_out():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert served_packages() <= {line.split("==")[0] for line in lines if line[0] != "#"}
    large = {"torch", "onnx", "pandas", "scipy", "numba", "jupyterlab", "matplotlib"}
    assert not served_packages() & large


def test_the_server_starts_where_nothing_else_is_installed():
    """Nor torch; what only helps others when it is there is missing too."""
    packages = served_packages() | {"workbench"}
    others = {
        name
        for name, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & packages
    }
    code = f"""
import sys
class Refuse:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {others}:
            raise ModuleNotFoundError(f"{{name}} is not in deploy/serve.txt", name=name)
for name in {others}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse)
import workbench.deploy.connection, workbench.deploy.routes, workbench.deploy.server
import workbench.deploy.worker, onnxruntime
from workbench import transfer
from workbench.deploy import access
transfer.verify_signature, transfer.key_from_file
import model_signing.verifying
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


# Compose, Prometheus, nginx, Kubernetes, KServe


def test_compose_follows_its_schema():
    schema = pytest.importorskip("check_jsonschema", reason="its copy of the schema is needed")
    import jsonschema

    folder = Path(schema.__file__).parent / "builtin_schemas" / "vendor"
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    jsonschema.validate(compose, json.loads((folder / "compose-spec.json").read_text()))


def test_compose_gives_no_rights_and_listens_on_this_machine_only():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"cpus", "memory", "pids"} == set(service["deploy"]["resources"]["limits"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "ports" not in compose["services"]["server"]
    assert compose["services"]["server"]["networks"] == ["inside"]
    assert compose["networks"]["inside"] == {"internal": True}


def test_compose_names_files_that_exist_or_are_told_of():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    told = (DEPLOY / "README.md").read_text()
    for secret in compose["secrets"].values():
        path = secret["file"]
        assert path.startswith("./deploy/secrets/")
        stem = Path(path).name
        assert stem in told or "server.*" in told
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).is_file()
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().split()


def test_prometheus_reads_its_file():
    done = run(tool("promtool"), "check", "config", "--syntax-only", DEPLOY / "prometheus.yml")
    assert done.returncode == 0, done.stderr


def test_prometheus_asks_the_server_with_a_key():
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["server:8000"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key"


def test_nginx_reads_its_file(tmp_path):
    from workbench.deploy import access

    nginx = tool("nginx")
    certificate, key = access.self_signed(tmp_path)
    text = (DEPLOY / "nginx.conf").read_text().replace("/tmp/", f"{tmp_path}/")
    text = text.replace("server server:8000", "server 127.0.0.1:8000")
    text = text.replace("/run/secrets/certificate_key", str(key))
    text = text.replace("/run/secrets/certificate", str(certificate))
    (tmp_path / "nginx.conf").write_text(text)
    done = run(nginx, "-t", "-c", tmp_path / "nginx.conf", "-p", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.replace("warn;", "")


def test_the_proxy_limits_time_and_size():
    text = (DEPLOY / "nginx.conf").read_text()
    for name in ("client_header_timeout", "client_body_timeout", "send_timeout",
                 "proxy_connect_timeout", "proxy_read_timeout", "client_max_body_size",
                 "large_client_header_buffers", "limit_conn "):  # fmt: skip
        assert name in text, name
    assert "ssl_protocols TLSv1.2 TLSv1.3;" in text


def pods() -> dict[str, dict]:
    """The pods that Kubernetes would start, of both files."""
    deployment, runtime = documents("kubernetes.yaml")[0], documents("kserve.yaml")[0]
    kserve = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    return {"kubernetes": deployment["spec"]["template"]["spec"], "kserve": kserve}


def validate_kubernetes(document: dict) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    latest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document, latest, strict=True)


@pytest.mark.parametrize("number", [0, 1])
def test_kubernetes_accepts_each_document(number):
    validate_kubernetes(documents("kubernetes.yaml")[number])


def test_kubernetes_accepts_the_pod_of_kserve():
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pods()["kserve"]}
    validate_kubernetes(pod)


def test_the_check_of_kubernetes_would_notice():
    document = documents("kubernetes.yaml")[0]
    document["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(Exception, match="readinesProbe"):
        validate_kubernetes(document)


def kserve_fields(kind: str) -> dict[str, str]:
    """Field in YAML -> its type, of a class of KServe's Python client; its source is only read."""
    spec = importlib.util.find_spec("kserve")
    if spec is None:
        pytest.skip("kserve is not installed (pip install --no-deps kserve)")
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower()
    tree = ast.parse((Path(spec.origin).parent / "models" / f"{module}.py").read_text())
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    return {found["attribute_map"][name]: kind for name, kind in found["openapi_types"].items()}


def check_kserve(value: object, kind: str, where: str) -> None:
    """Every field is known and of its type; Kubernetes' own types are checked elsewhere."""
    if kind.startswith("list["):
        assert isinstance(value, list), where
        for item in value:
            check_kserve(item, kind[5:-1], where)
    elif re.match(r"V1(alpha1|beta1)", kind):
        known = kserve_fields(kind)
        for name, inner in value.items():
            assert name in known, f"{where}.{name}"
            check_kserve(inner, known[name], f"{where}.{name}")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, where


@pytest.mark.parametrize(
    ("number", "kind"), [(0, "V1alpha1ServingRuntime"), (1, "V1beta1InferenceService")]
)
def test_kserve_knows_every_field(number, kind):
    document = documents("kserve.yaml")[number]
    assert kind == "V1" + document["apiVersion"].split("/v1")[1] + document["kind"]
    check_kserve(document, kind, kind)
    with pytest.raises(AssertionError, match=r"spec\.predictr"):
        check_kserve({"spec": {"predictr": {}}}, "V1beta1InferenceService", "x")


def test_the_model_of_kserve_finds_its_runtime():
    runtime, service = documents("kserve.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"]["name"] in [known["name"] for known in formats]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


@pytest.mark.parametrize("name", ["kubernetes", "kserve"])
def test_pods_have_no_rights_and_limits_and_probes(name):
    pod = pods()[name]
    (container,) = pod["containers"]
    rights = pod.get("securityContext", {}) | container["securityContext"]
    assert rights["runAsNonRoot"] is True
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    assert str(rights["runAsUser"]) == dict(stage())["USER"].split(":")[0]
    assert set(container["resources"]) == {"requests", "limits"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_service_leads_to_the_deployment():
    deployment, service = documents("kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    ports = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert service["spec"]["ports"][0]["targetPort"] in [port["name"] for port in ports]


def test_images_have_the_version_of_the_package():
    for path in (ROOT / "compose.yaml", DEPLOY / "kubernetes.yaml", DEPLOY / "kserve.yaml"):
        found = re.findall(r"workbench-server:([\w.]+)", path.read_text())
        assert found == [workbench.__version__], path


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (DEPLOY / "README.md").read_text())
    assert len(links) >= 6
    assert all((DEPLOY / link).exists() for link in links)


@pytest.mark.parametrize("name", ["build.sh", "run.sh"])
def test_scripts_are_sound(name):
    assert (DEPLOY / name).stat().st_mode & 0o100
    assert run("bash", "-n", DEPLOY / name).returncode == 0
    assert "set -euo pipefail" in (DEPLOY / name).read_text()


# One build


@pytest.mark.skipif(
    os.environ.get("WORKBENCH_CONTAINER") != "1"
    or os.geteuid() != 0
    or not shutil.which("buildah"),
    reason="takes minutes: set WORKBENCH_CONTAINER=1, as root, with buildah and mmdebstrap",
)
def test_the_container_answers_as_a_user_without_rights(tmp_path):
    """Built and run by the documented commands; a health check, an inference, and what it is."""
    built = run(DEPLOY / "build.sh", env=os.environ | {"PYTHON": sys.executable})
    assert built.returncode == 0, built.stderr
    model = tmp_path / "models" / "double" / "1" / "model.onnx"
    write_doubling_model(model)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        with contextlib.suppress(PermissionError):
            path.chmod(0o755)
    port = free_port()
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [DEPLOY / "run.sh", tmp_path / "models", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/v2/health/ready", process, log)
        check = healthcheck()[2].replace(":8000", f":{port}")
        assert run(sys.executable, "-c", check).returncode == 0
        array = np.arange(4, dtype=np.float32)
        tensor = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": array.tolist()}
        answer = ask(f"{url}/v2/models/double/infer", {"inputs": [tensor]})
        assert answer["outputs"][0]["data"] == (2 * array).tolist()
        servers = processes_of(port)
        assert servers
        for pid in servers:
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^Uid:\s+10001\s+10001\s+10001\s+10001$", status, re.MULTILINE)
            assert re.search(r"^Gid:\s+10001", status, re.MULTILINE)
            effective = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)[1]
            assert int(effective, 16) == 0
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    assert not processes_of(port)


def write_doubling_model(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "double", *([s] for s in sides)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read() or b"{}")


def wait_for(url: str, process: subprocess.Popen, log) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        log.seek(0)
        assert process.poll() is None, log.read()
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            ask(url)
            return
        time.sleep(0.2)
    raise AssertionError(log.read())


def processes_of(port: int) -> list[int]:
    """Processes whose command line names this port and the server."""
    found, wanted = [], str(port).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program, *words = path.read_bytes().split(b"\0")
            if program.endswith(b"python3") and {b"workbench.deploy.server", wanted} <= {*words}:
                found.append(int(path.parent.name))
    return found
