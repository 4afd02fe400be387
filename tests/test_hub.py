import sys
import types

import pytest
from torch import nn

from workbench import models


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "timm:", "keras:resnet", ":", ""])
def test_a_name_without_a_known_library(name):
    with pytest.raises(ValueError, match=r"give a library and a name.*\['timm', 'transformers'\]"):
        models.from_hub(name)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"needs {library}.*pip install {library}"):
        models.from_hub(f"{library}:something")


def test_the_library_is_asked_for_trained_weights(monkeypatch):
    """Only the call is checked here: neither library is installed for the tests."""
    asked = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return nn.Dropout()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    assert not models.from_hub("timm:mobilenetv3_small_100").training
    assert asked == [("mobilenetv3_small_100", True)]
