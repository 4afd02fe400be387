"""The networks that are made cheaper: some trained here, some by others.

`names` lists the reference networks, small enough to train on a laptop and real enough to compress;
`real_names` lists those that other people trained. `build` makes one untrained, `pretrained` gives
it with its weights, and `from_hub` fetches one that the workbench does not know.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from workbench import data
from workbench.models import efficientnet, minilm
from workbench.models.efficientnet import efficientnet_lite0
from workbench.models.hub import from_hub
from workbench.models.minilm import MiniLM
from workbench.models.reference import (
    Attention,
    CharTransformer,
    ResidualBlock,
    TransformerBlock,
    lenet_5,
    lenet_300_100,
    mlp_wide,
    resnet,
)

__all__ = [
    "Attention",
    "CharTransformer",
    "MiniLM",
    "ResidualBlock",
    "TransformerBlock",
    "build",
    "efficientnet_lite0",
    "file_bytes",
    "from_hub",
    "lenet_5",
    "lenet_300_100",
    "mlp_wide",
    "names",
    "pretrained",
    "real_names",
    "record",
    "resnet",
    "save",
]


def names() -> list[str]:
    """Names of the reference networks, smallest task first."""
    return list(_REFERENCE)


def real_names() -> list[str]:
    """Names of the networks that other people trained.

    ``efficientnet-lite0`` sorts photographs into the 1000 classes of ImageNet, ``minilm`` turns
    sentences into vectors, and ``minilm-films`` is the same with a linear layer on top, fitted
    here, that tells praise of a film from blame. MiniLM needs its package; see `pretrained`.
    """
    return list(_REAL)


def build(name: str, *, seed: int = 0) -> nn.Module:
    """An untrained network; the same seed gives the same weights.

    >>> sum(p.numel() for p in build("lenet-300-100").parameters())
    266610
    """
    _check(name, _BUILDERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name]()


def pretrained(name: str) -> nn.Module:
    """A network with its trained weights, in float32 and in evaluation mode.

    `record` tells how a network of `names` was trained.

    Raises:
        ValueError: unknown name, or the file does not have the committed checksum.
        FileNotFoundError: the file is missing.
        ImportError: the network comes with a package that is not installed.
    """
    _check(name, _BUILDERS)
    if name == "efficientnet-lite0":
        stored = load_file(data.verified("models/efficientnet_lite0_fp16.safetensors"))
        model = build(name)
        model.load_state_dict(efficientnet.from_published(stored))
    elif name == "minilm":
        stored = load_file(minilm.package_folder() / "model.safetensors")
        model = build(name)
        model.load_state_dict(minilm.from_published(stored))
    elif name == "minilm-films":
        model = nn.Sequential(pretrained("minilm"), nn.Linear(384, 2))
        load_model(model[1], data.verified("models/minilm-films.safetensors"))
    else:
        path = data.verified(f"models/{name}.safetensors")
        model = build(name)
        load_model(model, path)
    return model.eval()


def record(name: str) -> dict:
    """How the weights of `pretrained(name)` were made: seed, epochs, optimizer, time, result.

    Of what other people trained there is no such record, only of the layer of ``minilm-films``;
    ``data/README.md`` tells the origin of the others.
    """
    _check(name, [*_REFERENCE, "minilm-films"])
    return json.loads(data.verified(f"models/{name}.json").read_text())


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a module's state as ``.safetensors``: shared tensors once, the whole file or none."""
    stored = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    data.write_whole(path, lambda temporary: save_model(stored, temporary))


def file_bytes(model: nn.Module) -> int:
    """Bytes of the file that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save(model, path)
        return path.stat().st_size


_REFERENCE = {
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "resnet-8": lambda: resnet((16, 32, 64), blocks=1),
    "resnet-14": lambda: resnet((32, 64, 128), blocks=2),
    "mlp-wide": mlp_wide,
    "char-transformer": CharTransformer,
}

_REAL = {
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": MiniLM,
    "minilm-films": lambda: nn.Sequential(MiniLM(), nn.Linear(384, 2)),
}

_BUILDERS = _REFERENCE | _REAL


def _check(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"no reference network is called {name!r}; choose from {list(known)}")
