"""Run the long experiments again: ``make experiments``, or ``data/experiments/run.py NAME ...``.

Writes the measurements to ``NAME.csv`` and how they were made to ``NAME.json`` beside this file,
and their checksums into ``data/SHA256SUMS``. Notebooks show these records beside a short run of
their own. What is chosen is chosen on the validation split; scores are those of the test split.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch
import torch.distributed as dist
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, MultiStepLR
from torch.utils.data import TensorDataset

from workbench import compress, data, measure, models, parallel, storage, training
from workbench.compress.distillation import divergence
from workbench.compress.equalization import equalize_layers
from workbench.compress.layers import layers_of
from workbench.compress.recipe import (
    Distill,
    FineTune,
    Prune,
    QuantizeWeights,
    Recipe,
    ShareWeights,
)
from workbench.compress.rounding import quantize_gptq
from workbench.compress.smoothing import smooth_activations
from workbench.data import Split, Task
from workbench.deploy import exporting, runtimes
from workbench.deploy.runtimes import prepare
from workbench.deploy.server import serve
from workbench.explore.limits import Limits
from workbench.explore.searching import search
from workbench.measure.accuracy import interval, paired_p_value
from workbench.measure.agreement import agreement
from workbench.measure.load import Request, wrk
from workbench.measure.robustness import under_attack
from workbench.measure.selection import best
from workbench.parallel import gradient_compression as gc
from workbench.parallel import pipeline_parallel as pp
from workbench.storage import run_length

SEEDS = (0, 1, 2)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

# How each network is trained for a while after a step; `examples` is the images of an epoch.
FINE_TUNING = {
    "lenet-300-100": dict(examples=55_000, epochs=6),
    "lenet-5": dict(examples=55_000, epochs=2, optimizer=partial(torch.optim.AdamW, lr=3e-3)),
    "resnet-14": dict(examples=5_000, epochs=1, augment=data.flip_and_shift),
}


def smaller(task: Task, examples: int, seed: int) -> Task:
    """A task with fewer training examples, and as few of validation as choosing an epoch takes."""
    validation = task.validation.subset(min(2_000, len(task.validation)), seed=seed)
    return replace(task, train=task.train.subset(examples, seed=seed), validation=validation)


def fine_tune(model: nn.Module, name: str, task: Task, seed: int, **settings) -> nn.Module:
    """A copy of a reference network, trained for as long as `FINE_TUNING` says."""
    settings = dict(optimizer=SGD) | FINE_TUNING[name] | settings
    examples = settings.pop("examples")
    work = copy.deepcopy(model).to(memory_format=torch.channels_last)
    task = replace(task, train=task.train.subset(examples, seed=seed))
    if settings["epochs"] == 1:  # there is no epoch to choose
        task = replace(task, validation=task.validation.subset(100))
    training.fit(work, task, precision="mixed", seed=seed, progress=False, **settings)
    return work


def score(model: nn.Module, task: Task) -> float:
    return training.evaluate(model, task, split="test").value


def facts(model: nn.Module, task: Task) -> dict:
    """What a model is worth and what it costs."""
    return {
        "score": score(model, task),
        "size_bytes": measure.artifact_bytes(model),
        "parameters": measure.parameters(model),
        "nonzeros": measure.nonzeros(model),
        "macs": measure.macs(model, task.example_input),
    }


RATIOS = (2, 4, 8, 10, 16, 32)  # weights for each that is kept


def pruning(network: str) -> Iterator[dict]:
    """Accuracy of a network that is pruned and trained in turns, against a random control."""
    task = data.fashion_mnist()
    dense = models.pretrained(network)
    columns = {"network": network, "criterion": "none", "seed": 0, "ratio": 1.0, "sparsity": 0.0}
    yield columns | {"score": score(dense, task)}
    for seed in SEEDS:
        for criterion in ("magnitude", "random"):
            work = dense
            for ratio in RATIOS:
                sparsity = 1 - 1 / ratio
                work = compress.prune(work, sparsity=sparsity, criterion=criterion, seed=seed)
                work = fine_tune(work, network, task, seed)
                columns |= {"criterion": criterion, "seed": seed}
                columns |= {"ratio": float(ratio), "sparsity": sparsity}
                yield columns | {"score": score(work, task)}


def structured() -> Iterator[dict]:
    """What a residual network loses with half of its work, and gets back by training."""
    task = data.fashion_mnist()
    dense = models.pretrained("resnet-14")
    half = compress.prune_structured(dense, task, macs=0.5, importance="l1", scope="layer")
    tuned = fine_tune(half, "resnet-14", task, seed=0, examples=55_000, epochs=3)
    int8 = compress.quantize_static(tuned, task)
    stages = {"dense": dense, "removed": half, "fine-tuned": tuned, "int8": int8}
    for stage, model in stages.items():
        yield {"stage": stage, "seed": 0} | facts(model, task)


def structured_transformer() -> Iterator[dict]:
    """The same for a transformer: half of its feed-forward neurons, a quarter of its heads."""
    task = data.austen()
    dense = models.pretrained("char-transformer")
    half = compress.prune_structured(dense, task, sparsity=0.5, heads=0.25, importance="l1")
    tuned = copy.deepcopy(half)
    part = smaller(task, 12_800, seed=0)
    training.fit(tuned, part, batch_size=64, optimizer=partial(torch.optim.AdamW, lr=2e-3),
                 gradient_norm=1.0, precision="mixed", progress=False)  # fmt: skip
    for stage, model in {"dense": dense, "removed": half, "fine-tuned": tuned}.items():
        yield {"stage": stage, "seed": 0} | facts(model, task)


def distillation() -> Iterator[dict]:
    """A small residual network trained alone, and with a larger one as its teacher."""
    task = data.fashion_mnist()
    teacher = models.pretrained("resnet-14")
    optimizer = partial(SGD, lr=0.1)
    for examples, epochs, seeds in ((2_000, 20, range(5)), (20_000, 5, range(3))):
        for seed in seeds:
            part = smaller(task, examples, seed)
            alone = models.build("resnet-8", seed=seed).to(memory_format=torch.channels_last)
            student = copy.deepcopy(alone)
            settings = dict(epochs=epochs, optimizer=optimizer, precision="mixed", seed=seed)
            training.fit(alone, part, progress=False, **settings)
            taught = compress.distill(
                teacher, part, student=student, cache=True, progress=False, **settings
            )
            for kind, model in (("alone", alone), ("distilled", taught)):
                yield {"examples": examples, "epochs": epochs, "seed": seed, "training": kind,
                       "score": score(model, task)}  # fmt: skip


def students() -> Iterator[dict]:
    """Students of several sizes, taught at several temperatures, or trained alone (0)."""
    task = data.fashion_mnist()
    teacher = models.pretrained("lenet-5")
    for epochs, seed in itertools.product((10, 40), SEEDS):
        settings = dict(epochs=epochs, optimizer=partial(torch.optim.AdamW, lr=3e-3), seed=seed)
        part = smaller(task, 5_000, seed)
        for width, temperature in itertools.product((8, 16, 32, 64, 128), (0, 1, 2, 4, 8)):
            torch.manual_seed(seed)
            student = nn.Sequential(
                nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)
            )
            if temperature == 0:
                training.fit(student, part, progress=False, **settings)
            else:
                student = compress.distill(
                    teacher, part, student=student, temperature=temperature, cache=True,
                    progress=False, **settings,
                )  # fmt: skip
            yield {"epochs": epochs, "width": width, "temperature": float(temperature),
                   "seed": seed, "score": score(student, task)}  # fmt: skip


def few_bits() -> Iterator[dict]:
    """4, 2 and 1 bits a weight: shared values with trained codebooks, and training for rounding."""
    task = data.fashion_mnist()
    for network in ("lenet-300-100", "lenet-5"):
        dense = models.pretrained(network)
        columns = {"network": network, "technique": "float32", "bits": 32, "seed": 0}
        yield columns | facts(dense, task)
        for seed in SEEDS:
            part = smaller(task, 20_000, seed)
            for bits in (4, 2, 1):
                shared = compress.share_weights(dense, clusters=2**bits, seed=seed)
                training.fit(shared, part, epochs=1, seed=seed, progress=False,
                             optimizer=partial(torch.optim.AdamW, lr=2e-4))  # fmt: skip
                aware = compress.quantize_aware(
                    dense, part, bits=bits, epochs=2, seed=seed, progress=False
                )
                for technique, model in (("shared values", shared), ("rounded", aware)):
                    columns |= {"technique": technique, "bits": bits, "seed": seed}
                    yield columns | facts(model, task)


ORDER_STEPS = {
    "prune": Prune(sparsity=0.9),
    "share": ShareWeights(clusters=15),
    "quantize": QuantizeWeights(bits=4),
    "distill": Distill(epochs=2, optimizer=partial(torch.optim.AdamW, lr=1e-3), cache=True),
}


def orders() -> Iterator[dict]:
    """All 24 orders of pruning, sharing, quantizing and distilling one convolutional network."""
    task = data.fashion_mnist()
    dense = models.pretrained("lenet-5")
    for order in itertools.permutations(ORDER_STEPS):
        for seed in SEEDS[:2]:
            part = smaller(task, 5_000, seed)
            steps = (ORDER_STEPS[name] for name in order)
            recipe = Recipe(*(replace(s, seed=seed) if hasattr(s, "seed") else s for s in steps))
            small = recipe(dense, part, progress=False)
            yield {"order": ", ".join(order), "seed": seed} | facts(small, task)


def sensitivity() -> Iterator[dict]:
    """What a few bits in one layer alone do to a residual network, on validation."""
    table = compress.sensitivity(
        models.pretrained("resnet-14"), data.fashion_mnist(), QuantizeWeights, [*range(2, 9)],
        progress=False,
    )  # fmt: skip
    yield from table.drop(columns=["technique", "shared_with"]).to_dict("records")


# Deep Compression: level after level, the share of all weights that is kept, how many values the
# kept ones of a layer share, and what trains them: AdamW leaves a network nearest to what it was,
# SGD finds a good one where little is left. All seeds go through the first `seeds_levels` of them;
# the file of the level `kept_file` stays beside the record.
FAST, GENTLE = partial(SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-3)
DEEP_COMPRESSION = {
    "lenet-300-100": dict(
        levels={
            0.2: (15, FAST),
            0.1: (15, FAST),
            0.065: (15, FAST),
            0.043: (15, FAST),
            0.032: (15, FAST),
            0.026: (15, FAST),
            0.019: (15, FAST),
            0.013: (7, FAST),
            0.01: (7, FAST),
        },
        seeds_levels=2,
        kept_file=0.1,
        epochs=6,
        share_of=None,  # weights compete over the whole network
        clusters_of={},
        bias_step=1 / 16,
    ),
    "lenet-5": dict(
        levels={
            0.2: (15, GENTLE),
            0.12: (15, GENTLE),
            0.09: (15, GENTLE),
            0.06: (15, SGD),
            0.04: (15, SGD),
            0.026: (15, SGD),
            0.018: (15, SGD),
            0.0125: (7, SGD),
            0.01: (7, SGD),
        },
        seeds_levels=3,
        kept_file=0.09,
        epochs=5,
        # What each layer keeps, relative to all: small layers more, as in Han et al. The few
        # weights of the first convolution are the ones that bear sharing least.
        share_of={"0": 8, "3": 3, "7": 0.83, "9": 4},
        clusters_of={"0": 63},
        bias_step=1 / 64,
    ),
}
CODEBOOKS = dict(epochs=1, optimizer=partial(torch.optim.AdamW, lr=5e-4, weight_decay=0))


def deep_compression() -> Iterator[dict]:
    """Deep Compression of both LeNets, up to 200 times smaller, with the bytes of each stage.

    A row for each layer, for all biases, for the header, and for all of these together ("all").
    """
    task = data.fashion_mnist()
    teacher = models.pretrained("resnet-14").to(memory_format=torch.channels_last)
    taught = with_teacher(task, teacher)
    for (network, settings), seed in itertools.product(DEEP_COMPRESSION.items(), SEEDS):
        dense = pruned = models.pretrained(network)
        before = training.evaluate(dense, task).scores
        levels = [*settings["levels"].items()]
        if seed > 0:
            levels = levels[: settings["seeds_levels"]]
        for density, (clusters, optimizer) in levels:
            sparsity = 1 - density
            if settings["share_of"]:
                sparsity = {n: max(0, 1 - k * density) for n, k in settings["share_of"].items()}
            pruned = compress.prune(pruned, sparsity=sparsity)
            how = dict(epochs=settings["epochs"], optimizer=optimizer)
            pruned = fine_tune(pruned, network, taught, seed, **how)
            values = clusters
            if settings["clusters_of"]:
                values = dict.fromkeys(layers_of(dense), clusters) | settings["clusters_of"]
            shared = compress.share_weights(pruned, clusters=values)
            round_biases(shared, settings["bias_step"])
            tuned = fine_tune(shared, network, taught, seed, **CODEBOOKS)
            table, loaded = byte_table(dense, tuned)
            if (seed, density) == (0, settings["kept_file"]):
                path = data.folder() / f"experiments/deep-compression-{network}.safetensors"
                storage.save(tuned, path, progress=False)
            after = training.evaluate(loaded, task).scores
            scores = {
                "validation": training.evaluate(loaded, task, split="validation").value,
                "score_dense": before.mean().item(),
                "score_pruned": score(pruned, task),
                "score_shared": score(shared, task),
                "score": after.mean().item(),
                "p_value": paired_p_value(before, after, proportion=True),
            }
            columns = {"network": network, "seed": seed, "density": density, "clusters": clusters}
            for layer, row in table.items():
                yield columns | {"layer": layer} | row | (scores if layer == "all" else {})


def with_teacher(
    task: Task, teacher: nn.Module, temperature: float = 2, share: float = 0.7
) -> Task:
    """The task with a teacher's answers beside the labels, and the loss of `compress.distill`.

    They are worked out once here, and not anew in each training.
    """
    inputs, labels = task.train.source.tensors
    with training.evaluation_mode(teacher), torch.no_grad():
        logits = torch.cat([teacher(x) for x in inputs.split(500)])
    target = torch.cat([logits, labels[:, None]], dim=1)  # (examples, classes + 1)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1:  # validation and test have labels alone
            return task.loss(outputs, target)
        expected, labels = target[:, :-1], target[:, -1].long()
        soft = divergence(outputs, expected, labels, temperature)
        return share * soft + (1 - share) * task.loss(outputs, labels)

    return replace(task, train=Split(TensorDataset(inputs, target)), loss=loss)


def round_biases(model: nn.Module, step: float) -> None:
    """Let biases share values too. They no longer train."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = (parameter.data / step).round() * step
            parameter.requires_grad_(False)


def byte_table(dense: nn.Module, shared: nn.Module) -> tuple[dict[str, dict], nn.Module]:
    """Bytes of each part after each stage of Deep Compression, and the model as its file holds it.

    Stages of Han et al. (2016): pruned and shared weights are counted as pairs of a gap and a value
    (32 bits, or a code) of fixed width, fillers of long gaps included; coded ones are what the file
    holds, with a Huffman code for gaps and one for values. "coded" takes the best codec instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        frames = {
            "huffman": storage.save(shared, path, codec="run_length", progress=False).frame,
            "coded": storage.save(shared, path, progress=False).frame,
        }
        loaded, size = storage.load(path, into=dense), path.stat().st_size
    huffman, best = (frame.set_index("tensor") for frame in frames.values())
    table = {}
    for name, dense_weight in dense.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        source = shared.get_submodule(layer).sources["weight"]
        codes = source.codes().numpy()
        pairs = {bits: len(run_length.gaps(codes, 0, bits)[0]) for bits in range(1, 9)}
        gap_bits = min(pairs, key=lambda bits: pairs[bits] * (bits + source.bits))
        count, held = pairs[gap_bits], huffman.loc[name]
        table[layer] = {
            "weights": codes.size,
            "nonzeros": int((codes != 0).sum()),
            "pairs": count,
            "gap_bits": gap_bits,
            "code_bits": source.bits,
            "dense_bytes": dense_weight.nbytes,
            "pruned_bytes": -(-count * (gap_bits + 32) // 8),
            "shared_bytes": -(-count * (gap_bits + source.bits) // 8) + source.codebook.nbytes,
            "huffman_gaps_bytes": int(held["positions_bytes"]),
            "huffman_values_bytes": int(held["values_bytes"]),
            "huffman_bytes": int(held["size_bytes"]),
            "coded_bytes": int(best.loc[name, "size_bytes"]),
        }
    biases = sum(p.nbytes for n, p in dense.named_parameters() if n.endswith("bias"))
    rest = models.file_bytes(dense) - biases - sum(row["dense_bytes"] for row in table.values())
    for part, plain in (("biases", biases), ("header", rest)):
        table[part] = {f"{stage}_bytes": plain for stage in ("dense", "pruned", "shared")}
        for stage, frame in frames.items():
            is_bias = frame["tensor"].str.endswith("bias")
            which = is_bias if part == "biases" else frame["count"] == 0
            table[part][f"{stage}_bytes"] = int(frame["size_bytes"][which].sum())
    frame = pd.DataFrame(table.values()).drop(columns=["gap_bits", "code_bits"])
    assert frame["coded_bytes"].sum() == size
    return table | {"all": frame.sum().astype(int).to_dict()}, loaded


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices, which is all that it takes, and AdamW for the rest, at one learning rate.

    The learning rate of Muon is brought to AdamW's scale as in Liu et al. (2025), "Muon is scalable
    for LLM training".
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim == 2]
        rest = [p for p in parameters if p.ndim != 2]
        how = dict(lr=lr, weight_decay=0.01)
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **how),
            torch.optim.AdamW(rest, **how),
        ]
        super().__init__(parameters, how)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()


# Each optimizer, with what it does not default to, and the smallest of its seven learning rates,
# as a power of ten. The next is always sqrt(10) times larger.
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, -2),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), -3),
    "Nesterov": (partial(torch.optim.SGD, momentum=0.9, nesterov=True), -3),
    "AdaGrad": (torch.optim.Adagrad, -3),
    "RMSProp": (torch.optim.RMSprop, -4.5),
    "Adam": (torch.optim.Adam, -4.5),
    "AdamW": (torch.optim.AdamW, -4.5),
    "Muon": (MuonAndAdamW, -4.5),
}
SCHEDULES: dict[str, training.Schedule] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
    "warm-up": lambda optimizer, steps: LinearLR(optimizer, 0.01, total_iters=steps // 10),
    "step": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, 3 * steps // 4]),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "one-cycle": training.one_cycle,
}
# A larger batch starts from the rate chosen for 64 images, and is not tuned again.
SCALINGS = {"unscaled": 0.0, "square root": 0.5, "linear": 1.0}  # exponent of the batch size
BATCH = 64


def optimizers() -> Iterator[dict]:
    """Optimizers, each at the best of seven learning rates; then schedules; then batch sizes."""
    task = data.fashion_mnist()
    chosen = {}
    for name, (optimizer, low) in OPTIMIZERS.items():
        rates = [10 ** (low + step / 2) for step in range(7)]
        columns = {"question": "optimizer", "name": name, "batch_size": BATCH}
        chosen[name] = yield from best_of(rates, columns, task, optimizer=optimizer)
    momentum = OPTIMIZERS["momentum"][0]
    for name, schedule in SCHEDULES.items():
        rates = [chosen["momentum"] * 10 ** (step / 2) for step in (-1, 0, 1)]
        columns = {"question": "schedule", "name": name, "batch_size": BATCH}
        yield from best_of(rates, columns, task, optimizer=momentum, schedule=schedule)
    small, rates = "lenet-300-100", [10 ** (step / 2) for step in (-4, -3, -2, -1)]
    columns = {"question": "batch size", "name": "momentum", "batch_size": BATCH}
    rate = yield from best_of(rates, columns, task, network=small, optimizer=momentum)
    for batch_size, name in itertools.product((32, 64, 128, 256, 512, 1024, 2048), SCALINGS):
        scaled = rate * (batch_size / BATCH) ** SCALINGS[name]
        columns = {"question": "batch size", "name": name, "batch_size": batch_size}
        for seed in SEEDS:
            row, _ = short_training(
                scaled, seed, task, batch_size, network=small, optimizer=momentum
            )
            yield columns | {"stage": "scaled"} | row


def best_of(rates: list[float], columns: dict, task: Task, **settings) -> Generator:
    """Rows of a sweep over learning rates, then of all seeds at the best; returns that rate.

    It is chosen by the first seed on validation; only the rows "final" see the test split.
    """
    tried = {}
    for rate in rates:
        row, model = short_training(rate, SEEDS[0], task, **settings)
        yield columns | {"stage": "sweep"} | row
        tried[rate] = (row, model)
    best = max(rates, key=lambda rate: tried[rate][0]["validation"])
    for seed in SEEDS:
        if seed != SEEDS[0]:
            tried[best] = short_training(best, seed, task, **settings)
        row, model = tried[best]
        yield columns | {"stage": "final"} | row | {"score": score(model, task)}
    return best


def short_training(
    rate: float, seed: int, task: Task, batch_size: int = BATCH, *, optimizer: Callable,
    network: str = "lenet-5", **settings,
) -> tuple[dict, nn.Module]:  # fmt: skip
    """Five epochs on 4,000 images. A loss that is no longer finite counts as knowing nothing."""
    model = models.build(network, seed=seed).to(memory_format=torch.channels_last)
    columns = {"network": network, "learning_rate": rate, "seed": seed}
    try:
        history = training.fit(
            model, smaller(task, 4_000, seed), epochs=5, batch_size=batch_size, seed=seed,
            optimizer=partial(optimizer, lr=rate), precision="mixed", progress=False, **settings,
        ).frame  # fmt: skip
    except ValueError as error:
        if "training loss" not in str(error):
            raise
        return columns | {"diverged": True, "validation": 1 / len(task.labels)}, model
    facts = {"diverged": False, "training_loss": history["training_loss"].iloc[-1]}
    return columns | facts | {"validation": history["validation_accuracy"].max()}, model


class Forgetful(gc.TopK):
    """Top-k as it must not be done: what is not sent is lost."""

    feedback = False


# How gradients, or weights, cross the wire, and what trains: SGD with momentum, but for DiLoCo.
STEPS, EVERY = 400, 50
COMPRESSORS: dict[str, gc.Compressor] = {
    "none": gc.Uncompressed(),
    "fp16": gc.Cast("float16"),
    "bf16": gc.Cast("bfloat16"),
    "int8": gc.Int8(),
    "ternary": gc.Ternary(),
    "sign": gc.Sign(),
    "top-k 1 %": gc.TopK(density=0.01),
    "top-k 1 %, forgetful": Forgetful(density=0.01),
    "DGC 1 %": gc.DeepGradient(density=0.01, warm_up_steps=STEPS // 10),
    "PowerSGD rank 4": gc.PowerSGD(rank=4),
}
LOCAL: dict[str, Callable[..., gc.LocalTraining]] = {
    "local SGD": partial(gc.local_sgd, every=EVERY),
    "DiLoCo": partial(gc.diloco, every=EVERY),
}


def gradient_compression() -> Iterator[dict]:
    """Bytes for each step of two ranks, and accuracy after as many steps, for each compressor.

    LeNet-300-100 on batches of 128, with a one-cycle schedule. DiLoCo trains with AdamW inside, so
    there is a row of AdamW without compression ("none, AdamW"), too.
    """
    adamw = ("none, AdamW", "DiLoCo")
    for method in (*COMPRESSORS, "local SGD", *adamw):
        optimizer = partial(SGD, weight_decay=0)
        if method in adamw:
            optimizer = partial(torch.optim.AdamW, lr=2e-3)
        compressor = method.removesuffix(", AdamW")
        ranks = parallel.run(trained_by_two, compressor, optimizer, 0)
        assert torch.equal(ranks[0].pop("weights"), ranks[1].pop("weights"))
        yield {"method": method, "seed": 0, "steps": STEPS} | ranks[0]


def trained_by_two(method: str, optimizer: Callable, seed: int) -> dict:
    """What one rank trains on its half of every batch of 128; it has the same weights as others."""
    task = data.fashion_mnist()
    model = models.build("lenet-300-100", seed=seed)
    trained, stepper, wire = exchanging(method, model, optimizer)
    scheduler = training.one_cycle(getattr(stepper, "optimizer", stepper), STEPS)
    images, labels = task.train.source.tensors
    order = torch.arange(len(labels)).repeat(2)
    for half in order.view(2, -1):
        half[:] = half[torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))]
    for batch in order[: STEPS * 128].split(128):
        mine = batch[dist.get_rank() :: 2]
        trained.zero_grad()
        task.loss(trained(images[mine]), labels[mine]).backward()
        stepper.step()
        scheduler.step()
    report = wire.report()
    return {
        "bytes_per_step": report.bytes_per_step,
        "times_smaller": report.times_smaller,
        "score": score(model, task),
        "weights": nn.utils.parameters_to_vector(model.parameters()).detach(),
    }


def exchanging(method: str, model: nn.Module, optimizer: Callable, **changes) -> tuple:
    """The model to call, whose ``step`` to call, and whose ``report`` has the bytes."""
    if method in LOCAL:
        local = LOCAL[method](model, optimizer(model.parameters()))
        return model, local, local
    compressor = COMPRESSORS[method]
    if isinstance(compressor, gc.DeepGradient):  # has the momentum in it
        compressor = replace(compressor, **changes)
        optimizer = partial(torch.optim.SGD, lr=optimizer.keywords["lr"])
    wrapped = DistributedDataParallel(model, bucket_cap_mb=25)
    wire = gc.compress_gradients(wrapped, compressor)
    return wrapped, optimizer(model.parameters()), wire


def slow_link() -> Iterator[dict]:
    """Time and bytes of a training step of two hosts, at 100 Mbit/s and without a limit, and alone.

    The hosts are network namespaces on one machine: needs root, and ``ip`` and ``tc`` (iproute2).
    Bytes on the wire are those of the interface's counter. "DDP" has no hook at all; "alone" are
    two processes side by side that compress and decompress, and have nobody to send to. "send"
    sends so many bytes to the other host and nothing else: what the link does.
    """
    sys.path.append(str(data.folder().parent / "tests"))
    import namespaces

    links = {"100 Mbit/s": 100, "no limit": None}
    for link, rate_mbit_s in links.items():
        with namespaces.two_hosts(rate_mbit_s) as hosts:
            for row in hosts.run(sending)[0]:
                yield {"link": link, "method": "send"} | row
    compressors = [name for name in COMPRESSORS if not name.endswith("forgetful")]
    for method in ("DDP", *compressors, *LOCAL):
        for link, rate_mbit_s in links.items():
            with namespaces.two_hosts(rate_mbit_s) as hosts:
                rows = hosts.run(timed, method, hosts.sent_bytes)
            yield {"link": link, "method": method} | rows[0]
        yield {"link": "alone", "method": method} | parallel.run(timed_alone, method)[0]


def sending() -> list[dict]:
    """Seconds for a message to reach the other rank: half of there and back, the best of five."""
    rows = []
    for size in (1_000, 2_000_000, 4_000_000, 8_000_000):
        message, seconds = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(6):
            dist.barrier()
            start = time.perf_counter()
            for sender in (0, 1):
                if dist.get_rank() == sender:
                    dist.send(message, 1 - sender)
                else:
                    dist.recv(message, sender)
            seconds.append((time.perf_counter() - start) / 2)
        rows.append({"bytes_per_step": size, "step_seconds": min(seconds[1:])})
    return rows


def timed_alone(method: str) -> dict:
    """`timed` of two ranks that share the machine, but each with a process group of its own."""
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return timed(method)


def timed(method: str, wire_bytes: Callable[[int], int] = lambda rank: 0) -> dict:
    """Seconds and bytes of one rank for a step of a wide network, on 32 images.

    The seconds are of the step, or period of local training, that other programs disturbed least.
    """
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model, images = models.build("mlp-wide"), torch.rand(32, 1, 28, 28)
    optimizer, labels = partial(torch.optim.SGD, lr=0.01), torch.randint(0, 10, (32,))
    if method == "DDP":
        trained = DistributedDataParallel(model, bucket_cap_mb=25)
        stepper, wire = optimizer(model.parameters()), None
    else:
        trained, stepper, wire = exchanging(method, model, optimizer, warm_up_steps=0)

    def step() -> None:
        trained.zero_grad()
        nn.functional.cross_entropy(trained(images), labels).backward()
        stepper.step()

    period, rounds = (EVERY, 4) if method in LOCAL else (1, 12)  # one exchange in each period
    for _ in range(2 * period):  # DDP arranges its buckets anew
        step()
    dist.barrier()
    counted = wire.report().sent_bytes if wire else math.nan
    before, seconds = wire_bytes(rank), []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(period):
            step()
        seconds.append((time.perf_counter() - start) / period)
    dist.barrier()
    steps, on_wire = rounds * period, wire_bytes(rank) - before
    counted = wire.report().sent_bytes - counted if wire else math.nan
    columns = {"network": "mlp-wide", "steps": steps, "step_seconds": min(seconds)}
    return columns | {"bytes_per_step": counted / steps, "wire_bytes_per_step": on_wire / steps}


def pipeline_bubble() -> Iterator[dict]:
    """The bubble of four ranks, by schedule and number of micro-batches, and what theory says.

    A stage is a pause of 100 ms forward and 200 ms backward (half of it where a rank has two): it
    stands for a device of its own, which four ranks on two cores do not have. Of two steps, the
    one that other programs disturbed least.
    """
    for schedule, stages in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)):
        for microbatches in (4, 8, 16, 32):
            pauses = [pp.Pause(100 / stages, 200 / stages) for _ in range(4 * stages)]
            trace = parallel.run(paused, pauses, schedule, microbatches, world_size=4)[0]
            yield {
                "schedule": schedule,
                "ranks": 4,
                "stages_per_rank": stages,
                "microbatches": microbatches,
                "bubble": pp.bubble(trace),
                "theory": pp.bubble(pp.replay(trace)),
                "in_flight": max(pp.in_flight(trace)),
            }


def paused(pauses: list[nn.Module], schedule: str, microbatches: int) -> pd.DataFrame:
    """The trace of the step with the smallest bubble."""
    x = torch.zeros(microbatches, 1)
    pipeline = pp.Pipeline(
        pauses, x[:1], loss=nn.functional.mse_loss, microbatches=microbatches, schedule=schedule
    )
    traces = []
    for _ in range(2):
        pipeline.step(x, x)
        traces.append(pipeline.trace())
    return min(traces, key=pp.bubble)


EPSILONS = (0.0, 0.005, 0.01, 0.02, 0.05)  # of the range of a pixel


def attacks() -> Iterator[dict]:
    """Accuracy of a network and of compressed ones on images that were changed to fool them."""
    task = data.fashion_mnist()
    dense = models.pretrained("resnet-8")
    pruned = compress.prune(dense, sparsity=0.8)
    part = smaller(task, 20_000, seed=0)
    training.fit(pruned, part, optimizer=partial(SGD, lr=0.02), precision="mixed", progress=False)
    candidates = {
        "float32": dense,
        "int8": compress.quantize_static(dense, task),
        "80 % pruned": pruned,
    }
    found = under_attack(task, candidates, epsilons=EPSILONS, progress=False)
    yield from found.to_dict("records")


def extraction() -> Iterator[dict]:
    """What a stranger learns of a network from its answers alone, by training one on them."""
    task = data.fashion_mnist()
    served = models.pretrained("resnet-8").to(memory_format=torch.channels_last)
    images, _ = task.train.source.tensors
    noise = torch.rand(10_000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    tested, _ = next(iter(task.test.batches(len(task.test))))
    own = {"clothes": images[:50_000], "noise": noise, "test": tested[0]}
    answers = {name: probabilities(served, x) for name, x in own.items()}
    agreement = data.Metric("agreement", agree, proportion=True)
    runs = itertools.product(
        (("clothes", (100, 1_000, 10_000, 50_000)), ("noise", (10_000,))),
        ("class", "probabilities"),
        SEEDS,
    )
    for (asked, counts), answer, seed in runs:
        for count in counts:
            drawn = torch.randperm(len(own[asked]), generator=torch.Generator().manual_seed(seed))
            x, y = own[asked][drawn[:count]], answers[asked][drawn[:count]]
            if answer == "class":
                y = nn.functional.one_hot(y.argmax(1), y.shape[1]).float()
            queries = data.task(
                train=(x, y), test=(own["test"], answers["test"]), metric=agreement,
                loss=nn.functional.cross_entropy,
            )  # fmt: skip
            student = models.build("lenet-300-100", seed=seed)
            epochs = max(4, min(100, 200_000 // count))
            training.fit(student, queries, epochs=epochs, seed=seed, progress=False)
            yield {
                "images": asked, "answer": answer, "queries": count, "seed": seed,
                "agreement": score(student, queries), "score": score(student, task),
            }  # fmt: skip


def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(N, 1, 28, 28) -> (N, classes)."""
    with torch.no_grad():
        return torch.cat([model(part).softmax(1) for part in x.split(500)])


def agree(outputs: Tensor, answers: Tensor) -> Tensor:
    return (outputs.argmax(1) == answers.argmax(1)).float()


def xla() -> Iterator[dict]:
    """Eager PyTorch and XLA by way of JAX, each on one core: the same answers, and how fast."""
    from workbench.deploy.xla import XlaPredictor

    # XLA starts a thread for each core that it may use. Two sets of threads would wait for each
    # other on a machine that does anything else.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tasks = {"char-transformer": data.austen()}
    for name in ("lenet-5", "resnet-8", "mlp-wide", "char-transformer"):
        task, model = tasks.get(name, data.fashion_mnist()), models.pretrained(name)
        (x,), _ = next(iter(task.test.batches(256)))
        predictor = XlaPredictor(model, (x[:1],))
        with torch.no_grad():
            expected, found = model(x), predictor.predict(x)
        facts = {
            "network": name,
            "platform": predictor.platform,
            "agreement": (found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
            "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        }
        for batch in (1, 8, 64, 256):
            compiled = predictor.compiled(x[:batch])
            timed = measure.measure_latency(
                {"eager": prepare(model, example_input=(x[:1],)), "xla": predictor},
                x[:batch],
                threads=1,
                repeats=15,
            ).summary
            yield facts | {
                "batch": batch,
                "fusions": compiled.as_text().count(" fusion("),
                "flops": compiled.cost_analysis()["flops"],
                "eager_ms": timed.latency_ms["eager"],
                "xla_ms": timed.latency_ms["xla"],
                **timed.loc["xla", ["speedup", "speedup_low", "speedup_high"]].to_dict(),
            }


def fixed_point() -> Iterator[dict]:
    """hls4ml's C++ against the same fixed point in numpy: how many answers are equal to the bit."""
    from workbench.deploy import fpga

    task = data.fashion_mnist()
    dense = models.pretrained("lenet-300-100")
    path = data.verified("experiments/deep-compression-lenet-300-100.safetensors")
    (seen,), _ = next(iter(task.train.batches(1000, shuffle=True, seed=0)))
    (x,), target = next(iter(task.test.batches(500)))
    networks = {"dense": dense, "pruned": storage.load(path, into=dense)}
    for (name, model), bits in itertools.product(networks.items(), (4, 6, 8, 12)):
        fixed = fpga.fix(model, seen, bits=bits)
        with tempfile.TemporaryDirectory() as folder:
            start_s = time.perf_counter()
            emulate = fpga.compile_emulator(fixed, folder)
            compiled_s = time.perf_counter() - start_s
            found = emulate(x)
        yield {
            "network": name, "bits": bits, "images": len(x),
            "equal": int((found == fixed(x)).all(1).sum()),
            "score": (found.argmax(1) == target).double().mean().item(), "compile_s": compiled_s,
        }  # fmt: skip


EXPORTED = ("lenet-300-100", "lenet-5", "resnet-8", "resnet-14")


def exports(network: str) -> Iterator[dict]:
    """What each exported file holds, and how far it answers like its model on all test images."""
    task = data.fashion_mnist()
    few = replace(task, test=task.test.subset(200))
    dense = models.pretrained(network)
    int8 = compress.quantize_static(dense, task)
    for precision, model in {"float32": dense, "int8": int8}.items():
        with torch.no_grad():
            answers = [model(*inputs) for inputs, _ in task.test.batches()]
        for format in exporting.FORMATS:
            if precision == "int8" and format in ("openvino-fp16", "openvino-int8"):
                continue
            if format == "aotinductor" and network != EXPORTED[0]:  # a compilation each
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model").with_suffix(exporting.SUFFIXES[format])
                start = time.perf_counter()
                made = exporting.export(model, path, format, task=few, agreement=0.9, tolerance=0.1)
                seconds = time.perf_counter() - start
                loaded = runtimes.load(path, trusted=True)
                replay = iter(answers)
                found = exporting.parity(lambda *_, replay=replay: next(replay), loaded, task)
            yield {"network": network, "model": precision, "format": format,
                   "size_bytes": made.size_bytes, "int8_kernels": made.record["int8_kernels"],
                   "seconds": seconds} | asdict(found)  # fmt: skip


SERVED = ("lenet-5", "mlp-wide", "resnet-14", "char-transformer")


def in_runtimes(network: str) -> Iterator[dict]:
    """How long one answer takes in each runtime, of the float model and of cheaper ones."""
    task = data.austen() if network == "char-transformer" else data.fashion_mnist()
    dense = models.pretrained(network)
    offered = {"float32": dense, "int8 static": compress.quantize_static(dense, task)}
    if network in ("mlp-wide", "char-transformer"):
        offered["int8 dynamic"] = compress.quantize_dynamic(dense)
    if network == "resnet-14":
        half = compress.prune_structured(dense, task, sparsity=0.5, importance="l1", scope="layer")
        offered["half, int8 static"] = compress.quantize_static(half, task)
    # Compiling takes longest, and int8 runs faster in the other two.
    compiled = runtimes.prepare(dense, "compiled", example_input=task.example_input)
    others = [name for name in runtimes.installed() if name != "compiled"]
    found = best(offered | {"float32, compiled": compiled}, task, loss=math.inf, examples=100,
                 runtimes=others, progress=False)  # fmt: skip
    columns = ["runtime", "simulated", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup",
               "speedup_low", "speedup_high", "loss"]  # fmt: skip
    for name, row in found.frame.set_index("name")[columns].iterrows():
        model = name.rpartition(", ")[0]
        yield {"network": network, "model": model, "candidate": f"{network}, {model}"} | dict(row)


def photo_remedies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is done to EfficientNet-Lite0, by name."""
    crops = list(data.photo_crops(48, part="calibration").split(16))
    int8 = partial(compress.quantize_static, calibration=crops)
    weights, gptq = compress.quantize_weights, partial(quantize_gptq, calibration=crops)
    return {
        "int8 per tensor": lambda m: int8(m, granularity="tensor"),
        "int8 per tensor, biases corrected": lambda m: int8(
            m, granularity="tensor", correct_bias=True
        ),
        "int8 per tensor, equalized, biases corrected": lambda m: int8(
            equalize_layers(m), granularity="tensor", correct_bias=True
        ),
        "int8 per channel": int8,
        "int8 per channel, biases corrected": lambda m: int8(m, correct_bias=True),
        "int4 weights per channel": lambda m: weights(m, bits=4),
        "int4 weights per channel, GPTQ": lambda m: gptq(m, bits=4),
        "int4 weights per group of 32, GPTQ": lambda m: gptq(
            m, bits=4, granularity="group", group_size=32
        ),
    }


def sentence_remedies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What is done to MiniLM, by name."""
    task = data.film_sentences()
    int8 = partial(compress.quantize_static, calibration=task, samples=128)
    weights, gptq = compress.quantize_weights, partial(quantize_gptq, calibration=task)
    group = {"granularity": "group", "group_size": 32}
    return {
        "int8 dynamic": compress.quantize_dynamic,
        "int8 static": int8,
        "int8 static, smoothed": lambda m: int8(smooth_activations(m, task, samples=128)),
        "int4 weights per tensor": lambda m: weights(m, bits=4, granularity="tensor"),
        "int4 weights per channel": lambda m: weights(m, bits=4),
        "int4 weights per channel, GPTQ": lambda m: gptq(m, bits=4),
        "int4 weights per group of 32": lambda m: weights(m, bits=4, **group),
        "int4 weights per group of 32, GPTQ": lambda m: gptq(m, bits=4, **group),
        "embedding of rank 192": lambda m: compress.factorize(m, rank={"0.embedding": 192}),
    }


REAL = {"efficientnet-lite0": photo_remedies, "minilm-films": sentence_remedies}


def real_models(
    networks: Iterable[str] = tuple(REAL), chosen: Iterable[str] | None = None
) -> Iterator[dict]:
    """What rounding breaks in networks that other people trained, and what repairs it."""
    for network in networks:
        dense, labels = models.pretrained(network), None
        if network == "efficientnet-lite0":
            inputs = torch.cat([data.photo_crops(200, seed=seed) for seed in range(5)])
        else:
            (inputs,), labels = next(data.film_sentences().test.batches(2_000))
        before = answers_of(dense, inputs)
        remedies = {"float32": copy.deepcopy} | REAL[network]()
        for name in remedies if chosen is None else chosen:
            model = remedies[name](dense)
            after = answers_of(model, inputs)
            answered = {"float32": replayed(before), name: replayed(after)}
            found = agreement(answered, inputs, baseline="float32", progress=False)
            found = found.set_index("name").loc[name, "examples":"kl_bits"].to_dict()
            row = {"network": network, "candidate": name}
            row |= {"size_bytes": measure.artifact_bytes(model)} | found
            if labels is not None:
                right = (after.argmax(1) == labels).double()
                row |= {"score": right.mean().item()}
                row |= dict(zip(("score_low", "score_high"), interval(right, True), strict=True))
            yield row


def real_films() -> Iterator[dict]:
    """What int8 takes from MiniLM on all held-out sentences, and what it gives back in time."""
    net = models.pretrained("minilm-films")
    offered = {
        "float32": net,
        "float32, ONNX Runtime": (net, "onnxruntime"),
        "int8 dynamic, ONNX Runtime": (compress.quantize_dynamic(net), "onnxruntime"),
    }
    found = measure.compare(data.film_sentences(), offered, progress=False)
    yield from found.drop(columns=["peak_memory_bytes", "note"]).to_dict("records")


def answers_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """In ONNX Runtime: what is int8 runs in int8 kernels, what has few bits in its weights alone
    runs in float."""
    predictor = prepare(model, "onnxruntime", example_input=(inputs[:1],))
    return torch.cat([torch.as_tensor(predictor(some)) for some in inputs.split(25)])


def replayed(answers: Tensor) -> Callable[[Tensor], Tensor]:
    """A model that gives these answers in turn, batch by batch."""
    pieces = iter(answers.split(50))
    return lambda x: next(pieces)


STOCK_ANSWERS = {  # answer -> what it means for a network, and whether it promises speed
    "quantize for speed": ("int8", True),
    "int8 for everything": ("dynamic int8", True),
    "prune 90 % for speed": ("pruned", True),
    "low rank for wide layers": ("low rank", True),
    "bfloat16 for speed": ("bfloat16", True),
    "Huffman at the end": ("Huffman", False),
    "Huffman at the end, of int8": ("int8, Huffman", False),
    "Huffman at the end, of pruned and shared": ("pruned, shared, Huffman", False),
}


def advice() -> Iterator[dict]:
    """The articles' stock answers to "which technique for which model?", each tried on networks."""
    for network, answers in (("lenet-5", 1000), ("mlp-wide", 1000), ("resnet-14", 500),
                             ("char-transformer", 100)):  # fmt: skip
        task = data.austen() if network == "char-transformer" else data.fashion_mnist()
        few = replace(task, test=task.test.subset(answers))
        dense = models.pretrained(network)
        linear = network in ("mlp-wide", "char-transformer")
        pruned = compress.prune(dense, sparsity=0.9)
        static = None if network == "char-transformer" else compress.quantize_static(dense, task)
        dynamic = compress.quantize_dynamic(dense)
        made = {
            "int8": dynamic if static is None else static,
            "dynamic int8": dynamic,
            "pruned": pruned,
            "low rank": compress.factorize(dense, energy=0.9),
        }
        offered = {name: (model, "onnxruntime") for name, model in made.items()}
        made["bfloat16"] = copy.deepcopy(dense).bfloat16()
        offered = {"float32": (dense, "onnxruntime"), "float32, eager": dense, **offered,
                   "bfloat16": InBfloat16(made["bfloat16"])}  # fmt: skip
        frame = measure.compare(few, offered, repeats=20, progress=False).set_index("name")
        coded = {"Huffman": (dense, "huffman"), "int8, Huffman": (made["int8"], "huffman"),
                 "pruned, shared, Huffman":
                 (compress.share_weights(pruned, clusters=32), "huffman")}  # fmt: skip
        plain_bytes = measure.artifact_bytes(dense)
        for answer, (name, for_speed) in STOCK_ANSWERS.items():
            columns = {"answer": answer, "network": network, "linear": linear, "done": name}
            if for_speed:
                # Eager bfloat16 is compared with eager float32, the rest with ONNX Runtime's.
                row, base = frame.loc[name], frame.loc["float32"]
                by = frame.loc["float32, eager", "speedup"] if name == "bfloat16" else 1.0
                columns |= {"size_bytes": measure.artifact_bytes(made[name]),
                            **{c: row[c] / by for c in ("speedup", "speedup_low", "speedup_high")},
                            "lost": (base.score - row.score)
                            * (1 if base.higher_is_better else -1)}  # fmt: skip
                columns["holds"] = columns["speedup_low"] > 1 and columns["lost"] <= 0.01
            else:
                model, codec = coded[name]
                before_bytes = measure.artifact_bytes(model)
                columns["size_bytes"] = measure.artifact_bytes(model, codec=codec)
                columns["by_code"] = before_bytes / columns["size_bytes"]
                columns["holds"] = columns["by_code"] > 1.2
            yield columns | {"times_smaller": plain_bytes / columns["size_bytes"]}
    runs = data.recorded("distillation")
    for examples, part in runs.groupby("examples"):
        scores = part.pivot_table(index="seed", columns="training", values="score")
        lost = scores["alone"] - scores["distilled"]
        yield {"answer": "distil where data are few", "network": "resnet-8", "linear": False,
               "done": f"distilled, {examples} examples", "lost": lost.mean(),
               "holds": bool((lost < 0).all())}  # fmt: skip


class InBfloat16(nn.Module):
    """Takes and gives float32, and computes in bfloat16."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*(x.bfloat16() if x.is_floating_point() else x for x in inputs)).float()


def serving() -> Iterator[dict]:
    """Requests a second and time to an answer of four servers of the same networks, by clients.

    Every request is one image as JSON. Flask and FastAPI run PyTorch, as most handlers do;
    "FastAPI, ORT" and the workbench run ONNX Runtime. Needs wrk, which loads them.
    """
    handlers = data.folder().parent / "notebooks" / "benchmarks" / "handlers"
    task = data.fashion_mnist()
    body = {"inputs": task.example_input[0][:1].numpy().round(4).tolist()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        addresses = {}
        for network in ("mlp-wide", "lenet-5"):
            path = f"{folder}/{network}.onnx"
            exporting.export(models.pretrained(network), path, "onnx", task=task)
            for name, handler, argument in (
                ("Flask", "flask_handler.py", network),
                ("FastAPI", "fastapi_handler.py", network),
                ("FastAPI, ORT", "onnx_handler.py", path),
            ):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                command = [sys.executable, str(handlers / handler), argument, str(port)]
                process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                stack.callback(process.wait)
                stack.callback(process.kill)
                addresses[network, name] = f"http://127.0.0.1:{port}/predict"
            service = stack.enter_context(serve(path))
            addresses[network, "workbench"] = f"{service.url}/predict"
        for (network, name), address in addresses.items():
            request = Request(address, body)
            request.wait()
            for row in wrk({name: request}).to_dict("records"):
                yield {"network": network, "server": row.pop("name")} | row


SOAK_MINUTES = 10


def soak() -> Iterator[dict]:
    """Memory of a server's processes, and its answers by status, in ten minutes of 32 clients.

    Every request is one image as JSON, to LeNet-5. The clients are wrk; the statuses are those
    that the server itself counts, since its start.
    """
    task = data.fashion_mnist()
    body = {"inputs": task.example_input[0][:1].numpy().round(4).tolist()}
    load = dict(clients=[32], seconds=SOAK_MINUTES * 60)
    with serve(models.pretrained("lenet-5"), task=task) as service:
        request = Request(f"{service.url}/predict", body)
        request.wait()
        with ThreadPoolExecutor(1) as thread:
            start, under_load = time.monotonic(), thread.submit(wrk, {"workbench": request}, **load)
            for minute in range(1, SOAK_MINUTES + 1):
                time.sleep(max(0.0, start + 60 * minute - 1 - time.monotonic()))
                yield {"minute": minute} | memory_mb(service.pid) | statuses(service.url)
            under_load.result()


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of a server: of the process that talks, the one that forks, and those that compute."""
    front = psutil.Process(pid)
    (nursery,) = front.children()
    workers = nursery.children()
    found = {"front": [front], "nursery": [nursery], "workers": workers}
    return {
        f"{name}_mb": sum(process.memory_info().rss for process in processes) / 1e6
        for name, processes in found.items()
    }


def statuses(url: str) -> dict[str, int]:
    """How many requests a server has answered well, refused as too many, and answered otherwise."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    count = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "workbench_requests_total":
                kind = {"200": "answered", "429": "refused"}.get(sample.labels["status"], "failed")
                count[kind] += int(sample.value)
    return {kind: count[kind] for kind in ("answered", "refused", "failed")}


# What recipes written by hand reach, the first one as notebook 06 writes it; the second one, and
# the search, train for as long with the optimizer that serves best.
ADAMW, SOFTLY = (partial(torch.optim.AdamW, lr=rate) for rate in (2e-3, 5e-4))
REPAIR, POLISH = FineTune(optimizer=ADAMW), FineTune(optimizer=SOFTLY)
PRUNE, SHARE = Prune(sparsity=0.9), ShareWeights(clusters=15)
# For each network: training examples (None: all), how it trains, how many candidates are looked at,
# and budgets as (objective, limits). A search may take twenty minutes on two cores, no more.
SEARCHES = {
    "lenet-5": dict(
        examples=None, repair=REPAIR, candidates=48,
        rivals={
            "notebook 06": Recipe(
                PRUNE, FineTune(epochs=3, optimizer=SGD), SHARE,
                FineTune(optimizer=partial(torch.optim.AdamW, lr=2e-4)),
            ),
            "the same, other training": Recipe(PRUNE, REPAIR, SHARE, POLISH),
        },
        budgets=[("most accurate", Limits(size_bytes=43_000, score_lost=0.05)),
                 ("smallest", Limits(size_bytes=100_000, score_lost=0.03)),
                 ("fastest", Limits(size_bytes=60_000, score_lost=0.05))],
    ),
    "resnet-14": dict(
        examples=10_000, repair=replace(POLISH, augment=data.flip_and_shift), candidates=16,
        rivals={
            "uniform 3 bits": Recipe(QuantizeWeights(bits=3)),
            "7 values": Recipe(ShareWeights(clusters=7), POLISH),
        },
        budgets=[("most accurate", Limits(size_bytes=230_000, score_lost=0.02)),
                 ("smallest", Limits(size_bytes=336_000, score_lost=0.01)),
                 ("fastest", Limits(size_bytes=400_000, score_lost=0.03))],
    ),
}  # fmt: skip


def searching(network: str) -> Iterator[dict]:
    """What `explore.search` finds within three budgets, beside recipes written by hand.

    Rows of the stage "tested" are scores on the test images, one for each seed; "promised" is the
    winner: what it lost on validation and on the test images over these seeds, with the interval.
    The winners that keep every channel are kept as coded files.
    """
    task, settings = data.fashion_mnist(), SEARCHES[network]
    if settings["examples"] is not None:
        task = replace(task, train=task.train.subset(settings["examples"], seed=0))
    dense = models.pretrained(network).to(memory_format=torch.channels_last)
    before = score(dense, task)
    for objective, limits in settings["budgets"]:
        columns = {"network": network, "objective": objective, "most_bytes": limits.size_bytes,
                   "most_lost": limits.score_lost}  # fmt: skip
        found = search(
            dense, task, limits, objective=objective, minutes=20,
            candidates=settings["candidates"], repair=settings["repair"], polish=POLISH,
            storage=f"{tempfile.gettempdir()}/search-{network}.db", progress=False,
        )  # fmt: skip
        kept = ["name", "stage", "technique", "runtime", "simulated", "size_bytes", "macs",
                "metric", "higher_is_better", "score", "lost", "harm", "latency_ms", "speedup",
                "speedup_low", "speedup_high", "verdict"]  # fmt: skip
        for row in found.frame.reindex(columns=kept).to_dict("records"):
            yield columns | row
        if found.winner is None:
            continue
        if objective != "fastest":
            file = f"experiments/search-{network}-{objective.replace(' ', '-')}.safetensors"
            storage.save(found.model, data.folder() / file, progress=False)
        columns |= {"name": found.winner["name"]}
        for row in found.tested.to_dict("records"):
            yield columns | {"stage": "tested"} | row
        yield columns | {
            "stage": "promised", "size_bytes": found.winner.size_bytes,
            "promised": found.promised, "lost": found.lost, "lost_low": found.lost_low,
            "lost_high": found.lost_high, "recipe": json.dumps(json.loads(found.recipe.to_json())),
        }  # fmt: skip
    for name, recipe in settings["rivals"].items():
        for seed in SEEDS:
            steps = (replace(s, seed=seed) if hasattr(s, "seed") else s for s in recipe.steps)
            small = Recipe(*steps)(dense, few_validation(task), progress=False)
            after = score(small, task)
            yield {"network": network, "name": name, "stage": "tested", "seed": seed,
                   "size_bytes": measure.artifact_bytes(small, codec="auto"), "score": after,
                   "lost": before - after}  # fmt: skip


def few_validation(task: Task) -> Task:
    """The task with as few validation examples as the search chooses an epoch by."""
    return replace(task, validation=task.validation.subset(500, seed=0))


EXPERIMENTS: dict[str, Callable[[], Iterator[dict]]] = {
    **{f"pruning-{network}": partial(pruning, network) for network in FINE_TUNING},
    "structured": structured,
    "structured-transformer": structured_transformer,
    "distillation": distillation,
    "students": students,
    "few-bits": few_bits,
    "orders": orders,
    "sensitivity": sensitivity,
    "deep-compression": deep_compression,
    "optimizers": optimizers,
    "gradient-compression": gradient_compression,
    "slow-link": slow_link,
    "xla": xla,
    "fixed-point": fixed_point,
    "pipeline-bubble": pipeline_bubble,
    "serving": serving,
    "soak": soak,
    **{f"exports-{network}": partial(exports, network) for network in EXPORTED},
    **{f"runtimes-{network}": partial(in_runtimes, network) for network in SERVED},
    "advice": advice,
    "real-models": real_models,
    "real-films": real_films,
    "attacks": attacks,
    "extraction": extraction,
    **{f"search-{network}": partial(searching, network) for network in SEARCHES},
}


def run(name: str) -> None:
    start, rows = time.perf_counter(), []
    for row in EXPERIMENTS[name]():
        rows.append(row)
        print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
    record = {
        "name": name,
        "question": getattr(EXPERIMENTS[name], "func", EXPERIMENTS[name]).__doc__,
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    folder = data.folder() / "experiments"
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    data.write_checksums()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=str([*EXPERIMENTS]))
    for chosen in parser.parse_args().names or EXPERIMENTS:
        run(chosen)
