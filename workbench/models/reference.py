"""The networks that are trained here, for clothes and for novels.

Shapes: B batch, C channels, H height, W width, T positions, D width of the transformer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lenet_300_100() -> nn.Module:
    """Three linear layers, 266,610 parameters. LeCun et al. (1998), "Gradient-based learning
    applied to document recognition"; the form pruned by Han et al. (2016)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


def lenet_5() -> nn.Module:
    """Two convolutions and two linear layers, 431,080 parameters, in the widths (20, 50, 500)
    that Han et al. (2016), "Deep Compression", start from."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),  # (B, 20, 12, 12)
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),  # (B, 50, 4, 4)
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def mlp_wide() -> nn.Module:
    """784-2048-2048-10: wide enough that a batch costs little more than one image."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """``relu(x + conv(relu(conv(x))))`` with batch normalisation; a 1x1 convolution carries ``x``
    where the shape changes. He et al. (2016), "Deep residual learning for image recognition"."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(widths: tuple[int, ...], blocks: int, classes: int = 10) -> nn.Module:
    """A residual network for one-channel images; each stage after the first halves H and W.

    It has ``2 * blocks * len(widths) + 2`` layers. Widths (16, 32, 64) with one block a stage is
    the ResNet-8 of MLPerf Tiny (Banbury et al., 2021).
    """
    stem = [nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    stages, before = [], widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            stages.append(ResidualBlock(before, width, stride))
            before = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*stem, *stages, *head)


class Attention(nn.Module):
    """Causal multi-head self-attention. Vaswani et al. (2017), "Attention is all you need".

    Written out, so that every tracer and exporter sees plain operations; at this size it is also
    faster on a CPU than the fused kernel.
    """

    future: Tensor

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        future = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, _ = x.shape
        qkv = self.query_key_value(x).view(batch, positions, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        scores = q @ k.mT * self.scale  # (B, heads, T, T)
        future = self.future[:positions, :positions]
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    """Causal transformer over characters: codes (B, T) -> logits (B, T, symbols), T <= context.

    The output layer shares its weight with the embedding (Press and Wolf, 2017).
    """

    def __init__(
        self,
        symbols: int = 81,
        context: int = 128,
        width: int = 144,
        depth: int = 4,
        heads: int = 3,
    ):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.register_buffer("places", torch.arange(context), persistent=False)
        blocks = (TransformerBlock(width, heads, context) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # as in GPT-2
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position(self.places[: codes.shape[1]])  # (B, T, D)
        return self.head(self.norm(self.blocks(x)))
