"""A model in, a service out: so far, the runtimes that a model can be lowered to."""

from workbench.deploy.runtimes import RUNTIMES, Predictor, prepare

__all__ = ["RUNTIMES", "Predictor", "prepare"]
