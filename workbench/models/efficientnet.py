"""EfficientNet-Lite0, an ImageNet network for phones, in plain PyTorch.

Its layers are what a quantizer finds hardest: depthwise convolutions, whose channels differ in
range by orders of magnitude, between pointwise ones. Shapes: B batch, C channels, H height,
W width.
"""

from torch import Tensor, nn

# Of each stage: blocks, size of the kernel, stride of its first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0: images (B, 3, H, W) -> logits (B, classes), 4,652,008 parameters.

    H and W are multiples of 32, made for 224; pixels from 0 to 255 are shown to it as
    ``(pixel - 127) / 128``.

    Reference: Tan and Le (2019), "EfficientNet: rethinking model scaling for convolutional neural
    networks"; Liu (2020), "Higher accuracy on vision models with EfficientNet-Lite", which leaves
    out squeeze-and-excitation and clips at 6 where it had swish.

    >>> sum(p.numel() for p in efficientnet_lite0().parameters())
    4652008
    """
    layers = convolution(3, 32, 3, stride=2)
    before = 32
    for blocks, kernel, first_stride, expansion, channels in STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            layers.append(InvertedResidual(before, channels, kernel, stride, expansion))
            before = channels
    layers += convolution(before, 1280, 1)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, classes)
    )


class InvertedResidual(nn.Module):
    """Pointwise to ``expansion`` times the channels, depthwise, and pointwise back to few.

    Where the shape stays, the input is added. Sandler et al. (2018), "MobileNetV2: inverted
    residuals and linear bottlenecks".
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int
    ):
        super().__init__()
        width = channels_in * expansion
        expand = convolution(channels_in, width, 1) if expansion > 1 else []
        depthwise = convolution(width, width, kernel, stride, groups=width)
        project = convolution(width, channels_out, 1)[:-1]  # a bottleneck is linear: not clipped
        self.layers = nn.Sequential(*expand, *depthwise, *project)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def convolution(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution padded as TensorFlow does, its batch normalisation, and the clip at 0 and 6."""
    padding = kernel // 2
    pad = []
    if stride == 2:  # of an even number of pixels, the last row and column get the larger share
        pad, padding = [nn.ZeroPad2d((padding - 1, padding) * 2)], 0
    settings = {"padding": padding, "groups": groups, "bias": False}
    return [
        *pad,
        nn.Conv2d(channels_in, channels_out, kernel, stride, **settings),
        nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.01),
        nn.ReLU6(),
    ]


def from_published(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state, in float32 and under the names of `efficientnet_lite0`.

    Both list the same layers in the order in which they compute; the published file names them by
    their role.
    """
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    theirs = [("_conv_stem", "_bn0")]
    for block in range(sum(blocks for blocks, *_ in STAGES)):
        expand = [("_expand_conv", "_bn0")] if block else []
        pairs = [*expand, ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        theirs += [tuple(f"_blocks.{block}.{name}" for name in pair) for pair in pairs]
    theirs += [("_conv_head", "_bn1"), ("_fc",)]
    layers = [name for pair in theirs for name in pair]
    parametrised = [
        name for name, m in efficientnet_lite0().named_modules() if [*m.parameters(recurse=False)]
    ]
    return {
        f"{ours}.{kind}": stored[f"{published}.{kind}"]
        for ours, published in zip(parametrised, layers, strict=True)
        for kind in kinds
        if f"{published}.{kind}" in stored
    }
