"""How big a model is, and how much it computes. The words, as used everywhere here:

- **MAC**, multiply-accumulate: one ``a * b + c``, the unit of matrix products and convolutions.
- **FLOP**, floating-point operation: one addition or one multiplication, so a MAC is two FLOPs.
- **sparsity**: the fraction of weights that are zero; **density** is 1 minus sparsity.
- **compression ratio**: bytes before divided by bytes after; more is better.

Bytes are those of a saved file that loads back, never a count of weights times a width.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from workbench import models
from workbench.compress import computed
from workbench.deploy.runtimes import Predictor
from workbench.training import evaluation_mode

Inputs = Tensor | tuple[Tensor, ...]


def artifact_bytes(model: nn.Module | Predictor, *, codec: str | None = None) -> int:
    """Bytes on disk of the artifact that ``model`` saves to.

    Args:
        model: a module, saved as one ``.safetensors`` file in which shared weights stand once, or a
            `Predictor`, saved in its runtime's own format.
        codec: codes the file, as `workbench.storage.save` does; None leaves it plain. Only
            ``.safetensors`` files are coded.

    Raises:
        TypeError: a bare callable, which cannot be saved.
        ValueError: an unknown codec, or one for a file of another format.
    """
    if not isinstance(model, (nn.Module, Predictor)):
        raise TypeError(
            f"a {type(model).__name__} has no size; give a torch.nn.Module or a Predictor"
        )
    if codec is not None:
        return _coded_bytes(model, codec)
    if isinstance(model, nn.Module):
        return models.file_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model" + model.suffix))
        # Every file: large ONNX models keep their weights in a second one.
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def can_be_coded(predictor: Predictor) -> bool:
    """Whether the artifact of a predictor is one that `artifact_bytes` can code."""
    return predictor.suffix == ".safetensors" and predictor.model is not None


def _coded_bytes(model: nn.Module | Predictor, codec: str) -> int:
    from workbench import storage

    if isinstance(model, Predictor):
        if not can_be_coded(model):
            raise ValueError(f"codec is {codec!r}, but a {model.runtime} artifact is not coded")
        model = model.model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        return storage.save(model, path, codec=codec, progress=False).size_bytes


def compression_ratio(before_bytes: float, after_bytes: float) -> float:
    """Bytes before divided by bytes after.

    >>> compression_ratio(1000, 250)
    4.0
    """
    if not (before_bytes > 0 and after_bytes > 0):
        raise ValueError(f"sizes are {before_bytes} and {after_bytes} bytes; both must be above 0")
    return before_bytes / after_bytes


def parameters(model: nn.Module) -> int:
    """Number of weights and biases, each shared one counted once, however they are stored."""
    return sum(weight.numel() for _, weight in computed.weights(model))


def nonzeros(model: nn.Module) -> int:
    """Number of weights and biases that are not zero."""
    return sum(int(weight.count_nonzero()) for _, weight in computed.weights(model))


def density(model: nn.Module) -> float:
    """Fraction of weights and biases that are not zero.

    >>> layer = nn.Linear(3, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0]])
    >>> round(density(layer), 3), round(sparsity(layer), 3)
    (0.333, 0.667)
    """
    count = parameters(model)
    if count == 0:
        raise ValueError(f"{type(model).__name__} has no parameters, so no density or sparsity")
    return nonzeros(model) / count


def sparsity(model: nn.Module) -> float:
    """Fraction of weights and biases that are zero."""
    return 1 - density(model)


def macs(model: nn.Module, example_input: Inputs) -> int:
    """Multiply-accumulates for one example in matrix products, convolutions, attention and
    recurrent layers; what they leave out (activations, normalisation, pooling) is small.

    ``example_input`` is a tensor, or a tuple of them, with a leading batch dimension, of which
    the first example is used. Zero weights are counted too: a dense kernel multiplies them.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = tuple(x[:1].to(device) for x in _as_tuple(example_input))
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED_FLOPS)
    fused = torch.backends.mha.get_fastpath_enabled()
    # The fused encoder kernels hide their products from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(model), torch.no_grad(), counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


# What torch's counter does not know. GRU and RNN run as plain products on a CPU, which it sees;
# adding a formula per recurrent layer would count those twice. Shapes: T positions, B batch, I
# input, H hidden, G gates (4 in an LSTM). Each position multiplies by both weights once.
def _onednn_lstm_flops(x, w_input, w_hidden, *_, **__) -> int:
    positions, batch, _features = x  # w_input (G H, I), w_hidden (G H, H)
    return 2 * positions * batch * (math.prod(w_input) + math.prod(w_hidden))


def _cudnn_rnn_flops(x, weights, *_, **__) -> int:
    # (T, B, I), (B, T, I) or, packed, (positions, I); biases have one dimension.
    return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


_FUSED_FLOPS = {
    torch.ops.aten.mkldnn_rnn_layer: _onednn_lstm_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_rnn_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def peak_memory_bytes(predictor: Predictor, inputs: Inputs) -> float:
    """Most bytes that one call of ``predictor`` held at once, beyond its weights and inputs.

    Exact: it follows torch's allocator, scratch space of the kernels included. NaN for runtimes
    with an allocator of their own (ONNX Runtime) and for bare callables, which may have one.
    """
    if predictor.runtime not in ("eager", "compiled"):
        return math.nan
    device = torch.device(predictor.device)
    inputs = tuple(x.to(device) for x in _as_tuple(inputs))
    predictor.predict(*inputs)  # warm-up: compiling and one-time buffers are not the call's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        predictor.predict(*inputs)
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before_bytes)
    with _quiet_stderr(), profiler.profile(use_kineto=False, profile_memory=True) as recorded:
        predictor.predict(*inputs)
    changes = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held_bytes = peak_bytes = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held_bytes += change.nbytes()  # negative where memory is given back
        peak_bytes = max(peak_bytes, held_bytes)
    return float(peak_bytes)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what C++ writes to stderr: torch's profiler logs two lines for each run."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if torch.is_tensor(inputs) else tuple(inputs)
