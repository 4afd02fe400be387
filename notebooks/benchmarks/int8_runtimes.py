"""int8 side by side: this package's model on its runtimes, and the quantizers of other tools.

Run by ``make bench``. Figures are ratios to eager float32 in the same run: batch 1, one thread.
The peers calibrate by themselves, on the same 512 images.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workbench import compress, data, deploy, measure, models
from workbench.explore import report


class OrtOwn(nn.Module):
    """ONNX Runtime's own static quantizer, fed with the float model's export."""

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__()
        import onnxruntime
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Images(CalibrationDataReader):
            def __init__(self, name: str):
                self.batches = iter([{name: x.numpy()} for x in images.split(64)])

            def get_next(self):
                return next(self.batches, None)

        exported = deploy.prepare(model, "onnxruntime", example_input=(images[:1],))
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            exported.save(before)
            quantize_static(
                before, after, Images(exported.input_names[0]), per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            self.size_bytes = after.stat().st_size
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(after.read_bytes(), options)
        self.name = exported.input_names[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


class OpenVino(nn.Module):
    """OpenVINO, in float32 or quantized by NNCF."""

    def __init__(self, model: nn.Module, images: Tensor, int8: bool):
        super().__init__()
        import nncf
        import openvino

        converted = openvino.convert_model(model, example_input=images[:1])
        if int8:
            batches = nncf.Dataset(images.split(64), lambda x: x.numpy())
            converted = nncf.quantize(converted, batches)
        self.compiled = openvino.compile_model(
            converted, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.compiled(x.numpy())[0]))


def main() -> None:
    task = data.fashion_mnist()
    images = task.train.subset(512).source.tensors[0]
    for name in ("resnet-14", "resnet-8", "lenet-5"):
        model = models.pretrained(name)
        int8 = compress.quantize_static(model, task)
        candidates = {
            "float32, eager": model,
            "float32, ONNX Runtime": (model, "onnxruntime"),
            "float32, OpenVINO": OpenVino(model, images, int8=False).forward,
            "int8, ours, ONNX Runtime": (int8, "onnxruntime"),
            "int8, ours, compiled": (int8, "compiled"),
            "int8, ONNX Runtime's own": OrtOwn(model, images).forward,
            "int8, OpenVINO and NNCF": OpenVino(model, images, int8=True).forward,
        }
        frame = measure.compare(task, candidates, progress=False)
        frame["time_share"] = 1 / frame.speedup
        print(f"\n{name}, {report.say('{n:,} parameters', n=measure.parameters(model))}")
        columns = ["name", "time_share", "speedup_low", "speedup_high", "score", "verdict", "error"]
        print(frame[columns].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
