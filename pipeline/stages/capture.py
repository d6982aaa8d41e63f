"""Capture: from a checkpoint and a recipe to a ``torch.export`` program that is proven to be the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic  # torch has no public switch for it

from pipeline import breaks, ranges, recipes
from pipeline import checkpoint as checkpoints
from pipeline import program as programs
from pipeline.errors import CaptureError, CheckpointError, ExportyardError, RecipeError
from pipeline.store import Stored, write_json
from pipeline.trial import Answer, Flat, compare, dtype_of, tensors
from pipeline.types import Recipe, Signature, TensorSpec


def capture(recipe: Recipe, checkpoint: Stored, out: Path) -> dict[str, JsonValue]:
    """Write ``program.pt2`` and ``signature.json`` into `out`.

    The program takes the recipe's inputs by position and returns a flat tuple in the order of the recipe's outputs.

    Raises:
        CheckpointError: damaged, unsafe, or of another model.
        RecipeError: the factory is missing, raises, or makes something else than a module.
        CaptureError: the model fails, can't be traced, serves fewer sizes, or its trace answers differently.
    """
    path = checkpoints.file_of(checkpoint)
    with programs.quiet():
        called = Path(str(checkpoint.artifact.facts.get("source", path)))  # as the user knows it
        model, facts = _model(recipe, path, called)
        traced = ranges.trace_sizes(recipe)
        reference = [Answer.of(recipe, model, sizes) for sizes in ranges.check_sizes(recipe, traced)]
        flat = Flat(model, [spec.name for spec in recipe.outputs], copies=any(one.changed for one in reference))
        flat.training = model.training  # not .train(): the module of a saved program refuses it
        program, mode = _trace(recipe, flat, traced)
        try:
            _check(recipe, program, model, reference, {})
        except CaptureError:
            _explain(recipe, flat, model, traced, reference)
            raise
    signature = _signature(recipe, program)
    programs.save(program, out / programs.FILE, recipe.root)
    write_json(out / "signature.json", signature.plain())
    spans: dict[str, JsonValue] = {name: [axis.min, axis.max] for name, axis in recipe.axes.items()}
    facts |= {"mode": mode, "ranges": spans, "nodes": len(program.graph.nodes), **checkpoints.count(model)}
    facts["operators"] = [*programs.custom_operators(program)]
    return facts


class _Echo(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.clone() for one in inputs)


def _model(recipe: Recipe, path: Path, called: Path) -> tuple[torch.nn.Module, dict[str, JsonValue]]:
    """The recipe's model with the checkpoint's weights, in evaluation mode."""
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


def _trace(recipe: Recipe, flat: Flat, sizes: Mapping[str, int]) -> tuple[ExportedProgram, str]:
    """The traced program, and how it was traced: ``non-strict`` where that works, else ``strict``."""
    try:
        return _export(recipe, flat, sizes, strict=False), "non-strict"
    except Exception as first:
        try:
            return _export(recipe, flat, sizes, strict=True), "strict"
        except Exception as second:

            def draft() -> Any:
                inputs, dynamic = tensors(recipe, sizes), _dynamic(recipe)
                with breaks.tidy_traces():
                    found = torch.export.draft_export(flat, inputs, dynamic_shapes=(dynamic,))
                return getattr(found, "_report")  # noqa: B009  a private attribute, the only way to the report

            nothing = _export(recipe, Flat(_Echo(), [], copies=False), sizes, strict=False)  # has the same symbols
            symbols = programs.axis_symbols(nothing, recipe)
            raise breaks.explain(recipe, first, second, draft, symbols) from first


def _export(recipe: Recipe, flat: Flat, sizes: Mapping[str, int], *, strict: bool) -> ExportedProgram:
    # without size-oblivious tracing, an axis with min 1 comes back as 2 and more, and convolutions and pools
    # exclude further sizes at which they work
    with symbolic.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(flat, tensors(recipe, sizes), dynamic_shapes=(_dynamic(recipe),), strict=strict)


def _dynamic(recipe: Recipe) -> tuple[dict[int, Any], ...]:
    """Each dynamic dimension as a symbol of its own within its range.

    AUTO, not a named Dim: a Dim makes the whole trace fail without a line, while AUTO lets us read what it became.
    """
    return tuple(
        {
            place: Dim.AUTO(min=recipe.axes[dim].min, max=recipe.axes[dim].max)
            for place, dim in enumerate(spec.shape)
            if isinstance(dim, str) and ranges.is_dynamic(recipe.axes[dim])
        }
        for spec in recipe.inputs
    )


def _check(
    recipe: Recipe,
    program: ExportedProgram,
    model: torch.nn.Module,
    reference: list[Answer],
    lines: Mapping[str, str],
) -> None:
    """Compare program and model at small sizes and wherever tracing has left a doubt; then widen its ranges.

    Raises:
        CaptureError: an axis is a constant, the two differ, or one of them fails.
    """
    ranges.check_axes(program, recipe, lines)
    run = programs.runnable(program)
    doubts = {str(doubt.sizes): doubt for doubt in ranges.assumed(program, recipe, lines)}
    doubts |= {str(doubt.sizes): doubt for doubt in ranges.narrowed(program, recipe, lines)}
    for answer in reference:
        compare(recipe, run, model, answer, doubts.pop(str(answer.sizes), None))
    for doubt in doubts.values():
        compare(recipe, run, model, Answer.of(recipe, model, doubt.sizes), doubt)
    ranges.widen(program, recipe)


def _explain(
    recipe: Recipe,
    flat: Flat,
    model: torch.nn.Module,
    sizes: Mapping[str, int],
    reference: list[Answer],
) -> None:
    """Trace once more and find the same fault again, now with the user's line in the message."""
    with ranges.Lines(recipe.root) as lines:
        program, _ = _trace(recipe, flat, sizes)
    _check(recipe, program, model, reference, lines.found)


def _signature(recipe: Recipe, program: ExportedProgram) -> Signature:
    symbols = programs.axis_symbols(program, recipe)

    def shape(value: torch.Tensor) -> tuple[int | str, ...]:
        return tuple(programs.in_axes(size, symbols) for size in programs.shape_of(value))

    return Signature(
        inputs=tuple(
            TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape(value))
            for spec, value in zip(recipe.inputs, programs.user_inputs(program), strict=True)
        ),
        outputs=tuple(
            TensorSpec.model_validate(
                {"name": spec.name, "dtype": dtype_of(value), "shape": shape(value), "kind": spec.kind}
            )
            for spec, value in zip(recipe.outputs, programs.user_outputs(program), strict=True)
        ),
        axes=recipe.axes,
    )
