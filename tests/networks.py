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
