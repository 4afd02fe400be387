"""A model in, a service out: runtimes, files that run without Python code of yours, and a server.

module          what it does
--------------  -----------------------------------------------------------------------------------
`runtimes`      one `Predictor` for PyTorch, its compiler, ONNX Runtime and OpenVINO
`exporting`     a model as one file, and the proof that it answers as before
`lowering`      what each runtime is given in a module's place
`loading`       such a file run by its own runtime, without torch where that can be
`server`        models over HTTP: `serve` beside a notebook, or a command
`batcher`       requests become batches; how many at once follows the load
`repository`    versions of a model: swapped, tried on a share of the traffic, rolled back
`worker`        the processes that compute
`routes`        what is answered: the Open Inference Protocol, and plainer addresses
`protocol`      requests read and checked, answers written
`connection`    HTTP by uvicorn, with limits on how slowly a request may come
`openapi`       the description of all that for programs
`metrics`       the server's numbers, as Prometheus reads them
`generation`    text, symbol by symbol
`attribution`   what an answer depends on
`access`        keys, signatures, the audit log, TLS
`xla`           the exported graph as a program for XLA, the compiler of TPUs
`fpga`          a network as a fixed-point circuit, emulated bit by bit
"""

from importlib import import_module

# Nothing is imported until it is used: a serving process needs neither torch nor compilers.
_HOMES = {
    "exporting": ("Export", "ParityError", "export", "parity"),
    "lowering": ("UnsupportedError",),
    "runtimes": ("RUNTIMES", "Predictor", "installed", "load", "prepare"),
    "server": ("serve",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
