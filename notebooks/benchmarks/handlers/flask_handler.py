"""The source article's handler: Flask and PyTorch, one request at a time.

flask_handler.py NETWORK PORT
"""

import sys

import torch
from flask import Flask, jsonify, request

from workbench import models

network, port = sys.argv[1:]
torch.set_num_threads(1)
model = models.pretrained(network)
app = Flask(__name__)


@app.post("/predict")
def predict():
    inputs = torch.tensor(request.json["inputs"])
    with torch.no_grad():
        outputs = model(inputs)
    return jsonify(outputs=outputs.tolist(), classes=outputs.argmax(1).tolist())


app.run(port=int(port))
