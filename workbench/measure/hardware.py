"""The machine that a measurement was made on: without it a latency means nothing."""

import html
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

# What torch calls an instruction set, and what its makers do; those that decide on int8 speed.
_EXTENSIONS = {
    "avx2": "AVX2", "avx512_f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16", "amx_int8": "AMX INT8", "amx_bf16": "AMX BF16", "neon": "NEON",
    "dot": "NEON dot product", "i8mm": "I8MM", "bf16": "BF16", "sve": "SVE", "sme": "SME",
}  # fmt: skip
_LIBRARIES = ("torch", "numpy", "onnxruntime", "openvino", "workbench")


@dataclass(frozen=True)
class Hardware:
    """A card of the machine; the last line of a cell shows it as a table."""

    processor: str
    vector_extensions: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int
    memory_bytes: int
    gpu: str  # "" where there is none
    gpu_memory_bytes: int
    operating_system: str
    python: str
    libraries: tuple[tuple[str, str], ...]  # (name, version)

    def rows(self) -> dict[str, str]:
        """What the card shows: label -> text."""
        return {
            "processor": self.processor,
            "vector extensions": ", ".join(self.vector_extensions) or "none known",
            "cores": f"{self.physical_cores or 'unknown'} physical, {self.logical_cores} logical",
            "memory": f"{self.memory_bytes / 2**30:.1f} GiB",
            "GPU": f"{self.gpu}, {self.gpu_memory_bytes / 2**30:.1f} GiB" if self.gpu else "none",
            "operating system": self.operating_system,
            "Python": self.python,
            "libraries": ", ".join(f"{name} {number}" for name, number in self.libraries),
        }

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows.items())

    def _repr_html_(self) -> str:
        lines = (
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.rows().items()
        )
        return f"<table>{''.join(lines)}</table>"


@cache
def hardware() -> Hardware:
    """The processor, its vector extensions, cores, memory, GPU and library versions.

    >>> hardware().logical_cores >= 1
    True
    """
    able = torch.cpu.get_capabilities()
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return Hardware(
        processor=able.get("cpu_name") or platform.processor() or platform.machine(),
        vector_extensions=tuple(name for key, name in _EXTENSIONS.items() if able.get(key)),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        gpu=gpu.name if gpu else "",
        gpu_memory_bytes=gpu.total_memory if gpu else 0,
        operating_system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        libraries=tuple((name, number) for name in _LIBRARIES if (number := _version(name))),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
