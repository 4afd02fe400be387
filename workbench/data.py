"""Data sets and tasks: what a model is for.

A `Task` holds the three splits of a data set, the loss that is trained and the metric that is
reported. `fashion_mnist`, `austen` and `film_sentences` read the files committed under ``data/``;
`task` makes one from a user's own tensors, data sets, loaders or callables, and `unlabelled` from
inputs without labels, such as `photo_crops`.
"""

import copy
import gzip
import hashlib
import lzma
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

Batch = tuple[tuple[Tensor, ...], Tensor]
Source = Dataset | DataLoader | Callable[[], Iterable] | Sequence[Tensor]


@dataclass(frozen=True)
class Metric:
    """What is reported about a model's answers.

    ``score(outputs, targets)`` gives one number per example; the metric is their mean.
    ``proportion`` says that each score is 0 or 1, which decides the interval and the test
    that `workbench.measure.accuracy` uses.
    """

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    proportion: bool = False


IGNORED = -100  # a target that is not counted; torch's own default for cross entropy


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target, else 0.

    ``outputs`` has shape (batch, classes) or (batch, positions, classes); the result has the shape
    of ``targets``.
    """
    return (outputs.argmax(-1) == targets).float()


def bits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean bits per counted position of each example: (batch, positions, symbols) -> (batch,)."""
    nats = F.cross_entropy(outputs.mT.float(), targets, reduction="none")  # (batch, positions)
    return nats.sum(-1) / (targets != IGNORED).sum(-1) / math.log(2)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over all leading dimensions of ``outputs``."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


ACCURACY = Metric("accuracy", correct, higher_is_better=True, proportion=True)
AGREEMENT = Metric("agreement", correct, higher_is_better=True, proportion=True)
BITS_PER_CHARACTER = Metric("bits per character", bits, higher_is_better=False)


@dataclass(frozen=True)
class Split:
    """One part of a data set, read in batches of ``((input, ...), target)``."""

    source: Source

    def batches(
        self, batch_size: int = 500, *, shuffle: bool = False, seed: int = 0
    ) -> Iterator[Batch]:
        """Yield batches. A loader or callable brings its own batch size and order."""
        for batch in self._loader(batch_size, shuffle, seed):
            yield _inputs_and_target(batch)

    def __len__(self) -> int:
        """Number of examples; TypeError where the source does not know it."""
        if isinstance(self.source, DataLoader):
            return len(self.source.dataset)
        return len(self.source)

    def count_batches(self, batch_size: int) -> int:
        """Number of batches in one pass; a callable is read once to count them."""
        loader = self._loader(batch_size, shuffle=False, seed=0)
        return len(loader) if hasattr(loader, "__len__") else sum(1 for _ in loader)

    def subset(self, count: int, *, seed: int = 0) -> "Split":
        """``count`` examples drawn without replacement, in a fixed order for one seed.

        Raises:
            TypeError: the source is a callable, which gives batches, not examples.
        """
        if not isinstance(self.source, (Dataset, DataLoader)):
            raise TypeError("a callable cannot be drawn from; give tensors, a Dataset or a loader")
        if not 1 <= count <= len(self):
            raise ValueError(f"count is {count}; this split has 1 to {len(self)} examples to give")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        loader = isinstance(self.source, DataLoader)
        return Split(_take(self.source.dataset if loader else self.source, chosen))

    def _loader(self, batch_size: int, shuffle: bool, seed: int) -> Iterable:
        if isinstance(self.source, DataLoader):
            return self.source
        if not isinstance(self.source, Dataset):
            return self.source()
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.source, TensorDataset):
            # Indexing tensors with a whole batch at once is about 50 times faster than one by one.
            order = RandomSampler(self.source, generator=generator) if shuffle else range(len(self))
            sampler = BatchSampler(order, batch_size, drop_last=False)
            return DataLoader(self.source, sampler=sampler, batch_size=None, generator=generator)
        return DataLoader(self.source, batch_size, shuffle=shuffle, generator=generator)


@dataclass(frozen=True)
class Task:
    """What a model is for. ``test`` is for the final figure only; choose on ``validation``."""

    name: str
    train: Split
    validation: Split
    test: Split
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metric: Metric = ACCURACY
    labels: tuple[str, ...] = field(default=(), repr=False)

    @property
    def example_input(self) -> tuple[Tensor, ...]:
        """The inputs of one example, each with a leading batch dimension of 1."""
        inputs, _ = next(iter(self.train.batches(1)))
        return tuple(x[:1] for x in inputs)


def task(
    train: Source,
    test: Source,
    validation: Source | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    metric: Metric = ACCURACY,
    labels: Sequence[str] = (),
    name: str = "my task",
    seed: int = 0,
) -> Task:
    """Make a `Task` from your own data.

    Each split is a tuple of tensors ``(input, ..., target)``, a `Dataset` whose items are
    ``(input, ..., target)``, a `DataLoader`, or a callable that returns an iterable of such
    batches. Without ``validation``, a tenth of ``train`` is held out (tensors and data sets only).

    Raises:
        TypeError: a split is none of these.
        ValueError: tensors of unequal length, an empty split, or no validation split where none
            can be held out.

    >>> x, y = torch.randn(100, 4), torch.randint(0, 3, (100,))
    >>> mine = task(train=(x, y), test=(x, y))
    >>> len(mine.train), len(mine.validation), mine.example_input[0].shape
    (90, 10, torch.Size([1, 4]))
    """
    train, test = _source(train, "train"), _source(test, "test")
    if validation is None:
        if not isinstance(train, Dataset) or len(train) < 2:
            raise ValueError(
                "validation is missing: a tenth is held out only of tensors or a Dataset with at "
                "least 2 examples; pass validation=... as well"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        held_out = max(1, len(train) // 10)
        train, validation = _take(train, order[held_out:]), _take(train, order[:held_out])
    else:
        validation = _source(validation, "validation")
    return Task(name, Split(train), Split(validation), Split(test), loss, metric, tuple(labels))


FASHION_LABELS = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist() -> Task:
    """Fashion-MNIST: 28x28 grey images of clothes in ten classes, pixels from 0 to 1.

    55,000 training, 5,000 validation (the last of the official training file) and 10,000 test
    images, each of shape (1, 28, 28).

    Raises:
        FileNotFoundError, ValueError: a file is missing, truncated or altered.

    Reference: Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST: a novel image dataset for
    benchmarking machine learning algorithms".
    """
    images, labels = _idx("train-images-idx3"), _idx("train-labels-idx1")
    test_images, test_labels = _idx("t10k-images-idx3"), _idx("t10k-labels-idx1")

    def split(x: Tensor, y: Tensor) -> Split:
        return Split(TensorDataset(x.unsqueeze(1).float() / 255, y.long()))

    return Task(
        "fashion-mnist",
        train=split(images[:55_000], labels[:55_000]),
        validation=split(images[55_000:], labels[55_000:]),
        test=split(test_images, test_labels),
        labels=FASHION_LABELS,
    )


def austen(context: int = 128) -> Task:
    """Six novels of Jane Austen, one character at a time: predict the next from those before.

    *Persuasion* is the test text and *Northanger Abbey* the validation text; the other four
    are trained on. An example is a window of ``context`` characters and, as target, the same
    window one character later. Windows start every half window. In validation and test only the
    second half of a window counts, so each character is predicted once, from at least half a
    window of text.

    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated or altered.
    """
    if context < 2:
        raise ValueError(f"context is {context}; give 2 or more characters")
    text = lzma.decompress(verified("austen.txt.xz").read_bytes()).decode()
    symbols = sorted(set(text))
    code_of = {symbol: code for code, symbol in enumerate(symbols)}
    starts = [text.index(heading) for heading in NOVELS]
    half = context // 2

    def windows(start: int, end: int) -> Tensor:
        codes = torch.tensor([code_of[symbol] for symbol in text[start:end]])
        return codes.unfold(0, context + 1, half)  # (windows, context + 1), a view

    def held_out(start: int, end: int) -> Split:
        whole = windows(start, end)
        targets = whole[:, 1:].clone()
        targets[:, :half] = IGNORED
        return Split(TensorDataset(whole[:, :-1], targets))

    train = windows(0, starts[4])
    return Task(
        "austen",
        train=Split(TensorDataset(train[:, :-1], train[:, 1:])),
        validation=held_out(starts[4], starts[5]),
        test=held_out(starts[5], len(text)),
        metric=BITS_PER_CHARACTER,
        labels=tuple(symbols),
    )


# The heading of each novel, in the order of the file.
NOVELS = (
    "SENSE AND SENSIBILITY\n",
    "PRIDE AND PREJUDICE\n",
    "MANSFIELD PARK\n",
    "EMMA\n",
    "NORTHANGER ABBEY\n",
    "Persuasion\n\n\nby",
)


def film_sentences(length: int = 48) -> Task:
    """Sentences from reviews of films, told apart as blame (0) or praise (1), for MiniLM.

    At least 20 people rated each sentence from -4 to 4; it is praise where their mean is above 0,
    and the 37 sentences whose mean is 0 are left out. 7,068 training, 1,000 validation and 2,500
    test sentences, as ``length`` codes each: 48 cut 4 sentences of 100 short.

    Raises:
        ImportError: the package with MiniLM's vocabulary is not installed.
        FileNotFoundError, ValueError: the file is missing, truncated or altered.

    Reference: Hutto and Gilbert (2014), "VADER: a parsimonious rule-based model for sentiment
    analysis of social media text".
    """
    from workbench.models import minilm, wordpiece

    pieces = wordpiece.WordPiece.from_file(minilm.package_folder() / "vocab.txt")
    sentences, ratings = rated_sentences()
    told = [i for i, rating in enumerate(ratings) if rating]
    codes = pieces.encode([sentences[i] for i in told], length)
    praise = torch.tensor([int(ratings[i] > 0) for i in told])
    order = torch.randperm(len(told), generator=torch.Generator().manual_seed(0))

    def split(start: int, end: int) -> Split:
        return Split(TensorDataset(codes[order[start:end]], praise[order[start:end]]))

    return Task(
        "film-sentences",
        train=split(3_500, len(told)),
        validation=split(2_500, 3_500),
        test=split(0, 2_500),
        labels=("blame", "praise"),
    )


def rated_sentences() -> tuple[list[str], list[float]]:
    """The sentences that `film_sentences` is made of, in the order of their file, and the mean of
    their ratings, from -4 (blame) to 4 (praise)."""
    lines = lzma.decompress(verified("film-sentences.tsv.xz").read_bytes()).decode().splitlines()
    ratings, sentences = zip(*(line.split("\t") for line in lines), strict=True)
    return list(sentences), list(map(float, ratings))


def photo_crops(
    count: int, *, part: Literal["calibration", "test"] = "test", seed: int = 0, size: int = 224
) -> Tensor:
    """Crops of real photographs, without labels: (count, 3, size, size), as EfficientNet wants.

    Each shows 30 to 100 % of a photograph, at some place, in a shape from 3:4 to 4:3 made square,
    and half of them mirrored. All photographs of the part are used before one comes again. A crop
    takes 600 kB at size 224: for thousands, ask in pieces with other seeds.

    Args:
        part: a quarter of the photographs serves "calibration", the others the "test".

    Raises:
        ValueError: count, part or size is impossible.
        FileNotFoundError, ValueError: a file is missing or altered.
    """
    if part not in ("calibration", "test"):
        raise ValueError(f"part is {part!r}; choose 'calibration' or 'test'")
    for name, value in {"count": count, "size": size}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number from 1")
    names = [
        name for i, name in enumerate(photo_names()) if (i % 4 == 0) == (part == "calibration")
    ]
    random = np.random.default_rng(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += random.permutation(names).tolist()
    opened = {name: photo(name) for name in sorted(set(chosen[:count]))}
    crops = [_crop(opened[name], random, size) for name in chosen[:count]]
    return as_imagenet(torch.from_numpy(np.stack(crops)))


def photo_names() -> list[str]:
    """Names of the photographs in ``data/photos``, whose ``origins.csv`` has author and licence."""
    lines = verified("photos/origins.csv").read_text().splitlines()[1:]
    return [line.split(",")[0].removesuffix(".jpg") for line in lines]


def photo(name: str) -> "Image":
    """One photograph of `photo_names`."""
    from PIL import Image

    return Image.open(verified(f"photos/{name}.jpg")).convert("RGB")


def imagenet_labels() -> tuple[str, ...]:
    """Names of the 1000 classes of ImageNet, in the order of EfficientNet's outputs."""
    names = lzma.decompress(verified("imagenet-classes.txt.xz").read_bytes()).decode()
    return tuple(names.splitlines())


def as_imagenet(pixels: Tensor) -> Tensor:
    """Pixels (B, H, W, 3) of 8 bits -> what `models.pretrained("efficientnet-lite0")` reads:
    (B, 3, H, W), from about -1 to 1."""
    return (pixels.movedim(-1, 1).float() - 127) / 128


def _crop(image: "Image", random: np.random.Generator, size: int) -> np.ndarray:
    """A part of the image, (size, size, 3), drawn as networks for ImageNet see theirs in training.

    Szegedy et al. (2015), "Going deeper with convolutions", section 6.
    """
    from PIL import Image

    area = random.uniform(0.3, 1) * image.width * image.height
    shape = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(math.sqrt(area * shape), image.width)
    height = min(math.sqrt(area / shape), image.height)
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return crop[:, ::-1] if random.random() < 0.5 else crop


def unlabelled(
    model: torch.nn.Module,
    train: Tensor,
    test: Tensor,
    validation: Tensor | None = None,
    *,
    name: str = "my task",
) -> Task:
    """A task whose targets are the model's own answers, for when there are no labels.

    Its metric is the agreement: the share of inputs to which a candidate gives the same answer as
    ``model`` does. So every technique and `measure.compare` work on it as on any other task.

    Args:
        model: its outputs have the shape (batch, classes).
        train, test, validation: inputs; without ``validation``, a tenth of ``train`` is held out.

    >>> net = torch.nn.Linear(4, 3)
    >>> mine = unlabelled(net, train=torch.randn(20, 4), test=torch.randn(10, 4))
    >>> mine.metric.name, len(mine.train), len(mine.test)
    ('agreement', 18, 10)
    """

    def answered(inputs: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if inputs is None:
            return None
        with torch.inference_mode():
            answers = torch.cat([work(piece).argmax(-1) for piece in inputs.split(32)])
        return inputs, answers.clone()

    work = copy.deepcopy(model).eval()
    splits = {"train": answered(train), "test": answered(test), "validation": answered(validation)}
    return task(**splits, metric=AGREEMENT, name=name)


def flip_and_shift(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Mirror half of the images and move each by up to ``pixels`` in both directions.

    ``images`` has shape (batch, channels, height, width). The usual augmentation for small
    images; pass it to `workbench.training.fit` as ``augment``.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, [pixels] * 4)

    def offsets() -> Tensor:
        return torch.randint(0, 2 * pixels + 1, (batch, 1), generator=generator)

    rows = offsets() + torch.arange(height)  # (batch, height)
    columns = offsets() + torch.arange(width)  # (batch, width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(-1), columns)
    example = torch.arange(batch)[:, None, None]
    moved = padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)  # (batch, channels, height, width)


def recorded(name: str) -> "pd.DataFrame":
    """What a long experiment measured; ``data/experiments/run.py`` holds it, and runs it again.

    Raises:
        FileNotFoundError, ValueError: there is no such record, or it was altered.
    """
    import pandas as pd

    return pd.read_csv(verified(f"experiments/{name}.csv"))


def folder() -> Path:
    """The ``data`` folder: beside the package, or where ``WORKBENCH_DATA`` says."""
    return Path(os.environ.get("WORKBENCH_DATA", Path(__file__).parents[1] / "data"))


def verified(name: str) -> Path:
    """Path of a file in ``data/`` after its sha256 was compared with ``data/SHA256SUMS``.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: its content is not what was committed, or no checksum is known for it.
    """
    path = folder() / name
    restore = f"restore it with: git checkout -- data/{name}"
    if not path.is_file():
        hint = "or set WORKBENCH_DATA to the data folder of a clone"
        raise FileNotFoundError(f"data file {path} is missing; {restore}, {hint}")
    sums = folder() / "SHA256SUMS"
    if not sums.is_file():
        raise FileNotFoundError(
            f"{sums} is missing; restore it with: git checkout -- data/SHA256SUMS"
        )
    lines = sums.read_text().splitlines()
    expected = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    if name not in expected:
        raise ValueError(f"data/SHA256SUMS has no line for {name}; restore it with git checkout")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected[name]:
        raise ValueError(
            f"data file {path} is truncated or altered: sha256 is {actual[:12]}..., expected "
            f"{expected[name][:12]}...; {restore}"
        )
    return path


def write_checksums() -> None:
    """Write ``data/SHA256SUMS`` for what lies in the folder now."""
    patterns = ("*.xz", "*/*.gz", "*/*.safetensors", "*/*.json", "*/*.csv", "*/*.jpg")
    root = folder()
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n"
        for path in files
    ]
    (root / "SHA256SUMS").write_text("".join(lines))


def write_whole(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Let ``write`` write to a temporary name, then rename: the whole file is there or none."""
    temporary = f"{os.fspath(path)}.part"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _idx(name: str) -> Tensor:
    """Read one IDX file: magic (two zero bytes, type, rank), big-endian sizes, then the bytes."""
    raw = gzip.decompress(verified(f"fashion-mnist/{name}-ubyte.gz").read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(shape).copy())


def _source(source: Source, split: str) -> Source:
    if isinstance(source, (tuple, list)) and source and all(map(torch.is_tensor, source)):
        lengths = [len(tensor) for tensor in source]
        if len(source) < 2 or len(set(lengths)) != 1:
            raise ValueError(
                f"{split} has tensors of lengths {lengths}; give at least one input and one "
                "target, all of the same length"
            )
        source = TensorDataset(*source)
    if isinstance(source, Dataset) and hasattr(source, "__len__") and len(source) == 0:
        raise ValueError(f"{split} is empty; give at least one example")
    examples = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(examples, IterableDataset):
        raise TypeError(
            f"{split} is an IterableDataset, which has no length; give a callable that returns "
            "batches, such as lambda: loader"
        )
    if isinstance(source, (Dataset, DataLoader)) or callable(source):
        return source
    raise TypeError(
        f"{split} is a {type(source).__name__}; give a tuple of tensors, a Dataset, a DataLoader "
        "or a callable that returns batches"
    )


def _take(source: Dataset, chosen: Tensor) -> Dataset:
    if isinstance(source, TensorDataset):  # stays indexable by a whole batch
        return TensorDataset(*source[chosen])
    return Subset(source, chosen.tolist())


def _inputs_and_target(batch: Sequence) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"a batch is a {type(batch).__name__}; expected a tuple (input, ..., target)"
        )
    *inputs, target = batch
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):  # ((input, input), target)
        inputs = inputs[0]
    return tuple(inputs), target
