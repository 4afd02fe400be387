"""MLServer with its adaptive batching, on a model file in ONNX Runtime.

mlserver_handler.py FILE PORT
"""

import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    path, port = sys.argv[1:]
    settings = {"host": "127.0.0.1", "http_port": port, "parallel_workers": 0, "debug": False}
    settings |= {"grpc_port": int(port) + 1, "metrics_port": int(port) + 2}
    model = {"name": "model", "implementation": "mlserver_handler.Classifier"}
    model |= {"max_batch_size": 64, "max_batch_time": 0.001, "parameters": {"uri": path}}
    folder = Path(tempfile.mkdtemp())
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["MLSERVER_LOGGING_SETTINGS"] = ""
    command = Path(sys.executable).with_name("mlserver")
    os.execv(command, [command, "start", folder])

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Classifier(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path, providers = self.settings.parameters.uri, ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {self.session.get_inputs()[0].name: NumpyCodec.decode_input(payload.inputs[0])}
        (outputs,) = self.session.run(None, inputs)
        answer = NumpyCodec.encode_output("outputs", np.asarray(outputs))
        return InferenceResponse(model_name=self.name, outputs=[answer])
