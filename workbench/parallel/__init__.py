"""One model, several workers: processes for a function, and ways to share training among them."""

from workbench.parallel.launch import RankError, run

__all__ = ["RankError", "run"]
