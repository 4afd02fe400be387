"""The Open Inference Protocol, version 2, as bytes: a request becomes arrays, arrays an answer.

Nothing here waits or computes, and nothing is allocated for a tensor before its shape is known to
fit the model. Whatever is wrong with a request is a `Refused`, with the status to answer.
Reference: KServe (2023), "Open Inference Protocol, version 2", and Triton's extension for binary
tensors: a JSON header, then the bytes of each tensor in the order of the header.
"""

import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson

from workbench.deploy.loading import ANY, TensorSpec

DATATYPES = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
NAME_OF = {name: datatype for datatype, name in DATATYPES.items()}
HEADER_LENGTH = "inference-header-content-length"
_WHOLE = {name for name in NAME_OF if "int" in name}
_MOST_BRACKETS = 100_000  # of one JSON text: each becomes an object of its own in memory


class Refused(Exception):
    """A request that is not answered with a result.

    Attributes:
        status: of HTTP.
        reason: for the client; names what was wrong and what would be right.
        headers: to send along.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, and how many examples at once: 1 where it has no batch."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    most_examples: int

    @property
    def has_batch(self) -> bool:
        """Whether the first dimension of all tensors counts examples."""
        tensors = (*self.inputs, *self.outputs)
        return all(spec.shape[:1] == (ANY,) for spec in tensors)


@dataclass(frozen=True)
class Request:
    """An inference request, read and checked.

    Attributes:
        arrays: one for each input of the model, in the model's order.
        examples: how many, along the first dimension.
        id: to be echoed.
        outputs: the positions of the outputs to send, and whether as binary.
        parameters: of the request, as they came.
    """

    arrays: list[np.ndarray]
    examples: int
    id: str | None = None
    outputs: list[tuple[int, bool]] = field(default_factory=list)
    parameters: dict = field(default_factory=dict)


def inflate(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """Undo a Content-Encoding; never makes more than ``most_bytes``. Raises `Refused`."""
    if encoding not in ("gzip", "deflate"):
        if encoding in ("", "identity"):
            return body
        raise Refused(
            415, f"Content-Encoding is {encoding[:40]!r}; send gzip, deflate or none",
            {"Accept-Encoding": "gzip, deflate"},
        )  # fmt: skip
    stream = zlib.decompressobj(wbits=47)  # tells gzip and zlib apart by themselves
    try:
        plain = stream.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise Refused(400, f"the body is not {encoding}: {error}") from error
    if len(plain) > most_bytes:
        raise Refused(413, f"the body inflates to more than {most_bytes} bytes; send less at once")
    if not stream.eof or stream.unused_data:
        raise Refused(400, f"the {encoding} body is cut short, or goes on after its end")
    return plain


def deflate(body: bytes, encoding: str) -> bytes:
    """Compress an answer for a client that accepts ``encoding``, "gzip" or "deflate"."""
    stream = zlib.compressobj(level=1, wbits=31 if encoding == "gzip" else 15)
    return stream.compress(body) + stream.flush()


def accepted_encoding(header: str) -> str:
    """The encoding to answer in, by the Accept-Encoding of a request: gzip, deflate or ""."""
    for entry in header.lower().split(","):
        name, _, weight = entry.partition(";")
        if name.strip() in ("gzip", "deflate") and weight.replace(" ", "") not in ("q=0", "q=0.0"):
            return name.strip()
    return ""


def read_object(body: bytes) -> dict:
    """The JSON object in a body, in which no name comes twice. Raises `Refused`."""
    many = len(body) > _MOST_BRACKETS and body.count(b"[") + body.count(b"{") > _MOST_BRACKETS
    if many:
        raise Refused(400, f"the JSON has more than {_MOST_BRACKETS} lists and objects")
    try:
        value = orjson.loads(body)
        # Each name has one colon. Where there are more, in strings or because a name comes twice,
        # a parser that sees every name looks at the text once more.
        if body.count(b":") != _names(value, depth=4):
            json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise Refused(400, f"the body is not valid JSON: {reason}") from error
    if type(value) is not dict:
        raise Refused(400, f"the body is a JSON {type(value).__name__}; send an object")
    return value


def _names(value: object, depth: int) -> int:
    """How many names the objects have, as far as they are easily found."""
    if type(value) is dict and depth:
        return len(value) + sum(_names(inner, depth - 1) for inner in value.values())
    if type(value) is list and depth and value and type(value[0]) is dict:
        return sum(_names(inner, depth - 1) for inner in value)
    return 0


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} comes twice in one object")
    return found


def read_request(body: bytes, header_length: str | None, signature: Signature) -> Request:
    """Read the body of an inference request, and check it against what the model takes.

    Args:
        body: as it was sent, without its Content-Encoding.
        header_length: the request's ``Inference-Header-Content-Length``, if it has one.

    Raises:
        Refused: anything that is missing, wrong or contradictory.
    """
    binary = memoryview(b"")
    if header_length is not None:
        length = _digits(header_length, "Inference-Header-Content-Length")
        if length > len(body):
            raise Refused(400, f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
        body, binary = body[:length], memoryview(body)[length:]
    message = read_object(body)
    identifier = message.get("id")
    if "id" in message and type(identifier) is not str:
        raise Refused(400, "id is not a string")
    parameters = _parameters(message)
    entries = _entries(message, "inputs", [spec.name for spec in signature.inputs])
    missing = [spec.name for spec in signature.inputs if spec.name not in entries]
    if missing:
        raise Refused(400, f"inputs lack {missing}; the model takes all of them")
    words = has_words(body)
    # Bytes stand in the order of the message, arrays in that of the model.
    arrays, taken = {}, 0
    for name, entry in entries.items():
        spec = next(spec for spec in signature.inputs if spec.name == name)
        shape = _shape(entry, spec)
        size_bytes = _parameters(entry).get("binary_data_size")
        if size_bytes is None:
            arrays[name] = _from_json(entry.get("data"), spec, shape, words)
            continue
        needed = math.prod(shape) * np.dtype(spec.dtype).itemsize
        if "data" in entry:
            raise Refused(400, f"input {name!r} has both data and binary_data_size; send one")
        if type(size_bytes) is not int or size_bytes != needed:
            raise Refused(
                400, f"binary_data_size of {name!r} is {size_bytes!r:.40}; its shape takes {needed}"
            )
        arrays[name] = _from_bytes(binary[taken : taken + needed], spec, shape)
        taken += needed
    if taken != len(binary):
        raise Refused(400, f"{len(binary) - taken} bytes after the last tensor belong to none")
    examples = _count(arrays, signature)
    wanted = _wanted(message, parameters, signature)
    ordered = [arrays[spec.name] for spec in signature.inputs]
    return Request(ordered, examples, identifier, wanted, parameters)


def write_answer(
    request: Request, model: str, version: str, arrays: Sequence[np.ndarray], signature: Signature
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON header where tensors follow as bytes."""
    outputs, parts = [], []
    for position, as_binary in request.outputs:
        array = np.ascontiguousarray(arrays[position])
        entry = {
            "name": signature.outputs[position].name,
            "datatype": NAME_OF[array.dtype.name],
            "shape": array.shape,
        }
        if as_binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(array.tobytes())
        else:
            check_finite(array)
            entry["data"] = array.ravel()
        outputs.append(entry)
    answer = {"model_name": model, "model_version": version, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    header = write_json(answer)
    return (b"".join([header, *parts]), len(header)) if parts else (header, None)


def write_json(value: object) -> bytes:
    """JSON of what may hold arrays."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def check_finite(array: np.ndarray) -> None:
    """JSON has no infinity. Raises `Refused`: it came of the numbers that were sent."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(
            422, "for these inputs the model's answer is not finite, which JSON cannot say; send "
            "smaller numbers, or ask for binary outputs",
        )  # fmt: skip


def examples_of(value: object, spec: TensorSpec, words: bool = True) -> np.ndarray:
    """Examples given as a plain list, each nested like the model's input or flat.

    Args:
        words: whether true or false may be among the numbers; see `has_words`.

    Raises:
        Refused: ragged, not numbers, or of the wrong length.
    """
    array = _numbers(value, spec, words)
    inner = spec.shape[1:]
    if array.ndim and array.shape[1:] != inner and ANY not in inner:
        fits = array.ndim == 2 and array.shape[1] == math.prod(inner)
        if not fits:
            raise Refused(
                400, f"inputs have shape {array.shape}; send a list of examples, each of shape "
                f"{inner} or with its {math.prod(inner)} numbers in one list",
            )  # fmt: skip
        array = array.reshape(-1, *inner)
    _check_shape(array.shape, spec)
    return _cast(array, spec)


def has_words(body: bytes) -> bool:
    """Whether true or false stands anywhere in a JSON text; numpy would take them for 1 and 0."""
    return b"true" in body or b"false" in body


def whole(value: object) -> int | None:
    """The whole number that a JSON number stands for; None for anything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _digits(text: str, name: str) -> int:
    """A whole number as HTTP writes it: no sign, no space, no other alphabet's digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise Refused(400, f"{name} is {text[:40]!r}; send a number of bytes")
    return int(text)


def _parameters(message: dict) -> dict:
    found = message.get("parameters", {})
    if type(found) is not dict:
        raise Refused(400, "parameters is not an object")
    return found


def _entries(message: dict, key: str, known: Collection[str]) -> dict[str, dict]:
    """The tensors that a message lists under ``key``, by name."""
    listed = message.get(key)
    if type(listed) is not list or not all(type(entry) is dict for entry in listed):
        raise Refused(400, f"{key} is not a list of objects; the model has {[*known]}")
    found = {}
    for entry in listed:
        name = entry.get("name")
        if type(name) is not str or name not in known:
            raise Refused(400, f"{key} name {name!r:.80}; the model has {[*known]}")
        if name in found:
            raise Refused(400, f"{key} name {name!r} twice")
        found[name] = entry
    return found


def _shape(entry: dict, spec: TensorSpec) -> tuple[int, ...]:
    """The shape that an entry declares, if the model takes it."""
    expected = NAME_OF[spec.dtype]
    if entry.get("datatype") != expected:
        given = entry.get("datatype")
        known = "" if given in [*DATATYPES] else f", of the datatypes {', '.join(DATATYPES)}"
        raise Refused(
            400,
            f"input {spec.name!r} has datatype {given!r:.40}; the model takes {expected}{known}",
        )
    shape = entry.get("shape")
    if type(shape) is not list or not all(type(length) is int for length in shape):
        raise Refused(400, f"shape of {spec.name!r} is not a list of whole numbers")
    return _check_shape(tuple(shape), spec)


def _check_shape(shape: tuple[int, ...], spec: TensorSpec) -> tuple[int, ...]:
    if len(shape) != len(spec.shape) or not all(
        given == length or (length == ANY and given >= 1)
        for given, length in zip(shape, spec.shape, strict=True)
    ):
        raise Refused(
            400, f"input {spec.name!r} has shape {[*shape]!r:.80}; the model takes "
            f"{[*spec.shape]}, where {ANY} is any length from 1",
        )  # fmt: skip
    return shape


def _from_json(value: object, spec: TensorSpec, shape: tuple[int, ...], words: bool) -> np.ndarray:
    """An array from a flat list, or from one nested as the shape says."""
    if value is None:
        raise Refused(400, f"input {spec.name!r} has no data")
    array = _numbers(value, spec, words)
    if array.shape != shape:
        if array.ndim != 1 or array.size != math.prod(shape):
            raise Refused(
                400, f"data of {spec.name!r} has shape {[*array.shape]}; its shape says "
                f"{[*shape]}, which is {math.prod(shape)} numbers",
            )  # fmt: skip
        array = array.reshape(shape)
    return _cast(array, spec)


def _numbers(value: object, spec: TensorSpec, words: bool) -> np.ndarray:
    """Numbers or truth values of nested lists, in a type that holds them."""
    name = spec.name
    if type(value) is not list:
        raise Refused(400, f"data of {name!r} is not a list")
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:  # ragged lists, or more than 64 dimensions
        raise Refused(400, f"data of {name!r} is not an array: {str(error)[:80]}") from error
    if array.dtype.kind not in "biuf" or not array.size:
        raise Refused(400, f"data of {name!r} holds other things than numbers, or nothing")
    if words and array.dtype.kind != "b" and _has_booleans(value):
        raise Refused(400, f"data of {name!r} mixes numbers with true and false")
    if array.dtype.kind == "f" and spec.dtype in _WHOLE:
        # To JSON 2.0 is a whole number too, and beside it a large one must not become a float.
        exact = np.array(value, object)
        if not all(type(number) is int or number.is_integer() for number in exact.flat):
            raise Refused(400, f"data of {name!r} are not whole numbers")
        array = np.array([int(number) for number in exact.flat], object).reshape(array.shape)
    return array


def _has_booleans(value: list) -> bool:
    kinds = set(map(type, value))
    return bool in kinds or (list in kinds and any(map(_has_booleans, value)))


def _cast(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Numbers in the model's type, which must be able to hold them."""
    wanted = np.dtype(spec.dtype)
    if wanted.kind == "f" and array.dtype.kind in "iuf":
        most = np.finfo(wanted).max
        if not (-most <= array.min() and array.max() <= most):
            raise Refused(400, f"data of {spec.name!r} has numbers out of the range of {wanted}")
        return array.astype(wanted)
    if wanted.kind in "iu" and array.dtype.kind in "iuO":
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise Refused(
                400, f"data of {spec.name!r} go from {array.min()} to {array.max()}; {wanted} "
                f"holds {limits.min} to {limits.max}",
            )  # fmt: skip
        return array.astype(wanted)
    if wanted.kind == "b" and array.dtype.kind == "b":
        return array
    kind = "true and false" if wanted.kind == "b" else "numbers"
    raise Refused(400, f"data of {spec.name!r} are not {kind}")


def _from_bytes(raw: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """A view of the body's bytes."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    needed = math.prod(shape) * dtype.itemsize
    if len(raw) != needed:
        raise Refused(400, f"the body ends before the {needed} bytes of {spec.name!r}")
    if dtype.kind == "b":
        codes = np.frombuffer(raw, np.uint8)
        if codes.max() > 1:
            raise Refused(400, f"bytes of {spec.name!r} are other than 0 and 1")
        return codes.view(bool).reshape(shape)
    array = np.frombuffer(raw, dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(400, f"bytes of {spec.name!r} hold numbers that are not finite")
    return array


def _count(arrays: dict[str, np.ndarray], signature: Signature) -> int:
    """How many examples the arrays hold."""
    if not signature.has_batch:
        return 1
    counts = {name: len(array) for name, array in arrays.items()}
    examples = next(iter(counts.values()))
    if set(counts.values()) != {examples}:
        raise Refused(400, f"inputs hold different numbers of examples: {counts}")
    if examples > signature.most_examples:
        raise Refused(
            400, f"the request has {examples} examples; send at most {signature.most_examples}"
        )
    return examples


def _wanted(message: dict, parameters: dict, signature: Signature) -> list[tuple[int, bool]]:
    """Which outputs to send, and whether as binary."""
    names = [spec.name for spec in signature.outputs]
    everywhere = _flag(parameters, "binary_data_output", False)
    if message.get("outputs", []) == []:
        return [(position, everywhere) for position in range(len(names))]
    wanted = []
    for name, entry in _entries(message, "outputs", names).items():
        own = _parameters(entry)
        if "classification" in own:
            raise Refused(
                400, "the extension for classification is not offered; ask for the tensor"
            )
        wanted.append((names.index(name), _flag(own, "binary_data", everywhere)))
    return wanted


def _flag(parameters: dict, name: str, default: bool) -> bool:
    found = parameters.get(name, default)
    if type(found) is not bool:
        raise Refused(400, f"{name} is {found!r:.40}; give true or false")
    return found
