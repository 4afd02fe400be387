"""Joules: counted where there is a counter, otherwise modelled."""

import pandas as pd
import pytest
import torch

from workbench import models
from workbench.measure import energy, roofline


def counter(folder, name, start_uj, largest_uj=10**9):
    package = folder / name
    package.mkdir()
    (package / "energy_uj").write_text(str(start_uj))
    (package / "max_energy_range_uj").write_text(str(largest_uj))
    return package / "energy_uj"


def spend(file, used_uj, largest_uj=10**9):
    file.write_text(str((int(file.read_text()) + used_uj) % largest_uj))


def test_joules_of_a_call_over_all_processors(tmp_path):
    first = counter(tmp_path, "intel-rapl:0", 500)
    second = counter(tmp_path, "intel-rapl:1", 7)
    part = counter(tmp_path, "intel-rapl:0:0", 3)  # of the first: not to be counted twice

    def call():
        spend(part, 500_000)
        spend(first, 2_000_000)
        spend(second, 1_000_000)

    found = energy.counted(call, least_s=0, folder=tmp_path)
    assert found.calls == 1
    assert found.joules == pytest.approx(3.0)
    assert found.seconds > 0


def test_calls_are_repeated_and_the_mean_counts(tmp_path):
    file = counter(tmp_path, "intel-rapl:0", 0, largest_uj=10**15)
    found = energy.counted(lambda: spend(file, 1000, 10**15), least_s=0.02, folder=tmp_path)
    assert found.calls > 1
    assert found.joules == pytest.approx(1e-3)


def test_a_counter_that_starts_again_from_zero(tmp_path):
    file = counter(tmp_path, "intel-rapl:0", 10**9 - 400)
    found = energy.counted(lambda: spend(file, 1000), least_s=0, folder=tmp_path)
    assert found.joules == pytest.approx(1e-3)


def test_none_where_there_is_no_counter(tmp_path):
    called = []
    assert energy.counted(lambda: called.append(1), folder=tmp_path) is None
    assert energy.counted(lambda: called.append(1), folder=tmp_path / "nowhere") is None
    assert not called


def test_none_where_it_may_not_be_read(tmp_path):
    counter(tmp_path, "intel-rapl:0", 0).unlink()
    assert energy.counted(lambda: None, folder=tmp_path) is None


def test_modelled_joules_by_hand():
    frame = pd.DataFrame(
        {
            "dtype": ["float32", "uint8", "int64"],
            "flops": [2e6, 2e6, 0],
            "moved_bytes": [1000, 1000, 8000],
        }
    )
    found = 1e12 * energy.modelled_joules(frame, "memory")
    assert found.tolist() == pytest.approx([4.6e6 + 162_500, 0.3e6 + 162_500, 1_300_000])
    near = 1e12 * energy.modelled_joules(frame, "32 kB cache")
    assert near.tolist() == pytest.approx([4.6e6 + 2500, 0.3e6 + 2500, 20_000])


def test_memory_costs_more_than_arithmetic_in_a_perceptron():
    frame = roofline.layers(models.build("mlp-wide"), torch.ones(1, 1, 28, 28), passes=3)
    total = energy.modelled_joules(frame).sum()
    arithmetic = (frame["flops"] / 2 * 4.6e-12).sum()
    assert total > 50 * arithmetic


def test_what_is_refused():
    frame = pd.DataFrame({"dtype": ["float64"], "flops": [2.0], "moved_bytes": [8]})
    with pytest.raises(ValueError, match=r"no constant for \['float64'\]"):
        energy.modelled_joules(frame)
    with pytest.raises(ValueError, match="source is 'disk'; choose from"):
        energy.modelled_joules(frame, "disk")
