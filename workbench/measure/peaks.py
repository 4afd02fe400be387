"""What the machine can do at best: arithmetic and bandwidth, measured on it, not quoted.

Other work on the machine only ever slows a sample down, so a peak is the fastest of several. The
arithmetic is a product of two square matrices, by torch's kernels and, in float32 on a processor,
by ONNX Runtime's too: there is no faster way to multiply in either. The bandwidth is that of
reading: each thread adds up numbers that it owns, again and again, so the size of what it owns
decides which cache they come from (McCalpin, 1995, "Memory bandwidth and machine balance").
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from workbench.storage.compiled import compiled

if TYPE_CHECKING:
    import onnxruntime

DTYPES = ("float32", "bfloat16", "int8")
_SIDES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}  # of the matrices; the best one counts
_SAMPLES = 15
_SAMPLE_S = 0.004  # far above the resolution of the clock, and short: few are interrupted
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Roofs:
    """What no layer can exceed on one machine: made by `roofs`.

    ``operations_s`` has operations per second by number type (a multiply-accumulate is two),
    ``bandwidth_bytes_s`` bytes per second by where they are read from, nearest first.
    """

    threads: int
    device: str
    operations_s: dict[str, float]
    bandwidth_bytes_s: dict[str, float]

    def attainable(
        self, intensity: float | pd.Series, dtype: str = "float32", source: str = "memory"
    ) -> float | pd.Series:
        """Operations per second at an arithmetic intensity, in operations per byte: the roofline.

        Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model
        for multicore architectures".

        >>> round(Roofs(1, "cpu", {"float32": 100e9}, {"memory": 20e9}).attainable(2) / 1e9)
        40
        """
        slope, flat = self.bandwidth_bytes_s[source], self.operations_s[dtype]
        return np.minimum(slope * intensity, flat)

    def ridge(self, dtype: str = "float32", source: str = "memory") -> float:
        """Operations per byte from which on arithmetic is the limit."""
        return self.operations_s[dtype] / self.bandwidth_bytes_s[source]


def roofs(*, threads: int = 1, device: str = "cpu") -> Roofs:
    """Measure all roofs of this machine: each number type, each cache, and memory.

    A cache is read over half of what one core has of it, memory over four times the largest cache.
    Takes about two seconds.

    Raises:
        ValueError: threads is out of range, or the device is not there.
    """
    kind = _check(threads, device)
    known = caches() if kind == "cpu" else pd.DataFrame(columns=["size_bytes", "cores"])
    working_sets = (known["size_bytes"] / (2 * known["cores"])).astype(int).to_dict()
    working_sets["memory"] = _beyond_caches(known, kind)
    return Roofs(
        threads,
        device,
        {t: peak_operations_s(t, threads=threads, device=device) for t in DTYPES},
        {
            source: bandwidth_bytes_s(size, threads=threads, device=device)
            for source, size in working_sets.items()
        },
    )


def peak_operations_s(dtype: str = "float32", *, threads: int = 1, device: str = "cpu") -> float:
    """Operations per second of the fastest square matrix product; two for a multiply-accumulate.

    Args:
        dtype: "float32", "bfloat16", or "int8" (products of bytes, summed in 32 bits).
        threads: torch's intra-op threads; restored afterwards.
        device: "cpu" or "cuda", where the device's own events keep the time.

    Raises:
        ValueError: another dtype, threads out of range, or the device is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose from {DTYPES}")
    kind = _check(threads, device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(
            2 * side**3 / _fastest_s(product, device)
            for side in _SIDES[kind]
            for product in _products(dtype, side, threads, device)
        )
    finally:
        torch.set_num_threads(before)


def bandwidth_bytes_s(working_set_bytes: int, *, threads: int = 1, device: str = "cpu") -> float:
    """Bytes per second that ``threads`` together read, each from ``working_set_bytes`` of its own.

    Raises:
        ValueError: a working set below 1 kB, threads out of range, or the device is not there.
    """
    if working_set_bytes < 1024:
        raise ValueError(f"working_set_bytes is {working_set_bytes}; give 1024 or more")
    if _check(threads, device) == "cuda":
        numbers = torch.ones(working_set_bytes // 4, device=device)
        return numbers.nbytes / _fastest_s(numbers.sum, device)
    owned = [_aligned(working_set_bytes // 8) for _ in range(threads)]
    # A pass over a small set is shorter than starting a thread: as many as read 256 MB at least.
    passes = max(1, 2**28 // working_set_bytes)
    with ThreadPoolExecutor(threads) as pool:
        took_s = _fastest_s(lambda: list(pool.map(_add_up, owned, [passes] * threads)), device)
    return threads * owned[0].nbytes * passes / took_s


def bandwidths(*, threads: int = 1, largest_bytes: int | None = None) -> pd.DataFrame:
    """Bandwidth of the processor against working set: it falls where a cache ends.

    Columns: ``working_set_bytes`` (of each thread, from 4 kB in steps of the square root of two),
    ``bandwidth_bytes_s`` and ``threads``.
    """
    largest_bytes = largest_bytes or _beyond_caches(caches(), "cpu")
    steps = int(2 * np.log2(largest_bytes / 4096)) + 1
    sizes = [int(4096 * 2 ** (step / 2)) // 64 * 64 for step in range(steps)]
    rows = [
        {"working_set_bytes": s, "bandwidth_bytes_s": bandwidth_bytes_s(s, threads=threads)}
        for s in sizes
    ]
    return pd.DataFrame(rows).assign(threads=threads)


def caches(folder: Path = _CACHES) -> pd.DataFrame:
    """The data caches of the first core, nearest first: ``size_bytes`` and the ``cores`` that
    share one, by name ("L1", "L2"). Empty where the system does not tell (it does on Linux)."""
    rows = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size, shared = (
            (index / name).read_text().strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            unit = {"K": 2**10, "M": 2**20}[size[-1]]
            rows[f"L{level}"] = {"size_bytes": int(size[:-1]) * unit, "cores": _count(shared)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["size_bytes", "cores"])


def _check(threads: int, device: str) -> str:
    """The kind of device, after a check that it is there."""
    if threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")
    kind = torch.device(device).type
    if kind not in _SIDES:
        raise ValueError(f"device is {device!r}; choose 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but there is no CUDA device; use 'cpu'")
    return kind


def _beyond_caches(known: pd.DataFrame, kind: str) -> int:
    if kind == "cuda":
        return 2**30
    return int(max(2**26, 4 * known["size_bytes"].max() if len(known) else 0))


def _aligned(count: int) -> np.ndarray:
    """Whole numbers from the start of a cache line on: what straddles two is read at half speed."""
    numbers = np.ones(count + 8, dtype=np.int64)
    start = -(numbers.ctypes.data // 8) % 8
    return numbers[start : start + count]


def _products(dtype: str, side: int, threads: int, device: str) -> list[Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    if dtype == "int8":
        codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, generator=generator)
        codes = codes.to(device)
        return [lambda: torch._int_mm(codes, codes)]
    values = torch.randn(side, side, generator=generator).to(device, getattr(torch, dtype))
    result = torch.empty_like(values)
    products = [lambda: torch.mm(values, values, out=result)]
    if dtype == "float32" and values.device.type == "cpu":
        session, feed = _onnx_product(side, threads), dict.fromkeys("ab", values.numpy())
        products.append(lambda: session.run(None, feed))
    return products


def _onnx_product(side: int, threads: int) -> "onnxruntime.InferenceSession":
    import onnxruntime
    from onnx import parser

    matrix = f"float[{side}, {side}]"
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]>'
        f"product ({matrix} a, {matrix} b) => ({matrix} c) {{ c = MatMul(a, b) }}"
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _fastest_s(call: Callable[[], object], device: str) -> float:
    """Seconds of one call: the fastest sample of as many calls as fill ``_SAMPLE_S``."""
    call()  # the first one loads code and memory
    calls = max(1, round(_SAMPLE_S / _sample_s(call, 1, device)))
    return min(_sample_s(call, calls, device) for _ in range(_SAMPLES))


def _sample_s(call: Callable[[], object], calls: int, device: str) -> float:
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / calls / 1e3
    start_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start_s) / calls


@compiled
def _add_up(numbers, passes):
    total = 0
    for _ in range(passes):
        # Whole numbers: unlike floats they may be added in any order, so in wide registers.
        part = 0
        for i in range(numbers.size):
            part += numbers[i]
        total ^= part  # no compiler may then make one pass of several
    return total


def _count(cpus: str) -> int:
    """How many a list such as "0-3,8" names."""
    ends = [part.split("-") for part in cpus.split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)
