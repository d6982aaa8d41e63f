"""A workspace: a git repository with ``recipes/ targets/ artifacts/ dvc.yaml``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline import recipes, targets
from pipeline.errors import WorkspaceError
from pipeline.types import Recipe, Target

ROWS = Path("targets/targets.toml")


@dataclass(frozen=True)
class Workspace:
    """Where things are. All paths are absolute."""

    root: Path

    @property
    def recipes(self) -> Path:
        """Folder with one folder a recipe."""
        return self.root / "recipes"

    @property
    def artifacts(self) -> Path:
        """Folder with one folder a recipe, which holds all that was made for it."""
        return self.root / "artifacts"

    def rows(self) -> dict[str, Target]:
        """All target rows by name."""
        return targets.read(self.root / ROWS)

    def recipe_names(self) -> list[str]:
        """Names of all recipes, sorted."""
        return sorted(path.parent.name for path in self.recipes.glob("*/recipe.toml"))

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`.

        Raises:
            UsageError: there is none; the nearest name is suggested.
            RecipeError: its file is wrong.
        """
        return recipes.read(self.recipes, name, self.recipe_names())


def find(start: Path) -> Workspace:
    """The workspace that holds `start`: the nearest folder upward with ``recipes/`` and ``targets/targets.toml``.

    Raises:
        WorkspaceError: there is none.
    """
    start = Path(os.path.realpath(start))  # unlike `resolve`, it doesn't stumble over a loop of links
    if not os.path.isdir(start):  # noqa: PTH112  unlike `is_dir`, it takes any text for a path
        raise WorkspaceError(f"`{start}` is not a folder", hint="give an existing workspace with `-C DIR`")
    for folder in (start, *start.parents):
        if (folder / ROWS).is_file() and (folder / "recipes").is_dir():
            return Workspace(folder)
    raise WorkspaceError(
        f"no workspace at `{start}` or above (looked for `recipes/` and `{ROWS}`)",
        hint="`exportyard init DIR` makes one; `-C DIR` names one",
    )
