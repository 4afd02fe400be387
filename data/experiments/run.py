"""Run the long experiments again: ``make experiments``, or ``data/experiments/run.py NAME ...``.

Writes the measurements to ``NAME.csv`` and how they were made to ``NAME.json`` beside this file,
and their checksums into ``data/SHA256SUMS``. Notebooks show these records beside a short run of
their own. What is chosen is chosen on the validation split; scores are those of the test split.
"""

import argparse
import copy
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import nn

from workbench import compress, data, measure, models, training
from workbench.compress.recipe import Distill, Prune, QuantizeWeights, Recipe, ShareWeights
from workbench.data import Task

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


EXPERIMENTS: dict[str, Callable[[], Iterator[dict]]] = {
    **{f"pruning-{network}": partial(pruning, network) for network in FINE_TUNING},
    "structured": structured,
    "structured-transformer": structured_transformer,
    "distillation": distillation,
    "students": students,
    "few-bits": few_bits,
    "orders": orders,
    "sensitivity": sensitivity,
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
