"""A recipe as the lines of Python that make it and apply it."""

from workbench.compress import Recipe


def code_of(recipe: Recipe, *, model: str = "model", task: str = "task") -> str:
    """Lines to paste into a notebook where ``model`` and ``task`` are known by these names.

    >>> from workbench.compress import FineTune, QuantizeWeights
    >>> print(code_of(Recipe(QuantizeWeights(bits=3), FineTune(epochs=2))))
    from workbench.compress import FineTune, QuantizeWeights, Recipe
    <BLANKLINE>
    recipe = Recipe(
        QuantizeWeights(bits=3),
        FineTune(epochs=2),
    )
    small = recipe(model, task)
    """
    written = repr(recipe)
    imports = []
    if "partial(" in written:
        imports += ["from functools import partial", ""]
    if "torch." in written:
        imports += ["import torch", ""]
    names = sorted({"Recipe", *(type(step).__name__ for step in recipe.steps)})
    imports.append(f"from workbench.compress import {', '.join(names)}")
    return "\n".join([*imports, "", f"recipe = {written}", f"small = recipe({model}, {task})"])
