"""Energy of a computation: counted where the machine has a counter, else modelled, and so called.

Modelled means: operations and bytes, each times a constant that was published for one chip. Such a
number compares two models; it does not tell what this machine draws.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

# Horowitz (2014), "Computing's energy problem (and what we can do about it)": 45 nm, 0.9 V. One
# multiplication and one addition, the sum of int8 products in 32 bits; a byte from 64-bit accesses.
MAC_PICOJOULES = {"float32": 3.7 + 0.9, "float16": 1.1 + 0.4, "int8": 0.2 + 0.1}
BYTE_PICOJOULES = {"32 kB cache": 20 / 8, "1 MB cache": 100 / 8, "memory": 1300 / 8}
_COUNTERS = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Of one call: the whole processor's, so other work on the machine is in it too."""

    joules: float
    seconds: float
    calls: int


def counted(
    call: Callable[[], object], *, least_s: float = 1.0, folder: Path = _COUNTERS
) -> Energy | None:
    """Joules of one call by the processor's own counters (RAPL), or None where none can be read.

    Repeats the call for ``least_s`` seconds, since the counters tick in milliseconds. Virtual
    machines have none, and elsewhere most systems let only root read them.
    """
    packages = [p for p in sorted(folder.glob("intel-rapl:*")) if p.name.count(":") == 1]
    try:
        before_uj = [_read(package, "energy_uj") for package in packages]
    except OSError:
        return None
    if not packages:
        return None
    calls, start_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - start_s) < least_s or calls == 0:
        call()
        calls += 1
    used_uj = 0
    for package, before in zip(packages, before_uj, strict=True):
        after = _read(package, "energy_uj")
        used_uj += after - before if after >= before else after + _read(package, _RANGE) - before
    return Energy(used_uj / 1e6 / calls, took_s / calls, calls)


def modelled_joules(frame: pd.DataFrame, source: str = "memory") -> pd.Series:
    """Modelled joules of each operation of `roofline.layers`, by Horowitz's constants.

    ``source`` is where all bytes are taken to come from; choose from ``BYTE_PICOJOULES``.

    Raises:
        ValueError: an unknown source, or a number type that multiplies and has no constant.

    >>> frame = pd.DataFrame({"dtype": ["int8"], "flops": [2e12], "moved_bytes": [0]})
    >>> modelled_joules(frame).round(3).tolist()
    [0.3]
    """
    if source not in BYTE_PICOJOULES:
        raise ValueError(f"source is {source!r}; choose from {list(BYTE_PICOJOULES)}")
    numbers = frame["dtype"].replace({"uint8": "int8"})
    unknown = set(numbers[frame["flops"] > 0]) - set(MAC_PICOJOULES)
    if unknown:
        raise ValueError(f"no constant for {sorted(unknown)}; there are {list(MAC_PICOJOULES)}")
    arithmetic = frame["flops"] / 2 * numbers.map(MAC_PICOJOULES).fillna(0)
    return (arithmetic + frame["moved_bytes"] * BYTE_PICOJOULES[source]) / 1e12


_RANGE = "max_energy_range_uj"  # where a counter starts again from zero


def _read(package: Path, name: str) -> int:
    return int((package / name).read_text())
