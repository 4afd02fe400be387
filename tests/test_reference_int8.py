"""What the series promises of int8, on the larger residual network and all 10,000 test images.

Its speed is asserted in notebook 02, where it is measured beside the baseline.
"""

import pytest

from workbench import compress, data, deploy, measure, models, training


@pytest.fixture(scope="module")
def task() -> data.Task:
    return data.fashion_mnist()


def test_static_int8_keeps_the_accuracy_in_a_quarter_of_the_bytes(task):
    model = models.pretrained("resnet-14")
    small = compress.quantize_static(model, task)
    predictor = deploy.prepare(small, "onnxruntime", example_input=task.example_input)
    assert predictor.int8_kernels == 15
    assert measure.artifact_bytes(predictor) <= 0.27 * measure.artifact_bytes(model)
    accuracy = training.evaluate(predictor, task).value
    assert accuracy >= models.record("resnet-14")["test"] - 0.005


def test_dynamic_int8_finds_nothing_to_do_in_it():
    with pytest.warns(UserWarning, match="nothing quantized"):
        small = compress.quantize_dynamic(models.pretrained("resnet-14"))
    assert (compress.coverage(small).stored_as == "float").all()
