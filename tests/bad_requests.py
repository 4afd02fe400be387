"""Bodies of inference requests that no server should accept, each with the reason it should give.

They are for a model that takes x, FP32 of shape (-1, 2), at most 8 examples at once, and gives y.
"""

import json

import numpy as np


def tensor(**changes) -> dict:
    entry = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0], **changes}
    return {name: value for name, value in entry.items() if value is not ...}


def body(*entries: dict, **more) -> bytes:
    return json.dumps({"inputs": [*entries] or [tensor()], **more}).encode()


DEEP = b'{"inputs": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}"
BAD = {
    "empty": (b"", "not valid JSON"),
    "no JSON": (b"hello", "not valid JSON"),
    "half": (body()[:-3], "not valid JSON"),
    "list": (b"[1]", "JSON list"),
    "number": (b"1", "JSON int"),
    "NaN": (b'{"inputs": NaN}', "not valid JSON"),
    "huge number": (body().replace(b"2.0", b"1e999"), "not valid JSON"),
    "too large for the type": (body(tensor(data=[1.0, 1e39])), "out of the range"),
    "deep": (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
    "deep but parsed": (DEEP, "inputs is not a list of objects"),
    "many lists": (b'{"a": [' + b"[]," * 100_001 + b"1]}", "more than 100000"),
    "same key twice": (b'{"id": "a", "id": "b", "inputs": []}', "'id' comes twice"),
    "same key twice inside": (
        b'{"inputs": [{"name": "x", "name": "y", "shape": []}]}', "'name' comes twice",
    ),
    "not UTF-8": (b'{"id": "\xff"}', "not valid JSON"),
    "id": (body(id=7), "id is not a string"),
    "no inputs": (b"{}", "inputs is not a list"),
    "inputs an object": (b'{"inputs": {}}', "inputs is not a list"),
    "empty inputs": (b'{"inputs": []}', "inputs lack"),
    "inputs of numbers": (b'{"inputs": [1]}', "inputs is not a list of objects"),
    "no name": (body(tensor(name=...)), "inputs name None"),
    "unknown name": (body(tensor(name="z")), "the model has"),
    "name twice": (body(tensor(), tensor()), "'x' twice"),
    "no shape": (body(tensor(shape=...)), "not a list of whole numbers"),
    "shape of text": (body(tensor(shape=["1", 2])), "not a list of whole numbers"),
    "shape of floats": (body(tensor(shape=[1.0, 2])), "not a list of whole numbers"),
    "shape of booleans": (body(tensor(shape=[True, 2])), "not a list of whole numbers"),
    "negative": (body(tensor(shape=[-1, -2])), "has shape"),
    "zero": (body(tensor(shape=[0, 2], data=[])), "has shape"),
    "enormous": (body(tensor(shape=[2**62, 2])), "numbers"),
    "enormous beyond 64 bits": (body(tensor(shape=[10**30, 2])), "not a list of whole numbers"),
    "other dimensions": (body(tensor(shape=[1, 2, 1])), "has shape"),
    "flat shape": (body(tensor(shape=[2])), "has shape"),
    "no type": (body(tensor(datatype=...)), "datatype None"),
    "wrong type": (body(tensor(datatype="INT64")), "the model takes FP32"),
    "unknown type": (body(tensor(datatype="BF16")), "of the datatypes BOOL"),
    "text type": (body(tensor(datatype="BYTES")), "of the datatypes BOOL"),
    "no data": (body(tensor(data=...)), "has no data"),
    "null data": (body(tensor(data=None)), "has no data"),
    "data a number": (body(tensor(data=1.0)), "is not a list"),
    "data an object": (body(tensor(data={"0": 1})), "is not a list"),
    "null inside": (body(tensor(data=[1.0, None])), "other things than numbers"),
    "text inside": (body(tensor(data=["1", "2"])), "other things than numbers"),
    "boolean inside": (body(tensor(data=[1.0, True])), "mixes numbers"),
    "boolean deep inside": (body(tensor(data=[[1.0, True]])), "mixes numbers"),
    "booleans": (body(tensor(data=[True, False])), "are not numbers"),
    "objects inside": (body(tensor(data=[{}, {}])), "other things than numbers"),
    "ragged": (body(tensor(data=[[1.0], [1.0, 2.0]])), "not an array"),
    "too few": (body(tensor(data=[1.0])), "which is 2 numbers"),
    "too many": (body(tensor(data=[1.0, 2.0, 3.0])), "which is 2 numbers"),
    "nested otherwise": (body(tensor(data=[[1.0], [2.0]])), "which is 2 numbers"),
    "too many examples": (body(tensor(shape=[9, 2], data=[1.0] * 18)), "at most 8"),
    "parameters": (body(parameters=[]), "parameters is not an object"),
    "tensor's parameters": (body(tensor(parameters=1)), "parameters is not an object"),
    "size without bytes": (
        body(tensor(data=..., parameters={"binary_data_size": 8})), "the body ends before",
    ),
    "id null": (body(id=None), "id is not a string"),
    "outputs null": (body(outputs=None), "outputs is not a list"),
    "outputs a string": (body(outputs="y"), "outputs is not a list"),
    "unknown output": (body(outputs=[{"name": "z"}]), "the model has"),
    "output twice": (body(outputs=[{"name": "y"}, {"name": "y"}]), "'y' twice"),
    "binary in words": (body(parameters={"binary_data_output": "yes"}), "true or false"),
    "classification": (
        body(outputs=[{"name": "y", "parameters": {"classification": 1}}]), "classification",
    ),
}  # fmt: skip


def binary(size: object = 8, *, raw: bytes = b"\0" * 8, length: object = None, **changes) -> tuple:
    message = body(tensor(**{"data": ..., "parameters": {"binary_data_size": size}, **changes}))
    return message + raw, str(len(message)) if length is None else length


BAD_BINARY = {
    "size too small": (binary(4), "its shape takes 8"),
    "size too large": (binary(2**40), "its shape takes 8"),
    "negative size": (binary(-8), "its shape takes 8"),
    "size in text": (binary("8"), "its shape takes 8"),
    "size true": (binary(True), "its shape takes 8"),
    "bytes missing": (binary(raw=b"\0" * 7), "ends before the 8 bytes"),
    "bytes left over": (binary(raw=b"\0" * 9), "1 bytes after the last tensor"),
    "header longer than the body": (binary(length="99999"), "but the body has"),
    "header cut": (binary(length="10"), "not valid JSON"),
    "no header": (binary(length="0"), "not valid JSON"),
    "negative length": (binary(length="-1"), "send a number of bytes"),
    "length in words": (binary(length="ten"), "send a number of bytes"),
    "length in other digits": (binary(length="\u0661\u0662"), "send a number of bytes"),
    "length very long": (binary(length="9" * 5000), "send a number of bytes"),
    "both": (binary(data=[1.0, 2.0]), "send one"),
    "NaN": (binary(raw=np.float32([np.nan, 0]).tobytes()), "not finite"),
    "infinity": (binary(raw=np.float32([np.inf, 0]).tobytes()), "not finite"),
}
