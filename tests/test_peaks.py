"""Peaks of the machine: that they are counted right, not how high they are."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.measure import peaks

ROOFS = peaks.Roofs(1, "cpu", {"float32": 100e9, "int8": 400e9}, {"L1": 200e9, "memory": 20e9})


@pytest.fixture
def quick(monkeypatch):
    """Samples that are too short to mean anything."""
    monkeypatch.setattr(peaks, "_SAMPLE_S", 1e-4)
    monkeypatch.setattr(peaks, "_SAMPLES", 2)
    monkeypatch.setattr(peaks, "_SIDES", {"cpu": (64,), "cuda": (1024,)})


@pytest.fixture
def one_second(monkeypatch):
    """Every call takes one second; what it returned is kept."""
    results = []
    monkeypatch.setattr(peaks, "_fastest_s", lambda call, device: results.append(call()) or 1.0)
    return results


@given(
    st.floats(1e-3, 1e4), st.sampled_from(["float32", "int8"]), st.sampled_from(["L1", "memory"])
)
def test_the_roof_is_the_lower_of_two_limits(intensity, dtype, source):
    attainable = ROOFS.attainable(intensity, dtype, source)
    by_bytes = ROOFS.bandwidth_bytes_s[source] * intensity
    assert attainable == min(by_bytes, ROOFS.operations_s[dtype])
    ridge = ROOFS.ridge(dtype, source)
    assert (intensity >= ridge) == (by_bytes >= ROOFS.operations_s[dtype]) or np.isclose(
        intensity, ridge
    )


def test_the_roof_of_several_operations_at_once():
    assert ROOFS.attainable(pd.Series([1.0, 1000.0])).tolist() == [20e9, 100e9]


@pytest.mark.parametrize("dtype", peaks.DTYPES)
def test_a_product_of_n_by_n_matrices_is_two_n_cubed_operations(dtype, quick, one_second):
    assert peaks.peak_operations_s(dtype) == 2 * 64**3
    torch_values, *others = one_second
    for other in others:  # ONNX Runtime multiplied the same matrices
        torch.testing.assert_close(torch_values, torch.from_numpy(other[0]), rtol=1e-4, atol=1e-4)
    assert bool(others) == (dtype == "float32")


def test_int8_products_are_summed_in_32_bits(quick, one_second):
    peaks.peak_operations_s("int8")
    (result,) = one_second
    assert result.dtype == torch.int32
    assert result.abs().max() > 127


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1024, 5000, 2**20])
def test_bytes_that_were_read_are_counted(size, threads, one_second):
    rate = peaks.bandwidth_bytes_s(size, threads=threads)
    (sums,) = one_second
    assert len(sums) == threads
    numbers = size // 8
    passes = rate / (threads * numbers * 8)
    assert passes == 2**28 // size
    assert sums == [numbers if passes % 2 else 0] * threads  # an even number of passes cancels


def test_the_kernel_reads_every_number_in_every_pass():
    numbers = np.arange(1000)
    assert peaks._add_up(numbers, 1) == numbers.sum()
    assert peaks._add_up(numbers, 2) == 0
    assert peaks._add_up(numbers, 3) == numbers.sum()


@given(st.integers(1, 300))
def test_numbers_begin_with_a_cache_line(count):
    numbers = peaks._aligned(count)
    assert len(numbers) == count
    assert numbers.ctypes.data % 64 == 0
    assert numbers.sum() == count


def test_bandwidths_grow_to_the_largest_set(one_second):
    frame = peaks.bandwidths(threads=2, largest_bytes=2**16)
    assert len(one_second) == len(frame)
    sizes = frame["working_set_bytes"]
    assert sizes.iloc[0] == 4096
    assert 2**16 / 1.5 < sizes.iloc[-1] <= 2**16
    assert (sizes % 64 == 0).all()
    assert sizes.is_monotonic_increasing
    assert (frame["threads"] == 2).all()


def test_the_fastest_sample_counts(monkeypatch):
    times = iter([0.002, 0.3, 0.1, 0.2, 0.4])
    calls = []
    monkeypatch.setattr(peaks, "_SAMPLES", 4)
    monkeypatch.setattr(peaks, "_sample_s", lambda call, n, device: calls.append(n) or next(times))
    assert peaks._fastest_s(lambda: None, "cpu") == 0.1
    assert calls == [1, 2, 2, 2, 2]  # two calls of 2 ms fill a sample


def test_all_roofs_of_this_machine(quick):
    found = peaks.roofs(threads=2)
    assert list(found.operations_s) == list(peaks.DTYPES)
    assert list(found.bandwidth_bytes_s) == [*peaks.caches().index, "memory"]
    assert min(*found.operations_s.values(), *found.bandwidth_bytes_s.values()) > 0
    assert (found.threads, found.device) == (2, "cpu")


def test_threads_are_restored(quick):
    before = torch.get_num_threads()
    peaks.peak_operations_s(threads=before + 1)
    assert torch.get_num_threads() == before


def write_cache(folder, index, **files):
    (folder / f"index{index}").mkdir()
    for name, text in files.items():
        (folder / f"index{index}" / name).write_text(text + "\n")


def test_caches_are_read_from_the_system(tmp_path):
    write_cache(tmp_path, 0, level="1", type="Data", size="48K", shared_cpu_list="0,4")
    write_cache(tmp_path, 1, level="1", type="Instruction", size="32K", shared_cpu_list="0,4")
    write_cache(tmp_path, 2, level="2", type="Unified", size="2M", shared_cpu_list="0,4")
    write_cache(tmp_path, 3, level="3", type="Unified", size="30720K", shared_cpu_list="0-3,8-11")
    found = peaks.caches(tmp_path)
    assert found["size_bytes"].to_dict() == {"L1": 48 * 2**10, "L2": 2**21, "L3": 30 * 2**20}
    assert found["cores"].to_dict() == {"L1": 2, "L2": 2, "L3": 8}


def test_no_caches_where_the_system_does_not_tell(tmp_path, monkeypatch, one_second):
    none = peaks.caches(tmp_path)
    assert len(none) == 0
    monkeypatch.setattr(peaks, "caches", lambda: none)
    assert list(peaks.roofs().bandwidth_bytes_s) == ["memory"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: peaks.peak_operations_s("float64"), "dtype is 'float64'; choose from"),
        (lambda: peaks.peak_operations_s(threads=0), "threads is 0; give 1 or more"),
        (lambda: peaks.bandwidth_bytes_s(100), "working_set_bytes is 100; give 1024 or more"),
        (lambda: peaks.bandwidth_bytes_s(2**20, threads=-1), "threads is -1; give 1 or more"),
        (lambda: peaks.roofs(device="meta"), "device is 'meta'; choose 'cpu' or 'cuda'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device():
    with pytest.raises(ValueError, match="there is no CUDA device; use 'cpu'"):
        peaks.roofs(device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_roofs_of_a_cuda_device():
    found = peaks.roofs(device="cuda")
    assert found.operations_s["float32"] > 1e12
    assert list(found.bandwidth_bytes_s) == ["memory"]


def test_threads_read_at_the_same_time():
    """Compiled without the interpreter's lock: two threads are inside the kernel together."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(peaks._add_up, [peaks._aligned(1000)] * 2, [3, 3]))
    assert found == [1000, 1000]
    assert peaks._add_up.targetoptions["nogil"]
