"""What people look at and touch: pictures, panels, reports, exercises and diagnoses."""

from importlib import import_module

_MODULES = (
    "advice", "blocks", "diagnosis", "differences", "evidence", "exercises", "facts", "limits",
    "page", "panels", "plots", "report", "searching", "workshop",
)  # fmt: skip
_FUNCTIONS = {  # name -> its module
    "advise": "advice",
    "difference": "differences",
    "doctor": "diagnosis",
    "search": "searching",
}


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_FUNCTIONS])
