import hashlib

import numpy as np
import pytest
import torch

from workbench import data


def test_every_photograph_has_an_author_a_licence_and_a_source():
    lines = (data.folder() / "photos/origins.csv").read_text().splitlines()
    assert lines[0] == "file,author,licence,source,package"
    files = {path.name for path in (data.folder() / "photos").glob("*.jpg")}
    assert {line.split(",")[0] for line in lines[1:]} == files
    assert {name + ".jpg" for name in data.photo_names()} == files
    assert len(files) > 100
    assert sum((data.folder() / "photos" / name).stat().st_size for name in files) < 6_000_000


def test_every_photograph_opens_in_colour_and_is_its_own():
    digests = set()
    for name in data.photo_names():
        image = data.photo(name)
        assert image.mode == "RGB"
        assert max(image.size) <= 384
        digests.add(hashlib.sha256(image.tobytes()).hexdigest())
    assert len(digests) == len(data.photo_names())


def test_crops_have_the_networks_range_and_repeat():
    crops = data.photo_crops(12, seed=3)
    assert crops.shape == (12, 3, 224, 224)
    assert -127 / 128 <= crops.min() < -0.5
    assert 0.5 < crops.max() <= 1
    assert torch.equal(crops, data.photo_crops(12, seed=3))
    assert not torch.equal(crops, data.photo_crops(12, seed=4))
    assert torch.equal(crops[:5], data.photo_crops(5, seed=3))


def test_crops_vary():
    """More crops than photographs: the second view of each is another one."""
    crops = data.photo_crops(250, size=16)
    assert len({crop.numpy().tobytes() for crop in crops}) == 250


def test_parts_share_no_photograph(monkeypatch):
    original = data.photo
    opened = {"calibration": set(), "test": set()}
    for part, seen in opened.items():
        monkeypatch.setattr(data, "photo", lambda name, seen=seen: seen.add(name) or original(name))
        data.photo_crops(300, part=part, size=8)
    assert opened["calibration"].isdisjoint(opened["test"])
    assert opened["calibration"] | opened["test"] == set(data.photo_names())


def test_a_crop_is_a_part_of_its_photograph(monkeypatch):
    """Of an image whose red is its column and whose green its row, a crop shows a rectangle."""
    from PIL import Image

    rows, columns = np.mgrid[0:200, 0:250].astype(np.uint8)
    image = Image.fromarray(np.stack([columns, rows, rows], 2))
    monkeypatch.setattr(data, "photo", lambda name: image)
    crops = data.photo_crops(200, size=32) * 128 + 127  # (200, 3, 32, 32)
    widths = crops[:, 0].amax((1, 2)) - crops[:, 0].amin((1, 2))
    heights = crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))
    share = widths * heights / (200 * 250)
    assert 0.2 < share.min() < 0.4
    assert 0.7 < share.max() <= 1
    mirrored = crops[:, 0, 0, 0] > crops[:, 0, 0, -1]
    assert 60 < mirrored.sum() < 140
    assert crops[:, 1, 0, 0].lt(crops[:, 1, -1, 0]).all()  # never upside down
    assert 0.6 < (widths / heights).min() < 0.85
    assert 1.2 < (widths / heights).max() < 1.5


def test_as_imagenet():
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert data.as_imagenet(pixels).flatten().tolist() == [-127 / 128, 0, 1]


def test_a_thousand_names():
    labels = data.imagenet_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[1], labels[999]) == ("tench", "goldfish", "toilet tissue")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count is 0; give a whole number from 1"),
        ({"count": 2.5}, "count is 2.5"),
        ({"count": 1, "size": 0}, "size is 0"),
        ({"count": 1, "part": "train"}, "part is 'train'; choose 'calibration' or 'test'"),
    ],
)
def test_impossible_crops(settings, message):
    with pytest.raises(ValueError, match=message):
        data.photo_crops(**settings)
