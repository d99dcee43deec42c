"""A TOML file as a list of stages: validation, the run folder, resume. Knows not how a stage works."""

from liubai.recipe.recipe import Recipe, StagePlan, load_recipe
from liubai.recipe.runner import run

__all__ = ["Recipe", "StagePlan", "load_recipe", "run"]
