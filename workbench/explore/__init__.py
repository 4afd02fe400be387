"""What people look at and touch: pictures, panels, advice, searches, reports and exercises.

module          what it does
--------------  -----------------------------------------------------------------------------------
`plots`         pictures of comparisons, layers and files
`panels`        the same with sliders: candidates, one layer, techniques to try
`diagnosis`     `doctor`: why a candidate is not smaller, or not faster
`differences`   `difference`: which answers two models give differently
`facts`         what is measured of a model before anything is advised
`advice`        `advise`: which techniques this model asks for
`spaces`        which recipes a search tries
`searching`     `search`: the best recipe within limits, proved on data that it never saw
`limits`        what a candidate may weigh and lose, and which of the rest wins
`code`          a recipe as Python
`report`        sentences and tables from frames, and the page to hand on
`evidence`      what that page is drawn from
`page`          the page itself, and its frames read back
`results`       the tables of the README, measured
`blocks`        generated parts of pages that people write
`exercises`     answers checked, hints, a score sheet
`workshop`      the students' edition, and its check
`labels`        names of many points in a picture without overlaps
"""

from importlib import import_module

_MODULES = (
    "advice", "blocks", "code", "diagnosis", "differences", "evidence", "exercises", "facts",
    "labels", "limits", "page", "panels", "plots", "report", "results", "searching", "spaces",
    "workshop",
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
