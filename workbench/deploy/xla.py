"""A model on XLA, the compiler in front of a TPU, by way of its exported graph and JAX.

`torch.export` writes a model as a short list of ATen operators. Here each of them is said in
``jax.numpy``, and `jax.jit` hands the whole to XLA, which compiles it for whatever JAX finds: a TPU
where there is one, otherwise the processor. The program is the same on both; what differs is the
last step, from HLO to machine code. Frostig, Johnson and Leary (2018), "Compiling machine learning
programs via high-level tracing".
"""

import operator
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from workbench.deploy.runtimes import Predictor
from workbench.training import evaluation_mode

if TYPE_CHECKING:
    import jax


class UnsupportedOperator(ValueError):
    """The exported graph has an operator that has no form in JAX here."""


class XlaPredictor(Predictor):
    """A model compiled by XLA, once for each shape of its inputs.

    Args:
        model: a module, or the `ExportedProgram` of one.
        example_input: inputs of one example, each with a batch dimension; not needed for an
            exported program.

    Attributes:
        platform: what XLA compiles for: "cpu", "tpu" or "gpu".

    Raises:
        UnsupportedOperator: with the operator and the layer that it belongs to.
        ImportError: JAX is not installed.

    Shown in notebook 12.
    """

    runtime = "xla"

    def __init__(self, model: nn.Module | ExportedProgram, example_input: tuple[Tensor, ...] = ()):
        jax = _jax()
        super().__init__("cpu")  # where inputs and outputs are; JAX moves them from there
        if isinstance(model, nn.Module):
            self.model = model
            model = _export(model, example_input)
        with warnings.catch_warnings():  # torch's export warns of torch's own trees
            warnings.simplefilter("ignore", FutureWarning)
            program = model.run_decompositions()
        _check(program)
        self.platform = jax.default_backend()
        self.weights = {name: jax.numpy.asarray(x) for name, x in _weights(program).items()}
        self.run = jax.jit(lambda weights, *inputs: _interpret(program, weights, inputs))

    def predict(self, *inputs: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.run(self.weights, *_arrays(inputs))))

    def compiled(self, *inputs: Tensor) -> "jax.stages.Compiled":
        """What XLA made of the graph for inputs of these shapes, on this platform.

        Its ``as_text()`` is the HLO after all optimizations, its ``cost_analysis()`` what XLA
        counts in it: "flops" and "bytes accessed", among others.
        """
        return self.run.lower(self.weights, *_arrays(inputs)).compile()

    def stablehlo(self, *inputs: Tensor, platform: str = "tpu") -> str:
        """The graph as it is handed to the compiler of ``platform``, which need not be here."""
        jax = _jax()
        exported = jax.export.export(self.run, platforms=[platform])
        return exported(self.weights, *_arrays(inputs)).mlir_module()


def _jax():
    try:
        import jax
        import jax.export
    except ImportError as error:
        raise ImportError(
            'XLA needs JAX, which is not installed: pip install -e ".[tpu]"'
        ) from error
    return jax


def _export(model: nn.Module, example_input: tuple[Tensor, ...]) -> ExportedProgram:
    # One example would make the batch a constant: torch takes sizes of 1 for broadcasting.
    several = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in example_input)
    with evaluation_mode(model):
        return torch.export.export(
            model, several, dynamic_shapes=[{0: Dim.DYNAMIC} for _ in several]
        )


def _check(program: ExportedProgram) -> None:
    """Say which operator is missing, and where, before anything is compiled."""
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_known(node):
            modules = list((node.meta.get("nn_module_stack") or {}).values())
            layer = modules[-1][0] if modules else ""
            raise UnsupportedOperator(
                f"{node.target}{node.args[1:]} in layer {layer or 'of the model itself'} has no "
                f"form in JAX here; there are {sorted(map(str, _operators()))}"
            )


def _is_known(node: torch.fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.convolution.default:
        return not node.args[6]  # transposed
    if node.target is aten.max_pool2d_with_indices.default:
        return not any(node.args[5:])  # rounded up
    return node.target in _operators()


def _weights(program: ExportedProgram) -> dict[str, np.ndarray]:
    """Weights and buffers by the name of the placeholder that they fill."""
    signature, stored = program.graph_signature, program.state_dict | program.constants
    names = (
        signature.inputs_to_parameters
        | signature.inputs_to_buffers
        | signature.inputs_to_lifted_tensor_constants
    )
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return {name: stored[target].detach().numpy() for name, target in names.items() if name in used}


def _arrays(inputs: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    return tuple(x.detach().cpu().numpy() for x in inputs)


def _interpret(program: ExportedProgram, weights: dict, inputs: tuple):
    """Run the graph node by node. JAX traces it: what it compiles is all that was done here."""
    values, waiting = {}, iter(inputs)
    given = set(program.graph_signature.user_inputs)

    def look_up(argument):
        return values[argument]

    # A TPU multiplies in bfloat16 unless it is told not to.
    with _jax().default_matmul_precision("highest"):
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(waiting) if node.name in given else weights.get(node.name)
            elif node.op == "call_function":
                arguments = torch.fx.map_arg(node.args, look_up)
                options = torch.fx.map_arg(node.kwargs, look_up)
                values[node] = _operators()[node.target](*arguments, **options)
            elif node.op == "output":
                return values[node.args[0][-1]]


@cache
def _operators() -> dict[Callable, Callable]:
    """Each operator of ATen that the reference networks use, said in JAX.

    Shapes: B batch, C channels; arguments in the order of ATen's own signatures.
    """
    jax = _jax()
    jnp, lax, aten = jax.numpy, jax.lax, torch.ops.aten

    def convolution(x, weight, bias, stride, padding, dilation, _transposed, _out, groups):
        y = lax.conv_general_dilated(
            x, weight, stride, [(p, p) for p in padding],
            rhs_dilation=dilation, feature_group_count=groups,
        )  # fmt: skip
        return y if bias is None else y + _along_channels(bias, y)

    def batch_norm(x, weight, bias, mean, variance, _momentum, epsilon):
        scale = lax.rsqrt(variance + epsilon) * (1 if weight is None else weight)
        shift = -mean * scale + (0 if bias is None else bias)
        return x * _along_channels(scale, x) + _along_channels(shift, x), None, None

    def layer_norm(x, shape, weight, bias, epsilon):
        axes = tuple(range(-len(shape), 0))
        y = jax.nn.standardize(x, axis=axes, epsilon=epsilon)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias, None, None

    def max_pool(x, kernel, stride=(), padding=(0, 0), dilation=(1, 1)):
        both = (1, 1)  # batch and channels are not pooled
        pads = [(0, 0), (0, 0), *((p, p) for p in np.broadcast_to(padding, 2).tolist())]
        y = lax.reduce_window(
            x, -jnp.inf, lax.max, (*both, *kernel), (*both, *(stride or kernel)), pads,
            window_dilation=(*both, *np.broadcast_to(dilation, 2).tolist()),
        )  # fmt: skip
        return y, None

    def cut(x, axis=0, start=None, end=None, step=1):
        return x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]

    def expand(x, shape, implicit=False):
        kept = (1,) * (len(shape) - x.ndim) + x.shape  # -1 keeps a size
        return jnp.broadcast_to(x, [k if s == -1 else s for s, k in zip(shape, kept, strict=True)])

    def scalar(value, dtype=torch.float32, layout=None, device=None, pin_memory=None):
        return jnp.asarray(value, str(dtype).removeprefix("torch."))

    return {
        operator.getitem: operator.getitem,
        operator.mul: operator.mul,
        operator.add: operator.add,
        aten.sym_size.int: lambda x, axis: x.shape[axis],
        aten.convolution.default: convolution,
        aten.addmm.default: lambda bias, x, weight: bias + x @ weight,
        aten.mm.default: jnp.matmul,
        aten.bmm.default: jnp.matmul,
        aten._native_batch_norm_legit_no_training.default: batch_norm,
        aten.native_layer_norm.default: layer_norm,
        aten.max_pool2d_with_indices.default: max_pool,
        aten.mean.dim: lambda x, axes, keepdim=False: x.mean(tuple(axes), keepdims=keepdim),
        aten.relu.default: jax.nn.relu,
        aten.gelu.default: lambda x, approximate="none": jax.nn.gelu(x, approximate == "tanh"),
        aten._softmax.default: lambda x, axis, _half_to_float: jax.nn.softmax(x, axis),
        aten.add.Tensor: lambda x, y: x + y,
        aten.mul.Tensor: lambda x, y: x * y,
        aten.where.self: jnp.where,
        aten.embedding.default: lambda weight, codes, *_: weight[codes],
        aten.scalar_tensor.default: scalar,
        aten.view.default: lambda x, shape: x.reshape(shape),
        aten.permute.default: jnp.transpose,
        aten.expand.default: expand,
        aten.slice.Tensor: cut,
        aten.squeeze.dims: lambda x, axes: jnp.squeeze(
            x, tuple(a for a in axes if x.shape[a] == 1)
        ),
        aten.clone.default: lambda x, memory_format=None: x,
        aten.alias.default: lambda x: x,
    }


def _along_channels(numbers, x):
    """(C,) as (C, 1, ...), to go along the second dimension of ``x``."""
    return numbers.reshape((-1,) + (1,) * (x.ndim - 2))
