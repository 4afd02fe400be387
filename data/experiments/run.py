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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from workbench import compress, data, measure, models, storage, training
from workbench.compress.distillation import divergence
from workbench.compress.layers import layers_of
from workbench.compress.recipe import Distill, Prune, QuantizeWeights, Recipe, ShareWeights
from workbench.data import Split, Task
from workbench.measure.accuracy import paired_p_value
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
        },
        seeds_levels=0,
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
        huffman = storage.save(shared, path, codec="run_length", progress=False).frame
        best = storage.save(shared, path, progress=False).frame
        loaded = storage.load(path, into=dense)
    table = {}
    for name, dense_weight in dense.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        source = shared.get_submodule(layer).sources["weight"]
        codes = source.codes().numpy()
        pairs = {bits: len(run_length.gaps(codes, 0, bits)[0]) for bits in range(1, 9)}
        gap_bits = min(pairs, key=lambda bits: pairs[bits] * (bits + source.bits))
        count, held = pairs[gap_bits], huffman.set_index("tensor").loc[name]
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
            "coded_bytes": int(best.set_index("tensor").loc[name, "size_bytes"]),
        }
    biases = sum(p.nbytes for n, p in dense.named_parameters() if n.endswith("bias"))
    rest = models.file_bytes(dense) - biases - sum(row["dense_bytes"] for row in table.values())
    for part, plain, which in (
        ("biases", biases, huffman["tensor"].str.endswith("bias")),
        ("header", rest, huffman["count"] == 0),
    ):
        table[part] = {f"{stage}_bytes": plain for stage in ("dense", "pruned", "shared")}
        table[part] |= {"huffman_bytes": int(huffman[which]["size_bytes"].sum())}
        table[part] |= {"coded_bytes": int(best[which]["size_bytes"].sum())}
    frame = pd.DataFrame(table.values()).drop(columns=["gap_bits", "code_bits"])
    return table | {"all": frame.sum().astype(int).to_dict()}, loaded


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
