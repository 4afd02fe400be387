"""What the server answers: the Open Inference Protocol, and some plainer routes.

A handler reads and checks, hands arrays to the batcher, and writes the answer. It never computes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response, StreamingResponse

from workbench import __version__
from workbench.deploy import access, protocol
from workbench.deploy.connection import RECEIVE_S
from workbench.deploy.generation import MOST_SYMBOLS, generate, text_model
from workbench.deploy.loading import TensorSpec
from workbench.deploy.metrics import CONTENT_TYPE, Metrics
from workbench.deploy.openapi import describe, page
from workbench.deploy.protocol import Refused, whole, write_json
from workbench.deploy.repository import Repository, Version

logger = logging.getLogger(__name__)

BODY_BYTES = 2**24
DEADLINE_MS = 10_000.0
_SMALL_BYTES = 1024  # an answer shorter than that is not worth compressing


@dataclass(frozen=True)
class Settings:
    """What a server allows its clients.

    Attributes:
        body_bytes: longest body of a request, also after decompression.
        deadline_ms: longest wait for an answer; a request may ask for less by its ``timeout``.
        receive_s: longest time for a request to arrive.
    """

    body_bytes: int = BODY_BYTES
    deadline_ms: float = DEADLINE_MS
    receive_s: float = RECEIVE_S

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not getattr(self, entry.name) > 0:
                raise ValueError(f"{entry.name} is {getattr(self, entry.name)}; give more than 0")


class Service:
    """The routes of one server, as an ASGI application.

    Args:
        repository: its models.
        keys: those that clients need; None lets anybody ask who reaches the server.
        audit: where it is written what an administrator does.
    """

    def __init__(
        self,
        repository: Repository,
        metrics: Metrics,
        settings: Settings,
        keys: access.Keys | None = None,
        audit: access.Audit | None = None,
    ):
        self.repository, self.metrics, self.settings = repository, metrics, settings
        self.keys, self.audit = keys, audit
        self.app = FastAPI(
            title="workbench", version="2", openapi_url=None, redoc_url=None, docs_url=None
        )
        self.app.add_exception_handler(HTTPException, _no_route)
        routes = []  # the busiest first, for they are tried in order
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                ("POST", f"{base}/infer", self.infer, "infer"),
                ("GET", base, self.model_metadata, "infer"),
                ("GET", f"{base}/ready", self.model_ready, "infer"),
                ("POST", f"{base}/generate", self.generate, "infer"),
                ("POST", f"{base}/generate_stream", self.generate_stream, "infer"),
            ]
        routes += [
            ("POST", "/predict", self.predict, "infer"),
            ("POST", "/explain", self.explain, "infer"),
            ("GET", "/v2", self.server_metadata, None),
            ("GET", "/v2/health/live", self.live, None),
            ("GET", "/v2/health/ready", self.ready, None),
            ("POST", "/v2/repository/index", self.index, "infer"),
            ("POST", "/v2/repository/models/{model}/load", self.load, "admin"),
            ("POST", "/v2/repository/models/{model}/unload", self.unload, "admin"),
            ("GET", "/metrics", self.metrics_text, "metrics"),
            ("GET", "/openapi.json", self.openapi, "infer"),
            ("GET", "/docs", self.docs, "infer"),
        ]
        self._infer = self._guarded(self.infer, "infer")
        self._predict = self._guarded(self.predict, "infer")
        for method, path, handler, scope in routes:
            self.app.router.add_route(path, self._guarded(handler, scope), methods=[method])

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """ASGI. uvicorn's ``receive`` belongs to what knows whether the client is still there."""
        cycle = getattr(receive, "__self__", None)
        scope["gone"] = lambda: getattr(cycle, "disconnected", False)
        if scope["http_version"] not in ("1.0", "1.1"):
            reason = f"HTTP/{scope['http_version']} is not spoken here; use HTTP/1.1"
            await _error(Refused(400, reason))(scope, receive, send)
            return
        handler = self._at_once(scope)
        if handler is None:
            await self.app(scope, receive, send)
        else:
            response = await handler(Request(scope, receive, send))
            await response(scope, receive, send)

    def _at_once(self, scope: dict) -> Callable[[Request], Awaitable[Response]] | None:
        """The handler of the two busiest addresses; to search for it takes a tenth of a request."""
        if scope["method"] != "POST":
            return None
        if scope["path"] == "/predict":
            scope["path_params"] = {}
            return self._predict
        match scope["path"].split("/"):
            case ["", "v2", "models", model, "infer"] if model:
                scope["path_params"] = {"model": model}
                return self._infer
        return None

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], scope: str | None
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler, after the key is checked; refusals become answers, and all are counted."""

        async def guarded(request: Request) -> Response:
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                if self.keys is not None and scope is not None:
                    self._check_key(request, scope)
                response = await handler(request)
            except Refused as refused:
                response = _error(refused)
            except Exception:
                logger.exception("%s %s", request.method, request.url.path)
                response = _error(Refused(500, "the server failed to answer; its log says why"))
            name = request.path_params.get("model") or getattr(request.state, "model", "")
            known = name if name in self.repository.models else ""
            self.metrics.request(known, response.status_code, loop.time() - began)
            return response

        return guarded

    def _check_key(self, request: Request, scope: str) -> None:
        token = access.bearer(request.headers.get("authorization"))
        client = request.client.host if request.client else None
        model = request.path_params.get("model")
        request.state.caller = self.keys.check(token, scope, model, client=client)

    async def infer(self, request: Request) -> Response:
        """The protocol's own route."""
        name, number = request.path_params["model"], request.path_params.get("version")
        self.repository.pick(name, number).batcher.check_room()  # before a body is read for nothing
        body = await self._body(request)
        version = self.repository.pick(name, number)
        header_length = request.headers.get(protocol.HEADER_LENGTH)
        asked = protocol.read_request(body, header_length, version.signature)
        outputs = await self._submit(
            request, version, asked.arrays, asked.examples, asked.parameters
        )
        content, length = protocol.write_answer(
            asked, version.model, version.number, outputs, version.signature
        )
        if length is None:
            return self._answer(request, content)
        headers = {"Inference-Header-Content-Length": str(length)}
        return self._answer(request, content, "application/octet-stream", headers)

    async def predict(self, request: Request) -> Response:
        """The plain route: a list of examples in, outputs and classes out."""
        _, version, array = await self._examples(request)
        if len(array) > version.signature.most_examples:
            most = version.signature.most_examples
            raise Refused(400, f"the request has {len(array)} examples; send at most {most}")
        outputs = await self._submit(request, version, [array], len(array), {})
        protocol.check_finite(outputs[0])
        answer = {"model": version.model, "version": version.number, "outputs": outputs[0]}
        if outputs[0].ndim == 2:
            answer["classes"] = _labels(version, outputs[0].argmax(-1))
        return self._answer(request, write_json(answer))

    async def explain(self, request: Request) -> Response:
        """What each number of one example adds to the output of one class."""
        message, version, array = await self._examples(request)
        if len(array) != 1:
            raise Refused(400, f"inputs has {len(array)} examples; one at a time is explained")
        outputs = await self._submit(request, version, [array], 1, {})
        if outputs[0].ndim != 2:
            raise Refused(422, "only models that classify whole examples are explained")
        classes = outputs[0].shape[1]
        target = whole(message.get("target", int(outputs[0].argmax())))
        if target is None or not 0 <= target < classes:
            raise Refused(400, f"target is no class; give one from 0 to {classes - 1}")
        method = message.get("method")
        if method is not None and type(method) is not str:
            raise Refused(400, "method is not a string")
        found = await version.explain(
            self.repository.nursery, [array], target=target, method=method
        )
        protocol.check_finite(found)
        answer = {
            "model": version.model, "version": version.number, "target": target,
            "class": _labels(version, [target])[0], "attributions": found,
        }  # fmt: skip
        return self._answer(request, write_json(answer))

    async def generate(self, request: Request) -> Response:
        """Text at once."""
        version, pieces = await self._text(request)
        text = "".join([piece async for piece in pieces])
        answer = {"model_name": version.model, "model_version": version.number, "text_output": text}
        return self._answer(request, write_json(answer))

    async def generate_stream(self, request: Request) -> Response:
        """Text symbol by symbol, as server-sent events."""
        version, pieces = await self._text(request)
        named = {"model_name": version.model, "model_version": version.number}
        # The first symbol comes before the status is sent: what is refused gets its own.
        first = await anext(pieces)

        async def events() -> AsyncIterator[bytes]:
            yield _event({**named, "text_output": first})
            try:
                async for piece in pieces:
                    yield _event({**named, "text_output": piece})
            except Refused as refused:
                yield _event({"error": refused.reason})

        return StreamingResponse(events(), media_type="text/event-stream")

    async def server_metadata(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_repository", "generate"]
        return _json({"name": "workbench", "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        models = self.repository.models.values()
        ready = bool(models) and all(model.default is not None for model in models)
        return _json({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        version = self._version(request)
        return _json({"name": version.model, "ready": True})

    async def model_metadata(self, request: Request) -> Response:
        version = self._version(request)
        model = self.repository.models[version.model]
        return _json({
            "name": version.model,
            "versions": sorted(model.versions, key=int),
            "platform": version.record.get("format", "onnx"),
            **{key: [
                {"name": spec.name, "datatype": protocol.NAME_OF[spec.dtype], "shape": spec.shape}
                for spec in getattr(version.signature, key)
            ] for key in ("inputs", "outputs")},
            "parameters": {"most_examples": version.signature.most_examples},
        })  # fmt: skip

    async def index(self, request: Request) -> Response:
        message = protocol.read_object(await self._body(request) or b"{}")
        caller = getattr(request.state, "caller", None)
        listed = self.repository.index()
        if caller is not None and caller.models is not None:
            listed = [entry for entry in listed if entry["name"] in caller.models]
        only_ready = message.get("ready", False)
        if type(only_ready) is not bool:
            raise Refused(400, f"ready is {only_ready!r:.40}; give true or false")
        if only_ready:
            listed = [entry for entry in listed if entry["state"] == "READY"]
        return _json(listed)

    async def load(self, request: Request) -> Response:
        parameters = await self._parameters(request)
        unknown = sorted(set(parameters) - {"version", "share"})
        number, share = parameters.get("version"), parameters.get("share", 1.0)
        if unknown:
            raise Refused(400, f"parameters {unknown} are not offered; give version or share")
        if number is not None and type(number) is not str:
            raise Refused(400, f"version is {number!r:.40}; give a string such as '2'")
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise Refused(400, f"share is {share!r:.40}; give a number from 0 to 1")
        name = request.path_params["model"]
        try:
            version = await self.repository.load(name, number, share)
        except Refused as refused:
            self._note(request, "load refused", model=name, version=number, reason=refused.reason)
            raise
        self._note(request, "load", model=name, version=version.number, share=share)
        return _json({"name": name, "version": version.number, "share": share})

    async def unload(self, request: Request) -> Response:
        parameters = await self._parameters(request)
        number = parameters.get("version")
        if number is not None and type(number) is not str:
            raise Refused(400, f"version is {number!r:.40}; give a string such as '2'")
        name = request.path_params["model"]
        await self.repository.unload(name, number)
        self._note(request, "unload", model=name, version=number)
        return _json({"name": name})

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return _json(describe(self.repository))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(page(describe(self.repository)))

    def _version(self, request: Request) -> Version:
        return self.repository.pick(
            request.path_params["model"], request.path_params.get("version")
        )

    def _named(self, request: Request, message: dict) -> Version:
        """The version for a plain route: of the model named in the body, or of the only one."""
        name = message.get("model")
        ready = self.repository.ready()
        if name is None and len(ready) == 1:
            (name,) = ready
        if type(name) is not str:
            raise Refused(400, f"model is {name!r:.40}; name one of {[*ready]}")
        request.state.model = name
        caller = getattr(request.state, "caller", None)
        if caller is not None and caller.models is not None and name not in caller.models:
            refused = Refused(403, "the key is not for this model")
            self._note(request, "refused", status=403, reason=refused.reason, model=name)
            raise refused
        return self.repository.pick(name)

    async def _body(self, request: Request) -> bytes:
        """The body, decompressed, of at most the bytes that are allowed. Raises `Refused`."""
        most = self.settings.body_bytes
        too_long = f"the body is longer than {most} bytes; send less at once"
        length = request.headers.get("content-length")
        if length is not None:
            if "transfer-encoding" in request.headers:
                raise Refused(400, "Content-Length and Transfer-Encoding contradict each other")
            if int(length) > most:
                raise Refused(413, too_long)
        parts, received = [], 0
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client left")
            parts.append(message["body"])
            received += len(message["body"])
            if received > most:
                raise Refused(413, too_long)
            if not message.get("more_body"):
                break
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        encoding = request.headers.get("content-encoding")
        return body if encoding is None else protocol.inflate(body, encoding.lower(), most)

    async def _examples(self, request: Request) -> tuple[dict, Version, np.ndarray]:
        """What a plain route was sent, the version that it is for, and the examples in it."""
        body = await self._body(request)
        message = protocol.read_object(body)
        version = self._named(request, message)
        spec, words = _only_input(version), protocol.has_words(body)
        return message, version, protocol.examples_of(message.get("inputs"), spec, words)

    async def _parameters(self, request: Request) -> dict:
        message = protocol.read_object(await self._body(request) or b"{}")
        parameters = message.get("parameters", {})
        if type(parameters) is not dict:
            raise Refused(400, "parameters is not an object")
        return parameters

    async def _submit(
        self, request: Request, version: Version, arrays: list[np.ndarray], examples: int,
        parameters: dict,
    ) -> list[np.ndarray]:  # fmt: skip
        allowed_ms = self.settings.deadline_ms
        timeout = parameters.get("timeout")  # microseconds, as Triton has it
        if timeout is not None:
            timeout = whole(timeout)
            if timeout is None or timeout < 1:
                raise Refused(400, "timeout is no whole number of microseconds above 0")
            allowed_ms = min(allowed_ms, timeout / 1e3)
        deadline = asyncio.get_running_loop().time() + allowed_ms / 1e3
        gone = request.scope.get("gone", lambda: False)
        return await self.repository.submit(version, arrays, examples, deadline, gone)

    async def _text(self, request: Request) -> tuple[Version, AsyncIterator[str]]:
        message = protocol.read_object(await self._body(request))
        version = self._version(request)
        symbols, context = text_model(version.signature, version.record)
        text, parameters = message.get("text_input"), message.get("parameters", {})
        if type(text) is not str or type(parameters) is not dict:
            raise Refused(400, "give text_input, a string, and parameters, an object")
        most, seed = whole(parameters.get("max_tokens", 50)), whole(parameters.get("seed", 0))
        temperature = parameters.get("temperature", 1.0)
        if most is None or not 1 <= most <= MOST_SYMBOLS:
            raise Refused(400, f"max_tokens is no whole number from 1 to {MOST_SYMBOLS}")
        if seed is None or not 0 <= seed < 2**63:
            raise Refused(400, "seed is no whole number from 0 to 2**63 - 1")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 100:
            raise Refused(400, f"temperature is {temperature!r:.40}; give 0 to 100")

        async def compute(codes: np.ndarray) -> np.ndarray:
            now = self._version(request) if version.batcher.closed else version
            (logits,) = await self._submit(request, now, [codes], 1, {})
            return logits

        pieces = generate(
            text, symbols, context, compute, most=most, temperature=temperature, seed=seed
        )
        return version, pieces

    def _answer(
        self, request: Request, content: bytes, kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> Response:  # fmt: skip
        """A result, compressed where the client takes that and it is long enough."""
        headers = {"content-type": kind, **(headers or {})}
        accepts = request.headers.get("accept-encoding")
        if accepts is not None and len(content) >= _SMALL_BYTES:
            encoding = protocol.accepted_encoding(accepts)
            if encoding:
                content = protocol.deflate(content, encoding)
                headers |= {"content-encoding": encoding, "vary": "accept-encoding"}
        return Response(content, headers=headers)

    def _note(self, request: Request, event: str, **what: object) -> None:
        if self.audit is not None:
            caller = getattr(request.state, "caller", None)
            client = request.client.host if request.client else None
            self.audit.write(event, name=caller and caller.name, client=client, **what)


def _only_input(version: Version) -> TensorSpec:
    """The input of a model that takes one, in batches. Raises `Refused` for others."""
    if len(version.signature.inputs) != 1 or not version.signature.has_batch:
        raise Refused(422, "the model takes several inputs or no batch; use /v2/models/NAME/infer")
    return version.signature.inputs[0]


def _labels(version: Version, classes: Iterable[int]) -> list:
    """Names of classes, or their numbers where the model file names none."""
    names = version.record.get("labels") or []
    return [names[k] if k < len(names) else int(k) for k in classes]


def _json(value: object, status: int = 200) -> Response:
    return Response(write_json(value), status, media_type="application/json")


def _error(refused: Refused) -> Response:
    response = _json({"error": refused.reason}, refused.status)
    response.headers.update(refused.headers)
    return response


def _event(value: dict) -> bytes:
    return b"data: " + write_json(value) + b"\n\n"


async def _no_route(request: Request, error: HTTPException) -> Response:
    """Paths and methods that do not exist."""
    path = request.url.path[:200]
    reason = {404: f"there is no {path}", 405: f"{path} does not take {request.method[:20]}"}
    reason = reason.get(error.status_code, str(error.detail))
    return _error(Refused(error.status_code, reason, error.headers))
