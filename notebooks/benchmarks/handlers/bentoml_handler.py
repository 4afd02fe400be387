"""BentoML with its adaptive batching, on a model file in ONNX Runtime.

bentoml_handler.py FILE PORT
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    path, port = sys.argv[1:]
    os.environ["MODEL_FILE"] = path  # bentoml imports this file again in its workers
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.chdir(Path(__file__).parent)
    command = [Path(sys.executable).with_name("bentoml"), "serve", "bentoml_handler:Classifier"]
    os.execv(command[0], [*command, "--host", "127.0.0.1", "--port", port])

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path, providers = os.environ["MODEL_FILE"], ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers)
        self.name = self.session.get_inputs()[0].name

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.name: inputs.astype(np.float32)})[0]
