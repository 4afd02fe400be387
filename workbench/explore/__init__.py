"""What people look at and touch: pictures, panels, reports and exercises."""

from importlib import import_module

_MODULES = ("exercises", "panels", "plots", "report")


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
