"""A handler as FastAPI's own tutorial would write it: typed, in a pool of threads, no batches.

fastapi_handler.py NETWORK PORT
"""

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from workbench import models

network, port = sys.argv[1:]
torch.set_num_threads(1)
model = models.pretrained(network)
app = FastAPI()


class Question(BaseModel):
    inputs: list[list[list[list[float]]]]


class Answer(BaseModel):
    outputs: list[list[float]]
    classes: list[int]


@app.post("/predict")
def predict(question: Question) -> Answer:
    with torch.no_grad():
        outputs = model(torch.tensor(question.inputs))
    return Answer(outputs=outputs.tolist(), classes=outputs.argmax(1).tolist())


uvicorn.run(app, port=int(port), log_level="warning")
