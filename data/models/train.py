"""Train the reference networks again: ``make models``, or ``python data/models/train.py NAME ...``.

``minilm-films``, the linear layer on MiniLM that tells praise from blame, is fitted only when it is
named: it needs MiniLM's package.

Writes ``NAME.safetensors`` and its record ``NAME.json`` beside this file, and their checksums into
``data/SHA256SUMS``. Epochs are chosen on the validation split; the test split is read once, at the
end, for the record.
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench import data, models, training

SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4)
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.05)


@dataclass(frozen=True)
class Settings:
    epochs: int
    optimizer: partial
    batch_size: int = 128
    augment: bool = False
    gradient_norm: float | None = None
    dtype: str = "float32"  # of the stored weights


SETTINGS = {
    "lenet-300-100": Settings(15, partial(ADAMW, lr=1e-3)),
    "lenet-5": Settings(20, partial(ADAMW, lr=3e-3), augment=True),
    "resnet-8": Settings(20, partial(SGD, lr=0.1), augment=True),
    "resnet-14": Settings(15, partial(SGD, lr=0.1), augment=True),
    # bfloat16 halves the largest file, and loses nothing that the test images show.
    "mlp-wide": Settings(8, partial(ADAMW, lr=5e-4), dtype="bfloat16"),
    "char-transformer": Settings(3, partial(ADAMW, lr=4e-3), batch_size=64, gradient_norm=1.0),
}

FILMS = "minilm-films"


def train(name: str, seed: int) -> None:
    settings = SETTINGS[name]
    task = data.austen() if name == "char-transformer" else data.fashion_mnist()
    model = models.build(name, seed=seed).to(memory_format=torch.channels_last)
    history = training.fit(
        model,
        task,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        augment=data.flip_and_shift if settings.augment else None,
        gradient_norm=settings.gradient_norm,
        precision="mixed",
        seed=seed,
    )
    print(history.frame.to_string(index=False))
    if history.interrupted:
        raise SystemExit(f"{name}: interrupted, nothing written")
    # What is stored is what is measured.
    stored = copy.deepcopy(model).to(
        getattr(torch, settings.dtype), memory_format=torch.contiguous_format
    )
    model.load_state_dict(stored.state_dict())
    test = training.evaluate(model, task, split="test")
    optimizer = settings.optimizer
    record = {
        "name": name,
        "task": task.name,
        "seed": seed,
        "epochs": settings.epochs,
        "best_epoch": history.best_epoch,
        "batch_size": settings.batch_size,
        "optimizer": {"name": optimizer.func.__name__, **optimizer.keywords},
        "schedule": "one_cycle",
        "augment": "flip_and_shift" if settings.augment else None,
        "gradient_norm": settings.gradient_norm,
        "precision": "mixed",
        "stored_dtype": settings.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(history.frame.seconds.iloc[-1]),
        "metric": task.metric.name,
        "validation": round(_best(history), 5),
        "test": round(test.value, 5),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    _write(name, stored, record)


def fit_films() -> None:
    """Logistic regression on MiniLM's vectors of sentences, which stay as they are."""
    start = time.perf_counter()
    task = data.film_sentences()
    encoder = models.pretrained("minilm")
    parts = (task.train, task.validation, task.test)
    (x, y), (held_out, right), (unseen, last) = (_vectors(encoder, part) for part in parts)
    fitted = {decay: _logistic(x, y, decay) for decay in (1e-5, 1e-4, 1e-3)}

    def accuracy(head: nn.Linear, x: Tensor, y: Tensor) -> float:
        return data.correct(head(x), y).mean().item()

    decay = max(fitted, key=lambda decay: accuracy(fitted[decay], held_out, right))
    head = fitted[decay]
    record = {
        "name": FILMS,
        "task": task.name,
        "encoder": "minilm, frozen",
        "optimizer": {"name": "LBFGS", "decay": decay},
        "stored_dtype": "float32",
        "parameters": sum(p.numel() for p in head.parameters()),
        "training_seconds": round(time.perf_counter() - start),
        "metric": task.metric.name,
        "validation": round(accuracy(head, held_out, right), 5),
        "test": round(accuracy(head, unseen, last), 5),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    _write(FILMS, head, record)


def _vectors(encoder: nn.Module, split: data.Split) -> tuple[Tensor, Tensor]:
    """Vectors of all sentences of a split, (N, D), and their targets."""
    ((codes,), targets), *_ = split.batches(len(split))
    lengths = (codes != 0).sum(1)
    vectors = torch.empty(len(codes), 384)
    with torch.no_grad():
        for part in tqdm(lengths.argsort().split(64), desc="sentences"):  # padded to the longest
            vectors[part] = encoder(codes[part, : lengths[part].max()])
    return vectors, targets


def _logistic(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    head = nn.Linear(x.shape[1], 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def _write(name: str, stored: nn.Module, record: dict) -> None:
    folder = data.folder() / "models"
    save_model(stored, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    data.write_checksums()
    print(f"{name}: test {record['metric']} {record['test']:.4f}, written to data/models/")


def _best(history: training.History) -> float:
    row = history.frame.set_index("epoch").loc[history.best_epoch]
    return float(row.filter(like="validation_").iloc[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help=f"{models.names()}, or {FILMS}"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for chosen in arguments.names or models.names():
        if chosen == FILMS:
            fit_films()
        else:
            train(chosen, arguments.seed)
