"""Which codec serves a tensor: the one of the fewest bytes, among those that decode fast enough.

Speeds are stated by the codecs, not timed here, so that the same tensor always gives the same
bytes.
"""

from importlib import import_module

from torch import Tensor

from workbench.storage import streams

_SAMPLE = 2**14  # elements from which the speed of a slow codec is told before it is tried


def encode(tensor: Tensor, codec: str, values_per_s: float) -> bytes:
    """The stream of a tensor.

    Args:
        codec: one of `streams.CODECS`, or "auto" for the best of them.
        values_per_s: the least decoding speed, on one thread, that "auto" takes.
    """
    if codec != "auto":
        return streams.encode(tensor, codec)
    found = [streams.encode(tensor, "plain")]
    for name in streams.CODECS[1:]:
        rate = import_module(f"workbench.storage.{name}").decode_rate
        sample = tensor.detach().reshape(-1)[:_SAMPLE]
        if rate(streams.encode(sample, name)) >= values_per_s:
            stream = streams.encode(tensor, name)
            if rate(stream) >= values_per_s:
                found.append(stream)
    return min(found, key=len)  # of equals the first, which is the simplest
