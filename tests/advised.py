"""Six networks, each built so that one technique is known to suit it best, and trained for real.

Each builder returns the model, its task, the limits, the objective, and the technique that is
known to be the best, as `workbench.explore.advice` calls it.
"""

from functools import partial

import torch
from torch import Tensor, nn

from workbench import compress, data, models, training
from workbench.explore.limits import Limits

RANGES = 200.0  # of the widest channel over the narrowest
adam = partial(torch.optim.Adam, lr=3e-3)
POINT = Limits(score_lost=0.01)


def images(count: int) -> data.Task:
    """Fashion-MNIST with fewer training images."""
    task = data.fashion_mnist()
    return data.Task(
        task.name, task.train.subset(count), task.validation.subset(2000), task.test.subset(2000)
    )


def spare_channels():
    """A trained network inside one eight times as wide, whose other channels are switched off.

    So a penalty on the scales of the batch norms leaves a network: Liu et al. (2017), "Learning
    efficient convolutional networks through network slimming".
    """
    torch.manual_seed(0)
    task = images(4000)
    narrow, wide = pyramid(12), pyramid(96)
    training.fit(narrow, task, epochs=4, optimizer=adam, progress=False)
    with torch.no_grad():
        for layer in wide:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.zero_()  # and so is the bias
        for new, old in zip(wide.state_dict().values(), narrow.state_dict().values(), strict=True):
            new[tuple(map(slice, old.shape))] = old
    return wide.eval(), task, POINT, "fastest", "fewer channels"


def pyramid(width: int) -> nn.Sequential:
    return nn.Sequential(
        *convolution(1, width // 2, 5, stride=2), *convolution(width // 2, width, 3, stride=2),
        *convolution(width, width, 3, stride=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 10),
    )  # fmt: skip


def convolution(width_in: int, width: int, size: int, stride: int, groups: int = 1):
    layer = nn.Conv2d(width_in, width, size, stride, size // 2, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(width), nn.ReLU()


class Bigrams(nn.Module):
    """The next character from the last two pairs: one row for each pair there could be."""

    def __init__(self, symbols: int = 81, width: int = 64):
        super().__init__()
        self.symbols = symbols
        self.embedding = nn.Embedding(symbols**2, width)
        self.out = nn.Linear(2 * width, symbols)

    def forward(self, codes: Tensor) -> Tensor:  # (batch, 4)
        pairs = codes[:, 0::2] * self.symbols + codes[:, 1::2]  # (batch, 2)
        return self.out(self.embedding(pairs).flatten(1))


def one_embedding():
    """Almost all bytes are in one table, of which a call reads two rows."""
    torch.manual_seed(0)

    def pairs(split: data.Split, count: int) -> tuple[Tensor, Tensor]:
        (x,), _ = next(iter(split.subset(count).batches(count)))
        windows = x[:, :125].reshape(-1, 5)
        return windows[:, :4], windows[:, 4]

    text = data.austen()
    task = data.task(train=pairs(text.train, 2500), test=pairs(text.test, 200),
                     validation=pairs(text.validation, 200))  # fmt: skip
    model = Bigrams()
    training.fit(model, task, epochs=3, optimizer=adam,
                 progress=False)  # fmt: skip
    limits = Limits(score_lost=0.01, size_bytes=0.2 * models.file_bytes(model))
    return model.eval(), task, limits, "smallest", "few bits for each weight"


def tiny():
    """Calling eight small layers takes longer than their products."""
    torch.manual_seed(0)
    task = images(4000)
    layers = [nn.Flatten(), nn.Linear(784, 16), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 10))
    training.fit(model, task, epochs=4, optimizer=adam, progress=False)
    return model.eval(), task, POINT, "fastest", "another runtime"


def depthwise():
    """The channels of a separable network differ in range, as those of MobileNets do.

    Each channel is scaled up before its depthwise kernel, and the kernel down: the function stays.
    Nagel et al. (2019), "Data-free quantization through weight equalization and bias correction",
    undo just that.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    task = images(4000)
    layers = [*convolution(1, 32, 3, stride=2)]
    for width_in, width, stride in ((32, 48, 2), (48, 64, 1), (64, 64, 1)):
        layers += convolution(width_in, width_in, 3, stride, groups=width_in)
        layers += convolution(width_in, width, 1, stride=1)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    training.fit(model, task, epochs=4, optimizer=adam, progress=False)
    with torch.no_grad():
        for place in range(3, len(layers), 6):
            norm, kernels = model[place - 2], model[place]
            scale = RANGES ** torch.rand(len(norm.weight), generator=generator)
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
            kernels.weight.div_(scale[:, None, None, None])
    limits = Limits(score_lost=0.01, size_bytes=0.4 * models.file_bytes(model))
    return model.eval(), task, limits, "fastest", "int8 weights and activations"


def quantized():
    """int8 already: what is missing are kernels that compute with it."""
    task = images(1000)
    model = compress.quantize_static(models.pretrained("lenet-5"), task)
    return model, task, POINT, "fastest", "another runtime"


def sparse():
    """Nine weights in ten are zero, as plain float32."""
    task = images(10_000)
    model = compress.prune(models.pretrained("lenet-300-100"), sparsity=0.9)
    training.fit(model, task, epochs=2, optimizer=adam, progress=False)
    return compress.make_permanent(model), task, POINT, "smallest", "shared weights"


BUILDERS = (spare_channels, one_embedding, tiny, depthwise, quantized, sparse)
