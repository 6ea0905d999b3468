"""Recipes: sets of selection rules, each bound to the scorer that its number was chosen for."""

import functools
from importlib import resources

import yaml
from pydantic import Field

from ursa.config import RECIPES, FrozenModel, SelectionRule


class Recipe(FrozenModel):
    """A set of rules; `selection.recipe` applies it beside all other thresholds."""

    name: str
    title: str
    source: str = Field(description="where it was published, or that it is of this project")
    note: str = Field(description="what is left out, and why")
    rules: tuple[SelectionRule, ...] = Field(min_length=1)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers that it needs, sorted."""
        return tuple(sorted({rule.scorer for rule in self.rules}))


@functools.cache
def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: One of `ursa.config.RECIPES`.
    """
    text = resources.files("ursa.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    return Recipe.model_validate(yaml.safe_load(text))


def load_recipes() -> list[Recipe]:
    """Return all recipes, in order of their names."""
    return [load_recipe(name) for name in sorted(RECIPES)]
