"""Kernels of the codecs: plain loops over arrays, compiled to machine code at their first call."""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """Compile a loop, without holding the interpreter while it runs.

    What was compiled is kept beside the module, or in the user's cache folder, for the next
    process; where neither can be written to (or ``NUMBA_CACHE_DIR``), it is compiled again.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(nogil=True)(function)


def inlined(function: Callable) -> Callable:
    """A part of such loops, which is written out where it is called, before all is optimised."""
    return njit(inline="always")(function)
