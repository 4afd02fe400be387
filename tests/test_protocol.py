import contextlib
import gzip
import json
import zlib

import numpy as np
import pytest
from bad_requests import BAD, BAD_BINARY, body, tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.deploy.loading import TensorSpec
from workbench.deploy.protocol import (
    DATATYPES,
    NAME_OF,
    Refused,
    Request,
    Signature,
    accepted_encoding,
    deflate,
    examples_of,
    inflate,
    read_object,
    read_request,
    write_answer,
)

X = TensorSpec("x", "float32", (-1, 2))
ONE = Signature((X,), (TensorSpec("y", "float32", (-1, 3)),), 8)


def signature_of(dtype: str, shape: tuple[int, ...]) -> Signature:
    spec = TensorSpec("x", dtype, (-1, *shape[1:]))
    return Signature((spec,), (spec,), 100)


arrays = st.sampled_from(sorted(NAME_OF)).flatmap(
    lambda name: hnp.arrays(
        name,
        hnp.array_shapes(max_dims=3, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if "float" in name else None,
    )
)


@given(array=arrays, as_binary=st.booleans(), nested=st.booleans())
def test_what_is_written_is_read_back(array, as_binary, nested):
    signature = signature_of(array.dtype.name, array.shape)
    request = Request([], len(array), "7", [(0, as_binary)])
    content, length = write_answer(request, "m", "1", [array], signature)
    assert (length is not None) == as_binary
    header = json.loads(content[:length])
    assert (header["id"], header["model_name"], header["model_version"]) == ("7", "m", "1")
    (entry,) = header["outputs"]
    if nested and not as_binary:
        entry["data"] = array.tolist()
    message = json.dumps({"inputs": [entry]}).encode()
    raw = content[length:] if as_binary else b""
    asked = read_request(message + raw, str(len(message)) if as_binary else None, signature)
    assert asked.examples == len(array)
    assert asked.arrays[0].dtype == array.dtype
    np.testing.assert_array_equal(asked.arrays[0], array)


def test_names_of_the_types_are_those_of_the_protocol():
    assert NAME_OF["float16"] == "FP16"
    assert NAME_OF["bool"] == "BOOL"
    assert {np.dtype(name).itemsize for name in DATATYPES.values()} == {1, 2, 4, 8}
    assert len(DATATYPES) == 12


def test_bytes_follow_the_message_and_arrays_the_model():
    a, b = TensorSpec("a", "int8", (-1, 1)), TensorSpec("b", "int16", (-1, 2))
    message = json.dumps({"inputs": [
        {"name": "b", "shape": [1, 2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
        {"name": "a", "shape": [1, 1], "datatype": "INT8", "parameters": {"binary_data_size": 1}},
    ]}).encode()  # fmt: skip
    raw = np.array([1, 2], "<i2").tobytes() + b"\x05"
    asked = read_request(message + raw, str(len(message)), Signature((a, b), (a,), 8))
    assert [array.tolist() for array in asked.arrays] == [[[5]], [[1, 2]]]


def test_outputs_are_chosen_by_name():
    y, z = TensorSpec("y", "float32", (-1, 1)), TensorSpec("z", "float32", (-1, 1))
    signature = Signature((X,), (y, z), 8)
    asked = read_request(body(outputs=[{"name": "z"}]), None, signature)
    assert asked.outputs == [(1, False)]
    assert read_request(body(), None, signature).outputs == [(0, False), (1, False)]
    everywhere = body(parameters={"binary_data_output": True})
    assert read_request(everywhere, None, signature).outputs == [(0, True), (1, True)]
    mixed = [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y"}]
    asked = read_request(
        body(outputs=mixed, parameters={"binary_data_output": True}), None, signature
    )
    assert asked.outputs == [(1, False), (0, True)]


def test_a_model_without_a_batch_takes_its_shape_only():
    fixed = TensorSpec("x", "float32", (1, 2))
    signature = Signature((fixed,), (fixed,), 1)
    assert read_request(body(), None, signature).examples == 1
    with pytest.raises(Refused, match=r"the model takes \[1, 2\]"):
        read_request(body(tensor(shape=[2, 2], data=[1.0] * 4)), None, signature)


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_refused_with_the_reason(kind):
    content, reason = BAD[kind]
    with pytest.raises(Refused, match=reason) as refused:
        read_request(content, None, ONE)
    assert refused.value.status == 400


@pytest.mark.parametrize("kind", BAD_BINARY)
def test_lying_binary_requests_are_refused_with_the_reason(kind):
    (content, length), reason = BAD_BINARY[kind]
    with pytest.raises(Refused, match=reason):
        read_request(content, length, ONE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    where=st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    outside=st.sampled_from(["id", "inputs", "outputs", "parameters", "other"]),
    inner=json_values,
    outer=json_values,
)
def test_whatever_is_wrong_is_a_refusal(where, outside, inner, outer):
    for content in (body(tensor(**{where: inner})), body(**{outside: outer})):
        with contextlib.suppress(Refused):
            asked = read_request(content, None, ONE)
            assert asked.arrays[0].shape[1:] == (2,)


def test_bytes_of_booleans_are_0_and_1():
    message = body(tensor(datatype="BOOL", data=..., parameters={"binary_data_size": 2}))
    signature = signature_of("bool", (1, 2))
    read_request(message + b"\0\1", str(len(message)), signature)
    with pytest.raises(Refused, match="other than 0 and 1"):
        read_request(message + b"\0\2", str(len(message)), signature)


@pytest.mark.parametrize(
    ("dtype", "value", "reason"),
    [
        ("INT8", 128, "-128 to 127"),
        ("UINT8", -1, "0 to 255"),
        ("UINT64", 2**64, "0 to 18446744073709551615"),
        ("INT32", 1.5, "not whole numbers"),
        ("BOOL", 1, "not true and false"),
        ("FP16", 70000, "out of the range"),
        ("FP32", np.nextafter(np.finfo(np.float32).max, np.inf, dtype=np.float64), "out of"),
    ],
)
def test_numbers_must_fit_the_type(dtype, value, reason):
    signature = signature_of(DATATYPES[dtype], (1, 2))
    with pytest.raises(Refused, match=reason):
        read_request(body(tensor(datatype=dtype, data=[value, value])), None, signature)


def test_whole_numbers_may_be_written_as_floats_and_stay_exact():
    signature = signature_of("int64", (1, 2))
    asked = read_request(body(tensor(datatype="INT64", data=[2.0, 2**62 + 1])), None, signature)
    assert asked.arrays[0].tolist() == [[2, 2**62 + 1]]


def test_a_refused_tensor_costs_no_memory():
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(Refused):
        read_request(body(tensor(shape=[2**40, 2])), None, ONE)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_answers_that_json_cannot_hold_are_refused_but_binary_ones_are_sent():
    endless = np.array([[1, np.inf, 3]], np.float32)
    with pytest.raises(Refused, match="not finite") as refused:
        write_answer(Request([], 1, None, [(0, False)]), "m", "1", [endless], ONE)
    assert refused.value.status == 422
    content, length = write_answer(Request([], 1, None, [(0, True)]), "m", "1", [endless], ONE)
    assert np.frombuffer(content[length:], np.float32)[1] == np.inf


def test_compressed_bodies_are_opened_within_the_limit():
    plain = b"abc" * 1000
    assert inflate(gzip.compress(plain), "gzip", 3000) == plain
    assert inflate(zlib.compress(plain), "deflate", 3000) == plain
    assert inflate(plain, "identity", 10) == plain
    assert inflate(deflate(plain, "gzip"), "gzip", 3000) == plain
    assert zlib.decompress(deflate(plain, "deflate")) == plain
    with pytest.raises(Refused, match="more than 2999") as refused:
        inflate(gzip.compress(plain), "gzip", 2999)
    assert refused.value.status == 413
    with pytest.raises(Refused, match="send gzip, deflate or none") as refused:
        inflate(plain, "br", 3000)
    assert refused.value.status == 415


DAMAGED = {
    "empty": b"",
    "not gzip": b"abc",
    "cut": gzip.compress(b"abc")[:-1],
    "something after it": gzip.compress(b"abc") + b"x",
    "two in one": gzip.compress(b"abc") + gzip.compress(b"def"),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)  # gzip's bytes tell the time
def test_damaged_compressed_bodies_are_refused(damaged):
    with pytest.raises(Refused, match=r"not gzip|cut short") as refused:
        inflate(damaged, "gzip", 3000)
    assert refused.value.status == 400


def test_encoding_of_the_answer():
    assert accepted_encoding("gzip, deflate") == "gzip"
    assert accepted_encoding("br, Deflate;q=0.5") == "deflate"
    assert accepted_encoding("gzip;q=0, identity") == ""
    assert accepted_encoding("*") == ""


def test_names_in_text_are_not_taken_for_names_that_come_twice():
    assert read_object(b'{"a": "b:c:d", "b": [{"c": {"d": 1}}]}') == {
        "a": "b:c:d", "b": [{"c": {"d": 1}}],
    }  # fmt: skip
    with pytest.raises(Refused, match="twice"):
        read_object(b'{"a": [[[{"b": 1, "b": 2}]]]}')


def test_plain_examples_may_be_flat_or_nested():
    spec = TensorSpec("x", "float32", (-1, 1, 2, 2))
    flat = examples_of([[1, 2, 3, 4]], spec)
    nested = examples_of([[[[1, 2], [3, 4]]]], spec)
    assert flat.shape == (1, 1, 2, 2)
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, nested)
    for wrong in ([1, 2, 3, 4], [[1, 2, 3]], [], [[]], "1", None, [[[1, 2], [3, 4]]], 3):
        with pytest.raises(Refused):
            examples_of(wrong, spec)
