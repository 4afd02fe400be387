"""EfficientNet-Lite0, against figures of the packages that published it (efficientnet-lite-pytorch
0.1.0, to which timm's tf_efficientnet_lite0 is equal), with the committed weights in float32."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workbench import compress, data, measure, models, storage
from workbench.models import efficientnet
from workbench.models.efficientnet import STAGES, InvertedResidual, from_published


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return models.pretrained("efficientnet-lite0")


def published() -> dict[str, torch.Tensor]:
    return load_file(data.verified("models/efficientnet_lite0_fp16.safetensors"))


def test_logits_are_those_of_the_published_network(net):
    ramp = torch.linspace(-1, 1, 224)
    planes = [ramp[:, None] * ramp, ramp[:, None].expand(224, 224), ramp.expand(224, 224)]
    with torch.no_grad():
        logits = net(torch.stack(planes)[None])[0]
    expected = [-0.2137094, 0.2395677, 0.1923615, -0.2831321, 0.6996110, 1.6768279]
    assert logits[:6].tolist() == pytest.approx(expected, abs=1e-4)
    assert logits.argmax() == 818
    assert logits.norm().item() == pytest.approx(38.4686050, abs=1e-3)


def test_every_published_weight_has_its_place(net):
    stored = published()
    renamed = from_published(stored)
    assert sorted(renamed) == sorted(net.state_dict())
    kept = sum(x.numel() for x in stored.values())
    assert sum(x.numel() for x in renamed.values()) == kept
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not net.training


@pytest.mark.parametrize(
    ("photo", "label"),
    [
        ("koala", "koala"),
        ("panda", "giant panda"),
        ("baseball", "baseball"),
        ("scarlet_macaw", "macaw"),
        ("coffee", "espresso"),
        ("arc_de_triomphe", "triumphal arch"),
    ],
)
def test_photographs_are_recognised(net, photo, label):
    image = data.photo(photo)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    square = image.resize((224, 224), box=(left, top, left + side, top + side))
    pixels = torch.tensor(list(square.tobytes()), dtype=torch.uint8).view(1, 224, 224, 3)
    with torch.no_grad():
        answer = net(data.as_imagenet(pixels)).argmax().item()
    assert data.imagenet_labels()[answer] == label


def test_a_stride_of_two_pads_as_tensorflow_does():
    """Of an even number of pixels it puts the odd row and column of zeros after the image."""
    for kernel, before, after in ((3, 0, 1), (5, 1, 2)):
        pad, convolution, *_ = efficientnet.convolution(1, 1, kernel, stride=2)
        assert pad.padding == (before, after, before, after)
        assert convolution(pad(torch.zeros(1, 1, 8, 8))).shape == (1, 1, 4, 4)


def test_a_block_adds_its_input_only_where_the_shape_stays():
    assert InvertedResidual(16, 16, 3, stride=1, expansion=6).adds
    assert not InvertedResidual(16, 24, 3, stride=1, expansion=6).adds
    assert not InvertedResidual(16, 16, 3, stride=2, expansion=6).adds
    assert sum(blocks for blocks, *_ in STAGES) == 16
    block = InvertedResidual(8, 8, 3, stride=1, expansion=2).eval()
    nn.init.zeros_(block.layers[-2].weight)
    x = torch.randn(1, 8, 6, 6)
    assert torch.allclose(block(x), x, atol=1e-6)


def test_another_number_of_classes():
    net = models.efficientnet_lite0(classes=7).eval()
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_it_is_compared_saved_and_exported_as_any_other(net, tmp_path):
    crops = data.photo_crops(6, seed=1)
    task = data.unlabelled(net, train=data.photo_crops(8, part="calibration"), test=crops)
    int8 = compress.Recipe(compress.QuantizeStatic(samples=4))(net, task)
    path = tmp_path / "net.safetensors"
    storage.save(int8, path, codec="plain", progress=False)
    loaded = storage.load(path, models.build("efficientnet-lite0"))
    with torch.inference_mode():
        assert torch.equal(loaded(crops), int8(crops))
    assert path.stat().st_size < 0.29 * models.file_bytes(net)
    frame = measure.compare(
        task, {"fp32": (net, "onnxruntime"), "int8": int8}, repeats=10, progress=False
    ).set_index("name")
    assert frame.error.tolist() == ["", ""]
    assert frame.score["fp32"] == 1  # what ONNX Runtime computes is what torch does
    assert 0 < frame.score["int8"] <= 1
