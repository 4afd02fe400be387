"""The handler of FastAPI with ONNX Runtime in PyTorch's place, on a model file.

onnx_handler.py FILE PORT
"""

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

path, port = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
app = FastAPI()


class Question(BaseModel):
    inputs: list[list[list[list[float]]]]


class Answer(BaseModel):
    outputs: list[list[float]]
    classes: list[int]


@app.post("/predict")
def predict(question: Question) -> Answer:
    (outputs,) = session.run(None, {name: np.array(question.inputs, dtype=np.float32)})
    return Answer(outputs=outputs.tolist(), classes=outputs.argmax(1).tolist())


uvicorn.run(app, port=int(port), log_level="warning")
