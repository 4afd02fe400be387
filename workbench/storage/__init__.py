"""A model in, bytes out, and back: the smallest honest file, and where its bytes are."""

from workbench.compress.parts import MismatchError
from workbench.storage.artifact import Artifact, inspect, load, save
from workbench.storage.ledger import Ledger
from workbench.storage.streams import StreamError

__all__ = ["Artifact", "Ledger", "MismatchError", "StreamError", "inspect", "load", "save"]
