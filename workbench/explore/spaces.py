"""What `workbench.explore.search` tries: recipes of one form, told apart by a few numbers.

A space turns an optuna trial into a recipe without training, knows by itself, before anything is
built, where a search should start, and what a recipe will cost. `Codes` is for small files: each
layer has its own sparsity and its own number of shared values. `Channels` is for speed: fewer
channels, and int8 kernels.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.compress.planning import best_choice
from workbench.compress.recipe import (
    Prune,
    PruneStructured,
    QuantizeStatic,
    Recipe,
    ShareWeights,
)
from workbench.explore.limits import Limits

if TYPE_CHECKING:
    from optuna import Trial

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
CLUSTERS = (3, 7, 15, 31)
SHARES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 0.85, 1.0)
# How much of the harm of pruning is left after training. It is not known before, so plans are made
# for both: training heals nothing, or nine tenths.
HEALED = (1.0, 0.1)
# Of the limit of size, for the plans. Values come unevenly, which a coded file uses: a plan for a
# little more than the limit may keep to it, and what trains well far below it is the smallest.
PARTS = (1.1, 0.95, 0.75, 0.5, 0.3)


class Codes:
    """Prune each layer to its own sparsity, then share its own number of values.

    Args:
        pruning, sharing: the tables that `workbench.compress.sensitivity` made of `SPARSITIES` and
            `CLUSTERS`.
        coded: whether the file is coded, so that zeros take less than other values. In a plain file
            they do not, and nothing is pruned.
    """

    cost = "size_bytes"

    def __init__(self, pruning: pd.DataFrame, sharing: pd.DataFrame, *, coded: bool):
        self.coded = coded
        first = sharing.drop_duplicates("layer").set_index("layer")
        self.layers = {name: (name, *first.shared_with[name]) for name in first.index}
        self.other_bytes = int(first.model_bytes.iloc[0] - first.dense_bytes.sum())
        self.weights = first.weights.to_dict()
        self.sharing_harm = _table(sharing)
        self.pruning_harm = _table(pruning) | {(name, 0.0): 0.0 for name in self.layers}

    def recipe(self, trial: "Trial") -> Recipe:
        """The recipe of a trial, without training."""
        sparsity, clusters = {}, {}
        for name, tied in self.layers.items():
            levels = self._sparsities(name)
            if len(levels) > 1:
                level = levels[trial.suggest_int(f"{name} sparsity", 0, len(levels) - 1)]
                if level > 0:
                    sparsity |= dict.fromkeys(tied, level)
            level = CLUSTERS[trial.suggest_int(f"{name} clusters", 0, len(CLUSTERS) - 1)]
            clusters |= dict.fromkeys(tied, level)
        pruned = [Prune(sparsity=sparsity)] if sparsity else []
        return Recipe(*pruned, ShareWeights(clusters=clusters))

    def starts(self, limits: Limits, dense_bytes: int) -> list[dict[str, int]]:
        """Parameters of the plans for the limit of size and below it: for each, the levels of least
        predicted harm, if training heals nothing of pruning and if it heals much."""
        most = limits.size_bytes if limits.size_bytes < math.inf else 0.1 * dense_bytes
        names = {
            name: [(s, c) for s in self._sparsities(name) for c in CLUSTERS] for name in self.layers
        }
        found = []
        for part, healed in itertools.product(PARTS, HEALED):
            choices = []
            for name, levels in names.items():
                sizes = np.array([self.layer_bytes(name, *level) for level in levels], np.int64)
                harms = np.array([self._harm(name, *level, healed) for level in levels])
                choices.append((sizes, harms.clip(min=0)))
            least = sum(int(sizes.min()) for sizes, _ in choices)
            budget = part * most - self.other_bytes
            if budget >= least:
                found.append(self._parameters(names, best_choice(choices, budget)))
        return found

    def predicted(self, recipe: Recipe) -> float:
        """Harm of a recipe as the sum over its layers, if training heals most of pruning."""
        *pruned, shared = recipe.steps
        sparsity = pruned[0].sparsity if pruned else {}
        return sum(
            self._harm(name, sparsity.get(name, 0.0), shared.clusters[name], HEALED[-1])
            for name in self.layers
        )

    def layer_bytes(self, name: str, sparsity: float, clusters: int) -> int:
        """Bytes of one layer: the entropy of its codes, or in a plain file their width."""
        weights = self.weights[name]
        density = 1 - sparsity
        if self.coded:
            zeros = sparsity * math.log2(sparsity) if sparsity else 0
            kept = density * math.log2(density / clusters)
            bits = -weights * (zeros + kept)
        else:
            bits = weights * math.ceil(math.log2(clusters + 1))
        return math.ceil(bits / 8) + 4 * clusters

    def _sparsities(self, name: str) -> Sequence[float]:
        prunable = self.coded and (name, SPARSITIES[-1]) in self.pruning_harm
        return SPARSITIES if prunable else (0.0,)

    def _harm(self, name: str, sparsity: float, clusters: int, healed: float) -> float:
        return healed * self.pruning_harm[name, sparsity] + self.sharing_harm[name, clusters]

    def _parameters(self, names: Mapping[str, list], chosen: list[int]) -> dict[str, int]:
        found = {}
        for (name, levels), index in zip(names.items(), chosen, strict=True):
            sparsity, clusters = levels[index]
            if len(self._sparsities(name)) > 1:
                found[f"{name} sparsity"] = SPARSITIES.index(sparsity)
            found[f"{name} clusters"] = CLUSTERS.index(clusters)
        return found


class Channels:
    """Keep a share of the multiply-accumulates or of the parameters, then round to int8 or not."""

    cost = "macs"

    def recipe(self, trial: "Trial") -> Recipe:
        """The recipe of a trial, without training."""
        share = SHARES[trial.suggest_int("share", 0, len(SHARES) - 1)]
        target = trial.suggest_categorical("target", ["macs", "parameters"])
        scope = trial.suggest_categorical("scope", ["global", "layer"])
        importance = trial.suggest_categorical("importance", ["taylor", "l1"])
        cut = PruneStructured(scope=scope, importance=importance, **{target: share})
        int8 = [QuantizeStatic()] if trial.suggest_categorical("int8", [True, False]) else []
        return Recipe(*([cut] if share < 1 else []), *int8)

    def starts(self, limits: Limits, dense_bytes: int) -> list[dict[str, object]]:
        """Parameters of int8 alone, and with the shares of parameters that the limit asks for."""
        most = min(1.0, 4 * limits.size_bytes / dense_bytes)  # int8 takes a quarter by itself
        found = []
        for target in ("macs", "parameters"):
            for cut in (1.0, 0.7, 0.4):
                index = max(0, np.searchsorted(SHARES, cut * most, side="right") - 1)
                found.append({"share": int(index), "target": target, "scope": "global",
                              "importance": "taylor", "int8": True})  # fmt: skip
        return found

    def predicted(self, recipe: Recipe) -> float:
        """Not known: there is no sensitivity of channels."""
        return math.nan


def _table(sensitivity: pd.DataFrame) -> Mapping[tuple[str, float], float]:
    rows = zip(sensitivity.layer, sensitivity.level, sensitivity.loss_increase, strict=True)
    # One that seems to help counts as none, one that breaks the model as more than any other.
    return {(layer, level): max(0.0, harm) if harm == harm else 1e9 for layer, level, harm in rows}
