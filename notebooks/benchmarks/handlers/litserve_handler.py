"""LitServe with its own batching, on a model file in ONNX Runtime.

litserve_handler.py FILE PORT
"""

import sys

import litserve
import numpy as np
import onnxruntime

path, port = sys.argv[1:]


class Classifier(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name

    def decode_request(self, request):
        return np.array(request["inputs"][0], dtype=np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, batch):
        return self.session.run(None, {self.name: batch})[0]

    def unbatch(self, outputs):
        return list(outputs)

    def encode_response(self, output):
        return {"outputs": [output.tolist()], "classes": [int(output.argmax())]}


if __name__ == "__main__":  # its workers import this file again
    api = Classifier(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run("127.0.0.1", int(port), log_level="warning", generate_client_file=False)
