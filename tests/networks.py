"""Small networks from outside the package, of the kinds that break compression tools."""

import torch
from torch import Tensor, nn


class TwoInputs(nn.Module):
    """Residual, batch norm, a grouped convolution, tied weights and two inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm2 = nn.BatchNorm2d(16)
        self.side = nn.Linear(5, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.out = nn.Linear(16, 4)

    def forward(self, image: Tensor, side: Tensor) -> Tensor:
        x = self.norm(self.conv(image)).relu()
        x = x + self.norm2(self.depthwise(x))
        x = x.mean((2, 3)) + self.side(side)
        return self.out(self.second(self.first(x).relu()).relu())


class Twice(nn.Module):
    """One module that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(self.stem(x)).relu()).relu()
        return self.out(x.mean((2, 3)))


class Transposed(nn.Module):
    """Down by a grouped convolution, up by a transposed one."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.grouped(self.down(x).relu()).relu()).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM that reads the rows of an image, and answers from its last state."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.movedim(1, 2).flatten(2))[0][:, -1])


class Attending(nn.Module):
    """torch's own attention, over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.movedim(1, 2).flatten(2))
        return self.out((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """A code is read by an embedding, and the answer given by the same weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(4, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 4, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, codes: Tensor) -> Tensor:
        return self.out(self.middle(self.embedding(codes).mean(1)).relu())


def plain() -> nn.Sequential:
    """A small network with a batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def frozen() -> nn.Sequential:
    """The plain one, with a first layer that is not to be trained."""
    model = plain()
    model[0].requires_grad_(False)
    return model


class Bfloat16(nn.Sequential):
    """The plain one in bfloat16; it takes and gives float32."""

    def __init__(self):
        super().__init__(*plain().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16()).float()


class Branching(nn.Module):
    """Takes a decision on values: it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 1 if x.sum() > 0 else x)


def two_inputs(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A `TwoInputs` with batch norm statistics of its own, and a batch of inputs."""
    torch.manual_seed(seed)
    model = TwoInputs()
    inputs = torch.randn(16, 3, 8, 8), torch.randn(16, 5)
    model(*inputs)
    return model.eval(), inputs
