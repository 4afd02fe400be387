"""Small ONNX files for tests, made without torch."""

import json
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workbench.deploy.loading import RECORD

OPSET = 18


def classifier(
    weight: np.ndarray, *, shape: Sequence[int] = (4,), record: dict | None = None, work: int = 0
) -> bytes:
    """``flatten(x) @ weight``: x (batch, *shape) -> y (batch, classes).

    Args:
        work: multiplications by a 512x512 matrix on the way, to make it slow.
    """
    nodes = [helper.make_node("Flatten", ["x"], ["flat"], axis=1)]
    constants = [numpy_helper.from_array(weight.astype(np.float32), "weight")]
    last = "flat"
    if work:
        wide = np.zeros((weight.shape[0], 512), np.float32)
        wide[:, : weight.shape[0]] = np.eye(weight.shape[0])
        constants += [numpy_helper.from_array(wide, "wide"),
                      numpy_helper.from_array(np.eye(512, dtype=np.float32), "same"),
                      numpy_helper.from_array(wide.T.copy(), "narrow")]  # fmt: skip
        nodes.append(helper.make_node("MatMul", [last, "wide"], ["h0"]))
        for k in range(work):
            nodes.append(helper.make_node("MatMul", [f"h{k}", "same"], [f"m{k}"]))
            nodes.append(helper.make_node("Relu", [f"m{k}"], [f"h{k + 1}"]))
        nodes.append(helper.make_node("MatMul", [f"h{work}", "narrow"], ["back"]))
        last = "back"
    nodes.append(helper.make_node("MatMul", [last, "weight"], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT,
                                             ["batch", weight.shape[1]])]  # fmt: skip
    return _model(nodes, inputs, outputs, constants, record)


def every_type() -> bytes:
    """One input of each type of the protocol, given back as it came: in_FP32 -> out_FP32, ..."""
    types = {
        "BOOL": TensorProto.BOOL, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16,
        "INT32": TensorProto.INT32, "INT64": TensorProto.INT64, "UINT8": TensorProto.UINT8,
        "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
        "UINT64": TensorProto.UINT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT,
        "FP64": TensorProto.DOUBLE,
    }  # fmt: skip
    nodes = [helper.make_node("Identity", [f"in_{n}"], [f"out_{n}"]) for n in types]
    inputs = [helper.make_tensor_value_info(f"in_{n}", t, ["batch", 3]) for n, t in types.items()]
    outputs = [helper.make_tensor_value_info(f"out_{n}", t, ["batch", 3]) for n, t in types.items()]
    return _model(nodes, inputs, outputs, [])


def successor(symbols: str, context: int) -> bytes:
    """A model of characters that is sure of the next symbol of the alphabet.

    codes (batch, context) -> logits (batch, context, symbols)
    """
    table = np.roll(np.eye(len(symbols), dtype=np.float32), 1, axis=1) * 50
    nodes = [helper.make_node("Gather", ["table", "codes"], ["logits"])]
    inputs = [helper.make_tensor_value_info("codes", TensorProto.INT64, ["batch", context])]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", context, len(symbols)])
    ]
    constants = [numpy_helper.from_array(table, "table")]
    return _model(nodes, inputs, outputs, constants, {"labels": list(symbols)})


def _model(nodes, inputs, outputs, constants, record: dict | None = None) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    if record is not None:
        helper.set_model_props(model, {RECORD: json.dumps(record)})
    onnx.checker.check_model(model)
    return model.SerializeToString()
