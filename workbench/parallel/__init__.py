"""One model, several workers: processes for a function, and ways to share training among them.

module                  what it does
----------------------  ---------------------------------------------------------------------------
`launch`                `run` a function of a notebook in several processes of this machine
`torchrun`              the same on several machines, with restarts
`data_parallel`         shares of each batch: all-reduce by hand, DDP, FSDP, a sharded optimizer
`gradient_compression`  fewer bytes on the wire for each step
`tensor_parallel`       parts of each layer
`pipeline_parallel`     some of the layers, and a schedule of micro-batches
`graph_parallel`        branches of a network side by side
`cost_model`            time and memory of a step on machines that are not here, modelled
"""

from importlib import import_module

from workbench.parallel.launch import RankError, run

# Most of torch.distributed is imported only when it is used.
_HOMES = {
    "cost_model": ("Layout", "Link", "Machine", "Work", "best_layout", "predict", "scaling"),
    "data_parallel": ("Replica", "average_gradients", "train"),
    "gradient_compression": ("compress_gradients", "diloco", "local_sgd"),
    "graph_parallel": ("branches", "gather_branches", "parallelize_branches"),
    "pipeline_parallel": ("Pipeline", "bubble", "in_flight", "split"),
    "tensor_parallel": ("gather_tensors", "rank_bytes", "shard_tensors"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["RankError", "run", *_MODULE_OF]


def __getattr__(name: str):
    if name in _HOMES or name == "torchrun":
        return import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULE_OF])
