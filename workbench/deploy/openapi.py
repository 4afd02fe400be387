"""What the server takes and gives, as an OpenAPI document of the models that are loaded.

Shapes are those of the models, so each has paths of its own. Tensors have as many numbers as their
shape says; OpenAPI cannot say that for any number of examples, so requests of one and two are
described, and more are taken.
"""

import html
import json
import math
from contextlib import suppress

import numpy as np

from workbench import __version__
from workbench.deploy.generation import MOST_SYMBOLS, text_model
from workbench.deploy.loading import ANY, TensorSpec
from workbench.deploy.protocol import NAME_OF, Refused
from workbench.deploy.repository import Repository, Version

_STRING = {"type": "string"}
_ANYTHING = {"type": "object"}


def describe(repository: Repository) -> dict:
    """The document, for what is loaded now."""
    paths = {
        "/v2": {"get": _operation("Name and extensions of the server", _ANYTHING)},
        "/v2/health/live": {"get": _operation("Whether the server runs", _ANYTHING)},
        "/v2/health/ready": {"get": _operation("Whether all models answer", _ANYTHING)},
        "/v2/repository/index": {
            "post": _operation(
                "All models and versions",
                {"type": "array", "items": _ANYTHING},
                _object({"ready": {"type": "boolean"}}, open_=True),
            )
        },
    }
    ready = repository.ready()
    for name, model in ready.items():
        paths |= _repository_paths(name, repository)
        for base, version in [
            (f"/v2/models/{name}", model.default),
            *((f"/v2/models/{name}/versions/{n}", v) for n, v in model.versions.items()),
        ]:
            paths |= _model_paths(base, version)
    if len(ready) == 1:
        (model,) = ready.values()
        paths |= _plain_paths(model.default)
    return {
        "openapi": "3.1.0",
        "info": {"title": "workbench", "version": __version__, "description": __doc__},
        "paths": paths,
    }


def page(document: dict) -> str:
    """The document for people: one HTML page that loads nothing from elsewhere."""
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            schemas = json.dumps(operation, indent=2)
            rows.append(
                f"<details><summary><code>{method.upper()} {html.escape(path)}</code> "
                f"{html.escape(operation['summary'])}</summary>"
                f"<pre>{html.escape(schemas)}</pre></details>"
            )
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f"<h1>{title}</h1><p>For programs: <a href='openapi.json'>openapi.json</a></p>"
        f"{''.join(rows)}</html>"
    )


def _model_paths(base: str, version: Version) -> dict:
    paths = {
        base: {"get": _operation("Inputs and outputs of the model", _ANYTHING)},
        f"{base}/ready": {"get": _operation("Whether the model answers", _ANYTHING)},
        f"{base}/infer": {"post": _infer(version)},
    }
    if not _is_text(version):
        return paths
    symbols = version.record["labels"]
    letters = {"type": "string", "enum": ["".join(symbols[:n]) for n in (1, 2, len(symbols))]}
    asked = _object({
        "text_input": letters,
        "parameters": _object({
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": MOST_SYMBOLS},
            "temperature": {"type": "number", "minimum": 0, "maximum": 100},
            "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        }, open_=True),
    }, required=["text_input"], open_=True)  # fmt: skip
    text = _object({"text_output": _STRING}, required=["text_output"], open_=True)
    event = _object({"data": _STRING}, required=["data"], open_=True)
    stream = _operation("Continue a text, symbol by symbol", event, asked, "text/event-stream")
    return {
        **paths,
        f"{base}/generate": {"post": _operation("Continue a text", text, asked)},
        f"{base}/generate_stream": {"post": stream},
    }


def _repository_paths(name: str, repository: Repository) -> dict:
    versions = {"type": "string", "enum": [*repository.found().get(name, {})]}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    load = _object({"parameters": _object({"version": versions, "share": share})}, open_=True)
    unload = _object({"parameters": _object({"version": versions}, open_=True)}, open_=True)
    base = f"/v2/repository/models/{name}"
    return {
        f"{base}/load": {"post": _operation("Load a version, or swap it", _ANYTHING, load)},
        f"{base}/unload": {"post": _operation("Unload a version, or all", _ANYTHING, unload)},
    }


def _plain_paths(version: Version) -> dict:
    spec = version.signature.inputs[0]
    if len(version.signature.inputs) != 1 or not version.signature.has_batch:
        return {}
    example = _example(spec)
    most = version.signature.most_examples
    asked = {"type": "array", "minItems": 1, "maxItems": most, "items": example}
    answer = _object(
        {"outputs": {"type": "array"}, "classes": {"type": "array"}},
        required=["outputs"],
        open_=True,
    )
    body = _object({"inputs": asked}, required=["inputs"], open_=True)
    paths = {"/predict": {"post": _operation("Outputs and classes", answer, body)}}
    outputs = version.signature.outputs
    if spec.dtype.startswith("float") and len(outputs) == 1 and len(outputs[0].shape) == 2:
        asked = {"type": "array", "minItems": 1, "maxItems": 1, "items": example}
        body = _object({"inputs": asked}, required=["inputs"], open_=True)
        why = "What each number of an example adds to the output of a class"
        paths["/explain"] = {"post": _operation(why, _ANYTHING, body)}
    return paths


def _infer(version: Version) -> dict:
    signature = version.signature
    labels = version.record.get("labels") or []
    # Codes of a text stand for its symbols; as in Python, those below 0 count from the end.
    codes = (-len(labels), len(labels) - 1) if _is_text(version) else None
    requests = []
    for examples in (1, 2) if signature.has_batch else (1,):
        inputs = [_tensor(spec, examples, codes) for spec in signature.inputs]
        listed = {"type": "array", "minItems": len(inputs), "maxItems": len(inputs)}
        listed |= {"items": inputs[0]} if len(inputs) == 1 else {"prefixItems": inputs}
        requests.append({"inputs": listed})
    named = {"name": {"type": "string", "enum": [signature.outputs[0].name]}}
    output = _object(named, required=["name"], open_=True)
    common = {
        "id": _STRING,
        "outputs": {"type": "array", "maxItems": 1, "items": output},
        "parameters": _object({"binary_data_output": {"type": "boolean"}}, open_=True),
    }
    bodies = [_object({**r, **common}, required=["inputs"], open_=True) for r in requests]
    answer = _object(
        {"model_name": _STRING, "model_version": _STRING, "outputs": {"type": "array"}},
        required=["model_name", "model_version", "outputs"],
        open_=True,
    )
    operation = _operation("Outputs for some examples", answer, {"anyOf": bodies})
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["responses"]["200"]["content"]["application/octet-stream"] = binary
    return operation


def _is_text(version: Version) -> bool:
    with suppress(Refused):
        text_model(version.signature, version.record)
        return True
    return False


def _tensor(spec: TensorSpec, examples: int, codes: tuple[int, int] | None) -> dict:
    shape = [examples if n == ANY else n for n in spec.shape]
    return _object({
        "name": {"type": "string", "enum": [spec.name]},
        "datatype": {"type": "string", "enum": [NAME_OF[spec.dtype]]},
        "shape": {"type": "array", "enum": [shape]},
        "data": _nested(spec, [math.prod(shape)], codes),
    }, required=["name", "datatype", "shape", "data"], open_=True)  # fmt: skip


def _example(spec: TensorSpec) -> dict:
    """One example of the plain routes: nested like the input, or flat."""
    inner = [1 if n == ANY else n for n in spec.shape[1:]]
    nested, flat = _nested(spec, inner), _nested(spec, [math.prod(inner)])
    return nested if len(inner) == 1 else {"anyOf": [nested, flat]}


def _nested(spec: TensorSpec, shape: list[int], within: tuple[int, int] | None = None) -> dict:
    """Lists in lists of what the type can hold, or of whole numbers within these."""
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        schema: dict = {"type": "boolean"}
    elif dtype.kind == "f":
        most = float(np.finfo(dtype).max)
        schema = {"type": "number", "minimum": -most, "maximum": most}
    else:
        least, most = within or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        schema = {"type": "integer", "minimum": least, "maximum": most}
    for length in reversed(shape):
        schema = {"type": "array", "minItems": length, "maxItems": length, "items": schema}
    return schema


def _object(properties: dict, *, required: list[str] = (), open_: bool = False) -> dict:
    schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return schema if open_ else {**schema, "additionalProperties": False}


def _operation(
    summary: str, answer: dict, body: dict | None = None, kind: str = "application/json"
) -> dict:
    error = _object({"error": _STRING}, required=["error"])
    wrong = {"description": "What was wrong", "content": {"application/json": {"schema": error}}}
    operation = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": {kind: {"schema": answer}}},
            "4XX": wrong,
            "503": wrong,
            "504": wrong,
        },
    }
    if body is not None:
        required = bool(body.get("required") or body.get("anyOf"))
        content = {"application/json": {"schema": body}}
        operation["requestBody"] = {"required": required, "content": content}
    return operation
