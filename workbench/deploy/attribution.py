"""Which numbers of an input an answer rests on: Captum's attributions for an exported model.

A program of ``torch.export`` has gradients, and gets integrated gradients. Any other file only
answers, and gets occlusion: how much lower the output is when a patch of the input is taken away.
References: Sundararajan et al. (2017), "Axiomatic attribution for deep networks"; Zeiler and Fergus
(2014), "Visualizing and understanding convolutional networks".
"""

from collections.abc import Sequence

import numpy as np

from workbench.deploy.loading import Loaded, TorchModel

METHODS = ("integrated gradients", "occlusion")
_AT_ONCE = 32  # patches, or points of the path, computed together
_PATCHES_A_SIDE = 7


def attribute(
    loaded: Loaded, arrays: Sequence[np.ndarray], *, target: int, method: str | None = None
) -> np.ndarray:
    """What each number of one example adds to output ``target``, zeros being the baseline.

    Args:
        arrays: one example as the model takes it, (1, ...), of floats.
        target: position in the output, (1, classes).
        method: of `METHODS`; by default gradients where the file has them.

    Raises:
        ValueError: the model takes or gives something else, or has no gradients.
    """
    import torch
    from captum.attr import IntegratedGradients, Occlusion

    function = loaded.function if type(loaded) is TorchModel else None
    if method is None:
        method = METHODS[function is None]
    if method not in METHODS or (method == METHODS[0] and function is None):
        raise ValueError(f"method is {method!r}; this file has {METHODS[function is None :]}")
    if len(arrays) != 1 or arrays[0].dtype.kind != "f":
        raise ValueError("only models of one input, of floats, are explained")
    example = torch.from_numpy(arrays[0])  # (1, ...)
    if method == METHODS[0]:
        found = IntegratedGradients(function).attribute(
            example, target=target, n_steps=_AT_ONCE, internal_batch_size=_AT_ONCE
        )
    else:

        def answer(batch: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(loaded.run([batch.numpy()])[0])

        shape = example.shape[1:]
        window = [length if axis < len(shape) - 2 else -(-length // _PATCHES_A_SIDE)
                  for axis, length in enumerate(shape)]  # fmt: skip
        strides = tuple(max(1, length // 2) for length in window)
        found = Occlusion(answer).attribute(
            example, tuple(window), strides=strides, target=target, perturbations_per_eval=_AT_ONCE
        )
    return found.detach().numpy()
