"""The user's model as it was trained: made by the recipe's factory, with the checkpoint's weights in it."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import JsonValue

from pipeline import checkpoint as checkpoints
from pipeline import program as programs
from pipeline import ranges, recipes
from pipeline.errors import CaptureError, CheckpointError, ExportyardError, RecipeError
from pipeline.trial import dtype_of
from pipeline.types import Recipe


def restored(recipe: Recipe, path: Path, called: Path) -> tuple[torch.nn.Module, dict[str, JsonValue]]:
    """The recipe's model with the checkpoint's weights, in evaluation mode; and facts about them.

    Args:
        recipe: gives the factory.
        path: the checkpoint's file.
        called: its name as the user knows it.

    Raises:
        CheckpointError: damaged, unsafe, or of another model.
        RecipeError: the factory is missing, raises, or makes something else than a module.
        CaptureError: a saved program serves fewer sizes than the recipe asks for.
    """
    if path.suffix == ".pt2":
        return _saved(recipe, path), {"source": "pt2"}
    if recipe.factory is None:
        raise RecipeError(
            f"recipe `{recipe.name}` has no `factory`, and `{path.name}` holds only weights",
            hint='add `factory = "model:make"` to recipe.toml, a function that returns the torch.nn.Module',
        )
    model = recipes.call(recipe, recipe.factory, "factory")
    if not isinstance(model, torch.nn.Module):
        raise RecipeError(
            f'recipe `{recipe.name}`: `factory = "{recipe.factory}"` returned a {type(model).__name__}',
            hint="return a torch.nn.Module",
        )
    state, facts = checkpoints.read(path)
    try:
        facts |= checkpoints.fill(model, state, called)
        model.cpu()
        model.eval()
    except ExportyardError:
        raise
    except Exception as error:  # a module's own hooks, or parameters without memory
        what = f'the model of `factory = "{recipe.factory}"` does not take its weights'
        raise recipes.fault(recipe, what, error) from error
    return model, {"source": path.suffix.removeprefix("."), **facts}


def _saved(recipe: Recipe, path: Path) -> torch.nn.Module:
    """The module inside a saved program, which must have the recipe's inputs and ranges."""
    if recipe.factory is not None:
        recipes.resolve(recipe, recipe.factory, "factory")  # it may register operators that the program uses
    try:
        program = torch.export.load(path)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the checkpoint `{path}` is truncated, or not a program that this torch can read: {first[:160]}",
            hint="write it again with `torch.export.save(program, path)`",
        ) from error
    own = programs.user_inputs(program)
    shown = ", ".join(f"{dtype_of(one)}{[str(size) for size in one.shape]}" for one in own)
    if len(own) != len(recipe.inputs):
        raise CheckpointError(
            f"the program `{path}` takes {len(own)} inputs ({shown}), the recipe describes {len(recipe.inputs)}",
            hint="list the program's inputs in [[inputs]], in its order",
        )
    for value, spec in zip(own, recipe.inputs, strict=True):
        if dtype_of(value) != spec.dtype or len(value.shape) != len(spec.shape):
            raise CheckpointError(
                f"the program `{path}` takes {dtype_of(value)} of rank {len(value.shape)} where the recipe's input"
                f" `{spec.name}` is {spec.dtype} {list(spec.shape)}; it takes {shown}",
                hint="describe the program's inputs in [[inputs]], in its order",
            )
    ranges.check_axes(program, recipe, {})
    for doubt in ranges.narrowed(program, recipe, {}):
        raise CaptureError(f"in the program `{path}`, {doubt.reason}", hint=doubt.hint)
    module = program.module(check_guards=False)
    assert isinstance(module, torch.nn.Module)
    return module
