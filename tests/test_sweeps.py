"""Sweeps over batch sizes and threads."""

import pytest
import torch
from torch import nn

from workbench.deploy.runtimes import prepare
from workbench.measure import sweeps

NETWORK = nn.Sequential(nn.Linear(6, 6), nn.ReLU())


def test_one_row_for_each_measurement():
    frame = sweeps.batch_and_threads(
        {"eager": (NETWORK, "eager"), "ort": (NETWORK, "onnxruntime")},
        torch.ones(4, 6), batches=(1, 4), threads=(1, 2), progress=False,
    )  # fmt: skip
    assert len(frame) == 2 * 2 * 2
    assert not frame.duplicated(["name", "batch", "threads"]).any()
    assert (frame["error"] == "").all()
    assert (frame["latency_low_ms"] <= frame["latency_ms"]).all()
    expected = frame["batch"] / frame["latency_ms"] * 1e3
    assert frame["examples_s"].tolist() == pytest.approx(expected.tolist())


def test_each_sees_its_batch_and_its_threads():
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append((len(x), torch.get_num_threads()))
            return x

    before = torch.get_num_threads()
    sweeps.batch_and_threads(
        {"watched": (Watched(), "eager")}, torch.ones(8, 1),
        batches=(2, 8), threads=(1, 2), progress=False,
    )  # fmt: skip
    assert list(dict.fromkeys(seen)) == [(2, 1), (8, 1), (2, 2), (8, 2)]
    assert torch.get_num_threads() == before


def test_a_predictor_is_taken_as_it_is():
    predictor = prepare(NETWORK, example_input=(torch.ones(1, 6),))
    frame = sweeps.batch_and_threads(
        {"mine": predictor}, torch.ones(2, 6), batches=(2,), progress=False
    )
    assert frame["name"].tolist() == ["mine"]


@pytest.mark.parametrize("batch", [0, 5])
def test_a_batch_that_cannot_be_made(batch):
    with pytest.raises(ValueError, match=f"batch is {batch}; give 1 to 4, or more examples"):
        sweeps.batch_and_threads({"eager": (NETWORK, "eager")}, torch.ones(4, 6), batches=(batch,))


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="nothing to measure"):
        sweeps.batch_and_threads({}, torch.ones(4, 6), batches=(1,), progress=False)
