"""See and feel what it takes to make a model cheaper to serve.

Rooms: ``data``, ``models`` and ``training`` are the bench; ``compress`` makes a model cheaper,
``storage`` makes a small file of it, ``transfer`` takes that to another machine, ``deploy`` runs
it, ``parallel`` shares the work among several processes, ``measure`` gives the evidence and
``explore`` shows it. Each is imported when it is first used, so that ``import workbench`` itself
costs almost nothing. Begin with `measure.compare`, or with ``notebooks/00_start_here.ipynb``.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = (
    "compress", "data", "deploy", "explore", "measure", "models", "parallel", "storage", "training",
    "transfer",
)  # fmt: skip


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
