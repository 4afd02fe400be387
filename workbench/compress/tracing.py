"""The graph of a model: which operation feeds which, with its modules left in place."""

import copy

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from workbench.compress.computed import CONVOLUTIONS, RECORD, TRANSPOSED, layer_type, make_dense


class UntraceableError(ValueError):
    """The model's own forward pass cannot be turned into a graph."""


class Whole(nn.Module):
    """A module that is one operation in a graph, whatever stands in its forward pass."""


class TracedModel(fx.GraphModule):
    """A graph module that keeps the record of its techniques when it is copied."""

    def __deepcopy__(self, memo):
        twin = super().__deepcopy__(memo)
        record = {key: value for key, value in vars(self).items() if key.startswith(RECORD)}
        vars(twin).update(copy.deepcopy(record, memo))
        return twin


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: frozenset[str] = frozenset()):  # unpickling gives no argument
        super().__init__()
        self.opaque, self.path = opaque, []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return (
            layer_type(module) is not None
            or isinstance(module, Whole)
            or name in self.opaque
            or super().is_leaf_module(module, name)
        )

    def call_module(self, module, forward, args, kwargs):
        self.path.append(self.path_of_module(module))
        output = super().call_module(module, forward, args, kwargs)
        self.path.pop()  # not reached when tracing fails: then the path tells where
        return output


def trace(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of ``model``, and the submodules that stayed opaque, each with the reason.

    The graph runs ``model``'s own modules. A submodule whose forward pass branches on values is
    kept as one opaque operation; when that is the model itself, UntraceableError says where.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(frozenset(opaque))
        try:
            graph = tracer.trace(model)
        except Exception as error:  # tracing runs the user's code, which may fail in any way
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if not tracer.path:
                raise UntraceableError(
                    f"the forward pass of {type(model).__name__} cannot be traced ({reason}); "
                    "move the part that depends on values into a submodule of its own, or "
                    "use quantize_dynamic or quantize_weights, which need no graph"
                ) from error
            opaque[tracer.path[-1]] = reason
        else:
            return TracedModel(model, graph, type(model).__name__), opaque


def fold_batch_norms(graph: fx.GraphModule) -> list[str]:
    """Fold each batch norm that directly follows a layer into its weights; returns their names.

    In evaluation mode a batch norm multiplies each channel by a constant and adds another, which
    the weights before it can do as well. Changes ``graph`` in place.
    """
    modules = dict(graph.named_modules())
    folded = []
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(
            modules[node.target], nn.modules.batchnorm._BatchNorm
        ):
            continue
        before = node.args[0]
        norm = modules[node.target]
        if (
            before.op != "call_module"
            or len(before.users) > 1
            or norm.running_mean is None
            or count_uses(graph, before.target) > 1
        ):
            continue
        layer = modules[before.target]
        make_dense(layer)
        if layer_type(layer) is nn.Linear:
            fused = fuse_linear_bn_eval(layer, norm)
        elif layer_type(layer) in (*CONVOLUTIONS, *TRANSPOSED):
            fused = fuse_conv_bn_eval(layer, norm, transpose=layer_type(layer) in TRANSPOSED)
        else:
            continue
        graph.set_submodule(before.target, fused)
        modules[before.target] = fused
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        folded.append(node.target)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


def count_uses(graph: fx.GraphModule, target: str) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.graph.nodes)


class Recorder(fx.Interpreter):
    """Runs a graph and hands the values of the chosen nodes to ``record(node, value)``."""

    def __init__(self, graph: fx.GraphModule, chosen: list[fx.Node], record):
        super().__init__(graph)
        self.chosen, self.record = set(chosen), record

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node in self.chosen and isinstance(value, Tensor):
            self.record(node, value)
        return value
