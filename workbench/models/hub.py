"""Networks of the usual hubs, for users who have a connection and the hub's own library."""

import importlib

from torch import nn

# How a network of each library is fetched, by the class or function that its users call.
_LIBRARIES = ("timm", "transformers")


def from_hub(name: str) -> nn.Module:
    """A pretrained network by its name on a hub, in evaluation mode.

    The library fetches the weights when they are not in its cache yet; so this is the one function
    of the workbench that may need a connection.

    Args:
        name: the library, a colon, and the name it knows: ``"timm:mobilenetv3_small_100"`` for an
            image classifier, ``"transformers:prajjwal1/bert-tiny"`` for a language model, or the
            path of a folder in which transformers saved one.

    Returns:
        The network. One of timm maps images to logits. One of transformers keeps its own outputs;
        wrap it in an `nn.Module` that returns the one tensor you want to compare.

    Raises:
        ValueError: the name has no library, or one that is not known here.
        ImportError: the library is not installed.
    """
    library, colon, known_as = name.partition(":")
    if not colon or not known_as or library not in _LIBRARIES:
        raise ValueError(
            f"name is {name!r}; give a library and a name, such as 'timm:mobilenetv3_small_100' or "
            f"'transformers:prajjwal1/bert-tiny'; the libraries are {list(_LIBRARIES)}"
        )
    try:
        module = importlib.import_module(library)
    except ImportError as missing:
        raise ImportError(
            f"{name!r} needs {library}, which could not be imported ({missing}); install it with: "
            f"pip install {library}"
        ) from missing
    if library == "timm":
        return module.create_model(known_as, pretrained=True).eval()
    return module.AutoModel.from_pretrained(known_as).eval()
